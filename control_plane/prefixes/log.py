"""What is remembered of one engine's prefix cache: its hits, its blocks, and its lookups."""

from __future__ import annotations

from collections.abc import Iterable

from control_plane.engine_link import EngineFacts
from control_plane.prefixes.history import BlockHistory
from control_plane.prefixes.lookups import LookupLog
from control_plane.prefixes.stats import PrefixStats
from control_plane.request import Request


class CacheLog:
    """Outlives leaderships of the engine; a step loop tells it what happens.

    Args:
        lookups: the whole replica's.
    """

    def __init__(self, lookups: LookupLog) -> None:
        self.stats = PrefixStats()
        self.history = BlockHistory()
        self._lookups = lookups
        self._incarnation = ""

    def begin(self, held: Iterable[bytes], incarnation: str, now: float) -> None:
        """Notes what the engine holds as a leadership begins."""
        restarted = self._incarnation not in ("", incarnation)
        self._incarnation = incarnation
        self.history.begin(held, now, restarted)

    def changed(self, added: Iterable[bytes], removed: Iterable[bytes], now: float) -> None:
        self.history.note(added, removed, now)

    def admitted(self, request: Request, facts: EngineFacts, cached: int, now: float) -> None:
        """Notes what a request found when the engine took it, in tokens."""
        self._lookups.admitted(request, facts, cached, now)
        size = facts.block_size
        blocks = cached // size
        shared = min(request.shared_blocks, blocks)
        whole = shared and shared == request.shared_blocks
        if shared:
            name = request.prefix_name if whole else ""
            saved = min(cached, shared * size)
            digest = request.hashes[shared - 1]
            self.stats.hit(digest, shared * size, saved, now, shared=True, name=name)
        if blocks > shared:
            digest, own = request.hashes[blocks - 1], cached - shared * size
            self.stats.hit(digest, blocks * size, own, now, tenant=request.salt)
