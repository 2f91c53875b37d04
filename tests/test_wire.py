"""What both planes' channels and servers promise."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import wire
from tests.certificates import Authority
from tests.processes import free_port
from tests.stack import failure


async def _serving(port: int, host: str = "127.0.0.1") -> grpc.aio.Server:
    server = wire.server()
    wire.add_health(server)
    wire.listen(server, f"{host}:{port}", None)
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


class _Names(asyncio.DatagramProtocol):
    """A DNS server that has one address for every name."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = 12
        while data[end]:
            end += data[end] + 1
        question = data[12 : end + 5]
        found = question[-4:-2] == b"\x00\x01"  # An A record.
        head = data[:2] + b"\x81\x80\x00\x01" + bytes([0, found]) + bytes(4)
        record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 5, 4) + socket.inet_aton(self.address)
        assert self._transport is not None
        self._transport.sendto(head + question + (record if found else b""), addr)


def test_a_name_whose_address_changes_is_found_again_soon() -> None:
    """As that of a pod which was replaced; gRPC by itself asks again after 30 seconds."""
    port, dns = free_port(), free_port()

    async def answers(channel: grpc.aio.Channel) -> bool:
        try:
            await _ask(channel)
        except grpc.aio.AioRpcError:
            return False
        return True

    async def main() -> None:
        loop = asyncio.get_running_loop()
        names = _Names("127.0.0.1")
        transport, _ = await loop.create_datagram_endpoint(lambda: names, ("127.0.0.1", dns))
        first = await _serving(port)
        async with wire.channel(f"dns://127.0.0.1:{dns}/pod-0.quire.example:{port}") as channel:
            async with asyncio.timeout(10):
                while not await answers(channel):
                    await asyncio.sleep(0.05)
            names.address = "127.0.0.2"
            await first.stop(0)
            second = await _serving(port, "127.0.0.2")
            async with asyncio.timeout(10):
                while not await answers(channel):
                    await asyncio.sleep(0.05)
            await second.stop(0)
        transport.close()

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
