"""How one GEMM or one attention core is cut into tiles on a tile-and-wave chip. Scalars only.

Every choice is made by comparing the tile menu of the chip file on the same estimate; nothing is tabulated by shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ttt_sim.chip import Chip, ComputeUnit
from ttt_sim.dtypes import DTYPE_BITS
from ttt_sim.errors import CapacityError, UnsupportedError, WorkloadError
from ttt_sim.ops import IntArray
from ttt_sim.units import ceil_div, format_bytes

#: One step of a tile loads this many bytes along the reduction for each of its rows and columns: one line of a swizzled
#: scratchpad on current tensor-core GPUs. Deeper reductions take several steps.
STEP_BYTES = 128
#: Stages of operands that a tile keeps in its core's scratchpad: one being used, one being filled.
STAGES = 2
#: Bytes of an accumulator element (fp32), for partial sums of a split reduction.
ACCUMULATOR_BYTES = 4
#: Query rows and keys of an attention tile; rows of the query heads that share a KV head are packed together.
ATTENTION_KEYS = 128
#: A tile of this many outputs reuses its operands enough; smaller ones fall behind (``small_tile_loss``).
FULL_TILE = 128 * 128
#: Of the splits that are allowed, the smallest within this share of the best fill of the cores is taken.
GOOD_FILL = 0.85
#: Packing heads into tiles to save padding must save this share of the rows.
PACKING_GAIN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TileWork:
    """What one tiled op costs. ``cache_bytes`` move between the shared cache and the cores.

    ``tile`` (rows, columns); ``split`` parts of the reduction (with ``splits_rows``: of the rows that stream, which the
    tile has already), ``depth`` elements of the reduction per pipeline step; ``items`` tiles x splits x batch;
    ``waves`` rounds over the cores, rounded up; ``steps`` pipeline steps that the whole op takes on the chip;
    ``matrix_cycles`` of the matrix units together, padding and idle cores included; ``core_bytes`` move inside the
    cores' scratchpads; ``extra_cycles``: kernels around it (adding the parts of a split reduction or joining those of
    split keys, regrouping queries), or hops between cores; ``link_cycles`` of the network between the cores.
    """

    tile: tuple[int, int]
    split: int
    depth: int
    items: int
    waves: int
    steps: int
    matrix_cycles: int
    cache_bytes: int
    core_bytes: int
    extra_cycles: int = 0
    link_cycles: int = 0
    splits_rows: bool = False

    @property
    def reduction_parts(self) -> int:
        """Parts of the reduction that different cores sum."""
        return 1 if self.splits_rows else self.split


def ceil_float(value: float) -> int:
    """The smallest integer that is not below ``value``."""
    whole = int(value)
    return whole if whole == value else whole + 1


def flops_per_cycle(chip: Chip, unit: ComputeUnit, dtype: str, *, sustained: bool = True) -> float:
    """Chip-wide FLOPs (or lane operations) per cycle of ``unit`` for operands of ``dtype``.

    Raises:
        UnsupportedError: the unit has no peak for this dtype.
    """
    if dtype not in unit.peak_per_s:
        known = ", ".join(sorted(unit.peak_per_s))
        raise UnsupportedError(
            f"{chip.name}: unit {unit.name} has no peak for dtype {dtype}; the chip file lists {known}"
        )
    share = unit.efficiency.get(dtype, 1.0) if sustained else 1.0
    return unit.peak_per_s[dtype] * share / chip.clock_hz


def product_rate(chip: Chip, dtype: str, *, sustained: bool = True) -> float:
    """Chip-wide FLOPs per cycle of matrix products of ``dtype``; fp32 runs on vector lanes where the matrix units do
    not have it, a multiply-add per lane and cycle.

    Raises:
        UnsupportedError: no unit has a peak for this dtype.
    """
    unit = chip.unit("matrix")
    if dtype not in unit.peak_per_s and dtype == "fp32" and chip.has_unit("vector"):
        lanes = chip.unit("vector")
        if dtype in lanes.peak_per_s:
            return 2 * flops_per_cycle(chip, lanes, dtype, sustained=sustained)
    return flops_per_cycle(chip, unit, dtype, sustained=sustained)


def attention_share(chip: Chip, dtype: str) -> float:
    """Share of the peak of the matrix units that attention sustains: no more than their own products do."""
    return min(chip.unit("matrix").efficiency.get(dtype, 1.0), chip.mapping.attention_efficiency)


def gemm(chip: Chip, *, m: int, n: int, k: int, batch: int, dtype: str, main_cycles: int) -> TileWork:
    """Cut ``batch`` products C[m,n] = A[m,k] B[k,n]; ``main_cycles`` is what their main-memory traffic takes.

    Chosen: the smallest estimate max(matrix units, shared cache, main memory) over the menu and over splits of the
    reduction by powers of two. Of equal estimates, the one with least time on matrix units and cache, then the larger
    tile, then the smaller split.

    Raises:
        CapacityError: not even the smallest tile fits the scratchpad of a core twice.
    """
    unit = chip.unit("matrix")
    element_bits = DTYPE_BITS[dtype]
    rate = product_rate(chip, dtype) / chip.cores
    step_depth = max(unit.depth, STEP_BYTES * 8 // element_bits)
    core = chip.core_memory
    core_rate = core.read_bytes_per_s / chip.clock_hz / chip.cores if core else 0.0
    cache_rate = chip.cache.read_bytes_per_s / chip.clock_hz if chip.cache else 0.0
    depth_steps = ceil_div(k, step_depth)

    best: tuple[tuple[int, int, int, int], TileWork] | None = None
    for rows, cols in both_ways_round(unit.tiles or ((unit.rows, unit.cols),)):
        step_bytes = ceil_div((rows + cols) * step_depth * element_bits, 8)
        if core is not None and STAGES * step_bytes > core.capacity_bytes:
            continue
        multiply = 2 * rows * cols * step_depth / rate * small_tile_factor(rows * cols, chip.library.small_tile_loss)
        step_cycles = ceil_float(max(multiply, step_bytes / core_rate if core_rate else 0.0))
        tiles = ceil_div(m, rows) * ceil_div(n, cols) * batch
        operand_bytes = _operand_bytes(chip, m, n, k, rows, cols, batch, element_bits)
        split = 1
        while split <= chip.mapping.max_split_k and (split == 1 or depth_steps >= 2 * split):
            steps_each = ceil_div(depth_steps, split)
            out_bytes = rows * cols * (ACCUMULATOR_BYTES if split > 1 else ceil_div(element_bits, 8))
            drain = ceil_float(out_bytes / (core_rate * chip.library.drain_frac)) if core_rate else 0
            tile_cycles = unit.startup_cycles + steps_each * step_cycles + drain
            items = tiles * split
            waves = ceil_div(items, chip.cores)
            if chip.mapping.persistent:
                matrix_cycles = max(tile_cycles, ceil_div(items * tile_cycles, chip.cores))
            else:
                matrix_cycles = waves * tile_cycles
            cache_bytes = operand_bytes + ceil_div(batch * m * n * element_bits, 8)
            if split > 1:  # partial sums are written, then read by the reduction
                cache_bytes += 2 * split * batch * m * n * ACCUMULATOR_BYTES
            cache_cycles = ceil_float(cache_bytes / cache_rate) if cache_rate else 0
            reduction = reduction_cycles(chip) if split > 1 else 0
            estimate = max(matrix_cycles, cache_cycles, main_cycles) + reduction
            key = (estimate, max(matrix_cycles, cache_cycles), -rows * cols, split)
            if best is None or key < best[0]:
                work = TileWork(
                    tile=(rows, cols),
                    split=split,
                    depth=step_depth,
                    items=items,
                    waves=waves,
                    steps=max(1, waves * steps_each),
                    matrix_cycles=matrix_cycles,
                    cache_bytes=cache_bytes,
                    core_bytes=2 * items * steps_each * step_bytes,
                    extra_cycles=reduction,
                )
                best = (key, work)
            split *= 2
    if best is None:
        raise CapacityError(
            f"{chip.name}: no tile of unit {unit.name} fits the scratchpad of a core "
            f"({format_bytes(core.capacity_bytes) if core else 'none'}) {STAGES} times"
        )
    return best[1]


def _operand_bytes(chip: Chip, m: int, n: int, k: int, rows: int, cols: int, batch: int, element_bits: int) -> int:
    """Bytes that all tiles load: A once per column of tiles, B once per row; nothing beyond the matrix's edge.

    ``multicast`` neighbouring cores share one operand, along whichever side saves more.
    """
    down, across = ceil_div(m, rows), ceil_div(n, cols)
    share = chip.mapping.multicast
    elements = min(
        m * k * ceil_div(across, share) + n * k * down,
        m * k * across + n * k * ceil_div(down, share),
    )
    return ceil_div(batch * elements * element_bits, 8)


def both_ways_round(tiles: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The menu, and each tile turned: a library may compute the transposed product from swapped operands."""
    return tuple(dict.fromkeys([*tiles, *((cols, rows) for rows, cols in tiles)]))


