"""The lifecycle of changing weights: traces against hand counts and closed forms, records on chips, forms in NumPy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.trace_tools import TOY, is_kind, kinds, totals
from ttt_sim.config import load_chip
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.lifecycle import (
    BREAKEVEN_COLUMNS,
    COLUMNS,
    FORM_COLUMNS,
    OPERATIONS,
    Lifecycle,
    LifecycleData,
    run_lifecycle,
)
from ttt_sim.model import KVSettings, MethodSettings, Model, TTTSettings, shard
from ttt_sim.model_config import load_model
from ttt_sim.ops import Role, Trace
from ttt_sim.reference.formats import BFLOAT16, round_to
from ttt_sim.reference.weight_forms import (
    add_and_subtract,
    add_and_subtract_integers,
    apply_kernel,
    apply_merged,
    apply_split,
)
from ttt_sim.results import Result
from ttt_sim.simulation import simulate_trace
from ttt_sim.trace_check import verify
from ttt_sim.workload import closed_forms
from ttt_sim.workload.lifecycle import (
    FORMS,
    HASHES,
    Form,
    Held,
    apply_step,
    fork,
    fork_shared,
    hash_kv,
    hash_state,
    log,
    reject,
    replay_factors,
    reset,
    restore,
    share_blocks,
    share_prefix,
    snapshot,
    subtract,
    subtract_logged,
    swap_in,
    swap_out,
)

BATCH, CHUNK, WINDOW, CONTEXT = 3, 32, 16, 100
QWEN = load_model("Qwen3-4B")

#: Every operation as the tests call it.
BUILT: dict[str, Callable[[Held], Trace | None]] = {
    "snapshot": snapshot,
    "restore": restore,
    "subtract": subtract,
    "subtract_logged": subtract_logged,
    "replay_factors": lambda h: replay_factors(h, 3),
    "hash_weights": lambda h: hash_state(h, "weights", "xxh3"),
    "hash_factors": lambda h: hash_state(h, "factors", "blake3"),
    "hash_kv": lambda h: hash_kv(h, 7, "xxh3"),
    "log_record": lambda h: log(h, "record"),
    "log_tokens": lambda h: log(h, "tokens"),
    "log_factors": lambda h: log(h, "factors"),
    "swap_out": swap_out,
    "swap_in": swap_in,
    "fork": lambda h: fork(h, 4),
    "fork_shared": lambda h: fork_shared(h, 4),
    "reject": lambda h: reject(h, 5),
    "reset": reset,
    "share_prefix": share_prefix,
    "share_blocks": share_blocks,
    "merged": lambda h: apply_step(h, "merged"),
    "split": lambda h: apply_step(h, "split"),
    "kernel": lambda h: apply_step(h, "kernel", 40),
}


def held(model: Model = TOY, *, batch: int = BATCH, window: int | None = WINDOW, **ttt: Any) -> Held:
    defaults: dict[str, Any] = {"chunk_tokens": CHUNK, "weight_write": "fused"}
    defaults |= {"layers": (0, 2)} if model is TOY else {}
    settings = MethodSettings(
        name="ttt_window", kv=KVSettings(window_tokens=window), ttt=replace(TTTSettings(), **(defaults | ttt))
    )
    return Held(model=model, settings=settings, batch=batch, dtype="bf16", context_tokens=CONTEXT)


def moved(trace: Trace | None) -> tuple[Any, Any]:
    assert trace is not None
    verify(trace)
    return int(trace.read_bytes.sum()), int(trace.write_bytes.sum())


# --- hand counts: two TTT layers of 64 x 192, three sequences, chunks of 32, a window of 16 ---------------------------

PHI = 2 * 64 * 192 * 2
CARRY = 2 * 2 * 31 * 64 * 2  # inputs and targets
KEPT = 4 * 16 * (2 * 2 * 16 * 2)  # four layers, sixteen tokens, keys and values of two heads
FACTORS = 2 * 32 * (64 + 192) * 2
TRAINED = 2 * 64 * 192 * 2
TABLE = 8  # one block of sixteen tokens


@pytest.mark.parametrize(
    ("operation", "read", "written"),
    [
        ("snapshot", BATCH * (PHI + CARRY + KEPT), BATCH * (PHI + CARRY + KEPT)),
        ("restore", BATCH * (PHI + CARRY + KEPT), BATCH * (PHI + CARRY + KEPT)),
        ("subtract", BATCH * 2 * PHI, BATCH * PHI),
        ("subtract_logged", BATCH * (PHI + FACTORS), BATCH * PHI),
        ("replay_factors", TRAINED + BATCH * 3 * (PHI + FACTORS), BATCH * 4 * PHI),
        ("hash_weights", BATCH * PHI, BATCH * 2 * 8),
        ("hash_factors", BATCH * FACTORS, BATCH * 2 * 2 * 32),
        ("hash_kv", BATCH * 4 * 7 * 128, BATCH * 4 * 8),
        ("log_record", 0, BATCH * 2 * 76),
        ("log_tokens", 0, BATCH * 32 * 4),
        ("log_factors", BATCH * FACTORS, BATCH * FACTORS),
        ("swap_out", BATCH * (PHI + CARRY + KEPT), BATCH * (PHI + CARRY + KEPT)),
        ("swap_in", BATCH * (PHI + CARRY + KEPT), BATCH * (PHI + CARRY + KEPT)),
        ("fork", BATCH * (PHI + CARRY + KEPT), 3 * BATCH * (PHI + CARRY + KEPT)),
        ("fork_shared", BATCH * (CARRY + TABLE), 3 * BATCH * (CARRY + TABLE)),
        ("reject", BATCH * (PHI + CARRY + 4 * 5 * 128), BATCH * (PHI + CARRY + 4 * 5 * 128)),
        ("reset", TRAINED, BATCH * PHI),
        ("share_prefix", PHI + KEPT, BATCH * (PHI + KEPT)),
        ("share_blocks", TABLE, BATCH * TABLE),
    ],
)
def test_bytes_by_hand(operation: str, read: int, written: int) -> None:
    assert moved(BUILT[operation](held())) == (read, written)


def test_flops_by_hand() -> None:
    logged, replayed = subtract_logged(held()), replay_factors(held(), 3)
    assert logged is not None
    assert replayed is not None
    assert int(logged.flops.sum()) == 2 * BATCH * 2 * 32 * 64 * 192
    assert int(replayed.flops.sum()) == 3 * int(logged.flops.sum())
    taken_off = subtract(held())
    assert taken_off is not None
    assert int(taken_off.vector_ops.sum()) == 2 * 2 * BATCH * 64 * 192  # scale and add


def test_lane_operations_of_hashes() -> None:
    for name, per_kib in (("xxh3", 128 * (2 + 4 + 2) + 8 * 7), ("blake3", 17 * (7 * 8 * 14 + 8))):
        assert HASHES[name].lanes_per_kib == per_kib
        trace = hash_state(held(), "weights", name)
        assert trace is not None
        assert int(trace.vector_ops.sum()) == 2 * BATCH * 64 * 192 * 2 // 1024 * per_kib


def test_a_full_cache_needs_nothing_back_after_a_draft() -> None:
    assert moved(reject(held(window=None), 5)) == (BATCH * (PHI + CARRY), BATCH * (PHI + CARRY))


def test_a_cache_alone_takes_the_same_operations() -> None:
    cache = replace(held(), settings=MethodSettings(name="kv", kv=KVSettings()))
    assert moved(snapshot(cache)) == (BATCH * 4 * CONTEXT * 128,) * 2
    assert moved(fork_shared(cache, 2)) == (BATCH * 7 * 8,) * 2  # seven blocks hold 100 tokens
    with pytest.raises(ConfigError, match="method kv has no fast weights"):
        subtract(cache)


@pytest.mark.parametrize("carry", ["official", "ring", "keep_z", "online"])
@pytest.mark.parametrize("weight_write", ["official", "fused", "master"])
@pytest.mark.parametrize("contraction", ["project_first", "outer_first"])
def test_every_setting_makes_possible_traces(carry: str, weight_write: str, contraction: str) -> None:
    for target in ("hidden_states", "input_embed"):
        state = held(carry=carry, weight_write=weight_write, contraction=contraction, target=target)
        for build in BUILT.values():
            trace = build(state)
            assert trace is not None
            verify(trace)


def test_a_chip_with_some_layers_has_their_part() -> None:
    first, second = (replace(held(), layers=layers) for layers in ((0, 1), (2, 3)))
    assert tuple(a + b for a, b in zip(moved(snapshot(first)), moved(snapshot(second)), strict=True)) == moved(
        snapshot(held())
    )
    assert replace(held(), layers=(1, 3)).ttt_layers == ()
    assert reset(replace(held(), layers=(1, 3))) is None


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TOY, QWEN], ids=lambda model: model.name)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("rows", [None, 16])
def test_copies_follow_their_closed_forms(model: Model, batch: int, rows: int | None) -> None:
    state = held(model, batch=batch, update_rows=rows)
    size = batch * closed_forms.state_bytes(model, state.ttt, CONTEXT, window_tokens=WINDOW)
    for operation in ("snapshot", "restore", "swap_out", "swap_in"):
        assert moved(BUILT[operation](state)) == (size, size)
    assert moved(fork(state, 4)) == (size, 3 * size)
    weight = closed_forms.fast_weight_bytes(model, state.ttt)
    assert moved(hash_state(state, "weights", "xxh3"))[0] == batch * weight
    logged = closed_forms.factor_log_bytes(model, state.ttt, CHUNK)
    assert moved(log(state, "factors")) == (batch * logged,) * 2
    assert moved(reset(state)) == (weight, batch * weight)
    once = closed_forms.subtract_bytes(model, state.ttt)
    assert moved(subtract(state)) == (batch * once.read, batch * once.written)


@pytest.mark.parametrize("model", [TOY, QWEN], ids=lambda model: model.name)
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("rows", [None, 16])
def test_replays_follow_their_closed_forms(model: Model, chunks: int, rows: int | None) -> None:
    state = held(model, update_rows=rows)
    trace = replay_factors(state, chunks)
    assert moved(trace) == tuple(closed_forms.replay_bytes(model, state.ttt, chunks, batch=BATCH))
    assert trace is not None
    assert int(trace.flops.sum()) == BATCH * closed_forms.replay_flops(model, state.ttt, chunks)


DOWN = ("down_proj", "fast_apply", "history_scores", "history_apply")


def read_by_down_projections(trace: Trace) -> int:
    """Bytes of weights and history that the down projections read."""
    owner = np.repeat(np.arange(trace.n_ops), np.diff(trace.read_ptr))
    role = np.array([tensor.role for tensor in trace.tensors])[trace.read_tensor]
    chosen = is_kind(trace, *DOWN)[owner] & np.isin(role, [Role.WEIGHT, Role.FAST_WEIGHT, Role.KV])
    return int(trace.read_bytes[chosen].sum())


@pytest.mark.parametrize("model", [TOY, QWEN], ids=lambda model: model.name)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("history", [0, 1, 500])
@pytest.mark.parametrize("rows", [None, 16])
def test_forms_follow_their_closed_forms(model: Model, batch: int, form: Form, history: int, rows: int | None) -> None:
    state = held(model, batch=batch, update_rows=rows)
    trace = apply_step(state, form, history)
    verify(trace)
    expected: dict[str, Any] = {"batch": batch, "history_tokens": history}
    assert read_by_down_projections(trace) == closed_forms.form_bytes(model, state.ttt, form, **expected)
    assert totals(trace, is_kind(trace, *DOWN)).flops == closed_forms.form_flops(model, state.ttt, form, **expected)
    frozen = [] if rows is None else ["down_proj"]
    wanted = {"merged": [*frozen, "fast_apply"], "split": ["down_proj", "fast_apply"], "kernel": ["down_proj"]}[form]
    if form == "kernel" and history:
        wanted += ["history_scores", "history_apply"]
    assert kinds(trace, trace.layer == 0) == ["gate_proj", "up_proj", "silu_mul", *wanted]


def test_break_even_formulas() -> None:
    assert closed_forms.form_breakeven_tokens(QWEN) == Fraction(2560 * 9728, 2560 + 9728)
    assert closed_forms.form_breakeven_tokens(TOY) == 48  # 64 * 192 / 256
    assert closed_forms.form_breakeven_tokens(TOY, 4) == 36
    assert closed_forms.form_breakeven_tokens(TOY, 1) == 0
    # a weight in fp32 is twice the factors in bf16; of a batch of four the trained weight is an eighth of the others
    assert closed_forms.form_breakeven_tokens(TOY, fast_dtype="fp32") == 96
    assert closed_forms.form_breakeven_tokens(TOY, 4, fast_dtype="fp32") == 84
    # 16 rows: 16 * 192 / 208
    assert closed_forms.form_breakeven_tokens(TOY, update_rows=16) == Fraction(192, 13)
    for batch, rows in ((None, None), (4, None), (None, 16), (4, 16)):
        tokens = int(closed_forms.form_breakeven_tokens(TOY, batch, update_rows=rows))
        state, other = held(batch=batch or 1, update_rows=rows), "split" if batch is None else "merged"
        limit = closed_forms.form_bytes(TOY, state.ttt, other, batch=state.batch)
        sizes = [
            closed_forms.form_bytes(TOY, state.ttt, "kernel", batch=state.batch, history_tokens=t)
            for t in (tokens, tokens + 1)
        ]
        assert sizes[0] <= limit < sizes[1]
        assert (sizes[0] == limit) == (rows is None)  # a whole number of tokens


# --- simulated --------------------------------------------------------------------------------------------------------

CHIPS = ("tiny_gpu", "h100", "tpu_v7", "ideal_ttt", "sn40l")


def run(chip: str, trace: Trace | None, **overrides: str) -> Result:
    assert trace is not None
    loaded = load_chip(chip, overrides=dict(overrides)) if overrides else load_chip(chip)
    return simulate_trace(loaded, trace, compare_engines=True)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("operation", [name for name in BUILT if not name.startswith("swap")])
def test_no_operation_beats_the_bandwidth(chip: str, operation: str) -> None:
    result = run(chip, BUILT[operation](held()))
    main = result.chip.main_memory
    bytes_of = {"read": 0, "write": 0}
    for (direction, _), values in result.main_bytes().items():
        bytes_of[direction] += int(values.sum())
    reads, writes = bytes_of["read"] / main.read_bytes_per_s, bytes_of["write"] / main.write_bytes_per_s
    assert result.seconds >= (reads + writes if main.shared_bus else max(reads, writes)) * (1 - 1e-12)
    assert result.seconds > 0


@pytest.mark.parametrize("operation", ["swap_out", "swap_in"])
@pytest.mark.parametrize(("chip", "model"), [("h100", QWEN), ("groq_lpu", TOY), ("tiny_tiers", TOY)])
def test_a_swap_passes_the_way_out(chip: str, model: Model, operation: str) -> None:
    loaded = load_chip(chip)
    state = held(model, fast_dtype=loaded.default_dtype)
    state = replace(state, dtype=loaded.default_dtype)
    result = run(chip, BUILT[operation](state))
    size = int(BATCH * closed_forms.state_bytes(model, state.ttt, CONTEXT, window_tokens=WINDOW))
    way_out = result.chip.backing
    assert way_out is not None
    assert (loaded.backing is not None) == (chip == "tiny_tiers")  # else it stands for the host
    direction = "write" if operation == "swap_out" else "read"
    assert {name: int(values.sum()) for name, values in result.far_bytes().items()} == {
        direction: size,
        "read" if direction == "write" else "write": 0,
    }
    rate = way_out.write_bytes_per_s if direction == "write" else way_out.read_bytes_per_s
    assert result.seconds >= size / rate
    if model is QWEN:  # large enough for fixed times not to matter
        assert result.seconds < 1.05 * size / rate
    per_byte = way_out.write_energy_j_per_byte if direction == "write" else way_out.read_energy_j_per_byte
    assert result.dynamic_energy_j()[way_out.name].sum() == pytest.approx(size * per_byte)
    moved_there = [tensor.nbytes for tensor in result.trace.tensors if "outside_" in tensor.name]
    assert sum(moved_there) == size


def test_a_swap_needs_a_way_out() -> None:
    with pytest.raises(UnsupportedError, match="neither a memory of scope backing nor a link to the host"):
        run("tpu_v7", swap_out(held()))


def test_putting_weights_back_is_charged_or_refused() -> None:
    with pytest.raises(UnsupportedError, match="weights change by local rules only, and putting back a stored weight"):
        run("loihi2", restore(replace(held(fast_dtype="int8"), dtype="int8")))
    copied, restored = (run("hexagon_8elite", BUILT[name](held())) for name in ("snapshot", "restore"))
    rules = restored.chip.writability
    assert rules.mode == "reupload"
    assert rules.reupload_bytes_per_s
    uploads = 2 * rules.reupload_s + BATCH * PHI / rules.reupload_bytes_per_s
    assert restored.seconds - copied.seconds == pytest.approx(uploads, rel=0.2)


def rows_of(data: LifecycleData) -> dict[str, dict[str, Any]]:
    """Rows of the table of operations by name."""
    return {str(row["operation"]): {str(k): v for k, v in row.items()} for row in data.operations.to_dict("records")}


def simulated(settings: Lifecycle) -> dict[str, dict[str, Any]]:
    return rows_of(run_lifecycle(settings))


def breakevens_of(data: LifecycleData, by: str) -> dict[str, dict[str, Any]]:
    """Break-evens in bytes or time by the other form."""
    rows = data.breakevens.to_dict("records")
    return {str(row["against"]): {str(k): v for k, v in row.items()} for row in rows if row["by"] == by}


def settings(chip: str, model: Model = TOY, **changes: Any) -> Lifecycle:
    loaded = load_chip(chip)
    ttt = TTTSettings(layers=(0, 2), chunk_tokens=CHUNK) if model is TOY else TTTSettings()
    usual = Lifecycle(
        chip=loaded, model=model, method="ttt_window", ttt=ttt, window=WINDOW if model is TOY else 1024, context=128,
        batch=2, dtype=loaded.default_dtype, workers=1,
    )  # fmt: skip
    return replace(usual, **changes)


@pytest.mark.parametrize(
    ("chip", "missing"),
    [
        ("tiny_gpu", {"swap_out": "link to the host"}),
        ("h100", {}),
        ("tpu_v7", {"swap_out": "link to the host", "kv_swap_in": "link to the host"}),
        ("groq_lpu", {}),
        ("hexagon_8elite", {"swap_out": "link to the host"}),
        ("loihi2", {"restore": "local rules", "fork": "local rules", "share_prefix": "local rules"}),
        ("ideal_ttt", {"swap_in": "link to the host"}),
        ("hermes_pcm", {"swap_out": "link to the host"}),
        ("northpole", {"swap_out": "link to the host"}),
    ],
)
def test_chips_have_a_record_of_every_operation(chip: str, missing: dict[str, str]) -> None:
    table = simulated(settings(chip))
    assert list(table) == list(OPERATIONS)
    for name, row in table.items():
        assert bool(row["fits"]) == (not row["missing"] and not row["reason"]), name
        if row["fits"]:
            assert row["seconds"] >= 0
            assert row["energy_j"] >= 0
            assert (row["seconds"] == 0) == (name in ("reset_split", "kv_restore", "kv_reject", "kv_reset"))
    for name, text in missing.items():
        assert text in table[name]["missing"], name
    if not missing:
        assert not any(row["missing"] for row in table.values())


def test_weights_that_are_never_written_cannot_be_put_back() -> None:
    chip = load_chip("tiny_gpu")
    table = simulated(
        replace(settings("tiny_gpu"), chip=replace(chip, writability=replace(chip.writability, mode="none")))
    )
    for name in ("restore", "subtract", "replay_factors", "replay_tokens", "fork", "reject", "reset", "share_prefix"):
        assert "weights cannot be written at run time" in table[name]["missing"], name
    for name in ("snapshot", "hash_weights", "log_factors", "fork_shared", "kv_fork"):
        assert table[name]["fits"], name


def test_records_on_one_chip() -> None:
    data = run_lifecycle(settings("h100", QWEN, context=8192, batch=4))
    table = rows_of(data)
    size = 4 * closed_forms.state_bytes(QWEN, TTTSettings(), 8192, window_tokens=1024)
    assert [table["snapshot"][column] for column in ("read_bytes", "write_bytes", "held_bytes")] == [size] * 3
    cache = 4 * 8192 * closed_forms.kv_bytes_per_token(QWEN)
    assert table["kv_snapshot"]["read_bytes"] == cache
    assert data.step_seconds is not None
    chunk = 1024 * data.step_seconds
    assert table["snapshot"]["chunk_share"] == pytest.approx(table["snapshot"]["seconds"] / chunk)
    ways = [table[name]["seconds"] for name in ("restore", "replay_factors", "replay_tokens")]
    assert ways == sorted(ways)
    swaps = table["kv_swap_out"]["seconds"] / table["swap_out"]["seconds"]
    assert swaps == pytest.approx(float(cache / size), rel=0.01)
    exact = [table[name]["exact"] for name in ("restore", "replay_factors", "subtract", "subtract_logged")]
    assert exact == ["yes", "yes", "no", "no"]
    assert table["replay_factors"]["flops"] == 4 * closed_forms.replay_flops(QWEN, TTTSettings(), 8)


def test_several_chips_hold_parts() -> None:
    """Of a pipeline the bytes add up to those of one chip, and the times do not."""
    whole = settings("h100", QWEN, context=2048)
    one, two = (
        simulated(replace(whole, parallel=replace(whole.decode_point().parallel, pp=pp)))["snapshot"] for pp in (1, 2)
    )
    assert two["read_bytes"] == one["read_bytes"]
    assert 0.4 * one["seconds"] < two["seconds"] < 0.9 * one["seconds"]


def test_integers_can_be_subtracted_exactly() -> None:
    assert simulated(settings("loihi2"))["subtract"]["exact"] == "yes"


@pytest.mark.parametrize(("chip", "model", "batch"), [("h100", QWEN, 8), ("tpu_v7", QWEN, 3), ("tiny_gpu", TOY, 4)])
def test_simulated_bytes_break_even_where_the_formula_says(chip: str, model: Model, batch: int) -> None:
    found = breakevens_of(run_lifecycle(settings(chip, model, batch=batch)), "bytes")
    for against, of in (("split", None), ("merged", batch)):
        expected = closed_forms.form_breakeven_tokens(model, of)
        assert found[against]["closed_form_tokens"] == float(expected)
        assert found[against]["simulated_tokens"] == math.floor(expected)


def test_part_of_a_matrix_breaks_even_where_the_formula_says() -> None:
    chosen = settings("tiny_gpu", TOY, batch=4)
    data = run_lifecycle(replace(chosen, ttt=replace(chosen.ttt, update_rows=16)))
    found = breakevens_of(data, "bytes")
    for against, of in (("split", None), ("merged", 4)):
        expected = closed_forms.form_breakeven_tokens(TOY, of, update_rows=16)
        assert found[against]["closed_form_tokens"] == float(expected)
        assert found[against]["simulated_tokens"] == math.floor(expected)


def test_forms_break_even_in_time_where_bytes_decide() -> None:
    """On a chip that keeps its memory busy, a few kernels more cost less than a twentieth."""
    data = run_lifecycle(settings("tpu_v7", QWEN, batch=8))
    by_bytes, by_time = breakevens_of(data, "bytes"), breakevens_of(data, "time")
    for against in ("merged", "split"):
        ratio = by_time[against]["simulated_tokens"] / by_bytes[against]["simulated_tokens"]
        assert 0.95 < ratio <= 1


def test_a_shard_breaks_even_sooner() -> None:
    parallel = replace(settings("h100").decode_point().parallel, tp=4)
    found = breakevens_of(run_lifecycle(settings("h100", QWEN, context=2048, parallel=parallel)), "bytes")
    expected = closed_forms.form_breakeven_tokens(shard(QWEN, 4))
    assert found["split"]["simulated_tokens"] == math.floor(expected)
    assert expected < closed_forms.form_breakeven_tokens(QWEN)


def test_short_contexts_have_no_chunk_to_go_back_over() -> None:
    table = simulated(settings("tiny_gpu", context=CHUNK - 1))
    assert table["replay_factors"]["reason"] == "no chunk of 32 tokens is complete"
    assert table["snapshot"]["fits"]


def test_what_does_not_fit_says_so() -> None:
    small = load_chip("tiny_gpu", overrides={"memories.hbm.capacity": "1.5 MiB"})
    table = simulated(replace(settings("tiny_gpu", batch=4), chip=small))
    assert "weights, state and what is held beside need" in table["fork"]["reason"]
    assert not table["fork"]["fits"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beams": 1}, "beams: 1 must be at least 2"),
        ({"batch": 0}, "batch: 0 must be at least 1"),
        ({"draft": 0}, "draft: 0 must be at least 1"),
        ({"hash_function": "md5"}, "hash: 'md5' is not one of xxh3, blake3"),
        ({"method": "kv"}, "method kv has no fast weights"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("tiny_gpu", **changes)


# --- forms and subtraction in NumPy -----------------------------------------------------------------------------------


def test_forms_compute_the_same() -> None:
    random = np.random.default_rng(0)
    d, f, rows, rate = 24, 40, 7, 0.3
    trained, z = random.standard_normal((d, f)), random.standard_normal((rows, f))
    factors = [(random.standard_normal((16, d)), random.standard_normal((16, f))) for _ in range(5)]
    merged = apply_merged(z, trained, factors, rate)
    expected = z @ (trained + rate * sum(values.T @ hidden for values, hidden in factors)).T
    scale = np.abs(merged).max()
    for out in (merged, apply_split(z, trained, factors, rate), apply_kernel(z, trained, factors, rate)):
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13 * scale)
    np.testing.assert_array_equal(apply_kernel(z, trained, [], rate), z @ trained.T)


def test_subtracting_an_update_is_exact_in_integers_only() -> None:
    random = np.random.default_rng(0)
    weight = round_to(0.02 * random.standard_normal((64, 64)), BFLOAT16)
    delta = round_to(0.001 * random.standard_normal((64, 64)), BFLOAT16)
    back = add_and_subtract(weight, delta, BFLOAT16)
    assert np.mean(back != weight) > 0.05
    # One element by hand: 1 + 2**-8 rounds to 1 (half a unit, ties to even), and 1 - 2**-8 is a number of the format.
    one, small = np.array([1.0]), np.array([2.0**-8])
    assert add_and_subtract(one, small, BFLOAT16).tolist() == [1 - 2.0**-8]
    integers, change = (random.integers(-127, 128, (64, 64), dtype=np.int64) for _ in range(2))
    np.testing.assert_array_equal(add_and_subtract_integers(integers, change), integers)


# --- documentation ----------------------------------------------------------------------------------------------------


def test_documentation_lists_operations_and_columns() -> None:
    text = (Path(__file__).parents[2] / "docs" / "lifecycle.md").read_text(encoding="utf-8")

    def names(heading: str) -> list[str]:
        block = text.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0]
        return [name for line in block.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]

    assert names("Operation") == list(OPERATIONS)
    assert names("Form") == list(FORMS)
    assert names("Hash") == list(HASHES)
    columns = [
        name
        for block in text.split("| Column | Meaning |")[1:]
        for line in block.split("\n\n", 1)[0].splitlines()[2:]
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    assert sorted(columns) == sorted([*COLUMNS, *FORM_COLUMNS, *BREAKEVEN_COLUMNS])
