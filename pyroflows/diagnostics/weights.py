"""Importance weights: Pareto smoothing, k-hat and the effective sample size."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_sizes
from pyroflows.diagnostics.arrays import Array, NumPyArray, as_array

__all__ = ["importance_ess", "khat_by_size", "khat_threshold", "psis", "systematic_rows"]

_MIN_DRAWS = 30  # a fifth of them is the tail
_MIN_TAIL = 5  # weights, fewer of which tell no shape
_NEGLIGIBLE = -700.0  # its exponential is about the smallest number that a float distinguishes from zero
_FLAT = 1e-4  # nats; tail weights closer than this differ by rounding only
AnyArray = TypeVar("AnyArray", NumPyArray, Tensor)


def psis(log_weights: AnyArray) -> tuple[AnyArray, float]:
    r"""Smooth the largest importance weights by a generalised Pareto distribution, and estimate its shape k-hat.

    .. math:: w_i = p(u_i) / q(u_i), \qquad u_i \sim q

    The smoothed weights can be trusted with k-hat below :func:`khat_threshold`. K-hat alone can mislead: look at the
    effective sample size too.

    Args:
        log_weights: log-densities of the target minus those of the guide, normalised or not; minus infinity is a
            weight of zero.

    Shapes:
        log_weights: ``(n,)``.

    Returns:
        The smoothed log weights, whose exponentials sum to 1, as an array or a tensor like ``log_weights``; and k-hat:
        0 if the largest weights are all equal, and infinite if it cannot be estimated, from fewer than 30 weights above
        zero, or a few far above all others, which are equal.

    Raises:
        TypeError, ValueError: not numbers, another shape, fewer than 30 draws, NaN, infinity, or no weight above zero.

    References:
        Pareto Smoothed Importance Sampling, Vehtari et al., 2024 (arXiv:1507.02646); A New and Efficient Estimation
        Method for the Generalized Pareto Distribution, Zhang and Stephens, 2009.

    Example:
        >>> log_weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> smoothed, khat = psis(log_weights)
        >>> round(float(smoothed.exp().sum()), 4), khat < 0.7
        (1.0, True)
    """
    weights = _log_weights(log_weights)
    if len(weights) < _MIN_DRAWS:
        raise ValueError(f"expected log weights of at least {_MIN_DRAWS} draws; got {len(weights)}")
    positive = weights > _NEGLIGIBLE
    khat = math.inf
    if positive.sum() >= _MIN_DRAWS:
        weights[positive], khat = _smoothed(weights[positive])
    weights = weights - np.logaddexp.reduce(weights)
    return torch.from_numpy(weights).to(log_weights) if isinstance(log_weights, Tensor) else weights, khat


def _smoothed(weights: NumPyArray) -> tuple[NumPyArray, float]:
    """Replace the largest log weights, of which the largest is 0, by quantiles of the Pareto distribution of them."""
    number = math.ceil(min(len(weights) / 5, 3 * len(weights) ** 0.5))
    order = np.argsort(weights, kind="stable")[-number - 1 :]
    cutoff, tail = weights[order[0]], weights[order[1:]]
    if tail[-1] - cutoff < _FLAT:
        return weights, 0.0
    is_above = tail > max(cutoff, _NEGLIGIBLE)
    rows, excess = order[1:][is_above], np.exp(tail[is_above]) - math.exp(cutoff)
    if len(rows) < _MIN_TAIL:
        return weights, math.inf
    khat, scale = _generalised_pareto(excess)
    if not math.isfinite(khat):
        return weights, math.inf
    places = (np.arange(len(rows)) + 0.5) / len(rows)
    quantiles = -np.log1p(-places) if abs(khat) < 1e-12 else np.expm1(-khat * np.log1p(-places)) / khat
    smoothed = weights.copy()
    smoothed[rows] = np.minimum(np.log(scale * quantiles + math.exp(cutoff)), 0.0)
    return smoothed, khat


def _generalised_pareto(x: NumPyArray) -> tuple[float, float]:
    """Return shape and scale of the generalised Pareto distribution of sorted positive numbers.

    By Zhang and Stephens (2009), the posterior mean over a grid, with a weak prior that draws the shape towards 0.5.
    """
    number = len(x)
    size = 30 + int(number**0.5)
    quartile = x[int(number / 4 + 0.5) - 1]
    grid = 1 / x[-1] + (1 - np.sqrt(size / (np.arange(size) + 0.5))) / (3 * quartile)
    with np.errstate(divide="ignore", invalid="ignore"):
        shape = np.log1p(-grid[:, None] * x).mean(1)
        log_likelihood = number * (np.log(-grid / shape) - shape - 1)
    weights = np.exp(log_likelihood - np.nanmax(log_likelihood))
    best = float(np.nansum(weights * grid) / np.nansum(weights))
    shape_at_best = float(np.log1p(-best * x).mean())
    return (number * shape_at_best + 5) / (number + 10), -shape_at_best / best


def khat_threshold(num_draws: int) -> float:
    r"""Return the k-hat of :func:`psis` up to which weighted draws can be trusted: 0.7 for 2,200 draws or more.

    .. math:: \min(1 - 1 / \log_{10} n, \; 0.7)

    Args:
        num_draws: at least 30, since no k-hat is estimated from fewer.

    Example:
        >>> khat_threshold(100), khat_threshold(10_000)
        (0.5, 0.7)
    """
    check_sizes(num_draws=num_draws)
    if num_draws < _MIN_DRAWS:
        raise ValueError(f"expected at least {_MIN_DRAWS} draws; got {num_draws}")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def khat_by_size(log_weights: Array, sizes: Sequence[int] | None = None) -> dict[int, NumPyArray]:
    """Estimate k-hat from subsets of several sizes: if the tail is heavier than it looks, k-hat grows with the size.

    Args:
        log_weights: as in :func:`psis`, which says what is refused, in the order in which they were drawn.
        sizes: draws in a subset, from 30 to all; by default 100 and its doublings.

    Returns:
        For each size, the k-hats of ``n // size`` disjoint subsets.

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
        if not _MIN_DRAWS <= size <= len(weights):
            raise ValueError(f"expected sizes from {_MIN_DRAWS} to the {len(weights)} draws; got {size}")
    subsets = {int(size): weights[: len(weights) // size * size].reshape(-1, size) for size in sizes}
    return {size: np.array([psis(subset)[1] for subset in rows]) for size, rows in subsets.items()}


def importance_ess(log_weights: Array) -> float:
    r"""Compute Kish's effective sample size of importance weights, a number from 1 to n.

    .. math:: \Big(\sum_i w_i\Big)^2 \Big/ \sum_i w_i^2

    Args:
        log_weights: as in :func:`psis`, which says what is refused, but of one draw or more.

    References:
        Survey Sampling, Kish, 1965.

    Example:
        >>> round(importance_ess(np.log([0.5, 0.25, 0.25])), 3)
        2.667
    """
    weights = np.exp(_log_weights(log_weights))
    return float(weights.sum() ** 2 / (weights**2).sum())


def systematic_rows(shares: Tensor, number: int) -> Tensor:
    """Draw rows in proportion to their shares, each as often as its share of the number, to the nearest integer.

    Args:
        shares: of the weight, which sum to 1 along the last dimension; each batch element is drawn from by itself.
        number: of rows to draw.

    Shapes:
        shares: ``(*batch, n)``; the rows: ``(*batch, number)``.

    References:
        Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models, Kitagawa, 1996.

    Example:
        >>> systematic_rows(torch.tensor([0.0, 0.5, 0.5]), 4)
        tensor([1, 1, 2, 2])
    """
    edges = shares.double().cumsum(-1)
    offset = torch.rand((*shares.shape[:-1], 1), dtype=torch.float64, device=shares.device)
    places = (torch.arange(number, dtype=torch.float64, device=shares.device) + offset) / number
    return torch.searchsorted(edges, places).clamp(max=shares.shape[-1] - 1)


def _log_weights(log_weights: Array) -> NumPyArray:
    """Return a float64 copy, shifted so that the largest is 0."""
    weights = as_array("log weights", log_weights, 1, finite=False)
    if (invalid := np.isnan(weights) | (weights == math.inf)).any():
        draw = int(invalid.argmax())
        raise ValueError(f"expected log weights that are finite or -inf; got {weights[draw]} at draw {draw}")
    if len(weights) == 0 or weights.max() == -math.inf:
        raise ValueError(f"expected at least one weight above zero; got none in {len(weights)} draws")
    return weights - weights.max()
