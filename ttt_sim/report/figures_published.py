"""Predicted against published figures of chips: times on logarithmic axes, and the ratio chip by chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from ttt_sim.predict.serving import FAR, Outcome, summary_of
from ttt_sim.report.style import GRID, MUTED, framed_figure, top_legend

#: Families of chips and their looks; colours stay apart for colour-blind readers (Okabe and Ito).
_FAMILIES: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("GPUs", ("gpu",), "#0072B2", "o"),
    ("TPUs and accelerators", ("tpu", "accelerator"), "#D55E00", "s"),
    ("dataflow, wafer scale", ("dataflow", "wafer_scale"), "#009E73", "^"),
    ("NPUs, FPGAs", ("npu", "fpga"), "#CC79A7", "D"),
    ("computing in memory, neuromorphic", ("pim", "digital_imc", "analog_imc", "neuromorphic"), "#E69F00", "v"),
)
_OTHER = ("others", (), "#56B4E9", "P")
_BANDS = ((FAR, "#F3F5F6"), (1.25, GRID))
#: Ratios beyond this lie on the edge of the panel.
_FARTHEST = 10.0
_TO_MS: Mapping[str, float] = {"step_ms": 1.0, "ttft_ms": 1.0, "total_s": 1e3, "op_us": 1e-3}
_RATES = ("tokens_per_s", "tokens_per_s_user", "prefill_tokens_per_s")


def milliseconds(metric: str, value: float) -> float | None:
    """A figure as milliseconds, rates as milliseconds of a token; None where it is neither."""
    if metric in _RATES:
        return 1e3 / value
    return value * _TO_MS[metric] if metric in _TO_MS else None


def published_figure(outcomes: Sequence[Outcome], kinds: Mapping[str, str], titles: Mapping[str, str]) -> Figure:
    """``kinds`` and ``titles`` by chip file. Cases that were not predicted are left out."""
    shown = [outcome for outcome in outcomes if outcome.predicted]
    chips = list(dict.fromkeys(outcome.case.file for outcome in shown))
    summary = summary_of(shown)
    n_chips = len({outcome.case.file for outcome in shown if outcome.case.use == "count"})
    context = (
        "" if summary is None
        else f"{summary.n} figures of {n_chips} chips count, median error {summary.median:.1f} %"
    )  # fmt: skip
    figure = framed_figure(
        "Published figures of chips: predicted against published", context, width=10.5,
        height=max(5.2, 2.3 + 0.24 * len(chips)),
        notes=[
            "Rates are shown as the time of a token. Shaded: within 25 % and within a factor of 2. Hollow marks do not "
            "count: constants fitted to them, speculative decoding, single ops, doubtful workloads. Right: above 1, "
            "more tokens or more time than published, as the figure was given."
        ],
    )  # fmt: skip
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.0))
    looks = {chip: _look(kinds.get(chip, "")) for chip in chips}
    _scatter(left, shown, looks)
    _strips(right, shown, chips, looks, titles)
    used = list(dict.fromkeys(looks[chip] for chip in chips))
    top_legend(figure, [_handle(*look) for look in sorted(used, key=lambda look: [*_FAMILIES, _OTHER].index(look))])
    return figure


Look = tuple[str, tuple[str, ...], str, str]


def _look(kind: str) -> Look:
    return next((family for family in _FAMILIES if kind in family[1]), _OTHER)


def _handle(title: str, _: tuple[str, ...], colour: str, mark: str) -> Line2D:
    return Line2D([], [], linestyle="none", marker=mark, color=colour, markersize=5, label=title)


def _scatter(ax: Axes, outcomes: Sequence[Outcome], looks: Mapping[str, Look]) -> None:
    points = []
    for outcome in outcomes:
        case = outcome.case
        x, y = milliseconds(case.metric, case.value), milliseconds(case.metric, outcome.predicted or 1.0)
        if x is not None and y is not None and not case.against:
            points.append((x, y, outcome))
    if not points:
        ax.set_axis_off()
        return
    low = min(min(x, y) for x, y, _ in points) / 2
    high = max(max(x, y) for x, y, _ in points) * 2
    line = np.array([low, high])
    for factor, shade in _BANDS:
        ax.fill_between(line, line / factor, line * factor, color=shade, linewidth=0, zorder=0)
    ax.plot(line, line, color=MUTED, linewidth=0.8, zorder=1)
    for x, y, outcome in points:
        look = looks[outcome.case.file]
        _mark(ax, x, y, outcome, look)
        if outcome.far:
            side, align = (-6, "right") if y > x else (6, "left")
            ax.annotate(
                outcome.case.name, (x, y), (side, 0), textcoords="offset points", ha=align, va="center", fontsize=6.5,
                color=look[2],
            )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="published (ms)",
           ylabel="predicted (ms)", title="Time of a token, a step, a prompt, an op")  # fmt: skip
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(visible=False)


def _strips(
    ax: Axes, outcomes: Sequence[Outcome], chips: Sequence[str], looks: Mapping[str, Look], titles: Mapping[str, str]
) -> None:
    for factor, shade in _BANDS:
        ax.axvspan(1 / factor, factor, color=shade, zorder=0, linewidth=0)
    ax.axvline(1.0, color=MUTED, linewidth=0.8, zorder=1)
    for row, chip in enumerate(chips):
        for outcome in outcomes:
            if outcome.case.file == chip and outcome.ratio is not None:
                _mark(ax, float(np.clip(outcome.ratio, 1 / _FARTHEST, _FARTHEST)), row, outcome, looks[chip])
    ax.set(xscale="log", xlim=(1 / _FARTHEST, _FARTHEST), ylim=(len(chips) - 0.4, -0.6), xlabel="predicted / published",
           title="Ratio, chip by chip")  # fmt: skip
    ax.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 0.8, 1.25, 2, 5, 10]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.set_yticks(range(len(chips)), [titles.get(chip, chip) for chip in chips])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)


def _mark(ax: Axes, x: float, y: float, outcome: Outcome, look: Look) -> None:
    face = look[2] if outcome.case.use == "count" else "none"
    ax.scatter(x, y, s=16, marker=look[3], facecolors=face, edgecolors=look[2], linewidths=0.7, alpha=0.8,
               clip_on=False, zorder=2)  # fmt: skip
