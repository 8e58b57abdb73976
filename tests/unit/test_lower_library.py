"""Costs of the kernel library in the lowering, worked out by hand on the tiny GPU (4 cores, 256 FLOPs a cycle each)."""

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, chip, gemm_trace
from ttt_sim.chip import Chip
from ttt_sim.errors import ConfigError
from ttt_sim.lower.tiles import small_tile_factor
from ttt_sim.lower.traffic import hit_share
from ttt_sim.lower.work import LINK, MATRIX, READ, VECTOR, WRITE
from ttt_sim.ops import Role
from ttt_sim.predict.workloads import Operand, OpSpec, trace_of
from ttt_sim.results import Result
from ttt_sim.simulation import simulate_trace


def attention(some: Chip, *, m: int, n: int, heads: int, kv_heads: int, batch: int = 1, causal: bool = True) -> Result:
    """Attention of heads of width 16 over fresh operands, after the lead-in step."""
    pairs = m * (n - m) + m * (m + 1) // 2 if causal else m * n
    q, kv = 2 * batch * m * heads * 16, 4 * batch * n * kv_heads * 16
    op = OpSpec(
        "attention", "bf16", m, n, 16, batch, heads, kv_heads, pairs, n - m,
        reads=(Operand("q", q), Operand("kv", kv, Role.KV)), writes=(Operand("out", q),),
    )  # fmt: skip
    return simulate_trace(some, trace_of([(op,)]))


def scan(some: Chip, kind: str, *, tokens: int, batch: int, heads: int = 1) -> Result:
    state = batch * heads * 16 * 16 * 4
    op = OpSpec(
        kind, "bf16", tokens, 16, 16, batch, heads, heads,
        reads=(Operand("x", 64), Operand("state", state, Role.FAST_WEIGHT)),
        writes=(Operand("y", 64), Operand("state", state, Role.FAST_WEIGHT)),
    )  # fmt: skip
    return simulate_trace(some, trace_of([(op,)]))


def test_every_kernel_pays_its_fixed_time(engine: str) -> None:
    trace = gemm_trace(128, 128, 64)
    free = simulate_trace(chip(), trace, engine=engine)
    assert free.cycles == 512 + 384 + 2112 + 512
    paid = simulate_trace(chip(library__kernel="100 cycles"), trace, engine=engine)
    assert paid.cycles == free.cycles + 100


def test_small_tiles_fall_behind() -> None:
    # 64 x 64 is a quarter of a full tile: 1 + 0.5 (sqrt(4) - 1) = 1.5 times 2048 cycles, and 64 to store.
    assert small_tile_factor(64 * 64, 0.5) == 1.5
    assert small_tile_factor(128 * 128, 0.5) == small_tile_factor(256 * 256, 0.5) == 1.0
    work = simulate_trace(chip(library__small_tile_loss=0.5), gemm_trace(128, 128, 64)).lowered.work
    assert (work.tile_rows[0], work.cycles[0, MATRIX]) == (64, 1.5 * 2048 + 64)


def test_results_leave_a_core_slower_than_operands_enter() -> None:
    work = simulate_trace(chip(library__drain_fraction=0.25), gemm_trace(128, 128, 64)).lowered.work
    assert work.cycles[0, MATRIX] == 2048 + 4 * 64


def test_a_split_reduction_pays_for_its_second_kernel() -> None:
    # One tile of 16 x 16 over a depth of 4096: the reduction is split over the 4 cores.
    trace = gemm_trace(16, 16, 4096)
    free, paid = (simulate_trace(some, trace) for some in (chip(), chip(library__reduction="300 cycles")))
    assert free.lowered.work.split[0] == paid.lowered.work.split[0] == 4
    assert paid.lowered.work.launch_cycles[0] == free.lowered.work.launch_cycles[0] + 300
    dear = simulate_trace(chip(library__reduction="100000 cycles"), trace)
    assert dear.lowered.work.split[0] == 1  # no split pays any more


@pytest.mark.parametrize(("distance", "share"), [(0, 1.0), (100, 1.0), (200, 0.25), (1000, 0.01)])
def test_share_of_an_operand_that_a_cache_still_holds(distance: int, share: float) -> None:
    assert hit_share(distance, 100) == pytest.approx(share)


def test_repeated_operands_come_from_the_cache() -> None:
    # 1 MiB of cache: a distance of 2 MiB leaves a quarter of 65536 bytes.
    def read(distance: int | None) -> Result:
        op = OpSpec(
            "gelu", "bf16", 64, 512, reads=(Operand("x", 65536, distance=distance),), writes=(Operand("y", 65536),)
        )
        return simulate_trace(chip(), trace_of([(op,)]))

    assert [int(read(d).lowered.work.main_read_bytes[1]) for d in (None, 65536, 2 << 20)] == [65536, 0, 65536 - 16384]
    assert int(read(65536).lowered.traffic.read_hit_bytes.sum()) == 65536


