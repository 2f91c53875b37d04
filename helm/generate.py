"""Writes what of the chart follows from other files: `python -m helm.generate`.

- in `quire/README.md`: every value with its default, from the comments in `quire/values.yaml`;
- in `quire/values.schema.json`: the settings of both planes, from their code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic_settings import BaseSettings

from control_plane.settings import Settings as ControlSettings
from data_plane.settings import Settings as DataSettings

_HEADING = "## Values\n\n"
CHART = Path(__file__).resolve().parent / "quire"
# What the chart writes itself, or gives by the environment.
_OF_BOTH = {
    "config",
    "drain_seconds",
    "health_listen",
    "listen",
    "metrics_port",
    "tls_ca",
    "tls_certificate",
    "tls_key",
}
OF_THE_CHART = {
    "controlPlaneSettings": _OF_BOTH
    | {
        "access",
        "admin_listen",
        "advertise",
        "anonymous_roles",
        "connection_age_seconds",
        "engines",
        "index_namespace",
        "peer_name",
        "prefixes",
        "redis_ca",
        "redis_password",
        "redis_url",
        "redis_username",
    },
    "dataPlaneSettings": _OF_BOTH
    | {
        "device",
        "engine_id",
        "kv_memory_mib",
        "leader_names",
        "model",
        "served_model_name",
        "swap_memory_mib",
        "tensor_parallel",
    },
}
# Values that are mappings, and one thing nevertheless.
_WHOLE = {"settings", "resources", "dashboardLabels"}
SETTINGS: dict[str, type[BaseSettings]] = {
    "controlPlaneSettings": ControlSettings,
    "dataPlaneSettings": DataSettings,
}


def settings_schema(name: str) -> dict[str, Any]:
    """The settings that a user of the chart may add, as a JSON schema."""
    properties = SETTINGS[name].model_json_schema()["properties"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            setting: _plain(schema)
            for setting, schema in properties.items()
            if setting not in OF_THE_CHART[name]
        },
    }


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A setting's schema without what JSON's validators differ about, and without "or null"."""
    kind = schema["anyOf"][0] if "anyOf" in schema else schema
    kept = {key: value for key, value in kind.items() if key not in ("title", "default", "format")}
    return kept | {"description": schema["description"]}


def schema() -> str:
    """The text of values.schema.json with the settings as they are now."""
    whole = json.loads((CHART / "values.schema.json").read_text())
    whole["definitions"] |= {name: settings_schema(name) for name in SETTINGS}
    return json.dumps(whole, indent=2) + "\n"


def rows(text: str) -> Iterator[tuple[str, str, str]]:
    """Each value's path, default and meaning.

    Raises:
        ValueError: a value has no comment.
    """
    lines = text.splitlines()
    yield from _rows(yaml.compose(text), "", lines)


def _rows(node: Any, prefix: str, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        meaning = _comment(lines, key.start_mark.line)
        if isinstance(value, yaml.MappingNode) and value.value and key.value not in _WHOLE:
            if meaning:
                yield path, "", meaning
            yield from _rows(value, f"{path}.", lines)
        elif meaning:
            yield path, json.dumps(yaml.safe_load(yaml.serialize(value))), meaning
        else:
            raise ValueError(f"{path} has no comment")


def _comment(lines: list[str], line: int) -> str:
    """The comment right above a line."""
    found: list[str] = []
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].lstrip()[1:].strip())
    return " ".join(found)


def readme() -> str:
    """The text of README.md."""
    table = ["| value | default | meaning |", "|---|---|---|"]
    for path, default, meaning in rows((CHART / "values.yaml").read_text()):
        name = f"`{path}`" if default else f"**`{path}`**"
        table.append(f"| {name} | {f'`{default}`' if default else ''} | {meaning} |")
    head, _, _ = (CHART / "README.md").read_text().partition(_HEADING)
    return head + _HEADING + "\n".join(table) + "\n"


if __name__ == "__main__":
    (CHART / "values.schema.json").write_text(schema())
    (CHART / "README.md").write_text(readme())
