"""The measuring process: `python -m benchmarks.gpu.worker JSON`, started by `supervisor`.

It says what it does on its standard output, one JSON object a line, so that the process
above knows what was going on if this one dies: a fault on a GPU takes the whole process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import cases
from benchmarks.gpu.cases import Cell

if TYPE_CHECKING:
    from benchmarks.gpu.engine_cells import EngineCells

# Seconds that are left for the report.
RESERVE = 4.0
# The device is gone; a new process may find it again.
LOST = 3
# Cells whose kernels are compiled together, ahead of the first of them.
COMPILED_TOGETHER = 24


class Worker:
    """settings: dry, tune, sections, skip (keys), without (peers), bare (keys of cells without
    any), seconds, and ahead: whether kernels are compiled ahead of their cells."""

    def __init__(self, settings: dict[str, Any], say: Callable[..., None]) -> None:
        self.settings, self.say = settings, say
        self.ends = time.monotonic() + settings["seconds"] - RESERVE
        self.dry = bool(settings["dry"])
        prepare_interpreter(self.dry)
        import torch

        from benchmarks.gpu import device

        self.device = device.find_device(self.dry)
        if not self.device.cuda:
            # Threads cost tiny sizes more than they bring.
            torch.set_num_threads(1)
        self.compiled: set[str] = set()
        self._engine_cells: EngineCells | None = None

    def cells(self) -> list[Cell]:
        make = cases.tuned if self.settings["tune"] else cases.measured
        skip, sections = set(self.settings["skip"]), self.settings["sections"]
        return [
            cell
            for cell in make(self.dry)
            if cell.key not in skip and (not sections or cell.section in sections)
        ]

    def run(self) -> None:
        from benchmarks.gpu.device import DeviceLost, describe
        from benchmarks.gpu.peers import flash_infer

        if not self.dry and not self.settings["tune"]:
            flash_infer.start()
        self.say("device", **facts(self.device))
        cells = self.cells()
        for at, cell in enumerate(cells):
            if time.monotonic() + cell.seconds > self.ends:
                continue
            if cell.key not in self.compiled:
                self._compile(cells[at : at + COMPILED_TOGETHER])
            self.say("begin", cell=cell.key)
            began = time.monotonic()
            try:
                figures = self._measure(cell)
            except DeviceLost:
                raise
            except Exception as error:
                traceback.print_exc()
                figures = {"failed": describe(error)}
                self.device.recover()
            figures["took"] = time.monotonic() - began
            self.say("result", cell=cell.key, figures=figures)
            self.device.tidy()
        self.say("end")

    def _compile(self, cells: Sequence[Cell]) -> None:
        """What the next cells launch. On several cores it takes a fraction of the time."""
        from benchmarks.gpu import attention, check
        from benchmarks.gpu.device import compile_ahead

        self.compiled |= {cell.key for cell in cells}
        if not self.device.cuda or not self.settings["ahead"]:
            return
        self.say("begin", cell="")
        began, launches = time.monotonic(), []
        for cell in cells:
            if isinstance(cell, cases.Check):
                launches += check.launches(cell, self.device)
            elif isinstance(cell, cases.Decode | cases.Prefill) and not self.settings["tune"]:
                launches += attention.launches(cell, self.device)
        count = compile_ahead(launches)
        self.say("note", text=f"compiled {count} kernels in {time.monotonic() - began:.0f} s")

    def _measure(self, cell: Cell) -> dict[str, Any]:
        if isinstance(cell, cases.EngineCell):
            return self._measure_engine(cell)
        if self._engine_cells is not None:
            self._engine_cells.leave()
        return self._measure_kernel(cell)

    def _measure_engine(self, cell: cases.EngineCell) -> dict[str, Any]:
        # Not before it is needed: it imports all of transformers.
        from benchmarks.gpu.engine_cells import EngineCells

        if self._engine_cells is None:
            self._engine_cells = EngineCells(self.device)
        without = {*self.settings["without"]}
        if cell.key in self.settings["bare"]:
            without |= {*cases.MODEL_PEERS}
        return self._engine_cells.run(cell, without, lambda name: self.say("peer", name=name))

    def _measure_kernel(self, cell: Cell) -> dict[str, Any]:
        from benchmarks.gpu import attention, ceilings, check, moves, peers, tune

        if isinstance(cell, cases.Ceiling):
            return ceilings.run(cell, self.device)
        if isinstance(cell, cases.Check):
            return check.run(cell, self.device)
        if isinstance(cell, cases.TuneDecode | cases.TunePrefill):
            return tune.run(cell, self.device)
        if isinstance(cell, cases.Copy):
            return moves.copy(cell, self.device)
        if isinstance(cell, cases.Swap):
            return moves.swap(cell, self.device)
        assert isinstance(cell, cases.Decode | cases.Prefill)
        found = peers.find(cell.compiled, self.dry)
        if cell.key in self.settings["bare"]:
            found = {}
        for name in self.settings["without"]:
            found.pop(name, None)
        return attention.run(cell, self.device, found, lambda name: self.say("peer", name=name))


def prepare_interpreter(dry: bool) -> None:
    """Without a GPU, Triton's functions are made for its interpreter: before its first import."""
    import torch

    interpreted = dry and not torch.cuda.is_available()
    assert not interpreted or "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))


def facts(device: Any) -> dict[str, Any]:
    """What the figures were measured with."""
    import torch
    import triton

    return {
        "name": device.name,
        "multiprocessors": device.multiprocessors,
        "cache_bytes": device.cache_bytes,
        "memory_bytes": device.memory_bytes,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
        "transformers": _version("transformers"),
        "python": sys.version.split()[0],
    }


def _version(name: str) -> str | None:
    """Of an installed package, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    # Libraries print what they like: their output goes where errors go.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(event: str, **content: Any) -> None:
        channel.write(json.dumps({"event": event, **content}) + "\n")
        channel.flush()

    worker = Worker(json.loads(sys.argv[1]), say)
    from benchmarks.gpu.device import DeviceLost

    try:
        worker.run()
    except DeviceLost as error:
        say("note", text=f"the device is lost: {error}")
        # Nothing can be cleaned up on a device that answers nothing.
        os._exit(LOST)


if __name__ == "__main__":
    main()
