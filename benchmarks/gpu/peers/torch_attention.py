"""torch's own attention, which knows no blocks: it is given the contiguous cache."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers import Run, Unavailable


def prepare(inputs: Inputs) -> Run:
    """scaled_dot_product_attention, whichever of its kernels it chooses."""
    _check(inputs)
    causal = not inputs.decodes
    if causal and inputs.counts != inputs.lengths:
        raise Unavailable("its causal mask is for whole prompts")

    def run_layer(layer: int) -> Tensor:
        keys, values = inputs.contiguous[layer]
        query = _batched(inputs.queries[layer], inputs)
        output = scaled_dot_product_attention(
            query,
            keys[:, :, : inputs.lengths[0]],
            values[:, :, : inputs.lengths[0]],
            is_causal=causal,
            scale=inputs.options.scale,
            enable_gqa=inputs.heads != inputs.kv_heads,
        )
        return output.transpose(1, 2)

    return run_layer


def prepare_compiled(inputs: Inputs) -> Run:
    """flex_attention, compiled for this shape alone."""
    from torch.nn.attention.flex_attention import create_block_mask

    _check(inputs)
    count, length, mask = inputs.counts[0], inputs.lengths[0], None
    if not inputs.decodes:

        def seen(_sequence: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= query + (length - count)

        mask = create_block_mask(seen, None, None, count, length, device=inputs.slab.device)
    attend = _compiled()

    def run_layer(layer: int) -> Tensor:
        keys, values = inputs.contiguous[layer]
        output: Tensor = attend(
            _batched(inputs.queries[layer], inputs),
            keys[:, :, :length],
            values[:, :, :length],
            block_mask=mask,
            scale=inputs.options.scale,
            enable_gqa=inputs.heads != inputs.kv_heads,
        )
        return output.transpose(1, 2)

    return run_layer


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _batched(query: Tensor, inputs: Inputs) -> Tensor:
    """[T, H, D] as [S, H, queries, D]."""
    return query.view(len(inputs.counts), inputs.counts[0], *query.shape[1:]).transpose(1, 2)


def _check(inputs: Inputs) -> None:
    if not inputs.uniform:
        raise Unavailable("sequences are not of one length")
    if inputs.slab.dtype != inputs.queries[0].dtype:
        raise Unavailable("has one dtype for queries and cache")
