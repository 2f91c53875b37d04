"""Prefix hashes and the block pool, by themselves."""

from __future__ import annotations

import numpy as np
import pytest

from control_plane.blocks import NO_HASH, BlockPool, OutOfBlocks
from control_plane.hashing import HASH_BYTES, PrefixHasher

TOKENS = np.arange(100, dtype=np.int32)


def test_hashes_cover_full_blocks_and_depend_on_everything_before() -> None:
    hashes = PrefixHasher("model", 16).extend([], TOKENS)
    assert len(hashes) == 6
    assert all(len(digest) == HASH_BYTES for digest in hashes)
    changed = TOKENS.copy()
    changed[20] += 1
    other = PrefixHasher("model", 16).extend([], changed)
    assert [a == b for a, b in zip(hashes, other, strict=True)] == [True] + [False] * 5


def test_hashes_can_be_extended() -> None:
    hasher = PrefixHasher("model", 16)
    hashes = hasher.extend([], TOKENS[:40])
    assert hashes + hasher.extend(hashes, TOKENS) == hasher.extend([], TOKENS)


@pytest.mark.parametrize("other", [("else", 16, ""), ("model", 32, ""), ("model", 16, "tenant")])
def test_model_block_size_and_salt_keep_hashes_apart(other: tuple[str, int, str]) -> None:
    ours = set(PrefixHasher("model", 16).extend([], TOKENS))
    assert not ours & set(PrefixHasher(*other).extend([], TOKENS))


def _cached(pool: BlockPool, names: list[str]) -> None:
    """Fills the pool with one sequence whose blocks are known by `names`, and releases it."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks.tolist(), names, strict=True):
        pool.publish(block, name.encode().ljust(16))
    pool.release(blocks)


def _held(pool: BlockPool) -> set[str]:
    return {digest.decode().strip() for digest in pool.held_hashes()}


def test_least_recently_used_leaves_go_first() -> None:
    pool = BlockPool(8)
    _cached(pool, ["a0", "a1", "a2"])
    _cached(pool, ["b0", "b1", "b2"])
    again = pool.match([b"a0".ljust(16), b"a1".ljust(16)])
    pool.share(again)
    pool.release(again)
    gone = []
    before = _held(pool)
    for _ in range(8):
        pool.allocate(1)
        pool.check()
        gone += sorted(before - _held(pool))
        before = _held(pool)
    # Two free ones first; a1 and a0 were used last, and a leaf goes before its root.
    assert gone == ["a2", "b2", "b1", "b0", "a1", "a0"]
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)
    assert pool.used_count == 8


def test_a_failed_allocation_changes_nothing() -> None:
    pool = BlockPool(4)
    _cached(pool, ["a0", "a1"])
    held = pool.allocate(1)
    with pytest.raises(OutOfBlocks):
        pool.allocate(4)
    assert _held(pool) == {"a0", "a1"}
    assert pool.available_count == 3
    pool.release(held)
    pool.check()


def test_the_first_block_with_a_hash_keeps_it() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    name = b"same".ljust(16)
    pool.publish(int(first[0]), name)
    pool.publish(int(second[0]), name)
    assert pool.match([name]).tolist() == first.tolist()
    pool.release(second)
    assert pool.cached_count == 0
    pool.release(first)
    assert (pool.cached_count, pool.free_count) == (1, 3)
    pool.check()


def test_announcements_do_not_outlive_what_they_announce() -> None:
    pool = BlockPool(2)
    _cached(pool, ["a0", "a1"])
    pool.allocate(2)
    assert pool.take_announced() == {}
    added, removed = pool.take_index_changes()
    assert added == []
    assert len(removed) == 2


def test_a_distrusted_block_is_forgotten_on_both_planes() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.publish(int(blocks[0]), b"x" * 16)
    pool.take_announced()
    pool.forget(blocks)
    assert pool.take_announced() == {int(blocks[0]): NO_HASH}
    pool.release(blocks)
    assert (pool.cached_count, pool.free_count) == (0, 4)
    pool.check()


def test_restore_takes_over_references_and_hashes() -> None:
    pool = BlockPool(6)
    references = np.array([0, 2, 1, 0, 0, 0], np.int32)
    pool.restore(references, {1: b"one".ljust(16), 4: b"four".ljust(16)})
    pool.check()
    assert (pool.free_count, pool.cached_count, pool.used_count) == (3, 1, 2)
    assert pool.match([b"one".ljust(16)]).tolist() == [1]
