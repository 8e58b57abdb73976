"""``drift`` writes one folder: the same command, the same bytes, whatever the number of threads."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import contents, environment, succeed
from ttt_sim.drift import COLUMNS, STORAGES

DRIFT = ("drift", "--tokens", "2k", "--chunk", "64", "--width", "8", "--ff", "24")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("drift")
    return folder, succeed(*DRIFT, cwd=folder)


def test_folder_holds_figure_data_page_and_summary(made: tuple[Path, str]) -> None:
    out = made[0] / "reports" / "drift"
    assert sorted(contents(made[0])) == [
        f"reports/drift/{name}" for name in ("README.md", "drift.csv", "drift.png", "drift.svg", "summary.json")
    ]
    with (out / "drift.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {row["format"] for row in rows} == set(STORAGES)
    assert len({row["clip"] for row in rows}) == 2
    assert {int(row["tokens"]) for row in rows} == {64 * n for n in range(1, 33)}
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["n_chunks"] == 32
    assert summary["settings"]["clips"][0] is None
    assert len(summary["ends"]) == 2 * len(STORAGES)
    assert summary["provenance"]["command"] == "python -m ttt_sim " + " ".join(DRIFT)


def test_findings_are_printed(made: tuple[Path, str]) -> None:
    lines = made[1].splitlines()
    assert lines[0] == "What number formats do to a fast weight over a long stream"
    assert lines[1].startswith("W is 8 x 24  ·  2K tokens in 32 chunks of 64")
    assert lines[-1] == f"Results: {Path('reports/drift/README.md')}"
    assert max(map(len, lines)) <= 100
    assert "random" in made[1]
    assert made[1].count("fp8 e4m3 stochastic ") >= 2


def test_same_command_replaces_the_folder_with_the_same_bytes(made: tuple[Path, str]) -> None:
    before = contents(made[0])
    assert succeed(*DRIFT, cwd=made[0]) == made[1]
    assert contents(made[0]) == before


def test_threads_do_not_matter(made: tuple[Path, str], tmp_path: Path) -> None:
    single = {**environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "ttt_sim", *DRIFT], cwd=tmp_path, env=single, check=True, capture_output=True)
    ours, theirs = contents(made[0]), contents(tmp_path)
    assert ours == theirs


def test_options_shape_the_run(tmp_path: Path) -> None:
    text = succeed(
        *DRIFT, "--formats", "bf16,fp16", "--clip", "1e-6", "--rate", "30", "--seed", "5", "--out", "mine", cwd=tmp_path
    )
    assert "rate 30" in text
    assert "seed 5" in text
    with (tmp_path / "mine" / "drift.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["format"] for row in rows} == {"bf16", "fp16"}
    assert {float(row["clip"]) for row in rows} == {1e-6}
