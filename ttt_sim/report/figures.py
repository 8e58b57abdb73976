"""Every figure of a report by name, and drawing them to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ttt_sim.report import figures_compare, figures_context, figures_detail, figures_gains, figures_timeline
from ttt_sim.report.data import ReportData
from ttt_sim.report.style import RC, Drawn

#: Name -> figure, in the order in which a report shows them. The name is that of its files.
FIGURES: Mapping[str, Callable[[ReportData], Drawn]] = {
    "state_memory": figures_context.state_memory,
    "prefill_time": figures_context.prefill_time,
    "decode_time": figures_context.decode_time,
    "decode_steps": figures_compare.step_times,
    "trade_off": figures_compare.trade_off,
    "crossovers": figures_compare.crossovers,
    "traffic": figures_detail.traffic,
    "roofline": figures_detail.roofline,
    "time_by_kernel": figures_detail.time_by_kernel,
    "chunk_timeline": figures_timeline.chunk_timeline,
    "sensitivity": figures_gains.sensitivity,
    "weight_writes": figures_gains.weight_writes,
    "decode_energy": figures_context.decode_energy,
    "decode_cost": figures_context.decode_cost,
}


class Rendered(NamedTuple):
    """A figure on disk."""

    name: str
    title: str
    caption: str


def draw(name: str, data: ReportData) -> Drawn:
    """Draw one figure under the report's own settings; nothing of matplotlib's state stays changed."""
    with matplotlib.rc_context(dict(RC)):
        return FIGURES[name](data)


def render_figure(name: str, data: ReportData, folder: Path) -> Rendered:
    """Write one figure to ``folder/figures``, as :func:`render` does."""
    return render(name, partial(FIGURES[name], data), folder / "figures")


def render(name: str, figure: Callable[[], Drawn], folder: Path) -> Rendered:
    """Write NAME.png, NAME.svg and the table behind them as NAME.csv to ``folder``: same data, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(dict(RC)):
        drawn = figure()
        save_figure(drawn.figure, folder / name)
    write_table(drawn.table, folder / f"{name}.csv")
    return Rendered(name, drawn.title, drawn.caption)


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``path`` with .png and .svg added; to be called under the settings that the figure was drawn with."""
    # The layout is computed once, and the canvases are used directly: ``savefig`` would draw everything twice.
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    FigureCanvasAgg(figure).print_png(  # type: ignore[no-untyped-call]
        f"{path}.png", metadata={"Software": None}, pil_kwargs={"compress_level": 3}
    )
    FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
        f"{path}.svg", metadata={"Date": None, "Creator": "ttt_sim"}
    )


def write_table(table: pd.DataFrame, path: Path) -> None:
    """A frame as CSV, the same bytes on every platform."""
    table.to_csv(path, index=False, lineterminator="\n")
