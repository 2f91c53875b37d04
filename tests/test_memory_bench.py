"""The benchmarks of memory at small sizes: they run, and their figures can be true."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory, memory_page, page, prefix_cache, sharing
from benchmarks.contiguous import Allocator, Buddy, Contiguous, FirstFit, asked
from benchmarks.lengths import AZURE_FILE, Job, azure, jobs, synthetic
from benchmarks.replay import Replay, limits_for

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_made_up_lengths_have_the_papers_means(name: str) -> None:
    workload = synthetic(name, count=20_000)
    prompt, output = workload.pairs.mean(axis=0)
    assert prompt == pytest.approx({"sharegpt": 161.31, "alpaca": 19.31}[name], rel=0.01)
    assert output == pytest.approx({"sharegpt": 337.99, "alpaca": 58.45}[name], rel=0.01)
    assert workload.pairs.sum(axis=1).max() <= 2048
    assert workload.left_out < 0.05


def test_arrivals_come_to_the_load() -> None:
    workload = synthetic("alpaca", count=20_000)
    arriving = jobs(workload, 5000, load=1.0)
    assert [job.arrival for job in arriving] == sorted(job.arrival for job in arriving)
    held = sum(job.output * (job.prompt + job.output / 2) for job in arriving) / 5000
    assert held == pytest.approx(workload.pool_tokens, rel=0.05)


@pytest.mark.parametrize("kind", [Buddy, FirstFit])
def test_allocators_overlap_nothing_and_merge_all(kind: type[Buddy] | type[FirstFit]) -> None:
    slots, rng = 1000, random.Random(1)
    allocator: Allocator = kind(slots)
    taken: list[tuple[int, int]] = []
    owned = np.zeros(slots, np.bool_)
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            address, size = taken.pop(rng.randrange(len(taken)))
            owned[address : address + size] = False
            allocator.release(address, size)
            continue
        wanted = rng.randint(1, 200)
        chunk = allocator.allocate(wanted)
        if chunk is None:
            assert kind is Buddy or not _has_gap(owned, wanted)
            continue
        address, size = chunk
        assert wanted <= size and address + size <= slots
        assert not owned[address : address + size].any()
        owned[address : address + size] = True
        taken.append(chunk)
    for address, size in taken:
        allocator.release(address, size)
    # Whole again: 1000 is 512 + 256 + 128 + 64 + 32 + 8.
    largest = 512 if kind is Buddy else 1000
    assert allocator.allocate(largest) == (0, largest)


def _has_gap(owned: np.ndarray, size: int) -> bool:
    gaps = "".join("x" if each else "." for each in owned).split("x")
    return max(map(len, gaps)) >= size


def test_what_policies_ask_for() -> None:
    job = Job(0, prompt=100, output=25)
    assert asked("max", job, 2048) == 2048
    assert asked("pow2", job, 2048) == 132
    assert asked("pow2", job, 130) == 130
    assert asked("oracle", job, 2048) == 124


def test_a_contiguous_request_holds_its_chunk_for_its_whole_life() -> None:
    # A prompt of 100 in chunks of 64, then ten tokens: the last one is never written.
    pool = Contiguous("pow2", Buddy(512), 512, 512, step_tokens=64)
    held = list(pool.run([Job(2, 100, 10), Job(2, 300, 5)], 20))
    assert [each.tokens for each in held[:6]] == [0, 0, 64, 100, 101, 102]
    assert held[3].internal == 116 - 109 and held[3].rounding == 128 - 116
    assert held[12].tokens == 109 and held[12].reserved == 0
    # The second asks for 308, which is 512 in powers of two, so it waits for the first to end.
    assert [each.waiting for each in held[12:14]] == [1, 0]
    assert (held[13].tokens, held[13].rounding, held[13].free) == (64, 512 - 308, 0)


@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_parts_of_memory_add_up_and_blocks_waste_least(name: str) -> None:
    lines = memory.measure(synthetic(name, count=20_000), steps=500, load=8)
    assert [line["allocator"] for line in lines] == [memory.QUIRE, *memory.CONTIGUOUS]
    for line in lines:
        assert sum(line[state] for state in memory.STATES) == pytest.approx(1)
        assert all(0 <= line[state] <= 1 for state in memory.STATES)
        assert line["steps_with_waiting"] > 0.9
    ours, *others = lines
    assert ours["of_held"] > 0.9 and ours["rounding"] == 0
    assert all(line["tokens"] < 0.7 and line["running"] < ours["running"] for line in others)
    assert others[0]["running"] == 7


def test_waste_in_blocks_is_less_than_a_block_a_sequence() -> None:
    workload = synthetic("alpaca", count=20_000)
    limits = limits_for(workload.pool_tokens, workload.max_length)
    replay = Replay(limits, jobs(workload, 400, load=0.7))
    for held in memory._held_by_blocks(replay, 400):
        assert held.internal <= 15 * held.running
        assert held.tokens + held.reserved + held.internal + held.free == workload.pool_tokens
    assert held.running > 50
    assert not replay.scheduler.totals.preemptions


def test_samples_and_beams_save_blocks() -> None:
    workload = synthetic("alpaca", count=20_000)
    for method, low, high in (("parallel", 0.02, 0.3), ("beam", 0.1, 0.8)):
        two, four = (sharing.measure(workload, method, width, "steady", 150) for width in (2, 4))
        assert low < two["saved"] < four["saved"] < high


def _trace(folder: Path) -> Path:
    """Conversations of up to six turns, interleaved, that begin with one common block."""
    rng, rows, fresh = random.Random(0), [], 1
    talks: list[list[int]] = [[0] for _ in range(40)]
    for _ in range(400):
        at = rng.randrange(len(talks))
        talks[at] = talks[at] if len(talks[at]) < 30 else [0]
        added = rng.randint(1, 6)
        talks[at] = [*talks[at], *range(fresh, fresh + added)]
        fresh += added
        rows.append({"hash_ids": talks[at], "output_length": rng.randint(1, 1500)})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / prefix_cache.TRACE_FILE).write_text(lines)
    return folder


def test_prefix_cache_hits_as_often_as_an_lru(tmp_path: Path) -> None:
    lines = prefix_cache.measure(prefix_cache.load(_trace(tmp_path)), sizes=(150, 500, 4000))
    assert len(lines) == 9
    for line in lines:
        assert 0 < line["hit_rate"] < 1
        # The least pool is half in use when sixteen run, which no LRU knows of.
        if line["mode"] == "one at a time" or line["blocks"] > 150:
            assert line["of_oracle"] > line["aim_of_oracle"], line
    assert lines[2]["hit_rate"] > lines[0]["hit_rate"]


def test_azure_trace_is_read_and_cut(tmp_path: Path) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:15:46.68,{prompt},44" for prompt in (374, 396, 9000, 12)]
    (tmp_path / AZURE_FILE).write_text("\n".join(rows))
    workload = azure(tmp_path)
    assert sorted(workload.pairs[:, 0].tolist()) == [12, 374, 396]
    assert workload.left_out == 0.25 and workload.pool_tokens == 4 * 15_680


def test_the_page_is_made_of_its_results() -> None:
    text = memory_page.PAGE.read_text()
    found = page.SOURCE.search(text)
    assert found
    lines = page.read((ROOT / found[1]).read_text(), memory_page.RENDERS)
    assert page.fill(text, found[1], lines, memory_page.RENDERS) == text
    for name, (file, draw) in memory_page.PLOTS.items():
        plot = draw(lines[name])
        ElementTree.fromstring(plot)
        assert (ROOT / "docs" / file).read_text() == plot


def test_what_was_not_measured_is_called_so() -> None:
    assert sharing.render([]).count("not measured") == 12 * 4
    ElementTree.fromstring(sharing.draw([]))
