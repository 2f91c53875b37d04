"""What follows from the lines of engine cells, and their tables for docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gpu import cases
from benchmarks.gpu.cases import Cell
from benchmarks.tables import NOTHING, table

Line = dict[str, Any]
Lines = Mapping[str, Line]
Figures = Mapping[str, Any]

ALLOCATIONS = {
    "paged": "blocks of 16, by the scheduler",
    "oracle": "contiguous, the true length (oracle)",
    "pow2": "contiguous, the output's next power of two",
    "max": "contiguous, the longest sequence there can be",
}
PROMISES = {
    "tokens": "greedy tokens of the demo model are transformers' own: eager, in graphs, fused",
    "memory": "no memory is taken from the driver after start, once each kind of step was seen",
}


def derive(cell: Cell, figures: Figures, lines: Lines) -> Line:
    """What a line says beyond what was measured in its cell."""
    if isinstance(cell, cases.Step):
        return _step(figures, lines)
    if isinstance(cell, cases.Kernels):
        return _kernels(cell, figures, lines)
    if isinstance(cell, cases.Rate):
        return _rate(figures)
    return {}


def _step(figures: Figures, lines: Lines) -> Line:
    """The floor is what reading takes, at the rate at which the device reads."""
    read = lines.get(cases.Ceiling("read").key, {}).get("gb_s")
    if not read:
        return {}
    floor = (figures["weight_bytes"] + figures["kv_bytes"]) / read / 1e3
    return {"floor_us": floor, "of_floor": floor / figures["us"]}


def _kernels(cell: cases.Kernels, figures: Figures, lines: Lines) -> Line:
    """What of a step its kernels leave, by how long it takes with graphs and without."""
    bubbles = {}
    for name, eager in (("bubble", False), ("bubble_eager", True)):
        if eager and cell.fused:
            continue
        shape = cell.model, cell.batch, cell.context
        step = lines.get(cases.Step(*shape, eager, cell.fused).key, {})
        if "us" in step:
            bubbles[name] = 1 - figures["us"] / step["us"]
    return bubbles


def _rate(figures: Figures) -> Line:
    rates = {"tokens_s": figures["tokens"] / figures["us"] * 1e6}
    peers = [peer["us"] for peer in figures["peers"].values()]
    return rates | ({"times": min(peers) / figures["us"]} if peers else {})


def tables(lines: Lines, cells: Sequence[Cell]) -> dict[str, str]:
    """By their names in the page."""
    makers: dict[str, Callable[[Lines, Sequence[Any]], str]] = {
        "promises": _promises,
        "steps": _steps,
        "rates": _rates,
        "preemption": _preemption,
        "fitting": _fitting,
    }
    return {name: make(lines, cells) for name, make in makers.items()}


def _of(cells: Iterable[Any], kind: type[Cell]) -> list[Any]:
    return [cell for cell in cells if isinstance(cell, kind)]


def _absent(cell: Cell, cells: Sequence[Any]) -> Line | None:
    """What stands for a line that there is not: of a cell that no run has, nothing is missing."""
    return None if cell in cells else {"cell": ""}


def _text(form: str, figures: Figures | None) -> str:
    """A figure, or why there is none."""
    if not figures:
        return NOTHING
    try:
        return form.format(**figures)
    except KeyError:
        return "failed" if "failed" in figures else "–"


def _promises(lines: Lines, cells: Sequence[Any]) -> str:
    rows = []
    for cell in _of(cells, cases.EngineCheck):
        line = lines.get(cell.key)
        said = NOTHING if line is None else line.get("failed", "holds")
        rows.append([PROMISES[cell.what], cell.model, str(said)])
    return table(("what", "model", "result"), rows)


def _steps(lines: Lines, cells: Sequence[Any]) -> str:
    """One row for the cells with and without graphs, with fused layers, and of the kernels."""
    header = ("model", "batch", "context", "µs with graphs (10th to 90th percentile)", "eager")
    more = ("floor", "of it (aim 85%)", "kernels", "of them", "bubble (aim 2%)", "bubble eager")
    last = ("launching", "µs with graphs, fused layers", "kernels, fused", "bubble, fused")
    rows = []
    for cell in _of(cells, cases.Step):
        if cell.eager or cell.fused:
            continue
        apart = cases.Kernels(cell.model, cell.batch, cell.context)
        others = (
            replace(cell, eager=True),
            apart,
            replace(cell, fused=True),
            replace(apart, fused=True),
        )
        graphs = lines.get(cell.key)
        eager, kernels, fused, fewer = (
            lines.get(other.key, _absent(other, cells)) for other in others
        )
        rows.append(
            [
                cell.model,
                str(cell.batch),
                str(cell.context),
                _text("{us:.5g} ({low:.5g} to {high:.5g})", graphs),
                _text("{us:.5g}", eager),
                _text("{floor_us:.5g}", graphs),
                _text("{of_floor:.0%}", graphs),
                _text("{us:.5g}", kernels),
                _text("{calls:.0f}", kernels),
                _text("{bubble:.1%}", kernels),
                _text("{bubble_eager:.1%}", kernels),
                _text("{launch_us:.4g}", graphs),
                _text("{us:.5g}", fused),
                _text("{calls:.0f}", fewer),
                _text("{bubble:.1%}", fewer),
            ]
        )
    return table((*header, *more, *last), rows)


def _rates(lines: Lines, cells: Sequence[Any]) -> str:
    rows = []
    for cell in _of(cells, cases.Rate):
        line = lines.get(cell.key)
        peers = [_peer_rate(line, name) for name in cases.MODEL_PEERS]
        ours, times = _text("{tokens_s:.4g}", line), _text("{times:.2f}", line)
        rows.append([cell.model, str(cell.batch), ours, *peers, times])
    return table(("model", "batch", "Quire", *cases.MODEL_PEERS, "times the faster (aim 1)"), rows)


def _peer_rate(line: Line | None, name: str) -> str:
    peer = (line or {}).get("peers", {}).get(name)
    if not line or not peer:
        return _text("{no}", line)
    return f"{line['tokens'] / peer['us'] * 1e6:.4g}"


def _preemption(lines: Lines, cells: Sequence[Any]) -> str:
    rows = []
    for cell in _of(cells, cases.Preempt):
        line = lines.get(cell.key) or {}
        points = line.get("points") or [None]
        for point in points:
            length = str(point["length"]) if point else "256 to 8192"
            figures = point or ({"failed": line["failed"]} if "failed" in line else None)
            rows.append(
                [
                    cell.model,
                    str(cell.block),
                    length,
                    _text("{out_us:.4g}", figures),
                    _text("{in_us:.4g}", figures),
                    _text("{swap_us:.4g}", figures),
                    _text("{recompute_us:.4g}", figures),
                    _cheaper(figures),
                ]
            )
    header = ("model", "block", "tokens", "µs out", "µs in", "out and in", "recomputed")
    return table((*header, "cheaper"), rows)


def _cheaper(figures: Figures | None) -> str:
    if not figures:
        return NOTHING
    if "swap_us" not in figures:
        return "failed"
    return "swapping" if figures["swap_us"] < figures["recompute_us"] else "recomputing"


def _fitting(lines: Lines, cells: Sequence[Any]) -> str:
    rows = []
    for cell in _of(cells, cases.Fit):
        line = lines.get(cell.key)
        for name, said in ALLOCATIONS.items():
            batches = (line or {}).get("batches", {})
            figures = {"batch": batches[name]} if name in batches else None
            if figures is None and line:
                figures = {"failed": True}
            paged = name == "paged"
            most, ran = (_text(form, line) if paged else "" for form in ("{most}", "{ran}"))
            rows.append([cell.model, said, _text("{batch:.1f}", figures), most, ran])
    header = ("model", "allocation", "requests at once", "at most", "decoded together")
    return table(header, rows)


def progress(line: Line) -> list[str]:
    """What the line of progress says of an engine's cell."""
    points = [
        f"{point['length']}: swap {point['swap_us']:.4g}, recompute {point['recompute_us']:.4g} us"
        for point in line.get("points", [])
    ]
    batches = [f"{name} {batch:.1f}" for name, batch in line.get("batches", {}).items()]
    return points + batches
