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
TOKENS = 48


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
    """The launch, made of tensors without contents, and the tiling of attention itself."""
    if subject.kind == "plan":
        window = 1024 if subject.options else None
        lengths = _empty(torch.int32, subject.size)
        return plan_launch(lengths, 64, 198, subject.size + 396, 1, window)[0], None
    if subject.kind == "move":
        slab = _empty(torch.bfloat16, 64, 100, 2, 8, 16, 128).transpose(0, 1)
        ids = _empty(torch.int64, 3)
        return move_launch(slab, slab, ids, ids), None
    if subject.kind == "write":
        return _write_launch(subject), None
    launches, tiling = _attention_launches(subject)
    return (launches[1], None) if subject.kind == "merge" else (launches[0], tiling)


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _blocks(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer of a block-major cache."""
    dtype = DTYPES[subject.dtype]
    slab = _empty(dtype, 64, 4, 2, KV_HEADS, subject.block_size, subject.size)
    return slab[:, 1, 0], slab[:, 1, 1]


def _scales(subject: Subject) -> torch.Tensor | None:
    return _empty(torch.float32, KV_HEADS) if subject.dtype == "fp8" else None


def _write_launch(subject: Subject) -> Launch:
    rows = _empty(_query_dtype(subject), TOKENS, KV_HEADS, subject.size)
    keys, values = _blocks(subject)
    scales = _scales(subject)
    return write_launch(rows, rows, keys, values, _empty(torch.int64, TOKENS), scales, scales)


def _query_dtype(subject: Subject) -> torch.dtype:
    return torch.bfloat16 if subject.dtype == "fp8" else DTYPES[subject.dtype]


def _attention_launches(subject: Subject) -> tuple[list[Launch], Tiling]:
    """Of a work list that has partials, so that the code for them is compiled too."""
    family, group = DEVICES[subject.target].family, subject.group
    keys, values = _blocks(subject)
    longest = LONGEST.get(subject.kind, 0)
    tiling = decode_tiling(family, group, subject.size, keys.element_size())
    if longest:
        tiling = prefill_tiling(family, group, subject.size, keys.element_size(), longest)
    heads = KV_HEADS * group
    query = _empty(_query_dtype(subject), TOKENS, heads, subject.size)
    options, lse = Options(0.1), None
    if subject.options:
        per_head = _empty(torch.float32, heads)
        options = Options(0.1, 128, 30.0, per_head, per_head)
        lse = _empty(torch.float32, TOKENS, heads)
    options = options._replace(key_scales=_scales(subject), value_scales=_scales(subject))
    items, tiles = _empty(torch.int32, 200, ITEM_COLUMNS), _empty(torch.int32, 64, TILE_COLUMNS)
    tokens = tiling.tokens(group) if longest else 1
    part = Part(WorkList(items, tiles, 160), tiling, tokens, not longest)
    tables = _empty(torch.int32, TOKENS, 512)
    output = torch.empty_like(query)
    return part_launches(output, query, keys, values, tables, part, options, lse), tiling


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
