"""Certificates that are renewed, of another authority even, while both planes run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.admin_client import AdminClient
from control_plane.client import CallError, Client
from control_plane.leader import LeaderState
from control_plane.server import Replica
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from protos import wire
from tests.certificates import Authority, replace
from tests.processes import free_port
from tests.stack import led, running_engine, running_replica

SIZES = EngineSizes(16, 128, 0, 16, 256, 1024)


class Certificates:
    """What a process has now, and what it is going to get."""

    def __init__(self, directory: Path) -> None:
        folders = [directory / name for name in ("old", "new", "client")]
        for folder in folders:
            folder.mkdir()
        self._old, self._new = Authority(folders[0]), Authority(folders[1])
        self.own, self._next = self._old.issue("quire"), self._new.issue("quire")
        # Clients of before and of after.
        self.former, self.later = self._old.issue("client"), self._new.issue("client")

    @property
    def settings(self) -> dict[str, object]:
        own = self.own
        return {"tls_certificate": own.certificate, "tls_key": own.key, "tls_ca": own.ca}

    def renew(self) -> None:
        replace(self.own, self._next)


async def answers(address: str, tls: wire.Tls) -> bool:
    async with wire.channel(address, tls) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=5
            )
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        return True


async def until(is_so: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await is_so():
            await asyncio.sleep(0.05)


def test_a_server_shows_the_certificate_that_its_files_have(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)

    async def main() -> None:
        server = wire.server()
        wire.add_health(server)
        port = wire.listen(server, "127.0.0.1:0", certificates.own)
        await server.start()
        address = f"127.0.0.1:{port}"
        former, later = certificates.former, certificates.later
        assert await answers(address, former) and not await answers(address, later)
        async with wire.channel(address, former) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest())
            certificates.renew()
            assert await answers(address, later) and not await answers(address, former)
            # Connections that there are stay.
            await health.Check(health_pb2.HealthCheckRequest())
        await server.stop(0)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["nonsense", "missing"])
def test_what_is_no_certificate_changes_nothing(tmp_path: Path, how: str) -> None:
    certificates = Certificates(tmp_path)
    own, former, later = certificates.own, certificates.former, certificates.later

    async def main() -> None:
        server = wire.server()
        wire.add_health(server)
        address = f"127.0.0.1:{wire.listen(server, '127.0.0.1:0', own)}"
        await server.start()
        assert own.key is not None
        if how == "missing":
            own.key.unlink()
        else:
            own.key.write_text("nonsense")
        assert await answers(address, former) and await answers(address, former)
        certificates.renew()
        assert await answers(address, later)
        await server.stop(0)

    asyncio.run(main())


def test_both_planes_go_on_with_renewed_certificates(llama: Model, tmp_path: Path) -> None:
    """Engines are led again, calls passed on, operators answered; no process is restarted."""
    certificates = Certificates(tmp_path)

    async def main() -> None:
        port = free_port()
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            engine = await enter(AsyncExitStack())

            async def serve_engine() -> None:
                served = Engine(llama, SIZES)
                address = f"127.0.0.1:{port}"
                await engine.enter_async_context(
                    running_engine(served, None, address, certificates.own)
                )

            await serve_engine()
            leader = await enter(a_replica(port))
            await led(leader)
            follower = await enter(a_replica(port))

            async def see_all(tls: wire.Tls) -> None:
                async with AdminClient(follower.settings.admin_listen, tls=tls) as admin:
                    (row,) = await admin.engines()
                    assert row["state"] == "followed" and row["free_block_count"]
                    assert not admin.unanswered

            async def relays() -> bool:
                return follower.relay.reaches_a_leader

            await until(relays)
            # It lives as long as the service does.
            client = await enter(Client(follower.settings.listen, tls=certificates.former))
            await client.text([40, 41, 42], max_tokens=2)
            await see_all(certificates.former)
            certificates.renew()
            replace(certificates.former, certificates.later)

            async def answered() -> bool:
                try:
                    await client.text([40, 41, 42], max_tokens=2)
                except CallError:
                    return False
                return True

            # Connections are as old as they may be after half a second.
            await asyncio.sleep(1)
            await until(answered)
            await see_all(certificates.later)
            # A new life of the engine is led with the new certificate.
            await engine.aclose()
            await serve_engine()
            replicas = (leader, follower)

            async def led_again() -> bool:
                leaders = [replica.router.leaders[0] for replica in replicas]
                states = [each.state for each in leaders]
                return LeaderState.LED in states and LeaderState.FOLLOWED in states

            await until(led_again)
            await until(answered)

    def a_replica(port: int) -> AbstractAsyncContextManager[Replica]:
        settings = certificates.settings | {"anonymous_roles": "generate,read"}
        # Connections that last would hide what a new one is made with.
        settings |= {"connection_age_seconds": 0.5}
        settings |= {name: f"127.0.0.1:{free_port()}" for name in ("listen", "admin_listen")}
        return running_replica([port], **settings)

    asyncio.run(main())


def test_relays_hold_no_connection_with_a_former_certificate(llama: Model, tmp_path: Path) -> None:
    """What was passed on before goes on; the connection is given up when it has ended."""
    certificates = Certificates(tmp_path)

    async def main() -> None:
        listens = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        own = certificates.own
        async with running_engine(Engine(llama, SIZES), None, tls=own) as (_, port):
            async with (
                running_replica([port], listen=listens[0], **certificates.settings) as leader,
                running_replica([port], listen=listens[1], **certificates.settings) as follower,
            ):
                await until(lambda: reaches(leader, follower))
                follower = follower if leader.router.leaders[0].loop else leader
                listen = follower.settings.listen
                async with Client(listen, tls=certificates.former) as client:
                    options = {"max_tokens": 600, "ignore_eos": True}
                    events = client.generate([40, 41, 42], **options)
                    assert (await anext(events)).HasField("accepted")
                    (peer,) = follower.relay._peers.values()
                    certificates.renew()

                    async def is_replaced() -> bool:
                        (now,) = list(follower.relay._peers.values()) or (peer,)
                        return now is not peer and peer in follower.relay._outdated

                    await until(is_replaced)
                    count = sum([len(event.delta.token_ids) async for event in events])
                    assert count == 600
                    await until(lambda: gone(follower))

    async def gone(follower: Replica) -> bool:
        return not follower.relay._outdated

    async def reaches(*replicas: Replica) -> bool:
        return any(each.relay.reaches_a_leader for each in replicas)

    asyncio.run(main())
