"""The control plane and its clients in a simulation: one replica, and those who wait for it."""

from __future__ import annotations

import asyncio

from control_plane import records
from control_plane.generation import Generation, Generations, Sample
from control_plane.leader import EngineLeader
from control_plane.prefix_index import EngineLife
from control_plane.router import Router
from control_plane.scheduler import QueueFull
from control_plane.step_loop import LeaderSettings
from tests.simulated_engine import SimulatedEngine
from tests.simulated_workload import Job, Scenario

ORPHAN_GRACE_SECONDS = 0.5


class HeldHashes:
    """Stands in for the prefix index: what it is told must come to what the pool holds."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._held: set[bytes] = set()

    def track(self, fingerprint: str, life: EngineLife, resync: object) -> None:
        self._held = set()

    def forget(self, life: EngineLife) -> None:
        self._held = set()

    def publish(self, life: EngineLife, added: list[bytes], removed: list[bytes]) -> None:
        self._held = (self._held - set(removed)) | set(added)
        scheduler = self._replica.leader.scheduler
        if scheduler is not None and self._held != set(scheduler.pool.held_hashes()):
            raise AssertionError("the index was not told what the pool holds")


class Replica:
    """One control-plane process: the parts that the steps go through, put together."""

    def __init__(self, scenario: Scenario, engine: SimulatedEngine) -> None:
        limits = scenario.limits
        settings = LeaderSettings(
            own_address="replica",
            chunk_tokens=limits.chunk_tokens,
            waiting_requests=limits.waiting_requests,
            preemption=limits.preemption,
            steps_in_flight=scenario.steps_in_flight,
            retry_seconds=0.01,
            orphan_grace_seconds=ORPHAN_GRACE_SECONDS,
            check_invariants=True,
        )
        self.generations = Generations()
        index = HeldHashes(self)
        self.router = Router(self.generations, index)  # type: ignore[arg-type]
        self.leader = EngineLeader(engine, self.generations, index, settings, self.router)  # type: ignore[arg-type]
        self.router.leaders.append(self.leader)
        self.task = asyncio.get_running_loop().create_task(self.leader.run())

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Client:
    """Whoever sent a job, and knows the right answer. It comes back wherever the job goes on."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.generation: Generation | None = None
        self.done = False
        self.received = 0
        self.excused = False
        self._answers = [job.answer(index) for index in range(job.sample_count)]
        self._seen = [0] * job.sample_count
        self._event = asyncio.Event()

    def attach(self, replica: Replica) -> None:
        """Joins the job's generation at this replica, or has it made, if that is possible now."""
        generation = replica.generations.get(self.job.name) or self._submit(replica)
        if generation is not None:
            generation._subscribers.add(self._event)
            self.generation, self._seen = generation, [0] * self.job.sample_count

    def detach(self) -> None:
        self.generation = None

    def _submit(self, replica: Replica) -> Generation | None:
        loop, job = replica.leader.loop, self.job
        if loop is None or not loop.alive:
            return None
        message, facts = job.message(), loop.facts
        request = records.new_request(message, job.prompt, job.max_tokens, facts, job.tenant, b"")
        strings = tuple(message.stopping.stop_strings)
        generation = Generation(request, b"", loop.tokenizer, strings, facts.kind)
        try:
            loop.submit(generation)
        except QueueFull:
            return None
        replica.generations.add(generation)
        return generation

    def check(self, engine_deaths: int) -> int:
        """Compares what is new with the right answer; returns how many tokens that was."""
        generation, fresh = self.generation, 0
        if generation is None or self.done:
            return 0
        for index, sample in enumerate(generation.samples):
            seen = self._seen[index]
            new = sample.token_ids[seen:]
            wanted = self._answers[index][0][seen : seen + len(new)]
            if new != wanted and not self.excused:
                raise AssertionError(
                    f"{self.job.name} sample {index} got {new} from token {seen} on, not {wanted}"
                )
            self._seen[index] += len(new)
            fresh += len(new)
        self.received += fresh
        if generation.finished:
            self._check_endings(generation.samples, engine_deaths)
            self.done = True
        return fresh

    def _check_endings(self, samples: list[Sample], engine_deaths: int) -> None:
        for index, (sample, answer) in enumerate(zip(samples, self._answers, strict=True)):
            ending = sample.ending
            assert ending is not None
            died = ending.message.startswith("its engine died twice") and engine_deaths > 1
            if died or self.excused:
                continue
            if (sample.token_ids, ending.reason) != answer:
                raise AssertionError(
                    f"{self.job.name} sample {index} ended by {ending.reason} ({ending.message}) "
                    f"after {len(sample.token_ids)} tokens, not by {answer[1]} "
                    f"after {len(answer[0])}"
                )

    def knows_fault(self) -> bool:
        """Whether it has been told that the sample which faults has failed."""
        if self.generation is None or self.job.fault is None:
            return False
        return self.generation.samples[self.job.fault.sample].ending is not None

    def cancel(self, replica: Replica) -> None:
        if self.generation is not None and not self.done:
            replica.router.cancel(self.generation)
        self.done = True
