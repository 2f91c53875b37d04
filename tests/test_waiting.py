"""How long a request waits for an engine: refused in time, whatever the engine does meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import timedelta

import grpc
import pytest
from google.rpc import error_details_pb2

from control_plane.server import Replica
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from data_plane.worker import Worker
from protos import wire
from protos.inference.v1 import inference_pb2 as pb
from tests.stack import (
    Answer,
    Stack,
    failure,
    led,
    request,
    running_engine,
    running_replica,
    running_stack,
)

SIZES = EngineSizes(16, 256, 0, 1, 256, 1024)


def long_request(
    name: str, max_tokens: int = 400, start: int = 20, **fields: object
) -> pb.GenerateRequest:
    message = request(list(range(start, start + 40)), max_tokens, request_id=name, **fields)
    message.stopping.ignore_eos = True
    return message


def short_request(name: str, seconds: float | None = None) -> pb.GenerateRequest:
    """Waits so long at most, or as long as the service lets it."""
    limit = None if seconds is None else timedelta(seconds=seconds)
    return request([30, 31, 32], 4, request_id=name, max_waiting_time=limit)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.002)


@contextmanager
def held(worker: Worker) -> Iterator[None]:
    """The engine stands still; its leader hears nothing of it and keeps it with heartbeats."""
    gate = threading.Event()
    worker.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()


@asynccontextmanager
async def leading(*ports: int) -> AsyncIterator[Stack]:
    """A replica whose engines come and go by themselves."""
    async with running_replica(list(ports)) as replica:
        await led(replica)
        stack = Stack(None, None, replica)  # type: ignore[arg-type]
        try:
            yield stack
        finally:
            await stack.channel.close()
            await stack.admin_channel.close()


async def occupy(stack: Stack, message: pb.GenerateRequest) -> asyncio.Task[Answer]:
    """Begins a request and waits until the engine runs it."""
    running = asyncio.create_task(stack.generate(message))
    await until(lambda: stack.loop.scheduler.running_count > 0)
    return running


async def refusal(call: object, seconds: float) -> grpc.aio.AioRpcError:
    """Awaits a refusal for waiting, which comes after `seconds` and not much later."""
    began = time.monotonic()
    error = await failure(call)
    elapsed = time.monotonic() - began
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
    assert seconds - 0.01 <= elapsed < seconds + 1.0
    return error


def retry_seconds(error: grpc.aio.AioRpcError) -> float:
    *_, retry = wire.error_details(error)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    return retry.retry_delay.ToTimedelta().total_seconds()


@pytest.mark.parametrize(("own", "service"), [(0.3, 0.0), (None, 0.3), (0.3, 60.0), (60.0, 0.3)])
def test_whoever_waits_too_long_is_refused_and_nobody_else(
    llama: Model, own: float | None, service: float
) -> None:
    # Sixteen samples of 300 tokens take longer than any limit that is short to wait for.
    long = long_request("long", 300, output=pb.Output(sample_count=16))

    async def main() -> None:
        async with running_stack(
            llama, block_count=1024, slot_count=16, max_waiting_seconds=service
        ) as stack:
            running = await occupy(stack, long)
            patient = asyncio.create_task(stack.generate(short_request("patient", 60)))
            error = await refusal(stack.generate(short_request("late", own)), 0.3)
            assert "waited 0.3" in str(error.details())
            assert str(error.details()).endswith("at most 0.3 s are allowed")
            info, _ = wire.error_details(error)
            assert isinstance(info, error_details_pb2.ErrorInfo)
            assert (info.reason, info.domain) == ("WAITED_TOO_LONG", wire.ERROR_DOMAIN)
            assert retry_seconds(error) > 0
            groups = stack.loop.scheduler.groups
            assert "late" not in [group.request.request_id for group in groups]
            assert stack.replica.generations.running(("", "late")) is None
            if service == 0.3:
                await refusal(patient, 0.0)
                assert stack.loop.scheduler.groups == groups[:1]
            else:
                assert len((await patient).ids) == 4
            count = stack.replica.metrics.registry.get_sample_value("quire_requests_expired_total")
            assert count == (2 if service == 0.3 else 1)
            assert [len((await running).tokens[index]) for index in range(16)] == [300] * 16
            # The id is free again.
            assert len((await stack.generate(short_request("late", own))).ids) == 4
            await stack.idle()

    asyncio.run(main())


def test_time_passes_while_the_engine_stands_still(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama, slot_count=1) as stack:
            expected = await stack.generate(long_request("calm"))
            running = await occupy(stack, long_request("running"))
            with held(stack.worker):
                # The loop waits for results by now, with nothing to do before its next heartbeat.
                await until(lambda: stack.loop.scheduler.steps_in_flight == 2)
                limit = timedelta(seconds=0.2)
                late = request([20] * 400, 4, max_waiting_time=limit)
                error = await refusal(stack.generate(late), 0.2)
                assert stack.loop.scheduler.waiting_count == 0
                # Ten times what has left the queue in the last tenths of a second.
                assert retry_seconds(error) > 0.5
                both = [stack.generate(short_request("twice", 0.2)) for _ in range(2)]
                await asyncio.gather(*(refusal(call, 0.2) for call in both))
                assert stack.loop.scheduler.waiting_count == 0
            assert (await running).ids == expected.ids
            await stack.idle()

    asyncio.run(main())


def test_what_an_engine_has_taken_is_never_refused(llama: Model) -> None:
    """Two requests for which the pool is too small: the later one waits for the earlier one."""

    async def main() -> None:
        async with running_stack(
            llama, block_count=40, host_block_count=0, max_waiting_seconds=0.05
        ) as stack:
            answers = await stack.together([long_request(name, 500) for name in ("one", "two")])
            assert [len(answer.ids) for answer in answers] == [500, 500]
            assert stack.loop.scheduler.totals.preemptions > 0
            await stack.idle()

    asyncio.run(main())


def test_a_resumed_call_waits_as_long_as_it_takes(llama: Model) -> None:
    async def main() -> None:
        async with running_stack(llama, slot_count=1, max_waiting_seconds=0.2) as stack:
            whole = await stack.generate(long_request("whole", 8))
            running = await occupy(stack, long_request("running"))
            with held(stack.worker):
                message = long_request("resumed", 8, received_token_counts=[3])
                resumed = asyncio.create_task(stack.generate(message))
                await asyncio.sleep(0.5)
            assert (await resumed).ids == whole.ids[3:]
            await running
            await stack.idle()

    asyncio.run(main())


def test_the_time_goes_on_when_the_engine_is_lost(llama: Model) -> None:
    """One that waits moves with the rest to the other engine, and is refused there in time."""

    async def start(stack: AsyncExitStack, name: str) -> tuple[AsyncExitStack, Worker, int]:
        life = await stack.enter_async_context(AsyncExitStack())
        serving = running_engine(Engine(llama, SIZES, check=True), None, engine_id=name)
        worker, port = await life.enter_async_context(serving)
        return life, worker, port

    def engine_of(replica: Replica, name: str) -> str:
        generation = replica.generations.running(("", name))
        return generation.engine_id if generation else ""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            lives = {name: await start(stack, name) for name in ("one", "two")}
            ports = [port for _, _, port in lives.values()]
            both = await stack.enter_async_context(leading(*ports))
            replica = both.replica
            schedulers = [leader.scheduler for leader in replica.router.leaders]
            limit = timedelta(seconds=2.5)
            taken = []
            for index in range(2):
                message = long_request(f"taken-{index}", 600, 20 + index, max_waiting_time=limit)
                taken.append(asyncio.create_task(both.generate(message)))
                await until(lambda: sum(each.running_count for each in schedulers) > index)  # noqa: B023
            late = asyncio.create_task(
                refusal(both.generate(short_request("late", limit.total_seconds())), 2.5)
            )
            await until(lambda: engine_of(replica, "late") != "")
            lost = engine_of(replica, "late")
            (left,) = lives.keys() - {lost}
            with held(lives[left][1]):
                await lives[lost][0].aclose()
                await until(lambda: engine_of(replica, "late") == left)
                await late
                await asyncio.sleep(0.3)
            assert [len((await task).ids) for task in taken] == [600, 600]

    asyncio.run(main())


def test_the_time_goes_on_without_any_engine(llama: Model) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            serving = await stack.enter_async_context(AsyncExitStack())
            engine = running_engine(Engine(llama, SIZES, check=True), None)
            _, port = await serving.enter_async_context(engine)
            alone = await stack.enter_async_context(leading(port))
            running = await occupy(alone, long_request("running", 900))
            late = asyncio.create_task(refusal(alone.generate(short_request("late", 0.8)), 0.8))
            await until(lambda: alone.loop.scheduler.waiting_count == 1)
            await serving.aclose()
            await late
            left = alone.replica.generations.all_running()
            assert [generation.request.request_id for generation in left] == ["running"]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_only_so_many_calls_are_open_at_once(llama: Model) -> None:
    """Also of those who all read the same generation, for which no queue has a limit."""

    async def main() -> None:
        async with running_stack(llama, max_calls=2) as stack:
            calls = [stack.stub.Generate(long_request("same", 900)) for _ in range(2)]
            for call in calls:
                assert (await call.read()).HasField("accepted")
            error = await failure(stack.generate(short_request("third")))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert wire.reasons(wire.error_details(error)) == ["TOO_MANY_CALLS"]
            assert "2 calls are open at this replica" in str(error.details())
            await stack.stub.Cancel(pb.CancelRequest(request_id="same"))
            for call in calls:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert len((await stack.generate(short_request("third"))).ids) == 4

    asyncio.run(main())
