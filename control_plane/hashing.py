"""Prefix hashes: names for full blocks that depend on every token before them.

A block's hash is the first 128 bits of SHA-256 over a length-prefixed, domain-tagged encoding of
everything that decides its keys and values: schema, model fingerprint, block size, salt, the
parent's hash and the block's own token ids. Two blocks with the same hash are interchangeable;
two tenants with different salts never share one, but for the blocks of a registered prefix at the
beginning of their prompts: those are hashed as if there were no salt, and what follows them is
chained to the salt again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 16
_SCHEMA = b"quire.prefix.v1"


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + len(value).to_bytes(4, "little") + value


class PrefixHasher:
    """Hashes token ids in chained blocks for one model and one salt.

    Args:
        model_fingerprint: identity of weights and configuration.
        block_size: tokens per block.
        salt: the tenant's, so that tenants cannot see each other's hits by timing; empty for
            prefixes that all tenants share.
    """

    def __init__(self, model_fingerprint: str, block_size: int, salt: str = "") -> None:
        self._block_size = block_size
        geometry = b"".join(
            (
                _field(b"schema", _SCHEMA),
                _field(b"model", model_fingerprint.encode()),
                _field(b"block", block_size.to_bytes(4, "little")),
            )
        )
        self._salt = _field(b"salt", salt.encode()) if salt else b""
        self._root = _digest(geometry + _field(b"salt", salt.encode()))
        self._shared_root = _digest(geometry + _field(b"salt", b""))
        self._token_tag = b"tokens" + (4 * block_size).to_bytes(4, "little")

    def extend(self, hashes: Sequence[bytes], tokens: np.ndarray, shared: int = 0) -> list[bytes]:
        """Returns the hashes of the full blocks of `tokens` that `hashes` does not cover yet.

        Args:
            hashes: those of the first ``len(hashes)`` blocks.
            tokens: int32 [n], the whole sequence so far.
            shared: leading blocks that are hashed without the salt.
        """
        size, tag = self._block_size, self._token_tag
        data = np.ascontiguousarray(tokens, dtype="<i4").tobytes()
        root = self._shared_root if shared else self._root
        parent = hashes[-1] if hashes else root
        added = []
        for block in range(len(hashes), len(data) // (4 * size)):
            if block == shared and block and self._salt:
                parent = _digest(self._salt + b"parent" + parent)
            content = data[block * size * 4 : (block + 1) * size * 4]
            parent = _digest(b"parent" + parent + tag + content)
            added.append(parent)
        return added


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:HASH_BYTES]
