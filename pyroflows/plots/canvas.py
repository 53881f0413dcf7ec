"""Axes to draw on: the caller's, or new ones at the width and type sizes of a paper's columns."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyroflows.diagnostics.arrays import column_names

__all__ = [
    "COLORS",
    "COLUMN",
    "PAGE",
    "PAPER",
    "STYLES",
    "AxesArray",
    "AxesLike",
    "canvas",
    "drawing",
    "feature_names",
    "panels",
]

AxesArray = np.ndarray[Any, np.dtype[np.object_]]
AxesLike = Axes | Sequence[Axes] | AxesArray

COLORS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""

STYLES = ("-", "--", "-.", ":")
COLUMN, PAGE = 3.3, 6.8  # inches: the widths of a column and of a page with two columns
PAPER: Any = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8.0),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7.0),
    "figure.titlesize": 9.0,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
}
"""Matplotlib settings of new figures; other figures keep their own."""

_PAPER_FIGURES: WeakSet[Figure] = WeakSet()  # made here: PAPER also holds for what is added to them later


@contextmanager
def canvas(
    ax: AxesLike | None, shape: tuple[int, int], size: tuple[float, float], *, layout: Any = "constrained"
) -> Iterator[AxesArray]:
    """Yield rows and columns of axes to draw on: those given, or new ones in a figure of ``size`` inches."""
    if ax is not None:
        axes = np.asarray(ax, dtype=object).reshape(-1)
        count, are_axes = math.prod(shape), all(isinstance(each, Axes) for each in axes)
        if axes.size != count or not are_axes:
            expected = "one Axes" if count == 1 else f"{count} Axes"
            raise ValueError(f"expected ax of {expected}; got {axes.size if are_axes else type(ax).__name__}")
        with plt.rc_context(PAPER if axes[0].figure in _PAPER_FIGURES else None):
            yield axes.reshape(shape)
        return
    with plt.rc_context(PAPER):
        figure = plt.figure(figsize=size, layout=layout)
        _PAPER_FIGURES.add(figure)
        yield figure.subplots(*shape, squeeze=False)
        for each in figure.axes:  # ticks are created when they are drawn, after this block
            each.tick_params(labelsize=PAPER["xtick.labelsize"])


@contextmanager
def drawing(ax: Axes | None, size: tuple[float, float] = (COLUMN, 2.6)) -> Iterator[Axes]:
    """Yield one axes to draw on."""
    with canvas(ax, (1, 1), size) as axes:
        yield axes[0, 0]


@contextmanager
def panels(ax: AxesLike | None, count: int) -> Iterator[AxesArray]:
    """Yield ``count`` axes in one dimension; new ones stand in rows of at most four."""
    across = min(4, count) if ax is None else count
    down = -(-count // across)
    with canvas(ax, (down, across), (max(PAGE * across / 4, COLUMN), 1.8 * down + 0.3)) as axes:
        for unused in axes.flat[count:]:
            unused.set_axis_off()
        yield axes.reshape(-1)[:count]


def feature_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return the names of features, by default x_1, x_2 and so on."""
    return column_names(names, [f"$x_{{{i + 1}}}$" for i in range(count)])
