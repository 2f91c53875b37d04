"""Gathers what may say why a prompt missed: engines, other tenants, and other models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial

from control_plane.blocks import Int32Array
from control_plane.engine_link import EngineFacts
from control_plane.hashing import PrefixHasher
from control_plane.leader import EngineLeader
from control_plane.prefix_index import EngineLife, PrefixIndex
from control_plane.prefixes.explain import Chain, HeldNow, Holder, Question, Span, explain
from control_plane.prefixes.lookups import Lookup
from control_plane.prefixes.registered import RegisteredPrefixes
from control_plane.records import SharedPrefix
from control_plane.router import Router

# Between two tenants, for the event loop's thread.
_PAUSE_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a prompt found, or would find.

    Attributes:
        facts: of the engine where it ran, or would.
        cached, predicted: tokens that it found there, and that the index foretold.
        age: seconds since then.
    """

    facts: EngineFacts
    tenant: str
    prompt_tokens: int
    shared: SharedPrefix
    cached: int
    predicted: int
    spans: list[Span]
    asked_at: float
    age: float = 0.0


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: Int32Array
    tenant: str
    shared: SharedPrefix
    facts: EngineFacts


class Explainer:
    """Answers for one replica."""

    def __init__(self, router: Router, index: PrefixIndex, registered: RegisteredPrefixes) -> None:
        self._router, self._index, self._registered = router, index, registered

    async def prompt(self, ids: Int32Array, tenant: str, facts: EngineFacts) -> Explanation:
        """What a prompt would find now, on that engine of one kind that holds most of it.

        Args:
            ids: int32 [n].
            facts: of any engine of that kind.
        """
        shared = self._registered.match(ids, facts)
        asked = _Prompt(ids, tenant, shared, facts)
        hashes = await asyncio.to_thread(_hashes, asked)
        elsewhere = await self._held_elsewhere(facts, hashes)
        engines = self._engines(facts) | {
            life.engine_id: HeldNow(set(hashes[:count])) for life, count in elsewhere.items()
        }
        now = time.monotonic()
        best, found = facts, -1
        for leader in self._of_kind(facts):
            if leader.facts is None:
                continue
            held = _leading(engines[leader.facts.engine_id], hashes, now)
            if held > found:
                best, found = leader.facts, held
        cached = max(found, 0) * facts.block_size
        spans = await self._spans(asked, hashes, cached, best.engine_id, engines, now, False)
        return Explanation(best, tenant, len(ids), shared, cached, cached, spans, now)

    async def request(self, lookup: Lookup, facts: EngineFacts) -> Explanation:
        """What a request found when an engine took it.

        Args:
            facts: of that engine.
        """
        request = lookup.request
        shared = SharedPrefix(request.prefix_name, request.shared_blocks)
        asked = _Prompt(request.prompt, request.salt, shared, facts)
        size = facts.block_size
        foretold = {
            life.engine_id: HeldNow(set(request.hashes[:count]))
            for life, count in lookup.predicted.items()
        }
        engines = foretold | self._engines(facts)
        life = EngineLife(facts.engine_id, facts.incarnation)
        computes_all = request.sampling.prompt_logprob_count >= 0
        spans = await self._spans(
            asked, request.hashes, lookup.cached, facts.engine_id, engines, lookup.at, computes_all
        )
        return Explanation(
            facts,
            request.salt,
            len(request.prompt),
            shared,
            lookup.cached,
            lookup.predicted.get(life, 0) * size,
            spans,
            lookup.at,
            time.monotonic() - lookup.at,
        )

    async def _spans(
        self,
        asked: _Prompt,
        hashes: tuple[bytes, ...],
        cached: int,
        engine_id: str,
        engines: Mapping[str, Holder],
        at: float,
        computes_all: bool,
    ) -> list[Span]:
        others = await self._other_models(asked)
        holders = list(engines.values())
        # Hashing a long prompt for every tenant takes its time: once, and only if it is asked for.
        tenants = cache(partial(self._other_tenants, asked, holders))

        def work() -> list[Span]:
            return explain(
                Question(
                    len(asked.ids),
                    asked.facts.block_size,
                    hashes,
                    cached,
                    engine_id,
                    engines,
                    at,
                    computes_all,
                    tenants,
                    lambda: others,
                )
            )

        return await asyncio.to_thread(work)

    def _other_tenants(self, asked: _Prompt, holders: list[Holder]) -> list[Chain]:
        tenants = dict.fromkeys(["", *self._router.lookups.tenants])
        chains = []
        for tenant in tenants:
            if tenant != asked.tenant:
                hashes = _hashes(_Prompt(asked.ids, tenant, asked.shared, asked.facts))
                chains.append(Chain(hashes, holders, asked.facts.block_size, tenant=tenant))
                time.sleep(_PAUSE_SECONDS)
        return chains

    async def _other_models(self, asked: _Prompt) -> list[Chain]:
        """Engines for which the same tokens mean the same text, but other keys and values."""
        kinds = {
            leader.facts.kind: leader.facts
            for leader in self._router.leaders
            if leader.facts is not None
            and leader.facts.tokenizer_digest == asked.facts.tokenizer_digest
            and leader.facts.kind != asked.facts.kind
        }
        chains = []
        for facts in kinds.values():
            shared = self._registered.match(asked.ids, facts)
            prompt = _Prompt(asked.ids, asked.tenant, shared, facts)
            hashes = await asyncio.to_thread(_hashes, prompt)
            elsewhere = await self._held_elsewhere(facts, hashes)
            holders = [*self._engines(facts).values()]
            holders += [HeldNow(set(hashes[:count])) for count in elsewhere.values()]
            chains.append(Chain(hashes, holders, facts.block_size, model=facts.model))
        return chains

    def _engines(self, facts: EngineFacts) -> dict[str, Holder]:
        """The engines of one kind that this replica leads, by id."""
        return {
            leader.loop.facts.engine_id: leader.cache_log.history
            for leader in self._of_kind(facts)
            if leader.loop is not None
        }

    def _of_kind(self, facts: EngineFacts) -> list[EngineLeader]:
        return [
            leader
            for leader in self._router.leaders
            if leader.facts is not None and leader.facts.kind == facts.kind
        ]

    async def _held_elsewhere(
        self, facts: EngineFacts, hashes: tuple[bytes, ...]
    ) -> dict[EngineLife, int]:
        """Leading blocks that engines hold which another replica leads, as the index has it."""
        lives = [
            EngineLife(leader.facts.engine_id, leader.facts.incarnation)
            for leader in self._of_kind(facts)
            if leader.loop is None and leader.facts is not None
        ]
        if not lives:
            return {}
        found = await self._index.lookup(facts.fingerprint, lives, b"".join(hashes))
        return dict.fromkeys(lives, 0) | found


def _hashes(prompt: _Prompt) -> tuple[bytes, ...]:
    facts = prompt.facts
    hasher = PrefixHasher(facts.fingerprint, facts.block_size, prompt.tenant)
    return tuple(hasher.extend([], prompt.ids, prompt.shared.block_count))


def _leading(holder: Holder, hashes: tuple[bytes, ...], at: float) -> int:
    missing = (index for index, each in enumerate(hashes) if not holder.held_at(each, at))
    return next(missing, len(hashes))
