"""Paged attention as one Triton kernel (arXiv 2309.06180, section 4.1; split as in 2311.01282).

One program takes one item of the work list and one key/value head. Its rows are the
item's queries times the query heads that share the head, so that keys are read once
for all of them and the matrix units have a full operand even for a single query. It
walks the sequence's block table, a tile of keys at a time, with an online softmax:

    s = softcap(scale * q k^T) + slope * (key position - query position)    in units of ln 2
    m' = max(m, max s);   l' = l 2^(m-m') + sum 2^(s-m');   o' = o 2^(m-m') + 2^(s-m') v

What makes it fast, and what undoes it:

- The block ids of the next tile are read while this tile is computed and carried into
  the next turn. Read in the turn that uses them, they would halve the number of key
  tiles on their way, since the pipeline would have to hold both.
- A row's address is one 64-bit product and sum on a vector with one entry a row. Made
  by broadcasting over blocks and reshaping, it costs all asynchronous copies.
- Rows beyond the last key read the last key again, and their scores are masked. No
  row needs a mask when it is loaded, and nothing that another sequence left in a block,
  NaN included, ever reaches the matrix units.
- Decodes mask every tile in one loop: a loop of its own for the last tile would begin
  to load it only when all others are done. Prefills have many turns and expensive
  masks, so there the tiles that every query sees whole have a loop without masks.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels import work

ITEM_COLUMNS = tl.constexpr(work.ITEM_COLUMNS)
TILE_COLUMNS = tl.constexpr(work.TILE_COLUMNS)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Geometry(NamedTuple):
    """What is known of a launch when it is compiled, beside the sizes of a program.

    head_stride, offset_stride: elements from one head to the next, and from one token to
    the next, within a block.
    keys: taken at a time. stages: as in Launch. precision: of float32 products. paged:
    whether there is a block table; without one, sequence i has the one block i.
    """

    head_stride: int
    offset_stride: int
    block_size: int
    head_size: int
    keys: int
    stages: int
    precision: str
    paged: bool
    windowed: bool
    softcap: bool
    alibi: bool


# What changes from step to step must not mean another compilation.
@triton.jit(do_not_specialize=["window", "table_stride"])
def attend(
    output,
    lse,
    partial_output,
    partial_lse,
    query,
    key_blocks,
    value_blocks,
    block_tables,
    items,
    key_scales,
    value_scales,
    sinks,
    alibi_slopes,
    scale,
    softcap,
    window,
    query_token_stride,
    query_head_stride,
    table_stride,
    block_stride,
    GEOMETRY: tl.constexpr,
    DIMS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Grid (items * KV_HEADS), heads fastest. An item uses at most PARTIAL_ROWS of the ROWS."""
    HEAD_SIZE: tl.constexpr = GEOMETRY.head_size
    HEAD_STRIDE: tl.constexpr = GEOMETRY.head_stride
    kv_head = tl.program_id(0) % KV_HEADS
    item = items + tl.program_id(0) // KV_HEADS * ITEM_COLUMNS
    sequence = tl.load(item)
    if sequence < 0:
        return
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    head = (kv_head * GROUP + row % GROUP).to(tl.int64)
    token = (tl.load(item + 1) + row // GROUP).to(tl.int64)
    real = row < tl.load(item + 2) * GROUP
    inside = real[:, None] & (dim < HEAD_SIZE)[None, :]
    source = query + (token * query_token_stride + head * query_head_stride)[:, None]
    queries = tl.load(source + dim[None, :], mask=inside, other=0.0).to(DOT_DTYPE)
    first_position = tl.load(item + 3)
    position = first_position + (row * 0 if ONE_QUERY else row // GROUP)

    key_factor, value_factor, slope = scale * LOG2_E, 1.0, row * 0.0
    if key_scales is not None:
        key_factor *= tl.load(key_scales + kv_head)
        value_factor = tl.load(value_scales + kv_head)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=real, other=0.0) * LOG2_E
    table = items
    if block_tables is not None:
        table = block_tables + sequence.to(tl.int64) * table_stride
    of_head = kv_head.to(tl.int64) * HEAD_STRIDE
    cache = (key_blocks + of_head, value_blocks + of_head, table, sequence, block_stride)
    rule = (position, key_factor, softcap, slope, window)
    bounds = (tl.load(item + 4), tl.load(item + 5), first_position)
    row_max, row_sum, total = _attend(queries, rule, cache, bounds, GEOMETRY, GROUP, ONE_QUERY)

    _store(
        output, lse, partial_output, partial_lse, sinks, row_max, row_sum, total * value_factor,
        tl.load(item + 6), kv_head, row, head, token, real, inside,
        KV_HEADS, GROUP, HEAD_SIZE, PARTIAL_ROWS,
    )  # fmt: skip


@triton.jit
def _store(
    output,
    lse,
    partial_output,
    partial_lse,
    sinks,
    row_max,
    row_sum,
    total,
    partial,
    kv_head,
    row,
    head,
    token,
    real,
    inside,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr,
):
    """A tile in one piece is written out; a partial goes where `merge` finds it."""
    dim = tl.arange(0, total.shape[1])
    place = token * KV_HEADS * GROUP + head
    if partial < 0:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
            row_max, row_sum, total = _add_sink(row_max, row_sum, total, sink)
        total, row_lse = _normalise(row_max, row_sum, total)
        rows = output + place[:, None] * HEAD_SIZE + dim[None, :]
        tl.store(rows, total.to(output.dtype.element_ty), mask=inside)
        if lse is not None:
            tl.store(lse + place, row_lse * LN_2, mask=real)
    else:
        total, row_lse = _normalise(row_max, row_sum, total)
        place = (partial.to(tl.int64) * KV_HEADS + kv_head) * PARTIAL_ROWS + row
        tl.store(partial_output + place[:, None] * HEAD_SIZE + dim[None, :], total, mask=inside)
        tl.store(partial_lse + place, row_lse, mask=real)


@triton.jit
def _attend(
    queries,
    rule,
    cache,
    bounds,
    GEOMETRY: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_QUERY: tl.constexpr,
):
    """The softmax over the item's keys: maximum and sum of each row, weighted sum of values."""
    start, end, first_position = bounds
    KEYS: tl.constexpr = GEOMETRY.keys
    WINDOWED: tl.constexpr = GEOMETRY.windowed
    ROWS: tl.constexpr = queries.shape[0]
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, queries.shape[1]], tl.float32)
    if ONE_QUERY:
        # The sum over a tile's keys crosses warps. With few rows it is cheaper to keep one
        # sum for each place in the tile, and to add them up at the end. The window needs
        # no mask: the item begins with its first key.
        state = (row_max, tl.zeros([ROWS, KEYS], tl.float32), total)
        row_max, row_sums, total = _walk(
            state, queries, rule, cache, (start, end, end), GEOMETRY, True, False, True
        )
        row_sum = tl.sum(row_sums, 1)
    else:
        # Every row sees the keys up to first_position, but those that the window has left.
        state = (row_max, tl.zeros([ROWS], tl.float32), total)
        seen = start
        if WINDOWED:
            left = first_position + ROWS // GROUP - rule[4]
            seen += tl.cdiv(tl.maximum(tl.minimum(left, end) - start, 0), KEYS) * KEYS
            head = (start, tl.minimum(seen, end), end)
            state = _walk(state, queries, rule, cache, head, GEOMETRY, True, True, False)
        seen_count = tl.maximum(tl.minimum(first_position + 1, end) - seen, 0)
        tail = seen + seen_count // KEYS * KEYS
        middle = (seen, tail, end)
        state = _walk(state, queries, rule, cache, middle, GEOMETRY, False, False, False)
        tail = (tail, end, end)
        row_max, row_sum, total = _walk(
            state, queries, rule, cache, tail, GEOMETRY, True, WINDOWED, False
        )
    return row_max, row_sum, total


