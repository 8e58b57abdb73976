"""Tiles of GEMMs and attention cores, against counts by brute force; what a chip cannot run."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, chip, gemm_trace, residual_trace
from ttt_sim.chip import Chip
from ttt_sim.errors import CapacityError, ConfigError, WorkloadError
from ttt_sim.lower import lower
from ttt_sim.lower.tiles import attention, flops_per_cycle, gemm, window_of
from ttt_sim.workload.closed_forms import visible_pairs


def only_tile(side: int) -> dict[int, Chip]:
    """tiny_gpu with one square tile on its menu, by largest split."""
    out = {}
    for split in (1, 2, 4):
        base = chip(mapping__max_split_k=split)
        matrix = replace(base.unit("matrix"), tiles=((side, side),))
        out[split] = replace(base, units=(matrix, *(unit for unit in base.units if unit.kind != "matrix")))
    return out


def test_each_operand_is_loaded_once_per_tile_that_needs_it():
    # 96 x 160 x 64 in 32 x 32 tiles: 3 x 5 of them. A (96 x 64) passes once per column of tiles, B (64 x 160) once
    # per row.
    work = gemm(only_tile(32)[1], m=96, n=160, k=64, batch=1, dtype="bf16", main_cycles=0)
    assert (work.tile, work.items) == ((32, 32), 15)
    assert work.cache_bytes == 2 * (96 * 64 * 5 + 64 * 160 * 3 + 96 * 160)


@pytest.mark.parametrize("multicast", [1, 2, 4])
def test_multicast_shares_the_operand_that_saves_more(multicast):
    shared = chip(mapping__multicast=multicast, mapping__max_split_k=1)
    work = gemm(shared, m=256, n=128, k=64, batch=2, dtype="bf16", main_cycles=10**9)
    rows, cols = work.tile
    down, across = -(-256 // rows), -(-128 // cols)
    loads = [
        256 * 64 * -(-across // a) + 64 * 128 * -(-down // b) for a, b in ((multicast, 1), (1, multicast))
    ]  # fmt: skip
    assert work.cache_bytes == 2 * 2 * (min(loads) + 256 * 128)


@pytest.mark.parametrize(
    ("m", "n", "k", "batch"),
    [(1, 1, 1, 1), (1, 4096, 4096, 1), (17, 33, 65, 3), (512, 512, 64, 1), (64, 64, 8192, 1), (100, 1000, 10, 2)],
)
def test_matrix_time_is_never_below_the_useful_work(m, n, k, batch):
    tiny = chip()
    work = gemm(tiny, m=m, n=n, k=k, batch=batch, dtype="bf16", main_cycles=0)
    assert work.matrix_cycles * flops_per_cycle(tiny, tiny.unit("matrix"), "bf16") >= 2 * batch * m * n * k
    assert work.waves == -(-work.items // tiny.cores)


def test_the_choice_is_the_best_of_the_menu():
    # Every (tile, split) of the menu in turn, as the only one on offer: none is estimated below the choice from the
    # whole menu.
    def estimate(menu_chip, **shape):
        work = gemm(menu_chip, dtype="bf16", **shape)
        cache = -(-work.cache_bytes // 256)
        return max(work.matrix_cycles, cache, shape["main_cycles"])

    shapes = [
        dict(m=m, n=n, k=k, batch=1, main_cycles=c)
        for m, n, k, c in product((1, 64, 200), (64, 300), (64, 1024), (0, 3000))
    ]
    for shape in shapes:
        best = estimate(chip(), **shape)
        for side in (64, 32, 16):
            only = only_tile(side)
            for split in (1, 2, 4):
                assert best <= estimate(only[split], **shape)


@pytest.mark.parametrize("main_cycles", [0, 10**6])
@pytest.mark.parametrize(("m", "n", "k"), list(product((1, 16, 64, 200), (64, 300, 1024), (64, 1024))))
def test_of_equal_estimates_the_least_busy_then_the_largest_then_the_least_split(m, n, k, main_cycles):
    """Every (tile, split) in turn, counted from its definition. 10^6 cycles of main memory make all of them equal.

    tiny_gpu: 4 cores of 256 FLOPs and 128 scratchpad bytes a cycle, cache 256 bytes, steps of 64 elements, no launches.
    """
    choices = []
    for side, split in product((64, 32, 16), (1, 2, 4)):
        depth = -(-k // 64)
        if split > 1 and depth < 2 * split:
            continue
        down, across = -(-m // side), -(-n // side)
        # A step computes for 2 side^2 64 / 256 cycles, longer than it loads; then the tile is stored.
        tile = -(-depth // split) * side * side // 2 + side * side * (4 if split > 1 else 2) // 128
        matrix = max(tile, -(-down * across * split * tile // 4))
        cache = 2 * (m * k * across + k * n * down + m * n) + (2 * split * 4 * m * n if split > 1 else 0)
        busy = max(matrix, -(-cache // 256))
        choices.append((max(busy, main_cycles), busy, -side, split))
    _, busy, side, split = min(choices)
    work = gemm(chip(), m=m, n=n, k=k, batch=1, dtype="bf16", main_cycles=main_cycles)
    assert (work.tile, work.split) == ((-side, -side), split)
    assert max(work.matrix_cycles, -(-work.cache_bytes // 256)) == busy


def test_equal_choices_are_taken_unsplit():
    # Without a scratchpad nothing is stored: four tiles of 16 x 16 with 16 steps of 128 take 2048 whole, in halves and
    # in quarters (8 items of 1024, 16 of 512), a tile of 64 x 64 in quarters 4 * 2048. The cache takes 2 * (16 * 1024 *
    # 4 + 1024 * 64 + 16 * 64) / 256 = 1032 and in quarters 2 * 4 * 16 * 64 * 4 / 256 = 128 more.
    base = chip()
    bare = replace(base, memories=tuple(level for level in base.memories if level.scope == "chip"))
    work = gemm(bare, m=16, n=64, k=1024, batch=1, dtype="bf16", main_cycles=10**6)
    assert (work.tile, work.split, work.matrix_cycles) == ((16, 16), 1, 2048)


# --- attention --------------------------------------------------------------------------------------------------------


def blocks_by_hand(*, m: int, before: int, group: int, window: int | None) -> int:
    """128-key blocks that hold a key visible to some row of a tile, over the tiles of one KV head: row by row."""
    rows = [query for query in range(m) for _ in range(group)]  # query rows of the heads of a group lie together
    size = 64 if len(rows) <= 64 else 128
    total = 0
    for first in range(0, len(rows), size):
        seen = set()
        for query in rows[first : first + size]:
            last = before + query
            oldest = 0 if window is None else max(0, last - window + 1)
            seen |= set(range(oldest // 128, last // 128 + 1))
        total += len(seen)
    return total


@pytest.mark.parametrize("window", [None, 1, 64, 100, 128, 300])
@pytest.mark.parametrize(("m", "before"), [(1, 0), (1, 500), (7, 130), (64, 0), (200, 0), (256, 333)])
@pytest.mark.parametrize("group", [1, 4])
def test_attention_visits_the_blocks_that_hold_visible_keys(window, m, before, group):
    stored = before if window is None else min(before, window - 1)
    pairs = visible_pairs(m, before, window)
    work = attention(
        chip(), batch=2, m=m, n=stored + m, head_dim=16, heads=2 * group, kv_heads=2, position=before, pairs=pairs,
        dtype="bf16", kv_bytes=2 * 2 * 2 * (stored + m) * 2 * 16, usable_cache_bytes=1 << 20,
    )  # fmt: skip
    # Blocks are cut from the oldest key that is kept, so the rows before it do not count.
    expected = 2 * 2 * blocks_by_hand(m=m, before=stored, group=group, window=window)
    assert work.padded_pairs == expected * work.tile[0] * 128
    assert work.padded_pairs >= 2 * 2 * group * pairs


@pytest.mark.parametrize("position", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("m", [1, 2, 64, 500])
def test_window_of_inverts_the_pair_count(position, m):
    for window in {1, 2, 63, 64, 65, 700, position + m}:
        if window > position + m:
            continue
        kept = min(position, window - 1) + m
        assert window_of(position=position, m=m, n=kept, pairs=visible_pairs(m, position, window)) == window


def test_pairs_that_no_window_gives():
    with pytest.raises(WorkloadError, match="attention of 4 rows after 10 over 14 keys cannot have 3 visible pairs"):
        window_of(position=10, m=4, n=14, pairs=3)


# --- what a chip cannot run -------------------------------------------------------------------------------------------


def test_no_tile_fits():
    # The smallest tile needs (16 + 16) * 128 B = 4 KiB twice.
    gemm(chip(memories__scratchpad__capacity="8 KiB"), m=16, n=16, k=16, batch=1, dtype="bf16", main_cycles=0)
    with pytest.raises(CapacityError, match=r"no tile of unit tensor_core fits the scratchpad of a core"):
        gemm(chip(memories__scratchpad__capacity="8191 B"), m=16, n=16, k=16, batch=1, dtype="bf16", main_cycles=0)


def test_unknown_dtype_names_the_known_ones():
    t = HandTrace()
    t.weight("a", 64)
    t.tensor("c", 64)
    t.op("down_proj", m=4, n=4, k=4, reads=[("a", 0, 64)], writes=[("c", 0, 64)], dtype="fp16")
    with pytest.raises(ConfigError, match="tensor_core has no peak for dtype fp16; the chip file lists bf16, fp8"):
        lower(t.build(), chip())


def test_vector_work_needs_a_vector_unit():
    base = chip()
    without = replace(base, units=tuple(unit for unit in base.units if unit.kind == "matrix"))
    with pytest.raises(ConfigError, match="needs a vector unit and the chip has none"):
        lower(residual_trace(), without)
    lower(gemm_trace(16, 16, 16), without)


def test_detail_has_a_least_value():
    with pytest.raises(ConfigError, match="detail is 15, expected at least 16"):
        lower(residual_trace(), chip(), detail=15)


def test_fp8_doubles_the_rate_and_halves_the_bytes():
    tiny = chip()
    half, full = (
        gemm(tiny, m=128, n=128, k=1024, batch=1, dtype=dtype, main_cycles=0) for dtype in ("fp8", "bf16")
    )  # fmt: skip
    # 8 steps of 2 * 64 * 64 * 128 / 512 = 2048 and 64 * 64 / 128 to store, against 16 steps and 64
    assert (half.matrix_cycles, full.matrix_cycles) == (8 * 2048 + 32, 16 * 2048 + 64)
    assert 2 * half.cache_bytes == full.cache_bytes


def test_batched_products_do_not_share_operands():
    tiny = chip()
    one, four = (gemm(tiny, m=64, n=64, k=64, batch=b, dtype="bf16", main_cycles=0) for b in (1, 4))
    assert four.items == 4 * -(-64 // four.tile[0]) * -(-64 // four.tile[1])
    rows_and_columns = np.array([64 * 64 * -(-64 // four.tile[1]), 64 * 64 * -(-64 // four.tile[0]), 64 * 64])
    assert four.cache_bytes == 4 * 2 * rows_and_columns.sum()
    assert one.items == -(-64 // one.tile[0]) * -(-64 // one.tile[1])
