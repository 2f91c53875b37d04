"""The block pool against a naive model of dicts and lists, with any history that Hypothesis finds.

The model also plays the engine, which learns of hashes only by what the pool announces, and the
prefix index, which learns of them only by changes.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from control_plane.blocks import NO_HASH, BlockPool, OutOfBlocks, TooManyPins

# The contents of a table's blocks, one small number each, so that many tables begin alike.
Path = tuple[int, ...]
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
# Histories of forty steps take longer to shrink than a test may last.
NO_SHRINKING = (Phase.explicit, Phase.generate)
PICK = st.integers(0, 1 << 16)


def digest_of(path: Path) -> bytes:
    return hashlib.blake2b(bytes(path), digest_size=16).digest()


def tenant_of(path: Path) -> str:
    """Requests of different tenants have no hash in common."""
    return ("", "a", "b")[path[0]]


def chain(path: Path) -> list[bytes]:
    return [digest_of(path[:end]) for end in range(1, len(path) + 1)]


class PoolMachine(RuleBasedStateMachine):
    """Tables come, fork, grow, are published, forgotten and released; hashes are pinned."""

    @initialize(count=st.sampled_from([2, 5, 8, 12]), quota=st.sampled_from([None, 1, 2]))
    def begin(self, count: int, quota: int | None) -> None:
        self.quota = quota
        self.pool = BlockPool(count, quota)
        self.tables: list[tuple[Path, list[int]]] = []
        self.references = dict.fromkeys(range(count), 0)
        self.hashes: dict[int, bytes] = {}
        # Blocks in the order in which they go if no tenant has too many; those that do not go.
        self.cached: list[int] = []
        self.kept: list[int] = []
        self.tenants: dict[int, str] = {}
        self.over: list[str] = []
        self.pins: set[bytes] = set()
        self.pinned: set[int] = set()
        self.engine: dict[int, bytes] = {}
        self.index: set[bytes] = set()

    # What the model thinks.

    def free(self) -> set[int]:
        unused = {block for block, count in self.references.items() if not count}
        return unused - set(self.cached) - set(self.kept)

    def note_quotas(self) -> None:
        """Tenants with too many cached blocks, in the order in which they came to that."""
        if self.quota is None:
            return
        owners = [self.tenants.get(block, "") for block in self.cached]
        over = {owner for owner in owners if owner and owners.count(owner) > self.quota}
        self.over = [owner for owner in self.over if owner in over]
        self.over += sorted(over - set(self.over))

    def evict(self) -> int:
        mine = [block for block in self.cached if self.tenants.get(block, "") in self.over[:1]]
        block = (mine or self.cached)[0]
        self.cached.remove(block)
        self.lose_hash(block)
        self.note_quotas()
        return block

    def lose_hash(self, block: int) -> None:
        self.hashes.pop(block, None)
        self.tenants.pop(block, None)
        self.pinned.discard(block)

    def take(self, count: int) -> list[int]:
        """Allocates on both sides; the pool's choice must be one that the model allows."""
        free = self.free()
        if count > len(free) + len(self.cached):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return []
        evicted = [self.evict() for _ in range(count - len(free))]
        blocks = self.pool.allocate(count).tolist()
        assert len(set(blocks)) == count
        assert set(evicted) <= set(blocks) <= free | set(evicted)
        for block in blocks:
            self.references[block] = 1
            self.engine.pop(block, None)
        return blocks

    def hold(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] += 1
            for order in (self.cached, self.kept):
                if block in order:
                    order.remove(block)
        self.note_quotas()
        self.pool.share(np.array(blocks, np.int32))

    def drop(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
        unused = [block for block in blocks if not self.references[block]]
        known = [block for block in reversed(unused) if block in self.hashes]
        self.kept += [block for block in known if block in self.pinned]
        self.cached += [block for block in known if block not in self.pinned]
        self.note_quotas()
        self.pool.release(np.array(blocks, np.int32))

    def matched(self, path: Path) -> list[int]:
        blocks: list[int] = []
        for digest in chain(path):
            holders = [block for block, held in self.hashes.items() if held == digest]
            assert len(holders) <= 1
            if not holders:
                break
            blocks += holders
        return blocks

    # What happens.

    @rule(path=PATHS, full=st.booleans())
    def admit(self, path: Path, full: bool) -> None:
        self.admit_one(path, full)

    def admit_one(self, path: Path, full: bool) -> None:
        shared = self.matched(path)
        assert self.pool.match(chain(path)).tolist() == shared
        fresh = len(path) - len(shared)
        reviving = sum(1 for block in shared if block in self.cached)
        assert self.pool.revived_count(np.array(shared, np.int32)) == reviving
        if fresh + reviving > len(self.free()) + len(self.cached):
            return
        self.hold(shared)
        self.tables.append((path, shared + self.take(fresh)))
        if full:
            self.make_known(path, self.tables[-1][1])

    @rule(paths=st.lists(PATHS, min_size=1, max_size=3), sent=st.booleans())
    def come_and_go(self, paths: list[Path], sent: bool) -> None:
        """Requests one after the other, each gone before the next one comes."""
        for path in paths:
            before = len(self.tables)
            self.admit_one(path, full=True)
            if len(self.tables) > before:
                self.drop(self.tables.pop()[1])
        if sent:
            self.hear_of_changes()

    @rule(count=st.integers(1, 14))
    def ask_for_too_many(self, count: int) -> None:
        if count > self.pool.available_count:
            assert self.take(count) == []

    @precondition(lambda self: self.pool.available_count)
    @rule(left=st.integers(0, 3), sent=st.booleans())
    def need_nearly_all(self, left: int, sent: bool) -> None:
        """Evicts most of what is cached."""
        self.drop(self.take(max(self.pool.available_count - left, 1)))
        if sent:
            self.hear_of_changes()

    @precondition(lambda self: self.tables)
    @rule(pick=PICK, more=st.integers(0, 1))
    def grow(self, pick: int, more: int) -> None:
        path, table = self.tables[pick % len(self.tables)]
        if self.pool.available_count:
            self.tables[pick % len(self.tables)] = ((*path, more), table + self.take(1))

    @precondition(lambda self: self.tables)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        path, table = self.tables[pick % len(self.tables)]
        self.hold(table)
        self.tables.append((path, list(table)))

    @precondition(lambda self: self.tables)
    @rule(pick=PICK, other=st.integers(0, 1))
    def copy_on_write(self, pick: int, other: int) -> None:
        path, table = self.tables[pick % len(self.tables)]
        if self.references[table[-1]] > 1 and self.pool.available_count:
            [block] = self.take(1)
            self.drop(table[-1:])
            self.tables[pick % len(self.tables)] = ((*path[:-1], other), [*table[:-1], block])

    @precondition(lambda self: self.tables)
    @rule(pick=PICK, count=st.integers(1, 6))
    def publish(self, pick: int, count: int) -> None:
        path, table = self.tables[pick % len(self.tables)]
        self.make_known(path, table[:count])

    def make_known(self, path: Path, blocks: list[int]) -> None:
        for block, digest in zip(blocks, chain(path), strict=False):
            self.pool.publish(block, digest, tenant_of(path))
            if block in self.hashes:
                continue
            former = [other for other, held in self.hashes.items() if held == digest]
            if former and self.references[former[0]]:
                continue
            if former:
                (self.cached if former[0] in self.cached else self.kept).remove(former[0])
                self.lose_hash(former[0])
                self.note_quotas()
            self.hashes[block] = digest
            self.tenants[block] = tenant_of(path)
            if digest in self.pins:
                self.pinned.add(block)

    @rule(path=PATHS)
    def pin(self, path: Path) -> None:
        pins = self.pins | set(chain(path))
        if len(pins) > len(self.references) // 2:
            with pytest.raises(TooManyPins):
                self.pool.pin(chain(path))
            return
        self.pool.pin(chain(path))
        for block, digest in self.hashes.items():
            if digest in pins - self.pins:
                self.pinned.add(block)
        # Which of several goes first when pins are given up is not said.
        moved = [block for block in self.cached if self.hashes[block] in pins - self.pins]
        self.cached = [block for block in self.cached if block not in moved]
        self.kept += moved
        self.pins = pins
        self.note_quotas()

    @rule(path=PATHS)
    def unpin(self, path: Path) -> None:
        for digest in chain(path):
            self.pool.unpin([digest])
            for block in [block for block, held in self.hashes.items() if held == digest]:
                self.pinned.discard(block)
                if digest in self.pins and block in self.kept:
                    self.kept.remove(block)
                    self.cached.append(block)
            self.pins.discard(digest)
            self.note_quotas()

    @rule(count=st.integers(1, 3))
    def yield_pinned(self, count: int) -> None:
        before = list(self.pool._cached)
        assert self.pool.yield_pinned(count) == bool(self.kept)
        yielded = list(self.pool._cached)[: min(count, len(self.kept))]
        assert set(yielded) <= set(self.kept)
        assert sorted(before) == sorted(self.pool._cached)
        self.kept = [block for block in self.kept if block not in yielded]
        self.pinned -= set(yielded)
        self.cached = yielded + self.cached
        self.note_quotas()

    @precondition(lambda self: self.tables)
    @rule(pick=PICK)
    def forget(self, pick: int) -> None:
        _, table = self.tables[pick % len(self.tables)]
        self.pool.forget(np.array(table, np.int32))
        for block in table:
            self.lose_hash(block)

    @precondition(lambda self: self.tables)
    @rule(pick=PICK, sent=st.booleans())
    def release(self, pick: int, sent: bool) -> None:
        _, table = self.tables.pop(pick % len(self.tables))
        self.drop(table)
        if sent:
            self.hear_of_changes()

    def hear_of_changes(self) -> None:
        """The engine and the index hear what a plan tells, and then know all there is to know."""
        for block, digest in self.pool.take_announced().items():
            if digest == NO_HASH:
                self.engine.pop(block, None)
            else:
                self.engine[block] = digest
        assert self.engine == self.hashes
        added, removed = self.pool.take_index_changes()
        assert not set(added) & set(removed)
        self.index = (self.index - set(removed)) | set(added)
        assert self.index == set(self.hashes.values()) == set(self.pool.held_hashes())

    @precondition(lambda self: self.tables)
    @rule()
    def take_over(self) -> None:
        """A new leader makes its pool from what the engine holds; what was not sent is lost."""
        counts = np.array([self.references[block] for block in sorted(self.references)], np.int32)
        self.pool = BlockPool(len(counts), self.quota)
        self.pool.restore(counts, dict(self.engine))
        # Of two blocks with one hash, which the engine may hold when a plan was lost, one counts.
        kept: dict[bytes, int] = {}
        for block, digest in self.engine.items():
            kept.setdefault(digest, block)
        self.hashes = {block: digest for digest, block in kept.items()}
        self.engine = dict(self.hashes)
        self.cached = [block for block in sorted(self.hashes) if not self.references[block]]
        # Whose cached blocks are, an engine does not know; what is pinned, the next leader is told.
        self.kept, self.tenants, self.over = [], {}, []
        self.pins, self.pinned = set(), set()
        self.index = set()

    # What always holds.

    @invariant()
    def pool_is_as_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check()
        assert pool.conserved
        assert pool.reference_counts.tolist() == list(self.references.values())
        assert pool.used_count == sum(1 for count in self.references.values() if count)
        cached = list(pool._cached)
        assert cached[: len(self.cached)] == self.cached
        assert set(cached[len(self.cached) :]) == set(self.kept)
        assert pool.cached_count == len(cached)
        assert set(pool._free[: pool.free_count].tolist()) == self.free()
        assert pool.available_count == len(self.free()) + len(self.cached)
        for block in self.references:
            assert pool.hash_of(block) == self.hashes.get(block)
        for block, digest in self.hashes.items():
            assert pool.block_of(digest) == block


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=NO_SHRINKING,
    suppress_health_check=list(HealthCheck),
)
