"""Kernels against a naive reference in float64, one query and one head at a time."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels import AttentionBatch, copy_blocks, paged_attention, swap_blocks, write_cache
from tests.kernel_cases import FP8, LAYOUTS, TOLERANCE, Case, edges


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes are tiny, and threads that wait for a busy core take a hundred times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run(case: Case, **options: object) -> Tensor:
    return paged_attention(
        case.query,
        case.key_blocks,
        case.value_blocks,
        case.batch(),
        scale=case.scale,
        key_scales=case.key_scales,
        value_scales=case.value_scales,
        **options,  # type: ignore[arg-type]
    )


def _check(case: Case, **options: object) -> None:
    case.compare(_run(case, **options), **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 80])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_heads_and_dtypes(group: int, head_size: int, dtype: torch.dtype) -> None:
    shape = {"heads": 2 * group, "kv_heads": 2, "head_size": head_size, "dtype": dtype}
    _check(Case(edges(16), **shape))  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 13},
        {"softcap": 2.0},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0])},
        {"alibi_slopes": torch.tensor([0.5, 0.1, 1.0, 0.0]), "softcap": 2.0, "sliding_window": 9},
        {"sliding_window": 20, "softcap": 1.5, "sinks": torch.tensor([1.0, 0.0, 3.0, -2.0])},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_options_at_blockedges(options: dict[str, object], block_size: int) -> None:
    _check(Case(edges(block_size), block_size=block_size), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    _check(Case(edges(16), layout=layout))
    _check(Case([(1, 1)], kv_heads=1, layout=layout))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"softcap": 3.0}], ids=str)
def test_long_chunks_are_tiled(options: dict[str, object]) -> None:
    lengths = [(1, 700), (600, 650), (257, 257), (256, 300), (3, 500), (2, 2)]
    _check(Case(lengths, heads=2, kv_heads=1), **options)


def test_many_groups() -> None:
    """Enough keys of different lengths that the batch is cut into several groups."""
    lengths = [(1, 1 + 37 * at % 411) for at in range(60)] + [(1, 3000)]
    _check(Case(lengths, heads=2, kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_order_changes_nothing(dtype: torch.dtype) -> None:
    """A decode's result does not depend on its place in the batch."""
    case = Case([(1, 1 + 29 * at % 200) for at in range(24)], dtype=dtype)
    first = _run(case)
    order = torch.randperm(24, generator=torch.manual_seed(3))
    case.lengths = [case.lengths[at] for at in order]
    case.query, case.tables = case.query[order], case.tables[order]
    torch.testing.assert_close(_run(case), first[order], rtol=0, atol=0)


def test_a_sequence_full_of_nan_harms_no_other() -> None:
    case = Case([(1, 40), (1, 41), (1, 3), (20, 30), (9, 30)])
    expected = _run(case)
    for sequence in (0, 3):
        used = case.tables[sequence][case.tables[sequence] > 0].long()
        case.key_blocks[used] = float("nan")
        case.value_blocks[used] = float("inf")
    result = _run(case)
    others = [1, 2, *range(23, 32)]
    torch.testing.assert_close(result[others], expected[others], rtol=0, atol=0)
    assert not result[0].isfinite().any() and not result[3:23].isfinite().any()


def test_queries_without_keys_get_zeros() -> None:
    result = _run(Case([(1, 0), (1, 5), (4, 2)]))
    assert not result[0].any() and not result[2:4].any()
    assert result[1].all() and result[4:].all()


def test_an_empty_batch() -> None:
    assert _run(Case([])).shape == (0, 4, 32)


