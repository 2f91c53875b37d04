"""The beams of all searches that run on one engine: candidates in, branched block tables out.

A search (`control_plane.beams`) decides which beams go on; here that becomes block tables that are
shared and columns of a plan (paper, section 4.4). Pure.
"""

from __future__ import annotations

import numpy as np

from control_plane.beams import BeamSearch
from control_plane.blocks import BlockPool, Int32Array
from control_plane.plan import Plan, StepResult
from control_plane.request import Sequence, SequenceGroup
from control_plane.slots import SlotTable


class Branching:
    """Searches whose beams know how to go on, and those whose beams do so in the present plan."""

    def __init__(self, pool: BlockPool, slots: SlotTable) -> None:
        self._pool, self._slots = pool, slots
        self._ready: list[SequenceGroup] = []
        self._branched: list[SequenceGroup] = []

    def begin_plan(self) -> None:
        """Forgets whose beams went on with the last plan."""
        self._branched = []

    def branch_all(self, plan: Plan) -> None:
        """Lets every search whose results are in take its next step, unless it is swapped out."""
        waiting, self._ready = self._ready, []
        for group in waiting:
            search = group.beams
            if search is None or not search.moves or group.finished:
                continue
            if self._slots.holds(group):
                self._branch(plan, group, search)
                self._branched.append(group)
            else:
                self._ready.append(group)

    def has_branched(self, group: SequenceGroup) -> bool:
        """Whether the group's beams go on with the present plan."""
        return group in self._branched

    def undo(self, plan: Plan, group: SequenceGroup) -> None:
        """Takes a group's beams out of a plan that is being made; its slots will be released."""
        slots = {sequence.slot for sequence in group.sequences}
        kept = [at for at, slot in enumerate(plan.beam_slots) if slot not in slots]
        for name in ("beam_slots", "beam_parents", "beam_tokens"):
            setattr(plan, name, [getattr(plan, name)[at] for at in kept])

    def report(self, slots: Int32Array, result: StepResult) -> list[SequenceGroup]:
        """Hands candidates to the searches; returns the groups of those that have ended."""
        ended: list[SequenceGroup] = []
        for slot in slots.tolist():
            sequence = self._slots.owner[slot]
            group = sequence.group
            search = group.beams
            if not search.report(sequence.sample_index, result.logprobs[slot].top):
                continue
            search.advance(lambda beam, group=group: self._tokens_of(group.sequences[beam]))
            (ended if search.done else self._ready).append(group)
        return ended

    def settle(self, group: SequenceGroup, search: BeamSearch) -> None:
        """Gives the resident beams of a group that is taken off the tokens to go on from."""
        moves, last = search.take_moves(), search.length - 1
        rows = {
            beam: self._tokens_of(sequence)[: search.length].copy()
            for beam, sequence in enumerate(group.sequences)
            if sequence.slot >= 0
        }
        for move in moves:
            tokens = np.append(rows[move.parent][:last], np.int32(move.token))
            group.sequences[move.beam].tokens = tokens.astype(np.int32)
        if not moves:
            for beam, row in rows.items():
                group.sequences[beam].tokens = row
        search.forget_reports()

    def _branch(self, plan: Plan, group: SequenceGroup, search: BeamSearch) -> None:
        """Makes each beam a copy of its parent with another last token."""
        table, moves, last = self._slots, search.take_moves(), search.length - 1
        slots = [group.sequences[move.beam].slot for move in moves]
        parents = [group.sequences[move.parent].slot for move in moves]
        tokens = table.tokens[parents, :last]
        tables = [table.table(parent).copy() for parent in parents]
        hashes = [list(group.sequences[move.parent].hashes) for move in moves]
        published = [group.sequences[move.parent].published for move in moves]
        dropped = [table.table(slot).copy() for slot in slots]
        for blocks in tables:
            self._pool.share(blocks)
        for blocks in dropped:
            self._pool.release(blocks)
        for at, move in enumerate(moves):
            sequence, slot = group.sequences[move.beam], slots[at]
            table.set_blocks(slot, tables[at])
            table.tokens[slot, :last] = tokens[at]
            table.tokens[slot, last] = move.token
            sequence.hashes, sequence.published = hashes[at], published[at]
            table.joining[slot] = True
            table.forked[slot] = table.computed[slot] % table.block_size != 0
        plan.beam_slots += slots
        plan.beam_parents += parents
        plan.beam_tokens += [move.token for move in moves]

    def _tokens_of(self, sequence: Sequence) -> Int32Array:
        """A resident sequence's row of tokens; how many of them count, others know."""
        row: Int32Array = self._slots.tokens[sequence.slot]
        return row
