"""What all gRPC servers and channels of Quire have in common: caps, keepalive, TLS, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from protos.renewal import ServerCertificate, Version, is_renewed, version_of

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# A prompt of 131,072 token ids takes about half a megabyte, a snapshot part two.
MAX_MESSAGE_BYTES = 16 << 20
ERROR_DOMAIN = "quire"

_CAPS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
CHANNEL_OPTIONS = [
    *_CAPS,
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A restarted peer should be found again at once, not after a minute's backoff.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A replaced pod has its name and a new address; gRPC resolves a name again after 30 s at best.
    ("grpc.dns_min_time_between_resolutions_ms", 500),
    # Channels to one address share their connection otherwise, and a new one fails at once
    # where another has just failed, though the peer is back.
    ("grpc.use_local_subchannel_pool", 1),
    ('grpc.service_config', '{"loadBalancingConfig": [{"round_robin": {}}]}'),
]  # fmt: skip
SERVER_OPTIONS = [
    *_CAPS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.keepalive_permit_without_calls", 1),
]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of one process, and whom it takes for its peer.

    A server needs a certificate with its key; with `ca`, its peers must present one that it signed.
    A client needs none of them: it checks its server's certificate by `ca`, or by gRPC's own list
    of authorities, and presents one of its own if it has one.

    Attributes:
        peer_name: that a client demands of its server's certificate; empty: the address's.

    Raises:
        ValueError: a certificate without its key, or the other way round.
    """

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    peer_name: str = ""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls-certificate and tls-key must be set together")

    @property
    def version(self) -> Version:
        """Of the files. A channel has what they were when it was opened, a server what they are."""
        return version_of((self.certificate, self.key, self.ca))


def client_tls(certificate: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
    """Returns what three settings mean to a client, None (plain text) if none is set.

    Raises:
        ValueError: a certificate without its key, or the other way round.
    """
    if certificate is None and key is None and ca is None:
        return None
    return Tls(certificate, key, ca)


def tls(certificate: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
    """Returns what three settings mean to a server, None (plain text) if none is set.

    Raises:
        ValueError: only some of those that belong together are set.
    """
    if certificate is None and key is None and ca is None:
        return None
    if certificate is None or key is None:
        raise ValueError("tls-certificate and tls-key must be set together, and tls-ca with both")
    return Tls(certificate, key, ca)


def server(
    guard: grpc.aio.ServerInterceptor | None = None,
    max_concurrent_rpcs: int | None = None,
    *,
    connection_age_seconds: float = 0.0,
) -> grpc.aio.Server:
    """Makes a server with the common options.

    Args:
        guard: what every call passes first; see ``protos.identity.Guard``.
        connection_age_seconds: after which a connection takes no new calls, so that its client
            makes another one; running calls go on. gRPC varies it by a tenth. 0: never.
    """
    age = [("grpc.max_connection_age_ms", round(1000 * connection_age_seconds))]
    return grpc.aio.server(
        interceptors=() if guard is None else (guard,),
        options=SERVER_OPTIONS + age * (connection_age_seconds > 0),
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )


def listen(where: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    """Binds a server to ``host:port`` and returns the port (0 picks one).

    Raises:
        RuntimeError: the address cannot be bound.
        ValueError: there is TLS, but no certificate.
    """
    if tls is None:
        return where.add_insecure_port(address)
    if tls.certificate is None or tls.key is None:
        raise ValueError("a server with TLS needs a certificate")
    certificate = ServerCertificate(tls.certificate, tls.key, tls.ca)
    return where.add_secure_port(address, certificate.credentials)


def version(tls: Tls | None) -> Version:
    """Of the files of one who may have none."""
    return () if tls is None else tls.version


def is_outdated(tls: Tls | None, since: Version) -> bool:
    """Whether a channel that was opened with files of that version had better be opened anew."""
    return is_renewed(version(tls), since)


def channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """Opens a channel with the common options; nothing is sent yet."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        *(file.read_bytes() if file else None for file in (tls.ca, tls.key, tls.certificate))
    )
    options = list(CHANNEL_OPTIONS)
    if tls.peer_name:
        options.append(("grpc.ssl_target_name_override", tls.peer_name))
    return grpc.aio.secure_channel(address, credentials, options=options)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a call that shows a token; of one that shows none if it is empty.

    Raises:
        ValueError: metadata cannot carry it.
    """
    if not token:
        return ()
    if not all(" " < char <= "~" for char in token):
        raise ValueError("a token must be printable ASCII without spaces")
    return (("authorization", f"Bearer {token}"),)


def add_health(where: grpc.aio.Server) -> health.aio.HealthServicer:
    """Adds ``grpc.health.v1``; the caller sets the status of "" and of its services."""
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, where)
    return servicer


async def serve_health(address: str, servicer: health.aio.HealthServicer) -> tuple[Any, int]:
    """Serves another server's health and nothing else, in plain text: (the server, its port).

    Raises:
        RuntimeError: the address cannot be bound.
    """
    probed = server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, probed)
    port = listen(probed, address, None)
    await probed.start()
    return probed, port


def add_reflection(where: grpc.aio.Server, services: Sequence[str]) -> None:
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], where)


