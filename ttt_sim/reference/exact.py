"""Dot products with one rounding: the exact sum of the exact products, rounded once.

Such a result does not depend on the order of the terms, so not on BLAS, threads, tiles or processor either. It is
found in two steps.

1. *Certified.* A float64 matrix product in any order is off by at most ``k u sum|a b|`` with u = 2**-53 (Higham,
   Accuracy and Stability of Numerical Algorithms, section 3.1). Where both ends of that interval round to the same
   number of the target format, rounding is monotonic and that number is the answer. For formats of at most 24 bits
   this settles nearly every element.
2. *Exact.* What is left is cut into digits, error-free: each row of A and column of B has a power of two as its scale,
   and each element is a sum of integers of ``bits`` bits on a common grid (Ozaki et al., Error-free transformations
   of matrix multiplication, Numer. Algorithms 59, 2012). The product of two digit matrices is a sum of k integers of
   2 ``bits`` bits, chosen so that it fits 53 bits: BLAS computes it without any rounding. The digit sums are added as
   64-bit integers, and the one rounding is done on integers.

The digits of parts of the reduction add up on the same grid, so partial sums of a split reduction stay exact until the
last (:class:`DigitGrid`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttt_sim.reference.checks import FloatArray, InputError
from ttt_sim.reference.formats import FLOAT64, Format, check_range, nearest

IntArray = npt.NDArray[np.int64]

#: Integers of this many bits are exact in float64; its unit roundoff.
_DOUBLE_BITS = 53
_UNIT = 2.0**-_DOUBLE_BITS
#: An undecided element costs one row and one column; from this share on the whole product is cut into digits.
_FEW = 1 / 64
#: Most digits of a high part of a sum; with a sticky bit, more than twice the precision of any narrow format.
_HIGH_BITS = 62


def dot(a: FloatArray, b: FloatArray, fmt: Format, name: str = "product") -> FloatArray:
    """(..., m, k) by (..., k, n): every element is the exact sum of products, rounded once to ``fmt``.

    ``a`` and ``b`` are finite float64 arrays with equal leading lengths.

    Raises:
        InputError: shapes that do not match, or a result beyond ``fmt``; the message calls it ``name``.
    """
    _check_shapes(a, b)
    if fmt is FLOAT64:
        return dot_digits(a, b, fmt, name)
    with np.errstate(over="ignore", invalid="ignore"):
        size = np.abs(a).sum(axis=-1, keepdims=True) * np.abs(b).max(axis=-2, keepdims=True, initial=0)
        centre = np.matmul(a, b)
        y, undecided = _certified(centre, size, a.shape[-1], fmt)
    n_undecided = int(np.count_nonzero(undecided))
    if n_undecided > _FEW * y.size:
        y = _by_digits(a, b, fmt)
    elif n_undecided:
        where = np.nonzero(undecided)
        rows = a[where[:-1]][:, None, :]
        cols = np.swapaxes(b, -1, -2)[(*where[:-2], where[-1])][:, :, None]
        y[where] = _by_digits(rows, cols, fmt).reshape(-1)
    check_range(y, fmt, name)
    return y


def _certified(centre: FloatArray, size: FloatArray, k: int, fmt: Format) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """``centre``, sums of k products in any order, rounded; and where that is not certain. ``size``: sum|a b| or more.

    Overwrites ``centre``.
    """
    # A little more than k u sum|a b|: for the rounding of ``size`` and of these lines, and for products under the
    # normal numbers.
    error = np.abs(centre)
    error *= 2 * _UNIT
    error += (k + 16) * _UNIT * size
    error += k * 2.0**-1073
    centre -= error
    y = nearest(centre, fmt)
    error *= 2
    centre += error
    return y, y != nearest(centre, fmt)  # not a number is undecided too


def dot_digits(a: FloatArray, b: FloatArray, fmt: Format, name: str = "product") -> FloatArray:
    """:func:`dot` by digits alone, for every format."""
    _check_shapes(a, b)
    y = _by_digits(a, b, fmt)
    check_range(y, fmt, name)
    return y


def _by_digits(a: FloatArray, b: FloatArray, fmt: Format) -> FloatArray:
    """:func:`dot_digits` without the check of the range."""
    grid = DigitGrid.of(a, b)
    return grid._values(grid.partial(a, b), fmt)


def row_dot(a: FloatArray, b: FloatArray, fmt: Format, name: str = "sum") -> FloatArray:
    """(..., k) with (..., k) to (...): the dot product of each pair of rows, rounded once to ``fmt``."""
    a, b = np.broadcast_arrays(a, b)
    if fmt is FLOAT64 or a.ndim == 1:
        y = np.asarray(_by_digits(a[..., None, :], b[..., :, None], fmt)[..., 0, 0])
        check_range(y, fmt, name)
        return y
    with np.errstate(over="ignore", invalid="ignore"):
        products = a * b
        y, undecided = _certified(np.asarray(products.sum(axis=-1)), np.abs(products).sum(axis=-1), a.shape[-1], fmt)
    if undecided.any():
        y[undecided] = _by_digits(a[undecided][:, None, :], b[undecided][:, :, None], fmt).reshape(-1)
    check_range(y, fmt, name)
    return y


def row_sum(x: FloatArray, fmt: Format, name: str = "sum") -> FloatArray:
    """(..., k) to (...): the sum of each row, rounded once."""
    return row_dot(x, np.ones(1), fmt, name)


def _check_shapes(a: FloatArray, b: FloatArray) -> None:
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise InputError(f"a, b: shapes are {a.shape} and {b.shape}, expected (..., m, k) and (..., k, n)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DigitGrid:
    """The common grid of a product: digits of ``bits`` bits below 2**a_exponent (..., m, 1) and 2**b_exponent
    (..., 1, n).

    A sum on the grid is an int64 array (n_places, ..., m, n); place p weighs 2**(a_exponent + b_exponent - (p + 2)
    bits). Sums of parts of the reduction add element by element.
    """

    bits: int
    a_exponent: IntArray
    b_exponent: IntArray

    @staticmethod
    def of(a: FloatArray, b: FloatArray) -> DigitGrid:
        """The grid for the whole product of ``a`` and ``b``."""
        k = max(a.shape[-1], 1)
        return DigitGrid(
            bits=(_DOUBLE_BITS - (k - 1).bit_length()) // 2,
            a_exponent=_exponents(a, axis=-1),
            b_exponent=_exponents(b, axis=-2),
        )

    def partial(self, a: FloatArray, b: FloatArray) -> IntArray:
        """The exact sum over a part of the reduction: columns of A, the same rows of B. (n_places, ..., m, n)"""
        a_digits, b_digits = _digits(a, self.a_exponent, self.bits), _digits(b, self.b_exponent, self.bits)
        places = max(len(a_digits) + len(b_digits) - 1, 1)
        total = np.zeros((places, *a.shape[:-1], b.shape[-1]), dtype=np.int64)
        for s, a_digit in enumerate(a_digits):
            for t, b_digit in enumerate(b_digits):
                total[s + t] += np.matmul(a_digit, b_digit).astype(np.int64)
        return total

    @staticmethod
    def add(x: IntArray, y: IntArray) -> IntArray:
        """The sum of two sums on one grid, which may have different numbers of places."""
        if x.shape[0] < y.shape[0]:
            x, y = y, x
        out = x.copy()
        out[: y.shape[0]] += y
        return out

    def rounded(self, total: IntArray, fmt: Format, name: str = "product") -> FloatArray:
        """The value of a sum on the grid, rounded once to ``fmt``; raises :class:`InputError` beyond its range."""
        y = self._values(total, fmt)
        check_range(y, fmt, name)
        return y

    def _values(self, total: IntArray, fmt: Format) -> FloatArray:
        return _round_places(total, self.a_exponent + self.b_exponent - 2 * self.bits, self.bits, fmt)


def _exponents(x: FloatArray, axis: int) -> IntArray:
    """Exponents e with every |x| < 2**e along ``axis`` (kept as length 1)."""
    largest = np.abs(x).max(axis=axis, keepdims=True, initial=0)
    if not np.isfinite(largest).all():
        raise InputError("a, b: found an infinity or not a number, expected finite numbers")
    return np.asarray(np.frexp(largest)[1], dtype=np.int64)


def _digits(x: FloatArray, exponent: IntArray, bits: int) -> list[FloatArray]:
    """Integers d_0, d_1, ... in (-2**bits, 2**bits) with x = sum of d_s 2**(exponent - (s + 1) bits); error-free.

    Each step cuts the leading digit off what is left of x. Scaling is by powers of two, and what is cut off and what is
    left have no more significant bits than x, so no step rounds.
    """
    out: list[FloatArray] = []
    rest = x
    while rest.any():
        shift = (len(out) + 1) * bits - exponent
        digit = np.trunc(np.ldexp(rest, shift))
        rest = rest - np.ldexp(digit, -shift)
        out.append(digit)
    return out


def _bit_length(x: IntArray) -> IntArray:
    """Bits of each non-negative integer, exactly."""
    high, low = x >> 32, x & 0xFFFFFFFF
    bits = np.frexp(np.where(high > 0, high, low).astype(np.float64))[1].astype(np.int64)
    return np.asarray(np.where(high > 0, bits + 32, bits))


def _carried(places: IntArray, bits: int) -> IntArray:
    """The same numbers with all places but the first in [0, 2**bits)."""
    out = places.copy()
    for p in range(out.shape[0] - 1, 0, -1):
        carry = out[p] >> bits
        out[p] -= carry << bits
        out[p - 1] += carry
    return out


def _round_places(places: IntArray, exponent: IntArray, bits: int, fmt: Format) -> FloatArray:
    """sum over p of places[p] 2**(exponent - p bits), rounded once to ``fmt``."""
    places = _carried(places, bits)
    negative = places[0] < 0
    if negative.any():
        places = _carried(np.where(negative, -places, places), bits)
    # The high part of the magnitude, as many bits as fit, and whether anything non-zero is left below it.
    high = places[0]
    exponent = np.broadcast_to(exponent, high.shape).copy()
    sticky = np.zeros(high.shape, dtype=np.bool_)
    whole = np.ones(high.shape, dtype=np.bool_)  # no digit was cut yet
    for digit in places[1:]:
        take = np.where(whole, np.clip(_HIGH_BITS - _bit_length(high), 0, bits), 0)
        whole &= take == bits
        left = bits - take
        high = (high << take) | (digit >> left)
        sticky |= (digit & ((np.int64(1) << left) - 1)) != 0
        exponent -= take
    # Drop bits down to the format's precision, or to its smallest spacing. Numbers that drop none are exact.
    drop = np.maximum(_bit_length(high) - fmt.precision, fmt.min_quantum - exponent)
    rounds = (drop > 0) & (drop <= _HIGH_BITS)  # beyond that, less than half of the smallest spacing is left
    drop = np.clip(drop, 0, _HIGH_BITS)
    kept = high >> drop
    rest = high & ((np.int64(1) << drop) - 1)
    half = (np.int64(1) << drop) >> 1
    kept += rounds & ((rest > half) | ((rest == half) & (sticky | ((kept & 1) == 1))))
    with np.errstate(over="ignore"):
        y: FloatArray = np.ldexp(kept.astype(np.float64), exponent + drop)
    return np.where(negative, -y, y) + 0.0
