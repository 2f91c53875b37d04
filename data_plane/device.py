"""What the step path needs of a device: columns to it, results from it, order, time, graphs.

The rest of the engine is the same on a CPU and on a GPU. On a GPU everything here is asynchronous:
the host prepares a step while the one before it is computed, and waits in one place only, where the
results of a step are fetched. On a CPU the same calls are done at once, so that the whole path is
tested there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels import upload

Array = npt.NDArray[np.generic]


class Fetch(Protocol):
    """Values on their way to the host."""

    def wait(self) -> list[Array]:
        """The values, as host arrays; the one place where a step is waited for."""
        ...


class Device(Protocol):
    """A place where steps run, in the order in which they are given."""

    torch_device: torch.device
    # Whether a step is on its way when it has been launched, or done.
    asynchronous: bool

    def send(self, array: Array) -> Tensor:
        """Brings a host array to the device; it must not be changed before the step is done."""
        ...

    def fetch(self, values: Sequence[Tensor]) -> Fetch:
        """Begins to bring values to the host."""
        ...

    def moving(self) -> Any:
        """Context in which blocks are copied beside what is computed, after all before it."""
        ...

    def await_moves(self) -> None:
        """What is computed from here on comes after all moves so far."""
        ...

    def mark(self) -> Any:
        """A moment in the work of the present stream, that of moves where they are made."""
        ...

    def reach(self, mark: Any) -> None:
        """Waits until the device has passed a mark; on any thread."""
        ...

    def elapsed_us(self, first: Any, second: Any) -> int:
        """Microseconds between two marks of one stream, which must have been passed."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of the device's memory that are free, and in all."""
        ...

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Bytes that `run` takes on top of what is allocated; none of them stays allocated."""
        ...

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns what repeats `run` on the same memory; the result is overwritten each time.

        Raises:
            RuntimeError: that cannot be; its cause says why. Steps run as before then.
        """
        ...


def device_of(device: torch.device) -> Device:
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()


class CpuDevice:
    """Everything at once, nothing copied."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.asynchronous = False

    def send(self, array: Array) -> Tensor:
        return _tensor(array)

    def fetch(self, values: Sequence[Tensor]) -> Fetch:
        return _Fetched([value.numpy() for value in values])

    @contextmanager
    def moving(self) -> Iterator[None]:
        yield

    def await_moves(self) -> None:
        pass

    def mark(self) -> int:
        return time.perf_counter_ns()

    def reach(self, mark: int) -> None:
        pass

    def elapsed_us(self, first: int, second: int) -> int:
        return (second - first) // 1000

    def memory(self) -> tuple[int, int]:
        """Those of the machine: other processes need some, so an engine is told how much it has."""
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Not known: torch does not count what it allocates on a CPU."""
        run()
        return 0

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run


class _Fetched:
    def __init__(self, values: list[Array]) -> None:
        self._values = values

    def wait(self) -> list[Array]:
        return self._values


class CudaDevice:
    """Three streams: what is computed, block moves beside it, and results on their way back.

    Columns and results pass through pinned memory of torch's own allocator, which hands a piece out
    again when the stream that used it is past it.
    """

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.asynchronous = True
        self._moves = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._results = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # One for all captures: libraries keep a workspace for each stream that they see.
        self._captures = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Memory that all graphs share.
        self._pool = torch.cuda.graph_pool_handle()

    def send(self, array: Array) -> Tensor:
        return upload(_tensor(array), self.torch_device)

    def fetch(self, values: Sequence[Tensor]) -> Fetch:
        self._results.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._results):
            copies = []
            for value in values:
                value.record_stream(self._results)
                copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                copies.append(copy.copy_(value, non_blocking=True))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._results)
        return _Pinned(copies, done, self.torch_device)

    @contextmanager
    def moving(self) -> Iterator[None]:
        self._moves.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._moves):
            yield

    def await_moves(self) -> None:
        torch.cuda.current_stream(self.torch_device).wait_stream(self._moves)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def reach(self, mark: torch.cuda.Event) -> None:
        with torch.cuda.device(self.torch_device):
            mark.synchronize()

    def elapsed_us(self, first: torch.cuda.Event, second: torch.cuda.Event) -> int:
        return int(first.elapsed_time(second) * 1000)

    def memory(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.torch_device)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        torch.cuda.synchronize(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        run()
        torch.cuda.synchronize(self.torch_device)
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Captures into memory that all graphs share: capture the largest one first."""
        stream = self._captures
        stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(stream):
            # Compiles kernels and settles libraries, neither of which a capture allows.
            run()
        torch.cuda.current_stream(self.torch_device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Twice the same stream: torch's own context does not leave it where a capture fails.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, self._pool, stream):
                result = run()
        except Exception as error:
            self._abandon_capture()
            # Where a capture has become invalid its end fails, too: what came first is the reason.
            raise RuntimeError("no graph can be captured") from error.__context__ or error
        return _Replay(graph, result, run)

    def _abandon_capture(self) -> None:
        """Does what torch leaves undone where a capture has become invalid.

        Its allocator would wait for the end of that capture for good, and free nothing meanwhile
        that a second stream has used.
        """
        device = torch.cuda.current_device()
        # An error says that it had ended.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)


@dataclass(frozen=True, slots=True)
class _Replay:
    """A captured graph, and what it was captured of: it holds addresses, and keeps no tensor."""

    graph: torch.cuda.CUDAGraph
    result: Tensor
    run: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result


def _tensor(array: Array) -> Tensor:
    """A tensor over an array's memory, or over a copy where that may not be written."""
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(np.ascontiguousarray(array))


class _Pinned:
    def __init__(self, copies: list[Tensor], done: torch.cuda.Event, device: torch.device) -> None:
        self._copies, self._done, self._device = copies, done, device

    def wait(self) -> list[Array]:
        # A thread that never chose a device would open the first one.
        with torch.cuda.device(self._device):
            self._done.synchronize()
        return [copy.numpy() for copy in self._copies]
