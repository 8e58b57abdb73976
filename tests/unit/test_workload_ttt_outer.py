"""Outer training of In-Place TTT: the mathematics against finite differences, the trace against closed forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from tests.unit import trace_tools
from tests.unit.trace_tools import is_kind, kinds, operands, totals
from ttt_sim.errors import ConfigError, UnsupportedError, WorkloadError
from ttt_sim.grid import make_point
from ttt_sim.model import Model, Parallel, Scenario, TTTSettings
from ttt_sim.ops import OP_KINDS, Phase, Role, Trace
from ttt_sim.simulation import simulate_point
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

Array = npt.NDArray[np.float64]

B, C, D, F = 2, 32, 64, 192
#: With a vocabulary that has as many entries as a step has rows.
TOY = replace(trace_tools.TOY, vocab_size=512)
TTT = TTTSettings(layers=(0, 2), chunk_tokens=C)
UNTIED = replace(TOY, tied_embeddings=False, qk_norm=False)


def train(
    tokens: int, ttt: TTTSettings = TTT, model: Model = TOY, batch: int = B, parallel: Parallel | None = None,
    **options: str,
) -> Trace:  # fmt: skip
    settings = set_options(METHODS["ttt_outer"].settings(None, None, ttt), options)
    trace = build_trace(model, settings, Scenario.train(tokens, batch=batch, parallel=parallel or Parallel()))
    verify(trace)
    return trace


# --- the trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TOY, UNTIED])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("tokens", [33, 64, 150, 160])
@pytest.mark.parametrize(
    "ttt", [TTT, replace(TTT, layers=(1, 3)), replace(TTT, projection=False), replace(TTT, target="input_embed")]
)
def test_flops_of_a_step(model: Model, recompute: bool, tokens: int, ttt: TTTSettings) -> None:
    trace = train(tokens, ttt, model, recompute=str(recompute).lower())
    assert int(trace.flops.sum()) == B * forms.outer_training_flops(model, ttt, tokens, recompute=recompute)


def test_running_sums_read_and_write_the_whole_list() -> None:
    trace = train(5 * C, recompute="false")
    scans = np.flatnonzero(is_kind(trace, "weight_scan"))
    assert trace.layer[scans].tolist() == [0, 2, 2, 0]
    listed = int(forms.fast_list_bytes(TOY, TTT, 5 * C))
    assert listed == 5 * D * F * 2
    matrix = D * F * 2
    for op, backward in zip(scans, (False, False, True, True), strict=True):
        read = sum(size for _, _, size in operands(trace, int(op), "read"))
        written = sum(size for _, _, size in operands(trace, int(op), "write"))
        # forward the sequences share the weight they start from, backward they share its gradient
        assert read == B * listed - (0 if backward else (B - 1) * matrix)
        assert written == B * listed - ((B - 1) * matrix if backward else 0)
        assert int(trace.vector_ops[op]) == 2 * B * 4 * D * F + ((B - 1) * D * F if backward else 0)


def test_every_weight_has_a_gradient_and_a_step() -> None:
    trace = train(5 * C)
    elements = TOY.parameters + 2 * (D * D + 5 * D)
    steps = totals(trace, is_kind(trace, "adam_write"))
    assert steps.vector_ops == 12 * elements
    names = {tensor.name for tensor in trace.tensors if tensor.role == Role.FAST_WEIGHT}
    assert {"layers.0.ttt_conv.weight", "layers.2.ttt_proj.weight", "layers.2.down_proj.weight"} <= names
    assert "layers.1.ttt_conv.weight" not in names


def test_the_list_of_weights_is_kept_for_the_backward_pass() -> None:
    def last_use(trace: Trace, name: str) -> list[tuple[str, int]]:
        index = next(i for i, tensor in enumerate(trace.tensors) if tensor.name == name)
        owner = np.repeat(np.arange(trace.n_ops), np.diff(trace.read_ptr))
        readers = owner[trace.read_tensor == index]
        return [(OP_KINDS[int(trace.kind[op])].name, int(trace.phase[op])) for op in readers]

    trace = train(5 * C, recompute="false")
    backward = int(Phase.BACKWARD)
    assert last_use(trace, "layers.2.fast_weights") == [("fast_apply", 0), ("input_grad", backward)]
    assert last_use(trace, "layers.2.deltas") == [("weight_scan", 0)]


def test_order_of_a_layer() -> None:
    order = kinds(train(2 * C, recompute="false"))
    start = order.index("target_conv")
    assert order[start : start + 5] == ["target_conv", "target_proj", "delta_gemm", "weight_scan", "fast_apply"]
    end = len(order) - order[::-1].index("weight_scan") - 1
    assert order[end - 2 : end + 9] == [
        "input_grad", "weight_grad", "weight_scan", "input_grad", "input_grad", "input_grad", "weight_grad",
        "silu_mul_grad", "input_grad", "weight_grad", "input_grad",
    ]  # fmt: skip
    assert order[end + 10] == "conv_grad"


def test_targets_of_all_layers_reach_the_embedding() -> None:
    trace = train(2 * C, replace(TTT, target="input_embed"), recompute="false")
    adds = [int(op) for op in np.flatnonzero(is_kind(trace, "conv_grad", "grad_add") & (trace.phase == 2))]
    into = [operands(trace, op, "write")[0][:2] for op in adds]
    assert [version for name, version in into if name == "target_grad"] == [1, 2]
    read = {operands(trace, op, "read")[1] for op in adds[-2:-1]}
    assert read == {("target_grad", 2, B * C * D * 2)}


def test_chips_of_a_group_share_the_lists() -> None:
    whole, half = train(4 * C, model=UNTIED), train(4 * C, model=UNTIED, parallel=Parallel(tp=2))
    for kind, share in (("weight_scan", 2), ("delta_gemm", 2), ("fast_apply", 1)):  # outputs of an apply are summed
        part, all_of_it = totals(half, is_kind(half, kind)), totals(whole, is_kind(whole, kind))
        assert share * part.write_bytes == all_of_it.write_bytes
    sums = is_kind(half, "allreduce") & (half.m == B * 3 * C * D)
    assert half.layer[sums].tolist() == [2, 0]


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(WorkloadError, match="sequences of 32 tokens are one chunk of 32"):
        train(C)
    with pytest.raises(ConfigError, match="no rule for gradients through a clip"):
        train(2 * C, replace(TTT, clip=1.0))
    with pytest.raises(ConfigError, match="method ttt_outer trains whole fast weights; leave update_rows out"):
        train(2 * C, replace(TTT, update_rows=16))
    with pytest.raises(UnsupportedError, match="without stages"):
        train(2 * C, parallel=Parallel(pp=2))
    record = simulate_point(make_point("loihi2", "toy", "ttt_outer", phase="train", context=96, ttt=TTT)).record
    assert "came back through other layers" in str(record["missing"])


# --- the mathematics --------------------------------------------------------------------------------------------------


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def silu_slope(x: Array) -> Array:
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def shifted(x: Array, by: int) -> Array:
    """Row r becomes row r + by of x, zero outside."""
    out = np.zeros_like(x)
    n = len(x)
    out[max(0, -by) : n - max(0, by)] = x[max(0, by) : n - max(0, -by)]
    return out


def conv(t: Array, taps: Array) -> Array:
    return sum((shifted(t, q - 2) * taps[:, q] for q in range(5)), np.zeros_like(t))


def forward(p: Mapping[str, Array], chunk: int, rate: float) -> dict[str, list[Array]]:
    """The parallel form; x are the layer's inputs and its targets."""
    xs = np.split(p["x"], len(p["x"]) // chunk)
    g, u = [x @ p["gate"].T for x in xs], [x @ p["up"].T for x in xs]
    z = [silu(a) * b for a, b in zip(g, u, strict=True)]
    a = [conv(x, p["taps"]) for x in xs[:-1]]
    v = [rows @ p["proj"] for rows in a]
    w = [p["down"]]
    for values, hidden in zip(v, z, strict=False):
        w.append(w[-1] + rate * values.T @ hidden)
    return {"x": xs, "g": g, "u": u, "z": z, "a": a, "v": v, "w": w, "o": [h @ m.T for h, m in zip(z, w, strict=True)]}


def backward(p: Mapping[str, Array], chunk: int, rate: float, out_grad: list[Array]) -> dict[str, Array]:
    """The products and sums that the trace of a layer has, in its order."""
    f, k = forward(p, chunk, rate), len(out_grad)
    dz = [do @ w for do, w in zip(out_grad, f["w"], strict=True)]
    dw = [do.T @ z for do, z in zip(out_grad, f["z"], strict=True)]
    total: Array = np.zeros_like(dw[0])
    dd: list[Array] = []
    for grad in reversed(dw[1:]):
        total = total + grad
        dd.insert(0, rate * total)
    dv = [f["z"][j] @ dd[j].T for j in range(k - 1)]
    for j in range(k - 1):
        dz[j] = dz[j] + f["v"][j] @ dd[j]
    da = [rows @ p["proj"].T for rows in dv]
    dproj = np.concatenate(f["a"]).T @ np.concatenate(dv)
    dg = [d * u * silu_slope(g) for d, u, g in zip(dz, f["u"], f["g"], strict=True)]
    du = [d * silu(g) for d, g in zip(dz, f["g"], strict=True)]
    dx = [a @ p["gate"] + b @ p["up"] for a, b in zip(dg, du, strict=True)]
    dtaps = np.zeros_like(p["taps"])
    for j in range(k - 1):
        for q in range(5):
            dx[j] = dx[j] + shifted(da[j] * p["taps"][:, q], 2 - q)
            dtaps[:, q] += (da[j] * shifted(f["x"][j], q - 2)).sum(axis=0)
    return {
        "x": np.concatenate(dx), "gate": np.concatenate(dg).T @ p["x"], "up": np.concatenate(du).T @ p["x"],
        "down": total + dw[0], "proj": dproj, "taps": dtaps,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["x", "gate", "up", "down", "proj", "taps"])
@pytest.mark.parametrize("chunks", [2, 4])
def test_gradients_are_those_of_finite_differences(
    name: Literal["x", "gate", "up", "down", "proj", "taps"], chunks: int
) -> None:
    rng = np.random.default_rng(chunks)
    chunk, d, f, rate = 6, 3, 5, 0.3
    shapes = {"x": (chunks * chunk, d), "gate": (f, d), "up": (f, d), "down": (d, f), "proj": (d, d), "taps": (d, 5)}
    p = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    weight = [rng.standard_normal((chunk, d)) for _ in range(chunks)]

    def loss() -> float:
        return float(sum((o * w).sum() for o, w in zip(forward(p, chunk, rate)["o"], weight, strict=True)))

    analytic = backward(p, chunk, rate, weight)[name]
    array = p[name]
    for index in np.ndindex(array.shape):
        kept = array[index]
        values = []
        for step in (1e-6, -1e-6):
            array[index] = kept + step
            values.append(loss())
        array[index] = kept
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(analytic[index], rel=1e-5, abs=1e-6)
