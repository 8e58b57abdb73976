"""``run``: one small experiment end to end, its files and what its summary says."""

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.command import contents, succeed
from ttt_sim import __version__, load_chip, simulate
from ttt_sim.report.figures import FIGURES

#: 128k and 131072 are one context; at it 32 caches of 64 MiB do not fit the chip's 1 GiB.
ARGUMENTS = (
    "run", "tiny_gpu", "--model", "toy", "--ttt", "toy", "--method", "kv,ttt_window", "--window", "64",
    "--context", "150,128k,131072", "--batch", "1,32", "--workers", "2",
)  # fmt: skip
Key = tuple[str, str, int, int]


class Report(NamedTuple):
    folder: Path
    printed: str
    summary: Mapping[str, Any]
    points: Mapping[Key, Mapping[str, Any]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report in its default folder."""
    cwd = tmp_path_factory.mktemp("run")
    printed = succeed(*ARGUMENTS, cwd=cwd)
    assert [path.name for path in cwd.iterdir()] == ["reports"]
    folder = cwd / "reports" / "tiny_gpu"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    points = {(p["method"], p["phase"], p["context_tokens"], p["batch"]): p for p in summary["points"]}
    assert len(points) == len(summary["points"])
    return Report(folder, printed, summary, points)


def test_one_record_per_point_of_the_grid(report: Report) -> None:
    expected = {
        (method, phase, context, batch)
        for method in ("kv", "ttt_window")
        for phase in ("prefill", "decode")
        for context in (150, 131072)
        for batch in (1, 32)
    }
    assert set(report.points) == expected


def test_records_have_their_fields(report: Report) -> None:
    for (method, _, _, _), point in report.points.items():
        assert (point["chip"], point["model"]) == ("tiny_gpu", "toy")
        assert point["chunk_tokens"] == (32 if method == "ttt_window" else None)
        assert point["window_tokens"] == (64 if method == "ttt_window" else None)
        assert isinstance(point["fits"], bool)
        if point["fits"]:
            assert isinstance(point["cycles"], int)
            # At 1 GHz a nanosecond is a cycle; the mean of the steps of a chunk is rounded up to whole cycles.
            assert -1e-3 < point["cycles"] - point["seconds"] * 1e9 < 1
        else:
            assert point["cycles"] is None
            assert point["seconds"] is None


def test_records_are_those_of_the_library(report: Report) -> None:
    for method, phase, batch in (("kv", "decode", 1), ("ttt_window", "prefill", 32), ("ttt_window", "decode", 32)):
        point = report.points[method, phase, 150, batch]
        direct = simulate(
            "tiny_gpu", "toy", method, phase=phase, context=150, batch=batch, window=64, ttt="toy"
        ).record  # fmt: skip
        for field in ("cycles", "seconds", "state_bytes_per_sequence", "n_tasks", "energy_j", "bound_by", "flops"):
            assert point[field] == direct[field], field


def test_state_bytes_per_sequence(report: Report) -> None:
    """KV: 4 layers x 2 (key, value) x 2 heads x 16 x 2 bytes = 512 bytes a token.

    TTT with a window of 64: 64 x 512 of KV; fast weights 2 layers x 64 x 192 x 2 bytes; the open chunk, at most 31
    tokens, keeps a row of MLP inputs and one of targets per layer: 2 layers x 31 x (64 + 64) x 2 bytes.
    """
    for phase in ("prefill", "decode"):
        for context in (150, 131072):
            for batch in (1, 32):
                kv = report.points["kv", phase, context, batch]
                ttt = report.points["ttt_window", phase, context, batch]
                assert kv["state_bytes_per_sequence"] == 512 * context
                assert ttt["state_bytes_per_sequence"] == 64 * 512 + 49152 + 15872


def test_point_that_does_not_fit_says_what_it_needs(report: Report) -> None:
    """32 x 131072 x 512 bytes = 2 GiB of KV and little else: three chips of 1 GiB. With a window everything fits."""
    for phase in ("prefill", "decode"):
        point = report.points["kv", phase, 131072, 32]
        assert point["fits"] is False
        assert 2 * 2**30 < point["bytes_needed"] < 2 * 2**30 + 2**26
        assert point["chips_needed"] == 3
        assert "1 GiB" in point["reason"]
    assert [key for key, point in report.points.items() if not point["fits"]] == [
        ("kv", "prefill", 131072, 32),
        ("kv", "decode", 131072, 32),
    ]


def test_provenance(report: Report) -> None:
    provenance = report.summary["provenance"]
    assert provenance["ttt_sim_version"] == __version__
    assert provenance["chip_file_sha256"] == load_chip("tiny_gpu").file_sha256
    assert provenance["command"] == " ".join(("python -m ttt_sim", *ARGUMENTS))
    assert provenance["ttt_layers"] == [0, 2]
    assert provenance["engine"] == "compiled"
    # The shortest context of every method and phase is simulated in SimPy too.
    assert [text.split(" at ")[0] for text in provenance["engines_compared_on"]] == [
        "kv prefill", "kv decode", "ttt_window prefill", "ttt_window decode",
    ]  # fmt: skip


def test_files_of_the_report(report: Report) -> None:
    files = contents(report.folder)
    assert sorted(files) == report.summary["files"]
    assert {Path(name).stem for name in files if name.startswith("figures/")} == set(FIGURES)
    for name in FIGURES:
        assert files[f"figures/{name}.png"].startswith(b"\x89PNG")
        assert b"<svg" in files[f"figures/{name}.svg"]
        assert files[f"figures/{name}.csv"].count(b"\n") >= 2  # a heading and at least one row
    page = files["README.md"].decode()
    assert all(f"figures/{name}." in page for name in FIGURES)


def test_points_stand_in_a_table_too(report: Report) -> None:
    with (report.folder / "data" / "points.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.points)
    for row in rows:
        key = (row["method"], row["phase"], int(row["context_tokens"]), int(row["batch"]))
        cycles = report.points[key]["cycles"]
        assert row["cycles"] == ("" if cycles is None else str(cycles))


def test_summary_is_strict_json(report: Report) -> None:
    text = (report.folder / "summary.json").read_text(encoding="utf-8")
    assert not re.search(r"\b(NaN|Infinity)\b", text)


def test_terminal_summary(report: Report) -> None:
    lines = report.printed.splitlines()
    assert lines[0] == "toy on Tiny GPU (example)"
    assert "\x1b" not in report.printed  # no colours where there is no terminal
    assert any("131072" in line.replace(",", "") or "128K" in line for line in lines)
    assert str(Path("reports") / "tiny_gpu") in report.printed


def test_crossover_in_state_memory(report: Report) -> None:
    """512 T = 64 x 512 + 49152 + 15872 at T = 191 exactly, so from 192 tokens on TTT keeps less."""
    rows = [
        row
        for row in report.summary["crossovers"]
        if row["method"] == "ttt_window" and "state" in row["quantity"] and row["batch"] is None
    ]
    assert [(row["simulated_tokens"], row["first_whole_token"]) for row in rows] == [(191.0, 192)]


def test_options_reach_the_simulation(tmp_path: Path) -> None:
    """Another engine, variant of writing, dtype, chunk and folder; everything on one process."""
    succeed(
        "run", "tiny_gpu", "--model", "toy", "--ttt", "toy", "--method", "ttt", "--context", "70", "--batch", "2",
        "--chunk", "16", "--weight-write", "fused", "--carry", "keep_z", "--kv-dtype", "int8", "--call", "32",
        "--engine", "simpy", "--no-overlap", "--detail", "20", "--set", "clock=2 GHz", "--workers", "1", "--out", "a/b",
        cwd=tmp_path,
    )  # fmt: skip
    summary = json.loads((tmp_path / "a" / "b" / "summary.json").read_text(encoding="utf-8"))
    provenance = summary["provenance"]
    assert (provenance["engine"], provenance["detail"], provenance["overlap"]) == ("simpy", 20, False)
    assert provenance["chip_overrides"] == {"clock": "2 GHz"}
    assert provenance["ttt"] | {"chunk_tokens": 16, "weight_write": "fused", "carry": "keep_z"} == provenance["ttt"]
    prefill = next(point for point in summary["points"] if point["phase"] == "prefill")
    assert (prefill["kv_dtype"], prefill["call_tokens"], prefill["chunk_tokens"]) == ("int8", 32, 16)
    assert (prefill["batch"], prefill["context_tokens"], prefill["overlap"]) == (2, 70, False)


def test_part_of_a_matrix_from_a_file(tmp_path: Path) -> None:
    """16 of 64 rows in two layers: a quarter of the state, and a report with all figures."""
    (tmp_path / "rows.yaml").write_text("layers: [0, 2]\nchunk_tokens: 32\nupdate_rows: 16\n", encoding="utf-8")
    printed = succeed(
        "run", "tiny_gpu", "--model", "toy", "--ttt", "rows.yaml", "--method", "kv,ttt_window", "--window", "64",
        "--context", "150,600", "--batch", "1,4", "--workers", "1", "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["provenance"]["ttt"]["update_rows"] == 16
    state = {p["state_fast_weight_bytes"] for p in summary["points"] if p["method"] == "ttt_window"}
    assert state == {2 * 16 * 192 * 2}
    assert "2w + s 16 (d +" in printed
    with (tmp_path / "out" / "data" / "write_variants.csv").open(encoding="utf-8", newline="") as file:
        variants = list(csv.DictReader(file))
    assert [row["weight_write"] for row in variants if row["fits"] == "True"][:2] == ["official", "fused"]
    assert (tmp_path / "out" / "figures" / "weight_writes.png").is_file()
