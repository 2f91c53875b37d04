"""Batches of random sequences in scattered blocks, and what attention over them must give.

The torch path and the Triton kernels are held to the same naive reference in
float64, which works on one query at a time and knows nothing of blocks.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import AttentionBatch

FP8 = torch.float8_e4m3fn
# Relative error of the whole output, by the dtype of the cache.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2, FP8: 2e-2}
LSE_TOLERANCE = 1e-3
# Where the Triton kernels run, and on what: in the interpreter on everything.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_DTYPES = [
    dtype
    for dtype in TOLERANCE
    if dtype != FP8 or DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
]
LAYOUTS = ("block", "layer", "own", "token", "padded")


class Case:
    """Sequences of (queries, keys) with random contents in scattered blocks.

    Sequences of one query that come first are decodes, all others are chunks. Every
    slot that no sequence wrote holds NaN, and unused table entries are 0, a block
    that is all NaN. dtype: of the cache, and unless it is fp8 of the queries. An fp8
    cache has one scale a head, for keys and for values.
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
        query_dtype: torch.dtype | None = None,
        seed: int = 0,
        layout: str = "block",
        device: str = "cpu",
    ) -> None:
        generator = torch.manual_seed(seed)
        self.lengths, self.block_size, self.device = lengths, block_size, device
        query_dtype = query_dtype or (torch.bfloat16 if dtype == FP8 else dtype)
        counts = [-(-keys // block_size) for _, keys in lengths]
        blocks = sum(counts) + 5
        ids = (torch.randperm(blocks - 1, generator=generator) + 1).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max([*counts, 1]), dtype=torch.int32)
        self.key_blocks, self.value_blocks = slab_views(
            layout, blocks, kv_heads, block_size, head_size, dtype, device
        )
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None
        if dtype == FP8:
            scales = torch.rand(2, kv_heads, generator=generator) + 0.25
            self.key_scales, self.value_scales = scales.to(device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        used = 0
        for at, (count, (_, length)) in enumerate(zip(counts, lengths, strict=True)):
            self.tables[at, :count] = ids[used : used + count]
            used += count
            shape = (length, kv_heads, head_size)
            for kept, stored, scale in (
                (self.keys, self.key_blocks, self.key_scales),
                (self.values, self.value_blocks, self.value_scales),
            ):
                rows = torch.randn(shape, generator=generator)
                kept.append(self._fill(at, stored, rows, scale, dtype))
        tokens = sum(queries for queries, _ in lengths)
        query = torch.randn(tokens, heads, head_size, generator=generator)
        self.query = query.to(device, query_dtype)

    def _fill(
        self, sequence: int, blocks: Tensor, rows: Tensor, scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Put a sequence's keys or values into its blocks; what a reader finds there."""
        factor = torch.ones(rows.shape[1]) if scale is None else scale.cpu()
        rows = (rows / factor[:, None]).to(dtype)
        for start in range(0, rows.shape[0], self.block_size):
            block, _ = self.slot(sequence, start)
            part = rows[start : start + self.block_size].transpose(0, 1)
            blocks[block, :, : part.shape[1]] = part.to(blocks.device)
        return rows.double() * factor[:, None].double()

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.query.shape[2])

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
            device=self.device,
        )

    def reference(
        self,
        *,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and log-sum-exp [T, H], sinks included, in float64."""
        heads = self.query.shape[1]
        sink = torch.full((heads, 0), 0.0).double()
        if sinks is not None:
            sink = sinks.cpu().double()[:, None]
        outputs, sums = [], []
        for query, keys, values, position in self._queries():
            first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
            seen = slice(first, position + 1)
            scores = (keys[:, seen] @ query[:, :, None])[..., 0] * self.scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                distance = torch.arange(first, position + 1) - position
                scores = scores + alibi_slopes.cpu().double()[:, None] * distance
            scores = torch.cat([scores, sink], 1)
            weights = torch.softmax(scores, 1)[:, None, : position + 1 - first]
            outputs.append((weights @ values[:, seen])[:, 0])
            sums.append(torch.logsumexp(scores, 1))
        if not outputs:
            return self.query.cpu().double(), torch.empty(0, heads).double()
        return torch.stack(outputs), torch.stack(sums)

    def _queries(self) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Each query with the keys and values of its sequence, [H, L, D], and its position;
        those that stand before position 0 see nothing and are given position -1."""
        queries = iter(self.query.cpu().double())
        for keys, values, (count, length) in zip(self.keys, self.values, self.lengths, strict=True):
            repeat = self.query.shape[1] // keys.shape[1]
            keys, values = (
                each.repeat_interleave(repeat, 1).transpose(0, 1) for each in (keys, values)
            )
            for position in range(length - count, length):
                yield next(queries), keys, values, max(position, -1)

    def compare(self, output: Tensor, lse: Tensor | None = None, **options: Any) -> None:
        """Assert that a result, as attention with these options, is the reference's."""
        expected, expected_lse = self.reference(**options)
        assert output.shape == self.query.shape and output.dtype == self.query.dtype
        tolerance = TOLERANCE[self.key_blocks.dtype]
        assert relative_error(output, expected) < tolerance, relative_error(output, expected)
        if lse is not None:
            finite = expected_lse.isfinite()
            assert torch.equal(lse.cpu()[~finite], expected_lse[~finite].float())
            difference = (lse.cpu() - expected_lse)[finite].abs()
            assert not difference.numel() or difference.max() < LSE_TOLERANCE


def edges(block_size: int) -> list[tuple[int, int]]:
    """Decodes and chunks around every boundary, ragged."""
    around = (0, 1, block_size - 1, block_size, block_size + 1, 3 * block_size + 5)
    decodes = [(1, length) for length in around]
    chunks = [(length, length) for length in around if length]
    later = [(count, count + block_size + 3) for count in (1, 2, 7, block_size)]
    return decodes + chunks + later


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Of the whole, by norm; NaN where anything is NaN."""
    difference = result.cpu().double() - expected.cpu().double()
    return float(difference.norm() / expected.cpu().double().norm().clamp(min=1e-30))


def slab_views(
    layout: str,
    blocks: int,
    kv_heads: int,
    block_size: int,
    head_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Keys and values [N, Hkv, block_size, D] of one of two layers, filled with NaN.

    block, layer: one slab for all layers, with that dimension outermost. own: a slab
    for each layer. token: the heads of a token are neighbours. padded: rows are longer
    than heads. far: blocks are so far apart that the last two lie beyond element 2^32,
    which no 32-bit offset reaches, with a sign or without.
    """
    head = (kv_heads, block_size, head_size)
    if layout == "block":
        slab = filled_with_nan((blocks, 2, 2, *head), dtype, device)
        return slab[:, 1, 0], slab[:, 1, 1]
    if layout == "layer":
        slab = filled_with_nan((2, 2, blocks, *head), dtype, device)
        return slab[1, 0], slab[1, 1]
    if layout == "own":
        slab = filled_with_nan((2, blocks, *head), dtype, device)
        return slab[0], slab[1]
    if layout == "token":
        slab = filled_with_nan((blocks, block_size, 2, kv_heads, head_size), dtype, device)
        return slab[:, :, 0].transpose(1, 2), slab[:, :, 1].transpose(1, 2)
    if layout == "padded":
        slab = filled_with_nan((2, kv_heads, blocks, block_size, head_size + 8), dtype, device)
        return slab[0, ..., :head_size].transpose(0, 1), slab[1, ..., :head_size].transpose(0, 1)
    assert layout == "far"
    step = (1 << 32) // (blocks - 2) // 16 * 16 + 16
    steps = (step, math.prod(head), block_size * head_size, head_size, 1)
    slab = address_space(step * blocks, dtype, device).as_strided((blocks, 2, *head), steps)
    for block in slab:
        block.copy_(filled_with_nan(block.shape, dtype, device))
    return slab[:, 0], slab[:, 1]


def filled_with_nan(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.full(shape, float("nan"), device=device).to(dtype)


def address_space(count: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """So many elements, of which only those that are touched take memory on a CPU."""
    if device != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)
