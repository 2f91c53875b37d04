"""Registered prefixes in Redis, where all replicas find them, and what they have saved.

    {namespace}:1:{registered}:prefixes   hash: name -> RegisteredPrefixRecord
    {namespace}:1:{registered}:warm       hash: name -> how often it was to be warmed
    {namespace}:1:{registered}:hits       hash: name -> requests that found it
    {namespace}:1:{registered}:saved      hash: name -> tokens that they did not compute
    {namespace}:1:{registered}:version    counter, raised with every change of the first two
    {namespace}:1:{registered}:life       hash: "id" -> drawn by whoever came first

Each replica looks at version and life once a second and reads the rest when they have changed. What
it has read it keeps: a Redis that is gone costs nothing but changes. One with another life was
emptied: every replica that notices gives it back what it knows. Beside the index the only module
that knows Redis.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from control_plane.engine_link import EngineFacts
from control_plane.prefixes.registered import (
    MAX_PREFIXES,
    BadPrefix,
    Definition,
    RegisteredPrefixes,
)
from control_plane.request import Request
from protos.control.v1 import prefix_pb2

log = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 2.0
_POLL_SECONDS = 1.0


class StoreUnavailable(Exception):
    """Redis does not answer, or refuses: nothing is known to have changed."""


class TooManyPrefixes(Exception):
    """No more can be registered."""


@dataclass(slots=True)
class Saved:
    """What a registered prefix was good for."""

    hits: int = 0
    tokens: int = 0


class RegisteredStore:
    """Keeps `registered` and Redis the same.

    Attributes:
        saved: by name, of all replicas, as Redis had it last.
    """

    def __init__(self, redis: Redis, namespace: str, registered: RegisteredPrefixes) -> None:
        self._redis, self._registered = redis, registered
        self._key = f"{namespace}:1:{{registered}}:"
        self._version: bytes | None = None
        self._life: bytes | None = None
        self._failing = False
        self._unwritten_hits: Counter[str] = Counter()
        self._unwritten_tokens: Counter[str] = Counter()
        self.saved: dict[str, Saved] = {}

    async def run(self) -> None:
        """Follows Redis until cancelled."""
        while True:
            try:
                await self.refresh()
                self._failing = False
            except Exception as error:  # whatever others wrote there must not end this
                if not (self._failing or isinstance(error, StoreUnavailable)):
                    log.warning("registered prefixes in Redis cannot be read: %r", error)
                self._failing = True
            await asyncio.sleep(_POLL_SECONDS)

    def note(self, request: Request, facts: EngineFacts, cached: int) -> None:
        """Counts a request that found a registered prefix; Redis hears of it within a second."""
        if request.prefix_name and cached:
            self._unwritten_hits[request.prefix_name] += 1
            saved = min(cached, request.shared_blocks * facts.block_size)
            self._unwritten_tokens[request.prefix_name] += saved

    async def put(self, definition: Definition) -> None:
        """Registers or replaces.

        Raises:
            TooManyPrefixes, StoreUnavailable.
        """
        known = self._registered.stored
        if definition.name not in known and len(known) >= MAX_PREFIXES:
            raise TooManyPrefixes(f"there are {MAX_PREFIXES} registered prefixes already")
        await self._do(("HSET", "prefixes", definition.name, _record(definition)))

    async def remove(self, name: str) -> None:
        """Raises StoreUnavailable."""
        await self._do(*(("HDEL", key, name) for key in ("prefixes", "warm", "hits", "saved")))

    async def warm(self, name: str) -> None:
        """Has every replica warm it once. Raises StoreUnavailable."""
        await self._do(("HINCRBY", "warm", name, 1))

    async def refresh(self) -> None:
        """Writes what was counted, and reads what others changed. Raises StoreUnavailable."""
        hits, self._unwritten_hits = self._unwritten_hits, Counter()
        tokens, self._unwritten_tokens = self._unwritten_tokens, Counter()
        commands: list[tuple[Any, ...]] = []
        commands += [("HINCRBY", "hits", name, count) for name, count in hits.items()]
        commands += [("HINCRBY", "saved", name, count) for name, count in tokens.items()]
        try:
            *_, version, life, found, saved = await self._execute(
                *commands,
                ("GET", "version"),
                ("HGETALL", "life"),
                ("HGETALL", "hits"),
                ("HGETALL", "saved"),
            )
        except StoreUnavailable:
            self._unwritten_hits += hits
            self._unwritten_tokens += tokens
            raise
        self.saved = {
            name.decode(): Saved(int(count), int(saved.get(name, 0)))
            for name, count in found.items()
        }
        if self._life is None or life.get(b"id") != self._life:
            await self._join()
        elif version != self._version:
            await self._read()

    async def _do(self, *commands: tuple[Any, ...]) -> None:
        (life,) = await self._execute(("HGETALL", "life"))
        if self._life is None or life.get(b"id") != self._life:
            # Before anything is changed, or the change would be all that is read afterwards.
            await self._join()
        await self._execute(*commands, ("INCR", "version"))
        await self._read()

    async def _read(self) -> None:
        version, life, prefixes, warm = await self._execute(
            ("GET", "version"), ("HGETALL", "life"), ("HGETALL", "prefixes"), ("HGETALL", "warm")
        )
        found = {}
        for name, data in prefixes.items():
            try:
                definition = _definition(name.decode(), data)
                found[definition.name] = definition
            except (BadPrefix, DecodeError, UnicodeDecodeError) as error:
                log.warning("the registered prefix %r in Redis is none: %s", name, error)
        self._registered.set_stored(found)
        self._registered.warm_counts = {name.decode(): int(count) for name, count in warm.items()}
        self._version, self._life = version, life.get(b"id")

    async def _join(self) -> None:
        """A Redis that is new to this replica, or was emptied: gives it what is not there."""
        if self._life is not None:
            log.warning("Redis was emptied; registered prefixes are written anew")
        known = self._registered.stored.values()
        await self._execute(
            ("HSETNX", "life", "id", uuid.uuid4().hex),
            *(("HSETNX", "prefixes", each.name, _record(each)) for each in known),
            ("INCR", "version"),
        )
        await self._read()

    async def _execute(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Runs commands, each with its key's last part second, in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for command, key, *arguments in commands:
            pipeline.execute_command(command, self._key + str(key), *arguments)
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                replies: list[Any] = await pipeline.execute()
                return replies
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"Redis does not answer: {error!r}") from error


def _record(definition: Definition) -> bytes:
    return prefix_pb2.RegisteredPrefixRecord(
        text=definition.text, system=definition.system, pinned=definition.pinned
    ).SerializeToString()


def _definition(name: str, data: bytes) -> Definition:
    record = prefix_pb2.RegisteredPrefixRecord.FromString(data)
    return Definition(name, record.text, system=record.system, pinned=record.pinned)
