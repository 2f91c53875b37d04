"""Runs the forward pass of a step: graphs for decodes, one call at a time for everything else.

A step that only decodes is padded to the next of a few batch sizes, its buckets. Each bucket has
columns that stay where they are, so that on a GPU its forward pass is one captured graph: nothing
is launched one by one, nothing is allocated. A padded row has no keys, writes none, and nobody
reads its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_plane.device import Device
from data_plane.kv_cache import KVCache
from data_plane.model import Model
from data_plane.state import StepBatch
from kernels import AttentionBatch, steps_of_all_kinds


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of decodes, as long as the largest bucket; a bucket is the beginning of each.

    All that a graph reads is here or in the model and its cache: it keeps nothing alive itself.

    Attributes:
        rows: int64 [B], and starts: int32 [B + 1], both 0, 1, 2, ..: each row is one query.
        places: int64 [B], where in the token table each row's last token is.
        positions, slot_mapping: int64 [B]; context_lengths: int32 [B]; block_tables: int32 [B, W].
    """

    rows: Tensor
    starts: Tensor
    places: Tensor
    positions: Tensor
    slot_mapping: Tensor
    context_lengths: Tensor
    block_tables: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> _Columns:
        numbers = torch.arange(rows, device=device)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        longs = torch.zeros((3, rows), dtype=torch.int64, device=device)
        longs[2] = -1
        contexts = torch.zeros(rows, dtype=torch.int32, device=device)
        tables = torch.zeros((rows, width), dtype=torch.int32, device=device)
        return cls(numbers, starts, longs[0], longs[1], longs[2], contexts, tables)


