"""A request as the scheduler sees it, and the sequences that serve it. No wire types here."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from control_plane.beams import BeamFields, BeamSearch
from control_plane.blocks import Int32Array


@dataclass(frozen=True, slots=True)
class SamplingFields:
    """How tokens are drawn; names, ranges and defaults of ``quire.inference.v1.Sampling``."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprob_count: int = -1
    prompt_logprob_count: int = -1


@dataclass(frozen=True, slots=True)
class Request:
    """A validated, tokenised request.

    Attributes:
        prompt: int32 [n], not empty.
        hashes: prefix hashes of the prompt's full blocks; empty when the cache must not be used.
        salt: what the hashes of this request's blocks are salted with: its tenant.
        shared_blocks: leading blocks that all tenants share, a registered prefix's.
        prefix_name: of that registered prefix, on the replica that took the request.
        max_tokens: new tokens per sample, at most.
        min_tokens: no stop id is drawn before this many new tokens.
        stop_ids: end-of-sequence and stop ids that end a sample, at most `MAX_STOP_IDS`.
        record: opaque bytes from which any leader can rebuild this request.
        beams: beam search; `sample_count` is then the number of hypotheses that are returned.
    """

    request_id: str
    prompt: Int32Array
    max_tokens: int
    sample_count: int = 1
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    sampling: SamplingFields = SamplingFields()
    priority: int = 0
    hashes: tuple[bytes, ...] = ()
    salt: str = ""
    shared_blocks: int = 0
    prefix_name: str = ""
    record: bytes = b""
    beams: BeamFields | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What it is found by: an id belongs to the tenant that chose it."""
        return self.salt, self.request_id

    @property
    def sequence_count(self) -> int:
        """Sequences that serve it: samples, or beams."""
        return self.beams.width if self.beams else self.sample_count

    def tenant_of(self, block: int) -> str:
        """Whose the block at this place of its table is; "" is everybody."""
        return self.salt if block >= self.shared_blocks else ""

    @property
    def length_limit(self) -> int:
        """Tokens of one sample, prompt included, at most."""
        return len(self.prompt) + self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.sampling.logprob_count >= 0 or self.sampling.prompt_logprob_count >= 0

    def blocks_at_worst(self, block_size: int) -> int:
        """Blocks that all sequences can come to need: prompt shared, the rest their own."""
        shared = len(self.prompt) // block_size
        # The last token's keys and values are never written.
        longest = -(-(self.length_limit - 1) // block_size)
        return shared + self.sequence_count * max(longest - shared, 0)


# End-of-sequence ids and the client's stop ids together; one row of the slot table holds them.
MAX_STOP_IDS = 64


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request, or one beam.

    Attributes:
        slot: its row in both planes' tables, -1 while it has none.
        tokens: prompt and output while it waits; the slot table has them while it is resident.
        hashes: prefix hashes of its leading full blocks, as far as they are known.
        published: how many of them the block pool has been given.
        cached: prompt tokens found in the prefix cache at its latest admission.
    """

    group: SequenceGroup
    sample_index: int
    tokens: Int32Array
    hashes: list[bytes]
    slot: int = -1
    published: int = 0
    cached: int = 0
    finish: FinishReason | None = None

    def extend(self, token_ids: list[int]) -> None:
        """Adds output of a former residence to a sequence that waits."""
        if token_ids:
            self.tokens = np.concatenate([self.tokens, np.array(token_ids, np.int32)])


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """The sequences of one request: admitted, preempted and resumed together.

    Attributes:
        arrival: position in the order of arrival, unique.
        waiting: sequences that want a slot, first one first.
        unforked: siblings that are forked off the first sequence when its prompt is computed.
        admitted: it has been given a slot at least once.
    """

    request: Request
    arrival: int
    sequences: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    unforked: list[Sequence] = field(default_factory=list)
    admitted: bool = False
    preemptions: int = 0
    beams: BeamSearch | None = None

    @classmethod
    def of(cls, request: Request, arrival: int) -> SequenceGroup:
        """Makes the group of a request that has no output yet: one prefill, then forks."""
        group = cls(request, arrival)
        group.sequences = [
            Sequence(group, index, request.prompt, list(request.hashes))
            for index in range(request.sequence_count)
        ]
        if request.beams:
            group.beams = BeamSearch(
                request.beams, len(request.prompt), request.length_limit, request.stop_ids
            )
        group.waiting = group.sequences[:1]
        group.unforked = group.sequences[1:]
        return group

    @property
    def order(self) -> int:
        """Sort key, unique on an engine: priority first, then arrival."""
        return (self.request.priority << 48) + self.arrival

    @property
    def finished(self) -> bool:
        return all(sequence.finish is not None for sequence in self.sequences)

    def resident(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.slot >= 0]


def pool_room(prompt_length: int, samples: int, block_size: int, block_count: int) -> int:
    """Returns how many new tokens each sample can have in a pool of `block_count` blocks.

    The inverse of `Request.blocks_at_worst`; below 1 where not even the prompt fits.
    """
    shared = prompt_length // block_size
    own = (block_count - shared) // samples
    return (shared + own) * block_size + 1 - prompt_length


def ended_at(request: Request, tokens: Int32Array) -> tuple[int, FinishReason | None]:
    """Says how many of a sample's tokens count, and why it ended, if it did.

    An engine may be a step ahead of a stop that nobody has seen yet; tokens past it do not count.

    Args:
        tokens: int32 [n], prompt and output.
    """
    output = tokens[len(request.prompt) :]
    stops = np.flatnonzero(np.isin(output, request.stop_ids))
    if len(stops):
        return len(request.prompt) + int(stops[0]) + 1, FinishReason.STOP
    if len(tokens) >= request.length_limit:
        return request.length_limit, FinishReason.LENGTH
    return len(tokens), None
