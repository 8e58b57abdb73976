"""The report: does it show the numbers that went in, does it survive what is missing, is an old report ever lost?"""

import io
import itertools
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from ttt_sim.chip import Chip, Provenance
from ttt_sim.config import load_chip
from ttt_sim.errors import ConfigError
from ttt_sim.report import build as build_module
from ttt_sim.report.build import build, check_out
from ttt_sim.report.data import COLUMNS, Headline, ReportData, tokens_label
from ttt_sim.report.figures import FIGURES, draw, render_figure
from ttt_sim.report.findings import answers, crossing_rows, limit_rows, merged_crossings, time_rows
from ttt_sim.report.names import kernel_group, method_style, short_kernel, three_digits
from ttt_sim.report.terminal import print_summary

METHODS = ("kv", "kv_window", "ttt", "ttt_window")
CONTEXTS = (1024, 4096, 16384)
BATCHES = (1, 8)
WINDOW = 1024
# State by hand: 1,000 bytes of KV per token, fast weights and carry of 3,000,000 bytes together.
KV, FAST, CARRY = 1000, 2_000_000, 1_000_000


def make_chip() -> Chip:
    """A chip of round numbers: 100 TFLOP/s, 1 TB/s, so a ridge of 100 FLOP per byte, at 1 GHz, with 100 MB."""
    chip = load_chip("tiny_gpu")
    memory = replace(
        chip.main_memory, name="ram", capacity_bytes=100_000_000, read_bytes_per_s=1e12, achievable_frac=0.9
    )
    array = replace(chip.unit("matrix"), name="array", peak_per_s={"bf16": 1e14}, efficiency={"bf16": 0.8})
    return replace(
        chip, name="tiny", title="Tiny chip", clock_hz=1e9, units=(array,), memories=(memory,),
        overrides={"clock": "1 GHz"},
        provenance={
            "clock": Provenance(text="1 GHz", source="none", certainty="high", line=1),
            "memories.ram.latency": Provenance(text="0 ns", source="none", certainty="low", line=2),
        },
    )  # fmt: skip


def state_bytes(method: str, tokens: int) -> int:
    kept = min(tokens, WINDOW) if method.endswith("window") else tokens
    return KV * kept + (FAST + CARRY if method.startswith("ttt") else 0)


def record(method: str, phase: str, context: int, batch: int) -> dict[str, object]:
    ttt, state = method.startswith("ttt"), state_bytes(method, context)
    base: dict[str, object] = {
        "method": method, "phase": phase, "context_tokens": context, "batch": batch,
        "window_tokens": WINDOW if method.endswith("window") else None, "state_bytes_per_sequence": state,
    }  # fmt: skip
    if state * batch > 90_000_000:  # beside 10 MB of weights
        return base | {"fits": False, "reason": "too large", "bytes_needed": state * batch, "chips_needed": 2}
    tokens = batch * (context if phase == "prefill" else 1)
    seconds = 1e-6 * tokens + 1e-12 * batch * state * (context if phase == "prefill" else 1)
    out = base | {
        "fits": True, "reason": "", "bytes_needed": None, "chips_needed": 1, "cycles": math.ceil(seconds * 1e9),
        "seconds": seconds, "tokens": tokens, "seconds_per_token": seconds / tokens, "tokens_per_s": tokens / seconds,
        "flops": 1e9 * tokens, "main_bytes_per_token": 1e6, "energy_j_per_token": 0.5 * seconds / tokens,
        "cost_usd_per_million_tokens": seconds / tokens * 1e6 / 3600, "bound_by": "ram", "bound_share": 0.75,
        "ordinary_step_seconds": seconds, "boundary_step_seconds": 3 * seconds if ttt and phase == "decode" else None,
    }  # fmt: skip
    for direction, name in itertools.product(
        ("read", "write"), ("weights", "fast_weights", "kv", "activations", "gradients")
    ):
        out[f"{direction}_{name}_bytes"] = 1e5 * tokens
    return out


