"""What the compilers make of the kernels for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# All is compiled when the first test asks for it, which takes long on a busy machine.
pytestmark = pytest.mark.timeout(900)
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
# Which matrix units long prompts must use.
PREFILL_PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
EVERYWHERE = (
    *("decode bf16 d128 g4 b16", "prefill bf16 d128 g4 b16 plain", "chunk bf16 d128 g4 plain"),
    *("decode bf16 d256 g4", "prefill bf16 d256 g4", "decode fp32 d128", "prefill fp32 d128 plain"),
    *("merge d256", "plan s1024 options", "plan s16 plain", "write", "move"),
)
# e4m3, and for the H200 more of what kernels/tiling.py tells apart.
ONLY = [
    *(f"{target} {words}" for target in TARGETS for words in EVERYWHERE),
    *("sm_89 decode fp8 d128 plain", "sm_89 prefill fp8 d128 plain"),
    *("sm_90 decode fp8 plain", "sm_90 prefill fp8 d128", "sm_90 prefill fp8 d256"),
    *("sm_90 decode bf16 d64", "sm_90 prefill bf16 d64", "sm_90 decode fp16", "sm_90 chunk fp8"),
    *("sm_90 prefill bf16 d128 g4 options", "sm_100 decode fp8 d128 plain"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By name. Compiled anew: what an earlier run left behind proves nothing."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sass", "--json", "--only", *ONLY],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in found}


def chosen(rows: dict[str, dict[str, Any]], *words: str) -> list[dict[str, Any]]:
    """Rows whose names have all the words; there must be some."""
    found = [row for name, row in rows.items() if set(words) <= set(name.split())]
    assert found, words
    return found


def test_every_kernel_compiles(rows: dict[str, dict[str, Any]]) -> None:
    assert [row for row in rows.values() if "error" in row] == []
    for target in TARGETS:
        for kind in ("decode", "prefill", "chunk", "merge", "plan", "write", "move"):
            assert chosen(rows, target, kind)


def test_nothing_is_spilled(rows: dict[str, dict[str, Any]]) -> None:
    """Not where it is done for every tile of keys. Around that a few bytes cost nothing."""
    for kind in ("decode", "chunk", "prefill"):
        for row in chosen(rows, kind):
            assert row["loop_spills"] == 0, row
            assert row["spilled_bytes"] <= (0 if kind == "decode" else 128), row
    for kind in ("merge", "plan", "write", "move"):
        for row in chosen(rows, kind):
            assert row["spilled_bytes"] <= 8, row


def test_programs_fit(rows: dict[str, dict[str, Any]]) -> None:
    for row in rows.values():
        assert row["shared_bytes"] <= row["shared_limit"] and row["programs"] >= 1, row


@pytest.mark.parametrize("target", NVIDIA)
def test_memory_is_asked_for_ahead(target: str, rows: dict[str, dict[str, Any]]) -> None:
    """Every tile of keys and values comes by asynchronous copies."""
    for kind in ("decode", "prefill", "chunk"):
        for row in chosen(rows, target, kind):
            assert row["async_copies"] >= 2, row


def test_memory_is_asked_for_ahead_on_amd(rows: dict[str, dict[str, Any]]) -> None:
    for row in chosen(rows, "gfx942", "decode"):
        assert row["async_copies"] >= 4, row


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_units_are_used(target: str, rows: dict[str, dict[str, Any]]) -> None:
    for row in chosen(rows, target, "prefill", "bf16"):
        assert [name.startswith(PREFILL_PRODUCTS[target]) for name in row["products"]] == [True]
    for row in chosen(rows, target, "decode", "bf16"):
        assert sum(row["products"].values()) >= 32


@pytest.mark.parametrize(
    ("words", "most", "registers"),
    [
        ("sm_90 decode bf16 d128 plain", 25, 168),
        ("sm_90 decode fp16 d128 plain", 25, 168),
        ("sm_80 decode bf16 d128 plain", 25, 168),
        ("sm_100 decode bf16 d128 plain", 25, 168),
        ("gfx942 decode bf16 d128 plain", 30, 256),
        ("sm_90 decode bf16 d64 plain", 12, 168),
        ("sm_90 decode bf16 d256 plain", 50, 168),
        ("sm_90 decode bf16 d128 options", 32, 168),
        ("sm_90 decode fp8 d128 plain", 45, 255),
        ("sm_90 prefill bf16 d128 plain", 56, 255),
    ],
)
def test_instructions_for_each_key(
    words: str, most: float, registers: int, rows: dict[str, dict[str, Any]]
) -> None:
    """Where memory could deliver more keys than the instructions can take, they are the limit."""
    (row,) = chosen(rows, *words.split(), "g4", "b16")
    assert 0 < row["instructions_per_key"] <= most, row
    assert row["registers"] <= registers, row


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_decodes_are_as_many_at_once_as_planned(
    target: str, rows: dict[str, dict[str, Any]]
) -> None:
    """The planner cuts the work for so many programs on a multiprocessor."""
    for row in chosen(rows, target, "decode"):
        assert row["programs"] >= row["planned_programs"], row
