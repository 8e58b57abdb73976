"""The timeline of one chunk of one TTT layer: kernels on top, the units beneath, the weight write marked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from ttt_sim.report.data import FloatArray, ReportData, numbers, select
from ttt_sim.report.names import group_order, is_dark, kernel_group, short_kernel
from ttt_sim.report.style import INK, MUTED, Drawn, new_figure, no_data, scale_for, top_legend

BoolArray = npt.NDArray[np.bool_]

_STREAMS = ("forward", "update")
_WRITE_SHADE = "#F9E3E0"
_TITLES = {"forward": "forward stream", "update": "update stream"}


def chunk_timeline(data: ReportData) -> Drawn:
    """One chunk of one TTT layer and what runs beside it."""
    table = _one_method(data)
    labels = [str(label) for label in table["kernel"]]
    table["group"] = [kernel_group(label) for label in labels]
    title = "One chunk of one TTT layer: the update beside the forward pass"
    caption = (
        "Tasks of one chunk of one TTT layer and of what runs beside them. Upper rows: kernels by stream; lower rows: "
        "what each unit serves, forward work above, update work beneath. The shade marks the weight write."
    )
    units = [str(u) for u in dict.fromkeys(table["unit"]) if not str(u).startswith("launch")]
    subtitle = data.headline_text("prefill")
    if len(table):
        written = table[_is_write(table)]
        of = written.iloc[0] if len(written) else table.iloc[0]
        subtitle += f"  ·  layer {int(of['layer'])}, chunk {int(of['chunk'])}"
        hidden = _overlap(table, written)
        if hidden is not None:
            title = f"The weight write of one chunk: {hidden:.0%} of it runs beside forward work"
    figure = new_figure(data, title, subtitle, width=11, height=2.3 + 0.42 * max(len(units), 3), caveat=False)
    if not len(table):
        no_data(figure, "no chunk of a TTT layer was simulated")
        return Drawn(figure, table, title, caption)

    start, finish = numbers(table, "start_cycles"), numbers(table, "finish_cycles")
    origin = float(start.min())
    seconds = np.stack([start - origin, finish - origin], axis=1) / data.machine.clock_hz
    scale = scale_for(np.array([seconds.max()]), "s")
    spans = seconds / scale.size
    kernels, ax = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, max(len(units), 2)])
    _kernel_rows(kernels, table, spans)
    _unit_rows(ax, table, spans, units)
    write = _is_write(table)
    if write.any():
        for panel in (kernels, ax):
            panel.axvspan(spans[write, 0].min(), spans[write, 1].max(), color=_WRITE_SHADE, lw=0, zorder=0)
    ax.set_xlim(0, float(spans.max()) * 1.005)
    ax.set_xlabel(f"time ({scale.unit});  1 {scale.unit} = {data.machine.clock_hz * scale.size:,.0f} cycles")
    used = set(table["group"])
    handles = [Patch(facecolor=color, label=group) for group, color in group_order() if group in used]
    if write.any():
        handles.append(
            Patch(facecolor=_WRITE_SHADE, edgecolor="#B2182B", linewidth=0.5, label="duration of the weight write")
        )
    top_legend(figure, handles)
    return Drawn(figure, table, title, caption)


def _one_method(data: ReportData) -> pd.DataFrame:
    """Tasks of the last method that has a timeline, at the headline batch if it has one there."""
    table = data.chunk_timeline
    methods = [m for m in data.methods if m in set(table["method"])]
    if methods:
        table = select(table, method=methods[-1])
        at = data.headlines.get("prefill")
        batch = at.batch if at is not None and at.batch in set(table["batch"]) else min(table["batch"])
        table = select(table, batch=batch)
    return table.sort_values(["start_cycles", "unit"]).reset_index(drop=True)


def _is_write(table: pd.DataFrame) -> BoolArray:
    by_phase = (table["op_phase"] == "weight_write").to_numpy(dtype=np.bool_)
    by_label = np.array([kernel_group(str(label)) == "weight write" for label in table["kernel"]], dtype=np.bool_)
    own = table["own"].to_numpy(dtype=np.bool_)
    write: BoolArray = (by_phase | by_label) & own & (table["kind"] != "overhead").to_numpy(dtype=np.bool_)
    return write


def _overlap(table: pd.DataFrame, written: pd.DataFrame) -> float | None:
    """Share of the weight write's duration in which a unit serves forward work; None without a write."""
    if not len(written):
        return None
    begin, end = float(numbers(written, "start_cycles").min()), float(numbers(written, "finish_cycles").max())
    forward = select(table, stream="forward")
    forward = forward[forward["kind"] != "overhead"]
    spans = np.stack([numbers(forward, "start_cycles"), numbers(forward, "finish_cycles")], axis=1).clip(begin, end)
    spans = spans[spans[:, 1] > spans[:, 0]]
    if end <= begin:
        return None
    if not spans.size:
        return 0.0
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    covered = spans[:, 1] - spans[:, 0]
    covered[1:] = np.maximum(spans[1:, 1] - np.maximum(spans[1:, 0], reach[:-1]), 0)
    return float(covered.sum() / (end - begin))


