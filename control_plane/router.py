"""Chooses the engine for a request: the longest cached prefix, weighed against load."""

from __future__ import annotations

from control_plane.generation import Generation
from control_plane.leader import EngineLeader, LeaderState
from control_plane.prefix_index import EngineLife, PrefixIndex
from control_plane.request import Request
from control_plane.scheduler import NeverFits
from control_plane.step_loop import StepLoop

# What a running sequence costs a newcomer, in prompt tokens: it takes its part of every step.
RUNNING_SEQUENCE_TOKENS = 16


class UnknownModel(Exception):
    """No engine serves the model that was asked for."""


class NoEngine(Exception):
    """No engine is led by this replica at the moment."""


class Router:
    """All engines of this replica."""

    def __init__(self, leaders: list[EngineLeader], index: PrefixIndex) -> None:
        self.leaders = leaders
        self._index = index
        # Hits that the index foretold and that admission then found, in tokens.
        self.predicted_tokens = 0

    def candidates(self, model: str) -> list[EngineLeader]:
        """Returns the led engines that serve `model` (empty: whatever there is).

        Raises:
            NoEngine: none is led now.
            UnknownModel: those that are known serve other models.
        """
        led = [leader for leader in self.leaders if leader.state is LeaderState.LED]
        serving = [leader for leader in led if model in ("", _model(leader))]
        if serving:
            return serving
        known = {_model(leader) for leader in self.leaders if leader.facts is not None}
        if model and known and model not in known:
            raise UnknownModel(f"no engine serves {model!r}; there is {', '.join(sorted(known))}")
        raise NoEngine("no engine is attached")

    async def choose(self, request: Request, candidates: list[EngineLeader]) -> StepLoop:
        """Returns the engine's loop on which the request costs least.

        Waits for one lookup in the prefix index at most.

        Raises:
            NoEngine: all candidates were lost meanwhile.
        """
        hints = await self._hints(request, candidates)
        loops = [leader.loop for leader in candidates if leader.loop is not None]
        if not loops:
            raise NoEngine("no engine is attached")
        return min(loops, key=lambda loop: _cost(loop, request, hints))

    async def _hints(
        self, request: Request, candidates: list[EngineLeader]
    ) -> dict[EngineLife, int]:
        loops = [leader.loop for leader in candidates if leader.loop is not None]
        if not loops or not request.hashes:
            return {}
        facts, hashes = loops[0].facts, b"".join(request.hashes)
        lives = [loop.life for loop in loops]
        hints = await self._index.lookup(facts.fingerprint, lives, hashes)
        self.predicted_tokens += max(hints.values(), default=0) * facts.block_size
        return hints

    def rehome(self, stranded: list[Generation]) -> list[Generation]:
        """Moves generations of a dead engine to others of the same model; returns the rest."""
        left = []
        for generation in stranded:
            generation.engine_deaths += 1
            for leader in sorted(self.leaders, key=lambda leader: leader.link.address):
                if leader.loop is not None and _can_take(leader.loop, generation):
                    leader.loop.resubmit(generation)
                    break
            else:
                generation.engine_deaths -= 1
                left.append(generation)
        return left


def _cost(loop: StepLoop, request: Request, hints: dict[EngineLife, int]) -> tuple[int, str]:
    """Tokens to compute before the request's first one, its own and those ahead of it."""
    scheduler, facts = loop.scheduler, loop.facts
    # The pool of a led engine is the truth; where it is silent the index may know more.
    cached = max(len(scheduler.pool.match(request.hashes)), hints.get(loop.life, 0))
    uncached = len(request.prompt) - cached * facts.block_size
    load = scheduler.waiting_tokens + RUNNING_SEQUENCE_TOKENS * scheduler.running_count
    return uncached + load, facts.engine_id


def _can_take(loop: StepLoop, generation: Generation) -> bool:
    if loop.facts.fingerprint != generation.fingerprint:
        return False
    try:
        loop.scheduler.check_fits(generation.request)
    except NeverFits:
        return False
    return True


def _model(leader: EngineLeader) -> str:
    return leader.facts.model if leader.facts else ""
