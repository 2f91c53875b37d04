"""Cache writes and block moves in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch import upload
from kernels.launch import Launch
from kernels.tiling import power_of_two

# Words of 4 bytes that one program moves: 16 bytes a thread, four times.
CHUNK_WORDS = 2048
# Blocks whose bytes are adjacent, and at least so many, cross to the host and back by the
# device's copy engines, which leave its multiprocessors alone; a transfer of this size
# takes five times as long as it takes to ask for it. Smaller pieces are moved by a kernel
# that reads and writes host memory in place, all in one launch.
ENGINE_BYTES = 256 << 10


def write_cache(
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """`kernels.write_cache` in Triton. slot_mapping: int64 [T] on the device."""
    if key.shape[0]:
        write_launch(
            key, value, key_blocks, value_blocks, slot_mapping, key_scales, value_scales
        ).run()


def write_launch(
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Launch:
    """The launch of `write_cache`: one program a token, all its heads."""
    tokens, heads, head_size = key.shape
    arguments = {
        "key": key,
        "value": value,
        "key_blocks": key_blocks,
        "value_blocks": value_blocks,
        "slot_mapping": slot_mapping,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "key_token_stride": key.stride(0),
        "key_head_stride": key.stride(1),
        "value_token_stride": value.stride(0),
        "value_head_stride": value.stride(1),
        "block_stride": key_blocks.stride(0),
        "HEAD_STRIDE": key_blocks.stride(1),
        "OFFSET_STRIDE": key_blocks.stride(2),
        "BLOCK_SIZE": key_blocks.shape[2],
        "HEADS": heads,
        "HEAD_SIZE": head_size,
        "ROWS": power_of_two(heads),
        "DIMS": power_of_two(head_size),
    }
    return Launch(_write, (tokens,), arguments, 4, 1)


def copy_blocks(slab: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """`kernels.copy_blocks` in Triton. sources, destinations: int64 [C] on the device."""
    if sources.shape[0]:
        move_launch(slab, slab, sources, destinations).run()


def swap_blocks(
    source_slab: Tensor, destination_slab: Tensor, sources: Tensor, destinations: Tensor
) -> None:
    """`kernels.swap_blocks` between a device and pinned memory. sources, destinations: CPU."""
    if not sources.shape[0]:
        return
    block_bytes = source_slab[:, 0].numel() * source_slab.element_size()
    if _adjacent(source_slab) and _adjacent(destination_slab) and block_bytes >= ENGINE_BYTES:
        _transfer_runs(source_slab, destination_slab, sources, destinations)
        return
    slab = source_slab if source_slab.is_cuda else destination_slab
    sources, destinations = upload(sources, slab.device), upload(destinations, slab.device)
    move_launch(source_slab, destination_slab, sources, destinations).run()


def move_launch(
    source_slab: Tensor, destination_slab: Tensor, sources: Tensor, destinations: Tensor
) -> Launch:
    """One launch that moves whole blocks, all layers, between slabs [layer, block, ...].

    Within a layer a block is contiguous. Where its layers are too, it is one run.
    """
    source, destination = (_words(slab) for slab in (source_slab, destination_slab))
    layers, words = source.shape[0], source[0, 0].numel()
    if _adjacent(source_slab) and _adjacent(destination_slab):
        layers, words = 1, layers * words
    chunks = triton.cdiv(words, CHUNK_WORDS)
    arguments = {
        "source": source,
        "destination": destination,
        "sources": sources,
        "destinations": destinations,
        "source_layer_stride": source.stride(0),
        "source_block_stride": source.stride(1),
        "destination_layer_stride": destination.stride(0),
        "destination_block_stride": destination.stride(1),
        "words": words,
        "layers": layers,
        "chunks": chunks,
        "CHUNK": CHUNK_WORDS,
    }
    return Launch(_move, (chunks * layers * sources.shape[0],), arguments, 4, 1)


def _transfer_runs(
    source_slab: Tensor, destination_slab: Tensor, sources: Tensor, destinations: Tensor
) -> None:
    """One transfer for each run of blocks that are neighbours on both sides."""
    source, destination = source_slab.transpose(0, 1), destination_slab.transpose(0, 1)
    breaks = (sources.diff() != 1) | (destinations.diff() != 1)
    starts = [0, *(torch.nonzero(breaks).flatten() + 1).tolist(), sources.shape[0]]
    firsts = zip(sources[starts[:-1]].tolist(), destinations[starts[:-1]].tolist(), strict=True)
    for (first_source, first_destination), start, stop in zip(
        firsts, starts[:-1], starts[1:], strict=True
    ):
        count = stop - start
        target = destination[first_destination : first_destination + count]
        target.copy_(source[first_source : first_source + count], non_blocking=True)


def _adjacent(slab: Tensor) -> bool:
    """Whether all layers of a block are one contiguous run."""
    return slab[:, 0].is_contiguous()


def _words(slab: Tensor) -> Tensor:
    """The same memory as 4-byte words: what is moved has no meaning here."""
    return slab.view(torch.int32)


@triton.jit
def _write(
    key,
    value,
    key_blocks,
    value_blocks,
    slot_mapping,
    key_scales,
    value_scales,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    block_stride,
    HEAD_STRIDE: tl.constexpr,
    OFFSET_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Grid (T). Slot -1: the token is not written."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    head = tl.arange(0, ROWS).to(tl.int64)
    dim = tl.arange(0, DIMS)[None, :]
    real = head < HEADS
    inside = real[:, None] & (dim < HEAD_SIZE)
    keys = tl.load(
        key + token * key_token_stride + (head * key_head_stride)[:, None] + dim, mask=inside
    )
    values = tl.load(
        value + token * value_token_stride + (head * value_head_stride)[:, None] + dim, mask=inside
    )
    if key_scales is not None:
        keys = _quantise(keys, tl.load(key_scales + head, mask=real, other=1.0))
        values = _quantise(values, tl.load(value_scales + head, mask=real, other=1.0))
    place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * OFFSET_STRIDE
    place += (head * HEAD_STRIDE)[:, None] + dim
    tl.store(key_blocks + place, keys.to(key_blocks.dtype.element_ty), mask=inside)
    tl.store(value_blocks + place, values.to(value_blocks.dtype.element_ty), mask=inside)


@triton.jit
def _quantise(rows, scales):
    """In units of each head's scale, within what e4m3 can hold: beyond it there is only NaN."""
    units = rows.to(tl.float32) / scales[:, None]
    return tl.clamp(units, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _move(
    source,
    destination,
    sources,
    destinations,
    source_layer_stride,
    source_block_stride,
    destination_layer_stride,
    destination_block_stride,
    words,
    layers,
    chunks,
    CHUNK: tl.constexpr,
):
    """Grid (chunks of a layer * layers * blocks), chunks fastest."""
    program = tl.program_id(0)
    layer = (program // chunks % layers).to(tl.int64)
    pair = program // chunks // layers
    word = program % chunks * CHUNK + tl.arange(0, CHUNK)
    start = source + layer * source_layer_stride + tl.load(sources + pair) * source_block_stride
    moved = tl.load(start + word, mask=word < words)
    start = (
        destination
        + layer * destination_layer_stride
        + tl.load(destinations + pair) * destination_block_stride
    )
    tl.store(start + word, moved, mask=word < words)
