"""Chains of steps on an engine, by plans as the real scheduler makes them.

Two kinds. Of a `Planner` the plans are made before the first one is run, which is possible where
no request has a stop id: what is planned then depends on the number of tokens alone. So the
engine is timed by itself, with the work that it does for a plan as that comes over the wire, and
without that of the other plane, which has a process of its own in service. A `Session` hears the
engine's tokens instead, for what depends on them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.gpu.moves import fill
from control_plane.engine_wire import decode_result, encode_plan
from control_plane.plan import Plan, StepResult
from control_plane.request import Request, SequenceGroup
from control_plane.scheduler import Scheduler, SchedulerLimits
from data_plane.engine import Engine, EngineSizes, Launched
from data_plane.plan import PlanColumns, decode_plan
from protos.engine.v1 import engine_pb2

# Steps that are launched before one is finished, as in service.
DEPTH = 2
# A token that the planner makes up for the engine's: which one it is changes no plan.
_ANY_TOKEN = 5


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan as it comes over the wire, and what it does.

    Attributes:
        decodes: sequences that decode; chunk_tokens: tokens of prompts beside them.
        swapped_out, swapped_in: blocks that cross.
    """

    message: bytes
    decodes: int
    chunk_tokens: int
    swapped_out: int
    swapped_in: int

    @classmethod
    def of(cls, plan: Plan) -> Planned:
        return cls(
            encode_plan(plan, 1).SerializeToString(),
            plan.decode_count,
            sum(plan.chunk_counts),
            sum(len(crossing.sources) for crossing in plan.swapped_out),
            sum(len(crossing.sources) for crossing in plan.swapped_in),
        )

    def columns(self) -> PlanColumns:
        return decode_plan(engine_pb2.StepPlan.FromString(self.message))


def scheduler_of(sizes: EngineSizes) -> Scheduler:
    return Scheduler(
        SchedulerLimits(
            model_fingerprint="benchmark",
            block_size=sizes.block_size,
            block_count=sizes.block_count,
            slot_count=sizes.slot_count,
            max_length=sizes.max_length,
            step_tokens=sizes.step_tokens,
            chunk_tokens=sizes.step_tokens,
            waiting_tokens=1 << 40,
            host_block_count=sizes.host_block_count,
            preemption="swap" if sizes.host_block_count else "recompute",
        )
    )


