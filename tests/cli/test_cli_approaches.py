"""``ttt_sim approaches`` as a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command import ttt_sim

SMALL = (
    "approaches",
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
    done = ttt_sim(*SMALL, "--option", "fine_tuning.epochs=2", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Fastest decode step" in done.stdout
    assert "fine-tuning" in done.stdout
    folder = tmp_path / "out"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert {row["method"] for row in summary["rows"]} >= {"kv", "ttt_window", "fine_tuning"}
    assert summary["provenance"]["options"] == {"fine_tuning": {"epochs": "2"}}
    for name in summary["files"]:
        assert (folder / name).is_file()
    assert "## What each needs" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "kv,rak"], "--method: unknown method 'rak'"),
        (["--option", "fine_tuning.epochs"], "--option: 'fine_tuning.epochs' is not of the form METHOD.NAME=VALUE"),
        (["--option", "fine_tuning.epoch=2"], "unknown option 'epoch' of method fine_tuning, did you mean epochs"),
        (["--option", "kv.blocks=2"], "--option: option 'blocks': method kv has no options"),
        (["--option", "fine_tuning.epochs=0"], "--option: option epochs is 0, expected at least 1"),
        (["--method", "kv", "--option", "fine_tuning.epochs=1"], "method fine_tuning is not one of those compared"),
        (["--context", "1k,2k"], "--context: approaches are compared at one value, and 2 are given"),
        (["--batch", "0"], "--batch: 0 must be at least 1"),
        (["--question", "none"], "--question: 'none' is not a number of tokens"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = ttt_sim(*SMALL, *arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
