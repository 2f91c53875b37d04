"""Paged attention in plain torch: the CPU path, and the oracle of faster kernels.

The work is cut into groups of sequences of like length, and a few batched
operations serve all sequences of a group. Keys are gathered as [C, Hkv, L, D];
a padded position points at the sequence's own last key, so that nothing which
another sequence left behind, NaN included, is ever read. Query heads that share
a key/value head are packed into the query dimension: keys are never repeated.

What is fast on a CPU (two-core Zen 4, bf16, 64 sequences of 50 to 350 keys, 8 and
4 heads of 64): the limit is memory latency, and `embedding_bag` is the one gather
in torch that prefetches, 1.5 to 3 times as fast as `index_select`. For decodes
its weighted sum over rows is the product of weights and values, so values are
never copied at all; scores are one batched product. Fused attention is made for
long queries: it takes three times as long as two products there, and serves chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.batch import AttentionBatch, RowLayout, row_layout
from kernels.options import Options

# embedding_bag's mode.
SUM = 0
# Queries of one chunk that share one gather: long chunks are cut, so that early
# queries do not pay for late keys and a mask stays small.
TILE_QUERIES = 256


class _Limits(NamedTuple):
    """scores: queries * keys of a group at most; small groups pad less and stay in cache.
    slack: padded scores that cost less than one more group."""

    scores: int
    slack: int


DECODES = _Limits(scores=8192, slack=2048)
CHUNKS = _Limits(scores=1 << 22, slack=1 << 14)


def paged_attention(
    query: Tensor, key_blocks: Tensor, value_blocks: Tensor, batch: AttentionBatch, options: Options
) -> Tensor:
    """`kernels.paged_attention` in plain torch."""
    if options.key_scales is not None and options.value_scales is not None:
        batch, used = _only_used(batch, key_blocks)
        key_blocks = _dequantise(key_blocks, used, options.key_scales, query.dtype)
        value_blocks = _dequantise(value_blocks, used, options.value_scales, query.dtype)
    heads, head_size = query.shape[1:]
    layout = row_layout("key_blocks", key_blocks.shape, key_blocks.stride())
    window, distances = options.sliding_window, options.alibi_slopes is not None
    plan = batch.derive(
        ("attention", layout, heads, window, query.dtype, distances),
        lambda: _plan(batch, layout, heads, window, query.dtype, distances),
    )
    key_rows, value_rows = layout.view(key_blocks), layout.view(value_blocks)
    gathered = query.index_select(0, plan.query_rows)
    padded = torch.empty_like(gathered)
    for group in plan.groups:
        span = slice(group.start, group.start + group.count * group.query_length)
        shape = (group.count, group.query_length, heads, head_size)
        queries, output = gathered[span].view(shape), padded[span].view(shape)
        keys = _gather(key_rows, group).view(
            group.count, layout.head_count, group.key_length, head_size
        )
        if group.query_length == 1:
            _decode(queries, keys, value_rows, group, options, output)
            continue
        values = _gather(value_rows, group).view_as(keys)
        if options.softcap is None and options.sinks is None and not distances:
            _fused(queries, keys, values, group.bias, options.scale, output)
        else:
            _explicit(queries, keys, values, group, options, output)
    result = padded.index_select(0, plan.result_rows)
    if plan.keyless is not None:
        result.index_fill_(0, plan.keyless, 0)
    return result


def _only_used(batch: AttentionBatch, key_blocks: Tensor) -> tuple[AttentionBatch, Tensor]:
    """The batch over a cache of nothing but its own blocks, and these: int64 ids."""

    def make() -> tuple[AttentionBatch, Tensor]:
        _check_blocks(batch.host.block_tables, key_blocks.shape[0])
        used, tables = torch.unique(batch.host.block_tables, return_inverse=True)
        columns = (batch.host.query_starts, batch.host.context_lengths, tables.to(torch.int32))
        compact = AttentionBatch.build(
            *columns, batch.host.slot_mapping, batch.decode_count, device=key_blocks.device
        )
        return compact, used.to(key_blocks.device, torch.int64)

    return batch.derive(("only used", key_blocks.shape[0]), make)


def _dequantise(blocks: Tensor, used: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Some blocks of an e4m3 cache as numbers."""
    chosen = blocks.view(torch.uint8).index_select(0, used).view(blocks.dtype)
    return (chosen.float() * scales[:, None, None]).to(dtype)


def _gather(rows: Tensor, group: _Group) -> Tensor:
    """The group's rows, [C * Hkv * L, D]: sums over bags of one row each."""
    return torch.embedding_bag(
        rows, group.key_rows, group.key_bags, mode=SUM, include_last_offset=True
    )[0]


