"""Printing of summaries: no line longer than a page is wide, plain text where there is no terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 100


def printer(console: Console | None) -> Callable[[Text | Table], None]:
    """What prints one text or table to ``console``, None for standard output, in at most :data:`WIDTH` columns.

    Colours follow the console: none without a terminal or with ``NO_COLOR``.
    """
    console = console or Console(highlight=False, width=None if Console().is_terminal else WIDTH)
    return partial(console.print, width=min(console.width, WIDTH), highlight=False)


def hanging(mark: str, sentence: str) -> Text:
    """A paragraph whose lines start under its first word."""
    return Text(
        textwrap.fill(sentence, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False)
    )
