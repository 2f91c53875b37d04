"""How much of KV memory holds token states: Quire's blocks beside contiguous allocation.

``python -m benchmarks.memory [--traces DIR] [--svg FILE]``

The paper's figure 2, and what its figure 13 is about, as counts that hold on any machine: no model
runs. The same requests arrive at the real scheduler, whose pool has blocks of 16, and at
contiguous allocators with as much memory; `benchmarks/contiguous.py` says how those work and what
the states of memory are. In
Quire's blocks they are the same: "reserved" is a slot of a block that its sequence will write,
"internal" one that it never will, "free" a block that nobody holds, of which admission keeps some
back for those that run. Figures are means over the steps after a fifth that is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.chart import Bar, bars
from benchmarks.contiguous import Allocator, Buddy, Contiguous, FirstFit, Held
from benchmarks.lengths import PRESSURE, SHAPES, Job, Workload, azure, jobs, synthetic
from benchmarks.replay import BLOCK_SIZE, STEP_TOKENS, Replay, limits_for
from benchmarks.report import report
from benchmarks.tables import Line, number, percent, table

# Some ten lives of a request, and some thousands of requests.
STEPS = {"sharegpt": 30_000, "alpaca": 6_000, "azure": 20_000}
STATES = ("tokens", "reserved", "internal", "rounding", "free")
QUIRE = "Quire, blocks of 16"
CONTIGUOUS: dict[str, tuple[str, Callable[[int], Allocator]]] = {
    "max, buddy": ("max", Buddy),
    "pow2, buddy": ("pow2", Buddy),
    "oracle, buddy": ("oracle", Buddy),
    "pow2, first fit": ("pow2", FirstFit),
    "oracle, first fit": ("oracle", FirstFit),
}
# Figure 2, of OPT-13B: for vLLM of the memory that is allocated, for Orca of all of it. Ours is in
# the place of vLLM.
PAPER_TOKENS = {
    ("sharegpt", QUIRE): 0.963,
    ("sharegpt", "max, buddy"): 0.204,
    ("sharegpt", "pow2, buddy"): 0.268,
    ("sharegpt", "oracle, buddy"): 0.382,
}
TITLES = {"sharegpt": "ShareGPT-like", "alpaca": "Alpaca-like", "azure": "Azure conversations"}
NO_TRACES = "azure: left out, because --traces does not say where its trace is"


def _held_by_blocks(replay: Replay, steps: int) -> Iterator[Held]:
    """What Quire's pool holds after each step."""
    scheduler = replay.scheduler
    pool_tokens = scheduler.limits.block_count * BLOCK_SIZE
    for _ in replay.run(steps):
        slots = scheduler.slots
        here = slots.block_count > 0
        room = slots.block_count[here].astype(np.int64) * BLOCK_SIZE
        # A sequence may run a step too long before its end is known; that step counts as waste.
        final = np.minimum(replay.final[here], room)
        tokens = int(np.minimum(slots.computed[here], final).sum())
        held = scheduler.pool.used_count * BLOCK_SIZE
        yield Held(
            tokens=tokens,
            reserved=int(final.sum()) - tokens,
            internal=held - int(final.sum()),
            rounding=0,
            free=pool_tokens - held,
            running=scheduler.running_count,
            waiting=scheduler.waiting_count,
        )


def _means(held: Iterator[Held], steps: int, pool_tokens: int) -> Line:
    """Shares of the pool by state, and how many run, over the steps after the first fifth."""
    kept = [each for step, each in enumerate(held) if step >= steps // 5]
    shares = {
        state: float(np.mean([getattr(each, state) for each in kept])) / pool_tokens
        for state in STATES
    }
    return {
        **shares,
        "of_held": shares["tokens"] / (1 - shares["free"]),
        "running": float(np.mean([each.running for each in kept])),
        "steps_with_waiting": float(np.mean([each.waiting > 0 for each in kept])),
    }


def _line(workload: Workload, name: str, figures: Line) -> Line:
    key = (workload.name, name)
    return {
        "workload": workload.name,
        "allocator": name,
        **figures,
        "paper_tokens": PAPER_TOKENS.get(key),
    }


def _measure_quire(workload: Workload, arriving: Sequence[Job], steps: int) -> Line:
    replay = Replay(limits_for(workload.pool_tokens, workload.max_length), arriving)
    figures = _means(_held_by_blocks(replay, steps), steps, workload.pool_tokens)
    totals = replay.scheduler.totals
    # Nearly all that run decode, so each of them brings a token in each step.
    done = totals.prompt_tokens + figures["running"] * steps
    costs = {
        "preemptions_per_step": totals.preemptions / steps,
        "recomputed_of_tokens": totals.recomputed_tokens / done,
    }
    return _line(workload, QUIRE, figures | costs)


def measure(workload: Workload, steps: int, load: float = PRESSURE) -> list[Line]:
    """One line for each allocator, Quire first."""
    arriving = jobs(workload, steps, load)
    slots = workload.pool_tokens
    lines = [_measure_quire(workload, arriving, steps)]
    for name, (policy, allocator) in CONTIGUOUS.items():
        pool = Contiguous(policy, allocator(slots), slots, workload.max_length, STEP_TOKENS)
        lines.append(_line(workload, name, _means(pool.run(arriving, steps), steps, slots)))
    return lines


def workloads(traces: Path | None) -> list[Workload]:
    synthetics = [synthetic(name) for name in SHAPES]
    return [*synthetics, azure(traces)] if traces else synthetics


def render(lines: Sequence[Line]) -> str:
    """The table. Shares but one are of the whole pool."""
    rows = []
    for line in lines:
        # The paper's figure for blocks is a share of what is allocated.
        blocks = line["allocator"] == QUIRE
        paper = percent(line["paper_tokens"])
        held = percent(line["of_held"])
        rows.append(
            [
                TITLES[line["workload"]],
                line["allocator"],
                percent(line["tokens"]) + (f" ({paper})" if paper != "–" and not blocks else ""),
                *(percent(line[state]) for state in STATES[1:]),
                held + (f" ({paper})" if paper != "–" and blocks else ""),
                number(line["running"]),
                percent(line.get("recomputed_of_tokens")),
            ]
        )
    header = ["lengths", "allocator", "token states", *STATES[1:], "of allocated", "run together"]
    return table([*header, "computed again"], rows)


def draw(lines: Sequence[Line]) -> str:
    """The plot: one bar for each allocator, cut by state."""
    groups = []
    for name in dict.fromkeys(line["workload"] for line in lines):
        members = [
            Bar(
                line["allocator"],
                [line[state] for state in STATES],
                f"{percent(line['tokens'])}, {line['running']:.0f} run",
            )
            for line in lines
            if line["workload"] == name
        ]
        groups.append((TITLES[name], members))
    return bars(
        "What KV memory holds",
        "For each workload and allocator, the shares of KV memory that hold token states, that "
        "are reserved for tokens to come, that are wasted within and between chunks, and that are "
        "free while requests wait; with the mean number of requests that run together.",
        ("token states", *STATES[1:]),
        groups,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="folder that has the Azure trace")
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    arguments = parser.parse_args()
    lines: list[Line] = []
    for workload in workloads(arguments.traces):
        measured = measure(workload, STEPS[workload.name])
        for line in measured:
            report("memory", **line)
        lines += measured
    if not arguments.traces:
        print(NO_TRACES)
    print(render(lines))
    if arguments.svg:
        arguments.svg.write_text(draw(lines))


if __name__ == "__main__":
    main()
