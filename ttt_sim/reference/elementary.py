"""Elementary functions in float64 from + − × ÷ and square root alone, in a fixed order.

Library versions of exp, sin and cos differ in their last bit between platforms and vector widths. These are built from
operations that IEEE 754 defines to the bit (scaling by powers of two and rounding to integers are exact), so they give
the same bits everywhere. They are accurate to a few units in the last place of float64; tests hold them against the
``math`` module.
"""

from __future__ import annotations

import math

import numpy as np

from ttt_sim.reference.checks import FloatArray

_LOG2_E = 1.4426950408889634
#: ln 2 and pi/2 in parts; the leading ones have trailing zero bits, so that a multiple by a count is exact.
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_TWO_OVER_PI = 0.6366197723675814
_HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)

_EXP = tuple(1 / math.factorial(n) for n in range(13, -1, -1))
_SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1))
_COS = tuple((-1) ** n / math.factorial(2 * n) for n in range(8, -1, -1))
_ATANH = tuple(1 / (2 * n + 1) for n in range(11, -1, -1))


def _polynomial(coefficients: tuple[float, ...], x: FloatArray) -> FloatArray:
    """Horner's rule, highest power first."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def exp(x: FloatArray) -> FloatArray:
    """e**x; 0 where it underflows, infinity where it overflows. x = n ln 2 + r, a polynomial in r, scaled by 2**n."""
    x = np.clip(x, -800.0, 800.0)
    n = np.rint(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    with np.errstate(over="ignore", under="ignore"):
        y: FloatArray = np.ldexp(_polynomial(_EXP, r), n.astype(np.int64))
    return y


def log(x: FloatArray) -> FloatArray:
    """Natural logarithm of positive numbers: x = m 2**e with m near 1, ln m = 2 atanh((m - 1)/(m + 1))."""
    m, e = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2 * m, m), np.where(low, e - 1, e).astype(np.float64)
    s = (m - 1) / (m + 1)
    y: FloatArray = e * _LN2_HIGH + (2 * s * _polynomial(_ATANH, s * s) + e * _LN2_LOW)
    return y


def cos_sin(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Cosine and sine; x = n pi/2 + r, one polynomial each, chosen by n mod 4. For |x| up to a million or so."""
    n = np.rint(x * _TWO_OVER_PI)
    r = ((x - n * _HALF_PI[0]) - n * _HALF_PI[1]) - n * _HALF_PI[2]
    square = r * r
    s, c = r * _polynomial(_SIN, square), _polynomial(_COS, square)
    quadrant = n.astype(np.int64) % 4
    odd = quadrant % 2 == 1
    cos = np.where(odd, s, c) * np.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0)
    sin = np.where(odd, c, s) * np.where(quadrant >= 2, -1.0, 1.0)
    return cos, sin


def silu(x: FloatArray) -> FloatArray:
    """x / (1 + e**-x)."""
    return x / (1 + exp(-x)) + 0.0


def rotary_tables(positions: FloatArray, width: int, base: float) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines (n, width/2) of position / base**(2 i / width), i = 0 .. width/2 - 1."""
    fraction = np.arange(width // 2, dtype=np.float64) * (2 / width)
    rate = exp(-fraction * log(np.array(base, dtype=np.float64)))
    return cos_sin(positions[:, None] * rate)
