"""Lines of JSON, the table at the end of a run, and the tables of docs/performance.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, engine_report, peers
from benchmarks.gpu.cases import Cell

Line = dict[str, Any]
Lines = Mapping[str, Line]

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/performance.md"
NOTHING = "not measured"
BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.S)
SOURCE = re.compile(r"<!-- results: (.+?) -->")
SHORT_NAMES = dict(
    zip(peers.names(), ("FA3", "FlashInfer", "vLLM", "SGLang", "SDPA", "flex"), strict=True)
)


def line(cell: Cell, figures: Mapping[str, Any], lines: Lines) -> Line:
    """A result with what follows from it and from the ceilings among `lines`."""
    derived: dict[str, Any] = {}
    if "failed" not in figures or "us" in figures:
        derive = {
            "decode": _decode,
            "prefill": _prefill,
            "copy": _copy,
            "swap": _swap,
        }.get(cell.section)
        derived = derive(cell, figures, _ceilings(lines)) if derive else {}
        derived |= engine_report.derive(cell, figures, lines)
    content = {**cell.columns(), **figures, **derived}
    content.pop("small", None)
    found: Line = rounded({"benchmark": f"gpu_{cell.section}", "cell": cell.key, **content})
    return found


def rounded(value: Any) -> Any:
    """Four digits, which is more than they mean."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return value


def read(path: Path) -> dict[str, Line]:
    """Lines of a file, by cell; the header has the key ""."""
    found = (json.loads(text) for text in path.read_text().splitlines() if text.strip())
    return {each.get("cell", ""): each for each in found}


def progress(text: Line) -> str:
    """One line of progress."""
    if "failed" in text:
        return f"{text['cell']}: FAILED: {text['failed']}"
    known = {
        "us": "{:.4g} us",
        "gb_s": "{:.0f} GB/s",
        "of_read": "{:.0%} of read",
        "of_floor": "{:.0%} of floor",
        "of_copy": "{:.0%} of copy",
        "of_pinned": "{:.0%} of pinned",
        "tflops": "{:.0f} TFLOP/s",
        "paging_overhead": "{:+.1%} for blocks",
        "plan_us": "plan {:.3g} us",
        "gain": "{:.2f} times",
        "tokens_s": "{:.4g} tokens/s",
        "bubble": "bubble {:.1%}",
        "bubble_eager": "{:.1%} eager",
    }
    parts = [form.format(text[name]) for name, form in known.items() if name in text]
    if not parts and "error" in text:
        parts = [f"error {text['error']:.2g}"]
    peer_times = text.get("peers", {}).items()
    parts += [f"{SHORT_NAMES.get(name, name)} {found['us']:.4g}" for name, found in peer_times]
    parts += engine_report.progress(text)
    return f"{text['cell']}: {', '.join(parts) or 'passed'}"


def _ceilings(lines: Lines) -> dict[str, float]:
    names = {"read": "gb_s", "copy": "gb_s", "matrix": "tflops"}
    found = {each["name"]: each for each in lines.values() if each["benchmark"] == "gpu_ceiling"}
    ceilings = {name: found[name].get(figure) for name, figure in names.items() if name in found}
    pinned = found.get("pinned", {})
    ceilings |= {"out": pinned.get("out_gb_s"), "in": pinned.get("in_gb_s")}
    return {name: value for name, value in ceilings.items() if value}


def _share(value: float, ceilings: Mapping[str, float], name: str) -> float | None:
    return value / ceilings[name] if name in ceilings else None


def _decode(cell: Cell, figures: Mapping[str, Any], ceilings: Mapping[str, float]) -> Line:
    """The floor is what a copy's rate allows, as published figures have it."""
    rate = figures["kv_bytes"] / figures["us"] / 1e3
    derived: Line = {"gb_s": rate, "of_read": _share(rate, ceilings, "read")}
    if "copy" in ceilings:
        floor = figures["kv_bytes"] / ceilings["copy"] / 1e3
        derived |= {"floor_us": floor, "of_floor": floor / figures["us"]}
    return derived | _overhead(figures)


def _prefill(cell: Cell, figures: Mapping[str, Any], ceilings: Mapping[str, float]) -> Line:
    rate = figures["operations"] / figures["us"] / 1e6
    derived = {"tflops": rate, "of_matrix": _share(rate, ceilings, "matrix")}
    return derived | _overhead(figures)


def _overhead(figures: Mapping[str, Any]) -> Line:
    contiguous = figures.get("contiguous_us")
    return {"paging_overhead": figures["us"] / contiguous - 1} if contiguous else {}


