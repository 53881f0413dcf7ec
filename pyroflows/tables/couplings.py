"""Spline couplings that start as the identity on a Gaussian mixture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_triangular

from pyroflows.bijection import Bijection
from pyroflows.flow import Flow
from pyroflows.layers import Coupling, Spline, TriangularAffine
from pyroflows.priors import GaussianMixture
from pyroflows.tables.mixtures import Mixture, cholesky

__all__ = ["coupling_flow", "prior_of"]

_BOUND, _BINS, _MARGINAL_BINS = 4.0, 8, 16
_LEAST_SD = 0.1  # of a column given the others, below which the couplings are where columns are uncorrelated
_SHRINKAGE = 1e-3  # of the covariance by which columns are made uncorrelated


def prior_of(mixture: Mixture) -> GaussianMixture:
    """Return the prior of a mixture, without parameters."""
    weights, means, factors = (torch.from_numpy(part) for part in vars(mixture).values())
    features, number = means.shape[1], len(means)
    options: dict[str, Any] = {"covariance": "full", "loc": means, "scale_tril": factors.tril(), "weights": weights}
    return GaussianMixture(features, number, learnable=False, **options)


def coupling_flow(mixture: Mixture, z: np.ndarray, *, num_layers: int, hidden_features: Sequence[int]) -> Flow:
    """Return a flow that starts as a mixture: couplings of random halves and their complements, a map of each column.

    If a column is nearly a sum of others, the couplings are where columns are uncorrelated, since a step moves
    directions of little variance as far as others.
    """
    features = z.shape[1]
    layers: list[Bijection] = []
    spline = Spline(num_bins=_BINS, bound=_BOUND)
    mask = torch.zeros(features, dtype=torch.bool)
    for number in range(num_layers if features > 1 else 0):
        chosen = torch.randperm(features)[: features // 2]
        mask = ~mask if number % 2 else torch.zeros_like(mask).scatter(0, chosen, True)
        layers.append(Coupling(features, transformer=spline, mask=mask, hidden_features=hidden_features))
    covariance = np.cov(z.T, bias=True).reshape(features, features)
    smallest_sd = np.diag(np.linalg.inv(covariance + 1e-9 * np.eye(features))).max() ** -0.5
    if smallest_sd < _LEAST_SD:
        mean, factor = z.mean(0), cholesky((1 - _SHRINKAGE) * covariance, _SHRINKAGE)
        whitening = TriangularAffine(features).double()
        whitening.start_at(torch.from_numpy(mean), torch.from_numpy(factor))
        layers.append(whitening.requires_grad_(False))
        means = solve_triangular(factor, (mixture.means - mean).T, lower=True).T
        factors = np.stack([solve_triangular(factor, part, lower=True) for part in mixture.factors])
        mixture = Mixture(mixture.weights, means, factors)
    each = Spline(num_bins=_MARGINAL_BINS, bound=_BOUND)
    layers.append(Coupling(features, transformer=each, mask=[True] * features, hidden_features=()))
    return Flow(prior_of(mixture), layers).float()
