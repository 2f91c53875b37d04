"""Compiles a launch for a GPU that is not here, and reads what the compiler made of it.

Two kinds of assembly are read: NVIDIA's SASS, disassembled from the binary with the
address of each instruction, and AMD's, which the compiler writes with labels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launch import Launch
from kernels.tiling import Family


@dataclass(frozen=True)
class Device:
    """registers, shared_bytes: of a multiprocessor. program_bytes: shared memory that one
    program may have, beside `reserved_bytes` that the device adds to it."""

    target: GPUTarget
    family: Family
    registers: int
    shared_bytes: int
    program_bytes: int
    reserved_bytes: int


KIB = 1 << 10
DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), "ampere", 65536, 164 * KIB, 163 * KIB, KIB),
    "sm_89": Device(GPUTarget("cuda", 89, 32), "ampere", 65536, 100 * KIB, 99 * KIB, KIB),
    "sm_90": Device(GPUTarget("cuda", 90, 32), "hopper", 65536, 228 * KIB, 227 * KIB, KIB),
    "sm_100": Device(GPUTarget("cuda", 100, 32), "hopper", 65536, 228 * KIB, 227 * KIB, KIB),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), "cdna", 131072, 64 * KIB, 64 * KIB, 0),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
DIVISIBLE = [["tt.divisibility", 16]]
# Instructions on matrices; on vectors, where a kernel multiplies without matrix units; loads
# that nothing waits for at once: into shared memory on NVIDIA, 16 bytes wide on AMD; and
# what moves registers out of the way and back.
MATRIX = ("HMMA", "HGMMA", "QGMMA", "UTC*MMA", "v_mfma*")
VECTOR = ("FFMA*", "v_fma*", "v_pk_fma*")
SPILLS = ("STL", "LDL", "scratch_*")
ASYNC_COPIES = ("LDGSTS", "global_load_dwordx4", "buffer_load_dwordx4")


class Instruction(NamedTuple):
    """target: where a branch leads, as an index into the code. ends: never goes on after it."""

    operation: str
    target: int | None
    ends: bool


@dataclass(frozen=True)
class Compiled:
    """registers, spilled_bytes: of one thread. shared_bytes: of a program."""

    device: Device
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    code: tuple[Instruction, ...]

    def count(self, *patterns: str) -> int:
        """How often instructions stand in the code: HGMMA for HGMMA.64x64x16..., UTC*MMA."""
        return count(Counter(each.operation for each in self.code), *patterns)

    def main_loop(self) -> Counter[str]:
        """Instructions of the loop with the most products, by name: the shortest such loop,
        since one that also masks comes beside one that does not. Empty without loops."""
        return max(
            (Counter(self.code[at].operation for at in loop) for loop in _loops(self.code)),
            key=lambda loop: (count(loop, *MATRIX), count(loop, *VECTOR), -loop.total()),
            default=Counter(),
        )

    def programs(self) -> int:
        """How many fit on a multiprocessor at once, as far as registers and memory go."""
        threads = self.warps * self.device.target.warp_size
        # Both vendors give registers out in eights.
        registers = -(-self.registers // 8) * 8 * threads
        memory = self.shared_bytes + self.device.reserved_bytes
        return min(
            self.device.registers // max(registers, 1), self.device.shared_bytes // max(memory, 1)
        )


def count(operations: Counter[str], *patterns: str) -> int:
    """How many of the operations match a pattern."""
    return sum(
        number
        for name, number in operations.items()
        if any(fnmatch(name, pattern) for pattern in patterns)
    )


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile as a launch with these arguments would: hints from values, tensors by dtype.

    Tensors may be on the meta device, and count as 16-byte aligned. Raises what the
    compiler raises, for a target that it does not know among others.
    """
    device = DEVICES[target]
    signature, constants, hints = _describe(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attrs=hints),
        target=device.target,
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    if device.target.backend == "hip":
        registers, spilled, code = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spilled, code = _read_nvidia(compiled.asm["cubin"])
    return Compiled(device, launch.warps, registers, spilled, compiled.metadata.shared, tuple(code))


