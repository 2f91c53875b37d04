"""Weights come from disk, or from a seed, as transformers would bring them, with less memory."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from data_plane import load_progress
from data_plane.load_progress import LoadProgress
from data_plane.model import PAGED, ModelError, load_model
from data_plane.tensor_parallel import Partition, Shard, TensorGroup
from data_plane.weights import (
    Checkpoint,
    build_module,
    make_weights,
    read_weights,
    why_not_streamed,
)
from tests.models import SERVED, tiny_model

REPOSITORY = Path(__file__).parent.parent
CPU = torch.device("cpu")
WHOLE = TensorGroup.alone()


def built(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    config = AutoConfig.from_pretrained(directory)
    return build_module(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, dtype, PAGED)


def read(
    directory: Path, dtype: torch.dtype = torch.float32, group: TensorGroup = WHOLE
) -> tuple[Any, dict[str, Shard]]:
    """The module as a rank reads it, and its shards."""
    module = built(directory, dtype)
    shards = Partition.of(module, group).shards
    read_weights(module, Checkpoint(directory), shards, CPU)
    return module, shards


def made(
    directory: Path, group: TensorGroup = WHOLE, seed: int = 0
) -> tuple[Any, dict[str, Shard]]:
    module = built(directory)
    shards = Partition.of(module, group).shards
    make_weights(module, shards, CPU, seed=seed)
    return module, shards


def tensors(module: Any) -> dict[str, Tensor]:
    """Everything a module computes with: parameters, and buffers in checkpoints or not."""
    return module.state_dict() | dict(module.named_buffers())


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Save a checkpoint again with other tensors."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def in_shards(directory: Path, target: Path, size: str) -> list[Path]:
    """Save a model in several files of a size; returns them."""
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(target, max_shard_size=size)
    return sorted(target.glob("*.safetensors"))


def assert_parts(parts: Any, whole: Any, shards: dict[str, Shard]) -> None:
    """Every tensor of a rank's module is that part of the whole module's."""
    expected = tensors(whole)
    for name, part in tensors(parts).items():
        full = expected[name]
        if name in shards:
            wanted = torch.empty(shards[name].shape(tuple(full.shape)))
            shards[name].copy(full, wanted)
            full = wanted
        assert torch.equal(part, full), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", SERVED)
def test_everything_equals_from_pretrained(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = tiny_model(arch, tmp_path / "whole")
    in_shards(directory, tmp_path / "cut", "20KB")
    expected = tensors(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))
    for path in (directory, tmp_path / "cut"):
        got = tensors(read(path, dtype)[0])
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(got[name], tensor), name


def test_narrow_weights_are_widened(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path)
    rewrite(directory, lambda old: {name: tensor.bfloat16() for name, tensor in old.items()})
    expected = load_file(directory / "model.safetensors")
    for name, tensor in read(directory)[0].state_dict().items():
        assert torch.equal(tensor, expected[name].float())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "phi"])
def test_a_rank_reads_its_parts(arch: str, rank: int, tmp_path: Path) -> None:
    directory = tiny_model(arch, tmp_path, vocab_size=129)
    parts, shards = read(directory, group=TensorGroup(rank, 2))
    assert parts.lm_head.weight.shape[0] == 65 - rank
    assert_parts(parts, read(directory)[0], shards)


def test_tied_weights_share_memory(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    module = read(directory)[0]
    assert module.lm_head.weight is module.model.embed_tokens.weight
    parts, shards = read(directory, group=TensorGroup(1, 2))
    assert_parts(parts, module, shards)
    rows = parts.model.embed_tokens.weight[64:]
    assert parts.lm_head.weight.data_ptr() == rows.data_ptr()


def test_tied_weights_under_the_other_name(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    expected = read(directory)[0]
    rewrite(
        directory,
        lambda old: {
            name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in old.items()
        },
    )
    assert_parts(read(directory)[0], expected, {})


def test_tied_weights_that_differ_are_both_kept(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(directory, lambda old: old | {"lm_head.weight": embedding.clone()})
    module = read(directory)[0]
    assert module.lm_head.weight is module.model.embed_tokens.weight
    rewrite(directory, lambda old: old | {"lm_head.weight": embedding + 1})
    module = read(directory)[0]
    assert torch.equal(module.lm_head.weight, embedding + 1)
    assert torch.equal(module.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize(
    ("arch", "pattern", "replacement"),
    [
        ("opt", "model.decoder.", "decoder."),
        ("llama", "model.", ""),
        ("gpt2", "transformer.", ""),
        ("gpt_neox", "lm_head.", "embed_out."),
    ],
)
def test_older_names(arch: str, pattern: str, replacement: str, tmp_path: Path) -> None:
    directory = tiny_model(arch, tmp_path, tie_word_embeddings=arch != "gpt_neox")
    expected = read(directory)[0]
    start = re.compile(f"^{re.escape(pattern)}")
    rewrite(directory, lambda old: {start.sub(replacement, name): old[name] for name in old})
    assert not any(name.startswith(pattern) for name in load_file(directory / "model.safetensors"))
    assert_parts(read(directory)[0], expected, {})


def test_missing_and_misshapen_tensors_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama", tmp_path)
    absent = ("model.norm.weight", "lm_head.weight")
    rewrite(directory, lambda old: {name: old[name] for name in old if name not in absent})
    monkeypatch.setattr("data_plane.weights._opened", None)
    with pytest.raises(ModelError, match=r"has 2 missing keys: lm_head\.weight$"):
        read(directory)
    directory = tiny_model("llama", tmp_path)
    rewrite(directory, lambda old: old | {"model.norm.weight": torch.ones(31)})
    with pytest.raises(ModelError, match=r"has 1 mismatched keys: model\.norm\.weight$"):
        read(directory)


def test_unexpected_tensors_are_passed_over(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path)
    expected = read(directory)[0]
    rewrite(directory, lambda old: old | {"model.layers.0.rotary_emb.inv_freq": torch.ones(4)})
    assert_parts(read(directory)[0], expected, {})


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "whole")
    files = in_shards(directory, tmp_path / "cut", "20KB")
    with files[1].open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match=rf"{files[1].name} cannot be loaded"):
        load_model(tmp_path / "cut")
    files[1].unlink()
    with pytest.raises(ModelError, match=rf"{files[1].name} cannot be loaded"):
        load_model(tmp_path / "cut")
    index = tmp_path / "cut" / "model.safetensors.index.json"
    index.write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        load_model(tmp_path / "cut")
    index.unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        load_model(tmp_path / "cut")


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "whole")
    in_shards(directory, tmp_path / "cut", "20KB")
    index = tmp_path / "cut" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../whole/model.safetensors"}}))
    with pytest.raises(ModelError, match=r"cut/model\.safetensors cannot be loaded"):
        load_model(tmp_path / "cut")


def test_what_must_be_rearranged_is_left_to_transformers(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    reason = why_not_streamed(built(tmp_path))
    assert reason == "its weights must be rearranged while they are loaded"
    model = load_model(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(model._module.state_dict()[name], expected[name]) for name in expected)
    assert model.facts.kv_head_count == model.facts.local_kv_head_count == 2


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2", "gpt_neox", "gemma2"])
def test_dummy_parts_are_those_of_the_whole(arch: str, tmp_path: Path) -> None:
    directory = tiny_model(arch, tmp_path, tie_word_embeddings=arch == "gemma2")
    (directory / "model.safetensors").unlink()
    whole = made(directory)[0]
    for rank in range(2):
        parts, shards = made(directory, TensorGroup(rank, 2))
        assert_parts(parts, whole, shards)
    assert_parts(made(directory)[0], whole, {})
    other = made(directory, seed=1)[0].state_dict()
    changed = [name for name, tensor in whole.state_dict().items() if not tensor.equal(other[name])]
    assert {name for name, tensor in other.items() if tensor.dim() > 1} == set(changed)
    for name, tensor in whole.state_dict().items():
        assert tensor.isfinite().all(), name
        if tensor.dim() > 1:
            assert 0.002 < tensor.std() < 0.2, name


# Reads a model and says how many bytes it has, and how many more memory held at most.
_PEAK = """
import sys, torch
from pathlib import Path
from tests.test_weights import Checkpoint, CPU, Partition, TensorGroup, built, read_weights

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

