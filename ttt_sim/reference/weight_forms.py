"""Forms of a fast weight after updates, and the way back from one.

W_n = W_0 + eta sum_j V_j^T Z_j can be kept as one weight, as W_0 and the change S beside it, or as W_0 and the factors
(V_j, Z_j); applied to rows Z they give the same

    Z W_n^T  =  Z W_0^T + Z S^T  =  Z W_0^T + eta sum_j (Z Z_j^T) V_j

Everything in float64, without rounding in between; z (rows, f), W_0 (d, f), V_j (C, d), Z_j (C, f).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.formats import Format, round_to

#: (V_j, Z_j) of each chunk.
Factors = Sequence[tuple[FloatArray, FloatArray]]


def change(factors: Factors, rate: float, shape: tuple[int, int]) -> FloatArray:
    """S, the sum of the scaled deltas."""
    total = np.zeros(shape)
    for values, hidden in factors:
        total += rate * (values.T @ hidden)
    return total


def apply_merged(z: FloatArray, trained: FloatArray, factors: Factors, rate: float) -> FloatArray:
    """One weight."""
    out: FloatArray = z @ (trained + change(factors, rate, (trained.shape[0], trained.shape[1]))).T
    return out


def apply_split(z: FloatArray, trained: FloatArray, factors: Factors, rate: float) -> FloatArray:
    """The trained weight, and the change beside it."""
    out: FloatArray = z @ trained.T + z @ change(factors, rate, (trained.shape[0], trained.shape[1])).T
    return out


def apply_kernel(z: FloatArray, trained: FloatArray, factors: Factors, rate: float) -> FloatArray:
    """The trained weight, and the factors of the deltas."""
    out: FloatArray = z @ trained.T
    for values, hidden in factors:
        out = out + rate * ((z @ hidden.T) @ values)
    return out


def add_and_subtract(weight: FloatArray, delta: FloatArray, fmt: Format) -> FloatArray:
    """R(R(W + E) - E): the weight after an update and its rollback by subtraction, in ``fmt``."""
    return round_to(round_to(weight + delta, fmt) - delta, fmt)


def add_and_subtract_integers(weight: npt.NDArray[np.int64], delta: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same in integers, of which none overflows."""
    added: npt.NDArray[np.int64] = weight + delta
    return added - delta
