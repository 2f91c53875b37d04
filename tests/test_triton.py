"""The Triton kernels against the naive reference: on a GPU, or else in Triton's interpreter.

What the interpreter shows of bfloat16 and e4m3 is said in tests/triton_interpreter.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import triton_paged, work
from kernels.options import Options
from kernels.tiling import Family, Tiling, decode_tiling, family_of, prefill_tiling
from kernels.triton_paged import (
    Part,
    paged_attention,
    plan,
    plan_chunk_part,
    plan_decode_part,
    run_part,
)
from kernels.triton_plan import plan_decodes, plan_launch
from kernels.work import IDLE_DECODES, QueryTiles, WorkList, cut_work, query_tiles
from tests.kernel_cases import (
    DEVICE,
    FP8,
    LAYOUTS,
    TOLERANCE,
    TRITON_DTYPES,
    Case,
    address_space,
    edges,
    filled_with_nan,
    relative_error,
)
from tests.triton_interpreter import faithful

# Triton 3.6 asks numpy for what it has come to warn of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
# Decodes without keys, with one, and long enough to be split; a prompt, a chunk over cached
# keys, one that begins before position 0, and one of a single query.
MIXED = [(1, 0), (1, 1), (1, 17), (1, 230), (9, 9), (20, 75), (4, 2), (1, 33)]
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
SLOPES = torch.tensor([0.5, 0.25, 0.01, 0.0])


@pytest.fixture(autouse=True, scope="module")
def as_devices_compute() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with faithful():
        yield
    torch.set_num_threads(threads)


@triton.jit
def _convert(source, target, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def _add(source, target):
    tl.store(target, tl.load(source) + tl.load(source))


def every(dtype: torch.dtype) -> Tensor:
    """All numbers of a small format; of float32 those of e4m3 and some around each, ties too."""
    if dtype == torch.float32:
        exact = every(FP8).float()
        near = torch.cat([exact * (1 + step / 64) for step in range(-8, 8)])
        return near.where(near.abs() <= 448, float("nan"))
    bits = torch.arange(1 << 8 * dtype.itemsize)
    return bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, FP8),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (FP8, torch.float16),
        (FP8, torch.float32),
    ],
    ids=str,
)
def test_conversions_round_like_torch(source: torch.dtype, target: torch.dtype) -> None:
    """The floor that the others stand on: every number of a format, NaN included."""
    if FP8 not in TRITON_DTYPES and FP8 in (source, target):
        pytest.skip("this GPU has no e4m3")
    numbers = every(source).to(DEVICE)
    found = torch.empty(numbers.shape, dtype=target, device=DEVICE)
    _convert[(1,)](numbers, found, COUNT=numbers.shape[0])
    expected = numbers.to(target).float()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="a device adds bfloat16 as it should")
def test_the_interpreter_refuses_to_add_bits() -> None:
    number = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="create_fadd on bf16"):
        _add[(1,)](number, number)


def make(lengths: list[tuple[int, int]], **shape: Any) -> Case:
    return Case(lengths, device=DEVICE, **shape)


def layer_options(case: Case, **options: Any) -> Options:
    moved = {
        name: option.to(DEVICE) if isinstance(option, Tensor) else option
        for name, option in options.items()
    }
    scales = {"key_scales": case.key_scales, "value_scales": case.value_scales}
    return Options(case.scale, **scales, **moved)


def attend(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    lse = filled_with_nan(case.query.shape[:2], torch.float32, DEVICE)
    output = paged_attention(
        case.query,
        case.key_blocks,
        case.value_blocks,
        case.batch(),
        layer_options(case, **options),
        lse,
    )
    return output, lse


def attend_part(
    case: Case, part: Part, block_tables: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The same with the work list of one part, for a case that has no other."""
    output = filled_with_nan(case.query.shape, case.query.dtype, DEVICE)
    lse = filled_with_nan(case.query.shape[:2], torch.float32, DEVICE)
    blocks = (case.key_blocks, case.value_blocks)
    given_options = layer_options(case, **options)
    run_part(output, case.query, *blocks, block_tables, part, given_options, lse)
    return output, lse


def check(case: Case, **options: Any) -> None:
    case.compare(*attend(case, **options), **options)


