"""What the admin API lists, for people: prefixes, registered prefixes, sequences."""

from __future__ import annotations

from itertools import zip_longest

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from control_plane.admin_client import Row
from control_plane.cli.cells import plain

_HASH_DIGITS = 12
_REQUEST_ID_WIDTH = 32


def prefixes_table(prefixes: list[Row]) -> Table:
    """One row per cached prefix that was hit, named by the hash of its last block."""
    table = _table(f"{len(prefixes)} prefix{'es' * (len(prefixes) != 1)} with hits")
    several_models = len({row["model"] for row in prefixes}) > 1
    table.add_column("prefix")
    if several_models:
        table.add_column("model")
    for column in ("tokens", "hits", "saved", "last hit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("found by")
    table.add_column("cached on (in use by)")
    for row in prefixes:
        name = (
            plain(row["name"], "bold") if row["name"] else Text(row["prefix_hash"][:_HASH_DIGITS])
        )
        if row["pinned"]:
            name.append("\npinned", "magenta")
        cells: list[RenderableType] = [name]
        if several_models:
            cells.append(plain(row["model"]))
        cells += [
            f"{row['token_count']:,}",
            f"{row['hit_count']:,}",
            f"{row['saved_token_count']:,}",
            ago(row["idle_seconds"]),
            _found_by(row),
            _holders(row),
        ]
        table.add_row(*cells)
    return table


def registered_table(prefixes: list[Row], title: bool = True) -> Table:
    """One row per registered prefix and engine."""
    count = len(prefixes)
    table = _table(f"{count} registered prefix{'es' * (count != 1)}" if title else "")
    table.add_column("prefix")
    for column in ("hits", "saved"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("engine", overflow="fold")
    table.add_column("tokens held", justify="right", no_wrap=True)
    table.add_column("state")
    for row in prefixes:
        own: list[list[RenderableType]] = [
            [plain(row["name"], "bold"), f"{row['hit_count']:,}", f"{row['saved_token_count']:,}"],
            [Text(", ".join(_traits(row)), "dim"), "", ""],
        ]
        engines = [_on(engine) for engine in row["engines"]]
        for left, right in zip_longest(own, engines):
            table.add_row(*(left or [""] * 3), *(right or [""] * 3))
    return table


def standing(engine: Row) -> tuple[str, str]:
    """How a registered prefix stands on an engine, and in which style."""
    held, shared = engine["held_token_count"], engine["shared_token_count"]
    if 0 < shared <= held and not engine["problem"]:
        return "warm", "green"
    if engine["warming"]:
        return "is being computed", "yellow"
    if engine["problem"]:
        return engine["problem"], "red"
    if not engine["known"]:
        return "not known", "dim"
    if not shared:
        return "is not tokenised yet", "dim"
    return ("warm in part" if held else "not there"), "dim"


def sequences_table(sequences: list[Row]) -> Table:
    """One row per sequence that waits or runs."""
    table = _table(f"{len(sequences)} sequence{'s' * (len(sequences) != 1)}")
    with_priority = any(row["priority"] for row in sequences)
    table.add_column("request", max_width=_REQUEST_ID_WIDTH)
    table.add_column("sample", justify="right")
    table.add_column("engine")
    table.add_column("state")
    for name in ("prompt", "cached", "output", "blocks", *["priority"] * with_priority):
        table.add_column(name, justify="right")
    for row in sequences:
        table.add_row(
            plain(row["request_id"]),
            str(row["sample"]),
            plain(row["engine_id"]),
            row["state"],
            f"{row['prompt_token_count']:,}",
            f"{row['cached_token_count']:,}",
            f"{row['output_token_count']:,}",
            f"{row['block_count']:,}",
            *[str(row["priority"])] * with_priority,
        )
    return table


def share(part: int, whole: int) -> str:
    """For example "320 of 336 (95 %)"."""
    return f"{part:,} of {whole:,} ({percent(part, whole)})"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def ago(seconds: float) -> str:
    """For example "3 min ago"."""
    return f"{lasting(seconds)} ago"


def lasting(seconds: float) -> str:
    """For example "3 min"."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def said(sentence: str, *below: RenderableType) -> Group:
    """What a command did, and what it made of it."""
    return Group(plain(sentence, "bold"), *below)


def _on(engine: Row) -> list[RenderableType]:
    held, shared = engine["held_token_count"], engine["shared_token_count"]
    words, style = standing(engine)
    return [
        plain(engine["engine_id"]),
        f"{held:,} of {shared:,}" if engine["known"] else f"? of {shared:,}",
        plain(words, style),
    ]


def _traits(row: Row) -> list[str]:
    traits = [row["form"]]
    traits += ["pinned"] * row["pinned"] + ["from a file"] * row["declared"]
    return traits


def _found_by(row: Row) -> Text:
    # One that was hit before it was registered has a name by now, and is shared as well.
    if row["shared"] or row["name"]:
        return Text("all tenants", "green")
    return plain(f"tenant {row['tenant']}") if row["tenant"] else Text("no tenant")


def _holders(row: Row) -> Text:
    if not row["holders"]:
        return Text("nowhere: evicted", "dim")
    lines = (f"{each['engine_id']} ({each['reference_count']:,})" for each in row["holders"])
    return plain("\n".join(lines))


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
