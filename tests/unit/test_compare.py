"""Many chips side by side: what a row holds, which chips are compared, what is marked, what the page says."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ttt_sim
from tests.unit.test_docs import RESULTS, names, table
from ttt_sim import comparison
from ttt_sim.chip import Chip, Execution, WriteMode
from ttt_sim.comparison import (
    COLUMNS,
    Compared,
    Comparison,
    bound_kind,
    choose_chips,
    compare,
    label_of,
    ridge_point,
    weak_energy_inputs,
    weak_inputs,
    why,
)
from ttt_sim.config import load_chip
from ttt_sim.config.chip_schema import CHIP_KINDS
from ttt_sim.errors import ConfigError
from ttt_sim.model import Parallel
from ttt_sim.model_config import load_model, load_ttt
from ttt_sim.report.compare import write_compared
from ttt_sim.report.compare_words import (
    DAGGER,
    EXECUTION_WORDS,
    KIND_TITLES,
    WRITE_WORDS,
    by_kind,
    chip_label,
    findings,
    full_table,
    speed_table,
)
from ttt_sim.report.figures_chips import FIGURES, KIND_STYLES, name_points
from ttt_sim.simulation import Point

ROOT = Path(__file__).parents[2]
METHODS = ("kv", "kv_window", "ttt", "ttt_window")


def settings(chips: Sequence[Chip], **changes: object) -> Comparison:
    chosen = Comparison(
        chips=tuple(chips), model=load_model("toy"), methods=METHODS, context=256, batch=2, ttt=load_ttt("toy"),
        window=64, dtype=None, kv_dtype=None, call_tokens=8192, workers=1,
    )  # fmt: skip
    return replace(chosen, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny() -> Chip:
    return load_chip("tiny_gpu")


@pytest.fixture(scope="module")
def compared(tiny: Chip) -> Compared:
    """Two chips that run everything, and one whose memory holds the weights and no KV cache of 256 tokens twice."""
    small = load_chip("tiny_systolic", overrides={"memories.hbm.capacity": "660 KiB"})
    return compare(settings([tiny, replace(tiny, name="twin", kind="gpu"), replace(small, kind="tpu")]))


def row(data: Compared, chip: str, method: str) -> dict[str, Any]:
    found = data.table[(data.table["chip"] == chip) & (data.table["method"] == method)]
    assert len(found) == 1
    return {str(name): value for name, value in found.iloc[0].to_dict().items()}


def with_certainty(chip: Chip, certainty: str, *paths: str) -> Chip:
    changed = {path: replace(chip.provenance[path], certainty=certainty) for path in paths}  # type: ignore[arg-type]
    return replace(chip, provenance={**chip.provenance, **changed})


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_for_each_chip_and_method(compared: Compared) -> None:
    assert tuple(compared.table.columns) == COLUMNS
    assert list(zip(compared.table["chip"], compared.table["method"], strict=True)) == [
        (chip, method) for chip in ("tiny_gpu", "twin", "tiny_systolic") for method in METHODS
    ]


def test_state_capacity_by_hand(compared: Compared) -> None:
    # Elements: per layer q and o 64 x 64, k and v 32 x 64, three of 64 x 192, two norms of 64, two of 16; embedding
    # 256 x 64, shared with the head; last norm 64; a row of the rotary table, 2 x 16.
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 16
    weights = 2 * (4 * layer + 256 * 64 + 64 + 2 * 16)
    # A token keeps a key and a value of 2 heads x 16 in 4 layers.
    state = 256 * 4 * 2 * 2 * 16 * 2
    found = row(compared, "tiny_gpu", "kv")
    assert (found["weight_bytes"], found["state_bytes_per_sequence"]) == (weights, state)
    assert found["sequences"] == ((1 << 30) - weights) // state == 8188
    # 660 KiB less the weights leave one sequence of 131072 bytes, and seven of the 64 tokens of a window.
    small = row(compared, "tiny_systolic", "kv")
    assert small["sequences"] == (660 * 1024 - weights) // state == 1
    assert row(compared, "tiny_systolic", "kv_window")["sequences"] == (660 * 1024 - weights) // (state // 4) == 7


def test_nothing_is_held_where_the_weights_do_not_fit(tiny: Chip) -> None:
    chip = load_chip("tiny_gpu", overrides={"memories.hbm.capacity": "64 KiB"})
    data = compare(settings([chip], methods=("kv",)))
    assert row(data, "tiny_gpu", "kv")["sequences"] == 0
    assert not row(data, "tiny_gpu", "kv")["decode_fits"]
    assert "No chip holds a sequence" in " ".join(findings(data))


def test_values_are_those_of_the_points(compared: Compared) -> None:
    record = ttt_sim.simulate(
        "tiny_gpu", "toy", "ttt_window", ttt="toy", window=64, phase="decode", context=256, batch=2
    ).record
    found = row(compared, "tiny_gpu", "ttt_window")
    assert found["step_seconds"] == record["seconds"]
    assert found["tokens_per_s"] == record["tokens_per_s"]
    assert found["tokens_per_s_per_user"] == pytest.approx(float(str(record["tokens_per_s"])) / 2)
    assert found["boundary_added_seconds"] == pytest.approx(
        float(str(record["boundary_step_seconds"])) - float(str(record["ordinary_step_seconds"]))
    )
    # one dollar an hour buys an hour of tokens
    assert found["tokens_per_usd"] == pytest.approx(float(str(record["tokens_per_s"])) * 3600)
    assert found["tokens_per_s_per_w"] == pytest.approx(1 / float(str(record["energy_j_per_token"])))


def fake_record(point: Point) -> Mapping[str, object]:
    """A system of four chips that makes 80 tokens a second at 400 W; eight times as many without the KV cache."""
    factor = 1.0 if point.method.name == "kv" else 8.0
    return {
        "fits": True, "missing": "", "reason": "", "chips": 4, "chips_needed": 4, "seconds": 2 / (80.0 * factor),
        "seconds_low": 1 / (80.0 * factor), "seconds_high": 4 / (80.0 * factor), "tokens_per_s": 80.0 * factor,
        "seconds_per_token": point.context_tokens / 100 if factor == 1 else 15.0,
        "energy_j_per_token": 400 / 80 / factor,
        "average_power_w": 400.0, "throttled": False, "cost_usd_per_million_tokens": 2.0, "bound_by": "hbm",
        "bound_share": 1.0, "idle_energy_j": 1.0, "energy_hbm_j": 2.0, "boundary_step_seconds": None,
    }  # fmt: skip


def test_systems_of_several_chips_are_compared_per_chip(tiny: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "record_or_reason", fake_record)
    monkeypatch.setattr(comparison, "least_system", lambda *_, **__: Parallel(tp=4))
    data = compare(settings([tiny], methods=("kv", "ttt_window")))
    found = row(data, "tiny_gpu", "kv")
    assert (found["tp"], found["pp"], found["chips_needed"]) == (4, 1, 4)
    assert (found["chips"], found["tokens_per_s"], found["tokens_per_s_per_chip"]) == (4, 80.0, 20.0)
    assert found["prefill_tokens_per_s_per_chip"] == 20.0
    assert found["tokens_per_s_per_w"] == 0.2
    assert found["tokens_per_usd"] == 500_000
    assert (found["power_limit_w"], found["throttled"]) == (400.0, False)
    assert found["capacity_bytes"] == 4 << 30
    # Each chip has a quarter of the query heads, columns and vocabulary, a copy of one of the two KV heads, and the
    # rotary table of all 256 positions.
    layer = 2 * 64 * 16 + 2 * 16 * 64 + 3 * 64 * 48 + 2 * 64 + 2 * 16
    weights = 2 * (4 * layer + 64 * 64 + 64 + 256 * 2 * 16)
    assert found["sequences"] == ((1 << 30) - weights) // (256 * 4 * 2 * 16 * 2) == 16381
    assert found["sequences_per_chip"] == 16381 / 4
    assert row(data, "tiny_gpu", "ttt_window")["decode_gain"] == 8.0
    assert "tiny_gpu ×4" in " ".join(findings(data))
    assert "a system takes 4 chips" in by_kind(data)[0]
    assert speed_table(data).rows[0][0] == "tiny_gpu ×4"


def test_decode_crossing_lies_where_the_curves_meet(tiny: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    # tokens / 100 against 15: equal at 1500
    monkeypatch.setattr(comparison, "record_or_reason", fake_record)
    data = compare(settings([tiny]))
    found = row(data, "tiny_gpu", "ttt_window")
    assert found["decode_crossing_tokens"] == pytest.approx(1500)
    assert found["decode_crossing_note"] == "linear between 1024 and 2048 tokens"
    # the window, and what the fast weights take beside it
    assert row(data, "tiny_gpu", "kv_window")["state_crossing_tokens"] == 64.0
    full = row(data, "tiny_gpu", "ttt")
    assert pd.isna(full["state_crossing_tokens"])
    assert str(full["decode_crossing_note"]).startswith("never")


def test_few_contexts_give_the_crossing_of_many() -> None:
    data = compare(
        settings(
            [load_chip("h100")], model=load_model("Qwen3-4B"), methods=("kv", "ttt_window"), context=32768, batch=8,
            window=1024, ttt=load_ttt("default"),
        )
    )  # fmt: skip
    crossing = row(data, "h100", "ttt_window")["decode_crossing_tokens"]
    at = int(float(str(crossing)))
    seconds = {
        (method, context): float(
            str(
                ttt_sim.simulate("h100", "Qwen3-4B", method, phase="decode", context=context, batch=8).record["seconds"]
            )
        )
        for method in ("kv", "ttt_window")
        for context in (at - 64, at + 64)
    }
    assert seconds["ttt_window", at - 64] > seconds["kv", at - 64]
    assert seconds["ttt_window", at + 64] < seconds["kv", at + 64]


def test_a_system_for_decode_where_none_has_room_for_a_prefill_call(
    tiny: Chip, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def least(*_: object, rows: int, **__: object) -> Parallel | None:
        asked.append(rows)
        return Parallel(tp=2) if rows == 1 else None

    monkeypatch.setattr(comparison, "least_system", least)
    system = settings([tiny], methods=("kv",)).system_of(tiny)
    assert system.parallel == Parallel(tp=2)
    assert system.needed == {"kv": 2}
    assert asked[:2] == [256, 1]


# --- what does not run ------------------------------------------------------------------------------------------------


def test_a_chip_without_the_format_is_a_row_that_says_so(tiny: Chip) -> None:
    data = compare(settings([tiny], dtype="fp16"))
    found = row(data, "tiny_gpu", "kv")
    assert (found["prefill_fits"], found["decode_fits"]) == (False, False)
    assert "no peak for dtype fp16" in str(found["decode_why"])
    assert not str(found["decode_why"]).startswith("tiny_gpu")
    assert pd.isna(found["tokens_per_s"])
    said = [sentence for sentence in findings(data) if sentence.startswith("tiny_gpu runs none of the methods")]
    assert len(said) == 1
    assert "fp16" in said[0]
    assert speed_table(data).rows == (("tiny_gpu", "example", *["cannot run"] * 4),)


def test_an_execution_style_that_does_not_suit_is_a_row(tiny: Chip) -> None:
    chip = replace(tiny, execution="systolic")
    found = row(compare(settings([chip], methods=("kv",))), "tiny_gpu", "kv")
    assert str(found["decode_why"]).startswith("execution systolic needs a matrix unit")


def test_memory_behind_the_main_memory_is_counted_apart() -> None:
    chip = load_chip("tiny_tiers")
    assert chip.backing is not None
    found = row(compare(settings([chip], methods=("kv",))), "tiny_tiers", "kv")
    main, behind = chip.main_memory.capacity_bytes, chip.backing.capacity_bytes
    assert found["sequences"] == max(main - 427456, 0) // 131072
    assert found["sequences_with_backing"] == (main + behind - 427456) // 131072
    assert found["capacity_bytes"] == main


def test_what_does_not_fit_says_what_would_hold_it(compared: Compared) -> None:
    found = row(compared, "tiny_systolic", "kv")
    assert not found["decode_fits"]
    assert str(found["decode_why"]).endswith("no number of linked chips holds it")  # the chip has no link
    text = " ".join(findings(compared))
    assert (
        "tiny_systolic KV cache, TTT + full attention, TTT + window 64: needs more memory than there is, and no "
        "number of linked chips holds it (2 chips)."
    ) in text
    cells = next(cells for cells in speed_table(compared).rows if cells[0] == "tiny_systolic")
    assert cells[2] == "- (2 chips)"


def test_reasons_name_the_chips_that_would_do(tiny: Chip) -> None:
    record = {"fits": False, "missing": "", "reason": "weights and state need 3 GiB of 1 GiB", "chips_needed": 3}
    assert why(record, tiny) == "weights and state need 3 GiB of 1 GiB: 3 chips hold it"
    assert why(record | {"chips_needed": 1}, tiny) == "weights and state need 3 GiB of 1 GiB"
    assert why(record | {"missing": "tiny_gpu: no vector unit"}, tiny) == "no vector unit"
    assert why(record | {"fits": True}, tiny) == ""


@pytest.mark.parametrize("name", ["decode_speed", "prefill_speed", "energy_speed", "gain"])
def test_figures_list_what_they_leave_out(compared: Compared, name: str) -> None:
    drawn = FIGURES[name](compared)
    notes = " ".join(text.get_text() for text in drawn.figure.texts)
    assert "Not shown" in notes
    assert "tiny_systolic" in notes


#: Names and places of points, in fractions of a panel, as crowded as energy and speed of all chips.
CROWDS = (
    (
        ("a100", 0.361, 0.589), ("ai100_ultra", 0.184, 0.638), ("b200", 0.58, 0.521), ("gaudi3", 0.49, 0.579),
        ("groq_lpu", 0.904, 0.899), ("h100", 0.459, 0.537), ("h200", 0.51, 0.513), ("hbm_pim", 0.383, 0.72),
        ("ideal_ttt", 0.531, 0.527), ("inferentia2", 0.309, 0.615), ("mi210", 0.309, 0.602),
        ("mi300x", 0.477, 0.602), ("northpole", 0.767, 0.688), ("reram_cim", 0.813, 0.297),
        ("sn40l", 0.347, 0.661), ("tpu_v5e", 0.47, 0.567), ("tpu_v5p", 0.448, 0.537), ("tpu_v6e", 0.473, 0.521),
        ("tpu_v7", 0.547, 0.536), ("trainium2", 0.452, 0.542), ("wse3", 0.829, 0.85),
    ),
    (
        ("a100", 0.545, 0.281), ("ai100_ultra", 0.396, 0.302), ("b200", 0.727, 0.235), ("gaudi3", 0.695, 0.25),
        ("gddr6_aim", 0.569, 0.304), ("groq_lpu", 0.917, 0.876), ("h100", 0.628, 0.235), ("h200", 0.671, 0.213),
        ("hbm_pim", 0.517, 0.494), ("hexagon_8elite", 0.083, 0.083), ("ideal_ttt", 0.737, 0.197),
        ("inferentia2", 0.483, 0.322), ("mi210", 0.498, 0.292), ("mi300x", 0.63, 0.324),
        ("northpole", 0.731, 0.743), ("npu_xdna2", 0.094, 0.125), ("reram_cim", 0.416, 0.917),
        ("sn40l", 0.561, 0.323), ("tpu_v5e", 0.651, 0.273), ("tpu_v5p", 0.658, 0.207), ("tpu_v6e", 0.671, 0.2),
        ("tpu_v7", 0.797, 0.174), ("trainium2", 0.652, 0.218), ("versal_vhk158", 0.417, 0.478),
        ("wse3", 0.839, 0.83),
    ),
)  # fmt: skip


@pytest.mark.parametrize("points", CROWDS)
def test_names_touch_no_name_and_no_line_to_one(points: Sequence[tuple[str, float, float]]) -> None:
    wide, high = 10.2, 4.4
    figure = Figure(figsize=(wide, high), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    name_points(axes, [(x, y) for _, x, y in points], [f"{name} {DAGGER}" for name, _, _ in points], (wide, high))
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for line in axes.lines:
        (x0, y0), (x1, y1) = np.array(line.get_xydata()) * [100 * wide, 100 * high]
        # an end lies on the edge of the name that the line leads to
        along = [(x0 + (x1 - x0) * share, y0 + (y1 - y0) * share) for share in np.linspace(0, 0.95, 100)]
        assert not any(box.contains(x, y) for box in boxes for x, y in along)


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wearing(tiny: Chip) -> Compared:
    return compare(settings([load_chip("tiny_pcm"), tiny]))


def test_updates_are_those_of_the_record(wearing: Compared) -> None:
    record = ttt_sim.simulate(
        "tiny_pcm", "toy", "ttt_window", ttt="toy", window=64, phase="decode", context=256, batch=2, chips=1
    ).record
    found = row(wearing, "tiny_pcm", "ttt_window")
    assert record["lifetime_days"] is not None
    for name in comparison.UPDATE_FIELDS:
        assert found[name] == record[name], name
    assert pd.isna(row(wearing, "tiny_gpu", "ttt_window")["lifetime_days"])
    assert pd.isna(row(wearing, "tiny_gpu", "kv")["update_seconds"])


def test_slow_writes_and_wear_are_said_and_drawn(wearing: Compared) -> None:
    text = " ".join(findings(wearing))
    assert "slowest on tiny_pcm" in text
    assert "Changed by pulses that are verified, cell by cell: " in text
    assert "Cells that wear last, at constant use: tiny_pcm " in text
    figure = FIGURES["update_cost"](wearing).figure
    assert len(figure.axes) == 2  # time and energy; the one lifetime stands in a note
    assert "Cells that wear last" in " ".join(text.get_text() for text in figure.texts)


def test_power_that_limits_is_said(tiny: Chip) -> None:
    hot = load_chip("tiny_gpu", overrides={"power.limit": "10.05 W"})
    data = compare(settings([hot, replace(tiny, name="cool")], methods=("kv",)))
    assert row(data, "tiny_gpu", "kv")["throttled"]
    assert not row(data, "cool", "kv")["throttled"]
    assert "Power limits decode on tiny_gpu (KV cache)." in findings(data)


# --- certainty --------------------------------------------------------------------------------------------------------


def test_bounding_rate_of_low_certainty_is_weak(tiny: Chip) -> None:
    assert weak_inputs(tiny, "bf16", "hbm") == ()
    doubtful = with_certainty(tiny, "low", "memories.hbm.read_bandwidth", "compute.tensor_core.peak.fp8")
    assert weak_inputs(doubtful, "bf16", "hbm") == ("memories.hbm.read_bandwidth",)
    assert weak_inputs(doubtful, "bf16", "tensor_core") == ()
    assert weak_inputs(doubtful, "fp8", "tensor_core") == ("compute.tensor_core.peak.fp8",)
    launch = with_certainty(tiny, "low", "overheads.op_launch")
    assert weak_inputs(launch, "bf16", "launch") == ("overheads.op_launch",)
    assert weak_inputs(with_certainty(tiny, "medium", "overheads.op_launch"), "bf16", "launch") == ()


def test_times_of_systems_rest_on_the_links_that_they_use() -> None:
    h100 = load_chip("h100")  # eight in a node
    doubtful = with_certainty(h100, "low", "links.nvlink.latency", "links.nic.bandwidth", "links.nic.latency")
    assert weak_inputs(doubtful, "bf16", "link", 8) == ("links.nvlink.latency",)
    assert weak_inputs(doubtful, "bf16", "link", 9) == (
        "links.nvlink.latency", "links.nic.bandwidth", "links.nic.latency"
    )  # fmt: skip
    assert weak_inputs(doubtful, "bf16", "hbm", 9) == ()
    northpole = load_chip("northpole")
    cores = {link.name for link in northpole.links if link.scope == "core"}
    for bound_by in ("launch", "link"):
        found = weak_inputs(northpole, "int8", bound_by)
        assert {path.split(".")[1] for path in found if path.startswith("links.")} == cores


def test_energy_of_links_can_be_the_weak_part() -> None:
    doubtful = with_certainty(load_chip("h100"), "low", "links.nvlink.energy")
    record = {"idle_energy_j": 1.0, "energy_hbm_j": 2.0, "energy_nvlink_j": 3.0}
    assert weak_energy_inputs(doubtful, "bf16", record) == ("links.nvlink.energy",)


def test_fitted_constants_of_low_certainty_are_weak_whatever_bounds(tiny: Chip) -> None:
    h100 = load_chip("h100")
    path = next(path for path, place in h100.provenance.items() if place.calibration and path.startswith("library."))
    assert path in weak_inputs(with_certainty(h100, "low", path), "bf16", "hbm")
    assert path not in weak_inputs(with_certainty(h100, "high", path), "bf16", "hbm")


def test_energy_is_weak_by_its_largest_part(tiny: Chip) -> None:
    doubtful = with_certainty(tiny, "low", "power.idle", "memories.hbm.read_energy")
    idle = {"idle_energy_j": 3.0, "energy_hbm_j": 2.0, "energy_tensor_core_j": 1.0}
    assert weak_energy_inputs(doubtful, "bf16", idle) == ("power.idle",)
    assert weak_energy_inputs(doubtful, "bf16", idle | {"energy_hbm_j": 4.0}) == ("memories.hbm.read_energy",)
    assert weak_energy_inputs(doubtful, "bf16", idle | {"energy_tensor_core_j": 4.0}) == ()


@pytest.fixture(scope="module")
def doubtful(tiny: Chip) -> Compared:
    weak = with_certainty(tiny, "low", "compute.tensor_core.peak.bf16")
    return compare(settings([replace(weak, name="weak"), tiny]))


def test_dagger_in_tables_and_words(doubtful: Compared) -> None:
    cells = {cells[0]: cells[2] for cells in speed_table(doubtful).rows}
    assert cells["weak"].endswith(DAGGER)
    assert DAGGER not in cells["tiny_gpu"]
    said = next(text for text in findings(doubtful) if text.startswith(f"{DAGGER} Decode"))
    assert said == f"{DAGGER} Decode rests on numbers of low certainty on 1 of 2 chips. Peak rate: weak."
    rows = {(cells[0], cells[1]): cells for cells in full_table(doubtful).rows}
    step = full_table(doubtful).header.index("step")
    assert rows["weak", "KV cache"][step].endswith(DAGGER)
    assert DAGGER not in rows["tiny_gpu", "KV cache"][step]


def test_dagger_and_hollow_marks_in_figures(doubtful: Compared) -> None:
    figure = FIGURES["decode_speed"](doubtful).figure
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert f"weak {DAGGER}" in labels
    assert "tiny_gpu" in labels
    hollow = {round(y): face == "#FFFFFF" for y, face in marks(figure)}
    assert hollow == {labels.index(f"weak {DAGGER}"): True, labels.index("tiny_gpu"): False}


def marks(figure: Figure) -> Iterator[tuple[float, str]]:
    """Row and face colour of every mark of a dot plot."""
    for line in figure.axes[0].lines:
        rows = np.asarray(line.get_ydata(), dtype=np.float64)
        if rows.size == 1:
            yield float(rows[0]), str(line.get_markerfacecolor())


# --- which chips ------------------------------------------------------------------------------------------------------


def paths(*chips: str) -> list[str]:
    return [str(ROOT / "hw_configs" / f"{chip}.yaml") for chip in chips]


def test_examples_in_a_list_of_files_are_left_out() -> None:
    chosen = choose_chips([*paths("h100", "tiny_gpu"), "tiny_systolic"])
    assert [chip.name for chip in chosen.chips] == ["h100", "tiny_systolic"]
    assert chosen.left_out == ("tiny_gpu",)


def test_examples_stay_where_there_is_nothing_else() -> None:
    chosen = choose_chips(paths("tiny_gpu", "tiny_systolic"))
    assert [chip.name for chip in chosen.chips] == ["tiny_gpu", "tiny_systolic"]
    assert chosen.left_out == ()


def test_variants_have_names_of_their_own() -> None:
    chosen = choose_chips(["h100", "h100:H100-PCIe"])
    assert [label_of(chip) for chip in chosen.chips] == ["h100", "h100:H100-PCIe"]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [1, 2\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        choose_chips(["h100", "h10", str(broken), "h100", *paths("h100")])
    message = str(caught.value)
    assert message.startswith("4 of 5 chips cannot be compared\n")
    for words in (
        "unknown chip 'h10'",
        "broken.yaml",
        "h100: is given twice",
        "h100.yaml and h100 are both named h100",
    ):
        assert words in message


# --- what is said -----------------------------------------------------------------------------------------------------


def test_every_kind_and_mode_has_words_and_looks() -> None:
    assert set(KIND_TITLES) == set(KIND_STYLES) == set(CHIP_KINDS)
    assert len(set(KIND_STYLES.values())) == len(CHIP_KINDS)
    assert set(EXECUTION_WORDS) == set(get_args(Execution))
    assert set(WRITE_WORDS) == set(get_args(WriteMode))


def test_bound_kinds(tiny: Chip) -> None:
    found = {name: bound_kind(tiny, name) for name in ("hbm", "tensor_core", "launch", "somewhere")}
    assert found == {
        "hbm": "main memory", "tensor_core": "matrix unit", "launch": "launches", "somewhere": "links"
    }  # fmt: skip


def test_ridge_point_by_hand(tiny: Chip) -> None:
    # 1.024 TFLOP/s over 64 GB/s
    assert ridge_point(tiny, "bf16") == 16.0
    assert ridge_point(tiny, "fp16") is None


def test_sentences_follow_the_numbers(compared: Compared) -> None:
    text = " ".join(findings(compared))
    speeds = [row(compared, chip, "kv")["tokens_per_s"] for chip in ("tiny_gpu", "twin")]
    assert speeds[0] == speeds[1]
    assert "Fastest decode, KV cache: per chip tiny_gpu " in text  # the first of equals
    gains = compared.table[compared.table["method"] == "ttt_window"].set_index("chip")["decode_gain"]
    assert f"most on tiny_gpu ({float(gains['tiny_gpu']):.2f} times, bound by tensor_core)" in text
    kinds = by_kind(compared)
    assert [sentence.split(" (")[0] for sentence in kinds] == ["GPU", "TPU", "Example"]
    assert chip_label("x", [1, 1]) == "x"
    assert chip_label("x", [2, 8]) == "x ×2 to 8"


# --- the folder -------------------------------------------------------------------------------------------------------


def test_folder_holds_everything_and_is_strict_json(compared: Compared, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_compared(compared, out, command="compare", version="0", workers=1)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {"README.md", "summary.json", "data/compare.csv", "data/points.csv"} | {
        f"figures/{name}.{end}" for name in FIGURES for end in ("png", "svg", "csv")
    }
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert set(summary["files"]) == found
    assert len(summary["rows"]) == 12
    assert sorted(summary) == sorted(names(table(RESULTS, "The compare folder", "Key")))
    page = (out / "README.md").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"(figures/{name}.png)" in page
    table_of = pd.read_csv(out / "data" / "compare.csv")
    assert tuple(table_of.columns) == COLUMNS
    assert table_of["chips_needed"].dtype == "int64"


def test_columns_are_documented() -> None:
    assert sorted(names(table(RESULTS, "The compare folder", "Column"))) == sorted(COLUMNS)


def test_figures_without_a_number_say_so(tiny: Chip) -> None:
    data = compare(settings([tiny], dtype="fp16"))
    for name, figure in FIGURES.items():
        if name != "sequences":
            drawn = figure(data).figure
            assert any("no data" in text.get_text() for ax in drawn.axes for text in ax.texts), name


@pytest.mark.parametrize("methods", [("kv",), ("ttt",), ("ttt_window",), ("kv_quant", "kv_window")])
def test_any_choice_of_methods_makes_a_report(tiny: Chip, methods: tuple[str, ...], tmp_path: Path) -> None:
    data = compare(settings([tiny], methods=methods))
    write_compared(data, tmp_path / "out", command="compare", version="0", workers=1)
    assert findings(data)
