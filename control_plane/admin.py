"""The admin API: what engines hold, and what operators want. Knows grpc and pb2.

A replica knows the engines that it leads. What others lead it asks of those, unless it was asked by
another replica itself.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np

from control_plane import admin_merge as merge
from control_plane import admin_views as views
from control_plane.admin_peers import MAX_PAGE_SIZE, AdminPeers, Answer, Gathered
from control_plane.engine_link import EngineFacts
from control_plane.leader import EngineLeader
from control_plane.prefix_index import EngineLife, PrefixIndex
from control_plane.prefixes.explainer import Explainer
from control_plane.prefixes.keeper import PrefixKeeper
from control_plane.prefixes.registered import BadPrefix, Definition, RegisteredPrefixes
from control_plane.prefixes.stats import PrefixHits
from control_plane.prefixes.store import (
    RegisteredStore,
    Saved,
    StoreUnavailable,
    TooManyPrefixes,
)
from control_plane.prompts import tokenise
from control_plane.router import HERE, AmbiguousModel, NoEngine, Router, UnknownModel
from control_plane.scheduler import Scheduler
from control_plane.tokenizer import PromptTokenizer
from protos import validation, wire
from protos.admin.v1 import admin_pb2 as pb
from protos.admin.v1 import admin_pb2_grpc
from protos.inference.v1 import inference_pb2

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
DEFAULT_PAGE_SIZE = 100

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Operated:
    """What of a replica operators look at and change."""

    router: Router
    index: PrefixIndex
    registered: RegisteredPrefixes
    store: RegisteredStore
    keeper: PrefixKeeper
    peers: AdminPeers


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """Thin: finds what a call is about, and shows it."""

    def __init__(self, operated: Operated) -> None:
        self._router, self._index = operated.router, operated.index
        self._registered, self._store = operated.registered, operated.store
        self._keeper, self._peers = operated.keeper, operated.peers
        self._explainer = Explainer(self._router, self._index, self._registered)

    # Engines, sequences and blocks.

    async def ListEngines(
        self, message: pb.ListEnginesRequest, context: wire.Context
    ) -> pb.ListEnginesResponse:
        others = await self._peers.gather(pb.ListEnginesResponse, message, context, "engines")
        own = [views.engine(leader) for leader in self._router.leaders]
        engines = merge.engines(own, others.rows)
        page, token = await _page(engines, message.page_size, message.page_token, context)
        return pb.ListEnginesResponse(
            engines=page, next_page_token=token, unanswered_replicas=others.unanswered
        )

    async def ListSequences(
        self, message: pb.ListSequencesRequest, context: wire.Context
    ) -> pb.ListSequencesResponse:
        others = await self._peers.gather(pb.ListSequencesResponse, message, context, "sequences")
        own = [
            views.sequence(leader, scheduler, sequence)
            for leader, scheduler in self._led(message.engine_id)
            for group in scheduler.groups
            for sequence in group.sequences
            if sequence.finish is None
        ]
        sequences = own + others.rows
        page, token = await _page(sequences, message.page_size, message.page_token, context)
        return pb.ListSequencesResponse(
            sequences=page, next_page_token=token, unanswered_replicas=others.unanswered
        )

    async def GetBlockTable(
        self, message: pb.GetBlockTableRequest, context: wire.Context
    ) -> pb.GetBlockTableResponse:
        if message.engine_id and not self._led(message.engine_id):
            return await self._at_leader(pb.GetBlockTableResponse, message, context)
        for _, scheduler in self._led(message.engine_id):
            for group in scheduler.groups:
                request = group.request
                if request.request_id != message.request_id:
                    continue
                if message.HasField("tenant") and request.salt != message.tenant:
                    continue
                for sequence in group.resident():
                    if sequence.sample_index == message.sample:
                        blocks = views.block_table(scheduler, sequence.slot)
                        return pb.GetBlockTableResponse(blocks=blocks)
        sentence = "no such sequence is resident on an engine"
        missing = wire.failed(grpc.StatusCode.NOT_FOUND, "NO_SEQUENCE", sentence)
        if message.engine_id:
            return await wire.abort(context, missing)
        return await self._elsewhere(pb.GetBlockTableResponse, message, context, missing)

    async def GetBlockMap(
        self, message: pb.GetBlockMapRequest, context: wire.Context
    ) -> pb.GetBlockMapResponse:
        for _, scheduler in self._led(message.engine_id):
            if message.engine_id:
                return views.block_map(scheduler)
        return await self._at_leader(pb.GetBlockMapResponse, message, context)

    # Prefixes.

    async def ListPrefixes(
        self, message: pb.ListPrefixesRequest, context: wire.Context
    ) -> pb.ListPrefixesResponse:
        if self._is_led_elsewhere(message.engine_id):
            return await self._at_leader(pb.ListPrefixesResponse, message, context)
        others = Gathered()
        if not message.engine_id:
            others = await self._peers.gather(pb.ListPrefixesResponse, message, context, "prefixes")
        own = [
            views.prefix(hits if self._registered.get(hits.name) else hits.unnamed(), facts.model)
            for facts, hits in self._hits(message.engine_id)
        ]
        prefixes = merge.prefixes(own, others.rows)
        page, token = await _page(prefixes, message.page_size, message.page_token, context)
        await self._add_holders(page)
        return pb.ListPrefixesResponse(
            prefixes=page, next_page_token=token, unanswered_replicas=others.unanswered
        )

    async def ExplainPrompt(
        self, message: pb.ExplainPromptRequest, context: wire.Context
    ) -> pb.ExplainPromptResponse:
        places = self._router.places(message.model)
        try:
            if places[0] != HERE:
                answer = await self._peers.ask_any(
                    places, pb.ExplainPromptResponse, message, context
                )
                if answer is not None:
                    return answer
            facts, tokenizer = self._model(message.model)
            form = message.WhichOneof("prompt")
            if form is None:
                raise wire.bad_field("prompt", "is missing")
            prompt = inference_pb2.GenerateRequest(**{form: getattr(message, form)})
            limits = validation.ModelLimits(facts.vocabulary_size, facts.max_length)
            validation.check_request(prompt, limits)
            ids = np.array(await tokenise(prompt, tokenizer), np.int32)
        except wire.RpcError as error:
            await wire.abort(context, error)
        found = await self._explainer.prompt(ids, message.tenant, facts)
        return pb.ExplainPromptResponse(explanation=views.explanation(found))

    async def ExplainRequest(
        self, message: pb.ExplainRequestRequest, context: wire.Context
    ) -> pb.ExplainRequestResponse:
        tenant = message.tenant if message.HasField("tenant") else None
        lookup = self._router.lookups.get(message.request_id, tenant)
        if lookup is None or lookup.facts is None:
            known = "is not known, or too long ago"
            sentence = known if lookup is None else "waits for an engine"
            error = wire.failed(grpc.StatusCode.NOT_FOUND, "NO_LOOKUP", f"this request {sentence}")
            if lookup is None:
                return await self._elsewhere(pb.ExplainRequestResponse, message, context, error)
            await wire.abort(context, error)
        found = await self._explainer.request(lookup, lookup.facts)
        explanation = views.explanation(found, message.request_id)
        return pb.ExplainRequestResponse(explanation=explanation)

    # Registered prefixes.

    async def ListRegisteredPrefixes(
        self, message: pb.ListRegisteredPrefixesRequest, context: wire.Context
    ) -> pb.ListRegisteredPrefixesResponse:
        others = await self._peers.gather(
            pb.ListRegisteredPrefixesResponse, message, context, "prefixes"
        )
        own = [self._shown(each) for each in self._registered.definitions]
        return pb.ListRegisteredPrefixesResponse(
            prefixes=merge.registered_prefixes(own, others.rows),
            unanswered_replicas=others.unanswered,
        )

    async def RegisterPrefix(
        self, message: pb.RegisterPrefixRequest, context: wire.Context
    ) -> pb.RegisterPrefixResponse:
        try:
            if message.form not in pb.PrefixForm.values():
                raise wire.bad_field("form", f"is {message.form}; there is no such form")
            definition = Definition(
                message.name,
                message.text,
                system=message.form != pb.PREFIX_FORM_PLAIN,
                pinned=message.pinned,
            )
            self._check_not_declared(message.name)
            return pb.RegisterPrefixResponse(prefix=await self._put(definition))
        except BadPrefix as error:
            await wire.abort(context, wire.bad_field(error.field, str(error)))
        except wire.RpcError as error:
            await wire.abort(context, error)

    async def UpdatePrefix(
        self, message: pb.UpdatePrefixRequest, context: wire.Context
    ) -> pb.UpdatePrefixResponse:
        try:
            known = await self._definition(message.name)
            self._check_not_declared(message.name)
            changed = Definition(known.name, known.text, known.system, message.pinned)
            return pb.UpdatePrefixResponse(prefix=await self._put(changed))
        except wire.RpcError as error:
            await wire.abort(context, error)

    async def UnregisterPrefix(
        self, message: pb.UnregisterPrefixRequest, context: wire.Context
    ) -> pb.UnregisterPrefixResponse:
        try:
            await self._definition(message.name)
            self._check_not_declared(message.name)
            await self._store.remove(message.name)
        except StoreUnavailable as error:
            await wire.abort(context, _unavailable(error))
        except wire.RpcError as error:
            await wire.abort(context, error)
        return pb.UnregisterPrefixResponse()

    async def WarmPrefix(
        self, message: pb.WarmPrefixRequest, context: wire.Context
    ) -> pb.WarmPrefixResponse:
        try:
            definition = await self._definition(message.name)
            await self._store.warm(message.name)
        except StoreUnavailable as error:
            await wire.abort(context, _unavailable(error))
        except wire.RpcError as error:
            await wire.abort(context, error)
        await self._keeper.attend()
        return pb.WarmPrefixResponse(prefix=self._shown(definition))

    # Engines that are to end.

    async def DrainEngine(
        self, message: pb.DrainEngineRequest, context: wire.Context
    ) -> pb.DrainEngineResponse:
        for leader in self._router.leaders:
            if leader.loop is not None and message.engine_id == views.engine_id(leader):
                if message.resume:
                    leader.undrain()
                else:
                    leader.drain()
                return pb.DrainEngineResponse(engine=views.engine(leader))
        answer = await self._at_leader(pb.DrainEngineResponse, message, context)
        own = [views.engine(leader) for leader in self._router.leaders]
        shown = merge.engines(own, [answer.engine])
        return pb.DrainEngineResponse(
            engine=next(row for row in shown if row.engine_id == message.engine_id)
        )

    async def _put(self, definition: Definition) -> pb.RegisteredPrefix:
        try:
            await self._store.put(definition)
        except TooManyPrefixes as error:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            raise wire.failed(code, "TOO_MANY_PREFIXES", str(error)) from error
        except StoreUnavailable as error:
            raise _unavailable(error) from error
        await self._keeper.attend()
        return self._shown(definition)

    def _shown(self, definition: Definition) -> pb.RegisteredPrefix:
        saved = self._store.saved.get(definition.name, Saved())
        return views.registered_prefix(definition, self._keeper.standing(definition), saved)

    async def _definition(self, name: str) -> Definition:
        """What is registered under a name now; another replica may have changed it just before.

        Raises:
            RpcError: nothing is.
        """
        with suppress(StoreUnavailable):
            await self._store.refresh()
        definition = self._registered.get(name)
        if definition is None:
            sentence = f"no prefix is registered as {name!r}"
            raise wire.failed(grpc.StatusCode.NOT_FOUND, "NO_PREFIX", sentence)
        return definition

    def _check_not_declared(self, name: str) -> None:
        definition = self._registered.get(name)
        if definition is not None and definition.declared:
            sentence = f"{name} is declared in the file of --prefixes; change it there"
            code = grpc.StatusCode.FAILED_PRECONDITION
            raise wire.failed(code, "DECLARED_IN_FILE", sentence)

    # Finding things.

    def _led(self, engine_id: str) -> list[tuple[EngineLeader, Scheduler]]:
        return [
            (leader, leader.scheduler)
            for leader in self._router.leaders
            if leader.scheduler is not None and engine_id in ("", views.engine_id(leader))
        ]

    def _model(self, name: str) -> tuple[EngineFacts, PromptTokenizer | None]:
        try:
            loop = self._router.candidates(name)[0]
            return loop.facts, loop.tokenizer
        except UnknownModel as error:
            raise wire.failed(grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", str(error)) from error
        except AmbiguousModel as error:
            raise wire.bad_field("model", str(error)) from error
        except NoEngine as error:
            raise wire.failed(grpc.StatusCode.UNAVAILABLE, "NO_ENGINE", str(error)) from error

    def _hits(self, engine_id: str) -> list[tuple[EngineFacts, PrefixHits]]:
        """Prefixes that were hit, those of several engines added up, most tokens saved first.

        With an engine's id: only those that it holds.
        """
        merged: dict[bytes, tuple[EngineFacts, PrefixHits]] = {}
        named = self._led(engine_id) if engine_id else []
        for leader, _ in self._led(""):
            if leader.facts is None:
                continue
            for hits in leader.cache_log.stats.top():
                if not engine_id or any(each.pool.holds(hits.digest) for _, each in named):
                    former = merged.get(hits.digest)
                    both = hits if former is None else former[1].plus(hits)
                    merged[hits.digest] = leader.facts, both
        return sorted(merged.values(), key=lambda found: -found[1].saved_tokens)

    async def _add_holders(self, rows: Items[pb.Prefix]) -> None:
        """Says on which engines the last blocks of prefixes are, and which ones are pinned."""
        digests = [row.prefix_hash for row in rows]
        holders: dict[bytes, dict[str, int]] = {digest: {} for digest in digests}
        for leader, scheduler in self._led(""):
            for digest in digests:
                block = scheduler.pool.block_of(digest)
                if block is not None:
                    references = int(scheduler.pool.reference_counts[block])
                    holders[digest][views.engine_id(leader)] = references
        for leader in self._router.leaders:
            if leader.loop is None and leader.facts is not None:
                life = EngineLife(leader.facts.engine_id, leader.facts.incarnation)
                held = await self._index.holders(leader.facts.fingerprint, [life], digests)
                for digest in held[life]:
                    holders[digest][life.engine_id] = 0
        pinned = self._pinned()
        for row in rows:
            merge.add_holders(row, holders[row.prefix_hash])
            row.pinned = row.prefix_hash in pinned

    def _pinned(self) -> set[bytes]:
        """The hashes of all pinned prefixes, for all models."""
        facts = [leader.facts for leader in self._router.leaders if leader.facts is not None]
        return {
            digest
            for each in {facts.kind: facts for facts in facts}.values()
            for definition in self._registered.definitions
            if definition.pinned
            for digest in self._registered.hashes(definition, each)
        }

    # What other replicas know.

    def _is_led_elsewhere(self, engine_id: str) -> bool:
        return bool(engine_id and self._router.place_of(engine_id))

    async def _at_leader(self, kind: type[Answer], message: Any, context: wire.Context) -> Answer:
        """Passes a call about one engine on to the replica that leads it, or ends it."""
        try:
            answer = await self._peers.ask_leader(message.engine_id, kind, message, context)
        except wire.RpcError as error:
            await wire.abort(context, error)
        if answer is None:
            sentence = f"no engine {message.engine_id!r} is led"
            missing = wire.failed(grpc.StatusCode.NOT_FOUND, "NO_ENGINE", sentence)
            await wire.abort(context, missing)
        return answer

    async def _elsewhere(
        self, kind: type[Answer], message: Any, context: wire.Context, missing: wire.RpcError
    ) -> Answer:
        """Asks the other replicas for what is not here; `missing` ends the call if none has it."""
        try:
            answer = await self._peers.find(kind, message, context)
        except wire.RpcError as error:
            await wire.abort(context, error)
        return answer if answer is not None else await wire.abort(context, missing)


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


def _unavailable(error: StoreUnavailable) -> wire.RpcError:
    sentence = f"{error}; registered prefixes are kept there, nothing is known to have changed"
    return wire.failed(grpc.StatusCode.UNAVAILABLE, "NO_REDIS", sentence)
