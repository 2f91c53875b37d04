"""The operators that torch.compile and CUDA graphs see, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from data_plane.calibrate import find_scales
from data_plane.kv_cache import KVCache
from data_plane.kv_scales import KVScales, cache_dtype
from data_plane.model import load_model
from kernels import checks, triton_cache, triton_paged
from kernels.batch import AttentionBatch
from kernels.options import Options
from tests.kernel_cases import FP8, Case
from tests.models import tiny_model
from tests.triton_interpreter import faithful

quire = torch.ops.quire
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention_arguments(case: Case) -> list[Any]:
    """What `quire::paged_attention` takes, with a plan as on a GPU."""
    batch = case.batch()
    parts = triton_paged.plan(batch, case.query, case.key_blocks, None)
    columns = (batch.query_starts, batch.context_lengths, batch.block_tables, batch.decode_count)
    options = (case.scale, None, None, None, None, case.key_scales, case.value_scales)
    inputs = (case.query, case.key_blocks, case.value_blocks)
    return [*inputs, *columns, *triton_paged.flatten(parts), *options]


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_the_operator_is_the_function(dtype: torch.dtype) -> None:
    case = Case([(1, 40), (1, 3), (20, 30)], dtype=dtype, device=DEVICE)
    expected = kernels.paged_attention(
        case.query,
        case.key_blocks,
        case.value_blocks,
        case.batch(),
        scale=case.scale,
        key_scales=case.key_scales,
        value_scales=case.value_scales,
    )
    assert torch.equal(quire.paged_attention(*attention_arguments(case)), expected)


def test_parts_survive_the_way_through_an_operator() -> None:
    case = Case([(1, 400), (1, 3), (20, 30)], device=DEVICE)
    parts = triton_paged.plan(case.batch(), case.query, case.key_blocks, 64)
    assert len(parts) == 2
    for part, back in zip(parts, triton_paged.unflatten(*triton_paged.flatten(parts)), strict=True):
        assert back[1:] == part[1:]
        assert back.work.partial_count == part.work.partial_count
        assert torch.equal(back.work.items, part.work.items)
        assert torch.equal(back.work.tiles, part.work.tiles)


def test_operators_keep_their_contracts() -> None:
    """Schemas say what is written to, and the fakes give the shapes of the real ones."""
    case = Case([(1, 40), (2, 3)], device=DEVICE)
    case.key_blocks.nan_to_num_(1)
    case.value_blocks.nan_to_num_(1)
    torch.library.opcheck(quire.paged_attention.default, tuple(attention_arguments(case)))
    rows = torch.randn(3, 2, 32, device=DEVICE)
    slots = torch.tensor([3, -1, 20], device=DEVICE)
    written = (rows, rows, case.key_blocks, case.value_blocks, slots, None, None)
    torch.library.opcheck(quire.write_cache.default, written)
    slab, other = torch.randn(2, 2, 6, 4, 16, device=DEVICE)
    ids = torch.tensor([1, 2]), torch.tensor([4, 0])
    torch.library.opcheck(quire.copy_blocks.default, (slab, *ids))
    torch.library.opcheck(quire.swap_blocks.default, (slab, other, *ids))


def test_torch_compile_sees_one_node_each() -> None:
    case = Case([(1, 40), (2, 3)], device=DEVICE)
    arguments = attention_arguments(case)
    key = torch.randn(3, 2, 32, device=DEVICE)
    slots = case.batch().slot_mapping
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def layer(query: Tensor) -> Tensor:
        quire.write_cache(key, key, case.key_blocks, case.value_blocks, slots, None, None)
        attended: Tensor = quire.paged_attention(query * 2, *arguments[1:])
        return attended + 1

    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(case.query), layer(case.query))
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1
    assert sum("write_cache" in call for call in calls) == 1
    assert sum("paged_attention" in call for call in calls) == 1
    assert len(calls) == 4


def test_fakes_run_without_a_gpu() -> None:
    """Shapes are known for tensors of a device that is not here."""
    with FakeTensorMode():
        query = torch.empty(5, 4, 32, dtype=torch.bfloat16, device="cuda").transpose(0, 1)
        cache = torch.empty(9, 2, 16, 32, dtype=torch.bfloat16, device="cuda")
        column = torch.empty(5, dtype=torch.int32, device="cuda")
        table = torch.empty(5, 2, dtype=torch.int32, device="cuda")
        plan = [torch.empty(9, 8, dtype=torch.int32, device="cuda")] * 2
        result = quire.paged_attention(
            query, cache, cache, column, column, table, 5, plan, [1] * 9, 0.1, *[None] * 6
        )
    assert result.shape == query.shape and result.dtype == query.dtype
    assert result.is_contiguous() and result.device.type == "cuda"


@pytest.mark.parametrize("fp8", [False, True], ids=["own dtype", "fp8"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_a_model_on_the_triton_kernels_gives_the_same_logits(
    architecture: str, fp8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 40 in chunks of 30 and 10, then two decodes, through a model's own code;
    with windows and softcap, and with sinks."""
    tiny_model(architecture, tmp_path)
    plain_model = load_model(tmp_path, dtype="float32", device="cpu")
    scales = find_scales(plain_model, tmp_path) if fp8 else None
    plain = run_model(plain_model, scales)
    model = load_model(tmp_path, dtype="float32", device=DEVICE)

    def attend(query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch, **given: Any):
        return triton_paged.paged_attention(query, keys, values, batch, Options(**given))

    def write(*given: Any, **scales: Any) -> None:
        *tensors, batch = given
        triton_cache.write_cache(*tensors, batch.slot_mapping, **scales)

    monkeypatch.setattr(kernels, "paged_attention", attend)
    monkeypatch.setattr(kernels, "write_cache", write)
    # From fp8 the kernels multiply in fp16, and an element may be rounded to its other neighbour.
    near = {"rtol": 0.02, "atol": 0.05} if fp8 else {"rtol": 1e-4, "atol": 1e-5}
    with faithful():
        found = run_model(model, scales).cpu()
    torch.testing.assert_close(found, plain, **near)


