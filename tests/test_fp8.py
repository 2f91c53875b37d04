"""A KV cache of fp8: its scales, what moving its blocks changes, and what it costs in quality."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
from benchmarks import fp8_accuracy, fp8_page, page
from data_plane import calibrate, demo_model
from data_plane.__main__ import SettingsError, build_engine
from data_plane.calibrate import built_in_sequences, find_scales, measure
from data_plane.engine import Engine, EngineSizes
from data_plane.fingerprint import block_fingerprint
from data_plane.kv_cache import KVCache
from data_plane.kv_scales import (
    FILE_NAME,
    KV_DTYPE,
    KVScales,
    ScaleError,
    read_checkpoint_scales,
    read_scales,
    write_scales,
)
from data_plane.model import Model, load_model
from data_plane.settings import Settings
from kernels import AttentionBatch
from protos import wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc
from protos.inference.v1 import inference_pb2 as pb
from tests.models import tiny_model
from tests.processes import ROOT
from tests.rank_processes import RankProcesses
from tests.stack import (
    Answer,
    Stack,
    led,
    request,
    running_engine,
    running_replica,
    running_stack,
)
from tests.test_pressure import every_kind
from tests.test_ranks import together

LAYERS, HEADS = 2, 2


def some_scales(factor: float = 1.0) -> KVScales:
    keys = torch.tensor([[0.5, 2.0], [1.0, 0.25]]) * factor
    return KVScales(keys, keys / 4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models are tiny, and threads that wait for a busy core take a hundred times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama_scales(llama: Model, llama_directory: Path) -> KVScales:
    return find_scales(llama, llama_directory)


# The cache.


def test_fp8_has_twice_the_blocks_of_bf16_in_the_same_memory() -> None:
    memory = {"dtype": "bfloat16", "kv_memory_mib": 4, "swap_memory_mib": 2}
    own, fp8 = (build_engine(Settings(kv_dtype=kind, **memory)) for kind in ("auto", "fp8"))
    assert own.cache.dtype == torch.bfloat16 and fp8.cache.dtype == KV_DTYPE
    assert fp8.sizes.block_count == 2 * own.sizes.block_count
    assert fp8.sizes.host_block_count == 2 * own.sizes.host_block_count
    assert 2 * fp8.cache.bytes_per_block == own.cache.bytes_per_block
    assert fp8.cache.slab.nbytes == own.cache.slab.nbytes == 4 << 20


def test_moved_blocks_keep_every_bit() -> None:
    """All 256 patterns, the two of NaN among them."""
    cache = KVCache(LAYERS, 8, 4, HEADS, 16, 32, KV_DTYPE, scales=some_scales())
    generator = torch.manual_seed(0)
    bits, host = cache.slab.view(torch.uint8), cache.host_slab.view(torch.uint8)
    bits.copy_(torch.randint(256, bits.shape, generator=generator, dtype=torch.uint8))
    host.zero_()
    before = bits.clone()
    cache.copy_blocks(np.array([1, 2]), np.array([3, 4]))
    assert torch.equal(bits[:, [3, 4]], before[:, [1, 2]])
    cache.swap_out(np.array([7, 0]), np.array([1, 3]))
    bits[:, [0, 7]] = 0
    cache.swap_in(np.array([3, 1]), np.array([0, 7]))
    assert torch.equal(bits[:, [0, 7]], before[:, [0, 7]])


def test_a_cache_has_scales_if_and_only_if_it_is_fp8() -> None:
    geometry = (LAYERS, 4, 0, HEADS, 16, 32)
    with pytest.raises(ValueError, match="scales must be given"):
        KVCache(*geometry, KV_DTYPE)
    with pytest.raises(ValueError, match="scales must be given"):
        KVCache(*geometry, torch.bfloat16, scales=some_scales())
    with pytest.raises(ValueError, match=r"scales must be \[3, 2\], not \[2, 2\]"):
        KVCache(3, *geometry[1:], KV_DTYPE, scales=some_scales())


def test_what_exceeds_the_scale_is_cut_off() -> None:
    scales = some_scales()
    cache = KVCache(LAYERS, 1, 0, HEADS, 16, 32, KV_DTYPE, scales=scales)
    rows = torch.tensor([3.0, 1e3, -1e6, 3e38, float("inf"), float("-inf")])
    cells = rows[:, None, None].expand(-1, HEADS, 32).contiguous()
    batch = AttentionBatch.build(
        torch.tensor([0, 6], dtype=torch.int32),
        torch.tensor([6], dtype=torch.int32),
        torch.zeros((1, 1), dtype=torch.int32),
        torch.arange(6),
        decode_count=0,
    )
    own = {"key_scales": cache.key_scales(0), "value_scales": cache.value_scales(0)}
    kernels.write_cache(cells, cells, cache.keys(0), cache.values(0), batch, **own)
    for blocks, factors in ((cache.keys(0), scales.keys[0]), (cache.values(0), scales.values[0])):
        written = blocks[0, :, :6].float() * factors[:, None, None]
        most = (448 * factors)[:, None, None]
        expected = cells.transpose(0, 1).clamp(-most, most)
        torch.testing.assert_close(written, expected, rtol=1 / 16, atol=0)
        assert torch.equal(written[:, 3:], expected[:, 3:])


def test_scales_far_too_small_give_finite_logits(llama: Model, llama_scales: KVScales) -> None:
    small = KVScales(llama_scales.keys / 1024, llama_scales.values / 1024)
    samples = [fp8_accuracy.Sample(list(range(20, 60)), 20)]
    logits, _ = fp8_accuracy.scored(llama, small, samples)
    assert bool(logits.isfinite().all())


# Scales and their files.


def test_scales_are_powers_of_two_with_room() -> None:
    keys, values = torch.tensor([[3.0, 0.0]]), torch.tensor([[448.0, 1e-20]])
    scales = KVScales.of_amax(keys, values, margin=2)
    assert scales.keys.tolist() == [[2.0**-6, 1.0]]
    assert scales.values[0, 0] == 2
    assert bool((scales.values * 448 >= 2 * values).all())
    with pytest.raises(ScaleError, match="layer 0 has values of inf"):
        KVScales.of_amax(keys, values * float("inf"), margin=2)


def test_a_file_gives_the_scales_that_were_written(tmp_path: Path) -> None:
    write_scales(tmp_path / FILE_NAME, some_scales(), {"tokens": 7})
    read = read_scales(tmp_path / FILE_NAME, LAYERS, HEADS)
    assert torch.equal(read.keys, some_scales().keys)
    assert torch.equal(read.values, some_scales().values)
    assert read.digest == some_scales().digest != some_scales(2).digest
    scalar = {f"layers.{at}.{kind}_scales": [0.5] for at in (0, 1) for kind in ("key", "value")}
    (tmp_path / "one.json").write_text(
        json.dumps({"schema": "quire.kv_scales.v1", "scales": scalar})
    )
    assert read_scales(tmp_path / "one.json", LAYERS, HEADS).keys.tolist() == [[0.5] * 2] * 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layers.1.key_scales": None}, "lacks layers.1.key_scales"),
        ({"layers.2.key_scales": [1.0]}, "layers.2.key_scales is of a layer that the model has"),
        ({"layers.0.value_scales": [1.0] * 3}, "layers.0.value_scales has 3 scales for 2 KV heads"),
        ({"layers.0.value_scales": [1.0, 0.0]}, "layers.0.value_scales has a scale of 0; "),
        ({"layers.0.key_scales": [-1.0]}, "layers.0.key_scales has a scale of -1; "),
        ({"layers.1.key_scales": [float("nan")]}, "layers.1.key_scales has a scale of nan; "),
        ({"layers.1.key_scales": [1e300]}, "layers.1.key_scales has a scale of inf; "),
        ({"layers.1.key_scales": "1"}, "layers.1.key_scales is no list of numbers"),
    ],
)
def test_wrong_files_are_refused_by_tensor(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / FILE_NAME
    write_scales(path, some_scales(), {})
    content = json.loads(path.read_text())
    content["scales"] |= change
    content["scales"] = {name: row for name, row in content["scales"].items() if row is not None}
    path.write_text(json.dumps(content))
    with pytest.raises(ScaleError) as refused:
        read_scales(path, LAYERS, HEADS)
    assert str(path) in str(refused.value) and sentence in str(refused.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": "v0"}', '{"schema": "quire.kv_scales.v1"}']
)
def test_other_files_are_no_scales(text: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text(text)
    with pytest.raises(ScaleError, match=r"cannot be read|no file of scales|has no scales"):
        read_scales(tmp_path / "other", LAYERS, HEADS)
    with pytest.raises(ScaleError, match="cannot be read"):
        read_scales(tmp_path / "absent", LAYERS, HEADS)


def add_checkpoint_scales(directory: Path, **changes: torch.Tensor | None) -> None:
    """k_scale and v_scale among the weights, as llm-compressor leaves them."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    for layer in range(LAYERS):
        for kind in "kv":
            weights[f"model.layers.{layer}.self_attn.{kind}_scale"] = torch.tensor(
                [0.125 * (layer + 1)], dtype=torch.bfloat16
            )
    weights |= {name.replace("__", "."): row for name, row in changes.items() if row is not None}
    for name in [name for name, row in changes.items() if row is None]:
        del weights[name.replace("__", ".")]
    save_file(weights, file, {"format": "pt"})


