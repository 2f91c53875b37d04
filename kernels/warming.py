"""Steps that bring up every kernel of a model's attention once, before anything is served.

A Triton kernel is compiled when it is first launched, for half a second to two. Which ones a
step launches depends on its longest chunk (`prefill_tiling`), on whether a tile of queries was
cut (`cut_work`) and on how many sequences decode (`plan_launch`).
"""

from __future__ import annotations

import torch

from kernels.batch import AttentionBatch
from kernels.tiling import power_of_two

# Chunks from this length on are tiled alike: no program has more rows (`tiling.PREFILL`).
LONGEST_CHUNK = 128
# Keys of a long sequence. With a short one beside it, what is left of the device without a cut
# is as much as can be, and its one tile of queries is cut if any step's ever is.
MANY_KEYS = 1 << 16
# The least number of decodes that are planned at once (`plan_launch`).
LEAST_DECODES = 32


def steps_of_all_kinds(
    slot_count: int, block_size: int, device: torch.device
) -> list[AttentionBatch]:
    """A step of each kind: two chunks, by their length, and decodes of up to slot_count sequences.

    They write nothing, and read block 0 alone, whatever it holds.
    """
    chunks = [1 << power for power in range(LONGEST_CHUNK.bit_length())]
    decodes = [1, LEAST_DECODES]
    while decodes[-1] < power_of_two(slot_count):
        decodes.append(2 * decodes[-1])
    counts = {min(count, slot_count) for count in decodes}
    return [
        *(_step(length, [MANY_KEYS, length], 0, block_size, device) for length in chunks),
        *(_step(1, [1] * count, count, block_size, device) for count in sorted(counts)),
    ]


def _step(
    queries: int, keys: list[int], decode_count: int, block_size: int, device: torch.device
) -> AttentionBatch:
    """Sequences with so many keys, of which each computes so many."""
    tokens = queries * len(keys)
    return AttentionBatch.build(
        torch.arange(0, tokens + 1, queries, dtype=torch.int32),
        torch.tensor(keys, dtype=torch.int32),
        torch.zeros((len(keys), -(-max(keys) // block_size)), dtype=torch.int32),
        torch.full((tokens,), -1),
        decode_count,
        device=device,
    )
