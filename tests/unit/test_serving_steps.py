"""Times of steps against simulations of the very steps."""

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.serving_tools import at_positions, decode_trace, lockstep_seconds, with_updates
from ttt_sim.errors import CapacityError, ConfigError
from ttt_sim.grid import make_point
from ttt_sim.model import Call, Parallel, Scenario
from ttt_sim.serving.requests import PS_PER_S
from ttt_sim.serving.steps import (
    UPDATE_GROUP,
    Machine,
    StepTimes,
    batch_between,
    check_served,
    chunk_knots,
    position_knots,
    room_on,
)
from ttt_sim.system import holdings
from ttt_sim.workload import build_trace, state_per_sequence

METHODS = ("kv", "kv_window", "ttt", "ttt_window")


def machine_of(chip: str, model: str, method: str, **options: object) -> Machine:
    point = make_point(chip, model, method, **options)  # type: ignore[arg-type]
    return Machine(
        chip=point.chip, model=point.model, method=point.method, dtype=point.dtype, call_tokens=point.call_tokens
    )


def toy(method: str, *, call: int = 64, **options: object) -> Machine:
    """The toy model on the tiny GPU: chunks of 32 tokens, a window of 48."""
    return machine_of("tiny_gpu", "toy", method, ttt="toy", window=48, call_tokens=call, **options)


def exact_step(machine: Machine, position: int, n: int) -> float:
    """A decode step of n sequences in lockstep between its neighbours, which fill and empty caches."""
    trace = decode_trace(machine.model, machine.method, (position - 1, position, position + 1), n)
    return lockstep_seconds(machine.chip, trace)[1]


def off(times: StepTimes, positions: list[int], exact: float) -> float:
    return times.decode(np.array(positions)).ps / PS_PER_S / exact - 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "bound"), [(1, 0.01), (8, 0.01), (19, 0.06), (37, 0.03)])
def test_lockstep_steps_of_the_toy(method: str, n: int, bound: float) -> None:
    """Within 1 % where n is simulated. Between, the four cores of the tiny chip take an odd sequence in a round of its
    own: a stair of 5 % at 19 sequences."""
    machine = toy(method)
    times = StepTimes(machine=machine, longest=400)
    for position in (37, 60, 200, 331):
        assert abs(off(times, [position] * n, exact_step(machine, position, n))) < bound, position


@pytest.mark.parametrize("method", ["kv", "ttt", "ttt_window"])
def test_lockstep_steps_of_a_gpu(method: str) -> None:
    """Within 0.2 %, with positions and batches that are not simulated themselves."""
    machine = machine_of("h100", "Qwen3-4B", method)
    times = StepTimes(machine=machine, longest=20_000)
    for n, position in ((1, 700), (6, 8700), (23, 19_000)):
        assert abs(off(times, [position] * n, exact_step(machine, position, n))) < 0.002, (n, position)


@pytest.mark.parametrize("method", ["ttt", "ttt_window"])
@pytest.mark.parametrize("n", [1, 3, UPDATE_GROUP])
def test_a_chunk_completed_in_lockstep(method: str, n: int) -> None:
    """The step that completes a chunk, with what it holds up in the next."""
    machine = toy(method)
    times = StepTimes(machine=machine, longest=400)
    chunk = machine.chunk_tokens
    assert chunk == 32
    for position in (2 * chunk - 1, 6 * chunk - 1):
        steps = [position + i for i in range(-2, 4)]
        seconds = lockstep_seconds(machine.chip, decode_trace(machine.model, machine.method, steps, n))
        exact = seconds[2] + max(seconds[3] - seconds[4], 0.0)
        assert abs(off(times, [position] * n, exact)) < 0.03, position


def mini_batches(window: int = 128) -> Machine:
    """The toy with TTT-E2E, mini-batches of 32."""
    point = make_point("tiny_gpu", "toy", "ttt_e2e", window=window, options={"mini_batch": "32"})
    return Machine(chip=point.chip, model=point.model, method=point.method, dtype=point.dtype, call_tokens=64)


