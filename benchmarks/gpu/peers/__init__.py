"""Other attention kernels, each behind one function. None of their code is kept here.

A peer takes part where it is importable and can do what the cell asks for; otherwise it
says why not, in one line. Its result is compared with ours before its time counts. Peers
read the same cache where they can, and a copy in their own order where they cannot.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.gpu.inputs import Inputs

# Peers that round more than the cache to fp8, weights of the softmax among it, and how far
# their results may be from ours then.
MULTIPLIES_FP8 = {"FlashAttention-3": 0.1, "SGLang Triton": 0.1}

# Attention of one layer, given its number: [T, H, D].
Run = Callable[[int], Tensor]


class Unavailable(Exception):
    """Why a peer takes no part."""


@dataclass(frozen=True)
class Peer:
    """prepare: sets up for a cell; raises Unavailable. quantised_tolerance: how far a result
    may be from ours with an fp8 cache, if farther than usual."""

    name: str
    prepare: Callable[[Inputs], Run]
    quantised_tolerance: float = 0.0


def names() -> list[str]:
    """In the order of the tables. Known without an import of any of them."""
    return [
        "FlashAttention-3",
        "FlashInfer",
        "vLLM Triton",
        "SGLang Triton",
        "torch SDPA",
        "flex_attention",
    ]


def find(compiled: bool, dry: bool) -> dict[str, Peer]:
    """The peers of a cell. compiled: flex_attention too. dry: torch's fused attention only."""
    from benchmarks.gpu.peers import (
        flash3,
        flash_infer,
        sglang_triton,
        torch_attention,
        vllm_triton,
    )

    prepared = (
        flash3.prepare,
        flash_infer.prepare,
        vllm_triton.prepare,
        sglang_triton.prepare,
        torch_attention.prepare,
        torch_attention.prepare_compiled,
    )
    peers = dict(zip(names(), prepared, strict=True))
    if dry:
        peers = {"torch SDPA": torch_attention.prepare}
    elif not compiled:
        del peers["flex_attention"]
    return {
        name: Peer(name, prepare, MULTIPLIES_FP8.get(name, 0.0)) for name, prepare in peers.items()
    }


def known(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that this version of a function has."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


@lru_cache(maxsize=16)
def _import_first(names: tuple[str, ...]) -> ModuleType | str:
    """The module, or why there is none: an import that fails late is not tried again."""
    reason = ""
    for name in names:
        try:
            return importlib.import_module(name)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
    return reason


def import_first(names: tuple[str, ...]) -> ModuleType:
    """The first module that can be imported. Raises Unavailable where none can."""
    found = _import_first(names)
    if isinstance(found, str):
        raise Unavailable(f"not importable ({found})")
    return found
