"""Another replica, as one that passes calls on to it sees it. Knows grpc and pb2."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import wire
from protos.inference.v1 import inference_pb2 as pb

log = logging.getLogger(__name__)

# Under this name a replica's health says whether it takes relayed calls: it leads an engine.
LEADS = "quire.leads"
# After which a replica that leads nothing any more has ended its streams, if it is alive.
LEFT_SECONDS = 2.0
HEALTH_SECONDS = 1.0
WATCH_SECONDS = 0.1

_SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class Peer:
    """Another replica's inference API.

    Attributes:
        answers: it leads an engine, and said so lately; None: it has not been asked yet.
        left: it leads no engine any more that is known here.
    """

    def __init__(self, address: str, tls: wire.Tls | None) -> None:
        self.address, self._tls = address, tls
        self._certificate = wire.version(tls)
        self.answers: bool | None = None
        self.left = False
        self.led_at = time.monotonic()
        self.calls: set[grpc.aio.Call] = set()
        self._channel = channel = wire.channel(address, tls)
        # What comes back stays bytes: it is handed on as it is.
        self.generate: Any = channel.unary_stream(
            f"/{_SERVICE}/Generate", request_serializer=pb.GenerateRequest.SerializeToString
        )
        self.cancel: Any = channel.unary_unary(
            f"/{_SERVICE}/Cancel",
            request_serializer=pb.CancelRequest.SerializeToString,
            response_deserializer=pb.CancelResponse.FromString,
        )
        self._health: Any = health_pb2_grpc.HealthStub(channel)
        # Why it was not reached, since it was last; and that it has denied a call.
        self._told: set[grpc.StatusCode] = set()
        self._told_denial = False
        self._watching = asyncio.create_task(self._watch())

    @property
    def outdated(self) -> bool:
        """Whether its connections would be made with a certificate that was renewed since."""
        return wire.is_outdated(self._tls, self._certificate)

    async def _watch(self) -> None:
        """Keeps the connection, and finds out whether relayed calls would be answered."""
        question = health_pb2.HealthCheckRequest(service=LEADS)
        while True:
            try:
                answer = await self._health.Check(question, timeout=HEALTH_SECONDS)
                self.answers = answer.status == health_pb2.HealthCheckResponse.SERVING
                self._told.clear()
            except grpc.aio.AioRpcError as error:
                self.answers = False
                self._tell(error)
            await asyncio.sleep(HEALTH_SECONDS if self.answers else WATCH_SECONDS)

    def _tell(self, error: grpc.aio.AioRpcError) -> None:
        """Says in the log why the peer is not reached, each reason once until it is again."""
        if error.code() not in self._told:
            self._told.add(error.code())
            why = f"{error.code().name}: {error.details()}"
            log.warning("the replica at %s is not reached: %s", self.address, why)

    def denied(self, error: wire.RpcError) -> None:
        """Says in the log, once, that this replica may not pass calls on for others."""
        if not self._told_denial:
            self._told_denial = True
            log.error(
                "the replica at %s refuses a call that was passed on for a caller without a token: "
                "this replica needs the role relay there: %s %s",
                self.address,
                error.code.name,
                error.sentence,
            )

    async def say_farewell(
        self, message: pb.CancelRequest, metadata: list[tuple[str, str | bytes]]
    ) -> None:
        """Says that the client of a generation has gone; if that gets lost, time will tell."""
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await self.cancel(message, timeout=LEFT_SECONDS, metadata=metadata)

    async def close(self) -> None:
        """Cuts what calls there are; each goes on elsewhere."""
        self.left = True
        self._watching.cancel()
        for call in list(self.calls):
            call.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._channel.close(LEFT_SECONDS)

    def error(self, error: grpc.aio.AioRpcError) -> wire.RpcError:
        """What a call of the peer ended with, as the client is to see it."""
        code = error.code()
        # A server that stops cancels its calls; one that is gone has said nothing.
        if code is grpc.StatusCode.CANCELLED or (
            code is grpc.StatusCode.UNAVAILABLE and not wire.error_details(error)
        ):
            return self.gone(str(error.details()))
        return wire.passed_on(error)

    def gone(self, how: str) -> wire.RpcError:
        """The error of a peer that does not answer."""
        sentence = f"the replica at {self.address} that leads the engine does not answer: {how}"
        return wire.failed(grpc.StatusCode.UNAVAILABLE, "LEADER_GONE", sentence)
