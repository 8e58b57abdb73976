"""TTT-E2E against closed forms, published sizes and hand counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.trace_tools import TOY, Mask, assert_calls_equal_themselves_alone, is_kind, kinds, operands, totals
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.grid import make_point
from ttt_sim.model import Call, MethodSettings, Model, Parallel, Scenario
from ttt_sim.model_config import load_model
from ttt_sim.ops import KIND, TRAFFIC_CLASSES, Phase, Role, Trace, persistent_bytes
from ttt_sim.simulation import simulate_point, simulate_trace
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, state_per_sequence
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options
from ttt_sim.workload.ttt_e2e import E2EOptions, cut, e2e_model, suffix_layers

#: L, Ls, d, heads, width of a head, MLP of this model and of the full-attention twin; millions of prime parameters.
PUBLISHED = {
    "ttt-e2e-125m": (12, 3, 768, 12, 64, 1664, 2048, "11.5"),
    "ttt-e2e-350m": (24, 6, 1024, 16, 64, 2304, 2816, "42.5"),
    "ttt-e2e-760m": (24, 6, 1536, 16, 96, 3328, 4096, "92.0"),
    "ttt-e2e-1b": (24, 6, 2048, 32, 64, 4352, 5376, "160.4"),
    "ttt-e2e-3b": (32, 8, 2560, 32, 80, 5632, 6912, "346.0"),
}
B, SIZE, WINDOW = 2, 8, 20
#: Eight layers, of which the last two learn.
DEEP = replace(TOY, n_layers=8)
ONE = 2**20


def settings(*, window: int = WINDOW, **options: object) -> MethodSettings:
    plain = METHODS["ttt_e2e"].settings(window, None, None)
    chosen = {"mini_batch": SIZE} | options
    return set_options(plain, {name: str(value).lower() for name, value in chosen.items()})


def trace_of(
    model: Model, calls: list[tuple[int, int]], *, parallel: Parallel | None = None, window: int = WINDOW,
    **options: object,
) -> Trace:  # fmt: skip
    scenario = Scenario(
        batch=B, dtype="bf16", parallel=parallel or Parallel(),
        calls=tuple(Call(position=p, tokens=m, logits=True) for p, m in calls),
    )  # fmt: skip
    trace = build_trace(model, settings(window=window, **options), scenario)
    verify(trace)
    return trace


def of_3b(position: int, tokens: int = 1024, **options: str) -> Trace:
    model = load_model("ttt-e2e-3b")
    chosen = set_options(METHODS["ttt_e2e"].settings(None, None, None), options)
    call = Call(position=position, tokens=tokens, logits=False)
    return build_trace(model, chosen, Scenario(batch=1, dtype="bf16", calls=(call,)))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    layers, suffix, d, heads, h, f, twin, millions = PUBLISHED[name]
    model = load_model(name)
    assert (model.n_layers, model.d_model, model.n_heads, model.n_kv_heads, model.head_dim) == (
        layers, d, heads, heads, h
    )  # fmt: skip
    assert (model.d_ff, model.vocab_size, model.tied_embeddings) == (twin, 128256, True)
    assert e2e_model(model).d_ff == forms.e2e_mlp_width(model) == f
    assert len(suffix_layers(model)) == forms.e2e_suffix(model) == suffix
    assert f"{forms.e2e_prime_parameters(model) / 1e6:.1f}" == millions


@pytest.mark.parametrize("name", [*PUBLISHED, "Qwen3-4B", "Llama-3.1-8B"])
def test_parameters_are_those_of_the_twin(name: str) -> None:
    model = load_model(name)
    with_prime = e2e_model(model).parameters + forms.e2e_prime_parameters(model)
    assert abs(with_prime / model.parameters - 1) < 0.015


def test_state_of_a_sequence() -> None:
    model = load_model("ttt-e2e-3b")
    plain = METHODS["ttt_e2e"].settings(None, None, None)
    fp32 = state_per_sequence(model, plain, 131072, "bf16")
    bf16 = state_per_sequence(model, set_options(plain, {"fast_dtype": "bf16"}), 131072, "bf16")
    assert (fp32.fast_weight_bytes, bf16.fast_weight_bytes, fp32.kv_bytes) == (1320 * ONE, 660 * ONE, 2560 * ONE)
    # The open mini-batch lacks one token; 327680 bytes of keys and values and an id of the others.
    assert fp32.carry_bytes == 1023 * (327680 + 4)
    assert forms.e2e_state_crossover(model, 8192) == 12416
    assert forms.e2e_state_crossover(model, 8192, fast_dtype="bf16") == 10304
    assert (fp32.kv_bytes + fp32.fast_weight_bytes) / 327680 == 12416


@pytest.mark.parametrize(("optimiser", "moments"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_a_trace_holds_the_state_and_the_weights(optimiser: str, moments: int) -> None:
    chosen = settings(optimiser=optimiser)
    trace = build_trace(DEEP, chosen, Scenario.decode((60,), batch=B))
    state = state_per_sequence(DEEP, chosen, 60, "bf16")
    kept = sum(t.nbytes for t in trace.tensors if t.role in (Role.FAST_WEIGHT, Role.KV, Role.CARRY, Role.OPTIMISER))
    assert kept == B * state.total_bytes
    assert state.optimiser_bytes == 4 * moments * forms.e2e_prime_parameters(DEEP)
    shape = e2e_model(DEEP)
    norms = 8 * (2 * 64 + 2 * 16) + 8 * 2 * 64 - 8 * 64 + 2 * 2 * 64 + 64  # before and after branches, queries and keys
    norms += 8 * 64
    table = 2 * (20 + 8) * 16
    weights = shape.parameters + forms.e2e_prime_parameters(DEEP) + norms + table
    assert persistent_bytes(trace) - kept == 2 * weights


# --- FLOPs and bytes of a mini-batch ----------------------------------------------------------------------------------


def parts(trace: Trace, first: int) -> forms.E2EFlops:
    """FLOPs of a trace by part; suffix layers begin at ``first``."""
    own, head = trace.layer >= first, trace.layer < 0
    prefix = ~own & ~head
    prime = np.zeros(trace.n_ops, dtype=np.bool_)
    for i in range(trace.n_ops):
        prime[i] = any("prime_" in name for name, _, _ in operands(trace, i, "read"))

    def flops(mask: Mask) -> int:
        return int(trace.flops[mask].sum())

    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "attention")
    back = own & (trace.phase == int(Phase.BACKWARD))
    in_grad = back & is_kind(trace, "input_grad")
    mlp = np.zeros(trace.n_ops, dtype=np.bool_)
    for i in np.flatnonzero(in_grad).tolist():
        mlp[i] = any(
            name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight"))
            for name, _, _ in operands(trace, i, "read")
        )
    return forms.E2EFlops(
        prefix=flops(prefix),
        suffix_attention=flops(own & is_kind(trace, *attention)),
        suffix_mlp=flops(own & is_kind(trace, "gate_proj", "up_proj", "down_proj", "fast_apply")),
        head=flops(head & is_kind(trace, "lm_head")),
        head_grad=flops(head & is_kind(trace, "input_grad")),
        static_grad=flops(in_grad & mlp & ~prime),
        prime_weight_grad=flops(back & is_kind(trace, "weight_grad")),
        prime_input_grad=flops(in_grad & mlp & prime),
        projections_grad=flops(in_grad & ~mlp),
        core_grad=flops(back & is_kind(trace, "attention_grad")),
    )


@pytest.mark.parametrize("model", [TOY, DEEP, replace(DEEP, n_kv_heads=4, tied_embeddings=False)])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("position", [0, 8, 16, 24, 80])
def test_flops_of_a_mini_batch(model: Model, dense: bool, position: int) -> None:
    trace = trace_of(model, [(position, SIZE)], dense_attention=dense)
    want = forms.e2e_flops(model, SIZE, position, WINDOW, dense=dense)
    assert parts(trace, model.n_layers - model.n_layers // 4) == tuple(B * part for part in want)
    assert int(trace.flops.sum()) == B * sum(want)


def test_published_flops_of_the_3b_model() -> None:
    model = load_model("ttt-e2e-3b")
    want = forms.e2e_flops(model, 1024, 65536, 8192, dense=True)
    trace = of_3b(65536)
    assert int(trace.flops.sum()) == sum(want)
    tera = [f"{part / 1e12:.2f}" for part in want]
    # prefix, suffix forward, head, head backward, static, prime weights, prime inputs, projections, core
    assert f"{(want.suffix_attention + want.suffix_mlp) / 1e12:.2f}" == "2.62"
    assert [tera[0], *tera[3:]] == ["5.48", "0.67", "0.67", "0.71", "0.71", "0.65", "0.38", "1.69"]
    assert f"{sum(want) / 1e12:.2f}" == "13.57"
    exact = of_3b(65536, dense_attention="false")
    assert f"{int(trace.flops.sum()) / 1024 / 1e9:.1f}" == "13.3"
    assert f"{int(exact.flops.sum()) / 1024 / 1e9:.2f}" == "12.99"


@pytest.mark.parametrize(("fast_dtype", "bytes_each"), [("fp32", 4), ("bf16", 2)])
def test_norm_and_step_move_every_gradient_and_weight(fast_dtype: str, bytes_each: int) -> None:
    trace = of_3b(65536, fast_dtype=fast_dtype)
    elements = 3 * 8 * 2560 * 5632
    norm, step = totals(trace, is_kind(trace, "delta_norm")), totals(trace, is_kind(trace, "weight_write"))
    assert (norm.read_bytes, norm.vector_ops) == (bytes_each * elements, 2 * elements)
    assert (step.read_bytes, step.write_bytes) == (2 * bytes_each * elements, bytes_each * elements)
    assert step.vector_ops == 2 * elements
    if fast_dtype == "fp32":
        assert f"{norm.read_bytes / 1e9:.2f}" == "1.38"
        assert f"{(step.read_bytes + step.write_bytes) / 1e9:.2f}" == "4.15"
    grads = totals(trace, is_kind(trace, "weight_grad"))
    assert grads.write_bytes == bytes_each * elements


@pytest.mark.parametrize("tile", ["none", "100", "1024"])
def test_a_tiled_loss_holds_fewer_logits(tile: str) -> None:
    trace = of_3b(65536, loss_tile_rows=tile)
    rows = 1024 if tile == "none" else int(tile)
    logits = next(t for t in trace.tensors if t.name == "logits")
    assert logits.nbytes == rows * 128256 * 4
    assert int(trace.flops.sum()) == int(of_3b(65536).flops.sum())
    if tile == "none":
        assert logits.nbytes == 501 * ONE


def test_prime_weights_are_read_per_sequence_and_cast() -> None:
    trace = trace_of(DEEP, [(80, SIZE)])
    f, d, layers = e2e_model(DEEP).d_ff, 64, 2
    applied = is_kind(trace, "fast_apply")
    assert totals(trace, applied).read_bytes == layers * (B * d * f * 4 + B * SIZE * f * 2)
    assert totals(trace, applied).vector_ops == layers * B * d * f  # a cast of each element
    same = trace_of(DEEP, [(80, SIZE)], fast_dtype="bf16")
    assert totals(same, is_kind(same, "fast_apply")).vector_ops == 0


# --- what gradients reach ---------------------------------------------------------------------------------------------


def test_gradients_stop_at_the_prime_mlp_of_the_first_suffix_layer() -> None:
    trace = trace_of(DEEP, [(80, SIZE)])
    back = trace.phase == int(Phase.BACKWARD)
    assert set(trace.layer[back].tolist()) == {-1, 6, 7}
    assert trace.layer[is_kind(trace, "attention_grad")].tolist() == [7]
    # Three of the static MLP; of the prime MLP all three above, down alone in the first; the projections above.
    per_layer = {layer: kinds(trace, back & (trace.layer == layer)).count("input_grad") for layer in (6, 7)}
    assert per_layer == {6: 3 + 1, 7: 3 + 3 + 4}
    trained = [
        name for i in np.flatnonzero(is_kind(trace, "weight_grad")) for name, _, _ in operands(trace, int(i), "write")
    ]
    wanted = [f"layers.{layer}.prime_{name}_proj_grad" for layer in (7, 6) for name in ("down", "gate", "up")]
    assert trained == wanted


def test_a_clip_holds_every_step_back_until_the_last_gradient() -> None:
    clipped, free = trace_of(DEEP, [(80, SIZE)]), trace_of(DEEP, [(80, SIZE)], clip=False)
    norms = np.flatnonzero(is_kind(clipped, "delta_norm"))
    steps = np.flatnonzero(is_kind(clipped, "weight_write"))
    assert norms.size == steps.size == 3 * 2
    for step in steps:
        assert ("grad_norm", norms.size, 0) in operands(clipped, int(step), "read")
    assert not is_kind(free, "delta_norm").any()
    assert is_kind(free, "weight_write").sum() == 6


def test_only_the_prefix_of_the_next_mini_batch_runs_beside_an_update() -> None:
    trace = trace_of(DEEP, [(80, SIZE), (88, SIZE)])
    last = int(np.flatnonzero(is_kind(trace, "weight_write"))[5])
    reads = operands(trace, int(np.flatnonzero(is_kind(trace, "fast_apply") & (trace.step == 1))[0]), "read")
    assert ("layers.6.prime_down_proj.weight", 1, B * 64 * e2e_model(DEEP).d_ff * 4) in reads
    assert trace.step[last] == 0
    before = trace.kind[(trace.step == 1) & (trace.layer >= 0) & (trace.layer < 6)]
    assert KIND["fast_apply"] not in before


# --- memory -----------------------------------------------------------------------------------------------------------


def test_activations_are_kept_for_the_backward_pass_unless_recomputed() -> None:
    def at_the_loss(recompute: bool) -> int:
        point = make_point(
            "h100", "ttt-e2e-3b", "ttt_e2e", phase="prefill", context=1024, options={"recompute": recompute}
        )
        result = simulate_point(point).result
        assert result is not None
        cycle, change = result.memory_events()
        kernel = result.lowered.kernels.of_op[np.flatnonzero(is_kind(result.trace, "loss"))[0]]
        now = int(result.kernel_span()[0][kernel])
        return int(change[cycle <= now, TRAFFIC_CLASSES.index("activations")].sum())

    rows, d, f, layers = 1024, 2560, 5632, 8
    model = load_model("ttt-e2e-3b")
    block = rows * 2 * (14 * d + 5 * f)
    assert forms.e2e_kept_activations(model, rows) == block
    # Of the first layer: the middle before the static MLP, what both MLPs add, normed rows of the prime MLP, keys and
    # values that the window takes in, gates, ups and the prime hidden rows. Inputs of layers stay in any case.
    first = rows * 2 * (6 * d + 5 * f)
    inputs = layers * rows * 2 * d
    assert at_the_loss(False) - at_the_loss(True) == (layers - 1) * block + first - inputs
    assert abs(block / 122e6 - 1) < 0.08  # as published, which counts other copies
    assert abs(((layers - 1) * block + first) / 0.97e9 - 1) < 0.04
    assert f"{(inputs + rows * 2 * d) / 1e6:.0f}" == "47"  # and the output of the last


@pytest.mark.parametrize("position", [0, 80])
def test_recomputation_runs_the_suffix_again(position: int) -> None:
    plain = trace_of(DEEP, [(position, SIZE)])
    again = trace_of(DEEP, [(position, SIZE)], recompute=True)
    want = forms.e2e_flops(DEEP, SIZE, position, WINDOW, dense=True)
    assert int(again.flops.sum() - plain.flops.sum()) == B * (want.suffix_attention + want.suffix_mlp)
    assert is_kind(again, "fast_init").sum() == (6 if position == 0 else 0)


# --- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[40], [8] * 5, [1] * 40, [3, 30, 7], [7, 1, 16, 1, 15], [39, 1]])
def test_any_split_completes_the_same_mini_batches(lengths: list[int]) -> None:
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    trace = trace_of(DEEP, list(zip(starts, lengths, strict=True)))
    assert is_kind(trace, "loss").sum() == 40 // SIZE
    assert is_kind(trace, "weight_write").sum() == 6 * (40 // SIZE)
    assert is_kind(trace, "fast_init").sum() == 6


def test_calls_are_cut_at_the_ends_of_mini_batches() -> None:
    calls = cut([Call(position=5, tokens=20, logits=True), Call(position=25, tokens=2, logits=False)], 8)
    assert [(c.position, c.tokens, c.logits) for c in calls] == [
        (5, 3, False), (8, 8, False), (16, 8, False), (24, 1, True), (25, 2, False)
    ]  # fmt: skip


@pytest.mark.parametrize("first", [79, 87])
def test_the_step_that_ends_a_mini_batch_costs_a_whole_one(first: int) -> None:
    step, whole = trace_of(DEEP, [(first, 1)]), trace_of(DEEP, [(first // SIZE * SIZE, SIZE)])
    for column in ("flops", "vector_ops", "kind", "m", "n", "pairs"):
        assert getattr(step, column).tolist() == getattr(whole, column).tolist()
    assert step.read_bytes.tolist() == whole.read_bytes.tolist()
    forward = (step.layer >= 0) & is_kind(step, "q_proj")
    assert set(step.phase[forward].tolist()) == {int(Phase.RECOMPUTE)}
    assert set(step.position.tolist()) == {first // SIZE * SIZE}


@pytest.mark.parametrize("position", [1, 7 - 1, 12, 18, 30, 86])
def test_decode_attends_to_the_window(position: int) -> None:
    trace = trace_of(DEEP, [(position, 1)])
    for i in np.flatnonzero(is_kind(trace, "attention")):
        seen = min(position + 1, WINDOW)
        assert int(trace.n[i]) == seen
        assert int(trace.pairs[i]) == seen
        row = 2 * 2 * 16 * 2
        kept = sum(n for name, _, n in operands(trace, int(i), "read") if name.endswith("kv"))
        assert kept == B * row * (seen - 1)
        assert int(trace.vector_ops[i]) == B * (5 * 4 * seen + 3 * 2 * 16 * (seen - 1))


def test_calls_of_a_trace_are_those_calls() -> None:
    pieces = [(0, 8), (8, 8), (16, 3), (19, 1), (20, 4), (24, 8), (32, 1), (39, 1), (64, 8), (90, 2)]
    calls = [Call(position=p, tokens=m, logits=True) for p, m in pieces]
    chosen = settings()
    whole = build_trace(TOY, chosen, Scenario(batch=2, dtype="bf16", calls=tuple(calls)))
    verify(whole)
    assert_calls_equal_themselves_alone(whole, chosen, calls)


# --- chips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 4])
def test_chips_of_a_group_share_a_mini_batch(tp: int) -> None:
    model = replace(DEEP, n_kv_heads=4, d_ff=640)
    whole, part = trace_of(model, [(80, SIZE)]), trace_of(model, [(80, SIZE)], parallel=Parallel(tp=tp))
    assert tp * int(part.flops.sum()) == int(whole.flops.sum())


def test_chips_that_cannot_share_the_narrower_mlp_pad_it() -> None:
    model = replace(DEEP, d_ff=1024 * 3, n_heads=12, n_kv_heads=12)
    trace = trace_of(model, [(80, SIZE)], parallel=Parallel(tp=3))
    assert set(trace.n[is_kind(trace, "gate_proj")].tolist()) == {854}  # 2560 columns


def test_a_step_on_stages_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="without stages"):
        trace_of(DEEP, [(80, SIZE)], parallel=Parallel(pp=2))


def test_decode_reports_the_step_with_an_update() -> None:
    point = make_point("h100", "ttt-e2e-125m", "ttt_e2e", phase="decode", context="128k")
    outcome = simulate_point(point)
    record, result = outcome.record, outcome.result
    assert result is not None
    assert record["chunk_tokens"] == 1024
    one = make_point("h100", "ttt-e2e-125m", "ttt_e2e", phase="prefill", context=1024)
    prefill = float(str(simulate_point(one).record["seconds"]))
    ordinary, boundary = float(str(record["ordinary_step_seconds"])), float(str(record["boundary_step_seconds"]))
    assert boundary > prefill  # of the first mini-batch, which sees no window yet
    mean = float(str(record["seconds"]))
    assert mean == pytest.approx((boundary + 1023 * ordinary) / 1024, rel=1e-6)
    assert float(str(record["updates_per_s"])) * mean * 1024 == pytest.approx(1)


@pytest.mark.parametrize(("context", "batch"), [(4096, 1), (4096, 3)])
def test_an_update_is_of_all_layers_of_a_sequence(context: int, batch: int) -> None:
    point = make_point("h100", "ttt-e2e-125m", "ttt_e2e", phase="prefill", context=context, batch=batch)
    outcome = simulate_point(point)
    record, result = outcome.record, outcome.result
    assert result is not None
    seconds = float(str(record["seconds"]))
    assert float(str(record["updates_per_s"])) * seconds == pytest.approx(batch * context / 1024)
    # No update takes longer than its mini-batch, and none less than reading gradients and weights and writing these.
    assert float(str(record["update_seconds"])) < seconds * 1024 / context
    elements = 3 * 3 * 768 * 1664
    assert float(str(record["update_write_bytes"])) >= 4 * elements
    again = make_point(
        "h100", "ttt-e2e-125m", "ttt_e2e", phase="prefill", context=context, batch=batch,
        options={"optimiser": "adam"},
    )  # fmt: skip
    adam = simulate_point(again).record
    more = float(str(adam["update_write_bytes"])) - float(str(record["update_write_bytes"]))
    assert more == pytest.approx(2 * 4 * elements, rel=0.05)


@pytest.mark.parametrize("chip", ["tiny_gpu", "tiny_turnaround", "h100"])
@pytest.mark.parametrize("context", [64, 20, 94, 150])
@pytest.mark.parametrize("batch", [1, 2])
def test_sampled_decode_is_the_mean_of_all_steps(chip: str, context: int, batch: int) -> None:
    """A span that begins with a mini-batch (64), one in which the window fills, ends of mini-batches early and late."""
    point = make_point(
        chip, "toy", "ttt_e2e", phase="decode", context=context, batch=batch, window=48, options={"mini_batch": 32}
    )
    steps = Scenario.decode(range(context - 1, context + 33), batch=batch)
    result = simulate_trace(point.chip, build_trace(point.model, point.method, steps))
    every = float(np.diff(result.step_finish_cycles())[:-1].mean())
    sampled = float(str(simulate_point(point).record["seconds"]))
    assert sampled * point.chip.clock_hz == pytest.approx(every, rel=3e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_decode_steps_are_those_of_all_steps(batch: int) -> None:
    chosen = settings(window=48, mini_batch=32)
    trace = build_trace(TOY, chosen, Scenario.decode(range(150, 182), batch=batch))
    verify(trace)
    assert is_kind(trace, "loss").sum() == 1
    assert int(trace.step[is_kind(trace, "loss")][0]) == 159 - 150


def test_chips_with_local_rules_cannot_learn_backwards() -> None:
    point = make_point("loihi2", "toy", "ttt_e2e", phase="prefill", context=64, chips=1, options={"mini_batch": 32})
    assert "came back through other layers" in str(simulate_point(point).record["missing"])


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "options", "message"),
    [
        (4, {}, "a window of 4 tokens does not hold a mini-batch of 8"),
        (20, {"mini_batch": "0"}, "mini_batch is 0, expected at least 1"),
        (20, {"loss_tile_rows": "0"}, "loss_tile_rows is 0, expected at least 1"),
        (20, {"fast_dtype": "fp33"}, "fast_dtype is 'fp33'"),
        (20, {"optimiser": "lion"}, "'lion' is not one of sgd, momentum, adam"),
    ],
)
def test_wrong_options_are_refused(window: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_trace(TOY, settings(window=window, **options), Scenario.prefill(8))


def test_a_short_window_has_short_mini_batches() -> None:
    for window, size in ((None, 1024), (2048, 1024), (64, 64)):
        options = METHODS["ttt_e2e"].settings(window, None, None).options
        assert isinstance(options, E2EOptions)
        assert options.mini_batch == size


def test_a_model_of_few_layers_has_no_suffix() -> None:
    with pytest.raises(ConfigError, match="has 3 layers, expected at least 4"):
        trace_of(replace(TOY, n_layers=3), [(0, 8)])
