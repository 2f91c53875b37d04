"""Greedy tokens through Generate equal those of transformers, for every architecture served."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_plane.model import load_model
from tests.models import SERVED, VOCABULARY_SIZE, tiny_model
from tests.stack import Stack, request, running_stack

LENGTHS = (1, 15, 16, 17, 33, 200)
NEW_TOKENS = 24


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randint(8, VOCABULARY_SIZE, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]


def _reference(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts:
        with torch.inference_mode():
            tokens = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        outputs.append(tokens[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("arch", SERVED)
def test_generate_equals_transformers(arch: str, tmp_path: Path) -> None:
    directory = tiny_model(arch, tmp_path)
    prompts = _prompts()
    expected = _reference(directory, prompts)
    model = load_model(directory, dtype="float32")

    async def rounds(stack: Stack) -> None:
        for again in (False, True):
            answers = await stack.together([request(prompt, NEW_TOKENS) for prompt in prompts])
            assert [answer.ids for answer in answers] == expected
            full = stack.engine.sizes.block_size
            for prompt, answer in zip(prompts, answers, strict=True):
                cached = answer.accepted.cached_token_count
                assert cached == (len(prompt) // full * full if again else cached)
            await stack.idle()

    async def main() -> None:
        for block_size in (8, 16, 32):
            async with running_stack(model, block_size=block_size, chunk_tokens=48) as stack:
                await rounds(stack)

    asyncio.run(main())
