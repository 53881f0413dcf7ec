"""How fit_posterior spends its time: when a fit ends, and when chains run at once."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import tensor

from pyroflows import fit_posterior
from pyroflows.inference.guide_fit import needs_chains
from pyroflows.inference.log_joint import LogJoint


def skewed():
    with pyro.plate("rows", 6):
        pyro.sample("x", dist.Gamma(tensor(5.0), 1.0))


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[-1]).double(), 1.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(tensor(1.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b @ x.mT, sd[..., None]), obs=y)


def data_of_regression(rows, columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return x, x.sum(1) / 4 + 0.5 * torch.randn(rows, generator=generator, dtype=torch.float64)


def groups(y, noise):
    mean = pyro.sample("mean", dist.Normal(tensor(0.0), 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(tensor(1.0)))
    with pyro.plate("groups", len(y)):
        x = pyro.sample("x", dist.Normal(mean, scale))
        pyro.sample("y", dist.Normal(x, noise), obs=y)


def never(_):
    return False


def steps_of(posterior):
    return sum(result.steps for result in posterior.results)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_posterior_that_a_short_run_brings_near_takes_few_steps(seed):
    posterior = fit_posterior(skewed, seed=seed)
    assert posterior.verdict == "trust"
    assert posterior.weights.ess_ratio > 0.99
    assert steps_of(posterior) <= 350


def test_a_posterior_that_is_a_gaussian_takes_a_short_run_at_most():
    posterior = fit_posterior(regression, *data_of_regression(2000, 3), seed=0)
    assert posterior.verdict == "trust"
    assert steps_of(posterior) <= 100


def test_many_latents_with_few_data_each_go_to_chains_after_short_runs():
    generator = torch.Generator().manual_seed(3)
    noise = 10 ** torch.linspace(-0.3, 0.7, 20).double()
    y = 0.6 * torch.randn(20, generator=generator, dtype=torch.float64)
    y = y + noise * torch.randn(20, generator=generator, dtype=torch.float64)
    posterior = fit_posterior(groups, y, noise, seed=0)
    assert posterior.chains is not None
    assert posterior.verdict == "trust"
    assert steps_of(posterior) <= 300
    s = (torch.arange(4000).double() + 0.5) / 4000 * 6
    precision = 1 / (s[:, None] ** 2 + noise**2)
    total = precision.sum(1) + 1 / 9
    mean = (precision * y).sum(1) / total
    log_p = 0.5 * (precision.log().sum(1) - (precision * y**2).sum(1) - total.log() + total * mean**2) - s**2 / 2
    p = log_p.softmax(0)
    sd = (p @ s**2 - (p @ s) ** 2).sqrt()
    draws = posterior.draws(posterior.chains.shape[:2].numel())["scale"]
    assert abs(float(draws.mean() - p @ s)) < 0.1 * sd
    assert float(draws.std()) == pytest.approx(float(sd), rel=0.1)


def test_chains_without_time_leave_their_draws_and_say_so():
    torch.manual_seed(0)
    y, noise = 3 + torch.randn(600).double(), torch.ones(600).double()
    posterior = fit_posterior(groups, y, noise, seed=0, max_seconds=3.0)
    assert posterior.verdict == "do not trust"
    assert "there was no time for them to reach the posterior" in posterior.reason
    assert abs(float(posterior.draws(100)["mean"].mean()) - 3) < 1.5  # no longer the prior's


def test_the_gaussian_at_a_mode_tells_whether_a_fit_would_do():
    x, y = data_of_regression(500, 60)
    assert not needs_chains(LogJoint(regression, (x, y)), never)
    torch.manual_seed(0)
    assert needs_chains(LogJoint(groups, (torch.randn(60).double(), torch.ones(60).double())), never)
    assert not needs_chains(LogJoint(skewed), never)  # few latents


def test_as_many_points_are_evaluated_at_once_as_caches_hold():
    x, y = data_of_regression(100_000, 2)
    log_joint = LogJoint(regression, (x, y))
    u = torch.randn(40, 3).double()
    sizes = []
    evaluate = log_joint._value_and_score
    log_joint._value_and_score = lambda part: (sizes.append(len(part)), evaluate(part))[1]
    value, score = log_joint.value_and_score(u)
    assert len(sizes) > 1
    assert max(sizes) < 40
    one = u[7].requires_grad_()
    expected = (
        dist.Normal(one[:2] @ x.mT, one[2].exp()).log_prob(y).sum() + dist.Normal(0.0, 1.0).log_prob(one[:2]).sum()
    )
    expected = expected + dist.HalfNormal(tensor(1.0)).log_prob(one[2].exp()) + one[2]
    torch.testing.assert_close(value[7], expected.detach())
    torch.testing.assert_close(score[7], torch.autograd.grad(expected, one)[0])
    assert math.isfinite(value.sum())