def small_tile_factor(outputs: int, loss: float) -> float:
    """How much longer than its share of the peak a tile of this many outputs takes."""
    if outputs >= FULL_TILE:
        return 1.0
    return 1.0 + loss * (math.sqrt(FULL_TILE / outputs) - 1.0)


def reduction_cycles(chip: Chip) -> int:
    """Fixed time of the kernel that adds the parts of a split reduction."""
    return chip.cycles(chip.overheads.op_launch_s) + chip.library.reduction_cycles


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWork(TileWork):
    """``padded_pairs``: query-key pairs that the tiles visit, all heads and sequences, masked corners included.

    ``kv_passes``: how often the keys and values of one head stream from main memory; ``heads_per_tile``: query heads
    whose rows a tile holds.
    """

    padded_pairs: int
    kv_passes: int
    heads_per_tile: int


def attention(
    chip: Chip, *, batch: int, m: int, n: int, head_dim: int, heads: int, kv_heads: int, position: int, pairs: int,
    dtype: str, kv_bytes: int, usable_cache_bytes: int,
) -> AttentionWork:  # fmt: skip
    """Cut flash attention of ``m`` query rows over ``n`` keys for each of ``batch`` sequences.

    A tile holds rows of one query head, or of all that share one KV head (packed), visits key blocks up to its own last
    row (causal), or only those inside the window, and never stores scores. With too few tiles to fill the cores the
    keys are split over cores and the parts combined. ``kv_bytes`` is what one pass over keys and values of all
    sequences moves; ``position`` and ``pairs`` (per sequence) tell the window; ``m n`` pairs mean no mask.
    """
    rules, group = chip.library, heads // kv_heads
    packed = _packs_heads(chip, m, group)
    per_tile, chains = (group, batch * kv_heads) if packed else (1, batch * heads)
    tile_rows = _attention_rows(chip, per_tile * m)
    tiles = ceil_div(per_tile * m, tile_rows)  # per chain: a sequence and (KV) head
    start, end = visible_keys(per_tile, tile_rows, m=m, n=n, position=position, pairs=pairs)
    blocks = visited_blocks(start, end, ATTENTION_KEYS)
    block_total = int(blocks.sum()) * chains
    items = tiles * chains
    splittable = rules.attention_packing != "single" or (packed and group > 1)
    split = _key_split(chip, items, int(blocks.max())) if splittable else 1
    padded_pairs = block_total * tile_rows * ATTENTION_KEYS

    rate = product_rate(chip, dtype, sustained=False) * attention_share(chip, dtype)
    block = 4 * head_dim * tile_rows * ATTENTION_KEYS * chip.cores / rate
    if rules.softmax_exposed and chip.has_unit("special"):
        special = chip.unit("special")
        special_rate = special.peak_per_s[next(iter(special.peak_per_s))] / chip.clock_hz / chip.cores
        block += rules.softmax_exposed * tile_rows * ATTENTION_KEYS / special_rate
    element_bits = DTYPE_BITS[dtype]
    rows_bytes = ceil_div(batch * heads * m * head_dim * element_bits, 8)
    kv_row_bytes = ceil_div(kv_bytes, max(1, batch * kv_heads * n))
    fetch = rules.core_fetch_bytes_per_cycle
    key_cycles = kv_row_bytes / fetch if fetch else 0.0  # a core waits for its keys and values at least this long
    begin = rules.attention_start_cycles
    if m == 1:
        begin = rules.decode_start_cycles + per_tile * rules.decode_row_cycles
    lengths = [
        begin + ceil_float(max(block * part, key_cycles * keys))
        for part, keys in zip(_parts(blocks, split), _parts(end - start, split), strict=True)
    ]
    busy = _makespan(chip, lengths, chains)
    streamed = block_total * ATTENTION_KEYS * kv_row_bytes
    combine = 2 * split * batch * heads * m * (head_dim + 2) * ACCUMULATOR_BYTES if split > 1 else 0
    head_bytes = ceil_div(kv_bytes, batch * kv_heads)
    fits = head_bytes * min(batch * kv_heads, ceil_div(chip.cores, tiles)) <= usable_cache_bytes
    extra = rules.attention_setup_cycles + reduction_of_split(chip, split)
    if m == 1 and group > 1 and kv_heads > 1 and batch > 1:
        extra += rules.regroup_cycles
    return AttentionWork(
        tile=(tile_rows, ATTENTION_KEYS),
        split=split,
        depth=ATTENTION_KEYS,
        items=items * split,
        waves=ceil_div(items * split, chip.cores),
        steps=max(1, ceil_div(block_total, chip.cores)),
        matrix_cycles=max(ceil_float(4 * head_dim * padded_pairs / rate), busy),
        cache_bytes=2 * rows_bytes + streamed + combine,
        core_bytes=2 * (2 * rows_bytes + streamed),
        padded_pairs=padded_pairs,
        kv_passes=1 if fits else ceil_div(tiles, chip.cores),
        heads_per_tile=per_tile,
        extra_cycles=extra,
    )


