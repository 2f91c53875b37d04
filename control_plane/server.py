"""Puts one replica together and runs it."""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import suppress
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health, health_pb2
from prometheus_client import start_http_server

from control_plane import admin, frontend
from control_plane.access import Access, anonymous_roles
from control_plane.admin_peers import AdminPeers
from control_plane.authorisation import Authorisation, tenant_of
from control_plane.engine_link import EngineLink, ReplicaAddress
from control_plane.generation import Generations
from control_plane.leader import EngineLeader
from control_plane.metrics.activity import Activity
from control_plane.metrics.families import Metrics
from control_plane.metrics.vllm import VllmMetrics
from control_plane.peer import LEADS
from control_plane.prefix_index import PrefixIndex
from control_plane.prefixes.file import read_prefixes
from control_plane.prefixes.keeper import PrefixKeeper
from control_plane.prefixes.registered import RegisteredPrefixes
from control_plane.prefixes.store import RegisteredStore
from control_plane.relay import Relay
from control_plane.router import Router
from control_plane.settings import Settings
from control_plane.step_loop import LeaderSettings
from control_plane.traces import open_traces
from protos import wire
from protos.admin.v1 import admin_pb2_grpc

log = logging.getLogger(__name__)

# For streams to hand over what they have when their generation is done.
_LAST_MESSAGES_SECONDS = 1.0
# Hosts to listen on that are none to call.
_EVERY_ADDRESS = ("0.0.0.0", "[::]", "")  # noqa: S104
_LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


