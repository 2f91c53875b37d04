"""Measures how large a model's keys and values become, and makes the scales of an fp8 cache of it.

``python -m data_plane.calibrate --model DIR --text FILE`` writes a file of scales from text like
that which will be served. Without such a file an engine measures at its start, with a short text
of its own: prose, chat, code, tables and several languages.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_plane.kv_cache import KVCache
from data_plane.kv_scales import (
    FILE_NAME,
    KVScales,
    ScaleError,
    read_checkpoint_scales,
    read_scales,
    write_scales,
)
from data_plane.model import Model, ModelError, ModelFacts, load_model
from kernels import AttentionBatch

log = logging.getLogger("data_plane.calibrate")

TEXT = Path(__file__).resolve().parent / "calibration.txt"
# Part borders of that text.
_BORDER = "\n---\n"
# What is served may exceed what is measured by this factor before anything is cut off. Room above
# costs nothing until it is a thousandfold, and what is cut off costs much: docs/fp8.md.
MARGIN = 8.0
# Tokens of one sequence: enough for what a model does with position, little enough for memory.
SEQUENCE_TOKENS = 1024
MOST_TOKENS = 32768
RANDOM_TOKENS = 256
_BLOCK_SIZE = 16
_EVERY_SECONDS = 0.5

Gather = Callable[[Tensor], Tensor]


def find_scales(
    model: Model, directory: Path, file: Path | None = None, gather: Gather | None = None
) -> KVScales:
    """The scales of all heads of a model, from the first of these that there is.

    `file`; kv_scales.json of the model's directory; k_scale and v_scale among its weights; and
    otherwise what is measured now, the same on every start with the same machine and software.
    gather: of a tensor-parallel group, makes [layers, Hkv of all ranks] of this rank's columns;
    each rank calls this then. Raises ScaleError, naming file and tensor, for scales that do not
    fit the model.
    """
    shape = model.facts.layer_count, model.facts.kv_head_count
    beside = directory / FILE_NAME
    chosen = beside if file is None and beside.is_file() else file
    if chosen is not None:
        log.info("scales of the fp8 cache: %s", chosen)
        return read_scales(chosen, *shape)
    scales = read_checkpoint_scales(directory, *shape)
    if scales is not None:
        log.info("scales of the fp8 cache: those among the weights of %s", directory)
        return scales
    started = time.monotonic()
    sequences = built_in_sequences(directory, model.facts)
    scales = KVScales.of_amax(*measure(model, sequences, gather), MARGIN)
    tokens, seconds = sum(map(len, sequences)), time.monotonic() - started
    log.info("scales of the fp8 cache: measured with %d tokens in %.1f s", tokens, seconds)
    return scales


def measure(
    model: Model, sequences: Sequence[Sequence[int]], gather: Gather | None = None
) -> tuple[Tensor, Tensor]:
    """The largest magnitudes among the keys and values of some sequences of token ids.

    Returns fp32 [layers, Hkv] for keys and for values, of all heads where gather (see
    `find_scales`) brings those of other ranks. NaN where there was any.
    """
    facts = model.facts
    keys = torch.zeros((facts.layer_count, facts.local_kv_head_count), device=model.device)
    values = torch.zeros_like(keys)
    total, done, said = sum(map(len, sequences)), 0, time.monotonic()
    for tokens in sequences:
        cache = _computed(model, tokens)
        for layer in range(facts.layer_count):
            for most, blocks in ((keys, cache.keys(layer)), (values, cache.values(layer))):
                most[layer] = torch.maximum(most[layer], blocks.abs().amax((0, 2, 3)))
        done += len(tokens)
        if time.monotonic() - said >= _EVERY_SECONDS:
            said = time.monotonic()
            log.info("measuring keys and values: %d %% of %d tokens", 100 * done // total, total)
    if gather is not None:
        # Where there are more ranks than heads, neighbouring columns are of the same head.
        keys, values = (
            (whole := gather(rows))[:, :: whole.shape[1] // facts.kv_head_count]
            for rows in (keys, values)
        )
    return keys, values


def _computed(model: Model, tokens: Sequence[int]) -> KVCache:
    """A cache in the model's dtype with the keys and values of one sequence, and zeros."""
    facts, count = model.facts, len(tokens)
    blocks = -(-count // _BLOCK_SIZE)
    geometry = (facts.local_kv_head_count, _BLOCK_SIZE, facts.head_size, facts.dtype, model.device)
    cache = KVCache(facts.layer_count, blocks, 0, *geometry)
    cache.slab.zero_()
    positions = torch.arange(count)
    batch = AttentionBatch.build(
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        torch.arange(blocks, dtype=torch.int32)[None],
        positions,
        decode_count=int(count == 1),
        device=model.device,
    )
    ids = torch.tensor(tokens, device=model.device)
    model.forward(ids, positions.to(model.device), batch, cache, positions[-1:].to(model.device))
    return cache


def built_in_sequences(directory: Path, facts: ModelFacts) -> list[list[int]]:
    """What an engine measures with: token ids of a built-in text, and random ones.

    Each part of the text comes by itself, every second one behind a special token, as chats
    begin with one: what stands first attracts attention, and has the largest keys of all. Then
    all parts come in one, for later positions, and last some random ids, for rare tokens. A
    model without a tokenizer gets random ids alone.
    """
    longest = min(SEQUENCE_TOKENS, facts.max_model_length)
    tokenizer = _tokenizer(directory)
    vocabulary, texts = facts.vocabulary_size, []
    if tokenizer is not None:
        vocabulary = min(vocabulary, tokenizer.get_vocab_size())
        parts = TEXT.read_text(encoding="utf-8").split(_BORDER)
        texts = [tokenizer.encode(part).ids for part in parts]
        added = tokenizer.get_added_tokens_decoder()
        special = sorted(at for at, token in added.items() if token.special) or [0]
        whole = [token for text in texts for token in text]
        for at in range(1, len(texts), 2):
            texts[at] = [special[at // 2 % len(special)], *texts[at]]
        texts += cut(whole, longest)
    generator = torch.Generator().manual_seed(0)
    count = (1 if texts else 8, min(RANDOM_TOKENS, longest))
    texts += torch.randint(vocabulary, count, generator=generator).tolist()
    return [text[:longest] for text in texts if text]


def text_sequences(
    text: str, tokenizer: Tokenizer, facts: ModelFacts, most: int
) -> list[list[int]]:
    """Token ids of at most so many tokens of a text, in pieces that begin as prompts do."""
    start = tokenizer.encode("").ids
    longest = min(SEQUENCE_TOKENS, facts.max_model_length) - len(start)
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:most]
    return [start + piece for piece in cut(ids, longest)]


def cut(tokens: list[int], length: int) -> list[list[int]]:
    """Pieces of at most that length."""
    return [tokens[at : at + length] for at in range(0, len(tokens), length)]


def _tokenizer(directory: Path) -> Tokenizer | None:
    path = directory / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_plane.calibrate",
        description="Writes the scales of a model's fp8 KV cache into a file.",
    )
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument(
        "--text", type=Path, help="text like that which will be served; none: a built-in one"
    )
    parser.add_argument(
        "--tokens", type=int, default=MOST_TOKENS, help="tokens of the text that are used, at most"
    )
    parser.add_argument(
        "--output", type=Path, help=f"file to write; none: {FILE_NAME} of the model directory"
    )
    parser.add_argument("--dtype", default="auto", help="of the model, as for the engine")
    parser.add_argument("--device", default="auto", help="cuda if there is one, else cpu")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> Path:
    """Calibrates as the command's arguments say; returns the file that was written.

    Raises ModelError, ScaleError or OSError.
    """
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = _tokenizer(arguments.model)
    model = load_model(arguments.model, dtype=arguments.dtype, device=device)
    if arguments.text is None:
        text, sequences = TEXT, built_in_sequences(arguments.model, model.facts)
    elif tokenizer is None:
        raise ModelError(f"{arguments.model} has no tokenizer.json to read a text with")
    else:
        text = arguments.text
        content = text.read_text(encoding="utf-8")
        sequences = text_sequences(content, tokenizer, model.facts, arguments.tokens)
    if not sequences:
        raise ScaleError(f"{text} has no text to measure with")
    scales = KVScales.of_amax(*measure(model, sequences), MARGIN)
    output: Path = arguments.output or arguments.model / FILE_NAME
    made = {
        "tokens": sum(map(len, sequences)),
        "text": text.name,
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "model_fingerprint": model.facts.fingerprint,
        "margin": MARGIN,
    }
    write_scales(output, scales, made)
    log.info("wrote %s, measured with %d tokens", output, made["tokens"])
    return output


def main() -> int:
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    warnings.simplefilter("ignore")
    try:
        run(_arguments())
    except (ModelError, ScaleError, OSError, UnicodeDecodeError) as error:
        print(f"cannot calibrate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
