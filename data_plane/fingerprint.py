"""Names a model by its contents, so that only engines with equal weights share hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from data_plane.kv_scales import KV_DTYPE, KVScales

# Files up to this size are hashed whole; larger ones by header and samples.
WHOLE_FILE_BYTES = 64 << 20
SAMPLE_BYTES = 64 << 10
SAMPLES = 64
# Keys of config.json that say who wrote it, not what it computes.
VOLATILE_KEYS = {"transformers_version", "_name_or_path"}


def fingerprint(path: Path, dtype: torch.dtype, *, dummy: bool = False) -> str:
    """Hex SHA-256 over config, dtype and weights of a model directory.

    Each safetensors file counts with its name, size, header and, above 64 MiB, 64
    evenly spaced samples of 64 KiB: a fine-tune changes every matrix, so samples
    tell it from its base, and 100 GB cost a second. A dummy model has no weights
    but always the same ones. Raises OSError where a file cannot be read.
    """
    config = json.loads((path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    digest = hashlib.sha256()
    _add(digest, b"quire model v1")
    _add(digest, json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
    _add(digest, str(dtype).encode())
    if dummy:
        _add(digest, b"dummy")
        return digest.hexdigest()
    for file in sorted(path.glob("*.safetensors")):
        _add(digest, file.name.encode())
        _add_file(digest, file)
    return digest.hexdigest()


def block_fingerprint(model: str, scales: KVScales | None) -> str:
    """Names what decides the bytes of a block: the model's fingerprint, and what the cache adds.

    It is the domain of prefix hashes, and requests move between engines where it is equal.
    Scales mean a cache of fp8; without, keys and values have the model's own dtype, which its
    fingerprint names already.
    """
    if scales is None:
        return model
    digest = hashlib.sha256()
    for part in ("quire blocks v1", model, str(KV_DTYPE), scales.digest):
        _add(digest, part.encode())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, part: bytes) -> None:
    """Length first, so that parts cannot run into each other."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if size <= WHOLE_FILE_BYTES:
            digest.update(stream.read())
            return
        header_size = int.from_bytes(stream.read(8), "little")
        _add(digest, stream.read(min(header_size, WHOLE_FILE_BYTES)))
        for sample in range(SAMPLES):
            stream.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
