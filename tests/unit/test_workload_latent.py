"""Latent attention, against closed forms, hand counts and itself in the other form."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.lower_tools import chip
from tests.unit.trace_tools import TOY, is_kind, kinds, one_call, operands, totals
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.lower.placement import place
from ttt_sim.model import Call, Model, Parallel, Scenario
from ttt_sim.model_config import load_model
from ttt_sim.ops import Role, Trace, query_bytes
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, state_per_sequence
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

B, U, R = 3, 24, 6


def trace(scenario: Scenario, model: Model = TOY, *, kv_dtype: str | None = None, **options: str) -> Trace:
    settings = METHODS["kv_mla"].settings(None, kv_dtype, None)
    built = build_trace(model, set_options(settings, {"latent": str(U), "rope": str(R)} | options), scenario)
    verify(built)
    return built


def mlp_flops(rows: int) -> int:
    return rows * 4 * 6 * 64 * 192


@pytest.mark.parametrize(("position", "tokens"), [(0, 1), (0, 40), (50, 7), (50, 47), (50, 48), (50, 1)])
@pytest.mark.parametrize("form", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("query_latent", ["none", "20"])
def test_flops(position: int, tokens: int, form: str, query_latent: str) -> None:
    built = trace(one_call(position, tokens, batch=B), form=form, query_latent=query_latent)
    # 16 * 24 / (24 - 16) = 48 rows cost the same in both forms after many tokens
    absorbed = form == "absorbed" or (form == "auto" and (tokens == 1 or (position > 0 and tokens < 48)))
    attention = forms.latent_attention_flops(
        TOY, tokens, position, latent=U, rope=R, absorbed=absorbed,
        query_latent=0 if query_latent == "none" else int(query_latent),
    )  # fmt: skip
    assert int(built.flops.sum()) == B * attention + mlp_flops(B * tokens)
    assert ("absorb_q" in kinds(built)) == absorbed
    assert ("latent_up" in kinds(built)) == (not absorbed)


def test_a_step_of_deepseek_shapes_costs_what_is_printed() -> None:
    """2 H (2 * 512 + 64) FLOPs per cached token and layer; 576 elements are kept."""
    model = load_model("Qwen3-4B")
    method = METHODS["kv_mla"]
    settings = method.settings(None, None, None)
    built = build_trace(model, settings, one_call(999, 1))
    core = is_kind(built, "latent_attention") & (built.layer == 0)
    assert totals(built, core).flops == 2 * 32 * (2 * 512 + 64) * 1000
    assert state_per_sequence(model, settings, 1000, "bf16").total_bytes == 1000 * 36 * 576 * 2
    assert forms.latent_bytes_per_token(model, 512, 64) == 36 * 576 * 2


def bytes_of(built: Trace, kind: str) -> list[tuple[list[int], list[int]]]:
    """Bytes of the operands, read and written, of the first op of a kind."""
    op = int(np.argmax(is_kind(built, kind)))
    return [tuple([size for _, _, size in operands(built, op, way)] for way in ("read", "write"))]  # type: ignore[list-item]


def test_bytes_of_the_absorbed_form() -> None:
    built = trace(one_call(50, 1, batch=B))
    # 4 heads of 16, width 64; a row of 30 elements is kept of each token
    assert bytes_of(built, "kv_append") == [([B * U * 2, B * R * 2, 0], [B * 60])]
    assert bytes_of(built, "absorb_q") == [([B * 64 * 2, 64 * U * 2], [B * 4 * U * 2])]
    assert bytes_of(built, "latent_attention") == [([B * 4 * U * 2, B * 4 * R * 2, B * 51 * 60], [B * 4 * U * 2])]
    assert bytes_of(built, "absorb_out") == [([B * 4 * U * 2, 64 * U * 2], [B * 64 * 2])]


def test_bytes_of_the_expanded_form() -> None:
    built = trace(one_call(50, 7, batch=B), form="expanded")
    expanded = B * 57 * 2 * 64 * 2
    assert bytes_of(built, "latent_up") == [([B * 57 * U * 2, 2 * 64 * U * 2], [expanded])]
    queries = [B * 7 * 64 * 2, B * 7 * 4 * R * 2]
    assert bytes_of(built, "latent_attention") == [([*queries, expanded, B * 57 * R * 2], [B * 7 * 64 * 2])]


def test_a_cache_that_computes_takes_latents_as_they_lie() -> None:
    """Queries of both parts are input vectors; nothing else travels to the arrays."""
    built = trace(one_call(50, 1, batch=B))
    core = np.flatnonzero(is_kind(built, "latent_attention"))
    assert query_bytes(built)[core].tolist() == [B * 4 * (U + R) * 2] * 4
    for name in ("tiny_cim", "tiny_pcm"):
        placement = place(built, chip(name))
        assert not placement.on_lanes[core].any()
        assert not placement.staged_bytes[core].any()


def test_weights_and_cache() -> None:
    built = trace(one_call(50, 1, batch=B))
    layer = {t.name: t.nbytes for t in built.tensors if t.name.startswith("layers.0.") and t.role == Role.WEIGHT}
    by_hand = {
        "attn_norm": 64, "q_proj": 4 * 22 * 64, "kv_down": 30 * 64, "kv_norm": U, "kv_up": 128 * U, "o_proj": 64 * 64,
        "mlp_norm": 64, "gate_proj": 192 * 64, "up_proj": 192 * 64, "down_proj": 192 * 64,
    }  # fmt: skip
    assert layer == {f"layers.0.{name}.weight": 2 * elements for name, elements in by_hand.items()}
    assert {t.nbytes for t in built.tensors if t.role == Role.KV} == {B * 51 * 60}


@pytest.mark.parametrize(("kv_dtype", "token"), [("fp8", 30), ("int4", 15 + 4), ("fp32", 120)])
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_formats_of_the_cache(kv_dtype: str, token: int, form: str) -> None:
    built, plain = trace(one_call(50, 1), kv_dtype=kv_dtype, form=form), trace(one_call(50, 1), form=form)
    assert {t.nbytes for t in built.tensors if t.role == Role.KV} == {51 * token}
    more = int(built.vector_ops.sum() - plain.vector_ops.sum())
    # every element is quantised once and read back once: two operations each
    assert more == (0 if kv_dtype == "fp32" else 4 * 2 * (30 + 51 * 30))


def test_chips_of_a_group_share_heads_and_keep_all_latents() -> None:
    call = Call(position=50, tokens=1, logits=False)
    halves = Scenario(batch=B, dtype="bf16", calls=(call,), parallel=Parallel(tp=2))
    whole, half = trace(one_call(50, 1, batch=B)), trace(halves)
    kept = [sum(t.nbytes for t in b.tensors if t.role == Role.KV) for b in (whole, half)]
    assert kept[0] == kept[1]
    core = [totals(b, is_kind(b, "latent_attention")).flops for b in (whole, half)]
    assert core[0] == 2 * core[1]
    assert kinds(half).count("allreduce") == 2 * 4 + 1
    with pytest.raises(UnsupportedError, match="not modelled in training"):
        trace(Scenario.train(8))


def test_absorbed_and_expanded_are_the_same_function() -> None:
    """In 64-bit floating point, for one head after the other."""
    rng = np.random.default_rng(3)
    tokens, heads, h = 33, 4, 16
    latents, rotated = rng.normal(size=(tokens, U)), rng.normal(size=(tokens, R))
    q, q_rotated = rng.normal(size=(5, heads, h)), rng.normal(size=(5, heads, R))
    w_keys, w_values = rng.normal(size=(heads, h, U)), rng.normal(size=(heads, h, U))
    seen = np.arange(tokens) <= np.arange(tokens - 5, tokens)[:, None]

    def attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        scores = np.where(seen, queries @ keys.T / np.sqrt(h + R), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights @ values / weights.sum(axis=1, keepdims=True)

    for head in range(heads):
        keys, values = latents @ w_keys[head].T, latents @ w_values[head].T
        turned = np.concatenate([q[:, head], q_rotated[:, head]], axis=1)
        expanded = attend(turned, np.concatenate([keys, rotated], axis=1), values)
        into = np.concatenate([q[:, head] @ w_keys[head], q_rotated[:, head]], axis=1)
        absorbed = attend(into, np.concatenate([latents, rotated], axis=1), latents) @ w_values[head].T
        np.testing.assert_allclose(absorbed, expanded, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": "0"}, "latent is 0, expected at least 1"),
        ({"rope": "7"}, "rope is 7, expected an even number"),
        ({"query_latent": "0"}, "query_latent is 0, expected at least 1"),
        ({"form": "absorb"}, "'absorb' is not one of auto, absorbed, expanded"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_options(METHODS["kv_mla"].settings(None, None, None), options)
