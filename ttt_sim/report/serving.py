"""A served stream on disk and in the terminal: findings, tables, figures and the data behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ttt_sim.comparison import label_of
from ttt_sim.report.console import hanging, printer
from ttt_sim.report.data import QUALITY_CAVEAT, plain
from ttt_sim.report.figures import Rendered, render, write_table
from ttt_sim.report.figures_serving import (
    DURATION_TITLES,
    FIGURES,
    context_line,
    mixes_quality,
    served,
    style_of,
)
from ttt_sim.report.folder import replaced_folder, write_summary
from ttt_sim.report.markdown import figure_lines, table_row
from ttt_sim.report.names import three_digits
from ttt_sim.report.style import in_prefix
from ttt_sim.serving.records import PERCENTILES
from ttt_sim.serving.serve import BASELINE, Run, Stream, swap_of
from ttt_sim.units import format_bytes

TITLE = "Serving"


class Column(NamedTuple):
    """A column of a table: heading, column of the record, format."""

    heading: str
    name: str
    text: Callable[[float], str]


LOAD_COLUMNS: tuple[Column, ...] = (
    Column("load", "load_frac", lambda value: f"{100 * value:,.0f} %"),
    Column("sustains", "sustainable_per_s", lambda value: f"{three_digits(value)}/s"),
    Column("held", "most_sequences", lambda value: f"{value:,.0f}"),
    Column("tokens/s", "tokens_per_s", three_digits),
    Column("mean batch", "mean_batch", three_digits),
    Column("per token", "energy_j_per_token", lambda value: in_prefix(value, "J")),
    Column("USD/M", "cost_usd_per_million_tokens", three_digits),
    Column("USD/M full", "full_load_cost_usd_per_million_tokens", three_digits),
    Column("cost ratio", "cost_ratio", three_digits),
)
TERMS: tuple[tuple[str, str], ...] = (
    ("load", "requests that arrive over those that can be sustained"),
    ("sustains", "requests per second at full load: memory full of sequences of the mean size, no waiting"),
    ("held", "sequences of the mean request, half-way through its output, that memory holds beside all else"),
    ("per token", "energy per output token, with idling"),
    ("mean batch", "sequences in a decode step, weighted by time"),
    ("USD/M, USD/M full", "dollars per million output tokens, at the chip's rent: of this stream, and at full load"),
    ("cost ratio", f"chip time per output token at full load over that of `{BASELINE}`: what adaptation must charge"),
    ("time between tokens", "of one sequence, with what holds it up: prompts of others, swaps"),
    ("p99", "99th percentile, nearest rank"),
)  # fmt: skip


def cell(record: Mapping[str, Any], column: Column) -> str:
    """A value as text, a dash where there is none."""
    value = record[column.name]
    return "-" if value is None or pd.isna(value) else column.text(float(value))


def findings(run: Run) -> list[str]:
    """What the numbers say; first of all whether the chip keeps up."""
    out = sorted((_load(run, method) for method in served(run)), key=lambda said: not said.startswith("Warning"))
    out += [
        f"{style_of(run, str(row['method'])).title} is not served: {row['reason']}."
        for row in run.records.to_dict("records")
        if not row["fits"]
    ]
    out += [sentence for method in served(run) for sentence in _premium(run, method)]
    out += [sentence for method in served(run) for sentence in _jitter(run, method)]
    out += [sentence for method in served(run) for sentence in _swaps(run, method)]
    return out


def _load(run: Run, method: str) -> str:
    record, title = run.record(method), style_of(run, method).title
    rate, batch = _number(record, "sustainable_per_s"), int(_number(record, "full_batch"))
    what = f"{three_digits(rate)} requests/s can be sustained, {batch:,} sequences at once"
    if record["sustained"]:
        return f"{title}: {what}; the stream loads it to {100 * _number(record, 'load_frac'):.0f} %."
    offered = run.offered_per_s
    if offered is None:
        return f"{title}: {what}; all requests come at once, and their latencies are those of a backlog."
    return (
        f"Warning: {title} does not keep up with {three_digits(offered)} requests/s. No more than {what}; a backlog "
        "grows, and latencies are as long as the stream."
    )


def _premium(run: Run, method: str) -> list[str]:
    record = run.record(method)
    if method == BASELINE or pd.isna(record["cost_ratio"]):
        return []
    ratio, baseline = _number(record, "cost_ratio"), run.record(BASELINE)
    share = f"{100 * abs(ratio - 1):.0f} % {'more' if ratio >= 1 else 'less'}"
    said = f"Premium: at full load a token of {style_of(run, method).title} costs {share} than one of "
    said += style_of(run, BASELINE).title
    dollars = [one["full_load_cost_usd_per_million_tokens"] for one in (record, baseline)]
    if not any(pd.isna(value) for value in dollars):
        mine, theirs = (three_digits(float(value)) for value in dollars)
        said += f", {mine} against {theirs} USD per million output tokens"
    return [said + "."]


def _jitter(run: Run, method: str) -> list[str]:
    record, title = run.record(method), style_of(run, method).title
    if pd.isna(record["decode_step_median_seconds"]):
        return []
    median, p99, worst = (in_prefix(_number(record, f"decode_step_{name}_seconds"), "s") for name in PERCENTILES)
    said = f"Decode steps of {title}: median {median}, p99 {p99}, worst {worst}"
    if not pd.isna(record["boundary_added_seconds"]):
        added = in_prefix(_number(record, "boundary_added_seconds"), "s")
        times = int(_number(record, "completed_chunks"))
        said += f"; a sequence that completes a chunk adds {added}, which happened {times:,} times"
    return [said + "."]


def _swaps(run: Run, method: str) -> list[str]:
    record, title = run.record(method), style_of(run, method).title
    swaps, recomputes = int(_number(record, "swaps")), int(_number(record, "recomputes"))
    out = []
    if swaps:
        share = three_digits(100 * _number(record, "swap_frac"))
        out.append(
            f"{title} ran out of memory: sequences that were sent away and came back: {swaps:,}, in {share} % of the "
            "time."
        )
    if recomputes:
        tokens = int(_number(record, "recomputed_tokens"))
        out.append(
            f"{title} ran out of memory: sequences that were forgotten and computed again: {recomputes:,}, with "
            f"{tokens:,} tokens."
        )
    return out


def _number(record: Mapping[str, Any], name: str) -> float:
    return float(record[name])


def load_rows(run: Run) -> list[list[str]]:
    """A row per method: its name and :data:`LOAD_COLUMNS`."""
    return [
        [style_of(run, method).title, *(cell(run.record(method), column) for column in LOAD_COLUMNS)]
        for method in served(run)
    ]


def duration_rows(run: Run) -> list[list[str]]:
    """A row per method and duration: median, p99, worst."""
    rows = []
    for name, title in DURATION_TITLES.items():
        for method in served(run):
            record = run.record(method)
            values = [record[f"{name}_{percentile}_seconds"] for percentile in PERCENTILES]
            cells = ["-" if pd.isna(v) else in_prefix(float(v), "s") for v in values]
            rows.append([title, style_of(run, method).title, *cells])
    return rows


DURATION_HEADER = ("duration", "method", "median", "p99", "worst")


def print_served(run: Run, out: Path | None = None, console: Console | None = None) -> None:
    """Print findings and tables. ``out`` is the folder that holds the report."""
    show = printer(console)
    show(Text(f"{TITLE}: {context_line(run)}", style="bold"))
    show(Text())
    for sentence in findings(run):
        show(hanging("- ", sentence))
    if mixes_quality(run):
        show(hanging("- ", QUALITY_CAVEAT))
    show(Text())
    show(_table(("method", *(column.heading for column in LOAD_COLUMNS)), load_rows(run), left=1))
    show(Text())
    show(_table(DURATION_HEADER, duration_rows(run), left=2))
    if out is not None:
        show(Text(f"Report: {out / 'README.md'}", style="bold"))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> RichTable:
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, show_edge=False, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=number < left)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


# --- the page and the folder ------------------------------------------------------------------------------------------


def page(run: Run, figures: Sequence[Rendered], provenance: Mapping[str, object]) -> str:
    """Findings, tables and figures in Markdown."""
    lines = [f"# {TITLE}", "", context_line(run), ""]
    lines += [f"- {sentence}" for sentence in findings(run)]
    if mixes_quality(run):
        lines += ["", f"> {QUALITY_CAVEAT}"]
    lines += ["", "## Load and cost", ""]
    lines += _markdown(("method", *(column.heading for column in LOAD_COLUMNS)), load_rows(run), left=1)
    lines += ["", "## Latencies", "", *_markdown(DURATION_HEADER, duration_rows(run), left=2)]
    lines += ["", "All columns: [data/methods.csv](data/methods.csv); every request: "]
    lines[-1] += "[data/requests.csv](data/requests.csv)."
    lines += ["", "## Figures", "", *figure_lines(figures)]
    lines += ["## Terms", "", table_row("term", "meaning"), "| --- | --- |", *(table_row(*term) for term in TERMS)]
    lines += ["", "## Where this comes from", "", "| | |", "| --- | --- |"]
    for key, value in provenance.items():
        if not isinstance(value, Mapping | list):
            lines.append(table_row(key.replace("_", " "), f"`{value}`"))
    return "\n".join(lines).rstrip() + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    marks = ["---" if number < left else "---:" for number in range(len(header))]
    return [table_row(*header), table_row(*marks), *(table_row(*row) for row in rows)]


def write_served(run: Run, out: Path, *, command: str, version: str) -> None:
    """Write page, figures, data and summary to the folder ``out``, all of them or none.

    Raises:
        ConfigError: ``out`` cannot be written or holds something else than a report.
    """
    provenance = _provenance(run, command, version)
    with replaced_folder(out) as folder:
        rendered = [render(name, partial(figure, run), folder / "figures") for name, figure in FIGURES.items()]
        (folder / "data").mkdir()
        write_table(run.records, folder / "data" / "methods.csv")
        write_table(run.requests, folder / "data" / "requests.csv")
        (folder / "README.md").write_text(page(run, rendered, provenance), encoding="utf-8", newline="\n")
        write_summary(
            folder,
            {
                "provenance": provenance,
                "findings": findings(run),
                "methods": plain(run.records.to_dict("records")),
                "quality_caveat": QUALITY_CAVEAT if mixes_quality(run) else None,
            },
        )


def _provenance(run: Run, command: str, version: str) -> dict[str, object]:
    s, chips = run.settings, int(run.records["chips"].max())
    swap = swap_of(s.chip, chips)
    if swap is None:
        away = "computed again"
    else:
        away = (
            "sent to the host" if swap.capacity is None else f"sent to {format_bytes(swap.capacity)} behind the memory"
        )
    random: dict[str, object] = {"arrivals": "recorded"}
    if isinstance(s.stream, Stream):
        random = {"arrivals": "Poisson", "lengths": s.stream.lengths, "seed": s.stream.seed}
    return {
        "ttt_sim_version": version, "command": command, "chip": label_of(s.chip),
        "chip_file_sha256": s.chip.file_sha256, "chips": chips, "model": s.model.name, "dtype": s.dtype,
        "kv_dtype": s.kv_dtype or "that of the method", "window_tokens": s.window, "call_tokens": s.call_tokens,
        "most_sequences": s.most_sequences, "policy": s.policy, "without_room": away, **random,
        "methods": list(s.methods), "ttt": plain(asdict(s.ttt)),
    }  # fmt: skip
