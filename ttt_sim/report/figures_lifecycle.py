"""The figure of a lifecycle run: time and bytes of every operation, and forms of applying against history length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ttt_sim.lifecycle import LifecycleData, Subject
from ttt_sim.report.data import FloatArray, numbers, tokens_label
from ttt_sim.report.style import MUTED, Drawn, framed_figure, in_prefix, log_axis, scale_for, top_legend
from ttt_sim.units import format_si
from ttt_sim.workload.lifecycle import FORMS, Form

TITLE = "Lifecycle of changing weights"

#: Colours by Okabe and Ito: caches cold, fast weights warm, as in every report.
SUBJECT_COLORS: Mapping[Subject, str] = {"fast weights": "#D55E00", "KV cache": "#0072B2"}
FORM_STYLES: Mapping[Form, tuple[str, str, Literal["-", "--"]]] = {
    "merged": ("merged: one weight per sequence", "#000000", "-"),
    "split": ("split: trained weight and a change per sequence", "#009E73", "--"),
    "kernel": ("kernel: trained weight and the factors of the change", "#CC79A7", "-"),
}


def context_line(data: LifecycleData) -> str:
    """The workload in one line."""
    s = data.settings
    users = "1 sequence" if s.batch == 1 else f"{s.batch} sequences"
    chips = "" if data.chips == 1 else f"{data.chips} x "
    return (
        f"{s.model.name} on {chips}{s.chip.title}, context {tokens_label(s.context)}, chunks of "
        f"{tokens_label(s.ttt.chunk_tokens)}, {users}"
    )


def lifecycle_figure(data: LifecycleData) -> Drawn:
    """Operations as bars, forms as lines."""
    table = data.operations.copy()
    table["moved_bytes"] = table[["read_bytes", "write_bytes", "outside_bytes"]].astype("Float64").sum(axis=1)
    table.loc[~table["fits"].astype(bool), "moved_bytes"] = pd.NA
    figure = framed_figure(
        f"{TITLE}: time and bytes of every operation, and what a step reads in each form", context_line(data),
        width=13, height=2.0 + 0.215 * len(table),
        notes=[
            "Each operation on all sequences at once; logarithmic axes. Bytes: read and written in the memory of the "
            "chip, and moved out of it or into it. History: tokens whose updates the weights hold; the kernel form "
            "reads their factors, the others one dense weight or change per sequence."
        ],
    )  # fmt: skip
    grid = figure.add_gridspec(1, 3, width_ratios=(1.0, 1.0, 1.15))
    time, moved = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    colors = [SUBJECT_COLORS[subject] for subject in table["subject"]]
    _bars(time, table, "seconds", "time", "s", colors)
    _bars(moved, table, "moved_bytes", "bytes moved", "B", colors)
    time.set_yticks(range(len(table)), list(table["title"]))
    for label, color in zip(time.get_yticklabels(), colors, strict=True):
        label.set_color(color)
    moved.set_yticks(range(len(table)), [""] * len(table))
    _forms(figure.add_subplot(grid[0, 2]), data)
    subjects: list[Patch | Line2D] = [
        Patch(facecolor=color, label=subject) for subject, color in SUBJECT_COLORS.items()
    ]
    forms = [Line2D([], [], color=color, linestyle=dash, label=text) for text, color, dash in FORM_STYLES.values()]
    top_legend(figure, [*subjects, *forms])
    shown = table[["operation", "subject", "title", "seconds", "moved_bytes", "energy_j", "missing", "reason"]]
    forms_table = data.forms.rename(columns={"form": "operation"})[
        ["operation", "history_tokens", "read_bytes", "seconds"]
    ]
    caption = (
        "Time and bytes of each operation on fast weights and on a full KV cache; bytes that the MLPs of the TTT "
        "layers read in a decode step, by form of applying, with the break-even of the kernel form."
    )
    return Drawn(figure, pd.concat([shown, forms_table], ignore_index=True), TITLE, caption)


def _bars(ax: Axes, table: pd.DataFrame, column: str, title: str, unit: str, colors: list[str]) -> None:
    values = numbers(table, column)
    scale = scale_for(values, unit)
    usable = values[np.isfinite(values) & (values > 0)] / scale.size
    low, high = (float(usable.min()), float(usable.max())) if usable.size else (0.5, 2.0)
    ax.set_xscale("log")
    ax.set_xlim(low / 2, high * max(8.0, (2 * high / low) ** 0.3))
    for y, (value, color) in enumerate(zip(values, colors, strict=True)):
        if np.isfinite(value) and value > 0:
            ax.barh(y, value / scale.size - low / 2, left=low / 2, height=0.7, color=color)
            ax.annotate(
                in_prefix(value, unit), (value / scale.size, y), (4, 0), textcoords="offset points", va="center",
                fontsize=7,
            )  # fmt: skip
            continue
        text = "nothing" if value == 0 else _absent(table, y)
        ax.text(0.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=7, color=MUTED)
    ax.set_title(title)
    ax.xaxis.set_major_locator(LogLocator(base=10, numticks=6))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_si(value * scale.size, unit)))
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def _absent(table: pd.DataFrame, row: int) -> str:
    return "not on this chip" if table["missing"].iloc[row] else "does not fit"


def _forms(ax: Axes, data: LifecycleData) -> None:
    """Bytes of a step against history, one line per form; the break-even against the split form is marked."""
    table = data.forms[data.forms["missing"] == ""]
    every = numbers(table, "read_bytes")
    scale = scale_for(every, "B")
    ax.set_title("bytes that a step reads")
    ax.set_xlabel("history (tokens)")
    ax.set_ylabel(f"MLPs of the TTT layers, bytes read ({scale.unit})")
    if not len(table):
        ax.text(0.5, 0.5, "not on this chip", transform=ax.transAxes, ha="center", color=MUTED)
        return
    ax.set_xscale("log", base=2)
    log_axis(ax, every / scale.size)
    for form in FORMS:
        rows = table[(table["form"] == form) & (table["history_tokens"] > 0)]
        _, color, dash = FORM_STYLES[form]
        x: FloatArray = numbers(rows, "history_tokens")
        ax.plot(x, numbers(rows, "read_bytes") / scale.size, color=color, linestyle=dash)
    marks = data.breakevens[data.breakevens["by"] == "bytes"]
    for mark in marks.to_dict("records"):
        tokens = mark["simulated_tokens"]
        if pd.isna(tokens) or not tokens:
            continue
        ax.axvline(float(tokens), color=MUTED, linewidth=0.8, linestyle=":")
        left = mark["against"] == "merged"
        ax.annotate(
            f"{int(tokens):,} against {mark['against']}", (float(tokens), 0.03), (-4 if left else 4, 0),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="right" if left else "left",
            fontsize=7.5, color=MUTED,
        )  # fmt: skip
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_label(round(value))))
