"""Figures that set methods against each other: memory for compute, steps across a chunk boundary, crossovers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ttt_sim.report.data import FloatArray, ReportData, fitting, numbers, select, tokens_label
from ttt_sim.report.findings import merged_crossings, no_crossing
from ttt_sim.report.names import method_style, method_title, three_digits
from ttt_sim.report.style import (
    MUTED,
    Drawn,
    Label,
    context_axis,
    doublings,
    log_axis,
    log_fraction,
    method_handles,
    new_figure,
    no_data,
    place_labels,
    scale_for,
    top_legend,
)
from ttt_sim.units import format_bytes

_MIB = 1 << 20

# --- memory for compute -----------------------------------------------------------------------------------------------


def trade_off(data: ReportData) -> Drawn:
    """State bytes against FLOPs and time per token, one line per method through the contexts."""
    table = data.points[["method", "phase", "context_tokens", "batch", "fits", "state_bytes_per_sequence"]].copy()
    table["flops_per_token"] = numbers(data.points, "flops") / numbers(data.points, "tokens")
    table["seconds_per_token"] = numbers(data.points, "seconds_per_token")
    keep = pd.Series(False, index=table.index)
    for phase, at in data.headlines.items():
        keep |= (table["phase"] == phase) & (table["batch"] == at.batch)
    table = fitting(table[keep])
    title = "Memory for compute: what each method spends as the context grows"
    caption = (
        "State per sequence against FLOPs and against time per token; a line follows one method through the contexts. "
        "Lower left is better."
    )
    phases = [phase for phase in data.headlines if len(select(table, phase=phase))]
    figure = new_figure(
        data, title, "labels: context in tokens; lower left is better", width=11, height=1.9 + 3.3 * max(len(phases), 1)
    )
    if not phases:
        no_data(figure, "no point fits")
        return Drawn(figure, table, title, caption)
    axes = figure.subplots(len(phases), 2, squeeze=False)
    for row, phase in enumerate(phases):
        for ax, column, unit, what in (
            (axes[row, 0], "flops_per_token", "FLOP", "compute"),
            (axes[row, 1], "seconds_per_token", "s", "time"),
        ):
            panel = select(table, phase=phase)
            scale = scale_for(numbers(panel, column), unit)
            state = numbers(panel, "state_bytes_per_sequence") / _MIB
            ax.set_xscale("log")
            ax.set_xlim(max(state.min(), 1e-6) / 2.0, max(state.max(), 1e-6) * 2.2)
            log_axis(ax, numbers(panel, column) / scale.size)
            curves: list[_Curve] = []
            for method in data.methods:
                rows = select(panel, method=method).sort_values("context_tokens")
                style = method_style(data, method)
                x, y = numbers(rows, "state_bytes_per_sequence") / _MIB, numbers(rows, column) / scale.size
                ax.plot(
                    x, y, color=style.color, ls=style.dash, marker=style.marker, markeredgecolor="white",
                    markeredgewidth=0.6, markersize=5 if data.window_tokens(method) is None else 8,
                )  # fmt: skip
                if len(rows):
                    places = log_fraction(x, ax.get_xlim()), log_fraction(y, ax.get_ylim())
                    curves.append(_Curve(*places, tuple(int(t) for t in rows["context_tokens"]), style.color))
            _label_curves(ax, curves)
            low, high = ax.get_xlim()
            step = 2 if math.log2(high / low) < 14 else 4
            ticks = [2.0**e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1, step)]
            ax.xaxis.set_major_locator(FixedLocator(ticks))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value * _MIB)))
            ax.set_xlabel("state per sequence")
            ax.set_ylabel(f"{what} ({scale.unit} per token)")
            ax.set_title(f"{phase}, batch {data.headlines[phase].batch}: {what}")
    top_legend(figure, method_handles(data, data.methods))
    return Drawn(figure, table, title, caption)


class _Curve(NamedTuple):
    """One method in a panel, points in fractions of the axes."""

    x: FloatArray
    y: FloatArray
    contexts: tuple[int, ...]
    color: str


def _label_curves(ax: Axes, curves: Sequence[_Curve]) -> None:
    """Context labels; points that lie on one another share a label such as 4K–128K."""
    obstacles: list[tuple[float, float]] = []
    labels = []
    for curve in curves:
        at = np.arange(0, len(curve.x) - 0.999, 0.05)
        steps = np.arange(len(curve.x))
        obstacles += zip(np.interp(at, steps, curve.x).tolist(), np.interp(at, steps, curve.y).tolist(), strict=True)
        groups: list[list[int]] = [[0]]
        for i in range(1, len(curve.x)):
            start = groups[-1][0]
            if math.hypot(curve.x[i] - curve.x[start], curve.y[i] - curve.y[start]) < 0.04:
                groups[-1].append(i)
            else:
                groups.append([i])
        for number, group in enumerate(groups):
            if len(group) == 1 and number not in (0, len(groups) - 1) and number % 2:
                continue
            first, last = tokens_label(curve.contexts[group[0]]), tokens_label(curve.contexts[group[-1]])
            text = first if len(group) == 1 else f"{first}–{last}"
            labels.append(Label(float(curve.x[group[-1]]), float(curve.y[group[-1]]), text, curve.color))
    labels.sort(key=lambda label: -len(label.text))  # shared labels first, they need the most room
    place_labels(ax, labels, obstacles, leaders=False)


# --- decode across a chunk boundary -----------------------------------------------------------------------------------


def step_times(data: ReportData) -> Drawn:
    """Decode step times across a chunk boundary."""
    table = data.step_times.sort_values(["batch", "method", "offset_tokens"])
    title = "One decode step in a chunk pays for the update of the fast weights"
    peak = select(table, offset_tokens=0)
    rest = table[table["offset_tokens"] < 0]
    ratios = [
        float(row["seconds"]) / float(np.median(numbers(others, "seconds")))
        for row in peak.to_dict("records")
        if len(others := select(rest, method=row["method"], batch=row["batch"]))
    ]
    if ratios and max(ratios) > 1.05:
        title = f"The step that completes a chunk takes up to {three_digits(max(ratios))} times as long as the others"
    caption = "Time of single decode steps around the end of a chunk; step 0 brings the last token of the chunk."
    at = data.headlines.get("decode")
    batches = sorted({int(b) for b in table["batch"]})
    across = min(max(len(batches), 1), 4)
    figure = new_figure(
        data, title, f"decode at {tokens_label(at.context_tokens)} tokens" if at else "decode",
        width=11 if across > 1 else 7.4, height=4.5,
    )  # fmt: skip
    if not len(table):
        no_data(figure, "no decode across a chunk boundary was simulated")
        return Drawn(figure, table, title, caption)
    batches = batches[:4]
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)
    values = numbers(table, "seconds")
    scale = scale_for(values, "s")
    methods = [m for m in data.methods if m in set(table["method"])]
    for i, batch in enumerate(batches):
        ax = axes[0, i]
        for method in methods:
            rows = select(table, method=method, batch=batch)
            style = method_style(data, method)
            ax.plot(
                numbers(rows, "offset_tokens"), numbers(rows, "seconds") / scale.size, color=style.color, ls=style.dash,
                marker=style.marker, markersize=5, markeredgecolor="white", markeredgewidth=0.5, lw=1.4,
            )  # fmt: skip
        ax.axvspan(-0.5, 0.5, color="#F2F0E6", zorder=0, lw=0)
        log_axis(ax, values / scale.size)
        ax.set_xlabel("step, counted from the one that completes the chunk")
        ax.set_title(f"batch {batch}")
        if len(batches) > 2:
            ax.set_xlabel("step from the boundary")
    axes[0, 0].set_ylabel(f"step time ({scale.unit})")
    handles = method_handles(data, methods)
    top_legend(figure, [*handles, Patch(facecolor="#F2F0E6", label="step that completes a chunk")])
    return Drawn(figure, table, title, caption)


# --- crossovers -------------------------------------------------------------------------------------------------------


def crossovers(data: ReportData) -> Drawn:
    """Where methods with fast weights change places with their baseline, simulated and in closed form."""
    table = data.crossovers
    title = "From which context fast weights need less than a KV cache"
    caption = "Simulated crossovers (filled) beside the closed forms (hollow); crossovers.csv explains the differences."
    shown = merged_crossings(data)
    shown = shown[shown["simulated_tokens"].notna() | shown["closed_form_tokens"].notna()]
    figure = new_figure(
        data, title, "left of a mark the baseline needs less, right of it the method", width=11,
        height=2.0 + 0.25 * max(len(shown), 6),
    )  # fmt: skip
    if not len(shown):
        no_data(figure, "no methods cross in the simulated range")
        return Drawn(figure, table, title, caption)
    ax = figure.subplots()
    both = np.concatenate([numbers(shown, "simulated_tokens"), numbers(shown, "closed_form_tokens")])
    both = both[np.isfinite(both) & (both > 0)]
    for i, row in enumerate(shown.to_dict("records")):
        color = method_style(data, str(row["method"])).color
        simulated, closed = float(row["simulated_tokens"]), float(row["closed_form_tokens"])
        if math.isfinite(simulated) and math.isfinite(closed):
            ax.plot([simulated, closed], [i, i], color=color, lw=1.2, alpha=0.6)
        if math.isfinite(closed):
            ax.plot([closed], [i], marker="D", markersize=8.5, markerfacecolor="none", markeredgecolor=color, lw=0)
        if math.isfinite(simulated):
            ax.plot([simulated], [i], marker="o", markersize=5.5, color=color, lw=0)
        known = f"{simulated:,.0f}" if math.isfinite(simulated) else no_crossing(row)
        ax.annotate(
            known, (float(np.nanmax([simulated, closed])), i), xytext=(10, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    context_axis(ax, doublings(both))
    ax.set_yticks(range(len(shown)), [str(label) for label in shown["label"]])
    for label, method in zip(ax.get_yticklabels(), shown["method"], strict=True):
        label.set_color(method_style(data, str(method)).color)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    pairs = shown[["method", "baseline"]].drop_duplicates().to_dict("records")
    handles: list[Line2D | Patch] = [
        Patch(
            facecolor=method_style(data, str(pair["method"])).color,
            label=f"{method_title(data, str(pair['method']))} against {method_title(data, str(pair['baseline']))}",
        )
        for pair in pairs
    ]
    handles.append(Line2D([], [], lw=0, marker="o", color=MUTED, label="simulated"))
    handles.append(
        Line2D(
            [], [], lw=0, marker="D", markersize=7.5, markerfacecolor="none", markeredgecolor=MUTED, label="closed form"
        )
    )
    top_legend(figure, handles)
    return Drawn(figure, table, title, caption)
