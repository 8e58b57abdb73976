"""``ttt_sim lifecycle`` as a process."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cli.command import ttt_sim

SMALL = (
    "lifecycle",
    "tiny_gpu",
    "--model",
    "toy",
    "--context",
    "256",
    "--window",
    "64",
    "--ttt",
    "toy",
    "--batch",
    "2",
)


def test_writes_a_report(tmp_path: Path) -> None:
    done = ttt_sim(*SMALL, "--hash", "xxh3", "--workers", "1", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Exact ways back" in done.stdout
    assert "Not on this chip: swap out" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    folder = tmp_path / "out"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for name in summary["files"]:
        assert (folder / name).is_file()
    assert summary["provenance"]["hash"].startswith("XXH3")
    rows = {row["operation"]: row for row in summary["operations"]}
    with (folder / "data" / "operations.csv").open(encoding="utf-8") as file:
        table = {row["operation"]: row for row in csv.DictReader(file)}
    assert list(table) == list(rows)
    assert int(table["snapshot"]["read_bytes"]) == rows["snapshot"]["read_bytes"] > 0
    assert table["kv_reject"]["seconds"] == "0.0"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Every operation", "## Why, and what it needs", "## Forms of applying"):
        assert heading in text
    assert (folder / "figures" / "lifecycle.png").stat().st_size > 10_000


def test_is_the_same_twice(tmp_path: Path) -> None:
    for workers in ("1", "2"):
        done = ttt_sim(*SMALL, "--workers", workers, "--out", workers, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name in ("data/operations.csv", "data/forms.csv", "data/breakevens.csv", "figures/lifecycle.svg"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "kv"], "--method: method kv has no fast weights"),
        (["--method", "tttwindow"], "unknown method 'tttwindow', did you mean ttt_window"),
        (["--hash", "md5"], "--hash: 'md5' is not one of xxh3, blake3"),
        (["--beams", "1"], "--beams: 1 must be at least 2"),
        (["--draft", "0"], "--draft: 0 must be at least 1"),
        (["--batch", "0"], "--batch: 0 must be at least 1"),
        (["--context", "1k,2k"], "--context: one value is simulated, and 2 are given"),
        (["--chips", "0"], "--chips: 0 must be at least 1"),
        (["--tp", "3"], "--tp: 3 chips cannot share toy evenly"),
        (["--chips", "4", "--tp", "2", "--pp", "1"], "--chips: 4 is not tp 2 x pp 1 = 2"),
        (["--workers", "0"], "--workers: 0 must be at least 1"),
        (["--chunks", "3"], "unknown option --chunks, did you mean --chunk"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = ttt_sim(*SMALL, *arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
