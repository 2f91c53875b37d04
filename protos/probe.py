"""Asks a process for its health: `python -m protos.probe 127.0.0.1:7403 [SERVICE]`.

Ends with status 0 if it says SERVING. For container engines that probe by a command.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_SECONDS = 5.0


def is_serving(address: str, service: str = "", timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether what listens at host:port says, in plain text, that a service of it is up."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    _, address, *service = sys.argv
    sys.exit(0 if is_serving(address, "".join(service)) else 1)
