"""The control-plane process: ``python -m control_plane --help``."""

from __future__ import annotations

import sys

import uvloop
from pydantic import ValidationError
from pydantic_settings import CliApp

from control_plane.prefixes.file import BadPrefixesFile
from control_plane.server import serve
from control_plane.settings import Settings
from control_plane.traces import BadTraces
from protos.logs import configure


def main() -> int:
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "tls"
        print(f"setting {name}: {first['msg']}", file=sys.stderr)
        return 2
    configure(settings.log_level, settings.log_format)
    try:
        uvloop.run(serve(settings))
    except BadPrefixesFile as error:
        print(f"setting prefixes: {error}", file=sys.stderr)
        return 2
    except BadTraces as error:
        print(f"setting traces_endpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
