"""What a replayed trace says: a summary for the terminal, and its frames as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ttt_sim.report.console import printer
from ttt_sim.report.folder import replaced_folder, write_summary
from ttt_sim.report.names import short_kernel
from ttt_sim.results import Result
from ttt_sim.units import ceil_div, format_bytes, format_seconds, format_si

#: Rows of the table of kernels; the rest is one more row.
MOST_KERNELS = 16


def print_replay(result: Result, console: Console | None = None) -> None:
    """Print totals, time by kernel, use of every unit, energy and memory. ``console`` defaults to standard output."""
    show, summary = printer(console), result.summary()
    show(Text(f"{_origin(result)} on {result.chip.title}", style="bold"))
    show(Text())
    show(_totals(result, summary))
    show(Text())
    show(_kernels(result))
    show(Text())
    show(_units(result))
    show(Text())
    show(_energy(result, summary))


def write_replay(result: Result, out: Path, *, command: str, version: str) -> None:
    """Write ``ops.csv``, ``units.csv``, ``memory.csv`` and ``summary.json`` to the folder ``out``, all of them or none.

    The columns are those of :meth:`Result.ops`, :meth:`Result.units` and :meth:`Result.memory`; the summary is
    :meth:`Result.summary` with whether the trace fits the chip, and its provenance.

    Raises:
        ConfigError: ``out`` cannot be written or holds something else than a report.
    """
    with replaced_folder(out) as folder:
        for name, frame in (("ops", result.ops()), ("units", result.units()), ("memory", result.memory())):
            frame.to_csv(folder / f"{name}.csv", index=False, encoding="utf-8", lineterminator="\n")
        chip = result.chip
        provenance = {
            "ttt_sim_version": version,
            "command": command,
            "chip": chip.name,
            "variant": chip.variant,
            "chip_file_sha256": chip.file_sha256,
            "chip_overrides": dict(chip.overrides),
            "trace": dict(result.trace.meta),
        }
        write_summary(folder, {**result.summary(), **_memory(result), "provenance": provenance})


def _memory(result: Result) -> dict[str, object]:
    peak, capacity = result.peak_memory_bytes(), result.chip.capacity_bytes
    chips = max(
        ceil_div(peak, capacity), ceil_div(result.peak_temporary_bytes(), result.chip.main_memory.capacity_bytes), 1
    )
    return {
        "fits": chips == 1,
        "bytes_needed": peak,
        "capacity_bytes": capacity,
        "chips_needed": chips,
    }


def _origin(result: Result) -> str:
    """What the trace says of itself; a hand-written one says nothing."""
    words = [str(result.trace.meta[key]) for key in ("model", "method") if key in result.trace.meta]
    return f"Trace of {', '.join(words)}" if words else "Trace"


def _totals(result: Result, summary: Mapping[str, object]) -> Table:
    memory = _memory(result)
    main, backing = result.chip.main_memory, result.chip.backing
    held = (
        f"{format_bytes(result.peak_memory_bytes())} at the peak, of {format_bytes(main.capacity_bytes)} in {main.name}"
    )
    if backing is not None:
        held += (
            f" and {format_bytes(backing.capacity_bytes)} in {backing.name}, {format_bytes(result.spilled_bytes)} there"
        )
    if not memory["fits"]:
        held += f": does not fit, {memory['chips_needed']} chips needed"
    clock = format_si(result.chip.clock_hz, "Hz")
    flops = format_si(result.trace.flops.sum(), "FLOP")
    lanes = format_si(result.trace.vector_ops.sum(), "vector op")
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("time", f"{format_seconds(result.seconds)}, {result.cycles:,} cycles at {clock}"),
        ("trace", f"{summary['n_ops']:,} ops in {summary['n_kernels']:,} kernels, {summary['n_tasks']:,} tasks"),
        ("computed", f"{flops}, {lanes}"),
        ("memory", held),
    ):  # fmt: skip
        table.add_row(Text(name), Text(value))
    return table


class _Kernel(NamedTuple):
    label: str
    times: int
    cycles: int
    bound_by: str


def _by_kernel(result: Result) -> list[_Kernel]:
    """Kernels by label, most of the time first; ``bound_by``: the unit that bounds most of that time."""
    times: dict[str, int] = {}
    bound: dict[str, dict[str, int]] = {}
    rows = zip(result.kernel_labels(), result.kernel_advance().tolist(), result.bound_by(), strict=True)
    for label, cycles, unit in rows:
        times[label] = times.get(label, 0) + 1
        units = bound.setdefault(label, {})
        units[unit] = units.get(unit, 0) + cycles
    table = [
        _Kernel(label, times[label], sum(units.values()), max(units, key=lambda unit: units[unit]))
        for label, units in bound.items()
    ]
    return sorted(table, key=lambda row: row.cycles, reverse=True)


def _kernels(result: Result) -> Table:
    table = _table("Time by kernel; updates count where others wait for them", "kernel", "times", "cycles", "share")
    table.add_column("bound by")
    rows = _by_kernel(result)
    if len(rows) > MOST_KERNELS:
        rest = rows[MOST_KERNELS - 1 :]
        others = _Kernel(f"{len(rest)} others", sum(r.times for r in rest), sum(r.cycles for r in rest), "")
        rows = [*rows[: MOST_KERNELS - 1], others]
    for row in rows:
        share = f"{row.cycles / max(result.cycles, 1):.1%}"
        table.add_row(*map(Text, (short_kernel(row.label), f"{row.times:,}", f"{row.cycles:,}", share, row.bound_by)))
    return table


def _units(result: Result) -> Table:
    table = _table("Units", "unit", "busy cycles", "busy", "tasks", "moved")
    units = result.units()
    columns = ("unit", "busy_cycles", "utilisation_frac", "n_tasks", "moved_bytes")
    for name, busy, share, n_tasks, nbytes in zip(*(units[column].tolist() for column in columns), strict=True):
        if n_tasks:
            moved = format_bytes(nbytes) if nbytes else ""
            table.add_row(*map(Text, (name, f"{busy:,}", f"{share:.1%}", f"{n_tasks:,}", moved)))
    return table


def _energy(result: Result, summary: Mapping[str, object]) -> Table:
    table = _table("Energy", "spent in", "energy", "share")
    spent = {name: float(values.sum()) for name, values in result.dynamic_energy_j().items()}
    spent["idle"] = result.chip.power.idle_w * result.seconds
    total = sum(spent.values())
    for name, energy in {**spent, "total": total}.items():
        share = f"{energy / total:.1%}" if total else ""
        table.add_row(*map(Text, (name, format_si(energy, "J"), share)))
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(
        title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1), collapse_padding=True,
        show_edge=False,
    )  # fmt: skip
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
