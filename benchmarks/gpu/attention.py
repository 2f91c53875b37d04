"""Decodes and prefills of one layer: ours, ours without blocks, and peers, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import reference
from benchmarks.gpu.cases import Decode, Prefill
from benchmarks.gpu.device import Device, Timing, describe
from benchmarks.gpu.inputs import (
    DTYPES,
    TABLE_MULTIPLE,
    Inputs,
    empty_slab,
    make_inputs,
    make_options,
    sequences,
)
from benchmarks.gpu.peers import Peer, Run, Unavailable
from kernels import triton_paged
from kernels.launch import Launch
from kernels.tiling import Tiling, decode_tiling, family_of, prefill_tiling
from kernels.triton_paged import Part
from kernels.triton_plan import plan_launch
from kernels.work import ITEM_COLUMNS, TILE_COLUMNS, WorkList

OURS, CONTIGUOUS = "quire", "contiguous"
# Contiguous caches of ragged batches are as wide as the longest sequence: not at any price.
CONTIGUOUS_SHARE = 0.3
# What a peer's result may differ from ours: each has its own rounding.
PEER_FACTOR = 2.0
# Queries of a chunk that are compared with the reference, which is slow.
COMPARED_QUERIES = 12


def run(
    cell: Decode | Prefill,
    device: Device,
    peers: Mapping[str, Peer],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """say: told the name of each peer before it is first called."""
    inputs = make_inputs(cell, device)
    part = plan(inputs, tiling_of(inputs, device))
    ours = contender(inputs, part)
    expected = ours(0).clone()
    device.wait()
    runs: dict[str, Run] = {OURS: ours}
    missing: dict[str, str] = {}
    errors: dict[str, float] = {}
    if inputs.contiguous_bytes < CONTIGUOUS_SHARE * device.memory_bytes:
        runs[CONTIGUOUS] = contender(inputs, part, contiguous=True)
        errors[CONTIGUOUS] = reference.error(runs[CONTIGUOUS](0), expected)
    else:
        missing[CONTIGUOUS] = "would take too much memory"
    for name, peer in peers.items():
        say(name)
        try:
            runs[name], errors[name] = _prepare(peer, inputs, expected, device)
        except Unavailable as reason:
            missing[name] = str(reason)
        except Exception as error:
            missing[name] = describe(error)
            device.recover()
    say("")
    figures = _compare(runs, inputs, device, missing)
    figures["plan_us"] = _plan_time(inputs, part.tiling, device)
    for name, found in figures["peers"].items():
        found["error"] = errors[name]
    return figures | _correctness(inputs, expected, errors.get(CONTIGUOUS, 0.0), device)


def tiling_of(inputs: Inputs, device: Device) -> Tiling:
    """The one that the engine would take."""
    return _tiling(
        inputs.heads // inputs.kv_heads,
        inputs.head_size,
        inputs.slab.element_size(),
        None if inputs.decodes else max(inputs.counts),
        device,
    )


def _tiling(
    group: int, head_size: int, itemsize: int, longest: int | None, device: Device
) -> Tiling:
    family = family_of(device.place)
    if longest is None:
        return decode_tiling(family, group, head_size, itemsize)
    return prefill_tiling(family, group, head_size, itemsize, longest)


def plan(inputs: Inputs, tiling: Tiling) -> Part:
    if inputs.decodes:
        return triton_paged.plan_decode_part(inputs.batch, tiling, inputs.kv_heads, None)
    group = inputs.heads // inputs.kv_heads
    return triton_paged.plan_chunk_part(inputs.batch, tiling, group, inputs.kv_heads, None)


def contender(inputs: Inputs, part: Part, *, contiguous: bool = False) -> Run:
    """Our kernel on one layer, with or without blocks."""
    output = torch.empty_like(inputs.queries[0])
    tables = None if contiguous else inputs.batch.block_tables

    def run_layer(layer: int) -> Tensor:
        keys, values = (
            inputs.contiguous[layer] if contiguous else (inputs.keys(layer), inputs.values(layer))
        )
        query = inputs.queries[layer]
        triton_paged.run_part(output, query, keys, values, tables, part, inputs.options)
        return output

    output.fill_(float("nan"))
    return run_layer


def _prepare(peer: Peer, inputs: Inputs, expected: Tensor, device: Device) -> tuple[Run, float]:
    """Raises ValueError for a peer whose result is not ours."""
    run_layer = peer.prepare(inputs)
    result = run_layer(0)
    device.wait()
    limit = reference.tolerance(inputs.queries[0].dtype, inputs.slab.dtype) * PEER_FACTOR
    if inputs.quantised:
        limit = max(limit, peer.quantised_tolerance)
    error = reference.error(result.reshape(expected.shape), expected)
    if not error < limit:
        raise ValueError(f"its result differs from ours by {error:.2g}, allowed are {limit:.2g}")
    return run_layer, error


def _compare(
    runs: Mapping[str, Run], inputs: Inputs, device: Device, missing: dict[str, str]
) -> dict[str, Any]:
    calls = {
        name: [partial(run_layer, layer) for layer in range(inputs.layers)]
        for name, run_layer in runs.items()
    }
    timings, failures = device.measure(calls)
    if OURS in failures:
        raise RuntimeError(failures[OURS])
    missing |= failures
    ours = timings.pop(OURS)
    contiguous = timings.pop(CONTIGUOUS, None)
    return {
        **_figures(ours),
        "contiguous_us": contiguous.median if contiguous else None,
        "kv_bytes": inputs.kv_bytes,
        "operations": inputs.operations,
        "layers": inputs.layers,
        "peers": {name: _figures(timing) for name, timing in timings.items()},
        "missing": missing,
    }


def _figures(timing: Timing) -> dict[str, Any]:
    return {"us": timing.median, "low": timing.low, "high": timing.high}


def _plan_time(inputs: Inputs, tiling: Tiling, device: Device) -> float:
    """Decodes are planned on the device, chunks on the host; both once a step."""
    make = partial(plan, inputs, tiling)
    if not inputs.decodes:
        return device.time_host(make, 5).median
    timings, failures = device.measure({"plan": [make]}, 0.05)
    if failures:
        raise RuntimeError(failures["plan"])
    return timings["plan"].median


def _correctness(
    inputs: Inputs, expected: Tensor, contiguous_error: float, device: Device
) -> dict[str, Any]:
    """Of some queries of the shortest, the longest and the last sequence."""
    limit = reference.tolerance(inputs.queries[0].dtype, inputs.slab.dtype)
    order = sorted(range(len(inputs.lengths)), key=inputs.lengths.__getitem__)
    starts = inputs.batch.host.query_starts.tolist()
    errors = [contiguous_error]
    for sequence in sorted({order[0], order[-1], len(order) - 1}):
        count, length = inputs.counts[sequence], inputs.lengths[sequence]
        chosen = torch.linspace(0, count - 1, min(count, COMPARED_QUERIES)).round().long()
        rows = (chosen + starts[sequence]).to(device.place)
        keys, values = inputs.sequence(0, sequence)
        position = (chosen + (length - count)).to(device.place)
        query = inputs.queries[0].index_select(0, rows)
        wanted, _ = reference.attention(query, keys, values, position, inputs.options)
        errors.append(reference.error(expected.index_select(0, rows), wanted))
    figures: dict[str, Any] = {"error": max(errors, key=lambda error: (error != error, error))}
    if not figures["error"] < limit:
        figures["failed"] = f"error {figures['error']:.2g}, allowed are {limit:.2g}"
    return figures


def launches(cell: Decode | Prefill, device: Device) -> list[Launch]:
    """What the cell will launch, for tensors without memory."""
    lengths, counts = sequences(cell)
    cache, meta, group = DTYPES[cell.cache], torch.device("meta"), cell.heads // cell.kv_heads
    decodes = max(counts) == 1
    longest = None if decodes else max(counts)
    tiling = _tiling(group, cell.head_size, cache.itemsize, longest, device)
    columns = -(-max(lengths) // cell.block)
    width = -(-columns // TABLE_MULTIPLE) * TABLE_MULTIPLE
    query = torch.empty(
        (sum(counts), cell.heads, cell.head_size), dtype=DTYPES[cell.query], device=meta
    )
    paged = empty_slab((3, 2, cell.kv_heads, cell.block, cell.head_size), cell.layout, cache, meta)
    whole = torch.empty(
        (len(counts), cell.kv_heads, columns * cell.block, cell.head_size),
        dtype=cache,
        device=meta,
    )
    tables = torch.empty((len(counts), width), dtype=torch.int32, device=meta)
    options, part = make_options(cell, device), meta_part(tiling, group, decodes)
    found = []
    for keys, table in ((paged[0, :, 0], tables), (whole, None)):
        found += triton_paged.part_launches(query, query, keys, keys, table, part, options)
    if decodes:
        resident = triton_paged.resident_items(tiling, cell.kv_heads, device.place)
        capacity = len(counts) + 2 * resident
        arguments = (tiling.keys, resident, capacity, tiling.partial_cost, None)
        found.append(plan_launch(tables[:, 0], *arguments)[0])
    return found


def meta_part(tiling: Tiling, group: int, decodes: bool) -> Part:
    """A part whose work list has no memory."""
    items, tiles = (
        torch.empty((2, columns), dtype=torch.int32, device="meta")
        for columns in (ITEM_COLUMNS, TILE_COLUMNS)
    )
    tokens = 1 if decodes else tiling.tokens(group)
    return Part(WorkList(items, tiles, 2), tiling, tokens, decodes)
