"""Pieces of pages in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from ttt_sim.report.figures import Rendered


def table_row(*cells: str) -> str:
    """A line of a table; what would end a cell or the line is written so that it does not."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def figure_lines(figures: Iterable[Rendered]) -> list[str]:
    """Each figure under its title, with its caption and the files behind it."""
    lines = []
    for figure in figures:
        lines += [
            f"### {figure.title}", "", f"![{figure.name}](figures/{figure.name}.png)", "",
            f"{figure.caption} ([SVG](figures/{figure.name}.svg), [data](figures/{figure.name}.csv))", "",
        ]  # fmt: skip
    return lines
