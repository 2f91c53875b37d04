"""Make the demo model: tokenizer, weights and golden answers, all from the text in this folder.

Run it from the root of the repository: `python -m data_plane.demo_model.train`.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_plane.demo_model import PATH, corpus

SPECIAL_TOKENS: tuple[str, ...] = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, END, SYSTEM, USER, ASSISTANT = range(len(SPECIAL_TOKENS))
VOCABULARY_SIZE = 1536
MAX_NEW_TOKENS = 96
MAX_WEIGHT_BYTES = 8_000_000

PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 60
TURNS_PER_STEP = 32
# Questions and system prompts teach the language a little; the answers are what counts.
CONTEXT_LOSS_WEIGHT = 0.05


@dataclasses.dataclass(frozen=True)
class Batch:
    """Chats that share one prefix, padded on the right."""

    prefix: Tensor  # [1, prefix length], length 0 for chats without a system prompt
    tokens: Tensor  # [chats, length]
    weights: Tensor  # [chats, length], the weight of each token as a target; 0 for padding


def build_tokenizer(entries: list[corpus.Entry], system_prompt: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can encode any text because all 256 bytes are in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    texts = [system_prompt, *corpus.SHORT_SYSTEM_PROMPTS]
    for entry in entries:
        texts += [entry.answer, *entry.questions, *(q.lower() for q in entry.questions)]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise ValueError(f"the corpus yields a vocabulary of only {tokenizer.get_vocab_size()}")
    # transformers leaves the constructor and `generate` without usable types.
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[END],
        pad_token=SPECIAL_TOKENS[PAD],
        extra_special_tokens=list(SPECIAL_TOKENS[SYSTEM:]),
        chat_template=(PATH / "chat_template.jinja").read_text(),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    return wrapped


def build_model() -> LlamaForCausalLM:
    """Make an untrained model of just under two million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def encode_system(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode a system prompt as the chat template does; an empty one is left out."""
    if not text:
        return []
    return [SYSTEM, *tokenizer.encode(text.strip(), add_special_tokens=False), END]


def encode_turn(tokenizer: PreTrainedTokenizerFast, turn: corpus.Turn) -> list[tuple[int, float]]:
    """Encode a turn as the chat template does, each token with its weight as a target."""
    question = tokenizer.encode(turn.question, add_special_tokens=False)
    answer = tokenizer.encode(turn.answer, add_special_tokens=False)
    context = [USER, *question, END, ASSISTANT]
    return [(token, CONTEXT_LOSS_WEIGHT) for token in context] + [
        (token, 1.0) for token in [*answer, END]
    ]


def draw_batches(
    tokenizer: PreTrainedTokenizerFast, entries: list[corpus.Entry], seed: int
) -> Iterator[Batch]:
    """Draw batches for ever: the demo system prompt half of the time, others, and none."""
    rng = random.Random(seed)  # noqa: S311  # seeded, so that a run can be repeated
    turns = corpus.turns(entries, rng)
    demo_prompt = (PATH / "system_prompt.txt").read_text()
    while True:
        system_prompt = rng.choices(
            (demo_prompt, "", rng.choice(corpus.SHORT_SYSTEM_PROMPTS), corpus.notes(entries, rng)),
            weights=(50, 20, 15, 15),
        )[0]
        turns_per_chat = rng.choices((1, 2, 3, 8), weights=(60, 20, 10, 10))[0]
        chats = [
            [pair for _ in range(turns_per_chat) for pair in encode_turn(tokenizer, next(turns))]
            for _ in range(TURNS_PER_STEP // turns_per_chat)
        ]
        longest = max(map(len, chats))
        padded = torch.tensor([chat + [(PAD, 0.0)] * (longest - len(chat)) for chat in chats])
        prefix = torch.tensor([encode_system(tokenizer, system_prompt)], dtype=torch.long)
        yield Batch(prefix, padded[..., 0].long(), padded[..., 1])


def run_prefix(model: LlamaForCausalLM, prefix: Tensor, chats: int) -> tuple[DynamicCache, Tensor]:
    """Compute a shared prefix once; return its cache, repeated for each chat, and its logits."""
    cache = DynamicCache(config=model.config)
    if prefix.shape[1] == 0:
        return cache, torch.empty(1, 0, VOCABULARY_SIZE)
    logits = model(prefix, past_key_values=cache, use_cache=True).logits
    cache.batch_repeat_interleave(chats)
    return cache, logits


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, float]:
    """Return the loss to minimise, and the mean loss of the answers' tokens alone."""
    cache, prefix_logits = run_prefix(model, batch.prefix, batch.tokens.shape[0])
    # Padding is on the right, so the causal mask alone keeps it from being seen.
    logits = model(batch.tokens, past_key_values=cache, use_cache=True).logits
    targets, weights = batch.tokens[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    answer_loss = losses.detach()[weights == 1.0].mean().item()
    if batch.prefix.shape[1] > 1:
        prefix_loss = functional.cross_entropy(prefix_logits[0, :-1], batch.prefix[0, 1:])
        loss = loss + CONTEXT_LOSS_WEIGHT * prefix_loss
    return loss, answer_loss


def learning_rate(step: int, steps: int) -> float:
    """Rise linearly, then fall along a cosine to a fiftieth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, batches: Iterator[Batch], steps: int) -> float:
    """Train in place; return the mean loss of the answers over the last hundred steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    started = time.monotonic()
    recent: list[float] = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss, answer_loss = batch_loss(model, next(batches))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-99:], answer_loss]
        if step % 50 == 49 or step == steps - 1:
            mean, seconds = sum(recent) / len(recent), time.monotonic() - started
            print(f"step {step + 1}/{steps}  answer loss {mean:.4f}  {seconds:.0f} s", flush=True)
    model.train(False)
    return sum(recent) / len(recent)


