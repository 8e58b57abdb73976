"""Points: what a sampled decode stands for, what fits, and the record."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.lower_tools import chip, residual_trace
from tests.unit.trace_tools import TOY
from ttt_sim import simulation
from ttt_sim.chip import Chip
from ttt_sim.engine import run
from ttt_sim.errors import ConservationError, WorkloadError
from ttt_sim.grid import make_point
from ttt_sim.model import MethodSettings, Scenario, TTTSettings
from ttt_sim.program import Timeline
from ttt_sim.simulation import DecodePlan, Point, decode_plan, simulate_point, simulate_trace
from ttt_sim.workload import CONTEXT_METHODS, METHODS, build_trace

# --- the plan ---------------------------------------------------------------------------------------------------------


@st.composite
def plans(draw) -> tuple[DecodePlan, dict[str, int | None]]:
    arguments = dict(
        context_tokens=draw(st.integers(0, 300)), span_tokens=draw(st.integers(1, 120)),
        chunk_tokens=draw(st.sampled_from([None, 1, 2, 3, 5, 32, 100])),
        window_tokens=draw(st.sampled_from([None, 1, 40, 150])), uneven_tokens=draw(st.integers(1, 4)),
    )  # fmt: skip
    return decode_plan(**arguments), arguments


@given(plans())
def test_weights_sum_to_the_span(made):
    plan, arguments = made
    assert sum(plan.twice_weights) == 2 * arguments["span_tokens"]
    assert min(plan.twice_weights) >= 0
    assert list(plan.positions) == sorted(set(plan.positions))
    assert plan.positions[0] >= 0


@given(plans(), st.lists(st.integers(0, 50), min_size=8, max_size=8))
def test_the_plan_is_exact_for_costs_that_are_affine_between_breakpoints(made, costs):
    """Any base cost, slope in the keys seen, slope in the open rows, and own costs of the last and the first steps."""
    plan, a = made
    base, per_key, per_row, last, *starts = costs

    def cost(position: int) -> int:
        keys = position + 1 if a["window_tokens"] is None else min(position + 1, a["window_tokens"])
        total = base + per_key * keys
        if a["chunk_tokens"] is not None:
            row = position % a["chunk_tokens"]
            total += per_row * row
            total += last if row == a["chunk_tokens"] - 1 else 0
            total += starts[row] if row < min(a["uneven_tokens"], len(starts)) else 0
        return total

    span = range(a["context_tokens"], a["context_tokens"] + a["span_tokens"])
    sampled = sum(w * cost(p) for p, w in zip(plan.positions, plan.twice_weights, strict=True))
    assert sampled == 2 * sum(cost(p) for p in span)


def test_a_plan_by_hand():
    # 32 steps after 150 tokens in chunks of 32: step 159 completes a chunk, step 160 may be held up. Runs 150-158
    # (9 steps) and 161-181 (21 steps); 149 and 182 only stand beside.
    plan = decode_plan(150, span_tokens=32, chunk_tokens=32, window_tokens=None)
    assert dict(zip(plan.positions, plan.twice_weights, strict=True)) == {
        149: 0, 150: 9, 158: 9, 159: 2, 160: 2, 161: 21, 181: 21, 182: 0,
    }  # fmt: skip
    assert plan.boundary is not None
    assert plan.positions[plan.boundary] == 159


def test_a_span_of_whole_chunks():
    # 64 tokens end a chunk, so the first step stands for itself, and the last one completes the next chunk.
    plan = decode_plan(64, span_tokens=32, chunk_tokens=32, window_tokens=None)
    assert dict(zip(plan.positions, plan.twice_weights, strict=True)) == {
        63: 0, 64: 2, 65: 30, 94: 30, 95: 2, 96: 0, 97: 0,
    }  # fmt: skip


def test_a_span_that_begins_among_uneven_steps():
    # Step 32 began a chunk, whose first three steps differ: 33 and 34 stand for themselves, and so do 64 to 66.
    plan = decode_plan(33, span_tokens=40, chunk_tokens=32, window_tokens=None, uneven_tokens=3)
    assert dict(zip(plan.positions, plan.twice_weights, strict=True)) == {
        32: 0, 33: 2, 34: 2, 35: 28, 62: 28, 63: 2, 64: 2, 65: 2, 66: 2, 67: 6, 72: 6, 73: 0,
    }  # fmt: skip


# --- against a simulation of every step -------------------------------------------------------------------------------

CHUNK, WINDOW = 32, 48
CASES = [(name, "official") for name in CONTEXT_METHODS] + [
    (name, carry) for name in ("ttt", "ttt_window") for carry in ("ring", "keep_z", "online")
]


def every_step(point: Point) -> float:
    """Mean cycles of the steps of the span, all simulated, with a step before and after so that caches are as warm."""
    first, end = point.context_tokens, point.context_tokens + point.chunk_tokens
    trace = build_trace(point.model, point.method, Scenario.decode(range(first - 1, end + 1), batch=point.batch))
    result = simulate_trace(point.chip, trace, engine=point.engine)
    return float(np.diff(result.step_finish_cycles())[:-1].mean())


def toy_point(chip_: Chip, name: str, carry: str, context: int, engine: str) -> Point:
    ttt = TTTSettings(layers=(0, 2), chunk_tokens=CHUNK, carry=carry)  # type: ignore[arg-type]
    method: MethodSettings = METHODS[name].settings(WINDOW, None, ttt)
    return Point(
        chip=chip_, model=TOY, method=method, phase="decode", context_tokens=context, chunk_tokens=CHUNK, engine=engine
    )


@pytest.mark.parametrize("chip_name", ["tiny_gpu", "tiny_turnaround"])
@pytest.mark.parametrize(("method", "carry"), CASES)
@pytest.mark.parametrize("context", [64, 20, 94, 150])
def test_sampled_decode_is_the_mean_of_all_steps(chip_name, method, carry, context, engine):
    """Chunk-aligned (64), window filling inside the span (20 to 52 over 47), boundary early (94) or late (150).

    Within 0.3 %: bytes are rounded to interleave units and cycles to whole ones, so a step is affine only on average,
    and after a boundary more than one step may be held up a little.
    """
    point = toy_point(chip(chip_name), method, carry, context, engine)
    sampled = simulate_point(point).record["seconds"]
    assert isinstance(sampled, float)
    assert sampled * point.chip.clock_hz == pytest.approx(every_step(point), rel=3e-3)


@pytest.mark.parametrize("method", CONTEXT_METHODS)
def test_sampled_decode_where_attention_takes_another_block(method, engine):
    """Step 128 is the first that sees a second block of 128 keys, one step after the span begins: within 2 %.

    The run is then not affine: its first step stands for half of it and costs a block less than the others.
    """
    point = toy_point(chip(), method, "official", 127, engine)
    sampled = simulate_point(point).record["seconds"]
    assert isinstance(sampled, float)
    assert sampled * point.chip.clock_hz == pytest.approx(every_step(point), rel=2e-2)


def test_sampled_bytes_are_the_mean_of_all_steps(engine):
    """Main-memory bytes of a step are affine in its position without rounding, on a chip whose cache holds nothing."""
    point = toy_point(chip(memories__l2__capacity="1 B"), "ttt", "official", 150, engine)
    trace = build_trace(TOY, point.method, Scenario.decode(range(149, 183)))
    result = simulate_trace(point.chip, trace, engine=engine)
    record = simulate_point(point).record
    for (direction, name), by_step in result.main_bytes().items():
        assert record[f"{direction}_{name}_bytes"] == pytest.approx(by_step[1:-1].mean())


def test_boundary_and_ordinary_steps_make_up_the_span(engine):
    point = toy_point(chip(), "ttt", "official", 150, engine)
    record = simulate_point(point).record
    boundary, ordinary = record["boundary_step_seconds"], record["ordinary_step_seconds"]
    assert isinstance(boundary, float)
    assert isinstance(ordinary, float)
    assert (boundary + (CHUNK - 1) * ordinary) / CHUNK == pytest.approx(record["seconds"])
    assert boundary > 1.5 * ordinary  # a chunk of 32 rows is computed again and the weight is updated


# --- points and records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("method", CONTEXT_METHODS)
def test_records_add_up(method, phase, engine):
    point = make_point("tiny_gpu", "toy", method, phase=phase, context=96, batch=2, chunk=32, window=48, engine=engine)
    done = simulate_point(point)
    record = done.record
    assert record["fits"] is True
    # In a decode, time that a step waits for an update belongs to the step that started the update.
    by_kernel = sum(done.cycles_by_kernel.values())
    assert by_kernel == pytest.approx(record["cycles"], rel=1e-4 if phase == "decode" else 1e-9)
    tokens = 2 * 96 if phase == "prefill" else 2
    assert record["tokens"] == tokens
    assert record["seconds_per_token"] == pytest.approx(number(record["seconds"]) / tokens)
    by_class = [number(v) for k, v in record.items() if k.startswith(("read_", "write_")) and k.endswith("_bytes")]
    assert sum(by_class) == pytest.approx(number(record["main_bytes_per_token"]) * tokens)
    dynamic = [number(v) for k, v in record.items() if k.startswith("energy_") and k.endswith("_j") and k != "energy_j"]
    assert number(record["energy_j"]) == pytest.approx(sum(dynamic) + number(record["idle_energy_j"]))
    assert number(record["idle_energy_j"]) == pytest.approx(10 * number(record["seconds"]))
    assert number(record["cost_usd_per_million_tokens"]) == pytest.approx(
        number(record["seconds_per_token"]) / 3600 * 1e6
    )


def number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def test_weights_that_do_not_fit():
    record = simulate_point(make_point("tiny_gpu", "Qwen3-4B", "kv", context=1024)).record
    assert record["fits"] is False
    assert record["seconds"] is None
    # 4.02 G parameters in bf16 and 2048 tokens of cache on 1 GiB chips
    assert str(record["reason"]).startswith("weights and state need ")
    assert record["chips_needed"] == -(-number(record["bytes_needed"]) // 2**30)


def test_activations_that_do_not_fit():
    weights_and_state = simulate_point(make_point("tiny_gpu", "toy", "kv", phase="prefill", context=512)).result
    assert weights_and_state is not None
    persistent = int(weights_and_state.memory_events()[1][0].sum())
    small = chip(memories__hbm__capacity=f"{persistent} B")
    point = make_point(small, "toy", "kv", phase="prefill", context=512)
    record = simulate_point(point).record
    assert record["fits"] is False
    assert str(record["reason"]).startswith("weights, state and activations need ")
    assert record["bytes_needed"] == weights_and_state.peak_memory_bytes()


def test_unknown_phase():
    point = make_point("tiny_gpu", "toy", "kv")
    with pytest.raises(
        WorkloadError, match="phase is 'training', which method kv does not have; phases: prefill, ask, decode"
    ):
        simulate_point(replace(point, phase="training"))  # type: ignore[arg-type]


def test_engines_that_differ_are_refused(monkeypatch):
    def late(program, engine="compiled"):
        timeline = run(program, engine)
        if engine == "simpy":
            return Timeline(start_cycles=timeline.start_cycles + 1, finish_cycles=timeline.finish_cycles + 1)
        return timeline

    simulate_trace(chip(), residual_trace(), compare_engines=True)
    monkeypatch.setattr(simulation, "run", late)
    with pytest.raises(ConservationError, match="engines differ at task 0: compiled starts it at 0, simpy at 1"):
        simulate_trace(chip(), residual_trace(), compare_engines=True)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_records_carry_an_error_bar_that_grows_with_what_nobody_has_measured(phase):
    def record(method, chip_name="h100"):
        return simulate_point(
            make_point(chip_name, "toy", method, phase=phase, context=320, window=64, ttt="toy")
        ).record

    kv, ttt, elsewhere = record("kv"), record("ttt"), record("kv", "mi300x")
    for found in (kv, ttt, elsewhere):
        assert found["seconds_low"] <= found["seconds"] <= found["seconds_high"]
    assert kv["unmeasured_share"] == 0 < ttt["unmeasured_share"] < 1

    def width(found):
        return (found["seconds_high"] - found["seconds_low"]) / found["seconds"]

    assert width(kv) < width(ttt)
    assert width(kv) < width(elsewhere)
