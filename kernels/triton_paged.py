"""Plans a step's attention and launches it: decodes first, then chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.batch import AttentionBatch, upload
from kernels.launch import Launch
from kernels.options import Options
from kernels.tiling import (
    Tiling,
    decode_tiling,
    family_of,
    multiprocessors,
    power_of_two,
    prefill_tiling,
)
from kernels.triton_attention import Geometry, attend, merge
from kernels.triton_plan import plan_decodes
from kernels.work import WorkList, cut_work, query_tiles

LOG2_E = 1.4426950408889634
# A row's partials are merged so many at a time.
PARTIALS_AT_ONCE = 16
DOT_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    # To half precision an e4m3 pair converts in one instruction, to bfloat16 in several.
    torch.float8_e4m3fn: tl.float16,
}


class Part(NamedTuple):
    """Some of a step's tokens, their work list, and how it was cut. tokens: queries of a tile."""

    work: WorkList
    tiling: Tiling
    tokens: int
    one_query: bool


def paged_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    options: Options,
    lse: Tensor | None = None,
) -> Tensor:
    """`kernels.paged_attention` in Triton. lse: fp32 [T, H], filled with log-sum-exps."""
    parts = plan(batch, query, key_blocks, options.sliding_window)
    return attend_parts(query, key_blocks, value_blocks, batch.block_tables, parts, options, lse)


def attend_parts(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    parts: list[Part],
    options: Options,
    lse: Tensor | None = None,
) -> Tensor:
    """All of a step's tokens, whose parts are planned."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for part in parts:
        run_part(output, query, key_blocks, value_blocks, block_tables, part, options, lse)
    return output


def flatten(parts: list[Part]) -> tuple[list[Tensor], list[int]]:
    """Parts as what an operator can be given: tensors, and the numbers beside them."""
    tensors = [tensor for part in parts for tensor in (part.work.items, part.work.tiles)]
    numbers: list[int] = []
    for part in parts:
        tiling = astuple(part.tiling)
        numbers += [*tiling, part.work.partial_count, part.tokens, int(part.one_query)]
    return tensors, numbers


def unflatten(tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[Part]:
    """The parts that `flatten` took apart."""
    parts = []
    width = len(fields(Tiling)) + 3
    for at in range(len(tensors) // 2):
        *tiling, partial_count, tokens, one_query = numbers[at * width : (at + 1) * width]
        work = WorkList(tensors[2 * at], tensors[2 * at + 1], partial_count)
        parts.append(Part(work, Tiling(*tiling), tokens, bool(one_query)))
    return parts


def plan(
    batch: AttentionBatch, query: Tensor, key_blocks: Tensor, sliding_window: int | None
) -> list[Part]:
    """The step's parts, made for the first layer that asks and kept for the others."""
    heads, (kv_heads, _, head_size) = query.shape[1], key_blocks.shape[1:]
    itemsize = key_blocks.element_size()
    key = ("parts", heads, kv_heads, head_size, itemsize, sliding_window)
    return batch.derive(
        key, lambda: _plan(batch, heads, kv_heads, head_size, itemsize, sliding_window)
    )


def _plan(
    batch: AttentionBatch,
    heads: int,
    kv_heads: int,
    head_size: int,
    itemsize: int,
    window: int | None,
) -> list[Part]:
    group, family = heads // kv_heads, family_of(batch.context_lengths.device)
    starts, decodes = batch.host.query_starts, batch.decode_count
    counts = starts[decodes + 1 :] - starts[decodes:-1]
    parts = []
    if decodes:
        tiling = decode_tiling(family, group, head_size, itemsize)
        parts.append(plan_decode_part(batch, tiling, kv_heads, window))
    if counts.numel() and int(counts.max()):
        tiling = prefill_tiling(family, group, head_size, itemsize, int(counts.max()))
        parts.append(plan_chunk_part(batch, tiling, group, kv_heads, window))
    return parts


def plan_decode_part(
    batch: AttentionBatch, tiling: Tiling, kv_heads: int, window: int | None
) -> Part:
    """The batch's decodes, planned on the device."""
    resident = resident_items(tiling, kv_heads, batch.context_lengths.device)
    work = plan_decodes(
        batch.context_lengths[: batch.decode_count],
        tiling.keys,
        resident,
        batch.decode_count + 2 * resident,
        tiling.partial_cost,
        window,
    )
    return Part(work, tiling, 1, True)


