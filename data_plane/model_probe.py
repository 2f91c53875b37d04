"""Runs three tokens through a model and sees what each layer asks of its attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

PROBE = "quire_probe"
# What layers may pass to attention that changes nothing in it, and the sinks.
KNOWN_TENSORS = {"position_ids", "cache_position", "position_embeddings", "s_aux"}


class ModelError(Exception):
    """Why a model cannot be served, in one sentence."""


@dataclass(frozen=True)
class Geometry:
    """What the cache must hold for each token, and how many logits a token has."""

    layer_count: int
    kv_head_count: int
    head_size: int
    vocabulary_size: int


@torch.inference_mode()
def probe(module: Any, device: torch.device) -> Geometry:
    """Hold what the layers of a transformers model ask for against what the kernels can do.

    Raises ModelError where they ask for more. The module is left with the probe as
    its attention.
    """
    global _recorder
    layer_count = module.config.get_text_config().num_hidden_layers
    _recorder = _Recorder()
    module.set_attn_implementation(PROBE)
    try:
        output = module(
            input_ids=torch.zeros((1, 3), dtype=torch.int64, device=device),
            position_ids=torch.arange(3, device=device)[None],
            use_cache=False,
            logits_to_keep=torch.tensor([2], device=device),
            quire_step=_recorder,
        )
    except Exception as error:
        raise ModelError(f"a probe of the model failed: {first_line(error)}") from error
    finally:
        calls, _recorder = _recorder.calls, _Recorder()
    if sorted(str(call.layer) for call in calls) != sorted(str(at) for at in range(layer_count)):
        raise ModelError(
            f"its {layer_count} layers made {len(calls)} attention calls, not one each in order"
        )
    for call in calls:
        _check_call(call)
    shapes = {(call.heads, call.kv_heads, call.head_size) for call in calls}
    if len(shapes) != 1:
        raise ModelError("its layers differ in heads or head size, which one cache cannot hold")
    _, kv_head_count, head_size = shapes.pop()
    if output.logits.shape[:2] != (1, 1):
        raise ModelError("it does not return logits for chosen tokens only")
    return Geometry(layer_count, kv_head_count, head_size, output.logits.shape[-1])


def window_of(module: Any, kwargs: dict[str, Any]) -> int | None:
    """The layer's window: what it passes, or else what it carries; 0 and None mean none."""
    if "sliding_window" in kwargs:
        return kwargs["sliding_window"] or None
    return getattr(module, "sliding_window", None) or None


@dataclass
class _Call:
    """What one layer asked of its attention."""

    layer: Any
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    window: int | None
    passes_keywords: bool
    mask: Any
    unknown: list[str]


@dataclass
class _Recorder:
    """Collects the probe's calls, and the mask rule that the model made for each layer."""

    calls: list[_Call] = field(default_factory=list)
    masks: list[tuple[Tensor, Any]] = field(default_factory=list)

    def mask_of(self, attention_mask: Tensor | None) -> Any:
        for mask, rule in self.masks:
            if attention_mask is mask:
                return rule
        return None


_recorder = _Recorder()


def _record(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    quire_step: _Recorder | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands in for the attention during the probe."""
    unknown = [
        name
        for name, given in kwargs.items()
        if isinstance(given, Tensor) and name not in KNOWN_TENSORS
    ]
    _recorder.calls.append(
        _Call(
            getattr(module, "layer_idx", None),
            query.shape[1],
            key.shape[1],
            key.shape[3],
            value.shape[3],
            window_of(module, kwargs),
            quire_step is _recorder,
            _recorder.mask_of(attention_mask),
            unknown,
        )
    )
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _record_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any, **kwargs: Any
) -> Tensor:
    """A mask that hides nothing and is remembered by identity, with the rule behind it."""
    mask = torch.ones(
        batch_size, 1, q_length, kv_length, dtype=torch.bool, device=kwargs.get("device")
    )
    _recorder.masks.append((mask, mask_function))
    return mask


AttentionInterface.register(PROBE, _record)
AttentionMaskInterface.register(PROBE, _record_mask)


def _check_call(call: _Call) -> None:
    if not call.passes_keywords:
        raise ModelError("its layers do not hand keyword arguments on to their attention")
    if call.unknown:
        raise ModelError(f"its attention takes {call.unknown[0]}, which is not supported")
    if call.head_size != call.value_size:
        raise ModelError(
            f"its key heads ({call.head_size}) and value heads ({call.value_size}) differ in size"
        )
    if call.heads % call.kv_heads:
        raise ModelError(f"{call.heads} query heads do not divide among {call.kv_heads} KV heads")
    if call.mask is None:
        raise ModelError("its attention does not take a mask that transformers makes")
    # The mask rule is asked far out, where windows, chunks and prefixes show.
    here = 1 << 20
    expected = {here: True, here + 1: False}
    if call.window is None:
        expected |= {0: True, here // 2: True}
    else:
        expected |= {here - call.window + 1: True, here - call.window: False, 0: False}
    zero, query = torch.tensor(0), torch.tensor(here)
    for key, seen in expected.items():
        if bool(call.mask(zero, zero, query, torch.tensor(key))) != seen:
            raise ModelError("its attention mask is neither causal nor a sliding window")


def first_line(error: BaseException) -> str:
    """What an exception says, in a line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