def test_nothing_is_computed_twice_for_later_layers() -> None:
    case = Case([(1, 40), (20, 30)])
    batch = case.batch()
    paged_attention(case.query, case.key_blocks, case.value_blocks, batch, scale=1.0)
    derived = list(batch._derived)
    for _ in range(2):
        paged_attention(case.query, case.key_blocks, case.value_blocks, batch, scale=1.0)
    assert list(batch._derived) == derived
    paged_attention(
        case.query, case.key_blocks, case.value_blocks, batch, scale=1.0, sliding_window=8
    )
    assert len(batch._derived) == len(derived) + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes(layout: str) -> None:
    case = Case([(1, 17), (1, 5), (9, 20)], layout=layout)
    batch = case.batch()
    key = torch.randn(2, 11, 32).transpose(0, 1)
    value = torch.randn(11, 2, 32)
    before = case.key_blocks.clone(), case.value_blocks.clone()
    write_cache(key, value, case.key_blocks, case.value_blocks, batch)
    positions = [(0, 16), (1, 4), *((2, at) for at in range(11, 20))]
    for token, (sequence, position) in enumerate(positions):
        block, offset = case.slot(sequence, position)
        for blocks, given, old in zip(
            (case.key_blocks, case.value_blocks), (key, value), before, strict=True
        ):
            assert torch.equal(blocks[block, :, offset], given[token])
            old[block, :, offset] = given[token]
    assert torch.equal(case.key_blocks.nan_to_num(9), before[0].nan_to_num(9))
    assert torch.equal(case.value_blocks.nan_to_num(9), before[1].nan_to_num(9))


def test_fp8_writes_are_in_units_of_each_heads_scale() -> None:
    case = Case([(3, 3)], dtype=FP8)
    scales = torch.tensor([0.5, 2.0])
    key = torch.tensor([1.0, -3.3, 1e6])[:, None, None].expand(3, 2, 32).contiguous()
    write_cache(
        key,
        -key,
        case.key_blocks,
        case.value_blocks,
        case.batch(),
        key_scales=scales,
        value_scales=scales,
    )
    block, _ = case.slot(0, 0)
    for blocks, sign in ((case.key_blocks, 1), (case.value_blocks, -1)):
        written = blocks[block, :, :3, 0].float()
        assert torch.equal(written, sign * torch.tensor([[2.0, -6.5, 448], [0.5, -1.625, 448]]))


def test_slot_minus_one_is_not_written() -> None:
    case = Case([(3, 3)])
    batch = case.batch()
    batch.slot_mapping[1] = -1
    batch.slot_mapping[2] = 5
    case.key_blocks.zero_()
    case.value_blocks.zero_()
    key = torch.arange(1.0, 4)[:, None, None].expand(3, 2, 32)
    write_cache(key, key, case.key_blocks, case.value_blocks, batch)
    assert set(case.key_blocks.unique().tolist()) == {0, 1, 3}
    assert case.key_blocks[0, 0, 5, 0] == 3


def test_a_batch_may_write_nothing() -> None:
    case = Case([(2, 2)])
    batch = case.batch()
    batch.slot_mapping.fill_(-1)
    key = torch.ones(2, 2, 32)
    before = case.key_blocks.clone()
    write_cache(key, key, case.key_blocks, case.value_blocks, batch)
    assert torch.equal(case.key_blocks.nan_to_num(9), before.nan_to_num(9))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_first", [True, False])
def test_copies_and_swaps(block_first: bool, dtype: torch.dtype) -> None:
    generator = torch.manual_seed(0)
    shape = (8, 3, 2, 2, 4, 16) if block_first else (3, 8, 2, 2, 4, 16)
    slab, host = torch.randn((2, *shape), generator=generator).to(dtype)
    if block_first:
        slab, host = slab.transpose(0, 1), host.transpose(0, 1)
    before, host_before = slab.clone(), host.clone()
    copy_blocks(slab, torch.tensor([0, 4, 4]), torch.tensor([1, 2, 3]))
    for destination, source in enumerate((0, 0, 4, 4, 4, 5, 6, 7)):
        assert torch.equal(slab[:, destination].float(), before[:, source].float())
    swap_blocks(slab, host, torch.tensor([7, 4]), torch.tensor([0, 3]))
    for destination, source in enumerate((7, None, None, 4, None, None, None, None)):
        expected = host_before[:, destination] if source is None else before[:, source]
        assert torch.equal(host[:, destination].float(), expected.float())


