"""Traces of calls: both planes and a real collector, what spans tell, and what goes wrong."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import ValidationError

from control_plane import otlp
from control_plane.settings import Settings
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from protos import wire
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.certificates import Authority
from tests.collector import Collector, Span, running_collector
from tests.processes import ROOT, control_plane, free_port
from tests.stack import Answer, Stack, failure, led, request, running_engine
from tests.stack import running_stack as any_stack
from tests.test_relay import SIZES, long_request, own_port, stopped, until

GENERATE = "quire.inference.v1.InferenceService/Generate"
# The example of the specification: a trace, a span in it, and whether it is kept.
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEPT = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
NOT_KEPT = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans leave after a twentieth of a second; variables that mean nothing here say otherwise."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "false")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt to hand spans over takes a second at most."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")


@asynccontextmanager
async def traced_stack(model: Model, **settings: object) -> AsyncIterator[tuple[Stack, Collector]]:
    async with running_collector() as collector:
        where = {"traces_endpoint": collector.endpoint} | settings
        async with any_stack(model, **where) as stack:  # type: ignore[arg-type]
            yield stack, collector


def with_stack(
    model: Model, body: Callable[[Stack, Collector], Awaitable[None]], **settings: object
) -> None:
    async def main() -> None:
        async with traced_stack(model, **settings) as (stack, collector):
            await body(stack, collector)

    asyncio.run(main())


async def generate(
    stack: Stack, message: pb.GenerateRequest, metadata: Any = (), timeout: float = 60
) -> Answer:
    answer = Answer()
    async for event in stack.stub.Generate(message, metadata=metadata, timeout=timeout):
        answer.add(event)
    return answer


def check_documented(*spans: Span) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert not [name for span in spans for name in span.attributes if f"`{name}`" not in text]


def names(spans: list[Span]) -> list[str]:
    return [span.name for span in spans]


def check_nested(call: Span, phases: list[Span]) -> None:
    """Whatever is below a call is within it, one after the other, without a gap."""
    marks = [mark for span in phases for mark in span.times]
    assert marks == sorted(marks) and marks[1:-1:2] == marks[2::2]
    assert call.times[0] <= marks[0] and marks[-1] <= call.times[1]


# What spans tell.


def test_a_call_is_a_span_with_its_phases_below(llama: Model, llama_directory: Path) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="the secret words " * 12)])
    message = request([], 8, model="tiny-llama", sampling=pb.Sampling(top_p=0.5))
    message.chat.CopyFrom(chat)
    message.stopping.ignore_eos = True

    async def body(stack: Stack, collector: Collector) -> None:
        await generate(stack, message)
        message.request_id = "mine"
        began = time.time_ns()
        answer = await generate(stack, message, (*KEPT, ("tracestate", "them=1")))
        ended = time.time_ns()
        first, call = await collector.gets(2)
        assert call.message.trace_id.hex() == TRACE != first.message.trace_id.hex()
        assert (call.message.parent_span_id.hex(), call.message.trace_state) == (PARENT, "them=1")
        assert not first.message.parent_span_id
        phases = collector.below(call)
        assert call.name == GENERATE and names(phases) == ["queue", "prefill", "decode"]
        check_nested(call, phases)
        assert began <= call.times[0] and call.times[1] <= ended
        check_documented(call)
        waited = call.attributes.pop("gen_ai.server.time_to_first_token")
        until_first = phases[1].times[1] - call.times[0]
        assert waited * 1e9 == pytest.approx(until_first, abs=1000) and answer.usage
        assert answer.usage.cached_token_count > 0
        assert call.attributes == {
            "rpc.system.name": "grpc",
            "rpc.method": GENERATE,
            "rpc.response.status_code": "OK",
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "quire",
            "gen_ai.request.model": "tiny-llama",
            "gen_ai.request.stream": True,
            "gen_ai.request.max_tokens": 8,
            "gen_ai.request.temperature": 0.0,
            "gen_ai.request.top_p": 0.5,
            "gen_ai.request.choice.count": 1,
            "gen_ai.response.model": "tiny-llama",
            "gen_ai.response.finish_reasons": ["length"],
            "gen_ai.usage.input_tokens": answer.usage.prompt_token_count,
            "gen_ai.usage.output_tokens": 8,
            "gen_ai.usage.cache_read.input_tokens": answer.usage.cached_token_count,
            "quire.request.id": "mine",
            "quire.engine.id": "engine-test",
            "quire.preemptions": 0,
        }
        assert not call.failed
        assert call.resource["service.name"] == "quire-control-plane"
        assert call.resource["service.instance.id"] == "127.0.0.1:0"
        assert not any(b"secret" in span.message.SerializeToString() for span in collector.spans)

    with_stack(llama, body, directory=llama_directory)


def test_samples_and_searches(llama: Model) -> None:
    samples = pb.Output(sample_count=3)

    async def body(stack: Stack, collector: Collector) -> None:
        await generate(stack, request([20, 21], 6, output=samples))
        await generate(stack, request([20, 21], 6, beam_search=pb.BeamSearch(width=2)))
        call, search = await collector.gets(2)
        assert len(call.attributes["gen_ai.response.finish_reasons"]) == 3
        assert call.attributes["gen_ai.request.choice.count"] == 3
        assert call.attributes["gen_ai.operation.name"] == "text_completion"
        assert "gen_ai.request.model" not in call.attributes
        assert names(collector.below(search)) == ["queue", "search"]
        check_nested(search, collector.below(search))

    with_stack(llama, body)


def test_who_asked_and_which_prefix_it_was(
    llama: Model, llama_directory: Path, tmp_path: Path
) -> None:
    prefixes, access = tmp_path / "prefixes.yaml", tmp_path / "access.yaml"
    text = "You are the support desk of Example Corporation. " * 2
    prefixes.write_text(f"support: {{form: plain, text: '{text}'}}")
    access.write_text(
        "callers: [{name: a, tenant: acme, roles: [generate], token_sha256: "
        "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b}]"
    )

    async def body(stack: Stack, collector: Collector) -> None:
        bearer = (("authorization", "Bearer secret"),)
        digest, registered = stack.loop.facts.tokenizer_digest, stack.replica.registered
        await until(lambda: not registered.unprepared(digest))
        await generate(stack, request(text + "Hello", 4), bearer)
        (call,) = await collector.gets(1)
        check_documented(call)
        assert call.attributes["quire.tenant"] == "acme"
        assert call.attributes["quire.prefix"] == "support"
        assert call.resource["service.instance.id"] == "10.0.0.9:7401"

    files = {"prefixes": prefixes, "access": access, "advertise": "10.0.0.9:7401"}
    with_stack(llama, body, directory=llama_directory, **files)


def test_refused_calls_have_status_and_reason_and_no_sentence(llama: Model) -> None:
    async def body(stack: Stack, collector: Collector) -> None:
        for message in (
            request([20], 4, model="secret", request_id="secret id"),
            request([999], 4, model="tiny-llama"),
            request([], 4),
        ):
            await failure(generate(stack, message))
        raw = stack.channel.unary_stream(f"/{GENERATE}")
        await failure(anext(aiter(raw(b"\xff\xffsecret"))))
        stack.replica.frontend.draining = True
        await failure(generate(stack, request([20], 4)))
        told = [
            ("NOT_FOUND", "UNKNOWN_MODEL", False),
            ("INVALID_ARGUMENT", "token_ids.ids", False),
            ("INVALID_ARGUMENT", "token_ids.ids", False),
            ("INVALID_ARGUMENT", "request", False),
            ("UNAVAILABLE", "DRAINING", True),
        ]
        for call, (code, reason, failed) in zip(await collector.gets(5), told, strict=True):
            check_documented(call)
            assert call.attributes.pop("quire.request.id")
            assert call.attributes == {
                "rpc.system.name": "grpc",
                "rpc.method": GENERATE,
                "rpc.response.status_code": code,
                "error.type": code,
                "quire.reason": reason,
            }
            assert call.failed == failed and not call.message.status.message
            assert not collector.below(call)
        assert not any(b"secret" in span.message.SerializeToString() for span in collector.spans)

    with_stack(llama, body)


def test_calls_that_end_early(llama: Model) -> None:
    """By their client, by its deadline, by another call, in the queue, and by a fault."""

    async def body(stack: Stack, collector: Collector) -> None:
        calls = []

        async def ended(code: str) -> Span:
            calls.append(code)
            call = (await collector.gets(len(calls)))[-1]
            assert call.attributes["rpc.response.status_code"] == code
            assert call.attributes.get("error.type", "OK") == code
            return call

        stream = stack.stub.Generate(long_request("left", 900))
        while not (await stream.read()).delta.token_ids:
            pass
        stream.cancel()
        left = await ended("CANCELLED")
        assert names(collector.below(left)) == ["queue", "prefill", "decode"] and not left.failed
        check_nested(left, collector.below(left))
        assert left.attributes["gen_ai.usage.output_tokens"] > 0
        assert left.attributes["gen_ai.response.finish_reasons"] == ["cancelled"]
        await failure(generate(stack, long_request("late", 900), timeout=0.3))
        assert (await ended("DEADLINE_EXCEEDED")).failed
        running = asyncio.create_task(generate(stack, long_request("cancelled", 900)))
        await until(lambda: stack.loop.scheduler.running_count == 1)
        waiting = request([20], 4, max_waiting_time={"nanos": 1000})
        await failure(generate(stack, waiting))
        await stack.stub.Cancel(pb.CancelRequest(request_id="cancelled"))
        await running
        calls.append("two")
        by_call, queued = (await collector.gets(4))[-2:]
        assert by_call.attributes["gen_ai.response.finish_reasons"] == ["cancelled"]
        assert by_call.attributes["rpc.response.status_code"] == "OK" and not by_call.failed
        assert queued.attributes["quire.reason"] == "WAITED_TOO_LONG"
        assert names(collector.below(queued)) == ["queue"]
        check_nested(queued, collector.below(queued))

    with_stack(llama, body, slot_count=1)


def test_what_fails_is_a_failed_span(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(stack: Stack, collector: Collector) -> None:
        running = asyncio.create_task(generate(stack, long_request("ill", 300)))
        await until(lambda: stack.loop.scheduler.running_count == 1)
        generation = stack.replica.generations.all_running()[0]
        generation.push = None  # type: ignore[assignment,method-assign]
        assert (await running).finished[0].reason == pb.FINISH_REASON_ERROR
        monkeypatch.setattr(stack.replica.frontend, "_tenant_of", lambda _: 1 / 0)
        await failure(generate(stack, request([20], 4)))
        sample, call = await collector.gets(2)
        assert sample.attributes["rpc.response.status_code"] == "OK" and sample.failed
        assert sample.attributes["error.type"] == "FINISH_REASON_ERROR"
        assert sample.attributes["gen_ai.response.finish_reasons"] == ["error"]
        assert call.attributes["rpc.response.status_code"] == "INTERNAL" and call.failed
        assert len(call.attributes["quire.reason"]) == 12

    with_stack(llama, body)


def test_a_second_reader_has_the_time_that_it_was_there(llama: Model) -> None:
    """What a generation went through before is in the trace of the call that began it."""

    async def body(stack: Stack, collector: Collector) -> None:
        first = asyncio.create_task(generate(stack, long_request("n", 400)))
        await until(lambda: bool(stack.replica.generations.all_running()))
        generation = stack.replica.generations.all_running()[0]
        await until(lambda: len(generation.samples[0].token_ids) > 5)
        await generate(stack, long_request("n", 400))
        await first
        await generate(stack, long_request("n", 400))
        calls = await collector.gets(3)
        assert [names(collector.below(call)) for call in calls] == [
            ["queue", "prefill", "decode"],
            ["decode"],
            [],
        ]
        check_nested(calls[1], collector.below(calls[1]))
        assert collector.below(calls[1])[0].times[0] == calls[1].times[0]

    with_stack(llama, body)


# Several replicas.


@asynccontextmanager
async def two_replicas(
    model: Model, leader: dict[str, object], follower: dict[str, object]
) -> AsyncIterator[tuple[Stack, Stack]]:
    engine = Engine(model, SIZES, check=True)
    async with AsyncExitStack() as exits:
        worker, port = await exits.enter_async_context(running_engine(engine, None))
        replicas = []
        for settings in (leader, follower):
            replica = await exits.enter_async_context(own_port([port], **settings))
            if not replicas:
                await led(replica)
            replicas.append(replica)
        await until(lambda: replicas[1].relay.reaches_a_leader)
        stacks = [Stack(engine, worker, replica) for replica in replicas]
        yield stacks[0], stacks[1]
        for stack in stacks:
            await stack.channel.close()
            await stack.admin_channel.close()


@pytest.mark.parametrize("traced", ["both", "leader", "follower"])
def test_a_relayed_call_is_one_trace(llama: Model, traced: str) -> None:
    async def main() -> None:
        async with running_collector() as collector:
            on, off = {"traces_endpoint": collector.endpoint}, {"traces_endpoint": ""}
            leader = off if traced == "follower" else on
            follower = off if traced == "leader" else on
            async with two_replicas(llama, leader, follower) as (leading, following):
                message = request([20, 21, 22], 6, model="tiny-llama", request_id="r")
                answer = await generate(following, message, KEPT)
                await generate(following, request([20, 21, 22], 6), NOT_KEPT)
                assert len(answer.ids) == 6
                spans = await collector.gets(2 if traced == "both" else 1)
                check(collector, spans, leading.address)

    def check(collector: Collector, spans: list[Span], leader: str) -> None:
        relay, last = spans[0], spans[-1]
        assert {span.message.trace_id.hex() for span in collector.spans} == {TRACE}
        assert relay.message.parent_span_id.hex() == PARENT
        assert {span.attributes["quire.request.id"] for span in spans} == {"r"}
        if traced == "both":
            assert last.is_below(relay)
            assert relay.times[0] <= last.times[0]
        if traced != "leader":
            (event,) = relay.message.events
            assert event.name == "passed on"
            assert event.attributes[0].key == "quire.leader"
            assert event.attributes[0].value.string_value == leader
            assert relay.attributes["gen_ai.request.model"] == "tiny-llama"
            assert relay.attributes["rpc.response.status_code"] == "OK"
            assert "gen_ai.usage.output_tokens" not in relay.attributes
        if traced != "follower":
            assert names(collector.below(last)) == ["queue", "prefill", "decode"]
            assert last.attributes["gen_ai.usage.output_tokens"] == 6

    asyncio.run(main())


def test_a_call_that_moves_is_one_span_and_a_new_leader_tells_what_it_saw(llama: Model) -> None:
    async def main() -> None:
        async with running_collector() as collector:
            on: dict[str, object] = {"traces_endpoint": collector.endpoint}
            async with two_replicas(llama, on, on) as (leading, following):
                task = asyncio.create_task(generate(following, long_request("n", 400), KEPT))
                await until(lambda: leading.replica.generations.running(("", "n")) is not None)
                generation = leading.replica.generations.running(("", "n"))
                assert generation is not None
                await until(lambda: len(generation.samples[0].token_ids) > 5)
                await stopped(leading.replica)
                assert len((await task).ids) == 400
                relay, first = await collector.gets(2)
                assert first.is_below(relay)
                assert first.attributes["rpc.response.status_code"] == "UNAVAILABLE"
                assert names(collector.below(first)) == ["queue", "prefill", "decode"]
                # The relay leads by then, and reads what it took over.
                assert names(collector.below(relay)) == [GENERATE, "decode"]
                assert "gen_ai.server.time_to_first_token" not in relay.attributes
                assert relay.attributes["gen_ai.usage.output_tokens"] == 400
                check_nested(relay, collector.below(relay)[1:])

    asyncio.run(main())


# What is kept.


def test_a_share_of_what_begins_here_and_whatever_a_caller_wants(llama: Model) -> None:
    async def body(stack: Stack, collector: Collector) -> None:
        for name in "abc":
            await generate(stack, request([20], 2, request_id=name))
        await generate(stack, request([20], 2, request_id="kept"), KEPT)
        (call,) = await collector.gets(1)
        assert call.attributes["quire.request.id"] == "kept"

    with_stack(llama, body, traces_share=0)

    async def other(stack: Stack, collector: Collector) -> None:
        await generate(stack, request([20], 2, request_id="not"), NOT_KEPT)
        await generate(stack, request([20], 2, request_id="new"))
        (call,) = await collector.gets(1)
        assert call.attributes["quire.request.id"] == "new"

    with_stack(llama, other)


@pytest.mark.parametrize(
    "metadata",
    [
        (("traceparent", "secret"),),
        (("traceparent", "0" * 600),),
        (("traceparent", f"00-{'0' * 32}-{PARENT}-01"),),
        (*KEPT, ("tracestate", "secret=secret=,,=" * 3)),
        (*KEPT, ("tracestate", "secret=" + "1" * 900)),
    ],
)
def test_metadata_that_means_nothing_is_left_out_without_a_word(
    llama: Model, metadata: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(stack: Stack, collector: Collector) -> None:
        assert len((await generate(stack, request([20], 2), metadata)).ids) == 2
        (call,) = await collector.gets(1)
        continued = call.message.trace_id.hex() == TRACE
        assert continued == (metadata[0] == KEPT[0])
        assert not call.message.trace_state

    caplog.set_level(logging.WARNING)
    with_stack(llama, body)
    assert "secret" not in caplog.text and "opentelemetry" not in caplog.text


def test_variables_of_opentelemetry_and_tls(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Authority(tmp_path).issue("collector")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=k1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(own.ca))
    monkeypatch.setenv("OTEL_SERVICE_NAME", "inference")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    server = wire.Tls(own.certificate, own.key)

    async def main() -> None:
        async with running_collector(tls=server) as collector:
            endpoint = f"https://127.0.0.1:{collector.port}"
            async with any_stack(llama, traces_endpoint=endpoint) as stack:
                await generate(stack, request([20], 2))
                (call,) = await collector.gets(1)
                assert collector.metadata["api-key"] == "k1"
                assert call.resource["service.name"] == "inference"
                assert call.resource["deployment.environment.name"] == "test"

    asyncio.run(main())


# Collectors that do not do their part.


def spoken(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has of spans since traces were opened."""
    assert not [r for r in caplog.records if r.name.startswith("opentelemetry")], caplog.text
    return [r.getMessage() for r in caplog.records if r.name == "control_plane.otlp"][1:]