def tilings(case: Case) -> tuple[Tiling, Tiling]:
    """Of decodes and of chunks."""
    family, group = family_of(torch.device(DEVICE)), case.query.shape[1] // case.key_blocks.shape[1]
    sizes = (family, group, case.query.shape[2], case.key_blocks.element_size())
    longest = max(count for count, _ in case.lengths)
    return decode_tiling(*sizes), prefill_tiling(*sizes, longest)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "head_size"),
    [(1, 64), (3, 96), (4, 128), (7, 80), (8, 256), (16, 64), (32, 32), (128, 64)],
)
def test_groups(group: int, head_size: int, dtype: torch.dtype) -> None:
    kv_heads = 2 if group < 8 else 1
    shape = {"heads": group * kv_heads, "kv_heads": kv_heads, "head_size": head_size}
    check(make([(1, 0), (1, 17), (1, 150), (7, 40), (4, 2)], **shape, dtype=dtype))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 192, 256])
def test_head_sizes(head_size: int, dtype: torch.dtype) -> None:
    check(make([(1, 60), (5, 40)], heads=4, kv_heads=2, head_size=head_size, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["ampere", "cdna"])
def test_tilings_of_other_devices(
    family: Family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_paged, "family_of", lambda _: family)
    check(make(MIXED, head_size=64, dtype=dtype))
    check(make(MIXED, head_size=256, dtype=dtype), sliding_window=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 64, 128])
def test_block_edges(block_size: int, dtype: torch.dtype) -> None:
    check(make(edges(block_size), heads=2, kv_heads=1, block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tile_edges(dtype: torch.dtype) -> None:
    """Lengths around every boundary of a tile of keys, and counts around one of queries."""
    shape = {"heads": 4, "kv_heads": 1, "head_size": 64, "dtype": dtype}
    decode, prefill = tilings(make([(64, 64)], **shape))
    around = [times * decode.keys + more for times in (1, 2) for more in (-1, 0, 1)]
    lengths = [(1, length) for length in around]
    for more in (-1, 0, 1):
        tokens = prefill.tokens(4) + more
        lengths += [(tokens, tokens), (tokens, tokens + prefill.keys - 1)]
        lengths += [(3, prefill.keys + more), (2, 2 * prefill.keys + more)]
    check(make(lengths, **shape))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 13},
        {"sliding_window": 64},
        {"sliding_window": 1000},
        {"softcap": 2.0},
        {"alibi_slopes": SLOPES},
        {"sinks": SINKS},
        {"sliding_window": 31, "softcap": 1.5},
        {"sliding_window": 31, "alibi_slopes": SLOPES},
        {"sliding_window": 31, "sinks": SINKS},
        {"softcap": 1.5, "alibi_slopes": SLOPES},
        {"softcap": 1.5, "sinks": SINKS},
        {"alibi_slopes": SLOPES, "sinks": SINKS},
        {"sliding_window": 31, "softcap": 1.5, "alibi_slopes": SLOPES, "sinks": SINKS},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_options(options: dict[str, Any]) -> None:
    check(make([*MIXED, (40, 100)]), **options)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_all_options_in_every_dtype(dtype: torch.dtype) -> None:
    options = {"sliding_window": 40, "softcap": 3.0, "alibi_slopes": SLOPES, "sinks": SINKS}
    check(make(MIXED, head_size=64, dtype=dtype), **options)


@pytest.mark.parametrize("factor", [1e-3, 30.0])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
def test_flat_and_sharp_scores(options: dict[str, Any], factor: float) -> None:
    """Weights that are all alike, and weights of which one is nearly everything."""
    case = make(MIXED)
    case.query *= factor
    check(case, **options)


@pytest.mark.parametrize("dtype", [TRITON_DTYPES[1], TRITON_DTYPES[-1]], ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "far"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    case = make([(1, 40), (1, 3), (9, 30)], layout=layout, dtype=dtype)
    if layout == "far":
        used = int(case.tables.max())
        assert used * case.key_blocks.stride(0) > 1 << 32
    check(case)


@pytest.mark.parametrize("step", [8 * 32, (1 << 28) + 16])
def test_rows_of_a_merged_projection(step: int) -> None:
    """Queries with keys and values between them, or so much that they are beyond 2^32."""
    case = make([(1, 40), (1, 3), (9, 30), (7, 7)])
    count = case.query.shape[0]
    memory = address_space(step * count, torch.float32, DEVICE)
    merged = memory.as_strided((count, 4, 32), (step, 32, 1))
    merged.copy_(case.query)
    case.query = merged
    check(case)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 20}], ids=str)
