"""The engine API over gRPC: what the engine is, its tokenizer, and the one stream that leads it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import grpc

from data_plane.engine import Engine, Launched
from data_plane.plan import PlanError, decode_plan
from data_plane.plan_check import check_plan
from data_plane.rank_link import Kind
from data_plane.ranks import Ranks
from data_plane.tokenizer_files import TokenizerFiles
from data_plane.worker import Worker
from protos import wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc
from protos.identity import HEALTH_METHODS, Guard, certificate_names

log = logging.getLogger(__name__)
T = TypeVar("T")

# Plans that may wait for the worker beside the one it executes. Two are the protocol's depth; a
# leader that sends far more is not ours.
MAX_PLANS_IN_FLIGHT = 4
_TOKENIZER_CHUNK_BYTES = 1 << 20
_REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
# For whoever watches the process to say why a job failed.
_REASON_SECONDS = 1.0
_DRAINED_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Seconds.

    Attributes:
        leader_timeout: a leader that sends nothing for this long is dropped.
        resident_grace: how long sequences stay without a leader.
    """

    leader_timeout: float = 10.0
    resident_grace: float = 60.0


@dataclass(slots=True)
class _Leadership:
    """The present leader.

    `broken` is set on the worker's thread when a plan is refused: what was queued behind it builds
    on a plan that never was.

    Attributes:
        takes_draining: it is told when the engine drains, and says when it has `drained`.
        writing: held while a message is written; a stream takes one at a time.
    """

    address: str
    admin_address: str
    epoch: int
    takes_draining: bool = False
    drained: bool = False
    next_step: int = 1
    broken: bool = False
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    results: asyncio.Queue[asyncio.Task[engine_pb2.StepResult]] = field(
        default_factory=asyncio.Queue
    )


