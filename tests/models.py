"""Tiny random models and a tokenizer for tests: made in milliseconds, saved as checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

EOS_TOKEN_ID = 7
VOCABULARY_SIZE = 128
# Wide enough that next tokens vary and the best logit leads by far more than rounding.
WEIGHT_DEVIATION = 0.25

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MULTI_HEAD = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_HEAD_SIZE = {"head_dim": 16}

# model_type and config of each architecture; those below the line are to be refused.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "opt": ("opt", {**_MULTI_HEAD, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY_SIZE,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 512,
        },
    ),
    "qwen3": ("qwen3", {**_LLAMA, **_HEAD_SIZE}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": None}),
    "mistral-window": ("mistral", {**_LLAMA, "sliding_window": 24}),
    "gpt_neox": ("gpt_neox", _MULTI_HEAD),
    "gemma": ("gemma", {**_LLAMA, **_HEAD_SIZE, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {**_LLAMA, **_HEAD_SIZE, "sliding_window": 24, "query_pre_attn_scalar": 16}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
    ),
    "phi": ("phi", _MULTI_HEAD),
    "gpt_oss": (
        "gpt_oss",
        {**_LLAMA, **_HEAD_SIZE, "sliding_window": 24, "num_local_experts": 4}
        | {"num_experts_per_tok": 2},
    ),
    # ---
    "nemotron": ("nemotron", _LLAMA),
    "diffllama": ("diffllama", _LLAMA),
    "bert": ("bert", _MULTI_HEAD),
    "llama4": (
        "llama4_text",
        {**_LLAMA, "intermediate_size_mlp": 32, "num_local_experts": 2},
    ),
    "falcon": ("falcon", _MULTI_HEAD),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    ),
    "mamba": (
        "mamba",
        {"vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
}
# Why each is refused, as a pattern of the message.
REFUSED = {
    "falcon": "attention interface",
    "bloom": "attention interface",
    "mamba": "recurrent",
    "nemotron": "keyword arguments",
    "diffllama": "4 attention calls",
    "bert": "neither causal nor a sliding window",
    "llama4": "chunked_attention",
}
SERVED = tuple(arch for arch in _CONFIGS if arch not in REFUSED)


def tiny_model(arch: str, directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Save a random model of a `_CONFIGS` architecture into the directory and return it.

    overrides replace config fields. The same seed gives the same weights.
    """
    kind, fields = _CONFIGS[arch]
    tokens = {"bos_token_id": 1, "eos_token_id": EOS_TOKEN_ID, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **(fields | tokens | overrides))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # Norms keep their scale, which would otherwise silence whole layers.
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=WEIGHT_DEVIATION)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    return directory


def add_tokenizer(directory: Path) -> Path:
    """Write a byte-level BPE tokenizer.json and a chat template for the model in a directory.

    Its vocabulary has the size of the model's: eight special tokens (the end of
    sequence among them), an alphabet and merges. Below 264 not every byte has a
    token: the alphabet is printable ASCII and newline, and other bytes are dropped.
    """
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet) + 8:
        alphabet = [letter for letter in alphabet if letter.isascii()] + ["Ġ", "Ċ"]
    special = [f"<|special_{at}|>" for at in range(8)]
    special[0], special[1], special[EOS_TOKEN_ID] = "<pad>", "<s>", "</s>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words = (
        f"{first}{second}ing the quick brown fox {first * 2}"
        for first in "abcdefghijklmnop"
        for second in "aeiourstlnm"
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "chat_template.jinja").write_text(template)
    return directory
