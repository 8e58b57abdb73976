"""Drift of a fast weight in number formats: cases by hand, the reference, brute force, and what must not matter."""

import hashlib
import io
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from ttt_sim.drift import (
    COLUMNS,
    HEADROOM,
    STORAGES,
    Drift,
    DriftSettings,
    FastWeight,
    chunk_inputs,
    frobenius,
    layer_weights,
    parse_clips,
    published_clip,
    recorded_chunks,
    run_drift,
)
from ttt_sim.errors import ConfigError
from ttt_sim.reference import randomness
from ttt_sim.reference.checks import FloatArray, InputError
from ttt_sim.reference.formats import FLOAT32, FORMATS, is_in
from ttt_sim.reference.in_place_ttt import ChunkRule, StreamingMlp, TTTOptions
from ttt_sim.report.drift import findings, format_rows, page, print_drift, write_drift
from ttt_sim.report.figures_drift import FORMAT_STYLES

#: Small enough for brute force, and so fast a rate that every format moves.
SMALL = DriftSettings(tokens=40 * 16, width=8, ff=24, chunk=16, rate=300.0, clips=(None, 2e-6))


@pytest.fixture(scope="module")
def small() -> Drift:
    return run_drift(SMALL)


def series(drift: Drift, name: str, clip: float | None) -> pd.DataFrame:
    frame = drift.frame
    return frame[(frame["format"] == name) & (frame["clip"].isna() if clip is None else frame["clip"] == clip)]


def write(weight: FastWeight, delta: FloatArray, stream: int = 0, rate: float = 1.0) -> None:
    weight.update(delta, delta, rate, randomness.raw(7, stream, delta.shape))


# --- one weight, by hand ----------------------------------------------------------------------------------------------


def test_three_updates_by_hand() -> None:
    """bf16 numbers from 1 are 2^-7 apart, from 1/2 on 2^-8. Ties go to the even significand.

    1 + 1/256 is a tie and stays 1; + 3/256 is a tie between 2/256 and 4/256 and goes up; - 1/256 is the same tie.
    """
    weight = FastWeight.of(STORAGES["bf16"], np.array([[1.0, 0.5]]))
    seen = []
    for step, delta in enumerate((1 / 256, 3 / 256, -1 / 256)):
        write(weight, np.full((1, 2), delta), step)
        seen.append((weight.kept[0].tolist(), weight.last_swamped, weight.swamped))
    assert seen == [
        ([1.0, 0.5 + 1 / 256], 1, 1),
        ([1 + 4 / 256, 0.5 + 4 / 256], 0, 1),
        ([1 + 4 / 256, 0.5 + 3 / 256], 1, 2),
    ]
    assert (weight.nonzero, weight.underflown) == (6, 0)


@pytest.mark.parametrize(("name", "spacing"), [("bf16", 2**-7), ("fp16", 2**-10), ("fp32", 2**-23)])
def test_constant_delta_under_half_a_spacing_never_arrives(name: str, spacing: float) -> None:
    weight = FastWeight.of(STORAGES[name], np.ones((4, 4)))
    for step in range(50):
        write(weight, np.full((4, 4), 0.49 * spacing), step)
    assert np.array_equal(weight.kept, np.ones((4, 4)))
    assert (weight.nonzero, weight.swamped, weight.underflown) == (800, 800, 0)
    write(weight, np.full((4, 4), 0.51 * spacing), 50)
    assert np.array_equal(weight.kept, np.full((4, 4), 1 + spacing))


def test_master_moves_exactly_and_its_copy_follows() -> None:
    """1024 steps of 2^-10: every partial sum is a float32, and the copy is the nearest bf16 number all along."""
    weight = FastWeight.of(STORAGES["fp32_master"], np.ones((2, 3)))
    for step in range(1, 1025):
        write(weight, np.full((2, 3), 2.0**-10), step)
        assert np.array_equal(weight.kept, np.full((2, 3), 1 + step / 1024))
        assert np.abs(weight.applied - weight.kept).max() <= 2**-8  # half a spacing
        assert is_in(weight.applied, FORMATS["bfloat16"])
    assert weight.swamped == 0


