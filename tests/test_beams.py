"""Beam search finds what transformers' own finds, alone, in a crowd and under pressure."""

from __future__ import annotations

import asyncio
import random
from itertools import cycle, product
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_plane.model import load_model
from protos.inference.v1 import inference_pb2 as pb
from tests.models import tiny_model
from tests.stack import Answer, Stack, failure, request, running_stack

WIDTHS, PENALTIES = (2, 4, 6), (0.6, 1.0, 1.4)
STOPPING = {pb.EARLY_STOPPING_HEURISTIC: False, pb.EARLY_STOPPING_FIRST: True}
MAX_TOKENS = 16


def searches(count: int, vocabulary: int) -> list[pb.GenerateRequest]:
    """Requests over all settings in turn, of prompts of 1 to 40 tokens."""
    rng = random.Random(11)
    settings = cycle(product(WIDTHS, PENALTIES, STOPPING))
    messages = []
    for _ in range(count):
        width, penalty, early = next(settings)
        prompt = [rng.randrange(8, vocabulary) for _ in range(rng.randrange(1, 41))]
        search = pb.BeamSearch(width=width, length_penalty=penalty, early_stopping=early)
        output = pb.Output(sample_count=width)
        messages.append(request(prompt, MAX_TOKENS, beam_search=search, output=output))
    return messages


def transformers_beams(model: Any, message: pb.GenerateRequest) -> tuple[list[list[int]], list]:
    """Outputs and scores of the hypotheses, best first."""
    search, ids = message.beam_search, torch.tensor([list(message.token_ids.ids)])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=search.width,
        num_return_sequences=search.width,
        length_penalty=search.length_penalty,
        early_stopping=STOPPING[search.early_stopping],
        max_new_tokens=MAX_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ends = model.generation_config.eos_token_id
    outputs = []
    for row in made.sequences[:, ids.shape[1] :].tolist():
        end = row.index(ends) + 1 if ends in row else len(row)
        outputs.append(row[:end])
    return outputs, made.sequences_scores.tolist()


def others(vocabulary: int) -> list[pb.GenerateRequest]:
    rng = random.Random(12)
    messages = []
    for seed in range(8):
        message = request([rng.randrange(8, vocabulary) for _ in range(20)], 24)
        if seed % 2:
            message.sampling.MergeFrom(pb.Sampling(temperature=1.0, seed=seed))
        message.stopping.ignore_eos = True
        messages.append(message)
    return messages


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_hypotheses_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    directory = tiny_model(architecture, tmp_path)
    model = load_model(directory, dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    messages = searches(20, model.facts.vocabulary_size)
    crowd = others(model.facts.vocabulary_size)
    expected = [transformers_beams(reference, message) for message in messages]

    async def run(stack: Stack) -> list[Answer]:
        answers = await stack.together([*messages, *crowd])
        await stack.idle()
        assert stack.loop.scheduler.swap.pool.used_count == 0
        for answer, (outputs, scores) in zip(answers, expected, strict=False):
            assert [answer.tokens[index] for index in sorted(answer.tokens)] == outputs
            found = [answer.finished[index].score for index in sorted(answer.finished)]
            assert found == pytest.approx(scores, abs=1e-4)
        return answers[len(messages) :]

    async def main() -> None:
        async with running_stack(model) as stack:
            alone = [answer.ids for answer in await run(stack)]
            assert stack.loop.scheduler.totals.preemptions == 0
        for preemption in ("swap", "recompute"):
            async with running_stack(
                model, block_count=26, block_size=8, host_block_count=200, preemption=preemption
            ) as stack:
                assert [answer.ids for answer in await run(stack)] == alone
                totals = stack.loop.scheduler.totals
                assert totals.preemptions > 3
                assert bool(totals.swaps) == (preemption == "swap")

    asyncio.run(main())


def test_what_does_not_go_with_beams_is_refused(llama: Any) -> None:
    search = pb.BeamSearch(width=4)
    bad = {
        "beam_search.width": {"beam_search": pb.BeamSearch(width=17)},
        "beam_search.length_penalty": {"beam_search": pb.BeamSearch(width=2, length_penalty=11)},
        "beam_search.early_stopping": {"beam_search": pb.BeamSearch(width=2, early_stopping=9)},
        "output.sample_count": {"output": pb.Output(sample_count=5)},
        "sampling": {"sampling": pb.Sampling(temperature=1.0)},
        "stopping.stop_strings": {"stopping": pb.Stopping(stop_strings=["a"])},
        "stopping.min_tokens": {"stopping": pb.Stopping(min_tokens=2)},
        "output.logprob_count": {"output": pb.Output(logprob_count=0)},
    }

    async def main() -> None:
        async with running_stack(llama) as stack:
            for field, given in bad.items():
                message = request([9, 10, 11], **({"beam_search": search} | given))
                error = await failure(stack.generate(message))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert error.details().startswith(f"{field}:"), error.details()
            answer = await stack.generate(request([9, 10, 11], beam_search=search))
            assert len(answer.tokens) == 1 and answer.finished[0].HasField("score")
            await stack.idle()

    asyncio.run(main())
