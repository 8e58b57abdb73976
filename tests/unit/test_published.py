"""Published figures: reading cases, the rules that turn times into figures, sums over cases, marks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ttt_sim
from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.errors import CapacityError, ConfigError
from ttt_sim.intervals import KNOWN_STYLES, OTHER_STYLES
from ttt_sim.lower.levels import transfer_seconds
from ttt_sim.predict.models import MODELS, Formats, head_step, layer_step, weight_bytes
from ttt_sim.predict.predictions import Devices, predict_rows
from ttt_sim.predict.predictor import simulate_steps
from ttt_sim.predict.published import Case, read_cases
from ttt_sim.predict.rows import Row
from ttt_sim.predict.serving import (
    Outcome,
    floor_seconds,
    in_a_row,
    kv_bytes_per_token,
    median_of_chips,
    model_bytes,
    predict_case,
    predict_on,
    saturated_batch,
    steady_tokens_per_s,
    summary_of,
)
from ttt_sim.predict.tolerances import FigureLimit
from ttt_sim.report.figures_published import milliseconds
from ttt_sim.report.published import (
    ABOVE_BOUND,
    case_line,
    gpus,
    judged,
    published_frame,
    published_lines,
    published_page,
    real_chips,
)

ROOT = Path(__file__).parents[2]
GOOD = {
    "name": "one", "chip": "h100", "metric": "step_ms", "value": "5", "model": "Llama-3-8B", "weights": "fp8",
    "source": "paper", "certainty": "high",
}  # fmt: skip
BF16 = Formats.of("bf16")


def text_of(*cases: dict[str, str], rest: str = "") -> bytes:
    lines = ["cases:", *("  - {" + ", ".join(f"{k}: {v}" for k, v in case.items()) + "}" for case in cases)]
    return ("\n".join([*lines, *rest.splitlines(), "sources:", "  paper: a paper"]) + "\n").encode()


def read(*cases: dict[str, str], rest: str = "") -> tuple[Case, ...]:
    return read_cases(Path("cases.yaml"), text_of(*cases, rest=rest)).cases


def case(**changes: Any) -> Case:
    values: dict[str, Any] = {
        "name": "case", "chip": "tiny_gpu", "metric": "tokens_per_s", "value": 100.0, "value_to": 100.0, "use": "count",
        "source": "a paper", "certainty": "high", "line": 1, "formats": BF16, "model": "gpt2_large", "prompt": 64,
        "answer": 32,
    }  # fmt: skip
    return Case(**(values | changes))


def tiny(**overrides: str) -> Chip:
    return ttt_sim.load_chip("tiny_gpu", overrides={"memories.hbm.capacity": "4 GiB"} | overrides)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_case_is_read_with_what_follows_from_it() -> None:
    (found,) = read(GOOD | {"chips": "8", "tp": "4", "batch": "3", "answer": "7", "kv": "fp8"})
    assert (found.chips, found.tp, found.stages, found.batch, found.answer) == (8, 4, 2, 3, 7)
    assert found.formats == Formats(product="fp8", weights="fp8", act="bf16", kv="fp8")
    assert (found.value, found.value_to, found.source, found.line) == (5.0, 5.0, "a paper", 2)


def test_stored_weights_may_be_narrower_than_what_is_multiplied() -> None:
    (found,) = read(GOOD | {"weights": "q4", "activations": "fp16"})
    assert found.formats == Formats(product="fp16", weights="q4", act="fp16", kv="fp16")
    (found,) = read(GOOD | {"weights": "int8", "product": "bf16"})
    assert found.formats == Formats(product="bf16", weights="int8", act="bf16", kv="bf16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chip": "h10"}, "cases.one.chip: unknown chip 'h10', did you mean h100"),
        ({"chip": "h100:H100-SXM"}, "cases.one.chip: h100 has no variant 'H100-SXM'; variants: H100-SXM5-80GB"),
        ({"metric": "step"}, "cases.one.metric: 'step': must be one of tokens_per_s"),
        ({"value": "5 ms"}, "cases.one.value: '5 ms': must be a number such as 36"),
        ({"value": "0"}, "cases.one.value: 0: must be greater than 0"),
        ({"value_to": "4"}, "cases.one.value_to: 4 is less than the value 5"),
        ({"model": "Llama-3-8b"}, "did you mean Llama-3-8B"),
        ({"source": "papr"}, "cases.one.source: 'papr' is not defined under sources"),
        ({"certainty": "sure"}, "cases.one.certainty: 'sure': must be one of high, medium, low"),
        ({"batch": "0"}, "cases.one.batch: '0': must be a whole number or saturated"),
        ({"batch": "saturated"}, "cases.one.batch: a saturated server is known for tokens_per_s"),
        ({"metric": "tokens_per_s"}, "cases.one.answer: is missing, a case of tokens_per_s needs it"),
        ({"chips": "6", "tp": "4"}, "cases.one.tp: 6 chips are not a multiple of 4"),
        ({"use": "speculative", "reason": "x"}, "cases.one.speculation: does not go with the use speculative"),
        ({"speculation": "unknown"}, "cases.one.speculation: does not go with the use count"),
        ({"use": "aside"}, "cases.one.reason: is missing, a case of use aside states one"),
        ({"metric": "op_us"}, "cases.one.shape: '': must be an op and its sizes"),
        ({"metric": "op_us", "shape": "gemm m=1 n=2"}, "cases.one.shape: k: the file has no such column"),
        ({"metric": "op_us", "shape": "gem m=1"}, "cases.one.shape: op: 'gem' is unknown, did you mean gemm"),
        ({"shape": "gemm m=1"}, "cases.one.shape: a case of step_ms has a model, not an op"),
        ({"batsh": "1"}, "cases.one.batsh: unknown key, did you mean batch"),
    ],
)
def test_bad_cases_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(GOOD | changes)
    assert message in str(raised.value)
    assert str(raised.value).startswith("cases.yaml:2: ")


def test_everything_wrong_is_one_message() -> None:
    without = {key: value for key, value in GOOD.items() if key not in ("value", "weights", "name")}
    with pytest.raises(ConfigError) as raised:
        read(
            GOOD,
            GOOD,
            without | {"name": "two"},
            without | {"name": "three", "value": "1"},
            rest="no_figure: {h100: x}",
        )
    lines = str(raised.value).splitlines()
    assert "cases.yaml:3: cases[1].name: 'one' is the name of an earlier item" in lines
    assert "cases.yaml:4: cases.two.value: is missing, expected a number such as 36 or 0.75" in lines
    assert "cases.yaml:5: cases.three.weights: is missing, a case of step_ms needs it" in lines
    assert "no_figure.h100: has figures among the cases" in lines[-1]


def test_files_without_cases() -> None:
    with pytest.raises(ConfigError, match=r"cases.yaml:1: cases: must be a list"):
        read_cases(Path("cases.yaml"), b"cases: []\nsources: {a: b}\n")
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read"):
        read_cases(Path("none.yaml"))


# --- the cases that ship ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [predict_case(case) for case in read_cases().cases]


def test_every_chip_has_figures_or_says_why_not(outcomes: list[Outcome]) -> None:
    published = read_cases()
    of_cases = {case.file for case in published.cases}
    assert of_cases | set(published.no_figure) == set(real_chips())


def test_every_case_is_predicted_and_what_is_far_off_has_a_reason(outcomes: list[Outcome]) -> None:
    assert [(o.case.name, o.problem) for o in outcomes if o.predicted is None] == []
    assert [o.case.name for o in outcomes if o.far and not o.case.reason] == []
    assert all(kept for _, kept in judged(outcomes))


def test_no_counted_figure_beats_the_physical_bound(outcomes: list[Outcome]) -> None:
    assert [o.case.name for o in outcomes if o.beats_bound and o.case.use == "count"] == []
    slower = [o.case.name for o in outcomes if o.bound and o.predicted and not o.case.against and replace(
        o, case=replace(o.case, value=o.predicted)).beats_bound]  # fmt: skip
    assert slower == []


def test_page_of_cases_is_that_of_the_predictions(outcomes: list[Outcome]) -> None:
    page = (ROOT / "docs" / "published_figures.md").read_text(encoding="utf-8")
    fresh = published_page(read_cases(), outcomes, real_chips())
    old, new = (
        dict(re.findall(r"^\| `([a-z0-9_-]+)` \|(?:[^|]*\|){3} ([0-9.]+) \|", text, re.M)) for text in (page, fresh)
    )
    assert set(old) == set(new) == {case.name for case in read_cases().cases}
    assert {name: float(ratio) for name, ratio in old.items()} == pytest.approx(
        {name: float(ratio) for name, ratio in new.items()}, rel=0.03, abs=0.011
    )


def test_medians_of_the_documentation(outcomes: list[Outcome]) -> None:
    text = " ".join((ROOT / "docs" / "validation.md").read_text(encoding="utf-8").split())
    stated = re.search(
        r"(\d+) figures of (\d+) chips count. Their median error is ([\d.]+) % .*?, that of (\d+) figures of (\d+) "
        r"GPUs ([\d.]+) % .*? medians of the chips' medians are ([\d.]+) and ([\d.]+) %", text,
    )  # fmt: skip
    assert stated is not None
    of_gpus = gpus()
    for chosen, counts, medians in (
        (outcomes, (1, 2), (3, 7)),
        ([o for o in outcomes if o.case.file in of_gpus], (4, 5), (6, 8)),
    ):
        summary = summary_of(chosen)
        assert summary is not None
        n_chips = len({o.case.file for o in chosen if o.case.use == "count"})
        assert [int(stated[i]) for i in counts] == [summary.n, n_chips]
        assert float(stated[medians[0]]) == pytest.approx(summary.median, abs=0.5)
        assert float(stated[medians[1]]) == pytest.approx(median_of_chips(chosen), abs=0.5)


def test_error_bars_of_other_styles_are_what_their_figures_spread_over(outcomes: list[Outcome]) -> None:
    ratios = []
    for outcome in outcomes:
        case = outcome.case
        if case.name.startswith("unseen-xdna2"):  # nineteen rows of one fitted chip would outweigh the others
            continue
        if case.use in ("count", "micro") and load_chip(case.chip).execution not in KNOWN_STYLES:
            assert outcome.ratio is not None
            rate = "per_s" in case.metric or "tops" in case.metric
            ratios.append(outcome.ratio if rate else 1 / outcome.ratio)  # of published over predicted time
    low, high = np.quantile(np.array(ratios), [0.08, 0.92])
    assert (OTHER_STYLES.low, OTHER_STYLES.high) == pytest.approx((low, high), rel=0.03)


# --- rules ------------------------------------------------------------------------------------------------------------


def test_steady_state_by_hand() -> None:
    """Four sequences, a step of 20 ms, a prompt of 100 ms, answers of ten tokens: 5 ms + 10 ms for a token."""
    assert steady_tokens_per_s(batch=4, step_s=0.02, prefill_s=0.1, answer=10) == pytest.approx(1 / 0.015)
    cycle = 4 * 0.1 + 10 * 0.02  # each sequence is prefilled once while all of them decode ten tokens
    assert steady_tokens_per_s(batch=4, step_s=0.02, prefill_s=0.1, answer=10) == pytest.approx(40 / cycle)


def test_a_saturated_server_fills_its_memory() -> None:
    """GPT-2 large: 36 layers, width 1280, MLP 5120, 20 heads of 64, 50257 tokens of vocabulary."""
    weights = 2 * (36 * (4 * 1280 * 1280 + 2 * 1280 * 5120) + 2 * 50257 * 1280)
    token = 36 * 2 * 1280 * 2
    shape = MODELS["gpt2_large"]
    assert model_bytes(shape, BF16, 1) == weights
    assert kv_bytes_per_token(shape, BF16, 1) == token
    one = case(batch=0, prompt=100, answer=50, reserved=0.0)
    room = weights + 7 * 125 * token
    assert saturated_batch(one, room) == 7
    assert saturated_batch(one, room - 1) == 6
    assert saturated_batch(replace(one, most_sequences=3), room) == 3
    assert saturated_batch(replace(one, reserved=0.5), 2 * room) == 7
    with pytest.raises(CapacityError, match="does not fit tiny_gpu"):
        saturated_batch(one, weights + 124 * token)


def row_us(chip: Chip, op: str, *, batch: int, context: int) -> float:
    row = Row(line=1, op=op, device="x", dtype="bf16", model="gpt2_large", tp=1, batch=batch, context=context)
    (found,), problems = predict_rows([row], Devices(chip))
    assert found is not None, problems
    return found.predicted_us


def test_steady_state_on_a_tiny_chip() -> None:
    """The figure of a saturated server from rows of its step and its prompts, predicted on their own."""
    chip = tiny()
    one = case(batch=0, most_sequences=5, prompt=64, answer=32, call_tokens=192)
    step, prompts = (
        row_us(chip, "e2e_decode_step", batch=5, context=64 + 16 + 1),
        row_us(chip, "e2e_prefill", batch=3, context=64),
    )
    outcome = predict_on(one, chip)
    assert outcome.batch == 5
    assert outcome.predicted == pytest.approx(1e6 / (step / 5 + prompts / 3 / 32))


def test_figures_of_a_static_batch() -> None:
    chip = tiny()
    step = row_us(chip, "e2e_decode_step", batch=2, context=64 + 16 + 1) * 1e-6
    prompt = row_us(chip, "e2e_prefill", batch=2, context=64) * 1e-6

    def predicted(metric: str, **changes: Any) -> float:
        return predict_on(case(metric=metric, batch=2, **changes), chip).predicted or 0.0

    assert predicted("step_ms") == pytest.approx(1e3 * step)
    assert predicted("tokens_per_s_user") == pytest.approx(1 / step)
    assert predicted("ttft_ms") == pytest.approx(1e3 * prompt)
    assert predicted("prefill_tokens_per_s") == pytest.approx(128 / prompt)
    assert predicted("total_s") == pytest.approx(prompt + 32 * step)
    assert predicted("tokens_per_s") == pytest.approx(64 / (prompt + 32 * step))


def test_long_prompts_come_in_calls() -> None:
    """Sixty-four tokens in calls of 24: two of them, at the mean of 0 and 24 tokens before them, and one of sixteen."""
    chip = tiny()
    one = case(metric="ttft_ms", call_tokens=24, answer=0)
    whole, rest = replace(one, prompt=24, call_tokens=0), replace(one, prompt=16, call_tokens=0)
    found = predict_on(one, chip).predicted or 0.0
    least = 2 * (predict_on(whole, chip).predicted or 0.0) + (predict_on(rest, chip).predicted or 0.0)
    assert least < found < 1.1 * least


def test_stages_follow_one_another() -> None:
    """A token goes through all layers and over two links of 1 us; three groups of sequences are on their way."""
    chip = ttt_sim.load_chip("h100", overrides={"links.nvlink.latency": "1 us"})
    link = next(link for link in chip.links if link.scope == "chip")
    one = case(chip="h100", model="Llama-2-7b", metric="tokens_per_s_user", chips=1, tp=1)
    alone = 1 / (predict_on(one, chip).predicted or 1.0)
    staged = 1 / (predict_on(replace(one, chips=3), chip).predicted or 1.0)
    assert staged - alone == pytest.approx(2 * transfer_seconds(link, "stage_send", 4096 * 2, 2), rel=1e-6)
    over = 1 / (predict_on(replace(one, chips=10), chip).predicted or 1.0)  # the eighth transfer of nine leaves a node
    network = next(link for link in chip.links if link.name == "nic")
    near, far = (transfer_seconds(to, "stage_send", 4096 * 2, 2) for to in (link, network))
    assert over - alone == pytest.approx(8 * near + far, rel=1e-6)
    many = replace(one, chips=3, batch=3, metric="tokens_per_s", prompt=1, answer=2000)
    assert predict_on(many, chip).batch == 0
    step = predict_on(replace(many, metric="tokens_per_s_user", batch=1), chip).predicted or 0.0
    assert predict_on(many, chip).predicted == pytest.approx(3 * step, rel=3e-3)


def test_layers_in_a_row_are_linked_by_what_the_one_before_wrote() -> None:
    layer = layer_step(MODELS["gpt2_large"], batch=1, tokens=1, before=8, formats=BF16, tp=1)
    three = in_a_row(layer, 3)
    assert [op.kind for op in three] == [op.kind for op in layer] * 3
    names = [
        {operand.name for op in three[i * len(layer) : (i + 1) * len(layer)] for operand in (*op.reads, *op.writes)}
        for i in range(3)
    ]
    assert names[0] & names[1] == {"0.next"}
    assert names[1] & names[2] == {"1.next"}
    assert not names[0] & names[2]
    assert "stream" in names[0]


def test_a_step_of_a_chip_that_loads_ahead_is_that_of_all_its_layers() -> None:
    """Twelve layers in one trace against the rule that takes two and four of them."""
    chip = ttt_sim.load_chip("tpu_v7")
    one = case(chip="tpu_v7", model="Llama-2-7b", metric="step_ms", batch=8, prompt=2048, answer=0)
    layer = layer_step(MODELS["Llama-2-7b"], batch=8, tokens=1, before=2048, formats=BF16, tp=1)
    twelve, four = (simulate_steps(chip, [in_a_row(layer, n)])[0].microseconds for n in (12, 4))
    head = simulate_steps(chip, [head_step(MODELS["Llama-2-7b"], rows=8, act="bf16", tp=1)])[0].microseconds
    whole = twelve + 20 * (twelve - four) / 8 + head
    assert predict_on(one, chip).predicted == pytest.approx(whole * 1e-3, rel=0.002)


def test_bytes_of_stored_weights() -> None:
    assert weight_bytes(32, "q4") == 18  # a block: 32 weights of 4 bits and a scale of 16
    assert weight_bytes(16, "nvfp4") == 9
    assert weight_bytes(10, "int4") == 5
    assert weight_bytes(10, "bf16") == 20


def test_shapes_that_do_not_divide_are_padded() -> None:
    """Forty heads on twelve chips: four on each, and 1152 of 13824 MLP columns."""
    step = layer_step(MODELS["Llama-2-13b"], batch=1, tokens=1, before=8, formats=BF16, tp=12, padded=True)
    by_kind = {op.kind: op for op in step}
    assert (by_kind["attention"].heads, by_kind["attention"].kv_heads) == (4, 4)
    assert by_kind["up_proj"].n == 1152
    step = layer_step(MODELS["Llama-3-70B"], batch=1, tokens=1, before=8, formats=BF16, tp=12, padded=True)
    assert {(op.heads, op.kv_heads) for op in step if op.kind == "attention"} == {(6, 1)}


def test_the_bound_of_a_decode_step_is_its_bytes() -> None:
    chip = ttt_sim.load_chip("h100")
    one = case(chip="h100", model="Llama-2-7b", metric="step_ms", prompt=1000, answer=0)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000)
    keys = 2 * 32 * 2 * 4096 * 1001
    assert predict_on(one, chip).bound == pytest.approx(1e3 * (weights + keys) / chip.main_memory.read_bytes_per_s)
    assert floor_seconds((), chip) == 0


def test_ratios_over_another_chip() -> None:
    one = case(chip="h200", model="Llama-2-7b", metric="tokens_per_s_user")
    own, other = (predict_case(replace(one, chip=chip)).predicted or 0.0 for chip in ("h200", "a100"))
    both = predict_case(replace(one, against="a100"))
    assert both.predicted == pytest.approx(own / other)
    assert both.bound is None


def test_what_a_chip_cannot_do_is_a_problem_of_the_case() -> None:
    outcome = predict_case(case(chip="a100", formats=Formats.of("fp8"), metric="step_ms"))
    assert outcome.predicted is None
    assert "no peak for dtype fp8" in outcome.problem
    assert "not predicted: a100: " in case_line(outcome)
    kept = judged([outcome], [FigureLimit("A100", 10.0, ("a100",))])
    assert kept == [("  A100: no figures", False)]


def test_a_model_that_does_not_fit_is_a_problem() -> None:
    found = predict_case(case(chip="h100", model="Llama-3-70B", metric="step_ms"))
    assert "Llama-3-70B with 1 sequences of 80 tokens needs 131." in found.problem
    assert "more than 1 x h100 have" in found.problem
    assert predict_case(case(chip="h100", model="Llama-3-70B", metric="step_ms", chips=2, tp=1)).predicted


def test_power_lies_between_idle_and_all_units_busy() -> None:
    chip = ttt_sim.load_chip("h100")
    one = predict_on(case(chip="h100", metric="power_w", model="Llama-2-7b"), chip).predicted or 0.0
    two = predict_on(case(chip="h100", metric="power_w", model="Llama-2-7b", chips=2, tp=2), chip).predicted or 0.0
    assert chip.power.idle_w < one < chip.power.limit_w
    assert 2 * chip.power.idle_w < two < 2 * one


# --- sums and marks ---------------------------------------------------------------------------------------------------


def outcome(predicted: float, **changes: Any) -> Outcome:
    return Outcome(case=case(**({"chip": "h100"} | changes)), predicted=predicted)


def test_summaries_by_hand() -> None:
    """Errors of 10, 20 and 150 %; what is fitted, speculative or aside does not count."""
    found = [
        outcome(90.0), outcome(120.0), outcome(250.0), outcome(900.0, use="fit"),
        outcome(900.0, use="speculative", speculation="unknown"), outcome(30.0, chip="a100"),
    ]  # fmt: skip
    summary = summary_of(found[:5])
    assert summary is not None
    assert (summary.n, summary.n_far) == (3, 1)
    assert summary.median == pytest.approx(20.0)
    assert summary.mean == pytest.approx(60.0)
    assert median_of_chips(found) == pytest.approx((20.0 + 70.0) / 2)
    assert summary_of(found[3:5]) is None
    assert median_of_chips(found[3:5]) is None


def test_ratios_of_ranges() -> None:
    inside, below, above = (outcome(x, value=80.0, value_to=120.0) for x in (100.0, 40.0, 180.0))
    assert (inside.ratio, below.ratio, above.ratio) == (1.0, 0.5, 1.5)
    assert (inside.far, below.far, outcome(39.0, value=80.0, value_to=120.0).far) == (False, False, True)


def test_figures_above_the_bound_are_marked() -> None:
    rate = replace(outcome(50.0, use="speculative", speculation="unknown", reason="x"), bound=90.0)
    assert rate.beats_bound
    assert f"(speculative; {ABOVE_BOUND}: 90)" in case_line(rate)
    below = replace(rate, bound=200.0)
    assert not below.beats_bound
    assert "(speculative; bound without speculation 200)" in case_line(below)
    assert replace(outcome(200.0, metric="step_ms"), bound=101.0).beats_bound  # a time below the least
    assert not replace(outcome(200.0, metric="step_ms"), bound=99.0).beats_bound
    assert "3.5 tokens a step" in case_line(replace(rate, case=replace(rate.case, speculation="3.5")))


def test_tolerances_are_judged_by_mean_errors() -> None:
    found = [outcome(90.0), outcome(130.0)]
    assert judged(found, [FigureLimit("H100", 20.0, ("h100",))]) == [("  H100: 20.0 of 20 (2 figures) ok", True)]
    assert judged(found, [FigureLimit("H100", 19.9, ("h100",))]) == [
        ("  H100: 20.0 of 19.9 (2 figures) EXCEEDED", False)
    ]


def test_lines_name_chips_without_figures_and_reasons() -> None:
    published = replace(read_cases(), no_figure={"tpu_v5p": "none found"})
    found = [outcome(300.0, reason="too good"), outcome(90.0)]
    text = "\n".join(published_lines(published, found, ["h100", "tpu_v5p", "tpu_v6e"]))
    assert "no published figure that can be used: none found" in text
    assert text.count("no published figure") == 2
    assert "Off by more than 2 times:\n  case, ratio 3.00: too good" in text
    assert "all chips: median error 105.0 % over 2 figures of 1 chips, target 25 % MISSED" in text


def test_table_of_cases() -> None:
    frame = published_frame([outcome(90.0), outcome(10.0, metric="ttft_ms", batch=4)])
    assert list(frame.ratio) == [0.9, 0.1]
    assert list(frame.unit) == ["tok/s", "ms"]
    assert list(frame.workload) == ["gpt2_large bf16, batch 1, 64 + 32", "gpt2_large bf16, batch 4, 64 + 32"]


def test_figures_on_one_axis() -> None:
    assert milliseconds("tokens_per_s", 500.0) == 2.0
    assert milliseconds("total_s", 2.0) == 2000.0
    assert milliseconds("op_us", 5.0) == 0.005
    assert milliseconds("power_w", 5.0) is None
