"""Frames and figures of a result: hand counts on tiny_gpu, and agreement among themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip, gemm_trace, residual_trace
from tests.unit.trace_tools import TOY
from ttt_sim.model import Scenario, TTTSettings
from ttt_sim.ops import OP_KINDS, TRAFFIC_CLASSES, Phase, Role
from ttt_sim.results import Result, level_names
from ttt_sim.simulation import simulate_trace
from ttt_sim.workload import METHODS, build_trace

PJ = 1e-12


@pytest.fixture(scope="session")
def toy_result(engine: str) -> Result:
    """Two prefill calls with three chunk updates in each of two layers."""
    ttt = TTTSettings(layers=(0, 2), chunk_tokens=32)
    scenario = Scenario.prefill(100, call_tokens=64)
    return simulate_trace(
        chip("tiny_turnaround"), build_trace(TOY, METHODS["ttt"].settings(None, None, ttt), scenario), engine=engine
    )


def test_energy_by_hand(engine):
    # Bytes of main memory at 32 pJ, of the cache at 2, of the scratchpads at 1, FLOPs at 1 pJ; 10 W idle for 3520 ns.
    # Cache: A twice, B twice, C once = 98304 B; scratchpads: each of 4 tiles writes and reads a step of 16384 B.
    result = simulate_trace(chip(), gemm_trace(128, 128, 64), engine=engine)
    energy = {name: values.tolist() for name, values in result.dynamic_energy_j().items()}
    assert energy == {
        "hbm": [pytest.approx(32 * PJ * (2 * 16384 + 32768))],
        "l2": [pytest.approx(2 * PJ * 98304)],
        "scratchpad": [pytest.approx(1 * PJ * 2 * 4 * 16384)],
        "tensor_core": [pytest.approx(1 * PJ * 2 * 128 * 128 * 64)],
        "lanes": [0.0],
        "sfu": [0.0],
    }
    summary = result.summary()
    assert summary["idle_energy_j"] == pytest.approx(10 * 3520e-9)
    assert summary["energy_j"] == pytest.approx(sum(values[0] for values in energy.values()) + 10 * 3520e-9)
    assert summary["seconds"] == pytest.approx(3520e-9)


def test_energy_of_lanes_and_special_functions(engine):
    # 64 rows of 512 RMS-normed: 4 lane operations an element at 1 pJ and a root a row at 4 pJ
    t = HandTrace()
    t.weight("x", 65536)
    t.tensor("y", 65536)
    t.op("attn_norm", m=64, n=512, reads=[("x", 0, 65536)], writes=[("y", 0, 65536)])
    energy = simulate_trace(chip(), t.build(), engine=engine).dynamic_energy_j()
    assert energy["lanes"].tolist() == [pytest.approx(4 * 64 * 512 * PJ)]
    assert energy["sfu"].tolist() == [pytest.approx(64 * 4 * PJ)]


def test_memory_over_time_by_hand(engine):
    # x, y, u stay (3 * 64 KiB). z lives from the start of its kernel to the end of the one that reads it, w until
    # it is made.
    t = HandTrace()
    for name in "xyu":
        t.weight(name, 65536)
    add_residual(t, "x", "y", "z")
    add_residual(t, "z", "u", "w")
    result = simulate_trace(chip(), t.build(), engine=engine)
    _, (first, second) = result.kernel_span()
    times, change = result.memory_events()
    weights, activations = TRAFFIC_CLASSES.index("weights"), TRAFFIC_CLASSES.index("activations")
    assert times.tolist() == [0, 0, first, second, second]
    assert change[:, weights].tolist() == [3 * 65536, 0, 0, 0, 0]
    assert change[:, activations].tolist() == [0, 65536, 65536, -65536, -65536]
    assert result.peak_memory_bytes() == 5 * 65536
    frame = result.memory()
    held = frame[frame["memory_class"] == "activations"].set_index("cycle")["allocated_bytes"]
    assert held.to_dict() == {0: 65536, first: 2 * 65536, second: 0}


def test_a_fused_value_takes_no_memory(engine):
    t = HandTrace()
    for name in "xy":
        t.weight(name, 65536)
    add_residual(t, "x", "y", "z")
    t.tensor("w", 65536)
    t.op("mlp_norm", m=64, n=512, reads=[("z", 0, 65536)], writes=[("w", 0, 65536)])
    assert simulate_trace(chip(), t.build(), engine=engine).peak_memory_bytes() == 3 * 65536


def test_busiest_unit_counts_both_directions_of_a_shared_bus(engine):
    result = simulate_trace(chip(), residual_trace(), engine=engine)
    assert result.busiest_unit()[0].tolist() == [3072]
    assert result.bound_by() == ["hbm"]
    ported = chip(memories__hbm__shared_bus="false", memories__hbm__write_bandwidth="16 GB/s")
    cycles, names = simulate_trace(ported, residual_trace(), engine=engine).busiest_unit()
    assert (cycles.tolist(), names) == ([4096], ["hbm"])  # 65536 / 16


def test_a_kernel_shorter_than_its_launch_is_bound_by_it(engine):
    slow = chip(overheads__op_launch="3072 ns")
    assert simulate_trace(slow, residual_trace(), engine=engine).bound_by() == ["hbm"]
    slower = chip(overheads__op_launch="3073 ns")
    assert simulate_trace(slower, residual_trace(), engine=engine).bound_by() == ["launch"]


def test_level_names():
    assert level_names(chip()) == ["far", "hbm", "l2", "tensor_core", "lanes", "sfu", "link", "hbm"]


def test_time_waited_for_updates_belongs_to_those_that_finish_in_it(engine):
    # A delta GEMM of 944 cycles and an add of 480 (test_lower_streams.py), then a product with the new weight of 64
    # x 64 x 64: its weight and input are read (128 from main memory, the weight is in the cache) and 64 x 64
    # results leave.
    t = HandTrace()
    for name in ("values", "hidden", "x"):
        t.weight(name, 8192)
    t.tensor("delta", 8192, Role.GRADIENT)
    t.tensor("W", 8192, Role.FAST_WEIGHT, exists=True)
    t.tensor("y", 8192)
    t.op(
        "delta_gemm", m=64, n=64, k=64, reads=[("values", 0, 8192), ("hidden", 0, 8192)], writes=[("delta", 0, 8192)],
        phase=Phase.BACKWARD, chunk=0,
    )  # fmt: skip
    t.op(
        "weight_write", m=64, n=64, reads=[("delta", 0, 8192), ("W", 0, 8192)], writes=[("W", 1, 8192)],
        phase=Phase.WEIGHT_WRITE, chunk=0,
    )  # fmt: skip
    t.op("fast_apply", m=64, n=64, k=64, reads=[("x", 0, 8192), ("W", 1, 8192)], writes=[("y", 0, 8192)], chunk=1)
    result = simulate_trace(chip(), t.build(), engine=engine)
    start, finish = result.kernel_span()
    advance = result.kernel_advance()
    assert finish[0] == 944
    assert advance.tolist() == [944, start[2] - 944, result.cycles - start[2]]
    assert result.step_finish_cycles().tolist() == [result.cycles]


# --- frames of a whole run agree with each other ----------------------------------------------------------------------


def test_ops_frame_adds_up(toy_result):
    ops, work, trace = toy_result.ops(), toy_result.lowered.work, toy_result.trace
    assert len(ops) == trace.n_ops
    assert ops["flops"].sum() == trace.flops.sum() == work.flops.sum()
    assert ops["advance_cycles"].sum() == toy_result.cycles
    assert ops["main_read_bytes"].sum() == work.main_read_bytes.sum()
    assert ops["main_write_bytes"].sum() == work.main_write_bytes.sum()
    assert ops["trace_read_bytes"].sum() == trace.read_bytes.sum()
    assert ops["cache_bytes"].sum() == work.cache_bytes.sum()
    assert ops["launch_cycles"].sum() == work.launch_cycles.sum()
    dynamic = sum(float(values.sum()) for values in toy_result.dynamic_energy_j().values())
    assert ops["energy_j"].sum() == pytest.approx(dynamic, rel=1e-12)
    kernel = ops.groupby("kernel")
    assert (kernel["start_cycles"].nunique() == 1).all()
    spans = kernel["finish_cycles"].first() - kernel["start_cycles"].first()
    assert (kernel["busy_cycles"].sum() + kernel["launch_cycles"].sum() <= spans + 1).all()


def test_units_frame_adds_up(toy_result):
    units = toy_result.units().set_index("unit")
    program = toy_result.lowered.program
    assert units["n_tasks"].sum() == program.n_tasks
    assert units["moved_bytes"].sum() == program.nbytes.sum()
    assert (units["utilisation_frac"] <= 1).all()
    assert np.allclose(units["busy_cycles"] / toy_result.cycles, units["utilisation_frac"])


def test_main_bytes_by_class_add_up(toy_result):
    by_class = toy_result.main_bytes()
    summary = toy_result.summary()
    for direction in ("read", "write"):
        total = sum(int(by_class[direction, name].sum()) for name in TRAFFIC_CLASSES)
        assert total == summary[f"main_{direction}_bytes"]
        assert total == sum(int(str(summary[f"{direction}_{name}_bytes"])) for name in TRAFFIC_CLASSES)
    assert by_class["write", "weights"].sum() == 0
    assert by_class["write", "fast_weights"].sum() > 0


def test_summary_names_the_busiest_unit(toy_result):
    summary, units = toy_result.summary(), toy_result.units()
    working = units[~units["unit"].str.startswith("launch")]
    assert summary["busiest_unit"] == working.loc[working["busy_cycles"].idxmax(), "unit"]
    assert summary["busiest_utilisation_frac"] == working["utilisation_frac"].max()


def test_steps_end_in_order(toy_result):
    finish = toy_result.step_finish_cycles()
    assert finish.shape == (2,)
    assert 0 < finish[0] < finish[1] <= toy_result.cycles


def test_labels_name_every_kind_of_a_kernel(toy_result):
    kinds = toy_result.ops().groupby("kernel")["kind"].agg(lambda names: set(names)).tolist()
    assert [set(label.split("+")) for label in toy_result.kernel_labels()] == kinds


def test_every_kind_has_a_label_of_its_own(toy_result):
    """Also the last of more kinds than a number has bits."""
    trace = toy_result.trace
    for code, kind in enumerate(OP_KINDS):
        renamed = replace(toy_result, trace=replace(trace, kind=np.full(trace.n_ops, code, dtype=np.int64)))
        assert set(renamed.kernel_labels()) == {kind.name}
