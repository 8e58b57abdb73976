"""Every way in which a program can break the engine contract gets its own message, naming the first bad task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ttt_sim.errors import ProgramError
from ttt_sim.program import MAX_TOTAL_CYCLES, TASK_KINDS, Program, Timeline, verify

N_KINDS = len(TASK_KINDS)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.fixture
def program() -> Program:
    """Three tasks on two units of one and two queues; task 2 waits for tasks 0 and 1."""
    return Program(
        unit=ints(0, 1, 1),
        queue=ints(0, 0, 1),
        priority=ints(0, -5, 5),
        kind=ints(0, 1, N_KINDS - 1),
        cycles=ints(1, 2, 3),
        row=ints(-1, 0, 7),
        dep_ptr=ints(0, 0, 0, 2),
        dep_idx=ints(0, 1),
        op=ints(0, 0, 1),
        nbytes=ints(0, 64, 0),
        flops=ints(128, 0, 0),
        unit_names=("matrix", "memory"),
        n_queues=ints(1, 2),
        switch_cycles=np.zeros((2, N_KINDS, N_KINDS), dtype=np.int64),
        row_miss_cycles=ints(0, 4),
    )


def refusal(program: Program, changes: Mapping[str, Any]) -> str:
    with pytest.raises(ProgramError) as raised:
        verify(replace(program, **changes))
    return str(raised.value)


def test_a_sound_program_is_accepted(program: Program) -> None:
    verify(program)
    assert (program.n_tasks, program.n_units) == (3, 2)


def test_a_program_without_tasks_is_accepted(program: Program) -> None:
    columns = ("unit", "queue", "priority", "kind", "cycles", "row", "op", "nbytes", "flops", "dep_idx")
    changes: dict[str, Any] = {"dep_ptr": ints(0), **dict.fromkeys(columns, ints())}
    verify(replace(program, **changes))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("unit", ints(0, 2, 1), "task 1: unit outside 0..1"),
        ("unit", ints(0, 1, -1), "task 2: unit outside 0..1"),
        ("queue", ints(0, 2, 1), "task 1: queue number outside its unit's queues"),
        ("queue", ints(1, 0, 1), "task 0: queue number outside its unit's queues"),
        ("queue", ints(0, -1, 1), "task 1: queue number outside its unit's queues"),
        ("kind", ints(0, 1, N_KINDS), f"task 2: kind outside 0..{N_KINDS - 1}"),
        ("kind", ints(-1, 1, 0), f"task 0: kind outside 0..{N_KINDS - 1}"),
        ("cycles", ints(1, 0, 0), "task 1: service of less than one cycle"),
        ("row", ints(-1, 0, -2), "task 2: row below -1"),
        ("nbytes", ints(0, -1, 0), "task 1: negative bytes or FLOPs"),
        ("flops", ints(0, 0, -1), "task 2: negative bytes or FLOPs"),
        ("dep_idx", ints(0, 2), "task 2: depends on task 2, which is not an earlier task"),
        ("dep_idx", ints(-1, 0), "task 2: depends on task -1, which is not an earlier task"),
        ("dep_idx", ints(0, 9), "task 2: depends on task 9, which is not an earlier task"),
    ],
)
def test_a_bad_task_is_named(program: Program, column: str, values: np.ndarray, message: str) -> None:
    assert refusal(program, {column: values}) == message


def test_the_first_task_is_its_own_only_candidate(program: Program) -> None:
    # Task 0 has no earlier task, so any dependency of its own is refused.
    changes = {"dep_ptr": ints(0, 1, 1, 2), "dep_idx": ints(0, 0)}
    assert refusal(program, changes) == "task 0: depends on task 0, which is not an earlier task"


@pytest.mark.parametrize(
    "values",
    [ints(1, 1, 1, 2), ints(0, 2, 1, 2), ints(0, 0, 0, 1), ints(0, 0, 0, 3)],
    ids=["starts after 0", "falls", "ends early", "ends late"],
)
def test_offsets_that_do_not_cover_the_dependencies_are_refused(program: Program, values: np.ndarray) -> None:
    message = "dep_ptr is not a list of rising offsets that ends at the length of dep_idx"
    assert refusal(program, {"dep_ptr": values}) == message


def test_dependencies_without_tasks_are_refused(program: Program) -> None:
    columns = ("unit", "queue", "priority", "kind", "cycles", "row", "op", "nbytes", "flops")
    changes = {"dep_ptr": ints(0), **dict.fromkeys(columns, ints())}
    assert refusal(program, changes) == "dep_ptr is not a list of rising offsets that ends at the length of dep_idx"


@pytest.mark.parametrize(
    "column",
    [
        *("unit", "queue", "priority", "kind", "cycles", "row", "op", "nbytes", "flops"),
        *("dep_ptr", "dep_idx", "n_queues", "switch_cycles", "row_miss_cycles"),
    ],
)
def test_every_column_must_be_int64(program: Program, column: str) -> None:
    changes = {column: getattr(program, column).astype(np.float64)}
    assert refusal(program, changes) == f"program column {column} has dtype float64, expected int64"


@pytest.mark.parametrize("column", ["queue", "priority", "kind", "cycles", "row", "op", "nbytes", "flops"])
def test_columns_are_as_long_as_the_units(program: Program, column: str) -> None:
    assert refusal(program, {column: ints(0, 0)}) == f"program column {column} has shape (2,), expected (3,)"


@pytest.mark.parametrize(
    ("table", "values", "shapes"),
    [
        ("n_queues", ints(1), "(1,), expected (2,)"),
        (
            "switch_cycles",
            np.zeros((2, N_KINDS), dtype=np.int64),
            f"(2, {N_KINDS}), expected (2, {N_KINDS}, {N_KINDS})",
        ),
        ("row_miss_cycles", ints(0, 0, 0), "(3,), expected (2,)"),
        ("dep_ptr", ints(0, 0, 2), "(3,), expected (4,)"),
        ("dep_idx", np.zeros((1, 2), dtype=np.int64), "(1, 2), expected (2,)"),
    ],
)
def test_tables_have_one_entry_per_unit_or_task(program: Program, table: str, values: np.ndarray, shapes: str) -> None:
    assert refusal(program, {table: values}) == f"program table {table} has shape {shapes}"


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("n_queues", ints(1, 0)),
        ("switch_cycles", np.full((2, N_KINDS, N_KINDS), -1, dtype=np.int64)),
        ("row_miss_cycles", ints(0, -1)),
    ],
)
def test_unit_tables_are_not_negative(program: Program, table: str, values: np.ndarray) -> None:
    message = "unit tables need at least one queue per unit and no negative cycles"
    assert refusal(program, {table: values}) == message


@pytest.mark.parametrize(
    "changes",
    [
        # 3 tasks of 2**60 or more are above 2**61; so is one task of 2**61 with a few cycles of others.
        {"cycles": ints(2**60, 2**60, 2**60)},
        {"cycles": np.full(3, 2**63 - 1)},  # the plain int64 sum would wrap around to a small number
        {"row_miss_cycles": ints(0, 2**61)},
        {"switch_cycles": np.full((2, N_KINDS, N_KINDS), 2**63 - 1), "row_miss_cycles": np.full(2, 2**63 - 1)},
    ],
    ids=["sum", "wraps", "row misses", "switches"],
)
def test_totals_that_could_overflow_are_refused(program: Program, changes: Mapping[str, np.ndarray]) -> None:
    assert refusal(program, changes).endswith(" cycles together, more than 2.31e+18")


def test_the_largest_total_is_accepted(program: Program) -> None:
    # Row misses of 4 cycles are allowed for on each of the 3 tasks; doubles near 2**61 are 256 apart.
    verify(replace(program, cycles=ints(MAX_TOTAL_CYCLES - 1024, 1, 1)))


def test_total_cycles_is_the_last_finish() -> None:
    timeline = Timeline(start_cycles=ints(0, 2, 1), finish_cycles=ints(2, 9, 4))
    assert timeline.total_cycles == 9
    assert Timeline(start_cycles=ints(), finish_cycles=ints()).total_cycles == 0
