"""Which cached prefixes were hit, how often, and how many tokens that saved."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace


@dataclass(slots=True)
class PrefixHits:
    """Hits of the chain of blocks that ends with one hash.

    Attributes:
        name: of the registered prefix that it is, else empty.
        tenant: whose it is.
        shared: all tenants find it.
        token_count: from the prompt's beginning.
        saved_tokens: not counting those of a registered prefix that it begins with.
        last_hit: seconds, monotonic.
    """

    digest: bytes
    name: str
    tenant: str
    shared: bool
    token_count: int
    hits: int = 0
    saved_tokens: int = 0
    last_hit: float = 0.0

    def unnamed(self) -> PrefixHits:
        """The same, for it is not registered any more."""
        return replace(self, name="")

    def plus(self, other: PrefixHits) -> PrefixHits:
        """The same prefix on two engines."""
        return replace(
            self,
            name=self.name or other.name,
            hits=self.hits + other.hits,
            saved_tokens=self.saved_tokens + other.saved_tokens,
            last_hit=max(self.last_hit, other.last_hit),
        )


class PrefixStats:
    """Hit counters by prefix; the least recently hit goes when there are more than `limit`."""

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._entries: OrderedDict[bytes, PrefixHits] = OrderedDict()

    def hit(
        self,
        digest: bytes,
        token_count: int,
        saved: int,
        now: float,
        *,
        tenant: str = "",
        shared: bool = False,
        name: str = "",
    ) -> None:
        """Counts a request that found the chain of blocks that ends in `digest`.

        Args:
            saved: tokens that it did not compute thanks to it.
        """
        fresh = PrefixHits(digest, name, tenant, shared, token_count)
        entry = self._entries.setdefault(digest, fresh)
        self._entries.move_to_end(digest)
        entry.name, entry.shared = name or entry.name, entry.shared or shared
        entry.hits += 1
        entry.saved_tokens += saved
        entry.last_hit = now
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def top(self) -> list[PrefixHits]:
        """Returns all entries, most tokens saved first."""
        return sorted(self._entries.values(), key=lambda hits: -hits.saved_tokens)
