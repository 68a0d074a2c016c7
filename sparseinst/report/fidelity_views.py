"""Show how far a profile orders the rows as the paper does: as JSON, in the terminal and as a plot. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparseinst.report import style
from sparseinst.report.fidelity import CLEAR, Agreement, Fidelity, paper_difference

_LISTED = 12


def as_json(found: Fidelity) -> dict[str, Any]:
    """Return the agreement as plain data for scripts: over all pairs, and under `clear` over pairs of 0.5 AP or more."""

    def both(pair: tuple[Agreement, Agreement]) -> dict[str, Any]:
        return {**pair[0].as_json(), "clear": pair[1].as_json()}

    return {
        "profile": found.profile,
        "rows": len(found.ranks),
        "missing": found.missing,
        **both((found.all, found.clear)),
        "clear_from": CLEAR,
        "trained": both(found.trained),
        "not_trained": {rank.name: list(rank.doubts) for rank in found.ranks if not rank.trained},
        "tables": {name: both(pair) for name, pair in found.tables.items()},
        "steps": {str(step): both(pair) for step, pair in found.steps.items()},
        "disagreements": [
            {
                "higher": a.name,
                "lower": b.name,
                "paper": paper_difference((a, b)),
                "measured": round(a.measured.mean - b.measured.mean, 3),
            }
            for a, b in found.disagreements
        ],
    }


def show(found: Fidelity) -> None:
    """Print the agreement as a table, then the disagreements and the rows that are not measured yet."""
    title = f"Does the profile {found.profile} order the rows as the paper does? {len(found.ranks)} distinct rows"
    table = Table(title=title, title_justify="left")
    table.add_column("pairs of")
    for name in ("all: agree", "95 %", "tau", f"{CLEAR} AP or more: agree", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    untrained = [rank for rank in found.ranks if not rank.trained]
    lines = {"all tables": (found.all, found.clear)}
    if untrained:
        lines["all tables, trained rows"] = found.trained
    lines |= found.tables
    followed = sum(bool(rank.history) for rank in found.ranks)
    rows = f"{followed} rows" if followed < len(found.ranks) else "all tables"
    lines |= {f"{rows}, after {step:,} steps": pair for step, pair in found.steps.items()}
    for name, (every, clear) in lines.items():
        tau = f"{every.tau:+.2f}" if every.tau is not None else "-"
        all_cells = _share_text(every), _interval_text(every.interval), tau
        table.add_row(escape(name), *all_cells, _share_text(clear), _interval_text(clear.interval))
    Console(width=max(Console().width, 110)).print(table)
    print("Rows that are equal in the paper are no pair. tau is Kendall's rank correlation: 1 is the paper's order, 0 no")
    print(
        "relation, -1 the reverse. The lines with a number of steps use the evaluations during training, which have fewer images."
    )
    if found.typical is None:
        print("There is no interval, because no row has several seeds yet.")
    else:
        noise = f"{found.typical.deviation:.1f} AP"
        print(f"95 %: the interval over the noise of seeds. For rows with one seed this is the noise of a typical row, {noise}.")
        print("The interval lies below the count, because noise makes an order random.")
    for first, second in found.disagreements[:_LISTED]:
        paper, here = paper_difference((first, second)), first.measured.mean - second.measured.mean
        print(f"- {first.name} is above {second.name} in the paper ({paper:+.1f}), but not here ({here:+.1f})")
    if len(found.disagreements) > _LISTED:
        print(f"- {len(found.disagreements) - _LISTED} more pairs have the other order; --json lists all of them")
    for rank in untrained:
        print(f"Not trained: {rank.name} ({'; '.join(dict.fromkeys(rank.doubts))})")
    if found.missing:
        print(f"Not measured yet: {', '.join(found.missing)}.")


def _share_text(found: Agreement) -> str:
    return f"{100 * found.share:.0f} % ({found.agree} of {found.pairs})" if found.share is not None else "-"


def _interval_text(interval: tuple[float, float] | None) -> str:
    return f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f}" if interval is not None else ""


@style.styled
def draw(found: Fidelity, provenance: Iterable[str] = ()) -> Figure | None:
    """Draw each pair of rows as a point: its difference in the paper and its difference here. None if there is no pair."""
    if found.all.pairs == 0:
        return None
    figure, axes = style.new(6.5, 5)
    pairs = [
        (paper_difference((a, b)), a.measured.mean - b.measured.mean, a.trained and b.trained)
        for a, b in itertools.combinations(sorted(found.ranks, key=lambda r: -r.paper), 2)
        if paper_difference((a, b)) > 0
    ]
    for trained, alpha in ((True, 0.8), (False, 0.25)):
        for agrees, colour, mark, order in (
            (True, style.COLOURS[0], "o", "same order"),
            (False, style.COLOURS[1], "x", "other order"),
        ):
            points = [(x, y) for x, y, both in pairs if (y > 0) == agrees and both == trained]
            if not points:
                continue
            label = f"{order}: {len(points)} pairs" + ("" if trained else " with a row that is not trained")
            options: dict[str, Any] = {"marker": mark, "ls": "", "color": colour, "ms": 4, "alpha": alpha}
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, **options)
    axes.axhline(0, color="0.4", lw=0.8)
    axes.axvline(CLEAR, color="0.4", lw=0.8, ls=":")
    axes.annotate(
        f"{CLEAR} AP", (CLEAR, 1), (2, -2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top", size=7
    )
    axes.set(
        xlabel="difference of two rows in mask AP, the paper on COCO (logarithmic from 2)",
        ylabel=f"the same two rows at {found.profile} scale (logarithmic from 5)",
    )
    axes.set_yscale("symlog", linthresh=5)
    axes.set_xscale("symlog", linthresh=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
        axis.set_major_formatter(style.signed)
    axes.grid()
    style.finish(axes, f"Does the profile {found.profile} order the rows as the paper does?", list(provenance), columns=2)
    return figure


def fidelity_file(results: Path, profile: str) -> Path:
    """Return the path of the plot as SVG; the PNG has the same name and lies beside it."""
    return results / "figures" / f"fidelity-{profile}.svg"
