"""Kernels against a naive reference in float64, one query and one head at a time."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels import AttentionBatch, copy_blocks, paged_attention, swap_blocks, write_cache

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes are tiny, and threads that wait for a busy core take a hundred times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """Sequences of (queries, keys) with random contents in scattered blocks.

    Every slot that no sequence wrote holds NaN, and unused table entries are 0,
    a block that is all NaN.
    """

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_size: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        layout: str = "block",
    ) -> None:
        generator = torch.manual_seed(seed)
        self.lengths, self.block_size = lengths, block_size
        counts = [-(-keys // block_size) for _, keys in lengths]
        blocks = sum(counts) + 5
        ids = (torch.randperm(blocks - 1, generator=generator) + 1).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max([*counts, 1]), dtype=torch.int32)
        self.key_blocks, self.value_blocks = _slab(
            layout, blocks, kv_heads, block_size, head_size, dtype
        )
        self.keys, self.values, used = [], [], 0
        for at, (count, (_, length)) in enumerate(zip(counts, lengths, strict=True)):
            self.tables[at, :count] = ids[used : used + count]
            used += count
            shape = (length, kv_heads, head_size)
            self.keys.append(torch.randn(shape, generator=generator).to(dtype))
            self.values.append(torch.randn(shape, generator=generator).to(dtype))
            for position in range(length):
                block, offset = self.slot(at, position)
                self.key_blocks[block, :, offset] = self.keys[at][position]
                self.value_blocks[block, :, offset] = self.values[at][position]
        tokens = sum(queries for queries, _ in lengths)
        self.query = torch.randn(tokens, heads, head_size, generator=generator).to(dtype)

    def slot(self, sequence: int, position: int) -> tuple[int, int]:
        block = int(self.tables[sequence, position // self.block_size])
        return block, position % self.block_size

    def batch(self) -> AttentionBatch:
        queries = torch.tensor([0] + [queries for queries, _ in self.lengths])
        slots = []
        for at, (count, length) in enumerate(self.lengths):
            for position in range(length - count, length):
                block, offset = self.slot(at, position) if position >= 0 else (-1, 0)
                slots.append(block * self.block_size + offset if block >= 0 else -1)
        decodes = 0
        while decodes < len(self.lengths) and self.lengths[decodes][0] == 1:
            decodes += 1
        return AttentionBatch.build(
            queries.cumsum(0).to(torch.int32),
            torch.tensor([length for _, length in self.lengths], dtype=torch.int32),
            self.tables,
            torch.tensor(slots, dtype=torch.int64),
            decodes,
        )

    def run(self, **options: object) -> Tensor:
        scale = 1 / math.sqrt(self.query.shape[2])
        return paged_attention(
            self.query,
            self.key_blocks,
            self.value_blocks,
            self.batch(),
            scale=scale,
            **options,  # type: ignore[arg-type]
        )

    def reference(
        self,
        *,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        rows = []
        scale = 1 / math.sqrt(self.query.shape[2])
        for keys, values, (count, length) in zip(self.keys, self.values, self.lengths, strict=True):
            repeat = self.query.shape[1] // keys.shape[1]
            keys, values = (
                each.double().repeat_interleave(repeat, 1).transpose(0, 1)
                for each in (keys, values)
            )
            for position in range(length - count, length):
                query = self.query[len(rows)].double()
                first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
                if position < 0:
                    rows.append(torch.zeros_like(query))
                    continue
                scores = (keys[:, first : position + 1] @ query[:, :, None])[..., 0] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks.double()[:, None]], 1)
                weights = torch.softmax(scores, 1)[:, None, : position + 1 - first]
                rows.append((weights @ values[:, first : position + 1])[:, 0])
        return torch.stack(rows)

    def check(self, **options: object) -> None:
        result = self.run(**options)
        expected = self.reference(**options)  # type: ignore[arg-type]
        assert result.shape == self.query.shape and result.dtype == self.query.dtype
        error = (result.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < TOLERANCE[self.query.dtype], float(error)


def _slab(
    layout: str, blocks: int, kv_heads: int, block_size: int, head_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [N, Hkv, block_size, D] of one of two layers, filled with NaN."""
    nan = float("nan")
    if layout == "block":
        slab = torch.full((blocks, 2, 2, kv_heads, block_size, head_size), nan, dtype=dtype)
        return slab[:, 1, 0], slab[:, 1, 1]
    if layout == "layer":
        slab = torch.full((2, 2, blocks, kv_heads, block_size, head_size), nan, dtype=dtype)
        return slab[1, 0], slab[1, 1]
    if layout == "token":
        slab = torch.full((blocks, block_size, 2, kv_heads, head_size), nan, dtype=dtype)
        return slab[:, :, 0].transpose(1, 2), slab[:, :, 1].transpose(1, 2)
    assert layout == "padded"
    slab = torch.full((2, kv_heads, blocks, block_size, head_size + 8), nan, dtype=dtype)
    return slab[0, ..., :head_size].transpose(0, 1), slab[1, ..., :head_size].transpose(0, 1)


