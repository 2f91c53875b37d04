"""Prometheus metrics of one replica, read from its counters and its leaders when it is scraped.

A scrape runs on a thread of its own, so everything here is read, never iterated in place.
"""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from control_plane.metrics.counters import Counters, EngineCounters, ModelCounters
from control_plane.metrics.histogram import Histogram

if TYPE_CHECKING:
    from control_plane.prefix_index import PrefixIndex
    from control_plane.router import Router
    from control_plane.step_loop import StepLoop

Value = float | Mapping[str, float]


class Metrics:
    """The registry of a replica.

    Attributes:
        counters: what it counts, for those who count.
    """

    def __init__(self, counters: Counters | None = None) -> None:
        self.registry = CollectorRegistry()
        self.counters = counters or Counters()

    def observe(
        self, router: Router, index: PrefixIndex, draining: Callable[[], bool] = lambda: False
    ) -> None:
        """Serves the metrics from now on."""
        for collector in (
            _Requests(self.counters),
            _Engines(self.counters, router),
            _Rest(self.counters, router, index, draining),
        ):
            self.registry.register(collector)


class _Family(NamedTuple):
    """One family: `values` gives a number, or one for each value of the label `by`."""

    name: str
    help: str
    values: Callable[[EngineCounters], Value]
    by: str = ""


_ENGINE_COUNTERS = (
    _Family("quire_prompt_tokens", "Prompt tokens of requests that the engine took.",
            lambda of: of.prompt_tokens),
    _Family("quire_prefix_query_tokens", "Prompt tokens looked up in the prefix cache.",
            lambda of: of.query_tokens),
    _Family("quire_prefix_hit_tokens", "Prompt tokens found in the prefix cache.",
            lambda of: of.hit_tokens),
    _Family("quire_prefix_expected_tokens", "Prompt tokens that the router expected to be found.",
            lambda of: of.expected_tokens),
    _Family("quire_index_stale_hints", "Requests for which the index foretold more than was found.",
            lambda of: of.stale_hints),
    _Family("quire_generated_tokens", "Output tokens handed to requests.",
            lambda of: of.output_tokens),
    _Family("quire_recomputed_tokens", "Tokens computed again, after a preemption or a loss.",
            lambda of: of.totals.recomputed_tokens),
    _Family("quire_preemptions", "Groups preempted, by kind.",
            lambda of: {"swap": of.totals.swaps,
                        "recompute": max(of.totals.preemptions - of.totals.swaps, 0)}, "kind"),
    _Family("quire_swapped_blocks", "Blocks swapped.",
            lambda of: {"out": of.totals.swapped_out_blocks,
                        "in": of.totals.swapped_in_blocks}, "direction"),
    _Family("quire_swapped_bytes", "Bytes of those blocks, on each rank.",
            lambda of: {"out": of.swapped_out_bytes, "in": of.swapped_in_bytes}, "direction"),
    _Family("quire_steps", "Steps done.", lambda of: of.timings.steps),
    _Family("quire_step_seconds", "Engine time of steps, by phase.",
            lambda of: {phase: getattr(of.timings, f"{phase}_us") / 1e6
                        for phase in ("queue", "moves", "forward", "sample")}, "phase"),
    _Family("quire_leaderships", "Times that this replica began to lead the engine.",
            lambda of: of.leaderships),
    _Family("quire_leadership_losses", "Leaderships that ended by a failure.",
            lambda of: of.losses),
)  # fmt: skip


