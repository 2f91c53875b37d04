"""Frames over TCP between rank 0 of an engine and each of its other ranks.

A frame is a kind, a length, and that many bytes; nothing is ever unpickled. A link ends with the
process at its other end, which is how ranks learn of each other's death.
"""

from __future__ import annotations

import enum
import hmac
import re
import socket
import struct
import time
from dataclasses import dataclass

from protos import wire

SECRET_BYTES = 32
_HEAD = struct.Struct("<BI")
_HELLO = struct.Struct(f"<{SECRET_BYTES}sII")
_RECEIVE_BYTES = 1 << 16
# A stranger that connects is heard for so long, and holds the others up no longer.
_HELLO_SECONDS = 5.0
# A machine that is lost without a word has its links ended after eight seconds, whether they are
# silent (keepalive) or something is under way (milliseconds).
_KEEPALIVE = {
    "TCP_KEEPIDLE": 2,
    "TCP_KEEPINTVL": 2,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 8000,
}


class Kind(enum.IntEnum):
    """What a frame says; PLAN to STOP come from rank 0, STOP to PROGRESS go to it."""

    HELLO = 1
    PLAN = 2
    PAUSE = 3
    RELEASE_ALL = 4
    STOP = 5
    REFUSED = 6
    FAILED = 7
    PROGRESS = 8


class LinkEnded(Exception):
    """The other end is gone, or says what no rank says."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who is at the other end of a link."""

    rank: int
    process_id: int
    host: str


class Link:
    """One connection. One thread may send while another receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._unread = bytearray()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @classmethod
    def connect(cls, host: str, port: int, secret: bytes, hello: Hello, seconds: float) -> Link:
        """Raises OSError: nobody is there."""
        link = cls(socket.create_connection((host, port), timeout=seconds))
        head = _HELLO.pack(secret, hello.rank, hello.process_id)
        link.send(Kind.HELLO, head + hello.host.encode())
        return link

    def hello(self, secret: bytes) -> Hello:
        """Waits for the other end's first frame.

        Raises:
            LinkEnded: it is none of ours.
        """
        frame = self.receive(_HELLO_SECONDS)
        if frame is None or frame[0] is not Kind.HELLO or len(frame[1]) < _HELLO.size:
            raise LinkEnded("no greeting")
        given, rank, process_id = _HELLO.unpack_from(frame[1])
        if not hmac.compare_digest(given, secret):
            raise LinkEnded("a wrong secret")
        return Hello(rank, process_id, frame[1][_HELLO.size :].decode(errors="replace"))

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Raises LinkEnded."""
        try:
            self._socket.sendall(_HEAD.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise LinkEnded(str(error)) from error

    def receive(self, seconds: float | None = None) -> tuple[Kind, bytes] | None:
        """Waits for a frame; returns None if none came in the given time.

        Raises:
            LinkEnded: none will come.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while (frame := self._take_frame()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                return None
            except OSError as error:
                raise LinkEnded(str(error)) from error
            if not data:
                raise LinkEnded("end of file")
            self._unread += data
        return frame

    def close(self) -> None:
        self._socket.close()

    def _take_frame(self) -> tuple[Kind, bytes] | None:
        if len(self._unread) < _HEAD.size:
            return None
        number, length = _HEAD.unpack_from(self._unread)
        if number not in set(Kind) or length > wire.MAX_MESSAGE_BYTES:
            raise LinkEnded("a frame that is none of ours")
        end = _HEAD.size + length
        if len(self._unread) < end:
            return None
        payload = bytes(self._unread[_HEAD.size : end])
        del self._unread[:end]
        return Kind(number), payload


def loopback(host: str) -> str | None:
    """The address of a host that says by itself that all ranks are on this machine, else None.

    No name is looked up: machines may have their own, by which others call them, at 127.0.1.1.
    """
    if host == "localhost":
        return "127.0.0.1"
    return host if re.fullmatch(r"127(\.\d+){3}", host) else None


def listen(host: str) -> socket.socket:
    """Opens a port for links: on the loopback interface if `host` names it, else on all."""
    if address := loopback(host):
        return socket.create_server((address, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _loopback(host: str) -> str | None:
    """The address of a name, if that is of the loopback interface."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return None
    return address if address.startswith("127.") else None
