"""What both planes' channels and servers promise."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import wire
from tests.certificates import Authority
from tests.processes import free_port
from tests.stack import failure


async def _serving(port: int) -> grpc.aio.Server:
    server = wire.server()
    wire.add_health(server)
    wire.listen(server, f"127.0.0.1:{port}", None)
    await server.start()
    return server


async def _ask(channel: grpc.aio.Channel) -> None:
    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


def test_a_new_channel_knows_nothing_of_another_ones_failures() -> None:
    """Channels to one address would share a connection that has just failed, and fail with it."""
    port = free_port()

    async def main() -> None:
        first = await _serving(port)
        old = wire.channel(f"127.0.0.1:{port}")
        await _ask(old)
        await first.stop(0)
        try:
            for _ in range(20):
                try:
                    await _ask(old)
                except grpc.aio.AioRpcError as error:
                    if "refused" in str(error.details()):
                        break
            second = await _serving(port)
            async with wire.channel(f"127.0.0.1:{port}") as fresh:
                await _ask(fresh)
            await second.stop(0)
        finally:
            await old.close()

    asyncio.run(main())


def test_a_peer_may_be_known_by_a_name_that_its_address_is_not(tmp_path: Path) -> None:
    """As replicas are, which advertise the addresses of pods."""
    tls = Authority(tmp_path).issue("replica", "replica.quire.internal", addresses=())

    async def ask(port: int, name: str) -> None:
        async with wire.channel(f"127.0.0.1:{port}", replace(tls, peer_name=name)) as channel:
            await _ask(channel)

    async def main() -> None:
        server = wire.server()
        wire.add_health(server)
        port = wire.listen(server, "127.0.0.1:0", tls)
        await server.start()
        await ask(port, "replica.quire.internal")
        for name in ("", "other.quire.internal"):
            refused = await failure(ask(port, name))
            assert refused.code() is grpc.StatusCode.UNAVAILABLE
        await server.stop(0)

    asyncio.run(main())
