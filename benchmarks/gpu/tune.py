"""Other tilings for one shape: keys, warps and stages, rows for prefills; then the plan's.

All are timed side by side, and a winner is only as good as the spread of what it beats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, replace
from functools import partial
from itertools import product
from typing import Any

from benchmarks.gpu import reference
from benchmarks.gpu.attention import contender, meta_part, plan, tiling_of
from benchmarks.gpu.cases import TuneDecode, TunePrefill
from benchmarks.gpu.device import Device, Timing, compile_ahead, describe
from benchmarks.gpu.inputs import Inputs, make_inputs
from benchmarks.gpu.peers import Run
from kernels import triton_paged
from kernels.launch import Launch
from kernels.tiling import LEAST_ROWS, Tiling, power_of_two

# Tilings that go on from the first round to the second, and that are reported.
KEPT = 3
SECONDS = 1.5


def run(cell: TuneDecode | TunePrefill, device: Device) -> dict[str, Any]:
    inputs = make_inputs(cell, device)
    present = tiling_of(inputs, device)
    candidates = [present, *(each for each in grid(present, inputs, device) if each != present)]
    if device.cuda:
        compile_ahead([launch for each in candidates for launch in _launches(inputs, each)])
    timings, failures = _measure(candidates, present, inputs, device)
    best = sorted(timings, key=lambda each: timings[each].median)[:KEPT]
    again = [present, *(each for kept in best for each in plans(kept, device))]
    second, more_failures = _measure(list(dict.fromkeys(again)), present, inputs, device)
    order = sorted(second, key=lambda each: second[each].median)
    return {
        "present": _figures(present, second[present]),
        "us": second[present].median,
        "best": [_figures(each, second[each]) for each in order[:KEPT]],
        "gain": second[present].median / second[order[0]].median,
        "tried": len(timings) + len(second),
        "missing": {str(astuple(each)): why for each, why in {**failures, **more_failures}.items()},
    }


def grid(present: Tiling, inputs: Inputs, device: Device) -> Iterator[Tiling]:
    """What needs compiling: around the present tiling."""
    rows, warps, stages = [present.rows], [2, 4, 8], [2, 3, 4]
    keys = [present.keys // 2, present.keys, present.keys * 2]
    if not inputs.decodes:
        least = max(LEAST_ROWS, power_of_two(inputs.heads // inputs.kv_heads))
        rows = sorted({max(least, 64), max(least, 128), present.rows})
        warps = [4, 8]
    if device.dry:
        rows, keys, warps, stages = [present.rows], keys[:2], [4], [2]
    for row, key, warp, stage in product(rows, keys, warps, stages):
        if key >= 16:
            yield replace(present, rows=row, keys=key, warps=warp, stages=stage)


def plans(tiling: Tiling, device: Device) -> Iterator[Tiling]:
    """What needs no compiling: how finely long sequences are cut."""
    few_rows = tiling.rows <= 32
    programs = [1, 2, 3, 4, 6] if few_rows else [1, 2]
    costs = [1, 2, 4] if few_rows else [2, 4, 8]
    if device.dry:
        programs, costs = [1], [1]
    for count, cost in product(programs, costs):
        yield replace(tiling, programs=count, partial_cost=cost)


def _measure(
    candidates: list[Tiling], present: Tiling, inputs: Inputs, device: Device
) -> tuple[dict[Tiling, Timing], dict[Tiling, str]]:
    """Times of those that work and give what the present tiling gives."""
    expected = contender(inputs, plan(inputs, present))(0).clone()
    limit = 2 * reference.tolerance(inputs.queries[0].dtype, inputs.slab.dtype)
    runs: dict[str, tuple[Tiling, Run]] = {}
    failures: dict[Tiling, str] = {}
    for tiling in candidates:
        try:
            run_layer = contender(inputs, plan(inputs, tiling))
            distance = reference.error(run_layer(0), expected)
            if not distance < limit:
                raise ValueError(f"its result differs by {distance:.2g}")
            runs[str(tiling)] = tiling, run_layer
        except Exception as error:
            failures[tiling] = describe(error)
            device.recover()
    calls: Mapping[str, Any] = {
        name: [partial(run_layer, layer) for layer in range(inputs.layers)]
        for name, (_, run_layer) in runs.items()
    }
    timings, more = device.measure(calls, SECONDS)
    failures |= {runs[name][0]: why for name, why in more.items()}
    if present in failures:
        raise RuntimeError(failures[present])
    return {runs[name][0]: timing for name, timing in timings.items()}, failures


def _launches(inputs: Inputs, tiling: Tiling) -> list[Launch]:
    group = inputs.heads // inputs.kv_heads
    part = meta_part(tiling, group, inputs.decodes)
    query, keys = inputs.queries[0], inputs.keys(0)
    return triton_paged.part_launches(
        query, query, keys, keys, inputs.batch.block_tables, part, inputs.options
    )


def _figures(tiling: Tiling, timing: Timing) -> dict[str, Any]:
    return {
        "rows": tiling.rows,
        "keys": tiling.keys,
        "warps": tiling.warps,
        "stages": tiling.stages,
        "programs": tiling.programs,
        "partial_cost": tiling.partial_cost,
        "us": timing.median,
        "low": timing.low,
        "high": timing.high,
    }
