"""Starts both planes for a benchmark and drives Generate."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protos import wire
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.processes import Process, free_port


@contextmanager
def process(module: str, port: int, *flags: str) -> Iterator[None]:
    """Runs one plane until the block ends; waits until it serves."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Process(module, port, Path(folder) / "log", *flags) as running,
    ):
        running.ready(120)
        yield


def engine_flags(model: Path, threads: int) -> list[str]:
    return [
        "--model", str(model), "--threads", str(threads), "--max-slots", "64",
        "--max-step-tokens", "2048", "--max-model-length", "2048", "--kv-memory-mib", "1024",
    ]  # fmt: skip


def control_flags(engine_port: int) -> list[str]:
    return [
        "--engines", f"127.0.0.1:{engine_port}", "--redis-url", "redis://127.0.0.1:1",
        "--admin-listen", f"127.0.0.1:{free_port()}",
    ]  # fmt: skip


async def drive(port: int, requests: list[tuple[list[int], int]]) -> float:
    """Sends all requests at once through Generate; returns seconds until the last token."""
    async with wire.channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        began = time.perf_counter()
        counts = await asyncio.gather(*(_one(stub, *request) for request in requests))
        elapsed = time.perf_counter() - began
    if counts != [count for _, count in requests]:
        raise RuntimeError("a request did not get all its tokens")
    return elapsed


async def _one(stub: inference_pb2_grpc.InferenceServiceStub, prompt: list[int], count: int) -> int:
    message = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(max_tokens=count, ignore_eos=True),
    )
    got = 0
    async for response in stub.Generate(message):
        got += len(response.delta.token_ids)
    return got
