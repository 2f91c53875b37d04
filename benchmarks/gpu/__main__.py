"""``make bench-gpu``: measures kernels and engine on a GPU within a given time.

``python -m benchmarks.gpu [--minutes N] [--section NAME ...] [--tune] [--dry-run]``
``python -m benchmarks.gpu --render FILE`` writes a run's figures into docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, report
from benchmarks.gpu.supervisor import Outcome, Supervisor

ROOT = Path(__file__).resolve().parent.parent.parent
DRY = "a dry run: the sizes are tiny, and no figure means anything"
KERNEL_SECTIONS = ("ceiling", "check", "decode", "prefill", "copy", "swap")
ENGINE_SECTIONS = ("engine", "step", "rate", "preempt", "fit", "kernels")
SECTIONS = KERNEL_SECTIONS + ENGINE_SECTIONS


class Log:
    """Writes each result as it comes: to the file, if there is one, and a line of progress."""

    def __init__(self, cells: list[cases.Cell], path: Path | None) -> None:
        self.cells = {cell.key: cell for cell in cells}
        self.path, self.began = path, time.monotonic()
        self.lines: dict[str, report.Line] = {}
        self._reasons: set[str] = set()

    def told(self, key: str, content: dict[str, Any]) -> None:
        if not key:
            self._say(content["text"])
            return
        self.lines[key] = line = report.line(self.cells[key], content, self.lines)
        self._say(report.progress(line))
        for name, reason in content.get("missing", {}).items():
            if f"{name}: {reason}" not in self._reasons:
                self._reasons.add(f"{name}: {reason}")
                self._say(f"  {name}: {reason}")
        self.write(line)

    def write(self, line: report.Line) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def put_first(self, header: report.Line) -> None:
        """All of it is known last. A run that is cut off leaves its lines without."""
        if self.path:
            lines = self.path.read_text()
            self.path.write_text(json.dumps(header, ensure_ascii=False) + "\n" + lines)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", file=sys.stderr, flush=True)


def main() -> int:
    arguments = _arguments()
    if arguments.render:
        return _render(arguments.render)
    cells = (cases.tuned if arguments.tune else cases.measured)(arguments.dry_run)
    if arguments.list:
        print("\n".join(cell.key for cell in cells))
        return 0
    if arguments.fa3:
        os.environ["QUIRE_FA3"] = str(arguments.fa3.resolve())
    path = None if arguments.dry_run else _empty(arguments.output or _unnamed())
    log = Log(cells, path)
    if arguments.dry_run:
        log.told("", {"text": DRY})
    settings = {
        "dry": arguments.dry_run,
        "tune": arguments.tune,
        # Shares of ceilings need the ceilings.
        "sections": ["ceiling", *arguments.section] if arguments.section else [],
        "skip": [],
        "without": arguments.without,
        "seconds": arguments.minutes * 60,
        "ahead": True,
    }
    outcome = Supervisor(settings, log.told).run()
    return _finish(outcome, log, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="what a run may take")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="these alone")
    parser.add_argument("--tune", action="store_true", help="look for better tilings instead")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes; works without a GPU")
    parser.add_argument("--output", type=Path, help="file for the lines, which is replaced")
    parser.add_argument("--fa3", type=Path, help="library of FlashAttention-3, from a vllm wheel")
    parser.add_argument("--without", action="append", default=[], help="a peer to leave out")
    parser.add_argument("--list", action="store_true", help="print what would be measured")
    parser.add_argument("--render", type=Path, help="a file of lines, for docs/performance.md")
    arguments = parser.parse_args()
    if arguments.tune and arguments.section:
        parser.error("--tune has no sections")
    return arguments


def _finish(outcome: Outcome, log: Log, arguments: argparse.Namespace) -> int:
    """Puts the header before the lines, prints the table, and returns the exit status."""
    wanted = {"ceiling", *arguments.section} if arguments.section else set()
    left_out = [
        key
        for key, cell in log.cells.items()
        if key not in log.lines and (not wanted or cell.section in wanted)
    ]
    header = {
        "benchmark": "gpu",
        "date": datetime.date.today().isoformat(),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **outcome.device,
        "minutes": (time.monotonic() - log.began) / 60,
        "left_out": left_out,
        "faults": outcome.faults,
    }
    for fault in outcome.faults:
        print(f"fault: {fault}")
    if not log.lines:
        print("nothing was measured")
        if log.path:
            log.path.unlink()
        return 1
    log.put_first(report.rounded(header))
    print(report.summary(log.lines))
    if left_out:
        print(f"left out: {len(left_out)} cells: {'; '.join(left_out)}"[:1500])
    if arguments.dry_run:
        print(DRY)
    elif log.path:
        print(f"lines are in {_name(log, outcome, arguments)}")
    failed = any("failed" in line for line in log.lines.values())
    return 1 if failed or outcome.faults else 0


def _unnamed() -> Path:
    """Where lines go until the device's name is known."""
    return ROOT / "benchmarks/results/unfinished.jsonl"


def _name(log: Log, outcome: Outcome, arguments: argparse.Namespace) -> Path:
    assert log.path is not None
    if arguments.output:
        return log.path
    device = re.sub(r"[^a-z0-9]+", "-", outcome.device.get("name", "gpu").lower()).strip("-")
    kind = "-tune" if arguments.tune else ""
    name = f"{datetime.date.today().isoformat()}-{device}{kind}.jsonl"
    return log.path.rename(log.path.with_name(name))


def _empty(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return path


def _output(*command: str) -> str | None:
    """What a command prints, if there is such a command and it succeeds."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().split("\n")[0] if run.returncode == 0 else None


def _render(path: Path) -> int:
    source = path.resolve().relative_to(ROOT).as_posix()
    report.PAGE.write_text(report.page(report.PAGE.read_text(), source, report.read(path)))
    print(f"docs/performance.md has the figures of {source}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