@triton.jit
def _walk(
    state,
    queries,
    rule,
    cache,
    bounds,
    GEOMETRY: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    LATE_SUM: tl.constexpr,
):
    """Go on with the keys from `start` to `stop`, of an item whose keys end at `end`."""
    row_max, row_sum, total = state
    start, stop, end = bounds
    keys, values, table, sequence, block_stride = cache
    KEYS: tl.constexpr = GEOMETRY.keys
    PRECISION: tl.constexpr = GEOMETRY.precision
    STAGES: tl.constexpr = GEOMETRY.stages
    last = tl.maximum(end, 1) - 1
    block, slot = _find(table, sequence, tl.minimum(start + tl.arange(0, KEYS), last), GEOMETRY)
    for at in tl.range(start, stop, KEYS, num_stages=STAGES):
        place = block.to(tl.int64) * block_stride + slot
        tile_keys = _load_tile(keys, place, queries.shape[1], GEOMETRY)
        tile_values = _load_tile(values, place, queries.shape[1], GEOMETRY)
        key_position = at + tl.arange(0, KEYS)
        block, slot = _find(table, sequence, tl.minimum(key_position + KEYS, last), GEOMETRY)

        scores = tl.dot(queries, tile_keys.to(queries.dtype).T, input_precision=PRECISION)
        scores, unit = _score(scores, rule, key_position, GEOMETRY, MASKED, WINDOWED)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
        base = new_max
        if MASKED and not LATE_SUM:
            # A row that has seen no key yet: infinity minus infinity is no number.
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(row_max - base)
        weights = tl.exp2(scores * unit - base[:, None])
        if LATE_SUM:
            row_sum = row_sum * decay[:, None] + weights
        else:
            row_sum = row_sum * decay + tl.sum(weights, 1)
        total = tl.dot(
            weights.to(queries.dtype),
            tile_values.to(queries.dtype),
            total * decay[:, None],
            input_precision=PRECISION,
        )
        row_max = new_max
    return row_max, row_sum, total


