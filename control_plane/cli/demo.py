"""`quire demo`: questions that share a long system prompt, and what the prefix cache made of it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from control_plane.admin_client import AdminClient
from control_plane.cli import views
from control_plane.cli.ask import Answer, Answers
from control_plane.cli.engine_view import engines_view
from control_plane.cli.local_stack import LocalStack
from control_plane.client import Client

MAX_ANSWER_TOKENS = 128


async def run_demo(stack: LocalStack, model: Path, console: Console) -> None:
    """Asks the demo model's questions and shows answers, prefixes and engines.

    Raises:
        CallError: a call failed.
    """
    system = (model / "system_prompt.txt").read_text(encoding="utf-8").strip()
    questions = (model / "questions.txt").read_text(encoding="utf-8").split("\n")
    asked = [_Question(system, question) for question in questions if question.strip()]
    async with Client(stack.address) as client, AdminClient(stack.admin_address) as admin:
        await _ask(client, asked[:1], console, "The first call computes the system prompt.")
        await _ask(client, asked[1:], console, "The others, all at once, share its blocks.")
        hits = sum(question.answers.cached_tokens > 0 for question in asked)
        saved = sum(question.answers.cached_tokens for question in asked)
        prompts = sum(question.answers.prompt_tokens for question in asked)
        console.print()
        console.print(f"prefix-cache hits: {hits} of {len(asked)} requests", style="bold")
        console.print(f"prompt tokens from the cache: {views.share(saved, prompts)}", style="bold")
        console.print()
        console.print(views.prefixes_table(await admin.prefixes()))
        console.print()
        console.print(engines_view(await admin.engines()))


class _Question:
    """One call and what it brought so far."""

    def __init__(self, system: str, question: str) -> None:
        self._question = question
        self._chat = [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
        ]
        self.answers = Answers([Answer()])

    async def ask(self, client: Client) -> None:
        events = client.generate(self._chat, temperature=0, max_tokens=MAX_ANSWER_TOKENS)
        async for event in events:
            self.answers.take(event)

    def __rich__(self) -> Group:
        answers = self.answers
        lines = [Text(f"▸ {self._question}", "bold cyan"), Text(answers.samples[0].text or "…")]
        if answers.prompt_tokens:
            cached = views.share(answers.cached_tokens, answers.prompt_tokens)
            lines.append(Text(f"{cached} prompt tokens from the prefix cache", "dim"))
        return Group(lines[0], *(Padding(line, (0, 0, 0, 2)) for line in lines[1:]))


async def _ask(client: Client, asked: list[_Question], console: Console, title: str) -> None:
    """Asks all at the same time; their answers grow side by side."""
    console.print()
    console.print(title, style="bold")
    # Answers that grow can be shown only where lines can be rewritten.
    live = Live(Group(*asked), console=console, refresh_per_second=20)
    with live if console.is_terminal else nullcontext():
        async with asyncio.TaskGroup() as calls:
            for question in asked:
                calls.create_task(question.ask(client))
    if not console.is_terminal:
        console.print(*asked, sep="\n")
