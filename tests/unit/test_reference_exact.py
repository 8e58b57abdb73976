"""Correctly rounded products against sums of fractions that are rounded by integers."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from math import ldexp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.reference_tools import SPECS, Array, exact_dot, in_range, oracle_dot, rounded, same_bits, scaled_number
from ttt_sim.reference import FORMATS, InputError, exact
from ttt_sim.reference.exact import DigitGrid, dot, dot_digits, row_dot, row_sum
from ttt_sim.reference.formats import round_to
from ttt_sim.reference.randomness import normal, raw

BF16, F32, F64 = FORMATS["bfloat16"], FORMATS["float32"], FORMATS["float64"]
every_format = pytest.mark.parametrize("fmt", FORMATS)
some_format = st.sampled_from(sorted(FORMATS))
#: Exponents of powers of two whose sums of a few products stay in range.
SPREAD = {
    "float64": 300,
    "float32": 50,
    "bfloat16": 50,
    "float16": 6,
    "float8_e4m3fn": 3,
    "float8_e5m2": 6,
}


def check(a: Array, b: Array, fmt: str) -> None:
    """Both paths give what the oracle gives, or refuse where a result is beyond the format."""
    want, fits = oracle_dot(a, b, fmt)
    before = a.copy(), b.copy()
    for product in (dot, dot_digits):
        if fits:
            got = product(a, b, FORMATS[fmt])
            assert same_bits(got, want), f"{product.__name__}: {got.tolist()} is not {want.tolist()}"
        else:
            with pytest.raises(InputError, match=r"^scores: element \(\d+, \d+\) is .*expected at most"):
                product(a, b, FORMATS[fmt], "scores")
    assert same_bits(a, before[0])
    assert same_bits(b, before[1])


def terms(*values: float, fmt: str) -> float:
    """The values summed as a product with ones, as their own row and as a row of products; all three must agree."""
    row = np.array([values])
    results = [
        dot(row, np.ones((len(values), 1)), FORMATS[fmt])[0, 0],
        dot(np.ones((1, len(values))), np.ascontiguousarray(row.T), FORMATS[fmt])[0, 0],
        dot_digits(row, np.ones((len(values), 1)), FORMATS[fmt])[0, 0],
        row_sum(row, FORMATS[fmt])[0],
        row_sum(row[0], FORMATS[fmt])[()],
    ]
    assert len({float(r).hex() for r in results}) == 1, results
    return float(results[0])


# --- by hypothesis ----------------------------------------------------------------------------------------------------


@st.composite
def products(draw) -> tuple[Array, Array, str]:
    """Matrices of a few elements that cancel, tie and spread over the format's exponents."""
    fmt = draw(some_format)
    spread = SPREAD[fmt]
    bits = draw(st.sampled_from((1, 2, 4, SPECS[fmt].precision, 53)))
    number = st.builds(
        scaled_number, st.integers(-(2**bits), 2**bits), st.integers(-spread, spread).map(lambda e: e - bits)
    )
    m, k, n = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(1, 3))
    a = np.array(draw(st.lists(number, min_size=m * k, max_size=m * k)), dtype=np.float64).reshape(m, k)
    b = np.array(draw(st.lists(number, min_size=k * n, max_size=k * n)), dtype=np.float64).reshape(k, n)
    if k >= 2 and draw(st.booleans()):  # the last term takes the first one back, exactly or nearly
        a[:, -1] = -a[:, 0]
        b[-1] = b[0] + draw(st.sampled_from((0.0, ldexp(1.0, -spread))))
    return a, b, fmt


@settings(max_examples=250)
@given(products())
def test_products_are_rounded_once(case):
    check(*case)


