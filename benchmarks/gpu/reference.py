"""Attention in float64, as plainly as can be, for queries of one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.inputs import FP8
from kernels.options import Options

# Relative error of the whole, by norm. fp8: of the cache, against what it holds.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2, FP8: 2e-2}
LSE_TOLERANCE = 1e-3


def tolerance(query: torch.dtype, cache: torch.dtype) -> float:
    return TOLERANCES[FP8 if cache == FP8 else query]


def attention(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Outputs [Q, H, D] and log-sum-exps [Q, H] of queries [Q, H, D] at positions [Q].

    keys, values: float64 [Hkv, L, D], scales applied.
    """
    group = query.shape[1] // keys.shape[0]
    keys, values = (each.repeat_interleave(group, 0) for each in (keys, values))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    distance = torch.arange(keys.shape[1], device=query.device) - position[:, None]
    if options.alibi_slopes is not None:
        scores = scores + options.alibi_slopes.double()[:, None, None] * distance
    hidden = distance > 0
    if options.sliding_window is not None:
        hidden |= distance <= -options.sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    sums = torch.logsumexp(scores, 2)
    if options.sinks is not None:
        sums = torch.logaddexp(sums, options.sinks.double()[:, None])
    weights = torch.exp(scores - sums[..., None]).nan_to_num(0.0)
    return (weights @ values).transpose(0, 1), sums.transpose(0, 1)


def error(result: Tensor, expected: Tensor) -> float:
    """Relative, of the whole, by norm. NaN where anything is NaN."""
    difference = result.double() - expected.double()
    return float(difference.norm() / expected.double().norm().clamp(min=1e-30))
