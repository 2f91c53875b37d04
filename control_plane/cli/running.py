"""How a command runs and ends: signals, exit statuses, and what goes wrong as one sentence."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from control_plane.cli.cells import printable
from control_plane.cli.local_stack import StackError
from control_plane.cli.stack_view import print_failure
from control_plane.client import CallError

EXIT_FAILED = 1
EXIT_STOPPED = 130

Result = TypeVar("Result")


class CommandError(Exception):
    """A command cannot do what it was asked to; one sentence."""


def run(main: Coroutine[Any, Any, Result], exit_when_stopped: int = EXIT_STOPPED) -> Result:
    """Runs until done, or until SIGINT, SIGTERM or SIGHUP; what fails becomes one sentence."""

    async def stoppable() -> Result:
        task = asyncio.ensure_future(main)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await task

    try:
        return asyncio.run(stoppable())
    except asyncio.CancelledError:
        raise typer.Exit(exit_when_stopped) from None
    except StackError as error:
        print_failure(error, Console(stderr=True))
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        if not isinstance(first, CallError):
            raise
        print_error(first.sentence)
    except CallError as error:
        print_error(error.sentence)
    except CommandError as error:
        print_error(str(error))
    raise typer.Exit(EXIT_FAILED)


def print_error(sentence: str) -> None:
    _print_to_stderr("error", sentence, "red")


def print_warning(sentence: str) -> None:
    """Says what an answer lacks, where it does not get into the answer."""
    _print_to_stderr("warning", sentence, "yellow")


def _print_to_stderr(word: str, sentence: str, style: str) -> None:
    text = Text(f"{word}: {printable(sentence)}", style)
    Console(stderr=True).print(text, soft_wrap=True)
