"""Copies of blocks on the device, and swaps between it and pinned memory.

Each is done for both layouts of the slab: all layers of a block adjacent, or all blocks of
a layer. Ids are random, as those of an engine that has run for a while.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.gpu.cases import Copy, Swap
from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import empty_slab

# Sets of ids that are moved in turn, so that nothing is in the caches.
SETS = 2
SWAP_ROUNDS = 5


def copy(cell: Copy, device: Device) -> dict[str, Any]:
    """Whole calls, on the device's clock. Bytes are those moved: each is read and written."""
    count = (cell.mib << 10) // cell.kib
    slab = fill(_slab(cell, 2 * SETS * count, device))
    ids = torch.randperm(slab.shape[1]).to(device.place).split(count)
    calls = [partial(kernels.copy_blocks, slab, ids[2 * at], ids[2 * at + 1]) for at in range(SETS)]
    timings, failures = device.measure({"copy": calls})
    figures: dict[str, Any] = {"bytes": count * cell.kib << 10, "clock": "device"}
    timing = timings.get("copy")
    if timing is None:
        # It cannot be captured in a graph; the host's part then counts too.
        timing = device.time_host(calls[0], 9)
        figures |= {"clock": "host", "missing": failures}
    return figures | {"us": timing.median, "low": timing.low, "high": timing.high}


def swap(cell: Swap, device: Device) -> dict[str, Any]:
    """From the call until the device is done, as the host's clock sees it."""
    count = (cell.mib << 10) // cell.kib
    slab = fill(_slab(cell, 2 * count, device))
    there = _pinned_like(slab, cell.layout, device)
    there.copy_(slab)
    here_ids, there_ids = (torch.randperm(slab.shape[1])[:count] for _ in range(2))
    if cell.direction == "out":
        call = partial(kernels.swap_blocks, slab, there, here_ids, there_ids)
    else:
        call = partial(kernels.swap_blocks, there, slab, there_ids, here_ids)
    timing = device.time_host(call, SWAP_ROUNDS)
    last = slab[:, here_ids[-1:].to(device.place)].cpu()
    figures: dict[str, Any] = {
        "bytes": count * cell.kib << 10,
        "us": timing.median,
        "low": timing.low,
        "high": timing.high,
    }
    if not torch.equal(last.view(torch.uint8), there[:, there_ids[-1:]].view(torch.uint8)):
        figures["failed"] = "a block did not arrive"
    return figures


def _slab(cell: Copy | Swap, blocks: int, device: Device) -> Tensor:
    """Blocks of `kib` KiB: keys and values of 16 tokens in bf16, of all layers together."""
    per_token = (cell.kib << 10) // cell.layers // 64
    heads = max(1, per_token // 128)
    shape = (blocks, cell.layers, heads, 16, per_token // heads)
    return empty_slab(shape, cell.layout, torch.bfloat16, device.place)


def fill(slab: Tensor) -> Tensor:
    """Random numbers, in parts that torch fills at once."""
    memory = slab if slab.is_contiguous() else slab.transpose(0, 1)
    for part in memory.split(max(1, (512 << 20) // memory[0].numel())):
        part.normal_()
    return slab


def _pinned_like(slab: Tensor, layout: str, device: Device) -> Tensor:
    if layout == "block-first":
        shape = slab.transpose(0, 1).shape
        return torch.empty(shape, dtype=slab.dtype, pin_memory=device.cuda).transpose(0, 1)
    return torch.empty(slab.shape, dtype=slab.dtype, pin_memory=device.cuda)