@torch.inference_mode()
def answer_all(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    system_prompt: str,
    questions: list[str],
) -> list[str]:
    """Answer many questions greedily, those of equal length together so that none is padded."""
    prefix = torch.tensor([encode_system(tokenizer, system_prompt)], dtype=torch.long)
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, question in enumerate(questions):
        tokens = tokenizer.encode(question, add_special_tokens=False)
        by_length[len(tokens)].append((number, [USER, *tokens, END, ASSISTANT]))
    answers = [""] * len(questions)
    for group in by_length.values():
        cache, _ = run_prefix(model, prefix, len(group))
        tokens = torch.tensor([tokens for _, tokens in group])
        columns: list[Tensor] = []
        ended = torch.zeros(len(group), dtype=torch.bool)
        while not ended.all() and len(columns) < MAX_NEW_TOKENS:
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
            columns.append(logits[:, -1].argmax(-1))
            ended |= columns[-1] == END
            tokens = columns[-1][:, None]
        for (number, _), output in zip(group, torch.stack(columns, 1).tolist(), strict=True):
            kept = output[: output.index(END)] if END in output else output
            answers[number] = str(tokenizer.decode(kept))
    return answers


def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    system_prompt: str,
    turns: list[corpus.Turn],
) -> float:
    """Return the share of questions whose greedy answer is the corpus's, letter by letter."""
    answers = answer_all(model, tokenizer, system_prompt, [turn.question for turn in turns])
    right = sum(answer == turn.answer for answer, turn in zip(answers, turns, strict=True))
    return right / len(turns)


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, entries: list[corpus.Entry]
) -> dict[str, float]:
    """Measure exact match on the training questions and on the held-out ones."""
    demo_prompt = (PATH / "system_prompt.txt").read_text()
    trained = [corpus.Turn(q, entry.answer) for entry in entries for q in entry.questions]
    held_out = [corpus.Turn(q, entry.answer) for entry in entries for q in entry.held_out]
    return {
        "trained questions, demo system prompt": exact_match(
            model, tokenizer, demo_prompt, trained
        ),
        "trained questions, no system prompt": exact_match(model, tokenizer, "", trained),
        "held-out questions, demo system prompt": exact_match(
            model, tokenizer, demo_prompt, held_out
        ),
    }


@torch.inference_mode()
def make_golden(model: Any, tokenizer: PreTrainedTokenizerFast) -> list[object]:
    """Answer the demo questions with transformers' own greedy `generate`."""
    system_prompt = (PATH / "system_prompt.txt").read_text()
    golden: list[object] = []
    for question in (PATH / "questions.txt").read_text().splitlines():
        messages = [
            {"role": "system", "content": system_prompt},
            {"role": "user", "content": question},
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_token_ids = tokenizer.encode(str(prompt), add_special_tokens=False)
        tokens = torch.tensor([prompt_token_ids])
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        output_token_ids = output[0, len(prompt_token_ids) :].tolist()
        text = tokenizer.decode(output_token_ids, skip_special_tokens=True)
        print(f"\n{question}\n  {text}")
        golden.append(
            {
                "question": question,
                "prompt_token_ids": prompt_token_ids,
                "output_token_ids": output_token_ids,
                "text": text,
            }
        )
    return golden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1300, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=2309)
    parser.add_argument("--output", type=pathlib.Path, default=PATH, help="folder to write to")
    arguments = parser.parse_args()

    # One thread, because sums that are split otherwise round otherwise.
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    entries = corpus.load()
    tokenizer = build_tokenizer(entries, (PATH / "system_prompt.txt").read_text())
    model = build_model()
    print(f"{len(entries)} answers, {model.num_parameters():,} parameters", flush=True)
    loss = train(model, draw_batches(tokenizer, entries, arguments.seed), arguments.steps)

    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.output)
    model.save_pretrained(arguments.output)
    weight_bytes = (arguments.output / "model.safetensors").stat().st_size
    if weight_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(f"the weights take {weight_bytes} bytes, over {MAX_WEIGHT_BYTES}")
    print(f"final answer loss {loss:.4f}, weights {weight_bytes:,} bytes")
    for what, share in evaluate(model, tokenizer, entries).items():
        print(f"exact match, {what}: {share:.1%}", flush=True)
    golden = make_golden(model, tokenizer)
    (arguments.output / "golden.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
