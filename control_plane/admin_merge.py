"""One view of what several replicas list: each engine as its leader has it. Knows pb2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from protos.admin.v1 import admin_pb2 as pb


def engines(own: list[pb.Engine], others: Iterable[pb.Engine]) -> list[pb.Engine]:
    """Fills in what the leaders say of the engines that this replica follows.

    Args:
        own: what this replica knows of all of them.
        others: what other replicas say; of those that they do not lead it is no news.
    """
    led = {row.engine_id: row for row in others if row.state == pb.ENGINE_STATE_LED}
    shown = []
    for row in own:
        told = led.get(row.engine_id)
        if row.state == pb.ENGINE_STATE_FOLLOWED and told is not None:
            told.state, told.address = row.state, row.address
            told.leader_address = row.leader_address
            row = told
        shown.append(row)
    return shown


def prefixes(own: Iterable[pb.Prefix], others: Iterable[pb.Prefix]) -> list[pb.Prefix]:
    """Adds up the hits of each prefix; most tokens saved first."""
    merged: dict[bytes, pb.Prefix] = {}
    for row in (*own, *others):
        known = merged.setdefault(row.prefix_hash, row)
        if known is not row:
            _add_prefix(known, row)
    return sorted(merged.values(), key=lambda row: -row.saved_token_count)


def _add_prefix(known: pb.Prefix, row: pb.Prefix) -> None:
    known.name = known.name or row.name
    known.hit_count += row.hit_count
    known.saved_token_count += row.saved_token_count
    known.idle_seconds = min(known.idle_seconds, row.idle_seconds)
    known.shared, known.pinned = known.shared or row.shared, known.pinned or row.pinned
    add_holders(known, {holder.engine_id: holder.reference_count for holder in row.holders})


def add_holders(row: pb.Prefix, references: Mapping[str, int]) -> None:
    """Adds engines that hold a prefix's last block.

    Args:
        references: to it, by engine; 0 is said, too, by those who do not lead the engine.
    """
    known = {holder.engine_id: holder for holder in row.holders}
    for engine_id, count in references.items():
        if engine_id not in known:
            known[engine_id] = row.holders.add(engine_id=engine_id)
        known[engine_id].reference_count = max(known[engine_id].reference_count, count)


def registered_prefixes(
    own: list[pb.RegisteredPrefix], others: Iterable[pb.RegisteredPrefix]
) -> list[pb.RegisteredPrefix]:
    """Fills in what leaders say of the engines that this replica follows."""
    told = {
        (row.name, engine.engine_id): engine
        for row in others
        for engine in row.engines
        if engine.known
    }
    for row in own:
        for engine in row.engines:
            better = told.get((row.name, engine.engine_id))
            if better is not None and not engine.known:
                engine.CopyFrom(better)
    return own