@pytest.mark.parametrize("n", [1, 3, UPDATE_GROUP])
def test_a_mini_batch_completed_in_lockstep(n: int) -> None:
    """It runs again over what the window holds: simulated at both ends of its growth, interpolated between, where the
    four cores of the tiny chip make stairs."""
    machine = mini_batches()
    times = StepTimes(machine=machine, longest=400)
    for number in (1, 2, 3, 5, 9):
        position = 32 * number - 1
        steps = [position + i for i in range(-2, 4)]
        seconds = lockstep_seconds(machine.chip, decode_trace(machine.model, machine.method, steps, n))
        exact = seconds[2] + max(seconds[3] - seconds[4], 0.0)
        assert abs(off(times, [position] * n, exact)) < (0.001 if number in (1, 5, 9) else 0.05), number
    assert {number for _, number in times.extras} == {1, 5}  # 128 tokens are four mini-batches


def test_mini_batches_of_a_gpu() -> None:
    """Within 5 %, where the window makes a completed mini-batch half as dear again."""
    machine = machine_of("h100", "ttt-e2e-125m", "ttt_e2e")
    times = StepTimes(machine=machine, longest=20_000)
    found = {}
    for number in (1, 2, 5, 8, 12):
        position = 1024 * number - 1
        steps = [position + i for i in range(-2, 4)]
        seconds = lockstep_seconds(machine.chip, decode_trace(machine.model, machine.method, steps, 4))
        exact = seconds[2] + max(seconds[3] - seconds[4], 0.0)
        assert abs(off(times, [position] * 4, exact)) < 0.05, number
        found[number] = times.decode(np.array([position] * 4)).ps
    assert found[12] > 1.3 * found[2]
    both = np.array([1023, 12 * 1024 - 1])
    assert times.mean_number(both, np.ones_like(both)) == (1 + 9) / 2  # eight mini-batches fill the window


@pytest.mark.parametrize(("method", "bound"), [("ttt_e2e", 0.005), ("lact", 0.02)])
def test_ordinary_steps_and_calls_of_other_methods_with_chunks(method: str, bound: float) -> None:
    """A chunk of LaCT is as long as its window, which fills up in the first one: two simulated steps stand for it."""
    machine = machine_of("h100", "ttt-e2e-125m", method, window=2048)
    times = StepTimes(machine=machine, longest=10_000)
    for n, position in ((1, 700), (6, 3000), (23, 9000)):
        assert abs(off(times, [position] * n, exact_step(machine, position, n))) < bound, (n, position)
    for position, tokens in ((0, 20), (0, 333), (0, 1025), (0, 2047), (0, 5000), (8192, 777)):
        call = Call(position=position, tokens=tokens, logits=True)
        trace = build_trace(machine.model, machine.method, Scenario(batch=1, dtype="bf16", calls=(call,)))
        exact = lockstep_seconds(machine.chip, trace)[0]
        assert times.prefill(position, tokens, logits=True).ps / PS_PER_S == pytest.approx(exact, rel=bound), tokens


@pytest.mark.parametrize("method", ["ttt_e2e", "lact", "gated_deltanet"])
def test_states_of_other_methods_are_those_of_a_trace(method: str) -> None:
    machine = machine_of("h100", "ttt-e2e-125m", method, window=2048)
    trace = build_trace(machine.model, machine.method, Scenario.decode((3070,), batch=1, dtype="bf16"))
    held = holdings(trace, machine.model.n_layers, pipelined=False)
    kept = held.by_stage((), 1)[0] - held.by_stage((), 0)[0]
    assert machine.state_bytes(3071) == kept


