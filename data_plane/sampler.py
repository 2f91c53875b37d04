"""Draws the next tokens of a batch where its logits are, without waiting for them.

A draw is a pure function of (logits, the request's fields, its tokens so far, seed, sample index,
position). The generator is counter-based, so a sequence that moves to another batch, slot, leader
or engine goes on with the same tokens. A row's result does not depend on the other rows.

What rows ask for is known on the host, what logits say is not: nothing here looks at a value of the
device, so that the next step can be prepared while this one is computed. Faults are negative ids
until the results are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_plane.philox import uniforms
from data_plane.sampling_table import Float32Array, IndexArray, Int32Array, SamplingTable

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
# Brings a host array to the logits' device.
Send = Callable[[npt.NDArray[np.generic]], Tensor]

# Rows are worked on in chunks of at most this many logits, which bounds the sampler's own memory:
# a float64 tensor of a chunk takes 64 MiB, and about four of them live at a time.
CHUNK_ELEMENTS = 1 << 23
# Up to this top-k only so many likeliest tokens are ranked, beyond it the whole vocabulary is.
CANDIDATES = 1024

# A token's weight in a draw is an integer, this one for the likeliest. What is less likely than
# that one by more is never drawn; 2^22 tokens can be summed.
WEIGHT_OF_PEAK = float(1 << 40)

_NAN, _UNBOUNDED, _NOTHING_LEFT = -1, -2, -3
_FAULTS = {
    _NAN: "the model gave NaN logits",
    _UNBOUNDED: "the model gave no finite logit, or an infinite one",
    _NOTHING_LEFT: "bias, penalties and banned stop ids leave no token to draw",
}


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities in the model's raw distribution; `LogprobColumns` of the engine API."""

    slots: Int32Array
    positions: Int32Array  # of the token in its sequence
    token_ids: Int32Array
    logprobs: Float32Array
    ranks: Int32Array  # 1 + the number of strictly likelier tokens
    top_counts: Int32Array
    top_token_ids: Int32Array  # one row after the other, best first, equal ones by id
    top_logprobs: Float32Array

    @staticmethod
    def concatenate(parts: Sequence[Logprobs]) -> Logprobs:
        """Joins the rows of one or more parts, in order."""
        names = [field.name for field in fields(Logprobs)]
        columns = ([getattr(part, name) for part in parts] for name in names)
        return Logprobs(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class Samples:
    token_ids: Int32Array  # [R]; -1 where the row faulted
    logprobs: Logprobs | None  # of the rows that ask for them and did not fault
    faults: list[tuple[int, str]]  # (row, reason)


@dataclass(frozen=True, slots=True)
class Rows:
    """What is to be drawn, on the host.

    Attributes:
        logits: int [R], the row of the logits for each draw; forks share one.
        slots: int32 [R].
        lengths: int32 [R], tokens the sequence has: the position of the one to be drawn.
    """

    logits: IndexArray
    slots: Int32Array
    lengths: Int32Array


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of n rows on the device, to be fetched.

    Attributes:
        rows: int64 [n], which draws these are; None for tokens of a prompt.
        slots, positions, counts: int32 [n], on the host.
        values: token ids int64 [n], log-probabilities fp32 [n], ranks int64 [n], the likeliest ids
            int64 [n, w] and their log-probabilities fp32 [n, w].
    """

    rows: Int64Array | None
    slots: Int32Array
    positions: Int32Array
    counts: Int32Array
    values: tuple[Tensor, ...]

    def collect(self, values: Sequence[npt.NDArray[np.generic]], drawn: Int64Array) -> Logprobs:
        """Makes the columns out of the fetched values; rows that faulted are left out."""
        ids, chosen, ranks, top_ids, top = values
        valid = np.ones(len(ids), np.bool_) if self.rows is None else drawn[self.rows] >= 0
        counts = self.counts[valid]
        width = top_ids.shape[1] if len(ids) else 0
        inside = np.arange(width) < counts[:, None]
        return Logprobs(
            slots=self.slots[valid],
            positions=self.positions[valid],
            token_ids=ids[valid].astype(np.int32),
            logprobs=chosen[valid].astype(np.float32),
            ranks=ranks[valid].astype(np.int32),
            top_counts=counts,
            top_token_ids=top_ids[valid][inside].astype(np.int32),
            top_logprobs=top[valid][inside].astype(np.float32),
        )


@dataclass(frozen=True, slots=True)
class Draws:
    """One token for each of R rows, on the device, to be fetched.

    Attributes:
        ids: int64 [R]; negative where the row faulted.
    """

    ids: Tensor
    scores: list[Scores]

    @property
    def values(self) -> list[Tensor]:
        """All that `collect` wants fetched."""
        return [self.ids, *(value for scores in self.scores for value in scores.values)]

    def collect(self, values: Sequence[npt.NDArray[np.generic]]) -> Samples:
        ids = values[0].astype(np.int64)
        parts = collect_scores(self.scores, values[1:], ids)
        return Samples(
            token_ids=np.maximum(ids, -1).astype(np.int32),
            logprobs=parts if parts is not None and len(parts.slots) else None,
            faults=[(row, _FAULTS[int(ids[row])]) for row in np.flatnonzero(ids < 0).tolist()],
        )


def collect_scores(
    scores: Sequence[Scores], values: Sequence[npt.NDArray[np.generic]], drawn: Int64Array
) -> Logprobs | None:
    """Joins what was fetched of several parts; None where there are none."""
    width = len(fields(Logprobs)) - 3
    parts = [
        part.collect(values[at * width : (at + 1) * width], drawn) for at, part in enumerate(scores)
    ]
    return Logprobs.concatenate(parts) if parts else None


def draw(
    logits: Tensor,
    rows: Rows,
    table: SamplingTable,
    tokens: Tensor,
    prompt_lengths: Int32Array,
    send: Send,
) -> Draws:
    """Draws one token for each of R rows.

    First bias, banned stop ids and penalties change the logits (repetition penalty: Keskar et al.,
    CTRL, arXiv 1909.05858); then come temperature, min-p, top-k and top-p in this order, each on
    what the former left. A row without any of these is one argmax over the logits as they are.

    Args:
        logits: [L, V], any float dtype and device; V at least the vocabulary's size.
        table: what the slots ask for.
        tokens: int32 [max_slots, max_length] on the logits' device, the slots' tokens so far.
        prompt_lengths: int32 [max_slots]; tokens past them are output.
    """
    logits = logits[:, : table.vocabulary_size]
    ids = _argmax(logits).index_select(0, send(rows.logits.astype(np.int64)))
    busy = np.flatnonzero(_needs_more_than_argmax(rows, table))
    # Penalties count over a row's tokens, which may be more than its logits.
    for part in _chunks(busy, max(logits.shape[1], int(rows.lengths.max(initial=0)))):
        at = send(part)
        chosen = Rows(rows.logits[part], rows.slots[part], rows.lengths[part])
        copies = logits.index_select(0, send(chosen.logits.astype(np.int64)))
        drawn = _draw(copies, chosen, table, tokens, prompt_lengths, send)
        plain = ids.index_select(0, at)
        ids.index_copy_(0, at, torch.where(plain < 0, plain, drawn))
    scored = np.flatnonzero(table.logprob_count[rows.slots] >= 0)
    scores = []
    for part in _chunks(scored, logits.shape[1]):
        slots, counts = rows.slots[part], table.logprob_count[rows.slots[part]]
        raw = logits.index_select(0, send(rows.logits[part].astype(np.int64)))
        token_ids = ids.index_select(0, send(part)).clamp(min=0)
        values = _score(raw, token_ids, counts)
        counts = np.minimum(counts, logits.shape[1])
        scores.append(Scores(part, slots, rows.lengths[part], counts, values))
    return Draws(ids, scores)


def score_prompt(
    logits: Tensor, slot: int, first_position: int, following: Tensor, count: int
) -> list[Scores]:
    """Scores the tokens that follow in a prompt, row by row.

    Args:
        logits: [T, V], any float dtype; no more columns than the vocabulary has.
        slot: the sequence's slot.
        first_position: position of `following[0]` in its sequence (1 for the second token).
        following: int64 [T] on the logits' device, what really came after each row.
        count: how many of the likeliest tokens to give with each; 0 or more.
    """
    scores = []
    for part in _chunks(np.arange(len(following)), logits.shape[1]) if len(following) else []:
        begin, end = int(part[0]), int(part[-1]) + 1
        counts = np.full(len(part), min(count, logits.shape[1]), np.int32)
        values = _score(logits[begin:end], following[begin:end], counts)
        slots = np.full(len(part), slot, np.int32)
        positions = (first_position + part).astype(np.int32)
        scores.append(Scores(None, slots, positions, counts, values))
    return scores


def _needs_more_than_argmax(rows: Rows, table: SamplingTable) -> BoolArray:
    """bool [R]: rows whose logits are changed, or that are not greedy."""
    slots = rows.slots
    busy: BoolArray = table.temperature[slots] > 0
    busy |= table.repetition_penalty[slots] != 1
    busy |= table.presence_penalty[slots] != 0
    busy |= table.frequency_penalty[slots] != 0
    busy |= _among(slots, table.bias)
    busy |= _is_early(rows, table)
    return busy


def _is_early(rows: Rows, table: SamplingTable) -> BoolArray:
    """bool [R]: rows that may not draw their stop ids yet."""
    early = rows.lengths < table.min_length[rows.slots]
    return _among(rows.slots, table.stop_ids) & early


def _among(slots: Int32Array, entries: Mapping[int, object]) -> BoolArray:
    if not entries:
        return np.zeros(len(slots), np.bool_)
    return np.isin(slots, np.fromiter(entries, np.int32, len(entries)))


def _argmax(logits: Tensor) -> Tensor:
    """int64 [L]: the likeliest id (the lowest of equals), or the code of a fault."""
    if logits.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=logits.device)
    # The maximum is NaN where any logit is.
    peaks, ids = logits.max(dim=-1)
    return torch.where(peaks.isinf(), _UNBOUNDED, torch.where(peaks.isnan(), _NAN, ids))


def _draw(
    logits: Tensor,
    rows: Rows,
    table: SamplingTable,
    tokens: Tensor,
    prompt_lengths: Int32Array,
    send: Send,
) -> Tensor:
    """int64 [n]: ids or fault codes for a chunk of rows; `logits` [n, V] is the caller's copy."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    _apply_bias_and_bans(logits, rows, table, send)
    logits = _apply_penalties(logits, rows, table, tokens, prompt_lengths, send)
    ids = _argmax(logits)
    ids = torch.where(ids < 0, _NOTHING_LEFT, ids)
    warm = np.flatnonzero(table.temperature[rows.slots] > 0)
    if len(warm):
        at, slots, lengths = send(warm), rows.slots[warm], rows.lengths[warm]
        drawn = _draw_warm(logits.index_select(0, at), slots, lengths, table, send)
        plain = ids.index_select(0, at)
        ids.index_copy_(0, at, torch.where(plain < 0, plain, drawn))
    return ids


def _draw_warm(
    logits: Tensor, slots: Int32Array, lengths: Int32Array, table: SamplingTable, send: Send
) -> Tensor:
    """int64 [n]: an id of each row, by inverting the distribution's cumulative sum.

    Weights are relative to the likeliest token's, which is exactly 1 at any temperature. They are
    summed as integers, because the order in which a GPU adds is not the same each time, and ranks
    that draw for themselves must draw the same. Rows without a finite peak give an id that means
    nothing.
    """
    peaks = logits.amax(dim=-1, keepdim=True)
    shares = (logits - peaks).double()
    shares.div_(send(table.temperature[slots].astype(np.float64))[:, None]).exp_()
    min_p, top_k, top_p = table.min_p[slots], table.top_k[slots], table.top_p[slots]
    if (min_p > 0).any():
        shares.masked_fill_(shares < send(min_p)[:, None], 0)
    weights = shares.mul_(WEIGHT_OF_PEAK).round_().long()
    vocabulary = logits.shape[1]
    top_k = np.where(top_k > 0, np.minimum(top_k, vocabulary), vocabulary)
    filtered = (top_k < vocabulary) | (top_p < 1)
    narrow = top_k <= CANDIDATES
    for chosen in (np.flatnonzero(filtered & narrow), np.flatnonzero(filtered & ~narrow)):
        if len(chosen):
            at = send(chosen)
            part, part_weights = logits.index_select(0, at), weights.index_select(0, at)
            kept = _nucleus(part, part_weights, top_k[chosen], top_p[chosen], send)
            weights.index_copy_(0, at, part_weights * kept)

    sums = weights.cumsum(dim=-1)
    total = sums[:, -1]
    numbers = send(uniforms(table.seed[slots], table.sample_index[slots], lengths))
    # Below the total, however the product rounds; so some sum lies above it, and the first one
    # that does belongs to a token with weight.
    target = torch.minimum((numbers * total).long(), total - 1)
    return (sums > target[:, None]).to(torch.uint8).argmax(dim=-1)


def _nucleus(
    logits: Tensor, weights: Tensor, top_k: IndexArray, top_p: Float32Array, send: Send
) -> Tensor:
    """bool [n, V]: the tokens that top-k and then top-p keep.

    Args:
        logits: [n, V], by which tokens are ranked; equal ones by id.
        weights: int64 [n, V], a function of the row's logits.
        top_k: int [n] in [1, V]; V keeps all.
        top_p: float32 [n] in (0, 1]; the smallest set with this share of the mass is kept.
    """
    width = int(top_k.max())
    ids = _ranked(logits, width)
    ranked = weights.gather(1, ids)
    inside = torch.arange(width, device=logits.device) < send(top_k.astype(np.int64))[:, None]
    sums = ranked.mul_(inside).cumsum(dim=-1)
    # A row that keeps all has no threshold to round: its share is beyond any sum.
    share = send(np.where(top_p < 1, top_p, np.inf).astype(np.float64))
    before = torch.nn.functional.pad(sums[:, :-1], (1, 0))
    kept = inside & (before < (share * sums[:, -1])[:, None])
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, kept)


