"""The counter-based generator behind every draw: no state, the same numbers anywhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


def uniforms(
    seeds: npt.NDArray[np.uint64], sample_indexes: Int32Array, positions: Int32Array
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each row, float64 [n], a multiple of 2**-53."""
    counters = np.zeros((4, len(seeds)), np.uint64)
    counters[0] = positions.astype(np.uint32)
    counters[1] = sample_indexes.astype(np.uint32)
    keys = np.stack([seeds & _MASK, seeds >> _WORD])
    high, low, _, _ = philox(counters, keys)
    bits = ((high << _WORD) | low) >> np.uint64(11)
    numbers: npt.NDArray[np.float64] = bits * np.float64(2.0**-53)
    return numbers


_WORD = np.uint64(32)
_MASK = np.uint64(0xFFFFFFFF)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


def philox(
    counters: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC'11).

    Args:
        counters: uint64 [4, n], 32-bit words.
        keys: uint64 [2, n], 32-bit words.

    Returns: uint64 [4, n], 32-bit words.
    """
    a, b, c, d = counters
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b = (second >> _WORD) ^ b ^ keys[0], second & _MASK
        c, d = (first >> _WORD) ^ d ^ keys[1], first & _MASK
        keys = (keys + _WEYL) & _MASK
    return np.stack([a, b, c, d])