class _Engines(Collector):
    """What this replica has done with each engine, and the state of those that it leads."""

    def __init__(self, counters: Counters, router: Router) -> None:
        self._counters, self._router = counters, router

    def collect(self) -> Iterator[Metric]:
        engines = self._counters.engines
        for name, text, values, by in _ENGINE_COUNTERS:
            family = CounterMetricFamily(name, text, labels=["engine", by] if by else ["engine"])
            for engine in dict.fromkeys(engine for engine, _ in engines):
                own = [
                    values(counters) for (name, _), counters in engines.items() if name == engine
                ]
                _add(family, [engine], _sum(own))
            yield family
        loops = led(self._router)
        for name, text, read, by in _LED:
            gauge = GaugeMetricFamily(name, text, labels=["engine", by] if by else ["engine"])
            for loop in loops:
                _add(gauge, [loop.facts.engine_id], read(loop))
            yield gauge
        info = InfoMetricFamily("quire_led_engine", "Engines that this replica leads.")
        epochs = GaugeMetricFamily(
            "quire_leader_epoch", "Of this replica's leadership.", labels=["engine"]
        )
        for leader in self._router.leaders:
            if (present := leader.loop) is not None:
                facts = present.facts
                told = {"engine": facts.engine_id, "model": facts.model}
                told |= {"incarnation": facts.incarnation, "address": leader.link.address}
                info.add_metric([], told)
                epochs.add_metric([facts.engine_id], leader.epoch)
        yield from (info, epochs)


class _Gauge(NamedTuple):
    """One family of the engines that are led; as `_Family`."""

    name: str
    help: str
    read: Callable[[StepLoop], Value]
    by: str = ""


def _blocks(loop: StepLoop) -> Value:
    """The states add up to the pool's size, also when a step goes on meanwhile."""
    pool = loop.scheduler.pool
    free, cached = pool.free_count, pool.cached_count
    return {"free": free, "cached": cached, "used": max(pool.block_count - free - cached, 0)}


def _host_blocks(loop: StepLoop) -> Value:
    pool = loop.scheduler.swap.pool
    free = pool.free_count
    return {"free": free, "used": pool.block_count - free}


def requests(loop: StepLoop) -> dict[str, float]:
    """Requests of an engine; those that were preempted may wait for a slot again."""
    waiting = loop.scheduler.waiting_count
    return {"running": max(loop.request_count - waiting, 0), "waiting": waiting}


def used_blocks(loop: StepLoop) -> float:
    return loop.scheduler.pool.used_count


_LED = (
    _Gauge("quire_blocks", "Blocks of a pool, by state.", _blocks, "state"),
    _Gauge("quire_kv_usage_ratio", "Share of the pool's blocks that sequences use.",
           lambda loop: used_blocks(loop) / loop.facts.block_count),
    _Gauge("quire_host_blocks", "Blocks of the swap space.", _host_blocks, "state"),
    _Gauge("quire_sequences", "Resident sequences, and requests that wait.",
           lambda loop: {"running": loop.scheduler.running_count,
                         "waiting": loop.scheduler.waiting_count}, "state"),
    _Gauge("quire_requests", "Requests, by state.", requests, "state"),
    _Gauge("quire_queue_tokens", "Tokens of requests that wait.",
           lambda loop: loop.scheduler.queue.tokens),
    _Gauge("quire_queue_oldest_seconds", "How long a request has waited to be taken, at most.",
           lambda loop: loop.longest_wait(time.monotonic())),
)  # fmt: skip


_MODEL_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelCounters], Histogram]], ...] = (
    ("quire_time_to_first_token_seconds", "From a call's arrival to its first token.",
     lambda of: of.first_token),
    ("quire_queue_time_seconds", "From a call's arrival until an engine takes it.",
     lambda of: of.queue),
    ("quire_inter_token_seconds", "Between two tokens of a sample.", lambda of: of.token_gap),
    ("quire_time_per_output_token_seconds", "Mean time of a request's tokens after the first.",
     lambda of: of.output_token),
    ("quire_request_seconds", "From a call's arrival to its end.", lambda of: of.duration),
    ("quire_request_prompt_tokens", "Prompt tokens of requests that ended.", lambda of: of.prompt),
    ("quire_request_output_tokens", "Output tokens of requests that ended.", lambda of: of.output),
)  # fmt: skip


