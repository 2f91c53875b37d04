"""Writes the tables and plots of docs/memory.md out of the lines of a run.

``python -m benchmarks.memory_page FILE``: FILE has what `make bench-memory` and
`make bench-sharing` print; what is no line of JSON in it does not count.
"""

from __future__ import annotations

from benchmarks import memory, prefix_cache, sharing
from benchmarks.page import ROOT, Render, write

PAGE = ROOT / "docs/memory.md"
RENDERS: dict[str, Render] = {
    "memory": memory.render,
    "sharing": sharing.render,
    "prefix_cache": prefix_cache.render,
}
# By the name of the benchmark in a line: the file of its plot, and what draws it.
PLOTS: dict[str, tuple[str, Render]] = {
    "memory": ("memory-use.svg", memory.draw),
    "sharing": ("memory-sharing.svg", sharing.draw),
    "prefix_cache": ("memory-prefixes.svg", prefix_cache.draw),
}


def main() -> None:
    lines = write(PAGE, RENDERS, __doc__)
    for name, (file, draw) in PLOTS.items():
        (PAGE.parent / file).write_text(draw(lines[name]))


if __name__ == "__main__":
    main()
