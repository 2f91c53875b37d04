"""The scheduler against what must hold, with any history that Hypothesis finds.

The model knows requests and right answers, not policies: after each plan both planes hold the same,
each block is in as many tables as the pool says, nobody overtakes, and every sample's tokens are
those that it would get alone. Results come when Hypothesis says so, or are lost to a new leader.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from control_plane.hashing import PrefixHasher
from control_plane.plan import ResidentRow, StepResult
from control_plane.request import FinishReason, Request, Sequence, SequenceGroup, ended_at
from control_plane.scheduler import NeverFits, Scheduler, SchedulerLimits
from control_plane.wait_queue import QueueFull
from protos.control.v1 import record_pb2
from tests.simulated_checks import PlanesNote, WaitingCheck
from tests.simulated_workload import drawn
from tests.stub_engine import StubEngine

MOST_STEPS = 4
# Histories of forty steps take longer to shrink than a test may last.
NO_SHRINKING = (Phase.explicit, Phase.generate)
PICK = st.integers(0, 1 << 16)


class Known:
    """What the model knows of one request."""

    def __init__(self, request: Request, group: SequenceGroup) -> None:
        self.request, self.group = request, group
        prompt = request.prompt.tolist()
        self.got: list[list[int]] = [[] for _ in range(request.sample_count)]
        self.ended: list[FinishReason | None] = [None] * request.sample_count
        self.wanted: list[list[int]] = []
        for sample in range(request.sample_count):
            full = drawn(prompt, request.max_tokens, sample)
            count, _ = ended_at(request, np.array(prompt + full, np.int32))
            self.wanted.append(full[: count - len(prompt)])

    @property
    def done(self) -> bool:
        return None not in self.ended


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, end, are cancelled and preempted; leaders come and go."""

    @initialize(
        block_size=st.sampled_from([1, 4, 8]),
        sequences=st.integers(1, 3),
        host=st.sampled_from([0, 1, 4]),
        slots=st.sampled_from([1, 3, 6]),
        budget=st.sampled_from([5, 12, 40]),
        chunk=st.sampled_from([2, 40]),
        preemption=st.sampled_from(["auto", "swap", "recompute"]),
    )
    def begin(
        self, block_size: int, sequences: int, host: int, slots: int, budget: int, chunk: int,
        preemption: str,
    ) -> None:  # fmt: skip
        # Blocks for some of the longest sequences that are asked for.
        block_count = sequences * -(-32 // block_size)
        self.limits = SchedulerLimits(
            model_fingerprint="stub",
            block_size=block_size,
            block_count=block_count,
            host_block_count=host * block_count // 2,
            slot_count=slots,
            max_length=48,
            step_tokens=max(budget, slots),
            chunk_tokens=min(chunk, budget),
            preemption=preemption,  # type: ignore[arg-type]
        )
        self.engine = StubEngine(self.limits)
        self.scheduler = Scheduler(self.limits)
        self.waiting = WaitingCheck()
        self.results: deque[StepResult] = deque()
        self.known: dict[str, Known] = {}

    # What is wanted.

    @rule(
        shared=st.integers(0, 12),
        own=st.integers(1, 8),
        new=st.sampled_from([1, 5, 24]),
        samples=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 1]),
        stop_at=st.one_of(st.none(), st.integers(0, 12)),
    )
    def submit(
        self, shared: int, own: int, new: int, samples: int, priority: int, stop_at: int | None
    ) -> None:
        name = str(len(self.known))
        prompt = [*range(shared), *range(500, 500 + own)]
        stops = () if stop_at is None else (drawn(prompt, stop_at + 1, 0)[-1],)
        tokens = np.array(prompt, np.int32)
        request = Request(
            name,
            tokens,
            max_tokens=new,
            sample_count=samples,
            priority=priority,
            stop_ids=stops,
            hashes=tuple(PrefixHasher("stub", self.limits.block_size).extend([], tokens)),
            record=record_pb2.SequenceRecord(tenant=name).SerializeToString(),
        )
        try:
            self.known[name] = Known(request, self.scheduler.submit(request))
        except (NeverFits, QueueFull):
            assert (
                samples > self.limits.slot_count
                or request.blocks_at_worst(self.limits.block_size) > self.limits.block_count
            )

    def _running(self) -> list[Known]:
        return [known for known in self.known.values() if not known.done]

    @precondition(lambda self: self._running())
    @rule(pick=PICK, surely=st.integers(0, 3))
    def cancel(self, pick: int, surely: int) -> None:
        if surely:
            return  # Or hardly anything would come to its end.
        known = self._running()[pick % len(self._running())]
        self.scheduler.cancel(known.group)
        known.ended = [reason or FinishReason.CANCELLED for reason in known.ended]

    @precondition(lambda self: self._running())
    @rule(pick=PICK, sample=st.integers(0, 2))
    def end_one_sample(self, pick: int, sample: int) -> None:
        """As a stop string does, which the scheduler knows nothing of."""
        known = self._running()[pick % len(self._running())]
        sample %= len(known.ended)
        if known.ended[sample] is None and known.got[sample]:
            self.scheduler.finish(known.group.sequences[sample], FinishReason.STOP)
            known.ended[sample] = FinishReason.STOP
            known.wanted[sample] = list(known.got[sample])

    @precondition(lambda self: self._running())
    @rule(pick=PICK)
    def preempt(self, pick: int) -> None:
        self.scheduler.preempt(self._running()[pick % len(self._running())].group)

    # What comes of it.

    @precondition(lambda self: self._running() and len(self.results) < MOST_STEPS)
    @rule(count=st.integers(1, 4))
    def plan(self, count: int) -> None:
        for _ in range(count):
            if len(self.results) < MOST_STEPS:
                self._plan_one()

    def _plan_one(self) -> bool:
        scheduler = self.scheduler
        plan = scheduler.schedule()
        scheduler.pool.check()
        scheduler.swap.pool.check()
        if plan is None:
            # Then somebody runs, or nobody wants to.
            assert self.results or not scheduler.groups, "deadlock"
            return False
        self.waiting.check(scheduler, plan)
        note = PlanesNote.of(scheduler)
        self.results.append(self.engine.execute(plan))
        note.compare(self.engine)
        return True

    @precondition(lambda self: self.results)
    @rule(count=st.integers(1, 4))
    def hear(self, count: int) -> None:
        for _ in range(min(count, len(self.results))):
            self._hear_one()

    def _hear_one(self) -> None:
        outcome = self.scheduler.apply(self.results.popleft())
        for sequence, token in zip(outcome.sequences, outcome.token_ids.tolist(), strict=True):
            known = self.known[sequence.group.request.request_id]
            assert known.ended[sequence.sample_index] is None
            known.got[sequence.sample_index].append(token)
        for sequence, reason, _ in outcome.finished:
            known = self.known[sequence.group.request.request_id]
            assert known.ended[sequence.sample_index] is None
            known.ended[sequence.sample_index] = reason

    @precondition(lambda self: self.results or self._running())
    @rule(count=st.integers(1, 20))
    def run_on(self, count: int) -> None:
        """The usual: a plan, a result, a plan, a result."""
        for _ in range(count):
            if len(self.results) < MOST_STEPS:
                self._plan_one()
            if self.results:
                self._hear_one()

    @precondition(lambda self: self._running())
    @rule()
    def take_over(self) -> None:
        """A new leader: results under way are lost, and what is not resident is queued again."""
        self.results.clear()
        self.scheduler, self.waiting = Scheduler(self.limits), WaitingCheck()
        snapshot = self.engine.snapshot()
        former = list(self._running())
        rows: list[tuple[int, Sequence, ResidentRow]] = []
        released: list[int] = []
        groups: dict[str, SequenceGroup] = {}
        for row in snapshot.rows:
            record = record_pb2.SequenceRecord.FromString(row.record)
            known = self.known[record.tenant]
            if known.ended[row.sample_index] is not None:
                released.append(row.slot)
                continue
            group = groups.setdefault(record.tenant, _group_so_far(known))
            rows.append((record.arrival, group.sequences[row.sample_index], row))
        rows.sort(key=lambda row: row[0])
        self.scheduler.restore([row[1:] for row in rows], snapshot.hashes, released)
        for _, sequence, row in rows:
            self._catch_up(self.known[sequence.group.request.request_id], sequence, row)
        for known in former:
            name = known.request.request_id
            known.group = groups.get(name) or _group_so_far(known)
            if name not in groups:
                self.scheduler.resubmit(known.group)

    def _catch_up(self, known: Known, sequence: Sequence, row: ResidentRow) -> None:
        """Takes the tokens whose results were lost."""
        count, reason = ended_at(known.request, row.tokens)
        output = row.tokens[len(known.request.prompt) : count].tolist()
        got = known.got[sequence.sample_index]
        assert output[: len(got)] == got
        got += output[len(got) :]
        known.ended[sequence.sample_index] = reason

    # What always holds.

    @invariant()
    def tokens_are_right(self) -> None:
        for known in getattr(self, "known", {}).values():
            for got, wanted, ended in zip(known.got, known.wanted, known.ended, strict=True):
                assert got == wanted[: len(got)]
                if ended not in (None, FinishReason.CANCELLED):
                    assert got == wanted

    @invariant()
    def tables_hold_what_the_pools_count(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler, slots = self.scheduler, self.scheduler.slots
        device = [0] * self.limits.block_count
        host = [0] * self.limits.host_block_count
        for slot in range(slots.slot_count):
            for block in slots.table(slot).tolist():
                side = host if slots.swapped[slot] else device
                side[block] += 1
        assert device == scheduler.pool.reference_counts.tolist()
        assert host == scheduler.swap.pool.reference_counts.tolist()

    def teardown(self) -> None:
        """Left alone, everything comes to its end, and nothing is held any more."""
        if not hasattr(self, "scheduler"):
            return
        limit = 400 + 60 * sum(len(known.got) for known in self.known.values())
        for _ in range(limit):
            planned = len(self.results) < MOST_STEPS and self._plan_one()
            if self.results:
                self._hear_one()
            elif not planned:
                break
        assert all(known.done for known in self.known.values())
        self.tokens_are_right()
        assert self.scheduler.pool.used_count == self.scheduler.swap.pool.used_count == 0
        assert self.scheduler.slots.free_count == self.limits.slot_count
        assert not len(self.engine.state.resident_slots())


def _group_so_far(known: Known) -> SequenceGroup:
    """As `control_plane.step_loop` makes one whose clients have some tokens already."""
    group = SequenceGroup.of(known.request, -1)
    for sequence, got, ended in zip(group.sequences, known.got, known.ended, strict=True):
        sequence.finish = ended
        sequence.extend(got)
    if any(known.got):
        group.waiting = [sequence for sequence in group.sequences if sequence.finish is None]
        group.unforked = []
        group.preemptions = 1
    return group


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=NO_SHRINKING,
    suppress_health_check=list(HealthCheck),
)
