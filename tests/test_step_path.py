"""The step path: steps launched ahead of results, buckets, and no wait but where results come back.

The scheduler's plans drive a real engine on a CPU directly, so that a test says itself when a step
is launched and when it is finished.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from control_plane.beams import BeamFields
from control_plane.engine_wire import decode_result, encode_plan
from control_plane.request import Request, SamplingFields, SequenceGroup
from control_plane.scheduler import Scheduler, SchedulerLimits
from data_plane import rehearsal
from data_plane.engine import Engine, EngineSizes, Launched
from data_plane.model import Model, load_model
from data_plane.plan import decode_plan
from data_plane.step_runner import default_buckets
from kernels import AttentionBatch, checks, torch_attention, torch_cache
from protos.control.v1 import record_pb2
from protos.engine.v1 import engine_pb2
from tests.models import tiny_model

ROOT = Path(__file__).resolve().parent.parent
SIZES = EngineSizes(
    block_size=8, block_count=40, host_block_count=40, slot_count=12, step_tokens=48, max_length=96
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_model("llama", tmp_path_factory.mktemp("llama")), dtype="float32")


class Pair:
    """A scheduler and an engine; up to `depth` steps are launched before one is finished."""

    def __init__(self, model: Model, depth: int, preemption: str = "swap", **engine: Any) -> None:
        self.engine = Engine(model, SIZES, check=True, **engine)
        self.engine.capture()
        self.scheduler = Scheduler(
            SchedulerLimits(
                "test", SIZES.block_size, SIZES.block_count, SIZES.slot_count, SIZES.max_length,
                SIZES.step_tokens, 24, host_block_count=SIZES.host_block_count,
                preemption=preemption,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        self.depth = depth
        self.output: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}
        self.faults: list[str] = []
        self._launched: deque[Launched] = deque()

    def submit(self, name: str, prompt: list[int], **fields: Any) -> SequenceGroup:
        record = record_pb2.SequenceRecord(tenant=name).SerializeToString()
        tokens = np.array(prompt, np.int32)
        return self.scheduler.submit(Request(name, tokens, record=record, **fields))

    def step(self) -> bool:
        while len(self._launched) < self.depth and (plan := self.scheduler.schedule()):
            message = encode_plan(plan, 1).SerializeToString()
            columns = decode_plan(engine_pb2.StepPlan.FromString(message))
            self._launched.append(self.engine.launch(columns))
        if not self._launched:
            return False
        result = decode_result(self._launched.popleft().finish())
        outcome = self.scheduler.apply(result)
        for sequence, slot, token in zip(
            outcome.sequences, outcome.slots.tolist(), outcome.token_ids.tolist(), strict=True
        ):
            key = (sequence.group.request.request_id, sequence.sample_index)
            self.output.setdefault(key, []).append(token)
            if slot in outcome.logprobs:
                self.logprobs.setdefault(key, []).append(outcome.logprobs[slot].logprob)
        for group, hypotheses in outcome.hypotheses:
            for index, hypothesis in enumerate(hypotheses):
                self.output[group.request.request_id, index] = hypothesis.tokens.tolist()
        self.faults += [sentence for _, _, sentence in outcome.finished if sentence]
        return True

    def run(self) -> Pair:
        for _ in range(3000):
            if not self.step():
                return self
        raise AssertionError("it does not end")


def submit_all_kinds(pair: Pair) -> None:
    """Requests that use everything that a step can do."""
    rng = np.random.default_rng(3)

    def prompt(length: int) -> list[int]:
        return rng.integers(5, 100, length).tolist()

    kinds: list[dict[str, Any]] = [
        {},
        {"sampling": SamplingFields(temperature=0.8, seed=3)},
        {"sampling": SamplingFields(temperature=1.0, top_p=0.7, seed=4), "sample_count": 3},
        {"sampling": SamplingFields(temperature=1.2, top_k=7, min_p=0.02, seed=5)},
        {"sampling": SamplingFields(repetition_penalty=1.4, presence_penalty=0.5)},
        {"sampling": SamplingFields(frequency_penalty=0.8, temperature=0.9, seed=6)},
        {"sampling": SamplingFields(logit_bias={7: 4.0, 9: -100.0}, logprob_count=3)},
        {"sampling": SamplingFields(prompt_logprob_count=2)},
        {"stop_ids": tuple(range(5, 30)), "min_tokens": 6},
        {"beams": BeamFields(3), "sample_count": 2,
         "sampling": SamplingFields(logprob_count=BeamFields(3).candidate_count(0))},
    ]  # fmt: skip
    for index, fields in enumerate(kinds):
        pair.submit(f"r{index}", prompt(int(rng.integers(3, 40))), max_tokens=14, **fields)


@pytest.fixture(scope="module")
def alone(model: Model) -> Pair:
    """One step after the other, no buckets, memory for all."""
    pair = Pair(model, depth=1)
    submit_all_kinds(pair)
    return pair.run()


@pytest.mark.parametrize(
    ("depth", "preemption", "buckets"),
    [(2, "swap", ()), (2, "recompute", ()), (2, "swap", (1, 2, 4, 12)), (3, "swap", (8,))],
)
def test_steps_ahead_and_buckets_change_no_token(
    model: Model, alone: Pair, depth: int, preemption: str, buckets: tuple[int, ...]
) -> None:
    pair = Pair(model, depth, preemption, buckets=buckets)
    submit_all_kinds(pair)
    for _ in range(6):
        pair.step()
        for group in pair.scheduler.resident_groups[-1:]:
            pair.scheduler.preempt(group)
    pair.run()
    assert pair.scheduler.totals.preemptions > 3
    assert pair.output == alone.output and not pair.faults
    for key, scores in alone.logprobs.items():
        assert pair.logprobs[key] == pytest.approx(scores, abs=1e-4)


def test_a_slot_may_have_another_occupant_before_its_last_result_is_in(model: Model) -> None:
    """What was sampled for the former one is not written into the row of the next."""
    pair = Pair(model, depth=2)
    first = pair.submit("first", [5, 6, 7], max_tokens=50)
    for _ in range(4):
        pair.step()
    engine, scheduler = pair.engine, pair.scheduler

    def launch() -> Launched:
        plan = scheduler.schedule()
        assert plan is not None
        return engine.launch(decode_plan(encode_plan(plan, 1)))

    pair._launched.append(launch())
    slot = first.sequences[0].slot
    scheduler.cancel(first)
    second = pair.submit("second", list(range(20, 50)), max_tokens=3)
    pair._launched.append(launch())
    assert second.sequences[0].slot == slot
    tokens = engine.state.tokens[slot, :30].copy()
    pair.run()
    assert tokens.tolist() == list(range(20, 50))
    assert engine.state.tokens[slot, :30].tolist() == list(range(20, 50))
    other = Pair(model, depth=1)
    other.submit("second", list(range(20, 50)), max_tokens=3)
    assert other.run().output["second", 0] == pair.output["second", 0]


def test_a_snapshot_waits_for_what_was_launched(model: Model) -> None:
    pair = Pair(model, depth=2)
    pair.submit("one", [5, 6, 7], max_tokens=50)
    for _ in range(5):
        pair.step()
    plan = pair.scheduler.schedule()
    assert plan is not None
    launched = pair.engine.launch(decode_plan(encode_plan(plan, 1)))
    count = int(pair.engine.state.token_count.max())
    (part,) = pair.engine.snapshot()
    tokens = np.frombuffer(part.token_ids, "<i4")
    assert len(tokens) == count
    assert tokens[-1] == np.frombuffer(launched.finish().token_ids, "<i4")[0]


def test_decodes_run_in_the_smallest_bucket_that_holds_them(model: Model) -> None:
    pair = Pair(model, depth=1, buckets=(1, 2, 4))
    sizes: list[int] = []
    for size, graph in list(pair.engine.runner._graphs.items()):

        def run(size: int = size, graph: Callable[[], torch.Tensor] = graph) -> torch.Tensor:
            sizes.append(size)
            return graph()

        pair.engine.runner._graphs[size] = run
    for index, length in enumerate((4, 8, 12)):
        pair.submit(f"r{index}", [5, 6, 7], max_tokens=length)
    pair.run()
    # Three decode together, then two, then one.
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {4, 2, 1}


def test_buckets_may_first_run_in_any_order(model: Model) -> None:
    """One sequence decodes alone before a second one comes."""
    outputs = []
    for buckets in ((), (1, 2, 4)):
        pair = Pair(model, depth=1, buckets=buckets)
        pair.submit("first", [5, 6, 7], max_tokens=10)
        for _ in range(4):
            pair.step()
        pair.submit("second", [5, 6, 8], max_tokens=10)
        outputs.append(pair.run().output)
    assert pair.engine.runner.bucket_steps[1] and pair.engine.runner.bucket_steps[2]
    assert outputs[0] == outputs[1]


def test_the_largest_bucket_holds_every_slot_up_to_256() -> None:
    assert default_buckets(1) == [1]
    assert default_buckets(12) == [1, 2, 4, 8, 12]
    for slots in (64, 100, 256, 1000):
        buckets = default_buckets(slots)
        assert buckets == sorted(set(buckets)) and buckets[-1] == min(slots, 256)


def test_what_a_start_runs_leaves_nothing_behind(
    model: Model, alone: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it runs a step of each kind, and once as much as a step can ask for."""
    pair = Pair(model, depth=1)
    engine = pair.engine
    passes = _seen(monkeypatch, model, "forward")
    engine.warm_up()
    engine.rehearse()
    assert not passes
    draws = _seen(monkeypatch, rehearsal, "draw")
    moves = [_seen(monkeypatch, engine.cache, name) for name in MOVES]
    began: list[list[int]] = []

    @contextmanager
    def moving() -> Iterator[None]:
        began.append([len(each) for each in moves])
        yield
        began.append([len(each) for each in moves])

    monkeypatch.setattr(engine.device, "moving", moving)
    engine.device.asynchronous = True
    engine.warm_up()
    steps = [len(batch.slot_mapping) for _, _, batch, *_ in passes]
    assert max(steps) == 256 and 1 in steps
    engine.rehearse()
    engine.device.asynchronous = False
    assert len(passes[-1][0]) == len(passes[-1][-1]) == SIZES.step_tokens
    (logits, rows, table, *_), *_ = draws
    assert len(logits) == SIZES.step_tokens and len(rows.slots) == SIZES.slot_count
    assert table.temperature.all() and (table.top_p < 1).all() and table.presence_penalty.all()
    assert (table.repetition_penalty > 1).all() and (table.logprob_count > 0).all()
    # None on the stream of what is computed, one of each on that of moves.
    assert began == [[0, 0, 0], [1, 1, 1]]
    submit_all_kinds(pair)
    assert pair.run().output == alone.output and not pair.faults


