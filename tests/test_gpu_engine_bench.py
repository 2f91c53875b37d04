"""The engine's cells of `make bench-gpu`, where a dry run does not show what they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks.gpu import cases, device, engine_checks, engine_report, rates, report, steps
from benchmarks.gpu.chains import Planner, Session, furnish, run
from benchmarks.gpu.device import Device, find_device
from benchmarks.gpu.models import SHAPES, Loaded, Models
from data_plane import compiled
from data_plane.engine import Engine, EngineSizes

SIZES = EngineSizes(
    block_size=8, block_count=64, host_block_count=0, slot_count=6, step_tokens=32, max_length=96
)
MEMORY = ("reserved_bytes", "retries", "mallocs", "host_mallocs")


@pytest.fixture(scope="module")
def cpu() -> Device:
    return find_device(dry=True)


@pytest.fixture(scope="module")
def models(cpu: Device) -> Models:
    return Models(cpu)


@pytest.fixture
def tiny(models: Models) -> Loaded:
    return models.get("tiny-llama")


def test_shapes_are_those_of_the_cells(cpu: Device, models: Models) -> None:
    named = {
        cell.model
        for dry in (False, True)
        for cell in cases.measured(dry)
        if isinstance(cell, cases.EngineCell)
    }
    assert named == {*SHAPES, cases.DEMO}
    # Weights that a step reads, and bytes of keys and values of a token, both in bf16.
    for name, billions, kib in (("llama-8b", 7.5, 128), ("opt-13b", 12.85, 800)):
        shape = SHAPES[name]
        heads = shape.get("num_key_value_heads", shape["num_attention_heads"])
        hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
        inner = shape.get("intermediate_size") or shape["ffn_dim"]
        products = 3 if "intermediate_size" in shape else 2
        head_size = hidden // shape["num_attention_heads"]
        layer = 2 * hidden * (hidden + heads * head_size) + products * hidden * inner
        weights = layers * layer + shape["vocab_size"] * hidden
        assert weights / 1e9 == pytest.approx(billions, rel=0.01)
        assert 2 * 2 * layers * heads * head_size == kib << 10


def test_what_a_step_reads_leaves_the_embeddings_out_unless_they_are_tied(models: Models) -> None:
    for name, tied in (("tiny-llama", False), ("tiny-opt", True)):
        loaded = models.get(name)
        every = sum(weight.nbytes for weight in loaded.module.parameters())
        table = loaded.module.get_input_embeddings().weight.nbytes
        assert loaded.read_bytes == every - (0 if tied else table)


def test_held_sequences_decode_without_having_been_computed(tiny: Loaded) -> None:
    planner = Planner(SIZES, vocabulary=128)
    planner.hold([16, 21, 40], new_tokens=12)
    plans = planner.until_all_decode(3)
    engine = Engine(tiny.model, SIZES, check=True)
    furnish(engine, planner)
    run(engine, plans)
    # The last token always runs, for its logits, and so does what fills no block.
    assert engine.counters.prefill_token_count == 1 + 5 + 1
    assert engine.state.computed[:3].tolist() == [17, 22, 41]
    times = run(engine, planner.upcoming())
    assert len(times.ends) == len(times.launches) >= 10
    assert not engine.state.resident_slots().size


def test_tokens_do_not_depend_on_who_makes_the_plans(tiny: Loaded) -> None:
    """Plans that were made before, by made-up tokens, run the same sequences as a session's."""
    engine = Engine(tiny.model, SIZES)
    planner = Planner(SIZES, vocabulary=128)
    groups = [planner.submit(length, 9) for length in (5, 40, 17)]
    plans = []
    for planned in planner.upcoming():
        if plans and not planned.decodes and not planned.chunk_tokens:
            break
        plans.append(planned)
    run(engine, plans)
    made = [
        engine.state.tokens[slot, length : length + 9] for slot, length in enumerate((5, 40, 17))
    ]
    session = Session(Engine(tiny.model, SIZES))
    for group in groups:
        session.submit(group.request.request_id, group.request.prompt.tolist(), max_tokens=9)
    session.run()
    assert [tokens.tolist() for tokens in made] == list(session.output.values())


