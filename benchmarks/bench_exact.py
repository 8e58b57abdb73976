"""Speed of correctly rounded products against NumPy's own: ``python benchmarks/bench_exact.py``.

The product of a chunk of Qwen3-4B with its gate projection, (1024, 2560) by (2560, 9728) in bfloat16, normally
distributed, correctly rounded, against NumPy's product of the same numbers in float32; then, at a smaller size, every
format of the result, and digits alone, which is what the certified step falls back to. Medians of several repetitions
in one run on one machine. Nothing is asserted: timings depend on what else runs; the ratio less so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ttt_sim.reference.exact import dot, dot_digits
from ttt_sim.reference.formats import BFLOAT16, FLOAT32, FLOAT64, Format, nearest
from ttt_sim.reference.randomness import normal

#: Most times slower than NumPy that the first product may be.
LIMIT = 40.0


def seconds(work: Callable[[], object], repetitions: int) -> float:
    """Median of ``repetitions`` calls."""
    taken = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def matrices(m: int, k: int, n: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Normally distributed bfloat16 numbers."""
    return nearest(normal(0, 0, (m, k)), BFLOAT16), nearest(normal(0, 1, (k, n)), BFLOAT16)


def size(text: str) -> tuple[int, int, int]:
    m, k, n = (int(part) for part in text.split("x"))
    return m, k, n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size, default=(1024, 2560, 9728), help="m x k x n (default 1024x2560x9728)")
    parser.add_argument("--small", type=size, default=(256, 2560, 1024), help="smaller (default 256x2560x1024)")
    parser.add_argument("--repetitions", type=int, default=3, help="timed calls per figure (default 3)")
    args = parser.parse_args()

    def row(shape: tuple[int, int, int], fmt: Format, path: Callable[..., object]) -> float:
        a, b = matrices(*shape)
        a_32, b_32 = a.astype(np.float32), b.astype(np.float32)
        a_32 @ b_32  # wakes the threads
        plain = seconds(lambda: a_32 @ b_32, args.repetitions)
        ours = seconds(lambda: path(a, b, fmt), args.repetitions)
        name = "digits alone" if path is dot_digits else "correctly rounded"
        m, k, n = shape
        print(f"{f'({m}, {k}) by ({k}, {n})':29}{fmt.name:>10}{name:>19}{ours:11.3f}{plain:11.3f}{ours / plain:8.1f}")
        return ours / plain

    print(f"normally distributed bfloat16 factors; medians of {args.repetitions}")
    print(f"{'product':29}{'result':>10}{'path':>19}{'time, s':>11}{'float32, s':>11}{'ratio':>8}")
    ratio = row(args.size, BFLOAT16, dot)
    for fmt in (BFLOAT16, FLOAT32, FLOAT64):
        row(args.small, fmt, dot)
        if fmt is not FLOAT64:  # for which there is no other path
            row(args.small, fmt, dot_digits)
    print(f"the first product takes {ratio:.1f} times as long as NumPy's in float32 (limit {LIMIT:g})")


if __name__ == "__main__":
    main()
