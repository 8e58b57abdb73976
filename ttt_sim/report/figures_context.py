"""Figures against the context length: state, time, energy and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ttt_sim.report.data import FloatArray, ReportData, fitting, numbers, select
from ttt_sim.report.names import MethodStyle, method_style, method_title
from ttt_sim.report.style import (
    INK,
    MUTED,
    Drawn,
    Strip,
    context_axis,
    does_not_fit_handle,
    doublings,
    draw_strips,
    log_axis,
    method_handles,
    new_figure,
    no_data,
    scale_for,
    top_legend,
)
from ttt_sim.units import format_bytes

_MIB = 1 << 20


def _crossing_rows(data: ReportData, quantity: str, batch: int | None = None) -> pd.DataFrame:
    rows = select(data.crossovers, quantity=quantity)
    rows = rows[rows["simulated_tokens"].notna() & rows["method"].isin(data.with_fast_weights)]
    return rows if batch is None else rows[numbers(rows, "batch") == batch]


def _mark_crossings(ax: Axes, rows: pd.DataFrame, curve: Callable[[str], tuple[FloatArray, FloatArray]]) -> bool:
    """Circles where a method with fast weights crosses its baseline, labelled with the context. True if any."""
    low, high = ax.get_xlim()
    bottom, top = ax.get_ylim()
    marked: list[float] = []
    for row in rows.to_dict("records"):
        tokens, (xs, ys) = float(row["simulated_tokens"]), curve(str(row["baseline"]))
        if not (low <= tokens <= high) or xs.size < 2:
            continue
        y = float(np.interp(tokens, xs, ys))
        if not math.isfinite(y):
            continue
        near = sum(abs(math.log(tokens / other)) < 0.35 for other in marked)
        marked.append(tokens)
        ax.plot([tokens], [y], marker="o", markersize=8.5, markerfacecolor="white", markeredgecolor=INK, zorder=5, lw=0)
        beneath = math.log(y / bottom) / math.log(top / bottom) > 0.2
        ax.annotate(
            f"{tokens:,.0f}", (tokens, y), xytext=(7, -11 - 10 * near) if beneath else (-2, 9 + 10 * near),
            textcoords="offset points", fontsize=8, fontweight="bold", color=INK, zorder=6,
            ha="left" if beneath else "right",
        )  # fmt: skip
    return bool(marked)


def _crossing_handle(label: str) -> Line2D:
    return Line2D([], [], lw=0, marker="o", markersize=8, markerfacecolor="white", markeredgecolor=INK, label=label)


# --- state ------------------------------------------------------------------------------------------------------------


def state_memory(data: ReportData) -> Drawn:
    """State per sequence and the sequences that fit, against context."""
    table = data.state.copy()
    notes = []
    if data.weight_bytes is not None:
        # chips that share a context have the same weights, chips that share a layer the same open chunk
        system = data.parallel
        capacity, weights = system.chips * data.machine.capacity_bytes, system.cp * data.weight_bytes
        copies = (system.cp - 1) * numbers(table, "fast_weight_bytes")
        copies = copies + (system.tp * system.cp - 1) * numbers(table, "carry_bytes")
        held = np.maximum(numbers(table, "total_bytes") + copies, 1)
        table["sequences_that_fit"] = np.floor(max(capacity - weights, 0) / held)
        spread = "" if system.chips == 1 else f" of {system.chips} chips, spread evenly"
        notes.append(
            f"Right: sequences whose state fits beside the weights ({format_bytes(weights)}) in "
            f"{format_bytes(capacity)} of {data.machine.memory_name}{spread}; activations left out."
        )
    crossings = _crossing_rows(data, "state memory")
    title = f"State that a sequence keeps on the {data.chips_noun}"
    best = select(crossings, method="ttt_window", baseline="kv")
    if len(best):
        tokens = float(best["simulated_tokens"].iloc[0])
        title = f"TTT with a window keeps less state than a KV cache beyond {tokens:,.0f} tokens"
    figure = new_figure(
        data, title, "state per sequence, carry of the open chunk at its largest", width=11 if notes else 7.4,
        height=4.9, notes=notes,
    )  # fmt: skip
    caption = (
        "Bytes of state per sequence against context (KV cache, fast weights, carry), crossovers marked, and how many "
        "sequences fit beside the weights."
    )
    if not len(table):
        no_data(figure, "state against context")
        return Drawn(figure, table, title, caption)
    axes = figure.subplots(1, 1 + len(notes), squeeze=False)
    left = axes[0, 0]
    contexts = doublings(numbers(table, "context_tokens"))
    for method in data.methods:
        rows = select(table, method=method).sort_values("context_tokens")
        style = method_style(data, method)
        left.plot(
            numbers(rows, "context_tokens"), numbers(rows, "total_bytes") / _MIB, color=style.color, ls=style.dash, lw=2
        )
    total = numbers(table, "total_bytes") / _MIB
    context_axis(left, contexts)
    log_axis(left, total)
    _binary_bytes_axis(left)
    left.set_title("state per sequence")

    def curve(method: str) -> tuple[FloatArray, FloatArray]:
        rows = select(table, method=method).sort_values("context_tokens")
        return numbers(rows, "context_tokens"), numbers(rows, "total_bytes") / _MIB

    marked = _mark_crossings(left, crossings, curve)
    if notes:
        _sequences_panel(axes[0, 1], data, table, contexts)
    handles = [Line2D([], [], color=h.color, ls=h.dash, lw=2, label=h.title) for h in _styles(data)]
    top_legend(figure, handles + ([_crossing_handle("equal state (tokens)")] if marked else []))
    return Drawn(figure, table, title, caption)


def _sequences_panel(ax: Axes, data: ReportData, table: pd.DataFrame, contexts: Sequence[int]) -> None:
    for method in data.methods:
        rows = select(table, method=method).sort_values("context_tokens")
        style = method_style(data, method)
        fit = numbers(rows, "sequences_that_fit")
        ax.plot(
            numbers(rows, "context_tokens"), np.where(fit >= 1, fit, np.nan), color=style.color, ls=style.dash, lw=2
        )
    context_axis(ax, contexts)
    log_axis(ax, np.maximum(numbers(table, "sequences_that_fit"), 1))
    ax.set_title("sequences that fit at once")
    ax.set_ylabel("sequences")


def _styles(data: ReportData) -> list[MethodStyle]:
    return [method_style(data, m) for m in data.methods]


def _binary_bytes_axis(ax: Axes) -> None:
    """Ticks of MiB values at powers of four."""
    low, high = ax.get_ylim()
    step = 2 if math.log2(high / low) > 7 else 1
    first = math.ceil(math.log2(low) / step) * step
    ticks = [2.0**e for e in range(first, math.floor(math.log2(high)) + 1, step)]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value * _MIB)))


# --- time, energy, cost -----------------------------------------------------------------------------------------------


def _panels(
    data: ReportData, *, phase: str, column: str, unit: str, ylabel: str, title: str, subtitle: str, caption: str,
    quantity: str | None, per: str = "", marker_column: str | None = None, notes: Sequence[str] = (),
) -> Drawn:  # fmt: skip
    """Small multiples by batch of ``column`` against context, not-fitting points as hatched strips."""
    columns = ["method", "phase", "context_tokens", "batch", "fits", "chips_needed", column]
    if marker_column is not None:
        columns.append(marker_column)
    table = select(data.points, phase=phase)[columns].sort_values(["batch", "method", "context_tokens"])
    batches = data.batches(phase)
    across = min(max(len(batches), 1), 4)
    down = math.ceil(max(len(batches), 1) / across)
    figure = new_figure(
        data, title, subtitle, width=11 if across > 1 else 7.4, height=1.75 + 3.1 * down, notes=notes
    )  # fmt: skip
    if not len(table):
        no_data(figure, f"no {phase} point was simulated")
        return Drawn(figure, table, title, caption)
    values = [numbers(fitting(table), column)]
    if marker_column is not None:
        values.append(numbers(fitting(table), marker_column))
    everything = np.concatenate(values)
    scale = scale_for(everything, unit)
    strips = {batch: _strips(data, select(table, batch=batch)) for batch in batches}
    most = max(len(rows) for rows in strips.values())
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    contexts = data.contexts(phase)
    marked = False
    for ax in axes.flat[len(batches) :]:
        ax.set_visible(False)
    for i, batch in enumerate(batches):
        ax = axes.flat[i]
        panel = select(table, batch=batch)
        for method in data.methods:
            rows = fitting(select(panel, method=method))
            style = method_style(data, method)
            x = numbers(rows, "context_tokens")
            ax.plot(
                x, numbers(rows, column) / scale.size, color=style.color, ls=style.dash, marker=style.marker,
                markeredgecolor="white", markeredgewidth=0.6, markersize=5.5,
            )  # fmt: skip
            if marker_column is not None:
                ax.plot(
                    x, numbers(rows, marker_column) / scale.size, color=style.color, lw=0, marker=style.marker,
                    markerfacecolor="white", markeredgewidth=1.2, markersize=5.5,
                )  # fmt: skip
        context_axis(ax, contexts, most_labels=9 if across < 3 else 5)
        log_axis(ax, everything / scale.size, strips=most)
        draw_strips(ax, data, strips[batch], contexts)
        if quantity is not None:

            def curve(method: str, panel: pd.DataFrame = panel) -> tuple[FloatArray, FloatArray]:
                rows = fitting(select(panel, method=method))
                return numbers(rows, "context_tokens"), numbers(rows, column) / scale.size

            marked |= _mark_crossings(ax, _crossing_rows(data, quantity, batch), curve)
        ax.set_title(f"batch {batch}")
        if i % across == 0:
            ax.set_ylabel(f"{ylabel} ({scale.unit}{per})")
    handles = method_handles(data, data.methods)
    if marker_column is not None and np.isfinite(values[1]).any():
        handles.append(
            Line2D(
                [],
                [],
                lw=0,
                marker="o",
                markerfacecolor="white",
                markeredgecolor=MUTED,
                label="step that completes a chunk",
            )
        )
    if marked:
        handles.append(_crossing_handle("crossover (tokens)"))
    if most:
        handles.append(does_not_fit_handle(data))
    top_legend(figure, handles)
    return Drawn(figure, table, title, caption)


def _strips(data: ReportData, panel: pd.DataFrame) -> list[Strip]:
    out = []
    for method in data.methods:
        rows = select(panel, method=method, fits=False).sort_values("context_tokens")
        if len(rows):
            chips = [int(c) for c in np.nan_to_num(numbers(rows, "chips_needed"), nan=1)]
            out.append(Strip(method, tuple(int(t) for t in rows["context_tokens"]), tuple(chips)))
    return out


def _overtakes(data: ReportData, quantity: str, phase: str, verb: str) -> str | None:
    """A title that states the crossover of a quantity at the headline batch; None where there is none."""
    at = data.headlines.get(phase)
    rows = _crossing_rows(data, quantity, at.batch) if at is not None else data.crossovers.iloc[:0]
    if at is None or not len(rows):
        return None
    row = rows.iloc[-1]
    method, baseline = method_title(data, str(row["method"])), method_title(data, str(row["baseline"]))
    tokens = f"{float(row['simulated_tokens']):,.0f} tokens (batch {at.batch})"
    return f"{phase.capitalize()}: {method} {verb} than the {baseline} beyond {tokens}"


def prefill_time(data: ReportData) -> Drawn:
    """Prefill time per token against context."""
    return _panels(
        data, phase="prefill", column="seconds_per_token", unit="s", per=" per token", ylabel="prefill time",
        title=_overtakes(data, "prefill time", "prefill", "is faster") or "Prefill: time per token of the prompt",
        subtitle="time per prompt token of one sequence, whole prompt, all sequences of the batch together",
        caption="Time of the whole prefill divided by its tokens, by batch.", quantity="prefill time",
    )  # fmt: skip


def decode_time(data: ReportData) -> Drawn:
    """Decode step time against context."""
    return _panels(
        data, phase="decode", column="seconds", unit="s", per=" per step", ylabel="decode time",
        title=_overtakes(data, "decode time", "decode", "is faster") or "Decode: time per output token",
        subtitle="one step gives every sequence of the batch one token; mean over a whole chunk",
        caption="Mean time of a decode step over a whole chunk, by batch; hollow: the step that completes a chunk.",
        quantity="decode time", marker_column="boundary_step_seconds",
    )  # fmt: skip


def decode_energy(data: ReportData) -> Drawn:
    """Decode energy per token against context."""
    return _panels(
        data, phase="decode", column="energy_j_per_token", unit="J", per=" per token", ylabel="energy",
        title=_overtakes(data, "decode energy", "decode", "needs less energy") or "Decode: energy per output token",
        subtitle="energy per output token, idle and dynamic, mean over a whole chunk",
        caption="Energy per decoded token: idle power over the step, plus the dynamic energy of bytes and operations.",
        quantity="decode energy",
    )  # fmt: skip


def decode_cost(data: ReportData) -> Drawn:
    """Cost per million decoded tokens against context."""
    return _panels(
        data, phase="decode", column="cost_usd_per_million_tokens", unit="USD", ylabel="cost per million output tokens",
        title=f"Cost of output tokens at the {data.chips_noun}'{'s' if data.parallel.chips == 1 else ''} hourly price",
        subtitle=f"decode, {data.chips_noun} fully used by this batch",
        caption=f"Hourly price of the {data.chips_noun} times the time per token.", quantity=None,
    )  # fmt: skip
