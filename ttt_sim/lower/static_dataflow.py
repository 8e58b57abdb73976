"""The mapper for spatial arrays of cores whose schedule is fixed before it runs (Groq, Cerebras, SambaNova, NPUs).

A product is cut over a grid of cores; operands are broadcast along one side of it and partial sums added along the
other, over the network between the cores (the first link of scope ``core``). Hops of that network are paid once per op:
they fill the pipeline. Matrix units that are weight-stationary arrays compute as :mod:`ttt_sim.lower.systolic` says.
See docs/hardware_model.md, "Spatial arrays". Scalars and integers only.
"""

from __future__ import annotations

import math

import numpy as np

from ttt_sim.chip import Chip, Link
from ttt_sim.dtypes import DTYPE_BITS
from ttt_sim.lower import systolic
from ttt_sim.lower.kernels import Kernels
from ttt_sim.lower.levels import Work, add_attention, add_products, add_scans, finish, no_work
from ttt_sim.lower.tiles import (
    ACCUMULATOR_BYTES,
    AttentionWork,
    TileWork,
    attention_share,
    ceil_float,
    flops_per_cycle,
    product_rate,
    visible_keys,
    visited_blocks,
)
from ttt_sim.lower.traffic import Traffic
from ttt_sim.lower.work import KernelWork
from ttt_sim.ops import KIND, Trace
from ttt_sim.units import ceil_div

#: Row-wise ops that need a sum (or maximum) over each row before they can go on; ``delta_norm`` one over all rows.
REDUCING = ("attn_norm", "qk_norm", "mlp_norm", "final_norm", "layernorm", "softmax", "delta_norm")
#: Share of a core's scratchpad for queries and results of an attention tile; the rest holds blocks of keys and values.
ATTENTION_SHARE = 2


def map_kernels(trace: Trace, chip: Chip, kernels: Kernels, traffic: Traffic) -> KernelWork:
    """Cost of every kernel of ``trace`` on ``chip``.

    Raises:
        UnsupportedError: the chip lacks a unit, dtype or link that the trace needs.
    """
    work = no_work(trace, kernels)
    if chip.unit("matrix").dataflow == "weight_stationary":
        systolic.add_array_work(trace, chip, kernels, work)
    else:

        def choose(m: int, n: int, k: int, batch: int, dtype: str, _value: int) -> TileWork:
            return product(chip, m=m, n=n, k=k, batch=batch, dtype=dtype)

        add_products(trace, kernels, work, np.zeros(trace.n_ops, dtype=np.int64), choose)
        add_attention(trace, chip, kernels, work, attention)
        add_scans(trace, kernels, work, choose)
    _add_row_hops(trace, chip, kernels, work)
    return finish(trace, chip, kernels, traffic, work)


# --- the network between the cores ------------------------------------------------------------------------------------


def network(chip: Chip) -> Link | None:
    """The link between the cores; None where operands reach every core at no cost."""
    return next((link for link in chip.links if link.scope == "core"), None)


