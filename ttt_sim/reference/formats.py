"""Number formats, and rounding to them.

Values are float64 arrays throughout the reference; an array *in* a format holds only numbers that the format can
represent. Rounding is to nearest, ties to even, with gradual underflow. A zero has no sign: -0 is stored as +0, so
that equal numbers have equal bits. What is too large for a format is an error, never an infinity.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ttt_sim.reference.checks import FloatArray, InputError

#: Significand bits of float64, the hidden one included.
_DOUBLE = 53


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """``precision`` significand bits, the hidden one included; the smallest normal number is 2**min_exponent."""

    name: str
    precision: int
    min_exponent: int
    largest: float
    bits: int
    dtype: np.dtype[Any]

    @property
    def min_quantum(self) -> int:
        """Exponent of the smallest subnormal number: spacing of the numbers next to zero."""
        return self.min_exponent - self.precision + 1


def _format(name: str, precision: int, min_exponent: int, largest: float, dtype: Any) -> Format:
    kind: np.dtype[Any] = np.dtype(dtype)
    return Format(
        name=name, precision=precision, min_exponent=min_exponent, largest=largest, bits=8 * kind.itemsize, dtype=kind
    )


FLOAT64 = _format("float64", 53, -1022, float(np.finfo(np.float64).max), np.float64)
FLOAT32 = _format("float32", 24, -126, float(np.finfo(np.float32).max), np.float32)
BFLOAT16 = _format("bfloat16", 8, -126, (2 - 2**-7) * 2.0**127, ml_dtypes.bfloat16)
FLOAT16 = _format("float16", 11, -14, 65504.0, np.float16)
FLOAT8_E4M3 = _format("float8_e4m3fn", 4, -6, 448.0, ml_dtypes.float8_e4m3fn)
FLOAT8_E5M2 = _format("float8_e5m2", 3, -14, 57344.0, ml_dtypes.float8_e5m2)

#: Every format by name.
FORMATS: Mapping[str, Format] = {
    fmt.name: fmt for fmt in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3, FLOAT8_E5M2)
}


def find_format(name: object, *, argument: str = "dtype", allowed: tuple[str, ...] = tuple(FORMATS)) -> Format:
    """The format of this name; raises :class:`InputError` with the nearest spelling."""
    if not isinstance(name, str) or name not in allowed:
        near = difflib.get_close_matches(str(name), allowed, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise InputError(f"{argument}: {name!r} is unknown{hint}; expected one of {', '.join(allowed)}")
    return FORMATS[name]


def wide_format(fmt: Format) -> Format:
    """The format in which sums over many terms are kept before they are rounded to ``fmt``: at least float32."""
    return FLOAT64 if fmt is FLOAT64 else FLOAT32


def nearest(x: FloatArray, fmt: Format) -> FloatArray:
    """``x`` rounded to ``fmt`` without a check of the range: too large numbers keep their rounded size."""
    if fmt is FLOAT64:
        return np.asarray(x + 0.0)
    shape, x = np.shape(x), np.atleast_1d(x)  # operations on arrays without dimensions would return scalars
    drop = _DOUBLE - fmt.precision
    bits = x.view(np.int64)
    # Half a unit less one, plus the last kept bit: a tie carries only from an odd number. A carry runs into the
    # exponent, which is where it belongs.
    rounded = bits >> drop
    rounded &= 1
    rounded += bits
    rounded += (1 << (drop - 1)) - 1
    rounded &= -(1 << drop)
    y: FloatArray = rounded.view(np.float64)
    small = np.abs(x) < 2.0**fmt.min_exponent
    if small.any():
        quantum = 2.0**fmt.min_quantum
        y[small] = np.rint(x[small] / quantum) * quantum
    y += 0.0
    return y.reshape(shape)


def round_to(x: npt.ArrayLike, fmt: Format, name: str = "value") -> FloatArray:
    """``x`` (float64) rounded to the nearest number of ``fmt``; always a new array.

    Raises:
        InputError: a result would be beyond the format's largest number; the message calls it ``name``.
    """
    y = nearest(np.asarray(x, dtype=np.float64), fmt)
    check_range(y, fmt, name)
    return y


def check_range(y: FloatArray, fmt: Format, name: str) -> None:
    """Raise :class:`InputError` if an element of ``y`` is beyond ``fmt`` or not a number."""
    if y.size and not float(np.abs(y).max()) <= fmt.largest:  # not a number compares false
        where = tuple(int(i) for i in np.argwhere(~(np.abs(y) <= fmt.largest))[0])
        raise InputError(
            f"{name}: element {where} is {y[where]:.9g}, expected at most {fmt.largest:.9g} in size, "
            f"the largest number of {fmt.name}"
        )


def round_stochastic(x: FloatArray, fmt: Format, random: npt.NDArray[np.uint64], name: str = "value") -> FloatArray:
    """``x`` rounded to one of its two neighbours in ``fmt``, the nearer one more often, so that the mean is ``x``.

    ``random`` has the shape of ``x``; the 32 high bits of an element decide, those below that are dropped are not
    resolved. Exact numbers stay.

    Raises:
        InputError: as :func:`round_to`.
    """
    quantum = np.frexp(np.abs(x))[1].astype(np.int64) - fmt.precision
    quantum = np.maximum(quantum, fmt.min_quantum)
    scaled = np.ldexp(np.abs(x), -quantum)
    below = np.floor(scaled)
    threshold = (random >> np.uint64(32)).astype(np.float64) * 2.0**-32
    with np.errstate(invalid="ignore"):  # an infinity is refused below
        up = (scaled - below) > threshold
    y: FloatArray = np.copysign(np.ldexp(below + up, quantum), x) + 0.0
    check_range(y, fmt, name)
    return y


def is_in(x: FloatArray, fmt: Format) -> bool:
    """Whether every element of ``x`` is a number of ``fmt``."""
    return bool(np.array_equal(nearest(x, fmt), x) and (not x.size or float(np.abs(x).max()) <= fmt.largest))


def packed(x: FloatArray, fmt: Format) -> npt.NDArray[Any]:
    """``x``, which holds numbers of ``fmt``, as an array of the format's own dtype. Exact."""
    out: npt.NDArray[Any] = np.ascontiguousarray(x).astype(fmt.dtype)
    assert np.array_equal(out.astype(np.float64), x), f"not all values are numbers of {fmt.name}"
    return out
