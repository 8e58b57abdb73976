"""Claims put to the test: verdicts follow from numbers, and numbers from simulations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest

from ttt_sim.claims import CLAIMS, VERDICTS, Judged, Judgement, Lab, judge_claims
from ttt_sim.errors import ConfigError
from ttt_sim.grid import make_point
from ttt_sim.report.claims import ledger, sentence
from ttt_sim.simulation import simulate_point


@dataclass
class Fake:
    """A laboratory whose records are made up by ``make(chip, method, phase, context, options)``."""

    make: Callable[[str, str, str, int, Mapping[str, Any]], Mapping[str, object]]

    def point(self, chip: str, method: str, phase: str) -> Any:
        return make_point("tiny_gpu", "toy", "kv")

    def record(self, chip: str, method: str, phase: str, context: int = 32768, **more: Any) -> Mapping[str, object]:
        usual = {
            "chip": chip, "fits": True, "seconds": 1.0, "seconds_low": 0.9, "seconds_high": 1.1,
            "unmeasured_share": 0.1, "chips": 1,
        }  # fmt: skip
        return {**usual, **self.make(chip, method, phase, context, more)}


def judged(name: str, make: Callable[[str, str, str, int, Mapping[str, Any]], Mapping[str, object]]) -> Judgement:
    return CLAIMS[name].judge(cast(Lab, Fake(make)))


@pytest.mark.parametrize(
    ("per_chip", "verdict"), [(1.0, "holds"), (0.75, "holds"), (0.5, "holds when"), (0.2, "does not hold")]
)
def test_scaling_over_chips(per_chip: float, verdict: str) -> None:
    def make(chip: str, method: str, phase: str, context: int, more: Mapping[str, Any]) -> Mapping[str, object]:
        n = more.get("cp", 1)
        return {"seconds": 8.0 if n == 1 else 8.0 / (n * per_chip)}

    assert judged("context_parallelism", make).verdict == verdict


@pytest.mark.parametrize(
    ("powers", "verdict"),
    [({"ttt": 1.0, "ttt_window": 1.0}, "holds"), ({"ttt": 1.8, "ttt_window": 1.0}, "holds when"),
     ({"ttt": 1.8, "ttt_window": 1.5}, "does not hold")],
)  # fmt: skip
def test_growth_of_attention(powers: Mapping[str, float], verdict: str) -> None:
    found = judged("no_quadratic_growth", lambda c, m, p, context, o: {"seconds": context ** powers.get(m, 2.0)})
    assert found.verdict == verdict
    assert [row[-1] for row in found.rows[1:]] == ["2.00", *(f"{power:.2f}" for power in powers.values())]


@pytest.mark.parametrize(
    ("bytes_ratio", "flops_ratio", "verdict"),
    [(0.5, 1.2, "holds"), (0.5, 0.8, "does not hold"), (1.5, 1.2, "does not hold")],
)
def test_bandwidth_for_compute(bytes_ratio: float, flops_ratio: float, verdict: str) -> None:
    def make(chip: str, method: str, phase: str, context: int, more: Mapping[str, Any]) -> Mapping[str, object]:
        ttt = method == "ttt_window"
        return {"main_bytes_per_token": bytes_ratio if ttt else 1.0, "flops": flops_ratio if ttt else 1.0}

    assert judged("bandwidth_for_compute", make).verdict == verdict


UPDATE = {
    "update_seconds": 1.0, "update_energy_j": 1.0, "boundary_step_seconds": 2.0, "ordinary_step_seconds": 1.0,
    "seconds": 1.5, "energy_j_per_token": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("better", "verdict"), [(4, "holds"), (3, "holds when"), (1, "holds when"), (0, "does not hold")]
)
def test_chips_against_an_h100(better: int, verdict: str) -> None:
    columns = ("update_seconds", "update_energy_j", "boundary_step_seconds", "seconds")

    def make(chip: str, method: str, phase: str, context: int, more: Mapping[str, Any]) -> Mapping[str, object]:
        if method == "kv_window":
            return {"seconds": 1.0}
        factor = {name: 0.9 if i < better else 1.1 for i, name in enumerate(columns)}
        return {name: value * (factor.get(name, 1.0) if chip == "wse3" else 1.0) for name, value in UPDATE.items()}

    found = judged("wafer_scale", make)
    assert found.verdict == verdict
    assert found.reason.count("worse than") == (better < 4)


@pytest.mark.parametrize(
    ("slow", "verdict"),
    [(frozenset(), "does not hold"), (frozenset({"northpole"}), "holds when"), (None, "holds")],
)  # fmt: skip
def test_obsolete_chips(slow: frozenset[str] | None, verdict: str) -> None:
    def make(chip: str, method: str, phase: str, context: int, more: Mapping[str, Any]) -> Mapping[str, object]:
        lost = slow is None or chip in slow
        return {**UPDATE, "seconds": 3.0 if lost and method == "ttt_window" else 1.0}

    assert judged("inference_chips_obsolete", make).verdict == verdict


@pytest.mark.parametrize(("factor", "verdict"), [(12.0, "holds"), (1.5, "does not hold")])
def test_ten_times(factor: float, verdict: str) -> None:
    def make(chip: str, method: str, phase: str, context: int, more: Mapping[str, Any]) -> Mapping[str, object]:
        return {name: value / (factor if chip == "ideal_ttt" else 1.0) for name, value in UPDATE.items()}

    assert judged("ten_times_faster_chip", make).verdict == verdict


def test_numbers_are_those_of_a_run() -> None:
    found = CLAIMS["no_quadratic_growth"].judge(Lab())
    seconds = simulate_point(make_point("h100", "Qwen3-4B", "kv", phase="prefill", context=131072)).record["seconds"]
    row = next(row for row in found.rows if row[0] == "kv")
    assert float(row[2].split()[0]) == pytest.approx(float(cast(float, seconds)), rel=5e-3)


def test_training_machinery_is_counted_in_traces() -> None:
    found = CLAIMS["training_machinery_at_inference"].judge(Lab())
    rows = {row[0]: row[1:] for row in found.rows}
    assert found.verdict in ("holds when", "does not hold")
    assert rows["KV cache"] == ["0 KiB", "0 KiB", "0 KiB", "no"]
    assert rows["In-Place TTT"][0] == f"{2 * 64 * 192 * 2 // 1024} KiB"  # two layers of toy, bf16
    assert rows["In-Place TTT"][2:] == ["0 KiB", "yes"]
    assert rows["full fine-tuning, Adam"][2] != "0 KiB"


def test_the_ledger_says_all_of_a_claim() -> None:
    found = judge_claims(["no_quadratic_growth", "markets_and_dates"], workers=1)
    text = ledger(found, command="python -m ttt_sim claims", version="0")
    for item in found:
        assert item.judgement.verdict in VERDICTS
        assert item.claim.said in text
        assert sentence(item) in text
        assert item.claim.rule in text
    assert "| kv |" in text
    assert CLAIMS["no_quadratic_growth"].command in text


def test_verdicts_read_as_sentences() -> None:
    claim = CLAIMS["no_quadratic_growth"]
    texts = {
        verdict: sentence(
            Judged(claim=claim, judgement=Judgement(verdict=verdict, reason="It rains.", rows=[], uncertainty="-"))
        )
        for verdict in VERDICTS
    }
    assert texts["holds"] == "Holds: it rains."
    assert texts["holds when"] == "Holds when it rains."
    assert texts["does not hold"] == "Does not hold: it rains."
    assert texts["cannot be simulated"] == "Cannot be simulated: it rains."


def test_unknown_claims_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown claim 'edges_benefit_most', did you mean edge_benefits_most"):
        judge_claims(["edges_benefit_most"], workers=1)
