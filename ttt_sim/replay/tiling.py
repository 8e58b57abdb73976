"""The tiles on which an op executes: the bounds that lowering's choice of tile, split and merged columns implies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ttt_sim.lower.work import OpTiles
from ttt_sim.ops import Trace
from ttt_sim.units import ceil_div

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """``tiles``: (first row, end row, first column, end column) of each; ``parts``: the reduction, cut into ranges that
    different cores sum; ``depth``: elements of a range that one pipeline step takes; ``heads``: query heads whose rows
    an attention tile packs, row after row."""

    tiles: tuple[tuple[int, int, int, int], ...]
    parts: tuple[Span, ...]
    depth: int
    heads: int = 1


TilingOf = Callable[[int], Tiling]


def spans(length: int, size: int, *, offset: int = 0) -> tuple[Span, ...]:
    """``length`` elements cut at the multiples of ``size`` of a longer range in which they begin at ``offset``."""
    first = offset // size
    last = ceil_div(offset + length, size)
    return tuple((max(i * size - offset, 0), min((i + 1) * size - offset, length)) for i in range(first, last))


def even_parts(blocks: int, parts: int) -> tuple[Span, ...]:
    """``blocks`` cut into ``parts`` ranges whose lengths differ by one at most."""
    return tuple((blocks * i // parts, blocks * (i + 1) // parts) for i in range(parts))


def tiling_of(trace: Trace, chosen: OpTiles, op: int) -> Tiling:
    """The tiling of a matrix product (rows x columns, reduction) or of an attention core (packed rows x keys)."""
    rows, cols, split = int(chosen.rows[op]), int(chosen.cols[op]), int(chosen.split[op])
    depth, k = int(chosen.depth[op]), int(trace.k[op])
    if trace.heads[op]:  # keys are what attention reduces over; its head width is never cut
        n, heads = int(trace.n[op]), int(chosen.heads[op])
        tiles = tuple((r0, r1, 0, int(trace.k[op])) for r0, r1 in spans(int(trace.m[op]) * heads, rows))
        parts = tuple((begin * cols, min(end * cols, n)) for begin, end in even_parts(ceil_div(n, cols), split))
        return Tiling(tiles=tiles, parts=parts, depth=cols, heads=heads)
    row_spans = spans(int(trace.m[op]), rows)
    col_spans = spans(int(trace.n[op]), cols, offset=int(chosen.offset[op]))
    steps = ceil_div(k, depth)
    return Tiling(
        tiles=tuple((*r, *c) for r in row_spans for c in col_spans),
        parts=spans(k, depth * ceil_div(steps, split)),
        depth=depth,
    )
