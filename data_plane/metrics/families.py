"""Prometheus metrics of an engine, read when they are scraped, on a thread of their own.

Nothing here asks the device for anything: what steps take and move they have counted themselves.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from data_plane.engine import Engine
from data_plane.metrics.meter import PHASES
from data_plane.service import EngineService


def registry_of(engine: Engine, service: EngineService) -> CollectorRegistry:
    """What to serve; an engine of several ranks is seen from rank 0."""
    registry = CollectorRegistry()
    registry.register(_EngineCollector(engine, service))
    return registry


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, service: EngineService) -> None:
        self._engine, self._service = engine, service
        self._weight_bytes = engine.model.weight_bytes

    def collect(self) -> Iterator[Metric]:
        yield from self._identity()
        yield from self._leadership()
        yield from self._steps()
        yield from self._residents()
        yield from self._memory()

    def _identity(self) -> Iterator[Metric]:
        engine, service = self._engine, self._service
        build = InfoMetricFamily("quire_build", "What this process runs.")
        build.add_metric([], {
            "version": _version(), "python": platform.python_version(), "torch": torch.__version__,
        })  # fmt: skip
        yield build
        info = InfoMetricFamily("quire_engine", "What this engine is.")
        info.add_metric([], {
            "engine": service.engine_id,
            "incarnation": service.incarnation,
            "model": engine.model.facts.name,
            "fingerprint": engine.fingerprint,
            "dtype": str(engine.model.facts.dtype).removeprefix("torch."),
            "kv_dtype": str(engine.cache.dtype).removeprefix("torch."),
            "device": engine.model.device.type,
        })  # fmt: skip
        yield info

    def _leadership(self) -> Iterator[Metric]:
        service = self._service
        yield GaugeMetricFamily(
            "quire_engine_led", "1 while a leader is there.", value=float(service.led)
        )
        yield GaugeMetricFamily(
            "quire_engine_epoch", "Of the last leadership; 0 before the first.", value=service.epoch
        )
        refused = CounterMetricFamily(
            "quire_engine_plans_refused", "Plans that were not executed.", labels=["reason"]
        )
        for reason, count in service.refused.copy().items():
            refused.add_metric([reason], count)
        yield refused

    def _steps(self) -> Iterator[Metric]:
        counters, meter = self._engine.counters, self._engine.meter
        yield CounterMetricFamily("quire_engine_steps", "Steps.", value=counters.step_count)
        tokens = CounterMetricFamily(
            "quire_engine_tokens", "Tokens that went through the model.", labels=["kind"]
        )
        tokens.add_metric(["prefill"], counters.prefill_token_count)
        tokens.add_metric(["decode"], counters.decode_token_count)
        yield tokens
        phases = CounterMetricFamily(
            "quire_engine_step_seconds", "Time of steps, by phase.", labels=["phase"]
        )
        for phase, spent in zip(PHASES, meter.phase_us, strict=True):
            phases.add_metric([phase], spent / 1e6)
        yield phases
        moved = {"out": meter.swapped_out, "in": meter.swapped_in}
        swapped = CounterMetricFamily(
            "quire_engine_swapped_blocks", "Blocks swapped.", labels=["direction"]
        )
        swapped_bytes = CounterMetricFamily(
            "quire_engine_swapped_bytes", "Bytes of those blocks.", labels=["direction"]
        )
        for direction, count in moved.items():
            swapped.add_metric([direction], count)
            swapped_bytes.add_metric([direction], count * self._engine.cache.bytes_per_block)
        yield from (swapped, swapped_bytes)
        yield CounterMetricFamily(
            "quire_engine_copied_blocks", "Blocks copied before a write.", value=meter.copied
        )
        yield from self._buckets()

    def _buckets(self) -> Iterator[Metric]:
        runner = self._engine.runner
        steps = CounterMetricFamily(
            "quire_engine_bucket_steps", "Steps that ran in a bucket.", labels=["bucket"]
        )
        for size, count in runner.bucket_steps.copy().items():
            steps.add_metric([str(size)], count)
        yield steps
        yield CounterMetricFamily(
            "quire_engine_bucket_padding_rows", "Rows of buckets that no sequence filled.",
            value=runner.padding_rows,
        )  # fmt: skip
        yield CounterMetricFamily(
            "quire_engine_unpadded_steps", "Steps that ran as they came, in no bucket.",
            value=runner.unpadded_steps,
        )  # fmt: skip

    def _residents(self) -> Iterator[Metric]:
        state = self._engine.state
        blocks = GaugeMetricFamily(
            "quire_engine_blocks", "Blocks of the pool, by state.", labels=["state"]
        )
        for name, count in zip(("free", "cached", "used"), state.block_counts(), strict=True):
            blocks.add_metric([name], count)
        yield blocks
        host, used = state.host_block_count, state.host_blocks_used()
        hosts = GaugeMetricFamily(
            "quire_engine_host_blocks", "Blocks of the swap space, by state.", labels=["state"]
        )
        hosts.add_metric(["free"], host - used)
        hosts.add_metric(["used"], used)
        yield hosts
        resident, swapped = state.resident_counts()
        sequences = GaugeMetricFamily(
            "quire_engine_sequences", "Sequences, by where their blocks are.", labels=["state"]
        )
        sequences.add_metric(["resident"], resident - swapped)
        sequences.add_metric(["swapped"], swapped)
        yield sequences
        yield GaugeMetricFamily(
            "quire_engine_slots", "Sequences that there is room for.", value=state.slot_count
        )

    def _memory(self) -> Iterator[Metric]:
        engine = self._engine
        cache, device = engine.cache, engine.model.device
        sizes = [
            ("quire_engine_weight_bytes", "Weights.", self._weight_bytes),
            ("quire_engine_kv_cache_bytes", "The pool of blocks.",
             cache.block_count * cache.bytes_per_block),
            ("quire_engine_swap_space_bytes", "Host memory for swapped blocks.",
             cache.host_block_count * cache.bytes_per_block),
        ]  # fmt: skip
        if device.type == "cuda":
            # Both are known to the host; neither asks the device.
            total = torch.cuda.get_device_properties(device).total_memory
            sizes += [
                ("quire_engine_device_reserved_bytes", "Device memory that this process holds.",
                 torch.cuda.memory_reserved(device)),
                ("quire_engine_device_memory_bytes", "Memory of the device.", total),
            ]  # fmt: skip
        for name, text, value in sizes:
            yield GaugeMetricFamily(name, text, value=value)
        yield GaugeMetricFamily(
            "quire_engine_load_seconds", "From the start of loading until it could serve.",
            value=engine.load_seconds,
        )  # fmt: skip


def _version() -> str:
    try:
        return version("quire")
    except PackageNotFoundError:
        return "unknown"  # It runs from a folder that was never installed.
