"""A collector of traces: the real protocol, and faults on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from protos import wire


def value_of(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def attributes_of(pairs: Any) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in pairs}


@dataclass
class Span:
    """A span that arrived; times in nanoseconds since 1970."""

    message: trace_pb2.Span
    resource: dict[str, Any]
    attributes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.attributes = attributes_of(self.message.attributes)

    @property
    def name(self) -> str:
        return self.message.name

    @property
    def times(self) -> tuple[int, int]:
        return self.message.start_time_unix_nano, self.message.end_time_unix_nano

    @property
    def failed(self) -> bool:
        return self.message.status.code == trace_pb2.Status.STATUS_CODE_ERROR

    def is_below(self, other: Span) -> bool:
        return (self.message.trace_id, self.message.parent_span_id) == (
            other.message.trace_id,
            other.message.span_id,
        )


class Collector(service_grpc.TraceServiceServicer):
    """Keeps what it gets.

    Attributes:
        status: OK, or what every call ends with.
        open: while it is not set, no call is answered.
        calls: of Export, answered or not.
        metadata: of the last one.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.status = grpc.StatusCode.OK
        self.open = asyncio.Event()
        self.open.set()
        self.calls, self.port = 0, 0
        self.metadata: dict[str, Any] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def Export(self, request: Any, context: Any) -> Any:
        self.calls += 1
        self.metadata = dict(context.invocation_metadata())
        await self.open.wait()
        if self.status is not grpc.StatusCode.OK:
            await context.abort(self.status, "no")
        for resource in request.resource_spans:
            of = attributes_of(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [Span(each, of) for each in scope.spans]
        return service_pb.ExportTraceServiceResponse()

    def calls_traced(self) -> list[Span]:
        """Spans of whole calls, by when these began."""
        kind = trace_pb2.Span.SPAN_KIND_SERVER
        found = [span for span in self.spans if span.message.kind == kind]
        return sorted(found, key=lambda span: span.times)

    def below(self, parent: Span) -> list[Span]:
        """What is directly below a span, in order."""
        return sorted((s for s in self.spans if s.is_below(parent)), key=lambda span: span.times)

    async def gets(self, calls: int) -> list[Span]:
        """Waits for the spans of so many calls; what is below them comes before them."""
        async with asyncio.timeout(20):
            while len(self.calls_traced()) < calls:
                await asyncio.sleep(0.005)
        return self.calls_traced()


@asynccontextmanager
async def running_collector(port: int = 0, tls: wire.Tls | None = None) -> AsyncIterator[Collector]:
    collector, server = Collector(), wire.server()
    service_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.port = wire.listen(server, f"127.0.0.1:{port}", tls)
    await server.start()
    try:
        yield collector
    finally:
        collector.open.set()
        await server.stop(0)
