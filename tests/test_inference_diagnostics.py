"""Diagnostics of a posterior, against known tails, closed-form distances, and calibration that is right or wrong."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, wasserstein_distance

from pyroflows.diagnostics import (
    calibration,
    coverage,
    importance_ess,
    moment_table,
    psis,
    sbc_p_values,
    sbc_ranks,
    sliced_wasserstein,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Importance weights


def pareto_log_weights(rng, shape, n=20_000):
    """Weights with a Pareto tail: P(w > x) = x ** (-1 / shape)."""
    return shape * rng.exponential(size=n)


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.2])
def test_khat_is_the_shape_of_a_pareto_tail(rng, shape):
    log_weights = pareto_log_weights(rng, shape)
    smoothed, khat = psis(log_weights + 1000)
    assert khat == pytest.approx(shape, abs=0.1)
    assert psis(-log_weights)[1] < shape - 0.2  # the inverse weights are bounded
    assert np.exp(smoothed).sum() == pytest.approx(1)
    raw = log_weights - np.logaddexp.reduce(log_weights)
    # Smoothing moves the tail alone, by little, and keeps its order.
    body = log_weights < np.quantile(log_weights, 0.97)
    assert np.ptp(smoothed[body] - raw[body]) < 1e-9
    assert (np.diff(smoothed[np.argsort(raw)]) >= -1e-9).all()
    assert np.corrcoef(smoothed, raw)[0, 1] > 0.99


@pytest.mark.parametrize("number", [30, 100, 900, 2500])  # of which ArviZ 0.x and 1.x take the same tail
@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0, 20.0])
def test_smoothing_is_that_of_arviz(rng, number, scale):
    log_weights = scale * rng.standard_t(4, size=number)
    smoothed, khat = psis(log_weights)
    try:
        stats = importlib.import_module("arviz_stats.base").array_stats
        expected, expected_khat = stats.psislw(-log_weights)
    except ImportError:
        expected, expected_khat = importlib.import_module("arviz").psislw(log_weights)
    assert khat == pytest.approx(float(expected_khat), abs=1e-6)
    np.testing.assert_allclose(smoothed, expected - np.logaddexp.reduce(expected), atol=1e-6)


def test_khat_of_light_tails(rng):
    assert psis(np.log(rng.uniform(0.5, 1.5, size=5000)))[1] < 0.1
    assert psis(0.1 * rng.normal(size=5000))[1] < 0.3


def test_equal_weights_are_fine(rng):
    for log_weights in (np.zeros(1000), 1e4 + 1e-9 * rng.normal(size=1000), np.r_[np.full(500, -3.0), np.zeros(500)]):
        smoothed, khat = psis(log_weights)
        assert khat == 0
        np.testing.assert_allclose(smoothed, log_weights - np.logaddexp.reduce(log_weights), rtol=1e-8, atol=1e-8)


def test_weights_of_zero_stay_zero(rng):
    log_weights = np.r_[rng.normal(size=500), np.full(500, -np.inf)]
    smoothed, khat = psis(log_weights)
    assert (smoothed[500:] == -np.inf).all()
    assert np.isfinite(smoothed[:500]).all()
    assert khat == pytest.approx(psis(log_weights[:500])[1])
    assert np.exp(smoothed).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "log_weights",
    [np.r_[np.zeros(3), np.full(97, -np.inf)], np.r_[np.zeros(997), 5.0, 6.0, 7.0], np.r_[0.0, np.full(99, -800.0)]],
)
def test_a_tail_that_cannot_be_fitted_is_not_trusted(log_weights):
    smoothed, khat = psis(log_weights)
    assert khat == math.inf
    np.testing.assert_allclose(smoothed, log_weights - np.logaddexp.reduce(log_weights))


@pytest.mark.parametrize("n", [30, 34, 100, 224, 226, 1001])
def test_any_number_of_draws(rng, n):
    smoothed, khat = psis(rng.normal(size=n))
    assert np.isfinite(khat)
    assert np.exp(smoothed).sum() == pytest.approx(1)


def test_tensors_give_tensors():
    log_weights = torch.randn(200, requires_grad=True)
    smoothed, khat = psis(log_weights)
    assert smoothed.dtype == torch.float32
    assert not smoothed.requires_grad
    assert isinstance(khat, float)
    torch.testing.assert_close(psis(log_weights.detach().numpy())[0], smoothed.double().numpy(), rtol=1e-5, atol=1e-6)


def test_what_is_given_is_left_as_it_was(rng):
    log_weights = rng.normal(size=100)
    before = log_weights.copy()
    psis(log_weights)
    importance_ess(log_weights)
    assert (log_weights == before).all()


def test_effective_sample_size():
    assert importance_ess(np.zeros(50) - 2000) == pytest.approx(50)
    assert importance_ess(torch.tensor([3.0, -math.inf, -math.inf])) == pytest.approx(1)
    # E[w]^2 / E[w^2] of lognormal weights is exp(-sigma^2).
    log_weights = 0.5 * np.random.default_rng(0).normal(size=100_000)
    assert importance_ess(log_weights) / 100_000 == pytest.approx(math.exp(-0.25), rel=0.01)


@pytest.mark.parametrize(
    "log_weights, error, message",
    [
        (np.zeros(29), ValueError, "at least 30 draws; got 29"),
        (np.r_[np.zeros(30), np.nan], ValueError, "finite or -inf; got nan at draw 30"),
        (np.r_[np.inf, np.zeros(30)], ValueError, "finite or -inf; got inf at draw 0"),
        (np.full(30, -np.inf), ValueError, "at least one weight above zero; got none in 30 draws"),
        (np.zeros((30, 2)), ValueError, r"1 dimension; got shape \(30, 2\)"),
        (["a"] * 30, TypeError, "expected log weights as an array or a tensor of numbers; got list"),
    ],
)
def test_log_weights_that_are_refused(log_weights, error, message):
    with pytest.raises(error, match=message):
        psis(log_weights)


# Distances and moments


def test_sliced_wasserstein_in_one_dimension_is_scipys(rng):
    x, y = rng.normal(1, 2, size=(700, 1)), rng.normal(size=(450, 1))
    wanted = wasserstein_distance(x[:, 0], y[:, 0]) / y.std(ddof=1)
    assert sliced_wasserstein(x, y) == pytest.approx(wanted)
    assert sliced_wasserstein(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(wanted)
    assert sliced_wasserstein(x, x[:500]) > 0
    assert sliced_wasserstein(np.repeat(x, 3, axis=0), x) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_shift_and_scale(rng):
    y = rng.normal(size=(20_000, 3)) * [1, 10, 100]
    assert sliced_wasserstein(y, y) == 0
    # A shift by s standard deviations along all d axes: s sqrt(d) E|cos|, and E|cos| is 1/2 on the sphere in 3-D.
    shifted = sliced_wasserstein(y + 2 * y.std(0), y, num_projections=4000)
    assert shifted == pytest.approx(2 * math.sqrt(3) / 2, rel=0.03)
    # Twice the scale about the mean: E|z|.
    centred = y - y.mean(0)
    assert sliced_wasserstein(2 * centred, centred) == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)
    assert sliced_wasserstein(y, y[::2], seed=1) != sliced_wasserstein(y, y[::2], seed=2)


def test_sliced_wasserstein_refuses():
    ones = np.ones((5, 2))
    with pytest.raises(ValueError, match=r"shapes \(n, d\) and \(m, d\); got \(5, 2\) and \(5, 1\)"):
        sliced_wasserstein(ones, ones[:, :1])
    with pytest.raises(ValueError, match="columns of y that vary; got a constant column 0"):
        sliced_wasserstein(ones, ones)
    with pytest.raises(ValueError, match=r"finite numbers in x; got nan at \(0, 1\)"):
        sliced_wasserstein(np.array([[0.0, np.nan]]), ones)


def test_moment_table(rng):
    reference = rng.normal(size=(5000, 3))
    draws = {"mu": 2.0 * reference[:, 0], "theta": torch.from_numpy(reference[:, 1:] + 0.5 * reference[:, 1:].std(0))}
    table = moment_table(draws, {"theta": reference[:, 1:], "mu": reference[:, 0]})
    assert table.names == ("mu", "theta[0]", "theta[1]")
    np.testing.assert_allclose(table.sd_ratio, [2, 1, 1])
    np.testing.assert_allclose(table.mean_error[1:], 0.5, rtol=1e-3)
    assert table.worst_sd_error == pytest.approx(1)
    assert table.worst_mean_error == pytest.approx(0.5, rel=1e-3)
    lines = str(table).splitlines()
    assert len(lines) == 4
    assert len(set(map(len, lines))) == 1
    assert moment_table(reference, reference, ["a", "b", "c"]).names == ("a", "b", "c")
    assert moment_table({"more": reference, **draws}, {"mu": reference[:, 0]}).names == ("mu",)
    assert moment_table(reference, draws).names == ("mu", "theta[0]", "theta[1]")


@pytest.mark.parametrize(
    "draws, reference, names, message",
    [
        ({"a": np.arange(3.0)}, {"b": np.arange(3.0)}, None, "every name in the reference; got none of 'b'"),
        (np.ones((3, 2)), np.ones((3, 1)), None, "the reference's 1; got 2"),
        (np.ones((3, 1)), np.ones((3, 1)), None, "the reference that vary; got a constant column 0"),
        (np.ones((1, 1)), np.ones((3, 1)), None, "at least 2 draws; got 1"),
        (np.ones((3, 1)), np.ones((3, 1)), ["a", "b"], "a name for each of 1 columns; got 2"),
        ({"a": np.ones(3), "b": np.ones(4)}, np.ones((3, 2)), None, "as many draws of each name; got 3 and 4"),
        ({"a": np.float64(1)}, np.ones((3, 1)), None, r"of 'a' of shape \(n, \*shape\); got a single number"),
        ({}, np.ones((3, 1)), None, "at least one name; got none"),
    ],
)
def test_moment_table_refuses(draws, reference, names, message):
    with pytest.raises(ValueError, match=message):
        moment_table(draws, reference, names)


# Calibration


def conjugate(rng, simulations, num_draws, *, shrink=1.0, shift=0.0):
    """Draws of a normal mean's posterior given one observation, right where shrink is 1 and shift 0."""
    truth = rng.normal(size=(simulations, 2))
    data = truth + rng.normal(size=truth.shape)
    draws = data[:, None] / 2 + shift + shrink * math.sqrt(0.5) * rng.normal(size=(simulations, num_draws, 2))
    return draws, truth


