"""Launches find out by themselves what their arguments are; without a GPU, up to the launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_by_its_launch_and_only_once(tmp_path: Path) -> None:
    """Steps of other lengths, batch sizes, widths and windows compile nothing again."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.jit_without_gpu"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert compiled["first"] == {"attend": 4, "merge": 2, "plan": 2, "write": 1, "move": 1}
    assert compiled["later"] == compiled["first"]
