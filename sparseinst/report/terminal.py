"""Print a table's results on the terminal."""

from __future__ import annotations

import textwrap

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from sparseinst.report.collect import TableResult
from sparseinst.report.tables import PAPER_DIFFERENCE, frame, notes

WIDTH = 100
"""The width in characters that a table may have on any terminal."""


def print_table(result: TableResult) -> None:
    """Print the table and its notes. Columns that do not fit are named below the table."""
    data = frame(result).rename(columns={PAPER_DIFFERENCE: "paper's"})
    width = max(Console().width, WIDTH)
    shown = len(data.columns)
    while shown > 1 and _width(_as_table(data.iloc[:, :shown], result)) > width:
        shown -= 1
    Console(width=width).print(_as_table(data.iloc[:, :shown], result))
    left_out = list(data.columns[shown:])
    lines = notes(result)
    if left_out:
        lines = [f"Not shown, because the terminal is too narrow: {', '.join(left_out)}. The written table has them.", *lines]
    for line in lines:
        print(textwrap.fill(line, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False))


def _as_table(data: pd.DataFrame, result: TableResult) -> Table:
    title = escape(f"{result.table.spec.title} ({result.profile})")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    labels = len(result.table.spec.columns)
    for number, column in enumerate(data.columns):
        table.add_column(escape(str(column)), justify="left" if number < labels else "right", no_wrap=True)
    for row in data.itertuples(index=False):
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _width(table: Table) -> int:
    """Return the width that a table needs without its title."""
    table.title = None
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum
