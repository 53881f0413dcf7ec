"""Diagnostics of a posterior: importance weights, distances between samples, moments, and calibration by simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_number, check_sizes

__all__ = [
    "Calibration",
    "MomentTable",
    "calibration",
    "coverage",
    "expected_band",
    "importance_ess",
    "kde",
    "khat_by_size",
    "khat_threshold",
    "moment_table",
    "pit",
    "psis",
    "rank_counts",
    "sbc_p_values",
    "sbc_ranks",
    "sliced_wasserstein",
]

NumPyArray = np.ndarray[Any, Any]
Array = NumPyArray | Tensor
Values = Array | Mapping[str, Array]
Given = TypeVar("Given", NumPyArray, Tensor)

_FEWEST_DRAWS = 30  # a fifth of them is the tail, and ArviZ fits a generalised Pareto to six numbers or more
_NEGLIGIBLE = -700.0  # exp of it is the smallest number ArviZ tells from zero
_FLAT = 1e-4  # nats; tail weights closer than this differ by rounding, and have no tail to speak of
_PROJECTIONS_AT_ONCE = 16


def psis(log_weights: Given) -> tuple[Given, float]:
    r"""Smooth the largest importance weights by a generalised Pareto distribution, and tell how heavy their tail is.

    .. math:: w_i = p(u_i) / q(u_i), \qquad u_i \sim q

    The fit is ArviZ's, of whichever generation is installed. Below 0.7, and below ``1 - 1 / log10(n)`` for fewer than
    2,200 draws, the smoothed weights can be trusted; one shape alone misleads, so look at the effective sample size.

    Args:
        log_weights: log densities of the target minus those of the guide, normalised or not; minus infinity is a
            weight of zero.

    Shapes:
        log_weights: ``(n,)``.

    Returns:
        The smoothed log weights, whose exponentials sum to 1, as an array or tensor like the one given; and the shape,
        k-hat. It is 0 where the largest weights are all equal, and infinite where it cannot be estimated: fewer than
        30 weights above zero, or a few far above all others, which are equal.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, fewer than 30 draws, a weight that is NaN or infinite, or none above zero.

    References:
        Pareto Smoothed Importance Sampling, Vehtari et al., 2024 (arXiv:1507.02646).

    Example:
        >>> log_weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> smoothed, khat = psis(log_weights)
        >>> round(float(smoothed.exp().sum()), 4)
        1.0
        >>> khat < 0.7
        True
    """
    weights = _log_weights(log_weights)
    if len(weights) < _FEWEST_DRAWS:
        raise ValueError(f"expected log weights of at least {_FEWEST_DRAWS} draws; got {len(weights)}")
    kept = weights > _NEGLIGIBLE
    khat = math.inf
    if kept.sum() >= _FEWEST_DRAWS:
        weights[kept], khat = _smoothed(weights[kept])
    weights = weights - np.logaddexp.reduce(weights)
    if isinstance(log_weights, Tensor):
        return torch.from_numpy(weights).to(log_weights), khat
    return weights, khat


def _smoothed(weights: NumPyArray) -> tuple[NumPyArray, float]:
    """Smooth log weights whose largest is 0, through ArviZ; they come back on the scale they came in."""
    tail = np.sort(weights)[-math.floor(min(len(weights) / 5, 3 * len(weights) ** 0.5)) - 1 :]
    if tail[-1] - tail[0] < _FLAT:
        return weights, 0.0
    try:
        stats = import_module("arviz_stats.base").array_stats
    except ImportError:
        from arviz import psislw

        with np.errstate(over="ignore"):  # of ArviZ, where the weights are nearly equal
            smoothed, khat = psislw(weights)
    else:
        # From ArviZ 1 on the array interface takes the logs of the inverse weights.
        smoothed, khat = stats.psislw(-weights)
    khat = float(khat)
    if not math.isfinite(khat):
        return weights, math.inf
    # Both give normalised weights: the body, which is not smoothed, tells by how much they were moved.
    lowest = weights.argmin()
    return smoothed + (weights[lowest] - smoothed[lowest]), khat


def khat_threshold(num_draws: int) -> float:
    r"""Give the k-hat up to which this many weighted draws can be trusted.

    .. math:: \min(1 - 1 / \log_{10} n, \; 0.7)

    Args:
        num_draws: of the target's guide.

    Raises:
        ValueError: fewer than 30 draws, of which no k-hat is estimated.

    References:
        Pareto Smoothed Importance Sampling, Vehtari et al., 2024 (arXiv:1507.02646).

    Example:
        >>> khat_threshold(100), khat_threshold(10_000)
        (0.5, 0.7)
    """
    check_sizes(num_draws=num_draws)
    if num_draws < _FEWEST_DRAWS:
        raise ValueError(f"expected at least {_FEWEST_DRAWS} draws; got {num_draws}")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def khat_by_size(log_weights: Array, sizes: Sequence[int] | None = None) -> dict[int, NumPyArray]:
    """Give k-hat of as many sets of draws as there are, for each of several sizes of a set.

    A tail that is heavier than it looks shows itself as a k-hat that grows with the size.

    Args:
        log_weights: as of :func:`psis`, in the order in which they were drawn.
        sizes: draws of one set; by default 100 and its doublings, up to all draws.

    Shapes:
        log_weights: ``(n,)``.

    Returns:
        For each size the k-hats of ``n // size`` sets that share no draw.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, a size below 30 or above the number of draws, a weight that is NaN or infinite, or a
            set without a weight above zero.

    Example:
        >>> log_weights = np.random.default_rng(0).normal(size=400)
        >>> {size: len(values) for size, values in khat_by_size(log_weights).items()}
        {100: 4, 200: 2, 400: 1}
    """
    weights = as_array("log weights", log_weights, 1, finite=False)
    if sizes is None:
        sizes = [100 * 2**i for i in range(max(0, int(math.log2(max(len(weights), 1) / 100))) + 1)]
    for size in sizes:
        check_sizes(size=size)
        if not _FEWEST_DRAWS <= size <= len(weights):
            raise ValueError(f"expected sizes from {_FEWEST_DRAWS} to the {len(weights)} draws; got {size}")
    return {
        int(size): np.array([psis(part)[1] for part in weights[: len(weights) // size * size].reshape(-1, size)])
        for size in sizes
    }


def importance_ess(log_weights: Array) -> float:
    r"""Give Kish's effective sample size of importance weights.

    .. math:: \Big(\sum_i w_i\Big)^2 \Big/ \sum_i w_i^2

    Args:
        log_weights: of the draws, normalised or not; minus infinity is a weight of zero.

    Shapes:
        log_weights: ``(n,)``.

    Returns:
        A number from 1 to n.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, no draws, a weight that is NaN or infinite, or none above zero.

    References:
        Survey Sampling, Kish, 1965.

    Example:
        >>> round(importance_ess(np.log([0.5, 0.25, 0.25])), 3)
        2.667
    """
    weights = np.exp(_log_weights(log_weights))
    return float(weights.sum() ** 2 / (weights**2).sum())


def _log_weights(log_weights: Array) -> NumPyArray:
    """Give a copy in float64 whose largest is 0, or say what is wrong."""
    weights = as_array("log weights", log_weights, 1, finite=False)
    bad = np.isnan(weights) | (weights == math.inf)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"expected log weights that are finite or -inf; got {weights[row]} at draw {row}")
    if len(weights) == 0 or weights.max() == -math.inf:
        raise ValueError(f"expected at least one weight above zero; got none in {len(weights)} draws")
    return weights - weights.max()


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
        return _table(self.names, columns, numbers, [".4g", ".4g", "+.3f", ".4g", ".4g", ".3f"])


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


def sbc_ranks(draws: Array, truth: Array) -> NumPyArray:
    r"""Give the ranks of the true values among posterior draws, for simulation-based calibration.

    .. math:: r_{sj} = \#\{l : \theta^{(l)}_{sj} < \theta^*_{sj}\}

    With the truth from the prior, data from the model given it, and independent draws from the right posterior, each
    rank is uniform on ``0, ..., num_draws``.

    Args:
        draws: posterior draws for each simulated data set.
        truth: the values each data set was simulated from.

    Shapes:
        draws: ``(simulations, num_draws, d)``; truth: ``(simulations, d)``.

    Returns:
        Integer ranks, shape ``(simulations, d)``.

    Raises:
        TypeError: not numbers.
        ValueError: shapes that do not match, or numbers that are not finite.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Talts et al., 2018
        (arXiv:1804.06788).

    Example:
        >>> sbc_ranks(np.array([[[1.0], [2.0], [3.0]]]), np.array([[2.5]]))
        array([[2]])
    """
    draws, truth = _simulations(draws, truth)
    return (draws < truth[:, None]).sum(1)


def sbc_p_values(ranks: Array, num_draws: int, *, num_bins: int | None = None) -> NumPyArray:
    """Test whether ranks are uniform, by the chi-square test, column by column.

    Args:
        ranks: of simulation-based calibration.
        num_draws: the posterior draws among which they were counted.
        num_bins: of the histogram; by default such that a bin expects 25 simulations, but at most 40.

    Shapes:
        ranks: ``(simulations, d)``, integers from 0 to ``num_draws``.

    Returns:
        A p-value for each column, shape ``(d,)``.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, a rank out of range, fewer than 10 simulations, or more bins than ranks.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Talts et al., 2018
        (arXiv:1804.06788).

    Example:
        >>> ranks = np.random.default_rng(0).integers(0, 100, size=(1000, 1))
        >>> bool(sbc_p_values(ranks, 99)[0] > 0.01), bool(sbc_p_values(ranks // 2, 99)[0] > 0.01)
        (True, False)
    """
    from scipy.stats import chisquare

    counts, expected = rank_counts(ranks, num_draws, num_bins=num_bins)
    return np.array([chisquare(column, expected).pvalue for column in counts.T])


def rank_counts(ranks: Array, num_draws: int, *, num_bins: int | None = None) -> tuple[NumPyArray, NumPyArray]:
    """Count ranks in the bins of a histogram, column by column, and say how many each bin expects of uniform ranks.

    Bins may hold one rank more or less than others where their number does not divide the ranks', and expect as much
    more.

    Args:
        ranks: of simulation-based calibration.
        num_draws: the posterior draws among which they were counted.
        num_bins: of the histogram; by default such that a bin expects 25 simulations, but at most 40.

    Shapes:
        ranks: ``(simulations, d)``, integers from 0 to ``num_draws``.

    Returns:
        Counts, shape ``(num_bins, d)``, and expected counts, shape ``(num_bins,)``.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, a rank out of range, fewer than 10 simulations, or more bins than ranks.

    Example:
        >>> counts, expected = rank_counts(np.arange(10)[:, None], 9, num_bins=3)
        >>> counts[:, 0], expected
        (array([4, 3, 3]), array([4., 3., 3.]))
    """
    check_sizes(num_draws=num_draws)
    counted = as_array("ranks", ranks, 2)
    if len(counted) < 10:
        raise ValueError(f"expected at least 10 simulations; got {len(counted)}")
    if counted.min() < 0 or counted.max() > num_draws:
        raise ValueError(f"expected ranks from 0 to {num_draws}; got {counted.min():g} to {counted.max():g}")
    if num_bins is None:
        num_bins = min(max(2, min(40, len(counted) // 25)), num_draws + 1)
    check_sizes(num_bins=num_bins)
    if not 2 <= num_bins <= num_draws + 1:
        raise ValueError(f"expected 2 to {num_draws + 1} bins, one for each rank at most; got {num_bins}")
    bin_of_rank = np.arange(num_draws + 1) * num_bins // (num_draws + 1)
    expected = np.bincount(bin_of_rank, minlength=num_bins) * (len(counted) / (num_draws + 1))
    bins = bin_of_rank[counted.astype(int)]
    return np.stack([np.bincount(column, minlength=num_bins) for column in bins.T], 1), expected


def pit(draws: Array, truth: Array) -> NumPyArray:
    r"""Give the probability integral transform of true values, by draws of what predicts them.

    .. math:: u_{sj} = \frac{r_{sj} + 1/2}{n + 1}, \qquad r_{sj} = \#\{l : \theta^{(l)}_{sj} < \theta^*_{sj}\}

    Args:
        draws: of each prediction: posterior draws for a simulated data set, or samples of a flow given a row's context.
        truth: the values that came.

    Shapes:
        draws: ``(simulations, num_draws, d)``; truth: ``(simulations, d)``.

    Returns:
        Numbers in (0, 1), shape ``(simulations, d)``; of right predictions, uniform up to steps of ``1 / (n + 1)``.

    Raises:
        TypeError: not numbers.
        ValueError: shapes that do not match, or numbers that are not finite.

    References:
        Present Position and Potential Developments: The Prequential Approach, Dawid, 1984.

    Example:
        >>> pit(np.array([[[1.0], [2.0], [3.0]]]), np.array([[2.5]]))
        array([[0.625]])
    """
    num_draws = int(np.shape(draws)[1]) if np.ndim(draws) == 3 else 0
    return (sbc_ranks(draws, truth) + 0.5) / (num_draws + 1)


def expected_band(shares: Array | Sequence[float], num: int, *, level: float = 0.99) -> tuple[NumPyArray, NumPyArray]:
    """Give the band in which observed shares of independent trials lie by chance: a binomial's central interval.

    It holds for each share alone, so that of a hundred shares one may be outside.

    Args:
        shares: the true ones, such as nominal coverages or a bin's share of ranks.
        num: of trials.
        level: the probability with which an observed share is in the band.

    Shapes:
        shares: ``(k,)``.

    Returns:
        The lowest and the highest share, each of shape ``(k,)``.

    Raises:
        TypeError: not numbers.
        ValueError: a share or a level that is no probability, or ``num`` is not positive.

    Example:
        >>> low, high = expected_band([0.5], 400, level=0.95)
        >>> low, high
        (array([0.45]), array([0.55]))
    """
    from scipy.stats import binom

    check_sizes(num=num)
    check_number("level", level, "(0, 1)")
    true = as_array("shares", shares, 1)
    if ((true < 0) | (true > 1)).any():
        raise ValueError(f"expected shares from 0 to 1; got {true.min():g} to {true.max():g}")
    low, high = binom.interval(level, num, true)
    return low / num, high / num


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


def coverage(draws: Array, truth: Array, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)) -> NumPyArray:
    """Give how often central posterior intervals hold the true value.

    Args:
        draws: posterior draws for each simulated data set.
        truth: the values each data set was simulated from.
        levels: the probabilities of the intervals.

    Shapes:
        draws: ``(simulations, num_draws, d)``; truth: ``(simulations, d)``.

    Returns:
        Shares of the simulations, shape ``(levels, d)``; of a right posterior, the levels up to chance.

    Raises:
        TypeError: not numbers.
        ValueError: shapes that do not match, numbers that are not finite, or a level that is no probability.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> coverage(rng.normal(size=(400, 500, 1)), rng.normal(size=(400, 1)), levels=[0.5])
        array([[0.495]])
    """
    draws, truth = _simulations(draws, truth)
    for level in levels:
        check_number("a level", level, "(0, 1)")
    tails = (1 - np.asarray(levels, dtype=float)) / 2
    low, high = np.quantile(draws, tails, axis=1), np.quantile(draws, 1 - tails, axis=1)
    return ((low <= truth) & (truth <= high)).mean(1)


@dataclass(frozen=True)
class Calibration:
    """What simulation-based calibration found.

    Args:
        names: of the columns.
        ranks: of the true values among the draws, shape ``(simulations, d)``.
        num_draws: the draws of each posterior.
        p_values: of the chi-square test that the ranks are uniform, one a column.
        levels: probabilities of central intervals.
        coverage: how often each holds the truth, shape ``(levels, d)``.
    """

    names: tuple[str, ...]
    ranks: NumPyArray
    num_draws: int
    p_values: NumPyArray
    levels: tuple[float, ...]
    coverage: NumPyArray

    @property
    def ok(self) -> bool:
        """Whether no column's ranks are far from uniform: the smallest p-value, times the columns, is above 0.01."""
        return bool(self.p_values.min() * len(self.names) > 0.01)

    def __str__(self) -> str:
        columns = ["p-value", *(f"in {level:.0%}" for level in self.levels)]
        numbers = [self.p_values, *self.coverage]
        head = f"{len(self.ranks)} simulations, {self.num_draws} draws each: ranks {'' if self.ok else 'NOT '}uniform"
        return head + "\n" + _table(self.names, columns, numbers, [".3f"] * len(columns))


def calibration(
    draws: Array,
    truth: Array,
    names: Sequence[str] | None = None,
    *,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
) -> Calibration:
    """Do simulation-based calibration: ranks, the test of their uniformity, and the coverage of central intervals.

    Args:
        draws: posterior draws for each simulated data set.
        truth: the values each data set was simulated from.
        names: of the columns.
        levels: the probabilities of the intervals.

    Shapes:
        draws: ``(simulations, num_draws, d)``; truth: ``(simulations, d)``.

    Returns:
        A result that prints, with ``ok``.

    Raises:
        TypeError: not numbers.
        ValueError: shapes that do not match, numbers that are not finite, fewer than 10 simulations, or a level that is
            no probability.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Talts et al., 2018
        (arXiv:1804.06788).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> calibration(rng.normal(size=(400, 99, 1)), rng.normal(size=(400, 1)), ["mu"]).ok
        True
    """
    ranks = sbc_ranks(draws, truth)
    names = [f"x[{i}]" for i in range(ranks.shape[1])] if names is None else names
    names = tuple(map(str, names))
    if len(names) != ranks.shape[1]:
        raise ValueError(f"expected a name for each of {ranks.shape[1]} columns; got {len(names)}")
    num_draws = int(draws.shape[1])
    p_values = sbc_p_values(ranks, num_draws)
    return Calibration(names, ranks, num_draws, p_values, tuple(map(float, levels)), coverage(draws, truth, levels))


def as_array(name: str, values: Any, dims: int, *, finite: bool = True) -> NumPyArray:
    """Give numbers as an array in float64, or say what is wrong with them."""
    try:
        given = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)
        array = given.astype(np.float64, casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(f"expected {name} as an array or a tensor of numbers; got {type(values).__name__}") from None
    if array.ndim != dims:
        raise ValueError(f"expected {name} with {dims} dimension{'s' if dims > 1 else ''}; got shape {array.shape}")
    if finite and not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"expected finite numbers in {name}; got {array[where]} at {where}")
    return array


def _scale(name: str, rows: NumPyArray) -> NumPyArray:
    scale = rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
    constant = np.flatnonzero(~(scale > 0))
    if len(constant):
        raise ValueError(f"expected columns of {name} that vary; got a constant column {constant[0]}")
    return scale


def as_columns(name: str, values: Values) -> tuple[NumPyArray, list[str]]:
    """Give values as rows of columns, with the columns' names."""
    if not isinstance(values, Mapping):
        rows = as_array(name, values, 2)
        return rows, [f"x[{i}]" for i in range(rows.shape[1])]
    if not values:
        raise ValueError(f"expected {name} of at least one name; got none")
    parts, names = [], []
    for key, value in values.items():
        shape = tuple(np.shape(value.detach().cpu() if isinstance(value, Tensor) else value))
        if not shape:
            raise ValueError(f"expected {name} of {key!r} of shape (n, *shape); got a single number")
        parts.append(as_array(f"{name} of {key!r}", value, len(shape)).reshape(shape[0], -1))
        names += labels(key, shape[1:])
    lengths = {len(part) for part in parts}
    if len(lengths) > 1:
        raise ValueError(f"expected as many draws of each name; got {' and '.join(map(str, sorted(lengths)))}")
    return np.concatenate(parts, 1), names


def labels(name: str, shape: Sequence[int]) -> list[str]:
    """Name every number of an array: ``theta`` itself, or ``theta[0,0]``, ``theta[0,1]`` and so on."""
    return [name + (f"[{','.join(map(str, at))}]" if at else "") for at in np.ndindex(*shape)]


def _simulations(draws: Array, truth: Array) -> tuple[NumPyArray, NumPyArray]:
    draws, truth = as_array("draws", draws, 3), as_array("truth", truth, 2)
    if draws.shape[::2] != truth.shape or 0 in draws.shape:
        raise ValueError(
            "expected draws of shape (simulations, num_draws, d) and a truth of (simulations, d), not empty; "
            f"got {draws.shape} and {truth.shape}"
        )
    return draws, truth


def _table(names: Sequence[str], columns: Sequence[str], numbers: Sequence[Any], formats: Sequence[str]) -> str:
    """Align names to the left, numbers to the right."""
    cells = [
        [title, *(format(float(number), form) for number in column)]
        for title, column, form in zip(columns, numbers, formats, strict=True)
    ]
    widths = [max(map(len, column)) for column in cells]
    first = max(map(len, names))
    rows = zip(["", *names], *cells, strict=True)
    return "\n".join(
        " ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))])
        for name, *row in rows
    )
