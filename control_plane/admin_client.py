"""What operators ask of running processes: the admin API and health. Knows grpc and pb2."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.client import CallError
from protos import wire
from protos.admin.v1 import admin_pb2 as pb
from protos.admin.v1 import admin_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:7402"
TIMEOUT_SECONDS = 5.0
_PAGE_SIZE = 1000

# One message of the admin API under its field names: bytes in hexadecimal, enums as words.
Row: TypeAlias = dict[str, Any]


class AdminClient:
    """Lists what one replica knows.

    >>> async with AdminClient("127.0.0.1:7402") as admin:
    ...     engines = await admin.engines()

    All methods raise CallError.

    Args:
        token, tls: as of the client library's `Client`.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, token: str = "", tls: wire.Tls | None = None
    ) -> None:
        self.address = address
        self._metadata, self._tls = wire.bearer(token), tls

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
        return await self._rows(self._stub.ListEngines, pb.ListEnginesRequest(), "engines")

    async def sequences(self, engine_id: str = "") -> list[Row]:
        request = pb.ListSequencesRequest(engine_id=engine_id)
        return await self._rows(self._stub.ListSequences, request, "sequences")

    async def prefixes(self, engine_id: str = "") -> list[Row]:
        """Most tokens saved first."""
        request = pb.ListPrefixesRequest(engine_id=engine_id)
        return await self._rows(self._stub.ListPrefixes, request, "prefixes")

    async def _rows(
        self, method: Callable[..., Awaitable[Any]], request: Any, field: str
    ) -> list[Row]:
        rows: list[Row] = []
        request.page_size = _PAGE_SIZE
        while True:
            page = await self._call(method, request)
            rows += [_row(item) for item in getattr(page, field)]
            if not page.next_page_token:
                return rows
            request.page_token = page.next_page_token

    async def _call(self, method: Callable[..., Awaitable[Any]], request: Any) -> Any:
        try:
            return await method(request, timeout=TIMEOUT_SECONDS, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
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
        if field.enum_type is not None:
            # ENGINE_STATE_LED of EngineState becomes "led".
            value = field.enum_type.values_by_number[value].name.rpartition("_")[2].lower()
        elif isinstance(value, bytes):
            value = value.hex()
        row[field.name] = value
    return row
