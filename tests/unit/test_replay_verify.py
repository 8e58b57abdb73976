"""Verification as a whole: it passes on every chip and method, and says what is wrong when something is."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from ttt_sim.config import load_chip
from ttt_sim.data_files import names
from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.grid import method_on
from ttt_sim.lower import MAPPERS
from ttt_sim.model import Carry, MethodSettings, TTTSettings, WeightWrite
from ttt_sim.model_config import load_model, load_ttt
from ttt_sim.ops import KIND, OP_KINDS
from ttt_sim.reference.decoder import random_parameters, random_tokens
from ttt_sim.replay import verify as module
from ttt_sim.replay.describe import describe
from ttt_sim.replay.kernels import KERNELS
from ttt_sim.replay.order import schedule_order
from ttt_sim.replay.settings import decoder_shape
from ttt_sim.replay.verify import Plan, Verdict, first_miscount, reference_run, verify
from ttt_sim.simulation import simulate_trace
from ttt_sim.workload import CONTEXT_METHODS, METHODS, build_trace

TOY, TTT = load_model("toy"), load_ttt("toy")
CHIPS = [name for name in names("hw_configs", ".yaml") if load_chip(name).execution in MAPPERS]


def settings(method: str, ttt: TTTSettings = TTT, *, kv_dtype: str | None = None) -> MethodSettings:
    return METHODS[method].settings(64, kv_dtype, ttt)


def plan(method: MethodSettings, chip: str = "tiny_gpu", **changes: object) -> Plan:
    """A prompt of two calls that leaves a chunk open, and steps that complete it."""
    usual = Plan(
        chip=load_chip(chip), model=TOY, method=method, prefill_tokens=90, call_tokens=64, decode_tokens=8, batch=2
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def test_every_op_kind_of_the_methods_that_can_be_executed_has_a_kernel() -> None:
    assert set(KERNELS) == {kind.name for kind in OP_KINDS if kind.spec[0] in "FUC"}


def test_other_methods_are_not_executed() -> None:
    with pytest.raises(ConfigError, match="fine_tuning can be simulated but not executed op by op; methods: kv, "):
        verify(replace(plan(settings("kv")), method=METHODS["fine_tuning"].settings(None, None, None)))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("method", ["kv_quant", "ttt_window"])
def test_passes_on_every_chip(chip: str, method: str) -> None:
    """In the chip's own format; products of integers have no reference."""
    loaded = load_chip(chip)
    dtype = loaded.default_dtype
    chosen = plan(method_on(loaded, method, window_tokens=64, kv_dtype=None, ttt=TTT, dtype=dtype), chip, dtype=dtype)
    if dtype.startswith("int"):
        with pytest.raises(ConfigError, match=f"{dtype}.*can be simulated but not executed"):
            verify(chosen)
    else:
        assert verify(chosen).failure is None


@pytest.mark.parametrize("method", CONTEXT_METHODS)
def test_digests_do_not_depend_on_the_chip_or_the_schedule(method: str) -> None:
    """What is computed is the method's business; tiles, order and overlap are the chip's."""
    runs = [
        verify(plan(settings(method), "h100")),
        verify(plan(settings(method), "tiny_gpu")),
        verify(plan(settings(method), "tiny_gpu", overlap=False, detail=64, engine="simpy")),
    ]
    assert [run.failure for run in runs] == [None] * 3
    assert runs[0].digests == runs[1].digests == runs[2].digests
    assert runs[0].cycles != runs[1].cycles


@pytest.mark.parametrize("carry", get_args(Carry))
@pytest.mark.parametrize("write", get_args(WeightWrite))
def test_passes_for_every_carry_and_write(carry: Carry, write: WeightWrite) -> None:
    ttt = replace(TTT, carry=carry, weight_write=write)
    assert verify(plan(settings("ttt_window", ttt))).failure is None


