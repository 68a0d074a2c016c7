"""Figures from a table's results. Pure functions of them; import no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.axes
import matplotlib.ticker
from matplotlib.figure import Figure

from sparseinst.ablation.study import LatencyFigure
from sparseinst.paths import atomic
from sparseinst.report.collect import Column, TableResult

MODULES: tuple[LatencyFigure, ...] = ("backbone", "encoder", "decoder", "post")
_MARKS = "sD^v*<>"
_PEER_MARKS = "PXhd"


def speed_accuracy(result: TableResult) -> Figure | None:
    """AP over milliseconds an image: the paper's, measured and quoted points, a mark for each protocol (Figure 1)."""
    figure, axes = _new(7.5, 5)
    paper = [
        (ms, entry.row.paper["AP"], entry.row.name)
        for entry in result.rows
        if "AP" in entry.row.paper and (ms := _milliseconds(entry.row.paper)) is not None
    ]
    if paper:
        _points(axes, paper, "o-", "SparseInst, the paper: RTX 2080 Ti, PyTorch FP32")
    for column in result.columns:
        if column.device is None or column.figure not in ("FPS", "ms"):
            continue
        points = []
        for row in result.rows:
            speed, ap = row.cells[column].measured, row.cells.get(Column("AP"))
            if speed is not None and ap is not None and ap.measured is not None:
                points.append((1000 / speed.mean if column.figure == "FPS" else speed.mean, ap.measured.mean, row.row.name))
        if points:
            _points(axes, points, "o--", f"SparseInst, measured at {result.profile} scale: {column.device}")
        known = [p for p in result.peers if column.device in p.whole_ms and p.figures.get("AP") is not None]
        for name, mark in zip(dict.fromkeys(peer.name for peer in known), _PEER_MARKS, strict=False):
            at = [(p.whole_ms[column.device], p.figures["AP"] or 0.0, str(p.short_side)) for p in known if p.name == name]
            _points(axes, at, f"{mark}:", f"{name}, measured here: {column.device}")
    for mark, (name, protocol) in zip(_MARKS, result.table.spec.protocols.items(), strict=False):
        quoted = [
            (ms, row.figures["AP"], " ".join(str(value) for value in row.labels.values()))
            for row in result.table.spec.quoted
            if row.protocol == name and "AP" in row.figures and (ms := _milliseconds(row.figures)) is not None
        ]
        if quoted:
            label = f"quoted: {protocol.device}, {protocol.description}"
            _points(axes, quoted, mark, label, ls="", alpha=0.6, size=5.5)
    if not axes.lines:
        return None
    axes.set(xlabel="ms an image (log scale); other devices and engines are no comparison", ylabel="mask AP", xscale="log")
    axes.set_title(result.table.spec.title)
    axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", frameon=False)
    return figure


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
                bars.append((f"{row.row.name}, measured\n({device})", [cell.mean for cell in cells if cell is not None]))
    if not bars:
        return None
    figure, axes = _new(7.5, 1.2 + 0.6 * len(bars))
    left = [0.0] * len(bars)
    for index, name in enumerate(MODULES):
        widths = [values[index] for _, values in bars]
        axes.barh(range(len(bars)), widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=result.table.spec.title)
    figure.legend(frameon=False, ncols=4, fontsize=8, loc="outside lower center")
    return figure


def differences(result: TableResult) -> Figure | None:
    """Each row's difference in AP from the reference row: measured with its interval, and the paper's."""
    rows = [row for row in result.rows if (ap := row.cells.get(Column("AP"))) is not None and ap.difference is not None]
    if not rows:
        return None
    figure, axes = _new(6.5, 1.4 + 0.45 * len(rows))
    for index, row in enumerate(rows):
        found = row.cells[Column("AP")].difference
        assert found is not None
        errors = [[found.value - found.low], [found.high - found.value]]
        label = f"measured at {result.profile} scale, 95 %" if index == 0 else None
        axes.errorbar([found.value], [index], xerr=errors, fmt="o", color="C0", capsize=3, label=label)
        if row.paper_difference is not None:
            axes.plot([row.paper_difference], [index], "D", color="C1", label="the paper, on COCO" if index == 0 else None)
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=f"difference in AP from '{result.table.spec.reference}'", title=result.table.spec.title)
    figure.legend(frameon=False, ncols=2, fontsize=8, loc="outside lower center")
    return figure


def _new(width: float, height: float) -> tuple[Figure, mpl.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _milliseconds(figures: Mapping[Any, float]) -> float | None:
    """An image, from figures that state it or images a second."""
    if "ms" in figures:
        return figures["ms"]
    return 1000 / figures["FPS"] if "FPS" in figures else None


def _points(
    axes: mpl.axes.Axes, points: list[tuple[float, float, str]], style: str, label: str, size: float = 8, **more: Any
) -> None:
    """Points with a name each; more of matplotlib's options for their line."""
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], style, label=label, **more)
    for x, y, text in points:
        axes.annotate(text, (x, y), textcoords="offset points", xytext=(5, -0.9 * size), fontsize=size)


def plots(result: TableResult) -> dict[str, Callable[[TableResult], Figure | None]]:
    """The figures that fit a table, by the name of their file."""
    figures = set(result.table.spec.figures)
    chosen: dict[str, Callable[[TableResult], Figure | None]] = {}
    if {"FPS", "AP"} <= figures:
        chosen["speed-accuracy"] = speed_accuracy
    if set(MODULES) <= figures:
        chosen["modules"] = module_times
    if result.table.spec.reference is not None:
        chosen["differences"] = differences
    return chosen


def save(figure: Figure, path: Path) -> None:
    """As PNG and SVG, with the same bytes for the same figure."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        # Ids that do not change; text that stays text.
        with (
            atomic(path.with_suffix(suffix)) as temporary,
            mpl.rc_context({"svg.hashsalt": "sparseinst", "svg.fonttype": "none"}),
        ):
            figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=metadata)
