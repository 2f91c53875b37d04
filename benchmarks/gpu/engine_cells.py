"""Runs the cells that need an engine, on models that stay loaded from one cell to the next."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from benchmarks.gpu import cases, engine_checks, fitting, preemption, rates, steps
from benchmarks.gpu.cases import EngineCell
from benchmarks.gpu.device import Device
from benchmarks.gpu.models import Models


class EngineCells:
    """One for each process, which has one model at a time."""

    def __init__(self, device: Device) -> None:
        self._device, self._models = device, Models(device)

    def run(
        self, cell: EngineCell, without: Collection[str], say: Callable[[str], None]
    ) -> dict[str, Any]:
        """without: peers to leave out. say: told the name of each peer before it begins."""
        device = self._device
        # What the cell before held: caches of engines are as large as memory allows.
        device.release()
        loaded = self._models.get(cell.model)
        if isinstance(cell, cases.EngineCheck):
            return engine_checks.run(cell, loaded, device)
        if isinstance(cell, cases.Step):
            with loaded.layers(fused=cell.fused):
                return steps.step(cell, loaded, device)
        if isinstance(cell, cases.Kernels):
            with loaded.layers(fused=cell.fused):
                return steps.kernels(cell, loaded, device)
        if isinstance(cell, cases.Rate):
            return rates.rate(cell, loaded, device, without, say)
        if isinstance(cell, cases.Preempt):
            return preemption.preempt(cell, loaded, device)
        assert isinstance(cell, cases.Fit)
        return fitting.fit(cell, loaded, device)

    def leave(self) -> None:
        """Makes room for cells that need no model."""
        self._models.drop()
