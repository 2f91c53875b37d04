"""Drives the real scheduler through a workload without a model.

The engine is stood in for by results made here: random token ids, and the stop id when a sequence
has its output. The scheduler does not know lengths ahead: each request may grow to the model's
length. Two steps are in flight, as in service. Prompts are random, so that no two share a block.

Which beams survive a step of beam search is decided by the real search, out of made-up candidates.
A beam's next tokens have log-probabilities as Zipf's law has them: the token of rank r has a
probability in proportion to r ^ -s. The exponent says how sure a model is. One is drawn for each
request and step, evenly between 1 and 4, so that the likeliest token has a probability between
0.09 and 0.92; each beam's own differs from it by up to `BEAM_SPREAD`, since the beams of a request
are much alike, and so is what follows them. Beams end at their output's length, since candidates
hold no stop id.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from benchmarks.lengths import Job
from control_plane.beams import BeamFields
from control_plane.hashing import PrefixHasher
from control_plane.plan import Logprob, Plan, StepResult
from control_plane.request import Request
from control_plane.scheduler import Scheduler, SchedulerLimits

BLOCK_SIZE = 16
STEP_TOKENS = 2048
# More than ever run together, so that memory is what limits.
SLOTS = 1024
VOCABULARY = 32_000
STOP = 2
_FIRST_WORD = 10
_EXPONENTS = np.linspace(1, 4, 61)
BEAM_SPREAD = 0.25


def limits_for(pool_tokens: int, max_length: int) -> SchedulerLimits:
    """A scheduler's limits with a pool of so many tokens and no host memory to swap to."""
    return SchedulerLimits(
        model_fingerprint="replay",
        block_size=BLOCK_SIZE,
        block_count=pool_tokens // BLOCK_SIZE,
        slot_count=SLOTS,
        max_length=max_length,
        step_tokens=STEP_TOKENS,
        chunk_tokens=STEP_TOKENS,
        waiting_requests=1 << 30,
        waiting_tokens=1 << 40,
    )


@cache
def zipf_logprobs(count: int) -> npt.NDArray[np.float64]:
    """Log-probabilities of the `count` likeliest tokens, [exponents, count]."""
    ranks = np.arange(1, VOCABULARY + 1, dtype=np.float64)
    weights = ranks[None, :] ** -_EXPONENTS[:, None]
    shares: npt.NDArray[np.float64] = weights[:, :count] / weights.sum(axis=1, keepdims=True)
    return np.log(shares)


class Replay:
    """A scheduler, the requests that are still to come, and the results it waits for.

    Attributes:
        samples: sequences of each request, drawn independently or, if `beams`, searched.
        final: by slot, the tokens whose keys and values its occupant will have written in the end.
    """

    def __init__(
        self, limits: SchedulerLimits, jobs: Sequence[Job], samples: int = 1, beams: bool = False
    ) -> None:
        self.scheduler = Scheduler(limits)
        self.samples, self.beams = samples, beams
        self.final = np.zeros(limits.slot_count, np.int64)
        self._jobs = deque(enumerate(jobs))
        self._finals: dict[str, int] = {}
        self._hasher = PrefixHasher(limits.model_fingerprint, limits.block_size)
        self._rng = np.random.default_rng(0)

    def run(self, steps: int) -> Iterator[Plan | None]:
        """Yields each step's plan when it has been made, None where there is nothing to do."""
        for step in range(steps):
            while self._jobs and self._jobs[0][1].arrival <= step:
                self._submit(*self._jobs.popleft())
            plan = self.scheduler.schedule()
            if plan is not None:
                self._note_ends(plan)
            yield plan
            if self.scheduler.steps_in_flight > (1 if plan is not None else 0):
                self._answer()

    def _submit(self, index: int, job: Job) -> None:
        prompt = self._rng.integers(_FIRST_WORD, VOCABULARY, job.prompt).astype(np.int32)
        self.scheduler.submit(self._request(f"r{index}", prompt, job))
        self._finals[f"r{index}"] = job.final

    def _request(self, name: str, prompt: npt.NDArray[np.int32], job: Job) -> Request:
        hashes = tuple(self._hasher.extend([], prompt))
        if self.beams:
            beams = BeamFields(self.samples)
            return Request(name, prompt, max_tokens=job.output, hashes=hashes, beams=beams)
        return Request(
            name,
            prompt,
            max_tokens=self.scheduler.limits.max_length - len(prompt),
            sample_count=self.samples,
            stop_ids=(STOP,),
            hashes=hashes,
        )

    def _note_ends(self, plan: Plan) -> None:
        for admission in plan.admissions:
            request = admission.sequence.group.request
            self.final[admission.slot] = self._finals[request.request_id]
        self.final[plan.fork_children] = self.final[plan.fork_parents]

    def _answer(self) -> None:
        """Applies the result of the oldest step in flight."""
        flight = self.scheduler._in_flight[0]
        tokens = self._rng.integers(_FIRST_WORD, VOCABULARY, len(flight.slots)).astype(np.int32)
        logprobs = {}
        if self.beams:
            logprobs = self._candidates(flight.slots.tolist())
        else:
            tokens[self.scheduler.slots.known[flight.slots] >= self.final[flight.slots]] = STOP
        self.scheduler.apply(StepResult(flight.step, tokens, logprobs))

    def _candidates(self, slots: list[int]) -> dict[int, Logprob]:
        """What beams could go on with, by slot."""
        table = zipf_logprobs(2 * self.samples)
        spread = round(BEAM_SPREAD / (_EXPONENTS[1] - _EXPONENTS[0]))
        common: dict[int, int] = {}
        found = {}
        for slot in slots:
            owner = self.scheduler.slots.owner[slot]
            # A slot that was vacated meanwhile has no owner, and nobody reads its candidates.
            sure = common.setdefault(id(owner and owner.group), int(self._rng.integers(len(table))))
            own = sure + int(self._rng.integers(-spread, spread + 1))
            logprobs = table[min(max(own, 0), len(table) - 1)].tolist()
            first = int(self._rng.integers(_FIRST_WORD, VOCABULARY - len(logprobs)))
            found[slot] = Logprob(first, logprobs[0], 1, tuple(enumerate(logprobs, first)))
        return found