def leaders_only(names: frozenset[str]) -> Guard | None:
    """What keeps all but some peers from everything but health; None for no names: nothing does."""

    def check(method: str, context: wire.Context) -> None:
        if method not in HEALTH_METHODS and names.isdisjoint(certificate_names(context)):
            sentence = "the caller's certificate has no name that may lead this engine"
            raise wire.failed(grpc.StatusCode.PERMISSION_DENIED, "NO_LEADER", sentence)

    return Guard(check) if names else None


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """Arbiter of its own leadership: whoever holds the one Lead stream leads.

    Args:
        ranks: the other ranks of the engine, which do whatever this process does.

    Attributes:
        refused: plans that were refused, by why; see `PlanError`.
    """

    def __init__(
        self,
        engine: Engine,
        worker: Worker,
        tokenizer: TokenizerFiles | None,
        *,
        engine_id: str,
        times: ServiceTimes,
        ranks: Ranks | None = None,
    ) -> None:
        self._engine, self._worker, self._tokenizer = engine, worker, tokenizer
        self._ranks = ranks or Ranks()
        self._engine_id = engine_id
        self._times = times
        self._incarnation = uuid.uuid4().hex
        self._epoch = 0
        self._leader: _Leadership | None = None
        self._eviction: asyncio.Task[None] | None = None
        self._failing, self._failure = asyncio.Event(), ""
        self.refused = dict.fromkeys(("INVALID", "DRIFT", "STALE_EPOCH", "OUT_OF_ORDER"), 0)
        self._draining, self._leaving = asyncio.Event(), asyncio.Event()

    @property
    def engine_id(self) -> str:
        return self._engine_id

    @property
    def incarnation(self) -> str:
        return self._incarnation

    @property
    def epoch(self) -> int:
        """Of the last leadership that was granted."""
        return self._epoch

    @property
    def led(self) -> bool:
        return self._leader is not None

    async def drain(self, seconds: float) -> None:
        """Lets what is resident end, for so long at most, while the leader admits nothing new.

        Then the Lead stream is ended, for good.
        """
        self._draining.set()
        try:
            async with asyncio.timeout(seconds):
                while not self._is_drained:  # noqa: ASYNC110
                    await asyncio.sleep(_DRAINED_POLL_SECONDS)
        except TimeoutError:
            log.warning("%d sequences have not ended", self._engine.state.resident_slots().size)
        self._leaving.set()

    @property
    def _is_drained(self) -> bool:
        """Whether nothing is resident, nor on its way; a leader that knows Draining says so."""
        if self._leader is not None and self._leader.takes_draining:
            return self._leader.drained
        return not self._engine.state.resident_slots().size

    def fail(self, sentence: str) -> None:
        """Ends the Lead stream, now and for good, with why the engine cannot go on."""
        self._failure = sentence
        self._failing.set()

    async def Describe(
        self, request: engine_pb2.DescribeRequest, context: wire.Context
    ) -> engine_pb2.DescribeResponse:
        facts, sizes = self._engine.model.facts, self._engine.sizes
        return engine_pb2.DescribeResponse(
            engine_id=self._engine_id,
            incarnation=self._incarnation,
            model=facts.name,
            model_fingerprint=self._engine.fingerprint,
            geometry=engine_pb2.Geometry(
                layer_count=facts.layer_count,
                kv_head_count=facts.kv_head_count,
                head_size=facts.head_size,
                kv_dtype=str(self._engine.cache.dtype).removeprefix("torch."),
                block_size_tokens=sizes.block_size,
                device_block_count=sizes.block_count,
                host_block_count=sizes.host_block_count,
                bytes_per_block=self._engine.cache.bytes_per_block,
            ),
            limits=engine_pb2.Limits(
                max_slots=sizes.slot_count,
                max_tokens_per_step=sizes.step_tokens,
                max_model_length=sizes.max_length,
                max_plans_in_flight=MAX_PLANS_IN_FLIGHT,
            ),
            vocabulary_size=facts.vocabulary_size,
            eos_token_ids=facts.eos_token_ids,
            tokenizer_digest=self._tokenizer.digest if self._tokenizer else "",
            counters=self._engine.counters,
        )

    async def GetTokenizer(
        self, request: engine_pb2.GetTokenizerRequest, context: wire.Context
    ) -> AsyncIterator[engine_pb2.GetTokenizerResponse]:
        if self._tokenizer is None:
            await wire.abort(
                context,
                wire.failed(
                    grpc.StatusCode.NOT_FOUND, "NO_TOKENIZER", "the model has no tokenizer"
                ),
            )
        data = self._tokenizer.tokenizer_json
        for start in range(0, len(data), _TOKENIZER_CHUNK_BYTES):
            chunk = data[start : start + _TOKENIZER_CHUNK_BYTES]
            yield engine_pb2.GetTokenizerResponse(tokenizer_json=chunk)
        if self._tokenizer.chat_template:
            yield engine_pb2.GetTokenizerResponse(chat_template=self._tokenizer.chat_template)
        tokens = engine_pb2.SpecialTokens(tokens=self._tokenizer.special_tokens)
        yield engine_pb2.GetTokenizerResponse(special_tokens=tokens)

    async def Lead(
        self,
        requests: AsyncIterator[engine_pb2.LeadRequest],
        context: wire.Context,
    ) -> None:
        try:
            if self._failure:
                raise _engine_failed(self._failure)
            if self._leaving.is_set():
                raise _engine_stops()
            claim = await self._next(requests)
            if claim is None or claim.WhichOneof("message") != "claim":
                raise _refusal(PlanError("INVALID", "the first message must be a claim"))
            if self._leader is not None:
                refused = engine_pb2.Refused(
                    leader_address=self._leader.address,
                    leader_admin_address=self._leader.admin_address,
                    epoch=self._leader.epoch,
                )
                await context.write(engine_pb2.LeadResponse(refused=refused))
                return
            await self._lead(claim.claim, requests, context)
        except wire.RpcError as error:
            if error.code in _REFUSALS:
                self._engine.counters.refused_plan_count += 1
                for reason in wire.reasons(error.details):
                    self.refused[reason] = self.refused.get(reason, 0) + 1
            await wire.abort(context, error)

    async def _lead(
        self,
        claim: engine_pb2.Claim,
        requests: AsyncIterator[engine_pb2.LeadRequest],
        context: wire.Context,
    ) -> None:
        self._epoch += 1
        leader = _Leadership(
            claim.leader_address, claim.leader_admin_address, self._epoch, claim.takes_draining
        )
        self._leader = leader
        if self._eviction is not None:
            self._eviction.cancel()
        fields = {"epoch": leader.epoch}
        name = leader.address or "unnamed"
        log.info("leader granted: epoch %d to %s", leader.epoch, name, extra=fields)
        tasks: list[asyncio.Task[object]] = []
        try:
            # The worker's queue is first come, first served: by the time this snapshot is taken,
            # every plan of earlier leaders is done or cancelled.
            parts = await self._reported(self._worker.call(self._snapshot))
            granted = engine_pb2.Granted(
                epoch=leader.epoch,
                incarnation=self._incarnation,
                snapshot_part_count=len(parts),
            )
            await context.write(engine_pb2.LeadResponse(granted=granted))
            for part in parts:
                await context.write(engine_pb2.LeadResponse(snapshot_part=part))
            tasks.append(asyncio.create_task(_write_results(leader, context)))
            tasks.append(asyncio.create_task(self._read_plans(leader, requests)))
            tasks.append(asyncio.create_task(self._failing.wait()))
            tasks.append(asyncio.create_task(self._announce_end(leader, context)))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self._failure:
                raise _engine_failed(self._failure)
        finally:
            self._release(leader)
            for task in tasks:
                task.cancel()

    async def _announce_end(self, leader: _Leadership, context: wire.Context) -> None:
        """Tells a leader that the engine drains, and ends its stream when the engine ends."""
        await self._draining.wait()
        if leader.takes_draining:
            async with leader.writing:
                draining = engine_pb2.Draining()
                await context.write(engine_pb2.LeadResponse(draining=draining))
        await self._leaving.wait()
        raise _engine_stops()

    async def _read_plans(
        self, leader: _Leadership, requests: AsyncIterator[engine_pb2.LeadRequest]
    ) -> None:
        while (request := await self._next(requests)) is not None:
            kind = request.WhichOneof("message")
            if kind == "heartbeat":
                continue
            if kind == "drained":
                leader.drained = True
                continue
            if kind != "plan":
                raise _refusal(PlanError("INVALID", "a second claim on one stream"))
            plan = request.plan
            if plan.epoch != leader.epoch:
                text = f"the plan's epoch {plan.epoch} is not the present one, {leader.epoch}"
                raise _refusal(PlanError("STALE_EPOCH", text))
            if plan.step != leader.next_step:
                text = f"step {plan.step} came where {leader.next_step} is next"
                raise _refusal(PlanError("OUT_OF_ORDER", text))
            if leader.results.qsize() >= MAX_PLANS_IN_FLIGHT:
                raise _refusal(PlanError("OUT_OF_ORDER", "too many plans in flight"))
            leader.next_step += 1
            leader.results.put_nowait(asyncio.create_task(self._execute(leader, plan)))
            await asyncio.sleep(0)  # Lets the task queue its job before the next plan is read.

    async def _execute(
        self, leader: _Leadership, plan: engine_pb2.StepPlan
    ) -> engine_pb2.StepResult:
        arrived = time.perf_counter_ns()

        def begin() -> Launched:
            if leader.broken:
                raise PlanError("OUT_OF_ORDER", "a plan before this one was refused")
            try:
                queued_us = (time.perf_counter_ns() - arrived) // 1000
                columns = decode_plan(plan)
                if not self._ranks.alone:
                    # A plan that does not fit must reach no other rank: one that began the step
                    # would wait for this one for ever.
                    check_plan(columns, self._engine.state, self._engine.sizes.step_tokens)
                    self._ranks.send(Kind.PLAN, plan.SerializeToString())
                return self._engine.launch(columns, queued_us)
            except PlanError:
                leader.broken = True
                raise

        return await self._reported(self._worker.call_device(begin))

    def _snapshot(self) -> list[engine_pb2.SnapshotPart]:
        self._ranks.send(Kind.PAUSE)
        return self._engine.snapshot()

    def _release_all(self) -> int:
        self._ranks.send(Kind.RELEASE_ALL)
        return self._engine.release_all()

    async def _reported(self, job: Awaitable[T]) -> T:
        """Waits for a job of the worker.

        Raises:
            PlanError: it refused a plan.
            wire.RpcError: it failed, and the engine with it.
        """
        try:
            return await job
        except PlanError:
            raise
        except Exception as error:
            # Another rank may be to blame, and whoever watches them all will say so.
            with suppress(TimeoutError):
                async with asyncio.timeout(_REASON_SECONDS):
                    await self._failing.wait()
            raise _engine_failed(self._failure or f"its worker failed: {error!r}") from error

    async def _next(
        self, requests: AsyncIterator[engine_pb2.LeadRequest]
    ) -> engine_pb2.LeadRequest | None:
        try:
            async with asyncio.timeout(self._times.leader_timeout):
                return await anext(requests)
        except StopAsyncIteration:
            return None
        except TimeoutError as error:
            sentence = f"nothing was heard for {self._times.leader_timeout:g} s"
            raise wire.failed(
                grpc.StatusCode.DEADLINE_EXCEEDED, "LEADER_SILENT", sentence
            ) from error

    def _release(self, leader: _Leadership) -> None:
        if self._leader is not leader:
            return
        self._leader, leader.broken = None, True
        while not leader.results.empty():
            leader.results.get_nowait().cancel()
        log.info("leader gone: epoch %d", leader.epoch, extra={"epoch": leader.epoch})
        self._eviction = asyncio.create_task(self._evict_later())

    async def _evict_later(self) -> None:
        await asyncio.sleep(self._times.resident_grace)
        dropped = await self._worker.call(self._release_all)
        if dropped:
            log.warning("no leader came back: %d sequences dropped", dropped)

    async def stop(self) -> None:
        if self._eviction is not None:
            self._eviction.cancel()
            with suppress(asyncio.CancelledError):
                await self._eviction


async def _write_results(leader: _Leadership, context: wire.Context) -> None:
    while True:
        task = await leader.results.get()
        try:
            result = await task
        except PlanError as error:
            raise _refusal(error) from error
        async with leader.writing:
            await context.write(engine_pb2.LeadResponse(result=result))


def _engine_failed(sentence: str) -> wire.RpcError:
    return wire.failed(grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED", sentence)


def _engine_stops() -> wire.RpcError:
    return wire.failed(grpc.StatusCode.UNAVAILABLE, "ENGINE_STOPPING", "the engine is stopping")


def _refusal(error: PlanError) -> wire.RpcError:
    code = (
        grpc.StatusCode.INVALID_ARGUMENT
        if error.reason == "INVALID"
        else grpc.StatusCode.FAILED_PRECONDITION
    )
    return wire.failed(code, error.reason, str(error))


def stable_engine_id(address: str) -> str:
    """A name for an engine that was given none: the same after every restart in one place."""
    place = f"{socket.gethostname()} {address}"
    return "engine-" + hashlib.sha256(place.encode()).hexdigest()[:8]
