"""Rounding to the number formats: every number of the small ones, its neighbours and the midpoints between them."""

from __future__ import annotations

from fractions import Fraction
from math import ldexp

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.reference_tools import SPECS, Array, in_range, rounded, same_bits
from ttt_sim.reference import FORMATS, InputError
from ttt_sim.reference.formats import check_range, find_format, is_in, nearest, packed, round_stochastic, round_to
from ttt_sim.reference.formats import wide_format as wide
from ttt_sim.reference.randomness import normal, raw, whole_numbers

NARROW = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
every_format = pytest.mark.parametrize("fmt", FORMATS)
narrow_format = pytest.mark.parametrize("fmt", NARROW)
F32, F64 = FORMATS["float32"], FORMATS["float64"]
DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def all_numbers(fmt: str) -> Array:
    """Every finite number of a format of 8 or 16 bits, ascending, zero once."""
    dtype = np.dtype(DTYPES[fmt])
    patterns = np.arange(2 ** (8 * dtype.itemsize), dtype=np.uint8 if dtype.itemsize == 1 else np.uint16)
    with np.errstate(invalid="ignore"):  # NaNs
        values = patterns.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)] + 0.0)


@every_format
def test_table_of_formats(fmt):
    f, spec, info = FORMATS[fmt], SPECS[fmt], ml_dtypes.finfo(DTYPES[fmt])
    assert (f.name, f.precision, f.min_quantum) == (fmt, spec.precision, spec.quantum)
    assert Fraction(f.largest) == spec.largest == Fraction(float(info.max))
    assert f.bits == info.bits
    assert f.dtype == np.dtype(DTYPES[fmt])
    assert ldexp(1.0, f.min_quantum) == float(info.smallest_subnormal)
    assert ldexp(1.0, f.min_exponent) == float(info.smallest_normal)


@narrow_format
def test_every_number_stays(fmt):
    values = all_numbers(fmt)
    assert len(values) > 200
    assert same_bits(nearest(values, FORMATS[fmt]), values)
    assert same_bits(round_to(values, FORMATS[fmt]), values)
    assert is_in(values, FORMATS[fmt])
    for bits in (0, 1 << 32, 2**64 - 1):
        assert same_bits(round_stochastic(values, FORMATS[fmt], np.full(values.shape, bits, np.uint64)), values)


@narrow_format
def test_every_midpoint_goes_to_the_even_neighbour(fmt):
    """Numbers of a format alternate between even and odd last places, zero even; what lies next to a midpoint in
    float64, one unit in its last place away, goes to the nearer side."""
    values = all_numbers(fmt)
    below, above = values[:-1], values[1:]
    middle = below + (above - below) / 2  # exact: at most 13 bits
    index = np.arange(len(values)) - int(np.flatnonzero(values == 0)[0])
    even = np.where(index[:-1] % 2 == 0, below, above)
    assert same_bits(nearest(middle, FORMATS[fmt]), even)
    assert same_bits(nearest(np.nextafter(middle, -np.inf), FORMATS[fmt]), below)
    assert same_bits(nearest(np.nextafter(middle, np.inf), FORMATS[fmt]), above)
    for part in (middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)):
        assert not is_in(part, FORMATS[fmt])
        assert not np.isin(part, values).any()


