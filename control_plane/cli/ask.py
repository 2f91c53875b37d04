"""`quire generate`: asks one prompt and prints the answers as they come."""

from __future__ import annotations

import json
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from control_plane.cli.views import share
from control_plane.client import CallError, Client, Options, Prompt


@dataclass(slots=True)
class Answer:
    """One sample."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    message: str = ""


@dataclass(slots=True)
class Answers:
    """Everything one call brought."""

    samples: list[Answer]
    request_id: str = ""
    engine_id: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def take(self, event: Any) -> None:
        """Adds one event of the stream, a GenerateResponse."""
        kind = event.WhichOneof("event")
        if kind == "accepted":
            self.request_id = event.accepted.request_id
            self.engine_id = event.accepted.engine_id
        elif kind == "delta":
            sample = self.samples[event.delta.sample]
            sample.text += event.delta.text
            sample.token_ids += event.delta.token_ids
        elif kind == "finished":
            reasons = event.finished.DESCRIPTOR.fields_by_name["reason"].enum_type
            name = reasons.values_by_number[event.finished.reason].name
            sample = self.samples[event.finished.sample]
            sample.finish_reason = name.rpartition("_")[2].lower()
            sample.message = event.finished.message
        elif kind == "usage":
            self.prompt_tokens = event.usage.prompt_token_count
            self.cached_tokens = event.usage.cached_token_count
            self.output_tokens = event.usage.output_token_count

    def as_json(self) -> str:
        values = {
            "request_id": self.request_id,
            "engine_id": self.engine_id,
            "prompt_token_count": self.prompt_tokens,
            "cached_token_count": self.cached_tokens,
            "output_token_count": self.output_tokens,
            "samples": [
                {
                    "text": sample.text,
                    "token_ids": sample.token_ids,
                    "finish_reason": sample.finish_reason,
                    "message": sample.message,
                }
                for sample in self.samples
            ],
        }
        return json.dumps(values, ensure_ascii=False)


async def ask(
    client: Client,
    prompt: str,
    *,
    system: str = "",
    raw: bool = False,
    as_json: bool = False,
    timeout: float | None,
    options: Options,
) -> bool:
    """Prints the answers to stdout and what they cost to stderr; returns whether all are whole.

    The prompt is a chat message, or plain text if it is `raw` or the model knows no chats.

    Raises:
        CallError: the call failed.
    """
    chat: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": prompt})
    try:
        return await _ask(client, prompt if raw else chat, as_json, timeout, options)
    except CallError as error:
        # The service refuses the field as a whole where the model has no chat template.
        if raw or system or error.field != "chat":
            raise
        return await _ask(client, prompt, as_json, timeout, options)


async def _ask(
    client: Client, prompt: Prompt, as_json: bool, timeout: float | None, options: Options
) -> bool:
    answers = Answers([Answer() for _ in range(options.get("sample_count") or 1)])
    printer, began = _InOrder(answers), time.monotonic()
    async with aclosing(client.generate(prompt, timeout=timeout, **options)) as events:
        async for event in events:
            answers.take(event)
            if not as_json:
                printer.advance()
    if as_json:
        print(answers.as_json())
    else:
        printer.close()
        _print_cost(answers, time.monotonic() - began)
    return all(sample.finish_reason in ("stop", "length") for sample in answers.samples)


class _InOrder:
    """Prints samples one after the other, each as far as it has come when its turn is there."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._current = self._printed = 0

    def advance(self) -> None:
        samples = self._answers.samples
        while self._current < len(samples):
            sample = samples[self._current]
            if len(samples) > 1 and not self._printed and sample.text:
                print(f"[{self._current + 1}] ", end="")
            print(sample.text[self._printed :], end="", flush=True)
            self._printed = len(sample.text)
            if not sample.finish_reason:
                return
            print(flush=True)
            self._current, self._printed = self._current + 1, 0

    def close(self) -> None:
        self.advance()


def _print_cost(answers: Answers, seconds: float) -> None:
    console = Console(stderr=True)
    for number, sample in enumerate(answers.samples, 1):
        if sample.message:
            console.print(Text(f"sample {number}: {sample.message}", "red"), soft_wrap=True)
    cached = share(answers.cached_tokens, answers.prompt_tokens)
    line = f"prompt: {cached} tokens from the prefix cache; output: {answers.output_tokens:,} "
    line += f"tokens in {seconds:.2f} s"
    console.print(Text(line, "dim"), soft_wrap=True)
