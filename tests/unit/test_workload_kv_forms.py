"""Forms of the KV cache, against closed forms and hand counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import chip
from tests.unit.trace_tools import TOY, is_kind, kinds, one_call, operands, totals
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.grid import make_point
from ttt_sim.lower import lower
from ttt_sim.lower.kernels import TRANSFER_STREAM
from ttt_sim.model import Call, Parallel, Scenario
from ttt_sim.ops import Role, Trace
from ttt_sim.simulation import simulate_point
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, state_per_sequence
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

B, KAPPA = 3, 2 * 2 * 16 * 2  # a token of TOY and layer: keys and values of two heads of 16, bf16
ROW = 4 * 16 * 2  # queries of a token, or the output of the core


def trace(method: str, scenario: Scenario, **options: str) -> Trace:
    settings = set_options(METHODS[method].settings(None, None, None), options)
    built = build_trace(TOY, settings, scenario)
    verify(built)
    return built


def per_layer(built: Trace, kind: str) -> tuple[int, int, int]:
    """(FLOPs, bytes read, bytes written) of the ops of a kind in one layer."""
    found = totals(built, is_kind(built, kind) & (built.layer == 0))
    return found.flops, found.read_bytes, found.write_bytes


# --- paged ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "block"), [(1, 16), (16, 16), (17, 16), (150, 16), (150, 1), (150, 64)])
def test_whole_blocks_are_kept(tokens: int, block: int) -> None:
    built = trace("kv_paged", one_call(tokens - 1, 1, batch=B), block_tokens=str(block))
    settings = set_options(METHODS["kv_paged"].settings(None, None, None), {"block_tokens": str(block)})
    kept = sum(t.nbytes for t in built.tensors if t.role == Role.KV)
    assert kept == B * forms.paged_kv_bytes(TOY, tokens, block)
    assert state_per_sequence(TOY, settings, tokens, "bf16").total_bytes == forms.paged_kv_bytes(TOY, tokens, block)


def test_a_step_reads_rows_that_hold_tokens_and_the_table_once_in_each_layer() -> None:
    built = trace("kv_paged", one_call(40, 1, batch=B))
    plain = trace("kv", one_call(40, 1, batch=B))
    table = 8 * B * 3  # 41 tokens are in three blocks
    flops, read, written = per_layer(plain, "attention")
    assert per_layer(built, "attention") == (flops, read + table, written)
    assert int(is_kind(built, "attention").sum()) == TOY.n_layers


def test_an_append_looks_up_the_blocks_that_it_fills() -> None:
    built = trace("kv_paged", one_call(40, 30, batch=B))
    # tokens 40 to 69 are in the blocks from 32, 48 and 64
    assert per_layer(built, "kv_append")[1] == B * 30 * KAPPA + 8 * B * 3


# --- shared prefix ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "shared", "calls"), [(150, "none", 64), (150, "40", 64), (9, "9", 4), (8, "1", 8)])
def test_the_prefix_of_a_prompt_runs_once(tokens: int, shared: str, calls: int) -> None:
    built = trace("kv_prefix", Scenario.prefill(tokens, batch=B, call_tokens=calls), shared_tokens=shared)
    common = tokens // 2 if shared == "none" else int(shared)
    last = 1 if common == tokens else B  # sequences of the last call, which has the head
    head = 2 * last * TOY.d_model * TOY.vocab_size
    linear = forms.linear_flops_per_token(TOY) * (common + B * (tokens - common))
    core = forms.attention_flops(TOY, common) + B * forms.attention_flops(TOY, tokens - common, common)
    assert int(built.flops.sum()) == head + linear + core


@pytest.mark.parametrize("tokens", [1, 5])
def test_all_sequences_read_the_prefix_together(tokens: int) -> None:
    built = trace("kv_prefix", replace(one_call(100, tokens, batch=B), taken_tokens=100), shared_tokens="64")
    ops = np.flatnonzero(is_kind(built, "attention") & (built.layer == 0))
    shared, own = (
        {name: int(getattr(built, name)[op]) for name in ("batch", "m", "n", "pairs", "flops")} for op in ops
    )
    assert shared == {"batch": 1, "m": B * tokens, "n": 64, "pairs": 64 * B * tokens, "flops": 4 * 64 * 64 * B * tokens}
    pairs = 36 * tokens + tokens * (tokens + 1) // 2
    assert own == {"batch": B, "m": tokens, "n": 36 + tokens, "pairs": pairs, "flops": 4 * 64 * B * pairs}
    rows = B * tokens
    reads = rows * 2 * ROW + 64 * KAPPA + B * (36 + tokens) * KAPPA
    sums = rows * 4 * 4  # fp32, one for each head
    assert per_layer(built, "attention")[1:] == (reads, 2 * (rows * ROW + sums))
    joined = totals(built, is_kind(built, "join_parts") & (built.layer == 0))
    assert joined == (0, rows * 4 * (3 * 16 + 7), 2 * (rows * ROW + sums), rows * ROW)


def test_a_prefix_is_kept_once() -> None:
    settings = METHODS["kv_prefix"].settings(None, None, None)
    state = state_per_sequence(TOY, settings, 101, "bf16")
    assert (state.total_bytes, state.shared_bytes) == (51 * 4 * KAPPA, 50 * 4 * KAPPA)
    built = trace("kv_prefix", replace(one_call(100, 1, batch=B), taken_tokens=101))
    kept = sum(t.nbytes for t in built.tensors if t.role == Role.KV)
    assert kept == state.shared_bytes + B * state.total_bytes


def test_a_shared_prefix_saves_bytes_of_a_step_but_no_flops() -> None:
    records = {
        method: simulate_point(make_point("h100", "Qwen3-4B", method, context="32k", batch=8)).record
        for method in ("kv", "kv_prefix")
    }
    plain, shared = records["kv"], records["kv_prefix"]
    assert shared["flops"] == plain["flops"]
    # seven of eight reads of 16384 tokens fall away
    saved = float(str(plain["read_kv_bytes"])) - float(str(shared["read_kv_bytes"]))
    model = make_point("h100", "Qwen3-4B", "kv").model
    assert saved == 7 * 16384 * forms.kv_bytes_per_token(model)
    assert saved == forms.decode_bytes_kv(model, 40000, 8) - forms.prefix_step_bytes(model, 40000, 16384, 8)


def join(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Outputs (rows, h) and log-sums of exponentials (rows,) of attention over parts of the keys, as over all."""
    top = np.max([sums for _, sums in parts], axis=0)
    weights = [np.exp(sums - top) for _, sums in parts]
    return sum(w[:, None] * out for (out, _), w in zip(parts, weights, strict=True)) / sum(weights)[:, None]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = q @ k.T / np.sqrt(q.shape[1])
    top = scores.max(axis=1)
    exps = np.exp(scores - top[:, None])
    return exps @ v / exps.sum(axis=1)[:, None], top + np.log(exps.sum(axis=1))


