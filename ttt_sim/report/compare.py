"""A comparison of chips on disk and in the terminal: findings, tables, figures and the data behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ttt_sim.comparison import Compared, label_of
from ttt_sim.parallel import run_all
from ttt_sim.report.compare_words import (
    DAGGER,
    TERMS,
    Table,
    by_kind,
    context_line,
    findings,
    full_table,
    method_names,
    speed_table,
)
from ttt_sim.report.console import WIDTH, hanging, printer
from ttt_sim.report.data import QUALITY_CAVEAT, plain, whole_numbers
from ttt_sim.report.figures import Rendered, render, write_table
from ttt_sim.report.figures_chips import FIGURES, style_of
from ttt_sim.report.folder import replaced_folder, write_summary
from ttt_sim.report.markdown import figure_lines, table_row

TITLE = "Chips compared"
SPEED = f"Decode tokens per second and chip ({DAGGER}: rests on a number of low certainty)"


def print_compared(data: Compared, out: Path | None = None, console: Console | None = None) -> None:
    """Print findings and the table of speeds. ``out`` is the folder that holds the report."""
    show = printer(console)
    show(Text(f"{TITLE}: {context_line(data)}", style="bold"))
    show(Text())
    for sentence in [*findings(data), *by_kind(data), *_caveat(data)]:
        show(hanging("- ", sentence))
    show(Text())
    show(_rich(data, speed_table(data)))
    if out is not None:
        show(Text(f"Report: {out / 'README.md'}", style="bold"))


def _rich(data: Compared, table: Table) -> RichTable:
    found = RichTable(
        title=SPEED, box=SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1), collapse_padding=True,
        show_edge=False, pad_edge=False, min_width=min(len(SPEED), WIDTH),
    )  # fmt: skip
    colors = ["", "", *(style_of(data, method).color for method in method_names(data))]
    for number, (name, color) in enumerate(zip(table.header, colors, strict=True)):
        found.add_column(Text(name, style=color), justify="left" if number < 2 else "right", no_wrap=number < 2)
    for row in table.rows:
        found.add_row(*map(Text, row))
    return found


def _caveat(data: Compared) -> list[str]:
    windows = {data.window_tokens(method) is not None for method in data.settings.methods}
    return [QUALITY_CAVEAT] if len(windows) > 1 else []


# --- the page ---------------------------------------------------------------------------------------------------------


def page(data: Compared, figures: Sequence[Rendered], provenance: Mapping[str, object]) -> str:
    """Findings, figures, tables and terms in Markdown."""
    lines = [f"# {TITLE}", "", context_line(data), ""]
    lines += [f"- {sentence}" for sentence in findings(data)]
    lines += [line for note in _caveat(data) for line in ("", f"> {note}")]
    lines += ["", "## By kind of hardware", ""]
    lines += [f"- {sentence}" for sentence in by_kind(data)]
    lines += ["", f"## {SPEED}", "", *_markdown(speed_table(data), left=2)]
    lines += ["", "## Figures", "", *figure_lines(figures)]
    lines += ["## Every chip and method", "", "All columns: [data/compare.csv](data/compare.csv).", ""]
    lines += [*_markdown(full_table(data), left=3), "", "## Terms", "", table_row("term", "meaning"), "| --- | --- |"]
    lines += [table_row(*term) for term in TERMS]
    lines += ["", "## Where this comes from", "", "| | |", "| --- | --- |"]
    for key, value in provenance.items():
        if not isinstance(value, Mapping | list):
            lines.append(table_row(key.replace("_", " "), f"`{value}`"))
    return "\n".join(lines).rstrip() + "\n"


def _markdown(table: Table, *, left: int) -> list[str]:
    marks = ["---" if number < left else "---:" for number in range(len(table.header))]
    return [table_row(*table.header), table_row(*marks), *(table_row(*cells) for cells in table.rows)]


# --- the folder -------------------------------------------------------------------------------------------------------


def write_compared(data: Compared, out: Path, *, command: str, version: str, workers: int | None = None) -> None:
    """Write page, figures, data and summary to the folder ``out``, all of them or none.

    Raises:
        ConfigError: ``out`` cannot be written or holds something else than a report.
    """
    provenance = _provenance(data, command, version)
    with replaced_folder(out) as folder:
        rendered = run_all(partial(_render, data=data, folder=folder), list(FIGURES), workers=workers)
        (folder / "data").mkdir()
        write_table(whole_numbers(data.table), folder / "data" / "compare.csv")
        write_table(whole_numbers(data.points), folder / "data" / "points.csv")
        (folder / "README.md").write_text(page(data, rendered, provenance), encoding="utf-8", newline="\n")
        write_summary(
            folder,
            {
                "provenance": provenance,
                "findings": findings(data),
                "by_kind": by_kind(data),
                "rows": plain(whole_numbers(data.table).to_dict("records")),
                "left_out": list(data.left_out),
                "quality_caveat": next(iter(_caveat(data)), None),
            },
        )


def _render(name: str, *, data: Compared, folder: Path) -> Rendered:
    return render(name, partial(FIGURES[name], data), folder / "figures")


def _provenance(data: Compared, command: str, version: str) -> dict[str, object]:
    s = data.settings
    return {
        "ttt_sim_version": version,
        "command": command,
        "model": s.model.name,
        "methods": list(s.methods),
        "context_tokens": s.context,
        "batch": s.batch,
        "window_tokens": s.window,
        "dtype": "that of each chip" if s.dtype is None else s.dtype,
        "kv_dtype": "that of the method" if s.kv_dtype is None else s.kv_dtype,
        "call_tokens": s.call_tokens,
        "ttt": plain(asdict(s.ttt)),
        "chips": [
            {"chip": label_of(chip), "dtype": s.dtype_of(chip), "file_sha256": chip.file_sha256} for chip in s.chips
        ],
    }
