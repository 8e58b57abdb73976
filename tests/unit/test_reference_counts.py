"""What the reference was seen to do equals what the trace says, op by op: FLOPs, vector operations, bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from tests.unit.reference_tools import (
    Counts,
    CountsByKey,
    meter_counts,
    scenario_of,
    trace_counts,
)
from tests.unit.trace_tools import TOY
from ttt_sim.model import Call, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.reference.decoder import Decoder, random_parameters, random_tokens
from ttt_sim.reference.meter import Meter
from ttt_sim.replay.settings import decoder_shape
from ttt_sim.workload import CONTEXT_METHODS, METHODS, build_trace

#: Toy with two narrow layers, of which the first has a fast weight: an op costs the same Python, but less arithmetic.
NARROW = replace(TOY, n_layers=2, d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=32)
TTT = TTTSettings(layers=(0, 2), chunk_tokens=8)
KV_DTYPES = ("bf16", "fp16", "fp32", "fp8", "int8", "fp4", "int4")


def settings_of(method: str, *, window: int = 12, kv: str | None = None, **changes: Any) -> MethodSettings:
    ttt = replace(TTT, **changes) if method.startswith("ttt") else None
    return METHODS[method].settings(window, kv, ttt)


def observed(model: Model, settings: MethodSettings, scenario: Scenario) -> CountsByKey:
    shape, meter = decoder_shape(model, settings, scenario.dtype), Meter()
    decoder = Decoder(shape, random_parameters(shape, 0), scenario.batch, meter)
    tokens = random_tokens(shape, 0, scenario.batch, scenario.context_tokens)
    for call in scenario.calls:
        decoder(tokens[:, call.position : call.position + call.tokens], logits=call.logits)
    return meter_counts(meter)


def assert_equal_counts(model: Model, settings: MethodSettings, scenario: Scenario) -> CountsByKey:
    expected, seen = trace_counts(build_trace(model, settings, scenario)), observed(model, settings, scenario)
    moved = [
        f"{key}: trace {expected.get(key)}, seen {seen.get(key)}"
        for key in sorted({*expected, *seen})
        if expected.get(key) != seen.get(key)
    ]
    assert not moved, "\n".join(moved[:5])
    return seen


#: Two chunks in a prompt of two calls that ends in an open chunk, then tokens up to and over the next boundary.
USUAL = scenario_of(19, 6, batch=1, call_tokens=10)


@pytest.mark.parametrize("method", CONTEXT_METHODS)
@pytest.mark.parametrize("batch", [1, 2])
def test_methods_on_the_toy_model(method, batch):
    assert_equal_counts(TOY, settings_of(method), scenario_of(19, 6, batch=batch, call_tokens=10))


@pytest.mark.parametrize("kv", KV_DTYPES)
@pytest.mark.parametrize("method", ["kv_quant", "kv_window", "ttt_window"])
def test_kv_formats(method, kv):
    assert_equal_counts(NARROW, settings_of(method, kv=kv), scenario_of(19, 6, batch=2, call_tokens=10))


@pytest.mark.parametrize("per_token_scale", [True, False])
@pytest.mark.parametrize("kv", ["fp8", "int8"])
@pytest.mark.parametrize("method", ["kv_quant", "kv_window"])
def test_scales_of_kv_formats(method, kv, per_token_scale):
    settings = settings_of(method, kv=kv)
    settings = replace(settings, kv=replace(settings.kv, per_token_scale=per_token_scale))
    assert_equal_counts(NARROW, settings, USUAL)


@pytest.mark.parametrize("group", [4, 7, 8, 64])
def test_groups_of_kv_formats(group):
    settings = settings_of("kv_quant", kv="int4")
    assert_equal_counts(NARROW, replace(settings, kv=replace(settings.kv, group=group)), USUAL)


@pytest.mark.parametrize("carry", ["official", "ring", "keep_z", "online"])
@pytest.mark.parametrize("write", ["official", "fused", "resident", "master", "tile_wise"])
@pytest.mark.parametrize(
    ("contraction", "projection"), [("project_first", True), ("outer_first", True), ("auto", False)]
)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("rows", [None, 5])
def test_carries_and_writes(carry, write, contraction, projection, clip, rows):
    """Target and convolution go through all their pairs along the way; the tests below take them in full."""
    others = list(product(("hidden_states", "input_embed"), ("symmetric", "causal")))
    target, convolution = others[(len(carry) + len(write) + len(contraction)) % 4]
    settings = settings_of(
        "ttt_window", carry=carry, weight_write=write, contraction=contraction, projection=projection, clip=clip,
        target=target, convolution=convolution, update_rows=rows,
    )  # fmt: skip
    assert_equal_counts(NARROW, settings, USUAL)


@pytest.mark.parametrize("carry", ["official", "ring", "keep_z", "online"])
@pytest.mark.parametrize("target", ["hidden_states", "input_embed"])
@pytest.mark.parametrize("convolution", ["symmetric", "causal"])
@pytest.mark.parametrize("chunk", [1, 3, 24, 30])
def test_targets_convolutions_and_chunks(carry, target, convolution, chunk):
    """Chunks shorter than the convolution, as long as d_ff, and longer than the stream."""
    settings = settings_of("ttt", carry=carry, target=target, convolution=convolution, chunk_tokens=chunk)
    assert_equal_counts(NARROW, settings, scenario_of(19, 6, batch=2, call_tokens=10))


@pytest.mark.parametrize(
    ("fast_dtype", "write"),
    [*product(("fp32", "bf16", "fp16"), ("official", "fused")), ("bf16", "master"), ("fp16", "master")],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_formats_of_weights_and_activations(fast_dtype, write, dtype):
    settings = settings_of("ttt_window", fast_dtype=fast_dtype, weight_write=write)
    assert_equal_counts(NARROW, settings, scenario_of(19, 6, batch=1, call_tokens=10, dtype=dtype))


@pytest.mark.parametrize("calls", [[25], [8, 8, 8, 1], [1] * 10, [7, 1, 16, 1], [3, 4, 18]])
@pytest.mark.parametrize("carry", ["official", "ring", "keep_z", "online"])
def test_ways_to_call(calls, carry):
    starts = [sum(calls[:i]) for i in range(len(calls))]
    scenario = Scenario(
        batch=1,
        dtype="bf16",
        calls=tuple(Call(position=p, tokens=n, logits=n == 1) for p, n in zip(starts, calls, strict=True)),
    )
    for window in (1, 6, 40):
        assert_equal_counts(NARROW, settings_of("ttt_window", window=window, carry=carry), scenario)


@pytest.mark.parametrize(("layers", "tied", "qk_norm"), [((0, 1), False, True), ((1,), True, False)])
def test_models(layers, tied, qk_norm):
    model = replace(NARROW, tied_embeddings=tied, qk_norm=qk_norm)
    settings = settings_of("ttt", layers=layers, target="input_embed", carry="ring")
    assert_equal_counts(model, settings, USUAL)


def test_counts_by_hand():
    """d = 16, f = 24, chunk 8, bf16, one sequence: the update of the first chunk, from the closed forms."""
    seen = assert_equal_counts(NARROW, settings_of("ttt"), USUAL)
    d, f, c = 16, 24, 8
    assert seen["target_conv", 0, 0, 0] == [Counts(10 * c * d, 0, 0, 0, 0, 2 * c * d + 10 * d, 2 * c * d)]
    assert seen["target_proj", 0, 0, 0] == [Counts(2 * c * d * d, 0, 0, 0, 0, 2 * c * d + 2 * d * d, 2 * c * d)]
    assert seen["delta_gemm", 0, 0, 0] == [Counts(2 * c * d * f, 0, 0, 0, 0, 2 * c * (d + f), 2 * d * f)]
    assert seen["delta_scale", 0, 0, 0] == [Counts(0, d * f, 0, 0, 0, 2 * d * f, 2 * d * f)]
    assert seen["weight_write", 0, 0, 0] == [Counts(0, d * f, 0, 0, 0, 4 * d * f, 2 * d * f)]
    # Gate of the call of 10 rows: all of them, since the chunk is full with them.
    assert seen["gate_proj", 0, 0, -1] == [Counts(2 * 10 * d * f, 0, 0, 0, 0, 2 * 10 * d + 2 * d * f, 2 * 10 * f)]
    # The token that completes the chunk at 24 recomputes its hidden rows.
    step = 2 + 24 - 19 - 1
    assert seen["gate_proj", step, 0, -1][0].flops == 2 * 8 * d * f
    assert seen["silu_mul", step, 0, -1][0][1:5] == (5 * 8 * f, 8 * f, 0, 8 * f)


def test_a_count_that_differs_is_reported():
    settings = settings_of("ttt", carry="ring")
    scenario = scenario_of(19, 1, batch=1, call_tokens=10)
    expected = trace_counts(build_trace(NARROW, settings, scenario))
    other = observed(NARROW, settings_of("ttt", carry="keep_z"), scenario)
    moved = {key[0] for key in {*expected, *other} if expected.get(key) != other.get(key)}
    assert moved == {"gate_proj", "up_proj", "silu_mul", "carry_append", "fast_apply"}
