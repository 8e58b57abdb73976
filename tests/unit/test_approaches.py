"""Ways to adapt, set against each other: rows against points simulated by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ttt_sim.approaches import COLUMNS, Approached, Approaches, approach, methods_of
from ttt_sim.config import load_chip
from ttt_sim.errors import ConfigError
from ttt_sim.grid import make_point
from ttt_sim.model_config import load_model, load_ttt
from ttt_sim.report.approaches import findings
from ttt_sim.report.figures_approaches import FAMILIES, FIGURES
from ttt_sim.report.names import short_title
from ttt_sim.simulation import simulate_point
from ttt_sim.workload import METHODS, state_of_context
from ttt_sim.workload.method import PHASE_NAMES

SETTINGS = Approaches(
    chip=load_chip("h100"), model=load_model("Qwen3-1.7B"), methods=("kv", "ttt_window", "fine_tuning"), context=8192,
    question=100, answer=20, batch=4, ttt=load_ttt("default"), window=1024, dtype=None, kv_dtype=None, call_tokens=8192,
    options={"fine_tuning": {"epochs": "3"}}, workers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Approached:
    return approach(SETTINGS)


def row(data: Approached, method: str) -> dict[str, Any]:
    return {str(name): value for name, value in data.table[data.table["method"] == method].iloc[0].items()}


def seconds(method: str, phase: str, context: int, batch: int = 1, **more: Any) -> float:
    point = make_point(
        "h100", "Qwen3-1.7B", method, phase=phase, context=context, batch=batch, window=1024, **more  # type: ignore[arg-type]
    )  # fmt: skip
    return float(simulate_point(point).record["seconds"])  # type: ignore[arg-type]


def test_a_cache_is_filled_asked_and_decoded_from(data: Approached) -> None:
    found = row(data, "kv")
    assert found["adapt_seconds"] == seconds("kv", "prefill", 8192)
    assert found["ask_seconds"] == seconds("kv", "ask", 8192, question=100)
    assert found["step_seconds"] == seconds("kv", "decode", 8192, batch=4)
    assert found["answer_seconds"] == pytest.approx(
        found["adapt_seconds"] + found["ask_seconds"] + 20 * found["step_seconds"]
    )
    kappa = 2 * 8 * 128 * 28 * 2
    assert found["state_bytes"] == found["state_kv_bytes"] == 8192 * kappa
    room = SETTINGS.chip.main_memory.capacity_bytes
    assert found["users"] < room // (8192 * kappa)
    assert found["users"] == pytest.approx((room - 2 * SETTINGS.model.parameters) // (8192 * kappa), abs=1)
    assert pd.isna(found["boundary_added_seconds"])


def test_fast_weights_add_a_step_that_takes_longer(data: Approached) -> None:
    found = row(data, "ttt_window")
    assert found["boundary_added_seconds"] > 0
    assert found["state_fast_weight_bytes"] == 5 * 2048 * 6144 * 2
    assert found["state_bytes"] < row(data, "kv")["state_bytes"]


def test_what_is_kept_of_a_context() -> None:
    """Nothing but its weights of a model that was trained on it, all vectors of an index."""
    model = SETTINGS.model
    tuned = state_of_context(model, METHODS["fine_tuning"].settings(None, None, None), 8192, "bf16")
    assert (tuned.kv_bytes, tuned.fast_weight_bytes) == (0, 2 * model.parameters)
    index = state_of_context(model, METHODS["rag"].settings(None, None, None), 1 << 20, "bf16")
    assert index.index_bytes == (1 << 20) // 512 * 1024 * 2  # passages of 512 tokens, vectors of 1024 numbers
    assert index.kv_bytes == 8 * 512 * 2 * 8 * 128 * 28 * 2  # of the eight passages that are found


def test_training_repeats_its_step_and_users_take_turns(data: Approached) -> None:
    found = row(data, "fine_tuning")
    assert found["adapt_steps"] == 3 * 2  # three times two sequences of 4096 tokens
    assert found["adapt_seconds"] == pytest.approx(6 * seconds("fine_tuning", "train", 4096))
    assert found["step_seconds"] == pytest.approx(4 * seconds("kv", "decode", 1), rel=2e-2)
    assert found["state_fast_weight_bytes"] == 2 * SETTINGS.model.parameters


def test_training_takes_as_many_chips_as_hold_it() -> None:
    found = row(approach(replace(SETTINGS, model=load_model("Qwen3-8B"), methods=("fine_tuning",))), "fine_tuning")
    assert found["chips"] == 1
    assert found["adapt_chips"] > 1
    assert 16 * load_model("Qwen3-8B").parameters <= found["adapt_chips"] * SETTINGS.chip.main_memory.capacity_bytes


def test_what_a_chip_cannot_do_is_a_row_that_says_why() -> None:
    small = replace(SETTINGS, chip=load_chip("loihi2"), model=load_model("toy"), context=256, options={})
    result = approach(small)
    found = row(result, "fine_tuning")
    assert "local rules only" in found["why"]
    assert pd.isna(found["answer_seconds"])
    assert any("Not on this chip, as a whole or in part: fine-tuning" in sentence for sentence in findings(result))
    for figure in FIGURES.values():
        assert len(figure(result).table) in (2, 3)


def test_memory_that_wears_is_a_finding() -> None:
    """ReRAM of 1e6 writes: as the record of decode says; users with models of their own write in their turns only."""
    methods = ("kv", "ttt_window", "fine_tuning", "gated_deltanet")
    settings = replace(
        SETTINGS, chip=load_chip("reram_cim"), model=load_model("toy"), methods=methods, context=256, options={}
    )
    result = approach(settings)
    for method in methods[:2]:
        record = simulate_point(
            make_point("reram_cim", "toy", method, phase="decode", context=256, batch=4, window=1024)
        ).record
        found = row(result, method)
        assert found["lifetime_days"] == record["lifetime_days"]
        assert found["lifetime_limited_by"] == record["lifetime_limited_by"]
    one = simulate_point(make_point("reram_cim", "toy", "fine_tuning", phase="decode", context=256)).record
    assert row(result, "fine_tuning")["lifetime_days"] == 4 * float(str(one["lifetime_days"]))
    assert pd.isna(row(result, "gated_deltanet")["lifetime_days"])
    (sentence,) = [text for text in findings(result) if text.startswith("Memory that wears out")]
    assert "carry_inputs in reram lasts" in sentence
    assert sentence.endswith("What a cache keeps back does not wear it: Gated DeltaNet.")


def test_no_memory_that_wears_no_finding(data: Approached) -> None:
    assert not any(text.startswith("Memory that wears out") for text in findings(data))
    assert data.table["lifetime_days"].isna().all()


def test_small_memories_take_shorter_calls_and_more_chips() -> None:
    small = replace(
        SETTINGS, chip=load_chip("groq_lpu"), model=load_model("Qwen3-4B"), methods=("kv_window", "lora"), batch=8,
        options={},
    )  # fmt: skip
    result = approach(small)
    window, lora = row(result, "kv_window"), row(result, "lora")
    assert window["adapt_call_tokens"] < SETTINGS.call_tokens
    assert window["adapt_seconds"] > 0
    assert lora["step_seconds"] > 0
    assert lora["chips"] > small.point("lora", "decode", batch=8).parallel.chips  # what the rule of thumb asks for


def test_findings_name_the_extremes(data: Approached) -> None:
    least = data.table.sort_values("step_seconds").iloc[0]["method"]
    sentence = next(text for text in findings(data) if text.startswith("Fastest decode step"))
    assert {"kv": "KV cache", "ttt_window": "TTT + window", "fine_tuning": "fine-tuning"}[least] in sentence
    assert list(data.table.columns) == list(COLUMNS)


def test_every_method_has_what_the_table_says_of_it() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.family in FAMILIES
        assert method.caveat, name
        assert short_title(name) != name.replace("_", " ") or name == "lora", name
        assert set(method.phases) <= set(PHASE_NAMES)
        assert method.adapts in method.phases
        assert method.family == "cache" or method.needs, name


def test_columns_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    rows = text.partition("## The approaches folder")[2].partition("## Glossary")[0].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(COLUMNS)


def test_methods_that_cannot_be_asked_are_refused() -> None:
    assert {"kv", "ttt_window", "fine_tuning"} <= set(methods_of(None))
    with pytest.raises(ConfigError, match="unknown method 'fine_tunin', did you mean fine_tuning"):
        methods_of(["fine_tunin"])


def test_training_after_a_prompt_is_counted_with_it() -> None:
    found = row(approach(replace(SETTINGS, methods=("q_ttt",), options={"q_ttt": {"steps": "5"}})), "q_ttt")
    one = seconds("q_ttt", "train", 8192)
    assert found["adapt_steps"] == 5
    assert found["adapt_seconds"] == pytest.approx(seconds("kv", "prefill", 8192) + 5 * one)


def test_users_share_a_prefix_and_may_lie_behind_the_main_memory() -> None:
    """SN40L: 64 GB in front, 1.5 TB behind."""
    methods = ("kv", "kv_prefix", "kv_offload")
    settings = replace(SETTINGS, chip=load_chip("sn40l"), methods=methods, question=16, answer=16, batch=1, options={})
    data = approach(settings)
    users = [row(data, method)["users"] for method in methods]
    context = 8192 * 2 * 8 * 128 * 28 * 2
    room = 64e9 - 2 * SETTINGS.model.parameters
    assert users[:2] == pytest.approx([room // context, (room - context / 2) // (context / 2)], abs=1)
    assert users[2] == 1.5e12 // context
