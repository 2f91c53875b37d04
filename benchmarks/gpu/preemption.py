"""Swapping a sequence out and in again, against computing it again (the paper's figure 19).

A sequence is computed in chunks, as it would be after it was preempted by recomputing; then it is
preempted by swapping. All of it are steps of an engine by plans of the scheduler, timed by the
host's clock from the plan until the device is done with it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.gpu.cases import Preempt
from benchmarks.gpu.chains import Planned, Planner, furnish, run
from benchmarks.gpu.device import Device
from benchmarks.gpu.models import Loaded
from data_plane.engine import Engine, EngineSizes

LENGTHS, DRY_LENGTHS = (256, 512, 1024, 2048, 4096, 8192), (20, 50)
# The first one compiles, and touches memory for the first time.
ROUNDS, DRY_ROUNDS = 4, 2
STEP_TOKENS, DRY_STEP_TOKENS = 2048, 16
NEW_TOKENS = 64


def preempt(cell: Preempt, loaded: Loaded, device: Device) -> dict[str, Any]:
    lengths = DRY_LENGTHS if device.dry else LENGTHS
    facts = loaded.model.facts
    blocks = -(-(lengths[-1] + NEW_TOKENS) // cell.block) + 8
    sizes = EngineSizes(
        block_size=cell.block,
        block_count=blocks,
        host_block_count=blocks,
        slot_count=4,
        step_tokens=DRY_STEP_TOKENS if device.dry else STEP_TOKENS,
        max_length=facts.max_model_length,
    )
    engine = Engine(loaded.model, sizes)
    planner = Planner(sizes, facts.vocabulary_size)
    furnish(engine, planner)
    points = []
    for length in lengths:
        rounds = [
            _round(engine, planner, length, device)
            for _ in range(DRY_ROUNDS if device.dry else ROUNDS)
        ]
        names = ("recompute_us", "out_us", "in_us")
        medians = map(statistics.median, zip(*rounds[1:], strict=True))
        point: dict[str, Any] = {"length": length, **dict(zip(names, medians, strict=True))}
        point["bytes"] = -(-length // cell.block) * engine.cache.bytes_per_block
        point["swap_us"] = point["out_us"] + point["in_us"]
        points.append(point)
    return {"points": points, "step_tokens": sizes.step_tokens, "load_seconds": loaded.seconds}


def _round(
    engine: Engine, planner: Planner, length: int, device: Device
) -> tuple[float, float, float]:
    """Microseconds of computing a sequence, of swapping it out, and of swapping it in."""
    group = planner.submit(length, NEW_TOKENS)
    *chunks, decode = planner.until_all_decode(1)
    device.wait()
    computed = run(engine, chunks).seconds * 1e6
    run(engine, [decode])
    planner.scheduler.preempt(group)
    out = _settled(planner, "swapped_out")
    swapped_out = _time(engine, out, device)
    back = _settled(planner, "swapped_in")
    swapped_in = _time(engine, back, device)
    planner.scheduler.cancel(group)
    run(engine, planner.upcoming())
    return computed, swapped_out, swapped_in


def _settled(planner: Planner, what: str) -> Planned:
    """The next plan, made when all results are in: it must swap, and nothing else."""
    planned = planner.plan(ahead=0)
    if planned is None or not getattr(planned, what) or planned.decodes or planned.chunk_tokens:
        raise RuntimeError(f"the scheduler's plan is not one that has {what.replace('_', ' ')}")
    return planned


def _time(engine: Engine, planned: Planned, device: Device) -> float:
    device.wait()
    began = time.perf_counter()
    run(engine, [planned])
    # A step does not wait for the copies that nothing in it needs.
    device.wait()
    return (time.perf_counter() - began) * 1e6
