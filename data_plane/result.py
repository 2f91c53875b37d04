"""Step results and snapshots as messages of ``quire.engine.v1``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data_plane.plan import PlanColumns
from data_plane.sampler import Logprobs, Samples
from data_plane.state import ResidentState, StepBatch
from protos.engine.v1 import engine_pb2

# Well under the message size cap of the wire.
SNAPSHOT_PART_BYTES = 2 << 20


def encode_result(
    plan: PlanColumns,
    batch: StepBatch,
    samples: Samples,
    prompt_logprobs: Logprobs | None,
    timings_us: tuple[int, int, int, int],
) -> engine_pb2.StepResult:
    """Returns the result's message; `timings_us` are queue, moves, forward and sample."""
    queue, moves, forward, sample = timings_us
    result = engine_pb2.StepResult(
        epoch=plan.epoch,
        step=plan.step,
        token_ids=samples.token_ids.astype("<i4").tobytes(),
        faults=[
            engine_pb2.SlotFault(slot=int(batch.sampled_slots[row]), reason=reason)
            for row, reason in samples.faults
        ],
        timings=engine_pb2.Timings(
            queue_us=queue, moves_us=moves, forward_us=forward, sample_us=sample
        ),
    )
    if samples.logprobs is not None:
        result.logprobs.CopyFrom(_encode_logprobs(samples.logprobs))
    if prompt_logprobs is not None:
        result.prompt_logprobs.CopyFrom(_encode_logprobs(prompt_logprobs))
    return result


def _encode_logprobs(logprobs: Logprobs) -> engine_pb2.LogprobColumns:
    return engine_pb2.LogprobColumns(
        slots=_packed(logprobs.slots),
        positions=_packed(logprobs.positions),
        token_ids=_packed(logprobs.token_ids),
        logprobs=_packed(logprobs.logprobs, "<f4"),
        ranks=_packed(logprobs.ranks),
        top_counts=_packed(logprobs.top_counts),
        top_token_ids=_packed(logprobs.top_token_ids),
        top_logprobs=_packed(logprobs.top_logprobs, "<f4"),
    )


def encode_snapshot(state: ResidentState) -> list[engine_pb2.SnapshotPart]:
    """Returns the resident state in parts of a few megabytes; at least one part."""
    return list(_row_parts(state)) + list(_hash_parts(state)) or [engine_pb2.SnapshotPart()]


def _row_parts(state: ResidentState) -> Iterator[engine_pb2.SnapshotPart]:
    batch: list[int] = []
    size = 0
    for slot in state.resident_slots().tolist():
        row = 4 * int(state.token_count[slot] + state.table_length[slot])
        row += len(state.requests[slot])
        if batch and size + row > SNAPSHOT_PART_BYTES:
            yield _encode_rows(state, np.array(batch, np.int32))
            batch, size = [], 0
        batch.append(slot)
        size += row
    if batch:
        yield _encode_rows(state, np.array(batch, np.int32))


def _encode_rows(state: ResidentState, slots: npt.NDArray[np.int32]) -> engine_pb2.SnapshotPart:
    rows = slots.tolist()
    return engine_pb2.SnapshotPart(
        slots=_packed(slots),
        requests=[state.requests[slot] for slot in rows],
        sample_indexes=_packed(state.sampling.sample_index[slots]),
        prompt_token_counts=_packed(state.prompt_count[slots]),
        token_counts=_packed(state.token_count[slots]),
        computed_token_counts=_packed(state.computed[slots]),
        token_ids=_packed(
            np.concatenate([state.tokens[slot, : state.token_count[slot]] for slot in rows])
        ),
        block_counts=_packed(state.table_length[slots]),
        block_ids=_packed(np.concatenate([state.table(slot) for slot in rows])),
        swapped=_packed(state.swapped[slots]),
    )


def _hash_parts(state: ResidentState) -> Iterator[engine_pb2.SnapshotPart]:
    blocks = np.flatnonzero(state.hashed)
    step = SNAPSHOT_PART_BYTES // 20
    for begin in range(0, len(blocks), step):
        part = blocks[begin : begin + step]
        yield engine_pb2.SnapshotPart(
            hashed_blocks=_packed(part), block_hashes=state.hashes[part].tobytes()
        )


def _packed(values: npt.NDArray[np.generic], dtype: str = "<i4") -> bytes:
    return values.astype(dtype).tobytes()
