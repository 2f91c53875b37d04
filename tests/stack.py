"""Both planes in one event loop, talking real gRPC over loopback; and a client that collects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from control_plane.leader import LeaderState
from control_plane.server import Replica
from control_plane.settings import Settings
from data_plane.engine import Engine, EngineSizes
from data_plane.kv_scales import KVScales
from data_plane.model import Model
from data_plane.service import EngineService, ServiceTimes, leaders_only
from data_plane.tokenizer_files import read_tokenizer
from data_plane.worker import Worker
from protos import wire
from protos.admin.v1 import admin_pb2_grpc
from protos.engine.v1 import engine_pb2_grpc
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc

# Nothing listens here: the prefix index is down unless a test brings its own Redis.
NO_REDIS = "redis://127.0.0.1:1"


@dataclass
class Answer:
    """All that one stream brought."""

    accepted: pb.Accepted = field(default_factory=pb.Accepted)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[pb.TokenLogprob]] = field(default_factory=dict)
    prompt_logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finished: dict[int, pb.Finished] = field(default_factory=dict)
    bests: list[pb.BestSoFar] = field(default_factory=list)
    usage: pb.Usage | None = None

    def add(self, response: pb.GenerateResponse) -> None:
        kind = response.WhichOneof("event")
        if kind == "accepted":
            self.accepted = response.accepted
        elif kind == "delta":
            delta = response.delta
            self.tokens.setdefault(delta.sample, []).extend(delta.token_ids)
            self.texts[delta.sample] = self.texts.get(delta.sample, "") + delta.text
            self.logprobs.setdefault(delta.sample, []).extend(delta.logprobs)
            self.prompt_logprobs.extend(delta.prompt_logprobs)
        elif kind == "finished":
            assert response.finished.sample not in self.finished
            self.finished[response.finished.sample] = response.finished
        elif kind == "best_so_far":
            assert self.accepted.request_id and not self.tokens and not self.finished
            self.bests.append(response.best_so_far)
        else:
            self.usage = response.usage

    @property
    def ids(self) -> list[int]:
        return self.tokens.get(0, [])

    @property
    def text(self) -> str:
        return self.texts.get(0, "")


def request(prompt: list[int] | str, max_tokens: int = 16, **fields: object) -> pb.GenerateRequest:
    """A greedy request; `fields` replace whole sub-messages."""
    message = pb.GenerateRequest(
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(max_tokens=max_tokens),
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    message.MergeFrom(pb.GenerateRequest(**fields))  # type: ignore[arg-type]
    return message


class Stack:
    """A running pair of planes."""

    def __init__(self, engine: Engine, worker: Worker, replica: Replica) -> None:
        self.engine, self.worker, self.replica = engine, worker, replica
        self.address = f"127.0.0.1:{replica.ports[0]}"
        self.channel = wire.channel(self.address)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.admin_channel = wire.channel(f"127.0.0.1:{replica.ports[1]}")
        self.admin = admin_pb2_grpc.AdminServiceStub(self.admin_channel)

    async def generate(self, message: pb.GenerateRequest, timeout: float = 60) -> Answer:
        answer = Answer()
        async for response in self.stub.Generate(message, timeout=timeout):
            answer.add(response)
        return answer

    async def together(self, messages: list[pb.GenerateRequest]) -> list[Answer]:
        return list(await asyncio.gather(*(self.generate(message) for message in messages)))

    @property
    def loop(self):  # type: ignore[no-untyped-def]
        loop = self.replica.router.leaders[0].loop
        assert loop is not None
        return loop

    async def idle(self) -> None:
        """Waits until nothing is resident on either plane, and checks that blocks are conserved."""
        async with asyncio.timeout(10):
            while self.loop.scheduler.running_count or self.loop.scheduler.steps_in_flight:
                await asyncio.sleep(0.005)
            while self.engine.state.resident_slots().size:
                await asyncio.sleep(0.005)
        await self.check_conserved()
        assert self.loop.scheduler.pool.used_count == 0

    async def check_conserved(self) -> None:
        """Checks that no block is lost on either plane, the engine's between two steps."""
        pool = self.loop.scheduler.pool
        pool.check()
        assert pool.conserved
        await self.worker.call(self.engine.state.check)
        counts = await self.worker.call(self.engine.state.block_counts)
        assert sum(counts) == pool.block_count


@asynccontextmanager
async def running_engine(
    engine: Engine,
    directory: Path | None,
    address: str = "127.0.0.1:0",
    tls: wire.Tls | None = None,
    engine_id: str = "engine-test",
    leaders: frozenset[str] = frozenset(),
    **times: float,
) -> AsyncIterator[tuple[Worker, int]]:
    """Serves an engine; yields its worker and its port."""
    worker = Worker()
    worker.start()
    tokenizer = read_tokenizer(directory) if directory else None
    service = EngineService(
        engine, worker, tokenizer, engine_id=engine_id, times=ServiceTimes(**times)
    )
    server = wire.server(leaders_only(leaders))
    engine_pb2_grpc.add_EngineServiceServicer_to_server(service, server)
    port = wire.listen(server, address, tls)
    await server.start()
    try:
        yield worker, port
    finally:
        await service.stop()
        await server.stop(0)
        worker.stop()


@asynccontextmanager
async def running_replica(ports: list[int], **settings: object) -> AsyncIterator[Replica]:
    """Serves a control plane that leads the engines on `ports`."""
    defaults: dict[str, object] = {
        "engines": ",".join(f"127.0.0.1:{port}" for port in ports),
        "listen": "127.0.0.1:0",
        "admin_listen": "127.0.0.1:0",
        "anonymous_roles": "generate,read,write",
        "redis_url": NO_REDIS,
        "check_invariants": True,
        "drain_seconds": 0,
    }
    replica = Replica(Settings(**(defaults | settings)))  # type: ignore[arg-type]
    await replica.start()
    try:
        yield replica
    finally:
        await replica.stop()


async def led(replica: Replica) -> None:
    """Waits until every engine is led."""
    async with asyncio.timeout(10):
        while any(leader.state is not LeaderState.LED for leader in replica.router.leaders):
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running_stack(
    model: Model,
    *,
    directory: Path | None = None,
    block_size: int = 16,
    block_count: int = 512,
    host_block_count: int = 16,
    slot_count: int = 64,
    step_tokens: int = 256,
    max_length: int = 0,
    kv_scales: KVScales | None = None,
    times: dict[str, float] | None = None,
    **settings: object,
) -> AsyncIterator[Stack]:
    """One engine and one replica, with block conservation checked after every step."""
    sizes = EngineSizes(
        block_size=block_size,
        block_count=block_count,
        host_block_count=host_block_count,
        slot_count=slot_count,
        step_tokens=step_tokens,
        max_length=max_length or model.facts.max_model_length,
    )
    engine = Engine(model, sizes, kv_scales=kv_scales, check=True)
    async with (
        running_engine(engine, directory, **(times or {})) as (worker, port),
        running_replica([port], **settings) as replica,
    ):
        await led(replica)
        stack = Stack(engine, worker, replica)
        try:
            yield stack
        finally:
            await stack.channel.close()
            await stack.admin_channel.close()


async def failure(call: object) -> grpc.aio.AioRpcError:
    """Awaits what is to fail and returns the error."""
    try:
        await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call did not fail")
