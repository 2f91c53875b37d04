"""Ranks of a tensor parallel group say what one process says, and all the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from data_plane.model import PAGED, ModelError
from data_plane.tensor_parallel import Partition, Shard, TensorGroup
from data_plane.weights import build_module
from tests.models import VOCABULARY_SIZE, tiny_model
from tests.tensor_ranks import Job, Outcome, run_job, run_ranks

SIZES = (2, 4)
# Architecture and config fields by name of a model that 2 and 4 ranks share.
SHARED: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "odd-vocabulary": ("llama", {"vocab_size": VOCABULARY_SIZE + 1, "tie_word_embeddings": True}),
    "opt": ("opt", {}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 16}),
    "gpt2": ("gpt2", {"n_head": 4, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "mistral-window": ("mistral-window", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "phi": ("phi", {}),
}
# The same for models that are refused, with the sentence at two and at four ranks.
REFUSED: dict[str, tuple[str, dict[str, object], tuple[str, str]]] = {
    "query-heads": (
        "llama",
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
        (
            "its 3 query heads do not divide among 2 ranks",
            "its 3 query heads do not divide among 4 ranks",
        ),
    ),
    "kv-heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3},
        (
            "its 3 KV heads do not divide among 2 ranks, nor 2 ranks among them",
            "its 3 KV heads do not divide among 4 ranks, nor 4 ranks among them",
        ),
    ),
    "mlp": (
        "llama",
        {"intermediate_size": 33},
        (
            "model.layers.0.mlp.gate_proj of 33 columns does not divide among 2 ranks",
            "model.layers.0.mlp.gate_proj of 33 columns does not divide among 4 ranks",
        ),
    ),
    "gpt_oss": ("gpt_oss", {}, ("gpt_oss has no plan to divide its attention among ranks",) * 2),
    "quantized": (
        "llama",
        {"quantization_config": {"quant_method": "fp8"}},
        (
            "its weights are quantized, so that they cannot be divided among 2 ranks",
            "its weights are quantized, so that they cannot be divided among 4 ranks",
        ),
    ),
}


@dataclass
class Ranks:
    """Outcomes by number of ranks (1 among them), rank and model."""

    outcomes: dict[int, list[dict[str, Outcome]]]

    def of(self, size: int, name: str) -> list[Outcome]:
        return [rank[name] for rank in self.outcomes[size]]

    def alone(self, name: str) -> Tensor:
        return self.outcomes[1][0][name].logits


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """All models, by one process and by groups: a process takes long to start, a model does not."""
    root = tmp_path_factory.mktemp("ranks")
    models = SHARED | {name: (arch, fields) for name, (arch, fields, _) in REFUSED.items()}
    jobs = [
        Job(name, str(tiny_model(arch, root / name, **fields)))
        for name, (arch, fields) in models.items()
    ]
    for rank in range(max(SIZES)):
        tiny_model("llama", root / f"seed-of-{rank}", seed=rank)
    llama = str(root / "llama")
    jobs += [
        Job("bfloat16", llama, dtype="bfloat16"),
        Job("dummy", llama, load_format="dummy"),
        Job("others-weights", str(root / "seed-of-{rank}")),
        Job("nothing-there", str(root / "of-{rank}-none")),
    ]
    (root / "of-0-none").symlink_to(llama)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [{job.name: run_job(job) for job in jobs if job.name not in REFUSED}]
    yield Ranks({1: alone} | {size: run_ranks(jobs, size, root / f"of-{size}") for size in SIZES})
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", SIZES)
def test_no_rank_goes_on_without_the_others(ranks: Ranks, size: int) -> None:
    first, *others = (outcome.refusal for outcome in ranks.of(size, "nothing-there"))
    assert first == "another rank cannot serve the model"
    for at, refusal in enumerate(others, 1):
        assert refusal.endswith(f"of-{at}-none is not a directory")
    for outcome in ranks.of(size, "others-weights"):
        assert outcome.refusal.endswith("has other contents on another rank")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*SHARED, "dummy"])
def test_logits_equal_those_of_one_process(ranks: Ranks, name: str, size: int) -> None:
    expected = ranks.alone(name)
    assert expected.std() > 0.01, "they do not vary"
    for outcome in ranks.of(size, name):
        assert not outcome.refusal
        assert outcome.logits.shape == expected.shape
        assert (outcome.logits - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*SHARED, "dummy", "bfloat16"])
def test_logits_are_the_same_on_all_ranks(ranks: Ranks, name: str, size: int) -> None:
    first, *others = ranks.of(size, name)
    assert first.logits.isfinite().all()
    for other in others:
        assert torch.equal(other.logits, first.logits)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_as_close_as_its_rounding(ranks: Ranks, size: int) -> None:
    expected = ranks.alone("bfloat16")
    error = (ranks.of(size, "bfloat16")[0].logits - expected).abs().max()
    assert error <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "kv_heads"), [("llama", 2), ("opt", 4), ("one-kv-head", 1)])
def test_facts_count_local_and_all_heads(ranks: Ranks, name: str, kv_heads: int, size: int) -> None:
    alone = ranks.outcomes[1][0][name].facts
    assert (alone["kv_head_count"], alone["local_kv_head_count"]) == (kv_heads, kv_heads)
    for rank, outcome in enumerate(ranks.of(size, name)):
        facts = outcome.facts
        assert facts["kv_head_count"] == kv_heads
        assert facts["first_kv_head"] == rank * kv_heads // size
        assert facts["local_kv_head_count"] == max(1, kv_heads // size)
        assert facts["fingerprint"] == alone["fingerprint"]
        assert facts["vocabulary_size"] == VOCABULARY_SIZE


@pytest.mark.parametrize("size", SIZES)
def test_ranks_hold_their_part_alone(ranks: Ranks, size: int) -> None:
    whole = ranks.outcomes[1][0]["llama"].facts["parameters"]
    embedding_and_norms = VOCABULARY_SIZE * 32 + 5 * 32
    keys_and_values = 2 * 2 * 32 * 16
    others = whole - embedding_and_norms - keys_and_values
    for outcome in ranks.of(size, "llama"):
        # Two KV heads: of four ranks, two hold the same one.
        expected = embedding_and_norms + keys_and_values // 2 + others // size
        assert outcome.facts["parameters"] == expected


@pytest.mark.parametrize("at", range(len(SIZES)))
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_the_numbers(ranks: Ranks, name: str, at: int) -> None:
    for outcome in ranks.of(SIZES[at], name):
        assert outcome.refusal == REFUSED[name][2][at]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("phi3", r"model\.layers\.0\.self_attn\.o_proj is rowwise_split_input among ranks"),
        ("olmo2", r"model\.layers\.0\.self_attn\.o_proj is rowwise_split_input among ranks"),
        ("qwen3_moe", r"model\.layers\.0\.mlp\.experts\S* is \w+ among ranks"),
        ("smollm3", None),
        ("starcoder2", None),
        ("cohere", None),
    ],
)
def test_plans_of_transformers_are_taken_or_refused(kind: str, reason: str | None) -> None:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, **tokens,
    )  # fmt: skip
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    module = build_module(architecture, config, torch.float32, PAGED)
    if reason:
        with pytest.raises(ModelError, match=reason):
            Partition.of(module, TensorGroup(1, 2))
        return
    partition = Partition.of(module, TensorGroup(1, 2))
    keys = partition.shards["model.layers.1.self_attn.k_proj.weight"]
    assert keys == Shard(0, ((8, 16),))


def test_a_group_of_one_needs_no_process_group() -> None:
    group = TensorGroup.alone()
    tensor = torch.arange(3.0)
    group.all_reduce(tensor)
    assert torch.equal(tensor, torch.arange(3.0))
    assert group.gather_columns(tensor) is tensor
    assert group.minimum(7) == 7
    group.leave()
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        TensorGroup(2, 2)


def test_shards_take_ranges_of_one_dimension() -> None:
    whole = torch.arange(24.0).view(4, 6)
    shard = Shard(1, ((1, 2), (4, 6), (6, 6)))
    assert shard.shape((4, 6)) == (4, 3)
    part = torch.empty(4, 3, dtype=torch.float16)
    shard.copy(whole, part)
    assert torch.equal(part.float(), whole[:, [1, 4, 5]])
