"""The forms of In-Place TTT: against a plain implementation in fractions, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.reference_tools import (
    BF16,
    F64,
    Array,
    Case,
    changed,
    in_pieces,
    integer_case,
    mlp_case,
    options,
    rounded,
    same_bits,
)
from ttt_sim.reference import (
    FORMATS,
    InputError,
    MlpWeights,
    StreamingMlp,
    TTTOptions,
    by_document,
    context_parallel,
    parallel,
)
from ttt_sim.reference.exact import dot
from ttt_sim.reference.formats import is_in, round_to
from ttt_sim.reference.in_place_ttt import ChunkRule, FastWeight
from ttt_sim.reference.meter import Meter

F32, F16, F8 = FORMATS["float32"], FORMATS["float16"], FORMATS["float8_e4m3fn"]
#: Carries that keep rows, so that a chunk is one product whatever the calls were.
ROW_CARRIES = ("official", "ring", "keep_z")
CARRIES = (*ROW_CARRIES, "online")
WRITES = ("official", "fused", "master")


def stream(case: Case, o: TTTOptions, pieces: list[int] | None = None) -> tuple[Array, list[Array], StreamingMlp]:
    """Outputs and every version of the weight."""
    mlp = StreamingMlp(case.weights, o, case.x.shape[0])
    y = in_pieces(mlp, case.x, case.t, pieces or [case.x.shape[1]])
    return y, [version.applied for version in mlp.versions], mlp


def assert_same(a: tuple[Array, list[Array]], b: tuple[Array, list[Array]]) -> None:
    assert same_bits(a[0], b[0])
    assert len(a[1]) == len(b[1])
    assert all(same_bits(v, w) for v, w in zip(a[1], b[1], strict=True))


def assert_close(a: tuple[Array, list[Array]], b: tuple[Array, list[Array]], tolerance: float) -> None:
    assert len(a[1]) == len(b[1])
    for v, w in zip((a[0], *a[1]), (b[0], *b[1]), strict=True):
        assert v.shape == w.shape
        assert np.abs(v - w).max() <= tolerance * np.abs(w).max()


# --- a plain implementation -------------------------------------------------------------------------------------------

Rows = list[list[Fraction]]


def fractions(x: Array) -> Rows:
    return [[Fraction(v) for v in row] for row in x.tolist()]


def silu(x: Fraction) -> Fraction:
    with localcontext() as context:
        context.prec = 60
        value = Decimal(x.numerator) / Decimal(x.denominator)
        return Fraction(value / (1 + (-value).exp()))


def plain(case: Case, o: TTTOptions) -> tuple[Array, list[Array]]:
    """One sequence, chunk by chunk, element by element: every sum a fraction, every R() by integers."""
    weights, (x, t) = case.weights, (fractions(case.x[0]), fractions(case.t[0]))
    gate, up, conv = fractions(weights.gate), fractions(weights.up), fractions(weights.conv)
    p = None if weights.projection is None else fractions(weights.projection)
    f, d, n = len(gate), len(gate[0]), len(x)
    q, fast = o.dtype.name, o.fast_dtype.name
    wide = "float64" if q == "float64" else "float32"
    kept = "float32" if o.write == "master" else fast  # format of the weight that is added to, and of its deltas
    eta = Fraction(o.rate)

    def r(value: Fraction, fmt: str = q) -> Fraction:
        return rounded(value, fmt)

    w = [[r(v, kept) for v in row] for row in fractions(weights.down)]
    y: Rows = []
    versions = [np.array([[[float(r(v, fast)) for v in row] for row in w]])]
    for begin in range(0, n, o.chunk):
        rows = range(begin, min(begin + o.chunk, n))
        z: Rows = []
        for i in rows:
            g = [r(sum((x[i][j] * gate[k][j] for j in range(d)), Fraction(0))) for k in range(f)]
            u = [r(sum((x[i][j] * up[k][j] for j in range(d)), Fraction(0))) for k in range(f)]
            z.append([r(r(silu(g[k])) * u[k]) for k in range(f)])
        applied = [[r(v, fast) for v in row] for row in w]
        y += [[r(sum((zi[k] * applied[j][k] for k in range(f)), Fraction(0))) for j in range(d)] for zi in z]
        if len(rows) < o.chunk:
            break
        a: Rows = []
        for c in range(o.chunk):
            a.append([])
            for j in range(d):
                total = Fraction(0)
                for tap in range(5):
                    source = c + tap - (2 if o.convolution == "symmetric" else 4)
                    if 0 <= source < o.chunk:
                        total += conv[j][tap] * t[begin + source][j]
                a[-1].append(r(total))
        outer = o.contraction == "outer_first" or (o.contraction == "auto" and o.chunk >= f)
        last = kept if o.write == "official" else wide  # a fused write adds the wide product
        if p is None:
            left, fmt = a, last
        elif not outer:
            left = [[r(sum((row[k] * p[k][j] for k in range(d)), Fraction(0))) for j in range(d)] for row in a]
            fmt = last
        else:
            left, fmt = a, kept
        delta = [
            [r(sum((left[c][i] * z[c][k] for c in range(o.chunk)), Fraction(0)), fmt) for k in range(f)]
            for i in range(d)
        ]
        if p is not None and outer:
            delta = [
                [r(sum((p[m][i] * delta[m][k] for m in range(d)), Fraction(0)), last) for k in range(f)]
                for i in range(d)
            ]
        for i, k in product(range(d), range(f)):
            change = eta * delta[i][k]
            w[i][k] = r(w[i][k] + (r(change, kept) if o.write == "official" else change), kept)
        versions.append(np.array([[[float(r(v, fast)) for v in row] for row in w]]))
    return np.array([[[float(v) for v in row] for row in y]]), versions


@pytest.mark.parametrize("carry", ROW_CARRIES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("fmt", "fast", "convolution", "contraction", "projection"),
    [
        ("bfloat16", "bfloat16", "symmetric", "auto", True),
        ("bfloat16", "bfloat16", "causal", "outer_first", True),
        ("bfloat16", "float32", "symmetric", "project_first", False),
        ("float32", "float32", "symmetric", "outer_first", True),
        ("float16", "float8_e4m3fn", "causal", "auto", True),
    ],
)
def test_streaming_is_what_the_equations_say_to_the_bit(carry, write, fmt, fast, convolution, contraction, projection):
    case = mlp_case(FORMATS[fmt], d=3, f=4, n=11, projection=projection, seed=1)
    o = options(
        FORMATS[fmt], chunk=3, fast_dtype=FORMATS[fast], convolution=convolution, contraction=contraction, write=write,
        carry=carry,
    )  # fmt: skip
    y, versions, _ = stream(case, o, [2, 5, 1, 3])
    want = plain(case, o)
    assert len(versions) == 4
    assert any(not same_bits(v, versions[0]) for v in versions[1:])
    assert_same((y, versions), want)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
def test_small_chunks_against_the_equations(chunk):
    """Chunks shorter than the convolution, and as long as d_ff, where the order of the products turns around."""
    case = mlp_case(BF16, d=3, f=4, n=9, seed=2)
    assert_same(stream(case, options(chunk=chunk))[:2], plain(case, options(chunk=chunk)))


def test_streaming_in_float64_against_the_equations():
    case = mlp_case(F64, d=3, f=4, n=11, seed=3)
    assert_close(stream(case, options(F64, chunk=3), [4, 7])[:2], plain(case, options(F64, chunk=3)), 4e-15)


def test_bits_of_the_formats_are_numbers_of_the_formats():
    for fmt, fast, write in product((BF16, F32, F16), (BF16, F32, F8), WRITES):
        y, versions, mlp = stream(mlp_case(fmt), options(fmt, fast_dtype=fast, write=write))
        assert is_in(y, fmt)
        assert all(is_in(v, fast) for v in versions)
        for version in mlp.versions:
            assert (version.master is not None) == (write == "master")
            if version.master is not None:
                assert is_in(version.master, F32)
                assert same_bits(round_to(version.master, fast), version.applied)


# --- calls ------------------------------------------------------------------------------------------------------------


@cache
def one_call(convolution: str, contraction: str, write: str, projection: bool) -> tuple[Array, list[Array]]:
    o = options(convolution=convolution, contraction=contraction, write=write)
    return stream(mlp_case(projection=projection), o)[:2]


def splits(n: int) -> st.SearchStrategy[list[int]]:
    def pieces(cuts: set[int]) -> list[int]:
        return np.diff([0, *sorted(cuts), n]).tolist()

    return st.sets(st.integers(1, n - 1), max_size=n - 1).map(pieces)


@settings(max_examples=70)
@given(
    splits(23),
    st.sampled_from(ROW_CARRIES),
    st.sampled_from(("symmetric", "causal")),
    st.sampled_from(("project_first", "outer_first")),
    st.sampled_from(WRITES),
    st.booleans(),
    st.booleans(),
)
def test_any_split_and_any_row_carry_give_the_same_bits(
    pieces, carry, convolution, contraction, write, projection, own
):
    o = options(convolution=convolution, contraction=contraction, write=write, carry=carry, own_targets=own)
    y, versions, _ = stream(mlp_case(projection=projection), o, pieces)
    assert_same((y, versions), one_call(convolution, contraction, write, projection))


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("fmt", ["float64", "float32", "float16"])
def test_prefill_in_the_middle_of_a_chunk_and_decode_over_two_boundaries(carry, fmt):
    case, o = mlp_case(FORMATS[fmt], seed=4), options(FORMATS[fmt], carry=carry)
    want = stream(case, o)
    got = stream(case, o, [7, 1, 1, 1, 1, 1, 6, 1, 1, 1, 2])
    tolerance = {"float64": 1e-13, "float32": 1e-5, "float16": 1e-2}[fmt]
    assert_close(got[:2], want[:2], tolerance)
    if carry != "online":
        assert_same(got[:2], want[:2])


@settings(max_examples=40)
@given(
    splits(23),
    st.sampled_from(("symmetric", "causal")),
    st.sampled_from(("project_first", "outer_first")),
    st.booleans(),
)
def test_online_carry_differs_in_rounding_only(pieces, convolution, contraction, projection):
    case = mlp_case(F64, projection=projection)
    o = options(F64, convolution=convolution, contraction=contraction)
    got = stream(case, replace(o, carry="online"), pieces)[:2]
    assert_close(got, stream(case, o)[:2], 1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
@pytest.mark.parametrize("convolution", ["symmetric", "causal"])
def test_online_carry_with_chunks_shorter_than_the_convolution(chunk, convolution):
    case = mlp_case(F64, n=13)
    o = options(F64, chunk=chunk, convolution=convolution)
    for pieces in ([1] * 13, [2, 3, 8], [5, 1, 1, 6]):
        assert_close(stream(case, replace(o, carry="online"), pieces)[:2], stream(case, o)[:2], 1e-12)


def test_online_carry_in_bf16_rounds_the_running_product():
    case, o = mlp_case(), options()
    online = stream(case, replace(o, carry="online"), [1] * 23)
    assert_close(online[:2], stream(case, o)[:2], 0.05)
    # Whole chunks in one call are one product, as with every other carry.
    assert_same(stream(case, replace(o, carry="online"))[:2], stream(case, o)[:2])


@pytest.mark.parametrize("carry", CARRIES)
def test_a_version_appears_with_the_last_row_of_a_chunk(carry):
    case, o = mlp_case(), options(carry=carry)
    mlp = StreamingMlp(case.weights, o)
    seen: list[FastWeight] = []
    for i in range(23):
        mlp(case.x[:, i : i + 1], case.t[:, i : i + 1])
        assert len(mlp.versions) == 1 + (i + 1) // 5
        assert all(a is b for a, b in zip(seen, mlp.versions, strict=False))
        assert same_bits(mlp.weight, mlp.versions[-1].applied)
        seen = list(mlp.versions)
    assert not same_bits(seen[0].applied, seen[1].applied)


@pytest.mark.parametrize("carry", CARRIES)
def test_outputs_do_not_see_the_chunk_they_are_in_nor_what_comes_later(carry):
    """Row i depends on rows of earlier chunks and on itself."""
    case, o = mlp_case(n=15), options(carry=carry)
    y, versions, _ = stream(case, o)
    for row in (3, 7, 12):
        x, t = case.x.copy(), case.t.copy()
        x[:, row] += 1
        t[:, row] -= 1
        other, other_versions, _ = stream(Case(case.weights, x, t), o)
        same = np.array([same_bits(y[:, i], other[:, i]) for i in range(15)])
        assert not same[row]
        assert same[:row].all()
        assert same[row + 1 : (row // 5 + 1) * 5].all()
        assert not same[(row // 5 + 1) * 5 :].any()
        assert [same_bits(v, w) for v, w in zip(versions, other_versions, strict=True)] == [
            i <= row // 5 for i in range(4)
        ]


@pytest.mark.parametrize("carry", CARRIES)
def test_inputs_stay_and_their_memory_may_be_used_again(carry):
    case, o = mlp_case(batch=2), options(carry=carry)
    want = stream(case, o, [7, 3, 7, 6])
    mlp = StreamingMlp(case.weights, o, 2)
    kept = [array.copy() for array in (case.weights.gate, case.weights.up, case.weights.down, case.weights.conv)]
    outputs = []
    for begin, end in ((0, 7), (7, 10), (10, 17), (17, 23)):
        x, t = case.x[:, begin:end].copy(), case.t[:, begin:end].copy()
        x.flags.writeable = t.flags.writeable = False
        y = mlp(x, t)
        outputs.append(y.copy())
        assert same_bits(x, case.x[:, begin:end])
        assert same_bits(t, case.t[:, begin:end])
        for array in (x, t):
            array.flags.writeable = True
            array[:] = np.nan
        y[:] = np.nan
    assert same_bits(np.concatenate(outputs, axis=1), want[0])
    assert same_bits(mlp.weight, want[1][-1])
    for array, copy in zip(
        (case.weights.gate, case.weights.up, case.weights.down, case.weights.conv), kept, strict=True
    ):
        assert same_bits(array, copy)


@pytest.mark.parametrize("carry", CARRIES)
def test_reset_equals_a_fresh_start(carry):
    case, o = mlp_case(), options(carry=carry)
    want = stream(case, o, [8, 15])
    for before in (3, 5, 8, 23):
        mlp = StreamingMlp(case.weights, o)
        mlp(case.t[:, :before], case.x[:, :before])
        mlp.reset()
        assert same_bits(mlp.weight, want[1][0])
        y = in_pieces(mlp, case.x, case.t, [8, 15])
        assert_same((y, [v.applied for v in mlp.versions]), want[:2])


# --- base model -------------------------------------------------------------------------------------------------------


def base_model(case: Case, o: TTTOptions) -> Array:
    rule = ChunkRule(weights=case.weights, options=o)
    w_t = np.repeat(case.weights.down.T[None], case.x.shape[0], axis=0)
    return dot(rule.hidden(case.x), w_t, o.dtype)


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("pieces", [[23], [1] * 23, [10, 13]])
def test_a_stream_shorter_than_a_chunk_is_the_base_model(carry, write, pieces):
    case, o = mlp_case(), options(chunk=24, carry=carry, write=write)
    y, versions, _ = stream(case, o, pieces)
    assert len(versions) == 1
    assert same_bits(versions[0][0], case.weights.down)
    assert same_bits(y, base_model(case, o))


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("write", WRITES)
def test_without_convolution_taps_or_rate_it_is_the_base_model(carry, write):
    case, o = mlp_case(), options(carry=carry, write=write)
    still = case._replace(weights=replace(case.weights, conv=np.zeros((6, 5))))
    for c, chosen in ((still, o), (case, replace(o, rate=0.0))):
        y, versions, _ = stream(c, chosen, [3, 9, 11])
        assert len(versions) == 5
        assert all(same_bits(v[0], case.weights.down) for v in versions)
        assert same_bits(y, base_model(case, o))
        if carry == "official":
            y, versions = parallel(c.weights, chosen, c.x, c.t)
            assert all(same_bits(v[0], case.weights.down) for v in versions)
            assert same_bits(y, base_model(case, o))


def test_weight_before_the_first_call_is_the_first_version():
    case = mlp_case()
    for fast, write in product((BF16, F8, F32), WRITES):
        mlp = StreamingMlp(case.weights, options(fast_dtype=fast, write=write), 2)
        before = mlp.weight
        mlp(np.repeat(case.x, 2, axis=0)[:, :2], np.repeat(case.t, 2, axis=0)[:, :2])
        assert same_bits(before, mlp.versions[0].applied)


# --- deltas -----------------------------------------------------------------------------------------------------------


def deltas(case: Case, o: TTTOptions) -> list[Array]:
    rule = ChunkRule(weights=case.weights, options=o)
    parts = [slice(i, i + o.chunk) for i in range(0, case.x.shape[1] - o.chunk + 1, o.chunk)]
    return [rule.delta(case.t[:, part], rule.hidden(case.x[:, part])) for part in parts]


@pytest.mark.parametrize("write", ["official", "fused"])
@pytest.mark.parametrize("contraction", ["project_first", "outer_first"])
def test_the_weight_moves_by_the_sum_of_the_deltas_in_any_order(write, contraction):
    case, o = mlp_case(F64), options(F64, write=write, contraction=contraction)
    _, versions, _ = stream(case, o)
    d = deltas(case, o)
    assert len(d) == 4
    for k in range(5):
        moved = versions[k] - versions[0]
        for order in (range(k), reversed(range(k))):
            want = sum((o.rate * d[i] for i in order), np.zeros_like(moved))
            assert np.abs(moved - want).max() <= 1e-14 * max(np.abs(versions[k]).max(), 1)


def test_order_of_the_chunks_is_irrelevant_to_the_last_weight():
    case, o = mlp_case(F64, n=20), options(F64)
    want = stream(case, o)[1][-1]
    order = np.array([2, 0, 3, 1])[:, None] * 5 + np.arange(5)
    mixed = Case(case.weights, case.x[:, order.ravel()], case.t[:, order.ravel()])
    assert np.abs(stream(mixed, o)[1][-1] - want).max() <= 1e-14 * np.abs(want).max()


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("contraction", ["project_first", "outer_first"])
@pytest.mark.parametrize("convolution", ["symmetric", "causal"])
def test_delta_is_minus_the_gradient_of_the_loss(projection, contraction, convolution):
    """L(W) = -<Z W^T, V>; it is linear in W, so a central difference has no error but rounding."""
    case = mlp_case(F64, d=3, f=4, n=5, projection=projection, seed=9)
    o = options(F64, contraction=contraction, convolution=convolution)
    rule = ChunkRule(weights=case.weights, options=o)
    z, a = rule.hidden(case.x)[0], rule.convolved(case.t)[0]
    v = a if case.weights.projection is None else a @ case.weights.projection

    def loss(w: Array) -> float:
        return -float(np.sum((z @ w.T) * v))

    gradient = np.zeros((3, 4))
    for i, k in np.ndindex(3, 4):
        step = np.zeros((3, 4))
        step[i, k] = 1.0
        gradient[i, k] = (loss(case.weights.down + step) - loss(case.weights.down - step)) / 2
    assert np.abs(deltas(case, o)[0][0] + gradient).max() < 1e-13


@pytest.mark.parametrize("fmt", ["float64", "bfloat16"])
@pytest.mark.parametrize(("convolution", "centre"), [("symmetric", 2), ("causal", 4)])
@pytest.mark.parametrize("contraction", ["project_first", "outer_first"])
def test_order_of_the_rows_in_a_chunk_matters_through_the_convolution_only(fmt, convolution, centre, contraction):
    case = mlp_case(FORMATS[fmt], n=10, seed=5)
    o = options(FORMATS[fmt], convolution=convolution, contraction=contraction)
    order = [3, 0, 4, 2, 1, 6, 9, 5, 8, 7]
    mixed = Case(case.weights, case.x[:, order], case.t[:, order])
    assert not same_bits(stream(mixed, o)[1][-1], stream(case, o)[1][-1])
    only_centre = np.zeros((6, 5))
    only_centre[:, centre] = case.weights.conv[:, centre]
    weights = replace(case.weights, conv=only_centre)
    y, versions, _ = stream(case._replace(weights=weights), o)
    other_y, other_versions, _ = stream(mixed._replace(weights=weights), o)
    assert_same((other_y, other_versions), (y[:, order], versions))


def hand_convolution(t: Array, taps: Array, left: int) -> Array:
    """Rows outside the chunk are zero."""
    out = np.zeros_like(t)
    for c, j in np.ndindex(*t.shape):
        for tap in range(5):
            row = c + tap - left
            if 0 <= row < t.shape[0]:
                out[c, j] += taps[j, tap] * t[row, j]
    return out


@pytest.mark.parametrize(("convolution", "left"), [("symmetric", 2), ("causal", 4)])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_convolution_stops_at_the_edges_of_the_chunk(convolution, left, size):
    taps = np.arange(1.0, 16.0).reshape(3, 5)
    t = np.arange(1.0, 1.0 + size * 3).reshape(size, 3)
    zero = np.zeros((2, 3))
    weights = MlpWeights(gate=zero, up=zero, down=zero.T, conv=taps, projection=None)
    rule = ChunkRule(weights=weights, options=options(F64, chunk=size, convolution=convolution))
    want = hand_convolution(t, taps, left)
    assert same_bits(rule.convolved(t[None])[0], want)
    for begin in range(size):  # some rows of it alone
        assert same_bits(rule.convolved(t[None], rows=slice(begin, size))[0], want[begin:])


def test_convolution_looks_ahead_only_where_it_is_symmetric():
    case = mlp_case(n=5, projection=False)
    for convolution, reach in (("symmetric", {0, 1, 2, 3, 4}), ("causal", {2, 3, 4})):
        rule = ChunkRule(weights=case.weights, options=options(convolution=convolution))
        before = rule.convolved(case.t)[0]
        t = case.t.copy()
        t[:, 2] += 1
        changed = {i for i in range(5) if not same_bits(rule.convolved(t)[0, i], before[i])}
        assert changed == reach


# --- parallel forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 20, 23])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("contraction", ["project_first", "outer_first"])
def test_parallel_form_in_float64(n, projection, contraction):
    case, o = mlp_case(F64, n=n, batch=2, projection=projection), options(F64, contraction=contraction)
    assert_close(parallel(case.weights, o, case.x, case.t), stream(case, o)[:2], 1e-13)
    clipped = replace(o, clip=0.2)
    assert_close(parallel(case.weights, clipped, case.x, case.t), stream(case, clipped)[:2], 1e-13)


@pytest.mark.parametrize("write", ["official", "master"])
def test_parallel_form_differs_where_only_streaming_rounds_the_sum(write):
    """In bf16 the released inference code rounds W after every chunk, the training code keeps the sum wide. W_0 and W_1
    are the same, so the first two chunks' outputs are."""
    case, o = mlp_case(d=16, f=32, n=40), options(write=write)
    y, versions = parallel(case.weights, o, case.x, case.t)
    streamed_y, streamed, _ = stream(case, o)
    if write == "master":  # both keep the sum in float32; the scaled delta is rounded to float32 in one of them
        assert_close((y, versions), (streamed_y, streamed), 0.02)
        return
    assert same_bits(versions[0], streamed[0])
    assert same_bits(versions[1], streamed[1])
    assert same_bits(y[:, :10], streamed_y[:, :10])
    for a, b in zip(versions[2:], streamed[2:], strict=True):
        assert 0 < np.mean(a != b) < 0.6
    assert 0 < np.mean(y[:, 10:] != streamed_y[:, 10:]) < 0.6
    assert_close((y, versions), (streamed_y, streamed), 0.03)