def test_row_wise_kernels_reach_a_share_of_the_bandwidth() -> None:
    t = HandTrace()
    t.weight("x", 65536)
    t.tensor("y", 65536)
    t.op("gelu", m=64, n=512, reads=[("x", 0, 65536)], writes=[("y", 0, 65536)])
    trace = t.build()
    free, slow = (simulate_trace(some, trace) for some in (chip(), chip(library__stream_fraction__gelu=0.5)))
    assert (slow.lowered.work.cycles[0, [READ, WRITE]] == 2 * free.lowered.work.cycles[0, [READ, WRITE]]).all()


def test_long_rows_are_read_twice() -> None:
    # softmax holds one copy of a row, a norm two: 512 bf16 elements are 1 KiB.
    for capacity, kind, reads in (("1 KiB", "softmax", 1), ("1 KiB", "layernorm", 2), ("512 B", "softmax", 2)):
        op = OpSpec(kind, "bf16", 64, 512, reads=(Operand("x", 65536),), writes=(Operand("y", 65536),))
        work = simulate_trace(chip(library__row_capacity=capacity), trace_of([(op,)])).lowered.work
        assert int(work.main_read_bytes[1]) == reads * 65536


def test_frames_account_for_hits_and_for_rows_read_again() -> None:
    # A softmax reads its rows twice, less the quarter that a loop finds in the cache; sums are those of the program.
    op = OpSpec(
        "softmax", "bf16", 64, 512, reads=(Operand("x", 65536, distance=2 << 20),), writes=(Operand("y", 65536),)
    )  # fmt: skip
    result = simulate_trace(chip(library__row_capacity="512 B"), trace_of([(op,)]))
    read = {name: int(values.sum()) for (way, name), values in result.main_bytes().items() if way == "read"}
    assert {name: nbytes for name, nbytes in read.items() if nbytes} == {"activations": 2 * 49152}
    assert int(result.ops()["main_read_bytes"].sum()) == int(result.lowered.work.main_read_bytes.sum()) == 2 * 49152


def test_each_row_of_an_append_holds_a_core() -> None:
    op = OpSpec("kv_append", "bf16", 10, 32, reads=(Operand("k", 320),), writes=(Operand("kv", 640),))
    work = simulate_trace(chip(library__row="100 cycles"), trace_of([(op,)])).lowered.work
    assert work.cycles[1, VECTOR] == 250  # 10 rows on 4 cores


def test_attention_tiles_pay_their_start_and_run_longest_first() -> None:
    # 512 causal rows of 2 heads: tiles of 4, 3, 2, 1 blocks of 4096 twice; 4 + 1 and 3 + 2 on each core.
    work = attention(chip(library__attention_start="100 cycles"), m=512, n=512, heads=2, kv_heads=2).lowered.work
    assert work.cycles[1, MATRIX] == 5 * 4096 + 2 * 100


def test_in_order_tiles_leave_a_tail() -> None:
    # 20 blocks on 4 cores are 5, and half of the longest tile (4) runs at the end; never more than 2 rounds of it.
    for tail, blocks in ((0.5, 7), (1.0, 8)):
        work = attention(chip(library__attention_tail=tail), m=512, n=512, heads=2, kv_heads=2).lowered.work
        assert work.cycles[1, MATRIX] == blocks * 4096


def test_exponentials_that_products_do_not_hide() -> None:
    # A block of 128 x 128 has 16384 exponentials, 4 a cycle and core: half of them stand between the products.
    work = attention(chip(library__softmax_exposed=0.5), m=128, n=128, heads=4, kv_heads=4).lowered.work
    assert work.cycles[1, MATRIX] == 4096 + 16384 // 4 // 2


def test_attention_without_a_mask_visits_every_block() -> None:
    work = attention(chip(), m=512, n=512, heads=1, kv_heads=1, causal=False).lowered.work
    assert work.cycles[1, MATRIX] == 4 * 4096  # one tile of four blocks on each core


def test_packing_of_heads() -> None:
    # 2 query heads share a KV head, 40 rows each: packed they are one tile of 128 rows, apart two of 64.
    def items(packing: str) -> int:
        some = replace(chip(), library=replace(chip().library, attention_packing=packing, max_split=1))  # type: ignore[arg-type]
        return int(attention(some, m=40, n=40, heads=2, kv_heads=1).lowered.work.items[1])

    assert (items("always"), items("padding"), items("single")) == (1, 2, 2)


def test_decode_tiles() -> None:
    # 4 sequences of 256 keys, 4 heads on one KV head: a tile on each core, 2 blocks of 2048 and its fixed times.
    rules = dict(
        library__decode_start="100 cycles", library__decode_row="10 cycles", library__attention_setup="7 cycles"
    )
    result = attention(chip(**rules), m=1, n=256, heads=4, kv_heads=1, batch=4)
    assert result.lowered.work.cycles[1, MATRIX] == 2 * 2048 + 100 + 4 * 10
    assert result.lowered.work.launch_cycles[1] == 7
    # A core that pulls 2 bytes a cycle waits for 256 keys of 64 bytes.
    slow = attention(chip(library__core_fetch=2), m=1, n=256, heads=4, kv_heads=1, batch=4)
    assert slow.lowered.work.cycles[1, MATRIX] == 256 * 64 // 2


