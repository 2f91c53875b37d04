"""Generations that another replica passed on and does not read any more: kept for a while.

When a stream between replicas breaks, its client may come back by another replica. A relay whose
client has gone says so, and the generation ends at once.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

from control_plane.generation import Generation


class Orphans:
    """Those of one replica.

    Args:
        grace_seconds: how long readers have to come back.
        abandon: ends a generation that nobody reads.
    """

    def __init__(self, grace_seconds: float, abandon: Callable[[Generation], None]) -> None:
        self._grace_seconds, self._abandon = grace_seconds, abandon
        self._timers: dict[Generation, asyncio.TimerHandle] = {}
        self._given_up: weakref.WeakSet[Generation] = weakref.WeakSet()

    def found(self, generation: Generation) -> None:
        """Somebody reads it, for the first time or again."""
        self._given_up.discard(generation)
        self._forget(generation)

    def left(self, generation: Generation) -> None:
        """The last of its readers has gone, a relay."""
        # What no engine has taken yet has nothing that could be lost.
        if generation in self._given_up or not generation.accepted:
            self._abandon(generation)
            return
        self._forget(generation)
        loop = asyncio.get_running_loop()
        self._timers[generation] = loop.call_later(self._grace_seconds, self._end, generation)

    def give_up(self, generation: Generation) -> None:
        """A relay says that its client has gone; it may say so before its stream has ended."""
        if generation.subscriber_count:
            self._given_up.add(generation)
        else:
            self._end(generation)

    def _end(self, generation: Generation) -> None:
        self._forget(generation)
        if generation.subscriber_count == 0:
            self._abandon(generation)

    def _forget(self, generation: Generation) -> None:
        timer = self._timers.pop(generation, None)
        if timer is not None:
            timer.cancel()
