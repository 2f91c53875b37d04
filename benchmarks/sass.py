"""What the compilers make of the kernels, for GPUs that are not here; a table, or JSON.

``python -m benchmarks.sass [--only WORDS ...] [--json]``: lines whose name has all words of
one of the arguments, such as "sm_90 decode d128" or gfx942.

The columns: registers of a thread, its spilled bytes and how many instructions of the
main loop move them, shared KiB of a program, programs that fit on a multiprocessor and
that the tiling counts on; and in the main loop asynchronous copies, matrix products, and
warp instructions for each key of one key/value head. The last is what a decode costs where
memory is not the limit: on an H200 beyond some 110 for bfloat16 heads of 128, 55 for fp8.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

# Both are read when triton is imported. Interpreted kernels cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

from benchmarks.aot import (
    ASYNC_COPIES,
    DEVICES,
    MATRIX,
    SPILLS,
    Compiled,
    compile_launch,
    count,
)
from kernels.launch import Launch
from kernels.options import Options
from kernels.tiling import Tiling, decode_tiling, prefill_tiling
from kernels.triton_cache import move_launch, write_launch
from kernels.triton_paged import Part, part_launches
from kernels.triton_plan import plan_launch
from kernels.work import ITEM_COLUMNS, TILE_COLUMNS, WorkList

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
# Queries of the longest chunk in a step: none, what a speculative step has, a prompt.
LONGEST = {"decode": 0, "chunk": 8, "prefill": 4096}
KV_HEADS = 2


@dataclass(frozen=True)
class Subject:
    """One kernel to compile. size: head size, or sequences of a plan."""

    target: str
    kind: str
    dtype: str = "bf16"
    size: int = 128
    group: int = 4
    block_size: int = 16
    options: bool = False

    @property
    def name(self) -> str:
        size = f"{'s' if self.kind == 'plan' else 'd'}{self.size}"
        words = [self.target, self.kind, self.dtype, size, f"g{self.group}", f"b{self.block_size}"]
        return " ".join([*words, "options" if self.options else "plain"])


@dataclass(frozen=True)
class Row:
    """What is printed of a subject. Without tiling it has no keys and no planned programs."""

    name: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    programs: int
    planned_programs: int | None
    loop_spills: int
    async_copies: int
    products: dict[str, int]
    loop_instructions: int
    instructions_per_key: float | None


def subjects() -> Iterator[Subject]:
    """Every tiling of kernels/tiling.py, with what might make it need more, then the rest."""
    for target in DEVICES:
        dtypes = ("bf16", "fp32", "fp8") if has_fp8(target) else ("bf16", "fp32")
        for kind in LONGEST:
            for dtype in dtypes:
                for head_size in (64, 128, 256):
                    yield Subject(target, kind, dtype, head_size)
                yield Subject(target, kind, dtype, options=True)
            for group, head_size in ((1, 128), (8, 256), (32, 128), (32, 256), (128, 128)):
                yield Subject(target, kind, size=head_size, group=group)
            yield Subject(target, kind, size=80)
            yield Subject(target, kind, "fp16")
        yield Subject(target, "decode", block_size=64)
        yield Subject(target, "decode", group=16)
        yield from small_subjects(target)


def small_subjects(target: str) -> Iterator[Subject]:
    """The kernels beside attention."""
    for head_size in (80, 256):
        yield Subject(target, "merge", size=head_size, options=True)
    for sequences in (16, 1024):
        yield Subject(target, "plan", size=sequences)
        yield Subject(target, "plan", size=sequences, options=True)
    for dtype in ("bf16", "fp8") if has_fp8(target) else ("bf16",):
        yield Subject(target, "write", dtype)
    yield Subject(target, "move")


def has_fp8(target: str) -> bool:
    """Whether Triton converts e4m3 there."""
    return target not in ("sm_80", "gfx942")


def launch_of(subject: Subject) -> tuple[Launch, Tiling | None]:
    """The launch, made of tensors without contents."""
    if subject.kind == "plan":
        lengths = torch.empty(subject.size, dtype=torch.int32, device="meta")
        window = 1024 if subject.options else None
        return plan_launch(lengths, 64, 198, subject.size + 396, 1, window)[0], None
    if subject.kind == "move":
        slab = torch.empty(64, 100, 2, 8, 16, 128, dtype=torch.bfloat16, device="meta")
        ids = torch.empty(3, dtype=torch.int64, device="meta")
        return move_launch(slab.transpose(0, 1), slab.transpose(0, 1), ids, ids), None
    if subject.kind == "write":
        return _write_launch(subject), None
    launches, tiling = _attention_launches(subject)
    return (launches[1], None) if subject.kind == "merge" else (launches[0], tiling)


def _blocks(subject: Subject) -> list[torch.Tensor]:
    """Keys and values of one layer of a block-major cache, on the meta device."""
    shape = (64, 4, 2, KV_HEADS, subject.block_size, subject.size)
    slab = torch.empty(shape, dtype=DTYPES[subject.dtype], device="meta")
    return [slab[:, 1, 0], slab[:, 1, 1]]


def _write_launch(subject: Subject) -> Launch:
    dtype = torch.bfloat16 if subject.dtype == "fp8" else DTYPES[subject.dtype]
    rows = torch.empty(48, KV_HEADS, subject.size, dtype=dtype, device="meta")
    scales = torch.empty(KV_HEADS, device="meta") if subject.dtype == "fp8" else None
    slots = torch.empty(48, dtype=torch.int64, device="meta")
    return write_launch(rows, rows, *_blocks(subject), slots, scales, scales)


def _attention_launches(subject: Subject) -> tuple[list[Launch], Tiling]:
    """Of a work list that has partials, so that the code for them is compiled too."""
    family, group = DEVICES[subject.target].family, subject.group
    dtype = DTYPES[subject.dtype]
    longest = LONGEST.get(subject.kind, 0)
    geometry = (family, group, subject.size, dtype.itemsize)
    tiling = prefill_tiling(*geometry, longest) if longest else decode_tiling(*geometry)
    heads = KV_HEADS * group
    query_dtype = torch.bfloat16 if subject.dtype == "fp8" else dtype
    query = torch.empty(48, heads, subject.size, dtype=query_dtype, device="meta")
    per_head = torch.empty(heads, device="meta")
    options = Options(0.1, 128, 30.0, per_head, per_head) if subject.options else Options(0.1)
    if subject.dtype == "fp8":
        scales = torch.empty(KV_HEADS, device="meta")
        options = options._replace(key_scales=scales, value_scales=scales)
    numbers = {"dtype": torch.int32, "device": "meta"}
    work = WorkList(
        torch.empty(200, ITEM_COLUMNS, **numbers),  # type: ignore[arg-type]
        torch.empty(64, TILE_COLUMNS, **numbers),  # type: ignore[arg-type]
        160,
    )
    part = Part(work, tiling, tiling.tokens(group) if longest else 1, not longest)
    lse = torch.empty(48, heads, device="meta") if subject.options else None
    tables = torch.empty(48, 512, **numbers)  # type: ignore[arg-type]
    output = torch.empty_like(query)
    launches = part_launches(output, query, *_blocks(subject), tables, part, options, lse)
    return launches, tiling


def measure(subject: Subject) -> Row:
    """Raises what the compiler raises."""
    launch, tiling = launch_of(subject)
    compiled = compile_launch(launch, subject.target)
    loop = compiled.main_loop()
    per_key = None
    if tiling is not None:
        per_key = round(loop.total() * compiled.warps / tiling.keys, 2)
    return Row(
        subject.name,
        compiled.warps,
        compiled.registers,
        compiled.spilled_bytes,
        compiled.shared_bytes,
        compiled.device.program_bytes,
        compiled.programs(),
        None if tiling is None else tiling.programs,
        count(loop, *SPILLS),
        count(loop, *ASYNC_COPIES),
        _products(compiled),
        loop.total(),
        per_key,
    )


def _products(compiled: Compiled) -> dict[str, int]:
    """Matrix instructions of the main loop, by name."""
    loop = sorted(compiled.main_loop().items())
    return {name: number for name, number in loop if count(Counter({name: number}), *MATRIX)}


def attempt(subject: Subject) -> dict[str, Any]:
    """A row, or what went wrong."""
    try:
        return asdict(measure(subject))
    except Exception as error:
        return {"name": subject.name, "error": f"{type(error).__name__}: {error}"}


def chosen(only: list[str]) -> list[Subject]:
    """Those whose name has all words of an entry; all of them for no entries."""
    return [
        subject
        for subject in subjects()
        if not only or any(set(words.split()) <= set(subject.name.split()) for words in only)
    ]


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']:<44} {row['error'].splitlines()[0][:100]}"
    products = " ".join(f"{number} {name}" for name, number in row["products"].items())
    planned = row["planned_programs"]
    per_key = row["instructions_per_key"]
    return (
        f"{row['name']:<44} {row['warps']:>5} {row['registers']:>4} "
        f"{row['spilled_bytes']:>6} {row['loop_spills']:>4} "
        f"{row['shared_bytes'] / 1024:>6.1f} {row['programs']:>4}/{planned or '-':<2} "
        f"{row['async_copies']:>6} {'-' if per_key is None else f'{per_key:.2f}':>8}  {products}"
    )


HEADER = (
    f"{'':<44} {'warps':>5} {'regs':>4} {'spills':>6} {'loop':>4} {'KiB':>6} {'fit':>4}/{'':<2} "
    f"{'copies':>6} {'per key':>8}  products"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS")
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    found = chosen(arguments.only)
    if not arguments.json:
        print(HEADER)
    # Forked, since every worker would import torch and triton once more.
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        for row in pool.map(attempt, found):
            print(json.dumps(row) if arguments.json else line(row), flush=True)


if __name__ == "__main__":
    main()
