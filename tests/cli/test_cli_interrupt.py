"""Ctrl-C: status 130, the old report whole, nothing left over, no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.command import contents, environment, succeed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

#: Work for minutes on two workers.
LONG_RUN = (
    "run", "h100", "--context", "512k,1M", "--batch", ",".join(map(str, range(1, 65))), "--workers", "2",
    "--out", "report",
)  # fmt: skip
#: CPU time after which a worker has imported everything and simulates.
BUSY_S = 1.5
PATIENCE_S = 120.0


def group(leader: int) -> dict[int, float]:
    """CPU seconds of the living processes of a process group, by pid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == leader and state not in "ZX":
            # utime and stime are fields 14 and 15 of stat; rest begins with field 6
            found[int(folder.name)] = (int(rest[8]) + int(rest[9])) / os.sysconf("SC_CLK_TCK")
    return found


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {PATIENCE_S:.0f} s in vain until {what}")
        time.sleep(0.1)


@pytest.mark.parametrize("target", ["process group", "main process"])
def test_interrupted_run_leaves_the_old_report_and_nothing_else(target: str, tmp_path: Path) -> None:
    succeed("trace", "--model", "toy", "--context", "64", "-o", "t.csv", cwd=tmp_path)
    succeed("run", "tiny_gpu", "--trace", "t.csv", "--out", "report", cwd=tmp_path)
    before = contents(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "ttt_sim", *LONG_RUN],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # its own process group, as a shell gives every job
        # A shell's background jobs ignore interrupts, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:

        def workers_are_busy() -> bool:
            assert process.poll() is None, "the run ended before it could be interrupted"
            seconds = [cpu for pid, cpu in group(process.pid).items() if pid != process.pid]
            return len(seconds) == 2 and min(seconds) > BUSY_S

        wait_until(workers_are_busy, "two workers simulate")
        if target == "process group":  # what a terminal does
            os.killpg(process.pid, signal.SIGINT)
        else:  # what kill -INT does
            os.kill(process.pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=PATIENCE_S)
        wait_until(lambda: not group(process.pid), "all workers are gone")
    finally:
        for pid in group(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert (process.returncode, printed, errors) == (130, "", "ttt_sim: interrupted\n")
    assert contents(tmp_path) == before
