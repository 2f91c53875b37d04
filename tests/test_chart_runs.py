"""The chart's commands, probes and hooks really run, and updates of both planes fail nothing."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.request import urlopen

import grpc
import pytest
import redis

from control_plane.client import Client
from protos import wire
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from tests.chart import ROOT, Rendered, render, values_file
from tests.pods import Cluster, running

TOKENS, TOKENS_HELD = 24, 1500
CLIENTS = 4


# The laptop's values as they are, and with certificates by which everybody is known.
WAYS = {
    "plain": {},
    "tls": {
        "tls": {"enabled": True, "certManager": {"enabled": True}},
        "access": {"existingSecret": "callers", "anonymousRoles": []},
    },
}


@pytest.fixture(scope="module", params=WAYS)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    made = render(values_file("values-laptop.yaml"), WAYS[request.param])
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (callers,) = re.findall(r"^```yaml\n(callers:.*?)^```", page, re.M | re.S)
    made.add("Secret", "callers", {"access.yaml": callers})
    # For the test to look at what Redis refused.
    made.get("Secret", "quire-redis")["stringData"]["users.acl"] += (
        "user auditor on nopass allkeys allchannels +@all\n"
    )
    return made


@pytest.fixture(scope="module")
def cluster(rendered: Rendered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(rendered, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


class Load:
    """Clients that ask one thing after another until they are told to stop.

    Attributes:
        done, plainly_done: requests that were answered whole, these without the client library.
        failures: what else happened to requests.
        held: there is a long answer under way.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._address = f"{cluster.address('quire-control-plane')}:7401"
        self._tls = cluster.credentials("quire-client-tls")
        self._stop = threading.Event()
        self.done = self.plainly_done = 0
        self.failures: list[str] = []
        self.held = threading.Event()

    def hold(self) -> int:
        """Asks for one long answer; returns how many tokens it had."""

        async def ask() -> int:
            count = 0
            async with Client(self._address, tls=self._tls) as client:
                options = {"max_tokens": TOKENS_HELD, "ignore_eos": True}
                async for event in client.generate("Once", **options):
                    count += len(event.delta.token_ids)
                    self.held.set()
            return count

        return asyncio.run(ask())

    async def _ask(self, client: Client, number: int) -> None:
        asked = 0
        while not self._stop.is_set():
            asked += 1
            prompt = f"Client {number} asks for the {asked}th time what a block table is."
            options = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0}
            try:
                events = [event async for event in client.generate(prompt, **options)]
                count = sum(len(event.delta.token_ids) for event in events)
                if count != TOKENS:
                    self.failures.append(f"{count} tokens")
                self.done += 1
            except Exception as error:
                self.failures.append(repr(error))

    async def _ask_plainly(self) -> None:
        """As a client that knows nothing of retries, on one channel."""
        async with wire.channel(self._address, self._tls) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            while not self._stop.is_set():
                message = pb.GenerateRequest(text="A block table is")
                message.stopping.max_tokens = 2
                try:
                    async for _ in stub.Generate(message):
                        pass
                    self.plainly_done += 1
                except grpc.aio.AioRpcError as error:
                    self.failures.append(repr(error))

    async def _run(self) -> None:
        async def client(number: int) -> None:
            async with Client(self._address, tls=self._tls) as caller:
                await self._ask(caller, number)

        await asyncio.gather(*map(client, range(CLIENTS)), self._ask_plainly())

    @contextmanager
    def running(self) -> Iterator[Load]:
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(asyncio.run, self._run())
            try:
                yield self
            finally:
                self._stop.set()
            ended.result(60)


