"""Death of a control plane: the next one goes on, and nobody notices more than a pause."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc
import pytest

from protos import wire
from protos.engine.v1 import engine_pb2, engine_pb2_grpc
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.processes import control_plane, data_plane, free_port
from tests.stack import Answer, request

STREAMS = 16


def _messages(suffix: str) -> list[pb.GenerateRequest]:
    """Greedy and seeded ones, single and several samples."""
    messages = []
    for i in range(STREAMS):
        message = request(list(range(10 + i, 40 + 3 * i)), 300, request_id=f"r{i}-{suffix}")
        message.stopping.ignore_eos = True
        if i % 2:
            message.sampling.MergeFrom(pb.Sampling(temperature=1, seed=i))
        if i % 4 == 3:
            message.output.sample_count = 2
        messages.append(message)
    return messages


async def _counters(port: int) -> engine_pb2.Counters:
    async with wire.channel(f"127.0.0.1:{port}") as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        answer = await stub.Describe(engine_pb2.DescribeRequest(), timeout=5)
        return answer.counters


class _Clients:
    """Streams that can be cut off and taken up again by request id and token counts."""

    def __init__(self, messages: list[pb.GenerateRequest]) -> None:
        self.messages = messages
        self.answers = [Answer() for _ in messages]
        self.repeats = 0

    async def run(self, port: int, enough: asyncio.Event | None = None) -> None:
        async with wire.channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await asyncio.gather(*(self._one(stub, i, enough) for i in range(len(self.messages))))

    async def _one(
        self,
        stub: inference_pb2_grpc.InferenceServiceStub,
        index: int,
        enough: asyncio.Event | None,
    ) -> None:
        message, answer = pb.GenerateRequest(), self.answers[index]
        message.CopyFrom(self.messages[index])
        samples = message.output.sample_count or 1
        message.received_token_counts.extend(len(answer.tokens.get(i, [])) for i in range(samples))
        answer.finished.clear()
        try:
            async for response in stub.Generate(message):
                answer.add(response)
                if enough and all(self._has_some(i) for i in range(len(self.messages))):
                    enough.set()
        except grpc.aio.AioRpcError as error:
            assert enough is not None and error.code() is grpc.StatusCode.UNAVAILABLE, error

    def _has_some(self, index: int) -> bool:
        return len(self.answers[index].ids) >= 5


def test_sigkill_and_restart_recompute_nothing(llama_directory: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--model", str(llama_directory), "--max-slots", "64")

    async def undisturbed() -> list[Answer]:
        clients = _Clients(_messages("calm"))
        await clients.run(port)
        return clients.answers

    async def first_part(clients: _Clients) -> None:
        enough = asyncio.Event()
        running = asyncio.create_task(clients.run(port, enough))
        await enough.wait()
        first.kill()
        await running

    with data_plane(tmp_path / "engine.log", *flags) as engine:
        engine.ready()
        first = control_plane(tmp_path / "first.log", [engine.port], port=port)
        with first:
            first.ready()
            expected = asyncio.run(undisturbed())
            clients = _Clients(_messages("killed"))
            asyncio.run(first_part(clients))
            before = asyncio.run(_counters(engine.port))
            assert any(not answer.usage for answer in clients.answers)
        with control_plane(tmp_path / "second.log", [engine.port], port=port) as second:
            second.ready()
            asyncio.run(clients.run(port))
            after = asyncio.run(_counters(engine.port))
            assert "epoch 2" in second.log()
        for answer, calm in zip(clients.answers, expected, strict=True):
            assert answer.tokens == calm.tokens
            assert answer.texts == calm.texts
            assert {i: f.reason for i, f in answer.finished.items()} == {
                i: f.reason for i, f in calm.finished.items()
            }
        assert after.prefill_token_count == before.prefill_token_count
        assert after.refused_plan_count == 0


def test_engine_death_recomputes_and_keeps_every_token(
    llama_directory: Path, tmp_path: Path
) -> None:
    port, engine_port = free_port(), free_port()
    flags = ("--model", str(llama_directory), "--max-slots", "64")

    async def run(clients: _Clients) -> None:
        enough = asyncio.Event()
        running = asyncio.create_task(clients.run(port, enough))
        await enough.wait()
        engine.kill()
        with data_plane(tmp_path / "again.log", *flags, port=engine_port) as again:
            await asyncio.to_thread(again.ready)
            await running

    with (
        data_plane(tmp_path / "engine.log", *flags, port=engine_port) as engine,
        control_plane(tmp_path / "control.log", [engine_port], port=port) as control,
    ):
        engine.ready()
        control.ready()
        calm = _Clients(_messages("calm"))
        asyncio.run(calm.run(port))
        clients = _Clients(_messages("killed"))
        asyncio.run(run(clients))
        for answer, expected in zip(clients.answers, calm.answers, strict=True):
            assert answer.tokens == expected.tokens


@pytest.mark.parametrize("arch", ["missing", "pickle", "falcon"])
def test_unservable_models_end_the_process_with_one_sentence(arch: str, tmp_path: Path) -> None:
    from tests.models import tiny_model

    directory = tmp_path / "model"
    if arch == "falcon":
        tiny_model("falcon", directory)
    elif arch == "pickle":
        tiny_model("llama", directory)
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with data_plane(tmp_path / "log", "--model", str(directory)) as process:
        assert process.wait() == 2
        lines = process.log().strip().splitlines()
        assert lines[-1].startswith("cannot serve: ")
        assert not [line for line in lines if "Traceback" in line]


def test_an_engine_that_cannot_be_built_ends_with_the_status_of_a_failed_worker(
    llama_directory: Path, tmp_path: Path
) -> None:
    memory = ("--kv-memory-mib", str(1 << 40))
    with data_plane(tmp_path / "log", "--model", str(llama_directory), *memory) as process:
        assert process.wait() == 70
        assert "the engine cannot be built" in process.log()


def test_sigterm_ends_both_planes_cleanly(llama_directory: Path, tmp_path: Path) -> None:
    with data_plane(tmp_path / "e.log", "--model", str(llama_directory)) as engine:
        engine.ready()
        with control_plane(tmp_path / "c.log", [engine.port]) as control:
            control.ready()
            control.signal(signal.SIGTERM)
            assert control.wait(10) == 0
        engine.signal(signal.SIGTERM)
        assert engine.wait(10) == 0
