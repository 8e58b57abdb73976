"""Cycles of single kernels on the tiny chips, worked out by hand.

tiny_gpu: 4 cores; per cycle 1024 FLOPs (256 a core), 64 lane operations, 16 special ones, 64 bytes of main memory
(one bus), 256 bytes of the shared cache, 128 bytes of each scratchpad; nothing for launches, latency, turn-around.
A reduction step is 64 deep in bf16 (128 bytes), so a tile of r x c takes 2 r c 64 / 256 cycles a step, and at its end
2 r c / 128 to store it.
"""

from __future__ import annotations

import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip, gemm_trace, residual_trace, unit_tasks
from tests.unit.trace_tools import TOY
from ttt_sim.bounds import roofline_cycles
from ttt_sim.lower.work import CACHE, MATRIX, READ, SPECIAL, VECTOR, WRITE
from ttt_sim.model import Scenario
from ttt_sim.ops import KIND, Role, Trace
from ttt_sim.program import READ as READ_TASK
from ttt_sim.simulation import simulate_trace
from ttt_sim.workload import METHODS, build_trace
from ttt_sim.workload.closed_forms import visible_pairs


def attention_trace(*, m: int, before: int, heads: int, kv_heads: int, head_dim: int, window: int | None) -> Trace:
    """Attention of m rows after ``before`` rows that a full cache holds; a window only limits what is seen."""
    n = before + m
    q_bytes, kv_bytes = 2 * m * heads * head_dim, 2 * 2 * n * kv_heads * head_dim
    t = HandTrace()
    t.weight("q", q_bytes)
    t.tensor("kv", kv_bytes, Role.KV, exists=True)
    t.tensor("out", q_bytes)
    t.op(
        "attention", m=m, n=n, k=head_dim, heads=heads, kv_heads=kv_heads, position=before,
        pairs=visible_pairs(m, before, window), reads=[("q", 0, q_bytes), ("kv", 0, kv_bytes)],
        writes=[("out", 0, q_bytes)],
    )  # fmt: skip
    return t.build()


def test_one_tile_per_core_runs_its_levels_in_turn(engine):
    # 4 tiles of 64 x 64, one step of 2 * 64 * 64 * 64 / 256 = 2048 and 8192 / 128 = 64 to store: 2112. Smaller
    # tiles take as long (16 * 528 / 4, 64 * 132 / 4), so the largest is taken. Read 2 * 16384 B / 64 = 512; cache:
    # A twice, B twice, C: 98304 B / 256 = 384; write 32768 B / 64 = 512. With a single step nothing overlaps.
    result = simulate_trace(chip(), gemm_trace(128, 128, 64), engine=engine)
    assert result.lowered.work.cycles[:, READ:].tolist() == [[512, 384, 2112, 0, 0, 0, 512]]
    assert result.cycles == 512 + 384 + 2112 + 512


def test_two_steps_overlap_as_more_do(engine):
    # Four tiles of 64 x 64, 2 steps of 2048 and 64 to store: 4160, as for smaller tiles, which load more. Read 2 *
    # 32768 / 64 = 1024; cache (2 + 2) * 32768 + C 32768 = 163840 B / 256 = 640; write 512. Halves: loads 0-512 and
    # 512-1024; cache 512-832 and 1024-1344; matrix 832-2912 and 2912-4992; stores 2912-3168 and 4992-5248.
    result = simulate_trace(chip(), gemm_trace(128, 128, 128), engine=engine)
    assert result.lowered.work.steps.tolist() == [2]
    assert result.lowered.work.cycles[:, READ:].tolist() == [[1024, 640, 4160, 0, 0, 0, 512]]
    program = result.lowered.program
    assert (unit_tasks(program, "l2"), unit_tasks(program, "tensor_core")) == ([320, 320], [2080, 2080])
    assert result.cycles == 512 + 320 + 4160 + 256


