"""Which engine holds which blocks of a prompt: hints in Redis, shared by all replicas.

There is one Redis set per engine life, of 16-byte block hashes:

    {namespace}:1:{fingerprint in braces}:held:{engine id}:{incarnation}

It serves lookup, purge (one UNLINK) and expiry (one EXPIRE) alike. Nobody asks for the key of a
former incarnation, so that a restarted engine's entries are dead at once.

Redis slow, empty, wrong or gone costs cache hits and nothing else: a lookup answers within its
timeout, and changes go out in the background. Only `prefixes/store.py` knows Redis, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from control_plane.metrics.histogram import Histogram

log = logging.getLogger(__name__)

HASH_BYTES = 16

# A chain of hashes is held up to some block and not beyond. Each round asks for 16 blocks spread
# over what is still open, and leaves a 17th of it: 4 commands inside Redis for 6,250 blocks.
# Whatever is no set at a key counts as holding nothing.
_SCRIPT = """
local hashes, pieces = ARGV[1], {}
local function piece(block)
  if not pieces[block] then
    pieces[block] = string.sub(hashes, block * 16 - 15, block * 16)
  end
  return pieces[block]
end
local function held(key)
  local low, high = 0, math.floor(#hashes / 16) + 1
  while high - low > 1 do
    local step, asked = math.ceil((high - low) / 17), {}
    for block = low + step, high - 1, step do
      asked[#asked + 1] = piece(block)
    end
    local found = redis.pcall('SMISMEMBER', key, unpack(asked))
    if found.err then
      return 0
    end
    local count = 0
    while found[count + 1] == 1 do
      count = count + 1
    end
    high = math.min(high, low + (count + 1) * step)
    low = low + count * step
  end
  return low
end
local lengths = {}
for index, key in ipairs(KEYS) do
  lengths[index] = held(key)
end
return lengths
"""
_SCRIPT_DIGEST = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

# Of the histogram of lookups, in seconds; by default they take five milliseconds at most.
_LOOKUP_BOUNDS = (0.00025, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.01, 0.025, 0.1, 1.0)
_CHUNK = 4096  # members per SADD or SREM
_IO_TIMEOUT_SECONDS = 2.0  # of connecting, and of a batch of changes
_BACKOFF_SECONDS = (0.05, 2.0)  # first and longest wait between attempts to come back


@dataclass(frozen=True)
class EngineLife:
    """One life of an engine process; another incarnation holds nothing of what this one held."""

    engine_id: str
    incarnation: str


@dataclass
class _Tracked:
    """A life whose set this replica writes."""

    key: str
    resync: Callable[[EngineLife], Iterable[bytes]]
    refresh_at: float = 0.0
    # The last thing that happened to each hash, which is all that a set can tell.
    pending: dict[bytes, bool] = field(default_factory=dict)
    # The set in Redis is not known to be right, and is rewritten as a whole from `rewrite_at` on.
    stale: bool = True
    rewrite_at: float = 0.0
    # Something was added since the set was last empty, so that the key should exist.
    filled: bool = False


class PrefixIndex:
    """The index as one replica sees it.

    Counters, for the metrics: `lookups`, `lookup_failures`, `lookup_seconds`, `flushes`
    (batches written), `dropped` (changes that never went out one by one) and `up`.

    Args:
        url: of the Redis server, for example "redis://host:6379" or "unix:///path"; what it says
            itself of user and password goes before the next two.
        username, password: of Redis's ACL.
        ca: PEM file by which to check the server of a "rediss://" URL; none: the system's list.
        namespace: begins every key.
        lookup_timeout_seconds: the longest that a lookup waits.
        entry_ttl_seconds: a set that nobody refreshes is gone after this time.
        flush_interval_seconds: how often changes go out.
        max_pending: changes of one life that wait at most; with more, its set is rewritten.
        max_lookups: in flight at once; more would wait too long, and get no answer at once.
    """

    def __init__(
        self,
        url: str,
        *,
        username: str = "",
        password: SecretStr | None = None,
        ca: Path | None = None,
        namespace: str = "quire",
        lookup_timeout_seconds: float = 0.005,
        entry_ttl_seconds: int = 600,
        flush_interval_seconds: float = 0.05,
        max_pending: int = 65_536,
        max_lookups: int = 32,
    ) -> None:
        self._namespace = namespace
        self._lookup_timeout = lookup_timeout_seconds
        self._ttl = entry_ttl_seconds
        self._flush_interval = flush_interval_seconds
        self._max_pending = max_pending
        self._max_lookups = max_lookups
        self._reader = _client(url, username, password, ca)
        self._writer = _client(url, username, password, ca)
        self._searches: set[asyncio.Task[list[int]]] = set()
        self._tracked: dict[EngineLife, _Tracked] = {}
        self._purges: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self.up = True
        self.lookups = 0
        self.lookup_failures = 0
        self.lookup_seconds = Histogram(_LOOKUP_BOUNDS)
        self.flushes = 0
        self.dropped = 0

    async def start(self) -> None:
        """Connects, or goes on trying in the background where that fails."""
        try:
            await self._probe()
        except Exception as error:
            self._went_down(error)
        self._task = asyncio.create_task(self._run(), name="prefix index")

    async def close(self) -> None:
        """Stops writing. What was still to go out is lost, as hints may be."""
        tasks = [task for task in (self._task, *self._searches) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._reader.aclose()
        await self._writer.aclose()

    async def lookup(
        self, fingerprint: str, lives: Sequence[EngineLife], hashes: bytes
    ) -> dict[EngineLife, int]:
        """How many leading blocks of a prompt each engine holds, in one round trip.

        Args:
            fingerprint: of the model.
            lives: the engines of interest.
            hashes: the chained hashes of the prompt's full blocks, 16 bytes each.

        Returns: a number for each life; nothing at all on any failure, and at once while the index
        is known to be down.
        """
        self.lookups += 1
        if not self.up or len(self._searches) >= self._max_lookups:
            self.lookup_failures += 1
            return {}
        if not lives or len(hashes) < HASH_BYTES:
            return dict.fromkeys(lives, 0)
        keys = [self._key(fingerprint, life) for life in lives]
        began = time.monotonic()
        search = asyncio.create_task(self._search(keys, hashes))
        self._searches.add(search)
        search.add_done_callback(self._search_ended)
        try:
            # Not a timeout around the search: to abandon a connection takes time, too.
            done, _ = await asyncio.wait([search], timeout=self._lookup_timeout)
            if not done:
                raise TimeoutError(f"no answer within {self._lookup_timeout} s")
            return dict(zip(lives, search.result(), strict=True))
        except Exception as error:  # whatever it is, a hint is not worth a request
            self.lookup_failures += 1
            self._went_down(error)
            return {}
        finally:
            search.cancel()
            self.lookup_seconds.observe(time.monotonic() - began)

    async def holders(
        self, fingerprint: str, lives: Sequence[EngineLife], digests: Sequence[bytes]
    ) -> dict[EngineLife, set[bytes]]:
        """Which of some blocks, whatever comes before them, each engine holds: for operators.

        Returns: a set for each life, empty ones while Redis does not answer.
        """
        found: dict[EngineLife, set[bytes]] = {life: set() for life in lives}
        if not (self.up and lives and digests):
            return found
        pipeline = self._writer.pipeline(transaction=False)
        for life in lives:
            pipeline.execute_command("SMISMEMBER", self._key(fingerprint, life), *digests)
        try:
            async with asyncio.timeout(_IO_TIMEOUT_SECONDS):
                replies = await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            log.debug("the prefix index does not say who holds what: %r", error)
            return found
        for life, reply in zip(lives, replies, strict=True):
            found[life] = {digest for digest, held in zip(digests, reply, strict=True) if held}
        return found

    @property
    def redis(self) -> Redis:
        """For what else is kept in the same server."""
        return self._writer

    def track(
        self, fingerprint: str, life: EngineLife, resync: Callable[[EngineLife], Iterable[bytes]]
    ) -> None:
        """Makes this replica the writer of a life's set, which is written as a whole at first.

        `resync` gives every hash that the engine holds now. It is called from the event loop,
        again whenever the set may have been damaged.
        """
        self._tracked[life] = _Tracked(self._key(fingerprint, life), resync)

    def forget(self, life: EngineLife, *, purge: bool = False) -> None:
        """Stops writing a life's set, for another leader writes it now, or it will expire.

        With `purge`, for an engine known to be dead, the set is deleted too.
        """
        tracked = self._tracked.pop(life, None)
        if tracked is not None and purge:
            self._purges.append(tracked.key)

    def publish(self, life: EngineLife, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Notes a step's changes to what a tracked life holds; they go out in the background.

        A hash that is in both counts as added: it was evicted and computed anew.
        """
        tracked = self._tracked.get(life)
        if tracked is None:
            return
        if tracked.stale:
            self.dropped += len(added) + len(removed)
            return
        tracked.pending |= dict.fromkeys(removed, False)
        tracked.pending |= dict.fromkeys(added, True)
        if len(tracked.pending) > self._max_pending:
            self._distrust(tracked)

    def _key(self, fingerprint: str, life: EngineLife) -> str:
        # The braces keep one model's sets together in a cluster.
        return f"{self._namespace}:1:{{{fingerprint}}}:held:{life.engine_id}:{life.incarnation}"

    async def _search(self, keys: Sequence[str], hashes: bytes) -> list[int]:
        try:
            reply = await self._reader.evalsha(_SCRIPT_DIGEST, len(keys), *keys, hashes)
        except NoScriptError:
            reply = await self._reader.eval(_SCRIPT, len(keys), *keys, hashes)
        return [int(length) for length in reply]

    def _search_ended(self, search: asyncio.Task[list[int]]) -> None:
        self._searches.discard(search)
        if not search.cancelled():
            search.exception()  # an abandoned search's failure interests nobody any more

    async def _probe(self) -> None:
        """Does all that lookups need: connects, loads the script, and gets an answer in time."""
        async with asyncio.timeout(_IO_TIMEOUT_SECONDS):
            for client in (self._writer, self._reader):
                await client.eval(_SCRIPT, 0, b"")
        async with asyncio.timeout(self._lookup_timeout):
            await self._reader.evalsha(_SCRIPT_DIGEST, 0, b"")

    def _went_down(self, error: Exception) -> None:
        if self.up:
            kind = type(error).__name__
            log.warning("prefix index is down, going on without hits: %s: %s", kind, error)
        self.up = False
        # A slow answer says nothing about the sets; a lost server may come back without them.
        if not isinstance(error, TimeoutError):
            for tracked in self._tracked.values():
                self._distrust(tracked)

    def _distrust(self, tracked: _Tracked) -> None:
        self.dropped += len(tracked.pending)
        tracked.pending.clear()
        tracked.stale = True

    async def _run(self) -> None:
        pause, longest = _BACKOFF_SECONDS
        while True:
            try:
                if not self.up:
                    await self._probe()
                    self.up = True
                    log.info("prefix index is back")
                await self._flush()
                pause = _BACKOFF_SECONDS[0]
                await asyncio.sleep(self._flush_interval)
            except Exception as error:
                self._went_down(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)

    async def _flush(self) -> None:
        """Writes what has changed. Raises RedisError or OSError, with the sets then distrusted."""
        if self._purges:
            purges, self._purges = self._purges, []
            await self._writer.unlink(*purges)
        for life, tracked in list(self._tracked.items()):
            now = time.monotonic()
            if tracked.stale:
                if now >= tracked.rewrite_at:
                    await self._rewrite(life, tracked)
            elif tracked.pending or now >= tracked.refresh_at:
                await self._write_changes(tracked)

    async def _write_changes(self, tracked: _Tracked) -> None:
        changes, tracked.pending = tracked.pending, {}
        added = [digest for digest, held in changes.items() if held]
        removed = [digest for digest, held in changes.items() if not held]
        tracked.refresh_at = time.monotonic() + self._ttl / 3
        pipeline = self._writer.pipeline(transaction=False)
        pipeline.expire(tracked.key, self._ttl)
        for part in _chunks(added):
            pipeline.sadd(tracked.key, *part)
        for part in _chunks(removed):
            pipeline.srem(tracked.key, *part)
        # Once more, for a set that the additions have only just made.
        pipeline.expire(tracked.key, self._ttl)
        replies = await self._execute(pipeline, tracked)
        self.flushes += 1
        if tracked.filled and not replies[0]:
            self._distrust(tracked)
        tracked.filled |= bool(added)

    async def _rewrite(self, life: EngineLife, tracked: _Tracked) -> None:
        """Replaces the whole set by what the engine holds now."""
        try:
            hashes = list(tracked.resync(life))
        except Exception:
            log.exception("cannot list what engine %s holds", life.engine_id)
            tracked.rewrite_at = time.monotonic() + _BACKOFF_SECONDS[1]
            return
        # What is published from here on comes after what the hook gave.
        tracked.stale, tracked.filled = False, bool(hashes)
        tracked.refresh_at = time.monotonic() + self._ttl / 3
        pipeline = self._writer.pipeline(transaction=False)
        pipeline.unlink(tracked.key)
        for part in _chunks(hashes):
            pipeline.sadd(tracked.key, *part)
            pipeline.expire(tracked.key, self._ttl)
            await self._execute(pipeline, tracked)
        await self._execute(pipeline, tracked)
        self.flushes += 1

    async def _execute(self, pipeline: Pipeline, tracked: _Tracked) -> list[object]:
        """Sends what the pipeline has and empties it; any failure makes the set stale."""
        try:
            replies: list[object] = await pipeline.execute(raise_on_error=False)
        except BaseException:
            self._distrust(tracked)
            raise
        if any(isinstance(reply, ResponseError) for reply in replies):
            self._distrust(tracked)
            # Redis may refuse for long, for want of memory or rights: do not ask all the time.
            tracked.rewrite_at = time.monotonic() + _BACKOFF_SECONDS[1]
        return replies


def _client(url: str, username: str, password: SecretStr | None, ca: Path | None) -> Redis:
    credentials: dict[str, Any] = {}
    if username:
        credentials["username"] = username
    if password is not None:
        credentials["password"] = password.get_secret_value()
    if ca is not None:
        credentials["ssl_ca_certs"] = str(ca)
    return Redis.from_url(
        url,
        **credentials,
        socket_timeout=_IO_TIMEOUT_SECONDS,
        socket_connect_timeout=_IO_TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
        protocol=2,
    )


def _chunks(hashes: list[bytes]) -> Iterable[list[bytes]]:
    return (hashes[start : start + _CHUNK] for start in range(0, len(hashes), _CHUNK))
