"""The scales of a KV cache of fp8: what a number in the cache is multiplied by.

A cache of float8_e4m3fn keeps each key and value in units of a scale, one for each layer
and KV head, for keys and for values. Scales are known before the first token is written and
never change in the life of an engine, because blocks outlive the sequence that wrote them:
they are shared, cached, swapped out and in, and a block is bytes without a scale of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

KV_DTYPE = torch.float8_e4m3fn
# The largest number of the type.
MOST = torch.finfo(KV_DTYPE).max
# Beside the weights, but no safetensors: whoever loads a model takes each of those for weights.
FILE_NAME = "kv_scales.json"
SCHEMA = "quire.kv_scales.v1"

# Checkpoints of llm-compressor and others: model.layers.3.self_attn.k_scale, v_scale.
_CHECKPOINT_NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:\w+\.)*([kv])_scale$")


class ScaleError(ValueError):
    """Scales that a cache cannot have, in one sentence that names the tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class KVScales:
    """What keys and values in the cache are multiplied by: fp32 [layers, Hkv] each, in host memory.

    They are positive and finite, or ScaleError is raised. A value beyond 448 times its scale
    is cut off when it is written. whole: where these are one rank's, the digest of those of
    all heads.
    """

    keys: Tensor
    values: Tensor
    whole: str = ""

    def __post_init__(self) -> None:
        if self.keys.shape != self.values.shape or self.keys.dim() != 2:
            raise ScaleError(
                f"scales must be [layers, KV heads], not {list(self.keys.shape)} for keys "
                f"and {list(self.values.shape)} for values"
            )
        for layer, rows in enumerate(zip(self.keys, self.values, strict=True)):
            for kind, row in zip(("key", "value"), rows, strict=True):
                _check_numbers(_name(layer, kind), row)

    @classmethod
    def of_amax(cls, keys: Tensor, values: Tensor, margin: float) -> KVScales:
        """Scales under which `margin` times the largest magnitudes seen still fit.

        keys, values: [layers, Hkv], largest magnitudes. Scales are powers of two, rounded up:
        e4m3 is a floating-point type, so a number keeps the same significant bits whatever the
        scale, as long as it is within the type's range. Dividing and multiplying by a power of
        two rounds nothing, and what two engines read back is the same number even where their
        scales differ. A head of zeros gets 1. Raises ScaleError for NaN and infinity.
        """
        for layer, rows in enumerate(zip(keys, values, strict=True)):
            for kind, row in zip(("key", "value"), rows, strict=True):
                if not bool(row.isfinite().all()):
                    raise ScaleError(f"layer {layer} has {kind}s of {row.abs().max().item()}")

        def rounded(amax: Tensor) -> Tensor:
            scales = torch.exp2(torch.ceil(torch.log2(amax.double() * margin / MOST)))
            # The least scale that fp32 divides by without loss is far below any real one.
            return torch.where(amax > 0, scales.clamp(min=2.0**-100), 1.0).float().cpu()

        return cls(rounded(keys), rounded(values))

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the scales of all heads: on all ranks of a group the same."""
        if self.whole:
            return self.whole
        digest = hashlib.sha256(SCHEMA.encode())
        for rows in (self.keys, self.values):
            digest.update(json.dumps(rows.tolist()).encode())
        return digest.hexdigest()

    def of_rank(self, rank: int, rank_count: int) -> KVScales:
        """The scales of the heads that one rank of a tensor-parallel group holds.

        Each rank has an equal, contiguous share of the heads; where there are fewer heads than
        ranks, neighbouring ranks hold the same one. Raises ScaleError where neither divides
        the other.
        """
        heads = self.keys.shape[1]
        if not 0 <= rank < rank_count:
            raise ScaleError(f"there is no rank {rank} of {rank_count}")
        if heads % rank_count and rank_count % heads:
            raise ScaleError(f"{heads} KV heads do not divide among {rank_count} ranks")
        share = max(heads // rank_count, 1)
        first = rank * heads // rank_count
        mine = slice(first, first + share)
        return KVScales(self.keys[:, mine].clone(), self.values[:, mine].clone(), self.digest)


def cache_dtype(model_dtype: torch.dtype, scales: KVScales | None) -> torch.dtype:
    """The dtype of a cache: the model's, or with scales float8_e4m3fn."""
    return model_dtype if scales is None else KV_DTYPE


