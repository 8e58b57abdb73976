"""Ops F0 to F16 and the KV cache against the operation list, written out here a second time."""

from __future__ import annotations

import pytest

from tests.unit.trace_tools import (
    TOY,
    Totals,
    assert_calls_equal_themselves_alone,
    is_kind,
    kinds,
    kv_trace,
    one_call,
    operands,
    scalars,
    totals,
)
from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.model import Call, KVSettings, MethodSettings, Model, Scenario
from ttt_sim.model_config import load_model
from ttt_sim.ops import Role
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, closed_forms, find_method, state_per_sequence

LAYER_ORDER = [
    "attn_norm", "q_proj", "k_proj", "v_proj", "qk_norm", "rope", "kv_append", "attention", "o_proj", "attn_residual",
    "mlp_norm", "gate_proj", "up_proj", "silu_mul", "down_proj", "mlp_residual",
]  # fmt: skip


def operation_list(model: Model, batch: int, p: int, m: int, e: int) -> dict[str, Totals]:
    """FLOPs, lane operations, bytes read and written of one layer: weights once, the rest for each sequence."""
    d, f, h = model.d_model, model.d_ff, model.head_dim
    q, kv, heads = model.n_heads * h, model.n_kv_heads * h, model.n_heads + model.n_kv_heads
    b, pairs = batch, m * p + m * (m + 1) // 2
    return {
        "attn_norm": Totals(0, b * (4 * m * d + m), b * m * d * e + d * e, b * m * d * e),
        "q_proj": Totals(2 * b * m * d * q, 0, b * m * d * e + d * q * e, b * m * q * e),
        "k_proj": Totals(2 * b * m * d * kv, 0, b * m * d * e + d * kv * e, b * m * kv * e),
        "v_proj": Totals(2 * b * m * d * kv, 0, b * m * d * e + d * kv * e, b * m * kv * e),
        "qk_norm": Totals(0, b * (4 * m * heads * h + m * heads), b * m * heads * h * e, b * m * heads * h * e),
        # cosines and sines: 2 m h once, since the sequences are at the same positions
        "rope": Totals(0, b * 3 * m * heads * h, b * m * heads * h * e + 2 * m * h * e, b * m * heads * h * e),
        "kv_append": Totals(0, 0, b * 2 * m * kv * e, b * 2 * m * kv * e),
        "attention": Totals(
            4 * b * q * pairs, 5 * b * model.n_heads * pairs, b * (m * q * e + 2 * (p + m) * kv * e), b * m * q * e
        ),
        "o_proj": Totals(2 * b * m * q * d, 0, b * m * q * e + q * d * e, b * m * d * e),
        "attn_residual": Totals(0, b * m * d, 2 * b * m * d * e, b * m * d * e),
        "mlp_norm": Totals(0, b * (4 * m * d + m), b * m * d * e + d * e, b * m * d * e),
        "gate_proj": Totals(2 * b * m * d * f, 0, b * m * d * e + d * f * e, b * m * f * e),
        "up_proj": Totals(2 * b * m * d * f, 0, b * m * d * e + d * f * e, b * m * f * e),
        "silu_mul": Totals(0, 5 * b * m * f, 2 * b * m * f * e, b * m * f * e),
        "down_proj": Totals(2 * b * m * d * f, 0, b * m * f * e + d * f * e, b * m * d * e),
        "mlp_residual": Totals(0, b * m * d, 2 * b * m * d * e, b * m * d * e),
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("position", "tokens"), [(0, 150), (37, 1), (100, 13)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["toy", "Qwen3-4B", "Llama-3.1-8B"])
def test_every_op_of_a_layer(name, batch, position, tokens, dtype):
    model = load_model(name)
    e = {"bf16": 2, "fp32": 4}[dtype]
    kv = KVSettings(dtype=dtype)
    trace = build_trace(model, MethodSettings(name="kv", kv=kv), one_call(position, tokens, batch=batch, dtype=dtype))
    expected = operation_list(model, batch, position, tokens, e)
    if not model.qk_norm:
        del expected["qk_norm"]
    assert kinds(trace, trace.layer == 0) == list(expected)
    for layer in (0, model.n_layers - 1):
        for kind, values in expected.items():
            assert totals(trace, is_kind(trace, kind) & (trace.layer == layer)) == values, kind


def test_transcendentals_are_tagged():
    trace = kv_trace(TOY, one_call(0, 10, batch=2))
    one_layer = trace.layer == 0
    for kind, exp, rsqrt, div in (
        ("attn_norm", 0, 2 * 10, 0),
        ("qk_norm", 0, 2 * 10 * (4 + 2), 0),
        ("attention", 2 * 4 * 55, 0, 0),  # 55 = 10 * 11 / 2 pairs per head and sequence
        ("silu_mul", 2 * 10 * 192, 0, 2 * 10 * 192),
        ("rope", 0, 0, 0),
    ):
        mask = is_kind(trace, kind) & one_layer
        found = tuple(int(column[mask].sum()) for column in (trace.exp_ops, trace.rsqrt_ops, trace.div_ops))
        assert found == (exp, rsqrt, div), kind


def test_embedding_and_head():
    model = load_model("Qwen3-8B")  # embeddings not tied
    trace = kv_trace(model, one_call(0, 100, batch=3, logits=True))
    d, vocabulary = 4096, 151936
    assert kinds(trace, trace.layer < 0) == ["embedding", "final_norm", "lm_head"]
    assert totals(trace, is_kind(trace, "embedding")) == (0, 0, 300 * d * 2, 300 * d * 2)
    # the last row of each sequence
    assert totals(trace, is_kind(trace, "final_norm")) == (0, 3 * (4 * d + 1), 3 * d * 2 + d * 2, 3 * d * 2)
    assert totals(trace, is_kind(trace, "lm_head")) == (
        2 * 3 * d * vocabulary, 0, (3 * d + d * vocabulary) * 2, 3 * vocabulary * 2,
    )  # fmt: skip


def test_no_logits_no_head():
    trace = kv_trace(TOY, one_call(0, 8))
    assert not is_kind(trace, "final_norm", "lm_head").any()


def test_tied_head_reads_the_embedding():
    for name, expected in (("Qwen3-4B", "embedding.weight"), ("Qwen3-8B", "lm_head.weight")):
        trace = kv_trace(load_model(name), one_call(0, 1, logits=True))
        assert expected in [tensor for tensor, _, _ in operands(trace, trace.n_ops - 1, "read")]


@pytest.mark.parametrize("name", ["toy", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Llama-3.1-8B"])
def test_weights_hold_all_parameters(name):
    model = load_model(name)
    trace = kv_trace(model, one_call(0, 16))
    weights = sum(t.nbytes for t in trace.tensors if t.role == Role.WEIGHT and t.name != "rope_table")
    norms = model.n_layers * (2 * model.d_model + (2 * model.head_dim if model.qk_norm else 0)) + model.d_model
    assert weights == 2 * (model.parameters + norms)


def test_toy_prefill_by_hand():
    """T = 160 in one call, bf16.

    Per layer: q 2*160*64*64 = 1310720; k, v 2 * 2*160*64*32 = 1310720; o = q; MLP 3 * 2*160*64*192 = 11796480:
    together 15728640. Attention 4 * 64 * (160*161/2 = 12880) = 3297280. Four layers: 76103680. Head 2*64*256 = 32768.
    """
    trace = kv_trace(TOY, Scenario.prefill(160))
    assert int(trace.flops.sum()) == 4 * (15728640 + 3297280) + 32768 == 76136448


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("pieces", [(160,), (1, 159), (100, 13, 47), tuple([1] * 160)])
def test_flops_do_not_depend_on_the_split(pieces, window):
    calls, position = [], 0
    for tokens in pieces:
        calls.append(Call(position=position, tokens=tokens, logits=False))
        position += tokens
    trace = kv_trace(TOY, Scenario(batch=2, dtype="bf16", calls=tuple(calls)), window=window)
    expected = 160 * closed_forms.linear_flops_per_token(TOY)
    expected += closed_forms.attention_flops(TOY, 160, window_tokens=window)
    assert int(trace.flops.sum()) == 2 * expected


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "tokens", "stored", "fresh"),
    [
        (0, 30, 0, 30),  # nothing before
        (20, 30, 20, 30),  # all before it still kept
        (100, 30, 47, 30),  # the first new row sees w - 1 = 47 older rows
    ],
)
def test_windowed_attention_reads_the_ring_and_its_own_rows(position, tokens, stored, fresh):
    trace = kv_trace(TOY, one_call(position, tokens, batch=2), window=48)
    op = kinds(trace).index("attention")
    row = 2 * 2 * 16 * 2  # batch * G * h * 2 bytes
    found = operands(trace, op, "read")
    expected = [("layers.0.q_rotated", 0, tokens * 2 * 4 * 16 * 2)]
    if stored:
        expected.append(("layers.0.kv", 0, 2 * stored * row))
    expected += [("layers.0.k_rotated", 0, fresh * row), ("layers.0.v", 0, fresh * row)]
    assert found == expected
    assert scalars(trace, op)["n"] == min(position + tokens, 48 - 1 + tokens) == stored + fresh


@pytest.mark.parametrize(("position", "rows"), [(20, 21), (47, 48), (100, 48)])
def test_a_single_new_row_is_stored_before_it_is_read(position, rows):
    """Its slot is that of the token which leaves the window with it, so the core reads the ring alone."""
    trace = kv_trace(TOY, one_call(position, 1, batch=2), window=48)
    names = kinds(trace)
    op = names.index("attention")
    assert names.index("kv_append") < op
    queries = ("layers.0.q_rotated", 0, 2 * 4 * 16 * 2)  # batch * H * h * 2 bytes
    stored = ("layers.0.kv", 1, 2 * rows * 2 * 2 * 16 * 2)  # batch * rows * keys and values * G * h * 2 bytes
    assert operands(trace, op, "read") == [queries, stored]
    assert scalars(trace, op)["n"] == rows


def test_window_keeps_no_more_than_its_rows():
    trace = kv_trace(TOY, one_call(0, 100, batch=2), window=48)
    ring = next(t for t in trace.tensors if t.name == "layers.0.kv")
    assert ring.nbytes == 2 * 48 * 2 * 2 * 16 * 2
    assert ring.in_place
    append = totals(trace, is_kind(trace, "kv_append") & (trace.layer == 0))
    assert append.write_bytes == append.read_bytes == ring.nbytes  # of 100 rows the last 48 survive


def test_full_cache_grows_in_place():
    trace = kv_trace(TOY, Scenario.prefill(96, call_tokens=32))
    cache = next(t for t in trace.tensors if t.name == "layers.0.kv")
    assert not cache.in_place
    assert cache.nbytes == 96 * 2 * 2 * 16 * 2
    for step in range(3):
        op = int(((trace.step == step) & is_kind(trace, "attention") & (trace.layer == 0)).argmax())
        assert operands(trace, op, "read")[1] == ("layers.0.kv", step + 1, (step + 1) * 32 * 2 * 2 * 16 * 2)


@pytest.mark.parametrize(
    ("kv", "token_bytes"),
    [
        # toy: G h = 32 elements of key and of value per token and layer
        (KVSettings(dtype="fp8"), 2 * 32),
        (KVSettings(dtype="int8"), 2 * 32),
        (KVSettings(dtype="fp8", per_token_scale=True), 2 * (32 + 2 * 2)),  # a 16-bit scale per head
        (KVSettings(dtype="int4", group=32), 2 * (16 + 4)),  # e_kv = 0.5 + 4/32
        (KVSettings(dtype="int4", group=16), 2 * (16 + 8)),
        (KVSettings(dtype="int4", group=128), 2 * (16 + 4)),  # a group never spans tokens
    ],
)
def test_quantised_cache(kv, token_bytes):
    settings = MethodSettings(name="kv_quant", kv=kv)
    trace = build_trace(TOY, settings, one_call(10, 6, batch=2))
    layer = trace.layer == 0
    append = totals(trace, is_kind(trace, "kv_append") & layer)
    assert append == (0, 2 * (2 * 6 * 2 * 32), 2 * 6 * 2 * 32 * 2, 2 * 6 * token_bytes)  # quantise: 2 per element
    attention = totals(trace, is_kind(trace, "attention") & layer)
    pairs = 6 * 10 + 21
    assert attention.read_bytes == 2 * (6 * 64 * 2 + 16 * token_bytes)
    assert attention.vector_ops == 2 * (5 * 4 * pairs + 2 * 16 * 2 * 32)  # dequantise: 2 per element read
    assert state_per_sequence(TOY, settings, 16, "bf16").kv_bytes == 4 * 16 * token_bytes


def test_int4_of_the_real_models_costs_what_the_group_says():
    # e_kv = 0.5 + 4/q: 0.625 for q = 32
    model = load_model("Qwen3-4B")
    state = state_per_sequence(model, METHODS["kv_quant"].settings(None, None, None), 1000, "bf16")
    assert state.kv_bytes == 1000 * closed_forms.kv_bytes_per_token(model) * 5 // 16


def test_state_of_the_baselines():
    model = load_model("Qwen3-4B")
    full, window = METHODS["kv"].settings(None, None, None), METHODS["kv_window"].settings(1024, None, None)
    for tokens in (1, 1024, 1025, 131072):
        assert state_per_sequence(model, full, tokens, "bf16").total_bytes == tokens * 147456
        assert state_per_sequence(model, window, tokens, "bf16").total_bytes == min(tokens, 1024) * 147456


def test_default_settings_of_the_methods():
    assert METHODS["kv"].settings(512, None, None).kv == KVSettings()
    assert METHODS["kv"].settings(None, "fp8", None).kv.dtype == "fp8"
    assert METHODS["kv_window"].settings(None, None, None).kv.window_tokens == 1024
    assert METHODS["kv_window"].settings(256, "fp8", None).kv == KVSettings(window_tokens=256, dtype="fp8")
    assert METHODS["kv_quant"].settings(512, None, None).kv == KVSettings(dtype="int4", group=32)
    for name, method in METHODS.items():
        assert method.name == name == method.settings(None, None, None).name


# --- repetition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kv", "kv_window", "kv_quant"])
def test_calls_are_what_they_are_alone(method):
    """A long scenario is built from few templates; each of its calls equals the trace of that call by itself."""
    settings = METHODS[method].settings(48, None, None)
    calls = (*Scenario.prefill(96, call_tokens=32).calls, *Scenario.decode((96, 97, 98, 120, 121)).calls)
    whole = build_trace(TOY, settings, Scenario(batch=2, dtype="bf16", calls=calls))
    assert_calls_equal_themselves_alone(whole, settings, calls)


def test_meta_names_the_workload():
    trace = kv_trace(TOY, Scenario.prefill(40, batch=2, call_tokens=32), window=48)
    assert trace.meta["model"] == "toy"
    assert trace.meta["method"] == "kv_window"
    assert trace.meta["batch"] == 2
    assert trace.meta["dtype"] == "bf16"
    assert trace.meta["calls"] == [[0, 32, False], [32, 8, True]]
    assert trace.meta["pinned"] == []


# --- bad input --------------------------------------------------------------------------------------------------------


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'kv_windw'.*did you mean kv_window.*methods: kv, kv_window"):
        find_method("kv_windw")


@pytest.mark.parametrize(
    ("kv", "dtype", "message"),
    [
        (KVSettings(window_tokens=0), "bf16", "attention window is 0 tokens"),
        (KVSettings(dtype="bf61"), "bf16", "'bf61' is unknown, did you mean bf16"),
        (KVSettings(dtype="tf32"), "bf16", "'tf32' is unknown"),
        (KVSettings(dtype="int4", group=0), "bf16", "group is 0"),
        (KVSettings(), "bfloat16", "dtype 'bfloat16' is unknown"),
    ],
)
def test_impossible_settings(kv, dtype, message):
    with pytest.raises(ConfigError, match=message):
        build_trace(TOY, MethodSettings(name="kv", kv=kv), one_call(0, 4, dtype=dtype))


@pytest.mark.parametrize("scenario", [one_call(0, 1, batch=10**15), one_call(2**40, 2**30)])
def test_numbers_beyond_64_bits_are_refused(scenario):
    with pytest.raises(WorkloadError, match=r"an op would have more than 2\^63 operations"):
        kv_trace(load_model("Qwen3-4B"), scenario)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "tf32"])
def test_every_dtype_gives_a_possible_trace(dtype):
    settings = MethodSettings(name="kv", kv=KVSettings(dtype=dtype))
    verify(build_trace(TOY, settings, Scenario.prefill(40, call_tokens=16, dtype=dtype)))
