"""One engine of several processes: real ranks with gloo between them, real signals."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console
from torch.distributed.distributed_c10d import Store

from control_plane.cli.engine_view import engines_view
from control_plane.leader import LeaderState
from control_plane.server import Replica
from data_plane import follower
from data_plane.engine import Engine
from data_plane.load_progress import pulse
from data_plane.model import load_model
from data_plane.rank_link import SECRET_BYTES, Hello, Kind, Link, LinkEnded, listen, loopback
from data_plane.ranks import (
    EXIT_BAD_MODEL,
    EXIT_RANK_LOST,
    EXIT_WORKER_FAILED,
    Place,
    Ranks,
    join,
)
from protos import wire
from protos.admin.v1 import admin_pb2, admin_pb2_grpc
from protos.engine.v1 import engine_pb2, engine_pb2_grpc
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.models import tiny_model
from tests.processes import Process, data_plane, free_port
from tests.rank_processes import RankProcesses
from tests.stack import Answer, led, request, running_replica, running_stack
from tests.test_leadership import Lead, first_plan, heir_of

ARCHITECTURES = ("llama", "opt", "qwen3", "mistral")
LIMITS = ("--blocks", "128", "--max-slots", "16", "--max-step-tokens", "64")
# From the kill to the end of the last process.
END_SECONDS = 2.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {arch: tiny_model(arch, root / arch) for arch in ARCHITECTURES}


def messages(suffix: str, max_tokens: int = 24) -> list[pb.GenerateRequest]:
    """Greedy and seeded ones, a common prefix, several samples, a prompt of several chunks."""
    prompts = [
        list(range(20, 60)),
        list(range(20, 55)),
        [5, 6, 7],
        [9 + i % 100 for i in range(90)],
    ]
    made = []
    for index, prompt in enumerate(prompts):
        for seed in (0, index + 1):
            message = request(prompt, max_tokens, request_id=f"{suffix}-{index}-{seed}")
            message.stopping.ignore_eos = True
            if seed:
                message.sampling.MergeFrom(pb.Sampling(temperature=1, seed=seed, top_k=40))
                message.output.sample_count = 1 + index % 2
            made.append(message)
    return made


def tokens(answers: list[Answer]) -> list[dict[int, list[int]]]:
    return [answer.tokens for answer in answers]


async def collect(
    stub: inference_pb2_grpc.InferenceServiceStub,
    message: pb.GenerateRequest,
    begun: asyncio.Event | None = None,
) -> Answer:
    answer = Answer()
    async for response in stub.Generate(message, timeout=60):
        answer.add(response)
        if begun is not None and len(answer.ids) >= 3:
            begun.set()
    return answer


async def together(
    replica: Replica, wanted: list[pb.GenerateRequest], begun: asyncio.Event | None = None
) -> list[dict[int, list[int]]]:
    async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = (collect(stub, message, begun) for message in wanted)
        return tokens(await asyncio.gather(*calls))


async def alone(model: Path, wanted: list[pb.GenerateRequest]) -> list[dict[int, list[int]]]:
    """What one process with the whole model makes of the requests."""
    whole = load_model(model, dtype="float32")
    async with running_stack(whole, block_count=128, slot_count=16, step_tokens=64) as stack:
        return tokens(await stack.together(wanted))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ranks_generate_what_one_process_does(
    arch: str, size: int, models: dict[str, Path], tmp_path: Path
) -> None:
    async def main() -> None:
        expected = await alone(models[arch], messages("alone"))
        async with running_replica([ranks.port]) as replica:
            await led(replica)
            assert await together(replica, messages("ranks")) == expected

    with RankProcesses(models[arch], size, tmp_path, *LIMITS) as ranks:
        ranks.ready()
        asyncio.run(main())
        # Whichever rank is asked, the whole engine ends in good order.
        ranks.kill(size - 1, signal.SIGTERM)
        assert ranks.exit_codes() == [0] * size, ranks.log.read_text()


def test_a_killed_rank_ends_the_engine_and_its_requests_go_on(
    models: dict[str, Path], tmp_path: Path
) -> None:
    wanted = messages("killed", 80)

    async def main() -> None:
        expected = await alone(models["llama"], wanted)
        async with running_replica([engine.port]) as replica:
            await led(replica)
            begun = asyncio.Event()
            running = asyncio.create_task(together(replica, wanted, begun))
            await begun.wait()
            (child,) = children(engine.pid)
            killed = time.monotonic()
            os.kill(child, signal.SIGKILL)
            status = await asyncio.to_thread(engine.wait, END_SECONDS)
            assert time.monotonic() - killed < END_SECONDS
            assert status == EXIT_RANK_LOST
            sentence = f"rank 1 (process {child}) was ended by signal 9"
            assert sentence in engine.log()
            seen = await reported(replica)
            assert seen.last_failure == sentence and seen.last_failure_age_seconds < END_SECONDS
            row = {field.name: getattr(seen, field.name) for field in seen.DESCRIPTOR.fields}
            console = Console(width=200, file=StringIO(), force_terminal=False)
            console.print(engines_view([row | {"state": "connecting"}]))
            assert f": {sentence}" in console.file.getvalue()  # type: ignore[attr-defined]
            with RankProcesses(models["llama"], 1, tmp_path, *LIMITS, port=engine.port) as heir:
                await asyncio.to_thread(heir.ready)
                assert await running == expected
                await led(replica)
                assert (await reported(replica)).last_failure == sentence

    with two_ranks(models["llama"], tmp_path) as engine:
        engine.ready()
        asyncio.run(main())


def two_ranks(model: Path, directory: Path, *flags: str) -> Process:
    """An engine that starts its second rank itself."""
    common = ("--model", str(model), "--tensor-parallel", "2", "--device", "cpu")
    return data_plane(directory / "engine.log", *common, *LIMITS, *flags)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


async def reported(replica: Replica) -> admin_pb2.Engine:
    async with wire.channel(f"127.0.0.1:{replica.ports[1]}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        (engine,) = (await stub.ListEngines(admin_pb2.ListEnginesRequest())).engines
        return engine


def test_killing_rank_0_ends_all(models: dict[str, Path], tmp_path: Path) -> None:
    async def main() -> None:
        async with running_replica([ranks.port]) as replica:
            await led(replica)
            begun = asyncio.Event()
            running = asyncio.create_task(together(replica, messages("killed", 400), begun))
            await begun.wait()
            ranks.kill(0)
            statuses = await asyncio.to_thread(ranks.exit_codes, END_SECONDS)
            assert statuses == [-signal.SIGKILL, EXIT_RANK_LOST, EXIT_RANK_LOST, EXIT_RANK_LOST]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    with RankProcesses(models["llama"], 4, tmp_path, *LIMITS) as ranks:
        ranks.ready()
        asyncio.run(main())


def test_a_rank_that_started_elsewhere_is_missed_as_soon(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with RankProcesses(models["llama"], 4, tmp_path, *LIMITS) as ranks:
        ranks.ready()
        ranks.kill(2)
        first, _, killed, _ = ranks.exit_codes(END_SECONDS)
        assert (first, killed) == (EXIT_RANK_LOST, -signal.SIGKILL)
        pid = ranks.processes[2].pid
        sentence = (
            f"rank 2 (process {pid} on {socket.gethostname()}) is gone, and its link has ended"
        )
        assert sentence in ranks.log.read_text()


@pytest.mark.parametrize(
    ("size", "faulty", "sentence"),
    [
        (1, 0, r"its worker failed: RuntimeError\('planted'\)"),
        (2, 0, r"its worker failed: RuntimeError\('planted'\)"),
        (2, 1, r"rank 1 \(process .*\): its worker failed: RuntimeError\('planted'\)"),
        (2, -1, "one step takes more than 1 s"),
    ],
    ids=["one process fails", "rank 0 fails", "rank 1 fails", "rank 1 hangs"],
)
def test_a_worker_that_fails_or_hangs_ends_the_engine(
    size: int, faulty: int, sentence: str, models: dict[str, Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with running_replica([ranks.port]) as replica:
            await led(replica)
            running = asyncio.create_task(together(replica, messages("any", 400)))
            if faulty < 0:
                await asyncio.sleep(0.2)
                ranks.kill(1, signal.SIGSTOP)
            first = await asyncio.to_thread(ranks.processes[0].join, 5)
            assert first is None and ranks.processes[0].exitcode == EXIT_WORKER_FAILED
            async with asyncio.timeout(1):
                while replica.router.leaders[0].state is LeaderState.LED:
                    await asyncio.sleep(0.01)
            assert re.fullmatch(sentence, (await reported(replica)).last_failure)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    flags = (*LIMITS, "--hung-step-seconds", "1")
    with RankProcesses(models["llama"], size, tmp_path, *flags, faulty=faulty) as ranks:
        ranks.ready()
        asyncio.run(main())


def test_sigterm_under_a_worker_that_hangs_is_no_orderly_end(
    models: dict[str, Path], tmp_path: Path
) -> None:
    async def main() -> None:
        async with wire.channel(f"127.0.0.1:{engine.port}") as channel:
            lead, granted = await heir_of(engine_pb2_grpc.EngineServiceStub(channel))
            await lead.snapshot(granted)
            epoch = granted.granted.epoch
            await lead.step(first_plan(epoch))
            await lead.step(engine_pb2.StepPlan(epoch=epoch, step=2))
            plan = engine_pb2.StepPlan(epoch=epoch, step=3)
            await lead.call.write(engine_pb2.LeadRequest(plan=plan))
            async with asyncio.timeout(10):
                while "it hangs" not in engine.log.read_text():
                    await asyncio.sleep(0.02)
            engine.kill(0, signal.SIGTERM)
            assert await asyncio.to_thread(engine.exit_codes, 20) == [EXIT_WORKER_FAILED]
            assert "its worker does not end" in engine.log.read_text()

    with RankProcesses(models["llama"], 1, tmp_path, *LIMITS, faulty=0, fault="hangs") as engine:
        engine.ready()
        asyncio.run(main())


def test_the_lead_stream_and_health_say_that_the_engine_failed(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async def main() -> None:
        async with wire.channel(f"127.0.0.1:{ranks.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
            lead = Lead(engine_pb2_grpc.EngineServiceStub(channel))
            await lead.snapshot(await lead.claim())
            ranks.kill(1)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await lead.call.read()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "rank 1" in str(error.value.details())
            (detail,) = wire.error_details(error.value)
            assert detail.reason == "ENGINE_FAILED"  # type: ignore[attr-defined]
            assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING

    with RankProcesses(models["llama"], 2, tmp_path, *LIMITS) as ranks:
        ranks.ready()
        asyncio.run(main())


def test_refused_plans_and_new_leaders_leave_all_ranks_alike(
    models: dict[str, Path], tmp_path: Path
) -> None:
    wanted = messages("taken-over", 60)

    async def refused() -> None:
        """A plan is executed, and the next one is of a sequence that is not there."""
        async with wire.channel(f"127.0.0.1:{engine.port}") as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            lead, granted = await heir_of(stub)
            await lead.snapshot(granted)
            epoch = granted.granted.epoch
            await lead.step(first_plan(epoch))
            bad = engine_pb2.StepPlan(epoch=epoch, step=2, decode_joins=b"\1\0\0\0")
            assert (await lead.refusal(bad))[0] is grpc.StatusCode.FAILED_PRECONDITION

    async def main() -> None:
        expected = await alone(models["llama"], wanted)
        await refused()
        async with first_part(engine.port, wanted) as answers:
            pass
        before = await counters(engine.port)
        async with running_replica([engine.port]) as replica:
            await led(replica)
            async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                await asyncio.gather(
                    *(rest(stub, *pair) for pair in zip(wanted, answers, strict=True))
                )
        assert tokens(answers) == expected
        assert (await counters(engine.port)).prefill_token_count == before.prefill_token_count

    with two_ranks(models["llama"], tmp_path) as engine:
        engine.ready()
        (child,) = children(engine.pid)
        asyncio.run(main())
        engine.signal(signal.SIGTERM)
        assert engine.wait(10) == 0
        assert not Path(f"/proc/{child}").exists()


@asynccontextmanager
async def first_part(port: int, wanted: list[pb.GenerateRequest]) -> AsyncIterator[list[Answer]]:
    """Has a replica that goes away when each request has a few tokens; yields what they have."""
    answers = [Answer() for _ in wanted]
    async with running_replica([port]) as replica:
        await led(replica)
        async with wire.channel(f"127.0.0.1:{replica.ports[0]}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            pairs = zip(wanted, answers, strict=True)
            calls = [asyncio.create_task(rest(stub, *pair)) for pair in pairs]
            async with asyncio.timeout(30):
                while not all(len(answer.ids) >= 3 for answer in answers):
                    await asyncio.sleep(0)
            stopping = asyncio.create_task(replica.stop())
            await asyncio.gather(*calls, return_exceptions=True)
            await stopping
    assert not any(answer.usage for answer in answers)
    yield answers


async def rest(
    stub: inference_pb2_grpc.InferenceServiceStub, message: pb.GenerateRequest, answer: Answer
) -> None:
    """Asks for what an answer lacks."""
    again = pb.GenerateRequest()
    again.CopyFrom(message)
    samples = message.output.sample_count or 1
    again.received_token_counts.extend(len(answer.tokens.get(i, [])) for i in range(samples))
    answer.finished.clear()
    async for response in stub.Generate(again, timeout=60):
        answer.add(response)


async def counters(port: int) -> engine_pb2.Counters:
    async with wire.channel(f"127.0.0.1:{port}") as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        return (await stub.Describe(engine_pb2.DescribeRequest(), timeout=5)).counters


def test_a_rank_that_dies_before_the_engine_serves(models: dict[str, Path], tmp_path: Path) -> None:
    with two_ranks(models["llama"], tmp_path) as engine:
        deadline = time.monotonic() + 30
        while not children(engine.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (child,) = children(engine.pid)
        os.kill(child, signal.SIGKILL)
        assert engine.wait(10) == EXIT_RANK_LOST
        last = engine.log().splitlines()[-1]
        assert last == f"cannot serve: rank 1 (process {child}) was ended by signal 9"


@contextmanager
def two_machines(model: Path, directory: Path) -> Iterator[list[Process]]:
    """An engine of four ranks, of which each of two processes is started and starts another."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = ("--model", str(model), "--tensor-parallel", "4", "--device", "cpu", *LIMITS)
    with ExitStack() as stack:
        machines = []
        for number in range(2):
            variables = meeting | {"GROUP_RANK": str(number), "GROUP_WORLD_SIZE": "2"}
            machine = data_plane(directory / f"{number}.log", *common, **variables)
            machines.append(stack.enter_context(machine))
        yield machines


