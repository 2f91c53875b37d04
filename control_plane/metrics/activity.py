"""One line in the log every few seconds while there is something to do: what a replica does."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from control_plane.metrics.counters import Counters
from control_plane.metrics.families import led, requests, used_blocks

if TYPE_CHECKING:
    from control_plane.router import Router

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0


class Activity:
    """What was done since the last line, and how things are."""

    def __init__(self, counters: Counters, router: Router) -> None:
        self._counters, self._router = counters, router
        self._last, self._at = self._sums(), time.monotonic()

    async def report(self) -> None:
        """Writes lines until cancelled; none while nothing waits, runs or has run."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            self.line()

    def line(self) -> None:
        sums, now = self._sums(), time.monotonic()
        gained = [after - before for after, before in zip(sums, self._last, strict=True)]
        prompt, output, hits, preemptions = gained
        seconds, self._last, self._at = max(now - self._at, 1e-3), sums, now
        loops = led(self._router)
        running = sum(requests(loop)["running"] for loop in loops)
        waiting = sum(requests(loop)["waiting"] for loop in loops)
        if not (running or waiting or any(gained)):
            return
        used = sum(map(used_blocks, loops))
        blocks = sum(loop.facts.block_count for loop in loops)
        fields = {
            "running": running,
            "waiting": waiting,
            "prompt_tokens_per_second": round(prompt / seconds, 1),
            "output_tokens_per_second": round(output / seconds, 1),
            "prefix_hit_ratio": round(hits / prompt, 3) if prompt else 0.0,
            "used_blocks": used,
            "blocks": blocks,
            "preemptions": preemptions,
        }
        log.info(
            "%d requests run, %d wait; %.0f prompt and %.0f output tokens/s; "
            "%.0f %% prefix hits; %d of %d blocks used; %d preemptions",
            running, waiting, prompt / seconds, output / seconds,
            100 * hits / max(prompt, 1), used, blocks, preemptions, extra=fields,
        )  # fmt: skip

    def _sums(self) -> tuple[int, int, int, int]:
        """Prompt tokens, output tokens, hits and preemptions of all engines, so far."""
        counters = self._counters.engines.values()
        return (
            sum(each.prompt_tokens for each in counters),
            sum(each.output_tokens for each in counters),
            sum(each.hit_tokens for each in counters),
            sum(each.totals.preemptions for each in counters),
        )
