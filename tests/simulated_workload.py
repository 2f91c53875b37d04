"""What a seed stands for: sizes, requests, their right answers, and how much goes wrong."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from control_plane.beams import BeamFields
from control_plane.records import NOT_SHARED, SharedPrefix
from control_plane.request import FinishReason, pool_room
from control_plane.scheduler import SchedulerLimits
from protos.inference.v1 import inference_pb2 as pb
from tests.simulated_search import Searched, searched
from tests.stub_engine import VOCABULARY

# Seeds that this divides have beam searches beside their other requests. Those are drawn apart, so
# that every other seed stands for what it stood for before there were any.
SEARCHING = 4
_EARLY_STOPPING = {
    "heuristic": pb.EARLY_STOPPING_HEURISTIC,
    "first": pb.EARLY_STOPPING_FIRST,
    "never": pb.EARLY_STOPPING_NEVER,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """The engine cannot draw token `count` (from 0) of a sample or beam, however often it tries."""

    sample: int
    count: int


@dataclass(frozen=True, slots=True)
class Job:
    """One client's request.

    Attributes:
        at: seconds, when it comes.
        stop_ids: those that end a sample by id; `stop_texts`: by their text.
        cancel_after: tokens of any sample, or steps of its search, after which the client hangs up;
            None: it stays.
        scored: it asks for the prompt's log-probabilities, which are then computed each time.
        beams: it is a beam search; `sample_count` is then of the hypotheses that it wants.
    """

    name: str
    at: float
    prompt: list[int]
    max_tokens: int
    sample_count: int = 1
    priority: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[int, ...] = ()
    tenant: str = ""
    cancel_after: int | None = None
    fault: Fault | None = None
    scored: bool = False
    beams: BeamFields | None = None

    @property
    def shared(self) -> SharedPrefix:
        """Whether its prompt begins with a registered prefix is a matter of its first token."""
        count = self.prompt[0] % 4
        return SharedPrefix("registered", count) if count else NOT_SHARED

    def message(self) -> pb.GenerateRequest:
        message = pb.GenerateRequest(request_id=self.name, priority=self.priority)
        message.stopping.ignore_eos = True
        message.stopping.stop_token_ids.extend(self.stop_ids)
        message.stopping.stop_strings.extend(text_of(token) for token in self.stop_texts)
        message.output.sample_count = self.sample_count
        if self.scored:
            message.output.prompt_logprob_count = 0
        if self.beams is not None:
            message.beam_search.width = self.beams.width
            message.beam_search.length_penalty = self.beams.length_penalty
            message.beam_search.early_stopping = _EARLY_STOPPING[self.beams.early_stopping]
            message.beam_search.stream_best = self.beams.stream_best
        return message

    @property
    def search(self) -> Searched | None:
        """What its beam search comes to, if it is one."""
        if self.beams is None:
            return None
        fault = (self.fault.sample, self.fault.count) if self.fault else None
        return searched(tuple(self.prompt), self.max_tokens, self.beams, self.stop_ids, fault)

    def rows(self) -> list[list[int]]:
        """All that its sequences may ever hold: each prompt and output, as far as it can get."""
        if self.search is not None:
            return self.search.rows
        outputs = [drawn(self.prompt, self.max_tokens, i) for i in range(self.sample_count)]
        return [self.prompt + output for output in outputs]

    def answer(self, sample: int) -> tuple[list[int], FinishReason]:
        """What one sample or hypothesis must come to, and why it ends."""
        if self.search is not None:
            return self._hypothesis(self.search, sample)
        tokens = drawn(self.prompt, self.max_tokens, sample)
        fault = self.fault
        faulty = fault is not None and fault.sample == sample
        for count, token in enumerate(tokens):
            if faulty and fault is not None and count == fault.count:
                return tokens[:count], FinishReason.ERROR
            if token in self.stop_ids or token in self.stop_texts:
                return tokens[: count + 1], FinishReason.STOP
        return tokens, FinishReason.LENGTH

    @staticmethod
    def _hypothesis(search: Searched, index: int) -> tuple[list[int], FinishReason]:
        if not search.found:
            return [], FinishReason.ERROR
        found = search.found[index]
        return found.tokens.tolist(), FinishReason.STOP if found.stopped else FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take, in seconds; all but the first are the largest of what is drawn."""

    step: float = 0.001
    result: float = 0.0
    send: float = 0.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """Chances that a plan just sent is followed by trouble, by kind; `most` times in all.

    Attributes:
        rate: for any plan; five times that for one that forks, copies or swaps.
        weights: of what happens then, by name.
    """

    rate: float
    most: int
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a seed decides before the first step."""

    seed: int
    limits: SchedulerLimits
    steps_in_flight: int
    jobs: list[Job]
    pace: Pace
    trouble: Trouble


TROUBLES = ("break", "restart", "replica", "preempt", "cancel")


def drawn(prompt: list[int], count: int, sample: int) -> list[int]:
    """`stub_engine.expected`, at a cost that grows with the tokens and not with their square."""
    tokens: list[int] = []
    so_far = hashlib.blake2b(np.asarray(prompt, "<i4").tobytes(), digest_size=4)
    for _ in range(count):
        here = so_far.copy()
        here.update(bytes([sample]))
        tokens.append(int.from_bytes(here.digest(), "little") % VOCABULARY)
        so_far.update(tokens[-1].to_bytes(4, "little"))
    return tokens


def text_of(token: int) -> str:
    """Every token stands for one character of its own."""
    return chr(0x4E00 + token)


def scenario_of(seed: int) -> Scenario:
    rng = random.Random(seed)
    limits = _limits(rng)
    pace = Pace(
        result=rng.choice([0.0, 0.0, 0.001, 0.004]), send=rng.choice([0.0, 0.0, 0.0, 0.002])
    )
    kinds = [*rng.sample(TROUBLES, rng.randrange(1, len(TROUBLES) + 1)), "preempt"]
    trouble = Trouble(
        rate=rng.choice([0.0, 0.01, 0.03, 0.1]),
        most=rng.choice([1, 3, 8]),
        weights={kind: 0.1 + rng.random() for kind in kinds},
    )
    jobs = _jobs(rng, limits)
    if seed % SEARCHING == 0:
        apart = random.Random(f"searches {seed}")
        jobs += _searches(apart, limits, jobs)
        # Beams are hard to hit: a search takes few steps, and pauses between them.
        rate, most = apart.choice([0.0, 0.03, 0.1, 0.2]), apart.choice([3, 8, 20])
        trouble = replace(trouble, rate=rate, most=most)
    return Scenario(seed, limits, rng.choice([1, 2, 2, 3, 4]), jobs, pace, trouble)


def _limits(rng: random.Random) -> SchedulerLimits:
    slots = rng.choice([2, 3, 5, 9])
    step_tokens = max(slots, rng.choice([6, 16, 48]))
    block_size = rng.choice([1, 2, 4, 4, 8, 16])
    # From one long sequence to more than there is work for: most runs are short of memory.
    block_count = rng.choice([50, 64, 80, 110, 150, 300]) // block_size
    return SchedulerLimits(
        model_fingerprint="stub",
        block_size=block_size,
        block_count=block_count,
        host_block_count=rng.choice([0, block_count // 3, block_count, 4 * block_count]),
        preemption=rng.choice(["auto", "swap", "swap", "recompute"]),
        slot_count=slots,
        step_tokens=step_tokens,
        chunk_tokens=min(step_tokens, rng.choice([1, 5, 16, 48])),
        max_length=96,
        waiting_requests=rng.choice([1024, 1024, 3]),
    )


def _jobs(rng: random.Random, limits: SchedulerLimits) -> list[Job]:
    """Requests that fit; prompts begin alike, go on from an earlier answer, or are the same."""
    size, blocks = limits.block_size, limits.block_count
    longest = max(2, min(48, blocks * size // 2))
    begun = [rng.randrange(VOCABULARY) for _ in range(longest)]
    samples = rng.choice([[1], [1, 1, 2], [1, 2, 3], [2, 4]])
    gap = rng.choice([0.0, 0.0, 0.002, 0.008])
    longest_answer = rng.choice([6, 24, 45])
    troubled = rng.random() < 0.5
    jobs: list[Job] = []
    at = 0.0
    for number in range(rng.randrange(4, 15)):
        # Bursts: some come together with the one before.
        at += gap * rng.choice([0, 0, 1, 2])
        prompt = _prompt(rng, begun, jobs, longest)
        sample_count = min(rng.choice(samples), limits.slot_count)
        if pool_room(len(prompt), sample_count, size, blocks) < 1:
            sample_count = 1
        room = pool_room(len(prompt), sample_count, size, blocks)
        job = Job(
            name=f"<{number}>",
            at=at,
            prompt=prompt,
            max_tokens=rng.randrange(min(longest_answer, limits.max_length - len(prompt), room))
            + 1,
            sample_count=sample_count,
            priority=rng.choice([0, 0, 0, 0, 1, -1]),
            tenant=rng.choice(["", "", "", "other"]),
            scored=rng.random() < 0.05,
            **_endings(rng, troubled, sample_count),
        )
        jobs.append(job)
    return jobs


def _prompt(rng: random.Random, begun: list[int], jobs: list[Job], longest: int) -> list[int]:
    kind = rng.random()
    if jobs and kind < 0.15:
        return rng.choice(jobs).prompt
    if jobs and kind < 0.3:
        former = rng.choice(jobs)
        turn = former.prompt + drawn(former.prompt, former.max_tokens, 0)
        return [*turn[: longest - 1], rng.randrange(VOCABULARY)]
    head = begun[: rng.randrange(longest)]
    tail = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 12))]
    return (head + tail)[:longest]


def _endings(rng: random.Random, troubled: bool, sample_count: int) -> dict[str, Any]:
    """How samples end before their limit: stops in most runs, hang-ups and faults in some."""
    fields: dict[str, Any] = {}
    kind = rng.random()
    if kind < 0.2:
        fields["stop_ids"] = tuple(rng.sample(range(VOCABULARY), 40))
    elif kind < 0.4:
        fields["stop_texts"] = tuple(rng.sample(range(VOCABULARY), 16))
    if troubled and rng.random() < 0.15:
        fields["cancel_after"] = rng.choice([0, 0, 1, rng.randrange(12)])
    if troubled and rng.random() < 0.15:
        fields["fault"] = Fault(rng.randrange(sample_count), rng.randrange(12))
    return fields


def _searches(rng: random.Random, limits: SchedulerLimits, others: list[Job]) -> list[Job]:
    """Beam searches that come among the other requests, and what goes on from their answers."""
    longest_answer = rng.choice([4, 12, 24])
    widest = min(4, limits.slot_count)
    troubled = rng.random() < 0.5
    jobs: list[Job] = []
    for number in range(rng.randrange(1, 6)):
        width = rng.randrange(1, widest + 1)
        prompt = _search_prompt(rng, limits, others)
        room = pool_room(len(prompt), width, limits.block_size, limits.block_count)
        if room < 1:
            width, room = 1, pool_room(len(prompt), 1, limits.block_size, limits.block_count)
        most = min(longest_answer, limits.max_length - len(prompt), room)
        fault = cancel_after = None
        if troubled and rng.random() < 0.15:
            fault = Fault(rng.randrange(width), rng.randrange(most))
        elif troubled and rng.random() < 0.15:
            cancel_after = rng.randrange(8)
        search = Job(
            name=f"<search {number}>",
            at=rng.choice(others).at + rng.choice([0.0, 0.0, 0.005, 0.02]),
            prompt=prompt,
            max_tokens=rng.randrange(most) + 1,
            sample_count=rng.randrange(width) + 1,
            priority=rng.choice([0, 0, 0, 0, 1, -1]),
            stop_ids=tuple(rng.sample(range(VOCABULARY), rng.choice([0, 1, 40, 150]))),
            tenant=rng.choice(["", "", "", "other"]),
            cancel_after=cancel_after,
            fault=fault,
            beams=BeamFields(
                width,
                length_penalty=rng.choice([0.0, 0.5, 1.0, 1.5, -1.0]),
                early_stopping=rng.choice(["heuristic", "first", "never"]),
                stream_best=rng.random() < 0.3,
            ),
        )
        jobs.append(search)
        if rng.random() < 0.4:
            jobs.append(_turn_after(rng, limits, search))
    return jobs


def _search_prompt(rng: random.Random, limits: SchedulerLimits, others: list[Job]) -> list[int]:
    """That of another request, or one that begins like it."""
    prompt = rng.choice(others).prompt
    if rng.random() < 0.3:
        return prompt
    head = prompt[: rng.randrange(len(prompt) + 1)]
    tail = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 6))]
    return (head + tail)[: max(2, limits.block_count * limits.block_size // 2)]


def _turn_after(rng: random.Random, limits: SchedulerLimits, search: Job) -> Job:
    """A request that goes on from a hypothesis, whose blocks may still be cached."""
    turn = search.prompt + search.answer(0)[0]
    longest = min(48, limits.block_count * limits.block_size // 2)
    prompt = [*turn[: longest - 1], rng.randrange(VOCABULARY)]
    return Job(
        name=f"<turn after {search.name.strip('<>')}>",
        at=search.at + rng.choice([0.01, 0.05]),
        prompt=prompt,
        max_tokens=rng.randrange(1, 9),
        tenant=search.tenant,
    )
