"""Figures on what would help: more of each part of the chip, other ways to write the weights."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ttt_sim.report.data import FloatArray, ReportData, fitting, numbers, select
from ttt_sim.report.names import (
    is_dark,
    method_style,
    method_title,
    short_parameter,
    three_digits,
)
from ttt_sim.report.style import (
    INK,
    MUTED,
    Drawn,
    method_rows,
    new_figure,
    no_data,
    scale_for,
    top_legend,
)

# --- sensitivity ------------------------------------------------------------------------------------------------------


#: Chip parameters that speed up no method by at least this much are left out of the figure.
LEAST_GAIN = 0.001


def sensitivity(data: ReportData) -> Drawn:
    """What more of each part of the chip buys, beside the units on the critical path."""
    table = pd.concat([data.sensitivity.iloc[:0], *(data.at_headline(data.sensitivity, p) for p in data.headlines)])
    paths = pd.concat([data.critical_path.iloc[:0], *(data.at_headline(data.critical_path, p) for p in data.headlines)])
    phases = [p for p in data.headlines if len(select(table, phase=p)) or len(select(paths, phase=p))]
    changes = sorted({float(c) for c in table["change_frac"]})
    change = f"{changes[0]:.0%}" if changes else "more"
    title = f"What {change} more of each part of the chip buys"
    caption = (
        "Left: units on the critical path. Right: speed gained when one chip parameter improves, all else as it was."
    )
    shown = {p: _worthwhile(select(table, phase=p)) for p in phases}
    most = max((len(rows) for rows in shown.values()), default=3)
    n_methods = max(len(data.methods), 3)
    panel = 0.75 + max(0.36 * n_methods, (0.1 + 0.085 * n_methods) * most)
    figure = new_figure(
        data, title, "left: what the critical path consists of; right: speed gained", width=11, caveat=False,
        height=1.4 + max(len(phases), 1) * panel,
        notes=[f"Parameters that gain no method {LEAST_GAIN:.1%} are in data/sensitivity.csv only. Latencies and "
               "overheads are made shorter, all else larger."],
    )  # fmt: skip
    if not phases:
        no_data(figure, "sensitivity was not asked for")
        return Drawn(figure, table, title, caption)
    axes = figure.subplots(len(phases), 2, squeeze=False)
    paths = paths.assign(unit=[str(unit).partition(".")[0] for unit in paths["unit"]])
    by_unit = paths.groupby("unit")["share_frac"].sum().sort_values(ascending=False, kind="stable")
    units = [str(unit) for unit in by_unit.index]
    colors = {unit: _UNIT_COLORS[i % len(_UNIT_COLORS)] for i, unit in enumerate(units)}
    for row, phase in enumerate(phases):
        _critical_path_panel(axes[row, 0], data, select(paths, phase=phase), colors)
        axes[row, 0].set_title(data.headline_text(phase))
        _gain_panel(axes[row, 1], data, select(table, phase=phase), shown[phase])
        axes[row, 1].set_title(f"{change} more of ...")
    top_legend(figure, [Patch(facecolor=colors[unit], label=unit) for unit in units])
    return Drawn(figure, table, title, caption)


_UNIT_COLORS = ("#2166AC", "#A6DBA0", "#DDCC77", "#9970AB", "#92C5DE", "#F4A582", "#C4C9CE", "#1B7837", "#7F8C8D")


def _worthwhile(rows: pd.DataFrame) -> list[str]:
    """Parameters that gain something for a method, the best first; at most eight."""
    best = rows.groupby("parameter")["gain_frac"].max().sort_values(ascending=False, kind="stable")
    return [str(name) for name, gain in best.items() if gain >= LEAST_GAIN][:8]


def _critical_path_panel(ax: Axes, data: ReportData, rows: pd.DataFrame, colors: dict[str, str]) -> None:
    methods = [m for m in data.methods if m in set(rows["method"])]
    shares = rows.groupby(["method", "unit"])["share_frac"].sum()
    for y, method in enumerate(methods):
        left = 0.0
        for unit, color in colors.items():
            share = 100 * float(shares.get((method, unit), 0.0))
            if share <= 0:
                continue
            ax.barh(y, share, left=left, height=0.66, color=color, edgecolor="white", linewidth=0.5)
            if share > 9:
                ink = "white" if is_dark(color) else INK
                ax.text(left + share / 2, y, f"{share:.0f}%", ha="center", va="center", fontsize=7.5, color=ink)
            left += share
    method_rows(ax, data, methods)
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of the time on the critical path")


def _gain_panel(ax: Axes, data: ReportData, rows: pd.DataFrame, parameters: list[str]) -> None:
    methods = [m for m in data.methods if m in set(rows["method"])]
    height = 0.82 / max(len(methods), 1)
    for i, method in enumerate(methods):
        mine = select(rows, method=method)
        gains = dict(zip(mine["parameter"], numbers(mine, "gain_frac"), strict=True))
        y = np.arange(len(parameters)) - 0.41 + height * (i + 0.5)
        ax.barh(
            y,
            [100 * gains.get(p, 0.0) for p in parameters],
            height=height * 0.92,
            color=method_style(data, method).color,
        )
    ax.set_yticks(range(len(parameters)), [short_parameter(p) for p in parameters])
    ax.set_ylim(max(len(parameters), 1) - 0.5, -0.5)
    ax.axvline(0, color=INK, lw=0.7)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("% faster")
    ax.tick_params(axis="y", length=0)
    if not parameters:
        ax.text(0.5, 0.5, "nothing gains", ha="center", va="center", color=MUTED, transform=ax.transAxes)


# --- weight-write variants --------------------------------------------------------------------------------------------


def weight_writes(data: ReportData) -> Drawn:
    """Cost of the updates of one prompt by how the delta reaches the weight."""
    table = data.write_variants.copy()
    table["update_busy_seconds"] = numbers(table, "update_busy_cycles") / data.machine.clock_hz
    shown = table.sort_values("fits", ascending=False, kind="stable")
    title = "What the updates cost, by how the delta reaches the weight"
    caption = "Time of the whole prefill, busy time and main-memory bytes of its updates, by weight-write variant."
    unfit = select(shown, fits=False).to_dict("records")
    figure = new_figure(
        data, title, _variant_scenario(data, table), width=11, height=1.6 + 0.36 * max(len(shown), 3), caveat=False,
        notes=[f"{row['weight_write']}: {row['reason']}." for row in unfit if "reason" in row],
    )  # fmt: skip
    if not len(fitting(shown)):
        no_data(figure, "weight-write variants were not simulated")
        return Drawn(figure, table, title, caption)
    axes = figure.subplots(1, 3, sharey=True)
    y = np.arange(len(shown), dtype=np.float64)
    for ax, column, unit, what, color in (
        (axes[0], "update_busy_seconds", "s", "busy time of one update", "#F4A582"),
        (axes[1], "update_main_bytes", "B", f"{data.machine.memory_name.upper()} bytes of one update", "#B2182B"),
        (axes[2], "seconds", "s", "whole prefill", "#7F8C8D"),
    ):
        values = numbers(shown, column)
        scale = scale_for(values, unit)
        _plain_bars(ax, y, values / scale.size, color)
        for row in np.flatnonzero(~np.isfinite(values)):
            width = 0.3 * float(np.nanmax(values)) / scale.size
            ax.barh(row, width, height=0.6, facecolor="none", edgecolor=MUTED, hatch="/////", lw=0.6)
        ax.set_xlabel(f"{what} ({scale.unit})")
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    axes[0].set_yticks(y, [str(v).replace("_", " ") for v in shown["weight_write"]])
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    return Drawn(figure, table, title, caption)


def _variant_scenario(data: ReportData, table: pd.DataFrame) -> str:
    if not len(table) or not {"method", "context_tokens"} <= set(table.columns):
        return "one prompt, one sequence"
    first = table.iloc[0]
    method = method_title(data, str(first["method"]))
    return f"{method}, prefill of {int(first['context_tokens']):,} tokens, one sequence"


def _plain_bars(ax: Axes, y: FloatArray, values: FloatArray, color: str) -> None:
    ax.barh(y, np.nan_to_num(values), height=0.6, color=color)
    for position, value in zip(y[np.isfinite(values)], values[np.isfinite(values)], strict=True):
        ax.text(float(value), float(position), f" {three_digits(float(value))}", va="center", fontsize=8)
    ax.set_xlim(0, float(np.nanmax(values)) * 1.12 or 1.0)
