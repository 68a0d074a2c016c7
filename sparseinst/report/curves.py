"""Draw training curves from the metrics that runs write during training. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparseinst.checked import read_json_lines
from sparseinst.errors import UserError
from sparseinst.paths import RunPaths
from sparseinst.report import style

_LINES = ("-", "--", ":", "-.")
_PANELS = {
    "loss": "training loss (weighted sum)",
    "learning_rate": "learning rate",
    "AP": "mask AP (%)",
    "prefers_own": "maps that prefer their own object",
    "own": "mass of the maps on their own object",
    "border": "mass of the maps on the border",
    "matching_stability": "objects matched as before (%)",
}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's metrics file, one for each line. Damaged lines are left out, with a warning.

    Args:
        run: the run's folder.

    Raises:
        UserError: the folder has no metrics file, or no step is recorded yet.
    """
    path = RunPaths(run).metrics
    try:
        entries = read_json_lines(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: this is not the folder of a run, because {path.name} is missing") from None
    if not any("loss" in entry for entry in entries):
        raise UserError(f"{path}: no step is recorded yet")
    return entries


@style.styled
def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw the loss, its parts, the learning rate and the metrics of evaluations in panels, with a line for each run.

    Args:
        runs: the entries of each run as `read_metrics` returns them, by the run's name.
    """
    parts = list(
        dict.fromkeys(name for entries in runs.values() for entry in entries for name in entry if name.startswith("loss_"))
    )
    named = {name: f"{name.removeprefix('loss_')} loss (weighted)" for name in parts}
    wanted = {"loss": _PANELS["loss"], **named, **_PANELS}
    panels = {name: text for name, text in wanted.items() if any(name in entry for entries in runs.values() for entry in entries)}
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(10, 1.1 + 2.3 * rows + 0.18 * len(runs)), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False).flatten()
    for axes, (name, text) in zip(grid, panels.items(), strict=False):
        for index, entries in enumerate(runs.values()):
            _draw_line(axes, entries, name, index)
        axes.set_title(text, loc="left", fontsize=9)
        axes.set_xlabel("step")
        axes.grid()
        axes.set_ylim(bottom=0)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = [grid[0].lines[index] for index in range(len(runs))]
    figure.legend(handles, list(runs), loc="outside upper left")
    return figure


def _draw_line(axes: Axes, entries: Sequence[Mapping[str, Any]], name: str, index: int) -> None:
    points = [(entry["iteration"], entry[name]) for entry in entries if entry.get(name) is not None]
    few = len(points) < 30
    colour, dashes = style.COLOURS[index % len(style.COLOURS)], _LINES[index // len(style.COLOURS) % len(_LINES)]
    options: dict[str, Any] = {"color": colour, "ls": dashes}
    axes.plot([x for x, _ in points], [y for _, y in points], marker="o" if few else "", ms=3, lw=1.2, **options)
