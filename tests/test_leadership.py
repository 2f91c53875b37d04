"""The engine as arbiter of its own leadership, over real gRPC."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2

from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from protos import wire
from protos.engine.v1 import engine_pb2 as pb
from protos.engine.v1 import engine_pb2_grpc
from tests.stack import running_engine

SIZES = EngineSizes(
    block_size=16, block_count=32, host_block_count=8, slot_count=4, step_tokens=64, max_length=256
)
FIRST = torch.tensor([0])


def ints(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def admission(
    slot: int = 0, tokens: int = 20, blocks: tuple[int, ...] = (3, 5), cached: int = 0
) -> pb.Admissions:
    return pb.Admissions(
        slots=ints(slot),
        requests=[b"record"],
        prompt_token_counts=ints(tokens),
        token_counts=ints(tokens),
        token_ids=ints(*range(30, 30 + tokens)),
        block_counts=ints(len(blocks)),
        block_ids=ints(*blocks),
        cached_token_counts=ints(cached),
    )


def first_plan(epoch: int) -> pb.StepPlan:
    """Admits 20 tokens to slot 0, in blocks 3 and 5, and runs them."""
    return pb.StepPlan(
        epoch=epoch,
        step=1,
        admissions=admission(),
        chunk_slots=ints(0),
        chunk_token_counts=ints(20),
        hashed_blocks=ints(3),
        block_hashes=bytes(range(16)),
    )


class Lead:
    """One Lead stream."""

    def __init__(self, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        self.call = stub.Lead()

    async def claim(self, name: str = "test") -> pb.LeadResponse:
        await self.call.write(pb.LeadRequest(claim=pb.Claim(leader_address=name)))
        return await self.call.read()

    async def snapshot(self, granted: pb.LeadResponse) -> list[pb.SnapshotPart]:
        count = granted.granted.snapshot_part_count
        return [(await self.call.read()).snapshot_part for _ in range(count)]

    async def step(self, plan: pb.StepPlan) -> pb.StepResult:
        await self.call.write(pb.LeadRequest(plan=plan))
        answer = await self.call.read()
        if answer is grpc.aio.EOF:
            raise AssertionError("the stream ended")
        return answer.result

    async def refusal(self, plan: pb.StepPlan) -> tuple[grpc.StatusCode, str]:
        await self.call.write(pb.LeadRequest(plan=plan))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            while await self.call.read() is not grpc.aio.EOF:
                pass
            raise AssertionError("the stream ended well")
        (detail,) = wire.error_details(error.value)
        assert isinstance(detail, error_details_pb2.ErrorInfo)
        return error.value.code(), detail.reason


async def heir_of(stub: engine_pb2_grpc.EngineServiceStub) -> tuple[Lead, pb.LeadResponse]:
    """Claims until the engine has noticed that its former leader is gone."""
    async with asyncio.timeout(5):
        while True:
            lead = Lead(stub)
            answer = await lead.claim()
            if answer.WhichOneof("message") == "granted":
                return lead, answer


def run(
    model: Model,
    body: Callable[[Engine, engine_pb2_grpc.EngineServiceStub], Awaitable[None]],
    **times: float,
) -> None:
    async def main() -> None:
        engine = Engine(model, SIZES, check=True)
        async with (
            running_engine(engine, None, **times) as (_, port),
            wire.channel(f"127.0.0.1:{port}") as channel,
        ):
            await body(engine, engine_pb2_grpc.EngineServiceStub(channel))

    asyncio.run(main())


def test_one_leader_and_rising_epochs(llama: Model) -> None:
    async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        first, second = Lead(stub), Lead(stub)
        assert (await first.claim("one")).granted.epoch == 1
        refused = await second.claim("two")
        assert refused.refused.leader_address == "one"
        first.call.cancel()
        _, answer = await heir_of(stub)
        assert answer.granted.epoch == 2

    run(llama, body)


def test_stale_epoch_is_refused_and_changes_nothing(llama: Model) -> None:
    async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        old = Lead(stub)
        await old.snapshot(await old.claim())
        old.call.cancel()
        new, granted = await heir_of(stub)
        await new.snapshot(granted)
        code, reason = await new.refusal(first_plan(epoch=1))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH")
        assert engine.state.resident_slots().size == 0
        assert engine.counters.refused_plan_count == 1

    run(llama, body)


def test_snapshot_hands_over_everything(llama: Model) -> None:
    async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        lead = Lead(stub)
        await lead.snapshot(await lead.claim())
        result = await lead.step(first_plan(epoch=1))
        token = np.frombuffer(result.token_ids, "<i4").tolist()
        lead.call.cancel()
        heir, granted = await heir_of(stub)
        rows, hashes = await heir.snapshot(granted)
        assert rows.requests == [b"record"]
        assert rows.slots == ints(0)
        assert rows.block_ids == ints(3, 5)
        assert rows.computed_token_counts == ints(20)
        assert rows.token_ids == ints(*range(30, 50), *token)
        assert (hashes.hashed_blocks, hashes.block_hashes) == (ints(3), bytes(range(16)))

    run(llama, body)


def test_a_slot_that_faulted_is_not_handed_over(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decodes on while results are under way, and what it holds by then means nothing."""

    async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        lead = Lead(stub)
        await lead.snapshot(await lead.claim())
        await lead.step(first_plan(epoch=1))
        beside = admission(1, 20, (6, 7))
        await lead.step(
            _changed(admissions=beside, chunk_slots=ints(1), chunk_token_counts=ints(20))
        )
        forward = Model.forward

        def faulty(model: Model, *inputs: Any) -> torch.Tensor:
            # Of the decode batch, slot 0 is the first row.
            return forward(model, *inputs).index_fill(0, FIRST, math.nan)

        with monkeypatch.context() as patch:
            patch.setattr(Model, "forward", faulty)
            result = await lead.step(pb.StepPlan(epoch=1, step=3, decode_joins=ints(0, 1)))
        assert [fault.slot for fault in result.faults] == [0]
        assert not (await lead.step(pb.StepPlan(epoch=1, step=4))).faults
        lead.call.cancel()
        heir, granted = await heir_of(stub)
        parts = await heir.snapshot(granted)
        assert [(part.slots, part.hashed_blocks) for part in parts] == [(ints(1), b"")]
        # Its slot and its blocks are another's, which begins without the mark.
        anew = first_plan(granted.granted.epoch)
        assert not (await heir.step(anew)).faults
        assert not engine.state.faulted.any()

    run(llama, body)


