"""The operator's view of a whole deployment, whichever replica is asked."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from control_plane import admin_peers
from control_plane.admin_client import AdminClient, Row
from control_plane.client import CallError, Client
from control_plane.engine_link import ReplicaAddress
from control_plane.leader import EngineLeader, LeaderState
from control_plane.server import Replica, _own_address
from control_plane.settings import Settings
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from protos import wire
from protos.admin.v1 import admin_pb2 as pb
from tests.certificates import Authority
from tests.processes import free_port
from tests.redis_server import RedisServer
from tests.stack import running_engine, running_replica
from tests.test_cli import run

SIZES = EngineSizes(16, 128, 8, 16, 256, 1024)
PROMPT = list(range(40, 100))
TEXT = "A quire is a gathering of pages, and pages are what blocks are called in prose. " * 2


@dataclass
class Deployment:
    """Two engines, each led by another of two replicas."""

    replicas: list[Replica]
    engines: list[Engine]
    admins: list[AdminClient]
    clients: list[Client]

    @property
    def addresses(self) -> list[str]:
        return [replica.settings.listen for replica in self.replicas]

    async def generate(self, at: int, prompt: list[int] = PROMPT, **options: Any) -> None:
        """Has the replica `at` answer; with both engines of one model, its own does."""
        fields = {"max_tokens": 2, "temperature": 0.0} | options
        async for _ in self.clients[at].generate(prompt, **fields):  # type: ignore[arg-type]
            pass


@asynccontextmanager
async def replica_with_admin(ports: list[int], **settings: object) -> AsyncIterator[Replica]:
    listen = {name: f"127.0.0.1:{free_port()}" for name in ("listen", "admin_listen")}
    async with running_replica(ports, **(listen | settings)) as replica:
        yield replica


async def until(is_so: Callable[[], object], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.005)


def patient(leader: EngineLeader) -> None:
    """Lets another replica claim the engine first."""
    leader._settings = dataclasses.replace(leader._settings, retry_seconds=1.0)


@asynccontextmanager
async def deployed(
    models: tuple[Model, Model],
    directory: Path | None,
    own: wire.Tls | None = None,
    operator: wire.Tls | None = None,
    token: str = "",
    **settings: object,
) -> AsyncIterator[Deployment]:
    """Both planes have the certificate `own`; who asks has a token or a certificate."""
    if own is not None:
        files = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_ca": own.ca}
        settings |= files
    engines = [Engine(model, SIZES, check=True) for model in models]
    ports = [free_port(), free_port()]
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        addresses = [f"127.0.0.1:{port}" for port in ports]
        await enter(running_engine(engines[0], directory, addresses[0], own, "e0"))
        first = await enter(replica_with_admin(ports, **settings))
        await until(lambda: first.router.leaders[0].state is LeaderState.LED)
        patient(first.router.leaders[1])
        second = await enter(replica_with_admin(ports, **settings))
        await asyncio.sleep(0.2)
        await enter(running_engine(engines[1], directory, addresses[1], own, "e1"))
        replicas = [first, second]
        await until(lambda: all(len(each.router.followed()) == 1 for each in replicas))
        assert [each.state for each in first.router.leaders] == [
            LeaderState.LED,
            LeaderState.FOLLOWED,
        ]
        admins, clients = [], []
        for replica in replicas:
            shows = {"token": token, "tls": operator}
            admins.append(await enter(AdminClient(replica.settings.admin_listen, **shows)))
            clients.append(await enter(Client(replica.settings.listen, **shows)))
        yield Deployment(replicas, engines, admins, clients)


def with_deployment(
    models: tuple[Model, Model],
    body: Callable[[Deployment], Awaitable[None]],
    directory: Path | None = None,
    **settings: Any,
) -> None:
    async def main() -> None:
        async with deployed(models, directory, **settings) as deployment:
            await body(deployment)

    asyncio.run(main())


def by_id(rows: list[Row]) -> dict[str, Row]:
    return {row["engine_id"]: row for row in rows}


def reasons(error: CallError) -> list[str]:
    return wire.reasons(error.details)


async def refused(call: Awaitable[object]) -> CallError:
    with pytest.raises(CallError) as error:
        await call
    return error.value


def test_engines_are_shown_by_any_replica_as_their_leader_has_them(llama: Model) -> None:
    async def body(deployment: Deployment) -> None:
        await deployment.generate(0)
        await deployment.generate(1)
        shown = [by_id(await admin.engines()) for admin in deployment.admins]
        for at, (own, other) in enumerate((("e0", "e1"), ("e1", "e0"))):
            assert shown[at][own]["state"] == "led"
            assert shown[at][other]["state"] == "followed"
            assert shown[at][other]["leader_address"] == deployment.addresses[1 - at]
            assert shown[at][other]["address"] == shown[1 - at][other]["address"]
            told, known = dict(shown[at][other]), dict(shown[1 - at][other])
            for row in (told, known):
                for name in ("state", "leader_address"):
                    del row[name]
            assert told == known and known["cached_block_count"] == 3
            assert known["prefix_query_token_count"] == 60
        assert not deployment.admins[0].unanswered

    with_deployment((llama, llama), body)


def test_sequences_and_blocks_of_engines_that_others_lead(llama: Model) -> None:
    async def body(deployment: Deployment) -> None:
        first, second = deployment.admins
        calls = [
            asyncio.create_task(
                deployment.generate(at, request_id=f"r{at}", max_tokens=900, ignore_eos=True)
            )
            for at in (0, 1)
        ]
        engines = deployment.engines
        await until(lambda: all(engine.state.resident_slots().size for engine in engines))
        for admin in (first, second):
            rows = await admin.sequences()
            assert {(row["engine_id"], row["request_id"]) for row in rows} == {
                ("e0", "r0"),
                ("e1", "r1"),
            }
            assert [row["engine_id"] for row in await admin.sequences("e1")] == ["e1"]
        for admin in (first, second):
            for engine_id in ("e1", ""):
                table = await block_table(admin, "r1", engine_id)
                assert len(table) >= 4 and len(table[0].prefix_hash) == 16
            states = (await admin.block_map("e1"))["states"]
            assert len(states) == 128 and states.count("used") >= 4
        missing = await refused(first.block_map("e7"))
        assert (missing.code, reasons(missing)) == (grpc.StatusCode.NOT_FOUND, ["NO_ENGINE"])
        for engine_id in ("e0", "e1", ""):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await block_table(first, "r7", engine_id)
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    with_deployment((llama, llama), body)


async def block_table(admin: AdminClient, request_id: str, engine_id: str) -> Any:
    request = pb.GetBlockTableRequest(request_id=request_id, engine_id=engine_id)
    return (await admin._stub.GetBlockTable(request, timeout=5)).blocks


def test_hits_of_a_prefix_are_added_up_over_replicas(llama: Model) -> None:
    async def body(deployment: Deployment) -> None:
        for at in (0, 0, 0, 1, 1):
            await deployment.generate(at)
        for admin in deployment.admins:
            (row,) = await admin.prefixes()
            assert (row["token_count"], row["hit_count"]) == (48, 3)
            assert row["saved_token_count"] == 3 * 48
            held = {each["engine_id"]: each["reference_count"] for each in row["holders"]}
            assert held == {"e0": 0, "e1": 0}
            for engine_id, hits in (("e0", 2), ("e1", 1)):
                (row,) = await admin.prefixes(engine_id)
                assert row["hit_count"] == hits
        # Who uses a block is known to its engine's leader only.
        call = asyncio.create_task(deployment.generate(1, max_tokens=900, ignore_eos=True))
        await until(lambda: deployment.engines[1].state.resident_slots().size)
        for admin in deployment.admins:
            (row,) = await admin.prefixes()
            held = {each["engine_id"]: each["reference_count"] for each in row["holders"]}
            assert held == {"e0": 0, "e1": 1}
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    with RedisServer() as redis:
        with_deployment((llama, llama), body, redis_url=redis.url, index_timeout_ms=1000)


def test_pages_of_all_replicas_make_one_list(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(deployment: Deployment) -> None:
        prompts = [[first, *PROMPT] for first in range(20, 27)]
        for at in (0, 0, 1, 1):
            for prompt in prompts:
                await deployment.generate(at, prompt)
        for admin in deployment.admins:
            rows = await admin.prefixes()
            assert [row["hit_count"] for row in rows] == [2] * 7
            assert len({row["prefix_hash"] for row in rows}) == 7
            assert len(await admin.prefixes(limit=5)) == 5

    # The others are asked for three rows at a time, as is the first by the client.
    monkeypatch.setattr(admin_peers, "MAX_PAGE_SIZE", 3)
    monkeypatch.setattr("control_plane.admin_client._PAGE_SIZE", 3)
    with_deployment((llama, llama), body)


def test_explanations_come_from_who_leads_an_engine_of_the_model(
    llama: Model, llama_directory: Path
) -> None:
    async def body(deployment: Deployment) -> None:
        for name in ("r1", "r2"):
            await deployment.generate(1, request_id=name, model="tiny-other")
        for admin in deployment.admins:
            found = await admin.explain_prompt(PROMPT, model="tiny-other")
            assert (found["engine_id"], found["cached_token_count"]) == ("e1", 48)
            found = await admin.explain_request("r2")
            assert (found["engine_id"], found["cached_token_count"]) == ("e1", 48)
            unknown = await refused(admin.explain_request("r7"))
            assert (unknown.code, reasons(unknown)) == (grpc.StatusCode.NOT_FOUND, ["NO_LOOKUP"])
            bad = await refused(admin.explain_prompt([1 << 30], model="tiny-other"))
            assert bad.field.startswith("token_ids")

    other = dataclasses.replace(llama.facts, name="tiny-other")
    with_deployment((llama, with_facts(llama, other)), body)


def with_facts(model: Model, facts: Any) -> Model:
    renamed = copy.copy(model)
    renamed.facts = facts
    return renamed


def test_registered_prefixes_stand_on_every_engine(llama: Model, llama_directory: Path) -> None:
    async def body(deployment: Deployment) -> None:
        first, second = deployment.admins
        row = await first.register("desk", TEXT, pinned=True)
        assert {each["engine_id"]: each["known"] for each in row["engines"]} == {
            "e0": True,
            "e1": False,
        }
        for admin in (first, second):
            async with asyncio.timeout(20):
                while True:
                    rows = await admin.registered()
                    engines = [each for row in rows for each in row["engines"]]
                    if len(engines) == 2 and all(
                        0 < each["shared_token_count"] <= each["held_token_count"]
                        for each in engines
                    ):
                        break
                    await asyncio.sleep(0.05)
            assert all(each["known"] for each in engines)
        address = deployment.replicas[0].settings.admin_listen
        shown = await asyncio.to_thread(
            run, "prefixes", "warm", "desk", "--wait", "--address", address
        )
        assert "every engine holds desk" in shown.stdout

    with RedisServer() as redis:
        with_deployment((llama, llama), body, llama_directory, redis_url=redis.url)


def test_an_engine_is_drained_by_whoever_leads_it(llama: Model) -> None:
    async def body(deployment: Deployment) -> None:
        first, second = deployment.admins
        row = await first.drain("e1")
        assert row["draining"] and row["state"] == "followed"
        assert row["leader_address"] == deployment.addresses[1]
        assert deployment.replicas[1].router.leaders[1].draining
        assert by_id(await second.engines())["e1"]["draining"]
        assert not (await first.drain("e1", resume=True))["draining"]
        missing = await refused(first.drain("e7"))
        assert missing.code is grpc.StatusCode.NOT_FOUND

    with_deployment((llama, llama), body)


def test_a_replica_that_does_not_answer_is_named(
    llama: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(deployment: Deployment) -> None:
        first, second = deployment.admins
        silent = deployment.addresses[1]
        await deployment.generate(0)
        await deployment.generate(0)
        await deployment.replicas[1]._servers[1].stop(0)
        for _ in range(2):
            rows = by_id(await first.engines())
            assert rows["e1"]["state"] == "followed" and not rows["e1"]["free_block_count"]
            assert rows["e0"]["free_block_count"]
        assert first.unanswered == {silent}
        assert len(await first.prefixes()) == 1 and await first.sequences() == []
        for call in (first.block_map("e1"), first.drain("e1"), first.explain_request("r7")):
            error = await refused(call)
            assert (error.code, reasons(error)) == (grpc.StatusCode.UNAVAILABLE, ["LEADER_GONE"])
        assert len([each for each in caplog.messages if "does not answer" in each]) == 1
        shown = await asyncio.to_thread(run, "engines", "--address", first.address)
        assert f"warning: the replica at {silent} does not answer" in shown.stderr
        assert f"led by {silent}" in shown.stdout
        await second.__aexit__(None, None, None)

    with_deployment((llama, llama), body)


def test_a_replica_that_hangs_is_not_waited_for(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(deployment: Deployment) -> None:
        async def hang(*_: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(deployment.replicas[1].admin_peers, "gather", hang)
        first = deployment.admins[0]
        assert by_id(await first.engines())["e1"]["state"] == "followed"
        assert first.unanswered == {deployment.addresses[1]}

    monkeypatch.setattr(admin_peers, "ANSWER_SECONDS", 0.2)
    with_deployment((llama, llama), body)


def test_a_replica_whose_admin_api_is_its_own_affair_is_named(
    llama: Model, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(deployment: Deployment) -> None:
        first = deployment.admins[0]
        leader = deployment.replicas[0].router.leaders[1]
        # As a leader says that does not know the field, or whose admin API nobody else reaches.
        leader.leader_at = ReplicaAddress(leader.leader_at.inference)
        patient(leader)
        await first.engines()
        assert first.unanswered == {deployment.addresses[1]}
        assert "does not say where its admin API is" in caplog.text

    with_deployment((llama, llama), body)


@pytest.mark.parametrize(
    ("listen", "admin_listen", "advertise", "told"),
    [
        ("127.0.0.1:1", "127.0.0.1:2", "", "127.0.0.1:2"),
        ("0.0.0.0:1", "0.0.0.0:2", "10.0.0.7:1", "10.0.0.7:2"),
        ("10.0.0.7:1", "10.0.9.7:2", "", "10.0.9.7:2"),
        ("0.0.0.0:1", "127.0.0.1:2", "10.0.0.7:1", ""),
        ("[::]:1", "[::]:2", "[fd00::7]:1", "[fd00::7]:2"),
    ],
)
def test_where_others_are_told_that_the_admin_api_is(
    listen: str, admin_listen: str, advertise: str, told: str
) -> None:
    settings = Settings(listen=listen, admin_listen=admin_listen, advertise=advertise)
    assert _own_address(settings).admin == told
    assert _own_address(settings).inference == (advertise or listen)


def test_questions_never_go_round(llama: Model) -> None:
    """Each of two replicas believes that the other leads an engine."""

    async def body(deployment: Deployment) -> None:
        asked: list[str] = []
        for replica, other in zip(deployment.replicas, reversed(deployment.replicas), strict=True):
            gather = replica.admin_peers._list

            async def counted(address: str, *rest: Any, gather: Any = gather) -> Any:
                asked.append(address)
                return await gather(address, *rest)

            replica.admin_peers._list = counted  # type: ignore[method-assign]
            for leader in replica.router.leaders:
                patient(leader)
                leader.leader_at = ReplicaAddress(
                    other.settings.listen, other.settings.admin_listen
                )
        await deployment.admins[0].engines()
        assert asked == [deployment.addresses[1]]

    with_deployment((llama, llama), body)


def test_callers_are_who_they_are_at_the_other_replica_too(llama: Model, tmp_path: Path) -> None:
    """An operator's token is handed on; nobody gets more than its own roles."""

    def caller(name: str, *roles: str) -> dict[str, object]:
        digest = sha256(name.encode()).hexdigest()
        return {"name": name, "token_sha256": digest, "roles": list(roles)}

    async def body(deployment: Deployment) -> None:
        address = deployment.replicas[0].settings.admin_listen
        async with AdminClient(address, token="reader") as reader:
            assert by_id(await reader.engines())["e1"]["free_block_count"]
            assert not reader.unanswered
            denied = await refused(reader.drain("e1"))
            assert denied.code is grpc.StatusCode.PERMISSION_DENIED
        async with AdminClient(address, token="writer") as writer:
            assert (await writer.drain("e1"))["draining"]

    access = tmp_path / "access.yaml"
    callers = [caller("reader", "read"), caller("writer", "write")]
    access.write_text(yaml.safe_dump({"callers": callers}))
    with_deployment((llama, llama), body, token="reader", access=access, anonymous_roles="")


