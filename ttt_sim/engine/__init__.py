"""Engines turn a :class:`~ttt_sim.program.Program` into a :class:`~ttt_sim.program.Timeline`.

Both obey the contract in :mod:`ttt_sim.program` to the cycle. ``simpy`` is the readable definition, ``compiled`` the
fast default. Each is a module with one function ``run(program)``, imported when it is first asked for: numba alone
takes longer to import than most programs take to simulate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

import numpy as np

from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError
from ttt_sim.program import TASK_KINDS, Program, Timeline, verify

#: Engine name -> module that holds its ``run``.
ENGINES: Mapping[str, str] = {
    "compiled": "ttt_sim.engine.compiled_engine",
    "simpy": "ttt_sim.engine.simpy_engine",
}


def check_engine(engine: str) -> None:
    """Raise :class:`ConfigError` unless ``engine`` is one of :data:`ENGINES`."""
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine!r} is not one of {', '.join(ENGINES)}{did_you_mean(engine, tuple(ENGINES))}")


def prepare(engine: str) -> None:
    """Import an engine and let it load or compile its code, so that processes forked afterwards share it."""
    for n_queues in (1, 2):  # the compiled engine has a path for programs with one queue per unit
        zero, none = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
        columns = dict.fromkeys(("unit", "queue", "priority", "kind", "op", "nbytes", "flops"), zero)
        n_kinds = len(TASK_KINDS)
        program = Program(
            **columns,
            cycles=zero + 1,
            row=zero - 1,
            dep_ptr=np.zeros(2, dtype=np.int64),
            dep_idx=none,
            unit_names=("unit",),
            n_queues=zero + n_queues,
            switch_cycles=np.zeros((1, n_kinds, n_kinds), dtype=np.int64),
            row_miss_cycles=zero,
        )
        run(program, engine)


def run(program: Program, engine: str = "compiled") -> Timeline:
    """Verify ``program`` and simulate it.

    :raises ConfigError: ``engine`` is not one of :data:`ENGINES`.
    :raises ProgramError: the program breaks the engine contract.
    """
    check_engine(engine)
    verify(program)
    simulate: Callable[[Program], Timeline] = import_module(ENGINES[engine]).run
    return simulate(program)
