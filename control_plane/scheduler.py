"""The scheduler: decides each step for one engine (paper, section 4.5).

Pure: no I/O, no clock, no randomness. `submit` and `cancel` say what is wanted, `schedule` gives
the next step plan, `apply` takes a result. Plans may be ahead of results: the engine feeds its own
last token into the next step, so a plan only needs to know how many tokens there will be. A
sequence that turns out to have ended meanwhile wastes the steps in flight, nothing more: results
are matched with the serial number of a slot's occupant.

Policies: by priority, then first come, first served; decodes first, then chunks of prompts under a
token budget. Out of blocks, the group that is last in that same order is preempted whole: swapped
out to host memory, or released and later recomputed from its tokens, minus what the prefix cache
still has, whichever costs less. A group that was preempted comes back before any that came later.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from control_plane.beams import BeamSearch, Hypothesis
from control_plane.blocks import BlockPool, Int32Array
from control_plane.hashing import PrefixHasher
from control_plane.plan import Admission, Outcome, Plan, ResidentRow, StepResult
from control_plane.request import FinishReason, Request, Sequence, SequenceGroup, ended_at
from control_plane.slots import SlotTable
from control_plane.swapping import CostModel, SwapSpace

# Token ids that one plan's admissions carry, at most by one prompt more: four megabytes of message.
ADMITTED_TOKENS = 1 << 20


class QueueFull(Exception):
    """The wait queue is at its limit; nothing was queued.

    Attributes:
        excess_tokens: prompt tokens that must leave the queue before the request fits.
    """

    def __init__(self, message: str, excess_tokens: int) -> None:
        super().__init__(message)
        self.excess_tokens = excess_tokens


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


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A plan whose result is awaited: who is sampled, and who runs a chunk, by slot and serial.

    moved_blocks, chunk_tokens: what its timings are for.
    """

    step: int
    slots: Int32Array
    serials: npt.NDArray[np.int64]
    chunks: dict[int, int]
    moved_blocks: int
    chunk_tokens: int


