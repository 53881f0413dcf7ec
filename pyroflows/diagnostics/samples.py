"""Distances between samples, their moments and their densities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from pyroflows.arguments import check_sizes
from pyroflows.diagnostics.arrays import Array, NumPyArray, Values, as_array, as_columns, table_text

__all__ = [
    "MomentTable",
    "kde",
    "moment_table",
    "sliced_wasserstein",
]

_PROJECTIONS_AT_ONCE = 16


def sliced_wasserstein(x: Array, y: Array, *, num_projections: int = 128, seed: int = 0) -> float:
    r"""Give the sliced Wasserstein-1 distance of a sample to a reference, in the reference's standard deviations.

    .. math:: \frac{1}{K} \sum_k \int_0^1 |F_{\theta_k^\top x}^{-1}(u) - F_{\theta_k^\top y}^{-1}(u)| \, du

    Both samples are standardised by the reference's mean and standard deviation, column by column, and projected on
    the same random directions. Even two samples of one distribution are apart: that floor is the distance between two
    halves of the reference.

    Args:
        x: the sample.
        y: the reference sample; it may have another number of rows.
        num_projections: directions, uniform on the sphere.
        seed: of the directions.

    Shapes:
        x: ``(n, d)``; y: ``(m, d)``.

    Returns:
        The mean over the directions.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, numbers that are not finite, or a column of the reference that is constant.

    References:
        Sliced and Radon Wasserstein Barycenters of Measures, Bonneel et al., 2015.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(2000, 1))
        >>> round(sliced_wasserstein(x + 0.5 * x.std(), x), 3)  # a shift by half a standard deviation
        0.5
    """
    check_sizes(num_projections=num_projections)
    x, y = as_array("x", x, 2), as_array("y", y, 2)
    if x.shape[1] != y.shape[1] or 0 in x.shape or 0 in y.shape:
        raise ValueError(f"expected samples of shapes (n, d) and (m, d), not empty; got {x.shape} and {y.shape}")
    scale = _scale("y", y)
    x, y = (x - y.mean(0)) / scale, (y - y.mean(0)) / scale
    directions = np.random.default_rng(seed).normal(size=(num_projections, x.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # Between two levels of this grid neither quantile function jumps, so that the integral is a finite sum.
    levels = np.union1d(np.arange(len(x) + 1) / len(x), np.arange(len(y) + 1) / len(y))
    widths, middles = np.diff(levels), (levels[1:] + levels[:-1]) / 2
    of_x = np.minimum((middles * len(x)).astype(int), len(x) - 1)
    of_y = np.minimum((middles * len(y)).astype(int), len(y) - 1)
    total = 0.0
    for some in np.split(directions, range(_PROJECTIONS_AT_ONCE, num_projections, _PROJECTIONS_AT_ONCE)):
        gaps = np.sort(x @ some.T, axis=0)[of_x] - np.sort(y @ some.T, axis=0)[of_y]
        total += float((widths @ np.abs(gaps)).sum())
    return total / num_projections


@dataclass(frozen=True)
class MomentTable:
    """Means and standard deviations of draws beside those of reference draws, column by column.

    Args:
        names: of the columns.
        mean: of the draws.
        sd: of the draws.
        reference_mean: of the reference draws.
        reference_sd: of the reference draws.
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
        """The standard deviations, as shares of the reference's."""
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
    r"""Compare the means and standard deviations of draws with those of reference draws.

    Args:
        draws: an array, or arrays by name.
        reference: the reference draws, in the same columns; where both are given by name, the names are matched.
        names: of the columns; by default those of the dicts with indices, such as ``theta[0]``, or ``x[0]``.

    Shapes:
        draws: ``(n, d)``, or ``(n, *shape)`` by name; reference: ``(m, d)``, or ``(m, *shape)`` by name.

    Returns:
        A table that prints, with ``mean_error`` (in the reference's deviations), ``sd_ratio`` and the worst of both.

    Raises:
        TypeError: not numbers.
        ValueError: columns or names that do not match, fewer than 2 draws, or a constant column of the reference.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4000, 2))
        >>> print(moment_table({"mu": draws[:, 0], "tau": 2 * draws[:, 1]}, {"mu": draws[:, 0], "tau": draws[:, 1]}))
                 mean reference error/sd    sd reference ratio
        mu  -0.001572 -0.001572   +0.000  1.01      1.01 1.000
        tau  0.005496  0.002748   +0.003 1.992    0.9959 2.000
    """
    if isinstance(draws, Mapping) and isinstance(reference, Mapping):
        missing = sorted(set(draws) ^ set(reference))
        if missing:
            raise ValueError(f"expected draws and reference of the same names; got {missing[0]!r} in one alone")
        reference = {name: reference[name] for name in draws}
    (found, found_names), (wanted, wanted_names) = as_columns("draws", draws), as_columns("reference", reference)
    if found.shape[1] != wanted.shape[1]:
        raise ValueError(f"expected as many columns as the reference's {wanted.shape[1]}; got {found.shape[1]}")
    if names is None:
        names = wanted_names if isinstance(reference, Mapping) else found_names
    names = tuple(map(str, names))
    if len(names) != found.shape[1]:
        raise ValueError(f"expected a name for each of {found.shape[1]} columns; got {len(names)}")
    for rows in (found, wanted):
        if len(rows) < 2:
            raise ValueError(f"expected at least 2 draws; got {len(rows)}")
    scale = _scale("the reference", wanted)
    return MomentTable(names, found.mean(0), found.std(0, ddof=1), wanted.mean(0), scale)


def kde(x: Array, *, points: int = 200, limits: tuple[float, float] | None = None) -> tuple[NumPyArray, NumPyArray]:
    """Give a density of draws by ArviZ's kernel estimate, which knows of hard bounds at their ends.

    Args:
        x: the draws.
        points: of the grid.
        limits: where to estimate it, from the draws within; by default from the lowest draw to the highest.

    Shapes:
        x: ``(n,)``.

    Returns:
        The grid and the density of all draws on it, each of shape ``(points,)``.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, numbers that are not finite, or fewer than two different draws within the limits.

    Example:
        >>> grid, density = kde(np.random.default_rng(0).normal(size=4000), limits=(-2.0, 2.0))
        >>> bool(abs(np.interp(0.0, grid, density) - 0.399) < 0.05)  # of a standard normal
        True
    """
    check_sizes(points=points)
    draws = as_array("draws", x, 1)
    low, high = (-math.inf, math.inf) if limits is None else limits
    within = draws[(draws >= low) & (draws <= high)]
    if len(np.unique(within)) < 2:
        where = "" if limits is None else f" from {low:g} to {high:g}"
        raise ValueError(f"expected at least two different draws{where}; got {len(np.unique(within))}")
    try:
        estimate = import_module("arviz_stats.base").array_stats.kde
    except ImportError:
        estimate = import_module("arviz").kde
    grid, density = estimate(within)[:2]
    finer = np.linspace(within.min(), within.max(), points)
    return finer, np.interp(finer, grid, density) * (len(within) / len(draws))


def _scale(name: str, rows: NumPyArray) -> NumPyArray:
    scale = rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
    constant = np.flatnonzero(~(scale > 0))
    if len(constant):
        raise ValueError(f"expected columns of {name} that vary; got a constant column {constant[0]}")
    return scale
