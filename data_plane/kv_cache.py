"""The KV cache: one slab of blocks on the device, one in host memory to swap to."""

from __future__ import annotations

import mmap
import weakref
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kernels
from data_plane.kv_scales import KV_DTYPE, KVScales

BlockIds = NDArray[np.integer[Any]]

# cudaHostRegisterPortable and cudaHostRegisterMapped: for all devices, at the same addresses.
_REGISTERED_FOR_KERNELS = 1 | 2


class KVCache:
    """Keys and values of all layers, cut into blocks of `block_size` tokens.

    Both slabs are logically [layer, block, 2, Hkv, block_size, D], index 0 of the
    third dimension being keys. In memory the block comes first: all layers of a
    block are one run, so that a copy or a swap moves each block in one piece at any
    block size. Measured on a CPU, with layers first instead, gathers take 4% and
    copies 8% longer. Within a layer a head's tokens are adjacent, which is the order
    in which attention reads them.

    Nothing is written at start: fresh pages are committed when first used, and the
    kernels never read a slot that its sequence has not written.

    A cache of float8_e4m3fn takes half the memory of a model's 16 bits. It holds keys
    and values in units of its scales, which the kernels divide and multiply by; moving
    blocks needs no scales, because within the cache they are the same for all blocks.
    """

    def __init__(
        self,
        layer_count: int,
        block_count: int,
        host_block_count: int,
        kv_head_count: int,
        block_size: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        scales: KVScales | None = None,
    ) -> None:
        """Raises ValueError for a count below 1 (host_block_count: below 0), for host blocks that
        cannot be pinned, and for scales of another shape, without need, or missing for a dtype of
        float8_e4m3fn."""
        counts = (layer_count, block_count, kv_head_count, block_size, head_size)
        if min(counts) < 1 or host_block_count < 0:
            raise ValueError(f"counts must be positive: {counts}, {host_block_count} on the host")
        _check_scales(scales, dtype, (layer_count, kv_head_count))
        self.layer_count = layer_count
        self.block_count = block_count
        self.host_block_count = host_block_count
        self.block_size = block_size
        self.dtype = dtype
        self.device = torch.device(device)
        block_shape = (layer_count, 2, kv_head_count, block_size, head_size)
        slab = torch.empty((block_count, *block_shape), dtype=dtype, device=self.device)
        host_shape = (host_block_count, *block_shape)
        if self.device.type == "cuda" and host_block_count:
            host_slab = pinned(self, host_shape, dtype, self.device)
        else:
            host_slab = torch.empty(host_shape, dtype=dtype)
        self.slab = slab.transpose(0, 1)
        self.host_slab = host_slab.transpose(0, 1)
        self.bytes_per_block = slab[0].numel() * dtype.itemsize
        # Views are made once: a step takes two a layer.
        self._layers: list[Tensor] = list(self.slab)
        self._keys = [blocks[:, 0] for blocks in self._layers]
        self._values = [blocks[:, 1] for blocks in self._layers]
        self._key_scales = self._value_scales = None
        if scales is not None:
            self._key_scales = list(scales.keys.to(self.device))
            self._value_scales = list(scales.values.to(self.device))

    def layer(self, layer: int) -> Tensor:
        """[block_count, 2, Hkv, block_size, D], keys first; a view."""
        return self._layers[layer]

    def keys(self, layer: int) -> Tensor:
        """[block_count, Hkv, block_size, D], a view."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """[block_count, Hkv, block_size, D], a view."""
        return self._values[layer]

    def key_scales(self, layer: int) -> Tensor | None:
        """fp32 [Hkv] on the device, what keys are multiplied by; None unless they are fp8."""
        return None if self._key_scales is None else self._key_scales[layer]

    def value_scales(self, layer: int) -> Tensor | None:
        """The same for values."""
        return None if self._value_scales is None else self._value_scales[layer]

    def copy_blocks(self, sources: BlockIds, destinations: BlockIds) -> None:
        """Copy device blocks. ValueError for ids beyond the slab, or a target that is a source."""
        if len(sources):
            kernels.copy_blocks(self.slab, _ids(sources), _ids(destinations))

    def swap_out(self, device_blocks: BlockIds, host_blocks: BlockIds) -> None:
        """Copy device blocks to host blocks. ValueError for ids beyond either slab."""
        if len(device_blocks):
            ids = _ids(device_blocks), _ids(host_blocks)
            kernels.swap_blocks(self.slab, self.host_slab, *ids)

    def swap_in(self, host_blocks: BlockIds, device_blocks: BlockIds) -> None:
        """Copy host blocks to device blocks. ValueError for ids beyond either slab."""
        if len(host_blocks):
            ids = _ids(host_blocks), _ids(device_blocks)
            kernels.swap_blocks(self.host_slab, self.slab, *ids)


def pinned(
    owner: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Host memory that a GPU reads and writes in place, until its owner is gone.

    It is no more than asked for. What torch itself pins is rounded up to a power of two, so that
    40 GiB would be 64.

    Raises:
        ValueError: the system does not allow it.
    """
    size = prod(shape) * dtype.itemsize
    wanted = f"{size >> 20} MiB of host memory for swapped blocks"
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ValueError(f"{wanted}: {error.strerror}") from error
    slab = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        status = runtime.cudaHostRegister(slab.data_ptr(), size, _REGISTERED_FOR_KERNELS)
    if int(status):
        raise ValueError(f"{wanted} cannot be pinned: {runtime.cudaGetErrorString(status)}")
    weakref.finalize(owner, _unpin, slab, device).atexit = False
    return slab


def _unpin(slab: Tensor, device: torch.device) -> None:
    """Also keeps the memory until here."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())  # type: ignore[no-untyped-call]


def _check_scales(scales: KVScales | None, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if (scales is None) == (dtype == KV_DTYPE):
        raise ValueError(f"scales must be given for a cache of {KV_DTYPE}, and for no other")
    if scales is not None and scales.keys.shape != shape:
        raise ValueError(f"scales must be {list(shape)}, not {list(scales.keys.shape)}")


def _ids(blocks: BlockIds) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(blocks, dtype=np.int64))
