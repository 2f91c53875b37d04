"""Bars and maps made of cells: coloured where there are colours, letters where there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Kind:
    """What a cell may stand for."""

    name: str
    letter: str
    style: str
    glyph: str = "█"


class Cells:
    """One line of cells."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text(has_colours(console, options))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(len(self._kinds), len(self._kinds))

    def text(self, coloured: bool) -> Text:
        line = Text(no_wrap=True)
        for kind, run in groupby(self._kinds):
            count = sum(1 for _ in run)
            line.append((kind.glyph if coloured else kind.letter) * count, kind.style)
        return line


class Legend:
    """What the cells mean, and how many there are of each."""

    def __init__(self, counts: Mapping[Kind, int]) -> None:
        self._counts = counts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = has_colours(console, options)
        whole = max(sum(self._counts.values()), 1)
        parts = []
        for kind, count in self._counts.items():
            part = Text(kind.glyph if coloured else kind.letter, kind.style)
            part.append(f" {kind.name} {count:,} ({100 * count / whole:.0f} %)", "default")
            parts.append(part)
        yield Text("   ").join(parts)


def has_colours(console: Console, options: ConsoleOptions) -> bool:
    return not (console.color_system is None or console.no_color or options.ascii_only)


def shares(counts: Mapping[Kind, float], width: int) -> list[Kind]:
    """A bar of `width` cells divided as `counts` are; what is there at all has a cell at least."""
    present = {kind: count for kind, count in counts.items() if count > 0}
    whole = sum(present.values())
    cells = {kind: max(int(width * count / whole), 1) for kind, count in present.items()}
    while present and sum(cells.values()) != width:
        step = 1 if sum(cells.values()) < width else -1
        fair = {kind: width * present[kind] / whole - cells[kind] for kind in present}
        # The one that is furthest from its fair share, and has a cell to give.
        able = [kind for kind in cells if step > 0 or cells[kind] > 1]
        if not able:
            break
        cells[max(able, key=lambda kind: step * fair[kind])] += step
    return [kind for kind, count in cells.items() for _ in range(count)]


def scaled(kinds: Sequence[Kind], per_cell: int, notable: Sequence[Kind]) -> list[Kind]:
    """Each cell is the commonest of its `per_cell` kinds, of equals the more notable one.

    Args:
        notable: all kinds, the most notable last.
    """
    if per_cell == 1:
        return list(kinds)
    rank = {kind: place for place, kind in enumerate(notable)}
    chunks = (kinds[begin : begin + per_cell] for begin in range(0, len(kinds), per_cell))
    return [
        max(Counter(chunk).items(), key=lambda found: (found[1], rank[found[0]]))[0]
        for chunk in chunks
    ]


def printable(text: str) -> str:
    """What comes from elsewhere moves no cursor and changes no colour."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}"
                   for char in text)  # fmt: skip


def plain(text: str, style: str = "") -> Text:
    """What comes from elsewhere is never taken for markup."""
    return Text(printable(text), style, overflow="fold")


def joined(words: Iterable[str], conjunction: str = "and") -> str:
    """For example "a, b and c"."""
    *first, last = list(words) or [""]
    return f"{', '.join(first)} {conjunction} {last}" if first else last