def _decode(
    query: Tensor,
    keys: Tensor,
    value_rows: Tensor,
    group: _Group,
    options: Options,
    output: Tensor,
) -> None:
    """softmax(scale * q k^T + bias) v for one query a sequence."""
    count, kv_heads, length, head_size = keys.shape
    packed = query.view(count * kv_heads, -1, head_size)
    keys = keys.view(-1, length, head_size).transpose(1, 2)
    if options.softcap is None and options.sinks is None and group.distance is None:
        scores = torch.baddbmm(group.bias, packed, keys, alpha=options.scale)
        weights = torch.softmax(scores, -1, dtype=torch.float32)
    else:
        scores = torch.bmm(packed.float(), keys.float()).mul_(options.scale)
        scores = scores.view(count, -1, 1, length)
        weights = _weights(scores, group.bias.view_as(scores), group.distance, options)
    output.view(-1, head_size).copy_(
        torch.embedding_bag(
            value_rows,
            group.value_rows,
            group.value_bags,
            mode=SUM,
            per_sample_weights=weights.to(query.dtype).view(-1),
            include_last_offset=True,
        )[0]
    )


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, output: Tensor
) -> None:
    """The same for chunks, with scores kept in fp32 and never written out."""
    attended = scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=bias, scale=scale, enable_gqa=True
    )
    output.copy_(attended.transpose(1, 2))


def _explicit(
    query: Tensor, keys: Tensor, values: Tensor, group: _Group, options: Options, output: Tensor
) -> None:
    """The same with every score written out, for what the fused one lacks."""
    count, length, heads, head_size = query.shape
    kv_heads, key_length = keys.shape[1:3]
    packed = query.transpose(1, 2).reshape(count, kv_heads, -1, head_size).float()
    scores = torch.matmul(packed, keys.float().transpose(2, 3)).mul_(options.scale)
    scores = scores.view(count, heads, length, key_length)
    weights = _weights(scores, group.bias, group.distance, options)
    weights = weights.reshape(count, kv_heads, -1, key_length)
    attended = torch.matmul(weights, values.float()).view(count, heads, length, head_size)
    output.copy_(attended.transpose(1, 2))


def _weights(scores: Tensor, bias: Tensor, distance: Tensor | None, options: Options) -> Tensor:
    """Softmax of fp32 scores [C, H, Q, L], which are overwritten, beside a score for each sink."""
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_().mul_(options.softcap)
    if distance is not None and options.alibi_slopes is not None:
        scores += options.alibi_slopes.float()[:, None, None] * distance
    scores += bias
    if options.sinks is None:
        return torch.softmax(scores, -1)
    count, heads, length, key_length = scores.shape
    sink = options.sinks.float().view(1, heads, 1, 1).expand(count, heads, length, 1)
    return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :key_length].contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """C sequences (or tiles of chunks) of Q queries and L keys, padded to the longest.

    start: its first padded query. key_rows: [C * Hkv * L] rows of the cache, each a bag of
    key_bags. bias: 0 or -inf, [C * Hkv, H / Hkv, L] where Q is 1, otherwise [C, 1, Q, L].
    value_rows: where Q is 1, [C * H * L], of which each query head is a bag of value_bags.
    distance: where there are slopes, key less query position, fp32 [C, 1, Q, L].
    """

    start: int
    count: int
    query_length: int
    key_length: int
    distance: Tensor | None
    bias: Tensor
    key_rows: Tensor
    key_bags: Tensor
    value_rows: Tensor
    value_bags: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """query_rows: token of each padded query. result_rows: padded query of each token.
    keyless: tokens without keys, None where there are none. All int64."""

    groups: list[_Group]
    query_rows: Tensor
    result_rows: Tensor
    keyless: Tensor | None


class _Tiles(NamedTuple):
    """int32 columns, one entry a tile: at most TILE_QUERIES queries of one sequence.

    The queries of a tile are the last of its keys: query i stands at key
    position key_end - query_count + i.
    """

    sequence: Tensor
    query_start: Tensor
    query_count: Tensor
    key_start: Tensor
    key_end: Tensor
    key_count: Tensor


class _Run(NamedTuple):
    """Tiles first to last, padded to so many queries and keys: a group to be."""

    first: int
    last: int
    queries: int
    keys: int