def write_scales(path: Path, scales: KVScales, made: dict[str, Any]) -> None:
    """Writes scales to a file as JSON. made: how they came about, for people who read it."""
    layers = {
        _name(layer, kind): rows[layer].tolist()
        for layer in range(scales.keys.shape[0])
        for kind, rows in (("key", scales.keys), ("value", scales.values))
    }
    path.write_text(json.dumps({"schema": SCHEMA, "made": made, "scales": layers}, indent=1) + "\n")


def read_scales(path: Path, layer_count: int, kv_head_count: int) -> KVScales:
    """Reads what `write_scales` wrote for a model of so many layers and KV heads.

    Raises ScaleError, naming the tensor, where the file is not that.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ScaleError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ScaleError(f"{path} is no file of scales: it does not say {SCHEMA}")
    layers = content.get("scales")
    if not isinstance(layers, dict):
        raise ScaleError(f"{path} has no scales")
    found = {}
    for name, row in layers.items():
        if not isinstance(row, list) or not all(isinstance(one, int | float) for one in row):
            raise ScaleError(f"{path}: {name} is no list of numbers")
        found[name] = torch.tensor(row, dtype=torch.float32)
    names = [[_name(layer, kind) for kind in ("key", "value")] for layer in range(layer_count)]
    return _assemble(path, found, names, kv_head_count)


def read_checkpoint_scales(path: Path, layer_count: int, kv_head_count: int) -> KVScales | None:
    """The scales that a model directory has among its weights; None where it has none at all.

    Checkpoints made by llm-compressor carry a `k_scale` and a `v_scale` for each layer, of one
    number or one a head. Raises ScaleError, naming the tensor, for those that do not fit the
    model, are missing for some layers, or were made for another type than fp8.
    """
    found: dict[str, Tensor] = {}
    names: list[list[str]] = [["", ""] for _ in range(layer_count)]
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    match = _CHECKPOINT_NAME.search(name)
                    if match is None:
                        continue
                    if int(match[1]) >= layer_count:
                        raise ScaleError(f"{file}: {name} is of a layer that the model has not")
                    found[name] = tensors.get_tensor(name).float().flatten()
                    names[int(match[1])]["kv".index(match[2])] = name
        except (OSError, SafetensorError) as error:
            raise ScaleError(f"{file} cannot be read: {error}") from error
    if not found:
        return None
    _check_scheme(path)
    for layer, pair in enumerate(names):
        for at, kind in enumerate("kv"):
            pair[at] = pair[at] or f"the {kind}_scale of layer {layer}"
    return _assemble(path, found, names, kv_head_count)


def _check_scheme(path: Path) -> None:
    """Scales of another type than e4m3 are in other units."""
    config = json.loads((path / "config.json").read_text())
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme") or {}
    kind = f"{scheme.get('type', 'float')} of {scheme.get('num_bits', 8)} bits"
    if kind != "float of 8 bits":
        raise ScaleError(f"{path}: its k_scale and v_scale are for a cache of {kind}, not fp8")


def _assemble(
    path: Path, found: dict[str, Tensor], names: list[list[str]], kv_head_count: int
) -> KVScales:
    """Rows of keys and values by layer. names: of each layer's keys and values in the file."""
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in names:
        for rows, name in zip(kinds, pair, strict=True):
            if name not in found:
                raise ScaleError(f"{path} lacks {name}")
            row = found.pop(name)
            if row.numel() not in (1, kv_head_count):
                raise ScaleError(
                    f"{path}: {name} has {row.numel()} scales for {kv_head_count} KV heads"
                )
            _check_numbers(f"{path}: {name}", row)
            rows.append(row.expand(kv_head_count))
    if found:
        raise ScaleError(f"{path}: {min(found)} is of a layer that the model has not")
    keys, values = kinds
    return KVScales(torch.stack(keys), torch.stack(values))


def _check_numbers(name: str, row: Tensor) -> None:
    wrong = row[~((row > 0) & row.isfinite())]
    if row.dtype != torch.float32 or wrong.numel():
        what = f"a scale of {wrong[0].item():g}" if wrong.numel() else f"scales of {row.dtype}"
        raise ScaleError(f"{name} has {what}; scales are positive fp32 numbers")


def _name(layer: int, kind: str) -> str:
    return f"layers.{layer}.{kind}_scales"
