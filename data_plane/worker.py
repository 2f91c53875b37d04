"""The thread that executes plans, in order, while the event loop goes on; and one that waits."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from data_plane.plan import PlanError

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


class Begun(Protocol[Result]):
    """A job whose end the device decides."""

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for."""
        ...

    def wait(self) -> None:
        """Returns when the device is done; on a thread of its own."""
        ...

    def finish(self) -> Result:
        """Does what is left, and does not wait for anything."""
        ...


@dataclass(slots=True)
class _Busy:
    """Since when one of the threads is at its present job; None while it has nothing to do."""

    since: float | None = None

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since = None

    @property
    def seconds(self) -> float:
        since = self.since
        return 0.0 if since is None else time.monotonic() - since


@dataclass(slots=True)
class _Job:
    """What is to be run on the worker's thread; `begun`: its result is only the beginning."""

    run: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    begins: bool = False


class _Jobs:
    """What the worker's thread is to do next: what is ready to be finished, then what came first.

    Finishing takes little, and somebody waits for the result.
    """

    def __init__(self) -> None:
        self._items: deque[_Job | None] = deque()
        self._finishing = 0
        self._some = threading.Condition()

    def put(self, job: _Job | None) -> None:
        with self._some:
            self._items.append(job)
            self._some.notify()

    def put_first(self, job: _Job) -> None:
        """Goes before all but those that were put first earlier."""
        with self._some:
            self._items.insert(self._finishing, job)
            self._finishing += 1
            self._some.notify()

    def get(self) -> _Job | None:
        with self._some:
            self._some.wait_for(lambda: self._items)
            self._finishing = max(self._finishing - 1, 0)
            return self._items.popleft()


class Worker:
    """Runs jobs one after the other.

    A job that a device goes on with is begun on the worker's thread, waited for on another, and
    finished on the worker's again. So the next one is begun while the device is still at the last.

    Attributes:
        failed: the error that ended the worker, if one did. The device's state is unknown then, so
            the process must go.
    """

    def __init__(self) -> None:
        self._jobs = _Jobs()
        self._begun: queue.SimpleQueue[tuple[Begun[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-worker", daemon=True)
        self._waiter = threading.Thread(target=self._wait, name="engine-results", daemon=True)
        self.failed: BaseException | None = None
        self._running, self._waiting = _Busy(), _Busy()

    @property
    def stuck_seconds(self) -> float:
        """How long the present job has been running, or been waited for; 0 when idle."""
        return max(self._running.seconds, self._waiting.seconds)

    def start(self) -> None:
        self._thread.start()
        self._waiter.start()

    def stop(self, seconds: float | None = None) -> bool:
        """Lets the jobs that are queued run, and those that are begun finish, for some time.

        Returns whether its threads have ended.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        self._jobs.put(_Job(lambda: self._begun.put(None)))
        for thread in (self._waiter, self._thread):
            thread.join(None if deadline is None else max(deadline - time.monotonic(), 0))
        return not (self._waiter.is_alive() or self._thread.is_alive())

    async def call(self, function: Callable[[], T]) -> T:
        """Runs any function on the engine's thread."""
        return await asyncio.wrap_future(self.submit(function))

    async def call_device(self, begin: Callable[[], Begun[T]]) -> T:
        """Begins a job on the engine's thread, and finishes it when the device is done."""
        return await asyncio.wrap_future(self.submit_device(begin))

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Queues any function for the worker's thread."""
        job = _Job(function)
        self._jobs.put(job)
        return job.future

    def submit_device(self, begin: Callable[[], Begun[T]]) -> Future[T]:
        """Queues a job that a device goes on with."""
        job = _Job(begin, begins=True)
        self._jobs.put(job)
        return job.future

    def _run(self) -> None:
        while self.failed is None and (job := self._jobs.get()) is not None:
            # A job that is to be finished is running already.
            if not job.future.running() and not job.future.set_running_or_notify_cancel():
                continue
            with self._running:
                self._attempt(job)

    def _attempt(self, job: _Job) -> None:
        try:
            result = job.run()
        except PlanError as error:
            job.future.set_exception(error)
        except BaseException as error:
            self.failed = error
            job.future.set_exception(error)
        else:
            if not job.begins:
                job.future.set_result(result)
            elif result.done:
                self._attempt(_Job(result.finish, job.future))
            else:
                self._begun.put((result, job.future))

    def _wait(self) -> None:
        while (begun := self._begun.get()) is not None:
            job, future = begun
            try:
                with self._waiting:
                    job.wait()
            except BaseException as error:
                self.failed = error
                future.set_exception(error)
                break
            self._jobs.put_first(_Job(job.finish, future))
        self._jobs.put(None)
