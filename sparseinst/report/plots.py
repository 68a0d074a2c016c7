"""Figures from a table's results. Pure functions of them; import no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.axes
import matplotlib.ticker
import numpy as np
from adjustText import adjust_text
from matplotlib.figure import Figure

from sparseinst.ablation.study import LatencyFigure
from sparseinst.report import style
from sparseinst.report.collect import Column, TableResult

MODULES: tuple[LatencyFigure, ...] = ("backbone", "encoder", "decoder", "post")
_QUOTED_MARKS = "s^v<>*"
_PEER_MARKS = "PXhd"
_DEVICE_LOOKS: tuple[dict[str, Any], ...] = ({}, {"fillstyle": "left"}, {"fillstyle": "bottom"}, {"fillstyle": "none"})
"""One a device, on top of a system's own."""
_THE_PAPER = "The paper: SparseInst, CVPR 2022"

_STEPS = 300
"""Of moving names apart: a number, as a time would make a slow machine draw another picture."""

Point = tuple[float, float, str]
"""x, y and a name."""


@style.styled
def speed_accuracy(result: TableResult) -> Figure | None:
    """AP over milliseconds an image: the paper's, measured and quoted points, a mark for each protocol (Figure 1)."""
    figure, axes = style.new(7.5, 6)
    texts: list[Any] = []
    paper = [
        (ms, entry.row.paper["AP"], entry.row.name)
        for entry in result.rows
        if "AP" in entry.row.paper and (ms := _milliseconds(entry.row.paper)) is not None
    ]
    if paper:
        texts += _points(axes, paper, "SparseInst, the paper: RTX 2080 Ti, PyTorch FP32", **style.PAPER)
    timed = [column for column in result.columns if column.device is not None and column.figure in ("FPS", "ms")]
    for look, column in zip(cycle(_DEVICE_LOOKS), timed, strict=False):
        texts += _measured(axes, result, column, look)
    quoted = zip(cycle(_QUOTED_MARKS), cycle(style.COLOURS[1:]), result.table.spec.protocols.items(), strict=False)
    for mark, colour, (name, protocol) in quoted:
        points = [
            (ms, row.figures["AP"], " ".join(str(value) for value in row.labels.values()))
            for row in result.table.spec.quoted
            if row.protocol == name and "AP" in row.figures and (ms := _milliseconds(row.figures)) is not None
        ]
        if points:
            label = f"quoted: {protocol.device}, {protocol.description}"
            texts += _points(axes, points, label, marker=mark, color=colour, ls="", alpha=0.7, ms=5)
    if not axes.lines:
        return None
    axes.set(xlabel="time of an image (ms, log scale); other devices and engines are no comparison", ylabel="mask AP (%)")
    axes.set(xscale="log")
    axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.margins(x=0.12)
    axes.grid()
    style.finish(axes, result.table.spec.title, sources(result))
    _keep_apart(axes, texts)
    return figure


def _measured(axes: mpl.axes.Axes, result: TableResult, column: Column, look: dict[str, Any]) -> list[Any]:
    """Our own points on one device, and those of peers; their names."""
    points = []
    for row in result.rows:
        speed, ap = row.cells[column].measured, row.cells.get(Column("AP"))
        if speed is not None and ap is not None and ap.measured is not None:
            points.append((1000 / speed.mean if column.figure == "FPS" else speed.mean, ap.measured.mean, row.row.name))
    other_data = "" if result.profile == "coco" else " (other data: compare no heights)"
    label = f"SparseInst, measured at {result.profile} scale{other_data}: {column.device}"
    texts = _points(axes, points, label, **{**style.MEASURED, **look}) if points else []
    known = [p for p in result.peers if column.device in p.whole_ms and p.figures.get("AP") is not None]
    for name, mark in zip(dict.fromkeys(peer.name for peer in known), cycle(_PEER_MARKS), strict=False):
        at = [(p.whole_ms[str(column.device)], p.figures["AP"] or 0.0, str(p.short_side)) for p in known if p.name == name]
        texts += _points(axes, at, f"{name}, measured here: {column.device}", marker=mark, color="0.3", **{"ls": ":", **look})
    return texts


def _points(axes: mpl.axes.Axes, points: list[Point], label: str, **more: Any) -> list[Any]:
    """Points, and their names as texts to be kept apart; more of matplotlib's options for their line."""
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=label, **more)
    return [axes.text(x, y, text, fontsize=6.5 if more.get("ls") == "" else 8) for x, y, text in points]


def _keep_apart(axes: mpl.axes.Axes, texts: list[Any]) -> None:
    """Move names off each other and off the points, a thin line to what they name."""
    # The axes must have their last size before places are looked for.
    axes.figure.canvas.draw()
    points = np.concatenate([np.asarray(line.get_xydata()) for line in axes.lines])
    leader = {"arrowstyle": "-", "color": "0.6", "lw": 0.5}
    adjust_text(texts, points[:, 0], points[:, 1], ax=axes, expand=(1.15, 1.4), iter_lim=_STEPS, arrowprops=leader)