class Planner:
    """Plans for an engine of these sizes.

    Attributes:
        held: prefix hashes of what the pool holds from the start, by block.
    """

    def __init__(self, sizes: EngineSizes, vocabulary: int) -> None:
        self.sizes, self.vocabulary = sizes, vocabulary
        self.scheduler = scheduler_of(sizes)
        self.held: dict[int, bytes] = {}
        self._rng = np.random.default_rng(0)
        self._count = 0

    def hold(self, contexts: Sequence[int], new_tokens: int) -> None:
        """Submits sequences whose keys and values are in the pool already, as far as they fill
        blocks, in random ones: so that they decode without having been computed. Called first."""
        size = self.sizes.block_size
        counts = [context // size for context in contexts]
        blocks = self._rng.permutation(self.sizes.block_count)[: sum(counts)].tolist()
        digests = [at.to_bytes(16, "little") for at in range(1, sum(counts) + 1)]
        self.held = dict(zip(blocks, digests, strict=True))
        self.scheduler.restore([], self.held)
        left = iter(digests)
        for context, count in zip(contexts, counts, strict=True):
            self.submit(context, new_tokens, tuple(islice(left, count)))

    def submit(self, length: int, new_tokens: int, hashes: tuple[bytes, ...] = ()) -> SequenceGroup:
        """Submits a request with a random prompt; without hashes it finds and leaves no prefix."""
        self._count += 1
        prompt = self._rng.integers(0, self.vocabulary, length).astype(np.int32)
        request = Request(f"r{self._count}", prompt, max_tokens=new_tokens, hashes=hashes)
        return self.scheduler.submit(request)

    def plan(self, ahead: int = DEPTH - 1) -> Planned | None:
        """The next plan, which may be `ahead` of that many results; None: nothing to do."""
        plan = self.scheduler.schedule()
        while self.scheduler.steps_in_flight > (ahead if plan else 0):
            flight = self.scheduler._in_flight[0]
            tokens = np.full(len(flight.slots), _ANY_TOKEN, np.int32)
            self.scheduler.apply(StepResult(flight.step, tokens))
        return Planned.of(plan) if plan else None

    def upcoming(self) -> Iterator[Planned]:
        """Plans until everything that was submitted has ended."""
        while True:
            planned = self.plan()
            # What ended with the last result is released by one plan more.
            if planned is None and (planned := self.plan()) is None:
                return
            yield planned

    def until_all_decode(self, count: int) -> list[Planned]:
        """Plans up to the first one in which so many sequences decode, and no prompt is left."""
        found: list[Planned] = []
        for planned in self.upcoming():
            found.append(planned)
            if planned.decodes == count and not planned.chunk_tokens:
                return found
        most = max((planned.decodes for planned in found), default=0)
        raise RuntimeError(f"of {count} sequences {most} decode together at most")


def furnish(engine: Engine, planner: Planner) -> None:
    """Gives an engine what its planner believes that it holds, and random keys and values."""
    fill(engine.cache.slab)
    blocks = np.fromiter(planner.held, np.int64, len(planner.held))
    engine.state.hashed[blocks] = True
    for block, digest in planner.held.items():
        engine.state.hashes[block] = np.frombuffer(digest, np.uint8)


@dataclass(frozen=True)
class Times:
    """Seconds. ends: when each step's result was there. launches: what launching each took."""

    began: float
    ends: list[float]
    launches: list[float]

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.began

    def steps_us(self, last: int) -> list[float]:
        """Microseconds between the results of the last steps."""
        steps: list[float] = (np.diff(self.ends)[-last:] * 1e6).tolist()
        return steps


def run(engine: Engine, plans: Iterable[Planned]) -> Times:
    """Runs steps, each launched ahead. Raises RuntimeError where the model gives no logits."""
    flights: deque[Launched] = deque()
    ends: list[float] = []
    launches: list[float] = []
    began = time.perf_counter()
    for planned in plans:
        before = time.perf_counter()
        flights.append(engine.launch(planned.columns()))
        launches.append(time.perf_counter() - before)
        if len(flights) == DEPTH:
            ends.append(_finish(flights))
    while flights:
        ends.append(_finish(flights))
    return Times(began, ends, launches)


def _finish(flights: deque[Launched]) -> float:
    result = flights.popleft().finish()
    if result.faults:
        raise RuntimeError(f"{len(result.faults)} sequences fault: {result.faults[0].reason}")
    return time.perf_counter()


class Session:
    """A scheduler that hears the engine. `output`: tokens by request and sample."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.scheduler = scheduler_of(engine.sizes)
        self.output: dict[tuple[str, int], list[int]] = {}
        self._launched: deque[Launched] = deque()

    def submit(self, name: str, prompt: Sequence[int], **fields: Any) -> SequenceGroup:
        return self.scheduler.submit(Request(name, np.array(prompt, np.int32), **fields))

    def step(self) -> bool:
        """Takes the next result; False when there is nothing left to do."""
        while len(self._launched) < DEPTH and (plan := self.scheduler.schedule()):
            self._launched.append(self.engine.launch(Planned.of(plan).columns()))
        if not self._launched:
            return False
        outcome = self.scheduler.apply(decode_result(self._launched.popleft().finish()))
        for sequence, token in zip(outcome.sequences, outcome.token_ids.tolist(), strict=True):
            key = (sequence.group.request.request_id, sequence.sample_index)
            self.output.setdefault(key, []).append(token)
        for sequence, _, sentence in outcome.finished:
            if sentence:
                raise RuntimeError(f"{sequence.group.request.request_id} ended: {sentence}")
        return True

    def run(self) -> None:
        while self.step():
            pass