@st.composite
def near_ties(draw) -> tuple[list[float], str]:
    """A number of the format, half of its spacing, something far below, and large terms that cancel; in any order."""
    fmt = draw(some_format)
    precision, quantum, largest = SPECS[fmt]
    exponent = draw(st.integers(max(quantum, -900), min(quantum + 1900, int(largest).bit_length() - precision - 1)))
    mantissa = draw(st.integers(0, 2**precision - 1))
    tiny = draw(st.sampled_from((0, 1, -1)))
    below = draw(st.integers(1, min(200, exponent + 1000)))
    half = draw(st.sampled_from((0, 1, 3)))  # nothing, half a unit, one and a half
    signed = draw(st.sampled_from((1.0, -1.0)))
    values = [
        scaled_number(mantissa, exponent),
        scaled_number(half, exponent - 1),
        scaled_number(tiny, exponent - below),
    ]
    if draw(st.booleans()):
        huge = scaled_number(3, min(exponent + draw(st.integers(0, 300)), 1000))
        values += [huge, -huge]
    return [signed * v for v in draw(st.permutations(values))], fmt


@settings(max_examples=300)
@given(near_ties())
def test_ties_go_to_even_and_a_term_far_below_breaks_them(case):
    values, fmt = case
    want = rounded(sum(map(Fraction, values), Fraction(0)), fmt)
    if in_range(want, fmt):
        assert terms(*values, fmt=fmt).hex() == float(want).hex()
    else:
        with pytest.raises(InputError):
            terms(*values, fmt=fmt)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-(2**53), 2**53), st.integers(-1074, 960)), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-1000, 10)), min_size=4, max_size=4),
    some_format,
)
@example([(2**53 - 1, 900), (1, -1074), (-(2**53) + 1, 900)], [(1, 0), (1, 0), (1, 0), (1, 0)], "float64")
def test_whole_range_of_float64_at_small_size(a, b, fmt):
    row = np.array([[scaled_number(*pair) for pair in a]])
    column = np.array([[scaled_number(*pair)] for pair in b[: len(a)]])
    check(row, column, fmt)


@settings(max_examples=100)
@given(products(), st.randoms(use_true_random=False))
def test_order_of_the_terms_is_irrelevant(case, random):
    a, b, fmt = case
    _, fits = oracle_dot(a, b, fmt)
    if not fits:
        return
    order = list(range(a.shape[1]))
    random.shuffle(order)
    for product in (dot, dot_digits):
        assert same_bits(product(a[:, order], b[order], FORMATS[fmt]), product(a, b, FORMATS[fmt]))


@settings(max_examples=150)
@given(products(), st.lists(st.integers(0, 5), max_size=4))
def test_parts_of_the_reduction_add_up_and_round_at_the_end(case, cuts):
    a, b, fmt = case
    k = a.shape[1]
    want, fits = oracle_dot(a, b, fmt)
    if not fits:
        return
    grid = DigitGrid.of(a, b)
    edges = [0, *sorted(min(cut, k) for cut in cuts), k]
    parts = [grid.partial(a[:, i:j], b[i:j]) for i, j in pairwise(edges)]
    for order in (parts, parts[::-1]):
        total = order[0]
        kept = [part.copy() for part in order]
        for part in order[1:]:
            total = DigitGrid.add(total, part)
        assert same_bits(grid.rounded(total, FORMATS[fmt]), want)
        assert all(np.array_equal(part, copy) for part, copy in zip(order, kept, strict=True))
    # Every part by itself is exact as well: rounded, it is the product of its slices.
    for part, i, j in zip(parts, edges, edges[1:], strict=False):
        want, fits = oracle_dot(a[:, i:j], b[i:j], fmt)
        if fits:
            assert same_bits(grid.rounded(part, FORMATS[fmt]), want)


def test_a_sum_of_rounded_parts_would_differ():
    """1 + 2**-8, and 2**-60 in the other part: only a sum that is rounded at the end sees that it is over the tie."""
    a, b = np.array([[1.0, 2.0**-8, 2.0**-60, 0.0]]), np.ones((4, 1))
    grid = DigitGrid.of(a, b)
    first, second = grid.partial(a[:, :2], b[:2]), grid.partial(a[:, 2:], b[2:])
    assert grid.rounded(DigitGrid.add(first, second), BF16)[0, 0] == 1 + 2.0**-7
    assert grid.rounded(first, BF16)[0, 0] + grid.rounded(second, BF16)[0, 0] == 1 + 2.0**-60


