"""Brings the weights of a model straight to where they stay, one tensor at a time.

The module is built without memory for its parameters. Each tensor of a checkpoint is then
read from its file, only as far as this rank holds it, and converted on the way: beyond what
stays, host memory holds the pages of one file, which the system may drop at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from data_plane.load_progress import LoadProgress
from data_plane.model_probe import ModelError, first_line
from data_plane.tensor_parallel import Shard

Shards = Mapping[str, Shard]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEM_BYTES = (
    dict.fromkeys(("F64", "I64", "U64"), 8)
    | dict.fromkeys(("F32", "I32", "U32"), 4)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 2)
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint: its file, its name there, its shape and safetensors dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The safetensors files of a model directory, by their headers; no weight is read.

    tensors: in the order of files and of bytes within them.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelError where files are absent or damaged."""
        self.path = path
        self.tensors = [stored for file in _files(path) for stored in _stored(file)]

    def dtype(self) -> torch.dtype:
        """That of the first floating-point tensor, float32 where there is none."""
        known = (_DTYPES.get(stored.dtype) for stored in self.tensors)
        return next((dtype for dtype in known if dtype is not None), torch.float32)


def build_module(architecture: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """A model whose parameters are on the meta device, and whose other buffers are real.

    dtype: of its parameters. attention: the registered function that its layers call.
    Buffers that no checkpoint holds, such as rotary frequencies, get their values here, on
    the CPU. Raises ModelError where the class does not take the config.
    """
    try:
        with torch.device("meta"):
            module = architecture._from_config(config, dtype=dtype, attn_implementation=attention)
        kept = module.state_dict().keys()
        for name, buffer in list(module.named_buffers()):
            if name not in kept:
                _place(module, name, torch.empty_like(buffer, device="cpu"))
        # What initialises a parameter has no effect on the meta device.
        module.initialize_weights()
    except Exception as error:
        raise ModelError(f"{config.model_type} cannot be built: {first_line(error)}") from error
    return module


def why_not_streamed(module: Any) -> str | None:
    """What a checkpoint of this model needs before it fits the module, beyond other names."""
    if getattr(module.config, "quantization_config", None) is not None:
        return "its weights are quantized"
    if any(isinstance(change, WeightConverter) for change in get_model_conversion_mapping(module)):
        return "its weights must be rearranged while they are loaded"
    return None


def read_weights(
    module: Any, checkpoint: Checkpoint, shards: Shards, device: torch.device, *, shown: bool = True
) -> None:
    """Fill a module of `build_module` from a checkpoint, on the device, in the module's dtypes.

    shards: which part this rank holds, by parameter; others it holds whole. shown: show
    how far it is. Raises ModelError where tensors are missing or have another shape, before
    any is read.
    """
    sources = _match(module, checkpoint)
    dtypes = _dtypes(module)
    slots = dict(module.state_dict(keep_vars=True))
    total = sum(_stored_nbytes(stored, shards.get(name)) for name, stored in sources.items())
    _move_buffers(module, device)
    with LoadProgress(total, shown=shown) as progress:
        for name, stored, whole in _opened(sources):
            shard = shards.get(name)
            shape = shard.shape(stored.shape) if shard else stored.shape
            part = torch.empty(shape, dtype=dtypes.get(name, slots[name].dtype), device=device)
            if shard:
                shard.copy(whole, part)
            else:
                part.copy_(whole[...])
            _place(module, name, part)
            progress.advance(_stored_nbytes(stored, shard))
    _tie(module, shards)


def make_weights(
    module: Any, shards: Shards, device: torch.device, *, seed: int = 0, shown: bool = True
) -> None:
    """Fill a module of `build_module` with random weights, as its class initialises them.

    Each layer draws from a generator of its own, seeded by its name: a rank's part is that
    part of what a group of one makes. Besides what stays, the device holds one layer whole.
    """
    _move_buffers(module, device)
    tied = set(_tied(module))
    dtypes = _dtypes(module)
    total = sum(_nbytes(given, shards.get(name)) for name, given in module.named_parameters())
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), LoadProgress(total, shown=shown) as progress:
        for prefix, layer in module.named_modules():
            own = {
                f"{prefix}.{leaf}".lstrip("."): parameter
                for leaf, parameter in layer.named_parameters(recurse=False)
            }
            own = {name: given for name, given in own.items() if name not in tied and given.is_meta}
            if not own:
                continue
            for name, given in own.items():
                _place(module, name, torch.zeros_like(given, device=device))
            digest = hashlib.sha256(f"{seed} {prefix}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "little"))
            _initialiser(module, prefix)(layer)
            for name, given in own.items():
                whole = module.get_parameter(name).detach()
                shard = shards.get(name)
                _place(module, name, _part(whole, shard, dtypes.get(name, given.dtype)))
                progress.advance(_nbytes(given, shard))
    _tie(module, shards)


def _files(path: Path) -> list[Path]:
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = path / _INDEX
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except FileNotFoundError:
        raise ModelError(f"{path} has neither {_SINGLE} nor {_INDEX}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {first_line(error)}") from error
    # A name is one of the directory's own files, whatever the index says.
    return [path / Path(str(name)).name for name in sorted(names)]


def _stored(file: Path) -> Iterator[Stored]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.offset_keys():
                header = opened.get_slice(name)
                yield Stored(file, name, tuple(header.get_shape()), header.get_dtype())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be loaded: {first_line(error)}") from error


def _opened(sources: Mapping[str, Stored]) -> Iterator[tuple[str, Stored, Any]]:
    """Yields name, tensor and a slice of it to read from; one file is open at a time."""
    by_file: dict[Path, list[tuple[str, Stored]]] = {}
    for name, stored in sources.items():
        by_file.setdefault(stored.file, []).append((name, stored))
    for file, tensors in by_file.items():
        try:
            with safe_open(file, framework="pt") as opened:
                for name, stored in tensors:
                    yield name, stored, opened.get_slice(stored.name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be loaded: {first_line(error)}") from error


def _match(module: Any, checkpoint: Checkpoint) -> dict[str, Stored]:
    """The checkpoint's tensor for each name of the module, in the checkpoint's order."""
    wanted = module.state_dict()
    found: dict[str, Stored] = {}
    for stored, name in _renamed(module, checkpoint.tensors, wanted):
        found.setdefault(name, stored)
    absent = wanted.keys() - found.keys()
    for target, source in _tied(module).items():
        if source in absent and target in found:
            # Some checkpoints keep the other one of the two names.
            found[source] = found.pop(target)
            absent.discard(source)
        if source not in absent:
            absent.discard(target)
    _refuse(checkpoint.path, "missing", absent)
    misshapen = [name for name in found if found[name].shape != tuple(wanted[name].shape)]
    _refuse(checkpoint.path, "mismatched", misshapen)
    return found


def _refuse(path: Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        raise ModelError(f"{path} has {len(names)} {what} keys: {names[0]}")


def _renamed(
    module: Any, tensors: Iterable[Stored], wanted: Mapping[str, Any]
) -> Iterator[tuple[Stored, str]]:
    """Yields those tensors that the module wants, with its names for them.

    A checkpoint may have the names of an older version, or those of the base model alone.
    """
    changes = get_model_conversion_mapping(module)
    prefix = f"{module.base_model_prefix}." if module.base_model_prefix else ""
    for stored in tensors:
        name = stored.name
        for change in changes:
            name, _ = change.rename_source_key(name)
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in wanted:
                yield stored, candidate
                break


def _tied(module: Any) -> dict[str, str]:
    """Names that share the parameter of another one, and that one's."""
    return dict(getattr(module, "all_tied_weights_keys", None) or {})


def _tie(module: Any, shards: Shards) -> None:
    """Let names that share a parameter share its memory, each with the part that it holds.

    Where a checkpoint has both and they differ, both stay.
    """
    for target, source in _tied(module).items():
        kept: Tensor = module.get_parameter(source)
        if target in shards:
            dim, ((start, stop),) = shards[target].dim, shards[target].ranges
            kept = kept.detach().narrow(dim, start, stop - start)
        present = module.get_parameter(target)
        if present.is_meta or torch.equal(present, kept):
            _place(module, target, kept)


def _part(whole: Tensor, shard: Shard | None, dtype: torch.dtype) -> Tensor:
    """The part of a tensor, in memory of its own unless it is the whole."""
    if shard is None:
        return whole.to(dtype)
    part = whole.new_empty(shard.shape(tuple(whole.shape)), dtype=dtype)
    shard.copy(whole, part)
    return part


def _place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for name, buffer in list(module.named_buffers()):
        if not buffer.is_meta:
            _place(module, name, buffer.to(device))


def _initialiser(module: Any, name: str) -> Any:
    """The function of the innermost model around a layer that gives it its first weights."""
    initialise = module._init_weights
    for part in name.split(".") if name else ():
        module = module.get_submodule(part)
        if isinstance(module, PreTrainedModel):
            initialise = module._init_weights
    return initialise


def _dtypes(module: Any) -> dict[str, torch.dtype]:
    """Parameters that a model wants in another dtype than it was built in."""
    kept: dict[str, torch.dtype] = module._get_dtype_plan(module.dtype)
    return {
        name: dtype
        for pattern, dtype in kept.items()
        for name in module.state_dict()
        if re.search(pattern.replace("*", ".*"), name)
    }


def _stored_nbytes(stored: Stored, shard: Shard | None) -> int:
    """How many bytes of a file a rank reads for its part of a tensor."""
    shape = shard.shape(stored.shape) if shard else stored.shape
    return math.prod(shape) * _ITEM_BYTES.get(stored.dtype, 1)


def _nbytes(whole: Tensor, shard: Shard | None) -> int:
    """How many bytes a rank's part of a parameter has."""
    shape = shard.shape(tuple(whole.shape)) if shard else whole.shape
    return math.prod(shape) * whole.dtype.itemsize
