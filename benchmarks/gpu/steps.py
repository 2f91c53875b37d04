"""Decode steps of a whole model: how long one takes, and how much of that its kernels do.

Between the results of two steps that are launched ahead lies what the engine makes of a step: the
kernels of its forward pass and its draws, and where the device waits for the host, or for one
kernel after the other, nothing. That share is the bubble. The floor is what reading takes: every
weight once, and the keys and values of every sequence.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu.cases import Kernels, Step
from benchmarks.gpu.chains import Planner, furnish, run
from benchmarks.gpu.device import Device, describe
from benchmarks.gpu.models import Loaded
from data_plane.engine import Engine, EngineSizes

BLOCK = 16
STEP_TOKENS = 2048
# Steps before those that are timed, and those. The profiler's are in the middle of the timed ones,
# so that contexts are as long.
LEAD, TIMED, PROFILED = 10, 40, 6
DRY_LEAD, DRY_TIMED, DRY_PROFILED = 2, 4, 2
NAMED_KERNELS = 12


class Chain:
    """An engine whose sequences are about to decode, and the plans for that.

    Attributes:
        timed: how many of the last plans count.
    """

    def __init__(self, loaded: Loaded, batch: int, context: int, device: Device) -> None:
        self.lead, self.timed = (DRY_LEAD, DRY_TIMED) if device.dry else (LEAD, TIMED)
        facts = loaded.model.facts
        new_tokens = self.lead + self.timed + 8
        # Lengths differ by up to a block, so that in each step some sequences take a block.
        contexts = [context - BLOCK // 2 + at % BLOCK for at in range(batch)]
        blocks = sum(-(-(length + new_tokens) // BLOCK) for length in contexts)
        self.sizes = EngineSizes(
            block_size=BLOCK,
            # Some stay free for admission to go on.
            block_count=blocks + blocks // 50 + batch,
            host_block_count=0,
            slot_count=batch,
            step_tokens=max(STEP_TOKENS, batch),
            max_length=facts.max_model_length,
        )
        self.loaded, self.batch = loaded, batch
        self.planner = Planner(self.sizes, facts.vocabulary_size)
        self.planner.hold(contexts, new_tokens)
        begin = self.planner.until_all_decode(batch)
        more = [self.planner.plan() for _ in range(self.lead + self.timed)]
        self.plans = [*begin, *(planned for planned in more if planned)]

    def engine(self, *, graphs: bool) -> Engine:
        engine = Engine(self.loaded.model, self.sizes, buckets=(self.batch,) if graphs else ())
        furnish(engine, self.planner)
        engine.capture()
        return engine


def step(cell: Step, loaded: Loaded, device: Device) -> dict[str, Any]:
    """Times of a step, and the bytes that it reads."""
    chain = Chain(loaded, cell.batch, cell.context, device)
    engine = chain.engine(graphs=not cell.eager)
    times = run(engine, chain.plans)
    steps = sorted(times.steps_us(chain.timed))
    cache = engine.cache
    # What the timed steps read on average: each has one token more of every sequence.
    tokens = int(engine.state.computed.sum()) - cell.batch * (chain.timed - 1) / 2
    tenth = len(steps) // 10
    return {
        "us": statistics.median(steps),
        "low": steps[tenth],
        "high": steps[-1 - tenth],
        "launch_us": statistics.median(times.launches[-chain.timed :]) * 1e6,
        "weight_bytes": loaded.read_bytes,
        "kv_bytes": tokens * cache.bytes_per_block / cache.block_size,
        "load_seconds": loaded.seconds,
    }


def kernels(cell: Kernels, loaded: Loaded, device: Device) -> dict[str, Any]:
    """The kernels of a step, by the profiler; of a graph where that can be captured."""
    chain = Chain(loaded, cell.batch, cell.context, device)
    figures: dict[str, Any] = {}
    engine = None
    try:
        engine = chain.engine(graphs=True)
    except Exception as error:
        figures["missing"] = {"graphs": describe(error)}
    if engine is None:
        # Not before the error is gone, which holds the memory of the engine that it comes from.
        device.recover()
        device.release()
        engine = chain.engine(graphs=False)
    profiled = DRY_PROFILED if device.dry else PROFILED
    begin = len(chain.plans) - (chain.timed + profiled) // 2
    run(engine, chain.plans[:begin])
    plans = chain.plans[begin : begin + profiled]
    found = device.kernel_times(lambda: run(engine, plans))
    own = [kernel for kernel in found if not kernel.copies]
    return {
        **figures,
        "us": sum(kernel.us for kernel in own) / profiled,
        "copies_us": sum(kernel.us for kernel in found if kernel.copies) / profiled,
        "calls": sum(kernel.calls for kernel in own) / profiled,
        "longest": [
            {
                "name": kernel.name[:120],
                "calls": kernel.calls / profiled,
                "us": kernel.us / profiled,
            }
            for kernel in own[:NAMED_KERNELS]
        ],
    }
