"""What `helm test` runs, against services that are not as they should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from control_plane.cli.check import CheckFailed, check
from control_plane.client import Client
from protos.inference.v1 import inference_pb2 as pb


class Service:
    """Answers with one cached count after the other, and keeps the prompts."""

    def __init__(self, *cached: int, reason: int = pb.FINISH_REASON_LENGTH) -> None:
        self._cached, self._reason = list(cached), reason
        self.prompts: list[str] = []

    async def generate(self, prompt: str, **_: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.prompts.append(prompt)
        counts = {"prompt_token_count": 40, "cached_token_count": self._cached.pop(0)}
        yield pb.GenerateResponse(accepted=pb.Accepted(engine_id="engine-1", **counts))
        yield pb.GenerateResponse(finished=pb.Finished(reason=cast("Any", self._reason)))
        yield pb.GenerateResponse(usage=pb.Usage(**counts))


def run(service: Service, block_size: int = 16) -> str:
    return asyncio.run(check(cast("Client", service), block_size=block_size))


def test_a_hit_is_enough_and_the_prompt_is_longer_than_a_block() -> None:
    service = Service(0, 32)
    assert run(service) == (
        "ok: 32 of 40 prompt tokens came from the prefix cache of engine-1, 0 the first time"
    )
    first, again = service.prompts
    assert first == again and len(first.split()) > 2 * 16
    assert run(Service(0, 0, 32)).startswith("ok")


def test_no_run_finds_what_another_has_left() -> None:
    one, other = Service(0, 32), Service(0, 32)
    run(one), run(other)
    assert one.prompts[0].split()[0] != other.prompts[0].split()[0]


def test_a_service_without_a_prefix_cache_fails() -> None:
    with pytest.raises(CheckFailed, match="none of 40 prompt tokens"):
        run(Service(0, 0, 0, 0))
    with pytest.raises(CheckFailed, match="the answer ended with error"):
        run(Service(0, reason=pb.FINISH_REASON_ERROR))
