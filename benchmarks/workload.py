"""The mixed workload of the throughput benchmark, and the model shape it runs on."""

from __future__ import annotations

import json
import random
from pathlib import Path

# 46 million parameters, bf16.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
}
REQUESTS = 64


def mixed_requests(seed: int = 0) -> list[tuple[list[int], int]]:
    """Returns (prompt, output length) pairs: 16 to 256 and 16 to 128 tokens, uniform."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(10, 8192) for _ in range(rng.randint(16, 256))], rng.randint(16, 128))
        for _ in range(REQUESTS)
    ]


def save_model(directory: Path) -> Path:
    """Saves random weights of the shape, so that every contender loads the same."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{k: v for k, v in SHAPE.items() if k != "architectures"})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    (directory / "workload.json").write_text(json.dumps(mixed_requests()))
    return directory
