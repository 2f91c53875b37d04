"""Any replica takes any request: calls that are passed on, and taken up when their leader goes."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane import relay
from control_plane.engine_link import Leadership
from control_plane.frontend import Frontend
from control_plane.leader import LeaderState
from control_plane.peer import LEADS
from control_plane.plan import Plan
from control_plane.server import Replica
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from protos import wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.load import Load, prefilled
from tests.processes import Process, control_plane, data_plane, free_port
from tests.stack import Answer, Stack, failure, led, request, running_engine, running_replica

SIZES = EngineSizes(16, 512, 0, 32, 256, 1024)
STATUS = "grpc-status-details-bin"


def long_request(name: str, max_tokens: int = 300, **fields: object) -> pb.GenerateRequest:
    message = request(list(range(20, 60)), max_tokens, request_id=name, **fields)
    message.stopping.ignore_eos = True
    return message


async def until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.002)


async def is_serving(address: str, service: str = "") -> bool:
    async with wire.channel(address) as channel:
        question = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(question)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@dataclasses.dataclass
class Pair:
    """A replica that leads the engine and one that follows it, each with a client of its own."""

    leader: Stack
    follower: Stack


@asynccontextmanager
async def own_port(engine_ports: list[int], **settings: object) -> AsyncIterator[Replica]:
    """A replica that others can reach at the address that it tells engines."""
    listen = f"127.0.0.1:{free_port()}"
    async with running_replica(engine_ports, listen=listen, **settings) as replica:
        yield replica


@asynccontextmanager
async def running_pair(
    model: Model, directory: Path | None = None, sizes: EngineSizes = SIZES, **settings: object
) -> AsyncIterator[Pair]:
    engine = Engine(model, sizes, check=True)
    async with AsyncExitStack() as stack:
        worker, port = await stack.enter_async_context(running_engine(engine, directory))
        first = await stack.enter_async_context(own_port([port], **settings))
        await led(first)
        second = await stack.enter_async_context(own_port([port], **settings))
        await until(lambda: second.relay.reaches_a_leader)
        pair = Pair(Stack(engine, worker, first), Stack(engine, worker, second))
        try:
            yield pair
        finally:
            for each in (pair.leader, pair.follower):
                await each.channel.close()
                await each.admin_channel.close()


def with_pair(
    model: Model,
    body: Callable[[Pair], Awaitable[None]],
    directory: Path | None = None,
    sizes: EngineSizes = SIZES,
    **settings: object,
) -> None:
    async def main() -> None:
        async with running_pair(model, directory, sizes, **settings) as pair:
            await body(pair)

    asyncio.run(main())


KINDS = {
    "greedy": request([30, 31, 32], 24),
    "text": request("the text", 8),
    "chat": pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hello")]),
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(max_tokens=8),
    ),
    "samples": request(
        [30, 31, 32],
        24,
        sampling=pb.Sampling(temperature=1, seed=3),
        output=pb.Output(sample_count=3),
    ),
    "logprobs": request(
        list(range(40)), 8, output=pb.Output(logprob_count=2, prompt_logprob_count=1)
    ),
    "beams": request([30, 31], 8, beam_search=pb.BeamSearch(width=3, stream_best=True)),
}


def test_a_follower_answers_as_the_leader_does(llama: Model, llama_directory: Path) -> None:
    async def body(pair: Pair) -> None:
        async with asyncio.timeout(5):
            while not await is_serving(pair.follower.address):
                await asyncio.sleep(0.05)
        assert not await is_serving(pair.follower.address, LEADS)
        for name, message in KINDS.items():
            # The second one finds its prompt in the cache, wherever it is sent.
            await pair.leader.generate(message)
            direct = await pair.leader.generate(message)
            through = await pair.follower.generate(message)
            assert through.accepted.request_id
            for answer in (direct, through):
                answer.accepted.ClearField("request_id")
                answer.bests.clear()  # How often one is shown is a matter of time.
            assert through == direct, name
        assert len(pair.follower.replica.generations.all_running()) == 0
        deltas = [
            event
            async for event in pair.follower.stub.Generate(long_request("streamed", 50))
            if event.WhichOneof("event") == "delta"
        ]
        assert len(deltas) > 10
        await pair.leader.idle()

    with_pair(llama, body, llama_directory)


def details(error: grpc.aio.AioRpcError) -> object:
    found = dict(error.trailing_metadata() or ())
    return error.code(), error.details(), found.get(STATUS)


def test_errors_pass_with_their_details(llama: Model) -> None:
    """Also those whose time to come back depends on the leader's queue."""

    async def body(pair: Pair) -> None:
        bad = [
            request([999], 4),
            request([], 4),
            request([30], 4, model="other"),
            request([30], 4, output=pb.Output(sample_count=1 << 30)),
            request([30], 1 << 20),
        ]
        for message in bad:
            direct = await failure(pair.leader.generate(message))
            through = await failure(pair.follower.generate(message))
            assert details(through) == details(direct)
            assert direct.code() is not grpc.StatusCode.UNAVAILABLE
        running = [
            asyncio.create_task(pair.follower.generate(long_request(f"r{i}"))) for i in range(2)
        ]
        scheduler = pair.leader.loop.scheduler
        await until(lambda: scheduler.running_count == 1 and scheduler.waiting_count == 1)
        error = await failure(pair.follower.generate(request([30], 4)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "RetryInfo" in type(wire.error_details(error)[-1]).__name__
        error = await failure(pair.follower.generate(request([30, 31], 4, request_id="r0")))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        for answer in await asyncio.gather(*running):
            assert len(answer.ids) == 300

    sizes = dataclasses.replace(SIZES, slot_count=1)
    with_pair(llama, body, sizes=sizes, max_waiting_requests=1)


def test_whoever_leaves_a_relay_frees_the_blocks(llama: Model) -> None:
    async def begun(pair: Pair, name: str, timeout: float | None = None) -> asyncio.Task[Answer]:
        call = pair.follower.generate(long_request(name, 900), timeout=timeout or 60)
        task = asyncio.create_task(call)
        await until(lambda: pair.leader.loop.scheduler.running_count == 1)
        return task

    async def body(pair: Pair) -> None:
        task = await begun(pair, "cancelled")
        await pair.follower.stub.Cancel(pb.CancelRequest(request_id="cancelled"))
        answer = await task
        assert answer.finished[0].reason == pb.FINISH_REASON_CANCELLED
        await pair.leader.idle()
        task = await begun(pair, "hung-up")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pair.leader.idle()
        error = await failure(await begun(pair, "late", 0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await pair.leader.idle()
        for name, code in (("none", "NOT_FOUND"), ("", "INVALID_ARGUMENT")):
            error = await failure(pair.follower.stub.Cancel(pb.CancelRequest(request_id=name)))
            assert error.code() is grpc.StatusCode[code]
        assert pair.follower.replica.relay.running == 0

    with_pair(llama, body)


async def stopped(replica: Replica) -> None:
    """Stops a replica for good: its context does not stop it again."""
    stop, replica.stop = replica.stop, partial(asyncio.sleep, 0)  # type: ignore[method-assign]
    await stop()


async def begun_through(pair: Pair, message: pb.GenerateRequest, count: int = 10) -> Any:
    """A call of the follower's that has brought some tokens, and how many."""
    call = pair.follower.stub.Generate(message)
    tokens = 0
    while tokens < count:
        tokens += len((await call.read()).delta.token_ids)
    return call, tokens


@pytest.mark.parametrize("way", ["hang up", "deadline"])
def test_a_client_that_leaves_a_relay_frees_its_blocks_within_two_steps(
    llama: Model, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pair: Pair) -> None:
        loop, ended_at = pair.leader.loop, []
        release = loop.release
        monkeypatch.setattr(loop, "release", lambda g: (ended_at.append(loop.step), release(g)))
        message = long_request("long", 900, output=pb.Output(sample_count=16))
        call = pair.follower.stub.Generate(message, timeout=1.5 if way == "deadline" else None)
        while not (await call.read()).delta.token_ids:
            pass
        assert loop.scheduler.pool.used_count > 0
        if way == "hang up":
            call.cancel()
        else:
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        began = time.monotonic()
        await until(lambda: bool(ended_at), 5)
        assert time.monotonic() - began < 1 and loop.scheduler.pool.used_count == 0
        await pair.leader.idle()
        assert loop.step - ended_at[0] <= 1

    sizes = dataclasses.replace(SIZES, block_count=1024)
    with_pair(llama, body, sizes=sizes)


def test_what_a_relay_that_goes_had_passed_on_waits_for_its_client(llama: Model) -> None:
    async def body(pair: Pair) -> None:
        message = long_request("n", 600)
        expected = (await pair.leader.generate(long_request("calm", 600))).ids
        call, tokens = await begun_through(pair, message)
        generations = pair.leader.replica.generations
        generation = generations.running(("", "n"))
        assert generation is not None
        await stopped(pair.follower.replica)
        assert await call.code() is not grpc.StatusCode.OK
        await until(lambda: generation.subscriber_count == 0)
        assert generations.running(("", "n")) is generation
        message.received_token_counts.append(tokens)
        rest = await pair.leader.generate(message)
        assert rest.ids == expected[tokens:]
        assert generations.get(("", "n")) is generation and generation.finished
        await pair.leader.idle()

    with_pair(llama, body)


def test_what_nobody_comes_back_for_ends(llama: Model) -> None:
    async def body(pair: Pair) -> None:
        await begun_through(pair, long_request("n", 900, output=pb.Output(sample_count=16)))
        generations = pair.leader.replica.generations
        await stopped(pair.follower.replica)
        await asyncio.sleep(0.05)
        assert generations.running(("", "n")) is not None
        await until(lambda: generations.running(("", "n")) is None, 2)
        assert generations.was_cancelled(("", "n"))
        await pair.leader.idle()

    sizes = dataclasses.replace(SIZES, block_count=1024)
    with_pair(llama, body, sizes=sizes, orphan_grace_seconds=0.3)


def test_a_client_that_leaves_a_relay_ends_nothing_that_another_one_reads(llama: Model) -> None:
    async def body(pair: Pair) -> None:
        message = long_request("n", 600)
        call, _ = await begun_through(pair, message)
        other = asyncio.create_task(pair.leader.generate(message))
        generation = pair.leader.replica.generations.running(("", "n"))
        assert generation is not None
        await until(lambda: generation.subscriber_count == 2)
        call.cancel()
        assert len((await other).ids) == 600
        await pair.leader.idle()

    with_pair(llama, body)


def test_a_stream_follows_its_engine_to_another_leader(llama: Model) -> None:
    """Its leader loses the engine, and lives: from then on it is a relay for its own clients."""

    async def body(pair: Pair) -> None:
        expected = await pair.leader.generate(long_request("calm", 600))
        messages = [long_request("mine", 600), long_request("logprobs", 100)]
        messages[1].output.logprob_count = 1
        messages[1].output.prompt_logprob_count = 0
        calm = await pair.leader.generate(messages[1])
        both = [pair.leader, pair.follower]
        messages[1].request_id = "logprobs-too"
        tasks = [asyncio.create_task(each.generate(m)) for m in messages for each in both]
        generations = pair.leader.replica.generations
        await until(lambda: sum(g.subscriber_count for g in generations.all_running()) == 4)
        await until(lambda: all(len(g.samples[0].token_ids) > 5 for g in generations.all_running()))
        (former,) = pair.leader.replica.router.leaders
        # The other one claims it first.
        former._settings = dataclasses.replace(former._settings, retry_seconds=1.0)
        former.loop._settings = former._settings  # type: ignore[union-attr]
        former.loop.scheduler.costs = None  # type: ignore[union-attr,assignment]
        first, second, third, fourth = await asyncio.gather(*tasks)
        assert first.ids == second.ids == expected.ids
        assert third.ids == fourth.ids == calm.ids
        assert len(third.logprobs[0]) == 100
        assert third.prompt_logprobs == fourth.prompt_logprobs == calm.prompt_logprobs
        (new,) = pair.follower.replica.router.leaders
        assert new.state is LeaderState.LED and former.state is LeaderState.FOLLOWED
        await until(lambda: pair.leader.replica.relay.reaches_a_leader)
        await pair.follower.idle()

    with_pair(llama, body)


def test_what_ended_as_a_replica_went_is_not_generated_again(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is told to release it, and then the leader goes, before its reader was told."""
    released, send = asyncio.Event(), Leadership.send

    async def send_and_hang(self: Leadership, plan: Plan) -> None:
        await send(self, plan)
        if plan.released and not released.is_set():
            released.set()
            await asyncio.Event().wait()

    async def body(pair: Pair) -> None:
        message = long_request("last", 20)
        task = asyncio.create_task(pair.follower.generate(message))
        await released.wait()
        engine = pair.leader.engine
        await until(lambda: not engine.state.resident_slots().size)
        await stopped(pair.leader.replica)
        assert len((await task).ids) == 20
        assert engine.counters.prefill_token_count == len(message.token_ids.ids)

    monkeypatch.setattr(Leadership, "send", send_and_hang)
    with_pair(llama, body, drain_seconds=0.1)


def test_calls_never_go_round(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two replicas believes that the other leads: nobody does."""
    monkeypatch.setattr(relay, "RETRY_SECONDS", 0.6)
    served = []
    serve = Frontend._serve

    async def counted(self: Frontend, *arguments: object, **named: object) -> None:
        served.append(self)
        await serve(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Frontend, "_serve", counted)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            claims = []
            ports = []
            for _ in range(2):
                _, port = await stack.enter_async_context(
                    running_engine(Engine(llama, SIZES), None, engine_id=f"e{len(ports)}")
                )
                channel = await stack.enter_async_context(wire.channel(f"127.0.0.1:{port}"))
                ports.append(port)
                claims.append(engine_pb2_grpc.EngineServiceStub(channel).Lead())
            listens = [f"127.0.0.1:{free_port()}" for _ in ports]
            for claim, listen in zip(claims, listens, strict=True):
                message = engine_pb2.Claim(leader_address=listen)
                await claim.write(engine_pb2.LeadRequest(claim=message))
                await claim.read()
            replicas = [
                await stack.enter_async_context(running_replica(ports, listen=listen))
                for listen in listens
            ]
            for replica, other in zip(replicas, reversed(listens), strict=True):
                followed = replica.router.followed
                await until(lambda: followed() == {other})  # noqa: B023
            for listen in listens:
                served.clear()
                assert not await is_serving(listen)
                async with wire.channel(listen) as channel:
                    stub = inference_pb2_grpc.InferenceServiceStub(channel)
                    async for _ in stub.Generate(request([30], 4), timeout=20):
                        raise AssertionError("nobody can answer")

    with pytest.raises(grpc.aio.AioRpcError) as error:
        asyncio.run(main())
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    (info,) = wire.error_details(error.value)
    assert info.reason == "NO_ENGINE"  # type: ignore[attr-defined]
    # One attempt after the other, always at the same replica.
    assert 2 < len(served) < 15 and len(set(served)) == 1


# Real processes, and clients that know nothing of retries.


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_clients_of_a_follower_notice_nothing_when_the_leader_is_lost(
    llama_directory: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Whether its streams break, or are silent while the engine has found another leader."""

    async def run(engine: Process, leader: Process, follower: Process) -> None:
        load = Load(follower.port)
        calls = [
            asyncio.create_task(load.call(load.message(300, samples=1 + (i % 4 == 3))))
            for i in range(12)
            if not await asyncio.sleep(0.01)
        ]
        await until(lambda: all(len(answer.ids) > 5 for answer in load.answers.values()), 30)
        assert len(load.answers) == 12
        leader.signal(how)
        fresh = asyncio.create_task(load.call(load.message(8)))
        assert len((await fresh).ids) == 8
        await asyncio.gather(*calls)
        # From now on it answers by itself.
        assert len((await load.call(load.message(8))).ids) == 8
        assert await prefilled(engine) == load.prompt_tokens
        assert "epoch 2" in follower.log()
        await load.check(follower.port)
        await load.close()

    flags = ("--model", str(llama_directory), "--max-slots", "64", "--leader-timeout-seconds", "4")
    with (
        data_plane(tmp_path / "engine.log", *flags) as engine,
        control_plane(tmp_path / "leader.log", [engine.port]) as leader,
    ):
        engine.ready()
        leader.ready()
        with control_plane(tmp_path / "follower.log", [engine.port]) as follower:
            follower.ready()
            asyncio.run(run(engine, leader, follower))


def test_a_rolling_update_of_the_control_plane_fails_no_request(
    llama_directory: Path, tmp_path: Path
) -> None:
    """A new replica starts, is ready, and the old one goes; twice, with calls all the while."""

    async def run(engine: Process, old: Process) -> None:
        load, over = Load(old.port), asyncio.Event()
        clients = [asyncio.create_task(load.loop(over)) for _ in range(6)]
        # Each outlives the replica that leads when it begins; its client is the next one's.
        long: list[asyncio.Task[Answer]] = []
        for number in range(2):
            drain = ("--drain-seconds", "100")
            new = control_plane(tmp_path / f"new-{number}.log", [engine.port], *drain)
            with_new.append(new)
            await asyncio.to_thread(new.ready)
            load.ports.append(new.port)
            await asyncio.sleep(0.5)
            long.append(asyncio.create_task(load.call(load.message(900), new.port)))
            await asyncio.sleep(0.3)
            load.ports.remove(old.port)
            # What was sent there has arrived before it is told to go.
            await asyncio.sleep(0.2)
            old.signal(signal.SIGTERM)
            assert await asyncio.to_thread(old.wait, 100) == 0
            old = new
        await asyncio.sleep(0.5)
        over.set()
        await asyncio.gather(*clients, *long)
        assert len(load.answers) > 20
        assert await prefilled(engine) == load.prompt_tokens
        await load.check(old.port)
        await load.close()

    with_new: list[Process] = []
    flags = ("--model", str(llama_directory), "--max-slots", "64", "--blocks", "4096")
    try:
        with (
            data_plane(tmp_path / "engine.log", *flags) as engine,
            control_plane(tmp_path / "old.log", [engine.port], "--drain-seconds", "100") as old,
        ):
            engine.ready()
            old.ready()
            asyncio.run(run(engine, old))
    finally:
        for process in with_new:
            process.__exit__()