def test_scales_of_a_checkpoint_are_taken(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path)
    assert read_checkpoint_scales(directory, LAYERS, HEADS) is None
    per_head = torch.tensor([0.5, 0.75]).view(HEADS, 1, 1)
    add_checkpoint_scales(directory, model__layers__0__self_attn__v_scale=per_head)
    scales = find_scales(load_model(directory), directory)
    assert scales.keys.tolist() == [[0.125] * 2, [0.25] * 2]
    assert scales.values.tolist() == [[0.5, 0.75], [0.25] * 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__layers__1__self_attn__v_scale": None}, "lacks the v_scale of layer 1"),
        (
            {"model__layers__0__self_attn__k_scale": torch.ones(3)},
            "model.layers.0.self_attn.k_scale has 3 scales for 2 KV heads",
        ),
        (
            {"model__layers__0__self_attn__k_scale": torch.tensor(-1.0)},
            "model.layers.0.self_attn.k_scale has a scale of -1",
        ),
        (
            {"model__layers__5__self_attn__k_scale": torch.ones(1)},
            "model.layers.5.self_attn.k_scale is of a layer that the model has not",
        ),
    ],
)
def test_wrong_scales_of_a_checkpoint_are_refused_by_tensor(
    changes: dict[str, torch.Tensor | None], sentence: str, tmp_path: Path
) -> None:
    directory = tiny_model("llama", tmp_path)
    add_checkpoint_scales(directory, **changes)
    with pytest.raises(ScaleError) as refused:
        read_checkpoint_scales(directory, LAYERS, HEADS)
    assert sentence in str(refused.value)


