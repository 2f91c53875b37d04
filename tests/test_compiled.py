"""Layers as fused code give the tokens that they give eagerly, and are compiled at start alone.

Most tests take the graphs as they are, which needs no compiler; those marked with `needs_gcc`
let inductor make code for the CPU, for which it calls a C++ compiler.
"""

from __future__ import annotations

import logging
import operator
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.nn import functional

import kernels
from data_plane import compiled
from data_plane.__main__ import build_engine, compiles_layers
from data_plane.calibrate import find_scales
from data_plane.compiled import layers_of
from data_plane.kv_cache import KVCache
from data_plane.merged_linear import PartOfProduct, merge, seeing_siblings, share_products
from data_plane.model import Model, load_model
from data_plane.settings import Settings
from data_plane.tensor_parallel import TensorGroup
from tests.kernel_cases import Case
from tests.models import VOCABULARY_SIZE, tiny_model
from tests.test_models import paged_greedy
from tests.test_ops import run_model
from tests.test_step_path import Pair, submit_all_kinds

needs_gcc = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler, as g++"
)
# torch's own, while it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
# How many kinds of layers there are: those with and without a window are two.
KINDS = {"llama": 1, "gpt2": 1, "qwen3": 1, "mistral-window": 1, "gemma2": 2, "gpt_oss": 2}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """On one thread, since threads that wait for a busy core take a hundred times longer."""
    torch._dynamo.reset()
    counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs that are compiled; from then on they run as they are."""
    seen: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list[Any]) -> Any:
        seen.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compiled, "code_of", keep)
    return seen


def compiles() -> int:
    return counters["stats"]["unique_graphs"]


def products(graph: GraphModule) -> int:
    return sum(node.target is functional.linear for node in graph.graph.nodes)


def made(model: Model, **given: Any) -> compiled.CompiledLayers:
    model.compile(**given)
    assert model.compiled is not None
    return model.compiled


@pytest.mark.parametrize("arch", KINDS)
def test_each_kind_of_layer_is_compiled_twice_and_never_again(
    arch: str, tmp_path: Path, graphs: list[GraphModule]
) -> None:
    """Once for one token and once for more, whatever steps and caches there are."""
    layers = {"n_layer" if arch == "gpt2" else "num_hidden_layers": 4}
    directory = tiny_model(arch, tmp_path, **layers)
    generator = torch.manual_seed(0)
    prompts = [
        torch.randint(8, VOCABULARY_SIZE, (length,), generator=generator).tolist()
        for length in (1, 17, 40)
    ]
    expected = paged_greedy(load_model(directory), prompts, 16)
    model = load_model(directory)
    layers = made(model)
    # One graph each, so that none has a break.
    assert layers.pieces == compiles() == 2 * KINDS[arch]
    assert not counters["graph_break"]
    assert paged_greedy(model, prompts, 16) == expected
    assert paged_greedy(model, prompts[:2], 16) == expected[:2]
    model.warm_up()
    assert layers.missed == 0
    assert layers.pieces == compiles() == 2 * KINDS[arch]


@pytest.mark.parametrize(
    ("arch", "count"), [("llama", 4), ("opt", 4), ("qwen3", 4), ("gpt_neox", 4), ("phi", 4)]
)
def test_products_of_one_input_are_one(
    arch: str, count: int, tmp_path: Path, graphs: list[GraphModule]
) -> None:
    """Queries, keys and values; gate and up. GPT-NeoX has one product of the former itself."""
    model = load_model(tiny_model(arch, tmp_path))
    weights = {name: one.clone() for name, one in model._module.named_parameters()}
    eager = run_model(model)
    made(model)
    assert [products(graph) for graph in graphs] == [count, count]
    merged = [one for one in model._module.modules() if isinstance(one, PartOfProduct)]
    assert bool(merged) == (arch != "gpt_neox")
    for name, one in model._module.named_parameters():
        assert torch.equal(one, weights[name]), name
    for one in merged:
        assert one.weight.untyped_storage().data_ptr() == one.whole.untyped_storage().data_ptr()
    torch.testing.assert_close(run_model(model), eager, rtol=1e-4, atol=1e-5)
    # Not compiled, each is its own product again.
    model.compiled.eager = True
    assert torch.equal(run_model(model), eager)


class Siblings(nn.Module):
    """Two products of one input, between which something may happen to it."""

    def __init__(self, between: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        product = self.first(x)
        self.between(x)
        return product + self.second(x)


def _set_item(x: Tensor) -> None:
    x[0] = 3.0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "method": lambda x: x.add_(1),
    "of a view": lambda x: x[:, :2].mul_(2),
    "operator": lambda x: operator.iadd(x, 1),
    "item": _set_item,
    "out": lambda x: torch.add(x, 1, out=x),
    "inplace": lambda x: functional.relu(x, inplace=True),
    "function": lambda x: torch.relu_(x),
    "custom": lambda x: torch.ops.aten.add_.Tensor(x, x),
}


@pytest.mark.parametrize("write", WRITES)
@torch.inference_mode()
def test_products_before_and_after_a_write_stay_two(write: str) -> None:
    saved: list[int] = []

    def backend(graph: GraphModule, inputs: list[Any]) -> Any:
        saved.append(share_products(graph))
        return graph.forward

    given = torch.randn(3, 4)
    for between, count in ((WRITES[write], 0), (lambda x: x.neg().clone(), 1)):
        module = Siblings(between).requires_grad_(False)
        expected = module(given)
        with seeing_siblings(module) as groups:
            module(given)
            assert len(groups()) == count
        # Where they are merged nevertheless, the graph is what decides.
        merge([module.first, module.second])
        torch._dynamo.reset()
        found = torch.compile(module, backend=backend, fullgraph=True)(given)
        torch.testing.assert_close(found, expected)
        assert saved.pop() == count and not saved


@needs_gcc
@pytest.mark.parametrize("arch", ["llama", "gpt_oss"])
def test_fused_code_gives_the_same_tokens_through_the_engine(arch: str, tmp_path: Path) -> None:
    """With all that requests may ask for, steps ahead and buckets; gpt-oss: windows and sinks."""
    model = load_model(tiny_model(arch, tmp_path), dtype="float32")
    pairs = []
    for at in range(2):
        if at:
            layers = made(model, block_size=8)
        pair = Pair(model, depth=2, buckets=(1, 4, 12))
        submit_all_kinds(pair)
        pairs.append(pair.run())
    assert layers.missed == 0
    assert pairs[0].output == pairs[1].output and len(pairs[0].output) > 10
    for key, scores in pairs[0].logprobs.items():
        assert pairs[1].logprobs[key] == pytest.approx(scores, abs=1e-3)


@needs_gcc
@pytest.mark.parametrize(("arch", "fp8"), [("llama", False), ("gemma2", True)])
def test_fused_code_gives_the_same_logits_and_writes_the_cache_in_place(
    arch: str, fp8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator says that it writes to the cache, of which inductor must make no copy."""
    model = load_model(tiny_model(arch, tmp_path), dtype="float32")
    scales = find_scales(model, tmp_path) if fp8 else None
    eager = run_model(model, scales)
    layers = made(model, scales=scales)
    written: list[int] = []
    write = kernels.ops.write_cache

    def seen(*given: Any, **scales: Any) -> None:
        written.append(given[2].data_ptr())
        write(*given, **scales)

    monkeypatch.setattr(kernels.ops, "write_cache", seen)
    places: list[int] = []
    monkeypatch.setattr("tests.test_ops.KVCache", _remembering(places))
    # What fp8 rounds to its other neighbour weighs more than what is summed in another order.
    near = {"rtol": 0.02, "atol": 0.05} if fp8 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(run_model(model, scales), eager, **near)
    assert layers.missed == 0
    # In four steps.
    assert written == places * 4


