"""Weights and state that lie behind the main memory, worked out by hand on tiny_tiers.

tiny_tiers is tiny_gpu (test_lower_cycles.py) with a main memory of 512 KiB and behind it 16 MiB at 4 sustained bytes a
cycle, with a latency of 40 cycles.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip
from ttt_sim.bounds import check, roofline_cycles
from ttt_sim.chip import Chip
from ttt_sim.errors import ConfigError, ConservationError
from ttt_sim.grid import make_point
from ttt_sim.lint import lint_chip
from ttt_sim.lower import lower
from ttt_sim.lower.spill import part_of
from ttt_sim.lower.work import FAR, READ, WRITE
from ttt_sim.ops import Role, Trace
from ttt_sim.results import Result
from ttt_sim.show import describe
from ttt_sim.simulation import simulate_point, simulate_trace

KIB = 1024


def tiers(**overrides: str | float | int) -> Chip:
    return chip("tiny_tiers", **overrides)


def without_tier(capacity_bytes: int) -> Chip:
    """The same chip with nothing behind a main memory of this size."""
    main, *inner = tiers().memories[1:]
    return replace(tiers(), memories=(replace(main, capacity_bytes=capacity_bytes), *inner))


def spilled(result: Result) -> dict[str, int]:
    nbytes = zip(result.trace.tensors, result.lowered.traffic.spilled_bytes.tolist(), strict=True)
    return {tensor.name: size for tensor, size in nbytes if size}


def decode_attention(*, keys: int) -> Trace:
    """One query row of one head of width 64 over ``keys`` keys; K and V take 256 bytes a key."""
    t = HandTrace()
    t.weight("q", 128)
    t.tensor("kv", 256 * keys, Role.KV, exists=True)
    t.tensor("out", 128)
    t.op(
        "attention", m=1, n=keys, k=64, heads=1, kv_heads=1, position=keys - 1, pairs=keys,
        reads=[("q", 0, 128), ("kv", 0, 256 * keys)], writes=[("out", 0, 128)],
    )  # fmt: skip
    return t.build()


def two_layers(*, steps: int = 1) -> Trace:
    """Every step reads weights a and b (64 KiB) of layer 0, then c and d of layer 1, and the state between them."""
    t = HandTrace()
    for name in "abcd":
        t.weight(name, 64 * KIB)
    t.weight("idle", KIB)
    t.tensor("state", 64 * KIB, Role.FAST_WEIGHT, exists=True)
    t.tensor("rare", 32 * KIB, Role.KV, exists=True)
    for step in range(steps):
        add_residual(t, "a", "b", f"x{step}", step=step)
        for name in ("state", "rare") if step == 0 else ("state",):
            size = t.tensors[name].nbytes
            t.tensor(f"{name}{step}", 1)
            t.op("kv_append", m=1, n=1, reads=[(name, 0, size)], writes=[(f"{name}{step}", 0, 0)], step=step)
        add_residual(t, "c", "d", f"y{step}", step=step)
    return t.build()


PERSISTENT = (4 * 64 + 1 + 64 + 32) * KIB


# --- what is spilled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, {}),
        (1, {"idle": 1}),  # never read
        (KIB + 7, {"idle": KIB, "rare": 7}),  # state that is read once
        (33 * KIB + 7, {"idle": KIB, "rare": 32 * KIB, "state": 7}),  # state that is read in both steps
        (97 * KIB + 7, {"idle": KIB, "rare": 32 * KIB, "state": 64 * KIB, "c": 7}),  # weights of the last layer
        (
            225 * KIB + 7,
            {"idle": KIB, "rare": 32 * KIB, "state": 64 * KIB, "c": 64 * KIB, "d": 64 * KIB, "a": 7},
        ),
        (10**9, dict.fromkeys("abcd", 64 * KIB) | {"idle": KIB, "rare": 32 * KIB, "state": 64 * KIB}),
    ],
)
def test_coldest_first_and_to_the_byte(nbytes, expected):
    trace = two_layers(steps=2)
    lowered = lower(trace, tiers(memories__l2__capacity="32 KiB"), spill_bytes=nbytes)
    assert spilled(Result(chip=tiers(), trace=trace, lowered=lowered, timeline=None)) == expected  # type: ignore[arg-type]


def test_exactly_the_excess_is_spilled():
    # Weights and state take 353 KiB, x and y one after the other 64 KiB each: at least 417 KiB at the peak.
    trace = two_layers()
    peak = simulate_trace(without_tier(1 << 30), trace).peak_memory_bytes()
    assert peak >= PERSISTENT + 64 * KIB
    for room in (peak, peak - 1, peak - 5000, peak - PERSISTENT):
        result = simulate_trace(tiers(memories__hbm__capacity=room), trace)
        assert result.spilled_bytes == peak - room
        assert result.peak_memory_bytes() == peak


def test_nothing_spilled_takes_the_same_cycles_as_without_the_tier(engine):
    for trace in (two_layers(steps=2), decode_attention(keys=1024)):
        behind, alone = (simulate_trace(c, trace, engine=engine) for c in (tiers(), without_tier(512 * KIB)))
        assert behind.spilled_bytes == 0
        assert behind.timeline.finish_cycles.tolist() == alone.timeline.finish_cycles.tolist()
        assert behind.lowered.work.cycles.tolist() == alone.lowered.work.cycles.tolist()
        assert behind.main_bytes().keys() == alone.main_bytes().keys()
        assert dict(behind.units().set_index("unit").loc["ddr"])["busy_cycles"] == 0
        assert "ddr" not in alone.lowered.program.unit_names


# --- what that costs --------------------------------------------------------------------------------------------------


def test_decode_step_that_reads_spilled_keys_is_bound_by_the_far_memory(engine):
    # 4096 keys are 1 MiB. q (128 B) and the result (128 B) stay, so 1 MiB + 256 B - 512 KiB are spilled, half of K and
    # V and 256 B: 524544 B at 4 a cycle are 131136 cycles. What is left, 524032 B and q in 2048 units of 256 B, takes
    # 8192 at 64 a cycle.
    result = simulate_trace(tiers(), decode_attention(keys=4096), engine=engine, compare_engines=True)
    assert spilled(result) == {"kv": 512 * KIB + 256}
    work = result.lowered.work
    assert work.cycles[0, [FAR, READ]].tolist() == [131136, 8192]
    assert work.far_read_bytes.tolist() == [524544]
    assert work.main_read_bytes.tolist() == [524032 + 128]
    assert work.launch_cycles.tolist() == [40]
    assert result.bound_by() == ["ddr"]
    assert roofline_cycles(result.trace, result.chip, result.lowered)["ddr"] == 524544 / 8
    # The latency, the far memory, and one of the 32 steps (blocks of 128 keys) of every level behind it.
    steps = int(work.steps[0])
    behind = sum(-(-int(cycles) // steps) for cycles in work.cycles[0, READ:])
    assert 40 + 131136 < result.cycles <= 40 + 131136 + behind + 8


def test_spilled_fast_weight_moves_both_ways(engine):
    # Of a 64 KiB fast weight that is read and written, all is spilled: 16384 cycles each way at 4 bytes a cycle.
    t = HandTrace()
    t.tensor("W", 64 * KIB, Role.FAST_WEIGHT, exists=True)
    t.tensor("delta", 64 * KIB, Role.WEIGHT, exists=True)
    t.op(
        "weight_write", m=64, n=512, reads=[("W", 0, 64 * KIB), ("delta", 0, 64 * KIB)], writes=[("W", 1, 64 * KIB)]
    )  # fmt: skip
    trace = t.build()
    room: dict[str, str | float | int] = {"memories__hbm__capacity": 64 * KIB}
    bus = simulate_trace(tiers(**room), trace, engine=engine)
    assert spilled(bus) == {"W": 64 * KIB}
    assert bus.lowered.work.cycles[0, [FAR, READ, WRITE]].tolist() == [2 * 16384, 1024, 0]
    ports = simulate_trace(tiers(**room, memories__ddr__shared_bus="false"), trace, engine=engine)
    assert ports.lowered.work.cycles[0, FAR] == 16384
    started = tiers(**room, memories__ddr__transfer_start="10 ns")
    assert simulate_trace(started, trace).lowered.work.cycles[0, FAR] == 2 * 16384 + 2 * 10
    # Each of them moves 64 KiB in and out, 128 and 256 pJ a byte.
    for result in (bus, ports):
        assert {name: values.tolist() for name, values in result.far_bytes().items()} == {
            "read": [64 * KIB], "write": [64 * KIB]
        }  # fmt: skip
        assert result.dynamic_energy_j()["ddr"].tolist() == pytest.approx([64 * KIB * 384e-12])
        assert result.main_bytes()["write", "fast_weights"].tolist() == [64 * KIB]  # of which all behind
        assert result.dynamic_energy_j()["hbm"].tolist() == pytest.approx([64 * KIB * 32e-12])
        summary = result.summary()
        assert (summary["main_read_bytes"], summary["main_write_bytes"]) == (128 * KIB, 64 * KIB)
        assert (summary["far_read_bytes"], summary["far_write_bytes"]) == (64 * KIB, 64 * KIB)
        assert result.ops()["energy_j"].sum() == pytest.approx(sum(v.sum() for v in result.dynamic_energy_j().values()))
        ops = result.ops()
        assert (ops["far_read_bytes"].sum(), ops["far_write_bytes"].sum()) == (64 * KIB, 64 * KIB)


def test_spilled_weight_is_read_once_per_step():
    # The cache of 32 KiB keeps nothing from step to step. Of c, 7 bytes in each; of the rest all that was spilled.
    trace, steps = two_layers(steps=3), 3
    small = tiers(memories__l2__capacity="32 KiB")
    nbytes = (1 + 32 + 64) * KIB + 7
    result = lower(trace, small, spill_bytes=nbytes)
    assert int(result.traffic.far_read_bytes.sum()) == 32 * KIB + steps * (64 * KIB + 7)
    everything = lower(trace, small, spill_bytes=PERSISTENT)
    assert int(everything.traffic.main_read_bytes.sum()) == 0
    by_step = np.bincount(trace.step[everything.kernels.lead], everything.traffic.far_read_bytes).astype(np.int64)
    assert by_step.tolist() == [(5 * 64 + 32) * KIB, 5 * 64 * KIB, 5 * 64 * KIB]


def test_keys_that_are_streamed_again_come_from_both_memories_in_proportion():
    # Four tiles of 128 query rows on one core each; a cache of 4 KiB holds none of the keys of a head: every pass
    # beyond the first reads the keys again, a quarter of them from behind.
    t = HandTrace()
    size = 2 * 2 * 2048 * 64
    t.weight("q", 2 * 2048 * 64)
    t.tensor("kv", size, Role.KV, exists=True)
    t.tensor("out", 2 * 2048 * 64)
    t.op(
        "attention", m=2048, n=2048, k=64, heads=1, kv_heads=1, pairs=2048 * 2049 // 2,
        reads=[("q", 0, 2 * 2048 * 64), ("kv", 0, size)], writes=[("out", 0, 2 * 2048 * 64)],
    )  # fmt: skip
    small = tiers(memories__l2__capacity="4 KiB", memories__scratchpad__capacity="16 KiB")
    none, some = (lower(t.build(), small, spill_bytes=nbytes).work for nbytes in (0, size // 4))
    again = int(none.restream_bytes[0])
    assert again > 0
    assert some.restream_bytes.tolist() == [again]
    once, far_once = size + 2 * 2048 * 64, size // 4
    assert some.far_read_bytes.tolist() == [far_once + again * far_once // once]
    assert some.main_read_bytes[0] + some.far_read_bytes[0] == none.main_read_bytes[0] == once + again


def test_shares_of_huge_operands_do_not_overflow():
    huge, part = np.array([3 << 60, 5, 7]), np.array([1 << 40, 1, 0])
    assert part_of(huge, part, np.array([3 << 40, 2, 1])).tolist() == [1 << 60, 2, 0]


# --- does it fit ------------------------------------------------------------------------------------------------------


def point(chosen: Chip, phase: str, context: int) -> dict[str, object]:
    outcome = simulate_point(make_point(chosen, "toy", "kv", phase=phase, context=context, batch=2))  # type: ignore[arg-type]
    return dict(outcome.record)


def test_a_point_fits_with_its_spill():
    record = point(tiers(), "decode", 2000)
    assert record["fits"] is True
    assert record["spilled_bytes"] == int(str(record["peak_memory_bytes"])) - 512 * KIB > 0
    assert float(str(record["far_read_bytes"])) > 0
    assert record["bound_by"] == "ddr"
    roomy = point(tiers(memories__hbm__capacity="8 MiB"), "decode", 2000)
    assert (roomy["spilled_bytes"], roomy["far_read_bytes"], roomy["energy_ddr_j"]) == (0, 0, 0)
    assert roomy["cycles"] == point(without_tier(8 << 20), "decode", 2000)["cycles"]
    assert float(str(roomy["seconds"])) < float(str(record["seconds"]))
    assert point(without_tier(8 << 20), "decode", 2000)["spilled_bytes"] == 0


def test_what_overflows_both_memories_or_activations_that_overflow_the_main_one_do_not_fit():
    both = point(tiers(memories__ddr__capacity="1 MiB"), "decode", 2000)
    assert both["fits"] is False
    assert "of 1.5 MiB" in str(both["reason"])
    assert both["chips_needed"] == -(-int(str(both["bytes_needed"])) // (3 << 19)) > 1
    wide = point(tiers(), "prefill", 2000)
    assert wide["fits"] is False
    assert str(wide["reason"]).startswith("activations need ")
    assert str(wide["reason"]).endswith(" of 512 KiB")


def test_nothing_can_be_spilled_without_a_backing_memory():
    with pytest.raises(ConfigError, match="tiny_gpu: has no backing memory to hold 5 bytes"):
        lower(two_layers(), chip(), spill_bytes=5)


# --- laws and words ---------------------------------------------------------------------------------------------------


def test_lost_bytes_of_the_backing_memory_are_found():
    result = simulate_trace(tiers(), decode_attention(keys=4096))
    program = result.lowered.program
    on_ddr = program.unit == program.unit_names.index("ddr")
    assert int(program.nbytes[on_ddr].sum()) == 524544
    lost = program.nbytes.copy()
    lost[np.argmax(on_ddr)] -= 1
    broken = replace(result.lowered, program=replace(program, nbytes=lost))
    with pytest.raises(ConservationError, match="bytes of the backing memory: 524543 in the program, 524544"):
        check(result.trace, result.chip, broken, result.timeline)


def test_lint_wants_the_backing_memory_larger_and_slower_than_what_it_backs():
    assert lint_chip(tiers()) == []
    (small,) = lint_chip(tiers(memories__ddr__capacity="256 KiB"))
    assert small.severity == "warning"
    assert (small.path, small.message[:28]) == ("memories.ddr.capacity", "256 KiB is less than that of")
    (fast,) = lint_chip(tiers(memories__ddr__read_bandwidth="65 GB/s"))
    assert (fast.path, fast.severity) == ("memories.ddr.read_bandwidth", "warning")
    assert "65 GB/s is more than that of 'hbm'" in fast.message


def test_show_names_the_tiers():
    text = describe(tiers())
    assert "memory tiers: 512 KiB in hbm; what does not fit there in 16 MiB of ddr, at 8 GB/s" in text
    assert "ddr (backing)" in text
    assert "memory tiers" not in describe(chip())


def test_rows_that_an_append_in_the_same_kernel_did_not_make_are_read(engine):
    # One kernel appends a row of 256 B to 4096 of them and attends to all: what it reads is not its own result.
    t = HandTrace()
    t.weight("q", 128)
    t.weight("row", 256)
    t.tensor("kv", 4096 * 256, Role.KV, exists=True)
    t.tensor("out", 128)
    t.op("kv_append", m=1, n=128, reads=[("row", 0, 256)], writes=[("kv", 1, 256)])
    t.op(
        "attention", m=1, n=4096, k=64, heads=1, kv_heads=1, position=4095, pairs=4096,
        reads=[("q", 0, 128), ("kv", 1, 4096 * 256)], writes=[("out", 0, 128)],
    )  # fmt: skip
    result = simulate_trace(tiers(mapping__fusion="layer"), t.build(), engine=engine)
    assert result.lowered.kernels.n == 1
    moved = result.main_bytes()
    assert moved["read", "kv"].tolist() == [4096 * 256]
    assert result.far_bytes()["read"].tolist() == [spilled(result)["kv"]]
    assert result.bound_by() == ["ddr"]
