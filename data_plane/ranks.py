"""One engine of several processes, its ranks: how they meet, and how the loss of one is noticed.

Rank 0 has the engine API. It tells every other rank over a link what to do and does the same
itself, so that all hold the same state; on the way of a step nothing waits for an answer. A rank
that ends, whatever ended it, ends the engine: what it held is part of every layer.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from data_plane.rank_link import SECRET_BYTES, Hello, Kind, Link, LinkEnded, listen, loopback
from protos import tether

log = logging.getLogger(__name__)

EXIT_BAD_MODEL = 2
# The device worker failed: its memory cannot be trusted, a fresh process can.
EXIT_WORKER_FAILED = 70
# Another rank ended under this one.
EXIT_RANK_LOST = 71

# For all ranks to come, and to load: the nodes of a group may start minutes apart.
START_SECONDS = 600.0
# A death makes the other ranks' collectives fail at almost the same time: whoever hears of one
# such thing waits so long for the rest, to tell the cause from what follows from it.
SETTLE_SECONDS = 0.25
# Times the limit of a step, for parts of a start: large tensors come over a network, and memory is
# pinned.
BUILD_FACTOR = 10
_POLL_SECONDS = 0.1
_LOOPBACK = "127.0.0.1"
_MEETING = "quire/links"
_MEETING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_PLACE_VARIABLES = ("RANK", "WORLD_SIZE", *_MEETING_VARIABLES)
# torchrun's names for a machine's number, and for how many there are.
_MACHINE_VARIABLES = ("GROUP_RANK", "GROUP_WORLD_SIZE", *_MEETING_VARIABLES)

# Processes that this one has started, by their rank.
Children = dict[int, subprocess.Popen[bytes]]


@dataclass(frozen=True, slots=True)
class Loss:
    """Why an engine cannot go on, in a sentence, and the exit status that says so."""

    sentence: str
    status: int = EXIT_RANK_LOST


class RankLost(Exception):
    """The ranks of an engine did not all come, or one has gone."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.sentence)
        self.loss = loss


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among the ranks of its engine.

    Attributes:
        local_rank: among those on its machine, of which there are `local_size`.
        host, port: of the store where they meet; port 0: one that rank 0 opens for its machine.
        starts_others: it starts the other ranks of its machine, as whose first it was started.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = _LOOPBACK
    port: int = 0
    starts_others: bool = False

    @classmethod
    def of(cls, wanted: int | None, environment: Mapping[str, str]) -> Self:
        """Takes the place that the variables of torchrun name, or else that of rank 0.

        Where they name a machine and no rank, it is that of the machine's first rank.

        Args:
            wanted: the number of ranks that was asked for, if one was.

        Raises:
            ValueError: the variables contradict each other, or what was asked for.
        """
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            if "GROUP_RANK" in environment or "GROUP_WORLD_SIZE" in environment:
                return cls._first_of_machine(wanted, environment)
            return cls(size=wanted or 1, local_size=wanted or 1, starts_others=True)
        _all_of(_PLACE_VARIABLES, environment)
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if wanted not in (None, size):
            raise ValueError(f"WORLD_SIZE is {size} where tensor-parallel is {wanted}")
        if not 0 <= rank < size:
            raise ValueError(f"RANK is {rank}, which is none of {size} ranks")
        return cls(
            rank,
            size,
            _number(environment, "LOCAL_RANK", "0"),
            _number(environment, "LOCAL_WORLD_SIZE", "1"),
            environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT"),
        )

    @classmethod
    def _first_of_machine(cls, wanted: int | None, environment: Mapping[str, str]) -> Self:
        _all_of(_MACHINE_VARIABLES, environment)
        machine, count = (_number(environment, name) for name in _MACHINE_VARIABLES[:2])
        if not 0 <= machine < count:
            raise ValueError(f"GROUP_RANK is {machine}, which is none of {count} machines")
        if not wanted or wanted % count:
            raise ValueError(f"{count} machines do not divide tensor-parallel {wanted or 1}")
        local_size = wanted // count
        return cls(
            machine * local_size,
            wanted,
            0,
            local_size,
            environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT"),
            starts_others=True,
        )

    def device(self, wanted: str) -> torch.device:
        """Raises ValueError: there is no such device for this rank."""
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(wanted)
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(f"device {wanted} is one, where each rank needs its own: say cuda")
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(f"rank {self.rank} needs device cuda:{self.local_rank} of {count}")
        return torch.device("cuda", self.local_rank)


