"""Traces of calls, sent to a collector by OTLP over gRPC. Knows opentelemetry, grpc and pb2.

A call is one span, and its waiting, prefill and decoding are three more below it. They are made
when the call ends, of times that its generation has anyway: no step and no token costs anything.
What the collector does not take is dropped, by the library's thread and its bounded queue.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from control_plane.generation import Generation
from control_plane.metrics.families import quire_version
from control_plane.request import FinishReason
from control_plane.traces import CONTEXT_KEYS, BadTraces, CallTrace, Traces
from protos import wire
from protos.inference.v1 import inference_pb2 as pb

log = logging.getLogger(__name__)

# For what is left when the replica ends.
FLUSH_SECONDS = 2.0

_METHOD = f"{pb.DESCRIPTOR.services_by_name['InferenceService'].full_name}/Generate"
_W3C = TraceContextTextMapPropagator()
# Statuses of which the service is to blame, by OpenTelemetry's conventions for gRPC servers.
_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
# Loggers of the library: of a call's metadata, of the queue of spans, and of their way out.
_PARSING, _QUEUE = "opentelemetry.trace", "opentelemetry.sdk._shared_internal"
_EXPORT = "opentelemetry.exporter.otlp.proto.grpc.exporter"


class OtlpTraces(Traces):
    """Those that a collector gets; see `open_traces`."""

    def __init__(self, endpoint: str, share: float, instance: str) -> None:
        # It warns of whatever is wrong with a client's metadata, and quotes it.
        logging.getLogger(_PARSING).setLevel(logging.ERROR)
        try:
            self._exporter = _Exporter(endpoint)
            self._provider = TracerProvider(
                ParentBased(TraceIdRatioBased(share)), _resource(instance), shutdown_on_exit=False
            )
            self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        except Exception as error:
            raise BadTraces(f"by the OTEL_* variables: {error}") from error
        self._tracer = self._provider.get_tracer("quire", quire_version())
        log.info("%g of the traces of calls go to %s", share, endpoint)

    def call(self, context: wire.Context, request_id: str, arrived: float) -> CallTrace:
        return _Call(self._tracer, context, request_id, arrived)

    async def close(self) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait([closing], timeout=FLUSH_SECONDS)
        if not closing.done():
            self._exporter.shutdown()
        await closing
        self._exporter.leave_the_log()


def _resource(instance: str) -> Resource:
    """What all spans are of; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win."""
    own = {
        "service.name": "quire-control-plane",
        "service.version": quire_version(),
        "service.instance.id": instance,
    }
    return Resource.create(own).merge(OTELResourceDetector().detect())


class _Call(CallTrace):
    """The span of one call, and those below it."""

    def __init__(
        self, tracer: Tracer, context: wire.Context, request_id: str, arrived: float
    ) -> None:
        self._tracer, self._context, self._arrived = tracer, context, arrived
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._message: pb.GenerateRequest | None = None
        self._tenant, self._code, self._reason = "", "", ""
        self._generation: Generation | None = None
        self._found = arrived
        self._span: Span = tracer.start_span(
            _METHOD,
            _W3C.extract(_trace_context(context), Context()),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": _METHOD, "quire.request.id": request_id},
            start_time=self._ns(arrived),
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        now = time.monotonic()
        if self._span.is_recording():
            if not self._code:
                self._code = "OK" if kind is None else self._cut_off()
            self._describe()
            if self._generation is not None:
                self._add_phases(self._generation, now)
        self._span.end(self._ns(now))

    def asked(self, message: pb.GenerateRequest, tenant: str) -> None:
        self._message, self._tenant = message, tenant

    def answered_by(self, generation: Generation) -> None:
        self._generation, self._found = generation, time.monotonic()

    def passed_on(self, address: str) -> None:
        self._span.add_event("passed on", {"quire.leader": address})

    def refused(self, code: str, reason: str) -> None:
        self._code, self._reason = code, reason

    def carried(self, context: wire.Context) -> list[tuple[str, str | bytes]]:
        metadata: dict[str, str | bytes] = {}
        _W3C.inject(metadata, set_span_in_context(self._span))
        return list(metadata.items())

    def _ns(self, seconds: float) -> int:
        """Nanoseconds since 1970, of monotonic seconds; in the same order."""
        return self._epoch_ns + int(seconds * 1e9)

    def _cut_off(self) -> str:
        """The status of a call that its client left, or whose time is over."""
        left = self._context.time_remaining()
        return "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"

    def _describe(self) -> None:
        generation, message = self._generation, self._message
        found: dict[str, AttributeValue] = {"rpc.response.status_code": self._code}
        # What nobody has taken is unchecked, and may hold anything.
        if message is not None and (generation is not None or self._code == "OK"):
            found |= _of_message(message)
        if generation is not None:
            found |= _of_generation(generation)
        failed = generation is not None and _failed(generation)
        if self._code != "OK" or failed:
            found["error.type"] = self._code if self._code != "OK" else "FINISH_REASON_ERROR"
        found |= {"quire.tenant": self._tenant, "quire.reason": self._reason}
        self._span.set_attributes(
            {name: value for name, value in found.items() if value not in ("", [])}
        )
        if self._code in _FAULTS or failed:
            self._span.set_status(StatusCode.ERROR)

    def _add_phases(self, generation: Generation, now: float) -> None:
        for name, start, end in _phases(generation, self._arrived, self._found, now):
            span = self._tracer.start_span(
                name, set_span_in_context(self._span), start_time=self._ns(start)
            )
            span.end(self._ns(end))


def _trace_context(context: wire.Context) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in context.invocation_metadata() or ():
        if key in CONTEXT_KEYS and isinstance(value, str):
            found.setdefault(key, []).append(value)
    return found


def _of_message(message: pb.GenerateRequest) -> Mapping[str, AttributeValue]:
    """By the conventions for generative AI: https://opentelemetry.io/docs/specs/semconv/gen-ai/"""
    chat = message.WhichOneof("prompt") == "chat"
    return {
        "gen_ai.operation.name": "chat" if chat else "text_completion",
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": message.model,
        "gen_ai.request.stream": True,
    }


