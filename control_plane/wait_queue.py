"""The wait queue of one engine: who may be admitted next, and who may pass whom. Pure.

Groups are admitted by priority, then first come, first served. One that does not fit yet keeps its
turn, but later ones that do fit may pass it: as long as their prompts are no longer, all together,
than its own. So a long prompt that waits for room neither stops the short ones behind it at once,
nor is kept waiting by them for ever; docs/scheduling.md has the bound. A group that was preempted,
or of which a part runs, is not passed by anyone.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from control_plane.request import Request, Sequence, SequenceGroup

# Groups that wait for room and are passed by in one plan, at most: each is looked up in the cache.
MOST_PASSED = 8


class QueueFull(Exception):
    """The wait queue is at its limit; nothing was queued.

    Attributes:
        excess_tokens: prompt tokens that must leave the queue before the request fits.
    """

    def __init__(self, message: str, excess_tokens: int) -> None:
        super().__init__(message)
        self.excess_tokens = excess_tokens


@dataclass(frozen=True, slots=True)
class Refusal:
    """Too little room for a sequence.

    Attributes:
        room: what there was of everything that it depends on, more being better.
        fresh: blocks that it has to compute.
        missing: the first prefix hash that was not in the cache; None where all were.
    """

    room: tuple[int, ...]
    fresh: int
    missing: bytes | None


@dataclass(slots=True)
class _Place:
    """A group's place in the queue.

    Attributes:
        tokens: of its waiting sequences.
        patience: tokens by which it may still be passed.
        refusal: why it found too little room, when it was last asked.
    """

    tokens: int
    patience: int
    refusal: Refusal | None = None


class WaitQueue:
    """Groups with sequences that want a slot.

    Attributes:
        tokens: of all that wait.
    """

    def __init__(self, most_requests: int, most_tokens: int) -> None:
        self.tokens = 0
        self._most_requests, self._most_tokens = most_requests, most_tokens
        self._groups: list[SequenceGroup] = []
        self._places: dict[SequenceGroup, _Place] = {}
        # Whom the next admission passes.
        self._passed: list[_Place] = []

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[SequenceGroup]:
        return iter(self._groups)

    @property
    def head(self) -> SequenceGroup | None:
        return self._groups[0] if self._groups else None

    @property
    def first_begun(self) -> SequenceGroup | None:
        """The first of those that have been admitted before."""
        return next((group for group in self._groups if group.admitted), None)

    def check(self, request: Request) -> None:
        """Raises QueueFull if a new request has no place.

        That is so when what waits has reached a limit; the last one may be of any length.
        """
        waiting, tokens = len(self._groups), self.tokens
        if waiting >= self._most_requests:
            share = tokens // max(waiting, 1)
            raise QueueFull(f"{waiting} requests wait already", share)
        # One that is longer than what is left has to find a place among short ones, too.
        if tokens >= self._most_tokens:
            excess = tokens + len(request.prompt) - self._most_tokens
            raise QueueFull(f"{tokens} prompt tokens wait already", excess)

    def push(self, group: SequenceGroup) -> None:
        """Queues a group, or queues it anew when other sequences of it wait than did."""
        self.discard(group)
        tokens = sum(len(sequence.tokens) for sequence in group.waiting)
        patience = 0 if group.admitted else len(group.waiting[0].tokens)
        self._places[group] = _Place(tokens, patience)
        self.tokens += tokens
        bisect.insort(self._groups, group, key=lambda waiting: waiting.order)

    def discard(self, group: SequenceGroup) -> None:
        """Takes a group out, if it is in."""
        place = self._places.pop(group, None)
        if place is not None:
            self.tokens -= place.tokens
            self._groups.remove(group)

    def take(self, group: SequenceGroup, sequence: Sequence) -> None:
        """Takes a sequence out, and its group if no other of its sequences waits."""
        group.waiting.remove(sequence)
        place = self._places[group]
        place.tokens -= len(sequence.tokens)
        place.patience, place.refusal = 0, None
        self.tokens -= len(sequence.tokens)
        if not group.waiting:
            self.discard(group)

    def in_turn(self, begun_only: bool = False) -> Iterator[SequenceGroup]:
        """Yields the groups that may be admitted, one after the other.

        Whoever is still in the queue when the next one is asked for has been passed by it.

        Args:
            begun_only: only those that have been admitted before; the others do not count.
        """
        self._passed = []
        for group in self._groups.copy():
            if begun_only and not group.admitted:
                continue
            place = self._places[group]
            patience = min((other.patience for other in self._passed), default=place.tokens)
            if not patience or len(self._passed) == MOST_PASSED:
                return
            if place.tokens <= patience:
                yield group
            if group in self._places:
                self._passed.append(place)

    def admit(self, group: SequenceGroup, sequence: Sequence) -> None:
        """Takes a sequence out that gets a slot, before those that it passes."""
        for place in self._passed:
            place.patience -= len(sequence.tokens)
        self.take(group, sequence)

    # What refused a group lately, so that it is not asked again before that has got better.

    def refuse(self, group: SequenceGroup, refusal: Refusal) -> None:
        self._places[group].refusal = refusal

    def is_hopeless(
        self, group: SequenceGroup, room: tuple[int, ...], holds: Callable[[bytes], bool]
    ) -> bool:
        """Whether a group was refused before and nothing has got better for it since.

        Spares long prompts that wait a lookup of all their hashes in every step.

        Args:
            room: as in `Refusal`, blocks first.
            holds: whether a prefix hash is in the cache.
        """
        refusal = self._places[group].refusal
        if refusal is None or (refusal.missing is not None and holds(refusal.missing)):
            return False
        no_better = all(now <= then for now, then in zip(room, refusal.room, strict=True))
        return no_better or room[0] < refusal.fresh