def _copy(cell: Cell, figures: Mapping[str, Any], ceilings: Mapping[str, float]) -> Line:
    rate = 2 * figures["bytes"] / figures["us"] / 1e3
    return {"gb_s": rate, "of_copy": _share(rate, ceilings, "copy")}


def _swap(cell: Cell, figures: Mapping[str, Any], ceilings: Mapping[str, float]) -> Line:
    assert isinstance(cell, cases.Swap)
    rate = figures["bytes"] / figures["us"] / 1e3
    return {"gb_s": rate, "of_pinned": _share(rate, ceilings, cell.direction)}


def render(lines: Lines, cells: Sequence[Cell]) -> dict[str, str]:
    """The tables of the page, by name. Cells without a line are not measured."""
    makers: dict[str, Callable[[Lines, Sequence[Cell]], str]] = {
        "device": _device_table,
        "checks": _check_table,
        "ceiling": _ceiling_table,
        "decode": _decode_table,
        "prefill": _prefill_table,
        "copy": _copy_table,
        "swap": _swap_table,
    }
    found = {name: make(lines, cells) for name, make in makers.items()}
    return found | engine_report.tables(lines, cells)


def page(text: str, source: str, lines: Lines) -> str:
    """The page with its tables made anew. source: where the lines come from, for the page."""
    tables = render(lines, cases.measured(dry=False))

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}{tables[found[2]]}\n{found[3]}"

    text = BLOCK.sub(table, text)
    return SOURCE.sub(f"<!-- results: {source} -->", text)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    texts = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in texts)


def _row(labels: Sequence[str], text: Line | None, figures: Sequence[str]) -> list[str]:
    """figures: formats of the columns, each with a name of the line in it."""
    if text is None:
        return [*labels, *[NOTHING] * len(figures)]
    if "failed" in text and "us" not in text:
        return [*labels, *["failed"] * len(figures)]
    return [*labels, *(_format(figure, text) for figure in figures)]


def _format(figure: str, text: Line) -> str:
    try:
        return figure.format(**text)
    except KeyError:
        return "–"


def _of(cells: Sequence[Cell], section: str) -> list[Any]:
    return [cell for cell in cells if cell.section == section]


def _device_table(lines: Lines, cells: Sequence[Cell]) -> str:
    header = lines.get("")
    rows = [
        [name, str(header.get(name, "–")) if header else NOTHING]
        for name in ("date", "name", "driver", "torch", "triton", "transformers", "commit")
    ]
    return _table(("", ""), rows)


def _check_table(lines: Lines, cells: Sequence[Cell]) -> str:
    checks = [lines[cell.key] for cell in _of(cells, "check") if cell.key in lines]
    if not checks:
        return f"{len(_of(cells, 'check'))} checks: {NOTHING}."
    failed = [each["cell"] for each in checks if "failed" in each]
    total = len(_of(cells, "check"))
    said = f"{len(checks) - len(failed)} of {total} checks passed, {total - len(checks)} not run."
    return said + (f" Failed: {', '.join(failed)}." if failed else "")


def _ceiling_table(lines: Lines, cells: Sequence[Cell]) -> str:
    forms = {
        "read": ("reading", "{gb_s:.0f} GB/s"),
        "copy": ("copying, bytes read and written", "{gb_s:.0f} GB/s"),
        "matrix": ("bf16 product, 8192 x 8192 x 8192", "{tflops:.0f} TFLOP/s"),
        "pinned": ("pinned memory, out and in", "{out_gb_s:.1f} and {in_gb_s:.1f} GB/s"),
    }
    rows = [
        _row([forms[cell.name][0]], lines.get(cell.key), [forms[cell.name][1]])
        for cell in _of(cells, "ceiling")
    ]
    return _table(("ceiling", "rate"), rows)


def _labels(cell: Any) -> list[str]:
    notes = [
        name
        for name, said in (
            (cell.layout, cell.layout != "block-first"),
            (getattr(cell, "lengths", ""), getattr(cell, "lengths", "uniform") != "uniform"),
            (f"pool of {getattr(cell, 'pool', 1)}", getattr(cell, "pool", 1) != 1),
        )
        if said
    ]
    heads = f"{cell.heads}/{cell.kv_heads}"
    return [heads, str(cell.block), " ".join([cell.cache, *notes])]


def _peer_figures(form: str) -> list[str]:
    return [form.format(name=name) for name in peers.names()]


