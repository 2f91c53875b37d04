"""Loads a model whose code is transformers' own, and runs it over the paged KV cache.

Every attention layer of a supported model calls one registered function, with its
scale, window, softcap and sinks. A batch is packed as one row of tokens, [1, T]:
which sequence a token belongs to is known to the attention alone. Before a model
is accepted a probe runs three tokens through it and sees what each layer asks of
its attention; what the kernels cannot do is refused here, with the reason.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

import kernels
from data_plane.fingerprint import fingerprint
from data_plane.kv_cache import KVCache
from kernels import AttentionBatch

PAGED = "quire_paged"
PROBE = "quire_probe"
# What layers may pass to attention that changes nothing in it.
HARMLESS_TENSORS = {"position_ids", "cache_position", "position_embeddings", "attention_mask"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelError(Exception):
    """Why a model cannot be served, in one sentence."""


@dataclass(frozen=True)
class ModelFacts:
    """What the other plane needs to know of a model.

    fingerprint: hex SHA-256 of config, dtype and weights. vocabulary_size: logits
    of a row. max_model_length: tokens of prompt and output together.
    eos_token_ids: any of them ends a sequence; empty if the model names none.
    """

    name: str
    fingerprint: str
    layer_count: int
    kv_head_count: int
    head_size: int
    dtype: torch.dtype
    vocabulary_size: int
    max_model_length: int
    eos_token_ids: tuple[int, ...]


class Model:
    """A loaded model. One thread at a time may run it."""

    def __init__(self, module: Any, facts: ModelFacts, device: torch.device) -> None:
        self.facts = facts
        self.device = device
        self._module = module

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        logit_rows: Tensor,
    ) -> Tensor:
        """Compute T tokens, write their keys and values, return logits [R, vocabulary_size].

        token_ids, positions: int64 [T]. logit_rows: int64 [R], the tokens whose
        logits are wanted. All on the model's device; the logits come in its dtype.
        """
        output = self._module(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
            quire_step=_Step(batch, cache),
        )
        logits: Tensor = output.logits[0]
        return logits

    def warm_up(self) -> None:
        """Run a small prefill and decode, so that the first request does not pay for set-up."""
        facts = self.facts
        geometry = (facts.kv_head_count, 16, facts.head_size, facts.dtype, self.device)
        cache = KVCache(facts.layer_count, 1, 0, *geometry)
        for start, count in ((0, 8), (8, 1)):
            positions = torch.arange(start, start + count)
            batch = AttentionBatch.build(
                torch.tensor([0, count], dtype=torch.int32),
                torch.tensor([start + count], dtype=torch.int32),
                torch.zeros((1, 1), dtype=torch.int32),
                positions,
                decode_count=int(count == 1),
                device=self.device,
            )
            positions = positions.to(self.device)
            self.forward(torch.zeros_like(positions), positions, batch, cache, positions[:1] * 0)


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    device: torch.device | str = "cpu",
    name: str | None = None,
) -> Model:
    """Load the model in a directory, or make one with random weights from its config alone.

    dtype: auto (what the checkpoint was saved in), float32, bfloat16 or float16.
    load_format: safetensors, or dummy, which needs no weights and makes the same
    ones each time. name: defaults to the directory's. Raises ModelError with the
    reason where the model cannot be served. No code of the checkpoint is ever run.
    """
    path = Path(path)
    raw = _read_config(path)
    if load_format == "safetensors":
        _check_weights(path)
    elif load_format != "dummy":
        raise ModelError(f"load format {load_format!r} is neither safetensors nor dummy")
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{path / 'config.json'}: {_first_line(error)}") from error
    architecture = _architecture(config, raw)
    device = torch.device(device)
    if device.type == "cpu":
        _keep_freed_memory()
    wanted = DTYPES.get(dtype, "auto")
    if load_format == "dummy":
        module = _make_dummy(architecture, config, wanted, device)
    else:
        module = _load(architecture, path, wanted).to(device)
    module.eval().requires_grad_(False)
    # With a padding token, some models look for it in the input of every step.
    module.config.get_text_config().pad_token_id = None
    geometry = _probe(module, device)
    facts = ModelFacts(
        name=name or path.resolve().name,
        fingerprint=fingerprint(path, module.dtype, dummy=load_format == "dummy"),
        layer_count=geometry.layer_count,
        kv_head_count=geometry.kv_head_count,
        head_size=geometry.head_size,
        dtype=module.dtype,
        vocabulary_size=geometry.vocabulary_size,
        max_model_length=_max_length(config),
        eos_token_ids=_eos_token_ids(path, raw),
    )
    return Model(module, facts, device)


@dataclass(frozen=True, slots=True)
class _Step:
    """What a forward pass hands through the model's code to its attention."""

    batch: AttentionBatch
    cache: KVCache


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    quire_step: _Step,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention: query [1, H, T, D], key and value [1, Hkv, T, D]."""
    batch, layer = quire_step.batch, module.layer_idx
    keys, values = quire_step.cache.keys(layer), quire_step.cache.values(layer)
    kernels.write_cache(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, batch)
    result = kernels.paged_attention(
        query[0].transpose(0, 1),
        keys,
        values,
        batch,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=_window(module, kwargs),
        softcap=softcap,
        sinks=s_aux,
    )
    return result[None], None


def _window(module: Any, kwargs: dict[str, Any]) -> int | None:
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands in for the attention during the probe."""
    known = HARMLESS_TENSORS | {"s_aux"}
    unknown = [
        name for name, given in kwargs.items() if isinstance(given, Tensor) and name not in known
    ]
    _recorder.calls.append(
        _Call(
            getattr(module, "layer_idx", None),
            query.shape[1],
            key.shape[1],
            key.shape[3],
            value.shape[3],
            _window(module, kwargs),
            _recorder.mask_of(attention_mask),
            unknown,
        )
    )
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