# --- by hand ----------------------------------------------------------------------------------------------------------


@every_format
def test_exact_ties_both_ways(fmt):
    half = 2.0 ** -SPECS[fmt].precision  # half the spacing of the numbers next to 1
    assert terms(1.0, half, fmt=fmt) == 1.0  # down to even
    assert terms(1.0, 3 * half, fmt=fmt) == 1 + 4 * half  # up to even
    assert terms(-1.0, -half, fmt=fmt) == -1.0
    assert terms(-1.0, -3 * half, fmt=fmt) == -1 - 4 * half


@every_format
@pytest.mark.parametrize("tiny", [2.0**-200, 2.0**-1000, 2.0**-1074])
def test_one_tiny_term_breaks_a_tie(fmt, tiny):
    half = 2.0 ** -SPECS[fmt].precision
    assert terms(1.0, half, tiny, fmt=fmt) == 1 + 2 * half
    assert terms(1.0, 3 * half, -tiny, fmt=fmt) == 1 + 2 * half
    assert terms(-1.0, -half, -tiny, fmt=fmt) == -1 - 2 * half
    assert terms(-1.0, -3 * half, tiny, fmt=fmt) == -1 - 2 * half
    assert terms(tiny, 1.0, half, -tiny, fmt=fmt) == 1.0


@every_format
def test_below_a_power_of_two_the_spacing_halves(fmt):
    half = 2.0 ** -SPECS[fmt].precision  # spacing under 1 is `half`; a tie lies at half of that
    assert terms(1.0, -half, fmt=fmt) == 1 - half
    assert terms(1.0, -half / 2, fmt=fmt) == 1.0  # tie, 1 is even
    assert terms(1.0, -half / 2, -(2.0**-300), fmt=fmt) == 1 - half
    assert terms(1.0, -half * 1.5, fmt=fmt) == 1 - 2 * half  # tie, to even