def test_replicas_ask_each_other_by_their_certificates(llama: Model, tmp_path: Path) -> None:
    """An operator who is known by a certificate cannot hand that on: the replica vouches."""
    authority = Authority(tmp_path)
    own = authority.issue("replica.example")
    operator = authority.issue("ops.example")

    async def body(deployment: Deployment) -> None:
        first = deployment.admins[0]
        assert by_id(await first.engines())["e1"]["free_block_count"] and not first.unanswered
        assert (await first.drain("e1"))["draining"]
        # For itself a replica has no such role.
        address = deployment.replicas[1].settings.admin_listen
        async with AdminClient(address, tls=own) as replica:
            denied = await refused(replica.engines())
            assert denied.code is grpc.StatusCode.PERMISSION_DENIED

    def caller(certificate: str, role: str) -> dict[str, object]:
        return {"name": certificate, "certificate": certificate, "roles": [role]}

    access = tmp_path / "access.yaml"
    callers = [caller("replica.example", "relay"), caller("ops.example", "write")]
    access.write_text(yaml.safe_dump({"callers": callers}))
    roles = {"access": access, "anonymous_roles": ""}
    with_deployment((llama, llama), body, own=own, operator=operator, **roles)


def test_a_replica_that_may_not_ask_another_one_says_so(
    llama: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    own, operator = authority.issue("replica.example"), authority.issue("ops.example")

    async def body(deployment: Deployment) -> None:
        first = deployment.admins[0]
        assert not by_id(await first.engines())["e1"]["free_block_count"]
        assert first.unanswered == {deployment.addresses[1]}
        assert "ROLE_MISSING" in caplog.text or "has no role" in caplog.text

    access = tmp_path / "access.yaml"
    ops = {"name": "ops", "certificate": "ops.example", "roles": ["write"]}
    access.write_text(yaml.safe_dump({"callers": [ops]}))
    roles = {"access": access, "anonymous_roles": ""}
    with_deployment((llama, llama), body, own=own, operator=operator, **roles)
