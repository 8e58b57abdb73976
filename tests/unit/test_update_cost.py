"""What one update costs, how often it comes, and how long memory lasts: worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip
from ttt_sim.config import load_chip
from ttt_sim.grid import make_point
from ttt_sim.model import Carry, TTTSettings
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.simulation import simulate_point, simulate_trace
from ttt_sim.update_cost import cell_writes, lifetime_days, update_cost, update_record

SIZE = 65536  # 64 rows of 512 in bf16
ONCE = np.ones(1)
UPDATE_COLUMNS = (
    "update_seconds", "update_added_seconds", "update_energy_j", "update_read_bytes", "update_write_bytes",
    "updates_per_s",
)  # fmt: skip
WEAR_COLUMNS = ("cell_writes_per_s", "lifetime_days", "lifetime_limited_by")


def add_write(t: HandTrace, weight: str, delta: str, *, version: int = 0, layer: int = 0, chunk: int = 0) -> None:
    t.op(
        "weight_write", m=64, n=512, phase=Phase.WEIGHT_WRITE, layer=layer, chunk=chunk,
        reads=[(delta, 0, SIZE), (weight, version, SIZE)], writes=[(weight, version + 1, SIZE)],
    )  # fmt: skip


def one_write() -> Trace:
    """A delta of 64 KiB added to a fast weight of 64 KiB."""
    t = HandTrace()
    t.weight("delta", SIZE)
    t.tensor("layers.0.fast_weight", SIZE, Role.FAST_WEIGHT, exists=True)
    add_write(t, "layers.0.fast_weight", "delta")
    return t.build()


def test_one_update_by_hand(engine):
    # The bus moves 131072 B in 2048 cycles and 65536 B in 1024, without a gap. Energy: 3 x 65536 B at 32 pJ in main
    # memory, 2 pJ in the cache and 1 pJ in scratchpads; 64 x 512 additions at 1 pJ.
    result = simulate_trace(chip(), one_write(), engine=engine)
    cost = update_cost(result, ONCE, 1)
    assert cost is not None
    assert (cost.count, cost.per_layer) == (1, 1)
    assert cost.span_cycles == cost.added_cycles == 2048 + 1024
    assert (cost.read_bytes, cost.write_bytes) == (2 * SIZE, SIZE)
    assert cost.energy_j == pytest.approx(3 * SIZE * 35e-12 + 64 * 512 * 1e-12)


def test_sequences_of_a_batch_share_an_update(engine):
    result = simulate_trace(chip(), one_write(), engine=engine)
    both = update_cost(result, ONCE, 2)
    assert both is not None
    assert (both.count, both.span_cycles, both.read_bytes) == (2, 3072 / 2, SIZE)


def test_layers_and_chunks_are_counted(engine):
    # Two layers, two updates each; the second reads what the first left in the cache, so means are asked for.
    t = HandTrace()
    t.weight("delta", SIZE)
    for layer in (0, 1):
        t.tensor(f"layers.{layer}.fast_weight", SIZE, Role.FAST_WEIGHT, exists=True)
    for chunk in (0, 1):
        for layer in (0, 1):
            add_write(t, f"layers.{layer}.fast_weight", "delta", version=chunk, layer=layer, chunk=chunk)
    result = simulate_trace(chip(memories__l2__capacity="1 B"), t.build(), engine=engine)
    cost = update_cost(result, ONCE, 1)
    assert cost is not None
    assert (cost.count, cost.per_layer) == (4, 2)
    assert (cost.read_bytes, cost.write_bytes) == (2 * SIZE, SIZE)  # nothing fits a cache of one byte
    assert cost.added_cycles == result.cycles / 4  # nothing else runs
    (writes,) = cell_writes(result, ONCE)
    assert (writes.tensor, writes.memory.name, writes.per_cell) == ("fast_weight", "hbm", 2)


def test_an_update_beside_other_work_adds_only_what_is_waited_for(engine):
    # A residual add (3072 cycles of the bus) beside an update (3072): the add has priority, so the update ends last
    # and what it adds is the time after the add.
    t = HandTrace()
    for name in ("x", "y", "delta"):
        t.weight(name, SIZE)
    t.tensor("layers.0.fast_weight", SIZE, Role.FAST_WEIGHT, exists=True)
    add_residual(t, "x", "y", "z")
    add_write(t, "layers.0.fast_weight", "delta")
    result = simulate_trace(chip(), t.build(), engine=engine)
    cost = update_cost(result, ONCE, 1)
    assert cost is not None
    assert result.cycles == 2 * 3072
    assert cost.added_cycles == 2 * 3072 - int(result.step_finish_cycles()[0])
    assert 3072 <= cost.span_cycles <= 2 * 3072


def test_nothing_updated_has_no_cost(engine):
    t = HandTrace()
    t.weight("x", SIZE)
    t.weight("y", SIZE)
    add_residual(t, "x", "y", "z")
    result = simulate_trace(chip(), t.build(), engine=engine)
    assert update_cost(result, ONCE, 1) is None
    assert set(update_record(result, ONCE, batch=1, seconds=1.0, cycle_s=1e-9).values()) == {None}


def wearing(**overrides: str):
    return chip(memories__hbm__volatile="false", memories__hbm__endurance="864000", **overrides)


def test_lifetime_by_hand(engine):
    # 864000 writes; one every 3072 ns wears a cell out after 864000 x 3072e-9 s = 2.654208 s.
    result = simulate_trace(wearing(), one_write(), engine=engine)
    record = update_record(result, ONCE, batch=1, seconds=3072e-9, cycle_s=1e-9)
    assert record["cell_writes_per_s"] == pytest.approx(1 / 3072e-9)
    assert record["lifetime_days"] == pytest.approx(2.654208 / 86400)
    assert record["lifetime_limited_by"] == "fast_weight in hbm"
    # once a second: 864000 s are 10 days
    (writes,) = cell_writes(result, ONCE)
    assert lifetime_days(writes, 1.0) == pytest.approx(10)


def test_memory_that_does_not_wear_lasts(engine):
    result = simulate_trace(chip(), one_write(), engine=engine)
    record = update_record(result, ONCE, batch=1, seconds=1.0, cycle_s=1e-9)
    assert record["cell_writes_per_s"] == 1
    assert record["lifetime_days"] is record["lifetime_limited_by"] is None


def test_pinned_weights_wear_the_cache(engine):
    t = HandTrace()
    t.weight("delta", SIZE)
    t.tensor("fast_weight", SIZE, Role.FAST_WEIGHT, exists=True)
    add_write(t, "fast_weight", "delta")
    trace = t.build(pinned=["fast_weight"])
    worn = chip(memories__l2__volatile="false", memories__l2__endurance="1000")
    (writes,) = cell_writes(simulate_trace(worn, trace, engine=engine), ONCE)
    assert (writes.memory.name, writes.per_cell) == ("l2", 1)
    assert lifetime_days(writes, 86400.0) == 1000


# --- points: chunks of 32, two TTT layers, two sequences, a cache that holds nothing ----------------------------------


def worn_point(method: str, phase: str, carry: Carry = "official", engine: str = "compiled"):
    return simulate_point(
        make_point(
            wearing(memories__l2__capacity="1 B"), "toy", method, phase=phase, context=96, batch=2, window=48,  # type: ignore[arg-type]
            ttt=TTTSettings(layers=(0, 2), chunk_tokens=32, carry=carry), engine=engine,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "carry", "expected"),
    [
        # The cache has room for the 96 tokens, the span of 32 and the step after it; a window of 48 is rewritten every
        # 48 tokens.
        ("kv", "official", {"kv": 1 / 129}),
        ("kv_window", "official", {"kv": 1 / 48}),
        # Every weight once in 32 tokens. The released code copies all open rows in each step: 1 + 2 + .. + 31 rows of
        # 31 in 32 steps are half of the buffer per step. A ring stores each row once.
        (
            "ttt_window", "official",
            {"kv": 1 / 48, "fast_weight": 1 / 32, "carry_inputs": 0.5, "carry_targets": 0.5},
        ),
        ("ttt_window", "ring", {"kv": 1 / 48, "fast_weight": 1 / 32, "carry_inputs": 1 / 32}),
    ],
)  # fmt: skip
def test_cells_written_per_decoded_token(method, carry, expected, engine):
    done = worn_point(method, "decode", carry, engine)
    assert done.result is not None
    found = {w.tensor: w.per_cell for w in cell_writes(done.result, done.step_weights)}
    assert found == pytest.approx(expected)
    seconds = done.record["seconds"]
    assert isinstance(seconds, float)
    most = max(expected, key=lambda name: expected[name])
    assert done.record["cell_writes_per_s"] == pytest.approx(expected[most] / seconds)
    assert done.record["lifetime_days"] == pytest.approx(864000 / (expected[most] / seconds) / 86400)
    assert done.record["lifetime_limited_by"] == f"{most} in hbm"


def test_cells_written_by_a_prefill(engine):
    # 96 tokens: the copy of the trained weight, then three updates; the cache is written once.
    done = worn_point("ttt", "prefill", engine=engine)
    assert done.result is not None
    assert {w.tensor: w.per_cell for w in cell_writes(done.result, done.step_weights)} == {"kv": 1, "fast_weight": 4}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_updates_come_once_a_chunk(phase, engine):
    done = worn_point("ttt", phase, engine=engine)
    tokens_per_s = done.record["tokens_per_s"]
    assert isinstance(tokens_per_s, float)
    assert done.record["updates_per_s"] == pytest.approx(tokens_per_s / 32)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_update_columns_follow_from_the_frame_of_ops(phase, engine):
    """The columns once more from ``ops()``: 3 updates (prefill) or 1 / 32 (mean step), 2 layers, 2 sequences."""
    done = worn_point("ttt", phase, engine=engine)
    assert done.result is not None
    ops = done.result.ops()
    ops["weight"] = done.step_weights[ops["step"].to_numpy()]
    update = ops[ops["phase"].isin(["backward", "weight_write"])]
    n = (3 if phase == "prefill" else 1 / 32) * 2 * 2
    for column, source in (
        ("update_energy_j", "energy_j"), ("update_read_bytes", "main_read_bytes"),
        ("update_write_bytes", "main_write_bytes"),
    ):  # fmt: skip
        assert done.record[column] == pytest.approx((update[source] * update["weight"]).sum() / n)
    added = (update["advance_cycles"] * update["weight"]).sum() / n * 1e-9
    assert done.record["update_added_seconds"] == pytest.approx(added)
    spans = update.groupby(["step", "layer", "chunk"]).agg(
        {"start_cycles": "min", "finish_cycles": "max", "weight": "first"}
    )
    total = ((spans["finish_cycles"] - spans["start_cycles"]) * spans["weight"]).sum()
    assert done.record["update_seconds"] == pytest.approx(total / n * 1e-9)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_methods_without_updates_have_none_of_it(phase):
    record = simulate_point(make_point("tiny_gpu", "toy", "kv", phase=phase, context=96)).record
    assert {record[column] for column in (*UPDATE_COLUMNS, *WEAR_COLUMNS)} == {None}
    worn = worn_point("kv", phase).record
    assert {worn[column] for column in UPDATE_COLUMNS} == {None}
    assert all(worn[column] is not None for column in WEAR_COLUMNS)  # its cache wears all the same


# --- other methods: a state at every token, mini-batches, steps of training, an index ---------------------------------

#: Options with short mini-batches, of toy models.
SHORT: dict[str, dict[str, str]] = {"ttt_e2e": {"mini_batch": "32"}, "lact": {"chunk_tokens": "32"}}


def worn_method(method: str, phase: str, batch: int = 2, engine: str = "compiled"):
    """96 tokens, a window of 64, memory that endures 864000 writes and a cache that holds nothing."""
    point = make_point(
        wearing(memories__l2__capacity="1 B", memories__hbm__capacity="10 GB"), "toy", method, phase=phase,  # type: ignore[arg-type]
        context=96, batch=batch, window=64, options=SHORT.get(method), engine=engine,
        ttt=TTTSettings(layers=(0, 2), chunk_tokens=32),
    )  # fmt: skip
    return simulate_point(point)


def lives(days: object, writes_per_s: float, endurance: float = 864000) -> None:
    assert days == pytest.approx(endurance / writes_per_s / 86400)


@pytest.mark.parametrize(
    ("method", "phase", "expected"),
    [
        # A token rewrites the state, and one of the three rows that the convolution looks back at.
        ("gated_deltanet", "decode", {"state": 1, "conv_state": 1 / 3}),
        ("mamba2", "decode", {"state": 1, "conv_state": 1 / 3}),
        ("ttt_linear", "decode", {"state": 1, "conv_state": 1 / 3}),
        ("ttt_mlp", "decode", {"state": 1, "conv_state": 1 / 3}),
        ("titans", "decode", {"state": 1, "momentum": 1, "conv_state": 1 / 3}),
        # One call: every state and row once; of chunks of 64 one stays open, whose start is kept.
        ("gated_deltanet", "prefill", {"state": 1, "conv_state": 1}),
        ("titans", "prefill", {"state": 1, "momentum": 1, "conv_state": 1, "state_start": 1}),
        # Chunks of 32: the trained weights are copied, three updates; a call of 96 rows stores the last 64 of them.
        ("lact", "prefill", {"state": 4, "kv": 1, "rates": 1}),
        ("lact", "decode", {"state": 1 / 32, "kv": 1 / 64, "rates": 1 / 32}),
        # 96 rows into a window of 64; 31 of 32 tokens into the 31 rows of an open mini-batch.
        ("ttt_e2e", "prefill", {**dict.fromkeys(("prime_gate_proj.weight", "prime_up_proj.weight",
                                                 "prime_down_proj.weight"), 4), "kv": 1.5}),
        ("ttt_e2e", "decode", {**dict.fromkeys(("prime_gate_proj.weight", "prime_up_proj.weight",
                                                "prime_down_proj.weight"), 1 / 32), "kv": 1 / 64, "open_kv": 1 / 32}),
        # Room for 96 tokens, 32 more and the step after them, in blocks of 16 that make 144.
        ("kv_mla", "decode", {"kv": 1 / 129}),
        ("kv_paged", "decode", {"kv": 1 / 144}),
        ("rag", "index", {"index.vectors": 1}),
    ],
)  # fmt: skip
def test_cells_written_by_other_methods(method, phase, expected, engine):
    done = worn_method(method, phase, engine=engine)
    assert done.result is not None
    found = {w.tensor: w.per_cell for w in cell_writes(done.result, done.step_weights) if w.tensor != "block_table"}
    assert found == pytest.approx(expected)
    most = max(expected.values()) / number(done.record["seconds"])
    assert done.record["cell_writes_per_s"] == pytest.approx(most)
    lives(done.record["lifetime_days"], most)
    assert done.record["lifetime_limited_by"] in {
        f"{name} in hbm" for name, n in expected.items() if n == max(expected.values())
    }


@pytest.mark.parametrize("method", ["lora", "lora_ttt", "q_ttt", "fine_tuning", "ttt_outer"])
def test_a_step_of_training_writes_weights_moments_and_masters_once(method):
    done = worn_method(method, "train")
    assert done.result is not None
    found = cell_writes(done.result, done.step_weights)
    assert {w.per_cell for w in found} == {1}
    trained = {w.tensor.removesuffix(".weight") for w in found if w.role == Role.FAST_WEIGHT}
    for part in ("moments", "master"):
        assert {w.tensor.removesuffix(f".{part}") for w in found if w.tensor.endswith(part)} == trained
    lives(done.record["lifetime_days"], 1 / number(done.record["seconds"]))


@pytest.mark.parametrize(
    ("method", "updates"), [("fine_tuning", 1), ("lora", 1), ("ttt_outer", 1), ("lora_ttt", 2), ("q_ttt", 2)]
)
def test_a_step_of_training_is_one_update_or_one_of_each_sequence(method, updates):
    """Two sequences train one copy of the weights, or each its own; an update is that of all layers."""
    done = worn_method(method, "train")
    assert done.result is not None
    record, seconds = done.record, number(done.record["seconds"])
    assert record["updates_per_s"] == pytest.approx(updates / seconds)
    ops = done.result.ops()
    update = ops[ops["phase"].isin(["backward", "weight_write"])]
    assert number(record["update_energy_j"]) * updates == pytest.approx(update["energy_j"].sum())
    assert number(record["update_write_bytes"]) * updates == pytest.approx(update["main_write_bytes"].sum())
    span = (update["finish_cycles"].max() - update["start_cycles"].min()) * 1e-9
    assert number(record["update_seconds"]) * updates == pytest.approx(span)
    assert number(record["update_seconds"]) <= seconds


@pytest.mark.parametrize("method", ["gated_deltanet", "mamba2", "ttt_linear", "ttt_mlp", "titans"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_state_rewritten_at_every_token_has_no_updates(method, phase):
    record = worn_method(method, phase).record
    assert {record[column] for column in UPDATE_COLUMNS} == {None}
    plain = simulate_point(
        make_point(chip(memories__l2__capacity="1 B"), "toy", method, phase=phase, context=96, batch=2)
    ).record
    assert number(plain["cell_writes_per_s"]) == pytest.approx(1 / number(plain["seconds"]))
    assert plain["lifetime_days"] is None


@pytest.mark.parametrize(("method", "calls"), [("ttt_e2e", 32), ("lact", 32)])
def test_updates_of_mini_batches_come_once_in_each(method, calls):
    record = worn_method(method, "decode").record
    assert record["updates_per_s"] == pytest.approx(number(record["tokens_per_s"]) / calls)


@pytest.mark.parametrize(("name", "memory", "endurance"), [("reram_cim", "reram", 1e6), ("hermes_pcm", "pcm", 1e9)])
@pytest.mark.parametrize(
    ("method", "phase", "tensor", "writes"),
    [
        ("kv", "prefill", "kv", 1),
        ("kv", "decode", "kv", 1 / (64 + 1024 + 1)),
        ("kv_window", "decode", "kv", 1 / 1024),
        ("kv_mla", "decode", "kv", 1 / (64 + 1024 + 1)),
        ("ttt_window", "decode", "carry_inputs", 0.5),
        ("ttt_e2e", "decode", "prime_gate_proj.weight", 1 / 1024),
        ("lact", "decode", "kv", 1 / 1024),
        ("gated_deltanet", "prefill", "conv_state", 1),
        ("lora", "train", "q_proj_a.weight", 1),
        ("fine_tuning", "train", "embedding.weight", 1),
    ],
)  # fmt: skip
def test_lifetimes_of_chips_that_wear(name, memory, endurance, method, phase, tensor, writes):
    record = simulate_point(make_point(name, "toy", method, phase=phase, context=64, window=1024)).record
    assert record["lifetime_limited_by"] == f"{tensor} in {memory}"
    lives(record["lifetime_days"], writes / number(record["seconds"]), endurance)


@pytest.mark.parametrize("name", ["reram_cim", "hermes_pcm"])
@pytest.mark.parametrize("method", ["gated_deltanet", "mamba2", "titans"])
def test_states_that_stay_in_a_buffer_wear_nothing(name, method):
    record = simulate_point(make_point(name, "toy", method, phase="decode", context=64)).record
    assert record["fits"]
    assert record["lifetime_days"] is record["cell_writes_per_s"] is None


# --- several chips ----------------------------------------------------------------------------------------------------


def spread(phase: str, **arrangement: int):
    """Four sequences of 128 tokens on H100s, chunks of 32."""
    point = make_point("h100", "toy", "ttt", phase=phase, context=128, batch=4, ttt="toy", **arrangement)  # type: ignore[arg-type]
    return simulate_point(point).record


def number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("arrangement", [{"tp": 2}, {"pp": 2}, {"cp": 2}], ids=str)
def test_chips_that_share_a_model_update_once_a_chunk_together(phase, arrangement):
    record = spread(phase, **arrangement)
    assert record["updates_per_s"] == pytest.approx(number(record["tokens_per_s"]) / 32)
    assert number(record["power_limit_w"]) == 1400


def test_halves_of_a_weight_are_written_like_a_whole_one():
    # In decode nothing of an update stays in a cache: a weight of 64 x 192 in bf16 is written, by each chip a half.
    whole, halves = spread("decode"), spread("decode", tp=2)
    assert whole["update_write_bytes"] == halves["update_write_bytes"] == 64 * 192 * 2


def test_what_lies_behind_the_main_memory_wears_there():
    # 800 KiB of main memory hold a part of one fast weight; either part is written once in a chunk of 32 tokens, and
    # the rows of the open chunk, all behind it, half as often as tokens come.
    tiers = load_chip("tiny_tiers", overrides={"memories.hbm.capacity": "800 KiB"})
    done = simulate_point(make_point(tiers, "toy", "ttt", phase="decode", context=96, batch=8, chunk=32))
    assert done.result is not None
    assert number(done.record["spilled_bytes"]) > 0
    found = {(w.tensor, w.memory.name): w.per_cell for w in cell_writes(done.result, done.step_weights)}
    assert found["fast_weight", "hbm"] == pytest.approx(1 / 32, rel=1e-3)
    assert found["fast_weight", "ddr"] == pytest.approx(1 / 32, rel=1e-3)
    assert found["carry_inputs", "ddr"] == pytest.approx(0.5, rel=1e-3)
