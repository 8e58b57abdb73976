"""In-Place TTT: the update ops, the released control flow, carry policies and weight-write variants."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from tests.unit.trace_tools import (
    TOY,
    Totals,
    assert_calls_equal_themselves_alone,
    is_kind,
    kinds,
    one_call,
    operands,
    totals,
)
from ttt_sim.errors import ConfigError
from ttt_sim.model import Call, MethodSettings, Model, Parallel, Scenario, TTTSettings
from ttt_sim.model_config import load_model
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, closed_forms, state_per_sequence

CARRIES = ("official", "ring", "keep_z", "online")
VARIANTS = ("official", "fused", "resident", "master", "tile_wise")
#: Toy: d f elements of a fast weight.
DF = 64 * 192


def toy_ttt(**changes) -> TTTSettings:
    return TTTSettings(**{"layers": (0, 2), "chunk_tokens": 32, **changes})


def settings_of(ttt: TTTSettings, window: int | None = None) -> MethodSettings:
    return METHODS["ttt" if window is None else "ttt_window"].settings(window, None, ttt)


def ttt_trace(scenario: Scenario, model: Model = TOY, **changes) -> Trace:
    return build_trace(model, settings_of(toy_ttt(**changes)), scenario)


def update_mask(trace: Trace):
    return np.isin(trace.phase, [int(Phase.BACKWARD), int(Phase.WEIGHT_WRITE)])


def mlp_mask(trace: Trace, layer: int):
    mlp = is_kind(trace, "gate_proj", "up_proj", "silu_mul", "fast_apply")
    return (trace.layer == layer) & (mlp | update_mask(trace))


# --- the update of one chunk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_update_of_one_chunk_op_by_op(batch):
    """d = 64, f = 192, C = 32, bf16: U1, U2, U3, U5, U6."""
    trace = ttt_trace(one_call(0, 32, batch=batch))
    b, c, d, f, e = batch, 32, 64, 192, 2
    expected = {
        "target_conv": Totals(b * 10 * c * d, 0, b * c * d * e + 5 * d * e, b * c * d * e),
        "target_proj": Totals(b * 2 * c * d * d, 0, b * c * d * e + d * d * e, b * c * d * e),
        "delta_gemm": Totals(b * 2 * c * d * f, 0, b * c * (d + f) * e, b * d * f * e),
        "delta_scale": Totals(0, b * d * f, b * d * f * e, b * d * f * e),
        "weight_write": Totals(0, b * d * f, b * d * f * (e + e), b * d * f * e),
    }
    for layer in (0, 2):
        mask = update_mask(trace) & (trace.layer == layer)
        assert kinds(trace, mask) == list(expected)
        for kind, values in expected.items():
            assert totals(trace, is_kind(trace, kind) & (trace.layer == layer)) == values, kind
    assert not (update_mask(trace) & np.isin(trace.layer, [1, 3])).any()


def test_update_with_the_outer_product_first():
    """C = 256 >= f = 192: U3' reads A and Z, U2' multiplies d x f by the projection."""
    trace = ttt_trace(one_call(0, 256, batch=2), chunk_tokens=256)
    b, c, d, f, e = 2, 256, 64, 192, 2
    mask = update_mask(trace) & (trace.layer == 0)
    assert kinds(trace, mask) == ["target_conv", "outer_gemm", "outer_proj", "delta_scale", "weight_write"]
    outer = totals(trace, is_kind(trace, "outer_gemm") & (trace.layer == 0))
    assert outer == (b * 2 * c * d * f, 0, b * c * (d + f) * e, b * d * f * e)
    projected = totals(trace, is_kind(trace, "outer_proj") & (trace.layer == 0))
    assert projected == (b * 2 * d * d * f, 0, b * d * f * e + d * d * e, b * d * f * e)


def test_order_flips_where_the_chunk_reaches_d_ff():
    for chunk_tokens, first in ((191, "target_proj"), (192, "outer_gemm")):
        trace = ttt_trace(one_call(0, chunk_tokens), chunk_tokens=chunk_tokens)
        assert is_kind(trace, first).any()
    forced = ttt_trace(one_call(0, 32), contraction="outer_first")
    assert is_kind(forced, "outer_gemm").any()
    forced = ttt_trace(one_call(0, 256), chunk_tokens=256, contraction="project_first")
    assert is_kind(forced, "target_proj").any()


def test_without_projection():
    trace = ttt_trace(one_call(0, 32), projection=False)
    assert kinds(trace, update_mask(trace) & (trace.layer == 0)) == [
        "target_conv", "delta_gemm", "delta_scale", "weight_write",
    ]  # fmt: skip
    assert not any(t.name.endswith("ttt_proj.weight") for t in trace.tensors)


def test_clip_is_a_barrier():
    """The norm reads the whole delta, and what changes the weight waits for it."""
    trace = ttt_trace(one_call(0, 32, batch=2), clip=1e-5)
    names = kinds(trace)
    norm = names.index("delta_norm")
    assert totals(trace, np.arange(trace.n_ops) == norm) == (0, 2 * 2 * DF, 2 * DF * 2, 0)
    assert operands(trace, norm, "write") == [("layers.0.delta_norm", 0, 0)]
    assert ("layers.0.delta_norm", 0, 0) in operands(trace, names.index("delta_scale"), "read")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "official"])
def test_clip_forces_the_delta_to_exist(variant):
    trace = ttt_trace(one_call(0, 32), clip=1e-5, weight_write=variant)
    assert kinds(trace, update_mask(trace) & (trace.layer == 0)) == [
        "target_conv", "target_proj", "delta_gemm", "delta_norm", "weight_write",
    ]  # fmt: skip
    write = kinds(trace).index("weight_write")
    assert ("layers.0.delta_norm", 0, 0) in operands(trace, write, "read")


@pytest.mark.parametrize("name", ["toy", "Qwen3-4B", "Llama-3.1-8B"])
@pytest.mark.parametrize("chunk_tokens", [32, 1024, 16384])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("clip", [None, 1e-5])
def test_update_totals_equal_the_closed_forms(name, chunk_tokens, variant, clip):
    model = load_model(name)
    ttt = TTTSettings(chunk_tokens=chunk_tokens, weight_write=variant, clip=clip)
    trace = build_trace(model, settings_of(ttt), one_call(0, chunk_tokens, batch=2))
    found = totals(trace, update_mask(trace))
    n_layers = len(ttt.layers_of(model))
    assert found.flops == 2 * n_layers * closed_forms.update_flops(model, ttt)
    assert found.vector_ops == 2 * n_layers * closed_forms.update_lane_ops(model, ttt)


@pytest.mark.parametrize("chunk_tokens", [32, 256])
@pytest.mark.parametrize(
    ("variant", "fast_dtype"), [*((variant, "bf16") for variant in VARIANTS), ("official", "fp32"), ("fused", "fp32")]
)
def test_bytes_of_the_weight_write(variant, fast_dtype, chunk_tokens):
    """What taking the delta into the weight moves: traffic of fast weights, and of deltas from the GEMM's write on."""
    changes = {"chunk_tokens": chunk_tokens, "weight_write": variant, "fast_dtype": fast_dtype}
    trace = ttt_trace(one_call(0, chunk_tokens, batch=3), **changes)
    moved = {"read": 0, "write": 0}
    for op in np.flatnonzero(update_mask(trace) & (trace.layer == 0)).tolist():
        for column in moved:
            for name, _, nbytes in operands(trace, op, column):
                if name.startswith(("layers.0.fast_", "layers.0.delta", "layers.0.scaled_delta")):
                    moved[column] += nbytes
    expected = closed_forms.weight_write_bytes(TOY, fast_dtype, variant)
    assert moved == {"read": 3 * expected.read, "write": 3 * expected.written}


