"""Print a table's results on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from sparseinst.report.collect import TableResult
from sparseinst.report.grid import PAPER_DIFFERENCE, grid
from sparseinst.report.tables import notes

WIDTH = 100
"""The width in characters that a table may have on any terminal."""


def print_table(result: TableResult) -> None:
    """Print the table and its notes. Columns that do not fit are named below the table."""
    titles, rows = grid(result)
    titles = ["paper's" if title == PAPER_DIFFERENCE else title for title in titles]
    width = max(Console().width, WIDTH)
    shown = len(titles)
    while shown > 1 and _width(_as_table(titles[:shown], rows, result)) > width:
        shown -= 1
    Console(width=width).print(_as_table(titles[:shown], rows, result))
    left_out = titles[shown:]
    lines = notes(result)
    if left_out:
        lines = [f"Not shown, because the terminal is too narrow: {', '.join(left_out)}. The written table has them.", *lines]
    for line in lines:
        print(textwrap.fill(line, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False))


def _as_table(titles: Sequence[str], rows: Sequence[Sequence[str]], result: TableResult) -> Table:
    """Return the first columns of the rows, one for each title."""
    title = escape(f"{result.table.spec.title} ({result.profile})")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    labels = len(result.table.spec.columns)
    for number, title_of_column in enumerate(titles):
        table.add_column(escape(title_of_column), justify="left" if number < labels else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row[: len(titles)]))
    return table


def _width(table: Table) -> int:
    """Return the width that a table needs without its title."""
    table.title = None
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum
