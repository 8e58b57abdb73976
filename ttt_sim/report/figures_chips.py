"""Figures that set chips against each other: speed, energy, capacity, updates, and who gains from fast weights."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ttt_sim.comparison import Compared
from ttt_sim.crossover import BASELINE
from ttt_sim.report.compare_words import (
    DAGGER,
    SAME,
    UPDATE,
    best,
    chip_label,
    context_line,
    kind_title,
    lifetimes,
    method_names,
    method_title_of,
    short_reason,
    with_fast_weights,
)
from ttt_sim.report.data import FloatArray, numbers, select
from ttt_sim.report.names import MethodStyle, style_of_method
from ttt_sim.report.style import (
    INK,
    MUTED,
    PAPER,
    Drawn,
    Scale,
    framed_figure,
    log_fraction,
    no_data,
    scale_for,
    top_legend,
)


class KindStyle(NamedTuple):
    color: str
    marker: str


#: Look of each family of hardware: a colour and a shape, told apart with every kind of colour vision.
KIND_STYLES: Mapping[str, KindStyle] = {
    "gpu": KindStyle("#0072B2", "o"),
    "tpu": KindStyle("#E69F00", "s"),
    "accelerator": KindStyle("#009E73", "D"),
    "dataflow": KindStyle("#D55E00", "^"),
    "wafer_scale": KindStyle("#882255", "*"),
    "npu": KindStyle("#56B4E9", "v"),
    "fpga": KindStyle("#999933", "h"),
    "pim": KindStyle("#CC79A7", "P"),
    "digital_imc": KindStyle("#332288", "X"),
    "analog_imc": KindStyle("#44AA99", "p"),
    "neuromorphic": KindStyle("#000000", "d"),
    "hypothetical": KindStyle("#AA4499", "<"),
    "example": KindStyle("#9AA3AA", ">"),
}
#: Inches of a row of a dot plot, one row per chip.
_ROW = 0.31
_DAGGER_NOTE = (
    f"{DAGGER} and hollow marks: the rate of the unit that bounds it, the share of it that is sustained, or a fitted "
    "constant is of low certainty in the chip file."
)
_BARS_NOTE = "Bars: 80 % intervals."


def style_of(data: Compared, method: str) -> MethodStyle:
    return style_of_method(method, data.settings.methods, data.window_tokens(method))


# --- dot plots --------------------------------------------------------------------------------------------------------


class _Quantity(NamedTuple):
    """What a dot plot shows: a column, the column that says what is weak about it, and the one that says why a value
    is missing; ``low, high`` error bars as columns of a time that the value falls with."""

    column: str
    label: str
    weak: str | None
    missing: str | None
    low: str | None = None
    high: str | None = None
    middle: str | None = None


def decode_speed(data: Compared) -> Drawn:
    """Decode tokens per second and chip of every method."""
    quantity = _Quantity(
        "tokens_per_s_per_chip", "tokens per second and chip, decode", "weak_inputs", "decode_why",
        "step_seconds_low", "step_seconds_high", "step_seconds",
    )  # fmt: skip
    title = _leader(data, "tokens_per_s_per_chip", "Decode: {chip} makes most tokens per chip, with {method}")
    return _dots(data, quantity, title, "Tokens per second of the whole batch over the chips that it takes.")


def prefill_speed(data: Compared) -> Drawn:
    """Prefill tokens per second and chip of every method."""
    quantity = _Quantity(
        "prefill_tokens_per_s_per_chip", "prompt tokens per second and chip", "prefill_weak_inputs",
        "prefill_why", "prefill_seconds_low", "prefill_seconds_high", "prefill_seconds",
    )  # fmt: skip
    title = _leader(
        data, "prefill_tokens_per_s_per_chip", "Prefill: {chip} takes in most tokens per chip, with {method}"
    )
    return _dots(data, quantity, title, "Tokens of the prompts per second over the chips that they take.")


def sequences_held(data: Compared) -> Drawn:
    """How many sequences of the context one chip holds beside the weights."""
    quantity = _Quantity("sequences_per_chip", "sequences held in main memory, per chip", None, None)
    title = _leader(data, "sequences_per_chip", "Capacity: {chip} holds most sequences per chip, with {method}")
    return _dots(
        data, quantity, title,
        "Main memory less the weights, over the state of a sequence; room for activations is not counted.",
        empty="holds none beside the weights in main memory",
    )  # fmt: skip


def _leader(data: Compared, column: str, text: str) -> str:
    found = best(data, column)
    if found is None:
        return text.partition(":")[0]
    return text.format(chip=found["chip"], method=method_title_of(data, str(found["method"])))


def _dots(data: Compared, quantity: _Quantity, title: str, caption: str, *, empty: str = "") -> Drawn:
    table = _columns(data, quantity)
    values = numbers(table, quantity.column)
    shown = table[np.isfinite(values) & (values > 0)]
    chips = _sorted_chips(shown, quantity.column)
    notes = []
    if quantity.low is not None:
        notes.append(_BARS_NOTE)
    weak = quantity.weak is not None and bool((shown[quantity.weak] != "").any())
    if weak:
        notes.append(_DAGGER_NOTE)
    notes += _absent(data, table, quantity, empty)
    figure = _framed(data, title, height=1.35 + _ROW * max(len(chips), 3), notes=notes)
    if not chips:
        no_data(figure, "no chip can run any of the methods")
        return Drawn(figure, table, title, caption)
    methods = [m for m in method_names(data) if len(select(shown, method=m))]
    top_legend(figure, _method_handles(data, methods, weak=weak))
    ax = figure.subplots()
    _chip_rows(ax, data, shown, chips, quantity.weak)
    for place, method in enumerate(methods):
        _draw_method(ax, data, select(shown, method=method), chips, quantity, _offset(place, len(methods)))
    _log_x(ax, _reach(shown, quantity))
    ax.set_xlabel(quantity.label)
    return Drawn(figure, table, title, caption)


def _reach(rows: pd.DataFrame, quantity: _Quantity) -> FloatArray:
    """Values with the ends of their bars."""
    values = numbers(rows, quantity.column)
    if quantity.low is None or quantity.high is None or quantity.middle is None:
        return values
    middle = numbers(rows, quantity.middle)
    return np.concatenate(
        [values * middle / numbers(rows, quantity.high), values * middle / numbers(rows, quantity.low)]
    )


def _columns(data: Compared, quantity: _Quantity) -> pd.DataFrame:
    wanted = ["chip", "kind", "method", "chips", quantity.column]
    more = (quantity.middle, quantity.low, quantity.high, quantity.weak, quantity.missing)
    return data.table[[*wanted, *(column for column in more if column is not None)]].copy()


def _sorted_chips(shown: pd.DataFrame, column: str) -> list[str]:
    """Chips by their best value, largest first; equal ones by name."""
    top = shown.assign(value=numbers(shown, column)).groupby("chip")["value"].max()
    return sorted(top.index.astype(str), key=lambda chip: (-float(top[chip]), chip))


def _offset(place: int, n: int) -> float:
    return 0.0 if n == 1 else 0.62 * (place / (n - 1) - 0.5)


def _draw_method(
    ax: Axes, data: Compared, rows: pd.DataFrame, chips: Sequence[str], quantity: _Quantity, offset: float
) -> None:
    style = style_of(data, str(rows["method"].iloc[0]))
    for row in rows.to_dict("records"):
        y, value = chips.index(str(row["chip"])) + offset, float(row[quantity.column])
        if quantity.low is not None:
            slow, fast = (float(row[quantity.middle]) / float(row[c]) for c in (quantity.high, quantity.low))
            ax.plot([value * slow, value * fast], [y, y], color=style.color, lw=1.1, solid_capstyle="butt", zorder=2)
        hollow = quantity.weak is not None and bool(row[quantity.weak])
        ax.plot(
            value, y, ls="none", marker=style.marker, color=style.color, markersize=5.2, zorder=3,
            markerfacecolor=PAPER if hollow else style.color, markeredgewidth=1.2,
        )  # fmt: skip


def _method_handles(data: Compared, methods: Iterable[str], *, weak: bool) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = []
    for method in methods:
        style = style_of(data, method)
        handles.append(Line2D([], [], color=style.color, marker=style.marker, ls="none", label=style.title))
    if weak:
        handles.append(_weak_handle())
    return handles


def _weak_handle() -> Line2D:
    return Line2D(
        [], [], color=MUTED, marker="o", markerfacecolor=PAPER, ls="none", label=f"{DAGGER} rests on a weak number"
    )


def _chip_rows(ax: Axes, data: Compared, shown: pd.DataFrame, chips: Sequence[str], weak: str | None) -> None:
    """Name the rows after chips, with how many of them it takes and a dagger where a prediction is weak."""
    labels = []
    for chip in chips:
        rows = select(shown, chip=chip)
        mark = weak is not None and bool((rows[weak] != "").any())
        labels.append(chip_label(chip, rows["chips"].tolist()) + (f" {DAGGER}" if mark else ""))
    ax.set_yticks(range(len(chips)), labels)
    ax.set_ylim(len(chips) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    for y in range(1, len(chips), 2):
        ax.axhspan(y - 0.5, y + 0.5, color="#F6F8FA", zorder=0)


def _log_x(ax: Axes, values: FloatArray) -> None:
    usable = values[np.isfinite(values) & (values > 0)]
    low, high = (float(usable.min()) / 1.3, float(usable.max()) * 1.3) if usable.size else (0.5, 2.0)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    _log_ticks(ax.xaxis, (low, high))


def _log_ticks(axis: Axis, span: tuple[float, float]) -> None:
    subs = (1.0, 2.0, 5.0) if span[1] / span[0] < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=14))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain_number(value)))


def _plain_number(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:,g}M"
    if value >= 1e4:
        return f"{value / 1e3:,g}k"
    return f"{value:,g}" if value >= 1e-3 else f"{value:.0e}"


# --- what a figure leaves out -----------------------------------------------------------------------------------------


def _absent(data: Compared, table: pd.DataFrame, quantity: _Quantity, empty: str) -> list[str]:
    """A note for each reason why values are missing, with methods and chips; the same reason of several once."""
    values = numbers(table, quantity.column)
    gone = table[~(np.isfinite(values) & (values > 0))]
    return absent_notes(data, gone, quantity.missing, empty)


def absent_notes(data: Compared, gone: pd.DataFrame, column: str | None, otherwise: str) -> list[str]:
    """``Not shown, REASON: method: chips; ...`` for rows that a figure has no place for."""
    if not len(gone):
        return []
    by_reason: dict[str, dict[str, list[str]]] = {}
    for row in gone.to_dict("records"):
        reason = short_reason(str(row[column]) if column is not None else "") or otherwise
        by_reason.setdefault(reason, {}).setdefault(str(row["chip"]), []).append(str(row["method"]))
    everything = set(method_names(data))
    notes = []
    for reason, chips in by_reason.items():
        by_methods: dict[tuple[str, ...], list[str]] = {}
        for chip, methods in chips.items():
            by_methods.setdefault(tuple(methods), []).append(chip)
        parts = []
        for kinds, names in by_methods.items():
            titles = ", ".join(method_title_of(data, m) for m in kinds)
            parts.append(", ".join(names) if set(kinds) == everything else f"{titles} on {', '.join(names)}")
        notes.append(f"Not shown, {reason}: {'; '.join(parts)}.")
    return notes


# --- energy and speed -------------------------------------------------------------------------------------------------


def energy_speed(data: Compared) -> Drawn:
    """Energy of a token against the speed that each user sees; a panel for each of two methods."""
    table = data.table[
        ["chip", "kind", "method", "chips", "tokens_per_s_per_user", "energy_j_per_token", "average_power_w",
         "energy_weak_inputs", "weak_inputs", "decode_why"]
    ].copy()  # fmt: skip
    methods = _two_methods(data)
    table = table[table["method"].isin(methods)]
    shown = table[numbers(table, "energy_j_per_token") > 0]
    thrifty = best(data, "energy_j_per_token", largest=False, methods=methods)
    title = "Energy and speed of a token"
    if thrifty is not None:
        name = method_title_of(data, str(thrifty["method"]))
        title = f"Energy: {thrifty['chip']} spends least per token, with {name}"
    caption = (
        "Energy per token, idle power included, against tokens per second of one user, decode. Lower right is better."
    )
    firm = select(shown, energy_weak_inputs="")
    notes = []
    if len(shown) and not len(firm):
        notes.append("The largest part of every energy here rests on a number of low certainty.")
    elif len(firm) < len(shown):
        notes.append(f"{DAGGER} and hollow marks: the largest part of the energy rests on a number of low certainty.")
    notes += absent_notes(data, table[~table.index.isin(shown.index)], "decode_why", "no energy")
    all_weak = len(shown) > 0 and not len(firm)
    taller = _taller(shown)
    height = 1.5 + (4.2 + taller) * max(len(methods), 1)
    figure = _framed(data, title, width=11, height=height, notes=notes, subtitle="lower right is better")
    methods = [m for m in methods if len(select(shown, method=m))]
    if not methods:
        no_data(figure, "no chip can run any of the methods")
        return Drawn(figure, table, title, caption)
    top_legend(figure, _kind_handles(shown))
    axes = figure.subplots(len(methods), 1, squeeze=False)[:, 0]
    limits = _limits(numbers(shown, "tokens_per_s_per_user")), _limits(numbers(shown, "energy_j_per_token"))
    for ax, method in zip(axes, methods, strict=True):
        rows = select(shown, method=method)
        marks = [bool(text) and not all_weak for text in rows["energy_weak_inputs"]]
        _scatter(ax, rows, "tokens_per_s_per_user", "energy_j_per_token", limits, marks, (10.2, 3.5 + taller))
        ax.set_xlabel("tokens per second of each user")
        ax.set_ylabel("energy per token (J)")
        ax.set_title(method_title_of(data, method))
    return Drawn(figure, table, title, caption)


def _two_methods(data: Compared) -> list[str]:
    """The baseline and the method that trades most: the last one."""
    names = method_names(data)
    first = BASELINE if BASELINE in names else names[0]
    return list(dict.fromkeys((first, names[-1])))


def _kind_handles(shown: pd.DataFrame) -> list[Line2D | Patch]:
    kinds = [kind for kind in KIND_STYLES if kind in set(shown["kind"])]
    return [
        Line2D([], [], color=KIND_STYLES[k].color, marker=KIND_STYLES[k].marker, ls="none", label=kind_title(k))
        for k in kinds
    ]


def _limits(values: FloatArray) -> tuple[float, float]:
    usable = values[np.isfinite(values) & (values > 0)]
    low, high = float(usable.min()), float(usable.max())
    room = max((high / low) ** 0.1, 1.4)
    return low / room, high * room


def _taller(shown: pd.DataFrame) -> float:
    """Inches by which a scatter of many chips is taller than one of few."""
    return 0.04 * max(int(shown["chip"].nunique()) - 12, 0)


def _scatter(
    ax: Axes, rows: pd.DataFrame, x: str, y: str, limits: tuple[tuple[float, float], tuple[float, float]],
    marks: Sequence[bool], panel: tuple[float, float],
) -> None:  # fmt: skip
    """Points by kind on logarithmic axes, each with the name of its chip."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(*limits[0])
    ax.set_ylim(*limits[1])
    for axis, span in zip((ax.xaxis, ax.yaxis), limits, strict=True):
        _log_ticks(axis, span)
    px, py = log_fraction(numbers(rows, x), limits[0]), log_fraction(numbers(rows, y), limits[1])
    names = []
    for row, mark in zip(rows.to_dict("records"), marks, strict=True):
        style = KIND_STYLES[str(row["kind"])]
        ax.plot(
            float(row[x]), float(row[y]), ls="none", marker=style.marker, color=style.color, markersize=6.5,
            markerfacecolor=PAPER if mark else style.color, zorder=3,
        )  # fmt: skip
        names.append(chip_label(str(row["chip"]), [row["chips"]]) + (f" {DAGGER}" if mark else ""))
    name_points(ax, list(zip(px.tolist(), py.tolist(), strict=True)), names, panel)