def test_a_right_posterior_is_calibrated(rng):
    result = calibration(*conjugate(rng, 1000, 99), ["a", "b"])
    assert result.ok
    assert (result.p_values > 0.01).all()
    assert result.ranks.shape == (1000, 2)
    assert result.ranks.min() == 0
    assert result.ranks.max() == 99
    np.testing.assert_allclose(result.coverage, np.array([[0.5, 0.8, 0.9, 0.95]] * 2).T, atol=0.05)
    assert "ranks uniform" in str(result)
    assert len(str(result).splitlines()) == 4


@pytest.mark.parametrize("wrong", [{"shrink": 0.7}, {"shrink": 1.4}, {"shift": 0.3}])
def test_a_wrong_posterior_is_not(rng, wrong):
    result = calibration(*conjugate(rng, 1000, 99, **wrong))
    assert not result.ok
    assert "NOT uniform" in str(result)


def test_p_values_are_uniform_where_bins_are_unequal(rng):
    ranks = rng.integers(0, 51, size=(500, 400))
    p_values = sbc_p_values(ranks, 50, num_bins=20)
    assert (p_values < 0.1).mean() == pytest.approx(0.1, abs=0.05)
    assert p_values.mean() == pytest.approx(0.5, abs=0.05)


def test_coverage_of_known_intervals(rng):
    draws, truth = rng.normal(size=(2000, 400, 1)), 2 * rng.normal(size=(2000, 1))
    wanted = 1 - 2 * norm.cdf(-norm.ppf([0.75, 0.95]) / 2)
    np.testing.assert_allclose(coverage(draws, truth, [0.5, 0.9])[:, 0], wanted, atol=0.03)


def test_ranks_count_the_draws_below():
    draws = torch.arange(5.0).expand(3, 5)[..., None]
    assert sbc_ranks(draws, torch.tensor([[-1.0], [2.0], [9.0]])).tolist() == [[0], [2], [5]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sbc_ranks(np.ones((3, 4, 2)), np.ones((3, 1))), r"got \(3, 4, 2\) and \(3, 1\)"),
        (lambda: sbc_p_values(np.full((20, 1), 7), 6), "ranks from 0 to 6; got 7 to 7"),
        (lambda: sbc_p_values(np.ones((9, 1)), 6), "at least 10 simulations; got 9"),
        (lambda: sbc_p_values(np.ones((20, 1)), 6, num_bins=8), "2 to 7 bins, one for each rank at most; got 8"),
        (lambda: coverage(np.ones((3, 4, 1)), np.ones((3, 1)), [1.5]), r"a level in \(0, 1\); got 1.5"),
        (lambda: calibration(np.ones((20, 4, 1)), np.ones((20, 1)), ["a", "b"]), "each of 1 columns; got 2"),
    ],
)
def test_calibration_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
