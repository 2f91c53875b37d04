"""The device and its clock. Everything that is compared is timed side by side.

On a GPU a contender's calls are captured in a CUDA graph, and the graphs of all contenders
are replayed in turn, so that a change of the device's clock or temperature meets all alike.
A graph works on several buffers, larger than the caches together, one after the other.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from kernels.launch import Launch

# A replay lasts at least so long, so that what comes with each of them is lost in it.
REPLAY_MILLISECONDS = 1.0
GRAPH_CALLS = 512
ROUNDS = (7, 30)
# What stands for the memory of a GPU in a dry run.
DRY_FREE_BYTES = 8 << 20

Calls = Sequence[Callable[[], object]]


class DeviceLost(Exception):
    """The device answers nothing any more: only a new process can go on."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call. low, high: tenth and ninetieth percentile of the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kernel, or of one kind of copy: how many, and microseconds together."""

    name: str
    calls: int
    us: float

    @property
    def copies(self) -> bool:
        """Whether it is a copy or a fill of the driver's own, no kernel."""
        return self.name.startswith(("Memcpy", "Memset"))


@dataclass(frozen=True)
class Device:
    """place: where tensors live. dry: sizes are tiny, and figures mean nothing."""

    place: torch.device
    name: str
    cuda: bool
    dry: bool
    multiprocessors: int
    cache_bytes: int
    memory_bytes: int

    def measure(
        self, contenders: Mapping[str, Calls], seconds: float = 0.5
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """Times of one call of each contender, and why some have none.

        All calls of a contender count alike. seconds: what all of it takes, about.
        """
        if self.cuda:
            return _measure_graphs(contenders, seconds)
        return _measure_calls(contenders)

    def time_host(self, call: Callable[[], object], rounds: int) -> Timing:
        """Of something that the host takes part in: from its start until the device is done."""
        times = []
        for _ in range(1 if self.dry else 2 + rounds):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            times.append((time.perf_counter() - began) * 1e6)
        return _timing(times[2:] or times)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def recover(self) -> None:
        """After something failed. Raises DeviceLost where the failure took the device along."""
        try:
            self.wait()
        except Exception as error:
            raise DeviceLost(describe(error)) from error

    def tidy(self) -> None:
        """Gives back what cells before left, once it is much."""
        if self.cuda and torch.cuda.memory_reserved() > self.memory_bytes // 3:
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Gives back all that nobody holds, what holds itself included."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    @property
    def free_bytes(self) -> int:
        """Memory that can be had, after `release`."""
        if self.cuda and not self.dry:
            return torch.cuda.mem_get_info(self.place)[0]
        return DRY_FREE_BYTES

    def memory_counters(self) -> dict[str, int]:
        """What the allocators of the device and of pinned memory have taken from the driver.

        retries: how often memory was full, so that all that was unused had to be given back.
        """
        if not self.cuda:
            return dict.fromkeys(("reserved_bytes", "retries", "mallocs", "host_mallocs"), 0)
        stats = torch.cuda.memory_stats(self.place)
        pinned: dict[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()
        return {
            "reserved_bytes": stats.get("reserved_bytes.all.current", 0),
            "retries": stats.get("num_alloc_retries", 0),
            "mallocs": stats.get("num_device_alloc", 0),
            "host_mallocs": pinned.get("num_host_alloc", 0),
        }

    def kernel_times(self, run: Callable[[], object]) -> list[KernelTime]:
        """What the device did while `run` ran, the longest first. Raises RuntimeError if nothing.

        Without a GPU they are torch's operators on the CPU.
        """
        kind = ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        self.wait()
        with profile(activities=[kind]) as profiler:
            run()
            self.wait()
        times: dict[str, list[float]] = {}
        for event in profiler.events() or []:
            if not self.cuda:
                times.setdefault(event.name, []).append(event.self_cpu_time_total)
            elif event.device_type == DeviceType.CUDA and not _annotates(event):
                times.setdefault(event.name, []).append(event.time_range.elapsed_us())
        if not times:
            raise RuntimeError("the profiler saw no kernel")
        found = [KernelTime(name, len(each), sum(each)) for name, each in times.items()]
        return sorted(found, key=lambda kernel: kernel.us, reverse=True)


def find_device(dry: bool) -> Device:
    """The first GPU; with `dry` the CPU will do. Raises RuntimeError where there is none."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(
            torch.device("cuda", 0),
            properties.name,
            True,
            dry,
            properties.multi_processor_count,
            getattr(properties, "L2_cache_size", 64 << 20),
            properties.total_memory,
        )
    if not dry:
        raise RuntimeError("no GPU is visible; --dry-run works without one")
    return Device(torch.device("cpu"), "Triton interpreter", False, True, 4, 1 << 16, 1 << 30)


def _annotates(event: Any) -> bool:
    """Whether an event of the profiler spans others: somebody's name for a part of the program."""
    return bool(getattr(event, "is_user_annotation", False))


def compile_ahead(launches: Sequence[Launch]) -> int:
    """Compile several launches at once, and return how many there were. Nothing is run.

    The compiler lets other threads work most of the time. Whatever goes wrong here goes
    wrong again, and is reported, where the kernel is run.
    """
    distinct = {_identity(launch): launch for launch in launches}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, suppress(Exception):
        from triton.runtime import _async_compile

        with _async_compile.AsyncCompileMode(pool, ignore_errors=True):
            for launch in distinct.values():
                launch.kernel.warmup(
                    grid=launch.grid,
                    **launch.arguments,
                    num_warps=launch.warps,
                    num_stages=launch.stages,
                )
    return len(distinct)


def describe(error: BaseException) -> str:
    """One line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:300]


def _identity(launch: Launch) -> str:
    """What a launch is compiled by, more or less: tensors by dtype, numbers by divisibility."""
    parts = []
    for name, value in sorted(launch.arguments.items()):
        if isinstance(value, torch.Tensor):
            parts.append(f"{name} {value.dtype}")
        elif isinstance(value, int) and not name.isupper():
            parts.append(f"{name} {value == 1} {value % 16 == 0} {value >= 1 << 31}")
        elif isinstance(value, float):
            parts.append(name)
        else:
            parts.append(f"{name} {value}")
    return f"{id(launch.kernel)} {launch.warps} {launch.stages} {parts}"


def _measure_graphs(
    contenders: Mapping[str, Calls], seconds: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    graphs, lengths, durations, failures = {}, {}, {}, {}
    for name, calls in contenders.items():
        try:
            graphs[name], lengths[name], durations[name] = _capture_long(calls)
        except Exception as error:
            failures[name] = describe(error)
            _check_alive()
    if not graphs:
        return {}, failures
    rounds = int(seconds * 1000 / sum(durations.values()))
    rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    events = [
        (name, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
        for name in graphs
    ]
    for name, begin, end in events:
        begin.record()
        graphs[name].replay()
        end.record()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for name, begin, end in events:
        times[name].append(begin.elapsed_time(end) * 1000 / lengths[name])
    return {name: _timing(found) for name, found in times.items()}, failures


def _capture_long(calls: Calls) -> tuple[torch.cuda.CUDAGraph, int, float]:
    """A graph whose replay lasts long enough, the calls in it, and milliseconds of a replay."""
    for call in calls:
        call()
    graph = _capture(calls)
    milliseconds = min(_replay_milliseconds(graph) for _ in range(2))
    times = int(REPLAY_MILLISECONDS / max(milliseconds, 1e-3)) + 1
    times = max(1, min(times, GRAPH_CALLS // len(calls)))
    if times > 1:
        graph = _capture([*calls] * times)
        milliseconds = _replay_milliseconds(graph)
    return graph, len(calls) * times, milliseconds


def _capture(calls: Calls) -> torch.cuda.CUDAGraph:
    """torch.cuda.graph would empty the allocator's cache each time."""
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    # Nothing must be freed meanwhile: to free device memory would break the capture.
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            except BaseException:
                # The capture must end before anything else can begin.
                with suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return graph


def _replay_milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _check_alive() -> None:
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(describe(error)) from error


def _measure_calls(
    contenders: Mapping[str, Calls],
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Each call once, by the host's clock."""
    timings, failures = {}, {}
    for name, calls in contenders.items():
        began = time.perf_counter()
        try:
            for call in calls:
                call()
        except Exception as error:
            failures[name] = describe(error)
            continue
        each = (time.perf_counter() - began) * 1e6 / len(calls)
        timings[name] = Timing(each, each, each)
    return timings, failures


def _timing(times: list[float]) -> Timing:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])