def make_data(**changes: object) -> ReportData:
    """A small report with every frame filled; ``changes`` replace arguments of ``ReportData.of``."""
    points = [record(*key) for key in itertools.product(METHODS, ("prefill", "decode"), CONTEXTS, BATCHES)]
    headline = [(m, p, 4096, b) for m, p, b in itertools.product(METHODS, ("prefill", "decode"), BATCHES)]
    keys = ("method", "phase", "context_tokens", "batch")
    kernels = {"attention": 600.0, "q_proj+k_proj+v_proj": 300.0, "silu_mul": 100.0}
    tasks = [
        # unit, stream, kernel, start, finish, op_phase, own
        ("array", "forward", "fast_apply", 0, 100, "forward", True),
        ("ram", "update", "delta_gemm", 100, 150, "backward", True),
        ("ram", "update", "delta_scale+weight_write", 150, 250, "weight_write", True),
        ("array", "forward", "q_proj+k_proj+v_proj", 100, 200, "forward", False),
    ]
    crossing: dict[str, object] = {
        "method": "ttt_window",
        "baseline": "kv",
        "batch": None,
        "first_whole_token": None,
        "remark": None,
    }
    arguments: dict[str, object] = {
        "provenance": {"model": "Toy", "dtype": "bf16", "command": "run tiny", "version": "1"},
        "chip": make_chip(),
        "weight_bytes": 10_000_000,
        "points": pd.DataFrame(points),
        "breakdown": pd.DataFrame(
            [dict(zip(keys, key, strict=True), kernel=k, cycles=c) for key in headline for k, c in kernels.items()]
        ),
        "roofline": pd.DataFrame(
            # 4,000 FLOP on 100 bytes in 100 cycles of 1 ns: 40 FLOP per byte, 40 GFLOP/s
            [dict(zip(keys, key, strict=True), kernel="q_proj+k_proj+v_proj", stream="forward", flops=4000,
                  main_bytes=100, cycles=90, span_cycles=100, n_kernels=1) for key in headline]
        ),
        "step_times": pd.DataFrame(
            [{"method": m, "batch": b, "offset_tokens": i,
              "seconds": 0.008 if i == 0 and m.startswith("ttt") else 0.002}
             for m in METHODS for b in BATCHES for i in range(-3, 4)]
        ),
        "chunk_timeline": pd.DataFrame(
            [{"method": "ttt_window", "batch": 1, "unit": u, "stream": s, "kernel": k, "kind": "compute",
              "start_cycles": a, "finish_cycles": z, "layer": 0, "chunk": 3, "op_phase": p, "own": own}
             for u, s, k, a, z, p, own in tasks]
        ),
        "state": pd.DataFrame(
            [{"method": m, "context_tokens": t, "kv_bytes": state_bytes(m, t),
              "fast_weight_bytes": FAST if m.startswith("ttt") else 0, "carry_bytes": 0,
              "total_bytes": state_bytes(m, t)}
             for m in METHODS for t in CONTEXTS]
        ),
        # By hand: 1,024 x 1,000 + 3,000,000 bytes = 4,024 tokens of KV, smaller from token 4,025 on.
        "crossovers": pd.DataFrame([
            crossing | {"quantity": "state memory", "simulated_tokens": 4024.0, "first_whole_token": 4025,
                        "closed_form_tokens": 4024.0, "closed_form": "w + (Phi + carry) / kappa", "remark": "exact"},
            *(crossing | {"quantity": "decode time", "batch": b, "simulated_tokens": 5000.0, "closed_form_tokens": None,
                          "closed_form": None, "remark": "interpolated"} for b in BATCHES),
            crossing | {"quantity": "decode traffic", "batch": 1, "simulated_tokens": None,
                        "closed_form_tokens": 1024.0, "closed_form": "w", "remark": "interpolated"},
        ]),
        "sensitivity": pd.DataFrame(
            [dict(zip(keys, key, strict=True), parameter=p, change_frac=0.1, seconds=1.0, changed_seconds=1 / (1 + g),
                  gain_frac=g)
             for key in headline for p, g in (("memories.ram.bandwidth", 0.08), ("compute.array.peak", 0.0001))]
        ),
        "critical_path": pd.DataFrame(
            [dict(zip(keys, key, strict=True), unit=u, cycles=c, share_frac=c / 1000)
             for key in headline for u, c in (("ram", 700), ("launch.forward", 200), ("launch.update", 100))]
        ),
        "write_variants": pd.DataFrame([
            {"weight_write": "fused", "fits": True, "seconds": 1.0, "update_busy_cycles": 10, "update_main_bytes": 20},
            {"weight_write": "resident", "fits": False, "seconds": None, "update_busy_cycles": None,
             "update_main_bytes": None, "reason": "no room on chip"},
        ]),
    }  # fmt: skip
    given: dict[str, Any] = {**arguments, **changes}
    return ReportData.of(**given)