@pytest.mark.parametrize("fmt", ["float32", "float64"])
def test_where_the_weight_is_as_wide_as_the_sum_parallel_and_streaming_have_the_same_bits(fmt):
    case, o = mlp_case(FORMATS[fmt], batch=2), options(FORMATS[fmt])
    assert_same(parallel(case.weights, o, case.x, case.t), stream(case, o)[:2])


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("n", [23, 25])
def test_context_parallel_form_in_float64(devices, n):
    case, o = mlp_case(F64, n=n, batch=2), options(F64)
    got = context_parallel(case.weights, o, case.x, case.t, devices=devices)
    assert_close(got, parallel(case.weights, o, case.x, case.t), 1e-13)
    assert_close(got, stream(case, o)[:2], 1e-13)
    assert len(got[1]) == 1 + n // 5


@pytest.mark.parametrize("fmt", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("devices", range(1, 7))
@pytest.mark.parametrize("n", [12, 11])
def test_context_parallel_form_of_sums_that_are_exact(fmt, devices, n):
    """Whole-numbered deltas add up exactly in any order, so the scan gives the same bits."""
    case, o = integer_case(n=n, batch=2), options(FORMATS[fmt], chunk=2)
    want = parallel(case.weights, o, case.x, case.t)
    assert not same_bits(want[1][0], want[1][-1])
    assert_same(context_parallel(case.weights, o, case.x, case.t, devices=devices), want)


def test_context_parallel_form_needs_a_chunk_for_every_device():
    case = mlp_case()
    bad: tuple[Any, ...] = (6, 0, -1, True, 2.0)
    for devices in bad:
        with pytest.raises(InputError, match=r"^devices: is .*expected"):
            context_parallel(case.weights, options(), case.x, case.t, devices=devices)


@pytest.mark.parametrize("lengths", [[23], [5, 18], [3, 5, 10, 5], [1] * 23])
def test_documents_start_from_the_trained_weight(lengths):
    case, o = mlp_case(), options()

    def run(x: Array, t: Array) -> tuple[Array, list[Array]]:
        return parallel(case.weights, o, x, t)

    outcomes = by_document(run, case.x, case.t, lengths)
    assert len(outcomes) == len(lengths)
    mlp, start = StreamingMlp(case.weights, replace(o, fast_dtype=F32)), 0
    for outcome, n in zip(outcomes, lengths, strict=True):
        part = slice(start, start + n)
        assert_same(outcome, run(case.x[:, part], case.t[:, part]))
        assert same_bits(outcome[1][0][0], case.weights.down)
        mlp.reset()
        assert mlp(case.x[:, part], case.t[:, part]).shape == outcome[0].shape
        start += n


@pytest.mark.parametrize("lengths", [[22], [24], [], [0, 23], [24, -1]])
def test_documents_that_do_not_add_up(lengths):
    case = mlp_case()
    with pytest.raises(InputError, match=r"^lengths: .*expected 23 positive"):
        by_document(lambda x, t: (x, [t]), case.x, case.t, lengths)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("changes", [{}, {"clip": 0.1}, {"write": "master"}, {"contraction": "outer_first"}])
def test_two_sequences_together_equal_each_alone(carry, changes):
    case, o = mlp_case(batch=2), options(carry=carry, **changes)
    y, versions, _ = stream(case, o, [4, 9, 10])
    for b in range(2):
        alone = Case(case.weights, case.x[b : b + 1], case.t[b : b + 1])
        assert_same((y[b : b + 1], [v[b : b + 1] for v in versions]), stream(alone, o, [4, 9, 10])[:2])
        if carry == "official":
            both = parallel(case.weights, o, case.x, case.t)
            assert_same(
                (both[0][b : b + 1], [v[b : b + 1] for v in both[1]]), parallel(alone.weights, o, alone.x, alone.t)
            )
            both = context_parallel(case.weights, o, case.x, case.t, devices=2)
            one = context_parallel(alone.weights, o, alone.x, alone.t, devices=2)
            assert_same((both[0][b : b + 1], [v[b : b + 1] for v in both[1]]), one)
    assert not same_bits(versions[-1][0], versions[-1][1])


# --- options ----------------------------------------------------------------------------------------------------------


def test_order_of_the_products_turns_around_where_a_chunk_is_as_long_as_d_ff():
    case = mlp_case(d=6, f=10, n=30)
    for chunk, cheaper, dearer in ((9, "project_first", "outer_first"), (10, "outer_first", "project_first")):
        o = options(chunk=chunk)
        assert o.outer_first(6, 10) == (cheaper == "outer_first")
        auto = stream(case, o)
        assert_same(auto[:2], stream(case, changed(o, contraction=cheaper))[:2])
        wrong = stream(case, changed(o, contraction=dearer))
        assert 0.1 < np.mean(auto[1][1] != wrong[1][1]) < 0.9
        assert_close(auto[:2], wrong[:2], 0.05)
        wide = options(F64, chunk=chunk)
        orders = [stream(mlp_case(F64, n=30), changed(wide, contraction=c))[:2] for c in (cheaper, dearer)]
        assert_close(orders[0], orders[1], 1e-13)


def test_order_of_the_products_is_irrelevant_without_a_projection():
    case = mlp_case(projection=False)
    both = [stream(case, options(contraction=c))[:2] for c in ("project_first", "outer_first")]
    assert_same(*both)


ROWS = 4


def part_of(case: Case) -> Case:
    """The case with the parameters that updates of the first rows need."""
    w = case.weights
    if w.projection is None:
        return case._replace(weights=replace(w, conv=w.conv[:ROWS]))
    return case._replace(weights=replace(w, projection=w.projection[:, :ROWS]))


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("contraction", ["project_first", "outer_first"])
@pytest.mark.parametrize("pieces", [[23], [4, 1, 1, 10, 7]])
def test_rows_of_a_weight_change_as_they_do_in_the_whole(carry, write, projection, contraction, pieces):
    """A row of a delta depends on no other row of the weight; the other outputs are those of the trained weight."""
    case = mlp_case(projection=projection, batch=2)
    o = options(carry=carry, write=write, contraction=contraction)
    y, versions, _ = stream(case, o, pieces)
    base, _, _ = stream(case, replace(o, rate=0.0), pieces)
    got, rows, _ = stream(part_of(case), replace(o, update_rows=ROWS), pieces)
    assert len(rows) > 2
    assert_same(
        (got, rows), (np.concatenate([y[..., :ROWS], base[..., ROWS:]], axis=-1), [v[:, :ROWS] for v in versions])
    )


@pytest.mark.parametrize("projection", [True, False])
def test_parallel_forms_of_rows_of_a_weight_in_float64(projection):
    case = mlp_case(F64, projection=projection)
    o = options(F64, update_rows=ROWS)
    y, versions, _ = stream(part_of(case), o)
    for form in (parallel, partial(context_parallel, devices=2)):
        assert_close(form(part_of(case).weights, o, case.x, case.t), (y, versions), 1e-12)


def test_projection_is_used_as_stored():
    """V = A P: P[i, j] takes column i of A to column j."""
    case = mlp_case(F64, d=3, f=4, n=5)
    p = np.zeros((3, 3))
    p[0, 1] = 1.0
    for contraction in ("project_first", "outer_first"):
        o = options(F64, contraction=contraction)
        d = deltas(case._replace(weights=replace(case.weights, projection=p)), o)[0][0]
        without = deltas(case._replace(weights=replace(case.weights, projection=None)), o)[0][0]
        assert same_bits(d[1], without[0])
        assert same_bits(d[[0, 2]], np.zeros((2, 4)))


def test_a_master_keeps_what_a_narrow_weight_swallows():
    """Every delta is under half a unit of the weight's last place: added in bf16 it vanishes, the master keeps it."""
    case = integer_case(n=40)
    weights = replace(case.weights, down=np.full((4, 6), 64.0))  # spacing 0.5 above, deltas of 1/16
    x = np.zeros((1, 40, 4))
    x[..., 0] = 1.0
    weights = replace(weights, up=np.tile([1.0, 0, 0, 0], (6, 1)), conv=np.tile([0.0, 0, 1, 0, 0], (4, 1)))
    case = Case(weights, x, np.ones((1, 40, 4)))
    o = options(chunk=1, rate=1 / 16 / 128)  # Z is 128 and V is 1
    swallowed, kept = (stream(case, changed(o, write=write))[2] for write in ("official", "master"))
    assert same_bits(swallowed.weight, swallowed.versions[0].applied)
    master = kept.versions[-1].master
    assert master is not None
    assert (master == 64 + 40 / 16).all()
    assert (kept.weight == 66.5).all()
    assert [float(v.applied[0, 0, 0]) for v in kept.versions[:6]] == [64.0, 64.0, 64.0, 64.0, 64.0, 64.5]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("carry", ["official", "online"])
@pytest.mark.parametrize("contraction", ["project_first", "outer_first"])
def test_clip_bounds_each_step_of_each_sequence(write, carry, contraction):
    case = mlp_case(F64, n=20, batch=2)
    quiet = case.t.copy()
    quiet[1] *= 2.0**-10  # the second sequence never reaches the limit
    case = case._replace(t=quiet)
    free = options(F64, write=write, carry=carry, contraction=contraction)
    tight = replace(free, clip=0.25)
    tolerance = 1e-6 if write == "master" else 1e-12  # a master is float32
    _, versions, _ = stream(case, tight)
    _, unclipped, _ = stream(case, free)
    for i in range(4):
        step, own = (np.linalg.norm(v[i + 1] - v[i], axis=(1, 2)) for v in (versions, unclipped))
        assert own[0] > 0.5 * 0.25 > own[1]
        assert step[0] == pytest.approx(0.5 * 0.25, rel=100 * tolerance)
        assert step[1] == pytest.approx(own[1], rel=1e-2 if write == "master" else 1e-9)
        # The direction stays.
        a, b = (np.ravel(v[i + 1][0] - v[i][0]) for v in (versions, unclipped))
        assert a @ b / np.sqrt(a @ a * (b @ b)) > 1 - tolerance
    loose = stream(case, replace(free, clip=1e6))
    if write == "official" and carry == "official":
        assert_same(loose[:2], stream(case, free)[:2])
    else:
        assert_close(loose[:2], stream(case, free)[:2], 1e-6 if write == "master" else 1e-12)


def test_clip_acts_from_its_own_length_on():
    case = mlp_case(F64, n=5)
    free = options(F64)
    length = float(np.linalg.norm(deltas(case, free)[0]))
    want = stream(case, free)[1]
    assert same_bits(stream(case, replace(free, clip=length * (1 + 1e-9)))[1][1], want[1])
    for shorter in (1e-9, 0.1, 0.5):
        clipped = stream(case, replace(free, clip=length * (1 - shorter)))[1]
        step = np.linalg.norm(clipped[1] - clipped[0]) / np.linalg.norm(want[1] - want[0])
        assert step == pytest.approx(1 - shorter, rel=1e-12)


def test_fused_write_rounds_once():
    """64 + 0.25 + 2**-12 in bf16 (spacing 0.5): rounding the delta first makes a tie that goes down."""
    weights = MlpWeights(
        gate=np.array([[128.0]]), up=np.array([[1.0]]), down=np.array([[64.0]]),
        conv=np.array([[0.0, 0, 1, 0, 0]]), projection=None,
    )  # fmt: skip
    x = np.ones((1, 2, 1))
    t = np.array([[[1.0], [2.0**-10]]])  # deltas 128 + 2**-3, times the rate 2**-9
    o = options(chunk=2, rate=2.0**-9)
    results = {write: float(stream(Case(weights, x, t), changed(o, write=write))[1][-1].item()) for write in WRITES}
    assert results == {"official": 64.0, "fused": 64.5, "master": 64.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 0}, "^chunk: is 0, expected a whole number of at least 1"),
        ({"chunk": True}, "^chunk: is True"),
        ({"chunk": 2.5}, "^chunk: is 2.5"),
        ({"rate": float("nan")}, "^rate: is nan, expected a finite number"),
        ({"rate": float("inf")}, "^rate: is inf"),
        ({"clip": 0.0}, "^clip: is 0.0, expected a finite number above 0"),
        ({"clip": -1.0}, "^clip: is -1.0"),
        ({"clip": float("nan")}, "^clip: is nan"),
        ({"carry": "rings"}, "^carry: is 'rings', expected one of official, ring, keep_z, online"),
        ({"write": "resident"}, "^write: is 'resident', expected one of official, fused, master"),
        ({"convolution": "centred"}, "^convolution: is 'centred', expected one of symmetric, causal"),
        ({"contraction": "both"}, "^contraction: is 'both', expected one of auto"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        options(**changes)


@pytest.mark.parametrize("form", ["streaming", "parallel", "context_parallel"])
@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        ((1, 4, 5), (1, 4, 5), r"^x: shape is \(1, 4, 5\), expected \(1, at least 1, 6\)"),
        ((4, 6), (4, 6), r"^x: shape is \(4, 6\), expected"),
        ((1, 0, 6), (1, 0, 6), r"^x: shape is \(1, 0, 6\), expected"),
        ((1, 4, 6), (1, 3, 6), r"^t: shape is \(1, 3, 6\), expected \(1, 4, 6\), that of x"),
        ((1, 4, 6), (2, 4, 6), r"^t: shape is"),
        ("x", np.nan, "^x: found .* expected finite"),
        ("t", np.inf, "^t: found .* expected finite"),
    ],
)
def test_rows_that_cannot_be(form, x, t, message):
    case = mlp_case()
    if isinstance(x, str):
        arrays = {"x": case.x.copy(), "t": case.t.copy()}
        arrays[x][0, 2, 1] = t
    else:
        arrays = {"x": np.zeros(x), "t": np.zeros(t)}
    run: dict[str, Callable[[Array, Array], object]] = {
        "streaming": StreamingMlp(case.weights, options()),
        "parallel": lambda x, t: parallel(case.weights, options(), x, t),
        "context_parallel": lambda x, t: context_parallel(case.weights, options(), x, t, devices=1),
    }
    with pytest.raises(InputError, match=message):
        run[form](arrays["x"], arrays["t"])


