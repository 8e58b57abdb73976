"""What a drift run says: findings in words and small tables, and its files; the same in the terminal and on a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ttt_sim.drift import STORAGES, Drift
from ttt_sim.report.console import WIDTH, printer
from ttt_sim.report.data import plain, tokens_label
from ttt_sim.report.figures import render
from ttt_sim.report.figures_drift import FORMAT_STYLES, clip_title, context_of, drift_figure, rows_of
from ttt_sim.report.folder import replaced_folder, write_summary
from ttt_sim.report.markdown import table_row
from ttt_sim.report.names import three_digits

#: Errors of the output whose first occurrence is reported.
THRESHOLDS = (0.01, 0.1)

TITLE = "What number formats do to a fast weight over a long stream"
#: What a reader must know before a number is quoted.
CAVEAT = (
    "Inputs are random and independent from token to token, and the weights are random too: they stand for those of a "
    "trained layer in size only. How formats differ carries over; how fast a real model drifts does not."
)
HEADER = ("format", "swamped", "underflow", "moved", "change off", "output off", "1 % after", "10 % after")
TERMS: tuple[tuple[str, str], ...] = (
    ("*", "a format that was left before the end of the stream; its numbers are the last ones before that"),
    ("exact", "sum of the same scaled deltas in float64"),
    ("swamped", "element updates that are not zero and left the stored weight where it was, all chunks together"),
    ("underflow", "those of them that were zero in the format once they were scaled"),
    ("moved", "distance of the weight from where it started, over the exact distance"),
    ("change off", "distance between the change and the exact one, over the exact distance"),
    ("output off", "error of the outputs of a probe, relative to their size; includes that of rounding W₀ to fp8"),
    (
        "1 %, 10 % after",
        "tokens after which the output was first off by as much; never: not in this stream; at once: when "
        "first looked at, which is after one chunk",
    ),
)


class FormatRow(NamedTuple):
    """A line of the table: a format and its cells, as in :data:`HEADER`."""

    name: str
    cells: tuple[str, ...]


def findings(drift: Drift, clip: float | None) -> list[str]:
    """Sentences on one clip: the exact growth, what each format lost, and what left its format."""
    settings = drift.settings
    words = clip_title(drift, clip)
    title = words[0].upper() + words[1:]
    step = _of_start(drift, drift.first_step[clip])
    clipped = drift.clipped_chunks[clip]
    acted = "" if clip is None else f" The clip acted on {clipped:,} of {settings.n_chunks:,} deltas."
    said = [f"{title}: the first update is {step}.{acted}{_growth(drift, clip)}"]
    ends = {name: rows_of(drift, name, clip).iloc[-1] for name in settings.formats}
    going = {name: end for name, end in ends.items() if end["ended"] == ""}
    stuck = [name for name, end in going.items() if end["distance"] == 0]
    for stochastic, what in (
        (False, "Swamped element updates"),
        (True, "Left in place by chance, right on average, where rounding is stochastic"),
    ):
        shares = [
            f"{STORAGES[name].title} {_percent(end['swamped_so_far_frac'])}"
            for name, end in going.items()
            if name not in stuck and STORAGES[name].stochastic == stochastic
        ]
        if shares:
            said.append(f"{what}: {', '.join(shares)}.")
    if stuck:
        said.append(f"Never moved at all: {', '.join(STORAGES[name].title for name in stuck)}.")
    for name, end in ends.items():
        if name not in going:
            said.append(
                f"{STORAGES[name].title} left its format with chunk {end['chunk']:,}, after "
                f"{tokens_label(end['tokens'])} tokens: {end['ended']}."
            )
    return said


def _growth(drift: Drift, clip: float | None) -> str:
    """How far the exact weight went, and how that grew over the last doubling."""
    rows = max((rows_of(drift, name, clip) for name in drift.settings.formats), key=len)
    rows = rows[rows["ended"] == ""]
    if rows.empty:
        return ""
    distance, chunk = rows["exact_distance"].to_numpy(), rows["chunk"].to_numpy()
    tokens = tokens_label(int(rows["tokens"].iloc[-1]))
    said = f" After {tokens} tokens the exact ‖W − W₀‖ is {_of_start(drift, distance[-1])}"
    half = int((chunk * 2 <= chunk[-1]).sum()) - 1
    if half < 0 or not distance[half]:
        return said + "."
    power = math.log(distance[-1] / distance[half]) / math.log(chunk[-1] / chunk[half])
    return f"{said}; over the last doubling it grew as tokens to the power of {power:.2f}."


def format_rows(drift: Drift, clip: float | None) -> list[FormatRow]:
    """The table of one clip, as the formats stand at the end; with a star, one that left its format, before it did."""
    return [FormatRow(name, _cells(name, rows_of(drift, name, clip))) for name in drift.settings.formats]


def _cells(name: str, rows: pd.DataFrame) -> tuple[str, ...]:
    ended = bool((rows["ended"] != "").any())
    title = STORAGES[name].title + (" *" if ended else "")
    rows = rows[rows["ended"] == ""]
    if rows.empty:
        return (title, *["-"] * (len(HEADER) - 1))
    end = rows.iloc[-1]
    shares = (
        end["swamped_so_far_frac"],
        end["underflow_so_far_frac"],
        end["distance"] / end["exact_distance"] if end["exact_distance"] else math.nan,
        end["change_error"],
        end["output_error"],
    )
    return (title, *map(_percent, shares), *(_first(rows, threshold) for threshold in THRESHOLDS))


def _first(rows: pd.DataFrame, threshold: float) -> str:
    """The tokens after which the output is first off by as much."""
    found = rows[rows["output_error"] >= threshold]["tokens"].tolist()
    if not found:
        return "never"
    return "at once" if found[0] == rows["tokens"].iloc[0] else tokens_label(found[0])


def _of_start(drift: Drift, norm: float) -> str:
    """``0.110 % of ‖W₀‖``, or so many times it."""
    share = _percent(norm / drift.start_norm)
    return f"{share} ‖W₀‖" if share.endswith("times") else f"{share} of ‖W₀‖"


def _percent(share: float) -> str:
    """``0.0123 %``; what is smaller than a millionth by its power of ten, what is nearly all with the digits that say
    so, and what is 100 or more in times."""
    if not math.isfinite(share):
        return "-"
    if share >= 100:
        return f"{three_digits(share) if share < 1e6 else f'{share:.2e}'} times"
    if 0 < share < 1e-6:
        return f"{100 * share:.0e} %"
    if 0.9995 <= share < 1:
        missing = f"{100 * (1 - share):.1g}"
        return f"{100 - float(missing):.{max(len(missing) - 2, 0)}f} %" if "e" not in missing else "> 99.999 %"
    return f"{three_digits(100 * share)} %"


# --- terminal, page, files --------------------------------------------------------------------------------------------


def print_drift(drift: Drift, out: Path | None = None, console: Console | None = None) -> None:
    """Print the findings. ``out`` is the folder that holds the files; ``console`` defaults to standard output."""
    show = printer(console)
    show(Text(TITLE, style="bold"))
    show(Text(context_of(drift)))
    for clip in drift.settings.clips:
        show(Text())
        for sentence in findings(drift, clip):
            show(Text(textwrap.fill(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ")))
        show(Text())
        show(_table(format_rows(drift, clip)))
    show(Text())
    show(Text(textwrap.fill(CAVEAT, WIDTH)))
    if out is not None:
        show(Text(f"Results: {out / 'README.md'}", style="bold"))


def _table(rows: Sequence[FormatRow]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, show_edge=False, pad_edge=False)
    for name in HEADER:
        table.add_column(name, justify="left" if name == HEADER[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.cells[0], style=FORMAT_STYLES[row.name].color), *map(Text, row.cells[1:]))
    return table


def page(drift: Drift, caption: str, provenance: Mapping[str, object]) -> str:
    """Findings, tables, figure and terms in Markdown."""
    lines = [f"# {TITLE}", "", context_of(drift), ""]
    for clip in drift.settings.clips:
        words = clip_title(drift, clip)
        lines += [f"## {words[0].upper() + words[1:]}", ""]
        lines += [f"- {sentence}" for sentence in findings(drift, clip)]
        lines += ["", table_row(*HEADER), table_row("---", *["---:"] * (len(HEADER) - 1))]
        lines += [table_row(*of_format.cells) for of_format in format_rows(drift, clip)]
        lines += [""]
    lines += ["## Figure", "", f"![{TITLE}](drift.png)", "", f"{caption} ([SVG](drift.svg), [data](drift.csv))", ""]
    lines += [f"> {CAVEAT}", "", "## Terms", "", table_row("term", "meaning"), table_row("---", "---")]
    lines += [table_row(*term) for term in TERMS]
    lines += ["", "## Where this comes from", "", "| | |", "| --- | --- |"]
    lines += [table_row(key.replace("_", " "), f"`{value}`") for key, value in provenance.items()]
    return "\n".join(lines) + "\n"


def write_drift(drift: Drift, out: Path, *, command: str, version: str) -> None:
    """Write ``drift.csv``, ``drift.png``, ``drift.svg``, ``README.md`` and ``summary.json`` to the folder ``out``, all
    of them or none.

    Raises:
        ConfigError: ``out`` cannot be written or holds something else than results of ours.
    """
    provenance = {"ttt_sim_version": version, "command": command}
    with replaced_folder(out) as folder:
        rendered = render("drift", partial(drift_figure, drift), folder)
        (folder / "README.md").write_text(page(drift, rendered.caption, provenance), encoding="utf-8", newline="\n")
        write_summary(folder, {**_summary(drift), "provenance": provenance})


def _summary(drift: Drift) -> dict[str, object]:
    s = drift.settings
    ends = [rows_of(drift, name, clip).iloc[-1].to_dict() for clip in s.clips for name in s.formats]
    return {
        "settings": {
            "tokens": s.tokens, "width": s.width, "ff": s.ff, "chunk": s.chunk, "rate": s.rate, "clips": list(s.clips),
            "formats": list(s.formats), "seed": s.seed,
        },
        "n_chunks": s.n_chunks,
        "start_norm": drift.start_norm,
        "clips": [
            {"clip": clip, "first_step": drift.first_step[clip], "clipped_chunks": drift.clipped_chunks[clip]}
            for clip in s.clips
        ],
        "ends": plain(ends),
        "caveat": CAVEAT,
    }  # fmt: skip