@pytest.mark.parametrize("name", ["bf16_stochastic", "fp8_e4m3_stochastic"])
def test_stochastic_rounding_moves_at_the_expected_rate(name: str) -> None:
    """An eighth of a spacing goes up once in eight times. n elements and steps: a binomial count, within 5 sigma."""
    storage, shape, steps = STORAGES[name], (64, 64), 20
    spacing = 2.0 ** (1 - storage.fmt.precision)
    weight = FastWeight.of(storage, np.ones(shape))
    write(weight, np.full(shape, spacing / 8), 0)
    assert set(np.unique(weight.kept)) == {1.0, 1 + spacing}
    trials = weight.nonzero
    assert abs(trials - weight.swamped - trials / 8) <= 5 * math.sqrt(trials * 7 / 64)
    for step in range(1, steps):
        write(weight, np.full(shape, spacing / 8), step)
        if weight.kept.max() >= 2 - spacing:
            break
    else:
        step = steps
    moved = (weight.kept.mean() - 1) / spacing
    n = weight.nonzero / weight.kept.size
    assert abs(moved - n / 8) <= 5 * math.sqrt(n * 7 / 64 / weight.kept.size)


def test_underflow_is_counted_apart() -> None:
    """fp16 knows nothing under 2^-25 but zero; a delta of zero is no update at all."""
    weight = FastWeight.of(STORAGES["fp16"], np.array([[1.0, 1.0, 2.0**-24, 1.0]]))
    write(weight, np.array([[2.0**-10, 2.0**-20, 2.0**-26, 0.0]]))
    assert weight.kept.tolist() == [[1 + 2.0**-10, 1.0, 2.0**-24, 1.0]]
    assert (weight.nonzero, weight.swamped, weight.underflown) == (3, 2, 1)


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("size", [1e-4, 0.07, 30.0])
def test_scale_is_a_power_of_two_that_leaves_headroom(name: str, size: float) -> None:
    storage = STORAGES[name]
    w_0 = size * randomness.normal(3, 0, (16, 16))
    weight = FastWeight.of(storage, w_0)
    assert math.frexp(weight.scale)[0] == 0.5
    stored = float(np.abs(weight.kept).max()) * weight.scale
    if storage.scaled:
        assert storage.fmt.largest / (2.5 * HEADROOM) < stored <= 1.1 * storage.fmt.largest / HEADROOM
    else:
        assert weight.scale == 1
    assert is_in(weight.applied * weight.scale, storage.fmt)


def test_leaving_a_format_leaves_the_weight_as_it_was() -> None:
    weight = FastWeight.of(STORAGES["fp16"], np.full((2, 2), 60000.0))
    with pytest.raises(InputError, match=r"weight: element .* 65504"):
        write(weight, np.full((2, 2), 10000.0))
    assert np.array_equal(weight.kept, np.full((2, 2), 60000.0))
    assert weight.nonzero == 0


# --- the stream against the reference ---------------------------------------------------------------------------------


def versions(settings: DriftSettings, name: str, clip: float | None) -> list[FloatArray]:
    """Every version of the weight (d, f) by the reference's streaming form; float32 for the master itself."""
    storage, weights = STORAGES[name], layer_weights(settings)
    options = TTTOptions(
        chunk=settings.chunk, rate=settings.rate, clip=clip, contraction="project_first", write=storage.write,
        fast_dtype=storage.fmt,
    )  # fmt: skip
    mlp = StreamingMlp(weights, options)
    for chunk in range(settings.n_chunks):
        x = chunk_inputs(settings, chunk)[None]
        mlp(x, x)
    return [version.applied[0] for version in mlp.versions]


def deltas(settings: DriftSettings) -> list[FloatArray]:
    """The deltas (d, f) in float32."""
    options = TTTOptions(chunk=settings.chunk, rate=1.0, contraction="project_first", fast_dtype=FLOAT32)
    rule = ChunkRule(weights=layer_weights(settings), options=options)
    inputs = (chunk_inputs(settings, chunk)[None] for chunk in range(settings.n_chunks))
    return [rule.delta(x, rule.hidden(x))[0] for x in inputs]


