"""Runs the measuring process, and starts another where it dies or answers nothing."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

# Seconds without a word after which the process is taken to hang; a cell of flex_attention
# or of tuning compiles for a while. GRACE: what a cell is given beyond the end of the run.
SILENCE, GRACE = 150.0, 10.0
MOST_STARTS = 8


@dataclass
class Outcome:
    """figures: by cell. device: what the figures were measured with. faults: of processes.
    without: peers that took a process along. bare: cells that no peer takes part in any more."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)


class Supervisor:
    """settings: the worker's. told: called with each result, and with each note."""

    def __init__(
        self,
        settings: dict[str, Any],
        told: Callable[[str, dict[str, Any]], None],
        command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu.worker"),
        silence: float = SILENCE,
    ) -> None:
        self.settings, self.told, self.command = settings, told, list(command)
        self.silence = silence
        self.ends = time.monotonic() + settings["seconds"]
        self.outcome = Outcome()
        self.cell = self.peer = ""

    def run(self) -> Outcome:
        for _ in range(MOST_STARTS):
            self.cell = self.peer = ""
            fault = self._run_worker()
            if fault is None:
                break
            blamed = self._blame(fault)
            if not self.outcome.device or time.monotonic() > self.ends - GRACE:
                break
            if not blamed and not self.settings["ahead"]:
                break
            # What compiles many kernels at once is the first to be suspected.
            self.settings = {**self.settings, "ahead": self.settings["ahead"] and blamed}
        return self.outcome

    def _run_worker(self) -> str | None:
        """Returns why it did not come to its end, if it did not."""
        settings = {
            **self.settings,
            "skip": [*self.settings["skip"], *self.outcome.figures],
            "without": [*self.settings["without"], *self.outcome.without],
            "bare": self.outcome.bare,
            "seconds": self.ends - time.monotonic(),
        }
        process = subprocess.Popen(
            [*self.command, json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        ended = False
        try:
            while True:
                left = self.ends + GRACE - time.monotonic()
                line = lines.get(timeout=max(0.1, min(self.silence, left)))
                if line is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE)
                    break
                if self._take(json.loads(line)):
                    ended = True
                    break
        except queue.Empty:
            if left > self.silence:
                return "said nothing any more"
            self.told("", {"text": f"the time is over at {self.cell or 'no cell'}"})
            return None
        finally:
            # What it has started itself ends with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            reader.join()
        return None if ended else f"ended with status {status}"

    def _take(self, message: dict[str, Any]) -> bool:
        """Returns whether it was the last."""
        event = message.pop("event")
        if event == "device":
            self.outcome.device = message
        elif event == "begin":
            self.cell, self.peer = message["cell"], ""
        elif event == "peer":
            self.peer = message["name"]
        elif event == "result":
            self.outcome.figures[message["cell"]] = message["figures"]
            self.cell = self.peer = ""
            self.told(message["cell"], message["figures"])
        elif event == "note":
            self.told("", message)
        return bool(event == "end")

    def _blame(self, fault: str) -> bool:
        """A peer that takes the process along takes part no more, and its cell is begun again.

        Returns whether anybody is to blame.
        """
        what = f"the process {fault} at {self.cell or 'no cell'}"
        if self.peer:
            what += f", in {self.peer}, which takes part no more"
            self.outcome.without.append(self.peer)
        elif self.cell and self.cell not in self.outcome.bare and "status" in fault:
            what += ", which is begun again without peers"
            self.outcome.bare.append(self.cell)
        elif self.cell:
            figures = {"failed": f"the process {fault}"}
            self.outcome.figures[self.cell] = figures
            self.told(self.cell, figures)
        self.outcome.faults.append(what)
        self.told("", {"text": what})
        return bool(self.cell)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)