def test_ids_beyond_the_cache_are_refused() -> None:
    case = Case([(1, 20)])
    slab = torch.zeros(2, 4, 8)
    for sources, destinations in (
        ([9], [0]),
        ([0], [9]),
        ([-9], [0]),
        ([0], [0]),
        ([0, 1], [2, 2]),
    ):
        with pytest.raises(ValueError):
            copy_blocks(slab, torch.tensor(sources), torch.tensor(destinations))
    case.tables[0, 1] = 1000
    with pytest.raises(ValueError):
        _run(case)
    batch = case.batch()
    key = torch.ones(1, 2, 32)
    with pytest.raises(ValueError):
        write_cache(key, key, case.key_blocks, case.value_blocks, batch)


def test_wrong_arguments_are_named() -> None:
    case = Case([(1, 20), (2, 9)])
    batch = case.batch()
    good = [case.query, case.key_blocks, case.value_blocks]
    for place, bad, name in (
        (0, case.query[:, 0], "query"),
        (0, case.query[:2], "query"),
        (0, case.query[:, :3], "query"),
        (0, case.query.double(), "query"),
        (1, case.key_blocks[0], "key_blocks"),
        (2, case.value_blocks[1:], "value_blocks"),
        (2, case.value_blocks.half(), "value_blocks"),
    ):
        arguments = [*good[:place], bad, *good[place + 1 :]]
        with pytest.raises(ValueError, match=name):
            paged_attention(*arguments, batch, scale=1.0)
    with pytest.raises(ValueError, match="sinks"):
        paged_attention(*good, batch, scale=1.0, sinks=torch.zeros(3))
    for options in (
        {"sliding_window": 0},
        {"scale": -1.0},
        {"softcap": 0.0},
        {"alibi_slopes": torch.zeros(2)},
        {"key_scales": torch.ones(2)},
    ):
        (name,) = options
        with pytest.raises(ValueError, match=name):
            paged_attention(*good, batch, **({"scale": 1.0} | options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="value_scales"):
        fp8 = [blocks.to(FP8) for blocks in good[1:]]
        paged_attention(case.query, *fp8, batch, scale=1.0, key_scales=torch.ones(2))
    with pytest.raises(ValueError, match="key_blocks"):
        flipped = [blocks.transpose(2, 3) for blocks in good[1:]]
        paged_attention(torch.zeros(3, 4, 16), *flipped, batch, scale=1.0)
    key = torch.zeros(3, 2, 32)
    for arguments, name in (
        ((key[:2], key), "key"),
        ((key, key.half()), "value"),
        ((key, key[:, :1]), "value"),
    ):
        with pytest.raises(ValueError, match=name):
            write_cache(*arguments, case.key_blocks, case.value_blocks, batch)
    with pytest.raises(ValueError, match="destinations"):
        copy_blocks(torch.zeros(2, 4, 8), torch.tensor([1]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="destination_slab"):
        ids = torch.tensor([1])
        swap_blocks(torch.zeros(2, 4, 8), torch.zeros(3, 4, 8), ids, ids)


def test_wrong_batches_are_named() -> None:
    good = {
        "query_starts": torch.tensor([0, 1, 3], dtype=torch.int32),
        "context_lengths": torch.tensor([4, 5], dtype=torch.int32),
        "block_tables": torch.tensor([[1], [2]], dtype=torch.int32),
        "slot_mapping": torch.tensor([1, 2, 3]),
        "decode_count": 1,
    }
    for name, bad in (
        ("query_starts", torch.tensor([0, 3], dtype=torch.int32)),
        ("context_lengths", torch.tensor([4, 5])),
        ("block_tables", torch.tensor([1, 2], dtype=torch.int32)),
        ("block_tables", torch.tensor([[1]], dtype=torch.int32)),
        ("slot_mapping", torch.tensor([1, 2])),
        ("decode_count", 2),
        ("decode_count", 3),
    ):
        with pytest.raises(ValueError, match=name):
            AttentionBatch.build(**(good | {name: bad}))  # type: ignore[arg-type]
    AttentionBatch.build(**good)  # type: ignore[arg-type]


def test_imports_only_torch_triton_and_the_standard_library() -> None:
    allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    assert not hasattr(kernels, "__version__")
    for path in Path(kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, path
