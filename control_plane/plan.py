"""A step plan and its outcome, as columns: what the scheduler says and hears. No wire types here.

Field by field this mirrors ``quire.engine.v1.StepPlan``, which says what each column means.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from control_plane.beams import Hypothesis
from control_plane.blocks import Int32Array
from control_plane.request import FinishReason, Sequence, SequenceGroup

_EMPTY: Int32Array = np.zeros(0, np.int32)
_EMPTY.flags.writeable = False


def _empty() -> Int32Array:
    return _EMPTY


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence that becomes resident. `cached`: leading tokens that are in `blocks` already."""

    sequence: Sequence
    slot: int
    tokens: Int32Array
    blocks: Int32Array
    cached: int


@dataclass(frozen=True, slots=True)
class Crossing:
    """Slots whose tables are rewritten as blocks cross to the host or back.

    Attributes:
        slots: int32 [n].
        sources, targets: int32 [m], blocks on either side; each crosses once.
    """

    slots: Int32Array
    sources: Int32Array
    targets: Int32Array


@dataclass(slots=True)
class Plan:
    """One step. Lists are filled while it is made; arrays are int32 [n]."""

    step: int = 0
    touched_slots: Int32Array = field(default_factory=_empty)
    touched_lengths: Int32Array = field(default_factory=_empty)
    released: list[int] = field(default_factory=list)
    swapped_out: list[Crossing] = field(default_factory=list)
    swapped_in: list[Crossing] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    appended_slots: Int32Array = field(default_factory=_empty)
    appended_blocks: Int32Array = field(default_factory=_empty)
    copied_slots: Int32Array = field(default_factory=_empty)
    copied_indexes: Int32Array = field(default_factory=_empty)
    copied_blocks: Int32Array = field(default_factory=_empty)
    decode_joins: Int32Array = field(default_factory=_empty)
    decode_leaves: Int32Array = field(default_factory=_empty)
    chunk_slots: list[int] = field(default_factory=list)
    chunk_counts: list[int] = field(default_factory=list)
    fork_parents: list[int] = field(default_factory=list)
    fork_children: list[int] = field(default_factory=list)
    fork_samples: list[int] = field(default_factory=list)
    beam_slots: list[int] = field(default_factory=list)
    beam_parents: list[int] = field(default_factory=list)
    beam_tokens: list[int] = field(default_factory=list)
    hashed: dict[int, bytes] = field(default_factory=dict)
    decode_count: int = 0
    # Sequences that are to be computed again, with the slots that they had; not for the engine.
    taken_off: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def token_count(self) -> int:
        """Tokens that go through the model."""
        return self.decode_count + sum(self.chunk_counts)

    @property
    def moved_block_count(self) -> int:
        """Blocks that cross to the host or back."""
        return sum(len(crossing.sources) for crossing in (*self.swapped_out, *self.swapped_in))

    @property
    def empty(self) -> bool:
        moves = self.released or self.swapped_out or self.swapped_in
        return not (self.token_count or moves or self.hashed or len(self.decode_leaves))


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability (natural logarithm) and the likeliest tokens at its position."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought: ids in the plan's sampling order, -1 where a slot faulted.

    `logprobs` and `prompt_logprobs` are by slot; prompt ones are (position, logprob) pairs.
    `timings_us`: what the engine spent on queue, moves, forward and sampling.
    """

    step: int
    token_ids: Int32Array
    logprobs: dict[int, Logprob] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[tuple[int, Logprob]]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    timings_us: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a result meant: tokens by sequence, and what has ended.

    Attributes:
        sequences: object [n], the sequences that got a token.
        slots: int32 [n], the slots they had when the step ran.
        token_ids: int32 [n].
        decode_count: how many of them decode; the others, which follow, had a prompt computed.
        finished: ended sequences with the reason and, for an error, its sentence.
        logprobs: by slot.
        hypotheses: results of beam searches that have ended, best first.
        prompt_logprobs: (position, log-probability) pairs by sequence.
    """

    sequences: npt.NDArray[np.object_]
    slots: Int32Array
    token_ids: Int32Array
    decode_count: int
    finished: list[tuple[Sequence, FinishReason, str]]
    logprobs: dict[int, Logprob]
    prompt_logprobs: list[tuple[Sequence, list[tuple[int, Logprob]]]]
    hypotheses: list[tuple[SequenceGroup, list[Hypothesis]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ResidentRow:
    """One slot of an engine's snapshot; `blocks` are in host memory where it is swapped out."""

    slot: int
    record: bytes
    sample_index: int
    prompt_count: int
    computed: int
    swapped: bool
    tokens: Int32Array
    blocks: Int32Array


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An engine's resident state; prefix hashes by block."""

    rows: list[ResidentRow]
    hashes: dict[int, bytes]