def test_splits_of_keys_fill_the_cores() -> None:
    # 3 tiles on 4 cores. Nothing is split while 70 % are busy; else the smallest split within 85 % of the best fill:
    # 2 parts leave 6 of 8 slots busy, 3 leave 9 of 12, both 75 %; 1 as well, which is therefore taken.
    for fill, split in ((0.7, 1), (0.9, 1)):
        result = attention(chip(library__split_fill=fill), m=1, n=1024, heads=3, kv_heads=3)
        assert result.lowered.work.split[1] == split
    two = attention(chip(library__split_fill=0.9), m=1, n=1024, heads=1, kv_heads=1)
    assert two.lowered.work.split[1] == 4
    paid = chip(library__split_fill=0.9, library__combine="50 cycles", library__combine_split="3 cycles")
    assert attention(paid, m=1, n=1024, heads=1, kv_heads=1).lowered.work.launch_cycles[1] == 50 + 4 * 3


def test_recurrent_chains_run_their_chunks_in_order(engine: str) -> None:
    # 5 chains on 4 cores are two waves; 130 tokens are 3 chunks of 64.
    some = chip(library__scan_start="100 cycles", library__scan_chunk="1000 cycles")
    work = scan(some, "delta_rule", tokens=130, batch=5).lowered.work
    assert (work.waves[1], work.cycles[1, MATRIX]) == (2, 2 * (100 + 3 * 1000))


def test_other_chains_wait_for_their_dependent_products() -> None:
    # A chunk of the delta rule is 6 * 64 * 128 * 128 FLOPs at 256 a cycle, 24576, and 30000 cycles: 2712 wait for each
    # of its two stages. TTT-Linear has two as well; 40 tokens of width 16 in mini-batches of 16 are three of them.
    some = chip(library__scan_start="100 cycles", library__scan_chunk="30000 cycles")
    state = Operand("state", 5 * 16 * 16 * 4, Role.FAST_WEIGHT)
    op = OpSpec("linear_update", "bf16", 40, 16, 16, 5, 1, 0, 16, reads=(state,), writes=(state,))
    work = simulate_trace(some, trace_of([(op,)])).lowered.work
    flops = 2 * (6 * 16 * 16**2 + 4 * 16**2 * 16) + 6 * 8 * 16**2 + 4 * 8**2 * 16
    each = 2 * 2712 + -(-flops // (3 * 256))
    assert (work.waves[1], work.cycles[1, MATRIX]) == (2, 2 * (100 + 3 * each))


def test_a_state_larger_than_a_scratchpad_comes_and_goes_with_every_chunk() -> None:
    # Two matrices of 16 x 64 in fp32 are 8 KiB; the cache gives each of four cores 64 bytes a cycle.
    state = Operand("state", 2 * 16 * 64 * 4, Role.FAST_WEIGHT)
    op = OpSpec("mlp_update", "bf16", 32, 64, 16, 1, 1, 0, 16, reads=(state,), writes=(state,))
    large, small = (
        simulate_trace(chip(memories__scratchpad__capacity=size), trace_of([(op,)])).lowered.work
        for size in ("8 KiB", "4 KiB")
    )
    assert small.cycles[1, MATRIX] - large.cycles[1, MATRIX] == 2 * 2 * 8192 // 64
    assert small.cache_bytes[1] - large.cache_bytes[1] == 2 * 2 * 8192


def test_a_recurrent_step_streams_its_states() -> None:
    # 8 states of 1 KiB, read and written: 16384 bytes over 4 cores at 2 bytes a cycle; one preparing kernel.
    some = chip(library__scan_fetch=2, library__scan_setup="40 cycles")
    work = scan(some, "delta_step", tokens=1, batch=8).lowered.work
    assert (work.cycles[1, MATRIX], work.launch_cycles[1]) == (2048, 40)


def test_sums_over_chips_take_the_faster_protocol() -> None:
    # 2 chips at 450 GB/s: a step there and one back move half of the message each.
    h100 = chip("h100")
    link = replace(h100.links[0], start_s=1e-6, latency_s=2e-6, short_frac=0.25, bulk_frac=0.5, bulk_start_s=10e-6)
    some = replace(h100, links=(link,))

    def sum_of(nbytes: int) -> OpSpec:
        x, y = Operand("x", nbytes), Operand("y", nbytes)
        return OpSpec("allreduce", "bf16", nbytes // 2, 1, heads=2, reads=(x,), writes=(y,))

    for nbytes in (1024, 1 << 30):
        work = simulate_trace(some, trace_of([(sum_of(nbytes),)])).lowered.work
        moved = nbytes / 450e9
        seconds = 5e-6 + min(moved / 0.25, 10e-6 + moved / 0.5)
        assert int(work.cycles[1, LINK]) == int(np.ceil(seconds * 1.83e9))
    with pytest.raises(ConfigError, match="no link"):
        simulate_trace(chip(), trace_of([(sum_of(1024),)]))
