"""Run the command line as a user does: a process of its own, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """That of the tests, with this checkout's package first and plain output of a fixed width."""
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    return {**known, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def ttt_sim(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m ttt_sim`` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "ttt_sim", *arguments],
        cwd=cwd, env=environment(), capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip


def succeed(*arguments: str, cwd: Path) -> str:
    """What the command prints; it must end well and stay silent on standard error."""
    done = ttt_sim(*arguments, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in ``folder``, hidden ones too, and empty folders as ``name/``."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            found[name] = path.read_bytes()
        elif path.is_dir() and not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found