@narrow_format
def test_as_ml_dtypes_rounds_float32(fmt):
    """From float32, where conversion is one rounding: numbers, midpoints, their float32 neighbours and random bits."""
    values = all_numbers(fmt)
    middle = (values[:-1] + (values[1:] - values[:-1]) / 2).astype(np.float32)
    random = raw(0, 0, (50_000,)).astype(np.uint32).view(np.float32)
    random = random[np.isfinite(random)]
    near_one = (normal(0, 1, (20_000,)) * np.exp2(np.arange(20_000) % 24 - 12.0)).astype(np.float32)
    up, down = np.float32(np.inf), np.float32(-np.inf)
    for x in (
        values.astype(np.float32),
        middle,
        np.nextafter(middle, up),
        np.nextafter(middle, down),
        random,
        near_one,
    ):
        with np.errstate(over="ignore", invalid="ignore"):
            want = x.astype(DTYPES[fmt]).astype(np.float64)
        # A number that is too large is infinite or NaN there, an error here.
        keep = np.isfinite(want) & np.isfinite(x)
        assert keep.sum() > len(x) / 100
        assert same_bits(round_to(x[keep].astype(np.float64), FORMATS[fmt]), want[keep] + 0.0)
        for value in x[np.isfinite(x) & ~keep][:200]:
            with pytest.raises(InputError):
                round_to(np.array([float(value)]), FORMATS[fmt])


def test_float32_as_numpy_rounds():
    bits = raw(1, 0, (200_000,))
    exponents = (bits >> np.uint64(52)) % np.uint64(320)
    x = np.ldexp(1 + (bits & np.uint64(2**52 - 1)).astype(np.float64) * 2.0**-52, exponents.astype(np.int64) - 190)
    x = np.concatenate([x, -x])
    numbers = raw(1, 1, (20_000,)).astype(np.uint32).view(np.float32)
    numbers = np.abs(numbers[np.isfinite(numbers)])
    with np.errstate(over="ignore"):
        following = np.nextafter(numbers, np.float32(np.inf)).astype(np.float64)
    middle = (numbers.astype(np.float64) + following) / 2
    ties = middle[np.isfinite(middle)]
    for part in (x, ties, np.nextafter(ties, 0.0), np.nextafter(ties, np.inf)):
        with np.errstate(over="ignore"):
            want = part.astype(np.float32).astype(np.float64)
        keep = np.isfinite(want)
        assert same_bits(nearest(part[keep], F32), want[keep] + 0.0)


@settings(max_examples=400)
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(sorted(FORMATS)))
def test_any_float64_against_fractions(x, fmt):
    want = rounded(Fraction(x), fmt)
    if in_range(want, fmt):
        assert same_bits(round_to(np.array([x]), FORMATS[fmt]), np.array([float(want)]))
        assert is_in(np.array([x]), FORMATS[fmt]) == (want == Fraction(x))
    else:
        with pytest.raises(InputError, match=rf"^w: element .*largest number of {fmt}$"):
            round_to(np.array([x]), FORMATS[fmt], "w")
        assert not is_in(np.array([x]), FORMATS[fmt])


@every_format
def test_double_rounding_does_not_happen(fmt):
    """A value just over a tie, by less than float32 or any step between could see."""
    if fmt == "float64":
        return
    half = 2.0 ** -SPECS[fmt].precision
    over = 1 + half + 2.0**-52
    assert nearest(np.array([over]), FORMATS[fmt])[0] == 1 + 2 * half
    assert nearest(np.array([1 + 3 * half - 2.0**-51]), FORMATS[fmt])[0] == 1 + 2 * half


@every_format
def test_zero_has_no_sign(fmt):
    tiny = ldexp(1.0, max(SPECS[fmt].quantum - 2, -1074))
    x = np.array([-0.0, 0.0, *([-tiny, tiny] if fmt != "float64" else [])])
    for y in (nearest(x, FORMATS[fmt]), round_to(x, FORMATS[fmt])):
        assert same_bits(y, np.zeros(len(x)))
    y = round_stochastic(x, FORMATS[fmt], np.full(x.shape, 2**64 - 1, np.uint64))
    assert same_bits(y, np.zeros(len(x)))
    assert not np.signbit(packed(nearest(x, FORMATS[fmt]), FORMATS[fmt]).astype(np.float64)).any()


