"""Posteriors with hard edges, models and data that cannot be right, starts and limits of time."""

from __future__ import annotations

import logging
import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import tensor
from scipy import integrate, stats

from pyroflows import AutoFlow, fit_posterior
from pyroflows.inference import diagnosis, fitting, guide_fit, watch
from pyroflows.inference.diagnosis import notes_on
from pyroflows.inference.init import find_init
from pyroflows.inference.log_joint import LogJoint

Y = tensor([1.2, 3.4, 2.2, 2.9, 1.9])


def uniform(prior):
    def model(y):
        high = pyro.sample("high", prior)
        pyro.sample("y", dist.Uniform(torch.zeros(5).double(), high[..., None]).to_event(1), obs=y)

    return model


def line(x, y):
    slope = pyro.sample("slope", dist.Normal(tensor(0.0), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def banana():
    x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
    pyro.sample("y", dist.Normal(2 * x**2, 0.3))


EDGES = {
    "log-normal": (dist.LogNormal(tensor(2.0), 1.0), stats.lognorm(1, scale=math.exp(2))),
    "Pareto, whose median has no density": (dist.Pareto(tensor(1.0), 1.5), stats.pareto(1.5)),
}


@pytest.mark.parametrize("name", EDGES)
def test_a_hard_edge_ends_in_the_right_mean_and_evidence_or_is_not_to_be_trusted(name):
    prior, same = EDGES[name]

    def density(high):
        return same.pdf(high) * high**-5.0

    evidence = integrate.quad(density, 3.4, np.inf)[0]
    mean = integrate.quad(lambda high: high * density(high), 3.4, np.inf)[0] / evidence
    if name == "log-normal":
        assert (mean, math.log(evidence)) == pytest.approx((4.3226, -8.8296), abs=1e-4)
    posterior = fit_posterior(uniform(prior), Y, seed=0, max_steps=50)
    if posterior.verdict != "do not trust":
        assert posterior.log_evidence == pytest.approx(math.log(evidence), abs=0.03)
        assert float(posterior.resampled(4000)["high"].mean()) == pytest.approx(mean, abs=0.1)


@pytest.mark.parametrize(("share", "verdict"), [(0.0, "trust"), (0.1, "do not trust")])
def test_a_tail_that_the_guide_does_not_reach_is_not_trusted(share, verdict):
    def model():
        wide = dist.Normal(tensor(0.0), 10.0)
        x = pyro.sample("x", wide)
        parts = dist.Normal(tensor([0.0, 4.5]), tensor([1.0, 0.4])).log_prob(x[..., None])
        pyro.factor("f", (parts + tensor([1 - share, share]).log()).logsumexp(-1) - wide.log_prob(x))

    guide = AutoFlow(model, init="none", num_layers=1)
    guide.require_flow().layers[-1].start_at(tensor([0.0]), tensor([[1.0]]))
    torch.manual_seed(0)
    posterior = fitting.Posterior(guide, missed=())
    assert posterior.verdict == verdict
    assert ("of the posterior is in a tail" in posterior.reason) == bool(share)


def test_a_tail_that_is_noise_is_looked_for_again():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(5).double(), 1.0).to_event(1))

    torch.manual_seed(0)
    guide = AutoFlow(model, init="none")
    flow, log_joint = guide.require_flow(), guide.log_joint
    weights = diagnosis.importance_sample(guide, log_joint, 4000)
    with torch.no_grad():
        torch.manual_seed(2312)  # of 2,500 seeds the one with a false alarm by one look
        assert diagnosis._share_beyond(flow, log_joint, weights, 4000) > 0
        torch.manual_seed(2312)
        assert diagnosis._missed_tail(flow, log_joint, weights) == 0


def test_draws_without_a_density_cost_something_in_the_choice_of_weights():
    guide = AutoFlow(uniform(EDGES["log-normal"][0]), init="none", args=(Y,))
    elbos = []
    for loc, scale in ((1.35, 0.03), (1.3, 0.1)):  # the second has a fifth of its draws beyond the edge
        guide.require_flow().layers[-1].start_at(tensor([loc]), tensor([[scale]]))
        fit = guide_fit.GuideFit(guide, guide.log_joint, 64, watch.Watch(None, False))
        elbos.append(fit._evaluate(2000)[0])
    assert elbos[1] < elbos[0] - 5
    before = guide.require_flow().log_prob(tensor([1.0])).item()
    guide.require_flow().zero_grad()
    fit.total().backward()
    with torch.no_grad():
        for parameter in guide.require_flow().parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad
    assert guide.require_flow().log_prob(tensor([1.0])).item() < before


