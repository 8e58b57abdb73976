"""The backward pass and steps of optimisers, against closed forms and hand counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.trace_tools import TOY, is_kind, kinds, operands, totals
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.grid import make_point
from ttt_sim.model import Model, Parallel, Scenario
from ttt_sim.ops import TEMPORARY_ROLES, TRAFFIC_CLASSES, Phase, Role, Trace
from ttt_sim.simulation import simulate_point
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

B, T = 2, 40
UNTIED = replace(TOY, tied_embeddings=False, qk_norm=False)


def train(model: Model = TOY, parallel: Parallel | None = None, **options: str) -> Trace:
    settings = set_options(METHODS["fine_tuning"].settings(None, None, None), options)
    scenario = Scenario.train(T, batch=B, parallel=parallel or Parallel())
    trace = build_trace(model, settings, scenario)
    verify(trace)
    return trace


@pytest.mark.parametrize("model", [TOY, UNTIED])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("tile", ["none", "1", "7", "80"])
def test_flops_of_a_step(model: Model, recompute: bool, tile: str) -> None:
    trace = train(model, recompute=str(recompute).lower(), loss_tile_rows=tile)
    assert int(trace.flops.sum()) == B * forms.training_flops(model, T, recompute=recompute)


def test_every_weight_has_a_gradient_of_its_size_and_one_step() -> None:
    trace = train(UNTIED)
    d, f, q, kv, layers = 64, 192, 64, 32, 4
    elements = layers * (2 * d * q + 2 * d * kv + 3 * d * f) + 2 * 256 * d
    grads = totals(trace, is_kind(trace, "weight_grad"))
    table = 256 * d * 2  # the embedding gets its gradient by adding rows
    assert grads.write_bytes == elements * 2 - table
    step = totals(trace, is_kind(trace, "adam_write"))
    # gradient 2, master 4, two moments 8 are read; master, moments and the weight itself are written
    assert (step.read_bytes, step.write_bytes) == (14 * elements, 14 * elements)
    assert step.vector_ops == 12 * elements
    kept = sum(t.nbytes for t in trace.tensors if t.role == Role.OPTIMISER)
    trained = sum(t.nbytes for t in trace.tensors if t.role == Role.FAST_WEIGHT)
    assert trained == 2 * elements
    assert kept + trained == forms.adam_state_bytes(elements)


@pytest.mark.parametrize(("optimiser", "read", "lanes"), [("sgd", 2 + 2, 2), ("momentum", 2 + 4 + 2, 4)])
def test_steps_without_a_master_copy(optimiser: str, read: int, lanes: int) -> None:
    trace = train(optimiser=optimiser, master="false")
    elements = TOY.parameters
    kind = "weight_write" if optimiser == "sgd" else "momentum_write"
    step = totals(trace, is_kind(trace, kind))
    assert step.read_bytes == read * elements
    assert step.write_bytes == (2 if optimiser == "sgd" else 6) * elements
    assert step.vector_ops == lanes * elements


def test_a_clip_holds_every_step_back_until_the_last_gradient() -> None:
    clipped, free = train(), train(clip="false")
    steps = np.flatnonzero(is_kind(clipped, "adam_write"))
    norms = np.flatnonzero(is_kind(clipped, "delta_norm"))
    assert norms.size == steps.size == 7 * 4 + 1
    newest = [clipped.read_version[clipped.read_ptr[i] : clipped.read_ptr[i + 1]].max() for i in steps]
    assert set(newest) == {norms.size}  # all read the norm that the last gradient completed
    assert not is_kind(free, "delta_norm").any()


def test_activations_are_kept_for_the_backward_pass_unless_recomputed() -> None:
    def at_the_loss(recompute: bool) -> int:
        point = make_point(
            "h100", "Qwen3-1.7B", "fine_tuning", phase="train", context=2048, options={"recompute": recompute}
        )
        result = simulate_point(point).result
        assert result is not None
        cycle, change = result.memory_events()
        kernel = result.lowered.kernels.of_op[np.flatnonzero(is_kind(result.trace, "loss"))[0]]
        now = int(result.kernel_span()[0][kernel])
        return int(change[cycle <= now, TRAFFIC_CLASSES.index("activations")].sum())

    rows, d, f, q, kv, layers = 2048, 2048, 6144, 2048, 1024, 28
    # By hand, of a layer: its input and middle, normed rows 2 d, queries and keys before their norm and rotated,
    # values, output of the core, gate, up and hidden. Of these the input stays in both.
    beside_input = 2 * rows * (3 * d + 2 * (q + kv) + kv + q + 3 * f)
    assert at_the_loss(False) - at_the_loss(True) == layers * beside_input


def test_the_backward_pass_goes_through_the_layers_once_and_back() -> None:
    trace = train()
    order = [(kind, int(layer)) for kind, layer in zip(kinds(trace), trace.layer, strict=True)]
    cores = [layer for kind, layer in order if kind == "attention_grad"]
    assert cores == [3, 2, 1, 0]
    again = trace.layer[(trace.phase == int(Phase.RECOMPUTE)) & is_kind(trace, "attention")]
    assert again.tolist() == [3, 2, 1, 0]


def test_chips_of_a_group_share_a_step() -> None:
    whole, half = train(UNTIED), train(UNTIED, parallel=Parallel(tp=2))
    assert 2 * int(half.flops.sum()) == int(whole.flops.sum())
    sums = is_kind(half, "allreduce") & (half.phase == int(Phase.BACKWARD))
    # of the inputs of attention (but of the first layer, where nothing below but the embedding needs it) and MLP, and
    # of the head
    assert int((half.m[sums] == B * T * 64).sum()) == 2 * 4 + 1


def test_a_step_on_stages_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="without stages"):
        train(parallel=Parallel(pp=2))


def test_nothing_of_a_cache_is_held_while_training() -> None:
    assert not any(tensor.role in (Role.KV, Role.CARRY) for tensor in train().tensors)
    assert {tensor.role for tensor in train().tensors} >= set(TEMPORARY_ROLES)


def test_the_trained_model_answers_without_its_context() -> None:
    tuned = make_point("h100", "Qwen3-4B", "fine_tuning", phase="ask", context=32768, question=100)
    plain = make_point("h100", "Qwen3-4B", "kv", phase="prefill", context=100)
    assert simulate_point(tuned).record["cycles"] == simulate_point(plain).record["cycles"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "unknown option 'optimizer' of method fine_tuning, did you mean optimiser"),
        ({"optimiser": "adamw"}, "'adamw' is not one of sgd, momentum, adam, did you mean adam"),
        ({"recompute": "yes"}, "must be true or false"),
        ({"epochs": "many"}, "must be a whole number"),
        ({"epochs": "0"}, "epochs is 0, expected at least 1"),
        ({"loss_tile_rows": "0"}, "loss_tile_rows is 0, expected at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_options(METHODS["fine_tuning"].settings(None, None, None), options)


def test_chips_with_local_rules_cannot_learn_backwards() -> None:
    record = simulate_point(make_point("loihi2", "toy", "fine_tuning", phase="train", context=64, chips=1)).record
    assert "came back through other layers" in str(record["missing"])


def peak_bytes(**options: object) -> int:
    point = make_point("h100", "Qwen3-1.7B", "lora", phase="train", context=2048, options=options)
    result = simulate_point(point).result
    assert result is not None
    return result.peak_temporary_bytes()


def test_layers_run_again_one_at_a_time() -> None:
    point = make_point("h100", "Qwen3-1.7B", "lora", phase="train", context=2048)
    result = simulate_point(point).result
    assert result is not None
    start, finish = result.kernel_span()
    kernel, trace = result.lowered.kernels.of_op, result.trace
    again = np.flatnonzero((trace.phase == int(Phase.RECOMPUTE)) & is_kind(trace, "attn_norm"))
    done = np.flatnonzero(is_kind(trace, "norm_grad") & (trace.layer >= 0))
    for op in again[1:]:
        above = done[trace.layer[done] == trace.layer[op] + 1].max()
        assert start[kernel[op]] >= finish[kernel[above]]
    # Rows of one layer instead of 28, and the inputs of all.
    rows, d, f, q, kv, layers = 2048, 2048, 6144, 2048, 1024, 28
    beside_input = 2 * rows * (3 * d + 2 * (q + kv) + kv + q + 3 * f)
    assert peak_bytes(recompute=False) - peak_bytes(recompute=True) > (layers - 3) * beside_input


def test_tiles_of_logits_exist_one_at_a_time() -> None:
    whole, tiled = (peak_bytes(recompute=True, loss_tile_rows=rows) for rows in (None, 256))
    # Of 2048 rows of fp32 logits with their 16-bit gradients, 256 stay; the peak is then elsewhere.
    assert whole - tiled > (2048 - 2 * 256) * 151936 * 6 // 2
    trace = train(UNTIED, loss_tile_rows="16")
    heads = np.flatnonzero(is_kind(trace, "lm_head"))
    waits = [[name for name, _, size in operands(trace, int(op), "read") if not size] for op in heads]
    assert waits == [[], *[["final_normed_grad"]] * (len(heads) - 1)]
