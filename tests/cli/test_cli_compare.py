"""``compare`` sets chips side by side in one folder; wrong chips are named all at once, before anything runs."""

import csv
import json
from pathlib import Path

import pytest

from tests.cli.command import ROOT, contents, succeed, ttt_sim
from ttt_sim.comparison import COLUMNS
from ttt_sim.report.figures_chips import FIGURES

WORKLOAD = ("--model", "toy", "--ttt", "toy", "--window", "64", "--context", "256", "--batch", "2", "--workers", "1")
COMPARE = ("compare", "tiny_gpu", "tiny_systolic", *WORKLOAD)
METHODS = ("kv", "kv_window", "ttt", "ttt_window")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("compare")
    return folder, succeed(*COMPARE, cwd=folder)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "data" / "compare.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_folder_holds_page_figures_data_and_summary(made: tuple[Path, str]) -> None:
    out = made[0] / "reports" / "compare"
    assert sorted(contents(out)) == sorted(
        ["README.md", "summary.json", "data/compare.csv", "data/points.csv"]
        + [f"figures/{name}.{end}" for name in FIGURES for end in ("csv", "png", "svg")]
    )
    found = rows(out)
    assert tuple(found[0]) == COLUMNS
    assert [(row["chip"], row["method"]) for row in found] == [
        (chip, method) for chip in ("tiny_gpu", "tiny_systolic") for method in METHODS
    ]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["provenance"]["command"] == "python -m ttt_sim " + " ".join(COMPARE)
    assert [chip["chip"] for chip in summary["provenance"]["chips"]] == ["tiny_gpu", "tiny_systolic"]
    assert len(summary["rows"]) == len(found)


def test_findings_and_speeds_are_printed(made: tuple[Path, str]) -> None:
    lines = made[1].splitlines()
    assert lines[0] == "Chips compared: toy  ·  256 tokens of context, batch 2"
    assert lines[-1] == f"Report: {Path('reports/compare/README.md')}"
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("- Fastest decode, KV cache: per chip tiny_systolic") for line in lines)
    assert any(line.startswith("tiny_systolic  example") for line in lines)


def test_same_command_replaces_the_folder_with_the_same_bytes(made: tuple[Path, str]) -> None:
    before = contents(made[0])
    assert succeed(*COMPARE, cwd=made[0]) == made[1]
    assert contents(made[0]) == before


def test_examples_among_files_are_left_out_in_one_line(tmp_path: Path) -> None:
    chips = [str(ROOT / "hw_configs" / name) for name in ("h100.yaml", "tiny_gpu.yaml", "tiny_turnaround.yaml")]
    text = succeed("compare", *chips, *WORKLOAD, "--method", "kv,ttt_window", "--out", "mine", cwd=tmp_path)
    line = "- Examples left out: tiny_gpu, tiny_turnaround; give one by its name to include it."
    assert text.splitlines().count(line) == 1
    assert {row["chip"] for row in rows(tmp_path / "mine")} == {"h100"}


def test_a_chip_that_cannot_run_is_no_error(tmp_path: Path) -> None:
    text = succeed(*COMPARE, "--dtype", "fp16", cwd=tmp_path)
    assert "tiny_gpu runs none of the methods: unit tensor_core has no peak for dtype fp16" in text
    assert {row["decode_fits"] for row in rows(tmp_path / "reports" / "compare")} == {"False"}


def test_every_wrong_chip_is_named_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: [1, 2\n", encoding="utf-8")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    before = contents(tmp_path)
    done = ttt_sim(
        "compare", "tiny_gpu", "h10", "broken.yaml", "binary.yaml", "gone.yaml", "tiny_gpu", *WORKLOAD, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("ttt_sim: error: ") == 1
    assert "5 of 6 chips cannot be compared" in done.stderr
    for words in ("'h10'", "broken.yaml", "binary.yaml", "gone.yaml: no such file", "tiny_gpu: is given twice"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare",), ("CHIP",)),
        ((*COMPARE, "--context", "1k,2k"), ("--context", "one value")),
        ((*COMPARE, "--batch", "1,8"), ("--batch", "one value")),
        ((*COMPARE, "--batch", "0"), ("--batch", "at least 1")),
        ((*COMPARE, "--workers", "0"), ("--workers", "at least 1")),
        ((*COMPARE, "--method", "kv,tt"), ("'tt'", "did you mean ttt")),
        ((*COMPARE, "--dtype", "bf17"), ("--dtype", "did you mean bf16")),
        ((*COMPARE, "--out", "notes.txt"), ("notes.txt", "is a file")),
        ((*COMPARE, "--out", "foreign"), ("foreign", "which no report of ttt_sim wrote")),
        ((*COMPARE, "--out", "."), ("current folder",)),
        ((*COMPARE, "--engine", "simpy"), ("unknown option --engine",)),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else None,
)
def test_wrong_options(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine\n", encoding="utf-8")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine\n", encoding="utf-8")
    before = contents(tmp_path)
    done = ttt_sim(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == before
