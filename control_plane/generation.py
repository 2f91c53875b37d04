"""One running request as its clients see it: tokens, text and endings of each sample.

The scheduler's side pushes, any number of subscribers read at their own pace. Nothing here waits
for a client: a slow one finds several tokens at once when it comes back.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from control_plane.beams import Hypothesis
from control_plane.metrics.counters import Counters
from control_plane.plan import Logprob
from control_plane.prefix_index import EngineLife
from control_plane.request import FinishReason, Request, SequenceGroup
from control_plane.text import SampleText
from control_plane.tokenizer import PromptTokenizer

# Bounds of one message: a resumed client may have a long answer to catch up on.
MAX_DELTA_TOKENS = 4096
MAX_DELTA_LOGPROBS = 256

# A tenant, and one of its request ids.
Key: TypeAlias = tuple[str, str]


class Detached(Exception):
    """A generation does not go on at this replica; another one may have it."""


class WaitedTooLong(Exception):
    """No engine took a request within the time that it may wait."""


def waiting_sentence(waited: float, limit: float) -> str:
    """Says so."""
    return f"waited {waited:g} s for an engine; at most {limit:g} s are allowed"


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sample ended. `stop_string` or `stop_token_id` say what stopped it."""

    reason: FinishReason
    stop_string: str = ""
    stop_token_id: int | None = None
    message: str = ""


