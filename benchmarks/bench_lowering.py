"""Speed and linearity of trace building, lowering and whole points: ``python benchmarks/bench_lowering.py``.

Long prefills of Qwen3-4B with In-Place TTT over a window on the H100: ops and tasks per second, and time and memory per
task as the prompt grows (both should stay level). Medians of several repetitions, compiled code warm. Nothing is
asserted: timings depend on the machine and on what else runs on it; the ratios less so.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import NamedTuple

from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.engine import run
from ttt_sim.grid import make_point
from ttt_sim.lower import lower
from ttt_sim.model import MethodSettings, Model, Scenario
from ttt_sim.model_config import load_model
from ttt_sim.simulation import simulate_point
from ttt_sim.units import format_bytes, parse_tokens
from ttt_sim.workload import build_trace, find_method


class Row(NamedTuple):
    """Medians for one prompt length."""

    tokens: int
    n_ops: int
    n_tasks: int
    build_s: float
    lower_s: float
    engine_s: float
    peak_bytes: int  # of lowering, by tracemalloc


def median_s(work: Callable[[], object], repetitions: int) -> float:
    """Median seconds of ``repetitions`` calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest memory that Python objects and arrays take during one call."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measure(chip: Chip, model: Model, method: MethodSettings, tokens: int, repetitions: int) -> Row:
    scenario = Scenario.prefill(tokens)
    trace = build_trace(model, method, scenario)
    program = lower(trace, chip).program
    return Row(
        tokens=tokens,
        n_ops=trace.n_ops,
        n_tasks=program.n_tasks,
        build_s=median_s(lambda: build_trace(model, method, scenario), repetitions),
        lower_s=median_s(lambda: lower(trace, chip), repetitions),
        engine_s=median_s(lambda: run(program), repetitions),
        peak_bytes=peak_bytes(lambda: lower(trace, chip)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="h100", help="chip (default h100)")
    parser.add_argument("--model", default="Qwen3-4B", help="model (default Qwen3-4B)")
    parser.add_argument("--method", default="ttt_window", help="method (default ttt_window)")
    parser.add_argument("--tokens", default="128k,256k,512k,1M", help="prompt lengths (default 128k,256k,512k,1M)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls per figure (default 5)")
    args = parser.parse_args()

    chip, model = load_chip(args.chip), load_model(args.model)
    method = find_method(args.method).settings(None, None, None)
    lengths = [parse_tokens(text) for text in args.tokens.split(",")]
    rows = [measure(chip, model, method, tokens, args.repetitions) for tokens in lengths]

    print(f"{args.model}, {args.method}, prefill on {args.chip}; medians of {args.repetitions}")
    print(
        f"{'tokens':>9}{'ops':>10}{'tasks':>11}{'trace ops/s':>14}{'lower tasks/s':>15}{'engine tasks/s':>16}"
        f"{'us/task':>9}{'B/task':>8}{'peak':>12}"
    )
    for r in rows:
        print(
            f"{r.tokens:9,}{r.n_ops:10,}{r.n_tasks:11,}{r.n_ops / r.build_s:14,.0f}{r.n_tasks / r.lower_s:15,.0f}"
            f"{r.n_tasks / r.engine_s:16,.0f}{1e6 * r.lower_s / r.n_tasks:9.3f}{r.peak_bytes / r.n_tasks:8.0f}"
            f"{format_bytes(r.peak_bytes):>12}"
        )
    first, last = rows[0], rows[-1]
    growth = last.n_tasks / first.n_tasks
    print(
        f"from the first to the last length: tasks x {growth:.2f}, lowering time x {last.lower_s / first.lower_s:.2f}, "
        f"lowering memory x {last.peak_bytes / first.peak_bytes:.2f}"
    )
    point = make_point(chip, model, args.method, phase="prefill", context=lengths[-1])
    whole = median_s(lambda: simulate_point(point), max(1, args.repetitions // 2))
    print(f"a whole prefill of {lengths[-1]:,} tokens, from model to record: {whole:.2f} s")


if __name__ == "__main__":
    main()
