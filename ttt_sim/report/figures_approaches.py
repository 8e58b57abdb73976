"""Figures of ways to adapt: what each costs, and how the costs of an answer add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ttt_sim.approaches import Approached
from ttt_sim.report.data import numbers, tokens_label
from ttt_sim.report.names import short_title, three_digits
from ttt_sim.report.style import MUTED, Drawn, framed_figure, in_prefix, scale_for, top_legend
from ttt_sim.workload import METHODS
from ttt_sim.workload.method import Family

#: Title and colour of what a context is kept in (Okabe and Ito).
FAMILIES: Mapping[Family, tuple[str, str]] = {
    "cache": ("KV cache", "#0072B2"),
    "fast_weights": ("fast weights", "#E69F00"),
    "state": ("recurrent state", "#009E73"),
    "training": ("trained weights", "#CC79A7"),
    "retrieval": ("index", "#56B4E9"),
}
#: The parts of an answer: title, column, colour.
_PARTS: tuple[tuple[str, str, str], ...] = (
    ("taking the context in", "adapt_seconds", "#B2182B"),
    ("first token of the answer", "ask_seconds", "#F4A582"),
    ("further tokens", "further_seconds", "#92C5DE"),
)
_NOTE = "Equal cost is not equal quality: the page says what is published of each method."


class _Panel(NamedTuple):
    column: str
    title: str
    unit: str
    low: str | None = None
    high: str | None = None


_PANELS: tuple[_Panel, ...] = (
    _Panel("state_bytes", "state of a user", "B"),
    _Panel("adapt_seconds", "taking the context in", "s", "adapt_seconds_low", "adapt_seconds_high"),
    _Panel("ask_seconds", "first token of an answer", "s", "ask_seconds_low", "ask_seconds_high"),
    _Panel("step_seconds", "a token for every user", "s", "step_seconds_low", "step_seconds_high"),
    _Panel("energy_j_per_token", "energy per token", "J"),
)


def context_line(data: Approached) -> str:
    """The workload in one line."""
    s = data.settings
    users = "1 user" if s.batch == 1 else f"{s.batch} users"
    return (
        f"{s.model.name} on {s.chip.title}, context {tokens_label(s.context)}, question {s.question}, "
        f"answer {s.answer} tokens, {users}"
    )


def costs(data: Approached) -> Drawn:
    """State, times and energy of every method, on logarithmic axes."""
    table = data.table
    rows = len(table)
    figure = framed_figure(
        "What each way to adapt costs", context_line(data), width=12.5, height=1.7 + 0.27 * rows,
        notes=[
            "Logarithmic axes; bars of times: 80 % intervals, wide where kernels were never measured. First token: of "
            f"a question about a context that was taken in. {_NOTE}"
        ],
    )  # fmt: skip
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    families = [METHODS[str(name)].family for name in table["method"]]
    colors = [FAMILIES[family][1] for family in families]
    for panel, ax in zip(_PANELS, axes, strict=True):
        _draw_panel(ax, panel, table, colors)
    axes[0].set_yticks(range(rows), [short_title(str(name)) for name in table["method"]])
    for label, color in zip(axes[0].get_yticklabels(), colors, strict=True):
        label.set_color(color)
        label.set_fontweight("bold")
    axes[0].set_ylim(rows - 0.4, -0.6)
    top_legend(
        figure,
        [
            Line2D([], [], linestyle="none", marker="o", color=color, label=title)
            for family, (title, color) in FAMILIES.items()
            if family in families
        ],
    )
    shown = table[["method", *(c for p in _PANELS for c in (p.column, p.low, p.high) if c is not None), "why"]]
    caption = "State of a user, time to take the context in, to a first token, of a decode step, and energy per token."
    return Drawn(figure, shown, "What each way to adapt costs", caption)


def _draw_panel(ax: Axes, panel: _Panel, table: pd.DataFrame, colors: list[str]) -> None:
    values = numbers(table, panel.column)
    scale = scale_for(values, panel.unit)
    usable = values[np.isfinite(values) & (values > 0)] / scale.size
    low, high = (float(usable.min()), float(usable.max())) if usable.size else (0.5, 2.0)
    ax.set_xscale("log")
    ax.set_xlim(low / 2, high * max(12.0, (2 * high / low) ** 0.45))
    for y, (value, color) in enumerate(zip(values / scale.size, colors, strict=True)):
        if not np.isfinite(value) or value <= 0:
            text = "none" if value == 0 else "not on this chip"
            ax.text(0.03, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=7, color=MUTED)
            continue
        end = value
        if panel.low is not None and panel.high is not None:
            bounds = [float(table[column].iloc[y]) / scale.size for column in (panel.low, panel.high)]
            ax.plot(bounds, [y, y], color=color, lw=1.2, alpha=0.55, solid_capstyle="butt")
            end = max(end, bounds[1])
        ax.plot([value], [y], "o", color=color, markersize=5)
        label = in_prefix(value * scale.size, panel.unit)
        ax.annotate(label, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set_title(panel.title)
    ax.set_xlabel(scale.unit)
    ax.xaxis.set_major_locator(LogLocator(base=10, numticks=5))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def answer_time(data: Approached) -> Drawn:
    """Time from a context to the end of one answer, in its parts."""
    table = data.table.copy()
    table["further_seconds"] = data.settings.answer * table["step_seconds"].astype(float)
    known = table[table["answer_seconds"].notna()].sort_values(["answer_seconds", "method"], kind="stable")
    columns = ["method", *(column for _, column, _ in _PARTS), "answer_seconds"]
    title = "From a new context to the end of the first answer"
    if len(known):
        first = known.iloc[0]
        title = f"{title}: {short_title(str(first['method']))} is soonest"
    figure = framed_figure(title, context_line(data), width=10, height=1.9 + 0.27 * max(len(known), 1), notes=[_NOTE])
    ax = figure.subplots()
    scale = scale_for(numbers(known, "answer_seconds"), "s")
    for y, row in enumerate(known.to_dict("records")):
        left = 0.0
        for _, column, color in _PARTS:
            width = float(row[column]) / scale.size
            ax.barh(y, width, left=left, height=0.66, color=color)
            left += width
        chips = int(max(row["chips"], row["adapt_chips"]))
        text = three_digits(left) + (f" ({chips} chips)" if chips > 1 else "")
        ax.annotate(text, (left, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    ax.set_yticks(range(len(known)), [short_title(str(name)) for name in known["method"]])
    ax.set_ylim(max(len(known), 1) - 0.4, -0.6)
    ax.margins(x=0.1)
    ax.set_xlabel(f"time ({scale.unit})")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    top_legend(figure, [Patch(facecolor=color, label=text) for text, _, color in _PARTS])
    caption = "Methods that cannot do all three on this chip are left out. Later questions do without the first part."
    return Drawn(figure, known[columns].reset_index(drop=True), title, caption)


FIGURES: Mapping[str, Callable[[Approached], Drawn]] = {"approaches": costs, "answer_time": answer_time}
