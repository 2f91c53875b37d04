"""Who may pass whom: long prompts that wait for room, and the short ones behind them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from control_plane.request import FinishReason, SequenceGroup
from control_plane.scheduler import Scheduler
from control_plane.wait_queue import QueueFull
from tests.stub_engine import expected
from tests.test_scheduler import Driver, make_limits

LONG, SHORT, NEW = 40 * 16, 30, 8


def _busy(block_count: int = 64) -> tuple[Driver, list[SequenceGroup]]:
    """An engine half full of sequences that have a while to go."""
    driver = Driver(make_limits(block_count=block_count, max_length=1024, waiting_requests=10_000))
    running = [driver.submit([i] * 200, f"running{i}", max_tokens=60) for i in range(3)]
    while driver.scheduler.waiting_count or driver.scheduler._prefilling:
        driver.step()
    return driver, running


def _prompts() -> Iterator[list[int]]:
    return ([i % 900, i // 900, *range(SHORT - 2)] for i in range(10_000))


def test_short_prompts_pass_a_long_one_that_has_no_room_yet() -> None:
    driver, running = _busy()
    long = driver.submit(list(range(LONG)), "long", max_tokens=NEW)
    short = driver.submit(next(_prompts()), "short", max_tokens=NEW)
    while short.sequences[0] not in driver.finished:
        driver.step()
    assert not long.admitted and not any(group.finished for group in running)
    driver.run()
    assert driver.outputs(long) == [expected(list(range(LONG)), NEW)]


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    """The bound of docs/scheduling.md: each step brings on someone who came or was let before."""
    driver, running = _busy()
    prompts = _prompts()
    long = driver.submit(list(range(LONG)), "long", max_tokens=NEW)
    shorts: list[SequenceGroup] = []
    while not long.admitted:
        shorts.append(driver.submit(next(prompts), f"short{len(shorts)}", max_tokens=NEW))
        driver.step()
    admitted = [admission.sequence.group for plan in driver.plans for admission in plan.admissions]
    passed_by = set(admitted[: admitted.index(long)]) & set(shorts)
    assert 0 < SHORT * len(passed_by) <= LONG
    assert len(shorts) <= 60 * len(running) + (1 + NEW) * len(passed_by)
    assert driver.scheduler.waiting_count > 0
    driver.run()
    assert all(group.finished for group in [long, *running, *shorts])


def test_nobody_is_passed_by_more_than_its_own_length() -> None:
    driver, _ = _busy()
    waiting = [driver.submit([900 + i] * (LONG - 100 * i), f"long{i}") for i in range(3)]
    short = [driver.submit([i] * 90, f"short{i}", max_tokens=1) for i in range(12)]
    while not waiting[0].admitted:
        driver.step()
    # The third is 440 tokens long, so four of the short ones have passed it, and it nobody.
    assert [group.admitted for group in waiting] == [True, False, False]
    assert sum(group.admitted for group in short) == 4


def test_who_was_preempted_is_not_passed() -> None:
    driver, running = _busy(block_count=64)
    first = running[0]
    driver.scheduler.preempt(first)
    short = driver.submit([5] * 40, "short", max_tokens=1)
    blocker = driver.submit([6] * 400, "blocker", max_tokens=1, priority=-1)
    driver.step()
    assert blocker.admitted and first in driver.scheduler.queue
    while first in driver.scheduler.queue:
        assert not short.admitted
        driver.step()
    driver.run()


def test_many_that_wait_do_not_make_a_plan_slow() -> None:
    """However many wait for room, a few are looked up in the cache."""
    driver, _ = _busy()
    for i in range(500):
        driver.submit([2000 + i] * 600, f"long{i}", max_tokens=1)
    looked_up = []
    match = driver.scheduler.pool.match
    driver.scheduler.pool.match = lambda hashes: looked_up.append(1) or match(hashes)  # type: ignore[method-assign,func-returns-value]
    driver.scheduler.schedule()
    assert 0 < len(looked_up) <= 9


# The prefix cache under pressure.


def test_pinned_prefixes_stay_while_others_come_and_go() -> None:
    driver = Driver(make_limits())
    system = list(range(10 * 16))
    pinned = driver.submit([*system, 1], "first")
    driver.scheduler.pool.pin(pinned.request.hashes)
    driver.run()
    for i in range(20):
        driver.submit([300 + i] * 300, f"other{i}")
    driver.run()
    again = driver.submit([*system, 2], "again")
    driver.run()
    assert again.sequences[0].cached == len(system)


@pytest.mark.parametrize("host", [0, 64])
def test_pins_give_way_to_a_request_that_nothing_else_can_help(host: int) -> None:
    limits = make_limits(max_length=1024, host_block_count=host, preemption="swap")
    driver = Driver(limits)
    pinned = driver.submit(list(range(20 * 16)), "pinned")
    driver.scheduler.pool.pin(pinned.request.hashes)
    driver.run()
    prompt = [9] * (60 * 16)
    huge = driver.submit(prompt, "huge", max_tokens=40)
    while not driver.scheduler.resident_groups:
        driver.step()
    driver.scheduler.preempt(huge)
    small = driver.submit([4] * 20, "small", max_tokens=10)
    driver.run()
    assert driver.outputs(huge) == [expected(prompt, 40)]
    assert driver.outputs(small) == [expected([4] * 20, 10)]
    # What still fits beside it has stayed.
    assert driver.scheduler.pool.idle_pinned_count < 20


def test_pins_are_not_given_up_while_others_run() -> None:
    driver = Driver(make_limits())
    pinned = driver.submit(list(range(20 * 16)), "pinned")
    driver.scheduler.pool.pin(pinned.request.hashes)
    driver.run()
    groups = [driver.submit([i] * 200, f"r{i}", max_tokens=150) for i in range(6)]
    driver.run()
    assert driver.scheduler.totals.preemptions > 0
    assert driver.scheduler.pool.idle_pinned_count == 20
    for i, group in enumerate(groups):
        assert driver.outputs(group) == [expected([i] * 200, 150)]


@pytest.mark.parametrize(("share", "kept"), [(1.0, 0), (0.5, 160)])
def test_one_tenant_cannot_push_out_what_another_has_cached(share: float, kept: int) -> None:
    driver = Driver(make_limits(tenant_share=share, slot_count=2))
    quiet = list(range(10 * 16))
    driver.submit([*quiet, 1], "quiet", salt="quiet")
    driver.run()
    for i in range(20):
        driver.submit([300 + i] * 120, f"loud{i}", salt="loud")
    driver.run()
    again = driver.submit([*quiet, 2], "again", salt="quiet")
    driver.run()
    assert again.sequences[0].cached == kept


def test_a_tenant_alone_has_the_whole_cache() -> None:
    driver = Driver(make_limits(tenant_share=0.1))
    prompt = list(range(40 * 16))[:480]
    driver.submit(prompt, "first", salt="alone", max_tokens=1)
    driver.run()
    again = driver.submit([*prompt, 5], "again", salt="alone", max_tokens=1)
    driver.run()
    assert again.sequences[0].cached == 480


# What a refused request waits for.


def test_a_request_gets_in_when_another_has_computed_its_prompt() -> None:
    driver = Driver(make_limits(max_length=1024, step_tokens=128), depth=1)
    system = list(range(40 * 16))
    first = driver.submit([*system, 1], "first", max_tokens=200)
    second = driver.submit([*system, 2], "second", max_tokens=4)
    steps = 0
    while not second.admitted:
        driver.step()
        steps += 1
    # The prompt takes ten steps of 64 tokens; without it the second one needs one block.
    assert steps <= 12 and not first.finished
    assert second.sequences[0].cached >= 16


def test_a_long_prompt_finds_a_place_among_short_ones() -> None:
    """The limit in tokens is passed by the last one that is taken, of whatever length."""
    driver = Driver(make_limits(waiting_tokens=100, slot_count=1, max_length=1024))
    driver.submit([1] * 50, "running", max_tokens=30)
    driver.step()
    driver.submit([2] * 90, "short")
    driver.submit([3] * 600, "long")
    with pytest.raises(QueueFull, match="690 prompt tokens wait") as refused:
        driver.submit([4], "next")
    assert refused.value.excess_tokens == 591


def test_one_with_output_from_elsewhere_is_not_passed() -> None:
    driver, _ = _busy()
    moved = driver.submit([900] * LONG, "moved", max_tokens=NEW)
    driver.scheduler.cancel(moved)
    again = SequenceGroup.of(moved.request, -1)
    again.sequences[0].extend([5, 6, 7])
    driver.scheduler.resubmit(again)
    assert driver.scheduler.queue._places[again].patience == 0


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_nobody_builds_on_what_faulted_before_it_was_preempted(preemption: str) -> None:
    """The faulty step's result comes after the plan that takes the sequence off the device."""
    driver = Driver(make_limits(host_block_count=64, preemption=preemption))
    group = driver.submit(list(range(64)), "faulty", max_tokens=60)
    driver.engine.fault = lambda slot, tokens: len(tokens) == 75
    scheduler, results = driver.scheduler, driver._results
    while not (results and results[-1].faults):  # type: ignore[attr-defined]
        if results:
            scheduler.apply(results.pop(0))  # type: ignore[arg-type]
        results.append(driver.engine.execute(scheduler.schedule()))  # type: ignore[arg-type]
    scheduler.preempt(group)
    results.append(driver.engine.execute(scheduler.schedule()))  # type: ignore[arg-type]
    driver.engine.fault = lambda slot, tokens: False
    while results:
        scheduler.apply(results.pop(0))  # type: ignore[arg-type]
    assert group.sequences[0].finish is FinishReason.ERROR
    assert not len(scheduler.pool.match(group.request.hashes))
    after = driver.submit([*range(64), 1], "after", max_tokens=2)
    driver.run()
    assert after.sequences[0].cached == 0


def test_a_leader_that_takes_over_knows_whose_resident_blocks_are() -> None:
    driver = Driver(make_limits(tenant_share=0.25, slot_count=2))
    loud = driver.submit([7] * 320, "loud", salt="loud", max_tokens=30)
    while not loud.sequences[0].published:
        driver.step()
    successor = Scheduler(driver.limits)
    group = SequenceGroup.of(loud.request, 0)
    snapshot = driver.engine.snapshot()
    successor.restore([(group.sequences[0], row) for row in snapshot.rows], snapshot.hashes)
    assert set(successor.pool._cached._tenants.values()) == {"loud"}
