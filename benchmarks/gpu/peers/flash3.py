"""FlashAttention-3 as vLLM ships it: a library of torch operators that needs no vLLM."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.inputs import FP8, KEY_SCALE, VALUE_SCALE, Inputs
from benchmarks.gpu.peers import Run, Unavailable

LIBRARY = "_vllm_fa3_C.abi3.so"


def prepare(inputs: Inputs) -> Run:
    """It reads our cache as it is: it takes any strides. fp8 it multiplies as such."""
    operators = _operators()
    if inputs.slab.dtype not in (torch.float16, torch.bfloat16, FP8):
        raise Unavailable("has no such dtype")
    queries = inputs.queries
    if inputs.quantised:
        queries = [query.to(FP8) for query in queries]
    elif queries[0].dtype != inputs.slab.dtype:
        raise Unavailable("has one dtype for queries and cache")
    dtype = torch.bfloat16 if inputs.quantised else queries[0].dtype
    output = torch.full_like(queries[0], float("nan"), dtype=dtype)
    shared = _shared(inputs)
    shared |= {"out": output, "scheduler_metadata": _metadata(operators, inputs, shared)}

    def run_layer(layer: int) -> Tensor:
        keys, values = (each.transpose(1, 2) for each in (inputs.keys(layer), inputs.values(layer)))
        _call(operators.fwd, shared | {"q": queries[layer], "k": keys, "v": values})
        return output

    return run_layer


def _shared(inputs: Inputs) -> dict[str, Any]:
    """Arguments of all layers, by the operator's names for them."""
    batch, sequences = inputs.batch, len(inputs.lengths)
    scales: dict[str, Any] = {}
    if inputs.quantised:
        ones = torch.ones(sequences, inputs.kv_heads, device=inputs.slab.device)
        scales = {
            "q_descale": ones,
            "k_descale": ones * KEY_SCALE,
            "v_descale": ones * VALUE_SCALE,
        }
    return {
        "cu_seqlens_q": batch.query_starts,
        "seqused_k": batch.context_lengths,
        "max_seqlen_q": max(inputs.counts),
        "max_seqlen_k": max(inputs.lengths),
        "page_table": batch.block_tables,
        "softmax_scale": inputs.options.scale,
        "is_causal": True,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "is_rotary_interleaved": True,
        "num_splits": 0,
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
        **scales,
    }


def _metadata(operators: Any, inputs: Inputs, shared: Mapping[str, Any]) -> Tensor | None:
    """How it cuts up the work, made once a step like our plan. Without it every call does."""
    arguments = {
        **shared,
        "batch_size": len(inputs.lengths),
        "num_heads": inputs.heads,
        "num_heads_k": inputs.kv_heads,
        "headdim": inputs.head_size,
        "headdim_v": inputs.head_size,
        "qkv_dtype": inputs.slab.dtype,
        "page_size": inputs.block_size,
        "max_seqlen_k_new": 0,
        "has_softcap": False,
    }
    try:
        found: Tensor = _call(operators.get_scheduler_metadata, arguments)
    except (AttributeError, RuntimeError, TypeError, Unavailable):
        return None
    return found


def _call(operator: Any, arguments: Mapping[str, Any]) -> Any:
    """By the names of its schema, which changes from version to version."""
    values = []
    for argument in operator.default._schema.arguments:
        if argument.name not in arguments and argument.type.kind() != "OptionalType":
            raise Unavailable(f"asks for {argument.name}, which is not known here")
        values.append(arguments.get(argument.name))
    return operator(*values)


@lru_cache(maxsize=1)
def _operators() -> Any:
    path = _library()
    if path is None:
        raise Unavailable(f"no {LIBRARY}: neither --fa3, nor QUIRE_FA3, nor in a vllm package")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise Unavailable(f"{path.name} does not load: {error}") from error
    return torch.ops._vllm_fa3_C


@lru_cache(maxsize=1)
def _library() -> Path | None:
    if os.environ.get("QUIRE_FA3"):
        return Path(os.environ["QUIRE_FA3"])
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in Path(folder).rglob(LIBRARY):
            return found
    return None
