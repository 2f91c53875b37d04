"""A histogram that many values at once are added to for little, and any thread may read. Pure."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


class Histogram:
    """Counts of values by bucket. One thread adds; others may read meanwhile.

    Args:
        bounds: the largest value of each bucket, ascending; what is larger has a bucket of its own.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self._edges = np.array(bounds, np.float64)
        self._counts = np.zeros(len(bounds) + 1, np.int64)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: Float64Array) -> None:
        """Adds every value but those that are NaN."""
        total = float(values.sum())
        if total != total:
            values = values[~np.isnan(values)]
            total = float(values.sum())
        places = self._edges.searchsorted(values)
        self._counts += np.bincount(places, minlength=len(self._counts))
        self.sum += total

    def cumulative(self) -> list[int]:
        """How many values are at most each bound; then how many there are."""
        return list(accumulate(self._counts.tolist()))
