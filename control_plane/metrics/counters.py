"""What one replica has done since it began, counted where it happens. No Prometheus here.

Everything only grows, whoever leads an engine meanwhile: an engine's counters outlive each
leadership. A request is counted where it is first taken by an engine, by the replica that has it
taken, and never again: not when it is preempted, moves to another engine, or is taken over by a new
leader. So hits add up to the `cached_token_count` of what the requests' clients are told, over all
replicas. The event loop writes; scrapes read from another thread, so whatever they go through is
copied first.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from control_plane.metrics.histogram import Histogram
from control_plane.request import FinishReason
from control_plane.scheduler import Totals

if TYPE_CHECKING:
    from control_plane.generation import Generation
    from control_plane.plan import Plan
    from control_plane.prefix_index import EngineLife

# Names that get a label of their own, first come, first served; all others share one.
MAX_TENANTS = 32
MAX_PREFIXES = 128
OTHER = "other"

# Seconds: until a first token or an admission, between two tokens, of a whole request.
WAIT_BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0,
)  # fmt: skip
GAP_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075,
    0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
DURATION_BOUNDS = (
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0,
)  # fmt: skip
TOKEN_BOUNDS = tuple(float(4**power) for power in range(10))

# What a request with several samples has ended by: the first of these that any of them has.
_REASONS = (FinishReason.ERROR, FinishReason.CANCELLED, FinishReason.LENGTH, FinishReason.STOP)


@dataclass(slots=True)
class StepTimings:
    """Where an engine's time went, in microseconds."""

    steps: int = 0
    queue_us: int = 0
    moves_us: int = 0
    forward_us: int = 0
    sample_us: int = 0

    def add(self, step: tuple[int, int, int, int]) -> None:
        self.steps += 1
        self.queue_us += step[0]
        self.moves_us += step[1]
        self.forward_us += step[2]
        self.sample_us += step[3]


@dataclass(slots=True)
class EngineCounters:
    """One engine's with one model, over all leaderships of this replica.

    Attributes:
        totals: what its schedulers count.
        prompt_tokens: of requests that it took.
        query_tokens: those of them that were looked up in the prefix cache.
        hit_tokens: those of them that were found.
        expected_tokens: those that the router expected to be found.
        stale_hints: requests for which the index foretold more than was found.
        output_tokens: handed to requests.
        losses: leaderships that ended by a failure, of whichever side.
    """

    totals: Totals = field(default_factory=Totals)
    timings: StepTimings = field(default_factory=StepTimings)
    prompt_tokens: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    expected_tokens: int = 0
    stale_hints: int = 0
    output_tokens: int = 0
    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0
    leaderships: int = 0
    losses: int = 0

    def count_swaps(self, plan: Plan, bytes_per_block: int) -> None:
        for crossing in plan.swapped_out:
            self.swapped_out_bytes += len(crossing.sources) * bytes_per_block
        for crossing in plan.swapped_in:
            self.swapped_in_bytes += len(crossing.sources) * bytes_per_block


class ModelCounters:
    """One model's requests.

    Attributes:
        first_token, queue, duration: seconds since they arrived.
        token_gap: seconds between two tokens of a sample.
        output_token: seconds from the first token to the last, for each token after the first.
        prompt, output: tokens of those that ended.
        finished: requests by why they ended.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(WAIT_BOUNDS)
        self.queue = Histogram(WAIT_BOUNDS)
        self.token_gap = Histogram(GAP_BOUNDS)
        self.output_token = Histogram(GAP_BOUNDS)
        self.duration = Histogram(DURATION_BOUNDS)
        self.prompt = Histogram(TOKEN_BOUNDS)
        self.output = Histogram(TOKEN_BOUNDS)
        self.finished = dict.fromkeys(FinishReason, 0)


@dataclass(slots=True)
class Share:
    """Requests of one name: how many, their prompt tokens, and those found in the prefix cache."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0

    def add(self, prompt_tokens: int, hit_tokens: int) -> None:
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.hit_tokens += hit_tokens