@pytest.mark.parametrize("name", ["fp32", "fp32_master", "bf16", "fp16"])
@pytest.mark.parametrize("clip", SMALL.clips)
def test_series_follow_the_streaming_form_bit_for_bit(small: Drift, name: str, clip: float | None) -> None:
    found, all_deltas = versions(SMALL, name, clip), deltas(SMALL)
    rows = series(small, name, clip)
    assert rows["chunk"].tolist() == list(recorded_chunks(SMALL.n_chunks))
    chunks = rows["chunk"].tolist()
    assert rows["distance"].tolist() == [frobenius(found[chunk] - found[0]) for chunk in chunks]
    assert rows["largest_weight"].tolist() == [np.abs(found[chunk]).max() for chunk in chunks]
    if name != "fp32_master":  # whose kept weight is not the applied one
        still = [int(((a == b) & (d != 0)).sum()) for a, b, d in zip(found, found[1:], all_deltas, strict=False)]
        total = [int((d != 0).sum()) for d in all_deltas]
        assert rows["swamped_frac"].tolist() == [still[chunk - 1] / total[chunk - 1] for chunk in chunks]
        assert rows["swamped_so_far_frac"].tolist() == [sum(still[:chunk]) / sum(total[:chunk]) for chunk in chunks]
    assert rows["swamped_so_far_frac"].iloc[-1] > 0 or name.startswith("fp32")


@pytest.mark.parametrize("clip", SMALL.clips)
def test_errors_are_those_of_exact_sums(small: Drift, clip: float | None) -> None:
    """The truth once more, element by element with correctly rounded sums of float64 products."""
    w_0, total = layer_weights(SMALL).down, []
    for delta in deltas(SMALL):
        norm = math.sqrt(math.fsum((delta * delta).ravel().tolist()))
        rate = SMALL.rate * min(1.0, (clip or math.inf) / norm)
        total.append(rate * delta)
    stacked = np.stack(total)
    change = np.array([[math.fsum(stacked[:, i, j].tolist()) for j in range(SMALL.ff)] for i in range(SMALL.width)])
    for name in ("bf16", "fp16"):
        end = series(small, name, clip).iloc[-1]
        w = versions(SMALL, name, clip)[-1]
        exact = math.sqrt(math.fsum((change * change).ravel().tolist()))
        assert end["exact_distance"] == pytest.approx(exact, rel=2e-7)
        assert end["change_error"] == pytest.approx(float(np.linalg.norm(w - w_0 - change)) / exact, rel=1e-4)


def test_output_error_of_a_weight_that_never_moves_is_the_effect_of_the_change() -> None:
    """The change is all that the output lacks, so both errors are told by the exact weight alone."""
    settings = replace(SMALL, formats=("fp16",), clips=(1e-15,), tokens=16)
    end = run_drift(settings).frame.iloc[-1]
    assert end["distance"] == 0
    assert end["change_error"] == 1
    assert 0 < end["output_error"] < 3 * end["exact_distance"] / frobenius(layer_weights(settings).down)
    assert (end["swamped_so_far_frac"], end["underflow_so_far_frac"]) == (1, 1)


def test_clip_clips(small: Drift) -> None:
    clip = SMALL.clips[1]
    assert clip is not None
    assert small.first_step[clip] == pytest.approx(SMALL.rate * clip, rel=1e-6)
    assert small.clipped_chunks == {None: 0, clip: SMALL.n_chunks}
    assert small.first_step[None] > 1.1 * small.first_step[clip]
    wide = run_drift(replace(SMALL, clips=(None, 1e9)))
    for name in SMALL.formats:
        pd.testing.assert_frame_equal(
            series(wide, name, None).drop(columns="clip").reset_index(drop=True),
            series(wide, name, 1e9).drop(columns="clip").reset_index(drop=True),
        )


def test_exact_change_grows_without_bound(small: Drift) -> None:
    distance = series(small, "fp32", None)["exact_distance"].to_numpy()
    assert distance[-1] > 4 * distance[0]


def test_published_clip_swamps_16_bits_and_spares_the_master() -> None:
    drift = run_drift(DriftSettings(tokens=64 * 64, width=16, ff=48, chunk=64))
    clip = drift.settings.clips[1]
    assert clip == published_clip(16, 48)
    for name in ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2"):
        assert series(drift, name, clip)["swamped_so_far_frac"].iloc[-1] > 0.999, name
        assert series(drift, name, clip)["change_error"].iloc[-1] > 0.99, name
    for name in ("fp32", "fp32_master"):
        assert series(drift, name, clip)["swamped_so_far_frac"].iloc[-1] < 0.2, name
    assert series(drift, "fp32", clip)["change_error"].iloc[-1] < 0.1


def test_published_clip_has_the_published_size_per_element() -> None:
    assert published_clip(2560, 9728) == 1e-5
    assert published_clip(64, 192) / math.sqrt(64 * 192) == pytest.approx(1e-5 / math.sqrt(2560 * 9728), rel=1e-15)
    assert parse_clips("none, published,1e-3", 2560, 9728) == (None, 1e-5, 1e-3)


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [1, 7, 16, 100, 10**6])
def test_size_of_a_block_does_not_matter(small: Drift, block_rows: int) -> None:
    pd.testing.assert_frame_equal(run_drift(SMALL, block_rows=block_rows).frame, small.frame, check_exact=True)


def test_longer_stream_begins_like_a_shorter_one(small: Drift) -> None:
    """All that a part of a stream records, the whole stream records in the same way."""
    part = run_drift(replace(SMALL, tokens=24 * 16 + 15)).frame  # the open chunk never updates
    merged = part.merge(small.frame, how="left", indicator=True)
    assert (merged["_merge"] == "both").all()


def test_formats_and_clips_do_not_touch_each_other(small: Drift) -> None:
    alone = run_drift(replace(SMALL, formats=("bf16_stochastic",), clips=(SMALL.clips[1],))).frame
    together = series(small, "bf16_stochastic", SMALL.clips[1]).reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, together, check_exact=True)


def test_seed_matters(small: Drift) -> None:
    other = run_drift(replace(SMALL, seed=1)).frame
    assert (other["exact_distance"] != small.frame["exact_distance"]).all()


def test_bytes_are_the_same_on_every_machine(small: Drift) -> None:
    digest = hashlib.sha256(small.frame.to_csv(index=False, lineterminator="\n").encode()).hexdigest()
    assert digest == "3a2201852bfddbff08819ef0da5a5ebe98297e67e4c87bc415b3a3c76558bff2"


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 100, 1024, 1000, 16384])
def test_recorded_chunks(n: int) -> None:
    found = recorded_chunks(n)
    brute = [m for m in range(1, n) if m.bit_length() - (m & -m).bit_length() < 5]
    assert list(found) == [*brute, n]
    assert all(b <= a * 17 / 16 + 1 for a, b in itertools.pairwise(found))
    assert len(found) <= 32 + 16 * max(n.bit_length() - 5, 0) + 1


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_norm_has_no_range(scale: float) -> None:
    x = randomness.normal(1, 2, (5, 7))
    expected = math.sqrt(math.fsum((x * x).ravel().tolist()))
    assert frobenius(x * scale) == pytest.approx(expected * scale, rel=1e-7)
    assert frobenius(np.zeros((2, 2))) == 0


# --- leaving a format -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing() -> Drift:
    """Such a rate that fp8 is left at once, fp16 later, and bf16 and fp32 never."""
    return run_drift(replace(SMALL, rate=3e9, clips=(None,), tokens=600 * 16))


def test_format_that_is_left_ends_its_series_alone(overflowing: Drift) -> None:
    n_chunks = overflowing.settings.n_chunks
    lasting = {"fp32", "fp32_master", "bf16", "bf16_stochastic"}
    for name in STORAGES:
        rows = series(overflowing, name, None)
        if name in lasting:
            assert rows["chunk"].iloc[-1] == n_chunks
            assert (rows["ended"] == "").all()
            assert rows["change_error"].notna().all()
        else:
            end = rows.iloc[-1]
            assert (rows["ended"].iloc[:-1] == "").all()
            assert "expected at most" in end["ended"]
            assert STORAGES[name].fmt.name in end["ended"]
            assert end["tokens"] == 16 * end["chunk"] < 16 * n_chunks
            assert math.isnan(end["distance"])
    assert series(overflowing, "fp16", None)["chunk"].iloc[-1] > 3
    assert series(overflowing, "fp8_e4m3", None)["chunk"].tolist() == [1]


