"""Models over the paged cache give the tokens that transformers alone gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from data_plane.fingerprint import fingerprint
from data_plane.kv_cache import KVCache
from data_plane.model import Model, ModelError, load_model
from data_plane.packed_linear import PackedLinear, pack_linears
from kernels import AttentionBatch
from tests.models import EOS_TOKEN_ID, REFUSED, SERVED, VOCABULARY_SIZE, add_tokenizer, tiny_model

REPOSITORY = Path(__file__).parent.parent
PROMPT_LENGTHS = (1, 15, 16, 17, 33, 200)
NEW_TOKENS = 12
CHUNK = 70


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models are tiny, and threads that wait for a busy core take a hundred times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int]
    prompt_length: int
    computed: int = 0

    @property
    def finished(self) -> bool:
        new = len(self.tokens) - self.prompt_length
        return new == NEW_TOKENS or (new > 0 and self.tokens[-1] == EOS_TOKEN_ID)


def run_step(model: Model, cache: KVCache, work: list[tuple[Sequence, int]]) -> None:
    """Compute so many tokens of each sequence; append its next token once all are computed."""
    work = sorted(work, key=lambda item: item[1] != 1)
    size = cache.block_size
    starts, contexts, tokens, positions, slots, rows = [0], [], [], [], [], []
    for sequence, count in work:
        span = range(sequence.computed, sequence.computed + count)
        tokens += [sequence.tokens[at] for at in span]
        positions += span
        slots += [sequence.blocks[at // size] * size + at % size for at in span]
        starts.append(len(tokens))
        contexts.append(span.stop)
        sequence.computed = span.stop
        if span.stop == len(sequence.tokens):
            rows.append(len(tokens) - 1)
    width = max(len(sequence.blocks) for sequence, _ in work)
    tables = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence, _ in work]
    batch = AttentionBatch.build(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        torch.tensor(tables, dtype=torch.int32),
        torch.tensor(slots),
        sum(count == 1 for _, count in work),
    )
    chosen = torch.tensor(rows, dtype=torch.int64)
    logits = model.forward(torch.tensor(tokens), torch.tensor(positions), batch, cache, chosen)
    assert logits.shape == (len(rows), model.facts.vocabulary_size)
    done = [sequence for sequence, _ in work if sequence.computed == len(sequence.tokens)]
    for sequence, row in zip(done, logits, strict=True):
        sequence.tokens.append(int(row.argmax()))


def paged_greedy(model: Model, prompts: list[list[int]], block_size: int) -> list[list[int]]:
    """New tokens of each prompt: chunked prefill, then joint decode, in scattered blocks."""
    facts = model.facts
    per_sequence = -(-(max(map(len, prompts)) + NEW_TOKENS) // block_size)
    shuffled = torch.randperm(per_sequence * len(prompts), generator=torch.manual_seed(1)).tolist()
    geometry = (facts.kv_head_count, block_size, facts.head_size, facts.dtype)
    cache = KVCache(facts.layer_count, len(shuffled), 0, *geometry)
    cache.slab.fill_(float("nan"))
    sequences = [
        Sequence(list(prompt), shuffled[at :: len(prompts)], len(prompt))
        for at, prompt in enumerate(prompts)
    ]
    while active := [sequence for sequence in sequences if not sequence.finished]:
        run_step(
            model,
            cache,
            [(one, min(CHUNK, len(one.tokens) - one.computed)) for one in active],
        )
    return [sequence.tokens[sequence.prompt_length :] for sequence in sequences]


def reference_greedy(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of each prompt, alone, by transformers' generate with eager attention."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
        outputs.append(made[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("arch", SERVED)
def test_greedy_tokens_equal_generate(arch: str, tmp_path: Path) -> None:
    directory = tiny_model(arch, tmp_path / arch)
    generator = torch.manual_seed(0)
    prompts = [
        torch.randint(8, VOCABULARY_SIZE, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    expected = reference_greedy(directory, prompts)
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "outputs do not vary"
    model = load_model(directory)
    for block_size in (8, 16, 32):
        assert paged_greedy(model, prompts, block_size) == expected, block_size


def test_facts(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "tiny", hidden_size=64, num_hidden_layers=3)
    facts = load_model(directory, name="a name").facts
    assert (facts.name, facts.layer_count, facts.kv_head_count, facts.head_size) == (
        "a name",
        3,
        2,
        16,
    )
    assert (facts.dtype, facts.vocabulary_size) == (torch.float32, VOCABULARY_SIZE)
    assert (facts.max_model_length, facts.eos_token_ids) == (512, (EOS_TOKEN_ID,))
    assert load_model(directory).facts.name == "tiny"
    assert load_model(directory, dtype="bfloat16").facts.dtype == torch.bfloat16


def test_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "tiny")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert load_model(directory).facts.eos_token_ids == (3, 5)


def test_fingerprint_tells_weights_dtypes_and_configs_apart(tmp_path: Path) -> None:
    first = tiny_model("llama", tmp_path / "a")
    again = tiny_model("llama", tmp_path / "b")
    other = tiny_model("llama", tmp_path / "c", seed=1)
    config = tiny_model("llama", tmp_path / "d", rms_norm_eps=1e-5)
    names = [fingerprint(path, torch.float32) for path in (first, again, other, config)]
    names.append(fingerprint(first, torch.bfloat16))
    names.append(fingerprint(first, torch.float32, dummy=True))
    assert names[0] == names[1]
    assert len(set(names)) == 5
    assert load_model(first).facts.fingerprint == names[0]


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_plane.fingerprint.WHOLE_FILE_BYTES", 1 << 10)
    monkeypatch.setattr("data_plane.fingerprint.SAMPLE_BYTES", 1 << 8)
    first = tiny_model("llama", tmp_path / "a")
    other = tiny_model("llama", tmp_path / "b", seed=1)
    assert fingerprint(first, torch.float32) != fingerprint(other, torch.float32)


def test_sharded_checkpoint_loads(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    prompt = [list(range(8, 30))]
    expected = paged_greedy(load_model(directory), prompt, 16)
    assert paged_greedy(load_model(tmp_path / "cut"), prompt, 16) == expected


def test_tied_weights_load(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    prompt = [list(range(8, 30))]
    expected = reference_greedy(directory, prompt)
    assert paged_greedy(load_model(directory), prompt, 16) == expected


def test_dummy_needs_a_config_alone(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "tiny")
    (directory / "model.safetensors").unlink()
    first = load_model(directory, load_format="dummy", dtype="bfloat16")
    second = load_model(directory, load_format="dummy", dtype="bfloat16")
    assert first.facts == second.facts
    assert first.facts.dtype == torch.bfloat16
    prompts = [[9, 10, 11]]
    assert paged_greedy(first, prompts, 16) == paged_greedy(second, prompts, 16)
    first.warm_up()


@pytest.mark.parametrize("arch", REFUSED)
def test_other_attention_is_refused(arch: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=REFUSED[arch]):
        load_model(tiny_model(arch, tmp_path / arch))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_change_by_length_are_refused(kind: str, tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path)
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **factors}
    _edit_config(directory, rope_parameters=rope)
    with pytest.raises(ModelError, match=f"type {kind}, which change by length"):
        load_model(directory)


def _edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_broken_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    directory = tiny_model("llama", tmp_path / "tiny")
    with pytest.raises(ModelError, match="dtype"):
        load_model(directory, dtype="int3")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        load_model(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        load_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(directory)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "t5", "architectures": None}, "encoder-decoder"),
        ({"model_type": "no_such_model"}, r"config\.json"),
        ({"num_hidden_layers": 5}, "missing keys"),
        ({"intermediate_size": 32}, "mismatched|cannot be loaded"),
    ],
)
def test_unfit_configs_are_refused(fields: dict[str, object], reason: str, tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "tiny")
    _edit_config(directory, **fields)
    with pytest.raises(ModelError, match=reason):
        load_model(directory)


def test_transformers_loads_beside_our_kernels_package(tmp_path: Path) -> None:
    """transformers probes for a package that has our package's name; ours must not be it."""
    directory = tiny_model("llama", tmp_path / "tiny")
    program = (
        "import sys, kernels; assert not hasattr(kernels, '__version__')\n"
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'quire' not in model.config._attn_implementation\n"
    )
    command = [sys.executable, "-c", program, str(directory)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)