def _of_generation(generation: Generation) -> Mapping[str, AttributeValue]:
    request, samples = generation.request, generation.samples
    endings = [sample.ending.reason.value for sample in samples if sample.ending is not None]
    found: dict[str, AttributeValue] = {
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        "gen_ai.request.choice.count": request.sample_count,
        "gen_ai.response.model": generation.model,
        "gen_ai.response.finish_reasons": endings,
        "gen_ai.usage.input_tokens": len(request.prompt),
        "gen_ai.usage.output_tokens": sum(len(sample.token_ids) for sample in samples),
        "gen_ai.usage.cache_read.input_tokens": generation.cached_tokens,
        "quire.engine.id": generation.engine_id,
        "quire.prefix": request.prefix_name,
    }
    if generation.group is not None:
        found["quire.preemptions"] = generation.group.preemptions
    if generation.arrived_at is not None and generation.first_token_at is not None:
        waited = generation.first_token_at - generation.arrived_at
        found["gen_ai.server.time_to_first_token"] = waited
    return found


def _failed(generation: Generation) -> bool:
    endings = [sample.ending for sample in generation.samples if sample.ending is not None]
    return any(ending.reason is FinishReason.ERROR for ending in endings)


def _phases(
    generation: Generation, begun: float, found: float, now: float
) -> Iterator[tuple[str, float, float]]:
    """Yields name, start and end of what a generation went through while a call read it.

    What was over when the call came, as with one that takes up a broken stream, is left out. So is
    what happened under another leader, which alone knows the times.

    Args:
        begun: when the call arrived, and `now` is its end; seconds, monotonic.
        found: when it found the generation, which from then on is seen here, whoever led before.
    """
    taken_over = found if generation.arrived_at is None else None
    with_tokens = taken_over if any(sample.token_ids for sample in generation.samples) else None
    # The tokens of a search are there when it ends.
    search = generation.request.beams is not None
    marks = [
        ("queue", generation.arrived_at),
        ("search" if search else "prefill", generation.admitted_at or taken_over),
        ("decode", None if search else generation.first_token_at or with_tokens),
    ]
    known = [(name, start) for name, start in marks if start is not None]
    ends = [start for _, start in known[1:]] + [generation.ended_at or now]
    for (name, start), end in zip(known, ends, strict=True):
        start, end = max(start, begun), min(end, now)
        if start < end:
            yield name, start, end


class _Exporter(SpanExporter):
    """Hands spans over, and has its own words in the log: one line when spans begin to be dropped.

    The library has several for each attempt. Each of its exporters has one thread that calls it.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        # Plain text or not is what the endpoint says, and no variable.
        self._otlp = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"))
        self._thread: int | None = None
        self._words = ""
        self._closed = self._failing = False
        self._overflowed = self._told_overflow = False
        for name in (_EXPORT, _QUEUE):
            # Before its own filter, which leaves out what it has said in the last seconds.
            logging.getLogger(name).filters.insert(0, self._listen)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._thread = threading.get_ident()
        try:
            result = self._otlp.export(spans)
        except Exception as error:
            result, self._words = SpanExportResult.FAILURE, repr(error)
        finally:
            self._thread = None
        self._tell(result)
        return result

    def _tell(self, result: SpanExportResult) -> None:
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            log.warning("spans are dropped until %s takes them: %s", self._endpoint, self._words)
        elif self._failing and not failing:
            log.info("%s takes spans again", self._endpoint)
        elif self._overflowed and not (failing or self._told_overflow):
            self._told_overflow = True
            log.warning("some spans are dropped: more end than %s takes in time", self._endpoint)
        self._failing, self._overflowed = failing, False

    def _listen(self, record: logging.LogRecord) -> bool:
        """Keeps to itself what the library says while it exports, or of a full queue."""
        if record.thread == self._thread:
            self._words = record.getMessage()
        elif record.name == _QUEUE:
            self._overflowed = True
        else:
            return True
        return False

    def shutdown(self) -> None:
        """Cuts off what is under way, and takes nothing more; it may be told so again."""
        if self._closed:
            return
        self._closed = True
        self._otlp.shutdown()

    def leave_the_log(self) -> None:
        """Lets the library speak for itself again."""
        for name in (_EXPORT, _QUEUE):
            logging.getLogger(name).removeFilter(self._listen)
