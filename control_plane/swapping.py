"""Preemption by swapping: groups whose blocks are in host memory (paper, section 4.5).

A group that is swapped out keeps its slots and its tokens; its block tables hold host
blocks. What its sequences share, they share there too: each block crosses once. Pure.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from control_plane.blocks import BlockPool, Int32Array
from control_plane.plan import Crossing
from control_plane.request import Sequence, SequenceGroup
from control_plane.slots import SlotTable


class SwapSpace:
    """The host's blocks and the groups that are in them."""

    def __init__(self, host_block_count: int, device: BlockPool, slots: SlotTable) -> None:
        self.pool = BlockPool(host_block_count)
        self.groups: list[SequenceGroup] = []
        self._device, self._slots = device, slots
        # What crosses with the present plan, from -> to.
        self._out: dict[int, int] = {}
        self._in: dict[int, int] = {}

    def begin_plan(self) -> None:
        """Forgets what crossed with the last plan."""
        self._out, self._in = {}, {}

    def blocks_of(self, group: SequenceGroup) -> Int32Array:
        """The distinct blocks of a group's tables, on whichever side they are."""
        tables = [self._slots.table(sequence.slot) for sequence in group.resident()]
        return np.unique(np.concatenate(tables)).astype(np.int32)

    def swap_out(self, group: SequenceGroup) -> Crossing:
        """Moves all blocks of a group to the host, which must have room for them."""
        crossing = self._cross(group, self._device, self.pool, self._out)
        self._slots.swapped[crossing.slots] = True
        self._slots.decoding[crossing.slots] = False
        bisect.insort(self.groups, group, key=lambda member: member.order)
        return crossing

    def swap_in(self, group: SequenceGroup) -> Crossing:
        """Moves all blocks of a group back to the device, which must have room for them."""
        crossing = self._cross(group, self.pool, self._device, self._in)
        self._slots.swapped[crossing.slots] = False
        self.groups.remove(group)
        return crossing

    def restore(self, tables: list[Int32Array]) -> None:
        """Takes a fresh host pool to what an engine holds there: tables of swapped sequences."""
        references = np.zeros(self.pool.block_count, np.int32)
        for table in tables:
            references[table] += 1
        self.pool.restore(references, {})

    def drop(self, sequence: Sequence) -> None:
        """Gives back the host blocks of one sequence, whose slot is about to be vacated."""
        self.pool.release(self._slots.table(sequence.slot))
        group = sequence.group
        if all(other is sequence for other in group.resident()):
            self.groups.remove(group)

    def _cross(
        self,
        group: SequenceGroup,
        source_pool: BlockPool,
        target_pool: BlockPool,
        crossed: dict[int, int],
    ) -> Crossing:
        """Moves a group's tables and references; returns what crosses for it.

        A block that crosses in this plan already, for another group, is shared with it there.
        """
        sources = self.blocks_of(group)
        targets = np.array([crossed.get(block, -1) for block in sources.tolist()], np.int32)
        fresh = targets < 0
        targets[fresh] = target_pool.allocate(int(fresh.sum()))
        slots = np.array([sequence.slot for sequence in group.resident()], np.int32)
        for slot in slots.tolist():
            row = self._slots.table(slot)
            source_pool.release(row.copy())
            row[:] = targets[np.searchsorted(sources, row)]
            target_pool.reference_counts[row] += 1
        # Tables hold the references from here on; allocating had counted one more.
        target_pool.reference_counts[targets[fresh]] -= 1
        crossing = Crossing(slots, sources[fresh], targets[fresh])
        crossed.update(zip(crossing.sources.tolist(), crossing.targets.tolist(), strict=True))
        return crossing


@dataclass(slots=True)
class CostModel:
    """What preempting costs, from what steps have taken so far; microseconds.

    Before anything was measured the figures are those of a middling GPU: a wrong choice
    then costs a little time, and the first steps correct it.

    Attributes:
        block_us: one block to the host or back.
        token_us: one token of a prompt, computed in a chunk.
        decode_us: a step that only decodes.
    """

    block_us: float = 100.0
    token_us: float = 50.0
    decode_us: float = 0.0

    def observe(self, moved_blocks: int, chunk_tokens: int, moves_us: int, forward_us: int) -> None:
        """Takes the timings of one step."""
        if moved_blocks:
            self.block_us = _towards(self.block_us, moves_us / moved_blocks)
        if chunk_tokens:
            spent = max(forward_us - self.decode_us, 0.0)
            self.token_us = _towards(self.token_us, spent / chunk_tokens)
        elif forward_us:
            self.decode_us = _towards(self.decode_us, float(forward_us))

    def swap_us(self, blocks: int) -> float:
        """Out and back."""
        return 2 * blocks * self.block_us

    def recompute_us(self, tokens: int) -> float:
        return tokens * self.token_us


def _towards(average: float, sample: float) -> float:
    """A moving average over about the last eight samples."""
    return average + (sample - average) / 8
