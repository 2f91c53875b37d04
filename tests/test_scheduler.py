"""The scheduler against an engine without a model: tokens, blocks, preemption, takeover."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from control_plane.beams import BeamFields, Hypothesis
from control_plane.hashing import PrefixHasher
from control_plane.overload import DrainRate
from control_plane.plan import Outcome, Plan
from control_plane.request import (
    FinishReason,
    Request,
    SamplingFields,
    Sequence,
    SequenceGroup,
    ended_at,
)
from control_plane.scheduler import NeverFits, Scheduler, SchedulerLimits
from control_plane.wait_queue import QueueFull
from protos.control.v1 import record_pb2
from tests.stub_engine import StubEngine, draw, expected


def make_limits(**changes: Any) -> SchedulerLimits:
    sizes = {
        "block_size": 16,
        "block_count": 64,
        "slot_count": 8,
        "max_length": 512,
        "step_tokens": 64,
        "chunk_tokens": 64,
    }
    return SchedulerLimits(model_fingerprint="stub", **(sizes | changes))


def make_request(
    prompt: list[int], limits: SchedulerLimits, name: str = "r", **fields: object
) -> Request:
    tokens = np.array(prompt, np.int32)
    hashes = PrefixHasher("stub", limits.block_size).extend([], tokens)
    defaults: dict[str, object] = {
        "max_tokens": 8,
        "record": record_pb2.SequenceRecord(tenant=name).SerializeToString(),
    }
    return Request(name, tokens, hashes=tuple(hashes), **(defaults | fields))  # type: ignore[arg-type]


class Driver:
    """Runs a scheduler against a stub engine with up to `depth` steps in flight."""

    def __init__(self, limits: SchedulerLimits, depth: int = 2) -> None:
        self.limits, self.depth = limits, depth
        self.scheduler = Scheduler(limits)
        self.engine = StubEngine(limits)
        self.output: dict[Sequence, list[int]] = {}
        self.finished: dict[Sequence, FinishReason] = {}
        self.hypotheses: dict[SequenceGroup, list[Hypothesis]] = {}
        self.plans: list[Plan] = []
        self.restored: list[SequenceGroup] = []
        self._results: list[object] = []

    def submit(self, prompt: list[int], name: str = "r", **fields: object) -> SequenceGroup:
        return self.scheduler.submit(make_request(prompt, self.limits, name, **fields))

    def step(self) -> Outcome | None:
        """Plans as far ahead as allowed, then takes one result; None when nothing is left."""
        while len(self._results) < self.depth:
            plan = self.scheduler.schedule()
            self.scheduler.pool.check()
            self.scheduler.swap.pool.check()
            if plan is None:
                break
            self.plans.append(plan)
            self._results.append(self.engine.execute(plan))
            self._check_planes_agree()
        if not self._results:
            return None
        outcome = self.scheduler.apply(self._results.pop(0))  # type: ignore[arg-type]
        self.scheduler.pool.check()
        for sequence, token in zip(outcome.sequences, outcome.token_ids.tolist(), strict=True):
            self.output.setdefault(sequence, []).append(token)
        self.hypotheses.update(outcome.hypotheses)
        for sequence, reason, _ in outcome.finished:
            assert sequence not in self.finished
            self.finished[sequence] = reason
        return outcome

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if self.step() is None:
                return
        raise AssertionError("it does not end")

    def _check_planes_agree(self) -> None:
        pool = self.scheduler.pool
        free, cached, used = self.engine.state.block_counts()
        assert free + cached + used == self.limits.block_count
        if not self.scheduler._released:
            assert used == pool.used_count

    def outputs(self, group: SequenceGroup) -> list[list[int]]:
        return [self.output[sequence] for sequence in group.sequences]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_are_those_of_each_sequence_alone(depth: int) -> None:
    driver = Driver(make_limits(), depth)
    prompts = [list(range(start, start + n)) for start, n in ((0, 1), (5, 16), (40, 17), (90, 200))]
    groups = [driver.submit(prompt, f"r{i}") for i, prompt in enumerate(prompts)]
    driver.run()
    for prompt, group in zip(prompts, groups, strict=True):
        assert driver.outputs(group) == [expected(prompt, 8)]
        assert driver.finished[group.sequences[0]] is FinishReason.LENGTH
    assert driver.scheduler.pool.used_count == 0
    assert driver.engine.state.reference_counts.sum() == 0


def test_stop_id_ends_a_sequence_and_the_step_in_flight_is_dropped() -> None:
    prompt = list(range(20))
    tokens = expected(prompt, 30)
    driver = Driver(make_limits())
    group = driver.submit(prompt, max_tokens=30, stop_ids=(tokens[11],))
    other = driver.submit(list(range(50, 70)), "other", max_tokens=30)
    driver.run()
    assert driver.outputs(group) == [tokens[: tokens.index(tokens[11]) + 1]]
    assert driver.finished[group.sequences[0]] is FinishReason.STOP
    assert driver.outputs(other) == [expected(list(range(50, 70)), 30)]


def test_prefix_cache_numbers() -> None:
    # Ten blocks: 55 tokens take four; another prompt that shares 48 hits three and takes one.
    limits = make_limits(block_count=10, step_tokens=128, chunk_tokens=128)
    driver = Driver(limits, depth=1)
    first = driver.submit(list(range(55)), "a", max_tokens=2)
    driver.step()
    assert driver.scheduler.pool.used_count == 4
    second = driver.submit([*range(48), *range(500, 507)], "b", max_tokens=2)
    driver.step()
    assert second.sequences[0].cached == 48
    assert first.sequences[0].cached == 0
    admission = driver.plans[-1].admissions[0]
    assert len(admission.blocks) - admission.cached // 16 == 1


def test_fully_cached_prompt_recomputes_one_token_and_takes_no_block() -> None:
    driver = Driver(make_limits(), depth=1)
    prompt = list(range(64))
    first = driver.submit(prompt, "a", max_tokens=1)
    driver.run()
    before = driver.engine.prefill_tokens
    second = driver.submit(prompt, "b", max_tokens=1)
    driver.run()
    assert driver.engine.prefill_tokens - before == 1
    assert second.sequences[0].cached == 64
    assert len(driver.plans[-1].admissions or driver.plans[-2].admissions) == 1
    assert driver.outputs(first) == driver.outputs(second)


def test_generated_blocks_are_cached_for_the_next_turn() -> None:
    driver = Driver(make_limits())
    prompt = list(range(20))
    group = driver.submit(prompt, "a", max_tokens=40)
    driver.run()
    turn = [*prompt, *driver.outputs(group)[0], 7, 8, 9]
    second = driver.submit(turn, "b")
    driver.run()
    assert second.sequences[0].cached == (20 + 40 - 1) // 16 * 16
    assert driver.outputs(second) == [expected(turn, 8)]


def test_chunks_are_cut_by_budget_and_by_request() -> None:
    limits = make_limits(
        step_tokens=1024, chunk_tokens=400, block_count=256, max_length=1000, slot_count=4
    )
    driver = Driver(limits, depth=1)
    for start in range(3):
        driver.submit(list(range(start, 800 + start)), f"r{start}", max_tokens=1)
    plan = driver.scheduler.schedule()
    assert plan is not None
    assert plan.chunk_counts == [400, 400, 224]


@pytest.mark.parametrize(("length", "block_size"), [(33, 16), (32, 16), (1, 8), (21, 8), (7, 8)])
def test_samples_fork_with_copy_on_write(length: int, block_size: int) -> None:
    # Appending a tokens to a fork of s tokens takes ceil((s+a)/b) - floor(s/b) blocks, and a block
    # is copied exactly when s % b != 0, by all holders but the last.
    driver = Driver(make_limits(block_size=block_size), depth=1)
    prompt = list(range(length))
    group = driver.submit(prompt, sample_count=4, max_tokens=40)
    # The stub engine never stops early: after its first token a sample grows by one a step.
    driver.step()
    while driver.step() is not None:
        slots = [sequence.slot for sequence in group.sequences if sequence.slot >= 0]
        if len(slots) < 4:
            break
        written = int(driver.scheduler.slots.computed[slots[0]])
        shared = length // block_size
        assert driver.scheduler.pool.used_count == shared + 4 * (-(-written // block_size) - shared)
    copies = sum(len(plan.copied_slots) for plan in driver.plans)
    assert copies == (3 if length % block_size else 0)
    driver.run()
    assert driver.outputs(group) == [expected(prompt, 40, index) for index in range(4)]
    assert driver.engine.prefill_tokens == length


def test_out_of_blocks_preempts_the_latest_and_changes_no_token() -> None:
    limits = make_limits(block_count=12)
    driver = Driver(limits)
    groups = [
        driver.submit([100 * i + t for t in range(17)], f"r{i}", max_tokens=80) for i in range(5)
    ]
    driver.run()
    assert driver.scheduler.totals.preemptions > 0
    assert groups[0].preemptions == 0
    for i, group in enumerate(groups):
        assert driver.outputs(group) == [expected([100 * i + t for t in range(17)], 80)]


def test_preempted_samples_go_on_where_they_were() -> None:
    driver = Driver(make_limits(block_count=16))
    groups = [
        driver.submit([200 * i + t for t in range(21)], f"r{i}", max_tokens=30, sample_count=3)
        for i in range(3)
    ]
    driver.run()
    assert sum(group.preemptions for group in groups) > 0
    for i, group in enumerate(groups):
        prompt = [200 * i + t for t in range(21)]
        assert driver.outputs(group) == [expected(prompt, 30, index) for index in range(3)]


def test_what_can_never_run_is_refused_at_once() -> None:
    driver = Driver(make_limits(block_count=4, slot_count=2))
    with pytest.raises(NeverFits, match="4"):
        driver.submit(list(range(60)), max_tokens=20)
    with pytest.raises(NeverFits, match="slots"):
        driver.submit([1], max_tokens=1, sample_count=3)
    driver.submit(list(range(60)), max_tokens=5)
    driver.run()


def test_wait_queue_is_bounded() -> None:
    driver = Driver(make_limits(waiting_requests=2))
    driver.submit([1], "a")
    driver.submit([2], "b")
    with pytest.raises(QueueFull):
        driver.submit([3], "c")


def test_priority_goes_first() -> None:
    driver = Driver(make_limits(slot_count=1))
    late = driver.submit([1], "late", priority=5)
    soon = driver.submit([2], "soon", priority=-5)
    driver.run()
    order = list(driver.finished)
    assert order == [soon.sequences[0], late.sequences[0]]


def test_cancel_frees_blocks_with_the_next_plan() -> None:
    driver = Driver(make_limits())
    group = driver.submit(list(range(100)), max_tokens=300, sample_count=2)
    other = driver.submit(list(range(30)), "other", max_tokens=20)
    for _ in range(6):
        driver.step()
    driver.scheduler.cancel(group)
    driver.step()
    driver.step()
    resident = driver.engine.state.resident_slots().tolist()
    assert resident == [other.sequences[0].slot]
    driver.run()
    assert driver.outputs(other) == [expected(list(range(30)), 20)]
    assert all(sequence.finish is FinishReason.CANCELLED for sequence in group.sequences)


def test_fault_ends_one_sequence_and_distrusts_its_blocks() -> None:
    driver = Driver(make_limits())
    prompt = list(range(40))
    bad = driver.submit(prompt, "bad", max_tokens=60)
    good = driver.submit(list(range(300, 340)), "good", max_tokens=60)
    driver.engine.fault = lambda slot, tokens: tokens[0] == 0 and len(tokens) == 85
    driver.run()
    assert driver.finished[bad.sequences[0]] is FinishReason.ERROR
    assert driver.outputs(good) == [expected(list(range(300, 340)), 60)]
    # Neither its prompt's blocks nor those that it generated are found by the next turn.
    driver.engine.fault = lambda slot, tokens: False
    turn = driver.submit(prompt + driver.outputs(bad)[0], "turn")
    driver.run()
    assert turn.sequences[0].cached == 0


def test_samples_with_prompt_logprobs_do_not_preempt_themselves_for_ever() -> None:
    # The pool holds both samples only if the second finds the prompt that the first computes anew.
    driver = Driver(make_limits(block_count=9))
    sampling = SamplingFields(prompt_logprob_count=0)
    pair = driver.submit(list(range(64)), "pair", max_tokens=32, sample_count=2, sampling=sampling)
    driver.step()
    driver.scheduler.preempt(pair)
    driver.run(limit=200)
    assert driver.outputs(pair) == [expected(list(range(64)), 32, index) for index in range(2)]


def test_one_plan_admits_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.scheduler.ADMITTED_TOKENS", 100)
    driver = Driver(make_limits(), depth=1)
    prompt = list(range(64))
    driver.submit(prompt, "first", max_tokens=1)
    driver.run()
    # All of them are cached, so that each costs one token of the step's budget only.
    groups = [driver.submit(prompt, f"r{i}", max_tokens=1) for i in range(6)]
    driver.run()
    assert [len(plan.admissions) for plan in driver.plans if plan.admissions] == [1, 2, 2, 2]
    assert all(driver.outputs(group) == [expected(prompt, 1)] for group in groups)


def test_preempted_twice_while_it_is_resumed() -> None:
    driver = Driver(make_limits(step_tokens=16, chunk_tokens=16))
    prompt = list(range(40))
    group = driver.submit(prompt, max_tokens=40, sample_count=3)
    for _ in range(12):
        driver.step()
    for _ in range(4):
        driver.scheduler.preempt(group)
        driver.step()
        driver.step()
    driver.run()
    assert driver.outputs(group) == [expected(prompt, 40, index) for index in range(3)]


def _take_over(driver: Driver, groups: list[SequenceGroup]) -> Driver:
    """A new leader that knows nothing but the engine's snapshot."""
    successor = Driver(driver.limits)
    successor.engine = driver.engine
    snapshot = driver.engine.snapshot()
    by_name = {group.request.request_id: group.request for group in groups}
    rebuilt: dict[str, SequenceGroup] = {}
    rows = []
    for row in snapshot.rows:
        request = by_name[record_pb2.SequenceRecord.FromString(row.record).tenant]
        group = rebuilt.setdefault(request.request_id, SequenceGroup.of(request, 0))
        sequence = group.sequences[row.sample_index]
        count, _ = ended_at(request, row.tokens)
        successor.output[sequence] = row.tokens[len(request.prompt) : count].tolist()
        rows.append((sequence, row))
    rows.sort(key=lambda pair: record_pb2.SequenceRecord.FromString(pair[1].record).arrival)
    successor.scheduler.restore(rows, snapshot.hashes)
    successor.scheduler.pool.check()
    successor.restored = successor.scheduler.groups
    return successor


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 14])
def test_new_leader_goes_on_without_recomputing(steps: int) -> None:
    driver = Driver(make_limits(block_count=128, slot_count=16))
    groups = [
        driver.submit(
            list(range(i, i + 21 + 30 * i)), f"r{i}", max_tokens=40, sample_count=1 + i % 3
        )
        for i in range(4)
    ]
    for _ in range(steps):
        driver.step()
    waiting = {group.request.request_id for group in groups if not group.admitted}
    total = sum(len(g.request.prompt) for g in groups if g.request.request_id not in waiting)
    successor = _take_over(driver, groups)
    successor.run()
    assert driver.engine.prefill_tokens == total
    names = [group.request.request_id for group in successor.restored]
    assert names == [f"r{i}" for i in range(4) if f"r{i}" not in waiting]
    finals = {seq.group.request.request_id: seq.group for seq in successor.output}
    assert set(finals) == {group.request.request_id for group in groups} - waiting
    for group in finals.values():
        prompt = group.request.prompt.tolist()
        for sequence in group.sequences:
            assert successor.output[sequence] == expected(prompt, 40, sequence.sample_index)