def test_master_writes_both_copies():
    trace = ttt_trace(one_call(0, 32, batch=2), weight_write="master")
    op = kinds(trace).index("delta_write")
    assert operands(trace, op, "write") == [
        ("layers.0.fast_master", 1, 2 * 4 * DF), ("layers.0.fast_weight", 1, 2 * 2 * DF),
    ]  # fmt: skip
    apply = kinds(trace).index("fast_apply")
    assert [name for name, _, _ in operands(trace, apply, "read")] == ["layers.0.hidden", "layers.0.fast_weight"]


def test_resident_weights_are_pinned():
    trace = ttt_trace(one_call(0, 32), weight_write="resident")
    assert trace.meta["pinned"] == ["layers.0.fast_weight", "layers.2.fast_weight"]
    assert ttt_trace(one_call(0, 32), weight_write="fused").meta["pinned"] == []


# --- control flow -----------------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    """Rows that the released code runs for one call, per TTT layer and sequence."""

    hidden_rows: int
    applied_rows: list[int]
    n_updates: int
    copied_rows: tuple[int, int]  # carried rows read, rows written


def released_flow(chunk: int, pieces: list[int]) -> list[Flow]:
    """The released control flow, with lists of rows instead of tensors."""
    open_rows: list[int] = []
    flows, position = [], 0
    for tokens in pieces:
        new = list(range(position, position + tokens))
        position += tokens
        rows = open_rows + new
        if len(rows) < chunk:
            flows.append(Flow(tokens, [tokens], 0, (len(open_rows), len(rows))))
            open_rows = rows
        else:
            chunks = [rows[i : i + chunk] for i in range(0, len(rows), chunk)]
            tail = chunks.pop() if len(chunks[-1]) < chunk else []
            joined = len(rows) if open_rows else 0
            flows.append(
                Flow(len(rows), [chunk] * (len(chunks) + bool(tail)), len(chunks), (len(open_rows), joined + len(tail)))
            )
            open_rows = tail
    return flows


