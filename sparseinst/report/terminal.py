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
from sparseinst.report.grid import AS_RUN, DIFFERENCE, PAPER_DIFFERENCE, VERDICT, grid
from sparseinst.report.tables import notes

WIDTH = 100
"""The width in characters that a table may have on any terminal."""
_KEPT_LONGEST = (AS_RUN, "AP", "prefers_own", DIFFERENCE, VERDICT, PAPER_DIFFERENCE)
"""On a narrow terminal, these columns are left out after all others, the last one of them first."""


def print_table(result: TableResult) -> None:
    """Print the table and its notes. Columns that do not fit are named below the table."""
    titles, rows = grid(result)
    width = max(Console().width, WIDTH)
    shown = list(range(len(titles)))
    while len(shown) > 1 and _width(_as_table(titles, rows, shown, result)) > width:
        shown.remove(_next_to_leave(titles, shown, len(result.table.spec.columns)))
    Console(width=width).print(_as_table(titles, rows, shown, result))
    left_out = [_short(title) for number, title in enumerate(titles) if number not in shown]
    lines = notes(result)
    if left_out:
        lines = [f"Not shown, because the terminal is too narrow: {', '.join(left_out)}. The written table has them.", *lines]
    for line in lines:
        print(textwrap.fill(line, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False))


def _next_to_leave(titles: Sequence[str], shown: Sequence[int], labels: int) -> int:
    """Return the column to leave out: the last one that is not kept longer. The labels of the rows, the first columns, stay."""

    def order(number: int) -> tuple[int, int]:
        title = titles[number]
        kept = _KEPT_LONGEST.index(title) if title in _KEPT_LONGEST else len(_KEPT_LONGEST)
        return (-1 if number < labels else kept, number)

    return max(shown, key=order)


def _short(title: str) -> str:
    return "paper's" if title == PAPER_DIFFERENCE else title


def _as_table(titles: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int], result: TableResult) -> Table:
    """Return the shown columns of the rows.

    Args:
        shown: the numbers of the columns.
    """
    title = escape(f"{result.table.spec.title} ({result.profile})")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    labels = len(result.table.spec.columns)
    for number in shown:
        table.add_column(escape(_short(titles[number])), justify="left" if number < labels else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(row[number]) for number in shown))
    return table


def _width(table: Table) -> int:
    """Return the width that a table needs without its title."""
    table.title = None
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum
