"""Time and memory of the main job and of short commands, as whole processes.

``python benchmarks/bench_run.py`` prints, in one run: the default ``run`` with an empty and with a filled cache of
compiled code, one prefill of a million tokens, ``--help`` and configuration errors. Peak memory is the largest single
process; workers come on top.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

REPETITIONS = 3
MILLION_TOKENS = (
    "import ttt_sim; r = ttt_sim.simulate('h100', 'Qwen3-4B', 'ttt_window', phase='prefill', context='1M'); "
    "print(r.record['n_tasks'], 'tasks,', round(r.record['seconds'], 2), 's on the chip')"
)


def seconds(command: list[str], environment: Mapping[str, str]) -> float:
    """Wall-clock seconds of a command; its output is dropped."""
    start = time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def median(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(REPETITIONS))


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        out, cache = str(Path(folder) / "report"), {"NUMBA_CACHE_DIR": str(Path(folder) / "cache")}
        run = [sys.executable, "-m", "ttt_sim", "run", "h100", "--out", out]
        cold = seconds(run, cache)
        warm = median(lambda: seconds(run, cache))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        million = median(lambda: seconds([sys.executable, "-c", MILLION_TOKENS], cache))
        short = {
            "--help": median(lambda: seconds([sys.executable, "-m", "ttt_sim", "--help"], cache)),
            "run of an unknown chip": median(lambda: seconds([sys.executable, "-m", "ttt_sim", "run", "h10"], cache)),
            "run with a wrong override": median(
                lambda: seconds([*run, "--set", "memories.hbm.read_bandwidth=-1 TB/s"], cache)
            ),
        }
    print(f"default run, first time       {cold:8.2f} s   (at most 30)")
    print(f"default run, compiled code    {warm:8.2f} s   (at most 12)")
    print(f"largest process of it         {peak:8.0f} MB  (at most 1000)")
    print(f"prefill of 1M tokens          {million:8.2f} s   (at most 60)")
    for name, value in short.items():
        print(f"{name:30}{value:8.2f} s   (at most 0.3)")


if __name__ == "__main__":
    main()
