"""Hit rate of the block pool's prefix cache under pressure, beside a plain LRU of the same size.

``python -m benchmarks.prefix_cache --traces DIR [--svg FILE]``

The Mooncake conversation trace names the blocks of 512 tokens of each prompt by ids that stand for
prefix hashes. The real pool is driven with them as admission and retirement drive it: match,
share, allocate, publish, and release at the end. A hit is a block of the longest known prefix. The
oracle keeps the blocks that were asked for last and knows nothing of tables or references.

- "one at a time": each request has ended before the next one begins.
- "16 at once": a request ends when the sixteenth after it begins, or earlier where the pool has no
  room for the next one otherwise, first come first out. Blocks in use cannot be evicted, and those
  that two requests compute at the same time are there twice.
- "16 at once, with output": generated blocks are in the pool as well, and are published at the
  end. The trace never asks for them again, but they take room, in the oracle as in the pool.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.chart import Bar, bars
from benchmarks.report import report
from benchmarks.tables import Line, percent, table
from control_plane.blocks import BlockPool, Int32Array

TRACE_FILE = "mooncake-conversation.jsonl"
TRACE_BLOCK = 512
SIZES = (1_000, 10_000, 30_000, 100_000)
TOGETHER = 16
MODES = ("one at a time", "16 at once", "16 at once, with output")
NO_TRACES = "prefix cache: left out, because --traces does not say where the trace is"


@dataclass(frozen=True, slots=True)
class Chain:
    """One request's blocks as prefix hashes: its prompt's, and what it generates."""

    prompt: list[bytes]
    output: list[bytes]


@dataclass(slots=True)
class _Running:
    blocks: Int32Array
    chain: Chain


class CacheReplay:
    """A pool that serves chains, at most `together` at once."""

    def __init__(self, block_count: int, together: int) -> None:
        self.pool = BlockPool(block_count)
        self.hits = self.asked = 0
        self._together = together
        self._running: deque[_Running] = deque()

    def serve(self, chain: Chain) -> None:
        """Admits one request, after as many others have ended as it takes."""
        while len(self._running) >= self._together:
            self._retire()
        while not self._admit(chain):
            self._retire()

    def _admit(self, chain: Chain) -> bool:
        shared = self.pool.match(chain.prompt)
        total = len(chain.prompt) + len(chain.output)
        reviving = int(np.count_nonzero(self.pool.reference_counts[shared] == 0))
        if total - len(shared) + reviving > self.pool.available_count:
            return False
        self.pool.share(shared)
        blocks = np.concatenate([shared, self.pool.allocate(total - len(shared))])
        for index in range(len(shared), len(chain.prompt)):
            self.pool.publish(int(blocks[index]), chain.prompt[index])
        self.hits += len(shared)
        self.asked += len(chain.prompt)
        self._running.append(_Running(blocks, chain))
        return True

    def _retire(self) -> None:
        ended = self._running.popleft()
        first = len(ended.chain.prompt)
        for index, digest in enumerate(ended.chain.output):
            self.pool.publish(int(ended.blocks[first + index]), digest)
        self.pool.release(ended.blocks)
        # Nobody listens; what is announced must not pile up.
        self.pool.take_announced()
        self.pool.take_index_changes()


def lru_hits(chains: Sequence[Chain], block_count: int) -> int:
    """Hits of the oracle."""
    kept: OrderedDict[bytes, None] = OrderedDict()
    hits = 0
    for chain in chains:
        known = True
        for digest in chain.prompt:
            known = known and digest in kept
            hits += known
            kept[digest] = None
            kept.move_to_end(digest)
        for digest in chain.output:
            kept[digest] = None
        while len(kept) > block_count:
            kept.popitem(last=False)
    return hits


def load(folder: Path, count: int | None = None) -> list[Chain]:
    """The trace's requests, with made-up names for the blocks that they generate."""
    chains: list[Chain] = []
    serial = 0
    with (folder / TRACE_FILE).open() as file:
        for row in map(json.loads, file):
            output = range(serial, serial + row["output_length"] // TRACE_BLOCK)
            serial = output.stop
            chains.append(
                Chain(
                    [b"p" + number.to_bytes(15, "little") for number in row["hash_ids"]],
                    [b"o" + number.to_bytes(15, "little") for number in output],
                )
            )
    return chains[:count]


def measure(chains: Sequence[Chain], sizes: Sequence[int] = SIZES) -> list[Line]:
    """One line for each way of overlapping and each size."""
    prompts_only = [Chain(chain.prompt, []) for chain in chains]
    lines = []
    for mode in MODES:
        together = 1 if mode == "one at a time" else TOGETHER
        stream = chains if mode.endswith("output") else prompts_only
        for size in sizes:
            replay = CacheReplay(size, together)
            for chain in stream:
                replay.serve(chain)
            replay.pool.check()
            oracle = lru_hits(stream, size)
            lines.append(
                {
                    "mode": mode,
                    "blocks": size,
                    "hit_rate": replay.hits / replay.asked,
                    "oracle_hit_rate": oracle / replay.asked,
                    "of_oracle": replay.hits / oracle if oracle else 1.0,
                    "aim_of_oracle": 0.98,
                }
            )
    return lines


def render(lines: Sequence[Line]) -> str:
    rows = [
        [
            line["mode"],
            f"{line['blocks']:,}",
            percent(line["hit_rate"]),
            percent(line["oracle_hit_rate"]),
            percent(line["of_oracle"]),
        ]
        for line in lines
    ]
    return table(["requests", "blocks", "pool hits", "oracle hits", "of the oracle's"], rows)


def draw(lines: Sequence[Line]) -> str:
    groups = [
        (
            mode,
            [
                Bar(
                    f"{line['blocks']:,} blocks",
                    [line["hit_rate"]],
                    percent(line["hit_rate"]),
                    line["oracle_hit_rate"],
                )
                for line in lines
                if line["mode"] == mode
            ],
        )
        for mode in dict.fromkeys(line["mode"] for line in lines)
    ]
    return bars(
        "Blocks of prompts found in the prefix cache",
        "Hit rates of the block pool on a trace of conversations by size of the pool, each with "
        "a mark at the hit rate of a plain least-recently-used cache of the same size.",
        ("block pool",),
        groups,
        scale=0.4,
        mark="plain LRU of the same size",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="folder that has the Mooncake trace")
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    arguments = parser.parse_args()
    if not arguments.traces:
        print(NO_TRACES)
        return
    lines = measure(load(arguments.traces))
    for line in lines:
        report("prefix_cache", **line)
    print(render(lines))
    if arguments.svg:
        arguments.svg.write_text(draw(lines))


if __name__ == "__main__":
    main()
