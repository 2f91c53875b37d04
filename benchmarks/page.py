"""Pages of docs whose tables are made out of the lines of a run.

A page says between comments where a table goes, and in another where its lines come from.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.tables import Line

ROOT = Path(__file__).resolve().parent.parent
SOURCE = re.compile(r"<!-- results: (.+?) -->")
_BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.S)
Render = Callable[[Sequence[Line]], str]


def read(text: str, benchmarks: Iterable[str]) -> dict[str, list[Line]]:
    """Lines by benchmark; what is no line of JSON in the text does not count."""
    found: dict[str, list[Line]] = {name: [] for name in benchmarks}
    for line in text.splitlines():
        if line.startswith("{"):
            content = json.loads(line)
            found[content.pop("benchmark")].append(content)
    return found


def fill(
    text: str, source: str, lines: Mapping[str, Sequence[Line]], renders: Mapping[str, Render]
) -> str:
    """The page with its tables made anew. source: where the lines come from, for the page."""

    def render(found: re.Match[str]) -> str:
        return f"{found[1]}{renders[found[2]](lines[found[2]])}\n{found[3]}"

    return SOURCE.sub(f"<!-- results: {source} -->", _BLOCK.sub(render, text))


def write(
    page: Path, renders: Mapping[str, Render], description: str | None
) -> dict[str, list[Line]]:
    """Writes a page from the file that the command line names; returns its lines."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("lines", type=Path, metavar="FILE")
    path = parser.parse_args().lines
    lines = read(path.read_text(), renders)
    source = path.resolve().relative_to(ROOT).as_posix()
    page.write_text(fill(page.read_text(), source, lines, renders))
    return lines