def _edges(block_size: int) -> list[tuple[int, int]]:
    """Decodes and chunks around every boundary, ragged."""
    around = (0, 1, block_size - 1, block_size, block_size + 1, 3 * block_size + 5)
    decodes = [(1, length) for length in around]
    chunks = [(length, length) for length in around if length]
    later = [(count, count + block_size + 3) for count in (1, 2, 7, block_size)]
    return decodes + chunks + later


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 80])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_heads_and_dtypes(group: int, head_size: int, dtype: torch.dtype) -> None:
    shape = {"heads": 2 * group, "kv_heads": 2, "head_size": head_size, "dtype": dtype}
    Case(_edges(16), **shape).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 13},
        {"softcap": 2.0},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"sliding_window": 20, "softcap": 1.5, "sinks": torch.tensor([1.0, 0.0, 3.0, -2.0])},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_options_at_block_edges(options: dict[str, object], block_size: int) -> None:
    Case(_edges(block_size), block_size=block_size).check(**options)


@pytest.mark.parametrize("layout", ["block", "layer", "token", "padded"])
def test_layouts(layout: str) -> None:
    Case(_edges(16), layout=layout).check()
    Case([(1, 1)], kv_heads=1, layout=layout).check()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"softcap": 3.0}], ids=str)
def test_long_chunks_are_tiled(options: dict[str, object]) -> None:
    lengths = [(1, 700), (600, 650), (257, 257), (256, 300), (3, 500), (2, 2)]
    Case(lengths, heads=2, kv_heads=1).check(**options)


def test_many_groups() -> None:
    """Enough keys of different lengths that the batch is cut into several groups."""
    lengths = [(1, 1 + 37 * at % 411) for at in range(60)] + [(1, 3000)]
    Case(lengths, heads=2, kv_heads=1).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_order_changes_nothing(dtype: torch.dtype) -> None:
    """A decode's result does not depend on its place in the batch."""
    case = Case([(1, 1 + 29 * at % 200) for at in range(24)], dtype=dtype)
    first = case.run()
    order = torch.randperm(24, generator=torch.manual_seed(3))
    case.lengths = [case.lengths[at] for at in order]
    case.query, case.tables = case.query[order], case.tables[order]
    torch.testing.assert_close(case.run(), first[order], rtol=0, atol=0)


def test_a_sequence_full_of_nan_harms_no_other() -> None:
    case = Case([(1, 40), (1, 41), (1, 3), (20, 30), (9, 30)])
    expected = case.run()
    for sequence in (0, 3):
        used = case.tables[sequence][case.tables[sequence] > 0].long()
        case.key_blocks[used] = float("nan")
        case.value_blocks[used] = float("inf")
    result = case.run()
    others = [1, 2, *range(23, 32)]
    torch.testing.assert_close(result[others], expected[others], rtol=0, atol=0)
    assert not result[0].isfinite().any() and not result[3:23].isfinite().any()


def test_queries_without_keys_get_zeros() -> None:
    result = Case([(1, 0), (1, 5), (4, 2)]).run()
    assert not result[0].any() and not result[2:4].any()
    assert result[1].all() and result[4:].all()


def test_an_empty_batch() -> None:
    assert Case([]).run().shape == (0, 4, 32)


def test_nothing_is_computed_twice_for_later_layers() -> None:
    case = Case([(1, 40), (20, 30)])
    batch = case.batch()
    for _ in range(3):
        paged_attention(case.query, case.key_blocks, case.value_blocks, batch, scale=1.0)
    assert len(batch._derived) == 1
    paged_attention(
        case.query, case.key_blocks, case.value_blocks, batch, scale=1.0, sliding_window=8
    )
    assert len(batch._derived) == 2


@pytest.mark.parametrize("layout", ["block", "layer", "token", "padded"])
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


@pytest.mark.parametrize("block_first", [True, False])
def test_copies_and_swaps(block_first: bool) -> None:
    generator = torch.manual_seed(0)
    shape = (8, 3, 2, 2, 4, 16) if block_first else (3, 8, 2, 2, 4, 16)
    slab, host = torch.randn((2, *shape), generator=generator)
    if block_first:
        slab, host = slab.transpose(0, 1), host.transpose(0, 1)
    before, host_before = slab.clone(), host.clone()
    copy_blocks(slab, torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3]))
    for destination, source in enumerate((0, 0, 1, 1, 4, 5, 6, 7)):
        assert torch.equal(slab[:, destination], before[:, source])
    swap_blocks(slab, host, torch.tensor([7, 4]), torch.tensor([0, 3]))
    for destination, source in enumerate((7, None, None, 4, None, None, None, None)):
        expected = host_before[:, destination] if source is None else before[:, source]
        assert torch.equal(host[:, destination], expected)


def test_ids_beyond_the_cache_are_refused() -> None:
    case = Case([(1, 20)])
    slab = torch.zeros(2, 4, 8)
    for sources, destinations in (([9], [0]), ([0], [9]), ([-9], [0])):
        with pytest.raises(IndexError):
            copy_blocks(slab, torch.tensor(sources), torch.tensor(destinations))
    case.tables[0, 1] = 1000
    with pytest.raises(IndexError):
        case.run()
    batch = case.batch()
    key = torch.ones(1, 2, 32)
    with pytest.raises(IndexError):
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
    with pytest.raises(ValueError, match="sliding_window"):
        paged_attention(*good, batch, scale=1.0, sliding_window=0)
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
