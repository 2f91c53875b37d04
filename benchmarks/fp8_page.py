"""Writes the tables of docs/fp8.md out of the lines of a run.

``python -m benchmarks.fp8_page FILE``: FILE has what ``python -m benchmarks.fp8_accuracy`` prints;
what is no line of JSON in it does not count.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks import fp8_accuracy
from benchmarks.memory_page import BLOCK, ROOT, SOURCE
from benchmarks.tables import Line

PAGE = ROOT / "docs/fp8.md"
RENDERERS = {
    "fp8_accuracy": fp8_accuracy.render_accuracy,
    "fp8_range": fp8_accuracy.render_range,
}


def read(text: str) -> dict[str, list[Line]]:
    """Lines by benchmark."""
    found: dict[str, list[Line]] = {name: [] for name in RENDERERS}
    for line in text.splitlines():
        if line.startswith("{"):
            content = json.loads(line)
            found[content.pop("benchmark")].append(content)
    return found


def page(text: str, source: str, lines: dict[str, list[Line]]) -> str:
    """The page with its tables made anew. source: where the lines come from, for the page."""

    def render(found: re.Match[str]) -> str:
        return f"{found[1]}{RENDERERS[found[2]](lines[found[2]])}\n{found[3]}"

    return SOURCE.sub(f"<!-- results: {source} -->", BLOCK.sub(render, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, metavar="FILE")
    path = parser.parse_args().lines
    source = path.resolve().relative_to(ROOT).as_posix()
    PAGE.write_text(page(PAGE.read_text(), source, read(path.read_text())))


if __name__ == "__main__":
    main()
