"""The connection to one engine: describe, tokenizer, and the Lead stream. Knows grpc and pb2."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

import grpc
from google.rpc import error_details_pb2

from control_plane.engine_wire import decode_result, decode_snapshot, encode_plan
from control_plane.plan import Plan, Snapshot, StepResult
from control_plane.tokenizer import PromptTokenizer
from protos import wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc

LeadCall: TypeAlias = "grpc.aio.StreamStreamCall[engine_pb2.LeadRequest, engine_pb2.LeadResponse]"


class LinkLost(Exception):
    """The engine cannot be reached, or ended the Lead stream; says why.

    Attributes:
        denied: it was reached, and has no business with this replica.
    """

    def __init__(self, sentence: str, *, denied: bool = False) -> None:
        super().__init__(sentence)
        self.denied = denied


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """Where other replicas reach one; empty: nowhere that is known.

    Attributes:
        inference, admin: host:port of its APIs.
    """

    inference: str = ""
    admin: str = ""


class Refused(Exception):
    """Another replica leads the engine; `leader` says where it is."""

    def __init__(self, leader: ReplicaAddress) -> None:
        super().__init__(f"led from {leader.inference or 'elsewhere'}")
        self.leader = leader


class Draining:
    """What an engine says instead of a result when it is going to end, and waits until it may."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself; constant for one incarnation."""

    engine_id: str
    incarnation: str
    model: str
    fingerprint: str
    block_size: int
    block_count: int
    slot_count: int
    step_tokens: int
    max_length: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_digest: str
    host_block_count: int = 0
    bytes_per_block: int = 0
    kv_dtype: str = ""

    @property
    def kind(self) -> tuple[str, int, int, str]:
        """What engines must have in common for one tokenised and hashed request to fit them all."""
        return self.fingerprint, self.block_size, self.max_length, self.tokenizer_digest


class EngineLink:
    """One engine's address. Channels reconnect by themselves; calls raise LinkLost."""

    def __init__(self, address: str, tls: wire.Tls | None = None) -> None:
        self.address, self._tls = address, tls
        self._open()

    def _open(self) -> None:
        self._certificate = wire.version(self._tls)
        self._channel = wire.channel(self.address, self._tls)
        self._stub = engine_pb2_grpc.EngineServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def describe(self) -> EngineFacts:
        """Asks the engine what it is; before each attempt to lead it, when no stream is open.

        Raises:
            LinkLost: it cannot be reached.
        """
        if wire.is_outdated(self._tls, self._certificate):
            await self._channel.close()
            self._open()
        try:
            answer = await self._stub.Describe(engine_pb2.DescribeRequest(), timeout=5)
        except grpc.aio.AioRpcError as error:
            raise _lost(error) from error
        return EngineFacts(
            engine_id=answer.engine_id,
            incarnation=answer.incarnation,
            model=answer.model,
            fingerprint=answer.model_fingerprint,
            block_size=answer.geometry.block_size_tokens,
            block_count=answer.geometry.device_block_count,
            host_block_count=answer.geometry.host_block_count,
            bytes_per_block=answer.geometry.bytes_per_block,
            kv_dtype=answer.geometry.kv_dtype,
            slot_count=answer.limits.max_slots,
            step_tokens=answer.limits.max_tokens_per_step,
            max_length=answer.limits.max_model_length,
            vocabulary_size=answer.vocabulary_size,
            eos_token_ids=tuple(answer.eos_token_ids),
            tokenizer_digest=answer.tokenizer_digest,
        )

    async def tokenizer(self) -> PromptTokenizer:
        """Fetches the tokenizer; only for engines whose facts name a tokenizer digest."""
        data, template, special = bytearray(), "", {}
        try:
            async for part in self._stub.GetTokenizer(engine_pb2.GetTokenizerRequest(), timeout=60):
                data += part.tokenizer_json
                template = part.chat_template or template
                special.update(part.special_tokens.tokens)
        except grpc.aio.AioRpcError as error:
            raise _lost(error) from error
        return PromptTokenizer.from_parts(bytes(data), template or None, special)

    async def lead(self, own_address: ReplicaAddress, incarnation: str) -> Leadership:
        """Claims the engine, which was described in this incarnation.

        Raises:
            Refused: another replica leads it.
            LinkLost: it cannot be reached.
        """
        call = self._stub.Lead()
        try:
            claim = engine_pb2.Claim(
                leader_address=own_address.inference,
                leader_admin_address=own_address.admin,
                takes_draining=True,
            )
            await call.write(engine_pb2.LeadRequest(claim=claim))
            answer = await _read(call)
            if answer.WhichOneof("message") == "refused":
                call.cancel()
                refused = answer.refused
                raise Refused(ReplicaAddress(refused.leader_address, refused.leader_admin_address))
            granted = answer.granted
            if granted.incarnation != incarnation:
                raise LinkLost("the engine restarted between two calls")
            parts = [(await _read(call)).snapshot_part for _ in range(granted.snapshot_part_count)]
        except grpc.aio.AioRpcError as error:
            raise _lost(error) from error
        except BaseException:
            call.cancel()
            raise
        return Leadership(call, granted.epoch, decode_snapshot(parts))


