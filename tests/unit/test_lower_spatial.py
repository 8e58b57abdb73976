"""Products, attention and hops on spatial arrays, worked out by hand.

tiny_spatial: a 4 x 4 mesh of cores. A pass of 8 x 8 x 8 takes 8 cycles (its 256 bytes leave the scratchpad in 4), and a
part 4 more to fill and drain; the network carries 32 bytes a cycle into each core, 512 in all, and a hop takes 2
cycles; a core has 4 vector lanes. The main memory is SRAM: 1024 bytes a cycle out of it, 512 into it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, chip, gemm_trace
from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.errors import ConfigError
from ttt_sim.grid import make_point
from ttt_sim.lower import lower
from ttt_sim.lower.static_dataflow import attention, crossing, product, row_cores, sizes, span
from ttt_sim.lower.tiles import AttentionWork, TileWork
from ttt_sim.lower.work import CACHE, LINK, MATRIX, READ, WRITE
from ttt_sim.ops import Trace
from ttt_sim.simulation import simulate_point
from ttt_sim.workload import CONTEXT_METHODS


def tiny(**overrides: str | float | int) -> Chip:
    return chip("tiny_spatial", **overrides)


def unconnected() -> Chip:
    """Operands reach every core at no cost."""
    return replace(tiny(), links=())


def mapped(m: int, n: int, k: int, *, batch: int = 1, dtype: str = "bf16", on: Chip | None = None) -> TileWork:
    return product(on or tiny(), m=m, n=n, k=k, batch=batch, dtype=dtype)


def attend(
    m: int, n: int, *, heads: int = 1, kv_heads: int = 1, batch: int = 1, on: Chip | None = None, cached: bool = False
) -> AttentionWork:
    """Causal attention with heads of 16."""
    position = n - m
    return attention(
        on or tiny(), batch=batch, m=m, n=n, head_dim=16, heads=heads, kv_heads=kv_heads, position=position,
        pairs=m * position + m * (m + 1) // 2, dtype="bf16", kv_bytes=batch * kv_heads * n * 16 * 2 * 2,
        usable_cache_bytes=1 << 20 if cached else 0,
    )  # fmt: skip


def norm_trace(kind: str, *, m: int, n: int, batch: int = 1) -> Trace:
    t = HandTrace()
    nbytes = 2 * batch * m * n
    t.weight("x", nbytes)
    t.tensor("y", nbytes)
    t.op(kind, batch=batch, m=m, n=n, reads=[("x", 0, nbytes)], writes=[("y", 0, nbytes)])
    return t.build()


# --- hops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "hops"),
    [
        # neighbouring cores of 16: 1, 2, 4 (2 x 2), 6 (3 x 2), 9 (3 x 3), 16 (4 x 4)
        ("mesh", (0, 1, 2, 3, 4, 6)),
        ("torus", (0, 1, 2, 3, 4, 4)),  # no more than half of each side of 4
        ("ring", (0, 1, 3, 5, 8, 8)),  # half way around
        ("switch", (0, 1, 1, 1, 1, 1)),
        ("point_to_point", (0, 1, 1, 1, 1, 1)),
    ],
)
def test_hops_to_the_farthest_core(topology, hops):
    on = tiny(links__mesh__topology=topology)
    assert tuple(span(on, cores) for cores in (1, 2, 4, 6, 9, 16)) == hops


def test_hops_of_a_grid():
    # A mesh is crossed once: the broadcast along one side, the sum along the other. A switch is passed by either.
    assert [crossing(tiny(), *grid) for grid in ((1, 1), (4, 4), (16, 1), (1, 16))] == [0, 6, 6, 6]
    switch = tiny(links__mesh__topology="switch")
    assert [crossing(switch, *grid) for grid in ((1, 1), (4, 4), (16, 1), (1, 16))] == [0, 2, 1, 1]
    assert crossing(unconnected(), 4, 4) == 0


def test_links_to_other_chips_are_no_network():
    assert span(tiny(links__mesh__scope="chip"), 16) == 0


# --- products ---------------------------------------------------------------------------------------------------------


def test_a_product_on_a_grid_of_two_by_two():
    # Four cores at the same peak: a pass takes 2 cycles. 16 passes; 4 on each core: 4 + 4 * 2 = 12, 2 hops 4. Rows of A
    # to a second column of cores, columns of B to a second row: 2 * (32 * 8 + 8 * 32) bytes at 512 a cycle. (1 x 4
    # takes as long, but 3 copies of A.)
    work = mapped(32, 32, 8, on=tiny(cores=4))
    assert (work.tile, work.split, work.items, work.waves, work.steps) == ((16, 16), 1, 4, 1, 4)
    assert (work.matrix_cycles, work.extra_cycles, work.link_cycles) == (12, 4, 2)
    assert work.cache_bytes == 2 * (32 * 8 + 8 * 32 + 32 * 32)
    assert work.core_bytes == 16 * 256 + 2 * (2 * 32 * 8 + 2 * 8 * 32 + 32 * 32)


@pytest.mark.parametrize(
    ("m", "n", "k", "passes", "items"),
    [(1, 1, 1, 1, 1), (8, 8, 8, 1, 1), (8, 128, 8, 1, 16), (8, 129, 8, 2, 9), (1, 250, 1, 2, 16), (9, 256, 8, 4, 16)],
)
def test_parts_are_padded_to_whole_passes(m, n, k, passes, items):
    # 17 blocks of columns: two on each of nine cores. Nine rows are two blocks.
    work = mapped(m, n, k, on=unconnected())
    assert work.matrix_cycles == 4 + 8 * passes
    assert (work.items, work.extra_cycles, work.link_cycles) == (items, 0, 0)


@pytest.mark.parametrize(
    ("hop", "parts", "matrix", "hops"),
    [
        # 64 passes; on 16 cores 4 each (36 cycles, 6 hops), on 8 8 (68, 4 hops), on 4 16 (132, 2), on 2 32 (260, 1)
        ("2 ns", 16, 36, 6),  # 48 cycles; 8 cores 76
        ("20 ns", 8, 68, 4),  # 148; 16 cores 156, 4 cores 172
        ("200 ns", 2, 260, 1),  # 460; one core 516, 4 cores 532
        ("300 ns", 1, 516, 0),  # two cores 560
    ],
)
def test_a_row_is_spread_over_as_many_cores_as_are_worth_their_hops(hop, parts, matrix, hops):
    work = mapped(1, 64, 64, on=tiny(links__mesh__latency=hop))
    assert (work.items, work.matrix_cycles) == (parts, matrix)
    assert work.extra_cycles == hops * int(hop.split()[0])


def test_parts_of_a_reduction_are_added_over_the_network():
    # 8 columns of cores and 2 parts of the reduction: 7 more copies of the row, one more partial sum of 4 bytes each:
    # 2 * 64 * 7 + 4 * 64 = 1152 bytes. (4 x 4: as many bytes, more parts; 2 x 8: 1920 bytes.)
    work = mapped(1, 64, 64)
    assert (work.tile, work.split, work.reduction_parts, work.depth) == ((8, 8), 2, 2, 8)
    assert work.link_cycles == 3


def test_a_reduction_is_split_only_as_far_as_the_chip_allows():
    # One block of columns, eight of the reduction: 8 cores with a pass each and 4 hops, or one with eight.
    assert (mapped(1, 8, 64).split, mapped(1, 8, 64).matrix_cycles, mapped(1, 8, 64).extra_cycles) == (8, 12, 8)
    whole = mapped(1, 8, 64, on=tiny(mapping__max_split_k=1))
    assert (whole.split, whole.matrix_cycles, whole.extra_cycles) == (1, 68, 0)


def test_products_of_a_batch_stand_side_by_side_or_follow_each_other():
    # Two on 8 cores each would take 68 + 8; one after the other on 16 2 * 36 + 12. Of sixteen, one on each core.
    work = mapped(1, 64, 64, batch=2)
    assert (work.items, work.waves, work.matrix_cycles, work.extra_cycles) == (16, 1, 68, 8)
    work = mapped(1, 64, 64, batch=16)
    assert (work.items, work.waves, work.matrix_cycles, work.extra_cycles, work.link_cycles) == (16, 1, 516, 0, 0)


def test_the_network_may_be_what_a_product_waits_for():
    # One byte a cycle into each core: the grid of 8 x 2 takes 1152 / 16 = 72 cycles to hand out its operands.
    work = mapped(1, 64, 64, on=tiny(links__mesh__bandwidth="16 GB/s"))
    assert (work.items, work.matrix_cycles, work.link_cycles) == (16, 36, 72)


def test_a_slow_scratchpad_stretches_passes():
    # 256 bytes at 16 a cycle and core
    assert mapped(8, 8, 8, on=tiny(memories__scratchpad__read_bandwidth="256 GB/s")).matrix_cycles == 4 + 16


def test_narrow_formats_and_efficiency_change_the_pass():
    assert mapped(8, 8, 8, dtype="fp8").matrix_cycles == 4 + 4
    assert mapped(8, 8, 8, on=tiny(compute__grid__efficiency__bf16=0.5)).matrix_cycles == 4 + 16


def test_instances_of_a_core_are_places_without_hops_between_them():
    # Two instances a core at the same peak: a pass takes 16 cycles; two passes run in one core, no hop away.
    twins = tiny(compute__grid__count=2, compute__grid__ops_per_cycle__bf16=32)
    work = mapped(8, 16, 8, on=twins)
    assert (work.items, work.matrix_cycles, work.extra_cycles) == (2, 20, 0)


@pytest.mark.parametrize(("limit", "offered"), [(1, (1,)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8))])
def test_sides_on_offer(limit, offered):
    assert sizes(limit) == offered


def test_all_cores_of_an_odd_number_are_used():
    # 20 blocks on 5 cores, four each (powers of two alone: five each on four)
    work = mapped(8, 160, 8, on=replace(unconnected(), cores=5))
    assert (work.items, work.steps) == (5, 4)


# --- attention --------------------------------------------------------------------------------------------------------


def test_keys_of_a_single_query_are_split_over_cores_and_combined():
    # Two heads share a KV head: one tile of two rows. 64 keys are 8 blocks of 8, of 2 passes for the scores and 2 for
    # the values: 32 cycles. One block on each of 8 cores: 4 + 32; queries out and sums back, 2 * 4 hops: 16. Each part
    # but the first gets 64 bytes of queries and sends 2 * (16 + 2) values of 4 bytes: 7 * 208 bytes at 256 a cycle.
    work = attend(1, 64, heads=2)
    assert (work.tile, work.split, work.depth, work.items) == ((2, 8), 8, 8, 8)
    assert (work.matrix_cycles, work.extra_cycles, work.link_cycles) == (36, 16, 6)
    assert (work.padded_pairs, work.heads_per_tile, work.kv_passes) == (8 * 2 * 8, 2, 1)
    assert work.cache_bytes == 2 * 64 + 64 * 16 * 2 * 2


def test_hops_limit_the_split_of_keys():
    # At 20 cycles a hop: no split 260, two parts 132 + 2 * 20, four 68 + 4 * 20.
    work = attend(1, 64, on=tiny(links__mesh__latency="20 ns"))
    assert (work.split, work.matrix_cycles, work.extra_cycles) == (4, 68, 80)


def test_heads_and_sequences_lie_side_by_side():
    # Four chains of 8 blocks on four cores each: two blocks on a core.
    work = attend(1, 64, heads=2, kv_heads=2, batch=2)
    assert (work.split, work.items, work.matrix_cycles) == (4, 16, 4 + 2 * 32)
    assert work.extra_cycles == 2 * (2 + 2)


def test_tiles_of_a_prompt():
    # 64 rows: 8 tiles of 8 that visit 1 to 8 blocks, each split in two: the longest part takes 4 * 32, hops 6 + 1.
    # K and V of 64 bytes a key go to 36 blocks, one copy of all 4096 bytes is there; queries and sums once more.
    work = attend(64, 64)
    assert (work.tile, work.split, work.items) == ((8, 8), 2, 16)
    assert (work.matrix_cycles, work.extra_cycles) == (4 + 4 * 32, 14)
    assert work.link_cycles == -(-(36 * 8 * 64 - 4096 + 64 * 16 * 2 + 64 * 18 * 4) // 512)
    assert work.padded_pairs == 36 * 8 * 8


def test_work_of_full_cores_is_shared_out_evenly():
    # 512 rows on one core per tile: blocks of a causal mask add up, the compiler balances them.
    work = attend(512, 512, on=unconnected())
    blocks = sum(-(-end // 8) for end in range(32, 513, 32))
    assert (work.tile, work.split) == ((32, 8), 1)
    assert work.matrix_cycles == 4 + max(64 * 4 * 32, blocks * 4 * 32 // 16)


def test_a_small_scratchpad_makes_keys_pass_again():
    # Half of 1 KiB holds 5 rows of 16 * (2 + 4) bytes: 26 tiles on 16 cores.
    small = tiny(memories__scratchpad__capacity="1 KiB", memories__scratchpad__interleave="256 B")
    work = attend(128, 128, on=small)
    assert (work.tile[0], work.items, work.kv_passes) == (5, 26, 2)
    assert attend(128, 128, on=small, cached=True).kv_passes == 1


# --- row-wise ops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "width", "cores"),
    [(1, 64, 16), (1, 8, 2), (1, 4096, 16), (4, 64, 4), (5, 64, 3), (16, 64, 1), (100, 64, 1)],
)
def test_cores_of_a_row(rows, width, cores):
    assert row_cores(tiny(), rows, width) == cores


@pytest.mark.parametrize(
    ("kind", "m", "batch", "hops"),
    [
        ("attn_norm", 1, 1, 6), ("mlp_norm", 4, 1, 2), ("final_norm", 16, 1, 0), ("layernorm", 1, 4, 2),
        ("softmax", 1, 1, 6), ("delta_norm", 16, 1, 6), ("delta_norm", 16, 4, 2), ("silu_mul", 1, 1, 0),
    ],
)  # fmt: skip
def test_sums_over_rows_cross_the_cores_that_hold_them_and_come_back(kind, m, batch, hops):
    lowered = lower(norm_trace(kind, m=m, n=64, batch=batch), tiny())
    assert lowered.work.launch_cycles.tolist() == [2 * hops * 2]


# --- kernels ----------------------------------------------------------------------------------------------------------


def layer_trace() -> Trace:
    """y = x A, z = y B, one row of 64."""
    t = HandTrace()
    for name in ("a", "b"):
        t.weight(name, 2 * 64 * 64)
    t.weight("x", 128)
    t.tensor("y", 128)
    t.tensor("z", 128)
    t.op("o_proj", m=1, n=64, k=64, reads=[("x", 0, 128), ("a", 0, 8192)], writes=[("y", 0, 128)])
    t.op("down_proj", m=1, n=64, k=64, reads=[("y", 0, 128), ("b", 0, 8192)], writes=[("z", 0, 128)])
    return t.build()


def test_a_layer_is_one_kernel_and_waits_for_the_hops_of_its_ops():
    lowered = lower(layer_trace(), tiny())
    assert lowered.kernels.n == 1
    assert lowered.work.launch_cycles.tolist() == [12 + 12]
    assert lowered.work.cycles[0, [MATRIX, LINK, CACHE]].tolist() == [36 + 36, 3 + 3, 0]
    # y stays inside; weights come out of the SRAM at its full bandwidth, in units of 256 bytes
    assert lowered.work.main_read_bytes.tolist() == [128 + 2 * 8192]
    assert lowered.work.main_write_bytes.tolist() == [128]
    assert lowered.work.cycles[0, [READ, WRITE]].tolist() == [-(-(256 + 2 * 8192) // 1024), 1]


def test_nothing_is_launched_unless_the_chip_says_so():
    assert lower(layer_trace(), unconnected()).work.launch_cycles.tolist() == [0]
    slow = replace(unconnected(), overheads=tiny(overheads__op_launch="50 ns").overheads)
    assert lower(layer_trace(), slow).work.launch_cycles.tolist() == [50]


def test_weight_stationary_units_compute_as_systolic_arrays_do():
    planes = load_chip("tiny_spatial", variant="tiny-spatial-planes")
    ours, theirs = (lower(layer_trace(), one).work for one in (planes, replace(planes, execution="systolic")))
    assert np.array_equal(ours.cycles, theirs.cycles)
    # Eight tiles of columns on as many planes, eight passes over the reduction on each, whose loads of 8 count.
    assert ours.cycles[0, MATRIX] == 2 * (4 + 8 + 7 * 8 + 1)


@pytest.mark.parametrize("variant", ["tiny-spatial", "tiny-spatial-planes"])
@pytest.mark.parametrize("method", CONTEXT_METHODS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_method_obeys_the_laws(variant, method, phase, engine):
    on = load_chip("tiny_spatial", variant=variant)
    point = make_point(on, "toy", method, phase=phase, context=150, batch=2, window=64, ttt="toy", call_tokens=64)
    assert simulate_point(replace(point, engine=engine)).record["fits"] is True


# --- what cannot run --------------------------------------------------------------------------------------------------


def test_scans_run_chunk_after_chunk():
    """Gated delta rule, 40 tokens in chunks of 16 on two states of 16 x 32: two whole chunks and one of 8 tokens."""
    t = HandTrace()
    t.weight("qkv", 1024)
    t.tensor("out", 1024)
    t.op("delta_rule", m=40, n=32, k=16, heads=2, pairs=16, reads=[("qkv", 0, 1024)], writes=[("out", 0, 1024)])
    expected = 0
    for tokens, times in ((16, 2), (8, 1)):
        whole = [(tokens, 32, 16), (tokens, 32, 16), (16, 32, tokens), (tokens, tokens, 16), (tokens, tokens, 16),
                 (tokens, 32, tokens)]  # fmt: skip
        solve = [(tokens, tokens, 32), (tokens, tokens, 16)]
        for shapes, share in ((whole, 1), (solve, 2)):
            for m, n, k in shapes:
                cycles = product(tiny(), m=m, n=n, k=k, batch=2, dtype="bf16").matrix_cycles
                expected += times * -(-cycles // share)
    assert lower(t.build(), tiny()).work.cycles[0, MATRIX] == expected


def test_a_matrix_unit_is_needed():
    base = tiny()
    lanes = replace(base, units=tuple(unit for unit in base.units if unit.kind != "matrix"))
    with pytest.raises(ConfigError, match="static_dataflow needs a matrix unit"):
        lower(gemm_trace(16, 16, 16), lanes)
