"""Prometheus metrics of one replica, read from the leaders when they are scraped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from control_plane.prefix_index import PrefixIndex
    from control_plane.router import Router


class Metrics:
    """The registry, and the counters that are kept by hand."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.rejected = Counter(
            "quire_requests_rejected", "Calls ended with an error, by status.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.expired = Counter(
            "quire_requests_expired", "Calls that waited too long for an engine.",
            registry=self.registry,
        )  # fmt: skip

    def observe(self, router: Router, index: PrefixIndex) -> None:
        self.registry.register(_StateCollector(router, index))


class _StateCollector(Collector):
    def __init__(self, router: Router, index: PrefixIndex) -> None:
        self._router, self._index = router, index

    def collect(self) -> Iterator[Metric]:
        yield from self._engines()
        yield from self._index_state()

    def _engines(self) -> Iterator[Metric]:
        blocks = GaugeMetricFamily(
            "quire_blocks", "Blocks of a pool, by state.", labels=["engine", "state"]
        )
        sequences = GaugeMetricFamily(
            "quire_sequences", "Sequences, by state.", labels=["engine", "state"]
        )
        prompt = CounterMetricFamily(
            "quire_prompt_tokens", "Prompt tokens admitted.", labels=["engine"]
        )
        cached = CounterMetricFamily(
            "quire_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", labels=["engine"]
        )
        preempted = CounterMetricFamily(
            "quire_preemptions", "Groups preempted, by kind.", labels=["engine", "kind"]
        )
        swapped = CounterMetricFamily(
            "quire_swapped_blocks", "Blocks swapped.", labels=["engine", "direction"]
        )
        host = GaugeMetricFamily(
            "quire_host_blocks", "Blocks of the swap space.", labels=["engine", "state"]
        )
        steps = CounterMetricFamily("quire_steps", "Steps done.", labels=["engine"])
        phases = CounterMetricFamily(
            "quire_step_seconds", "Engine time of steps, by phase.", labels=["engine", "phase"]
        )
        for leader in self._router.leaders:
            if leader.loop is None:
                continue
            scheduler, timings = leader.loop.scheduler, leader.loop.timings
            name, pool = leader.loop.facts.engine_id, scheduler.pool
            steps.add_metric([name], timings.steps)
            for phase in ("queue", "moves", "forward", "sample"):
                phases.add_metric([name, phase], getattr(timings, f"{phase}_us") / 1e6)
            blocks.add_metric([name, "free"], pool.free_count)
            blocks.add_metric([name, "cached"], pool.cached_count)
            blocks.add_metric([name, "used"], pool.used_count)
            sequences.add_metric([name, "running"], scheduler.running_count)
            sequences.add_metric([name, "waiting"], scheduler.waiting_count)
            prompt.add_metric([name], scheduler.totals.prompt_tokens)
            cached.add_metric([name], scheduler.totals.cached_tokens)
            totals, space = scheduler.totals, scheduler.swap.pool
            preempted.add_metric([name, "swap"], totals.swaps)
            preempted.add_metric([name, "recompute"], totals.preemptions - totals.swaps)
            swapped.add_metric([name, "out"], totals.swapped_out_blocks)
            swapped.add_metric([name, "in"], totals.swapped_in_blocks)
            host.add_metric([name, "free"], space.free_count)
            host.add_metric([name, "used"], space.used_count)
        yield from (blocks, sequences, prompt, cached, preempted, swapped, host, steps, phases)

    def _index_state(self) -> Iterator[Metric]:
        index = self._index
        yield GaugeMetricFamily(
            "quire_index_up", "1 while the prefix index answers.", value=float(index.up)
        )
        yield CounterMetricFamily(
            "quire_index_lookups", "Lookups in the prefix index.", value=index.lookups
        )
        yield CounterMetricFamily(
            "quire_index_lookup_failures", "Lookups without answer.", value=index.lookup_failures
        )
        yield CounterMetricFamily(
            "quire_index_lookup_seconds", "Time spent in lookups.", value=index.lookup_seconds_sum
        )
        yield CounterMetricFamily(
            "quire_index_dropped", "Changes that never went out one by one.", value=index.dropped
        )
        yield CounterMetricFamily(
            "quire_index_predicted_tokens",
            "Prompt tokens that the index foretold as cached.",
            value=self._router.predicted_tokens,
        )
