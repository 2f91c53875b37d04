"""What must hold after every step: both planes agree, blocks are conserved, waiting is bounded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from control_plane.hashing import PrefixHasher
from control_plane.plan import Plan
from control_plane.request import SequenceGroup
from control_plane.scheduler import Scheduler
from protos.engine.v1 import engine_pb2
from tests.simulated_workload import Job
from tests.stub_engine import StubEngine


def same(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    if ours.shape != theirs.shape or (ours != theirs).any():
        raise AssertionError(f"{what}: the scheduler has {ours}, the engine {theirs}")


@dataclass(frozen=True, slots=True)
class PlanesNote:
    """What the scheduler's tables say once a plan is done, to be compared with the engine's then.

    Plans are ahead of the engine, so the columns are copied as each is sent.
    """

    resident: np.ndarray
    lengths: np.ndarray
    computed: np.ndarray
    decoding: np.ndarray
    swapped: np.ndarray
    block_counts: np.ndarray
    tables: np.ndarray
    references: np.ndarray
    host_references: np.ndarray
    hashes: dict[int, bytes]

    @classmethod
    def of(cls, scheduler: Scheduler) -> PlanesNote:
        table = scheduler.slots
        resident = np.flatnonzero(table.block_count)
        return cls(
            resident,
            table.length[resident],
            table.computed[resident],
            table.decoding[resident],
            table.swapped[resident],
            table.block_count[resident],
            table.blocks[resident],
            scheduler.pool.reference_counts.copy(),
            scheduler.swap.pool.reference_counts.copy(),
            dict(scheduler.pool._hash_of),
        )

    def compare(self, stub: StubEngine) -> None:
        """Raises AssertionError unless the engine has come to the same."""
        state, slots = stub.state, self.resident
        same("resident slots", slots, state.resident_slots())
        same("token counts", self.lengths, state.token_count[slots])
        same("computed tokens", self.computed, state.computed[slots])
        same("decode batch", self.decoding, state.decoding[slots])
        same("swapped slots", self.swapped, state.swapped[slots])
        same("table lengths", self.block_counts, state.table_length[slots])
        width = state.tables.shape[1]
        used = np.arange(width) < self.block_counts[:, None]
        same("tables", self.tables[:, :width][used], state.tables[slots][used])
        same("reference counts", self.references, state.reference_counts)
        host = np.zeros(len(self.host_references), np.int32)
        np.add.at(host, state.tables[slots][used & self.swapped[:, None]], 1)
        same("host reference counts", self.host_references, host)
        hashed = np.flatnonzero(state.hashed)
        if sorted(self.hashes) != hashed.tolist():
            same("hashed blocks", np.array(sorted(self.hashes), np.int64), hashed)
        digests = b"".join(self.hashes[block] for block in hashed.tolist())
        if digests != state.hashes[hashed].tobytes():
            raise AssertionError("a block has another hash on the engine")


class Contents:
    """What every prefix hash stands for, and whether the blocks that carry one hold just that."""

    def __init__(self, jobs: list[Job], block_size: int) -> None:
        self._size = block_size
        self._tokens: dict[bytes, np.ndarray] = {}
        for job in jobs:
            hasher, shared = PrefixHasher("stub", block_size, job.tenant), job.shared.block_count
            for row in job.rows():
                tokens = np.array(row, np.int32)
                for index, digest in enumerate(hasher.extend([], tokens, shared)):
                    self._tokens[digest] = tokens[index * block_size : (index + 1) * block_size]
        self._expected = np.zeros((0, block_size), np.int32)

    def begin(self, block_count: int) -> None:
        """A new engine process: no block holds anything."""
        self._expected = np.full((block_count, self._size), -1, np.int32)

    def check(self, stub: StubEngine, message: engine_pb2.StepPlan) -> None:
        """Raises AssertionError unless each hashed block holds the tokens that its hash names."""
        state = stub.state
        for block in np.frombuffer(message.hashed_blocks, "<i4").tolist():
            if state.hashed[block]:
                tokens = self._tokens.get(state.hashes[block].tobytes())
                if tokens is None:
                    raise AssertionError(f"block {block}: a hash of tokens that nobody has")
                self._expected[block] = tokens
        held = stub.keys.reshape(-1, self._size)[state.hashed]
        if not np.array_equal(held, self._expected[state.hashed]):
            rows = (held != self._expected[state.hashed]).any(axis=1)
            wrong = np.flatnonzero(state.hashed)[rows].tolist()
            raise AssertionError(f"blocks {wrong} do not hold what their hashes say")


class WaitingCheck:
    """Bounds how long the head of the wait queue waits.

    1. Whoever was admitted once is not passed by later ones, by priority and then by arrival; who
       never was is passed by no more tokens than it brings itself.
    2. Nobody waits for nothing: if a plan leaves tokens of its budget unused, then neither the head
       of the queue (its prompt counted without any cached block) nor the first swapped group would
       have had the room that it needs.
    3. So a head that has room waits only while plans are full; in each of these steps the prompts
       that were begun before it get shorter, so there are at most as many steps as these have
       tokens.
    """

    def __init__(self) -> None:
        self._head: SequenceGroup | None = None
        self._backlog = 0
        self._passed: dict[SequenceGroup, int] = {}

    def check(self, scheduler: Scheduler, plan: Plan) -> None:
        self._check_order(scheduler, plan)
        self._check_swapped(scheduler, plan)
        head = scheduler.queue.head
        # A sibling of one that the plan admits waits for the next plan, to share its prompt.
        begun = {admission.sequence.group for admission in plan.admissions}
        if head is None or head in begun or not has_room(scheduler, head):
            self._head = None
            return
        name = head.request.request_id
        if plan.token_count < scheduler.limits.step_tokens:
            raise AssertionError(f"{name} has room but waits, and the plan is not full")
        table = scheduler.slots
        begun = [sequence.slot for sequence in scheduler._prefilling]
        backlog = int((table.length[begun] - table.computed[begun]).sum())
        if head is self._head and backlog >= self._backlog and not plan.admissions:
            raise AssertionError(f"{name} waits, and the prompts before it do not get shorter")
        self._head, self._backlog = head, backlog

    def _check_order(self, scheduler: Scheduler, plan: Plan) -> None:
        swapped = scheduler.swap.groups
        for admission in plan.admissions:
            order = admission.sequence.group.order
            for group in [*scheduler.queue, *swapped]:
                if group.order < order:
                    self._pass(group, len(admission.tokens))
        if plan.swapped_in and swapped:
            owners = scheduler.slots.owner
            last = max(owners[cross.slots[0]].group.order for cross in plan.swapped_in)
            if any(group.order < last for group in swapped):
                raise AssertionError(f"order {last} came back before one that waits longer")

    def _pass(self, group: SequenceGroup, tokens: int) -> None:
        """Notes that a sequence of so many tokens was admitted before a group that came first."""
        self._passed[group] = self._passed.get(group, 0) + tokens
        patience = 0 if group.admitted else len(group.waiting[0].tokens)
        if self._passed[group] > patience:
            name = group.request.request_id
            raise AssertionError(f"{name} was passed by {self._passed[group]} tokens")

    def _check_swapped(self, scheduler: Scheduler, plan: Plan) -> None:
        if not scheduler.swap.groups or plan.swapped_out or plan.admissions:
            return
        group = scheduler.swap.groups[0]
        head = scheduler.queue.head
        if head is not None and head.order < group.order:
            return
        room = len(scheduler.swap.blocks_of(group)) + 2 * len(group.resident())
        room += scheduler.running_count // scheduler.limits.block_size
        if room <= scheduler.pool.available_count:
            name = group.request.request_id
            raise AssertionError(f"{name} has room on the device but stays in host memory")


def has_room(scheduler: Scheduler, group: SequenceGroup) -> bool:
    """Whether the first waiting sequence of the head of the queue could be admitted now."""
    swapped = scheduler.swap.groups
    if swapped and swapped[0].order < group.order:
        return False
    if any(other.group is group for other in scheduler._prefilling):
        return False
    limits = scheduler.limits
    slots = len(group.waiting) + len(group.unforked)
    blocks = -(-len(group.waiting[0].tokens) // limits.block_size)
    reserve = min(scheduler.running_count, -(-limits.block_count // 100))
    free = scheduler.pool.available_count
    return slots <= scheduler.slots.free_count and blocks + reserve <= free
