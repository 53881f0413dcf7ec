"""Calibration: is a latent normal, are ranks and transforms uniform, and do intervals hold what they say?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from pyroflows.diagnostics import normal_quantiles
from pyroflows.diagnostics.arrays import Array, as_array
from pyroflows.diagnostics.calibration import Calibration, expected_band, rank_counts
from pyroflows.plots.canvas import COLORS, STYLES, AxesArray, column_names, drawing, panels, rows_of

__all__ = ["coverage_curves", "latent_normality", "pit_ecdf", "rank_histograms"]

_NAMED = 6  # lines that a legend names
_GREY = "0.85"


def latent_normality(
    z: Array,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    level: float = 0.99,
    title: str = "Latent against a standard normal",
) -> Axes:
    """Draw the quantiles of each feature of a latent against those of a standard normal.

    Of a right flow each point is in the grey band with the probability ``level``. Of more than six features those
    farthest from the normal have a colour and a name.

    Args:
        z: the latent of data that the flow was not trained on, such as ``flow.encode(x)``, where the prior is a
            standard normal.
        ax: the axes; new ones by default.
        names: of the features.
        level: of the band.
        title: of the axes.

    Shapes:
        z: ``(rows, features)``.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, no rows, numbers that are not finite, another number of names, or a level that is no
            probability.

    Example:
        >>> latent_normality(np.random.default_rng(0).normal(size=(500, 2))).get_xlabel()
        'standard normal quantile (standard deviations)'
    """
    found = normal_quantiles(z, level=level)
    names = column_names(names, found.observed.shape[1])
    with drawing(ax, (3.3, 3.0)) as ax:
        ax.fill_between(found.expected, found.low, found.high, color=_GREY, linewidth=0, label=_band(level, "normal"))
        ax.axline((0, 0), slope=1, color="black", linewidth=0.6)
        _lines(ax, found.expected, found.observed, names, found.distance)
        ax.set(title=title, ylabel="latent quantile (standard deviations)")
        ax.set_xlabel("standard normal quantile (standard deviations)")
        ax.legend(frameon=False)
    return ax


def pit_ecdf(
    values: Array,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    level: float = 0.99,
    title: str = "Probability integral transform",
) -> Axes:
    """Draw how far the share of transforms below each probability is from that probability, column by column.

    Of right predictions each point is in the grey band with the probability ``level``. A curve that rises through the
    band's middle from below to above has predictions that are too wide, one that falls too narrow ones; one that stays
    above predicts too high, one that stays below too low.

    Args:
        values: probability integral transforms, as :func:`pit <pyroflows.diagnostics.pit>` gives them.
        ax: the axes; new ones by default.
        names: of the columns.
        level: of the band.
        title: of the axes.

    Shapes:
        values: ``(rows, columns)``.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, no rows, numbers that are not in [0, 1], another number of names, or a level that is
            no probability.

    Example:
        >>> pit_ecdf(np.random.default_rng(0).uniform(size=(500, 1)), names=["rain"]).get_xlabel()
        'probability'
    """
    rows = rows_of("values", values)
    if rows.min() < 0 or rows.max() > 1:
        raise ValueError(f"expected transforms from 0 to 1; got {rows.min():g} to {rows.max():g}")
    names = column_names(names, rows.shape[1])
    grid = np.linspace(0, 1, 101)
    low, high = expected_band(grid, len(rows), level=level)
    below = np.stack([np.searchsorted(np.sort(column), grid, side="right") for column in rows.T], 1) / len(rows)
    off = below - grid[:, None]
    with drawing(ax) as ax:
        ax.fill_between(grid, low - grid, high - grid, color=_GREY, linewidth=0, label=_band(level, "calibrated"))
        ax.axhline(0, color="black", linewidth=0.6)
        _lines(ax, grid, off, names, np.abs(off).max(0))
        ax.set(title=title, xlabel="probability", ylabel="share below minus probability", xlim=(0, 1))
        most = 1.1 * max(np.abs(off).max(), (high - grid).max())
        ax.set_ylim(-most, most * (1.2 + 0.2 * -(-min(len(names), _NAMED) // 2)))  # room for the legend
        ax.legend(frameon=False, loc="upper center", ncols=2, handlelength=1.5)
    return ax


def rank_histograms(
    result: Calibration,
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    num_bins: int | None = None,
    level: float = 0.99,
) -> AxesArray:
    """Draw the ranks of simulation-based calibration, column by column, over the band of uniform ranks.

    Of a right posterior each step is in the grey band with the probability ``level``. Steps high at both ends
    are of a posterior that is too narrow, high in the middle of one too wide, and a slope of one that is off to a side.

    Args:
        result: as ``AmortizedPosterior.calibrate`` gives it, or
            :func:`calibration <pyroflows.diagnostics.calibration>`.
        ax: an axes for each column; new ones by default.
        num_bins: of the histograms; by default those of the test whose p-value is in the title.
        level: of the band.

    Returns:
        The axes, shape ``(d,)``.

    Raises:
        TypeError: not a result of calibration.
        ValueError: more bins than ranks, a level that is no probability, or another number of axes.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Talts et al., 2018
        (arXiv:1804.06788).

    Example:
        >>> from pyroflows.diagnostics.calibration import calibration
        >>> rng = np.random.default_rng(0)
        >>> result = calibration(rng.normal(size=(400, 99, 1)), rng.normal(size=(400, 1)), ["mu"])
        >>> rank_histograms(result)[0].get_ylabel()
        'simulations'
    """
    _check_calibration(result)
    counts, expected = rank_counts(result.ranks, result.num_draws, num_bins=num_bins)
    num = len(result.ranks)
    low, high = expected_band(expected / num, num, level=level)
    edges = np.concatenate([[0.0], expected.cumsum() / num])  # of the bins, as shares of all ranks
    with panels(ax, len(result.names)) as axes:
        for i, (each, name) in enumerate(zip(axes, result.names, strict=True)):
            # The band of the last bin is written twice: steps need the end of each.
            bottom, top = (num * np.append(each_bound, each_bound[-1]) for each_bound in (low, high))
            each.fill_between(edges, bottom, top, step="post", color=_GREY, linewidth=0, label=_band(level, "uniform"))
            each.stairs(counts[:, i], edges, color=COLORS[0], baseline=None, linewidth=1.2)
            each.set(title=f"{name}, p = {result.p_values[i]:.2f}", xlim=(0, 1))
            each.set(xlabel="rank (share of draws)", ylabel="" if i else "simulations")
            each.set_ylim(0, 1.3 * max(counts.max(), num * high.max()))
        axes[0].legend(frameon=False, loc="upper left", handlelength=1.2)
    return axes


def coverage_curves(
    result: Calibration,
    ax: Axes | None = None,
    *,
    level: float = 0.99,
    title: str = "Coverage of central intervals",
) -> Axes:
    """Draw how often central posterior intervals hold the truth against how often they say they do.

    Of a right posterior each point is in the grey band with the probability ``level``; below it intervals are too
    narrow, above it too wide.

    Args:
        result: as ``AmortizedPosterior.calibrate`` gives it, or
            :func:`calibration <pyroflows.diagnostics.calibration>`; its levels are the points.
        ax: the axes; new ones by default.
        level: of the band.
        title: of the axes.

    Raises:
        TypeError: not a result of calibration.
        ValueError: a level that is no probability.

    Example:
        >>> from pyroflows.diagnostics.calibration import calibration
        >>> rng = np.random.default_rng(0)
        >>> result = calibration(rng.normal(size=(400, 99, 1)), rng.normal(size=(400, 1)), ["mu"])
        >>> coverage_curves(result).get_xlabel()
        'probability of the interval'
    """
    _check_calibration(result)
    grid, order = np.linspace(0, 1, 101), np.argsort(result.levels)
    low, high = expected_band(grid, len(result.ranks), level=level)
    shares = as_array("coverage", result.coverage, 2)[order]
    nominal = np.asarray(result.levels)[order]
    with drawing(ax, (3.3, 3.0)) as ax:
        ax.fill_between(grid, low, high, color=_GREY, linewidth=0, label=_band(level, "calibrated"))
        ax.plot((0, 1), (0, 1), color="black", linewidth=0.6)
        _lines(ax, nominal, shares, result.names, np.abs(shares - nominal[:, None]).max(0), marker="o")
        ax.set(title=title, xlabel="probability of the interval", ylabel="share of truths within", aspect="equal")
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.legend(frameon=False, loc="upper left")
    return ax


def _lines(
    ax: Axes, x: np.ndarray, columns: np.ndarray, names: Sequence[str], distance: np.ndarray, marker: str = ""
) -> None:
    """Draw a line for each column; of many, those farthest off have a colour and a name."""
    far = sorted(np.argsort(-distance, kind="stable")[:_NAMED])
    for column in range(len(names)):
        if column not in far:
            ax.plot(x, columns[:, column], color="0.6", linewidth=0.5, marker=marker)
    for column, color, style in zip(far, COLORS, cycle(STYLES), strict=False):
        ax.plot(x, columns[:, column], style, color=color, label=names[column], marker=marker)


def _band(level: float, right: str) -> str:
    return f"{100 * level:g}% if {right}"


def _check_calibration(result: Calibration) -> None:
    if not isinstance(result, Calibration):
        raise TypeError(f"expected a Calibration, as calibration() gives it; got {type(result).__name__}")
