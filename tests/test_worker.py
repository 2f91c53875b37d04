"""The worker's threads: what runs in which order, what is waited for where, and how it ends."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from data_plane.plan import PlanError
from data_plane.worker import Worker


class Step:
    """A device's work of which a test decides when it is done."""

    def __init__(self, name: str, log: list[str], error: Exception | None = None) -> None:
        self.name, self.log, self.error = name, log, error
        self.reached = threading.Event()
        self.done = False

    def begin(self) -> Step:
        self.log.append(f"begin {self.name}")
        return self

    def wait(self) -> None:
        assert threading.current_thread().name == "engine-results"
        self.reached.wait()
        if self.error is not None:
            raise self.error

    def finish(self) -> str:
        assert threading.current_thread().name == "engine-worker"
        self.log.append(f"finish {self.name}")
        return self.name


@pytest.fixture
def worker() -> Worker:
    worker = Worker()
    worker.start()
    return worker


async def _until(condition) -> None:  # type: ignore[no-untyped-def]
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it does not come")


def test_the_next_step_begins_while_the_device_is_at_the_last(worker: Worker) -> None:
    async def run() -> None:
        log: list[str] = []
        steps = [Step(name, log) for name in "abc"]
        calls = [asyncio.create_task(worker.call_device(step.begin)) for step in steps]
        await _until(lambda: len(log) == 3)
        assert log == ["begin a", "begin b", "begin c"]
        for step in reversed(steps):
            step.reached.set()
        assert await asyncio.gather(*calls) == ["a", "b", "c"]
        assert log[3:] == ["finish a", "finish b", "finish c"]
        assert worker.stop(5)

    asyncio.run(run())


def test_other_jobs_run_between_the_parts_of_one(worker: Worker) -> None:
    async def run() -> None:
        log: list[str] = []
        step = Step("a", log)
        call = asyncio.create_task(worker.call_device(step.begin))
        await _until(lambda: log == ["begin a"])
        assert await worker.call(lambda: "beside") == "beside"
        step.reached.set()
        assert await call == "a"

    asyncio.run(run())


def test_stopping_lets_what_was_begun_finish(worker: Worker) -> None:
    async def run() -> None:
        log: list[str] = []
        step = Step("a", log)
        call = asyncio.create_task(worker.call_device(step.begin))
        await _until(lambda: log == ["begin a"])
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop, 5))
        await asyncio.sleep(0.02)
        assert not stopping.done()
        step.reached.set()
        assert await stopping
        assert await call == "a"

    asyncio.run(run())


def test_stopping_tells_of_a_job_that_does_not_end(worker: Worker) -> None:
    hold = threading.Event()
    held = worker.submit(hold.wait)
    assert not worker.stop(0.01)
    hold.set()
    assert worker.stop(5) and held.result()


def test_a_refused_plan_does_not_end_the_worker(worker: Worker) -> None:
    async def run() -> None:
        def refuse() -> Step:
            raise PlanError("DRIFT", "it does not fit")

        with pytest.raises(PlanError):
            await worker.call_device(refuse)
        assert await worker.call(lambda: 5) == 5 and worker.failed is None

    asyncio.run(run())


def test_an_error_of_the_device_ends_the_worker(worker: Worker) -> None:
    async def run() -> None:
        step = Step("a", [], RuntimeError("device lost"))
        step.reached.set()
        with pytest.raises(RuntimeError, match="device lost"):
            await worker.call_device(step.begin)
        assert isinstance(worker.failed, RuntimeError)
        await _until(lambda: not worker._thread.is_alive())

    asyncio.run(run())


def test_it_is_stuck_while_the_device_is(worker: Worker) -> None:
    async def run() -> None:
        log: list[str] = []
        step = Step("a", log)
        assert worker.stuck_seconds == 0
        call = asyncio.create_task(worker.call_device(step.begin))
        began = time.monotonic()
        await _until(lambda: worker.stuck_seconds > 0.05)
        assert worker.stuck_seconds <= time.monotonic() - began + 0.01
        step.reached.set()
        await call
        await _until(lambda: worker.stuck_seconds == 0)

    asyncio.run(run())


def test_results_go_before_steps_that_are_still_to_begin(worker: Worker) -> None:
    async def run() -> None:
        log: list[str] = []
        first = Step("first", log)
        call = asyncio.create_task(worker.call_device(first.begin))
        await _until(lambda: log == ["begin first"])
        hold = threading.Event()
        held = worker.submit(hold.wait)
        later = [worker.submit(lambda: log.append("later")) for _ in range(3)]
        first.reached.set()
        await asyncio.sleep(0.05)
        hold.set()
        assert await call == "first" and held.result()
        for future in later:
            future.result()
        assert log == ["begin first", "finish first", "later", "later", "later"]

    asyncio.run(run())


def test_what_is_done_at_once_is_finished_at_once(worker: Worker) -> None:
    async def run() -> None:
        log: list[str] = []
        steps = [Step(name, log) for name in "ab"]
        for step in steps:
            step.done = True
        calls = [asyncio.create_task(worker.call_device(step.begin)) for step in steps]
        assert await asyncio.gather(*calls) == ["a", "b"]
        assert log == ["begin a", "finish a", "begin b", "finish b"]

    asyncio.run(run())
