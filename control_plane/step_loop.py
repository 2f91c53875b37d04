"""The step loop of one leadership: plans out, results in, tokens to the generations.

It waits for results and for new work, and for nothing else: a plan goes out as soon as a result is
in, text is worked out while the engine computes, clients read at their own pace.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from control_plane import records
from control_plane.beams import BeamSearch
from control_plane.engine_link import (
    Draining,
    EngineFacts,
    Leadership,
    LinkLost,
    ReplicaAddress,
)
from control_plane.generation import Generation, Generations
from control_plane.metrics.pace import Pace
from control_plane.overload import DrainRate
from control_plane.plan import Logprob, Outcome, Plan, ResidentRow, Snapshot, StepResult
from control_plane.prefix_index import EngineLife, PrefixIndex
from control_plane.prefixes.log import CacheLog
from control_plane.request import FinishReason, Sequence, SequenceGroup, ended_at
from control_plane.scheduler import NeverFits, Scheduler, SchedulerLimits
from control_plane.tokenizer import PromptTokenizer
from control_plane.wait_queue import QueueFull
from protos.logs import without_values

log = logging.getLogger(__name__)

MAX_ENGINE_DEATHS = 2


@dataclass(frozen=True, slots=True)
class LeaderSettings:
    """See ``control_plane.settings`` for what they mean."""

    own_address: ReplicaAddress
    chunk_tokens: int = 512
    waiting_requests: int = 1024
    waiting_tokens: int = 1 << 20
    preemption: Literal["auto", "swap", "recompute"] = "auto"
    tenant_cache_share: float = 1.0
    steps_in_flight: int = 2
    heartbeat_seconds: float = 2.0
    retry_seconds: float = 0.1
    orphan_grace_seconds: float = 30.0
    check_invariants: bool = False


class StepLoop:
    """Runs one engine's steps for as long as its Lead stream lasts.

    Args:
        abandon: ends a generation that no client came back for, wherever it runs by then.

    Attributes:
        step: of the last plan sent.
        alive: it takes work; false once the stream is gone.
        counters: the engine's, which outlive this leadership.
        engine_drains: the engine has said that it is going to end.
        on_draining: called when it says so.
    """

    def __init__(
        self,
        facts: EngineFacts,
        tokenizer: PromptTokenizer | None,
        settings: LeaderSettings,
        generations: Generations,
        index: PrefixIndex,
        cache_log: CacheLog,
        abandon: Callable[[Generation], None],
    ) -> None:
        self.facts, self.tokenizer = facts, tokenizer
        self.step, self.alive = 0, True
        self.engine_drains, self._said_drained = False, False
        self.on_draining: Callable[[], None] = lambda: None
        self.life = EngineLife(facts.engine_id, facts.incarnation)
        self.counters = generations.counters.engine(facts.engine_id, facts.model)
        self.scheduler = Scheduler(
            SchedulerLimits(
                model_fingerprint=facts.fingerprint,
                block_size=facts.block_size,
                block_count=facts.block_count,
                host_block_count=facts.host_block_count,
                preemption=settings.preemption,
                slot_count=facts.slot_count,
                max_length=facts.max_length,
                step_tokens=facts.step_tokens,
                chunk_tokens=min(settings.chunk_tokens, facts.step_tokens),
                waiting_requests=settings.waiting_requests,
                waiting_tokens=settings.waiting_tokens,
                tenant_share=settings.tenant_cache_share,
            ),
            self.counters.totals,
        )
        self._settings, self._abandon = settings, abandon
        self._generations, self._index, self._cache_log = generations, index, cache_log
        self._owners: dict[SequenceGroup, Generation] = {}
        # Beam searches whose clients are told the best so far.
        self._told: dict[SequenceGroup, BeamSearch] = {}
        self._wake = asyncio.Event()
        self._drain = DrainRate()
        self._pace, self._model = Pace(facts.slot_count), generations.counters.model(facts.model)
        # Plans since the last results were delivered.
        self._sent: list[Plan] = []
        # Ended by a stop string, though the engine was a step ahead; until all is delivered.
        self._stopped: set[Sequence] = set()

    # Work from frontends.

    def submit(self, generation: Generation) -> None:
        """Queues a new generation.

        Raises:
            QueueFull, NeverFits: see `Scheduler.submit`.
        """
        self._own(generation, self.scheduler.submit(generation.request))

    def retry_seconds(self, refused: QueueFull) -> float:
        """When a request that the queue had no room for may find some."""
        return self._drain.seconds_for(refused.excess_tokens, time.monotonic())

    def drain_seconds(self) -> float:
        """When all that waits here may have found room."""
        return self._drain.seconds_for(self.scheduler.waiting_tokens, time.monotonic())

    @property
    def request_count(self) -> int:
        """Requests that wait or run here."""
        return len(self._owners)

    def longest_wait(self, now: float) -> float:
        """Seconds since the first of those arrived that no engine has taken; on any thread."""
        waiting = [each.arrived_at for each in list(self._owners.values()) if not each.accepted]
        return now - min((arrived for arrived in waiting if arrived is not None), default=now)

    def resume(self, generation: Generation) -> None:
        """Queues a generation that ran before; it goes on after the tokens it has."""
        group = _group_so_far(generation)
        self.scheduler.resubmit(group)
        self._own(generation, group)

    def can_take(self, generation: Generation) -> bool:
        """Whether a generation that was made for another engine can go on here."""
        if self.facts.kind != generation.kind:
            return False
        try:
            self.scheduler.check_fits(generation.request)
        except NeverFits:
            return False
        return True

    def release(self, generation: Generation) -> None:
        """Takes a generation off the engine, if it is here; blocks are free with the next plan."""
        if generation.group is not None and generation.group in self._owners:
            self.scheduler.cancel(generation.group)
            self._disown(generation.group)
            self._wake.set()

    @property
    def draining(self) -> bool:
        """Whether what it is given waits, for this engine to be back or for another one."""
        return self.scheduler.draining

    def drain(self, wanted: bool) -> None:
        """Begins nothing new any more, or does so again; what has begun goes on to its end."""
        self.scheduler.draining = wanted or self.engine_drains
        self._wake.set()

    def unbegun(self) -> list[Generation]:
        """What no engine has begun with, in order."""
        groups = [group for group in self.scheduler.queue if not group.admitted]
        return [self._owners[group] for group in groups if group in self._owners]

    def close(self) -> list[Generation]:
        """Takes no more work; returns what was not finished."""
        self.alive = False
        return [generation for generation in self._owners.values() if not generation.finished]

    def _own(self, generation: Generation, group: SequenceGroup) -> None:
        generation.group, generation.engine_id = group, self.facts.engine_id
        generation.model = self.facts.model
        self._owners[group] = generation
        if group.beams is not None and group.beams.fields.stream_best:
            self._told[group] = group.beams
        self._wake.set()

    def _disown(self, group: SequenceGroup) -> None:
        del self._owners[group]
        self._told.pop(group, None)
        self._pace.forget(group)

    # Taking over.

    def take_over(self, snapshot: Snapshot, stranded: list[Generation], died: bool) -> None:
        """Goes on with what is resident, and queues what is known but not resident.

        Args:
            stranded: generations that this replica ran on the engine before.
            died: the engine was lost with what it held, and without a word.
        """
        released: list[int] = []
        residents: dict[Generation, list[ResidentRow]] = {}
        for row in sorted(snapshot.rows, key=_arrival):
            generation = self._generation_of(row)
            if generation is None:
                released.append(row.slot)
            else:
                residents.setdefault(generation, []).append(row)
        adopted: list[tuple[Sequence, ResidentRow]] = []
        for generation, rows in residents.items():
            group = _group_so_far(generation)
            adopted += [(group.sequences[row.sample_index], row) for row in rows]
            self._own(generation, group)
            if not generation.accepted:  # The plan had arrived, but sending it seemed to fail.
                self._admitted(generation, records.admission_facts(rows[0].record)[1])
        self.scheduler.restore(adopted, snapshot.hashes, released)
        held = self.scheduler.pool.held_hashes()
        self._cache_log.begin(held, self.facts.incarnation, time.monotonic())
        for sequence, row in adopted:
            generation = self._owners[sequence.group]
            try:
                self._catch_up(generation, sequence, row)
            except Exception as error:
                self._contain(generation, error)
        for generation in residents:
            self._close_if_finished(generation)
        for generation in stranded:
            if generation not in residents:
                self.take_stranded(generation, died=died and generation.accepted)

    def _generation_of(self, row: ResidentRow) -> Generation | None:
        """Finds or makes the generation of a resident sequence; None if it is not to go on here."""
        try:
            generation = self._known_or_new(row)
            return generation if generation and _continues(generation, row) else None
        except Exception:
            fields = {"engine": self.facts.engine_id}
            log.exception("slot %d holds nothing that can go on", row.slot, extra=fields)
            return None

    def _known_or_new(self, row: ResidentRow) -> Generation | None:
        facts, prompt = self.facts, row.tokens[: row.prompt_count]
        request, digest = records.rebuilt_request(row.record, prompt, facts)
        if self._generations.was_cancelled(request.key):
            return None
        generation = self._generations.running(request.key)
        if generation is not None:
            # If it is neither stranded nor from this snapshot, another engine runs it by now.
            return generation if generation.engine_id == facts.engine_id else None
        ended = self._generations.get(request.key)
        if ended is not None and ended.digest == digest:
            return None  # It has failed or ended already; its slot was not released in time.
        if request.wants_logprobs:
            # Those of the tokens so far are gone with the former leader. A client that comes back
            # gets the request generated again, which gives the same tokens.
            return None
        strings = records.stop_strings(request)
        generation = Generation(request, digest, self.tokenizer, strings, facts.kind)
        self._generations.add(generation)
        generation.accept(facts.engine_id, records.admission_facts(row.record)[1])
        asyncio.get_running_loop().call_later(
            self._settings.orphan_grace_seconds, self._end_orphan, generation
        )
        return generation

    def _catch_up(self, generation: Generation, sequence: Sequence, row: ResidentRow) -> None:
        """Delivers the tokens whose results the former leader never saw."""
        request = generation.request
        count, reason = ended_at(request, row.tokens)
        sample = generation.samples[sequence.sample_index]
        # Of a request from another replica, that one has counted the tokens.
        known = generation.arrived_at is not None
        for token in row.tokens[row.prompt_count + len(sample.token_ids) : count].tolist():
            if known:
                self.counters.output_tokens += 1
                self._generations.counters.first_token(generation, time.monotonic())
            if generation.push(sequence.sample_index, token):
                self.scheduler.finish(sequence, FinishReason.STOP)
                return
        if reason is not None:
            generation.end(sequence.sample_index, reason)

    def take_stranded(self, generation: Generation, *, died: bool) -> None:
        """Goes on with a generation whose engine was lost, or fails it.

        Args:
            died: it was resident when its engine died.
        """
        generation.engine_deaths += died
        if generation.engine_deaths >= MAX_ENGINE_DEATHS:
            self._fail(generation, "its engine died twice under it")
        elif not self.can_take(generation) and not generation.accepted:
            # It is made anew, for what the engine is now.
            generation.detach()
            self._generations.detach(generation)
        elif not self.can_take(generation):
            self._fail(generation, "its engine came back with another model or other sizes")
        else:
            self.resume(generation)

    def _fail(self, generation: Generation, sentence: str) -> None:
        generation.fail(sentence)
        self._generations.finish(generation)

    def _contain(self, generation: Generation, error: Exception) -> None:
        """Ends one generation after an exception while its tokens were worked on: no other's."""
        reference, request_id = uuid.uuid4().hex[:12], generation.request.request_id
        fields = {"request_id": request_id, "engine": self.facts.engine_id, "reference": reference}
        fields["exception"] = without_values(error)
        log.error("error %s in request %s", reference, request_id, extra=fields)
        self.release(generation)
        self._fail(generation, f"internal error {reference}")

    def _end_orphan(self, generation: Generation) -> None:
        running = self._generations.running(generation.request.key) is generation
        if running and not generation.finished and generation.subscriber_count == 0:
            request_id = generation.request.request_id
            fields = {"request_id": request_id, "engine": generation.engine_id}
            log.info("nobody came back for request %s", request_id, extra=fields)
            self._abandon(generation)

    # The loop.

    async def drive(self, leadership: Leadership) -> None:
        """Runs steps until cancelled.

        Raises:
            LinkLost: the stream broke.
        """
        results: deque[StepResult] = deque()
        reader = asyncio.create_task(self._read_results(leadership, results))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                outcomes = [self._apply(result) for result in _drain(results)]
                try:
                    await self._plan_ahead(leadership)
                finally:
                    # Also when this leadership ends here: a plan that has gone out may release
                    # what these outcomes end, so the next leader would find no trace of it.
                    for outcome in outcomes:
                        self._deliver(outcome)
                self._stopped.clear()
                for plan in self._sent:
                    self._pace.begin(plan)
                self._sent.clear()
                if reader.done():
                    reader.result()
                if self.engine_drains and not self._said_drained and not self.scheduler.has_begun:
                    self._said_drained = True
                    await leadership.drained()
                if not self._wake.is_set():
                    await self._idle(leadership)
                self._wake.clear()
        finally:
            reader.cancel()

    async def _read_results(self, leadership: Leadership, results: deque[StepResult]) -> None:
        while True:
            result = await leadership.result()
            if isinstance(result, Draining):
                self.engine_drains = True
                self.drain(True)
                self.on_draining()
                continue
            results.append(result)
            self._wake.set()

    async def _idle(self, leadership: Leadership) -> None:
        try:
            async with asyncio.timeout(self._settings.heartbeat_seconds):
                await self._wake.wait()
        except TimeoutError:
            await leadership.heartbeat()

    def _apply(self, result: StepResult) -> Outcome:
        self.counters.timings.add(result.timings_us)
        try:
            return self.scheduler.apply(result)
        except ValueError as error:
            raise LinkLost(str(error)) from error

    async def _plan_ahead(self, leadership: Leadership) -> None:
        scheduler = self.scheduler
        while scheduler.steps_in_flight < self._settings.steps_in_flight:
            plan = scheduler.schedule()
            if self._settings.check_invariants:
                scheduler.pool.check()
                scheduler.swap.pool.check()
            if not (scheduler.pool.conserved and scheduler.swap.pool.conserved):
                raise RuntimeError("a block was lost")
            if plan is None:
                break
            self.step = plan.step
            await leadership.send(plan)
            self._accept(plan)
        added, removed = scheduler.pool.take_index_changes()
        if added or removed:
            self._index.publish(self.life, added, removed)
            self._cache_log.changed(added, removed, time.monotonic())

    def _accept(self, plan: Plan) -> None:
        for admission in plan.admissions:
            sequence = admission.sequence
            generation = self._owners.get(sequence.group)
            if generation is None:
                continue
            if not generation.accepted:
                self._drain.add(time.monotonic(), len(admission.tokens))
            self._admitted(generation, admission.cached)
        self._sent.append(plan)
        if plan.swapped_out or plan.swapped_in:
            self.counters.count_swaps(plan, self.facts.bytes_per_block)

    def _admitted(self, generation: Generation, cached: int) -> None:
        """Lets a request know that the engine has it; the first time, it is counted."""
        if not generation.accepted and generation.counted:
            now = time.monotonic()
            self._cache_log.admitted(generation.request, self.facts, cached, now)
            shared = generation.request.shared_blocks * self.facts.block_size
            self._generations.counters.admitted(generation, self.life, cached, now, shared)
        generation.accept(self.facts.engine_id, cached)

    def _deliver(self, outcome: Outcome) -> None:
        self._clock(outcome)
        # Tokens past a stop string that was found while this result was under way.
        stopped = self._stopped
        missed = sum(sequence in stopped for sequence in outcome.sequences) if stopped else 0
        for sequence, pairs in outcome.prompt_logprobs:
            if (generation := self._owners.get(sequence.group)) is not None:
                _add_prompt_logprobs(generation, pairs)
        columns = zip(
            outcome.sequences, outcome.slots.tolist(), outcome.token_ids.tolist(), strict=True
        )
        for sequence, slot, token in columns:
            generation = self._owners.get(sequence.group)
            if generation is None:
                missed += sequence not in stopped
                continue
            logprob = outcome.logprobs.get(slot) if outcome.logprobs else None
            try:
                if generation.push(sequence.sample_index, token, logprob):
                    self._stopped.add(sequence)
                    self.scheduler.finish(sequence, FinishReason.STOP)
                    self._wake.set()
                    self._close_if_finished(generation)
            except Exception as error:
                self._contain(generation, error)
        self.counters.output_tokens += len(outcome.slots) - missed
        for group, hypotheses in outcome.hypotheses:
            if (generation := self._owners.get(group)) is not None:
                try:
                    generation.end_beams(hypotheses)
                    lengths = [len(sample.token_ids) for sample in generation.samples]
                    self.counters.output_tokens += sum(lengths)
                    self._generations.counters.first_token(generation, time.monotonic())
                    self._close_if_finished(generation)
                except Exception as error:
                    self._contain(generation, error)
        for sequence, reason, sentence in outcome.finished:
            generation = self._owners.get(sequence.group)
            if generation is None:
                continue
            try:
                generation.end(sequence.sample_index, reason, sentence)
                self._close_if_finished(generation)
            except Exception as error:
                self._contain(generation, error)
        for group, search in self._told.items():
            if search.best is not None:
                self._owners[group].show_best(search.best)

    def _clock(self, outcome: Outcome) -> None:
        """Counts how long the tokens were waited for."""
        now = time.monotonic()
        for sequence in self._pace.step(outcome, now, self._model.token_gap):
            generation = self._owners.get(sequence.group)
            if generation is not None:
                self._generations.counters.first_token(generation, now)

    def _close_if_finished(self, generation: Generation) -> None:
        if generation.finished and generation.group in self._owners:
            self._disown(generation.group)
            self._generations.finish(generation)


