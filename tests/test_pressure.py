"""Every kind of request gives the same tokens when its blocks are taken away and given back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_plane.model import Model
from protos.inference.v1 import inference_pb2 as pb
from tests.stack import Answer, Stack, request, running_stack


def every_kind() -> list[pb.GenerateRequest]:
    """Requests of 30 to 90 tokens of prompt and 40 of output, four of each kind."""
    rng = random.Random(3)
    kinds = (
        {},
        {"sampling": pb.Sampling(temperature=1.1, top_p=0.9, seed=5)},
        {"sampling": pb.Sampling(repetition_penalty=1.3, presence_penalty=0.5)},
        {"sampling": pb.Sampling(temperature=0.8, frequency_penalty=0.7, seed=6)},
        {"sampling": pb.Sampling(temperature=0.9, top_k=40, seed=7, logit_bias={30: 4.0})},
        {"output": pb.Output(logprob_count=3)},
        {"output": pb.Output(prompt_logprob_count=2)},
        {"sampling": pb.Sampling(temperature=1.2, seed=8), "output": pb.Output(sample_count=3)},
        {"stopping": pb.Stopping(min_tokens=20, stop_token_ids=list(range(100, 116)))},
    )
    messages = []
    for kind in kinds * 4:
        prompt = [rng.randrange(8, 384) for _ in range(rng.randrange(30, 90))]
        message = request(prompt, 40, **kind)
        message.stopping.ignore_eos = True
        messages.append(message)
    stops = request("pressure", 40, stopping=pb.Stopping(stop_strings=["e", "qu"]))
    return [*messages, stops]


def scores(answer: Answer) -> Iterator[float]:
    """Every log-probability; computed again in other chunks, its last bits may differ."""
    for sample in sorted(answer.logprobs):
        yield from (entry.logprob for entry in answer.logprobs[sample])
    yield from (entry.logprob for entry in answer.prompt_logprobs)


async def run(stack: Stack) -> list[Answer]:
    answers = await stack.together(every_kind())
    await stack.idle()
    assert stack.loop.scheduler.swap.pool.used_count == 0
    return answers


@pytest.mark.parametrize(("preemption", "host_blocks"), [("swap", 200), ("recompute", 0)])
def test_swaps_and_recomputing_change_no_token(
    llama: Model, llama_directory: Path, preemption: str, host_blocks: int
) -> None:
    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            alone = await run(stack)
            assert stack.loop.scheduler.totals.preemptions == 0
        async with running_stack(
            llama,
            directory=llama_directory,
            block_count=30,
            host_block_count=host_blocks,
            preemption=preemption,
        ) as stack:
            pressed = await run(stack)
            totals = stack.loop.scheduler.totals
        assert totals.preemptions > 5
        # Who is preempted before its prompt is computed has nothing that is worth swapping.
        swaps = totals.swaps
        assert swaps > totals.preemptions / 2 if preemption == "swap" else swaps == 0
        # A sample may end by a result that was in flight, and does not come back then.
        assert totals.swapped_in_blocks <= totals.swapped_out_blocks
        assert (totals.swapped_out_blocks > 0) == (preemption == "swap")
        for one, other in zip(pressed, alone, strict=True):
            assert one.tokens == other.tokens and one.texts == other.texts
            assert [*scores(one)] == pytest.approx([*scores(other)], abs=1e-4)
            assert {index: end.reason for index, end in one.finished.items()} == {
                index: end.reason for index, end in other.finished.items()
            }

    asyncio.run(main())
