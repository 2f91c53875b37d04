"""One step's attention metadata, built once and shared by all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor

Derived = TypeVar("Derived")


@dataclass(frozen=True, slots=True, eq=False)
class HostColumns:
    """The columns that say how the work is cut up, in host memory wherever the batch lives."""

    query_starts: Tensor
    context_lengths: Tensor
    block_tables: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Which tokens a step computes, and where their keys and values live.

    Make it with :meth:`build`. S sequences are packed into T tokens; the first
    ``decode_count`` sequences have exactly one query, the others are chunks.

    query_starts: int32 [S + 1], first token of each sequence, then T.
    context_lengths: int32 [S], keys of each sequence, this step's included.
    block_tables: int32 [S, B], block ids in order; unused entries are 0.
    slot_mapping: int64 [T], block * block_size + offset to write to, -1 for none.
    host: the same columns in host memory.
    """

    query_starts: Tensor
    context_lengths: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    decode_count: int
    host: HostColumns
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        query_starts: Tensor,
        context_lengths: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor,
        decode_count: int,
        *,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """Check the columns (CPU tensors of the dtypes above) and move them to the device.

        They are kept, not copied: do not write to them before the step is computed.
        Raises ValueError, naming the argument, for a wrong shape, dtype or count.
        """
        host = HostColumns(query_starts, context_lengths, block_tables, slot_mapping)
        _check(host, decode_count)
        return cls(
            upload(query_starts, device),
            upload(context_lengths, device),
            upload(block_tables, device),
            upload(slot_mapping, device),
            decode_count,
            host,
        )

    def again(self) -> AttentionBatch:
        """The same columns without what was derived from them: for a capture after a warm-up.

        What is derived while a graph is captured becomes part of it, and is derived anew in
        each replay; what was derived before is what it was then.
        """
        columns = (self.query_starts, self.context_lengths, self.block_tables, self.slot_mapping)
        return AttentionBatch(*columns, self.decode_count, self.host)

    def derive(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """What `make` returns, computed for the first layer that asks and kept for the others."""
        if key not in self._derived:
            self._derived[key] = make()
        found: Derived = self._derived[key]
        return found


def upload(column: Tensor, device: torch.device | str) -> Tensor:
    """Brings a CPU tensor to a device without waiting for anything; on a CPU it is the same one.

    A copy from pageable memory would wait for all that the device has been given before.
    """
    if torch.device(device).type != "cuda":
        return column.to(device)
    return column.pin_memory().to(device, non_blocking=True)


def _check(host: HostColumns, decode_count: int) -> None:
    expected = (
        ("query_starts", host.query_starts, 1, torch.int32),
        ("context_lengths", host.context_lengths, 1, torch.int32),
        ("block_tables", host.block_tables, 2, torch.int32),
        ("slot_mapping", host.slot_mapping, 1, torch.int64),
    )
    for name, column, dimensions, dtype in expected:
        if column.dim() != dimensions or column.dtype != dtype or column.device.type != "cpu":
            raise ValueError(
                f"{name} must be a {dimensions}-D {dtype} CPU tensor, "
                f"not {column.dim()}-D {column.dtype} on {column.device}"
            )
    sequences, tokens = host.context_lengths.shape[0], host.slot_mapping.shape[0]
    if host.query_starts.shape[0] != sequences + 1:
        raise ValueError(f"query_starts must have {sequences + 1} entries, one a sequence and T")
    if host.block_tables.shape[0] != sequences:
        raise ValueError(f"block_tables must have {sequences} rows, one a sequence")
    if host.query_starts[-1] != tokens:
        raise ValueError(f"slot_mapping must have one entry a token, {int(host.query_starts[-1])}")
    counts = host.query_starts.diff()
    if host.query_starts[0] != 0 or bool((counts < 0).any()):
        raise ValueError("query_starts must begin with 0 and not fall")
    if not 0 <= decode_count <= sequences or bool((counts[:decode_count] != 1).any()):
        raise ValueError(f"decode_count {decode_count} sequences do not have one query each")
    if bool((host.context_lengths < 0).any()):
        raise ValueError("context_lengths must not be negative")
    if sequences and not host.block_tables.shape[1]:
        raise ValueError("block_tables must have at least one column")


@dataclass(frozen=True, slots=True)
class RowLayout:
    """A [N, Hkv, block_size, D] cache seen as rows of D elements.

    The row of (block, head, offset) is the dot product with the three steps;
    a row begins every `pitch` elements. Sharable between layers, since it holds
    no tensor.
    """

    block_step: int
    head_step: int
    offset_step: int
    pitch: int
    rows: int
    block_count: int
    head_count: int
    block_size: int
    head_size: int

    def view(self, blocks: Tensor) -> Tensor:
        """The [rows, D] view of a cache that has this layout."""
        return blocks.as_strided((self.rows, self.head_size), (self.pitch, 1))


@lru_cache(maxsize=64)
def row_layout(name: str, shape: torch.Size, strides: tuple[int, ...]) -> RowLayout:
    """How a [N, Hkv, block_size, D] cache with these strides is cut into rows.

    Raises ValueError, naming the argument, where heads are not contiguous or overlap.
    """
    steps = [step if size > 1 else 0 for size, step in zip(shape[:3], strides[:3], strict=True)]
    pitch = gcd(*steps) or shape[3]
    if strides[3] != 1 or pitch < shape[3]:
        raise ValueError(f"{name} must keep each head contiguous, not have strides {strides}")
    block, head, offset = (step // pitch for step in steps)
    rows = 1 + (shape[0] - 1) * block + (shape[1] - 1) * head + (shape[2] - 1) * offset
    return RowLayout(block, head, offset, pitch, rows, *shape)
