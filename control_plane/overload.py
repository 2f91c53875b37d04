"""How fast the wait queue drains, and hence when a refused request should come back. Pure."""

from __future__ import annotations

from collections import deque

# Seconds of history that count, bounds of what a client is told, and what it is told without any.
WINDOW, LEAST, MOST, UNKNOWN = 30.0, 0.1, 60.0, 1.0


class DrainRate:
    """Prompt tokens that left the queue, lately."""

    def __init__(self) -> None:
        self._admitted: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def add(self, now: float, tokens: int) -> None:
        """Notes that a request of so many prompt tokens was admitted."""
        self._admitted.append((now, tokens))
        self._tokens += tokens
        self._forget(now)

    def seconds_for(self, tokens: int, now: float) -> float:
        """How long so many tokens will take to leave; `UNKNOWN` where nothing has left lately."""
        self._forget(now)
        if not self._tokens:
            return UNKNOWN
        elapsed = max(now - self._admitted[0][0], LEAST)
        return min(max(tokens * elapsed / self._tokens, LEAST), MOST)

    def _forget(self, now: float) -> None:
        while self._admitted and self._admitted[0][0] < now - WINDOW:
            self._tokens -= self._admitted.popleft()[1]