def scenario_of(pieces: list[int], batch: int = 1) -> Scenario:
    ends = np.cumsum([0, *pieces]).tolist()
    calls = tuple(Call(position=p, tokens=m, logits=False) for p, m in zip(ends, pieces, strict=False))
    return Scenario(batch=batch, dtype="bf16", calls=calls)


SPLITS = (
    [160],
    [150],
    [31],
    [31, 1, 1],
    [32] * 5,
    [13] * 12,
    [150, *[1] * 40],
    [64, 64, 32],
    [100, 60],
    [5, 100, 3, 52],
)


@pytest.mark.parametrize("pieces", SPLITS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_official_flow(pieces, batch):
    trace = ttt_trace(scenario_of(pieces, batch))
    for step, flow in enumerate(released_flow(32, pieces)):
        here = (trace.step == step) & (trace.layer == 2)
        gate = here & is_kind(trace, "gate_proj")
        assert trace.m[gate].tolist() == [batch * flow.hidden_rows]
        apply = here & is_kind(trace, "fast_apply")
        assert trace.m[apply].tolist() == flow.applied_rows
        assert set(trace.batch[apply].tolist()) == {batch}
        assert int((here & is_kind(trace, "weight_write")).sum()) == flow.n_updates
        copies = totals(trace, here & is_kind(trace, "carry_append"))
        read, written = flow.copied_rows
        assert (copies.read_bytes, copies.write_bytes) == (batch * 2 * read * 64 * 2, batch * 2 * written * 64 * 2)


def test_toy_of_the_specification():
    """T = 160: five chunks, all complete. T = 150: four, a tail of 22; decoding 40 crosses one boundary, at 160."""
    assert kinds(ttt_trace(Scenario.prefill(160))).count("weight_write") == 2 * 5
    prefill = ttt_trace(Scenario.prefill(150))
    assert kinds(prefill).count("weight_write") == 2 * 4
    assert kinds(prefill).count("fast_apply") == 2 * 5
    decode = ttt_trace(Scenario.decode(range(150, 190)))
    writes = is_kind(decode, "weight_write")
    assert set(decode.position[writes].tolist()) == {159}
    assert set(decode.chunk[writes].tolist()) == {4}


def test_prompt_shorter_than_a_chunk_updates_nothing():
    trace = ttt_trace(Scenario.prefill(31))
    assert not update_mask(trace).any()


@pytest.mark.parametrize("carry", CARRIES)
def test_each_apply_reads_the_weight_before_its_update(carry):
    """In a scenario from an empty state chunk i is applied with version i and updates to i + 1."""
    trace = ttt_trace(Scenario(batch=2, dtype="bf16", calls=scenario_of([150, *[1] * 40]).calls), carry=carry)
    for op in np.flatnonzero(is_kind(trace, "fast_apply", "weight_write")).tolist():
        weight = f"layers.{int(trace.layer[op])}.fast_weight"
        reads = [version for name, version, _ in operands(trace, op, "read") if name == weight]
        writes = [version for name, version, _ in operands(trace, op, "write") if name == weight]
        chunk = int(trace.chunk[op])
        assert reads == [chunk]
        assert writes == ([chunk + 1] if trace.phase[op] == Phase.WEIGHT_WRITE else [])


def test_versions_count_emitted_writes_where_calls_are_left_out():
    """Steps 31, 63 and 127 complete chunks 0, 1 and 3; version 0 is what the scenario starts with."""
    trace = ttt_trace(Scenario.decode((5, 31, 40, 63, 70, 127)))
    verify(trace)
    applied = {}
    for op in np.flatnonzero(is_kind(trace, "fast_apply") & (trace.layer == 0)).tolist():
        applied[int(trace.position[op])] = operands(trace, op, "read")[1][1]
    assert applied == {5: 0, 31: 0, 40: 1, 63: 1, 70: 2, 127: 2}


def test_weights_start_from_the_trained_one_only_at_position_0():
    trace = ttt_trace(Scenario.prefill(96, call_tokens=32, batch=2))
    init = is_kind(trace, "fast_init")
    assert trace.layer[init].tolist() == [0, 2]
    assert set(trace.step[init].tolist()) == {0}
    assert totals(trace, init & (trace.layer == 0)) == (0, 0, DF * 2, 2 * DF * 2)
    assert not is_kind(ttt_trace(Scenario.decode((64, 65))), "fast_init").any()


@pytest.mark.parametrize(("carry", "n_carried"), [("official", 31), ("ring", 31), ("keep_z", 0), ("online", 0)])
def test_recomputation_is_visible(carry, n_carried):
    """The step that completes a chunk runs the MLP on all 32 rows again, or on the new one only."""
    trace = ttt_trace(Scenario.decode((63,)), carry=carry)
    again = trace.phase == Phase.RECOMPUTE
    assert set(kinds(trace, again)) == ({"gate_proj", "up_proj", "silu_mul", "fast_apply"} if n_carried else set())
    assert trace.m[is_kind(trace, "gate_proj") & (trace.layer == 0)].tolist() == [n_carried + 1]


def test_aligned_prefill_recomputes_nothing():
    assert not (ttt_trace(Scenario.prefill(128, call_tokens=64)).phase == Phase.RECOMPUTE).any()


@pytest.mark.parametrize("name", ["toy", "Qwen3-4B", "Qwen3-8B", "Llama-3.1-8B", "Qwen3-14B"])
@pytest.mark.parametrize("chunk_tokens", [32, 1024, 4096])
def test_boundary_step_equals_the_closed_form(name, chunk_tokens):
    """Official: the MLP on C rows and the update. With Z kept: an ordinary step and the update."""
    model = load_model(name)
    d, f = model.d_model, model.d_ff
    for carry in ("official", "keep_z"):
        ttt = TTTSettings(chunk_tokens=chunk_tokens, carry=carry)
        trace = build_trace(model, settings_of(ttt), Scenario.decode((4 * chunk_tokens - 1,)))
        found = sum(totals(trace, mlp_mask(trace, layer)).flops for layer in ttt.layers_of(model))
        if carry == "official":
            assert found == closed_forms.boundary_flops(model, ttt)
        else:
            ordinary = len(ttt.layers_of(model)) * 6 * d * f
            assert found == ordinary + closed_forms.boundary_update_flops(model, ttt)


def test_decode_over_a_chunk_copies_what_the_closed_form_says():
    ttt = toy_ttt()
    trace = build_trace(TOY, settings_of(ttt), Scenario.decode(range(64, 96)))
    copies = totals(trace, is_kind(trace, "carry_append"))
    expected = closed_forms.official_carry_traffic(TOY, ttt)
    assert copies.read_bytes == 32 * expected.read
    assert copies.write_bytes == 32 * expected.written


@pytest.mark.parametrize(
    ("carry", "target", "elements"),
    [
        ("ring", "hidden_states", 2 * 64),  # inputs are the targets: d per layer
        ("ring", "input_embed", 2 * 64 + 64),  # targets once for both layers
        ("keep_z", "hidden_states", 2 * (192 + 64)),
        ("keep_z", "input_embed", 2 * 192 + 64),
    ],
)
def test_ring_buffers_write_each_row_once(carry, target, elements):
    trace = ttt_trace(Scenario.decode(range(64, 95)), carry=carry, target=target)
    copies = totals(trace, is_kind(trace, "carry_append"))
    assert (copies.read_bytes, copies.write_bytes) == (0, 31 * elements * 2)


def test_targets_come_from_the_layer_input_or_the_embeddings():
    for target, tensor in (("hidden_states", "layers.2.mlp_normed"), ("input_embed", "residual.0")):
        trace = ttt_trace(one_call(0, 32), target=target)
        conv = int((is_kind(trace, "target_conv") & (trace.layer == 2)).argmax())
        assert operands(trace, conv, "read")[0] == (tensor, 0, 32 * 64 * 2)


@pytest.mark.parametrize("carry", CARRIES)
def test_chunk_operands_span_the_open_rows_and_the_new_ones(carry):
    """A chunk of 32 rows, 20 of them from before: where its targets and hidden rows are read."""
    trace = ttt_trace(
        Scenario(batch=1, dtype="bf16", calls=scenario_of([20, 12]).calls), carry=carry, target="input_embed"
    )
    here = (trace.step == 1) & (trace.layer == 0)
    conv = int((here & is_kind(trace, "target_conv")).argmax())
    product = int((here & is_kind(trace, "delta_gemm", "online_update")).argmax())
    d_row, f_row = 64 * 2, 192 * 2
    targets = [(name, size) for name, _, size in operands(trace, conv, "read")[:-1]]
    hidden = [(name, size) for name, _, size in operands(trace, product, "read")[1:]]
    assert (
        targets
        == {
            "official": [("layers.0.joined_targets", 32 * d_row)],
            "ring": [("carry_targets", 20 * d_row), ("residual.0", 12 * d_row)],
            "keep_z": [("carry_targets", 20 * d_row), ("residual.0", 12 * d_row)],
            "online": [
                ("carry_targets", 4 * d_row),
                ("residual.0", 12 * d_row),
            ],  # four rows that the convolution spans
        }[carry]
    )
    assert (
        hidden
        == {
            "official": [("layers.0.hidden", 32 * f_row)],
            "ring": [("layers.0.hidden", 32 * f_row)],
            "keep_z": [("layers.0.carry_hidden", 20 * f_row), ("layers.0.hidden", 12 * f_row)],
            # rows 18 and 19 waited for the convolution; the accumulator holds rows 0 to 17
            "online": [
                ("layers.0.carry_hidden", 2 * f_row),
                ("layers.0.hidden", 12 * f_row),
                ("layers.0.accumulator", 4 * DF),
            ],
        }[carry]
    )


# --- online accumulation ----------------------------------------------------------------------------------------------


def test_online_decode_is_rank_one_per_token_two_tokens_late():
    trace = ttt_trace(Scenario.decode(range(64, 96)), carry="online")
    layer = trace.layer == 0
    folds = is_kind(trace, "online_update") & layer
    rows = dict(zip(trace.position[folds].tolist(), trace.k[folds].tolist(), strict=True))
    assert rows == {**dict.fromkeys(range(66, 95), 1), 95: 3}  # the last step also folds the two rows that waited
    step = int((folds & (trace.position == 80)).argmax())
    assert totals(trace, np.arange(trace.n_ops) == step) == (
        2 * DF, 0, 64 * 2 + 192 * 2 + 4 * DF, 4 * DF,
    )  # fmt: skip
    first = int((folds & (trace.position == 66)).argmax())
    assert "layers.0.accumulator" not in [name for name, _, _ in operands(trace, first, "read")]


def test_online_causal_convolution_waits_for_nothing():
    trace = ttt_trace(Scenario.decode(range(64, 96)), carry="online", convolution="causal")
    folds = is_kind(trace, "online_update") & (trace.layer == 0)
    assert trace.k[folds].tolist() == [1] * 32
    assert not any(t.name.endswith("carry_hidden") for t in trace.tensors)


@pytest.mark.parametrize("convolution", ["symmetric", "causal"])
@pytest.mark.parametrize("chunk_tokens", [3, 32, 256])
@pytest.mark.parametrize(
    "pieces", [[256], [1] * 256, [100, 100, 56], [3] * 85 + [1]], ids=["one", "single", "few", "threes"]
)
def test_online_updates_cost_the_same_flops(pieces, chunk_tokens, convolution):
    ttt = toy_ttt(carry="online", chunk_tokens=chunk_tokens, convolution=convolution)
    n_chunks = 256 // chunk_tokens
    trace = build_trace(TOY, settings_of(ttt), scenario_of(pieces, batch=2))
    done = trace.chunk < n_chunks  # the tail of an unfinished chunk is work for a later update
    mask = update_mask(trace) & done
    assert totals(trace, mask).flops == 2 * 2 * n_chunks * closed_forms.update_flops(TOY, ttt)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen3-8B", "Llama-3.1-8B", "Qwen3-14B", "Qwen3-1.7B"])
def test_state_equals_the_closed_forms(name):
    model = load_model(name)
    for chunk_tokens in (1024, 4096):
        for fast_dtype in ("bf16", "fp32"):
            ttt = TTTSettings(chunk_tokens=chunk_tokens, fast_dtype=fast_dtype)
            full = state_per_sequence(model, settings_of(ttt), 5000, "bf16")
            windowed = state_per_sequence(model, settings_of(ttt, 1024), 5000, "bf16")
            assert full.kv_bytes == 5000 * closed_forms.kv_bytes_per_token(model)
            assert windowed.kv_bytes == 1024 * closed_forms.kv_bytes_per_token(model)
            for state in (full, windowed):
                assert state.fast_weight_bytes == closed_forms.fast_weight_bytes(model, ttt)
                assert state.carry_bytes == closed_forms.official_carry_bytes(model, ttt)
                assert state.total_bytes == state.kv_bytes + state.fast_weight_bytes + state.carry_bytes


def test_windowed_state_crosses_the_cache_where_the_closed_form_says():
    model = load_model("Qwen3-4B")
    baseline = METHODS["kv"].settings(None, None, None)
    settings = METHODS["ttt_window"].settings(1024, None, None)
    whole = int(closed_forms.windowed_state_crossover(model, TTTSettings(), 1024))
    for tokens, smaller in ((whole, False), (whole + 1, True)):
        ttt, kv = (state_per_sequence(model, s, tokens, "bf16").total_bytes for s in (settings, baseline))
        assert (ttt < kv) is smaller


@pytest.mark.parametrize(
    ("carry", "target", "convolution", "elements", "accumulators"),
    [
        # C - 1 = 31 rows; d = 64, f = 192; two TTT layers
        ("official", "hidden_states", "symmetric", 2 * 2 * 31 * 64, 0),
        ("official", "input_embed", "symmetric", 2 * 2 * 31 * 64, 0),
        ("ring", "hidden_states", "symmetric", 2 * 31 * 64, 0),
        ("ring", "input_embed", "symmetric", 2 * 31 * 64 + 31 * 64, 0),
        ("keep_z", "hidden_states", "symmetric", 2 * 31 * (192 + 64), 0),
        ("keep_z", "input_embed", "symmetric", 2 * 31 * 192 + 31 * 64, 0),
        ("online", "hidden_states", "symmetric", 2 * (4 * 64 + 2 * 192), 2 * DF),
        ("online", "input_embed", "causal", 4 * 64, 2 * DF),
    ],
)
def test_carry_of_each_policy(carry, target, convolution, elements, accumulators):
    settings = settings_of(toy_ttt(carry=carry, target=target, convolution=convolution))
    state = state_per_sequence(TOY, settings, 1000, "bf16")
    assert state.carry_bytes == 2 * elements + 4 * accumulators
    trace = build_trace(TOY, settings, Scenario.prefill(150, batch=3))
    held = {role: sum(t.nbytes for t in trace.tensors if t.role == role) for role in Role}
    assert held[Role.CARRY] == 3 * state.carry_bytes
    assert held[Role.FAST_WEIGHT] == 3 * state.fast_weight_bytes


def test_master_state_holds_both_copies():
    state = state_per_sequence(TOY, settings_of(toy_ttt(weight_write="master")), 10, "bf16")
    assert state.fast_weight_bytes == 2 * DF * (4 + 2)


def test_a_chunk_of_one_token_carries_nothing():
    state = state_per_sequence(TOY, settings_of(toy_ttt(chunk_tokens=1)), 10, "bf16")
    assert state.carry_bytes == 0
    trace = ttt_trace(Scenario.decode(range(5)), chunk_tokens=1)
    assert kinds(trace).count("weight_write") == 2 * 5
    assert not is_kind(trace, "carry_append").any()


# --- part of a matrix -------------------------------------------------------------------------------------------------

#: 16 of the 64 rows of a toy weight are fast.
PART, FROZEN = 16, 48


def same_ops(a: Trace, b: Trace) -> bool:
    return a.tensors == b.tensors and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in a.__dataclass_fields__
        if name not in ("tensors", "meta")
    )


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", [{}, {"projection": False}, {"contraction": "outer_first", "clip": 1.0}], ids=str)
def test_all_rows_are_the_whole_matrix(carry, variant, changes):
    scenario = scenario_of([70, *[1] * 30], batch=2)
    whole, rows = (
        ttt_trace(scenario, carry=carry, weight_write=variant, update_rows=n, **changes) for n in (None, TOY.d_model)
    )
    assert same_ops(whole, rows)
    assert not is_kind(rows, "down_proj")[np.isin(rows.layer, (0, 2))].any()


