"""SGLang's decode attention in Triton, where SGLang (or that module of it) is importable."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.inputs import KEY_SCALE, VALUE_SCALE, Inputs, gather
from benchmarks.gpu.peers import Run, Unavailable, import_first, known

MODULES = (
    "sglang.kernels.ops.attention.decode_attention",
    "sglang.srt.layers.attention.triton_ops.decode_attention",
)
# Most pieces of a sequence, query heads in a program, programs for each multiprocessor that
# the pieces are to make, and keys that are not worth cutting up.
MOST_SPLITS, HEADS, PROGRAMS, LEAST_KEYS = 16, 16, 4, 128


def prepare(inputs: Inputs) -> Run:
    """It wants a cache of single tokens, all heads of one adjacent: it is given a copy."""
    module = _module()
    if not inputs.decodes:
        raise Unavailable("is for decodes")
    device = inputs.slab.device
    caches = [_tokens(inputs, layer) for layer in range(inputs.layers)]
    slots = torch.cat([inputs.slots(at) for at in range(len(inputs.lengths))])
    starts = torch.tensor([0, *inputs.lengths]).cumsum(0)
    splits = _splits(inputs)
    output = torch.full_like(inputs.queries[0], float("nan"))
    partial = (*inputs.queries[0].shape[:2], MOST_SPLITS)
    arguments: dict[str, Any] = known(
        module.decode_attention_fwd,
        {
            "o": output,
            "kv_indptr": starts.to(device, torch.int32),
            "kv_indices": slots.to(device),
            "attn_logits": torch.empty((*partial, inputs.head_size), device=device),
            "attn_lse": torch.empty(partial, device=device),
            "num_kv_splits": splits.to(device, torch.int32),
            "max_kv_splits": MOST_SPLITS,
            "sm_scale": inputs.options.scale,
            "k_scale": KEY_SCALE if inputs.quantised else 1.0,
            "v_scale": VALUE_SCALE if inputs.quantised else 1.0,
        },
    )
    if inputs.quantised and "k_scale" not in arguments:
        raise Unavailable("this version has no scales")

    def run_layer(layer: int) -> Tensor:
        keys, values = caches[layer]
        module.decode_attention_fwd(
            q=inputs.queries[layer], k_buffer=keys, v_buffer=values, **arguments
        )
        return output

    return run_layer


def _tokens(inputs: Inputs, layer: int) -> tuple[Tensor, Tensor]:
    """The layer's cache as [slot, Hkv, D]."""
    every = torch.arange(inputs.slab.shape[1], device=inputs.slab.device)
    keys, values = (
        gather(blocks, every).transpose(1, 2).flatten(0, 1).contiguous()
        for blocks in (inputs.keys(layer), inputs.values(layer))
    )
    return keys, values


def _splits(inputs: Inputs) -> Tensor:
    """Pieces of each sequence, so that there are enough for the device: SGLang's own rule
    needs its server, and this is kinder to ragged batches."""
    group = inputs.heads // inputs.kv_heads
    heads = inputs.kv_heads * -(-group // HEADS)
    lengths = torch.tensor(inputs.lengths)
    multiprocessors = 4
    if inputs.slab.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    keys = int(lengths.sum()) * heads // (PROGRAMS * multiprocessors)
    return (-(-lengths // max(keys, LEAST_KEYS))).clamp(1, MOST_SPLITS)


def _module() -> ModuleType:
    return import_first(MODULES)