@every_format
def test_subnormal_numbers(fmt):
    precision, quantum, _ = SPECS[fmt]
    unit = ldexp(1.0, quantum)
    normal_least = ldexp(1.0, quantum + precision - 1)
    assert terms(unit, fmt=fmt) == unit
    assert terms(unit, unit, unit, -unit, fmt=fmt) == 2 * unit
    assert terms(normal_least, -unit, fmt=fmt) == normal_least - unit
    # Quarters of a unit, as products: they are not numbers of float64 themselves.
    for quarters, want in ((1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (7, 2), (9, 2), (10, 2), (11, 3)):
        a, b = np.array([[quarters / 4, 0.0]]), np.array([[unit], [1.0]])
        check(a, b, fmt)
        assert dot(a, b, FORMATS[fmt])[0, 0] == want * unit
        assert dot(-a, b, FORMATS[fmt])[0, 0] == -want * unit
    # A tie between 0 and one unit, and one tiny product over it.
    a = np.array([[0.5, 2.0**-500]])
    assert dot(a, np.array([[unit], [0.0]]), FORMATS[fmt])[0, 0] == 0.0
    assert dot(a, np.array([[unit], [2.0**-1000]]), FORMATS[fmt])[0, 0] == unit
    assert dot(a, np.array([[unit], [-(2.0**-1000)]]), FORMATS[fmt])[0, 0] == 0.0


@every_format
def test_results_far_below_the_format_are_zero_without_a_sign(fmt):
    a = np.array([[-(2.0**-600)], [2.0**-1074]])
    b = np.array([[2.0**-600, -(2.0**-1074)]])
    for product in (dot, dot_digits):
        assert same_bits(product(a, b, FORMATS[fmt]), np.zeros((2, 2)))
    assert same_bits(row_dot(a, -a, FORMATS[fmt]), np.zeros(2))


@every_format
def test_total_cancellation_leaves_plus_zero(fmt):
    rng = normal(3, 0, (1, 40))
    a = np.concatenate([rng, -rng[:, ::-1]], axis=1)
    b = np.concatenate([rng, rng[:, ::-1]], axis=1).T
    for product in (dot, dot_digits):
        assert same_bits(product(a, b, FORMATS[fmt]), np.zeros((1, 1)))
        assert same_bits(product(-a, b, FORMATS[fmt]), np.zeros((1, 1)))
        assert same_bits(product(np.full((2, 3), -0.0), np.ones((3, 2)), FORMATS[fmt]), np.zeros((2, 2)))
    assert same_bits(row_dot(a, b.T, FORMATS[fmt]), np.zeros(1))


@pytest.mark.parametrize("exponent", [300, 1000])
def test_cancellation_over_the_whole_range(exponent):
    huge, tiny = 2.0**exponent, 2.0**-exponent
    assert terms(huge, tiny, -huge, fmt="float64") == tiny
    assert terms(huge, 1.0, -huge, -1.0, fmt="float64") == 0.0
    assert terms(huge, 2.0**-53, 1.0, tiny, -huge, fmt="float64") == 1 + 2.0**-52
    assert terms(huge, 2.0**-53, 1.0, -tiny, -huge, fmt="float64") == 1.0
    # Products beyond float64 that cancel: 2**1200 - 2**1200 + 3 and the like.
    a, b = np.array([[huge, 3.0, -huge]]), np.array([[huge], [1.0], [huge]])
    assert dot(a, b, F64)[0, 0] == 3.0
    assert dot(a, b, BF16)[0, 0] == 3.0
    assert row_dot(a, b.T, F32)[0] == 3.0


@every_format
def test_largest_number_and_what_is_beyond(fmt):
    precision, _, bound = SPECS[fmt]
    largest = float(bound)
    e = int(bound).bit_length() - precision  # spacing at the top is 2**e
    half = ldexp(1.0, e - 1)
    assert terms(largest, fmt=fmt) == largest
    assert terms(-largest, fmt=fmt) == -largest
    assert terms(largest, half, -half, fmt=fmt) == largest
    assert terms(largest, half, -half / 2**20, fmt=fmt) == largest  # just under the tie
    # A tie goes to even. The largest number is odd but in E4M3, whose last place is taken by the NaN.
    if fmt == "float8_e4m3fn":
        assert terms(largest, half, fmt=fmt) == largest
        assert terms(largest, half, 2.0**-30, fmt="float16") == largest + half
    else:
        with pytest.raises(InputError, match=f"largest number of {fmt}"):
            terms(largest, half, fmt=fmt)
    for sign in (1.0, -1.0):
        a = np.array([[0.0, 0.0], [sign * largest, sign * half]])
        b = np.array([[1.0], [1 + 2.0**-40]])
        for product in (dot, dot_digits):
            with pytest.raises(InputError, match=rf"^gate_proj: element \(1, 0\) is -?\S+, expected at most .* {fmt}$"):
                product(a, b, FORMATS[fmt], "gate_proj")
        with pytest.raises(InputError, match=rf"^norms: element \(1,\) is .* {fmt}$"):
            row_dot(a, b.T, FORMATS[fmt], "norms")


def test_overflow_of_float64_on_the_way_is_not_an_overflow_of_the_result():
    top = np.finfo(np.float64).max
    assert terms(top, top, -top, -top, fmt="float64") == 0.0
    assert terms(top, top, -top, fmt="float64") == top
    assert terms(top, top, -top, -top, 0.25, fmt="bfloat16") == 0.25
    with pytest.raises(InputError, match="float64"):
        terms(top, top, fmt="float64")


@every_format
def test_one_term_and_none(fmt):
    assert terms(0.5, fmt=fmt) == 0.5
    assert dot(np.array([[0.5]]), np.array([[3.0]]), FORMATS[fmt])[0, 0] == 1.5
    for product in (dot, dot_digits):
        assert same_bits(product(np.zeros((2, 0)), np.zeros((0, 3)), FORMATS[fmt]), np.zeros((2, 3)))
        assert product(np.ones((0, 4)), np.ones((4, 3)), FORMATS[fmt]).shape == (0, 3)
        assert product(np.ones((2, 4)), np.ones((4, 0)), FORMATS[fmt]).shape == (2, 0)
        assert product(np.ones((0, 2, 4)), np.ones((0, 4, 3)), FORMATS[fmt]).shape == (0, 2, 3)
    assert same_bits(row_dot(np.zeros((3, 0)), np.zeros((3, 0)), FORMATS[fmt]), np.zeros(3))
    assert same_bits(row_sum(np.zeros((2, 3, 0)), FORMATS[fmt]), np.zeros((2, 3)))
    assert row_sum(np.zeros((0, 3)), FORMATS[fmt]).shape == (0,)


@every_format
def test_rows_without_leading_lengths(fmt):
    """A single pair of rows gives a single number, also where that is zero or undecided at first."""
    for values, want in (([1.0, 1.0], 2.0), ([1.0, -1.0], 0.0), ([0.0], 0.0)):
        got = row_sum(np.array(values), FORMATS[fmt])
        assert got.shape == ()
        assert float(got) == want


@every_format
def test_many_terms_fill_the_digits(fmt):
    """Longest sums of digits: all digits full, k just over a power of two."""
    for k in (63, 64, 65, 1025):
        full = (2.0**53 - 1) * 2.0**-60 * 2.0 ** -SPREAD[fmt]
        a, b = np.full((1, k), full), np.full((k, 1), full)
        want, fits = oracle_dot(a, b, fmt)
        assert fits
        for product in (dot, dot_digits):
            assert same_bits(product(a, b, FORMATS[fmt]), want)


def test_very_long_rows():
    """70,000 terms: 1, then 2**-53 each, a sum that float64 cannot make term by term."""
    k = 70_000
    row = np.full(k, 2.0**-53)
    row[0] = 1.0
    want = float(rounded(1 + Fraction(k - 1, 2**53), "float64"))
    assert float(row_sum(row, F64)) == want
    assert want != 1.0
    row[1::2] *= -1
    assert float(row_sum(row, F64)) == float(rounded(1 + Fraction(-1, 2**53), "float64"))


@every_format
def test_batches_are_independent(fmt):
    a, b = normal(0, 0, (2, 3, 4, 7)) / 4, normal(0, 1, (2, 3, 7, 5)) / 4
    b[0, 1] *= 2.0**-8  # each pair has a scale of its own
    got = dot(a, b, FORMATS[fmt])
    assert got.shape == (2, 3, 4, 5)
    for i in range(2):
        for j in range(3):
            want, _ = oracle_dot(a[i, j], b[i, j], fmt)
            assert same_bits(got[i, j], want)
            assert same_bits(dot_digits(a, b, FORMATS[fmt])[i, j], want)
    rows, others = a[:, :, 0], np.swapaxes(b, -1, -2)[:, :, 0]
    assert same_bits(row_dot(rows, others, FORMATS[fmt]), got[:, :, 0, 0])


def test_rows_broadcast():
    x, taps = normal(0, 2, (2, 3, 4, 5)), normal(0, 3, (4, 5))
    got = row_dot(x, taps, BF16)
    for index in np.ndindex(2, 3, 4):
        want = rounded(exact_dot(x[index].tolist(), taps[index[-1]].tolist()), "bfloat16")
        assert got[index] == float(want)


@every_format
def test_layout_in_memory_is_irrelevant_and_inputs_stay(fmt):
    a, b = normal(0, 4, (6, 9)) / 8, normal(0, 5, (9, 4)) / 8
    want, _ = oracle_dot(a, b, fmt)
    wide = np.zeros((12, 18))
    wide[::2, ::2] = a
    column_major, reverse = np.asfortranarray(b), np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1]
    for left in (a, wide[::2, ::2], np.asfortranarray(a), reverse):
        for right in (b, column_major, np.ascontiguousarray(b.T).T):
            for array in (left, right):
                array.flags.writeable = False
            for product in (dot, dot_digits):
                assert same_bits(product(left, right, FORMATS[fmt]), want)
            assert same_bits(row_dot(left, right.T[:1], FORMATS[fmt]), want[:, 0])
            assert same_bits(left, a)
            assert same_bits(right, b)


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(fmt, bad, side):
    for size in (1, 20):
        arrays = [np.ones((size, 3)), np.ones((3, size))]
        arrays[side][size // 2 if side == 0 else 1, 1 if side == 0 else size // 2] = bad
        for product in (dot, dot_digits):
            with pytest.raises(InputError, match="finite"):
                product(arrays[0], arrays[1], FORMATS[fmt])
        with pytest.raises(InputError, match="finite"):
            row_dot(arrays[0], arrays[1].T, FORMATS[fmt])
        # An infinity is not forgiven where the other factor is zero.
        arrays[1 - side][...] = 0.0
        with pytest.raises(InputError, match="finite"):
            dot(arrays[0], arrays[1], FORMATS[fmt])
    with pytest.raises(InputError, match="finite"):
        row_sum(np.array([[1.0, bad]]), FORMATS[fmt])


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 3), (2, 3)), ((2, 3), (4, 2)), ((3,), (3, 1)), ((2, 2, 3), (3, 2)), ((2, 2, 3), (1, 3, 2)), ((), ())],
)
def test_shapes_that_do_not_match(a, b):
    for product in (dot, dot_digits):
        with pytest.raises(InputError, match=r"^a, b: shapes are .* expected \(\.\.\., m, k\) and \(\.\.\., k, n\)$"):
            product(np.zeros(a), np.zeros(b), BF16)