def test_compute_bound_gemm_hides_everything_but_one_step_of_each_other_level(engine):
    # 16 steps: 16 * 2048 + 64 = 32832 on the matrix units. Read 2 * 262144 / 64 = 8192, 512 a step; cache (2 + 2) *
    # 262144 B + C 32768 B = 1081344 / 256 = 4224, 264 a step; write 32768 / 64 = 512, 32 a step.
    result = simulate_trace(chip(), gemm_trace(128, 128, 1024), engine=engine)
    assert result.lowered.work.cycles[:, READ:].tolist() == [[8192, 4224, 32832, 0, 0, 0, 512]]
    assert result.lowered.work.steps.tolist() == [16]
    assert result.cycles == 512 + 264 + 32832 + 32


def test_pieces_of_a_pipeline(engine):
    # The kernel above within 16 tasks: three major levels (cache: 4224 * 8 >= 32832) and the minor write (512 * 8 <
    # 32832) leave (16 - 2) / 3 = 4 pieces: one step, seven, seven, one; the write has fifteen steps and one.
    result = simulate_trace(chip(), gemm_trace(128, 128, 1024), engine=engine)
    program, timeline = result.lowered.program, result.timeline
    assert program.n_tasks == 14
    assert unit_tasks(program, "l2") == [264, 1848, 1848, 264]
    assert unit_tasks(program, "tensor_core") == [2052, 14364, 14364, 2052]
    assert sorted(unit_tasks(program, "hbm")) == sorted([512, 3584, 3584, 512, 480, 32])
    # The second cache piece waits for the first load alone (which ended in 512) and for its unit; the third load
    # waits for buffers that the first cache piece frees in 776, but its bus is taken until 4096.
    cache = program.unit == program.unit_names.index("l2")
    assert timeline.start_cycles[cache].tolist() == [512, 776, 4096, 8192]


def test_loads_run_two_pieces_ahead_at_most(engine):
    # A cache of 32 B a cycle takes 1081344 / 32 = 33792 cycles, pieces of 2112, 14784, 14784, 2112. The third load
    # waits for the first cache piece (2624) and its bus (4096), the fourth for the second cache piece: 2624 + 14784.
    slow = chip(memories__l2__read_bandwidth="32 GB/s", memories__l2__write_bandwidth="32 GB/s")
    result = simulate_trace(slow, gemm_trace(128, 128, 1024), engine=engine)
    assert unit_tasks(result.lowered.program, "l2") == [2112, 14784, 14784, 2112]
    loads = result.lowered.program.kind == READ_TASK
    assert result.timeline.start_cycles[loads].tolist() == [0, 512, 4096, 17408]


def test_more_detail_means_more_pieces_of_the_same_total(engine):
    coarse = simulate_trace(chip(), gemm_trace(128, 128, 1024), engine=engine)
    fine = simulate_trace(chip(), gemm_trace(128, 128, 1024), engine=engine, detail=64)
    assert fine.lowered.program.n_tasks == 3 * 16 + 2  # no more pieces than steps
    assert fine.cycles == coarse.cycles


def test_memory_bound_gemm_keeps_the_bus_busy_from_first_to_last_cycle(engine):
    # 16 rows: 64 tiles of 16 x 16, 16 steps of 128 and 4 to store: 64 * 2052 / 4 = 32832, the only tile below the
    # bus time. Read (2 MiB + 32768) / 64 = 33280, write 32768 / 64 = 512.
    result = simulate_trace(chip(), gemm_trace(16, 1024, 1024), engine=engine)
    work = result.lowered.work
    assert (work.tile_rows[0], work.tile_cols[0], work.items[0], work.waves[0]) == (16, 16, 64, 16)
    assert work.cycles[0, [READ, MATRIX, WRITE]].tolist() == [33280, 32832, 512]
    assert result.cycles == 33280 + 512


def test_among_tiles_that_memory_hides_the_least_busy_one_is_taken(engine):
    # A bus of 16 B a cycle needs (2 MiB + 32768) / 16 = 133120 to load, more than any tile computes: 16 tiles of 64 x
    # 64 take 16 * (16 * 2048 + 64) / 4 = 131328, 64 of 16 x 16 take 64 * 2052 / 4 = 32832. The bus never idles: while
    # it carries all but one of 256 steps of the stores (2048 - 8), the last step of 65 in the cache and of 129 in the
    # matrix units ends. After a last step of a 64 x 64 tile (2052) it would wait.
    slow = chip(memories__hbm__read_bandwidth="16 GB/s")
    result = simulate_trace(slow, gemm_trace(16, 1024, 1024), engine=engine)
    work = result.lowered.work
    assert (work.tile_rows[0], work.tile_cols[0], work.split[0]) == (16, 16, 1)
    assert work.cycles[0, [READ, MATRIX, WRITE]].tolist() == [133120, 32832, 2048]
    assert result.cycles == 133120 + 2048


