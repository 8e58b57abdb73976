"""What tests of the reference share: rounding by integers, cases, and counts by op."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import ldexp
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ttt_sim.model import Scenario
from ttt_sim.ops import OP_KINDS, Trace
from ttt_sim.reference import MlpWeights, TTTOptions
from ttt_sim.reference.formats import FORMATS, Format, round_to
from ttt_sim.reference.meter import Meter
from ttt_sim.reference.randomness import normal, whole_numbers

Array = npt.NDArray[np.float64]
BF16, F64 = FORMATS["bfloat16"], FORMATS["float64"]


# --- rounding by integers ---------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A format as its standard states it: significand bits, exponent of the smallest subnormal, largest number."""

    precision: int
    quantum: int
    largest: Fraction


#: Written out here, so that a wrong number in the package's own table shows.
SPECS = {
    "float64": Spec(53, -1074, (2 - Fraction(1, 2**52)) * 2**1023),
    "float32": Spec(24, -149, (2 - Fraction(1, 2**23)) * 2**127),
    "bfloat16": Spec(8, -133, (2 - Fraction(1, 2**7)) * 2**127),
    "float16": Spec(11, -24, Fraction(65504)),
    "float8_e4m3fn": Spec(4, -9, Fraction(448)),
    "float8_e5m2": Spec(3, -16, Fraction(57344)),
}


def power(exponent: int) -> Fraction:
    return Fraction(2**exponent) if exponent >= 0 else Fraction(1, 2**-exponent)


def floor_log2(x: Fraction) -> int:
    """The e with 2**e <= x < 2**(e + 1), for a positive x."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if power(e) <= x else e - 1


def rounded(x: Fraction, fmt: str) -> Fraction:
    """``x`` to the nearest number of the format, ties to even; its largest number is not looked at."""
    if not x:
        return x
    spec = SPECS[fmt]
    unit = power(max(floor_log2(abs(x)) - spec.precision + 1, spec.quantum))
    count, rest = divmod(abs(x), unit)
    if 2 * rest > unit or (2 * rest == unit and count % 2):
        count += 1
    return (-unit if x < 0 else unit) * count


def in_range(x: Fraction, fmt: str) -> bool:
    return abs(x) <= SPECS[fmt].largest


def exact_dot(a: Sequence[float], b: Sequence[float]) -> Fraction:
    return sum((Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)), Fraction(0))


def oracle_dot(a: Array, b: Array, fmt: str) -> tuple[Array, bool]:
    """(m, k) by (k, n): every element rounded once, and whether all of them are in range (else zeros stand there)."""
    out, fits = np.zeros((a.shape[0], b.shape[1])), True
    for i, row in enumerate(a.tolist()):
        for j, column in enumerate(b.T.tolist()):
            value = rounded(exact_dot(row, column), fmt)
            if in_range(value, fmt):
                out[i, j] = float(value)
                assert Fraction(out[i, j]) == value
            else:
                fits = False
    return out, fits


def same_bits(x: Array, y: Array) -> bool:
    """Equal shapes and equal bits, so that -0 differs from 0."""
    return x.shape == y.shape and np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes()


def scaled_number(mantissa: int, exponent: int) -> float:
    return ldexp(float(mantissa), exponent)


# --- cases of the TTT MLP ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One layer's weights and a stream (batch, tokens, d)."""

    weights: MlpWeights
    x: Array
    t: Array


def mlp_case(
    fmt: Format = BF16,
    *,
    d: int = 6,
    f: int = 10,
    n: int = 23,
    batch: int = 1,
    projection: bool = True,
    seed: int = 0,
) -> Case:
    """Weights and inputs that make every part of the update matter; numbers of ``fmt``."""

    def draw(stream: int, shape: tuple[int, ...], scale: float) -> Array:
        return round_to(normal(seed, stream, shape) * scale, fmt)

    weights = MlpWeights(
        gate=draw(0, (f, d), d**-0.5),
        up=draw(1, (f, d), d**-0.5),
        down=draw(2, (d, f), f**-0.5),
        conv=draw(3, (d, 5), 0.4),
        projection=draw(4, (d, d), d**-0.5) if projection else None,
    )
    return Case(weights, draw(5, (batch, n, d), 1.0), draw(6, (batch, n, d), 1.0))


