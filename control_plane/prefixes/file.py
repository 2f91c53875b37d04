"""Reads the file of prefixes that are registered from the start.

support:
  text: You are the support desk of Example Corporation. ...
  form: system     # or plain: text prompts begin so; default: system
  pinned: true     # default: false
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from control_plane.prefixes.registered import MAX_PREFIXES, BadPrefix, Definition


class BadPrefixesFile(ValueError):
    """The file cannot be used; one sentence."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    form: Literal["system", "plain"] = "system"
    pinned: bool = False


_ENTRIES = TypeAdapter(dict[str, _Entry])


def read_prefixes(path: Path | None) -> list[Definition]:
    """Returns what the file declares, nothing where there is none.

    Raises:
        BadPrefixesFile: it is missing, or something in it is wrong.
    """
    if path is None:
        return []
    try:
        entries = _ENTRIES.validate_python(yaml.safe_load(path.read_text()) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadPrefixesFile(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadPrefixesFile(f"{path}: {where}: {first['msg']}") from error
    if len(entries) > MAX_PREFIXES:
        raise BadPrefixesFile(f"{path}: has {len(entries)} prefixes; at most {MAX_PREFIXES}")
    return [_definition(path, name, entry) for name, entry in entries.items()]


def _definition(path: Path, name: str, entry: _Entry) -> Definition:
    try:
        return Definition(
            name, entry.text, system=entry.form == "system", pinned=entry.pinned, declared=True
        )
    except BadPrefix as error:
        raise BadPrefixesFile(f"{path}: {name}: {error.field} {error}") from error