@pytest.mark.parametrize(
    ("chip", "model", "groups", "bound"),
    [
        ("tiny_gpu", "toy", ((8, 40), (8, 150)), 0.02),
        ("tiny_gpu", "toy", ((4, 20), (12, 300)), 0.02),
        ("h100", "Qwen3-4B", ((8, 1000), (8, 9000)), 0.05),
        ("h100", "Qwen3-4B", ((16, 3000), (48, 20_000)), 0.05),
    ],
)
def test_sequences_at_positions_of_their_own(
    chip: str, model: str, groups: tuple[tuple[int, int], ...], bound: float
) -> None:
    """Against a step with an attention core for each group of equal positions, which starts a kernel more per layer."""
    machine = machine_of(chip, model, "kv")
    n = sum(count for count, _ in groups)
    mean = sum(count * position for count, position in groups) // n
    mixed = at_positions(decode_trace(machine.model, machine.method, (mean - 1, mean), n), 1, groups)
    exact = lockstep_seconds(machine.chip, mixed)[1]
    times = StepTimes(machine=machine, longest=max(position for _, position in groups))
    found = off(times, [position for count, position in groups for _ in range(count)], exact)
    assert -bound < found < 0.01


@pytest.mark.parametrize("method", ["ttt", "ttt_window"])
@pytest.mark.parametrize(
    ("chip", "model", "n", "completing"),
    [("tiny_gpu", "toy", 16, 3), ("tiny_gpu", "toy", 64, 8), ("h100", "Qwen3-4B", 8, 1), ("h100", "Qwen3-4B", 64, 8)],
)
def test_some_sequences_complete_a_chunk(chip: str, model: str, method: str, n: int, completing: int) -> None:
    """Against an ordinary step of all with the chunk updates of some inside its layers, which reads the weights of the
    MLP once more: 6 % more at most."""
    options = {"ttt": "toy", "window": 16} if model == "toy" else {}
    machine = machine_of(chip, model, method, **options)
    chunk = machine.chunk_tokens
    assert chunk is not None
    ordinary = decode_trace(machine.model, machine.method, (chunk + 4, chunk + 5), n)
    boundary = decode_trace(machine.model, machine.method, (2 * chunk - 2, 2 * chunk - 1), completing)
    exact = lockstep_seconds(machine.chip, with_updates(ordinary, 1, boundary, 1))[1]
    times = StepTimes(machine=machine, longest=4 * chunk)
    positions = [chunk + 5] * (n - completing) + [2 * chunk - 1] * completing
    assert -0.06 < off(times, positions, exact) < 0.01
    assert times.n_completing(np.array(positions)) == completing


@pytest.mark.parametrize(("method", "bound"), [("kv", 0.002), ("ttt_window", 0.002)])
def test_prefill_calls(method: str, bound: float) -> None:
    machine = machine_of("h100", "Qwen3-4B", method)
    times = StepTimes(machine=machine, longest=20_000)
    for position, tokens in ((0, 20), (0, 333), (0, 1025), (0, 2047), (0, 2048), (8192, 777)):
        call = Call(position=position, tokens=tokens, logits=True)
        trace = build_trace(machine.model, machine.method, Scenario(batch=1, dtype="bf16", calls=(call,)))
        exact = lockstep_seconds(machine.chip, trace)[0]
        assert times.prefill(position, tokens, logits=True).ps / PS_PER_S == pytest.approx(exact, rel=bound), tokens


def test_prompt_is_the_sum_of_its_calls() -> None:
    machine = toy("ttt")
    times = StepTimes(machine=machine, longest=300)
    parts = [
        times.prefill(0, 64, logits=False),
        times.prefill(64, 64, logits=False),
        times.prefill(128, 22, logits=True),
    ]
    assert times.prompt(150) == (sum(cost.ps for cost in parts), sum(cost.pj for cost in parts))
    assert times.prompt(128).ps == parts[0].ps + times.prefill(64, 64, logits=True).ps


def test_updates_beyond_a_group_take_rounds() -> None:
    times = StepTimes(machine=toy("ttt"), longest=100)
    assert times.completing(0) == (0, 0)
    assert times.completing(2 * UPDATE_GROUP + 3).ps == 2 * times.completing(UPDATE_GROUP).ps + times.completing(3).ps
    assert StepTimes(machine=toy("kv"), longest=100).completing(0) == (0, 0)


