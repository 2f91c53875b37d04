"""A stub engine behind an in-memory link: it takes its time, restarts, and loses its leader.

It stands where `control_plane.engine_link.EngineLink` and `Leadership` stand, and does what
`data_plane.service` does: one leader, rising epochs, plans in order, and when the stream breaks the
plans that were not begun are dropped, and the results that were under way are lost.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import deque
from typing import Any, Protocol

from control_plane.engine_link import EngineFacts, LinkLost, Refused, ReplicaAddress
from control_plane.engine_wire import encode_plan
from control_plane.plan import Plan, Snapshot, StepResult
from control_plane.scheduler import SchedulerLimits
from protos.engine.v1 import engine_pb2
from tests.simulated_workload import Pace, text_of
from tests.stub_engine import VOCABULARY, StubEngine


class Observer(Protocol):
    """Who checks what goes on."""

    def planned(self, plan: Plan, message: engine_pb2.StepPlan) -> Any:
        """A plan is sent; whatever this returns comes with `executed`."""

    def executed(self, noted: Any, stub: StubEngine, message: engine_pb2.StepPlan) -> None:
        """The plan is executed."""

    def idle(self) -> None:
        """The leader has nothing to plan and says that it is alive."""

    def failed(self, error: BaseException) -> None:
        """Something is wrong; the simulation ends."""

    def arm(self, stub: StubEngine) -> None:
        """A new engine process: plants its faults."""


class TokenTexts:
    """Stands in for a tokenizer: a character a token, complete at once."""

    def text_decoder(self) -> TokenTexts:
        return self

    def push(self, token_id: int) -> str:
        return text_of(token_id)

    def finish(self) -> str:
        return ""


class SimulatedEngine:
    """One engine process after another at one address.

    Attributes:
        stub: what the present process holds.
        plans: those executed so far.
    """

    def __init__(
        self, limits: SchedulerLimits, pace: Pace, rng: random.Random, observer: Observer
    ) -> None:
        self.address = "simulated"
        self._limits, self._pace, self._rng, self._observer = limits, pace, rng, observer
        self._incarnation, self._epoch, self._up_at = 1, 0, 0.0
        self._leader: SimulatedLeadership | None = None
        self._queue: deque[tuple[engine_pb2.StepPlan, Any]] = deque()
        self._running: asyncio.TimerHandle | None = None
        self.plans = 0
        self.stub = self._new_stub()

    def _new_stub(self) -> StubEngine:
        stub = StubEngine(self._limits)
        self._observer.arm(stub)
        return stub

    # What the control plane calls.

    async def describe(self) -> EngineFacts:
        self._reach()
        limits = self._limits
        return EngineFacts(
            engine_id="engine",
            incarnation=str(self._incarnation),
            model="stub",
            fingerprint=limits.model_fingerprint,
            block_size=limits.block_size,
            block_count=limits.block_count,
            host_block_count=limits.host_block_count,
            slot_count=limits.slot_count,
            step_tokens=limits.step_tokens,
            max_length=limits.max_length,
            vocabulary_size=VOCABULARY,
            eos_token_ids=(),
            tokenizer_digest="texts",
        )

    async def tokenizer(self) -> TokenTexts:
        return TokenTexts()

    async def lead(self, own_address: ReplicaAddress, incarnation: str) -> SimulatedLeadership:
        self._reach()
        if self._leader is not None:
            raise Refused(ReplicaAddress("elsewhere"))
        if incarnation != str(self._incarnation):
            raise LinkLost("the engine restarted between two calls")
        self._epoch += 1
        self._leader = SimulatedLeadership(self, self._epoch, self.stub.snapshot())
        return self._leader

    def _reach(self) -> None:
        if asyncio.get_running_loop().time() < self._up_at:
            raise LinkLost("the engine is not up")

    # What goes wrong.

    def break_link(self) -> None:
        if self._leader is not None:
            self.release(self._leader)

    def restart(self, seconds: float) -> None:
        """Ends the process; another is there after `seconds`, and holds nothing."""
        self.break_link()
        self._incarnation += 1
        self._up_at = asyncio.get_running_loop().time() + seconds
        self.stub = self._new_stub()

    # What a leadership does.

    def take(self, plan: Plan, leadership: SimulatedLeadership) -> None:
        message = encode_plan(plan, leadership.epoch)
        noted = self._observer.planned(plan, message)
        self._queue.append((message, noted))
        if self._running is None:
            self._begin()

    def heartbeat(self) -> None:
        self._observer.idle()

    async def pause(self) -> None:
        """Sending may take a while, during which other things happen."""
        if self._pace.send and self._rng.random() < 0.2:
            await asyncio.sleep(self._rng.random() * self._pace.send)

    def release(self, leadership: SimulatedLeadership) -> None:
        """Ends a leadership: a plan that was begun is done, the others are dropped."""
        if self._leader is not leadership:
            return
        if self._running is not None:
            self._running.cancel()
            self._running = None
            if self._rng.random() < 0.5:
                self._execute_next(leadership)
        self._queue.clear()
        self._leader = None
        leadership.break_off()

    def _begin(self) -> None:
        seconds = self._pace.step * (0.5 + self._rng.random())
        self._running = asyncio.get_running_loop().call_later(seconds, self._end_step)

    def _end_step(self) -> None:
        self._running = None
        if self._leader is not None:
            self._execute_next(self._leader)
        if self._queue:
            self._begin()

    def _execute_next(self, leadership: SimulatedLeadership) -> None:
        message, noted = self._queue.popleft()
        try:
            result = self.stub.execute_message(message)
            self._observer.executed(noted, self.stub, message)
        except Exception as error:
            self._observer.failed(error)
            return
        self.plans += 1
        # What preempting by either way costs here, so that both are chosen at times.
        moved = len(message.swap_out_blocks) // 4 + len(message.swap_in_blocks) // 4
        moves_us = moved * self._rng.choice([1, 60, 400])
        forward_us = 100 + 30 * sum(memoryview(message.chunk_token_counts).cast("i"))
        result = dataclasses.replace(result, timings_us=(0, moves_us, forward_us, 0))
        leadership.deliver_in(self._rng.random() * self._pace.result, result)


class SimulatedLeadership:
    """The Lead stream of one epoch; results come in order, each some time after its step."""

    def __init__(self, engine: SimulatedEngine, epoch: int, snapshot: Snapshot) -> None:
        self._engine, self.epoch, self.snapshot = engine, epoch, snapshot
        self._arrived: asyncio.Queue[StepResult | None] = asyncio.Queue()
        self._under_way: deque[StepResult] = deque()
        self._latest = 0.0
        self._broken = False

    async def send(self, plan: Plan) -> None:
        self._check()
        self._engine.take(plan, self)
        await self._engine.pause()

    async def heartbeat(self) -> None:
        self._check()
        self._engine.heartbeat()

    async def result(self) -> StepResult:
        result = await self._arrived.get()
        if result is None:
            raise LinkLost("the link broke")
        return result

    def close(self) -> None:
        self._engine.release(self)

    def _check(self) -> None:
        if self._broken:
            raise LinkLost("the link broke")

    def deliver_in(self, seconds: float, result: StepResult) -> None:
        loop = asyncio.get_running_loop()
        self._latest = max(self._latest, loop.time() + seconds)
        self._under_way.append(result)
        loop.call_at(self._latest, self._deliver)

    def _deliver(self) -> None:
        if not self._broken:
            self._arrived.put_nowait(self._under_way.popleft())

    def break_off(self) -> None:
        """Ends the stream; the results that are under way never arrive."""
        self._broken = True
        self._arrived.put_nowait(None)
