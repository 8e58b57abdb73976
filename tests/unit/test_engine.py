"""Cycle counts worked out by hand on tiny programs, on every engine; the arithmetic is in the comments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

from ttt_sim import engine as engines
from ttt_sim.engine import compiled_engine, simpy_engine
from ttt_sim.errors import ConfigError, ProgramError
from ttt_sim.program import COMPUTE, OVERHEAD, READ, TASK_KINDS, WRITE, Program, Timeline

Engine = Callable[[Program], Timeline]


@pytest.fixture(
    params=[simpy_engine.run, compiled_engine.run, compiled_engine.run_interpreted],
    ids=["simpy", "compiled", "interpreted"],
)
def simulate(request: pytest.FixtureRequest) -> Engine:
    run: Engine = request.param
    return run


@dataclass(frozen=True, slots=True)
class Task:
    unit: int
    cycles: int
    deps: tuple[int, ...] = ()
    queue: int = 0
    priority: int = 0
    kind: int = COMPUTE
    row: int = -1


def program_of(
    tasks: Sequence[Task],
    n_queues: Sequence[int],
    switch_cycles: Mapping[tuple[int, int, int], int] | None = None,
    row_miss_cycles: Sequence[int] | None = None,
) -> Program:
    """Tasks in id order; ``switch_cycles`` maps (unit, previous kind, kind) to cycles and is 0 elsewhere."""
    n, n_units = len(tasks), len(n_queues)
    switch = np.zeros((n_units, len(TASK_KINDS), len(TASK_KINDS)), dtype=np.int64)
    for place, cycles in (switch_cycles or {}).items():
        switch[place] = cycles

    def column(values: Sequence[int]) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    return Program(
        unit=column([t.unit for t in tasks]),
        queue=column([t.queue for t in tasks]),
        priority=column([t.priority for t in tasks]),
        kind=column([t.kind for t in tasks]),
        cycles=column([t.cycles for t in tasks]),
        row=column([t.row for t in tasks]),
        dep_ptr=np.cumsum(column([0, *(len(t.deps) for t in tasks)])),
        dep_idx=column([d for t in tasks for d in t.deps]),
        op=np.zeros(n, dtype=np.int64),
        nbytes=np.zeros(n, dtype=np.int64),
        flops=np.zeros(n, dtype=np.int64),
        unit_names=tuple(f"unit{u}" for u in range(n_units)),
        n_queues=column(n_queues),
        switch_cycles=switch,
        row_miss_cycles=column(row_miss_cycles or [0] * n_units),
    )


def spans(timeline: Timeline) -> list[tuple[int, int]]:
    """(start, finish) of each task in id order."""
    return list(zip(timeline.start_cycles.tolist(), timeline.finish_cycles.tolist(), strict=True))


def test_one_queue_serves_back_to_back_in_id_order(simulate: Engine) -> None:
    # 5, then 1, then 7, whatever their priorities say: 0-5, 5-6, 6-13.
    program = program_of([Task(0, 5, priority=9), Task(0, 1, priority=0), Task(0, 7, priority=5)], [1])
    assert spans(simulate(program)) == [(0, 5), (5, 6), (6, 13)]


def test_a_task_starts_when_its_last_dependency_finishes(simulate: Engine) -> None:
    # Units 0 and 1 work side by side (0-4, 0-9); unit 2 waits for the later one, cycle 9, and ends in 9 + 3.
    program = program_of([Task(0, 4), Task(1, 9), Task(2, 3, deps=(0, 1))], [1, 1, 1])
    assert spans(simulate(program)) == [(0, 4), (0, 9), (9, 12)]


def test_naming_a_dependency_twice_changes_nothing(simulate: Engine) -> None:
    # 0-4 on unit 0, then 4-6 on unit 1 (two queues, so that the arbitrating path runs).
    program = program_of([Task(0, 4), Task(1, 2, deps=(0, 0))], [1, 2])
    assert spans(simulate(program)) == [(0, 4), (4, 6)]


@pytest.mark.parametrize("n_queues", [1, 2])
def test_a_queue_blocks_behind_a_head_that_is_not_ready(simulate: Engine, n_queues: int) -> None:
    # Task 1 waits for task 0 (cycle 10) and holds up task 2 behind it, which was ready in cycle 0: 10-12, 12-15.
    program = program_of([Task(0, 10), Task(1, 2, deps=(0,)), Task(1, 3)], [1, n_queues])
    assert spans(simulate(program)) == [(0, 10), (10, 12), (12, 15)]


def test_a_second_queue_passes_a_head_that_is_not_ready(simulate: Engine) -> None:
    # As above, but task 2 has a queue of its own: it runs 0-3, task 1 at 10.
    program = program_of([Task(0, 10), Task(1, 2, deps=(0,)), Task(1, 3, queue=1)], [1, 2])
    assert spans(simulate(program)) == [(0, 10), (10, 12), (0, 3)]


def test_smaller_priority_is_served_first(simulate: Engine) -> None:
    # All ready in cycle 0. Order by priority -1, 1, 2: task 2 0-4, task 1 4-7, task 0 7-9.
    tasks = [Task(0, 2, priority=2), Task(0, 3, queue=1, priority=1), Task(0, 4, queue=2, priority=-1)]
    assert spans(simulate(program_of(tasks, [3]))) == [(7, 9), (4, 7), (0, 4)]


def test_equal_priority_is_served_by_ready_cycle(simulate: Engine) -> None:
    # Unit 0 is busy with task 2 until 10. Task 3 (smaller id) is ready in cycle 6, task 4 in cycle 5: task 4 first,
    # 10-11, then task 3, 11-12. The priority of task 3 would have to be smaller to overtake.
    tasks = [Task(1, 6), Task(2, 5), Task(0, 10), Task(0, 1, deps=(0,)), Task(0, 1, deps=(1,), queue=1)]
    assert spans(simulate(program_of(tasks, [2, 1, 1])))[2:] == [(0, 10), (11, 12), (10, 11)]
    tasks[3] = replace(tasks[3], priority=-1)
    assert spans(simulate(program_of(tasks, [2, 1, 1])))[2:] == [(0, 10), (10, 11), (11, 12)]


def test_the_ready_cycle_is_that_of_the_dependencies_not_of_reaching_the_head(simulate: Engine) -> None:
    # Queue 0 holds tasks 1 and 3, ready in cycle 0; queue 1 holds task 2, ready in cycle 1 (after task 0 on unit 1).
    # Cycle 0: only task 1 is ready, 0-5. In cycle 5 task 3 has just become a head, but was ready in 0, before task 2:
    # task 3 5-6, task 2 6-7.
    tasks = [Task(1, 1), Task(0, 5), Task(0, 1, deps=(0,), queue=1), Task(0, 1)]
    assert spans(simulate(program_of(tasks, [2, 1]))) == [(0, 1), (0, 5), (6, 7), (5, 6)]


@pytest.mark.parametrize("queues", [(0, 1), (1, 0)])
def test_equal_priority_and_ready_cycle_are_served_by_task_id(simulate: Engine, queues: tuple[int, int]) -> None:
    # Whichever queue it is in, task 0 goes first: 0-2, then 2-5.
    tasks = [Task(0, 2, queue=queues[0]), Task(0, 3, queue=queues[1])]
    assert spans(simulate(program_of(tasks, [2]))) == [(0, 2), (2, 5)]


@pytest.mark.parametrize("arbiter", [0, 1])
def test_a_free_unit_never_waits_for_a_better_task(simulate: Engine, arbiter: int) -> None:
    # Task 2 (priority 0) is ready in cycle 1; task 1 (priority 5) in cycle 0, starts at once and is not interrupted:
    # task 1 0-100, task 2 100-101.
    tasks = [Task(1 - arbiter, 1), Task(arbiter, 100, priority=5), Task(arbiter, 1, deps=(0,), queue=1)]
    assert spans(simulate(program_of(tasks, [2, 2]))) == [(0, 1), (0, 100), (100, 101)]


@pytest.mark.parametrize("arbiter", [0, 1])
def test_completions_of_a_cycle_come_before_its_dispatches(simulate: Engine, arbiter: int) -> None:
    # Both units finish in cycle 5. Task 2 (priority 1) has waited since 0 for the arbitrating unit; task 3 (priority 0)
    # becomes ready through the other unit's completion in that same cycle and must win on either numbering of the
    # units: task 3 5-6, task 2 6-7.
    other = 1 - arbiter
    tasks = [Task(arbiter, 5), Task(other, 5), Task(arbiter, 1, priority=1), Task(arbiter, 1, deps=(1,), queue=1)]
    assert spans(simulate(program_of(tasks, [2, 2]))) == [(0, 5), (0, 5), (6, 7), (5, 6)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_completions_of_a_cycle_come_before_the_dispatch_of_an_idle_unit(
    simulate: Engine, order: tuple[int, int]
) -> None:
    # Unit 2 idles until units 0 and 1 both finish in cycle 5, each making one of its heads ready. Task 3 has the
    # smaller priority and wins in whichever order the completions are handled: 5-6, then task 2 6-7.
    first, second = order
    tasks = [Task(0, 5), Task(1, 5), Task(2, 1, (first,), queue=0, priority=1), Task(2, 1, (second,), queue=1)]
    assert spans(simulate(program_of(tasks, [1, 1, 2]))) == [(0, 5), (0, 5), (6, 7), (5, 6)]


@pytest.mark.parametrize("n_queues", [1, 2])
def test_switching_between_kinds_costs_cycles(simulate: Engine, n_queues: int) -> None:
    # Read to write costs 7, write to read 3, read to read 1, anything else nothing. The first task pays nothing:
    # read 0-10, read 10-21 (1 + 10), write 21-38 (7 + 10), overhead 38-48, read 48-58, write 58-75 (7 + 10),
    # read 75-88 (3 + 10).
    kinds = [READ, READ, WRITE, OVERHEAD, READ, WRITE, READ]
    switch = {(0, READ, WRITE): 7, (0, WRITE, READ): 3, (0, READ, READ): 1, (1, READ, READ): 1000}
    program = program_of([Task(0, 10, kind=k) for k in kinds], [n_queues, 1], switch)
    assert [finish for _, finish in spans(simulate(program))] == [10, 21, 38, 48, 58, 75, 88]


def test_switching_follows_the_order_of_service_not_of_ids(simulate: Engine) -> None:
    # By priority the order is read (task 0), read (task 2), write (task 1): one switch of 7.
    # 0-10, 10-20, then 20 + 7 + 10 = 37. In id order there would be a second switch.
    tasks = [Task(0, 10, kind=READ), Task(0, 10, kind=WRITE, queue=1, priority=1), Task(0, 10, kind=READ)]
    program = program_of(tasks, [2], {(0, READ, WRITE): 7, (0, WRITE, READ): 7})
    assert spans(simulate(program)) == [(0, 10), (20, 37), (10, 20)]


@pytest.mark.parametrize("n_queues", [1, 2])
def test_row_misses(simulate: Engine, n_queues: int) -> None:
    # A miss costs 4. Rows -, 3, 3, -, 3, 5, 3: task 0 has no row and pays nothing, the first row always misses, a task
    # without a row leaves row 3 open. 2, 6, 2, 2, 2, 6, 6 cycles: finishes 2, 8, 10, 12, 14, 20, 26.
    tasks = [Task(0, 2, row=row) for row in (-1, 3, 3, -1, 3, 5, 3)]
    program = program_of(tasks, [n_queues], row_miss_cycles=[4])
    assert [finish for _, finish in spans(simulate(program))] == [2, 8, 10, 12, 14, 20, 26]


@pytest.mark.parametrize("n_queues", [1, 2])
def test_row_zero_misses_at_first_and_units_keep_rows_apart(simulate: Engine, n_queues: int) -> None:
    # Row 0 misses on each unit's first task: 1 + 4 = 5 on unit 0, then a hit, 5-6; 1 + 9 = 10 on unit 1.
    tasks = [Task(0, 1, row=0), Task(1, 1, row=0), Task(0, 1, row=0)]
    assert spans(simulate(program_of(tasks, [n_queues, 1], row_miss_cycles=[4, 9]))) == [(0, 5), (0, 10), (5, 6)]


@pytest.mark.parametrize("n_queues", [1, 2])
def test_switch_and_row_miss_add_up(simulate: Engine, n_queues: int) -> None:
    # Read of row 1: 10 + 4 (miss) = 14. Write of row 2: 10 + 7 (switch) + 4 (miss) = 21, so 14-35.
    tasks = [Task(0, 10, kind=READ, row=1), Task(0, 10, kind=WRITE, row=2)]
    program = program_of(tasks, [n_queues], {(0, READ, WRITE): 7}, [4])
    assert spans(simulate(program)) == [(0, 14), (14, 35)]


def delta_gemm_then_next_layer(load_queue: int, n_memory_queues: int) -> Program:
    """A delta GEMM of 52 cycles and its weight write of 30; the next layer's weight load of 15 and GEMM of 52."""
    matrix, memory = 0, 1
    return program_of(
        [
            Task(matrix, 52),
            Task(memory, 30, deps=(0,), kind=WRITE),
            Task(memory, 15, queue=load_queue, kind=READ),
            Task(matrix, 52, deps=(2,)),
        ],
        [1, n_memory_queues],
    )


