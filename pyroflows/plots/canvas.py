"""What pictures are drawn on: axes given or new, at the width and in the sizes of a paper's columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyroflows.diagnostics.arrays import Array, NumPyArray, as_array

__all__ = [
    "COLORS",
    "PAGE",
    "PAPER",
    "STYLES",
    "AxesArray",
    "canvas",
    "check_limits",
    "column_names",
    "drawing",
    "panels",
    "rows_of",
]

AxesArray = np.ndarray[Any, np.dtype[np.object_]]

COLORS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers tell apart."""

STYLES = ("-", "--", "-.", ":")
COLUMN, PAGE = 3.3, 6.8  # inches, of a paper of two columns
PAPER: Any = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "figure.titlesize": 9.0,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
}
"""Matplotlib's settings of figures that the plots make; axes of other figures keep their own."""

_OWN: WeakSet[Figure] = WeakSet()  # the figures made here, whose sizes hold for what is added to them later


@contextmanager
def canvas(
    ax: Axes | Sequence[Axes] | AxesArray | None,
    shape: tuple[int, int],
    size: tuple[float, float],
    *,
    layout: Any = "constrained",
) -> Iterator[AxesArray]:
    """Give an array of axes to draw on: those given, or those of a new figure.

    Args:
        ax: the axes; new ones by default.
        shape: rows and columns of axes.
        size: of a new figure, in inches.
        layout: of a new figure.
    """
    if ax is not None:
        given = np.asarray(ax, dtype=object).reshape(-1)
        if given.size != math.prod(shape) or not all(isinstance(each, Axes) for each in given):
            count = math.prod(shape)
            wanted = "one Axes" if count == 1 else f"{count} Axes"
            got = given.size if all(isinstance(each, Axes) for each in given) else type(ax).__name__
            raise ValueError(f"expected ax of {wanted}; got {got}")
        with plt.rc_context(PAPER if given[0].figure in _OWN else None):
            yield given.reshape(shape)
        return
    with plt.rc_context(PAPER):
        figure = plt.figure(figsize=size, layout=layout)
        _OWN.add(figure)
        yield figure.subplots(*shape, squeeze=False)
        for each in figure.axes:  # ticks are made when they are drawn, after this block
            each.tick_params(labelsize=PAPER["xtick.labelsize"])


@contextmanager
def drawing(ax: Axes | None, size: tuple[float, float] = (COLUMN, 2.6)) -> Iterator[Axes]:
    """Give one axes to draw on."""
    with canvas(ax, (1, 1), size) as axes:
        yield axes[0, 0]


@contextmanager
def panels(
    ax: Axes | Sequence[Axes] | AxesArray | None, count: int, *, across: int = 4, height: float = 1.8
) -> Iterator[AxesArray]:
    """Give as many axes as asked for, in one dimension; new ones are in rows of ``across`` at most."""
    if ax is not None:
        with canvas(ax, (1, count), (0, 0)) as axes:
            yield axes[0]
        return
    across = min(across, count)
    down = -(-count // across)
    width = COLUMN if across == 1 else PAGE * across / 4 if across < 4 else PAGE
    with canvas(None, (down, across), (max(width, COLUMN), height * down + 0.3)) as axes:
        for spare in axes.flat[count:]:
            spare.set_axis_off()
        yield axes.reshape(-1)[:count]


def rows_of(name: str, values: Array) -> NumPyArray:
    """Give rows of columns as float64, or say what is wrong with them."""
    rows = as_array(name, values, 2)
    if 0 in rows.shape:
        raise ValueError(f"expected {name} of at least one row and one column; got shape {rows.shape}")
    return rows


def column_names(names: Sequence[str] | None, columns: int) -> list[str]:
    """Give a name for each column."""
    if names is None:
        return [f"$x_{{{i + 1}}}$" for i in range(columns)]
    if len(names) != columns:
        raise ValueError(f"expected a name for each of {columns} columns; got {len(names)}")
    return [str(name) for name in names]


def check_limits(limits: Sequence[float]) -> tuple[float, float, float, float]:
    """Give ``(left, right, bottom, top)`` from itself or from ``(low, high)``."""
    given = tuple(float(limit) for limit in limits)
    if len(given) == 2:
        given = given * 2
    if len(given) != 4 or not (given[0] < given[1] and given[2] < given[3]):
        raise ValueError(
            f"expected limits (low, high) or (left, right, bottom, top), increasing; got {tuple(limits)!r}"
        )
    return given[0], given[1], given[2], given[3]