@style.styled
def module_times(result: TableResult) -> Figure | None:
    """Milliseconds by module, a bar for each size and device (Table 8)."""
    devices = sorted({column.device for column in result.columns if column.device is not None})
    bars: list[tuple[str, list[float]]] = []
    for row in result.rows:
        if set(MODULES) <= set(row.row.paper):
            bars.append((f"{row.row.name}, the paper\n(RTX 2080 Ti)", [row.row.paper[name] for name in MODULES]))
        for device in devices:
            cells = [row.cells[Column(name, device)].measured for name in MODULES]
            if all(cells):
                bars.append(
                    (f"{row.row.name}, {result.profile} scale\n({device})", [cell.mean for cell in cells if cell is not None])
                )
    if not bars:
        return None
    figure, axes = style.new(7.5, 1.8 + 0.5 * len(bars))
    left = [0.0] * len(bars)
    for index, name in enumerate(MODULES):
        widths = [values[index] for _, values in bars]
        look: dict[str, Any] = {"color": style.COLOURS[index], "hatch": style.HATCHES[index], "edgecolor": "white"}
        axes.barh(range(len(bars)), widths, left=left, label=name, height=0.6, **look)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set(xlabel="time of an image (ms), each module synchronised by itself")
    style.finish(axes, result.table.spec.title, sources(result), columns=4)
    return figure


@style.styled
def differences(result: TableResult) -> Figure | None:
    """Each row's difference in AP from the reference row: measured with its interval, and the paper's."""
    rows = [row for row in result.rows if (ap := row.cells.get(Column("AP"))) is not None and ap.difference is not None]
    if not rows:
        return None
    figure, axes = style.new(6.5, 1.9 + 0.4 * len(rows))
    labelled: set[str] = set()

    def once(label: str) -> str | None:
        first = label not in labelled
        labelled.add(label)
        return label if first else None

    for index, row in enumerate(rows):
        found = row.cells[Column("AP")].difference
        assert found is not None
        errors = [[found.value - found.low], [found.high - found.value]]
        look = style.MEASURED if found.seeds_known else style.IMAGES_ALONE
        what = "over seeds and images" if found.seeds_known else "over images alone"
        label = once(f"measured at {result.profile} scale, 95 % {what}")
        axes.errorbar([found.value], [index - 0.12], xerr=errors, capsize=3, label=label, **look)
        if row.paper_difference is not None:
            axes.plot([row.paper_difference], [index + 0.12], label=once("the paper, on COCO"), **{**style.PAPER, "ls": ""})
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set(xlabel=f"difference in mask AP (points) from '{result.table.spec.reference}'")
    style.finish(axes, result.table.spec.title, sources(result), columns=2)
    return figure


def sources(result: TableResult) -> list[str]:
    """Where the numbers of a figure come from, for its caption."""
    lines = []
    if result.provenance:
        lines.append(f"Measured at {result.profile} scale: " + "; ".join(result.provenance) + ".")
    if any(row.row.paper for row in result.rows):
        lines.append(f"{_THE_PAPER}, {result.table.spec.title.partition(':')[0]}.")
    used = {row.protocol for row in result.table.spec.quoted}
    quoted = dict.fromkeys(p.source for name, p in result.table.spec.protocols.items() if name in used)
    if quoted:
        lines.append(f"Quoted: {'; '.join(quoted)}.")
    return lines


def _milliseconds(figures: Mapping[Any, float]) -> float | None:
    """An image, from figures that state it or images a second."""
    if "ms" in figures:
        return figures["ms"]
    return 1000 / figures["FPS"] if "FPS" in figures else None


@dataclass(frozen=True)
class Plot:
    draw: Callable[[TableResult], Figure | None]
    """None where there is nothing to show."""
    shows: str
    """In words, for those who cannot see it."""


def plots(result: TableResult) -> dict[str, Plot]:
    """The figures that fit a table, by name."""
    figures = set(result.table.spec.figures)
    chosen: dict[str, Plot] = {}
    if {"FPS", "AP"} <= figures:
        chosen["speed-accuracy"] = Plot(speed_accuracy, "mask AP over milliseconds an image")
    if set(MODULES) <= figures:
        chosen["modules"] = Plot(module_times, "milliseconds of each module")
    if result.table.spec.reference is not None:
        shows = "differences in AP from the reference row, measured with intervals and the paper's"
        chosen["differences"] = Plot(differences, shows)
    return chosen


def figure_file(result: TableResult, name: str) -> str:
    """The name of a figure's files, without their endings."""
    return f"{result.name}-{name}"
