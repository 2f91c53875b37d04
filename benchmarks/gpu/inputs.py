"""Caches and queries of random contents, whose blocks lie scattered over a slab.

A slab holds as many layers as it takes to be much larger than the device's caches, as a
model's does; a benchmark works on one layer after the other with the same block tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.gpu.cases import Check, Decode, Prefill
from benchmarks.gpu.device import Device
from kernels import AttentionBatch
from kernels.options import Options

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
FP8 = torch.float8_e4m3fn
# One scale for all heads, and none for values, since that is all that some peers can do, or
# do in the kernel. Powers of two are exact. The checks have a scale for each head.
KEY_SCALE, VALUE_SCALE = 0.5, 1.0
# Rows of tables are a multiple of 16 entries long, as an engine with a largest length has
# them: numbers that 16 divides let the compiler assume aligned rows.
TABLE_MULTIPLE = 16
# So many layers as make a slab of this size, to be much larger than the device's caches.
# Two layers will do for prefills, which read little beside what they compute, and for ragged
# batches, whose contiguous cache is large.
SLAB_BYTES, MOST_LAYERS, LEAST_LAYERS = 4 << 30, 32, 2
# What inputs of one cell may take of the device's memory: peers want a cache of their own.
MEMORY_SHARE = 0.25


@dataclass
class Inputs:
    """lengths: keys of each sequence. counts: its queries, the newest tokens.

    slab: [layer, block, 2, Hkv, block_size, D]. queries: [T, H, D] of each layer.
    """

    lengths: list[int]
    counts: list[int]
    slab: Tensor
    queries: list[Tensor]
    batch: AttentionBatch
    options: Options

    @property
    def layers(self) -> int:
        return self.slab.shape[0]

    @property
    def block_size(self) -> int:
        return self.slab.shape[4]

    @property
    def kv_heads(self) -> int:
        return self.slab.shape[3]

    @property
    def heads(self) -> int:
        return self.queries[0].shape[1]

    @property
    def head_size(self) -> int:
        return self.slab.shape[5]

    @property
    def decodes(self) -> bool:
        return max(self.counts) == 1

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1 and len(set(self.counts)) == 1

    @property
    def quantised(self) -> bool:
        return self.slab.dtype == FP8

    @property
    def kv_bytes(self) -> int:
        """The fewest bytes that one layer's decodes must read."""
        row = 2 * self.kv_heads * self.head_size * self.slab.element_size()
        return sum(self.lengths) * row

    @property
    def operations(self) -> int:
        """Of the two products, causal: a query sees the keys up to its own."""
        pairs = sum(
            count * length - count * (count - 1) // 2
            for count, length in zip(self.counts, self.lengths, strict=True)
        )
        return 4 * pairs * self.heads * self.head_size

    def keys(self, layer: int) -> Tensor:
        return self.slab[layer, :, 0]

    def values(self, layer: int) -> Tensor:
        return self.slab[layer, :, 1]

    @cached_property
    def contiguous(self) -> list[tuple[Tensor, Tensor]]:
        """The same keys and values without blocks: [S, Hkv, longest, D] of each layer."""
        tables = self.batch.block_tables.long()
        columns = -(-max(self.lengths) // self.block_size)
        found = []
        for layer in range(self.layers):
            pair = [
                gather(blocks, tables[:, :columns].reshape(-1)).view(
                    len(self.lengths), columns, *blocks.shape[1:]
                )
                for blocks in (self.keys(layer), self.values(layer))
            ]
            keys, values = (blocks.transpose(1, 2).flatten(2, 3).contiguous() for blocks in pair)
            found.append((keys, values))
        return found

    @property
    def contiguous_bytes(self) -> int:
        """What `contiguous` takes: sequences are as long as the longest there."""
        row = 2 * self.kv_heads * self.head_size * self.slab.element_size()
        return self.layers * len(self.lengths) * max(self.lengths) * row

    def sequence(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """A sequence's keys and values as they are meant, in float64: [Hkv, length, D]."""
        length = self.lengths[sequence]
        ids = self.batch.block_tables[sequence, : -(-length // self.block_size)].long()
        scales = (1.0, 1.0) if not self.quantised else (KEY_SCALE, VALUE_SCALE)
        keys, values = (
            gather(blocks, ids).transpose(0, 1).flatten(1, 2)[:, :length].double() * scale
            for blocks, scale in zip((self.keys(layer), self.values(layer)), scales, strict=True)
        )
        return keys, values

    def slots(self, sequence: int) -> Tensor:
        """Where the sequence's keys are: block * block_size + offset."""
        position = torch.arange(self.lengths[sequence])
        blocks = self.batch.host.block_tables[sequence].long()[position // self.block_size]
        return blocks * self.block_size + position % self.block_size


def gather(blocks: Tensor, ids: Tensor) -> Tensor:
    """Some of the blocks. Types of 8 bits are moved as bytes, for which all devices have code."""
    if blocks.dtype == FP8:
        return blocks.view(torch.uint8).index_select(0, ids).view(FP8)
    return blocks.index_select(0, ids)


def sequences(cell: Decode | Prefill) -> tuple[list[int], list[int]]:
    """Keys and queries of each sequence."""
    if isinstance(cell, Prefill):
        return [cell.context] * cell.sequences, [cell.chunk] * cell.sequences
    if cell.lengths == "zipf":
        return zipf(cell.batch, cell.context), [1] * cell.batch
    return [cell.context] * cell.batch, [1] * cell.batch


def zipf(batch: int, mean: int) -> list[int]:
    """Lengths that fall as 1 / rank, in random order, with about this mean."""
    total = sum(1 / rank for rank in range(1, batch + 1))
    lengths = [max(1, round(batch * mean / total / rank)) for rank in range(1, batch + 1)]
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch))
    return [lengths[at] for at in order.tolist()]


def make_inputs(cell: Decode | Prefill, device: Device) -> Inputs:
    """Raises MemoryError where the device is too small for the cell."""
    lengths, counts = sequences(cell)
    pool = cell.pool if isinstance(cell, Decode) else 1
    cache = DTYPES[cell.cache]
    used = sum(-(-length // cell.block) for length in lengths)
    layer_bytes = used * pool * 2 * cell.kv_heads * cell.block * cell.head_size * cache.itemsize
    layers = LEAST_LAYERS
    if max(counts) == 1 and len(set(lengths)) == 1 and not device.dry:
        layers = min(max(SLAB_BYTES // layer_bytes, LEAST_LAYERS), MOST_LAYERS)
    if layers * layer_bytes > device.memory_bytes * (MEMORY_SHARE if pool == 1 else 0.6):
        raise MemoryError(f"the cell's cache takes {layers * layer_bytes >> 30} GiB")
    shape = (used * pool + 1, layers, cell.kv_heads, cell.block, cell.head_size)
    slab = empty_slab(shape, cell.layout, cache, device.place)
    _fill(slab)
    tables = scattered_tables(lengths, cell.block, slab.shape[1])
    batch = make_batch(lengths, counts, tables, cell.block, device.place)
    query = (sum(counts), cell.heads, cell.head_size)
    queries = [
        torch.randn(query, dtype=torch.float32, device=device.place).to(DTYPES[cell.query])
        for _ in range(layers)
    ]
    return Inputs(lengths, counts, slab, queries, batch, make_options(cell, device))


def empty_slab(
    shape: tuple[int, int, int, int, int], layout: str, dtype: torch.dtype, place: torch.device
) -> Tensor:
    """[layer, block, 2, Hkv, block_size, D] for (blocks, layers, Hkv, block_size, D).

    Block first: all layers of a block are adjacent. Layer first: all blocks of a layer are.
    """
    blocks, layers, *head = shape
    if layout == "block-first":
        slab = torch.empty((blocks, layers, 2, *head), dtype=dtype, device=place)
        return slab.transpose(0, 1)
    return torch.empty((layers, blocks, 2, *head), dtype=dtype, device=place)


def _fill(slab: Tensor) -> None:
    """With random numbers, some blocks at a time where they cannot be made in place."""
    memory = slab.transpose(0, 1) if slab.transpose(0, 1).is_contiguous() else slab
    scales = torch.tensor([KEY_SCALE, VALUE_SCALE], device=slab.device).view(2, 1, 1, 1)
    for part in memory.split(max(1, (256 << 20) // memory[0].numel())):
        if slab.dtype == FP8:
            part.copy_(torch.randn(part.shape, device=slab.device) / scales)
        else:
            part.normal_()


def scattered_tables(lengths: Sequence[int], block_size: int, blocks: int) -> Tensor:
    """Block tables of blocks in random order. Block 0 is what unused entries name."""
    counts = [-(-length // block_size) for length in lengths]
    width = -(-max(max(counts), 1) // TABLE_MULTIPLE) * TABLE_MULTIPLE
    ids = (torch.randperm(blocks - 1)[: sum(counts)] + 1).to(torch.int32)
    tables = torch.zeros(len(lengths), width, dtype=torch.int32)
    for row, chosen in zip(tables, ids.split(counts), strict=True):
        row[: len(chosen)] = chosen
    return tables


def make_batch(
    lengths: Sequence[int],
    counts: Sequence[int],
    tables: Tensor,
    block_size: int,
    place: torch.device,
) -> AttentionBatch:
    """Sequences with one query that come first are decodes."""
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    slots = []
    for table, length, count in zip(tables.long(), lengths, counts, strict=True):
        position = torch.arange(length - count, length)
        slot = table[position.clamp(min=0) // block_size] * block_size + position % block_size
        slots.append(torch.where(position < 0, -1, slot))
    decodes = next((at for at, count in enumerate(counts) if count != 1), len(counts))
    return AttentionBatch.build(
        starts,
        torch.tensor(lengths, dtype=torch.int32),
        tables,
        torch.cat(slots),
        decodes,
        device=place,
    )


def make_options(cell: Decode | Prefill | Check, device: Device) -> Options:
    """What the cell asks of a layer; a cache of fp8 has scales."""
    options = Options(1 / math.sqrt(cell.head_size))
    if cell.cache == "fp8":
        scales = torch.ones(2, cell.kv_heads, device=device.place)
        options = options._replace(
            key_scales=scales[0] * KEY_SCALE, value_scales=scales[1] * VALUE_SCALE
        )
    return options
