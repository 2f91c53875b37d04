"""Slots that fault: what the engine hands over of them when their leader goes before it hears."""

from __future__ import annotations

import numpy as np
import pytest

from control_plane.plan import Snapshot, StepResult
from control_plane.scheduler import SchedulerLimits
from protos.engine.v1 import engine_pb2 as pb
from tests.stub_engine import StubEngine

PROMPT = list(range(30, 36))
# One full block of the prompt, with its hash, and the one that is written next.
TABLE, DIGEST = (3, 5), bytes(range(16))


def ints(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def make_engine(faulty: int = -1) -> StubEngine:
    """An engine that holds a prompt in slot 0 and, in slots 1 and 2, samples forked off it.

    Args:
        faulty: the slot whose first sample faults.
    """
    engine = StubEngine(
        SchedulerLimits(
            model_fingerprint="stub", block_size=4, block_count=16, host_block_count=8,
            slot_count=4, max_length=32, step_tokens=16, chunk_tokens=16,
        )
    )  # fmt: skip
    engine.fault = lambda slot, tokens: slot == faulty
    admissions = pb.Admissions(
        slots=ints(0), requests=[b"record"], prompt_token_counts=ints(len(PROMPT)),
        token_counts=ints(len(PROMPT)), token_ids=ints(*PROMPT), block_counts=ints(2),
        block_ids=ints(*TABLE), cached_token_counts=ints(0),
    )  # fmt: skip
    result = run(
        engine, 1, admissions=admissions, chunk_slots=ints(0), chunk_token_counts=ints(6),
        fork_parents=ints(0, 0), fork_children=ints(1, 2), fork_sample_indexes=ints(1, 2),
        hashed_blocks=ints(TABLE[0]), block_hashes=DIGEST,
    )  # fmt: skip
    assert list(result.faults) == ([faulty] if faulty >= 0 else [])
    engine.fault = lambda slot, tokens: False
    return engine


def run(engine: StubEngine, step: int, **columns: object) -> StepResult:
    return engine.execute_message(pb.StepPlan(epoch=1, step=step, **columns))  # type: ignore[arg-type]


def slots_of(snapshot: Snapshot) -> list[int]:
    return [row.slot for row in snapshot.rows]


def test_what_did_not_fault_is_handed_over_whole() -> None:
    snapshot = make_engine().snapshot()
    assert slots_of(snapshot) == [0, 1, 2]
    assert snapshot.hashes == {TABLE[0]: DIGEST}


@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_of_a_family_only_the_one_that_faulted_is_missing(faulty: int) -> None:
    """Its blocks are held by the others, but nobody else is to build on them."""
    engine = make_engine(faulty)
    snapshot = engine.snapshot()
    assert slots_of(snapshot) == [slot for slot in range(3) if slot != faulty]
    assert snapshot.hashes == {}
    engine.state.check()
    assert engine.state.block_counts() == (14, 0, 2)


def test_a_slot_that_decodes_on_stays_faulted() -> None:
    engine = make_engine(faulty=2)
    for step in (2, 3):
        # In flight when the fault became known; it copies the block that it shares.
        columns = {
            "decode_joins": ints(2), "copied_slots": ints(2), "copied_indexes": ints(1),
            "copied_blocks": ints(7),
        }  # fmt: skip
        result = run(engine, step, **(columns if step == 2 else {}))
        assert len(result.token_ids) == 1 and not result.faults
    assert slots_of(engine.snapshot()) == [0, 1]


def test_a_slot_that_was_released_is_another_ones() -> None:
    engine = make_engine(faulty=2)
    run(engine, 2, released_slots=ints(2))
    assert slots_of(engine.snapshot()) == [0, 1]
    assert not engine.state.faulted.any()


def test_a_swapped_slot_that_faulted_is_released_too() -> None:
    engine = make_engine(faulty=2)
    run(
        engine, 2, swap_out_slots=ints(0, 1, 2), swap_out_blocks=ints(*TABLE),
        swap_out_targets=ints(0, 1),
    )  # fmt: skip
    snapshot = engine.snapshot()
    assert slots_of(snapshot) == [0, 1] and all(row.swapped for row in snapshot.rows)
    engine.state.check()


@pytest.mark.parametrize(
    ("slots", "parents", "left"),
    [((2,), (1,), [0, 1, 2]), ((0, 2), (2, 1), [1, 2])],
    ids=["a copy of a sound beam is sound", "a copy of one that faulted is not"],
)
def test_a_beam_is_what_its_parent_was(
    slots: tuple[int, ...], parents: tuple[int, ...], left: list[int]
) -> None:
    engine = make_engine(faulty=2)
    tokens = ints(*range(7, 7 + len(slots)))
    run(engine, 2, beam_slots=ints(*slots), beam_parents=ints(*parents), beam_tokens=tokens)
    assert slots_of(engine.snapshot()) == left
