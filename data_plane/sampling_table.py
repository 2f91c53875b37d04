"""What each slot's request asks of sampling, as columns in host memory."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.integer[Any]]
_Entry = TypeVar("_Entry")


class SamplingTable:
    """What each slot's request asks of sampling; one array entry per slot.

    Ranges are those of `quire.inference.v1.Sampling`; who fills the table has checked them.
    """

    def __init__(self, max_slots: int, vocabulary_size: int) -> None:
        self.vocabulary_size = vocabulary_size
        self.temperature = np.zeros(max_slots, np.float32)  # 0: greedy
        self.top_k = np.zeros(max_slots, np.int32)  # 0: all
        self.top_p = np.ones(max_slots, np.float32)
        self.min_p = np.zeros(max_slots, np.float32)
        self.repetition_penalty = np.ones(max_slots, np.float32)
        self.presence_penalty = np.zeros(max_slots, np.float32)
        self.frequency_penalty = np.zeros(max_slots, np.float32)
        self.seed = np.zeros(max_slots, np.uint64)
        self.sample_index = np.zeros(max_slots, np.int32)
        # Tokens, prompt included, that a sequence must have before one of its stop ids is drawn.
        self.min_length = np.zeros(max_slots, np.int32)
        self.logprob_count = np.full(max_slots, -1, np.int32)  # -1: none
        self.prompt_logprob_count = np.full(max_slots, -1, np.int32)  # -1: none
        # Only slots that have them are here: int32 [n], and (int32 [n], float32 [n]).
        self.stop_ids: dict[int, Int32Array] = {}
        self.bias: dict[int, tuple[Int32Array, Float32Array]] = {}
        self._columns = [each for each in vars(self).values() if isinstance(each, np.ndarray)]
        self._defaults = [column[0] for column in self._columns] if max_slots else []

    def clear(self, slots: IndexArray) -> None:
        """Sets `slots`, int [n], back to the defaults: greedy, unfiltered, no log-probabilities."""
        for column, default in zip(self._columns, self._defaults, strict=True):
            column[slots] = default
        for slot in slots.tolist():
            self.stop_ids.pop(slot, None)
            self.bias.pop(slot, None)

    def copy(self, parents: IndexArray, children: IndexArray, sample_indexes: IndexArray) -> None:
        """Makes each child slot a copy of its parent's row, under its own sample index.

        All three are int [n]; no child is also a parent.
        """
        for column in self._columns:
            column[children] = column[parents]
        self.sample_index[children] = sample_indexes
        for parent, child in zip(parents.tolist(), children.tolist(), strict=True):
            _copy_entry(self.stop_ids, parent, child)
            _copy_entry(self.bias, parent, child)


def _copy_entry(entries: dict[int, _Entry], parent: int, child: int) -> None:
    if parent in entries:
        entries[child] = entries[parent]
    else:
        entries.pop(child, None)