def test_the_queue_is_bounded_in_tokens_too() -> None:
    driver = Driver(make_limits(waiting_tokens=100, slot_count=1))
    driver.submit(list(range(300)), "long")
    driver.step()
    driver.submit(list(range(200)), "alone in the queue")
    with pytest.raises(QueueFull, match="200 prompt tokens wait") as refused:
        driver.submit(list(range(50)), "next")
    assert refused.value.excess_tokens == 150
    driver.run()
    driver.submit(list(range(50)), "later")
    driver.run()


def test_clients_are_told_to_wait_as_long_as_the_queue_takes() -> None:
    drain = DrainRate()
    assert drain.seconds_for(1000, now=0.0) == 1.0
    for second in range(11):
        drain.add(float(second), 200)
    assert drain.seconds_for(1100, now=10.0) == pytest.approx(5.0)
    assert drain.seconds_for(1, now=10.0) == 0.1 and drain.seconds_for(10**9, now=10.0) == 60.0
    # What is long past says nothing of now.
    assert drain.seconds_for(1000, now=100.0) == 1.0


@pytest.mark.parametrize(("sample_count", "block_count"), [(1, 12), (3, 16)])
def test_new_leader_brings_back_what_the_former_one_swapped_out(
    sample_count: int, block_count: int
) -> None:
    limits = make_limits(block_count=block_count, host_block_count=32, preemption="swap")
    driver = Driver(limits)
    groups = [
        driver.submit(list(range(i, i + 50)), f"r{i}", max_tokens=60, sample_count=sample_count)
        for i in range(2)
    ]
    while not driver.scheduler.swap.groups:
        assert driver.step()
    computed = driver.engine.prefill_tokens
    successor = _take_over(driver, groups)
    assert [group.request.request_id for group in successor.scheduler.swap.groups] == ["r1"]
    successor.run()
    assert driver.engine.prefill_tokens == computed
    assert successor.scheduler.swap.pool.used_count == 0
    for sequence, output in successor.output.items():
        prompt = sequence.group.request.prompt.tolist()
        assert output == expected(prompt, 60, sequence.sample_index)
    assert len(successor.output) == 2 * sample_count


