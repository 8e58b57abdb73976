"""A whole run against hand counts: latencies, percentiles, rates, money, systems of chips."""

import argparse
import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from tests.unit.serving_tools import FixedTimes, lockstep_seconds, request, served_by
from tests.unit.test_docs import names, table
from ttt_sim.cli import _parser
from ttt_sim.config import load_chip
from ttt_sim.errors import ConfigError
from ttt_sim.model import Call, Scenario
from ttt_sim.model_config import load_model, load_ttt
from ttt_sim.report.figures_serving import DURATION_TITLES
from ttt_sim.report.serving import findings, print_served
from ttt_sim.serving import records
from ttt_sim.serving.records import PERCENTILES, RECORD_COLUMNS, REQUEST_COLUMNS, STEP_COLUMNS, percentile
from ttt_sim.serving.requests import Request
from ttt_sim.serving.serve import Run, Serving, Stream, serve, swap_of
from ttt_sim.workload import build_trace

SECOND = 10**12


def toy(stream: Stream | tuple[Request, ...], *methods: str, **options: Any) -> Serving:
    """The toy model on the tiny GPU: chunks of 32 tokens, a window of 48."""
    values: dict[str, Any] = {
        "chip": load_chip("tiny_gpu"), "model": load_model("toy"), "methods": methods or ("kv", "ttt_window"),
        "stream": stream, "ttt": load_ttt("toy"), "window": 48, "dtype": "bf16", "call_tokens": 64,
    }  # fmt: skip
    return Serving(**{**values, **options})


@pytest.fixture(scope="module")
def run() -> Run:
    return serve(toy(Stream(count=200, prompt=60, output=30)))


@pytest.mark.parametrize("method", ["kv", "kv_window", "ttt", "ttt_window"])
def test_a_single_request_takes_its_prefill_and_its_steps(method: str) -> None:
    """Against the engine: calls of 64 and 36 tokens, then a simulated step at every position."""
    prompt, output = 100, 50
    found = serve(toy((request(5 * SECOND, prompt, output),), method)).requests.iloc[0]
    machine = toy((request(0, 1, 1),), method)
    settings, model = machine.settings(method), machine.model
    prefill = 0.0
    for position, tokens in ((0, 64), (64, 36)):
        calls = (Call(position=position, tokens=tokens, logits=position > 0),)
        trace = build_trace(model, settings, Scenario(batch=1, dtype="bf16", calls=calls))
        prefill += lockstep_seconds(machine.chip, trace)[0]
    steps = range(prompt - 1, prompt + output)
    trace = build_trace(model, settings, Scenario.decode(steps))
    decode = sum(lockstep_seconds(machine.chip, trace)[1:-1])
    assert found["first_token_seconds"] == pytest.approx(prefill, rel=0.01)
    assert found["latency_seconds"] == pytest.approx(prefill + decode, rel=0.01)
    assert found["mean_gap_seconds"] == pytest.approx(decode / (output - 1), rel=0.01)
    assert found["admitted_s"] == found["arrival_s"] == 5


def test_percentiles_are_those_of_the_requests(run: Run) -> None:
    for method in run.settings.methods:
        record = run.record(method)
        own = run.requests[run.requests["method"] == method]
        steps = run.steps[(run.steps["method"] == method) & (run.steps["kind"] == "decode")]
        for name, values in (
            ("first_token", own["first_token_seconds"]),
            ("latency", own["latency_seconds"]),
            ("decode_step", steps["seconds"]),
        ):
            for title, share in (("median", 50), ("p99", 99), ("worst", 100)):
                expected = np.percentile(values.to_numpy(), share, method="inverted_cdf")
                assert record[f"{name}_{title}_seconds"] == pytest.approx(expected, rel=1e-12)
        gaps = own["output_tokens"] - 1
        total = float((own["mean_gap_seconds"] * gaps).sum())
        assert total == pytest.approx(float((own["finished_s"] - own["first_token_s"]).sum()))
        assert record["between_tokens_worst_seconds"] == pytest.approx(own["longest_gap_seconds"].max())


@pytest.mark.parametrize("n", [1, 2, 3, 99, 100, 101, 1000])
def test_percentile_is_the_nearest_rank(n: int) -> None:
    values = np.sort(np.random.Generator(np.random.Philox(n)).integers(0, 10**9, n))
    for share, part in PERCENTILES.items():
        expected = np.percentile(values, {"median": 50, "p99": 99, "worst": 100}[share], method="inverted_cdf")
        assert percentile(values, part) == expected
    assert percentile(np.zeros(0, dtype=np.int64), (1, 2)) is None


