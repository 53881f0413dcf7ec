"""Gaussian mixtures whose covariances shrink towards a shared one, by expectation maximisation."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular
from scipy.special import logsumexp
from sklearn.cluster import KMeans

__all__ = ["Mixture", "MixtureOptions", "cholesky", "fit_mixture"]

_TOLERANCE = 1e-3  # nats a row, below which an iteration is the last
_FACTOR_ITERATIONS = 25


@dataclass(frozen=True)
class MixtureOptions:
    """What a mixture is fitted with.

    Args:
        components: number of Gaussians.
        rows: the weight of the shared covariance, in rows added to those of each component; infinite for one alone.
        shrinkage: of the shared covariance to its diagonal, from 0 to 1.
        factors: of the shared covariance, which then is that of a factor analysis; 0 for none.
        floor: variance added to each column, of columns of variance 1.
    """

    components: int = 1
    rows: float = math.inf
    shrinkage: float = 0.05
    factors: int = 0
    floor: float = 1e-6


@dataclass(frozen=True)
class Mixture:
    """Gaussians with weights: ``(components,)``, ``(components, columns)``, ``(components, columns, columns)``."""

    weights: np.ndarray
    means: np.ndarray
    factors: np.ndarray

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density of rows."""
        return logsumexp(self.of_components(x), axis=1)

    def of_components(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density of rows under each component, with its weight, ``(rows, components)``."""
        parts = []
        for weight, mean, factor in zip(self.weights, self.means, self.factors, strict=True):
            standard = (x - mean) @ solve_triangular(factor, np.eye(len(factor)), lower=True, check_finite=False).T
            log_det = np.log(np.diag(factor)).sum()
            parts.append(math.log(weight) - log_det - 0.5 * np.square(standard).sum(1))
        return np.stack(parts, 1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    @staticmethod
    def average(mixtures: "list[Mixture]", shares: np.ndarray) -> "Mixture":
        """Return the mixture whose density is the weighted mean of theirs."""
        weights = np.concatenate([share * part.weights for share, part in zip(shares, mixtures, strict=True)])
        means, factors = (np.concatenate([getattr(part, name) for part in mixtures]) for name in ("means", "factors"))
        return Mixture(weights / weights.sum(), means, factors)


def fit_mixture(
    x: np.ndarray,
    weights: np.ndarray,
    options: MixtureOptions,
    shares: np.ndarray | None = None,
    *,
    iterations: int = 60,
) -> tuple[Mixture, np.ndarray]:
    """Fit a mixture to rows with weights of mean 1; return it, and the share of each component in each row.

    Args:
        x: rows, of columns of about mean 0 and variance 1.
        weights: of the rows.
        options: of the mixture.
        shares: from which the first step begins, ``(rows, components)``; by default those of k-means.
        iterations: the largest number.
    """
    if shares is None:
        shares = np.ones((len(x), 1))
        if options.components > 1:
            means = KMeans(options.components, n_init=1, max_iter=30, random_state=0).fit(x, sample_weight=weights)
            shares = np.eye(options.components)[means.labels_]
    old = -math.inf
    for _ in range(iterations):
        mixture = _maximise(x, weights[:, None] * shares, options)
        if options.components == 1:
            break
        log_p = mixture.of_components(x)
        log_sum = logsumexp(log_p, axis=1)
        shares = np.exp(log_p - log_sum[:, None])
        new = float(weights @ log_sum) / weights.sum()
        if new - old < _TOLERANCE:
            break
        old = new
    return mixture, shares


def _maximise(x: np.ndarray, shares: np.ndarray, options: MixtureOptions) -> Mixture:
    """Return the best mixture given the share of each component in each row."""
    numbers = shares.sum(0) + 1e-9
    means = (shares.T @ x) / numbers[:, None]
    scatter = np.stack(
        [(share[:, None] * (x - mean)).T @ (x - mean) for share, mean in zip(shares.T, means, strict=True)]
    )
    shared = scatter.sum(0) / numbers.sum()
    if options.factors:
        shared = _factor_analysis(shared, options.factors)
    else:
        shared = (1 - options.shrinkage) * shared + options.shrinkage * np.diag(np.diag(shared))
    if math.isinf(options.rows) or options.components == 1:
        covariances = np.broadcast_to(shared, scatter.shape)
    else:
        covariances = (scatter + options.rows * shared) / (numbers + options.rows)[:, None, None]
    weights = (numbers + 0.5) / (numbers + 0.5).sum()
    return Mixture(weights, means, cholesky(covariances, options.floor))


def cholesky(covariances: np.ndarray, floor: float) -> np.ndarray:
    """Return Cholesky factors, with more than the floor on the diagonal where rounding needs it."""
    while True:
        try:
            return np.linalg.cholesky(covariances + floor * np.eye(covariances.shape[-1]))
        except np.linalg.LinAlgError:
            floor *= 10


def _factor_analysis(covariance: np.ndarray, number: int) -> np.ndarray:
    """Return the covariance of a factor analysis, by its fixed point (Joereskog, 1967)."""
    diagonal = np.diag(covariance)
    noise = np.maximum(diagonal / 2, 1e-6)
    for _ in range(_FACTOR_ITERATIONS):
        scale = np.sqrt(noise)
        values, vectors = np.linalg.eigh(covariance / scale[:, None] / scale)
        loadings = scale[:, None] * vectors[:, -number:] * np.sqrt(np.maximum(values[-number:] - 1, 0))
        new = np.maximum(diagonal - np.square(loadings).sum(1), 1e-6 * diagonal + 1e-8)
        change, noise = np.abs(new - noise).max(), new
        if change < 1e-4:
            break
    return loadings @ loadings.T + np.diag(noise)
