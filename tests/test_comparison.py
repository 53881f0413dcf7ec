"""Models compared by evidence and by left-out observations, and prior predictions, against closed forms."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import tensor

from pyroflows import Posterior, compare, fit_posterior, prior_predictive

Y = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64) + 0.3


def normal(y, scale=10.0):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), scale))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def exact_evidence(y, scale):
    covariance = torch.eye(len(y)).double() + scale**2
    return float(dist.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y))


def exact_loo(y, scale):
    total = 0.0
    for i in range(len(y)):
        others = torch.cat([y[:i], y[i + 1 :]])
        variance = 1 / (1 / scale**2 + len(others))
        total += float(dist.Normal(variance * others.sum(), math.sqrt(1 + variance)).log_prob(y[i]))
    return total


@pytest.fixture(scope="module")
def fits():
    return {f"scale {scale:g}": fit_posterior(normal, Y, scale, seed=0) for scale in (1.0, 10.0)}


def test_left_out_observations_have_the_density_of_the_closed_form(fits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fits["scale 10"].loo()
    assert len(result.pareto_k) == len(Y)
    assert list(result.pareto_k["observation"].values[:2]) == ["y[0]", "y[1]"]
    elpd = getattr(result, "elpd_loo", None) or result.elpd
    assert float(elpd) == pytest.approx(exact_loo(Y, 10.0), abs=0.1)
    of_chains = fits["scale 10"].refine(num_chains=64, num_draws=40, seed=0).loo()
    assert float(getattr(of_chains, "elpd_loo", None) or of_chains.elpd) == pytest.approx(exact_loo(Y, 10.0), abs=0.3)


def test_one_warning_names_the_observations_that_it_fails_for():
    y = Y.clone()
    y[3] = 30.0
    posterior = fit_posterior(normal, y, seed=0)
    with pytest.warns(UserWarning, match=r"not to be trusted at y\[3\] \(\d\.\d\d\), whose k-hat is above") as caught:
        posterior.loo()
    assert len(caught) == 1


def test_several_sites_are_one_set_of_observations():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        pyro.sample("first", dist.Normal(mean, 1.0), obs=y[0])
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    result = fit_posterior(model, Y, seed=0).loo()
    assert list(result.pareto_k["observation"].values[:2]) == ["first", "y[0]"]
    assert len(result.pareto_k) == 13

    def prior():
        pyro.sample("x", dist.Normal(tensor(0.0), 1.0))

    with pytest.raises(ValueError, match="expected a model with observations that have a log-likelihood"):
        fit_posterior(prior, seed=0).loo()


def test_evidence_ranks_models_by_their_closed_form(fits):
    table = compare(fits, by="evidence")
    assert list(table.index) == ["scale 1", "scale 10"]
    difference = exact_evidence(Y, 10.0) - exact_evidence(Y, 1.0)
    assert table.loc["scale 10", "difference"] == pytest.approx(difference, abs=0.01)
    assert table.loc["scale 1", "probability"] == pytest.approx(1 / (1 + math.exp(difference)), abs=0.01)
    assert table["probability"].sum() == pytest.approx(1)
    assert list(table["verdict"]) == ["trust", "trust"]
    by_loo = compare(fits)
    assert set(by_loo.index) == set(fits)
    assert list(by_loo["verdict"]) == ["trust", "trust"]


def test_an_evidence_that_is_not_known_is_said(fits):
    bad = Posterior(fits["scale 10"].guide, missed=[torch.zeros(1).double()])
    with pytest.warns(UserWarning, match="the place of 'bad' is not known"):
        table = compare({"bad": bad, "good": fits["scale 1"]}, by="evidence")
    assert table.loc["bad", "note"].startswith("a lower bound")


def test_what_cannot_be_compared_is_refused(fits):
    one = fits["scale 1"]
    with pytest.raises(ValueError, match="expected two posteriors or more; got 1"):
        compare({"a": one})
    with pytest.raises(TypeError, match="expected posteriors by names"):
        compare([one, one])
    with pytest.raises(TypeError, match="expected posteriors by names"):
        compare({"a": one, "b": 3})
    with pytest.raises(ValueError, match="expected posteriors of the same observations; got 12 in 'a' and 11 in 'b'"):
        compare({"a": one, "b": fit_posterior(normal, Y[1:], seed=0)})
    with pytest.raises(ValueError, match="expected posteriors of the same observations; got others"):
        compare({"a": one, "b": fit_posterior(normal, Y + 1, seed=0)})
    with pytest.raises(ValueError, match="expected by"):
        compare(fits, by="aic")


def test_the_prior_predicts():
    def model(y):
        k = pyro.sample("k", dist.Categorical(tensor([0.5, 0.5])))
        rate = pyro.sample("rate", dist.Gamma(tensor(2.0), 1.0))
        twice = pyro.deterministic("twice", 2 * rate)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(twice + k, 1.0), obs=y)

    draws = prior_predictive(model, torch.zeros(3).double(), num_draws=4000, seed=0)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "rate": (4000,),
        "k": (4000,),
        "twice": (4000,),
        "y": (4000, 3),
    }
    assert float(draws["rate"].mean()) == pytest.approx(2.0, abs=0.1)
    assert float(draws["y"].mean()) == pytest.approx(4.5, abs=0.2)
    torch.testing.assert_close(draws["twice"], 2 * draws["rate"])
    again = prior_predictive(model, torch.zeros(3).double(), num_draws=4000, seed=0)
    torch.testing.assert_close(again["y"], draws["y"])

    def improper():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("f", -(x**2))

    with pytest.raises(ValueError, match="expected priors that can be drawn from; got the improper one of site 'x'"):
        prior_predictive(improper)
