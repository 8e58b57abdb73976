"""The main job on a toy: which points run in both engines, what a decode point's steps count for, scaled chips."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from ttt_sim import load_chip, load_model, load_ttt, make_point, simulation
from ttt_sim.chip import Link
from ttt_sim.engine import run
from ttt_sim.experiment import Experiment, run_experiment, scaled_chips
from ttt_sim.model import Parallel
from ttt_sim.program import Program, Timeline
from ttt_sim.simulation import Point, PointResult, simulate_point, simulate_trace
from ttt_sim.workload.method import PhaseName

EXPERIMENT = Experiment(
    chip=load_chip("tiny_gpu"), model=load_model("toy"), methods=("kv", "kv_window", "ttt_window"),
    contexts=(128, 64), batches=(2, 1), ttt=load_ttt("toy"), window=64, dtype="bf16", kv_dtype=None, call_tokens=64,
    engine="compiled", detail=16, overlap=True, sensitivity=False, workers=1,
)  # fmt: skip


# --- points that run in both engines ----------------------------------------------------------------------------------


@pytest.fixture
def engines_used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name of the engine of every simulation of this process."""
    used: list[str] = []

    def noting(program: Program, engine: str = "compiled") -> Timeline:
        used.append(engine)
        return run(program, engine)

    monkeypatch.setattr(simulation, "run", noting)
    return used


def test_ends_of_the_grid_run_in_both_engines(engines_used: list[str]) -> None:
    data = run_experiment(EXPERIMENT, command="a command", version="1.2.3")
    assert data.provenance["engines_compared_on"] == [
        f"{method} {phase} at 64 tokens, batch 1" for method in ("kv", "ttt_window") for phase in ("prefill", "decode")
    ]
    assert engines_used.count("simpy") == 4
    assert (data.provenance["command"], data.provenance["ttt_sim_version"]) == ("a command", "1.2.3")


def test_a_single_method_is_compared_once(engines_used: list[str]) -> None:
    data = run_experiment(replace(EXPERIMENT, methods=("kv",)), command="", version="")
    assert data.provenance["engines_compared_on"] == [
        f"kv {phase} at 64 tokens, batch 1" for phase in ("prefill", "decode")
    ]
    assert engines_used.count("simpy") == 2


def test_the_reference_engine_is_not_compared_with_itself(engines_used: list[str]) -> None:
    one = replace(EXPERIMENT, methods=("kv",), contexts=(64,), batches=(1,), engine="simpy")
    data = run_experiment(one, command="", version="")
    assert data.provenance["engines_compared_on"] == []
    assert set(engines_used) == {"simpy"}


def test_a_point_that_does_not_fit_is_not_said_to_be_compared(engines_used: list[str]) -> None:
    # The weights of the toy's MLPs alone are 4 * 3 * 64 * 192 * 2 B = 288 KiB.
    small = load_chip("tiny_gpu", overrides={"memories.hbm.capacity": "100 kB", "memories.l2.capacity": "50 kB"})
    data = run_experiment(replace(EXPERIMENT, methods=("kv",), chip=small), command="", version="")
    assert not data.points["fits"].any()
    assert data.provenance["engines_compared_on"] == []
    assert engines_used == []


# --- what the steps of a point count for ------------------------------------------------------------------------------


def points_of(engine: str) -> list[Point]:
    cases: list[tuple[PhaseName, int]] = [("prefill", 150), ("decode", 20), ("decode", 64), ("decode", 150)]
    return [
        make_point(
            "tiny_turnaround", "toy", method, phase=phase, context=context, batch=2, window=48, ttt="toy",
            call_tokens=64, engine=engine,
        )
        for method in ("kv", "ttt_window")
        for phase, context in cases
    ]  # fmt: skip


def seconds_of(done: PointResult) -> float:
    seconds = done.record["seconds"]
    assert isinstance(seconds, float)
    return seconds


def test_mean_cycles_are_those_of_the_record(engine: str) -> None:
    for point in points_of(engine):
        done = simulate_point(point)
        assert done.result is not None
        mean = done.mean_cycles(done.result)
        assert mean == pytest.approx(seconds_of(done) * point.chip.clock_hz)
        assert done.record["cycles"] == math.ceil(round(mean, 6))


def test_step_weights_cover_the_span_once(engine: str) -> None:
    for point in points_of(engine):
        done = simulate_point(point)
        assert done.result is not None
        flops = np.bincount(done.result.trace.step, done.result.trace.flops)
        assert flops @ done.step_weights == pytest.approx(done.record["flops"])
        # A prefill is the sum of its calls, a decode the mean of its steps.
        assert done.step_weights.size == flops.size
        assert done.step_weights.sum() == pytest.approx(flops.size if point.phase == "prefill" else 1)


def test_mean_cycles_of_the_trace_on_another_chip_are_that_chip_s_record(engine: str) -> None:
    slower = load_chip("tiny_turnaround", overrides={"memories.hbm.read_bandwidth": "16 GB/s"})
    for point in points_of(engine):
        done = simulate_point(replace(point, chip=slower))
        here = simulate_point(point)
        assert here.result is not None
        again = here.mean_cycles(simulate_trace(slower, here.result.trace, engine=engine))
        assert again == pytest.approx(seconds_of(done) * slower.clock_hz)
        assert again > here.mean_cycles(here.result)


WIRE = Link(name="wire", topology="switch", bytes_per_s=1e9, latency_s=1e-6)