@triton.jit
def _find(table, sequence, key_position, GEOMETRY: tl.constexpr):
    """Block ids of some key positions, and where in their block the keys are."""
    BLOCK_SIZE: tl.constexpr = GEOMETRY.block_size
    OFFSET_STRIDE: tl.constexpr = GEOMETRY.offset_stride
    PAGED: tl.constexpr = GEOMETRY.paged
    # Dividing a signed number takes three instructions more.
    key_position = key_position.to(tl.uint32)
    if PAGED:
        block = tl.load(table + key_position // BLOCK_SIZE)
    else:
        block = (key_position * 0).to(tl.int32) + sequence
    return block, key_position % BLOCK_SIZE * OFFSET_STRIDE


@triton.jit
def _load_tile(blocks, place, DIMS: tl.constexpr, GEOMETRY: tl.constexpr):
    """Rows of one head, [KEYS, DIMS]; zeros beyond the head's size."""
    HEAD_SIZE: tl.constexpr = GEOMETRY.head_size
    dim = tl.arange(0, DIMS)
    if HEAD_SIZE == DIMS:
        return tl.load(blocks + place[:, None] + dim[None, :])
    return tl.load(
        blocks + place[:, None] + dim[None, :], mask=(dim < HEAD_SIZE)[None, :], other=0.0
    )


@triton.jit
def _score(
    scores,
    rule,
    key_position,
    GEOMETRY: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Scores of products of queries and keys, and the factor that they still lack.

    With nothing else to add, the factor goes into the exponent's multiply-add.
    """
    position, factor, softcap, slope, window = rule
    SOFTCAP: tl.constexpr = GEOMETRY.softcap
    ALIBI: tl.constexpr = GEOMETRY.alibi
    unit = factor
    if SOFTCAP or ALIBI:
        scores *= factor
        unit = 1.0
    if SOFTCAP:
        # tanh x = 1 - 2 / (1 + e^2x); softcap is in units of ln 2 like the scores.
        scores = softcap * (1 - 2 / (1 + tl.exp2(scores * (2 * LOG2_E / softcap))))
    if ALIBI:
        distance = key_position[None, :] - position[:, None]
        scores += slope[:, None] * distance.to(tl.float32)
    if MASKED:
        seen = key_position[None, :] <= position[:, None]
        if WINDOWED:
            seen &= key_position[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
    return scores, unit


@triton.jit
def _add_sink(row_max, row_sum, total, sink):
    """One more score in the softmax, that brings no value."""
    sink *= LOG2_E
    new_max = tl.maximum(row_max, sink)
    decay = tl.exp2(row_max - new_max)
    return new_max, row_sum * decay + tl.exp2(sink - new_max), total * decay[:, None]


@triton.jit
def _normalise(row_max, row_sum, total):
    """Rows without keys become zeros, with a log-sum-exp of minus infinity (base 2)."""
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    return total / row_sum[:, None], tl.where(empty, float("-inf"), row_max + tl.log2(row_sum))


@triton.jit
def merge(
    output,
    lse,
    partial_output,
    partial_lse,
    tiles,
    sinks,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Weigh each tile's partials by their share of the softmax's sum.

    Grid (query tiles * KV_HEADS * PARTIAL_ROWS), rows fastest: one program for one row.
    """
    row = tl.program_id(0) % PARTIAL_ROWS
    kv_head = tl.program_id(0) // PARTIAL_ROWS % KV_HEADS
    tile = tiles + tl.program_id(0) // (PARTIAL_ROWS * KV_HEADS) * TILE_COLUMNS
    count = tl.load(tile + 3)
    if (count == 0) | (row >= tl.load(tile + 1) * GROUP):
        return
    token = (tl.load(tile) + row // GROUP).to(tl.int64)
    first = tl.load(tile + 2).to(tl.int64)
    head = kv_head * GROUP + row % GROUP

    dim = tl.arange(0, DIMS)
    total_max = tl.full([], float("-inf"), tl.float32)
    if sinks is not None:
        total_max = tl.load(sinks + head).to(tl.float32) * LOG2_E
    total_sum = tl.where(total_max == float("-inf"), 0.0, 1.0)
    total = tl.zeros([DIMS], tl.float32)
    for at in range(0, count, AT_ONCE):
        piece = at + tl.arange(0, AT_ONCE)
        place = ((first + piece) * KV_HEADS + kv_head) * PARTIAL_ROWS + row
        piece_lse = tl.load(partial_lse + place, mask=piece < count, other=float("-inf"))
        pieces = tl.load(
            partial_output + place[:, None] * HEAD_SIZE + dim[None, :],
            mask=(piece < count)[:, None] & (dim < HEAD_SIZE)[None, :],
            other=0.0,
        )
        new_max = tl.maximum(total_max, tl.max(piece_lse, 0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(total_max - base)
        weights = tl.exp2(piece_lse - base)
        total_sum = total_sum * decay + tl.sum(weights, 0)
        total = total * decay + tl.sum(pieces * weights[:, None], 0)
        total_max = new_max
    empty = total_sum == 0.0
    total_sum = tl.where(empty, 1.0, total_sum)
    place = token * KV_HEADS * GROUP + head
    tl.store(
        output + place * HEAD_SIZE + dim,
        (total / total_sum).to(output.dtype.element_ty),
        mask=dim < HEAD_SIZE,
    )
    if lse is not None:
        row_lse = (total_max + tl.log2(total_sum)) * LN_2
        tl.store(lse + place, tl.where(empty, float("-inf"), row_lse))