def test_contiguous_keys(options: dict[str, Any]) -> None:
    """Without block tables a sequence's keys are its one block, which may have any size."""
    for lengths in ([(1, 77), (1, 0), (1, 200)], [(9, 77), (30, 30), (2, 201)]):
        paged = make(lengths)
        shape = (len(lengths), 2, 203, 32)
        contiguous = [filled_with_nan(shape, torch.float32, DEVICE) for _ in range(2)]
        for target, rows in zip(contiguous, (paged.keys, paged.values), strict=True):
            for sequence, row in enumerate(rows):
                target[sequence, :, : row.shape[0]] = row.transpose(0, 1).to(DEVICE)
        paged.key_blocks, paged.value_blocks = contiguous
        window = options.get("sliding_window")
        (part,) = plan(paged.batch(), paged.query, contiguous[0], window)
        paged.compare(*attend_part(paged, part, None, **options), **options)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_a_sequence_full_of_nan_harms_no_other() -> None:
    case = make([(1, 40), (1, 41), (1, 3), (20, 30), (9, 30)])
    expected, _ = attend(case)
    for sequence in (0, 3):
        used = case.tables[sequence][case.tables[sequence] > 0].long()
        case.key_blocks[used] = float("nan")
        case.value_blocks[used] = float("inf")
    result, _ = attend(case)
    others = [1, 2, *range(23, 32)]
    torch.testing.assert_close(result[others], expected[others], rtol=0, atol=0)
    assert not result[0].isfinite().any() and not result[3:23].isfinite().any()


def test_queries_without_keys() -> None:
    """They get zeros; the sum of their softmax is the sink's share, if there is one."""
    lengths = [(1, 0), (1, 5), (4, 2)]
    output, lse = attend(make(lengths))
    assert not output[0].any() and not output[2:4].any() and output[1].all() and output[4:].all()
    assert lse[[0, 2, 3]].isneginf().all() and lse[[1, 4, 5]].isfinite().all()
    output, lse = attend(make(lengths), sinks=SINKS)
    assert not output[0].any() and not output[2:4].any()
    torch.testing.assert_close(lse[[0, 2, 3]].cpu(), SINKS.expand(3, 4), atol=1e-5, rtol=0)


def test_nothing_to_do() -> None:
    output, _ = attend(make([]))
    assert output.shape == (0, 4, 32)
    check(make([(1, 0), (1, 0)]))
    check(make([(3, 0)]))


def test_log_sum_exps_are_optional() -> None:
    case = make(MIXED)
    arguments = (case.query, case.key_blocks, case.value_blocks, case.batch())
    case.compare(paged_attention(*arguments, layer_options(case)))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50, "sinks": SINKS}], ids=str)
def test_splits_of_decodes_change_nothing(options: dict[str, Any]) -> None:
    case = make([(1, 300), (1, 0), (1, 16), (1, 1), (1, 129)], head_size=64)
    tiling, _ = tilings(case)
    batch, count = case.batch(), len(case.lengths)
    counts = set()
    # One program at once and room for no split, ever more at once, room for half the splits.
    for resident, capacity in ((1, count), (4, 16), (100, 64), (10_000, 500), (100, count + 4)):
        window = options.get("sliding_window")
        planned = plan_decodes(batch.context_lengths, tiling.keys, resident, capacity, 0, window)
        counts.add(int(planned.tiles[:, 3].sum()))
        part = Part(planned, tiling, 1, True)
        case.compare(*attend_part(case, part, batch.block_tables, **options), **options)
    assert len(counts) >= (2 if options else 3)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50, "sinks": SINKS}], ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_splits_of_chunks_change_nothing(
    chunk: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "choose_chunk", lambda *_: chunk)
    case = make([(5, 5), (18, 150), (2, 0), (7, 70)])
    batch, window = case.batch(), options.get("sliding_window")
    _, tiling = tilings(case)
    part = plan_chunk_part(batch, tiling, 2, 2, window)
    assert part.work.partial_count > 0 or chunk >= 5
    case.compare(*attend_part(case, part, batch.block_tables, **options), **options)