def test_a_load_behind_a_write_that_is_not_ready_delays_the_next_layer(simulate: Engine) -> None:
    # Delta GEMM 0-52, write 52-82, only then the load 82-97 and the GEMM 97-149.
    timeline = simulate(delta_gemm_then_next_layer(load_queue=0, n_memory_queues=1))
    assert spans(timeline) == [(0, 52), (52, 82), (82, 97), (97, 149)]
    assert timeline.total_cycles == 149


def test_a_load_with_a_queue_of_its_own_hides_behind_the_delta_gemm(simulate: Engine) -> None:
    # Load 0-15 during the delta GEMM 0-52; then the GEMM 52-104 while the write runs 52-82.
    timeline = simulate(delta_gemm_then_next_layer(load_queue=1, n_memory_queues=2))
    assert spans(timeline) == [(0, 52), (52, 82), (0, 15), (52, 104)]
    assert timeline.total_cycles == 104


@pytest.mark.parametrize("n_queues", [[], [1, 1], [1, 3]])
def test_a_program_without_tasks_takes_no_time(simulate: Engine, n_queues: list[int]) -> None:
    timeline = simulate(program_of([], n_queues))
    assert spans(timeline) == []
    assert timeline.total_cycles == 0


def test_units_and_queues_without_tasks_are_ignored(simulate: Engine) -> None:
    # Only unit 1, queue 2 has work: 0-3 and 3-5.
    program = program_of([Task(1, 3, queue=2), Task(1, 2, queue=2)], [2, 4, 1])
    assert spans(simulate(program)) == [(0, 3), (3, 5)]