class Ranks:
    """The other ranks of an engine, as rank 0 has them: none where it is alone.

    Attributes:
        store: where a process group is formed; None where rank 0 is alone.
        lost: done as soon as the engine cannot go on without one of them.
        asked_to_stop: set when one of them got a signal to end.
    """

    def __init__(self) -> None:
        self.store: Store | None = None
        self.lost: Future[Loss] = Future()
        self.asked_to_stop = threading.Event()
        self._children: Children = {}
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()
        # What was heard so far. The cause is what has the lowest number, and came first of those:
        # 0 is a death without a word, 1 a complaint, which may follow from the death of another.
        self._heard: list[tuple[int, Loss]] = []
        self._ending = False
        # While the engine is built: how far each rank is, and when it said so; by rank.
        self._progress: dict[int, tuple[int, float]] = {}
        self._names = {0: "rank 0"}
        self._got_on = time.monotonic()

    @property
    def alone(self) -> bool:
        return not self._links

    @property
    def in_trouble(self) -> bool:
        """Whether one has ended or failed, though it may not be settled yet what the cause is."""
        return bool(self._heard)

    def gather(self, place: Place) -> None:
        """Starts the other ranks, if nobody else does, and waits until all have a link.

        The calling thread must live as long as the engine: the kernel takes it for their parent.

        Raises:
            RankLost: one did not come.
        """
        if place.size == 1:
            return
        try:
            self.store = store = open_store(place)
        except dist.DistError as error:
            raise RankLost(Loss(f"the ranks cannot meet: {error}")) from error
        secret = secrets.token_bytes(SECRET_BYTES)
        with listen(place.host) as door:
            store.set(_MEETING, f"{door.getsockname()[1]} {secret.hex()}")
            if place.starts_others:
                self._children = start_others(place, store.port)
            self._accept(door, secret, place.size)

    def _accept(self, door: socket.socket, secret: bytes, size: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        door.settimeout(_POLL_SECONDS)
        while len(self._links) < size - 1:
            awaited = self._children.keys() - self._links.keys()
            if sentence := lost_child({rank: self._children[rank] for rank in awaited}):
                raise RankLost(Loss(sentence))
            if self.lost.done():
                raise RankLost(self.lost.result())
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, size)) - set(self._links))
                raise RankLost(Loss(f"ranks {missing} did not come within {START_SECONDS:g} s"))
            with suppress(TimeoutError, LinkEnded):
                link = Link(door.accept()[0])
                hello = link.hello(secret)
                if hello.rank in self._links or not 0 < hello.rank < size:
                    link.close()
                    continue
                self._links[hello.rank] = link
                where = "" if hello.rank in self._children else f" on {hello.host}"
                self._names[hello.rank] = f"rank {hello.rank} (process {hello.process_id}{where})"
                self._note_progress(hello.rank, 0)
                threading.Thread(
                    target=self._listen,
                    args=(link, hello.rank),
                    name=f"rank-{hello.rank}",
                    daemon=True,
                ).start()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Tells all other ranks to do something.

        Raises:
            LinkEnded: one is gone.
        """
        for link in self._links.values():
            link.send(kind, payload)

    def cause(self) -> Loss | None:
        """Waits a moment and says what other rank made something fail here, if one did."""
        try:
            return self.lost.result(0 if self.alone else 2 * SETTLE_SECONDS)
        except TimeoutError:
            return None

    def stop(self) -> None:
        """Tells the other ranks to end; what they have been told before they still do."""
        self._ending = True
        with suppress(LinkEnded):
            self.send(Kind.STOP)

    def end(self, seconds: float) -> None:
        """Waits for the processes that were started here to end, and then ends them by force."""
        self._ending = True
        end(self._children.values(), seconds)

    def stalled(self, own_count: int, seconds: float) -> Loss | None:
        """Says which rank is behind, if none has got on for so long; while the engine is built.

        A rank that waits for another is ahead of it, or has been heard of since.

        Args:
            own_count: the pulse of rank 0.
        """
        self._note_progress(0, own_count)
        with self._lock:
            if time.monotonic() - self._got_on < seconds:
                return None
            rank = min(self._progress, key=self._progress.__getitem__)
        sentence = f"{self._names[rank]} does not get on: {seconds:g} s have brought nothing"
        return Loss(sentence, EXIT_RANK_LOST if rank else EXIT_WORKER_FAILED)

    def _note_progress(self, rank: int, count: int) -> None:
        with self._lock:
            before, _ = self._progress.get(rank, (-1, 0.0))
            self._progress[rank] = count, time.monotonic()
            if count > before:
                self._got_on = time.monotonic()

    def _listen(self, link: Link, rank: int) -> None:
        """Hears what a rank says until it is gone; in a thread of its own."""
        child, name, complained = self._children.get(rank), self._names[rank], False
        try:
            while True:
                frame = link.receive()
                if frame is None:
                    continue
                if frame[0] is Kind.STOP:
                    self.asked_to_stop.set()
                    continue
                if frame[0] is Kind.PROGRESS:
                    self._note_progress(rank, int.from_bytes(frame[1], "little"))
                    continue
                kind, sentence = frame[0], frame[1].decode(errors="replace")
                status = EXIT_BAD_MODEL if kind is Kind.REFUSED else EXIT_WORKER_FAILED
                self._hear(1, Loss(f"{name}: {sentence}", status))
                complained = True
        except LinkEnded:
            if not (self._ending or complained):
                how = "is gone, and its link has ended" if child is None else _how(child)
                self._hear(0, Loss(f"{name} {how}"))

    def _hear(self, order: int, loss: Loss) -> None:
        with self._lock:
            self._heard.append((order, loss))
            if len(self._heard) > 1:
                return
        threading.Thread(target=self._settle, name="loss", daemon=True).start()

    def _settle(self) -> None:
        time.sleep(SETTLE_SECONDS)
        with self._lock:
            self.lost.set_result(min(self._heard, key=lambda each: each[0])[1])


def open_store(place: Place) -> TCPStore:
    """Opens the store of rank 0, or one that another process has opened."""
    timeout = timedelta(seconds=START_SECONDS)
    # torchrun has opened one for its ranks already, and says so.
    opens = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = loopback(place.host)
    if not (opens and address):
        return TCPStore(place.host, place.port, place.size, opens, timeout, wait_for_workers=False)
    # By default a store listens on all interfaces.
    door = socket.create_server((address, place.port))
    port = door.getsockname()[1]
    return TCPStore(
        address, port, place.size, True, timeout,
        wait_for_workers=False, master_listen_fd=door.detach(),
    )  # fmt: skip


def join(place: Place, store: Store) -> Link:
    """Connects a rank with rank 0.

    Raises:
        LinkEnded: rank 0 is not there, or no longer.
    """
    port, secret = store.get(_MEETING).decode().split()
    hello = Hello(place.rank, os.getpid(), socket.gethostname())
    try:
        return Link.connect(place.host, int(port), bytes.fromhex(secret), hello, START_SECONDS)
    except OSError as error:
        raise LinkEnded(str(error)) from error


def start_others(place: Place, port: int) -> Children:
    """Starts the other ranks of this machine, as this process was started; port: of the store.

    The calling thread must live as long as they: the kernel takes it for their parent.
    """
    if sys.platform == "linux" and place.size == place.local_size:
        # All ranks are here, and what they say is nobody else's business.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid())]
    command += [sys.executable, *sys.orig_argv[1:]]
    children = {}
    for local_rank in range(1, place.local_size):
        rank = place.rank + local_rank
        variables = {
            "RANK": rank,
            "WORLD_SIZE": place.size,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": place.local_size,
            "MASTER_ADDR": place.host,
            "MASTER_PORT": port,
        }
        # A session of its own keeps the terminal's Ctrl-C away: rank 0 tells them when to end.
        children[rank] = subprocess.Popen(  # noqa: S603
            command,
            env=os.environ | {name: str(value) for name, value in variables.items()},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return children


def lost_child(children: Children) -> str | None:
    """The sentence about one that has ended, and not because it was told to."""
    for rank, child in children.items():
        if child.poll() not in (None, 0):
            return f"rank {rank} (process {child.pid}) {_how(child)}"
    return None


def end(children: Iterable[subprocess.Popen[bytes]], seconds: float) -> None:
    """Waits for processes to end, and then ends them by force."""
    deadline = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.kill()


def _how(child: subprocess.Popen[bytes]) -> str:
    """How a process ended whose end of file has been seen."""
    try:
        status = child.wait(SETTLE_SECONDS / 2)
    except subprocess.TimeoutExpired:
        return "has closed its link"
    return f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"


def _all_of(names: Iterable[str], environment: Mapping[str, str]) -> None:
    """Raises ValueError: one is not set."""
    for name in names:
        if name not in environment:
            raise ValueError(f"{', '.join(names)} belong together, and {name} is not set")


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name} is {value!r}, which is no number")
    return int(value)
