"""Compiles a launch for a GPU that is not here, and reads what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
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


@dataclass(frozen=True)
class Compiled:
    """registers, spilled_bytes: of one thread. shared_bytes: of a program."""

    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    assembly: str

    def count(self, operation: str) -> int:
        """How often an instruction stands in the assembly; HGMMA counts HGMMA.64x64x16..."""
        return sum(name == operation for name in map(_operation, _instructions(self.assembly)))

    def main_loop(self) -> Counter[str]:
        """Instructions of the loop that has the most matrix products, by name."""
        return max(_loops(self.assembly), key=lambda loop: loop["HMMA"] + loop["HGMMA"])


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile as a launch with these arguments would: hints from values, tensors by dtype.

    Tensors may be on the meta device, and count as 16-byte aligned. Raises what the
    compiler raises, for a target that it does not know among others.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    declared = {p.name for p in launch.kernel.params if p.is_constexpr}
    for at, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if name in declared or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(at,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], hints[(at,)] = POINTERS[value.dtype], DIVISIBLE
        elif isinstance(value, int):
            signature[name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0:
                hints[(at,)] = DIVISIBLE
        else:
            signature[name] = "fp32"
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attrs=hints),
        target=TARGETS[target],
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    if target.startswith("gfx"):
        return _read_amd(launch.warps, compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_nvidia(launch.warps, compiled)


def _read_nvidia(warps: int, compiled: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    spilled = found["STACK"] + found["LOCAL"]
    return Compiled(
        warps, found["REG"], spilled, compiled.metadata.shared, str(compiled.asm["sass"])
    )


def _read_amd(warps: int, assembly: str, shared: int) -> Compiled:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    spilled = 4 * (int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]))
    return Compiled(warps, int(found["vgpr_count"]), spilled, shared, assembly)


def _instructions(assembly: str) -> list[str]:
    """Lines with control bits, a tab and an instruction, in the order of the code."""
    return [line.split("\t", 1)[1].strip() for line in assembly.splitlines() if "\t" in line]


def _operation(instruction: str) -> str:
    words = [word for word in instruction.split() if not word.startswith("@")]
    return words[0].rstrip(";").split(".")[0]


def _loops(assembly: str) -> list[Counter[str]]:
    """Each stretch of code that ends with a branch to its own beginning."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    loops = []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.?L[\w.]*):", line)
        if label:
            labels[label[1]] = len(operations)
        elif "\t" in line:
            instruction = line.split("\t", 1)[1].strip()
            operations.append(_operation(instruction))
            target = re.search(r"\bBRA\S*\s.*?(\.?L[\w.]+)", instruction)
            if target and target[1] in labels:
                loops.append(Counter(operations[labels[target[1]] :]))
    return loops
