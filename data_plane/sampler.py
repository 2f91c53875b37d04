"""Draws the next tokens: what a request asks of sampling, as columns, and one call for a batch.

A draw is a pure function of (logits, the request's fields, its tokens so far, seed, sample index,
position). The generator is counter-based, so a sequence that moves to another batch, slot, leader
or engine goes on with the same tokens. A row's result does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]
_Entry = TypeVar("_Entry")

# Rows are worked on in chunks of at most this many logits, which bounds the sampler's own memory:
# a float64 tensor of a chunk takes 64 MiB, and about four of them live at a time.
CHUNK_ELEMENTS = 1 << 23
# A nucleus is looked for among this many likeliest tokens before the whole vocabulary is sorted.
CANDIDATES = 1024

_NAN, _UNBOUNDED, _NOTHING_LEFT = -1, -2, -3
_FAULTS = {
    _NAN: "the model gave NaN logits",
    _UNBOUNDED: "the model gave no finite logit, or an infinite one",
    _NOTHING_LEFT: "bias, penalties and banned stop ids leave no token to draw",
}


class SamplingTable:
    """What each slot's request asks of sampling; one array entry per slot.

    Ranges are those of `quire.inference.v1.Sampling`; who fills the table has checked them.
    """

    def __init__(self, max_slots: int, vocabulary_size: int) -> None:
        self.vocabulary_size = vocabulary_size
        self.temperature = np.zeros(max_slots, np.float32)  # 0: greedy
        self.top_k = np.zeros(max_slots, np.int32)  # 0: all
        self.top_p = np.ones(max_slots, np.float32)
        self.min_p = np.zeros(max_slots, np.float32)
        self.repetition_penalty = np.ones(max_slots, np.float32)
        self.presence_penalty = np.zeros(max_slots, np.float32)
        self.frequency_penalty = np.zeros(max_slots, np.float32)
        self.seed = np.zeros(max_slots, np.uint64)
        self.sample_index = np.zeros(max_slots, np.int32)
        # Tokens, prompt included, that a sequence must have before one of its stop ids is drawn.
        self.min_length = np.zeros(max_slots, np.int32)
        self.logprob_count = np.full(max_slots, -1, np.int32)  # -1: none
        self.prompt_logprob_count = np.full(max_slots, -1, np.int32)  # -1: none
        # Only slots that have them are here: int32 [n], and (int32 [n], float32 [n]).
        self.stop_ids: dict[int, Int32Array] = {}
        self.bias: dict[int, tuple[Int32Array, Float32Array]] = {}
        self._columns = [each for each in vars(self).values() if isinstance(each, np.ndarray)]
        self._defaults = [column[0] for column in self._columns] if max_slots else []

    def clear(self, slots: IndexArray) -> None:
        """Sets `slots`, int [n], back to the defaults: greedy, unfiltered, no log-probabilities."""
        for column, default in zip(self._columns, self._defaults, strict=True):
            column[slots] = default
        for slot in slots.tolist():
            self.stop_ids.pop(slot, None)
            self.bias.pop(slot, None)

    def copy(self, parents: IndexArray, children: IndexArray, sample_indexes: IndexArray) -> None:
        """Makes each child slot a copy of its parent's row, under its own sample index.

        All three are int [n]; no child is also a parent.
        """
        for column in self._columns:
            column[children] = column[parents]
        self.sample_index[children] = sample_indexes
        for parent, child in zip(parents.tolist(), children.tolist(), strict=True):
            _copy_entry(self.stop_ids, parent, child)
            _copy_entry(self.bias, parent, child)


def _copy_entry(entries: dict[int, _Entry], parent: int, child: int) -> None:
    if parent in entries:
        entries[child] = entries[parent]
    else:
        entries.pop(child, None)


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


def sample(
    logits: Tensor,
    logit_rows: IndexArray,
    slots: Int32Array,
    lengths: Int32Array,
    table: SamplingTable,
    tokens: Int32Array,
    prompt_lengths: Int32Array,
) -> Samples:
    """Draws one token for each of R rows.

    First bias, banned stop ids and penalties change the logits (repetition penalty: Keskar et al.,
    CTRL, arXiv 1909.05858); then come temperature, min-p, top-k and top-p in this order, each on
    what the former left. A row without any of these is one argmax over the logits as they are.

    Args:
        logits: [L, V], any float dtype and device; V at least the vocabulary's size.
        logit_rows: int [R], the row of `logits` for each draw; forks share one.
        slots: int32 [R].
        lengths: int32 [R], tokens the sequence has: the position of the one to be drawn.
        table: what the slots ask for.
        tokens: int32 [max_slots, max_length], the slots' tokens so far.
        prompt_lengths: int32 [max_slots]; tokens past them are output.
    """
    logits = logits[:, : table.vocabulary_size]
    ids = _argmax(logits)[logit_rows]
    busy = np.flatnonzero(_needs_more_than_argmax(slots, lengths, table) & (ids >= 0))
    for part in _chunks(busy, logits.shape[1]):
        ids[part] = _draw(
            logits[_on(logits, logit_rows[part])],
            slots[part],
            lengths[part],
            table,
            tokens,
            prompt_lengths,
        )
    scored = np.flatnonzero((table.logprob_count[slots] >= 0) & (ids >= 0))
    parts = [
        _logprobs(
            logits[_on(logits, logit_rows[part])],
            slots[part],
            lengths[part],
            ids[part],
            table.logprob_count[slots[part]],
        )
        for part in _chunks(scored, logits.shape[1])
    ]
    faults = [(row, _FAULTS[int(ids[row])]) for row in np.flatnonzero(ids < 0).tolist()]
    return Samples(
        token_ids=np.maximum(ids, -1).astype(np.int32),
        logprobs=Logprobs.concatenate(parts) if parts else None,
        faults=faults,
    )


def prompt_logprobs(
    logits: Tensor, slot: int, first_position: int, next_tokens: Int32Array, count: int
) -> Logprobs:
    """Scores the tokens that follow in the prompt, row by row.

    Args:
        logits: [T, V], any float dtype; no more columns than the vocabulary has.
        slot: the sequence's slot.
        first_position: position of `next_tokens[0]` in its sequence (1 for the second token).
        next_tokens: int32 [T], what really came after each row.
        count: how many of the likeliest tokens to give with each; 0 or more.
    """
    rows = np.arange(len(next_tokens))
    parts = [
        _logprobs(
            logits[_on(logits, part)],
            np.full(len(part), slot, np.int32),
            (first_position + part).astype(np.int32),
            next_tokens[part].astype(np.int64),
            np.full(len(part), count, np.int32),
        )
        for part in _chunks(rows, logits.shape[1])
    ]
    nothing = np.zeros(0, np.int32)
    if not parts:
        parts = [_logprobs(logits[:0], nothing, nothing, nothing.astype(np.int64), nothing)]
    return Logprobs.concatenate(parts)


def uniforms(
    seeds: npt.NDArray[np.uint64], sample_indexes: Int32Array, positions: Int32Array
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each row, float64 [n], a multiple of 2**-53."""
    counters = np.zeros((4, len(seeds)), np.uint64)
    counters[0] = positions.astype(np.uint32)
    counters[1] = sample_indexes.astype(np.uint32)
    keys = np.stack([seeds & _MASK, seeds >> _WORD])
    high, low, _, _ = philox(counters, keys)
    bits = ((high << _WORD) | low) >> np.uint64(11)
    numbers: npt.NDArray[np.float64] = bits * np.float64(2.0**-53)
    return numbers


