"""A chart's pods as processes of this machine: what a kubelet and a cluster's network do, in small.

Init containers are run one after the other before a pod's own. Commands, environment, probes and
hooks are run as the manifests have them. What cannot be had without containers is replaced as text,
in commands, environment and mounted files alike (`Cluster.local`):

- a pod's mount paths by directories below a temporary one;
- 0.0.0.0 by the pod's own loopback address, so that every pod can have the same ports;
- DNS names, where a port follows, by such addresses; LWS_LEADER_ADDRESS is one from the start.

Certificates are issued as cert-manager would, and are good for the addresses of the names that they
are good for. Images are this environment's python and redis-server.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from protos.probe import is_serving
from protos.wire import Tls
from tests.certificates import Authority
from tests.chart import NAMESPACE, ROOT, Manifest, Rendered, claim_templates
from tests.redis_server import redis_executable

# Until no new connection leads to a pod that ends: a cluster takes its time.
WITHDRAWAL_SECONDS = 0.5
DOMAIN = f"{NAMESPACE}.svc.cluster.local"
_IMAGE_PATH = [str(Path(sys.executable).parent), str(Path(redis_executable()).parent)]


def _pattern(dns: str) -> str:
    """A star in a certificate stands for one label."""
    return re.escape(dns).replace(r"\*", "[^.]+")


@dataclass
class Pod:
    """One container after those that prepare it, and what its kubelet knows of it.

    Attributes:
        claims: templates of the claims that are its own.
        place: what LeaderWorkerSet tells all its containers.
    """

    name: str
    address: str
    manifest: Manifest
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    terminating: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    claims: list[Manifest] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.manifest["spec"]["containers"]
        return dict(container)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def withdraw(self) -> None:
        """No endpoint leads to it any more."""
        self.ready = False

    def matches(self, selector: dict[str, str]) -> bool:
        return selector.items() <= self.manifest["metadata"]["labels"].items()


class Cluster:
    """Runs pods until it is left.

    Args:
        rendered: the manifests; each Service of one port gets an address of its own.
        folder: for mounts and logs.
    """

    def __init__(self, rendered: Rendered, folder: Path) -> None:
        self._rendered, self._folder = rendered, folder
        # Other tests on this machine have other addresses.
        self._network = f"127.{random.randrange(2, 250)}.{random.randrange(1, 250)}"
        self._last_address = 0
        self._names: dict[str, str] = {}
        self._proxies: list[Proxy] = []
        self._authority = Authority(folder)
        self._kubelets: list[threading.Thread] = []
        self._stopping = threading.Event()
        self.pods: list[Pod] = []

    def __enter__(self) -> Cluster:
        for service in self._rendered.all("Service"):
            if service["spec"].get("clusterIP") != "None":
                self._serve(service)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for pod in self.pods:
            if pod.process is not None and pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()
        for kubelet in self._kubelets:
            kubelet.join()
        for proxy in self._proxies:
            proxy.close()

    def address(self, name: str) -> str:
        """A service's or a pod's, by its DNS name without the cluster's domain."""
        return self._names[f"{name}.{DOMAIN}"]

    def create(self, kind: str, workload: str) -> Pod:
        """Makes another pod of a workload, and starts it."""
        manifest = self._rendered.get(kind, workload)
        pods = [pod for pod in self.pods if pod.name.startswith(f"{workload}-")]
        name, address = f"{workload}-{len(pods)}", self._new_address()
        template = manifest if kind == "Pod" else manifest["spec"]["template"]
        if kind == "StatefulSet":
            self._names[f"{name}.{manifest['spec']['serviceName']}.{DOMAIN}"] = address
        claims = claim_templates(manifest)
        return self._start(Pod(name, address, template, self._folder / name, claims=claims))

    def create_group(self, workload: str) -> list[Pod]:
        """What LeaderWorkerSet makes of a set: pods of one group, each of which knows its place."""
        manifest = self._rendered.get("LeaderWorkerSet", workload)
        parts, pods = manifest["spec"]["leaderWorkerTemplate"], list[Pod]()
        leader = self._new_address()
        for index in range(parts["size"]):
            name = f"{workload}-0-{index}" if index else f"{workload}-0"
            template = parts["workerTemplate" if index else "leaderTemplate"]
            address = self._new_address() if index else leader
            self._names[f"{name}.{workload}.{DOMAIN}"] = address
            pod = Pod(name, address, template, self._folder / name)
            pod.claims = claim_templates(manifest)
            pod.place = {
                "LWS_LEADER_ADDRESS": leader,
                "LWS_GROUP_SIZE": str(parts["size"]),
                "LWS_WORKER_INDEX": str(index),
            }
            pods.append(self._start(pod))
        return pods

    def local(self, text: str, pod: Pod, container: Manifest | None = None) -> str:
        """What a text of a manifest means on this machine, in one of a pod's containers."""
        mounts = {
            mount["mountPath"]: str(pod.folder / mount["name"])
            for mount in (container or pod.container)["volumeMounts"]
        }
        meanings = self._names | mounts | {"0.0.0.0": pod.address}
        paths = "|".join(map(re.escape, sorted([*mounts, "0.0.0.0"], key=len, reverse=True)))
        names = "|".join(map(re.escape, self._names))
        pattern = rf"(?<![\w.-])(?:({paths})(?![\w-])|({names})(?=:\d))"
        return re.sub(pattern, lambda found: meanings[found[0]], text)

    # What a kubelet does.

    def _start(self, pod: Pod) -> Pod:
        self._mount(pod)
        pod.environment = self._environment(pod, pod.container)
        with (pod.folder / "log").open("wb") as log:
            for container in pod.manifest["spec"].get("initContainers", ()):
                process = self._run(pod, container, self._environment(pod, container), log)
                assert process.wait(60) == 0, pod.log()
            pod.process = self._run(pod, pod.container, pod.environment, log)
        self.pods.append(pod)
        if "readinessProbe" in pod.container:
            self._kubelets.append(threading.Thread(target=self._watch, args=(pod,)))
            self._kubelets[-1].start()
        return pod

    def _environment(self, pod: Pod, container: Manifest) -> dict[str, str]:
        found = pod.place | {"PATH": ":".join([*_IMAGE_PATH, os.defpath])}
        for variable in container.get("env", ()):
            value = self.local(self._value(variable, pod), pod, container)
            expanded = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], value)
            found[variable["name"]] = expanded
        return found

    def _run(
        self, pod: Pod, container: Manifest, environment: dict[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        command = [self.local(word, pod, container) for word in container["command"]]
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )

    def _mount(self, pod: Pod) -> None:
        pod.folder.mkdir(parents=True)
        for template in pod.claims:
            # Under the pod's name, so that its successor has the same.
            claim = self._folder / "claims" / f"{template['metadata']['name']}-{pod.name}"
            claim.mkdir(parents=True, exist_ok=True)
            (pod.folder / template["metadata"]["name"]).symlink_to(claim)
        for volume in pod.manifest["spec"]["volumes"]:
            directory = pod.folder / volume["name"]
            directory.mkdir()
            for source in volume.get("projected", {}).get("sources", [volume]):
                for name, text in self._files(source).items():
                    (directory / name).write_text(self.local(text, pod))

    def _files(self, source: dict[str, Any]) -> dict[str, str]:
        if "configMap" in source:
            return dict(self._rendered.get("ConfigMap", source["configMap"]["name"])["data"])
        if "secret" in source:
            secret = source["secret"]
            data = self._secret(secret.get("secretName") or secret["name"])
            return {item["path"]: data[item["key"]] for item in secret["items"]}
        assert "emptyDir" in source
        return {}

    def credentials(self, secret: str) -> Tls | None:
        """What cert-manager would put into a secret; None if there is no certificate for it."""
        for certificate in self._rendered.all("Certificate"):
            if certificate["spec"]["secretName"] == secret:
                names = certificate["spec"]["dnsNames"]
                addresses = [
                    address
                    for host, address in self._names.items()
                    if any(re.fullmatch(_pattern(name), host) for name in names)
                ]
                return self._authority.issue(secret, *names, addresses=addresses)
        return None

    def _secret(self, name: str) -> dict[str, str]:
        files = self.credentials(name)
        if files is None:
            return dict(self._rendered.get("Secret", name)["stringData"])
        assert files.certificate and files.key and files.ca
        return {
            "tls.crt": files.certificate.read_text(),
            "tls.key": files.key.read_text(),
            "ca.crt": files.ca.read_text(),
        }

    def _value(self, variable: dict[str, Any], pod: Pod) -> str:
        if "value" in variable:
            return str(variable["value"])
        (kind, reference), *_ = variable["valueFrom"].items()
        if kind == "secretKeyRef":
            return self._secret(reference["name"])[reference["key"]]
        assert kind == "fieldRef"
        return {"metadata.name": pod.name, "status.podIP": pod.address}[reference["fieldPath"]]

    def probe(self, pod: Pod, which: str) -> bool:
        """Runs a probe once, as it is written."""
        probe = pod.container[which]
        seconds = probe["timeoutSeconds"]
        if "grpc" in probe:
            address = f"{pod.address}:{probe['grpc']['port']}"
            return is_serving(address, probe["grpc"].get("service", ""), seconds)
        command = [self.local(word, pod) for word in probe["exec"]["command"]]
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, env=pod.environment, timeout=seconds)
            return done.returncode == 0
        return False

    def _watch(self, pod: Pod) -> None:
        """Startup probe until it succeeds, then the readiness probe while the pod is there."""
        failures = 0
        which = "startupProbe" if "startupProbe" in pod.container else "readinessProbe"
        while not (self._stopping.is_set() or pod.terminating or self._ended(pod)):
            succeeded = self.probe(pod, which)
            failures = 0 if succeeded else failures + 1
            if failures >= pod.container[which]["failureThreshold"]:
                pod.ready = False
                if which == "startupProbe":
                    return
            elif succeeded and which == "readinessProbe":
                pod.ready = True
            if succeeded and which == "startupProbe":
                which = "readinessProbe"
                continue
            self._stopping.wait(pod.container[which]["periodSeconds"])
        if not pod.terminating:
            pod.ready = False

    def _ended(self, pod: Pod) -> bool:
        assert pod.process is not None
        return pod.process.poll() is not None

    def wait_ready(self, pod: Pod, seconds: float = 60) -> None:
        self.wait(pod, lambda: pod.ready, seconds)

    def wait(self, pod: Pod, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self._ended(pod), f"{pod.name} ended: {pod.log()}"
            assert time.monotonic() < deadline, f"{pod.name}: {pod.log()}"
            time.sleep(0.02)

    def complete(self, pod: Pod, seconds: float = 60) -> int:
        """Waits for a pod that ends by itself; returns its status."""
        assert pod.process is not None
        return pod.process.wait(seconds)

    def delete(self, pod: Pod) -> int:
        """Runs its hook, tells it to end, and takes it out of its services; returns its status.

        Raises:
            TimeoutExpired: it outlives its grace period.
        """
        assert pod.process is not None
        pod.terminating = True
        withdrawn = threading.Timer(WITHDRAWAL_SECONDS, pod.withdraw)
        withdrawn.start()
        deadline = time.monotonic() + pod.manifest["spec"]["terminationGracePeriodSeconds"]
        hook = pod.container.get("lifecycle", {}).get("preStop", {})
        time.sleep(hook.get("sleep", {}).get("seconds", 0))
        pod.process.send_signal(signal.SIGTERM)
        try:
            return pod.process.wait(deadline - time.monotonic())
        finally:
            withdrawn.join()

    def replace(self, pod: Pod) -> Pod:
        """Deletes a StatefulSet's pod, and starts its successor under the same name."""
        assert self.delete(pod) == 0, pod.log()
        self.pods.remove(pod)
        folder = self._folder / f"{pod.folder.name}-again"
        return self._start(Pod(pod.name, pod.address, pod.manifest, folder, claims=pod.claims))

    # What the cluster's network does.

    def _new_address(self) -> str:
        self._last_address += 1
        return f"{self._network}.{self._last_address}"

    def _serve(self, service: Manifest) -> None:
        (port,) = service["spec"]["ports"]
        address, selector = self._new_address(), service["spec"]["selector"]
        self._names[f"{service['metadata']['name']}.{DOMAIN}"] = address

        def endpoints() -> Iterator[str]:
            return (pod.address for pod in self.pods if pod.ready and pod.matches(selector))

        self._proxies.append(Proxy(address, port["port"], endpoints))


class Proxy:
    """A Service: hands each new connection to one of the endpoints that are ready then."""

    def __init__(self, address: str, port: int, endpoints: Callable[[], Iterator[str]]) -> None:
        self._address, self._port, self._endpoints = address, port, endpoints
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        started = threading.Event()
        self._loop.call_soon(lambda: self._loop.create_task(self._listen(started)))
        self._thread.start()
        assert started.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _listen(self, started: threading.Event) -> None:
        self._server = await asyncio.start_server(self._connect, self._address, self._port)
        started.set()

    async def _connect(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        ready = list(self._endpoints())
        try:
            if ready:
                far, there = await asyncio.open_connection(random.choice(ready), self._port)
                await asyncio.gather(_copy(near, there), _copy(far, back))
        except OSError:
            pass
        finally:
            back.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    finally:
        sink.close()


@contextmanager
def running(rendered: Rendered, folder: Path) -> Iterator[Cluster]:
    """Everything but `helm test`, ready."""
    with Cluster(rendered, folder) as cluster:
        redis = cluster.create("Deployment", "quire-redis")
        if rendered.all("LeaderWorkerSet"):
            cluster.create_group("quire-engine")
        else:
            cluster.create("StatefulSet", "quire-data-plane")
        cluster.wait_ready(redis)
        control = cluster.create("Deployment", "quire-control-plane")
        cluster.wait_ready(control)
        yield cluster
