"""From a client's prompt to token ids, and from token ids back to text, one token at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

# Decoders for which what a token adds to a text depends on nothing but whether it comes first.
_PER_TOKEN_DECODERS = {"Replace", "Fuse", "Strip", "Metaspace", "WordPiece", "ByteFallback"}


class PromptError(ValueError):
    """The prompt cannot be tokenised; the message is for the client, `field` names the culprit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class TextDecoder(Protocol):
    """Turns one sequence's tokens into text. What it gave out never changes later."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""

    def finish(self) -> str:
        """The rest; what is no complete character comes as U+FFFD."""


class PromptTokenizer:
    """A model's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._texts = TokenTexts(tokenizer)

    @classmethod
    def from_parts(
        cls, tokenizer_json: bytes, chat_template: str | None, special_tokens: Mapping[str, str]
    ) -> PromptTokenizer:
        """Builds it from what an engine hands out.

        Args:
            tokenizer_json: a file of the `tokenizers` library.
            chat_template: Jinja source, or None.
            special_tokens: what the template may name, such as `bos_token`.

        Raises:
            ValueError: no such file, or its decoder cannot be run token by token.
        """
        try:
            tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json: {error}") from error
        # Prompts are never cut or padded, whatever the file was trained with.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        template = None if chat_template is None else ChatTemplate(chat_template, special_tokens)
        return cls(tokenizer, template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text prompt, with the special tokens that the model expects around it."""
        return self._encode("text", text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, content) messages, ready for the assistant's answer.

        Raises:
            PromptError: there is no chat template, or it does not take these messages.
        """
        if self._template is None:
            raise PromptError("chat", "the model has no chat template")
        # The template writes the special tokens itself.
        return self._encode("chat", self._template.render(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all tokens at once, special tokens left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def text_decoder(self) -> TextDecoder:
        """A decoder at the beginning of a text; its whole output equals `decode`'s."""
        return Utf8Decoder(self._texts) if self._texts.byte_level else PieceDecoder(self._texts)

    def _encode(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises nothing narrower
            raise PromptError(field, f"the prompt cannot be tokenised: {error}") from error


class ChatTemplate:
    """A Jinja chat template in a sandbox, set up as transformers does."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template: jinja2.Template | None = None
        self._fault = ""
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            # The model still serves other prompts.
            self._fault = f"the model's chat template is broken: {error}"

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Raises PromptError where the template refuses the messages or fails on them."""
        if self._template is None:
            raise PromptError("chat", self._fault)
        try:
            return self._template.render(
                self._special_tokens,
                messages=[{"role": role, "content": content} for role, content in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except jinja2.TemplateError as error:
            raise PromptError("chat.messages", f"the chat template says: {error}") from error
        except Exception as error:  # template code may fail in any way Python can
            message = "the chat template cannot render these messages"
            raise PromptError("chat.messages", message) from error


class TokenTexts:
    """What each token adds to a text, worked out once per token and shared by all sequences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        spec = json.loads(tokenizer.to_str())
        kinds = set(_decoder_kinds(spec["decoder"]))
        self.byte_level = kinds == {"ByteLevel"}
        if not self.byte_level and not kinds <= _PER_TOKEN_DECODERS:
            raise ValueError(f"cannot decode token by token with {', '.join(sorted(kinds))}")
        self._byte_fallback = "ByteFallback" in kinds
        self._tokenizer = tokenizer
        self._special = {each["content"] for each in spec["added_tokens"] if each["special"]}
        self._pieces: dict[int, str | bytes | None] = {}

    def piece(self, token_id: int) -> str | bytes | None:
        """What the token adds behind another: text, or raw bytes that are part of some character.

        None for tokens that decoding leaves out: special and unknown ones.
        """
        if token_id not in self._pieces:
            token = self._tokenizer.id_to_token(token_id)
            left_out = token is None or token in self._special
            self._pieces[token_id] = None if left_out else self._work_out(token or "")
        return self._pieces[token_id]

    def beginning(self, token_ids: Sequence[int]) -> str:
        """The text of the first tokens, none of them left out."""
        return self._decode([self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids])

    def _work_out(self, token: str) -> str | bytes:
        if self.byte_level:
            codes = [_BYTE_OF_CHARACTER.get(character, -1) for character in token]
            # A token with a character outside the alphabet was added as it is.
            return token.encode() if -1 in codes else bytes(codes)
        if self._byte_fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(byte[1])
        # Behind another token, because a text's beginning is treated in its own way.
        return self._decode(["a", token])[1:]

    def _decode(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)


class Utf8Decoder:
    """For byte-level tokenizers: at most three bytes of an incomplete character are held back."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        piece = self._texts.piece(token_id)
        return self._decoder.decode(piece) if isinstance(piece, bytes) else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceDecoder:
    """For tokenizers whose tokens are text, with raw bytes for characters outside the vocabulary.

    A run of raw bytes is held back until it ends, since the library's ByteFallback turns every byte
    of a run into U+FFFD when the run as a whole is not UTF-8.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._at_beginning = True
        self._run = bytearray()
        self._run_ids: list[int] = []

    def push(self, token_id: int) -> str:
        piece = self._texts.piece(token_id)
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            self._run += piece
            self._run_ids.append(token_id)
            return ""
        before = self.finish()
        if self._at_beginning:
            self._at_beginning = False
            piece = self._texts.beginning([token_id])
        return before + piece

    def finish(self) -> str:
        if not self._run:
            return ""
        run, run_ids, at_beginning = self._run, self._run_ids, self._at_beginning
        self._run, self._run_ids, self._at_beginning = bytearray(), [], False
        if at_beginning:
            return self._texts.beginning(run_ids)
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


def _decoder_kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _decoder_kinds(each)
    else:
        yield decoder["type"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map between bytes and printable characters, from character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


class _Generation(Extension):
    """The tags {% generation %} and {% endgeneration %}, which mark training targets: no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what is special in HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