def _describe(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types of the arguments, values of those that are constants, and what else is known."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    declared = {p.name for p in launch.kernel.params if p.is_constexpr}
    free = {p.name for p in launch.kernel.params if p.do_not_specialize}
    for at, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        is_one = isinstance(value, int) and value == 1 and name not in free
        if name in declared or value is None or is_one:
            signature[name], constants[(at,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], hints[(at,)] = POINTERS[value.dtype], DIVISIBLE
        elif isinstance(value, int):
            signature[name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0 and name not in free:
                hints[(at,)] = DIVISIBLE
        else:
            signature[name] = "fp32"
    return signature, constants, hints


def _read_nvidia(binary: bytes) -> tuple[int, int, list[Instruction]]:
    """Registers, spilled bytes and code. Branches lead to addresses."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-sass", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?\w+)?\s*([A-Z]\w*)([^;]*);", re.MULTILINE)
    instructions = line.findall(report)
    places = {int(address, 16): at for at, (address, *_) in enumerate(instructions)}
    code = []
    for _, predicate, operation, rest in instructions:
        target = None
        ends = operation in ("EXIT", "RET") and not predicate
        if operation == "BRA":
            # The last number; a predicate may also stand before it.
            target = places[int(re.findall(r"0x([0-9a-f]+)", rest)[-1], 16)]
            ends = not predicate and "P" not in rest
        code.append(Instruction(operation, target, ends))
    return found["REG"], found["STACK"] + found["LOCAL"], code


def _read_amd(assembly: str) -> tuple[int, int, list[Instruction]]:
    """Registers, spilled bytes and code. Branches lead to labels."""
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    found = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    spilled = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
    places: dict[str, int] = {}
    words: list[list[str]] = []
    for line in _code_lines(assembly):
        if line.endswith(":"):
            places[line[:-1]] = len(words)
        else:
            words.append(line.split())
    code = [
        Instruction(
            word[0],
            places[word[-1]] if "branch" in word[0] else None,
            word[0] in ("s_branch", "s_endpgm"),
        )
        for word in words
    ]
    return found["vgpr_count"], max(spilled, found["private_segment_fixed_size"]), code


def _code_lines(assembly: str) -> Iterator[str]:
    """Labels and instructions, without directives and comments."""
    for line in assembly.splitlines():
        stripped = line.split(";")[0].strip()
        if re.fullmatch(r"\.LBB\w+:|[a-z]+_\w+( .*)?", stripped):
            yield stripped


def _loops(code: tuple[Instruction, ...]) -> Iterator[set[int]]:
    """The indices of each loop's instructions.

    A search in depth finds the branches that lead back to where it came from. Code that is
    moved out of the way, as compilers do with what they expect to wait, also branches to
    an earlier place, but its place is in the middle of the loop that it came from.
    """
    following = [
        [] if each.ends else [at + 1] if at + 1 < len(code) else [] for at, each in enumerate(code)
    ]
    for at, each in enumerate(code):
        if each.target is not None:
            following[at].append(each.target)
    preceding: list[list[int]] = [[] for _ in code]
    ends: dict[int, list[int]] = {}
    path, seen = {0}, {0}
    stack = [(0, iter(following[0]))]
    while stack:
        at, rest = stack[-1]
        chosen = next(rest, None)
        if chosen is None:
            path.discard(at)
            stack.pop()
            continue
        preceding[chosen].append(at)
        if chosen in path:
            ends.setdefault(chosen, []).append(at)
        elif chosen not in seen:
            path.add(chosen)
            seen.add(chosen)
            stack.append((chosen, iter(following[chosen])))
    for start, branches in ends.items():
        body = {start}
        while branches:
            at = branches.pop()
            if at not in body:
                body.add(at)
                branches += preceding[at]
        yield body
