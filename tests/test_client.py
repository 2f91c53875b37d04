"""The client library: every token once, whatever happens to the service meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import pytest

from control_plane.cli.local_stack import LocalStack, StackSettings, demo_model
from control_plane.client import CallError, Client, generate_text, make_request
from protos import wire
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.pods import Proxy
from tests.processes import free_port

GOLDEN = json.loads((demo_model() / "golden.json").read_text())
SYSTEM = (demo_model() / "system_prompt.txt").read_text().strip()


@dataclass
class Collected:
    """What a caller got from one call to generate."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[int] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def take(self, event: pb.GenerateResponse) -> None:
        if event.WhichOneof("event") != "delta":
            self.others.append(event.WhichOneof("event"))
            return
        delta = event.delta
        self.texts[delta.sample] = self.texts.get(delta.sample, "") + delta.text
        self.token_ids.setdefault(delta.sample, []).extend(delta.token_ids)
        self.logprobs += [entry.logprob for entry in delta.logprobs]
        self.prompt_logprobs += [entry.token_id for entry in delta.prompt_logprobs]


async def collect(
    events: AsyncIterator[pb.GenerateResponse], on_delta: Callable[[], None] = lambda: None
) -> Collected:
    collected = Collected()
    async for event in events:
        collected.take(event)
        if event.WhichOneof("event") == "delta":
            on_delta()
    return collected


# Against a real service.


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def stack(runner: asyncio.Runner) -> Iterator[LocalStack]:
    settings = StackSettings(flags=("--model", str(demo_model()), "--threads", "1"))
    stack = LocalStack(settings)
    runner.run(stack.__aenter__())
    yield stack
    runner.run(stack.__aexit__(None, None, None))


class Killer:
    """Kills the control plane after some deltas, and starts it again."""

    def __init__(self, stack: LocalStack, after: int) -> None:
        self._stack, self._left = stack, after
        self.restart: asyncio.Task[None] | None = None

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            assert self._stack.control_plane.pid is not None
            os.kill(self._stack.control_plane.pid, signal.SIGKILL)
            self.restart = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        while self._stack.control_plane.exit_status is None:
            await asyncio.sleep(0.01)
        await self._stack.start(self._stack.control_plane)


def test_text_of_a_prompt_and_of_a_chat(runner: asyncio.Runner, stack: LocalStack) -> None:
    async def calls() -> None:
        async with Client(stack.address) as client:
            chat = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": GOLDEN[0]["question"]},
            ]
            assert await client.text(chat, temperature=0) == GOLDEN[0]["text"]
            ids = GOLDEN[1]["prompt_token_ids"]
            assert await client.text(ids, temperature=0) == GOLDEN[1]["text"]
            assert await client.text("A block table is", max_tokens=4)

    runner.run(calls())


def test_streams_go_on_after_the_control_plane_was_killed(
    runner: asyncio.Runner, stack: LocalStack
) -> None:
    async def calls() -> list[Collected]:
        killer = Killer(stack, after=25)
        async with Client(stack.address) as client:
            streams = [
                collect(client.generate(entry["prompt_token_ids"], temperature=0), killer)
                for entry in GOLDEN
            ]
            collected = await asyncio.gather(*streams)
        assert killer.restart is not None, "the answers ended before the kill"
        await killer.restart
        return collected

    for entry, collected in zip(GOLDEN, runner.run(calls()), strict=True):
        assert collected.token_ids == {0: entry["output_token_ids"]}
        assert collected.texts == {0: entry["text"]}
        assert collected.others == ["accepted", "finished", "usage"]


