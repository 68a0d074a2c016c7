"""Estimate before training which differences a number of seeds can settle. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparseinst.ablation.statistics import FALSE_DISCOVERIES, Difference, SeedNoise, TypicalNoise
from sparseinst.report.collect import TableResult
from sparseinst.report.records import Column
from sparseinst.words import counted, three_digits

SIZES = (0.5, 1.0, 2.0)
"""The differences in AP for which the table lists how many seeds they need."""
MOST_SEEDS = 200
_AP = Column("AP")


@dataclass(frozen=True)
class RowPower:
    """The differences that one comparison can settle, and the seeds that they need."""

    table: str
    row: str
    paper: float | None
    """The paper's difference; None if it has none."""
    noise: tuple[float, ...]
    """The assumed standard deviations of AP over seeds, of the row and of the reference row; empty if they are unknown. Two rows
    that evaluate the same trainings have one, that of their differences."""
    detectable: float | None
    """The smallest difference that the planned seeds settle with 80 % power; None for one seed, which settles nothing, and if the
    noise of seeds is unknown."""
    seeds_for: dict[str, int | None]
    """How many seeds each of the two rows needs to settle a difference of `SIZES` and, under `paper`, the paper's difference.
    None if up to `MOST_SEEDS` do not settle it, or if something is unknown."""
    hours_for: dict[str, float | None]
    """The hours of all runs of both rows with so many seeds, by the keys of `seeds_for`, also of runs that are done already. None
    if the number of seeds or the cost is unknown."""
    floor: float | None
    """The smallest difference that can be settled with these validation images, however many seeds there are; None if it is
    unknown."""

    def as_json(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "row": self.row,
            "paper": self.paper,
            "noise": [_rounded(deviation) for deviation in self.noise],
            "detectable": _rounded(self.detectable),
            "seeds_for": self.seeds_for,
            "floor": _rounded(self.floor),
            "hours_for": {name: _rounded(hours) for name, hours in self.hours_for.items()},
        }


def power(
    results: Sequence[TableResult], typical: TypicalNoise | None, seeds: int, hours_per_seed: float | None
) -> list[RowPower]:
    """Return which differences each comparison of the tables can settle.

    The comparisons of a table share the false discovery rate. The worst case is assumed: no other one is settled.

    Args:
        typical: the noise of AP over seeds of a typical row; None if no row has several seeds yet.
        seeds: the planned number of seeds of each row.
        hours_per_seed: the cost of a training with its evaluation.
    """
    differences = [row.cells[_AP].difference for result in results for row in result.rows if _AP in row.cells]
    errors = [found.image_error for found in differences if found is not None and found.image_error is not None]
    mean_error = sum(errors) / len(errors) if errors else None
    lines = []
    for result in results:
        trainings = {row.row.name: row.trainings for row in result.rows}
        for row in result.rows:
            if row.row.name == result.table.spec.reference or result.table.spec.reference is None or _AP not in row.cells:
                continue
            difference = row.cells[_AP].difference
            image_error = difference.image_error if difference is not None and difference.image_error is not None else mean_error
            # Two rows that evaluate the same trainings differ by less than two trainings, with one seed nobody knows by how much.
            shared = bool(row.trainings) and row.trainings == trainings.get(result.table.spec.reference)
            variances = _variances(difference, None if shared else typical)
            margin = result.table.spec.margin
            level = FALSE_DISCOVERIES / (len(result.table.spec.rows) - 1)
            needed = {f"{size:g}": _seeds_for(size, variances, image_error, level) for size in SIZES}
            needed["paper"] = _seeds_for(row.paper_difference, variances, image_error, level, margin)
            lines.append(
                RowPower(
                    result.table.name,
                    row.row.name,
                    row.paper_difference,
                    tuple(math.sqrt(variance) for variance in variances),
                    _detectable(variances, seeds, image_error, level / 2) if variances and seeds > 1 else None,
                    needed,
                    {name: _hours(count, len(variances), hours_per_seed) for name, count in needed.items()},
                    Difference(0.0, (), image_error).reach(level / 2) if image_error is not None else None,
                )
            )
    return lines