def test_joined_parts_are_attention_over_all_keys() -> None:
    rng = np.random.default_rng(7)
    q, k, v = rng.normal(size=(6, 16)) * 3, rng.normal(size=(50, 16)) * 3, rng.normal(size=(50, 16))
    whole, _ = attend(q, k, v)
    np.testing.assert_allclose(join([attend(q, k[:31], v[:31]), attend(q, k[31:], v[31:])]), whole, atol=1e-13)


# --- behind the main memory -------------------------------------------------------------------------------------------


def test_keys_and_values_cross_the_link_in_every_step() -> None:
    for prefetch in ("true", "false"):
        built = trace("kv_offload", one_call(64, 1, batch=2), prefetch=prefetch)
        traffic = lower(built, chip("tiny_tiers")).traffic
        rows = 64 if prefetch == "true" else 65  # its own row needs not come back
        assert int(traffic.far_read_bytes.sum()) == 4 * 2 * rows * KAPPA
        assert int(traffic.far_write_bytes.sum()) == 4 * 2 * KAPPA
        names = {t.name for t, n in zip(built.tensors, traffic.spilled_bytes, strict=True) if n}
        assert names == {f"layers.{layer}.kv" for layer in range(4)}


def test_fetching_ahead_runs_beside_other_work_and_waits_for_a_buffer() -> None:
    built = trace("kv_offload", one_call(64, 1, batch=2))
    assert kinds(built).count("kv_fetch") == 4
    fetches = np.flatnonzero(is_kind(built, "kv_fetch"))
    assert [operands(built, int(op), "write")[0][:2] for op in fetches] == [
        ("kv_near.0", 0), ("kv_near.1", 0), ("kv_near.0", 1), ("kv_near.1", 1)
    ]  # fmt: skip
    lowered = lower(built, chip("tiny_tiers"))
    kernels = lowered.kernels
    assert set(kernels.stream[kernels.of_op[fetches]]) == {TRANSFER_STREAM}
    third, core = kernels.of_op[fetches[2]], kernels.of_op[np.flatnonzero(is_kind(built, "attention"))[0]]
    assert [int(third), int(core)] in kernels.edges.tolist()  # it overwrites what the first core reads
    times = {
        prefetch: simulate_point(
            make_point("tiny_tiers", "toy", "kv_offload", context=64, chunk=16, options={"prefetch": prefetch})
        ).record["cycles"]
        for prefetch in (True, False)
    }
    assert int(str(times[True])) < int(str(times[False]))


