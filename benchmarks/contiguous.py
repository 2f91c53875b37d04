"""Contiguous allocation of KV memory, as engines did it before blocks: what Quire is held against.

The model, precisely:

- Memory is a row of token slots, as many as Quire's blocks have. A request gets one contiguous
  chunk of it when it is admitted and gives it back when it ends; nothing is moved, shared or
  preempted in between, and nothing needs to be, since a chunk holds the request's whole life.
- Its size is decided at admission by a policy. "max" reserves the model's longest sequence; "pow2"
  the prompt and the next power of two above the output's true length, that is at most twice the
  output; "oracle" the true length exactly. The last two know what no engine knows: they are bounds.
- It is placed by an allocator. "buddy" rounds a size up to a power of two and splits and merges
  chunks of such sizes, as the paper assumes for Orca; of several free chunks of the smallest size
  that will do it takes the one with the lowest address. The pool is no power of two: it begins as
  a row of the largest powers that still fit. "first fit" takes the front of the lowest gap that is
  large enough, rounds nothing up and merges adjacent gaps.
- Requests are admitted as Quire's scheduler does it: first come, first served, the head of the
  queue blocks the rest; decodes first, then begun prompts, then new ones, under the same token
  budget for a step. A sequence ends without the step in flight that Quire wastes on it.

Every slot of the pool is in one of five states, which add up to all of it:

- token states: its keys and values are there;
- reserved: its request will write it later;
- internal: it lies within what the policy asked for and will never be written;
- rounding: it was added to that by the buddy allocator;
- free: in no chunk, because no gap is large enough for the head of the queue (external
  fragmentation). The paper counts rounding and free together, as "external and others".
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.lengths import Job


class Allocator(Protocol):
    """Places chunks in a row of slots."""

    def allocate(self, size: int) -> tuple[int, int] | None:
        """Returns the chunk's address and its size, which may be rounded up; None: no room."""

    def release(self, address: int, size: int) -> None:
        """Takes a chunk back, with the size that `allocate` returned."""


class Buddy:
    """Chunks of powers of two, each aligned to its size."""

    def __init__(self, slots: int) -> None:
        self._top = slots.bit_length()
        self._free: list[set[int]] = [set() for _ in range(self._top)]
        address = 0
        for order in reversed(range(self._top)):
            if slots >> order & 1:
                self._free[order].add(address)
                address += 1 << order

    def allocate(self, size: int) -> tuple[int, int] | None:
        wanted = (size - 1).bit_length()
        order = next((o for o in range(wanted, self._top) if self._free[o]), None)
        if order is None:
            return None
        address = min(self._free[order])
        self._free[order].remove(address)
        for half in reversed(range(wanted, order)):
            self._free[half].add(address + (1 << half))
        return address, 1 << wanted

    def release(self, address: int, size: int) -> None:
        order = size.bit_length() - 1
        # The buddy of a chunk at the ragged end of the pool is never free, so it never merges.
        while order + 1 < self._top and address ^ (1 << order) in self._free[order]:
            self._free[order].remove(address ^ (1 << order))
            address &= ~(1 << order)
            order += 1
        self._free[order].add(address)


class FirstFit:
    """Gaps in order of address."""

    def __init__(self, slots: int) -> None:
        self._gaps = [(0, slots)]

    def allocate(self, size: int) -> tuple[int, int] | None:
        for index, (address, length) in enumerate(self._gaps):
            if length >= size:
                rest = [(address + size, length - size)] if length > size else []
                self._gaps[index : index + 1] = rest
                return address, size
        return None

    def release(self, address: int, size: int) -> None:
        index = bisect.bisect(self._gaps, (address, 0))
        first = last = index
        if index and sum(self._gaps[index - 1]) == address:
            first -= 1
            address, size = self._gaps[first][0], size + self._gaps[first][1]
        if index < len(self._gaps) and self._gaps[index][0] == address + size:
            last += 1
            size += self._gaps[index][1]
        self._gaps[first:last] = [(address, size)]


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def asked(policy: str, job: Job, max_length: int) -> int:
    """Returns the slots that a policy reserves for a request."""
    if policy == "max":
        return max_length
    if policy == "pow2":
        return min(job.prompt + power_of_two(job.output), max_length)
    if policy == "oracle":
        return job.final
    raise ValueError(policy)


@dataclass(slots=True)
class _Begun:
    """An admitted request; left: tokens of its prompt that are still to be computed."""

    job: Job
    asked: int
    address: int
    size: int
    left: int


@dataclass(frozen=True, slots=True)
class Held:
    """Slots in each state after a step, how many requests run and how many wait."""

    tokens: int
    reserved: int
    internal: int
    rounding: int
    free: int
    running: int
    waiting: int


class Contiguous:
    """A pool of slots and the requests in it."""

    def __init__(
        self, policy: str, allocator: Allocator, slots: int, max_length: int, step_tokens: int
    ) -> None:
        self._policy, self._allocator = policy, allocator
        self._slots, self._max_length, self._step_tokens = slots, max_length, step_tokens
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[_Begun] = deque()
        self._ends: list[tuple[int, int, _Begun]] = []
        self._serial = 0
        # Sums over all running requests, kept as they change.
        self._tokens = self._final = self._asked = self._held = 0

    def run(self, jobs: Sequence[Job], steps: int) -> Iterator[Held]:
        """Yields what is held after each step."""
        arriving = deque(jobs)
        for step in range(steps):
            while arriving and arriving[0].arrival <= step:
                self._waiting.append(arriving.popleft())
            while self._ends and self._ends[0][0] <= step:
                self._end(heapq.heappop(self._ends)[2])
            decoding = len(self._ends)
            self._tokens += decoding
            self._prefill(step, self._step_tokens - decoding)
            yield Held(
                tokens=self._tokens,
                reserved=self._final - self._tokens,
                internal=self._asked - self._final,
                rounding=self._held - self._asked,
                free=self._slots - self._held,
                running=len(self._ends) + len(self._prefilling),
                waiting=len(self._waiting),
            )

    def _prefill(self, step: int, budget: int) -> None:
        while budget > 0:
            if not self._prefilling and not self._admit():
                return
            begun = self._prefilling[0]
            count = min(begun.left, budget)
            begun.left -= count
            budget -= count
            self._tokens += count
            if not begun.left:
                # The first token is drawn in this step; each further one but the last is written.
                self._serial += 1
                self._prefilling.popleft()
                heapq.heappush(self._ends, (step + begun.job.output, self._serial, begun))

    def _admit(self) -> bool:
        if not self._waiting:
            return False
        job = self._waiting[0]
        size = asked(self._policy, job, self._max_length)
        chunk = self._allocator.allocate(size)
        if chunk is None:
            return False
        self._waiting.popleft()
        self._prefilling.append(_Begun(job, size, *chunk, left=job.prompt))
        self._final += job.final
        self._asked += size
        self._held += chunk[1]
        return True

    def _end(self, begun: _Begun) -> None:
        self._allocator.release(begun.address, begun.size)
        self._tokens -= begun.job.final
        self._final -= begun.job.final
        self._asked -= begun.asked
        self._held -= begun.size
