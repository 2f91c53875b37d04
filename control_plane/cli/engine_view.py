"""`quire engines` and `quire blocks`: what engines are doing, and maps of their blocks."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from control_plane.admin_client import Row
from control_plane.cli.cells import Cells, Kind, Legend, plain, scaled, shares
from control_plane.cli.views import ago, percent

_BAR_WIDTH = 20
_MAP_ROWS = 24
# Cells of a line are a multiple of this, so that block ids are easy to find.
_CELL_GROUP = 16

FREE = Kind("free", ".", "bright_black", "░")
CACHED = Kind("cached", "c", "cyan")
PINNED = Kind("pinned", "p", "magenta")
USED = Kind("used", "u", "green")
SHARED = Kind("shared", "s", "yellow")
# The most notable last.
_BLOCK_KINDS = (FREE, CACHED, USED, SHARED, PINNED)
_BY_NAME = {kind.name: kind for kind in _BLOCK_KINDS}

_PHASES = (
    Kind("queue", "q", "bright_black"),
    Kind("moves", "m", "yellow"),
    Kind("forward", "f", "green"),
    Kind("sample", "s", "cyan"),
)
_HIT = Kind("cached", "c", "cyan")
_COMPUTED = Kind("computed", ".", "bright_black", "░")


def engines_view(engines: list[Row]) -> Group:
    """A few lines per engine: its pool, its sequences, its steps, its prefix cache."""
    count = len(engines)
    parts: list[RenderableType] = [Text(f"{count} engine{'s' * (count != 1)}", "bold")]
    for row in engines:
        parts += ["", _headline(row), *_remarks(row)]
        if _is_known(row):
            parts.append(Padding(_figures(row), (0, 0, 0, 2)))
    return Group(*parts)


def block_map_view(block_map: Row) -> Group:
    """Maps of an engine's pool and of its swap space."""
    pool = [_BY_NAME.get(word, FREE) for word in block_map["states"]]
    host = [_BY_NAME.get(word, FREE) for word in block_map["host_states"]]
    parts: list[RenderableType] = [
        Text.assemble((f"{len(pool):,} blocks", "bold"), " of ", plain(block_map["engine_id"])),
        _Map(pool),
    ]
    if host:
        parts += ["", Text(f"{len(host):,} blocks in host memory, to swap to", "bold"), _Map(host)]
    return Group(*parts)


def requests_of(row: Row) -> str:
    """For example "3 running, 0 swapped, 1 waiting"."""
    return ", ".join(
        f"{row[field]:,} {word}"
        for field, word in (
            ("running_sequence_count", "running"),
            ("swapped_sequence_count", "swapped"),
            ("waiting_request_count", "waiting"),
        )
    )


def _is_known(row: Row) -> bool:
    """Whether the engine's leader has said what is in its pool."""
    counts = ("free_block_count", "cached_block_count", "used_block_count")
    return any(row[count] for count in counts)


def _headline(row: Row) -> Text:
    line = plain(row["engine_id"] or "?", "bold")
    line.append_text(plain(f"  {row['model'] or '?'} at {row['address']}, ", "not bold"))
    if row["state"] == "led":
        line.append(f"led by this replica, epoch {row['epoch']}", "not bold green")
    elif row["state"] == "followed":
        epoch = f", epoch {row['epoch']}" if _is_known(row) else ""
        line.append_text(plain(f"led by {row['leader_address'] or '?'}{epoch}", "not bold cyan"))
    else:
        line.append("connecting", "not bold yellow")
    return line


def _remarks(row: Row) -> list[RenderableType]:
    remarks: list[RenderableType] = []
    if row["draining"]:
        remarks.append(Text("draining: it gets no new requests", "yellow"))
    if row["last_failure"]:
        when = ago(row["last_failure_age_seconds"])
        remarks.append(plain(f"lost {when}: {row['last_failure']}", "red"))
    return [Padding(remark, (0, 0, 0, 2)) for remark in remarks]


def _figures(row: Row) -> Table:
    figures = Table.grid(padding=(0, 2))
    figures.add_column(no_wrap=True, style="dim")
    figures.add_column(no_wrap=True)
    figures.add_column()
    figures.add_row("blocks", *_pool(row))
    figures.add_row("swap", *_swap(row))
    figures.add_row("prompts", *_hits(row))
    figures.add_row("steps", *_steps(row))
    preempted = f"{row['preemption_count']:,} preempted ({row['swap_count']:,} by swapping)"
    figures.add_row("requests", "", f"{requests_of(row)}; {preempted}")
    return figures


def _pool(row: Row) -> tuple[RenderableType, str]:
    counts = {
        USED: row["used_block_count"],
        PINNED: row["pinned_block_count"],
        CACHED: row["cached_block_count"] - row["pinned_block_count"],
        FREE: row["free_block_count"],
    }
    words = ", ".join(f"{count:,} {kind.name}" for kind, count in counts.items())
    whole = f"{row['block_count']:,} of {row['block_size_tokens']} tokens"
    return Cells(shares(counts, _BAR_WIDTH)), f"{whole}: {words}"


def _swap(row: Row) -> tuple[RenderableType, str]:
    whole, used = row["host_block_count"], row["used_host_block_count"]
    if not whole:
        return "", "no swap space"
    bar = Cells(shares({USED: used, FREE: whole - used}, _BAR_WIDTH))
    return bar, f"{whole:,} blocks in host memory: {used:,} used, {whole - used:,} free"


def _hits(row: Row) -> tuple[RenderableType, str]:
    hits, whole = row["prefix_hit_token_count"], row["prefix_query_token_count"]
    if not whole:
        return "", "none yet"
    bar = Cells(shares({_HIT: hits, _COMPUTED: whole - hits}, _BAR_WIDTH))
    return bar, f"{whole:,} tokens: {hits:,} cached ({percent(hits, whole)})"


def _steps(row: Row) -> tuple[RenderableType, str]:
    means = {kind: 1e3 * row[f"mean_{kind.name}_seconds"] for kind in _PHASES}
    whole = sum(means.values())
    if not whole:
        return "", f"{row['step']:,}"
    words = ", ".join(f"{kind.name} {_short(mean)}" for kind, mean in means.items())
    return Cells(shares(means, _BAR_WIDTH)), f"{row['step']:,}, mean {_short(whole)} ms: {words}"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:,.0f}"


class _Map:
    """Blocks by id, as many lines of cells as fit, and their legend."""

    def __init__(self, kinds: list[Kind]) -> None:
        self._kinds = kinds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        label = len(f"{len(self._kinds):,}") + 1
        width = options.max_width - label
        width = max(width // _CELL_GROUP * _CELL_GROUP, min(width, _CELL_GROUP))
        per_cell = 1
        while per_cell * width * _MAP_ROWS < len(self._kinds):
            per_cell *= 2
        cells = scaled(self._kinds, per_cell, _BLOCK_KINDS)
        lines = Table.grid(padding=(0, 1, 0, 0))
        lines.add_column(justify="right", style="dim", no_wrap=True)
        lines.add_column(no_wrap=True)
        for begin in range(0, len(cells), width):
            lines.add_row(f"{begin * per_cell:,}", Cells(cells[begin : begin + width]))
        yield lines
        counts = {kind: self._kinds.count(kind) for kind in _BLOCK_KINDS}
        yield Legend({kind: count for kind, count in counts.items() if count})
        if per_cell > 1:
            yield Text(f"a cell is {per_cell} blocks, shown as most of them are", "dim")
