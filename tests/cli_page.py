"""Fills docs/cli.md: outputs of commands that run against real planes, and tables of options.

    python -m tests.cli_page             # all of it; takes a minute
    python -m tests.cli_page --options   # the tables only, which nothing has to run for

Ports are shown as the usual ones; everything else is as it was seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from control_plane.admin import Admin
from control_plane.cli.commands import app
from control_plane.client import CallError, Client
from tests.processes import control_plane, data_plane, free_port
from tests.redis_server import RedisServer

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/cli.md"
WIDTH = 100
_BLOCK = re.compile(r"(<!-- begin: (.+?) -->\n).*?(<!-- end -->)", re.S)
_QUIRE = [sys.executable, "-c", "from control_plane.cli.commands import main; main()"]
_SYSTEM = "--system-file data_plane/demo_model/system_prompt.txt"
_QUESTION = "What is a block table?"


def blocks_of(text: str) -> list[str]:
    """The names of what is filled in."""
    return [name for _, name, _ in _BLOCK.findall(text)]


def fill(text: str, made: dict[str, str]) -> str:
    """The page with new blocks; those that were not made stay."""

    def render(found: re.Match[str]) -> str:
        content = made.get(found[2])
        return found[0] if content is None else f"{found[1]}{content}\n{found[3]}"

    return _BLOCK.sub(render, text)


# Tables of options.


def commands() -> dict[str, Any]:
    """Every command by its words, as click has it."""
    root: Any = typer.main.get_command(app)
    found = {}
    for name, command in root.commands.items():
        found[name] = command
        for inner, below in getattr(command, "commands", {}).items():
            found[f"{name} {inner}"] = below
    return found


def option_tables() -> dict[str, str]:
    """A table for each command with options of its own, and one of those that operators' share."""
    rows = {name: _rows(command) for name, command in commands().items()}
    others = ("generate", "up", "demo")
    common = set.intersection(*(set(each) for name, each in rows.items() if name not in others))
    tables = {"options of all": _table([row for row in rows["engines"] if row in common])}
    for name, each in rows.items():
        own = [row for row in each if name in others or row not in common]
        if own:
            tables[f"options of {name}"] = _table(own)
    return tables


def _rows(command: Any) -> list[tuple[str, str]]:
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            shown = parameter.metavar or parameter.name.upper()
        else:
            shown = ", ".join(sorted(parameter.opts, key=len))
        meaning = parameter.help or ""
        if parameter.envvar:
            meaning += f"; or `{parameter.envvar}`"
        default = parameter.default
        if isinstance(default, str | int | float) and not isinstance(default, bool) and default:
            shown_default = f"{default:g}" if isinstance(default, float) else default
            meaning += f"; default: `{shown_default}`"
        rows.append((f"`{shown}`", meaning))
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {shown} | {meaning} |" for shown, meaning in rows)]
    return "\n".join(lines)


# Outputs.


class Recorder:
    """Runs commands as a user does, and keeps what they print."""

    def __init__(self, address: str, admin: str, usual: dict[str, str]) -> None:
        self.address, self._usual = address, usual
        kept = {key: value for key, value in os.environ.items() if "QUIRE" not in key}
        self._environment = kept | {
            "QUIRE_ADDRESS": address,
            "QUIRE_ADMIN_ADDRESS": admin,
            "COLUMNS": str(WIDTH),
        }
        self.made: dict[str, str] = {}

    def start(self, line: str) -> subprocess.Popen[str]:
        words = shlex.split(line)
        assert words.pop(0) == "quire"
        return subprocess.Popen(
            [*_QUIRE, *words], cwd=ROOT, env=self._environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, line: str, status: int = 0) -> str:
        process = self.start(line)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == status, (line, output)
        for port, usual in self._usual.items():
            output = output.replace(port, usual)
        return "\n".join(each.rstrip() for each in output.strip("\n").splitlines())

    def record(self, name: str, *lines: str, status: int = 0) -> None:
        parts = []
        for line in lines:
            output = self.run(line, status)
            parts.append("\n".join(part for part in (f"$ {line}", output.rstrip()) if part))
        self.made[name] = "```text\n" + "\n\n".join(parts) + "\n```"


