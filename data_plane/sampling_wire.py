"""Fills the sampling table from a plan's admissions, checking what the requests ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from data_plane.plan import Admissions, Int32Array, PlanError, column
from data_plane.sampling_table import SamplingTable
from protos import validation

_PENALTY = validation.MAX_PENALTY
# Penalty and top-p divide or cut by their value, so that 0 is outside their ranges.
_ABOVE_ZERO = float(np.nextafter(np.float32(0), np.float32(1)))
# column of the contract -> (table's column, dtype, smallest, largest); ranges as in
# quire.inference.v1, with the limits that the control plane uses. A NaN is outside every range.
_SCALARS = {
    "temperatures": ("temperature", "<f4", 0.0, validation.MAX_TEMPERATURE),
    "top_ks": ("top_k", "<i4", 0, None),
    "top_ps": ("top_p", "<f4", _ABOVE_ZERO, 1.0),
    "min_ps": ("min_p", "<f4", 0.0, 1.0),
    "repetition_penalties": ("repetition_penalty", "<f4", _ABOVE_ZERO, validation.MAX_PENALTY),
    "presence_penalties": ("presence_penalty", "<f4", -_PENALTY, _PENALTY),
    "frequency_penalties": ("frequency_penalty", "<f4", -_PENALTY, _PENALTY),
    "seeds": ("seed", "<u8", 0, None),
    "min_token_counts": ("min_length", "<i4", 0, None),
    # Beams ask for more of them than requests may.
    "logprob_counts": ("logprob_count", "<i4", -1, validation.MAX_CANDIDATES),
    "prompt_logprob_counts": ("prompt_logprob_count", "<i4", -1, validation.MAX_LOGPROBS),
}


def check_sampling(rows: Admissions, vocabulary_size: int) -> None:
    """Raises PlanError ("INVALID") unless every sampling column fits its admissions."""
    for name, (_, dtype, low, high) in _SCALARS.items():
        values: npt.NDArray[Any] = column(getattr(rows.sampling, name), name, dtype)
        if len(values) not in (0, len(rows.slots)):
            raise PlanError("INVALID", f"sampling.{name}: not one entry per admission")
        limit = vocabulary_size if name == "top_ks" else high
        if not (values >= low).all() or (limit is not None and not (values <= limit).all()):
            raise PlanError("INVALID", f"sampling.{name}: a value is out of range")
    for counts, ids in (("stop_id_counts", "stop_ids"), ("bias_counts", "bias_ids")):
        _ragged(rows, counts, ids, vocabulary_size)
    values = column(rows.sampling.bias_values, "bias_values", "<f4")
    if len(values) != len(column(rows.sampling.bias_ids, "bias_ids")):
        raise PlanError("INVALID", "sampling.bias_values: not one entry per id")
    if not (np.abs(values.astype(np.float64)) <= validation.MAX_BIAS).all():
        raise PlanError("INVALID", "sampling.bias_values: a value is out of range")


def assign_sampling(table: SamplingTable, rows: Admissions) -> None:
    """Sets the table's rows of the admitted slots; the columns have been checked."""
    table.clear(rows.slots)
    table.sample_index[rows.slots] = rows.sample_indexes
    for name, (attribute, dtype, _, _) in _SCALARS.items():
        values = column(getattr(rows.sampling, name), name, dtype)
        if len(values):
            getattr(table, attribute)[rows.slots] = values
    slots = rows.slots.tolist()
    for slot, (ids,) in zip(slots, _rows(rows, "stop_id_counts", "stop_ids"), strict=False):
        if len(ids):
            table.stop_ids[slot] = ids.astype(np.int32)
    for slot, (ids, values) in zip(
        slots, _rows(rows, "bias_counts", "bias_ids", "bias_values"), strict=False
    ):
        if len(ids):
            table.bias[slot] = (ids.astype(np.int32), values.astype(np.float32))


def _ragged(rows: Admissions, counts_name: str, ids_name: str, vocabulary_size: int) -> None:
    counts: Int32Array = column(getattr(rows.sampling, counts_name), counts_name)  # type: ignore[assignment]
    ids: Int32Array = column(getattr(rows.sampling, ids_name), ids_name)  # type: ignore[assignment]
    if len(counts) not in (0, len(rows.slots)):
        raise PlanError("INVALID", f"sampling.{counts_name}: not one entry per admission")
    if (len(counts) and counts.min() < 0) or counts.sum() != len(ids):
        raise PlanError("INVALID", f"sampling.{ids_name}: ids do not add up to their counts")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary_size):
        raise PlanError("INVALID", f"sampling.{ids_name}: an id is outside the vocabulary")


def _rows(rows: Admissions, counts_name: str, *names: str) -> list[list[npt.NDArray[np.generic]]]:
    """Cuts flat columns into one row per admission; no rows where the counts are absent."""
    counts = column(getattr(rows.sampling, counts_name), counts_name)
    ends = np.cumsum(counts).tolist()
    flat = [
        column(getattr(rows.sampling, name), name, "<f4" if name == "bias_values" else "<i4")
        for name in names
    ]
    begins = [0, *ends[:-1]]
    return [[values[i:j] for values in flat] for i, j in zip(begins, ends, strict=False)]