def _ranked(logits: Tensor, width: int) -> Tensor:
    """int64 [n, width]: the ids of the largest logits of each row, best first, equal ones by id."""
    if width >= logits.shape[1] or logits.dtype != torch.float32:
        return logits.argsort(dim=-1, descending=True, stable=True)[:, :width]
    # `topk` does not say which of equals it takes, so none are: 32 bits of a logit that sort as it
    # does (negative zero made positive), then 32 bits of its id.
    bits = (logits + 0.0).view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return ((bits << 32) - ids).topk(width, dim=-1).indices


def _apply_bias_and_bans(logits: Tensor, rows: Rows, table: SamplingTable, send: Send) -> None:
    biased = np.flatnonzero(_among(rows.slots, table.bias))
    if len(biased):
        entries = [table.bias[slot] for slot in rows.slots[biased].tolist()]
        owners = np.repeat(biased, [len(ids) for ids, _ in entries])
        ids = np.concatenate([ids for ids, _ in entries]).astype(np.int64)
        values = np.concatenate([values for _, values in entries])
        at = (send(owners), send(ids))
        logits.index_put_(at, logits[at] + send(values).to(logits.dtype))
    early = np.flatnonzero(_is_early(rows, table))
    if len(early):
        stops = [table.stop_ids[slot] for slot in rows.slots[early].tolist()]
        owners = np.repeat(early, [len(ids) for ids in stops])
        at = (send(owners), send(np.concatenate(stops).astype(np.int64)))
        logits.index_put_(at, torch.full((), -torch.inf, dtype=logits.dtype, device=logits.device))


