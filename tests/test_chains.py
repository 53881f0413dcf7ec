"""Many chains at once: annealed particles, Hamiltonian moves, modes in proportion, evidence, and when not to trust."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import tensor

from pyroflows.diagnostics import bridge_evidence, ensemble_ess, nested_rhat
from pyroflows.inference.chains import run_ensemble, scale_of_prior
from pyroflows.inference.density import density_model
from pyroflows.inference.evidence import evidence_of_draws, gaussian_of_draws
from pyroflows.inference.log_joint import LogJoint


def normal(x, scale=1.0):
    return -0.5 * (x / scale) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(scale)


def test_the_bridge_finds_the_constant_of_a_density():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=4000), 1.3 * rng.normal(size=4000)
    value, error = bridge_evidence(normal(x) + 7.0, normal(x, 1.3), normal(y) + 7.0, normal(y, 1.3))
    assert abs(value - 7.0) < 4 * error < 0.1
    nowhere = np.full(4000, -math.inf)
    assert bridge_evidence(normal(x), normal(x), nowhere, normal(y)) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match=r"shapes \(4000,\) and \(3,\)"):
        bridge_evidence(normal(x), normal(x[:3]), normal(y), normal(y))


def test_groups_that_differ_show_in_the_nested_rhat_and_the_effective_size():
    draws = np.random.default_rng(0).normal(size=(64, 20, 2))
    assert nested_rhat(draws, 4).max() < 1.01
    assert ensemble_ess(draws).min() > 700
    draws[:16, :, 0] += 1.0
    assert nested_rhat(draws, 4)[0] > 1.05
    assert ensemble_ess(draws)[0] < 400
    with pytest.raises(ValueError, match="got 5 groups of 64 chains"):
        nested_rhat(draws, 5)
    with pytest.raises(ValueError, match="expected 16 chains or more"):
        ensemble_ess(draws[:8])


def run(model, *args, **options):
    torch.manual_seed(0)
    log_joint = LogJoint(model, args)
    return log_joint, run_ensemble(log_joint, scale_of_prior(log_joint), **options)


def test_a_conjugate_regression():
    torch.manual_seed(1)
    x, noise = torch.randn(40, 6).double(), 0.5
    y = x @ torch.randn(6).double() + noise * torch.randn(40).double()

    def model(y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(6).double(), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(beta @ x.mT, noise).to_event(1), obs=y)

    _, ensemble = run(model, y, num_chains=256, num_draws=40)
    covariance = torch.linalg.inv(x.T @ x / noise**2 + torch.eye(6) / 4)
    mean = covariance @ x.T @ y / noise**2
    evidence = dist.MultivariateNormal(torch.zeros(40).double(), 4 * x @ x.T + noise**2 * torch.eye(40)).log_prob(y)
    draws = ensemble.u.flatten(0, 1)
    assert ensemble.has_converged
    assert ((draws.mean(0) - mean).abs() / covariance.diagonal().sqrt()).max() < 0.1
    assert (draws.std(0) / covariance.diagonal().sqrt() - 1).abs().max() < 0.07
    assert abs(ensemble.log_evidence - float(evidence)) < max(4 * ensemble.log_evidence_error, 0.03)


def test_modes_far_apart_get_their_weights():
    def model():
        x = pyro.sample("x", dist.Uniform(tensor([-30.0, -30.0]), 30.0).to_event(1))
        centres = tensor([[0.0, 0.0], [8.0, 0.0]])
        parts = dist.Normal(centres, 1.0).to_event(1).log_prob(x[..., None, :]) + tensor([0.25, 0.75]).log()
        pyro.factor("density", parts.logsumexp(-1) + 2 * math.log(60))

    log_joint, ensemble = run(model)
    x = log_joint.constrain(ensemble.u.flatten(0, 1))["x"]
    assert ensemble.has_converged
    assert float((x[:, 0] > 4).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert ensemble.log_evidence == pytest.approx(0.0, abs=0.05)


def test_the_evidence_of_a_thousand_latents_by_draws_that_their_gaussian_does_not_tell_apart():
    dim, rho = 1000, 0.5
    noise = math.sqrt(1 - rho**2)

    def log_density(x):
        steps = (x[:, 1:] - rho * x[:, :-1]) / noise
        constant = dim / 2 * math.log(2 * math.pi) + (dim - 1) * math.log(noise)
        return -(x[:, 0].square() + steps.square().sum(-1)) / 2 - constant + 3.0

    def exact_draws(number, seed):
        e = torch.randn(dim, number, generator=torch.Generator().manual_seed(seed)).double()
        x = [e[0]]
        for step in e[1:]:
            x.append(rho * x[-1] + noise * step)
        return torch.stack(x, 1)

    log_joint = LogJoint(density_model(log_density, {"x": torch.zeros(dim).double()}))
    torch.manual_seed(0)
    base = gaussian_of_draws(exact_draws(1000, 0))
    value, error = evidence_of_draws(log_joint, base, exact_draws(1000, 1).view(4, 250, dim))
    assert abs(value - 3.0) < 3 * error
    assert abs(value - 3.0) < 1.0  # a metric of the points themselves is off by two


def test_a_funnel_in_coordinates_that_do_not_straighten_it_has_not_converged():
    def model():
        v = pyro.sample("v", dist.Normal(tensor(0.0), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9).double(), (v / 2).exp()[..., None]).to_event(1))

    _, ensemble = run(model, num_chains=128, num_draws=10)
    assert not ensemble.has_converged
    assert ensemble.bfmi < 0.2


def test_chains_end_after_half_of_their_draws_once_enough_are_effective():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(100).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.ones(100).double())

    log_joint, ensemble = run(model)
    assert ensemble.u.shape == (128, 50, 100)
    assert ensemble.has_converged
    assert ensemble.ess > 2000
    assert (ensemble.u.flatten(0, 1).mean(0) - 0.8).abs().max() < 4 * 0.2**0.5 / 2000**0.5
    asked = run_ensemble(log_joint, scale_of_prior(log_joint), num_draws=60)
    assert asked.u.shape[1] == 60


def test_time_that_is_over_leaves_what_there_is():
    def model():
        pyro.sample("x", dist.Normal(tensor([0.0, 1.0]), 1.0).to_event(1))

    _, ensemble = run(model, out_of_time=lambda _: True)
    assert not ensemble.complete
    assert not ensemble.has_converged
    assert ensemble.u.isfinite().all()
