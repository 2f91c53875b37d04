"""The scheduler: decides each step for one engine (paper, section 4.5).

Pure: no I/O, no clock, no randomness. `submit` and `cancel` say what is wanted, `schedule` gives
the next step plan, `apply` takes a result. Plans may be ahead of results: the engine feeds its own
last token into the next step, so a plan only needs to know how many tokens there will be. A
sequence that turns out to have ended meanwhile wastes the steps in flight, nothing more: results
are matched with the serial number of a slot's occupant.

Policies: by priority, then first come, first served; decodes first, then chunks of prompts under a
token budget. Out of blocks, the group that is last in that same order is preempted whole: swapped
out to host memory, or released and later recomputed from its tokens, minus what the prefix cache
still has, whichever costs less. A group that was preempted comes back before any that came later;
what else may pass whom, the wait queue says.

Nothing here is done sequence by sequence in a step that changes nothing: what the next plan does
with a slot is marked in columns of the slot table.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from control_plane.beams import Hypothesis
from control_plane.blocks import ONE, BlockPool, Int32Array
from control_plane.branching import Branching
from control_plane.hashing import PrefixHasher
from control_plane.plan import Admission, Outcome, Plan, ResidentRow, StepResult
from control_plane.request import FinishReason, Request, Sequence, SequenceGroup, ended_at
from control_plane.slots import SlotTable
from control_plane.swapping import CostModel, SwapSpace
from control_plane.wait_queue import Refusal, WaitQueue

# Token ids that one plan's admissions carry, at most by one prompt more: four megabytes of message.
ADMITTED_TOKENS = 1 << 20


class NeverFits(Exception):
    """The request needs more blocks or slots than the engine has at all."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes, most of them the engine's.

    Attributes:
        chunk_tokens: most tokens of one prompt in one step.
        waiting_requests, waiting_tokens: most requests, and tokens of theirs, in the wait queue.
        host_block_count: blocks in host memory to swap to.
        preemption: how to preempt; auto: by cost.
        tenant_share: of the pool, what one tenant's cached blocks may be while others want memory.
    """

    model_fingerprint: str
    block_size: int
    block_count: int
    slot_count: int
    max_length: int
    step_tokens: int
    chunk_tokens: int
    waiting_requests: int = 1024
    waiting_tokens: int = 1 << 20
    host_block_count: int = 0
    preemption: Literal["auto", "swap", "recompute"] = "auto"
    tenant_share: float = 1.0

    @property
    def tenant_quota(self) -> int | None:
        """Cached blocks of one tenant; None: no limit."""
        return None if self.tenant_share >= 1 else int(self.tenant_share * self.block_count)


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A plan whose result is awaited: who is sampled, and who runs a chunk, by slot and serial.

    decode_count: the first ones of the sampled, which decode.
    moved_blocks, chunk_tokens: what its timings are for.
    """

    step: int
    slots: Int32Array
    serials: npt.NDArray[np.int64]
    chunks: dict[int, int]
    decode_count: int
    moved_blocks: int
    chunk_tokens: int


