"""A step plan as NumPy columns, and what can be wrong with one. No wire types beyond decoding."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from protos.engine.v1 import engine_pb2

Int32Array = npt.NDArray[np.int32]
HASH_BYTES = 16


class PlanError(Exception):
    """A plan that must not be executed; nothing has been changed.

    Attributes:
        reason: "INVALID" (an id or count out of range), "DRIFT", "STALE_EPOCH" or "OUT_OF_ORDER".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def column(data: bytes, name: str, dtype: str = "<i4") -> npt.NDArray[np.generic]:
    """Views a packed column.

    Raises:
        PlanError: its size is no multiple of the item size.
    """
    try:
        return np.frombuffer(data, dtype)
    except ValueError as error:
        raise PlanError("INVALID", f"{name}: {len(data)} bytes are no array of {dtype}") from error


@dataclass(frozen=True, slots=True)
class Admissions:
    """Rows of new residents; see ``quire.engine.v1.Admissions``."""

    slots: Int32Array
    requests: list[bytes]
    sample_indexes: Int32Array
    prompt_token_counts: Int32Array
    token_counts: Int32Array
    token_ids: Int32Array
    block_counts: Int32Array
    block_ids: Int32Array
    cached_token_counts: Int32Array
    sampling: engine_pb2.SamplingColumns


@dataclass(frozen=True, slots=True)
class PlanColumns:
    """See ``quire.engine.v1.StepPlan``; every array is int32 [n] unless noted."""

    epoch: int
    step: int
    touched_slots: Int32Array
    touched_token_counts: Int32Array
    released_slots: Int32Array
    swap_out_slots: Int32Array
    swap_out_blocks: Int32Array
    swap_out_targets: Int32Array
    swap_in_slots: Int32Array
    swap_in_blocks: Int32Array
    swap_in_targets: Int32Array
    truncated_slots: Int32Array
    truncated_token_counts: Int32Array
    appended_slots: Int32Array
    appended_blocks: Int32Array
    copied_slots: Int32Array
    copied_indexes: Int32Array
    copied_blocks: Int32Array
    decode_joins: Int32Array
    decode_leaves: Int32Array
    chunk_slots: Int32Array
    chunk_token_counts: Int32Array
    fork_parents: Int32Array
    fork_children: Int32Array
    fork_sample_indexes: Int32Array
    beam_slots: Int32Array
    beam_parents: Int32Array
    beam_tokens: Int32Array
    hashed_blocks: Int32Array
    block_hashes: npt.NDArray[np.uint8]  # [n, 16]
    admissions: Admissions | None


_INT_COLUMNS = tuple(
    field.name
    for field in fields(PlanColumns)
    if field.name not in ("epoch", "step", "block_hashes", "admissions")
)
_ADMISSION_COLUMNS = tuple(
    field.name for field in fields(Admissions) if field.name not in ("requests", "sampling")
)


def decode_plan(message: engine_pb2.StepPlan) -> PlanColumns:
    """Views a message's columns without copying them.

    Raises:
        PlanError: a column is no whole array.
    """
    if len(message.block_hashes) % HASH_BYTES:
        raise PlanError("INVALID", "block_hashes: not 16 bytes each")
    admissions = None
    if message.HasField("admissions"):
        rows = message.admissions
        admissions = Admissions(
            requests=list(rows.requests),
            sampling=rows.sampling,
            **{name: column(getattr(rows, name), name) for name in _ADMISSION_COLUMNS},  # type: ignore[arg-type]
        )
        if not len(admissions.sample_indexes):
            admissions = _with_default_samples(admissions)
    return PlanColumns(
        epoch=message.epoch,
        step=message.step,
        block_hashes=np.frombuffer(message.block_hashes, np.uint8).reshape(-1, HASH_BYTES),
        admissions=admissions,
        **{name: column(getattr(message, name), name) for name in _INT_COLUMNS},  # type: ignore[arg-type]
    )


def _with_default_samples(rows: Admissions) -> Admissions:
    values = {field.name: getattr(rows, field.name) for field in fields(Admissions)}
    values["sample_indexes"] = np.zeros(len(rows.slots), np.int32)
    return Admissions(**values)