class Leadership:
    """The Lead stream of one epoch.

    Attributes:
        snapshot: what was resident when it was granted.
    """

    def __init__(self, call: LeadCall, epoch: int, snapshot: Snapshot) -> None:
        self._call = call
        self.epoch, self.snapshot = epoch, snapshot

    async def send(self, plan: Plan) -> None:
        await self._write(engine_pb2.LeadRequest(plan=encode_plan(plan, self.epoch)))

    async def heartbeat(self) -> None:
        await self._write(engine_pb2.LeadRequest(heartbeat=engine_pb2.Heartbeat()))

    async def drained(self) -> None:
        """Lets a draining engine know that nothing is resident any more, nor will be."""
        await self._write(engine_pb2.LeadRequest(drained=engine_pb2.Drained()))

    async def result(self) -> StepResult | Draining:
        """Waits for the next result."""
        try:
            answer = await _read(self._call)
        except grpc.aio.AioRpcError as error:
            raise _lost(error) from error
        kind = answer.WhichOneof("message")
        if kind == "draining":
            return Draining()
        if kind != "result":
            raise LinkLost("the engine sent something that is no result")
        return decode_result(answer.result)

    def close(self) -> None:
        self._call.cancel()

    async def _write(self, message: engine_pb2.LeadRequest) -> None:
        try:
            await self._call.write(message)
        except asyncio.InvalidStateError as error:
            # The stream has ended already: with its status, not with this call.
            raise _lost(await _status(self._call)) from error
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, grpc.aio.InternalError) as error:
            raise _lost(error) from error


async def _read(call: LeadCall) -> engine_pb2.LeadResponse:
    answer = await call.read()
    if answer is grpc.aio.EOF:
        raise LinkLost("the engine ended the stream")
    assert isinstance(answer, engine_pb2.LeadResponse)  # noqa: S101
    return answer


async def _status(call: LeadCall) -> grpc.aio.AioRpcError:
    """What a stream that has ended has ended with."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )


def _lost(error: Exception) -> LinkLost:
    if not isinstance(error, grpc.aio.AioRpcError):
        return LinkLost(str(error))
    reasons = [
        detail.reason
        for detail in wire.error_details(error)
        if isinstance(detail, error_details_pb2.ErrorInfo)
    ]
    if "ENGINE_FAILED" in reasons:
        return LinkLost(str(error.details()))  # The engine's own account of what it died of.
    denied = error.code() is grpc.StatusCode.PERMISSION_DENIED
    return LinkLost(f"{error.code().name}: {error.details()}", denied=denied)