def span(chip: Chip, cores: int) -> int:
    """Hops from a core to the farthest of ``cores`` neighbouring ones, which lie as squarely as the topology allows."""
    link = network(chip)
    if link is None or cores <= 1:
        return 0
    if link.topology == "ring":
        return min(cores - 1, chip.cores // 2)
    if link.topology not in ("mesh", "torus"):
        return 1
    side = _side(cores)
    other = ceil_div(cores, side)
    if link.topology == "torus":
        half = _side(chip.cores) // 2
        return min(side - 1, half) + min(other - 1, half)
    return side + other - 2


def _side(cores: int) -> int:
    """The longer side of the squarest rectangle of at least ``cores`` cores."""
    return math.isqrt(cores - 1) + 1


def crossing(chip: Chip, copies: int, parts: int) -> int:
    """Hops to broadcast to ``copies`` cores and then add up ``parts`` partial sums, on a grid of both.

    On a mesh, torus or ring both together cross the grid once, one along one side and one along the other.
    """
    link = network(chip)
    if link is not None and link.topology in ("mesh", "torus", "ring"):
        return span(chip, copies * parts)
    return span(chip, copies) + span(chip, parts)


def hop_cycles(chip: Chip, hops: int) -> int:
    """Cycles of ``hops`` hops, one after another."""
    link = network(chip)
    return chip.cycles(hops * link.latency_s) if link is not None else 0


def transfer_cycles(chip: Chip, nbytes: int, busy: int, places: int) -> int:
    """Cycles in which ``busy`` of all ``places`` receive ``nbytes`` together: the bandwidth belongs to the cores."""
    link = network(chip)
    if link is None or not nbytes:
        return 0
    return ceil_float(nbytes * places / (busy * link.bytes_per_s / chip.clock_hz))


# --- products ---------------------------------------------------------------------------------------------------------


def places_of(chip: Chip) -> int:
    """Instances of the matrix unit: places for the parts of a grid."""
    return chip.cores * max(chip.unit("matrix").count, 1)


def _cores(chip: Chip, parts: int) -> int:
    """Cores whose instances hold ``parts`` parts."""
    return ceil_div(parts, max(chip.unit("matrix").count, 1))


def pass_cost(chip: Chip, dtype: str, rate: float) -> tuple[float, int]:
    """(cycles, operand bytes) of one pass of one instance, at ``rate`` FLOPs per cycle of the chip; the scratchpad may
    be what holds it up."""
    unit, core, places = chip.unit("matrix"), chip.core_memory, places_of(chip)
    nbytes = ceil_div((unit.rows + unit.cols) * unit.depth * DTYPE_BITS[dtype], 8)
    cycles = 2 * unit.rows * unit.cols * unit.depth * places / rate
    if core is not None:
        cycles = max(cycles, nbytes * places / (core.read_bytes_per_s / chip.clock_hz))
    return cycles, nbytes


def sizes(limit: int) -> tuple[int, ...]:
    """Sides of a grid on offer: powers of two, and ``limit``, which is what the cores or the blocks allow."""
    powers = [1 << bit for bit in range(limit.bit_length())]
    return tuple(dict.fromkeys([*powers, limit]))


def product(chip: Chip, *, m: int, n: int, k: int, batch: int, dtype: str) -> TileWork:
    """Cut ``batch`` products C[m,n] = A[m,k] B[k,n] over a grid of the cores.

    Chosen: the smallest estimate max(passes, network) + hops over grids of rows x columns x parts of the reduction; of
    equal ones the least time on the matrix units and on the network, then the fewest parts in all, of the reduction and
    of the rows.

    Raises:
        UnsupportedError: no unit has a peak for this dtype.
    """
    unit, places, bits = chip.unit("matrix"), places_of(chip), DTYPE_BITS[dtype]
    pass_cycles, pass_bytes = pass_cost(chip, dtype, product_rate(chip, dtype))
    m_blocks, n_blocks, k_blocks = ceil_div(m, unit.rows), ceil_div(n, unit.cols), ceil_div(k, unit.depth)
    best: tuple[tuple[int, ...], TileWork] | None = None
    for pk in sizes(min(k_blocks, places, chip.mapping.max_split_k)):
        k_each = ceil_div(k_blocks, pk)
        deep = ceil_div(k_blocks, k_each)
        for pm in sizes(min(m_blocks, places // deep)):
            m_each = ceil_div(m_blocks, pm)
            down = ceil_div(m_blocks, m_each)
            for pn in sizes(min(n_blocks, places // (deep * down))):
                n_each = ceil_div(n_blocks, pn)
                across = ceil_div(n_blocks, n_each)
                grid = deep * down * across
                together = min(batch, places // grid)
                rounds = ceil_div(batch, together)
                passes = m_each * n_each * k_each
                matrix_cycles = rounds * (unit.startup_cycles + ceil_float(passes * pass_cycles))
                copied = m * k * (across - 1) + k * n * (down - 1)
                nbytes = ceil_div(batch * copied * bits, 8) + batch * m * n * (deep - 1) * ACCUMULATOR_BYTES
                link_cycles = transfer_cycles(chip, nbytes, together * grid, places)
                cores = _cores(chip, grid)
                hops = crossing(chip, ceil_div(cores, deep), min(deep, cores))
                extra_cycles = hop_cycles(chip, hops)
                estimate = max(matrix_cycles, link_cycles) + extra_cycles
                key = (estimate, matrix_cycles, link_cycles, grid, deep, down)
                if best is not None and key >= best[0]:
                    continue
                loaded = m * k * across + k * n * down + m * n
                work = TileWork(
                    tile=(m_each * unit.rows, n_each * unit.cols),
                    split=deep,
                    depth=unit.depth,
                    items=batch * grid,
                    waves=rounds,
                    steps=rounds * passes,
                    matrix_cycles=matrix_cycles,
                    cache_bytes=ceil_div(batch * (m * k + k * n + m * n) * bits, 8),
                    core_bytes=batch * grid * passes * pass_bytes + ceil_div(batch * loaded * bits, 8),
                    extra_cycles=extra_cycles,
                    link_cycles=link_cycles,
                )
                best = (key, work)
    assert best is not None, "a grid of one part is always tried"
    return best[1]


# --- attention --------------------------------------------------------------------------------------------------------


def attention(
    chip: Chip, *, batch: int, m: int, n: int, head_dim: int, heads: int, kv_heads: int, position: int, pairs: int,
    dtype: str, kv_bytes: int, usable_cache_bytes: int,
) -> AttentionWork:  # fmt: skip
    """Map flash attention of ``m`` query rows over ``n`` keys for each of ``batch`` sequences; arguments as those of
    :func:`ttt_sim.lower.tiles.attention`.

    A tile holds rows of all query heads that share a KV head, no more than a scratchpad holds, and visits blocks of as
    many keys as the longer of the unit's columns and depth; its keys may be split over cores, whose parts are then
    combined. Chosen as for products, of equal ones the smallest split of the keys, then the largest tile.
    """
    unit, places, bits = chip.unit("matrix"), places_of(chip), DTYPE_BITS[dtype]
    group, chains, keys = heads // kv_heads, batch * kv_heads, max(unit.cols, unit.depth)
    rate = product_rate(chip, dtype, sustained=False) * attention_share(chip, dtype)
    pass_cycles, pass_bytes = pass_cost(chip, dtype, rate)
    key_passes = ceil_div(keys, unit.cols) * ceil_div(head_dim, unit.depth)
    key_passes += ceil_div(head_dim, unit.cols) * ceil_div(keys, unit.depth)
    rows = group * m
    most_rows = rows
    if chip.core_memory is not None:
        row_bytes = ceil_div(head_dim * bits, 8) + head_dim * ACCUMULATOR_BYTES
        most_rows = max(chip.core_memory.capacity_bytes // (ATTENTION_SHARE * row_bytes), 1)
    rows_bytes = ceil_div(batch * heads * m * head_dim * bits, 8)
    kv_row_bytes = ceil_div(kv_bytes, max(1, chains * n))
    head_bytes = ceil_div(kv_bytes, chains)

    best: tuple[tuple[int, ...], AttentionWork] | None = None
    offered = sizes(min(ceil_div(rows, unit.rows), max(places // chains, 1)))
    for tile_rows in dict.fromkeys(min(ceil_div(rows, parts), most_rows) for parts in offered):
        tiles = ceil_div(rows, tile_rows)
        blocks = visited_blocks(*visible_keys(group, tile_rows, m=m, n=n, position=position, pairs=pairs), keys)
        block_total, longest = int(blocks.sum()) * chains, int(blocks.max())
        block_passes = ceil_div(tile_rows, unit.rows) * key_passes
        shared = ceil_float(block_total * block_passes * pass_cycles / places)
        sweeps = ceil_div(tiles, places)
        fits = head_bytes * min(chains, ceil_div(places, tiles)) <= usable_cache_bytes
        copied = max(block_total * keys * kv_row_bytes - kv_bytes, 0) if tiles > 1 else 0
        for split in sizes(min(longest, chip.library.max_split, max(places // (tiles * chains), 1))):
            part = ceil_float(ceil_div(longest, split) * block_passes * pass_cycles)
            matrix_cycles = unit.startup_cycles + max(part, shared)
            items = tiles * chains * split
            sums = batch * heads * m * (head_dim + 2) * ACCUMULATOR_BYTES
            nbytes = copied + (split - 1) * (rows_bytes + sums)
            link_cycles = transfer_cycles(chip, nbytes, min(items, places), places)
            grid = _cores(chip, min(tiles * split, places))
            extra_cycles = hop_cycles(chip, span(chip, grid) + span(chip, _cores(chip, split)))
            estimate = max(matrix_cycles, link_cycles) + extra_cycles
            key = (estimate, matrix_cycles, link_cycles, split, -tile_rows)
            if best is not None and key >= best[0]:
                continue
            work = AttentionWork(
                tile=(tile_rows, keys),
                split=split,
                depth=keys,
                items=items,
                waves=ceil_div(items, places),
                steps=max(1, ceil_div(block_total, min(items, places))),
                matrix_cycles=matrix_cycles,
                cache_bytes=2 * rows_bytes + sweeps * kv_bytes,
                core_bytes=block_total * block_passes * pass_bytes + 2 * rows_bytes,
                extra_cycles=extra_cycles,
                link_cycles=link_cycles,
                padded_pairs=block_total * tile_rows * keys,
                kv_passes=1 if fits else sweeps,
                heads_per_tile=group,
            )
            best = (key, work)
    assert best is not None, "one tile for all rows, or as many as fit a scratchpad, is always tried"
    return best[1]


# --- row-wise ops -----------------------------------------------------------------------------------------------------


def _add_row_hops(trace: Trace, chip: Chip, kernels: Kernels, work: Work) -> None:
    """Ops that reduce over rows: a reduction and a broadcast over the cores that hold a row."""
    if network(chip) is None:
        return
    kinds = [KIND[name] for name in REDUCING]
    for op in np.flatnonzero(np.isin(trace.kind, kinds)):
        rows, width = int(trace.batch[op] * trace.m[op]), int(trace.n[op])
        if trace.kind[op] == KIND["delta_norm"]:
            rows, width = int(trace.batch[op]), int(trace.m[op]) * width
        hops = 2 * span(chip, row_cores(chip, rows, width))
        work["extra"][kernels.of_op[op]] += hop_cycles(chip, hops)


def row_cores(chip: Chip, rows: int, width: int) -> int:
    """Cores that hold one of ``rows`` rows of ``width`` elements: their share of the cores, but no more than can give
    all vector lanes of a core an element."""
    lanes = 1.0
    if chip.has_unit("vector"):
        unit = chip.unit("vector")
        dtype = "fp32" if "fp32" in unit.peak_per_s else next(iter(unit.peak_per_s))
        lanes = max(flops_per_cycle(chip, unit, dtype) / chip.cores, 1.0)
    return max(min(chip.cores // max(rows, 1), ceil_float(width / lanes)), 1)