def run_model(model: Any, scales: KVScales | None = None) -> Tensor:
    """Logits of the last token of each step, from a cache of fp8 where there are scales."""
    facts = model.facts
    dtype = cache_dtype(facts.dtype, scales)
    geometry = (facts.kv_head_count, 16, facts.head_size, dtype, model.device)
    cache = KVCache(facts.layer_count, 4, 0, *geometry, scales)
    tokens = torch.arange(42) * 7 % facts.vocabulary_size
    rows = []
    for start, stop in ((0, 30), (30, 40), (40, 41), (41, 42)):
        positions = torch.arange(start, stop)
        table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
        batch = AttentionBatch.build(
            torch.tensor([0, stop - start], dtype=torch.int32),
            torch.tensor([stop], dtype=torch.int32),
            table,
            table[0, positions // 16].long() * 16 + positions % 16,
            decode_count=int(stop - start == 1),
            device=model.device,
        )
        last = torch.tensor([stop - start - 1])
        inputs = (tokens[start:stop].to(model.device), positions.to(model.device))
        rows.append(model.forward(*inputs, batch, cache, last.to(model.device)))
    return torch.cat(rows)


def test_options_out_of_range_are_named() -> None:
    case = Case([(1, 20), (2, 9)])
    inputs = (case.query, case.key_blocks, case.value_blocks, case.batch())
    for name, bad in (
        ("scale", 0.0),
        ("scale", float("nan")),
        ("softcap", -1.0),
        ("sliding_window", 0),
        ("sinks", torch.zeros(3)),
        ("sinks", torch.zeros(8)[::2]),
        ("alibi_slopes", torch.zeros(4, 1)),
        ("key_scales", torch.ones(2)),
        ("value_scales", torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=name):
            kernels.paged_attention(*inputs, **({"scale": 1.0} | {name: bad}))


def test_batches_that_would_read_elsewhere_are_named() -> None:
    def columns(starts: list[int], contexts: list[int], width: int = 2) -> list[Tensor]:
        table = torch.ones(len(contexts), width, dtype=torch.int32)
        ints = (torch.tensor(each, dtype=torch.int32) for each in (starts, contexts))
        return [*ints, table, torch.zeros(starts[-1], dtype=torch.int64)]

    for name, given, decodes in (
        ("decode_count", columns([0, 2, 2], [5, 5]), 2),
        ("query_starts", columns([0, 3, 1, 4], [5, 5, 5]), 0),
        ("query_starts", columns([1, 2], [5]), 0),
        ("context_lengths", columns([0, 1], [-1]), 1),
        ("block_tables", columns([0, 1], [0], width=0), 1),
    ):
        with pytest.raises(ValueError, match=name):
            AttentionBatch.build(*given, decodes)
    case = Case([(1, 20)])
    narrow = AttentionBatch.build(*columns([0, 1], [33]), 1)
    with pytest.raises(ValueError, match="block_tables"):
        kernels.paged_attention(case.query, case.key_blocks, case.value_blocks, narrow, scale=1.0)
    with pytest.raises(ValueError, match="batch"):
        elsewhere = AttentionBatch.build(*columns([0, 1], [3]), 1, device="meta")
        kernels.paged_attention(
            case.query, case.key_blocks, case.value_blocks, elsewhere, scale=1.0
        )


def test_a_batch_given_anew_is_planned_anew() -> None:
    """As a captured graph must: its lengths change in place."""
    case = Case([(1, 400), (1, 40)], device=DEVICE)
    batch = case.batch()
    options = Options(case.scale)
    inputs = (case.query, case.key_blocks, case.value_blocks)
    triton_paged.paged_attention(*inputs, batch, options)
    batch.context_lengths.copy_(torch.tensor([90, 30]))
    stale = triton_paged.paged_attention(*inputs, batch, options)
    again = triton_paged.paged_attention(*inputs, batch.again(), options)
    case.lengths = [(1, 90), (1, 30)]
    case.keys, case.values = ([rows[: n[1]] for rows, n in zip(kept, case.lengths, strict=True)]
                              for kept in (case.keys, case.values))  # fmt: skip
    expected, _ = case.reference()
    assert (again.cpu() - expected).norm() / expected.norm() < 1e-5
    assert (stale.cpu() - expected).norm() / expected.norm() > 1e-2


def test_grids_fit_a_gpu() -> None:
    """Only the first axis may be long: the others end at 65,535."""
    query = torch.empty(70_000, 71, 64, device="meta")
    cache = torch.empty(4, 1, 16, 64, device="meta")
    work = triton_paged.WorkList(*torch.empty(2, 70_000, 8, dtype=torch.int32, device="meta"), 9)
    part = triton_paged.Part(work, triton_paged.decode_tiling("hopper", 71, 64, 4), 1, False)
    inputs = (torch.empty_like(query), query, cache, cache, None, part, Options(1.0))
    for launch in triton_paged.part_launches(*inputs):
        assert len(launch.grid) == 1 and launch.grid[0] < 1 << 31


def test_an_fp8_cache_needs_its_scales() -> None:
    case = Case([(1, 20)], dtype=FP8)
    inputs = (case.query, case.key_blocks, case.value_blocks, case.batch())
    good = {"key_scales": case.key_scales, "value_scales": case.value_scales}
    row = torch.ones(1, 2, 32, dtype=torch.bfloat16)
    for name, bad in (
        ("key_scales", None),
        ("value_scales", None),
        ("key_scales", torch.ones(3)),
        ("value_scales", torch.ones(2, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match=name):
            kernels.paged_attention(*inputs, scale=1.0, **(good | {name: bad}))
        with pytest.raises(ValueError, match=name):
            kernels.write_cache(row, row, *inputs[1:], **(good | {name: bad}))


def test_what_triton_cannot_take_is_named() -> None:
    """Checked for tensors on a GPU; what they are is the same without their contents."""
    storage = torch.zeros(1 << 16)
    for head_size, strides in (
        (24, (768, 384, 24, 1)),
        (272, (8704, 4352, 272, 1)),
        (32, (1032, 512, 32, 1)),
        (32, (1024, 520, 32, 1)),
        (32, (1024, 512, 40, 1)),
        (32, (1024, 512, 32, 2)),
    ):
        with pytest.raises(ValueError, match="key_blocks"):
            meta = storage.to("meta").as_strided((4, 2, 16, head_size), strides)
            checks.check_triton(meta, 4)
    good = storage.to("meta").as_strided((4, 2, 16, 32), (1024, 512, 32, 1))
    with pytest.raises(ValueError, match="query"):
        checks.check_triton(good, 257)
    checks.check_triton(good, 256)
    assert kernels.serves_head_size(24, torch.device("cpu"))


def test_ids_on_the_device_are_checked_where_asked() -> None:
    case = Case([(1, 20), (2, 9)])
    checks.check_ids(case.batch(), case.key_blocks)
    with pytest.raises(ValueError, match="block_tables"):
        checks.check_ids(case.batch(), case.key_blocks[:1])
    batch = case.batch()
    batch.slot_mapping[1] = case.key_blocks.shape[0] * 16
    with pytest.raises(ValueError, match="slot_mapping"):
        checks.check_ids(batch, case.key_blocks)
    batch = case.batch()
    batch.context_lengths[0] = 33
    with pytest.raises(ValueError, match="block_tables"):
        checks.check_ids(batch, case.key_blocks)
    # Entries beyond a sequence's keys are never read and may hold anything.
    case.tables[1, 1] = 10**9
    checks.check_ids(case.batch(), case.key_blocks)


def test_moves_that_make_no_sense_are_named() -> None:
    slab, ids = torch.zeros(2, 4, 8), torch.tensor
    for sources, destinations, name in (
        ([1], [4], "destinations"),
        ([4], [1], "sources"),
        ([-1], [1], "sources"),
        ([1, 2], [3, 3], "destinations"),
        ([1, 2], [2, 3], "destinations"),
        ([1], [2, 3], "destinations"),
    ):
        with pytest.raises(ValueError, match=name):
            kernels.copy_blocks(slab, ids(sources), ids(destinations))
    with pytest.raises(ValueError, match="sources"):
        kernels.copy_blocks(slab, ids([1], dtype=torch.int32), ids([2]))
    with pytest.raises(ValueError, match="destination_slab"):
        kernels.swap_blocks(slab, slab.half(), ids([1]), ids([2]))
    with pytest.raises(ValueError, match="source_slab"):
        kernels.copy_blocks(torch.zeros(2, 4, 8, 2).transpose(2, 3), ids([1]), ids([2]))
    # Between two slabs an id means another block on either side.
    kernels.swap_blocks(slab, torch.ones(2, 4, 8), ids([1, 2]), ids([2, 1]))