def _kernel_rows(ax: Axes, table: pd.DataFrame, spans: FloatArray) -> None:
    """Kernels from their first to their last task, named where there is room."""
    total = float(spans.max())
    colors = dict(group_order())
    run = _kernel_runs(table)
    for key in dict.fromkeys(run):
        members = np.array([k == key for k in run], dtype=np.bool_)
        stream, label = key[0], key[1]
        x0, x1 = float(spans[members, 0].min()), float(spans[members, 1].max())
        group = kernel_group(label)
        color = colors[group]
        y = _STREAMS.index(stream) if stream in _STREAMS else 0
        edge = INK if group == "weight write" else "white"
        ax.barh(
            y,
            x1 - x0,
            left=x0,
            height=0.76,
            color=color,
            edgecolor=edge,
            linewidth=1.0 if edge == INK else 0.5,
            zorder=2,
        )
        text = short_kernel(label)
        if len(text) * 0.0068 * total <= x1 - x0:
            ink = "white" if is_dark(color) else INK
            ax.text((x0 + x1) / 2, y, text, ha="center", va="center", fontsize=7, color=ink, zorder=3)
    ax.set_yticks(range(len(_STREAMS)), [_TITLES[s] for s in _STREAMS])
    ax.set_ylim(len(_STREAMS) - 0.5, -0.5)
    ax.tick_params(axis="both", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_title("kernels")


def _kernel_runs(table: pd.DataFrame) -> list[tuple[str, str, int, int]]:
    """(stream, label, layer, chunk) of each task: one kernel, as a chunk of a layer runs every kernel once."""
    columns = zip(table["stream"], table["kernel"], table["layer"], table["chunk"], strict=True)
    return [(str(s), str(k), int(layer), int(chunk)) for s, k, layer, chunk in columns]


def _unit_rows(ax: Axes, table: pd.DataFrame, spans: FloatArray, units: list[str]) -> None:
    """Tasks by unit, forward work in the upper half of a row and update work in the lower."""
    colors = dict(group_order())
    for group, color in colors.items():
        boxes = []
        for i in np.flatnonzero((table["group"] == group).to_numpy(dtype=np.bool_)).tolist():
            unit = str(table["unit"].iloc[i])
            if unit not in units:
                continue
            top = units.index(unit) + (0.0 if table["stream"].iloc[i] == "update" else -0.4)
            (x0, x1), y1 = spans[i], top + 0.4
            boxes.append([(x0, top), (x1, top), (x1, y1), (x0, y1)])
        if boxes:
            ax.add_collection(PolyCollection(boxes, facecolors=color, edgecolors="white", linewidths=0.25, zorder=2))
    for i, unit in enumerate(units):
        ax.axhline(i + 0.5, color="#D5D9DD", lw=0.6)
        busy = (table["unit"] == unit).to_numpy(dtype=np.bool_)
        share = float((spans[busy, 1] - spans[busy, 0]).sum()) / float(spans.max())
        ax.annotate(
            f"busy {share:.0%}", (1, i), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=7.5, color=MUTED,
        )  # fmt: skip
    ax.set_yticks(range(len(units)), units)
    ax.set_ylim(len(units) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_title("units (upper half forward, lower half update)")
