"""Name the plots of a table and their files, without drawing. Imports neither torch nor matplotlib, which takes half a second."""

from __future__ import annotations

from sparseinst.ablation.study import LatencyFigure
from sparseinst.report.collect import TableResult

MODULES: tuple[LatencyFigure, ...] = ("backbone", "encoder", "decoder", "post")


PLOTS = ("speed-accuracy", "modules", "differences")
"""The names of all plots of tables."""
SUFFIXES = (".png", ".svg")
"""The suffixes of a plot's files."""


def figure_texts(result: TableResult) -> dict[str, str]:
    """Return the content of each plot that fits a table in words, for readers who cannot see it, by the plot's name."""
    metrics = set(result.table.spec.figures)
    found: dict[str, str] = {}
    if {"FPS", "AP"} <= metrics:
        found["speed-accuracy"] = "mask AP over milliseconds an image"
    if set(MODULES) <= metrics:
        found["modules"] = "milliseconds of each module"
    if result.table.spec.reference is not None:
        found["differences"] = "differences in AP from the reference row, measured with intervals and the paper's"
    return found


def forest_file(profile: str) -> str:
    """Return the name of the files of the forest plot of a profile, without suffix."""
    return f"forest-{profile}"


def figure_file(result: TableResult, name: str) -> str:
    """Return the name of a plot's files, without suffix."""
    return f"{result.name}-{name}"
