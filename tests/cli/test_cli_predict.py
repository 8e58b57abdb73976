"""The commands about measurements: predict, validate, explain, calibrate."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from tests.cli.command import succeed, ttt_sim
from tests.unit.test_predict import HEADER, ROWS
from ttt_sim.config import load_chip

BAD = "H100-SXM5-80GB,bf16,gem,1,1,1,,,,,,,,,,\nH100-SXM5-80GB,bf16,gemm,0,1,1,,,,,,,,,,\n"


def write(folder: Path, text: str, name: str = "rows.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return name


def test_predict_adds_columns_to_every_row(tmp_path: Path) -> None:
    rows = write(tmp_path, HEADER + "\n".join(ROWS.values()) + "\n")
    text = succeed("predict", "auto", rows, "-o", "out.csv", cwd=tmp_path)
    assert text.splitlines()[0] == f"out.csv: {len(ROWS)} predictions"
    with (tmp_path / "out.csv").open(encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    assert [row["mine"] for row in found] == [line.rpartition(",")[2] for line in ROWS.values()]
    for row in found:
        assert float(row["low_us"]) <= float(row["predicted_us"]) <= float(row["high_us"])
        assert row["bound_by"]
        assert row["included"]


def test_predict_on_one_chip_takes_overrides(tmp_path: Path) -> None:
    rows = write(tmp_path, HEADER + ROWS["gemm"] + "\n")
    times = []
    for number, extra in enumerate(((), ("--set", "memories.hbm.read_bandwidth=6.7 TB/s"))):
        succeed("predict", "h100", rows, "-o", f"{number}.csv", *extra, cwd=tmp_path)
        with (tmp_path / f"{number}.csv").open(encoding="utf-8") as stream:
            times.append(float(next(csv.DictReader(stream))["predicted_us"]))
    assert times[1] < 0.8 * times[0]


def test_predict_lists_every_bad_row(tmp_path: Path) -> None:
    other = ROWS["gemm"].replace("H100-SXM5-80GB", "H100-SXM5-80G")  # can be read, but no chip has this name
    assert other != ROWS["gemm"]
    rows = write(tmp_path, HEADER + BAD + ROWS["gemm"] + "\n" + other + "\n")
    done = ttt_sim("predict", "auto", rows, "-o", "out.csv", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "rows.csv:2: op: 'gem' is unknown, did you mean gemm" in done.stderr
    assert "rows.csv:3: m: '0' is not a whole number from 1 to" in done.stderr
    assert "rows.csv:5: device: no built-in chip has the variant 'H100-SXM5-80G', did you mean" in done.stderr
    assert not (tmp_path / "out.csv").exists()
    text = succeed("predict", "auto", rows, "-o", "out.csv", "--keep-going", cwd=tmp_path)
    assert [line.partition(": ")[0] for line in text.splitlines()[:4]] == ["left out"] * 3 + ["out.csv"]
    assert "out.csv: 1 predictions" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "auto", "none.csv", "-o", "o.csv"), "none.csv: no such file"),
        (("predict", "h10", "rows.csv", "-o", "o.csv"), "unknown chip 'h10'"),
        (("predict", "auto", "rows.csv", "-o", "o.csv", "--harness", "grap"), "--harness: 'grap' is unknown"),
        (("predict", "auto", "rows.csv", "-o", "o.csv", "--variant", "x"), "--variant and --set need a chip"),
        (("predict", "auto", "rows.csv", "-o", "no/o.csv"), "no/o.csv: cannot be written"),
        (("predict", "a100", "fp8.csv", "-o", "o.csv"), "fp8.csv:2: a100: unit tensor_core has no peak for dtype fp8"),
        (("predict", "auto", "empty.csv", "-o", "o.csv"), "empty.csv: has no rows"),
        (("validate", "--refit"), "--refit needs measured rows"),
        (("validate", "--data", "none"), "none: is not a folder with CSV files"),
        (("explain", "h100", "--op", "gem"), "--op: 'gem' is unknown, did you mean gemm"),
        (("explain", "h100", "--op", "gemm", "--m", "1"), "--op gemm: --n, --k are missing"),
        (("explain", "h100", "--op", "gemm", "--m", "0", "--n", "1", "--k", "1"), "m: '0' is not a whole number"),
        (("calibrate", "h100", "rows.csv", "-o", "n.yaml"), "has no operator rows with a latency_us"),
    ],
)
def test_mistakes_end_with_a_message(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write(tmp_path, HEADER + ROWS["norm"] + "\n")
    write(tmp_path, HEADER + ROWS["fp8"] + "\n", "fp8.csv")
    write(tmp_path, HEADER, "empty.csv")
    done = ttt_sim(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_without_data_uses_published_figures(tmp_path: Path) -> None:
    text = succeed("validate", "--out", "figures", cwd=tmp_path)
    for words in ("github:NVIDIA/TensorRT-LLM", "A100 and H100: ", "GPUs: median error ", "no published figure"):
        assert words in text
    assert "EXCEEDED" not in text
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "summary.json", "published.csv", "published.md", "validate_published.png", "validate_published.svg",
    }  # fmt: skip


def test_validate_fails_beyond_a_tolerance_and_draws_figures(tmp_path: Path) -> None:
    """Invented measurements, ten times what is predicted."""
    (tmp_path / "data").mkdir()
    header = HEADER.replace("mine", "source")
    lines = [f"H100-SXM5-80GB,bf16,gemm,{m},4096,4096,,,,,,,,,{m + 150},aiconfigurator" for m in (16, 64, 256)]
    write(tmp_path / "data", header + "\n".join(lines) + "\n")
    done = ttt_sim("validate", "--data", "data", "--out", "figures", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "16-bit gemm, graph replay: " in done.stdout
    assert "(3 rows) EXCEEDED" in done.stdout
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "summary.json", "validation.csv", "validate_product.png", "validate_product.svg",
    }  # fmt: skip


def test_explain_needs_no_count_of_the_one_token_of_a_decode_step(tmp_path: Path) -> None:
    shape = ("--batch", "8", "--seq-kv", "4096", "--n-heads", "32", "--n-kv-heads", "8", "--head-dim", "128")
    assert "attention_decode on a100" in succeed("explain", "a100", "--op", "attention_decode", *shape, cwd=tmp_path)


def test_explain_says_what_an_op_is_made_of(tmp_path: Path) -> None:
    text = succeed("explain", "h100", "--op", "gemm", "--m", "64", "--n", "4096", "--k", "4096", cwd=tmp_path)
    for words in ("80 % interval", "bound by memory", "tile 64 x 32", "waves", "main memory, reads: ", "fixed: ",
                  "with twice the memory bandwidth: "):  # fmt: skip
        assert words in text
    decode = ("--batch", "8", "--seq-q", "1", "--seq-kv", "4096", "--n-heads", "32", "--n-kv-heads", "8")
    text = succeed("explain", "a100", "--op", "attention_decode", *decode, "--head-dim", "128", cwd=tmp_path)
    assert "KV cache append" in text
    assert "attention core" in text


def test_explain_says_that_nobody_measured_ops_of_ttt(tmp_path: Path) -> None:
    text = succeed("explain", "h100", "--op", "delta_gemm", "--m", "2560", "--n", "9728", "--k", "1024", cwd=tmp_path)
    assert "No measurement of a delta_gemm is published" in text
    assert text.count(": measured ") == 3
    done = ttt_sim("explain", "h100", "--op", "fast_apply", "--m", "1", "--n", "64", "--k", "64", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--op fast_apply: --batch is missing" in done.stderr


def test_calibrate_writes_a_chip_file(tmp_path: Path) -> None:
    lines = [f"H100-SXM5-80GB,bf16,gemm,{2**i},4096,{2**j},,,,,,,,,{8 + 2 ** (i + j) / 3e5},x" for i in range(4, 12)
             for j in range(8, 13)]  # fmt: skip
    rows = write(tmp_path, HEADER + "\n".join(lines) + "\n")
    text = succeed("calibrate", "h100", rows, "-o", "mine.yaml", cwd=tmp_path)
    assert "on held-out shapes" in text
    chip = load_chip(tmp_path / "mine.yaml")
    record = chip.provenance["library.kernel"].calibration
    assert record["data"].startswith("rows.csv ")
    assert record["rows"] == "40"
    assert "mine.yaml: 0 errors" in succeed("lint", "mine.yaml", cwd=tmp_path)


def test_calibrate_never_writes_what_is_no_chip_file_nor_over_its_rows(tmp_path: Path) -> None:
    lines = [f"H100-SXM5-80GB,bf16,gemm,{2**i},4096,{2**j},,,,,,,,,{8 + 2 ** (i + j) / 3e5},x" for i in range(4, 8)
             for j in range(8, 10)]  # fmt: skip
    rows = write(tmp_path, HEADER + "\n".join(lines) + "\n", "rows.yaml")
    before = (tmp_path / rows).read_bytes()
    for extra, message in (
        (("-o", rows), "rows.yaml: holds the rows to fit"),
        (("-o", "My file.yaml"), "name: 'My file': must be a name of small letters"),
        (("-o", "mine"), "mine: a chip file ends in .yaml"),
        (
            ("-o", "m.yaml", "--set", "library.kernel=1500 cycles"),
            "--set: library.kernel: the new file would not hold it",
        ),
    ):
        done = ttt_sim("calibrate", "h100", rows, *extra, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [rows]
    assert (tmp_path / rows).read_bytes() == before
    succeed("calibrate", "h100:H100-PCIe", rows, "-o", "pcie.yaml", cwd=tmp_path)
    assert load_chip(tmp_path / "pcie.yaml").provenance["library.kernel"].calibration["rows"] == "8"


def test_output_goes_through_links_and_never_replaces_a_device(tmp_path: Path) -> None:
    rows = write(tmp_path, HEADER + ROWS["gemm"] + "\n")
    (tmp_path / "link.csv").symlink_to("out.csv")
    succeed("predict", "auto", rows, "-o", "link.csv", cwd=tmp_path)
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "out.csv").is_file()
    for out in (".", ""):
        done = ttt_sim("predict", "auto", rows, "-o", out, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "cannot be written: Is a directory" in done.stderr
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        succeed("predict", "auto", rows, "-o", "pipe", cwd=tmp_path)
        assert os.read(reader, 1 << 16) == (tmp_path / "out.csv").read_bytes()
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_validate_of_rows_that_are_all_wrong_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", HEADER + BAD)
    done = ttt_sim("validate", "--data", "data", cwd=tmp_path)
    assert done.returncode == 2
    assert "rows.csv:2: op: 'gem' is unknown" in done.stderr


def test_other_separators_and_spellings_of_columns_are_named(tmp_path: Path) -> None:
    for text, message in (
        ("device;dtype;op\nh100;bf16;gemm\n", "rows.csv:1: cells are separated by ';', expected commas"),
        (
            "device,dtype,op,m,n,K\nh100,bf16,gemm,1,1,1\n",
            "rows.csv:2: k: the file has no such column, did you mean K?",
        ),
    ):
        done = ttt_sim("predict", "h100", write(tmp_path, text), "-o", "out.csv", cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
