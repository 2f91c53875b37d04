"""Cache writes and block moves in Triton, byte for byte: on a GPU, or else in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.triton_cache import ENGINE_BYTES, copy_blocks, swap_blocks, write_cache
from tests.kernel_cases import (
    DEVICE,
    FP8,
    LAYOUTS,
    TOLERANCE,
    TRITON_DTYPES,
    address_space,
    filled_with_nan,
    slab_views,
)
from tests.triton_interpreter import faithful

# Triton 3.6 asks numpy for what it has come to warn of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
SOURCES = [dtype for dtype in TOLERANCE if dtype != FP8]
BLOCKS, BLOCK_SIZE = 7, 8
# Three blocks, whole and in part, out of order; two tokens that are not written.
SLOTS = [40, 41, 42, 43, 44, 45, 46, 47, -1, 15, 14, 0, -1, 55]


@pytest.fixture(autouse=True, scope="module")
def as_devices_compute() -> Iterator[None]:
    with faithful():
        yield


def raw(tensor: Tensor) -> Tensor:
    """Its bytes, which tell one NaN from another."""
    return tensor.contiguous().view(torch.uint8).cpu()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits at all, every kind of NaN included."""
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    generator = torch.manual_seed(seed)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8).view(dtype).to(DEVICE)


def rows_of(source: str, heads: int, head_size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Keys or values [T, Hkv, D], as models make them, full of random bits."""
    tokens = len(SLOTS)
    if source == "merged":
        return random_bits((tokens, 3 * heads, head_size), dtype, seed)[:, heads : 2 * heads]
    if source == "heads first":
        return random_bits((heads, tokens, head_size), dtype, seed).transpose(0, 1)
    return random_bits((tokens, heads, head_size), dtype, seed)


def expected_blocks(before: Tensor, rows: Tensor) -> Tensor:
    blocks = before.clone()
    for slot, row in zip(SLOTS, rows, strict=True):
        if slot >= 0:
            blocks[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = row
    return blocks


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "head_size"), [(2, 32), (3, 80)])
def test_writes(heads: int, head_size: int, layout: str, dtype: torch.dtype) -> None:
    """Each token's rows arrive bit for bit, and nothing else changes."""
    views = slab_views(layout, BLOCKS, heads, BLOCK_SIZE, head_size, dtype, DEVICE)
    before = [blocks.clone() for blocks in views]
    for sources in (("merged", "heads first"), ("plain", "plain")):
        rows = [rows_of(each, heads, head_size, dtype, at) for at, each in enumerate(sources)]
        write_cache(*rows, *views, torch.tensor(SLOTS, device=DEVICE))
        for blocks, old, given in zip(views, before, rows, strict=True):
            assert torch.equal(raw(blocks), raw(expected_blocks(old, given)))


@pytest.mark.skipif(FP8 not in TRITON_DTYPES, reason="this GPU has no e4m3")
@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("layout", ["block", "layer"])
def test_fp8_writes(layout: str, dtype: torch.dtype) -> None:
    """In units of each head's scale, rounded as torch rounds, and cut off at 448 units.

    Scales are powers of two, so that a device whose division is not exact has no excuse.
    """
    heads, head_size = 4, 32
    views = slab_views(layout, BLOCKS, heads, BLOCK_SIZE, head_size, FP8, DEVICE)
    before = [blocks.clone() for blocks in views]
    # From far below the least number of e4m3 to far beyond the largest, and its ties.
    rows = [
        torch.randn(len(SLOTS), heads, head_size, generator=torch.manual_seed(seed))
        * torch.logspace(-4, 4, head_size)
        for seed in (0, 1)
    ]
    ties = torch.tensor([1.0625, 1.1875, 2**-10, 3 * 2**-10, 17.0, 19.0, 448, 464, 480, 1e4])
    rows[0][3, 1, : ties.shape[0]] = ties
    rows[1][3, 1, : ties.shape[0]] = -ties
    rows = [each.to(DEVICE, dtype) for each in rows]
    scales = [torch.tensor(each, device=DEVICE) for each in ([1, 0.5, 2, 0.125], [4, 1.0, 1, 2])]
    scales = [scale.float() for scale in scales]
    write_cache(*rows, *views, torch.tensor(SLOTS, device=DEVICE), *scales)
    for blocks, old, given, scale in zip(views, before, rows, scales, strict=True):
        units = (given.float() / scale[:, None]).clamp(-448, 448).to(FP8)
        assert torch.equal(raw(blocks), raw(expected_blocks(old, units)))


@pytest.mark.skipif(FP8 not in TRITON_DTYPES, reason="this GPU has no e4m3")
def test_fp8_writes_with_any_scale() -> None:
    """A quotient may be off by a bit, which next to a tie is a step of e4m3: 1 in 8 at most."""
    views = slab_views("block", BLOCKS, 2, BLOCK_SIZE, 32, FP8, DEVICE)
    rows = torch.randn(len(SLOTS), 2, 32, generator=torch.manual_seed(0)).to(DEVICE)
    scales = torch.tensor([0.013, 0.0071], device=DEVICE)
    write_cache(rows, rows, *views, torch.tensor(SLOTS, device=DEVICE), scales, scales)
    slot = SLOTS.index(15)
    written = views[0][1, :, 7].float() * scales[:, None]
    torch.testing.assert_close(written, rows[slot], rtol=1 / 15, atol=1e-3)


def test_writes_of_nothing() -> None:
    views = slab_views("block", BLOCKS, 2, BLOCK_SIZE, 32, torch.float32, DEVICE)
    before = [raw(blocks) for blocks in views]
    empty = torch.empty(0, 2, 32, device=DEVICE)
    write_cache(empty, empty, *views, torch.empty(0, dtype=torch.int64, device=DEVICE))
    rows = torch.ones(3, 2, 32, device=DEVICE)
    write_cache(rows, rows, *views, torch.full((3,), -1, device=DEVICE))
    assert all(torch.equal(raw(blocks), old) for blocks, old in zip(views, before, strict=True))


def test_writes_beyond_two_to_the_32_elements() -> None:
    views = slab_views("far", BLOCKS, 2, BLOCK_SIZE, 32, torch.float16, DEVICE)
    assert max(SLOTS) // BLOCK_SIZE * views[0].stride(0) > 1 << 32
    before = [blocks.clone() for blocks in views]
    rows = [rows_of("plain", 2, 32, torch.float16, seed) for seed in (0, 1)]
    write_cache(*rows, *views, torch.tensor(SLOTS, device=DEVICE))
    for blocks, old, given in zip(views, before, rows, strict=True):
        assert torch.equal(raw(blocks), raw(expected_blocks(old, given)))


def slab_of(layout: str, block: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """[layer, block, ...] of 3 layers, full of random bits."""
    if layout == "block":
        return random_bits((BLOCKS, 3, *block), dtype, seed).transpose(0, 1)
    return random_bits((3, BLOCKS, *block), dtype, seed)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["block", "layer"])
# A block of a few words, and one that several programs move, the last of them in part.
@pytest.mark.parametrize("block", [(2, 2, 4, 4), (2, 3, 16, 80)])
def test_copies(block: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    slab = slab_of(layout, block, dtype, 0)
    expected = slab.clone()
    sources, destinations = [5, 0, 0], [1, 6, 2]
    expected[:, destinations] = slab[:, sources]
    copy_blocks(slab, *(torch.tensor(ids, device=DEVICE) for ids in (sources, destinations)))
    assert torch.equal(raw(slab), raw(expected))


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
@pytest.mark.parametrize("layouts", ["block block", "layer layer", "block layer", "layer block"])
@pytest.mark.parametrize("block", [(2, 2, 4, 4), (2, 2, 16, 1 << 11)])
def test_swaps(block: tuple[int, ...], layouts: str, dtype: torch.dtype) -> None:
    """From one slab to another and back, whichever of the two ways the bytes go."""
    here, there = (
        slab_of(layout, block, dtype, seed) for seed, layout in enumerate(layouts.split())
    )
    engines = 3 * here[0, 0].numel() * dtype.itemsize >= ENGINE_BYTES
    assert engines == (block[3] > 4)
    if DEVICE == "cuda":
        there = there.transpose(0, 1).cpu().pin_memory().transpose(0, 1)
    expected = there.clone()
    # Two neighbours on both sides, and one whose neighbour is none on the other.
    out, back = torch.tensor([2, 3, 5]), torch.tensor([0, 1, 4])
    expected[:, back] = here.cpu()[:, out].to(expected.device)
    swap_blocks(here, there, out, back)
    assert torch.equal(raw(there), raw(expected))
    expected = here.clone()
    expected[:, [6, 1, 0]] = there[:, [4, 0, 1]].to(DEVICE)
    swap_blocks(there, here, torch.tensor([4, 0, 1]), torch.tensor([6, 1, 0]))
    assert torch.equal(raw(here), raw(expected))


def test_moves_of_nothing() -> None:
    slab, other = (
        slab_of("block", (2, 4), torch.float32, 0),
        slab_of("block", (2, 4), torch.float32, 1),
    )
    before, other_before = raw(slab), raw(other)
    none = torch.empty(0, dtype=torch.int64)
    copy_blocks(slab, none.to(DEVICE), none.to(DEVICE))
    swap_blocks(slab, other, none, none)
    assert torch.equal(raw(slab), before) and torch.equal(raw(other), other_before)


def test_copies_beyond_two_to_the_31_words() -> None:
    step = (1 << 30) + 4096
    slab = address_space(2 * step + 4096, torch.float32, DEVICE).as_strided(
        (2, 3, 600), (1024, step, 1)
    )
    slab[:, 2] = random_bits((2, 600), torch.float32)
    slab[:, :2] = filled_with_nan((2, 2, 600), torch.float32, DEVICE)
    copy_blocks(slab, torch.tensor([2], device=DEVICE), torch.tensor([1], device=DEVICE))
    assert torch.equal(raw(slab[:, 1]), raw(slab[:, 2])) and slab[:, 0].isnan().all()
