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
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

import kernels
from data_plane.compiled import (
    CompiledLayers,
    LayerStep,
    Progress,
    layers_of,
    ran_eagerly,
    reason_of,
)
from data_plane.fingerprint import fingerprint
from data_plane.kv_cache import KVCache
from data_plane.kv_scales import KVScales, cache_dtype
from data_plane.load_progress import log_weight_loading
from data_plane.model_probe import ModelError, first_line, probe, window_of
from data_plane.packed_linear import pack_linears
from data_plane.tensor_parallel import ALONE, Partition, TensorGroup
from data_plane.weights import (
    Checkpoint,
    build_module,
    make_weights,
    read_weights,
    why_not_streamed,
)
from kernels import AttentionBatch

__all__ = ["Model", "ModelError", "ModelFacts", "load_model"]

log = logging.getLogger(__name__)

PAGED = "quire_paged"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelFacts:
    """What the other plane needs to know of a model.

    fingerprint: hex SHA-256 of config, dtype and weights. kv_head_count: the whole
    model's; local_kv_head_count: those that this rank's KV cache has, all of them
    where one process holds the model, and first_kv_head on in the model's order.
    vocabulary_size: logits of a row. max_model_length: tokens of prompt and output
    together. eos_token_ids: any of them ends a sequence; empty if the model names none.
    """

    name: str
    fingerprint: str
    layer_count: int
    kv_head_count: int
    local_kv_head_count: int
    first_kv_head: int
    head_size: int
    dtype: torch.dtype
    vocabulary_size: int
    max_model_length: int
    eos_token_ids: tuple[int, ...]


