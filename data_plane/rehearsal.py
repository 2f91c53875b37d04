"""The most that a step can ask for, run once at start: to measure it, and to have memory for it.

What torch's allocator has taken from the driver it keeps, so that a step like one before it takes
nothing anew. But every capture of a graph gives back what is not in use.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_plane.kv_cache import KVCache
from data_plane.model import Model
from data_plane.sampler import Rows, Send, draw, score_prompt
from data_plane.sampling_table import SamplingTable
from kernels import AttentionBatch

# Likeliest tokens with each draw; few bytes however many there are.
_LOGPROBS = 20


def largest_pass(model: Model, cache: KVCache, tokens: int) -> Tensor:
    """Computes so many tokens of sequences that are as long as can be; returns all their logits.

    All logits of a chunk are wanted where a prompt's log-probabilities are. The sequences share
    one table and write nothing: nobody reads what they compute.
    """
    length = min(tokens, model.facts.max_model_length)
    starts = torch.arange(0, tokens + length, length).clamp(max=tokens).to(torch.int32)
    table = torch.arange(-(-length // cache.block_size), dtype=torch.int32) % cache.block_count
    batch = AttentionBatch.build(
        starts,
        starts.diff(),
        table.repeat(len(starts) - 1, 1),
        torch.full((tokens,), -1),
        0,
        device=model.device,
    )
    rows = torch.arange(tokens, device=model.device)
    positions = rows % length
    return model.forward(torch.zeros_like(positions), positions, batch, cache, rows)


def largest_draw(logits: Tensor, tokens: Tensor, vocabulary_size: int, send: Send) -> list[Tensor]:
    """Draws for all slots with all that sampling has, and scores all logits as a prompt's.

    Args:
        logits: [T, V], at least as many rows as there are slots.
        tokens: int32 [slots, length] on the device, the token table.

    Returns:
        What a step's result would have fetched.
    """
    slots, length = tokens.shape
    table = SamplingTable(slots, vocabulary_size)
    for column in (table.temperature, table.repetition_penalty, table.presence_penalty):
        column.fill(1.5)
    table.top_p.fill(0.9)
    table.logprob_count.fill(_LOGPROBS)
    each = np.arange(slots, dtype=np.int32)
    rows = Rows(each, each, np.full(slots, length, np.int32))
    draws = draw(logits, rows, table, tokens, np.zeros(slots, np.int32), send)
    following = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    scores = score_prompt(logits[:, :vocabulary_size], 0, 1, following, _LOGPROBS)
    return [*draws.values, *(value for part in scores for value in part.values)]


def every_move(cache: KVCache) -> None:
    """Copies a block, and swaps one out and in, where there are blocks for it."""
    first, second = np.array([0]), np.array([1])
    if cache.block_count > 1:
        cache.copy_blocks(first, second)
    if cache.host_block_count:
        cache.swap_out(first, first)
        cache.swap_in(first, first)