def _record_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any, **kwargs: Any
) -> Tensor:
    """A mask that hides nothing and is remembered by identity, with the rule behind it."""
    mask = torch.ones(
        batch_size, 1, q_length, kv_length, dtype=torch.bool, device=kwargs.get("device")
    )
    _recorder.masks.append((mask, mask_function))
    return mask


AttentionInterface.register(PAGED, _attend)
AttentionInterface.register(PROBE, _record)
AttentionMaskInterface.register(PROBE, _record_mask)


@dataclass(frozen=True)
class _Geometry:
    layer_count: int
    kv_head_count: int
    head_size: int
    vocabulary_size: int


@torch.inference_mode()
def _probe(module: Any, device: torch.device) -> _Geometry:
    """Run three tokens and hold what the layers ask for against what the kernels can do."""
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
        )
    except Exception as error:
        raise ModelError(f"a probe of the model failed: {_first_line(error)}") from error
    finally:
        calls, _recorder = _recorder.calls, _Recorder()
    module.set_attn_implementation(PAGED)
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
    return _Geometry(layer_count, kv_head_count, head_size, output.logits.shape[-1])


def _check_call(call: _Call) -> None:
    if call.unknown:
        raise ModelError(f"its attention takes {call.unknown[0]}, which is not supported")
    if call.head_size != call.value_size:
        raise ModelError(
            f"its key heads ({call.head_size}) and value heads ({call.value_size}) differ in size"
        )
    if call.heads % call.kv_heads:
        raise ModelError(f"{call.heads} query heads do not divide among {call.kv_heads} KV heads")
    if call.mask is None:
        return
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


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory")
    try:
        raw = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise ModelError(f"{path} has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {_first_line(error)}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path / 'config.json'} is not a JSON object")
    if "auto_map" in raw:
        raise ModelError(f"{path} needs code of its own (auto_map), which is never run")
    return raw


def _check_weights(path: Path) -> None:
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise ModelError(f"{path} has its weights only as pickles; convert them to safetensors")
    raise ModelError(f"{path} has no safetensors weights")


def _architecture(config: Any, raw: dict[str, Any]) -> Any:
    """The model class, or ModelError where its kind cannot be served."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder, only decoders are supported")
    try:
        architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ModelError(f"{kind} is not a causal language model") from None
    named = raw.get("architectures") or [architecture.__name__]
    if architecture.__name__ not in named:
        raise ModelError(f"{named[0]} is not supported, only {architecture.__name__} of {kind}")
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if getattr(architecture, "_is_stateful", False) or kinds:
        found = f" ({', '.join(sorted(kinds))})" if kinds else ""
        raise ModelError(f"{kind} has recurrent or hybrid layers{found}, which are not supported")
    if not getattr(architecture, "_supports_attention_backend", False):
        raise ModelError(f"{kind} does not go through the attention interface of transformers")
    if "logits_to_keep" not in inspect.signature(architecture.forward).parameters:
        raise ModelError(f"{kind} cannot return logits for chosen tokens only")
    return architecture


def _load(architecture: Any, path: Path, dtype: torch.dtype | str) -> Any:
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        module, report = architecture.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=PAGED,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded: {_first_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if report.get(what):
            first = min(str(key) for key in report[what])
            raise ModelError(f"{path} has {len(report[what])} {what.replace('_', ' ')}: {first}")
    return module


def _make_dummy(
    architecture: Any, config: Any, dtype: torch.dtype | str, device: torch.device
) -> Any:
    """Random weights made where they will stay, the same in every process."""
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        torch.manual_seed(0)
        return architecture._from_config(config, dtype=dtype, attn_implementation=PAGED)


def _keep_freed_memory() -> None:
    """Make the C library keep what a step frees for the next one.

    By default glibc gives large pieces back to the system at once, and a decode
    step of 64 sequences spends a tenth of its time on 10,000 page faults. Freeing
    a mapped piece raises the limit to its size (mallopt(3), M_MMAP_THRESHOLD), up
    to 32 MiB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _max_length(config: Any) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_sequence_length", "seq_length", "max_seq_len"):
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length
    raise ModelError("its config.json does not say how many positions it has")


def _eos_token_ids(path: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json first, then config.json."""
    generation = path / "generation_config.json"
    sources = [json.loads(generation.read_text())] if generation.is_file() else []
    for source in (*sources, raw, raw.get("text_config") or {}):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
