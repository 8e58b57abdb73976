"""The checks catch what they are for: each law is broken on purpose. Rooflines and critical paths by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip, gemm_trace, residual_trace
from ttt_sim.bounds import busy_cycles, check, critical_path, roofline_cycles
from ttt_sim.engine import run
from ttt_sim.errors import ConservationError
from ttt_sim.lower import Lowered, lower
from ttt_sim.program import COMPUTE, READ, WRITE, Program, Timeline


@pytest.fixture
def lowered() -> Lowered:
    return lower(gemm_trace(128, 128, 1024), chip())


@pytest.fixture
def timeline(lowered: Lowered, engine: str) -> Timeline:
    return run(lowered.program, engine)


def with_program(lowered: Lowered, **columns: Any) -> Lowered:
    return replace(lowered, program=replace(lowered.program, **columns))


def one_less(program: Program, column: str, kind: int) -> np.ndarray:
    """The column with one taken off the last task of this kind that has any."""
    values = getattr(program, column).copy()
    task = np.flatnonzero((program.kind == kind) & (values > 0) & is_main(program, kind))[-1]
    values[task] -= 1
    return values


def is_main(program: Program, kind: int) -> np.ndarray:
    return (program.unit == program.unit_names.index("hbm")) | (kind == COMPUTE)


def refused(lowered: Lowered, timeline: Timeline, match: str) -> None:
    with pytest.raises(ConservationError, match=match):
        check(gemm_trace(128, 128, 1024), chip(), lowered, timeline)


def test_an_unbroken_simulation_passes(lowered, timeline):
    check(gemm_trace(128, 128, 1024), chip(), lowered, timeline)


def test_a_lost_byte_of_a_load(lowered, timeline):
    broken = with_program(lowered, nbytes=one_less(lowered.program, "nbytes", READ))
    refused(broken, timeline, r"bytes read from main memory: 524287 in the program, 524288 .*difference -1")


def test_a_lost_byte_of_a_store(lowered, timeline):
    broken = with_program(lowered, nbytes=one_less(lowered.program, "nbytes", WRITE))
    refused(broken, timeline, r"bytes written to main memory: 32767 in the program, 32768")


def test_a_lost_flop(lowered, timeline):
    broken = with_program(lowered, flops=one_less(lowered.program, "flops", COMPUTE))
    refused(broken, timeline, rf"FLOPs: {2 * 128 * 128 * 1024 - 1} in the program")


def test_a_task_that_starts_before_its_operands(lowered, timeline):
    program = lowered.program
    held = [
        (task, dep)
        for task in range(program.n_tasks)
        for dep in program.dep_idx[program.dep_ptr[task] : program.dep_ptr[task + 1]]
        if timeline.start_cycles[task] == timeline.finish_cycles[dep]
    ]
    start = timeline.start_cycles.copy()
    start[held[0][0]] -= 1
    early = Timeline(start_cycles=start, finish_cycles=timeline.finish_cycles)
    refused(lowered, early, rf"task {held[0][0]} starts before task {held[0][1]}, which it needs, has finished")


def test_a_unit_that_serves_two_tasks_at_once(lowered, timeline):
    # Two loads, both served from the first cycle to the last, claim the bus for twice the time.
    start, finish = timeline.start_cycles.copy(), timeline.finish_cycles.copy()
    loads = np.flatnonzero(lowered.program.kind == READ)[:2]
    start[loads], finish[loads] = 0, timeline.total_cycles
    total = timeline.total_cycles
    refused(lowered, Timeline(start_cycles=start, finish_cycles=finish), rf"unit hbm is busy for \d+ of {total} cycles")


def test_a_total_below_the_roofline(lowered, timeline):
    # Everything twice as fast as the matrix units can be: 2 * 128 * 128 * 1024 FLOPs at 1024 a cycle are 32768
    # cycles.
    faster = Timeline(start_cycles=timeline.start_cycles // 2, finish_cycles=timeline.finish_cycles // 2)
    refused(lowered, faster, r"16820 cycles beat the roofline bound of 32768.0 cycles on tensor_core")


def test_roofline_by_hand():
    # residual add: 3 * 65536 B over a bus of 64 B a cycle; no products
    trace, tiny = residual_trace(), chip()
    assert roofline_cycles(trace, tiny, lower(trace, tiny)) == {"hbm": 3 * 65536 / 64}
    # separate ports: the busier of them; the roofline is at the data sheet's peak, whatever is achievable
    ported = chip(
        memories__hbm__shared_bus="false",
        memories__hbm__write_bandwidth="16 GB/s",
        memories__hbm__achievable_fraction=0.5,
    )
    assert roofline_cycles(trace, ported, lower(trace, ported)) == {"hbm": 65536 / 16}
    # efficiency does not lower the matrix bound either
    lossy = chip(compute__tensor_core__efficiency__bf16=0.5)
    product = gemm_trace(64, 64, 64)
    assert roofline_cycles(product, lossy, lower(product, lossy))["tensor_core"] == 2 * 64**3 / 1024


def test_roofline_of_an_array_whose_main_memory_is_sram(engine):
    # 16 KiB out at 1024 bytes a cycle, 8 KiB in at 512; 2048 FLOPs a cycle
    trace, spatial = gemm_trace(64, 64, 64), chip("tiny_spatial")
    lowered = lower(trace, spatial)
    assert roofline_cycles(trace, spatial, lowered) == {"sram": 16, "grid": 256}
    timeline = run(lowered.program, engine)
    check(trace, spatial, lowered, timeline)
    assert timeline.total_cycles >= 256


def test_busy_cycles_count_turn_around_and_row_misses(engine):
    lowered = lower(residual_trace(), chip("tiny_turnaround"))
    busy = dict(
        zip(lowered.program.unit_names, busy_cycles(lowered.program, run(lowered.program, engine)), strict=True)
    )
    assert busy["hbm.0"] == busy["hbm.1"] == 5 + 2048 + 10 + 1024
    assert busy["launch.forward"] == 100
    assert busy["launch.update"] == busy["tensor_core"] == 0


def test_critical_path_by_hand(engine):
    # The one-step GEMM: load, cache, matrix units, store, one after another.
    lowered = lower(gemm_trace(128, 128, 64), chip())
    program = lowered.program
    path = critical_path(program, run(program, engine))
    assert [program.unit_names[u] for u in program.unit[path]] == ["hbm", "l2", "tensor_core", "hbm"]
    # The residual add never leaves the bus: three loads and three stores.
    lowered = lower(residual_trace(), chip())
    path = critical_path(lowered.program, run(lowered.program, engine))
    assert {lowered.program.unit_names[u] for u in lowered.program.unit[path]} == {"hbm"}
    assert lowered.program.kind[path].tolist() == [READ] * 3 + [WRITE] * 3


def test_critical_path_crosses_kernels(engine):
    t = HandTrace()
    for name in "xyuv":
        t.weight(name, 65536)
    add_residual(t, "x", "y", "z")
    add_residual(t, "u", "v", "w")
    lowered = lower(t.build(), chip("tiny_turnaround"))
    program = lowered.program
    path = critical_path(program, run(program, engine))
    assert sorted(set(program.op[path].tolist())) == [0, 1]
    assert program.unit_names[program.unit[path[0]]] == "launch.forward"


def test_nothing_simulated_has_no_critical_path():
    lowered = lower(residual_trace(), chip())
    empty = {name: getattr(lowered.program, name)[:0] for name in ("unit", "dep_idx")}
    none = np.zeros(0, dtype=np.int64)
    program = replace(lowered.program, **empty)
    assert critical_path(program, Timeline(start_cycles=none, finish_cycles=none)).size == 0