def test_update_of_part_of_a_matrix_op_by_op():
    """d = 64, f = 192, C = 32, 16 rows, two sequences, bf16."""
    trace = ttt_trace(one_call(0, 32, batch=2), update_rows=PART)
    b, c, d, f, u, e = 2, 32, 64, 192, PART, 2
    expected = {
        "fast_init": Totals(0, 0, u * f * e, b * u * f * e),
        "fast_apply": Totals(b * 2 * c * u * f, 0, b * c * f * e + b * u * f * e, b * c * u * e),
        "target_conv": Totals(b * 10 * c * d, 0, b * c * d * e + 5 * d * e, b * c * d * e),
        "target_proj": Totals(b * 2 * c * d * u, 0, b * c * d * e + d * u * e, b * c * u * e),
        "delta_gemm": Totals(b * 2 * c * u * f, 0, b * c * (u + f) * e, b * u * f * e),
        "delta_scale": Totals(0, b * u * f, b * u * f * e, b * u * f * e),
        "weight_write": Totals(0, b * u * f, b * u * f * (e + e), b * u * f * e),
        "down_proj": Totals(b * 2 * c * FROZEN * f, 0, b * c * f * e + FROZEN * f * e, b * c * FROZEN * e),
        "mlp_residual": Totals(0, b * c * d, 2 * b * c * d * e, b * c * d * e),
    }
    for layer in (0, 2):
        for kind, values in expected.items():
            assert totals(trace, is_kind(trace, kind) & (trace.layer == layer)) == values, kind
    frozen = int(np.flatnonzero(is_kind(trace, "down_proj") & (trace.layer == 0))[0])
    assert (trace.batch[frozen], trace.m[frozen], trace.n[frozen], trace.k[frozen]) == (1, b * c, FROZEN, f)
    fast = int(np.flatnonzero(is_kind(trace, "fast_apply") & (trace.layer == 0))[0])
    assert (trace.batch[fast], trace.m[fast], trace.n[fast], trace.k[fast]) == (b, c, u, f)


