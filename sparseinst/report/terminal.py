"""Print a table's results on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from sparseinst.report.collect import TableResult
from sparseinst.report.tables import frame, notes


def print_table(result: TableResult) -> None:
    """Print the table and its notes."""
    data = frame(result)
    table = Table(title=f"{result.table.spec.title} ({result.profile})", title_justify="left", show_lines=False)
    labels = len(result.table.spec.columns)
    for number, column in enumerate(data.columns):
        table.add_column(str(column), justify="left" if number < labels else "right", no_wrap=True)
    for row in data.itertuples(index=False):
        table.add_row(*(escape(str(cell)) for cell in row))
    console = Console()
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, width)).print(table)  # a narrow terminal then wraps whole lines, not cells
    for note in notes(result):
        print(f"- {note}")
