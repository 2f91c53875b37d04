"""The prefix index under a running stack: one round trip, and never more than a hint."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import redis

from control_plane.prefix_index import EngineLife
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model, load_model
from tests.models import tiny_model
from tests.redis_server import RedisServer
from tests.stack import led, request, running_engine, running_replica, running_stack

PROMPT = list(range(40, 140))


async def held(client: redis.Redis, count: int) -> list[bytes]:
    """Waits until one engine's set has `count` members; returns the keys of all sets."""
    async with asyncio.timeout(5):
        while True:
            keys = client.keys("*:held:*")
            if any(client.scard(key) == count for key in keys):
                return list(keys)
            await asyncio.sleep(0.02)


def test_lookup_of_6250_blocks_is_one_round_trip(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path, max_position_embeddings=8192)
    model = load_model(directory, dtype="float32")
    prompt = [8 + (7 * i + i // 90) % 120 for i in range(6250)]
    commands: list[str] = []

    def watch(monitor: redis.client.Monitor) -> None:
        for entry in monitor.listen():
            commands.append(entry["command"] if entry["client_type"] != "lua" else "")
            if "the end" in entry["command"]:
                return

    async def main(server: RedisServer) -> None:
        client = redis.Redis.from_url(server.url)
        async with running_stack(
            model,
            block_size=1,
            block_count=6400,
            step_tokens=1024,
            chunk_tokens=1024,
            redis_url=server.url,
            index_timeout_ms=2000,
        ) as stack:
            await stack.generate(request(prompt, 1))
            await held(client, 6250)
            index = stack.replica.index
            with client.monitor() as monitor:
                thread = threading.Thread(target=watch, args=(monitor,))
                thread.start()
                answer = await stack.generate(request(prompt, 1))
                client.echo("the end")
                await asyncio.to_thread(thread.join, 10)
            # Registered prefixes are looked after in the background.
            commands[:] = [command for command in commands if "{registered}" not in command]
            lookups = [command for command in commands if command.startswith("EVAL")]
            assert len(lookups) == 1
            assert not [c for c in commands if "HGET" in c or "SMISMEMBER" in c or "GET " in c]
            assert answer.accepted.cached_token_count == 6250
            assert stack.replica.router.predicted_tokens == 6250
            assert index.lookup_failures == 0
        client.close()

    with RedisServer() as server:
        asyncio.run(main(server))


def test_killing_redis_fails_no_request(llama: Model) -> None:
    async def main(server: RedisServer) -> None:
        async with running_stack(llama, redis_url=server.url) as stack:
            await stack.generate(request(PROMPT, 4))
            messages = [request(PROMPT[i:], 60) for i in range(16)]
            running = asyncio.create_task(stack.together(messages))
            async with asyncio.timeout(5):
                while stack.loop.scheduler.running_count < 8:
                    await asyncio.sleep(0)
            server.kill()
            assert stack.loop.scheduler.running_count > 0
            answers = await running
            answers += await stack.together(messages)
            assert all(answer.usage is not None for answer in answers)
            # Within the engine, hits are found without Redis.
            assert all(answer.accepted.cached_token_count >= 64 for answer in answers[16:])
            assert not stack.replica.index.up
            await stack.idle()

    with RedisServer() as server:
        asyncio.run(main(server))


def test_restarted_engine_has_no_old_entries(llama: Model) -> None:
    sizes = EngineSizes(16, 128, 0, 8, 256, 1024)

    async def main(server: RedisServer) -> None:
        client = redis.Redis.from_url(server.url)
        async with running_engine(Engine(llama, sizes), None) as (_, port):
            async with running_replica([port], redis_url=server.url) as replica:
                await led(replica)
                leader = replica.router.leaders[0]
                assert leader.loop is not None
                old, hashes = leader.loop.life, b""
                generation = await _generate(replica.ports[0])
                assert generation.usage is not None
                await held(client, len(PROMPT) // 16)
                hashes = b"".join(leader.loop.scheduler.pool.held_hashes())
        async with running_engine(Engine(llama, sizes), None) as (_, port):
            async with running_replica([port], redis_url=server.url) as replica:
                await led(replica)
                leader = replica.router.leaders[0]
                assert leader.loop is not None
                new = leader.loop.life
                assert new.engine_id == old.engine_id
                assert new.incarnation != old.incarnation
                fingerprint = leader.loop.facts.fingerprint
                found = await replica.index.lookup(fingerprint, [new], hashes)
                assert found == {new: 0}
                # The old set is still there, and nobody asks for it any more.
                found = await replica.index.lookup(fingerprint, [old], hashes)
                assert found == {EngineLife(old.engine_id, old.incarnation): len(PROMPT) // 16}
        client.close()

    with RedisServer() as server:
        asyncio.run(main(server))


async def _generate(port: int):  # type: ignore[no-untyped-def]
    from protos import wire
    from protos.inference.v1 import inference_pb2_grpc
    from tests.stack import Answer

    answer = Answer()
    async with wire.channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async for response in stub.Generate(request(PROMPT, 4)):
            answer.add(response)
    return answer
