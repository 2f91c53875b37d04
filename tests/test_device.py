"""The device of CUDA: what a CPU can show of it, with torch.cuda's own things stood in for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from data_plane.device import CudaDevice
from data_plane.engine import Engine
from data_plane.model import Model, load_model
from kernels import AttentionBatch
from tests.models import tiny_model
from tests.test_step_path import SIZES


class Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    def replay(self) -> None:
        pass

    def pool(self) -> tuple[int, int]:
        return 0, 1


@contextmanager
def entered(*_: Any, **__: Any) -> Iterator[None]:
    yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """The device of CUDA over a CPU's memory: a capture runs what it captures."""
    for name, stand_in in (
        ("Stream", Stream), ("CUDAGraph", Graph), ("graph", entered), ("stream", entered),
        ("current_stream", Stream),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return CudaDevice(torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_model("llama", tmp_path_factory.mktemp("llama")), dtype="float32")


def test_a_graph_keeps_what_it_was_captured_of(cuda: CudaDevice) -> None:
    """It reads the addresses that were there then, and torch knows nothing of that."""

    def captured() -> tuple[Any, weakref.ref[Tensor]]:
        read = torch.arange(3)
        return cuda.capture(lambda: read + 1), weakref.ref(read)

    graph, read = captured()
    gc.collect()
    assert read() is not None and graph().tolist() == [1, 2, 3]


def test_all_that_a_bucket_reads_is_the_runners_own(
    model: Model, cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, SIZES, buckets=(1, 4, 12))
    read: set[int] = set()
    forward = model.forward

    def seen(ids: Tensor, positions: Tensor, batch: AttentionBatch, *rest: Any) -> Tensor:
        columns = (batch.query_starts, batch.context_lengths, batch.block_tables)
        for column in (positions, *columns, batch.slot_mapping, rest[-1]):
            read.add(column.untyped_storage().data_ptr())
        return forward(ids, positions, batch, *rest)

    monkeypatch.setattr(model, "forward", seen)
    monkeypatch.setattr(engine.runner, "_device", cuda)
    engine.capture()
    columns = engine.runner._columns
    owned = [getattr(columns, field.name) for field in fields(columns)]
    assert read <= {column.untyped_storage().data_ptr() for column in owned}
