"""`quire prefixes explain`: what became of each block of a prompt, in words and as a bar."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from control_plane.admin_client import Row
from control_plane.cli.cells import Cells, Kind, has_colours, joined, plain, scaled
from control_plane.cli.views import ago, lasting, percent

# Longer explanations are for programs.
_MAX_SPANS = 40

# By outcome; the most notable last.
_KINDS = {
    kind.name: kind
    for kind in (
        Kind("unspecified", "?", "bright_black"),
        Kind("never_seen", ".", "bright_black", "░"),
        Kind("hit", "#", "green"),
        Kind("not_full", "-", "bright_black", "▁"),
        Kind("not_used", "l", "yellow"),
        Kind("after_a_miss", "a", "yellow"),
        Kind("other_model", "m", "cyan"),
        Kind("other_tenant", "t", "magenta"),
        Kind("other_engine", "o", "blue"),
        Kind("evicted", "e", "red"),
        Kind("restarted", "r", "red"),
    )
}


def explanation_view(row: Row) -> Group:
    """A headline, a bar of the prompt's blocks, and a sentence for each stretch of it."""
    parts: list[RenderableType] = [*_headlines(row), "", _Bar(row), ""]
    shown = row["spans"][:_MAX_SPANS]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column()
    for span in shown:
        tokens = f"{span['token_count']:,} token{'s' * (span['token_count'] != 1)}"
        table.add_row(_Mark(_kind(span)), _blocks(span), tokens, plain(sentence(span, row)))
    parts.append(table)
    if left := len(row["spans"]) - len(shown):
        parts.append(Text(f"and {left:,} more stretches; --json has all", "dim"))
    return Group(*parts)


def sentence(span: Row, explanation: Row) -> str:
    """What became of some blocks, and why."""
    return _SENTENCES.get(span["outcome"], _unknown)(span, explanation)


def _headlines(row: Row) -> list[Text]:
    cached, whole = row["cached_token_count"], row["prompt_token_count"]
    headline = plain(
        f"{cached:,} of {whole:,} prompt tokens cached ({percent(cached, whole)})", "bold"
    )
    if row["registered_prefix"]:
        headline.append_text(
            plain(
                f", registered prefix {row['registered_prefix']}: "
                f"{row['shared_token_count']:,} tokens shared by all tenants"
            )
        )
    whose = f" for tenant {row['tenant']}" if row["tenant"] else ""
    where = (
        f"{row['model']} on {row['engine_id']}{whose}, blocks of {row['block_size_tokens']} tokens"
    )
    if not row["request_id"]:
        return [headline, plain(f"now, of {where}")]
    return [
        headline,
        plain(f"request {row['request_id']}, {ago(row['age_seconds'])}, of {where}"),
        Text(f"foretold by the index: {row['predicted_token_count']:,} tokens, found: {cached:,}"),
    ]


def _blocks(span: Row) -> str:
    first, last = span["first_block"], span["first_block"] + span["block_count"] - 1
    return f"block {first:,}" if first == last else f"blocks {first:,}-{last:,}"


def _kind(span: Row) -> Kind:
    return _KINDS.get(span["outcome"], _KINDS["unspecified"])


class _Bar:
    """A cell per block, or per several when the prompt is long."""

    def __init__(self, row: Row) -> None:
        self._kinds = [_kind(span) for span in row["spans"] for _ in range(span["block_count"])]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        per_cell = max(-(-len(self._kinds) // options.max_width), 1)
        yield Cells(scaled(self._kinds, per_cell, list(_KINDS.values()))).text(
            has_colours(console, options)
        )
        if per_cell > 1:
            yield Text(f"a cell is {per_cell:,} blocks, shown as most of them are", "dim")


class _Mark(Cells):
    """One cell beside a sentence: what it looks like in the bar."""

    def __init__(self, kind: Kind) -> None:
        super().__init__([kind])


def _hit(span: Row, _: Row) -> str:
    return f"cached on {joined(span['engine_ids'])}" if span["engine_ids"] else "cached"


def _evicted(span: Row, explanation: Row) -> str:
    before = lasting(span["evicted_seconds_before"])
    when = f"{before} before the request" if explanation["request_id"] else f"{before} ago"
    elsewhere = [name for name in span["engine_ids"] if name != explanation["engine_id"]]
    where = f" on {joined(elsewhere)}" if elsewhere else ""
    if span["outcome"] == "restarted":
        return f"lost{where} when the engine was started anew, {when}"
    return f"evicted{where} {when}"


def _other_engine(span: Row, _: Row) -> str:
    engines = span["engine_ids"]
    return f"held only by engine{'s' * (len(engines) != 1)} {joined(engines)}"


def _other_tenant(span: Row, _: Row) -> str:
    whose = f"tenant {span['tenant']}" if span["tenant"] else "callers without a tenant"
    return f"cached for {whose} only"


def _not_used(span: Row, _: Row) -> str:
    return (
        f"held by {joined(span['engine_ids'])}, but the request asked for log-probabilities of its "
        "prompt: all of it was computed"
    )


def _after_a_miss(span: Row, _: Row) -> str:
    return (
        f"held by {joined(span['engine_ids'])}, but not what comes before: a prompt is found from "
        "its beginning to the first block that is missing"
    )


def _not_full(_: Row, explanation: Row) -> str:
    size = explanation["block_size_tokens"]
    return f"fills no block: only full blocks of {size} tokens are cached"


def _unknown(span: Row, _: Row) -> str:
    return f"{span['outcome']}: this command is older than the service"


_SENTENCES: dict[str, Callable[[Row, Row], str]] = {
    "hit": _hit,
    "never_seen": lambda span, _: "never seen before",
    "evicted": _evicted,
    "restarted": _evicted,
    "other_engine": _other_engine,
    "other_tenant": _other_tenant,
    "other_model": lambda span, _: f"cached for model {span['model']} only",
    "after_a_miss": _after_a_miss,
    "not_full": _not_full,
    "not_used": _not_used,
}
