"""Operators' commands about engines: `quire engines`, `blocks`, `sequences` and `drain`."""

from __future__ import annotations

from typing import Annotated

import typer

from control_plane.admin_client import AdminClient, Row
from control_plane.cli.asking import Asking, EngineId, asks_admin, the_engine
from control_plane.cli.engine_view import block_map_view, engines_view, requests_of
from control_plane.cli.views import said, sequences_table


def add_commands(app: typer.Typer) -> None:
    for command in (engines, blocks, sequences, drain):
        app.command()(command)


@asks_admin
def engines(*, asking: Asking) -> None:
    """Shows engines: their blocks, swap space, steps, sequences, and prefix-cache hits."""
    rows = asking.ask(lambda admin: admin.engines())
    asking.show(rows, lambda: engines_view(rows))


@asks_admin
def blocks(
    engine: Annotated[str, typer.Argument(help="engine id; none: the only one")] = "",
    *,
    asking: Asking,
) -> None:
    """Maps an engine's pool: which blocks are free, cached, pinned, used or shared."""

    async def call(admin: AdminClient) -> Row:
        return await admin.block_map(await the_engine(admin, engine))

    found = asking.ask(call)
    asking.show(found, lambda: block_map_view(found))


@asks_admin
def sequences(engine: EngineId = "", *, asking: Asking) -> None:
    """Lists sequences that wait or run: their tokens and blocks."""
    rows = asking.ask(lambda admin: admin.sequences(engine))
    asking.show(rows, lambda: sequences_table(rows))


@asks_admin
def drain(
    engine: Annotated[str, typer.Argument(help="engine id")],
    resume: Annotated[bool, typer.Option("--resume", help="send it requests again")] = False,
    *,
    asking: Asking,
) -> None:
    """Sends an engine no new requests: what waits goes elsewhere, what runs ends there."""
    row = asking.ask(lambda admin: admin.drain(engine, resume=resume))
    gets = "no new requests" if row["draining"] else "requests again"
    sentence = f"engine {row['engine_id']} gets {gets}: {requests_of(row)}"
    asking.show(row, lambda: said(sentence))