def _remembering(places: list[int]) -> Callable[..., KVCache]:
    """A cache that says where each layer's keys are."""

    def make(*given: Any) -> KVCache:
        cache = KVCache(*given)
        places.extend(cache.keys(layer).data_ptr() for layer in range(cache.layer_count))
        return cache

    return make


def test_the_operator_keeps_its_contract() -> None:
    case = Case([(1, 40), (2, 3)])
    blocks = torch.stack((case.key_blocks, case.value_blocks), 1).nan_to_num_(1)
    rows = torch.randn(2, 3, 2, 32)
    given = (case.query, rows[0], rows[1], blocks, case.scale, None, None, None, None, None)
    with kernels.present(case.batch()):
        torch.library.opcheck(torch.ops.quire.layer_attention.default, given)
        once = kernels.layer_attention(*given[:4], scale=case.scale)
    kernels.write_cache(rows[0], rows[1], blocks[:, 0], blocks[:, 1], case.batch())
    batch, cache = case.batch(), (blocks[:, 0], blocks[:, 1])
    again = kernels.paged_attention(case.query, *cache, batch, scale=case.scale)
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="no present batch"):
        kernels.layer_attention(*given[:4], scale=case.scale)


def test_what_was_not_compiled_runs_eagerly_and_is_said_once(
    tmp_path: Path, graphs: list[GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    """Here a cache with blocks of another size; nothing is compiled while serving."""
    model = load_model(tiny_model("llama", tmp_path))
    prompts = [[9, 10, 11, 12], [30]]
    expected = paged_greedy(model, prompts, 32)
    layers = made(model, block_size=16)
    before = compiles()
    assert paged_greedy(model, prompts, 32) == expected
    assert layers.missed > 10 and compiles() == before
    said = [record.message for record in caplog.records if record.name == compiled.__name__]
    assert said.count("a step fits no compiled layer and runs eagerly") == 1


@pytest.mark.parametrize("why", ["compiler", "graph break", "no list"])
def test_a_model_that_cannot_be_compiled_runs_eagerly(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(tiny_model("llama", tmp_path))
    expected = paged_greedy(model, [[9, 10, 11]], 16)
    layers = layers_of(model._module, 2)
    assert layers is not None
    if why == "compiler":

        def fail(*given: Any) -> Any:
            raise FileNotFoundError("there is no compiler here\nand more")

        monkeypatch.setattr(compiled, "code_of", fail)
        sentence = "they cannot be compiled: FileNotFoundError: there is no compiler here"
    elif why == "graph break":
        norm = type(layers[0].input_layernorm)
        monkeypatch.setattr(norm, "forward", _breaking(norm.forward))
        sentence = "they cannot be compiled: "
    else:
        monkeypatch.setattr("data_plane.model.layers_of", lambda *_: None)
        sentence = "the model has no list of them"
    model.compile()
    (said,) = [record.message for record in caplog.records if record.name == "data_plane.model"]
    assert said.startswith("the layers run eagerly: ") and sentence in said and "\n" not in said
    assert model.compiled is None
    assert not any("forward" in vars(layer) for layer in layers)
    assert paged_greedy(model, [[9, 10, 11]], 16) == expected


def _breaking(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(self: Any, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(self, x)

    return broken


def test_the_engine_compiles_where_it_is_asked_to(
    graphs: list[GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "data_plane")
    few = {"kv_memory_mib": 16, "max_slots": 4, "block_size": 32}
    assert build_engine(Settings(**few)).model.compiled is None
    engine = build_engine(Settings(compile="on", **few))
    assert engine.model.compiled is not None
    assert engine.model.compiled.pieces == 2 and engine.model.compiled.missed == 0
    said = [record.message for record in caplog.records]
    for percent in (50, 100):
        assert f"compiling layers: {percent} %" in said
    assert any(line.startswith("compiled ") and "as 2 pieces of code" in line for line in said)


def test_ranks_of_one_engine_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "data_plane")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    alone, two = TensorGroup.alone(), TensorGroup(0, 2)
    assert not compiles_layers(Settings(), cpu, alone)
    assert compiles_layers(Settings(), cuda, alone)
    assert compiles_layers(Settings(compile="on"), cpu, alone)
    assert not compiles_layers(Settings(compile="off"), cuda, alone)
    assert not caplog.records
    assert not compiles_layers(Settings(), cuda, two)
    (record,) = caplog.records
    assert record.message == "the layers run eagerly: those of several ranks are not compiled"
