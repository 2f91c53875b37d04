"""What operators' commands have in common: where the admin API is, and how they answer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from rich.console import Console, RenderableType

from control_plane.admin_client import DEFAULT_ADDRESS, AdminClient
from control_plane.cli.credentials import Credentials, with_credentials
from control_plane.cli.running import CommandError, print_warning, run

Result = TypeVar("Result")

AdminAddress = Annotated[
    str, typer.Option("--address", envvar="QUIRE_ADMIN_ADDRESS", help="host:port of the admin API")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
EngineId = Annotated[str, typer.Option("--engine", help="only of this engine id")]


@dataclass(frozen=True, slots=True)
class Asking:
    """One command's way to the admin API and back to who started it."""

    address: str
    as_json: bool
    credentials: Credentials

    def admin(self) -> AdminClient:
        """The one place where what a command was told of the service becomes a client."""
        return AdminClient(self.address, token=self.credentials.token, tls=self.credentials.tls)

    def ask(self, call: Callable[[AdminClient], Awaitable[Result]]) -> Result:
        """Returns what a call brings; where it fails, the command ends with its sentence."""

        async def asked() -> Result:
            async with self.admin() as admin:
                found = await call(admin)
                for address in sorted(admin.unanswered):
                    missing = "what its engines hold is missing"
                    print_warning(f"the replica at {address} does not answer: {missing}")
                return found

        return run(asked())

    def show(self, found: Any, view: Callable[[], RenderableType]) -> None:
        """Prints the JSON of what was found, or the view of it."""
        if self.as_json:
            print(json.dumps(found, indent=2))
        else:
            Console().print(view())


def asks_admin(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that make its keyword argument `asking`.

    >>> @app.command()
    ... @asks_admin
    ... def engines(*, asking: Asking) -> None: ...
    """
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature.parameters.items()
        if name != "asking"
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter("address", keyword, default=DEFAULT_ADDRESS, annotation=AdminAddress),
        inspect.Parameter("as_json", keyword, default=False, annotation=AsJson),
        inspect.Parameter("credentials", keyword, annotation=Credentials),
    ]

    def told(address: str, as_json: bool, credentials: Credentials, **arguments: Any) -> None:
        command(**arguments, asking=Asking(address, as_json, credentials))

    # What the command line is made of.
    told.__name__, told.__doc__ = command.__name__, command.__doc__
    told.__annotations__ = {each.name: each.annotation for each in [*own, *options]}
    told.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return with_credentials(told)


async def the_engine(admin: AdminClient, engine_id: str) -> str:
    """The engine that is meant: the one that was named, else the only one that is led.

    Raises:
        CallError: nothing answers.
        CommandError: there is none, or there are several.
    """
    if engine_id:
        return engine_id
    led = [row["engine_id"] for row in await admin.engines() if row["state"] in ("led", "followed")]
    if len(led) == 1:
        return str(led[0])
    if not led:
        raise CommandError(f"the replica at {admin.address} knows no engine that is led")
    raise CommandError(f"there are {len(led)} engines, so name one: {', '.join(led)}")
