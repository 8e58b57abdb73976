"""The public names: what a notebook may rely on. A name that goes or comes is a change of the interface."""

import subprocess
import sys
from pathlib import Path

import pytest

import ttt_sim

PUBLIC = {
    "__version__",
    # chips, models, settings
    "Chip", "Model", "TTTSettings", "Scenario", "load_chip", "load_model", "load_ttt", "describe", "lint_chip",
    # workloads
    "METHODS", "Trace", "build_trace", "find_method", "load_trace", "save_trace", "state_per_sequence",
    # simulation
    "Point", "PointResult", "Result", "make_point", "simulate", "simulate_point", "simulate_trace", "sweep",
    # errors
    "TTTSimError", "ConfigError", "WorkloadError", "CapacityError", "ConservationError",
}  # fmt: skip


def test_public_names_are_these() -> None:
    assert set(ttt_sim.__all__) == PUBLIC
    assert len(ttt_sim.__all__) == len(PUBLIC)
    assert dir(ttt_sim) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__", "METHODS"}))
def test_public_name_is_documented(name: str) -> None:
    value = getattr(ttt_sim, name)
    assert callable(value)
    assert value.__doc__
    assert value.__module__.startswith("ttt_sim.")


def test_star_import_gives_all_of_them() -> None:
    namespace: dict[str, object] = {}
    exec("from ttt_sim import *", namespace)
    assert set(namespace) >= PUBLIC


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ttt_sim' has no attribute 'simulat'"):
        ttt_sim.simulat  # noqa: B018
    with pytest.raises(ImportError):
        exec("from ttt_sim import simulat", {})


def test_import_alone_loads_no_other_module_of_the_package() -> None:
    code = "import sys, ttt_sim; print(*(name for name in sys.modules if name.startswith('ttt_sim')))"
    root = Path(ttt_sim.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ttt_sim"]


def test_errors_share_a_base() -> None:
    for name in ("ConfigError", "WorkloadError", "CapacityError", "ConservationError"):
        assert issubclass(getattr(ttt_sim, name), ttt_sim.TTTSimError)
