"""FlashInfer's kernels for paged caches, with matrix units for decodes too.

It compiles its kernels when it first needs them, which takes minutes: `start` lets another
process do so while other things are measured. `python -m benchmarks.gpu.peers.flash_infer`
is that process.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.inputs import KEY_SCALE, Inputs
from benchmarks.gpu.peers import Run, Unavailable, import_first

# What is compiled ahead, most important first: queries and cache, with heads of 128.
KINDS = (("bf16", "bf16"), ("bf16", "fp8"))
HEAD_SIZE = 128
WORKSPACE_BYTES = 384 << 20
# Seconds that a run waits for the compiler, all cells together.
PATIENCE = 45.0


class Builder:
    """The process that compiles, and what it has done so far."""

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.last_line = ""
        self.patience = PATIENCE
        self.finished = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.peers.flash_infer"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, kind: str) -> None:
        """Raises Unavailable where it takes too long or did not work."""
        while kind not in self.ready:
            if self.finished:
                raise Unavailable(f"did not compile: {self.last_line}"[:200])
            if self.patience <= 0:
                raise Unavailable("is still compiling")
            time.sleep(0.2)
            self.patience -= 0.2

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready "):
                self.ready.add(line.removeprefix("ready ").strip())
            elif line.strip():
                self.last_line = line.strip()
        self.finished = True


_builder: Builder | None = None


def start() -> None:
    """Begin to compile, where FlashInfer is there at all."""
    global _builder
    if importlib.util.find_spec("flashinfer") is not None:
        _builder = Builder()


def prepare(inputs: Inputs) -> Run:
    """It reads our cache as it is: it takes any strides."""
    flashinfer = _module()
    if inputs.head_size != HEAD_SIZE:
        raise Unavailable(f"is compiled for heads of {HEAD_SIZE} only")
    if _builder is not None:
        _builder.wait_for(_kind(inputs))
    wrapper = _planned(flashinfer, inputs)
    output = torch.full_like(inputs.queries[0], float("nan"))

    def run_layer(layer: int) -> Tensor:
        cache = (inputs.keys(layer), inputs.values(layer))
        wrapper.run(inputs.queries[layer], cache, out=output)
        return output

    return run_layer


def _planned(flashinfer: ModuleType, inputs: Inputs) -> Any:
    """A wrapper that knows the step. It plans once a step, as we do."""
    device, block = inputs.slab.device, inputs.block_size
    counts = torch.tensor([-(-length // block) for length in inputs.lengths])
    tables = inputs.batch.host.block_tables
    pages = {
        "indptr": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
        "indices": torch.cat(
            [row[:count] for row, count in zip(tables, counts.tolist(), strict=True)]
        ).to(device),
        "last_page_len": ((torch.tensor(inputs.lengths) - 1) % block + 1).to(torch.int32),
    }
    if inputs.decodes:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(device), "HND", use_tensor_cores=True, backend="fa2"
        )
        names = {**pages, "head_dim": inputs.head_size}
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            _workspace(device), "HND", backend="fa2"
        )
        names = {f"paged_kv_{name}": value for name, value in pages.items()}
        names |= {
            "qo_indptr": inputs.batch.host.query_starts,
            "head_dim_qk": inputs.head_size,
            "causal": True,
        }
    scale = inputs.options.scale * (KEY_SCALE if inputs.quantised else 1.0)
    wrapper.plan(
        **names,
        num_qo_heads=inputs.heads,
        num_kv_heads=inputs.kv_heads,
        page_size=block,
        q_data_type=inputs.queries[0].dtype,
        kv_data_type=inputs.slab.dtype,
        sm_scale=scale,
    )
    return wrapper


@lru_cache(maxsize=1)
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _module() -> ModuleType:
    return import_first(("flashinfer",))


def _kind(inputs: Inputs) -> str:
    return f"{inputs.queries[0].dtype} {inputs.slab.dtype}"


def _compile() -> None:
    """Run each kind once, so that its code lies in FlashInfer's own cache on the disk."""
    from benchmarks.gpu.cases import Decode
    from benchmarks.gpu.device import find_device
    from benchmarks.gpu.inputs import make_inputs

    flashinfer, device = _module(), find_device(dry=False)
    for query, cache in KINDS:
        inputs = make_inputs(Decode(2, 40, query=query, cache=cache), device)
        wrapper = _planned(flashinfer, inputs)
        wrapper.run(inputs.queries[0], (inputs.keys(0), inputs.values(0)))
        device.wait()
        print(f"ready {_kind(inputs)}", flush=True)


if __name__ == "__main__":
    _compile()
