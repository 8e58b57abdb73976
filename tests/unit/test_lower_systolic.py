"""Products and attention on weight-stationary arrays, worked out by hand.

tiny_systolic: two arrays of 16 x 16 cells at one row a cycle; a pass lasts 8 cycles or more, loading a tile 16, hidden
behind the pass before; 32 to fill and drain an array once per op; per cycle 64 bytes of main memory (one bus), 512 of
the scratchpad, 64 lane operations, 16 special ones; a DMA transfer starts after 100 cycles, two at a time.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.lower_tools import HandTrace, chip, gemm_trace
from tests.unit.test_lower_cycles import attention_trace
from ttt_sim.chip import Chip
from ttt_sim.errors import ConfigError
from ttt_sim.lower import lower
from ttt_sim.lower.systolic import TURNED, product
from ttt_sim.lower.tiles import TileWork, flops_per_cycle
from ttt_sim.lower.traffic import CACHED
from ttt_sim.lower.work import LINK, MATRIX, READ, SPECIAL, VECTOR, WRITE
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.simulation import simulate_trace


def tiny(**overrides: str | float | int) -> Chip:
    return chip("tiny_systolic", **overrides)


def mapped(
    m: int, n: int, k: int, *, batch: int = 1, dtype: str = "bf16", turned: bool = False, on: Chip | None = None
) -> TileWork:
    return product(on or tiny(), m=m, n=n, k=k, batch=batch, dtype=dtype, turned=turned)


def fast_trace(sequences: int) -> Trace:
    """One row of each sequence by a fast weight of 64 x 64 of its own."""
    t = HandTrace()
    row, weight = 2 * 64 * sequences, 2 * 64 * 64 * sequences
    t.weight("x", row)
    t.tensor("w", weight, Role.FAST_WEIGHT, exists=True)
    t.tensor("y", row)
    t.op(
        "fast_apply", batch=sequences, m=1, n=64, k=64, reads=[("x", 0, row), ("w", 0, weight)],
        writes=[("y", 0, row)],
    )  # fmt: skip
    return t.build()


# --- passes -----------------------------------------------------------------------------------------------------------


def test_rows_are_split_over_arrays_that_have_no_tile_of_their_own():
    # B is one tile: on one array 32 + 16 + 64 = 112. Half of the rows on each: 32 + 16 + 32 = 80. With A in the arrays
    # (4 tiles of its 64 rows, two on each) 32 + 16 + 16 + 16 = 80 too; of equals B stays.
    work = mapped(64, 16, 16)
    assert (work.tile, work.split, work.items, work.waves) == ((32, 16), 2, 2, 1)
    assert work.matrix_cycles == 80
    assert work.steps == 2  # 32 rows, as many as the array has a step


@pytest.mark.parametrize(("k", "passes"), [(1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_a_reduction_is_padded_to_whole_passes(k, passes):
    # Two tiles of columns, one on each array; the passes of the reduction follow each other, their loads hidden.
    work = mapped(64, 32, k)
    assert (work.tile, work.waves) == ((64, 16), 1)
    assert work.matrix_cycles == 32 + 16 + passes * 64


@pytest.mark.parametrize("n", [24, 32])
def test_columns_are_padded_to_whole_tiles(n):
    # One tile of columns on each array, filled or not; 24 rows stream. (A: two tiles, n rows.)
    work = mapped(24, n, 16)
    assert (work.tile, work.items) == ((24, 16), 2)
    assert work.matrix_cycles == 32 + 16 + 24


def test_arrays_share_out_tiles_of_columns_in_whole_rounds():
    # Five tiles of columns on two arrays: three rounds. 8 rows (A: one tile, halves of 80 rows: 32 + 16 + 40 = 88).
    slow_load = tiny(compute__array__load="4 cycles")
    work = mapped(8, 80, 16, on=slow_load)
    assert (work.tile, work.items, work.waves) == ((8, 16), 5, 3)
    assert work.matrix_cycles == 32 + 4 + 3 * 8


# --- which operand stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "tile", "cycles"),
    [
        # a single row; B: 4 tiles of columns in 2 rounds x 4 passes of the reduction, A: halves of 64 rows, 4 passes
        ("4 cycles", (1, 16), 32 + 4 + 7 * 8 + 8),  # the issue interval holds up B; A 32 + 4 + 4 * 32 = 164
        ("16 cycles", (1, 16), 32 + 16 + 7 * 16 + 8),  # loads do; A 32 + 16 + 4 * 32 = 176
        ("32 cycles", (16, 32), 32 + 32 + 4 * 32),  # B 32 + 32 + 7 * 32 + 8 = 296
    ],
)
def test_a_single_row_pays_for_loads_until_the_weights_stream_instead(load, tile, cycles):
    work = mapped(1, 64, 64, on=tiny(compute__array__load=load))
    assert work.tile == tile
    assert work.matrix_cycles == cycles


def test_sequences_share_a_frozen_weight_but_each_loads_its_fast_weight():
    # Three rows of one product stream within one issue interval: as long as one row, 8 passes. Three products of a
    # row are 12 tiles of columns, 6 rounds x 4 passes.
    assert mapped(3, 64, 64).matrix_cycles == mapped(1, 64, 64).matrix_cycles == 168
    own = mapped(1, 64, 64, batch=3)
    assert (own.items, own.waves) == (12, 6)
    assert own.matrix_cycles == 32 + 16 + 23 * 16 + 8


def test_without_double_buffering_every_load_counts():
    # Two passes on each array, 64 rows: 16 + 64 + 64 hidden, 2 * (16 + 64) not.
    alone = tiny(compute__array__double_buffer="false")
    assert mapped(64, 32, 32).matrix_cycles == 32 + 16 + 64 + 64
    assert mapped(64, 32, 32, on=alone).matrix_cycles == 32 + 2 * (16 + 64)


def test_a_load_longer_than_its_pass_is_hidden_in_part():
    # 8 rows, 2 passes of the reduction on each array, loads of 24: 24 + max(8, 24) + 8.
    assert mapped(8, 32, 32, on=tiny(compute__array__load="24 cycles")).matrix_cycles == 32 + 24 + 24 + 8


# --- rates ------------------------------------------------------------------------------------------------------------


def test_two_elements_in_a_cell_halve_the_passes_not_the_rows():
    # fp8 at twice the peak: a tile of 32 x 16 elements. A reduction of 64 takes as long as one of 32 in bf16.
    assert mapped(64, 32, 64, dtype="fp8").matrix_cycles == mapped(64, 32, 32).matrix_cycles
    assert mapped(1, 64, 64, dtype="fp8").matrix_cycles == 32 + 16 + 3 * 16 + 8
    assert 2 * mapped(64, 32, 64, dtype="fp8").cache_bytes == mapped(64, 32, 64).cache_bytes


def test_a_sustained_share_slows_the_rows():
    half = tiny(compute__array__efficiency__bf16=0.5)
    assert mapped(64, 32, 32, on=half).matrix_cycles == 32 + 16 + 2 * 128


def test_a_cell_may_be_as_deep_as_a_reduction_of_several_elements():
    # 16 x 16 cells of 2: half the passes and, at the same peak, a row in two cycles.
    base = tiny()
    matrix, *others = base.units
    deep = replace(base, units=(replace(matrix, depth=2), *others))
    assert mapped(64, 32, 64, on=deep).matrix_cycles == 32 + 16 + 2 * 128


@pytest.mark.parametrize("transposed_read", ["true", "false"])
@pytest.mark.parametrize(
    ("m", "n", "k", "batch"),
    [(1, 1, 1, 1), (1, 4096, 4096, 1), (17, 33, 65, 3), (512, 512, 64, 1), (64, 64, 8192, 1), (100, 1000, 10, 2)],
)
def test_matrix_time_is_never_below_the_useful_work(m, n, k, batch, transposed_read):
    on = tiny(writability__transposed_read=transposed_read)
    for dtype in ("bf16", "fp8"):
        work = mapped(m, n, k, batch=batch, dtype=dtype, turned=True, on=on)
        assert work.matrix_cycles * flops_per_cycle(on, on.unit("matrix"), dtype) >= 2 * batch * m * n * k
        assert work.waves == -(-work.items // 2)


# --- transposed products ----------------------------------------------------------------------------------------------


def test_a_transposed_operand_goes_through_an_array_first():
    # A delta of 32 x 64 over 16 tokens. B (64 columns, two tiles on each array): 32 + 16 + 32 + 32 = 112. A (32, one
    # tile on each): 32 + 16 + 64 = 112 too. To turn it first costs two passes of 16 rows, 16 + 16 + 16, or one, 32.
    assert mapped(32, 64, 16).matrix_cycles == 112
    turned = mapped(32, 64, 16, turned=True)
    assert turned.tile == (16, 64)
    assert turned.matrix_cycles == 112 + 32
    free = mapped(32, 64, 16, turned=True, on=tiny(writability__transposed_read="true"))
    assert (free.tile, free.matrix_cycles) == ((32, 16), 112)


def test_scratchpad_traffic():
    # B stays: A streams once for each of 4 tiles of columns, B is loaded once, C stored. The turned A of the same
    # product: B streams once for each of 2 tiles, A is loaded once, and read and written once to turn it.
    assert mapped(32, 64, 16).cache_bytes == 2 * (32 * 16 * 4 + 64 * 16 + 32 * 64)
    assert mapped(32, 64, 16, turned=True).cache_bytes == 2 * (64 * 16 * 2 + 3 * 32 * 16 + 32 * 64)
    # Halves of the rows: each array loads the tile of B. Two arrays that load together read rows once for two tiles.
    assert mapped(64, 16, 16).cache_bytes == 2 * (64 * 16 + 2 * 16 * 16 + 64 * 16)
    together = mapped(32, 64, 16, on=tiny(mapping__multicast=2))
    assert together.cache_bytes == 2 * (32 * 16 * 2 + 64 * 16 + 32 * 64)


@pytest.mark.parametrize(
    ("kind", "more"), [*((kind, 32) for kind in TURNED), ("down_proj", 0), ("fast_apply", 0), ("target_proj", 0)]
)
def test_products_over_tokens_are_the_transposed_ones(kind, more):
    work = lower(gemm_trace(32, 64, 16, kind=kind), tiny()).work
    assert work.cycles[0, MATRIX] == 112 + more


# --- whole kernels ----------------------------------------------------------------------------------------------------


def test_levels_of_a_product(engine):
    # 64 x 32 x 32. A 4096 B and B 2048 B in one start of 100: 100 + 6144 / 64 = 196; C: 100 + 4096 / 64 = 164.
    # Scratchpad: A for each of two tiles, B, C: 2 * 4096 + 2048 + 4096 = 14336 B / 512 = 28.
    result = simulate_trace(tiny(), gemm_trace(64, 32, 32), engine=engine)
    assert result.lowered.work.cycles[:, READ:].tolist() == [[196, 28, 176, 0, 0, 0, 164]]
    assert result.lowered.work.steps.tolist() == [8]  # two passes of 4 x 16 rows
    # Eight steps in pieces of 1, 3, 3 and 1. Loads: 24, 98, 171, 196. Scratchpad: 24-27, 98-108, 171-182, 196-200.
    # Arrays: 27-49, 98 to 108 is loaded by then: 108-174, 182-248, 248-270. Stores of 20, 62, 61 and 21 follow: the
    # first at 196, when the bus is free, then 216-278, and the others right after.
    assert result.cycles == 196 + 164


def test_every_operand_of_every_sequence_is_a_transfer(engine):
    # Three rows and three weights, six transfers, three starts of two; 384 + 24576 B in whole units of 256 B: 25088 /
    # 64 = 392. The rows that leave: three transfers, two starts; 512 / 64 = 8.
    result = simulate_trace(tiny(), fast_trace(3), engine=engine)
    assert result.lowered.work.cycles[0, [READ, MATRIX, WRITE]].tolist() == [300 + 392, 424, 200 + 8]
    one = tiny(memories__hbm__transfer_engines=1)
    assert lower(fast_trace(3), one).work.cycles[0, [READ, WRITE]].tolist() == [600 + 392, 300 + 8]


def test_what_stays_on_chip_needs_no_transfer():
    # y is read from the scratchpad: one transfer, for the other operand.
    t = HandTrace()
    t.weight("x", 8192)
    t.weight("z", 8192)
    t.tensor("y", 8192)
    t.tensor("out", 8192)
    for step, (a, b, c) in enumerate([("x", "x", "y"), ("y", "z", "out")]):
        t.op("attn_residual", m=64, n=64, reads=[(a, 0, 8192), (b, 0, 8192)], writes=[(c, 0, 8192)], step=step)
    lowered = lower(t.build(), tiny(memories__hbm__transfer_engines=1))
    assert lowered.work.cycles[1, READ] == 100 + 8192 // 64


def test_decode_attention(engine):
    # 32 keys, 2 KV heads of 2 query heads: 2 blocks of 16 keys each. A block: scores 16 (a load hides the two rows, or
    # 16 keys stream), values 16, the probabilities turned 16. 4 blocks of 48 on two arrays.
    trace = attention_trace(m=1, before=31, heads=4, kv_heads=2, head_dim=16, window=None)
    work = simulate_trace(tiny(), trace, engine=engine).lowered.work
    assert work.cycles[0, MATRIX] == 32 + 16 + 4 * 48 // 2
    # 4 heads x 32 pairs: four lane operations and one exponential each
    assert work.cycles[0, [VECTOR, SPECIAL]].tolist() == [4 * 128 // 64, 128 // 16]
    # queries and result 2 * 128 B, keys and values 4096 B, probabilities of two rows out and in 2 * 2 * 2 * 64 B
    assert work.cache_bytes[0] == 256 + 4096 + 512
    free = lower(trace, tiny(writability__transposed_read="true")).work
    assert free.cycles[0, MATRIX] == 32 + 16 + 4 * 32 // 2


def test_probabilities_stay_where_values_are_wide():
    # Loads of 64 and heads of 64: four passes for scores. Of the values four tiles could stay, or the one tile of two
    # rows of probabilities, through which 64 rows of values stream. A block: 4 * 64 + 64, and 64 to turn.
    trace = attention_trace(m=1, before=31, heads=4, kv_heads=2, head_dim=64, window=None)
    work = lower(trace, tiny(compute__array__load="64 cycles")).work
    assert work.cycles[0, MATRIX] == 32 + 64 + 4 * (4 * 64 + 64 + 64) // 2


def test_prefill_attention_visits_blocks_up_to_the_diagonal(engine):
    # 2 query heads of one KV head: two tiles of 64 rows, 32 queries each, which see 2 and 4 blocks of 16 keys. A
    # block: 64 rows stream for scores, for values, and 4 passes of 16 rows turn the probabilities.
    trace = attention_trace(m=64, before=0, heads=2, kv_heads=1, head_dim=16, window=None)
    work = simulate_trace(tiny(), trace, engine=engine).lowered.work
    assert (work.tile_rows[0], work.tile_cols[0], work.items[0], work.steps[0]) == (64, 16, 2, 3)
    assert work.cycles[0, MATRIX] == 32 + 16 + 6 * 3 * 64 // 2
    # 32 queries of 2 heads that are one row short of 64 in the second tile stream 62 rows there
    short = lower(attention_trace(m=63, before=0, heads=2, kv_heads=1, head_dim=16, window=None), tiny()).work
    assert short.cycles[0, MATRIX] == 32 + 16 + (2 * 192 + 4 * (62 + 62 + 64)) // 2


def test_narrow_heads_waste_the_array():
    half, whole = (
        lower(attention_trace(m=64, before=0, heads=2, kv_heads=1, head_dim=d, window=None), tiny()).work
        for d in (8, 16)
    )
    assert half.cycles[0, MATRIX] == whole.cycles[0, MATRIX]


def test_attention_sustains_its_own_share():
    slow = tiny(mapping__attention_efficiency=0.5)
    trace = attention_trace(m=64, before=0, heads=2, kv_heads=1, head_dim=16, window=None)
    # 64 rows in 128 cycles, and 16 in 32
    assert lower(trace, slow).work.cycles[0, MATRIX] == 32 + 16 + 6 * 3 * 128 // 2
    assert lower(gemm_trace(64, 32, 32), slow).work.cycles[0, MATRIX] == 176


def test_keys_and_values_stream_again_when_they_do_not_fit(engine):
    # 256 rows of 2 heads: 4 tiles of 64 a head on two arrays, so one head is worked on at a time. Its K and V, 2 * 256
    # * 16 * 2 = 16384 B, fit a scratchpad of 16 KiB; with one byte less they stream once per 4 / 2 tiles.
    trace = attention_trace(m=256, before=0, heads=2, kv_heads=2, head_dim=16, window=None)
    fits = simulate_trace(tiny(memories__scratchpad__capacity="16384 B"), trace, engine=engine).lowered.work
    streams = simulate_trace(tiny(memories__scratchpad__capacity="16383 B"), trace, engine=engine).lowered.work
    assert (fits.restream_bytes.tolist(), streams.restream_bytes.tolist()) == ([0], [2 * 16384])


def test_an_update_in_place_goes_through_the_scratchpad():
    # The next product reads the new version where the write left it.
    t = HandTrace()
    t.weight("v", 1024)
    t.weight("z", 2048)
    t.tensor("w", 4096, Role.FAST_WEIGHT, exists=True)
    t.tensor("y", 2048)
    t.op(
        "delta_write", m=32, n=64, k=16, reads=[("v", 0, 1024), ("z", 0, 2048), ("w", 0, 4096)],
        writes=[("w", 1, 4096)], phase=Phase.WEIGHT_WRITE, chunk=0,
    )  # fmt: skip
    t.op("fast_apply", m=16, n=64, k=32, reads=[("v", 0, 1024), ("w", 1, 4096)], writes=[("y", 0, 2048)])
    lowered = lower(t.build(), tiny())
    assert lowered.traffic.read_place[-1] == CACHED
    assert lowered.work.main_write_bytes[0] == 4096  # and the last version of the state reaches the main memory
    assert lowered.work.cycles[0, MATRIX] == 112 + 32


# --- what cannot run --------------------------------------------------------------------------------------------------


def test_other_dataflows_are_refused():
    base = tiny()
    matrix, *others = base.units
    still = replace(base, units=(replace(matrix, dataflow="output_stationary"), *others))
    with pytest.raises(ConfigError, match="systolic needs a matrix unit of dataflow weight_stationary"):
        lower(gemm_trace(16, 16, 16), still)
    with pytest.raises(ConfigError, match="needs a matrix unit"):
        lower(gemm_trace(16, 16, 16), replace(base, units=tuple(others)))


def test_scans_run_chunk_after_chunk():
    """Gated delta rule, 40 tokens in chunks of 12 on two states of 16 x 32: three whole chunks and one of 4 tokens."""
    t = HandTrace()
    t.weight("qkv", 1024)
    t.tensor("out", 1024)
    t.op("delta_rule", m=40, n=32, k=16, heads=2, pairs=12, reads=[("qkv", 0, 1024)], writes=[("out", 0, 1024)])
    expected = 0
    for tokens, times in ((12, 3), (4, 1)):
        whole = [(tokens, 32, 16), (tokens, 32, 16), (16, 32, tokens), (tokens, tokens, 16), (tokens, tokens, 16),
                 (tokens, 32, tokens)]  # fmt: skip
        solve = [(tokens, tokens, 32), (tokens, tokens, 16)]
        for shapes, share in ((whole, 1), (solve, 2)):
            for m, n, k in shapes:
                turned = (m, n, k) == (16, 32, tokens)  # what is added to a state
                cycles = product(tiny(), m=m, n=n, k=k, batch=2, dtype="bf16", turned=turned).matrix_cycles
                expected += times * -(-cycles // share)
    assert lower(t.build(), tiny()).work.cycles[0, MATRIX] == expected


def test_a_sum_over_chips_needs_a_link():
    t = HandTrace()
    t.weight("x", 1024)
    t.tensor("y", 1024)
    t.op("allreduce", m=512, n=1, heads=4, reads=[("x", 0, 1024)], writes=[("y", 0, 1024)])
    with pytest.raises(ConfigError, match="needs links to 3 other chips and the file has no link to others"):
        lower(t.build(), tiny())


def test_unknown_dtype_names_the_known_ones():
    with pytest.raises(ConfigError, match="unit array has no peak for dtype int8; the chip file lists bf16, fp8"):
        mapped(16, 16, 16, dtype="int8")


def test_collective_runs_on_the_links():
    # v5e: 4 x 45 GB/s, of which a chip with three partners uses three. 6 hops of 1 us and 2 * 3 / 4 of 1 MiB.
    t = HandTrace()
    t.weight("x", 1 << 20)
    t.tensor("y", 1 << 20)
    t.op("allreduce", m=1 << 19, n=1, heads=4, reads=[("x", 0, 1 << 20)], writes=[("y", 0, 1 << 20)])
    v5e = chip("tpu_v5e")
    seconds = 6e-6 + 2 * 3 / 4 * (1 << 20) / 135e9
    assert lower(t.build(), v5e).work.cycles[0, LINK] == v5e.cycles(seconds)