@pytest.mark.parametrize("parallel", [Parallel(pp=3), Parallel(tp=2), Parallel(tp=2, pp=2)])
def test_sensitivities_start_from_the_record_of_a_system(parallel: Parallel) -> None:
    """Microbatches in a pipeline, and what its chips spill of their own part, count there too."""
    chip = load_chip("tiny_tiers", overrides={"memories.hbm.capacity": "300 kB"})
    experiment = replace(
        EXPERIMENT, chip=replace(chip, links=(WIRE,)), methods=("kv",), contexts=(128,), batches=(5,), parallel=parallel
    )
    data = run_experiment(experiment, command="", version="")
    assert data.points["fits"].all()
    assert (data.points["spilled_bytes"] > 0).any()
    seconds = data.points.set_index("phase")["seconds"]
    assert data.sensitivity["seconds"].to_list() == pytest.approx(seconds[data.sensitivity["phase"]].to_list())
    assert (data.sensitivity["gain_frac"] > -0.01).all()
    gains = data.sensitivity.set_index("parameter")["gain_frac"]
    assert (gains["links.wire.bandwidth"] > 0).all()


def test_links_are_scaled_for_systems_alone() -> None:
    h100 = load_chip("h100")
    more = scaled_chips(h100, 0.25, linked=True)
    assert set(more) - set(scaled_chips(h100, 0.25)) == {"links.nvlink.bandwidth", "links.nic.bandwidth"}
    before, after = leaves(h100), leaves(more["links.nvlink.bandwidth"])
    assert {path for path in before if before[path] != after[path]} == {"/links/0/bytes_per_s"}
    assert after["/links/0/bytes_per_s"] == 1.25 * h100.links[0].bytes_per_s


# --- scaled chips -----------------------------------------------------------------------------------------------------


def leaves(value: object, path: str = "") -> dict[str, object]:
    """Every number and word of nested dataclasses, mappings and tuples, by path."""
    if dataclasses.is_dataclass(value):
        inside = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        inside = dict(value)
    elif isinstance(value, tuple):
        inside = {str(i): item for i, item in enumerate(value)}
    else:
        return {path: value}
    return {key: leaf for name, item in inside.items() for key, leaf in leaves(item, f"{path}/{name}").items()}


def larger(x: float) -> float:
    return x * 1.25


def shorter(x: float) -> float:
    return x / 1.25


SCALED: dict[str, dict[str, tuple[Callable[[float], float], tuple[str, ...]]]] = {
    "h100": {
        "memories.hbm.bandwidth": (larger, ("/memories/0/read_bytes_per_s", "/memories/0/write_bytes_per_s")),
        "memories.l2.bandwidth": (larger, ("/memories/1/read_bytes_per_s", "/memories/1/write_bytes_per_s")),
        "memories.shared_memory.bandwidth": (
            larger, ("/memories/2/read_bytes_per_s", "/memories/2/write_bytes_per_s")
        ),
        "memories.hbm.latency": (shorter, ("/memories/0/latency_s",)),
        "memories.l2.capacity": (larger, ("/memories/1/capacity_bytes",)),
        "compute.tensor_core.peak": (
            larger, tuple(f"/units/0/peak_per_s/{dtype}" for dtype in ("tf32", "bf16", "fp16", "fp8", "int8"))
        ),
        "compute.fp32_lanes.peak": (larger, ("/units/1/peak_per_s/fp32",)),
        "compute.sfu.peak": (larger, ("/units/2/peak_per_s/fp32",)),
        "overheads.op_launch": (shorter, ("/overheads/op_launch_s",)),
    },
    "tiny_gpu": {  # neither latency nor launches
        "memories.hbm.bandwidth": (larger, ("/memories/0/read_bytes_per_s", "/memories/0/write_bytes_per_s")),
        "memories.l2.bandwidth": (larger, ("/memories/1/read_bytes_per_s", "/memories/1/write_bytes_per_s")),
        "memories.scratchpad.bandwidth": (larger, ("/memories/2/read_bytes_per_s", "/memories/2/write_bytes_per_s")),
        "memories.l2.capacity": (larger, ("/memories/1/capacity_bytes",)),
        "compute.tensor_core.peak": (larger, ("/units/0/peak_per_s/bf16", "/units/0/peak_per_s/fp8")),
        "compute.lanes.peak": (larger, ("/units/1/peak_per_s/fp32",)),
        "compute.sfu.peak": (larger, ("/units/2/peak_per_s/fp32",)),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_each_scaled_chip_has_one_parameter_scaled(name: str) -> None:
    chip = load_chip(name)
    before = leaves(chip)
    chips = scaled_chips(chip, 0.25)
    assert set(chips) == set(SCALED[name])
    for parameter, (scale, paths) in SCALED[name].items():
        expected = before | {path: scale(float(str(before[path]))) for path in paths}
        assert leaves(chips[parameter]) == expected


def test_latency_that_no_kernel_waits_for_is_not_scaled() -> None:
    static = load_chip("h100", overrides={"mapping.serial_kernels": "false"})
    assert set(SCALED["h100"]) - set(scaled_chips(static, 0.25)) == {"memories.hbm.latency"}


def test_a_capacity_stays_whole_bytes() -> None:
    chip = load_chip("tiny_gpu", overrides={"memories.l2.capacity": "1001 B"})
    cache = scaled_chips(chip, 0.5)["memories.l2.capacity"].cache
    assert cache is not None
    assert cache.capacity_bytes == 1501  # 1501.5
