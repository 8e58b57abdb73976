"""Predicted against measured latencies: one figure for each group of ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from ttt_sim.predict.harness import GROUP_OF_OP, GROUPS
from ttt_sim.predict.predictions import Prediction
from ttt_sim.predict.validation import apart
from ttt_sim.report.style import GRID, MUTED, framed_figure, top_legend

TITLES: Mapping[str, str] = {
    "product": "Matrix products", "attention": "Attention", "recurrent": "Gated delta rule", "norm": "Norms",
    "softmax": "Softmax", "element": "Element-wise ops", "collective": "Sums over chips", "model": "Whole models",
}  # fmt: skip
#: Colours that stay apart for colour-blind readers (Okabe and Ito), and marks, by device in order of name.
_MARKS = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    ("#882255", "X"), ("#44AA99", "h"),
)  # fmt: skip
#: Ratios beyond this lie on the edge of a panel.
_FARTHEST = 3.0
_RATIOS = (1 / 3, 0.5, 0.8, 1.0, 1.25, 2.0, 3.0)


def validation_figures(predictions: Sequence[Prediction]) -> dict[str, Figure]:
    """A figure for each group that has rows: predicted over measured against measured, a panel for each op."""
    devices = sorted({p.row.device for p in predictions})
    marks = {device: _MARKS[i % len(_MARKS)] for i, device in enumerate(devices)}
    figures = {}
    for group in GROUPS:
        members = [p for p in predictions if GROUP_OF_OP[p.row.op] == group]
        if members:
            figures[group] = _figure(TITLES[group], members, marks)
    return figures


def _figure(title: str, predictions: Sequence[Prediction], marks: Mapping[str, tuple[str, str]]) -> Figure:
    ops = list(dict.fromkeys(sorted(p.row.op for p in predictions)))
    counted = [p for p in predictions if not apart(p.row)]
    errors = [abs((p.ratio or 1.0) - 1) for p in counted]
    context = f"{len(counted)} rows, off by {100 * float(np.mean(errors)):.1f} % on average" if counted else ""
    notes = [
        "Shaded: within 10 and 25 %. Hollow marks are told apart and count nowhere; marks on the edge lie beyond it."
    ]
    figure = framed_figure(
        f"{title}: predicted over measured time", context, width=3.6 * max(len(ops), 2), height=4.0, notes=notes
    )
    grid = figure.subplots(1, len(ops), squeeze=False)[0]
    for ax, op in zip(grid, ops, strict=True):
        _panel(ax, op, [p for p in predictions if p.row.op == op], marks)
    grid[0].set_ylabel("predicted / measured")
    shown = [device for device in marks if any(p.row.device == device for p in predictions)]
    top_legend(figure, [_handle(device, *marks[device]) for device in shown])
    return figure


def _panel(ax: Axes, op: str, predictions: Sequence[Prediction], marks: Mapping[str, tuple[str, str]]) -> None:
    for share, shade in ((0.25, "#F3F5F6"), (0.1, GRID)):
        ax.axhspan(1 / (1 + share), 1 + share, color=shade, zorder=0)
    ax.axhline(1.0, color=MUTED, linewidth=0.8, zorder=1)
    for device, (colour, mark) in marks.items():
        for aside in (True, False):
            chosen = [p for p in predictions if p.row.device == device and bool(apart(p.row)) == aside]
            if chosen:
                ratio = np.clip([p.ratio or 1.0 for p in chosen], 1 / _FARTHEST, _FARTHEST)
                measured = [p.row.latency_us or 1.0 for p in chosen]
                face = "none" if aside else colour
                ax.scatter(measured, ratio, s=13, marker=mark, facecolors=face, edgecolors=colour, linewidths=0.6,
                           alpha=0.75, clip_on=False, zorder=2)  # fmt: skip
    ax.set(xscale="log", yscale="log", ylim=(1 / _FARTHEST, _FARTHEST), title=op, xlabel="measured (µs)")
    ax.yaxis.set_major_locator(FixedLocator(_RATIOS))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.grid(visible=False)


def _handle(device: str, colour: str, mark: str) -> Line2D:
    return Line2D([], [], linestyle="none", marker=mark, color=colour, markersize=5, label=device)
