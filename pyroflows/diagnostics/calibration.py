"""Calibration by simulation: ranks, coverage, and the band of chance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyroflows.arguments import check_number, check_sizes
from pyroflows.diagnostics.arrays import Array, NumPyArray, as_array, column_names, table_text

__all__ = [
    "Calibration",
    "calibration",
    "coverage",
    "expected_band",
    "pit",
    "rank_counts",
    "sbc_p_values",
    "sbc_ranks",
]

_LEVELS = (0.5, 0.8, 0.9, 0.95)


def sbc_ranks(draws: Array, truth: Array) -> NumPyArray:
    r"""Compute the ranks of true values among posterior draws, for simulation-based calibration.

    .. math:: r_{sj} = \#\{l : \theta^{(l)}_{sj} < \theta^*_{sj}\}

    If the true values are drawn from the prior, the data from the model given them, and the draws independently from
    the exact posterior, then each rank is uniform on ``0, ..., num_draws``.

    Args:
        draws, truth: posterior draws for each simulated data set, and the values from which it was simulated.

    Shapes:
        draws: ``(simulations, num_draws, d)``; truth and result: ``(simulations, d)``.

    Raises:
        TypeError, ValueError: not numbers, not finite, empty, or shapes that do not match.

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
    """Compute the p-value, for each column, of a chi-square test of uniform ranks.

    Args:
        ranks, num_draws, num_bins: as in :func:`rank_counts`.

    Example:
        >>> ranks = np.random.default_rng(0).integers(0, 100, size=(1000, 1))
        >>> bool(sbc_p_values(ranks, 99)[0] > 0.01), bool(sbc_p_values(ranks // 2, 99)[0] > 0.01)
        (True, False)
    """
    from scipy.stats import chisquare

    counts, expected = rank_counts(ranks, num_draws, num_bins=num_bins)
    return chisquare(counts, expected[:, None]).pvalue


def rank_counts(ranks: Array, num_draws: int, *, num_bins: int | None = None) -> tuple[NumPyArray, NumPyArray]:
    """Count ranks in the bins of a histogram, column by column, and compute the counts expected of uniform ranks.

    If the number of bins does not divide the number of ranks, some bins hold one rank more, and are expected to.

    Args:
        ranks: integers from 0 to ``num_draws``, from :func:`sbc_ranks`, of at least 10 simulations.
        num_draws: posterior draws for each simulation.
        num_bins: from 2 to one for each rank; by default 25 simulations are expected in a bin, but at most 40 bins.

    Shapes:
        ranks: ``(simulations, d)``; counts: ``(num_bins, d)``; expected counts: ``(num_bins,)``.

    Example:
        >>> counts, expected = rank_counts(np.arange(10)[:, None], 9, num_bins=3)
        >>> counts[:, 0], expected
        (array([4, 3, 3]), array([4., 3., 3.]))
    """
    check_sizes(num_draws=num_draws)
    ranks = as_array("ranks", ranks, 2)
    if len(ranks) < 10:
        raise ValueError(f"expected at least 10 simulations; got {len(ranks)}")
    if ranks.min() < 0 or ranks.max() > num_draws:
        raise ValueError(f"expected ranks from 0 to {num_draws}; got {ranks.min():g} to {ranks.max():g}")
    if num_bins is None:
        num_bins = min(max(2, min(40, len(ranks) // 25)), num_draws + 1)
    check_sizes(num_bins=num_bins)
    if not 2 <= num_bins <= num_draws + 1:
        raise ValueError(f"expected 2 to {num_draws + 1} bins, one for each rank at most; got {num_bins}")
    bin_of_rank = np.arange(num_draws + 1) * num_bins // (num_draws + 1)
    expected = np.bincount(bin_of_rank, minlength=num_bins) * (len(ranks) / (num_draws + 1))
    bins = bin_of_rank[ranks.astype(int)]
    return np.stack([np.bincount(column, minlength=num_bins) for column in bins.T], 1), expected


def pit(draws: Array, truth: Array) -> NumPyArray:
    r"""Compute the probability integral transform of true values from draws of their predictive distributions.

    .. math:: u_{sj} = \frac{r_{sj} + 1/2}{n + 1}, \qquad r_{sj} = \#\{l : \theta^{(l)}_{sj} < \theta^*_{sj}\}

    For exact predictions it is uniform up to steps of ``1 / (n + 1)``.

    Args:
        draws, truth: as in :func:`sbc_ranks`; draws can also be samples of a flow given the context of each row.

    References:
        Present Position and Potential Developments: The Prequential Approach, Dawid, 1984.

    Example:
        >>> pit(np.array([[[1.0], [2.0], [3.0]]]), np.array([[2.5]]))
        array([[0.625]])
    """
    return (sbc_ranks(draws, truth) + 0.5) / (np.shape(draws)[1] + 1)


def expected_band(shares: Array | Sequence[float], num: int, *, level: float = 0.99) -> tuple[NumPyArray, NumPyArray]:
    """Compute the central intervals of observed shares of independent trials, from the binomial distribution.

    The level holds for each share alone: one of a hundred shares may be outside by chance.

    Args:
        shares: the expected ones, from 0 to 1, such as nominal coverages or a bin's share of ranks.
        num: the number of trials.
        level: the probability that an observed share is within its interval.

    Shapes:
        shares, lower ends and upper ends: ``(k,)``.

    Example:
        >>> expected_band([0.5], 400, level=0.95)
        (array([0.45]), array([0.55]))
    """
    from scipy.stats import binom

    check_sizes(num=num)
    check_number("level", level, "(0, 1)")
    shares = as_array("shares", shares, 1)
    if ((shares < 0) | (shares > 1)).any():
        raise ValueError(f"expected shares from 0 to 1; got {shares.min():g} to {shares.max():g}")
    low, high = binom.interval(level, num, shares)
    return low / num, high / num


def coverage(draws: Array, truth: Array, levels: Sequence[float] = _LEVELS) -> NumPyArray:
    """Compute how often central posterior intervals hold the true value: for exact posteriors, the levels up to chance.

    Args:
        draws, truth: as in :func:`sbc_ranks`, which says what is refused.
        levels: the probabilities of the intervals.

    Returns:
        Shares of the simulations, ``(levels, d)``.

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
    """Results of simulation-based calibration.

    Args:
        names: of the columns.
        ranks: of the true values among the draws, shape ``(simulations, d)``.
        num_draws: posterior draws for each simulation.
        p_values: of the chi-square test of uniform ranks, one for each column.
        levels, coverage: probabilities of central intervals, and how often each holds the true value, ``(levels, d)``.
    """

    names: tuple[str, ...]
    ranks: NumPyArray
    num_draws: int
    p_values: NumPyArray
    levels: tuple[float, ...]
    coverage: NumPyArray

    @property
    def ok(self) -> bool:
        """Whether the ranks look uniform: the smallest p-value, times the number of columns, is above 0.01."""
        return bool(self.p_values.min() * len(self.names) > 0.01)

    def __str__(self) -> str:
        columns = ["p-value", *(f"in {level:.0%}" for level in self.levels)]
        numbers = [self.p_values, *self.coverage]
        head = f"{len(self.ranks)} simulations, {self.num_draws} draws each: ranks {'' if self.ok else 'NOT '}uniform"
        return head + "\n" + table_text(self.names, columns, numbers, [".3f"] * len(columns))


def calibration(
    draws: Array, truth: Array, names: Sequence[str] | None = None, *, levels: Sequence[float] = _LEVELS
) -> Calibration:
    """Run simulation-based calibration: ranks, the test of their uniformity, and the coverage of central intervals.

    Args:
        draws, truth: as in :func:`sbc_ranks`, which says what is refused, of at least 10 simulations.
        names: of the columns.
        levels: the probabilities of the intervals.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> calibration(rng.normal(size=(400, 99, 1)), rng.normal(size=(400, 1)), ["mu"]).ok
        True
    """
    draws, truth = _simulations(draws, truth)
    names = column_names(names, [f"x[{i}]" for i in range(truth.shape[1])])
    ranks, num_draws = sbc_ranks(draws, truth), draws.shape[1]
    p_values = sbc_p_values(ranks, num_draws)
    return Calibration(names, ranks, num_draws, p_values, tuple(map(float, levels)), coverage(draws, truth, levels))


def _simulations(draws: Array, truth: Array) -> tuple[NumPyArray, NumPyArray]:
    draws, truth = as_array("draws", draws, 3), as_array("truth", truth, 2)
    if draws.shape[::2] != truth.shape or 0 in draws.shape:
        expected = "draws of shape (simulations, num_draws, d) and a truth of (simulations, d), not empty"
        raise ValueError(f"expected {expected}; got {draws.shape} and {truth.shape}")
    return draws, truth
