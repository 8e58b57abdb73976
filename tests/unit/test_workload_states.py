"""Layers with a state of fixed size, against closed forms and published counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.trace_tools import TOY, is_kind, kinds, one_call, totals
from ttt_sim.errors import ConfigError
from ttt_sim.grid import make_point
from ttt_sim.model import Model, Parallel, Scenario
from ttt_sim.ops import OP_KINDS, SCAN_RULE, OpClass, Phase, Role, Trace, is_update
from ttt_sim.simulation import simulate_point
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, state_per_sequence
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

STATE_METHODS = ("gated_deltanet", "mamba2", "ttt_linear", "ttt_mlp", "titans")
#: The width that published shapes are given for.
WIDE = replace(TOY, d_model=2048, n_layers=24)


def trace_of(method: str, scenario: Scenario, model: Model = TOY, **options: str) -> Trace:
    settings = set_options(METHODS[method].settings(None, None, None), options)
    trace = build_trace(model, settings, scenario)
    verify(trace)
    return trace


def state_elements(trace: Trace) -> int:
    """Elements of the states of one sequence of the trace, which are fp32."""
    held = [t for t in trace.tensors if t.role == Role.FAST_WEIGHT]
    return sum(t.nbytes for t in held) // (4 * held[0].shape[0])


@pytest.mark.parametrize(
    ("method", "layers", "elements"),
    [
        ("gated_deltanet", 1, 786_432),  # 6 heads, 256 x 512
        ("mamba2", 1, 524_288),  # 64 heads, 64 x 128
        ("ttt_linear", 24, 24 * 32 * (64 * 64 + 64)),
        ("ttt_mlp", 24, 24 * 32 * (8 * 64 * 64 + 5 * 64)),
        ("titans", 1, 2 * 32 * 8 * 64 * 64),  # memory and momentum
        ("lact", 1, 3_145_728),  # 0.75 d^2
    ],
)
def test_published_element_counts(method: str, layers: int, elements: int) -> None:
    model = replace(WIDE, n_layers=layers)
    assert state_elements(trace_of(method, one_call(0, 4), model)) == elements
    settings = METHODS[method].settings(None, None, None)
    assert state_per_sequence(model, settings, 1 << 20, "bf16").fast_weight_bytes == 4 * elements


def test_published_element_counts_of_ttt_layers_leave_biases_out() -> None:
    assert forms.ttt_weights(24, 32, 64, mlp=False) == 3_145_728
    assert forms.ttt_weights(24, 32, 64, mlp=True) == 25_165_824


@pytest.mark.parametrize("method", STATE_METHODS)
def test_the_state_is_what_the_trace_holds(method: str) -> None:
    held = state_per_sequence(TOY, METHODS[method].settings(None, None, None), 100, "bf16")
    trace = trace_of(method, one_call(0, 20, batch=3))
    by_role = {role: sum(t.nbytes for t in trace.tensors if t.role == role) for role in Role}
    assert by_role[Role.FAST_WEIGHT] == 3 * held.fast_weight_bytes
    assert by_role[Role.CARRY] == 3 * held.carry_bytes
    assert by_role[Role.KV] == held.kv_bytes == 0


def test_gated_deltanet_by_token_and_by_chunk() -> None:
    heads, d_k, d_v = 6, 8, 16  # toy: an eighth of the width, 0.75 of it together
    step = totals(*_only(trace_of("gated_deltanet", one_call(9, 1, batch=2)), "delta_step"))
    assert step.flops + step.vector_ops == TOY.n_layers * 2 * heads * forms.delta_net_step_ops(d_k, d_v)
    # 70 tokens: a chunk of 64 and one of 6
    chunks = totals(*_only(trace_of("gated_deltanet", one_call(0, 70, batch=2)), "delta_rule"))
    expected = sum(forms.delta_net_chunk_flops(c, d_k, d_v) for c in (64, 6))
    assert chunks.flops == TOY.n_layers * 2 * heads * expected


def test_mamba2_by_token_and_by_chunk() -> None:
    heads, width, state = 2, 64, 128
    step = totals(*_only(trace_of("mamba2", one_call(9, 1, batch=2)), "ssm_step"))
    assert step.flops + step.vector_ops == TOY.n_layers * 2 * heads * forms.mamba2_step_ops(width, state)
    trace = trace_of("mamba2", one_call(0, 300, batch=2), replace(TOY, vocab_size=1024))
    products = ("ssm_scores", "ssm_mix", "ssm_states", "ssm_read")
    expected = sum(forms.mamba2_chunk_flops(c, heads, width, state) for c in (256, 44))
    assert totals(trace, is_kind(trace, *products)).flops == TOY.n_layers * 2 * expected
    assert kinds(trace, is_kind(trace, *products, "state_pass"))[:9] == [
        "ssm_scores", "ssm_mix", "ssm_states", "ssm_scores", "ssm_mix", "ssm_states", "state_pass", "ssm_read",
        "ssm_read",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "kind", "form"),
    [("ttt_linear", "linear_update", forms.ttt_linear_flops), ("ttt_mlp", "mlp_update", forms.ttt_mlp_flops)],
)
def test_ttt_layers_by_mini_batch(method, kind, form) -> None:
    heads, h = 4, 16
    dual = totals(*_only(trace_of(method, one_call(0, 37, batch=2)), kind))
    assert dual.flops == TOY.n_layers * 2 * heads * (2 * form(16, h) + form(5, h))
    per_token = {"ttt_linear": 6, "ttt_mlp": 56}[method] * h * h
    primal = totals(*_only(trace_of(method, one_call(0, 37, batch=2), form="primal"), kind))
    assert primal.flops == TOY.n_layers * 2 * heads * 37 * per_token
    step = totals(*_only(trace_of(method, one_call(9, 1, batch=2)), kind))
    assert step.flops == TOY.n_layers * 2 * heads * per_token


def test_titans_is_ttt_mlp_in_larger_chunks_with_momentum() -> None:
    heads, h, n = 4, 16, 64
    scan = totals(*_only(trace_of("titans", one_call(0, 70, batch=2)), "memory_update"))
    assert scan.flops == TOY.n_layers * 2 * heads * (forms.titans_flops(64, h) + forms.titans_flops(6, h))
    # momentum and memory: six per element of a matrix and chunk; masks 4 c^2; GELU 28 n and error 2 h per token
    lanes = 2 * 6 * n * h + 4 * (64**2 + 6**2) + 70 * (28 * n + 2 * h)
    assert scan.vector_ops == TOY.n_layers * 2 * heads * lanes


@pytest.mark.parametrize("expand", [1, 2])
@pytest.mark.parametrize("muon", [True, False])
def test_lact_by_chunk(expand: int, muon: bool) -> None:
    """150 tokens in calls of 60, chunks of 40: three of them, and ten tokens that only apply."""
    model = replace(TOY, d_model=128)
    scenario = Scenario.prefill(130, batch=2, call_tokens=60)
    trace = trace_of("lact", scenario, model, expand=str(expand), muon=str(muon).lower(), chunk_tokens="40")
    elements = forms.lact_elements(model, 4, expand)
    assert state_elements(trace) == model.n_layers * elements
    applied = totals(trace, is_kind(trace, "fast_gate_up", "fast_apply") & (trace.phase == int(Phase.FORWARD)))
    assert applied.flops == 130 * 2 * model.n_layers * 2 * elements
    learned = totals(trace, is_kind(trace, "fast_gate_up", "fast_back", "delta_gemm") & is_update(trace))
    assert learned.flops == 3 * 40 * 2 * model.n_layers * 4 * elements
    assert 40 * 6 * elements == 40 * forms.lact_flops_per_token(model, 4, expand)
    steps = totals(trace, is_kind(trace, "muon_product"))
    assert steps.flops == (3 * 2 * model.n_layers * 4 * 3 * forms.muon_flops(32, expand) if muon else 0)
    assert kinds(trace).count("norm_write") == 3 * model.n_layers
    versions = sorted(set(trace.write_version[is_state(trace, "write")].tolist()))
    assert versions == [0, 1, 2, 3]  # the copy of the start, and one per chunk


def is_state(trace: Trace, column: str) -> np.ndarray:
    names = np.array([t.name.endswith(".state") for t in trace.tensors])
    return names[getattr(trace, f"{column}_tensor")]


def test_lact_published_numbers() -> None:
    model = replace(TOY, d_model=3072, n_layers=25)
    assert model.n_layers * forms.lact_elements(model, 4) == 176_947_200  # 177 M, 354 MB in bf16
    layer = 12 * forms.muon_flops(768)
    assert layer == pytest.approx(163e9, rel=0.01)
    assert layer / 4096 == pytest.approx(40e6, rel=0.01)  # per token of a chunk of 4096, against 42 M for the rest
    assert forms.lact_flops_per_token(model, 4) == pytest.approx(42e6, rel=0.02)


def test_lact_applies_a_chunk_before_it_learns_from_it() -> None:
    trace = trace_of("lact", one_call(0, 80), chunk_tokens="40")
    layer = trace.layer == 0
    order = kinds(trace, layer & (is_kind(trace, "fast_apply", "norm_write")))
    assert order == ["fast_apply", "norm_write"] * 2


def test_decoding_lact_has_one_dear_step_per_chunk() -> None:
    point = make_point("h100", "Qwen3-1.7B", "lact", phase="decode", context=4096)
    record = simulate_point(point).record
    assert record["chunk_tokens"] == record["window_tokens"] == 2048
    assert float(str(record["boundary_step_seconds"])) > 1.1 * float(str(record["ordinary_step_seconds"]))
    open_step = trace_of("lact", one_call(2046, 1))
    full_step = trace_of("lact", one_call(2047, 1))
    assert not is_update(open_step).any()
    assert is_update(full_step).any()


def test_lact_chunks_fit_the_window() -> None:
    with pytest.raises(ConfigError, match="chunk_tokens is 4096, expected at most the 2048 tokens of the window"):
        trace_of("lact", one_call(0, 4), chunk_tokens="4096")


def test_large_chunks_use_a_gpu() -> None:
    """The paper gives 70 % of the peak for large chunks, in kernels of its own for several sequences."""
    point = make_point("h100", "Qwen3-4B", "lact", phase="prefill", context=8192, batch=4, overlap=False)
    done = simulate_point(point)
    assert done.result is not None
    trace = done.result.trace
    chosen = is_kind(trace, "fast_gate_up", "fast_apply", "fast_back", "delta_gemm")
    kernel = np.unique(done.result.lowered.kernels.of_op[chosen])
    seconds = int(done.result.kernel_advance()[kernel].sum()) / point.chip.clock_hz
    share = totals(trace, chosen).flops / seconds / point.chip.unit("matrix").peak_per_s["bf16"]
    assert 0.4 < share < 0.8


@pytest.mark.parametrize("method", ["ttt_linear", "ttt_mlp"])
def test_an_open_mini_batch_keeps_the_weights_at_its_start(method: str) -> None:
    def started(trace: Trace, column: str) -> int:
        tensor = getattr(trace, f"{column}_tensor")
        names = np.array([t.name.endswith("state_start") for t in trace.tensors])
        return int(getattr(trace, f"{column}_bytes")[names[tensor]].sum())

    size = 4 * state_elements(trace_of(method, one_call(0, 16)))
    assert started(trace_of(method, one_call(0, 32)), "write") == 0
    assert started(trace_of(method, one_call(0, 33)), "write") == size
    assert started(trace_of(method, one_call(33, 1)), "read") == size


@pytest.mark.parametrize("method", STATE_METHODS)
def test_a_state_is_read_and_written_once_per_call(method: str) -> None:
    size = 4 * state_elements(trace_of(method, one_call(0, 8)))
    for scenario, read in ((one_call(0, 40), 0), (one_call(40, 40), size), (one_call(40, 1), size)):
        trace = trace_of(method, scenario)
        held = np.array([t.role == Role.FAST_WEIGHT for t in trace.tensors])
        assert int(trace.read_bytes[held[trace.read_tensor]].sum()) == read
        assert int(trace.write_bytes[held[trace.write_tensor]].sum()) == size


@pytest.mark.parametrize("method", STATE_METHODS)
def test_a_decode_step_costs_the_same_everywhere(method: str) -> None:
    records = [
        simulate_point(make_point("tiny_gpu", "toy", method, phase="decode", context=context)).record
        for context in (64, 2000)
    ]
    assert records[0]["cycles"] == records[1]["cycles"]


@pytest.mark.parametrize("method", [*STATE_METHODS, "lact"])
def test_chips_of_a_group_share_heads(method: str) -> None:
    model = replace(TOY, d_model=128)
    whole = trace_of(method, one_call(0, 32), model)
    half = trace_of(method, replace(one_call(0, 32), parallel=Parallel(tp=2)), model)
    assert 2 * state_elements(half) == state_elements(whole)
    assert kinds(half).count("allreduce") == 2 * TOY.n_layers + 1


def test_small_chunks_leave_a_gpu_idle() -> None:
    """Less than 5 % of the peak of the matrix units with mini-batches of 16 (LaCT, arXiv 2505.23884)."""
    point = make_point("h100", "Qwen3-4B", "ttt_linear", phase="prefill", context=8192)
    done = simulate_point(point)
    assert done.result is not None
    scan = is_kind(done.result.trace, "linear_update")
    seconds = done.cycles_by_kernel["linear_update"] / point.chip.clock_hz
    flops = totals(done.result.trace, scan).flops
    assert flops / seconds < 0.05 * point.chip.unit("matrix").peak_per_s["bf16"]


def test_ttt_linear_overtakes_attention_on_an_a100() -> None:
    """The paper, at 1.3 B parameters and batch 16: from 8K tokens on."""

    def seconds(method: str, context: int) -> float:
        point = make_point("a100", "Qwen3-1.7B", method, phase="prefill", context=context, batch=16, chips=1)
        return float(str(simulate_point(point).record["seconds"]))

    assert seconds("ttt_linear", 2048) > seconds("kv", 2048)
    for context in (8192, 16384):
        assert seconds("ttt_linear", context) < seconds("kv", context)


def test_the_primal_form_is_much_slower() -> None:
    """More than five times in the paper, on a TPU, for mini-batches of 16."""

    def scan(form: str) -> float:
        point = make_point("tpu_v7", "Qwen3-4B", "ttt_linear", phase="prefill", context=2048, options={"form": form})
        return simulate_point(point).cycles_by_kernel["linear_update"]

    assert scan("primal") > 5 * scan("dual")


@pytest.mark.parametrize("method", ["ttt_mlp", "titans"])
def test_hidden_layers_are_not_local(method: str) -> None:
    record = simulate_point(make_point("loihi2", "toy", method, phase="decode", context=64, chips=1)).record
    assert "came back through a hidden layer" in str(record["missing"])
    for other in ("gated_deltanet", "ttt_linear"):
        assert simulate_point(make_point("loihi2", "toy", other, phase="decode", context=64, chips=1)).record["fits"]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gated_deltanet", {"heads": "0"}, "heads is 0, expected at least 1"),
        ("mamba2", {"state_dtype": "fp33"}, "state_dtype 'fp33' is unknown, did you mean fp32"),
        ("ttt_linear", {"form": "duel"}, "'duel' is not one of dual, primal, did you mean dual"),
        ("ttt_mlp", {"minibatch": "8"}, "unknown option 'minibatch' of method ttt_mlp, did you mean mini_batch"),
    ],
)
def test_wrong_options_are_refused(method: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_options(METHODS[method].settings(None, None, None), options)


def test_every_scan_has_a_rule() -> None:
    assert set(SCAN_RULE) == {kind.name for kind in OP_KINDS if kind.op_class == OpClass.SCAN}


def _only(trace: Trace, kind: str) -> tuple[Trace, np.ndarray]:
    mask = is_kind(trace, kind)
    assert mask.any(), kind
    return trace, mask