def _apply_penalties(
    logits: Tensor,
    rows: Rows,
    table: SamplingTable,
    tokens: Tensor,
    prompt_lengths: Int32Array,
    send: Send,
) -> Tensor:
    slots, lengths = rows.slots, rows.lengths
    repetition = table.repetition_penalty[slots]
    repeating = np.flatnonzero(repetition != 1)
    if len(repeating):
        at, ends = send(repeating), lengths[repeating]
        counts = _counts(logits, tokens, slots[repeating], np.zeros_like(ends), ends, send)
        before, penalty = logits.index_select(0, at), send(repetition[repeating])[:, None]
        after = torch.where(before < 0, before * penalty, before / penalty)
        logits = logits.index_copy(0, at, torch.where(counts > 0, after, before))

    presence, frequency = table.presence_penalty[slots], table.frequency_penalty[slots]
    counting = np.flatnonzero((presence != 0) | (frequency != 0))
    if len(counting):
        at, starts = send(counting), prompt_lengths[slots[counting]]
        counts = _counts(logits, tokens, slots[counting], starts, lengths[counting], send)
        each, once = send(frequency[counting])[:, None], send(presence[counting])[:, None]
        before = logits.index_select(0, at)
        logits = logits.index_copy(0, at, before - each * counts - once * (counts > 0))
    return logits


