"""Who calls: the names in a peer's certificate, and what every call of a server passes first."""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from protos import wire

log = logging.getLogger(__name__)

# Asked with the full name of a method, "/package.Service/Method". Raises RpcError for a call that
# may not go on; what it sets in context variables, the method's handler finds there.
Check: TypeAlias = Callable[[str, wire.Context], None]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

HEALTH_METHODS = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
# Of gRPC's auth context: subject alternative names of two kinds, and the subject's common name.
_NAMES = ("peer_dns", "peer_uri", "x509_common_name")


def certificate_names(context: wire.Context) -> tuple[str, ...]:
    """The DNS names, URIs and the common name in the certificate that the peer has proved to own.

    None without TLS, and none where no certificate was asked for, because there is no tls-ca.
    """
    properties = context.auth_context()
    found = [value.decode(errors="replace") for key in _NAMES for value in properties.get(key, ())]
    return tuple(dict.fromkeys(found))


class Guard(grpc.aio.ServerInterceptor):
    """Stands before every method of a server, also before those that it does not have.

    A call that `check` refuses has not been parsed.
    """

    def __init__(self, check: Check) -> None:
        self._check = check

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return _guarded(handler, handler_call_details.method, self._check)


def _guarded(handler: Handler | None, method: str, check: Check) -> Handler:
    async def absent(_: AsyncIterator[bytes], context: wire.Context) -> None:
        async with _told(method, context):
            check(method, context)
            sentence = "there is no such method here"
            raise wire.RpcError(grpc.StatusCode.UNIMPLEMENTED, sentence)

    if handler is None:
        # This kind answers without waiting for a message, whatever the caller takes it for.
        return grpc.stream_stream_rpc_method_handler(absent)
    behaviour: Any = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    parse = handler.request_deserializer

    async def from_one(data: bytes, context: wire.Context) -> Any:
        async with _told(method, context):
            check(method, context)
            try:
                message = parse(data) if parse else data
            except DecodeError as error:
                raise wire.bad_field("request", "cannot be read") from error
            return await _answer(behaviour(message, context), context)

    async def from_many(requests: AsyncIterator[Any], context: wire.Context) -> Any:
        async with _told(method, context):
            check(method, context)
            return await _answer(behaviour(requests, context), context)

    make = _MAKERS[bool(handler.request_streaming), bool(handler.response_streaming)]
    if handler.request_streaming:
        return make(from_many, parse, handler.response_serializer)
    return make(from_one, None, handler.response_serializer)


_MAKERS: dict[tuple[bool, bool], Callable[..., Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


@asynccontextmanager
async def _told(method: str, context: wire.Context) -> AsyncIterator[None]:
    """Lets the caller know of errors that are its own; of others no more than where to ask."""
    try:
        yield
    except wire.RpcError as error:
        await wire.abort(context, error)
    except grpc.aio.AbortError:
        raise
    except Exception:
        reference = uuid.uuid4().hex[:12]
        log.exception("error %s in %s", reference, method)
        await context.abort(grpc.StatusCode.INTERNAL, f"internal error {reference}")


async def _answer(outcome: Any, context: wire.Context) -> Any:
    """What a behaviour made when it was called: one answer, or a stream in either of two forms."""
    if not inspect.isasyncgen(outcome):
        return await outcome
    async with aclosing(outcome) as answers:
        async for answer in answers:
            await context.write(answer)
    return None
