"""The models that engines are measured with: real shapes with random weights, one at a time."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.gpu.cases import DEMO
from benchmarks.gpu.device import Device, describe
from data_plane import demo_model
from data_plane.model import PAGED, Model, load_model

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "max_position_embeddings": 2048,
}
# What a config.json says of each. Llama's has room for the longest prompts that are measured.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        **_LLAMA,
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 16_384,
    },
    "opt-13b": {
        **_OPT,
        "vocab_size": 50_272,
        "hidden_size": 5120,
        "word_embed_proj_dim": 5120,
        "ffn_dim": 20_480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "tiny-llama": {
        **_LLAMA,
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    "tiny-opt": {
        **_OPT,
        "vocab_size": 128,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


@dataclass(frozen=True)
class Loaded:
    """A model on the device.

    Attributes:
        read_bytes: weights that a decode step reads: all but the rows of embeddings that no token
            asks for, unless the table is that of the logits as well.
        seconds: what loading took.
    """

    model: Model
    read_bytes: int
    seconds: float

    @property
    def module(self) -> Any:
        return self.model._module

    @contextmanager
    def layers(self, *, fused: bool) -> Iterator[None]:
        """While this is open, layers run as fused code, compiled when first asked for, or not.

        Raises RuntimeError where they cannot be compiled.
        """
        model = self.model
        if fused and model.compiled is None:
            model.compile()
            if model.compiled is None:
                raise RuntimeError("the layers cannot be compiled; the log says why")
        if model.compiled is not None:
            model.compiled.eager = not fused
        yield

    @contextmanager
    def as_transformers_has_it(self) -> Iterator[Any]:
        """The module with torch's fused attention on contiguous caches, for transformers' own."""
        self.module.set_attn_implementation("sdpa")
        try:
            yield self.module
        finally:
            self.module.set_attn_implementation(PAGED)


class Models:
    """Loads what a cell asks for, and keeps it for the next cells that ask for the same."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._present: tuple[str, Loaded] | None = None
        self._failed: dict[str, str] = {}

    def get(self, name: str) -> Loaded:
        """Raises RuntimeError where it cannot be loaded, or could not be before."""
        if self._present is None or self._present[0] != name:
            self.drop()
            if name in self._failed:
                raise RuntimeError(f"{name} could not be loaded: {self._failed[name]}")
            try:
                self._present = name, self._load(name)
            except Exception as error:
                self._failed[name] = describe(error)
                raise
        return self._present[1]

    def drop(self) -> None:
        """Gives the memory of the present model back."""
        if self._present is not None:
            self._present = None
            self._device.release()

    def _load(self, name: str) -> Loaded:
        began = time.perf_counter()
        if name == DEMO:
            # Where two logits are nearly the same, bfloat16 decides by how sums are grouped.
            model = load_model(demo_model.PATH, dtype="float32", device=self._device.place)
        else:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(SHAPES[name]))
                model = load_model(
                    Path(folder),
                    dtype="float32" if self._device.dry else "bfloat16",
                    load_format="dummy",
                    device=self._device.place,
                    name=name,
                )
        self._device.wait()
        seconds = time.perf_counter() - began
        return Loaded(model, _read_bytes(model._module), seconds)


def _read_bytes(module: Any) -> int:
    every: int = sum(weight.nbytes for weight in module.parameters())
    table: Tensor = module.get_input_embeddings().weight
    tied = table is module.get_output_embeddings().weight
    return every if tied else every - table.nbytes
