"""The device of CUDA: what a CPU can show of it, and what takes a GPU."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_plane import __main__ as data_plane
from data_plane.compiled import reason_of
from data_plane.device import CpuDevice, CudaDevice
from data_plane.engine import Engine, Launched
from data_plane.kv_cache import KVCache, pinned
from data_plane.model import Model, load_model
from data_plane.settings import Settings
from data_plane.tensor_parallel import TensorGroup
from kernels import AttentionBatch
from tests.models import tiny_model
from tests.test_step_path import SIZES, Pair, submit_all_kinds


class Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    def replay(self) -> None:
        pass


@contextmanager
def entered(*_: Any, **__: Any) -> Iterator[None]:
    yield


POOL = (0, 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """The device of CUDA over a CPU's memory: a capture runs what it captures."""
    for name, stand_in in (
        ("Stream", Stream), ("CUDAGraph", Graph), ("graph", entered), ("stream", entered),
        ("current_stream", Stream), ("graph_pool_handle", lambda: POOL),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return CudaDevice(torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_model("llama", tmp_path_factory.mktemp("llama")), dtype="float32")


def test_a_graph_keeps_what_it_was_captured_of(cuda: CudaDevice) -> None:
    """It reads the addresses that were there then, and torch knows nothing of that."""

    def captured() -> tuple[Any, weakref.ref[Tensor]]:
        read = torch.arange(3)
        return cuda.capture(lambda: read + 1), weakref.ref(read)

    graph, read = captured()
    gc.collect()
    assert read() is not None and graph().tolist() == [1, 2, 3]


def test_all_that_a_bucket_reads_is_the_runners_own(
    model: Model, cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, SIZES, buckets=(1, 4, 12))
    read: set[int] = set()
    forward = model.forward

    def seen(ids: Tensor, positions: Tensor, batch: AttentionBatch, *rest: Any) -> Tensor:
        columns = (batch.query_starts, batch.context_lengths, batch.block_tables)
        for column in (positions, *columns, batch.slot_mapping, rest[-1]):
            read.add(column.untyped_storage().data_ptr())
        return forward(ids, positions, batch, *rest)

    monkeypatch.setattr(model, "forward", seen)
    monkeypatch.setattr(engine.runner, "_device", cuda)
    engine.capture()
    columns = engine.runner._columns
    owned = [getattr(columns, field.name) for field in fields(columns)]
    assert read <= {column.untyped_storage().data_ptr() for column in owned}


def test_what_a_failed_capture_leaves_open_is_closed(
    cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch has it: the end of an invalid capture fails before its stream and pool are left."""
    entered_streams: list[Any] = []
    closed: list[tuple[Any, ...]] = []

    @contextmanager
    def stream(one: Stream) -> Iterator[None]:
        entered_streams.append(one)
        try:
            yield
        finally:
            entered_streams.pop()

    class Capture:
        def __init__(self, graph: Graph, pool: Any, stream: Stream) -> None:
            assert pool == POOL and entered_streams == [stream]

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def waiting() -> Tensor:
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.ones(1)

    runs: list[int] = []
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given: closed.append(given), raising=False)
    with pytest.raises(RuntimeError) as error:
        cuda.capture(waiting)
    assert "not permitted when stream is capturing" in reason_of(error.value)
    assert not entered_streams and closed == [(3, POOL)] * 2


def test_an_engine_runs_without_graphs_where_they_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: CpuDevice, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if run().shape[0] == 1:
            raise RuntimeError("a capture\nhas failed")
        return run

    monkeypatch.setattr(data_plane, "device_of", lambda _: Asynchronous())
    monkeypatch.setattr(CpuDevice, "capture", fail)
    settings = Settings(kv_memory_mib=16, max_slots=4)
    engine = data_plane.build_engine(settings)
    said = [record.message for record in caplog.records if record.name == "data_plane"]
    assert said == ["decodes run without graphs: RuntimeError: a capture"]
    runner = engine.runner
    assert not (runner.bucket_steps or runner._graphs or runner._buckets)
    again = Engine(engine.model, engine.sizes, buckets=(1, 2))
    with pytest.raises(RuntimeError, match="has failed"):
        data_plane.capture_graphs(again, TensorGroup(0, 2))


def test_a_start_rehearses_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures give memory back that has to be taken before anything is served."""
    ran: list[str] = []
    for name in ("warm_up", "capture", "rehearse"):
        monkeypatch.setattr(Engine, name, lambda *_, name=name: ran.append(name))
    data_plane.build_engine(Settings(kv_memory_mib=16, max_slots=4))
    assert ran == ["warm_up", "capture", "rehearse"]


class Asynchronous(CpuDevice):
    """A device with a gibibyte, half of which is free."""

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous = True

    def memory(self) -> tuple[int, int]:
        return 1 << 29, 1 << 30


@pytest.mark.parametrize("wanted", [{"kv_memory_mib": 513}, {"blocks": 1 << 20}])
def test_blocks_that_a_gpu_has_no_room_for_are_refused_in_a_sentence(
    wanted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_plane, "device_of", lambda _: Asynchronous())
    sentence = r"\d+ blocks take \d+ MiB, and 512 MiB of the device's memory are free"
    with pytest.raises(data_plane.REFUSALS, match=sentence):
        data_plane.build_engine(Settings(**wanted))  # type: ignore[arg-type]


class Runtime:
    """What of CUDA's runtime pins memory; it refuses more than a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 3
        if size > self.limit:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return f"error {error}"


class Owner:
    pass


def test_swap_space_pins_what_is_asked_for_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, place = Runtime(limit=1 << 20), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    owner = Owner()
    slab = pinned(owner, (5, 3, 7), torch.bfloat16, place)
    assert runtime.pinned == {slab.data_ptr(): 5 * 3 * 7 * 2}
    assert slab.data_ptr() % mmap.PAGESIZE == 0
    slab.fill_(2)
    assert slab.sum() == 2 * 5 * 3 * 7
    del owner
    gc.collect()
    assert not runtime.pinned
    with pytest.raises(
        ValueError, match="2 MiB of host memory for swapped blocks cannot be pinned: error 2"
    ):
        pinned(Owner(), (2 << 20,), torch.uint8, place)
    with pytest.raises(ValueError, match="for swapped blocks: Cannot allocate memory"):
        pinned(Owner(), (1 << 60,), torch.uint8, place)
    assert not runtime.pinned


# What needs a GPU.

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# torch's own, of its debug mode and while it compiles.
quiet = pytest.mark.filterwarnings(
    "ignore:Synchronization debug mode",
    "ignore:TensorFloat32",
    "ignore:.*torch.jit.script_method:DeprecationWarning",
)


def _launched_without_waiting(engine: Engine) -> Callable[..., Launched]:
    """`engine.launch`, in which torch raises an error for whatever waits for the device."""
    launch = engine.launch

    def watched(plan: Any, queued_us: int = 0) -> Launched:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan, queued_us)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


@needs_gpu
@quiet
@pytest.mark.parametrize("fused", [False, True], ids=["eager layers", "fused layers"])
def test_graphs_moves_and_draws_wait_for_nothing_and_change_no_token(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps ahead, in graphs, with swaps beside them, give the tokens of one eager step at a time.

    Qwen3 is the tiny model whose heads are wide enough for the kernels.
    """
    model = load_model(tiny_model("qwen3", tmp_path), dtype="float32", device="cuda")
    alone = Pair(model, depth=1)
    submit_all_kinds(alone)
    alone.run()
    if fused:
        model.compile(block_size=SIZES.block_size)
        assert model.compiled is not None
    pair = Pair(model, depth=2, buckets=(1, 4, 12))
    pair.engine.warm_up()
    pair.engine.rehearse()
    monkeypatch.setattr(pair.engine, "launch", _launched_without_waiting(pair.engine))
    submit_all_kinds(pair)
    for _ in range(6):
        pair.step()
        for group in pair.scheduler.resident_groups[-1:]:
            pair.scheduler.preempt(group)
    pair.run()
    assert pair.scheduler.totals.preemptions > 3 and sum(pair.engine.runner.bucket_steps.values())
    assert pair.output == alone.output and not pair.faults
    for key, scores in alone.logprobs.items():
        assert pair.logprobs[key] == pytest.approx(scores, abs=1e-3)
    if fused:
        assert model.compiled is not None and model.compiled.missed == 0


@needs_gpu
@quiet
def test_torch_sees_a_step_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_model("qwen3", tmp_path), dtype="float32", device="cuda")
    forward = model.forward

    def waiting(*given: Any) -> Tensor:
        logits = forward(*given)
        logits[0, 0].item()
        return logits

    pair = Pair(model, depth=1)
    monkeypatch.setattr(model, "forward", waiting)
    monkeypatch.setattr(pair.engine, "launch", _launched_without_waiting(pair.engine))
    pair.submit("one", [5, 6, 7], max_tokens=2)
    with pytest.raises(RuntimeError, match="synchronizing"):
        pair.run()


@needs_gpu
def test_blocks_come_back_from_pinned_host_memory() -> None:
    """By a kernel where they are small, and by the copy engines where they are large."""
    for head_size in (16, 256):
        place = torch.device("cuda")
        cache = KVCache(4, 6, 5, 4, 16, head_size, torch.float32, place)
        assert cache.host_slab.is_pinned()
        cache.slab.copy_(torch.randn(cache.slab.shape))
        before = cache.slab.clone()
        there, here = np.array([3, 1, 0]), np.array([5, 2, 4])
        cache.swap_out(here, there)
        cache.slab.zero_()
        cache.swap_in(there, here)
        assert torch.equal(cache.slab[:, here], before[:, here])


@needs_gpu
def test_steps_go_on_after_a_capture_that_failed(tmp_path: Path) -> None:
    """A capture that waits is invalid, and leaves torch's allocator as it was before."""
    model = load_model(tiny_model("qwen3", tmp_path), dtype="float32", device="cuda")
    alone = Pair(model, depth=1)
    submit_all_kinds(alone)
    alone.run()
    pair = Pair(model, depth=2)
    device, stream = pair.engine.device, torch.cuda.current_stream()
    with pytest.raises(RuntimeError) as error:
        device.capture(lambda: torch.ones(int(torch.ones(1, device="cuda").item())))
    assert "captur" in reason_of(error.value)
    assert torch.cuda.current_stream() == stream
    submit_all_kinds(pair)
    assert pair.run().output == alone.output
    # What a second stream has used is freed again, which is not while a capture is open.
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        device.fetch([torch.ones(1 << 20, device="cuda")]).wait()
    torch.cuda.synchronize()
    torch.ones(1, device="cuda")
    assert torch.cuda.memory_allocated() < before + (8 << 20)
