"""Draw all comparisons of a profile in one forest plot. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.axes
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from sparseinst.report import style
from sparseinst.report.collect import RowResult, TableResult, repeated_comparisons
from sparseinst.report.records import Column

_AP = Column("AP")
_MARKS: dict[str, dict[str, Any]] = {
    "same sign, size compatible": {"marker": "o", "color": style.COLOURS[2]},
    "same sign, other size": {"marker": "^", "color": style.COLOURS[0]},
    "opposite sign": {"marker": "X", "color": style.COLOURS[1]},
    "equivalent": {"marker": "s", "color": style.COLOURS[2]},
    "not equivalent": {"marker": "P", "color": style.COLOURS[1]},
    "higher": {"marker": ">", "color": style.COLOURS[0]},
    "lower": {"marker": "<", "color": style.COLOURS[0]},
}
"""The mark of each verdict. Each verdict has its own shape; several verdicts share a colour."""
_OPEN: dict[str, Any] = {"marker": "o", "color": "0.45", "markerfacecolor": "white"}
"""The mark of an undecided comparison."""
_UNTRAINED: dict[str, Any] = {"marker": "x", "color": "0.45"}
"""The mark of a comparison with a row that is not trained."""
_LINEAR = 2.0
"""The axis is linear up to this many AP points from zero, and logarithmic beyond."""


@style.styled
def forest(results: Sequence[TableResult]) -> Figure | None:
    """Draw each distinct comparison with its seeds, its interval, the paper's difference and its verdict. A row with one seed has
    no interval.

    The shape of the mark and a word at the right edge both show the verdict.

    Args:
        results: tables of one profile.

    Returns:
        None if no difference is measured.
    """
    repeated = repeated_comparisons(results)
    groups = [
        (result, [row for row in result.rows if _is_shown(row) and (result.table.name, row.row.name) not in repeated])
        for result in results
    ]
    groups = [(result, rows) for result, rows in groups if rows]
    if not groups:
        return None
    lines = sum(len(rows) + 1 for _, rows in groups)
    figure, axes = style.new(8.5, 2.2 + 0.27 * lines)
    seen: set[str] = set()
    at = 0
    names = []
    for result, rows in groups:
        title = style.short(f"{result.table.spec.title.partition(':')[0]}, from '{result.table.spec.reference}'", 80)
        axes.text(0.01, at, title, transform=axes.get_yaxis_transform(), fontsize=8, fontweight="bold", va="center")
        reference = next(row for row in result.rows if row.row.name == result.table.spec.reference)
        for row in rows:
            at += 1
            names.append((at, row.row.name))
            _draw(axes, row, reference, at, seen)
        at += 1
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_xscale("symlog", linthresh=_LINEAR)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(style.signed)
    axes.set_yticks([y for y, _ in names], [style.short(name) for _, name in names])
    axes.set_ylim(at - 0.3, -0.7)
    axes.grid(axis="x")
    profile = results[0].profile
    axes.set(xlabel=f"difference in mask AP from the reference row; linear up to {_LINEAR:g}, then logarithmic")
    sources = [
        f"Measured at {profile} scale. The tables state the provenance of each row.",
        "The paper: SparseInst, CVPR 2022, on COCO.",
    ]
    style.finish(axes, f"All comparisons ({profile})", sources, columns=3)
    return figure


def _is_shown(row: RowResult) -> bool:
    """Return whether a row has a measured difference."""
    return _AP in row.cells and row.cells[_AP].difference is not None


def _draw(axes: matplotlib.axes.Axes, row: RowResult, reference: RowResult, at: int, seen: set[str]) -> None:
    """Draw one comparison in line `at`. `seen` holds the labels that are in the legend already; the function adds to it."""

    def once(label: str) -> str | None:
        first = label not in seen
        seen.add(label)
        return label if first else None

    cell, base = row.cells[_AP], reference.cells[_AP].measured
    found = cell.difference
    assert found is not None
    assert cell.measured is not None
    assert base is not None
    if len(cell.measured.values) > 1:
        seeds = np.array(cell.measured.values) - base.mean
        axes.plot(seeds, np.full(len(seeds), at), ".", color="0.6", ms=4, label=once("the seeds of a row, one by one"))
    verdict = row.judgement.verdict if row.judgement is not None else ""
    mark = _MARKS.get(verdict, _OPEN) if verdict else _UNTRAINED
    errors = None if found.guessed else [[found.value - found.low], [found.high - found.value]]
    label = once(verdict or "not trained")
    axes.errorbar([found.value], [at], xerr=errors, capsize=2, lw=1.1, ms=5.5, label=label, **mark)
    if row.paper_difference is not None:
        axes.plot([row.paper_difference], [at], label=once("the paper"), **{**style.PAPER, "ls": "", "ms": 4.5})
    axes.text(1.01, at, row.verdict, transform=axes.get_yaxis_transform(), fontsize=7, va="center")
