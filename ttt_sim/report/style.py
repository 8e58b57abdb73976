"""How figures look: colours, labels, axes, header and footer. One colour per method in every figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import LayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ttt_sim.report.data import FloatArray, ReportData, tokens_label
from ttt_sim.report.names import method_style, three_digits

INK, MUTED, GRID, PAPER = "#1F2328", "#667078", "#E4E7EA", "#FFFFFF"

#: Settings that every figure is drawn and saved under. The salt makes SVG ids the same in every run.
RC: Mapping[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9.0, "text.color": INK, "axes.edgecolor": "#9AA3AA",
    "axes.labelcolor": INK, "axes.labelsize": 9.0, "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": "#9AA3AA", "ytick.color": "#9AA3AA",
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 8.0, "ytick.labelsize": 8.0,
    "xtick.major.size": 3.0, "ytick.major.size": 3.0, "legend.frameon": False, "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6, "lines.linewidth": 1.8, "lines.markersize": 5.0, "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER, "svg.hashsalt": "ttt_sim", "svg.fonttype": "path", "mathtext.default": "regular",
}  # fmt: skip


class Drawn(NamedTuple):
    """A figure, the tidy table behind it, and what it shows in words."""

    figure: Figure
    table: pd.DataFrame
    title: str
    caption: str


# --- header, footer, legend -------------------------------------------------------------------------------------------


def new_figure(
    data: ReportData, title: str, subtitle: str, *, width: float, height: float, notes: Iterable[str] = (),
    caveat: bool = True,
) -> Figure:  # fmt: skip
    """An empty figure of ``width`` x ``height`` inches with header and footer; legend and axes go between them.

    ``caveat``: add the note on quality where the report mixes windowed and full attention.
    """
    notes = [*notes, data.quality_caveat] if caveat and data.mixes_quality else list(notes)
    context = f"{data.model} on {data.machine.title}" + (f"  ·  {subtitle}" if subtitle else "")
    return framed_figure(title, context, width=width, height=height, notes=notes)


def framed_figure(title: str, context: str, *, width: float, height: float, notes: Iterable[str] = ()) -> Figure:
    """An empty figure of ``width`` x ``height`` inches: ``title`` and ``context`` above, ``notes`` below."""
    lines = [line for note in notes if note for line in textwrap.wrap(note, int(width * 16.2))]
    heading = textwrap.wrap(title, int(width * 8.9))
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    top, bottom = 0.3 + 0.22 * len(heading), 0.1 + 0.145 * len(lines)
    figure.set_layout_engine(FrameLayout(top_inches=top, bottom_inches=bottom))
    x = 0.1 / width
    figure.text(x, 1 - 0.12 / height, "\n".join(heading), fontsize=13, fontweight="bold", va="top", linespacing=1.15)
    figure.text(x, 1 - (0.14 + 0.22 * len(heading)) / height, context, fontsize=9, color=MUTED, va="top")
    if lines:
        figure.text(x, 0.07 / height, "\n".join(lines), fontsize=7.3, color=MUTED, va="bottom", linespacing=1.25)
    return figure


class FrameLayout(LayoutEngine):
    """Places a grid of subplots between header and footer so that no label is cut off or covers another.

    One pass that measures every axes once; matplotlib's constrained layout solves for more than a plain grid needs and
    takes several times as long. Columns keep the relative widths and rows the relative heights of their grid.
    """

    _adjust_compatible = False
    _colorbar_gridspec = False
    gap_inches = 0.14

    def __init__(self, *, top_inches: float, bottom_inches: float) -> None:
        super().__init__()
        self.top_inches, self.bottom_inches = top_inches, bottom_inches

    def execute(self, fig: Figure) -> None:
        axes = [ax for ax in fig.axes if ax.get_subplotspec() is not None]
        if not axes:
            return
        renderer = fig.canvas.get_renderer()  # type: ignore[attr-defined]
        grid = axes[0].get_subplotspec().get_gridspec()  # type: ignore[union-attr]
        rows, columns = grid.get_geometry()
        margins = np.zeros((4, max(rows, columns)))  # left, right by column; bottom, top by row
        for ax in axes:
            spec = ax.get_subplotspec()
            box = ax.get_tightbbox(renderer) if ax.get_visible() else None
            if spec is None or box is None:
                continue
            inner = ax.get_window_extent(renderer)
            row, column = spec.rowspan.start, spec.colspan.start
            for side, at, size in (
                (0, column, inner.x0 - box.x0),
                (1, column, box.x1 - inner.x1),
                (2, row, inner.y0 - box.y0),
                (3, row, box.y1 - inner.y1),
            ):
                margins[side, at] = max(margins[side, at], size / fig.dpi)
        margins += self.gap_inches / 2
        width, height = fig.get_size_inches()
        left, right, bottom, top = margins[0, :columns], margins[1, :columns], margins[2, :rows], margins[3, :rows]
        inner_width = max(width - 0.06 - left.sum() - right.sum(), 0.2 * columns)
        inner_height = max(height - self.top_inches - self.bottom_inches - bottom.sum() - top.sum(), 0.2 * rows)
        widths = inner_width * _shares(grid.get_width_ratios(), columns)
        heights = inner_height * _shares(grid.get_height_ratios(), rows)
        for ax in axes:
            spec = ax.get_subplotspec()
            if spec is None:
                continue
            row, column = spec.rowspan.start, spec.colspan.start
            x = 0.03 + left[: column + 1].sum() + right[:column].sum() + widths[:column].sum()
            y = height - self.top_inches - top[: row + 1].sum() - bottom[:row].sum() - heights[: row + 1].sum()
            ax.set_position((x / width, y / height, widths[column] / width, heights[row] / height))


def _shares(ratios: Any, n: int) -> FloatArray:
    """Relative sizes as shares of one; equal where none are given."""
    sizes = np.ones(n) if ratios is None else np.asarray(ratios, dtype=np.float64)
    return sizes / float(sizes.sum())


def no_data(figure: Figure, what: str) -> None:
    """Say in the figure that there is nothing to draw."""
    ax = figure.subplots()
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"no data: {what}", ha="center", va="center", fontsize=12, color=MUTED, transform=ax.transAxes)


def top_legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """A legend between header and axes, where it covers nothing, in as few rows as fit the figure."""
    layout = figure.get_layout_engine()
    if not handles or not isinstance(layout, FrameLayout):
        return
    width, height = figure.get_size_inches()
    lengths = [len(str(handle.get_label())) for handle in handles]
    columns = len(handles)
    while columns > 1 and sum(0.5 + 0.068 * max(lengths[c::columns]) for c in range(columns)) > width - 0.2:
        columns -= 1
    rows = math.ceil(len(handles) / columns)
    columns = math.ceil(len(handles) / rows)
    # Legends fill column after column; ours reads row after row.
    by_column = [handle for start in range(columns) for handle in handles[start::columns]]
    figure.legend(
        handles=by_column, loc="upper left", ncols=columns,
        bbox_to_anchor=(0.04 / width, 1 - layout.top_inches / height), columnspacing=1.6, handlelength=2.0,
        handletextpad=0.6, borderaxespad=0.0, borderpad=0.3, labelspacing=0.45,
    )  # fmt: skip
    layout.top_inches += 0.06 + 0.185 * rows


class Label(NamedTuple):
    """Text that belongs to a point, given in fractions of the axes."""

    x: float
    y: float
    text: str
    color: str


def place_labels(ax: Axes, labels: Sequence[Label], obstacles: Iterable[tuple[float, float]], *, leaders: bool) -> None:
    """Write labels near their points where they cover neither each other nor an obstacle; one without room is left out.

    ``obstacles``: points in fractions of the axes that stay free. Sizes are those of 7.5 pt text in a panel that takes
    half the width of a figure.
    """
    taken = [(x - 0.008, y - 0.014, x + 0.008, y + 0.014) for x, y in obstacles]
    for x, y, text, color in labels:
        width, height = 0.0128 * len(text), 0.034
        right, left, middle = 0.022, -0.022 - width, -width / 2
        spots = [
            (right, -height / 2),
            (left, -height / 2),
            (right, -0.055),
            (left, 0.022),
            (middle, 0.03),
            (middle, -0.065),
        ]
        spots += [(side, dy) for dy in (-0.1, -0.16, -0.22, -0.28, 0.08, -0.34) for side in (right, left)]
        for dx, dy in spots:
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            inside = box[0] > 0.01 and box[2] < 0.995 and box[1] > 0.01 and box[3] < 0.97
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                taken.append(box)
                side = {right: "left", left: "right"}.get(dx, "center")
                anchor = {"left": box[0], "right": box[2], "center": x}[side]
                style = {"fontsize": 7.5, "color": color, "ha": side, "va": "bottom"}
                ax.text(anchor, box[1], text, style, transform=ax.transAxes, zorder=5)
                if leaders and abs(dy + height / 2) > 0.03:
                    ends = [x, anchor], [y, box[1] + height / 2]
                    ax.plot(*ends, transform=ax.transAxes, color=MUTED, lw=0.5, zorder=2.5)
                break


def log_fraction(values: FloatArray, limits: tuple[float, float]) -> FloatArray:
    """Where values stand on a logarithmic axis, 0 at its start and 1 at its end."""
    return np.asarray(np.log(values / limits[0]) / math.log(limits[1] / limits[0]), dtype=np.float64)


def method_handles(data: ReportData, methods: Iterable[str]) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = []
    for method in methods:
        style = method_style(data, method)
        handles.append(
            Line2D(
                [], [], color=style.color, marker=style.marker, linestyle=style.dash, label=style.title, markersize=5
            )
        )
    return handles


def does_not_fit_handle(data: ReportData) -> Patch:
    chips = data.parallel.chips
    label = f"does not fit {'one chip' if chips == 1 else f'{chips} chips'}"
    return Patch(facecolor="none", edgecolor=MUTED, hatch="/////", linewidth=0.6, label=label)


# --- axes -------------------------------------------------------------------------------------------------------------


def context_axis(ax: Axes, contexts: Sequence[int], *, most_labels: int = 9, label: str = "context (tokens)") -> None:
    """Logarithmic axis with the simulated contexts as ticks."""
    ax.set_xscale("log", base=2)
    low, high = min(contexts), max(contexts)
    ax.set_xlim(low / 1.25, high * 1.25)
    every = math.ceil(len(contexts) / most_labels)
    ticks = list(contexts)[::-1][::every][::-1]
    ax.xaxis.set_major_locator(FixedLocator([float(t) for t in ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_label(round(value))))
    ax.set_xlabel(label)


class Scale(NamedTuple):
    """A unit for a whole axis: plotted value = value / size."""

    size: float
    unit: str


_SI_PREFIXES: tuple[tuple[str, int], ...] = (
    ("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3), ("", 0), ("m", -3), ("µ", -6), ("n", -9), ("p", -12),
)  # fmt: skip


def scale_for(values: FloatArray, unit: str) -> Scale:
    """The decimal prefix in which the middle of ``values`` reads best; money takes none."""
    usable = values[np.isfinite(values) & (values > 0)]
    if not usable.size or unit == "USD":
        return Scale(1.0, unit)
    middle = math.exp(float(np.log(usable).mean()))
    for prefix, exponent in _SI_PREFIXES:
        if middle >= 0.8 * 10.0**exponent:
            return Scale(10.0**exponent, prefix + unit)
    return Scale(1e-12, "p" + unit)


def in_prefix(value: float, unit: str) -> str:
    """A value with its own prefix: ``4.57 ms``."""
    scale = scale_for(np.array([abs(value)]), unit)
    return f"{three_digits(value / scale.size)} {scale.unit}"


def log_axis(ax: Axes, values: FloatArray, *, strips: int = 0) -> None:
    """Logarithmic y axis around ``values`` with ``strips`` rows kept free at the top."""
    usable = values[np.isfinite(values) & (values > 0)]
    low, high = (float(usable.min()), float(usable.max())) if usable.size else (0.5, 2.0)
    if high / low < 1.6:
        middle = math.sqrt(low * high)
        low, high = min(low, middle / 1.3), max(high, middle * 1.3)
    span = math.log(high / low)
    free_top, free_bottom = 0.06 + STRIP_HEIGHT * strips, 0.1
    total = span / (1 - free_top - free_bottom)
    ax.set_yscale("log")
    ax.set_ylim(low * math.exp(-free_bottom * total), high * math.exp(free_top * total))
    decades = total / math.log(10)
    subs: tuple[float, ...] = (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    if decades < 0.8:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))


#: Share of a panel's height that one row of the not-fitting strip takes.
STRIP_HEIGHT = 0.075


class Strip(NamedTuple):
    """Contexts at which a method does not fit, and how many chips it would need there."""

    method: str
    contexts: tuple[int, ...]
    chips: tuple[int, ...]


def draw_strips(ax: Axes, data: ReportData, strips: Sequence[Strip], contexts: Sequence[int]) -> None:
    """Hatched rows at the top of a panel where methods do not fit, with the chips that they would need."""
    transform = ax.get_xaxis_transform()
    steps = [b / a for a, b in pairwise(contexts)]
    half = math.sqrt(min(steps)) if steps else 1.2
    right = ax.get_xlim()[1]
    for row, strip in enumerate(strips):
        color = method_style(data, strip.method).color
        x0 = max(min(strip.contexts) / half, ax.get_xlim()[0])
        x1 = min(max(strip.contexts) * half, right)
        y = 1 - STRIP_HEIGHT * (row + 1) + 0.008
        ax.add_patch(
            Rectangle((x0, y), x1 - x0, STRIP_HEIGHT - 0.016, transform=transform, facecolor="none", edgecolor=color,
                      hatch="//////", linewidth=0.8, zorder=3)
        )  # fmt: skip
        low, high = min(strip.chips), max(strip.chips)
        text = f"needs {low if low == high else f'{low} to {high}'} chips"
        if high <= data.parallel.chips:
            text = "cannot run"
        room = float(log_fraction(np.array([x0]), ax.get_xlim())[0])
        beside = room > 0.45  # else there is no room on the left, and the text goes onto the strip
        ax.text(
            x0 if beside else math.sqrt(x0 * x1), y + STRIP_HEIGHT / 2 - 0.008, f"{text} " if beside else text,
            transform=transform, ha="right" if beside else "center", va="center", fontsize=7, color=color, zorder=4,
            bbox=None if beside else {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def hatched_bar(ax: Axes, data: ReportData, y: float, width: float, color: str, chips: int) -> None:
    """A bar that stands for a point that does not fit, or cannot run on however many ``chips``."""
    ax.barh(y, width, height=0.62, facecolor="none", edgecolor=color, hatch="/////", linewidth=0.8)
    text = f"does not fit: needs {chips} chips" if chips > data.parallel.chips else "cannot run"
    ax.text(width * 1.04, y, text, va="center", fontsize=8, color=color)


def method_rows(ax: Axes, data: ReportData, methods: list[str]) -> None:
    """Name the rows of a bar chart after methods, in their colours."""
    styles = [method_style(data, m) for m in methods]
    ax.set_yticks(range(len(methods)), [style.title for style in styles])
    for label, style in zip(ax.get_yticklabels(), styles, strict=True):
        label.set_color(style.color)
        label.set_fontweight("bold")
    ax.set_ylim(len(methods) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(6))


def doublings(contexts: FloatArray) -> list[int]:
    """Powers of two that cover a range of contexts."""
    low, high = math.floor(math.log2(max(contexts.min(), 1))), math.ceil(math.log2(max(contexts.max(), 2)))
    return [1 << e for e in range(low, high + 1)]
