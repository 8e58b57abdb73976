"""Fixtures and settings shared by all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ttt_sim.engine import ENGINES

#: Where measured data lies; it is not part of the project, so tests that need it skip without it.
DATA_VARIABLE = "TTT_SIM_DATA"
NO_DATA = f"measured data: {DATA_VARIABLE} is not set"

# The same examples on every machine and in every run, and no verdict that depends on how busy the machine is.
settings.register_profile(
    "deterministic",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=False,
)
settings.load_profile("deterministic")


# Session scope: hypothesis refuses to reuse a narrower fixture for all the examples of one test.
@pytest.fixture(scope="session", params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest) -> str:
    """Name of an engine; a test that takes it runs once on each."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of measured data named by ``TTT_SIM_DATA``; skips the test where the variable is not set."""
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        pytest.skip(NO_DATA)
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{DATA_VARIABLE} is {value!r}, which is not a folder")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much was left untested for lack of measured data, even where skip reasons are not shown."""
    skipped = terminalreporter.getreports("skipped")
    n_without_data = sum(NO_DATA in str(report.longrepr) for report in skipped)
    if n_without_data:
        terminalreporter.write_line(
            f"{n_without_data} tests skipped for lack of measured data; set {DATA_VARIABLE} to its folder to run them",
            yellow=True,
        )
