"""The same task for many items: order, errors, progress, interrupts."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ttt_sim.errors import WorkloadError
from ttt_sim.parallel import run_all

ROOT = Path(__file__).parents[2]


def doubled(item: int) -> int:
    return 2 * item


def refuse_large(item: int) -> int:
    if item > 12:
        raise WorkloadError(f"{item} is too many")
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    items = [7, 3, 9, 1, 12, 2, 8, 30, 4, 5, 6]
    assert run_all(doubled, items, workers=workers) == [14, 6, 18, 2, 24, 4, 16, 60, 8, 10, 12]


@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_a_task_reaches_the_caller(workers: int) -> None:
    items = [1, 2, 3, 20, 4, 5, 6, 7, 8]
    with pytest.raises(WorkloadError, match="20 is too many"):
        run_all(refuse_large, items, workers=workers)
    # the workers are still of use
    assert run_all(refuse_large, items[:3], workers=workers) == [1, 2, 3]


def die_at_three(item: int) -> int:
    if item == 3:
        os._exit(1)
    return item


SCRIPT = """
from tests.unit.test_parallel import die_at_three, doubled, refuse_large, run_all
from ttt_sim.errors import TTTSimError
print(run_all(doubled, range(5), workers=2))
for task, items in ((refuse_large, [1, 30, 2]), (die_at_three, [1, 2, 3, 4, 5, 6])):
    try:
        run_all(task, items, workers=2)
    except TTTSimError as error:
        print(type(error).__name__, error)
print(run_all(doubled, range(3), workers=2))
"""


@pytest.mark.parametrize("threads", ["one", "more"])
def test_errors_and_killed_workers_in_a_process_of_its_own(threads: str) -> None:
    """With one thread workers are forked, with more they start afresh; the caller sees the same."""
    start = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    code = (start if threads == "more" else "") + SCRIPT
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[0] == "[0, 2, 4, 6, 8]"
    assert lines[1] == "WorkloadError 30 is too many"
    assert lines[2].startswith("CapacityError one of 2 worker processes was killed")
    assert lines[3:] == ["[0, 2, 4]"]
    assert done.returncode == 0


def test_no_items_no_work() -> None:
    assert run_all(doubled, []) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_every_point_once(workers: int) -> None:
    seen: list[object] = []

    @contextmanager
    def progress(total: int) -> Iterator[Callable[[], None]]:
        seen.append(total)
        yield lambda: seen.append("one")
        seen.append("end")

    items = [1, 2, 3, 4, 5]
    run_all(doubled, items, workers=workers, progress=progress)
    assert seen == [5, *["one"] * 5, "end"]


def test_interrupts_work_again_after_workers_have_started() -> None:
    before = signal.getsignal(signal.SIGINT)
    run_all(doubled, [1, 2, 3], workers=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_items_run_from_another_thread() -> None:
    """Only the main thread may set signal handlers; others must do without."""
    found: list[list[int]] = []
    items = [1, 2, 3]
    thread = threading.Thread(target=lambda: found.append(run_all(doubled, items, workers=2)))
    thread.start()
    thread.join()
    assert found == [[2, 4, 6]]
