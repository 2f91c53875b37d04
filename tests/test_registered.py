"""Registered prefixes: shared by all tenants, kept in Redis, warm and pinned on every engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import redis

from control_plane.hashing import PrefixHasher
from control_plane.prefixes.file import BadPrefixesFile, read_prefixes
from control_plane.prefixes.registered import (
    MAX_PREFIXES,
    BadPrefix,
    Definition,
    RegisteredPrefixes,
)
from control_plane.server import Replica
from control_plane.tokenizer import PromptTokenizer
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from data_plane.tokenizer_files import read_tokenizer
from protos import wire
from protos.admin.v1 import admin_pb2 as pb
from protos.admin.v1 import admin_pb2_grpc
from protos.inference.v1 import inference_pb2
from tests.redis_server import RedisServer
from tests.stack import Stack, failure, led, request, running_engine, running_replica, running_stack
from tests.test_explain import explained, outcomes, salted_by_metadata, send

SYSTEM = "You are the support desk of a small shop that sells maps and globes. " * 4
SIZES = EngineSizes(
    block_size=16,
    block_count=256,
    host_block_count=0,
    slot_count=8,
    step_tokens=256,
    max_length=512,
)


def chat(user: str, system: str = SYSTEM) -> inference_pb2.Chat:
    turns = [("system", system), ("user", user)]
    return inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role=role, content=text) for role, text in turns]
    )


def asked(user: str, request_id: str = "", system: str = SYSTEM) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        chat=chat(user, system),
        sampling=inference_pb2.Sampling(temperature=0),
        stopping=inference_pb2.Stopping(max_tokens=2),
    )


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def register(stack: Stack, **fields: object) -> pb.RegisteredPrefix:
    message = pb.RegisterPrefixRequest(**{"name": "desk", "text": SYSTEM} | fields)  # type: ignore[arg-type]
    return (await stack.admin.RegisterPrefix(message)).prefix


async def the_prefixes(admin: admin_pb2_grpc.AdminServiceStub) -> list[pb.RegisteredPrefix]:
    answer = await admin.ListRegisteredPrefixes(pb.ListRegisteredPrefixesRequest())
    return list(answer.prefixes)


def test_salt_comes_back_after_the_shared_blocks() -> None:
    tokens = np.arange(64, dtype=np.int32)
    hashes = {
        (salt, shared): PrefixHasher("model", 16, salt).extend([], tokens, shared)
        for salt in ("", "red", "blue")
        for shared in (0, 2)
    }
    plain = hashes["", 0]
    assert hashes["", 2] == plain
    assert hashes["red", 2][:2] == hashes["blue", 2][:2] == plain[:2]
    rest = [hashes["red", 2][2:], hashes["blue", 2][2:], plain[2:]]
    rest += [hashes["red", 0], hashes["blue", 0]]
    assert len({digest for each in rest for digest in each}) == sum(map(len, rest))
    # However far a chain has been hashed before, it goes on the same.
    for done in range(4):
        begun = hashes["red", 2][:done]
        assert (
            begun + PrefixHasher("model", 16, "red").extend(begun, tokens, 2) == (hashes["red", 2])
        )


def test_tenants_share_a_registered_prefix_and_nothing_after_it(
    llama: Model, llama_directory: Path
) -> None:
    async def main(server: RedisServer) -> None:
        async with running_stack(llama, directory=llama_directory, redis_url=server.url) as stack:
            salted_by_metadata(stack.replica)
            before = [await send(stack.channel, asked("a question"), each) for each in ("r", "b")]
            assert [each.accepted.cached_token_count for each in before] == [0, 0]
            prefix = await register(stack)
            (engine,) = prefix.engines
            shared = engine.shared_token_count
            assert shared >= 64 and shared % 16 == 0 and engine.held_token_count == 0
            assert prefix.form == pb.PREFIX_FORM_SYSTEM and not prefix.pinned
            long = "and this is a long question, longer than a block, " * 2
            first = await send(stack.channel, asked(long), "r")
            second = await send(stack.channel, asked(long, "x"), "b")
            assert first.accepted.cached_token_count == 0
            assert second.accepted.cached_token_count == shared
            again = await send(stack.channel, asked(long), "b")
            assert again.accepted.cached_token_count > shared
            found = await explained(stack, "x")
            assert (found.registered_prefix, found.shared_token_count) == ("desk", shared)
            assert [each[0] for each in outcomes(found)][:2] == [
                pb.LOOKUP_OUTCOME_HIT,
                pb.LOOKUP_OUTCOME_OTHER_TENANT,
            ]
            # What was saved is told apart by prefix, and adds up.
            listed = (await stack.admin.ListPrefixes(pb.ListPrefixesRequest())).prefixes
            saved = {(each.name, each.tenant, each.shared): each.saved_token_count
                     for each in listed}  # fmt: skip
            own = again.accepted.cached_token_count - shared
            assert saved == {("desk", "", True): 2 * shared, ("", "b", False): own}
            totals = stack.loop.scheduler.totals
            assert sum(saved.values()) == totals.cached_tokens

    with RedisServer() as server:
        asyncio.run(main(server))


def test_a_new_leader_hashes_a_shared_prefix_as_the_former_did(
    llama: Model, llama_directory: Path
) -> None:
    """The record says which blocks are shared, whatever is registered by then."""

    async def main(server: RedisServer) -> None:
        engine = Engine(llama, SIZES, check=True)
        async with running_engine(engine, llama_directory) as (worker, port):
            async with running_replica([port], redis_url=server.url) as replica:
                await led(replica)
                stack = Stack(engine, worker, replica)
                shared = (await register(stack)).engines[0].shared_token_count
                message = asked("go on for long", "r1")
                message.stopping.max_tokens = 200
                message.stopping.ignore_eos = True
                running = asyncio.create_task(stack.generate(message))
                scheduler = stack.loop.scheduler
                await until(lambda: bool(scheduler.resident_groups))
                former = scheduler.resident_groups[0].request
                assert former.shared_blocks * 16 == shared and former.prefix_name == "desk"
            await asyncio.gather(running, return_exceptions=True)
            await stack.channel.close()
            await stack.admin_channel.close()
            # The next leader has no Redis, and nothing is registered there.
            async with running_replica([port]) as replica:
                await led(replica)
                stack = Stack(engine, worker, replica)
                (group,) = stack.loop.scheduler.resident_groups
                assert group.request.hashes == former.hashes
                assert group.request.shared_blocks == former.shared_blocks
                message.received_token_counts.append(0)
                assert len((await stack.generate(message)).ids) == 200
                await stack.idle()
                await stack.channel.close()
                await stack.admin_channel.close()

    with RedisServer() as server:
        asyncio.run(main(server))


def test_pinned_prefixes_are_warm_stay_and_come_back(llama: Model, llama_directory: Path) -> None:
    async def main(server: RedisServer) -> None:
        async with running_stack(
            llama, directory=llama_directory, block_count=64, redis_url=server.url
        ) as stack:
            await register(stack, pinned=True)

            async def standing() -> pb.RegisteredPrefixEngine:
                return (await the_prefixes(stack.admin))[0].engines[0]

            async with asyncio.timeout(10):
                while (now := await standing()).held_token_count < now.shared_token_count:
                    await asyncio.sleep(0.02)
            assert not now.problem
            pool = stack.loop.scheduler.pool
            for turn in range(6):
                await stack.generate(request([(turn * 37 + n) % 300 + 20 for n in range(400)], 2))
            assert (await standing()).held_token_count == now.shared_token_count
            engines = (await stack.admin.ListEngines(pb.ListEnginesRequest())).engines
            assert engines[0].pinned_block_count * 16 == now.shared_token_count
            map_of = await stack.admin.GetBlockMap(pb.GetBlockMapRequest(engine_id="engine-test"))
            assert list(map_of.states).count(pb.BLOCK_STATE_PINNED) * 16 == now.shared_token_count
            assert len(map_of.states) == 64 and len(map_of.host_states) == 16
            answer = await stack.generate(asked("hello"))
            assert answer.accepted.cached_token_count == now.shared_token_count
            # Unpinned, it gives way like everything else.
            update = pb.UpdatePrefixRequest(name="desk", pinned=False)
            await stack.admin.UpdatePrefix(update)
            await until(lambda: pool.idle_pinned_count == 0)
            for turn in range(3):
                await stack.generate(request([(turn * 37 + n) % 300 + 20 for n in range(500)], 2))
            assert (await standing()).held_token_count < now.shared_token_count
            # Warmed once, it is there again.
            await stack.admin.WarmPrefix(pb.WarmPrefixRequest(name="desk"))
            async with asyncio.timeout(10):
                while (again := await standing()).held_token_count < again.shared_token_count:
                    await asyncio.sleep(0.02)
            await stack.admin.UnregisterPrefix(pb.UnregisterPrefixRequest(name="desk"))
            assert not await the_prefixes(stack.admin)
            answer = await stack.generate(asked("hello"))
            # Callers without a tenant find what is hashed without a salt.
            assert answer.accepted.cached_token_count == now.shared_token_count

    with RedisServer() as server:
        asyncio.run(main(server))


def test_what_does_not_fit_is_said(llama: Model, llama_directory: Path) -> None:
    async def main(server: RedisServer) -> None:
        async with running_stack(
            llama, directory=llama_directory, block_count=24, redis_url=server.url
        ) as stack:
            await register(stack, name="large", pinned=True)
            short = await register(stack, name="short", text="Hi", form=pb.PREFIX_FORM_PLAIN)
            assert "fills no block" in short.engines[0].problem
            assert short.engines[0].shared_token_count == 0
            large = {each.name: each for each in await the_prefixes(stack.admin)}["large"]
            assert "cannot be pinned" in large.engines[0].problem
            assert (await stack.generate(asked("hello"))).usage is not None

    with RedisServer() as server:
        asyncio.run(main(server))


async def follows(replica: Replica, names: list[str]) -> None:
    await until(lambda: [each.name for each in replica.registered.definitions] == names)


def test_replicas_share_registrations_and_survive_the_loss_of_redis(
    llama: Model, llama_directory: Path
) -> None:
    async def main(server: RedisServer) -> None:
        client = redis.Redis.from_url(server.url)
        async with (
            running_stack(llama, directory=llama_directory, redis_url=server.url) as stack,
            running_replica([], engines="", redis_url=server.url) as other,
        ):
            await register(stack)
            await follows(other, ["desk"])
            await stack.generate(asked("one"))
            await stack.generate(asked("two"))
            await until(lambda: other.store.saved.get("desk") is not None)
            assert other.store.saved["desk"].hits == 1
            # Emptied: filled again by whoever notices first, and nothing is lost.
            client.flushall()
            await until(lambda: client.exists("quire:1:{registered}:prefixes") == 1)
            await follows(stack.replica, ["desk"])
            server.stop()
            error = await failure(register(stack, name="more"))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert (await stack.generate(asked("three"))).accepted.cached_token_count > 0
            server.start()
            await until(lambda: client.exists("quire:1:{registered}:prefixes") == 1)

            async def again() -> None:
                async with asyncio.timeout(10):
                    while True:
                        try:
                            await register(stack, name="more")
                            return
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.1)

            await again()
            await follows(other, ["desk", "more"])
            # What another program wrote there is left alone, and nothing else suffers.
            client.hset("quire:1:{registered}:prefixes", "odd", b"\xff\xff")
            client.incr("quire:1:{registered}:version")
            await register(stack, name="third")
            await follows(other, ["desk", "more", "third"])
        client.close()

    with RedisServer() as server:
        asyncio.run(main(server))


def test_bad_registrations_name_the_field(llama: Model, llama_directory: Path) -> None:
    async def main(server: RedisServer) -> None:
        async with running_stack(llama, directory=llama_directory, redis_url=server.url) as stack:
            for fields, field in (
                ({"name": ""}, "name"),
                ({"name": "a b"}, "name"),
                ({"name": "x" * 64}, "name"),
                ({"text": ""}, "text"),
                ({"text": "x" * (1 << 20) + "y"}, "text"),
                ({"form": 7}, "form"),
            ):
                error = await failure(register(stack, **fields))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                (detail,) = wire.error_details(error)
                assert detail.field_violations[0].field == field  # type: ignore[attr-defined]
            nobody = "nobody"
            for call in (
                stack.admin.WarmPrefix(pb.WarmPrefixRequest(name=nobody)),
                stack.admin.UpdatePrefix(pb.UpdatePrefixRequest(name=nobody)),
                stack.admin.UnregisterPrefix(pb.UnregisterPrefixRequest(name=nobody)),
                stack.admin.GetBlockMap(pb.GetBlockMapRequest(engine_id=nobody)),
                stack.admin.GetBlockMap(pb.GetBlockMapRequest()),
            ):
                assert (await failure(call)).code() is grpc.StatusCode.NOT_FOUND
            many = {f"p{n}": Definition(f"p{n}", "x") for n in range(MAX_PREFIXES)}
            stack.replica.registered.set_stored(many)
            error = await failure(register(stack))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    with RedisServer() as server:
        asyncio.run(main(server))


def test_declared_prefixes_need_no_redis_and_cannot_be_changed(
    llama: Model, llama_directory: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prefixes.yaml"
    path.write_text(f"desk:\n  text: {SYSTEM!r}\n  pinned: true\n")

    async def main() -> None:
        async with running_stack(llama, directory=llama_directory, prefixes=path) as stack:
            salted_by_metadata(stack.replica)
            await until(lambda: stack.loop.scheduler.pool.idle_pinned_count > 0)
            answer = await send(stack.channel, asked("hello"), "red")
            (prefix,) = await the_prefixes(stack.admin)
            assert prefix.declared
            shared = prefix.engines[0].shared_token_count
            assert answer.accepted.cached_token_count == shared > 0
            for call in (
                register(stack),
                stack.admin.UpdatePrefix(pb.UpdatePrefixRequest(name="desk")),
                stack.admin.UnregisterPrefix(pb.UnregisterPrefixRequest(name="desk")),
            ):
                assert (await failure(call)).code() is grpc.StatusCode.FAILED_PRECONDITION

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("desk: {}", "desk.text: Field required"),
        ("desk: {text: x, pined: true}", "desk.pined: Extra inputs"),
        ("desk: {text: x, form: prose}", "desk.form"),
        ("'a b': {text: x}", "a b: name must be"),
        ("desk: {text: ''}", "desk: text has 0 bytes"),
        ("[1, 2]", "valid dictionary"),
        ("a: [", "while parsing"),
    ],
)
def test_bad_files_are_refused_with_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "prefixes.yaml"
    path.write_text(content)
    with pytest.raises(BadPrefixesFile, match=sentence):
        read_prefixes(path)
    with pytest.raises(BadPrefixesFile, match="No such file"):
        read_prefixes(tmp_path / "missing.yaml")


def test_the_longest_of_several_matches_and_only_whole(llama: Model, llama_directory: Path) -> None:
    files = read_tokenizer(llama_directory)
    assert files is not None
    tokenizer = PromptTokenizer.from_parts(files.tokenizer_json, files.chat_template, {})
    registered = RegisteredPrefixes(
        [
            Definition("short", SYSTEM[:100], system=False),
            Definition("long", SYSTEM, system=False),
            Definition("chat", SYSTEM),
        ]
    )

    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            facts = stack.loop.facts
            from control_plane.prefixes.registered import tokenised

            missing = registered.unprepared(facts.tokenizer_digest)
            assert len(missing) == 3
            assert not registered.match(tokenizer.encode(SYSTEM), facts).block_count
            registered.prepare(facts.tokenizer_digest, tokenised(missing, tokenizer))
            long = registered.match(tokenizer.encode(SYSTEM + " and more"), facts)
            assert long.name == "long"
            short = registered.match(tokenizer.encode(SYSTEM[:110]), facts)
            assert short.name == "short" and 0 < short.block_count < long.block_count
            turns = [("system", SYSTEM), ("user", "hello")]
            assert registered.match(tokenizer.encode_chat(turns), facts).name == "chat"
            turns = [("system", SYSTEM + "!"), ("user", "hello")]
            whole = len(registered.hashes(registered.definitions[0], facts))
            assert registered.match(tokenizer.encode_chat(turns), facts).block_count <= whole
            assert not registered.match(tokenizer.encode("something else" * 20), facts).name
            assert not registered.match([], facts).name

    asyncio.run(main())


def test_definitions_have_limits() -> None:
    with pytest.raises(BadPrefix) as caught:
        Definition("-x", "text")
    assert caught.value.field == "name"


# What goes wrong around Redis, and in between.


def test_a_change_right_after_redis_was_emptied_loses_nothing(
    llama: Model, llama_directory: Path
) -> None:
    async def main(server: RedisServer) -> None:
        client = redis.Redis.from_url(server.url)
        async with (
            running_stack(llama, directory=llama_directory, redis_url=server.url) as stack,
            running_replica([], engines="", redis_url=server.url) as other,
        ):
            await register(stack)
            await register(stack, name="second")
            await follows(other, ["desk", "second"])
            client.flushall()
            await register(stack, name="third")
            client.flushall()
            await stack.admin.WarmPrefix(pb.WarmPrefixRequest(name="desk"))
            for replica in (stack.replica, other):
                await follows(replica, ["desk", "second", "third"])
                await replica.store.refresh()
                await follows(replica, ["desk", "second", "third"])
            assert client.hlen("quire:1:{registered}:prefixes") == 3
        client.close()

    with RedisServer() as server:
        asyncio.run(main(server))


def test_what_others_wrote_does_not_end_the_following(llama: Model, llama_directory: Path) -> None:
    async def main(server: RedisServer) -> None:
        client = redis.Redis.from_url(server.url)
        async with running_stack(llama, directory=llama_directory, redis_url=server.url) as stack:
            await register(stack)
            client.hset("quire:1:{registered}:hits", "desk", "many")
            await until(lambda: stack.replica.store._failing)
            client.hdel("quire:1:{registered}:hits", "desk")
            await until(lambda: not stack.replica.store._failing)
            await register(stack, name="more")
        client.close()

    with RedisServer() as server:
        asyncio.run(main(server))


def test_registered_and_warmed_at_once_is_warmed_by_replicas_that_hear_of_both(
    llama: Model, llama_directory: Path
) -> None:
    async def main(server: RedisServer) -> None:
        async with (
            running_stack(llama, directory=llama_directory, redis_url=server.url) as stack,
            running_replica([], engines="", redis_url=server.url) as other,
            wire.channel(f"127.0.0.1:{other.ports[1]}") as channel,
        ):
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            await admin.RegisterPrefix(pb.RegisterPrefixRequest(name="desk", text=SYSTEM))
            await admin.WarmPrefix(pb.WarmPrefixRequest(name="desk"))
            async with asyncio.timeout(10):
                while True:
                    prefixes = await the_prefixes(stack.admin)
                    if prefixes and prefixes[0].engines[0].held_token_count > 0:
                        break
                    await asyncio.sleep(0.02)

    with RedisServer() as server:
        asyncio.run(main(server))


def test_a_change_of_the_pin_keeps_what_another_replica_has_just_registered(
    llama: Model, llama_directory: Path
) -> None:
    async def main(server: RedisServer) -> None:
        async with (
            running_stack(llama, directory=llama_directory, redis_url=server.url) as stack,
            running_replica([], engines="", redis_url=server.url) as other,
            wire.channel(f"127.0.0.1:{other.ports[1]}") as channel,
        ):
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            await register(stack, text="an old text")
            await follows(other, ["desk"])
            await register(stack, text="a new text")
            await admin.UpdatePrefix(pb.UpdatePrefixRequest(name="desk", pinned=True))
            (prefix,) = await the_prefixes(admin)
            assert (prefix.text, prefix.pinned) == ("a new text", True)
            await register(stack, name="fresh", text="x" * 1000)
            await admin.UpdatePrefix(pb.UpdatePrefixRequest(name="fresh", pinned=True))
            shown = {each.name: each.text for each in await the_prefixes(admin)}
            assert shown["fresh"] == "x" * 256

    with RedisServer() as server:
        asyncio.run(main(server))


def test_pins_are_let_go_of_while_an_engine_drains(llama: Model, llama_directory: Path) -> None:
    async def main(server: RedisServer) -> None:
        async with running_stack(llama, directory=llama_directory, redis_url=server.url) as stack:
            await register(stack, pinned=True)
            pool = stack.loop.scheduler.pool
            await until(lambda: pool.idle_pinned_count > 0)
            drain = pb.DrainEngineRequest(engine_id="engine-test")
            assert (await stack.admin.DrainEngine(drain)).engine.draining
            await stack.admin.UnregisterPrefix(pb.UnregisterPrefixRequest(name="desk"))
            await until(lambda: pool.idle_pinned_count == 0)
            drain.resume = True
            assert not (await stack.admin.DrainEngine(drain)).engine.draining
            assert (await stack.generate(asked("hello"))).usage is not None
            unknown = pb.DrainEngineRequest(engine_id="nobody")
            error = await failure(stack.admin.DrainEngine(unknown))
            assert error.code() is grpc.StatusCode.NOT_FOUND

    with RedisServer() as server:
        asyncio.run(main(server))