def test_a_start_of_the_users_own():
    model = uniform(EDGES["Pareto, whose median has no density"][0])
    log_joint = LogJoint(model, (Y,), start={"high": 9.0})
    assert float(log_joint.constrain(log_joint.initial[None])["high"]) == pytest.approx(9.0)
    assert find_init(log_joint)[0].elbo > -20
    assert AutoFlow(model, init={"high": torch.tensor(9.0)}, args=(Y,)).inits
    with pytest.raises(ValueError, match="sites among 'high'; got 'low'"):
        fit_posterior(model, Y, init={"low": 1.0})
    with pytest.raises(ValueError, match=r"a start of shape \(\) at site 'high'; got \(2,\)"):
        fit_posterior(model, Y, init={"high": [1.0, 2.0]})
    with pytest.raises(ValueError, match="near the start; got -inf there"):
        fit_posterior(uniform(dist.Uniform(tensor(0.0), 3.0)), Y, init={"high": 2.0})


def test_data_without_a_density_anywhere_are_named_by_their_site():
    with pytest.raises(ValueError, match=r"none at other points: pass init=\{site: value\}. .* at site 'y'"):
        fit_posterior(uniform(EDGES["log-normal"][0]), -Y)


def test_nothing_observed_is_said():
    def model():
        pyro.sample("x", dist.Normal(tensor(0.0), 1.0))

    assert notes_on(LogJoint(model)) == ["the model observes nothing, so that this is its prior"]
    assert notes_on(LogJoint(line, (Y, Y))) == []


def test_a_model_that_runs_for_one_point_at_a_time_is_said():
    def model(y):
        with pyro.plate("parts", 2):
            loc = pyro.sample("loc", dist.Normal(tensor(0.0), 5.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(tensor(0.5)))
            pyro.sample("y", dist.Normal(loc[z.long()], 1.0), obs=y)

    (note,) = notes_on(LogJoint(model, (Y,)))
    assert "one point at a time" in note


SHAPES = {
    "a column of data": (line, (torch.ones(50), torch.ones(50, 1))),
    "a column of inputs": (line, (torch.ones(50, 1), torch.ones(50))),
    "a column in an event": (
        lambda x, y: pyro.sample("y", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)) * x, 1).to_event(1), obs=y),
        (torch.ones(50, 1), torch.ones(50)),
    ),
    "without plates": (
        lambda x, y: pyro.sample("y", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)) * x, 1), obs=y),
        (torch.ones(50), torch.ones(50, 1)),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_data_that_are_stretched_to_fit_their_distribution_are_refused(name):
    model, args = SHAPES[name]
    with pytest.raises(ValueError, match=r"shape of their distribution at site 'y'; got .*\(50,.* stretched"):
        fit_posterior(model, *args)


def test_data_that_broadcast_as_they_should_are_taken():
    def one_mean(y):
        pyro.sample("y", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def shared(y):
        with pyro.plate("groups", 3, dim=-2):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 5, dim=-1):
                pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    for model, y in ((one_mean, torch.ones(50, 1)), (shared, torch.ones(5)), (one_mean, torch.tensor(1.0))):
        assert LogJoint(model, (y,)).dim


def test_random_numbers_outside_the_sites_are_refused():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean + torch.randn(()), 1.0).expand([5]).to_event(1), obs=y)

    with pytest.raises(ValueError, match="one log joint density at a point; got .* in two runs"):
        fit_posterior(model, Y.float())


@pytest.mark.parametrize("convert", [np.asarray, pd.Series])
def test_arrays_in_place_of_tensors_are_named(convert):
    with pytest.raises(TypeError, match="tensor"):
        fit_posterior(line, torch.ones(5), convert(np.ones(5)))
    with pytest.raises(TypeError, match="tensors as arguments of the model, by torch.as_tensor; got .* as argument 0"):
        fit_posterior(lambda x, y: line(x + torch.zeros(5), y), convert(np.ones(5)), torch.ones(5))