@dataclass(slots=True)
class Sample:
    """Everything one sample has generated."""

    text: SampleText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    ending: Ending | None = None
    # Of a beam search's hypothesis.
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one sample; `ending` is set on its last."""

    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprob]
    prompt_logprobs: list[Logprob]
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class BestSoFar:
    """What a beam search would answer if it ended now; replaces what was told before."""

    text: str
    token_ids: list[int]
    score: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """How much of a prompt an engine was expected to hold when it was chosen.

    Attributes:
        hinted_tokens: by the prefix index.
        expected_tokens: by the index or the engine's own pool, whichever knew of more.
    """

    life: EngineLife
    hinted_tokens: int
    expected_tokens: int


class Generation:
    """A request from its arrival to the last token of its last sample.

    Args:
        digest: of the client's request; a second call with the same id must have the same.
        kind: of engine that it was made for; only others of the same can go on with it.

    Attributes:
        group: its sequences; replaced when the request moves to another scheduler.
        best: what a search that is to tell has found so far; None once it has ended.
        model: whose request it is.
        forecast: None where nobody has made one.
        counted: somebody sent it; else it is the control plane's own.
        arrived_at, admitted_at, first_token_at, ended_at: seconds, monotonic; None: not yet, or not
            at this replica.
    """

    def __init__(
        self,
        request: Request,
        digest: bytes,
        tokenizer: PromptTokenizer | None,
        stop_strings: tuple[str, ...],
        kind: Hashable,
    ) -> None:
        self.request, self.digest, self.kind = request, digest, kind
        self.tokenizer = tokenizer
        self.samples = [
            Sample(SampleText(tokenizer, stop_strings)) for _ in range(request.sample_count)
        ]
        self.prompt_logprobs: list[Logprob] = []
        self.group: SequenceGroup | None = None
        self.engine_id = self.model = ""
        self.forecast: Forecast | None = None
        self.arrived_at: float | None = None
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.cached_tokens = 0
        self.accepted = False
        self.counted = True
        self.engine_deaths = 0
        self.detached = False
        self.best: Hypothesis | None = None
        self._waiting_since, self._waiting_limit = 0.0, math.inf
        self._subscribers: set[asyncio.Event] = set()

    @property
    def finished(self) -> bool:
        return all(sample.ending is not None for sample in self.samples)

    @property
    def weight(self) -> int:
        """Tokens and log-probabilities that it holds."""
        tops = max(self.request.sampling.logprob_count, self.request.sampling.prompt_logprob_count)
        scored = len(self.prompt_logprobs) + sum(len(each.logprobs) for each in self.samples)
        return scored * (tops + 1) + sum(len(sample.token_ids) for sample in self.samples)

    @property
    def subscriber_count(self) -> int:
        return len(self._subscribers)

    def limit_waiting(self, seconds: float) -> None:
        """Begins the time within which an engine has to take it, whichever engine that will be."""
        self._waiting_since, self._waiting_limit = asyncio.get_running_loop().time(), seconds

    # What the engine's side says.

    def accept(self, engine_id: str, cached_tokens: int) -> None:
        if not self.accepted:
            self.accepted, self.cached_tokens = True, cached_tokens
        self.engine_id = engine_id
        self._wake()

    def push(self, index: int, token_id: int, logprob: Logprob | None = None) -> bool:
        """Adds a token to a sample; returns whether a stop string ended it."""
        sample = self.samples[index]
        if sample.ending is not None:
            return False
        sample.token_ids.append(token_id)
        if logprob is not None:
            sample.logprobs.append(logprob)
        match = sample.text.push(token_id)
        if match is not None:
            sample.ending = Ending(FinishReason.STOP, stop_string=match.stop_string)
        self._wake()
        return match is not None

    def end(self, index: int, reason: FinishReason, message: str = "") -> None:
        """Ends a sample whose tokens are all pushed; a sample ends once."""
        sample = self.samples[index]
        if sample.ending is not None:
            return
        match = sample.text.finish()
        if match is not None:
            sample.ending = Ending(FinishReason.STOP, stop_string=match.stop_string)
        elif reason is FinishReason.STOP:
            sample.ending = Ending(reason, stop_token_id=sample.token_ids[-1])
        else:
            sample.ending = Ending(reason, message=message)
        self.best = None
        self._wake()

    def show_best(self, best: Hypothesis) -> None:
        """Lets readers know what a beam search has found so far; a slow one gets the latest."""
        if best is not self.best:
            self.best = best
            self._wake()

    def end_beams(self, hypotheses: list[Hypothesis]) -> None:
        """Ends every sample with a hypothesis of a beam search, best first."""
        for index, hypothesis in enumerate(hypotheses):
            self.samples[index].score = hypothesis.score
            for token in hypothesis.tokens.tolist():
                self.push(index, token)
            stopped = hypothesis.stopped
            self.end(index, FinishReason.STOP if stopped else FinishReason.LENGTH)

    def end_all(self, reason: FinishReason, message: str = "") -> None:
        for index in range(len(self.samples)):
            self.end(index, reason, message)

    def fail(self, message: str) -> None:
        """Ends what has not ended, touching nothing that may have failed."""
        for sample in self.samples:
            sample.ending = sample.ending or Ending(FinishReason.ERROR, message=message)
        self.best = None
        self._wake()

    def detach(self) -> None:
        """Lets its readers know that it does not go on here."""
        self.detached = True
        self._wake()

    def _wake(self) -> None:
        for event in self._subscribers:
            event.set()

    # What clients read.

    async def deltas(self, received: list[int]) -> AsyncGenerator[Delta | BestSoFar | None]:
        """Yields what is new, from `received[i]` tokens of sample i on, until all have ended.

        Yields None once, when the request is accepted.

        Raises:
            Detached: it does not go on at this replica.
            WaitedTooLong: it was not accepted in time; its readers leave it, so it is unwanted.
        """
        event = asyncio.Event()
        self._subscribers.add(event)
        readers = [_Reader(self, i, received[i]) for i in range(len(self.samples))]
        best = _BestReader(self)
        try:
            await self._admission(event)
            yield None
            while any(not reader.done for reader in readers):
                if (found := best.advance()) is not None:
                    yield found
                for reader in readers:
                    for delta in reader.advance():
                        yield delta
                if all(reader.done for reader in readers):
                    return
                await self._news(event)
        finally:
            self._subscribers.discard(event)

    async def _admission(self, event: asyncio.Event) -> None:
        """Waits until an engine takes it, or it has ended.

        Each reader keeps the time itself, so that it passes whatever becomes of engine and leader.
        """
        limit = self._waiting_limit
        until = self._waiting_since + limit if limit < math.inf else None
        try:
            async with asyncio.timeout_at(until):
                while not (self.accepted or self.finished):
                    await self._news(event)
        except TimeoutError:
            if not (self.accepted or self.finished):
                waited = round(asyncio.get_running_loop().time() - self._waiting_since, 2)
                raise WaitedTooLong(waiting_sentence(waited, limit)) from None

    async def _news(self, event: asyncio.Event) -> None:
        if not self.detached:
            await event.wait()
            event.clear()
        if self.detached and not self.finished:
            raise Detached("its engine is gone or led by another replica")


class _Reader:
    """One subscriber's place in one sample."""

    def __init__(self, generation: Generation, index: int, received: int) -> None:
        self._generation, self._index = generation, index
        self._sample = generation.samples[index]
        self._tokens = received
        self._prompt_logprobs = 0
        # Characters shown so far; known once there are as many tokens as were received.
        self._shown: int | None = None
        self.done = False

    def advance(self) -> Iterator[Delta]:
        sample = self._sample
        while not self.done:
            limit = MAX_DELTA_LOGPROBS if sample.logprobs else MAX_DELTA_TOKENS
            end = min(len(sample.token_ids), self._tokens + limit)
            prompt = self._next_prompt_logprobs()
            fresh = max(end - self._tokens, 0)
            last = sample.ending is not None and end >= len(sample.token_ids)
            if not (fresh or prompt or last):
                return
            yield self._delta(
                end if fresh else self._tokens, prompt, sample.ending if last else None
            )
            self._tokens = max(end, self._tokens)
            self.done = last

    def _delta(self, end: int, prompt: list[Logprob], ending: Ending | None) -> Delta:
        sample, start, text = self._sample, self._tokens, ""
        if start <= len(sample.token_ids):
            shown = sample.text.visible_end(start) if self._shown is None else self._shown
            self._shown = sample.text.visible_end(end)
            text = sample.text.between(shown, self._shown)
        return Delta(
            self._index,
            text,
            sample.token_ids[start:end],
            sample.logprobs[start:end],
            prompt,
            ending,
        )

    def _next_prompt_logprobs(self) -> list[Logprob]:
        if self._index != 0:
            return []
        start = self._prompt_logprobs
        batch = self._generation.prompt_logprobs[start : start + MAX_DELTA_LOGPROBS]
        self._prompt_logprobs += len(batch)
        return batch


