"""The slots' tokens on the device, where sampled ones feed the next step without leaving it."""

from __future__ import annotations

import numpy as np
import torch

from data_plane.device import Device
from data_plane.plan import Int32Array, PlanColumns


class TokenTable:
    """The mirror of `ResidentState.tokens`, ahead of it by the steps in flight.

    Attributes:
        tokens: int32 [slots, length] on the device.
    """

    def __init__(self, slot_count: int, length: int, device: Device) -> None:
        self._device = device
        self.tokens = torch.zeros(
            (slot_count, length), dtype=torch.int32, device=device.torch_device
        )

    def apply(self, plan: PlanColumns, counts: Int32Array) -> None:
        """Takes what precedes a plan's forward pass: beams that go on, then admissions.

        Args:
            counts: int32 [slots], tokens of each slot once the plan's moves are applied.
        """
        if len(plan.beam_slots):
            self.copy(plan.beam_parents, plan.beam_slots)
            last = counts[plan.beam_slots].astype(np.int64) - 1
            ids = self._device.send(plan.beam_tokens.astype(np.int64))
            self.put(plan.beam_slots, last, ids)
        rows = plan.admissions
        if rows is not None:
            ends = np.cumsum(rows.token_counts).tolist()
            for slot, end, count in zip(
                rows.slots.tolist(), ends, rows.token_counts.tolist(), strict=True
            ):
                row = self._device.send(rows.token_ids[end - count : end])
                self.tokens[slot, :count].copy_(row, non_blocking=True)

    def copy(self, parents: Int32Array, children: Int32Array) -> None:
        """Makes rows copies of others, all at once: a parent may be another's child."""
        if len(parents):
            rows = self.tokens.index_select(0, self._device.send(parents.astype(np.int64)))
            self.tokens.index_copy_(0, self._device.send(children.astype(np.int64)), rows)

    def put(
        self, slots: Int32Array, positions: np.ndarray[tuple[int], np.dtype[np.int64]],
        ids: torch.Tensor,
    ) -> None:  # fmt: skip
        """Notes one token for each slot; a fault (a negative id) counts as id 0.

        Args:
            slots, positions: int [n].
            ids: int64 [n] on the device.
        """
        at = (self._device.send(slots.astype(np.int64)), self._device.send(positions))
        self.tokens.index_put_(at, ids.clamp(min=0).to(torch.int32))
