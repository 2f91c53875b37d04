"""Horizontal bars as SVG, in light and dark, with nothing but text: what the plots in docs/ are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, ROW, BAR = 760, 176, 640, 22, 14
_TOP, _LEGEND_GAP = 34, 26
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_STYLE = """\
    .page { fill: #ffffff; }
    .grid { stroke: #d5dbe1; }
    .part0 { fill: #3b78b5; }
    .part1 { fill: #a9cdf0; }
    .part2 { fill: #e0a458; }
    .part3 { fill: #bf7a68; }
    .part4 { fill: #edf0f3; stroke: #9aa7b3; }
    .mark { stroke: #1f2933; stroke-width: 2; }
    text { fill: #1f2933; }
    .title { font-weight: 600; }
    .small { font-size: 12px; fill: #52606d; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #12161b; }
      .grid { stroke: #333d47; }
      .part0 { fill: #6aa7e0; }
      .part1 { fill: #2c5a86; }
      .part2 { fill: #b98234; }
      .part3 { fill: #94503f; }
      .part4 { fill: #1b2128; stroke: #5d6975; }
      .mark { stroke: #e4e9ee; }
      text { fill: #e4e9ee; }
      .small { fill: #a3b0bc; }
    }"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One row: shares of the scale from left to right, what stands behind them, and a mark.

    shares: empty where there is nothing to draw. kind: of the first share, by number of its style.
    """

    label: str
    shares: Sequence[float]
    note: str
    mark: float | None = None
    kind: int = 0


def bars(
    title: str,
    description: str,
    legend: Sequence[str],
    groups: Sequence[tuple[str, Sequence[Bar]]],
    scale: float = 1.0,
    mark: str = "",
) -> str:
    """Returns the text of an SVG file.

    Args:
        legend: names of the shares, in order; mark: what the mark is, if there are any.
        groups: heading and bars.
        scale: the share at the right end of the axis.
    """
    y = _TOP
    body = _legend(legend, mark, y)
    y += _LEGEND_GAP
    rows: list[str] = []
    first = y
    for heading, members in groups:
        rows.append(f'  <text x="20" y="{y + 16}" class="title">{escape(heading)}</text>')
        y += ROW + 2
        for bar in members:
            rows += _bar(bar, y, scale)
            y += ROW
        y += 8
    body += _axis(first + ROW, y, scale) + rows
    height = y + 26
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-labelledby="title desc" font-family="{_FONT}" font-size="14">'
    )
    return "\n".join(
        [
            head,
            f'  <title id="title">{escape(title)}</title>',
            f'  <desc id="desc">{escape(description)}</desc>',
            f"  <style>\n{_STYLE}\n  </style>",
            f'  <rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
            f'  <text x="20" y="22" class="title">{escape(title)}</text>',
            *body,
            "</svg>\n",
        ]
    )


def _x(share: float, scale: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * min(share / scale, 1.0), 1)


def _legend(legend: Sequence[str], mark: str, y: int) -> list[str]:
    parts, x = [], 20
    for kind, name in enumerate(legend):
        parts.append(f'  <rect class="part{kind}" x="{x}" y="{y}" width="12" height="12"/>')
        parts.append(f'  <text x="{x + 17}" y="{y + 11}" class="small">{escape(name)}</text>')
        x += 36 + 7 * len(name)
    if mark:
        parts.append(f'  <path class="mark" d="M{x + 4} {y - 1}V{y + 13}"/>')
        parts.append(f'  <text x="{x + 12}" y="{y + 11}" class="small">{escape(mark)}</text>')
    return parts


def _axis(top: int, bottom: int, scale: float) -> list[str]:
    parts = []
    for quarter in range(5):
        share = scale * quarter / 4
        x = _x(share, scale)
        parts.append(f'  <path class="grid" d="M{x} {top}V{bottom}"/>')
        parts.append(
            f'  <text x="{x}" y="{bottom + 15}" text-anchor="middle" class="small">'
            f"{100 * share:.3g}%</text>"
        )
    return parts


def _bar(bar: Bar, y: int, scale: float) -> list[str]:
    parts = [
        f'  <text x="{LEFT - 8}" y="{y + 12}" text-anchor="end" class="small">'
        f"{escape(bar.label)}</text>"
    ]
    begun = 0.0
    for kind, share in enumerate(bar.shares):
        left, right = _x(begun, scale), _x(begun + share, scale)
        begun += share
        if right > left:
            parts.append(
                f'  <rect class="part{kind + bar.kind}" x="{left}" y="{y + 1}" '
                f'width="{round(right - left, 1)}" height="{BAR}"/>'
            )
    if bar.mark is not None:
        parts.append(f'  <path class="mark" d="M{_x(bar.mark, scale)} {y - 1}V{y + BAR + 3}"/>')
    note = escape(bar.note)
    parts.append(f'  <text x="{RIGHT + 8}" y="{y + 12}" class="small">{note}</text>')
    return parts