def test_record_adds_up(run: Run) -> None:
    for method in run.settings.methods:
        record = run.record(method)
        own, steps = (frame[frame["method"] == method] for frame in (run.requests, run.steps))
        span = own["finished_s"].max() - own["arrival_s"].min()
        assert record["requests"] == len(own) == 200
        assert record["output_tokens"] == own["output_tokens"].sum()
        assert record["seconds"] == pytest.approx(span)
        assert record["tokens_per_s"] == pytest.approx(own["output_tokens"].sum() / span)
        assert record["busy_frac"] == pytest.approx(steps["seconds"].sum() / span)
        decode = steps[steps["kind"] == "decode"]
        assert record["mean_batch"] == pytest.approx(
            (decode["batch"] * decode["seconds"]).sum() / decode["seconds"].sum()
        )
        assert record["largest_batch"] == decode["batch"].max()
        assert record["used_bytes"] == steps["used_bytes"].max() <= record["room_bytes"]
        positions = [
            p for prompt, output in zip(own["prompt_tokens"], own["output_tokens"], strict=True)
            for p in range(prompt, prompt + output - 1)
        ]  # fmt: skip
        completed = sum((p + 1) % 32 == 0 for p in positions) if method == "ttt_window" else 0
        assert record["completed_chunks"] == completed == decode["completing"].sum()


def test_money_and_energy_by_hand(run: Run) -> None:
    chip = run.settings.chip
    rent = chip.price.per_hour_usd
    assert rent is not None
    for method in run.settings.methods:
        record = run.record(method)
        assert record["cost_usd_per_million_tokens"] == pytest.approx(rent / 3600 / record["tokens_per_s"] * 1e6)
        mean_output = record["output_tokens"] / record["requests"]
        full = 1 / (record["sustainable_per_s"] * mean_output)
        assert record["full_load_chip_seconds_per_million_tokens"] == pytest.approx(full * 1e6)
        assert record["full_load_cost_usd_per_million_tokens"] == pytest.approx(rent / 3600 * full * 1e6)
        idle = chip.power.idle_w * record["seconds"] / record["output_tokens"]
        assert idle < record["energy_j_per_token"] < chip.power.limit_w * record["seconds"] / record["output_tokens"]
    kv, ttt = (run.record(method) for method in ("kv", "ttt_window"))
    assert kv["cost_ratio"] == kv["cost_ratio_at_this_load"] == 1
    assert ttt["cost_ratio"] == pytest.approx(kv["sustainable_per_s"] / ttt["sustainable_per_s"])
    assert ttt["cost_ratio_at_this_load"] == pytest.approx(kv["tokens_per_s"] / ttt["tokens_per_s"])


def test_default_rate_is_four_fifths_of_what_is_sustained(run: Run) -> None:
    slowest = min(run.record(method)["sustainable_per_s"] for method in run.settings.methods)
    bare = dataclasses.replace(run.settings, stream=Stream(count=200, prompt=60, output=30, rate_per_s=0.8 * slowest))
    assert run.stream[-1].arrival_ps == pytest.approx(bare.requests()[-1].arrival_ps, rel=0.01)
    assert all(run.record(method)["sustained"] for method in run.settings.methods)


@pytest.mark.parametrize("method", ["kv", "ttt_window"])
def test_what_is_sustained_is_what_an_overloaded_server_does(method: str) -> None:
    """Equal requests, far more than can be served: after the batch has filled, the rate is that of the closed form."""
    sustained = serve(
        toy(Stream(count=600, prompt=60, output=40, lengths="fixed", rate_per_s=1e5), method, most_sequences=16)
    )
    record = sustained.record(method)
    assert not record["sustained"]
    assert record["full_batch"] == 16
    ends = np.sort(sustained.requests["finished_s"].to_numpy())
    rate = 400 / (ends[500] - ends[100])
    assert rate == pytest.approx(record["sustainable_per_s"], rel=0.05)
    assert findings(sustained)[0].startswith("Warning: ")
    assert "does not keep up" in findings(sustained)[0]


def test_a_burst_has_no_rate() -> None:
    burst = serve(toy((request(0, 40, 5), request(0, 40, 5)), "kv"))
    assert burst.offered_per_s is None
    assert not burst.record("kv")["sustained"]
    assert "all requests come at once" in findings(burst)[0]
    assert burst.record("kv")["cost_ratio"] == 1