def test_each_of_two_machines_starts_its_own_ranks(models: dict[str, Path], tmp_path: Path) -> None:
    wanted = messages("machines")

    async def main() -> None:
        expected = await alone(models["llama"], wanted)
        async with running_replica([first.port]) as replica:
            await led(replica)
            assert await together(replica, wanted) == expected

    with two_machines(models["llama"], tmp_path) as (first, second):
        first.ready(120)
        assert [len(children(machine.pid)) for machine in (first, second)] == [1, 1]
        asyncio.run(main())
        (child,) = children(second.pid)
        os.kill(child, signal.SIGKILL)
        assert first.wait(END_SECONDS) == second.wait(END_SECONDS) == EXIT_RANK_LOST
        assert f"rank 3 (process {child}" in first.log()


def test_a_rank_of_another_machine_ends_the_engine_before_they_have_met(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Of one that had no link yet, its own machine tells."""
    with two_machines(models["llama"], tmp_path) as (first, second):
        deadline = time.monotonic() + 120
        while not children(second.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (child,) = children(second.pid)
        os.kill(child, signal.SIGKILL)
        assert (first.wait(120), second.wait(120)) == (EXIT_WORKER_FAILED, EXIT_RANK_LOST)
        assert f"rank 3 (process {child}" in first.log()


def test_a_rank_that_hangs_before_the_engine_serves(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with two_ranks(models["llama"], tmp_path, "--hung-step-seconds", "0.5") as engine:
        deadline = time.monotonic() + 60
        while engine.log().count(" loading ") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        (child,) = children(engine.pid)
        os.kill(child, signal.SIGSTOP)
        assert engine.wait(30) == EXIT_RANK_LOST
        last = engine.log().splitlines()[-1]
        sentence = f"rank 1 (process {child}) does not get on: 5 s have brought nothing"
        assert last == f"cannot serve: {sentence}"


def test_a_rank_tells_how_far_its_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 on a thread of this process, the other one on this thread, which takes signals."""
    port, told, over, begun = free_port(), threading.Event(), threading.Event(), pulse.count
    ranks, links = Ranks(), list[Link]()

    def lead() -> None:
        ranks.gather(Place(0, 2, port=port))
        deadline = time.monotonic() + 20
        while not told.is_set() and time.monotonic() < deadline:
            if ranks._progress[1][0] > begun + 1:
                told.set()
            time.sleep(0.01)
        over.set()
        ranks.stop()

    def build(_: Store) -> Engine:
        while not over.wait(0.005):
            pulse.beat()
        return None  # type: ignore[return-value]

    def joined(*given: Any) -> Link:
        links.append(join(*given))
        return links[0]

    monkeypatch.setattr(follower, "join", joined)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    leading = threading.Thread(target=lead)
    leading.start()
    try:
        assert follower.follow(Place(1, 2, port=port), build, (), 60, 5) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        leading.join()
        for link in (*links, *ranks._links.values()):
            link.close()
    assert told.is_set()


def test_of_ranks_that_do_not_get_on_the_one_behind_is_named() -> None:
    ranks = Ranks()
    ranks._names |= {1: "rank 1", 2: "rank 2"}
    for rank, count in ((2, 5), (1, 5)):
        ranks._note_progress(rank, count)
    assert ranks.stalled(5, 60) is None
    loss = ranks.stalled(5, 0)
    # All are as far; rank 2 was not heard of for longest.
    assert loss is not None and loss.sentence.startswith("rank 2 does not get on")
    ranks._note_progress(2, 6)
    loss = ranks.stalled(4, 0)
    assert loss is not None and loss.sentence.startswith("rank 0 does not get on")
    assert loss.status == EXIT_WORKER_FAILED


def test_heads_that_do_not_divide_are_refused_in_one_sentence(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with RankProcesses(models["llama"], 3, tmp_path, *LIMITS) as ranks:
        assert ranks.exit_codes(20)[0] == EXIT_BAD_MODEL
        assert None not in ranks.exit_codes(END_SECONDS)
        text = ranks.log.read_text()
        (line,) = [line for line in text.splitlines() if "cannot serve" in line]
        assert re.search("cannot serve: .*4 query heads do not divide among 3 ranks", line)
        assert "Traceback" not in text


def test_a_place_is_taken_from_the_variables_of_torchrun() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}
    assert Place.of(None, {}) == Place(starts_others=True)
    assert Place.of(4, {}) == Place(size=4, local_size=4, starts_others=True)
    assert Place.of(8, variables) == Place(5, 8, 0, 1, "node-a", 29500)
    torchrun = variables | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Place.of(None, torchrun) == Place(5, 8, 1, 4, "node-a", 29500)
    for wanted, changed, sentence in (
        (2, {}, "WORLD_SIZE is 8 where tensor-parallel is 2"),
        (None, {"RANK": "8"}, "RANK is 8, which is none of 8 ranks"),
        (None, {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is no number"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Place.of(wanted, variables | changed)
    with pytest.raises(ValueError, match="belong together, and MASTER_PORT is not set"):
        Place.of(None, {name: value for name, value in variables.items() if "PORT" not in name})
    # A machine's first rank starts the others there, and these have variables of ranks.
    machine = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    assert Place.of(8, machine) == Place(4, 8, 0, 4, "a", 9, starts_others=True)
    assert Place.of(8, machine | variables) == Place(5, 8, 0, 1, "node-a", 29500)
    for wanted, changed, sentence in (
        (None, {}, "2 machines do not divide tensor-parallel 1"),
        (3, {}, "2 machines do not divide tensor-parallel 3"),
        (2, {"GROUP_RANK": "2"}, "GROUP_RANK is 2, which is none of 2 machines"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Place.of(wanted, machine | changed)
    with pytest.raises(ValueError, match="belong together, and MASTER_ADDR is not set"):
        Place.of(8, {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="each rank needs its own"):
        Place(1, 2).device("cuda:1")


def test_links_are_open_to_where_the_ranks_are() -> None:
    """A machine's own name is often on its loopback interface, where others do not find it."""
    for host, address in (("127.0.1.1", "127.0.1.1"), ("localhost", "127.0.0.1")):
        with listen(host) as door:
            assert door.getsockname()[0] == address
            socket.create_connection(door.getsockname()).close()
    for host in (socket.gethostname(), "no.such.host.invalid"):
        with listen(host) as door:
            assert door.getsockname()[0] in ("::", "0.0.0.0")


def test_a_link_is_for_those_who_know_the_secret() -> None:
    secret, hello = os.urandom(SECRET_BYTES), Hello(3, 1234, "node-b")
    with listen("localhost") as door:
        port = door.getsockname()[1]
        assert door.getsockname()[0] == "127.0.0.1"
        # A machine's own name is one for others, whatever address it has here.
        assert loopback("127.3.2.1") == "127.3.2.1" and loopback(socket.gethostname()) is None
        there = Link.connect("127.0.0.1", port, secret, hello, 5)
        here = Link(door.accept()[0])
        assert here.hello(secret) == hello
        here.send(Kind.PLAN, bytes(200_000))
        assert there.receive(5) == (Kind.PLAN, bytes(200_000))
        assert there.receive(0.01) is None
        here.close()
        with pytest.raises(LinkEnded):
            there.receive()
        there.close()
        for greeting in (b"GET / HTTP/1.1\r\n", b"\1\x28\0\0\0" + bytes(40), b""):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(greeting)
            stranger = Link(door.accept()[0])
            with pytest.raises(LinkEnded):
                stranger.hello(secret)
            stranger.close()
