"""Where a method keeps fewer bytes than full attention, held against the algebra with the models' published numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import pandas as pd
import pytest

from ttt_sim import simulate
from ttt_sim.crossover import (
    CROSSOVER_COLUMNS,
    Crossing,
    _band,
    _flop_formula,
    _short_prompt,
    _traffic_formula,
    crossover_table,
    exact_crossing,
    fast_weight_crossing,
    interpolated_crossing,
    state_crossing,
)
from ttt_sim.intervals import ANY_OP
from ttt_sim.model import Parallel, Scenario, TTTSettings
from ttt_sim.model_config import load_model
from ttt_sim.workload import METHODS, build_trace, closed_forms


class Numbers(NamedTuple):
    """Layers, TTT layers, d_model, d_ff, KV heads, head width; see docs/workloads.md."""

    L: int
    s: int
    d: int
    f: int
    G: int
    h: int

    def kappa(self, e_kv: int = 2) -> int:
        return 2 * self.G * self.h * self.L * e_kv

    def phi(self, e_f: int = 2) -> int:
        return self.s * self.d * self.f * e_f

    def carry(self, chunk: int) -> int:
        """Inputs and targets of an open chunk that lacks one token, bf16."""
        return 2 * self.s * (chunk - 1) * self.d * 2


MODELS = {
    "Qwen3-1.7B": Numbers(28, 5, 2048, 6144, 8, 128),
    "Qwen3-4B": Numbers(36, 6, 2560, 9728, 8, 128),
    "Qwen3-8B": Numbers(36, 6, 4096, 12288, 8, 128),
    "Qwen3-14B": Numbers(40, 7, 5120, 17408, 8, 128),
    "Llama-3.1-8B": Numbers(32, 6, 4096, 14336, 8, 128),
}
#: Tokens to two decimals: Phi / kappa in bf16; windowed (1024) with C = 1024 and with C = 4096. For Qwen3-4B: 6 *
#: 2560 * 9728 * 2 / 147456 = 2026.67; a carry of 2 * 6 * 1023 * 2560 * 2 / 147456 = 426.25 and the window make
#: 3476.92.
PRINTED = {
    "Qwen3-1.7B": ("1097.14", "2486.50", "3583.64"),
    "Qwen3-4B": ("2026.67", "3476.92", "4756.92"),
    "Qwen3-8B": ("4096.00", "5802.00", "7850.00"),
    "Qwen3-14B": ("7616.00", "9535.12", "12223.12"),
    "Llama-3.1-8B": ("5376.00", "7167.25", "9471.25"),
}
WINDOW = 1024
FULL = METHODS["kv"].settings(None, None, None)
by_model = pytest.mark.parametrize("name", MODELS)


def expected(tokens: Fraction) -> Crossing:
    """The first token after the point of equality, also where that is a whole token itself."""
    return Crossing(tokens=tokens, first_whole_token=int(tokens) + 1)


@by_model
@pytest.mark.parametrize(("fast_dtype", "e_f"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize(("kv_dtype", "e_kv"), [("bf16", 2), ("fp8", 1)])
def test_fast_weights_against_a_full_cache(name, fast_dtype, e_f, kv_dtype, e_kv):
    ttt = METHODS["ttt"].settings(None, None, TTTSettings(fast_dtype=fast_dtype))
    found = fast_weight_crossing(load_model(name), ttt, METHODS["kv"].settings(None, kv_dtype, None), dtype="bf16")
    assert found == expected(Fraction(MODELS[name].phi(e_f), MODELS[name].kappa(e_kv)))


@by_model
@pytest.mark.parametrize("chunk", [1024, 4096])
@pytest.mark.parametrize(("fast_dtype", "e_f"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize(("kv_dtype", "e_kv"), [("bf16", 2), ("fp8", 1)])
def test_windowed_ttt_against_a_full_cache(name, chunk, fast_dtype, e_f, kv_dtype, e_kv):
    n = MODELS[name]
    method = METHODS["ttt_window"].settings(WINDOW, kv_dtype, TTTSettings(chunk_tokens=chunk, fast_dtype=fast_dtype))
    found = state_crossing(load_model(name), method, METHODS["kv"].settings(None, kv_dtype, None), dtype="bf16")
    assert found == expected(WINDOW + Fraction(n.phi(e_f) + n.carry(chunk), n.kappa(e_kv)))


@by_model
def test_printed_values(name):
    model = load_model(name)
    tokens = [fast_weight_crossing(model, METHODS["ttt"].settings(None, None, None), FULL, dtype="bf16")]
    for chunk in (1024, 4096):
        method = METHODS["ttt_window"].settings(WINDOW, None, TTTSettings(chunk_tokens=chunk))
        tokens.append(state_crossing(model, method, FULL, dtype="bf16"))
    assert tuple(f"{float(crossing.tokens):.2f}" for crossing in tokens if crossing) == PRINTED[name]


def test_equality_on_a_whole_token_is_not_yet_smaller():
    # Qwen3-8B: 6 * 4096 * 12288 * 2 bytes over 147456 a token are 4096 tokens exactly.
    found = fast_weight_crossing(
        load_model("Qwen3-8B"), METHODS["ttt"].settings(None, None, None), FULL, dtype="bf16"
    )  # fmt: skip
    assert found == Crossing(tokens=Fraction(4096), first_whole_token=4097)


@by_model
def test_a_window_alone_is_smaller_from_the_token_after_it(name):
    window = METHODS["kv_window"].settings(WINDOW, None, None)
    assert state_crossing(load_model(name), window, FULL, dtype="bf16") == Crossing(
        tokens=Fraction(WINDOW), first_whole_token=WINDOW + 1
    )


@by_model
def test_ttt_over_full_attention_is_never_smaller(name):
    assert state_crossing(load_model(name), METHODS["ttt"].settings(None, None, None), FULL, dtype="bf16") is None


# --- the search itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rise", [1, 3, 7, 1000])
@pytest.mark.parametrize("start", [1, 2, 5, 999, 1000, 123456])
def test_exact_crossing_finds_the_root_of_a_line(rise, start):
    found = exact_crossing(lambda tokens: rise * tokens - start)
    assert found is not None
    first = next(t for t in range(start // rise + 2) if rise * t - start > 0 and t >= 1)
    assert found.first_whole_token == first
    assert found.tokens == Fraction(start, rise)


def test_exact_crossing_of_what_leads_from_the_start():
    assert exact_crossing(lambda tokens: 5 + tokens) == Crossing(tokens=Fraction(0), first_whole_token=1)


def test_exact_crossing_of_what_never_leads():
    assert exact_crossing(lambda tokens: -1) is None
    assert exact_crossing(lambda tokens: 0) is None


@pytest.mark.parametrize(
    ("method", "baseline", "tokens", "always", "between"),
    [
        ([4, 4, 4], [2, 3, 6], 25.0 + 50.0 / 6, "neither", (25, 50)),  # from -1 to 2 over 25 tokens
        ([1, 1, 1], [2, 3, 6], None, "method", None),
        ([9, 9, 9], [2, 3, 6], None, "baseline", None),
        ([2, 4, 4], [2, 5, 3], None, "baseline", None),  # leads in the middle, does not stay ahead
        ([3, 2, 3], [2, 3, 4], 10.0 + 15.0 / 2, "neither", (10, 25)),
        ([2, 2, 2], [1, 2, 3], 25.0, "neither", (25, 50)),  # equal at 25
    ],
)
def test_interpolated_crossing(method, baseline, tokens, always, between):
    lead = {context: b - m for context, m, b in zip((10, 25, 50), method, baseline, strict=True)}
    found = interpolated_crossing(lead)
    assert (found.tokens, found.always, found.between) == (
        None if tokens is None else pytest.approx(tokens), always, between
    )  # fmt: skip


def test_nothing_to_interpolate():
    assert interpolated_crossing({}).always == "neither"


# --- the table --------------------------------------------------------------------------------------------------------

QWEN = load_model("Qwen3-4B")
CHUNK = 1024
WINDOWED = METHODS["ttt_window"].settings(WINDOW, None, TTTSettings(chunk_tokens=CHUNK))
METHODS_COMPARED = {"kv": FULL, "ttt_window": WINDOWED}
#: Cost per token over the context.
Curve = Callable[[int], float]


def record_by_hand(method: str, phase: str, batch: int, context: int, cost: float) -> dict[str, object]:
    """A record whose costs per token are all ``cost``."""
    tokens = batch * context if phase == "prefill" else batch
    account = {
        f"{way}_{name}_bytes": 0.0
        for way, name in (("read", "activations"), ("write", "activations"), ("read", "gradients"),
                          ("write", "gradients"), ("write", "fast_weights"))
    }  # fmt: skip
    return {
        "method": method, "phase": phase, "batch": batch, "context_tokens": context, "fits": True, "tokens": tokens,
        "main_bytes_per_token": cost, "seconds_per_token": cost, "energy_j_per_token": cost, "flops": cost * tokens,
        **account,
    }  # fmt: skip


def by_quantity(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {str(row["quantity"]): {str(name): cell for name, cell in row.items()} for row in frame.to_dict("records")}


def missing(row: Mapping[str, Any], *names: str) -> bool:
    return all(pd.isna(row[name]) for name in names)


class Table:
    """Crossovers of two curves on a grid of contexts, and the prefill points that were asked for."""

    def __init__(
        self, kv: Curve, ttt_window: Curve, contexts: tuple[int, ...], *, batch: int = 8, longest: int = 1 << 30
    ) -> None:
        curves: Mapping[str, Curve] = {"kv": kv, "ttt_window": ttt_window}
        self.asked: list[tuple[str, int, int]] = []

        def prefill(method: str, batch: int, context: int) -> Mapping[str, object]:
            self.asked.append((method, batch, context))
            return record_by_hand(method, "prefill", batch, context, curves[method](context)) | {
                "fits": context <= longest
            }

        records = [
            record_by_hand(method, phase, batch, context, curve(context))
            for method, curve in curves.items()
            for phase in ("prefill", "decode")
            for context in contexts
        ]
        self.rows = by_quantity(
            crossover_table(QWEN, METHODS_COMPARED, pd.DataFrame(records), dtype="bf16", prefill=prefill)
        )


def test_table_of_affine_curves_finds_where_they_meet():
    # 10 + t/2 against 1300 - t/4 meet at 1720, between the contexts 1024 and 4096; lines are exact wherever they are
    # sampled.
    table = Table(lambda t: 10 + t / 2, lambda t: 1300 - t / 4, (1024, 4096, 16384))
    curves = [
        "decode traffic", "decode time", "decode energy", "prefill FLOPs", "prefill time", "prefill energy",
    ]  # fmt: skip
    assert list(table.rows) == ["fast weights alone", "state memory", *curves]
    for row in (table.rows[quantity] for quantity in curves):
        assert row["simulated_tokens"] == pytest.approx(1720.0)
        assert row["first_whole_token"] == 1721
        assert missing(row, "below_tokens")
        assert "linear between" in row["remark"]


def test_band_of_a_crossing_by_hand():
    # t against 1000 meet at 1000. A fifth of the method's time is unmeasured and may take 0.8 to 1.4 of it: 960, 1080.
    assert (ANY_OP.low, ANY_OP.high) == (0.8, 1.4)
    contexts = (512, 2048)
    record = {"seconds_per_token": 1000.0, "unmeasured_share": 0.2}
    band = _band({t: t - 1000.0 for t in contexts}, dict.fromkeys(contexts, record))
    assert band == {"low_tokens": pytest.approx(960), "high_tokens": pytest.approx(1080)}


@pytest.mark.parametrize("kv", [lambda t: t / 2, lambda t: t])  # above everywhere, equal everywhere
def test_table_of_curves_that_never_cross(kv):
    table = Table(kv, lambda t: t, (1024, 4096, 16384))
    row = table.rows["decode time"]
    assert missing(row, "simulated_tokens", "first_whole_token", "below_tokens")
    assert row["remark"] == "not smaller at any context that both fit (up to 16384)"
    assert table.asked == []


def test_table_of_a_method_that_leads_from_the_start():
    table = Table(lambda t: 2 * t, lambda t: t, (1024, 4096, 16384))
    for quantity in ("decode traffic", "prefill time"):
        row = table.rows[quantity]
        assert missing(row, "simulated_tokens", "first_whole_token")
        assert row["below_tokens"] == 1024
        assert row["remark"] == "already smaller at the shortest simulated context (1024)"
    assert table.asked == []


def no_prefill(method: str, batch: int, context: int) -> Mapping[str, object]:
    pytest.fail(f"prefill of {method} at {context} tokens, batch {batch} was asked for")


def test_contexts_that_one_side_does_not_fit_are_left_out():
    # TTT leads from 4097 on, but full attention does not fit 16384 tokens.
    records = [
        record_by_hand(method, "decode", 8, context, cost) | {"fits": (method, context) != ("kv", 16384)}
        for method, context, cost in (
            ("kv", 1024, 1.0), ("kv", 4096, 4.0), ("kv", 16384, 16.0),
            ("ttt_window", 1024, 4.0), ("ttt_window", 4096, 4.0), ("ttt_window", 16384, 4.0),
        )
    ]  # fmt: skip
    rows = by_quantity(crossover_table(QWEN, METHODS_COMPARED, pd.DataFrame(records), dtype="bf16", prefill=no_prefill))
    assert rows["decode time"]["remark"] == "not smaller at any context that both fit (up to 4096)"
    assert not any(quantity.startswith("prefill") for quantity in rows)


def test_prefill_is_bisected_at_whole_chunks():
    # t^2 / 10^4 against 10^4 meet at 10^4 exactly, between the chunks at 9216 and 10240, where linear interpolation
    # gives 9216 + 1024 * (10^8 - 9216^2) / (10240^2 - 9216^2). The grid brackets it by 4096 and 32768: 28 chunks, so
    # that 32 -> 18 (18432) -> 11 (11264) -> 7 (7168) -> 9 (9216) -> 10 (10240) leave one.
    table = Table(lambda t: t * t / 1e4, lambda t: 1e4, (4096, 32768))
    interpolated = 9216 + 1024 * (10**8 - 9216**2) / (10240**2 - 9216**2)
    for quantity in ("prefill FLOPs", "prefill time", "prefill energy"):
        assert table.rows[quantity]["simulated_tokens"] == pytest.approx(interpolated)
        assert table.rows[quantity]["remark"].endswith("linear between 9216 and 10240 tokens")
    visited = [18432, 11264, 7168, 9216, 10240]
    assert table.asked == 3 * [(method, 8, context) for context in visited for method in ("kv", "ttt_window")]
    # Decode stays with the grid.
    assert table.rows["decode time"]["remark"].endswith("linear between 4096 and 32768 tokens")


def test_bisection_between_contexts_that_are_no_whole_chunks():
    # 5000 and 9000 lie around the chunks 5 to 8, so 6 and 7 are what can be asked.
    table = Table(lambda t: t * t / 1e4, lambda t: 4200.0, (5000, 9000))  # 6481 tokens
    assert {context for _, _, context in table.asked} == {6144, 7168}
    assert table.rows["prefill time"]["remark"].endswith("linear between 6144 and 7168 tokens")


def test_bisection_ends_where_a_point_does_not_fit():
    table = Table(lambda t: t * t / 1e4, lambda t: 1e4, (4096, 32768), longest=18431)
    assert {context for _, _, context in table.asked} == {18432}
    assert table.rows["prefill time"]["remark"].endswith("linear between 4096 and 32768 tokens")


def test_a_table_needs_full_attention():
    frame = crossover_table(QWEN, {"ttt_window": WINDOWED}, pd.DataFrame(), dtype="bf16", prefill=no_prefill)
    assert (len(frame), tuple(frame.columns)) == (0, CROSSOVER_COLUMNS)


@pytest.mark.parametrize(
    ("parallel", "factor", "flops", "words"),
    [
        # s d (d + f) / (L H h): 6 layers of 36, 32 heads of 128
        (Parallel(), 1, 2048 + 6 * 2560 * (2560 + 9728) / 147456, ("Phi / kappa", "2w + s d (d + f) / (L H h)")),
        (
            Parallel(tp=4), 1, 2048 + 6 * 2560 * (4 * 2560 + 9728) / 147456,
            ("Phi / kappa", "2w + s d (4 d + f) / (L H h)"),
        ),
        # a chunk of 1024 is longer than 608 columns: 2560 x 9728 multiply-adds of the projection for 1024 tokens; eight
        # KV heads are there twice
        (
            Parallel(tp=16), 1 / 2, 2048 + 6 * 2560 * (2560 * 9728 / 1024 + 9728) / 147456,
            ("Phi / (2 kappa)", "2w + s d (d f / C + f) / (L H h)"),
        ),
        # three quarters of the pairs instead of half; two copies of the fast weights
        (
            Parallel(cp=2), 2, (2048 + 6 * 2560 * (2560 + 9728) / 147456) * 2 / 3,
            ("2 Phi / kappa", "2/3 (2w + s d (d + f) / (L H h))"),
        ),
        (
            Parallel(tp=2, cp=4), 4, (2048 + 6 * 2560 * (2 * 2560 + 9728) / 147456) * 4 / 7,
            ("4 Phi / kappa", "4/7 (2w + s d (2 d + f) / (L H h))"),
        ),
    ],
)  # fmt: skip
def test_closed_forms_of_systems(parallel, factor, flops, words):
    ttt = WINDOWED.ttt
    assert ttt is not None
    traffic = closed_forms.traffic_crossover(QWEN, ttt, WINDOW, 4, parallel=parallel)
    assert float(traffic) == pytest.approx(1024 + factor * 3 / 4 * 6 * 2560 * 9728 * 2 / 147456)
    closed = float(closed_forms.flop_crossover(QWEN, ttt, WINDOW, parallel))
    assert closed == pytest.approx(flops)
    copies = closed_forms.kv_copies(QWEN, parallel)
    assert _traffic_formula(None, parallel.cp, copies) == f"w + (1 - 1/B) {words[0]}"
    assert _traffic_formula(3, parallel.cp, copies) == f"w + (1 - 1/3) {words[0]}"
    assert _flop_formula(QWEN, ttt, parallel) == words[1]
    # and as the traces of one chip have it; what a context-parallel prompt saves is a line
    expected = closed if parallel.cp > 1 else _short_prompt(Fraction(closed), WINDOW)
    unit = parallel.cp * CHUNK
    first = max(int(expected) // unit, 1) * unit
    lead = []
    for context in (first, first + unit):
        scenario = Scenario.prefill(context, call_tokens=context, parallel=parallel)
        kv, mine = (build_trace(QWEN, method, scenario).flops.sum() for method in (FULL, WINDOWED))
        lead.append(float(kv - mine) / context)
    assert first - unit * lead[0] / (lead[1] - lead[0]) == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize(
    ("changes", "extra", "words"),
    [
        # 256 of the 2560 rows of six layers, against 36 * 32 * 128 of attention
        ({}, 6 * 256 * (2560 + 9728) / 147456, "256 (d + f)"),
        ({"projection": False}, 6 * 256 * 9728 / 147456, "256 f"),
        ({"contraction": "outer_first"}, 6 * 2560 * (256 * 9728 / 1024 + 9728) / 147456, "d (256 f / C + f)"),
        # the outer product first never pays with so few rows
        ({"chunk_tokens": 16384}, 6 * 256 * (2560 + 9728) / 147456, "256 (d + f)"),
    ],
)
def test_closed_forms_of_part_of_a_matrix(changes, extra, words):
    ttt = TTTSettings(update_rows=256, **changes)
    assert float(closed_forms.flop_crossover(QWEN, ttt, WINDOW)) == pytest.approx(2 * WINDOW + extra)
    assert _flop_formula(QWEN, ttt, Parallel()) == f"2w + s {words} / (L H h)"
    phi = 6 * 256 * 9728 * 2
    assert closed_forms.traffic_crossover(QWEN, ttt, WINDOW, 4) == WINDOW + Fraction(3 * phi, 4 * 147456)
    found = state_crossing(QWEN, METHODS["ttt_window"].settings(WINDOW, None, ttt), FULL, dtype="bf16")
    targets = 2560 if ttt.projection else 256
    carry = 6 * (ttt.chunk_tokens - 1) * (2560 + targets) * 2
    assert found == expected(WINDOW + Fraction(phi + carry, 147456))


@pytest.mark.parametrize(
    ("batch", "parallel", "contexts"),
    [
        (4, Parallel(), (2048, 4096)),
        (8, Parallel(), (2048, 4096)),
        (8, Parallel(tp=16), (4608, 4864)),
        (4, Parallel(cp=2), (4096, 5120)),
        (6, Parallel(pp=2), (2048, 4096)),
        (5, Parallel(pp=2), (2048, 4096)),
    ],
)
def test_the_account_of_traffic_adds_up(batch, parallel, contexts):
    """Closed form, and each number that the remark names, against the simulated crossing, within four tokens."""
    records = [
        simulate(
            "h100", QWEN, method, phase="decode", context=context, batch=batch, window=WINDOW, chunk=CHUNK,
            parallel=parallel,
        ).record
        for method in METHODS_COMPARED
        for context in contexts
    ]  # fmt: skip
    table = crossover_table(
        QWEN, METHODS_COMPARED, pd.DataFrame(records), dtype="bf16", prefill=no_prefill, parallel=parallel
    )  # fmt: skip
    row = by_quantity(table)["decode traffic"]
    # w + (1 - 1/B) * 2026.67; of two stages each serves half of the sequences at a time, with a place to spare of five
    together = -(-batch // parallel.pp)
    copies = parallel.cp / max(parallel.tp // 8, 1)
    assert row["closed_form_tokens"] == pytest.approx(1024 + (1 - 1 / together) * copies * 6 * 2560 * 9728 * 2 / 147456)
    assert ("of all" in row["remark"]) == (parallel.chips > 1)
    of_time = by_quantity(table)["decode time"]["remark"]
    assert ("transfers" in of_time) == (parallel.chips > 1 and "linear between" in of_time)
    assert ("copies of counts once" in by_quantity(table)["state memory"]["remark"]) == (parallel.chips > 1)
    named = [int(number) for number in re.findall(r"\(([+-]\d+)(?: tokens)?\)", row["remark"])]
    # Half a chunk; copies of the open chunk: in and out 2 * 6 layers * 2560 * 2 bytes of some 511 rows, 213 tokens each
    # way, with rows computed again and activations on top; a delta and a write of 2027 tokens' bytes per 1024 steps.
    half_chunk, carry, update = named
    assert half_chunk == -512
    rows = copies * parallel.tp  # every chip of a tensor-parallel group keeps the open chunk
    assert 2 * 212 * rows <= carry <= 2 * 220 * rows
    assert (3 * 2 - 1) * copies <= update <= 4 * 2 * copies
    assert row["simulated_tokens"] - row["closed_form_tokens"] == pytest.approx(sum(named), abs=4)


@pytest.mark.parametrize(
    ("name", "closed", "words"),
    [("lora", None, "keeps all that the KV cache keeps"), ("lact", None, ""), ("kv_window", "w", "the window caps")],
)
def test_methods_without_ttt_settings_have_the_closed_forms_that_hold_for_them(name, closed, words):
    model = load_model("Qwen3-4B")
    methods = {m: METHODS[m].settings(None, None, None) for m in ("kv", name)}
    records = pd.DataFrame({"method": [], "phase": [], "batch": [], "context_tokens": [], "fits": []})
    table = crossover_table(model, methods, records, dtype="bf16", prefill=lambda *_: {})
    row = table[table["quantity"] == "state memory"].iloc[0]
    assert (None if pd.isna(row["closed_form"]) else row["closed_form"]) == closed
    assert words in (row["remark"] if isinstance(row["remark"], str) else "")