def test_findings_say_where_a_format_was_left(overflowing: Drift) -> None:
    said = "\n".join(findings(overflowing, None))
    end = series(overflowing, "fp16", None).iloc[-1]
    assert f"fp16 left its format with chunk {end['chunk']}, after {end['tokens']:,} tokens: " in said
    cells = {row.name: row.cells for row in format_rows(overflowing, None)}
    assert cells["fp16"][0] == "fp16 *"
    assert cells["fp8_e4m3"][1:] == ("-",) * 7


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens: 0 is not between 1 and"),
        ({"tokens": 10}, "tokens: 10 must be at least one chunk of 16 tokens"),
        ({"tokens": 1 << 20, "chunk": 1}, "chunk: 1 makes 1048576 updates, at most 65536; expected at least 16"),
        ({"width": 257}, "width: 257 is not between 1 and 256"),
        ({"rate": math.nan}, "rate: nan is not between"),
        ({"clips": (None, 0.0)}, "clip: 0 is not between"),
        ({"clips": (None, None)}, "clip: none is given twice"),
        ({"formats": ()}, "formats: expected at least one of fp32"),
        ({"formats": ("bf61",)}, "formats: 'bf61' is unknown, did you mean bf16"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changes)


# --- what a reader gets -----------------------------------------------------------------------------------------------


def test_frame_has_its_columns_and_order(small: Drift) -> None:
    assert tuple(small.frame.columns) == COLUMNS
    groups = list(dict.fromkeys(zip(small.frame["clip"].fillna(0.0), small.frame["format"], strict=True)))
    assert groups == [(clip or 0.0, name) for clip in SMALL.clips for name in SMALL.formats]
    shares = small.frame[[name for name in COLUMNS if name.endswith("_frac")]]
    assert ((shares >= 0) & (shares <= 1)).all(axis=None)
    assert (small.frame["underflow_frac"] <= small.frame["swamped_frac"]).all()


def test_every_format_has_a_look() -> None:
    assert list(FORMAT_STYLES) == list(STORAGES)
    assert len({(style.color, str(style.dash)) for style in FORMAT_STYLES.values()}) == len(STORAGES)


@pytest.mark.parametrize("fixture", ["small", "overflowing"])
def test_terminal_and_page_hold_the_same_numbers(fixture: str, request: pytest.FixtureRequest) -> None:
    drift: Drift = request.getfixturevalue(fixture)
    stream = io.StringIO()
    print_drift(drift, Path("out"), Console(file=stream, width=100, highlight=False))
    text, document = stream.getvalue(), page(drift, "Caption.", {"command": "c"})
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for clip in drift.settings.clips:
        for sentence in findings(drift, clip):
            assert f"- {sentence}" in document.splitlines()
            assert " ".join(sentence.split()) in " ".join(text.split())
        for row in format_rows(drift, clip):
            assert "| " + " | ".join(row.cells) + " |" in document
            assert "".join(row.cells).replace(" ", "") in text.replace(" ", "")


def test_folder_is_the_same_bytes_every_time(small: Drift, overflowing: Drift, tmp_path: Path) -> None:
    blank = {name: [""] for name in COLUMNS if name not in ("format", "ended")}
    for drift in (small, overflowing):
        for name in ("a", "b"):
            write_drift(drift, tmp_path / name, command="c", version="0")
        a, b = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
        assert a == b
        assert sorted(a) == ["README.md", "drift.csv", "drift.png", "drift.svg", "summary.json"]
        ElementTree.fromstring(a["drift.svg"])
        back = pd.read_csv(io.BytesIO(a["drift.csv"]), keep_default_na=False, na_values=blank)
        pd.testing.assert_frame_equal(back, drift.frame)


def test_one_chunk_is_enough(tmp_path: Path) -> None:
    drift = run_drift(DriftSettings(tokens=1, width=1, ff=1, chunk=1))
    write_drift(drift, tmp_path / "one", command="c", version="0")
    assert len(drift.frame) == 2 * len(STORAGES)
