"""Asks a running service one prompt twice: `python -m control_plane.cli.check --address HOST:7401`.

Ends with status 0 if both calls were answered and the second found its prompt in the prefix cache.
It is what `helm test` runs.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from contextlib import aclosing
from typing import Annotated

import typer

from control_plane.cli.ask import Answer, Answers
from control_plane.cli.credentials import Credentials, with_credentials
from control_plane.client import DEFAULT_ADDRESS, CallError, Client, Options

# Another engine may be asked the second time, and know better the third.
_ATTEMPTS = 3
_MAX_TOKENS = 4


class CheckFailed(Exception):
    """What is not as it should be; one sentence."""


async def check(client: Client, *, block_size: int, model: str = "", timeout: float = 60) -> str:
    """Returns what was found, in one sentence.

    Args:
        block_size: tokens of a block; the prompt fills more than two.
        timeout: seconds of one call.

    Raises:
        CallError: a call failed.
        CheckFailed: an answer is not whole, or the prefix cache was never hit.
    """
    # It begins as no other, so that only the first call can have cached it.
    prompt = uuid.uuid4().hex + " block" * (2 * block_size)
    options = Options(model=model, max_tokens=_MAX_TOKENS, temperature=0)
    first = await _ask(client, prompt, timeout, options)
    for _ in range(_ATTEMPTS):
        again = await _ask(client, prompt, timeout, options)
        if again.cached_tokens:
            return (
                f"ok: {again.cached_tokens} of {again.prompt_tokens} prompt tokens came from the "
                f"prefix cache of {again.engine_id}, {first.cached_tokens} the first time"
            )
    raise CheckFailed(
        f"none of {first.prompt_tokens} prompt tokens came from the prefix cache, though "
        f"{first.engine_id} has computed them"
    )


async def _ask(client: Client, prompt: str, timeout: float, options: Options) -> Answers:
    answers = Answers([Answer()])
    async with aclosing(client.generate(prompt, timeout=timeout, **options)) as events:
        async for event in events:
            answers.take(event)
    sample = answers.samples[0]
    if sample.finish_reason not in ("stop", "length"):
        raise CheckFailed(f"the answer ended with {sample.finish_reason}: {sample.message}")
    return answers


@with_credentials
def main(
    address: Annotated[
        str, typer.Option(envvar="QUIRE_ADDRESS", help="host:port of the inference API")
    ] = DEFAULT_ADDRESS,
    block_size: Annotated[int, typer.Option(min=1, help="tokens per block, of the engines")] = 16,
    model: Annotated[str, typer.Option(help="served model name; none: the only one")] = "",
    timeout: Annotated[float, typer.Option(help="seconds for each call")] = 60.0,
    *,
    credentials: Credentials,
) -> None:
    """Asks one prompt twice, and demands that the second time finds it in the prefix cache."""

    async def call() -> str:
        async with Client(
            address, retry_seconds=timeout, token=credentials.token, tls=credentials.tls
        ) as client:
            return await check(client, block_size=block_size, model=model, timeout=timeout)

    try:
        print(asyncio.run(call()))
    except (CallError, CheckFailed) as error:
        print(f"failed: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