def test_an_empty_split_changes_nothing() -> None:
    """Splits without keys have no maximum: neither may be subtracted from the other."""
    case = make([(1, 200), (1, 40)])
    batch = case.batch()
    tiling, _ = tilings(case)
    items: list[list[int]] = []
    tiles: list[list[int]] = []
    for sequence, (_, length) in enumerate(case.lengths):
        # All but the last that has keys hold whole tiles.
        whole = length // 2 // tiling.keys * tiling.keys
        first = len(items)
        for at, (start, end) in enumerate(pairwise([0, 0, whole, whole, length, length])):
            items.append([sequence, sequence, 1, length - 1, start, end, first + at, 0])
        tiles.append([sequence, 1, first, len(items) - first])
    columns = (torch.tensor(rows, dtype=torch.int32, device=DEVICE) for rows in (items, tiles))
    part = Part(WorkList(*columns, len(items)), tiling, 1, True)
    case.compare(*attend_part(case, part, batch.block_tables))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_batch_order_changes_nothing(queries: int, dtype: torch.dtype) -> None:
    count = 10
    case = make([(queries, 5 + 29 * at % 200) for at in range(count)], dtype=dtype)
    first, first_lse = attend(case)
    order = torch.randperm(count, generator=torch.manual_seed(3))
    case.lengths = [case.lengths[at] for at in order]
    case.tables = case.tables[order]
    tokens = (order[:, None] * queries + torch.arange(queries)).flatten().to(DEVICE)
    case.query = case.query[tokens]
    second, second_lse = attend(case)
    assert relative_error(second, first[tokens]) < TOLERANCE[dtype]
    torch.testing.assert_close(second_lse, first_lse[tokens], atol=1e-3, rtol=0)


def test_a_captured_plan_serves_other_lengths() -> None:
    """A graph replays the launches it was captured with, over lengths that have changed."""
    case = make([(1, 400), (1, 20), (1, 1), (1, 90)])
    batch = case.batch()
    tiling, _ = tilings(case)
    lengths = batch.context_lengths.clone()
    launch, planned = plan_launch(lengths, tiling.keys, 8, 20, 1, None)
    part = Part(planned, tiling, 1, True)
    for shorter in (0, 1, 250, 1000, 3):
        lengths.copy_((batch.context_lengths - shorter).clamp(min=0))
        launch.run()
        output, lse = attend_part(case, part, batch.block_tables)
        case.lengths = [(1, length) for length in lengths.tolist()]
        case.compare(output, lse)
        case.lengths = [(1, length) for length in batch.host.context_lengths.tolist()]


def test_a_plan_is_made_once_for_all_layers() -> None:
    case = make(MIXED)
    batch = case.batch()
    first = plan(batch, case.query, case.key_blocks, None)
    assert plan(batch, case.query, case.key_blocks, None) is first
    assert [part.one_query for part in first] == [True, False]
    assert plan(batch, case.query, case.key_blocks, 16) is not first


def assert_covers(planned: WorkList, tiles: QueryTiles) -> None:
    """Every tile's items join up to its keys, and partials are numbered without gaps."""
    items = [row for row in planned.items.tolist() if row[0] >= 0]
    by_token: dict[int, list[list[int]]] = {}
    for row in items:
        by_token.setdefault(row[1], []).append(row)
    next_partial = 0
    merges = planned.tiles.tolist()
    columns = zip(*(column.tolist() for column in tiles), merges, strict=True)
    for sequence, token, count, position, first_key, end_key, merge in columns:
        pieces = sorted(by_token.pop(token), key=lambda row: row[4])
        assert all(row[:4] == [sequence, token, count, position] for row in pieces)
        bounds = [row[4] for row in pieces] + [pieces[-1][5]]
        assert bounds == [first_key, *(row[5] for row in pieces)] and bounds[-1] == end_key
        if len(pieces) == 1:
            assert pieces[0][6] == -1 and merge[3] == 0
            continue
        assert all(row[4] < row[5] for row in pieces)
        assert merge == [token, count, next_partial, len(pieces)]
        assert [row[6] for row in pieces] == list(range(next_partial, next_partial + len(pieces)))
        next_partial += len(pieces)
    assert not by_token and next_partial <= planned.partial_count


LENGTHS = st.lists(st.integers(0, 60) | st.integers(0, 5000), min_size=1, max_size=40)
WINDOWS = st.none() | st.integers(1, 600)
RESIDENT = st.integers(1, 500)
ROOM = st.integers(0, 600)