@pytest.fixture(scope="module")
def data() -> ReportData:
    return make_data()


def bare(**changes: object) -> ReportData:
    """Points alone: no frame beside them has a row."""
    none = {name: pd.DataFrame() for name in COLUMNS if name != "points"}
    return make_data(**{**none, **changes})


def texts(figure: object) -> list[str]:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    assert isinstance(figure, Figure)
    return [t.get_text() for t in figure.findobj(Text)]


# --- data -------------------------------------------------------------------------------------------------------------


def test_whole_numbers_stay_whole_beside_missing_ones(data):
    assert data.points["cycles"].isna().any()
    assert str(data.points["cycles"].dtype) == "Int64"
    assert str(data.points["context_tokens"].dtype) == "int64"


def test_headlines_take_the_fewest_sequences_for_prefill_and_the_most_for_decode(data):
    assert data.headlines == {
        "prefill": Headline(context_tokens=4096, batch=1),
        "decode": Headline(context_tokens=4096, batch=8),
    }


def test_machine_has_peak_and_sustained_rates(data):
    machine = data.machine
    assert (machine.peak_flops_per_s, machine.achievable_flops_per_s) == (1e14, 0.8e14)
    assert (machine.peak_bytes_per_s, machine.achievable_bytes_per_s) == (1e12, 0.9e12)


def test_notes_name_overrides_and_weak_numbers(data):
    assert data.notes == (
        "clock is set to 1 GHz on request",
        "1 of the 2 numbers in the chip file have low certainty: memories.ram.latency",
    )


def test_methods_know_windows_and_fast_weights(data):
    assert data.methods == list(METHODS)
    assert data.windowed == ["kv_window", "ttt_window"]
    assert data.with_fast_weights == ["ttt", "ttt_window"]


def test_a_frame_that_no_field_has_is_refused():
    with pytest.raises(TypeError, match="roof"):
        make_data(roof=pd.DataFrame())


@pytest.mark.parametrize(("tokens", "label"), [(131072, "128K"), (1 << 20, "1M"), (1500, "1,500"), (512, "512")])
def test_tokens_label(tokens, label):
    assert tokens_label(tokens) == label


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "group"),
    [
        ("q_proj+k_proj+v_proj", "attention projections"),
        ("gate_proj+up_proj+silu_mul", "gate and up"),
        ("delta_gemm+delta_scale", "update: delta"),
        ("delta_scale+weight_write", "weight write"),
        ("qk_norm+rope+kv_append", "norms, RoPE, residuals"),
        ("attn_norm+attention+o_proj+gate_proj", "whole layer, fused"),
        ("delta_sum", "update: delta"),
    ],
)
def test_kernel_group(label, group):
    assert kernel_group(label) == group


def test_transfers_are_a_group_of_their_own():
    from ttt_sim.ops import OP_KINDS, OpClass

    transfers = [kind.name for kind in OP_KINDS if kind.op_class == OpClass.COLLECTIVE]
    assert {kernel_group(name) for name in transfers} == {"between chips"}


def test_every_op_kind_has_a_group_and_every_group_a_place_in_the_stack():
    from ttt_sim.ops import OP_KINDS
    from ttt_sim.report.names import KERNEL_GROUPS, group_order

    known = {kind.name for kind in OP_KINDS}
    listed = [name for _, _, names in KERNEL_GROUPS for name in names]
    assert set(listed) <= known
    assert len(listed) == len(set(listed))
    assert {title for title, _ in group_order()} >= {kernel_group(name) for name in known}