def metric(cluster: Cluster, pod: str, port: int, name: str) -> float:
    (address,) = (each.address for each in cluster.pods if each.name == pod)
    with urlopen(f"http://{address}:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


def test_helm_test_finds_its_prompt_cached(cluster: Cluster) -> None:
    pod = cluster.create("Pod", "quire-test")
    assert cluster.complete(pod) == 0, pod.log()
    assert re.match(r"ok: [1-9]\d* of \d+ prompt tokens came from the prefix cache", pod.log())
    assert metric(cluster, "quire-control-plane-0", 9090, "quire_prefix_hit_tokens_total") > 0
    assert metric(cluster, "quire-data-plane-0", 9091, "quire_engine_led") == 1


def test_every_probe_succeeds(cluster: Cluster) -> None:
    (control,) = (pod for pod in cluster.pods if pod.name == "quire-control-plane-0")
    for service, status in (("quire.admin.v1.AdminService", 0), ("quire.nothing", 1)):
        # As the images probe themselves.
        command = [sys.executable, "-m", "protos.probe", f"{control.address}:7403", service]
        assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == status
    for pod in cluster.pods:
        for which in pod.container:
            if which.endswith("Probe"):
                assert cluster.probe(pod, which), (pod.name, which)


def test_an_update_of_the_control_plane_fails_no_request(cluster: Cluster) -> None:
    (old,) = (pod for pod in cluster.pods if pod.name == "quire-control-plane-0")
    with Load(cluster).running() as load, ThreadPoolExecutor(1) as pool:
        cluster.wait(old, lambda: load.done >= CLIENTS)
        new = cluster.create("Deployment", "quire-control-plane")
        # What began there keeps the old one draining, for as long as it may.
        held = pool.submit(load.hold)
        cluster.wait(old, lambda: load.held.is_set())
        cluster.wait_ready(new)
        assert cluster.delete(old) == 0, old.log()
        assert held.result(60) == TOKENS_HELD
        before, plainly = load.done, load.plainly_done
        cluster.wait(new, lambda: load.done >= before + 2 * CLIENTS)
        cluster.wait(new, lambda: load.plainly_done > plainly)
        assert new.ready
    assert not load.failures


@pytest.mark.parametrize("rendered", ["plain"], indirect=True)
def test_an_update_of_the_only_engine_fails_no_request(cluster: Cluster) -> None:
    """What runs ends, what comes waits for the successor."""
    (old,) = (pod for pod in cluster.pods if pod.name == "quire-data-plane-0")
    (control,) = (pod for pod in cluster.pods if pod.ready and "control-plane" in pod.name)
    with Load(cluster).running() as load:
        cluster.wait(control, lambda: load.done >= CLIENTS)
        new = cluster.replace(old)
        before = load.done
        cluster.wait(new, lambda: load.done >= before + 2 * CLIENTS)
    assert not load.failures


def test_redis_lets_the_control_plane_do_what_it_does_and_nothing_else(
    cluster: Cluster, rendered: Rendered
) -> None:
    assert metric(cluster, "quire-control-plane-1", 9090, "quire_index_up") == 1
    (pod,) = (each for each in cluster.pods if each.name == "quire-redis-0")
    with redis.Redis(pod.address, username="auditor", password="any") as auditor:
        assert auditor.acl_log() == []
        keys = auditor.keys()
        assert keys and all(key.startswith(b"serving.quire:1:") for key in keys)
        assert auditor.config_get("save") == {"save": ""}
    secret = rendered.get("Secret", "quire-redis")["stringData"]
    with redis.Redis(pod.address, username=secret["username"], password=secret["password"]) as user:
        for command in (
            ("GET", "another:key"),
            ("SADD", "serving.quire2:1:x", "y"),
            ("FLUSHALL",),
            ("KEYS", "*"),
            ("CONFIG", "GET", "*"),
            ("CLIENT", "LIST"),
            ("ACL", "LIST"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.execute_command(*command)
    with redis.Redis(pod.address) as anonymous:
        assert anonymous.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            anonymous.execute_command("GET", keys[0])


def test_everything_ends_within_its_grace_period(cluster: Cluster) -> None:
    for name in ("quire-control-plane-1", "quire-data-plane-0", "quire-redis-0"):
        (pod,) = (each for each in cluster.pods if each.name == name)
        assert cluster.delete(pod) == 0, pod.log()
