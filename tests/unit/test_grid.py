"""Names to points, points to records, grids to frames."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from ttt_sim import ConfigError, load_chip, load_model, load_ttt, make_point, simulate, sweep
from ttt_sim.chip import Link
from ttt_sim.grid import progress_bar, record_of
from ttt_sim.model import Parallel
from ttt_sim.simulation import PHASES, Point, simulate_point


def toy(method: str = "kv", **options: Any) -> Point:
    return make_point("tiny_gpu", "toy", method, **{"window": 64, "ttt": "toy", "call_tokens": 64, **options})


# --- make_point -------------------------------------------------------------------------------------------------------


def test_point_from_names_is_the_point_from_objects() -> None:
    settings = load_ttt("toy")
    direct = make_point(load_chip("tiny_gpu"), load_model("toy"), "ttt_window", context=320, window=64, ttt=settings)
    named = make_point("tiny_gpu", "toy", "ttt_window", context="320", window="64", ttt="toy")
    assert named == direct


@pytest.mark.parametrize(("text", "tokens"), [("131072", 131072), ("128k", 131072), (131072, 131072), ("1M", 1048576)])
def test_token_counts(text: str | int, tokens: int) -> None:
    assert toy(context=text).context_tokens == tokens
    assert toy("kv_window", window=text).method.kv.window_tokens == tokens
    assert toy(call_tokens=text).call_tokens == tokens
    point = toy("ttt", chunk=text)
    assert point.method.ttt is not None
    assert point.chunk_tokens == point.method.ttt.chunk_tokens == tokens


def test_chunk_overrides_the_settings_and_nothing_else() -> None:
    point = toy("ttt", chunk=8)
    assert point.method.ttt is not None
    assert point.method.ttt.chunk_tokens == 8
    assert point.method.ttt.layers == load_ttt("toy").layers == (0, 2)


def test_window_only_matters_to_windowed_methods() -> None:
    assert toy("kv").method == toy("kv", window=8).method
    assert toy("ttt").method == toy("ttt", window=8).method
    assert toy("kv_window").method != toy("kv_window", window=8).method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phase": "decod"}, "phase: 'decod' is not one of prefill, ask, decode, train, index, did you mean decode"),
        ({"context": 0}, "context: 0 must be at least 1"),
        ({"context": -5}, "context: -5 must be at least 1"),
        ({"context": "many"}, "'many' is not a number of tokens"),
        ({"batch": 0}, "batch: 0 must be at least 1"),
        ({"batch": "2"}, "batch: '2' is not a whole number"),
        ({"tp": 2.0}, "tp: 2.0 is not a whole number"),
        ({"window": 0}, "window: 0 must be at least 1"),
        ({"chunk": 0}, "chunk: 0 must be at least 1"),
        ({"call_tokens": 0}, "call: 0 must be at least 1"),
        ({"ttt": "papr"}, "did you mean paper"),
    ],
)
def test_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy(**options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tiny_gp", "toy", "kv"), "did you mean tiny_gpu"),
        (("tiny_gpu", "toi", "kv"), "did you mean toy"),
        (("tiny_gpu", "toy", "kvv"), "did you mean kv"),
    ],
)
def test_wrong_name_is_refused(names: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_point(*names)


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="contxt"):
        simulate("tiny_gpu", "toy", "kv", contxt=150)


def test_progress_bar_is_silent_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar(3) as advance:
        for _ in range(3):
            advance()
    assert capfd.readouterr() == ("", "")


# --- sweep ------------------------------------------------------------------------------------------------------------


def test_sweep_is_the_full_grid_in_order() -> None:
    frame = sweep(
        "tiny_gpu", "toy", ["kv", "ttt"], phase=["decode", "prefill"], context=[70, "40"], batch=[2, 1], chunk=[8, 16],
        workers=1, progress=False, ttt="toy",
    )  # fmt: skip
    expected = [
        (method, phase, context, batch, chunk if method == "ttt" else None)
        for method in ("kv", "ttt")
        for phase in ("decode", "prefill")
        for context in (70, 40)
        for batch in (2, 1)
        for chunk in (8, 16)
    ]
    columns = ["method", "phase", "context_tokens", "batch", "chunk_tokens"]
    rows = [
        (m, p, c, b, None if pd.isna(chunk) else int(chunk))
        for m, p, c, b, chunk in frame[columns].itertuples(index=False)
    ]
    assert rows == expected


def test_sweep_rows_are_the_records_of_single_points() -> None:
    frame = sweep(
        "tiny_gpu", "toy", "ttt_window", context=[40, 70], window=64, ttt="toy", call_tokens=64, workers=2,
        progress=False,
    )  # fmt: skip
    points = [toy("ttt_window", phase=phase, context=context) for phase in PHASES for context in (40, 70)]
    records = [record_of(point) for point in points]
    for column in ("phase", "context_tokens", "cycles", "energy_j", "state_bytes_per_sequence", "bound_by"):
        assert frame[column].tolist() == [record[column] for record in records]


def test_sweep_over_chip_parameters() -> None:
    """At 1 GHz and 2 GHz the same trace takes other cycles; each row says the value it was simulated with."""
    frame = sweep(
        "tiny_gpu", "toy", "kv", phase="decode", context=40, workers=1, progress=False, window=64,
        chip_parameters={"clock": ["1 GHz", "2 GHz"], "memories.hbm.read_bandwidth": ["32 GB/s", "64 GB/s"]},
    )  # fmt: skip
    assert list(frame["clock"]) == ["1 GHz", "1 GHz", "2 GHz", "2 GHz"]
    assert list(frame["memories.hbm.read_bandwidth"]) == ["32 GB/s", "64 GB/s"] * 2
    for row in frame.to_dict("records"):
        overrides = {name: row[name] for name in ("clock", "memories.hbm.read_bandwidth")}
        alone = simulate(load_chip("tiny_gpu", overrides=overrides), "toy", "kv", phase="decode", context=40, window=64)
        assert row["cycles"] == alone.record["cycles"]
    assert frame["seconds"].nunique() == 4


def test_sweep_over_systems() -> None:
    """Every combination is the system that its numbers describe, simulated alone."""
    wire = Link(name="wire", topology="switch", bytes_per_s=1e9, latency_s=1e-6)
    chip = replace(load_chip("tiny_gpu"), links=(wire,))
    frame = sweep(
        chip, "toy", "ttt_window", phase=["prefill", "decode"], context=128, batch=2, window=64, ttt="toy", tp=[1, 2],
        pp=[1, 3], cp=(1, 2), workers=1, progress=False,
    )  # fmt: skip
    systems = [Parallel(tp=tp, pp=pp, cp=cp) for tp in (1, 2) for pp in (1, 3) for cp in (1, 2)]
    expected = [(phase, system) for phase in ("prefill", "decode") for system in systems]
    assert len(frame) == len(expected)
    for row, (phase, system) in zip(frame.to_dict("records"), expected, strict=True):
        assert (row["phase"], row["tp"], row["pp"], row["cp"]) == (phase, system.tp, system.pp, system.cp)
        assert row["fits"]
        alone = simulate_point(
            make_point(
                chip, "toy", "ttt_window", phase=phase, context=128, batch=2, window=64, ttt="toy", parallel=system  # type: ignore[arg-type]
            )
        ).record  # fmt: skip
        assert {name: row[name] for name in ("cycles", "energy_j", "chips", "microbatches")} == {
            name: alone[name] for name in ("cycles", "energy_j", "chips", "microbatches")
        }
    numbers = sweep(chip, "toy", "kv", phase="decode", context=64, chips=[None, 1, 2, 4], workers=1, progress=False)
    assert numbers["chips"].tolist() == [1, 1, 2, 4]


def test_sweep_keeps_points_that_do_not_fit() -> None:
    """32 sequences of 131072 tokens at 512 bytes each: 2 GiB on a chip of 1 GiB."""
    frame = sweep("tiny_gpu", "toy", "kv", phase="decode", context="128k", batch=[1, 32], workers=1, progress=False)
    assert list(frame["fits"]) == [True, False]
    assert list(frame["chips_needed"]) == [1, 3]
    assert frame["cycles"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ["kv", "kvv"]}, "did you mean kv"),
        ({"model": "toi"}, "did you mean toy"),
        ({"context": [70, 0]}, "context: 0"),
        ({"phase": "decod"}, "phase: 'decod'"),
        ({"tp": [1, 3]}, "tp: 3 chips cannot share toy evenly"),
        ({"tp": 2, "parallel": Parallel(tp=2)}, "parallel: says how many chips there are"),
        ({"chip_parameters": {"clok": ["1 GHz"]}}, "did you mean clock"),
    ],
)
def test_sweep_refuses_before_it_simulates(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulated(*_: object, **__: object) -> list[object]:
        pytest.fail("simulated a grid with a wrong value in it")

    monkeypatch.setattr("ttt_sim.grid.run_all", simulated)
    with pytest.raises(ConfigError, match=message):
        sweep("tiny_gpu", **{"model": "toy", "method": "kv", "progress": False, **options})


def test_chip_parameters_need_a_chip_that_is_not_loaded_yet() -> None:
    with pytest.raises(ConfigError, match="need a chip name or file"):
        sweep(load_chip("tiny_gpu"), "toy", "kv", chip_parameters={"clock": ["1 GHz"]}, progress=False)
