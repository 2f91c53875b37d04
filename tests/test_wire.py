"""What both planes' channels and servers promise."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import wire
from tests.processes import free_port


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
