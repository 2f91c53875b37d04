"""How large the pieces are that one program works on, by kind of work, geometry and device.

The compiler says what fits (registers, shared memory, spills, which matrix units are
used): `python -m benchmarks.sass` prints it, and tests hold it for groups of up to 32
query heads; with more the registers spill for some types. Which of those that fit is
fastest only a GPU can say: `make bench-gpu` with `--tune` tries a grid of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

# hopper: sm_90 and sm_100. ampere: the others from sm_80 on. cdna: AMD's gfx9, with 64 KiB of
# shared memory and 512 registers a thread.
Family = Literal["hopper", "ampere", "cdna"]
# The matrix units take no fewer rows.
LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Tiling:
    """rows: queries * heads of a group in a program. keys: taken at a time.
    warps, stages: as in Launch. programs: resident on one multiprocessor at once.
    partial_cost: what writing and merging a partial costs, in tiles of keys."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int
    partial_cost: int

    def tokens(self, group: int) -> int:
        """Whole queries that fit into the rows."""
        return self.rows // group


# Keys, warps, stages and programs of decodes: heads up to 128 wide, and up to 256.
Decode = tuple[int, int, int, int]
DECODE: dict[tuple[Family, int], tuple[Decode, Decode]] = {
    # Tiles of 16 KiB, two of keys and two of values on their way: three programs fit on a
    # multiprocessor and ask memory for 192 KiB at a time.
    ("hopper", 2): ((64, 4, 3, 3), (32, 4, 3, 3)),
    # Converting takes registers: larger tiles spill, and fewer programs fit.
    ("hopper", 1): ((64, 4, 3, 2), (64, 8, 3, 1)),
    ("hopper", 4): ((16, 8, 3, 3), (16, 8, 3, 2)),
    ("ampere", 2): ((64, 4, 3, 2), (32, 4, 3, 2)),
    ("ampere", 1): ((64, 4, 3, 2), (64, 8, 3, 1)),
    ("ampere", 4): ((16, 8, 3, 2), (16, 8, 3, 1)),
    ("cdna", 2): ((64, 4, 2, 2), (32, 4, 2, 2)),
    ("cdna", 4): ((16, 4, 2, 2), (16, 4, 2, 1)),
}
# Rows, keys, warps, stages of long chunks, likewise.
PREFILL: dict[tuple[Family, int], tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    # 128 rows are two warp groups of 64, which the matrix units multiply at their full
    # rate, and as much as the registers hold.
    ("hopper", 2): ((128, 64, 8, 3), (128, 32, 8, 2)),
    ("hopper", 1): ((128, 64, 8, 3), (64, 32, 8, 2)),
    ("hopper", 4): ((32, 16, 8, 2), (16, 32, 8, 2)),
    ("ampere", 2): ((64, 64, 8, 2), (32, 32, 4, 2)),
    ("ampere", 1): ((64, 64, 8, 2), (32, 32, 4, 2)),
    ("ampere", 4): ((32, 16, 8, 2), (16, 32, 8, 2)),
    ("cdna", 2): ((128, 32, 8, 2), (32, 32, 8, 2)),
    ("cdna", 4): ((32, 16, 8, 2), (16, 16, 8, 2)),
}


def decode_tiling(family: Family, group: int, head_size: int, itemsize: int) -> Tiling:
    """For one query a sequence. group: query heads per key/value head. itemsize: of the cache."""
    large = head_size > 128
    keys, warps, stages, programs = DECODE[family, itemsize][large]
    if head_size <= 64:
        keys *= 2
    rows = max(LEAST_ROWS, power_of_two(group))
    if rows > 64:
        warps = 8
    if rows > LEAST_ROWS:
        programs = min(programs, 1 if rows > 64 or (rows > 32 and large) else 2)
    return Tiling(rows, keys, warps, stages, programs, partial_cost=1)


def prefill_tiling(
    family: Family, group: int, head_size: int, itemsize: int, longest: int
) -> Tiling:
    """For chunks of up to `longest` queries.

    A program has no more rows than the longest chunk fills: a short chunk over a long
    cached prefix is like a decode.
    """
    widest, keys, warps, stages = PREFILL[family, itemsize][head_size > 128]
    least = max(power_of_two(group), LEAST_ROWS)
    rows = max(least, min(power_of_two(longest * group), widest))
    if rows < widest and itemsize < 4:
        warps = 4
    programs = 1 if rows >= 128 or (itemsize == 1 and head_size > 128) else 2
    partial_cost = 4 if rows >= 64 else 2
    return Tiling(rows, keys, warps, stages, programs, partial_cost)


def power_of_two(count: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (count - 1).bit_length()


@lru_cache(maxsize=16)
def family_of(device: torch.device) -> Family:
    """The kind of device. The interpreter, which has none, is tiled like Hopper."""
    if device.type != "cuda" or torch.version.hip:
        return "cdna" if torch.version.hip else "hopper"
    major, _ = torch.cuda.get_device_capability(device)
    # sm_120 has the matrix instructions and the shared memory of a smaller device.
    return "hopper" if major in (9, 10) else "ampere"


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many the device has. The interpreter's one is given 4, so that it splits too."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
