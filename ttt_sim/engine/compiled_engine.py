"""The fast engine: two loops compiled by numba, which run as plain Python (the same source) where numba is missing.

A service time is known at dispatch, and a start follows from the finish cycles of the dependencies and from what the
unit served before. So nothing has to be simulated between dispatches:

* *One queue per unit.* Every unit serves in task-id order: one pass over the tasks computes every start.
* *Arbitration.* The head of a queue has a known ready cycle once its dependencies have been dispatched. Until then it
  watches one dependency that has not been, so no lists of successors are needed. The *turn* of a unit is the first
  cycle in which it can dispatch: max(unit free, earliest known ready cycle among its heads). The unit with the earliest
  turn goes next. All dispatches to come start no earlier and last at least a cycle, so they can only make tasks ready
  later than this turn: the heads known to be ready in it are all the heads that are.

Time is linear in tasks and dependencies, times the queues of one unit and the logarithm of the number of units.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from ttt_sim.program import TASK_KINDS, IntArray, Program, Timeline

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

try:
    numba: Any = import_module("numba")
    import_module("numba.extending")
except ImportError:
    numba = None


def jitable(function: FunctionT) -> FunctionT:
    """The function made callable from compiled loops; Python code still calls it as it is."""
    if numba is None:
        return function
    marked: FunctionT = numba.extending.register_jitable(function)
    return marked


def compiled(loop: FunctionT) -> FunctionT:
    """The loop compiled at its first call and kept on disk; as it is where numba is missing."""
    if numba is None:
        return loop
    jitted: FunctionT
    try:
        jitted = numba.njit(cache=True, nogil=True)(loop)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        jitted = numba.njit(nogil=True)(loop)
    return jitted


#: Arrays when compiled; lists when interpreted, because Python reads single elements of a list much faster.
Ints: TypeAlias = IntArray | list[int]

NONE = -1
NEVER = 1 << 62  # later than any cycle of a verified program


class Service(NamedTuple):
    """What both loops need: the columns of the program, its outcome, and the state of its units."""

    unit: Ints
    kind: Ints
    cycles: Ints
    row: Ints
    dep_ptr: Ints
    dep_idx: Ints
    n_kinds: int
    switch_cycles: Ints  # (unit, previous kind, kind) flattened in row-major order
    row_miss_cycles: Ints
    start: Ints
    finish: Ints  # 0 until the task is dispatched
    free: Ints  # per unit: first cycle after its last task
    last_kind: Ints  # per unit: kind of its last task or NONE
    open_row: Ints  # per unit: row of its last task that had one or NONE


class Arbitration(NamedTuple):
    """What units with several queues need besides. Queues are numbered through over all units."""

    queue: Ints  # per task
    priority: Ints  # per task
    following: Ints  # per task: the next task of its queue or NONE
    first_watcher: Ints  # per task: a queue whose head watches this task or NONE
    next_watcher: Ints  # per queue: the next one in a list of queues or NONE
    head: Ints  # per queue: first task not dispatched or NONE
    head_ready: Ints  # per queue: ready cycle of the head, NEVER while that is unknown
    next_dep: Ints  # per queue: position in dep_idx of the head's first dependency not looked at
    latest: Ints  # per queue: latest finish among the head's dependencies looked at
    queue_ptr: Ints  # per unit: its first queue, and the end of the last unit's
    queue_unit: Ints  # per queue
    turn: Ints  # per leaf of ``earliest``: the unit's turn, NEVER for leaves without a unit
    earliest: Ints  # winner tree: node i holds the one of its children 2i, 2i + 1 with the earlier turn; 1 is the root


@jitable
def dispatch(s: Service, task: int, cycle: int) -> None:
    """Start ``task`` in ``cycle``, in which it is ready and its unit is free."""
    unit, kind, row = s.unit[task], s.kind[task], s.row[task]
    service = s.cycles[task]
    if s.last_kind[unit] != NONE:
        service += s.switch_cycles[(unit * s.n_kinds + s.last_kind[unit]) * s.n_kinds + kind]
    s.last_kind[unit] = kind
    if row not in (NONE, s.open_row[unit]):
        service += s.row_miss_cycles[unit]
        s.open_row[unit] = row
    s.start[task] = cycle
    s.finish[task] = s.free[unit] = cycle + service


def serve_in_task_order(s: Service) -> None:
    """Simulate a program in which every unit has one queue."""
    for task in range(len(s.unit)):
        cycle = s.free[s.unit[task]]
        for i in range(s.dep_ptr[task], s.dep_ptr[task + 1]):
            cycle = max(cycle, s.finish[s.dep_idx[i]])
        dispatch(s, task, cycle)


# The functions below are each called from one place: there LLVM inlines them. A real call would pass, and count
# references to, some twenty arrays, which makes the loop three times slower.


@jitable
def look_at_head(s: Service, a: Arbitration, queue: int) -> None:
    """Find the ready cycle of a queue's head, or let it watch its first dependency that is not dispatched."""
    head = a.head[queue]
    if head == NONE:
        return
    for i in range(a.next_dep[queue], s.dep_ptr[head + 1]):
        dep = s.dep_idx[i]
        if s.finish[dep] == 0:
            a.next_dep[queue] = i
            a.next_watcher[queue] = a.first_watcher[dep]
            a.first_watcher[dep] = queue
            return
        a.latest[queue] = max(a.latest[queue], s.finish[dep])
    a.head_ready[queue] = a.latest[queue]


