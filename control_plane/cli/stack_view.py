"""Shows a local stack while it starts: one line per process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from control_plane.cli.child import Child, ChildState
from control_plane.cli.local_stack import LocalStack, StackError

_REFRESH_SECONDS = 0.1
_DOING_WIDTH = 60
_MARKS = {
    ChildState.WAITING: Text("·", "dim"),
    ChildState.READY: Text("✓", "green"),
    ChildState.STOPPED: Text("■", "dim"),
    ChildState.FAILED: Text("✗", "red"),
}


@asynccontextmanager
async def shown(stack: LocalStack, console: Console) -> AsyncGenerator[LocalStack]:
    """Enters the stack, and shows how it comes up. Raises StackError as the stack does."""
    following = asyncio.create_task(_View(stack, console).follow())

    async def end_view() -> None:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    try:
        async with stack:
            await end_view()
            for warning in stack.warnings:
                console.print(Text(f"warning: {warning}", "yellow"), soft_wrap=True)
            yield stack
    finally:
        await end_view()


def print_failure(error: StackError, console: Console) -> None:
    """The sentence, and the end of the log where there is one."""
    console.print(Text(f"error: {error}", "red"), soft_wrap=True)
    if error.log is not None:
        for line in error.lines:
            console.print(Text(f"  {line}", "dim"), soft_wrap=True)
        console.print(Text(f"whole log: {error.log}"), soft_wrap=True)


class _View:
    def __init__(self, stack: LocalStack, console: Console) -> None:
        self._stack, self._console = stack, console
        self._spinner = Spinner("dots")
        self._began = time.monotonic()
        self._said: set[tuple[str, ChildState]] = set()

    async def follow(self) -> None:
        """Until cancelled."""
        if not self._console.is_terminal:
            try:
                while True:
                    self._say_changes()
                    await asyncio.sleep(_REFRESH_SECONDS)
            finally:
                self._say_changes()
        with Live(console=self._console, auto_refresh=False) as live:
            try:
                while True:
                    live.update(self._table(), refresh=True)
                    await asyncio.sleep(_REFRESH_SECONDS)
            finally:
                live.update(self._table(), refresh=True)

    def _say_changes(self) -> None:
        """Where lines cannot be rewritten, each change is a line."""
        for child in self._stack.children:
            if (child.name, child.state) in self._said or child.state is ChildState.WAITING:
                continue
            self._said.add((child.name, child.state))
            line = f"{child.name}: {child.state.value}"
            if child.state is ChildState.READY:
                line += f" at {child.address} after {time.monotonic() - self._began:.1f} s"
            self._console.print(line, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for child in self._stack.children:
            mark = _MARKS.get(child.state, self._spinner)
            table.add_row(mark, child.name, self._what(child))
        return table

    def _what(self, child: Child) -> RenderableType:
        if child.state is ChildState.READY:
            return Text(f"ready at {child.address}")
        if child.state is not ChildState.STARTING:
            return Text(child.state.value, "dim")
        doing = child.doing() or "starting"
        percent = child.percent()
        if percent is None:
            return Text(doing[:_DOING_WIDTH], "dim")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(Text(doing, "dim"), ProgressBar(100, percent, width=30))
        return bar