@pytest.mark.parametrize(
    ("fmt", "fast", "scale", "rate", "name"),
    [
        (F16, F16, 2.0**11, 0.5, "silu_mul|gate_proj|up_proj"),
        (BF16, F8, 1.0, 1e6, "delta_scale|weight_write"),
        (BF16, F8, 2.0**6, 0.5, "delta_gemm"),
        (F32, F32, 1.0, 1e39, "delta_scale"),
        (F64, F64, 1.0, 1e308, "delta_scale|weight_write"),
        (F64, F64, 1e200, 0.5, "silu_mul|fast_apply"),
    ],
)
def test_what_leaves_the_range_of_a_format_is_an_error(fmt, fast, scale, rate, name):
    case = mlp_case(fmt)
    x, t = round_to(case.x * scale, fmt), round_to(case.t * min(scale, 64.0), fmt)
    o = options(fmt, fast_dtype=fast, rate=rate)
    for run in (
        lambda: StreamingMlp(case.weights, o)(x, t),
        lambda: parallel(case.weights, o, x, t),
        lambda: context_parallel(case.weights, o, x, t, devices=2),
    ):
        with pytest.raises(InputError, match=rf"^({name}): element .* expected at most .* largest number of (f|b)"):
            run()


def test_an_empty_meter_of_ones_own_is_used():
    """A meter without counts is still the caller's meter."""
    case, meter = mlp_case(), Meter()
    StreamingMlp(case.weights, options(), 1, meter, layer=3)(case.x, case.t)
    assert meter.counts
    assert {c.layer for c in meter.counts} == {3}
