"""The planes as real processes, for tests that kill them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_serving(port: int, check: Callable[[], None], seconds: float = 150) -> None:
    """Asks the health service of a process; `check` raises if that can never serve."""
    deadline = time.monotonic() + seconds
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            check()
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.02)
    raise AssertionError(f"nothing serves at port {port} after {seconds} s")


class Process:
    """A process of a plane with its log; killed at the end whatever happens."""

    def __init__(self, module: str, port: int, log: Path, *flags: str, **variables: str) -> None:
        self.port, self._log = port, log
        command = [sys.executable, "-m", module, "--listen", f"127.0.0.1:{port}", *flags]
        environment = {key: value for key, value in os.environ.items() if "QUIRE" not in key}
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command, stdout=sink, stderr=sink, cwd=ROOT, env=environment | variables
            )

    def ready(self, seconds: float = 150) -> None:
        """Waits until the health service says SERVING."""
        wait_until_serving(self.port, self._check, seconds)

    def _check(self) -> None:
        assert self._process.poll() is None, self._log.read_text()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, seconds: float = 60) -> int:
        return self._process.wait(seconds)

    def log(self) -> str:
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()


def data_plane(log: Path, *flags: str, port: int = 0, **variables: str) -> Process:
    checks = ("--check-invariants", "--threads", "1", "--dtype", "float32")
    return Process("data_plane", port or free_port(), log, *checks, *flags, **variables)


def control_plane(log: Path, engines: list[int], *flags: str, port: int = 0) -> Process:
    addresses = ",".join(f"127.0.0.1:{engine}" for engine in engines)
    common = ("--engines", addresses, "--admin-listen", f"127.0.0.1:{free_port()}")
    checks = ("--check-invariants", "--redis-url", "redis://127.0.0.1:1")
    checks += ("--anonymous-roles", "generate,read,write")
    return Process("control_plane", port or free_port(), log, *common, *checks, *flags)