class Replica:
    """One control-plane process: servers, router, and a leader for each engine."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.index = PrefixIndex(
            settings.redis_url,
            username=settings.redis_username,
            password=settings.redis_password,
            ca=settings.redis_ca,
            namespace=settings.index_namespace,
            lookup_timeout_seconds=settings.index_timeout_ms / 1000,
        )
        self.metrics = Metrics()
        self.generations = Generations(counters=self.metrics.counters)
        self.router = Router(self.generations, self.index)
        self.router.leaders += [self._leader(address) for address in _addresses(settings.engines)]
        self.registered = RegisteredPrefixes(read_prefixes(settings.prefixes))
        self.store = RegisteredStore(self.index.redis, settings.index_namespace, self.registered)
        self.router.lookups.listeners.append(self.store.note)
        self.keeper = PrefixKeeper(self.registered, self.router.leaders, self.generations)
        self.relay = Relay(self.router, settings.peer_tls, settings.max_waiting_requests)
        self.admin_peers = AdminPeers(self.router, settings.peer_tls)
        self.traces = open_traces(
            settings.traces_endpoint, settings.traces_share, settings.own_address
        )
        self.frontend = frontend.Frontend(
            self.router,
            self.generations,
            self.metrics,
            self.relay,
            settings.max_waiting_seconds,
            settings.orphan_grace_seconds,
            tenant_of,
            self.registered.match,
            self.traces,
            settings.max_calls,
        )
        self.access = Access(settings.access, anonymous_roles(settings.anonymous_roles))
        guard = Authorisation(self.access, reflection=settings.reflection).guard()
        self._leading: list[asyncio.Task[None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._metrics_server: WSGIServer | None = None
        age = settings.connection_age_seconds
        self._servers = [wire.server(guard, connection_age_seconds=age) for _ in range(2)]
        self._probed: grpc.aio.Server | None = None
        self.ports: list[int] = []
        self.health_port = 0

    def _leader(self, address: str) -> EngineLeader:
        settings = self.settings
        return EngineLeader(
            EngineLink(address, self.settings.tls),
            self.generations,
            self.index,
            LeaderSettings(
                own_address=_own_address(settings),
                chunk_tokens=settings.chunk_tokens,
                waiting_requests=settings.max_waiting_requests,
                waiting_tokens=settings.max_waiting_tokens,
                preemption=settings.preemption,
                tenant_cache_share=settings.tenant_cache_share,
                steps_in_flight=settings.steps_in_flight,
                orphan_grace_seconds=settings.orphan_grace_seconds,
                check_invariants=settings.check_invariants,
            ),
            self.router,
        )

    async def start(self) -> None:
        """Starts serving; engines are attached as they answer."""
        inference, operators = self._servers
        frontend.add_to_server(self.frontend, inference)
        operated = admin.Operated(
            self.router, self.index, self.registered, self.store, self.keeper, self.admin_peers
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin.Admin(operated), operators)
        healths = [wire.add_health(inference), wire.add_health(operators)]
        if self.settings.reflection:
            wire.add_reflection(inference, [frontend.SERVICE])
            wire.add_reflection(operators, [admin.SERVICE])
        addresses = (self.settings.listen, self.settings.admin_listen)
        for server, address in zip(self._servers, addresses, strict=True):
            self.ports.append(wire.listen(server, address, self.settings.listen_tls))
            await server.start()
        if self.settings.health_listen:
            self._probed, self.health_port = await wire.serve_health(
                self.settings.health_listen, healths[0]
            )
        self._serve_metrics()
        await self.index.start()
        self._leading = [asyncio.create_task(leader.run()) for leader in self.router.leaders]
        activity = Activity(self.metrics.counters, self.router)
        runs = [self.relay.run(), self._report_health(healths), self.access.follow()]
        runs += [activity.report(), self.store.run(), self.keeper.run()]
        self._tasks = [asyncio.create_task(each) for each in runs]
        for task in [*self._leading, *self._tasks]:
            task.add_done_callback(_log_failure)
        self._warn()
        log.info("inference API on port %d, admin API on port %d", *self.ports)

    def _serve_metrics(self) -> None:
        self.metrics.observe(self.router, self.index, lambda: self.frontend.draining)
        if self.settings.vllm_metrics:
            self.metrics.registry.register(VllmMetrics(self.metrics.counters, self.router))
        if self.settings.metrics_port:
            host = self.settings.listen.rpartition(":")[0].strip("[]")
            server, _ = start_http_server(self.settings.metrics_port, host, self.metrics.registry)
            self._metrics_server = server

    def _warn(self) -> None:
        """Says what can hardly be meant."""
        tls = self.settings.listen_tls
        if self.access.knows_tokens and tls is None:
            log.warning("tokens come in plain text, since there is no tls-certificate")
        if self.access.knows_certificates and (tls is None or tls.ca is None):
            log.warning("nobody is known by a certificate, since none is asked for")
        told = _own_address(self.settings)
        if told.inference.rpartition(":")[0] in _EVERY_ADDRESS:
            log.warning(
                "other replicas cannot reach this one at %s, which is every address of its own: "
                "advertise is to be one that they know it by",
                told.inference,
            )
        elif not told.admin:
            log.warning(
                "other replicas cannot show what this one's engines hold, since its admin API "
                "listens at %s only",
                self.settings.admin_listen,
            )

    async def _report_health(self, healths: list[health.aio.HealthServicer]) -> None:
        """SERVING while calls are answered, here or at a leader, so that traffic goes there."""
        answers = health_pb2.HealthCheckResponse
        while True:
            leads = any(leader.loop is not None for leader in self.router.leaders)
            ready = (leads or self.relay.reaches_a_leader) and not self.frontend.draining
            status = answers.SERVING if ready else answers.NOT_SERVING
            await healths[0].set("", status)
            await healths[0].set(frontend.SERVICE, status)
            # Relayed calls are taken for as long as an engine is led.
            await healths[0].set(LEADS, answers.SERVING if leads else answers.NOT_SERVING)
            # By its name also where the inference API's health is asked for: the process runs.
            for servicer, service in ((healths[0], admin.SERVICE), (healths[1], "")):
                await servicer.set(service, answers.SERVING)
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """Refuses new calls, lets running ones end for the drain time, then lets go of engines.

        Calls that other replicas pass on are taken until then: these cannot lead meanwhile. They
        are not waited for, since they go on elsewhere.
        """
        self.frontend.draining = True
        for leader in self.router.leaders:
            leader.reluctant = True
        # The port stays open meanwhile, so that probes and callers hear that this replica drains.
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_seconds):
                while self.relay.running or self._would_begin_anew():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        await self._let_go()
        await self._servers[0].stop(_LAST_MESSAGES_SECONDS if self.settings.drain_seconds else 0)
        await _end(self._tasks)
        await self._servers[1].stop(0)
        await self.admin_peers.close()
        if self._probed is not None:
            await self._probed.stop(0)
        for leader in self.router.leaders:
            await leader.link.close()
        await self.index.close()
        await self.traces.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()

    def _would_begin_anew(self) -> bool:
        """Whether anything runs of which the next leader would compute every token again."""
        return any(each.request.wants_logprobs for each in self.generations.all_running())

    async def _let_go(self) -> None:
        """Leaves the engines to whoever leads them next, with all that runs there.

        Before streams are cut: one that has lost its client would end its sequences.
        """
        self.relay.stopping = True
        await _end(self._leading)
        for generation in self.generations.all_running():
            generation.detach()
            self.generations.detach(generation)


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    replica = Replica(settings)
    await replica.start()
    await stopping.wait()
    await replica.stop()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _own_address(settings: Settings) -> ReplicaAddress:
    """Where other replicas reach this one: its admin API where the inference API is, if it can be.

    Its admin address is empty if only this machine's processes reach it, and they are elsewhere.
    """
    inference = settings.own_address
    own_host = inference.rpartition(":")[0]
    host, _, port = settings.admin_listen.rpartition(":")
    if host in _EVERY_ADDRESS:
        host = own_host
    reached = host == own_host or host not in _LOOPBACK
    return ReplicaAddress(inference, f"{host}:{port}" if reached else "")


def _addresses(engines: str) -> list[str]:
    return [address.strip() for address in engines.split(",") if address.strip()]


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("a task of the replica ended", exc_info=task.exception())
