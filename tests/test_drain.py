"""Draining: engines and replicas that go, and the requests that are none the wiser."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane import leader as leading
from control_plane.leader import EngineLeader
from control_plane.request import Request
from control_plane.scheduler import Scheduler, SchedulerLimits
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from data_plane.service import EngineService, ServiceTimes
from data_plane.worker import Worker
from protos import wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc
from protos.inference.v1 import inference_pb2 as pb
from tests.load import Load, prefilled
from tests.processes import Process, control_plane, data_plane, free_port
from tests.stack import (
    Answer,
    Stack,
    failure,
    led,
    request,
    running_engine,
    running_replica,
)
from tests.stub_engine import StubEngine, expected
from tests.test_leadership import first_plan, heir_of, ints
from tests.test_relay import long_request, own_port, running_pair, until

SIZES = EngineSizes(16, 256, 0, 4, 256, 1024)


async def run_until(task: asyncio.Task[Answer], is_so: Callable[[], bool]) -> asyncio.Task[Answer]:
    """Waits for something that a call brings about."""
    async with asyncio.timeout(60):
        while not is_so():
            assert not task.done(), await task
            await asyncio.sleep(0.002)
    return task


# The scheduler.


def make_scheduler(**sizes: int) -> tuple[Scheduler, StubEngine]:
    limits = SchedulerLimits(
        model_fingerprint="stub", block_size=4, block_count=12, slot_count=8, max_length=64,
        step_tokens=32, chunk_tokens=32, preemption="recompute",
    )  # fmt: skip
    limits = replace(limits, **sizes)  # type: ignore[arg-type]
    return Scheduler(limits), StubEngine(limits)


def simple(name: str, count: int, first: int = 0, priority: int = 0) -> Request:
    import numpy as np

    prompt = np.arange(first, first + 8, dtype=np.int32)
    return Request(name, prompt, count, priority=priority, record=name.encode())


def test_what_has_begun_ends_and_nothing_else_begins() -> None:
    """One that was preempted comes back before any that has not begun, whatever their order."""
    scheduler, engine = make_scheduler()
    begun = [scheduler.submit(simple(name, 24, 100 * i)) for i, name in enumerate("ab")]
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    for number in range(400):
        plan = scheduler.schedule()
        if plan is None:
            break
        if number == 2:
            scheduler.draining = True
            for i in range(12):
                scheduler.submit(simple(f"new-{i}", 4, 1000 + 10 * i, priority=-1))
        outcome = scheduler.apply(engine.execute(plan))
        for sequence, token in zip(outcome.sequences, outcome.token_ids.tolist(), strict=True):
            tokens[sequence.group.request.request_id].append(token)
    assert scheduler.totals.preemptions > 0, "both must not fit at once"
    assert all(group.finished for group in begun) and not scheduler.has_begun
    for i, name in enumerate("ab"):
        assert tokens[name] == expected(list(range(100 * i, 100 * i + 8)), 24)
    assert scheduler.waiting_count == 12 and scheduler.pool.used_count == 0
    scheduler.draining = False
    plan = scheduler.schedule()
    assert plan is not None and len(plan.admissions) > 1


# The engine's side.


@asynccontextmanager
async def raw_engine(
    model: Model,
) -> AsyncIterator[tuple[EngineService, engine_pb2_grpc.EngineServiceStub]]:
    engine, worker = Engine(model, SIZES, check=True), Worker()
    worker.start()
    service = EngineService(engine, worker, None, engine_id="raw", times=ServiceTimes())
    server = wire.server()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(service, server)
    port = wire.listen(server, "127.0.0.1:0", None)
    await server.start()
    try:
        async with wire.channel(f"127.0.0.1:{port}") as channel:
            yield service, engine_pb2_grpc.EngineServiceStub(channel)
    finally:
        await service.stop()
        await server.stop(0)
        worker.stop()


async def claim(
    stub: engine_pb2_grpc.EngineServiceStub, **fields: object
) -> grpc.aio.StreamStreamCall:
    call = stub.Lead()
    message = engine_pb2.Claim(leader_address="test", **fields)  # type: ignore[arg-type]
    await call.write(engine_pb2.LeadRequest(claim=message))
    for _ in range((await call.read()).granted.snapshot_part_count):
        await call.read()
    return call


async def stopping(call: grpc.aio.StreamStreamCall) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    (info,) = wire.error_details(error.value)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert info.reason == "ENGINE_STOPPING"  # type: ignore[attr-defined]


def test_an_engine_drains_until_its_leader_says_so(llama: Model) -> None:
    async def main() -> None:
        async with raw_engine(llama) as (service, stub):
            call = await claim(stub, takes_draining=True)
            draining = asyncio.create_task(service.drain(20))
            assert (await call.read()).WhichOneof("message") == "draining"
            await asyncio.sleep(0.1)
            # Nothing is resident, but a plan may be on its way.
            assert not draining.done()
            await call.write(engine_pb2.LeadRequest(plan=engine_pb2.StepPlan(epoch=1, step=1)))
            assert (await call.read()).WhichOneof("message") == "result"
            await call.write(engine_pb2.LeadRequest(drained=engine_pb2.Drained()))
            await draining
            await stopping(call)
            late = stub.Lead()
            await late.write(engine_pb2.LeadRequest(claim=engine_pb2.Claim()))
            await stopping(late)

    asyncio.run(main())


def test_the_next_leader_is_told_and_one_that_does_not_know_is_not(llama: Model) -> None:
    async def main() -> None:
        async with raw_engine(llama) as (service, stub):
            old = await claim(stub)
            draining = asyncio.create_task(service.drain(20))
            # It cannot say what it has on its way: what counts is what is resident.
            await draining
            await stopping(old)
        async with raw_engine(llama) as (service, stub):
            first = await claim(stub, takes_draining=True)
            draining = asyncio.create_task(service.drain(20))
            assert (await first.read()).WhichOneof("message") == "draining"
            # With somebody resident it waits for another leader, whose work that is then.
            plan = first_plan(1)
            await first.write(engine_pb2.LeadRequest(plan=plan))
            assert (await first.read()).WhichOneof("message") == "result"
            first.cancel()
            second, granted = await heir_of(stub)
            await second.snapshot(granted)
            await asyncio.sleep(0.1)
            assert not draining.done()
            await second.step(engine_pb2.StepPlan(epoch=2, step=1, released_slots=ints(0)))
            await draining

    asyncio.run(main())


def test_the_drain_time_bounds_it(llama: Model) -> None:
    async def main() -> None:
        async with raw_engine(llama) as (service, stub):
            call = await claim(stub, takes_draining=True)
            began = time.monotonic()
            await service.drain(0.3)
            assert 0.29 <= time.monotonic() - began < 2
            assert (await call.read()).WhichOneof("message") == "draining"
            await stopping(call)

    asyncio.run(main())


# One replica and its engines.


def leaders_of(stack: Stack) -> list[EngineLeader]:
    return stack.replica.router.leaders


def test_an_operator_drains_an_engine_and_uses_it_again(llama: Model) -> None:
    """What runs ends there; what waits, and what is new, goes to the other engine, or waits."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            ports = []
            for index in range(2):
                _, port = await stack.enter_async_context(
                    running_engine(Engine(llama, SIZES, check=True), None, engine_id=f"e{index}")
                )
                ports.append(port)
            replica = await stack.enter_async_context(running_replica(ports))
            await led(replica)
            both = Stack(None, None, replica)  # type: ignore[arg-type]
            first, second = leaders_of(both)
            # Both are full, and one waits at each.
            running = [
                asyncio.create_task(both.generate(long_request(f"r{i}", 500))) for i in range(10)
            ]
            for leader in (first, second):
                scheduler = leader.scheduler
                assert scheduler is not None
                await until(lambda: scheduler.running_count == 4 and scheduler.waiting_count == 1)  # noqa: B023
            first.drain()
            assert first.draining and not second.draining
            assert first.scheduler is not None and second.scheduler is not None
            assert (first.scheduler.waiting_count, second.scheduler.waiting_count) == (0, 2)
            answer = await both.generate(request([30, 31], 4))
            assert answer.accepted.engine_id == "e1"
            answers = await asyncio.gather(*running)
            assert {len(answer.ids) for answer in answers} == {500}
            assert sum(answer.accepted.engine_id == "e0" for answer in answers) == 4
            assert first.state is leading.LeaderState.LED and first.epoch == 1
            second.drain()
            waiting = asyncio.create_task(both.generate(request([40, 41], 4)))
            await asyncio.sleep(0.3)
            assert not waiting.done() and len(replica.generations.all_running()) == 1
            first.undrain()
            assert (await waiting).accepted.engine_id in ("e0", "e1")
            assert not first.draining and second.draining
            await both.channel.close()
            await both.admin_channel.close()

    asyncio.run(main())


