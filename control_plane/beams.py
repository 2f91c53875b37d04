"""Beam search: which beams go on, which hypotheses are kept, and when it ends. Pure.

The rules are those of transformers' `generate(num_beams=...)`, so that results can be
compared token by token: the best `width` continuations that do not end go on; of those
that end, the ones among the best `width` become hypotheses, ranked by their score over
length ^ length_penalty. Arithmetic is float32, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from control_plane.blocks import Int32Array

EarlyStopping = Literal["heuristic", "first", "never"]
# Stands for minus infinity, as in transformers: sums with it must stay comparable.
NEVER = np.float32(-1e9)


@dataclass(frozen=True, slots=True)
class BeamFields:
    """What a request asks of beam search; names and ranges of ``quire.inference.v1.BeamSearch``."""

    width: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "heuristic"
    stream_best: bool = False

    def candidate_count(self, stop_ids: int) -> int:
        """Candidates of each beam that are looked at: enough for `width` that do not end."""
        return max(2, 1 + stop_ids) * self.width


class Move(NamedTuple):
    """A beam goes on as its parent's tokens but the last drawn one, and `token`."""

    beam: int
    parent: int
    token: int


@dataclass(frozen=True, slots=True, eq=False)
class Hypothesis:
    """A finished beam, or a running one as if it had ended.

    Attributes:
        tokens: int32 [n], output only.
        score: with the length penalty.
        stopped: the last token is a stop id.
    """

    tokens: Int32Array
    score: float
    stopped: bool


@dataclass(slots=True, eq=False)
class _Candidates:
    """The best continuations of all beams, best first."""

    scores: npt.NDArray[np.float32]
    parents: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]


