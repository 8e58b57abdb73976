"""Random numbers that are the same on every platform: raw Philox bits and exact arithmetic on them.

NumPy promises the raw stream of a bit generator for good, but not the distributions drawn from it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ttt_sim.reference.checks import FloatArray

LARGEST_SEED = (1 << 63) - 1


def raw(seed: int, stream: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """64 random bits per element; ``stream`` separates independent draws of one seed."""
    generator = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
    out: npt.NDArray[np.uint64] = generator.random_raw(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    return out


def normal(seed: int, stream: int, shape: tuple[int, ...]) -> FloatArray:
    """Nearly normal numbers of mean 0 and variance 1: the sum of four uniform 16-bit numbers, scaled."""
    bits = raw(seed, stream, shape)
    total = np.zeros(shape)
    for part in range(4):
        total += ((bits >> np.uint64(16 * part)) & np.uint64(0xFFFF)).astype(np.float64)
    return np.asarray((total - 4 * 32767.5) * (np.sqrt(3.0) / 65536))


def whole_numbers(seed: int, stream: int, shape: tuple[int, ...], end: int) -> npt.NDArray[np.int64]:
    """Whole numbers from 0 to ``end`` - 1."""
    return (raw(seed, stream, shape) % np.uint64(end)).astype(np.int64)
