"""Steps to times: the same lowering and engine that ``run`` uses, many steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttt_sim.chip import Chip
from ttt_sim.lower.work import LEVELS, MATRIX, READ, WRITE, busiest_level
from ttt_sim.ops import total_by
from ttt_sim.predict.workloads import Step, trace_of
from ttt_sim.results import Result
from ttt_sim.simulation import simulate_trace

#: Steps of one trace; more save little and take memory.
STEPS_PER_TRACE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Time of one step in cycles and microseconds, and the unit that bounds its longest kernel."""

    cycles: int
    microseconds: float
    bound_by: str


def simulate_steps(chip: Chip, steps: Sequence[Step], *, engine: str = "compiled") -> list[StepTime]:
    """Time of each step on its own; equal steps are simulated once."""
    unique = list(dict.fromkeys(steps))
    per_trace = STEPS_PER_TRACE if chip.mapping.serial_kernels else 1
    times: dict[Step, StepTime] = {}
    for first in range(0, len(unique), per_trace):
        part = unique[first : first + per_trace]
        times |= zip(part, _simulate(chip, part, engine), strict=True)
    return [times[step] for step in steps]


def _simulate(chip: Chip, steps: Sequence[Step], engine: str) -> list[StepTime]:
    result = simulate_trace(chip, trace_of(steps), engine=engine)
    if chip.mapping.serial_kernels:
        cycles = np.diff(result.step_finish_cycles())
    else:  # the one step may begin before the traffic of the lead-in ends, and hold that up
        start, finish = result.kernel_span()
        mine = result.trace.step[result.lowered.kernels.lead] == 1
        cycles = (finish[mine].max(keepdims=True) - start[mine].min(keepdims=True)).astype(np.int64)
    bounds = bound_by_step(result)
    return [
        StepTime(cycles=int(count), microseconds=float(count) / chip.clock_hz * 1e6, bound_by=bounds[i + 1])
        for i, count in enumerate(cycles)
    ]


def bound_by_step(result: Result) -> list[str]:
    """Unit that is busiest in each step, or ``fixed`` where launches and fixed times of kernels take longer."""
    work, step = result.lowered.work, result.trace.step[result.lowered.kernels.lead]
    n_steps = int(step.max()) + 1
    busy = np.stack([total_by(step, work.cycles[:, level], n_steps) for level in range(len(LEVELS))], axis=1)
    busy[:, READ] += busy[:, WRITE]
    busy[:, WRITE] = 0
    fixed = total_by(step, work.launch_cycles, n_steps)
    names = list(LEVELS)
    names[READ], names[MATRIX] = "memory", "cores"
    level = busiest_level(busy)
    return ["fixed" if fixed[i] > busy[i, level[i]] else names[int(level[i])] for i in range(n_steps)]
