"""Refuses step plans that do not fit the engine's state, before anything is changed.

Every id that comes over the wire is checked here, so that the rest of the engine may index with it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_plane.plan import Admissions, Int32Array, PlanColumns, PlanError
from data_plane.sampling_wire import check_sampling
from data_plane.state import ResidentState


def check_plan(plan: PlanColumns, state: ResidentState, max_step_tokens: int) -> None:
    """Raises PlanError ("INVALID" or "DRIFT") unless `plan` can be executed on `state`."""
    _same_length(plan)
    _in_range("touched_slots", plan.touched_slots, state.slot_count)
    if not np.array_equal(state.token_count[plan.touched_slots], plan.touched_token_counts):
        wrong = state.token_count[plan.touched_slots] != plan.touched_token_counts
        slots = plan.touched_slots[wrong][:8].tolist()
        raise PlanError("DRIFT", f"slots {slots} do not have the expected token counts")
    lengths = _lengths_after_admission(plan, state)
    _check_swaps(plan, state)
    _check_growth(plan, state, lengths)
    _check_run(plan, state, lengths, max_step_tokens)
    _check_fresh_blocks(plan, state)
    _in_range("hashed_blocks", plan.hashed_blocks, state.block_count)


_PARALLEL = (
    ("touched_slots", "touched_token_counts"),
    ("swap_out_blocks", "swap_out_targets"),
    ("swap_in_blocks", "swap_in_targets"),
    ("truncated_slots", "truncated_token_counts"),
    ("appended_slots", "appended_blocks"),
    ("copied_slots", "copied_indexes"),
    ("copied_slots", "copied_blocks"),
    ("chunk_slots", "chunk_token_counts"),
    ("fork_parents", "fork_children"),
    ("fork_parents", "fork_sample_indexes"),
    ("hashed_blocks", "block_hashes"),
)


def _same_length(plan: PlanColumns) -> None:
    for left, right in _PARALLEL:
        if len(getattr(plan, left)) != len(getattr(plan, right)):
            raise PlanError("INVALID", f"{left} and {right} differ in length")


def _in_range(name: str, values: Int32Array, end: int, begin: int = 0) -> None:
    if len(values) and (values.min() < begin or values.max() >= end):
        raise PlanError("INVALID", f"{name}: an id is outside [{begin}, {end})")


def _distinct(name: str, values: Int32Array) -> None:
    if len(np.unique(values)) != len(values):
        raise PlanError("INVALID", f"{name}: an id occurs twice")


def _all(name: str, holds: npt.NDArray[np.bool_], what: str, reason: str = "INVALID") -> None:
    if not holds.all():
        raise PlanError(reason, f"{name}: {what}")


def _lengths_after_admission(plan: PlanColumns, state: ResidentState) -> Int32Array:
    """Checks releases, truncations and admissions; returns each slot's token count after them."""
    lengths = state.token_count
    if len(plan.released_slots):
        _in_range("released_slots", plan.released_slots, state.slot_count)
        _distinct("released_slots", plan.released_slots)
        _all("released_slots", lengths[plan.released_slots] > 0, "an empty slot", "DRIFT")
        lengths = lengths.copy()
        lengths[plan.released_slots] = 0
    if len(plan.truncated_slots):
        _in_range("truncated_slots", plan.truncated_slots, state.slot_count)
        _distinct("truncated_slots", plan.truncated_slots)
        counts = plan.truncated_token_counts
        fits = (counts >= 1) & (counts <= lengths[plan.truncated_slots])
        _all("truncated_token_counts", fits, "not below the slot's token count", "DRIFT")
        _all("truncated_slots", ~state.swapped[plan.truncated_slots], "a swapped slot")
        lengths = lengths.copy()
        lengths[plan.truncated_slots] = counts
    if plan.admissions is not None:
        _check_admissions(plan.admissions, state, lengths)
        lengths = lengths.copy()
        lengths[plan.admissions.slots] = plan.admissions.token_counts
    return lengths