def test_samples_go_on_after_the_control_plane_was_killed(
    runner: asyncio.Runner, stack: LocalStack
) -> None:
    async def calls() -> tuple[Collected, Collected]:
        request = make_request(
            "What is", seed=7, sample_count=3, max_tokens=60, ignore_eos=True, logprob_count=0
        )
        killer = Killer(stack, after=60)
        async with Client(stack.address) as client:
            undisturbed = await collect(client.generate(request))
            disturbed = await collect(client.generate(request), killer)
        assert killer.restart is not None
        await killer.restart
        return undisturbed, disturbed

    undisturbed, disturbed = runner.run(calls())
    assert [len(ids) for ids in undisturbed.token_ids.values()] == [60] * 3
    assert disturbed.token_ids == undisturbed.token_ids
    assert disturbed.texts == undisturbed.texts
    assert len(disturbed.logprobs) == 180
    assert disturbed.others == ["accepted", "finished", "finished", "finished", "usage"]


def test_refusals_and_cancel(runner: asyncio.Runner, stack: LocalStack) -> None:
    async def calls() -> None:
        async with Client(stack.address) as client:
            with pytest.raises(CallError) as refused:
                await client.text("x", temperature=-1)
            assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
            assert refused.value.field == "sampling.temperature"
            with pytest.raises(CallError, match="NOT_FOUND"):
                await client.text("x", model="other")
            with pytest.raises(CallError, match="NOT_FOUND"):
                await client.cancel("never-heard-of")
            reasons = []
            request = make_request("What", request_id="long", max_tokens=1000, ignore_eos=True)
            async for event in client.generate(request):
                if event.WhichOneof("event") == "accepted":
                    await client.cancel("long")
                if event.WhichOneof("event") == "finished":
                    reasons.append(event.finished.reason)
            assert reasons == [pb.FINISH_REASON_CANCELLED]

    runner.run(calls())


# Against a service that answers as told.