def test_cycles_beyond_32_and_53_bits_stay_exact(simulate: Engine) -> None:
    # 2**53 + 1 is the first integer that a double cannot hold; then 1 more on the other unit.
    program = program_of([Task(0, 2**53 + 1), Task(1, 1, deps=(0,), queue=1)], [1, 2])
    assert spans(simulate(program)) == [(0, 2**53 + 1), (2**53 + 1, 2**53 + 2)]


@pytest.mark.parametrize("n_queues", [1, 2])
def test_read_only_and_strided_columns_give_the_same_and_are_left_alone(simulate: Engine, n_queues: int) -> None:
    program = program_of([Task(0, 4, row=1), Task(1, 9, (0,)), Task(0, 3, (1,), row=2)], [1, n_queues], None, [2, 2])
    columns = {f.name: getattr(program, f.name) for f in fields(program) if f.name != "unit_names"}
    for name, values in columns.items():
        strided = np.repeat(values, 2, axis=0)[::2]
        strided.flags.writeable = False
        columns[name] = strided
    before = {name: values.copy() for name, values in columns.items()}
    # 4 + 2 (miss) = 6; 6 + 9 = 15; 15 + 3 + 2 (miss) = 20.
    assert spans(simulate(replace(program, **columns))) == [(0, 6), (6, 15), (15, 20)]
    for name, values in columns.items():
        assert np.array_equal(values, before[name]), name