#: Inches of a character and of a line of a name at a point, and of the free space around a point.
_CHARACTER, _LINE, _POINT = 0.064, 0.115, 0.055
#: A name further off than this many inches is led to by a line.
_NEAR = 0.13
#: Inches around a point in which others take its room.
_CROWD = 0.7
#: Inches between a line and what it passes.
_MARGIN = 0.04


class _Box(NamedTuple):
    left: float
    low: float
    right: float
    top: float

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.low < other.top and other.low < self.top

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The place in the box that is nearest to a point."""
        return min(max(x, self.left), self.right), min(max(y, self.low), self.top)

    def distance(self, x: float, y: float) -> float:
        return math.dist((x, y), self.nearest(x, y))


def name_points(
    ax: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], panel: tuple[float, float]
) -> None:
    """Write every name near its point (fractions of a ``panel`` of so many inches), where neither it nor the line that
    leads to it covers another or a point. Without room, the nearest place has to do."""
    wide, high = panel
    at = [(x * wide, y * high) for x, y in points]
    around = [_Box(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in at]
    written, lines = list[_Box](), list[_Box]()
    crowd = [sum(math.dist(place, other) < _CROWD for other in at) for place in at]  # least room first
    for i in sorted(range(len(names)), key=lambda i: (-crowd[i], -at[i][1], at[i][0])):
        taken = [*around, *written]
        spots = _spots(*at[i], _CHARACTER * len(names[i]))
        inside = [s for s in spots if s.left > 0.03 and s.right < wide - 0.02 and s.low > 0.03 and s.top < high - 0.03]
        free = [s for s in inside if not any(s.meets(other) for other in taken)]
        apart = [s for s in free if not any(s.meets(part) for part in lines)]
        marks = [*around[:i], *around[i + 1 :]]
        spot = min(apart or free or inside or spots, key=lambda s: _crossed(s, at[i], ([*written, *lines], marks)))
        written.append(spot)
        lines += _line(spot, *at[i])
        ax.text(
            (spot.left + spot.right) / 2 / wide, (spot.low + spot.top) / 2 / high, names[i], transform=ax.transAxes,
            ha="center", va="center", fontsize=7.5, color=INK, zorder=2.7,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4},
        )  # fmt: skip
        if spot.distance(*at[i]) > _NEAR:
            (x, y), (end_x, end_y) = at[i], spot.nearest(*at[i])
            ends = [x / wide, end_x / wide], [y / high, end_y / high]
            ax.plot(*ends, transform=ax.transAxes, color=MUTED, lw=0.5, zorder=2.5)


def _spots(x: float, y: float, width: float) -> list[_Box]:
    """Places for a name of this width around a point, nearest first."""
    starts = {"left": 0.0, "right": -width, "center": -width / 2}
    corners = [
        (x + dx + starts[side], y + dy - _LINE / 2)
        for reach in (0.0, 0.08, 0.16, 0.24, 0.32, 0.48, 0.64, 0.8, 1.0)
        for dx, dy, side in (
            (0.1, reach, "left"), (0.1, -reach, "left"), (-0.1, reach, "right"), (-0.1, -reach, "right"),
            (0.0, reach + 0.15, "center"), (0.0, -reach - 0.15, "center"),
            (0.1 + reach, 0.0, "left"), (-0.1 - reach, 0.0, "right"),
            (0.1 + reach, reach, "left"), (-0.1 - reach, reach, "right"),
            (0.1 + reach, -reach, "left"), (-0.1 - reach, -reach, "right"),
            (0.1 + reach / 2, reach, "left"), (-0.1 - reach / 2, reach, "right"),
            (0.1 + reach / 2, -reach, "left"), (-0.1 - reach / 2, -reach, "right"),
        )
    ]  # fmt: skip
    boxes = [_Box(left, low, left + width, low + _LINE) for left, low in corners]
    return sorted(boxes, key=lambda box: round(box.distance(x, y), 3))


def _line(spot: _Box, x: float, y: float) -> list[_Box]:
    """The line that leads from a point to its name, as small boxes; none where the name is near."""
    if spot.distance(x, y) <= _NEAR:
        return []
    end_x, end_y = spot.nearest(x, y)
    n = max(8, math.ceil(spot.distance(x, y) / _MARGIN))
    places = [(x + (end_x - x) * step / n, y + (end_y - y) * step / n) for step in range(2, n)]
    return [_Box(px - _MARGIN, py - _MARGIN, px + _MARGIN, py + _MARGIN) for px, py in places]


def _crossed(spot: _Box, point: tuple[float, float], others: Sequence[Sequence[_Box]]) -> tuple[int, ...]:
    """How often the line that leads to a name meets each sort of others."""
    parts = _line(spot, *point)
    return tuple(sum(part.meets(other) for part in parts for other in sort) for sort in others)


# --- updates ----------------------------------------------------------------------------------------------------------


#: Lifetimes up to this number stand in a note; a panel of them would be empty.
_FEW = 4


def update_cost(data: Compared) -> Drawn:
    """Time and energy of updates of the fast weights, and how long cells last that wear."""
    methods = with_fast_weights(data)
    table = data.table[
        ["chip", "kind", "method", "chips", "write_mode", "boundary_added_seconds", "update_seconds",
         "update_energy_j", "lifetime_days", "lifetime_limited_by", "weak_inputs", "decode_why"]
    ].copy()  # fmt: skip
    table = table[table["method"].isin(methods)]
    caption = (
        f"Time of {UPDATE}, energy of one update of one layer and sequence, and days of constant use until cells "
        "that wear are worn, where there are numbers of these."
    )
    panels = [
        (column, unit, label)
        for column, unit, label in (
            ("update_seconds", "s", "time"),
            ("update_energy_j", "J", "energy of one update"),
            ("lifetime_days", "days", "lifetime at constant use"),
        )
        if int((numbers(table, column) > 0).sum()) > (_FEW if unit == "days" else 0)
    ]
    seconds = numbers(table, "update_seconds")
    shown = table[seconds > 0]
    ends = shown.sort_values(["update_seconds", "chip"], kind="stable")
    title = (
        "Cost of a weight update" if shown.empty
        else f"Updates: quickest on {ends['chip'].iloc[0]}, slowest on {ends['chip'].iloc[-1]}"
    )  # fmt: skip
    weak = bool((shown["weak_inputs"] != "").any())
    notes = [_DAGGER_NOTE] if weak else []
    notes += [] if any(unit == "days" for _, unit, _ in panels) else lifetimes(data)
    notes += absent_notes(data, table[~(seconds > 0)], "decode_why", "no cost of updates")
    chips = _sorted_chips(shown.assign(speed=1 / numbers(shown, "update_seconds")), "speed")
    figure = _framed(
        data, title, width=5 + 3 * max(len(panels), 1), height=1.35 + _ROW * max(len(chips), 3), notes=notes,
        subtitle=UPDATE,
    )  # fmt: skip
    if not panels:
        no_data(figure, "no chip can update a weight" if methods else "no method updates weights")
        return Drawn(figure, table, title, caption)
    methods = [m for m in methods if len(select(shown, method=m))]
    top_legend(figure, _method_handles(data, methods, weak=weak))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, (ax, (column, unit, label)) in enumerate(zip(axes, panels, strict=True)):
        scale = Scale(1.0, unit) if unit == "days" else scale_for(numbers(shown, column), unit)
        scaled = shown.assign(**{column: numbers(shown, column) / scale.size})
        quantity = _Quantity(column, label, "weak_inputs", None)
        _chip_rows(ax, data, scaled, chips, "weak_inputs")
        if number:
            ax.set_yticklabels([])
        for place, method in enumerate(methods):
            rows = select(scaled, method=method)
            rows = rows[numbers(rows, column) > 0]
            if len(rows):
                _draw_method(ax, data, rows, chips, quantity, 0.5 * _offset(place, len(methods)))
        _log_x(ax, numbers(scaled, column))
        ax.set_xlabel(f"{label} ({scale.unit})")
    return Drawn(figure, table, title, caption)


# --- who gains --------------------------------------------------------------------------------------------------------


def gain(data: Compared) -> Drawn:
    """How much faster decode gets by the last method, against the ridge point of the chip."""
    method = method_names(data)[-1]
    table = select(
        data.table[
            ["chip", "kind", "method", "chips", "decode_gain", "ridge_flop_per_byte", "bound_by", "bound_kind",
             "weak_inputs", "decode_why"]
        ],
        method=method,
    ).copy()  # fmt: skip
    name, base = method_title_of(data, method), method_title_of(data, BASELINE)
    shown = table[(numbers(table, "decode_gain") > 0) & (numbers(table, "ridge_flop_per_byte") > 0)]
    winners = int((numbers(shown, "decode_gain") > 1 + SAME).sum())
    title = (
        f"Gain from {name}" if shown.empty or method == BASELINE
        else f"{name} decodes faster than the {base} on {winners} of {len(shown)} chips"
    )  # fmt: skip
    caption = (
        f"Decode speed with {name} over that with the {base} on the same chip, against the FLOPs that the chip can do "
        "while it reads a byte of main memory (its ridge point)."
    )
    baseline = select(data.table, method=BASELINE).set_index("chip")["decode_why"].to_dict()
    gone = table[~table.index.isin(shown.index)].copy()
    gone["gone_why"] = [
        str(row["decode_why"]) or (f"the {base} does not fit" if baseline.get(row["chip"]) else "no ridge point")
        for row in gone.to_dict("records")
    ]
    weak = bool((shown["weak_inputs"] != "").any())
    notes = [_DAGGER_NOTE] if weak else []
    notes += absent_notes(data, gone, "gone_why", "no gain")
    taller = _taller(shown)
    figure = _framed(data, title, width=11, height=5.6 + taller, notes=notes)
    if shown.empty or method == BASELINE:
        no_data(figure, "no chip runs both methods")
        return Drawn(figure, table, title, caption)
    top_legend(figure, _kind_handles(shown))
    ax = figure.subplots()
    gains = numbers(shown, "decode_gain")
    low, high = _limits(np.append(gains, 1.0))
    marks = [bool(text) for text in shown["weak_inputs"]]
    _scatter(
        ax, shown, "ridge_flop_per_byte", "decode_gain",
        (_limits(numbers(shown, "ridge_flop_per_byte")), (low, high)), marks, (10.2, 4.3 + taller),
    )  # fmt: skip
    ax.axhline(1.0, color=MUTED, lw=1.0, ls=(0, (4, 3)), zorder=1)
    ax.set_xlabel("ridge point (FLOP per byte of main memory)")
    ax.set_ylabel(f"decode speed over the {base} (times)")
    return Drawn(figure, table, title, caption)


# --- frame ------------------------------------------------------------------------------------------------------------


def _framed(
    data: Compared, title: str, *, height: float, notes: Sequence[str], width: float = 8.5, subtitle: str = ""
) -> Figure:
    """A frame that grows with its notes."""
    lines = sum(len(textwrap.wrap(note, int(width * 16.2))) for note in notes if note)
    context = context_line(data) + (f"  ·  {subtitle}" if subtitle else "")
    return framed_figure(title, context, width=width, height=height + 0.3 + 0.145 * lines, notes=notes)


#: Name -> figure, in the order in which a page shows them.
FIGURES: Mapping[str, Callable[[Compared], Drawn]] = {
    "decode_speed": decode_speed,
    "prefill_speed": prefill_speed,
    "energy_speed": energy_speed,
    "sequences": sequences_held,
    "update_cost": update_cost,
    "gain": gain,
}
