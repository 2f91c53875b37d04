"""Writes the tables and plots of docs/memory.md out of the lines of a run.

``python -m benchmarks.memory_page FILE``: FILE has what `make bench-memory` and
`make bench-sharing` print; what is no line of JSON in it does not count.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import memory, prefix_cache, sharing
from benchmarks.tables import Line

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/memory.md"
BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.S)
SOURCE = re.compile(r"<!-- results: (.+?) -->")
# By the name of the benchmark in a line: its table and its plot.
PARTS: dict[str, tuple[Callable[[Sequence[Line]], str], Callable[[Sequence[Line]], str]]] = {
    "memory": (memory.render, memory.draw),
    "sharing": (sharing.render, sharing.draw),
    "prefix_cache": (prefix_cache.render, prefix_cache.draw),
}
PLOTS = {
    "memory": "memory-use.svg",
    "sharing": "memory-sharing.svg",
    "prefix_cache": "memory-prefixes.svg",
}


def read(text: str) -> dict[str, list[Line]]:
    """Lines by benchmark."""
    found: dict[str, list[Line]] = {name: [] for name in PARTS}
    for line in text.splitlines():
        if line.startswith("{"):
            content = json.loads(line)
            found[content.pop("benchmark")].append(content)
    return found


def page(text: str, source: str, lines: dict[str, list[Line]]) -> str:
    """The page with its tables made anew. source: where the lines come from, for the page."""

    def render(found: re.Match[str]) -> str:
        return f"{found[1]}{PARTS[found[2]][0](lines[found[2]])}\n{found[3]}"

    return SOURCE.sub(f"<!-- results: {source} -->", BLOCK.sub(render, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, metavar="FILE")
    path = parser.parse_args().lines
    lines = read(path.read_text())
    source = path.resolve().relative_to(ROOT).as_posix()
    PAGE.write_text(page(PAGE.read_text(), source, lines))
    for name, (_, draw) in PARTS.items():
        (PAGE.parent / PLOTS[name]).write_text(draw(lines[name]))


if __name__ == "__main__":
    main()
