"""How much of a device's memory the KV cache gets: what nothing else will ever need.

Measured once, after the weights are there: a step as large as steps can be, run over a small cache,
says what steps take for themselves. The cache gets the rest of a share of the whole, is allocated
at once, and nothing grows after that.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_plane.device import Device
from data_plane.kv_cache import KVCache
from data_plane.kv_scales import KVScales, cache_dtype
from data_plane.model import Model
from data_plane.rehearsal import largest_pass
from data_plane.sampler import CHUNK_ELEMENTS

# What the sampler has of a chunk of logits at a time, sorting included: some float64 and int64
# tensors. Nearly twice what was seen on a CPU with a nucleus of 128,000 tokens.
_SAMPLER_BYTES = 14 * 8 * CHUNK_ELEMENTS
# What a captured graph takes beside the tensors that all graphs share.
_GRAPH_BYTES = 8 << 20
# What cuBLAS and cuBLASLt keep for the stream of captures: 32 MiB each from sm_90 on, less before.
_WORKSPACE_BYTES = 64 << 20


def cache_bytes(
    model: Model,
    device: Device,
    *,
    share: float,
    block_size: int,
    step_tokens: int,
    slot_count: int,
    max_length: int,
    buckets: Sequence[int],
    scales: KVScales | None = None,
) -> int:
    """Returns the bytes that the KV cache may take, at least 0.

    Args:
        share: of the device's memory, what this process may use in all, in (0, 1].
        max_length: tokens of one sequence.
        buckets: those of which graphs are captured, in rows.
    """
    free, total = device.memory()
    facts, graphs = model.facts, 0
    largest = _step_bytes(model, device, block_size, step_tokens, scales)
    if buckets:
        # What all graphs share, and where all of them leave their logits.
        graphs = _step_bytes(model, device, block_size, max(buckets), scales)
        graphs += max(buckets) * facts.vocabulary_size * facts.dtype.itemsize
        graphs += _WORKSPACE_BYTES + len(buckets) * _GRAPH_BYTES
    # Tokens of all slots, a copy of some of them while samples fork, and block tables of graphs.
    tables = 4 * slot_count * (2 * max_length + -(-max_length // block_size))
    used = total - free + largest + graphs + tables + _SAMPLER_BYTES
    return max(int(share * total) - used, 0)


def _step_bytes(
    model: Model, device: Device, block_size: int, tokens: int, scales: KVScales | None
) -> int:
    """Bytes that a pass over so many tokens takes beside weights and cache, logits of all in it."""
    facts = model.facts
    # Layers are not compiled for a cache of one block.
    blocks = max(-(-min(tokens, facts.max_model_length) // block_size), 2)
    dtype = cache_dtype(facts.dtype, scales)
    geometry = (facts.local_kv_head_count, block_size, facts.head_size, dtype, device.torch_device)
    cache = KVCache(facts.layer_count, blocks, 0, *geometry, scales)
    return device.peak_bytes(lambda: largest_pass(model, cache, tokens))