torch.set_num_threads(1)
path = Path(sys.argv[1])
module = built(path, torch.float16 if sys.argv[2] == "half" else torch.float32)
group = TensorGroup(1, 2) if sys.argv[2] == "rank" else TensorGroup.alone()
shards = Partition.of(module, group).shards
checkpoint = Checkpoint(path)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
read_weights(module, checkpoint, shards, CPU)
held = sum(parameter.nbytes for parameter in module.parameters())
print(held, resident("VmHWM") - before - held)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 270 MB in files of 60 MB at most."""
    root = tmp_path_factory.mktemp("large")
    fields = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    directory = tiny_model("llama", root / "whole", vocab_size=8192, **fields)
    assert len(in_shards(directory, root / "cut", "60MB")) >= 4
    return root / "cut"


@pytest.mark.parametrize("how", ["whole", "half", "rank"])
def test_reading_needs_little_more_memory_than_what_stays(how: str, large: Path) -> None:
    largest = max(file.stat().st_size for file in large.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, str(large), how],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    held, beyond = map(int, run.stdout.split())
    assert held == pytest.approx(size * {"whole": 1, "half": 0.5, "rank": 0.56}[how], rel=0.02)
    assert beyond < 1.5 * largest


def test_progress_is_logged_where_there_is_no_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_progress, "EVERY_SECONDS", 0)
    caplog.set_level(logging.INFO, "data_plane.load_progress")
    read(tiny_model("llama", tmp_path))
    *percents, last = caplog.messages
    assert len(percents) > 5
    numbers = [int(re.fullmatch(r"loading weights: (\d+) %", line)[1]) for line in percents]  # type: ignore[index]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 100
    assert re.fullmatch(r"loaded \d+\.\d\d GB of weights in \d+\.\d s", last)
    caplog.clear()
    with LoadProgress(10, shown=False) as progress:
        progress.advance(10)
    assert caplog.messages == ["loaded 0.00 GB of weights in 0.0 s"]


def test_progress_is_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_progress, "EVERY_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with LoadProgress(4) as progress:
        progress.advance(1)
        progress.advance(3)
    quarter, full = "█" * 10 + "░" * 30, "█" * 40
    expected = f"\rloading weights: {quarter} 25 %\rloading weights: {full} 100 %\n"
    assert capsys.readouterr().err == expected
