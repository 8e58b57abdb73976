"""Predicted against measured latencies as figures, one for each group of ops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ttt_sim.predict.harness import GROUP_OF_OP, GROUPS
from ttt_sim.predict.predictions import Prediction
from ttt_sim.predict.validation import apart

_TITLES = {
    "product": "Matrix products", "attention": "Attention", "recurrent": "Gated delta rule", "norm": "Norms",
    "softmax": "Softmax", "element": "Element-wise ops", "collective": "Sums over chips", "model": "Whole models",
}  # fmt: skip
_MARKERS = "os^Dv<>Ph*"
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#7f7f7f",
    "#882255",
    "#44aa99",
)


def draw_scatters(predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    """Write ``validate_GROUP.png`` and ``.svg`` for each group with rows; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for group in GROUPS:
        members = [p for p in predictions if GROUP_OF_OP[p.row.op] == group]
        if members:
            figure = scatter(_TITLES[group], members)
            for suffix in ("png", "svg"):
                path = folder / f"validate_{group}.{suffix}"
                if suffix == "png":
                    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})  # type: ignore[no-untyped-call]
                else:
                    with matplotlib.rc_context({"svg.hashsalt": "ttt_sim", "svg.fonttype": "none"}):
                        FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})  # type: ignore[no-untyped-call]
                written.append(path)
    return written


def scatter(title: str, predictions: Sequence[Prediction]) -> Figure:
    """One figure: a point a row, colour by device and op, hollow where a row is told apart; bands of 20 and 50 %."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    ax = figure.add_subplot()
    keys = sorted({(p.row.device, p.row.op) for p in predictions})
    measured = np.array([p.row.latency_us or 1.0 for p in predictions])
    low, high = measured.min() * 0.6, measured.max() * 1.7
    line = np.array([low, high])
    ax.fill_between(line, line / 1.5, line * 1.5, color="0.93", label="within 50 %")
    ax.fill_between(line, line / 1.2, line * 1.2, color="0.85", label="within 20 %")
    ax.plot(line, line, color="0.4", linewidth=0.8)
    for index, (device, op) in enumerate(keys):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        for aside in (False, True):
            chosen = [
                p for p in predictions if (p.row.device, p.row.op) == (device, op) and bool(apart(p.row)) == aside
            ]
            if chosen:
                ax.scatter(
                    [p.row.latency_us or 1.0 for p in chosen], [p.predicted_us for p in chosen], s=14, marker=marker,
                    facecolors="none" if aside else colour, edgecolors=colour, linewidths=0.7,
                    label=f"{device} {op}{' (told apart)' if aside else ''}",
                )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ax.set(xlabel="measured (µs)", ylabel="predicted (µs)", title=title)
    ax.legend(fontsize=6, loc="upper left")
    return figure
