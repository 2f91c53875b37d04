"""Divides a model among the ranks of a tensor parallel group.

Which layer is cut in which way is the model's own plan, as transformers has it, or one of
ours for an architecture that has none there. Query heads, their KV heads, the inner columns
of an MLP and the vocabulary of the output layer are divided; everything else each rank holds
whole. A layer pair costs one sum over the ranks, the logits one gather.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import ProcessGroup, Store
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from data_plane.model_probe import ModelError

Ranges = tuple[tuple[int, int], ...]

COLWISE = "colwise"
ROWWISE = "rowwise"
GATHERED = {"colwise_gather_output", "colwise_rep"}
# The embedding is kept whole whatever the plan says: its rows are small beside the layers,
# and a lookup then needs no message.
REPLICATED = {"replicated", "replicated_with_grad_allreduce", "embedding_rowwise"}

# Plans of architectures that transformers has none for, relative to the base model.
_PLANS: dict[str, dict[str, str]] = {
    "opt": {
        "decoder.layers.*.self_attn.q_proj": COLWISE,
        "decoder.layers.*.self_attn.k_proj": COLWISE,
        "decoder.layers.*.self_attn.v_proj": COLWISE,
        "decoder.layers.*.self_attn.out_proj": ROWWISE,
        "decoder.layers.*.fc1": COLWISE,
        "decoder.layers.*.fc2": ROWWISE,
    },
    "gpt2": {
        "h.*.attn.c_attn": COLWISE,
        "h.*.attn.c_proj": ROWWISE,
        "h.*.mlp.c_fc": COLWISE,
        "h.*.mlp.c_proj": ROWWISE,
    },
}


class TensorGroup:
    """The processes that hold one model together, as seen from one of them.

    Every rank calls the same collectives in the same order. A group of one needs no
    process group, and its collectives return at once. Neither collective on tensors
    waits on the host or sends Python objects, so CUDA graphs can capture both.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device | str = "cpu",
        process_group: ProcessGroup | None = None,
    ) -> None:
        """process_group: None means the default one, where size is above 1.

        Raises ValueError for a rank that is not below the size.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not one of {size}")
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        self._process_group = process_group

    @classmethod
    def alone(cls) -> TensorGroup:
        """The group of one process that holds the whole model."""
        return cls(0, 1)

    @classmethod
    def join(
        cls,
        rank: int,
        size: int,
        store: Store,
        device: torch.device | str = "cpu",
        timeout: timedelta = timedelta(minutes=10),
    ) -> TensorGroup:
        """Meet the other ranks at the store: with NCCL on a CUDA device, else with gloo.

        store: one that all ranks reach. timeout: how long to wait for the others, here
        and in every collective. Raises what torch.distributed raises when they do not come.
        """
        device = torch.device(device)
        on_cuda = device.type == "cuda"
        # The engine notices dead and hung ranks itself, and says why it ends; NCCL's own watchdog
        # would end the process first, without a reason.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if on_cuda else None,
        )
        return cls(rank, size, device)

    def leave(self) -> None:
        """End the process group that `join` made; the group must not be used after that."""
        if self.size > 1:
            dist.destroy_process_group(self._process_group)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor of any shape by its sum over the ranks, in its dtype."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._process_group)

    def gather_columns(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor [..., N], side by side in rank order: [..., size * N].

        All ranks give the same shape and dtype and get the same result.
        """
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty((self.size, *tensor.shape))
        parts = gathered.view(self.size * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(parts, tensor.contiguous(), group=self._process_group)
        return gathered.movedim(0, -2).flatten(-2)

    def minimum(self, value: int) -> int:
        """The least of the ranks' values. It waits for all ranks."""
        if self.size == 1:
            return value
        least = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._process_group)
        return int(least)

    def agrees(self, value: int) -> bool:
        """Whether all ranks have the same value, of 62 bits at most. It waits for all ranks."""
        return self.minimum(value) == -self.minimum(-value)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Let no rank go on alone to where it would wait for the others.

        Where what is within raises on one rank, the others raise ModelError when they
        reach the end.
        """
        try:
            yield
        except Exception:
            # What this rank has to say matters more than that the others are gone too.
            with suppress(RuntimeError):
                self.minimum(0)
            raise
        if not self.minimum(1):
            raise ModelError("another rank cannot serve the model")


ALONE = TensorGroup.alone()


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a parameter that a rank holds: ranges of one dimension, one after another."""

    dim: int
    ranges: Ranges

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape, given the whole's."""
        width = sum(stop - start for start, stop in self.ranges)
        return (*whole[: self.dim], width, *whole[self.dim + 1 :])

    def pieces(self, whole: Any) -> Iterator[tuple[int, Tensor]]:
        """Yields each range of the whole with where it begins in the part.

        whole: a tensor, or a slice of safetensors, of which then no more is read.
        """
        offset = 0
        for start, stop in self.ranges:
            if stop > start:
                yield offset, whole[(slice(None),) * self.dim + (slice(start, stop),)]
            offset += stop - start

    def copy(self, whole: Any, part: Tensor) -> None:
        """Write the ranges of the whole into the part, which gives dtype and device."""
        for offset, piece in self.pieces(whole):
            part.narrow(self.dim, offset, piece.shape[self.dim]).copy_(piece)