@contextmanager
def recorder() -> Iterator[Recorder]:
    """Two engines with the demo model, whose pools are small."""
    pool = ("--blocks", "160", "--swap-memory-mib", "2")
    with tempfile.TemporaryDirectory() as name, RedisServer() as redis:
        folder, admin = Path(name), f"127.0.0.1:{free_port()}"
        with (
            data_plane(folder / "e0.log", *pool, "--engine-id", "e0") as first,
            data_plane(folder / "e1.log", *pool, "--engine-id", "e1") as second,
        ):
            first.ready()
            second.ready()
            flags = ("--admin-listen", admin, "--redis-url", redis.url)
            flags += ("--index-timeout-ms", "500", "--preemption", "swap")
            with control_plane(folder / "c.log", [first.port, second.port], *flags) as control:
                control.ready()
                address = f"127.0.0.1:{control.port}"
                usual = {
                    address: "127.0.0.1:7401",
                    admin: "127.0.0.1:7402",
                    f"127.0.0.1:{first.port}": "127.0.0.1:7411",
                    f"127.0.0.1:{second.port}": "127.0.0.1:7412",
                }
                yield Recorder(address, admin, usual)


def record_all(recorder: Recorder) -> None:
    """One story: questions, a registered prefix, memory that gets short, an engine that drains."""
    system = shlex.quote((ROOT / "data_plane/demo_model/system_prompt.txt").read_text().strip())
    ask = f"quire generate --temperature 0 --max-tokens 24 --system {system}"
    _until(lambda: "connecting" not in recorder.run("quire engines"))
    for question in (_QUESTION, "What is copy-on-write?", _QUESTION):
        recorder.run(f"{ask} {shlex.quote(question)}")
    recorder.record("prefixes", "quire prefixes")
    recorder.record("json", "quire prefixes --limit 1 --json")
    recorder.record(
        "register",
        "quire prefixes register support --file data_plane/demo_model/system_prompt.txt",
    )
    recorder.record("warm", "quire prefixes warm support --wait")
    recorder.record("pin", "quire prefixes pin support")
    recorder.run(f"{ask} {shlex.quote(_QUESTION)}")
    # What was saved is in Redis within a second, and read again from there.
    time.sleep(2.5)
    recorder.record("registered", "quire prefixes registered")
    recorder.record("explain", f'quire prefixes explain {_SYSTEM} "{_QUESTION}"')
    recorder.record("tenant", f'quire prefixes explain --tenant red {_SYSTEM} "{_QUESTION}"')
    answer = json.loads(recorder.run(f"{ask} --json 'What is swapping?'"))
    recorder.record("request", f"quire prefixes explain --request-id {answer['request_id']}")

    _busy(recorder)
    recorder.record("evicted", f'quire prefixes explain {_SYSTEM} "{_QUESTION}"')
    recorder.record("forget", "quire prefixes unpin support", "quire prefixes unregister support")
    recorder.record("error", "quire prefixes pin support", status=1)
    _drain(recorder)


def _busy(recorder: Recorder) -> None:
    """Shows engines while they have more to do than fits."""
    text = "A pool of blocks. " * 30
    names = [f"long-{at}" for at in range(8)]

    async def generate() -> None:
        async with Client(recorder.address) as client:

            async def one(at: int, name: str) -> None:
                options = {"sample_count": 3, "max_tokens": 600, "ignore_eos": True, "seed": at}
                async for _ in client.generate(f"{at} {text}", request_id=name, **options):  # type: ignore[misc]
                    pass

            await asyncio.gather(*(one(at, name) for at, name in enumerate(names)))

    async def cancel() -> None:
        async with Client(recorder.address) as client:
            for name in names:
                with suppress(CallError):
                    await client.cancel(name)

    running = threading.Thread(target=lambda: asyncio.run(generate()))
    running.start()
    _until(lambda: "swapped" in recorder.run("quire sequences --engine e0"))
    recorder.record("sequences", "quire sequences --engine e0")
    recorder.record("engines", "quire engines")
    recorder.record("blocks", "quire blocks e0")
    asyncio.run(cancel())
    running.join()


def _drain(recorder: Recorder) -> None:
    lines = ("quire drain e1", "quire drain e1 --resume")
    if "DrainEngine" not in vars(Admin):
        # The service does not know it yet; nothing was seen.
        recorder.made["drain"] = "```text\n" + "\n".join(f"$ {line}" for line in lines) + "\n```"
    else:
        recorder.record("drain", *lines)


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", action="store_true", help="the tables of options only")
    made = option_tables()
    if not parser.parse_args().options:
        with recorder() as running:
            record_all(running)
            made |= running.made
    text = PAGE.read_text()
    assert sorted(made) == sorted(name for name in blocks_of(text) if name in made), "no such block"
    PAGE.write_text(fill(text, made))


if __name__ == "__main__":
    main()
