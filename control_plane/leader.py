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
from functools import partial
from typing import Protocol

from control_plane.engine_link import EngineFacts, EngineLink, LinkLost, Refused, ReplicaAddress
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
# The same for an engine that had said that it would go: whoever stopped it starts another.
REPLACED_SECONDS = 600.0
# How long a replica that drains leaves an engine to others before it claims it.
RELUCTANT_SECONDS = 1.0


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

    def rehome(self, stranded: list[Generation], *, died: bool) -> list[Generation]:
        """Takes generations whose engine does not come back; returns those that fit nowhere."""

    def spread(self) -> None:
        """Moves what waits for draining engines to those that are not."""

    def disperse(self, draining: StepLoop) -> None:
        """Moves what waits for an engine that begins to drain, to other replicas if need be."""

    def cancel(self, generation: Generation) -> None:
        """Ends a generation wherever it runs."""


class EngineLeader:
    """One engine as this replica sees it.

    Attributes:
        loop: the step loop of the present leadership. When a draining engine has gone, another
            one stands in for it, which only keeps what comes until the engine is back.
        leader_at: where whoever leads the engine is, or did when that was last known.
        last_failure: how this replica last lost the engine while it led it. It stays when the
            engine comes back, for whoever looks only then.
        reluctant: this replica is about to end; another one is to lead the engine, if there is one.
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
        self.leader_at = ReplicaAddress()
        self.last_failure: Failure | None = None
        self.reluctant = False
        self._generations, self._index = generations, index
        self._settings, self._engines = settings, engines
        self._stranded: list[Generation] = []
        self._faulted = False
        # An operator wants it drained; and it was draining when it was lost.
        self._drain_wanted, self._announced = False, False

    @property
    def scheduler(self) -> Scheduler | None:
        return self.loop.scheduler if self.loop else None

    @property
    def _fields(self) -> dict[str, object]:
        """What log lines are about."""
        return {"engine": self.facts.engine_id if self.facts else "", "epoch": self.epoch}

    @property
    def elsewhere(self) -> str:
        """The address of the other replica that leads the engine, as far as is known."""
        return "" if self.loop is not None or self._is_own_address else self.leader_at.inference

    @property
    def _is_own_address(self) -> bool:
        return self.leader_at.inference == self._settings.own_address.inference

    @property
    def draining(self) -> bool:
        """Nothing new is begun on the engine: an operator wants that, or it is going to end."""
        return self._drain_wanted or (self.loop is not None and self.loop.draining)

    def drain(self) -> None:
        """Begins nothing new on the engine; what waits moves if it can, what runs ends."""
        self._drain_wanted = True
        if self.loop is not None:
            self.loop.drain(True)
            self._engines.disperse(self.loop)

    def undrain(self) -> None:
        """Uses the engine again, unless it is going to end by itself."""
        self._drain_wanted = False
        if self.loop is not None:
            self.loop.drain(False)
            self._engines.spread()

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
                self.state, self.leader_at = LeaderState.FOLLOWED, refused.leader
            except LinkLost as lost:
                if self.state is LeaderState.LED:
                    self._count_loss()
                    log.warning("engine %s lost: %s", self.link.address, lost, extra=self._fields)
                    lost_at = time.monotonic()
                    self.last_failure = Failure(str(lost), lost_at)
                    self._stand_in()
                elif lost.denied and not denied:
                    log.error(
                        "engine %s does not let this replica lead: %s", self.link.address, lost
                    )
                denied = lost.denied
                self.state = LeaderState.CONNECTING
            except Exception:
                # A fault of our own. Requests that are there each time it happens are failed, as
                # if their engine had died under them.
                address = self.link.address
                log.exception("the step loop of %s failed", address, extra=self._fields)
                self._count_loss()
                self.state, self._faulted = LeaderState.CONNECTING, True
            self._care_for_stranded(time.monotonic() - lost_at)
            seconds = self._settings.retry_seconds
            await asyncio.sleep(RELUCTANT_SECONDS if self.reluctant else seconds)

    def _count_loss(self) -> None:
        if self.state is LeaderState.LED and self.facts is not None:
            facts = self.facts
            self._generations.counters.engine(facts.engine_id, facts.model).losses += 1

    def _care_for_stranded(self, seconds: float) -> None:
        """Finds another place for what ran on an engine that has been lost for some time."""
        followed = self.state is LeaderState.FOLLOWED
        if followed and not self._is_own_address:
            # Another replica leads it, and has what ran there.
            self._let_go()
            return
        late, announced = seconds > REHOME_SECONDS, self._announced
        if self._stranded and (late or announced):
            self._stranded = self._engines.rehome(self._stranded, died=not announced)
        if (late and followed) or seconds > (REPLACED_SECONDS if announced else GONE_SECONDS):
            self._let_go()

    def _let_go(self) -> None:
        """Sends the clients of what is still here to wherever it goes on."""
        self._dismiss()
        stranded, self._stranded = self._stranded, []
        for generation in stranded:
            generation.detach()
            self._generations.detach(generation)

    def _stand_in(self) -> None:
        """If the engine was draining, keeps what comes for it until it is back."""
        if self._announced and self.facts is not None:
            self.loop = self._new_loop(self.facts)
            self.loop.engine_drains = True
            self.loop.drain(True)

    def _dismiss(self) -> None:
        """Ends the loop that stands in, if one does; what it was given is stranded then."""
        if self.loop is not None:
            loop, self.loop = self.loop, None
            self._stranded += [each for each in loop.close() if self._is_ours(each)]

    async def _lead(self) -> None:
        facts = await self.link.describe()
        if self.facts is None or facts.tokenizer_digest != self.facts.tokenizer_digest:
            self.tokenizer = await self._fetch_tokenizer(facts)
        former, self.facts = self.facts, facts
        leadership = await self.link.lead(self._settings.own_address, facts.incarnation)
        loop = self._new_loop(facts)
        self._dismiss()
        stranded, self._stranded = self._stranded, []
        restarted = former is not None and former.incarnation != facts.incarnation
        died = (restarted and not self._announced) or self._faulted
        self._announced = self._faulted = False
        try:
            loop.take_over(leadership.snapshot, stranded, died)
            held = loop.scheduler.pool.held_hashes
            self._index.track(facts.fingerprint, loop.life, lambda _: held())
            self.loop, self.epoch = loop, leadership.epoch
            self.state, self.leader_at = LeaderState.LED, self._settings.own_address
            loop.counters.leaderships += 1
            log.info("leads %s, epoch %d", facts.engine_id, leadership.epoch, extra=self._fields)
            # What was waiting for this engine elsewhere, or waits for it and could run elsewhere.
            self._engines.spread()
            await loop.drive(leadership)
        finally:
            leadership.close()
            self._index.forget(loop.life)
            self.loop, self._announced = None, loop.draining
            left = dict.fromkeys([*loop.close(), *stranded])
            self._stranded += [each for each in left if self._is_ours(each)]

    def _new_loop(self, facts: EngineFacts) -> StepLoop:
        loop = StepLoop(
            facts,
            self.tokenizer,
            self._settings,
            self._generations,
            self._index,
            self.cache_log,
            self._engines.cancel,
        )
        loop.on_draining = partial(self._engines.disperse, loop)
        loop.drain(self._drain_wanted)
        return loop

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
