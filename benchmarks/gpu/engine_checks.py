"""What an engine promises on a GPU, as cells that pass or fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.gpu.cases import EngineCheck
from benchmarks.gpu.chains import Session
from benchmarks.gpu.device import Device
from benchmarks.gpu.models import Loaded
from control_plane.request import SamplingFields
from data_plane import demo_model
from data_plane.engine import Engine, EngineSizes
from data_plane.step_runner import default_buckets

SLOTS = 16
NEW_TOKENS, DRY_NEW_TOKENS = 32, 6
NO_TOKEN = -1


def run(cell: EngineCheck, loaded: Loaded, device: Device) -> dict[str, Any]:
    checks: dict[str, Callable[[Loaded, Device], dict[str, Any]]] = {
        "tokens": _tokens,
        "memory": _memory,
    }
    return checks[cell.what](loaded, device) | {"load_seconds": loaded.seconds}


def _tokens(loaded: Loaded, device: Device) -> dict[str, Any]:
    """Greedy tokens of a trained model are those of transformers, however its steps run.

    Fused layers in graphs are how an engine runs on a GPU unless it is told otherwise. A dry run
    leaves them out: it need not wait for a compiler.
    """
    count = DRY_NEW_TOKENS if device.dry else NEW_TOKENS
    tokenizer = Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
    questions = (demo_model.PATH / "questions.txt").read_text().split("\n")
    prompts = [tokenizer.encode(question).ids for question in questions if question]
    # A long one is computed in several chunks, beside the others' decodes.
    prompts.append([token for prompt in prompts for token in prompt * 3])
    with loaded.as_transformers_has_it() as module:
        expected = [_generate(module, prompt, count, device) for prompt in prompts]
    different: dict[str, int] = {}
    for name in ("eager", "graphs") if device.dry else ("eager", "graphs", "fused"):
        buckets = [] if name == "eager" else default_buckets(SLOTS)
        engine = Engine(loaded.model, _sizes(loaded, 64), buckets=buckets)
        with loaded.layers(fused=name == "fused"):
            found = _greedy(engine, prompts, count)
        different[name] = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
    figures: dict[str, Any] = {"sequences": len(prompts), "tokens": count, "different": different}
    if any(different.values()):
        figures["failed"] = f"sequences that differ from transformers' generate: {different}"
    return figures


def _greedy(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    engine.capture()
    session = Session(engine)
    for at, prompt in enumerate(prompts):
        session.submit(str(at), prompt, max_tokens=count)
    session.run()
    return [session.output[str(at), 0] for at in range(len(prompts))]


def _generate(module: Any, prompt: list[int], count: int, device: Device) -> list[int]:
    ids = torch.tensor([prompt], device=device.place)
    found = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=NO_TOKEN,
        pad_token_id=0,
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


def _memory(loaded: Loaded, device: Device) -> dict[str, Any]:
    """Steps of all kinds take no memory from the driver, once each kind has been seen."""
    counters, steps = [], []
    with loaded.layers(fused=not device.dry):
        engine = Engine(loaded.model, _sizes(loaded, 512), buckets=default_buckets(SLOTS))
        engine.warm_up()
        engine.capture()
        engine.rehearse()
        counters.append(device.memory_counters())
        for _ in range(3):
            steps.append(_mixed(engine, loaded.model.facts.vocabulary_size, device))
            device.wait()
            counters.append(device.memory_counters())
    start, first, *_, last = counters
    grown = {name: last[name] - first[name] for name in last}
    figures: dict[str, Any] = {
        "steps": steps[1:],
        "first_grown": {name: first[name] - start[name] for name in first},
        "grown": grown,
    }
    # Pinned memory for results is taken when a step comes before the last one's copy is done.
    if any(grown[name] > 0 for name in ("reserved_bytes", "retries", "mallocs")):
        figures["failed"] = f"memory was taken after start: {grown}"
    return figures


def _mixed(engine: Engine, vocabulary: int, device: Device) -> int:
    """The same requests each time: chunks, decodes, forks, draws and swaps. Returns the steps."""
    count = DRY_NEW_TOKENS if device.dry else NEW_TOKENS
    session = Session(engine)
    generator = torch.Generator().manual_seed(1)
    kinds: list[dict[str, Any]] = [
        {},
        {"sampling": SamplingFields(temperature=0.8, top_p=0.9, seed=3)},
        {"sampling": SamplingFields(temperature=1.0, top_k=20, seed=4), "sample_count": 3},
        {"sampling": SamplingFields(repetition_penalty=1.2, presence_penalty=0.5)},
        {"sampling": SamplingFields(logit_bias={7: 4.0}, logprob_count=3)},
        {"sampling": SamplingFields(prompt_logprob_count=2)},
    ]
    for at in range(3 * len(kinds)):
        length = 8 + 37 * at % (60 if device.dry else 700)
        prompt = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
        session.submit(f"r{at}", prompt, max_tokens=count, **kinds[at % len(kinds)])
    steps = 0
    while session.step():
        steps += 1
        if steps % 10 == 5:
            for group in session.scheduler.resident_groups[-1:]:
                session.scheduler.preempt(group)
    return steps


def _sizes(loaded: Loaded, step_tokens: int) -> EngineSizes:
    length = min(loaded.model.facts.max_model_length, 1024)
    blocks = SLOTS * length // 16
    return EngineSizes(
        block_size=16,
        block_count=blocks,
        host_block_count=blocks,
        slot_count=SLOTS,
        step_tokens=step_tokens,
        max_length=length,
    )
