"""What commands show a service of themselves: a bearer token, a certificate."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from protos import wire

_EXIT_USAGE = 2
_PEM = {"exists": True, "dir_okay": False, "readable": True}

TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="QUIRE_TOKEN_FILE",
        help="file with a bearer token; none: $QUIRE_TOKEN, if any",
        **_PEM,
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        envvar="QUIRE_TLS_CA", help="PEM file that signed the service's certificate", **_PEM
    ),
]
TlsCertificate = Annotated[
    Path | None,
    typer.Option(envvar="QUIRE_TLS_CERTIFICATE", help="PEM file; together with tls-key", **_PEM),
]
TlsKey = Annotated[Path | None, typer.Option(envvar="QUIRE_TLS_KEY", help="PEM file", **_PEM)]


@dataclass(frozen=True, slots=True)
class Credentials:
    """What `Client` and `AdminClient` take."""

    token: str = ""
    tls: wire.Tls | None = None


def with_credentials(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that make its keyword argument `credentials`.

    >>> @app.command()
    ... @with_credentials
    ... def engines(address: AdminAddress, *, credentials: Credentials) -> None: ...
    """
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature.parameters.items()
        if name != "credentials"
    ]
    added = {
        "token_file": TokenFile,
        "tls_ca": TlsCa,
        "tls_certificate": TlsCertificate,
        "tls_key": TlsKey,
    }
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in added.items()
    ]

    def run(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in added}
        command(**arguments, credentials=_credentials(**given))

    # What the command line is made of.
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *options]}
    run.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return run


def _credentials(
    token_file: Path | None, tls_ca: Path | None, tls_certificate: Path | None, tls_key: Path | None
) -> Credentials:
    try:
        # The token itself is never a flag: other users of a machine see the flags of a process.
        token = os.environ.get("QUIRE_TOKEN", "")
        if token_file is not None:
            token = token_file.read_text(encoding="utf-8").strip()
        wire.bearer(token)
        return Credentials(token, wire.client_tls(tls_certificate, tls_key, tls_ca))
    except (OSError, ValueError) as error:
        sentence = "the token file is no text" if isinstance(error, UnicodeError) else error
        typer.echo(f"error: {sentence}", err=True)
        raise typer.Exit(_EXIT_USAGE) from None
