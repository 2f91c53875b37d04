"""Preemption by swapping: groups whose blocks are in host memory (paper, section 4.5).

A group that is swapped out keeps its slots and its tokens; its block tables hold host
blocks. What its sequences share, they share there too: each block crosses once. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from control_plane.blocks import ONE, BlockPool, Int32Array
from control_plane.plan import Crossing
from control_plane.request import SequenceGroup
from control_plane.slots import SlotTable


class SwapSpace:
    """The host's blocks; which groups are in them, the slot table knows."""

    def __init__(self, host_block_count: int, device: BlockPool, slots: SlotTable) -> None:
        self.pool = BlockPool(host_block_count)
        self._device, self._slots = device, slots
        # Where blocks cross to with the present plan, by where they were; -1 for all others.
        self._out = _Crossed(device.block_count)
        self._in = _Crossed(host_block_count)

    @property
    def groups(self) -> list[SequenceGroup]:
        """The swapped groups, in order."""
        return self._slots.groups_of(self._slots.in_host_memory())

    def begin_plan(self) -> None:
        """Forgets what crossed with the last plan."""
        self._out.clear()
        self._in.clear()

    def blocks_of(self, group: SequenceGroup) -> Int32Array:
        """The distinct blocks of a group's tables, on whichever side they are."""
        entries = self._slots.blocks[self._slots.entries(self._slots.of(group))]
        return np.unique(entries).astype(np.int32)

    def swap_out(self, slots: Int32Array) -> Crossing:
        """Moves all blocks of whole groups to the host, which must have room for them."""
        self._slots.pause(slots)
        self._slots.swapped[slots] = True
        return self._cross(slots, self._device, self.pool, self._out)

    def swap_in(self, slots: Int32Array) -> Crossing:
        """Moves all blocks of whole groups back to the device, which must have room for them."""
        self._slots.swapped[slots] = False
        return self._cross(slots, self.pool, self._device, self._in)

    def returning(self, room: int, margin: int) -> Int32Array:
        """Slots of the groups that can come back, first ones first, as far as there is room.

        Args:
            room: blocks available on the device.
            margin: blocks to be left when one has come back, beside two for each sequence of it.
        """
        slots = self._slots.in_host_memory()
        if not len(slots):
            return slots
        order = self._slots.order[slots]
        begins = np.flatnonzero(np.append(True, order[1:] != order[:-1]))
        sizes = np.diff(np.append(begins, len(slots)))
        # A group needs at least the longest of its tables; what it shares is counted only where
        # that fits.
        needs = np.maximum.reduceat(self._slots.block_count[slots], begins)
        count = _leading(needs.cumsum() + 2 * sizes + margin <= room)
        for at in np.flatnonzero(sizes[:count] > 1).tolist():
            needs[at] = len(self.blocks_of(self._slots.owner[slots[begins[at]]].group))
        count = _leading(needs[:count].cumsum() + 2 * sizes[:count] + margin <= room)
        return slots[: int(sizes[:count].sum())]

    def restore(self, tables: list[Int32Array]) -> None:
        """Takes a fresh host pool to what an engine holds there: tables of swapped sequences."""
        references = np.zeros(self.pool.block_count, np.int32)
        for table in tables:
            references[table] += 1
        self.pool.restore(references, {})

    def _cross(
        self, slots: Int32Array, source: BlockPool, target: BlockPool, crossed: _Crossed
    ) -> Crossing:
        """Moves tables and references; returns what crosses for them.

        A block that crosses in this plan already, for another group, is shared with it there.
        """
        entries = self._slots.entries(slots)
        leaving = self._slots.blocks[entries]
        distinct = source.distinct(leaving)
        fresh = distinct[crossed.target_of[distinct] < 0]
        crossed.add(fresh, target.allocate(len(fresh)))
        arriving = crossed.target_of[leaving]
        self._slots.blocks[entries] = arriving
        source.release_all(leaving)
        # Tables hold the references from here on; allocating had counted one more.
        np.add.at(target.reference_counts, arriving, ONE)
        targets = crossed.target_of[fresh]
        target.reference_counts[targets] -= 1
        return Crossing(slots, fresh, targets)


def _leading(fits: npt.NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(fits) if fits.all() else int(fits.argmin())


class _Crossed:
    """Which block a block becomes on the other side, for those that cross with one plan."""

    def __init__(self, block_count: int) -> None:
        self.target_of: Int32Array = np.full(block_count, -1, np.int32)
        self._sources: list[Int32Array] = []

    def add(self, sources: Int32Array, targets: Int32Array) -> None:
        self.target_of[sources] = targets
        self._sources.append(sources)

    def clear(self) -> None:
        for sources in self._sources:
            self.target_of[sources] = -1
        self._sources = []


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

    def swaps(self, block_size: int) -> bool:
        """Whether a block is out and back sooner than its tokens are computed again."""
        return 2 * self.block_us <= block_size * self.token_us


def _towards(average: float, sample: float) -> float:
    """A moving average over about the last eight samples."""
    return average + (sample - average) / 8
