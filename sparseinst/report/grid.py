"""Lay out a table's results as people read them: titles of columns, and rows of texts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sparseinst.ablation.peers import PeerResult
from sparseinst.ablation.statistics import Difference
from sparseinst.ablation.study import Figure
from sparseinst.report.collect import Cell, TableResult
from sparseinst.report.records import EVALUATED, Column

IMAGES_ALONE = "†"
"""This sign marks an interval that covers the noise of images alone, because too few rows have several seeds."""
SEEDS_ALONE = "‡"
"""This sign marks an interval that covers the noise of seeds alone, because an evaluation has no resamplings of the images."""
ONE_SEED = "(one seed)"
"""These words stand in place of an interval if a row has one seed."""
DIFFERENCE, PAPER_DIFFERENCE, VERDICT = "difference in AP", "in the paper", "verdict"
AS_RUN = "as run"
"""The titles of the columns that a report adds to those of the spec."""


class Grid(NamedTuple):
    """A table of texts."""

    titles: list[str]
    """The titles of the columns."""
    rows: list[list[str]]
    """One text for each column."""


def grid(result: TableResult) -> Grid:
    """Return the table as people read it: the rows that were run, then other systems' measured rows, then the quoted ones.

    The comparison with the reference row comes first, then the measured values, then the paper's in columns of their own.
    """
    spec = result.table.spec
    compares = spec.reference is not None and Column("AP") in result.columns
    sizes = {row.as_run for row in result.rows}
    in_paper = [column for column in result.columns if any(row.cells[column].paper is not None for row in result.rows)]
    papers = {paper_title(column): column for column in in_paper}
    rows = []
    for entry in result.rows:
        cells = {name: str(entry.row.labels.get(name, "")) for name in spec.columns}
        if result.profile != "coco" and len(sizes) > 1:
            cells[AS_RUN] = entry.as_run
        if compares:
            ap = entry.cells[Column("AP")]
            cells[DIFFERENCE] = _interval(ap.difference) if entry.row.name != spec.reference else "reference"
            cells[PAPER_DIFFERENCE] = f"{entry.paper_difference:+.1f}" if entry.paper_difference is not None else ""
            cells[VERDICT] = entry.verdict
        cells |= {column.title: _cell(entry.cells[column], entry.state_of(column.metric), column) for column in result.columns}
        cells |= {title: _paper_value(entry.cells[column].paper) for title, column in papers.items()}
        rows.append(cells)
    for peer in result.peers:
        cells = {spec.columns[0]: peer.name, "size": str(peer.short_side)}
        cells = {name: text for name, text in cells.items() if name in spec.columns}
        cells |= {column.title: _peer_cell(peer, column) for column in result.columns}
        rows.append(cells)
    # At another scale than the paper's, no value of COCO may share a column with ours.
    for quoted in spec.quoted if result.profile == "coco" else ():
        cells = {name: str(quoted.labels.get(name, "")) for name in spec.columns}
        for column in result.columns:
            value = _quoted_value(quoted.figures, column.metric)
            mark = f" [{quoted.protocol}]" if column.metric not in EVALUATED else ""
            cells[column.title] = f"quoted {value:.1f}{mark}" if value is not None else ""
        rows.append(cells)
    titles = list(dict.fromkeys(title for cells in rows for title in cells))
    return Grid(titles, [[cells.get(title, "") for title in titles] for cells in rows])


def paper_title(column: Column) -> str:
    """Return the title of the column with the paper's values of a metric."""
    return f"paper: {column.metric}"


def _paper_value(value: float | None) -> str:
    return f"{value:.1f}" if value is not None else ""


def _cell(cell: Cell, state: str, column: Column) -> str:
    digits = 1 if column.metric in (*EVALUATED, "FPS") else 2
    if cell.measured is None:
        return "-" if state == "done" else state
    measured = f"{cell.measured.mean:.{digits}f}"
    if cell.measured.deviation is not None:
        measured += f" ± {cell.measured.deviation:.{digits}f} ({len(cell.measured.values)})"
    if cell.spread is not None:
        measured += f" ({cell.spread[0]:.{digits}f}-{cell.spread[1]:.{digits}f})"
    return measured


def _peer_cell(peer: PeerResult, column: Column) -> str:
    if column.metric in EVALUATED:
        value = peer.figures.get(column.metric)
    else:
        median = peer.whole_ms.get(column.device or "")
        value = {"ms": median, "FPS": 1000 / median if median else None}.get(column.metric)
    return f"measured {value:.1f}" if value is not None else ""


def _quoted_value(values: Mapping[Figure, float], metric: Figure) -> float | None:
    """Return a quoted value; milliseconds and images per second are computed from each other. None if it is not quoted."""
    known = dict(values)
    if "ms" in values:
        known.setdefault("FPS", 1000 / values["ms"])
    if "FPS" in values:
        known.setdefault("ms", 1000 / values["FPS"])
    return known.get(metric)


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.guessed:
        return f"{difference.value:+.1f} {ONE_SEED}"
    text = f"{difference.value:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
    if not difference.seeds_known:
        return f"{text} {IMAGES_ALONE}"
    return text if difference.complete else f"{text} {SEEDS_ALONE}"
