"""Elementary functions against the math module, and their bits, which no platform may change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest

from tests.unit.reference_tools import Array, same_bits
from ttt_sim.reference import elementary
from ttt_sim.reference.randomness import raw


def uniform(stream: int, n: int, low: float, high: float) -> Array:
    return low + (high - low) * (raw(21, stream, (n,)).astype(np.float64) / 2.0**64)


def ulps(got: Array, want: list[float]) -> float:
    """Largest distance in units of the last place of the wanted numbers."""
    expected = np.array(want)
    return float((np.abs(got - expected) / np.spacing(np.abs(expected))).max())


# --- exp --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [1e-300, 1e-10, 0.4, 2.0, 30.0, 700.0])
def test_exp(reach):
    x = uniform(0, 3000, -reach, reach)
    assert ulps(elementary.exp(x), [math.exp(v) for v in x]) <= 2


def test_exp_at_the_ends():
    x = np.array([0.0, -0.0, 709.782712893384, 709.7827128933841, 710.0, 1e308, -745.1332191019411, -746.0, -1e308])
    want = [1.0, 1.0, math.exp(709.782712893384), np.inf, np.inf, np.inf, 5e-324, 0.0, 0.0]
    got = elementary.exp(x)
    assert got[[0, 1, 4, 5, 7, 8]].tolist() == [want[i] for i in (0, 1, 4, 5, 7, 8)]
    assert got[2] == pytest.approx(want[2], rel=1e-15)
    assert got[6] == 5e-324
    # Subnormal results: within one unit of the smallest spacing.
    x = uniform(1, 500, -745.0, -708.0)
    assert np.abs(elementary.exp(x) - [math.exp(v) for v in x]).max() <= 2**-1074 + 2 * 2.0**-1074


def test_exp_rises():
    x = np.sort(uniform(2, 4000, -5.0, 5.0))
    assert (np.diff(elementary.exp(x)) >= 0).all()
    assert (elementary.exp(np.linspace(-1e-15, 0.0, 100)) <= 1).all()


# --- log --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.999, 1.001), (1.0, 1e7), (1e-300, 1e-299), (1e300, 1.7e308)])
def test_log(low, high):
    x = uniform(3, 3000, low, high)
    assert ulps(elementary.log(x), [math.log(v) for v in x]) <= 4


def test_log_of_powers_of_two_and_subnormal_numbers():
    assert elementary.log(np.array([1.0]))[0] == 0.0
    x = np.ldexp(1.0, np.arange(-1074, 1024))
    assert ulps(elementary.log(x[x != 1]), [math.log(v) for v in x[x != 1]]) <= 1
    assert elementary.log(np.array(1e6)).shape == ()


# --- cosine and sine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [1e-8, 0.8, 4.0, 100.0, 1e4, 1e6])
def test_cos_and_sin(reach):
    x = uniform(4, 4000, -reach, reach)
    cos, sin = elementary.cos_sin(x)
    assert ulps(cos, [math.cos(v) for v in x]) <= 4
    assert ulps(sin, [math.sin(v) for v in x]) <= 4


def test_cos_and_sin_of_whole_positions():
    x = np.concatenate([np.arange(3000.0), 1e6 - np.arange(1000.0)])
    cos, sin = elementary.cos_sin(x)
    assert np.abs(cos - [math.cos(v) for v in x]).max() <= 2.0**-52
    assert np.abs(sin - [math.sin(v) for v in x]).max() <= 2.0**-52
    assert np.abs(cos**2 + sin**2 - 1).max() <= 2.0**-50


def test_near_multiples_of_a_right_angle():
    """Where one of them nearly vanishes: the float64 numbers next to n pi/2 are not zeros of it."""
    n = np.arange(1.0, 2000.0)
    x = n * (math.pi / 2)
    cos, sin = elementary.cos_sin(x)
    small, want = (
        np.where(n % 2 == 1, cos, sin),
        [math.cos(v) if k % 2 else math.sin(v) for k, v in zip(n, x, strict=True)],
    )
    assert np.abs(small / np.array(want) - 1).max() < 1e-7
    assert np.abs(small - want).max() < 1e-19


def test_cos_is_even_and_sin_is_odd_to_the_bit():
    x = np.concatenate([uniform(5, 1000, 0.0, 1000.0), np.arange(1.0, 200.0), np.arange(1.0, 200.0) * (math.pi / 4)])
    cos, sin = elementary.cos_sin(x)
    other_cos, other_sin = elementary.cos_sin(-x)
    assert same_bits(cos, other_cos)
    assert same_bits(sin, -other_sin)
    cos, sin = elementary.cos_sin(np.zeros(1))
    assert (cos[0], sin[0]) == (1.0, 0.0)


# --- silu -------------------------------------------------------------------------------------------------------------


def silu_by_decimals(x: float) -> float:
    with localcontext() as context:
        context.prec = 60
        return float(Decimal(x) / (1 + (-Decimal(x)).exp()))


@pytest.mark.parametrize("reach", [1e-300, 0.1, 3.0, 40.0, 700.0])
def test_silu(reach):
    x = uniform(6, 500, -reach, reach)
    assert ulps(elementary.silu(x), [silu_by_decimals(v) for v in x]) <= 4


def test_silu_at_the_ends():
    got = elementary.silu(np.array([0.0, -0.0, -1e4, 1e4, -1e308, 1e308, 128.0]))
    assert same_bits(got, np.array([0.0, 0.0, 0.0, 1e4, 0.0, 1e308, 128.0]))


# --- rotary tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "base"), [(16, 1e6), (128, 5e5), (2, 1e4), (64, 1e4)])
def test_rotary_tables(width, base):
    positions = np.array([0.0, 1.0, 2.0, 17.0, 1000.0, 131071.0])
    cos, sin = elementary.rotary_tables(positions, width, base)
    assert cos.shape == sin.shape == (6, width // 2)
    assert (cos[0] == 1).all()
    assert (sin[0] == 0).all()
    for row, position in enumerate(positions):
        for i in range(width // 2):
            angle = position / base ** (2 * i / width)
            tolerance = 1e-15 * max(1.0, angle)
            assert cos[row, i] == pytest.approx(math.cos(angle), abs=4 * tolerance)
            assert sin[row, i] == pytest.approx(math.sin(angle), abs=4 * tolerance)
    # A row depends on its position only.
    alone, _ = elementary.rotary_tables(positions[4:5], width, base)
    assert same_bits(alone[0], cos[4])


# --- bits -------------------------------------------------------------------------------------------------------------

#: Digests of 4,000 results each. They change when an operation of a function changes, and for no other reason.
BITS: dict[str, tuple[Callable[[], Array], str]] = {
    "exp": (lambda: elementary.exp(uniform(7, 4000, -745.0, 709.0)), "8480bd7ca5e191c0ba0034bdfb6be8fa"),
    "log": (lambda: elementary.log(uniform(8, 4000, 0.0, 10.0)), "601d25b8bd4715be670b24496136873f"),
    "cos": (lambda: elementary.cos_sin(uniform(9, 4000, -1e5, 1e5))[0], "ecb7c9d5076ce080c98dce52d9d07edd"),
    "sin": (lambda: elementary.cos_sin(uniform(9, 4000, -1e5, 1e5))[1], "0eedc88c30f4f3d13b5dcf140b66f85b"),
    "silu": (lambda: elementary.silu(uniform(10, 4000, -50.0, 50.0)), "dbc051310afb3012ca08128c04378649"),
    "rotary": (
        lambda: np.concatenate(elementary.rotary_tables(np.arange(125.0) * 64, 32, 1e6)),
        "5a7b62307990ce7c42dd9dfb1b5d4601",
    ),
}


@pytest.mark.parametrize("name", BITS)
def test_bits_are_the_same_everywhere(name):
    compute, want = BITS[name]
    values = np.ascontiguousarray(compute(), dtype="<f8")
    assert values.size == 4000
    assert hashlib.sha256(values.tobytes()).hexdigest()[:32] == want


@pytest.mark.parametrize("name", BITS)
def test_results_do_not_depend_on_length_or_layout(name):
    """Vector code has a loop for whole registers and one for the rest; both must give the same bits."""
    x = uniform(11, 67, -3.0, 3.0)
    functions: dict[str, Callable[[Array], Array]] = {
        "exp": elementary.exp,
        "log": lambda v: elementary.log(np.abs(v)),
        "cos": lambda v: elementary.cos_sin(v)[0],
        "sin": lambda v: elementary.cos_sin(v)[1],
        "silu": elementary.silu,
        "rotary": lambda v: elementary.rotary_tables(v, 2, 1e4)[0][:, 0],
    }
    whole = functions[name](x)
    spread = np.zeros(134)
    spread[::2] = x
    assert same_bits(functions[name](spread[::2]), whole)
    assert same_bits(np.concatenate([functions[name](x[i : i + 1]) for i in range(67)]), whole)
    assert same_bits(x, uniform(11, 67, -3.0, 3.0))
