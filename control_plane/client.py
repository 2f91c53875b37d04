"""The client library: Generate as an iterator that survives restarts of the service.

    async with Client("127.0.0.1:7401") as client:
        async for event in client.generate("A block table is", max_tokens=64):
            print(event.delta.text, end="", flush=True)

A stream that breaks is taken up again under the same request id, with the number of tokens that
have arrived: the caller sees each token once, whatever happened in between.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeAlias, TypedDict, Unpack, cast

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.progress import Progress
from protos import wire
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:7401"
# Seconds before the first new attempt; each further wait is twice as long, up to the longest.
FIRST_WAIT = 0.05
LONGEST_WAIT = 1.0
# A server that stops, or what stands before it, cancels the calls that are left; nobody here has.
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_WHY_SECONDS = 1.0

# Plain text, token ids, or a chat: [{"role": "user", "content": "..."}].
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, str]]"


class Options(TypedDict, total=False):
    """Fields of a GenerateRequest under their names in the contract, which has their ranges.

    None is the same as absent.
    """

    model: str | None
    priority: int | None
    request_id: str | None
    max_waiting_time: timedelta | None
    # Sampling. A temperature of 0 is greedy, absent is 1.
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    # Stopping.
    max_tokens: int | None
    min_tokens: int | None
    stop_strings: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    # Output.
    sample_count: int | None
    logprob_count: int | None
    prompt_logprob_count: int | None
    # Beam search; with `stream_best`, what it has found so far comes as `best_so_far` events.
    beam_search: pb.BeamSearch | None


class CallError(Exception):
    """A call failed.

    Attributes:
        code: the gRPC status.
        sentence: what is wrong.
        details: google.rpc messages: BadRequest, ErrorInfo, RetryInfo.
    """

    def __init__(
        self, code: grpc.StatusCode, sentence: str, details: Sequence[Message] = ()
    ) -> None:
        super().__init__(f"{code.name}: {sentence}")
        self.code, self.sentence, self.details = code, sentence, tuple(details)

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError, address: str) -> CallError:
        details = wire.error_details(error)
        sentence = error.details() or error.code().name
        if error.code() is grpc.StatusCode.UNAVAILABLE and not details:
            # The service itself says why it is unavailable; without a reason nobody was reached.
            sentence = _unreached(address, sentence)
        return cls(error.code(), sentence, details)

    @property
    def field(self) -> str:
        """The request's field that was refused, if one was."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
                return str(detail.field_violations[0].field)
        return ""

    @property
    def reason(self) -> str:
        """What programs can tell the error from others by, if the service says it."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.ErrorInfo):
                return str(detail.reason)
        return ""

    @property
    def retry_seconds(self) -> float | None:
        """When the service asks to come back, if it does."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.RetryInfo):
                return float(detail.retry_delay.ToTimedelta().total_seconds())
        return None


def _unreached(address: str, details: str) -> str:
    """Why nobody was reached, from gRPC's own words."""
    _, handshake, reason = details.partition("handshake failed ")
    if handshake:
        return f"no TLS with {address}: {reason}"
    if details.endswith("Socket closed"):
        return f"{address} hangs up; it may ask for TLS, or for a certificate"
    return f"nothing answers at {address}"


def make_request(prompt: Prompt, **options: Unpack[Options]) -> pb.GenerateRequest:
    """Builds a request.

    Raises:
        TypeError: an option that there is not, or a value of another type than the contract's.
    """
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], int):
        request.token_ids.ids.extend(cast("Sequence[int]", prompt))
    else:
        turns = cast("Sequence[Mapping[str, str]]", prompt)
        request.chat.messages.extend(pb.ChatMessage(**turn) for turn in turns)
    given = {name: value for name, value in options.items() if value is not None}
    parts: list[Any] = [request, request.sampling, request.stopping, request.output]
    for part in parts:
        names = given.keys() & part.DESCRIPTOR.fields_by_name.keys()
        if names:
            part.MergeFrom(type(part)(**{name: given.pop(name) for name in names}))
    if given:
        raise TypeError(f"there is no option {', '.join(sorted(given))}")
    return request


