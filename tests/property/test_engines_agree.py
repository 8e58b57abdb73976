"""Random programs: every engine obeys the contract, and so they give the same cycles.

:func:`check_contract` is a third statement of the contract. It simulates nothing: given a finished timeline it checks
rule by rule that each dispatch was the one the contract demands, which leaves no other timeline for that program.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from ttt_sim.engine import compiled_engine, simpy_engine
from ttt_sim.program import TASK_KINDS, IntArray, Program, Timeline, verify

ENGINES: dict[str, Callable[[Program], Timeline]] = {
    "simpy": simpy_engine.run,
    "compiled": compiled_engine.run,
    "interpreted": compiled_engine.run_interpreted,
}
N_BATCHES = 24
BATCH = 500  # 24 x 500 = 12,000 programs


def random_program(seed: int) -> Program:
    """1..40 tasks on 1..5 units of 1..3 queues; a quarter of the programs have one queue per unit.

    Small numbers on purpose: they make ties in time, priority and ready cycle common.
    """
    rng = np.random.default_rng(seed)
    n_units, n_tasks = int(rng.integers(1, 6)), int(rng.integers(1, 41))
    n_queues = np.ones(n_units, dtype=np.int64) if seed % 4 == 0 else rng.integers(1, 4, n_units)
    return build(rng, n_tasks, n_queues, longest_cycles=int(rng.choice([1, 3, 20])), reach=int(rng.choice([3, 40])))


def build(rng: np.random.Generator, n_tasks: int, n_queues: IntArray, longest_cycles: int, reach: int) -> Program:
    """A task depends on up to three tasks (perhaps the same one twice) among the ``reach`` before it."""
    n_units, n_kinds = n_queues.size, len(TASK_KINDS)
    task = np.arange(n_tasks)
    unit = rng.integers(0, n_units, n_tasks)
    n_deps = np.where(task > 0, rng.integers(0, 4, n_tasks), 0)
    waiting = np.repeat(task, n_deps)
    return Program(
        unit=unit,
        queue=rng.integers(0, n_queues[unit]),
        priority=rng.integers(-1, 3, n_tasks) * rng.integers(0, 2),
        kind=rng.integers(0, n_kinds, n_tasks),
        cycles=rng.integers(1, longest_cycles + 1, n_tasks),
        row=rng.integers(-1, 3, n_tasks),
        dep_ptr=np.concatenate(([0], np.cumsum(n_deps))),
        dep_idx=rng.integers(np.maximum(0, waiting - reach), np.maximum(1, waiting)),
        op=task,
        nbytes=np.zeros(n_tasks, dtype=np.int64),
        flops=np.zeros(n_tasks, dtype=np.int64),
        unit_names=tuple(f"unit{u}" for u in range(n_units)),
        n_queues=n_queues,
        switch_cycles=rng.integers(0, 4, (n_units, n_kinds, n_kinds)) * rng.integers(0, 2, (n_units, 1, 1)),
        row_miss_cycles=rng.integers(0, 4, n_units),
    )


def dependencies(program: Program) -> list[list[int]]:
    ptr, idx = program.dep_ptr.tolist(), program.dep_idx.tolist()
    return [idx[ptr[t] : ptr[t + 1]] for t in range(program.n_tasks)]


def check_contract(program: Program, timeline: Timeline) -> Counter[str]:
    """Fails at the first dispatch that the contract does not demand; counts which rules decided the others."""
    decided: Counter[str] = Counter()
    start, finish = timeline.start_cycles.tolist(), timeline.finish_cycles.tolist()
    priority, kind, row, cycles = (c.tolist() for c in (program.priority, program.kind, program.row, program.cycles))
    switch_cycles = program.switch_cycles.tolist()
    ready = [max((finish[d] for d in deps), default=0) for deps in dependencies(program)]
    served: dict[int, list[int]] = defaultdict(list)
    for task, unit in enumerate(program.unit.tolist()):
        served[unit].append(task)
    for unit, tasks in served.items():
        queues: dict[int, list[int]] = defaultdict(list)
        for task in reversed(tasks):
            queues[int(program.queue[task])].append(task)  # the head is the last item
        free, previous, open_row = 0, -1, -1
        for task in sorted(tasks, key=lambda t: start[t]):
            heads = [q[-1] for q in queues.values() if q]
            turn = max(free, min(ready[h] for h in heads))
            first, *others = sorted((priority[h], ready[h], h) for h in heads if ready[h] <= turn)
            rules = ("priority", "ready cycle", "task id")
            decided[
                next(r for i, r in enumerate(rules) if first[i] != others[0][i]) if others else "only ready head"
            ] += 1
            chosen = first[2]
            service = cycles[task]
            if previous >= 0 and switch_cycles[unit][kind[previous]][kind[task]]:
                service += switch_cycles[unit][kind[previous]][kind[task]]
                decided["switch"] += 1
            if row[task] >= 0:
                service += int(program.row_miss_cycles[unit]) if row[task] != open_row else 0
                decided["row miss" if row[task] != open_row else "row hit"] += 1
                open_row = row[task]
            assert (task, start[task], finish[task]) == (chosen, turn, turn + service)
            queues[int(program.queue[task])].pop()
            free, previous = finish[task], task
    return decided


@pytest.mark.parametrize("batch", range(N_BATCHES))
def test_engines_obey_the_contract_and_agree(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        program = random_program(seed)
        verify(program)
        timelines = {name: run(program) for name, run in ENGINES.items()}
        check_contract(program, timelines["simpy"])
        for name, timeline in timelines.items():
            where = f"{name}, seed {seed}"
            assert np.array_equal(timeline.start_cycles, timelines["simpy"].start_cycles), where
            assert np.array_equal(timeline.finish_cycles, timelines["simpy"].finish_cycles), where


@pytest.mark.parametrize(
    "n_queues", [(1,) * 7, (1, 2, 1, 3, 3, 2, 1), (16,), (2,) * 40], ids=["one queue", "chip", "one unit", "40 units"]
)
def test_engines_obey_the_contract_and_agree_on_long_programs(n_queues: tuple[int, ...]) -> None:
    program = build(np.random.default_rng(1), 20_000, np.array(n_queues), longest_cycles=500, reach=60)
    verify(program)
    expected = simpy_engine.run(program)
    check_contract(program, expected)
    for name in ("compiled", "interpreted"):
        timeline = ENGINES[name](program)
        assert np.array_equal(timeline.start_cycles, expected.start_cycles), name
        assert np.array_equal(timeline.finish_cycles, expected.finish_cycles), name


def critical_path_cycles(program: Program) -> int:
    """Longest chain of dependencies by ``cycles`` alone: what no number of units could shorten."""
    longest: list[int] = []
    for deps, cycles in zip(dependencies(program), program.cycles.tolist(), strict=True):
        longest.append(max((longest[d] for d in deps), default=0) + cycles)
    return max(longest)


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_bounds_of_the_total(name: str) -> None:
    for seed in range(400):
        program = random_program(seed)
        timeline = ENGINES[name](program)
        busy_cycles = np.zeros(program.n_units, dtype=np.int64)
        np.add.at(busy_cycles, program.unit, timeline.finish_cycles - timeline.start_cycles)
        # Some unit is always busy until the end, so the total cannot exceed the sum of all services.
        lower = max(critical_path_cycles(program), int(busy_cycles.max()))
        assert lower <= timeline.total_cycles <= busy_cycles.sum(), f"seed {seed}"


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_units_serve_one_task_at_a_time_in_queue_order_once_ready(name: str) -> None:
    for seed in range(400):
        program = random_program(seed)
        timeline = ENGINES[name](program)
        start, finish = timeline.start_cycles, timeline.finish_cycles
        waiting = np.repeat(np.arange(program.n_tasks), np.diff(program.dep_ptr))
        assert (start[waiting] >= finish[program.dep_idx]).all(), f"seed {seed}: started before it was ready"
        assert (finish - start >= program.cycles).all(), f"seed {seed}: service shorter than its cycles"
        for u in range(program.n_units):
            by_start = np.flatnonzero(program.unit == u)
            by_start = by_start[np.argsort(start[by_start])]
            assert (start[by_start[1:]] >= finish[by_start[:-1]]).all(), f"seed {seed}: two tasks at once"
            for q in range(program.n_queues[u]):
                of_queue = by_start[program.queue[by_start] == q]
                assert (np.diff(of_queue) > 0).all(), f"seed {seed}: queue order"


def test_random_programs_decide_by_every_rule_of_the_contract() -> None:
    decided: Counter[str] = Counter()
    for seed in range(400):
        program = random_program(seed)
        decided += check_contract(program, simpy_engine.run(program))
    rules = {"only ready head", "priority", "ready cycle", "task id", "switch", "row hit", "row miss"}
    assert {rule for rule, times in decided.items() if times >= 50} == rules, decided
