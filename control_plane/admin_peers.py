"""What operators ask of engines that other replicas lead: asked of those. Knows grpc and pb2."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from control_plane.access import calling
from control_plane.relay import is_relayed, relay_metadata
from control_plane.router import HERE, Router
from protos import wire
from protos.admin.v1 import admin_pb2_grpc

log = logging.getLogger(__name__)

# Within which another replica has to answer, or a list goes without it.
ANSWER_SECONDS = 2.0
MAX_PAGE_SIZE = 1000

# Of one method of the admin API, which has its name.
Answer = TypeVar("Answer", bound=Message)


@dataclass(slots=True)
class Gathered:
    """What other replicas said.

    Attributes:
        rows: of all their lists, one after the other.
        unanswered: the leaders that did not answer, by the addresses of their inference APIs.
    """

    rows: list[Any] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)


class AdminPeers:
    """The admin APIs of the replicas that lead engines which this one follows.

    They are asked for the caller, with its token if it has one, and as one replica asks another
    else. What was passed on is answered from where it arrives, so no question goes round.
    """

    def __init__(self, router: Router, tls: wire.Tls | None) -> None:
        self._router, self._tls = router, tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._certificate = wire.version(tls)
        # Those that did not answer when they were asked last.
        self._told: set[str] = set()

    async def close(self) -> None:
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))

    async def gather(
        self, kind: type[Answer], message: Any, context: wire.Context, field_name: str
    ) -> Gathered:
        """Asks every other replica that leads an engine for a list, all pages of it.

        Args:
            message: of the call that is being answered.
            field_name: of the rows in an answer.
        """
        gathered = Gathered()
        if is_relayed(context):
            return gathered
        leaders = sorted(self._router.followed())
        lists = [self._list(address, kind, message, context, field_name) for address in leaders]
        for address, rows in zip(
            leaders, await asyncio.gather(*lists, return_exceptions=True), strict=True
        ):
            if isinstance(rows, wire.RpcError):
                self._tell(address, f"{rows.code.name}: {rows.sentence}")
                gathered.unanswered.append(address)
            elif isinstance(rows, BaseException):
                raise rows
            else:
                gathered.rows += rows
        return gathered

    async def find(
        self, kind: type[Answer], message: Message, context: wire.Context
    ) -> Answer | None:
        """Asks the others one after the other for what one of them may have.

        Returns:
            The first answer; None: it is nowhere.

        Raises:
            RpcError: UNAVAILABLE, it may be where nobody answers.
        """
        if is_relayed(context):
            return None
        silent: wire.RpcError | None = None
        for address in sorted(self._router.followed()):
            try:
                return await self.ask(address, kind, message, context)
            except wire.RpcError as error:
                if error.code is not grpc.StatusCode.NOT_FOUND:
                    silent = error
        if silent is not None:
            raise silent
        return None

    async def ask_leader(
        self, engine_id: str, kind: type[Answer], message: Message, context: wire.Context
    ) -> Answer | None:
        """Passes a call on to the replica that leads an engine; None: no other one does.

        Raises:
            RpcError: what that one said; UNAVAILABLE if it does not answer.
        """
        address = self._router.place_of(engine_id) if engine_id else None
        if not address or is_relayed(context):
            return None
        return await self.ask(address, kind, message, context, waits=True)

    async def ask_any(
        self, places: Iterable[str], kind: type[Answer], message: Message, context: wire.Context
    ) -> Answer | None:
        """Passes a call on to the first of several places that answers; None: to none of them.

        Raises:
            RpcError: what that one said; UNAVAILABLE if none answers.
        """
        silent: wire.RpcError | None = None
        for address in places:
            if address == HERE or is_relayed(context):
                continue
            try:
                return await self.ask(address, kind, message, context, waits=True)
            except wire.RpcError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                silent = error
        if silent is not None:
            raise silent
        return None

    async def ask(
        self,
        address: str,
        kind: type[Answer],
        message: Message,
        context: wire.Context,
        *,
        waits: bool = False,
    ) -> Answer:
        """Passes a call on.

        Args:
            address: of the other replica's inference API.
            waits: for as long as the caller does.

        Raises:
            RpcError: what the other replica said; UNAVAILABLE if it does not answer.
        """
        left = context.time_remaining()
        seconds = left if waits else min(ANSWER_SECONDS, left or ANSWER_SECONDS)
        call = getattr(self._stub(address), kind.DESCRIPTOR.name.removesuffix("Response"))
        try:
            metadata = relay_metadata(context, calling().tenant)
            answer: Answer = await call(message, timeout=seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if wire.error_details(error):
                raise wire.passed_on(error) from error
            raise self._silent(address, f"{error.code().name}: {error.details()}") from error
        self._told.discard(address)
        return answer

    async def _list(
        self, address: str, kind: type[Answer], message: Any, context: wire.Context, field_name: str
    ) -> list[Any]:
        question, rows = type(message)(), []
        question.CopyFrom(message)
        paged = "page_size" in message.DESCRIPTOR.fields_by_name
        if paged:
            question.page_size, question.page_token = MAX_PAGE_SIZE, ""
        while True:
            answer: Any = await self.ask(address, kind, question, context)
            rows += getattr(answer, field_name)
            if not (paged and answer.next_page_token):
                return rows
            question.page_token = answer.next_page_token

    def _stub(self, address: str) -> Any:
        """Raises RpcError: it has told no engine where its admin API is."""
        known, renewed = dict(self._admins()), wire.is_outdated(self._tls, self._certificate)
        if renewed:
            self._certificate = wire.version(self._tls)
        for gone in [each for each in self._channels if renewed or each not in known]:
            # It is not used any more. Calls in progress end as if it were.
            del self._channels[gone]
        if not known.get(address):
            raise self._silent(address, "it does not say where its admin API is")
        if address not in self._channels:
            self._channels[address] = wire.channel(known[address], self._tls)
        return admin_pb2_grpc.AdminServiceStub(self._channels[address])

    def _admins(self) -> Iterable[tuple[str, str]]:
        for leader in self._router.leaders:
            if leader.elsewhere:
                yield leader.elsewhere, leader.leader_at.admin

    def _silent(self, address: str, why: str) -> wire.RpcError:
        """The error of a replica that does not answer."""
        self._tell(address, why)
        sentence = f"the replica at {address} that leads the engine does not answer: {why}"
        return wire.failed(grpc.StatusCode.UNAVAILABLE, "LEADER_GONE", sentence)

    def _tell(self, address: str, why: str) -> None:
        """Says in the log why a replica gave no answer, once until it gives one."""
        if address not in self._told:
            self._told.add(address)
            log.warning("the admin API of the replica at %s does not answer: %s", address, why)
