"""Correctness before speed: small batches at every kind of edge, with NaN in all else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.gpu import reference
from benchmarks.gpu.attention import meta_part
from benchmarks.gpu.cases import Check
from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import DTYPES, FP8, empty_slab, gather, make_batch, scattered_tables
from kernels import AttentionBatch, triton_paged
from kernels.launch import Launch
from kernels.options import Options
from kernels.tiling import decode_tiling, family_of, prefill_tiling

# The layer of two that is attended to or written; the other must stay as it was.
LAYER = 1
MOVED_BLOCKS = 9


def run(cell: Check, device: Device) -> dict[str, Any]:
    """`failed` is among the figures where something was wrong."""
    torch.manual_seed(len(cell.key))
    checks = {"attention": _attention, "write": _write, "copy": _copy, "swap": _swap}
    return checks[cell.what](cell, device)


def edges(cell: Check) -> tuple[list[int], list[int]]:
    """Keys and queries of each sequence: decodes, chunks, and one that begins before its keys."""
    block = cell.block
    decodes = [0, 1, block - 1, block, block + 1, 3 * block + 5, 300]
    chunks = [(5, 5), (4, 2), (block + 1, 3 * block), (9, 9 + 2 * block)]
    if not cell.small:
        decodes += [127, 128, 129, 700]
        chunks += [(33, 100), (130, 300), (257, 257), (3, 700)]
    lengths = [*decodes, *(keys for _, keys in chunks)]
    return lengths, [1] * len(decodes) + [queries for queries, _ in chunks]


def _attention(cell: Check, device: Device) -> dict[str, Any]:
    """The kernels as they are, with log-sum-exps; some through the public function too."""
    lengths, counts = edges(cell)
    slab, tables, scales = _cache(cell, lengths, device)
    batch = make_batch(lengths, counts, tables, cell.block, device.place)
    options = _options(cell, scales, device)
    query = torch.randn(sum(counts), cell.heads, cell.head_size, device=device.place)
    query = query.to(DTYPES[cell.query])
    cache = (slab[LAYER, :, 0], slab[LAYER, :, 1])
    lse = torch.full(query.shape[:2], float("nan"), device=device.place)
    result = triton_paged.paged_attention(query, *cache, batch, options, lse)
    results = [result]
    if cell.public:
        results.append(kernels.paged_attention(query, *cache, batch, **options._asdict()))
    wanted, wanted_lse = _expected(query, slab, batch, scales, options)
    finite = wanted_lse.isfinite()
    lse_error = (lse - wanted_lse)[finite].abs().max()
    errors = [reference.error(each, wanted) for each in results]
    figures: dict[str, Any] = {
        "error": max(errors, key=lambda error: (error != error, error)),
        "tolerance": reference.tolerance(query.dtype, slab.dtype),
        "lse_error": float(lse_error),
    }
    if not figures["error"] < figures["tolerance"]:
        figures["failed"] = f"error {figures['error']:.2g}, allowed {figures['tolerance']:.2g}"
    elif not lse_error < reference.LSE_TOLERANCE:
        figures["failed"] = f"log-sum-exp is off by {figures['lse_error']:.2g}"
    elif not torch.equal(lse[~finite].double(), wanted_lse[~finite]):
        figures["failed"] = "log-sum-exp of a query without keys is not minus infinity"
    return figures


def _cache(cell: Check, lengths: list[int], device: Device) -> tuple[Tensor, Tensor, Tensor | None]:
    """A slab of two layers that is NaN wherever no sequence has a key, its tables and scales."""
    blocks = sum(-(-length // cell.block) for length in lengths) + 3
    tables = scattered_tables(lengths, cell.block, blocks)
    shape = (blocks, 2, cell.kv_heads, cell.block, cell.head_size)
    slab = empty_slab(shape, cell.layout, DTYPES[cell.cache], device.place)
    scales = (
        torch.rand(2, cell.kv_heads, device=device.place) + 0.25 if cell.cache == "fp8" else None
    )
    slab.copy_(torch.full(slab.shape, float("nan"), device=device.place).to(slab.dtype))
    for table, length in zip(tables.long(), lengths, strict=True):
        position = torch.arange(length)
        ids, offsets = table[position // cell.block], position % cell.block
        for at in range(2):
            rows = torch.randn(length, cell.kv_heads, cell.head_size, device=device.place)
            if scales is not None:
                rows = rows / scales[at][:, None]
            _put(slab[LAYER, :, at], ids.to(rows.device), offsets.to(rows.device), rows)
    return slab, tables, scales


def _put(blocks: Tensor, ids: Tensor, offsets: Tensor, rows: Tensor) -> None:
    """Rows [N, Hkv, D] into slots of [block, Hkv, block_size, D]."""
    rows = rows.to(blocks.dtype)
    if blocks.dtype == FP8:
        blocks, rows = blocks.view(torch.uint8), rows.view(torch.uint8)
    blocks.transpose(1, 2)[ids, offsets] = rows


def _options(cell: Check, scales: Tensor | None, device: Device) -> Options:
    heads = torch.randn(cell.heads, device=device.place)
    return Options(
        1 / math.sqrt(cell.head_size),
        sliding_window=cell.window or None,
        softcap=cell.softcap or None,
        sinks=heads if cell.sinks else None,
        alibi_slopes=heads.abs() / 8 if cell.alibi else None,
        key_scales=None if scales is None else scales[0],
        value_scales=None if scales is None else scales[1],
    )


def _expected(
    query: Tensor, slab: Tensor, batch: AttentionBatch, scales: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    starts = batch.host.query_starts.tolist()
    outputs, sums = [], []
    for at, length in enumerate(batch.host.context_lengths.tolist()):
        part = query[starts[at] : starts[at + 1]]
        ids = batch.block_tables[at, : -(-length // slab.shape[4])].long()
        pair = []
        for which in range(2):
            rows = gather(slab[LAYER, :, which], ids).transpose(0, 1).flatten(1, 2)
            rows = rows[:, :length].double()
            pair.append(rows if scales is None else rows * scales[which][:, None, None].double())
        position = torch.arange(length - part.shape[0], length, device=query.device)
        output, lse = reference.attention(part, pair[0], pair[1], position, options)
        outputs.append(output)
        sums.append(lse)
    return torch.cat(outputs), torch.cat(sums)


def _write(cell: Check, device: Device) -> dict[str, Any]:
    """Slots hold what was written, to the bit, and nothing else has changed."""
    lengths, counts = edges(cell)
    slab, tables, scales = _cache(cell, lengths, device)
    batch = make_batch(lengths, counts, tables, cell.block, device.place)
    # Powers of two divide exactly, so that both sides round alike.
    scales = None if scales is None else torch.ones_like(scales) / 2
    shape = (sum(counts), cell.kv_heads, cell.head_size)
    rows = [torch.randn(shape, device=device.place).to(DTYPES[cell.query]) for _ in range(2)]
    wanted = slab.clone()
    slots = batch.host.slot_mapping
    kept = (slots >= 0).nonzero()[:, 0].to(device.place)
    slots = slots[slots >= 0].to(device.place)
    for at in range(2):
        chosen = rows[at].index_select(0, kept).float()
        if scales is not None:
            chosen = (chosen / scales[at][:, None]).clamp(-448, 448)
        _put(wanted[LAYER, :, at], slots // cell.block, slots % cell.block, chosen)
    kernels.write_cache(
        rows[0],
        rows[1],
        slab[LAYER, :, 0],
        slab[LAYER, :, 1],
        batch,
        key_scales=None if scales is None else scales[0],
        value_scales=None if scales is None else scales[1],
    )
    return _same(slab, wanted)


def _copy(cell: Check, device: Device) -> dict[str, Any]:
    slab = _random_slab(cell, device)
    ids = torch.randperm(slab.shape[1])[: 2 * MOVED_BLOCKS].to(device.place)
    sources, destinations = ids.split(MOVED_BLOCKS)
    wanted = slab.clone()
    wanted[:, destinations] = slab[:, sources]
    kernels.copy_blocks(slab, sources, destinations)
    return _same(slab, wanted)


def _swap(cell: Check, device: Device) -> dict[str, Any]:
    """Out to pinned memory and in again, elsewhere."""
    slab, wanted = _random_slab(cell, device), _random_slab(cell, device)
    there = torch.zeros(slab.transpose(0, 1).shape, dtype=slab.dtype, pin_memory=device.cuda)
    there = there.transpose(0, 1)
    if cell.layout == "layer-first":
        there = torch.zeros(slab.shape, dtype=slab.dtype, pin_memory=device.cuda)
    outside, sources, destinations = (
        torch.randperm(slab.shape[1])[:MOVED_BLOCKS] for _ in range(3)
    )
    back = wanted.clone()
    wanted[:, destinations.to(device.place)] = slab[:, sources.to(device.place)]
    kernels.swap_blocks(slab, there, sources, outside)
    kernels.swap_blocks(there, back, outside, destinations)
    device.wait()
    return _same(back, wanted)


def _random_slab(cell: Check, device: Device) -> Tensor:
    shape = (3 * MOVED_BLOCKS, 3, cell.kv_heads, cell.block, cell.head_size)
    return empty_slab(shape, cell.layout, DTYPES[cell.cache], device.place).normal_()


def _same(result: Tensor, wanted: Tensor) -> dict[str, Any]:
    """To the bit, since NaN is not equal to itself."""
    different = (result.view(torch.uint8) != wanted.view(torch.uint8)).sum()
    figures: dict[str, Any] = {"different_bytes": int(different)}
    if different:
        figures["failed"] = f"{int(different)} bytes are not what they must be"
    return figures


def launches(cell: Check, device: Device) -> list[Launch]:
    """What the attention of a check will launch, for tensors without memory."""
    if cell.what != "attention":
        return []
    lengths, counts = edges(cell)
    family, group = family_of(device.place), cell.heads // cell.kv_heads
    meta, cache = torch.device("meta"), DTYPES[cell.cache]
    shape = (3, 2, cell.kv_heads, cell.block, cell.head_size)
    slab = empty_slab(shape, cell.layout, cache, meta)
    tables = scattered_tables(lengths, cell.block, 2048).to(meta)
    query = torch.empty((sum(counts), cell.heads, cell.head_size), device=meta)
    query = query.to(DTYPES[cell.query])
    scales = torch.ones(2, cell.kv_heads, device=meta) if cell.cache == "fp8" else None
    options = _options(cell, scales, device)
    sizes = (group, cell.head_size, cache.itemsize)
    parts = (
        meta_part(decode_tiling(family, *sizes), group, True),
        meta_part(prefill_tiling(family, *sizes, max(counts)), group, False),
    )
    keys, lse = slab[LAYER, :, 0], torch.empty(query.shape[:2], device=meta)
    found = []
    for part in parts:
        for sums in (lse, None) if cell.public else (lse,):
            found += triton_paged.part_launches(
                query, query, keys, keys, tables, part, options, sums
            )
    return found