def test_what_waits_moves_once_another_engine_is_there(llama: Model) -> None:
    async def main() -> None:
        port = free_port()
        async with AsyncExitStack() as stack:
            _, other = await stack.enter_async_context(
                running_engine(Engine(llama, SIZES, check=True), None, engine_id="e0")
            )
            replica = await stack.enter_async_context(running_replica([other, port]))
            await until(lambda: replica.router.leaders[0].loop is not None)
            alone = Stack(None, None, replica)  # type: ignore[arg-type]
            replica.router.leaders[0].drain()
            waiting = asyncio.create_task(alone.generate(request([40, 41], 4)))
            await run_until(waiting, lambda: len(replica.generations.all_running()) == 1)
            await stack.enter_async_context(
                running_engine(
                    Engine(llama, SIZES, check=True), None, f"127.0.0.1:{port}", engine_id="e1"
                )
            )
            assert (await waiting).accepted.engine_id == "e1"
            await alone.channel.close()
            await alone.admin_channel.close()

    asyncio.run(main())


def test_what_waits_moves_to_an_engine_that_another_replica_leads(llama: Model) -> None:
    async def main() -> None:
        ports = [free_port(), free_port()]
        async with AsyncExitStack() as stack:

            async def start(index: int) -> None:
                address, engine = f"127.0.0.1:{ports[index]}", Engine(llama, SIZES, check=True)
                await stack.enter_async_context(
                    running_engine(engine, None, address, engine_id=f"e{index}")
                )

            await start(0)
            first = await stack.enter_async_context(own_port(ports))
            await until(lambda: first.router.leaders[0].loop is not None)
            first.router.leaders[1].reluctant = True
            await asyncio.sleep(0.2)
            second = await stack.enter_async_context(own_port(ports))
            await start(1)
            await until(lambda: second.router.leaders[1].loop is not None)
            await until(lambda: first.relay.reaches_a_leader and second.relay.reaches_a_leader)
            clients = Stack(None, None, first)  # type: ignore[arg-type]
            calls = [
                asyncio.create_task(clients.generate(long_request(f"r{i}", 600))) for i in range(6)
            ]
            scheduler = first.router.leaders[0].scheduler
            assert scheduler is not None
            await until(lambda: scheduler.running_count == 4 and scheduler.waiting_count == 2)
            first.router.leaders[0].drain()
            assert scheduler.waiting_count == 0
            answer = await clients.generate(request([40, 41], 4))
            assert answer.accepted.engine_id == "e1"
            answers = await asyncio.gather(*calls)
            assert [len(answer.ids) for answer in answers] == [600] * 6
            used = [answer.accepted.engine_id for answer in answers]
            assert sorted(used) == ["e0"] * 4 + ["e1"] * 2
            await clients.channel.close()
            await clients.admin_channel.close()

    asyncio.run(main())


