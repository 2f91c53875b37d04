"""Kernels of a decode step of a Llama on the CPU, eagerly and with compiled layers, and its time.

What is counted: eagerly every operator of torch that computes something, which on a GPU is a
kernel; compiled what the code of a layer calls. Attention, with the cache's writes, counts as one
in both. Code for a GPU has other kernels than that for a CPU, but about as many.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import report
from data_plane import compiled
from data_plane.kv_cache import KVCache
from data_plane.model import Model, load_model
from kernels import AttentionBatch

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LAYERS = 4
# Operators are those of models as they are served; products of bf16 take long on most CPUs.
COUNTED, TIMED = "bfloat16", "float32"
BATCH, CONTEXT, BLOCK = 64, 100, 16
ROUNDS, CALLS = 15, 4
# What the code of a layer calls, of inductor's for a CPU.
_CALL = re.compile(r"^\s+(?:\w+ = )?(cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.\w+\.\w+)", re.M)


class Counted(TorchDispatchMode):
    """Counts the operators that compute something, which is new memory, while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            {
                one.untyped_storage().data_ptr()
                for one in tree_leaves(tree)
                if isinstance(one, Tensor)
            }
            for tree in ((args, kwargs), result)
        )
        self.count += bool(made - given) and "empty" not in func.__name__
        return result


def load(folder: Path, layers: int, dtype: str) -> Model:
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    return load_model(folder, dtype=dtype, load_format="dummy", packed=False)


def step(model: Model) -> Callable[[], Tensor]:
    """A decode step of so many sequences."""
    facts, width = model.facts, -(-CONTEXT // BLOCK)
    geometry = (facts.kv_head_count, BLOCK, facts.head_size, facts.dtype)
    cache = KVCache(facts.layer_count, BATCH * width, 0, *geometry)
    cache.slab.normal_()
    tables = torch.arange(BATCH * width, dtype=torch.int32).view(BATCH, width)
    slots = tables[:, -1].long() * BLOCK + (CONTEXT - 1) % BLOCK
    batch = AttentionBatch.build(
        torch.arange(BATCH + 1, dtype=torch.int32),
        torch.full((BATCH,), CONTEXT, dtype=torch.int32),
        tables,
        slots,
        BATCH,
    )
    ids, rows = torch.arange(BATCH) % facts.vocabulary_size, torch.arange(BATCH)
    positions = torch.full((BATCH,), CONTEXT - 1)
    return lambda: model.forward(ids, positions, batch, cache, rows)


def compiled_calls(model: Model) -> int:
    """Compiles a model's layers; returns how many kernels a layer calls for several tokens."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    with config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(model.compile)
    if model.compiled is None:
        raise RuntimeError("the layers cannot be compiled; the log says why")
    return len(_CALL.findall(codes[0][codes[0].rindex("def call(") :]))


def eager_kernels(folder: Path) -> tuple[int, int]:
    """Kernels of a layer, and of the rest of a step."""
    counts = []
    for layers in (1, 2):
        model = load(folder, layers, COUNTED)
        # Not compiled in earnest, but so that attention is the one operator that it is then.
        with patch.object(compiled, "code_of", lambda graph, inputs: graph.forward):
            model.compile()
        assert model.compiled is not None
        model.compiled.eager = True
        run = step(model)
        with Counted() as counted:
            run()
        counts.append(counted.count)
    return counts[1] - counts[0], 2 * counts[0] - counts[1]


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        run()
    return time.perf_counter() - began


def main() -> None:
    # Threads that wait for a core which another process has would be all that is measured.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layer, rest = eager_kernels(folder)
        plain, fused = load(folder, LAYERS, TIMED), load(folder, LAYERS, TIMED)
        fewer = compiled_calls(load(folder, 1, COUNTED))
        began = time.perf_counter()
        fused.compile()
        took = time.perf_counter() - began
        runs = step(plain), step(fused)
        for run in runs:
            seconds(run)
        ratios = [seconds(runs[0]) / seconds(runs[1]) for _ in range(ROUNDS)]
    steps = [layers * LAYERS + rest for layers in (layer, fewer)]
    report("compiled_kernels", layers=LAYERS, per_layer=layer, per_layer_compiled=fewer,
           rest=rest, step=steps[0], step_compiled=steps[1], ratio=steps[0] / steps[1])  # fmt: skip
    ratios.sort()
    report("compiled_step", batch=BATCH, context=CONTEXT, ratio=statistics.median(ratios),
           spread=[ratios[1], ratios[-2]], rounds=ROUNDS)  # fmt: skip
    print(f"compiling took {took:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