class BeamSearch:
    """One request's search.

    Attributes:
        length: tokens of each running beam, prompt included.
        moves: what the next step does, one entry a beam; empty while results are awaited.
        done: no beam goes on.
        best: what scores best so far, finished or running, for a search that is to tell; the same
            object while it stays the best. None before the first step and once the search is done.
    """

    def __init__(
        self, fields: BeamFields, prompt_length: int, limit: int, stop_ids: tuple[int, ...]
    ) -> None:
        self.fields, self.limit = fields, limit
        self.prompt_length = self.length = prompt_length
        self.moves: list[Move] = []
        self.done = False
        self.best: Hypothesis | None = None
        self._stop_ids = np.array(stop_ids, np.int64)
        # All beams begin alike: only the first one's continuations may win.
        self._scores = np.full(fields.width, NEVER)
        self._scores[0] = 0
        self._hypotheses: list[Hypothesis] = []
        self._reported: dict[int, tuple[tuple[int, float], ...]] = {}
        self._improvable = True

    def report(self, beam: int, candidates: tuple[tuple[int, float], ...]) -> bool:
        """Takes the likeliest (token, log-probability) pairs of one beam; whether all are in."""
        self._reported[beam] = candidates
        return len(self._reported) == self.fields.width

    def forget_reports(self) -> None:
        """Beams are computed again and will report again."""
        self._reported = {}

    def advance(self, tokens_of: Callable[[int], Int32Array]) -> None:
        """Chooses what goes on, once all beams have reported.

        Args:
            tokens_of: a beam's tokens, int32 [n], of which the first `length` count.
        """
        best = self._best_candidates()
        hits = np.isin(best.tokens, self._stop_ids) | (self.length + 1 >= self.limit)
        self._keep_finished(best, hits, tokens_of)
        running = best.scores + hits.astype(np.float32) * NEVER
        chosen = np.argsort(-running, kind="stable")[: self.fields.width]
        if self.fields.stream_best:
            # Running beams are all of one length, so the likeliest of them scores best.
            self.best = self._best_with(self._hypothesis(best, int(chosen[0]), tokens_of))
        self._scores = running[chosen]
        self.length += 1
        self._reported = {}
        self._improvable = self._improvable and self._can_improve()
        full = len(self._hypotheses) == self.fields.width
        first = full and self.fields.early_stopping == "first"
        self.done = not self._improvable or first or bool(hits.all())
        if self.done:
            self.best = None
        else:
            self.moves = _matched(
                [(int(best.parents[at]), int(best.tokens[at])) for at in chosen.tolist()],
                self._permute,
            )

    def take_moves(self) -> list[Move]:
        moves, self.moves = self.moves, []
        return moves

    def hypotheses(self, count: int) -> list[Hypothesis]:
        """The best `count` finished beams, best first."""
        return self._hypotheses[:count]

    def _best_candidates(self) -> _Candidates:
        scores, parents, tokens = [], [], []
        for beam in range(self.fields.width):
            for token, logprob in self._reported[beam]:
                scores.append(np.float32(logprob) + self._scores[beam])
                parents.append(beam)
                tokens.append(token)
        flat = np.array(scores, np.float32)
        count = self.fields.candidate_count(len(self._stop_ids))
        order = np.argsort(-flat, kind="stable")[:count]
        return _Candidates(flat[order], np.array(parents)[order], np.array(tokens)[order])

    def _keep_finished(
        self,
        best: _Candidates,
        hits: npt.NDArray[np.bool_],
        tokens_of: Callable[[int], Int32Array],
    ) -> None:
        full = len(self._hypotheses) == self.fields.width
        if not self._improvable or (full and self.fields.early_stopping == "first"):
            return
        ended = np.flatnonzero(hits[: self.fields.width]).tolist()
        found = [self._hypothesis(best, at, tokens_of) for at in ended]
        # Stable: of equals the earlier one is kept.
        self._hypotheses = sorted(
            [*self._hypotheses, *found], key=lambda hypothesis: -hypothesis.score
        )[: self.fields.width]

    def _hypothesis(
        self, best: _Candidates, at: int, tokens_of: Callable[[int], Int32Array]
    ) -> Hypothesis:
        """One candidate with the tokens and the score that it has if it ends here."""
        token = int(best.tokens[at])
        tokens = tokens_of(int(best.parents[at]))[self.prompt_length : self.length]
        penalty = np.float32((len(tokens) + 1) ** self.fields.length_penalty)
        return Hypothesis(
            np.append(tokens, np.int32(token)).astype(np.int32),
            float(best.scores[at] / penalty),
            bool(np.isin(token, self._stop_ids)),
        )

    def _best_with(self, running: Hypothesis) -> Hypothesis:
        """The best hypothesis, or this beam if it scores better. Of equals, what is finished."""
        finished = self._hypotheses[0] if self._hypotheses else running
        return finished if finished.score >= running.score else running

    def _can_improve(self) -> bool:
        """Whether a running beam could still beat the worst hypothesis, by the chosen heuristic."""
        fields = self.fields
        if fields.early_stopping == "never" and fields.length_penalty > 0:
            length = self.limit - self.prompt_length
        else:
            length = self.length - self.prompt_length
        attainable = self._scores[0] / np.float32(length**fields.length_penalty)
        worst = NEVER
        if len(self._hypotheses) == fields.width:
            worst = np.float32(self._hypotheses[-1].score)
        return bool(attainable > worst)

    def _permute(self, order: list[int]) -> None:
        self._scores = self._scores[order]


def _matched(chosen: list[tuple[int, int]], permute: Callable[[list[int]], None]) -> list[Move]:
    """Gives each chosen (parent, token) a beam: the parent's own where it is still free.

    A beam that goes on in place moves no block. Scores follow: `permute` gets, for each
    beam, which of the chosen it became.
    """
    became: dict[int, int] = {}
    homeless = []
    for at, (parent, _) in enumerate(chosen):
        if parent in became:
            homeless.append(at)
        else:
            became[parent] = at
    free = [beam for beam in range(len(chosen)) if beam not in became]
    became.update(zip(free, homeless, strict=True))
    permute([became[beam] for beam in range(len(chosen))])
    return [Move(beam, *chosen[became[beam]]) for beam in range(len(chosen))]
