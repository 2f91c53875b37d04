"""Tables of what the admin API lists, for people."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from control_plane.admin_client import Row

_HASH_DIGITS = 12
_STATE_STYLES = {"led": "green", "followed": "cyan", "connecting": "yellow"}


def engines_table(engines: list[Row]) -> Table:
    """One row per engine: its blocks, its sequences, its prefix-cache hits."""
    table = _table(f"{len(engines)} engine{'s' * (len(engines) != 1)}")
    table.add_column("engine", no_wrap=True)
    table.add_column("model")
    table.add_column("state")
    for name in ("blocks", "sequences", "prompt tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in engines:
        state = Text(row["state"], style=_STATE_STYLES.get(row["state"], ""))
        if row["state"] == "followed" and row["leader_address"]:
            state.append(f"\n{row['leader_address']}", style="dim")
        if row["last_failure"]:
            when = _duration(row["last_failure_age_seconds"])
            state.append(f"\nlost {when}: {row['last_failure']}", style="dim")
        blocks = [f"{row[f'{kind}_block_count']:,} {kind}" for kind in ("used", "cached", "free")]
        sequences = [
            f"{row['running_sequence_count']:,} running",
            f"{row['waiting_request_count']:,} waiting",
            f"{row['preemption_count']:,} preempted",
        ]
        hits, prompts = row["prefix_hit_token_count"], row["prefix_query_token_count"]
        table.add_row(
            _plain(f"{row['engine_id'] or '?'}\n{row['address']}"),
            _plain(row["model"] or "?"),
            state,
            "\n".join(blocks),
            "\n".join(sequences),
            f"{prompts:,} in all\n{hits:,} cached\n{percent(hits, prompts)}",
        )
    return table


def prefixes_table(prefixes: list[Row]) -> Table:
    """One row per cached prefix that was hit, named by the hash of its last block."""
    table = _table(f"{len(prefixes)} prefix{'es' * (len(prefixes) != 1)} with hits")
    for name in ("prefix", "engine"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "hits", "saved", "in use by", "last hit"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in prefixes:
        table.add_row(
            row["prefix_hash"][:_HASH_DIGITS],
            _plain(row["engine_id"]),
            f"{row['token_count']:,}",
            f"{row['hit_count']:,}",
            f"{row['saved_token_count']:,}",
            f"{row['reference_count']:,}" if row["resident"] else Text("evicted", "dim"),
            _duration(row["idle_seconds"]),
        )
    return table


def sequences_table(sequences: list[Row]) -> Table:
    """One row per sequence that waits or runs."""
    table = _table(f"{len(sequences)} sequence{'s' * (len(sequences) != 1)}")
    for name in ("request", "sample", "engine", "state"):
        table.add_column(name)
    for name in ("prompt tokens", "cached", "output tokens", "blocks", "priority"):
        table.add_column(name, justify="right")
    for row in sequences:
        table.add_row(
            _plain(row["request_id"]),
            str(row["sample"]),
            _plain(row["engine_id"]),
            row["state"],
            f"{row['prompt_token_count']:,}",
            f"{row['cached_token_count']:,}",
            f"{row['output_token_count']:,}",
            f"{row['block_count']:,}",
            str(row["priority"]),
        )
    return table


def share(part: int, whole: int) -> str:
    """For example "320 of 336 (95 %)"."""
    return f"{part:,} of {whole:,} ({percent(part, whole)})"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _plain(text: str) -> Text:
    """What comes from elsewhere is never taken for markup."""
    return Text(text, overflow="fold")


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