def _rows(
    lines: Lines, cells: Iterable[Any], figures: Sequence[str], count: Callable[[Any], list[str]]
) -> list[list[str]]:
    """Rows of decodes or prefills. What takes long to compile has a cell of its own, whose
    times belong into the row of the cell that is like it but for that."""
    rows = []
    for cell in cells:
        if cell.compiled:
            continue
        text = lines.get(cell.key)
        if text is not None:
            twin = lines.get(replace(cell, compiled=True).key, {})
            found = {**twin.get("peers", {}), **text.get("peers", {})}
            text = text | {name: each["us"] for name, each in found.items()}
        rows.append(_row([*count(cell), *_labels(cell)], text, figures))
    return rows


def _decode_table(lines: Lines, cells: Sequence[Cell]) -> str:
    figures = [
        "{us:.4g} ({low:.4g} to {high:.4g})",
        "{gb_s:.0f}",
        "{of_read:.0%}",
        "{of_floor:.0%}",
        "{contiguous_us:.4g}",
        "{paging_overhead:+.1%}",
        "{plan_us:.3g}",
        *_peer_figures("{{{name}:.4g}}"),
    ]
    decodes = _of(cells, "decode")
    rows = _rows(lines, decodes, figures, lambda cell: [str(cell.batch), str(cell.context)])
    columns = ("batch", "context", "heads", "block", "cache", "µs (10th to 90th percentile)")
    more = ("GB/s", "of reading", "of the floor", "no blocks", "blocks cost", "plan")
    return _table((*columns, *more, *peers.names()), rows)


def _prefill_table(lines: Lines, cells: Sequence[Cell]) -> str:
    figures = [
        "{us:.4g} ({low:.4g} to {high:.4g})",
        "{tflops:.0f}",
        "{of_matrix:.0%}",
        "{contiguous_us:.4g}",
        "{paging_overhead:+.1%}",
        *_peer_figures("{{{name}:.4g}}"),
    ]
    prefills = _of(cells, "prefill")
    rows = _rows(
        lines,
        prefills,
        figures,
        lambda cell: [str(cell.sequences), str(cell.chunk), str(cell.context)],
    )
    columns = ("sequences", "chunk", "context", "heads", "block", "cache")
    more = ("µs (10th to 90th percentile)", "TFLOP/s", "of the product", "no blocks")
    return _table((*columns, *more, "blocks cost", *peers.names()), rows)


def _copy_table(lines: Lines, cells: Sequence[Cell]) -> str:
    figures = ["{us:.4g}", "{gb_s:.0f}", "{of_copy:.0%}"]
    rows = [
        _row([str(cell.mib), f"{cell.kib} KiB", cell.layout], lines.get(cell.key), figures)
        for cell in _of(cells, "copy")
    ]
    return _table(("MiB", "block", "layout", "µs", "GB/s", "of copying"), rows)


def _swap_table(lines: Lines, cells: Sequence[Cell]) -> str:
    figures = ["{us:.4g}", "{gb_s:.1f}", "{of_pinned:.0%}"]
    rows = [
        _row([cell.direction, f"{cell.kib} KiB", cell.layout], lines.get(cell.key), figures)
        for cell in _of(cells, "swap")
    ]
    return _table(("direction", "block", "layout", "µs", "GB/s", "of pinned"), rows)


def summary(lines: Lines) -> str:
    """The table at the end of a run: short, since the lines have the rest."""
    found = []
    for text in lines.values():
        section = text.get("benchmark", "")
        if section in ("gpu_check", "") or "cell" not in text:
            continue
        found.append(progress(text))
        if section.startswith("gpu_tune"):
            found += [f"    {_tiling(text, each)}" for each in text.get("best", [])]
    checks = [text for text in lines.values() if text["benchmark"] == "gpu_check"]
    failed = [text for text in lines.values() if "failed" in text]
    found.append(_seconds(lines))
    found.append(f"checks: {len(checks)}, failed cells: {len(failed)}")
    found += [f"  {text['cell']}: {text['failed']}" for text in failed]
    return "\n".join(found)


def _seconds(lines: Lines) -> str:
    """What the cells of each section took; what is compiled ahead of them is not in it."""
    sums: dict[str, float] = {}
    for text in (text for text in lines.values() if "cell" in text):
        section = text["benchmark"].removeprefix("gpu_")
        sums[section] = sums.get(section, 0.0) + text.get("took", 0.0)
    return "seconds: " + ", ".join(f"{name} {total:.1f}" for name, total in sums.items())


def _tiling(text: Line, best: Line) -> str:
    """A tiling's numbers, with the present ones where they differ."""
    names = ("rows", "keys", "warps", "stages", "programs", "partial_cost")
    present = text["present"]
    parts = [
        f"{name} {best[name]}" + (f" (now {present[name]})" if best[name] != present[name] else "")
        for name in names
    ]
    return f"{best['us']:.4g} us ({best['low']:.4g} to {best['high']:.4g}): {', '.join(parts)}"
