"""The figure on what number formats do to a fast weight over a long stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from ttt_sim.drift import STORAGES, Drift
from ttt_sim.report.data import tokens_label
from ttt_sim.report.style import MUTED, Drawn, context_axis, framed_figure, log_axis, top_legend


class FormatStyle(NamedTuple):
    color: str
    dash: Any


#: A colour per format, dashed where rounding is stochastic. Dashes of several lengths keep lines on top of each other
#: apart: several formats lose everything in the same way.
FORMAT_STYLES: Mapping[str, FormatStyle] = {
    "fp32": FormatStyle("#000000", "-"),
    "fp32_master": FormatStyle("#009E73", (0, (7, 3))),
    "bf16": FormatStyle("#0072B2", "-"),
    "bf16_stochastic": FormatStyle("#56B4E9", (0, (2, 1.2))),
    "fp16": FormatStyle("#CC79A7", (0, (4, 4))),
    "fp8_e4m3": FormatStyle("#D55E00", (0, (9, 5))),
    "fp8_e4m3_stochastic": FormatStyle("#E69F00", (0, (2, 1.2))),
    "fp8_e5m2": FormatStyle("#882255", (0, (1, 2.5))),
}
_EXACT = "#C4C9CE"


class _Panel(NamedTuple):
    """A row of the figure: the column that it shows, over ``start_norm`` if ``relative``; ``share``: 0 to 100 %."""

    column: str
    title: str
    label: str
    relative: bool = False
    share: bool = False


_PANELS = (
    _Panel("distance", "Growth of the change", "‖W − W₀‖ / ‖W₀‖", relative=True),
    _Panel("change_error", "Error of the change", "‖W − exact‖ / ‖exact − W₀‖"),
    _Panel("output_error", "Error of the output", "‖Z W$^T$ − exact‖ / ‖exact‖"),
    _Panel("swamped_frac", "Updates that are swamped", "elements of a chunk's delta", share=True),
)


def clip_title(drift: Drift, clip: float | None) -> str:
    """``no clip``, or the norm and the size per element that it leaves."""
    if clip is None:
        return "no clip"
    per_element = clip / math.sqrt(drift.settings.width * drift.settings.ff)
    return f"clip {clip:.3g} ({per_element:.2g} per element)"


def rows_of(drift: Drift, name: str, clip: float | None) -> pd.DataFrame:
    """The rows of one format under one clip."""
    frame = drift.frame
    return frame[(frame["format"] == name) & (frame["clip"].isna() if clip is None else frame["clip"] == clip)]


def context_of(drift: Drift) -> str:
    """The layer and the stream in a line."""
    s = drift.settings
    return (
        f"W is {s.width} x {s.ff}  ·  {tokens_label(s.n_chunks * s.chunk)} tokens in {s.n_chunks:,} chunks of "
        f"{s.chunk:,}  ·  rate {s.rate:g}  ·  random inputs, seed {s.seed}"
    )


def drift_figure(drift: Drift) -> Drawn:
    """Growth, errors and swamped updates against tokens; a column of panels for each clip, a line for each format."""
    settings = drift.settings
    title = "What number formats do to a fast weight over a long stream"
    caption = (
        "From the top: how far the weight has moved, how wrong that change is, how wrong the outputs are, and which "
        "share of the element updates left the stored weight where it was. Exact is the sum of the same deltas in "
        "float64."
    )
    figure = framed_figure(
        title, context_of(drift), width=max(5.5 * len(settings.clips), 7), height=1.9 + 2.35 * len(_PANELS),
        notes=[
            "Exact: the sum of the same deltas in float64. W₀ in the change of a format is W₀ rounded to it; outputs "
            "include that rounding, which is what fp8 starts with.",
            "Swamped: the delta is not zero, the stored weight stays as it was; by chance and right on average where "
            "rounding is stochastic. An fp32 master is applied through a bf16 copy: the errors are those of the copy, "
            "the swamped updates those of the master.",
            "Random inputs stand for real ones in size only: read how formats differ, not how fast a trained model "
            "drifts.",
        ],
    )  # fmt: skip
    handles: list[Line2D | Patch] = [Line2D([], [], color=_EXACT, linewidth=5, label="exact")]
    for name in settings.formats:
        style = FORMAT_STYLES[name]
        handles.append(Line2D([], [], color=style.color, linestyle=style.dash, label=STORAGES[name].title))
    if (drift.frame["ended"] != "").any():
        handles.append(Line2D([], [], color=MUTED, marker="X", linestyle="none", label="leaves its format"))
    top_legend(figure, handles)
    axes = figure.subplots(len(_PANELS), len(settings.clips), squeeze=False)
    for column, clip in enumerate(settings.clips):
        for row, panel in enumerate(_PANELS):
            ax = axes[row, column]
            _draw(ax, drift, clip, panel)
            heading = clip_title(drift, clip)
            ax.set_title(f"{heading[0].upper()}{heading[1:]}\n{panel.title}" if row == 0 else panel.title)
            if row < len(_PANELS) - 1:
                ax.set_xlabel("")
    return Drawn(figure, drift.frame, title, caption)


def _draw(ax: Axes, drift: Drift, clip: float | None, panel: _Panel) -> None:
    settings = drift.settings
    unit = drift.start_norm if panel.relative else 1.0
    _token_axis(ax, settings.chunk, settings.n_chunks)
    ax.set_ylabel(panel.label)
    drawn: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    if panel.relative:
        exact = max((rows_of(drift, name, clip) for name in settings.formats), key=len)
        values = exact["exact_distance"].to_numpy(dtype=np.float64) / unit
        ax.plot(exact["tokens"], values, color=_EXACT, linewidth=5, solid_capstyle="round", zorder=1.5)
        drawn.append(values)
    at_zero = []
    for name in settings.formats:
        rows = rows_of(drift, name, clip)
        ended = bool((rows["ended"] != "").any())
        rows = rows[rows["ended"] == ""]
        values = rows[panel.column].to_numpy(dtype=np.float64) / unit
        if not panel.share:
            if values.size and not values.any():
                at_zero.append(STORAGES[name].title)
            values = np.where(values > 0, values, np.nan)
        style = FORMAT_STYLES[name]
        marker = "o" if len(rows) == 1 else ""
        ax.plot(rows["tokens"], values, color=style.color, linestyle=style.dash, marker=marker, zorder=3)
        if ended and len(rows):
            ax.plot(rows["tokens"].iloc[-1], values[-1], color=style.color, marker="X", markersize=8, zorder=4)
        drawn.append(values)
    if panel.share:
        ax.set_ylim(-0.04, 1.04)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        return
    log_axis(ax, np.concatenate(drawn))
    if at_zero:
        _say_zero(ax, at_zero)


def _token_axis(ax: Axes, chunk: int, n_chunks: int) -> None:
    ticks = [chunk << e for e in range(n_chunks.bit_length())]
    context_axis(ax, ticks, label="tokens of the stream")
    ax.set_xlim(chunk / 1.15, n_chunks * chunk * 1.15)


def _say_zero(ax: Axes, titles: Sequence[str]) -> None:
    """Lines that a logarithmic axis cannot show."""
    ax.text(
        0.98, 0.03, "never moves: " + ", ".join(titles), transform=ax.transAxes, ha="right", va="bottom", fontsize=7.5,
        color=MUTED,
    )  # fmt: skip
