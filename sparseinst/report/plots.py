"""Draw the plots of a table's results. The functions change nothing and read no files. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.axes
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from sparseinst.report import style
from sparseinst.report.collect import TableResult
from sparseinst.report.figures import MODULES, figure_texts
from sparseinst.report.records import Column

_QUOTED_MARKS = "s^v<>*"
_PEER_MARKS = "PXhd"
_DEVICE_STYLES: tuple[dict[str, Any], ...] = ({}, {"fillstyle": "left"}, {"fillstyle": "bottom"}, {"fillstyle": "none"})
"""One style for each device, added to the style of the system."""
_THE_PAPER = "The paper: SparseInst, CVPR 2022"

Point = tuple[float, float, str]
"""x, y and a label."""


@style.styled
def speed_accuracy(result: TableResult) -> Figure | None:
    """Draw AP over milliseconds per image (Figure 1): the paper's, measured and quoted points, with a mark for each protocol.

    Returns:
        None if there is no point.
    """
    figure, axes = style.new(7.5, 6)
    labels: list[Any] = []
    at_scale = result.profile != "coco"  # then AP is of other data, and no value of COCO may share the axes
    paper = [
        (ms, entry.row.paper["AP"], entry.row.name)
        for entry in result.rows
        if "AP" in entry.row.paper and (ms := _milliseconds(entry.row.paper)) is not None
    ]
    if paper and not at_scale:
        labels += _draw_points(axes, paper, "SparseInst, the paper: RTX 2080 Ti, PyTorch FP32", **style.PAPER)
    timed = [column for column in result.columns if column.device is not None and column.metric in ("FPS", "ms")]
    for options, column in zip(cycle(_DEVICE_STYLES), timed, strict=False):
        labels += _draw_measured(axes, result, column, options)
    quoted = zip(cycle(_QUOTED_MARKS), cycle(style.COLOURS[1:]), result.table.spec.protocols.items(), strict=False)
    for mark, colour, (name, protocol) in quoted:
        points = [
            (ms, row.figures["AP"], " ".join(str(value) for value in row.labels.values()))
            for row in result.table.spec.quoted
            if row.protocol == name and "AP" in row.figures and (ms := _milliseconds(row.figures)) is not None
        ]
        if points and not at_scale:
            label = f"quoted: {protocol.device}, {protocol.description}"
            labels += _draw_points(axes, points, label, marker=mark, color=colour, ls="", alpha=0.7, ms=5)
    if not axes.lines:
        return None
    data = f"on the images of {result.profile}" if at_scale else "on COCO"
    axes.set(xlabel="time of an image (ms, log scale); other devices and engines are no comparison", ylabel=f"mask AP {data} (%)")
    axes.set(xscale="log")
    style.log_axis(axes.xaxis)
    axes.margins(x=0.12)
    axes.grid()
    style.finish(axes, _title(result), sources(result, quoted=not at_scale))
    style.separate_labels(axes, labels, np.concatenate([np.asarray(line.get_xydata()) for line in axes.lines]))
    return figure


def _draw_measured(axes: mpl.axes.Axes, result: TableResult, column: Column, options: dict[str, Any]) -> list[Any]:
    """Draw the measured points of SparseInst and of other systems on one device; return their labels."""
    points = []
    for row in result.rows:
        speed, ap = row.cells[column].measured, row.cells.get(Column("AP"))
        if speed is not None and ap is not None and ap.measured is not None:
            points.append((1000 / speed.mean if column.metric == "FPS" else speed.mean, ap.measured.mean, row.row.name))
    label = f"SparseInst, measured at {result.profile} scale: {column.device}"
    labels = _draw_points(axes, points, label, **{**style.MEASURED, **options}) if points else []
    peers = [p for p in result.peers if column.device in p.whole_ms and p.figures.get("AP") is not None]
    for name, mark in zip(dict.fromkeys(peer.name for peer in peers), cycle(_PEER_MARKS), strict=False):
        points = [(p.whole_ms[str(column.device)], p.figures["AP"] or 0.0, str(p.short_side)) for p in peers if p.name == name]
        peer_options = {"marker": mark, "color": "0.3", "ls": ":", **options}
        labels += _draw_points(axes, points, f"{name}, measured here: {column.device}", **peer_options)
    return labels


def _draw_points(axes: mpl.axes.Axes, points: list[Point], legend: str, **options: Any) -> list[Any]:
    """Draw points as one line and return their labels as matplotlib's texts.

    Args:
        legend: the name of the line in the legend.
        options: matplotlib's options for the line.
    """
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=legend, **options)
    return [axes.text(x, y, text, fontsize=6.5 if options.get("ls") == "" else 8) for x, y, text in points]


@style.styled
def module_times(result: TableResult) -> Figure | None:
    """Draw the milliseconds of each module, in one bar for each row and device (Table 8). None if there is no bar."""
    devices = sorted({column.device for column in result.columns if column.device is not None})
    bars: list[tuple[str, list[float]]] = []
    for row in result.rows:
        if set(MODULES) <= set(row.row.paper):
            bars.append((f"{row.row.name}, the paper\n(RTX 2080 Ti)", [row.row.paper[name] for name in MODULES]))
        for device in devices:
            cells = [row.cells[Column(name, device)].measured for name in MODULES]
            if all(cells):
                label = f"{row.row.name}, {result.profile} scale: {row.as_run.partition(', ')[2]}\n({device})"
                bars.append((label, [cell.mean for cell in cells if cell is not None]))
    if not bars:
        return None
    figure, axes = style.new(7.5, 1.8 + 0.5 * len(bars))
    left = [0.0] * len(bars)
    for index, name in enumerate(MODULES):
        widths = [values[index] for _, values in bars]
        options: dict[str, Any] = {"color": style.COLOURS[index], "hatch": style.HATCHES[index], "edgecolor": "white"}
        axes.barh(range(len(bars)), widths, left=left, label=name, height=0.6, **options)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [style.short(label, 60) for label, _ in bars])
    axes.invert_yaxis()
    axes.set(xlabel="time of an image (ms), each module synchronised by itself")
    style.finish(axes, _title(result), sources(result), columns=4)
    return figure


@style.styled
def differences(result: TableResult) -> Figure | None:
    """Draw each row's difference in AP from the reference row: measured with its interval, and the paper's.

    Returns:
        None if no difference is measured.
    """
    rows = [row for row in result.rows if (ap := row.cells.get(Column("AP"))) is not None and ap.difference is not None]
    if not rows:
        return None
    figure, axes = style.new(6.5, 2.2 + 0.4 * len(rows))
    labelled: set[str] = set()

    def once(label: str) -> str | None:
        first = label not in labelled
        labelled.add(label)
        return label if first else None

    for index, row in enumerate(rows):
        measured = row.cells[Column("AP")].difference
        assert measured is not None
        errors = None if measured.guessed else [[measured.value - measured.low], [measured.high - measured.value]]
        options = style.MEASURED if measured.testable else style.IMAGES_ALONE
        if row.not_trained:
            options = {**options, "marker": "x"}
        noise = "seeds and images" if measured.seeds_known else "images alone"
        interval = "one seed" if measured.guessed else f"noise of {noise}"
        if row.not_trained:
            interval += ", not trained"
        label = once(f"measured at {result.profile} scale, {interval}")
        axes.errorbar([measured.value], [index - 0.12], xerr=errors, capsize=3, label=label, **options)
        if row.paper_difference is not None:
            axes.plot([row.paper_difference], [index + 0.12], label=once("the paper, on COCO"), **{**style.PAPER, "ls": ""})
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_yticks(range(len(rows)), [style.short(row.row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set(xlabel=f"difference in mask AP (points) from '{result.table.spec.reference}'")
    style.finish(axes, _title(result), sources(result))
    return figure


def _title(result: TableResult) -> str:
    return f"{result.table.spec.title} ({result.profile})"


def sources(result: TableResult, *, quoted: bool = True) -> list[str]:
    """Return the sources of a plot's values, for its caption.

    Args:
        quoted: the plot shows values of the paper and of other publications.
    """
    lines = []
    if result.provenance:
        lines.append(f"Measured at {result.profile} scale: " + "; ".join(result.provenance) + ".")
    if quoted and any(row.row.paper for row in result.rows):
        lines.append(f"{_THE_PAPER}, {result.table.spec.title.partition(':')[0]}.")
    used = {row.protocol for row in result.table.spec.quoted} if quoted else set()
    origins = dict.fromkeys(p.source for name, p in result.table.spec.protocols.items() if name in used)
    if origins:
        lines.append(f"Quoted: {'; '.join(origins)}.")
    return lines


def _milliseconds(values: Mapping[Any, float]) -> float | None:
    """Return the milliseconds per image from values that contain `ms` or `FPS`; None if they contain neither."""
    if "ms" in values:
        return values["ms"]
    return 1000 / values["FPS"] if "FPS" in values else None


@dataclass(frozen=True)
class Plot:
    draw: Callable[[TableResult], Figure | None]
    """The function that draws the plot; it returns None if there is nothing to show."""
    shows: str
    """The content of the plot in words, for readers who cannot see it."""


def plots(result: TableResult) -> dict[str, Plot]:
    """Return the plots that fit a table, by name."""
    return {name: Plot(_DRAW[name], shows) for name, shows in figure_texts(result).items()}


_DRAW: dict[str, Callable[[TableResult], Figure | None]] = {
    "speed-accuracy": speed_accuracy,
    "modules": module_times,
    "differences": differences,
}
