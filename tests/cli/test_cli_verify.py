"""``ttt_sim verify`` as a user runs it."""

from pathlib import Path

import pytest

from tests.cli.command import ROOT, succeed, ttt_sim


def test_passes_with_digests_that_are_the_same_on_two_chips(tmp_path: Path) -> None:
    digests = []
    for chip in ("h100", str(ROOT / "hw_configs" / "tiny_gpu.yaml")):
        out = succeed("verify", chip, "--method", "ttt,kv_window", "--prefill", "70", "--decode", "3", cwd=tmp_path)
        heading, *lines = out.splitlines()
        assert "toy on" in heading
        assert [line.split()[:2] for line in lines] == [["ttt", "PASS"], ["kv_window", "PASS"]]
        digests.append([line.rpartition("equal; ")[2] for line in lines])
    assert digests[0] == digests[1]
    assert "weights" in digests[0][0]


def test_hardware_order_reports_differences(tmp_path: Path) -> None:
    out = succeed(
        "verify", "tiny_gpu", "--method", "kv_window", "--decode", "2", "--accumulate", "hardware", cwd=tmp_path
    )  # fmt: skip
    assert "RAN" in out
    assert "differ from the exact sums" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "tttt"], "unknown method 'tttt', did you mean ttt or "),
        (["--accumulate", "hardwar"], "accumulation 'hardwar' is not one of exact, hardware"),
        (["--prefill", "0"], "--prefill"),
        (["--decode", "-1"], "--decode: -1 must be at least 0"),
        (["--batch", "0"], "--batch: 0 must be at least 1"),
        (["--seed", "-3"], "--seed: -3 must be at least 0"),
        (["--seed", str(1 << 64)], "seed 18446744073709551616 is not between 0 and"),
        (["--dtype", "int8"], "can be simulated but not executed"),
        (["--model", "Qwen3-8B"], "take a smaller model or fewer tokens"),
        (["--carry", "rng"], "did you mean ring?"),
        (["--prefil", "3"], "unknown option --prefil, did you mean --prefill"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    done = ttt_sim("verify", "h100", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert not done.stdout
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_part_of_a_matrix_is_executed(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text("layers: [0, 2]\nchunk_tokens: 32\nupdate_rows: 16\n", encoding="utf-8")
    out = succeed("verify", "tiny_gpu", "--ttt", "rows.yaml", "--method", "ttt", "--decode", "12", cwd=tmp_path)
    assert out.splitlines()[1].split()[:2] == ["ttt", "PASS"]
    (tmp_path / "rows.yaml").write_text("update_rows: 65\n", encoding="utf-8")
    done = ttt_sim("verify", "tiny_gpu", "--ttt", "rows.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "update_rows: is 65, but a down projection of toy has 64 rows" in done.stderr