@pytest.mark.parametrize("carry", CARRIES)
def test_rows_that_stay_are_applied_once_to_every_token(carry):
    """Also in calls that compute hidden rows again, and beside each fast product."""
    pieces = [70, 1, 1, 40, 20]
    trace = ttt_trace(scenario_of(pieces, batch=3), carry=carry, update_rows=PART)
    verify(trace)
    frozen = is_kind(trace, "down_proj") & (trace.layer == 2)
    assert trace.m[frozen].tolist() == [3 * n for n in pieces]
    assert set(trace.phase[frozen].tolist()) == {int(Phase.FORWARD)}
    added = is_kind(trace, "mlp_residual") & (trace.layer == 2)
    for op, tokens in zip(np.flatnonzero(added).tolist(), pieces, strict=True):
        sizes = {"fast_out": 0, "frozen_out": 0}
        for name, _, nbytes in operands(trace, op, "read")[1:]:
            sizes[name.rpartition(".")[2]] += nbytes
        assert sizes == {"fast_out": 3 * tokens * PART * 2, "frozen_out": 3 * tokens * FROZEN * 2}


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize(
    ("changes", "target_width", "summed_rows"),
    [({}, 64, PART), ({"projection": False}, PART, PART), ({"contraction": "outer_first"}, 64, 64)],
    ids=["projected", "plain", "outer_first"],
)
def test_state_of_part_of_a_matrix(carry, changes, target_width, summed_rows):
    """A projection mixes columns of targets; a delta before its projection has all rows."""
    settings = settings_of(toy_ttt(carry=carry, update_rows=PART, **changes))
    state = state_per_sequence(TOY, settings, 1000, "bf16")
    assert state.fast_weight_bytes == 2 * PART * 192 * 2
    rows = {
        "official": 31 * (64 + target_width) * 2,
        "ring": 31 * 64 * 2,
        "keep_z": 31 * (192 + target_width) * 2,
        "online": (4 * target_width + 2 * 192) * 2 + summed_rows * 192 * 4,
    }
    assert state.carry_bytes == 2 * rows[carry]
    trace = build_trace(TOY, settings, Scenario.prefill(150, batch=3))
    held = {role: sum(t.nbytes for t in trace.tensors if t.role == role) for role in Role}
    assert held[Role.CARRY] == 3 * state.carry_bytes
    assert held[Role.FAST_WEIGHT] == 3 * state.fast_weight_bytes


