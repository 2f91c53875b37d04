"""What a KV cache of fp8 costs in quality, beside the same model with a cache of its own dtype.

``python -m benchmarks.fp8_accuracy``

Runs on the CPU, with the kernels in plain torch. Everything is seeded: any machine brings the same
figures but for what rounding does.

- "demo": the demo model, which is trained, on held-out questions about its subject, half of them
  under its system prompt. What is scored are the tokens of the answers, which it knows by heart.
- "demo, questions": the same model on the second half of each question, which it can only guess.
- "demo, unlike heads": the same function, exactly. The weights of keys and values of one head are
  multiplied by 256 and those of the other divided by it, and those of queries and outputs the
  other way round. A made-up case: it shows what scales are for.
- "random Llama", "random GPT-2": tiny models with random weights, on random tokens. Their logits
  mean nothing, so they say little of quality; they show that the figures are not the demo's alone.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.report import report
from benchmarks.tables import Line, percent, table
from data_plane import demo_model
from data_plane.calibrate import MARGIN, built_in_sequences, measure
from data_plane.demo_model import corpus
from data_plane.kv_cache import KVCache
from data_plane.kv_scales import MOST, KVScales, cache_dtype
from data_plane.model import Model, load_model
from kernels import AttentionBatch
from tests.models import tiny_model

BLOCK_SIZE = 16
QUESTIONS = 96
RANDOM_SEQUENCES = 48
RANDOM_LENGTH = 192
NEW_TOKENS = 64
UNLIKE = 256.0
OWN, BF16 = "own dtype", "own dtype, whole model in bf16"
PER_HEAD, UNROUNDED = "per head", "per head, not rounded"
PER_TENSOR, ONE = "per tensor", "1"
# Factors on the measured scales, to see what room there is on either side.
FACTORS = tuple(2.0**power for power in (-8, -6, -5, -4, -3, 0, 3, 6, 8, 10))


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence of token ids. From `first` on they are predicted and scored."""

    tokens: list[int]
    first: int


@dataclass(frozen=True, slots=True)
class Subject:
    """A model directory and what to ask of it. text: whether its perplexity means anything."""

    name: str
    directory: Path
    samples: list[Sample]
    text: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """logits: fp32 [N, vocabulary] of all scored positions. answers: greedy tokens, by sample."""

    logits: Tensor
    targets: Tensor
    answers: list[list[int]]


