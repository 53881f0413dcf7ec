"""The best density of a table: its mixtures, its coordinates, what is chosen, and what users get without options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_iris, load_wine
from sklearn.decomposition import FactorAnalysis
from sklearn.mixture import GaussianMixture

from pyroflows import FlowDensity, load
from pyroflows.tables.best import fit_best
from pyroflows.tables.marginals import COORDINATES, fit_coordinates, to_latent
from pyroflows.tables.mixtures import MixtureOptions, fit_mixture
from pyroflows.tables.start import StartSearch, folds_of


def clusters(rows, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.array([[0.0, 0.0], [3.0, 1.0], [-2.0, 2.0]])
    x = centres[rng.integers(3, size=rows)] + 0.4 * rng.normal(size=(rows, 2)) @ [[1.0, 0.5], [0.0, 0.6]]
    return x / x.std(0)


def test_a_mixture_without_shrinkage_is_that_of_scikit_learn():
    x = clusters(600)
    ours, shares = fit_mixture(x, np.ones(600), MixtureOptions(3, rows=0.0, shrinkage=0.0, floor=1e-9), iterations=500)
    theirs = GaussianMixture(3, reg_covar=1e-9, tol=1e-6, max_iter=500, random_state=0).fit(x)
    assert ours.log_prob(x).mean() == pytest.approx(theirs.score(x), abs=2e-3)
    np.testing.assert_allclose(shares.sum(1), 1)
    single = fit_mixture(x, np.ones(600), MixtureOptions(1, shrinkage=0.0, floor=0.0))[0]
    exact = stats.multivariate_normal(x.mean(0), np.cov(x.T, bias=True))
    np.testing.assert_allclose(single.log_prob(x), exact.logpdf(x))


def test_a_covariance_of_factors_is_that_of_a_factor_analysis():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2)) @ rng.normal(size=(2, 9)) + rng.normal(size=(400, 9))
    x = (x - x.mean(0)) / x.std(0)
    ours = fit_mixture(x, np.ones(400), MixtureOptions(1, factors=2, floor=0.0))[0]
    assert ours.log_prob(x).mean() == pytest.approx(FactorAnalysis(2, tol=1e-8).fit(x).score(x), abs=2e-3)


def test_a_weight_of_two_is_a_row_twice_in_a_mixture():
    x, weights = clusters(90), np.random.default_rng(0).integers(1, 4, 90).astype(float)
    options = MixtureOptions(1, shrinkage=0.2)
    often = np.repeat(x, weights.astype(int), axis=0)
    once, twice = fit_mixture(x, weights, options)[0], fit_mixture(often, np.ones(len(often)), options)[0]
    np.testing.assert_allclose(once.log_prob(x), twice.log_prob(x))


@pytest.mark.parametrize(
    ("truth", "kind", "loss"),
    [
        (stats.lognorm(2.5), "bent", 0.03),
        (stats.t(2), "bent", 0.03),
        (stats.norm(5, 2), "bent", 0.01),
        (stats.uniform(), "normal", 0.08),
        (stats.expon(), "normal", 0.06),
    ],
)
def test_coordinates_make_a_column_nearly_normal(truth, kind, loss):
    train, test = (truth.rvs((2000, 1), random_state=seed) for seed in (0, 1))
    scale = train.std()
    z, log_det = to_latent(fit_coordinates(kind, train / scale, np.ones(2000)), test / scale)
    found = stats.norm.logpdf(z[:, 0]) + log_det - np.log(scale)
    assert abs((truth.logpdf(test[:, 0]) - found).mean()) < loss


def test_coordinates_are_maps_of_the_whole_line():
    x = np.random.default_rng(0).exponential(size=(300, 2))
    x = x / x.std(0)
    far = np.array([[-5.0, 0.0], [1e4, -1e4]])
    for kind in COORDINATES:
        z, log_det = to_latent(fit_coordinates(kind, x, np.ones(300)), far)
        assert np.isfinite(z).all()
        assert np.isfinite(log_det).all()


def test_a_heavy_row_is_fitted_and_held_out_each_time():
    weights = np.r_[100.0, np.ones(99)]
    folds = folds_of(weights)
    assert all(0 in fitted and 0 in held_out for fitted, held_out, _ in folds)
    counted = np.zeros(100)
    for _, held_out, divided in folds:
        np.add.at(counted, held_out, divided)
    np.testing.assert_allclose(counted, weights)
    assert all(not np.intersect1d(fitted, held_out).size for fitted, held_out, _ in folds_of(np.ones(16)))


def test_a_search_spends_its_budget_and_finds_three_clusters():
    search = StartSearch(clusters(400), np.ones(400), 1e9).run()
    chosen, shares, score = search.best_average()
    assert shares.sum() == pytest.approx(1)
    assert score >= max(candidate.score for candidate in search.tried.values()) - 0.01  # of a row of equal shares
    assert max(candidate.options.components for candidate in chosen) >= 3
    assert len(StartSearch(clusters(400), np.ones(400), 1e5).run().tried) < len(search.tried)


@pytest.mark.parametrize("load_table", [load_iris, load_wine])
def test_the_default_is_not_behind_a_gaussian_mixture(load_table):
    x = load_table().data
    order = np.random.default_rng(3).permutation(len(x))
    train, test = x[order[30:]], x[order[:30]]
    density = FlowDensity(random_state=0).fit(train)
    mean, std = train.mean(0), train.std(0)
    mixtures = [GaussianMixture(number, random_state=0).fit((train - mean) / std) for number in (1, 2, 3, 4)]
    best = max(mixture.score((test - mean) / std) - np.log(std).sum() for mixture in mixtures)  # by the test rows
    assert density.score(test) > best


@pytest.mark.parametrize("effort", ["quick", "default"])
def test_a_density_of_one_column_integrates_to_one_and_draws_what_it_says(effort):
    x = np.random.default_rng(0).exponential(size=(400, 1)) * 30 + 100
    density = FlowDensity(effort=effort, random_state=0).fit(x)
    grid = np.linspace(-200, 800, 200_001)
    assert np.trapezoid(np.exp(density.score_samples(grid[:, None])), grid) == pytest.approx(1, abs=1e-4)
    drawn = density.sample(5000, random_state=0)
    assert -density.score_samples(drawn).mean() == pytest.approx(np.log(30) + 1, abs=0.2)
    assert stats.ks_2samp(drawn[:, 0], x[:, 0]).pvalue > 1e-3
    np.testing.assert_allclose(density.inverse_transform(density.transform(x)), x, rtol=1e-6)


def test_couplings_are_taken_where_they_gain():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1200, 2))
    x[:, 1] = 0.2 * x[:, 1] + np.sin(3 * x[:, 0])
    density = FlowDensity(random_state=0).fit(x[:600])
    truth = stats.norm.logpdf(x[:, 0]) + stats.norm.logpdf(x[:, 1], np.sin(3 * x[:, 0]), 0.2)
    assert density.score(x[600:]) > truth[600:].mean() - 0.25
    selection = density.selection_
    assert selection.is_trained == (selection.gain > selection.gain_error > 0)
    normal = FlowDensity(random_state=0).fit(rng.normal(size=(600, 3)))
    assert not normal.selection_.is_trained
    assert normal.result_.best_epoch is None
    assert "simple densities tried" in repr(normal.selection_)


def test_the_best_density_repeats_by_a_seed_and_leaves_the_random_state():
    x = clusters(200)
    state = torch.random.get_rng_state()
    first, second = (FlowDensity(random_state=0, epochs=3).fit(x).score_samples(x) for _ in range(2))
    assert np.array_equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_many_rows_are_sampled_fairly():
    x = np.sort(np.random.default_rng(0).normal(size=(60_000, 1)), axis=0)
    density = FlowDensity(random_state=0, epochs=2).fit(x)
    assert density.score(x) == pytest.approx(stats.norm.logpdf(x).mean(), abs=0.01)


@pytest.mark.parametrize("rows", [2, 3, 7, 20])
def test_few_rows(rows):
    x = clusters(rows, seed=1) * 100
    density = FlowDensity(random_state=0).fit(x)
    assert np.isfinite(density.score_samples(clusters(50) * 100)).all()
    assert np.isfinite(density.sample(50, random_state=0)).all()


def test_rows_to_judge_by_are_not_fitted():
    x = clusters(300)
    search = StartSearch(x[:200], np.ones(200), 1e8, (x[200:], np.ones(100))).run()
    alone = StartSearch(x[:200], np.ones(200), 1e8, (x[200:210], np.ones(10))).run()
    single = [key for key in search.tried.keys() & alone.tried.keys() if key[1].components == 1]
    assert len(single) >= 6
    for key in single:  # a Gaussian is fitted to the same rows
        np.testing.assert_allclose(search.tried[key].scores[:10], alone.tried[key].scores)
    density = FlowDensity(validation=x[200:], random_state=0, epochs=5).fit(x[:200])
    assert density.score(x[200:]) > -4
    options = {"seed": 0, "epochs": 2, "progress": False, "device": "cpu"}
    _, result, selection = fit_best(x[:200], np.ones(200), (x[200:], None, None), **options)
    assert np.isfinite([result.best_loss, selection.gain]).all()


def test_the_best_density_comes_back_from_a_file(tmp_path):
    x = load_iris().data
    flow = FlowDensity(random_state=0).fit(x).flow_
    flow.save(tmp_path / "iris.flow")
    loaded = load(tmp_path / "iris.flow")
    rows = torch.from_numpy(x)
    assert torch.equal(loaded.log_prob(rows), flow.log_prob(rows))


def test_messages():
    x = clusters(50)
    with pytest.raises(ValueError, match="expected effort to be"):
        FlowDensity(effort="much").fit(x)
    with pytest.raises(
        TypeError, match=r"expected num_layers and hidden_features as options of 'auto'; got 'num_bins'"
    ):
        FlowDensity(flow_options={"num_bins": 4}).fit(x)
    with pytest.raises(ValueError, match="column 1"):
        FlowDensity().fit(np.column_stack((x[:, 0], np.ones(50))))
