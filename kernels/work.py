"""The work list: how the attention of one step is cut into programs.

Queries come in tiles of one sequence (a decode's tile is its one query). The keys
that a tile sees are a range, and a long range is cut into chunks, so that one long
sequence keeps the whole device busy. Each chunk of each tile is one item: one
program for each key/value head. A tile in one piece is written out at once; the
pieces of a tile that was cut are *partials*, which a second launch merges.

The chunk is the same for all tiles of a step. It is chosen to make this small, in the
time that one program takes for one tile of keys while the device is full, R being the
items that it works on at once:

    work / R + chunk * max(idle - filled, 1/10),    work = tiles of keys + cost of partials

The first part is the time in which the device is busy everywhere. The second is that of
the last wave, of which `filled` is the share that has work: a full one costs little, one
that has just begun costs most of a chunk. `idle` is 1 where programs do not run faster
when they are fewer, as in chunks of prompts, which wait for the matrix units; decodes
wait for memory, and the fewer they are the faster is each. That the latter makes it 5/6,
and the tenth for items that end unevenly, are assumptions that a simulation of 84
batches was fitted to; no device has confirmed them yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Columns of an item: sequence (-1: nothing to do), first token, token count, position
# of the first token, first key, end of keys, partial (-1: the whole tile), unused.
ITEM_COLUMNS = 8
# Columns of a tile: first token, token count, first partial, partial count.
TILE_COLUMNS = 4
# Chunks tried, in tiles of keys: 1, 1, 2, 3, 4, 6, 8, 12, ... each 1.33 or 1.5 times the last.
CHUNK_CANDIDATES = 36
# The rule above in whole numbers, in units of 1/30.
IDLE_DECODES, IDLE_CHUNKS, LEAST_IDLE, UNITS = 25, 30, 3, 30


class WorkList(NamedTuple):
    """items: int32 [W, ITEM_COLUMNS]. tiles: int32 [Q, TILE_COLUMNS].
    partial_count: partials at most; 0 where the host knows that no tile was cut."""

    items: Tensor
    tiles: Tensor
    partial_count: int


class QueryTiles(NamedTuple):
    """int32 columns, one entry a tile; query i of a tile stands at `position` + i.

    position may be negative: such queries have no keys. first_key, end_key: the keys
    that any of its queries sees.
    """

    sequence: Tensor
    token: Tensor
    token_count: Tensor
    position: Tensor
    first_key: Tensor
    end_key: Tensor


def query_tiles(
    query_starts: Tensor,
    context_lengths: Tensor,
    tokens_per_tile: int,
    sliding_window: int | None,
) -> QueryTiles:
    """Cut the queries of sequences into tiles of at most `tokens_per_tile`.

    query_starts: int32 [S + 1], first token of each sequence, then their end.
    context_lengths: int32 [S], keys of each sequence, these queries included.
    """
    counts = query_starts[1:] - query_starts[:-1]
    pieces = (counts + (tokens_per_tile - 1)) // tokens_per_tile
    sequence = torch.repeat_interleave(pieces)
    at = torch.arange(sequence.shape[0]) - (pieces.cumsum(0) - pieces)[sequence]
    skipped = at * tokens_per_tile
    token_count = (counts[sequence] - skipped).clamp(max=tokens_per_tile)
    position = (context_lengths - counts)[sequence] + skipped
    end_key = (position + token_count).clamp(min=0)
    first_key = torch.zeros_like(end_key)
    if sliding_window is not None:
        first_key = (position + (1 - sliding_window)).clamp(min=0)
    columns = (sequence, query_starts[sequence] + skipped, token_count, position)
    return QueryTiles(*(column.to(torch.int32) for column in (*columns, first_key, end_key)))


def cut_work(
    tiles: QueryTiles,
    keys_per_tile: int,
    resident: int,
    capacity: int,
    partial_cost: int,
    idle: int = IDLE_CHUNKS,
) -> WorkList:
    """Make the work list of some query tiles, longest items first.

    keys_per_tile: keys that a program takes at a time. resident: items that the device
    works on at once. capacity: items at most, no fewer than there are tiles.
    partial_cost: what a partial costs, in tiles of keys. idle: IDLE_DECODES or
    IDLE_CHUNKS. Raises ValueError for a capacity that is too small.
    """
    count = tiles.sequence.shape[0]
    if capacity < count:
        raise ValueError(f"capacity {capacity} is less than the {count} query tiles")
    spans = (tiles.end_key - tiles.first_key + (keys_per_tile - 1)) // keys_per_tile
    chunk = choose_chunk(spans, resident, capacity, partial_cost, idle) * keys_per_tile
    pieces = _pieces(tiles.end_key - tiles.first_key, chunk)
    owner = torch.repeat_interleave(pieces)
    at = torch.arange(owner.shape[0]) - (pieces.cumsum(0) - pieces)[owner]
    partials = torch.where(pieces > 1, pieces, 0)
    first_partial = partials.cumsum(0) - partials
    start = tiles.first_key[owner] + at * chunk
    end = (start + chunk).minimum(tiles.end_key[owner])
    partial = torch.where(pieces[owner] > 1, first_partial[owner] + at, -1)
    columns = (tiles.sequence, tiles.token, tiles.token_count, tiles.position)
    items = torch.stack(
        (*(column[owner] for column in columns), start, end, partial, torch.zeros_like(partial)), 1
    )
    items = items[torch.argsort(end - start, descending=True, stable=True)]
    merges = torch.stack((tiles.token, tiles.token_count, first_partial, partials), 1)
    return WorkList(items.to(torch.int32), merges.to(torch.int32), int(partials.sum()))


def choose_chunk(spans: Tensor, resident: int, capacity: int, partial_cost: int, idle: int) -> int:
    """The best chunk, in tiles of keys, for query tiles that see `spans` tiles of keys each."""
    if not spans.numel():
        return 1
    chunks = torch.tensor(chunk_candidates())
    pieces = _pieces(spans, chunks[:, None])
    partials = torch.where(pieces > 1, pieces, 0).sum(1)
    work = int(spans.sum()) + partial_cost * partials
    wave = chunks.clamp(max=max(int(spans.max()), 1)) * resident
    filled = torch.where(work > 0, (work - 1) % wave + 1, 0)
    cost = UNITS * work + (idle * wave - UNITS * filled).maximum(LEAST_IDLE * wave)
    cost[pieces.sum(1) > capacity] = torch.iinfo(torch.int64).max
    # Of equals the largest chunk: it makes the fewest partials.
    return int(chunks[cost == cost.min()].max())


def chunk_candidates() -> list[int]:
    return [((2 + at % 2) << (at // 2)) >> 1 for at in range(CHUNK_CANDIDATES)]


def _pieces(spans: Tensor, chunk: int | Tensor) -> Tensor:
    """A tile without keys is one piece too, since its zeros must be written."""
    return ((spans + (chunk - 1)) // chunk).clamp(min=1)