def test_tokenizer_has_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    for size in (VOCABULARY_SIZE, 320):
        directory = tiny_model("llama", tmp_path / str(size), vocab_size=size)
        add_tokenizer(directory)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        assert tokenizer.get_vocab_size() == size
        assert tokenizer.token_to_id("</s>") == EOS_TOKEN_ID
        text = "Hello, fox!\n12"
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_cache_views_and_moves() -> None:
    cache = KVCache(3, 8, 4, 2, 16, 32, torch.bfloat16)
    assert cache.keys(2).shape == cache.values(0).shape == (8, 2, 16, 32)
    assert cache.bytes_per_block == 3 * 2 * 2 * 16 * 32 * 2
    generator = torch.manual_seed(0)
    cache.slab.copy_(torch.randn(cache.slab.shape, generator=generator))
    cache.host_slab.zero_()
    before = cache.slab.clone()
    cache.copy_blocks(np.array([1, 2], dtype=np.int32), np.array([3, 4], dtype=np.int32))
    assert torch.equal(cache.keys(1)[3], before[1, 1, 0])
    assert torch.equal(cache.values(2)[4], before[2, 2, 1])
    cache.swap_out(np.array([7, 0]), np.array([1, 3]))
    cache.slab[:, [0, 7]] = 0
    cache.swap_in(np.array([3, 1]), np.array([0, 7]))
    assert torch.equal(cache.slab[:, [0, 7]], before[:, [0, 7]])
    nothing = np.array([], dtype=np.int64)
    cache.copy_blocks(nothing, nothing)
    cache.swap_out(nothing, nothing)
    cache.swap_in(nothing, nothing)


def test_cache_refuses_ids_and_sizes_out_of_range() -> None:
    cache = KVCache(1, 4, 2, 1, 8, 32, torch.float32)
    with pytest.raises(ValueError):
        cache.copy_blocks(np.array([4]), np.array([0]))
    with pytest.raises(ValueError):
        cache.swap_out(np.array([0]), np.array([2]))
    with pytest.raises(ValueError):
        cache.swap_in(np.array([0]), np.array([-1]))
    with pytest.raises(ValueError, match="destinations"):
        cache.copy_blocks(np.array([1, 2]), np.array([0]))
    with pytest.raises(ValueError, match="positive"):
        KVCache(1, 0, 0, 1, 8, 32, torch.float32)


def test_packed_weights_give_the_same_logits(tmp_path: Path) -> None:
    """In bf16 on a CPU, linear layers keep their weights in another layout and say the same."""
    directory = tiny_model("llama", tmp_path / "model", tie_word_embeddings=True)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    packed = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    pack_linears(packed)
    kinds = {type(module) for module in packed.modules()}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert PackedLinear in kinds
    ids = torch.arange(8, 40)[None]
    with torch.inference_mode():
        expected, got = plain(ids).logits.float(), packed(ids).logits.float()
    # Products may be summed in another order: bf16 tolerance, relative to the largest logit.
    assert (got - expected).abs().max() <= 1e-2 * expected.abs().max()
