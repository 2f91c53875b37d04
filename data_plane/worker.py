"""The one thread that executes plans, in order, while the event loop goes on."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from data_plane.plan import PlanError

T = TypeVar("T")


class Worker:
    """Runs jobs one after the other.

    Attributes:
        failed: the error that ended the worker, if one did. The device's state is unknown then, so
            the process must go.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="engine-worker", daemon=True)
        self.failed: BaseException | None = None
        self._busy_since: float | None = None

    @property
    def stuck_seconds(self) -> float:
        """How long the present job has been running; 0 when idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Lets the jobs that are queued finish."""
        self._jobs.put(None)
        self._thread.join()

    async def call(self, function: Callable[[], T]) -> T:
        """Runs any function on the engine's thread."""
        return await asyncio.wrap_future(self.submit(function))

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Queues any function for the worker's thread."""
        future: Future[T] = Future()
        self._jobs.put((function, future))
        return future

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future = job
            if not future.set_running_or_notify_cancel():
                continue
            self._busy_since = time.monotonic()
            try:
                future.set_result(function())
            except PlanError as error:
                future.set_exception(error)
            except BaseException as error:
                self.failed = error
                future.set_exception(error)
                return
            finally:
                self._busy_since = None