def test_all_programs_run_the_same_compiled_code() -> None:
    pytest.importorskip("numba")
    for n_queues in (1, 2):
        program = program_of([Task(0, 4)], [n_queues])
        compiled_engine.run(program)
        program.cycles.flags.writeable = False  # another type to numba
        compiled_engine.run(program)
    loops: Any = compiled_engine.COMPILED_LOOPS
    assert [len(loop.signatures) for loop in loops] == [1, 1]


def test_timelines_are_int64(simulate: Engine) -> None:
    timeline = simulate(program_of([Task(0, 4)], [1]))
    assert timeline.start_cycles.dtype == timeline.finish_cycles.dtype == np.int64


@pytest.mark.parametrize("name", sorted(engines.ENGINES))
def test_every_named_engine_runs(name: str) -> None:
    # 149 cycles: worked out above.
    assert engines.run(delta_gemm_then_next_layer(0, 1), name).total_cycles == 149


def test_the_default_engine_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(start_cycles=np.zeros(0, dtype=np.int64), finish_cycles=np.zeros(0, dtype=np.int64))
    monkeypatch.setattr(compiled_engine, "run", lambda program: timeline)
    assert engines.run(program_of([], [])) is timeline


@pytest.mark.parametrize(
    ("name", "hint"), [("compield", ", did you mean compiled?"), ("SimPy", ", did you mean simpy?"), ("x", "")]
)
def test_an_unknown_engine_is_refused_with_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        engines.run(program_of([], []), name)
    assert str(raised.value) == f"engine {name!r} is not one of compiled, simpy{hint}"