def plan_both(
    lengths: list[int], window: int | None, keys: int, resident: int, room: int, cost: int
) -> tuple[WorkList, WorkList, QueryTiles]:
    """The device's work list and the host's, and what they are lists of."""
    contexts = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    tiles = query_tiles(starts, contexts, 1, window)
    numbers = (keys, resident, len(lengths) + room, cost)
    on_device = plan_decodes(contexts.to(DEVICE), *numbers, window)
    found = WorkList(on_device.items.cpu(), on_device.tiles.cpu(), on_device.partial_count)
    return found, cut_work(tiles, *numbers, IDLE_DECODES), tiles


def assert_planners_agree(
    lengths: list[int], window: int | None, keys: int, resident: int, room: int, cost: int
) -> None:
    found, expected, tiles = plan_both(lengths, window, keys, resident, room, cost)
    rows = found.items[found.items[:, 0] >= 0, :7].tolist()
    assert sorted(rows) == sorted(expected.items[:, :7].tolist())
    assert found.tiles.tolist() == expected.tiles.tolist()
    assert (found.items[len(rows) :, 0] == -1).all()
    assert_covers(found, tiles)
    assert_covers(expected, tiles)
    # What was cut comes first, the longest pieces before what is left of each sequence.
    spans = [-(-(row[5] - row[4]) // keys) for row in rows]
    if len(rows) > len(lengths):
        assert sorted(spans, key=lambda span: span < max(spans)) == spans


@settings(max_examples=30, deadline=None)
@given(LENGTHS, WINDOWS, st.sampled_from([16, 64]), RESIDENT, ROOM, st.sampled_from([0, 1]))
def test_planners_agree(
    lengths: list[int], window: int | None, keys: int, resident: int, room: int, cost: int
) -> None:
    assert_planners_agree(lengths, window, keys, resident, room, cost)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("resident", [1, 396])
def test_planners_agree_at_extremes(resident: int, window: int | None) -> None:
    generator = torch.manual_seed(resident)
    thousand = torch.randint(0, 9000, (1000,), generator=generator).tolist()
    for lengths in ([0], [1], [1 << 20], [0] * 33, [1 << 20, *[3] * 63], thousand, [5000] * 32):
        assert_planners_agree(lengths, window, 64, resident, 2 * resident, 1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2000)), min_size=1, max_size=12),
    st.sampled_from([1, 3, 16, 128]),
    st.sampled_from([16, 64]),
    WINDOWS,
    RESIDENT,
    ROOM,
    st.integers(0, 8),
)
def test_chunks_are_covered(
    lengths: list[tuple[int, int]],
    tokens: int,
    keys: int,
    window: int | None,
    resident: int,
    room: int,
    cost: int,
) -> None:
    """Every query is in one tile, and every tile's items join up to the keys that it sees."""
    counts = torch.tensor([0] + [count for count, _ in lengths]).cumsum(0).to(torch.int32)
    contexts = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    tiles = query_tiles(counts, contexts, tokens, window)
    taken = torch.repeat_interleave(tiles.token_count.long()).bincount(
        minlength=tiles.token.shape[0]
    )
    assert torch.equal(taken.int(), tiles.token_count)
    queries = [
        (sequence, token + at, position + at)
        for sequence, token, count, position in zip(
            *(column.tolist() for column in tiles[:4]), strict=True
        )
        for at in range(count)
    ]
    assert queries == [
        (sequence, int(counts[sequence]) + at, length - count + at)
        for sequence, (count, length) in enumerate(lengths)
        for at in range(count)
    ]
    planned = cut_work(tiles, keys, resident, len(tiles.token) + room, cost)
    assert planned.items.shape[0] <= len(tiles.token) + room
    assert_covers(planned, tiles)


def test_too_small_a_capacity_is_refused() -> None:
    starts = torch.arange(4, dtype=torch.int32)
    tiles = query_tiles(starts, torch.tensor([5, 6, 7], dtype=torch.int32), 1, None)
    with pytest.raises(ValueError, match="capacity"):
        cut_work(tiles, 16, 8, 2, 1)


def test_parts_fit_the_device() -> None:
    """Decodes have room for each sequence and for splits; chunks are cut on the host."""
    case = make(MIXED)
    batch = case.batch()
    decode, prefill = tilings(case)
    part = plan_decode_part(batch, decode, 2, None)
    assert part.work.items.shape[0] >= 2 * batch.decode_count
    assert_covers(
        WorkList(part.work.items.cpu(), part.work.tiles.cpu(), part.work.partial_count),
        query_tiles(torch.arange(5, dtype=torch.int32), batch.host.context_lengths[:4], 1, None),
    )
    assert not plan_chunk_part(batch, prefill, 2, 2, None).one_query
