"""The mapper for weight-stationary systolic arrays (TPU, Trainium, Inferentia).

An array holds a tile of one operand (the *stationary* one) and lets rows of the other stream through it. A *pass* is
one tile and the rows that stream while it stays; its time hardly depends on how much of the tile is filled, so narrow
products waste the array and a product of a single row pays for loading tiles. See docs/hardware_model.md, "Systolic
arrays". Scalars and integers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttt_sim.chip import Chip
from ttt_sim.dtypes import DTYPE_BITS
from ttt_sim.lower.kernels import Kernels
from ttt_sim.lower.levels import Work, add_attention, add_products, add_scans, finish, no_work
from ttt_sim.lower.tiles import (
    AttentionWork,
    TileWork,
    attention_share,
    ceil_float,
    product_rate,
    visible_keys,
    visited_blocks,
)
from ttt_sim.lower.traffic import Traffic
from ttt_sim.lower.work import KernelWork
from ttt_sim.ops import OP_KINDS, Trace
from ttt_sim.units import ceil_div

#: Products over the tokens of a chunk, or of its delta: both operands lie as the forward products use them, one row per
#: token, so one of them is needed transposed.
TURNED = ("delta_gemm", "outer_gemm", "outer_proj", "delta_write", "online_update", "ssm_states")


def map_kernels(trace: Trace, chip: Chip, kernels: Kernels, traffic: Traffic) -> KernelWork:
    """Cost of every kernel of ``trace`` on ``chip``.

    Raises:
        UnsupportedError: the chip lacks a unit, dtype or link that the trace needs.
    """
    work = no_work(trace, kernels)
    add_array_work(trace, chip, kernels, work)
    return finish(trace, chip, kernels, traffic, work)


def add_array_work(trace: Trace, chip: Chip, kernels: Kernels, work: Work) -> None:
    """Add all products, attention cores and scans of ``trace``, on weight-stationary arrays."""

    def choose(m: int, n: int, k: int, batch: int, dtype: str, turned: int) -> TileWork:
        return product(chip, m=m, n=n, k=k, batch=batch, dtype=dtype, turned=bool(turned))

    turned = np.array([kind.name in TURNED for kind in OP_KINDS], dtype=np.int64)[trace.kind]
    add_products(trace, kernels, work, turned, choose)
    add_attention(trace, chip, kernels, work, attention)
    add_scans(trace, kernels, work, choose)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrays:
    """The arrays of a chip for operands of one dtype.

    ``count`` of the whole chip; a tile is ``depth`` (reduction) x ``cols`` elements, ``rows`` cells x ``cols``: where a
    narrow dtype is faster, a cell holds ``depth / rows`` of its elements. ``row_cycles``: a row streams in that time.
    """

    count: int
    rows: int
    depth: int
    cols: int
    row_cycles: float
    issue_cycles: int
    load_cycles: int
    double_buffer: bool

    def stream(self, rows: int) -> int:
        """Cycles in which ``rows`` rows stream through one tile."""
        return max(ceil_float(rows * self.row_cycles), self.issue_cycles)

    def one_pass(self, rows: int) -> int:
        """Cycles of one of many passes of ``rows`` rows: loads are hidden only behind the pass before."""
        if self.double_buffer:
            return max(self.stream(rows), self.load_cycles)
        return self.load_cycles + self.stream(rows)

    def run(self, passes: int, rows: int) -> int:
        """Cycles of ``passes`` passes of ``rows`` rows on one array, the first load and the last stream in full."""
        if self.double_buffer:
            return self.load_cycles + (passes - 1) * self.one_pass(rows) + self.stream(rows)
        return passes * self.one_pass(rows)


def arrays_of(chip: Chip, dtype: str, *, attention: bool = False) -> Arrays:
    """The arrays for operands of ``dtype``, at the share of the peak that full tiles (or attention) sustain.

    Raises:
        UnsupportedError: no unit has a peak for this dtype.
    """
    unit = chip.unit("matrix")
    count, rows = chip.cores * max(unit.count, 1), unit.rows * unit.depth
    share = attention_share(chip, dtype) if attention else unit.efficiency.get(dtype, 1.0)
    # rows of one element per cell that all arrays together stream per cycle and array
    speed = product_rate(chip, dtype, sustained=False) / (2 * count * rows * unit.cols)
    packed = max(int(speed + 0.5), 1)
    return Arrays(
        count=count,
        rows=rows,
        depth=rows * packed,
        cols=unit.cols,
        row_cycles=packed / (speed * share),
        issue_cycles=unit.issue_cycles,
        load_cycles=unit.load_cycles,
        double_buffer=unit.double_buffer,
    )


def product(chip: Chip, *, m: int, n: int, k: int, batch: int, dtype: str, turned: bool = False) -> TileWork:
    """Map ``batch`` products C[m,n] = A[m,k] B[k,n].

    Either operand may stay while the other streams, and the rows that stream may be split over arrays by powers of two;
    arrays also share out tile columns and products. Chosen: the smallest max(matrix units, scratchpad), of equals the
    one with least time on the arrays, then B stationary, then the smallest split.

    ``turned``: one operand is needed transposed. The one that stays goes through an array once more on chips that
    cannot load it that way.
    """
    arrays, unit = arrays_of(chip, dtype), chip.unit("matrix")
    turns = turned and not chip.writability.transposed_read
    cache_rate = chip.cache.read_bytes_per_s / chip.clock_hz if chip.cache else 0.0
    depth_tiles = ceil_div(k, arrays.depth)
    best: tuple[tuple[int, int], TileWork] | None = None
    for stays, moves, b_stays in ((n, m, True), (m, n, False)):
        tiles = ceil_div(stays, arrays.cols)
        turn_cycles = _turn(arrays, batch * ceil_div(k, arrays.rows) * tiles, min(k, arrays.rows)) if turns else 0
        split = 1
        while split <= arrays.count and (split == 1 or split <= moves):
            rows = ceil_div(moves, split)
            items = batch * tiles * split
            waves = ceil_div(items, arrays.count)
            matrix_cycles = unit.startup_cycles + arrays.run(waves * depth_tiles, rows) + turn_cycles
            streamed = moves * k * ceil_div(tiles, chip.mapping.multicast)
            elements = streamed + stays * k * (split + 2 * turns) + m * n
            cache_bytes = ceil_div(batch * elements * DTYPE_BITS[dtype], 8)
            cache_cycles = ceil_float(cache_bytes / cache_rate) if cache_rate else 0
            key = (max(matrix_cycles, cache_cycles), matrix_cycles)
            if best is None or key < best[0]:
                work = TileWork(
                    tile=(rows, arrays.cols) if b_stays else (arrays.cols, rows),
                    split=split,
                    depth=arrays.depth,
                    items=items,
                    waves=waves,
                    steps=waves * depth_tiles * ceil_div(rows, arrays.rows),
                    matrix_cycles=matrix_cycles,
                    cache_bytes=cache_bytes,
                    core_bytes=0,
                    splits_rows=True,
                )
                best = (key, work)
            split *= 2
    assert best is not None, "a split of one is always tried"
    return best[1]


def _turn(arrays: Arrays, tiles: int, rows: int) -> int:
    """Cycles to transpose ``tiles`` tiles of the cells: each is loaded, and the rows of an identity stream through."""
    return arrays.run(ceil_div(tiles, arrays.count), rows)


def attention(
    chip: Chip, *, batch: int, m: int, n: int, head_dim: int, heads: int, kv_heads: int, position: int, pairs: int,
    dtype: str, kv_bytes: int, usable_cache_bytes: int,
) -> AttentionWork:  # fmt: skip
    """Map flash attention of ``m`` query rows over ``n`` keys for each of ``batch`` sequences; arguments as those of
    :func:`ttt_sim.lower.tiles.attention`.

    A tile holds rows of all query heads that share a KV head. It visits blocks of as many keys as the longer side of an
    array, two products a block (scores, values), in each of which the operand that costs less stays; the probabilities
    pass through the scratchpad in between. Blocks are shared out evenly over the arrays.
    """
    arrays, unit = arrays_of(chip, dtype, attention=True), chip.unit("matrix")
    group, chains = heads // kv_heads, batch * kv_heads
    tile_rows, keys = chip.library.attention_rows, max(arrays.depth, arrays.cols)
    tiles = ceil_div(group * m, tile_rows)
    blocks = visited_blocks(*visible_keys(group, tile_rows, m=m, n=n, position=position, pairs=pairs), keys)
    last_rows = group * m - (tiles - 1) * tile_rows
    turns = not chip.writability.transposed_read
    full, last = (_block_cycles(arrays, rows, keys, head_dim, turns=turns) for rows in (tile_rows, last_rows))
    block_total = int(blocks.sum()) * chains
    cycles = (int(blocks[:-1].sum()) * full + int(blocks[-1]) * last) * chains
    padded_pairs = (int(blocks[:-1].sum()) * tile_rows + int(blocks[-1]) * last_rows) * keys * chains
    begin = unit.startup_cycles + (arrays.load_cycles if arrays.double_buffer else 0)
    matrix_cycles = begin + max(ceil_div(cycles, arrays.count), full if tiles > 1 else last)

    element_bits = DTYPE_BITS[dtype]
    rows_bytes = ceil_div(batch * heads * m * head_dim * element_bits, 8)
    streamed = block_total * keys * ceil_div(kv_bytes, max(1, chains * n))
    head_bytes = ceil_div(kv_bytes, chains)
    fits = head_bytes * min(chains, ceil_div(arrays.count, tiles)) <= usable_cache_bytes
    return AttentionWork(
        tile=(min(tile_rows, group * m), keys),
        split=1,
        depth=keys,
        items=tiles * chains,
        waves=ceil_div(tiles * chains, arrays.count),
        steps=ceil_div(block_total, arrays.count),
        matrix_cycles=matrix_cycles,
        cache_bytes=2 * rows_bytes + streamed + 2 * ceil_div(padded_pairs * element_bits, 8),
        core_bytes=0,
        padded_pairs=padded_pairs,
        kv_passes=1 if fits else ceil_div(tiles, arrays.count),
        heads_per_tile=group,
    )


def _block_cycles(arrays: Arrays, rows: int, keys: int, head_dim: int, *, turns: bool) -> int:
    """Cycles of one array for ``rows`` query rows and one block of ``keys`` keys, loads included."""

    def cheaper(long: int, wide: int, depth: int) -> int:
        depth_tiles = ceil_div(depth, arrays.depth)
        return depth_tiles * min(
            ceil_div(wide, arrays.cols) * arrays.one_pass(long),
            ceil_div(long, arrays.cols) * arrays.one_pass(wide),
        )

    scores, values = cheaper(rows, keys, head_dim), cheaper(rows, head_dim, keys)
    if not turns:
        return scores + values
    tiles = ceil_div(keys, arrays.rows) * ceil_div(rows, arrays.cols)
    return scores + values + tiles * arrays.one_pass(min(keys, arrays.rows))
