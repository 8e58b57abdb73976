"""One op on one chip in words: the tile that was chosen, bytes by level, each term in microseconds, what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ttt_sim.chip import Chip
from ttt_sim.lower.work import CACHE, FAR, LEVELS, LINK, MATRIX, READ, SPECIAL, VECTOR, WRITE
from ttt_sim.ops import OP_KINDS, owners
from ttt_sim.predict.harness import GROUP_OF_OP, HARNESSES
from ttt_sim.predict.predictions import Devices, Prediction, predict_rows, raise_problems
from ttt_sim.predict.rows import Row
from ttt_sim.predict.workloads import step_of, trace_of
from ttt_sim.results import Result
from ttt_sim.simulation import simulate_trace
from ttt_sim.units import format_bytes

#: Names of the levels for people.
TITLES = {
    FAR: "backing memory", READ: "main memory, reads", CACHE: "shared cache", MATRIX: "cores", VECTOR: "vector lanes",
    SPECIAL: "special functions", LINK: "links", WRITE: "main memory, writes",
}  # fmt: skip
#: What is tried: title and the change of the chip.
FASTER = ("twice the memory bandwidth", "twice the matrix rate", "no fixed times", "twice the cores at the same peak")


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """``lines`` of text; ``prediction`` of the row."""

    prediction: Prediction
    lines: tuple[str, ...]


def explain(row: Row, chip: Chip, *, harness: str) -> Explanation:
    """Explain an operator row on ``chip``.

    Raises:
        WorkloadError: the chip cannot run it.
    """
    devices = Devices(chip)
    found, problems = predict_rows([row], devices, harness=harness)
    raise_problems([problem.partition(": ")[2] for problem in problems])
    prediction = found[0]
    assert prediction is not None
    cache = chip.cache.capacity_bytes if chip.cache is not None else 0
    result = simulate_trace(chip, trace_of([step_of(row, HARNESSES[harness], cache)]))
    extra = HARNESSES[harness].extra_us.get(GROUP_OF_OP[row.op], 0.0)
    lines = [
        f"{row.op} on {prediction.chip}: {prediction.predicted_us:.2f} us, 80 % interval "
        f"{prediction.low_us:.2f} to {prediction.high_us:.2f} us, bound by {prediction.bound_by}",
        f"holds {prediction.included} (harness {harness}: {HARNESSES[harness].title})",
        *_kernels(result),
        *([f"harness: {extra:+.2f} us"] if extra else []),
        *_what_if(row, chip, harness, prediction.predicted_us),
    ]
    return Explanation(prediction=prediction, lines=tuple(lines))


def _kernels(result: Result) -> Iterator[str]:
    """Lines on each kernel but that of the lead-in step."""
    work, clock = result.lowered.work, result.chip.clock_hz
    start, finish = result.kernel_span()
    for kernel in range(1, result.lowered.kernels.n):
        op = int(result.lowered.kernels.lead[kernel])
        kind = OP_KINDS[int(result.trace.kind[op])]
        us = (finish[kernel] - start[kernel]) / clock * 1e6
        yield f"kernel {kernel}: {kind.title}, {us:.2f} us"
        if work.items[kernel]:
            tile = f"tile {work.tile_rows[kernel]} x {work.tile_cols[kernel]}, " if work.tile_rows[kernel] else ""
            split = int(work.split[kernel])
            yield (
                f"  {tile}{work.items[kernel]} pieces of work on {result.chip.cores} cores: {work.waves[kernel]} "
                f"waves{f', reduction split in {split}' if split > 1 else ''}"
            )
        hits = _hits(result, kernel)
        yield (
            f"  bytes: {format_bytes(int(work.main_read_bytes[kernel]))} read and "
            f"{format_bytes(int(work.main_write_bytes[kernel]))} written in main memory, "
            f"{format_bytes(int(work.cache_bytes[kernel]))} through the shared cache"
            f"{f', {format_bytes(hits)} found there' if hits else ''}"
        )
        yield f"  fixed: {work.launch_cycles[kernel] / clock * 1e6:.2f} us"
        for level in range(len(LEVELS)):
            cycles = int(work.cycles[kernel, level])
            if cycles:
                yield f"  {TITLES[level]}: {cycles / clock * 1e6:.2f} us"


def _hits(result: Result, kernel: int) -> int:
    trace, kernels, traffic = result.trace, result.lowered.kernels, result.lowered.traffic
    return int(traffic.read_hit_bytes[kernels.of_op[owners(trace.read_ptr)] == kernel].sum())


def _what_if(row: Row, chip: Chip, harness: str, now_us: float) -> Iterator[str]:
    """How much faster the row would be on a chip with one thing changed, best first; under one per cent is left out."""
    main = chip.main_memory
    rules = chip.library
    matrix = tuple(
        replace(unit, peak_per_s={dtype: 2 * peak for dtype, peak in unit.peak_per_s.items()})
        if unit.kind == "matrix"
        else unit
        for unit in chip.units
    )
    doubled = replace(main, read_bytes_per_s=2 * main.read_bytes_per_s, write_bytes_per_s=2 * main.write_bytes_per_s)
    free = replace(
        rules, kernel_cycles=0, reduction_cycles=0, attention_setup_cycles=0, attention_start_cycles=0,
        decode_start_cycles=0, combine_cycles=0, regroup_cycles=0, scan_setup_cycles=0, scan_start_cycles=0,
    )  # fmt: skip
    changed = (
        replace(chip, memories=tuple(doubled if level is main else level for level in chip.memories)),
        replace(chip, units=matrix),
        replace(chip, library=free, overheads=replace(chip.overheads, op_launch_s=0.0)),
        replace(chip, cores=2 * chip.cores),
    )
    gains = []
    for title, other in zip(FASTER, changed, strict=True):
        found, _ = predict_rows([row], Devices(other), harness=harness)
        if found[0] is not None:
            gains.append((1 - found[0].predicted_us / now_us, title))
    for gain, title in sorted(gains, reverse=True):
        if gain >= 0.01:
            yield f"with {title}: {100 * gain:.0f} % less time"
