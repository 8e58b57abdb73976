"""Figures of a served stream: percentiles of every duration, and a stretch of steps with their jitter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ttt_sim.report.data import QUALITY_CAVEAT
from ttt_sim.report.names import MethodStyle, style_of_method
from ttt_sim.report.style import MUTED, Drawn, framed_figure, in_prefix, log_axis, scale_for, top_legend
from ttt_sim.serving.records import PERCENTILES
from ttt_sim.serving.serve import Run

#: Titles of the durations of a record.
DURATION_TITLES: Mapping[str, str] = {
    "first_token": "time to first token",
    "between_tokens": "time between tokens",
    "decode_step": "decode step",
    "latency": "whole request",
}
_MARKERS: Mapping[str, str] = {"median": "o", "p99": "D", "worst": "X"}
_PREFILL, _SWAP = "#9AA3AA", "#CC79A7"
#: Median decode steps of the slowest method that a stretch has.
_STRETCH_STEPS = 300


def served(run: Run) -> list[str]:
    """Methods that fit."""
    return [str(row["method"]) for row in run.records.to_dict("records") if row["fits"]]


def style_of(run: Run, method: str) -> MethodStyle:
    """Look of a method; its window is part of the title."""
    return style_of_method(method, run.settings.methods, run.settings.settings(method).kv.window_tokens)


def mixes_quality(run: Run) -> bool:
    """Windowed and full attention stand side by side."""
    return len({run.settings.settings(method).kv.window_tokens is not None for method in served(run)}) > 1


def context_line(run: Run) -> str:
    """The model, the system and the stream in one line."""
    s, requests = run.settings, run.stream
    chips = int(run.records["chips"].max())
    system = s.chip.title if chips == 1 else f"{chips} x {s.chip.title}"
    rate = run.offered_per_s
    came = "at once" if rate is None else f"at {rate:.3g}/s"
    prompts = sum(request.prompt_tokens for request in requests) / len(requests)
    outputs = sum(request.output_tokens for request in requests) / len(requests)
    return (
        f"{s.model.name} on {system}  ·  {len(requests):,} requests {came}  ·  mean prompt {prompts:,.0f}, "
        f"output {outputs:,.0f} tokens"
    )


def _notes(run: Run, *notes: str) -> list[str]:
    return [*notes, *([QUALITY_CAVEAT] if mixes_quality(run) else [])]


# --- percentiles ------------------------------------------------------------------------------------------------------


def latency(run: Run) -> Drawn:
    """Median, 99th percentile and worst of every duration, a row for each method."""
    title = "Latencies of served requests"
    caption = (
        "Median, 99th percentile and worst case. Time between tokens is what a reader of a stream sees: a decode step, "
        "and what comes between two steps, which is mostly prompts of others. Decode steps alone show the jitter of "
        "chunk boundaries."
    )
    methods = served(run)
    height = 1.5 + len(DURATION_TITLES) * (0.62 + 0.27 * len(methods))
    figure = framed_figure(
        title, context_line(run), width=8.6, height=height,
        notes=_notes(run, "Percentiles are nearest ranks. The worst case of a longer stream is worse."),
    )  # fmt: skip
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=MUTED, marker=marker, linestyle="none", label=name) for name, marker in _MARKERS.items()
    ]
    top_legend(figure, handles)
    rows: list[dict[str, object]] = []
    axes = figure.subplots(len(DURATION_TITLES), 1, squeeze=False)[:, 0]
    for ax, (name, heading) in zip(axes, DURATION_TITLES.items(), strict=True):
        for y, method in enumerate(methods):
            record = run.record(method)
            values = [record[f"{name}_{percentile}_seconds"] for percentile in PERCENTILES]
            if pd.isna(values[0]):
                continue
            rows += [
                {"method": method, "duration": name, "percentile": percentile, "seconds": value}
                for percentile, value in zip(PERCENTILES, values, strict=True)
            ]
            _percentile_row(ax, y, np.array(values, dtype=np.float64), style_of(run, method).color)
        ax.set_title(heading[0].upper() + heading[1:])
        _method_axis(ax, run, methods)
    table = pd.DataFrame(rows, columns=["method", "duration", "percentile", "seconds"])
    for ax, name in zip(axes, DURATION_TITLES, strict=True):
        _time_axis(ax, table[table["duration"] == name]["seconds"].to_numpy(dtype=np.float64))
    return Drawn(figure, table, title, caption)


def _percentile_row(ax: Axes, y: int, values: np.ndarray[tuple[int], np.dtype[np.float64]], color: str) -> None:
    ax.plot([values[0], values[-1]], [y, y], color=color, linewidth=2.2, alpha=0.45, solid_capstyle="round")
    for value, marker in zip(values, _MARKERS.values(), strict=True):
        ax.plot(value, y, color=color, marker=marker, markersize=6, linestyle="none")
    ax.annotate(
        "  /  ".join(in_prefix(float(value), "s") for value in values), (1.0, y), xycoords=("axes fraction", "data"),
        ha="left", va="center", fontsize=7.5, color=color, xytext=(6, 0), textcoords="offset points",
    )  # fmt: skip


def _method_axis(ax: Axes, run: Run, methods: list[str]) -> None:
    styles = [style_of(run, method) for method in methods]
    ax.set_yticks(range(len(methods)), [style.title for style in styles])
    for label, style in zip(ax.get_yticklabels(), styles, strict=True):
        label.set_color(style.color)
        label.set_fontweight("bold")
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def _time_axis(ax: Axes, seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    usable = seconds[seconds > 0]
    if not usable.size:
        return
    low, high = float(usable.min()), float(usable.max())
    ax.set_xscale("log")
    ax.set_xlim(low / 1.3, max(high, 2 * low) * 1.3)
    ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(seconds: float) -> str:
    scale = scale_for(np.array([seconds]), "s")
    return f"{seconds / scale.size:.3g} {scale.unit}"


# --- a stretch of steps -----------------------------------------------------------------------------------------------


class _Stretch(NamedTuple):
    start_s: float
    end_s: float


def _stretch(run: Run) -> _Stretch:
    """A stretch of the middle of the stream, around a chunk boundary where there is one."""
    steps = run.steps
    ends = steps["start_s"] + steps["seconds"]
    begin = float(steps["start_s"].min())
    middle = (begin + float(ends.groupby(steps["method"]).max().min())) / 2
    completing = steps[steps["completing"] > 0]["start_s"].to_numpy(dtype=np.float64)
    if completing.size:
        middle = float(completing[np.argmin(np.abs(completing - middle))])
    decodes = steps[steps["kind"] == "decode"]
    typical = decodes.groupby("method")["seconds"].median().max() if len(decodes) else steps["seconds"].median()
    half = _STRETCH_STEPS * float(typical) / 2
    return _Stretch(max(middle - half, begin), middle + half)


def timeline(run: Run) -> Drawn:
    """Every step of a stretch of the stream: its time, and how many sequences were under way."""
    title = "Steps of the server, one by one"
    caption = (
        "Below: sequences in each decode step. Above, for each method: the time of every step. In decode steps with a "
        "diamond a sequence completes a chunk and has its weights updated; prompts and swaps hold all others up."
    )
    methods = served(run)
    stretch = _stretch(run)
    steps = run.steps
    table = steps[(steps["start_s"] >= stretch.start_s) & (steps["start_s"] <= stretch.end_s)]
    figure = framed_figure(
        title, context_line(run), width=8.6, height=1.7 + 1.75 * len(methods) + 1.6, notes=_notes(run)
    )  # fmt: skip
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=MUTED, marker=".", linestyle="none", label="decode step"),
        Line2D([], [], color=MUTED, marker="D", linestyle="none", label="completes a chunk"),
        Line2D([], [], color=_PREFILL, marker="_", markersize=8, linestyle="none", label="prefill call"),
    ]
    if table["kind"].str.startswith("swap").any():
        handles.append(Line2D([], [], color=_SWAP, marker="x", linestyle="none", label="swap"))
    top_legend(figure, handles)
    axes = figure.subplots(len(methods) + 1, 1, squeeze=False)[:, 0]
    scale = scale_for(table["seconds"].to_numpy(dtype=np.float64), "s")
    for ax, method in zip(axes, methods, strict=False):
        own, style = table[table["method"] == method], style_of(run, method)
        at, took = own["start_s"] - stretch.start_s, own["seconds"] / scale.size
        decode, completes = own["kind"] == "decode", own["completing"] > 0
        for chosen, color, marker, size in (
            (own["kind"] == "prefill", _PREFILL, "_", 8.0),
            (own["kind"].str.startswith("swap"), _SWAP, "x", 5.0),
            (decode & ~completes, style.color, ".", 3.5),
            (decode & completes, "#B2182B", "D", 4.5),
        ):
            ax.plot(at[chosen], took[chosen], color=color, marker=marker, markersize=size, linestyle="none")
        log_axis(ax, (table["seconds"] / scale.size).to_numpy(dtype=np.float64))
        ax.set_ylabel(f"step ({scale.unit})")
        ax.set_title(style.title, color=style.color)
        _stretch_axis(ax, stretch)
    for method in methods:
        own = table[(table["method"] == method) & (table["kind"] == "decode")]
        style = style_of(run, method)
        axes[-1].step(own["start_s"] - stretch.start_s, own["batch"], where="post", color=style.color, linewidth=1.4)
    axes[-1].set_ylim(bottom=0)
    axes[-1].yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[-1].set_ylabel("sequences")
    axes[-1].set_title("Sequences in a decode step")
    _stretch_axis(axes[-1], stretch)
    axes[-1].set_xlabel(f"seconds, from {stretch.start_s:.4g} s of the stream on")
    return Drawn(figure, table, title, caption)


def _stretch_axis(ax: Axes, stretch: _Stretch) -> None:
    ax.set_xlim(0, stretch.end_s - stretch.start_s)
    ax.xaxis.set_major_locator(MaxNLocator(8))


#: Name -> figure, in the order in which the page shows them.
FIGURES: Mapping[str, Callable[[Run], Drawn]] = {"latency": latency, "timeline": timeline}
