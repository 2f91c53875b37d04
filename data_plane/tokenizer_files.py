"""The tokenizer's files of a model directory, as the control plane gets them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """`special_tokens`: those that a chat template may name, by name, for example bos_token."""

    tokenizer_json: bytes
    chat_template: str
    special_tokens: dict[str, str]
    digest: str


_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


def read_tokenizer(directory: Path) -> TokenizerFiles | None:
    """Reads ``tokenizer.json``, the chat template and special tokens; None without a tokenizer.

    Raises:
        ValueError: a file is no JSON or no text; names it.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    data = path.read_bytes()
    config_path = directory / "tokenizer_config.json"
    try:
        config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{config_path.name} is no JSON: {error}") from error
    template_path = directory / "chat_template.jinja"
    template = template_path.read_text() if template_path.is_file() else ""
    if not template and isinstance(config.get("chat_template"), str):
        template = config["chat_template"]
    special = {}
    for name in _SPECIAL:
        value = config.get(name)
        if isinstance(value, dict):  # An AddedToken written out.
            value = value.get("content")
        if isinstance(value, str):
            special[name] = value
    digest = hashlib.sha256(
        data + b"\0" + template.encode() + b"\0" + json.dumps(special, sort_keys=True).encode()
    ).hexdigest()
    return TokenizerFiles(data, template, special, digest)
