"""A context shared by several chips: what each method passes between them, and why some cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.trace_tools import TOY, is_kind, kinds, totals
from ttt_sim.chip import Chip, Link
from ttt_sim.config import load_chip
from ttt_sim.errors import UnsupportedError
from ttt_sim.grid import make_point
from ttt_sim.lower import lower
from ttt_sim.model import Parallel, Scenario
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.reference.meter import OpCount
from ttt_sim.reference.states import delta_chunked, delta_recurrent, mamba2_recurrent
from ttt_sim.simulation import simulate_point
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

B, M, RANKS = 2, 32, 4  # sequences, tokens of a part, chips
MODEL = replace(TOY, d_model=64, n_heads=8, n_kv_heads=4)
L = MODEL.n_layers
PASSED = ("kv_paged", "kv_mla", "gated_deltanet", "mamba2")
LATENT = {"latent": "16", "rope": "8"}
DELTA = {"heads": "4", "head_dim": "8", "chunk_tokens": "8"}  # d_k 8, d_v 16
MAMBA = {"head_dim": "16", "state_dim": "8", "chunk_tokens": "8"}  # 8 heads
OPTIONS: dict[str, dict[str, str]] = {"kv_mla": LATENT, "gated_deltanet": DELTA, "mamba2": MAMBA}


def linked() -> Chip:
    """tiny_gpu with a link to others."""
    wire = Link(name="wire", topology="switch", bytes_per_s=1e9, latency_s=1e-6)
    return replace(load_chip("tiny_gpu"), links=(wire,))


def trace_of(method: str, scenario: Scenario, **more: str) -> Trace:
    settings = set_options(METHODS[method].settings(None, None, None), OPTIONS.get(method, {}) | more)
    built = build_trace(MODEL, settings, scenario)
    verify(built)
    return built


def prompt(parallel: Parallel, tokens: int = RANKS * M) -> Scenario:
    return Scenario.prefill(tokens, batch=B, parallel=parallel)


def step(parallel: Parallel, position: int = 100) -> Scenario:
    return Scenario.decode((position,), batch=B, parallel=parallel)


def passed_bytes(method: str, tp: int) -> int:
    """Bytes that a chip sends on in a prompt, all layers, by hand; bf16 rows and fp32 states."""
    e = 2
    if method == "kv_paged":
        return L * (RANKS - 1) * B * M * 2 * (4 // tp) * MODEL.head_dim * e
    if method == "kv_mla":  # every chip of a tensor-parallel group keeps and passes all latents
        return L * (RANKS - 1) * B * M * (16 + 8) * e
    if method == "gated_deltanet":
        heads, d_k, d_v = 4 // tp, 8, 16
        return L * B * (heads * d_k * d_v * 4 + 3 * heads * (2 * d_k + d_v) * e)
    inner, state = 2 * 64 // tp, 8
    return L * B * (inner * state * 4 + 3 * (inner + 2 * state) * e)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("method", PASSED)
def test_bytes_on_links_by_hand(method: str, tp: int) -> None:
    built = trace_of(method, prompt(Parallel(tp=tp, cp=RANKS)))
    around = is_kind(built, "kv_ring") | is_kind(built, "delta_scan")
    owner = np.repeat(np.arange(built.n_ops), np.diff(built.read_ptr))
    assert int(built.read_bytes[around[owner]].sum()) == passed_bytes(method, tp)
    sums = 0 if tp == 1 else 2 * (2 * L + 1) * B * M * 64 // 2 * 2  # 2 (n - 1) / n of rows of d in bf16
    logits = 0 if tp == 1 else B * MODEL.vocab_size // 2 * 2
    assert int(lower(built, linked()).work.link_bytes.sum()) == passed_bytes(method, tp) + sums + logits


def test_latents_around_the_ring_are_fewer_than_keys_and_values() -> None:
    full, latents = (
        int(lower(trace_of(method, prompt(Parallel(cp=RANKS))), linked()).work.link_bytes.sum())
        for method in ("kv_paged", "kv_mla")
    )
    per_token = forms.latent_bytes_per_token(MODEL, 16, 8)
    assert latents == B * (RANKS - 1) * M * per_token
    assert full == B * (RANKS - 1) * M * forms.kv_bytes_per_token(MODEL)
    assert forms.latent_bytes_per_token(MODEL, 512, 64) == L * 576 * 2


# --- caches -----------------------------------------------------------------------------------------------------------


def test_paged_parts_are_those_of_a_plain_cache_and_their_tables() -> None:
    for scenario in (prompt(Parallel(cp=RANKS)), step(Parallel(cp=RANKS))):
        plain, paged = trace_of("kv", scenario), trace_of("kv_paged", scenario)
        assert kinds(paged) == kinds(plain)
        assert (paged.pairs == plain.pairs).all()
        assert (paged.flops == plain.flops).all()
    blocks = M // 16
    # of each layer: the entries of the blocks that are filled, and of those that the own part is read from
    built = trace_of("kv_paged", prompt(Parallel(cp=RANKS)))
    names = np.array([built.tensors[i].name == "block_table" for i in built.read_tensor])
    assert int(built.read_bytes[names].sum()) == L * 2 * B * blocks * 8
    held = next(t for t in built.tensors if t.name == "block_table")
    assert held.shape == (B, blocks, 8)


@pytest.mark.parametrize(("position", "keys", "blocks"), [(100, 26, 2), (127, 32, 2), (128, 33, 3)])
def test_a_paged_step_reads_the_blocks_of_its_part(position: int, keys: int, blocks: int) -> None:
    built = trace_of("kv_paged", step(Parallel(cp=RANKS), position))
    cores = is_kind(built, "attention")
    assert set(built.n[cores]) == set(built.pairs[cores]) == {keys}
    reads = [built.read_bytes[a:b] for a, b in zip(built.read_ptr[:-1][cores], built.read_ptr[1:][cores], strict=True)]
    assert {int(read[-1]) for read in reads} == {B * blocks * 8}
    assert kinds(built).count("allreduce") == L


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_flops_of_latents_in_parts(form: str) -> None:
    """The last chip sees what one chip would see that has all tokens before it."""
    built = trace_of("kv_mla", prompt(Parallel(cp=RANKS)), form=form)
    cores = is_kind(built, "latent_attention")
    assert cores.sum() == L * RANKS
    assert built.pairs[cores].reshape(L, RANKS).tolist() == [[M * (M + 1) // 2, M * M, M * M, M * M]] * L
    attention = cores | np.isin(
        kinds(built), ["q_proj", "latent_proj", "absorb_q", "absorb_out", "latent_up", "o_proj"]
    )
    expected = forms.latent_attention_flops(MODEL, M, (RANKS - 1) * M, latent=16, rope=8, absorbed=form == "absorbed")
    assert totals(built, attention).flops == B * expected


def test_a_latent_step_joins_values_not_latents() -> None:
    built = trace_of("kv_mla", step(Parallel(cp=RANKS)))
    joins = is_kind(built, "allreduce")
    assert set(built.m[joins]) == {B * MODEL.n_heads * MODEL.head_dim}
    assert set(built.n[is_kind(built, "latent_attention")]) == {26}
    assert next(t for t in built.tensors if t.name == "layers.0.kv").shape == (B, 26, 24)


@pytest.mark.parametrize("method", ["kv", "kv_paged", "kv_mla", "ttt"])
def test_a_question_meets_a_part_of_the_keys_on_each_chip(method: str) -> None:
    held, rows = 96, 8
    one = trace_of(method, Scenario.ask(held, rows, batch=B))
    part = trace_of(method, Scenario.ask(held, rows, batch=B, parallel=Parallel(cp=2)))
    core = "latent_attention" if method == "kv_mla" else "attention"
    assert set(part.n[is_kind(part, core)]) == {(held + rows) // 2}
    assert set(part.pairs[is_kind(part, core)]) == {rows * (held + rows) // 2}
    assert kinds(part).count("allreduce") == L
    others = [kind for kind in kinds(part) if kind != "allreduce"]
    assert others == kinds(one)


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_delta_state_passes_through_a_part_as_a_product_and_a_sum() -> None:
    """Outputs and state of the second half, from no state and from the identity side by side."""
    rng = np.random.default_rng(5)
    tokens, half, d_k, d_v = 32, 16, 4, 6
    q, k = (rng.standard_normal((tokens, d_k)) for _ in range(2))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    v, a, b = rng.standard_normal((tokens, d_v)), rng.uniform(0.8, 1, tokens), rng.uniform(0, 1, tokens)
    out, last = delta_recurrent(q, k, v, a, b, np.zeros((d_k, d_v)), OpCount())
    _, before = delta_recurrent(q[:half], k[:half], v[:half], a[:half], b[:half], np.zeros((d_k, d_v)), OpCount())
    wide = np.concatenate([v[half:], np.zeros((tokens - half, d_k))], axis=1)
    start = np.concatenate([np.zeros((d_k, d_v)), np.eye(d_k)], axis=1)
    part, left = delta_chunked(q[half:], k[half:], wide, a[half:], b[half:], start, OpCount(), chunk=8)
    assert np.allclose(part[:, :d_v] + part[:, d_v:] @ before, out[half:], atol=1e-12)
    assert np.allclose(left[:, :d_v] + left[:, d_v:] @ before, last, atol=1e-12)


def test_a_mamba_state_passes_through_a_part_as_a_decay_and_a_sum() -> None:
    rng = np.random.default_rng(6)
    tokens, half, heads, p, n = 24, 12, 2, 3, 4
    x, b, read = rng.standard_normal((tokens, heads, p)), *(rng.standard_normal((tokens, n)) for _ in range(2))
    a, dt = (rng.uniform(0.5, 1, (tokens, heads)) for _ in range(2))
    zero = np.zeros((heads, p, n))
    _, last = mamba2_recurrent(x, a, dt, b, read, zero, OpCount())
    _, before = mamba2_recurrent(x[:half], a[:half], dt[:half], b[:half], read[:half], zero, OpCount())
    _, left = mamba2_recurrent(x[half:], a[half:], dt[half:], b[half:], read[half:], zero, OpCount())
    assert np.allclose(a[half:].prod(axis=0)[:, None, None] * before + left, last, atol=1e-12)


def test_flops_of_a_part_of_gated_deltanet() -> None:
    heads, d_k, d_v, chunk = 4, 8, 16, 8
    built = trace_of("gated_deltanet", prompt(Parallel(cp=RANKS)))
    ops = np.isin(kinds(built), ["delta_rule", "state_join", "state_read"])
    assert totals(built, ops).flops == L * B * heads * forms.delta_net_part_flops(M, chunk, d_k, d_v)
    by_hand = M // chunk * (chunk**2 * (5 * d_k + 3 * (d_v + d_k)) + 6 * chunk * d_k * (d_v + d_k))
    assert forms.delta_net_part_flops(M, chunk, d_k, d_v) == by_hand + 2 * d_v * d_k * d_k + 2 * M * d_v * d_k
    order = [kind for kind in kinds(built) if kind in ("short_conv", "kv_ring", "delta_rule", "delta_scan")]
    assert order == ["kv_ring", "short_conv", "delta_rule", "delta_scan"] * L


def test_a_part_of_mamba_passes_its_states_twice() -> None:
    """Products are those of one chip with as many tokens; states go from chunk to chunk once more, and on once."""
    heads, head, state, chunks = 8, 16, 8, M // 8
    one, part = trace_of("mamba2", Scenario.prefill(M, batch=B)), trace_of("mamba2", prompt(Parallel(cp=RANKS)))
    assert totals(part, np.ones(part.n_ops, bool)).flops == totals(one, np.ones(one.n_ops, bool)).flops
    elements = B * heads * head * state
    lanes = [totals(built, is_kind(built, "state_pass")).vector_ops for built in (one, part)]
    assert lanes == [L * 2 * elements * chunks, L * 2 * elements * (2 * chunks + 1)]
    # scores do not wait for the state that arrives
    first = kinds(part).index("delta_scan")
    assert kinds(part)[first : first + 3] == ["delta_scan", "ssm_scores", "ssm_mix"]


@pytest.mark.parametrize("method", ["gated_deltanet", "mamba2"])
def test_every_chip_decodes_with_the_whole_state(method: str) -> None:
    one, part = (trace_of(method, step(Parallel(cp=cp))) for cp in (1, RANKS))
    assert kinds(one) == kinds(part)
    assert [t.nbytes for t in one.tensors] == [t.nbytes for t in part.tensors]
    assert not is_kind(part, "delta_scan").any()


@pytest.mark.parametrize("method", ["gated_deltanet", "mamba2"])
def test_the_state_after_a_prompt_is_kept(method: str) -> None:
    built = trace_of(method, prompt(Parallel(cp=RANKS)))
    names = [t.name for t in built.tensors if t.role == Role.FAST_WEIGHT]
    written = {built.tensors[i].name for i in built.write_tensor}
    assert names == [f"layers.{layer}.state" for layer in range(L)]
    assert set(names) <= written
    assert set(built.phase) == {int(Phase.FORWARD)}


@pytest.mark.parametrize("method", PASSED)
@pytest.mark.parametrize("phase", ["prefill", "ask", "decode"])
def test_engines_agree_and_a_part_is_sooner_done(method: str, phase: Any) -> None:
    seconds = {}
    for cp in (1, RANKS):
        point = make_point(
            "h100", "Qwen3-1.7B", method, phase=phase, context=16384, question=16, parallel=Parallel(cp=cp)
        )
        record = simulate_point(replace(point, compare_engines=True)).record
        assert record["fits"], record
        seconds[cp] = float(str(record["seconds"]))
    if phase == "prefill":
        assert seconds[1] / RANKS < seconds[RANKS] < seconds[1] / 2


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ttt_linear", "ttt_mlp", "titans", "lact", "ttt_e2e"])
@pytest.mark.parametrize("make", [prompt, step])
def test_updates_from_the_weights_before_are_refused_with_the_reason(method: str, make: Any) -> None:
    with pytest.raises(UnsupportedError, match="gradient is taken at the weights that the chunk before left"):
        build_trace(MODEL, METHODS[method].settings(None, None, None), make(Parallel(cp=2)))


@pytest.mark.parametrize("method", ["lora", "lora_ttt", "fine_tuning"])
@pytest.mark.parametrize("phase", ["ask", "decode"])
def test_a_context_in_weights_leaves_nothing_to_share(method: str, phase: Any) -> None:
    point = make_point("h100", "toy", method, phase=phase, context=1024, question=16, parallel=Parallel(cp=2))
    record = simulate_point(point).record
    assert not record["fits"]
    assert "the context is in the weights" in str(record["missing"])


@pytest.mark.parametrize("method", ["lora", "fine_tuning", "q_ttt", "ttt_outer"])
def test_training_is_refused_with_the_reason(method: str) -> None:
    point = make_point("h100", "toy", method, phase="train", context=1024, ttt="toy", parallel=Parallel(cp=2))
    assert "gradients of keys and values back around the ring" in str(simulate_point(point).record["missing"])


@pytest.mark.parametrize("phase", ["ask", "decode"])
def test_passages_are_a_short_context(phase: Any) -> None:
    point = make_point("h100", "toy", "rag", phase=phase, context=4096, question=16, parallel=Parallel(cp=2))
    assert "no long context" in str(simulate_point(point).record["missing"])


def test_a_window_after_a_question_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="each of which has a part of it"):
        build_trace(MODEL, METHODS["kv_window"].settings(32, None, None), Scenario.ask(64, 8, parallel=Parallel(cp=2)))