Step = pb.GenerateResponse | wire.RpcError


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    """Answers its n-th call with the n-th list: messages, then perhaps an error."""

    def __init__(self, *answers: list[Step]) -> None:
        self._answers = list(answers)
        self.requests: list[pb.GenerateRequest] = []

    async def Generate(
        self, request: pb.GenerateRequest, context: wire.Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        for step in self._answers.pop(0):
            if isinstance(step, wire.RpcError):
                await wire.abort(context, step)
            yield step


def against(service: Scripted, call: Callable[[Client], Any], retry_seconds: float = 5.0) -> Any:
    async def run() -> Any:
        server = wire.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
        port = wire.listen(server, "127.0.0.1:0", None)
        await server.start()
        try:
            async with Client(f"127.0.0.1:{port}", retry_seconds=retry_seconds) as client:
                return await call(client)
        finally:
            await server.stop(0)

    return asyncio.run(run())


ACCEPTED = pb.GenerateResponse(accepted=pb.Accepted(request_id="r"))
USAGE = pb.GenerateResponse(usage=pb.Usage())
GONE = wire.RpcError(grpc.StatusCode.UNAVAILABLE, "gone")
# What a call is ended with that a server has not answered when it stops.
CUT = wire.RpcError(grpc.StatusCode.CANCELLED, "CANCELLED")


def delta(sample: int, *token_ids: int, prompt: tuple[int, ...] = ()) -> pb.GenerateResponse:
    text = "".join(map(chr, token_ids))
    logprobs = [pb.TokenLogprob(token_id=token) for token in prompt]
    message = pb.Delta(sample=sample, text=text, token_ids=token_ids, prompt_logprobs=logprobs)
    return pb.GenerateResponse(delta=message)


def finished(sample: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(sample=sample))


def test_each_stream_asks_for_what_is_missing() -> None:
    service = Scripted(
        [GONE],
        [ACCEPTED, delta(0, 65, prompt=(1, 2)), delta(1, 66, 67), finished(1), GONE],
        [ACCEPTED, delta(0, prompt=(1,)), CUT],
        [ACCEPTED, delta(0, 68, prompt=(1, 2, 3)), finished(0), finished(1), USAGE],
    )
    collected = against(service, lambda client: collect(client.generate("x", sample_count=2)))
    assert collected.texts == {0: "AD", 1: "BC"}
    assert collected.prompt_logprobs == [1, 2, 3]
    assert collected.others == ["accepted", "finished", "finished", "usage"]
    assert len({request.request_id for request in service.requests}) == 1
    assert service.requests[0].request_id
    received = [list(request.received_token_counts) for request in service.requests]
    assert received == [[], [], [1, 2], [1, 2]]


def test_a_caller_may_go_on_where_another_stopped() -> None:
    service = Scripted([delta(0, 65), GONE], [delta(0, 66), finished(0), USAGE])
    request = pb.GenerateRequest(text="x", request_id="mine", received_token_counts=[10])
    collected = against(service, lambda client: collect(client.generate(request)))
    assert collected.texts == {0: "AB"}
    assert [list(each.received_token_counts) for each in service.requests] == [[10], [11]]
    assert {each.request_id for each in service.requests} == {"mine"}
    assert list(request.received_token_counts) == [10], "the caller's message is the caller's"


def test_a_full_queue_is_retried_when_the_service_says() -> None:
    service = Scripted([wire.overloaded("full", 0.2)], [ACCEPTED, delta(0, 65), USAGE])

    async def call(client: Client) -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await client.text("x") == "A"
        return loop.time() - began

    assert 0.2 <= against(service, call) < 2
    later = Scripted([wire.overloaded("full", 60.0)])
    with pytest.raises(CallError, match="RESOURCE_EXHAUSTED: full") as error:
        against(later, lambda client: client.text("x"))
    assert error.value.retry_seconds == 60.0


def test_who_says_how_long_to_wait_waits_once() -> None:
    late = wire.overloaded("waited", 0.1, "WAITED_TOO_LONG")
    own = Scripted([wire.overloaded("full", 0.1)], [late])
    with pytest.raises(CallError, match="RESOURCE_EXHAUSTED: waited") as error:
        against(own, lambda client: client.text("x", max_waiting_time=timedelta(seconds=2)))
    assert error.value.reason == "WAITED_TOO_LONG" and error.value.retry_seconds == 0.1
    assert {request.max_waiting_time.seconds for request in own.requests} == {2}
    # A limit of the service's is its way to say that it is full.
    services = Scripted([late], [ACCEPTED, delta(0, 65), USAGE])
    assert against(services, lambda client: client.text("x")) == "A"


def test_gives_up_after_some_time_without_progress() -> None:
    service = Scripted(*[[GONE] for _ in range(100)])
    with pytest.raises(CallError, match="UNAVAILABLE"):
        against(service, lambda client: client.text("x"), retry_seconds=0.5)
    # Waits of 25 to 50 ms, 50 to 100 ms and so on: some attempts, not a storm of them.
    assert 3 <= len(service.requests) <= 8
    once = Scripted([GONE])
    with pytest.raises(CallError, match="UNAVAILABLE"):
        against(once, lambda client: client.text("x"), retry_seconds=0)


def test_the_best_of_a_search_is_shown_and_is_no_progress() -> None:
    best = pb.GenerateResponse(best_so_far=pb.BestSoFar(text="AB", token_ids=[65, 66], score=-1.0))
    service = Scripted([ACCEPTED, best, GONE], [ACCEPTED, best, delta(0, 65), finished(0), USAGE])
    collected = against(service, lambda client: collect(client.generate("x")))
    assert collected.token_ids == {0: [65]} and collected.texts == {0: "A"}
    assert collected.others == ["accepted", "best_so_far", "best_so_far", "finished", "usage"]
    assert [list(each.received_token_counts) for each in service.requests] == [[], []]
    stuck = Scripted(*[[ACCEPTED, best, GONE] for _ in range(100)])
    with pytest.raises(CallError, match="UNAVAILABLE"):
        against(stuck, lambda client: client.text("x"), retry_seconds=0.5)
    assert len(stuck.requests) <= 9


def test_the_timeout_bounds_all_attempts() -> None:
    service = Scripted(*[[GONE] for _ in range(100)])
    with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
        against(service, lambda client: client.text("x", timeout=0.3))


class Leaving(inference_pb2_grpc.InferenceServiceServicer):
    """A replica that begins to drain while it answers its first call."""

    def __init__(self) -> None:
        self.refused = 0
        self.begun, self.over = asyncio.Event(), asyncio.Event()

    async def Generate(
        self, request: pb.GenerateRequest, context: wire.Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        if request.text != "first":
            self.refused += 1
            error = wire.failed(grpc.StatusCode.UNAVAILABLE, "DRAINING", "it drains")
            await wire.abort(context, error)
        yield ACCEPTED
        self.begun.set()
        await self.over.wait()
        for event in (delta(0, 65), finished(0), USAGE):
            yield event


def test_a_replica_that_drains_is_left_for_another_one() -> None:
    """Behind a load balancer whose connections stay where they were made."""
    old, new = Leaving(), Scripted(*[[ACCEPTED, delta(0, 66), finished(0), USAGE]] * 2)

    async def calls(address: str, ready: list[str], hosts: tuple[str, str]) -> None:
        async with Client(address, retry_seconds=2.0) as client:
            first = asyncio.create_task(client.text("first"))
            await old.begun.wait()
            ready[:] = hosts[1:]
            both = [client.text("second"), client.text("third")]
            assert await asyncio.gather(*both) == ["B", "B"]
            # What ran where it drains runs there to its end.
            old.over.set()
            assert await first == "A"
            assert 1 <= old.refused <= 2 and len(new.requests) == 2

    async def main() -> None:
        hosts, port = ("127.7.7.1", "127.7.7.2"), free_port()
        servers = [wire.server(), wire.server()]
        for server, service, host in zip(servers, (old, new), hosts, strict=True):
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
            wire.listen(server, f"{host}:{port}", None)
            await server.start()
        ready = [hosts[0]]
        balancer = Proxy("127.7.7.3", port, lambda: iter(ready))
        try:
            await calls(f"127.7.7.3:{port}", ready, hosts)
        finally:
            for server in servers:
                await server.stop(0)
            balancer.close()

    asyncio.run(main())


def test_text_raises_what_the_engine_reported() -> None:
    failed = pb.Finished(reason=pb.FINISH_REASON_ERROR, message="broken; error 12ab")
    service = Scripted([ACCEPTED, delta(0, 65), pb.GenerateResponse(finished=failed), USAGE])
    with pytest.raises(CallError, match="INTERNAL: broken; error 12ab"):
        against(service, lambda client: client.text("x"))


def test_without_a_service() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"

        async def call() -> None:
            async with Client(address, retry_seconds=0.2) as client:
                with pytest.raises(CallError, match=f"nothing answers at {address}"):
                    await client.wait_connected(0.2)
                with pytest.raises(CallError, match=f"nothing answers at {address}"):
                    await client.text("x")

        asyncio.run(call())


def test_requests_use_the_names_of_the_contract() -> None:
    chat = [{"role": "user", "content": "hi"}]
    request = make_request(chat, model="m", temperature=0, stop_strings=["."], sample_count=2)
    assert request == pb.GenerateRequest(
        model="m",
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]),
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(stop_strings=["."]),
        output=pb.Output(sample_count=2),
    )
    assert make_request("x", logit_bias={3: -1.0}).sampling.logit_bias[3] == -1.0
    assert make_request("x", seed=None, max_tokens=None) == pb.GenerateRequest(text="x")
    with pytest.raises(TypeError, match="no option temprature"):
        make_request("x", temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="its own"):
        against(Scripted(), lambda client: client.text(pb.GenerateRequest(text="x"), temperature=0))


def test_from_code_that_is_not_asynchronous(stack: LocalStack) -> None:
    prompt = GOLDEN[2]["prompt_token_ids"]
    assert generate_text(prompt, stack.address, temperature=0) == GOLDEN[2]["text"]
