"""What writing weights at run time costs, and what is refused, worked out by hand.

tiny_gpu: 64 bytes of main memory a cycle (one bus), 256 of the cache, 64 lane operations; nothing for launches.
tiny_pcm: 128 bytes a cycle out of the cells, 64 / 8 pulses = 8 into them, 512 of the buffer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip
from ttt_sim.chip import Chip, Writability
from ttt_sim.errors import UnsupportedError
from ttt_sim.grid import make_point
from ttt_sim.lower import lower
from ttt_sim.lower.traffic import CACHED, IN_PLACE, MAIN
from ttt_sim.lower.work import LINK, MATRIX, READ, VECTOR, WRITE
from ttt_sim.model_config import load_ttt
from ttt_sim.ops import Phase, Role, Tensor, Trace
from ttt_sim.simulation import simulate_point, simulate_trace

WEIGHT = 2 * 64 * 64


def with_rules(base: Chip, **rules: object) -> Chip:
    usual = Writability(mode="free", overlap=False, shadow_bank=False, transposed_read=False)
    return replace(base, writability=replace(usual, **rules))  # type: ignore[arg-type]


def reuploading(granularity: str = "word", **rules: object) -> Chip:
    """tiny_gpu, written through the host: 500 cycles and 8 bytes a cycle."""
    usual = {"mode": "reupload", "granularity": granularity, "reupload_s": 500e-9, "reupload_bytes_per_s": 8e9}
    return with_rules(chip(), **{**usual, **rules})


def update_trace(*, norm: bool = False, master: bool = False) -> Trace:
    """A delta of 64 x 64 is added to a fast weight, beside a frozen weight of 32 KiB that nothing uses."""
    t = HandTrace()
    t.weight("frozen", 32768)
    t.tensor("delta", WEIGHT, Role.CARRY, exists=True)
    t.tensor("w", WEIGHT, Role.FAST_WEIGHT, exists=True)
    old, new = [("w", 0, WEIGHT)], [("w", 1, WEIGHT)]
    if master:
        t.tensor("copy", 2 * WEIGHT, Role.FAST_WEIGHT, exists=True)
        old, new = [("copy", 0, 2 * WEIGHT)], [("copy", 1, 2 * WEIGHT), ("w", 1, WEIGHT)]
    if norm:
        t.op("delta_norm", m=64, n=64, reads=[("delta", 0, WEIGHT)], phase=Phase.BACKWARD)
    t.op(
        "weight_write", m=64, n=64, reads=[("delta", 0, WEIGHT), *old], writes=new, phase=Phase.WEIGHT_WRITE
    )  # fmt: skip
    return t.build()


def append_trace(*, tokens: int, batch: int = 1, room: int = 64, role: Role = Role.KV) -> Trace:
    """``tokens`` rows of 256 B for each sequence, into state with room for more."""
    t = HandTrace()
    rows = batch * tokens * 256
    t.tensor("new", rows, Role.CARRY, exists=True)
    t.tensors["state"] = Tensor(
        name="state", shape=(batch, room, 128), dtype="bf16", role=role, nbytes=batch * room * 256, initial_version=0
    )
    t.op("kv_append", m=batch * tokens, n=128, reads=[("new", 0, rows)], writes=[("state", 1, rows)])
    return t.build()


# --- re-upload --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "nbytes"),
    [("word", WEIGHT), ("row", WEIGHT), ("tile", WEIGHT), ("device", 32768 + WEIGHT)],
)
def test_a_new_weight_goes_through_the_host(engine, granularity, nbytes):
    result = simulate_trace(reuploading(granularity), update_trace(), engine=engine)
    assert result.lowered.work.cycles[0, LINK] == 500 + nbytes // 8
    units = result.units()
    assert units.loc[units["unit"] == "link", "busy_cycles"].tolist() == [500 + nbytes // 8]


def test_a_reupload_may_cost_time_alone_or_bandwidth_alone():
    fixed = lower(update_trace(), reuploading(reupload_bytes_per_s=None)).work
    moved = lower(update_trace(), reuploading(reupload_s=0.0)).work
    assert (fixed.cycles[0, LINK], moved.cycles[0, LINK]) == (500, WEIGHT // 8)


def test_only_kernels_that_write_fast_weights_are_uploaded():
    assert lower(append_trace(tokens=1), reuploading()).work.cycles[:, LINK].tolist() == [0]


def test_the_chip_is_drained_and_waits_for_an_upload(engine):
    # An add before and one after that have nothing to do with the update and would run beside it.
    t = HandTrace()
    for name in ("x", "y"):
        t.weight(name, 65536)
    t.tensor("delta", WEIGHT, Role.CARRY, exists=True)
    t.tensor("w", WEIGHT, Role.FAST_WEIGHT, exists=True)
    add_residual(t, "x", "y", "before")
    t.op(
        "weight_write", m=64, n=64, reads=[("delta", 0, WEIGHT), ("w", 0, WEIGHT)], writes=[("w", 1, WEIGHT)],
        phase=Phase.WEIGHT_WRITE,
    )  # fmt: skip
    t.weight("z", 65536)
    add_residual(t, "x", "z", "after")
    base = chip(mapping__serial_kernels="false")
    rules = reuploading(overlap=True).writability
    result = simulate_trace(replace(base, writability=rules), t.build(), engine=engine)
    start, finish = result.kernel_span()
    program, timeline = result.lowered.program, result.timeline
    upload = program.unit == program.unit_names.index("link")
    first, last = timeline.start_cycles[upload].min(), timeline.finish_cycles[upload].max()
    assert result.lowered.kernels.stream.tolist() == [0, 0, 0]
    assert finish[0] <= first
    assert start[2] >= last
    free = simulate_trace(with_rules(base, overlap=True), t.build(), engine=engine)
    begun, ended = free.kernel_span()
    assert begun[2] < ended[1]  # otherwise it would


def test_uploads_count_in_whole_points():
    # Two chunks in each of two layers, and the copy of the trained weight at the start: 6 uploads of 64 x 192 in bf16.
    point = make_point(reuploading(), "toy", "ttt", phase="prefill", context=64, ttt=load_ttt("toy"), call_tokens=64)
    result = simulate_point(point).result
    assert result is not None
    assert result.lowered.work.cycles[:, LINK].sum() == 6 * (500 + 2 * 64 * 192 // 8)
    assert result.cycles > 6 * (500 + 2 * 64 * 192 // 8)


# --- local rules, no writes -------------------------------------------------------------------------------------------


def test_local_rules_refuse_global_norms_and_master_copies():
    local = with_rules(chip(), mode="local_rule")
    assert simulate_trace(local, update_trace()).cycles == simulate_trace(with_rules(chip()), update_trace()).cycles
    with pytest.raises(UnsupportedError, match=r"^tiny_gpu: .*local rules only, .* global norm, which is not local$"):
        lower(update_trace(norm=True), local)
    with pytest.raises(UnsupportedError, match=r"^tiny_gpu: .*local rules only, .* master copy .* is not local$"):
        lower(update_trace(master=True), local)


def test_weights_that_are_never_written():
    fixed = with_rules(chip(), mode="none")
    with pytest.raises(UnsupportedError, match=r"^tiny_gpu: weights cannot be written at run time, .*weight_write"):
        lower(update_trace(), fixed)
    assert lower(append_trace(tokens=1), fixed).work.cycles[0, WRITE] > 0


def test_what_a_chip_refuses_is_said_in_the_record():
    point = make_point(with_rules(chip(), mode="none"), "toy", "ttt", phase="prefill", context=64, ttt="toy")
    record = simulate_point(point).record
    assert record["fits"] is False
    assert record["missing"] == "tiny_gpu: weights cannot be written at run time, which fast_init needs"


# --- program and verify -----------------------------------------------------------------------------------------------


def test_pulses_slow_down_writes_and_the_old_weight_is_read(engine):
    # Delta and old weight: 2 x 8192 B / 128 = 128 cycles; the new one 8192 B at 64 / 8 pulses = 1024. Energy: 1 pJ a
    # byte read, 8 pulses of 10 pJ a byte written.
    result = simulate_trace(chip("tiny_pcm"), update_trace(), engine=engine)
    work = result.lowered.work
    assert result.lowered.traffic.read_place.tolist() == [MAIN, MAIN]
    assert work.cycles[0, [READ, WRITE]].tolist() == [128, 1024]
    assert result.dynamic_energy_j()["cells"].sum() == pytest.approx((2 * WEIGHT * 1 + WEIGHT * 80) * 1e-12)
    one_pulse = replace(chip("tiny_pcm").main_memory, write_bytes_per_s=64e9)
    quick = replace(chip("tiny_pcm"), memories=(one_pulse, *chip("tiny_pcm").memories[1:]))
    assert lower(update_trace(), quick).work.cycles[0, WRITE] == 128


@pytest.mark.parametrize("mode", ["free", "static_schedule"])
def test_ordinary_stores_cost_their_bytes(mode):
    # 2 x 8192 / 64 in, 8192 / 64 out, an add of 4096 elements on 64 lanes
    work = lower(update_trace(), with_rules(chip(), mode=mode)).work
    assert work.cycles[0, [READ, VECTOR, LINK, WRITE]].tolist() == [256, 64, 0, 128]


# --- accumulating memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_gpu", "tiny_cim", "tiny_systolic"])
def test_memory_that_accumulates_does_not_read_the_old_weight(name):
    adds = simulate_trace(with_rules(chip(name), accumulate=True), update_trace()).lowered
    assert adds.traffic.read_place.tolist() == [MAIN, IN_PLACE]
    assert (adds.work.main_read_bytes[0], adds.work.main_write_bytes[0]) == (WEIGHT, WEIGHT)


def test_a_copy_in_another_format_needs_the_sum_read_out():
    adds = simulate_trace(with_rules(chip(), accumulate=True), update_trace(master=True)).lowered
    assert adds.traffic.read_place.tolist() == [MAIN, MAIN]


def test_a_product_may_accumulate_too():
    t = HandTrace()
    t.tensor("targets", 2 * 64 * 16, Role.CARRY, exists=True)
    t.tensor("hidden", 2 * 64 * 16, Role.CARRY, exists=True)
    t.tensor("w", WEIGHT, Role.FAST_WEIGHT, exists=True)
    t.op(
        "delta_write", m=64, n=64, k=16, reads=[("targets", 0, 2048), ("hidden", 0, 2048), ("w", 0, WEIGHT)],
        writes=[("w", 1, WEIGHT)], phase=Phase.WEIGHT_WRITE,
    )  # fmt: skip
    trace = t.build()
    assert lower(trace, with_rules(chip())).traffic.read_place.tolist() == [MAIN] * 3
    assert lower(trace, with_rules(chip(), accumulate=True)).traffic.read_place.tolist() == [MAIN, MAIN, IN_PLACE]
    # What is added to is not multiplied: on arrays one of the other two is written in, the old weight is read.
    plain = lower(trace, with_rules(chip("tiny_cim")))
    assert plain.traffic.read_place.tolist() == [MAIN] * 3
    assert plain.work.staged_bytes.tolist() == [2048]
    assert plain.work.cycles[0, MATRIX] == 64 * 16 + 8


# --- granularity ------------------------------------------------------------------------------------------------------


def coarse(granularity: str = "row", unit: str = "4 KiB") -> Chip:
    return with_rules(chip(memories__hbm__write_granularity=unit), granularity=granularity)


@pytest.mark.parametrize(("tokens", "batch", "extra"), [(1, 1, 3840), (1, 3, 3 * 3840), (16, 1, 0), (17, 2, 2 * 3840)])
@pytest.mark.parametrize("role", [Role.KV, Role.CARRY, Role.FAST_WEIGHT])
def test_small_writes_replace_whole_rows_of_the_memory(engine, tokens, batch, extra, role):
    # Rows of 256 B: one is rounded up to 4096 B, 16 fill that, 17 are rounded up to 8192 B, for every sequence.
    trace = append_trace(tokens=tokens, batch=batch, role=role)
    result = simulate_trace(coarse(), trace, engine=engine)
    work, rows = result.lowered.work, batch * tokens * 256
    assert result.lowered.traffic.padding_bytes.tolist() == [extra]
    assert (work.main_read_bytes[0], work.main_write_bytes[0]) == (rows + extra, rows + extra)
    main = result.main_bytes()
    name = {Role.KV: "kv", Role.CARRY: "activations", Role.FAST_WEIGHT: "fast_weights"}[role]
    assert main["write", name].sum() == rows + extra
    assert sum(int(part.sum()) for part in main.values()) == 2 * (rows + extra)
    ops = result.ops()
    assert (ops["main_read_bytes"].sum(), ops["main_write_bytes"].sum()) == (rows + extra, rows + extra)
    # 256 B of interleave on one channel at 64 B a cycle
    assert work.cycles[0, [READ, WRITE]].tolist() == [-(-(rows + extra) // 256) * 4] * 2


def test_writes_of_whole_tensors_are_aligned():
    assert lower(append_trace(tokens=3, room=3), coarse()).traffic.padding_bytes.tolist() == [0]
    assert lower(update_trace(), coarse(unit="128 KiB")).traffic.padding_bytes.tolist() == [0]


@pytest.mark.parametrize(("granularity", "extra"), [("word", 0), ("row", 3840), ("tile", 3840), ("device", 0)])
def test_only_rows_and_tiles_are_padded(granularity, extra):
    assert lower(append_trace(tokens=1), coarse(granularity)).traffic.padding_bytes.tolist() == [extra]


def test_what_stays_in_a_cache_is_not_padded():
    t = HandTrace()
    t.tensor("x", 512, Role.CARRY, exists=True)
    t.tensors["state"] = Tensor(
        name="state", shape=(1, 64, 128), dtype="bf16", role=Role.CARRY, nbytes=64 * 256, initial_version=0,
        in_place=True,
    )  # fmt: skip
    for version in (0, 1):
        t.op("carry_append", m=1, n=128, reads=[("x", 0, 256)], writes=[("state", version + 1, 256)])
    traffic = lower(t.build(), coarse()).traffic
    assert traffic.write_place.tolist() == [CACHED, MAIN]
    assert np.array_equal(traffic.padding_bytes, [0, 3840])
