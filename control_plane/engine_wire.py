"""Step plans, results and snapshots between domain columns and ``quire.engine.v1`` messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from control_plane.blocks import Int32Array
from control_plane.hashing import HASH_BYTES
from control_plane.plan import Admission, Logprob, Plan, ResidentRow, Snapshot, StepResult
from control_plane.request import SamplingFields
from protos.control.v1 import record_pb2
from protos.engine.v1 import engine_pb2

_SCALARS: tuple[tuple[str, str, str, float], ...] = (
    # column, SamplingFields' attribute, dtype, the contract's default
    ("temperatures", "temperature", "<f4", 0.0),
    ("top_ks", "top_k", "<i4", 0),
    ("top_ps", "top_p", "<f4", 1.0),
    ("min_ps", "min_p", "<f4", 0.0),
    ("repetition_penalties", "repetition_penalty", "<f4", 1.0),
    ("presence_penalties", "presence_penalty", "<f4", 0.0),
    ("frequency_penalties", "frequency_penalty", "<f4", 0.0),
    ("seeds", "seed", "<u8", 0),
    ("logprob_counts", "logprob_count", "<i4", -1),
    ("prompt_logprob_counts", "prompt_logprob_count", "<i4", -1),
)


# Columns of a swap, and Crossing's attributes.
_CROSSING = (("slots", "slots"), ("blocks", "sources"), ("targets", "targets"))


def _ints(values: Iterable[int] | Int32Array) -> bytes:
    return np.asarray(values, dtype="<i4").tobytes()


def encode_plan(plan: Plan, epoch: int) -> engine_pb2.StepPlan:
    """Returns the plan as its message; an empty column is absent."""
    message = engine_pb2.StepPlan(
        epoch=epoch,
        step=plan.step,
        touched_slots=_ints(plan.touched_slots),
        touched_token_counts=_ints(plan.touched_lengths),
        released_slots=_ints(plan.released),
        appended_slots=_ints(plan.appended_slots),
        appended_blocks=_ints(plan.appended_blocks),
        copied_slots=_ints(plan.copied_slots),
        copied_indexes=_ints(plan.copied_indexes),
        copied_blocks=_ints(plan.copied_blocks),
        decode_joins=_ints(plan.decode_joins),
        decode_leaves=_ints(plan.decode_leaves),
        chunk_slots=_ints(plan.chunk_slots),
        chunk_token_counts=_ints(plan.chunk_counts),
        fork_parents=_ints(plan.fork_parents),
        fork_children=_ints(plan.fork_children),
        fork_sample_indexes=_ints(plan.fork_samples),
        beam_slots=_ints(plan.beam_slots),
        beam_parents=_ints(plan.beam_parents),
        beam_tokens=_ints(plan.beam_tokens),
        hashed_blocks=_ints(list(plan.hashed)),
        block_hashes=b"".join(plan.hashed.values()),
    )
    for name, crossings in (("swap_out", plan.swapped_out), ("swap_in", plan.swapped_in)):
        for column, attribute in _CROSSING if crossings else ():
            values = [getattr(crossing, attribute) for crossing in crossings]
            setattr(message, f"{name}_{column}", b"".join(_ints(value) for value in values))
    if plan.admissions:
        message.admissions.CopyFrom(_encode_admissions(plan.admissions))
    return message


def _encode_admissions(admissions: Sequence[Admission]) -> engine_pb2.Admissions:
    requests = [admission.sequence.group.request for admission in admissions]
    return engine_pb2.Admissions(
        slots=_ints([admission.slot for admission in admissions]),
        requests=[
            request.record + _addition(admission)
            for request, admission in zip(requests, admissions, strict=True)
        ],
        sample_indexes=_ints([admission.sequence.sample_index for admission in admissions]),
        prompt_token_counts=_ints([len(request.prompt) for request in requests]),
        token_counts=_ints([len(admission.tokens) for admission in admissions]),
        token_ids=_ints(np.concatenate([admission.tokens for admission in admissions])),
        block_counts=_ints([len(admission.blocks) for admission in admissions]),
        block_ids=_ints(np.concatenate([admission.blocks for admission in admissions])),
        cached_token_counts=_ints([admission.cached for admission in admissions]),
        sampling=_encode_sampling(admissions),
    )


def _addition(admission: Admission) -> bytes:
    """What the record gets at admission: messages merge by concatenation."""
    return record_pb2.SequenceRecord(
        cached_token_count=admission.cached, arrival=admission.sequence.group.arrival
    ).SerializeToString()


def _encode_sampling(admissions: Sequence[Admission]) -> engine_pb2.SamplingColumns:
    columns = engine_pb2.SamplingColumns()
    requests = [admission.sequence.group.request for admission in admissions]
    fields: list[SamplingFields] = [request.sampling for request in requests]
    for column, attribute, dtype, default in _SCALARS:
        values = [getattr(field, attribute) for field in fields]
        if any(value != default for value in values):
            setattr(columns, column, np.array(values, dtype).tobytes())
    if any(request.min_tokens for request in requests):
        columns.min_token_counts = _ints(
            [len(req.prompt) + req.min_tokens if req.min_tokens else 0 for req in requests]
        )
        columns.stop_id_counts = _ints([len(request.stop_ids) for request in requests])
        columns.stop_ids = _ints([stop for request in requests for stop in request.stop_ids])
    if any(field.logit_bias for field in fields):
        columns.bias_counts = _ints([len(field.logit_bias) for field in fields])
        columns.bias_ids = _ints([token for field in fields for token in field.logit_bias])
        biases = [value for field in fields for value in field.logit_bias.values()]
        columns.bias_values = np.array(biases, "<f4").tobytes()
    return columns


def _column(data: bytes, dtype: str = "<i4") -> npt.NDArray[np.generic]:
    return np.frombuffer(data, dtype)


def _int_column(data: bytes) -> Int32Array:
    return np.frombuffer(data, "<i4")


def decode_result(message: engine_pb2.StepResult) -> StepResult:
    times = message.timings
    prompt: dict[int, list[tuple[int, Logprob]]] = {}
    for slot, position, logprob in _logprobs(message.prompt_logprobs):
        prompt.setdefault(slot, []).append((position, logprob))
    return StepResult(
        step=message.step,
        token_ids=_int_column(message.token_ids),
        logprobs={slot: logprob for slot, _, logprob in _logprobs(message.logprobs)},
        prompt_logprobs=prompt,
        faults={fault.slot: fault.reason for fault in message.faults},
        timings_us=(times.queue_us, times.moves_us, times.forward_us, times.sample_us),
    )


def _logprobs(columns: engine_pb2.LogprobColumns) -> list[tuple[int, int, Logprob]]:
    if not columns.slots:
        return []
    top_ids = _int_column(columns.top_token_ids).tolist()
    top_logprobs = _column(columns.top_logprobs, "<f4").tolist()
    rows = zip(
        _int_column(columns.slots).tolist(),
        _int_column(columns.positions).tolist(),
        _int_column(columns.token_ids).tolist(),
        _column(columns.logprobs, "<f4").tolist(),
        _int_column(columns.ranks).tolist(),
        _int_column(columns.top_counts).tolist(),
        strict=True,
    )
    decoded, start = [], 0
    for slot, position, token, logprob, rank, count in rows:
        pairs = zip(
            top_ids[start : start + count], top_logprobs[start : start + count], strict=True
        )
        decoded.append((slot, position, Logprob(token, logprob, rank, tuple(pairs))))
        start += count
    return decoded


def decode_snapshot(parts: Iterable[engine_pb2.SnapshotPart]) -> Snapshot:
    rows: list[ResidentRow] = []
    hashes: dict[int, bytes] = {}
    for part in parts:
        tokens, blocks = _int_column(part.token_ids), _int_column(part.block_ids)
        token_at = block_at = 0
        columns = zip(
            _int_column(part.slots).tolist(),
            part.requests,
            _int_column(part.sample_indexes).tolist(),
            _int_column(part.prompt_token_counts).tolist(),
            _int_column(part.token_counts).tolist(),
            _int_column(part.computed_token_counts).tolist(),
            _int_column(part.block_counts).tolist(),
            _int_column(part.swapped).tolist(),
            strict=True,
        )
        for slot, record, sample, prompt, length, computed, block_count, swapped in columns:
            rows.append(
                ResidentRow(
                    slot,
                    record,
                    sample,
                    prompt,
                    computed,
                    bool(swapped),
                    tokens[token_at : token_at + length],
                    blocks[block_at : block_at + block_count],
                )
            )
            token_at, block_at = token_at + length, block_at + block_count
        digests = part.block_hashes
        for index, block in enumerate(_int_column(part.hashed_blocks).tolist()):
            hashes[block] = digests[index * HASH_BYTES : (index + 1) * HASH_BYTES]
    return Snapshot(rows, hashes)