def default_buckets(slot_count: int, largest: int = 256) -> list[int]:
    """1, 2, 4, 8, then every eighth up to 64 and every sixteenth to the largest batch there is."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, largest + 1, 16)]
    top = min(slot_count, largest)
    return [size for size in sizes if size < top] + [top]


class StepRunner:
    """One model's forward passes over one KV cache.

    Args:
        tokens: int32 [slots, length] on the device, the token table.
        block_table_width: entries of the longest block table.
        buckets: batch sizes that decodes are padded to; none: they run as they come.

    Attributes:
        bucket_steps: steps by the bucket that they ran in; `unpadded_steps`: in none.
        padding_rows: of all those buckets.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        device: Device,
        tokens: Tensor,
        block_table_width: int,
        buckets: Iterable[int] = (),
    ) -> None:
        self._model, self._cache, self._device, self._tokens = model, cache, device, tokens
        self._buckets = sorted(buckets)
        self._graphs: dict[int, Callable[[], Tensor]] = {}
        largest = max(self._buckets, default=0)
        self._columns = _Columns.empty(largest, block_table_width, device.torch_device)
        self.bucket_steps = dict.fromkeys(self._buckets, 0)
        self.padding_rows = self.unpadded_steps = 0
        # Logits of whatever bucket runs: each graph would keep its own.
        self._logits: Tensor | None = None

    def warm_up(
        self, progress: Callable[[list[AttentionBatch]], Iterable[AttentionBatch]] = iter
    ) -> None:
        """Runs a step of each kind that has kernels of its own, so that later none compiles them.

        Args:
            progress: shows how far it is while it yields what it is given.
        """
        slots, size = len(self._tokens), self._cache.block_size
        for batch in progress(steps_of_all_kinds(slots, size, self._device.torch_device)):
            zeros = torch.zeros_like(batch.slot_mapping)
            self._model.forward(zeros, zeros, batch, self._cache, zeros[:1])

    def capture(self, progress: Callable[[list[int]], Iterable[int]] = iter) -> None:
        """Readies every bucket, the largest first, because graphs share its memory.

        Args:
            progress: shows how far it is while it yields what it is given.

        Raises:
            Exception: whatever keeps one from it; there are no buckets then.
        """
        try:
            for size in progress(self._buckets[::-1]):
                self._graphs[size] = self._device.capture(self._decode_of(size))
        except BaseException:
            self._buckets, self._graphs, self._logits = [], {}, None
            self.bucket_steps = {}
            raise

    def run(self, batch: StepBatch) -> Tensor:
        """Computes a step, writes its keys and values; returns logits [L, V] of `logit_rows`."""
        plain = len(batch.slots) == batch.decode_count and not batch.prompt_rows
        for size in self._buckets if plain and self._graphs else []:
            if size >= batch.decode_count:
                self.bucket_steps[size] += 1
                self.padding_rows += size - batch.decode_count
                self._fill(batch, size)
                logits = self._graphs[size]()
                return logits.index_select(0, self._device.send(batch.logit_rows))
        self.unpadded_steps += 1
        return self._run_as_it_is(batch)

    def _run_as_it_is(self, batch: StepBatch) -> Tensor:
        attention = AttentionBatch.build(
            torch.from_numpy(batch.query_starts),
            torch.from_numpy(batch.context_lengths),
            torch.from_numpy(batch.block_tables),
            torch.from_numpy(batch.slot_mapping),
            batch.decode_count,
            device=self._device.torch_device,
        )
        places = self._device.send(_places(batch, self._tokens))
        return self._model.forward(
            self._tokens.view(-1).index_select(0, places).long(),
            self._device.send(batch.positions),
            attention,
            self._cache,
            self._device.send(batch.logit_rows),
        )

    def _fill(self, batch: StepBatch, size: int) -> None:
        """Brings a step's columns to where its graph reads them; the rest becomes padding."""
        columns, count, send = self._columns, batch.decode_count, self._device.send
        for column, values, filler in (
            (columns.places, _places(batch, self._tokens), 0),
            (columns.positions, batch.positions, 0),
            (columns.slot_mapping, batch.slot_mapping, -1),
            (columns.context_lengths, batch.context_lengths, 0),
        ):
            padded = np.full(size, filler, values.dtype)
            padded[:count] = values
            column[:size].copy_(send(padded), non_blocking=True)
        tables = batch.block_tables
        columns.block_tables[:count, : tables.shape[1]].copy_(send(tables), non_blocking=True)

    def _decode_of(self, size: int) -> Callable[[], Tensor]:
        """A forward pass of the first rows of the columns, whatever is in them when it runs."""
        columns = self._columns
        rows, batch = columns.rows[:size], _decodes(columns, size)

        def run() -> Tensor:
            ids = self._tokens.view(-1).index_select(0, columns.places[:size]).long()
            logits = self._model.forward(
                ids, columns.positions[:size], batch.again(), self._cache, rows
            )
            return self._kept(logits)

        return run

    def _kept(self, logits: Tensor) -> Tensor:
        """Brings logits to where those of every bucket are; the first one that runs makes it."""
        if self._logits is None:
            self._logits = logits.new_empty((self._buckets[-1], logits.shape[1]))
        return self._logits[: len(logits)].copy_(logits, non_blocking=True)


def _decodes(columns: _Columns, size: int) -> AttentionBatch:
    """The attention's columns of a bucket, which are read when it runs.

    On a GPU decodes are cut up by what is on the device; the columns in host memory say no more
    than how many there are.
    """
    starts = columns.starts[: size + 1]
    contexts, tables = columns.context_lengths[:size], columns.block_tables[:size]
    mapping = columns.slot_mapping[:size]
    if contexts.device.type == "cpu":
        return AttentionBatch.build(starts, contexts, tables, mapping, size)
    host = AttentionBatch.build(
        torch.arange(size + 1, dtype=torch.int32),
        torch.zeros(size, dtype=torch.int32),
        torch.zeros((size, 1), dtype=torch.int32),
        torch.full((size,), -1),
        size,
    )
    return AttentionBatch(starts, contexts, tables, mapping, size, host.host)


def _places(batch: StepBatch, tokens: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64 [T]: where in the flat token table each token of a step is."""
    places: np.ndarray[tuple[int], np.dtype[np.int64]]
    places = batch.token_slots * tokens.shape[1] + batch.positions
    return places
