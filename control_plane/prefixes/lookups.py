"""What the latest requests found in the prefix cache, so that one can ask later why not more."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from control_plane.engine_link import EngineFacts
from control_plane.prefix_index import EngineLife
from control_plane.request import Request

MAX_TENANTS = 64

Listener: TypeAlias = Callable[[Request, EngineFacts, int], None]


@dataclass(slots=True)
class Lookup:
    """One request's way into an engine.

    Attributes:
        predicted: leading blocks that the index said engines hold, by engine.
        facts: of the engine that took it, None while it waits.
        cached: prompt tokens that it found there.
        at: seconds, monotonic, when it was taken.
    """

    request: Request
    predicted: Mapping[EngineLife, int]
    facts: EngineFacts | None = None
    cached: int = 0
    at: float = 0.0


class LookupLog:
    """The latest requests by tenant and id.

    Args:
        limit, token_limit: of requests, and of their prompts' tokens together.

    Attributes:
        listeners: hear of each request as an engine takes it, with the tokens it found there.
    """

    def __init__(self, limit: int = 2048, token_limit: int = 1 << 22) -> None:
        self._limit, self._token_limit = limit, token_limit
        self._entries: OrderedDict[tuple[str, str], Lookup] = OrderedDict()
        self._tokens = 0
        self._tenants: OrderedDict[str, None] = OrderedDict()
        self.listeners: list[Listener] = []

    @property
    def tenants(self) -> list[str]:
        """Those that sent requests lately, at most `MAX_TENANTS`."""
        return list(self._tenants)

    def routed(self, request: Request, predicted: Mapping[EngineLife, int]) -> None:
        """Notes a request that is on its way to an engine."""
        self._drop(request.key)
        self._entries[request.key] = Lookup(request, predicted)
        self._tokens += len(request.prompt)
        self._tenants[request.salt] = None
        self._tenants.move_to_end(request.salt)
        if len(self._tenants) > MAX_TENANTS:
            self._tenants.popitem(last=False)
        while len(self._entries) > self._limit or self._tokens > self._token_limit:
            self._drop(next(iter(self._entries)))

    def admitted(self, request: Request, facts: EngineFacts, cached: int, now: float) -> None:
        lookup = self._entries.get(request.key)
        if lookup is not None and lookup.facts is None:
            lookup.facts, lookup.cached, lookup.at = facts, cached, now
            for listener in self.listeners:
                listener(lookup.request, facts, cached)

    def refused(self, request: Request) -> None:
        """Forgets a request that no engine is going to take."""
        self._drop(request.key)

    def get(self, request_id: str, tenant: str | None = None) -> Lookup | None:
        """The latest one with that id, of a tenant or of whichever it is."""
        keys = (key for key in reversed(self._entries) if key[1] == request_id)
        latest = (key for key in keys if tenant in (None, key[0]))
        key = next(latest, None)
        return None if key is None else self._entries[key]

    def _drop(self, key: tuple[str, str]) -> None:
        lookup = self._entries.pop(key, None)
        if lookup is not None:
            self._tokens -= len(lookup.request.prompt)