def test_short_kernel():
    assert short_kernel("q_proj+k_proj+v_proj") == "q/k/v_proj"
    assert short_kernel("delta_scale+weight_write") == "delta_scale + weight_write"
    assert short_kernel("attention") == "attention"


def test_three_digits():
    assert [three_digits(v) for v in (0.0, 0.01234, 4.567, 99.96, 12345.0)] == ["0", "0.0123", "4.57", "100", "12,300"]


def test_colours_are_one_per_method_also_for_unknown_methods():
    points = pd.DataFrame([record("kv", "decode", 1024, 1) | {"method": m} for m in ("kv", "ttt", "other", "another")])
    data = bare(points=points)
    assert len({method_style(data, m).color for m in data.methods}) == 4
    assert method_style(data, "other").title == "other"


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_with_everything_and_with_nothing(name, tmp_path, data):
    full = render_figure(name, data, tmp_path / "full")
    assert full.title
    assert full.caption
    drawn = draw(name, bare())
    drawn.figure.canvas.draw()
    empty = make_data(
        points=pd.DataFrame(columns=list(COLUMNS["points"])), **{n: pd.DataFrame() for n in COLUMNS if n != "points"}
    )
    nothing = draw(name, empty)
    assert any(text.startswith("no data") for text in texts(nothing.figure))


