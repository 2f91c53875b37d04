"""Finds the YAML file before settings are parsed, since it is one of their sources."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def settings_file() -> Path | None:
    """Returns the file named by ``--config`` or QUIRE_CONFIG, or None.

    Raises:
        SystemExit: there is no such file; says so.
    """
    arguments = sys.argv[1:]
    named = os.environ.get("QUIRE_CONFIG")
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            named = arguments[index + 1]
        elif argument.startswith("--config="):
            named = argument.removeprefix("--config=")
    if not named:
        return None
    if not Path(named).is_file():
        sys.exit(f"setting config: there is no file {named}")
    return Path(named)
