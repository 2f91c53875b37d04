"""Takes every kernel through Triton's own launch, up to the launch, for a GPU that is not here.

Compiling ahead of time tells the compiler what each argument is; a launch finds that
out from the arguments themselves. What can go wrong there, a missing tensor or a
compilation for each new length, shows only here or on a GPU. Prints JSON: how often
each kernel was compiled for some steps, and for more steps of other shapes. With the
argument `start`, the former are those that an engine runs at its start, and the latter
are of all kinds.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import ops, triton_attention, triton_cache, triton_paged, triton_plan
from kernels.batch import AttentionBatch
from kernels.launch import Launch
from kernels.options import Options
from kernels.warming import steps_of_all_kinds

KERNELS = {
    "attend": triton_attention.attend,
    "merge": triton_attention.merge,
    "plan": triton_plan._plan,
    "write": triton_cache._write,
    "move": triton_cache._move,
}


class AbsentGPU:
    """A driver of an H200 that cannot run anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu


def compile_only(launch: Launch) -> None:
    launch.kernel.warmup(
        grid=launch.grid, **launch.arguments, num_warps=launch.warps, num_stages=launch.stages
    )


def run_step(
    slab: torch.Tensor, decodes: list[int], chunks: list[tuple[int, int]], width: int
) -> None:
    """One layer of a step: decodes by their lengths, chunks by queries and keys."""
    counts = torch.tensor([0] + [1] * len(decodes) + [queries for queries, _ in chunks])
    tokens = int(counts.sum())
    batch = AttentionBatch.build(
        counts.cumsum(0).to(torch.int32),
        torch.tensor(decodes + [keys for _, keys in chunks], dtype=torch.int32),
        torch.zeros(len(decodes) + len(chunks), width, dtype=torch.int32),
        torch.zeros(tokens, dtype=torch.int64),
        len(decodes),
    )
    run_batch(slab, batch)


def run_batch(slab: torch.Tensor, batch: AttentionBatch) -> None:
    tokens, decodes = batch.slot_mapping.shape[0], batch.decode_count
    keys, values = slab[1, :, 0], slab[1, :, 1]
    query = torch.zeros(tokens, 32, 128, dtype=torch.bfloat16)
    new = torch.zeros(tokens, 8, 128, dtype=torch.bfloat16)
    ops._write_cuda(new, new, keys, values, batch.slot_mapping, None, None)
    columns = (batch.query_starts, batch.context_lengths, batch.block_tables, decodes)
    for options in (
        Options(0.1),
        Options(0.1, 64, 30.0, torch.zeros(32), torch.zeros(32)),
    ):
        parts = triton_paged.plan(batch, query, keys, options.sliding_window)
        flat = triton_paged.flatten(parts)
        ops._attention_cuda(query, keys, values, *columns, *flat, *options)


def start_and_serve(slab: torch.Tensor) -> None:
    for batch in steps_of_all_kinds(300, 16, torch.device("cpu")):
        run_batch(slab, batch)
    before = count()
    for queries in (1, 2, 3, 4, 5, 9, 16, 17, 30, 33, 64, 100, 500):
        for keys in (queries, 3000, 70_000):
            run_step(slab, [], [(queries, keys)], 5000)
            run_step(slab, [20, 5000], [(queries, keys), (1, keys)], 5000)
    for decodes in (1, 7, 32, 33, 100, 128, 200, 257, 300):
        run_step(slab, [decodes] * decodes, [], 300)
        run_step(slab, [9] * decodes, [(decodes, 400)], 300)
    print(json.dumps({"first": before, "later": count()}))


def main() -> None:
    driver.set_active(AbsentGPU())
    Launch.run = compile_only  # type: ignore[method-assign]
    slab = torch.zeros(300, 2, 2, 8, 16, 128, dtype=torch.bfloat16).transpose(0, 1)
    if sys.argv[1:] == ["start"]:
        start_and_serve(slab)
        return
    run_step(slab, [30, 40, 50], [(40, 60), (2000, 2300)], 200)
    run_step(slab, [], [(2000, 2000)], 126)
    ids = torch.tensor([1, 2]), torch.tensor([3, 4])
    ops._copy_cuda(slab, *ids)
    before = count()
    # Other lengths, batches within a power of two, table widths, windows, moves.
    run_step(slab, [1], [], 1)
    run_step(slab, [4000] * 16, [(1500, 4000)], 256)
    run_step(slab, list(range(1, 33)), [(900, 901)] * 3, 77)
    ops._copy_cuda(slab, ids[0][:1], ids[1][:1])
    print(json.dumps({"first": before, "later": count()}))


def count() -> Counter[str]:
    return Counter({name: len(kernel.device_caches[0][0]) for name, kernel in KERNELS.items()})


if __name__ == "__main__":
    main()