class Sequences:
    """Some sequences and their keys and values, in a cache of the model's dtype or of fp8."""

    def __init__(self, model: Model, scales: KVScales | None, count: int, length: int) -> None:
        facts = model.facts
        width = -(-length // BLOCK_SIZE)
        dtype = cache_dtype(facts.dtype, scales)
        geometry = (facts.kv_head_count, BLOCK_SIZE, facts.head_size, dtype, model.device)
        self._model = model
        self._cache = KVCache(facts.layer_count, count * width, 0, *geometry, scales)
        self._tables = torch.arange(count * width, dtype=torch.int32).view(count, width)
        self._lengths = [0] * count

    def run(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Appends some tokens to each sequence; fp32 logits [all of them, vocabulary]."""
        counts = torch.tensor([len(added) for added in tokens])
        starts = torch.tensor(self._lengths)
        pairs = zip(starts, counts, strict=True)
        positions = torch.cat([torch.arange(at, at + n) for at, n in pairs])
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        slots = self._tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE
        batch = AttentionBatch.build(
            torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int(),
            (starts + counts).int(),
            self._tables,
            slots + positions % BLOCK_SIZE,
            decode_count=len(counts) if bool((counts == 1).all()) else 0,
        )
        ids = torch.tensor([token for added in tokens for token in added])
        self._lengths = (starts + counts).tolist()
        every = torch.arange(len(ids))
        return self._model.forward(ids, positions, batch, self._cache, every).float()


def scored(model: Model, scales: KVScales | None, samples: Sequence[Sample]) -> tuple[Tensor, ...]:
    """Logits of all positions that predict a scored token, and these tokens."""
    logits, targets = [], []
    for sample in samples:
        run = Sequences(model, scales, 1, len(sample.tokens)).run([sample.tokens[:-1]])
        logits.append(run[sample.first - 1 :])
        targets += sample.tokens[sample.first :]
    return torch.cat(logits), torch.tensor(targets)


def greedy(model: Model, scales: KVScales | None, samples: Sequence[Sample]) -> list[list[int]]:
    """What the model says by itself after each prompt, up to and with its end token."""
    prompts = [sample.tokens[: sample.first] for sample in samples]
    longest = max(map(len, prompts)) + NEW_TOKENS
    sequences = Sequences(model, scales, len(prompts), longest)
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    tokens = sequences.run(prompts)[ends].argmax(-1)
    columns = [tokens]
    for _ in range(NEW_TOKENS - 1):
        tokens = sequences.run(tokens[:, None].tolist()).argmax(-1)
        columns.append(tokens)
    answers = []
    for answer in torch.stack(columns, 1).tolist():
        stops = [at for at, token in enumerate(answer) if token in model.facts.eos_token_ids]
        answers.append(answer[: stops[0] + 1] if stops else answer)
    return answers


def outcome(model: Model, scales: KVScales | None, samples: Sequence[Sample]) -> Outcome:
    return Outcome(*scored(model, scales, samples), greedy(model, scales, samples))


def common_length(one: list[int], other: list[int]) -> int:
    """How many tokens two answers have in common before they part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def compare(found: Outcome, own: Outcome) -> Line:
    """Figures of one cache beside those of the model's own dtype.

    Logit errors are in units of the standard deviation of a position's logits; the Kullback-
    Leibler divergence is from the next-token distribution of the own dtype to that found, in nats.
    """
    spread = own.logits.std(1).mean()
    errors = (found.logits - own.logits).abs() / spread
    expected, given = own.logits.log_softmax(1), found.logits.log_softmax(1)
    divergence = (expected.exp() * (expected - given)).sum(1)
    loss = torch.nn.functional.cross_entropy(found.logits, found.targets)
    common = list(map(common_length, found.answers, own.answers))
    return {
        "positions": len(found.targets),
        "logit_error_mean": errors.mean().item(),
        "logit_error_max": errors.max().item(),
        "kl_mean": divergence.mean().item(),
        "kl_max": divergence.max().item(),
        "agreement": (found.logits.argmax(1) == own.logits.argmax(1)).float().mean().item(),
        "unchanged": sum(map(list.__eq__, found.answers, own.answers)) / len(common),
        "until_divergence": sum(common) / len(common),
        "answer_tokens": sum(map(len, own.answers)) / len(common),
        "perplexity": loss.exp().item(),
    }


def schemes(model: Model, directory: Path) -> dict[str, KVScales]:
    """The scales to compare, all but the last measured with the engine's built-in text."""
    keys, values = measure(model, built_in_sequences(directory, model.facts))
    whole = (rows.amax(1, keepdim=True).expand_as(rows) for rows in (keys, values))
    return {
        PER_HEAD: KVScales.of_amax(keys, values, MARGIN),
        UNROUNDED: KVScales(*(rows.clamp(min=1e-6) * MARGIN / MOST for rows in (keys, values))),
        PER_TENSOR: KVScales.of_amax(*whole, MARGIN),
        ONE: KVScales(torch.ones_like(keys), torch.ones_like(values)),
    }


def accuracy(subject: Subject) -> list[Line]:
    """One line for each kind of cache."""
    model = load_model(subject.directory, dtype="float32")
    own = outcome(model, None, subject.samples)
    half = load_model(subject.directory, dtype="bfloat16")
    found = {OWN: own, BF16: outcome(half, None, subject.samples)}
    for name, scales in schemes(model, subject.directory).items():
        found[name] = outcome(model, scales, subject.samples)
    lines = []
    for name, one in found.items():
        line = {"model": subject.name, "scales": name, **compare(one, own)}
        if not subject.text:
            line["perplexity"] = None
        lines.append(line)
    return lines


def ranges(subject: Subject) -> list[Line]:
    """One line for each factor on the measured scales."""
    model = load_model(subject.directory, dtype="float32")
    own = outcome(model, None, subject.samples)
    scales = schemes(model, subject.directory)[PER_HEAD]
    lines = []
    for factor in FACTORS:
        scaled = KVScales(scales.keys * factor, scales.values * factor)
        line = {"model": subject.name, "factor": factor}
        line |= compare(outcome(model, scaled, subject.samples), own)
        lines.append(line if subject.text else line | {"perplexity": None})
    return lines


def demo(count: int = QUESTIONS) -> Subject:
    """Held-out questions, every second one under the demo's system prompt."""
    tokenizer = Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
    system = (demo_model.PATH / "system_prompt.txt").read_text().strip()
    asked = [(q, entry.answer) for entry in corpus.load() for q in entry.held_out]
    random.Random(0).shuffle(asked)
    samples = []
    for at, (question, answer) in enumerate(asked[:count]):
        begin = f"<|system|>{system}<|end|>" if at % 2 else ""
        prompt = tokenizer.encode(f"{begin}<|user|>{question}<|end|><|assistant|>").ids
        samples.append(Sample([*prompt, *tokenizer.encode(f"{answer}<|end|>").ids], len(prompt)))
    return Subject("demo", demo_model.PATH, samples, text=True)


def demo_questions(count: int = QUESTIONS) -> Subject:
    """The second half of held-out questions."""
    tokenizer = Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
    asked = [question for entry in corpus.load() for question in entry.held_out]
    random.Random(0).shuffle(asked)
    rows = [tokenizer.encode(f"<|user|>{question}<|end|>").ids for question in asked[:count]]
    samples = [Sample(row, len(row) // 2) for row in rows]
    return Subject("demo, questions", demo_model.PATH, samples, text=True)


def unlike_heads(subject: Subject, folder: Path) -> Subject:
    """The same function with keys and values of its two KV heads far apart in size."""
    config = json.loads((subject.directory / "config.json").read_text())
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    # Powers of two, so that not a bit of any logit changes.
    factors = torch.tensor([UNLIKE, 1 / UNLIKE]).repeat_interleave(config["head_dim"])
    weights = load_file(subject.directory / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weight *= factors[:, None]
    shared = factors.view(2, 1, -1).expand(-1, groups, -1).reshape(-1)
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weight /= shared[:, None]
        elif name.endswith("o_proj.weight"):
            weight /= shared[None, :]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        (folder / file).write_bytes((subject.directory / file).read_bytes())
    return Subject(f"{subject.name}, unlike heads", folder, subject.samples, text=True)


def random_model(kind: str, name: str, folder: Path) -> Subject:
    """A tiny model of the tests, with a longer vocabulary."""
    tiny_model(kind, folder, vocab_size=512)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(8, 512, (RANDOM_SEQUENCES, RANDOM_LENGTH), generator=generator).tolist()
    return Subject(name, folder, [Sample(row, RANDOM_LENGTH // 2) for row in rows], text=False)


def render_accuracy(lines: Sequence[Line]) -> str:
    rows = [
        [
            line["model"],
            line["scales"],
            f"{line['logit_error_mean']:.4f}",
            f"{line['logit_error_max']:.2f}",
            f"{line['kl_mean']:.2g}",
            f"{line['kl_max']:.2g}",
            f"{100 * line['agreement']:.2f}%",
            percent(line["unchanged"]),
            f"{line['until_divergence']:.1f} of {line['answer_tokens']:.1f}",
            "–" if line["perplexity"] is None else f"{line['perplexity']:.4g}",
        ]
        for line in lines
    ]
    header = ["model", "scales", "logit error, mean", "max", "KL, mean", "max", "same top token"]
    return table([*header, "same answers", "tokens until they differ", "perplexity"], rows)


def render_range(lines: Sequence[Line]) -> str:
    rows = [
        [
            line["model"],
            f"{line['factor']:g}" if line["factor"] >= 1 else f"1/{round(1 / line['factor'])}",
            f"{line['logit_error_mean']:.4f}",
            f"{line['kl_mean']:.2g}",
            f"{100 * line['agreement']:.2f}%",
            percent(line["unchanged"]),
        ]
        for line in lines
    ]
    header = ["model", "times the scale", "logit error, mean", "KL, mean", "same top token"]
    return table([*header, "same answers"], rows)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("unlike", "llama", "gpt2")]
        for place in places:
            place.mkdir()
        trained = demo()
        subjects = [
            trained,
            demo_questions(),
            unlike_heads(trained, places[0]),
            random_model("llama", "random Llama", places[1]),
            random_model("gpt2", "random GPT-2", places[2]),
        ]
        lines = []
        for subject in subjects:
            for line in accuracy(subject):
                report("fp8_accuracy", **line)
                lines.append(line)
        print(render_accuracy(lines))
        lines = []
        for subject in subjects[1], subjects[3]:
            for line in ranges(subject):
                report("fp8_range", **line)
                lines.append(line)
        print(render_range(lines))


if __name__ == "__main__":
    main()