def test_a_queue_for_an_engine_that_is_away_has_its_limits(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests and of time; and whoever hangs up is out of it."""
    monkeypatch.setattr(leading, "REPLACED_SECONDS", 3.0)

    async def main() -> None:
        port = free_port()
        async with running_replica([port], max_waiting_requests=2) as replica:
            stack = Stack(None, None, replica)  # type: ignore[arg-type]
            (leader,) = replica.router.leaders
            async with running_engine(Engine(llama, SIZES), None, f"127.0.0.1:{port}"):
                await led(replica)
                leader.drain()
            await until(lambda: leader.state is leading.LeaderState.CONNECTING)
            assert leader.draining and leader.loop is not None
            running = replica.generations.all_running
            calls = [asyncio.create_task(stack.generate(request([30, i], 4))) for i in range(2)]
            await until(lambda: len(running()) == 2)
            error = await failure(stack.generate(request([33], 4)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            calls[0].cancel()
            await until(lambda: len(running()) == 1)
            error = await failure(calls[1])
            assert error.code() is grpc.StatusCode.UNAVAILABLE and not running()
            error = await failure(stack.generate(request([33], 4)))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            await stack.channel.close()
            await stack.admin_channel.close()

    asyncio.run(main())


def test_a_replica_that_drains_takes_what_others_pass_on(llama: Model) -> None:
    """Their clients are not its own; when it goes they go on at the next leader."""

    async def main() -> None:
        async with running_pair(llama, drain_seconds=60) as pair:
            leader, follower = pair.leader, pair.follower
            expected = await leader.generate(long_request("calm", 800))
            prefill = leader.engine.counters.prefill_token_count
            running = [
                asyncio.create_task(follower.generate(long_request(f"r{i}", 800, priority=i)))
                for i in range(3)
            ]
            own = asyncio.create_task(leader.generate(long_request("own", 500)))
            await until(lambda: leader.loop.scheduler.running_count == 4)
            scheduler = leader.loop.scheduler
            stopping = asyncio.create_task(leader.replica.stop())
            await asyncio.sleep(0.2)
            error = await failure(leader.generate(request([30], 4)))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "draining" in str(error.details())
            new = follower.generate(request(list(range(100, 140)), 4))
            assert len((await new).ids) == 4 and scheduler.totals.prompt_tokens == 40 * 6
            await stopping
            assert (await own).ids == expected.ids[:500]
            answers = await asyncio.gather(*running)
            assert [answer.ids for answer in answers] == [expected.ids] * 3
            # Their prompt was in the cache all but its last token.
            computed = leader.engine.counters.prefill_token_count - prefill
            assert computed <= 4 * 16 + 40
            assert follower.replica.router.leaders[0].epoch == 2
            await follower.idle()

    asyncio.run(main())


# Real processes.


async def health_of(port: int) -> int:
    async with wire.channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        return int(answer.status)


def test_a_rolling_restart_of_the_engine_fails_no_request(
    llama_directory: Path, tmp_path: Path
) -> None:
    """Calls come all the while, through the leader and a follower; none is computed twice."""
    port = free_port()
    flags = ("--model", str(llama_directory), "--max-slots", "8", "--engine-id", "rolled")
    flags += ("--drain-seconds", "30")

    async def run(engine: Process, leader: Process, follower: Process) -> None:
        load, over = Load(leader.port, follower.port), asyncio.Event()
        clients = [asyncio.create_task(load.loop(over)) for _ in range(12)]
        computed = 0
        for number in range(2):
            count = len(load.answers)
            await until(lambda: len(load.answers) > count + 20, 60)  # noqa: B023
            engine.signal(signal.SIGTERM)
            while await health_of(port) == health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.01)
            # Nothing new begins from here on, so this is about all that it computes.
            await asyncio.sleep(0.1)
            computed += await prefilled(engine)
            assert await asyncio.to_thread(engine.wait, 60) == 0
            assert await health_of(leader.port) == health_pb2.HealthCheckResponse.SERVING
            engine = data_plane(tmp_path / f"engine-{number}.log", *flags, port=port)
            engines.append(engine)
            await asyncio.to_thread(engine.ready)
        count = len(load.answers)
        await until(lambda: len(load.answers) > count + 20, 60)
        over.set()
        await asyncio.gather(*clients)
        assert computed + await prefilled(engine) == load.prompt_tokens
        assert "died" not in leader.log() + follower.log()
        await load.check(leader.port)
        await load.close()

    engines: list[Process] = []
    try:
        with (
            data_plane(tmp_path / "engine.log", *flags, port=port) as engine,
            control_plane(tmp_path / "leader.log", [port]) as leader,
        ):
            engine.ready()
            leader.ready()
            with control_plane(tmp_path / "follower.log", [port]) as follower:
                follower.ready()
                asyncio.run(run(engine, leader, follower))
    finally:
        for process in engines:
            process.__exit__()


def test_what_outlasts_the_drain_goes_on_with_the_next_engine(
    llama_directory: Path, tmp_path: Path
) -> None:
    """Twice, which is no death of its engine: those are counted, and the second one is the end."""
    port = free_port()
    flags = ("--model", str(llama_directory), "--drain-seconds", "0.3")

    async def run(engine: Process, control: Process) -> None:
        load = Load(control.port)
        # Enough of them to keep the engine busy for longer than it takes to end it twice.
        calls = []
        for _ in range(4):
            calls.append(asyncio.create_task(load.call(load.message(900, samples=16))))
            await asyncio.sleep(0)
        answers = load.answers.values()
        for number in range(2):
            seen = sum(len(answer.ids) for answer in answers)
            await run_until(calls[0], lambda: sum(len(a.ids) for a in answers) > seen + 99)  # noqa: B023
            engine.signal(signal.SIGTERM)
            assert await asyncio.to_thread(engine.wait, 60) == 0
            engine = data_plane(tmp_path / f"engine-{number}.log", *flags, port=port)
            engines.append(engine)
            await asyncio.to_thread(engine.ready)
        for answer in await asyncio.gather(*calls):
            reasons = {finished.reason for finished in answer.finished.values()}
            assert reasons == {pb.FINISH_REASON_LENGTH}
            assert [len(tokens) for tokens in answer.tokens.values()] == [900] * 16
        await load.check(control.port, most_unlike=2)
        await load.close()

    engines: list[Process] = []
    try:
        with (
            data_plane(tmp_path / "engine.log", *flags, port=port) as engine,
            control_plane(tmp_path / "control.log", [port]) as control,
        ):
            engine.ready()
            control.ready()
            asyncio.run(run(engine, control))
    finally:
        for process in engines:
            process.__exit__()
