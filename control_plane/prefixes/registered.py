"""Registered prefixes: shared system prompts that operators name, pin and watch.

All tenants share the full blocks of a registered prefix: these are hashed without a tenant's salt
wherever a prompt begins with them. What they are in tokens depends on the model's tokenizer and
chat template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from control_plane.blocks import Int32Array
from control_plane.engine_link import EngineFacts
from control_plane.hashing import PrefixHasher
from control_plane.records import NOT_SHARED, SharedPrefix
from control_plane.tokenizer import PromptError, PromptTokenizer

MAX_NAME_LENGTH = 63
MAX_TEXT_BYTES = 1 << 20
MAX_PREFIXES = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class BadPrefix(ValueError):
    """A prefix that cannot be registered; `field` names what is wrong with it."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field


@dataclass(frozen=True, slots=True)
class Definition:
    """What an operator said.

    Attributes:
        system: the text is the content of a chat's system message; else a text prompt begins so.
        pinned: every engine computes it, and keeps it.
        declared: in this replica's file, hence not to be changed by anybody.

    Raises:
        BadPrefix: name or text are outside of their limits.
    """

    name: str
    text: str
    system: bool = True
    pinned: bool = False
    declared: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.name) > MAX_NAME_LENGTH:
            raise BadPrefix(
                "name",
                f"must be 1 to {MAX_NAME_LENGTH} letters, digits, points, dashes and underscores, "
                "a letter or digit first",
            )
        size = len(self.text.encode())
        if not 1 <= size <= MAX_TEXT_BYTES:
            raise BadPrefix("text", f"has {size} bytes; it must have 1 to {MAX_TEXT_BYTES}")

    def token_ids(self, tokenizer: PromptTokenizer) -> list[int]:
        """Returns the tokens with which every prompt that has this prefix begins.

        Raises:
            PromptError: the tokenizer or its chat template does not take it.
        """
        if not self.system:
            return _common(tokenizer.encode(self.text + end) for end in ("", " a", "\nZ"))
        turns = [[("system", self.text), ("user", content)] for content in ("0", "Z", " a", "\n")]
        return _common(map(tokenizer.encode_chat, turns))


@dataclass(frozen=True, slots=True)
class Tokens:
    """A definition in one tokenizer's tokens; `problem` says why there are none."""

    ids: Int32Array
    problem: str = ""


class RegisteredPrefixes:
    """All registered prefixes that this replica knows.

    Args:
        declared: those of its file; they win over stored ones of the same name.

    Attributes:
        version: counts changes.
        warm_counts: how often each was to be warmed.
    """

    def __init__(self, declared: Iterable[Definition] = ()) -> None:
        self._declared = {each.name: each for each in declared}
        self._stored: dict[str, Definition] = {}
        self._tokens: dict[tuple[Definition, str], Tokens] = {}
        self._hashes: dict[tuple[Definition, object], tuple[bytes, ...]] = {}
        self._by_first_block: dict[tuple[str, int], dict[bytes, list[_Candidate]]] = {}
        self.version = 0
        self.warm_counts: dict[str, int] = {}

    @property
    def definitions(self) -> list[Definition]:
        """By name."""
        return [each for _, each in sorted((self._stored | self._declared).items())]

    @property
    def stored(self) -> Mapping[str, Definition]:
        return self._stored

    def get(self, name: str) -> Definition | None:
        return self._declared.get(name) or self._stored.get(name)

    def set_stored(self, stored: Mapping[str, Definition]) -> None:
        """Replaces what is not declared."""
        if stored != self._stored:
            self._stored = dict(stored)
            self._changed()

    def unprepared(self, tokenizer_digest: str) -> list[Definition]:
        return [each for each in self.definitions if (each, tokenizer_digest) not in self._tokens]

    def prepare(self, tokenizer_digest: str, made: Mapping[Definition, Tokens]) -> None:
        """Takes what `tokenised` made of definitions; from now on prompts are matched with it."""
        for definition, tokens in made.items():
            self._tokens[definition, tokenizer_digest] = tokens
        self._changed()

    def tokens(self, definition: Definition, facts: EngineFacts) -> Tokens | None:
        """What a definition is for an engine's model, in full blocks; None: not prepared yet."""
        tokens = self._tokens.get((definition, facts.tokenizer_digest))
        if tokens is None or tokens.problem:
            return tokens
        ids = tokens.ids[: len(tokens.ids) // facts.block_size * facts.block_size]
        return Tokens(ids, "" if len(ids) else f"fills no block of {facts.block_size} tokens")

    def hashes(self, definition: Definition, facts: EngineFacts) -> tuple[bytes, ...]:
        """The prefix hashes of its full blocks; empty as long as it is not prepared."""
        key = (definition, facts.kind)
        if key not in self._hashes:
            tokens = self.tokens(definition, facts)
            if tokens is None:
                return ()
            hasher = PrefixHasher(facts.fingerprint, facts.block_size)
            self._hashes[key] = tuple(hasher.extend([], tokens.ids))
        return self._hashes[key]

    def match(self, prompt: Int32Array | list[int], facts: EngineFacts) -> SharedPrefix:
        """Returns the longest registered prefix whose full blocks `prompt` begins with.

        Args:
            prompt: token ids, [n].
        """
        prompt = np.asarray(prompt, np.int32)
        first = prompt[: facts.block_size].astype("<i4").tobytes()
        for candidate in self._candidates(facts).get(first, ()):
            count = len(candidate.ids)
            if np.array_equal(prompt[:count], candidate.ids):
                return SharedPrefix(candidate.name, count // facts.block_size)
        return NOT_SHARED

    def _candidates(self, facts: EngineFacts) -> dict[bytes, list[_Candidate]]:
        key = (facts.tokenizer_digest, facts.block_size)
        if key not in self._by_first_block:
            found: dict[bytes, list[_Candidate]] = {}
            for definition in self.definitions:
                tokens = self.tokens(definition, facts)
                if tokens is not None and len(tokens.ids):
                    first = tokens.ids[: facts.block_size].astype("<i4").tobytes()
                    found.setdefault(first, []).append(_Candidate(definition.name, tokens.ids))
            for candidates in found.values():
                candidates.sort(key=lambda candidate: -len(candidate.ids))
            self._by_first_block[key] = found
        return self._by_first_block[key]

    def _changed(self) -> None:
        known = set(self.definitions)
        self._tokens = {key: ids for key, ids in self._tokens.items() if key[0] in known}
        self._hashes = {key: each for key, each in self._hashes.items() if key[0] in known}
        self._by_first_block.clear()
        self.version += 1


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    ids: Int32Array


def tokenised(
    definitions: Iterable[Definition], tokenizer: PromptTokenizer
) -> dict[Definition, Tokens]:
    """What each is in a tokenizer's tokens; may take seconds, and may run on any thread."""
    made = {}
    for definition in definitions:
        try:
            made[definition] = Tokens(np.array(definition.token_ids(tokenizer), np.int32))
        except PromptError as error:
            made[definition] = Tokens(np.zeros(0, np.int32), str(error))
    return made


def _common(variants: Iterable[list[int]]) -> list[int]:
    """The longest list that all variants begin with."""
    shared: list[int] | None = None
    for ids in variants:
        if shared is None:
            shared = ids
            continue
        length = min(len(shared), len(ids))
        differ = (place for place in range(length) if shared[place] != ids[place])
        shared = shared[: next(differ, length)]
    return shared or []
