"""An event loop without time: its clock jumps to the next timer, so that nothing waits or races.

Callbacks run in the order in which they became due, whatever the machine does meanwhile; a run of
coroutines that draw on nothing but this loop and a seeded generator replays exactly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Modules that read the clock themselves, beside what the event loop does for them.
_CLOCK_READERS = ("control_plane.leader", "control_plane.step_loop")


class Stuck(AssertionError):
    """Everybody waits and no timer is set: nothing can ever happen again."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Its own selector: there are no sockets here, so to wait is to move the clock."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = self
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("every task waits and no timer is set")
        self._now += max(timeout, 0.0)
        return []

    def _process_events(self, events: list[Any]) -> None:
        assert not events


@contextmanager
def simulated_time() -> Iterator[SimulatedLoop]:
    """A fresh loop, whose clock is also the one that the control plane's modules read."""
    loop = SimulatedLoop()
    clock = SimpleNamespace(monotonic=loop.time)
    patches = [mock.patch(f"{module}.time", clock) for module in _CLOCK_READERS]
    for patch in patches:
        patch.start()
    try:
        yield loop
    finally:
        for patch in patches:
            patch.stop()
        loop.close()
