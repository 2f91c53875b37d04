"""Keeps registered prefixes where operators want them: tokenised, warm, and pinned on every engine.

It compares what is wanted with what is, twice a second, and does what is missing. A prefix is
warmed by a request of one token, which waits behind all others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from control_plane import records
from control_plane.blocks import TooManyPins
from control_plane.engine_link import EngineFacts
from control_plane.generation import Generation, Generations
from control_plane.leader import EngineLeader
from control_plane.prefixes.registered import Definition, RegisteredPrefixes, tokenised
from control_plane.scheduler import NeverFits
from control_plane.step_loop import StepLoop
from control_plane.tokenizer import PromptTokenizer
from control_plane.wait_queue import QueueFull

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 0.5
# A pinned prefix that did not stay is computed again, but not all the time.
_WARM_AGAIN_SECONDS = 10.0


@dataclass(slots=True)
class _Care:
    """What was done for one definition under one leadership."""

    pinned: tuple[bytes, ...] = ()
    warmed_count: int = 0
    warming: Generation | None = None
    warm_again_at: float = 0.0
    problem: str = ""


@dataclass(slots=True)
class _Loop:
    """One leadership. What was to be warmed of `former` before it began is none of its business."""

    loop: StepLoop
    former: frozenset[str]
    care: dict[str, _Care] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a registered prefix stands with one engine.

    Attributes:
        shared_tokens: of its full blocks.
        held_tokens: of those that the engine holds, from the beginning.
        problem: why it is not what was wanted.
        known: the engine is led here; else `held_tokens` is 0 whatever it holds.
    """

    facts: EngineFacts
    shared_tokens: int
    held_tokens: int
    warming: bool
    problem: str
    known: bool


class PrefixKeeper:
    """For all engines that this replica leads."""

    def __init__(
        self,
        registered: RegisteredPrefixes,
        leaders: list[EngineLeader],
        generations: Generations,
    ) -> None:
        self._registered, self._leaders = registered, leaders
        self._generations = generations
        self._loops: dict[EngineLeader, _Loop] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.attend()
            await asyncio.sleep(_INTERVAL_SECONDS)

    async def attend(self) -> None:
        """Does now what is due."""
        try:
            await self.prepare()
            self.care()
        except Exception:
            log.exception("registered prefixes are not cared for")

    async def prepare(self) -> None:
        """Tokenises what is not yet, for every tokenizer there is; beside the event loop."""
        tokenizers: dict[str, PromptTokenizer] = {}
        for leader in self._leaders:
            if leader.facts is not None and leader.tokenizer is not None:
                tokenizers[leader.facts.tokenizer_digest] = leader.tokenizer
        for digest, tokenizer in tokenizers.items():
            missing = self._registered.unprepared(digest)
            if missing:
                made = await asyncio.to_thread(tokenised, missing, tokenizer)
                self._registered.prepare(digest, made)

    def care(self) -> None:
        """Does what is missing on the engines that are led now."""
        for leader in self._leaders:
            if leader.loop is None:
                self._loops.pop(leader, None)
                continue
            known = self._loops.get(leader)
            if known is None or known.loop is not leader.loop:
                former = frozenset(each.name for each in self._registered.definitions)
                known = self._loops[leader] = _Loop(leader.loop, former)
            self._care_on(known)

    def standing(self, definition: Definition) -> list[Standing]:
        """One for each engine whose model is known."""
        standings = []
        for leader in self._leaders:
            if leader.facts is None:
                continue
            tokens = self._registered.tokens(definition, leader.facts)
            hashes = self._registered.hashes(definition, leader.facts)
            known = self._loops.get(leader)
            care = known.care.get(definition.name) if known else None
            held = len(leader.loop.scheduler.pool.match(hashes)) if leader.loop else 0
            problem = (tokens.problem if tokens else "") or (care.problem if care else "")
            size = leader.facts.block_size
            standings.append(
                Standing(
                    leader.facts,
                    len(hashes) * size,
                    held * size,
                    care is not None and care.warming is not None,
                    problem,
                    leader.loop is not None,
                )
            )
        return standings

    def _care_on(self, known: _Loop) -> None:
        definitions = {each.name: each for each in self._registered.definitions}
        for name in [name for name in known.care if name not in definitions]:
            known.loop.scheduler.pool.unpin(known.care.pop(name).pinned)
            # What another definition pins, too, comes back below.
            for care in known.care.values():
                care.pinned = ()
        for name, definition in definitions.items():
            count = self._registered.warm_counts.get(name, 0) if name in known.former else 0
            care = known.care.setdefault(name, _Care(warmed_count=count))
            hashes = self._registered.hashes(definition, known.loop.facts)
            self._pin(known, care, hashes if definition.pinned else ())
            if not known.loop.draining:
                self._warm(known.loop, definition, care, hashes)

    def _pin(self, known: _Loop, care: _Care, wanted: tuple[bytes, ...]) -> None:
        if care.pinned == wanted:
            return
        pool = known.loop.scheduler.pool
        others = {digest for each in known.care.values() if each is not care
                  for digest in each.pinned}  # fmt: skip
        pool.unpin([digest for digest in care.pinned if digest not in others])
        care.pinned, care.problem = (), ""
        try:
            pool.pin(wanted)
            care.pinned = wanted
        except TooManyPins as error:
            care.problem = f"cannot be pinned: {error}"

    def _warm(
        self, loop: StepLoop, definition: Definition, care: _Care, hashes: tuple[bytes, ...]
    ) -> None:
        if care.warming is not None:
            if not care.warming.finished:
                return
            care.warming = None
        wanted = self._registered.warm_counts.get(definition.name, 0)
        if wanted < care.warmed_count:
            care.warmed_count = 0  # Redis was emptied, and counts from the beginning.
        asked, now = wanted > care.warmed_count, time.monotonic()
        if not (asked or (care.pinned and now >= care.warm_again_at)):
            return
        if len(loop.scheduler.pool.match(hashes)) == len(hashes):
            care.warmed_count = wanted
            return
        try:
            care.warming = self._submit(loop, definition)
            care.warmed_count, care.warm_again_at = wanted, now + _WARM_AGAIN_SECONDS
        except QueueFull:
            return  # It tries again.
        except NeverFits as error:
            care.problem, care.warmed_count = f"cannot be warmed: it {error}", wanted
            care.warm_again_at = now + _WARM_AGAIN_SECONDS

    def _submit(self, loop: StepLoop, definition: Definition) -> Generation:
        """Raises QueueFull, NeverFits."""
        tokens = self._registered.tokens(definition, loop.facts)
        ids = tokens.ids.tolist() if tokens else []
        request, digest = records.warming_request(definition.name, ids, loop.facts)
        generation = Generation(request, digest, loop.tokenizer, (), loop.facts.kind)
        generation.counted = False
        loop.submit(generation)
        self._generations.add(generation)
        log.info("warms %s on %s", definition.name, loop.facts.engine_id)
        return generation
