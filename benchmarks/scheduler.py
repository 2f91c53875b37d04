"""Control-plane CPU time and bytes of a decode step: steady, by number of sequences, and changing.

`schedule` plus `apply` is the aim's figure; encoding the plan and decoding the result come on top.
The engine is stood in for by results that are made before the clock runs. Under pressure a fifth of
the slots changes state in each step: in one step they are preempted, in the next they come back.
"""

from __future__ import annotations

import statistics
import time
from typing import Literal

import numpy as np

from benchmarks.report import report
from control_plane.engine_wire import decode_result, encode_plan
from control_plane.plan import StepResult
from control_plane.request import Request
from control_plane.scheduler import Scheduler, SchedulerLimits
from protos.engine.v1 import engine_pb2

PROMPT = 128
# Eight times around a block of 16, so that every step of the cycle counts alike.
STEPS = 128


def _running(count: int, preemption: Literal["swap", "recompute"] = "swap") -> Scheduler:
    """A scheduler with `count` sequences in their decode phase, at all phases of a block."""
    limits = SchedulerLimits(
        "bench", 16, count * 64, count, 1024, 2048 + 160 * count, 2048, count,
        host_block_count=count * 64, preemption=preemption,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    rng = np.random.default_rng(0)
    for index in range(count):
        length = PROMPT + index % 16
        prompt = rng.integers(0, 32_000, length).astype(np.int32)
        stop = (2,)
        scheduler.submit(Request(f"r{index}", prompt, max_tokens=800, stop_ids=stop))
    while scheduler.waiting_count or scheduler._prefilling:
        plan = scheduler.schedule()
        if plan is None:
            break
        scheduler.apply(StepResult(plan.step, _tokens(_sampled(scheduler))))
    return scheduler


def _sampled(scheduler: Scheduler) -> int:
    return len(scheduler._in_flight[0].slots)


def _tokens(count: int) -> np.ndarray:
    return np.full(count, 11, np.int32)


def _cpu_ms(work: object) -> float:
    began = time.thread_time_ns()
    work()  # type: ignore[operator]
    return (time.thread_time_ns() - began) / 1e6


def measure(count: int) -> tuple[float, float, float]:
    """Returns mean ms of schedule + apply, of the wire on top, and mean bytes per step."""
    scheduler = _running(count)
    core, wire, sizes = [], [], []
    scheduler.schedule()  # Two steps in flight from here on.
    for _ in range(STEPS):
        began = time.thread_time_ns()
        plan = scheduler.schedule()
        scheduled = time.thread_time_ns()
        assert plan is not None
        message = encode_plan(plan, 1).SerializeToString()
        encoded = time.thread_time_ns()
        answer = engine_pb2.StepResult(
            epoch=1, step=plan.step - 1, token_ids=_tokens(count).tobytes()
        ).SerializeToString()
        made = time.thread_time_ns()
        result = decode_result(engine_pb2.StepResult.FromString(answer))
        decoded = time.thread_time_ns()
        scheduler.apply(result)
        applied = time.thread_time_ns()
        core.append((scheduled - began + applied - decoded) / 1e6)
        wire.append((encoded - scheduled + decoded - made) / 1e6)
        sizes.append(len(message) + len(answer))
    return statistics.mean(core), statistics.mean(wire), statistics.mean(sizes)


def measure_changes(preemption: Literal["swap", "recompute"]) -> tuple[float, float]:
    """Returns mean ms of schedule + apply and mean slots that change state, at 1024 sequences."""
    count, times, changes = 1024, [], []
    scheduler = _running(count, preemption)
    scheduler.schedule()
    rng = np.random.default_rng(1)
    for step in range(STEPS):
        if step % 2 == 0:
            groups = scheduler.resident_groups
            for chosen in rng.choice(len(groups), count // 5, replace=False).tolist():
                scheduler.preempt(groups[chosen])
        began = time.thread_time_ns()
        plan = scheduler.schedule()
        scheduled = time.thread_time_ns()
        assert plan is not None
        crossings = [*plan.swapped_out, *plan.swapped_in]
        moved = sum(len(crossing.slots) for crossing in crossings)
        changes.append(len(plan.released) + len(plan.admissions) + moved)
        flight = scheduler._in_flight[0]
        result = StepResult(flight.step, _tokens(len(flight.slots)))
        made = time.thread_time_ns()
        scheduler.apply(result)
        times.append((scheduled - began + time.thread_time_ns() - made) / 1e6)
    return statistics.mean(times), statistics.mean(changes)


def main() -> None:
    base = None
    for count in (64, 256, 1024, 4096):
        core, wire, size = min(measure(count) for _ in range(3))
        base = base or core
        report(
            "scheduler_step",
            sequences=count,
            schedule_apply_ms=core,
            wire_ms=wire,
            growth_over_64=core / base,
            sequences_growth=count / 64,
            bytes_per_step=size,
            aim_ms=0.5 if count == 1024 else None,
        )
        if count == 1024:
            _report_changes(core)


def _report_changes(steady: float) -> None:
    for preemption in ("swap", "recompute"):
        changing, changes = min(measure_changes(preemption) for _ in range(3))
        report(
            "scheduler_step_under_pressure",
            preemption=preemption,
            sequences=1024,
            slots_changed_per_step=changes,
            over_steady=changing / steady,
            aim_over_steady=3.0 if preemption == "swap" else None,
        )


if __name__ == "__main__":
    main()