_WORD = np.uint64(32)
_MASK = np.uint64(0xFFFFFFFF)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


def philox(
    counters: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC'11).

    Args:
        counters: uint64 [4, n], 32-bit words.
        keys: uint64 [2, n], 32-bit words.

    Returns: uint64 [4, n], 32-bit words.
    """
    a, b, c, d = counters
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b = (second >> _WORD) ^ b ^ keys[0], second & _MASK
        c, d = (first >> _WORD) ^ d ^ keys[1], first & _MASK
        keys = (keys + _WEYL) & _MASK
    return np.stack([a, b, c, d])


def _needs_more_than_argmax(
    slots: Int32Array, lengths: Int32Array, table: SamplingTable
) -> BoolArray:
    """bool [R]: rows whose logits are changed, or that are not greedy."""
    busy = table.temperature[slots] > 0
    busy |= table.repetition_penalty[slots] != 1
    busy |= table.presence_penalty[slots] != 0
    busy |= table.frequency_penalty[slots] != 0
    busy |= _among(slots, table.bias)
    busy |= _among(slots, table.stop_ids) & (lengths < table.min_length[slots])
    return busy


def _among(slots: Int32Array, entries: Mapping[int, object]) -> BoolArray:
    if not entries:
        return np.zeros(len(slots), np.bool_)
    return np.isin(slots, np.fromiter(entries, np.int32, len(entries)))


def _argmax(logits: Tensor) -> Int64Array:
    """int64 [L]: the likeliest id (the lowest of equals), or the code of a fault."""
    if logits.shape[0] == 0:
        return np.zeros(0, np.int64)
    # The maximum is NaN where any logit is.
    peaks, ids = logits.max(dim=-1)
    ids = torch.where(peaks.isinf(), _UNBOUNDED, torch.where(peaks.isnan(), _NAN, ids))
    return ids.cpu().numpy()


def _draw(
    logits: Tensor,
    slots: Int32Array,
    lengths: Int32Array,
    table: SamplingTable,
    tokens: Int32Array,
    prompt_lengths: Int32Array,
) -> Int64Array:
    """int64 [n]: ids or fault codes for a chunk of rows; `logits` [n, V] is the caller's copy."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    _apply_bias_and_bans(logits, slots, lengths, table)
    _apply_penalties(logits, slots, lengths, table, tokens, prompt_lengths)
    ids = _argmax(logits)
    ids[ids < 0] = _NOTHING_LEFT
    warm = np.flatnonzero((table.temperature[slots] > 0) & (ids >= 0))
    if len(warm):
        ids[warm] = _draw_warm(logits[_on(logits, warm)], slots[warm], lengths[warm], table)
    return ids


def _draw_warm(
    logits: Tensor, slots: Int32Array, lengths: Int32Array, table: SamplingTable
) -> Int64Array:
    """int64 [n]: an id of each row of finite peak, by inverting the distribution's cumulative sum.

    Weights are relative to the likeliest token's, which is exactly 1 at any temperature.
    """
    peaks = logits.amax(dim=-1, keepdim=True)
    weights = (logits - peaks).double()
    weights.div_(_on(logits, table.temperature[slots].astype(np.float64))[:, None]).exp_()
    min_p, top_k, top_p = table.min_p[slots], table.top_k[slots], table.top_p[slots]
    if min_p.any():
        weights.masked_fill_(weights < _on(logits, min_p)[:, None], 0)
    vocabulary = logits.shape[1]
    filtered = np.flatnonzero(((top_k > 0) & (top_k < vocabulary)) | (top_p < 1))
    if len(filtered):
        at = _on(logits, filtered)
        top_k = np.where(top_k > 0, np.minimum(top_k, vocabulary), vocabulary)[filtered]
        kept = _nucleus(logits[at], weights[at], top_k, top_p[filtered])
        weights[at] = weights[at] * kept

    sums = weights.cumsum(dim=-1)
    # A token without weight is never drawn, however sums round: its sum counts as 0 ...
    sums.mul_(weights > 0)
    total = sums.amax(dim=-1)
    target = _on(logits, uniforms(table.seed[slots], table.sample_index[slots], lengths)) * total
    # ... and some sum always lies above the target.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    above = (sums > target[:, None]).to(torch.uint8)
    return above.argmax(dim=-1).cpu().numpy()


def _nucleus(logits: Tensor, weights: Tensor, top_k: IndexArray, top_p: Float32Array) -> Tensor:
    """bool [n, V]: the tokens that top-k and then top-p keep.

    Args:
        logits: [n, V], by which tokens are ranked; equal ones by id.
        weights: float64 [n, V], a function of the row's logits.
        top_k: int [n] in [1, V]; V keeps all.
        top_p: float32 [n] in (0, 1]; the smallest set with this share of the mass is kept.
    """
    vocabulary = logits.shape[1]
    # Enough for top-k alone; a nucleus that does not fit is looked for again below.
    width = min(vocabulary, CANDIDATES, int(top_k.max()))
    kept = torch.empty_like(logits, dtype=torch.bool)
    wide = (top_k > width) & (top_k < vocabulary)
    narrow = np.flatnonzero(~wide)
    if len(narrow):
        at = _on(logits, narrow)
        part, part_k = logits[at], top_k[narrow]
        values, counts = _nucleus_sizes(part, weights[at], part_k, top_p[narrow], width)
        kept[at] = _largest(part, values, counts)
        wide[narrow] = (counts.cpu().numpy() == width) & (part_k > width)
    rest = np.flatnonzero(wide)
    if len(rest):
        at = _on(logits, rest)
        part = logits[at]
        kept[at] = _largest(
            part, *_nucleus_sizes(part, weights[at], top_k[rest], top_p[rest], vocabulary)
        )
    return kept


def _nucleus_sizes(
    logits: Tensor, weights: Tensor, top_k: IndexArray, top_p: Float32Array, width: int
) -> tuple[Tensor, Tensor]:
    """The `width` largest logits, [n, width], and how many of them are kept, int64 [n]."""
    values, ids = logits.topk(width, dim=-1)
    ranked = weights.gather(1, ids)
    inside = torch.arange(width, device=logits.device) < _on(logits, top_k)[:, None]
    sums = ranked.mul_(inside).cumsum(dim=-1)
    totals = sums[:, -1]
    if width < logits.shape[1] and (top_k > width).any():
        totals = torch.where(_on(logits, top_k > width), weights.cumsum(dim=-1)[:, -1], totals)
    # At 1 nothing may be cut, not even a tail too light to change the sum.
    share = _on(logits, np.where(top_p < 1, top_p, np.inf))
    before = torch.nn.functional.pad(sums[:, :-1], (1, 0))
    counts = (inside & (before < (share * totals)[:, None])).sum(dim=-1)
    return values, counts


def _largest(values: Tensor, ranked: Tensor, counts: Tensor) -> Tensor:
    """bool [n, V]: marks the `counts` largest entries of each row, the first ones among equals.

    Args:
        values: [n, V].
        ranked: [n, w], the largest of them in descending order; w at least every count.
        counts: int64 [n].
    """
    last = ranked.gather(1, (counts - 1).clamp(min=0)[:, None])
    equals = values == last
    room = counts - (ranked > last).sum(dim=-1)
    return (values > last) & (counts > 0)[:, None] | (
        equals & (equals.cumsum(dim=-1, dtype=torch.int32) <= room[:, None])
    )


def _apply_bias_and_bans(
    logits: Tensor, slots: Int32Array, lengths: Int32Array, table: SamplingTable
) -> None:
    biased = np.flatnonzero(_among(slots, table.bias))
    if len(biased):
        entries = [table.bias[slot] for slot in slots[biased].tolist()]
        rows = np.repeat(biased, [len(ids) for ids, _ in entries])
        ids = np.concatenate([ids for ids, _ in entries]).astype(np.int64)
        values = np.concatenate([values for _, values in entries])
        at = (_on(logits, rows), _on(logits, ids))
        logits[at] = logits[at] + _on(logits, values).to(logits.dtype)
    early = np.flatnonzero(_among(slots, table.stop_ids) & (lengths < table.min_length[slots]))
    if len(early):
        stops = [table.stop_ids[slot] for slot in slots[early].tolist()]
        rows = np.repeat(early, [len(ids) for ids in stops])
        ids = np.concatenate(stops).astype(np.int64)
        logits[_on(logits, rows), _on(logits, ids)] = -torch.inf


def _apply_penalties(
    logits: Tensor,
    slots: Int32Array,
    lengths: Int32Array,
    table: SamplingTable,
    tokens: Int32Array,
    prompt_lengths: Int32Array,
) -> None:
    repetition = table.repetition_penalty[slots]
    repeating = np.flatnonzero(repetition != 1)
    if len(repeating):
        rows, ids = _history(tokens, slots, np.zeros_like(lengths), lengths, repeating)
        at = (_on(logits, rows), _on(logits, ids))
        seen, penalty = logits[at], _on(logits, repetition[rows])
        # A token seen twice is written twice, with the same value.
        logits[at] = torch.where(seen < 0, seen * penalty, seen / penalty)

    presence, frequency = table.presence_penalty[slots], table.frequency_penalty[slots]
    counting = np.flatnonzero((presence != 0) | (frequency != 0))
    if len(counting):
        rows, ids = _history(tokens, slots, prompt_lengths[slots], lengths, counting)
        counts = torch.zeros((len(counting), logits.shape[1]), device=logits.device)
        at = (_on(logits, np.searchsorted(counting, rows)), _on(logits, ids))
        counts.index_put_(at, torch.ones((), device=logits.device), accumulate=True)
        at_rows = _on(logits, counting)
        each = _on(logits, frequency[counting])[:, None]
        once = _on(logits, presence[counting])[:, None]
        logits[at_rows] = logits[at_rows] - each * counts - once * (counts > 0)


def _history(
    tokens: Int32Array, slots: Int32Array, starts: Int32Array, ends: Int32Array, rows: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """(row, token id), both int64 [N], of the tokens from `starts` to `ends` of the given rows."""
    counts = np.maximum(ends[rows] - starts[rows], 0).astype(np.int64)
    owners = np.repeat(rows, counts)
    offsets = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owners, tokens[slots[owners], starts[owners] + offsets].astype(np.int64)


def _logprobs(
    logits: Tensor, slots: Int32Array, positions: Int32Array, ids: Int64Array, counts: Int32Array
) -> Logprobs:
    """Log-probabilities of `ids`, int64 [n], and of the `counts` likeliest, for `logits` [n, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    normalisers = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, _on(logits, ids)[:, None])
    ranks = 1 + (logits > chosen).sum(dim=-1)
    counts = np.minimum(counts, logits.shape[1]).astype(np.int32)
    width = max(int(counts.max(initial=0)), 1)
    # Equal logits are common in bfloat16, and `topk` does not say which of them it takes.
    marked = _largest(logits, logits.topk(width, dim=-1).values, _on(logits, counts).long())
    at = marked.nonzero(as_tuple=True)
    top = (logits[at] - normalisers[at[0], 0]).float().cpu().numpy()
    top_rows, top_ids, top_logits = (each.cpu().numpy() for each in (*at, logits[at]))
    order = np.lexsort((top_ids, -top_logits, top_rows))
    return Logprobs(
        slots=slots,
        positions=positions,
        token_ids=ids.astype(np.int32),
        logprobs=(chosen - normalisers)[:, 0].float().cpu().numpy(),
        ranks=ranks.cpu().numpy().astype(np.int32),
        top_counts=counts,
        top_token_ids=top_ids[order].astype(np.int32),
        top_logprobs=top[order],
    )


def _chunks(rows: Int64Array, vocabulary_size: int) -> Iterator[Int64Array]:
    size = max(1, CHUNK_ELEMENTS // vocabulary_size)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _on(tensor: Tensor, array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor.device)