class Model:
    """A loaded model. One thread at a time may run it.

    Attributes:
        compiled: its layers as fused code, after `compile`; None where they run eagerly.
    """

    def __init__(self, module: Any, facts: ModelFacts, device: torch.device) -> None:
        self.facts = facts
        self.device = device
        self._module = module
        self.compiled: CompiledLayers | None = None

    @property
    def weight_bytes(self) -> int:
        """What parameters and buffers take, on this rank."""
        return sum(each.nbytes for each in [*self._module.parameters(), *self._module.buffers()])

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
        if self.compiled is None:
            return self._forward(token_ids, positions, _Step(batch, cache), logit_rows)
        with self.compiled.running(), kernels.present(batch):
            return self._forward(token_ids, positions, _Step(batch, cache), logit_rows)

    def _forward(
        self, token_ids: Tensor, positions: Tensor, step: _Step, logit_rows: Tensor
    ) -> Tensor:
        output = self._module(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
            quire_step=step,
        )
        logits: Tensor = output.logits[0]
        return logits

    def compile(
        self, scales: KVScales | None = None, block_size: int = 16, progress: Progress = iter
    ) -> None:
        """From now on run the layers as fused code; where that cannot be, the log says why.

        scales, block_size: those of the KV cache that requests will find, as in `warm_up`.
        progress: shows how far it is while it yields what it is given.
        """
        layers = layers_of(self._module, self.facts.layer_count)
        if layers is None:
            log.warning("the layers run eagerly: the model has no list of them")
            return
        compiled = CompiledLayers(layers)

        def run(tokens: int, blocks: int) -> None:
            # What compiled code is called with must not be made in inference mode here either.
            step = self._small_step(0, tokens, self._small_cache(blocks, scales, block_size))
            positions = step.batch.slot_mapping
            with torch.inference_mode(), kernels.present(step.batch):
                self._forward(torch.zeros_like(positions), positions, step, positions[:1] * 0)

        try:
            compiled.make(run, progress)
        except Exception as error:
            log.warning("the layers run eagerly: they cannot be compiled: %s", reason_of(error))
            return
        self.compiled = compiled

    def warm_up(self, scales: KVScales | None = None, block_size: int = 16) -> None:
        """Run a small prefill and decode, so that the first request does not pay for set-up.

        scales: those of the KV cache that requests will find, where it is one of fp8.
        block_size: of that cache.
        """
        cache = self._small_cache(2, scales, block_size)
        for start, count in ((0, 8), (8, 1)):
            step = self._small_step(start, count, cache)
            positions = step.batch.slot_mapping
            ids, rows = torch.zeros_like(positions), positions[:1] * 0
            self.forward(ids, positions, step.batch, cache, rows)

    def _small_cache(self, blocks: int, scales: KVScales | None, block_size: int) -> KVCache:
        facts = self.facts
        dtype = cache_dtype(facts.dtype, scales)
        geometry = (facts.local_kv_head_count, block_size, facts.head_size, dtype, self.device)
        return KVCache(facts.layer_count, blocks, 0, *geometry, scales)

    def _small_step(self, start: int, count: int, cache: KVCache) -> _Step:
        """A step of some tokens of one sequence, in the cache's first blocks."""
        blocks = -(-(start + count) // cache.block_size)
        batch = AttentionBatch.build(
            torch.tensor([0, count], dtype=torch.int32),
            torch.tensor([start + count], dtype=torch.int32),
            # A cache that is too small for it is written over and over: nobody reads the result.
            (torch.arange(blocks, dtype=torch.int32) % cache.block_count)[None],
            torch.arange(start, start + count) % (cache.block_count * cache.block_size),
            decode_count=int(count == 1),
            device=self.device,
        )
        return _Step(batch, cache)


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    packed: bool = True,
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    device: torch.device | str = "cpu",
    name: str | None = None,
    group: TensorGroup = ALONE,
) -> Model:
    """Load the model in a directory, or make one with random weights from its config alone.

    dtype: auto (what the checkpoint was saved in), float32, bfloat16 or float16.
    load_format: safetensors, or dummy, which needs no weights and makes the same
    ones each time. name: defaults to the directory's. group: the ranks that share
    the model; each calls this with its own group, warm_up and forward alike, in
    lock-step. packed: on a CPU, lay weights out for its products, which cannot be compiled.
    Raises ModelError with the reason where the model cannot be served.
    No code of the checkpoint is ever run.
    """
    path, device = Path(path), torch.device(device)
    dummy = load_format == "dummy"
    with group.all_or_none():
        config, raw = _read_configs(path, load_format, dtype)
        architecture = _architecture(config, raw)
        if device.type == "cpu":
            _keep_freed_memory()
        module, partition = _load(architecture, config, path, dtype, device, group, dummy=dummy)
        module.eval().requires_grad_(False)
        # With a padding token, some models look for it in the input of every step. Some
        # configs check what is set, so set it unseen.
        vars(module.config.get_text_config())["pad_token_id"] = None
        if device.type == "cpu" and packed:
            pack_linears(module)
        contents = fingerprint(path, module.dtype, dummy=dummy)
    if not group.agrees(int(contents[:15], 16)):
        raise ModelError(f"{path} has other contents on another rank")
    # After packing, so that a model which cannot run on packed weights is refused here.
    geometry = probe(module, device)
    if not kernels.serves_head_size(geometry.head_size, device):
        raise ModelError(f"its heads of {geometry.head_size} have no kernel on {device.type}")
    if geometry.kv_head_count != (partition.local_kv_head_count or geometry.kv_head_count):
        raise ModelError(f"its attention is not divided among {group.size} ranks")
    module.set_attn_implementation(PAGED)
    facts = ModelFacts(
        name=name or path.resolve().name,
        fingerprint=contents,
        layer_count=geometry.layer_count,
        kv_head_count=partition.kv_head_count or geometry.kv_head_count,
        local_kv_head_count=geometry.kv_head_count,
        first_kv_head=partition.first_kv_head,
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
    quire_step: _Step | LayerStep,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention: query [1, H, T, D], key and value [1, Hkv, T, D]."""
    sinks = getattr(module, "sinks", None) if s_aux is None else s_aux
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = window_of(module, kwargs)
    if isinstance(quire_step, LayerStep):
        if not torch.compiler.is_compiling():
            ran_eagerly()
        result = kernels.layer_attention(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            quire_step.blocks,
            scale=scale,
            sliding_window=window,
            softcap=softcap,
            sinks=sinks,
            key_scales=quire_step.key_scales,
            value_scales=quire_step.value_scales,
        )
        return result[None], None
    batch, cache, layer = quire_step.batch, quire_step.cache, module.layer_idx
    keys, values = cache.keys(layer), cache.values(layer)
    key_scales, value_scales = cache.key_scales(layer), cache.value_scales(layer)
    kernels.write_cache(
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        keys,
        values,
        batch,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    result = kernels.paged_attention(
        query[0].transpose(0, 1),
        keys,
        values,
        batch,
        scale=scale,
        sliding_window=window,
        softcap=softcap,
        sinks=sinks,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    return result[None], None


AttentionInterface.register(PAGED, _attend)


def _read_configs(path: Path, load_format: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The config as transformers reads it and as it is written; ModelError for bad arguments."""
    raw = _read_config(path)
    if load_format == "safetensors":
        _check_weights(path)
    elif load_format != "dummy":
        raise ModelError(f"load format {load_format!r} is neither safetensors nor dummy")
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{path / 'config.json'}: {first_line(error)}") from error
    return config, raw


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory")
    raw = _read_json(path / "config.json")
    if "auto_map" in raw:
        raise ModelError(f"{path} needs code of its own (auto_map), which is never run")
    return raw


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelError(f"{file.parent} has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object")
    return content


def _check_weights(path: Path) -> None:
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise ModelError(f"{path} has its weights only as pickles; convert them to safetensors")
    raise ModelError(f"{path} has no safetensors weights")


def _check_rotation(kind: str, text: Any) -> None:
    """Raises ModelError where a token's rotation depends on how long the sequences beside it are.

    Keys are cached as they were rotated, and sequences of all lengths share a step.
    """
    parameters = getattr(text, "rope_parameters", None) or {}
    for each in (parameters, *parameters.values()):
        found = each.get("rope_type") if isinstance(each, dict) else None
        if found in ("dynamic", "longrope"):
            raise ModelError(
                f"{kind} has rotary embeddings of type {found}, which change by length"
            )


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
    _check_rotation(kind, text)
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if getattr(architecture, "_is_stateful", False):
        raise ModelError(f"{kind} has recurrent layers, which are not supported")
    if kinds:
        raise ModelError(f"{kind} has {', '.join(sorted(kinds))} layers, which are not supported")
    if not getattr(architecture, "_supports_attention_backend", False):
        raise ModelError(f"{kind} does not go through the attention interface of transformers")
    if "logits_to_keep" not in inspect.signature(architecture.forward).parameters:
        raise ModelError(f"{kind} cannot return logits for chosen tokens only")
    return architecture


def _load(
    architecture: Any,
    config: Any,
    path: Path,
    dtype: str,
    device: torch.device,
    group: TensorGroup,
    *,
    dummy: bool,
) -> tuple[Any, Partition]:
    """The module with this rank's part of the weights, on the device."""
    checkpoint = None if dummy else Checkpoint(path)
    wanted = DTYPES.get(dtype) or getattr(config, "dtype", None)
    if wanted is None:
        wanted = checkpoint.dtype() if checkpoint else torch.float32
    module = build_module(architecture, config, wanted, PAGED)
    partition = Partition.of(module, group)
    reason = why_not_streamed(module) if checkpoint else None
    if reason and group.size > 1:
        raise ModelError(f"{reason}, so that they cannot be divided among {group.size} ranks")
    if reason:
        return _load_whole(architecture, path, wanted).to(device), partition
    if checkpoint:
        read_weights(module, checkpoint, partition.shards, device, shown=group.rank == 0)
    else:
        make_weights(module, partition.shards, device, shown=group.rank == 0)
    partition.apply(module)
    return module, partition


def _load_whole(architecture: Any, path: Path, dtype: torch.dtype) -> Any:
    """Let transformers load what is stored in another form than the module holds it."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        log_weight_loading()
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
        raise ModelError(f"{path} cannot be loaded: {first_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if report.get(what):
            first = min(str(key) for key in report[what])
            raise ModelError(f"{path} has {len(report[what])} {what.replace('_', ' ')}: {first}")
    return module


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
    sources = [_read_json(generation)] if generation.is_file() else []
    for source in (*sources, raw, raw.get("text_config") or {}):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()
