"""What a layer asks of its attention, beside queries and cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """The keyword arguments of `kernels.paged_attention`, which says what they mean."""

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
