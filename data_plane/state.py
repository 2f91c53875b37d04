"""What is resident on an engine: sequences, block tables and block hashes, in NumPy columns.

The mirror of the control plane's slot table, and the truth that a new leader reads. This module
alone knows its layout on this plane. It touches no device memory: it says which blocks to copy,
and lays out what a step runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_plane.plan import HASH_BYTES, Admissions, Int32Array, PlanColumns
from data_plane.sampling_table import SamplingTable
from data_plane.sampling_wire import assign_sampling

Int64Array = npt.NDArray[np.int64]

# A reference, of the counts' own type: `ufunc.at` is forty times slower when it has to convert.
ONE = np.int32(1)

# Columns that a copy of a sequence has from its parent.
_INHERITED = ("token_count", "prompt_count", "cached", "table_length", "faulted")


@dataclass(frozen=True, slots=True)
class Moves:
    """Blocks to copy before the forward pass, in this order; int32 [n] each."""

    swap_out: tuple[Int32Array, Int32Array]
    swap_in: tuple[Int32Array, Int32Array]
    copies: tuple[Int32Array, Int32Array]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's packed batch: decodes by ascending slot, then chunks in the plan's order.

    T tokens of S sequences; R of them are sampled.

    Attributes:
        slots: int32 [S].
        counts: int32 [S], tokens of each sequence in this step.
        decode_count: how many of the sequences are decodes.
        token_slots: int64 [T]; with `positions` it says where the tokens' ids are.
        positions, slot_mapping: int64 [T]; a mapping of -1 writes no key and value.
        query_starts: int32 [S + 1].
        context_lengths: int32 [S], keys of each sequence, this step's included.
        block_tables: int32 [S, B].
        logit_rows: int64 [L], tokens whose logits are wanted: the sampled ones, then prompt rows.
        sampled_slots: int32 [R]: slots in the order of the result, forks included.
        sampled_logits: int64 [R], row of the logits that each is sampled from.
        prompt_rows: (slot, first position, rows) of chunks that want prompt log-probabilities.
    """

    slots: Int32Array
    counts: Int32Array
    decode_count: int
    token_slots: Int64Array
    positions: Int64Array
    slot_mapping: Int64Array
    query_starts: Int32Array
    context_lengths: Int32Array
    block_tables: Int32Array
    logit_rows: Int64Array
    sampled_slots: Int32Array
    sampled_logits: Int64Array
    prompt_rows: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Awaited:
    """Tokens that are counted already and whose ids are still to come.

    Attributes:
        slots: int32 [R].
        occupancies: int64 [R], which occupant of its slot each was sampled for.
        positions: int64 [R], in their sequences.
    """

    slots: Int32Array
    occupancies: Int64Array
    positions: Int64Array


