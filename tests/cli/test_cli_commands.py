"""The commands that describe: help, version, chips, models, show, lint, schema."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ttt_sim as package
from tests.cli.command import ROOT, environment, succeed, ttt_sim
from ttt_sim.data_files import names
from ttt_sim.workload import METHODS

COMMANDS = (
    "run", "compare", "approaches", "claims", "lifecycle", "trace", "verify", "drift", "serve", "predict", "validate",
    "explain",
    "calibrate", "chips", "models", "show", "lint", "schema",
)  # fmt: skip


def test_help_lists_every_command(tmp_path: Path) -> None:
    text = succeed("--help", cwd=tmp_path)
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "]
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, tmp_path: Path) -> None:
    text = succeed(command, "--help", cwd=tmp_path)
    assert text.startswith(f"usage: ttt_sim {command} ")
    assert not list(tmp_path.iterdir())


def test_help_of_run_names_all_options(tmp_path: Path) -> None:
    text = succeed("run", "--help", cwd=tmp_path)
    for option in (
        "--model", "--method", "--context", "--batch", "--chunk", "--window", "--dtype", "--kv-dtype", "--call",
        "--ttt", "--carry", "--weight-write", "--engine", "--out", "--detail", "--no-overlap", "--sensitivity",
        "--trace", "--workers", "--variant", "--set",
    ):  # fmt: skip
        assert f" {option}" in text


def test_version(tmp_path: Path) -> None:
    assert succeed("--version", cwd=tmp_path) == f"ttt_sim {package.__version__}\n"


def test_chips_lists_every_chip_with_its_title(tmp_path: Path) -> None:
    lines = succeed("chips", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == names("hw_configs", ".yaml")
    assert lines[0].endswith(package.load_chip(lines[0].split()[0]).title)


def test_models_lists_models_methods_and_presets(tmp_path: Path) -> None:
    text = succeed("models", cwd=tmp_path)
    words = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert {*names("model_configs", ".json"), *METHODS} <= words
    assert "TTT presets: default, " in text
    toy = next(line for line in text.splitlines() if line.startswith("toy "))
    assert "4 layers, d_model 64, d_ff 192" in toy


@pytest.mark.parametrize("chip", names("hw_configs", ".yaml"))
def test_every_chip_can_be_shown(chip: str, tmp_path: Path) -> None:
    assert package.load_chip(chip).title in succeed("show", chip, cwd=tmp_path)


def test_show_follows_variant_and_overrides(tmp_path: Path) -> None:
    usual = succeed("show", "h100", cwd=tmp_path)
    assert succeed("show", "h100", "--variant", "H100-PCIe", cwd=tmp_path) != usual
    changed = succeed("show", "h100", "--set", "memories.hbm.read_bandwidth=4.8 TB/s", cwd=tmp_path)
    assert "4.8 TB/s" in changed
    assert "4.8 TB/s" not in usual


def test_chip_is_a_name_or_a_path(tmp_path: Path) -> None:
    path = ROOT / "hw_configs" / "tiny_gpu.yaml"
    assert succeed("show", str(path), cwd=tmp_path) == succeed("show", "tiny_gpu", cwd=tmp_path)


@pytest.mark.parametrize("chip", names("hw_configs", ".yaml"))
def test_every_chip_passes_lint(chip: str, tmp_path: Path) -> None:
    assert f"{chip}: 0 errors" in succeed("lint", chip, cwd=tmp_path).splitlines()[-1]


def test_lint_finds_a_bandwidth_that_its_channels_cannot_give(tmp_path: Path) -> None:
    """Status 1, and the finding with file, line and key."""
    text = (ROOT / "hw_configs" / "tiny_gpu.yaml").read_text(encoding="utf-8")
    wrong = text.replace("bf16: {value: 1.024 TFLOP/s", "bf16: {value: 2.048 TFLOP/s", 1)
    assert wrong != text
    (tmp_path / "wrong.yaml").write_text(wrong, encoding="utf-8")
    done = ttt_sim("lint", "wrong.yaml", cwd=tmp_path)
    line = wrong[: wrong.index("2.048 TFLOP/s")].count("\n") + 1
    assert (done.returncode, done.stderr) == (1, "")
    assert any(row.startswith(f"wrong.yaml:{line}: error: compute.") for row in done.stdout.splitlines())


def test_schema_is_json_and_has_the_keys_of_a_chip_file(tmp_path: Path) -> None:
    schema = json.loads(succeed("schema", cwd=tmp_path))
    assert {"name", "execution", "clock", "compute", "memories", "sources"} <= set(schema["properties"])


@pytest.mark.skipif(os.name != "posix", reason="needs a shell with pipes")
def test_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """``ttt_sim schema | head -1``: no traceback, no error message."""
    command = f"{sys.executable} -m ttt_sim schema | head -c 1"
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("{", "")
