"""What a beam search comes to on the stub engine when nothing disturbs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from control_plane.beams import BeamFields, BeamSearch, Hypothesis
from tests.stub_engine import VOCABULARY, candidates


@dataclass(frozen=True, slots=True)
class Searched:
    """An undisturbed search, from its prompt to its end.

    Attributes:
        found: its hypotheses, best first; none if a beam faulted, which ends all of it.
        rows: prompt and output of every beam after every step but the last.
        best: what was the best so far at each of these, if the search is to tell.
    """

    found: list[Hypothesis]
    rows: list[list[int]]
    best: list[Hypothesis] = field(default_factory=list)


@lru_cache(maxsize=64)
def searched(
    prompt: tuple[int, ...],
    max_tokens: int,
    fields: BeamFields,
    stop_ids: tuple[int, ...],
    fault: tuple[int, int] | None,
) -> Searched:
    """Runs a search beam by beam, each a list of tokens of its own.

    Args:
        fault: the beam for which token `count` (from 0) cannot be drawn, and that count.
    """
    search = BeamSearch(fields, len(prompt), len(prompt) + max_tokens, stop_ids)
    count = min(fields.candidate_count(len(stop_ids)), VOCABULARY)
    beams = [list(prompt)] * fields.width
    answer = Searched([], [list(prompt)])
    while not search.done:
        if fault is not None and search.length - len(prompt) == fault[1]:
            return answer
        for beam, tokens in enumerate(beams):
            search.report(beam, tuple(candidates(np.array(tokens, np.int32), count)))
        search.advance(lambda beam, beams=beams: np.array(beams[beam], np.int32))
        moves = sorted(search.take_moves())
        beams = [[*beams[move.parent], move.token] for move in moves]
        answer.rows.extend(beams)
        if search.best is not None:
            answer.best.append(search.best)
    answer.found.extend(search.hypotheses(fields.width))
    return answer
