"""Launches find out by themselves what their arguments are; without a GPU, up to the launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def compilations(cache: Path, *arguments: str) -> dict[str, dict[str, int]]:
    """What `tests.jit_without_gpu` prints, from a process that has compiled nothing yet."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.jit_without_gpu", *arguments],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


def test_every_kernel_compiles_by_its_launch_and_only_once(tmp_path: Path) -> None:
    """Steps of other lengths, batch sizes, widths and windows compile nothing again."""
    compiled = compilations(tmp_path)
    assert compiled["first"] == {"attend": 4, "merge": 2, "plan": 2, "write": 1, "move": 1}
    assert compiled["later"] == compiled["first"]


def test_after_the_steps_of_a_start_none_compiles_a_kernel(tmp_path: Path) -> None:
    """Whatever chunks are long, cut or not, and however many sequences decode beside them."""
    compiled = compilations(tmp_path, "start")
    # By two sets of options: decodes and four lengths of chunks; five counts of decodes.
    assert compiled["first"] == {"attend": 10, "merge": 6, "plan": 10, "write": 1, "move": 0}
    assert compiled["later"] == compiled["first"]