class Client:
    """Calls one control plane, or several behind one name.

    Args:
        address: host:port, or what else gRPC resolves, for example dns:///quire:7401.
        retry_seconds: how long to try again without any progress when the service is away, starts,
            or is full; 0: not at all.
        token: shown with every call, if it is not empty; without `tls` it travels in plain text.
        tls: None: plain text.

    Raises:
        ValueError: the token is no printable ASCII without spaces.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        retry_seconds: float = 30.0,
        token: str = "",
        tls: wire.Tls | None = None,
    ) -> None:
        self.address, self.retry_seconds = address, retry_seconds
        self._metadata, self._tls = wire.bearer(token), tls

    async def __aenter__(self) -> Client:
        # Not before there is an event loop: a channel belongs to one.
        self._connection = _Connection(self.address, self._tls)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._connection.close()

    async def wait_connected(self, seconds: float) -> None:
        """Connects.

        Raises:
            CallError: UNAVAILABLE, nothing answers within that time.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._connection.channel.channel_ready()
        except TimeoutError:
            raise CallError(grpc.StatusCode.UNAVAILABLE, await self._why_unreached()) from None

    async def _why_unreached(self) -> str:
        """What a call that does not wait for a connection ends with."""
        stub: Any = health_pb2_grpc.HealthStub(self._connection.channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=_WHY_SECONDS)
        except grpc.aio.AioRpcError as error:
            return _unreached(self.address, str(error.details()))
        return _unreached(self.address, "")

    async def generate(
        self,
        prompt: Prompt | pb.GenerateRequest,
        *,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Streams one request's events: Accepted, Deltas, a Finished per sample, Usage.

        A beam search that is asked to has BestSoFar events between Accepted and its first Delta.
        An iteration that is left early ends the generation; close the iterator to do so at once.

        Args:
            prompt: or a whole request, with which there are no options.
            timeout: seconds for everything together, new attempts included.

        Raises:
            CallError: the call was refused, or the service did not come back in time.
        """
        if not isinstance(prompt, pb.GenerateRequest):
            prompt = make_request(prompt, **options)
        elif options:
            raise TypeError("options come with a prompt; a request has its own")
        progress, patience = Progress(prompt), _Patience(prompt, self.retry_seconds)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if self._connection.outdated:
                self._connect_anew(self._connection)
            async with self._connection.used() as connection:
                stub = connection.stub
                call = stub.Generate(progress.resume(), timeout=left, metadata=self._metadata)
                try:
                    async for event in call:
                        if progress.take(event):
                            # A search that begins again shows its best again, and is no further.
                            if event.WhichOneof("event") != "best_so_far":
                                patience.renew()
                            yield event
                    return
                except grpc.aio.AioRpcError as error:
                    failure = CallError.of(error, self.address)
                finally:
                    call.cancel()
                if failure.reason == "DRAINING":
                    self._connect_anew(connection)
                wait = patience.wait(failure)
            if deadline is not None:
                wait = min(wait, max(deadline - time.monotonic(), 0))
            await asyncio.sleep(wait)

    async def text(
        self,
        prompt: Prompt | pb.GenerateRequest,
        *,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> str:
        """Returns the whole text of the first sample; arguments as for `generate`.

        Raises:
            CallError: as for `generate`; INTERNAL: the engine could not go on with the sample.
        """
        pieces: list[str] = []
        async with aclosing(self.generate(prompt, timeout=timeout, **options)) as events:
            async for event in events:
                if event.delta.sample == 0:
                    pieces.append(event.delta.text)
                if event.finished.reason == pb.FINISH_REASON_ERROR and event.finished.sample == 0:
                    raise CallError(grpc.StatusCode.INTERNAL, event.finished.message)
        return "".join(pieces)

    async def cancel(self, request_id: str) -> None:
        """Ends a running generation; its streams finish with FINISH_REASON_CANCELLED.

        Raises:
            CallError: NOT_FOUND, no such generation runs there.
        """
        try:
            request = pb.CancelRequest(request_id=request_id)
            await self._connection.stub.Cancel(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise CallError.of(error, self.address) from None

    def _connect_anew(self, left: _Connection) -> None:
        """Makes another connection, for calls from now on.

        To leave a replica that ends: a connection stays where it was made, and everything is
        refused there. Or because of a certificate that was renewed.
        """
        if left is self._connection:
            left.left = True
            self._connection = _Connection(self.address, self._tls)


class _Connection:
    """A channel, which is closed when it is left and its calls have ended.

    Attributes:
        left: no more calls are begun on it.
    """

    def __init__(self, address: str, tls: wire.Tls | None) -> None:
        self.channel = wire.channel(address, tls)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.left = False
        self._calls = 0
        self._tls, self._certificate = tls, wire.version(tls)

    @property
    def outdated(self) -> bool:
        """Whether the certificate has been renewed since."""
        return wire.is_outdated(self._tls, self._certificate)

    @asynccontextmanager
    async def used(self) -> AsyncGenerator[_Connection]:
        """For the time of one call."""
        self._calls += 1
        try:
            yield self
        finally:
            self._calls -= 1
            if self.left and not self._calls:
                await self.close()

    async def close(self) -> None:
        await self.channel.close()


def generate_text(
    prompt: Prompt,
    address: str = DEFAULT_ADDRESS,
    *,
    token: str = "",
    tls: wire.Tls | None = None,
    **options: Unpack[Options],
) -> str:
    """Generates one text from code that is not asynchronous. Raises CallError."""

    async def call() -> str:
        async with Client(address, token=token, tls=tls) as client:
            return await client.text(prompt, **options)

    return asyncio.run(call())


class _Patience:
    """When to try again, and when no more."""

    def __init__(self, request: pb.GenerateRequest, seconds: float) -> None:
        self._seconds = seconds
        self._waits_once = request.HasField("max_waiting_time")
        self.renew()

    def renew(self) -> None:
        """There was progress."""
        self._next_wait = FIRST_WAIT
        self._failing_since: float | None = None

    def wait(self, error: CallError) -> float:
        """Seconds until the next attempt.

        Raises:
            CallError: the same error, where another attempt is of no use or comes too late.
        """
        if self._waits_once and error.reason == "WAITED_TOO_LONG":
            raise error  # To wait again would be longer than the caller wants to.
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if error.code in _AWAY:
            # Spread, so that the clients of a dead replica do not come back all at once.
            wait = self._next_wait * random.uniform(0.5, 1.0)  # noqa: S311
            self._next_wait = min(2 * self._next_wait, LONGEST_WAIT)
        elif error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_seconds is not None:
            wait = error.retry_seconds * random.uniform(1.0, 1.2)  # noqa: S311
        else:
            raise error
        if now + wait > self._failing_since + self._seconds:
            raise error
        return wait
