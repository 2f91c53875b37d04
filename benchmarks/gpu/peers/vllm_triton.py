"""vLLM's unified attention in Triton, where vLLM (or that module of it) is importable."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.inputs import KEY_SCALE, VALUE_SCALE, Inputs
from benchmarks.gpu.peers import Run, import_first, known
from kernels.tiling import power_of_two

MODULES = (
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.attention.ops.triton_unified_attention",
)
# As vLLM's own back end chooses them: fewer sequences than give this many programs are cut
# into segments.
LEAST_PROGRAMS, SEGMENTS = 128, 16


def prepare(inputs: Inputs) -> Run:
    """It reads our cache as it is: it takes any strides."""
    unified_attention = _module().unified_attention
    output = torch.full_like(inputs.queries[0], float("nan"))
    arguments = known(unified_attention, _arguments(inputs) | {"out": output})

    def run_layer(layer: int) -> Tensor:
        keys, values = (each.transpose(1, 2) for each in (inputs.keys(layer), inputs.values(layer)))
        unified_attention(q=inputs.queries[layer], k=keys, v=values, **arguments)
        return output

    return run_layer


def _arguments(inputs: Inputs) -> dict[str, Any]:
    batch, device = inputs.batch, inputs.slab.device
    segments = (inputs.queries[0].shape[0], inputs.heads, SEGMENTS)
    scales = torch.tensor([KEY_SCALE, VALUE_SCALE], device=device)
    of_all = (len(inputs.lengths), inputs.kv_heads)
    arguments = {
        "cu_seqlens_q": batch.query_starts,
        "max_seqlen_q": max(inputs.counts),
        "seqused_k": batch.context_lengths,
        "max_seqlen_k": max(inputs.lengths),
        "softmax_scale": inputs.options.scale,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": batch.block_tables,
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": scales[0].expand(of_all) if inputs.quantised else None,
        "v_descale": scales[1].expand(of_all) if inputs.quantised else None,
    }
    if inputs.decodes:
        arguments |= {
            "seq_threshold_3D": LEAST_PROGRAMS // inputs.kv_heads,
            "num_par_softmax_segments": SEGMENTS,
            "softmax_segm_output": torch.empty(
                (*segments, power_of_two(inputs.head_size)), device=device
            ),
            "softmax_segm_max": torch.empty(segments, device=device),
            "softmax_segm_expsum": torch.empty(segments, device=device),
        }
    if inputs.quantised:
        arguments["kv_quant_mode"] = _quantised_mode()
    return arguments


def _quantised_mode() -> Any:
    """One scale for a whole cache of fp8. Versions that have no such argument see the dtype."""
    try:
        return importlib.import_module("vllm.v1.kv_cache_interface").KVQuantMode.FP8_PER_TENSOR
    except (ImportError, AttributeError):
        return 1


def _module() -> ModuleType:
    return import_first(MODULES)
