"""Refuses step plans that do not fit the engine's state, before anything is changed.

Every id that comes over the wire is checked here, so that the rest of the engine may index with it.
The checks follow a plan in the order in which it is applied, on a preview of the columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_plane.plan import Admissions, Int32Array, PlanColumns, PlanError
from data_plane.sampling_wire import check_sampling
from data_plane.state import ResidentState

BoolArray = npt.NDArray[np.bool_]


def check_plan(plan: PlanColumns, state: ResidentState, max_step_tokens: int) -> None:
    """Raises PlanError ("INVALID" or "DRIFT") unless `plan` can be executed on `state`."""
    _same_length(plan)
    _in_range("touched_slots", plan.touched_slots, state.slot_count)
    if not np.array_equal(state.token_count[plan.touched_slots], plan.touched_token_counts):
        wrong = state.token_count[plan.touched_slots] != plan.touched_token_counts
        slots = plan.touched_slots[wrong][:8].tolist()
        raise PlanError("DRIFT", f"slots {slots} do not have the expected token counts")
    _in_range("hashed_blocks", plan.hashed_blocks, state.block_count)
    preview = _Preview(plan, state)
    preview.release()
    preview.branch()
    preview.swap()
    preview.truncate()
    if plan.admissions is not None:
        preview.admit(plan.admissions)
    preview.append()
    preview.copy()
    preview.regroup()
    preview.run(max_step_tokens)


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
    ("beam_slots", "beam_parents"),
    ("beam_slots", "beam_tokens"),
    ("hashed_blocks", "block_hashes"),
)


def _same_length(plan: PlanColumns) -> None:
    for left, right in _PARALLEL:
        if len(getattr(plan, left)) != len(getattr(plan, right)):
            raise PlanError("INVALID", f"{left} and {right} differ in length")


def _in_range(name: str, values: Int32Array, end: int, begin: int = 0) -> None:
    if len(values) and (values.min() < begin or values.max() >= end):
        raise PlanError("INVALID", f"{name}: an id is outside [{begin}, {end})")


def _distinct(name: str, values: npt.NDArray[np.integer]) -> None:
    if len(np.unique(values)) != len(values):
        raise PlanError("INVALID", f"{name}: an id occurs twice")


def _all(name: str, holds: BoolArray, what: str, reason: str = "INVALID") -> None:
    if not holds.all():
        raise PlanError(reason, f"{name}: {what}")


class _Preview:
    """The state's columns as a plan's moves leave them, one move after the other."""

    def __init__(self, plan: PlanColumns, state: ResidentState) -> None:
        self.plan, self.state = plan, state
        self.lengths = state.token_count.copy()
        self.computed = state.computed.copy()
        self.table_length = state.table_length.copy()
        self.decoding = state.decoding.copy()
        self.swapped = state.swapped.copy()
        # A pool may have very many blocks, and a steady step takes a few fresh ones at most.
        steady = plan.admissions is None and not (
            len(plan.released_slots) + len(plan.swap_out_slots) + len(plan.swap_in_slots)
            + len(plan.truncated_slots) + len(plan.copied_slots)
        )  # fmt: skip
        self.references = state.reference_counts if steady else state.reference_counts.copy()
        self.fresh: list[Int32Array] = []

    def release(self) -> None:
        slots = self.plan.released_slots
        if not len(slots):
            return
        _in_range("released_slots", slots, self.state.slot_count)
        _distinct("released_slots", slots)
        _all("released_slots", self.lengths[slots] > 0, "an empty slot", "DRIFT")
        for slot in slots.tolist():
            self._drop_references(slot)
        self.lengths[slots] = self.table_length[slots] = 0
        self.decoding[slots] = self.swapped[slots] = False

    def swap(self) -> None:
        plan, state = self.plan, self.state
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
        _all("swap_in_slots", ~np.isin(plan.swap_in_slots, plan.swap_out_slots), "swapped twice")
        self._swap(plan.swap_out_slots, plan.swap_out_blocks, out=True)
        occupied = [
            state.table(slot) for slot in np.flatnonzero(state.swapped & self.swapped).tolist()
        ]
        if occupied:
            free = ~np.isin(plan.swap_out_targets, np.concatenate(occupied))
            _all("swap_out_targets", free, "a host block is in use", "DRIFT")
        self._swap(plan.swap_in_slots, plan.swap_in_blocks, out=False)
        self._take_fresh("swap_in_targets", plan.swap_in_targets)

    def _swap(self, slots: Int32Array, blocks: Int32Array, *, out: bool) -> None:
        for slot in slots.tolist():
            if not self.lengths[slot] or self.swapped[slot] == out:
                raise PlanError("DRIFT", f"slot {slot} cannot be swapped {'out' if out else 'in'}")
            if not np.isin(self.state.table(slot), blocks).all():
                raise PlanError("INVALID", f"slot {slot}: a block of its table is not swapped")
            self._drop_references(slot)
            self.swapped[slot] = out
            self.decoding[slot] = False

    def truncate(self) -> None:
        slots, counts = self.plan.truncated_slots, self.plan.truncated_token_counts
        if not len(slots):
            return
        self._resident("truncated_slots", slots)
        _distinct("truncated_slots", slots)
        _all("truncated_token_counts", (counts >= 1) & (counts <= self.lengths[slots]),
             "not within the slot's tokens", "DRIFT")  # fmt: skip
        self.lengths[slots] = counts
        self.computed[slots] = np.minimum(self.computed[slots], counts - 1)
        kept = np.minimum(-(-counts // self.state.block_size), self.table_length[slots])
        for slot, keep in zip(slots.tolist(), kept.tolist(), strict=True):
            self.references[self.state.tables[slot, keep : self.table_length[slot]]] -= 1
        self.table_length[slots] = kept

    def admit(self, rows: Admissions) -> None:
        state, slots = self.state, rows.slots
        _in_range("admissions.slots", slots, state.slot_count)
        _distinct("admissions.slots", slots)
        _all("admissions.slots", self.lengths[slots] == 0, "a slot is not empty", "DRIFT")
        _check_counts(rows, state)
        _in_range("admissions.token_ids", rows.token_ids, state.vocabulary_size)
        _in_range("admissions.block_ids", rows.block_ids, state.block_count)
        check_sampling(rows, state.vocabulary_size)
        shared, fresh = _cut(rows, state.block_size)
        # A block that is shared has content: it is in a table, or full and known by its hash, if
        # only by one that this plan brings, for a sequence that it releases or computes.
        announced = self.plan.hashed_blocks
        known = (self.references[shared] > 0) | state.hashed[shared] | np.isin(shared, announced)
        _all("admissions.block_ids", known, "a cached block holds nothing", "DRIFT")
        _all("admissions.block_ids", ~np.isin(fresh, shared) | np.isin(fresh, announced),
             "a block is both cached and new")  # fmt: skip
        row = np.repeat(np.arange(len(slots), dtype=np.int64), rows.block_counts)
        _distinct("admissions.block_ids", row * state.block_count + rows.block_ids)
        self._take_fresh("admissions.block_ids", fresh)
        self.references[shared] += 1
        self.lengths[slots] = rows.token_counts
        self.computed[slots] = np.minimum(rows.cached_token_counts, rows.token_counts - 1)
        self.table_length[slots] = rows.block_counts
        self.decoding[slots] = self.swapped[slots] = False

    def branch(self) -> None:
        """Beams become copies of their parents, all at once."""
        slots, parents = self.plan.beam_slots, self.plan.beam_parents
        if not len(slots):
            return
        self._resident("beam_slots", slots)
        self._resident("beam_parents", parents)
        _distinct("beam_slots", slots)
        _in_range("beam_tokens", self.plan.beam_tokens, self.state.vocabulary_size)
        drawn = (self.computed[parents] == self.lengths[parents] - 1) & (self.lengths[parents] > 1)
        _all("beam_parents", drawn, "a slot has no token that was drawn last", "DRIFT")
        # What the plan does to tables later is previewed on those of the resident state.
        plan = self.plan
        later = (plan.swap_out_slots, plan.swap_in_slots, plan.truncated_slots)
        _all("beam_slots", ~np.isin(slots, np.concatenate(later)), "a slot is moved as well")
        if self.references is self.state.reference_counts:
            self.references = self.references.copy()
        for slot, parent in zip(slots.tolist(), parents.tolist(), strict=True):
            np.add.at(self.references, self.state.table(parent), 1)
            np.subtract.at(self.references, self.state.table(slot), 1)
        for name in ("lengths", "computed", "table_length"):
            column = getattr(self, name)
            column[slots] = column[parents]
        self.decoding[slots] = False

    def append(self) -> None:
        slots, blocks = self.plan.appended_slots, self.plan.appended_blocks
        if not len(slots):
            return
        self._resident("appended_slots", slots)
        _in_range("appended_blocks", blocks, self.state.block_count)
        self.table_length += np.bincount(slots, minlength=self.state.slot_count).astype(np.int32)
        _all("appended_slots", self.table_length[slots] <= self.state.table_width,
             "a block table would overflow")  # fmt: skip
        self._take_fresh("appended_blocks", blocks)

    def copy(self) -> None:
        slots, indexes = self.plan.copied_slots, self.plan.copied_indexes
        if not len(slots):
            return
        self._resident("copied_slots", slots)
        _in_range("copied_blocks", self.plan.copied_blocks, self.state.block_count)
        _all("copied_indexes", (indexes >= 0) & (indexes < self.table_length[slots]),
             "outside the block table")  # fmt: skip
        _distinct("copied_indexes", slots.astype(np.int64) * self.state.table_width + indexes)
        self._take_fresh("copied_blocks", self.plan.copied_blocks)

    def regroup(self) -> None:
        """The decode batch: leaves, then joins."""
        leaves, joins = self.plan.decode_leaves, self.plan.decode_joins
        self._resident("decode_leaves", leaves)
        self._resident("decode_joins", joins)
        _all("decode_joins", self.computed[joins] == self.lengths[joins] - 1,
             "a slot has tokens that are not computed", "DRIFT")  # fmt: skip
        # Blocks come back beside the forward pass, for a later plan.
        for name in ("decode_joins", "chunk_slots", "copied_slots"):
            back = np.isin(getattr(self.plan, name), self.plan.swap_in_slots)
            _all(name, ~back, "a slot comes back from the host in this plan")
        self.decoding[leaves] = False
        self.decoding[joins] = True

    def run(self, max_step_tokens: int) -> None:
        plan, slots, counts = self.plan, self.plan.chunk_slots, self.plan.chunk_token_counts
        capacity = self.table_length * self.state.block_size
        _all("decode batch", capacity[self.decoding] > self.computed[self.decoding],
             "a slot has no block for its next token", "DRIFT")  # fmt: skip
        self._resident("chunk_slots", slots)
        _distinct("chunk_slots", slots)
        _all("chunk_slots", ~self.decoding[slots], "a slot decodes already", "DRIFT")
        ends = self.computed[slots] + counts
        _all("chunk_token_counts", (counts >= 1) & (ends <= self.lengths[slots]),
             "more tokens than the slot has left", "DRIFT")  # fmt: skip
        _all("chunk_slots", ends <= capacity[slots], "a slot has no block for its tokens", "DRIFT")
        total = int(np.count_nonzero(self.decoding)) + int(counts.sum())
        if total > max_step_tokens:
            raise PlanError("INVALID", f"{total} tokens are more than a step's {max_step_tokens}")
        sampled = slots[ends == self.lengths[slots]]
        longest = self.state.max_length
        _all("decode batch", self.lengths[self.decoding] <= longest, "a slot is at its limit")
        _all("chunk_slots", self.lengths[sampled] <= longest, "a slot is at its limit")
        _all("fork_parents", np.isin(plan.fork_parents, sampled), "a slot is not sampled", "DRIFT")
        _in_range("fork_children", plan.fork_children, self.state.slot_count)
        _distinct("fork_children", plan.fork_children)
        _all("fork_children", self.lengths[plan.fork_children] == 0, "a slot is not empty",
             "DRIFT")  # fmt: skip

    def _resident(self, name: str, slots: Int32Array) -> None:
        if len(slots):
            _in_range(name, slots, self.state.slot_count)
            _all(name, self.lengths[slots] > 0, "an empty slot", "DRIFT")
            _all(name, ~self.swapped[slots], "a slot is swapped out", "DRIFT")

    def _drop_references(self, slot: int) -> None:
        if not self.swapped[slot]:
            self.references[self.state.table(slot)] -= 1

    def _take_fresh(self, name: str, blocks: Int32Array) -> None:
        """A block that is to be written must not be in any table, nor be taken twice."""
        _distinct(name, blocks)
        _all(name, self.references[blocks] == 0, "a block is in use", "DRIFT")
        if any(np.isin(blocks, taken).any() for taken in self.fresh):
            raise PlanError("INVALID", f"{name}: a block is taken twice")
        self.fresh.append(blocks)


def _check_counts(rows: Admissions, state: ResidentState) -> None:
    for name in ("requests", "sample_indexes", "prompt_token_counts", "token_counts",
                 "block_counts", "cached_token_counts"):  # fmt: skip
        if len(getattr(rows, name)) != len(rows.slots):
            raise PlanError("INVALID", f"admissions.{name}: not one entry per slot")
    counts, blocks, cached = rows.token_counts, rows.block_counts, rows.cached_token_counts
    _in_range("admissions.token_counts", counts, state.max_length + 1, 1)
    _all("admissions.prompt_token_counts",
         (rows.prompt_token_counts >= 1) & (rows.prompt_token_counts <= counts),
         "not within the tokens")  # fmt: skip
    _all("admissions.block_counts",
         (blocks >= -(-counts // state.block_size)) & (blocks <= state.table_width),
         "does not hold the tokens")  # fmt: skip
    _all("admissions.cached_token_counts",
         (cached >= 0) & (cached <= counts) & (cached % state.block_size == 0),
         "not whole blocks within the tokens")  # fmt: skip
    if counts.sum() != len(rows.token_ids) or blocks.sum() != len(rows.block_ids):
        raise PlanError("INVALID", "admissions: ids do not add up to their counts")


def _cut(rows: Admissions, block_size: int) -> tuple[Int32Array, Int32Array]:
    """Returns all admissions' (cached, new) blocks."""
    index = np.arange(len(rows.block_ids)) - np.repeat(
        np.cumsum(rows.block_counts) - rows.block_counts, rows.block_counts
    )
    cached = index < np.repeat(rows.cached_token_counts // block_size, rows.block_counts)
    return rows.block_ids[cached], rows.block_ids[~cached]