def visible_keys(
    per_tile: int, tile_rows: int, *, m: int, n: int, position: int, pairs: int
) -> tuple[IntArray, IntArray]:
    """First key, and the key after the last, that any row of each tile of one chain sees, (tiles,) each.

    A tile holds ``tile_rows`` rows, ``per_tile`` heads of a query side by side; ``m n`` pairs mean no mask, any fewer a
    causal one with the window that gives that many, or none where the rows are the last of ``n`` that are all seen,
    whatever came before.
    """
    tiles = ceil_div(per_tile * m, tile_rows)
    if pairs == m * n:
        return np.zeros(tiles, dtype=np.int64), np.full(tiles, n, dtype=np.int64)
    if pairs == m * (n - m) + m * (m + 1) // 2:
        position = n - m
    last_row = np.minimum(np.arange(1, tiles + 1, dtype=np.int64) * tile_rows, per_tile * m)
    last_query = (last_row - 1) // per_tile
    first_query = (np.arange(tiles, dtype=np.int64) * tile_rows) // per_tile
    window = window_of(position=position, m=m, n=n, pairs=pairs)
    return np.maximum(n - m + first_query - window + 1, 0), n - m + last_query + 1


def visited_blocks(start: IntArray, end: IntArray, keys: int) -> IntArray:
    """Blocks of ``keys`` keys that hold a key from ``start`` up to ``end``."""
    return (end + keys - 1) // keys - start // keys