# --- the two steps ----------------------------------------------------------------------------------------------------


def test_where_a_plain_product_rounds_wrongly():
    """1 + 2**-8 + 2**-60: in float64 the last term is lost, which leaves a tie, which goes the wrong way."""
    a, b = np.array([[1.0, 2.0**-8, 2.0**-60]]), np.ones((3, 1))
    assert round_to(a @ b, BF16)[0, 0] == 1.0
    assert dot(a, b, BF16)[0, 0] == 1 + 2.0**-7
    # The same among many elements that are certain at once, so that only this one is computed again.
    many = np.ones((40, 3))
    many[17] = a
    want = np.full((40, 1), 3.0)
    want[17] = 1 + 2.0**-7
    assert same_bits(dot(many, b, BF16), want)


def count_calls(monkeypatch, name: str) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    original = getattr(exact, name)

    def counted(*args: Any) -> Any:
        calls.append(tuple(np.shape(arg) for arg in args[:2]))
        return original(*args)

    monkeypatch.setattr(exact, name, counted)
    return calls


def test_few_undecided_elements_are_computed_again_by_themselves(monkeypatch):
    calls = count_calls(monkeypatch, "_by_digits")
    a, b = normal(1, 0, (40, 3)), np.ones((3, 30))
    a[17] = 1.0, 2.0**-8, 0.0
    b[:, 1:] = normal(1, 1, (3, 29))
    dot(a, b, BF16)
    assert calls == [((1, 1, 3), (1, 3, 1))]


