"""The same task for many items, on all cores, in order, and interruptible."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import active_children, get_context
from os import cpu_count
from typing import TypeVar

from ttt_sim.errors import CapacityError

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

#: Entered with the number of items; gives a function that is called once per finished item.
Progress = Callable[[int], AbstractContextManager[Callable[[], None]]]


def run_all(
    task: Callable[[Item], Outcome],
    items: Sequence[Item],
    *,
    workers: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> list[Outcome]:
    """``task`` of every item, in order, on ``workers`` processes (default: one per core; 1: in this process).

    ``batch`` items go to a worker at a time: enough to hide the hand-over, few enough to keep workers even.

    Raises:
        CapacityError: a worker was killed from outside, most likely for lack of memory.
    """
    n_workers = max(min(workers or cpu_count() or 1, len(items)), 1)
    outcomes: list[Outcome] = []
    with (progress or _silent)(len(items)) as advance:

        def gather(results: Iterable[Outcome]) -> None:
            for outcome in results:
                outcomes.append(outcome)
                advance()

        if n_workers == 1:
            gather(map(task, items))
        else:
            try:
                with _executor(n_workers) as executor:
                    with _without_interrupts():  # the processes start with the first item
                        results = executor.map(task, items, chunksize=batch)
                    gather(results)
            except BrokenExecutor:
                raise CapacityError(
                    f"one of {n_workers} worker processes was killed, most likely for lack of memory; "
                    "use fewer workers or smaller points"
                ) from None
    return outcomes


@contextmanager
def _executor(n_workers: int) -> Iterator[Executor]:
    """Worker processes. An interrupt of the block ends them.

    A process with a single thread is forked, so that workers share what it has imported and compiled. With more
    threads (a notebook) a fork could copy a lock that is held; there, and on other systems, workers start afresh.
    """
    if sys.platform == "linux" and threading.active_count() == 1:
        executor = ProcessPoolExecutor(n_workers, mp_context=get_context("fork"))
        try:
            yield executor
        except BaseException:
            with _quiet_threads():  # the thread that feeds the workers may stumble over what is taken from it
                for child in active_children():
                    child.terminate()
                executor.shutdown(cancel_futures=True)
            raise
        executor.shutdown()
    else:
        from loky import get_reusable_executor

        reusable = get_reusable_executor(max_workers=n_workers)
        try:
            yield reusable
        except KeyboardInterrupt:  # after an error they stay, for the next call
            reusable.shutdown(kill_workers=True)
            raise


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Errors of other threads are not printed inside the block."""
    before = threading.excepthook
    threading.excepthook = lambda _: None
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore SIGINT inside the block; processes started there ignore it for good.

    A terminal sends it to the workers too, which would each print a traceback; this process stops them instead.
    Python's warning that idle threads of a linear-algebra library do not survive a fork is not for the user.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        if (
            threading.current_thread() is not threading.main_thread()
        ):  # only the main thread is interrupted, and only it may set this
            yield
            return
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _silent(_total: int) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)
