"""What operators ask of running processes: the admin API and health. Knows grpc and pb2."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeAlias

import grpc
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.client import CallError, Prompt, make_request
from protos import wire
from protos.admin.v1 import admin_pb2 as pb
from protos.admin.v1 import admin_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:7402"
TIMEOUT_SECONDS = 5.0
# Of calls that tokenise and hash: a prompt, or a prefix that is registered, may be long.
LONG_TIMEOUT_SECONDS = 60.0
_PAGE_SIZE = 1000

# One message of the admin API under its field names: bytes in hexadecimal, enums as words, messages
# in it as rows.
Row: TypeAlias = dict[str, Any]


class AdminClient:
    """Asks a replica what engines hold, and tells it what operators want.

    >>> async with AdminClient("127.0.0.1:7402") as admin:
    ...     engines = await admin.engines()

    All methods raise CallError.

    Args:
        token, tls: as of the client library's `Client`.

    Attributes:
        unanswered: addresses of replicas without whose answers lists came, since the beginning.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, token: str = "", tls: wire.Tls | None = None
    ) -> None:
        self.address = address
        self._metadata, self._tls = wire.bearer(token), tls
        self.unanswered: set[str] = set()

    async def __aenter__(self) -> AdminClient:
        self._channel = wire.channel(self.address, self._tls)
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def engines(self) -> list[Row]:
        return await self._rows("ListEngines", pb.ListEnginesRequest(), "engines")

    async def sequences(self, engine_id: str = "") -> list[Row]:
        request = pb.ListSequencesRequest(engine_id=engine_id)
        return await self._rows("ListSequences", request, "sequences")

    async def block_map(self, engine_id: str) -> Row:
        """The state of every block, by block id: `states` and `host_states` are lists of words."""
        found = await self._ask("GetBlockMap", pb.GetBlockMapRequest(engine_id=engine_id))
        words = {
            number: _word(pb.BlockState.DESCRIPTOR, number) for number in pb.BlockState.values()
        }
        return {
            "engine_id": engine_id,
            "states": [words[number] for number in found.states],
            "host_states": [words[number] for number in found.host_states],
        }

    async def drain(self, engine_id: str, *, resume: bool = False) -> Row:
        """Sends an engine no new requests, or sends it some again; returns the engine."""
        request = pb.DrainEngineRequest(engine_id=engine_id, resume=resume)
        return _row((await self._ask("DrainEngine", request)).engine)

    async def prefixes(self, engine_id: str = "", limit: int | None = None) -> list[Row]:
        """Most tokens saved first."""
        request = pb.ListPrefixesRequest(engine_id=engine_id)
        return await self._rows("ListPrefixes", request, "prefixes", limit)

    async def explain_prompt(self, prompt: Prompt, *, model: str = "", tenant: str = "") -> Row:
        """What a prompt would find in the prefix cache now, and why not more."""
        given = make_request(prompt)
        form = str(given.WhichOneof("prompt"))
        request = pb.ExplainPromptRequest(
            model=model, tenant=tenant, **{form: getattr(given, form)}
        )
        answer = await self._ask("ExplainPrompt", request, LONG_TIMEOUT_SECONDS)
        return _row(answer.explanation)

    async def explain_request(self, request_id: str, tenant: str | None = None) -> Row:
        """What a recent request found when an engine took it, and why not more.

        Args:
            tenant: whose it was; None: the latest with this id is meant.
        """
        request = pb.ExplainRequestRequest(request_id=request_id, tenant=tenant)
        return _row((await self._ask("ExplainRequest", request, LONG_TIMEOUT_SECONDS)).explanation)

    async def registered(self) -> list[Row]:
        """Registered prefixes, by name."""
        request = pb.ListRegisteredPrefixesRequest()
        answer = await self._ask("ListRegisteredPrefixes", request)
        self.unanswered.update(answer.unanswered_replicas)
        return [_row(each) for each in answer.prefixes]

    async def register(
        self, name: str, text: str, *, plain: bool = False, pinned: bool = False
    ) -> Row:
        """Registers a prefix, or replaces the one of this name.

        Args:
            plain: text prompts begin so; else it is the whole system message of chats.
        """
        form = pb.PREFIX_FORM_PLAIN if plain else pb.PREFIX_FORM_SYSTEM
        request = pb.RegisterPrefixRequest(name=name, text=text, form=form, pinned=pinned)
        return _row((await self._ask("RegisterPrefix", request, LONG_TIMEOUT_SECONDS)).prefix)

    async def unregister(self, name: str) -> None:
        await self._ask("UnregisterPrefix", pb.UnregisterPrefixRequest(name=name))

    async def pin(self, name: str, *, pinned: bool = True) -> Row:
        """Pins a registered prefix, or lets go of it."""
        request = pb.UpdatePrefixRequest(name=name, pinned=pinned)
        return _row((await self._ask("UpdatePrefix", request, LONG_TIMEOUT_SECONDS)).prefix)

    async def warm(self, name: str) -> Row:
        """Has every engine compute a registered prefix; it may take a while after this call."""
        request = pb.WarmPrefixRequest(name=name)
        return _row((await self._ask("WarmPrefix", request, LONG_TIMEOUT_SECONDS)).prefix)

    async def _rows(
        self, method: str, request: Any, field: str, limit: int | None = None
    ) -> list[Row]:
        """All pages, or as many rows as `limit`."""
        rows: list[Row] = []
        request.page_size = _PAGE_SIZE if limit is None else min(limit, _PAGE_SIZE)
        while True:
            page = await self._ask(method, request)
            self.unanswered.update(page.unanswered_replicas)
            rows += [_row(item) for item in getattr(page, field)]
            if not page.next_page_token or (limit is not None and len(rows) >= limit):
                return rows[:limit]
            request.page_token = page.next_page_token

    async def _ask(
        self, method: str, request: Message, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> Any:
        call: Callable[..., Awaitable[Any]] = getattr(self._stub, method)
        try:
            return await call(request, timeout=timeout_seconds, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                sentence = f"the service at {self.address} has no {method} in its admin API"
                raise CallError(error.code(), sentence) from None
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                sentence = f"no answer from {self.address} within {timeout_seconds:.0f} s"
                raise CallError(error.code(), sentence) from None
            raise CallError.of(error, self.address) from None


async def is_serving(address: str, timeout_seconds: float = 1.0) -> bool:
    """Whether the process at `address` says by grpc.health.v1 that it serves."""
    async with wire.channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _row(message: Message) -> Row:
    row: Row = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            row[field.name] = [_value(field, each) for each in value]
        else:
            row[field.name] = _value(field, value)
    return row


def _value(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        return _word(field.enum_type, value)
    if isinstance(value, bytes):
        return value.hex()
    return _row(value) if isinstance(value, Message) else value


def _word(enum: EnumDescriptor, number: int) -> str:
    """LOOKUP_OUTCOME_NEVER_SEEN becomes "never_seen"; a number that is not known stays one."""
    found = enum.values_by_number.get(number)
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(number) if found is None else str(found.name).removeprefix(prefix).lower()