@pytest.mark.parametrize(
    "changes",
    [
        {"projection": False},
        {"contraction": "outer_first"},
        {"contraction": "outer_first", "weight_write": "fused", "clip": 0.5},
        {"contraction": "outer_first", "carry": "online", "weight_write": "master"},
        {"target": "input_embed", "carry": "ring"},
        {"target": "input_embed", "carry": "online", "convolution": "causal"},
        {"convolution": "causal", "clip": 0.25},
        {"chunk_tokens": 1},
        {"chunk_tokens": 3, "carry": "online"},
        {"chunk_tokens": 3, "carry": "keep_z"},
        {"chunk_tokens": 200},
        {"fast_dtype": "fp32"},
        {"fast_dtype": "fp16", "weight_write": "master"},
        {"fast_dtype": "fp8", "rate": 0.5},
        {"layers": (0, 1, 2, 3)},
        {"update_rows": 16},
        {"update_rows": 16, "projection": False, "target": "input_embed", "carry": "keep_z"},
        {"update_rows": 16, "projection": False, "carry": "ring", "weight_write": "fused"},
        {"update_rows": 63, "contraction": "outer_first", "carry": "online", "weight_write": "master", "clip": 0.5},
        {"update_rows": 1, "contraction": "outer_first", "weight_write": "fused"},
    ],
    ids=str,
)
def test_passes_for_every_setting(changes: dict[str, object]) -> None:
    ttt = replace(TTT, **changes)  # type: ignore[arg-type]
    assert verify(plan(settings("ttt", ttt), "h100")).failure is None


@pytest.mark.parametrize("method", ["kv_quant", "kv_window"])
@pytest.mark.parametrize("kv_dtype", ["fp32", "fp16", "fp8", "int8", "fp4", "int4"])
def test_passes_for_every_cache_format(method: str, kv_dtype: str) -> None:
    assert verify(plan(settings(method, kv_dtype=kv_dtype))).failure is None


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_passes_in_other_formats(dtype: str) -> None:
    assert verify(plan(settings("ttt"), "h100", dtype=dtype)).failure is None


def test_a_model_of_another_family_passes() -> None:
    """No norms of queries and keys, a head of its own, heads that do not fill d_model."""
    llama = replace(TOY, family="llama", qk_norm=False, tied_embeddings=False, n_heads=6, n_kv_heads=3)
    assert verify(plan(settings("ttt_window"), model=llama)).failure is None


def test_a_shadow_bank_lets_a_version_be_written_beside_the_one_in_use() -> None:
    chip = load_chip("tiny_gpu")
    banked = replace(chip, writability=replace(chip.writability, shadow_bank=True))
    verdict = verify(replace(plan(settings("ttt")), chip=banked))
    assert verdict.failure is None
    assert verdict.digests == verify(plan(settings("ttt"))).digests


def test_hardware_order_differs_a_little() -> None:
    """Float32 accumulation moves some bf16 results by one step, which spreads through layers, but not far."""
    verdict = verify(plan(settings("kv_window"), "h100", accumulate="hardware"))
    assert verdict.failure is None
    assert 0 < verdict.n_different < 0.2 * verdict.n_elements
    assert 0 < verdict.largest_error < 0.1
    assert "differ from the exact sums" in describe(verdict)


# --- verification can fail --------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, name: str, value: object, method: str = "ttt_window") -> Verdict:
    monkeypatch.setattr(module, name, value)
    verdict = verify(plan(settings(method)))
    assert not verdict.passed
    assert "FAIL" in describe(verdict)
    return verdict


def test_a_schedule_out_of_order_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = failing(monkeypatch, "schedule_order", lambda *schedule: schedule_order(*schedule)[::-1])
    assert verdict.failure is not None
    assert "lm_head" in verdict.failure
    assert "nothing was written" in verdict.failure