def test_shared_blocks_are_swapped_once() -> None:
    """Samples of one prompt share its blocks in host memory, and again when they are back."""
    driver = Driver(make_limits(block_count=40, host_block_count=40, preemption="swap"), depth=1)
    group = driver.submit(list(range(100)), max_tokens=40, sample_count=4)
    for _ in range(6):
        driver.step()
    used = driver.scheduler.pool.used_count
    assert used == 6 + 4
    driver.scheduler.preempt(group)
    driver.step()
    assert driver.scheduler.swap.pool.used_count == used
    assert driver.scheduler.pool.used_count == 0
    driver.run()
    assert driver.scheduler.totals.swapped_in_blocks == used
    assert driver.outputs(group) == [expected(list(range(100)), 40, index) for index in range(4)]


def test_the_cheaper_way_to_preempt_is_chosen() -> None:
    for moves_us, forward_us, swaps in ((1_000_000, 10, 0), (10, 1_000_000, 1)):
        limits = make_limits(block_count=16, host_block_count=32)
        driver = Driver(limits, depth=1)
        driver.scheduler.costs.observe(1, 0, moves_us, 0)
        driver.scheduler.costs.observe(0, 64, 0, forward_us)
        for i in range(2):
            driver.submit(list(range(i, i + 90)), f"r{i}", max_tokens=60)
        driver.run()
        assert driver.scheduler.totals.preemptions > 0
        assert bool(driver.scheduler.totals.swaps) == bool(swaps)


