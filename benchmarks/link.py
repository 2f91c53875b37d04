"""gRPC's cost: the same engine driven over the Lead stream and by function calls, by round trip.

Each side has a process of its own, and they take turns, so that neither warms or crowds the other.
The link passes through a proxy that holds every byte back for half the added round trip, each way.
The engine's compute is the 46M-parameter shape; two steps in flight are to hide the wire.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np

from benchmarks.planes import engine_flags, free_port, process
from benchmarks.report import report
from benchmarks.workload import save_model
from control_plane.engine_link import EngineLink, ReplicaAddress
from control_plane.engine_wire import decode_result, encode_plan
from control_plane.request import Request
from control_plane.scheduler import Scheduler, SchedulerLimits

THREADS = 2
SEQUENCES = 64
OUTPUT = 96
DEPTH = 2


def scheduler(fingerprint: str, block_count: int) -> Scheduler:
    """A fresh scheduler with 64 equal requests."""
    limits = SchedulerLimits(fingerprint, 16, block_count, 64, 2048, 2048, 512)
    fresh = Scheduler(limits)
    rng = np.random.default_rng(0)
    for index in range(SEQUENCES):
        prompt = rng.integers(10, 8192, 32).astype(np.int32)
        fresh.submit(Request(f"r{index}", prompt, max_tokens=OUTPUT, record=b""))
    return fresh


def in_process(model: Path) -> float:
    """Tokens per second of an engine that is called in this process."""
    from data_plane.__main__ import build_engine
    from data_plane.plan import decode_plan
    from data_plane.settings import Settings

    settings = Settings(
        model=model, threads=THREADS, max_slots=64, max_step_tokens=2048, kv_memory_mib=1024
    )
    engine = build_engine(settings)
    best = 0.0
    for _ in range(3):
        sched = scheduler("in-process", engine.sizes.block_count)
        engine.release_all()
        engine.state.hashed[:] = False
        began = time.perf_counter()
        while (plan := sched.schedule()) is not None:
            result = engine.execute(decode_plan(encode_plan(plan, 1)))
            sched.apply(decode_result(result))
        best = max(best, SEQUENCES * OUTPUT / (time.perf_counter() - began))
    return best


async def over_grpc(port: int) -> float:
    """Tokens per second with two steps in flight over the Lead stream."""
    link = EngineLink(f"127.0.0.1:{port}")
    best = 0.0
    for _ in range(3):
        facts = await link.describe()
        leadership = await link.lead(ReplicaAddress("bench"), facts.incarnation)
        sched = scheduler(facts.fingerprint, facts.block_count)
        sched.restore([], {}, [row.slot for row in leadership.snapshot.rows])
        began = time.perf_counter()
        while True:
            while sched.steps_in_flight < DEPTH and (plan := sched.schedule()) is not None:
                await leadership.send(plan)
            if not sched.steps_in_flight:
                break
            sched.apply(await leadership.result())
        best = max(best, SEQUENCES * OUTPUT / (time.perf_counter() - began))
        leadership.close()
        await asyncio.sleep(0.2)
    await link.close()
    return best


@asynccontextmanager
async def delayed(port: int, seconds: float) -> AsyncIterator[int]:
    """A TCP proxy to `port` that delays every byte by `seconds`, each way."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(1 << 16):
            loop.call_later(seconds, writer.write, data)
        loop.call_later(seconds, writer.close)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_engine, from_engine = await asyncio.open_connection("127.0.0.1", port)
        with suppress(asyncio.CancelledError, ConnectionError):
            await asyncio.gather(pump(reader, from_engine), pump(to_engine, writer))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def through(port: int, milliseconds: float) -> float:
    if not milliseconds:
        return await over_grpc(port)
    async with delayed(port, milliseconds / 2000) as proxy:
        return await over_grpc(proxy)


def alone(model: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.link", str(model)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def main(rounds: int = 3) -> None:
    delays = (0.0, 1.0, 5.0)
    ratios: dict[float, list[float]] = {delay: [] for delay in delays}
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder))
        for _ in range(rounds):
            base = alone(model)
            port = free_port()
            with process("data_plane", port, *engine_flags(model, THREADS)):
                for delay in delays:
                    ratios[delay].append(asyncio.run(through(port, delay)) / base)
    for delay in delays:
        report(
            "grpc_over_in_process",
            depth=DEPTH,
            added_round_trip_ms=delay,
            ratio=statistics.median(ratios[delay]),
            spread=[round(min(ratios[delay]), 3), round(max(ratios[delay]), 3)],
            aim=0.95,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(in_process(Path(sys.argv[1])))
    else:
        main()