@every_format
def test_input_stays_and_result_is_new(fmt):
    for x in (
        np.array([0.3, 1.0, -2.0, 0.0]),
        np.array([1.0, 2.0]),
        np.array(1.0),
        np.zeros((0, 3)),
        np.ones((2, 3)).T,
    ):
        before = x.copy()
        x.flags.writeable = False
        for y in (
            nearest(x, FORMATS[fmt]),
            round_to(x, FORMATS[fmt]),
            round_stochastic(x, FORMATS[fmt], np.zeros(x.shape, np.uint64)),
        ):
            assert y.shape == x.shape
            assert y.dtype == np.float64
            assert not np.shares_memory(x, y)
        assert same_bits(x, before)


def test_layout_in_memory_is_irrelevant():
    x = normal(2, 0, (6, 8))
    for fmt in FORMATS.values():
        want = nearest(x, fmt)
        wide_array = np.zeros((12, 16))
        wide_array[::2, ::2] = x
        for same in (wide_array[::2, ::2], np.asfortranarray(x), np.ascontiguousarray(x[::-1])[::-1]):
            assert same_bits(nearest(same, fmt), want)
            assert same_bits(round_to(same, fmt), want)


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_an_error(fmt, bad):
    x = np.array([[1.0, 2.0], [bad, 3.0]])
    for call in (round_to, lambda x, f, n: round_stochastic(x, f, np.zeros(x.shape, np.uint64), n)):
        with pytest.raises(InputError, match=rf"^gain: element \(1, 0\) is \S+, expected at most .* of {fmt}$"):
            call(x, FORMATS[fmt], "gain")
    assert not is_in(x, FORMATS[fmt])


@every_format
def test_range_ends_at_the_largest_number(fmt):
    largest = FORMATS[fmt].largest
    check_range(np.array([largest, -largest]), FORMATS[fmt], "x")
    check_range(np.zeros(0), FORMATS[fmt], "x")
    with np.errstate(over="ignore"):
        beyond = np.nextafter(largest, np.inf)
    with pytest.raises(InputError, match=r"^x: element"):
        check_range(np.array([0.0, -beyond]), FORMATS[fmt], "x")
    if fmt != "float64":  # what rounds to the largest number is in range
        assert round_to(np.array([-beyond]), FORMATS[fmt])[0] == -largest


# --- stochastic rounding ----------------------------------------------------------------------------------------------


def neighbours(x: float, fmt: str) -> tuple[float, float]:
    """The numbers of the format around ``x``."""
    near = float(rounded(Fraction(x), fmt))
    values = all_numbers(fmt)
    i = int(np.searchsorted(values, near))
    return (near, float(values[i + 1])) if near < x else (float(values[i - 1]), near)


@narrow_format
def test_only_the_two_neighbours_and_an_unbiased_mean(fmt):
    n = 40_000
    quantum = ldexp(1.0, SPECS[fmt].quantum)
    for i, x in enumerate((0.3, -0.3, 1.99, 3.01, quantum * 0.3, -quantum * 2.75, quantum * 0.999)):
        low, high = neighbours(x, fmt)
        y = round_stochastic(np.full(n, x), FORMATS[fmt], raw(5, i, (n,)))
        assert set(np.unique(y).tolist()) == {low, high}
        share = float(np.mean(y == high))
        want = (x - low) / (high - low)
        # Five standard deviations of a binomial share.
        assert abs(share - want) < 5 * np.sqrt(want * (1 - want) / n)


def test_threshold_is_exact():
    """3/8 of a unit goes up for 3 of 8 equal parts of the random numbers, on both sides of zero."""
    steps = np.arange(8, dtype=np.uint64) << np.uint64(61)
    for sign in (1.0, -1.0):
        x = np.full(8, sign * (1 + 3 / 8 * 2.0**-7))
        y = round_stochastic(x, FORMATS["bfloat16"], steps)
        assert np.count_nonzero(y == sign * (1 + 2.0**-7)) == 3
        assert np.count_nonzero(y == sign) == 5
    # The last of each part still belongs to it.
    y = round_stochastic(np.full(8, 1 + 3 / 8 * 2.0**-7), FORMATS["bfloat16"], steps + np.uint64(2**61 - 1))
    assert np.count_nonzero(y != 1.0) == 3


