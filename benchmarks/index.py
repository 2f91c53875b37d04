"""Prefix-index lookup of a 6,250-block prompt, against one command per block in a pipeline."""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import time

import redis

from benchmarks.report import report
from control_plane.prefix_index import EngineLife, PrefixIndex
from tests.redis_server import RedisServer

BLOCKS = 6250
REPEATS = 50


async def ours(url: str, engines: int, hashes: list[bytes]) -> float:
    """Median seconds of a lookup that all engines answer in full."""
    index = PrefixIndex(url, lookup_timeout_seconds=1.0)
    await index.start()
    lives = [EngineLife(f"engine-{i}", "life") for i in range(engines)]
    for life in lives:
        index.track("model", life, lambda _: hashes)
    packed, times = b"".join(hashes), []
    async with asyncio.timeout(60):
        while min((await index.lookup("model", lives, packed)).values(), default=0) < BLOCKS:
            await asyncio.sleep(0.05)
    for _ in range(REPEATS):
        began = time.perf_counter()
        await index.lookup("model", lives, packed)
        times.append(time.perf_counter() - began)
    await index.close()
    return statistics.median(times)


def one_command_per_block(url: str, hashes: list[bytes]) -> float:
    """Median seconds of the usual layout: a hash of holders per block, fetched in one pipeline."""
    client, times = redis.Redis.from_url(url), []
    for digest in hashes:
        client.hset(b"block:" + digest, "engine-0", "1")
    for _ in range(10):
        began = time.perf_counter()
        pipeline = client.pipeline(transaction=False)
        for digest in hashes:
            pipeline.hkeys(b"block:" + digest)
        pipeline.execute()
        times.append(time.perf_counter() - began)
    client.close()
    return statistics.median(times)


def main() -> None:
    hashes = [hashlib.sha256(str(i).encode()).digest()[:16] for i in range(BLOCKS)]
    with RedisServer() as server:
        theirs = one_command_per_block(server.url, hashes)
        for engines in (1, 64):
            seconds = asyncio.run(ours(server.url, engines, hashes))
            report(
                "index_lookup",
                blocks=BLOCKS,
                engines=engines,
                over="one command per block",
                speedup=theirs / seconds,
                round_trips=1,
            )


if __name__ == "__main__":
    main()
