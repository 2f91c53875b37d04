"""Paged attention and block moves over a KV cache that is cut into blocks.

Every operation exists in plain torch, which is the CPU path and the oracle of the
faster ones, and in Triton; `ops.py` chooses between them. The package imports torch,
triton and the standard library only.

It shares its name with an optional package that transformers probes for by
version, so it must never carry a version attribute.
"""

from kernels.batch import AttentionBatch, upload
from kernels.checks import serves_head_size
from kernels.ops import (
    copy_blocks,
    layer_attention,
    paged_attention,
    present,
    swap_blocks,
    write_cache,
)
from kernels.warming import steps_of_all_kinds

__all__ = [
    "AttentionBatch",
    "copy_blocks",
    "layer_attention",
    "paged_attention",
    "present",
    "serves_head_size",
    "steps_of_all_kinds",
    "swap_blocks",
    "upload",
    "write_cache",
]