def test_nan_in_the_data_is_named_by_site_and_row():
    y = torch.ones(6)
    y[3] = torch.nan
    with pytest.raises(ValueError, match="without NaN at site 'y'; got NaN in row 3"):
        fit_posterior(line, torch.ones(6), y)
    with pytest.raises(ValueError, match="without NaN; got NaN in row 3 .* of argument 0"):
        fit_posterior(line, y, torch.ones(6))
    with pytest.raises(ValueError, match="without NaN; got NaN in row 3 .* of x"):
        fit_posterior(line, x=y, y=torch.ones(6))


def test_a_limit_of_time_ends_the_search_for_a_start(monkeypatch):
    log_joint = LogJoint(line, (torch.ones(5), torch.zeros(5)))
    asked = []
    inits = find_init(log_joint, out_of_time=lambda what: asked.append(what) or True)
    assert inits
    assert len(set(asked)) >= 2
    assert log_joint.evaluations < 2000


def test_a_limit_of_time_bounds_the_whole_call_and_the_log_says_what_is_done(monkeypatch, caplog):
    clock = iter(range(10**9))
    monkeypatch.setattr(watch.time, "perf_counter", lambda: 0.5 * next(clock))
    with caplog.at_level(logging.INFO, logger="pyroflows"):
        posterior = fit_posterior(banana, max_seconds=60, refine="never", seed=0)
    assert "the fit ended at max_seconds=60" in posterior.reason
    assert posterior.seconds < 90  # of this clock, which goes on by half a second whenever it is read
    assert 1 <= len(caplog.records) <= 9
    assert caplog.records[0].getMessage().startswith("posterior: 1")


def test_a_gaussian_that_is_right_is_not_trained():
    posterior = fit_posterior(line, torch.ones(5).double(), torch.zeros(5).double(), seed=0)
    assert posterior.results == []
    assert posterior.verdict == "trust"
    assert posterior.ess > 9990
    straight = fit_posterior(banana, seed=0)  # in the coordinates that its program gives, it is a Gaussian
    assert straight.results == []
    assert straight.ess > 9990

    def skewed():
        pyro.sample("x", dist.Gamma(tensor([2.0, 3.0]), 1.0).to_event(1))

    assert fit_posterior(skewed, seed=0, max_steps=100).results


@pytest.mark.parametrize("seed", range(5))
def test_a_guide_that_was_put_at_one_mode_is_not_trusted(seed):
    torch.manual_seed(seed)
    centres = torch.stack([torch.zeros(2).double(), 6 + 2 * torch.rand(2).double()])

    def model():
        x = pyro.sample("x", dist.Uniform(tensor([-40.0, -40.0]), 40.0).to_event(1))
        pyro.factor("f", dist.Normal(centres, 1.0).to_event(1).log_prob(x[..., None, :]).logsumexp(-1))

    guide = AutoFlow(model, init="none")
    u = guide.log_joint.unconstrain({"x": torch.stack([centres[0] - 1, centres[0], centres[0] + 1])})[0]
    guide.require_flow().layers[-1].start_at(u[1], (u[2] - u[0]) / 2)
    posterior = fitting.Posterior(guide)
    assert posterior.weights.ess_ratio > 0.99
    assert posterior.verdict == "do not trust"
    assert "mode" in posterior.reason


def test_chains_that_have_no_time_leave_the_guide_and_a_note():
    def two():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 10.0))
        pyro.factor("f", dist.Normal(tensor([-5.0, 5.0]), 0.5).log_prob(x[..., None]).logsumexp(-1))

    posterior = fitting.Posterior(AutoFlow(two))
    assert posterior.verdict == "do not trust"
    late = fitting._refined(posterior, watch.Watch(1e-9, False), trained=True)
    assert late is posterior
    clock = watch.Watch(60.0, False)
    clock.is_over = lambda what, share=1.0: "particles" in what
    kept = fitting._refined(posterior, clock, trained=True)
    assert kept.weights is posterior.weights
    assert "the chains ended at max_seconds" in kept.reason


def test_a_limit_of_time_bounds_refine():
    posterior = fitting.Posterior(AutoFlow(line, args=(torch.ones(5), torch.zeros(5))))
    refined = posterior.refine("nuts", num_chains=2, num_draws=100_000, num_warmup=5, max_seconds=2.0, seed=0)
    assert refined.seconds < 4
    assert len(refined.chains) >= 1
    assert 4 <= refined.chains.shape[1] < 100_000
    with pytest.raises(ValueError, match="expected time for 4 draws of a chain after its 100000 steps of warm-up"):
        posterior.refine("nuts", num_chains=1, num_warmup=100_000, max_seconds=0.3)