class _BestReader:
    """What one subscriber has been shown of a search's best.

    Text is made here, when the subscriber takes it, and goes on from the one before if the tokens
    do, as they mostly do.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._shown: Hypothesis | None = None
        self._tokens: list[int] = []
        self._text: SampleText | None = None

    def advance(self) -> BestSoFar | None:
        """The best so far, unless it has been shown."""
        best, former = self._generation.best, self._shown
        if best is None or best is former:
            return None
        tokens, known = best.tokens.tolist(), len(self._tokens)
        text = self._text
        if text is None or (former and former.stopped) or tokens[:known] != self._tokens:
            text, known = SampleText(self._generation.tokenizer, ()), 0
        for token in tokens[known:]:
            text.push(token)
        if best.stopped:
            text.finish()
        self._shown, self._tokens, self._text = best, tokens, text
        return BestSoFar(text.text, tokens, best.score)


class Generations:
    """All generations of this replica, by tenant and request id: `Request.key`.

    A finished one is kept for a while, so that a client whose stream broke at the very end still
    gets the rest: at most `keep` of them, with `keep_tokens` tokens in all, where a token with
    log-probabilities counts for as many as it carries.

    Attributes:
        counters: what they have come to.
    """

    def __init__(
        self, keep: int = 512, keep_tokens: int = 1 << 20, counters: Counters | None = None
    ) -> None:
        self.counters = counters or Counters()
        self._running: dict[Key, Generation] = {}
        self._finished: dict[Key, Generation] = {}
        self._cancelled: dict[Key, None] = {}
        self._keep, self._keep_tokens = keep, keep_tokens
        self._kept_tokens = 0

    def get(self, key: Key) -> Generation | None:
        return self._running.get(key) or self._finished.get(key)

    def running(self, key: Key) -> Generation | None:
        return self._running.get(key)

    def was_cancelled(self, key: Key) -> bool:
        """Whether the last generation with this key was cancelled, as far back as is remembered."""
        return key in self._cancelled

    def add(self, generation: Generation) -> None:
        key = generation.request.key
        self._cancelled.pop(key, None)
        self._forget(key)
        self._running[key] = generation

    def finish(self, generation: Generation) -> None:
        """Moves a generation out of the running ones, to be found for a while longer."""
        key = generation.request.key
        if self._running.get(key) is generation:
            del self._running[key]
            self._count_end(generation)
            self._finished[key] = generation
            self._kept_tokens += generation.weight
            while len(self._finished) > self._keep or self._kept_tokens > self._keep_tokens:
                self._forget(next(iter(self._finished)))

    def cancel(self, generation: Generation) -> None:
        """Forgets a generation that nobody waits for, but remembers that it is not wanted."""
        key = generation.request.key
        if self._running.get(key) is generation:
            del self._running[key]
            self._count_end(generation)
            self._cancelled[key] = None
            while len(self._cancelled) > 8 * self._keep:
                del self._cancelled[next(iter(self._cancelled))]

    def _count_end(self, generation: Generation) -> None:
        if generation.counted:
            self.counters.ended(generation, time.monotonic())

    def detach(self, generation: Generation) -> None:
        """Forgets a generation that goes on elsewhere."""
        key = generation.request.key
        if self._running.get(key) is generation:
            del self._running[key]

    def _forget(self, key: Key) -> None:
        generation = self._finished.pop(key, None)
        if generation is not None:
            self._kept_tokens -= generation.weight

    def all_running(self) -> list[Generation]:
        return list(self._running.values())