def test_scales_for_another_type_are_refused(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path)
    add_checkpoint_scales(directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ScaleError, match="for a cache of int of 8 bits, not fp8"):
        read_checkpoint_scales(directory, LAYERS, HEADS)


def test_an_engine_with_wrong_scales_ends_with_one_sentence(tmp_path: Path) -> None:
    write_scales(tmp_path / FILE_NAME, some_scales(), {})
    command = [sys.executable, "-m", "data_plane", "--kv-dtype", "fp8", "--listen", "127.0.0.1:0"]
    ended = subprocess.run(
        [*command, "--kv-scales", str(tmp_path / FILE_NAME)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last == f"cannot serve: {tmp_path / FILE_NAME} lacks layers.2.key_scales"


def test_scales_without_fp8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is for kv-dtype fp8"):
        build_engine(Settings(kv_scales=tmp_path / FILE_NAME))


@pytest.mark.parametrize(
    ("heads", "ranks", "columns"),
    [
        (8, 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (2, 2, [[0], [1]]),
        (2, 8, [[0], [0], [0], [0], [1], [1], [1], [1]]),
        (1, 3, [[0], [0], [0]]),
    ],
)
def test_ranks_have_the_scales_of_their_heads(
    heads: int, ranks: int, columns: list[list[int]]
) -> None:
    keys = torch.arange(1.0, 3 * heads + 1).view(3, heads)
    scales = KVScales(keys, keys * 2)
    for rank, mine in enumerate(columns):
        part = scales.of_rank(rank, ranks)
        assert torch.equal(part.keys, keys[:, mine])
        assert torch.equal(part.values, keys[:, mine] * 2)
        assert part.digest == scales.digest


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ScaleError, match="2 KV heads do not divide among 3 ranks"):
        some_scales().of_rank(0, 3)
    with pytest.raises(ScaleError, match="no rank 2 of 2"):
        some_scales().of_rank(2, 2)


# Measuring.


def test_measuring_sees_the_largest_keys_and_values(llama: Model) -> None:
    """Of a head that is made ten times as large, the scale of its layer and head alone grows."""
    sequences = [list(range(10, 100)), [5] * 7, [3]]
    keys, values = measure(llama, sequences)
    assert keys.shape == values.shape == (LAYERS, HEADS)
    size = llama.facts.head_size
    layer = llama._module.model.layers[1].self_attn
    weight, kept = layer.v_proj.weight, layer.v_proj.weight.clone()
    weight[size : 2 * size] *= 10
    try:
        grown_keys, grown = measure(llama, sequences)
    finally:
        weight.copy_(kept)
    assert torch.equal(grown_keys, keys)
    torch.testing.assert_close(grown / values, torch.tensor([[1.0, 1.0], [1.0, 10.0]]))


def test_other_ranks_bring_their_heads(llama: Model) -> None:
    """One rank, and two that hold the same heads; this one stands for both."""

    def copied(rows: torch.Tensor, times: int) -> torch.Tensor:
        return rows.repeat_interleave(times, 1)

    keys, _ = measure(llama, [[20, 21, 22]])
    for times in (1, 2):
        gathered = measure(llama, [[20, 21, 22]], partial(copied, times=times))
        assert torch.equal(gathered[0], keys)


def test_measuring_again_gives_the_same_scales(llama: Model, llama_directory: Path) -> None:
    first, second = (find_scales(llama, llama_directory) for _ in range(2))
    assert first.digest == second.digest
    sequences = built_in_sequences(llama_directory, llama.facts)
    assert max(map(len, sequences)) <= llama.facts.max_model_length
    assert len(sequences) > 8


def test_a_model_without_a_tokenizer_is_measured_with_random_ids(tmp_path: Path) -> None:
    directory = tiny_model("gpt2", tmp_path, n_positions=64)
    model = load_model(directory)
    sequences = built_in_sequences(directory, model.facts)
    assert [len(row) for row in sequences] == [64] * 8
    assert bool((find_scales(model, directory).keys > 0).all())


def test_calibrating_writes_what_the_engine_then_reads(
    llama_directory: Path, tmp_path: Path
) -> None:
    text, output = tmp_path / "text", tmp_path / "scales.json"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 50)
    choice = {"model": llama_directory, "dtype": "float32", "device": "cpu", "tokens": 700}
    calibrate.run(argparse.Namespace(**choice, text=text, output=output))
    made = json.loads(output.read_text())["made"]
    assert made["text"] == "text" and made["tokens"] == 700
    settings = Settings(model=llama_directory, kv_dtype="fp8", kv_scales=output, kv_memory_mib=1)
    model = load_model(llama_directory)
    engine = build_engine(settings)
    scales = read_scales(output, LAYERS, HEADS)
    assert engine.fingerprint == block_fingerprint(model.facts.fingerprint, scales)
    assert torch.equal(torch.stack(engine.cache._key_scales), scales.keys)


def test_calibrating_says_why_it_cannot(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path / "model")
    (tmp_path / "text").write_text("no tokenizer reads this")
    command = [sys.executable, "-m", "data_plane.calibrate", "--model", str(directory)]
    ended = subprocess.run(
        [*command, "--text", str(tmp_path / "text")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"cannot calibrate: {directory} has no tok")


# Engines.


def test_blocks_of_other_bytes_have_other_names(llama: Model) -> None:
    name = llama.facts.fingerprint
    names = [block_fingerprint(name, scales) for scales in (None, some_scales(), some_scales(2))]
    assert names[0] == name and len(set(names)) == 3
    assert block_fingerprint("another", some_scales()) not in names


def test_an_engine_describes_its_fp8_cache(llama: Model) -> None:
    engine = Engine(llama, EngineSizes(16, 8, 4, 4, 64, 256), kv_scales=some_scales())

    async def main() -> None:
        async with running_engine(engine, None) as (_, port):
            async with wire.channel(f"127.0.0.1:{port}") as channel:
                stub = engine_pb2_grpc.EngineServiceStub(channel)
                answer = await stub.Describe(engine_pb2.DescribeRequest(), timeout=5)
        assert answer.geometry.kv_dtype == "float8_e4m3fn"
        assert answer.geometry.bytes_per_block == 2 * LAYERS * HEADS * 16 * llama.facts.head_size
        assert answer.model_fingerprint == engine.fingerprint != llama.facts.fingerprint

    asyncio.run(main())


async def answers(stack: Stack, messages: list[pb.GenerateRequest]) -> list[Answer]:
    found = await stack.together(messages)
    await stack.idle()
    return found


def test_swaps_forks_and_copies_of_fp8_blocks_change_no_token(
    llama: Model, llama_directory: Path, llama_scales: KVScales
) -> None:
    """Greedy, drawn, several samples and beams, undisturbed and with a pool that is too small."""
    beams = request(list(range(40, 75)), 24, beam_search=pb.BeamSearch(width=3))
    messages = [*every_kind(), beams]

    async def main() -> None:
        options = {"directory": llama_directory, "kv_scales": llama_scales}
        async with running_stack(llama, **options) as stack:
            assert stack.loop.facts.fingerprint == stack.engine.fingerprint
            alone = await answers(stack, messages)
            assert stack.loop.scheduler.totals.preemptions == 0
        pressed_pool = {"block_count": 30, "host_block_count": 200, "preemption": "swap"}
        async with running_stack(llama, **options, **pressed_pool) as stack:
            pressed = await answers(stack, messages)
            totals = stack.loop.scheduler.totals
        assert totals.swaps > 5 and totals.swapped_in_blocks > 0
        assert [one.tokens for one in pressed] == [one.tokens for one in alone]

    asyncio.run(main())


def test_prefix_hits_on_fp8_blocks_change_no_token(
    llama: Model, llama_directory: Path, llama_scales: KVScales
) -> None:
    prompts = [list(range(20 + at, 120 + at)) for at in range(4)]
    messages = [request(prompt, 24) for prompt in prompts]

    async def main() -> None:
        options = {"directory": llama_directory, "kv_scales": llama_scales}
        async with running_stack(llama, **options) as stack:
            first = await answers(stack, messages)
            again = await answers(stack, messages)
        assert [one.accepted.cached_token_count for one in again] == [96] * 4
        assert [one.tokens for one in again] == [one.tokens for one in first]

    asyncio.run(main())


def test_ranks_with_an_fp8_cache_say_what_one_process_says(tmp_path: Path) -> None:
    """Four ranks, two with each KV head; each measures its own and hears of the other."""
    directory = tiny_model("llama", tmp_path / "model")
    messages = [request(list(range(first, first + 40)), 16) for first in (20, 50, 80)]
    model = load_model(directory, dtype="float32")
    scales = find_scales(model, directory)

    async def main(port: int) -> None:
        async with running_stack(model, kv_scales=scales) as stack:
            expected = await answers(stack, messages)
            name = stack.engine.fingerprint
        async with running_replica([port]) as replica:
            await led(replica)
            found = await together(replica, messages)
            assert replica.router.leaders[0].loop.facts.fingerprint == name
        assert found == [answer.tokens for answer in expected]

    flags = ("--kv-dtype", "fp8", "--kv-memory-mib", "1", "--max-step-tokens", "256")
    with RankProcesses(directory, 4, tmp_path, *flags) as ranks:
        ranks.ready()
        asyncio.run(main(ranks.port))


# Quality.


def test_the_demo_model_says_the_same_from_fp8() -> None:
    """Measured on 96 questions: 100% of top tokens and 99% of answers are those of fp32."""
    subject = fp8_accuracy.demo(16)
    model = load_model(subject.directory)
    own = fp8_accuracy.outcome(model, None, subject.samples)
    scales = find_scales(model, subject.directory)
    line = fp8_accuracy.compare(fp8_accuracy.outcome(model, scales, subject.samples), own)
    assert line["agreement"] >= 0.99
    assert line["unchanged"] >= 15 / 16
    assert line["kl_mean"] < 1e-3
    assert 0 < line["logit_error_mean"] < 0.05
    same = fp8_accuracy.compare(own, own)
    assert same["logit_error_max"] == same["kl_max"] == 0 and same["unchanged"] == 1


def test_scales_per_head_save_heads_that_are_unlike(tmp_path: Path) -> None:
    trained = fp8_accuracy.demo(4)
    subject = fp8_accuracy.unlike_heads(trained, tmp_path)
    plain, model = (load_model(one.directory) for one in (trained, subject))
    own = fp8_accuracy.outcome(model, None, subject.samples)
    assert torch.equal(own.logits, fp8_accuracy.outcome(plain, None, trained.samples).logits)
    errors = {
        name: fp8_accuracy.compare(fp8_accuracy.outcome(model, scales, subject.samples), own)
        for name, scales in fp8_accuracy.schemes(model, subject.directory).items()
    }
    assert errors[fp8_accuracy.PER_HEAD]["logit_error_mean"] < 0.05
    for other in (fp8_accuracy.PER_TENSOR, fp8_accuracy.ONE):
        assert errors[other]["logit_error_mean"] > 0.2


def test_the_page_is_made_of_its_results() -> None:
    text = fp8_page.PAGE.read_text()
    found = page.SOURCE.search(text)
    assert found
    lines = page.read((ROOT / found[1]).read_text(), fp8_page.RENDERS)
    assert all(lines.values())
    assert page.fill(text, found[1], lines, fp8_page.RENDERS) == text


def test_the_demo_model_has_no_file_of_scales() -> None:
    assert not (demo_model.PATH / FILE_NAME).exists()