class _Requests(Collector):
    """What became of requests, by model."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        models = self._counters.models
        for name, text, read in _MODEL_HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=["model"])
            for model, counters in models.items():
                histogram = read(counters)
                family.add_metric([model], buckets(histogram), histogram.sum)
            yield family
        finished = CounterMetricFamily(
            "quire_requests_finished", "Requests that ended, by why.", labels=["model", "reason"]
        )
        for model, counters in models.items():
            by_reason = {reason.value: count for reason, count in counters.finished.items()}
            _add(finished, [model], by_reason)
        yield finished


class _Rest(Collector):
    """What is neither an engine's nor a model's."""

    def __init__(
        self,
        counters: Counters,
        router: Router,
        index: PrefixIndex,
        draining: Callable[[], bool],
    ) -> None:
        self._counters, self._router = counters, router
        self._index, self._draining = index, draining

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        build = InfoMetricFamily("quire_build", "What this process runs.")
        build.add_metric([], {"version": quire_version(), "python": platform.python_version()})
        yield build
        yield GaugeMetricFamily(
            "quire_draining", "1 while no new calls are taken.", value=float(self._draining())
        )
        rejected = CounterMetricFamily(
            "quire_requests_rejected", "Calls ended with an error, by status.", labels=["code"]
        )
        _add(rejected, [], dict(counters.rejected))
        yield rejected
        yield CounterMetricFamily(
            "quire_requests_expired", "Calls that waited too long for an engine.",
            value=counters.expired,
        )  # fmt: skip
        yield from self._shares()
        yield from self._index_state()

    def _shares(self) -> Iterator[Metric]:
        tenants, prefixes = self._counters.tenants.all(), self._counters.prefixes.all()
        for name, text, values in (
            ("quire_tenant_prompt_tokens", "Prompt tokens, by tenant.",
             {tenant: share.prompt_tokens for tenant, share in tenants.items()}),
            ("quire_tenant_prefix_hit_tokens", "Prompt tokens found in the cache, by tenant.",
             {tenant: share.hit_tokens for tenant, share in tenants.items()}),
        ):  # fmt: skip
            family = CounterMetricFamily(name, text, labels=["tenant"])
            _add(family, [], values)
            yield family
        for name, text, values in (
            ("quire_registered_prefix_requests", "Requests that begin with a registered prefix.",
             {prefix: share.requests for prefix, share in prefixes.items()}),
            ("quire_registered_prefix_hit_tokens", "Prompt tokens found in the cache for them.",
             {prefix: share.hit_tokens for prefix, share in prefixes.items()}),
        ):  # fmt: skip
            family = CounterMetricFamily(name, text, labels=["prefix"])
            _add(family, [], values)
            yield family

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
        seconds = HistogramMetricFamily(
            "quire_index_lookup_seconds", "Time of lookups that were sent."
        )
        seconds.add_metric([], buckets(index.lookup_seconds), index.lookup_seconds.sum)
        yield seconds
        yield CounterMetricFamily(
            "quire_index_dropped", "Changes that never went out one by one.", value=index.dropped
        )
        yield CounterMetricFamily(
            "quire_index_predicted_tokens",
            "Prompt tokens that the index foretold as cached, on whichever engine held most.",
            value=self._router.predicted_tokens,
        )


def led(router: Router) -> list[StepLoop]:
    """The step loops of the engines that are led now."""
    return [loop for leader in router.leaders if (loop := leader.loop) is not None]


def buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """As Prometheus has them: how many values are at most each bound."""
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, histogram.cumulative()), strict=True))


def quire_version() -> str:
    try:
        return version("quire")
    except PackageNotFoundError:
        return "unknown"  # It runs from a folder that was never installed.


def _sum(values: list[Value]) -> Value:
    """Adds up values of one family."""
    total: dict[str, float] = defaultdict(float)
    for value in values:
        for name, each in value.items() if isinstance(value, Mapping) else [("", value)]:
            total[name] += each
    return total.get("", total)


def _add(family: CounterMetricFamily | GaugeMetricFamily, labels: list[str], value: Value) -> None:
    if isinstance(value, Mapping):
        for name, each in value.items():
            family.add_metric([*labels, name], each)
    else:
        family.add_metric(labels, value)
