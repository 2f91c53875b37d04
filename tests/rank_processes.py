"""Ranks as somebody else starts them, by the variables of torchrun; here from a warm process.

Importing torch takes a process seconds; these are forked from one that has it already.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.processes import free_port, wait_until_serving

_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload(["data_plane.__main__"])


# The step at which a faulty rank fails, or hangs.
FAULTY_STEP = 3


def _run(flags: list[str], variables: dict[str, str], log: Path, fault: str) -> None:
    """A rank's process, as ``python -m data_plane`` has it."""
    from data_plane import __main__ as data_plane

    with log.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    os.environ.update(variables)
    sys.argv = ["data_plane", *flags]
    if fault:
        _plant_fault(data_plane.Engine, hangs=fault == "hangs")
    sys.exit(data_plane.main())


def _plant_fault(engine: type, *, hangs: bool) -> None:
    launch: Callable[..., object] = engine.launch  # type: ignore[attr-defined]

    def faulty(self: object, plan: object, *rest: object) -> object:
        if plan.step == FAULTY_STEP:  # type: ignore[attr-defined]
            if not hangs:
                raise RuntimeError("planted")
            print("planted: it hangs", flush=True)
            time.sleep(1000)
        return launch(self, plan, *rest)

    engine.launch = faulty  # type: ignore[attr-defined]


class RankProcesses:
    """All ranks of one engine; killed at the end whatever happens.

    Args:
        faulty: a rank whose worker raises on step 3, or hangs.
    """

    def __init__(
        self,
        model: Path,
        size: int,
        directory: Path,
        *flags: str,
        port: int = 0,
        faulty: int = -1,
        fault: str = "raises",
    ) -> None:
        self.port = port or free_port()
        self.log = directory / f"ranks-{self.port}-{time.monotonic_ns()}.log"
        common = ["--model", str(model), "--listen", f"127.0.0.1:{self.port}"]
        common += ["--check-invariants", "--threads", "1", "--dtype", "float32", "--device", "cpu"]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in range(size):
            place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            planted = fault if rank == faulty else ""
            arguments = ([*common, *flags], place | meeting, self.log, planted)
            self.processes.append(_warm.Process(target=_run, args=arguments, daemon=True))

    def ready(self) -> None:
        wait_until_serving(self.port, self._check)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def exit_codes(self, seconds: float = 10) -> list[int | None]:
        """Waits for all ranks to end; None is one that has not."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def _check(self) -> None:
        assert all(process.is_alive() for process in self.processes), self.log.read_text()

    def __enter__(self) -> RankProcesses:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)
