"""The summary that a run prints: the answer first, then the tables behind it. Plain text where there is no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ttt_sim.report.console import WIDTH, hanging, printer
from ttt_sim.report.data import ReportData, tokens_label
from ttt_sim.report.findings import (
    CrossingRow,
    answers,
    crossing_rows,
    limit_rows,
    quality_note,
    sensitivity_step,
    time_rows,
)
from ttt_sim.report.names import method_style, method_title


def print_summary(data: ReportData, out: Path | None = None, console: Console | None = None) -> None:
    """Print the summary of a report. ``out`` is the folder that holds it; ``console`` defaults to standard output."""
    show = printer(console)
    show(Text(f"{data.model} on {data.machine.title}", style="bold"))
    show(Text())
    for sentence in answers(data):
        show(hanging("- ", sentence))
    for note in quality_note(data):
        show(hanging("- ", note))
    for phase in data.headlines:
        show(Text())
        show(_times(data, phase))
    limits = _limits(data)
    if limits.row_count:
        show(Text())
        show(limits)
    rows, remarks = crossing_rows(data)
    if rows:
        show(Text())
        show(_crossings(rows))
        for number, remark in enumerate(remarks, start=1):
            show(hanging(f"{number:2}  ", remark))
    compared = data.provenance.get("engines_compared_on")
    if isinstance(compared, list | tuple) and compared:
        show(Text(f"\n{len(compared)} points simulated in both engines: identical cycles."))
    if out is not None:
        show(Text(f"Report: {out / 'README.md'}", style="bold"))


def _times(data: ReportData, phase: str) -> Table:
    what = (
        "time per token of the prompt" if phase == "prefill" else "time per step, in which every sequence gets a token"
    )
    rows = time_rows(data, phase)
    batches = list(dict.fromkeys(row.batch for row in rows))
    title = f"{phase.capitalize()}: {what}; tokens/s of the whole batch"
    table = _table(title)
    table.add_column("batch", justify="right")
    table.add_column("context", justify="right")
    for method in data.methods:
        table.add_column(Text(method_title(data, method), style=method_style(data, method).color), justify="right")
    for row in rows:
        last_of_batch = len(batches) > 1 and row.context_tokens == rows[-1].context_tokens
        table.add_row(
            str(row.batch),
            tokens_label(row.context_tokens),
            *(Text(cell) for cell in row.cells),
            end_section=last_of_batch,
        )
    return table


def _limits(data: ReportData) -> Table:
    points = {f"{at.context_tokens:,} tokens, batch {at.batch}" for at in data.headlines.values()}
    title = f"What limits each method ({'; '.join(sorted(points))})"
    table = _table(title)
    for name in ("phase", "method", "bound by", "time goes to", f"{sensitivity_step(data)} more buys"):
        table.add_column(name, no_wrap=name in ("phase", "method"))
    for row in limit_rows(data):
        method = Text(method_title(data, row.method), style=method_style(data, row.method).color)
        table.add_row(row.phase, method, Text(row.bound), Text(row.kernels), Text(row.gain))
    return table


def _crossings(rows: Sequence[CrossingRow]) -> Table:
    baselines = {row.baseline for row in rows}
    common = baselines.pop() if len(baselines) == 1 else None
    table = _table(f"Crossovers: context in tokens from which a method needs less than {common or 'its baseline'}")
    for name in ("quantity", "method", "simulated", "closed form", "note"):
        table.add_column(name, justify="right" if name in ("simulated", "note") else "left", no_wrap=name == "quantity")
    for row in rows:
        pair = row.method if common else f"{row.method}, {row.baseline}"
        table.add_row(*map(Text, (row.label, pair, row.simulated, row.closed, str(row.note) if row.note else "")))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1), collapse_padding=True,
        show_edge=False, min_width=min(len(title), WIDTH),
    )  # fmt: skip
