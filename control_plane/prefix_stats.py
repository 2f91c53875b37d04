"""Which cached prefixes were hit, how often, and how many tokens that saved."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class PrefixHits:
    """Hits of the chain of blocks that ends with one hash. `last_hit`: seconds, monotonic."""

    digest: bytes
    token_count: int
    hits: int = 0
    saved_tokens: int = 0
    last_hit: float = 0.0


class PrefixStats:
    """Hit counters by prefix; the least recently hit goes when there are more than `limit`."""

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._entries: OrderedDict[bytes, PrefixHits] = OrderedDict()

    def hit(self, digest: bytes, token_count: int, now: float) -> None:
        """Counts a request whose longest cached prefix ends in `digest`."""
        entry = self._entries.setdefault(digest, PrefixHits(digest, token_count))
        self._entries.move_to_end(digest)
        entry.hits += 1
        entry.saved_tokens += token_count
        entry.last_hit = now
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def top(self) -> list[PrefixHits]:
        """Returns all entries, most tokens saved first."""
        return sorted(self._entries.values(), key=lambda hits: -hits.saved_tokens)
