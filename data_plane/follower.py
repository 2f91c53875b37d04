"""What every rank of an engine but rank 0 does: what rank 0 tells it, in the same order."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from data_plane.engine import Engine, Launched
from data_plane.load_progress import pulse
from data_plane.plan import PlanError, decode_plan
from data_plane.rank_link import Kind, Link, LinkEnded
from data_plane.ranks import (
    EXIT_BAD_MODEL,
    EXIT_RANK_LOST,
    EXIT_WORKER_FAILED,
    SETTLE_SECONDS,
    Children,
    Place,
    end,
    join,
    lost_child,
    open_store,
    start_others,
)
from data_plane.worker import Worker
from protos.engine.v1 import engine_pb2

log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.1


def follow(
    place: Place,
    build: Callable[[Store], Engine],
    refusals: tuple[type[Exception], ...],
    hung_seconds: float,
    stop_seconds: float,
) -> int:
    """Joins rank 0 and does what it says until it says that it is enough.

    The first rank of a machine starts the others there; they have links of their own.

    Args:
        build: makes this rank's engine, on the thread that will run it.
        refusals: what `build` raises for a model that cannot be served.

    Returns:
        The exit status.
    """
    children = start_others(place, place.port) if place.starts_others else {}
    try:
        store = open_store(place)
        link = join(place, store)
        worker = Worker()
        worker.start()
        built = worker.submit(partial(build, store))
        follower = _Follower(place.rank, link, worker, built, children)
        # A signal for one rank is one for the engine, which rank 0 ends in good order.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: link.send(Kind.STOP))
        while (loss := follower.trouble(refusals, hung_seconds)) is None:
            follower.tell_progress()
            if not follower.obey(_WATCH_SECONDS):
                stopped = worker.stop(stop_seconds)
                end(children.values(), stop_seconds)
                return 0 if stopped else EXIT_WORKER_FAILED
        kind, sentence, status = loss
        link.send(kind, sentence.encode())
    except (LinkEnded, dist.DistError) as error:
        log.critical("rank %d ends, because rank 0 is gone: %s", place.rank, error)
        return EXIT_RANK_LOST
    return status


class _Follower:
    """One rank: frames come in on the calling thread, and the worker does what they say.

    So the end of rank 0 is seen even while the worker waits for it in a collective.
    """

    def __init__(
        self, rank: int, link: Link, worker: Worker, engine: Future[Engine], children: Children
    ) -> None:
        self._rank, self._link, self._worker, self._engine = rank, link, worker, engine
        self._children = children

    def trouble(
        self, refusals: tuple[type[Exception], ...], hung_seconds: float
    ) -> tuple[Kind, str, int] | None:
        """Says why this rank cannot go on, if that is so: what to tell rank 0, and the exit status.

        Raises:
            LinkEnded: rank 0 is gone, from which the rest followed.
        """
        built, error = self._engine.done(), self._worker.failed
        if error is not None and isinstance(error, refusals) and self._engine.exception() is error:
            return Kind.REFUSED, str(error), EXIT_BAD_MODEL
        if error is not None:
            self._wait_for_the_end(SETTLE_SECONDS)
            log.critical("the worker of rank %d is gone", self._rank, exc_info=error)
            return Kind.FAILED, f"its worker failed: {error!r}", EXIT_WORKER_FAILED
        if built and self._worker.stuck_seconds > hung_seconds:
            return Kind.FAILED, f"one step takes more than {hung_seconds:g} s", EXIT_WORKER_FAILED
        # Rank 0 does not know of one that ended before it had a link.
        if sentence := lost_child(self._children):
            self._wait_for_the_end(SETTLE_SECONDS)
            return Kind.FAILED, sentence, EXIT_RANK_LOST
        return None

    def tell_progress(self) -> None:
        """Tells rank 0 how far the engine is, while it is built.

        Raises:
            LinkEnded: rank 0 is gone.
        """
        if not self._engine.done():
            self._link.send(Kind.PROGRESS, pulse.count.to_bytes(8, "little"))

    def obey(self, seconds: float) -> bool:
        """Takes a frame, if one comes in the given time; returns False where it was the last.

        Raises:
            LinkEnded: rank 0 is gone.
        """
        frame = self._link.receive(seconds)
        if frame is None:
            return True
        kind, payload = frame
        if kind is Kind.STOP:
            return False
        engine = self._engine.result()
        if kind is Kind.PLAN:
            self._worker.submit_device(partial(self._launch, engine, payload))
        elif kind is Kind.PAUSE:
            self._worker.submit(engine.snapshot)
        elif kind is Kind.RELEASE_ALL:
            self._worker.submit(engine.release_all)
        return True

    def _launch(self, engine: Engine, payload: bytes) -> Launched:
        try:
            return engine.launch(decode_plan(engine_pb2.StepPlan.FromString(payload)))
        except PlanError as error:
            # Rank 0 has checked it on what should be the same state.
            raise RuntimeError(f"its state is not that of rank 0: {error}") from error

    def _wait_for_the_end(self, seconds: float) -> None:
        """Reads on for a while, to see whether rank 0 is gone; what it says no longer matters."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._link.receive(left)
