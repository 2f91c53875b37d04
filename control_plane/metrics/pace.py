"""How long the sequences of an engine wait from one token to the next. Pure.

A step costs a few vector operations over its slots, and nothing for each sequence that decodes.
"""

from __future__ import annotations

import numpy as np

from control_plane.metrics.histogram import Float64Array, Histogram
from control_plane.plan import Outcome, Plan
from control_plane.request import Sequence, SequenceGroup


class Pace:
    """When each slot's sequence had its last token; NaN where that is not known."""

    def __init__(self, slot_count: int) -> None:
        self._last: Float64Array = np.full(slot_count, np.nan)
        # Of sequences that have no slot, because they are computed again.
        self._left: dict[Sequence, float] = {}

    def begin(self, plan: Plan) -> None:
        """Takes a plan that was sent, after all results from before it was made.

        Slots change their occupants with it.
        """
        for sequence, slot in plan.taken_off:
            if sequence.finish is None and not np.isnan(last := float(self._last[slot])):
                self._left[sequence] = last
        if taken := [*(admission.slot for admission in plan.admissions), *plan.fork_children]:
            self._last[taken] = np.nan

    def step(self, outcome: Outcome, now: float, gaps: Histogram) -> list[Sequence]:
        """Adds the times between tokens to `gaps`; returns whose prompt has just been computed."""
        slots, decodes = outcome.slots, outcome.decode_count
        if decodes:
            gaps.observe_all(now - self._last[slots[:decodes]])
        self._last[slots] = now
        first = []
        for sequence in outcome.sequences[decodes:]:
            if (left := self._left.pop(sequence, None)) is None:
                first.append(sequence)
            else:
                gaps.observe(now - left)
        return first

    def forget(self, group: SequenceGroup) -> None:
        for sequence in group.sequences if self._left else ():
            self._left.pop(sequence, None)
