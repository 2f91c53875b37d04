"""What the device can do at most, measured in the same run as what is held against it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.cases import Ceiling
from benchmarks.gpu.device import Calls, Device


def run(cell: Ceiling, device: Device) -> dict[str, Any]:
    ceilings = {"read": _read, "copy": _copy, "matrix": _matrix, "pinned": _pinned}
    return ceilings[cell.name](device)


def _read(device: Device) -> dict[str, Any]:
    """Bytes a second that are read and added up: the fastest of several programs."""
    words = 1 << 14 if device.dry else 1 << 30
    source = torch.randint(-1000, 1000, (words,), dtype=torch.int32, device=device.place)
    contenders: dict[str, Calls] = {}
    for tile, warps, programs in ((4096, 8, 8), (2048, 4, 16), (8192, 16, 4), (4096, 4, 8)):
        sums = torch.empty(
            device.multiprocessors * programs, dtype=torch.int32, device=device.place
        )
        call = partial(_add_up[sums.shape], source, sums, words, tile, num_warps=warps)
        call()
        if int(sums.sum(dtype=torch.int32)) != int(source.sum(dtype=torch.int32)):
            raise ValueError("the sums of what was read differ")
        contenders[f"tile {tile}, {warps} warps"] = [call]
        if device.dry:
            break
    if not device.dry:
        # A reduction of torch's reads in another order; the faster of all is the ceiling.
        contenders["torch"] = [lambda: source.view(torch.float32).amax()]
    timings, missing = device.measure(contenders, 1.0)
    name, best = min(timings.items(), key=lambda item: item[1].median)
    others = {other: _gb_s(4 * words, timing.median) for other, timing in timings.items()}
    return {
        "gb_s": _gb_s(4 * words, best.median),
        "us": best.median,
        "low": best.low,
        "high": best.high,
        "by": name,
        "all_gb_s": others,
        "missing": missing,
    }


def _copy(device: Device) -> dict[str, Any]:
    """Bytes a second of a copy on the device, read and written ones together."""
    size = 1 << 16 if device.dry else 4 << 30
    source = _random_bytes(size, device)
    target = torch.empty_like(source)
    timings, missing = device.measure({"copy": [lambda: target.copy_(source)]}, 1.0)
    timing = timings["copy"]
    return {
        "gb_s": _gb_s(2 * size, timing.median),
        "us": timing.median,
        "low": timing.low,
        "high": timing.high,
        "missing": missing,
    }


def _matrix(device: Device) -> dict[str, Any]:
    """Operations a second of a product of two large bf16 matrices of random numbers."""
    side = 64 if device.dry else 8192
    dtype = torch.float32 if device.dry else torch.bfloat16
    left, right = (torch.randn(side, side, device=device.place).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    timings, missing = device.measure(
        {"product": [lambda: torch.mm(left, right, out=product)]}, 1.0
    )
    timing = timings["product"]
    return {
        "tflops": 2 * side**3 / timing.median / 1e6,
        "us": timing.median,
        "low": timing.low,
        "high": timing.high,
        "missing": missing,
    }


def _pinned(device: Device) -> dict[str, Any]:
    """Bytes a second of one large transfer between the device and pinned memory, each way."""
    size = 1 << 16 if device.dry else 1 << 30
    here = _random_bytes(size, device)
    there = torch.empty(size, dtype=torch.uint8, pin_memory=device.cuda)
    there.copy_(here)
    way_out = device.time_host(lambda: there.copy_(here, non_blocking=True), 5)
    way_in = device.time_host(lambda: here.copy_(there, non_blocking=True), 5)
    return {
        "out_gb_s": _gb_s(size, way_out.median),
        "in_gb_s": _gb_s(size, way_in.median),
        "us": way_out.median,
        "low": way_out.low,
        "high": way_out.high,
    }


def _random_bytes(size: int, device: Device) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=device.place)


def _gb_s(size: float, microseconds: float) -> float:
    return size / microseconds / 1e3


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(source, sums, count, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (programs): each adds up every so manieth tile, and writes one number."""
    first = tl.program_id(0).to(tl.int64) * TILE
    step = tl.num_programs(0) * TILE
    total = tl.zeros([TILE], tl.int32)
    for start in range(first, count, step):
        word = start + tl.arange(0, TILE)
        total += tl.load(source + word, mask=word < count, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