@pytest.mark.parametrize("name", ["toy", "Qwen3-4B"])
@pytest.mark.parametrize("rows", [1, 16, 50, 60])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projection": False},
        {"contraction": "outer_first"},
        {"chunk_tokens": 4096},
        {"clip": 1.0},
        {"carry": "online"},
    ],
    ids=str,
)
def test_work_on_part_of_a_matrix_equals_the_closed_forms(name, rows, changes):
    model = load_model(name)
    ttt = toy_ttt(update_rows=rows, **{"chunk_tokens": 1024, **changes})
    trace = build_trace(model, settings_of(ttt), one_call(0, ttt.chunk_tokens, batch=2))
    found = totals(trace, update_mask(trace))
    assert found.flops == 2 * 2 * closed_forms.update_flops(model, ttt)
    assert found.vector_ops == 2 * 2 * closed_forms.update_lane_ops(model, ttt)
    state = state_per_sequence(model, settings_of(ttt), 5000, "bf16")
    assert state.fast_weight_bytes == closed_forms.fast_weight_bytes(model, ttt) == 2 * rows * model.d_ff * 2
    if "carry" not in changes:
        assert state.carry_bytes == closed_forms.official_carry_bytes(model, ttt)
        boundary = build_trace(model, settings_of(ttt), Scenario.decode((4 * ttt.chunk_tokens - 1,)))
        flops = sum(totals(boundary, mlp_mask(boundary, layer)).flops for layer in (0, 2))
        assert flops == closed_forms.boundary_flops(model, ttt)