def _plan(
    batch: AttentionBatch,
    layout: RowLayout,
    heads: int,
    window: int | None,
    dtype: torch.dtype,
    distances: bool,
) -> _Plan:
    """Cut the step into groups. Runs once a step, in host memory, then moves to the device."""
    device = batch.block_tables.device
    tiles = _cut_tiles(batch, window)
    runs = _cut_runs(tiles)
    sizes = [run.last - run.first for run in runs]
    query_rows, result_rows = _query_rows(batch, tiles, runs, sizes)
    key_rows, bias = _key_rows(batch, layout, tiles, runs, sizes)
    groups, start = [], 0
    spans = [size * run.keys for size, run in zip(sizes, runs, strict=True)]
    columns = zip(
        runs, sizes, torch.split(key_rows, spans), torch.split(bias.to(dtype), spans), strict=True
    )
    for run, size, rows, hidden in columns:
        heads_of_rows = torch.arange(layout.head_count, dtype=rows.dtype)[:, None]
        heads_of_rows *= layout.head_step
        rows = rows.view(size, 1, run.keys) + heads_of_rows
        hidden = hidden.view(size, 1, 1, run.keys)
        part = _Tiles(*(column[run.first : run.last] for column in tiles))
        if run.queries > 1:
            hidden = _causal_bias(part, run, window).to(dtype)
        bags = [bag.to(device) for bag in _bags(rows, hidden, heads, run.queries == 1)]
        distance = _distances(part, run)[:, None].float().to(device) if distances else None
        group = _Group(start, size, run.queries, run.keys, distance, *bags)
        groups.append(group)
        start += size * run.queries
    return _Plan(groups, query_rows.to(device), result_rows.to(device), _keyless(batch))