class Shares:
    """A `Share` for each of the first `limit` names; all others are counted together as `OTHER`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._shares: dict[str, Share] = {}

    def of(self, name: str) -> Share:
        if name not in self._shares and len(self._shares.keys() - {OTHER}) >= self._limit:
            name = OTHER
        return self._shares.setdefault(name, Share())

    def all(self) -> dict[str, Share]:
        return self._shares.copy()


class Counters:
    """All that a replica counts.

    Attributes:
        rejected: calls that ended with an error, by the status's name.
        expired: those of them that had waited too long for an engine.
        tenants, prefixes: prefix cache hits by tenant, and by registered prefix.
    """

    def __init__(self) -> None:
        # By engine and model: an engine may come back with another one.
        self._engines: dict[tuple[str, str], EngineCounters] = {}
        self._models: dict[str, ModelCounters] = {}
        self.rejected: dict[str, int] = defaultdict(int)
        self.expired = 0
        self.tenants, self.prefixes = Shares(MAX_TENANTS), Shares(MAX_PREFIXES)

    def engine(self, engine_id: str, model: str) -> EngineCounters:
        return self._engines.setdefault((engine_id, model), EngineCounters())

    def model(self, name: str) -> ModelCounters:
        return self._models.setdefault(name, ModelCounters())

    @property
    def engines(self) -> dict[tuple[str, str], EngineCounters]:
        return self._engines.copy()

    @property
    def models(self) -> dict[str, ModelCounters]:
        return self._models.copy()

    def admitted(
        self, generation: Generation, life: EngineLife, cached: int, now: float, shared: int = 0
    ) -> None:
        """Counts a request when an engine takes it, which it does once.

        Args:
            life: the engine's.
            cached: prompt tokens that it had.
            now: seconds, monotonic.
            shared: prompt tokens of the registered prefix that it begins with.
        """
        generation.admitted_at = now
        request, counters = generation.request, self.engine(life.engine_id, generation.model)
        counters.prompt_tokens += len(request.prompt)
        if request.sampling.prompt_logprob_count < 0:
            counters.query_tokens += len(request.prompt)
            counters.hit_tokens += cached
            forecast = generation.forecast
            if forecast is not None and forecast.life == life:
                counters.expected_tokens += forecast.expected_tokens
                counters.stale_hints += forecast.hinted_tokens > cached
        self.tenants.of(request.salt).add(len(request.prompt), cached)
        if request.prefix_name:
            self.prefixes.of(request.prefix_name).add(shared, min(cached, shared))
        if generation.arrived_at is not None:
            self.model(generation.model).queue.observe(now - generation.arrived_at)

    def first_token(self, generation: Generation, now: float) -> None:
        """Notes that a request's first token is there."""
        if generation.first_token_at is None:
            generation.first_token_at = now
            if generation.arrived_at is not None:
                self.model(generation.model).first_token.observe(now - generation.arrived_at)

    def ended(self, generation: Generation, now: float) -> None:
        """Counts a request that does not go on anywhere."""
        generation.ended_at = now
        counters = self.model(generation.model)
        reasons = {sample.ending.reason for sample in generation.samples if sample.ending}
        reason = next((reason for reason in _REASONS if reason in reasons), FinishReason.ERROR)
        counters.finished[reason] += 1
        lengths = [len(sample.token_ids) for sample in generation.samples]
        if generation.accepted:
            counters.prompt.observe(len(generation.request.prompt))
            counters.output.observe(sum(lengths))
        first, done = generation.first_token_at, reason in (FinishReason.STOP, FinishReason.LENGTH)
        if first is not None and done and max(lengths) > 1 and generation.request.beams is None:
            counters.output_token.observe((now - first) / (max(lengths) - 1))
        if generation.arrived_at is not None:
            counters.duration.observe(now - generation.arrived_at)
