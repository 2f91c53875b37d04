"""Which blocks an engine has held, from when to when: why a lookup missed. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable


class BlockHistory:
    """The prefix hashes of one engine, those that it holds and the last ones that it gave up.

    Times are seconds of one clock, whichever it is.

    Args:
        limit: hashes given up that are remembered; the earliest are forgotten first.
    """

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._since: dict[bytes, float] = {}
        self._gone: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        self._restarts: deque[float] = deque(maxlen=64)

    def begin(self, held: Iterable[bytes], now: float, restarted: bool = False) -> None:
        """Says what the engine holds as a leadership begins; what it held before that is gone.

        Args:
            restarted: it is another life of the engine than before.
        """
        if restarted:
            self._restarts.append(now)
        former, self._since = self._since, {}
        for digest in held:
            # Since when it holds what nobody here saw it compute is not known: always.
            self._since[digest] = former.pop(digest, -math.inf)
        for digest, since in former.items():
            self._remember(digest, since, now)

    def note(self, added: Iterable[bytes], removed: Iterable[bytes], now: float) -> None:
        """Takes the changes of some steps; a hash that is in both was evicted and came back."""
        for digest in removed:
            since = self._since.pop(digest, None)
            if since is not None:
                self._remember(digest, since, now)
        for digest in added:
            self._since.setdefault(digest, now)

    def held_at(self, digest: bytes, at: float) -> bool:
        """Whether the engine held it before `at`, and still did then."""
        if self._since.get(digest, math.inf) < at:
            return True
        since, until = self._gone.get(digest, (math.inf, math.inf))
        return since < at <= until

    def evicted_before(self, digest: bytes, at: float) -> float | None:
        """When the engine gave it up, if it did before `at` and had not computed it again."""
        _, until = self._gone.get(digest, (math.inf, math.inf))
        return until if until < at and not self.held_at(digest, at) else None

    def restarted_at(self, moment: float) -> bool:
        """Whether what went then did so because the engine was started anew."""
        return moment in self._restarts

    def _remember(self, digest: bytes, since: float, until: float) -> None:
        self._gone[digest] = since, until
        self._gone.move_to_end(digest)
        if len(self._gone) > self._limit:
            self._gone.popitem(last=False)