def reduction_of_split(chip: Chip, split: int) -> int:
    """The kernel that joins the parts of split keys."""
    if split == 1:
        return 0
    rules = chip.library
    return chip.cycles(chip.overheads.op_launch_s) + rules.combine_cycles + split * rules.combine_split_cycles


def _attention_rows(chip: Chip, rows: int) -> int:
    """The tile for few rows if it holds all of them, else the usual one."""
    rules = chip.library
    return rules.attention_short_rows if rows <= rules.attention_short_rows else rules.attention_rows


def _packs_heads(chip: Chip, m: int, group: int) -> bool:
    """Whether the query heads that share a KV head share tiles."""
    packing = chip.library.attention_packing
    if packing == "single":
        return m == 1
    if packing == "padding":
        alone, together = _attention_rows(chip, m), _attention_rows(chip, group * m)
        return ceil_div(group * m, together) * together < (1 - PACKING_GAIN) * group * ceil_div(m, alone) * alone
    return True


def _key_split(chip: Chip, items: int, blocks: int) -> int:
    """Parts that the keys of a tile are split into: enough to fill the cores, no more than blocks."""
    rules = chip.library
    if items >= chip.cores * rules.split_fill:
        return 1
    most = min(blocks, rules.max_split, ceil_div(2 * chip.cores, items))
    if rules.split_fill >= 1:
        return min(ceil_div(chip.cores, items), blocks, rules.max_split)

    def fill(split: int) -> float:
        rounds = ceil_div(items * split, chip.cores)
        return items * split / (rounds * chip.cores)

    best = max(fill(split) for split in range(1, most + 1))
    return next(split for split in range(1, most + 1) if fill(split) >= GOOD_FILL * best)