def _changed(**columns: object) -> pb.StepPlan:
    plan = pb.StepPlan(epoch=1, step=2)
    plan.MergeFrom(pb.StepPlan(**columns))  # type: ignore[arg-type]
    return plan


BAD_PLANS = {
    "slot out of range": (_changed(released_slots=ints(4)), "INVALID"),
    "negative slot": (_changed(released_slots=ints(-1)), "INVALID"),
    "empty slot released": (_changed(released_slots=ints(2)), "DRIFT"),
    "ragged bytes": (_changed(released_slots=b"\0\0\0"), "INVALID"),
    "columns differ": (_changed(appended_slots=ints(0)), "INVALID"),
    "block out of range": (_changed(appended_slots=ints(0), appended_blocks=ints(32)), "INVALID"),
    "block in use": (_changed(appended_slots=ints(0), appended_blocks=ints(5)), "DRIFT"),
    "block twice": (_changed(appended_slots=ints(0, 0), appended_blocks=ints(8, 8)), "INVALID"),
    "length drifted": (_changed(touched_slots=ints(0), touched_token_counts=ints(20)), "DRIFT"),
    "occupied slot": (_changed(admissions=admission(0, 20, (7, 8))), "DRIFT"),
    "too few blocks": (_changed(admissions=admission(1, 20, (7,))), "INVALID"),
    "too long": (_changed(admissions=admission(1, 257, tuple(range(6, 23)))), "INVALID"),
    "chunk too long": (_changed(chunk_slots=ints(0), chunk_token_counts=ints(2)), "DRIFT"),
    "join of nothing": (_changed(decode_joins=ints(3)), "DRIFT"),
    "copy outside": (
        _changed(copied_slots=ints(0), copied_indexes=ints(2), copied_blocks=ints(9)),
        "INVALID",
    ),
    "hash of no block": (
        _changed(hashed_blocks=ints(99), block_hashes=bytes(16)),
        "INVALID",
    ),
    "block both cached and new": (
        _changed(admissions=admission(1, 20, (3, 3), cached=16)),
        "INVALID",
    ),
    "cached block of nothing": (
        _changed(admissions=admission(1, 20, (9, 10), cached=16)),
        "DRIFT",
    ),
    "join of a swapped slot": (
        _changed(
            swap_out_slots=ints(0), swap_out_blocks=ints(3, 5), swap_out_targets=ints(0, 1),
            decode_joins=ints(0),
        ),
        "DRIFT",
    ),
    "truncated to more": (
        _changed(truncated_slots=ints(0), truncated_token_counts=ints(22)),
        "DRIFT",
    ),
    "copied twice": (
        _changed(copied_slots=ints(0, 0), copied_indexes=ints(1, 1), copied_blocks=ints(8, 9)),
        "INVALID",
    ),
    "top p of zero": (
        _changed(
            admissions=pb.Admissions(
                **{
                    field.name: value for field, value in admission(1, 20, (7, 8)).ListFields()
                },
                sampling=pb.SamplingColumns(top_ps=np.zeros(1, "<f4").tobytes()),
            )
        ),
        "INVALID",
    ),
    "step out of order": (pb.StepPlan(epoch=1, step=3), "OUT_OF_ORDER"),
    "beam of nothing": (
        _changed(beam_slots=ints(1), beam_parents=ints(0), beam_tokens=ints(5)),
        "DRIFT",
    ),
    "parent of nothing": (
        _changed(beam_slots=ints(0), beam_parents=ints(1), beam_tokens=ints(5)),
        "DRIFT",
    ),
    "beam twice": (
        _changed(beam_slots=ints(0, 0), beam_parents=ints(0, 0), beam_tokens=ints(5, 6)),
        "INVALID",
    ),
    "beam's token out of range": (
        _changed(beam_slots=ints(0), beam_parents=ints(0), beam_tokens=ints(1 << 20)),
        "INVALID",
    ),
    "beam that is swapped": (
        _changed(
            beam_slots=ints(0), beam_parents=ints(0), beam_tokens=ints(5),
            swap_out_slots=ints(0), swap_out_blocks=ints(3, 5), swap_out_targets=ints(0, 1),
        ),
        "INVALID",
    ),
    "host block out of range": (
        _changed(
            swap_out_slots=ints(0), swap_out_blocks=ints(3, 5), swap_out_targets=ints(0, 8)
        ),
        "INVALID",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plans_are_refused_whole(llama: Model, name: str) -> None:
    plan, reason = BAD_PLANS[name]

    async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        lead = Lead(stub)
        await lead.snapshot(await lead.claim())
        await lead.step(first_plan(epoch=1))
        before = [part.SerializeToString() for part in engine.snapshot()]
        _, told = await lead.refusal(plan)
        assert told == reason
        await asyncio.sleep(0.02)
        assert [part.SerializeToString() for part in engine.snapshot()] == before

    run(llama, body)


def test_what_comes_back_from_the_host_runs_in_a_later_plan_only(llama: Model) -> None:
    """Its blocks are brought back beside the forward pass."""
    out = {"swap_out_slots": ints(0), "swap_out_blocks": ints(3, 5), "swap_out_targets": ints(0, 1)}
    back = {"swap_in_slots": ints(0), "swap_in_blocks": ints(0, 1), "swap_in_targets": ints(8, 9)}
    runs: list[dict[str, bytes]] = [
        {"decode_joins": ints(0)},
        {"chunk_slots": ints(0), "chunk_token_counts": ints(1)},
        {"copied_slots": ints(0), "copied_indexes": ints(1), "copied_blocks": ints(10)},
    ]

    def refused(fields: dict[str, bytes]) -> None:
        async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
            lead = Lead(stub)
            await lead.snapshot(await lead.claim())
            await lead.step(first_plan(epoch=1))
            await lead.step(_changed(**out))
            _, told = await lead.refusal(pb.StepPlan(epoch=1, step=3, **back, **fields))
            assert told == "INVALID"

        run(llama, body)

    for fields in runs:
        refused(fields)


def test_what_is_queued_behind_a_refused_plan_does_not_run(llama: Model) -> None:
    async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        lead = Lead(stub)
        await lead.snapshot(await lead.claim())
        await lead.step(first_plan(epoch=1))
        steps = engine.counters.step_count
        refused = _changed(touched_slots=ints(0), touched_token_counts=ints(99))
        await lead.call.write(pb.LeadRequest(plan=refused))
        behind = pb.StepPlan(epoch=1, step=3, decode_joins=ints(0))
        _, reason = await lead.refusal(behind)
        assert reason == "DRIFT"
        await asyncio.sleep(0.05)
        assert engine.counters.step_count == steps

    run(llama, body)


def test_swap_out_and_in_keep_the_sequence(llama: Model) -> None:
    async def tokens(stub: engine_pb2_grpc.EngineServiceStub, swap: bool) -> list[int]:
        lead, granted = await heir_of(stub)
        await lead.snapshot(granted)
        epoch = granted.granted.epoch
        result = await lead.step(first_plan(epoch))
        ids = np.frombuffer(result.token_ids, "<i4").tolist()
        step = 2
        if swap:
            out = pb.StepPlan(
                epoch=epoch, step=2, swap_out_slots=ints(0),
                swap_out_blocks=ints(3, 5), swap_out_targets=ints(6, 1),
            )  # fmt: skip
            await lead.step(out)
            back = pb.StepPlan(
                epoch=epoch, step=3, swap_in_slots=ints(0),
                swap_in_blocks=ints(1, 6), swap_in_targets=ints(20, 21),
            )  # fmt: skip
            await lead.step(back)
            step = 4
        joins = ints(0)
        for _ in range(8):
            result = await lead.step(pb.StepPlan(epoch=epoch, step=step, decode_joins=joins))
            ids += np.frombuffer(result.token_ids, "<i4").tolist()
            joins, step = b"", step + 1
        await lead.step(pb.StepPlan(epoch=epoch, step=step, released_slots=ints(0)))
        lead.call.cancel()
        return ids

    async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        assert await tokens(stub, swap=False) == await tokens(stub, swap=True)

    run(llama, body)


def test_silent_leader_is_dropped_and_residents_outlive_it_for_a_while(llama: Model) -> None:
    async def body(engine: Engine, stub: engine_pb2_grpc.EngineServiceStub) -> None:
        lead = Lead(stub)
        await lead.snapshot(await lead.claim())
        await lead.step(first_plan(epoch=1))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await lead.call.read()
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert engine.state.resident_slots().tolist() == [0]
        async with asyncio.timeout(20):
            while engine.state.resident_slots().size:
                await asyncio.sleep(0.01)

    run(llama, body, leader_timeout=0.3, resident_grace=1.5)
