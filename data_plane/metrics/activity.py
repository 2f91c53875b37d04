"""One line in the log every few seconds while steps are done: what an engine does."""

from __future__ import annotations

import asyncio
import logging
import time

from data_plane.engine import Engine

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0


class Activity:
    """What was done since the last line, and how things are."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last, self._at = self._sums(), time.monotonic()

    async def report(self) -> None:
        """Writes lines until cancelled; none while there are no steps."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            self.line()

    def line(self) -> None:
        sums, now = self._sums(), time.monotonic()
        seconds = max(now - self._at, 1e-3)
        steps, prefill, decode = (
            (after - before) / seconds for after, before in zip(sums, self._last, strict=True)
        )
        self._last, self._at = sums, now
        if not steps:
            return
        state = self._engine.state
        resident, _ = state.resident_counts()
        used, blocks = state.block_counts()[2], state.block_count
        fields = {
            "steps_per_second": round(steps, 1),
            "prefill_tokens_per_second": round(prefill, 1),
            "decode_tokens_per_second": round(decode, 1),
            "resident": resident,
            "used_blocks": used,
            "blocks": blocks,
        }
        log.info(
            "%.1f steps/s, %.0f prefill and %.0f decode tokens/s; %d sequences resident; "
            "%d of %d blocks used",
            steps, prefill, decode, resident, used, blocks, extra=fields,
        )  # fmt: skip

    def _sums(self) -> tuple[int, int, int]:
        counters = self._engine.counters
        return (
            counters.step_count,
            counters.prefill_token_count,
            counters.decode_token_count,
        )
