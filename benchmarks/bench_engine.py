"""Simulation speed of the engines, measured in one run: ``python benchmarks/bench_engine.py``.

Prints tasks per second (median of several repetitions, compiled code warm) beside the speed each engine should reach.
Nothing is asserted: timings depend on the machine and on what else runs on it; the ratios less so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from ttt_sim.engine import compiled_engine, simpy_engine
from ttt_sim.program import TASK_KINDS, Program, Timeline, verify

# Seven units, as on a chip with matrix, vector and special units, two channel groups, an on-chip memory and a link.
N_UNITS = 7
ARBITRATED_QUEUES = (1, 2, 1, 3, 3, 2, 1)
ONE_QUEUE_EACH = (1,) * N_UNITS


def realistic_program(n_tasks: int, n_queues: tuple[int, ...], seed: int = 0) -> Program:
    """About two dependencies per task, most of them on recent tasks; turn-around and row misses on the memories."""
    rng = np.random.default_rng(seed)
    unit = rng.integers(0, N_UNITS, n_tasks)
    queue = rng.integers(0, np.array(n_queues)[unit])
    is_memory = (unit >= 3) & (unit <= 5)
    task = np.arange(n_tasks)
    distance = rng.geometric(0.05, (n_tasks, 2))
    deps = task[:, np.newaxis] - distance
    exists = deps >= 0
    switch_cycles = np.zeros((N_UNITS, len(TASK_KINDS), len(TASK_KINDS)), dtype=np.int64)
    switch_cycles[3:5, 1, 2], switch_cycles[3:5, 2, 1] = 12, 20
    row_miss_cycles = np.zeros(N_UNITS, dtype=np.int64)
    row_miss_cycles[3:5] = 30
    return Program(
        unit=unit,
        queue=queue,
        priority=queue.copy(),
        kind=np.where(is_memory, rng.integers(1, 3, n_tasks), 0),
        cycles=rng.integers(1, 2000, n_tasks),
        row=np.where(is_memory, task // 64, -1),
        dep_ptr=np.concatenate(([0], np.cumsum(exists.sum(axis=1)))),
        dep_idx=deps[exists],
        op=task // 8,
        nbytes=np.zeros(n_tasks, dtype=np.int64),
        flops=np.zeros(n_tasks, dtype=np.int64),
        unit_names=tuple(f"unit{u}" for u in range(N_UNITS)),
        n_queues=np.array(n_queues),
        switch_cycles=switch_cycles,
        row_miss_cycles=row_miss_cycles,
    )


def tasks_per_s(work: Callable[[Program], Timeline | None], program: Program, repetitions: int) -> float:
    """Median speed over ``repetitions`` calls, after one that is not counted."""
    work(program)
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work(program)
        seconds.append(time.perf_counter() - began)
    return program.n_tasks / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1_000_000, help="tasks for the compiled engine (default 1000000)")
    parser.add_argument("--simpy-tasks", type=int, default=50_000, help="tasks for SimPy (default 50000)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls per line (default 5)")
    args = parser.parse_args()

    arbitrated = realistic_program(args.tasks, ARBITRATED_QUEUES)
    one_queue = realistic_program(args.tasks, ONE_QUEUE_EACH)
    small = realistic_program(args.simpy_tasks, ARBITRATED_QUEUES)

    def measure(work: Callable[[Program], Timeline | None], program: Program) -> float:
        return tasks_per_s(work, program, args.repetitions)

    simpy_speed = measure(simpy_engine.run, small)
    arbitrated_speed = measure(compiled_engine.run, arbitrated)
    lines = (
        ("SimPy, arbitration", simpy_speed, "60,000"),
        ("compiled, arbitration", arbitrated_speed, "5,000,000 and 30 x SimPy"),
        ("compiled, one queue per unit", measure(compiled_engine.run, one_queue), "25,000,000"),
        ("compiled without numba, arbitration", measure(compiled_engine.run_interpreted, small), ""),
        ("verify", measure(verify, arbitrated), ""),
    )
    print(f"{'':37}{'tasks/s':>14}{'x SimPy':>10}   at least")
    for name, speed, threshold in lines:
        print(f"{name:37}{speed:14,.0f}{speed / simpy_speed:10,.1f}   {threshold}".rstrip())


if __name__ == "__main__":
    main()