def test_what_has_been_met_is_not_simulated_again() -> None:
    times = StepTimes(machine=toy("ttt"), longest=200)
    first = times.decode(np.array([50, 63, 70]))
    simulated = times.simulated
    assert times.decode(np.array([70, 50, 63])) == first
    times.decode(np.array([90, 100, 110]))
    assert times.simulated == simulated == 2  # a table of steps of three, and one sequence that completes a chunk


def test_knots() -> None:
    assert [batch_between(n) for n in (1, 15, 16, 17, 31, 33, 250)] == [
        (1, 2), (15, 16), (16, 18), (16, 18), (30, 32), (32, 36), (240, 256),
    ]  # fmt: skip
    assert position_knots(2000, None)[-5:] == [1151, 1536, 1663, 1920, 2000]
    assert position_knots(400, None) == [1, 127, 128, 255, 256, 383, 384, 400]
    assert position_knots(400, 300) == [1, 127, 128, 255, 256, 299]
    assert position_knots(1, None) == position_knots(400, 1) == [1]
    assert chunk_knots(20_000, 1024, None) == [*range(9), 10, 12, 14, 16, 20]
    assert chunk_knots(20_000, 1024, 1024) == [0, 1]
    assert chunk_knots(20_000, 1024, 5000) == [0, 1, 2, 3, 4, 5]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tp", [1, 2])
def test_state_and_weights_are_those_of_a_trace(method: str, tp: int) -> None:
    machine = replace(machine_of("h100", "Qwen3-4B", method), parallel=Parallel(tp=tp))
    trace = build_trace(
        machine.model, machine.method, Scenario.decode((2999,), batch=1, dtype="bf16", parallel=machine.parallel)
    )
    held = holdings(trace, machine.model.n_layers, pipelined=False)
    assert machine.weight_bytes(3000) == held.by_stage((), 0)[0]
    assert machine.state_bytes(3000) == held.by_stage((), 1)[0] - held.by_stage((), 0)[0]


def test_room_is_memory_less_weights_and_activations() -> None:
    machine = toy("ttt")
    times = StepTimes(machine=machine, longest=300)
    room = room_on(times, longest_prompt=200, most_sequences=4, page_tokens=16)
    assert room.for_state == (1 << 30) - machine.weight_bytes(300) - room.activations
    call = machine.call(0, 64, logits=True).peak_bytes
    boundary = machine.lockstep((62, 63), 4).peak_bytes
    assert room.activations == max(call, boundary)
    for tokens in (1, 16, 17, 200):
        pages = -(-tokens // 16) * 16
        expected = state_per_sequence(machine.model, machine.method, pages, "bf16").total_bytes
        assert room.of_one(tokens) == int(room.of(np.array([tokens]))[0]) == expected
    one, more = (state_per_sequence(machine.model, machine.method, n, "bf16").total_bytes for n in (16, 32))
    assert room.page_bytes == more - one


def test_what_does_not_fit_is_said_in_bytes() -> None:
    machine = machine_of("h100", "Qwen3-14B", "kv")
    times = StepTimes(machine=machine, longest=262_000)
    room_on(times, longest_prompt=1000, most_sequences=1, page_tokens=16)
    big = machine_of("npu_xdna2", "Qwen3-14B", "kv")
    with pytest.raises(CapacityError, match=r"weights of .* and one sequence of 262000 tokens with .* do not fit the "):
        room_on(StepTimes(machine=big, longest=262_000), longest_prompt=1000, most_sequences=1, page_tokens=16)


@pytest.mark.parametrize("method", ["fine_tuning", "lora", "q_ttt", "kv_prefix", "kv_offload"])
def test_methods_that_are_not_served(method: str) -> None:
    point = make_point("h100", "Qwen3-4B", method)
    with pytest.raises(ConfigError, match=f"method {method} is not served: "):
        check_served(point.model, point.method, "bf16")


def test_chunks_that_are_too_short() -> None:
    point = make_point("h100", "Qwen3-4B", "ttt", chunk=4)
    with pytest.raises(ConfigError, match="chunk: 4 is less than 8 tokens"):
        check_served(point.model, point.method, "bf16")
