"""Coordinates in which the columns of a table are closer to normal: layers fitted to each column by likelihood."""

import math

import numpy as np
import torch
from scipy.special import logsumexp

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.layers import Gaussianize, Sinh, Standardize

__all__ = ["COORDINATES", "fit_coordinates", "to_latent"]

COORDINATES = ("scaled", "bent", "normal")

_MOST_ROWS, _MOST_NUMBERS = 3000, 100_000  # which the maps of columns are fitted to
_CHUNK = 1_000_000  # numbers mapped at once
_SCALES = 2.0 ** -np.arange(-6, 21, 1.5)  # of a Sinh, in standard deviations; the first is about linear
_COMPONENTS = (1, 2, 3, 5, 8, 12)
_ITERATIONS = 40
_LEAST_STD = 1e-3  # of columns of about variance 1


def fit_coordinates(kind: str, x: np.ndarray, weights: np.ndarray) -> list[Bijection]:
    """Return layers from standardised latents to rows, in double precision.

    "scaled" has a scale and a shift for each column, "bent" also the inverse of a hyperbolic sine, for tails and
    decades, and "normal" also the distribution function of a mixture, for edges, gaps and peaks.

    Args:
        kind: one of these.
        x: the rows, of columns of about variance 1.
        weights: of the rows, of mean 1.
    """
    mean, std = _moments(x, weights)
    layers: list[Bijection] = [Standardize(torch.from_numpy(mean), torch.from_numpy(std))]
    if kind != "scaled":
        loc, scale = _best_sinh(*_sample(x, weights))
        layers = [Sinh(torch.from_numpy(loc), torch.from_numpy(scale))]
        mean, std = _moments(to_latent(layers, x)[0], weights)
        layers.insert(0, Standardize(torch.from_numpy(mean), torch.from_numpy(std)))
    if kind == "normal":
        means, scales, shares = _mixtures(*_sample(to_latent(layers, x)[0], weights))
        layers.insert(0, Gaussianize(*(torch.from_numpy(part) for part in (means, scales, shares))))
    return [layer.double() for layer in layers]


@torch.no_grad()
def to_latent(layers: list[Bijection], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents of rows, and the log-determinant of the map to them."""
    stack = Compose(layers)
    parts = torch.from_numpy(x).split(max(1, _CHUNK // (x.shape[1] * max(_COMPONENTS))))
    z, log_dets = zip(*map(stack.inverse_and_log_det, parts), strict=True)
    return torch.cat(z).numpy(), torch.cat(log_dets).numpy()


def _moments(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = weights @ x / weights.sum()
    std = np.sqrt(weights @ np.square(x - mean) / weights.sum())
    return mean, np.maximum(std, _LEAST_STD)


def _sample(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return some of the rows, if they are many."""
    most = min(_MOST_ROWS, max(_MOST_NUMBERS // x.shape[1], 500))
    if len(x) <= most:
        return x, weights
    rows = np.random.default_rng(0).permutation(len(x))[:most]
    return x[rows], weights[rows]


def _best_sinh(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the location and the scale of each column's map with the best normal likelihood.

    A map that is not about linear has to gain two nats, as by Akaike's criterion.
    """
    std = _moments(x, weights)[1]
    best = np.full(x.shape[1], -np.inf)
    loc, scale = np.zeros_like(best), np.ones_like(best)
    for number, size in enumerate(_SCALES):
        for place in (np.median(x, 0), x.min(0), x.max(0)):
            width = size * std
            ratio = (x - place) / width
            log_slope = -np.log(width) - 0.5 * np.log1p(np.square(ratio))
            fit = weights @ log_slope / weights.sum() - np.log(_moments(np.arcsinh(ratio), weights)[1])
            fit = fit - (2 / len(x) if number else 0.0)
            is_better = fit > best
            best, loc, scale = (np.where(is_better, *pair) for pair in ((fit, best), (place, loc), (width, scale)))
    return loc, scale


def _mixtures(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means, scales and weights of a mixture for each column, ``(columns, components)``.

    The number of components has the best Bayesian information criterion. Columns with fewer than the most repeat one.
    """
    rows, columns = x.shape
    best = np.full(columns, -np.inf)
    most = max(_COMPONENTS)
    found = [np.zeros((columns, most)), np.ones((columns, most)), np.ones((columns, most))]
    for number in _COMPONENTS:
        if number * 3 > rows:
            break
        parts = _mixture_of_each(x.T[:, :, None], weights[None, :, None], number)
        log_p = _log_components(x.T[:, :, None], *parts)
        fit = logsumexp(log_p, axis=2) @ weights - 0.5 * math.log(rows) * (3 * number - 1)
        is_better = fit > best
        best = np.where(is_better, fit, best)
        for held, part in zip(found, parts, strict=True):
            held[is_better] = part[is_better][:, np.arange(most) % number]
        found[2][is_better] /= np.bincount(np.arange(most) % number)[np.arange(most) % number]
        if number > 1 and not is_better.any():
            break
    return found[0], found[1], found[2]


def _mixture_of_each(x: np.ndarray, weights: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit a mixture to each column by expectation maximisation, from quantiles; ``x`` is ``(columns, rows, 1)``."""
    columns, rows, _ = x.shape
    means = np.quantile(x[:, :, 0], (np.arange(number) + 0.5) / number, axis=1).T
    scales, shares = np.full((columns, number), max(1 / number, 0.1)), np.full((columns, number), 1 / number)
    prior = 0.02 * rows / number  # rows of a standard deviation of 0.2, which keep a component from a single number
    for _ in range(_ITERATIONS if number > 1 else 1):
        log_p = _log_components(x, means, scales, shares)
        belongs = weights * np.exp(log_p - logsumexp(log_p, axis=2, keepdims=True))
        numbers = belongs.sum(1) + 1e-9
        means = (belongs * x).sum(1) / numbers
        variance = (belongs * np.square(x - means[:, None])).sum(1)
        scales = np.sqrt((variance + 0.05 * prior) / (numbers + prior) + 1e-4)
        shares = (numbers + 0.5) / (numbers + 0.5).sum(1, keepdims=True)
    return means, scales, shares


def _log_components(x: np.ndarray, means: np.ndarray, scales: np.ndarray, shares: np.ndarray) -> np.ndarray:
    standard = (x - means[:, None]) / scales[:, None]
    return -0.5 * np.square(standard) - np.log(scales / shares)[:, None] - 0.5 * math.log(2 * math.pi)
