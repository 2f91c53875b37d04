"""Writes the tables of docs/fp8.md out of the lines of a run.

``python -m benchmarks.fp8_page FILE``: FILE has what ``python -m benchmarks.fp8_accuracy`` prints;
what is no line of JSON in it does not count.
"""

from __future__ import annotations

from benchmarks import fp8_accuracy
from benchmarks.page import ROOT, Render, write

PAGE = ROOT / "docs/fp8.md"
RENDERS: dict[str, Render] = {
    "fp8_accuracy": fp8_accuracy.render_accuracy,
    "fp8_range": fp8_accuracy.render_range,
}


if __name__ == "__main__":
    write(PAGE, RENDERS, __doc__)
