"""Passes calls on to the replica that leads the engine, and takes them up when that changes.

A replica takes calls for engines that it does not lead. It sends them to whoever does, as the
engine told when it refused to be led, and hands on what comes back. When such a stream breaks, the
call goes on at the next leader, or here, with the same request id after the tokens that its client
has; so does one whose engine was led from here and is not any more. Clients notice a pause.

A call goes through one relay at most: whoever gets a relayed one answers it or refuses it.
Knows grpc and pb2.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import grpc

from control_plane.peer import LEFT_SECONDS, WATCH_SECONDS, Peer
from control_plane.progress import Progress
from control_plane.router import HERE, Router
from protos import wire
from protos.inference.v1 import inference_pb2 as pb

# How long a call is tried again without any progress.
RETRY_SECONDS = 30.0
FIRST_WAIT, LONGEST_WAIT = 0.02, 0.25
# How long it waits for the engine that it was accepted by to be led again, before any other.
SAME_ENGINE_SECONDS = 2.0

_RELAY, _TENANT, _AUTHORIZATION = "quire-relay", "quire-tenant", "authorization"
_DENIED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)

Write: TypeAlias = Callable[[pb.GenerateResponse], Awaitable[None]]
# Answers a request from here; raises wire.RpcError.
Local: TypeAlias = Callable[[pb.GenerateRequest, Write], Awaitable[None]]


def is_relayed(context: wire.Context) -> bool:
    """Whether another replica has passed the call on."""
    return any(key == _RELAY for key, _ in context.invocation_metadata() or ())


def relay_metadata(context: wire.Context, tenant: str) -> list[tuple[str, str | bytes]]:
    """What a relayed call carries of the one that came: who calls, and for whom."""
    metadata: list[tuple[str, str | bytes]] = [(_RELAY, "1"), (_TENANT, tenant)]
    given = context.invocation_metadata() or ()
    return metadata + [(key, value) for key, value in given if key == _AUTHORIZATION]


class Relay:
    """The calls of this replica's clients, wherever they are answered.

    Attributes:
        running: calls in progress.
        stopping: no call is taken up any more.
    """

    def __init__(self, router: Router, tls: wire.Tls | None) -> None:
        self._router, self._tls = router, tls
        self._peers: dict[str, Peer] = {}
        # Requests whose stream has broken, and has not gone on yet.
        self._adrift: set[str] = set()
        self.running = 0
        self.stopping = False

    @property
    def reaches_a_leader(self) -> bool:
        """Whether a call that is passed on would be answered."""
        followed = self._router.followed()
        return any(peer.answers for peer in self._peers.values() if peer.address in followed)

    async def run(self) -> None:
        """Keeps up connections with the leaders of engines; until cancelled."""
        try:
            while True:
                now = time.monotonic()
                for address in self._router.followed():
                    self._peer(address).led_at = now
                for peer in list(self._peers.values()):
                    if now - peer.led_at > LEFT_SECONDS:
                        # If it is alive it has ended its streams; if not, nobody else will.
                        del self._peers[peer.address]
                        await peer.close()
                await asyncio.sleep(WATCH_SECONDS)
        finally:
            peers, self._peers = list(self._peers.values()), {}
            await asyncio.gather(*(peer.close() for peer in peers))

    def _peer(self, address: str) -> Peer:
        if address not in self._peers:
            self._peers[address] = Peer(address, self._tls)
        return self._peers[address]

    # Generate.

    async def generate(
        self, message: pb.GenerateRequest, context: wire.Context, tenant: str, local: Local
    ) -> None:
        """Answers a client's call, here or at the leader, until it is done.

        Raises:
            RpcError: it is refused, or nobody has answered it for some time.
        """
        progress = Progress(message)
        patience = _Patience(progress)
        failed: str | None = None

        async def write(event: pb.GenerateResponse) -> None:
            self._adrift.discard(progress.request_id)
            if progress.take(event):
                await context.write(event)

        self.running += 1
        try:
            while True:
                address = self._place(message.model, progress, patience, failed)
                try:
                    if address == HERE:
                        await local(progress.resume(), write)
                    else:
                        await self._pass_on(address, progress, context, tenant)
                    return
                except wire.RpcError as error:
                    if progress.complete:
                        return
                    if not self._may_go_on(message.model, address, error):
                        raise
                    self._adrift.add(progress.request_id)
                    failed = address
                    await patience.wait(error)
        finally:
            self.running -= 1
            self._adrift.discard(progress.request_id)

    def _place(
        self, model: str, progress: Progress, patience: _Patience, failed: str | None
    ) -> str:
        """Where to try next, after it has `failed` somewhere."""
        if progress.engine_id and patience.failing_seconds < SAME_ENGINE_SECONDS:
            # What was computed is there.
            place = self._router.place_of(progress.engine_id)
            if place is not None:
                return place
        places = self._router.places(model)
        following = places.index(failed) + 1 if failed in places else 0
        return places[following % len(places)]

    def _may_go_on(self, model: str, address: str, error: wire.RpcError) -> bool:
        """Whether another attempt may be answered better."""
        if error.code is not grpc.StatusCode.UNAVAILABLE or self.stopping:
            return False
        return address != HERE or self._router.has_engine(model)

    async def _pass_on(
        self, address: str, progress: Progress, context: wire.Context, tenant: str
    ) -> None:
        """Streams a leader's answer.

        Raises:
            RpcError: what it ended with; UNAVAILABLE if the leader is gone.
        """
        peer = self._peer(address)
        call = peer.generate(
            progress.resume(),
            timeout=context.time_remaining(),
            metadata=relay_metadata(context, tenant),
        )
        peer.calls.add(call)
        try:
            async for data in call:
                self._adrift.discard(progress.request_id)
                event = pb.GenerateResponse.FromString(data)
                # Asked before any of them are cut off.
                may_change = bool(event.delta.prompt_logprobs)
                if progress.take(event):
                    await context.write(event if may_change else data)
        except grpc.aio.AioRpcError as error:
            raise self._told(peer, context, peer.error(error)) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not peer.left or (task is not None and task.cancelling()):
                raise
            raise peer.gone("it leads no engine any more") from None
        finally:
            peer.calls.discard(call)
            call.cancel()

    def _told(self, peer: Peer, context: wire.Context, error: wire.RpcError) -> wire.RpcError:
        """The same error, after a line in the log if it is this replica that was denied."""
        own = any(key == _AUTHORIZATION for key, _ in context.invocation_metadata() or ())
        if error.code in _DENIED and not own:
            peer.denied(error)
        return error

    # Cancel.

    async def cancel(
        self, message: pb.CancelRequest, context: wire.Context, tenant: str, local: LocalCancel
    ) -> None:
        """Ends a generation wherever it runs.

        Raises:
            RpcError: NOT_FOUND, it runs nowhere.
        """
        patience = _Patience(None)
        while True:
            errors = []
            for address in [HERE, *self._router.followed()]:
                try:
                    if address == HERE:
                        local(message.request_id)
                    else:
                        await self._cancel_at(address, message, context, tenant)
                    return
                except wire.RpcError as error:
                    errors.append(error)
            lost = [each for each in errors if each.code is not grpc.StatusCode.NOT_FOUND]
            if self.stopping or not (lost or message.request_id in self._adrift):
                raise errors[0]
            # It may be on its way from one leader to the next.
            await patience.wait((lost or errors)[0])

    async def _cancel_at(
        self, address: str, message: pb.CancelRequest, context: wire.Context, tenant: str
    ) -> None:
        peer = self._peer(address)
        try:
            await peer.cancel(
                message,
                timeout=context.time_remaining(),
                metadata=relay_metadata(context, tenant),
            )
        except grpc.aio.AioRpcError as error:
            raise peer.error(error) from error


# Ends a generation that runs here; raises wire.RpcError.
LocalCancel: TypeAlias = Callable[[str], None]


class _Patience:
    """When to try again, and when no more."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._events = 0
        self._failing_since: float | None = None
        self._attempts = 0

    @property
    def failing_seconds(self) -> float:
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    async def wait(self, error: wire.RpcError) -> None:
        """Waits until the next attempt.

        Raises:
            RpcError: the same error, if it has lasted too long.
        """
        if self._progress is not None and self._progress.events > self._events:
            self._events, self._failing_since = self._progress.events, None
        if self._failing_since is None:
            self._failing_since, self._attempts = time.monotonic(), 0
        if self.failing_seconds > RETRY_SECONDS:
            raise error
        wait = min(FIRST_WAIT * 2**self._attempts, LONGEST_WAIT)
        self._attempts += 1
        # Spread, so that the calls of a dead leader do not all come back at once.
        await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311
