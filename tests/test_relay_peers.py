"""What a relay does with peers of every kind: they are real servers that follow a script."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from control_plane import relay
from control_plane.access import Access, Caller, Role
from control_plane.frontend import SERVICE
from control_plane.peer import LEADS
from control_plane.server import Replica
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from protos import wire
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.processes import free_port
from tests.stack import Answer, Stack, failure, led, running_engine, running_replica
from tests.test_relay import long_request, own_port, until

# What a peer does with a call; it gets the number of the call, from 0.
Script = Callable[[int, pb.GenerateRequest, wire.Context], Awaitable[None]]


def event(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(**fields)


def accepted(message: pb.GenerateRequest) -> pb.GenerateResponse:
    return event(accepted=pb.Accepted(request_id=message.request_id, engine_id="e"))


USAGE = event(usage=pb.Usage(prompt_token_count=3))


class ScriptedPeer:
    """Another replica that leads an engine, as its health says from the start."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.calls: list[pb.GenerateRequest] = []
        self.cancels: list[pb.CancelRequest] = []
        self.address = ""

    async def _generate(self, message: pb.GenerateRequest, context: wire.Context) -> None:
        self.calls.append(message)
        await self._script(len(self.calls) - 1, message, context)

    async def _cancel(self, message: pb.CancelRequest, context: wire.Context) -> pb.CancelResponse:
        self.cancels.append(message)
        await wire.abort(context, wire.failed(grpc.StatusCode.NOT_FOUND, "NO_GENERATION", "none"))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ScriptedPeer]:
        server = wire.server()
        handlers: dict[str, Any] = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate,
                request_deserializer=pb.GenerateRequest.FromString,
                response_serializer=pb.GenerateResponse.SerializeToString,
            ),
            "Cancel": grpc.unary_unary_rpc_method_handler(
                self._cancel,
                request_deserializer=pb.CancelRequest.FromString,
                response_serializer=pb.CancelResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health = wire.add_health(server)
        await health.set(LEADS, health_pb2.HealthCheckResponse.SERVING)
        self.address = f"127.0.0.1:{wire.listen(server, '127.0.0.1:0', None)}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(0)


@asynccontextmanager
async def follower(*addresses: str, **settings: Any) -> AsyncIterator[Stack]:
    """A replica that takes all of these for leaders of engines."""
    async with running_replica([], engines="", **settings) as replica:
        follow(replica, *addresses)
        stack = Stack(None, None, replica)  # type: ignore[arg-type]
        try:
            yield stack
        finally:
            await stack.channel.close()
            await stack.admin_channel.close()


def follow(replica: Replica, *addresses: str) -> None:
    router: Any = replica.router
    router.places = lambda _: list(addresses)
    router.elsewhere = router.places
    router.followed = lambda: set(addresses)
    router.has_engine = lambda _: True
    router.place_of = lambda _: addresses[0]


def with_peers(
    scripts: list[Script],
    body: Callable[[Stack, list[ScriptedPeer]], Awaitable[None]],
    **settings: Any,
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(ScriptedPeer(s).serving()) for s in scripts]
            addresses = [peer.address for peer in peers]
            await body(await stack.enter_async_context(follower(*addresses, **settings)), peers)

    asyncio.run(main())


def request(name: str = "", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id=name, token_ids=pb.TokenIds(ids=[1, 2, 3]), **fields)


def scored(tokens: list[int], count: int) -> pb.GenerateResponse:
    logprobs = [pb.TokenLogprob(token_id=i, logprob=-1.0) for i in range(count)]
    return event(delta=pb.Delta(token_ids=tokens, prompt_logprobs=logprobs))


def test_log_probabilities_of_the_prompt_come_once() -> None:
    """Though the second stream brings them again, in one event with tokens that are new."""

    async def script(number: int, message: pb.GenerateRequest, context: wire.Context) -> None:
        await context.write(accepted(message))
        if number == 0:
            await context.write(scored([1], 5))
            await wire.abort(context, wire.failed(grpc.StatusCode.UNAVAILABLE, "GONE", "gone"))
        await context.write(scored([2, 3], 5))
        await context.write(USAGE)

    async def body(stack: Stack, peers: list[ScriptedPeer]) -> None:
        answer: Answer = await stack.generate(request())
        assert answer.ids == [1, 2, 3]
        assert [each.token_id for each in answer.prompt_logprobs] == list(range(5))
        assert len(peers[0].calls) == 2

    with_peers([script], body)


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def test_why_a_peer_is_not_reached_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()

    async def main() -> None:
        async with follower(f"127.0.0.1:{port}"):
            async with asyncio.timeout(10):
                while not lines(caplog, "is not reached"):
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)

    asyncio.run(main())
    (line,) = lines(caplog, "is not reached")
    assert f"127.0.0.1:{port}" in line and "UNAVAILABLE" in line


