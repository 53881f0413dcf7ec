"""Calibration: normality of a latent, uniformity of ranks and transforms, and coverage of intervals."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyroflows.diagnostics import Calibration, expected_band, normal_quantiles, rank_counts
from pyroflows.diagnostics.arrays import Array, NumPyArray, as_array, as_rows
from pyroflows.plots.canvas import COLORS, STYLES, AxesArray, AxesLike, drawing, feature_names, panels

__all__ = ["coverage_curves", "latent_normality", "pit_ecdf", "rank_histograms"]

_NAMED = 6  # lines with a colour and a name


def latent_normality(
    z: Array,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    level: float = 0.99,
    title: str = "Latent against a standard normal",
) -> Axes:
    """Draw the quantiles of each feature of a latent of held-out data against those of a standard normal.

    For a well-specified flow each point is in the grey band with probability ``level``. Of more than six features,
    those farthest from the normal have a colour and a name.

    Args:
        z: as in :func:`normal_quantiles <pyroflows.diagnostics.normal_quantiles>`, which says what is refused.
        ax, title: the axes, new ones by default, and their title.
        names, level: of the features, and of the band.

    Example:
        >>> latent_normality(np.random.default_rng(0).normal(size=(500, 2))).get_xlabel()
        'standard normal quantile (standard deviations)'
    """
    quantiles = normal_quantiles(z, level=level)
    names, unit = feature_names(names, quantiles.observed.shape[1]), "quantile (standard deviations)"
    with drawing(ax, (3.3, 3.0)) as ax:
        _band(ax, quantiles.expected, quantiles.low, quantiles.high, level, "normal")
        ax.axline((0, 0), slope=1, color="black", linewidth=0.6)
        _lines(ax, quantiles.expected, quantiles.observed, names, quantiles.distance)
        ax.set(title=title, xlabel=f"standard normal {unit}", ylabel=f"latent {unit}")
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
    """Draw the difference between the share of transforms below each probability and that probability, by column.

    For calibrated predictions each point is in the grey band with probability ``level``. A curve that rises from below
    to above shows predictions that are too wide, one that falls too narrow ones; one that stays above shows predictions
    that are too high, one that stays below too low.

    Args:
        values: ``(rows, columns)``, numbers from 0 to 1, as :func:`pit <pyroflows.diagnostics.pit>` returns them.
        ax, names, level, title: as in :func:`latent_normality`.

    Example:
        >>> pit_ecdf(np.random.default_rng(0).uniform(size=(500, 1)), names=["rain"]).get_xlabel()
        'probability'
    """
    rows = as_rows("values", values)
    if rows.min() < 0 or rows.max() > 1:
        raise ValueError(f"expected transforms from 0 to 1; got {rows.min():g} to {rows.max():g}")
    names = feature_names(names, rows.shape[1])
    grid = np.linspace(0, 1, 101)
    low, high = expected_band(grid, len(rows), level=level)
    below = np.stack([np.searchsorted(np.sort(column), grid, side="right") for column in rows.T], 1) / len(rows)
    excess = below - grid[:, None]
    with drawing(ax) as ax:
        _band(ax, grid, low - grid, high - grid, level, "calibrated")
        ax.axhline(0, color="black", linewidth=0.6)
        _lines(ax, grid, excess, names, np.abs(excess).max(0))
        ax.set(title=title, xlabel="probability", ylabel="share below minus probability", xlim=(0, 1))
        limit = 1.1 * max(np.abs(excess).max(), (high - grid).max())
        ax.set_ylim(-limit, limit * (1.2 + 0.2 * -(-min(len(names), _NAMED) // 2)))  # room for the legend
        ax.legend(frameon=False, loc="upper center", ncols=2, handlelength=1.5)
    return ax


def rank_histograms(
    result: Calibration, ax: AxesLike | None = None, *, num_bins: int | None = None, level: float = 0.99
) -> AxesArray:
    """Draw the ranks of simulation-based calibration, column by column, over the band of uniform ranks.

    For exact posteriors each step is in the grey band with probability ``level``. Steps that are high at both ends show
    a posterior that is too narrow, high in the middle one that is too wide, and a slope one that is biased.

    Args:
        result: from ``AmortizedPosterior.calibrate`` or :func:`calibration <pyroflows.diagnostics.calibration>`.
        ax: ``d`` axes, one for each column; new ones by default.
        num_bins: of the histograms, at most one for each rank; by default those of the test whose p-value is shown.
        level: of the band.

    Example:
        >>> from pyroflows.diagnostics import calibration
        >>> rng = np.random.default_rng(0)
        >>> result = calibration(rng.normal(size=(400, 99, 1)), rng.normal(size=(400, 1)), ["mu"])
        >>> rank_histograms(result)[0].get_ylabel()
        'simulations'
    """
    _check_calibration(result)
    counts, expected = rank_counts(result.ranks, result.num_draws, num_bins=num_bins)
    num = len(result.ranks)
    low, high = (num * share for share in expected_band(expected / num, num, level=level))
    edges = np.append(0.0, expected.cumsum() / num)  # of the bins, as shares of all ranks
    with panels(ax, len(result.names)) as axes:
        for column, each in enumerate(axes):
            # The band of the last bin is written twice: steps need the end of each.
            _band(each, edges, np.append(low, low[-1]), np.append(high, high[-1]), level, "uniform", step="post")
            each.stairs(counts[:, column], edges, color=COLORS[0], baseline=None, linewidth=1.2)
            each.set(title=f"{result.names[column]}, p = {result.p_values[column]:.2f}", xlabel="rank (share of draws)")
            each.set(ylabel="" if column else "simulations", xlim=(0, 1), ylim=(0, 1.3 * max(counts.max(), high.max())))
        axes[0].legend(frameon=False, loc="upper left", handlelength=1.2)
    return axes


def coverage_curves(
    result: Calibration, ax: Axes | None = None, *, level: float = 0.99, title: str = "Coverage of central intervals"
) -> Axes:
    """Draw how often central posterior intervals hold the true value against their nominal probability.

    For exact posteriors each point is in the grey band with probability ``level``; below the band intervals are too
    narrow, above it too wide.

    Args:
        result: as in :func:`rank_histograms`; its levels are the points.
        ax, level, title: as in :func:`latent_normality`.

    Example:
        >>> from pyroflows.diagnostics import calibration
        >>> rng = np.random.default_rng(0)
        >>> result = calibration(rng.normal(size=(400, 99, 1)), rng.normal(size=(400, 1)), ["mu"])
        >>> coverage_curves(result).get_xlabel()
        'probability of the interval'
    """
    _check_calibration(result)
    grid, order = np.linspace(0, 1, 101), np.argsort(result.levels)
    low, high = expected_band(grid, len(result.ranks), level=level)
    nominal, observed = np.asarray(result.levels)[order], as_array("coverage", result.coverage, 2)[order]
    with drawing(ax, (3.3, 3.0)) as ax:
        _band(ax, grid, low, high, level, "calibrated")
        ax.plot((0, 1), (0, 1), color="black", linewidth=0.6)
        _lines(ax, nominal, observed, result.names, np.abs(observed - nominal[:, None]).max(0), marker="o")
        ax.set(title=title, xlabel="probability of the interval", ylabel="share of truths within", aspect="equal")
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.legend(frameon=False, loc="upper left")
    return ax


def _band(ax: Axes, x: NumPyArray, low: NumPyArray, high: NumPyArray, level: float, ideal: str, **options: Any) -> None:
    """Fill the band of chance in grey."""
    ax.fill_between(x, low, high, color="0.85", linewidth=0, label=f"{100 * level:g}% if {ideal}", **options)


def _lines(
    ax: Axes, x: NumPyArray, columns: NumPyArray, names: Sequence[str], distance: NumPyArray, marker: str = ""
) -> None:
    """Draw a line for each column; of many, those with the largest distance have a colour and a name."""
    farthest = sorted(np.argsort(-distance, kind="stable")[:_NAMED])
    for column in range(len(names)):
        if column not in farthest:
            ax.plot(x, columns[:, column], color="0.6", linewidth=0.5, marker=marker)
    for column, color, style in zip(farthest, COLORS, cycle(STYLES), strict=False):
        ax.plot(x, columns[:, column], style, color=color, label=names[column], marker=marker)


def _check_calibration(result: Calibration) -> None:
    if not isinstance(result, Calibration):
        raise TypeError(f"expected a Calibration, as calibration() returns it; got {type(result).__name__}")