@dataclass(slots=True)
class Totals:
    """Counters since this scheduler began."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    recomputed_tokens: int = 0


class Scheduler:
    """Schedules one engine. Every call costs O(changes) and a few vector operations."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.block_count)
        self.slots = SlotTable(limits.slot_count, limits.max_length, limits.block_size)
        self.swap = SwapSpace(limits.host_block_count, self.pool, self.slots)
        self.costs = CostModel()
        self.totals = Totals()
        self._hashers: dict[str, PrefixHasher] = {}
        self._arrivals = 0
        self._step = 0
        self._waiting: list[SequenceGroup] = []
        self._resident: dict[SequenceGroup, None] = {}
        self._prefilling: list[Sequence] = []
        # Consumed by the next plan.
        self._unwanted: list[SequenceGroup] = []
        self._released: list[int] = []
        self._joining: list[Sequence] = []
        self._leaving: list[Int32Array] = []
        self._forked: list[Sequence] = []
        # Searches whose beams know how to go on, and those whose beams do so in the present plan.
        self._branching: list[SequenceGroup] = []
        self._branched: list[SequenceGroup] = []
        self._in_flight: deque[_InFlight] = deque()
        # The head of the queue when it was last refused, and the room there was for it.
        self._refused: tuple[Sequence, int, int, int] | None = None

    # What is wanted.

    def submit(self, request: Request) -> SequenceGroup:
        """Queues a request.

        Raises:
            NeverFits: it could not run even alone.
            QueueFull: too many requests or tokens wait.
        """
        self.check_fits(request)
        self._check_queue(request)
        group = SequenceGroup.of(request, self._next_arrival())
        self._enqueue(group)
        return group

    def resubmit(self, group: SequenceGroup) -> None:
        """Queues a group that was resident elsewhere; its sequences carry their tokens so far."""
        group.arrival = self._next_arrival()
        self._enqueue(group)

    def _check_queue(self, request: Request) -> None:
        """An empty queue takes a prompt of any length."""
        waiting, queued = len(self._waiting), self._queued_tokens
        if waiting >= self.limits.waiting_requests:
            share = queued // max(waiting, 1)
            raise QueueFull(f"{waiting} requests wait already", share)
        excess = queued + len(request.prompt) - self.limits.waiting_tokens
        if waiting and excess > 0:
            raise QueueFull(f"{queued} prompt tokens wait already", excess)

    @property
    def _queued_tokens(self) -> int:
        return sum(len(seq.tokens) for group in self._waiting for seq in group.waiting)

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
        self._branched = []
        for group in dict.fromkeys(self._unwanted):
            if group in self._resident:
                self._preempt(plan, group)
        self._unwanted = []
        self._branch_beams(plan)
        run = self._decodes(plan)
        plan.decode_count = len(run)
        self._swap_in(plan)
        budget = self._chunks(plan, self.limits.step_tokens - len(run), sampled)
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
        self._in_flight.append(_InFlight(plan.step, slots, serials, chunks, moved, chunked))
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
        if not current.all():
            slots, tokens = slots[current], tokens[current]
        table.tokens[slots, table.known[slots]] = tokens
        table.known[slots] += 1
        beams = table.beam[slots]
        hypotheses = self._report_beams(slots[beams], result) if beams.any() else []
        if beams.any():
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
        return Outcome(
            sequences, slots, tokens, finished, result.logprobs, prompt_logprobs, hypotheses
        )

    @property
    def steps_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait to be computed: of queued requests, and of prompts begun."""
        begun = [sequence.slot for sequence in self._prefilling]
        return self._queued_tokens + int(
            (self.slots.length[begun] - self.slots.computed[begun]).sum()
        )

    @property
    def running_count(self) -> int:
        return self.limits.slot_count - self.slots.free_count

    @property
    def groups(self) -> list[SequenceGroup]:
        """Resident, swapped and waiting groups; one may be resident and wait, while resumed."""
        return list(dict.fromkeys([*self._resident, *self.swap.groups, *self._waiting]))

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
        for block in row.blocks.tolist():
            digest = self.pool.hash_of(block)
            if digest is None:
                break
            sequence.hashes.append(digest)
        sequence.published = len(sequence.hashes)

    def _resume_group(self, group: SequenceGroup) -> None:
        group.arrival, group.admitted = self._next_arrival(), True
        prompt = len(group.request.prompt)
        resident = group.resident()
        swapped = bool(self.slots.swapped[[sequence.slot for sequence in resident]].any())
        if swapped:
            bisect.insort(self.swap.groups, group, key=lambda swapped: swapped.order)
        else:
            self._resident[group] = None
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
                self._joining.append(sequence)
                if self.slots.computed[slot] % self.limits.block_size:
                    self._forked.append(sequence)  # Its last block may still be shared.
            else:
                self._prefilling.append(sequence)
        if group.waiting:
            self._enqueue(group)
        if swapped and absent and group in self.swap.groups:
            # Only whole groups are swapped; this one has lost a part.
            self._take_off(group)

    # Decodes.

    def _decodes(self, plan: Plan) -> Int32Array:
        """Gives every decoding sequence room for one more token; returns their slots, ascending."""
        table, size = self.slots, self.limits.block_size
        joining = np.array([seq.slot for seq in self._joining if seq.slot >= 0], np.int32)
        joining = joining[~table.swapped[joining]]
        leaving = np.concatenate(self._leaving) if self._leaving else joining[:0]
        leaving = leaving[table.decoding[leaving]]
        self._joining, self._leaving = [], []
        table.decoding[leaving] = False
        table.decoding[joining] = True
        while True:
            run = np.flatnonzero(table.decoding).astype(np.int32)
            copying = self._shared_tails()
            crossing = run[table.computed[run] == table.block_count[run] * size]
            if len(crossing) + len(copying) <= self.pool.available_count:
                break
            self._preempt(plan, max(self._resident, key=lambda group: group.order))
        self._forked = []
        plan.decode_joins = joining[table.decoding[joining]] if len(joining) else joining
        if len(leaving):
            here = (table.block_count[leaving] > 0) & ~table.swapped[leaving]
            plan.decode_leaves = leaving[here]
        if len(crossing):
            blocks = self.pool.allocate(len(crossing))
            table.blocks[crossing, table.block_count[crossing]] = blocks
            table.block_count[crossing] += 1
            plan.appended_slots, plan.appended_blocks = crossing, blocks
        if copying:
            self._copy_on_write(plan, np.array(copying, np.int32))
        plan.touched_slots = np.concatenate([crossing, plan.decode_joins, plan.copied_slots])
        plan.touched_lengths = table.length[plan.touched_slots]
        table.computed[run] += 1
        table.length[run] += 1
        # Beams pause after each step, until it is known which of them go on.
        ended = run[(table.length[run] >= table.limit[run]) | table.beam[run]]
        if len(ended):
            self._leaving.append(ended)
        return run

    def _shared_tails(self) -> list[int]:
        """Freshly forked slots that must copy their last block before they write into it."""
        holders: dict[int, int] = {}
        copying = []
        for sequence in self._forked:
            slot = sequence.slot
            if slot < 0 or not self.slots.decoding[slot]:
                continue
            block = int(self.slots.blocks[slot, self.slots.block_count[slot] - 1])
            left = holders.setdefault(block, int(self.pool.reference_counts[block]))
            if left > 1:
                copying.append(slot)
                holders[block] = left - 1
        return copying

    def _copy_on_write(self, plan: Plan, slots: Int32Array) -> None:
        table = self.slots
        indexes = table.block_count[slots] - 1
        shared = table.blocks[slots, indexes]
        plan.copied_slots, plan.copied_indexes = slots, indexes
        plan.copied_blocks = self.pool.allocate(len(slots))
        table.blocks[slots, indexes] = plan.copied_blocks
        # The last holder keeps the block, so none of these references is the last one.
        np.subtract.at(self.pool.reference_counts, shared, 1)

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
            self._prefilling.remove(sequence)
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
        table = self.slots
        family = [parent, *children]
        for sequence in family:
            table.length[sequence.slot] += 1
            if (
                parent.group.beams is None
                and table.length[sequence.slot] < table.limit[sequence.slot]
            ):
                self._joining.append(sequence)
        partial = table.computed[parent.slot] % self.limits.block_size
        if children and partial and parent.group.beams is None:
            self._forked += family

    # Beams.

    def _branch_beams(self, plan: Plan) -> None:
        """Lets every search whose results are in take its next step, unless it is swapped out."""
        ready = [group for group in self._branching if group in self._resident]
        self._branching = [
            group
            for group in self._branching
            if group not in ready and group.beams and group.beams.moves and not group.finished
        ]
        self._branched = [group for group in ready if group.beams and group.beams.moves]
        for group in self._branched:
            self._branch(plan, group)

    def _branch(self, plan: Plan, group: SequenceGroup) -> None:
        """Makes each beam a copy of its parent with another last token (paper, section 4.4)."""
        search, table = group.beams, self.slots
        if search is None:
            return
        moves = search.take_moves()
        slots = [group.sequences[move.beam].slot for move in moves]
        parents = [group.sequences[move.parent].slot for move in moves]
        last = search.length - 1
        tokens = table.tokens[parents, :last]
        tables = [table.table(parent).copy() for parent in parents]
        hashes = [list(group.sequences[move.parent].hashes) for move in moves]
        published = [group.sequences[move.parent].published for move in moves]
        dropped = [table.table(slot).copy() for slot in slots]
        for blocks in tables:
            self.pool.share(blocks)
        for blocks in dropped:
            self.pool.release(blocks)
        for at, move in enumerate(moves):
            sequence, slot = group.sequences[move.beam], slots[at]
            table.set_blocks(slot, tables[at])
            table.tokens[slot, :last] = tokens[at]
            table.tokens[slot, last] = move.token
            sequence.hashes, sequence.published = hashes[at], published[at]
            self._joining.append(sequence)
            if table.computed[slot] % self.limits.block_size:
                self._forked.append(sequence)
        plan.beam_slots += slots
        plan.beam_parents += parents
        plan.beam_tokens += [move.token for move in moves]

    def _report_beams(
        self, slots: Int32Array, result: StepResult
    ) -> list[tuple[SequenceGroup, list[Hypothesis]]]:
        """Hands candidates to the searches; returns the hypotheses of those that have ended."""
        found = []
        for slot in slots.tolist():
            sequence = self.slots.owner[slot]
            group = sequence.group
            search = group.beams
            if not search.report(sequence.sample_index, result.logprobs[slot].top):
                continue
            search.advance(lambda beam, group=group: self._tokens_of(group.sequences[beam]))
            if search.done:
                found.append((group, search.hypotheses(group.request.sample_count)))
                for beam in group.sequences:
                    self._retire(beam, FinishReason.STOP)
            else:
                self._branching.append(group)
        return found

    def _tokens_of(self, sequence: Sequence) -> Int32Array:
        """A resident sequence's row of tokens; how many of them count, others know."""
        row: Int32Array = self.slots.tokens[sequence.slot]
        return row

    def _settle_beams(self, group: SequenceGroup, search: BeamSearch) -> None:
        """Gives the resident beams of a group that is taken off the tokens to go on from."""
        moves, last = search.take_moves(), search.length - 1
        rows = {
            beam: self._tokens_of(sequence)[: search.length].copy()
            for beam, sequence in enumerate(group.sequences)
            if sequence.slot >= 0
        }
        for move in moves:
            tokens = np.append(rows[move.parent][:last], np.int32(move.token))
            group.sequences[move.beam].tokens = tokens.astype(np.int32)
        if not moves:
            for beam, row in rows.items():
                group.sequences[beam].tokens = row
        search.forget_reports()

    # Admission.

    def _admit(self, plan: Plan, budget: int, sampled: list[int]) -> None:
        carried = 0
        while self._waiting and budget > 0 and carried < ADMITTED_TOKENS:
            group = self._waiting[0]
            if self.swap.groups and self.swap.groups[0].order < group.order:
                break
            sequence = group.waiting[0]
            # Siblings that are resumed follow one another, so that each finds the prompt it
            # shares. That is no want of room, which would have to get better first.
            if any(other.group is group for other in self._prefilling):
                break
            if self._hopeless(sequence) or not self._seat_waiting(plan, group, sequence):
                self._refused = (sequence, *self._room())
                break
            carried += len(sequence.tokens)
            group.waiting.pop(0)
            if not group.waiting:
                self._waiting.pop(0)
            budget -= self._run_chunk(plan, sequence, budget, sampled)

    def _room(self) -> tuple[int, int, int]:
        """What admission depends on: available blocks, free slots, and who else runs."""
        return self.pool.available_count, self.slots.free_count, -self.running_count

    def _hopeless(self, sequence: Sequence) -> bool:
        """Whether a sequence was refused before and nothing has got better for it since.

        Spares a long prompt at the head of the queue a lookup of all its hashes in every step.
        """
        refused, *room = self._refused or (None, 0, 0, 0)
        return refused is sequence and all(
            now <= then for now, then in zip(self._room(), room, strict=True)
        )

    def _seat_waiting(self, plan: Plan, group: SequenceGroup, sequence: Sequence) -> bool:
        """Admits the first waiting sequence of the first group if there is room for it."""
        if self.slots.free_count < len(group.waiting) + len(group.unforked):
            return False
        size, length = self.limits.block_size, len(sequence.tokens)
        # The first sample's pass reports the prompt's log-probabilities, so it computes all of it.
        reports = group.request.sampling.prompt_logprob_count >= 0
        reuse = not reports or sequence is not group.sequences[0]
        shared = self.pool.match(sequence.hashes if reuse else [])
        fresh = -(-length // size) - len(shared)
        reviving = int(np.count_nonzero(self.pool.reference_counts[shared] == 0))
        # A few blocks stay free for those that decode, or admission would only cause preemption.
        reserve = min(self.running_count, -(-self.limits.block_count // 100))
        if fresh + reviving + reserve > self.pool.available_count:
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
        self._prefilling.append(sequence)
        for sibling in group.unforked:
            self.slots.occupy(sibling)
        self._count_admission(group, length, cached)
        self._resident[group] = None
        group.admitted = True
        return True

    def _count_admission(self, group: SequenceGroup, length: int, cached: int) -> None:
        if group.preemptions == 0:
            self.totals.prompt_tokens += length
            self.totals.cached_tokens += cached
        else:
            self.totals.recomputed_tokens += length - cached

    # Preemption.

    def _preempt(self, plan: Plan, group: SequenceGroup) -> None:
        """Takes a whole group's blocks, by whichever way costs less."""
        group.preemptions += 1
        self.totals.preemptions += 1
        del self._resident[group]
        branched = group in self._branched
        if branched:
            # An engine swaps before its beams go on, so these are computed again.
            self._unbranch(plan, group)
        if not branched and self._is_cheaper_to_swap(group):
            plan.swapped_out.append(self.swap.swap_out(group))
            self.totals.swaps += 1
            self.totals.swapped_out_blocks += len(plan.swapped_out[-1].sources)
        else:
            self._take_off(group)

    def _unbranch(self, plan: Plan, group: SequenceGroup) -> None:
        """Takes a group's beams out of a plan that is being made; its slots will be released."""
        slots = {sequence.slot for sequence in group.sequences}
        kept = [at for at, slot in enumerate(plan.beam_slots) if slot not in slots]
        for name in ("beam_slots", "beam_parents", "beam_tokens"):
            setattr(plan, name, [getattr(plan, name)[at] for at in kept])

    def _is_cheaper_to_swap(self, group: SequenceGroup) -> bool:
        """Whether the group can be swapped and should be; one that is not all decoding cannot."""
        begun = not group.waiting and not group.unforked
        if not begun or any(sequence in self._prefilling for sequence in group.resident()):
            return False
        blocks = len(self.swap.blocks_of(group))
        if blocks > self.swap.pool.available_count or self.limits.preemption == "recompute":
            return False
        tokens = blocks * self.limits.block_size
        cheaper = self.costs.swap_us(blocks) <= self.costs.recompute_us(tokens)
        return cheaper or self.limits.preemption == "swap"

    def _swap_in(self, plan: Plan) -> None:
        """Brings swapped groups back, first come first; they decode from the next plan on.

        Not in a plan that swaps out: it would read host blocks after others were written there.
        """
        while self.swap.groups and not plan.swapped_out:
            group = self.swap.groups[0]
            precedes = bool(self._waiting) and self._waiting[0].order < group.order
            blocks, sequences = len(self.swap.blocks_of(group)), len(group.resident())
            # Room to write on, so that coming back does not cause the next preemption. Alone on
            # the engine a group has that anyway, and has to come back whoever waits.
            room = blocks + 2 * sequences + self.running_count // self.limits.block_size
            if self._resident and (precedes or room > self.pool.available_count):
                break
            plan.swapped_in.append(self.swap.swap_in(group))
            self.totals.swapped_in_blocks += blocks
            self._resident[group] = None
            self._rejoin(group)

    def _rejoin(self, group: SequenceGroup) -> None:
        """Lets a group decode that is on the device again; tails may be shared since a fork."""
        for sequence in group.resident() if group.beams is None else []:
            slot = sequence.slot
            if self.slots.length[slot] < self.slots.limit[slot]:
                self._joining.append(sequence)
                if self.slots.computed[slot] % self.limits.block_size:
                    self._forked.append(sequence)

    def _take_off(self, group: SequenceGroup) -> None:
        """Releases a whole group; what it had computed stays cached while it can."""
        prompt = len(group.request.prompt)
        resident = group.resident()
        begun = any(self.slots.length[seq.slot] > prompt for seq in resident)
        if group.beams and not group.unforked:
            self._settle_beams(group, group.beams)
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
        if group not in self._waiting:
            self._enqueue(group)

    # Endings.

    def _retire(self, sequence: Sequence, reason: FinishReason, *, publish: bool = True) -> None:
        group = sequence.group
        sequence.finish = reason
        if sequence.slot >= 0:
            self._vacate(sequence, publish=publish)
        for queue in (group.waiting, group.unforked):
            if sequence in queue:
                queue.remove(sequence)
        if not group.waiting and group in self._waiting:
            self._waiting.remove(group)
        if group.finished:
            self._resident.pop(group, None)

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
        # Nobody may build on what this sequence computed.
        if not self.slots.swapped[slot]:
            self.pool.forget(self.slots.table(slot))
        group = sequence.group
        for failed in group.sequences if group.beams else (sequence, *group.unforked):
            self._retire(failed, FinishReason.ERROR, publish=False)
            if failed.sample_index < group.request.sample_count:
                finished.append((failed, FinishReason.ERROR, reason))

    def _vacate(self, sequence: Sequence, *, publish: bool = True) -> None:
        slot = sequence.slot
        if self.slots.swapped[slot]:
            self.swap.drop(sequence)
            self._released.append(slot)
        elif self.slots.block_count[slot]:
            if publish:
                self._publish(sequence, generated=True)
            self.pool.release(self.slots.table(slot))
            self._released.append(slot)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
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
            sequence.hashes += self._hasher(sequence).extend(sequence.hashes, tokens)
        full = min(full, len(sequence.hashes))
        blocks = table.blocks[slot]
        for index in range(sequence.published, full):
            self.pool.publish(int(blocks[index]), sequence.hashes[index])
        sequence.published = max(sequence.published, int(full))

    def _hasher(self, sequence: Sequence) -> PrefixHasher:
        salt = sequence.group.request.salt
        if salt not in self._hashers:
            self._hashers[salt] = PrefixHasher(
                self.limits.model_fingerprint, self.limits.block_size, salt
            )
        return self._hashers[salt]

    def _enqueue(self, group: SequenceGroup) -> None:
        bisect.insort(self._waiting, group, key=lambda waiting: waiting.order)

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals
