"""Which operands reach the main memory: fusion, sharing, reuse distance, pinning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip
from tests.unit.trace_tools import TOY
from ttt_sim.errors import CapacityError
from ttt_sim.grid import make_point
from ttt_sim.lower import Lowered, lower
from ttt_sim.lower.traffic import CACHED, FUSED, MAIN, SHARED
from ttt_sim.model import Scenario, TTTSettings
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.simulation import simulate_point, simulate_trace
from ttt_sim.workload import METHODS, build_trace

MIB = 1 << 20


PLACES = {MAIN: "main", CACHED: "cached", FUSED: "fused", SHARED: "shared"}


def reads(lowered: Lowered) -> list[str]:
    return [PLACES[place] for place in lowered.traffic.read_place]


def writes(lowered: Lowered) -> list[str]:
    return [PLACES[place] for place in lowered.traffic.write_place]


def reuse_trace(between: int) -> Trace:
    """Read a weight of 64 KiB, then move ``between`` bytes (half in, half out), then read the weight again."""
    t = HandTrace()
    t.weight("w", 65536)
    t.weight("other", between // 2)
    for name, size in (("first", 4096), ("copy", between - between // 2), ("second", 4096)):
        t.tensor(name, size)
    t.op("kv_append", m=1, n=1, reads=[("w", 0, 65536)], writes=[("first", 0, 0)])
    t.op(
        "attn_norm", m=1, n=1, reads=[("other", 0, between // 2)], writes=[("copy", 0, between - between // 2)]
    )  # fmt: skip
    t.op("kv_append", m=1, n=1, reads=[("w", 0, 65536)], writes=[("second", 0, 0)])
    return t.build()


@pytest.mark.parametrize(
    ("between", "place"), [(MIB - 65536, "cached"), (MIB - 65536 + 1, "main"), (2, "cached")]
)  # fmt: skip
def test_reuse_distance_decides_to_the_byte(between, place):
    # own 64 KiB and what lies between must fit the cache of 1 MiB
    assert reads(lower(reuse_trace(between), chip()))[-1] == place


def written_beside(beside: int, *, between: int, made: bool) -> Trace:
    """A kernel makes v of 64 KiB (else reads it) and writes ``beside`` other bytes; ``between`` bytes are read; then v
    is read."""
    t = HandTrace()
    t.weight("x", 65536)
    t.weight("other", between)
    if made:
        t.tensor("v", 65536)
    else:
        t.weight("v", 65536)
    for name, size in (("beside", beside), ("sink", 1), ("out", 1)):
        t.tensor(name, size)
    touch = ("v", 0, 65536)
    t.op(
        "kv_append", m=1, n=1, reads=[("x", 0, 65536) if made else touch],
        writes=[*([touch] if made else []), ("beside", 0, beside)],
    )  # fmt: skip
    t.op("silu_mul", m=1, n=1, reads=[("other", 0, between)], writes=[("sink", 0, 0)])
    t.op("kv_append", m=1, n=1, reads=[touch], writes=[("out", 0, 0)])
    return t.build()


@pytest.mark.parametrize("between", [1, MIB // 2])
@pytest.mark.parametrize(("made", "own"), [(True, 65536), (False, 0)])
def test_what_the_last_kernel_wrote_takes_cache_too(made, own, between):
    # All that the kernel wrote (v too, if it made it) and what lies between must fit 1 MiB; v counts once.
    largest = MIB - between - own
    assert reads(lower(written_beside(largest, between=between, made=made), chip()))[-1] == "cached"
    assert reads(lower(written_beside(largest + 1, between=between, made=made), chip()))[-1] == "main"


@pytest.mark.parametrize(("made", "place"), [(MIB, "cached"), (MIB + 1, "main")])
def test_a_part_of_what_overran_the_cache_comes_from_main_memory(made, place):
    # Which rows of a long result are left in the cache is not known, so the last one counts as all of it.
    t = HandTrace()
    t.weight("x", 65536)
    t.tensor("rows", made)
    t.tensor("out", 1)
    t.op("rope", m=64, n=512, reads=[("x", 0, 65536)], writes=[("rows", 0, made)])
    t.op("final_norm", m=1, n=512, reads=[("rows", 0, 1024)], writes=[("out", 0, 0)])
    assert reads(lower(t.build(), chip()))[-1] == place


def test_only_a_share_of_the_cache_counts():
    half = chip(mapping__cache_fraction=0.5)
    assert reads(lower(reuse_trace(MIB // 2 - 65536), half))[-1] == "cached"
    assert reads(lower(reuse_trace(MIB // 2 - 65536 + 1), half))[-1] == "main"


def test_a_chip_without_a_shared_cache_reuses_nothing():
    dataflow = chip("tiny_dataflow", execution="tile_wave")
    assert dataflow.cache is None
    assert reads(lower(reuse_trace(2), dataflow))[-1] == "main"


def test_fused_shared_and_cached_operands():
    # z is made and used in one kernel, x is used by both ops of that kernel, w goes from kernel to kernel in the
    # cache.
    t = HandTrace()
    for name in ("x", "y", "u"):
        t.weight(name, 65536)
    add_residual(t, "x", "y", "z")
    t.tensor("w", 65536)
    t.op("mlp_norm", m=64, n=512, reads=[("z", 0, 65536), ("x", 0, 65536)], writes=[("w", 0, 65536)])
    add_residual(t, "w", "u", "out")
    lowered = lower(t.build(), chip())
    assert lowered.kernels.of_op.tolist() == [0, 0, 1]
    assert reads(lowered) == ["main", "main", "fused", "shared", "cached", "main"]
    assert writes(lowered) == ["fused", "cached", "main"]
    assert lowered.traffic.main_read_bytes.tolist() == [2 * 65536, 65536]
    assert lowered.traffic.main_write_bytes.tolist() == [0, 65536]
    # x, y and w pass the cache in the first kernel; w, u and the result in the second
    assert lowered.traffic.on_chip_bytes.tolist() == [3 * 65536, 3 * 65536]


def test_a_value_that_one_later_reader_misses_is_written():
    # z is read in the next kernel and once more after 1 MiB of other traffic.
    t = HandTrace()
    for name, size in (("x", 65536), ("y", 65536), ("big", MIB)):
        t.weight(name, size)
    add_residual(t, "x", "y", "z")
    for name in ("v", "sink", "w"):
        t.tensor(name, 65536)
    t.op("rope", m=64, n=512, reads=[("z", 0, 65536)], writes=[("v", 0, 65536)])
    t.op("silu_mul", m=64, n=512, reads=[("big", 0, MIB)], writes=[("sink", 0, 0)])
    t.op("rope", m=64, n=512, reads=[("z", 0, 65536)], writes=[("w", 0, 65536)])
    lowered = lower(t.build(), chip())
    assert reads(lowered) == ["main", "main", "cached", "main", "main"]
    assert writes(lowered)[0] == "main"
    assert lowered.traffic.needs_main.tolist() == [False, False, False, True]


def state_trace(between: int) -> Trace:
    """Write a fast weight twice, ``between`` bytes of other reads apart."""
    t = HandTrace()
    t.weight("d", 4096)
    t.weight("other", between)
    t.tensor("W", 4096, Role.FAST_WEIGHT, exists=True)
    t.tensor("sink", 1)
    for version in (0, 1):
        t.op(
            "weight_write", m=1, n=2048, reads=[("d", 0, 4096), ("W", version, 4096)],
            writes=[("W", version + 1, 4096)], phase=Phase.WEIGHT_WRITE, chunk=version,
        )  # fmt: skip
        if version == 0:
            t.op("kv_append", m=1, n=1, reads=[("other", 0, between)], writes=[("sink", 0, 0)])
    return t.build()


def test_state_overwritten_soon_stays_in_the_cache_but_its_last_version_is_written():
    near = lower(state_trace(65536), chip(), overlap=False)
    assert [writes(near)[0], writes(near)[2]] == ["cached", "main"]
    far = lower(state_trace(MIB), chip(), overlap=False)
    assert [writes(far)[0], writes(far)[2]] == ["main", "main"]


@pytest.mark.parametrize(("between", "place"), [(MIB - 4096, "cached"), (MIB - 4096 + 1, "main")])
def test_state_overwritten_without_being_read(between, place):
    # What an accumulator held is dropped in the cache if the next version comes while it is still there.
    t = HandTrace()
    t.weight("d", 4096)
    t.weight("other", between)
    t.tensor("A", 4096, Role.CARRY, exists=True)
    t.tensor("sink", 1)
    t.op("kv_append", m=1, n=1, reads=[("d", 0, 4096)], writes=[("A", 1, 4096)])
    t.op("silu_mul", m=1, n=1, reads=[("other", 0, between)], writes=[("sink", 0, 0)])
    t.op("kv_append", m=1, n=1, reads=[("d", 0, 4096)], writes=[("A", 2, 4096)])
    assert writes(lower(t.build(), chip()))[0] == place


# --- fast weights pinned on chip --------------------------------------------------------------------------------------

RESIDENT = TTTSettings(layers=(0, 2), chunk_tokens=32, weight_write="resident")
#: Fast weights of two layers of the toy, 64 x 192 in bf16.
TOY_FAST_BYTES = 2 * 64 * 192 * 2


def toy_trace(ttt: TTTSettings) -> Trace:
    return build_trace(TOY, METHODS["ttt"].settings(None, None, ttt), Scenario.prefill(96))


def test_resident_fast_weights_never_leave_the_chip(engine):
    result = simulate_trace(chip(), toy_trace(RESIDENT), engine=engine)
    main = result.main_bytes()
    assert main["read", "fast_weights"].sum() == main["write", "fast_weights"].sum() == 0
    fused = simulate_trace(
        chip(memories__l2__capacity="16 KiB"), toy_trace(TTTSettings(layers=(0, 2), chunk_tokens=32))
    )
    assert fused.main_bytes()["write", "fast_weights"].sum() > 0  # the same layers, not pinned


def test_pinned_bytes_are_lost_to_other_reuse():
    # A reuse distance that just fits the cache does not fit beside a pinned tensor of 4 KiB.
    alone = reuse_trace(MIB - 65536)
    beside = replace(alone, meta={"pinned": ["second"]})
    assert [reads(lower(trace, chip()))[-1] for trace in (alone, beside)] == ["cached", "main"]


def test_pinned_tensors_are_always_in_the_cache():
    far = replace(reuse_trace(2 * MIB), meta={"pinned": ["w"]})
    places = reads(lower(far, chip()))
    assert [places[0], places[-1]] == ["cached", "cached"]


@pytest.mark.parametrize(("capacity", "fits"), [(TOY_FAST_BYTES, True), (TOY_FAST_BYTES - 1, False)])
def test_pinned_weights_must_fit_the_cache(capacity, fits):
    small = chip(memories__l2__capacity=f"{capacity} B")
    if fits:
        lower(toy_trace(RESIDENT), small)
    else:
        with pytest.raises(CapacityError, match=r"48 KiB of fast weights are to stay on chip, but .* of l2 are usable"):
            lower(toy_trace(RESIDENT), small)


def test_pinned_weights_need_a_cache():
    with pytest.raises(CapacityError, match="tiny_dataflow has no cache that all cores share"):
        lower(toy_trace(RESIDENT), chip("tiny_dataflow", execution="tile_wave"))


def test_a_point_whose_pinned_weights_do_not_fit_says_so():
    point = make_point("h100", "Qwen3-4B", "ttt", context=4096, ttt=TTTSettings(weight_write="resident"))
    record = simulate_point(point).record
    assert record["fits"] is False
    assert "to stay on chip" in str(record["reason"])


# --- every operand lands in one class ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["none", "vector", "epilogue", "layer"])
def test_classes_add_up_to_the_trace(fusion):
    trace = toy_trace(TTTSettings(layers=(0, 2), chunk_tokens=32))
    lowered = lower(trace, chip(mapping__fusion=fusion))
    for place, nbytes in (
        (lowered.traffic.read_place, trace.read_bytes),
        (lowered.traffic.write_place, trace.write_bytes),
    ):
        by_class = [int(nbytes[place == code].sum()) for code in (MAIN, CACHED, FUSED, SHARED)]
        assert sum(by_class) == nbytes.sum()
        if fusion == "none":
            assert by_class[FUSED] == by_class[SHARED] == 0
    assert np.array_equal(
        lowered.traffic.on_chip_bytes.sum(),
        trace.read_bytes[lowered.traffic.read_place <= CACHED].sum()
        + trace.write_bytes[lowered.traffic.write_place <= CACHED].sum(),
    )
