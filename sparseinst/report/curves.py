"""Draw training curves from the metrics that runs write during training. Imports no torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparseinst.checked import read_json_lines
from sparseinst.errors import UserError
from sparseinst.nested import flatten
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths
from sparseinst.report import style

_LINES = ("-", "--", ":", "-.")
_PANELS = {
    "loss": "training loss (weighted sum)",
    "learning_rate": "learning rate",
    "AP": "mask AP (%)",
    "prefers_own": "maps that prefer their own object (%)",
    "own": "mass of maps on their own object (%)",
    "border": "mass of maps on the border (%)",
    "matching_stability": "objects matched as before (%)",
}
_SHARES = ("prefers_own", "own", "border")
"""These metrics are stored as shares of 1 and drawn in percent, as the others are."""


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


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return a name for each run: the one that it has, or else its folder's, or the path if several folders have this name."""
    folders = Counter(run.resolve().name for run in runs)
    names = []
    for run in runs:
        folder = run.resolve().name
        unnamed = folder if folders[folder] == 1 else str(run)
        names.append(RunPaths(run).title() if RunPaths(run).name.exists() else unnamed)
    return names


def different_losses(runs: Sequence[Path]) -> list[str]:
    """Return the settings of the loss in which runs differ, by dotted path. Runs without a readable config are left out."""
    losses = []
    for run in runs:
        try:
            losses.append(flatten(load_config(RunPaths(run).config).loss.model_dump(), "loss."))
        except UserError:
            continue
    return [name for name in (losses[0] if losses else ()) if any(loss[name] != losses[0][name] for loss in losses)]


@style.styled
def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], different: Sequence[str] = ()) -> Figure:
    """Draw the loss, its parts, the learning rate and the metrics of evaluations in panels, with a line for each run.

    Args:
        runs: the entries of each run as `read_metrics` returns them, by the run's name.
        different: the settings of the loss in which the runs differ, for a note, see `different_losses`.
    """
    every = [entry for entries in runs.values() for entry in entries]
    parts = list(dict.fromkeys(name for entry in every for name in entry if name.startswith("loss_")))
    named = {name: f"{name.removeprefix('loss_')} loss (weighted)" for name in parts}
    wanted = {"loss": _PANELS["loss"], **named, **_PANELS}
    panels = {name: text for name, text in wanted.items() if any(entry.get(name) is not None for entry in every)}
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(10, 1.1 + 2.3 * rows + 0.18 * len(runs)), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False).flatten()
    for axes, (name, text) in zip(grid, panels.items(), strict=False):
        for index, entries in enumerate(runs.values()):
            _draw_line(axes, entries, name, index)
        axes.set_title(text, loc="left", fontsize=9)
        axes.set_xlabel("step")
        axes.grid()
        highest = axes.dataLim.y1
        axes.set_ylim(0, 1.12 * highest if highest > 0 else 1)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = [grid[0].lines[index] for index in range(len(runs))]
    figure.legend(handles, list(runs), loc="outside upper left")
    if different:
        text = (
            f"The runs differ in {', '.join(different)}, so their losses are sums of different terms: compare their AP instead."
        )
        figure.supxlabel(textwrap.fill(text, 120), fontsize=8, x=0.01, ha="left", color="0.35")
    return figure


def _draw_line(axes: Axes, entries: Sequence[Mapping[str, Any]], name: str, index: int) -> None:
    scale = 100 if name in _SHARES else 1
    points = [(entry["iteration"], scale * entry[name]) for entry in entries if entry.get(name) is not None]
    few = len(points) < 30
    colour, dashes = style.COLOURS[index % len(style.COLOURS)], _LINES[index // len(style.COLOURS) % len(_LINES)]
    options: dict[str, Any] = {"color": colour, "ls": dashes}
    x, y = [step for step, _ in points], [value for _, value in points]
    [line] = axes.plot(x, y, marker="o" if few else "", ms=3, lw=1.2, **options)
    line.set_clip_on(False)  # a marker at zero is drawn as a whole
    line.set_in_layout(False)  # an unclipped line would otherwise push the panels apart
