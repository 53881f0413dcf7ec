"""Distances between samples, their moments and their densities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from pyroflows.arguments import check_sizes
from pyroflows.diagnostics.arrays import (
    Array,
    NumPyArray,
    Values,
    as_array,
    as_columns,
    as_rows,
    column_names,
    table_text,
)

__all__ = ["MomentTable", "kde", "moment_table", "sliced_wasserstein"]


def sliced_wasserstein(x: Array, y: Array, *, num_projections: int = 128, seed: int = 0) -> float:
    r"""Compute the sliced Wasserstein-1 distance of a sample to a reference, in standard deviations of the reference.

    .. math:: \frac{1}{K} \sum_k \int_0^1 |F_{\theta_k^\top x}^{-1}(u) - F_{\theta_k^\top y}^{-1}(u)| \, du

    Both samples are standardised by the reference's mean and standard deviation, column by column, and projected on
    the same random directions. The distance between two samples of one distribution is not zero: compare with the
    distance between two halves of the reference.

    Args:
        x, y: the sample and the reference sample.
        num_projections, seed: the number of directions, uniform on the sphere, and their seed.

    Shapes:
        x: ``(n, d)``; y: ``(m, d)``.

    Raises:
        TypeError, ValueError: not numbers, of another shape or not finite, or a constant column of the reference.

    References:
        Sliced and Radon Wasserstein Barycenters of Measures, Bonneel et al., 2015.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(2000, 1))
        >>> round(sliced_wasserstein(x + 0.5 * x.std(), x), 3)  # a shift by half a standard deviation
        0.5
    """
    check_sizes(num_projections=num_projections)
    x, y = as_rows("x", x), as_rows("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"expected samples of shapes (n, d) and (m, d); got {x.shape} and {y.shape}")
    scale = _scale("y", y)
    x, y = (x - y.mean(0)) / scale, (y - y.mean(0)) / scale
    directions = np.random.default_rng(seed).normal(size=(num_projections, x.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # Between two levels of this grid neither quantile function jumps, so the integral is a finite sum.
    levels = np.union1d(np.arange(len(x) + 1) / len(x), np.arange(len(y) + 1) / len(y))
    widths, middles = np.diff(levels), (levels[1:] + levels[:-1]) / 2
    total = 0.0
    for direction in directions:
        u, v = (np.sort(rows @ direction)[(middles * len(rows)).astype(int)] for rows in (x, y))
        total += float(widths @ np.abs(u - v))
    return total / num_projections


@dataclass(frozen=True)
class MomentTable:
    """Means and standard deviations of draws and of reference draws, by column; ``str()`` prints them all.

    Args:
        names: of the columns.
        mean, sd: means and standard deviations of the draws.
        reference_mean, reference_sd: those of the reference draws.
    """

    names: tuple[str, ...]
    mean: NumPyArray
    sd: NumPyArray
    reference_mean: NumPyArray
    reference_sd: NumPyArray

    @property
    def mean_error(self) -> NumPyArray:
        """The errors of the means, in standard deviations of the reference."""
        return (self.mean - self.reference_mean) / self.reference_sd

    @property
    def sd_ratio(self) -> NumPyArray:
        """The standard deviations, divided by those of the reference."""
        return self.sd / self.reference_sd

    @property
    def worst_mean_error(self) -> float:
        """The largest error of a mean, in standard deviations of the reference."""
        return float(np.abs(self.mean_error).max())

    @property
    def worst_sd_error(self) -> float:
        """The largest relative error of a standard deviation."""
        return float(np.abs(self.sd_ratio - 1).max())

    def __str__(self) -> str:
        columns = ("mean", "reference", "error/sd", "sd", "reference", "ratio")
        numbers = (self.mean, self.reference_mean, self.mean_error, self.sd, self.reference_sd, self.sd_ratio)
        return table_text(self.names, columns, numbers, [".4g", ".4g", "+.3f", ".4g", ".4g", ".3f"])


def moment_table(draws: Values, reference: Values, names: Sequence[str] | None = None) -> MomentTable:
    """Compare the means and standard deviations of draws with those of reference draws.

    Args:
        draws, reference: arrays, or arrays by name; if both are given by name, the draws may have more of them than the
            reference, such as deterministic sites, which are then left out.
        names: of the columns; by default those of the dicts with indices, such as ``theta[0]``, or ``x[0]``.

    Shapes:
        draws: ``(n, d)``, or ``(n, *shape)`` by name; reference: ``(m, d)``, or ``(m, *shape)`` by name.

    Raises:
        TypeError, ValueError: not numbers, columns or names that do not match, fewer than 2 draws, or a constant column
            of the reference.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4000, 2))
        >>> print(moment_table({"mu": draws[:, 0], "tau": 2 * draws[:, 1]}, {"mu": draws[:, 0], "tau": draws[:, 1]}))
                 mean reference error/sd    sd reference ratio
        mu  -0.001572 -0.001572   +0.000  1.01      1.01 1.000
        tau  0.005496  0.002748   +0.003 1.992    0.9959 2.000
    """
    x, y, default = as_columns(draws, reference)
    names = column_names(names, default)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"expected at least 2 draws; got {min(len(x), len(y))}")
    return MomentTable(names, x.mean(0), x.std(0, ddof=1), y.mean(0), _scale("the reference", y))


def kde(x: Array, *, points: int = 200, limits: tuple[float, float] | None = None) -> tuple[NumPyArray, NumPyArray]:
    """Estimate the density of draws by ArviZ's kernel estimate, which corrects for bounds of the support.

    Args:
        x: the draws.
        points: of the grid.
        limits: the ends of the grid, which also exclude the draws beyond; by default the lowest and the highest draw.

    Shapes:
        x: ``(n,)``; the grid and the density of all draws on it: ``(points,)``.

    Raises:
        TypeError, ValueError: not finite numbers of one dimension, or fewer than two different draws within the limits.

    Example:
        >>> grid, density = kde(np.random.default_rng(0).normal(size=4000), limits=(-2.0, 2.0))
        >>> bool(abs(np.interp(0.0, grid, density) - 0.399) < 0.05)  # of a standard normal
        True
    """
    check_sizes(points=points)
    draws = as_array("draws", x, 1)
    low, high = (-math.inf, math.inf) if limits is None else limits
    within = draws[(draws >= low) & (draws <= high)]
    if (different := len(np.unique(within))) < 2:
        interval = "" if limits is None else f" from {low:g} to {high:g}"
        raise ValueError(f"expected at least two different draws{interval}; got {different}")
    try:
        estimate = import_module("arviz_stats.base").array_stats.kde
    except ImportError:
        estimate = import_module("arviz").kde
    grid, density = estimate(within)[:2]
    even_grid = np.linspace(within.min(), within.max(), points)
    return even_grid, np.interp(even_grid, grid, density) * (len(within) / len(draws))


def _scale(name: str, rows: NumPyArray) -> NumPyArray:
    """Return the standard deviations of columns that vary."""
    scale = rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
    if len(constant := np.flatnonzero(~(scale > 0))):
        raise ValueError(f"expected columns of {name} that vary; got a constant column {constant[0]}")
    return scale