def test_a_link_to_the_host_reaches_its_memory() -> None:
    record = simulate_point(make_point("groq_lpu", "toy", "kv_offload", context=4096)).record
    assert record["fits"]
    assert record["spilled_bytes"] == 4 * KAPPA * (4096 + 1024 + 1)  # up to the step after the last
    # 31.5 GB/s carry what is held of the keys and values of the mean step
    assert float(str(record["seconds"])) >= 4 * KAPPA * 4096 / 31.5e9


def test_chips_without_a_memory_behind_the_main_one_say_so() -> None:
    record = simulate_point(make_point("tpu_v7", "toy", "kv_offload", context=64)).record
    assert not record["fits"]
    assert "neither a memory of scope backing nor a link to the host" in str(record["missing"])


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kv_prefix", "kv_offload"])
def test_context_parallel_chips_are_refused(method: str) -> None:
    call = (Call(position=64, tokens=1, logits=True),)
    scenario = Scenario(batch=1, dtype="bf16", calls=call, parallel=Parallel(cp=2))
    with pytest.raises(UnsupportedError, match="context-parallel"):
        trace(method, scenario)


@pytest.mark.parametrize("method", ["kv_paged", "kv_prefix", "kv_offload"])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8", "int4"])
def test_other_formats_are_counted_like_those_of_a_plain_cache(method: str, kv_dtype: str) -> None:
    call = replace(one_call(64, 1), taken_tokens=64)
    plain, other = (
        build_trace(TOY, METHODS[name].settings(None, kv_dtype, None), call) for name in ("kv_quant", method)
    )
    kept = [sum(t.nbytes for t in b.tensors if t.role == Role.KV and "table" not in t.name) for b in (plain, other)]
    token = kept[0] // 65
    assert kept[1] == (80 * token if method == "kv_paged" else kept[0])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kv_paged", {"block_tokens": "0"}, "block_tokens is 0, expected at least 1"),
        ("kv_prefix", {"shared_tokens": "0"}, "shared_tokens is 0, expected at least 1 or none"),
        ("kv_offload", {"prefetch": "yes"}, "must be true or false"),
    ],
)
def test_wrong_options_are_refused(method: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_options(METHODS[method].settings(None, None, None), options)
