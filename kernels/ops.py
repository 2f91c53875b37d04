"""What the engine calls, and the one place that chooses between torch and Triton.

On a CPU the functions here call plain torch. On a GPU they go through custom operators,
so that torch.compile and a CUDA graph see each as one node. The operators exist for the
CPU too, with the same meaning. Triton is imported when a tensor on a GPU first asks for
it: an engine on a CPU runs without.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from kernels import torch_attention, torch_cache
from kernels.batch import AttentionBatch, upload
from kernels.checks import check_attention, check_move, check_write
from kernels.options import Options


def paged_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries over keys that live in blocks (arXiv 2309.06180, 4.1).

    query: [T, H, D], each head contiguous. key_blocks, value_blocks: [N, Hkv, block_size, D]
    of the query's dtype or float8_e4m3fn, each head contiguous; on a GPU D a multiple of 16
    up to 256, and H / Hkv * D at most 8,192. scale: factor on the scores. sliding_window:
    newest keys that a query sees, itself included. softcap: scores become softcap *
    tanh(scores / softcap). sinks: [H], a score per head that takes part in the softmax and
    brings no value. alibi_slopes: fp32
    [H], each score gets slope * (key position - query position) (arXiv 2108.12409).
    key_scales, value_scales: fp32 [Hkv], what a cache of float8_e4m3fn is multiplied by.
    Returns [T, H, D]; a query without keys gets zeros.

    Raises ValueError, naming the argument, for wrong shapes, dtypes, devices, strides or
    values. Block ids are checked on a CPU; see checks.py for GPUs.
    """
    options = Options(scale, sliding_window, softcap, sinks, alibi_slopes, key_scales, value_scales)
    check_attention(query, key_blocks, value_blocks, batch, options)
    if not query.is_cuda:
        return torch_attention.paged_attention(query, key_blocks, value_blocks, batch, options)
    from kernels import triton_paged

    with _on(query):
        parts = triton_paged.plan(batch, query, key_blocks, sliding_window)
    result: Tensor = torch.ops.quire.paged_attention(
        query,
        key_blocks,
        value_blocks,
        batch.query_starts,
        batch.context_lengths,
        batch.block_tables,
        batch.decode_count,
        *triton_paged.flatten(parts),
        *options,
    )
    return result


