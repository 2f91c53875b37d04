"""How many blocks the samples and beams of a request save by sharing them.

``python -m benchmarks.sharing [--svg FILE]``

The paper's figure 15, as counts that hold on any machine. The same made-up requests as those of
`benchmarks/memory.py` arrive at the real scheduler, each with several samples, or with beam search
of some width. All samples of a request have the same length, as in the paper's own benchmark.
`benchmarks/replay.py` says what stands in for the model, and how beams survive. After each step:
blocks saved = (entries of all block tables - blocks in use) / entries of all block tables. Without
sharing each entry would be a block of its own. Figures are means over the steps after a fifth that
is not counted. At the lower load next to nobody is preempted, which is what the paper's figures
are beside; when memory is short, groups that were preempted come back a sequence at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.chart import Bar, bars
from benchmarks.lengths import PRESSURE, SHAPES, Workload, jobs, synthetic
from benchmarks.memory import TITLES
from benchmarks.replay import Replay, limits_for
from benchmarks.report import report
from benchmarks.tables import NOTHING, Line, number, percent, table

LOADS = {"steady": 0.4, "short of memory": PRESSURE}
METHODS = {"parallel": "parallel sampling", "beam": "beam search"}
WIDTHS = (2, 4, 6)
STEPS = {
    ("sharegpt", "parallel"): 60_000,
    ("alpaca", "parallel"): 4_000,
    ("sharegpt", "beam"): 8_000,
    ("alpaca", "beam"): 1_500,
}
# The ends of the ranges in section 6.3: the smallest width and the largest.
PAPER = {
    ("alpaca", "parallel", 2): 0.061,
    ("alpaca", "parallel", 6): 0.098,
    ("sharegpt", "parallel", 2): 0.162,
    ("sharegpt", "parallel", 6): 0.305,
    ("alpaca", "beam", 2): 0.376,
    ("alpaca", "beam", 6): 0.552,
    ("sharegpt", "beam", 2): 0.443,
    ("sharegpt", "beam", 6): 0.663,
}


def measure(workload: Workload, method: str, width: int, load: str, steps: int) -> Line:
    """One cell of the table."""
    arriving = jobs(workload, steps, LOADS[load], width)
    limits = limits_for(workload.pool_tokens, workload.max_length)
    replay = Replay(limits, arriving, width, beams=method == "beam")
    pool = replay.scheduler.pool
    saved, running = [], []
    for step, _ in enumerate(replay.run(steps)):
        entries = int(pool.reference_counts.sum())
        if step >= steps // 5 and entries:
            saved.append((entries - pool.used_count) / entries)
            running.append(replay.scheduler.running_count)
    pool.check()
    return {
        "workload": workload.name,
        "method": method,
        "width": width,
        "load": load,
        "saved": float(np.mean(saved)),
        "running_sequences": float(np.mean(running)),
        "preemptions_per_step": replay.scheduler.totals.preemptions / steps,
        "paper_saved": PAPER.get((workload.name, method, width)),
    }


def render(lines: Sequence[Line]) -> str:
    """The table; cells without a line are not measured."""
    found = {
        (line["workload"], line["method"], line["width"], line["load"]): line for line in lines
    }
    rows = []
    for method, title in METHODS.items():
        for name in SHAPES:
            for width in WIDTHS:
                cells = [found.get((name, method, width, load), {}) for load in LOADS]
                rows.append(
                    [
                        title,
                        TITLES[name],
                        str(width),
                        percent(PAPER.get((name, method, width))),
                        *(percent(cell.get("saved"), NOTHING) for cell in cells),
                        *(number(cell.get("running_sequences"), NOTHING) for cell in cells),
                    ]
                )
    header = ["method", "lengths", "width", "paper", *(f"saved, {load}" for load in LOADS)]
    return table([*header, *(f"sequences, {load}" for load in LOADS)], rows)


def draw(lines: Sequence[Line]) -> str:
    """The plot, of the lower load."""
    found = {
        (line["workload"], line["method"], line["width"]): line
        for line in lines
        if line["load"] == "steady"
    }
    groups = []
    for method, title in METHODS.items():
        for name in SHAPES:
            members = []
            for width in WIDTHS:
                line = found.get((name, method, width))
                shares = [line["saved"]] if line else []
                note = percent(line["saved"] if line else None, NOTHING)
                mark = PAPER.get((name, method, width))
                members.append(Bar(f"{width} sequences", shares, note, mark))
            groups.append((f"{title}, {TITLES[name]}", members))
    return bars(
        "Blocks saved by sharing",
        "For parallel sampling and beam search with two, four and six sequences a request, the "
        "share of blocks that sharing saves, with marks at the figures of the paper.",
        ("blocks saved",),
        groups,
        scale=0.8,
        mark="the paper's figure 15",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    arguments = parser.parse_args()
    lines: list[Line] = []
    for method in METHODS:
        for name in SHAPES:
            workload = synthetic(name)
            for width, load in product(WIDTHS, LOADS):
                lines.append(measure(workload, method, width, load, STEPS[name, method]))
                report("sharing", **lines[-1])
    print(render(lines))
    if arguments.svg:
        arguments.svg.write_text(draw(lines))


if __name__ == "__main__":
    main()
