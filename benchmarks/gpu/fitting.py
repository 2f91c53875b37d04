"""How many requests fit into the memory that is free beside the weights (the paper's figure 13).

Requests with lengths like ShareGPT's wait from the start, and are admitted as long as there is
room: by the real scheduler into blocks, and into contiguous chunks that are as long as a sequence
can be, as its output's next power of two, or as it will be. What the scheduler holds at its
fullest is then really put on the device, and decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.contiguous import Buddy, Contiguous
from benchmarks.gpu.cases import Fit
from benchmarks.gpu.chains import Planner, furnish, run
from benchmarks.gpu.device import Device
from benchmarks.gpu.models import Loaded
from benchmarks.lengths import Job, synthetic
from benchmarks.replay import BLOCK_SIZE, STEP_TOKENS, Replay, limits_for
from data_plane.engine import Engine, EngineSizes

# The rest is for what a step computes.
MEMORY_SHARE = 0.85
# Twice the longest life of a request, and after how many steps it counts.
STEPS, DRY_STEPS = 1200, 60
COUNTED_FROM = 0.4
REQUESTS, DRY_REQUESTS = 4000, 200
POLICIES = ("max", "pow2", "oracle")
PAGED = "paged"
# The paper's model takes so many tokens in a sequence, which is what "max" reserves.
MAX_LENGTH = 2048
DECODES = 3


@dataclass(frozen=True)
class Fullest:
    """mean: requests that run at once. lengths: tokens of each of them when they are most."""

    mean: float
    lengths: list[int]


def fit(cell: Fit, loaded: Loaded, device: Device) -> dict[str, Any]:
    device.release()
    facts = loaded.model.facts
    item = facts.dtype.itemsize
    per_token = 2 * facts.layer_count * facts.local_kv_head_count * facts.head_size * item
    free = device.free_bytes
    pool = int(free * MEMORY_SHARE) // (per_token * BLOCK_SIZE) * BLOCK_SIZE
    steps = DRY_STEPS if device.dry else STEPS
    count = DRY_REQUESTS if device.dry else REQUESTS
    pairs = synthetic("sharegpt", 10 * count).pairs[:count].tolist()
    jobs = [Job(0, prompt, output) for prompt, output in pairs]
    paged = _paged(jobs, pool, steps)
    figures: dict[str, Any] = {
        "free_bytes": free,
        "pool_tokens": pool,
        "batches": {PAGED: paged.mean},
        "most": len(paged.lengths),
        "load_seconds": loaded.seconds,
    }
    for policy in POLICIES:
        held = Contiguous(policy, Buddy(pool), pool, MAX_LENGTH, STEP_TOKENS).run(jobs, steps)
        running = [each.running for each in islice(held, int(steps * COUNTED_FROM), None)]
        figures["batches"][policy] = float(np.mean(running))
    figures |= _really(paged.lengths, pool, loaded)
    if figures["ran"] < 0.95 * figures["most"]:
        figures["failed"] = f"of {figures['most']} sequences {figures['ran']} decoded together"
    return figures


def _paged(jobs: list[Job], pool: int, steps: int) -> Fullest:
    replay = Replay(replace(limits_for(pool, MAX_LENGTH), slot_count=_slots(pool)), jobs)
    running, lengths = [], np.zeros(0, np.int32)
    for step, _ in enumerate(replay.run(steps)):
        slots = replay.scheduler.slots
        # As long as a prompt is not computed, its sequence does not decode.
        here = slots.computed[(slots.block_count > 0) & (slots.computed > 0)]
        if step >= steps * COUNTED_FROM:
            running.append(replay.scheduler.running_count)
            lengths = max(lengths, here.copy(), key=len)
    return Fullest(float(np.mean(running)), lengths.tolist())


def _slots(pool: int) -> int:
    """More than ever run together, so that memory is what limits."""
    return max(64, pool // 64)


def _really(lengths: list[int], pool: int, loaded: Loaded) -> dict[str, Any]:
    """Decodes sequences of these lengths in a pool of this size; how many ran together."""
    facts = loaded.model.facts
    slots = max(len(lengths), 1)
    sizes = EngineSizes(
        block_size=BLOCK_SIZE,
        block_count=pool // BLOCK_SIZE,
        host_block_count=0,
        slot_count=slots,
        step_tokens=max(STEP_TOKENS, slots),
        max_length=min(facts.max_model_length, MAX_LENGTH),
    )
    engine = Engine(loaded.model, sizes)
    planner = Planner(sizes, facts.vocabulary_size)
    planner.hold([min(length, MAX_LENGTH - 16) for length in lengths], 16)
    furnish(engine, planner)
    plans = []
    for planned in planner.upcoming():
        plans.append(planned)
        if sum(not each.chunk_tokens and each.decodes > 0 for each in plans) == DECODES:
            break
    times = run(engine, plans)
    return {
        "ran": max(planned.decodes for planned in plans),
        "step_us": times.steps_us(1)[0],
        "cache_bytes": engine.cache.bytes_per_block * sizes.block_count,
    }
