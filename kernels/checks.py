"""What the kernels accept. All is checked before anything is launched.

Shapes, dtypes, devices and strides cost nothing to look at. Ids of copies and swaps are
looked at in host memory, and on a CPU those of block tables and slots too. On a GPU the
latter are checked on the device when the environment has QUIRE_CHECK_KERNELS=1, at the
price of waiting for it, which also means that no graph can be captured.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kernels.batch import AttentionBatch
from kernels.options import Options

CHECK_DEVICE_IDS = os.environ.get("QUIRE_CHECK_KERNELS", "") not in ("", "0")
CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
FP8 = torch.float8_e4m3fn
# Widest head, and most query heads per key/value head times their size, that a program's
# registers and shared memory hold.
MOST_HEAD_SIZE = 256
MOST_GROUP_SIZE = 8192


def check_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    options: Options,
) -> None:
    """Raises ValueError, naming the argument."""
    check_cache(key_blocks, value_blocks)
    tokens = batch.slot_mapping.shape[0]
    if query.dim() != 3 or query.shape[0] != tokens or query.shape[2] != key_blocks.shape[3]:
        raise ValueError(
            f"query must be [{tokens}, H, {key_blocks.shape[3]}], not {list(query.shape)}"
        )
    if batch.slot_mapping.device != query.device:
        raise ValueError(f"batch is on {batch.slot_mapping.device}, query on {query.device}")
    block_size = key_blocks.shape[2]
    batch.derive(("wide enough", block_size), lambda: _check_width(batch, block_size))
    heads, kv_heads = query.shape[1], key_blocks.shape[1]
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"query must have a multiple of {kv_heads} heads, not {heads}")
    _check_values("query", query, key_blocks)
    _check_scales(key_blocks, options.key_scales, options.value_scales)
    for name in ("scale", "softcap"):
        number = getattr(options, name)
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"{name} must be positive, not {number}")
    if options.sliding_window is not None and options.sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {options.sliding_window}")
    for name in ("sinks", "alibi_slopes"):
        tensor = getattr(options, name)
        if tensor is not None:
            _check_vector(name, tensor, heads, query.device)
    if options.alibi_slopes is not None and options.alibi_slopes.dtype != torch.float32:
        raise ValueError(f"alibi_slopes must be float32, not {options.alibi_slopes.dtype}")
    if query.is_cuda:
        check_triton(key_blocks, heads // kv_heads)
        if query.stride(2) != 1:
            raise ValueError(f"query must keep each head contiguous, not {query.stride()}")
        if CHECK_DEVICE_IDS:
            batch.derive(("checked", key_blocks.shape[:3]), lambda: check_ids(batch, key_blocks))


def check_write(
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    *,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Raises ValueError, naming the argument."""
    check_cache(key_blocks, value_blocks)
    expected = (batch.slot_mapping.shape[0], key_blocks.shape[1], key_blocks.shape[3])
    if batch.slot_mapping.device != key.device:
        raise ValueError(f"batch is on {batch.slot_mapping.device}, key on {key.device}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != expected:
            raise ValueError(f"{name} must be {list(expected)}, not {list(tensor.shape)}")
        _check_values(name, tensor, key_blocks)
        if tensor.is_cuda and tensor.stride(2) != 1:
            raise ValueError(f"{name} must keep each head contiguous, not {tensor.stride()}")
    if value.dtype != key.dtype:
        raise ValueError(f"value must be {key.dtype} like key, not {value.dtype}")
    _check_scales(key_blocks, key_scales, value_scales)
    if key.is_cuda:
        check_triton(key_blocks, 1)
        if CHECK_DEVICE_IDS:
            batch.derive(("checked", key_blocks.shape[:3]), lambda: check_ids(batch, key_blocks))


def check_move(
    source_slab: Tensor, destination_slab: Tensor, sources: Tensor, destinations: Tensor
) -> None:
    """Raises ValueError, naming the argument."""
    if sources.dim() != 1 or sources.dtype != torch.int64:
        raise ValueError(f"sources must be 1-D int64, not {sources.dim()}-D {sources.dtype}")
    if destinations.shape != sources.shape or destinations.dtype != torch.int64:
        raise ValueError(f"destinations must be int64 {list(sources.shape)} like sources")
    for name, slab in (("source_slab", source_slab), ("destination_slab", destination_slab)):
        if slab.dim() < 3 or slab.shape[0] == 0 or not slab[0, :1].is_contiguous():
            raise ValueError(f"{name} must be [layer, block, ...], each block contiguous")
    if (
        source_slab.shape[0] != destination_slab.shape[0]
        or source_slab.shape[2:] != destination_slab.shape[2:]
        or source_slab.dtype != destination_slab.dtype
    ):
        raise ValueError("destination_slab must have source_slab's layers, block shape and dtype")
    for name, slab in (("source_slab", source_slab), ("destination_slab", destination_slab)):
        other = destination_slab if slab is source_slab else source_slab
        if other.is_cuda and not (slab.is_cuda or slab.is_pinned()):
            raise ValueError(f"{name} must be pinned, since the other slab is on {other.device}")
    if sources.is_cuda and not CHECK_DEVICE_IDS:
        return
    same = source_slab.data_ptr() == destination_slab.data_ptr()
    for name, ids, slab in (
        ("sources", sources, source_slab),
        ("destinations", destinations, destination_slab),
    ):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < slab.shape[1]:
            raise ValueError(f"{name} has an id beyond the slab's {slab.shape[1]} blocks")
    ordered = destinations.sort().values
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise ValueError("destinations has a block twice")
    if same and bool(torch.isin(destinations, sources).any()):
        raise ValueError("destinations has a block that is a source as well")


def check_cache(key_blocks: Tensor, value_blocks: Tensor) -> None:
    """Raises ValueError unless the two are alike in shape, strides, dtype and device."""
    if key_blocks.dim() != 4 or 0 in key_blocks.shape:
        raise ValueError(
            f"key_blocks must be [N, Hkv, block_size, D], not {list(key_blocks.shape)}"
        )
    if key_blocks.dtype not in CACHE_DTYPES:
        raise ValueError(f"key_blocks must be of {CACHE_DTYPES}, not {key_blocks.dtype}")
    if (
        value_blocks.shape != key_blocks.shape
        or value_blocks.stride() != key_blocks.stride()
        or value_blocks.dtype != key_blocks.dtype
        or value_blocks.device != key_blocks.device
    ):
        raise ValueError("value_blocks must match key_blocks in shape, strides, dtype and device")


def check_triton(key_blocks: Tensor, group: int) -> None:
    """What the Triton kernels ask for beyond that. Raises ValueError, naming the argument."""
    strides = key_blocks.stride()
    if not serves_head_size(key_blocks.shape[3], key_blocks.device):
        raise ValueError(
            f"key_blocks must have heads of a multiple of 16 up to {MOST_HEAD_SIZE}, "
            f"not {key_blocks.shape[3]}"
        )
    # Otherwise no copy is asynchronous and each element is loaded on its own.
    if strides[3] != 1 or any(stride % 16 for stride in strides[:3]):
        raise ValueError(f"key_blocks must have strides divisible by 16, not {strides}")
    if group * key_blocks.shape[3] > MOST_GROUP_SIZE:
        most = MOST_GROUP_SIZE // key_blocks.shape[3]
        raise ValueError(f"query must have at most {most} heads a key/value head, not {group}")
    if key_blocks.dtype == FP8 and not _converts_fp8(key_blocks.device):
        raise ValueError(f"key_blocks cannot be {FP8} on {key_blocks.device}: it lacks the type")


def serves_head_size(head_size: int, device: torch.device) -> bool:
    """Whether there are kernels for heads of this size; on a CPU there are for all."""
    if device.type == "cpu":
        return True
    return head_size % 16 == 0 and head_size <= MOST_HEAD_SIZE


def _converts_fp8(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def _check_values(name: str, tensor: Tensor, key_blocks: Tensor) -> None:
    """Queries, keys and values have the cache's dtype; a cache of fp8 takes any other."""
    wanted = CACHE_DTYPES[:3] if key_blocks.dtype == FP8 else (key_blocks.dtype,)
    if tensor.dtype not in wanted or tensor.device != key_blocks.device:
        raise ValueError(
            f"{name} must be {' or '.join(map(str, wanted))} on {key_blocks.device}, "
            f"not {tensor.dtype} on {tensor.device}"
        )


def _check_scales(
    key_blocks: Tensor, key_scales: Tensor | None, value_scales: Tensor | None
) -> None:
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (scales is None) == (key_blocks.dtype == FP8):
            raise ValueError(f"{name} must be given for a cache of {FP8}, and for no other")
        if scales is not None:
            _check_vector(name, scales, key_blocks.shape[1], key_blocks.device)
            if scales.dtype != torch.float32:
                raise ValueError(f"{name} must be float32, not {scales.dtype}")


def _check_vector(name: str, tensor: Tensor, size: int, device: torch.device) -> None:
    if tensor.shape != (size,) or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be [{size}] on {device}, not {list(tensor.shape)} on {tensor.device}"
        )


def _check_width(batch: AttentionBatch, block_size: int) -> None:
    """On the host's columns, once a step."""
    contexts, columns = batch.host.context_lengths, batch.host.block_tables.shape[1]
    if contexts.numel() and int(contexts.max()) > columns * block_size:
        raise ValueError(f"block_tables has too few columns for {int(contexts.max())} keys")


def check_ids(batch: AttentionBatch, key_blocks: Tensor) -> None:
    """Looks at every block that a key is read from, and every slot that one is written to.

    Waits for the device. Raises ValueError, naming the argument.
    """
    block_count, _, block_size = key_blocks.shape[:3]
    used = torch.arange(batch.block_tables.shape[1], device=batch.block_tables.device)
    used = used[None, :] * block_size < batch.context_lengths[:, None]
    blocks = batch.block_tables[used]
    if blocks.numel() and not 0 <= int(blocks.min()) <= int(blocks.max()) < block_count:
        raise ValueError(f"block_tables has an id beyond the cache's {block_count} blocks")
    if batch.context_lengths.numel():
        longest = int(batch.context_lengths.max())
        if longest > batch.block_tables.shape[1] * block_size:
            raise ValueError(f"block_tables has too few columns for {longest} keys")
    slots = batch.slot_mapping
    if slots.numel() and not -1 <= int(slots.min()) <= int(slots.max()) < block_count * block_size:
        raise ValueError(f"slot_mapping has a slot beyond the cache's {block_count} blocks")