def _arrival(row: ResidentRow) -> int:
    try:
        return records.admission_facts(row.record)[0]
    except Exception:
        return 0  # Whatever that is, it is released.


def _continues(generation: Generation, row: ResidentRow) -> bool:
    """Whether a resident sequence can go on as it is: it has all that clients may have seen."""
    if generation.request.beams and len(row.tokens) > row.prompt_count:
        # What a search knows of its beams was in results only: it begins anew. Beams are also more
        # than the samples that they are searched for.
        return False
    sample = generation.samples[row.sample_index]
    known = len(sample.token_ids)
    output = row.tokens[row.prompt_count :].tolist()
    # Log-probabilities are in results only; one that was lost must be computed again.
    scored, sampling = len(generation.prompt_logprobs), generation.request.sampling
    complete = (sampling.logprob_count < 0 or len(output) == known) and (
        sampling.prompt_logprob_count < 0 or scored >= min(row.computed, row.prompt_count - 1)
    )
    return complete and sample.ending is None and output[:known] == sample.token_ids


def _drain(results: deque[StepResult]) -> list[StepResult]:
    drained = list(results)
    results.clear()
    return drained


def _add_prompt_logprobs(generation: Generation, pairs: list[tuple[int, Logprob]]) -> None:
    # A prompt that is computed again after a preemption brings the same ones again.
    for position, logprob in pairs:
        if position == len(generation.prompt_logprobs) + 1:
            generation.prompt_logprobs.append(logprob)


def _group_so_far(generation: Generation) -> SequenceGroup:
    """Makes a group whose sequences go on after the tokens that the generation has."""
    group = SequenceGroup.of(generation.request, -1)
    if group.beams:
        return group  # What was shown of a search that has not ended is no part of its answer.
    for sequence, sample in zip(group.sequences, generation.samples, strict=True):
        if sample.ending is not None:
            sequence.finish = FinishReason.STOP
        sequence.extend(sample.token_ids)
    if any(sample.token_ids for sample in generation.samples):
        group.waiting = [sequence for sequence in group.sequences if sequence.finish is None]
        group.unforked = []
        group.preemptions = 1
    return group
