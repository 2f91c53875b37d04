"""One child process with its log: started, watched, stopped. Never outlives this process."""

from __future__ import annotations

import asyncio
import enum
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from protos import tether

_LOG_HEAD = re.compile(r"^\d{4}-\S+ \S+ [A-Z]+ \S+: ")
_PERCENT = re.compile(r"(\d+) %$")
_TAIL_BYTES = 8192


class ChildState(enum.Enum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


class Child:
    """A process whose output goes to `log`.

    Args:
        name: for people, for example "data plane".
        is_ready: asked while it starts.
        address: shown when it is ready.
        needed: without it nothing goes on.

    Attributes:
        state: as of the last `observe`.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        log: Path,
        *,
        is_ready: Callable[[], Awaitable[bool]],
        address: str,
        needed: bool = True,
    ) -> None:
        self.name, self.command, self.log, self.address = name, command, log, address
        self.needed = needed
        self.state = ChildState.WAITING
        self._is_ready = is_ready
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """None before it was started."""
        return None if self._process is None else self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; the negative signal number where one ended it."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Raises OSError: the log cannot be written, or the system has no room for a process."""
        self.state = ChildState.STARTING
        launcher = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid())]
        with self.log.open("ab") as log:
            # A session of its own keeps the terminal's Ctrl-C away: this process decides the order.
            self._process = subprocess.Popen(  # noqa: S603
                launcher + self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def observe(self) -> None:
        """Brings `state` up to date."""
        if self.state in (ChildState.STOPPED, ChildState.FAILED):
            return
        if self.exit_status is not None:
            self.state = ChildState.FAILED
        elif self.state is ChildState.STARTING and await self._is_ready():
            self.state = ChildState.READY

    async def stop(self, grace_seconds: float) -> None:
        """Asks it to end and waits; after the grace time, or when cancelled, ends it by force."""
        if self._process is None:
            return
        try:
            self._process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + grace_seconds
            while self._process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        finally:
            self._process.kill()
            self._process.wait()
            if self.state is not ChildState.FAILED:
                self.state = ChildState.STOPPED

    def last_lines(self, count: int) -> list[str]:
        """The log's end, without empty lines."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(log.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        return [line for line in text.splitlines() if line.strip()][-count:]

    def doing(self) -> str:
        """What it said last, without time and origin."""
        lines = self.last_lines(1)
        return _LOG_HEAD.sub("", lines[0]) if lines else ""

    def percent(self) -> int | None:
        """How far it is with what it does, if it says so."""
        found = _PERCENT.search(self.doing())
        return int(found[1]) if found else None
