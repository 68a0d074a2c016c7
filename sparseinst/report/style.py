"""Define the style that all plots share. Imports no torch.

The colours are distinct for every kind of colour vision. Each source of values has its own mark and its own colour, and the
caption names the sources.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import matplotlib.axes
import matplotlib.axis
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from sparseinst.files import atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The colours of Okabe and Ito (2008), chosen for every kind of colour vision."""
HATCHES = ("", "///", "...", "xx")
MEASURED: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "ls": "-", "ms": 6.5}
IMAGES_ALONE: dict[str, Any] = {**MEASURED, "markerfacecolor": "white"}
"""The style of a measured value if no row has several seeds: its interval then covers only the noise of the images."""
PAPER: dict[str, Any] = {"color": "black", "marker": "D", "markerfacecolor": "white", "ls": "--", "ms": 6, "lw": 1}

_STYLE: Any = {
    "font.size": 9,
    "figure.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a name in a spec may contain a dollar sign, which must not start a formula
    "axes.prop_cycle": cycler(color=COLOURS),
    # The ids in an SVG file are the same in each run, and its text is stored as text instead of outlines.
    "svg.hashsalt": "sparseinst",
    "svg.fonttype": "none",
}
_DPI = 150
"""The pixels of a PNG per inch."""
_LABEL_STEPS = 300
"""The number of steps that move labels apart. With a time limit instead, a slow machine would draw another plot."""

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Return a function that calls `draw` with this style set."""

    @functools.wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return draw_in_style


def new(width: float, height: float) -> tuple[Figure, mpl.axes.Axes]:
    """Return an empty figure of this size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def signed(value: float, _position: float = 0) -> str:
    """Return a difference with its sign, for the tick of an axis."""
    return f"{value:+g}" if value else "0"


def log_axis(axis: mpl.axis.Axis) -> None:
    """Label a logarithmic axis with plain numbers at 1, 2, 3 and 5 times each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def short(name: str, most: int = 32) -> str:
    """Return a name for an axis, cut off if it is so long that it would leave no room for the plot."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def separate_labels(axes: mpl.axes.Axes, labels: Sequence[Any], points: NDArray[np.float64]) -> None:
    """Move labels off each other and off the points, and draw a thin line from each label to its point.

    Args:
        labels: matplotlib's texts.
        points: (points, 2) x and y.
    """
    from adjustText import adjust_text  # it imports pyplot and scipy.spatial, which the other plots need not wait for

    leader = {"arrowstyle": "-", "color": "0.6", "lw": 0.5}
    adjust_text(list(labels), points[:, 0], points[:, 1], ax=axes, expand=(1.15, 1.4), iter_lim=_LABEL_STEPS, arrowprops=leader)


def finish(axes: mpl.axes.Axes, title: str, sources: Sequence[str], *, columns: int = 1) -> None:
    """Add the title and the legend above the axes, and the sources of the values below."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
    figure.suptitle(title, x=0.01, ha="left")
    width = round(figure.get_figwidth() * 18.5)
    lines = [line for source in sources for line in textwrap.wrap(source, width)]
    figure.supxlabel("\n".join(lines), fontsize=6.5, x=0.01, ha="left", color="0.35")


@styled
def render(figure: Figure, source: str | None = None) -> dict[str, bytes]:
    """Return a plot as PNG and as SVG, by suffix; the same plot gives the same bytes.

    Args:
        source: a text that identifies what the plot was drawn from, for the metadata of the SVG.
    """
    dpi, layout = figure.dpi, figure.get_layout_engine()
    found = {}
    try:
        FigureCanvasAgg(figure)
        if layout is not None:
            # Laying a figure out takes as long as drawing it. With a layout engine, `savefig` does it for each file, and draws
            # everything an extra time. Here it is done once for both files.
            figure.dpi = _DPI
            layout.execute(figure)
            figure.set_layout_engine(None)
        formats = ((".png", FigureCanvasAgg, {"Software": None}), (".svg", FigureCanvasSVG, {"Date": None, "Source": source}))
        for suffix, canvas, metadata in formats:
            canvas(figure)
            content = io.BytesIO()
            figure.savefig(content, format=suffix[1:], dpi=_DPI, metadata=metadata)
            found[suffix] = content.getvalue()
    finally:
        figure.set_layout_engine(layout)
        figure.dpi = dpi
    return found


def save(figure: Figure, path: Path) -> None:
    """Write a plot as PNG and as SVG.

    Args:
        path: its suffix is replaced.
    """
    for suffix, content in render(figure).items():
        with atomic(path.with_suffix(suffix)) as temporary:
            temporary.write_bytes(content)
