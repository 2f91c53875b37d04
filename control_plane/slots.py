"""The slot table: one row of NumPy columns per resident sequence, and every block table.

A decode step for a thousand sequences is a few vector operations over these columns. This module
alone knows their layout; the engine keeps its own mirror of lengths, tokens and tables.
"""

from __future__ import annotations

import numpy as np

from control_plane.blocks import Int32Array
from control_plane.request import MAX_STOP_IDS, Sequence, SequenceGroup

# The order of a slot that nobody has.
VACANT = np.iinfo(np.int64).min


class SlotTable:
    """Columns, by slot.

    Attributes:
        length: tokens once every planned step is done, the ones in flight included.
        known: tokens whose ids have come back.
        computed: tokens whose keys and values are in blocks once every planned step is done.
        limit: tokens at which the sequence ends.
        block_count: entries of its row in `blocks` that are in use.
        serial: which occupant of the slot this is; results in flight carry it.
        order: of its group: by it are groups admitted, brought back and, from its end, preempted.
        decoding: it is in the decode batch that the engine keeps.
        joining, leaving: it enters or leaves that batch with the next plan.
        forked: its last block may be shared when it next writes into it.
        swapped: its row in `blocks` is of host blocks.
        beam: it is a beam: what is drawn for it only counts when its search says so.
        owner: the occupant.
        tokens: int32 [slots, length]; pages of it are only touched as far as sequences grow.
        blocks: int32 [slots, blocks], the block tables.
    """

    def __init__(self, slot_count: int, max_length: int, block_size: int) -> None:
        self.slot_count = slot_count
        self.block_size = block_size
        self.length = np.zeros(slot_count, np.int32)
        self.known = np.zeros(slot_count, np.int32)
        self.computed = np.zeros(slot_count, np.int32)
        self.limit = np.zeros(slot_count, np.int32)
        self.block_count = np.zeros(slot_count, np.int32)
        self.serial = np.zeros(slot_count, np.int64)
        self.order = np.full(slot_count, VACANT, np.int64)
        self.decoding = np.zeros(slot_count, np.bool_)
        self.joining = np.zeros(slot_count, np.bool_)
        self.leaving = np.zeros(slot_count, np.bool_)
        self.forked = np.zeros(slot_count, np.bool_)
        self.swapped = np.zeros(slot_count, np.bool_)
        self.beam = np.zeros(slot_count, np.bool_)
        self.stop_ids = np.full((slot_count, MAX_STOP_IDS), -1, np.int32)
        self.owner = np.full(slot_count, None, object)
        self.tokens = np.zeros((slot_count, max_length + 1), np.int32)
        self.blocks = np.zeros((slot_count, -(-max_length // block_size) + 1), np.int32)
        self._free = list(range(slot_count - 1, -1, -1))

    @property
    def free_count(self) -> int:
        return len(self._free)

    def occupy(self, sequence: Sequence, slot: int | None = None) -> int:
        """Gives the sequence a slot (a given one when an engine's state is taken over)."""
        if slot is None:
            slot = self._free.pop()
        else:
            self._free.remove(slot)
        request = sequence.group.request
        sequence.slot = slot
        self.owner[slot] = sequence
        self.serial[slot] += 1
        self.order[slot] = sequence.group.order
        self.beam[slot] = request.beams is not None
        # A search decides itself when its beams end.
        self.limit[slot] = request.length_limit + self.beam[slot]
        self.stop_ids[slot] = -1
        if request.beams is None:
            self.stop_ids[slot, : len(request.stop_ids)] = request.stop_ids
        self.length[slot] = self.known[slot] = self.computed[slot] = self.block_count[slot] = 0
        return slot

    def set_tokens(self, slot: int, tokens: Int32Array) -> None:
        self.tokens[slot, : len(tokens)] = tokens
        self.length[slot] = self.known[slot] = len(tokens)

    def set_blocks(self, slot: int, blocks: Int32Array) -> None:
        self.blocks[slot, : len(blocks)] = blocks
        self.block_count[slot] = len(blocks)

    def known_tokens(self, slot: int) -> Int32Array:
        return self.tokens[slot, : self.known[slot]]

    def table(self, slot: int) -> Int32Array:
        return self.blocks[slot, : self.block_count[slot]]

    def entries(self, slots: Int32Array) -> tuple[Int32Array, Int32Array]:
        """Indexes into `blocks` of all entries in use of several tables, one after the other."""
        counts = self.block_count[slots]
        ends = counts.cumsum()
        rows = np.repeat(slots, counts)
        columns = np.arange(len(rows)) - np.repeat(ends - counts, counts)
        return rows, columns.astype(np.int32)

    def on_device(self) -> Int32Array:
        """Slots of sequences whose blocks are not in host memory, in the order of their groups."""
        slots = np.flatnonzero((self.order != VACANT) & ~self.swapped).astype(np.int32)
        return slots[self.order[slots].argsort(kind="stable")]

    def in_host_memory(self) -> Int32Array:
        """Slots of swapped sequences, in the order of their groups."""
        slots = np.flatnonzero(self.swapped).astype(np.int32)
        return slots[self.order[slots].argsort(kind="stable")]

    def of(self, group: SequenceGroup) -> Int32Array:
        return np.array([sequence.slot for sequence in group.resident()], np.int32)

    def groups_of(self, slots: Int32Array) -> list[SequenceGroup]:
        return list(dict.fromkeys([sequence.group for sequence in self.owner[slots]]))

    def holds(self, group: SequenceGroup) -> bool:
        """Whether a group has slots and is not swapped out, which it is as a whole or not."""
        for sequence in group.sequences:
            if sequence.slot >= 0:
                return not self.swapped[sequence.slot]
        return False

    def pause(self, slots: Int32Array) -> None:
        """Takes slots off the decode batch and forgets what the next plan was to do with them."""
        for column in (self.decoding, self.joining, self.leaving, self.forked):
            column[slots] = False

    def join(self, slots: Int32Array) -> None:
        """Lets those that are no beams and lack tokens decode from the next plan on."""
        going = slots[~self.beam[slots] & (self.length[slots] < self.limit[slots])]
        self.joining[going] = True
        self.forked[going] = self.computed[going] % self.block_size != 0

    def vacate(self, slot: int) -> None:
        self.owner[slot].slot = -1
        self.owner[slot] = None
        self.order[slot] = VACANT
        self.decoding[slot] = self.joining[slot] = self.leaving[slot] = False
        self.forked[slot] = self.swapped[slot] = False
        self.block_count[slot] = 0
        # Results in flight for the old occupant no longer match.
        self.serial[slot] += 1
        self._free.append(slot)
