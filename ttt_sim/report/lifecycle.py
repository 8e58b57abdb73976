"""A lifecycle run on disk and in the terminal: findings, tables, the figure and the data behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ttt_sim.comparison import label_of
from ttt_sim.lifecycle import NO_ROOM, LifecycleData
from ttt_sim.report.console import hanging, printer
from ttt_sim.report.data import plain, tokens_label
from ttt_sim.report.figures import Rendered, render, write_table
from ttt_sim.report.figures_lifecycle import TITLE, context_line, lifecycle_figure
from ttt_sim.report.folder import replaced_folder, write_summary
from ttt_sim.report.markdown import figure_lines, table_row
from ttt_sim.report.names import three_digits
from ttt_sim.units import format_bytes, format_seconds, format_si
from ttt_sim.workload.lifecycle import HASHES

NOTE = (
    "Operations act on all sequences at once. A share is of the time in which a chunk is decoded: what the operation "
    "costs if it happens once per chunk."
)
#: Columns of the short table: heading, column, format.
SHORT: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("read", "read_bytes", format_bytes),
    ("written", "write_bytes", format_bytes),
    ("time", "seconds", format_seconds),
    ("of a chunk", "chunk_share", lambda value: percent(value)),
)
_LONG: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    *SHORT[:2],
    ("out or in", "outside_bytes", format_bytes),
    ("held beside", "held_bytes", format_bytes),
    ("FLOPs", "flops", lambda value: format_si(value, "FLOP")),
    *SHORT[2:],
    ("energy", "energy_j", lambda value: format_si(value, "J")),
)


def percent(share: float) -> str:
    """A share with three significant digits, unless it is too small to matter."""
    return "< 0.001 %" if share < 1e-5 else f"{three_digits(100 * share)} %"


def cell(row: Mapping[Any, Any], column: str, text: Callable[[float], str]) -> str:
    """A value as text, a dash where there is none."""
    value = row[column]
    if value is None or pd.isna(value):
        return "-"
    return "0" if value == 0 else text(float(value))


def findings(data: LifecycleData) -> list[str]:
    """What the numbers say."""
    done = {
        str(row["operation"]): row for row in data.operations.to_dict("records") if row["fits"]
    }  # fmt: skip
    out: list[str] = []

    def seconds(name: str) -> float:
        return float(done[name]["seconds"])

    if data.step_seconds is None:
        out.append(f"No decode step to compare with: {data.step_why}.")
    if "snapshot" in done:
        size = format_bytes(float(done["snapshot"]["held_bytes"]) / data.settings.batch)
        out.append(
            f"A snapshot takes {size} per sequence and {format_seconds(seconds('snapshot'))}{_share(done['snapshot'])}."
        )
    exact = [name for name in ("restore", "replay_factors", "replay_tokens") if name in done]
    if exact:
        ways = ", ".join(f"{done[name]['title']} {format_seconds(seconds(name))}" for name in exact)
        out.append(f"Exact ways back: {ways}.")
    if "subtract" in done:
        row = done["subtract"]
        out.append(f"Subtracting a delta is {'exact' if row['exact'] == 'yes' else 'not exact'}: {row['why']}.")
    for ours, theirs, what in (("swap_out", "kv_swap_out", "Swapping out"), ("fork", "kv_fork", "A fork")):
        if ours in done:
            text = f"{what}: {format_seconds(seconds(ours))} for the state"
            text += f", {format_seconds(seconds(theirs))} for a full KV cache" if theirs in done else ""
            out.append(f"{text}.")
    if "hash_weights" in done:
        title = HASHES[data.settings.hash_function].title
        out.append(
            f"A hash of the weights ({title}) of every chunk takes {format_seconds(seconds('hash_weights'))}"
            f"{_share(done['hash_weights'])}."
        )
    for mark in data.breakevens[data.breakevens["by"] == "bytes"].to_dict("records"):
        if pd.isna(mark["simulated_tokens"]):
            continue
        if not mark["simulated_tokens"]:
            out.append(f"The kernel form reads more than the {mark['against']} form after any history.")
            continue
        time = data.breakevens[(data.breakevens["by"] == "time") & (data.breakevens["against"] == mark["against"])]
        out.append(
            f"The kernel form reads no more than the {mark['against']} form up to "
            f"{int(mark['simulated_tokens']):,} tokens of history (closed form {mark['closed_form_tokens']:,.1f}), and "
            f"takes no longer up to {int(time['simulated_tokens'].iloc[0]):,}."
        )
    if "reject" in done:
        draft, chunk, cost = data.settings.draft, data.settings.ttt.chunk_tokens, seconds("reject")
        part = min(draft / chunk, 1.0)
        out.append(
            f"A draft of {draft} tokens completes a chunk in {three_digits(100 * part)} % of all cases; to reject it "
            f"then takes {format_seconds(cost)}, {format_seconds(part * cost)} in the mean of all drafts."
        )
    refused = data.operations[~data.operations["fits"].astype(bool)]
    no_room: list[str] = []
    for column, start in (("missing", "Not on this chip"), ("reason", "Not simulated")):
        for why, rows in refused[refused[column] != ""].groupby(column, sort=False):
            names = ", ".join(short_name(str(name)) for name in rows["operation"])
            if str(why).startswith(NO_ROOM):
                no_room.append(f"{names} ({str(why).removeprefix(NO_ROOM)})")
            else:
                out.append(f"{start}: {names} ({why}).")
    if no_room:
        out.append(f"Do not fit beside weights and state: {', '.join(no_room)}.")
    return out


def _share(row: Mapping[Any, Any]) -> str:
    text = cell(row, "chunk_share", percent)
    return "" if text == "-" else f", {text} of the time in which a chunk is decoded"


def short_name(operation: str) -> str:
    return operation.replace("kv_", "KV ").replace("_", " ")


def print_lifecycle(data: LifecycleData, out: Path | None = None, console: Console | None = None) -> None:
    """Print findings and the short table. ``out`` is the folder that holds the report."""
    show = printer(console)
    show(Text(f"{TITLE}: {context_line(data)}", style="bold"))
    show(Text())
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, show_edge=False, pad_edge=False)
    table.add_column("operation", no_wrap=True)
    for heading, _, _ in SHORT:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("exact", no_wrap=True)
    for row in data.operations.to_dict("records"):
        cells = [cell(row, column, text) for _, column, text in SHORT]
        table.add_row(short_name(str(row["operation"])), *cells, str(row["exact"]) or "-")
    show(table)
    show(Text())
    for sentence in [*findings(data), NOTE]:
        show(hanging("- ", sentence))
    if out is not None:
        show(Text())
        show(Text(f"Report: {out / 'README.md'}", style="bold"))


def page(data: LifecycleData, figure: Rendered, provenance: Mapping[str, object]) -> str:
    """Findings, figure and tables in Markdown."""
    lines = [f"# {TITLE}", "", context_line(data), ""]
    lines += [f"- {sentence}" for sentence in findings(data)]
    lines += ["", f"> {NOTE}", "", "## Figure", "", *figure_lines([figure])]
    lines += ["## Every operation", "", "All columns: [data/operations.csv](data/operations.csv).", ""]
    lines += [
        table_row("operation", "of", *(heading for heading, _, _ in _LONG), "exact"),
        table_row("---", "---", *["---:"] * len(_LONG), "---"),
    ]
    records = data.operations.to_dict("records")
    for row in records:
        cells = [cell(row, column, text) for _, column, text in _LONG]
        lines.append(table_row(str(row["title"]), str(row["subject"]), *cells, str(row["exact"]) or "-"))
    lines += ["", "## Why, and what it needs", ""]
    lines += [table_row("operation", "exact", "why", "needs", "not here because"), table_row(*["---"] * 5)]
    for row in records:
        absent = str(row["missing"] or row["reason"])
        lines.append(
            table_row(str(row["title"]), *(str(row[key]) or "-" for key in ("exact", "why", "needs")), absent or "-")
        )
    lines += [
        "", "## Forms of applying", "",
        "The MLPs of the TTT layers in one decode step of all sequences; state per sequence. All rows: "
        "[data/forms.csv](data/forms.csv).", "",
        table_row("form", "history", "state", "read", "FLOPs", "time", "energy"),
        table_row("---", *["---:"] * 6),
    ]  # fmt: skip
    for row in data.forms.to_dict("records"):
        if row["form"] != "kernel" and row["history_tokens"]:
            continue  # the same at any history
        history = tokens_label(float(row["history_tokens"])) if row["form"] == "kernel" else "any"
        if row["missing"]:
            lines.append(table_row(str(row["form"]), history, *["-"] * 4, str(row["missing"])))
            continue
        lines.append(
            table_row(
                str(row["form"]), history, format_bytes(float(row["state_bytes"])),
                format_bytes(float(row["read_bytes"])), format_si(float(row["flops"]), "FLOP"),
                format_seconds(float(row["seconds"])), format_si(float(row["energy_j"]), "J"),
            )
        )  # fmt: skip
    lines += [
        "",
        table_row("kernel form against", "by", "closed form", "simulated"),
        table_row("---", "---", "---:", "---:"),
    ]
    for row in data.breakevens.to_dict("records"):
        closed, simulated = (
            "-" if pd.isna(row[key]) else f"{float(row[key]):,.{digits}f} tokens"
            for key, digits in (("closed_form_tokens", 1), ("simulated_tokens", 0))
        )
        lines.append(table_row(str(row["against"]), str(row["by"]), closed, simulated))
    lines += ["", "## Where this comes from", "", "| | |", "| --- | --- |"]
    for key, value in provenance.items():
        if not isinstance(value, Mapping | list):
            lines.append(table_row(key.replace("_", " "), f"`{value}`"))
    return "\n".join(lines).rstrip() + "\n"


def write_lifecycle(data: LifecycleData, out: Path, *, command: str, version: str) -> None:
    """Write page, figure, data and summary to the folder ``out``, all of them or none.

    Raises:
        ConfigError: ``out`` cannot be written or holds something else than a report.
    """
    s = data.settings
    function = HASHES[s.hash_function]
    provenance: dict[str, object] = {
        "ttt_sim_version": version, "command": command, "chip": label_of(s.chip), "chips": data.chips,
        "chip_file_sha256": s.chip.file_sha256, "model": s.model.name, "method": s.method,
        "context_tokens": s.context, "batch": s.batch, "window_tokens": s.window, "dtype": s.dtype,
        "kv_dtype": s.kv_dtype or "that of the method", "beams": s.beams, "draft_tokens": s.draft,
        "hash": f"{function.title}, {function.lanes_per_kib} lane operations for 1024 bytes, {function.source}",
        "decode_step_seconds": data.step_seconds, "ttt": plain(asdict(s.ttt)),
    }  # fmt: skip
    with replaced_folder(out) as folder:
        rendered = render("lifecycle", partial(lifecycle_figure, data), folder / "figures")
        (folder / "data").mkdir()
        tables = {"operations": data.operations, "forms": data.forms, "breakevens": data.breakevens}
        for name, table in tables.items():
            write_table(table, folder / "data" / f"{name}.csv")
        (folder / "README.md").write_text(page(data, rendered, provenance), encoding="utf-8", newline="\n")
        write_summary(
            folder,
            {
                "provenance": provenance,
                "findings": findings(data),
                "note": NOTE,
                **{name: plain(table.to_dict("records")) for name, table in tables.items()},
            },
        )
