"""The prefix index against a real Redis that is slow, emptied, broken, killed and brought back."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr

from control_plane.prefix_index import EngineLife, PrefixIndex
from control_plane.prefixes.registered import Definition, RegisteredPrefixes
from control_plane.prefixes.store import RegisteredStore
from tests.certificates import Authority
from tests.processes import ROOT
from tests.redis_server import RedisServer

FINGERPRINT = "f00d"
ONE, TWO = EngineLife("engine-0", "aa"), EngineLife("engine-1", "bb")


def chain(count: int, seed: int = 0) -> list[bytes]:
    generator = random.Random(seed)
    return [generator.randbytes(16) for _ in range(count)]


def key(life: EngineLife) -> str:
    return f"quire:1:{{{FINGERPRINT}}}:held:{life.engine_id}:{life.incarnation}"


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    with redis.Redis.from_url(shared_server.url) as client:
        client.flushall()
        client.script_flush()
    return shared_server


@asynccontextmanager
async def opened(server: RedisServer, **options: object) -> AsyncIterator[PrefixIndex]:
    # A busy machine may take its time; what a test says of time it says itself.
    settings: dict = {"lookup_timeout_seconds": 1.0, "flush_interval_seconds": 0.01} | options
    index = PrefixIndex(server.url, **settings)
    await index.start()
    try:
        yield index
    finally:
        await index.close()


async def eventually(condition: Callable[[], object], seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not come about"
        await asyncio.sleep(0.005)


async def lookup_becomes(index: PrefixIndex, life: EngineLife, hashes: list[bytes], n: int) -> None:
    deadline = time.monotonic() + 8
    while await index.lookup(FINGERPRINT, [life], b"".join(hashes)) != {life: n}:
        assert time.monotonic() < deadline, f"the index never says {n}"
        await asyncio.sleep(0.01)


def test_lookup_finds_the_held_prefix_of_each_engine(server: RedisServer) -> None:
    async def main() -> None:
        blocks = chain(70)
        async with opened(server) as index:
            with redis.Redis.from_url(server.url) as client:
                for held in range(71):
                    client.delete(key(ONE), key(TWO))
                    if held:
                        client.sadd(key(ONE), *blocks[:held])
                        client.sadd(key(TWO), *blocks[: held // 2 + 1], *chain(9, seed=5))
                    asked = b"".join(blocks[:held]) if held % 2 else b"".join(blocks)
                    expected = {ONE: held, TWO: held // 2 + 1 if held else 0}
                    if asked and held:
                        assert await index.lookup(FINGERPRINT, [ONE, TWO], asked) == expected
            assert await index.lookup(FINGERPRINT, [ONE], b"") == {ONE: 0}
            assert await index.lookup(FINGERPRINT, [], b"".join(blocks)) == {}
            assert index.lookup_failures == 0 and index.up

    asyncio.run(main())


def test_lookup_of_a_long_prompt_is_one_command_and_fast(server: RedisServer) -> None:
    async def main() -> None:
        blocks = chain(6250)
        hashes = b"".join(blocks)
        lives = [EngineLife(f"engine-{number}", "aa") for number in range(64)]
        with redis.Redis.from_url(server.url) as client:
            for number, life in enumerate(lives):
                client.sadd(key(life), *blocks[: 6250 - 97 * number])
        async with opened(server) as index:
            expected = {life: 6250 - 97 * number for number, life in enumerate(lives)}
            with redis.Redis.from_url(server.url) as client, client.monitor() as monitor:
                client.ping()  # connects
                while monitor.next_command()["command"] != "PING":
                    pass
                assert await index.lookup(FINGERPRINT, lives, hashes) == expected
                client.ping()
                seen = []
                while not seen or seen[-1]["command"] != "PING":
                    seen.append(monitor.next_command())
            sent = [each["command"] for each in seen if each["client_type"] != "lua"]
            assert [command.split()[0] for command in sent] == ["EVALSHA", "PING"]

    asyncio.run(main())


def test_a_script_that_redis_forgot_is_sent_again(server: RedisServer) -> None:
    async def main() -> None:
        async with opened(server) as index:
            with redis.Redis.from_url(server.url) as client:
                client.sadd(key(ONE), *chain(3))
                client.script_flush()
            assert await index.lookup(FINGERPRINT, [ONE], b"".join(chain(5))) == {ONE: 3}

    asyncio.run(main())


def test_changes_go_out_in_the_background_and_in_order(server: RedisServer) -> None:
    async def main() -> None:
        first, second = chain(10_000, seed=1), chain(20, seed=2)
        async with opened(server, entry_ttl_seconds=100) as index:
            index.track(FINGERPRINT, ONE, lambda _: first)
            index.track(FINGERPRINT, TWO, lambda _: [])
            await lookup_becomes(index, ONE, first, 10_000)
            index.publish(TWO, second, [])
            index.publish(ONE, [], first[5:])
            index.publish(ONE, first[5:7], first[6:8])
            index.publish(EngineLife("unknown", "x"), first, [])
            await lookup_becomes(index, TWO, second, 20)
            await lookup_becomes(index, ONE, first, 7)
            with redis.Redis.from_url(server.url) as client:
                assert client.smembers(key(ONE)) == set(first[:7])
                assert sorted(client.keys()) == [key(ONE).encode(), key(TWO).encode()]
                assert 90 < client.ttl(key(ONE)) <= 100 and 90 < client.ttl(key(TWO)) <= 100
            assert index.dropped == 0

    asyncio.run(main())


def test_a_restarted_engine_holds_nothing(server: RedisServer) -> None:
    async def main() -> None:
        blocks, reborn = chain(30), EngineLife(ONE.engine_id, "new")
        async with opened(server) as index:
            index.track(FINGERPRINT, ONE, lambda _: blocks)
            await lookup_becomes(index, ONE, blocks, 30)
            asked = b"".join(blocks)
            assert await index.lookup(FINGERPRINT, [reborn], asked) == {reborn: 0}
            assert await index.lookup("another model", [ONE], asked) == {ONE: 0}
            index.forget(ONE, purge=True)
            await lookup_becomes(index, ONE, blocks, 0)
            index.publish(ONE, blocks, [])
            index.track(FINGERPRINT, reborn, lambda _: blocks[:4])
            await lookup_becomes(index, reborn, blocks, 4)
            index.forget(reborn)
            await asyncio.sleep(0.05)
            assert await index.lookup(FINGERPRINT, [reborn, ONE], asked) == {reborn: 4, ONE: 0}

    asyncio.run(main())


def test_sets_are_refreshed_and_expire_without(server: RedisServer) -> None:
    async def main() -> None:
        blocks = chain(5)
        async with opened(server, entry_ttl_seconds=1) as index:
            index.track(FINGERPRINT, ONE, lambda _: blocks)
            index.track(FINGERPRINT, TWO, lambda _: blocks)
            await lookup_becomes(index, TWO, blocks, 5)
            index.forget(TWO)
            await lookup_becomes(index, TWO, blocks, 0)
            await asyncio.sleep(1.2)
            assert await index.lookup(FINGERPRINT, [ONE], b"".join(blocks)) == {ONE: 5}

    asyncio.run(main())


@pytest.mark.parametrize("busy", [False, True])
def test_a_flushed_redis_is_filled_again(server: RedisServer, busy: bool) -> None:
    async def main() -> None:
        held = chain(50)
        async with opened(server, entry_ttl_seconds=600 if busy else 3) as index:
            index.track(FINGERPRINT, ONE, lambda _: held)
            await lookup_becomes(index, ONE, held, 50)
            with redis.Redis.from_url(server.url) as client:
                client.flushall()
            if busy:
                held.extend(chain(1, seed=8))
                index.publish(ONE, held[-1:], [])
            await lookup_becomes(index, ONE, held, len(held))
            assert index.up

    asyncio.run(main())


def test_garbage_at_a_key_costs_hits_only(server: RedisServer) -> None:
    async def main() -> None:
        blocks = chain(8)
        with redis.Redis.from_url(server.url) as client:
            client.set(key(ONE), "what is this")
            client.sadd(key(TWO), *blocks[:3])
        async with opened(server) as index:
            asked = b"".join(blocks) + b"odd"
            assert await index.lookup(FINGERPRINT, [ONE, TWO], asked) == {ONE: 0, TWO: 3}
            index.track(FINGERPRINT, ONE, lambda _: blocks)
            await lookup_becomes(index, ONE, blocks, 8)
            with redis.Redis.from_url(server.url) as client:
                client.set(key(ONE), "again")
            index.publish(ONE, blocks[:1], [])
            await lookup_becomes(index, ONE, blocks, 8)
            assert index.up

    asyncio.run(main())


def test_too_many_changes_make_the_set_be_rewritten(server: RedisServer) -> None:
    async def main() -> None:
        held = chain(10)
        async with opened(server, max_pending=100) as index:
            index.track(FINGERPRINT, ONE, lambda _: held)
            await lookup_becomes(index, ONE, held, 10)
            held.extend(chain(500, seed=3))
            index.publish(ONE, held[10:], [])
            assert index.dropped == 500
            await lookup_becomes(index, ONE, held, 510)

    asyncio.run(main())


def test_a_hook_that_fails_is_contained(server: RedisServer, caplog) -> None:
    def broken(_: EngineLife) -> list[bytes]:
        raise KeyError("no such engine")

    async def main() -> None:
        async with opened(server) as index:
            index.track(FINGERPRINT, ONE, broken)
            index.track(FINGERPRINT, TWO, lambda _: chain(4))
            await lookup_becomes(index, TWO, chain(4), 4)
            assert index.up and "engine-0" in caplog.text

    asyncio.run(main())


def test_a_killed_redis_costs_hits_until_it_is_back(caplog) -> None:
    async def main() -> None:
        held = chain(40)
        asked = b"".join(held)
        with RedisServer() as server:
            async with opened(server) as index:
                index.track(FINGERPRINT, ONE, lambda _: held)
                await lookup_becomes(index, ONE, held, 40)
                server.kill()
                began = time.monotonic()
                for _ in range(200):
                    assert await index.lookup(FINGERPRINT, [ONE], asked) == {}
                assert time.monotonic() - began < 5 and not index.up
                assert index.lookup_failures >= 200
                held.extend(chain(2, seed=4))
                index.publish(ONE, held[40:], [])
                server.start()
                await lookup_becomes(index, ONE, held, 42)
                assert index.up

    with caplog.at_level(logging.INFO, "control_plane.prefix_index"):
        asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_starting_without_redis(caplog) -> None:
    async def main() -> None:
        with RedisServer() as server:
            server.stop()
            async with opened(server) as index:
                assert not index.up
                assert await index.lookup(FINGERPRINT, [ONE], b"".join(chain(3))) == {}
                index.track(FINGERPRINT, ONE, lambda _: chain(3))
                server.start()
                await lookup_becomes(index, ONE, chain(3), 3)

    asyncio.run(main())


def test_a_hanging_redis_is_waited_for_once_and_not_long() -> None:
    async def main() -> None:
        held = chain(40)
        asked = b"".join(held)
        with RedisServer() as server:
            async with opened(server, lookup_timeout_seconds=0.1) as index:
                index.track(FINGERPRINT, ONE, lambda _: held)
                await lookup_becomes(index, ONE, held, 40)
                server.pause()
                began = time.monotonic()
                answers = [index.lookup(FINGERPRINT, [ONE], asked) for _ in range(30)]
                assert await asyncio.gather(*answers) == [{}] * 30
                assert await index.lookup(FINGERPRINT, [ONE], asked) == {}
                assert time.monotonic() - began < 5
                server.resume()
                # Late answers to abandoned questions must not be taken for others'.
                await eventually(lambda: index.up)
                lives = [EngineLife(str(number), "x") for number in range(30)]
                for life in [*lives, ONE]:
                    n = 40 if life == ONE else 0
                    assert await index.lookup(FINGERPRINT, [life], asked) == {life: n}

    asyncio.run(main())


def test_counters_and_cancelled_lookups(server: RedisServer) -> None:
    async def main() -> None:
        async with opened(server) as index:
            asked = b"".join(chain(10))
            for _ in range(20):
                task = asyncio.create_task(index.lookup(FINGERPRINT, [ONE], asked))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            with redis.Redis.from_url(server.url) as client:
                client.sadd(key(ONE), *chain(10))
            found = await asyncio.gather(
                *(index.lookup(FINGERPRINT, [ONE], asked[: 16 * n]) for n in range(1, 11))
            )
            assert [each[ONE] for each in found] == list(range(1, 11))
            assert index.up and index.lookup_failures == 0
            assert index.lookups == 30 and index.lookup_seconds_sum > 0

    asyncio.run(main())


def test_wrong_credentials_cost_hits_only_and_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The user has no more rights than docs/operations.md gives it."""
    page = (ROOT / "docs/operations.md").read_text()
    (user,) = re.findall(r"^ACL SETUSER quire on >PASSWORD (.*)$", page, re.M)

    async def main(server: RedisServer, client: redis.Redis) -> None:
        blocks = chain(20)
        credentials = {"username": "quire", "password": SecretStr("hunter2")}
        async with opened(server, **credentials) as index:
            index.track(FINGERPRINT, ONE, lambda _: blocks)
            for _ in range(3):
                assert await index.lookup(FINGERPRINT, [ONE], b"".join(blocks)) == {}
            await asyncio.sleep(0.5)
            assert not index.up and index.lookup_failures == 3
            (record,) = [each for each in caplog.records if "prefix index" in each.message]
            assert "hunter2" not in caplog.text and "invalid username" in record.message
            client.execute_command("ACL", "SETUSER", "quire", "resetpass", ">hunter2")
            await eventually(lambda: index.up)
            await lookup_becomes(index, ONE, blocks, 20)
            more = chain(5, seed=2)
            index.publish(ONE, more, blocks[10:])
            await lookup_becomes(index, ONE, blocks, 10)
            index.forget(ONE, purge=True)
            await lookup_becomes(index, ONE, blocks, 0)
            registered = RegisteredPrefixes([])
            store = RegisteredStore(index.redis, "quire", registered)
            await store.refresh()
            await store.put(Definition("one", "text"))
            await store.warm("one")
            store._unwritten_hits["one"] = store._unwritten_tokens["one"] = 1
            await store.refresh()
            assert store.saved["one"].tokens == 1
            client.auth("of-the-default-user")
            client.flushall()
            await store.refresh()
            assert list(registered.stored) == ["one"]
            await store.remove("one")
            assert index.up
        assert "hunter2" not in caplog.text

    caplog.set_level(logging.DEBUG)
    with RedisServer() as server, redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "quire", "on", ">other", *user.split())
        client.execute_command("ACL", "SETUSER", "default", "resetpass", ">of-the-default-user")
        asyncio.run(main(server, client))


def test_redis_over_tls(server: RedisServer, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    own = authority.issue("redis")
    assert own.certificate is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.certificate, own.key)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = server.url.removeprefix("unix://")
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))

    async def main() -> None:
        # The redis-server of the tests knows no TLS.
        listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
        url = f"rediss://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        for ca, trusted in ((authority.ca, True), (stranger.ca, False), (None, False)):
            index = PrefixIndex(url, ca=ca, lookup_timeout_seconds=1.0)
            await index.start()
            assert index.up is trusted
            await index.close()
        listener.close()

    asyncio.run(main())