def test_whole_waves_without_persistent_kernels(engine):
    # 5 tiles of 64 x 64 on 4 cores. Persistent: 5 * 2112 / 4 = 2640. In waves: 2 * 2112 = 4224, while 80 tiles of
    # 16 x 16 fill 20 waves of 132 = 2640 (20 of 32 x 32: 5 * 528 = 2640, the larger tile).
    wide = gemm_trace(64, 320, 64)
    persistent = simulate_trace(chip(), wide, engine=engine).lowered.work
    assert (persistent.tile_rows[0], persistent.cycles[0, MATRIX]) == (64, 2640)
    waves = simulate_trace(chip(mapping__persistent="false"), wide, engine=engine).lowered.work
    assert (waves.tile_rows[0], waves.waves[0], waves.cycles[0, MATRIX]) == (32, 5, 2640)


def test_split_reduction_uses_idle_cores(engine):
    # One tile of 16 x 16, 64 steps of 128: one core needs 64 * 128 + 4 = 8196. Four parts: 16 * 128 + 16 * 16 * 4 /
    # 128 = 2056 (fp32 partial sums). The bus at 128 B a cycle: read 2 * 131072 / 128 = 2048, write 512 / 128 = 4.
    # Cache: operands 262144, result 512, partial sums out and in 2 * 4 * 256 * 4 = 8192: 270848 / 256 = 1058.
    fast_bus = chip(memories__hbm__read_bandwidth="128 GB/s")
    result = simulate_trace(fast_bus, gemm_trace(16, 16, 4096), engine=engine)
    work = result.lowered.work
    assert (work.split[0], work.items[0], work.steps[0]) == (4, 4, 16)
    assert work.cycles[:, READ:].tolist() == [[2048, 1058, 2056, 0, 0, 0, 4]]
    # fill: a step of reading (128) and of the cache (66, floor of 1058 / 16); drain: the last write piece, 4 -
    # floor(4 * 15 / 16)
    assert result.cycles == 128 + 66 + 2056 + 1
    # The reduction is a kernel of its own, so a split pays the launch gap twice.
    launched = simulate_trace(
        chip(memories__hbm__read_bandwidth="128 GB/s", overheads__op_launch="10 ns"), gemm_trace(16, 16, 4096),
        engine=engine,
    )  # fmt: skip
    assert launched.lowered.work.launch_cycles.tolist() == [20]
    assert launched.cycles == result.cycles + 20


def test_a_split_must_pay_for_its_launch(engine):
    # Splitting saves 8196 - 2056 cycles at most: a launch of 7 us is dearer.
    dear = chip(memories__hbm__read_bandwidth="128 GB/s", overheads__op_launch="7 us")
    assert simulate_trace(dear, gemm_trace(16, 16, 4096), engine=engine).lowered.work.split.tolist() == [1]


def test_row_wise_op_is_bound_by_the_bus(engine):
    # x and y: 131072 / 64 = 2048; z: 1024; cache 196608 / 256 = 768; lanes 32768 / 64 = 512. All on one bus without
    # a gap, since the first store is ready (after 682 + 256 + 170 cycles) before the last load ends.
    result = simulate_trace(chip(), residual_trace(), engine=engine)
    assert result.lowered.work.cycles[:, READ:].tolist() == [[2048, 768, 0, 512, 0, 0, 1024]]
    assert result.lowered.work.steps.tolist() == [3]  # 196608 B in steps of 16 KiB on each of 4 cores
    assert result.cycles == 2048 + 1024


def test_row_wise_op_of_two_steps(engine):
    # Half as many rows: read 1024, cache 98304 / 256 = 384, lanes 256, write 512, in halves. Loads 0-512 and 512-1024;
    # cache 512-704 and 1024-1216; lanes 704-832 and 1216-1344; stores 1024-1280, as the bus is free, and 1344-1600.
    t = HandTrace()
    t.weight("x", 32768)
    t.weight("y", 32768)
    add_residual(t, "x", "y", "z", m=32)
    result = simulate_trace(chip(), t.build(), engine=engine)
    assert result.lowered.work.steps.tolist() == [2]
    assert result.cycles == 1024 + 192 + 128 + 256


