"""Tables of data against samples: the distribution of each column, and every pair of columns."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyroflows.diagnostics.arrays import Array, NumPyArray, as_rows
from pyroflows.plots.canvas import COLORS, COLUMN, PAGE, AxesArray, AxesLike, canvas, feature_names, panels

__all__ = ["marginals", "pair_plot"]

_POINTS = 3000  # drawn of each table in a scatter plot


def marginals(
    data: Array,
    samples: Array,
    ax: AxesLike | None = None,
    *,
    names: Sequence[str] | None = None,
    labels: tuple[str, str] = ("data", "samples"),
) -> AxesArray:
    """Draw histograms of each column of data, filled, and of samples, as a line, in the same bins.

    The bins reach a little beyond the data, or are its integers. Both histograms are shares of all rows: samples
    outside the bins are missing from the line, and their share is written if it is above 0.5 %, as "1% out".

    Args:
        data, samples: finite rows, ``(n, d)`` and ``(m, d)``; samples are ``flow.sample((1000,))``, for example.
        ax: ``d`` axes, one for each column; new ones by default.
        names, labels: of the columns, with their units, and of the two tables, for the legend.

    Example:
        >>> data, samples = np.random.default_rng(0).normal(size=(2, 100, 2))
        >>> marginals(data, samples, names=["height (m)", "mass (kg)"])[1].get_xlabel()
        'mass (kg)'
    """
    data, samples, names = _tables(data, samples, names)
    with panels(ax, len(names)) as axes:
        for column, each in enumerate(axes):
            outside = _histograms(each, data[:, column], samples[:, column], _bins(data[:, column]), labels)
            each.set_title(outside and f"{outside} of {labels[1]} out", loc="right", size="small")
            each.set(xlabel=names[column], ylabel="" if column else "density")
            each.locator_params(axis="x", nbins=4)
        axes[0].legend(frameon=False, handlelength=1.2)
    return axes


def pair_plot(
    data: Array,
    samples: Array,
    *,
    names: Sequence[str] | None = None,
    ax: Sequence[Axes] | AxesArray | None = None,
    labels: tuple[str, str] = ("data", "samples"),
) -> AxesArray:
    """Draw every pair of columns of data and samples as points, and the histograms of each column on the diagonal.

    At most 3,000 rows of each are drawn as points, spread evenly over the table; histograms are of all rows, as in
    :func:`marginals`.

    Args:
        data, samples, names, labels: as in :func:`marginals`.
        ax: ``d * d`` axes, row by row; new ones by default. Above the diagonal they stay empty.

    Example:
        >>> data, samples = np.random.default_rng(0).normal(size=(2, 100, 3))
        >>> pair_plot(data, samples, names=["a", "b", "c"]).shape
        (3, 3)
    """
    data, samples, names = _tables(data, samples, names)
    count = len(names)
    inches = float(np.clip(1.7 * count, COLUMN, PAGE))
    wrapped = [fill(name, max(9, round(11 * inches / count)), break_long_words=False) for name in names]
    ticks, size = (3, "medium") if count < 4 else (2, "medium" if count < 6 else "small")
    points, colors = _points(data, samples)
    alpha = float(np.clip(400 / len(points), 0.25, 0.7))
    edges = [_bins(column) for column in data.T]
    # The constrained layout would give panels with labels another size.
    with canvas(ax, (count, count), (inches, inches), layout=None) as axes:
        for (row, column), each in np.ndenumerate(axes):
            if column > row:
                each.set_axis_off()
                continue
            if row == column:
                outside = _histograms(each, data[:, row], samples[:, row], edges[row], labels)
                note = f"{outside} out" if outside else ""
                each.text(0.98, 0.97, note, transform=each.transAxes, ha="right", va="top", size="small")
                each.set_yticks([])
            else:
                each.scatter(*points[:, [column, row]].T, s=4, alpha=alpha, c=colors, linewidths=0, rasterized=True)
                each.set(xlim=edges[column][[0, -1]], ylim=edges[row][[0, -1]])
                each.yaxis.set_major_locator(MaxNLocator(ticks))
            each.xaxis.set_major_locator(MaxNLocator(ticks))
            each.tick_params(labelbottom=row == count - 1, labelleft=column == 0 < row)
            if row == count - 1:
                each.set_xlabel(wrapped[column], size=size)
            if column == 0 < row:
                each.set_ylabel(wrapped[row], size=size)
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", frameon=False)
        figure = axes[0, 0].figure
        figure.align_ylabels(list(axes[:, 0]))
        if ax is None:
            left, bottom, end = 0.85 / inches, 0.7 / inches, 1 - 0.1 / inches
            figure.subplots_adjust(left, bottom, end, end, wspace=0.12, hspace=0.12)
    return axes


def _points(data: NumPyArray, samples: NumPyArray) -> tuple[NumPyArray, NumPyArray]:
    """Return some rows of both tables and their colours, in random order, so that samples do not hide the data."""
    subsets = [rows[:: -(-len(rows) // _POINTS)] for rows in (data, samples)]
    colors = np.repeat(COLORS[:2], [len(rows) for rows in subsets])
    order = np.random.default_rng(0).permutation(len(colors))
    return np.concatenate(subsets)[order], colors[order]


def _histograms(ax: Axes, data: NumPyArray, samples: NumPyArray, edges: NumPyArray, labels: tuple[str, str]) -> str:
    """Draw both, and return the share of the samples outside the bins as a text."""
    # Not numpy's density=True, which would spread the rows outside the bins over those within.
    heights = [np.histogram(values, edges)[0] / len(values) / np.diff(edges) for values in (data, samples)]
    ax.stairs(heights[0], edges, fill=True, color=COLORS[0], alpha=0.35, label=labels[0])
    ax.stairs(heights[1], edges, color=COLORS[1], linewidth=1.2, label=labels[1])
    ax.set(xlim=(edges[0], edges[-1]))
    ax.set_ylim(bottom=0, top=1.2 * float(np.max(heights)))
    outside = np.mean((samples < edges[0]) | (samples > edges[-1]))
    return f"{outside:.0%}" if outside > 0.005 else ""


def _bins(data: NumPyArray) -> NumPyArray:
    if (data == np.rint(data)).all() and 0 < np.ptp(data) <= 50:
        return np.arange(data.min() - 0.5, data.max() + 1)
    low, high = np.quantile(data, [0.001, 0.999])  # one outlier would leave all other rows in one bin
    margin = 0.08 * (high - low) or 0.5
    return np.linspace(low - margin, high + margin, int(np.clip(2 * len(data) ** (1 / 3), 10, 50)) + 1)


def _tables(data: Array, samples: Array, names: Sequence[str] | None) -> tuple[NumPyArray, NumPyArray, tuple[str, ...]]:
    data, samples = as_rows("data", data), as_rows("samples", samples)
    if data.shape[1] != samples.shape[1]:
        raise ValueError(f"expected samples of the data's {data.shape[1]} columns; got {samples.shape[1]}")
    return data, samples, feature_names(names, data.shape[1])