@dataclass(eq=False)
class RpcError(Exception):
    """An error a caller is to see: a status code, a sentence and google.rpc details."""

    code: grpc.StatusCode
    sentence: str
    details: tuple[message.Message, ...] = ()

    def status(self) -> status_pb2.Status:
        packed = []
        for detail in self.details:
            wrapped = any_pb2.Any()
            wrapped.Pack(detail)
            packed.append(wrapped)
        number = code_pb2.Code.Value(self.code.name)
        return status_pb2.Status(code=number, message=self.sentence, details=packed)


def bad_field(field: str, sentence: str) -> RpcError:
    """INVALID_ARGUMENT with a BadRequest that names the field."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=sentence)
    detail = error_details_pb2.BadRequest(field_violations=[violation])
    return RpcError(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {sentence}", (detail,))


def failed(
    code: grpc.StatusCode, reason: str, sentence: str, metadata: Mapping[str, str] | None = None
) -> RpcError:
    """Any code with an ErrorInfo whose `reason` and `metadata` programs can tell apart."""
    detail = error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata=metadata)
    return RpcError(code, sentence, (detail,))


def overloaded(sentence: str, retry_seconds: float, reason: str = "") -> RpcError:
    """RESOURCE_EXHAUSTED with a RetryInfo, after an ErrorInfo if there is a `reason`."""
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(retry_seconds * 1e9))
    details: list[message.Message] = [error_details_pb2.RetryInfo(retry_delay=delay)]
    if reason:
        details.insert(0, error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))
    return RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence, tuple(details))


def reasons(details: Sequence[message.Message]) -> list[str]:
    """What programs tell errors apart by: reasons, and names of fields."""
    found: list[str] = []
    for detail in details:
        if isinstance(detail, error_details_pb2.ErrorInfo):
            found.append(detail.reason)
        elif isinstance(detail, error_details_pb2.BadRequest):
            found += [violation.field for violation in detail.field_violations]
    return found


@dataclass(eq=False)
class PassedOn(RpcError):
    """An error of another service, which a caller is to see as it is."""

    whole: status_pb2.Status | None = None

    def status(self) -> status_pb2.Status:
        return self.whole or super().status()


def passed_on(error: grpc.aio.AioRpcError) -> PassedOn:
    """The error that another call ended with, with all of its details, known or not."""
    whole = rpc_status.from_call(error)  # type: ignore[arg-type]
    sentence = error.details() or error.code().name
    return PassedOn(error.code(), sentence, tuple(error_details(error)), whole)


async def abort(context: Context, error: RpcError) -> NoReturn:
    """Ends a call with an error and its details."""
    status = rpc_status.to_status(error.status())
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(error.code, error.sentence, status.trailing_metadata)
    raise AssertionError("abort always raises")


def error_details(error: grpc.aio.AioRpcError) -> list[message.Message]:
    """Returns the google.rpc details of an error that a call ended with."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    if status is None:
        return []
    known = (
        error_details_pb2.BadRequest,
        error_details_pb2.ErrorInfo,
        error_details_pb2.RetryInfo,
    )
    found: list[message.Message] = []
    for packed in status.details:
        for kind in known:
            if packed.Is(kind.DESCRIPTOR):
                detail = kind()
                packed.Unpack(detail)
                found.append(detail)
    return found
