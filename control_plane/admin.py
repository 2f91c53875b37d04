"""The admin API: what this replica's engines hold. Knows grpc and pb2."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import TypeVar

import grpc

from control_plane.leader import EngineLeader, LeaderState
from control_plane.request import Sequence
from control_plane.router import Router
from control_plane.scheduler import Scheduler
from protos import wire
from protos.admin.v1 import admin_pb2 as pb
from protos.admin.v1 import admin_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100

_STATES = {
    LeaderState.CONNECTING: pb.ENGINE_STATE_CONNECTING,
    LeaderState.LED: pb.ENGINE_STATE_LED,
    LeaderState.FOLLOWED: pb.ENGINE_STATE_FOLLOWED,
}
Item = TypeVar("Item")


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """Reads the leaders' state; changes nothing."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def ListEngines(
        self, message: pb.ListEnginesRequest, context: wire.Context
    ) -> pb.ListEnginesResponse:
        engines = [_engine(leader) for leader in self._router.leaders]
        page, token = await _page(engines, message.page_size, message.page_token, context)
        return pb.ListEnginesResponse(engines=page, next_page_token=token)

    async def ListSequences(
        self, message: pb.ListSequencesRequest, context: wire.Context
    ) -> pb.ListSequencesResponse:
        sequences = [
            _sequence(leader, scheduler, sequence)
            for leader, scheduler in self._led(message.engine_id)
            for group in scheduler.groups
            for sequence in group.sequences
            if sequence.finish is None
        ]
        page, token = await _page(sequences, message.page_size, message.page_token, context)
        return pb.ListSequencesResponse(sequences=page, next_page_token=token)

    async def GetBlockTable(
        self, message: pb.GetBlockTableRequest, context: wire.Context
    ) -> pb.GetBlockTableResponse:
        for _, scheduler in self._led(message.engine_id):
            for group in scheduler.groups:
                if group.request.request_id != message.request_id:
                    continue
                for sequence in group.resident():
                    if sequence.sample_index == message.sample:
                        return pb.GetBlockTableResponse(blocks=_blocks(scheduler, sequence.slot))
        sentence = "no such sequence is resident on an engine that this replica leads"
        return await wire.abort(
            context, wire.failed(grpc.StatusCode.NOT_FOUND, "NO_SEQUENCE", sentence)
        )

    async def ListPrefixes(
        self, message: pb.ListPrefixesRequest, context: wire.Context
    ) -> pb.ListPrefixesResponse:
        prefixes = [
            prefix
            for leader, scheduler in self._led(message.engine_id)
            for prefix in _prefixes(leader, scheduler)
        ]
        prefixes.sort(key=lambda prefix: -prefix.saved_token_count)
        page, token = await _page(prefixes, message.page_size, message.page_token, context)
        return pb.ListPrefixesResponse(prefixes=page, next_page_token=token)

    def _led(self, engine_id: str) -> list[tuple[EngineLeader, Scheduler]]:
        return [
            (leader, leader.scheduler)
            for leader in self._router.leaders
            if leader.scheduler is not None and engine_id in ("", _engine_id(leader))
        ]


async def _page(
    items: Items[Item], size: int, token: str, context: wire.Context
) -> tuple[Items[Item], str]:
    """Cuts one page; a token is the offset of the next one."""
    if not 0 <= size <= MAX_PAGE_SIZE:
        error = wire.bad_field("page_size", f"is {size}; it must be in [0, {MAX_PAGE_SIZE}]")
        await wire.abort(context, error)
    if token and not (token.isascii() and token.isdigit() and len(token) < 10):
        await wire.abort(context, wire.bad_field("page_token", "is no token of this service"))
    begin = int(token or 0)
    end = begin + (size or DEFAULT_PAGE_SIZE)
    return items[begin:end], str(end) if end < len(items) else ""


def _engine_id(leader: EngineLeader) -> str:
    return leader.facts.engine_id if leader.facts else ""


def _engine(leader: EngineLeader) -> pb.Engine:
    engine = pb.Engine(
        address=leader.link.address,
        state=_STATES[leader.state],
        epoch=leader.epoch,
        step=leader.loop.step if leader.loop else 0,
        leader_address=leader.leader_address,
    )
    if leader.facts is not None:
        engine.engine_id = leader.facts.engine_id
        engine.model = leader.facts.model
        engine.incarnation = leader.facts.incarnation
        engine.block_size_tokens = leader.facts.block_size
        engine.block_count = leader.facts.block_count
    if (failure := leader.last_failure) is not None:
        engine.last_failure = failure.sentence
        engine.last_failure_age_seconds = time.monotonic() - failure.at
    if leader.loop is not None:
        counters = leader.loop.counters
        engine.prefix_hit_token_count = counters.hit_tokens
        engine.prefix_query_token_count = counters.prompt_tokens
    if (scheduler := leader.scheduler) is not None:
        engine.free_block_count = scheduler.pool.free_count
        engine.cached_block_count = scheduler.pool.cached_count
        engine.used_block_count = scheduler.pool.used_count
        engine.running_sequence_count = scheduler.running_count
        engine.waiting_request_count = scheduler.waiting_count
        engine.preemption_count = scheduler.totals.preemptions
        engine.swap_count = scheduler.totals.swaps
        engine.host_block_count = scheduler.limits.host_block_count
        engine.used_host_block_count = scheduler.swap.pool.used_count
    return engine


def _sequence(leader: EngineLeader, scheduler: Scheduler, sequence: Sequence) -> pb.Sequence:
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
        engine_id=_engine_id(leader),
        request_id=request.request_id,
        sample=sequence.sample_index,
        state=state,
        slot=slot,
        prompt_token_count=len(request.prompt),
        cached_token_count=sequence.cached,
        output_token_count=max(length - len(request.prompt), 0),
        block_count=int(table.block_count[slot]) if resident else 0,
        priority=request.priority,
    )


def _blocks(scheduler: Scheduler, slot: int) -> list[pb.BlockEntry]:
    pool = scheduler.swap.pool if scheduler.slots.swapped[slot] else scheduler.pool
    return [
        pb.BlockEntry(
            block_id=block,
            reference_count=int(pool.reference_counts[block]),
            prefix_hash=pool.hash_of(block) or b"",
        )
        for block in scheduler.slots.table(slot).tolist()
    ]


def _prefixes(leader: EngineLeader, scheduler: Scheduler) -> list[pb.Prefix]:
    prefixes, now = [], time.monotonic()
    for hits in leader.prefix_stats.top():
        block = scheduler.pool.block_of(hits.digest)
        references = 0 if block is None else int(scheduler.pool.reference_counts[block])
        prefixes.append(
            pb.Prefix(
                engine_id=_engine_id(leader),
                prefix_hash=hits.digest,
                token_count=hits.token_count,
                reference_count=references,
                hit_count=hits.hits,
                saved_token_count=hits.saved_tokens,
                idle_seconds=now - hits.last_hit,
                resident=block is not None,
            )
        )
    return prefixes