def _counts(
    logits: Tensor,
    tokens: Tensor,
    slots: Int32Array,
    starts: Int32Array,
    ends: Int32Array,
    send: Send,
) -> Tensor:
    """fp32 [n, V]: how often each token occurs from `starts` to `ends` of the slots' tokens."""
    vocabulary, width = logits.shape[1], int(ends.max())
    ids = tokens[:, :width].index_select(0, send(slots.astype(np.int64))).long()
    at = torch.arange(width, device=logits.device)
    bounds = send(starts.astype(np.int64))[:, None], send(ends.astype(np.int64))[:, None]
    # What is outside counts in a column of its own.
    ids = torch.where((at >= bounds[0]) & (at < bounds[1]), ids, vocabulary)
    counts = torch.zeros((len(slots), vocabulary + 1), device=logits.device)
    counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
    return counts[:, :vocabulary]


def _score(logits: Tensor, ids: Tensor, counts: Int32Array) -> tuple[Tensor, ...]:
    """The values of `Scores` for `ids`, int64 [n], and up to max(`counts`) likeliest ones."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    normalisers = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, ids[:, None])
    ranks = 1 + (logits > chosen).sum(dim=-1)
    top_ids = _ranked(logits, min(int(counts.max(initial=0)), logits.shape[1]))
    top = (logits.gather(1, top_ids) - normalisers).float()
    return ids, (chosen - normalisers)[:, 0].float(), ranks, top_ids, top


def _chunks(rows: Int64Array, vocabulary_size: int) -> Iterator[Int64Array]:
    size = max(1, CHUNK_ELEMENTS // vocabulary_size)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
