"""Writing to the KV cache and moving whole blocks, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.batch import AttentionBatch, RowLayout, row_layout


def write_cache(
    key: Tensor, value: Tensor, key_blocks: Tensor, value_blocks: Tensor, batch: AttentionBatch
) -> None:
    """Put each token's key and value into the slot that the batch maps it to.

    key, value: [T, Hkv, D], any strides. key_blocks, value_blocks:
    [N, Hkv, block_size, D], same strides. Tokens whose slot is -1 are skipped.
    Raises ValueError, naming the argument, for wrong shapes, dtypes or devices,
    and IndexError for a slot beyond the cache.
    """
    check_cache(key_blocks, value_blocks)
    tokens = batch.slot_mapping.shape[0]
    expected = (tokens, key_blocks.shape[1], key_blocks.shape[3])
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != expected or tensor.dtype != key_blocks.dtype:
            raise ValueError(
                f"{name} must be {key_blocks.dtype} {list(expected)}, "
                f"not {tensor.dtype} {list(tensor.shape)}"
            )
    layout = row_layout("key_blocks", key_blocks.shape, key_blocks.stride())
    rows, kept = batch.derive(("write", layout), lambda: _write_rows(batch, layout))
    for source, blocks in ((key, key_blocks), (value, value_blocks)):
        chosen = source if kept is None else source.index_select(0, kept)
        layout.view(blocks).index_copy_(0, rows, chosen.reshape(-1, layout.head_size))


def copy_blocks(slab: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copy blocks within a slab [layer, block, ...], all layers at once.

    sources, destinations: int64 [C] block ids on the slab's device, the
    destinations distinct. All blocks are read before one is written. Raises
    ValueError for ids that do not pair up, IndexError for ids out of range.
    """
    swap_blocks(slab, slab, sources, destinations)


def swap_blocks(
    source_slab: Tensor, destination_slab: Tensor, sources: Tensor, destinations: Tensor
) -> None:
    """Copy blocks from one slab [layer, block, ...] to another, maybe on another device.

    sources, destinations: int64 [C] block ids, each on its slab's device. The
    blocks cross in one transfer. Raises ValueError for ids that do not pair up
    or slabs of different geometry, IndexError for ids out of range.
    """
    if sources.dim() != 1 or sources.shape != destinations.shape:
        raise ValueError(f"destinations must have the {list(sources.shape)} entries of sources")
    if source_slab.shape[:1] + source_slab.shape[2:] != (
        destination_slab.shape[:1] + destination_slab.shape[2:]
    ):
        raise ValueError("destination_slab must have the layers and block shape of source_slab")
    # The slabs are block-major in memory: with the block first, a block is one run.
    staged = source_slab.transpose(0, 1).index_select(0, sources)
    staged = staged.to(destination_slab.device, non_blocking=True)
    destination_slab.transpose(0, 1).index_copy_(0, destinations, staged)


def check_cache(key_blocks: Tensor, value_blocks: Tensor) -> None:
    """Raises ValueError unless the two are alike in shape, strides, dtype and device."""
    if key_blocks.dim() != 4:
        raise ValueError(
            f"key_blocks must be [N, Hkv, block_size, D], not {list(key_blocks.shape)}"
        )
    if (
        value_blocks.shape != key_blocks.shape
        or value_blocks.stride() != key_blocks.stride()
        or value_blocks.dtype != key_blocks.dtype
        or value_blocks.device != key_blocks.device
    ):
        raise ValueError("value_blocks must match key_blocks in shape, strides, dtype and device")


def _write_rows(batch: AttentionBatch, layout: RowLayout) -> tuple[Tensor, Tensor | None]:
    """Cache rows [written tokens * Hkv], and the tokens written (None: all of them)."""
    slots = batch.host.slot_mapping
    kept = None
    if slots.numel() and int(slots.min()) < 0:
        kept = torch.nonzero(slots >= 0).squeeze(1)
        slots = slots[kept]
        kept = kept.to(batch.slot_mapping.device)
    first = slots // layout.block_size * layout.block_step
    first = first + slots % layout.block_size * layout.offset_step
    rows = first[:, None] + torch.arange(layout.head_count) * layout.head_step
    return rows.reshape(-1).to(batch.slot_mapping.device), kept
