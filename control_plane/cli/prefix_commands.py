"""Operators' commands about the prefix cache: `quire prefixes` and those below it."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from control_plane.admin_client import AdminClient, Row
from control_plane.cli import cells
from control_plane.cli.asking import Asking, EngineId, asks_admin
from control_plane.cli.explain_view import explanation_view
from control_plane.cli.running import EXIT_FAILED, CommandError, print_error
from control_plane.cli.views import prefixes_table, registered_table, said, standing
from control_plane.client import CallError, Prompt

_POLL_SECONDS = 0.5
# An engine's problem that stays for so long is not going to end by itself.
_PROBLEM_POLLS = 4

group = typer.Typer(
    help="Lists cached prefixes that were hit. Its commands register prefixes and explain misses."
)

Name = Annotated[str, typer.Argument(help="of the registered prefix")]


def add_commands(app: typer.Typer) -> None:
    group.callback(invoke_without_command=True)(prefixes)
    commands = (registered, register, unregister, pin, unpin, warm, explain)
    for command in commands:
        group.command()(command)
    app.add_typer(group, name="prefixes")


@asks_admin
def prefixes(
    context: typer.Context,
    engine: EngineId = "",
    limit: Annotated[int, typer.Option(min=1, help="rows, most tokens saved first")] = 20,
    *,
    asking: Asking,
) -> None:
    """Lists cached prefixes that were hit: where they are, their hits, and tokens saved."""
    if context.invoked_subcommand is not None:
        _refuse_misplaced(context)
        return
    rows = asking.ask(lambda admin: admin.prefixes(engine, limit))
    asking.show(rows, lambda: prefixes_table(rows))


@asks_admin
def registered(*, asking: Asking) -> None:
    """Lists registered prefixes: how they stand on each engine, their hits, and tokens saved."""
    _show_registered(asking, "")


@asks_admin
def register(
    name: Annotated[
        str, typer.Argument(help="1 to 63 letters, digits, points, dashes and underscores")
    ],
    file: Annotated[
        Path,
        typer.Option(
            "--file", "-f", help="the text, less one newline at its end; - reads standard input"
        ),
    ],
    plain: Annotated[
        bool,
        typer.Option("--plain", help="text prompts begin so; else: it is chats' system message"),
    ] = False,
    pin: Annotated[
        bool, typer.Option("--pin", help="every engine computes it and keeps it")
    ] = False,
    *,
    asking: Asking,
) -> None:
    """Registers a system prompt, or replaces the one of this name: all tenants share its blocks."""
    text = _text_of(file)
    row = asking.ask(lambda admin: admin.register(name, text, plain=plain, pinned=pin))
    _show_changed(asking, row, f"{name} is registered")


@asks_admin
def unregister(name: Name, *, asking: Asking) -> None:
    """Forgets a registered prefix; its blocks stay cached until they give way to others."""
    asking.ask(lambda admin: admin.unregister(name))
    asking.show({}, lambda: said(f"{name} is not registered any more"))


@asks_admin
def pin(name: Name, *, asking: Asking) -> None:
    """Pins a registered prefix: every engine computes it and keeps it."""
    row = asking.ask(lambda admin: admin.pin(name))
    _show_changed(asking, row, f"{name} is pinned")


@asks_admin
def unpin(name: Name, *, asking: Asking) -> None:
    """Lets go of a pinned prefix: its blocks may give way to others again."""
    row = asking.ask(lambda admin: admin.pin(name, pinned=False))
    _show_changed(asking, row, f"{name} is not pinned")


@asks_admin
def warm(
    name: Name,
    wait: Annotated[
        bool, typer.Option("--wait", help="until every engine that is led holds it")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0, help="seconds to wait, at most; with --wait")
    ] = 300.0,
    *,
    asking: Asking,
) -> None:
    """Has every engine compute a registered prefix that it does not hold, once."""
    row = asking.ask(lambda admin: admin.warm(name))
    if not wait:
        _show_changed(asking, row, f"engines that do not hold {name} compute it")
        return
    with _Progress(shown=not asking.as_json) as progress:
        left, row = asking.ask(lambda admin: _until_warm(admin, name, timeout, progress))
    if asking.as_json:
        asking.show(row, lambda: said(""))
    elif not left:
        asking.show(
            row,
            lambda: said(f"every engine holds {name}", registered_table([row], title=False)),
        )
    if left:
        print_error(f"{name} is not warm on {cells.joined(left)}")
        raise typer.Exit(EXIT_FAILED)


@asks_admin
def explain(
    prompt: Annotated[
        str | None, typer.Argument(help="the prompt; - reads it from standard input")
    ] = None,
    request_id: Annotated[
        str, typer.Option("--request-id", help="of a recent request, instead of a prompt")
    ] = "",
    system: Annotated[str, typer.Option(help="system message that begins the chat")] = "",
    system_file: Annotated[
        Path | None, typer.Option(help="file of it, less one newline at its end")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="plain text, even where the model knows chats")
    ] = False,
    model: Annotated[str, typer.Option(help="served model name; none: the only one")] = "",
    tenant: Annotated[
        str | None,
        typer.Option(help="whose prefix cache it uses, or whose request it was; none: nobody's"),
    ] = None,
    *,
    asking: Asking,
) -> None:
    """Says what a prompt or a request finds in the prefix cache, and why not more.

    Nothing is computed, and no text of the prompt is shown."""
    given: dict[str, Any] = {
        "PROMPT": prompt,
        "--system": system,
        "--system-file": system_file,
        "--raw": raw,
        "--model": model,
    }
    if request_id:
        if surplus := [option for option, value in given.items() if value]:
            _fail(f"--request-id says all; leave out {cells.joined(surplus)}")
        row = asking.ask(lambda admin: admin.explain_request(request_id, tenant))
    else:
        if prompt is None:
            _fail("say what to explain: a prompt, or --request-id")
        if sum(map(bool, (system, system_file, raw))) > 1:
            _fail("only one of --system, --system-file and --raw can be used")
        text = sys.stdin.read() if prompt == "-" else str(prompt)
        before = system if system_file is None else _text_of(system_file)
        row = asking.ask(lambda admin: _explain(admin, text, before, raw, model, tenant or ""))
    asking.show(row, lambda: explanation_view(row))


async def _explain(
    admin: AdminClient, text: str, system: str, raw: bool, model: str, tenant: str
) -> Row:
    """Of a chat, or of plain text if it is `raw` or the model knows no chats."""
    chat: Prompt = [{"role": "system", "content": system}] if system else []
    chat = [*chat, {"role": "user", "content": text}]
    try:
        return await admin.explain_prompt(text if raw else chat, model=model, tenant=tenant)
    except CallError as error:
        # The service refuses the field as a whole where the model has no chat template.
        if raw or system or error.field != "chat":
            raise
        return await admin.explain_prompt(text, model=model, tenant=tenant)


def _show_registered(asking: Asking, sentence: str, row: Row | None = None) -> None:
    rows = asking.ask(lambda admin: admin.registered()) if row is None else [row]
    table = registered_table(rows, title=row is None)
    asking.show(row or rows, lambda: said(sentence, table) if sentence else table)


def _show_changed(asking: Asking, row: Row, sentence: str) -> None:
    """What a change made of one prefix."""
    if asking.as_json:
        asking.show(row, lambda: said(sentence))
    else:
        _show_registered(asking, sentence, row)


class _Progress:
    """How far engines are; where lines cannot be rewritten, each change is a line."""

    def __init__(self, shown: bool) -> None:
        self._console = Console(quiet=not shown)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._said: dict[str, str] = {}

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, row: Row) -> None:
        lines = {}
        for engine in row["engines"]:
            held, shared = engine["held_token_count"], engine["shared_token_count"]
            words = standing(engine)[0]
            lines[engine["engine_id"]] = f"{held:,} of {shared:,} tokens, {words}"
        if self._console.is_terminal:
            self._live.update(self._table(lines), refresh=True)
            return
        for name, line in lines.items():
            if self._said.get(name) != line:
                self._console.print(cells.plain(f"{name}: {line}"), soft_wrap=True)
        self._said = lines

    def _table(self, lines: dict[str, str]) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, line in lines.items():
            table.add_row(cells.plain(name), cells.plain(line))
        return table


async def _until_warm(
    admin: AdminClient, name: str, timeout: float, progress: _Progress
) -> tuple[list[str], Row]:
    """Returns what became of it: the engines that do not hold it, and itself.

    Raises:
        CallError: nothing answers, or somebody unregistered it.
        CommandError: there is no engine to wait for.
    """
    deadline, polls = time.monotonic() + timeout, 0
    while True:
        found = [each for each in await admin.registered() if each["name"] == name]
        if not found:
            raise CommandError(f"{name} is not registered any more")
        (row,) = found
        progress.show(row)
        # Nobody computes anything on an engine that nobody leads.
        known = [engine for engine in row["engines"] if engine["known"]]
        if not known:
            raise CommandError(f"the replica at {admin.address} knows no engine that is led")
        left = [engine for engine in known if not _is_warm(engine)]
        stuck = [engine for engine in left if engine["problem"] and not engine["warming"]]
        polls = polls + 1 if stuck and len(stuck) == len(left) else 0
        if not left or polls >= _PROBLEM_POLLS or time.monotonic() >= deadline:
            return [_why(engine) for engine in left], row
        await asyncio.sleep(_POLL_SECONDS)


def _is_warm(engine: Row) -> bool:
    return bool(0 < engine["shared_token_count"] <= engine["held_token_count"])


def _why(engine: Row) -> str:
    return f"{engine['engine_id']} ({standing(engine)[0]})"


def _text_of(file: Path) -> str:
    """Editors end a file with a newline, which the prompts of services do not have."""
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        text = data.decode()
    except OSError as error:
        _fail(f"cannot read {file}: {error.strerror}")
    except UnicodeDecodeError:
        _fail(f"{file} is no text in UTF-8")
    return text.removesuffix("\n").removesuffix("\r")


def _refuse_misplaced(context: typer.Context) -> None:
    """Options of the list that stand before another command would be lost without a word."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            option = max(parameter.opts, key=len)
            _fail(f"write {option} after {context.invoked_subcommand}")


def _fail(sentence: str) -> NoReturn:
    print_error(sentence)
    raise typer.Exit(EXIT_FAILED)