def _cut_tiles(batch: AttentionBatch, window: int | None) -> _Tiles:
    """Longest first and decodes last, so that tiles of like size are neighbours."""
    starts, contexts = batch.host.query_starts, batch.host.context_lengths
    counts = starts[1:] - starts[:-1]
    sequence, skipped = _ragged((counts + (TILE_QUERIES - 1)) // TILE_QUERIES)
    skipped = skipped * TILE_QUERIES
    query_count = (counts[sequence] - skipped).clamp_(max=TILE_QUERIES)
    first_position = (contexts - counts)[sequence] + skipped
    key_end = (first_position + query_count).clamp_(min=0)
    if window is None:
        key_start = torch.zeros_like(key_end)
    else:
        key_start = (first_position + (1 - window)).clamp_(min=0)
    # Tiles without keys are given one, so that every size is at least 1.
    key_count = (key_end - key_start).clamp_(min=1)
    query_start = starts[sequence] + skipped
    order = torch.argsort((_power_class(query_count) << 40) + key_count, descending=True)
    columns = (sequence, query_start, query_count, key_start, key_end, key_count)
    return _Tiles(*torch.stack(columns)[:, order])


def _ragged(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For entries that repeat `sizes` times: whose repetition each is, and which; int32."""
    owner = torch.repeat_interleave(sizes)
    starts = sizes.cumsum(0, dtype=torch.int32) - sizes
    return owner, torch.arange(owner.shape[0], dtype=torch.int32) - starts[owner]


def _power_class(count: Tensor) -> Tensor:
    """0 for 1, 1 for 2, 2 for 3 and 4, 3 for 5 to 8, ...: int64."""
    return torch.ceil(torch.log2(count.to(torch.float64))).to(torch.int64)


def _cut_runs(tiles: _Tiles) -> list[_Run]:
    """Join size classes while padding is cheap, then cut to size; loops over classes only."""
    classes = (_power_class(tiles.query_count) << 8) + _power_class(tiles.key_count)
    classes, sizes = torch.unique_consecutive(classes, return_counts=True)
    firsts = sizes.cumsum(0) - sizes
    longest = tiles.key_count[firsts]
    joined: list[_Run] = []
    columns = (classes >> 8, firsts, sizes, longest)
    for power, first, size, keys in zip(*(column.tolist() for column in columns), strict=True):
        run = _Run(first, first + size, 1 << power, keys)
        if joined and _padding(joined[-1], run) <= _limits(run).slack:
            run = _join(joined.pop(), run)
        joined.append(run)
    lengths = tiles.key_count.tolist()
    pieces = []
    for run in joined:
        count = run.last - run.first
        parts = -(-count * run.queries * run.keys // _limits(run).scores)
        size = -(-count // parts)
        for at in range(run.first, run.last, size):
            piece = lengths[at : min(at + size, run.last)]
            pieces.append(_Run(at, at + len(piece), run.queries, max(piece)))
    return pieces


def _limits(run: _Run) -> _Limits:
    return DECODES if run.queries == 1 else CHUNKS


def _join(run: _Run, following: _Run) -> _Run:
    return _Run(run.first, following.last, run.queries, max(run.keys, following.keys))


def _padding(run: _Run, following: _Run) -> float:
    """Scores that joining two runs would add; decodes and chunks never join."""
    if (run.queries == 1) != (following.queries == 1):
        return float("inf")
    return sum(
        sign * (one.last - one.first) * one.queries * one.keys
        for sign, one in ((1, _join(run, following)), (-1, run), (-1, following))
    )


def _query_rows(
    batch: AttentionBatch, tiles: _Tiles, runs: list[_Run], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Token of each padded query, and padded query of each token."""
    widths = _per_tile([run.queries for run in runs], sizes)
    tile, offset = _ragged(widths)
    real = offset < tiles.query_count[tile]
    # Padded queries repeat their tile's last one.
    offset = offset.minimum(tiles.query_count[tile] - 1)
    query_rows = tiles.query_start[tile] + offset
    result_rows = torch.zeros(batch.host.slot_mapping.shape[0], dtype=torch.int64)
    found = torch.nonzero(real).squeeze(1)
    result_rows[query_rows[found]] = found
    return query_rows, result_rows


def _per_tile(values: list[int], sizes: list[int]) -> Tensor:
    """A value of each run, repeated for its tiles."""
    return torch.repeat_interleave(
        torch.tensor(values, dtype=torch.int32), torch.tensor(sizes, dtype=torch.int32)
    )


def _key_rows(
    batch: AttentionBatch, layout: RowLayout, tiles: _Tiles, runs: list[_Run], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """For each padded key of each tile: the cache row of its first head, and 0 or, for
    padding, -inf (fp32). Padded keys repeat the tile's last one."""
    tile, offset = _ragged(_per_tile([run.keys for run in runs], sizes))
    tables = batch.host.block_tables
    columns = torch.stack(
        (tiles.key_start, tiles.key_end - 1, tiles.key_count, tiles.sequence * tables.shape[1])
    )
    first, last, count, table = columns.index_select(1, tile)
    hidden = offset >= count
    positions = (first + offset).minimum(last).clamp_(min=0)
    blocks = tables.reshape(-1).index_select(0, table + positions // layout.block_size)
    _check_blocks(blocks, layout.block_count)
    if layout.rows > torch.iinfo(torch.int32).max:
        blocks = blocks.to(torch.int64)
    rows = blocks * layout.block_step + positions % layout.block_size * layout.offset_step
    return rows, torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _causal_bias(tiles: _Tiles, run: _Run, window: int | None) -> Tensor:
    """0 where a query sees a key and -inf elsewhere: fp32 [C, 1, Q, L]."""
    distances = _distances(tiles, run)
    hidden = distances > 0
    if window is not None:
        hidden |= distances <= -window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None]


def _distances(tiles: _Tiles, run: _Run) -> Tensor:
    """Key less query position, int [C, Q, L]; padded queries repeat their tile's last one."""
    key_positions = (tiles.key_start[:, None] + torch.arange(run.keys))[:, None, :]
    offsets = torch.arange(run.queries).clamp(max=tiles.query_count[:, None] - 1)
    query_positions = ((tiles.key_end - tiles.query_count)[:, None] + offsets)[:, :, None]
    return key_positions - query_positions


def _bags(rows: Tensor, bias: Tensor, heads: int, decode: bool) -> tuple[Tensor, ...]:
    """A group's bias, key_rows, key_bags, value_rows and value_bags, from rows [C, Hkv, L]."""
    count, kv_heads, length = rows.shape
    key_bags = torch.arange(rows.numel() + 1, dtype=rows.dtype)
    if not decode:
        return bias, rows.view(-1), key_bags, rows.new_empty(0), rows.new_empty(0)
    packed = (count, kv_heads, heads // kv_heads, length)
    value_rows = rows[:, :, None].expand(packed).reshape(-1)
    value_bags = torch.arange(0, value_rows.numel() + 1, length, dtype=rows.dtype)
    bias = bias.expand(packed).reshape(count * kv_heads, -1, length)
    return bias, rows.view(-1), key_bags, value_rows, value_bags


def _keyless(batch: AttentionBatch) -> Tensor | None:
    """Tokens that stand before position 0: rows which only fill up a fixed-size batch."""
    starts, contexts = batch.host.query_starts, batch.host.context_lengths
    before = starts[1:] - starts[:-1] - contexts
    if not bool((before > 0).any()):
        return None
    sequence, offset = _ragged(starts[1:] - starts[:-1])
    keyless = torch.nonzero(offset < before[sequence]).squeeze(1)
    return keyless.to(batch.block_tables.device)


def _check_blocks(blocks: Tensor, count: int) -> None:
    if blocks.numel() and not 0 <= int(blocks.min()) <= int(blocks.max()) < count:
        raise ValueError(f"block_tables has an id beyond the cache's {count} blocks")
