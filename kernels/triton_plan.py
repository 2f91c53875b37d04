"""The work list of a step's decodes, made on the device (see work.py).

A captured graph replays with other lengths than it was captured with: what depends
on them is read from device memory, and the grid is fixed by the number of sequences
alone. One small program a step plans for all layers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import work
from kernels.launch import Launch
from kernels.work import WorkList

ITEM_COLUMNS = tl.constexpr(work.ITEM_COLUMNS)
TILE_COLUMNS = tl.constexpr(work.TILE_COLUMNS)
IDLE = tl.constexpr(work.IDLE_DECODES)
LEAST_IDLE = tl.constexpr(work.LEAST_IDLE)
UNITS = tl.constexpr(work.UNITS)
CHUNK_CANDIDATES = tl.constexpr(work.CHUNK_CANDIDATES)


def plan_decodes(
    context_lengths: Tensor,
    keys_per_tile: int,
    resident: int,
    capacity: int,
    partial_cost: int,
    sliding_window: int | None,
) -> WorkList:
    """The work list of S sequences with one query each, the first S tokens.

    context_lengths: int32 [S] on the device. The others are those of `cut_work`.
    Items that are not needed are empty.
    """
    launch, planned = plan_launch(
        context_lengths, keys_per_tile, resident, capacity, partial_cost, sliding_window
    )
    launch.run()
    return planned


def plan_launch(
    context_lengths: Tensor,
    keys_per_tile: int,
    resident: int,
    capacity: int,
    partial_cost: int,
    sliding_window: int | None,
) -> tuple[Launch, WorkList]:
    """The launch, and the work list that it fills."""
    count = context_lengths.shape[0]
    items = context_lengths.new_empty((capacity, work.ITEM_COLUMNS))
    tiles = context_lengths.new_empty((count, work.TILE_COLUMNS))
    arguments = {
        "items": items,
        "tiles": tiles,
        "context_lengths": context_lengths,
        "sequence_count": count,
        "capacity": capacity,
        "resident": resident,
        "window": sliding_window or 0,
        "WINDOWED": sliding_window is not None,
        "KEYS_PER_TILE": keys_per_tile,
        "PARTIAL_COST": partial_cost,
        "SEQUENCES": max(32, triton.next_power_of_2(count)),
    }
    warps = 4 if count <= 512 else 16
    return Launch(_plan, (1,), arguments, warps, 1), WorkList(items, tiles, capacity)


@triton.jit(do_not_specialize=["sequence_count", "capacity", "resident", "window"])
def _plan(
    items,
    tiles,
    context_lengths,
    sequence_count,
    capacity,
    resident,
    window,
    WINDOWED: tl.constexpr,
    KEYS_PER_TILE: tl.constexpr,
    PARTIAL_COST: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    sequence = tl.arange(0, SEQUENCES)
    real = sequence < sequence_count
    end_key = tl.load(context_lengths + sequence, mask=real, other=0)
    first_key = tl.zeros_like(end_key)
    if WINDOWED:
        first_key = tl.maximum(end_key - window, 0)
    spans = (end_key - first_key + (KEYS_PER_TILE - 1)) // KEYS_PER_TILE

    chunk = _choose_chunk(spans, real, capacity, resident, PARTIAL_COST)
    pieces = _pieces(spans, chunk, real)
    partials = tl.where(pieces > 1, pieces, 0)
    first_partial = tl.cumsum(partials, 0) - partials
    tile = tiles + sequence * TILE_COLUMNS
    tl.store(tile, sequence, mask=real)
    tl.store(tile + 1, 1, mask=real)
    tl.store(tile + 2, first_partial, mask=real)
    tl.store(tile + 3, partials, mask=real)

    # Whole chunks first and what is left of each sequence after them: the longest
    # items begin first, and the short ones fill the gaps at the end.
    whole = tl.where(spans % chunk == 0, pieces, pieces - 1)
    whole = tl.where(real & (spans > 0), whole, 0)
    rest = pieces - whole
    first_whole = tl.cumsum(whole, 0) - whole
    whole_count = tl.sum(whole)
    first_rest = whole_count + tl.cumsum(rest, 0) - rest
    for at in range(tl.max(pieces)):
        start = first_key + at * chunk * KEYS_PER_TILE
        end = tl.minimum(start + chunk * KEYS_PER_TILE, end_key)
        item = items + tl.where(at < whole, first_whole + at, first_rest) * ITEM_COLUMNS
        taken = at < pieces
        tl.store(item, sequence, mask=taken)
        tl.store(item + 1, sequence, mask=taken)
        tl.store(item + 2, 1, mask=taken)
        tl.store(item + 3, end_key - 1, mask=taken)
        tl.store(item + 4, start, mask=taken)
        tl.store(item + 5, end, mask=taken)
        tl.store(item + 6, tl.where(partials > 0, first_partial + at, -1), mask=taken)
    for first in range(whole_count + tl.sum(rest), capacity, SEQUENCES):
        unused = first + sequence
        tl.store(items + unused * ITEM_COLUMNS, -1, mask=unused < capacity)


@triton.jit
def _choose_chunk(
    spans,
    real,
    capacity,
    resident,
    PARTIAL_COST: tl.constexpr,
):
    """`choose_chunk` of work.py."""
    longest = tl.max(spans)
    total = tl.sum(spans)
    best = longest * 0 + 1
    best_cost = longest * 0 + 0x7FFFFFFF
    for at in range(CHUNK_CANDIDATES):
        chunk = ((2 + at % 2) << (at // 2)) >> 1
        pieces = _pieces(spans, chunk, real)
        partials = tl.sum(tl.where(pieces > 1, pieces, 0))
        amount = total + PARTIAL_COST * partials
        wave = tl.maximum(tl.minimum(chunk, longest), 1) * resident
        filled = tl.where(amount > 0, (amount - 1) % wave + 1, 0)
        cost = UNITS * amount + tl.maximum(IDLE * wave - UNITS * filled, LEAST_IDLE * wave)
        better = (tl.sum(pieces) <= capacity) & (cost <= best_cost)
        best = tl.where(better, chunk, best)
        best_cost = tl.where(better, cost, best_cost)
    return best


@triton.jit
def _pieces(spans, chunk, real):
    return tl.where(real, tl.maximum((spans + chunk - 1) // chunk, 1), 0)
