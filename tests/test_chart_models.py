"""A pod of the chart really fetches its model from a hub, and its engine serves it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_plane.client import Client
from tests.chart import Rendered, render, values_file
from tests.hub import COMMIT, Hub, serving
from tests.models import add_tokenizer, tiny_model
from tests.pods import running

REPOSITORY = "tests/tiny-llama"
TOKEN = "hf_right"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub:
        hub.add(REPOSITORY, add_tokenizer(tiny_model("llama", tmp_path / "model")))
        hub.tokens[REPOSITORY] = TOKEN
        yield hub


def rendered(hub: Hub) -> Rendered:
    source = {"repository": REPOSITORY, "revision": COMMIT, "endpoint": hub.url}
    model = {"hub": source | {"tokenSecret": "hub", "tokenKey": "read"}}
    made = render(values_file("values-laptop.yaml"), {"dataPlane": {"model": model}})
    made.add("Secret", "hub", {"read": TOKEN})
    return made


async def ask(address: str) -> int:
    """How many tokens the model answers with."""
    async with Client(address) as client:
        options = {"model": REPOSITORY, "max_tokens": 4, "ignore_eos": True}
        events = [event async for event in client.generate("the quick brown", **options)]
    return sum(len(event.delta.token_ids) for event in events)


def test_an_engine_serves_what_its_pod_has_fetched(hub: Hub, tmp_path: Path) -> None:
    with running(rendered(hub), tmp_path) as cluster:
        assert asyncio.run(ask(f"{cluster.address('quire-control-plane')}:7401")) == 4
        (engine,) = (pod for pod in cluster.pods if pod.name == "quire-data-plane-0")
        assert TOKEN not in engine.environment.values()
        assert engine.environment["HF_HUB_OFFLINE"] == "1"
        # The volume outlives the pod: its successor asks the hub nothing.
        asked = len(hub.asked)
        successor = cluster.replace(engine)
        cluster.wait_ready(successor)
        assert len(hub.asked) == asked and "is in" in successor.log()
        assert asyncio.run(ask(f"{cluster.address('quire-control-plane')}:7401")) == 4
