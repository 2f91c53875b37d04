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


# In place of another replica's address: this one.
HERE = ""


class UnknownModel(Exception):
    """No engine serves the model that was asked for."""


class AmbiguousModel(Exception):
    """No model was named, and there are several."""


class NoEngine(Exception):
    """No engine is led by this replica at the moment."""


class Router:
    """All engines of this replica: those that it leads, and those that others lead."""

    def __init__(self, generations: Generations, index: PrefixIndex) -> None:
        self.leaders: list[EngineLeader] = []
        self.lookups = LookupLog()
        self._generations, self._index = generations, index
        # Hits that the index foretold, in tokens.
        self.predicted_tokens = 0

    def candidates(self, model: str) -> list[StepLoop]:
        """Returns engines of one kind, led from here, that serve `model` (empty: the only one).

        During a change of model or settings one name may stand for engines of several kinds. A
        request is tokenised and hashed for one; it is that of the engine with the least to do.

        Raises:
            NoEngine: none is led from here now.
            UnknownModel: those that are known serve other models.
            AmbiguousModel: `model` is empty and there are several.
        """
        known = sorted({leader.facts.model for leader in self.leaders if leader.facts is not None})
        if model and known and model not in known:
            raise UnknownModel(f"no engine serves {model!r}; there is {', '.join(known)}")
        if not model and len(known) > 1:
            raise AmbiguousModel(f"is empty, and there is {', '.join(known)}")
        serving = [loop for loop in self._loops if model in ("", loop.facts.model)]
        if not serving:
            raise NoEngine("no engine is attached")
        # Where all are draining a request waits for whichever is back first.
        serving = [loop for loop in serving if not loop.draining] or serving
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
            # Some of them may be led again, or awaited, by now.
            kind = candidates[0].facts.kind
            alive = [loop for loop in self._loops if loop.facts.kind == kind]
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
        loops = self._loops
        return next((loop for loop in loops if loop.facts.engine_id == generation.engine_id), None)

    # Engines that other replicas lead.

    def places(self, model: str) -> list[str]:
        """Where a request for `model` may be answered, best first: addresses, or HERE.

        What cannot be answered anywhere is HERE, to be refused.
        """
        fitting, elsewhere = self._fitting(model), self.elsewhere(model)
        loops = [leader.loop for leader in fitting if leader.loop is not None]
        if not elsewhere or any(not loop.draining for loop in loops):
            return [HERE]
        return [*elsewhere, HERE] if loops else elsewhere

    def elsewhere(self, model: str) -> list[str]:
        """The other replicas that lead engines which serve `model`."""
        fitting = self._fitting(model)
        return list(dict.fromkeys(leader.elsewhere for leader in fitting if leader.elsewhere))

    def place_of(self, engine_id: str) -> str | None:
        """Where an engine is led, as far as is known."""
        for leader in self.leaders:
            if leader.facts is not None and leader.facts.engine_id == engine_id:
                return HERE if leader.loop is not None else leader.elsewhere or None
        return None

    def has_engine(self, model: str) -> bool:
        """Whether an engine that serves `model` is led, here or elsewhere."""
        fitting = self._fitting(model)
        return any(leader.loop is not None or leader.elsewhere for leader in fitting)

    def followed(self) -> set[str]:
        """The replicas that lead engines, without this one."""
        return {leader.elsewhere for leader in self.leaders if leader.elsewhere}

    def _fitting(self, model: str) -> list[EngineLeader]:
        """Those whose engines serve `model`; none if it is empty and there are several."""
        known = [leader for leader in self.leaders if leader.facts is not None]
        names = {leader.facts.model for leader in known if leader.facts is not None}
        if not model and len(names) > 1:
            return []
        return [leader for leader in known if leader.facts and model in ("", leader.facts.model)]

    # Moving.

    @property
    def _loops(self) -> list[StepLoop]:
        return [leader.loop for leader in self.leaders if leader.loop is not None]

    def _other_for(self, generation: Generation) -> StepLoop | None:
        """The engine that can best go on with a generation whose own cannot."""
        loops = [loop for loop in self._loops if not loop.draining and loop.can_take(generation)]
        return min(loops, key=_load, default=None)

    def rehome(self, stranded: list[Generation], *, died: bool) -> list[Generation]:
        """Moves generations of a lost engine to others of the same kind; returns the rest.

        Args:
            died: the engine was lost without a word.
        """
        left = []
        for generation in stranded:
            loop = self._other_for(generation)
            if loop is not None:
                loop.take_stranded(generation, died=died and generation.accepted)
            else:
                left.append(generation)
        return left

    def spread(self) -> None:
        """Moves what waits for draining engines to others of the same kind."""
        for draining in [loop for loop in self._loops if loop.draining]:
            for generation in draining.unbegun():
                loop = self._other_for(generation)
                if loop is not None:
                    draining.release(generation)
                    loop.take_stranded(generation, died=False)

    def disperse(self, draining: StepLoop) -> None:
        """Moves what waits for an engine that begins to drain, to other replicas if need be.

        Only once: where theirs drain as well, they would send it back.
        """
        self.spread()
        if all(place == HERE for place in self.places(draining.facts.model)):
            return
        for generation in draining.unbegun():
            draining.release(generation)
            generation.detach()
            self._generations.detach(generation)

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