def test_a_swap_space_that_is_full_means_recomputing() -> None:
    driver = Driver(make_limits(block_count=16, host_block_count=3, preemption="swap"))
    groups = [driver.submit(list(range(i, i + 90)), f"r{i}", max_tokens=60) for i in range(2)]
    driver.run()
    assert driver.scheduler.totals.preemptions > 0 and driver.scheduler.totals.swaps == 0
    for i, group in enumerate(groups):
        assert driver.outputs(group) == [expected(list(range(i, i + 90)), 60)]


def beam_request(prompt: list[int], limits: SchedulerLimits, width: int, name: str) -> Request:
    beams = BeamFields(width, early_stopping="first" if width % 2 else "heuristic")
    return make_request(
        prompt,
        limits,
        name,
        beams=beams,
        max_tokens=14,
        stop_ids=tuple(range(0, 1000, 100)),
        sample_count=width,
        sampling=SamplingFields(logprob_count=beams.candidate_count(10)),
    )


@pytest.mark.parametrize("seed", range(20))
def test_beams_find_the_same_under_pressure(seed: int) -> None:
    """Searches among other requests, with preemption and cancels at random, and alone."""
    rng = random.Random(seed)
    limits = make_limits(
        block_size=rng.choice([4, 8]),
        block_count=rng.choice([40, 60]),
        host_block_count=rng.choice([0, 30, 100]),
        slot_count=14,
        preemption=rng.choice(["auto", "swap", "recompute"]),
        max_length=120,
    )
    driver = Driver(limits, depth=rng.choice([1, 2, 3]))
    searches, others = [], []
    for i in range(12):
        prompt = [rng.randrange(1000) for _ in range(rng.randrange(1, 30))]
        if i % 2:
            request = beam_request(prompt, limits, rng.choice([1, 2, 3, 4, 6]), f"r{i}")
            searches.append(driver.scheduler.submit(request))
        else:
            others.append(driver.submit(prompt, f"r{i}", max_tokens=20, sample_count=1 + i % 3))
        for _ in range(rng.randrange(6)):
            driver.step()
        if driver.scheduler.resident_groups and rng.random() < 0.4:
            driver.scheduler.preempt(rng.choice(driver.scheduler.resident_groups))
    driver.scheduler.cancel(others[-1])
    driver.run()
    for group in searches:
        alone = Driver(make_limits(block_count=200, max_length=120, block_size=limits.block_size))
        single = alone.scheduler.submit(group.request)
        alone.run()
        found = [(one.tokens.tolist(), one.score) for one in driver.hypotheses[group]]
        assert found == [(one.tokens.tolist(), one.score) for one in alone.hypotheses[single]]
        assert len(found) == group.request.sample_count
        assert not any(sequence in driver.output for sequence in group.sequences)
    assert driver.scheduler.pool.used_count == driver.scheduler.swap.pool.used_count == 0
    assert driver.engine.state.reference_counts.sum() == 0


