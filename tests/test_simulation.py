"""The simulator in the suite: some hundred seeds, and proof that it finds bugs that are planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from control_plane import records
from control_plane.beams import BeamSearch
from control_plane.blocks import BlockPool, Int32Array
from control_plane.branching import Branching
from control_plane.engine_link import EngineFacts
from control_plane.hashing import PrefixHasher
from control_plane.plan import Plan
from control_plane.request import Request, Sequence, SequenceGroup
from control_plane.scheduler import Scheduler
from control_plane.slots import SlotTable
from control_plane.swapping import SwapSpace
from control_plane.wait_queue import WaitQueue
from data_plane.state import ResidentState
from tests import simulator
from tests.simulated_workload import drawn
from tests.simulator import SimulationFailed, kept_seeds, simulate
from tests.stub_engine import expected

SEEDS = 300
BATCH = 25


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_seeds(first: int) -> None:
    for seed in range(first, first + BATCH):
        simulate(seed)


@pytest.mark.parametrize("seed", kept_seeds())
def test_seeds_that_failed_once(seed: int) -> None:
    simulate(seed)


@pytest.mark.parametrize("seed", [2, 3, 4, 5, 11])
def test_a_seed_replays_exactly(seed: int) -> None:
    """All plans of both runs are equal, byte for byte."""
    assert simulate(seed) == simulate(seed)


def test_different_seeds_are_different_histories() -> None:
    histories = [simulate(seed) for seed in range(300, 320)]
    assert len({history.digest for history in histories}) == len(histories)
    assert sum(history.troubles for history in histories) > 5


def test_right_answers_are_those_of_the_stub_engine() -> None:
    for sample in range(3):
        assert drawn([5, 600, 7], 20, sample) == expected([5, 600, 7], 20, sample)


# Bugs, each planted by one small change.

Monkey = pytest.MonkeyPatch


def _release_drops_one_too_many(monkeypatch: Monkey) -> None:
    original = BlockPool.release

    def release(self: BlockPool, blocks: Int32Array) -> None:
        original(self, blocks)
        self.reference_counts[blocks[self.reference_counts[blocks] > 1][:1]] -= 1

    monkeypatch.setattr(BlockPool, "release", release)


def _share_forgets_one(monkeypatch: Monkey) -> None:
    original = BlockPool.share

    def share(self: BlockPool, blocks: Int32Array) -> None:
        original(self, blocks)
        self.reference_counts[blocks[self.reference_counts[blocks] > 2][:1]] -= 1

    monkeypatch.setattr(BlockPool, "share", share)


def _no_copy_of_a_shared_tail(monkeypatch: Monkey) -> None:
    monkeypatch.setattr(Scheduler, "_shared_tails", lambda self: [])


def _one_copy_too_few(monkeypatch: Monkey) -> None:
    original = Scheduler._shared_tails
    # Two samples come out right; of three, two go on in one block.
    monkeypatch.setattr(Scheduler, "_shared_tails", lambda self: original(self)[:1])


def _no_copy_after_a_swap(monkeypatch: Monkey) -> None:
    """Samples that share a tail come back from the host without the memory that they do."""

    original = Scheduler._bring_back

    def bring_back(self: Scheduler, plan: Plan, slots: Int32Array) -> None:
        original(self, plan, slots)
        self.slots.forked[slots] = False

    monkeypatch.setattr(Scheduler, "_bring_back", bring_back)


def _swap_in_beside_swap_out(monkeypatch: Monkey) -> None:
    original = Scheduler._swap_in

    def swap_in(self: Scheduler, plan: Plan) -> None:
        hidden, plan.swapped_out = plan.swapped_out, []
        original(self, plan)
        plan.swapped_out = hidden

    monkeypatch.setattr(Scheduler, "_swap_in", swap_in)


def _first_swapped_out_comes_back_first(monkeypatch: Monkey) -> None:
    original = SlotTable.in_host_memory
    monkeypatch.setattr(SlotTable, "in_host_memory", lambda self: original(self)[::-1])


def _hash_before_the_last_token_is_known(monkeypatch: Monkey) -> None:
    original = Scheduler._publish

    def publish(self: Scheduler, sequence: Sequence, generated: bool = False) -> None:
        slot = sequence.slot
        known = int(self.slots.known[slot])
        self.slots.known[slot] = self.slots.length[slot]
        original(self, sequence, generated)
        self.slots.known[slot] = known

    monkeypatch.setattr(Scheduler, "_publish", publish)


def _late_results_are_taken_for_the_next_occupant(monkeypatch: Monkey) -> None:
    original = SlotTable.occupy

    def occupy(self: SlotTable, sequence: Sequence, slot: int | None = None) -> int:
        slot = original(self, sequence, slot)
        # As if neither leaving a slot nor taking it made a new serial number.
        self.serial[slot] -= 2 if self.serial[slot] > 1 else 0
        return slot

    monkeypatch.setattr(SlotTable, "occupy", occupy)


def _last_come_first_served(monkeypatch: Monkey) -> None:
    original = WaitQueue.push

    def push(self: WaitQueue, group: SequenceGroup) -> None:
        original(self, group)
        self._groups.remove(group)
        self._groups.insert(0, group)

    monkeypatch.setattr(WaitQueue, "push", push)


def _takeover_forgets_the_host(monkeypatch: Monkey) -> None:
    monkeypatch.setattr(SwapSpace, "restore", lambda self, tables: None)


def _what_is_brought_back_never_runs(monkeypatch: Monkey) -> None:
    original = Scheduler._bring_back

    def bring_back(self: Scheduler, plan: Plan, slots: Int32Array) -> None:
        original(self, plan, slots)
        self.slots.joining[slots] = False

    monkeypatch.setattr(Scheduler, "_bring_back", bring_back)


def _evicted_hashes_stay_announced(monkeypatch: Monkey) -> None:
    original = BlockPool._drop_hash

    def drop_hash(self: BlockPool, block: int) -> None:
        announced = self._announced.get(block)
        original(self, block)
        if announced is not None:
            self._announced[block] = announced

    monkeypatch.setattr(BlockPool, "_drop_hash", drop_hash)


def _faulted_slots_are_handed_over(monkeypatch: Monkey) -> None:
    def pause(self: ResidentState) -> None:
        self.decoding[:] = False

    monkeypatch.setattr(ResidentState, "pause", pause)


def _beams_write_into_what_they_share(monkeypatch: Monkey) -> None:
    original = Branching._branch

    def branch(self: Branching, plan: Plan, group: SequenceGroup, search: BeamSearch) -> None:
        original(self, plan, group, search)
        self._slots.forked[plan.beam_slots] = False

    monkeypatch.setattr(Branching, "_branch", branch)


def _beams_that_are_taken_off_stay_in_the_plan(monkeypatch: Monkey) -> None:
    monkeypatch.setattr(Branching, "undo", lambda self, plan, group: None)


def _beams_that_are_taken_off_do_not_branch(monkeypatch: Monkey) -> None:
    original = Branching.settle

    def settle(self: Branching, group: SequenceGroup, search: BeamSearch) -> None:
        search.take_moves()
        original(self, group, search)

    monkeypatch.setattr(Branching, "settle", settle)


def _prompts_that_are_rebuilt_forget_what_is_shared(monkeypatch: Monkey) -> None:
    original = records.rebuilt_request

    def rebuilt(data: bytes, prompt: Int32Array, facts: EngineFacts) -> tuple[Request, bytes]:
        request, digest = original(data, prompt, facts)
        hasher = PrefixHasher(facts.fingerprint, facts.block_size, request.salt)
        return replace(request, hashes=tuple(hasher.extend([], prompt))), digest

    monkeypatch.setattr(records, "rebuilt_request", rebuilt)


BUGS = [
    _prompts_that_are_rebuilt_forget_what_is_shared,
    _release_drops_one_too_many,
    _share_forgets_one,
    _no_copy_of_a_shared_tail,
    _one_copy_too_few,
    _no_copy_after_a_swap,
    _swap_in_beside_swap_out,
    _first_swapped_out_comes_back_first,
    _hash_before_the_last_token_is_known,
    _late_results_are_taken_for_the_next_occupant,
    _last_come_first_served,
    _takeover_forgets_the_host,
    _what_is_brought_back_never_runs,
    _evicted_hashes_stay_announced,
    _faulted_slots_are_handed_over,
    _beams_write_into_what_they_share,
    _beams_that_are_taken_off_stay_in_the_plan,
    _beams_that_are_taken_off_do_not_branch,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__.strip("_"))
def test_planted_bugs_are_found(
    plant: Callable[[Monkey], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            simulate(seed)
        except SimulationFailed as failure:
            report = str(failure)
            print(f"found by seed {seed}: {report.splitlines()[0]}")
            assert report.endswith(f"python -m tests.simulator --seeds {seed}")
            return
    pytest.fail("no seed found it")


def test_a_failure_shows_the_memory_and_the_last_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_copy_of_a_shared_tail(monkeypatch)
    for seed in range(SEEDS):
        _, history, report = simulator._try(seed)
        if history is None:
            break
    for part in ("one character a block", "control plane", "engine", "device,", "last plans"):
        assert part in report
    assert any(np.char.isdigit(list(line.strip())).any() for line in report.splitlines())
