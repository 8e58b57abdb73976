"""Speed of predictions: ``python benchmarks/bench_predict.py``.

Rows a second of ops and of whole models, every one a shape of its own, compiled code warm; medians of several
repetitions. Nothing is asserted: timings depend on the machine and on what else runs on it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

from ttt_sim.predict.nearest import MEASURED_ROWS
from ttt_sim.predict.predictions import Devices, predict_rows
from ttt_sim.predict.rows import Row

#: Whole models of several sizes, one chip and eight.
MODEL_ROWS = [
    Row(line=1, op=op, device="h100", dtype="fp8", model=model, batch=batch, tp=tp, context=2048, out_len=2048)
    for op in ("e2e_prefill", "e2e_generate")
    for model, batch, tp in (("Llama-2-7b", 1, 1), ("Llama-3-70B", 8, 8), ("Llama-3-70B", 64, 8))
]


def shapes(rows: list[Row], count: int) -> list[Row]:
    """``count`` rows from these, each a little larger than the last of its kind."""
    out = []
    for i in range(count):
        row, more = rows[i % len(rows)], i // len(rows)
        if row.context:
            out.append(replace(row, context=row.context + more))
        elif row.seq_kv > 1:
            out.append(replace(row, seq_kv=row.seq_kv + more))
        elif row.m:
            out.append(replace(row, m=row.m + more))
        else:
            out.append(replace(row, batch=row.batch + more))
    return out


def main() -> None:
    """Print one line for ops and one for whole models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    devices = Devices()
    predict_rows(list(MEASURED_ROWS), devices)
    print(f"{'rows':12} {'count':>6} {'rows/s':>8} {'wanted':>7} {'ratio':>6}")
    for title, rows, count, wanted in (
        ("ops", list(MEASURED_ROWS), 2000, 200),
        ("whole models", MODEL_ROWS, 200, 10),
    ):
        chosen = shapes(rows, count)
        seconds = []
        for _ in range(arguments.repetitions):
            began = time.perf_counter()
            predict_rows(chosen, devices)
            seconds.append(time.perf_counter() - began)
        speed = count / statistics.median(seconds)
        print(f"{title:12} {count:6} {speed:8,.0f} {wanted:7} {speed / wanted:6.1f}")


if __name__ == "__main__":
    main()
