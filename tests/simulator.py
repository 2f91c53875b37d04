"""A seeded simulation of the control plane: every seed is a history, and replays exactly.

The real leader, step loop, scheduler, prefix cache and generations run against the stub engine on
an event loop without time. A seed decides sizes, requests and what goes wrong: links that break
with results under way, engines that restart, replicas that die, clients that hang up, slots that
fault, groups that are preempted out of turn. After every step the planes are compared; every token
that a client gets is compared with the one right answer.

    python -m tests.simulator --seeds 0:10000     many, on all cores
    python -m tests.simulator --seeds 17          one, with its last plans if it fails
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from control_plane.engine_link import LinkLost
from control_plane.generation import Generation
from control_plane.leader import EngineLeader
from control_plane.plan import Plan
from control_plane.scheduler import Scheduler
from protos.engine.v1 import engine_pb2
from tests.memory_map import draw_map, draw_plan
from tests.simulated_checks import Contents, PlanesNote, WaitingCheck
from tests.simulated_clock import SimulatedLoop, simulated_time
from tests.simulated_engine import SimulatedEngine
from tests.simulated_replica import ORPHAN_GRACE_SECONDS, Client, Replica
from tests.simulated_workload import DRAINED, Job, Scenario, scenario_of
from tests.stub_engine import StubEngine

KEPT_SEEDS = Path(__file__).with_name("failing_seeds.txt")
# Plans in a row that bring no client a token; prompts are short, so many more than any should take.
FRUITLESS_PLANS = 300
LONGEST_SECONDS = 900.0
LOST_FAULT_CHANCE = 0.2
MOST_DRAINS = 6


class SimulationFailed(AssertionError):
    """A seed broke an invariant; says which, with the memory map of that step."""


@dataclass(frozen=True, slots=True)
class History:
    """What became of a seed. `digest`: of every plan that was sent, in order."""

    seed: int
    digest: str
    plans: int
    troubles: int


class World:
    """Everything that a seed sets going; also the engine's observer, which checks it."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(f"trouble {scenario.seed}")
        self._lost_faults = random.Random(f"lost faults {scenario.seed}")
        self._drains = random.Random(f"drains {scenario.seed}")
        self._drains_left = 0 if scenario.seed % DRAINED else MOST_DRAINS
        self.digest = hashlib.blake2b(digest_size=16)
        self.clients: list[Client] = []
        self.last_plans: deque[engine_pb2.StepPlan] = deque(maxlen=8)
        self.error: BaseException | None = None
        self.map = ""
        self.plans = self.troubles = self.engine_deaths = 0
        self._fruitless = 0
        self._ended = asyncio.Event()
        self._waiting = WaitingCheck()
        self._checked: Scheduler | None = None
        self._contents = Contents(scenario.jobs, scenario.limits.block_size)
        self.engine = SimulatedEngine(scenario.limits, scenario.pace, self.rng, self)
        self.replica = Replica(scenario, self.engine)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for job in self.scenario.jobs:
            loop.call_at(job.at, self._arrive, job)
        deadline = loop.call_at(LONGEST_SECONDS, self._out_of_time)
        self._drain_later()
        pump = loop.create_task(self._pump())
        await self._ended.wait()
        try:
            if self.error is None:
                await self._settle()
        except Exception as error:
            self.failed(error)
        deadline.cancel()
        pump.cancel()
        await self.replica.end()
        if self.error is not None:
            raise self.error

    def _arrive(self, job: Job) -> None:
        client = Client(job)
        self.clients.append(client)
        client.attach(self.replica)

    async def _pump(self) -> None:
        """Clients that have no generation to read come back again and again, in any order."""
        pause = 0.003
        while True:
            absent = [client for client in self.clients if not client.done]
            absent = [client for client in absent if _is_gone(client.generation)]
            self.rng.shuffle(absent)
            for client in absent:
                client.attach(self.replica)
            self._watch()
            # Nothing may come of it for long, when the engine is away.
            pause = min(pause * 1.2, 0.1) if absent else 0.003
            await asyncio.sleep(pause)

    async def _settle(self) -> None:
        """Once all is answered nothing may be held any more, on either plane."""
        for _ in range(40):
            await asyncio.sleep(ORPHAN_GRACE_SECONDS)
            loop = self.replica.leader.loop
            if self.error is not None:
                return
            if loop and not loop.scheduler.groups and not loop.scheduler.steps_in_flight:
                break
        loop = self.replica.leader.loop
        if loop is None or loop.scheduler.groups or self.replica.generations.all_running():
            raise AssertionError("all clients have their answers, and something still runs")
        scheduler = loop.scheduler
        held = scheduler.pool.used_count, scheduler.swap.pool.used_count, scheduler.running_count
        if any(held) or len(self.engine.stub.state.resident_slots()):
            raise AssertionError(f"blocks, host blocks and slots still held: {held}")

    def _out_of_time(self) -> None:
        names = [client.job.name for client in self.clients if not client.done]
        self.failed(AssertionError(f"{names} have no answer after {LONGEST_SECONDS:g} s"))

    def _watch(self) -> None:
        """Looks at what clients got, and lets those that want to hang up."""
        fresh = 0
        try:
            for client in self.clients:
                fresh += client.check(self.engine_deaths)
        except AssertionError as error:
            self.failed(error)
            return
        self._fruitless = 0 if fresh else self._fruitless
        for client in self.clients:
            after = client.job.cancel_after
            if after is not None and client.received >= after and not client.done:
                self._later(client.cancel, self.replica)
        arrived = len(self.clients) == len(self.scenario.jobs)
        if arrived and all(client.done for client in self.clients):
            self._ended.set()

    # What the engine's side reports.

    def planned(self, plan: Plan, message: engine_pb2.StepPlan) -> PlanesNote | None:
        self.digest.update(message.SerializeToString(deterministic=True))
        self.last_plans.append(message)
        self.plans += 1
        self._fruitless += 1
        scheduler = self._scheduler()
        if scheduler is not self._checked:
            self._waiting, self._checked = WaitingCheck(), scheduler
        try:
            if scheduler.draining:
                self._waiting = WaitingCheck()
            else:
                self._waiting.check(scheduler, plan)
            if self._fruitless > FRUITLESS_PLANS:
                raise AssertionError(f"{FRUITLESS_PLANS} plans in a row brought nobody a token")
        except AssertionError as error:
            self.failed(error)
        self._watch()
        self._trouble(plan)
        return PlanesNote.of(scheduler)

    def executed(self, noted: PlanesNote, stub: StubEngine, message: engine_pb2.StepPlan) -> None:
        noted.compare(stub)
        self._contents.check(stub, message)

    def idle(self) -> None:
        scheduler = self._scheduler()
        idle = not scheduler.steps_in_flight
        if idle and (scheduler.has_begun if scheduler.draining else scheduler.groups):
            names = [group.request.request_id for group in scheduler.groups]
            self.failed(AssertionError(f"deadlock: nothing is planned for {names}"))
        self._watch()

    def failed(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            scheduler = self.replica.leader.scheduler
            if scheduler is not None:
                self.map = draw_map(scheduler, self.engine.stub)
            self._ended.set()

    def arm(self, stub: StubEngine) -> None:
        self._contents.begin(self.scenario.limits.block_count)
        faults = [(job.name.encode(), job) for job in self.scenario.jobs if job.fault is not None]

        def is_faulty(slot: int, tokens: np.ndarray) -> bool:
            for name, job in faults:
                if name in stub.state.requests[slot] and job.fault is not None:
                    index = int(stub.state.sampling.sample_index[slot])
                    at = len(job.prompt) + job.fault.count
                    if index == job.fault.sample and len(tokens) == at:
                        # Whether the leader hears of it is another matter.
                        if self.rng.random() < LOST_FAULT_CHANCE:
                            loss = self._lost_faults.choice([self._do_break, self._do_replica])
                            self._later(loss)
                        return True
            return False

        if faults:
            stub.fault = is_faulty

    def _scheduler(self) -> Scheduler:
        scheduler = self.replica.leader.scheduler
        assert scheduler is not None
        return scheduler

    # What goes wrong.

    def _later(self, action: object, *arguments: object) -> None:
        """Within the next few steps, between any two callbacks of the loop."""
        seconds = self.rng.random() * 3 * self.scenario.pace.step
        asyncio.get_running_loop().call_later(seconds, action, *arguments)  # type: ignore[arg-type]

    def _trouble(self, plan: Plan) -> None:
        trouble = self.scenario.trouble
        swaps = plan.swapped_out or plan.swapped_in
        moves = swaps or plan.fork_parents or plan.beam_slots or len(plan.copied_slots)
        chance = trouble.rate * (5 if moves else 1)
        if self.troubles < trouble.most and self.rng.random() < chance:
            self.troubles += 1
            kinds = list(trouble.weights)
            [kind] = self.rng.choices(kinds, list(trouble.weights.values()))
            self._later(getattr(self, f"_do_{kind}"))

    def _do_break(self) -> None:
        self.engine.break_link()

    def _do_restart(self) -> None:
        self.engine_deaths += 1
        self.engine.restart(self.rng.choice([0, 0, 0, 0.02, 2.0]))

    def _do_replica(self) -> None:
        """The replica dies; another one, which knows nothing, leads the engine from then on."""
        former = self.replica
        former.task.cancel()
        for client in self.clients:
            client.detach()
        self.replica = Replica(self.scenario, self.engine)

    def _do_preempt(self) -> None:
        loop = self.replica.leader.loop
        if loop is not None and loop.scheduler.groups:
            loop.scheduler.preempt(self.rng.choice(loop.scheduler.groups))
            loop._wake.set()

    def _drain_later(self) -> None:
        if self._drains_left:
            self._drains_left -= 1
            seconds = self._drains.expovariate(1 / (30 * self.scenario.pace.step))
            asyncio.get_running_loop().call_later(seconds, self._drain)

    def _drain(self) -> None:
        """An operator drains the engine for a while; it may be lost meanwhile."""
        leader = self.replica.leader
        leader.drain()
        seconds = self._drains.expovariate(1 / (60 * self.scenario.pace.step))
        asyncio.get_running_loop().call_later(seconds, self._undrain, leader)

    def _undrain(self, leader: EngineLeader) -> None:
        leader.undrain()
        self._drain_later()

    def _do_cancel(self) -> None:
        running = [client for client in self.clients if not client.done]
        if running:
            self.rng.choice(running).cancel(self.replica)


def _is_gone(generation: Generation | None) -> bool:
    return generation is None or (generation.detached and not generation.finished)


class _Alarm(logging.Handler):
    """The leader contains what goes wrong and says so in the log; here that is a failure."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._world.failed(error or AssertionError(record.getMessage()))


@contextmanager
def _alarmed(world: World, loop: SimulatedLoop) -> Iterator[None]:
    log, alarm = logging.getLogger("control_plane"), _Alarm(world)
    before = log.propagate
    log.propagate = False
    log.addHandler(alarm)

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        if isinstance(error, BaseException) and not isinstance(error, LinkLost):
            world.failed(error)

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        log.removeHandler(alarm)
        log.propagate = before


def simulate(seed: int) -> History:
    """Runs a seed to its end.

    Raises:
        SimulationFailed: an invariant does not hold.
    """

    async def begin() -> World:
        return World(scenario_of(seed))

    with simulated_time() as loop:
        world = loop.run_until_complete(begin())
        with _alarmed(world, loop):
            try:
                loop.run_until_complete(world.run())
            except Exception as error:
                raise SimulationFailed(_report(world, error)) from error
    return History(seed, world.digest.hexdigest(), world.plans, world.troubles)


def _report(world: World, error: Exception) -> str:
    lines = traceback.format_exception(error)
    plans = "\n".join(f"  {draw_plan(plan)}" for plan in world.last_plans)
    return (
        f"seed {world.scenario.seed}: {error}\n"
        f"{world.map}\nlast plans, the latest at the end\n{plans}\n{''.join(lines[-6:])}"
        f"replay: python -m tests.simulator --seeds {world.scenario.seed}"
    )


def kept_seeds() -> list[int]:
    """Seeds that failed once."""
    lines = [line.split("#")[0].strip() for line in KEPT_SEEDS.read_text().splitlines()]
    return [int(line) for line in lines if line]


# The command.


def _try(seed: int) -> tuple[int, History | None, str]:
    try:
        return seed, simulate(seed), ""
    except SimulationFailed as failure:
        return seed, None, str(failure)


def run_seeds(seeds: Iterable[int], processes: int) -> int:
    """Runs all of them, says how it goes, and returns how many failed."""
    wanted = list(seeds)
    began, said, failed, plans, troubles = time.monotonic(), 0.0, 0, 0, 0
    with multiprocessing.Pool(processes) as pool:
        for count, answer in enumerate(pool.imap_unordered(_try, wanted, chunksize=4), 1):
            seed, history, report = answer
            if history is None:
                failed += 1
                print(report if failed <= 3 else f"seed {seed}: {report.splitlines()[0]}")
            else:
                plans, troubles = plans + history.plans, troubles + history.troubles
            seconds = time.monotonic() - began
            if seconds - said > 5 or count == len(wanted):
                said = seconds
                print(
                    f"{count} of {len(wanted)} seeds, {failed} failed, {plans} plans, "
                    f"{troubles} troubles, {seconds:.0f} s, {count / seconds:.1f} seeds/s",
                    flush=True,
                )
    return failed


def _seeds(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end) if end else int(first) + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=_seeds, default=range(1000), help="A:B, or one (0:1000)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="all cores")
    options = parser.parse_args()
    if len(options.seeds) > 1:
        return 1 if run_seeds(options.seeds, options.processes) else 0
    seed, history, report = _try(options.seeds[0])
    print(report or f"seed {seed}: {history}")
    return 1 if report else 0


if __name__ == "__main__":
    sys.exit(main())
