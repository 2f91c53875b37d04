"""A kernel with the arguments it is about to run with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """What one launch needs; also what it takes to compile it for a device that is not here.

    grid: programs along each axis. arguments: by the kernel's parameter names.
    warps: of 32 threads (64 on CDNA). stages: tiles on their way from memory at once, plus one.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)