@dataclass(slots=True)
class Totals:
    """Counters that schedulers add to."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    recomputed_tokens: int = 0


class Scheduler:
    """Schedules one engine. Every call costs O(changes) and a few vector operations.

    Args:
        totals: those of the engine's former schedulers, to go on with.

    Attributes:
        draining: what has not been admitted yet waits; what has, goes on to its end.
    """

    def __init__(self, limits: SchedulerLimits, totals: Totals | None = None) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.block_count, limits.tenant_quota)
        self.slots = SlotTable(limits.slot_count, limits.max_length, limits.block_size)
        self.swap = SwapSpace(limits.host_block_count, self.pool, self.slots)
        self.queue = WaitQueue(limits.waiting_requests, limits.waiting_tokens)
        self.costs = CostModel()
        self.totals = totals or Totals()
        self.draining = False
        self._branching = Branching(self.pool, self.slots)
        self._hashers: dict[str, PrefixHasher] = {}
        self._arrivals = 0
        self._step = 0
        # Prompts that are being computed, in the order in which they began.
        self._prefilling: dict[Sequence, None] = {}
        # Consumed by the next plan.
        self._unwanted: list[SequenceGroup] = []
        self._released: list[int] = []
        self._in_flight: deque[_InFlight] = deque()

    # What is wanted.

    def submit(self, request: Request) -> SequenceGroup:
        """Queues a request.

        Raises:
            NeverFits: it could not run even alone.
            QueueFull: too many requests or tokens wait.
        """
        self.check_fits(request)
        self.queue.check(request)
        group = SequenceGroup.of(request, self._next_arrival())
        self.queue.push(group)
        return group

    def resubmit(self, group: SequenceGroup) -> None:
        """Queues a group that was resident elsewhere; its sequences carry their tokens so far."""
        group.arrival = self._next_arrival()
        # One that has output was admitted elsewhere, and is not passed here either.
        prompt = len(group.request.prompt)
        group.admitted = any(len(sequence.tokens) > prompt for sequence in group.sequences)
        self.queue.push(group)

    def check_fits(self, request: Request) -> None:
        """Raises NeverFits unless the request could run if it were alone on the engine."""
        if request.length_limit > self.limits.max_length:
            raise NeverFits(
                f"comes to {request.length_limit} tokens; the engine takes {self.limits.max_length}"
            )
        blocks = request.blocks_at_worst(self.limits.block_size)
        if blocks > self.limits.block_count:
            raise NeverFits(
                f"needs up to {blocks} blocks of {self.limits.block_size} tokens; "
                f"the pool has {self.limits.block_count}"
            )
        if request.sequence_count > self.limits.slot_count:
            raise NeverFits(
                f"needs {request.sequence_count} slots; the engine has {self.limits.slot_count}"
            )

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends one sequence; its blocks are free for the next plan."""
        if sequence.finish is None:
            self._retire(sequence, reason)

    def cancel(self, group: SequenceGroup) -> None:
        """Ends every sequence of a group that has not ended."""
        for sequence in group.sequences:
            self.finish(sequence, FinishReason.CANCELLED)

    def preempt(self, group: SequenceGroup) -> None:
        """Preempts a group with the next plan, if it is resident then."""
        self._unwanted.append(group)

    # What is decided.

    def schedule(self) -> Plan | None:
        """Returns the next step's plan, or None when there is nothing to do."""
        plan = Plan(step=self._step + 1)
        sampled: list[int] = []
        self.swap.begin_plan()
        self._branching.begin_plan()
        if self._unwanted:
            unwanted, self._unwanted = dict.fromkeys(self._unwanted), []
            self._preempt(plan, [group for group in unwanted if self.slots.holds(group)])
        self._branching.branch_all(plan)
        run = self._decodes(plan)
        plan.decode_count = len(run)
        self._swap_in(plan)
        budget = self._chunks(plan, self.limits.step_tokens - len(run), sampled)
        self._admit(plan, budget, sampled)
        if not (plan.token_count or plan.swapped_in or self._in_flight) and self._make_way(plan):
            self._swap_in(plan)
            self._admit(plan, budget, sampled)
        plan.released, self._released = self._released, []
        plan.hashed = self.pool.take_announced()
        if plan.empty:
            return None
        self._touch_chunks(plan)
        slots = np.concatenate([run, np.array(sampled + plan.fork_children, np.int32)])
        chunks = {slot: int(self.slots.serial[slot]) for slot in plan.chunk_slots}
        serials = self.slots.serial[slots]
        moved, chunked = plan.moved_block_count, sum(plan.chunk_counts)
        flight = _InFlight(plan.step, slots, serials, chunks, len(run), moved, chunked)
        self._in_flight.append(flight)
        self._step = plan.step
        return plan

    def apply(self, result: StepResult) -> Outcome:
        """Takes the result of the oldest plan in flight.

        Raises:
            ValueError: it is not that plan's.
        """
        if not self._in_flight or self._in_flight[0].step != result.step:
            raise ValueError(f"step {result.step} is not the oldest in flight")
        flight = self._in_flight.popleft()
        if len(result.token_ids) != len(flight.slots):
            raise ValueError(f"{len(result.token_ids)} tokens for {len(flight.slots)} sequences")
        _, moves_us, forward_us, _ = result.timings_us
        self.costs.observe(flight.moved_blocks, flight.chunk_tokens, moves_us, forward_us)
        slots, table, tokens = flight.slots, self.slots, result.token_ids
        current = table.serial[slots] == flight.serials
        if result.faults:
            current &= ~np.isin(slots, list(result.faults))
        decodes = flight.decode_count
        if not current.all():
            decodes = int(np.count_nonzero(current[:decodes]))
            slots, tokens = slots[current], tokens[current]
        table.tokens[slots, table.known[slots]] = tokens
        table.known[slots] += 1
        beams = table.beam[slots]
        hypotheses = []
        if beams.any():
            hypotheses = self._report_beams(slots[beams], result)
            decodes -= int(np.count_nonzero(beams[:decodes]))
            slots, tokens = slots[~beams], tokens[~beams]
        stopped = (table.stop_ids[slots] == tokens[:, None]).any(axis=1)
        ended = stopped | (table.known[slots] >= table.limit[slots])
        sequences = table.owner[slots]
        prompt_logprobs = [
            (table.owner[slot], logprobs)
            for slot, logprobs in result.prompt_logprobs.items()
            if table.serial[slot] == flight.chunks.get(slot)
        ]
        finished: list[tuple[Sequence, FinishReason, str]] = []
        for row in np.flatnonzero(ended).tolist():
            reason = FinishReason.STOP if stopped[row] else FinishReason.LENGTH
            finished.append((sequences[row], reason, ""))
            self._retire(sequences[row], reason)
        for slot, sentence in result.faults.items():
            self._fail(slot, flight, sentence, finished)
        logprobs = result.logprobs
        return Outcome(
            sequences, slots, tokens, decodes, finished, logprobs, prompt_logprobs, hypotheses
        )

    @property
    def steps_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def waiting_count(self) -> int:
        return len(self.queue)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait to be computed: of queued requests, and of prompts begun."""
        begun = [sequence.slot for sequence in self._prefilling]
        return self.queue.tokens + int(
            (self.slots.length[begun] - self.slots.computed[begun]).sum()
        )

    @property
    def running_count(self) -> int:
        return self.limits.slot_count - self.slots.free_count

    @property
    def has_begun(self) -> bool:
        """Whether there is anything on the engine, or that is to come back to it."""
        begun = self.queue.first_begun is not None
        return begun or self.running_count > 0 or bool(self._in_flight or self._released)

    @property
    def groups(self) -> list[SequenceGroup]:
        """Resident, swapped and waiting groups; one may be resident and wait, while resumed."""
        return list(dict.fromkeys([*self.resident_groups, *self.swap.groups, *self.queue]))

    @property
    def resident_groups(self) -> list[SequenceGroup]:
        """Groups that have slots and are not swapped out, in order."""
        return self.slots.groups_of(self.slots.on_device())

    # A new leader's beginning.

    def restore(
        self,
        rows: list[tuple[Sequence, ResidentRow]],
        hashes: dict[int, bytes],
        released: list[int] | None = None,
    ) -> None:
        """Takes over an engine's resident sequences; called once, before anything else.

        `rows` are in order of arrival. `released` are resident slots that nobody wants; the first
        plan empties them.

        Sequences that have ended already are retired: the caller finds out by `ended_at`, too.
        Samples that the engine does not hold any more are generated again from the prompt.
        """
        self._released += released or []
        references = np.zeros(self.limits.block_count, np.int32)
        for _, row in rows:
            if not row.swapped:
                references[row.blocks] += 1
        self.pool.restore(references, hashes)
        self.swap.restore([row.blocks for _, row in rows if row.swapped])
        for sequence, row in rows:
            self._seat(sequence, row)
        for group in dict.fromkeys(sequence.group for sequence, _ in rows):
            self._resume_group(group)

    def _seat(self, sequence: Sequence, row: ResidentRow) -> None:
        slot = self.slots.occupy(sequence, row.slot)
        self.slots.set_tokens(slot, row.tokens)
        self.slots.set_blocks(slot, row.blocks)
        self.slots.computed[slot] = row.computed
        self.slots.swapped[slot] = row.swapped
        sequence.hashes = []
        if row.swapped:
            return
        request = sequence.group.request
        for index, block in enumerate(row.blocks.tolist()):
            digest = self.pool.hash_of(block)
            if digest is None:
                break
            sequence.hashes.append(digest)
            self.pool.assign(block, request.tenant_of(index))
        sequence.published = len(sequence.hashes)

    def _resume_group(self, group: SequenceGroup) -> None:
        group.arrival, group.admitted = self._next_arrival(), True
        prompt = len(group.request.prompt)
        resident = group.resident()
        slots = self.slots.of(group)
        swapped = bool(self.slots.swapped[slots].any())
        self.slots.order[slots] = group.order
        absent = [seq for seq in group.sequences if seq.slot < 0 and seq.finish is None]
        begun = any(len(seq.tokens) > prompt for seq in absent) or any(
            self.slots.known[seq.slot] > prompt for seq in resident
        )
        group.waiting, group.unforked = (absent, []) if begun else ([], absent)
        for sequence in group.unforked:
            self.slots.occupy(sequence)
        for sequence in resident:
            slot = sequence.slot
            known = int(self.slots.known[slot])
            _, reason = ended_at(group.request, self.slots.known_tokens(slot))
            if reason is not None:
                self._retire(sequence, reason)
            elif swapped:
                continue
            elif known > prompt and self.slots.computed[slot] == known - 1:
                self.slots.join(slots[slots == slot])
            else:
                self._prefilling[sequence] = None
        if group.waiting:
            self.queue.push(group)
        if swapped and absent and group.resident():
            # Only whole groups are swapped; this one has lost a part.
            self._take_off(group)

    # Decodes.

    def _decodes(self, plan: Plan) -> Int32Array:
        """Gives every decoding sequence room for one more token; returns their slots, ascending."""
        table, size = self.slots, self.limits.block_size
        joining = np.flatnonzero(table.joining).astype(np.int32)
        leaving = np.flatnonzero(table.leaving).astype(np.int32)
        if len(joining) or len(leaving):
            table.joining[joining] = table.leaving[leaving] = False
            table.decoding[leaving] = False
            table.decoding[joining] = True
        while True:
            run = np.flatnonzero(table.decoding).astype(np.int32)
            copying = self._shared_tails()
            crossing = run[table.computed[run] == table.block_count[run] * size]
            short = len(crossing) + len(copying) - self.pool.available_count
            if short <= 0:
                break
            victims = self._victims(short)
            if not self._yield_pinned(victims[0], short):
                self._preempt(plan, victims)
        table.forked[:] = False
        if len(joining) or len(leaving):
            here = (table.block_count > 0) & ~table.swapped
            plan.decode_joins, plan.decode_leaves = joining[here[joining]], leaving[here[leaving]]
        if len(crossing):
            blocks = self.pool.allocate(len(crossing))
            table.blocks[crossing, table.block_count[crossing]] = blocks
            table.block_count[crossing] += 1
            plan.appended_slots, plan.appended_blocks = crossing, blocks
        if len(copying):
            self._copy_on_write(plan, copying)
        plan.touched_slots = np.concatenate([crossing, plan.decode_joins, plan.copied_slots])
        plan.touched_lengths = table.length[plan.touched_slots]
        table.computed[run] += 1
        table.length[run] += 1
        # Beams pause after each step, until it is known which of them go on.
        table.leaving[run[(table.length[run] >= table.limit[run]) | table.beam[run]]] = True
        return run

    def _shared_tails(self) -> Int32Array:
        """Freshly forked slots that must copy their last block before they write into it."""
        table = self.slots
        if not table.forked.any():
            return np.zeros(0, np.int32)
        slots = np.flatnonzero(table.forked & table.decoding).astype(np.int32)
        tails = table.blocks[slots, table.block_count[slots] - 1]
        shared = self.pool.reference_counts[tails] > 1
        holders: dict[int, int] = {}
        copying = []
        for slot, block in zip(slots[shared].tolist(), tails[shared].tolist(), strict=True):
            left = holders.get(block, int(self.pool.reference_counts[block]))
            if left > 1:
                copying.append(slot)
            # The last holder writes in place.
            holders[block] = left - 1
        return np.array(copying, np.int32)

    def _copy_on_write(self, plan: Plan, slots: Int32Array) -> None:
        table = self.slots
        indexes = table.block_count[slots] - 1
        shared = table.blocks[slots, indexes]
        plan.copied_slots, plan.copied_indexes = slots, indexes
        plan.copied_blocks = self.pool.allocate(len(slots))
        table.blocks[slots, indexes] = plan.copied_blocks
        # The last holder keeps the block, so none of these references is the last one.
        np.subtract.at(self.pool.reference_counts, shared, ONE)

    def _touch_chunks(self, plan: Plan) -> None:
        admitted = {admission.slot for admission in plan.admissions}
        chunked = np.array([slot for slot in plan.chunk_slots if slot not in admitted], np.int32)
        if len(chunked):
            plan.touched_slots = np.concatenate([plan.touched_slots, chunked])
            # One that is sampled in this step counts its new token in `length` already.
            plan.touched_lengths = np.concatenate([plan.touched_lengths, self.slots.known[chunked]])

    # Prefills.

    def _chunks(self, plan: Plan, budget: int, sampled: list[int]) -> int:
        """Goes on with the prompts that are being computed; returns the budget that is left."""
        for sequence in list(self._prefilling):
            if budget <= 0:
                break
            budget -= self._run_chunk(plan, sequence, budget, sampled)
        return budget

    def _run_chunk(self, plan: Plan, sequence: Sequence, budget: int, sampled: list[int]) -> int:
        table, slot = self.slots, sequence.slot
        left = int(table.length[slot] - table.computed[slot])
        count = min(left, budget, self.limits.chunk_tokens)
        plan.chunk_slots.append(slot)
        plan.chunk_counts.append(count)
        table.computed[slot] += count
        self._publish(sequence)
        if count == left:
            del self._prefilling[sequence]
            sampled.append(slot)
            for child in sequence.group.unforked:
                self._fork(plan, sequence, child)
            self._sampled_first(sequence, sequence.group.unforked)
            sequence.group.unforked = []
        return count

    def _fork(self, plan: Plan, parent: Sequence, child: Sequence) -> None:
        """Makes a reserved sibling share every block of its parent (paper, section 4.4)."""
        table = self.slots
        blocks = table.table(parent.slot)
        table.set_tokens(child.slot, table.known_tokens(parent.slot))
        table.set_blocks(child.slot, blocks)
        table.computed[child.slot] = table.computed[parent.slot]
        self.pool.share(blocks)
        child.hashes, child.published = list(parent.hashes), parent.published
        child.cached = parent.cached
        plan.fork_parents.append(parent.slot)
        plan.fork_children.append(child.slot)
        plan.fork_samples.append(child.sample_index)

    def _sampled_first(self, parent: Sequence, children: list[Sequence]) -> None:
        family = np.array([sequence.slot for sequence in (parent, *children)], np.int32)
        self.slots.length[family] += 1
        self.slots.join(family)

    def _report_beams(
        self, slots: Int32Array, result: StepResult
    ) -> list[tuple[SequenceGroup, list[Hypothesis]]]:
        """Hands candidates to the searches; returns the hypotheses of those that have ended."""
        found = []
        for group in self._branching.report(slots, result):
            if group.beams is not None:
                found.append((group, group.beams.hypotheses(group.request.sample_count)))
            for beam in group.sequences:
                self._retire(beam, FinishReason.STOP)
        return found

    # Admission.

    def _admit(self, plan: Plan, budget: int, sampled: list[int]) -> None:
        if budget <= 0 or not len(self.queue):
            return
        first_swapped = self.slots.order[self.slots.in_host_memory()[:1]]
        carried = 0
        for group in self.queue.in_turn(self.draining):
            if len(first_swapped) and first_swapped[0] < group.order:
                break
            while group.waiting and self._seat_waiting(plan, group, group.waiting[0]):
                sequence = group.waiting[0]
                self.queue.admit(group, sequence)
                carried += len(sequence.tokens)
                budget -= self._run_chunk(plan, sequence, budget, sampled)
                if budget <= 0 or carried >= ADMITTED_TOKENS:
                    return

    def _make_way(self, plan: Plan) -> bool:
        """Preempts who cannot go on, where nobody does, for who comes first; whether there was one.

        Beams that are back wait for their siblings, and may hold the memory that these, or a group
        before theirs, want.
        """
        waiting = [self._next_waiting, *self.swap.groups[:1]]
        first = min((group.order for group in waiting if group is not None), default=None)
        last = self.resident_groups[-1:]
        if first is None or not last or last[0].order <= first:
            return False
        self._preempt(plan, last)
        return True

    @property
    def _next_waiting(self) -> SequenceGroup | None:
        return self.queue.first_begun if self.draining else self.queue.head

    def _room(self) -> tuple[int, int, int]:
        """What admission depends on: available blocks, free slots, and who else runs."""
        return self.pool.available_count, self.slots.free_count, -self._on_device_count

    @property
    def _on_device_count(self) -> int:
        """Sequences that have slots and are not swapped out."""
        return self.running_count - int(np.count_nonzero(self.slots.swapped))

    def _seat_waiting(self, plan: Plan, group: SequenceGroup, sequence: Sequence) -> bool:
        """Admits the first waiting sequence of a group if there is room for it."""
        # Siblings that are resumed follow one another, so that each finds the prompt it shares.
        # That is no want of room, which would have to get better first.
        if any(other.group is group for other in self._prefilling):
            return False
        if self.slots.free_count < len(group.waiting) + len(group.unforked):
            return False
        if self.queue.is_hopeless(group, self._room(), self.pool.holds):
            return False
        size, length = self.limits.block_size, len(sequence.tokens)
        shared = self._computed_prefix(plan, group, sequence)
        if shared is None:
            return False
        fresh = -(-length // size) - len(shared)
        wanted = fresh + self._reserve(group)
        while (lacking := wanted + self.pool.revived_count(shared) - self.pool.available_count) > 0:
            if not self._yield_pinned(group, lacking):
                missing = next(iter(sequence.hashes[len(shared) :]), None)
                self.queue.refuse(group, Refusal(self._room(), fresh, missing))
                return False
        self.pool.share(shared)
        blocks = np.concatenate([shared, self.pool.allocate(fresh)])
        cached = len(shared) * size
        slot = self.slots.occupy(sequence)
        self.slots.set_tokens(slot, sequence.tokens)
        self.slots.set_blocks(slot, blocks)
        # The last token always runs, for its logits; if it is cached it is not written again.
        self.slots.computed[slot] = min(cached, length - 1)
        sequence.published, sequence.cached = len(shared), cached
        plan.admissions.append(Admission(sequence, slot, sequence.tokens, blocks, cached))
        self._prefilling[sequence] = None
        for sibling in group.unforked:
            self.slots.occupy(sibling)
        self._count_admission(group, length, cached)
        group.admitted = True
        return True

    def _computed_prefix(
        self, plan: Plan, group: SequenceGroup, sequence: Sequence
    ) -> Int32Array | None:
        """The blocks that a sequence need not compute: its siblings' prompt, and what is cached.

        A group may fit only if it shares its prompt. So siblings share it even where the cache has
        lost it, because blocks came back from the host or are distrusted, or has a copy of it; but
        not in the plan that computes it, where only hashed blocks are shared: None, to wait for.
        """
        # The first sample's pass reports the prompt's log-probabilities, so it computes all of it.
        reports = group.request.sampling.prompt_logprob_count >= 0
        if reports and sequence is group.sequences[0]:
            return self.pool.match([])
        cached = self.pool.match(sequence.hashes)
        prompt = len(group.request.prompt) // self.limits.block_size
        for sibling in group.resident():
            if self.slots.computed[sibling.slot] >= prompt * self.limits.block_size:
                own = self.slots.table(sibling.slot)[:prompt]
                if np.array_equal(own, cached[:prompt]):
                    return cached
                if any(admission.sequence is sibling for admission in plan.admissions):
                    return None
                return np.concatenate([own, cached[prompt:]])
        return cached

    def _reserve(self, group: SequenceGroup) -> int:
        """Blocks left to others that decode, or admission would only cause preemption."""
        running = self._on_device_count
        if running <= len(group.resident()):
            return 0
        return min(running, -(-self.limits.block_count // 100))

    def _count_admission(self, group: SequenceGroup, length: int, cached: int) -> None:
        if group.preemptions == 0:
            self.totals.prompt_tokens += length
            self.totals.cached_tokens += cached
        else:
            self.totals.recomputed_tokens += length - cached

    # Preemption.

    def _victims(self, short: int) -> list[SequenceGroup]:
        """The last groups, as few as could make up for so many blocks.

        A sequence gives back at most its table, the block that it would cross into and the copy
        that it would make, so each group that is returned is needed.
        """
        slots = self.slots.on_device()[::-1]
        gains = (self.slots.block_count[slots] + 2).cumsum()
        count = int(gains.searchsorted(short)) + 1
        return self.slots.groups_of(slots[:count])

    def _yield_pinned(self, group: SequenceGroup, count: int) -> bool:
        """Gives up pinned blocks if nobody but this group is on the device; whether there were."""
        if not self.pool.idle_pinned_count:
            return False
        alone = all(other is group for other in self.resident_groups)
        return alone and self.pool.yield_pinned(count)

    def _preempt(self, plan: Plan, groups: list[SequenceGroup]) -> None:
        """Takes whole groups' blocks, by whichever way costs less."""
        self.totals.preemptions += len(groups)
        room, swapped = self._swapping_room, []
        for group in groups:
            group.preemptions += 1
            blocks = self._blocks_to_swap(group) if room else 0
            if 0 < blocks <= room:
                room -= blocks
                swapped.append(group)
            else:
                if self._branching.has_branched(group):
                    # An engine swaps before its beams go on, so these are computed again.
                    self._branching.undo(plan, group)
                plan.taken_off += [(sequence, sequence.slot) for sequence in group.resident()]
                self._take_off(group)
        if swapped:
            slots = [seq.slot for group in swapped for seq in group.sequences if seq.slot >= 0]
            plan.swapped_out.append(self.swap.swap_out(np.array(slots, np.int32)))
            self.totals.swaps += len(swapped)
            self.totals.swapped_out_blocks += len(plan.swapped_out[-1].sources)

    @property
    def _swapping_room(self) -> int:
        """Host blocks that may be swapped to now; none where recomputing costs less."""
        forced = self.limits.preemption
        if forced == "recompute" or (
            forced == "auto" and not self.costs.swaps(self.limits.block_size)
        ):
            return 0
        return self.swap.pool.available_count

    def _blocks_to_swap(self, group: SequenceGroup) -> int:
        """How many blocks a group would swap; 0 if not all of it is decoding."""
        if group.waiting or group.unforked or self._branching.has_branched(group):
            return 0
        if len(group.sequences) == 1:
            sequence = group.sequences[0]
            if self._prefilling and sequence in self._prefilling:
                return 0
            return self.slots.block_count.item(sequence.slot)
        if any(sequence in self._prefilling for sequence in group.sequences):
            return 0
        return len(self.swap.blocks_of(group))

    def _swap_in(self, plan: Plan) -> None:
        """Brings swapped groups back, first come first; they decode from the next plan on.

        Not in a plan that swaps out: it would read host blocks after others were written there.
        """
        if plan.swapped_out or not self.slots.swapped.any():
            return
        if not len(self.slots.on_device()):
            # Alone on the engine a group has room, and has to come back whoever waits.
            group = self.swap.groups[0]
            lacking = len(self.swap.blocks_of(group)) - self.pool.available_count
            if lacking > 0:
                self.pool.yield_pinned(lacking)
            self._bring_back(plan, self.slots.of(group))
        # Room to write on, so that coming back does not cause the next preemption.
        margin = self.running_count // self.limits.block_size
        slots = self.swap.returning(self.pool.available_count, margin)
        if (head := self._next_waiting) is not None:
            slots = slots[self.slots.order[slots] < head.order]
        self._bring_back(plan, slots)

    def _bring_back(self, plan: Plan, slots: Int32Array) -> None:
        if len(slots):
            plan.swapped_in.append(self.swap.swap_in(slots))
            self.totals.swapped_in_blocks += len(plan.swapped_in[-1].sources)
            self.slots.join(slots)

    def _take_off(self, group: SequenceGroup) -> None:
        """Releases a whole group; what it had computed stays cached while it can."""
        prompt = len(group.request.prompt)
        resident = group.resident()
        begun = any(self.slots.length[seq.slot] > prompt for seq in resident)
        if group.beams and not group.unforked:
            self._branching.settle(group, group.beams)
        for sequence in resident:
            if sequence not in group.unforked and group.beams is None:
                sequence.tokens = self.slots.known_tokens(sequence.slot).copy()
            self._vacate(sequence)
            if group.beams:
                # What it is to go on from may be another beam's tokens; the prompt is the same.
                sequence.hashes = list(group.request.hashes)
        unfinished = [sequence for sequence in group.sequences if sequence.finish is None]
        if begun or any(len(sequence.tokens) > prompt for sequence in unfinished):
            group.waiting, group.unforked = unfinished, []
        else:
            group.waiting, group.unforked = unfinished[:1], unfinished[1:]
        self.queue.push(group)

    # Endings.

    def _retire(self, sequence: Sequence, reason: FinishReason, *, publish: bool = True) -> None:
        group = sequence.group
        sequence.finish = reason
        if sequence.slot >= 0:
            self._vacate(sequence, publish=publish)
        if sequence in group.unforked:
            group.unforked.remove(sequence)
        if sequence in group.waiting:
            self.queue.take(group, sequence)

    def _fail(
        self,
        slot: int,
        flight: _InFlight,
        reason: str,
        finished: list[tuple[Sequence, FinishReason, str]],
    ) -> None:
        sequence = self.slots.owner[slot]
        serials = [*flight.serials[flight.slots == slot].tolist(), flight.chunks.get(slot)]
        if sequence is None or self.slots.serial[slot] not in serials:
            return
        # Nobody may build on what this sequence computed, wherever it is by now.
        if self.slots.swapped[slot]:
            self.pool.forget_hashes(sequence.hashes[: sequence.published])
        else:
            self.pool.forget(self.slots.table(slot))
        group = sequence.group
        for failed in group.sequences if group.beams else (sequence, *group.unforked):
            self._retire(failed, FinishReason.ERROR, publish=False)
            if failed.sample_index < group.request.sample_count:
                finished.append((failed, FinishReason.ERROR, reason))

    def _vacate(self, sequence: Sequence, *, publish: bool = True) -> None:
        slot = sequence.slot
        if self.slots.swapped[slot]:
            self.swap.pool.release(self.slots.table(slot))
            self._released.append(slot)
        elif self.slots.block_count[slot]:
            if publish:
                self._publish(sequence, generated=True)
            self.pool.release(self.slots.table(slot))
            self._released.append(slot)
        self._prefilling.pop(sequence, None)
        self.slots.vacate(slot)

    def _publish(self, sequence: Sequence, generated: bool = False) -> None:
        """Gives the pool the hashes of blocks that are full with known tokens.

        Generated blocks are hashed once, when the sequence leaves its slot: by then they are worth
        something to others (the next turn of a chat), and a steady step stays free of hashing.
        """
        table, slot = self.slots, sequence.slot
        full = min(table.known[slot], table.computed[slot]) // self.limits.block_size
        if generated and full > len(sequence.hashes):
            tokens = table.tokens[slot, : full * self.limits.block_size]
            shared = sequence.group.request.shared_blocks
            sequence.hashes += self._hasher(sequence).extend(sequence.hashes, tokens, shared)
        full = min(full, len(sequence.hashes))
        blocks, request = table.blocks[slot], sequence.group.request
        for index in range(sequence.published, full):
            tenant = request.tenant_of(index)
            self.pool.publish(int(blocks[index]), sequence.hashes[index], tenant)
        sequence.published = max(sequence.published, int(full))

    def _hasher(self, sequence: Sequence) -> PrefixHasher:
        salt = sequence.group.request.salt
        if salt not in self._hashers:
            self._hashers[salt] = PrefixHasher(
                self.limits.model_fingerprint, self.limits.block_size, salt
            )
        return self._hashers[salt]

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals
