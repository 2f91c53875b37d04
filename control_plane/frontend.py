"""The public inference API: a client's message to the scheduler, and back. Knows grpc and pb2."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from control_plane import records
from control_plane.engine_link import EngineFacts
from control_plane.generation import (
    BestSoFar,
    Delta,
    Detached,
    Ending,
    Generation,
    Generations,
    WaitedTooLong,
)
from control_plane.metrics.families import Metrics
from control_plane.orphans import Orphans
from control_plane.overload import UNKNOWN
from control_plane.plan import Logprob
from control_plane.prompts import LONG_PROMPT, tokenise
from control_plane.records import NOT_SHARED, SharedPrefix
from control_plane.relay import QUEUE_FULL, Relay, Write, is_farewell, is_relayed
from control_plane.request import FinishReason, Request, pool_room
from control_plane.router import AmbiguousModel, NoEngine, Router, UnknownModel
from control_plane.scheduler import NeverFits
from control_plane.step_loop import StepLoop
from control_plane.traces import CallTrace, Traces
from control_plane.utf8 import find_invalid_utf8
from control_plane.wait_queue import QueueFull
from protos import validation, wire
from protos.inference.v1 import inference_pb2 as pb
from protos.logs import without_values

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What a call's bytes become that are no request."""

    error: wire.RpcError


def parse_request(data: bytes) -> pb.GenerateRequest | Unreadable:
    """Deserialises a request; bytes that are none are answered, not dropped."""
    try:
        return pb.GenerateRequest.FromString(data)
    except DecodeError:
        field = find_invalid_utf8(data, pb.GenerateRequest.DESCRIPTOR)  # type: ignore[arg-type]
        if field is None:
            return Unreadable(wire.bad_field("request", "is no GenerateRequest"))
        return Unreadable(wire.bad_field(field, "is no valid UTF-8"))


class Frontend:
    """Thin: validates, tokenises, hands over, and streams what the generation has.

    Args:
        relay: where clients' calls go that are answered elsewhere.
        max_waiting_seconds: how long a request may wait for an engine; 0: no limit.
        orphan_grace_seconds: for clients to come back whose calls another replica passed on.
        tenant_of: whose prefix cache a call uses, from its authenticated peer.
        shared_prefix: the registered prefix that a prompt begins with.
        traces: of its calls; none: they are not traced.
        max_calls: Generate calls that are open at once, relayed ones included, at most.
    """

    def __init__(
        self,
        router: Router,
        generations: Generations,
        metrics: Metrics,
        relay: Relay,
        max_waiting_seconds: float = 0.0,
        orphan_grace_seconds: float = 30.0,
        tenant_of: Callable[[wire.Context], str] = lambda _: "",
        shared_prefix: Callable[[list[int], EngineFacts], SharedPrefix] = lambda _, __: NOT_SHARED,
        traces: Traces | None = None,
        max_calls: int = 16384,
    ) -> None:
        self._router, self._generations = router, generations
        self._metrics, self._relay, self._tenant_of = metrics, relay, tenant_of
        self._shared_prefix, self._traces = shared_prefix, traces or Traces()
        self._max_waiting_seconds = max_waiting_seconds or math.inf
        self._orphans = Orphans(orphan_grace_seconds, self._abandon)
        self._max_calls, self._calls = max_calls, 0
        self.draining = False

    async def Generate(
        self, message: pb.GenerateRequest | Unreadable, context: wire.Context
    ) -> None:
        arrived, request_id = time.monotonic(), _request_id(message)
        with self._traces.call(context, request_id, arrived) as trace:
            self._calls += 1
            try:
                if self._calls > self._max_calls:
                    sentence = f"{self._max_calls} calls are open at this replica"
                    raise wire.overloaded(sentence, UNKNOWN, "TOO_MANY_CALLS")
                if isinstance(message, Unreadable):
                    raise message.error
                # Settled before anything is tried: a second attempt is to find the first one's.
                message.request_id = message.request_id or request_id
                await self._answer(message, context, arrived, trace)
            except WaitedTooLong as late:
                await self._reject(self._expired(None, late), request_id, context, trace)
            except wire.RpcError as error:
                await self._reject(error, request_id, context, trace)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception as error:
                await self._break_down(error, request_id, context, trace)
            finally:
                self._calls -= 1

    async def Cancel(self, message: pb.CancelRequest, context: wire.Context) -> pb.CancelResponse:
        try:
            if not message.request_id:
                raise wire.bad_field("request_id", "is empty")
            tenant = self._tenant_of(context)
            if is_relayed(context):
                end = self._orphans.give_up if is_farewell(context) else self._router.cancel
                self._cancel(tenant, end, message.request_id)
            else:
                cancel = partial(self._cancel, tenant, self._router.cancel)
                await self._relay.cancel(message, context, tenant, cancel)
        except wire.RpcError as error:
            await wire.abort(context, error)
        return pb.CancelResponse()

    async def _answer(
        self, message: pb.GenerateRequest, context: wire.Context, arrived: float, trace: CallTrace
    ) -> None:
        """Answers a request, here or at the leader of its engine."""
        tenant = self._tenant_of(context)
        trace.asked(message, tenant)
        serve = partial(self._serve, trace, tenant, arrived)
        if is_relayed(context):
            await serve(message, context.write, relayed=True)
            return
        if self.draining:
            sentence = "this replica is draining"
            raise wire.failed(grpc.StatusCode.UNAVAILABLE, "DRAINING", sentence)
        limit = self._waiting_limit(message)
        await self._relay.generate(message, context, tenant, serve, limit, trace)

    async def _reject(
        self, error: wire.RpcError, request_id: str, context: wire.Context, trace: CallTrace
    ) -> None:
        self._metrics.counters.rejected[error.code.name] += 1
        # Not its sentence, which may quote what the client sent.
        why = ", ".join(wire.reasons(error.details))
        fields = {"request_id": request_id, "code": error.code.name, "reason": why}
        log.info("request %s refused: %s %s", request_id, error.code.name, why, extra=fields)
        trace.refused(error.code.name, why)
        await wire.abort(context, error)

    async def _break_down(
        self, error: Exception, request_id: str, context: wire.Context, trace: CallTrace
    ) -> None:
        """Answers with a reference to what the log has of an exception that nobody foresaw."""
        code, reference = grpc.StatusCode.INTERNAL, uuid.uuid4().hex[:12]
        fields = {"request_id": request_id, "reference": reference}
        fields["exception"] = without_values(error)
        log.error("error %s in request %s", reference, request_id, extra=fields)
        self._metrics.counters.rejected[code.name] += 1
        trace.refused(code.name, reference)
        await context.abort(code, f"internal error {reference}")

    def _cancel(self, tenant: str, end: Callable[[Generation], None], request_id: str) -> None:
        generation = self._generations.running((tenant, request_id))
        if generation is None:
            sentence = "no such generation is waiting or running"
            raise wire.failed(grpc.StatusCode.NOT_FOUND, "NO_GENERATION", sentence)
        end(generation)

    async def _serve(
        self,
        trace: CallTrace,
        tenant: str,
        arrived: float,
        message: pb.GenerateRequest,
        write: Write,
        *,
        relayed: bool = False,
    ) -> None:
        """Answers a request with an engine that this replica leads.

        Args:
            relayed: another replica reads, for a client of its own.

        Raises:
            RpcError: it is refused; UNAVAILABLE if it does not go on here.
        """
        try:
            generation = await self._generation(message, tenant, arrived)
            trace.answered_by(generation)
            received = list(message.received_token_counts) or [0] * len(generation.samples)
            await self._stream(generation, received, write, relayed=relayed)
        except Detached as detached:
            sentence = str(detached)
            raise wire.failed(grpc.StatusCode.UNAVAILABLE, "ENGINE_GONE", sentence) from detached

    # Finding or starting the generation.

    async def _generation(
        self, message: pb.GenerateRequest, tenant: str, arrived: float
    ) -> Generation:
        try:
            candidates = self._router.candidates(message.model)
            facts, tokenizer = candidates[0].facts, candidates[0].tokenizer
            limits = validation.ModelLimits(facts.vocabulary_size, facts.max_length)
            validation.check_request(message, limits)
            digest = records.request_digest(message)
            if (existing := self._existing(tenant, message.request_id, digest)) is not None:
                return existing
            prompt = await tokenise(message, tokenizer)
            fitting = pool_room(
                len(prompt),
                max(message.output.sample_count, message.beam_search.width, 1),
                facts.block_size,
                facts.block_count,
            )
            max_tokens = validation.check_length(len(prompt), message.stopping, limits, fitting)
            request = await self._request(message, prompt, max_tokens, facts, tenant, digest)
            loop, forecast = await self._router.choose(request, candidates)
        except UnknownModel as error:
            raise wire.failed(grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", str(error)) from error
        except AmbiguousModel as error:
            raise wire.bad_field("model", str(error)) from error
        except NoEngine as error:
            raise wire.failed(grpc.StatusCode.UNAVAILABLE, "NO_ENGINE", str(error)) from error
        # Another call with the same id may have come while this one waited.
        if (existing := self._existing(tenant, request.request_id, digest)) is not None:
            return existing
        stop_strings = tuple(message.stopping.stop_strings)
        generation = Generation(request, digest, tokenizer, stop_strings, facts.kind)
        generation.arrived_at, generation.forecast = arrived, forecast
        self._submit(loop, generation)
        generation.limit_waiting(self._waiting_limit(message))
        return generation

    def _waiting_limit(self, message: pb.GenerateRequest) -> float:
        if any(message.received_token_counts):
            return math.inf  # An engine had taken it before its stream broke.
        if not message.HasField("max_waiting_time"):
            return self._max_waiting_seconds
        own: float = message.max_waiting_time.seconds + message.max_waiting_time.nanos / 1e9
        # What is outside its range is refused by whoever answers.
        return min(own, self._max_waiting_seconds) if own > 0 else self._max_waiting_seconds

    def _existing(self, tenant: str, request_id: str, digest: bytes) -> Generation | None:
        key = tenant, request_id
        generation = self._generations.get(key) if request_id else None
        if generation is None or generation.digest == digest:
            return generation
        if self._generations.running(key) is None:
            return None  # The id is free again: its generation has ended.
        sentence = f"request id {request_id} is running with a different request"
        raise wire.failed(grpc.StatusCode.ALREADY_EXISTS, "DIFFERENT_REQUEST", sentence)

    async def _request(
        self,
        message: pb.GenerateRequest,
        prompt: list[int],
        max_tokens: int,
        facts: EngineFacts,
        tenant: str,
        digest: bytes,
    ) -> Request:
        make = partial(records.new_request, message, prompt, max_tokens, facts, tenant, digest)
        shared = self._shared_prefix(prompt, facts)
        return await asyncio.to_thread(make, shared) if len(prompt) > LONG_PROMPT else make(shared)

    def _submit(self, loop: StepLoop, generation: Generation) -> None:
        try:
            loop.submit(generation)
        except NeverFits as error:
            self._router.lookups.refused(generation.request)
            raise wire.bad_field("prompt", str(error)) from error
        except QueueFull as error:
            self._router.lookups.refused(generation.request)
            raise wire.overloaded(str(error), loop.retry_seconds(error), QUEUE_FULL) from error
        self._generations.add(generation)

    # Streaming.

    async def _stream(
        self, generation: Generation, received: list[int], write: Write, *, relayed: bool
    ) -> None:
        self._orphans.found(generation)
        try:
            async with aclosing(generation.deltas(received)) as deltas:
                async for delta in deltas:
                    for event in _events(delta, generation):
                        await write(event)
            await write(pb.GenerateResponse(usage=_usage(generation)))
            _log_end(generation)
        except WaitedTooLong as late:
            raise self._expired(generation, late) from late
        finally:
            # A stream that ends early has lost its client: without any, nobody wants the rest,
            # unless it was a relay that was lost, or its connection.
            unwanted = not generation.finished and generation.subscriber_count == 0
            if unwanted and not generation.detached:
                (self._orphans.left if relayed else self._abandon)(generation)

    def _abandon(self, generation: Generation) -> None:
        """Ends a generation that nobody reads, if it has not ended or gone elsewhere."""
        if not generation.finished and not generation.detached:
            self._router.cancel(generation)
            _log_end(generation)

    def _expired(self, generation: Generation | None, late: WaitedTooLong) -> wire.RpcError:
        """To come back once what waits with it now, itself included, would have been admitted.

        Args:
            generation: None: it waited for a replica that would take it.
        """
        self._metrics.counters.expired += 1
        loop = self._router.loop_of(generation) if generation is not None else None
        seconds = loop.drain_seconds() if loop is not None else UNKNOWN
        return wire.overloaded(str(late), seconds, "WAITED_TOO_LONG")


def add_to_server(frontend: Frontend, server: grpc.aio.Server) -> None:
    """Registers the service with a deserialiser that can say which field is wrong."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Generate": grpc.unary_stream_rpc_method_handler(
            frontend.Generate,
            request_deserializer=parse_request,
            response_serializer=_serialised,
        ),
        "Cancel": grpc.unary_unary_rpc_method_handler(
            frontend.Cancel,
            request_deserializer=pb.CancelRequest.FromString,
            response_serializer=pb.CancelResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _request_id(message: pb.GenerateRequest | Unreadable) -> str:
    """The client's, if it is one that may be shown, or a new one."""
    own: str = "" if isinstance(message, Unreadable) else message.request_id
    return own if validation.is_request_id(own) else uuid.uuid4().hex


def _log_end(generation: Generation) -> None:
    """One line for a call that has ended: an error is something to look at, others are not."""
    endings = [sample.ending for sample in generation.samples if sample.ending is not None]
    level = logging.DEBUG
    if any(ending.reason is FinishReason.ERROR for ending in endings):
        level = logging.INFO
    if not log.isEnabledFor(level):
        return
    request, arrived = generation.request, generation.arrived_at
    fields = {
        "request_id": request.request_id,
        "tenant": request.salt,
        "engine": generation.engine_id,
        "reasons": ",".join(ending.reason.value for ending in endings),
        "prompt_tokens": len(request.prompt),
        "cached_tokens": generation.cached_tokens,
        "output_tokens": sum(len(sample.token_ids) for sample in generation.samples),
        "seconds": round(time.monotonic() - arrived, 3) if arrived is not None else None,
    }
    told = ", ".join(f"{name} {value}" for name, value in fields.items() if name != "request_id")
    log.log(level, "request %s ended: %s", request.request_id, told, extra=fields)


def _serialised(event: pb.GenerateResponse | bytes) -> bytes:
    """What another replica has serialised is handed on as it is."""
    return event if isinstance(event, bytes) else event.SerializeToString()


def _accepted(generation: Generation) -> pb.Accepted:
    return pb.Accepted(
        request_id=generation.request.request_id,
        prompt_token_count=len(generation.request.prompt),
        cached_token_count=generation.cached_tokens,
        engine_id=generation.engine_id,
    )


def _usage(generation: Generation) -> pb.Usage:
    return pb.Usage(
        prompt_token_count=len(generation.request.prompt),
        cached_token_count=generation.cached_tokens,
        output_token_count=sum(len(sample.token_ids) for sample in generation.samples),
    )


def _events(
    delta: Delta | BestSoFar | None, generation: Generation
) -> Iterable[pb.GenerateResponse]:
    if delta is None:
        yield pb.GenerateResponse(accepted=_accepted(generation))
        return
    if isinstance(delta, BestSoFar):
        best = pb.BestSoFar(text=delta.text, token_ids=delta.token_ids, score=delta.score)
        yield pb.GenerateResponse(best_so_far=best)
        return
    if delta.token_ids or delta.text or delta.prompt_logprobs:
        yield pb.GenerateResponse(
            delta=pb.Delta(
                sample=delta.sample,
                text=delta.text,
                token_ids=delta.token_ids,
                logprobs=[_logprob(entry) for entry in delta.logprobs],
                prompt_logprobs=[_logprob(entry) for entry in delta.prompt_logprobs],
            )
        )
    if delta.ending is not None:
        sample = generation.samples[delta.sample]
        finished = _finished(delta.sample, delta.ending, len(sample.token_ids))
        if sample.score is not None:
            finished.score = sample.score
        yield pb.GenerateResponse(finished=finished)


def _finished(sample: int, ending: Ending, token_count: int) -> pb.Finished:
    return pb.Finished(
        sample=sample,
        reason=_REASONS[ending.reason],
        stop_string=ending.stop_string,
        stop_token_id=ending.stop_token_id,
        message=ending.message,
        token_count=token_count,
    )


def _logprob(entry: Logprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top_token_ids=[token for token, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )
