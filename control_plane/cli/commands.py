"""The command line: `quire --help`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from control_plane import admin_client, client
from control_plane.cli import operators, prefix_commands
from control_plane.cli.ask import ask
from control_plane.cli.asking import AsJson
from control_plane.cli.credentials import Credentials, with_credentials
from control_plane.cli.demo import run_demo
from control_plane.cli.local_stack import (
    FREE_PORT,
    LocalStack,
    StackSettings,
    demo_model,
    is_free,
)
from control_plane.cli.running import EXIT_FAILED, EXIT_STOPPED, run
from control_plane.cli.stack_view import shown
from control_plane.client import Client

_CONNECT_SECONDS = 1.0

app = typer.Typer(
    name="quire",
    help="Serves language models with PagedAttention, and asks them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Address = Annotated[
    str, typer.Option(envvar="QUIRE_ADDRESS", help="host:port of the inference API")
]


@app.command()
@with_credentials
def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads it from standard input")],
    address: Address = client.DEFAULT_ADDRESS,
    system: Annotated[str, typer.Option(help="system message that begins the chat")] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="plain text, even where the model knows chats")
    ] = False,
    model: Annotated[str, typer.Option(help="served model name; none: the only one")] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="new tokens of a sample, at most; none: up to the model's length"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy, at most 100; none: 1"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="smallest set of tokens with this mass; none: 1"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="the same seed gives the same answer; none: a random one"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="answers, at most 16")] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="text that ends an answer; may be given again"),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="seconds for the whole call; none: no limit"),
    ] = None,
    retry_seconds: Annotated[
        float, typer.Option(help="seconds without progress before a lost service is given up")
    ] = 30.0,
    as_json: AsJson = False,
    *,
    credentials: Credentials,
) -> None:
    """Asks one prompt and streams the answer; what it cost goes to standard error."""
    options = client.Options(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        sample_count=samples,
        stop_strings=stop,
    )
    text = sys.stdin.read() if prompt == "-" else prompt

    async def call() -> bool:
        async with Client(
            address, retry_seconds=retry_seconds, token=credentials.token, tls=credentials.tls
        ) as caller:
            await caller.wait_connected(_CONNECT_SECONDS)
            return await ask(
                caller, text, system=system, raw=raw, as_json=as_json,
                timeout=timeout, options=options,
            )  # fmt: skip

    if not run(call()):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def up(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- SETTINGS",
            help="more settings of either plane, e.g. -- --block-size 32 --chunk-tokens 256; see "
            "python -m data_plane --help and python -m control_plane --help",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="model directory; none: $QUIRE_MODEL, else the demo model"),
    ] = None,
    load_format: Annotated[str, typer.Option(help="safetensors, or dummy: random weights")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice")] = 0,
    blocks: Annotated[
        int, typer.Option(min=0, help="KV blocks; 0: as many as --kv-memory-mib holds")
    ] = 0,
    kv_memory_mib: Annotated[
        int, typer.Option(min=0, help="MiB of memory for KV blocks; 0: the data plane's 512")
    ] = 0,
    listen: Annotated[
        str, typer.Option(help="host:port of the inference API; port 0: a free one")
    ] = client.DEFAULT_ADDRESS,
    admin_listen: Annotated[
        str, typer.Option(help="host:port of the admin API; port 0: a free one")
    ] = admin_client.DEFAULT_ADDRESS,
    engine_listen: Annotated[
        str, typer.Option(help="host:port of the engine API; port 0: a free one")
    ] = FREE_PORT,
    redis_url: Annotated[
        str,
        typer.Option(envvar="QUIRE_REDIS_URL", help="of a running Redis; none: one of its own"),
    ] = "",
) -> None:
    """Serves a model on this machine: Redis, data plane, control plane. Ctrl-C stops all."""
    given: dict[str, object] = {
        "--model": model,
        "--load-format": load_format,
        "--dtype": dtype,
        "--threads": threads,
        "--blocks": blocks,
        "--kv-memory-mib": kv_memory_mib,
    }
    flags = [word for name, value in given.items() if value for word in (name, str(value))]
    stack_settings = StackSettings(
        listen, admin_listen, engine_listen, redis_url, (*flags, *(settings or ()))
    )

    async def serve() -> None:
        console = Console()
        async with shown(LocalStack(stack_settings), console) as stack:
            await _keep_serving(stack, console)

    run(serve(), exit_when_stopped=0)


@app.command()
def demo(
    keep: Annotated[
        bool,
        typer.Option("--keep", help="go on serving afterwards, on the usual ports if free"),
    ] = False,
) -> None:
    """Starts everything with a small model and shows the prefix cache at work."""

    async def show() -> None:
        console, model = Console(), demo_model()
        settings = StackSettings(flags=("--model", str(model)))
        usual = (client.DEFAULT_ADDRESS, admin_client.DEFAULT_ADDRESS)
        if keep and all(map(is_free, usual)):
            settings = StackSettings(*usual, flags=settings.flags)
        async with shown(LocalStack(settings), console) as stack:
            await run_demo(stack, model, console)
            if keep:
                await _keep_serving(stack, console)

    run(show(), exit_when_stopped=0 if keep else EXIT_STOPPED)


prefix_commands.add_commands(app)
operators.add_commands(app)


def main() -> None:
    """The `quire` script."""
    app()


async def _keep_serving(stack: LocalStack, console: Console) -> None:
    """Says how to talk to the stack, and waits until a process of it ends. Raises StackError."""
    address = f" --address {stack.address}" * (stack.address != client.DEFAULT_ADDRESS)
    usual_admin = stack.admin_address == admin_client.DEFAULT_ADDRESS
    admin_address = "" if usual_admin else f" --address {stack.admin_address}"
    lines = [
        "",
        f"Serving at {stack.address}, the admin API at {stack.admin_address}. Ask it:",
        f'  quire generate "What is PagedAttention?"{address}',
        f"  quire prefixes{admin_address}",
        f"  quire engines{admin_address}",
        f"Logs: {stack.folder}. Ctrl-C stops everything.",
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
    await stack.watch()