@pytest.mark.parametrize(("rows", "first"), [(48, None), (49, 2352), (56, 336), (64, 192)])
def test_order_of_the_products_of_part_of_a_matrix(rows, first):
    """d u f / (u (d + f) - d f) tokens: 49 * 12288 / 256 = 2352, 56 * 12288 / 2048 = 336, 64 * 12288 / 4096 = 192."""
    if first is None:
        assert is_kind(ttt_trace(one_call(0, 2**20), chunk_tokens=2**20, update_rows=rows), "target_proj").any()
        return
    for chunk_tokens, kind in ((first - 1, "target_proj"), (first, "outer_gemm")):
        trace = ttt_trace(one_call(0, chunk_tokens), chunk_tokens=chunk_tokens, update_rows=rows)
        assert is_kind(trace, kind).any()
    # the cheaper order on either side
    for chunk_tokens in (first - 1, first + 1):
        flops = {
            order: closed_forms.update_flops(
                TOY, toy_ttt(chunk_tokens=chunk_tokens, update_rows=rows, contraction=order)
            )
            for order in ("auto", "project_first", "outer_first")
        }
        assert flops["auto"] == min(flops["project_first"], flops["outer_first"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_of_the_weight_write_of_part_of_a_matrix(variant):
    trace = ttt_trace(one_call(0, 32, batch=3), weight_write=variant, update_rows=PART)
    moved = {"read": 0, "write": 0}
    for op in np.flatnonzero(update_mask(trace) & (trace.layer == 0)).tolist():
        for column in moved:
            for name, _, nbytes in operands(trace, op, column):
                if name.startswith(("layers.0.fast_", "layers.0.delta", "layers.0.scaled_delta")):
                    moved[column] += nbytes
    expected = closed_forms.weight_write_bytes(TOY, "bf16", variant, PART)
    assert moved == {"read": 3 * expected.read, "write": 3 * expected.written}
    assert expected.written == PART * 192 * {"official": 6, "master": 6}.get(variant, 2)


def test_part_of_a_matrix_on_several_chips():
    """Two tensor-parallel chips halve f, context-parallel chips pass on sums of u f elements."""
    tp = build_trace(
        TOY, settings_of(toy_ttt(update_rows=PART)), Scenario.prefill(32, batch=2, parallel=Parallel(tp=2))
    )
    verify(tp)
    ops = is_kind(tp, "fast_apply", "down_proj") & (tp.layer == 0)
    assert list(zip(kinds(tp, ops), tp.n[ops].tolist(), tp.k[ops].tolist(), strict=True)) == [
        ("fast_apply", PART, 96), ("down_proj", FROZEN, 96),
    ]  # fmt: skip
    summed = int(np.flatnonzero(ops)[-1]) + 1
    while kinds(tp)[summed] != "allreduce":
        summed += 1
    assert sum(nbytes for _, _, nbytes in operands(tp, summed, "read")) == 2 * 32 * 64 * 2
    for carry, changes in (("official", {}), ("online", {"contraction": "outer_first"})):
        ttt = toy_ttt(update_rows=PART, carry=carry, **changes)
        cp = build_trace(TOY, settings_of(ttt), Scenario.prefill(256, batch=2, parallel=Parallel(cp=2)))
        verify(cp)
        layer = cp.layer == 2
        scan = int(np.flatnonzero(is_kind(cp, "delta_scan") & layer)[0])
        assert operands(cp, scan, "read")[0][2] == operands(cp, scan, "write")[0][2] == 2 * PART * 192 * 2
        assert totals(cp, is_kind(cp, "delta_sum") & layer).vector_ops == 4 * 2 * PART * 192
        assert cp.n[is_kind(cp, "fast_apply") & layer].tolist() == [PART] * 4
        assert cp.m[is_kind(cp, "down_proj") & layer].tolist() == [2 * 128]


# --- decode bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("rows", [None, 256])
def test_decode_step_reads_what_the_closed_form_says(batch, window, rows):
    """Weights that products read, fast weights and KV; norms and the rotary table stand outside the formula."""
    model, tokens, ttt = load_model("Qwen3-4B"), 32768, TTTSettings(update_rows=rows)
    # the step after T - 2 tokens sees T - 1 and completes no chunk
    trace = build_trace(model, settings_of(ttt, window), Scenario.decode((tokens - 2,), batch=batch))
    names = [t.name for t in trace.tensors]
    counted = np.array([
        t.role in (Role.KV, Role.FAST_WEIGHT)
        or (t.role == Role.WEIGHT and names[i].endswith(("_proj.weight", "lm_head.weight", "embedding.weight")))
        for i, t in enumerate(trace.tensors)
    ])  # fmt: skip
    looked_up = batch * model.d_model * 2  # embedding rows
    found = int(trace.read_bytes[counted[trace.read_tensor]].sum()) - looked_up
    assert found == closed_forms.decode_bytes_ttt(model, ttt, tokens - 1, batch, window_tokens=window)


# --- repetition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("target", ["hidden_states", "input_embed"])
def test_calls_are_what_they_are_alone(carry, target):
    calls = scenario_of([64, 64, 20, *[1] * 50, 70, 13, 13]).calls
    settings = settings_of(toy_ttt(carry=carry, target=target), window=48)
    whole = build_trace(TOY, settings, Scenario(batch=2, dtype="bf16", calls=calls))
    verify(whole)
    assert_calls_equal_themselves_alone(whole, settings, calls)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (40,)}, r"layers: none of \[40\] exists in toy, which has layers 0 to 3"),
        ({"chunk_tokens": 0}, "chunk_tokens: is 0, expected a whole number from 1"),
        ({"carry": "rng"}, "carry: is 'rng', did you mean ring"),
        ({"weight_write": "master", "fast_dtype": "fp32"}, "master keeps an fp32 copy of a narrower weight"),
        ({"clip": 0.0}, "clip: is 0.0, expected a finite number above 0, or nothing"),
        ({"update_rows": 65}, "update_rows: is 65, but a down projection of toy has 64 rows"),
        ({"update_rows": 0}, "update_rows: is 0, expected a whole number from 1 to .*, or nothing for all rows"),
    ],
)
def test_impossible_settings(changes, message):
    for act in (
        lambda: ttt_trace(one_call(0, 4), **changes),
        lambda: state_per_sequence(TOY, settings_of(toy_ttt(**changes)), 4, "bf16"),
    ):
        with pytest.raises(ConfigError, match=message):
            act()


def test_settings_are_needed():
    settings = MethodSettings(name="ttt", kv=METHODS["kv"].settings(None, None, None).kv)
    with pytest.raises(ConfigError, match="method ttt needs TTT settings"):
        build_trace(TOY, settings, one_call(0, 4))
