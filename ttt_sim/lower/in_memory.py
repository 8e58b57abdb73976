"""The mapper for chips that compute where weights are stored: in-memory computing, processing in DRAM, neuromorphic.

An array holds a tile of a stored matrix and multiplies one input vector at a time with it. Tiles of a matrix lie on
as many arrays as they can, and every input vector passes all of them; an array with several tiles takes them in turn.
Only inputs and results travel. See docs/hardware_model.md, "Computing in memory". Scalars and integers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttt_sim.chip import Chip
from ttt_sim.dtypes import DTYPE_BITS
from ttt_sim.errors import UnsupportedError
from ttt_sim.lower.kernels import Kernels
from ttt_sim.lower.levels import Work, add_attention, add_products, finish, no_work
from ttt_sim.lower.tiles import AttentionWork, TileWork, attention_share, ceil_float, flops_per_cycle, visible_keys
from ttt_sim.lower.traffic import Traffic
from ttt_sim.lower.work import KernelWork
from ttt_sim.ops import OP_KINDS, IntArray, OpClass, Trace, op_classes, total_by
from ttt_sim.units import ceil_div

#: What a product multiplies with: a stored matrix, one written into the arrays for it, or nothing (vector lanes).
STORED, STAGED, LANES = range(3)


def map_kernels(trace: Trace, chip: Chip, kernels: Kernels, traffic: Traffic) -> KernelWork:
    """Cost of every kernel of ``trace`` on ``chip``; for event-driven chips the launch is the barrier of a time step.

    Raises:
        UnsupportedError: the chip lacks a unit, dtype or link that the trace needs.
    """
    placed = traffic.placement
    if placed.on_lanes.any() and not chip.has_unit("vector"):
        kind = OP_KINDS[int(trace.kind[np.flatnonzero(placed.on_lanes)[0]])].name
        raise UnsupportedError(
            f"{chip.name}: {kind} multiplies two operands of which none is stored; {chip.main_memory.name} cannot be "
            "written for that and there is no vector unit"
        )
    work = no_work(trace, kernels)
    work["staged"] += total_by(kernels.of_op, placed.staged_bytes, kernels.n)
    work["on_lanes"] += placed.on_lanes
    by_op = np.where(placed.on_lanes, LANES, np.where(placed.staged_bytes > 0, STAGED, STORED))

    def choose(m: int, n: int, k: int, batch: int, dtype: str, operand: int) -> TileWork:
        return product(chip, m=m, n=n, k=k, batch=batch, dtype=dtype, operand=operand)

    add_products(trace, kernels, work, by_op, choose)
    add_attention(trace, chip, kernels, work, attention, among=~placed.on_lanes)
    add_attention(trace, chip, kernels, work, _attention_on_lanes, among=placed.on_lanes)
    _add_scans(trace, chip, kernels, work)
    return finish(trace, chip, kernels, traffic, work)


def _add_scans(trace: Trace, chip: Chip, kernels: Kernels, work: Work) -> None:
    """Scans: a state that changes with every token or chunk is not put into the arrays, vector lanes work on it."""
    scans = np.flatnonzero(op_classes(trace) == int(OpClass.SCAN))
    if scans.size and not chip.has_unit("vector"):
        kind = OP_KINDS[int(trace.kind[scans[0]])].name
        raise UnsupportedError(f"{chip.name}: {kind} changes a state as it goes, which needs a vector unit")
    work["on_lanes"][scans] = 1
    np.add.at(work["steps"], kernels.of_op[scans], (trace.batch * trace.m)[scans])


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrays:
    """The arrays of a chip for operands of one dtype: ``count`` of the whole chip, tiles of ``depth`` (reduction) x
    ``cols`` elements, of which a cell holds several where a narrow dtype is faster; an input vector passes one in
    ``vector_cycles``."""

    count: int
    depth: int
    cols: int
    vector_cycles: float


def arrays_of(chip: Chip, dtype: str, *, attention: bool = False) -> Arrays:
    """The arrays for operands of ``dtype``, at the share of the peak that full tiles (or attention) sustain.

    Raises:
        UnsupportedError: the arrays have no peak for this dtype.
    """
    unit = chip.unit("matrix")
    count, rows = chip.cores * max(unit.count, 1), unit.rows * unit.depth
    share = attention_share(chip, dtype) if attention else unit.efficiency.get(dtype, 1.0)
    # input vectors of one element per cell that pass each array per cycle
    speed = flops_per_cycle(chip, unit, dtype, sustained=False) / (2 * count * rows * unit.cols)
    packed = max(int(speed * unit.issue_cycles + 0.5), 1)
    return Arrays(
        count=count,
        depth=rows * packed,
        cols=unit.cols,
        vector_cycles=max(unit.issue_cycles, packed / speed) / share,
    )


def product(chip: Chip, *, m: int, n: int, k: int, batch: int, dtype: str, operand: int = STORED) -> TileWork:
    """Map ``batch`` products C[m,n] = A[m,k] B[k,n]. B is stored; of two temporary operands the smaller one is."""
    element_bits = DTYPE_BITS[dtype]
    if operand == LANES:
        moved = ceil_div(batch * (m * k + k * n + m * n) * element_bits, 8)
        return TileWork(
            tile=(m, n), split=1, depth=k, items=batch, waves=1, steps=max(batch * m, 1), matrix_cycles=0,
            cache_bytes=moved, core_bytes=0,
        )  # fmt: skip
    arrays, unit = arrays_of(chip, dtype), chip.unit("matrix")
    a_stays = operand == STAGED and m < n
    stays, vectors = (m, n) if a_stays else (n, m)
    items = batch * ceil_div(k, arrays.depth) * ceil_div(stays, arrays.cols)
    waves = ceil_div(items, arrays.count)
    elements = vectors * k + m * n + (stays * k if operand == STAGED else 0)
    return TileWork(
        tile=(arrays.cols, n) if a_stays else (m, arrays.cols),
        split=1,
        depth=arrays.depth,
        items=items,
        waves=waves,
        steps=vectors * waves,
        matrix_cycles=unit.startup_cycles + ceil_float(vectors * waves * arrays.vector_cycles),
        cache_bytes=ceil_div(batch * elements * element_bits, 8),
        core_bytes=0,
    )


def attention(
    chip: Chip, *, batch: int, m: int, n: int, head_dim: int, heads: int, kv_heads: int, position: int, pairs: int,
    dtype: str, kv_bytes: int, usable_cache_bytes: int,
) -> AttentionWork:  # fmt: skip
    """Map the attention of ``m`` query rows over ``n`` keys for each of ``batch`` sequences; arguments as those of
    :func:`ttt_sim.lower.tiles.attention`.

    Keys and values stay. Rows of queries, then of probabilities, are the input vectors of the blocks of keys that they
    see; a block is as long as the longer side of an array. Tiles are dealt out to arrays, those with most vectors
    first, so a round of them lasts as long as its first.
    """
    arrays, unit = arrays_of(chip, dtype, attention=True), chip.unit("matrix")
    group, chains = heads // kv_heads, batch * kv_heads
    keys = max(arrays.depth, arrays.cols)
    start, end = visible_keys(group, group, m=m, n=n, position=position, pairs=pairs)  # of every query
    seen = np.zeros(ceil_div(n, keys) + 1, dtype=np.int64)
    np.add.at(seen, start // keys, group)
    np.add.at(seen, -(-end // keys), -group)
    vectors = np.sort(np.cumsum(seen)[:-1])[::-1]  # of every block of one chain
    scores = chains * ceil_div(head_dim, arrays.depth) * ceil_div(keys, arrays.cols)
    values = chains * ceil_div(keys, arrays.depth) * ceil_div(head_dim, arrays.cols)
    passes = [_passes(vectors, tiles, arrays.count) for tiles in (scores, values)]
    padded_pairs = int(vectors.sum()) * chains * keys
    element_bits = DTYPE_BITS[dtype]
    rows_bytes = ceil_div(batch * heads * m * head_dim * element_bits, 8)
    items = vectors.size * (scores + values)
    return AttentionWork(
        tile=(group * m, keys),
        split=1,
        depth=keys,
        items=items,
        waves=ceil_div(items, arrays.count),
        steps=max(passes),
        matrix_cycles=unit.startup_cycles + sum(ceil_float(count * arrays.vector_cycles) for count in passes),
        cache_bytes=2 * rows_bytes + 2 * ceil_div(padded_pairs * element_bits, 8),
        core_bytes=0,
        padded_pairs=padded_pairs,
        kv_passes=1,
        heads_per_tile=group,
    )


def _passes(vectors: IntArray, tiles: int, arrays: int) -> int:
    """Input vectors that the busiest array takes: ``tiles`` tiles of every block, falling ``vectors`` through each."""
    rounds = ceil_div(vectors.size * tiles, arrays)
    return int(vectors[np.arange(rounds, dtype=np.int64) * arrays // tiles].sum())


def _attention_on_lanes(chip: Chip, *, kv_bytes: int, dtype: str, **shape: int) -> AttentionWork:
    """Attention with rows that are not stored yet, where they cannot be written just for that."""
    group, rows = shape["heads"] // shape["kv_heads"], shape["batch"] * shape["heads"] * shape["m"]
    return AttentionWork(
        tile=(group * shape["m"], shape["n"]),
        split=1,
        depth=shape["n"],
        items=shape["batch"] * shape["kv_heads"],
        waves=1,
        steps=max(rows, 1),
        matrix_cycles=0,
        cache_bytes=2 * ceil_div(rows * shape["head_dim"] * DTYPE_BITS[dtype], 8) + kv_bytes,
        core_bytes=0,
        padded_pairs=shape["pairs"] * shape["batch"] * shape["heads"],
        kv_passes=1,
        heads_per_tile=group,
    )