@pytest.mark.parametrize("name", sorted(engines.ENGINES))
def test_a_program_is_verified_before_it_runs(name: str) -> None:
    with pytest.raises(ProgramError, match="task 0: service of less than one cycle"):
        engines.run(program_of([Task(0, 0)], [1]), name)


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_seam_loads_no_engine() -> None:
    assert python("import sys, ttt_sim.engine; print([m for m in ('numba', 'simpy') if m in sys.modules])") == "[]"


def test_a_prepared_engine_has_nothing_left_to_compile() -> None:
    # One loop for units with one queue each, one for the others; what a program runs afterwards is compiled already.
    pytest.importorskip("numba")
    code = """
import numpy as np
from ttt_sim import simulate
from ttt_sim.engine import prepare
prepare("compiled")
from ttt_sim.engine import compiled_engine
loops = compiled_engine.COMPILED_LOOPS
before = [list(loop.signatures) for loop in loops]
simulate("tiny_gpu", "toy", "kv", context=64)
print([len(found) for found in before], before == [list(loop.signatures) for loop in loops])
"""
    assert python(code) == "[1, 1] True"


def test_preparing_imports_the_engine_that_is_asked_for_alone() -> None:
    code = "import sys, ttt_sim.engine as e; e.prepare('simpy'); print([m in sys.modules for m in ('simpy', 'numba')])"
    assert python(code) == "[True, False]"


def test_an_unknown_engine_cannot_be_prepared() -> None:
    with pytest.raises(ConfigError, match="engine 'nimba' is not one of compiled, simpy"):
        engines.prepare("nimba")


def test_the_compiled_engine_runs_without_numba() -> None:
    # One unit with two queues, tasks of 3 and 4 cycles: 7.
    code = """
import sys
sys.modules["numba"] = None
import numpy as np
from ttt_sim.engine import run
from ttt_sim.program import Program
zero = np.zeros(2, dtype=np.int64)
print(run(Program(
    unit=zero, queue=np.array([0, 1]), priority=zero, kind=zero, cycles=np.array([3, 4]), row=zero - 1,
    dep_ptr=np.zeros(3, dtype=np.int64), dep_idx=np.zeros(0, dtype=np.int64), op=zero, nbytes=zero, flops=zero,
    unit_names=("u",), n_queues=np.array([2]), switch_cycles=np.zeros((1, 4, 4), dtype=np.int64),
    row_miss_cycles=np.zeros(1, dtype=np.int64),
)).total_cycles)
"""
    assert python(code) == "7"


def test_compilation_does_without_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")

    class UnwritableNumba:
        @staticmethod
        def njit(*, nogil: bool, cache: bool = False) -> object:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return numba.njit(nogil=nogil)

    monkeypatch.setattr(compiled_engine, "numba", UnwritableNumba)
    successor: Any = compiled_engine.compiled(lambda n: n + 1)
    assert successor(41) == 42
    assert successor.signatures  # it was compiled, not left in Python
