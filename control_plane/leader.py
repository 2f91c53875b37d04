"""Leads one engine: claims it, runs a step loop while the stream lasts, and claims it again.

When the stream breaks, everything known of running requests stays here, to be matched with the next
snapshot, or goes to another engine if this one does not come back.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from dataclasses import dataclass
from typing import Protocol

from control_plane.engine_link import EngineFacts, EngineLink, LinkLost, Refused
from control_plane.generation import Generation, Generations
from control_plane.prefix_index import PrefixIndex
from control_plane.prefixes.log import CacheLog
from control_plane.prefixes.lookups import LookupLog
from control_plane.scheduler import Scheduler
from control_plane.step_loop import LeaderSettings, StepLoop
from control_plane.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)

# How long an engine may be gone before its requests move to another one.
REHOME_SECONDS = 1.0
# How long its clients are kept waiting if there is none; then they are told to try elsewhere.
GONE_SECONDS = 30.0


class LeaderState(enum.Enum):
    CONNECTING = "connecting"
    LED = "led"
    FOLLOWED = "followed"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine was lost, and when by the monotonic clock."""

    sentence: str
    at: float


class Engines(Protocol):
    """The other engines, from here: the router."""

    lookups: LookupLog

    def rehome(self, stranded: list[Generation]) -> list[Generation]:
        """Takes generations whose engine does not come back; returns those that fit nowhere."""

    def cancel(self, generation: Generation) -> None:
        """Ends a generation wherever it runs."""


class EngineLeader:
    """One engine as this replica sees it.

    Attributes:
        loop: the step loop of the present leadership.
        leader_address: of whoever leads the engine.
        last_failure: how this replica last lost the engine while it led it. It stays when the
            engine comes back, for whoever looks only then.
    """

    def __init__(
        self,
        link: EngineLink,
        generations: Generations,
        index: PrefixIndex,
        settings: LeaderSettings,
        engines: Engines,
    ) -> None:
        self.link = link
        self.state = LeaderState.CONNECTING
        self.facts: EngineFacts | None = None
        self.tokenizer: PromptTokenizer | None = None
        self.loop: StepLoop | None = None
        self.cache_log = CacheLog(engines.lookups)
        self.epoch = 0
        self.leader_address = ""
        self.last_failure: Failure | None = None
        self._generations, self._index = generations, index
        self._settings, self._engines = settings, engines
        self._stranded: list[Generation] = []
        self._faulted = False

    @property
    def scheduler(self) -> Scheduler | None:
        return self.loop.scheduler if self.loop else None

    def release(self, generation: Generation) -> None:
        """Takes a generation off the engine, if it is there."""
        if self.loop is not None:
            self.loop.release(generation)
        if generation in self._stranded:
            self._stranded.remove(generation)

    async def run(self) -> None:
        """Leads the engine whenever it lets this replica; until cancelled."""
        lost_at, denied = time.monotonic(), False
        while True:
            try:
                await self._lead()
            except Refused as refused:
                self.state, self.leader_address = LeaderState.FOLLOWED, refused.leader_address
            except LinkLost as lost:
                if self.state is LeaderState.LED:
                    log.warning("engine %s lost: %s", self.link.address, lost)
                    lost_at = time.monotonic()
                    self.last_failure = Failure(str(lost), lost_at)
                elif lost.denied and not denied:
                    log.error(
                        "engine %s does not let this replica lead: %s", self.link.address, lost
                    )
                denied = lost.denied
                self.state = LeaderState.CONNECTING
            except Exception:
                # A fault of our own. Requests that are there each time it happens are failed, as
                # if their engine had died under them.
                log.exception("the step loop of %s failed", self.link.address)
                self.state, self._faulted = LeaderState.CONNECTING, True
            self._care_for_stranded(time.monotonic() - lost_at)
            await asyncio.sleep(self._settings.retry_seconds)

    def _care_for_stranded(self, seconds: float) -> None:
        """Finds another place for what ran on an engine that has been lost for some time."""
        if not self._stranded or seconds < REHOME_SECONDS:
            return
        self._stranded = self._engines.rehome(self._stranded)
        elsewhere = self.state is LeaderState.FOLLOWED
        if elsewhere or seconds > GONE_SECONDS:
            stranded, self._stranded = self._stranded, []
            for generation in stranded:
                generation.detach()
                self._generations.detach(generation)

    async def _lead(self) -> None:
        facts = await self.link.describe()
        if self.facts is None or facts.tokenizer_digest != self.facts.tokenizer_digest:
            self.tokenizer = await self._fetch_tokenizer(facts)
        former, self.facts = self.facts, facts
        leadership = await self.link.lead(self._settings.own_address, facts.incarnation)
        loop = StepLoop(
            facts,
            self.tokenizer,
            self._settings,
            self._generations,
            self._index,
            self.cache_log,
            self._engines.cancel,
        )
        stranded, self._stranded = self._stranded, []
        restarted = former is not None and former.incarnation != facts.incarnation
        restarted, self._faulted = restarted or self._faulted, False
        try:
            loop.take_over(leadership.snapshot, stranded, restarted)
            held = loop.scheduler.pool.held_hashes
            self._index.track(facts.fingerprint, loop.life, lambda _: held())
            self.loop, self.epoch = loop, leadership.epoch
            self.state, self.leader_address = LeaderState.LED, self._settings.own_address
            log.info("leads %s, epoch %d", facts.engine_id, leadership.epoch)
            await loop.drive(leadership)
        finally:
            leadership.close()
            self._index.forget(loop.life)
            self.loop = None
            left = dict.fromkeys([*loop.close(), *stranded])
            self._stranded += [each for each in left if self._is_ours(each)]

    def _is_ours(self, generation: Generation) -> bool:
        """Whether a generation still waits for this engine, and not for another by now."""
        running = self._generations.running(generation.request.key) is generation
        here = self.facts is not None and generation.engine_id == self.facts.engine_id
        return running and here and not generation.finished

    async def _fetch_tokenizer(self, facts: EngineFacts) -> PromptTokenizer | None:
        if not facts.tokenizer_digest:
            return None
        try:
            return await self.link.tokenizer()
        except ValueError as error:
            log.error("%s takes token ids only, its tokenizer is unusable: %s", facts.model, error)
            return None