async def serve_until(stack: Stack, is_so: Callable[[], bool]) -> None:
    """One request after the other, each of which has to be answered."""
    async with asyncio.timeout(30):
        while not is_so():
            assert len((await generate(stack, request([20], 2))).ids) == 2
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_a_collector_that_takes_nothing_costs_spans_and_one_line(
    llama: Model, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(stack: Stack, collector: Collector) -> None:
        if fault == "hangs":
            collector.open.clear()
        else:
            collector.status = grpc.StatusCode.UNIMPLEMENTED
        await serve_until(stack, lambda: collector.calls >= 4)
        (line,) = spoken(caplog)
        why = "DEADLINE_EXCEEDED" if fault == "hangs" else "UNIMPLEMENTED"
        assert line.startswith(f"spans are dropped until {collector.endpoint} takes them: ")
        assert why in line
        collector.status = grpc.StatusCode.OK
        collector.open.set()
        seen = len(collector.spans)
        await serve_until(stack, lambda: len(collector.spans) > seen and len(spoken(caplog)) > 1)
        assert spoken(caplog)[1:] == [f"{collector.endpoint} takes spans again"]

    caplog.set_level(logging.INFO)
    with_stack(llama, body)


@pytest.mark.usefixtures("_impatient")
def test_a_collector_that_comes_later(llama: Model, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"

    async def main() -> None:
        async with any_stack(llama, traces_endpoint=endpoint) as stack:
            await serve_until(stack, lambda: bool(spoken(caplog)))
            (line,) = spoken(caplog)
            assert "UNAVAILABLE" in line
            async with running_collector(port) as collector:
                await serve_until(stack, lambda: bool(collector.spans) and len(spoken(caplog)) > 1)
            assert spoken(caplog)[1:] == [f"{endpoint} takes spans again"]

    caplog.set_level(logging.INFO)
    asyncio.run(main())


def test_a_full_queue_is_told_of_once(
    llama: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")

    async def body(stack: Stack, collector: Collector) -> None:
        async def calls(count: int) -> None:
            until = collector.calls + count
            await serve_until(stack, lambda: collector.calls >= until)

        for _ in range(2):
            collector.open.clear()
            await calls(1)
            for _ in range(4):
                await generate(stack, request([20], 2))
            collector.open.set()
            await calls(2)
        (line,) = spoken(caplog)
        assert line.startswith("some spans are dropped: more end than")

    caplog.set_level(logging.INFO)
    with_stack(llama, body)


# The end, and none at all.


@pytest.mark.parametrize("collects", [True, False])
def test_the_last_spans_leave_before_the_process_does(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collects: bool
) -> None:
    """And a collector that hangs does not hold it: either way it ends well, and says nothing."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    log = tmp_path / "control.log"

    async def main() -> None:
        async with (
            running_collector() as collector,
            running_engine(Engine(llama, EngineSizes(16, 64, 0, 4, 64, 256)), None) as (_, port),
        ):
            if not collects:
                collector.open.clear()
            flags = ("--traces-endpoint", collector.endpoint)
            with control_plane(log, [port], *flags) as process:
                await asyncio.to_thread(process.ready)
                async with wire.channel(f"127.0.0.1:{process.port}") as channel:
                    stub = inference_pb2_grpc.InferenceServiceStub(channel)
                    events = [event async for event in stub.Generate(request([20], 2))]
                assert len(events) > 2 and not collector.calls
                process.signal(signal.SIGTERM)
                # The library's own patience is 30 seconds.
                assert await asyncio.to_thread(process.wait, 20) == 0
            assert collector.calls == 1
            assert names(collector.spans) == (
                ["queue", "prefill", "decode", GENERATE] if collects else []
            )

    asyncio.run(main())
    text = log.read_text()
    assert "Traceback" not in text and "opentelemetry" not in text
    assert text.count("spans are dropped") == (0 if collects else 1)


def test_without_an_endpoint_nothing_is_even_imported() -> None:
    """By us: the client of Redis looks for the library's metrics itself."""
    code = (
        "import asyncio, sys\n"
        "import control_plane.__main__\n"
        "from control_plane.server import Replica\n"
        "from control_plane.settings import Settings\n"
        "from control_plane.traces import UNTRACED\n"
        "async def main():\n"
        "    replica = Replica(Settings(engines=''))\n"
        "    assert replica.traces.call(None, 'r', 0.0) is UNTRACED\n"
        "    await replica.traces.close()\n"
        "asyncio.run(main())\n"
        "parts = 'otlp', 'opentelemetry.exporter', 'opentelemetry.sdk.trace'\n"
        "print([name for name in sys.modules if any(part in name for part in parts)])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr


@pytest.mark.parametrize(
    "endpoint",
    [
        "collector:4317",
        "http://collector",
        "grpc://collector:4317",
        "http://collector:port",
        "http://:4317",
        "http://user:password@collector:4317",
        "http://collector:4317/v1/traces",
        "http://[::1:4317",
    ],
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(ValidationError, match=r"http://HOST:PORT for plain text or https://HOST"):
        Settings(traces_endpoint=endpoint)


@pytest.mark.parametrize("endpoint", ["", "http://a:1", "https://a.b:4317/", "http://[::1]:4317"])
def test_endpoints_that_are_some(endpoint: str) -> None:
    assert Settings(traces_endpoint=endpoint).traces_endpoint == endpoint


@pytest.mark.parametrize(
    ("flags", "variable", "sentence"),
    [
        (("--traces-endpoint", "there"), "", "setting traces_endpoint: "),
        (("--traces-share", "1.5"), "", "setting traces_share: Input should be less than or"),
        (
            ("--traces-endpoint", "http://127.0.0.1:1"),
            "zip",
            'setting traces_endpoint: by the OTEL_* variables: Invalid value "zip"',
        ),
    ],
)
def test_settings_that_are_wrong_end_the_process_with_a_sentence(
    flags: tuple[str, ...], variable: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", variable)
    command = [sys.executable, "-m", "control_plane", *flags]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert ran.stderr.startswith(sentence), ran.stderr


def test_the_log_is_the_librarys_own_again_at_the_end(llama: Model) -> None:
    async def main() -> None:
        async with traced_stack(llama):
            assert len(filters()) == before + 1

    def filters() -> list[Any]:
        return list(logging.getLogger(otlp._EXPORT).filters)

    before = len(filters())
    asyncio.run(main())
    assert len(filters()) == before