def test_a_step_that_faults_is_no_figure(tiny: Loaded) -> None:
    engine = Engine(tiny.model, SIZES)
    planner = Planner(SIZES, vocabulary=128)
    planner.hold([40], new_tokens=4)
    furnish(engine, planner)
    engine.cache.slab.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="1 sequences fault: the model gave NaN"):
        run(engine, planner.upcoming())


def test_without_graphs_the_kernels_are_those_of_eager_steps(
    tiny: Loaded, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(engine: Engine) -> None:
        if engine.runner._buckets:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Engine, "capture", capture)
    figures = steps.kernels(cases.Kernels("tiny-llama", 2, 20), tiny, cpu)
    assert "not permitted" in figures["missing"]["graphs"]
    assert figures["us"] > 0 and figures["longest"]
    with pytest.raises(RuntimeError, match="not permitted"):
        steps.step(cases.Step("tiny-llama", 2, 20), tiny, cpu)


def test_a_peer_that_fails_or_takes_no_part_costs_no_other(
    tiny: Loaded, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise ImportError("no continuous batching here")

    monkeypatch.setattr(rates, "_continuous", fail)
    began: list[str] = []
    figures = rates.rate(cases.Rate("tiny-llama", 2), tiny, cpu, ["generate"], began.append)
    assert began == ["continuous batching", ""]
    assert figures["peers"] == {} and figures["us"] > 0
    assert figures["missing"] == {"continuous batching": "ImportError: no continuous batching here"}
    # The paged attention is back in its place.
    run(Engine(tiny.model, SIZES), [])
    assert tiny.module.config._attn_implementation == "quire_paged"


class _Manager:
    """A peer's that brings some tokens for each request, or never anything."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens
        self.cancelled: list[str] = []
        self._left: list[str] = []

    def add_requests(self, inputs: list[list[int]], max_new_tokens: int) -> list[str]:
        self._left = [f"r{at}" for at in range(len(inputs))]
        return list(self._left)

    def get_result(self, timeout: float) -> Any:
        if self.tokens is None:
            return None
        tokens = [1] * self.tokens
        return SimpleNamespace(
            request_id=self._left.pop(),
            generated_tokens=tokens,
            error=None,
            is_finished=lambda: True,
        )

    def is_running(self) -> bool:
        return True

    def cancel_request(self, request: str) -> None:
        self.cancelled.append(request)


def test_a_peer_has_some_time_and_must_bring_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    rates._serve(_Manager(3), [[1], [2]], 3)
    with pytest.raises(RuntimeError, match="ended early"):
        rates._serve(_Manager(2), [[1], [2]], 3)
    monkeypatch.setattr(rates, "PEER_SECONDS", 0.0)
    silent = _Manager(None)
    with pytest.raises(RuntimeError, match="2 requests take more than"):
        rates._serve(silent, [[1], [2]], 3)
    assert sorted(silent.cancelled) == ["r0", "r1"]


def test_a_model_that_cannot_be_loaded_is_not_tried_again(
    cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(cpu)
    tried: list[str] = []

    def load(name: str) -> Loaded:
        tried.append(name)
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(models, "_load", load)
    with pytest.raises(torch.OutOfMemoryError):
        models.get("opt-13b")
    with pytest.raises(RuntimeError, match="could not be loaded: OutOfMemoryError: too large"):
        models.get("opt-13b")
    assert tried == ["opt-13b"]


# What only a GPU has, with a stand-in for it.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Device(torch.device("cpu"), "fake", True, False, 1, 1, 1 << 30)


def test_kernels_are_told_from_copies_and_from_the_host(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def event(name: str, us: float, kind: Any = DeviceType.CUDA, note: bool = False) -> Any:
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(
            name=name, device_type=kind, time_range=span, is_user_annotation=note
        )

    events = [
        event("gemm", 5.0),
        event("Memcpy HtoD (Pinned -> Device)", 2.0),
        event("gemm", 6.0),
        event("decode", 20.0),
        event("cudaGraphLaunch", 90.0, DeviceType.CPU),
        event("a part of the program", 99.0, note=True),
    ]

    class Profile:
        def __init__(self, activities: list[Any]) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[Any]:
            return events

    monkeypatch.setattr(device, "profile", Profile)
    found = gpu.kernel_times(lambda: None)
    assert [(kernel.name, kernel.calls, kernel.us) for kernel in found][:2] == [
        ("decode", 1, 20.0),
        ("gemm", 2, 11.0),
    ]
    assert [kernel.copies for kernel in found] == [False, False, True]
    events.clear()
    with pytest.raises(RuntimeError, match="saw no kernel"):
        gpu.kernel_times(lambda: None)


def test_memory_is_counted_by_the_allocators(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"reserved_bytes.all.current": 7, "num_alloc_retries": 1, "num_device_alloc": 4}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: stats)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"num_host_alloc": 2})
    assert gpu.memory_counters() == {
        "reserved_bytes": 7,
        "retries": 1,
        "mallocs": 4,
        "host_mallocs": 2,
    }


@pytest.mark.parametrize("grows", [False, True])
def test_memory_that_is_taken_after_start_is_a_failure(
    tiny: Loaded, cpu: Device, monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    """What the first steps of each kind take is told, and no failure."""
    taken = iter((100, 300, 300, 300 + grows))

    def counters(_: Device) -> dict[str, int]:
        return dict.fromkeys(MEMORY, 0) | {"reserved_bytes": next(taken)}

    monkeypatch.setattr(Device, "memory_counters", counters)
    figures = engine_checks.run(cases.EngineCheck("tiny-llama", "memory"), tiny, cpu)
    assert figures["first_grown"]["reserved_bytes"] == 200
    assert ("failed" in figures) == grows
    assert figures["steps"][0] == figures["steps"][1] > 10


def test_tokens_that_differ_are_a_failure(
    models: Models, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_checks, "_generate", lambda *_: [1] * 6)
    figures = engine_checks.run(cases.EngineCheck("demo", "tokens"), models.get("demo"), cpu)
    assert "graphs" in figures["failed"] and figures["different"]["eager"] > 0


def test_fused_layers_are_those_of_the_fused_cells(
    models: Models, tiny: Loaded, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once, and left out where a cell does not ask for them."""
    monkeypatch.setattr(compiled, "code_of", lambda graph, inputs: graph.forward)
    monkeypatch.setattr(tiny.model, "compiled", None)
    for fused in (True, False, True):
        with tiny.layers(fused=fused):
            assert tiny.model.compiled is not None
            assert tiny.model.compiled.eager != fused
            steps.step(cases.Step("tiny-llama", 2, 20, fused=fused), tiny, cpu)
    assert tiny.model.compiled.pieces == 2 and tiny.model.compiled.missed == 0
    models.drop()


@pytest.mark.parametrize("what", ["tokens", "memory"])
def test_what_an_engine_promises_is_checked_as_it_runs_by_default(
    what: str, models: Models, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fused layers in graphs, which a dry run alone leaves out."""
    loaded = models.get("tiny-llama")
    monkeypatch.setattr(compiled, "code_of", lambda graph, inputs: graph.forward)
    monkeypatch.setattr(loaded.model, "compiled", None)
    ran: list[tuple[bool, bool]] = []

    def run(engine: Engine) -> None:
        layers = loaded.model.compiled
        ran.append((layers is not None and not layers.eager, bool(engine.runner._buckets)))

    def greedy(engine: Engine, prompts: list[list[int]], _: int) -> list[list[int]]:
        run(engine)
        return [[] for _ in prompts]

    monkeypatch.setattr(engine_checks, "_greedy", greedy)
    monkeypatch.setattr(engine_checks, "_mixed", lambda engine, *_: run(engine))
    monkeypatch.setattr(engine_checks, "_generate", lambda *_: [])
    monkeypatch.setattr(Device, "memory_counters", lambda _: dict.fromkeys(MEMORY, 0))
    figures = engine_checks.run(
        cases.EngineCheck("tiny-llama", what), loaded, replace(cpu, dry=False)
    )
    assert "failed" not in figures
    ways = [(False, False), (False, True), (True, True)]
    assert ran == (ways if what == "tokens" else ways[2:] * 3)
    models.drop()


# The tables.


@pytest.fixture
def lines() -> dict[str, Any]:
    figures: dict[cases.Cell, dict[str, Any]] = {
        cases.Ceiling("read"): {"us": 1.0, "gb_s": 4000.0},
        cases.Step("llama-8b", 64, 512): {
            "us": 5000.0,
            "low": 4990.0,
            "high": 5050.0,
            "launch_us": 900.0,
            "weight_bytes": 14_000_000_000,
            "kv_bytes": 4e9,
        },
        cases.Step("llama-8b", 64, 512, eager=True): {"failed": "OutOfMemoryError: none left"},
        cases.Step("llama-8b", 64, 512, fused=True): {
            "us": 4800.0,
            "weight_bytes": 14_000_000_000,
            "kv_bytes": 4e9,
        },
        cases.Kernels("llama-8b", 64, 512): {"us": 4925.0, "copies_us": 9.0, "calls": 1500.0},
        cases.Kernels("llama-8b", 64, 512, fused=True): {"us": 4704.0, "calls": 420.0},
        cases.Rate("llama-8b", 8): {
            "us": 1e6,
            "tokens": 256,
            "peers": {"generate": {"us": 2e6}},
            "missing": {"continuous batching": "not importable"},
        },
        cases.Preempt("llama-8b", 16): {
            "points": [
                {
                    "length": 256,
                    "out_us": 700.0,
                    "in_us": 800.0,
                    "swap_us": 1500.0,
                    "recompute_us": 20_000.0,
                }
            ]
        },
        cases.Fit("opt-13b"): {
            "batches": {"paged": 280.0, "max": 63.0, "pow2": 84.2, "oracle": 113.0},
            "most": 300,
            "ran": 299,
        },
        cases.EngineCheck("demo", "tokens"): {"different": {"graphs": 0}},
        cases.EngineCheck("llama-8b", "memory"): {"failed": "memory was taken after start"},
    }
    lines: dict[str, Any] = {}
    for cell, found in figures.items():
        lines[cell.key] = report.line(cell, found, lines)
    return lines


def test_lines_hold_bubbles_and_floors(lines: dict[str, Any]) -> None:
    step = lines["step model=llama-8b batch=64 context=512"]
    assert step["floor_us"] == 4500 and step["of_floor"] == 0.9
    kernels = lines["kernels model=llama-8b batch=64 context=512"]
    assert kernels["bubble"] == 0.015 and "bubble_eager" not in kernels
    rate = lines["rate model=llama-8b batch=8"]
    assert rate["tokens_s"] == 256 and rate["times"] == 2
    assert "bubble 1.5%" in report.progress(kernels)
    assert "generate 2e+06" in report.progress(rate)


def _rows(table: str) -> Iterator[list[str]]:
    for row in table.splitlines()[2:]:
        yield [column.strip() for column in row.strip("|").split("|")]


def test_tables_of_the_engine(lines: dict[str, Any]) -> None:
    tables = engine_report.tables(lines, cases.measured(False))
    first, second, *_ = _rows(tables["steps"])
    assert first[:5] == ["llama-8b", "64", "512", "5000 (4990 to 5050)", "failed"]
    assert first[5:] == ["4500", "90%", "4925", "1500", "1.5%", "–", "900", "4800", "420", "2.0%"]
    assert second[3:] == [report.NOTHING] * 12
    rates_of_8 = next(row for row in _rows(tables["rates"]) if row[1] == "8")
    assert rates_of_8 == ["llama-8b", "8", "256", "128", "–", "2.00"]
    blocks = {row[1]: row for row in _rows(tables["preemption"])}
    assert blocks["16"][2:] == ["256", "700", "800", "1500", "2e+04", "swapping"]
    assert blocks["8"][2:] == ["256 to 8192", *[report.NOTHING] * 5]
    paged, *_, longest = _rows(tables["fitting"])
    assert paged[2:] == ["280.0", "300", "299"] and longest[2:] == ["63.0", "", ""]
    tokens, memory = _rows(tables["promises"])
    assert tokens[2] == "holds" and memory[2] == "memory was taken after start"
