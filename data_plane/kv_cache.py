"""The KV cache: one slab of blocks on the device, one in host memory to swap to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kernels

BlockIds = NDArray[np.integer[Any]]


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
    ) -> None:
        """Raises ValueError for a count below 1 (host_block_count: below 0)."""
        counts = (layer_count, block_count, kv_head_count, block_size, head_size)
        if min(counts) < 1 or host_block_count < 0:
            raise ValueError(f"counts must be positive: {counts}, {host_block_count} on the host")
        self.layer_count = layer_count
        self.block_count = block_count
        self.host_block_count = host_block_count
        self.block_size = block_size
        self.device = torch.device(device)
        block_shape = (layer_count, 2, kv_head_count, block_size, head_size)
        slab = torch.empty((block_count, *block_shape), dtype=dtype, device=self.device)
        host_slab = torch.empty(
            (host_block_count, *block_shape), dtype=dtype, pin_memory=self.device.type == "cuda"
        )
        self.slab = slab.transpose(0, 1)
        self.host_slab = host_slab.transpose(0, 1)
        self.bytes_per_block = slab[0].numel() * dtype.itemsize
        # Views are made once: a step takes two a layer.
        self._keys = [self.slab[layer, :, 0] for layer in range(layer_count)]
        self._values = [self.slab[layer, :, 1] for layer in range(layer_count)]

    def keys(self, layer: int) -> Tensor:
        """[block_count, Hkv, block_size, D], a view."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """[block_count, Hkv, block_size, D], a view."""
        return self._values[layer]

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


def _ids(blocks: BlockIds) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(blocks, dtype=np.int64))
