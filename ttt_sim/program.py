"""The engine's input and output: a program of tasks, and the timeline it produces.

A *task* occupies one unit for a whole number of cycles. Everything about the chip and the workload has
been turned into integers by :mod:`ttt_sim.lower`; an engine needs nothing else.

Engine contract (both engines obey it to the cycle):

* A unit serves one task at a time and never interrupts it.
* A unit has one or more queues. A queue is served strictly in task-id order.
* A task is *ready* from the cycle in which the last of its dependencies finishes (cycle 0 without any).
* Whenever a unit is free it takes, among the heads of its queues that are ready, the one with the smallest
  (priority, ready cycle, task id). It never waits for a better one.
* In one cycle every completion is applied before anything is dispatched.
* Service time = ``cycles`` + ``switch_cycles[unit, kind of the unit's previous task, kind]`` (nothing for a unit's
  first task) + ``row_miss_cycles[unit]`` when ``row`` >= 0 and differs from the row of the unit's last task that had
  one (the first such task of a unit always misses).
* Dependencies point to smaller task ids, so no program can deadlock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttt_sim.errors import ProgramError

IntArray = npt.NDArray[np.int64]

#: Task kinds; they index :attr:`Program.switch_cycles`.
TASK_KINDS: tuple[str, ...] = ("compute", "read", "write", "overhead")
COMPUTE, READ, WRITE, OVERHEAD = range(len(TASK_KINDS))

#: Programs that could last longer are refused, so that 64-bit cycle counts never overflow.
MAX_TOTAL_CYCLES = 2**61


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """Tasks in id order as columns of equal length ``n_tasks``; see the module text for the semantics.

    ``unit``       index into ``unit_names``
    ``queue``      queue number inside that unit, ``0 <= queue < n_queues[unit]``
    ``priority``   smaller is served first
    ``kind``       index into ``TASK_KINDS``
    ``cycles``     >= 1
    ``row``        DRAM row the task opens, -1 for none
    ``dep_ptr``    ``n_tasks + 1`` offsets into ``dep_idx``
    ``dep_idx``    task ids, each smaller than the id of the task that waits
    ``op``         kernel of the lowering plan that the task belongs to
    ``nbytes``     bytes the task moves (0 for computation)
    ``flops``      FLOPs the task computes on a matrix unit (0 otherwise)
    ``switch_cycles``   (n_units, n_kinds, n_kinds), indexed [unit, previous kind, kind]
    ``row_miss_cycles`` (n_units,)
    """

    unit: IntArray
    queue: IntArray
    priority: IntArray
    kind: IntArray
    cycles: IntArray
    row: IntArray
    dep_ptr: IntArray
    dep_idx: IntArray
    op: IntArray
    nbytes: IntArray
    flops: IntArray
    unit_names: tuple[str, ...]
    n_queues: IntArray
    switch_cycles: IntArray
    row_miss_cycles: IntArray

    @property
    def n_tasks(self) -> int:
        return int(self.unit.shape[0])

    @property
    def n_units(self) -> int:
        return len(self.unit_names)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """First cycle of service and first cycle after it, per task."""

    start_cycles: IntArray
    finish_cycles: IntArray

    @property
    def total_cycles(self) -> int:
        return int(self.finish_cycles.max()) if self.finish_cycles.size else 0


def verify(program: Program) -> None:
    """Raise :class:`ProgramError` with the first task that breaks the contract."""
    p, n = program, program.n_tasks
    columns = ("unit", "queue", "priority", "kind", "cycles", "row", "op", "nbytes", "flops")
    for name in (*columns, "dep_ptr", "dep_idx", "n_queues", "switch_cycles", "row_miss_cycles"):
        if getattr(p, name).dtype != np.int64:
            raise ProgramError(f"program column {name} has dtype {getattr(p, name).dtype}, expected int64")
    for name in columns:
        if getattr(p, name).shape != (n,):
            raise ProgramError(f"program column {name} has shape {getattr(p, name).shape}, expected ({n},)")
    k = len(TASK_KINDS)
    for name, shape in (
        ("n_queues", (p.n_units,)),
        ("switch_cycles", (p.n_units, k, k)),
        ("row_miss_cycles", (p.n_units,)),
        ("dep_ptr", (n + 1,)),
        ("dep_idx", (p.dep_idx.size,)),
    ):
        if getattr(p, name).shape != shape:
            raise ProgramError(f"program table {name} has shape {getattr(p, name).shape}, expected {shape}")
    if (p.n_queues < 1).any() or (p.switch_cycles < 0).any() or (p.row_miss_cycles < 0).any():
        raise ProgramError("unit tables need at least one queue per unit and no negative cycles")

    def refuse(bad: npt.NDArray[np.bool_], what: str) -> None:
        if bad.any():
            raise ProgramError(f"task {int(np.argmax(bad))}: {what}")

    refuse((p.unit < 0) | (p.unit >= p.n_units), f"unit outside 0..{p.n_units - 1}")
    refuse((p.queue < 0) | (p.queue >= p.n_queues[p.unit]), "queue number outside its unit's queues")
    refuse((p.kind < 0) | (p.kind >= k), f"kind outside 0..{k - 1}")
    refuse(p.cycles < 1, "service of less than one cycle")
    refuse(p.row < -1, "row below -1")
    refuse((p.nbytes < 0) | (p.flops < 0), "negative bytes or FLOPs")
    # Upper bound of the total, in floating point so that the sum itself cannot overflow.
    extra = float(p.switch_cycles.max(initial=0)) + float(p.row_miss_cycles.max(initial=0))
    worst = float(p.cycles.sum(dtype=np.float64)) + n * extra
    if worst > MAX_TOTAL_CYCLES:
        raise ProgramError(f"the tasks take up to {worst:.3g} cycles together, more than {MAX_TOTAL_CYCLES:.3g}")
    counts = np.diff(p.dep_ptr)
    if p.dep_ptr[0] != 0 or (counts < 0).any() or p.dep_ptr[-1] != p.dep_idx.shape[0]:
        raise ProgramError("dep_ptr is not a list of rising offsets that ends at the length of dep_idx")
    owner = np.repeat(np.arange(n, dtype=np.int64), counts)
    wrong = (p.dep_idx < 0) | (p.dep_idx >= owner)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ProgramError(f"task {int(owner[i])}: depends on task {int(p.dep_idx[i])}, which is not an earlier task")
