"""What an engine's steps took and moved: plain numbers that each step adds to once."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("queue", "moves", "forward", "sample")


@dataclass(slots=True)
class StepMeter:
    """Since the engine began. The worker's thread writes, others read.

    Attributes:
        phase_us: microseconds in the queue, of moves, of forward passes and of sampling.
        swapped_out, swapped_in, copied: blocks.
    """

    phase_us: tuple[int, int, int, int] = (0, 0, 0, 0)
    swapped_out: int = 0
    swapped_in: int = 0
    copied: int = 0

    def took(self, step: tuple[int, int, int, int]) -> None:
        queue, moves, forward, sample = self.phase_us
        self.phase_us = (queue + step[0], moves + step[1], forward + step[2], sample + step[3])
