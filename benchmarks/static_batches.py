"""A peer: transformers' own generate on static batches of 16, left-padded, in order of arrival.

``python -m benchmarks.static_batches MODEL THREADS`` prints "seconds N" of one warm pass.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

BATCH = 16


def run(model: torch.nn.Module, requests: list[tuple[list[int], int]]) -> float:
    """Returns seconds; each batch runs until its longest output is done."""
    began = time.perf_counter()
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        longest = max(count for _, count in batch)
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                min_new_tokens=longest,
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=0,
            )
    return time.perf_counter() - began


def main() -> None:
    directory, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    requests = json.loads((directory / "workload.json").read_text())
    run(model, requests[:BATCH])
    print(f"seconds {run(model, requests)}")


if __name__ == "__main__":
    main()
