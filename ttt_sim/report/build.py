"""A report on disk: figures, the data behind them, a summary for programs, a page for readers; all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ttt_sim.data_files import nearest
from ttt_sim.errors import ConfigError
from ttt_sim.parallel import run_all
from ttt_sim.report.data import COLUMNS, ReportData, plain
from ttt_sim.report.figures import FIGURES, render_figure, write_table
from ttt_sim.report.folder import check_out, replaced_folder, write_summary
from ttt_sim.report.page import page

__all__ = ["build", "check_out"]


def build(
    data: ReportData, out: Path, *, figures: Iterable[str] | None = None, workers: int | None = None
) -> list[Path]:
    """Write the report to the folder ``out`` and return its files.

    ``figures``: names from :data:`ttt_sim.report.figures.FIGURES`, None for all. ``workers``: processes that draw them,
    None for one per core. An earlier report in ``out`` stays as it was unless the new one is complete.

    Raises:
        ConfigError: a figure is unknown, or ``out`` cannot be written or holds something else than a report.
    """
    names = list(FIGURES) if figures is None else list(dict.fromkeys(figures))
    for name in names:
        if name not in FIGURES:
            near = nearest(name, list(FIGURES))
            hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(FIGURES)}"
            raise ConfigError(f"unknown figure {name!r}, {hint}")
    with replaced_folder(out) as folder:
        rendered = run_all(partial(render_figure, data=data, folder=folder), names, workers=workers)
        tables = folder / "data"
        tables.mkdir()
        for name in COLUMNS:
            write_table(getattr(data, name), tables / f"{name}.csv")
        (folder / "README.md").write_text(page(data, rendered), encoding="utf-8", newline="\n")
        write_summary(folder, _summary(data))
    return sorted(path for path in out.rglob("*") if path.is_file())


def _summary(data: ReportData) -> dict[str, object]:
    return {
        "provenance": plain(data.provenance),
        "headlines": {
            phase: {"context_tokens": at.context_tokens, "batch": at.batch} for phase, at in data.headlines.items()
        },
        "points": plain(data.points.to_dict("records")),
        "crossovers": plain(data.crossovers.to_dict("records")),
        "quality_caveat": data.quality_caveat if data.mixes_quality else None,
        "notes": list(data.notes),
    }
