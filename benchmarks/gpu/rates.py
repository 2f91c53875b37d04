"""Tokens a second of requests that all come at once, beside transformers on the same weights.

Everybody gets as many prompts of the same length and brings as many tokens for each, drawn
greedily. Ours are plans of the real scheduler, made before. Of transformers there are `generate`
on one static batch, and its continuous batching, which has a paged cache too. Each is warm when it
is timed: kernels are compiled and graphs captured before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.gpu.cases import MODEL_PEERS, Rate
from benchmarks.gpu.chains import Planner, furnish, run
from benchmarks.gpu.device import Device, describe
from benchmarks.gpu.models import Loaded
from data_plane.engine import Engine, EngineSizes

BLOCK, STEP_TOKENS = 16, 2048
# Small, for the run's time: what a prompt costs counts as much as in a chat of short answers.
PROMPT, OUTPUT = 128, 32
DRY_PROMPT, DRY_OUTPUT = 9, 4
# A peer's blocks: with a fused attention that is not paged, it computes on all of its cache.
PEER_BLOCK = 32
# No token of this id is ever drawn, so that nothing ends early.
NO_TOKEN = -1
# What a peer's requests may take, for the time of the run.
PEER_SECONDS = 15.0


@dataclass(frozen=True)
class Work:
    """The same for everybody. prompts: int64 [batch, length] in host memory."""

    prompts: Tensor
    output: int

    @classmethod
    def of(cls, batch: int, vocabulary: int, *, dry: bool) -> Work:
        length, output = (DRY_PROMPT, DRY_OUTPUT) if dry else (PROMPT, OUTPUT)
        generator = torch.Generator().manual_seed(0)
        return cls(torch.randint(5, vocabulary, (batch, length), generator=generator), output)

    @property
    def batch(self) -> int:
        return self.prompts.shape[0]

    @property
    def length(self) -> int:
        """Of one sequence, in the end."""
        return self.prompts.shape[1] + self.output

    @property
    def tokens(self) -> int:
        """That are counted."""
        return self.batch * self.output


def rate(
    cell: Rate,
    loaded: Loaded,
    device: Device,
    without: Collection[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """without: peers to leave out. say: told the name of each peer before it begins."""
    work = Work.of(cell.batch, loaded.model.facts.vocabulary_size, dry=device.dry)
    # It warns of each generation that has no end token.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    figures: dict[str, Any] = {
        "us": _ours(work, loaded) * 1e6,
        "tokens": work.tokens,
        "prompt": work.prompts.shape[1],
        "output": work.output,
        "peers": {},
        "missing": {},
        "load_seconds": loaded.seconds,
    }
    for name, peer in zip(MODEL_PEERS, (_generate, _continuous), strict=True):
        if name in without:
            continue
        device.release()
        say(name)
        try:
            with loaded.as_transformers_has_it() as module:
                figures["peers"][name] = {"us": peer(module, work, device) * 1e6}
        except Exception as error:
            figures["missing"][name] = describe(error)
            device.recover()
    say("")
    return figures


def _ours(work: Work, loaded: Loaded) -> float:
    """Seconds of the second pass; the first one is as long, and compiles what both need."""
    facts, batch = loaded.model.facts, work.batch
    blocks = batch * (-(-work.length // BLOCK) + 1)
    sizes = EngineSizes(
        block_size=BLOCK,
        block_count=blocks + blocks // 50 + 1,
        host_block_count=0,
        slot_count=batch,
        step_tokens=max(STEP_TOKENS, batch),
        max_length=facts.max_model_length,
    )
    # While prompts come in and sequences end, fewer decode than in the middle.
    buckets = {max(batch // part, 1) for part in (1, 2, 4)}
    engine = Engine(loaded.model, sizes, buckets=sorted(buckets))
    planner = Planner(sizes, facts.vocabulary_size)
    furnish(engine, planner)
    engine.capture()
    for _ in range(2):
        for _ in range(batch):
            planner.submit(work.prompts.shape[1], work.output)
        plans = list(planner.upcoming())
        seconds = run(engine, plans).seconds
    return seconds


def _generate(module: Any, work: Work, device: Device) -> float:
    prompts = work.prompts.to(device.place)

    def generate(count: int) -> int:
        found = module.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=NO_TOKEN,
            pad_token_id=0,
        )
        return int(found.shape[1]) - prompts.shape[1]

    generate(min(4, work.output))
    device.wait()
    began = time.perf_counter()
    if generate(work.output) != work.output:
        raise RuntimeError("it ended early")
    device.wait()
    return time.perf_counter() - began


def _continuous(module: Any, work: Work, device: Device) -> float:
    """One manager serves twice: what it sets up at first is not timed, nor what it ends with."""
    settings, sizes = _settings(work)
    prompts = work.prompts.tolist()
    # Other prompts than those that are timed, of which nothing must be in its cache.
    others = [prompt[::-1] for prompt in prompts[:8]]
    with module.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=sizes, timeout=5
    ) as manager:
        _serve(manager, others, min(4, work.output))
        device.wait()
        began = time.perf_counter()
        _serve(manager, prompts, work.output)
        return time.perf_counter() - began


def _serve(manager: Any, prompts: list[list[int]], count: int) -> None:
    """Returns when all have so many tokens. Raises RuntimeError where some never get them."""
    left = set(manager.add_requests(inputs=prompts, max_new_tokens=count))
    deadline = time.monotonic() + PEER_SECONDS
    while left:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("its loop ended before its requests")
        if time.monotonic() > deadline:
            # Otherwise it goes on with them beside what is measured next.
            for request in left:
                manager.cancel_request(request)
            raise RuntimeError(f"{len(left)} requests take more than {PEER_SECONDS:.0f} s")
        if result is not None and result.is_finished():
            if len(result.generated_tokens) != count:
                raise RuntimeError(result.error or "a request ended early")
            left.discard(result.request_id)


def _settings(work: Work) -> tuple[Any, Any]:
    """Of a generation, and of its cache, whose blocks are named differently by version."""
    from transformers.generation.configuration_utils import (
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    known = {field.name for field in fields(ContinuousBatchingConfig)}
    size = "page_size" if "page_size" in known else "block_size"
    wanted: dict[str, Any] = {
        size: PEER_BLOCK,
        "num_blocks": work.batch * (-(-work.length // PEER_BLOCK) + 1) + 8,
        "max_batch_tokens": max(STEP_TOKENS, work.batch),
        "max_requests_per_batch": work.batch,
    }
    greedy = {"do_sample": False, "eos_token_id": NO_TOKEN, "pad_token_id": 0}
    settings = GenerationConfig(**greedy)  # type: ignore[no-untyped-call]
    chosen = {name: value for name, value in wanted.items() if name in known}
    return settings, ContinuousBatchingConfig(**chosen)
