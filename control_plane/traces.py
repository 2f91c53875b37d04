"""What is told of a call for its trace, by a replica that keeps none. Knows grpc and pb2.

`otlp.py` has traces that go to a collector, and is imported where these are wanted only.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from protos import wire
from protos.inference.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from control_plane.generation import Generation

# Of W3C's trace context, as metadata of a call: https://www.w3.org/TR/trace-context/
CONTEXT_KEYS = ("traceparent", "tracestate")


class BadTraces(Exception):
    """Traces are wanted, but not in a way that can be had."""


class CallTrace:
    """One call's trace; its block is the call. This one keeps nothing of what it is told."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the trace: well if there is no exception, else as a call that was cut off.

        What was `refused` keeps its status.
        """

    def asked(self, message: pb.GenerateRequest, tenant: str) -> None:
        """The call has a request, of which nothing has been checked."""

    def answered_by(self, generation: Generation) -> None:
        """A generation at this replica is read; the last one of a call counts."""

    def passed_on(self, address: str) -> None:
        """The call goes on at another replica."""

    def refused(self, code: str, reason: str) -> None:
        """The call ends with an error.

        Args:
            code: the name of its status.
            reason: what programs tell it apart by; nothing that quotes the client.
        """

    def carried(self, context: wire.Context) -> list[tuple[str, str | bytes]]:
        """The metadata by which another replica continues the trace."""
        given = context.invocation_metadata() or ()
        return [(key, value) for key, value in given if key in CONTEXT_KEYS]


UNTRACED = CallTrace()


class Traces:
    """The traces of a replica's calls; these go nowhere."""

    def call(self, context: wire.Context, request_id: str, arrived: float) -> CallTrace:
        """Begins the trace of a call, or goes on with its caller's.

        Args:
            arrived: seconds, monotonic.
        """
        return UNTRACED

    async def close(self) -> None:
        """Hands over what is left, within a few seconds."""


def open_traces(endpoint: str, share: float, instance: str) -> Traces:
    """Returns traces that go to a collector, or nowhere if no endpoint is given.

    Args:
        share: of the traces that begin here, what is kept, in [0, 1].
        instance: the name of this replica.

    Raises:
        BadTraces: an OTEL_* variable means nothing.
    """
    if not endpoint:
        return Traces()
    # It takes time and memory, which those who want no traces keep.
    from control_plane.otlp import OtlpTraces

    return OtlpTraces(endpoint, share, instance)


def check_endpoint(endpoint: str) -> None:
    """Raises ValueError unless it is empty or like ``http://HOST:PORT`` or ``https://HOST:PORT``."""
    if not endpoint:
        return
    try:
        parts = urlsplit(endpoint)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port
    except ValueError:
        whole = False
    if not whole or f"{parts.scheme}://{parts.netloc}" != endpoint.rstrip("/") or "@" in endpoint:
        raise ValueError("must be http://HOST:PORT for plain text or https://HOST:PORT for TLS")
