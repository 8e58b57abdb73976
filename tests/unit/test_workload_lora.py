"""Adapters in training and serving, against closed forms, hand counts and finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.trace_tools import TOY, Totals, is_kind, kinds, operands, totals
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.grid import make_point
from ttt_sim.model import Call, Model, Parallel, Scenario
from ttt_sim.ops import Role, Trace
from ttt_sim.simulation import simulate_point
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, state_per_sequence
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

B, T, D, F, Q, KV, LAYERS = 2, 40, 64, 192, 64, 32, 4
UNTIED = replace(TOY, tied_embeddings=False, qk_norm=False)
#: Inputs and outputs of the seven products of a layer.
ALL = (D + Q) + 2 * (D + KV) + (Q + D) + 3 * (D + F)
PARTS = {"all": (True, True), "attention": (True, False), "mlp": (False, True)}


def lora_trace(scenario: Scenario, model: Model = TOY, method: str = "lora", **options: str) -> Trace:
    settings = set_options(METHODS[method].settings(None, None, None), options)
    trace = build_trace(model, settings, scenario)
    verify(trace)
    return trace


def train(model: Model = TOY, method: str = "lora", parallel: Parallel | None = None, **options: str) -> Trace:
    return lora_trace(Scenario.train(T, batch=B, parallel=parallel or Parallel()), model, method, **options)


def of_kind(trace: Trace, kind: str) -> Totals:
    return totals(trace, is_kind(trace, kind))


@pytest.mark.parametrize("model", [TOY, UNTIED])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("targets", PARTS)
@pytest.mark.parametrize("own", ["true", "false"])
def test_flops_of_a_step(model: Model, recompute: bool, targets: str, own: str) -> None:
    trace = train(model, rank="3", targets=targets, recompute=str(recompute).lower(), own=own)
    attention, mlp = PARTS[targets]
    expected = forms.lora_training_flops(model, T, 3, attention=attention, mlp=mlp, recompute=recompute)
    assert int(trace.flops.sum()) == B * expected


def test_work_of_the_adapters_by_hand() -> None:
    with_adapters, without = train(rank="5", recompute="false"), train(rank="5", recompute="false", targets="mlp")
    assert forms.adapter_widths(TOY, attention=True, mlp=True) == ALL
    rows, r = B * T, 5
    forward = of_kind(with_adapters, "adapter_down").flops + of_kind(with_adapters, "adapter_up").flops
    assert forward == 2 * rows * r * ALL * LAYERS
    assert of_kind(with_adapters, "adapter_up").vector_ops == rows * (Q + 2 * KV + D + 2 * F + D) * LAYERS
    # gradients of both factors: 2 r (inputs + outputs) per row
    assert of_kind(with_adapters, "weight_grad").flops == 2 * rows * r * ALL * LAYERS
    assert of_kind(without, "weight_grad").flops == 2 * rows * r * 3 * (D + F) * LAYERS


@pytest.mark.parametrize(("own", "adapters"), [("false", 1), ("true", B)])
def test_adam_steps_on_the_adapters_only(own: str, adapters: int) -> None:
    trace = train(rank="5", own=own)
    parameters = adapters * 5 * ALL * LAYERS
    assert adapters * forms.adapter_parameters(TOY, 5) == parameters
    step = of_kind(trace, "adam_write")
    assert (step.read_bytes, step.write_bytes, step.vector_ops) == (14 * parameters, 14 * parameters, 12 * parameters)
    assert is_kind(trace, "adam_write").sum() == LAYERS  # one pass over all adapters of a layer
    held = {role: sum(t.nbytes for t in trace.tensors if t.role == role) for role in Role}
    grads = of_kind(trace, "weight_grad").write_bytes
    assert held[Role.FAST_WEIGHT] + held[Role.OPTIMISER] + grads - 4 * adapters == 16 * parameters - 4 * adapters
    frozen = {t.name for t in trace.tensors if t.role == Role.WEIGHT}
    assert {"embedding.weight", "layers.0.q_proj.weight", "layers.3.down_proj.weight"} <= frozen


@pytest.mark.parametrize(("targets", "lowest"), [("all", 4), ("attention", 4), ("mlp", 3)])
def test_nothing_has_a_gradient_below_the_lowest_adapter(targets: str, lowest: int) -> None:
    trace = train(targets=targets)
    assert int(is_kind(trace, "attention_grad").sum()) == lowest
    assert "grad_add" in kinds(trace)
    assert not (is_kind(trace, "grad_add") & (trace.layer < 0)).any()  # the embedding has none
    written = {operands(trace, int(op), "write")[0][0] for op in np.flatnonzero(is_kind(trace, "norm_grad"))}
    assert not any("residual_grad.0" in name for name in written)


def test_serving_reads_the_base_once_and_every_adapter() -> None:
    batch, question, r = 3, 7, 16
    trace = lora_trace(Scenario(batch=batch, dtype="bf16", calls=(Call(position=0, tokens=question, logits=True),)))
    plain = build_trace(
        TOY, METHODS["kv"].settings(None, None, None),
        Scenario(batch=batch, dtype="bf16", calls=(Call(position=0, tokens=question, logits=True),)),
    )  # fmt: skip
    adapters = is_kind(trace, "adapter_down", "adapter_up")
    assert set(trace.batch[adapters].tolist()) == {batch}
    assert set(trace.m[adapters].tolist()) == {question}
    down, up = of_kind(trace, "adapter_down"), of_kind(trace, "adapter_up")
    inputs, outputs = 3 * D + Q + 2 * D + F, Q + 2 * KV + D + 2 * F + D
    rows = batch * question
    assert down.read_bytes == 2 * LAYERS * (rows * inputs + batch * r * inputs)
    assert down.write_bytes == 2 * LAYERS * rows * r * 7
    assert up.read_bytes == 2 * LAYERS * (rows * r * 7 + batch * r * outputs + rows * outputs)
    assert up.write_bytes == 2 * LAYERS * rows * outputs
    rest = ~adapters
    assert totals(trace, rest) == totals(plain, np.ones(plain.n_ops, dtype=np.bool_))
    settings = METHODS["lora"].settings(None, None, None)
    assert state_per_sequence(TOY, settings, 0, "bf16").fast_weight_bytes == 2 * forms.adapter_parameters(TOY, r)
    held = sum(t.nbytes for t in trace.tensors if t.role == Role.FAST_WEIGHT)
    assert held == batch * 2 * forms.adapter_parameters(TOY, r)


def test_adapters_of_sibling_products_follow_the_last_of_them() -> None:
    order = kinds(lora_trace(Scenario.decode((5,))))
    first = order.index("q_proj")
    assert order[first : first + 9] == ["q_proj", "k_proj", "v_proj", *["adapter_down"] * 3, *["adapter_up"] * 3]

    def kernels(method: str) -> int:
        result = simulate_point(make_point("h100", "toy", method, phase="prefill", context=64)).result
        assert result is not None
        return result.lowered.kernels.n

    assert kernels("lora") - kernels("kv") == LAYERS * 4 * 2  # two launches after each of four groups of products


def test_chips_of_a_group_share_the_adapters() -> None:
    whole, half = train(UNTIED), train(UNTIED, parallel=Parallel(tp=2))
    # A of q, k, v, gate and up is on both chips, and so is B of o and down: their gradients are added up.
    sums = is_kind(half, "allreduce") & np.isin(half.m, [16 * D])
    assert int(sums.sum()) == LAYERS * 7
    # twice, as layers run again: inputs of o and down and outputs of the others are halves
    per_row = 2 * 16 * LAYERS * 2
    assert of_kind(half, "adapter_down").flops == B * T * per_row * (5 * D + Q // 2 + F // 2)
    assert of_kind(half, "adapter_up").flops == B * T * per_row * (Q // 2 + KV + D + F + D)
    assert of_kind(whole, "adapter_down").flops == B * T * per_row * (5 * D + Q + F)


def test_a_context_is_gone_through_in_steps() -> None:
    method = METHODS["lora_ttt"]
    settings = set_options(method.settings(None, None, None), {"sequence_tokens": "1k"})
    assert method.step_tokens(settings, 5000) == 1024
    assert method.steps(settings, 5000) == 2 * 5
    assert method.steps(method.settings(None, None, None), 5000) == 2 * 2
    assert METHODS["lora"].steps(METHODS["lora"].settings(None, None, None), 5000) == 2


def test_a_step_costs_less_than_one_of_all_weights() -> None:
    def seconds(method: str) -> float:
        options = {"recompute": False}
        point = make_point("h100", "Qwen3-1.7B", method, phase="train", context=2048, options=options)
        return float(str(simulate_point(point).record["seconds"]))

    assert 0.5 < seconds("lora") / seconds("fine_tuning") < 0.85


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank is 0, expected at least 1"):
        train(rank="0")
    with pytest.raises(ConfigError, match="'attn' is not one of attention, mlp, all"):
        train(targets="attn")
    with pytest.raises(UnsupportedError, match="without stages"):
        train(parallel=Parallel(pp=2))


def test_gradients_of_the_factors_are_those_of_finite_differences() -> None:
    rng = np.random.default_rng(7)
    rows, k, n, r = 6, 5, 4, 2
    x, w, a, b, weight = (rng.standard_normal(shape) for shape in ((rows, k), (n, k), (r, k), (n, r), (rows, n)))

    def loss() -> float:
        return float((np.tanh(x @ w.T + x @ a.T @ b.T) * weight).sum())

    out_grad = (1 - np.tanh(x @ w.T + x @ a.T @ b.T) ** 2) * weight
    low, low_grad = x @ a.T, out_grad @ b
    # the four products of an adapter's backward pass, and the one of the frozen weight
    analytic = {"b": out_grad.T @ low, "a": low_grad.T @ x, "x": out_grad @ w + low_grad @ a}
    for name, array in (("a", a), ("b", b), ("x", x)):
        for index in np.ndindex(array.shape):
            kept = array[index]
            values = []
            for step in (1e-6, -1e-6):
                array[index] = kept + step
                values.append(loss())
            array[index] = kept
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(analytic[name][index], rel=1e-6, abs=1e-8)
