"""Products and attention where weights are stored, worked out by hand.

tiny_cim: 256 arrays of 64 x 64 cells; an input vector passes one in 16 cycles, 8 more once per op; per cycle 256 bytes
out of the cells and 128 into them (ports of their own), 512 of the buffer, 64 lane operations, 16 special ones.
tiny_pcm: 512 arrays, 32 cycles; 128 bytes out, 64 / 8 pulses = 8 bytes in. tiny_neuro: 256 arrays, 64 cycles, a barrier
of 1000 cycles before each op.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip, gemm_trace
from tests.unit.test_lower_cycles import attention_trace
from ttt_sim.chip import Chip
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.lower import in_memory, lower
from ttt_sim.lower.in_memory import STAGED, STORED, product
from ttt_sim.lower.tiles import TileWork
from ttt_sim.lower.traffic import CACHED, IN_PLACE, MAIN
from ttt_sim.lower.work import CACHE, MATRIX, READ, SPECIAL, VECTOR, WRITE
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.simulation import simulate_trace


def cim(**overrides: str | float | int) -> Chip:
    return chip("tiny_cim", **overrides)


def few(arrays_per_core: int = 1, **overrides: str | float | int) -> Chip:
    """tiny_cim with 4 cores of that many arrays, each as fast as before: 512 FLOP per cycle."""
    peak = 4 * arrays_per_core * 64 * 64 * 2 / 16 / 1000
    return cim(
        compute__array__count=str(arrays_per_core),
        compute__array__peak__bf16=f"{peak} TFLOP/s",
        compute__array__peak__fp8=f"{2 * peak} TFLOP/s",
        **overrides,
    )


def mapped(
    m: int, n: int, k: int, *, batch: int = 1, dtype: str = "bf16", operand: int = STORED, on: Chip | None = None
) -> TileWork:
    return product(on or cim(), m=m, n=n, k=k, batch=batch, dtype=dtype, operand=operand)


def delta_trace(*, m: int = 64, n: int = 192, k: int = 32) -> Trace:
    """A delta of m x n from k carried rows of targets and of hidden rows: two operands that are no weights."""
    t = HandTrace()
    t.tensor("targets", 2 * m * k, Role.CARRY, exists=True)
    t.tensor("hidden", 2 * n * k, Role.CARRY, exists=True)
    t.tensor("delta", 2 * m * n, Role.GRADIENT)
    t.op(
        "delta_gemm", m=m, n=n, k=k, reads=[("targets", 0, 2 * m * k), ("hidden", 0, 2 * n * k)],
        writes=[("delta", 0, 2 * m * n)], phase=Phase.BACKWARD,
    )  # fmt: skip
    return t.build()


def fresh_trace(*, stored: int, m: int = 64, head_dim: int = 64) -> Trace:
    """One head: m queries see ``stored`` rows of a cache and then the m rows of this call, which are not in it yet."""
    row = 2 * head_dim
    t = HandTrace()
    t.weight("q", m * row)
    t.tensor("kv", 2 * max(stored, 1) * row, Role.KV, exists=True)
    t.tensor("k", m * row, Role.CARRY, exists=True)
    t.tensor("v", m * row, Role.CARRY, exists=True)
    t.tensor("out", m * row)
    t.op(
        "attention", m=m, n=stored + m, k=head_dim, heads=1, kv_heads=1, position=stored, pairs=m * (stored + m),
        reads=[("q", 0, m * row), ("kv", 0, 2 * stored * row), ("k", 0, m * row), ("v", 0, m * row)],
        writes=[("out", 0, m * row)],
    )  # fmt: skip
    return t.build()


# --- products with a stored matrix ------------------------------------------------------------------------------------


def test_each_input_vector_passes_all_tiles_at_once():
    # 128 x 128 is four tiles on four of 256 arrays: 4 vectors x 16 + 8. In and out 4 x 128 each in bf16.
    work = mapped(4, 128, 128)
    assert (work.items, work.waves, work.steps, work.tile, work.depth) == (4, 1, 4, (4, 64), 64)
    assert work.matrix_cycles == 4 * 16 + 8
    assert work.cache_bytes == 2 * (4 * 128 + 4 * 128)


@pytest.mark.parametrize(("n", "k", "tiles"), [(64, 64, 1), (65, 64, 2), (64, 65, 2), (1, 1, 1), (130, 129, 9)])
def test_tiles_are_padded_in_both_directions(n, k, tiles):
    work = mapped(3, n, k)
    assert work.items == tiles
    assert work.matrix_cycles == 3 * 16 + 8


def test_arrays_with_several_tiles_take_them_in_turn():
    # 2 x 3 = 6 tiles on 4 arrays: two of them have two. On 8 arrays none has.
    assert (mapped(5, 192, 128, on=few()).waves, mapped(5, 192, 128, on=few(2)).waves) == (2, 1)
    assert mapped(5, 192, 128, on=few()).matrix_cycles == 2 * 5 * 16 + 8
    assert mapped(5, 192, 128, on=few(2)).matrix_cycles == 5 * 16 + 8


def test_every_sequence_multiplies_with_its_own_fast_weight():
    # Three matrices of one tile each: on 4 arrays one round, five matrices take two.
    assert mapped(1, 64, 64, batch=3, on=few()).matrix_cycles == 16 + 8
    assert mapped(1, 64, 64, batch=5, on=few()).matrix_cycles == 2 * 16 + 8


def test_a_narrow_dtype_packs_elements_into_cells():
    # fp8 at twice the rate: 128 elements of the reduction in 64 rows, the same time per vector.
    assert mapped(3, 64, 128, on=few()).items == 2
    packed = mapped(3, 64, 128, dtype="fp8", on=few())
    assert (packed.items, packed.depth, packed.matrix_cycles) == (1, 128, 3 * 16 + 8)


def test_the_peak_is_never_beaten_and_efficiency_counts():
    # bf16 at half the rate of its geometry (bits one after another): 32 cycles a vector; at 80 % of the peak 20. fp8
    # at 1.5 times: two elements a cell, 2 / 1.5 x 16 = 21.33 cycles; 3 vectors take 64.
    slow = cim(compute__array__peak__bf16="65.536 TFLOP/s", compute__array__peak__fp8="196.608 TFLOP/s")
    assert mapped(3, 64, 64, on=slow).matrix_cycles == 3 * 32 + 8
    assert mapped(3, 64, 64, on=cim(compute__array__efficiency__bf16="0.8")).matrix_cycles == 3 * 20 + 8
    assert mapped(3, 64, 64, dtype="fp8", on=slow).matrix_cycles == 64 + 8
    for m, n, k in ((1, 64, 64), (7, 100, 300), (64, 4096, 1024)):
        for on in (cim(), few(), slow):
            assert mapped(m, n, k, on=on).matrix_cycles >= 2 * m * n * k / (on.unit("matrix").peak_per_s["bf16"] / 1e9)


def test_a_processor_at_a_bank_serves_many_rows():
    # 16 lanes that take one row of 16 weights a cycle, 4 of them: 64 rows x 2 columns of tiles = 128 over 4 units.
    bank = replace(
        few().unit("matrix"), rows=1, cols=16, issue_cycles=1, startup_cycles=0, peak_per_s={"bf16": 4 * 16 * 2 * 1e9}
    )
    pim = replace(few(), units=(bank, *few().units[1:]))
    work = product(pim, m=3, n=32, k=64, batch=1, dtype="bf16")
    assert (work.items, work.waves, work.matrix_cycles) == (128, 32, 3 * 32)
    assert work.matrix_cycles == 2 * 3 * 32 * 64 / (4 * 16 * 2)  # at the peak


def test_weights_stay_and_only_vectors_travel(engine):
    # A is read: 1024 B / 256 = 4 cycles; through the buffer 2048 B / 512 = 4; C written: 1024 / 128 = 8. Four steps:
    # one of the read and one of the buffer before, a quarter of the write after.
    result = simulate_trace(cim(), gemm_trace(4, 128, 128), engine=engine)
    assert result.lowered.traffic.read_place.tolist() == [MAIN, IN_PLACE]
    assert result.lowered.work.cycles[0, [READ, CACHE, MATRIX, WRITE]].tolist() == [4, 4, 72, 8]
    assert result.cycles == 1 + 1 + 72 + 2
    main = result.main_bytes()
    assert (main["read", "weights"].sum(), main["write", "activations"].sum()) == (1024, 1024)
    assert result.ops()["main_read_bytes"].tolist() == [1024]
    assert result.lowered.work.main_read_bytes.tolist() == [1024]


def test_row_wise_kernels_read_weights_as_on_any_chip():
    t = HandTrace()
    t.weight("x", 65536)
    t.weight("y", 65536)
    add_residual(t, "x", "y", "z")
    assert simulate_trace(cim(), t.build()).lowered.traffic.read_place.tolist() == [MAIN, MAIN]


def test_a_fast_weight_that_products_use_in_the_cells_must_be_written_there():
    # Written twice in a row: tiny_gpu keeps the first version in its cache, which the reader finds there.
    t = HandTrace()
    t.tensor("delta", 8192, Role.CARRY, exists=True)
    t.tensor("w", 8192, Role.FAST_WEIGHT, exists=True)
    t.weight("x", 128)
    for version in (0, 1):
        t.op(
            "weight_write", m=64, n=64, reads=[("delta", 0, 8192), ("w", version, 8192)],
            writes=[("w", version + 1, 8192)], phase=Phase.WEIGHT_WRITE,
        )  # fmt: skip
        t.tensor(f"y{version}", 128)
        t.op(
            "fast_apply", m=1, n=64, k=64, reads=[("x", 0, 128), ("w", version + 1, 8192)],
            writes=[(f"y{version}", 0, 128)],
        )  # fmt: skip
    trace = t.build()
    kept = lower(trace, chip("tiny_gpu")).traffic
    assert (kept.write_place[0], kept.read_place[3]) == (CACHED, CACHED)
    stored = lower(trace, cim(writability__accumulate="false")).traffic
    assert (stored.write_place[0], stored.read_place[3]) == (MAIN, IN_PLACE)


# --- products of two operands that are not stored ---------------------------------------------------------------------


def test_the_smaller_operand_is_written_into_volatile_arrays(engine):
    # Targets (64 x 32, 4096 B) are fewer than hidden rows (192 x 32): they fill one tile, 192 vectors pass. The delta
    # is 24576 B.
    result = simulate_trace(cim(), delta_trace(), engine=engine)
    work = result.lowered.work
    assert work.staged_bytes.tolist() == [4096]
    assert work.main_write_bytes.tolist() == [4096 + 24576]
    assert (work.items[0], work.tile_rows[0], work.tile_cols[0]) == (1, 64, 192)
    assert work.cycles[0, [MATRIX, WRITE]].tolist() == [192 * 16 + 8, (4096 + 24576) // 128]
    main = result.main_bytes()
    assert (main["write", "activations"].sum(), main["write", "gradients"].sum()) == (4096, 24576)
    assert result.ops()["main_write_bytes"].tolist() == [4096 + 24576]


def test_of_the_two_operands_either_may_be_the_smaller():
    # B of 32 x 64 elements is written (one tile), 192 rows of A pass.
    work = mapped(192, 64, 32, operand=STAGED)
    assert (work.items, work.tile, work.matrix_cycles) == (1, (192, 64), 192 * 16 + 8)
    assert work.cache_bytes == 2 * (192 * 32 + 32 * 64 + 192 * 64)
    assert lower(delta_trace(m=192, n=64), cim()).work.staged_bytes.tolist() == [2 * 64 * 32]


@pytest.mark.parametrize("on", [chip("tiny_pcm"), cim(writability__mode="reupload", writability__reupload_time="1 us")])
def test_lanes_multiply_where_arrays_cannot_be_written_for_one_product(engine, on):
    # 64 x 192 x 32 multiply-adds on 64 lanes.
    result = simulate_trace(on, delta_trace(), engine=engine)
    work = result.lowered.work
    assert work.cycles[0, [MATRIX, VECTOR]].tolist() == [0, 64 * 192 * 32 // 64]
    assert work.staged_bytes.tolist() == [0]
    assert work.main_write_bytes.tolist() == [24576]
    energy = result.dynamic_energy_j()
    assert energy["array"].sum() == 0
    assert energy["lanes"].sum() == pytest.approx(64 * 192 * 32 * 1e-12)
    assert result.ops()["energy_j"].sum() == pytest.approx(sum(float(part.sum()) for part in energy.values()))


def test_without_lanes_such_a_product_is_refused():
    pcm = chip("tiny_pcm")
    bare = replace(pcm, units=(pcm.unit("matrix"),))
    with pytest.raises(UnsupportedError, match=r"tiny_pcm: delta_gemm multiplies two operands of which none is stored"):
        lower(delta_trace(), bare)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on", "passes"), [(cim(), 2), (few(), 4)])
def test_attention_is_two_products_with_keys_and_values_in_place(engine, on, passes):
    # 4 heads on 2 KV heads of 64, one query after 199 rows: two vectors for each of 4 blocks of 64 keys and 2 KV heads,
    # 8 tiles of keys and 8 of values. With 4 arrays two of each lie on each of them.
    trace = attention_trace(m=1, before=199, heads=4, kv_heads=2, head_dim=64, window=None)
    result = simulate_trace(on, trace, engine=engine)
    work = result.lowered.work
    assert result.lowered.traffic.read_place.tolist() == [MAIN, IN_PLACE]
    assert work.cycles[0, MATRIX] == 2 * passes * 16 + 8
    assert work.main_read_bytes.tolist() == [2 * 4 * 64]
    # queries in, results out, probabilities of 4 x 256 pairs in and out
    assert work.cache_bytes.tolist() == [2 * (4 * 64 + 4 * 64 + 2 * 4 * 256)]
    assert work.cycles[0, [VECTOR, SPECIAL]].tolist() == [-(-4 * 4 * 200 // 64), 4 * 200 // 16]


@pytest.mark.parametrize(
    ("window", "vectors"),
    [
        (None, (128, 64)),  # the first 64 queries do not see the second block
        (64, (127, 64)),  # the last one does not see the first block any more
        (1, (64, 64)),
    ],
)
def test_queries_pass_only_the_blocks_that_they_see(window, vectors):
    trace = attention_trace(m=128, before=0, heads=1, kv_heads=1, head_dim=64, window=window)
    assert lower(trace, cim()).work.cycles[0, MATRIX] == 2 * vectors[0] * 16 + 8
    unit = replace(few().unit("matrix"), peak_per_s={"bf16": 512e9})  # one array for all tiles of a kind
    alone = replace(few(), cores=1, units=(unit, *few().units[1:]))
    assert lower(trace, alone).work.cycles[0, MATRIX] == 2 * sum(vectors) * 16 + 8


def test_tiles_with_most_vectors_are_dealt_out_first():
    # 100 queries after 63 rows, each sees 64 keys: 64 of them block 0, 99 block 1, 35 block 2. On two arrays the two
    # busiest blocks make one round, the third another.
    trace = attention_trace(m=100, before=63, heads=1, kv_heads=1, head_dim=64, window=64)
    unit = replace(few().unit("matrix"), peak_per_s={"bf16": 1024e9})
    two = replace(few(), cores=2, units=(unit, *few().units[1:]))
    assert lower(trace, two).work.cycles[0, MATRIX] == 2 * (99 + 35) * 16 + 8


def test_heads_wider_or_narrower_than_an_array_and_its_efficiency_in_attention():
    # 128 wide: two tiles along the reduction of the scores, two of columns of the values: 2 x 2 on 1 array each.
    wide = attention_trace(m=1, before=63, heads=1, kv_heads=1, head_dim=128, window=None)
    unit = replace(few().unit("matrix"), peak_per_s={"bf16": 512e9})
    alone = replace(few(), cores=1, units=(unit, *few().units[1:]))
    assert lower(wide, alone).work.cycles[0, MATRIX] == 2 * 2 * 16 + 8
    narrow = attention_trace(m=1, before=63, heads=1, kv_heads=1, head_dim=16, window=None)
    assert lower(narrow, alone).work.cycles[0, MATRIX] == 2 * 16 + 8
    half = cim(mapping__attention_efficiency="0.5")
    assert lower(narrow, half).work.cycles[0, MATRIX] == 2 * 32 + 8


@pytest.mark.parametrize("stored", [0, 64])
def test_rows_that_are_not_in_the_cache_yet_are_written_for_the_core(stored):
    # Keys and values of 64 rows of 64: 16 KiB; every query sees all blocks.
    result = simulate_trace(cim(), fresh_trace(stored=stored))
    work, places = result.lowered.work, result.lowered.traffic.read_place.tolist()
    assert work.staged_bytes.tolist() == [2 * 64 * 128]
    assert places[2:] == [MAIN, MAIN]
    if stored:
        assert places[1] == IN_PLACE
    assert work.cycles[0, MATRIX] == 2 * 64 * 16 + 8


def test_an_output_that_goes_on_is_not_written_into_arrays():
    # 64 queries go on over 64 keys and values that another chip sent, 16 KiB; the output so far is 8 KiB more.
    row = 2 * 64
    t = HandTrace()
    t.weight("q", 64 * row)
    t.tensor("received", 2 * 64 * row, Role.ACTIVATION, exists=True)
    t.tensor("out", 64 * row, Role.ACTIVATION, exists=True)
    t.op(
        "attention", m=64, n=64, k=64, heads=1, kv_heads=1, position=64, pairs=64 * 64,
        reads=[("q", 0, 64 * row), ("received", 0, 2 * 64 * row), ("out", 0, 64 * row)], writes=[("out", 1, 64 * row)],
    )  # fmt: skip
    assert lower(t.build(), cim()).work.staged_bytes.tolist() == [2 * 64 * row]


def test_lanes_attend_where_they_cannot_be_written_for_it():
    # 64 x 128 pairs of 64 elements, two products: 4 FLOP, 2 multiply-adds, beside 4 lane operations of the softmax.
    result = simulate_trace(chip("tiny_pcm"), fresh_trace(stored=64))
    work = result.lowered.work
    assert result.lowered.traffic.read_place.tolist() == [MAIN] * 4
    assert work.cycles[0, [MATRIX, VECTOR]].tolist() == [0, (2 * 64 + 4) * 64 * 128 // 64]
    assert work.main_read_bytes.tolist() == [64 * 128 + 4 * 64 * 128]


# --- chips ------------------------------------------------------------------------------------------------------------


def test_event_driven_chips_pay_a_barrier_for_every_op(engine):
    # Two products of a vector, each 64 cycles; read 2 (128 B / 64), buffer 1, write 2.
    t = HandTrace()
    t.weight("x", 128)
    for i in range(2):
        t.weight(f"w{i}", 8192)
        t.tensor(f"y{i}", 128)
        t.op("down_proj", m=1, n=64, k=64, reads=[("x", 0, 128), (f"w{i}", 0, 8192)], writes=[(f"y{i}", 0, 128)])
    result = simulate_trace(chip("tiny_neuro"), t.build(), engine=engine)
    assert result.lowered.work.launch_cycles.tolist() == [1000, 1000]
    assert result.lowered.work.cycles[:, MATRIX].tolist() == [64, 64]
    assert result.lowered.traffic.read_place.tolist() == [MAIN, IN_PLACE, CACHED, IN_PLACE]
    first = 1000 + 4 + 1 + 64 + 4  # 256 B of interleave at 64 B a cycle
    assert result.cycles == first + 1000 + 1 + 64 + 4


@pytest.mark.parametrize("execution", ["in_memory", "event_driven"])
def test_other_matrix_units_are_refused(execution):
    with pytest.raises(ConfigError, match=f"tiny_gpu: execution {execution} needs a matrix unit of dataflow in_"):
        lower(gemm_trace(4, 64, 64), chip("tiny_gpu", execution=execution))


def test_scans_run_on_lanes_or_not_at_all():
    t = HandTrace()
    t.tensor("q", 4096, exists=True)
    t.op("delta_rule", m=16, n=16, k=16, heads=1, reads=[("q", 0, 4096)])
    work = lower(t.build(), cim()).work
    assert work.lane_ops[0] == 3 * 16 * 16 * 16  # half of the FLOPs: multiply-adds
    assert work.cycles[0, VECTOR] == -(-3 * 16 * 16 * 16 // 64)
    assert work.cycles[0, MATRIX] == 0
    base = cim()
    without = replace(base, units=tuple(unit for unit in base.units if unit.kind == "matrix"))
    with pytest.raises(UnsupportedError, match="delta_rule changes a state as it goes, which needs a vector unit"):
        lower(t.build(), without)


def test_a_dtype_without_a_peak_is_refused():
    with pytest.raises(UnsupportedError, match=r"tiny_cim: unit array has no peak for dtype int4"):
        in_memory.arrays_of(cim(), "int4")
