"""``serve`` writes one folder, says whether the chip keeps up, and refuses what cannot be."""

import csv
import json
from pathlib import Path

import pytest

from tests.cli.command import contents, succeed, ttt_sim
from ttt_sim.serving.records import RECORD_COLUMNS, REQUEST_COLUMNS, STEP_COLUMNS

SERVE = (
    "serve", "tiny_gpu", "--model", "toy", "--ttt", "toy", "--window", "48", "--call", "64", "--prompt", "60",
    "--output", "40", "--count", "80",
)  # fmt: skip
OUT = Path("reports") / "tiny_gpu-serving"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("serve")
    return folder, succeed(*SERVE, cwd=folder)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_folder_holds_page_data_figures_and_summary(made: tuple[Path, str]) -> None:
    out = made[0] / OUT
    figures = [f"figures/{name}.{ending}" for name in ("latency", "timeline") for ending in ("csv", "png", "svg")]
    expected = ["README.md", "data/methods.csv", "data/requests.csv", *figures, "summary.json"]
    assert sorted(contents(out)) == sorted(expected)
    methods, requests = rows_of(out / "data" / "methods.csv"), rows_of(out / "data" / "requests.csv")
    assert tuple(methods[0]) == RECORD_COLUMNS
    assert [row["method"] for row in methods] == ["kv", "ttt_window"]
    assert tuple(requests[0]) == REQUEST_COLUMNS
    assert len(requests) == 160
    assert tuple(rows_of(out / "figures" / "timeline.csv")[0]) == STEP_COLUMNS
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [method["requests"] for method in summary["methods"]] == [80, 80]
    assert summary["provenance"]["command"] == "python -m ttt_sim " + " ".join(SERVE)
    assert summary["provenance"]["without_room"] == "computed again"


def test_findings_are_printed(made: tuple[Path, str]) -> None:
    lines = made[1].splitlines()
    assert lines[0].startswith("Serving: toy on Tiny GPU (example)  ·  80 requests at ")
    assert lines[-1] == f"Report: {OUT / 'README.md'}"
    assert max(map(len, lines)) <= 100
    assert "requests/s can be sustained" in made[1]
    assert "Premium: at full load" in made[1]
    assert "Warning" not in made[1]
    page = (made[0] / OUT / "README.md").read_text(encoding="utf-8")
    assert "## Latencies" in page


def test_same_command_same_bytes(made: tuple[Path, str]) -> None:
    before = contents(made[0])
    assert succeed(*SERVE, cwd=made[0]) == made[1]
    assert contents(made[0]) == before


def test_rate_that_cannot_be_sustained_is_said_first(tmp_path: Path) -> None:
    text = " ".join(succeed(*SERVE, "--rate", "1e5", "--method", "kv", cwd=tmp_path).split())
    assert "- Warning: KV cache does not keep up with " in text
    assert "requests/s can be sustained" in text


def test_recorded_requests(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,3\n0.5,70,1\n", encoding="utf-8")
    options = ("serve", "tiny_gpu", "--model", "toy", "--ttt", "toy", "--requests", "r.csv", "--out", "mine")
    assert "2 requests at 2/s" in succeed(*options, cwd=tmp_path)
    rows = rows_of(tmp_path / "mine" / "data" / "requests.csv")
    assert [(row["arrival_s"], row["output_tokens"]) for row in rows] == [("0.0", "3"), ("0.5", "1")] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rate", "0"), "--rate: 0 must be at least 0.002 requests/s"),
        (("--rate", "nan"), "--rate: nan must be at least"),
        (("--count", "0"), "--count: 0 must be from 1 to 100000"),
        (("--seed", "-1"), "--seed: -1 must be from 0"),
        (("--prompt", "64k"), "--prompt: with exponential lengths up to 8 x"),
        (("--prompt", "many"), "--prompt: 'many' is not a number of tokens"),
        (
            ("--lengths", "unifrom"),
            "--lengths: 'unifrom' is not one of fixed, uniform, exponential, did you mean uniform?",
        ),
        (("--batch", "0"), "--batch: 0 must be at least 1"),
        (("--policy", "decode_first"), "--policy: 'decode_first' is not one of prefill_first, alternate"),
        (("--method", "kv,lora"), "method lora is not served"),
        (("--method", "ttt_windw"), "unknown method 'ttt_windw', did you mean ttt_window"),
        (("--chunk", "4"), "--chunk: 4 is less than 8 tokens"),
        (("--tp", "3"), "--tp: 3 chips cannot share Qwen3-4B evenly"),
        (("--requests", "none.csv"), "none.csv: no such file"),
        (("--requests", "bad.csv"), "bad.csv:2: prompt_tokens: '0' is not a whole number from 1 to 262144"),
        (("--requests", "bad.csv", "--rate", "2"), "--rate: does not apply to requests of a file"),
        (("--request", "bad.csv"), "unknown option --request, did you mean --requests"),
        (("--out", "bad.csv"), "bad.csv: is a file, expected a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_message(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    (tmp_path / "bad.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,0,3\n", encoding="utf-8")
    done = ttt_sim("serve", "h100", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ttt_sim: error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(contents(tmp_path)) == ["bad.csv"]


def test_a_chip_that_holds_nothing(tmp_path: Path) -> None:
    done = ttt_sim("serve", "tiny_gpu", "--out", "mine", cwd=tmp_path)
    assert done.returncode == 2
    assert "kv: weights of" in done.stderr
    assert not (tmp_path / "mine").exists()
