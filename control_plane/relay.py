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
import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import grpc

from control_plane.generation import Key, WaitedTooLong, waiting_sentence
from control_plane.overload import UNKNOWN
from control_plane.peer import LEFT_SECONDS, WATCH_SECONDS, Peer
from control_plane.progress import Progress
from control_plane.router import HERE, Router
from control_plane.traces import UNTRACED, CallTrace
from protos import wire
from protos.inference.v1 import inference_pb2 as pb

# How long a call is tried again without any progress.
RETRY_SECONDS = 30.0
# How much later a relay's own limit on waiting comes than a leader's.
LIMIT_SLACK_SECONDS = 0.25
# The reason of an error that another place may be free of.
QUEUE_FULL = "QUEUE_FULL"
FIRST_WAIT, LONGEST_WAIT = 0.02, 0.25
# How long it waits for the engine that it was accepted by to be led again, before any other.
SAME_ENGINE_SECONDS = 2.0

_RELAY, _TENANT, _AUTHORIZATION = "quire-relay", "quire-tenant", "authorization"
_FAREWELL = "quire-farewell"
_DENIED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)

Write: TypeAlias = Callable[[pb.GenerateResponse], Awaitable[None]]
# Answers a request from here; raises wire.RpcError.
Local: TypeAlias = Callable[[pb.GenerateRequest, Write], Awaitable[None]]


def is_relayed(context: wire.Context) -> bool:
    """Whether another replica has passed the call on."""
    return any(key == _RELAY for key, _ in context.invocation_metadata() or ())


def is_farewell(context: wire.Context) -> bool:
    """Whether a relayed Cancel says only that the relay's own client has gone.

    Others may read the same generation, so it ends when nobody does.
    """
    return any(key == _FAREWELL for key, _ in context.invocation_metadata() or ())


def relay_metadata(context: wire.Context, tenant: str) -> list[tuple[str, str | bytes]]:
    """What a relayed call carries of the one that came: who calls, and for whom."""
    metadata: list[tuple[str, str | bytes]] = [(_RELAY, "1"), (_TENANT, tenant)]
    given = context.invocation_metadata() or ()
    return metadata + [(key, value) for key, value in given if key == _AUTHORIZATION]


class Relay:
    """The calls of this replica's clients, wherever they are answered.

    Args:
        most_waiting: calls that no engine has taken and that wait for somebody who answers, at
            most; for each engine.

    Attributes:
        running: calls in progress.
        stopping: no call is taken up any more.
    """

    def __init__(self, router: Router, tls: wire.Tls | None, most_waiting: int) -> None:
        self._router, self._tls, self._most_waiting = router, tls, most_waiting
        self._peers: dict[str, Peer] = {}
        # With a certificate of before, until what was passed on to them has ended.
        self._outdated: set[Peer] = set()
        self._adrift = _Adrift()
        # What leaders are told of clients that have gone.
        self._farewells: set[asyncio.Task[None]] = set()
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
                    elif peer.outdated:
                        self._outdated.add(self._peers.pop(peer.address))
                for peer in [each for each in self._outdated if not each.calls]:
                    self._outdated.remove(peer)
                    await peer.close()
                await asyncio.sleep(WATCH_SECONDS)
        finally:
            peers = [*self._peers.values(), *self._outdated]
            self._peers, self._outdated = {}, set()
            await asyncio.gather(*(peer.close() for peer in peers))

    def _peer(self, address: str) -> Peer:
        if address not in self._peers:
            self._peers[address] = Peer(address, self._tls)
        return self._peers[address]

    # Generate.

    async def generate(
        self,
        message: pb.GenerateRequest,
        context: wire.Context,
        tenant: str,
        local: Local,
        waiting_limit: float = math.inf,
        trace: CallTrace = UNTRACED,
    ) -> None:
        """Answers a client's call, here or at the leader, until it is done.

        Args:
            waiting_limit: seconds within which an engine must have taken it.

        Raises:
            RpcError: it is refused, or nobody has answered it for some time.
            WaitedTooLong: no engine has taken it in time.
        """
        call = _Call(message, context, tenant, waiting_limit, trace)
        self.running += 1
        try:
            async with call.timeout:
                await self._answer(call, local)
        except wire.RpcError as error:
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._part(call)
            raise
        except BaseException as error:
            # Its client has gone, or is sent away.
            self._part(call)
            if isinstance(error, TimeoutError) and call.timeout.expired():
                raise call.waited_too_long() from error
            raise
        finally:
            self.running -= 1
            self._adrift.discard(call)

    def _part(self, call: _Call) -> None:
        """Lets the leader know that a call has lost its client, not only its relay."""
        peer = call.peer
        if peer is None or peer.left or self.stopping or call.progress.complete:
            return
        message = pb.CancelRequest(request_id=call.progress.request_id)
        metadata = [*relay_metadata(call.context, call.tenant), (_FAREWELL, "1")]
        task = asyncio.create_task(peer.say_farewell(message, metadata))
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _answer(self, call: _Call, local: Local) -> None:
        async def write(event: pb.GenerateResponse) -> None:
            self._goes_on(call)
            if call.progress.take(event):
                await call.context.write(event)

        while True:
            address = self._place(call)
            try:
                if address == HERE:
                    call.peer = None
                    call.limit(on=False)  # Whoever has it in a queue sees to it.
                    await local(call.progress.resume(), write)
                else:
                    call.limit(on=True)
                    await self._pass_on(address, call)
                return
            except wire.RpcError as error:
                if call.progress.complete:
                    return
                await self._failed(call, address, error)

    def _goes_on(self, call: _Call) -> None:
        """Somebody answers it."""
        self._adrift.discard(call)
        call.full, call.taken = None, True
        call.limit(on=False)

    def _place(self, call: _Call) -> str:
        """Where to try next: where it has not failed yet, and where somebody answers."""
        if call.full is not None:
            return self._others(call)[0]
        progress = call.progress
        if progress.engine_id and call.patience.failing_seconds < SAME_ENGINE_SECONDS:
            # What was computed is there.
            place = self._router.place_of(progress.engine_id)
            if place is not None:
                return place
        places = self._ranked(call, self._router.places(call.model))
        willing = [place for place in places if place == HERE or self._may_answer(place)] or places
        untried = [place for place in willing if place not in call.failed]
        if not untried:
            call.failed.clear()
        return (untried or willing)[0]

    def _others(self, call: _Call) -> list[str]:
        """Replicas that answer, for a call for which a queue had no room."""
        elsewhere = self._ranked(call, self._router.elsewhere(call.model))
        return [each for each in elsewhere if self._peer(each).answers and each not in call.failed]

    def _ranked(self, call: _Call, places: list[str]) -> list[str]:
        """Those that answer first, in an order that is the same for each call with this id.

        So the calls are spread, and whoever comes back finds what it left, by whatever replica.
        """

        def rank(place: str) -> tuple[bool, bool, bytes]:
            drawn = hashlib.blake2b("\0".join((*call.key, place)).encode(), digest_size=8).digest()
            return place == HERE, place != HERE and not self._peer(place).answers, drawn

        return sorted(places, key=rank)

    def _may_answer(self, address: str) -> bool:
        return self._peer(address).answers is not False

    async def _failed(self, call: _Call, address: str, error: wire.RpcError) -> None:
        """Returns when and if another attempt may be answered better; raises the error if not."""
        call.failed.add(address)
        full = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        full = full and QUEUE_FULL in wire.reasons(error.details)
        if (full or call.full is not None) and not self.stopping:
            # Once at each of the others, without waiting.
            call.full = call.full or error
            if not self._others(call):
                raise call.full
            return
        if not self._may_go_on(call.model, address, error):
            raise error
        self._adrift.add(call)
        most = self._most_waiting * max(len(self._router.leaders), 1)
        if not call.taken and self._adrift.waiting > most:
            sentence = f"{most} requests wait already for a replica that answers"
            raise wire.overloaded(sentence, UNKNOWN, QUEUE_FULL) from error
        call.limit(on=True)
        await call.patience.wait(error)

    def _may_go_on(self, model: str, address: str, error: wire.RpcError) -> bool:
        """Whether another attempt may be answered better."""
        if error.code is not grpc.StatusCode.UNAVAILABLE or self.stopping:
            return False
        return address != HERE or self._router.has_engine(model)

    async def _pass_on(self, address: str, call: _Call) -> None:
        """Streams a leader's answer.

        Raises:
            RpcError: what it ended with; UNAVAILABLE if the leader is gone.
        """
        peer, progress, context = self._peer(address), call.progress, call.context
        call.peer = peer
        call.trace.passed_on(address)
        metadata = relay_metadata(context, call.tenant) + call.trace.carried(context)
        stream = peer.generate(
            progress.resume(),
            timeout=context.time_remaining(),
            metadata=metadata,
        )
        peer.calls.add(stream)
        try:
            async for data in stream:
                self._goes_on(call)
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
            peer.calls.discard(stream)
            stream.cancel()

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
            if self.stopping or not (lost or (tenant, message.request_id) in self._adrift):
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


