"""Figures that look inside the headline points: traffic by class, roofline, time by kernel."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from ttt_sim.report.data import FloatArray, ReportData, numbers, select
from ttt_sim.report.names import (
    CLASS_STYLES,
    group_order,
    is_dark,
    kernel_group,
    method_style,
    short_kernel,
    three_digits,
)
from ttt_sim.report.style import (
    INK,
    MUTED,
    Drawn,
    Label,
    does_not_fit_handle,
    hatched_bar,
    in_prefix,
    log_fraction,
    method_rows,
    new_figure,
    no_data,
    place_labels,
    scale_for,
    top_legend,
)

# --- traffic ----------------------------------------------------------------------------------------------------------


#: Decode batches that the traffic figure and its table show at most.
MOST_BATCHES = 7
#: Traffic classes of few methods, which are left out where no method has them.
RARE_CLASSES = ("optimiser", "index")


def _moves(data: ReportData, name: str) -> bool:
    """Whether any point moves bytes of a traffic class."""
    columns = [column for column in (f"{way}_{name}_bytes" for way in ("read", "write")) if column in data.points]
    return bool((data.points[columns] > 0).any().any())


def traffic(data: ReportData) -> Drawn:
    """Main-memory traffic by class, per token."""
    memory = data.machine.memory_name.upper()
    panels = [("prefill", data.headlines["prefill"].batch)] if "prefill" in data.headlines else []
    panels += (
        [("decode", batch) for batch in data.batches("decode")[:MOST_BATCHES]] if "decode" in data.headlines else []
    )
    rows = []
    shown = [name for name in CLASS_STYLES if name not in RARE_CLASSES or _moves(data, name)]
    for phase, batch in panels:
        context = data.headlines[phase].context_tokens
        for record in select(data.points, phase=phase, batch=batch, context_tokens=context).to_dict("records"):
            for direction in ("read", "write"):
                for name in shown:
                    nbytes = record.get(f"{direction}_{name}_bytes")
                    per_token = float(nbytes) / record["tokens"] if record["fits"] and pd.notna(nbytes) else math.nan
                    rows.append({
                        "method": record["method"], "phase": phase, "context_tokens": context, "batch": batch,
                        "fits": record["fits"], "chips_needed": record["chips_needed"], "direction": direction,
                        "traffic_class": name, "bytes_per_token": per_token,
                    })  # fmt: skip
    columns = [
        "method",
        "phase",
        "context_tokens",
        "batch",
        "fits",
        "chips_needed",
        "direction",
        "traffic_class",
        "bytes_per_token",
    ]
    table = pd.DataFrame(rows, columns=columns)
    title = f"What moves between {memory} and the {data.chips_noun}, by class"
    caption = f"{memory} bytes per token by traffic class; solid is read, hatched is written."
    across = 2 if len(panels) > 1 else 1
    down = math.ceil(max(len(panels), 1) / across)
    hidden = data.batches("decode")[MOST_BATCHES:]
    figure = new_figure(
        data, title, f"per token at {' and '.join(_headline_contexts(data))} tokens of context", width=11,
        height=1.5 + down * (0.85 + 0.33 * max(len(data.methods), 3)),
        notes=[f"Batches {', '.join(map(str, hidden))} are in data/points.csv only."] if hidden else [],
    )  # fmt: skip
    if not len(table):
        no_data(figure, "no headline point was simulated")
        return Drawn(figure, table, title, caption)
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (phase, batch) in zip(axes.flat, panels, strict=False):
        panel = select(table, phase=phase, batch=batch)
        totals = panel.groupby("method")["bytes_per_token"].sum(min_count=1)
        scale = scale_for(np.array([totals.max()]), "B")
        widest = float(totals.max()) / scale.size if totals.notna().any() else 1.0
        methods = [m for m in data.methods if m in set(panel["method"])]
        for y, method in enumerate(methods):
            mine = select(panel, method=method)
            if not bool(mine["fits"].iloc[0]):
                color, chips = method_style(data, method).color, int(mine["chips_needed"].iloc[0])
                hatched_bar(ax, data, y, widest * 0.35, color, chips)
                continue
            left = 0.0
            for name, (_, color) in CLASS_STYLES.items():
                for direction, hatch in (("read", ""), ("write", "//////")):
                    width = (
                        float(select(mine, traffic_class=name, direction=direction)["bytes_per_token"].sum())
                        / scale.size
                    )
                    if width > 0:
                        ax.barh(
                            y, width, left=left, height=0.66, color=color, hatch=hatch, edgecolor="white", linewidth=0.4
                        )
                    left += width
            ax.text(left + widest * 0.012, y, three_digits(left), va="center", fontsize=8)
        method_rows(ax, data, methods)
        ax.set_xlim(0, widest * 1.13)
        ax.set_xlabel(f"{scale.unit} per token")
        ax.set_title(f"{phase}, batch {batch}")
    moved = set(table.loc[table["bytes_per_token"] > 0, "traffic_class"])
    handles: list[Line2D | Patch] = [
        Patch(facecolor=color, label=text) for name, (text, color) in CLASS_STYLES.items() if name in moved
    ]
    handles.append(Patch(facecolor="#D5D9DD", edgecolor="white", hatch="//////", label="written"))
    if not table["fits"].astype(bool).all():
        handles.append(does_not_fit_handle(data))
    top_legend(figure, handles)
    return Drawn(figure, table, title, caption)


def _headline_contexts(data: ReportData) -> list[str]:
    return list(dict.fromkeys(f"{at.context_tokens:,}" for at in data.headlines.values()))


# --- roofline ---------------------------------------------------------------------------------------------------------


def roofline(data: ReportData) -> Drawn:
    """Kernels of the headline points under the roofline of the chip."""
    machine = data.machine
    frames = [data.at_headline(data.roofline, phase) for phase in data.headlines]
    table = pd.concat([data.roofline.iloc[:0], *frames], ignore_index=True)
    spans, advance = numbers(table, "span_cycles"), numbers(table, "cycles")
    seconds = np.where(np.isfinite(spans), spans, advance) / machine.clock_hz
    flops, nbytes = numbers(table, "flops"), numbers(table, "main_bytes")
    with np.errstate(divide="ignore", invalid="ignore"):
        table["flop_per_byte"] = np.where(nbytes > 0, flops / nbytes, np.nan)
        table["flops_per_s"] = np.where(seconds > 0, flops / seconds, np.nan)
    table["group"] = [kernel_group(str(label)) for label in table["kernel"]]
    title = "Where the kernels stand under the roofline"
    if machine.peak_flops_per_s is not None:
        ridge = machine.peak_flops_per_s / machine.peak_bytes_per_s
        title += f": memory limits all below {three_digits(ridge)} FLOP per byte"
    caption = (
        "Arithmetic intensity against the FLOP rate that each kind of kernel reached from start to finish; area "
        "is its share of the time. Solid: datasheet peaks; dashed: what long streams and full tiles sustain."
        + ("" if data.parallel.chips == 1 else f" Of one of {data.parallel.chips} chips.")
    )
    table["share_frac"] = _shares(table)
    drawn = table[(table["flop_per_byte"] > 0) & (table["flops_per_s"] > 0) & (table["share_frac"] >= LEAST_SHARE)]
    phases = [p for p in data.headlines if len(select(drawn, phase=p))]
    figure = new_figure(
        data, title, "area of a mark: share of the time", width=11, height=5.4, caveat=False,
        notes=[f"Left out: kernels without FLOPs (norms, copies) or traffic, or below {LEAST_SHARE:.1%} of the time."],
    )  # fmt: skip
    if not phases or machine.peak_flops_per_s is None or machine.achievable_flops_per_s is None:
        no_data(figure, "no kernel computes on a matrix unit")
        return Drawn(figure, table, title, caption)
    axes = figure.subplots(1, len(phases), squeeze=False)
    ridge = machine.peak_flops_per_s / machine.peak_bytes_per_s
    for ax, phase in zip(axes.flat, phases, strict=True):
        panel = select(drawn, phase=phase)
        low = min(ridge / 20, float(panel["flop_per_byte"].min()) / 3)
        high = max(8 * ridge, float(panel["flop_per_byte"].max()) * 3)
        bottom = min(float(panel["flops_per_s"].min()) / 4, machine.peak_bytes_per_s * low)
        ax.set_xlim(low, high)
        ax.set_ylim(bottom / 1e12, machine.peak_flops_per_s / 1e12 * 2.2)
        _roof(ax, data, low, high)
        for method in data.methods:
            rows = select(panel, method=method)
            style = method_style(data, method)
            ax.scatter(
                rows["flop_per_byte"], rows["flops_per_s"] / 1e12, s=16 + 520 * rows["share_frac"], marker=style.marker,
                facecolor=style.color + "38", edgecolor=style.color, linewidth=1.3, zorder=3,
            )  # fmt: skip
        _label_kernels(ax, panel, data)
        ax.set_title(data.headline_text(phase))
        ax.set_xlabel(f"arithmetic intensity (FLOP per byte of {machine.memory_name.upper()})")
    axes[0, 0].set_ylabel("TFLOP/s")
    handles = [
        Line2D([], [], lw=0, markeredgecolor=style.color, markerfacecolor=style.color + "38", marker=style.marker,
               markersize=7, label=style.title)
        for style in (method_style(data, m) for m in data.methods if m in set(drawn["method"]))
    ]  # fmt: skip
    handles.append(Line2D([], [], color=INK, lw=1.5, label="datasheet peak"))
    handles.append(Line2D([], [], color=MUTED, lw=1.1, ls=(0, (4, 2)), label="sustained"))
    top_legend(figure, handles)
    return Drawn(figure, table, title, caption)


#: Kernels with a smaller share of their point's time are not drawn in the roofline.
LEAST_SHARE = 0.002


def _shares(table: pd.DataFrame) -> FloatArray:
    """Share of each kernel in the time of its point."""
    cycles = numbers(table, "cycles")
    totals = table.assign(cycles=cycles).groupby(["method", "phase"])["cycles"].transform("sum")
    return cycles / np.maximum(numbers(totals.to_frame(), "cycles"), 1)


def _roof(ax: Axes, data: ReportData, low: float, high: float) -> None:
    machine = data.machine
    assert machine.peak_flops_per_s is not None
    assert machine.achievable_flops_per_s is not None
    x = np.geomspace(low, high, 200)
    peak = np.minimum(x * machine.peak_bytes_per_s, machine.peak_flops_per_s) / 1e12
    sustained = np.minimum(x * machine.achievable_bytes_per_s, machine.achievable_flops_per_s) / 1e12
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.plot(x, peak, color=INK, lw=1.5, zorder=2)
    ax.plot(x, sustained, color=MUTED, lw=1.1, ls=(0, (4, 2)), zorder=2)
    ridge = machine.peak_flops_per_s / machine.peak_bytes_per_s
    ax.axvline(ridge, color=MUTED, lw=0.8, ls=":", zorder=1)
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())
    ax.annotate(
        f"{machine.peak_flops_per_s / 1e12:,.0f} TFLOP/s {machine.dtype}", (high, machine.peak_flops_per_s / 1e12),
        xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=7.5, color=INK,
    )  # fmt: skip
    ax.annotate(
        f"ridge {three_digits(ridge)}", (ridge, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0),
        textcoords="offset points", fontsize=7.5, color=MUTED,
    )  # fmt: skip
    at = math.sqrt(low * ridge)
    ax.annotate(
        in_prefix(machine.peak_bytes_per_s, "B/s"), (at, at * machine.peak_bytes_per_s / 1e12), xytext=(-5, 5),
        textcoords="offset points", fontsize=7.5, color=INK, ha="right",
    )  # fmt: skip


def _label_kernels(ax: Axes, panel: pd.DataFrame, data: ReportData) -> None:
    """Name the kernels that take the most time, once each."""
    machine = data.machine
    assert machine.peak_flops_per_s is not None
    assert machine.achievable_flops_per_s is not None
    x_of, y_of = ax.get_xlim(), ax.get_ylim()
    rows = panel.sort_values("share_frac", ascending=False)
    x = log_fraction(numbers(rows, "flop_per_byte"), x_of)
    y = log_fraction(numbers(rows, "flops_per_s") / 1e12, y_of)
    intensity = np.geomspace(*x_of, 120)
    rates = (
        (machine.peak_bytes_per_s, machine.peak_flops_per_s),
        (machine.achievable_bytes_per_s, machine.achievable_flops_per_s),
    )
    roof = (
        np.concatenate([np.minimum(intensity * bytes_per_s, flops_per_s) for bytes_per_s, flops_per_s in rates]) / 1e12
    )
    lines = zip(np.tile(log_fraction(intensity, x_of), 2), log_fraction(roof, y_of), strict=True)
    first = np.flatnonzero(~rows["kernel"].duplicated().to_numpy(dtype=np.bool_))[:8]
    names = [short_kernel(str(name)) for name in rows["kernel"]]
    labels = [Label(float(x[i]), float(y[i]), names[i], INK) for i in first]
    place_labels(ax, labels, [*zip(x.tolist(), y.tolist(), strict=True), *lines], leaders=True)


# --- time by kernel ---------------------------------------------------------------------------------------------------


def time_by_kernel(data: ReportData) -> Drawn:
    """Time of the headline points by group of kernels."""
    frames = [data.at_headline(data.breakdown, phase) for phase in data.headlines]
    table = pd.concat([data.breakdown.iloc[:0], *frames], ignore_index=True)
    table["group"] = [kernel_group(str(label)) for label in table["kernel"]]
    table["seconds"] = numbers(table, "cycles") / data.machine.clock_hz
    title = "Where the time goes"
    caption = "Time by group of kernels: the whole prefill, and the mean decode step over a chunk."
    phases = [phase for phase in data.headlines if len(select(table, phase=phase))]
    figure = new_figure(
        data, title, "each bar adds up to the simulated time; work hidden behind other work takes none", width=11,
        height=1.6 + max(len(phases), 1) * (0.8 + 0.36 * max(len(data.methods), 3)),
    )  # fmt: skip
    if not phases:
        no_data(figure, "no headline point fits")
        return Drawn(figure, table, title, caption)
    axes = figure.subplots(len(phases), 1, squeeze=False)
    used: set[str] = set()
    for ax, phase in zip(axes.flat, phases, strict=True):
        panel = select(table, phase=phase)
        sums = panel.groupby(["method", "group"])["seconds"].sum()
        longest = float(panel.groupby("method")["seconds"].sum().max())
        scale = scale_for(np.array([longest]), "s")
        longest /= scale.size
        asked = data.at_headline(data.points, phase)
        methods = [m for m in data.methods if m in set(panel["method"]) | set(asked["method"])]
        for y, method in enumerate(methods):
            if method not in set(panel["method"]):
                chips = numbers(select(asked, method=method), "chips_needed")
                color = method_style(data, method).color
                hatched_bar(ax, data, y, longest * 0.35, color, int(np.nan_to_num(chips, nan=1)[0]))
                continue
            left = 0.0
            for group, color in group_order():
                width = float(sums.get((method, group), 0.0)) / scale.size
                if width <= 0:
                    continue
                used.add(group)
                ax.barh(y, width, left=left, height=0.68, color=color, edgecolor="white", linewidth=0.5)
                if width > 0.055 * longest:
                    share = width / (float(panel[panel["method"] == method]["seconds"].sum()) / scale.size)
                    ink = "white" if is_dark(color) else INK
                    ax.text(
                        left + width / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=7.5,
                        color=ink,
                    )  # fmt: skip
                left += width
            ax.text(left + longest * 0.008, y, f"{three_digits(left)} {scale.unit}", va="center", fontsize=8)
        method_rows(ax, data, methods)
        ax.set_xlim(0, longest * 1.1)
        ax.set_xlabel(f"time ({scale.unit})")
        ax.set_title(data.headline_text(phase) + (" (mean step)" if phase == "decode" else " (whole prompt)"))
    top_legend(figure, [Patch(facecolor=c, label=g) for g, c in group_order() if g in used])
    return Drawn(figure, table, title, caption)
