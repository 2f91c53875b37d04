"""Draws both block pools, the slots and a plan as text: what to look at when a step went wrong."""

from __future__ import annotations

import numpy as np

from control_plane.blocks import BlockPool
from control_plane.scheduler import Scheduler
from protos.engine.v1 import engine_pb2
from tests.stub_engine import StubEngine

_WIDTH = 64
_SLOT_NAMES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEGEND = (
    "one character a block: '.' free, '~' cached, else the number of references ('+': ten or more)"
    "\nand below whose it is: the slot's letter, '*' where several slots hold it, '?' where none"
)


def draw_map(scheduler: Scheduler, stub: StubEngine) -> str:
    """The scheduler's view, planned steps included, and the engine's, which may be behind."""
    parts = [LEGEND, "control plane"]
    slots = scheduler.slots
    tables = {slot: slots.table(slot) for slot in range(slots.slot_count) if slots.owner[slot]}
    device = {slot: table for slot, table in tables.items() if not slots.swapped[slot]}
    host = {slot: table for slot, table in tables.items() if slots.swapped[slot]}
    parts += _draw_pool("device", *_states(scheduler.pool), device)
    parts += _draw_pool("host", *_states(scheduler.swap.pool), host)
    parts += [_slot_line(scheduler, slot) for slot in tables]
    state = stub.state
    resident = {int(slot): state.table(int(slot)) for slot in state.resident_slots()}
    held = {slot: table for slot, table in resident.items() if not state.swapped[slot]}
    parts.append("engine")
    parts += _draw_pool("device", state.reference_counts, state.hashed, held)
    for slot in resident:
        marks = "swapped " * bool(state.swapped[slot]) + "decodes" * bool(state.decoding[slot])
        name = _SLOT_NAMES[slot % len(_SLOT_NAMES)]
        parts.append(
            f"  {name} slot {slot}: {state.token_count[slot]} tokens, "
            f"{state.computed[slot]} computed, blocks {resident[slot].tolist()} {marks}"
        )
    return "\n".join(parts)


def _states(pool: BlockPool) -> tuple[np.ndarray, np.ndarray]:
    cached = np.zeros(pool.block_count, np.bool_)
    cached[list(pool._cached)] = True
    return pool.reference_counts, cached


def _draw_pool(
    name: str, references: np.ndarray, hashed: np.ndarray, tables: dict[int, np.ndarray]
) -> list[str]:
    holders: dict[int, set[int]] = {}
    for slot, table in tables.items():
        for block in table.tolist():
            holders.setdefault(block, set()).add(slot)
    counts, owners = "", ""
    for block, count in enumerate(references.tolist()):
        slots = holders.get(block, set())
        if count:
            counts += str(count) if 0 < count < 10 else ("+" if count > 0 else "-")
            letter = _SLOT_NAMES[min(slots) % len(_SLOT_NAMES)] if slots else "?"
            owners += "*" if len(slots) > 1 else letter
        else:
            counts += "~" if hashed[block] else "."
            owners += _SLOT_NAMES[min(slots) % len(_SLOT_NAMES)] if slots else " "
    lines = [f"  {name}, {len(references)} blocks"]
    for start in range(0, len(references), _WIDTH):
        lines.append(f"  {start:6} {counts[start : start + _WIDTH]}")
        lines.append(f"         {owners[start : start + _WIDTH]}".rstrip())
    return lines


def _slot_line(scheduler: Scheduler, slot: int) -> str:
    table = scheduler.slots
    sequence = table.owner[slot]
    marks = "swapped " * bool(table.swapped[slot]) + "decodes" * bool(table.decoding[slot])
    name = _SLOT_NAMES[slot % len(_SLOT_NAMES)]
    request = sequence.group.request.request_id
    return (
        f"  {name} slot {slot}: {request} sample {sequence.sample_index}, {table.length[slot]} "
        f"tokens ({table.known[slot]} known), {table.computed[slot]} computed, "
        f"blocks {table.table(slot).tolist()} {marks}"
    )


def draw_plan(plan: engine_pb2.StepPlan) -> str:
    """One plan on one line: what it names, and of which slots and blocks."""
    parts = [f"step {plan.step} of epoch {plan.epoch}:"]
    for field, value in plan.ListFields():
        if field.name == "admissions":
            rows = value
            columns = ("slots", "token_counts", "cached_token_counts", "block_ids")
            facts = [f"{name} {_ints(getattr(rows, name))}" for name in columns]
            parts.append(f"admissions({', '.join(facts)})")
        elif field.name == "block_hashes":
            continue
        elif isinstance(value, bytes):
            parts.append(f"{field.name}{_ints(value)}")
    return " ".join(parts)


def _ints(data: bytes) -> list[int]:
    return [int(value) for value in np.frombuffer(data, "<i4")]