MOVES = ("copy_blocks", "swap_out", "swap_in")


def _seen(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[tuple[Any, ...]]:
    """What a function is called with from now on."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(where, name)

    def call(*given: Any) -> Any:
        calls.append(given)
        return function(*given)

    monkeypatch.setattr(where, name, call)
    return calls


# Nothing waits for the device.

# The modules that handle tensors between a plan and its result. What is plain torch in `kernels`
# runs on a CPU only.
STEP_PATH = [
    *(
        ROOT / f"data_plane/{name}.py"
        for name in (
            "engine", "step_runner", "sampler", "token_table", "device", "model", "compiled",
            "merged_linear", "kv_cache", "tensor_parallel",
        )
    ),
    *(path for path in (ROOT / "kernels").glob("*.py") if not path.name.startswith("torch_")),
]  # fmt: skip
# What makes the host wait for a value, or for a shape that depends on one.
WAITING = {
    "item", "cpu", "tolist", "numpy", "nonzero", "argwhere", "masked_select", "unique",
    "unique_consecutive", "bincount", "equal", "allclose", "is_nonzero", "synchronize",
}  # fmt: skip
# NumPy's own, on arrays that are on the host already; ids of moves, which are there too; where
# results are fetched; and what is done before anything is served, or when nothing is any more.
ALLOWED = {
    "token_table.py": {"tolist"},
    "sampler.py": {"tolist"},
    "device.py": {"numpy", "synchronize"},
    "triton_cache.py": {"nonzero", "tolist"},
    "merged_linear.py": {"cpu", "numpy"},
    "kv_cache.py": {"synchronize"},
}


@pytest.mark.parametrize("path", STEP_PATH, ids=lambda path: path.stem)
def test_the_step_path_asks_the_device_for_no_value(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert calls & WAITING <= ALLOWED.get(path.name, set())


class NoWaiting(TorchFunctionMode):
    """Fails where torch would wait for a device, if the tensors were on one."""

    FORBIDDEN = WAITING | {
        "__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__array__",
        "__repr__", "__format__",
    }  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        if name in self.FORBIDDEN or _waits(name, args, named):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **named)


def _waits(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call of torch waits because of what it is given."""
    if name in ("__getitem__", "__setitem__", "index_put", "index_put_"):
        indices = [index for index in _flat(args[1:2]) if isinstance(index, torch.Tensor)]
        return any(index.dtype == torch.bool for index in indices)
    if name == "where":
        return len(args) + len(named) == 1
    if name == "repeat_interleave":
        counts = [*args, *named.values()][:2][-1]
        return isinstance(counts, torch.Tensor) and "output_size" not in named
    if name == "to":
        return "cpu" in (*args[1:], *named.values())
    # Whether the target is on the host cannot be seen here: there all waits but this.
    return name == "copy_" and not (named.get("non_blocking") or args[2:] == (True,))


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _unwatch(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
    """Excuses what runs on a CPU only, or looks at what is in host memory anyway."""
    function = getattr(where, name)

    def call(*arguments: Any, **named: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*arguments, **named)

    monkeypatch.setattr(where, name, call)


@pytest.fixture
def watched(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pair]:
    """Makes pairs whose engines must not wait for a device while they launch a step."""
    for where, name in (
        (torch_attention, "paged_attention"),
        (torch_cache, "write_cache"),
        (AttentionBatch, "build"),
        (checks, "_check_width"),
    ):
        _unwatch(monkeypatch, where, name)

    def make(*given: Any, **named: Any) -> Pair:
        pair = Pair(model, *given, **named)
        launch = pair.engine.launch

        def watched(plan: Any, queued_us: int = 0) -> Launched:
            with NoWaiting():
                return launch(plan, queued_us)

        monkeypatch.setattr(pair.engine, "launch", watched)
        _unwatch(monkeypatch, pair.engine.device, "fetch")
        # These look at ids that are in host memory, and bring them to the device by themselves.
        for name in MOVES:
            _unwatch(monkeypatch, pair.engine.cache, name)
        return pair

    return make


@pytest.mark.parametrize("buckets", [(), (1, 4, 12)])
def test_no_kind_of_request_makes_the_host_wait(
    watched: Callable[..., Pair], buckets: tuple[int, ...]
) -> None:
    pair = watched(depth=2, buckets=buckets)
    submit_all_kinds(pair)
    for _ in range(5):
        pair.step()
        for group in pair.scheduler.resident_groups[-1:]:
            pair.scheduler.preempt(group)
    pair.run()
    assert len(pair.output) > 10 and not pair.faults


def test_the_forward_pass_is_watched(
    model: Model, watched: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Model._forward

    def waiting(*given: Any) -> torch.Tensor:
        logits = forward(*given)
        logits[0, 0].item()
        return logits

    monkeypatch.setattr(Model, "_forward", waiting)
    pair = watched(depth=1)
    pair.submit("one", [5, 6, 7], max_tokens=3)
    with pytest.raises(AssertionError, match="item waits"):
        pair.run()


X, COUNTS = torch.ones(3), torch.tensor([1, 2, 1])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: X[0].item(),
        lambda: X.tolist(),
        lambda: X.numpy(),
        lambda: np.asarray(X),
        lambda: f"{X[0]}",
        lambda: X.cpu(),
        lambda: X.to("cpu"),
        lambda: torch.empty(3).copy_(X),
        lambda: X.nonzero(),
        lambda: torch.argwhere(X),
        lambda: torch.where(X > 0),
        lambda: torch.masked_select(X, X > 0),
        lambda: X[X > 0],
        lambda: X.index_put_((X > 0,), torch.tensor(1.0)),
        lambda: torch.repeat_interleave(COUNTS),
        lambda: X.repeat_interleave(COUNTS),
        lambda: torch.unique(X),
        lambda: torch.unique_consecutive(X),
        lambda: torch.bincount(COUNTS),
        lambda: torch.equal(X, X),
        lambda: torch.allclose(X, X),
        lambda: torch.is_nonzero(X[0]),
        lambda: bool(X[0] > 0),
        lambda: int(X[0]),
        lambda: [1, 2, 3][COUNTS[0]],
    ],
)
def test_the_watch_sees_what_waits(wait: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        wait()


def test_the_watch_lets_pass_what_does_not_wait() -> None:
    with NoWaiting():
        X.clone().copy_(X, non_blocking=True)
        torch.where(X > 0, X, 0.0)
        X.repeat_interleave(2)
        X.repeat_interleave(COUNTS, output_size=4)
        X[COUNTS - 1].to(torch.int32)
