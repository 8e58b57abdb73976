"""ttt_sim: what test-time training costs on a chip, and what a chip built for it would change.

The public names are imported on first use, so that ``import ttt_sim`` and the command line start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ttt_sim.chip import Chip
    from ttt_sim.config import load_chip
    from ttt_sim.errors import CapacityError, ConfigError, ConservationError, TTTSimError, WorkloadError
    from ttt_sim.grid import make_point, simulate, sweep
    from ttt_sim.lint import lint_chip
    from ttt_sim.model import Model, Scenario, TTTSettings
    from ttt_sim.model_config import load_model, load_ttt
    from ttt_sim.ops import Trace
    from ttt_sim.results import Result
    from ttt_sim.show import describe
    from ttt_sim.simulation import Point, PointResult, simulate_point, simulate_trace
    from ttt_sim.trace_io import load as load_trace
    from ttt_sim.trace_io import save as save_trace
    from ttt_sim.workload import METHODS, build_trace, find_method, state_per_sequence

#: Where each public name lives.
_HOMES = {
    "Chip": "chip",
    "load_chip": "config",
    "CapacityError": "errors",
    "ConfigError": "errors",
    "ConservationError": "errors",
    "TTTSimError": "errors",
    "WorkloadError": "errors",
    "lint_chip": "lint",
    "Model": "model",
    "Scenario": "model",
    "TTTSettings": "model",
    "load_model": "model_config",
    "load_ttt": "model_config",
    "Trace": "ops",
    "Result": "results",
    "describe": "show",
    "Point": "simulation",
    "PointResult": "simulation",
    "simulate_point": "simulation",
    "simulate_trace": "simulation",
    "make_point": "grid",
    "simulate": "grid",
    "sweep": "grid",
    "load_trace": "trace_io",
    "save_trace": "trace_io",
    "METHODS": "workload",
    "build_trace": "workload",
    "find_method": "workload",
    "state_per_sequence": "workload",
}
_RENAMED = {"load_trace": "load", "save_trace": "save"}

__all__ = [
    "METHODS",
    "CapacityError",
    "Chip",
    "ConfigError",
    "ConservationError",
    "Model",
    "Point",
    "PointResult",
    "Result",
    "Scenario",
    "TTTSettings",
    "TTTSimError",
    "Trace",
    "WorkloadError",
    "__version__",
    "build_trace",
    "describe",
    "find_method",
    "lint_chip",
    "load_chip",
    "load_model",
    "load_trace",
    "load_ttt",
    "make_point",
    "save_trace",
    "simulate",
    "simulate_point",
    "simulate_trace",
    "state_per_sequence",
    "sweep",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ttt_sim' has no attribute {name!r}")
    return getattr(import_module(f"ttt_sim.{_HOMES[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