class _Call:
    """A client's call, wherever it has been.

    Attributes:
        failed: places that did not answer it lately.
        peer: to which it was passed on last; None: it is answered here.
        taken: an engine has taken it, now or before its client came with it.
        timeout: within which that must happen.
        full: the first place's error, if its queue has had no room since the call last went on.
    """

    def __init__(
        self,
        message: pb.GenerateRequest,
        context: wire.Context,
        tenant: str,
        waiting_limit: float,
        trace: CallTrace,
    ) -> None:
        self.model, self.context, self.tenant = message.model, context, tenant
        self.trace = trace
        self.progress = Progress(message)
        self.patience = _Patience(self.progress)
        self.key: Key = tenant, self.progress.request_id
        self.failed: set[str] = set()
        self.full: wire.RpcError | None = None
        self.peer: Peer | None = None
        self.taken = any(message.received_token_counts)
        self.timeout = asyncio.timeout(None)
        self._limit, self._began = waiting_limit, asyncio.get_running_loop().time()

    def limit(self, *, on: bool) -> None:
        """Lets the time run within which an engine must have taken it; without `on`, any time."""
        if self.timeout.expired():
            return
        limited = on and not self.taken and self._limit < math.inf
        # A leader's own limit comes first: it knows better when there will be room.
        until = self._began + self._limit + LIMIT_SLACK_SECONDS
        self.timeout.reschedule(until if limited else None)

    def waited_too_long(self) -> WaitedTooLong:
        waited = round(asyncio.get_running_loop().time() - self._began, 2)
        return WaitedTooLong(waiting_sentence(waited, self._limit))


class _Adrift:
    """Calls whose stream has broken, and has not gone on yet; several may have one key."""

    def __init__(self) -> None:
        self._calls: set[_Call] = set()
        self._waiting: set[_Call] = set()
        self._keys: Counter[Key] = Counter()

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    @property
    def waiting(self) -> int:
        """Those that no engine has taken."""
        return len(self._waiting)

    def add(self, call: _Call) -> None:
        if call not in self._calls:
            self._calls.add(call)
            self._keys[call.key] += 1
            if not call.taken:
                self._waiting.add(call)

    def discard(self, call: _Call) -> None:
        if call in self._calls:
            self._calls.remove(call)
            self._waiting.discard(call)
            self._keys[call.key] -= 1
            if not self._keys[call.key]:
                del self._keys[call.key]


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
