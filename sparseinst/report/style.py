"""One style for every plot: colours that all eyes tell apart, a mark as well as a colour for each source, sources in the caption.

Imports no torch.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import matplotlib.axes
from cycler import cycler
from matplotlib.figure import Figure

from sparseinst.paths import atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito (2008), who chose them for every kind of colour vision."""
HATCHES = ("", "///", "...", "xx")
MEASURED: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "ls": "-", "ms": 6.5}
IMAGES_ALONE: dict[str, Any] = {**MEASURED, "markerfacecolor": "white"}
"""Measured with one seed only, so that its interval says less than the others'."""
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
    "axes.prop_cycle": cycler(color=COLOURS),
    # Ids that do not change; text that stays text.
    "svg.hashsalt": "sparseinst",
    "svg.fonttype": "none",
}


P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, in this style."""

    @functools.wraps(draw)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return within


def new(width: float, height: float) -> tuple[Figure, mpl.axes.Axes]:
    """An empty figure of this size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def finish(axes: mpl.axes.Axes, title: str, sources: Sequence[str], *, columns: int = 1) -> None:
    """Title and legend above the axes, where the numbers come from below."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
    figure.suptitle(title, x=0.01, ha="left")
    width = round(figure.get_figwidth() * 18.5)
    lines = [line for source in sources for line in textwrap.wrap(source, width)]
    figure.supxlabel("\n".join(lines), fontsize=6.5, x=0.01, ha="left", color="0.35")


@styled
def save(figure: Figure, path: Path) -> None:
    """As PNG and SVG, with the same bytes for the same figure."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        with atomic(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=metadata)