def test_stochastic_rounding_up_to_a_power_of_two_and_beyond_the_range():
    ones, zeros = np.full(1, 2**64 - 1, np.uint64), np.zeros(1, np.uint64)
    x = np.array([2 - 2.0**-9])
    assert round_stochastic(x, FORMATS["bfloat16"], zeros)[0] == 2.0
    assert round_stochastic(x, FORMATS["bfloat16"], ones)[0] == 2 - 2.0**-7
    over = np.array([450.0])
    assert round_stochastic(over, FORMATS["float8_e4m3fn"], ones)[0] == 448.0
    with pytest.raises(InputError, match=r"^w: element \(0,\) is 480, expected at most 448 .*float8_e4m3fn"):
        round_stochastic(over, FORMATS["float8_e4m3fn"], zeros, "w")


@every_format
def test_stochastic_rounding_of_random_numbers_is_next_to_them(fmt):
    x = normal(6, 0, (5000,))
    y = round_stochastic(x, FORMATS[fmt], raw(6, 1, (5000,)))
    assert is_in(y, FORMATS[fmt])
    assert (np.abs(y - x) < 2.0 ** (1 - SPECS[fmt].precision) * np.abs(x) + ldexp(1.0, SPECS[fmt].quantum)).all()
    if fmt == "float64":
        assert same_bits(y, x)


# --- packing and names ------------------------------------------------------------------------------------------------


@every_format
def test_packed_and_back(fmt):
    x = round_to(normal(7, 0, (50, 3)), FORMATS[fmt])
    out = packed(x, FORMATS[fmt])
    assert out.dtype == np.dtype(DTYPES[fmt])
    assert out.shape == x.shape
    assert out.itemsize * 8 == FORMATS[fmt].bits
    assert same_bits(out.astype(np.float64), x)
    if fmt in NARROW:
        every = all_numbers(fmt)
        assert same_bits(packed(every, FORMATS[fmt]).astype(np.float64), every)
    if fmt != "float64":
        with pytest.raises(AssertionError, match=fmt):
            packed(np.array([1 + 2.0**-40]), FORMATS[fmt])


def test_wide_format_of_sums():
    assert {name: wide(fmt).name for name, fmt in FORMATS.items()} == {
        name: "float64" if name == "float64" else "float32" for name in SPECS
    }


def test_find_format():
    assert all(find_format(name) is fmt for name, fmt in FORMATS.items())
    with pytest.raises(
        InputError, match=r"^dtype: 'bfloat61' is unknown, did you mean bfloat16\?; expected one of float64"
    ):
        find_format("bfloat61")
    with pytest.raises(InputError, match=r"^kv: 'int3' is unknown; expected one of float32$"):
        find_format("int3", argument="kv", allowed=("float32",))
    for bad in (None, 16, np.float32, b"float32", ["float32"]):
        with pytest.raises(InputError, match=r"^dtype: "):
            find_format(bad)


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_random_numbers_are_fixed_and_streams_independent():
    assert raw(0, 0, (3,)).tolist() == raw(0, 0, (3,)).tolist()
    draws = {tuple(raw(seed, stream, (4,)).tolist()) for seed in range(4) for stream in range(4)}
    assert len(draws) == 16
    assert raw(3, 1, (2, 5)).reshape(-1).tolist() == raw(3, 1, (10,)).tolist()


def test_normal_numbers_have_mean_zero_and_variance_one():
    x = normal(0, 0, (100_000,))
    assert abs(x.mean()) < 0.02
    assert abs(x.var() - 1) < 0.02
    assert abs((x**3).mean()) < 0.05
    assert normal(0, 0, (0, 3)).shape == (0, 3)


def test_whole_numbers_reach_both_ends():
    x = whole_numbers(0, 0, (1000,), 7)
    assert set(x.tolist()) == set(range(7))
    assert x.dtype == np.int64
