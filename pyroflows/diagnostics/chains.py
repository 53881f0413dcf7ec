"""Markov chains: nested R-hat and effective sample size of many short chains, and evidence by bridge sampling."""

import math

import numpy as np

from pyroflows.arguments import check_number, check_sizes
from pyroflows.diagnostics.arrays import Array, NumPyArray, as_array

__all__ = ["bridge_evidence", "ensemble_ess", "nested_rhat"]


def nested_rhat(draws: Array, num_groups: int) -> NumPyArray:
    r"""Compute the nested R-hat of many short chains, column by column: near 1 if groups of chains agree.

    .. math:: \sqrt{1 + B / W}

    B is the variance between the means of the groups; W, within the groups, is the mean variance between their chains
    plus that within chains. A chain may be much too short to have converged by itself: what counts is the mean of a
    group, whose chains start together.

    Args:
        draws: of the chains, those of a group next to each other.
        num_groups: of independent starts; it divides the number of chains.

    Shapes:
        draws: ``(chains, draws, columns)``, of at least two chains in a group, and of one draw or more.

    Returns:
        One number for each column; NaN for a constant one.

    Raises:
        TypeError, ValueError: not numbers, another shape, not finite, or another number of chains.

    References:
        Nested R-hat: Assessing the Convergence of Markov Chain Monte Carlo When Running Many Short Chains, Margossian
        et al., 2024 (arXiv:2110.13017).

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(64, 10, 1))
        >>> float(nested_rhat(draws, 4)[0]) < 1.01
        True
    """
    check_sizes(num_groups=num_groups)
    chains = as_array("draws", draws, 3)
    if num_groups < 2 or len(chains) % num_groups or len(chains) < 2 * num_groups or 0 in chains.shape:
        expected = "two groups or more, each of two chains or more and as many as the others"
        raise ValueError(f"expected {expected}; got {num_groups} groups of {len(chains)} chains")
    means = chains.mean(1).reshape(num_groups, -1, chains.shape[-1])
    within = means.var(1, ddof=1).mean(0)
    if chains.shape[1] > 1:
        within = within + chains.var(1, ddof=1).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(1 + means.mean(1).var(0, ddof=1) / within)


def ensemble_ess(draws: Array) -> NumPyArray:
    r"""Estimate the effective sample size of many independent chains, column by column, by the spread of their means.

    .. math:: C \, \mathrm{Var}(x) \,/\, \mathrm{Var}(\bar x_c)

    Unlike estimates by autocorrelation it is right for chains of a few draws; its own error is
    :math:`\sqrt{2 / (C - 1)}`.

    Args:
        draws: of C chains, 16 or more.

    Shapes:
        draws: ``(chains, draws, columns)``.

    Returns:
        One number for each column, at most the number of draws; NaN for a constant one.

    Raises:
        TypeError, ValueError: not numbers, another shape, not finite, or fewer chains.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(100, 10, 1))
        >>> 600 < float(ensemble_ess(draws)[0]) <= 1000
        True
    """
    chains = as_array("draws", draws, 3)
    if len(chains) < 16 or 0 in chains.shape:
        raise ValueError(f"expected 16 chains or more, of at least one draw and one column; got shape {chains.shape}")
    number = chains.shape[0] * chains.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = chains.reshape(number, -1).var(0) / chains.mean(1).var(0, ddof=1)
    return np.minimum(len(chains) * ratio, number)


def bridge_evidence(
    log_p: Array, log_q: Array, log_p_of_q: Array, log_q_of_q: Array, *, ess: float | None = None
) -> tuple[float, float]:
    r"""Estimate the log of a density's integral from draws of it and of a normalised density, by bridge sampling.

    .. math::
        Z = \frac{\mathbb E_q[h(x) \, p(x)]}{\mathbb E_p[h(x) \, q(x)]}, \qquad
        h \propto \frac{1}{n_p p / Z + n_q q}

    The better the two agree, the smaller is the error; draws of either outside the other's support cost nothing more.
    Fit q to other draws than those passed here, or the estimate is biased.

    Args:
        log_p, log_q: log-densities at draws of p, which need not be normalised; of q, which must be.
        log_p_of_q, log_q_of_q: log-densities at draws of q; ``log_p_of_q`` may be -inf.
        ess: effective number of the draws of p, if they are correlated.

    Shapes:
        log_p, log_q: ``(n_p,)``; log_p_of_q, log_q_of_q: ``(n_q,)``.

    Returns:
        The log evidence in nats, and its standard error to first order; infinite if the two do not overlap.

    Raises:
        TypeError, ValueError: not numbers, other shapes, NaN, or an ``ess`` that is not positive.

    References:
        Simulating Ratios of Normalizing Constants via a Simple Identity, Meng and Wong, 1996; Estimating Mixture and
        Markov Switching Models by Bridge Sampling, Fruehwirth-Schnatter, 2004 (its error).

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 2000))  # p is 5 times the standard normal density
        >>> log_normal = lambda x: -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
        >>> log_q = lambda y: log_normal(y / 1.2) - math.log(1.2)
        >>> value, error = bridge_evidence(
        ...     log_normal(x) + math.log(5), log_q(x), log_normal(1.2 * y) + math.log(5), log_q(1.2 * y)
        ... )
        >>> abs(value - math.log(5)) < 4 * error < 0.1
        True
    """
    names = ("log_p", "log_q", "log_p_of_q", "log_q_of_q")
    arrays = zip(names, (log_p, log_q, log_p_of_q, log_q_of_q), strict=True)
    at_p, q_at_p, p_at_q, at_q = (as_array(name, array, 1, finite=name != "log_p_of_q") for name, array in arrays)
    if at_p.shape != q_at_p.shape or p_at_q.shape != at_q.shape or not len(at_p) or not len(at_q):
        got = f"{at_p.shape} and {q_at_p.shape} of p's draws, {p_at_q.shape} and {at_q.shape} of q's"
        raise ValueError(f"expected two log-densities of each draw; got shapes {got}")
    if np.isnan(p_at_q).any():
        raise ValueError(f"expected log_p_of_q finite or -inf; got NaN at draw {int(np.isnan(p_at_q).argmax())}")
    if ess is None:
        ess = len(at_p)
    check_number("ess", ess, "(0, inf)")
    log_share_p, log_share_q = math.log(ess / (ess + len(at_q))), math.log(len(at_q) / (ess + len(at_q)))
    ratio_p, ratio_q = at_p - q_at_p, p_at_q - at_q
    if not np.isfinite(ratio_q).any():
        return -math.inf, math.inf
    log_z = float(np.median(ratio_p))
    for _ in range(1000):
        above = ratio_q - np.logaddexp(log_share_p + ratio_q - log_z, log_share_q)
        below = -np.logaddexp(log_share_p + ratio_p - log_z, log_share_q)
        old, log_z = log_z, float(_log_mean(above) - _log_mean(below))
        if abs(log_z - old) < 1e-9:
            break
    error = _relative_variance(above, len(at_q)) + _relative_variance(below, ess)
    return log_z, math.sqrt(error)


def _log_mean(values: NumPyArray) -> float:
    return float(np.logaddexp.reduce(values)) - math.log(len(values))


def _relative_variance(log_values: NumPyArray, number: float) -> float:
    """Return the relative variance of the mean of values given by their logarithms."""
    values = np.exp(log_values - log_values.max())
    return float(values.var() / values.mean() ** 2 / number)
