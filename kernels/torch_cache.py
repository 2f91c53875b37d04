"""Writing to the KV cache and moving whole blocks, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.batch import AttentionBatch, RowLayout, row_layout

# The largest number of the cache's one 8-bit type, e4m3 (arXiv 2209.05433); beyond is NaN.
FP8_MOST = 448.0


def write_cache(
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    *,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """`kernels.write_cache` in plain torch."""
    layout = row_layout("key_blocks", key_blocks.shape, key_blocks.stride())
    slots, device = batch.host.slot_mapping, key_blocks.device
    rows = batch.derive(("write", layout), lambda: _write_rows(slots, layout, device))
    _write(key, key_blocks, key_scales, layout, *rows)
    _write(value, value_blocks, value_scales, layout, *rows)


def write_slots(
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """The same for a slot mapping that belongs to no batch."""
    layout = row_layout("key_blocks", key_blocks.shape, key_blocks.stride())
    rows = _write_rows(slot_mapping, layout, key_blocks.device)
    _write(key, key_blocks, key_scales, layout, *rows)
    _write(value, value_blocks, value_scales, layout, *rows)


def _write(
    source: Tensor,
    blocks: Tensor,
    scales: Tensor | None,
    layout: RowLayout,
    rows: Tensor,
    kept: Tensor | None,
) -> None:
    if kept is not None:
        source = source.index_select(0, kept)
    target = layout.view(blocks)
    if scales is not None:
        target, source = target.view(torch.uint8), quantise(source, scales).view(torch.uint8)
    target.index_copy_(0, rows, source.reshape(-1, layout.head_size))


def quantise(rows: Tensor, scales: Tensor) -> Tensor:
    """Rows [T, Hkv, D] as e4m3, in units of each head's scale [Hkv]."""
    units = rows.float() / scales[:, None]
    return units.clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)


def swap_blocks(
    source_slab: Tensor, destination_slab: Tensor, sources: Tensor, destinations: Tensor
) -> None:
    """`kernels.swap_blocks` in plain torch, and with one slab for both `kernels.copy_blocks`."""
    # The slabs are block-major in memory: with the block first, a block is one run.
    source, destination = source_slab.transpose(0, 1), destination_slab.transpose(0, 1)
    if source.dtype == torch.float8_e4m3fn:
        source, destination = source.view(torch.uint8), destination.view(torch.uint8)
    destination.index_copy_(0, destinations, source.index_select(0, sources))


def _write_rows(
    slots: Tensor, layout: RowLayout, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Cache rows [written tokens * Hkv], and the tokens written (None: all of them).

    Raises ValueError for a slot beyond the cache.
    """
    if slots.numel() and int(slots.max()) >= layout.block_count * layout.block_size:
        raise ValueError(f"slot_mapping has a slot beyond the cache's {layout.block_count} blocks")
    kept = None
    if slots.numel() and int(slots.min()) < 0:
        kept = torch.nonzero(slots >= 0).squeeze(1)
        slots = slots[kept]
        kept = kept.to(device)
    first = slots // layout.block_size * layout.block_step
    first = first + slots % layout.block_size * layout.offset_step
    rows = first[:, None] + torch.arange(layout.head_count) * layout.head_step
    return rows.reshape(-1).to(device), kept
