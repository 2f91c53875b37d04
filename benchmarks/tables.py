"""Tables in Markdown out of figures, for the end of a run and for the pages in docs/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Line = dict[str, Any]
NOTHING = "not measured"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    texts = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in texts)


def percent(share: float | None, absent: str = "–") -> str:
    return absent if share is None else f"{100 * share:.1f}%"


def number(value: float | None, absent: str = "–") -> str:
    return absent if value is None else f"{value:.1f}"