def test_many_undecided_elements_take_the_whole_product(monkeypatch):
    calls = count_calls(monkeypatch, "_by_digits")
    dot(np.full((4, 2), 1.0), np.array([[1.0], [2.0**-8]]), BF16)
    assert calls == [((4, 2), (2, 1))]


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float16", "float8_e5m2"])
@pytest.mark.parametrize("noise", range(3))
def test_any_error_of_a_float64_product_within_its_bound_changes_nothing(monkeypatch, fmt, noise):
    """BLAS may add in any order: perturb every element by up to k u sum|a b| and nothing may move."""
    bits = raw(11, noise, (24, 20)).astype(np.float64) / 2.0**64
    a, b = round_to(normal(2, 0, (24, 48)) / 4, BF16), round_to(normal(2, 1, (48, 20)) / 4, BF16)
    a[:6, 2:], b[2:, :6] = 0.0, 0.0  # ties and exact results among them
    half = 2.0 ** -SPECS[fmt].precision
    a[:3, :2], a[3:6, :2], b[:2, :6] = [1.0, half], [1.0, 3 * half], 1.0
    want, fits = oracle_dot(a, b, fmt)
    assert fits
    plain, inside = np.matmul, [0]
    digits = exact._by_digits

    def without_noise(*args: Any) -> Any:
        inside[0] += 1
        try:
            return digits(*args)
        finally:
            inside[0] -= 1

    def noisy(x: Array, y: Array) -> Array:
        if inside[0]:
            return plain(x, y)
        bound = x.shape[-1] * 2.0**-53 * plain(np.abs(x), np.abs(y))
        signs = (1.0, -1.0, 2 * bits - 1)[noise]
        return plain(x, y) + signs * bound * (1 - 2.0**-10)

    monkeypatch.setattr(exact, "_by_digits", without_noise)
    monkeypatch.setattr(np, "matmul", noisy)
    got = dot(a, b, FORMATS[fmt])
    monkeypatch.undo()
    assert same_bits(got, want)
    # The noise is large enough to matter where nothing guards against it.
    moved = round_to(plain(a, b) + (1.0 if noise == 0 else -1.0) * 48 * 2.0**-53 * plain(abs(a), abs(b)), FORMATS[fmt])
    assert not same_bits(moved, want)


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_certified_and_digit_paths_agree_on_larger_products(fmt, k):
    a, b = round_to(normal(k, 0, (30, k)) / 8, BF16), round_to(normal(k, 1, (k, 25)) / 8, BF16)
    got = dot(a, b, FORMATS[fmt])
    assert same_bits(got, dot_digits(a, b, FORMATS[fmt]))
    want, _ = oracle_dot(a[:4], b[:, :5], fmt)
    assert same_bits(got[:4, :5], want)
    assert same_bits(row_dot(a[:, None], b.T[None], FORMATS[fmt]), got)