@jitable
def set_turn(s: Service, a: Arbitration, unit: int) -> None:
    """Compute the turn of a unit and play its matches in the winner tree again."""
    ready = NEVER
    for queue in range(a.queue_ptr[unit], a.queue_ptr[unit + 1]):
        ready = min(ready, a.head_ready[queue])
    a.turn[unit] = max(ready, s.free[unit])
    node = (len(a.turn) + unit) >> 1
    while node > 0:
        left, right = a.earliest[2 * node], a.earliest[2 * node + 1]
        a.earliest[node] = left if a.turn[left] <= a.turn[right] else right
        node >>= 1


@jitable
def rank(a: Arbitration, queue: int) -> tuple[int, int, int]:
    """Of the ready heads of a unit, the one with the smallest rank is served."""
    head = a.head[queue]
    return a.priority[head], a.head_ready[queue], head


@jitable
def choose_queue(a: Arbitration, unit: int) -> int:
    """The queue whose head the unit takes in its turn."""
    best = NONE
    for queue in range(a.queue_ptr[unit], a.queue_ptr[unit + 1]):
        if a.head_ready[queue] <= a.turn[unit] and (best == NONE or rank(a, queue) < rank(a, best)):
            best = queue
    return best


def serve_by_arbitration(s: Service, a: Arbitration) -> None:
    """Simulate any program."""
    for task in range(len(s.unit) - 1, -1, -1):
        a.following[task] = a.head[a.queue[task]]
        a.head[a.queue[task]] = task
    for queue in range(len(a.head)):
        if a.head[queue] != NONE:
            a.next_dep[queue] = s.dep_ptr[a.head[queue]]
    changed = 0  # first queue of the list to look at; ``simulate`` has linked all of them
    for _ in range(len(s.unit)):
        while changed != NONE:
            queue = changed
            changed = a.next_watcher[queue]
            look_at_head(s, a, queue)
            set_turn(s, a, a.queue_unit[queue])

        unit = a.earliest[1]
        queue = choose_queue(a, unit)
        task = a.head[queue]
        dispatch(s, task, a.turn[unit])

        head = a.following[task]
        a.head[queue] = head
        a.head_ready[queue] = NEVER
        if head != NONE:
            a.next_dep[queue] = s.dep_ptr[head]
            a.latest[queue] = 0
        a.next_watcher[queue] = a.first_watcher[task]
        changed = queue


Loops: TypeAlias = tuple[Callable[[Service], None], Callable[[Service, Arbitration], None]]
LOOPS: Loops = (serve_in_task_order, serve_by_arbitration)
COMPILED_LOOPS: Loops = (compiled(serve_in_task_order), compiled(serve_by_arbitration))


def run(program: Program) -> Timeline:
    """Simulate a verified program; see :mod:`ttt_sim.program` for the contract."""
    if numba is None:
        return run_interpreted(program)
    # A read-only array or another memory layout would be another type to numba, to be compiled for once more.
    return simulate(
        program,
        loops=COMPILED_LOOPS,
        flat=lambda table: np.require(table.ravel(), requirements=("C", "A", "W")),
        filled=lambda n, value: np.full(n, value, dtype=np.int64),
    )


def run_interpreted(program: Program) -> Timeline:
    """The same as :func:`run`, without numba."""
    return simulate(
        program, loops=LOOPS, flat=lambda table: table.ravel().tolist(), filled=lambda n, value: [value] * n
    )


def simulate(
    p: Program, *, loops: Loops, flat: Callable[[IntArray], Ints], filled: Callable[[int, int], Ints]
) -> Timeline:
    """Run the loop that ``p`` needs on the kind of storage that ``flat`` and ``filled`` make."""
    in_task_order, by_arbitration = loops
    service = Service(
        unit=flat(p.unit),
        kind=flat(p.kind),
        cycles=flat(p.cycles),
        row=flat(p.row),
        dep_ptr=flat(p.dep_ptr),
        dep_idx=flat(p.dep_idx),
        n_kinds=len(TASK_KINDS),
        switch_cycles=flat(p.switch_cycles),
        row_miss_cycles=flat(p.row_miss_cycles),
        start=filled(p.n_tasks, 0),
        finish=filled(p.n_tasks, 0),
        free=filled(p.n_units, 0),
        last_kind=filled(p.n_units, NONE),
        open_row=filled(p.n_units, NONE),
    )
    if (p.n_queues == 1).all():
        in_task_order(service)
    else:
        queue_ptr = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(p.n_queues)))
        n_queues = int(queue_ptr[-1])
        n_leaves = 1 << p.n_units.bit_length()  # more than units: the last leaf never has a turn
        arbitration = Arbitration(
            queue=flat(queue_ptr[p.unit] + p.queue),
            priority=flat(p.priority),
            following=filled(p.n_tasks, NONE),
            first_watcher=filled(p.n_tasks, NONE),
            next_watcher=flat(np.append(np.arange(1, n_queues, dtype=np.int64), NONE)),
            head=filled(n_queues, NONE),
            head_ready=filled(n_queues, NEVER),
            next_dep=filled(n_queues, 0),
            latest=filled(n_queues, 0),
            queue_ptr=flat(queue_ptr),
            queue_unit=flat(np.repeat(np.arange(p.n_units, dtype=np.int64), p.n_queues)),
            turn=filled(n_leaves, NEVER),
            # The last leaf wins every match until the turns of the units are set.
            earliest=flat(np.append(np.full(n_leaves, n_leaves - 1), np.arange(n_leaves, dtype=np.int64))),
        )
        by_arbitration(service, arbitration)
    return Timeline(
        start_cycles=np.asarray(service.start, dtype=np.int64), finish_cycles=np.asarray(service.finish, dtype=np.int64)
    )