def _check_admissions(rows: Admissions, state: ResidentState, lengths: Int32Array) -> None:
    _in_range("admissions.slots", rows.slots, state.slot_count)
    _distinct("admissions.slots", rows.slots)
    _all("admissions.slots", lengths[rows.slots] == 0, "a slot is not empty", "DRIFT")
    for name in ("requests", "sample_indexes", "prompt_token_counts", "token_counts",
                 "block_counts", "cached_token_counts"):  # fmt: skip
        if len(getattr(rows, name)) != len(rows.slots):
            raise PlanError("INVALID", f"admissions.{name}: not one entry per slot")
    counts, blocks = rows.token_counts, rows.block_counts
    _in_range("admissions.token_counts", counts, state.max_length + 1, 1)
    _all("admissions.prompt_token_counts", (rows.prompt_token_counts >= 1)
         & (rows.prompt_token_counts <= counts), "not within the tokens")  # fmt: skip
    needed = -(-counts // state.block_size)
    _all("admissions.block_counts", (blocks >= needed) & (blocks <= state.table_width),
         "does not hold the tokens")  # fmt: skip
    if counts.sum() != len(rows.token_ids) or blocks.sum() != len(rows.block_ids):
        raise PlanError("INVALID", "admissions: ids do not add up to their counts")
    _in_range("admissions.token_ids", rows.token_ids, state.vocabulary_size)
    _in_range("admissions.block_ids", rows.block_ids, state.block_count)
    cached = rows.cached_token_counts
    _all("admissions.cached_token_counts",
         (cached >= 0) & (cached <= counts) & (cached % state.block_size == 0),
         "not whole blocks within the tokens")  # fmt: skip
    check_sampling(rows, state.vocabulary_size)


def _check_swaps(plan: PlanColumns, state: ResidentState) -> None:
    if not (len(plan.swap_out_blocks) or len(plan.swap_in_blocks)
            or len(plan.swap_out_slots) or len(plan.swap_in_slots)):  # fmt: skip
        return
    for name, end in (
        ("swap_out_slots", state.slot_count),
        ("swap_in_slots", state.slot_count),
        ("swap_out_blocks", state.block_count),
        ("swap_out_targets", state.host_block_count),
        ("swap_in_blocks", state.host_block_count),
        ("swap_in_targets", state.block_count),
    ):
        _in_range(name, getattr(plan, name), end)
        _distinct(name, getattr(plan, name))
    for slots, blocks, out in (
        (plan.swap_out_slots, plan.swap_out_blocks, True),
        (plan.swap_in_slots, plan.swap_in_blocks, False),
    ):
        for slot in slots.tolist():
            if not state.token_count[slot] or state.swapped[slot] == out:
                raise PlanError("DRIFT", f"slot {slot} cannot be swapped {'out' if out else 'in'}")
            if not np.isin(state.table(slot), blocks).all():
                raise PlanError("INVALID", f"slot {slot}: a block of its table is not swapped")


def _check_growth(plan: PlanColumns, state: ResidentState, lengths: Int32Array) -> None:
    _in_range("appended_slots", plan.appended_slots, state.slot_count)
    _in_range("appended_blocks", plan.appended_blocks, state.block_count)
    _in_range("copied_slots", plan.copied_slots, state.slot_count)
    _in_range("copied_blocks", plan.copied_blocks, state.block_count)
    _all("appended_slots", lengths[plan.appended_slots] > 0, "an empty slot", "DRIFT")
    _all("copied_slots", lengths[plan.copied_slots] > 0, "an empty slot", "DRIFT")
    if len(plan.appended_slots):
        grown = (
            state.table_length[plan.appended_slots]
            + np.bincount(plan.appended_slots, minlength=state.slot_count)[plan.appended_slots]
        )
        _all("appended_slots", grown <= state.table_width, "a block table would overflow")
    if len(plan.copied_slots):
        within = (plan.copied_indexes >= 0) & (
            plan.copied_indexes < state.table_length[plan.copied_slots]
        )
        _all("copied_indexes", within, "outside the block table")


def _check_run(
    plan: PlanColumns, state: ResidentState, lengths: Int32Array, max_step_tokens: int
) -> None:
    for name in ("decode_joins", "decode_leaves", "chunk_slots", "fork_parents"):
        slots = getattr(plan, name)
        _in_range(name, slots, state.slot_count)
        _all(name, lengths[slots] > 0, "an empty slot", "DRIFT")
    _distinct("chunk_slots", plan.chunk_slots)
    admitted = plan.admissions.slots if plan.admissions is not None else plan.released_slots[:0]
    joins = plan.decode_joins
    _all("decode_joins", (state.computed[joins] == lengths[joins] - 1) & ~np.isin(joins, admitted),
         "a slot has tokens that are not computed", "DRIFT")  # fmt: skip
    decoding = state.decoding.copy()
    decoding[plan.released_slots] = False
    decoding[plan.swap_out_slots] = False
    decoding[plan.decode_leaves] = False
    decoding[joins] = True
    capacity = (
        state.table_length + np.bincount(plan.appended_slots, minlength=state.slot_count)
    ) * state.block_size
    _all("appended_slots", capacity[decoding] > state.computed[decoding],
         "a decoding slot has no block for its next token", "DRIFT")  # fmt: skip
    total = int(np.count_nonzero(decoding))
    if len(plan.chunk_slots):
        total += _check_chunks(plan, state, lengths, decoding)
    if total > max_step_tokens:
        raise PlanError("INVALID", f"{total} tokens are more than a step's {max_step_tokens}")
    children = plan.fork_children
    _in_range("fork_children", children, state.slot_count)
    _distinct("fork_children", children)
    _all("fork_children", lengths[children] == 0, "a slot is not empty", "DRIFT")


def _check_chunks(
    plan: PlanColumns,
    state: ResidentState,
    lengths: Int32Array,
    decoding: npt.NDArray[np.bool_],
) -> int:
    slots, counts = plan.chunk_slots, plan.chunk_token_counts
    computed = state.computed.copy()
    if plan.admissions is not None:
        rows = plan.admissions
        computed[rows.slots] = np.minimum(rows.cached_token_counts, rows.token_counts - 1)
    _all("chunk_token_counts", (counts >= 1) & (computed[slots] + counts <= lengths[slots]),
         "more tokens than the slot has left", "DRIFT")  # fmt: skip
    _all("chunk_slots", ~decoding[slots], "a slot decodes already", "DRIFT")
    sampled = slots[computed[slots] + counts == lengths[slots]]
    _all("fork_parents", np.isin(plan.fork_parents, sampled), "a slot is not sampled", "DRIFT")
    return int(counts.sum())


def _check_fresh_blocks(plan: PlanColumns, state: ResidentState) -> None:
    """A block that is to be written must not be in any other sequence's table."""
    fresh = [plan.appended_blocks, plan.copied_blocks]
    if plan.admissions is not None:
        fresh.append(_fresh_of(plan.admissions, state.block_size))
    blocks = np.concatenate(fresh)
    if not len(blocks):
        return
    _distinct("new blocks", blocks)
    references = state.reference_counts
    gone = [slot for slot in plan.released_slots.tolist() + plan.swap_out_slots.tolist()
            if not state.swapped[slot]]  # fmt: skip
    if gone:
        references = references.copy()
        for slot in gone:
            references[state.table(slot)] -= 1
    _all("new blocks", references[blocks] == 0, "a block is in use", "DRIFT")


def _fresh_of(rows: Admissions, block_size: int) -> Int32Array:
    ends = np.cumsum(rows.block_counts)
    begins = ends - rows.block_counts + rows.cached_token_counts // block_size
    parts = [
        rows.block_ids[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
    ]
    return np.concatenate(parts) if parts else rows.block_ids[:0]
