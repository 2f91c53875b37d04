"""Groups whose sequences need one another come to their end, however little room there is."""

from __future__ import annotations

from control_plane.beams import BeamFields
from control_plane.request import FinishReason, SamplingFields, SequenceGroup
from tests.simulated_search import searched
from tests.stub_engine import expected
from tests.test_scheduler import Driver, make_limits


def submit_search(driver: Driver, prompt: list[int], width: int, max_tokens: int) -> SequenceGroup:
    fields = BeamFields(width)
    sampling = SamplingFields(logprob_count=fields.candidate_count(0))
    return driver.submit(prompt, "search", max_tokens=max_tokens, beams=fields, sampling=sampling)


def check_found(driver: Driver, group: SequenceGroup) -> None:
    assert group.finished, "the search does not end"
    request = group.request
    assert request.beams is not None
    answer = searched(tuple(request.prompt.tolist()), request.max_tokens, request.beams, (), None)
    [found] = driver.hypotheses[group]
    assert (found.tokens.tolist(), found.score) == (
        answer.found[0].tokens.tolist(),
        answer.found[0].score,
    )


def test_beams_that_come_back_may_take_the_last_block() -> None:
    # One block of prompt that all share and one for each of three beams: all four that there are.
    # None needs to stay free for those that decode: beams wait until their siblings are back.
    driver = Driver(make_limits(block_count=4))
    group = submit_search(driver, list(range(17)), width=3, max_tokens=14)
    for _ in range(3):
        driver.step()
    driver.scheduler.preempt(group)
    driver.run(limit=200)
    check_found(driver, group)


def test_beams_that_come_back_to_a_prompt_that_is_distrusted_share_it_all_the_same() -> None:
    """Another request that shares the prompt faults while some beams wait for the others.

    The prompt's blocks lose their hashes, so that the beams which are still to come do not find
    them; without sharing they have no room.
    """
    driver = Driver(make_limits(block_size=4, block_count=18, chunk_tokens=5), depth=1)
    prompt = list(range(38))
    group = submit_search(driver, prompt, width=4, max_tokens=7)
    while len(group.resident()) < 4 or driver.scheduler._prefilling:
        assert driver.step()
    other = driver.submit([*prompt[:20], 100], "other", max_tokens=40, priority=-1)
    # More than a chunk of its tokens is not in the prompt's blocks, so it comes back in two steps.
    while group.beams is not None and group.beams.length < 42:
        assert driver.step()
    driver.scheduler.preempt(group)
    while not (group.preemptions and len(group.resident()) == 1):
        assert driver.step()
    driver.engine.fault = lambda slot, tokens: slot == other.sequences[0].slot
    driver.run(limit=200)
    assert driver.finished[other.sequences[0]] is FinishReason.ERROR
    check_found(driver, group)


def test_beams_that_come_back_give_way_to_whoever_comes_first() -> None:
    """A request of a higher priority has no room beside the beams that are back already.

    It comes before those that are still to come back, and nobody decodes who could make room.
    """
    driver = Driver(make_limits(block_size=4, block_count=18, chunk_tokens=2), depth=1)
    group = submit_search(driver, list(range(38)), width=4, max_tokens=7)
    while len(group.resident()) < 4 or driver.scheduler._prefilling:
        assert driver.step()
    driver.scheduler.preempt(group)
    while not (group.preemptions and len(group.resident()) == 1):
        assert driver.step()
    urgent = driver.submit(list(range(100, 160)), "urgent", max_tokens=4, priority=-1)
    driver.run(limit=200)
    assert driver.outputs(urgent) == [expected(list(range(100, 160)), 4)]
    check_found(driver, group)


def test_beams_that_come_back_give_way_to_who_is_in_host_memory() -> None:
    """Whoever was swapped out comes back first, so that the beams that are still away stay away.

    It has no room to write on beside the beams that are back, which wait for their siblings.
    """
    limits = make_limits(block_size=4, block_count=18, host_block_count=8, preemption="swap")
    driver = Driver(limits, depth=1)
    group = submit_search(driver, list(range(38)), width=4, max_tokens=7)
    while group.beams is None or group.beams.length < 41:
        assert driver.step()
    prompt = list(range(100, 113))
    first = driver.submit(prompt, "first", max_tokens=20, priority=-1)
    driver.scheduler.preempt(group)
    driver.step()
    assert len(group.resident()) == 2
    driver.scheduler.preempt(first)
    driver.run(limit=200)
    assert driver.outputs(first) == [expected(prompt, 20)]
    check_found(driver, group)


def test_samples_that_share_nothing_are_not_swapped_out_and_in_for_ever() -> None:
    """One of two samples is generated again after the other one was swapped out and in.

    Blocks that come back from the host have no hashes, so that both samples have a prompt of their
    own, for which there is no room. Swapping them changes nothing about that.
    """
    driver = Driver(
        make_limits(block_size=1, block_count=50, host_block_count=50, preemption="swap"), depth=1
    )
    prompt = list(range(20))
    pair = driver.submit(prompt, "pair", max_tokens=12, sample_count=2)
    other = driver.submit([900], "other", max_tokens=9)
    driver.step()
    driver.step()
    driver.scheduler.preempt(pair)
    while not driver.scheduler.totals.swapped_in_blocks:
        assert driver.step()
    driver.scheduler.cancel(other)
    driver.step()
    driver = successor_without(driver, pair, 0)
    driver.run(limit=300)
    [group] = {sequence.group for sequence in driver.output}
    assert driver.outputs(group) == [expected(prompt, 12, index) for index in range(2)]


def successor_without(driver: Driver, former: SequenceGroup, index: int) -> Driver:
    """A new leader, which finds all of a group but one sample."""
    successor = Driver(driver.limits, depth=1)
    successor.engine = driver.engine
    group = SequenceGroup.of(former.request, 0)
    lost = former.sequences[index].slot
    snapshot = driver.engine.snapshot()
    kept = [row for row in snapshot.rows if row.slot != lost]
    for row in kept:
        output = row.tokens[row.prompt_count :].tolist()
        successor.output[group.sequences[row.sample_index]] = output
    successor.scheduler.restore(
        [(group.sequences[row.sample_index], row) for row in kept], snapshot.hashes, [lost]
    )
    return successor
