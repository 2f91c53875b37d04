"""The same numbers under vLLM's names, for dashboards and gateways that know these.

Each family is one of `metrics.py` with its engines added up by model. What the Gateway API
inference extension asks of a model server is among them: queued and running requests, and the use
of the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from control_plane.metrics.counters import Counters, EngineCounters, ModelCounters
from control_plane.metrics.families import buckets, led, requests, used_blocks
from control_plane.metrics.histogram import Histogram
from control_plane.request import FinishReason

if TYPE_CHECKING:
    from control_plane.router import Router
    from control_plane.step_loop import StepLoop

_COUNTERS: tuple[tuple[str, str, Callable[[EngineCounters], float]], ...] = (
    ("vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda of: of.query_tokens),
    ("vllm:prefix_cache_hits", "Prompt tokens found.", lambda of: of.hit_tokens),
    ("vllm:num_preemptions", "Preemptions.", lambda of: of.totals.preemptions),
    ("vllm:prompt_tokens", "Prompt tokens.", lambda of: of.prompt_tokens),
    ("vllm:generation_tokens", "Output tokens.", lambda of: of.output_tokens),
)
_GAUGES: tuple[tuple[str, str, Callable[[list[StepLoop]], float]], ...] = (
    ("vllm:num_requests_running", "Requests that run.",
     lambda loops: sum(requests(loop)["running"] for loop in loops)),
    ("vllm:num_requests_waiting", "Requests that wait.",
     lambda loops: sum(requests(loop)["waiting"] for loop in loops)),
    ("vllm:kv_cache_usage_perc", "Use of the KV cache; 1 is all of it.",
     lambda loops: sum(map(used_blocks, loops))
                   / max(sum(loop.facts.block_count for loop in loops), 1)),
)  # fmt: skip
_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelCounters], Histogram]], ...] = (
    ("vllm:time_to_first_token_seconds", "Time to first token.", lambda of: of.first_token),
    ("vllm:inter_token_latency_seconds", "Time between tokens.", lambda of: of.token_gap),
    # The former name of the one before.
    ("vllm:time_per_output_token_seconds", "Time between tokens.", lambda of: of.token_gap),
    ("vllm:request_time_per_output_token_seconds", "Mean time of a request's tokens.",
     lambda of: of.output_token),
    ("vllm:e2e_request_latency_seconds", "Time of a request.", lambda of: of.duration),
    ("vllm:request_queue_time_seconds", "Time in the queue.", lambda of: of.queue),
    ("vllm:request_prompt_tokens", "Prompt tokens of a request.", lambda of: of.prompt),
    ("vllm:request_generation_tokens", "Output tokens of a request.", lambda of: of.output),
)  # fmt: skip
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}


class VllmMetrics(Collector):
    """The alias set; see `families.py` for what each number is."""

    def __init__(self, counters: Counters, router: Router) -> None:
        self._counters, self._router = counters, router

    def collect(self) -> Iterator[Metric]:
        yield from self._state()
        yield from self._requests()

    def _state(self) -> Iterator[Metric]:
        # Engines whose model is known, led or not, so that nothing that counts comes and goes.
        facts = [leader.facts for leader in self._router.leaders if leader.facts is not None]
        loops, engines = led(self._router), self._counters.engines
        models = sorted({each.model for each in facts} | {model for _, model in engines})
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            for model in models:
                own = [loop for loop in loops if loop.facts.model == model]
                gauge.add_metric([model], read(own))
            yield gauge
        for name, text, count in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            for model in models:
                counted = [count(each) for (_, name), each in engines.items() if name == model]
                counter.add_metric([model], sum(counted))
            yield counter
        labels = ["model_name", "block_size", "num_gpu_blocks", "num_cpu_blocks", "cache_dtype"]
        labels.append("enable_prefix_caching")
        info = GaugeMetricFamily("vllm:cache_config_info", "Sizes of KV caches.", labels=labels)
        sizes = {
            (each.model, each.block_size, each.block_count, each.host_block_count, each.kv_dtype)
            for each in facts
        }
        for row in sorted(sizes):
            info.add_metric([*map(str, row), "True"], 1)
        yield info

    def _requests(self) -> Iterator[Metric]:
        models = self._counters.models
        for name, text, read in _HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=["model_name"])
            for model, counters in models.items():
                histogram = read(counters)
                family.add_metric([model], buckets(histogram), histogram.sum)
            yield family
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that ended.", labels=["model_name", "finished_reason"]
        )
        for model, counters in models.items():
            for reason, count in counters.finished.items():
                finished.add_metric([model, _REASONS[reason]], count)
        yield finished
