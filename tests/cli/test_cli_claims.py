"""``ttt_sim claims`` as a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import ttt_sim


def test_writes_a_ledger(tmp_path: Path) -> None:
    done = ttt_sim("claims", "--claim", "kv_dropped,markets_and_dates", "--out", "new/claims.md", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The KV cache can be dropped." in done.stdout
    text = (tmp_path / "new" / "claims.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 3  # two claims and where they come from
    again = ttt_sim("claims", "--claim", "kv_dropped,markets_and_dates", "--out", "new/claims.md", cwd=tmp_path)
    assert again.stdout == done.stdout
    assert (tmp_path / "new" / "claims.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claim", "kv_droped"], "--claim: unknown claim 'kv_droped', did you mean kv_dropped"),
        (["--claim", ""], "--claim: '' has an empty item"),
        (["--out", "."], "--out: . is a folder, expected a file"),
        (["--workers", "0"], "--workers: 0 must be at least 1"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = ttt_sim("claims", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
