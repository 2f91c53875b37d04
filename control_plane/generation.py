"""One running request as its clients see it: tokens, text and endings of each sample.

The scheduler's side pushes, any number of subscribers read at their own pace. Nothing here waits
for a client: a slow one finds several tokens at once when it comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Hashable, Iterator
from dataclasses import dataclass, field

from control_plane.plan import Logprob
from control_plane.request import FinishReason, Request, SequenceGroup
from control_plane.text import SampleText
from control_plane.tokenizer import PromptTokenizer

# Bounds of one message: a resumed client may have a long answer to catch up on.
MAX_DELTA_TOKENS = 4096
MAX_DELTA_LOGPROBS = 256


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


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one sample; `ending` is set on its last."""

    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprob]
    prompt_logprobs: list[Logprob]
    ending: Ending | None = None


class Generation:
    """A request from its arrival to the last token of its last sample.

    Args:
        digest: of the client's request; a second call with the same id must have the same.
        kind: of engine that it was made for; only others of the same can go on with it.

    Attributes:
        group: its sequences; replaced when the request moves to another scheduler.
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
        self.samples = [
            Sample(SampleText(tokenizer, stop_strings)) for _ in range(request.sample_count)
        ]
        self.prompt_logprobs: list[Logprob] = []
        self.group: SequenceGroup | None = None
        self.engine_id = ""
        self.cached_tokens = 0
        self.accepted = False
        self.engine_deaths = 0
        self._subscribers: set[asyncio.Event] = set()

    @property
    def finished(self) -> bool:
        return all(sample.ending is not None for sample in self.samples)

    @property
    def subscriber_count(self) -> int:
        return len(self._subscribers)

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
        self._wake()

    def end_all(self, reason: FinishReason, message: str = "") -> None:
        for index in range(len(self.samples)):
            self.end(index, reason, message)

    def _wake(self) -> None:
        for event in self._subscribers:
            event.set()

    # What clients read.

    async def deltas(self, received: list[int]) -> AsyncGenerator[Delta | None]:
        """Yields what is new, from `received[i]` tokens of sample i on, until all have ended.

        Yields None once, when the request is accepted.
        """
        event = asyncio.Event()
        self._subscribers.add(event)
        readers = [_Reader(self, i, received[i]) for i in range(len(self.samples))]
        try:
            while not (self.accepted or self.finished):
                await event.wait()
                event.clear()
            yield None
            while any(not reader.done for reader in readers):
                for reader in readers:
                    for delta in reader.advance():
                        yield delta
                if all(reader.done for reader in readers):
                    return
                await event.wait()
                event.clear()
        finally:
            self._subscribers.discard(event)


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


class Generations:
    """All generations of this replica, by request id.

    A finished one is kept for a while, so that a client whose stream broke at the very end still
    gets the rest; at most `keep` of them.
    """

    def __init__(self, keep: int = 512) -> None:
        self._running: dict[str, Generation] = {}
        self._finished: dict[str, Generation] = {}
        self._keep = keep

    def get(self, request_id: str) -> Generation | None:
        return self._running.get(request_id) or self._finished.get(request_id)

    def running(self, request_id: str) -> Generation | None:
        return self._running.get(request_id)

    def add(self, generation: Generation) -> None:
        self._finished.pop(generation.request.request_id, None)
        self._running[generation.request.request_id] = generation

    def finish(self, generation: Generation) -> None:
        """Moves a generation out of the running ones, to be found for a while longer."""
        request_id = generation.request.request_id
        if self._running.get(request_id) is generation:
            del self._running[request_id]
            self._finished[request_id] = generation
            while len(self._finished) > self._keep:
                del self._finished[next(iter(self._finished))]

    def drop(self, generation: Generation) -> None:
        """Forgets a generation that nobody waits for."""
        request_id = generation.request.request_id
        for table in (self._running, self._finished):
            if table.get(request_id) is generation:
                del table[request_id]

    def all_running(self) -> list[Generation]:
        return list(self._running.values())
