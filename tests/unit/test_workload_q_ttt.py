"""Query-only training on a frozen cache, against closed forms and hand counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.trace_tools import TOY, is_kind, operands, totals
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.grid import make_point
from ttt_sim.model import Call, Model, Parallel, Scenario
from ttt_sim.ops import Role, Trace
from ttt_sim.simulation import simulate_point
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, state_per_sequence
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

B, T, SPAN, LAYERS = 2, 100, 24, 4
UNTIED = replace(TOY, tied_embeddings=False, qk_norm=False)
METHOD = METHODS["q_ttt"]


def trace_of(scenario: Scenario, model: Model = TOY, **options: str) -> Trace:
    settings = set_options(METHOD.settings(None, None, None), options)
    trace = build_trace(model, settings, scenario)
    verify(trace)
    return trace


def step(model: Model = TOY, tokens: int = T, parallel: Parallel | None = None, **options: str) -> Trace:
    settings = set_options(METHOD.settings(None, None, None), {"span_tokens": str(SPAN), **options})
    call = METHOD.step_call(settings, tokens)
    assert call == Call(position=tokens, tokens=SPAN, logits=False)
    scenario = Scenario(batch=B, dtype="bf16", calls=(call,), parallel=parallel or Parallel(), task="train")
    return trace_of(scenario, model, span_tokens=str(SPAN), **options)


@pytest.mark.parametrize("model", [TOY, UNTIED])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("form", ["lora", "full"])
def test_flops_of_a_step(model: Model, recompute: bool, form: str) -> None:
    trace = step(model, recompute=str(recompute).lower(), form=form, rank="5")
    rank = 5 if form == "lora" else None
    assert int(trace.flops.sum()) == B * forms.query_step_flops(model, T, SPAN, rank=rank, recompute=recompute)


def test_the_cache_is_read_forward_and_backward_and_never_written() -> None:
    trace = step()
    cache = {i for i, tensor in enumerate(trace.tensors) if tensor.role == Role.KV}
    kappa = forms.kv_bytes_per_token(TOY)
    assert sum(trace.tensors[i].nbytes for i in cache) == B * T * kappa
    read = np.isin(trace.read_tensor, list(cache))
    assert int(trace.read_bytes[read].sum()) == 2 * B * T * kappa
    assert not np.isin(trace.write_tensor, list(cache)).any()
    cores = np.flatnonzero(is_kind(trace, "attention", "attention_grad"))
    assert set(trace.n[cores].tolist()) == {T + SPAN}
    assert set(trace.pairs[cores].tolist()) == {SPAN * T + SPAN * (SPAN + 1) // 2}
    for op in np.flatnonzero(is_kind(trace, "attention_grad")):  # only rows of the span have gradients
        assert [size for _, _, size in operands(trace, int(op), "write")] == [B * SPAN * w * 2 for w in (64, 32, 32)]


@pytest.mark.parametrize(("form", "parameters"), [("lora", 16 * (64 + 64)), ("full", 64 * 64)])
def test_only_queries_learn_and_every_sequence_its_own(form: str, parameters: int) -> None:
    trace = step(form=form)
    learning = totals(trace, is_kind(trace, "adam_write"))
    assert learning.vector_ops == 12 * B * LAYERS * parameters
    fast = [tensor for tensor in trace.tensors if tensor.role == Role.FAST_WEIGHT]
    assert {tensor.name.split(".")[2][:6] for tensor in fast} == {"q_proj"}
    assert sum(tensor.nbytes for tensor in fast) == 2 * B * LAYERS * parameters
    settings = set_options(METHOD.settings(None, None, None), {"form": form})
    state = state_per_sequence(TOY, settings, T, "bf16")
    assert state.fast_weight_bytes == 2 * LAYERS * parameters
    assert state.kv_bytes == T * forms.kv_bytes_per_token(TOY)


def test_a_prompt_is_read_by_the_model_as_it_is_and_a_question_by_its_queries() -> None:
    prompt = Scenario.prefill(T, batch=B)
    plain = build_trace(TOY, METHODS["kv"].settings(None, None, None), prompt)
    assert totals(trace_of(prompt), np.ones(plain.n_ops, dtype=np.bool_)) == totals(
        plain, np.ones(plain.n_ops, dtype=np.bool_)
    )
    question = Scenario(batch=B, dtype="bf16", calls=(Call(position=T, tokens=7, logits=True),))
    plain = build_trace(TOY, METHODS["kv"].settings(None, None, None), question)
    everything = np.ones(plain.n_ops, dtype=np.bool_)
    lora, full = trace_of(question), trace_of(question, form="full")
    assert totals(lora, ~is_kind(lora, "adapter_down", "adapter_up")) == totals(plain, everything)
    assert int(is_kind(lora, "adapter_down").sum()) == LAYERS
    own = is_kind(full, "own_proj")
    assert int(own.sum()) == LAYERS
    assert not is_kind(full, "q_proj").any()
    assert (full.batch[own].tolist(), full.m[own].tolist()) == ([B] * LAYERS, [7] * LAYERS)
    assert int(full.flops.sum()) == int(plain.flops.sum())
    # copies of the query projection instead of one
    extra = totals(full, np.ones(full.n_ops, dtype=np.bool_)).read_bytes - totals(plain, everything).read_bytes
    assert extra == (B - 1) * LAYERS * 64 * 64 * 2


def test_steps_do_not_depend_on_the_context_but_their_time_does() -> None:
    settings = METHOD.settings(None, None, None)
    assert METHOD.steps(settings, 1000) == METHOD.steps(settings, 100_000) == 32
    assert METHOD.held_tokens(settings, 1000) == 1000

    def seconds(context: str) -> float:
        point = make_point("h100", "Qwen3-1.7B", "q_ttt", phase="train", context=context)
        return float(str(simulate_point(point).record["seconds"]))

    assert seconds("4k") < seconds("32k") < 8 * seconds("4k")


def test_a_quantised_cache_is_scaled_back_in_both_directions() -> None:
    def lanes(kv_dtype: str) -> list[int]:
        settings = METHOD.settings(None, kv_dtype, None)
        call = METHOD.step_call(settings, T)
        trace = build_trace(TOY, settings, Scenario(batch=B, dtype="bf16", calls=(call,), task="train"))
        return [int(trace.vector_ops[op]) for op in np.flatnonzero(is_kind(trace, "attention", "attention_grad"))]

    # a product and a sum for each of T keys and values, of two heads of 16
    more = [stored - plain for stored, plain in zip(lanes("int8"), lanes("bf16"), strict=True)]
    assert more == [2 * 2 * B * T * 2 * 16] * (2 * LAYERS)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="without stages"):
        step(parallel=Parallel(pp=2))
    with pytest.raises(ConfigError, match="span_tokens is 0, expected at least 1"):
        trace_of(Scenario.prefill(T), span_tokens="0")
    with pytest.raises(ConfigError, match="unknown option 'epochs' of method q_ttt"):
        trace_of(Scenario.prefill(T), epochs="2")
