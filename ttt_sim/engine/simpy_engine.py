"""The engine that defines the semantics: a discrete-event model in SimPy, one process per unit.

A completion is a timeout of normal priority, a dispatch is an event of lower priority. SimPy handles the events of one
cycle by priority, so every completion of a cycle is applied before its first dispatch, in whatever order the processes
were created.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import numpy as np
import simpy
from simpy.events import NORMAL, EventPriority

from ttt_sim.program import Program, Timeline

AFTER_COMPLETIONS = EventPriority(NORMAL + 1)  # SimPy serves smaller numbers first


class Dispatch(simpy.Event):
    """A free unit waiting for work; once requested it fires at the end of the current cycle."""

    def request(self) -> None:
        if not self.triggered:
            self._ok, self._value = True, None
            self.env.schedule(self, priority=AFTER_COMPLETIONS)


def run(program: Program) -> Timeline:
    """Simulate a verified program; see :mod:`ttt_sim.program` for the contract."""
    n_tasks, n_units = program.n_tasks, program.n_units
    # Lists of Python integers: several times faster than arrays to read one element at a time.
    unit, queue, priority, kind = (c.tolist() for c in (program.unit, program.queue, program.priority, program.kind))
    cycles, row, dep_ptr, dep_idx = (
        c.tolist() for c in (program.cycles, program.row, program.dep_ptr, program.dep_idx)
    )
    switch_cycles, row_miss_cycles = program.switch_cycles.tolist(), program.row_miss_cycles.tolist()

    queues: list[list[deque[int]]] = [[deque() for _ in range(n)] for n in program.n_queues.tolist()]
    successors: list[list[int]] = [[] for _ in range(n_tasks)]
    for task in range(n_tasks):
        queues[unit[task]][queue[task]].append(task)
        for dep in dep_idx[dep_ptr[task] : dep_ptr[task + 1]]:
            successors[dep].append(task)
    n_unfinished_deps: list[int] = np.diff(program.dep_ptr).tolist()
    ready = [0 if n == 0 else -1 for n in n_unfinished_deps]  # -1: not ready yet
    start, finish = [0] * n_tasks, [0] * n_tasks

    env = simpy.Environment()
    dispatches = [Dispatch(env) for _ in range(n_units)]

    def serve(u: int) -> Generator[simpy.Event, None, None]:
        previous_kind = open_row = -1
        for _ in range(sum(map(len, queues[u]))):
            dispatches[u] = dispatch = Dispatch(env)
            if any(q and ready[q[0]] >= 0 for q in queues[u]):
                dispatch.request()
            yield dispatch

            best = min(
                (q for q in queues[u] if q and ready[q[0]] >= 0), key=lambda q: (priority[q[0]], ready[q[0]], q[0])
            )
            task = best.popleft()
            service = cycles[task]
            if previous_kind >= 0:
                service += switch_cycles[u][previous_kind][kind[task]]
            if row[task] >= 0 and row[task] != open_row:
                service += row_miss_cycles[u]
                open_row = row[task]
            previous_kind = kind[task]
            start[task] = int(env.now)
            yield env.timeout(service)

            finish[task] = int(env.now)
            for waiter in successors[task]:
                n_unfinished_deps[waiter] -= 1
                if n_unfinished_deps[waiter] == 0:
                    ready[waiter] = finish[task]
                    if queues[unit[waiter]][queue[waiter]][0] == waiter:
                        dispatches[unit[waiter]].request()

    for u in range(n_units):
        env.process(serve(u))
    env.run()
    return Timeline(start_cycles=np.array(start, dtype=np.int64), finish_cycles=np.array(finish, dtype=np.int64))
