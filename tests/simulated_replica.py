"""The control plane and its clients in a simulation: one replica, and those who wait for it."""

from __future__ import annotations

import asyncio

from control_plane import records
from control_plane.beams import BeamSearch
from control_plane.engine_link import ReplicaAddress
from control_plane.generation import Generation, Generations, Sample
from control_plane.leader import EngineLeader
from control_plane.prefix_index import EngineLife
from control_plane.router import Router
from control_plane.step_loop import LeaderSettings
from control_plane.wait_queue import QueueFull
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
            own_address=ReplicaAddress("replica"),
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
    """Whoever sent a job, and knows the right answer. It comes back wherever the job goes on.

    Attributes:
        received: tokens so far, and steps of a search, which answers only at its end.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.generation: Generation | None = None
        self.done = False
        self.received = 0
        self._answers = [job.answer(index) for index in range(job.sample_count)]
        self._search: BeamSearch | None = None
        self._steps = 0
        self._seen = [0] * job.sample_count
        self._event = asyncio.Event()

    def attach(self, replica: Replica) -> None:
        """Joins the job's generation at this replica, or has it made, if that is possible now."""
        generation = replica.generations.get((self.job.tenant, self.job.name)) or self._submit(
            replica
        )
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
        request = records.new_request(
            message, job.prompt, job.max_tokens, facts, job.tenant, b"", job.shared
        )
        strings = tuple(message.stopping.stop_strings)
        generation = Generation(request, b"", loop.tokenizer, strings, facts.kind)
        try:
            loop.submit(generation)
        except QueueFull:
            return None
        replica.generations.add(generation)
        return generation

    def check(self, engine_deaths: int) -> int:
        """Compares what is new with the right answer; returns how much that was."""
        generation, fresh = self.generation, 0
        if generation is None or self.done:
            return 0
        for index, sample in enumerate(generation.samples):
            seen = self._seen[index]
            new = sample.token_ids[seen:]
            wanted = self._answers[index][0][seen : seen + len(new)]
            if new != wanted:
                raise AssertionError(
                    f"{self.job.name} sample {index} got {new} from token {seen} on, not {wanted}"
                )
            self._seen[index] += len(new)
            fresh += len(new)
        fresh += self._check_search(generation)
        self.received += fresh
        if generation.finished:
            self._check_endings(generation.samples, engine_deaths)
            self.done = True
        return fresh

    def _check_search(self, generation: Generation) -> int:
        """Checks what is told of a search; returns its steps since this was called last."""
        answer, best = self.job.search, generation.best
        told = [(each.score, each.tokens.tolist()) for each in answer.best] if answer else []
        if best is not None and (best.score, best.tokens.tolist()) not in told:
            raise AssertionError(f"{self.job.name}: {best} was never the best so far")
        group = generation.group
        if group is None or group.beams is None:
            return 0
        # A new leader begins a search anew.
        former = self._steps if group.beams is self._search else 0
        self._search, self._steps = group.beams, group.beams.length - group.beams.prompt_length
        return max(self._steps - former, 0)

    def _check_endings(self, samples: list[Sample], engine_deaths: int) -> None:
        for index, (sample, answer) in enumerate(zip(samples, self._answers, strict=True)):
            ending = sample.ending
            assert ending is not None
            died = ending.message.startswith("its engine died twice") and engine_deaths > 1
            if died:
                continue
            if (sample.token_ids, ending.reason) != answer:
                raise AssertionError(
                    f"{self.job.name} sample {index} ended by {ending.reason} ({ending.message}) "
                    f"after {len(sample.token_ids)} tokens, not by {answer[1]} "
                    f"after {len(answer[0])}"
                )
        found = self.job.search.found if self.job.search else []
        scores = [sample.score for sample in samples if sample.score is not None]
        if scores and scores != [each.score for each in found[: len(samples)]]:
            raise AssertionError(f"{self.job.name}: hypotheses with scores {scores}")

    def cancel(self, replica: Replica) -> None:
        if self.generation is not None and not self.done:
            replica.router.cancel(self.generation)
        self.done = True
