"""Chooses the engine for a request: the longest cached prefix, weighed against load."""

from __future__ import annotations

from control_plane.generation import Forecast, Generation, Generations
from control_plane.leader import EngineLeader
from control_plane.prefix_index import EngineLife, PrefixIndex
from control_plane.prefixes.lookups import LookupLog
from control_plane.request import FinishReason, Request
from control_plane.step_loop import StepLoop

# What a running sequence costs a newcomer, in prompt tokens: it takes its part of every step.
RUNNING_SEQUENCE_TOKENS = 16


class UnknownModel(Exception):
    """No engine serves the model that was asked for."""


class AmbiguousModel(Exception):
    """No model was named, and there are several."""


class NoEngine(Exception):
    """No engine is led by this replica at the moment."""


class Router:
    """All engines of this replica."""

    def __init__(self, generations: Generations, index: PrefixIndex) -> None:
        self.leaders: list[EngineLeader] = []
        self.lookups = LookupLog()
        self._generations, self._index = generations, index
        # Hits that the index foretold, in tokens.
        self.predicted_tokens = 0

    def candidates(self, model: str) -> list[StepLoop]:
        """Returns led engines of one kind that serve `model` (empty: the only one there is).

        During a change of model or settings one name may stand for engines of several kinds. A
        request is tokenised and hashed for one; it is that of the engine with the least to do.

        Raises:
            NoEngine: none is led now.
            UnknownModel: those that are known serve other models.
            AmbiguousModel: `model` is empty and there are several.
        """
        known = sorted({leader.facts.model for leader in self.leaders if leader.facts is not None})
        if model and known and model not in known:
            raise UnknownModel(f"no engine serves {model!r}; there is {', '.join(known)}")
        if not model and len(known) > 1:
            raise AmbiguousModel(f"is empty, and there is {', '.join(known)}")
        loops = [leader.loop for leader in self.leaders if leader.loop is not None]
        serving = [loop for loop in loops if model in ("", loop.facts.model)]
        if not serving:
            raise NoEngine("no engine is attached")
        idlest = min(serving, key=lambda loop: (_load(loop), loop.facts.engine_id))
        return [loop for loop in serving if loop.facts.kind == idlest.facts.kind]

    async def choose(
        self, request: Request, candidates: list[StepLoop]
    ) -> tuple[StepLoop, Forecast]:
        """Returns the engine on which the request costs least, and what it holds of the prompt.

        Waits for one lookup in the prefix index at most.

        Raises:
            NoEngine: all candidates were lost meanwhile.
        """
        hints = await self._hints(request, candidates)
        alive = [loop for loop in candidates if loop.alive]
        if not alive:
            raise NoEngine("no engine is attached")
        self.lookups.routed(request, hints)
        # The pool of a led engine is the truth; where it is silent the index may know more.
        held = {
            loop: max(len(loop.scheduler.pool.match(request.hashes)), hints.get(loop.life, 0))
            for loop in alive
        }
        loop = min(alive, key=lambda loop: (_cost(loop, request, held[loop]), loop.facts.engine_id))
        size = loop.facts.block_size
        return loop, Forecast(loop.life, hints.get(loop.life, 0) * size, held[loop] * size)

    async def _hints(self, request: Request, candidates: list[StepLoop]) -> dict[EngineLife, int]:
        if not request.hashes:
            return {}
        facts, hashes = candidates[0].facts, b"".join(request.hashes)
        lives = [loop.life for loop in candidates]
        hints = await self._index.lookup(facts.fingerprint, lives, hashes)
        self.predicted_tokens += max(hints.values(), default=0) * facts.block_size
        return hints

    def loop_of(self, generation: Generation) -> StepLoop | None:
        """The engine on which a generation waits or runs; None while that is lost."""
        loops = [leader.loop for leader in self.leaders if leader.loop is not None]
        return next((loop for loop in loops if loop.facts.engine_id == generation.engine_id), None)

    def rehome(self, stranded: list[Generation]) -> list[Generation]:
        """Moves generations of a dead engine to others of the same kind; returns the rest."""
        left = []
        for generation in stranded:
            loops = [leader.loop for leader in self.leaders if leader.loop is not None]
            fitting = [loop for loop in loops if loop.can_take(generation)]
            if fitting:
                min(fitting, key=_load).take_stranded(generation, died=generation.accepted)
            else:
                left.append(generation)
        return left

    def cancel(self, generation: Generation) -> None:
        """Ends a generation wherever it runs; its blocks are free with the next plan."""
        for leader in self.leaders:
            leader.release(generation)
        generation.end_all(FinishReason.CANCELLED)
        self._generations.cancel(generation)


def _load(loop: StepLoop) -> int:
    """Tokens that are computed before a newcomer's, more or less."""
    scheduler = loop.scheduler
    return scheduler.waiting_tokens + RUNNING_SEQUENCE_TOKENS * scheduler.running_count


def _cost(loop: StepLoop, request: Request, held_blocks: int) -> int:
    """Tokens to compute before the request's first one, its own and those ahead of it."""
    return len(request.prompt) - held_blocks * loop.facts.block_size + _load(loop)