def test_result_in_float64_of_larger_products():
    a, b = normal(5, 0, (5, 200)), normal(5, 1, (200, 4))
    a[2] *= 2.0 ** (np.arange(200.0) - 100)
    check(a, b, "float64")


# --- the same bits everywhere -----------------------------------------------------------------------------------------

#: Prints a digest of products in every format.
DIGEST = """
import hashlib, numpy as np
from ttt_sim.reference.exact import dot, row_dot
from ttt_sim.reference.formats import FORMATS, packed
from ttt_sim.reference.randomness import normal
a, b = normal(0, 0, (70, 600)) / 8, normal(0, 1, (600, 90)) / 8
digest = hashlib.sha256()
for fmt in FORMATS.values():
    digest.update(packed(dot(a, b, fmt), fmt).tobytes())
    digest.update(packed(row_dot(a, a[::-1], fmt), fmt).tobytes())
print(digest.hexdigest())
"""


def digests(**environment: str) -> str:
    root = Path(exact.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", DIGEST], cwd=root, env={**os.environ, **environment}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout


def test_threads_and_kernels_of_the_blas_are_irrelevant():
    """OpenBLAS takes its kernels and threads from the environment; other libraries ignore these variables."""
    runs = [
        digests(OPENBLAS_NUM_THREADS="1"),
        digests(OPENBLAS_NUM_THREADS="2", OPENBLAS_CORETYPE="Prescott"),
        digests(OPENBLAS_CORETYPE="Haswell"),
    ]
    assert len(set(runs)) == 1
