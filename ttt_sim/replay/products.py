"""Matrix products and attention cores on the tiles that lowering chose.

Two modes of accumulation. ``exact``: every element is the exact sum of its products, rounded once; parts of a split
reduction are added unrounded, so tiles and order cannot show. ``hardware``: float32 accumulators in this order. Within
a tile, pipeline steps from the first to the last, each the exact sum over its elements rounded to float32 and added to
the accumulator in float32; then the parts of a split reduction from the first to the last, in float32. Attention keeps
a running maximum, sum and output over blocks of keys (online softmax) in float32. (A tensor core's own order inside a
step is not published; one rounding per step is the least that it can do.)
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ttt_sim.reference import elementary
from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.exact import DigitGrid, dot, row_sum
from ttt_sim.reference.formats import FLOAT32, Format, round_to, wide_format
from ttt_sim.replay.errors import ExecutionError
from ttt_sim.replay.tiling import Span, Tiling

Accumulate = Literal["exact", "hardware"]
ACCUMULATE: tuple[str, ...] = get_args(Accumulate)


class Cover:
    """The output of a tiled op; every element must be stored exactly once."""

    def __init__(self, *shape: int) -> None:
        self.values: FloatArray = np.full(shape, np.nan)
        self._stores = np.zeros(shape[-2:], dtype=np.int64)

    def store(self, rows: Span, cols: Span, values: FloatArray) -> None:
        self.values[..., slice(*rows), slice(*cols)] = values
        self._stores[slice(*rows), slice(*cols)] += 1

    def complete(self) -> FloatArray:
        """The output; raises :class:`ExecutionError` for elements that no tile, or several, stored."""
        if (self._stores != 1).any():
            row, col = (int(i) for i in np.argwhere(self._stores != 1)[0])
            raise ExecutionError(f"tiles store element ({row}, {col}) {int(self._stores[row, col])} times")
        return self.values


def _check_parts(tiling: Tiling, length: int) -> None:
    """Raise :class:`ExecutionError` unless the parts of a reduction follow one another from its start to its end."""
    reached = 0
    for begin, end in tiling.parts:
        if begin != reached or end <= begin:
            break
        reached = end
    else:
        if reached == length:
            return
    raise ExecutionError(f"sums over {tiling.parts}, expected ranges that follow one another from 0 to {length}")


def product(a: FloatArray, b: FloatArray, tiling: Tiling, fmt: Format, mode: Accumulate, name: str) -> FloatArray:
    """(batch, m, k) by (batch, k, n) on tiles, rounded to ``fmt``.

    Raises:
        ExecutionError: the tiles do not cover the output once, or the parts the reduction.
    """
    _check_parts(tiling, a.shape[-1])
    out = Cover(*a.shape[:-1], b.shape[-1])
    for r0, r1, c0, c1 in tiling.tiles:
        rows, cols = a[:, r0:r1], b[:, :, c0:c1]
        if mode == "hardware":
            tile = _in_float32(rows, cols, tiling, name)
            tile = round_to(tile, fmt, name)
        elif len(tiling.parts) == 1:
            tile = dot(rows, cols, fmt, name)
        else:
            grid = DigitGrid.of(rows, cols)
            total = np.zeros((1, *rows.shape[:-1], c1 - c0), dtype=np.int64)
            for begin, end in tiling.parts:
                total = grid.add(total, grid.partial(rows[..., begin:end], cols[:, begin:end]))
            tile = grid.rounded(total, fmt, name)
        out.store((r0, r1), (c0, c1), tile)
    return out.complete()


def _in_float32(a: FloatArray, b: FloatArray, tiling: Tiling, name: str) -> FloatArray:
    total: FloatArray | None = None
    for begin, end in tiling.parts:
        part = np.zeros((*a.shape[:-1], b.shape[-1]))
        for k in range(begin, end, tiling.depth):
            step = slice(k, min(k + tiling.depth, end))
            part = round_to(part + dot(a[..., step], b[:, step], FLOAT32, name), FLOAT32, name)
        total = part if total is None else round_to(total + part, FLOAT32, name)
    assert total is not None
    return total


def attention(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    visible: npt.NDArray[np.bool_],
    tiling: Tiling,
    fmt: Format,
    mode: Accumulate,
) -> FloatArray:
    """``queries`` (batch, m, H, h), ``keys, values`` (batch, n, G, h), ``visible`` (m, n) to (batch, m, H, h).

    A tile holds packed rows: the query rows of ``tiling.heads`` heads that share a KV head, row after row.
    """
    _check_parts(tiling, keys.shape[1])
    batch, m, heads, width = queries.shape
    packs = heads // tiling.heads
    packed = queries.reshape(batch, m, packs, tiling.heads, width).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(batch, packs, m * tiling.heads, width)
    # (batch, packs, h, n) and (batch, packs, n, h)
    k, v = (np.repeat(x, packs // keys.shape[2], axis=2) for x in (keys, values))
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    seen = np.repeat(visible, tiling.heads, axis=0)
    core = _online if mode == "hardware" else _at_once
    out = Cover(*packed.shape)
    for r0, r1, c0, c1 in tiling.tiles:
        out.store((r0, r1), (c0, c1), core(packed[:, :, r0:r1], k, v[..., c0:c1], seen[r0:r1], tiling, fmt))
    tiles = out.complete().reshape(batch, packs, m, tiling.heads, width)
    return round_to(tiles.transpose(0, 2, 1, 3, 4).reshape(queries.shape), fmt, "attention")


def _scores(q: FloatArray, k: FloatArray, wide: Format) -> FloatArray:
    return round_to(dot(q, k, wide, "attention") * (1 / np.sqrt(float(q.shape[-1]))), wide)


def _at_once(
    q: FloatArray, k: FloatArray, v: FloatArray, seen: npt.NDArray[np.bool_], _tiling: Tiling, fmt: Format
) -> FloatArray:
    """All keys of each query row together: exact maximum and sums, so blocks of keys make no difference."""
    wide = wide_format(fmt)
    s = np.where(seen, _scores(q, k, wide), -np.inf)
    exponents = s - s.max(axis=-1, keepdims=True)
    p = round_to(elementary.exp(exponents), wide) * seen
    return np.asarray(dot(p, v, wide, "attention") / row_sum(p, wide, "attention")[..., None])


def _online(
    q: FloatArray, k: FloatArray, v: FloatArray, seen: npt.NDArray[np.bool_], tiling: Tiling, _fmt: Format
) -> FloatArray:
    """Online softmax over blocks of keys, and over the parts of a split, in float32."""

    def merged(
        x: tuple[FloatArray, FloatArray, FloatArray], y: tuple[FloatArray, FloatArray, FloatArray]
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Two (maximum, sum, output), both scaled down to the larger maximum and added."""
        top = np.maximum(x[0], y[0])
        with np.errstate(invalid="ignore"):  # a part of which nothing is visible has maximum -infinity
            scales = [np.where(z[0] > -np.inf, elementary.exp(np.nan_to_num(z[0] - top)), 0.0) for z in (x, y)]
        low, high = (round_to(scale, FLOAT32) for scale in scales)
        total = round_to(x[1] * low + y[1] * high, FLOAT32)
        return top, total, round_to(x[2] * low[..., None] + y[2] * high[..., None], FLOAT32)

    def block(begin: int, end: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        s = np.where(seen[:, begin:end], _scores(q, k[..., begin:end], FLOAT32), -np.inf)
        top = s.max(axis=-1)
        exponents = np.where(seen[:, begin:end], s - np.where(top > -np.inf, top, 0.0)[..., None], -np.inf)
        p = round_to(elementary.exp(exponents), FLOAT32) * seen[:, begin:end]
        return top, row_sum(p, FLOAT32), dot(p, v[..., begin:end, :], FLOAT32)

    whole = None
    for begin, end in tiling.parts:
        part = None
        for first in range(begin, end, tiling.depth):
            new = block(first, min(first + tiling.depth, end))
            part = new if part is None else merged(part, new)
        assert part is not None
        whole = part if whole is None else merged(whole, part)
    assert whole is not None
    return np.asarray(whole[2] / whole[1][..., None])