def test_special_functions_take_vector_lanes_where_there_is_no_unit_for_them(engine):
    # SiLU and product of 64 x 512: 5 * 32768 lane operations, of which 2 * 32768 are exp and divide.
    t = HandTrace()
    t.weight("gate", 65536)
    t.weight("up", 65536)
    t.tensor("hidden", 65536)
    t.op("silu_mul", m=64, n=512, reads=[("gate", 0, 65536), ("up", 0, 65536)], writes=[("hidden", 0, 65536)])
    work = simulate_trace(chip(), t.build(), engine=engine).lowered.work
    assert work.cycles[0, [VECTOR, SPECIAL]].tolist() == [3 * 32768 // 64, 2 * 32768 // 16]


def test_channel_groups_turn_around_and_row_miss(engine):
    # tiny_turnaround: a launch of 100; each of two channel groups moves half of the bytes at half of the rate, so
    # 2048 to read and 1024 to write; the first access opens a row (5), the bus turns from reading to writing once
    # (10).
    result = simulate_trace(chip("tiny_turnaround"), residual_trace(), engine=engine)
    assert result.cycles == 100 + 5 + 2048 + 10 + 1024
    units = result.units().set_index("unit")
    busy, moved = units["busy_cycles"].to_dict(), units["moved_bytes"].to_dict()
    assert busy["hbm.0"] == busy["hbm.1"] == 5 + 2048 + 10 + 1024
    assert moved["hbm.0"] + moved["hbm.1"] == 3 * 65536
    assert 0 <= moved["hbm.1"] - moved["hbm.0"] <= 2  # a piece of an odd number of bytes


def test_next_kernel_pays_launch_turn_back_and_another_row(engine):
    # Twice the kernel above on other operands: launch 100 after the first ends, the bus turns from writing to
    # reading (20) and opens another row (5), then 2048, turn (10), 1024.
    t = HandTrace()
    for name in ("x", "y", "u", "v"):
        t.weight(name, 65536)
    add_residual(t, "x", "y", "z")
    add_residual(t, "u", "v", "w")
    result = simulate_trace(chip("tiny_turnaround"), t.build(), engine=engine)
    assert result.cycles == 3187 + 100 + 20 + 5 + 2048 + 10 + 1024


def test_latency_and_host_time(engine):
    # A kernel that loads waits once for the first byte; the first kernel of a model call waits for the host.
    slow = chip(memories__hbm__latency="50 ns", overheads__op_launch="100 ns", overheads__call="1 us")
    result = simulate_trace(slow, residual_trace(), engine=engine)
    assert result.cycles == 100 + 50 + 1000 + 3072
    t = HandTrace()
    t.weight("x", 65536)
    t.weight("y", 65536)
    add_residual(t, "x", "y", "z", step=0)
    add_residual(t, "x", "z", "w", step=1)  # another call; x and z are in the cache, so nothing loads
    launches = simulate_trace(slow, t.build(), engine=engine).lowered.work.launch_cycles
    assert launches.tolist() == [1150, 1100]


def test_ports_of_their_own_do_not_turn_around(engine):
    # With separate read and write ports the loads (2048) and the stores (1024) overlap; a step is a third of
    # either. Drain: the last third of cache (256), lanes (171 = 512 - floor(1024 / 3)) and stores (342 = 1024 -
    # floor(2048 / 3)).
    ported = chip(memories__hbm__shared_bus="false", memories__hbm__write_bandwidth="64 GB/s")
    result = simulate_trace(ported, residual_trace(), engine=engine)
    assert result.cycles == 2048 + 256 + 171 + 342
    assert set(result.units()["unit"]) >= {"hbm", "hbm.write"}


def test_decode_attention_splits_the_keys(engine):
    # One query row per head, 4 heads on 2 KV heads: 2 items of 64 padded rows on 4 cores, so the 2 blocks of 128
    # keys of each item go to 2 cores. Matrix units: one block a core, 4 * 16 * 64 * 128 / 256 = 2048. KV 256 * 2 *
    # 2 * 16 * 2 = 32768 B, q and out 128 B. Read (32896 rounded to 256 B = 33024) / 64 = 516; write 256 / 64 = 4.
    # Cache: q, out 256 + KV 32768 + parts 2 * 2 * 4 * 18 * 4 = 1152, rounded to 34304 / 256 = 134. 4 * 256 scores:
    # 4096 lanes / 64 = 64, exp 1024 / 16 = 64. One step: all in turn.
    trace = attention_trace(m=1, before=255, heads=4, kv_heads=2, head_dim=16, window=None)
    result = simulate_trace(chip(), trace, engine=engine)
    assert result.lowered.work.split.tolist() == [2]
    assert result.lowered.work.cycles[:, READ:].tolist() == [[516, 134, 2048, 64, 64, 0, 4]]
    assert result.cycles == 516 + 134 + 2048 + 64 + 64 + 4
    launched = simulate_trace(chip(overheads__op_launch="10 ns"), trace, engine=engine)
    assert launched.cycles == result.cycles + 20  # the parts are combined in a kernel of their own


def test_causal_prefill_attention_visits_blocks_up_to_the_diagonal(engine):
    # 512 rows, 2 heads of 16: 4 tiles of 128 rows visit 1 + 2 + 3 + 4 blocks of 128 keys; both heads: 20 blocks of
    # 4 * 16 * 128 * 128 / 1024 = 1024 cycles on all cores. The longest tile has 4 blocks of 4096 on its core: 16384
    # < 20480.
    trace = attention_trace(m=512, before=0, heads=2, kv_heads=2, head_dim=16, window=None)
    work = simulate_trace(chip(), trace, engine=engine).lowered.work
    assert work.cycles[0, MATRIX] == 20 * 1024
    assert work.steps.tolist() == [5]  # 20 blocks on 4 cores
    # q and out 65536 B; K and V of 128 keys are 2 * 128 * 16 * 2 = 8192 B a block
    assert work.cache_bytes.tolist() == [65536 + 20 * 8192]
    # scores: 2 heads of 512 * 513 / 2 visible pairs, 4 lane operations and an exp each
    assert work.cycles[0, [VECTOR, SPECIAL]].tolist() == [4 * 262656 // 64, 262656 // 16]


def test_windowed_prefill_attention(engine):
    # A window of 64 keys: tiles start at rows 0, 128, 256, 384 and so at keys 0, 65, 193, 321: blocks 1, 2, 2, 2,
    # with two heads 14. Pairs a head: 64 * 65 / 2 + 448 * 64 = 30752. Lanes 4 * 61504 / 64 = 3844, exp 61504 / 16 =
    # 3844. Read 3 * 32768 / 64 = 1536, cache (65536 + 14 * 8192) / 256 = 704, write 512, 4 steps. Whole tiles go to
    # cores: six of 2 blocks and two of 1 on 4 cores take as long as 4 blocks of 4096 on each.
    trace = attention_trace(m=512, before=0, heads=2, kv_heads=2, head_dim=16, window=64)
    result = simulate_trace(chip(), trace, engine=engine)
    assert result.lowered.work.cycles[:, READ:].tolist() == [[1536, 704, 16 * 1024, 3844, 3844, 0, 512]]
    # fill: a quarter of read and cache; drain: a quarter of vector, special and write
    assert result.cycles == 384 + 176 + 16384 + 961 + 961 + 128


@pytest.mark.parametrize(("gemm_share", "attention_share", "share"), [(1, 0.5, 0.5), (0.25, 0.5, 0.25), (0.5, 1, 0.5)])
def test_attention_sustains_its_own_share_of_the_matrix_peak(gemm_share, attention_share, share, engine):
    # The attention above at a share of 1024 FLOPs a cycle, the lesser of what GEMM and attention sustain; all else is
    # as before. GEMM of 128 x 128 x 64: a step of 2048 over its own share and 64 to store.
    some = chip(
        compute__tensor_core__efficiency__bf16=gemm_share, mapping__attention_efficiency=attention_share
    )  # fmt: skip
    trace = attention_trace(m=512, before=0, heads=2, kv_heads=2, head_dim=16, window=64)
    result = simulate_trace(some, trace, engine=engine)
    matrix = 16 * 1024 / share
    assert result.lowered.work.cycles[:, READ:].tolist() == [[1536, 704, matrix, 3844, 3844, 0, 512]]
    assert result.cycles == 384 + 176 + matrix + 961 + 961 + 128
    # The bound stands at the data-sheet peak: 4 * 16 FLOPs for each of 61504 pairs.
    assert roofline_cycles(trace, some, result.lowered)["tensor_core"] == 64 * 61504 / 1024
    gemm = simulate_trace(some, gemm_trace(128, 128, 64), engine=engine)
    assert gemm.lowered.work.cycles[0, MATRIX] == 2048 / gemm_share + 64


def test_one_block_of_keys_on_a_core_takes_longer_too(engine):
    # The decode above at half of the peak: one block a core, 4 * 16 * 64 * 128 / 128 = 4096.
    trace = attention_trace(m=1, before=255, heads=4, kv_heads=2, head_dim=16, window=None)
    result = simulate_trace(chip(mapping__attention_efficiency=0.5), trace, engine=engine)
    assert result.lowered.work.cycles[:, READ:].tolist() == [[516, 134, 4096, 64, 64, 0, 4]]
    assert result.cycles == 516 + 134 + 4096 + 64 + 64 + 4


def test_a_window_that_hides_nothing_costs_what_full_attention_does():
    # A windowed call reads its own rows as fresh keys and values rather than from the cache: the same bytes.
    works = []
    for method, window in (("kv", None), ("kv_window", 512)):
        trace = build_trace(TOY, METHODS[method].settings(window, None, None), Scenario.prefill(300))
        lowered = simulate_trace(chip(), trace).lowered
        kernel = lowered.kernels.of_op[trace.kind == KIND["attention"]]
        works.append((lowered.work.cache_bytes[kernel].tolist(), lowered.work.cycles[kernel, MATRIX].tolist()))
    assert works[0] == works[1]


def test_keys_and_values_stream_again_when_they_do_not_fit(engine):
    # 2048 rows of 2 heads: 16 tiles a head on 4 cores, so one head is worked on at a time. Its K and V, 2 * 2048 *
    # 16 * 2 = 131072 B, fit a cache of 128 KiB; with one byte less they stream once per ceil(16 / 4) = 4 tiles.
    trace = attention_trace(m=2048, before=0, heads=2, kv_heads=2, head_dim=16, window=None)
    fits = simulate_trace(chip(memories__l2__capacity="131072 B"), trace, engine=engine).lowered.work
    streams = simulate_trace(chip(memories__l2__capacity="131071 B"), trace, engine=engine).lowered.work
    assert fits.restream_bytes.tolist() == [0]
    assert streams.restream_bytes.tolist() == [3 * 2 * 131072]
    q_bytes = 2 * 2048 * 2 * 16
    assert streams.main_read_bytes.tolist() == [q_bytes + 4 * 2 * 131072]
    assert streams.cycles[0, CACHE] == fits.cycles[0, CACHE]  # through the cache all of it passes anyway


@pytest.mark.parametrize(
    ("nbytes", "cycles"),
    # 4 channels of 16 B a cycle, striped every 256 B: the busiest channel decides.
    [(1, 16), (256, 16), (257, 16), (1024, 16), (1025, 32), (4096, 64), (4097, 80)],
)
def test_short_transfers_leave_channels_idle(nbytes, cycles, engine):
    t = HandTrace()
    t.weight("x", nbytes)
    t.tensor("y", 1)
    t.op("kv_append", m=1, n=1, reads=[("x", 0, nbytes)], writes=[("y", 0, 1)])
    work = simulate_trace(chip(memories__hbm__channels=4), t.build(), engine=engine).lowered.work
    assert work.cycles[0, READ] == cycles
    assert work.main_read_bytes.tolist() == [nbytes]


def test_achievable_share_of_the_bandwidth(engine):
    work = simulate_trace(chip(memories__hbm__achievable_fraction=0.5), residual_trace(), engine=engine).lowered.work
    assert work.cycles[0, [READ, WRITE]].tolist() == [2 * 2048, 2 * 1024]