def test_dropped_beams_free_their_blocks_at_once() -> None:
    """A search never holds more than its beams can reach: shared prompt, and own tails."""
    driver = Driver(make_limits(block_size=4), depth=1)
    group = driver.scheduler.submit(beam_request(list(range(16)), driver.limits, 4, "search"))
    shared = []
    while not group.finished:
        driver.step()
        tables = [driver.scheduler.slots.table(each.slot) for each in group.resident()]
        if tables:
            distinct = len(np.unique(np.concatenate(tables)))
            assert distinct == driver.scheduler.pool.used_count
            shared.append(distinct < sum(map(len, tables)))
    assert all(shared) and len(shared) > 5


@pytest.mark.parametrize("seed", range(25))
def test_random_histories(seed: int) -> None:
    """Arrivals, cancels, preemptions and stops at random; tokens and blocks stay right."""
    rng = random.Random(seed)
    limits = make_limits(
        block_size=rng.choice([4, 8, 16]),
        block_count=rng.choice([24, 40, 80]),
        host_block_count=rng.choice([0, 10, 100]),
        preemption=rng.choice(["auto", "swap", "recompute"]),
        slot_count=rng.choice([4, 9]),
        step_tokens=rng.choice([16, 40]),
        chunk_tokens=rng.choice([8, 40]),
        max_length=200,
    )
    driver = Driver(limits, depth=rng.choice([1, 2, 3]))
    shared = [rng.randrange(1000) for _ in range(40)]
    groups: list[SequenceGroup] = []
    for i in range(25):
        prompt = shared[: rng.randrange(40)] + [
            rng.randrange(1000) for _ in range(rng.randrange(1, 20))
        ]
        fields = {
            "max_tokens": rng.randrange(1, 30),
            "sample_count": rng.choice([1, 1, 1, 2, 3]),
            "priority": rng.choice([0, 0, 1]),
            "stop_ids": tuple(rng.sample(range(1000), rng.choice([0, 20]))),
        }
        try:
            groups.append(driver.submit(prompt, f"r{i}", **fields))
        except NeverFits:
            continue
        for _ in range(rng.randrange(4)):
            driver.step()
        if rng.random() < 0.1:
            driver.scheduler.cancel(rng.choice(groups))
        if driver.scheduler.resident_groups and rng.random() < 0.1:
            driver.scheduler.preempt(rng.choice(driver.scheduler.resident_groups))
    driver.run()
    for group in groups:
        prompt = group.request.prompt.tolist()
        for sequence in group.sequences:
            output = driver.output.get(sequence, [])
            full = np.array(
                expected(prompt, group.request.max_tokens, sequence.sample_index), np.int32
            )
            count, _ = ended_at(group.request, np.concatenate([group.request.prompt, full]))
            want = full[: count - len(prompt)].tolist()
            if sequence.finish is FinishReason.CANCELLED:
                assert output == want[: len(output)]
            else:
                assert output == want
    assert driver.scheduler.pool.used_count == 0
    assert driver.scheduler.swap.pool.used_count == 0
    assert driver.engine.state.reference_counts.sum() == 0
    assert draw(np.array([1]), 0) >= 0