def integer_case(*, d: int = 4, f: int = 6, n: int = 12, batch: int = 1) -> Case:
    """Deltas that are small whole numbers: the gate is so large that silu is its own argument, up is whole."""

    def draw(stream: int, shape: tuple[int, ...], size: int) -> Array:
        return (whole_numbers(7, stream, shape, 2 * size + 1) - size).astype(np.float64)

    gate = np.zeros((f, d))
    gate[:, 0] = 128.0  # silu(128) is 128 to the last bit in every format
    weights = MlpWeights(
        gate=gate, up=draw(1, (f, d), 1), down=draw(2, (d, f), 4), conv=draw(3, (d, 5), 1), projection=None
    )
    x = draw(5, (batch, n, d), 1)
    x[..., 0] = 1.0
    return Case(weights, x, draw(6, (batch, n, d), 1))


def options(fmt: Format = BF16, **changes) -> TTTOptions:
    """Five tokens per chunk, so that 23 tokens end in an open chunk."""
    return replace(TTTOptions(chunk=5, rate=0.5, dtype=fmt, fast_dtype=fmt), **changes)


def changed(o: TTTOptions, **changes: Any) -> TTTOptions:
    """``dataclasses.replace`` for choices that a test computes."""
    return replace(o, **changes)


# --- counts -----------------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What one op does."""

    flops: int
    vector_ops: int
    exp_ops: int
    rsqrt_ops: int
    div_ops: int
    bytes_read: int
    bytes_written: int


#: (kind, step, layer, chunk) -> the ops with that key, in order.
CountsByKey = dict[tuple[str, int, int, int], list[Counts]]


def trace_counts(trace: Trace) -> CountsByKey:
    """What each op of a trace says that it does."""
    out: CountsByKey = defaultdict(list)
    read, written = (
        np.array([nbytes[a:b].sum() for a, b in pairwise(ptr)], dtype=np.int64)
        for ptr, nbytes in ((trace.read_ptr, trace.read_bytes), (trace.write_ptr, trace.write_bytes))
    )
    columns = (trace.flops, trace.vector_ops, trace.exp_ops, trace.rsqrt_ops, trace.div_ops, read, written)
    table = np.column_stack(columns).tolist()
    keys = zip(trace.kind.tolist(), trace.step.tolist(), trace.layer.tolist(), trace.chunk.tolist(), strict=True)
    for (kind, step, layer, chunk), numbers in zip(keys, table, strict=True):
        out[OP_KINDS[kind].name, step, layer, chunk].append(Counts(*numbers))
    return dict(out)


def meter_counts(meter: Meter) -> CountsByKey:
    """What each op of the reference was seen to do."""
    out: CountsByKey = defaultdict(list)
    for c in meter.counts:
        counts = Counts(c.flops, c.lanes, c.exps, c.roots, c.divisions, c.bytes_read, c.bytes_written)
        out[c.kind, c.step, c.layer, c.chunk].append(counts)
    return dict(out)


def scenario_of(n_prefill: int, n_decode: int, *, batch: int, call_tokens: int, dtype: str = "bf16") -> Scenario:
    """A prompt in calls, then tokens one by one."""
    prompt = Scenario.prefill(n_prefill, batch=batch, dtype=dtype, call_tokens=call_tokens)
    if not n_decode:
        return prompt
    tail = Scenario.decode(range(n_prefill, n_prefill + n_decode), batch=batch, dtype=dtype)
    return Scenario(batch=batch, dtype=dtype, calls=(*prompt.calls, *tail.calls))


def in_pieces(run: Callable[[Array, Array], Array], x: Array, t: Array, pieces: Sequence[int]) -> Array:
    """Outputs (batch, n, d) of calls of these lengths."""
    assert sum(pieces) == x.shape[1]
    outputs, start = [], 0
    for piece in pieces:
        outputs.append(run(x[:, start : start + piece], t[:, start : start + piece]))
        start += piece
    return np.concatenate(outputs, axis=1)
