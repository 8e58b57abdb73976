"""Ways to adapt on one chip, on disk and in the terminal: findings, a table, figures and the data behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ttt_sim.approaches import Approached
from ttt_sim.comparison import label_of
from ttt_sim.parallel import run_all
from ttt_sim.report.console import hanging, printer
from ttt_sim.report.data import plain, whole_numbers
from ttt_sim.report.figures import Rendered, render, write_table
from ttt_sim.report.figures_approaches import FIGURES, context_line
from ttt_sim.report.folder import replaced_folder, write_summary
from ttt_sim.report.markdown import figure_lines, table_row
from ttt_sim.report.names import short_title, three_digits
from ttt_sim.units import format_bytes, format_seconds, format_si
from ttt_sim.update_cost import SECONDS_PER_DAY

TITLE = "Ways to adapt"
NOTE = (
    "Methods differ in what they can recall and in how well; equal cost is not equal quality. The last table says what "
    "is published."
)
#: Columns of the short table: heading, column, format.
SHORT: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("state/user", "state_bytes", format_bytes),
    ("adaptation", "adapt_seconds", format_seconds),
    ("first token", "ask_seconds", format_seconds),
    ("per token", "step_seconds", format_seconds),
    ("J/token", "energy_j_per_token", lambda value: format_si(value, "J")),
)
_LONG: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    *SHORT,
    ("adaptation energy", "adapt_energy_j", lambda value: format_si(value, "J")),
    ("adaptation cost", "adapt_usd", lambda value: f"{three_digits(value)} USD"),
    ("USD per M tokens", "cost_usd_per_million_tokens", three_digits),
    ("most memory", "peak_memory_bytes", format_bytes),
    ("users held", "users", lambda value: f"{value:,.0f}"),
    ("chips", "chips", lambda value: f"{value:.0f}"),
    ("chips to adapt", "adapt_chips", lambda value: f"{value:.0f}"),
    ("memory lasts", "lifetime_days", lambda value: format_seconds(value * SECONDS_PER_DAY)),
)
#: What "least of all" is said of: column, start of the sentence, format.
_LEAST: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("state_bytes", "Least state of a user", format_bytes),
    ("adapt_seconds", "Fastest to take the context in", format_seconds),
    ("ask_seconds", "Soonest first token of an answer", format_seconds),
    ("step_seconds", "Fastest decode step", format_seconds),
    ("energy_j_per_token", "Least energy per token", lambda value: format_si(value, "J")),
)


def cell(row: Mapping[str, Any], column: str, text: Callable[[float], str]) -> str:
    """A value as text, a dash where there is none."""
    value = row[column]
    return "-" if value is None or pd.isna(value) else text(float(value))


def findings(data: Approached) -> list[str]:
    """What the numbers say."""
    table, out = data.table, []
    for column, start, text in _LEAST:
        known = table[table[column].notna()].sort_values([column, "method"], kind="stable")
        if known.empty:
            continue
        least, most = known.iloc[0], known.iloc[-1]
        sentence = f"{start}: {short_title(str(least['method']))} with {text(float(least[column]))}"
        if len(known) > 1:
            factor = float(most[column]) / float(least[column]) if least[column] else float("inf")
            sentence += f"; most: {short_title(str(most['method']))} with {text(float(most[column]))}"
            sentence += f", {three_digits(factor)} times as much" if factor < 1e6 else ""
        out.append(sentence + ".")
    updates = table[table["boundary_added_seconds"].notna()]
    if not updates.empty:
        worst = updates.sort_values("boundary_added_seconds").iloc[-1]
        out.append(
            "Jitter: a step that completes a chunk takes up to "
            f"{format_seconds(float(worst['boundary_added_seconds']))} longer ({short_title(str(worst['method']))})."
        )
    worn = table[table["lifetime_days"].notna()].sort_values(["lifetime_days", "method"], kind="stable")
    if not worn.empty:
        best = f"; at best {_lasts(worn.iloc[-1])}" if len(worn) > 1 else ""
        out.append(f"Memory that wears out: decoding without a pause, {_lasts(worn.iloc[0])}{best}.")
        kept = table[table["lifetime_days"].isna() & table["step_seconds"].notna()]["method"]
        if len(kept):
            names = ", ".join(short_title(str(name)) for name in kept)
            out[-1] += f" What a cache keeps back does not wear it: {names}."
    large = table["why"].str.contains(" need ", regex=False)
    if large.any():
        names = ", ".join(short_title(str(name)) for name in table.loc[large, "method"])
        out.append(
            f"Too large for this chip, as a whole or in part: {names}. The page says of each what it would need."
        )
    for why, rows in table[(table["why"] != "") & ~large].groupby("why", sort=False):
        names = ", ".join(short_title(str(name)) for name in rows["method"])
        out.append(f"Not on this chip, as a whole or in part: {names}. {_sentence(str(why))}")
    return out


def _lasts(row: pd.Series[Any]) -> str:
    """Which cells last how long."""
    lasts = format_seconds(float(row["lifetime_days"]) * SECONDS_PER_DAY)
    return f"{row['lifetime_limited_by']} lasts {lasts} with {short_title(str(row['method']))}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def print_approached(data: Approached, out: Path | None = None, console: Console | None = None) -> None:
    """Print findings and the short table. ``out`` is the folder that holds the report."""
    show = printer(console)
    show(Text(f"{TITLE}: {context_line(data)}", style="bold"))
    show(Text())
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, show_edge=False, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading, _, _ in SHORT:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in data.table.to_dict("records"):
        table.add_row(
            short_title(str(row["method"])), *(cell(row, column, text) for _, column, text in SHORT)  # type: ignore[arg-type]
        )  # fmt: skip
    show(table)
    show(Text())
    for sentence in [*findings(data), NOTE]:
        show(hanging("- ", sentence))
    if out is not None:
        show(Text())
        show(Text(f"Report: {out / 'README.md'}", style="bold"))


def page(data: Approached, figures: Sequence[Rendered], provenance: Mapping[str, object]) -> str:
    """Findings, figures and tables in Markdown."""
    records = data.table.to_dict("records")
    lines = [f"# {TITLE}", "", context_line(data), ""]
    lines += [f"- {sentence}" for sentence in findings(data)]
    lines += ["", f"> {NOTE}", "", "## Figures", "", *figure_lines(figures)]
    lines += ["## Every method", "", "All columns: [data/approaches.csv](data/approaches.csv).", ""]
    lines += [table_row("method", *(heading for heading, _, _ in _LONG)), table_row("---", *["---:"] * len(_LONG))]
    for row in records:
        lines.append(table_row(str(row["title"]), *(cell(row, column, text) for _, column, text in _LONG)))  # type: ignore[arg-type]
    lines += [
        "", "Adaptation and first token are those of one user, time per token that of a step of the whole batch.", "",
        "## What each needs, and what is published of its quality", "",
        table_row("method", "takes a context in by", "needs beyond a KV cache", "quality", "not on this chip because"),
        table_row(*["---"] * 5),
    ]  # fmt: skip
    for row in records:
        lines.append(table_row(*(str(row[key]) or "-" for key in ("title", "adapts", "needs", "caveat", "why"))))
    lines += ["", "## Where this comes from", "", "| | |", "| --- | --- |"]
    for key, value in provenance.items():
        if not isinstance(value, Mapping | list):
            lines.append(table_row(key.replace("_", " "), f"`{value}`"))
    return "\n".join(lines).rstrip() + "\n"


def write_approached(data: Approached, out: Path, *, command: str, version: str, workers: int | None = None) -> None:
    """Write page, figures, data and summary to the folder ``out``, all of them or none.

    Raises:
        ConfigError: ``out`` cannot be written or holds something else than a report.
    """
    s = data.settings
    provenance: dict[str, object] = {
        "ttt_sim_version": version, "command": command, "chip": label_of(s.chip),
        "chip_file_sha256": s.chip.file_sha256,
        "model": s.model.name, "context_tokens": s.context, "question_tokens": s.question, "answer_tokens": s.answer,
        "batch": s.batch, "window_tokens": s.window or "that of the method", "dtype": s.dtype or s.chip.default_dtype,
        "kv_dtype": s.kv_dtype or "that of the method", "call_tokens": s.call_tokens, "methods": list(s.methods),
        "ttt": plain(asdict(s.ttt)), "options": {name: dict(values) for name, values in s.options.items()},
    }  # fmt: skip
    with replaced_folder(out) as folder:
        rendered = run_all(partial(_render, data=data, folder=folder), list(FIGURES), workers=workers)
        (folder / "data").mkdir()
        write_table(whole_numbers(data.table), folder / "data" / "approaches.csv")
        (folder / "README.md").write_text(page(data, rendered, provenance), encoding="utf-8", newline="\n")
        write_summary(
            folder,
            {
                "provenance": provenance,
                "findings": findings(data),
                "rows": plain(whole_numbers(data.table).to_dict("records")),
                "note": NOTE,
            },
        )


def _render(name: str, *, data: Approached, folder: Path) -> Rendered:
    return render(name, partial(FIGURES[name], data), folder / "figures")