def _parts(amounts: IntArray, split: int) -> list[int]:
    """Blocks, or keys, of every part of every tile of one chain; parts of a tile differ by one at most."""
    if split == 1:
        return [int(amount) for amount in amounts]
    return [(int(amount) + part) // split for amount in amounts for part in range(split)]


def _makespan(chip: Chip, lengths: list[int], chains: int) -> int:
    """Cycles in which the cores finish ``chains`` times the tiles of these ``lengths``.

    Persistent kernels and in-order launches both keep cores busy until tiles run out. Longest first: whole rounds of
    equal tiles, and what is left over goes to the least busy cores. Otherwise a share of the longest tile
    (``attention_tail``) runs at the end, when other cores are idle.
    """
    cores, tail = chip.cores, chip.library.attention_tail
    longest, work = max(lengths), sum(lengths) * chains
    if tail:
        rounds = ceil_div(len(lengths) * chains, cores)
        return max(longest, min(ceil_float(work / cores + tail * longest), rounds * longest))
    count: dict[int, int] = {}
    for length in lengths:
        count[length] = count.get(length, 0) + chains
    load = np.zeros(cores, dtype=np.int64)
    for length in sorted(count, reverse=True):
        rounds, left = divmod(count[length], cores)
        load += rounds * length
        if left:
            load = np.sort(load, kind="stable")
            load[:left] += length
    return int(load.max())


def window_of(*, position: int, m: int, n: int, pairs: int) -> int:
    """The sliding window that gives ``pairs`` visible query-key pairs to ``m`` rows after ``position`` rows.

    ``pairs`` = sum over i = 1..m of min(window, position + i), which grows with the window, so it can be searched.

    Raises:
        WorkloadError: no window gives that many pairs.
    """

    def pairs_of(window: int) -> int:
        short = min(max(window - position, 0), m)  # rows that see fewer keys than the window
        return short * position + short * (short + 1) // 2 + (m - short) * window

    low, high = 1, position + m
    while low < high:
        middle = (low + high) // 2
        if pairs_of(middle) < pairs:
            low = middle + 1
        else:
            high = middle
    if pairs_of(low) != pairs or n != min(position + m, low - 1 + m):
        raise WorkloadError(
            f"attention of {m} rows after {position} over {n} keys cannot have {pairs} visible pairs per sequence"
        )
    return low