def _variances(difference: Difference | None, typical: TypicalNoise | None) -> list[float]:
    """Return the variances over seeds that plans assume for both rows, or nothing if no row has several seeds.

    For two rows that evaluate the same trainings, the only entry is the variance of their differences.
    """
    if difference is not None and difference.rows:
        return [row.expected for row in difference.rows]
    return [typical.variance] * 2 if typical is not None else []


def _hours(seeds: int | None, rows: int, hours_per_seed: float | None) -> float | None:
    return rows * seeds * hours_per_seed if seeds is not None and hours_per_seed is not None else None


def _detectable(variances: Sequence[float], seeds: int, image_error: float | None, level: float) -> float:
    """Return the smallest difference that a one-sided test at this level settles."""
    rows = tuple(SeedNoise(variance, seeds - 1, seeds) for variance in variances)
    return Difference(0.0, rows, image_error).reach(level)


def _seeds_for(
    size: float | None, variances: Sequence[float], image_error: float | None, level: float, margin: float = 0.0
) -> int | None:
    """Return how many seeds of each row settle a difference; None if up to `MOST_SEEDS` do not, or if something is unknown.

    Args:
        level: of the test.
        margin: a difference below the margin is tested for equivalence, and any other for its sign.
    """
    if size is None or not variances:
        return None
    equivalence = abs(size) < margin
    distance = margin - abs(size) if equivalence else abs(size)
    tail = level if equivalence else level / 2
    fits = (seeds for seeds in range(2, MOST_SEEDS + 1) if _detectable(variances, seeds, image_error, tail) <= distance)
    return next(fits, None)


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if value is not None else None


def show(found: Sequence[RowPower], seeds: int, unit: str) -> None:
    """Print what each comparison can settle."""
    table = Table(title=f"What {counted(seeds, 'seed')} of each row can settle, with 80 % power", title_justify="left")
    for name in ("table", "row"):
        table.add_column(name)
    for name in ("noise", "detectable", *(f"{size:g} AP" for size in SIZES), "paper's", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in found:
        needed = [_with_hours(line, name) for name in (*(f"{size:g}" for size in SIZES), "paper")]
        if line.paper is not None:
            needed[-1] = f"{line.paper:+.1f}: {needed[-1]}"
        noise = ", ".join(f"{deviation:.1f}" for deviation in line.noise) or "-"
        cells = (noise, _text(line.detectable), *needed, _text(line.floor))
        table.add_row(line.table, escape(line.row), *cells)
    Console(width=max(Console().width, 110)).print(table)
    sizes = ", ".join(f"{size:g}" for size in SIZES)
    print(
        "Noise: the standard deviations of AP over seeds that are assumed, of the row and of the reference row. With few seeds,"
    )
    print("the estimate leans on the typical noise of the rows of the profile, and with one seed it is this noise.")
    print("Detectable: the smallest difference in AP that these seeds settle.")
    print(f"{sizes} AP and paper's: how many seeds each of the two rows needs to settle such a difference. The verdicts of a")
    print("report state the seeds for the difference that is measured, which can be far from the paper's.")
    if any(hours is not None for line in found for hours in line.hours_for.values()):
        print(f"In brackets: the cost of all runs of both rows with so many seeds, in {unit}.")
    print("Floor: the smallest difference that can be settled with these validation images, however many seeds there are.")
    print("All comparisons of a table share a false discovery rate of 5 %; the numbers assume that no other one is settled.")
    print("-: unknown.")
    if seeds == 1:
        print("One seed of each row settles nothing, because it does not show the row's own noise.")
    elif not any(line.noise for line in found):
        print("The noise of seeds is unknown until one row of this profile has two seeds.")
    elif not all(line.noise for line in found):
        print("A row that evaluates the trainings of the reference row needs two seeds before its noise is known.")


def _with_hours(line: RowPower, name: str) -> str:
    seeds, hours = line.seeds_for[name], line.hours_for[name]
    if seeds is None and line.noise and (name != "paper" or line.paper is not None):
        return f"> {MOST_SEEDS}"
    return _text(seeds) if hours is None else f"{seeds} ({three_digits(hours)})"


def _text(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