@pytest.mark.parametrize("name", ["decode_time", "roofline", "chunk_timeline"])
def test_figures_are_the_same_bytes_every_time(name, tmp_path, data):
    for folder in ("a", "b"):
        render_figure(name, pickle.loads(pickle.dumps(data)), tmp_path / folder)
    for file in (f"figures/{name}.png", f"figures/{name}.svg", f"figures/{name}.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(tmp_path / "a" / f"figures/{name}.svg")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_and_no_axes_overlap(name, data):
    figure = draw(name, data).figure
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [box for ax in figure.axes if ax.get_visible() and (box := ax.get_tightbbox(renderer)) is not None]
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    header = [text.get_window_extent(renderer) for text in figure.texts]
    assert boxes
    for box in [*boxes, *legends, *header]:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    for a, b in itertools.combinations([*boxes, *legends, *header], 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) <= 1 or min(a.y1, b.y1) - max(a.y0, b.y0) <= 1


def test_matplotlib_settings_are_left_alone(data):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw("state_memory", data)
    assert dict(matplotlib.rcParams) == before


def test_state_memory_marks_the_crossover_and_counts_sequences(data):
    drawn = draw("state_memory", data)
    assert "4,024" in texts(drawn.figure)
    row = drawn.table[(drawn.table["method"] == "kv") & (drawn.table["context_tokens"] == 4096)]
    # (100 MB - 10 MB) / (4,096 x 1,000 B) = 21.97
    assert row["sequences_that_fit"].tolist() == [21]


def test_a_system_has_the_memory_of_its_chips_and_copies_of_what_they_share():
    provenance = {"model": "Toy", "dtype": "bf16", "parallel": {"tp": 2, "pp": 1, "cp": 2}}
    data = make_data(provenance=provenance)
    state = data.state.assign(carry_bytes=np.where(data.state["fast_weight_bytes"] > 0, CARRY, 0))
    drawn = draw("state_memory", replace(data, state=state))
    fit = drawn.table[drawn.table["context_tokens"] == 4096].set_index("method")["sequences_that_fit"]
    # 4 x 100 MB, weights twice: 380 MB. One copy of 4,096 x 1,000 B; two of 2 MB of fast weights, four of 1 MB of carry
    assert fit["kv"] == 380_000_000 // 4_096_000 == 92
    assert fit["ttt"] == 380_000_000 // (4_096_000 + 2 * FAST + 4 * CARRY) == 31
    assert "in 381.5 MiB of ram of 4 chips, spread evenly" in " ".join(" ".join(texts(drawn.figure)).split())
    assert draw("traffic", data).title == "What moves between RAM and the chips, by class"
    cost = draw("decode_cost", data)
    assert cost.title == "Cost of output tokens at the chips' hourly price"
    assert "does not fit 4 chips" in texts(cost.figure)
    assert answers(data)[0].startswith("System: 4 chips (2 tensor-parallel, 2 context-parallel).")


def test_what_cannot_run_needs_no_more_chips():
    data = make_data()
    points = data.points.assign(missing="")
    at = (points["method"] == "ttt") & (points["phase"] == "decode")
    for column, value in (("fits", False), ("missing", "no cache that all cores share"), ("chips_needed", 1)):
        points.loc[at, column] = value
    gone = replace(data, points=points)
    row = next(row for row in time_rows(gone, "decode") if (row.batch, row.context_tokens) == (1, 4096))
    assert row.cells[gone.methods.index("ttt")] == "cannot run"
    said = next(text for text in answers(gone) if text.startswith("Decode at"))
    assert "TTT + full attention: cannot run" in said
    for name in ("decode_time", "traffic"):
        drawn = texts(draw(name, gone).figure)
        assert any(text.strip() == "cannot run" for text in drawn), name
        assert not any("1 chips" in text for text in drawn), name


def test_points_that_do_not_fit_are_hatched_and_say_how_many_chips(data):
    from matplotlib.patches import Rectangle

    figure = draw("decode_time", data).figure
    hatched = [p for ax in figure.axes for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()]
    # At batch 8 full attention needs 8 x 16,384 x 1,000 B > 90 MB, with and without fast weights.
    assert len(hatched) == 2
    assert "needs 2 chips " in texts(figure)


def test_a_method_that_never_fits_is_labelled_inside_its_panel():
    points = pd.DataFrame([record("kv_window", "decode", t, b) for t in CONTEXTS for b in BATCHES])
    never = points.assign(method="kv", fits=False, chips_needed=2)
    figure = draw("decode_time", bare(points=pd.concat([points, never]))).figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for ax in figure.axes:
        labels = [text for text in ax.texts if "needs 2 chips" in text.get_text()]
        assert len(labels) == 1
        box, panel = labels[0].get_window_extent(renderer), ax.get_window_extent(renderer)
        assert panel.x0 <= box.x0
        assert box.x1 <= panel.x1


@pytest.mark.parametrize("name", ["state_memory", "prefill_time", "decode_time", "trade_off", "traffic"])
def test_quality_caveat_stands_where_windowed_and_full_attention_meet(name, data):
    assert any("19.99" in text for text in texts(draw(name, data).figure))
    full_only = make_data(
        points=data.points[data.points["method"].isin(["kv", "ttt"])],
        state=data.state[data.state["method"].isin(["kv", "ttt"])],
    )
    assert not any("19.99" in text for text in texts(draw(name, full_only).figure))


def test_roofline_places_kernels_by_hand_count(data):
    table = draw("roofline", data).table
    assert set(table["flop_per_byte"]) == {40.0}
    assert np.allclose(table["flops_per_s"], 4e10)
    assert any("ridge 100" in text for text in texts(draw("roofline", data).figure))


def test_traffic_table_adds_up_to_the_points(data):
    table = draw("traffic", data).table
    per_bar = table.groupby(["method", "phase", "batch"])["bytes_per_token"].sum()
    assert np.allclose(per_bar, 10 * 1e5)  # ten classes and directions of 100 kB per token


def test_time_by_kernel_is_the_breakdown_in_seconds(data):
    table = draw("time_by_kernel", data).table
    total = table[table["phase"] == "decode"].groupby("method")["seconds"].sum()
    assert np.allclose(total, 1000e-9)


def test_timeline_title_gives_the_share_of_the_write_that_is_hidden(data):
    # The write lasts from 150 to 250; forward work runs beside it from 150 to 200.
    assert "50%" in draw("chunk_timeline", data).title


def test_decode_steps_title_gives_the_boundary_ratio(data):
    assert "4.00 times" in draw("decode_steps", data).title


def test_sensitivity_leaves_out_what_buys_nothing(data):
    labels = texts(draw("sensitivity", data).figure)
    assert "ram.bandwidth" in labels
    assert "array.peak" not in labels


# --- findings ---------------------------------------------------------------------------------------------------------


def test_answers_state_the_crossover_exactly(data):
    state = next(line for line in answers(data) if line.startswith("State: TTT + window"))
    assert "from 4,025 tokens on (equal at 4,024.00)" in state
    # 16,384 x 1,000 bytes against 4,024,000
    assert "4.07 times less" in state


def test_answers_compare_times_at_the_headline(data):
    decode = next(line for line in answers(data) if line.startswith("Decode at 4K tokens, batch 8"))
    # 8e-6 + 8e-12 x 4,096,000 = 40.77 us against 8e-6 + 8e-12 x 1,024,000 = 16.19 us
    assert "KV cache: 40.8 µs" in decode.replace("us", "µs")
    assert "(2.52 times as fast)" in decode


def test_answers_say_what_does_not_fit(data):
    assert any(line.startswith("4 of 48 points do not fit one chip") for line in answers(data))


def test_one_update_and_wear_are_told(data):
    assert not any("One update" in line for line in answers(data))
    fast = data.points["method"].isin(["ttt_window"]) & data.points["fits"].astype(bool)
    columns = {"update_seconds": 1e-3, "update_energy_j": 0.05, "update_read_bytes": 2**20, "update_write_bytes": 2**19}
    points = data.points.assign(**{name: np.where(fast, value, np.nan) for name, value in columns.items()})
    points["lifetime_days"], points["lifetime_limited_by"] = np.where(fast, 3.0, np.nan), "fast_weight in cells"
    lines = [line for line in answers(replace(data, points=points)) if line.startswith("One update")]
    assert len(lines) == len(data.headlines)
    for line in lines:
        assert "TTT + window" in line
        assert line.endswith("1 ms, 50 mJ, 1 MiB read and 512 KiB written (fast_weight in cells lasts 3 days of this).")


def test_throttled_points_are_named(data):
    assert not any("power limit" in line for line in answers(data))
    points = data.points.assign(throttled=False, power_limit_w=350.0)
    points["unthrottled_seconds"] = pd.to_numeric(points["seconds"])
    first = points.index[points["fits"].astype(bool) & (points["method"] == "kv")][0]
    points.loc[first, "throttled"] = True
    points.loc[first, "unthrottled_seconds"] /= 1.25
    (line,) = [line for line in answers(replace(data, points=points)) if "power limit" in line]
    assert line.startswith(
        "1 of 48 points run at the power limit of 350 W and take longer for it; the most slowed is KV"
    )
    assert line.endswith("1.25 times its time without a limit.")


def test_time_rows_have_a_cell_per_method_and_mark_what_does_not_fit(data):
    rows = time_rows(data, "decode")
    assert [(r.batch, r.context_tokens) for r in rows] == list(itertools.product(BATCHES, CONTEXTS))
    last = dict(zip(data.methods, rows[-1].cells, strict=True))
    assert last["kv"] == "- (2 chips)"
    assert last["ttt_window"].endswith("/s")


def test_crossings_merge_batches_and_number_their_remarks_once(data):
    rows, remarks = crossing_rows(data)
    assert [row.label for row in rows] == ["state memory", "decode time, batch 1, 8", "decode traffic, batch 1"]
    assert [row.simulated for row in rows] == ["4,024.00", "5,000.00", "none in range"]
    assert remarks == ["exact", "interpolated"]
    assert [row.note for row in rows] == [1, 2, 2]
    assert len(merged_crossings(bare())) == 0


def test_limits_name_bound_kernels_and_gains(data):
    row = next(r for r in limit_rows(data) if (r.phase, r.method) == ("decode", "kv"))
    assert row.bound == "ram (75%)"
    assert row.kernels == "attention core 60%, attention projections 30%"
    assert row.gain == "ram.bandwidth 8.0%"


# --- terminal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_data, bare])
def test_summary_is_plain_text_of_at_most_100_columns_without_a_terminal(make):
    out = io.StringIO()
    print_summary(make(), Path("reports/tiny"), Console(file=out, width=240))
    text = out.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "Report: reports/tiny/README.md" in text


def test_summary_obeys_no_color(monkeypatch, data):
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    print_summary(data, None, Console(file=out, width=100, force_terminal=True))
    assert "\x1b[38" not in out.getvalue()


# --- on disk ----------------------------------------------------------------------------------------------------------

FEW = ("state_memory",)


def test_build_writes_a_whole_report(tmp_path, data):
    out = tmp_path / "new" / "report"
    files = build(data, out, figures=FEW, workers=1)
    names = {path.relative_to(out).as_posix() for path in files}
    tables = {f"data/{name}.csv" for name in COLUMNS}
    shown = {f"figures/state_memory.{ending}" for ending in ("png", "svg", "csv")}
    assert names == tables | shown | {"README.md", "summary.json"}
    page = (out / "README.md").read_text(encoding="utf-8")
    assert "figures/state_memory.png" in page
    assert "19.99" in page
    assert [path.name for path in out.parent.iterdir()] == ["report"]


def test_summary_json_is_strict_and_complete(tmp_path, data):
    out = tmp_path / "report"
    build(data, out, figures=FEW, workers=1)

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert summary["provenance"]["command"] == "run tiny"
    assert len(summary["points"]) == 48
    unfit = [p for p in summary["points"] if not p["fits"]]
    assert {(p["method"], p["context_tokens"], p["batch"]) for p in unfit} == {("kv", 16384, 8), ("ttt", 16384, 8)}
    assert all(p["seconds"] is None and p["chips_needed"] == 2 for p in unfit)
    first = summary["points"][0]
    # 1,024 tokens: 1,024e-6 s + 1,024,000 bytes x 1,024 tokens x 1e-12 s
    assert first["seconds"] == pytest.approx(1.024e-3 + 1.048576e-3)
    assert type(first["cycles"]) is int
    assert first["window_tokens"] is None
    assert summary["crossovers"][0]["first_whole_token"] == 4025
    assert summary["crossovers"][0]["batch"] is None


def test_csv_holds_the_points(tmp_path, data):
    out = tmp_path / "report"
    build(data, out, figures=FEW, workers=1)
    read = pd.read_csv(out / "data" / "points.csv")
    assert read["seconds"].tolist() == pytest.approx(data.points["seconds"].tolist(), nan_ok=True)


def test_two_processes_write_what_one_writes(tmp_path, data):
    names = ("state_memory", "crossovers")
    build(data, tmp_path / "one", figures=names, workers=1)
    build(data, tmp_path / "two", figures=names, workers=2)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_report_replaces_an_earlier_one_whole(tmp_path, data):
    out = tmp_path / "report"
    build(data, out, figures=("state_memory", "trade_off"), workers=1)
    build(data, out, figures=FEW, workers=1)
    assert not (out / "figures" / "trade_off.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_failed_or_interrupted_build_leaves_the_old_report(tmp_path, data, monkeypatch, failure):
    out = tmp_path / "report"
    build(data, out, figures=FEW, workers=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_: object) -> str:
        raise failure("stopped")

    monkeypatch.setattr(build_module, "page", fail)
    with pytest.raises(ConfigError if failure is OSError else failure):
        build(data, out, figures=FEW, workers=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_folders_with_other_files_are_refused(tmp_path, data):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"chapter\.txt"):
        build(data, other, figures=FEW, workers=1)
    assert (other / "chapter.txt").read_text(encoding="utf-8") == "years of work"

    out = tmp_path / "report"
    build(data, out, figures=FEW, workers=1)
    (out / "figures" / "notes.md").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"figures/notes\.md"):
        check_out(out)
    assert (out / "figures" / "notes.md").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="file"):
        check_out(tmp_path / "file")
    with pytest.raises(ConfigError, match="file"):
        check_out(tmp_path / "file" / "report")


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for out in (Path(), Path(".."), tmp_path):
        with pytest.raises(ConfigError, match="current folder"):
            check_out(out)
    check_out(Path("report"))


def test_an_unknown_figure_is_named_with_the_nearest(tmp_path, data):
    with pytest.raises(ConfigError, match="state_memory"):
        build(data, tmp_path / "report", figures=("state_memry",), workers=1)
    assert not (tmp_path / "report").exists()
