"""Print and draw the comparison of engines: speed and accuracy of the same artifacts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from sparseinst.bench.report import write_json
from sparseinst.report import style

_COLOURS = {"torch": style.COLOURS[0], "onnxruntime": style.COLOURS[2], "openvino": style.COLOURS[1]}
_MARKS = {"fp32": "o", "tf32": "o", "bf16": "s", "fp16": "^", "int8": "D"}


def report_engines(results: dict[str, Any], output: Path | None, plot: Path | None, *, as_json: bool) -> None:
    """Print the results as a table for each model, size and batch, or all as JSON, and draw them.

    Args:
        results: the machine, and `rows`, those of `bench.engines.compare_engines`.
        output: also write the JSON to this file.
        plot: the file of the first plot; the others have a number at the end of their name.
    """
    write_json(results, output, as_json=as_json)
    by_model: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        by_model.setdefault((row["model"], row["size"], row["batch"]), []).append(row)
    for number, rows in enumerate(by_model.values(), start=1):
        if not as_json:
            print_engines(rows, results["device"])
        if plot is None:
            continue
        figure, file = draw_engines(rows, results["device"]), plot if number == 1 else plot.with_stem(f"{plot.stem}-{number}")
        if figure is None:
            print(f"{file}: not drawn, because {rows[0]['model']} has no AP", file=sys.stderr)
        else:
            style.save(figure, file)


def print_engines(rows: Sequence[dict[str, Any]], device: str) -> None:
    """Print the rows of one model."""
    first = rows[0]
    table = Table(title=f"{first['model']} at {first['size']}, batch {first['batch']}, on {device}", title_justify="left")
    for column in ("engine", "precision", "mode", "ms", "p5-p95", "post, ms", "times faster", "AP", "AP lost (95 %)"):
        table.add_column(column)
    for column in ("equal images", "MB", "first image, s", "digest"):
        table.add_column(column)
    for row in rows:
        times, ratio, same = row["whole_ms"], row["ratio"], row["agreement"]
        table.add_row(
            row["engine"], row["precision"], row["mode"], f"{times['median']:.1f}", f"{times['p5']:.1f}-{times['p95']:.1f}",
            f"{row['post_ms']:.1f}" if row["post_ms"] is not None else "",
            f"{ratio['median']:.2f} ({ratio['p5']:.2f}-{ratio['p95']:.2f})", _ap(row), _lost(row),
            f"{same['equal_images']} of {same['images']}" if same is not None else "",
            f"{row['bytes'] / 1e6:.1f}", f"{row['first_image_s']:.1f}", row["facts"]["artifact"],
        )  # fmt: skip
    Console(width=max(Console().width, 190)).print(table)
    print(
        f"{_about_ratios(first)}\nfirst image is the time from the start of a process to its first result; the artifact "
        "already exists. post is the part of post-processing, from further runs."
    )
    if "published" in first:
        print(
            f"* AP of the published weights ({first['published']['source']}). The weights that are timed here are random, and "
            "int8 is calibrated on noise."
        )
    elif first["AP"] is None:
        print("A model given by name has random weights: it has no AP, and int8 is calibrated on noise.")
    for row in rows:
        if (recipe := row["facts"].get("recipe")) is not None:
            print(f"{row['engine']} int8 keeps in float: {', '.join(recipe['float']) or 'nothing'}")


def _about_ratios(first: dict[str, Any]) -> str:
    if first["mode"] != "plain":  # a peer
        return "The ratios are relative to the first row, torch as it is."
    return (
        "The first row is the reference's path, and the ratios are relative to it. AP lost is its AP minus the row's AP, with an "
        "interval over resampled images."
    )


def _ap(row: dict[str, Any]) -> str:
    if "published" in row:
        return f"{row['published']['AP']:.1f} *"
    return f"{row['AP']:.2f}" if row["AP"] is not None else ""


def _lost(row: dict[str, Any]) -> str:
    lost = row["AP_lost"]
    return f"{lost['value']:+.2f} ({lost['low']:+.2f} to {lost['high']:+.2f})" if lost is not None else ""


@style.styled
def draw_engines(rows: Sequence[dict[str, Any]], device: str) -> Figure | None:
    """Draw the time of each row against the AP that it loses. Returns None if no row has an AP."""
    rows = [row for row in rows if row["AP_lost"] is not None]
    if not rows:
        return None
    figure, axes = style.new(6.5, 4.2)
    axes.axhline(0.0, color="0.7", lw=0.8)
    labelled: set[str] = set()
    labels = []
    for row in rows:
        lost, times, engine = row["AP_lost"], row["whole_ms"], row["engine"]
        axes.errorbar(
            times["median"],
            lost["value"],
            xerr=[[times["median"] - times["p5"]], [times["p95"] - times["median"]]],
            yerr=[[max(0.0, lost["value"] - lost["low"])], [max(0.0, lost["high"] - lost["value"])]],
            color=_COLOURS.get(engine, "0.3"),
            marker=_MARKS.get(row["precision"], "o"),
            ls="none",
            capsize=2,
            label=None if engine in labelled else engine,
        )
        labelled.add(engine)
        name = f"{row['precision']} {row['mode']}" if engine == "torch" else row["precision"]
        labels.append(axes.text(times["median"], lost["value"], name, fontsize=8))
    axes.set_xscale("log")
    style.log_axis(axes.xaxis)
    batch = rows[0]["batch"]
    what = "an image" if batch == 1 else f"a batch of {batch} images"
    axes.set_xlabel(f"milliseconds {what} (median; bars from the 5th to the 95th percentile)")
    axes.set_ylabel("AP lost against torch fp32")
    axes.grid(visible=True)
    style.finish(axes, f"{rows[0]['model']} at {rows[0]['size']}", [f"measured on {device}"], columns=3)
    points = np.array([(row["whole_ms"]["median"], row["AP_lost"]["value"]) for row in rows])
    style.separate_labels(axes, labels, points)
    return figure