def plan_chunk_part(
    batch: AttentionBatch, tiling: Tiling, group: int, kv_heads: int, window: int | None
) -> Part:
    """The batch's chunks, planned on the host: their shapes change every step anyway."""
    decodes, device = batch.decode_count, batch.context_lengths.device
    tiles = query_tiles(
        batch.host.query_starts[decodes:],
        batch.host.context_lengths[decodes:],
        tiling.tokens(group),
        window,
    )
    tiles = tiles._replace(sequence=tiles.sequence + decodes)
    resident = resident_items(tiling, kv_heads, device)
    capacity = tiles.sequence.shape[0] + 2 * resident
    work = cut_work(tiles, tiling.keys, resident, capacity, tiling.partial_cost)
    items, merges = upload(work.items, device), upload(work.tiles, device)
    return Part(WorkList(items, merges, work.partial_count), tiling, tiling.tokens(group), False)


def resident_items(tiling: Tiling, kv_heads: int, device: torch.device) -> int:
    """Items, of one program for each key/value head, that the device works on at once."""
    return max(1, multiprocessors(device) * tiling.programs // kv_heads)


def run_part(
    output: Tensor,
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor | None,
    part: Part,
    options: Options,
    lse: Tensor | None = None,
) -> None:
    """Attend, and merge what was cut. output: [T, H, D], contiguous.

    Without block_tables sequence i has the one block i.
    """
    launches = part_launches(
        output, query, key_blocks, value_blocks, block_tables, part, options, lse
    )
    for launch in launches:
        launch.run()


def part_launches(
    output: Tensor,
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor | None,
    part: Part,
    options: Options,
    lse: Tensor | None = None,
) -> list[Launch]:
    """The launches of `run_part`."""
    work, tiling, tokens, one_query = part
    heads, head_size = query.shape[1:]
    kv_heads = key_blocks.shape[1]
    group = heads // kv_heads
    shape = (work.partial_count, kv_heads, tokens * group, head_size)
    partial_output = torch.empty(shape, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(shape[:3], dtype=torch.float32, device=query.device)
    shared = {
        "output": output,
        "lse": lse,
        "partial_output": partial_output,
        "partial_lse": partial_lse,
        "sinks": options.sinks,
        "DIMS": power_of_two(head_size),
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "PARTIAL_ROWS": tokens * group,
    }
    arguments = {
        "items": work.items,
        "ROWS": tiling.rows,
        "ONE_QUERY": one_query,
        **_inputs(query, key_blocks, value_blocks, block_tables, tiling, options),
    }
    grid = (work.items.shape[0] * kv_heads,)
    launches = [Launch(attend, grid, shared | arguments, tiling.warps, tiling.stages)]
    if work.partial_count:
        grid = (work.tiles.shape[0] * kv_heads * tokens * group,)
        arguments = {
            "tiles": work.tiles,
            "HEAD_SIZE": head_size,
            "AT_ONCE": PARTIALS_AT_ONCE,
        }
        launches.append(Launch(merge, grid, shared | arguments, 4, 1))
    return launches


def _inputs(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor | None,
    tiling: Tiling,
    options: Options,
) -> dict[str, Any]:
    """Arguments of `attend` that say what it reads, and by which rules."""
    geometry = Geometry(
        head_stride=key_blocks.stride(1),
        offset_stride=key_blocks.stride(2),
        block_size=key_blocks.shape[2],
        head_size=key_blocks.shape[3],
        keys=tiling.keys,
        stages=tiling.stages,
        precision=_precision(key_blocks.dtype),
        paged=block_tables is not None,
        windowed=options.sliding_window is not None,
        softcap=options.softcap is not None,
        alibi=options.alibi_slopes is not None,
    )
    return {
        "query": query,
        "key_blocks": key_blocks,
        "value_blocks": value_blocks,
        "block_tables": block_tables,
        "key_scales": options.key_scales,
        "value_scales": options.value_scales,
        "alibi_slopes": options.alibi_slopes,
        "scale": options.scale,
        "softcap": (options.softcap or 0.0) * LOG2_E,
        "window": options.sliding_window or 0,
        "query_token_stride": query.stride(0),
        "query_head_stride": query.stride(1),
        "table_stride": 0 if block_tables is None else block_tables.stride(0),
        "block_stride": key_blocks.stride(0),
        "GEOMETRY": geometry,
        "DOT_DTYPE": DOT_DTYPES[key_blocks.dtype],
    }


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products, as torch's own matrix products have it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