def write_cache(
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    *,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Put each token's key and value into the slot that the batch maps it to.

    key, value: [T, Hkv, D], each head contiguous. key_blocks, value_blocks:
    [N, Hkv, block_size, D], same strides. Tokens whose slot is -1 are skipped. key_scales,
    value_scales: fp32 [Hkv], which a cache of float8_e4m3fn is in units of; what exceeds
    its 448 units is cut off. Raises ValueError, naming the argument, for wrong shapes,
    dtypes, devices or strides, and for a slot beyond the cache (on a GPU see checks.py).
    """
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    check_write(key, value, key_blocks, value_blocks, batch, **scales)
    if not key.is_cuda:
        torch_cache.write_cache(key, value, key_blocks, value_blocks, batch, **scales)
        return
    torch.ops.quire.write_cache(
        key, value, key_blocks, value_blocks, batch.slot_mapping, key_scales, value_scales
    )


def layer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """`write_cache` and then `paged_attention`, of the present batch: for code that is compiled.

    blocks: [N, 2, Hkv, block_size, D], keys first; written to. The others as in those two. The
    batch is that of `present` on this thread and no argument, because its columns are as many
    and as long as a step makes them, and compiled code would be compiled for each.
    """
    options = (scale, sliding_window, softcap, sinks, key_scales, value_scales)
    result: Tensor = torch.ops.quire.layer_attention(query, key, value, blocks, *options)
    return result


class _Present(threading.local):
    batch: AttentionBatch | None = None


_present = _Present()


@contextmanager
def present(batch: AttentionBatch) -> Iterator[None]:
    """While this is open, `layer_attention` on this thread is that of the batch."""
    before, _present.batch = _present.batch, batch
    try:
        yield
    finally:
        _present.batch = before


def copy_blocks(slab: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copy blocks within a slab [layer, block, ...], all layers in one launch.

    sources, destinations: int64 [C] block ids, in host memory, where they are checked, or
    on the slab's device. Destinations are distinct and none is a source. Raises ValueError,
    naming the argument, for ids that do not pair up or are out of range.
    """
    check_move(slab, slab, sources, destinations)
    if not slab.is_cuda:
        torch_cache.swap_blocks(slab, slab, sources, destinations)
        return
    torch.ops.quire.copy_blocks(slab, sources, destinations)


def swap_blocks(
    source_slab: Tensor, destination_slab: Tensor, sources: Tensor, destinations: Tensor
) -> None:
    """Copy blocks from one slab [layer, block, ...] to another: a device's and a pinned one.

    sources, destinations: int64 [C] block ids in host memory. Does not wait: what is
    enqueued after it on the present stream comes after it. Raises ValueError, naming the
    argument, for ids that do not pair up or are out of range, or slabs that differ.
    """
    check_move(source_slab, destination_slab, sources, destinations)
    if sources.is_cuda or destinations.is_cuda:
        raise ValueError("sources and destinations must be in host memory")
    if not (source_slab.is_cuda or destination_slab.is_cuda):
        torch_cache.swap_blocks(source_slab, destination_slab, sources, destinations)
        return
    torch.ops.quire.swap_blocks(source_slab, destination_slab, sources, destinations)


# The operators. `work` and `cut` are the step's parts (triton_paged.flatten), which the
# CPU has no use for; it takes the columns instead.
_LIBRARY = torch.library.Library("quire", "DEF")
_LIBRARY.define(
    "paged_attention(Tensor query, Tensor key_blocks, Tensor value_blocks, Tensor query_starts, "
    "Tensor context_lengths, Tensor block_tables, SymInt decode_count, Tensor[] work, "
    "SymInt[] cut, float scale, int? sliding_window, float? softcap, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor? key_scales, Tensor? value_scales) -> Tensor"
)
_LIBRARY.define(
    "layer_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) blocks, float scale, "
    "int? sliding_window, float? softcap, Tensor? sinks, Tensor? key_scales, "
    "Tensor? value_scales) -> Tensor"
)
_LIBRARY.define(
    "write_cache(Tensor key, Tensor value, Tensor(a!) key_blocks, Tensor(b!) value_blocks, "
    "Tensor slot_mapping, Tensor? key_scales, Tensor? value_scales) -> ()"
)
_LIBRARY.define("copy_blocks(Tensor(a!) slab, Tensor sources, Tensor destinations) -> ()")
_LIBRARY.define(
    "swap_blocks(Tensor source_slab, Tensor(a!) destination_slab, Tensor sources, "
    "Tensor destinations) -> ()"
)


def _attention_cpu(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    block_tables: Tensor,
    decode_count: int,
    work: Sequence[Tensor],
    cut: Sequence[int],
    *options: object,
) -> Tensor:
    slots = torch.empty(query.shape[0], dtype=torch.int64)
    columns = (query_starts, context_lengths, block_tables, slots, decode_count)
    batch = AttentionBatch.build(*columns)
    return torch_attention.paged_attention(
        query,
        key_blocks,
        value_blocks,
        batch,
        Options(*options),  # type: ignore[arg-type]
    )


def _attention_cuda(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    block_tables: Tensor,
    decode_count: int,
    work: Sequence[Tensor],
    cut: Sequence[int],
    *options: object,
) -> Tensor:
    from kernels import triton_paged

    parts = triton_paged.unflatten(work, cut)
    with _on(query):
        return triton_paged.attend_parts(
            query,
            key_blocks,
            value_blocks,
            block_tables,
            parts,
            Options(*options),  # type: ignore[arg-type]
        )


def _layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    batch = _present.batch
    if batch is None:
        raise RuntimeError("layer_attention has no present batch")
    keys, values = blocks[:, 0], blocks[:, 1]
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    write_cache(key, value, keys, values, batch, **scales)
    return paged_attention(
        query,
        keys,
        values,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        **scales,
    )


def _attention_fake(query: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _write_cpu(
    key: Tensor,
    value: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    slot_mapping: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    torch_cache.write_slots(
        key, value, key_blocks, value_blocks, slot_mapping, key_scales, value_scales
    )


def _write_cuda(*arguments: Tensor) -> None:
    from kernels import triton_cache

    with _on(arguments[0]):
        triton_cache.write_cache(*arguments)


def _copy_cpu(slab: Tensor, sources: Tensor, destinations: Tensor) -> None:
    torch_cache.swap_blocks(slab, slab, sources, destinations)


def _copy_cuda(slab: Tensor, sources: Tensor, destinations: Tensor) -> None:
    from kernels import triton_cache

    ids = (upload(ids, slab.device) for ids in (sources, destinations))
    with _on(slab):
        triton_cache.copy_blocks(slab, *ids)


def _swap_cuda(*arguments: Tensor) -> None:
    from kernels import triton_cache

    with _on(arguments[0] if arguments[0].is_cuda else arguments[1]):
        triton_cache.swap_blocks(*arguments)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _nothing(*arguments: object) -> None:
    """The fake of an operator that only writes to its arguments."""


for _name, _cpu, _cuda, _fake in (
    ("paged_attention", _attention_cpu, _attention_cuda, _attention_fake),
    ("layer_attention", _layer, _layer, _attention_fake),
    ("write_cache", _write_cpu, _write_cuda, _nothing),
    ("copy_blocks", _copy_cpu, _copy_cuda, _nothing),
    ("swap_blocks", torch_cache.swap_blocks, _swap_cuda, _nothing),
):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"quire::{_name}", _fake, lib=_LIBRARY)
