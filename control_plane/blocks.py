"""The block pool: free blocks, reference counts and the prefix cache (paper, sections 4.2 to 4.4).

Every block is in exactly one of three states, and their numbers always add up to the whole:
referenced (in at least one block table), cached (in none, but full and findable by its prefix
hash, hence evictable) and free. The pool is pure: it knows nothing of time, engines or requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from control_plane.eviction import EvictionOrder

Int32Array = npt.NDArray[np.int32]

# A reference, of the counts' own type: `ufunc.at` is forty times slower when it has to convert.
ONE = np.int32(1)

# What an engine is told about a block whose hash no longer holds.
NO_HASH = bytes(16)


# Of the pool's blocks, at most this share is pinned.
PINNED_SHARE = 0.5


class OutOfBlocks(Exception):
    """More blocks were asked for than are free or evictable; nothing was changed."""


class TooManyPins(Exception):
    """So many blocks cannot be pinned; nothing was changed."""


class BlockPool:
    """Block ids 0 to `block_count` - 1.

    Blocks are taken from the free stack first. When that is empty, the least recently used cached
    block goes; since a block is always released before its parent, leaves go before their roots.

    Args:
        tenant_quota: cached blocks that one tenant may have while others want memory.
    """

    def __init__(self, block_count: int, tenant_quota: int | None = None) -> None:
        self.block_count = block_count
        self.reference_counts = np.zeros(block_count, np.int32)
        self._hashed = np.zeros(block_count, np.bool_)
        self._free = np.arange(block_count - 1, -1, -1, dtype=np.int32)
        self.free_count = block_count
        # Blocks with a reference, counted on their own so that `conserved` says something.
        self.used_count = 0
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached = EvictionOrder(tenant_quota)
        self._pins: dict[bytes, None] = {}
        self._pinned = np.zeros(block_count, np.bool_)
        self._first_place = np.zeros(block_count, np.int32)
        self._announced: dict[int, bytes] = {}
        # The last thing that happened to a hash is what counts for the index.
        self._index_changes: dict[bytes, bool] = {}

    @property
    def cached_count(self) -> int:
        return len(self._cached) + self._cached.pinned_count

    @property
    def idle_pinned_count(self) -> int:
        """Cached blocks that are pinned."""
        return self._cached.pinned_count

    @property
    def available_count(self) -> int:
        """Blocks that `allocate` can hand out: free ones, and cached ones that are not pinned."""
        return self.free_count + len(self._cached)

    @property
    def conserved(self) -> bool:
        """Whether free + cached + referenced = total: counters only, cheap enough for each step."""
        return self.free_count + self.cached_count + self.used_count == self.block_count

    def allocate(self, count: int) -> Int32Array:
        """Returns `count` blocks, int32 [count], each with one reference and no hash.

        Raises:
            OutOfBlocks: fewer are available.
        """
        if count > self.available_count:
            raise OutOfBlocks(f"{count} blocks asked for, {self.available_count} available")
        if count > self.free_count:
            self._evict(count - self.free_count)
        self.free_count -= count
        blocks = self._free[self.free_count : self.free_count + count].copy()
        self.reference_counts[blocks] = 1
        self.used_count += count
        return blocks

    def share(self, blocks: Int32Array) -> None:
        """Adds one reference to each of `blocks`, which are referenced or cached."""
        for block in blocks[self.reference_counts[blocks] == 0].tolist():
            self._cached.discard(block)
            self.used_count += 1
        self.reference_counts[blocks] += 1

    def release(self, blocks: Int32Array) -> None:
        """Drops one reference from each of `blocks`: one sequence's table, in order."""
        self.reference_counts[blocks] -= 1
        self._unuse(blocks[self.reference_counts[blocks] == 0])

    def release_all(self, blocks: Int32Array) -> None:
        """Drops references as `release` does, for tables that follow one another."""
        np.subtract.at(self.reference_counts, blocks, ONE)
        self._unuse(self.distinct(blocks[self.reference_counts[blocks] == 0]))

    def distinct(self, blocks: Int32Array) -> Int32Array:
        """Returns `blocks` without repetitions, in order of first occurrence, without sorting."""
        places = np.arange(len(blocks), dtype=np.int32)
        self._first_place[blocks[::-1]] = places[::-1]
        first: Int32Array = blocks[self._first_place[blocks] == places]
        return first

    def match(self, hashes: Sequence[bytes]) -> Int32Array:
        """Returns the blocks that hold the longest known prefix of the chain `hashes`."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return np.array(blocks, np.int32)

    def revived_count(self, blocks: Int32Array) -> int:
        """How many of the blocks that `match` found are available now and will not be if shared."""
        unused = (self.reference_counts[blocks] == 0) & ~self._pinned[blocks]
        return int(np.count_nonzero(unused))

    def holds(self, digest: bytes) -> bool:
        return digest in self._block_of

    def assign(self, block: int, tenant: str) -> None:
        """Says whose a referenced block is, where its hash was found and not published."""
        self._cached.assign(block, tenant)

    def block_of(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def hash_of(self, block: int) -> bytes | None:
        return self._hash_of.get(block)

    def publish(self, block: int, digest: bytes, tenant: str = "") -> None:
        """Makes a full, referenced block findable.

        The first block in use with a hash keeps it; one that is only cached gives way and is free.
        """
        if self._hashed[block]:
            return
        former = self._block_of.get(digest)
        if former is not None:
            if self.reference_counts[former]:
                return
            self._cached.discard(former)
            self._drop_hash(former)
            self._announced[former] = NO_HASH
            self._push_free(np.array([former], np.int32))
        self._restore_hash(block, digest)
        self._cached.assign(block, tenant)
        self._announced[block] = digest

    def forget(self, blocks: Int32Array) -> None:
        """Takes the hashes of referenced `blocks` back: their content is not to be trusted."""
        for block in blocks[self._hashed[blocks]].tolist():
            self._drop_hash(block)
            self._announced[block] = NO_HASH

    def forget_hashes(self, digests: Iterable[bytes]) -> None:
        """Takes hashes back as `forget` does, wherever the blocks are that have them by now."""
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                continue
            if not self.reference_counts[block]:
                self._cached.discard(block)
                self._push_free(np.array([block], np.int32))
            self._drop_hash(block)
            self._announced[block] = NO_HASH

    def restore(self, reference_counts: Int32Array, hashes: dict[int, bytes]) -> None:
        """Sets a fresh pool to what an engine holds: references by block, hashes by block."""
        self.reference_counts[:] = reference_counts
        for block, digest in hashes.items():
            if digest not in self._block_of:
                self._restore_hash(block, digest)
        unused = reference_counts == 0
        self.used_count = int(np.count_nonzero(reference_counts))
        self.free_count = 0
        self._push_free(np.flatnonzero(unused & ~self._hashed).astype(np.int32)[::-1])
        self._cache(np.flatnonzero(unused & self._hashed).astype(np.int32))

    # Pins.

    def pin(self, digests: Iterable[bytes]) -> None:
        """Keeps blocks with these hashes, those that get them later included, from being evicted.

        `digests` are chains, each from its beginning.

        Raises:
            TooManyPins: they would be more than half of the pool.
        """
        fresh = [digest for digest in dict.fromkeys(digests) if digest not in self._pins]
        pins = {**self._pins, **dict.fromkeys(fresh)}
        most = int(self.block_count * PINNED_SHARE)
        if len(pins) > most:
            raise TooManyPins(f"{len(pins)} blocks; of {self.block_count}, {most} can be pinned")
        # A chain's last block first, as in the order of eviction.
        for digest in reversed(fresh):
            block = self._block_of.get(digest)
            if block is not None:
                self._pinned[block] = True
                self._cached.pin(block)
        self._pins = pins

    def unpin(self, digests: Iterable[bytes]) -> None:
        for digest in reversed([digest for digest in digests if digest in self._pins]):
            del self._pins[digest]
            block = self._block_of.get(digest)
            if block is not None:
                self._pinned[block] = False
                self._cached.unpin(block)

    def yield_pinned(self, count: int) -> bool:
        """Lets up to `count` pinned blocks be evicted, for a sequence that nothing else can help.

        Their hashes stay pinned, so that the next blocks that get them are. Returns whether there
        was one.
        """
        yielded = self._cached.yield_pinned(count)
        self._pinned[yielded] = False
        return bool(yielded)

    def take_announced(self) -> dict[int, bytes]:
        """Returns the hashes published since the last call, by block: what the engine is told."""
        announced, self._announced = self._announced, {}
        return announced

    def take_index_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Returns hashes (added, removed) since the last call: what the index is told."""
        changes, self._index_changes = self._index_changes, {}
        added = [digest for digest, held in changes.items() if held]
        return added, [digest for digest, held in changes.items() if not held]

    @property
    def hashed(self) -> npt.NDArray[np.bool_]:
        """Blocks that can be found by a hash, bool [block_count]."""
        return self._hashed

    @property
    def pinned(self) -> npt.NDArray[np.bool_]:
        """Blocks whose hash is pinned, bool [block_count]."""
        return self._pinned

    def held_hashes(self) -> list[bytes]:
        return list(self._block_of)

    def check(self) -> None:
        """Raises AssertionError unless free + cached + referenced = total."""
        referenced = int(np.count_nonzero(self.reference_counts))
        free = self._free[: self.free_count]
        cached = np.fromiter(self._cached, np.int32, self.cached_count)
        counted = np.bincount(np.concatenate([free, cached]), minlength=self.block_count)
        counted += self.reference_counts > 0
        if (
            not (counted == 1).all()
            or (self.reference_counts < 0).any()
            or referenced != self.used_count
        ):
            raise AssertionError(
                f"blocks not conserved: {self.free_count} free + {self.cached_count} cached + "
                f"{referenced} referenced of {self.block_count}"
            )
        if self._hashed[free].any() or not self._hashed[cached].all():
            raise AssertionError("a free block has a hash, or a cached one has none")
        if {block: digest for digest, block in self._block_of.items()} != self._hash_of:
            raise AssertionError("hash and block maps disagree")

    def _evict(self, count: int) -> None:
        blocks = [self._cached.pop() for _ in range(count)]
        for block in blocks:
            self._drop_hash(block)
        self._push_free(np.array(blocks[::-1], np.int32))

    def _unuse(self, unused: Int32Array) -> None:
        self.used_count -= len(unused)
        hashed = self._hashed[unused]
        self._push_free(unused[~hashed])
        self._cache(unused[hashed][::-1])

    def _cache(self, blocks: Int32Array) -> None:
        pinned = self._pinned[blocks]
        if pinned.any():
            self._cached.add_pinned(blocks[pinned].tolist())
            blocks = blocks[~pinned]
        self._cached.add(blocks.tolist())

    def _push_free(self, blocks: Int32Array) -> None:
        self._free[self.free_count : self.free_count + len(blocks)] = blocks
        self.free_count += len(blocks)

    def _restore_hash(self, block: int, digest: bytes) -> None:
        self._block_of[digest] = block
        self._hash_of[block] = digest
        self._hashed[block] = True
        self._pinned[block] = digest in self._pins
        self._index_changes[digest] = True

    def _drop_hash(self, block: int) -> None:
        digest = self._hash_of.pop(block)
        del self._block_of[digest]
        self._hashed[block] = self._pinned[block] = False
        self._cached.forget(block)
        # An announcement that the engine has not seen yet must not outlive the block's content.
        self._announced.pop(block, None)
        self._index_changes[digest] = False
