"""Why a prompt found as much in the prefix cache as it did, and not more. Pure.

A lookup follows the chain of a prompt's block hashes on one engine until the first that is not
there. For every block after that there is one reason: the first of those below that holds.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class LookupOutcome(enum.Enum):
    """What became of some blocks of a prompt; names and order of ``quire.admin.v1``."""

    HIT = 1
    NEVER_SEEN = 2
    EVICTED = 3
    OTHER_ENGINE = 4
    OTHER_TENANT = 5
    OTHER_MODEL = 6
    AFTER_A_MISS = 7
    NOT_FULL = 8
    NOT_USED = 9
    RESTARTED = 10


class Holder(Protocol):
    """An engine's memory of its blocks."""

    def held_at(self, digest: bytes, at: float) -> bool:
        """Whether it held the block then."""

    def evicted_before(self, digest: bytes, at: float) -> float | None:
        """When it had given the block up, if it had by then."""

    def restarted_at(self, moment: float) -> bool:
        """Whether what went then did so because the engine was started anew."""


class HeldNow:
    """An engine of which only the present is known: another replica leads it."""

    def __init__(self, hashes: set[bytes]) -> None:
        self._hashes = hashes

    def held_at(self, digest: bytes, _at: float) -> bool:
        return digest in self._hashes

    def evicted_before(self, _digest: bytes, _at: float) -> float | None:
        return None

    def restarted_at(self, _moment: float) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Chain:
    """The same tokens under another salt or model.

    Attributes:
        hashes: of the prompt's full blocks, in that model's block size.
        holders: engines that may have held them.
    """

    hashes: Sequence[bytes]
    holders: Sequence[Holder]
    block_size: int
    tenant: str = ""
    model: str = ""

    def held(self, token: int, at: float) -> bool:
        """Whether some engine held the block in which a token of the prompt is."""
        block = token // self.block_size
        if block >= len(self.hashes):
            return False
        return any(holder.held_at(self.hashes[block], at) for holder in self.holders)


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt and everything that may say why it missed.

    Attributes:
        engine_id: where it ran, or would.
        engines: by id, those with the same model.
        hashes: of the prompt's full blocks.
        cached: tokens that it found.
        at: seconds of the holders' clock.
        computes_all: it asks for log-probabilities of its prompt, which the cache has not.
        tenants, models: the same tokens under others' salts, and for other models; they are asked
            for when nothing else explains a block.
    """

    prompt_tokens: int
    block_size: int
    hashes: Sequence[bytes]
    cached: int
    engine_id: str
    engines: Mapping[str, Holder]
    at: float
    computes_all: bool = False
    tenants: Callable[[], Sequence[Chain]] = tuple
    models: Callable[[], Sequence[Chain]] = tuple


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks that follow one another and had the same fate; see ``quire.admin.v1.BlockSpan``."""

    first_block: int
    block_count: int
    token_count: int
    outcome: LookupOutcome
    engine_ids: tuple[str, ...] = ()
    evicted_at: float | None = None
    tenant: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class _Fate:
    outcome: LookupOutcome
    engine_ids: tuple[str, ...] = ()
    evicted_at: float | None = None
    tenant: str = ""
    model: str = ""

    def goes_on(self, other: _Fate) -> bool:
        """Whether another block's fate is the same but for the moment of its eviction."""
        mine = self.outcome, self.engine_ids, self.tenant, self.model
        return mine == (other.outcome, other.engine_ids, other.tenant, other.model)


def explain(question: Question) -> list[Span]:
    """Returns the prompt as spans, in order and without gaps; the last may fill no block."""
    size, count = question.block_size, len(question.hashes)
    hit = min(question.cached // size, count)
    fates = [_Fate(LookupOutcome.HIT, _holders(question, index)) for index in range(hit)]
    fates += [_fate(question, index) for index in range(hit, count)]
    spans: list[Span] = []
    first = 0
    for index in range(1, count + 1):
        if index == count or not fates[first].goes_on(fates[index]):
            fate = fates[first]
            spans.append(
                Span(
                    first, index - first, (index - first) * size, fate.outcome, fate.engine_ids,
                    fate.evicted_at, fate.tenant, fate.model,
                )
            )  # fmt: skip
            first = index
    rest = question.prompt_tokens - count * size
    if rest:
        spans.append(Span(count, 1, rest, LookupOutcome.NOT_FULL))
    return spans


def _fate(question: Question, index: int) -> _Fate:
    """Why one block was not used, the strongest reason first."""
    digest, at = question.hashes[index], question.at
    token = index * question.block_size
    holders = _holders(question, index)
    if question.engine_id in holders:
        outcome = LookupOutcome.NOT_USED if question.computes_all else LookupOutcome.AFTER_A_MISS
        return _Fate(outcome, holders)
    if holders:
        return _Fate(LookupOutcome.OTHER_ENGINE, holders)
    gone = _latest_eviction(question, digest)
    if gone is not None:
        return gone
    for chain in question.tenants():
        if chain.held(token, at):
            return _Fate(LookupOutcome.OTHER_TENANT, tenant=chain.tenant)
    for chain in question.models():
        if chain.held(token, at):
            return _Fate(LookupOutcome.OTHER_MODEL, model=chain.model)
    return _Fate(LookupOutcome.NEVER_SEEN)


def _latest_eviction(question: Question, digest: bytes) -> _Fate | None:
    """What became of a block that was held once: on its own engine, else where it went last."""
    own, latest = question.engine_id, None
    for name, holder in question.engines.items():
        moment = holder.evicted_before(digest, question.at)
        if moment is None:
            continue
        restarted = holder.restarted_at(moment)
        outcome = LookupOutcome.RESTARTED if restarted else LookupOutcome.EVICTED
        fate = _Fate(outcome, (name,), evicted_at=moment)
        if name == own:
            return fate
        if latest is None or moment > (latest.evicted_at or 0):
            latest = fate
    return latest


def _holders(question: Question, index: int) -> tuple[str, ...]:
    digest, at = question.hashes[index], question.at
    return tuple(name for name, each in question.engines.items() if each.held_at(digest, at))
