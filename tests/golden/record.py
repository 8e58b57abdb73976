"""What is kept of a case: measured, hashed, written, read back and compared.

``cycles.csv``   one row per case: cycles, busy cycles by unit, hashes of the trace and of the program
``kernels.csv``  one row per case, kernel and set of layers that agree: cycles by level, so that a difference names the
                 op and the layer that moved
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttt_sim.lower.work import LEVELS
from ttt_sim.ops import OP_COLUMNS, IntArray, Trace
from ttt_sim.program import Program
from ttt_sim.results import Result
from ttt_sim.simulation import Point, PointResult, simulate_point

FOLDER = Path(__file__).parent
CYCLES_FILE, KERNELS_FILE = FOLDER / "cycles.csv", FOLDER / "kernels.csv"

#: Digits of a hash that are kept: 64 bits tell any two of a few thousand programs apart.
HASH_DIGITS = 16
#: Kernels listed in a difference.
MOST_KERNELS = 8
#: What to do about a difference.
REMEDY = (
    "If the change is meant, run `make golden` (python -m tests.golden.regenerate), review the diff of the CSV files "
    "and say in CHANGELOG.md which counts moved and why."
)

Row = dict[str, str]
#: (kernel, layer) -> cycles by column.
KernelCycles = dict[tuple[str, int], tuple[int, ...]]

#: What is kept of a kernel, summed over chunks and calls: the time it accounts for, its service on each level.
KERNEL_COLUMNS: tuple[str, ...] = ("advance", "launch", *LEVELS)
CYCLE_COLUMNS: tuple[str, ...] = (
    "case", "cycles", "simulated_cycles", "n_ops", "n_kernels", "n_tasks", "flops", "main_read_bytes",
    "main_write_bytes", "peak_memory_bytes", "trace_sha256", "program_sha256", "busy_cycles",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is kept of one case: its row of ``cycles.csv`` and the cycles of its kernels."""

    row: Row
    kernels: KernelCycles


def measure(name: str, point: Point) -> Measured:
    """Simulate a case.

    Raises:
        AssertionError: the case does not fit its chip and so has no cycles.
    """
    outcome = simulate_point(point)
    assert outcome.result is not None, f"{name}: {outcome.record['reason']}"
    return Measured(row=_row(name, outcome, outcome.result), kernels=_kernels(outcome.result))


def _row(name: str, outcome: PointResult, result: Result) -> Row:
    units, work = result.units(), result.lowered.work
    busy = zip(units["unit"].tolist(), units["busy_cycles"].tolist(), strict=True)
    values: dict[str, object] = {
        "case": name,
        "cycles": outcome.record["cycles"],
        "simulated_cycles": result.cycles,
        "n_ops": result.trace.n_ops,
        "n_kernels": result.lowered.kernels.n,
        "n_tasks": result.lowered.program.n_tasks,
        "flops": int(result.trace.flops.sum()),
        "main_read_bytes": int(work.main_read_bytes.sum()),
        "main_write_bytes": int(work.main_write_bytes.sum()),
        "peak_memory_bytes": result.peak_memory_bytes(),
        "trace_sha256": trace_sha256(result.trace),
        "program_sha256": program_sha256(result.lowered.program),
        "busy_cycles": ";".join(f"{unit}:{cycles}" for unit, cycles in busy),
    }
    return {column: str(values[column]) for column in CYCLE_COLUMNS}


def _kernels(result: Result) -> KernelCycles:
    work = result.lowered.work
    table = np.column_stack([result.kernel_advance(), work.launch_cycles, work.cycles])
    layers = result.trace.layer[result.lowered.kernels.lead].tolist()
    sums: dict[tuple[str, int], IntArray] = {}
    for label, layer, cycles in zip(result.kernel_labels(), layers, table, strict=True):
        sums[label, layer] = sums.get((label, layer), 0) + cycles
    return {key: tuple(values.tolist()) for key, values in sums.items()}


# --- hashes -----------------------------------------------------------------------------------------------------------


def trace_sha256(trace: Trace) -> str:
    """Hash of every op, operand and tensor of a trace; what describes its origin (``meta``) is left out."""
    operands = (
        "read_ptr", "read_tensor", "read_version", "read_bytes", "write_ptr", "write_tensor", "write_version",
        "write_bytes", "after_ptr", "after_idx",
    )  # fmt: skip
    tensors = [(t.name, t.shape, t.dtype, t.role.name, t.nbytes, t.initial_version, t.in_place) for t in trace.tensors]
    return _sha256(trace, (*OP_COLUMNS, *operands), repr(tensors))


def program_sha256(program: Program) -> str:
    """Hash of everything an engine sees."""
    columns = (
        "unit", "queue", "priority", "kind", "cycles", "row", "dep_ptr", "dep_idx", "op", "nbytes", "flops", "n_queues",
        "switch_cycles", "row_miss_cycles",
    )  # fmt: skip
    return _sha256(program, columns, repr(program.unit_names))


def _sha256(source: object, columns: Iterable[str], rest: str) -> str:
    digest = hashlib.sha256(rest.encode())
    for column in columns:
        values: IntArray = getattr(source, column)
        digest.update(f"{column}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()[:HASH_DIGITS]


# --- files ------------------------------------------------------------------------------------------------------------


def write_golden(measured: Mapping[str, Measured]) -> None:
    """Rewrite both files."""
    CYCLES_FILE.write_text(_csv(CYCLE_COLUMNS, (m.row.values() for m in measured.values())), encoding="utf-8")
    lines = ((name, *cells) for name, m in measured.items() for cells in _by_layers(m.kernels))
    KERNELS_FILE.write_text(_csv(("case", "kernel", "layers", *KERNEL_COLUMNS), lines), encoding="utf-8")


def read_golden() -> dict[str, Measured]:
    """Both files, by case."""
    with CYCLES_FILE.open(encoding="utf-8", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    kernels: dict[str, KernelCycles] = {name: {} for name in rows}
    with KERNELS_FILE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = tuple(int(row.get(column, 0)) for column in KERNEL_COLUMNS)  # none of a level that came later
            kernels[row["case"]] |= {(row["kernel"], layer): values for layer in layer_numbers(row["layers"])}
    return {name: Measured(row=row, kernels=kernels[name]) for name, row in rows.items()}


def _csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(header)
    out.writerows(rows)
    return text.getvalue()


def _by_layers(kernels: KernelCycles) -> Iterator[tuple[object, ...]]:
    """One line per kernel and set of layers that agree."""
    alike: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for (label, layer), values in kernels.items():
        alike.setdefault((label, values), []).append(layer)
    for (label, values), layers in alike.items():
        yield label, layer_ranges(layers), *values


def layer_ranges(layers: Iterable[int]) -> str:
    """``0 2-4`` for 0, 2, 3, 4; ``-`` for the layer -1, where ops outside the layers stand."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1 and layer > 0:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " ".join("-" if a < 0 else str(a) if a == b else f"{a}-{b}" for a, b in runs)


def layer_numbers(text: str) -> list[int]:
    """The layers that :func:`layer_ranges` wrote."""
    out: list[int] = []
    for word in text.split():
        first, _, last = word.partition("-")
        out += [-1] if word == "-" else range(int(first), int(last or first) + 1)
    return out


# --- differences ------------------------------------------------------------------------------------------------------


def difference(golden: Measured, now: Measured) -> str:
    """What moved, golden value first; empty when nothing did."""
    lines = []
    for column in CYCLE_COLUMNS:
        old, new = golden.row[column], now.row[column]
        if old != new and column == "busy_cycles":
            lines += _busy_difference(old, new)
        elif old != new:
            lines.append(f"{column}: {old} -> {new}{_percent(old, new)}")
    moved: dict[tuple[str, str], list[int]] = {}
    for label, layer in sorted({*golden.kernels, *now.kernels}, key=_layer_first):
        text = _kernel_difference(golden.kernels.get((label, layer)), now.kernels.get((label, layer)))
        if text:
            moved.setdefault((label, text), []).append(layer)
    listed = [f"layer {layer_ranges(layers)}, {label}: {text}" for (label, text), layers in moved.items()]
    lines += listed[:MOST_KERNELS]
    if len(listed) > MOST_KERNELS:
        lines.append(f"and {len(listed) - MOST_KERNELS} more kernels")
    return "\n".join(lines)


def _layer_first(key: tuple[str, int]) -> tuple[int, str]:
    return key[1], key[0]


def _kernel_difference(old: tuple[int, ...] | None, new: tuple[int, ...] | None) -> str:
    if old is None:
        return "is new"
    if new is None:
        return "is gone"
    both = zip(KERNEL_COLUMNS, old, new, strict=True)
    return ", ".join(f"{column} {a} -> {b}" for column, a, b in both if a != b)


def _busy_difference(old: str, new: str) -> list[str]:
    def by_unit(text: str) -> dict[str, str]:
        return {unit: cycles for unit, _, cycles in (item.rpartition(":") for item in text.split(";"))}

    before, after = by_unit(old), by_unit(new)
    units = [unit for unit in {**before, **after} if before.get(unit) != after.get(unit)]
    return [f"{unit} busy: {before.get(unit, 'no unit')} -> {after.get(unit, 'no unit')}" for unit in units]


def _percent(old: str, new: str) -> str:
    if not (old.isdecimal() and new.isdecimal() and int(old)):
        return ""
    return f" ({int(new) / int(old) - 1:+.3%})"
