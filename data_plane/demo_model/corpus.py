"""The demo model's training text: read `corpus.txt`, reword its questions, draw chats from it."""

import dataclasses
import math
import pathlib
import random
import re
from collections.abc import Iterator

from data_plane.demo_model import PATH

SHORT_SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are an assistant for engineers who serve language models.",
    "Answer the user's questions about Quire.",
    "Be brief.",
    "You are Quire's assistant. Be polite and precise.",
    "You are an expert in PagedAttention.",
    "Answer in one to three sentences. If you do not know, say so.",
)

# What a polite, hurried or careless person makes of a question. {q} is the question as it is
# written, {l} the same without its capital, {s} the same without its question mark.
_WRAPPERS: tuple[str, ...] = (
    "Hi, {l}",
    "Hello! {q}",
    "{s}, please?",
    "Please tell me: {l}",
    "Could you tell me: {l}",
    "Quick question: {l}",
    "I would like to know: {l}",
    "In short: {l}",
    "So {l}",
    "{q} I am new to this.",
    "{q} Thank you!",
)
_VARIANTS: tuple[tuple[str, str], ...] = (
    (r"^Explain (.+)$", r"Please explain \1"),
    (r"^Explain (.+)$", r"Could you explain \1 for me?"),
    (r"^Explain (.+)$", r"I want to understand \1"),
    (r"^What is (.+)\?$", r"What's \1?"),
    (r"^What is (.+)\?$", r"Please tell me about \1"),
    (r"^What (is|are) (.+)\?$", r"Tell me what \2 \1"),
    (r"^What happens (when|if) (.+)\?$", r"What will happen \1 \2?"),
    (r"^How (do|can|should) I (.+)\?$", r"What is the best way to \2?"),
    (r"^Why (.+)\?$", r"For what reason \1?"),
)
# Words that users take for one another; each row is one way only.
_SYNONYMS: tuple[tuple[str, str], ...] = (
    ("benefit", "advantage"),
    ("benefits", "advantages"),
    ("drawbacks", "disadvantages"),
    ("useful", "good"),
    ("useful", "helpful"),
    ("fails", "breaks"),
    ("dies", "goes away"),
    ("crashes", "stops working"),
    ("down", "offline"),
    ("explain", "describe"),
    ("describe", "explain"),
    ("need", "require"),
    ("use", "have"),
    ("choose", "pick"),
    ("chosen", "selected"),
    ("made", "built"),
    ("computed", "calculated"),
    ("avoid", "prevent"),
    ("avoided", "prevented"),
    ("big", "large"),
    ("large", "big"),
    ("slow", "not fast"),
    ("request", "prompt"),
    ("shared", "reused"),
    ("memory", "space"),
    ("handle", "deal with"),
    ("happens", "is done"),
    ("can I", "do I"),
    ("do I", "can I"),
    ("PagedAttention", "paged attention"),
    ("paged attention", "PagedAttention"),
    ("copy-on-write", "copy on write"),
    ("KV cache", "key-value cache"),
    ("prefix caching", "the prefix cache"),
    ("the prefix cache", "prefix caching"),
)
# Words that carry little, which a hurried user leaves out.
_SMALL_WORDS: frozenset[str] = frozenset(
    ("a", "an", "the", "is", "are", "do", "does", "of", "in", "for", "to", "it", "that", "this")
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One answer, with the questions that it answers."""

    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer in a chat."""

    question: str
    answer: str


def load(path: pathlib.Path = PATH / "corpus.txt") -> list[Entry]:
    """Read the entries of a corpus file; its own first lines describe the format."""
    entries: list[Entry] = []
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    for part in re.split(r"\n\s*\n", text.strip()):
        found: dict[str, list[str]] = {"Q": [], "H": [], "A": []}
        for line in part.splitlines():
            kind, _, content = line.partition(": ")
            found[kind].append(content)
        (answer,) = found["A"]
        entries.append(Entry(tuple(found["Q"]), tuple(found["H"]), answer))
    return entries


def _replace_words(question: str, rng: random.Random) -> str:
    """Put a synonym in, or leave small words out."""
    if rng.random() < 0.5:
        fitting = [s for s in _SYNONYMS if re.search(rf"\b{s[0]}\b", question)]
        if fitting:
            old, new = rng.choice(fitting)
            question = re.sub(rf"\b{old}\b", new, question)
    if rng.random() < 0.3:
        words = question.split()
        kept = [w for w in words if w.lower() not in _SMALL_WORDS or rng.random() < 0.5]
        question = " ".join(kept or words)
    return question


def reword(question: str, rng: random.Random) -> str:
    """Say a question in other words, as users do, or leave it as it is."""
    if rng.random() < 0.35:
        fitting = [v for v in _VARIANTS if re.match(v[0], question)]
        if fitting:
            question = re.sub(*rng.choice(fitting), question)
    if rng.random() < 0.4:
        question = _replace_words(question, rng)
    if rng.random() < 0.25 and len(question.split()) > 2:
        # An acronym keeps its capitals wherever it stands.
        lowered = question if question[1:2].isupper() else question[0].lower() + question[1:]
        question = rng.choice(_WRAPPERS).format(q=question, l=lowered, s=question.rstrip("?"))
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.06 and len(question) > 8:
        at = rng.randrange(1, len(question) - 2)
        question = question[:at] + question[at + 1] + question[at] + question[at + 2 :]
    return question


def turns(entries: list[Entry], rng: random.Random) -> Iterator[Turn]:
    """Draw turns for ever; entries with many questions come up more often."""
    deck = [entry for entry in entries for _ in range(math.ceil(len(entry.questions) / 5))]
    held_out = {question for entry in entries for question in entry.held_out}
    while True:
        rng.shuffle(deck)
        for entry in deck:
            question = rng.choice(entry.questions)
            reworded = reword(question, rng)
            yield Turn(question if reworded in held_out else reworded, entry.answer)


def notes(entries: list[Entry], rng: random.Random) -> str:
    """Write a long system prompt that nobody has seen before, from answers of the corpus."""
    chosen = rng.sample(entries, rng.randrange(3, 24))
    facts = "\n".join("- " + entry.answer for entry in chosen)
    return f"{rng.choice(SHORT_SYSTEM_PROMPTS)}\n\nFacts:\n{facts}"
