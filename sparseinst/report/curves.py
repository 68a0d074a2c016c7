"""Training curves, from what runs wrote while they went. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparseinst.errors import UserError
from sparseinst.paths import RunPaths
from sparseinst.report import style

_LINES = ("-", "--", ":", "-.")
_PANELS = {
    "loss": "training loss (weighted sum)",
    "learning_rate": "learning rate",
    "AP": "mask AP (%)",
    "matching_stability": "objects matched as before (%)",
}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """What a run wrote, one entry a line. A last line that is not finished yet is left out.

    Raises:
        UserError: no run is there, or a line is broken.
    """
    path = RunPaths(run).metrics
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no run's folder, {path.name} is missing") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
                raise ValueError("no step")
            entries.append(entry)
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is broken") from None
    if not any("loss" in entry for entry in entries):
        raise UserError(f"{path}: no step is noted yet")
    return entries


@style.styled
def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Panels side by side: the loss, each of its parts, the learning rate, and what evaluations told; a line a run.

    Args:
        runs: by name, entries as `read_metrics` gives them.
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
            _line(axes, entries, name, index)
        axes.set(ylabel=text, xlabel="step")
        axes.grid()
        axes.set_ylim(bottom=0)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = [grid[0].lines[index] for index in range(len(runs))]
    figure.legend(handles, list(runs), loc="outside upper left")
    return figure


def _line(axes: Axes, entries: Sequence[Mapping[str, Any]], name: str, index: int) -> None:
    known = [(entry["iteration"], entry[name]) for entry in entries if entry.get(name) is not None]
    few = len(known) < 30
    colour, dashes = style.COLOURS[index % len(style.COLOURS)], _LINES[index // len(style.COLOURS) % len(_LINES)]
    look: dict[str, Any] = {"color": colour, "ls": dashes}
    axes.plot([x for x, _ in known], [y for _, y in known], marker="o" if few else "", ms=3, lw=1.2, **look)
