"""How the KV cache is sized: by what is free after weights, a largest step and graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from data_plane import memory
from data_plane.device import CpuDevice
from data_plane.memory import cache_bytes
from data_plane.model import Model, load_model
from tests.models import tiny_model

GIB = 1 << 30


class CountedDevice(CpuDevice):
    """A device of 80 GiB with 60 free, on which a token of a step takes a mebibyte."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.steps: list[int] = []
        self._forward = model.forward

    def memory(self) -> tuple[int, int]:
        return 60 * GIB, 80 * GIB

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return self.steps[-1] << 20


@pytest.fixture
def model(tmp_path: object) -> Model:
    return load_model(tiny_model("llama", tmp_path), dtype="float32")  # type: ignore[arg-type]


def _sized(model: Model, monkeypatch: pytest.MonkeyPatch, **changes: object) -> int:
    device = CountedDevice(model)
    forward = model.forward

    def counted(token_ids, *rest):  # type: ignore[no-untyped-def]
        device.steps.append(len(token_ids))
        return forward(token_ids, *rest)

    monkeypatch.setattr(model, "forward", counted)
    settings = {
        "share": 0.9, "block_size": 16, "step_tokens": 1024, "slot_count": 8, "max_length": 100,
        "buckets": (1, 2, 4, 8),
    } | changes  # fmt: skip
    size = cache_bytes(model, device, **settings)  # type: ignore[arg-type]
    monkeypatch.undo()
    return size


def test_the_cache_gets_what_nothing_else_needs(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = 8 * model.facts.vocabulary_size * 4
    graphs = (8 << 20) + logits + memory._WORKSPACE_BYTES + 4 * memory._GRAPH_BYTES
    tables = 4 * 8 * (200 + 7)
    left = int(0.9 * 80 * GIB) - 20 * GIB - GIB - graphs - tables - memory._SAMPLER_BYTES
    assert _sized(model, monkeypatch) == left
    assert _sized(model, monkeypatch, buckets=()) == left + graphs
    assert _sized(model, monkeypatch, share=0.2) == 0


def test_a_largest_step_may_be_longer_than_a_sequence(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = model.facts.max_model_length
    smaller = _sized(model, monkeypatch, step_tokens=longest)
    assert _sized(model, monkeypatch, step_tokens=3 * longest + 5) == smaller - (
        (2 * longest + 5) << 20
    )