class ResidentState:
    """Columns by slot and by block.

    Attributes:
        token_count: prompt and output tokens, 0 where the slot is empty.
        computed: tokens whose keys and values are in blocks.
        cached: tokens that are never written again, because their blocks may be shared.
        decoding: the decode batch kept between steps.
        faulted: a sample has faulted, so that the tokens from there on mean nothing.
        occupancy: which occupant of the slot this is.
        tokens: int32 [slots, length], without ids that are awaited; tables: int32 [slots, blocks].
        reference_counts: int32 [blocks]; hashed: bool [blocks]; hashes: uint8 [blocks, 16].
    """

    def __init__(
        self,
        slot_count: int,
        max_length: int,
        block_size: int,
        block_count: int,
        host_block_count: int,
        vocabulary_size: int,
    ) -> None:
        self.slot_count, self.max_length = slot_count, max_length
        self.block_size, self.block_count = block_size, block_count
        self.host_block_count = host_block_count
        self.vocabulary_size = vocabulary_size
        self.token_count = np.zeros(slot_count, np.int32)
        self.prompt_count = np.zeros(slot_count, np.int32)
        self.computed = np.zeros(slot_count, np.int32)
        self.cached = np.zeros(slot_count, np.int32)
        self.table_length = np.zeros(slot_count, np.int32)
        self.decoding = np.zeros(slot_count, np.bool_)
        self.swapped = np.zeros(slot_count, np.bool_)
        self.faulted = np.zeros(slot_count, np.bool_)
        self.occupancy = np.zeros(slot_count, np.int64)
        self.tokens = np.zeros((slot_count, max_length + 1), np.int32)
        self.table_width = -(-max_length // block_size) + 1
        self.tables = np.zeros((slot_count, self.table_width), np.int32)
        self.requests: list[bytes] = [b""] * slot_count
        self.sampling = SamplingTable(slot_count, vocabulary_size)
        self.reference_counts = np.zeros(block_count, np.int32)
        self.hashed = np.zeros(block_count, np.bool_)
        self.hashes = np.zeros((block_count, HASH_BYTES), np.uint8)

    # Moves.

    def apply_moves(self, plan: PlanColumns) -> Moves:
        """Applies all of a checked plan that precedes its forward pass."""
        self.release(plan.released_slots)
        if len(plan.beam_slots):
            self._branch(plan.beam_slots, plan.beam_parents, plan.beam_tokens)
        swap_out = self._swap(plan.swap_out_slots, plan.swap_out_blocks, plan.swap_out_targets)
        swap_in = self._swap(plan.swap_in_slots, plan.swap_in_blocks, plan.swap_in_targets)
        self._truncate(plan.truncated_slots, plan.truncated_token_counts)
        if plan.admissions is not None:
            self._admit(plan.admissions)
        if len(plan.appended_slots):
            self._append(plan.appended_slots, plan.appended_blocks)
        copies = self._copy_on_write(plan)
        self.decoding[plan.decode_leaves] = False
        self.decoding[plan.decode_joins] = True
        return Moves(swap_out, swap_in, copies)

    def release(self, slots: Int32Array) -> None:
        """Empties resident slots; their blocks lose a reference each."""
        for slot in slots.tolist():
            if not self.swapped[slot]:
                np.subtract.at(self.reference_counts, self.table(slot), ONE)
            self.token_count[slot] = self.table_length[slot] = 0
            self.decoding[slot] = self.swapped[slot] = self.faulted[slot] = False
            self.requests[slot] = b""
        if len(slots):
            self.occupancy[slots] += 1
            self.sampling.clear(slots)

    def _swap(
        self, slots: Int32Array, blocks: Int32Array, targets: Int32Array
    ) -> tuple[Int32Array, Int32Array]:
        """Rewrites the tables of `slots` by the mapping blocks -> targets, to host or back."""
        if not len(slots):
            return blocks, targets
        counts = self.table_length[slots]
        rows = np.repeat(slots, counts)
        columns = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        leaving = self.tables[rows, columns]
        moved = np.zeros(max(self.block_count, self.host_block_count), np.int32)
        moved[blocks] = targets
        arriving = self.tables[rows, columns] = moved[leaving]
        if self.swapped[slots[0]]:
            self._take_fresh(arriving[self.reference_counts[arriving] == 0])
            np.add.at(self.reference_counts, arriving, ONE)
        else:
            np.subtract.at(self.reference_counts, leaving, ONE)
        self.swapped[slots] = ~self.swapped[slots]
        self.decoding[slots] = False
        return blocks, targets

    def _truncate(self, slots: Int32Array, counts: Int32Array) -> None:
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            kept = min(-(-count // self.block_size), int(self.table_length[slot]))
            dropped = self.tables[slot, kept : self.table_length[slot]]
            np.subtract.at(self.reference_counts, dropped, ONE)
            self.table_length[slot] = kept
            self.token_count[slot] = count
            self.computed[slot] = min(self.computed[slot], count - 1)
            self.cached[slot] = min(self.cached[slot], count // self.block_size * self.block_size)

    def _admit(self, rows: Admissions) -> None:
        slots = rows.slots
        token_ends, block_ends = np.cumsum(rows.token_counts), np.cumsum(rows.block_counts)
        for index, slot in enumerate(slots.tolist()):
            count, blocks = int(rows.token_counts[index]), int(rows.block_counts[index])
            self.tokens[slot, :count] = rows.token_ids[
                token_ends[index] - count : token_ends[index]
            ]
            table = rows.block_ids[block_ends[index] - blocks : block_ends[index]]
            self.tables[slot, :blocks] = table
            self._take_fresh(table[int(rows.cached_token_counts[index]) // self.block_size :])
            self.reference_counts[table] += 1
            self.requests[slot] = rows.requests[index]
        self.token_count[slots] = rows.token_counts
        self.prompt_count[slots] = rows.prompt_token_counts
        self.cached[slots] = rows.cached_token_counts
        self.computed[slots] = np.minimum(rows.cached_token_counts, rows.token_counts - 1)
        self.table_length[slots] = rows.block_counts
        assign_sampling(self.sampling, rows)

    def _branch(self, slots: Int32Array, parents: Int32Array, token_ids: Int32Array) -> None:
        """Beams become copies of their parents, all at once, each with a last token of its own."""
        blocks = int(self.table_length[parents].max())
        length = int(self.token_count[parents].max())
        tables, tokens = self.tables[parents, :blocks], self.tokens[parents, :length]
        for parent in parents.tolist():
            np.add.at(self.reference_counts, self.table(parent), ONE)
        for slot in slots.tolist():
            np.subtract.at(self.reference_counts, self.table(slot), ONE)
        self.tables[slots, :blocks], self.tokens[slots, :length] = tables, tokens
        for name in (*_INHERITED, "computed"):
            column = getattr(self, name)
            column[slots] = column[parents]
        self.tokens[slots, self.token_count[slots] - 1] = token_ids
        self.decoding[slots] = False

    def _append(self, slots: Int32Array, blocks: Int32Array) -> None:
        if len(np.unique(slots)) == len(slots):
            self.tables[slots, self.table_length[slots]] = blocks
            self.table_length[slots] += 1
        else:
            for slot, block in zip(slots.tolist(), blocks.tolist(), strict=True):
                self.tables[slot, self.table_length[slot]] = block
                self.table_length[slot] += 1
        self._take_fresh(blocks)
        self.reference_counts[blocks] += 1

    def _copy_on_write(self, plan: PlanColumns) -> tuple[Int32Array, Int32Array]:
        slots, indexes, targets = plan.copied_slots, plan.copied_indexes, plan.copied_blocks
        sources = self.tables[slots, indexes]
        if len(slots):
            np.subtract.at(self.reference_counts, sources, ONE)
            self._take_fresh(targets)
            self.reference_counts[targets] += 1
            self.tables[slots, indexes] = targets
        return sources, targets

    def _take_fresh(self, blocks: Int32Array) -> None:
        """Blocks get a new content, so the hash of what they held is gone."""
        self.hashed[blocks] = False

    # The forward pass.

    def lay_out(self, plan: PlanColumns) -> StepBatch:
        """Lays out the step's packed batch and forks the children that it samples."""
        decodes = np.flatnonzero(self.decoding).astype(np.int32)
        slots = np.concatenate([decodes, plan.chunk_slots])
        counts = np.ones(len(slots), np.int32)
        counts[len(decodes) :] = plan.chunk_token_counts
        starts = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        rows = np.repeat(np.arange(len(slots)), counts)
        row_slots = slots[rows]
        offsets = np.arange(starts[-1], dtype=np.int64) - starts[rows]
        positions = self.computed[row_slots] + offsets
        contexts = self.computed[slots] + counts
        width = -(-int(contexts.max(initial=0)) // self.block_size)
        blocks = self.tables[row_slots, positions // self.block_size].astype(np.int64)
        mapping = blocks * self.block_size + positions % self.block_size
        mapping[positions < self.cached[row_slots]] = -1
        sampled = np.flatnonzero(contexts == self.token_count[slots])
        last_rows = (starts[1:] - 1).astype(np.int64)[sampled]
        self._fork(plan)
        # Parents are few; their row is where their slot stands among the sampled ones.
        parents = plan.fork_parents.tolist()
        forked = [int(np.flatnonzero(slots[sampled] == parent)[0]) for parent in parents]
        logit_rows, prompt_rows = self._prompt_rows(plan, slots, starts, last_rows)
        return StepBatch(
            slots=slots,
            counts=counts,
            decode_count=len(decodes),
            token_slots=row_slots.astype(np.int64),
            positions=positions,
            slot_mapping=mapping,
            query_starts=starts,
            context_lengths=contexts.astype(np.int32),
            block_tables=np.ascontiguousarray(self.tables[slots, :width]),
            logit_rows=logit_rows,
            sampled_slots=np.concatenate([slots[sampled], plan.fork_children]),
            sampled_logits=np.concatenate([np.arange(len(sampled)), np.array(forked, np.int64)]),
            prompt_rows=prompt_rows,
        )

    def _fork(self, plan: PlanColumns) -> None:
        for parent, child in zip(
            plan.fork_parents.tolist(), plan.fork_children.tolist(), strict=True
        ):
            count, blocks = self.token_count[parent], self.table_length[parent]
            for name in _INHERITED:
                column = getattr(self, name)
                column[child] = column[parent]
            # The parent's own count is only advanced once the step is done.
            self.computed[child] = count
            self.tokens[child, :count] = self.tokens[parent, :count]
            self.tables[child, :blocks] = self.tables[parent, :blocks]
            np.add.at(self.reference_counts, self.table(child), ONE)
            self.requests[child] = self.requests[parent]
        if len(plan.fork_parents):
            self.sampling.copy(plan.fork_parents, plan.fork_children, plan.fork_sample_indexes)

    def _prompt_rows(
        self, plan: PlanColumns, slots: Int32Array, starts: Int32Array, last_rows: Int64Array
    ) -> tuple[Int64Array, list[tuple[int, int, int]]]:
        """Adds every row of the chunks whose prompt log-probabilities are wanted."""
        first_chunk = len(slots) - len(plan.chunk_slots)
        wanted = self.sampling.prompt_logprob_count[slots[first_chunk:]] >= 0
        if not wanted.any():
            return last_rows, []
        extra, prompt_rows = [last_rows], []
        for index in (first_chunk + np.flatnonzero(wanted)).tolist():
            slot, first = int(slots[index]), int(self.computed[slots[index]])
            # The last prompt token's successor is output, which is reported as such.
            end = min(first + int(starts[index + 1] - starts[index]), self.prompt_count[slot] - 1)
            count = max(int(end) - first, 0)
            extra.append(np.arange(starts[index], starts[index] + count, dtype=np.int64))
            prompt_rows.append((slot, first, count))
        return np.concatenate(extra), prompt_rows

    def advance(self, plan: PlanColumns, batch: StepBatch) -> Awaited:
        """Counts what the step computes and samples, as soon as it is on its way."""
        self.computed[batch.slots] += batch.counts
        sampled = batch.sampled_slots
        positions = self.token_count[sampled].astype(np.int64)
        self.token_count[sampled] += 1
        if len(plan.hashed_blocks):
            self.hashes[plan.hashed_blocks] = plan.block_hashes
            self.hashed[plan.hashed_blocks] = plan.block_hashes.any(axis=1)
        return Awaited(sampled, self.occupancy[sampled], positions)

    def record(self, awaited: Awaited, token_ids: Int32Array) -> None:
        """Takes sampled ids, int32 [R]; -1 (a fault) counts as a token of id 0.

        A slot may decode on before its leader hears of the fault, so it stays marked until it is
        released: none of its tokens from there on was drawn from what the model really said.
        """
        current = self.occupancy[awaited.slots] == awaited.occupancies
        slots, ids = awaited.slots[current], token_ids[current]
        self.tokens[slots, awaited.positions[current]] = np.maximum(ids, 0)
        self.faulted[slots] |= ids < 0

    def pause(self) -> None:
        """Readies what is resident for another leader, with no plan in flight.

        Nothing decodes until that leader says so. What a leader does when it hears of a fault the
        former one may have had no time for, and the next one cannot know of: faulted slots are
        released, and their blocks lose their hashes, because nobody is to build on them.
        """
        self.decoding[:] = False
        faulted = np.flatnonzero(self.faulted).astype(np.int32)
        for slot in faulted[~self.swapped[faulted]].tolist():
            self.hashed[self.table(slot)] = False
        self.release(faulted)

    # Facts.

    def table(self, slot: int) -> Int32Array:
        return self.tables[slot, : self.table_length[slot]]

    def resident_slots(self) -> Int32Array:
        return np.flatnonzero(self.token_count).astype(np.int32)

    def resident_counts(self) -> tuple[int, int]:
        """Returns how many sequences are resident, and how many of them are swapped out."""
        return int(np.count_nonzero(self.token_count)), int(np.count_nonzero(self.swapped))

    def host_blocks_used(self) -> int:
        """Blocks of the swap space that hold something."""
        tables = [self.table(slot) for slot in np.flatnonzero(self.swapped).tolist()]
        return len(np.unique(np.concatenate(tables))) if tables else 0

    def block_counts(self) -> tuple[int, int, int]:
        """Returns (free, cached, referenced) blocks."""
        referenced = self.reference_counts > 0
        cached = int(np.count_nonzero(self.hashed & ~referenced))
        used = int(np.count_nonzero(referenced))
        return self.block_count - cached - used, cached, used

    def check(self) -> None:
        """Raises AssertionError unless the reference counts are those of the block tables."""
        counted = np.zeros(self.block_count, np.int32)
        for slot in self.resident_slots().tolist():
            if not self.swapped[slot]:
                np.add.at(counted, self.table(slot), 1)
        if not np.array_equal(counted, self.reference_counts):
            wrong = np.flatnonzero(counted != self.reference_counts)[:8].tolist()
            raise AssertionError(f"reference counts of blocks {wrong} are not those of the tables")