@dataclass(frozen=True, slots=True)
class _Heads:
    """How one rank's heads lie among those of the model."""

    count: int
    kv_count: int
    size: int
    local: range
    local_kv: range

    @classmethod
    def of(cls, config: Any, group: TensorGroup) -> _Heads:
        """Raises ModelError where the ranks cannot share the heads."""
        count = getattr(config, "num_attention_heads", None)
        kv_count = getattr(config, "num_key_value_heads", None) or count
        if not isinstance(count, int) or not isinstance(kv_count, int):
            raise ModelError("its config does not say how many heads all layers have")
        head_size = getattr(config, "head_dim", None) or config.hidden_size // count
        if count % group.size:
            raise ModelError(f"its {count} query heads do not divide among {group.size} ranks")
        if kv_count % group.size and group.size % kv_count:
            raise ModelError(
                f"its {kv_count} KV heads do not divide among {group.size} ranks, "
                f"nor {group.size} ranks among them"
            )
        # With fewer KV heads than ranks, neighbouring ranks hold the same one: their
        # query heads all belong to it.
        each = max(1, kv_count // group.size)
        first = group.rank * kv_count // group.size
        share = count // group.size
        local = range(group.rank * share, (group.rank + 1) * share)
        return cls(count, kv_count, head_size, local, range(first, first + each))

    def columns(self, kind: str) -> tuple[int, Ranges] | None:
        """How many columns a projection of this name makes of all heads, and a rank's ranges.

        None for a name that is not known.
        """
        size, mine, kv = self.size, self.local, self.local_kv
        if kind == "q_proj":
            return self.count * size, ((mine.start * size, mine.stop * size),)
        if kind in ("k_proj", "v_proj"):
            return self.kv_count * size, ((kv.start * size, kv.stop * size),)
        if self.count != self.kv_count:
            return None
        whole = self.count * size
        if kind == "query_key_value":
            # Query, key and value of a head lie together.
            return 3 * whole, ((mine.start * 3 * size, mine.stop * 3 * size),)
        if kind == "c_attn":
            # All queries, then all keys, then all values.
            blocks = (block * whole for block in range(3))
            return 3 * whole, tuple(
                (at + mine.start * size, at + mine.stop * size) for at in blocks
            )
        return None


@dataclass
class Partition:
    """What one rank holds of a model.

    shards: by parameter name, those that are held in part. kv_head_count: that of the whole
    model, None for a group of one, which need not ask. local_kv_head_count: this rank's,
    which begin at first_kv_head.
    """

    group: TensorGroup
    shards: dict[str, Shard] = field(default_factory=dict)
    kv_head_count: int | None = None
    local_kv_head_count: int | None = None
    first_kv_head: int = 0
    _styles: dict[str, str] = field(default_factory=dict)
    _attributes: dict[str, dict[str, int]] = field(default_factory=dict)

    # Which attributes of an attention layer count its heads or their columns.
    _HEADS: ClassVar = ("num_heads", "num_attention_heads")
    _KV_HEADS: ClassVar = ("num_key_value_heads", "num_kv_heads")
    _WIDTHS: ClassVar = ("embed_dim", "split_size")

    @classmethod
    def of(cls, module: Any, group: TensorGroup) -> Partition:
        """Divide a model of transformers, whose parameters still have their whole shapes.

        Nothing of the module is changed or read but names and shapes: it may be on the
        meta device. Raises ModelError with what stands in the way.
        """
        partition = cls(group)
        if group.size > 1:
            heads = _Heads.of(module.config.get_text_config(), group)
            partition.kv_head_count = heads.kv_count
            partition.local_kv_head_count = len(heads.local_kv)
            partition.first_kv_head = heads.local_kv.start
            partition._styles = _styles(module)
            partition._divide(module, heads)
        return partition

    def apply(self, module: Any) -> None:
        """Make the layers of a module whose weights are this rank's parts work together.

        A layer with divided input sums its output over the ranks, the output layer gathers
        its columns, and attention layers are told how many heads they have.
        """
        for name, values in self._attributes.items():
            layer = module.get_submodule(name)
            for attribute, value in values.items():
                setattr(layer, attribute, value)
        for name, style in self._styles.items():
            layer = module.get_submodule(name)
            if style == ROWWISE:
                bias, layer.bias = layer.bias, None
                if isinstance(layer, Conv1D):
                    # It has no form without a bias.
                    layer.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
                layer.register_forward_hook(_sum_output(self.group, bias))
            elif style in GATHERED:
                width = _width(layer, 0)
                layer.register_forward_hook(_gather_output(self.group, width))
            if style in (COLWISE, ROWWISE):
                _set_widths(layer)

    def _divide(self, module: Any, heads: _Heads) -> None:
        plan, self._styles = self._styles, {}
        for name, layer in module.named_modules():
            style = plan.get(_pattern(name))
            if style is None or style in REPLICATED:
                continue
            if not isinstance(layer, nn.Linear | Conv1D) or not self._take(
                name, layer, style, heads
            ):
                raise ModelError(f"{name} is {style} among ranks, which is not supported")
            self._styles[name] = style
        for name, _ in module.named_parameters():
            style = plan.get(_pattern(name), "replicated")
            if style not in REPLICATED:
                raise ModelError(f"{name} is {style} among ranks, which is not supported")
        self._check_attention(module, heads)

    def _take(self, name: str, layer: nn.Module, style: str, heads: _Heads) -> bool:
        """Note this rank's part of a layer; False for a style that is not known."""
        if style == COLWISE:
            ranges = self._ranges(name, layer, heads, outputs=True)
        elif style == ROWWISE:
            ranges = self._ranges(name, layer, heads, outputs=False)
        elif style in GATHERED:
            width = _width(layer, 0)
            share = -(-width // self.group.size)
            start = min(self.group.rank * share, width)
            ranges = ((start, min(start + share, width)),)
        else:
            return False
        along = int((style == ROWWISE) != isinstance(layer, Conv1D))
        self.shards[f"{name}.weight"] = Shard(along, ranges)
        if style != ROWWISE and layer.bias is not None:
            self.shards[f"{name}.bias"] = Shard(0, ranges)
        return True

    def _ranges(self, name: str, layer: nn.Module, heads: _Heads, *, outputs: bool) -> Ranges:
        """This rank's output or input columns of a layer."""
        width = _width(layer, 0 if outputs else 1)
        parent, _, kind = name.rpartition(".")
        if _is_attention(parent):
            columns = heads.columns(kind if outputs else "q_proj")
            if columns is None or columns[0] != width:
                raise ModelError(f"{name} of {width} columns does not divide by heads")
            self._attributes.setdefault(parent, {})
            return columns[1]
        if width % self.group.size:
            raise ModelError(
                f"{name} of {width} columns does not divide among {self.group.size} ranks"
            )
        share = width // self.group.size
        return ((self.group.rank * share, (self.group.rank + 1) * share),)

    def _check_attention(self, module: Any, heads: _Heads) -> None:
        """See that every attention layer is divided, and nothing in it is left that counts heads.

        Its attributes that do are noted.
        """
        kind = module.config.model_type
        layers = module.config.get_text_config().num_hidden_layers
        if len(self._attributes) != layers:
            raise ModelError(f"{kind} has no plan to divide its attention among ranks")
        count, kv_count = len(heads.local), len(heads.local_kv)
        values = dict.fromkeys(self._HEADS, count) | dict.fromkeys(self._KV_HEADS, kv_count)
        values |= dict.fromkeys(self._WIDTHS, count * heads.size)
        values["num_key_value_groups"] = count // kv_count
        for name, attributes in self._attributes.items():
            layer = module.get_submodule(name)
            attributes.update({key: value for key, value in values.items() if hasattr(layer, key)})
            for own, parameter in layer.named_parameters(prefix=name):
                divided = own.rpartition(".")[0] in self._styles
                if not divided and parameter.shape != (heads.size,):
                    raise ModelError(f"{own} belongs to all heads and cannot be divided")


def _styles(module: Any) -> dict[str, str]:
    """The plan of a model: styles by name of layer, with * for numbers."""
    config = module.config
    plan = getattr(config, "base_model_tp_plan", None) or _PLANS.get(config.model_type, {})
    prefix = f"{module.base_model_prefix}." if module.base_model_prefix else ""
    styles = {"lm_head": "colwise_gather_output"}
    styles |= {prefix + name: style for name, style in plan.items()}
    return styles | (type(module)._tp_plan or {})


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _is_attention(name: str) -> bool:
    return "att" in name.rpartition(".")[2]


def _width(layer: Any, side: int) -> int:
    """How many output (side 0) or input (side 1) columns a whole layer has."""
    if isinstance(layer, Conv1D):
        return int((layer.nf, layer.nx)[side])
    return int((layer.out_features, layer.in_features)[side])


def _set_widths(layer: Any) -> None:
    """Give a layer the widths of its weight."""
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape


Hook = Callable[[nn.Module, Any, Tensor], Tensor]


def _sum_output(group: TensorGroup, bias: Tensor | None) -> Hook:
    """Adds up what the ranks made of their columns; the bias is added once, to the sum."""

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        group.all_reduce(output)
        return output if bias is None else output.add_(bias)

    return hook


def _gather_output(group: TensorGroup, width: int) -> Hook:
    """Puts the ranks' columns side by side: [..., width], the same on all ranks.

    All but the last ranks have equally many, so that padding is found at the end alone.
    """
    share = -(-width // group.size)

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if missing := share - output.shape[-1]:
            output = functional.pad(output, (0, missing))
        return group.gather_columns(output)[..., :width].contiguous()

    return hook