def test_memory_bounds_the_batch_and_is_never_exceeded() -> None:
    """A chip with room for a few sequences: the KV cache has to let go, what does not grow stays."""
    small = load_chip("tiny_gpu", overrides={"memories.hbm.capacity": "1900 KiB"})
    found = serve(toy(Stream(count=60, prompt=100, output=100, rate_per_s=3000.0), "kv", "kv_window", chip=small))
    for method in ("kv", "kv_window"):
        record = found.record(method)
        assert 0 < record["used_bytes"] <= record["room_bytes"]
        assert record["largest_batch"] < 60
    assert found.record("kv")["recomputes"] > 0
    assert any("forgotten and computed again" in sentence for sentence in findings(found))


def test_ways_to_a_host() -> None:
    assert swap_of(load_chip("tiny_gpu"), 1) is None
    host = swap_of(load_chip("groq_lpu"), 4)
    assert host is not None
    assert host.capacity is None
    assert host.ps_per_byte == pytest.approx(1e12 / 31.5e9)
    behind = swap_of(load_chip("sn40l"), 1)
    assert behind is not None
    assert behind.capacity == load_chip("sn40l").memories[0].capacity_bytes


def test_as_few_chips_as_hold_the_model() -> None:
    stream = tuple(request(i, 512, 2) for i in range(2))
    common: dict[str, Any] = {"window": 1024, "ttt": load_ttt("default"), "call_tokens": 8192}
    small = load_chip("h100", overrides={"memories.hbm.capacity": "12 GB"})
    two = toy(stream, "kv", "ttt_window", chip=small, model=load_model("Qwen3-8B"), **common)
    found = serve(two)
    assert found.records["chips"].tolist() == [2, 2]
    with pytest.raises(ConfigError, match=r"kv: weights of .* do not fit the .* of the chip"):
        serve(dataclasses.replace(two, tp=1))


def test_a_method_that_does_not_run_is_a_record_with_its_reason() -> None:
    found = serve(toy((request(0, 40, 5),), "kv", "ttt_window", chip=load_chip("tiny_dataflow")))
    by_method = {row["method"]: row for row in found.records.to_dict("records")}
    assert set(by_method) == {"kv", "ttt_window"}
    for row in by_method.values():
        assert bool(row["fits"]) == (row["reason"] == "")


def test_impossible_settings() -> None:
    for change, words in (
        ({"most_sequences": 0}, "batch: 0 must be at least 1"),
        ({"policy": "alternat"}, "policy: 'alternat' is not one of prefill_first, alternate, did you mean alternate?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            toy(Stream(), **change)
    with pytest.raises(ConfigError, match="method lora is not served"):
        toy(Stream(), "lora")


def test_same_run_same_numbers(run: Run) -> None:
    again = serve(run.settings)
    assert again.records.equals(run.records)
    assert again.requests.equals(run.requests)
    assert again.steps.equals(run.steps)


def test_fixed_times_make_a_record(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    """A stream of single tokens has no gaps and no decode steps."""
    single = serve(toy((request(0, 40, 1), request(10, 40, 1)), "kv"))
    record = single.record("kv")
    assert record["between_tokens_median_seconds"] is None
    assert record["largest_batch"] == 0
    print_served(single)
    print_served(run)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    server = served_by([request(0, 4, 4)], FixedTimes(call=10, step=5))
    assert records.request_rows("kv", server)[0]["latency_seconds"] == 25e-12


# --- documentation ----------------------------------------------------------------------------------------------------

DOCUMENT = "docs/serving.md"


def test_options_are_documented() -> None:
    (subparsers,) = (a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    options, shared = (
        {option for action in subparsers[name]._actions for option in action.option_strings if action.dest != "help"}
        for name in ("serve", "approaches")
    )
    documented = names(table(DOCUMENT, "Requests", "Option"))
    assert set(documented) <= options
    assert options - shared <= set(documented)


def test_columns_are_documented() -> None:
    documented = names(table(DOCUMENT, "Columns of methods.csv", "Column"))
    expanded = [
        column
        for name in documented
        for column in (
            [name.replace("<duration>", d).replace("<percentile>", p) for d in records.DURATIONS for p in PERCENTILES]
            if "<duration>" in name
            else [name]
        )
    ]
    assert sorted(expanded) == sorted(RECORD_COLUMNS)
    assert names(table(DOCUMENT, "Columns of requests.csv", "Column")) == list(REQUEST_COLUMNS)
    assert names(table(DOCUMENT, "Columns of timeline.csv", "Column")) == list(STEP_COLUMNS)
    assert tuple(DURATION_TITLES) == records.DURATIONS