def test_a_missing_edge_between_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_edges(*args, **options):
        result = simulate_trace(*args, **options)
        kernels = replace(result.lowered.kernels, edges=result.lowered.kernels.edges[:0])
        return replace(result, lowered=replace(result.lowered, kernels=kernels))

    verdict = failing(monkeypatch, "simulate_trace", without_edges)
    assert verdict.failure is not None
    assert "nothing makes op" in verdict.failure


@pytest.mark.parametrize(
    ("layer", "first"),
    [
        (
            1,
            (
                "mlp_residual (forward, call 0, layer 1)",
                "residual.2 version 0",
                "sequence 0, token 0 (chunk 0), column",
            ),
        ),
        (
            2,
            (
                "weight_write (weight_write, call 0, layer 2, chunk 0)",
                "layers.2.fast_weight version 1",
                "element (0, 0,",
            ),
        ),
    ],
)
def test_the_first_tensor_that_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, layer: int, first: tuple[str, ...]
) -> None:
    """The reference gets one gain of a norm changed: in a plain layer its output is the first to differ, in a TTT layer
    the weight that is written before the output leaves."""

    def changed(shape, scenario, parameters, tokens):
        name = f"layers.{layer}.mlp_norm.weight"
        gain = parameters[name].copy()
        gain[5] *= 2
        return reference_run(shape, scenario, {**parameters, name: gain}, tokens)

    verdict = failing(monkeypatch, "reference_run", changed)
    assert verdict.failure is not None
    for words in first:
        assert words in verdict.failure
    assert verdict.n_different > 0


def test_a_miscounted_op_is_named() -> None:
    p = plan(settings("ttt"))
    shape, scenario = decoder_shape(p.model, p.method, p.dtype), p.scenario()
    trace = build_trace(p.model, p.method, scenario)
    parameters = random_parameters(shape, 0)
    counts = reference_run(shape, scenario, parameters, random_tokens(shape, 0, 2, 98)).counts
    assert first_miscount(trace, counts) is None
    op = int(np.flatnonzero(trace.kind == KIND["delta_gemm"])[3])
    flops = trace.flops.copy()
    flops[op] += 2
    wrong = first_miscount(replace(trace, flops=flops), counts)
    assert wrong is not None
    assert f"op {op} delta_gemm" in wrong
    assert f"states {flops[op]} FLOPs, the reference was seen to do {trace.flops[op]}" in wrong
    assert "that the reference has" in str(first_miscount(trace, [*counts, counts[-1]]))
    assert "no such op" in str(first_miscount(trace, counts[1:]))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_executed_is_refused() -> None:
    with pytest.raises(ConfigError, match="'int8' can be simulated but not executed"):
        verify(plan(settings("kv"), "h100", dtype="int8"))
    with pytest.raises(WorkloadError, match="take a smaller model or fewer tokens"):
        verify(plan(settings("kv"), "h100", model=load_model("Qwen3-4B")))
    with pytest.raises(WorkloadError, match="FLOPs, at most"):
        verify(plan(settings("kv"), prefill_tokens=60_000, call_tokens=8192))
    with pytest.raises(ConfigError, match="accumulation 'fast' is not one of exact, hardware"):
        verify(plan(settings("kv"), accumulate="fast"))
    with pytest.raises(ConfigError, match="simulated but not executed: head_dim: is 15, expected an even number"):
        verify(plan(settings("kv"), model=replace(load_model("toy"), head_dim=15)))
    for seed in (-1, 1 << 63, 1 << 70):
        with pytest.raises(ConfigError, match=f"seed {seed} is not between 0 and 9223372036854775807"):
            verify(plan(settings("kv"), seed=seed))


def test_overflow_names_the_op_and_the_format() -> None:
    ttt = replace(TTT, rate=1e6, fast_dtype="fp16")
    with pytest.raises(
        WorkloadError, match=r"cannot be executed in fp16: .* 65504 in size, the largest number of float16"
    ):
        verify(plan(settings("ttt", ttt), "h100", dtype="fp16"))