@pytest.mark.parametrize("own", [True, False])
def test_a_relay_that_may_not_pass_calls_on_says_which_role_it_needs(
    own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """But not where it was the client's own token that was refused."""

    async def script(_: int, __: pb.GenerateRequest, context: wire.Context) -> None:
        await wire.abort(context, wire.failed(grpc.StatusCode.PERMISSION_DENIED, "R", "no role"))

    async def body(stack: Stack, _: list[ScriptedPeer]) -> None:
        for _attempt in range(2):
            call = stack.stub.Generate(request(), metadata=wire.bearer("x" if own else ""))
            with pytest.raises(grpc.aio.AioRpcError):
                await call.read()
            assert await call.code() is grpc.StatusCode.PERMISSION_DENIED

    def nobody(self: Access, tokens: list[str], names: list[str]) -> Caller:
        return Caller("", "", frozenset({Role.GENERATE}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Access, "identify", nobody)
        with_peers([script], body)
    assert len(lines(caplog, "needs the role relay")) == (0 if own else 1)


@pytest.mark.parametrize(
    ("advertise", "warned"), [("", True), ("[::]:7401", True), ("127.0.0.1:7401", False)]
)
def test_an_address_that_others_cannot_call_is_warned_of(
    advertise: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        listen = f"0.0.0.0:{free_port()}"
        async with running_replica([], engines="", listen=listen, advertise=advertise):
            pass

    asyncio.run(main())
    assert bool(lines(caplog, "other replicas cannot reach this one")) is warned


def answering(name: str) -> Script:
    async def script(_: int, message: pb.GenerateRequest, context: wire.Context) -> None:
        taken = accepted(message)
        taken.accepted.engine_id = name
        await context.write(taken)
        await context.write(USAGE)

    return script


async def full(_: int, __: pb.GenerateRequest, context: wire.Context) -> None:
    await wire.abort(context, wire.overloaded("no room", 3.0, "QUEUE_FULL"))


async def gone(_: int, __: pb.GenerateRequest, context: wire.Context) -> None:
    await wire.abort(context, wire.failed(grpc.StatusCode.UNAVAILABLE, "GONE", "gone"))


async def asked(stack: Stack, *addresses: str) -> None:
    """Waits until these have said that they answer."""
    peers = stack.replica.relay._peers
    async with asyncio.timeout(10):
        while not all(peer in peers and peers[peer].answers for peer in addresses):
            await asyncio.sleep(0.01)


def test_calls_are_spread_and_one_with_the_same_id_goes_to_the_same_peer() -> None:
    async def body(stack: Stack, peers: list[ScriptedPeer]) -> None:
        await asked(stack, *(peer.address for peer in peers))
        for number in range(30):
            engines = {
                (await stack.generate(request(f"r{number}"))).accepted.engine_id for _ in range(2)
            }
            assert len(engines) == 1
        assert all(len(peer.calls) >= 10 for peer in peers)

    with_peers([answering("a"), answering("b")], body)


def test_a_peer_that_does_not_answer_holds_no_call() -> None:
    """It takes connections and says nothing, as a machine does that hangs."""

    async def main() -> None:
        hanging = f"127.0.0.1:{silent.getsockname()[1]}"
        async with (
            ScriptedPeer(answering("a")).serving() as peer,
            follower(hanging, peer.address) as stack,
        ):
            await asked(stack, peer.address)
            for number in range(10):
                await stack.generate(request(f"r{number}"), timeout=2)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(main())


def test_a_call_for_which_a_queue_has_no_room_tries_the_others_once() -> None:
    async def body(stack: Stack, peers: list[ScriptedPeer]) -> None:
        await asked(stack, *(peer.address for peer in peers))
        for number in range(10):
            answer = await stack.generate(request(f"r{number}"))
            assert answer.accepted.engine_id == "b"
        assert len(peers[1].calls) == 10 and 1 <= len(peers[0].calls) <= 10

    with_peers([full, answering("b")], body)

    async def all_full(stack: Stack, peers: list[ScriptedPeer]) -> None:
        await asked(stack, *(peer.address for peer in peers))
        for number in range(10):
            error = await failure(stack.generate(request(f"r{number}")))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            info, retry = wire.error_details(error)
            assert info.reason == "QUEUE_FULL"  # type: ignore[attr-defined]
            assert retry.retry_delay.seconds == 3  # type: ignore[attr-defined]
        assert [len(peer.calls) for peer in peers[:2]] == [10, 10]

    with_peers([full, full], all_full)


def test_a_queue_here_that_is_full_leaves_calls_to_others(llama: Model) -> None:
    """Which lead other engines of the model."""

    async def main() -> None:
        sizes = EngineSizes(16, 512, 0, 1, 256, 1024)
        async with AsyncExitStack() as stack:
            ports = []
            for name in ("e1", "e2"):
                engine = running_engine(Engine(llama, sizes), None, engine_id=name)
                ports.append((await stack.enter_async_context(engine))[1])
            other = await stack.enter_async_context(own_port([ports[1]]))
            await led(other)
            here = await stack.enter_async_context(own_port(ports, max_waiting_requests=1))
            await until(lambda: here.relay.reaches_a_leader)
            async with wire.channel(f"127.0.0.1:{here.ports[0]}") as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)

                async def engine_of(number: int) -> str:
                    answer = Answer()
                    async for response in stub.Generate(long_request(f"r{number}"), timeout=60):
                        answer.add(response)
                    return answer.accepted.engine_id

                engines = await asyncio.gather(*(engine_of(number) for number in range(6)))
                assert {"e1", "e2"} == set(engines)

    asyncio.run(main())


def named_tenant(context: wire.Context) -> str:
    return next(str(value) for key, value in context.invocation_metadata() or () if key == "tenant")


async def cancelled(stack: Stack, name: str, tenant: str) -> float:
    """How long it takes to say that there is no such generation."""
    began = time.monotonic()
    call = stack.stub.Cancel(pb.CancelRequest(request_id=name), metadata=(("tenant", tenant),))
    error = await failure(call)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    return time.monotonic() - began


def test_that_a_request_is_adrift_is_its_tenants_own_affair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where several calls have its id, of which one ends."""
    monkeypatch.setattr(relay, "RETRY_SECONDS", 1.5)

    async def main() -> None:
        async with ScriptedPeer(gone).serving() as peer, follower(peer.address) as stack:
            replica = stack.replica
            replica.frontend._tenant_of = named_tenant
            await asked(stack, peer.address)
            calls = [
                stack.stub.Generate(request("job"), metadata=(("tenant", "a"),), timeout=20)
                for _ in range(2)
            ]
            key = "a", "job"
            async with asyncio.timeout(5):
                while replica.relay._adrift._keys[key] < 2:
                    await asyncio.sleep(0.01)
            assert await cancelled(stack, "job", "b") < 0.5
            calls[0].cancel()
            async with asyncio.timeout(5):
                while replica.relay.running == 2:
                    await asyncio.sleep(0.01)
            assert key in replica.relay._adrift
            assert await cancelled(stack, "job", "a") > 0.5
            assert await calls[1].code() is grpc.StatusCode.UNAVAILABLE
            assert key not in replica.relay._adrift and not replica.relay._adrift._calls

    asyncio.run(main())


@pytest.mark.parametrize(("own", "service"), [(0.3, 0.0), (None, 0.3), (0.3, 60.0)])
@pytest.mark.parametrize("there", [True, False], ids=["silent", "gone"])
def test_a_call_that_waits_in_a_relay_waits_no_longer_than_it_may(
    own: float | None, service: float, there: bool
) -> None:
    async def stuck(_: int, __: pb.GenerateRequest, ___: wire.Context) -> None:
        await asyncio.sleep(3600)

    async def body(stack: Stack, _: list[ScriptedPeer]) -> None:
        limit = None if own is None else timedelta(seconds=own)
        began = time.monotonic()
        error = await failure(stack.generate(request(max_waiting_time=limit), timeout=10))
        assert 0.29 < time.monotonic() - began < 1.3
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        info, _retry = wire.error_details(error)
        assert info.reason == "WAITED_TOO_LONG"  # type: ignore[attr-defined]
        assert str(error.details()).endswith("at most 0.3 s are allowed")
        assert stack.replica.metrics.counters.expired == 1

    with_peers([stuck if there else gone], body, max_waiting_seconds=service)


def test_what_has_been_taken_may_take_its_time() -> None:
    async def slow(_: int, message: pb.GenerateRequest, context: wire.Context) -> None:
        await context.write(accepted(message))
        await asyncio.sleep(0.8)
        await context.write(USAGE)

    async def body(stack: Stack, _: list[ScriptedPeer]) -> None:
        await stack.generate(request(max_waiting_time=timedelta(seconds=0.2)))

    with_peers([slow], body)


def test_only_so_many_calls_wait_for_somebody_who_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "RETRY_SECONDS", 1.0)

    async def body(stack: Stack, _: list[ScriptedPeer]) -> None:
        calls = [failure(stack.generate(request(), timeout=10)) for _ in range(6)]
        begun = request(received_token_counts=[3])
        *errors, taken = await asyncio.gather(*calls, failure(stack.generate(begun)))
        full = [e for e in errors if e.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert len(full) == 4
        for error in full:
            assert "RetryInfo" in type(wire.error_details(error)[-1]).__name__
        assert taken.code() is grpc.StatusCode.UNAVAILABLE
        assert stack.replica.relay._adrift.waiting == 0

    with_peers([gone], body, max_waiting_requests=2)
