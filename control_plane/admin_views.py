"""The messages of the admin API, made of what a replica holds. Knows pb2."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from control_plane.blocks import BlockPool
from control_plane.leader import EngineLeader, LeaderState
from control_plane.prefixes.explainer import Explanation
from control_plane.prefixes.keeper import Standing
from control_plane.prefixes.registered import Definition
from control_plane.prefixes.stats import PrefixHits
from control_plane.prefixes.store import Saved
from control_plane.request import Sequence
from control_plane.scheduler import Scheduler
from protos.admin.v1 import admin_pb2 as pb

_STATES = {
    LeaderState.CONNECTING: pb.ENGINE_STATE_CONNECTING,
    LeaderState.LED: pb.ENGINE_STATE_LED,
    LeaderState.FOLLOWED: pb.ENGINE_STATE_FOLLOWED,
}


# Of a registered prefix; a list of whole ones would not fit a message.
SHOWN_CHARACTERS = 256


def engine_id(leader: EngineLeader) -> str:
    return leader.facts.engine_id if leader.facts else ""


def engine(leader: EngineLeader) -> pb.Engine:
    shown = pb.Engine(
        engine_id=engine_id(leader),
        address=leader.link.address,
        state=_STATES[leader.state],
        epoch=leader.epoch,
        leader_address=leader.leader_at.inference,
        draining=leader.draining,
    )
    if leader.facts is not None:
        shown.model = leader.facts.model
        shown.incarnation = leader.facts.incarnation
        shown.block_size_tokens = leader.facts.block_size
        shown.block_count = leader.facts.block_count
    if (failure := leader.last_failure) is not None:
        shown.last_failure = failure.sentence
        shown.last_failure_age_seconds = time.monotonic() - failure.at
    if (loop := leader.loop) is not None:
        _add_pool(shown, loop.scheduler)
        shown.step = loop.step
        timings = loop.counters.timings
        steps = 1e6 * max(timings.steps, 1)
        shown.mean_queue_seconds = timings.queue_us / steps
        shown.mean_moves_seconds = timings.moves_us / steps
        shown.mean_forward_seconds = timings.forward_us / steps
        shown.mean_sample_seconds = timings.sample_us / steps
        shown.prefix_hit_token_count = loop.counters.hit_tokens
        shown.prefix_query_token_count = loop.counters.prompt_tokens
    return shown


def _add_pool(shown: pb.Engine, scheduler: Scheduler) -> None:
    pool, totals = scheduler.pool, scheduler.totals
    shown.free_block_count = pool.free_count
    shown.cached_block_count = pool.cached_count
    shown.pinned_block_count = pool.idle_pinned_count
    shown.used_block_count = pool.used_count
    shown.host_block_count = scheduler.limits.host_block_count
    shown.used_host_block_count = scheduler.swap.pool.used_count
    shown.running_sequence_count = scheduler.running_count
    shown.waiting_request_count = scheduler.waiting_count
    shown.swapped_sequence_count = int(np.count_nonzero(scheduler.slots.swapped))
    shown.preemption_count = totals.preemptions
    shown.swap_count = totals.swaps


def sequence(leader: EngineLeader, scheduler: Scheduler, sequence: Sequence) -> pb.Sequence:
    request, slot, table = sequence.group.request, sequence.slot, scheduler.slots
    resident = slot >= 0
    length = int(table.known[slot]) if resident else len(sequence.tokens)
    state = pb.SEQUENCE_STATE_WAITING
    if resident:
        prefilling = table.computed[slot] < len(request.prompt)
        state = pb.SEQUENCE_STATE_PREFILL if prefilling else pb.SEQUENCE_STATE_DECODE
        if table.swapped[slot]:
            state = pb.SEQUENCE_STATE_SWAPPED
    return pb.Sequence(
        engine_id=engine_id(leader),
        request_id=request.request_id,
        sample=sequence.sample_index,
        state=state,
        slot=slot,
        prompt_token_count=len(request.prompt),
        cached_token_count=sequence.cached,
        output_token_count=max(length - len(request.prompt), 0),
        block_count=int(table.block_count[slot]) if resident else 0,
        priority=request.priority,
        tenant=request.salt,
    )


def block_table(scheduler: Scheduler, slot: int) -> list[pb.BlockEntry]:
    pool = scheduler.swap.pool if scheduler.slots.swapped[slot] else scheduler.pool
    return [
        pb.BlockEntry(
            block_id=block,
            reference_count=int(pool.reference_counts[block]),
            prefix_hash=pool.hash_of(block) or b"",
        )
        for block in scheduler.slots.table(slot).tolist()
    ]


def block_map(scheduler: Scheduler) -> pb.GetBlockMapResponse:
    host = scheduler.swap.pool
    host_states = np.where(
        host.reference_counts > 0, pb.BLOCK_STATE_USED, pb.BLOCK_STATE_FREE
    ).astype(np.uint8)
    return pb.GetBlockMapResponse(
        states=_states(scheduler.pool).tobytes(), host_states=host_states.tobytes()
    )


def _states(pool: BlockPool) -> npt.NDArray[np.uint8]:
    states = np.full(pool.block_count, pb.BLOCK_STATE_FREE, np.uint8)
    states[pool.hashed] = pb.BLOCK_STATE_CACHED
    states[pool.hashed & pool.pinned] = pb.BLOCK_STATE_PINNED
    states[pool.reference_counts == 1] = pb.BLOCK_STATE_USED
    states[pool.reference_counts > 1] = pb.BLOCK_STATE_SHARED
    return states


def prefix(hits: PrefixHits, model: str) -> pb.Prefix:
    """Without who holds it, and whether it is pinned."""
    return pb.Prefix(
        prefix_hash=hits.digest,
        name=hits.name,
        model=model,
        token_count=hits.token_count,
        hit_count=hits.hits,
        saved_token_count=hits.saved_tokens,
        idle_seconds=time.monotonic() - hits.last_hit,
        tenant=hits.tenant,
        shared=hits.shared,
    )


def explanation(found: Explanation, request_id: str = "") -> pb.Explanation:
    size = found.facts.block_size
    return pb.Explanation(
        request_id=request_id,
        model=found.facts.model,
        tenant=found.tenant,
        engine_id=found.facts.engine_id,
        block_size_tokens=size,
        prompt_token_count=found.prompt_tokens,
        cached_token_count=found.cached,
        age_seconds=found.age,
        registered_prefix=found.shared.name,
        shared_token_count=found.shared.block_count * size,
        predicted_token_count=found.predicted,
        spans=[
            pb.BlockSpan(
                first_block=span.first_block,
                block_count=span.block_count,
                token_count=span.token_count,
                outcome=f"LOOKUP_OUTCOME_{span.outcome.name}",
                engine_ids=span.engine_ids,
                evicted_seconds_before=0.0
                if span.evicted_at is None
                else found.asked_at - span.evicted_at,
                tenant=span.tenant,
                model=span.model,
            )
            for span in found.spans
        ],
    )


def registered_prefix(
    definition: Definition, standings: Iterable[Standing], saved: Saved
) -> pb.RegisteredPrefix:
    return pb.RegisteredPrefix(
        name=definition.name,
        form=pb.PREFIX_FORM_SYSTEM if definition.system else pb.PREFIX_FORM_PLAIN,
        text=definition.text[:SHOWN_CHARACTERS],
        pinned=definition.pinned,
        declared=definition.declared,
        hit_count=saved.hits,
        saved_token_count=saved.tokens,
        engines=[
            pb.RegisteredPrefixEngine(
                engine_id=each.facts.engine_id,
                model=each.facts.model,
                shared_token_count=each.shared_tokens,
                held_token_count=each.held_tokens,
                warming=each.warming,
                problem=each.problem,
                known=each.known,
            )
            for each in standings
        ],
    )
