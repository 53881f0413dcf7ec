"""Hierarchical sites in coordinates between centred and non-centred ones, found from the model's own priors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import tensor
from torch import distributions as td

from pyroflows import Posterior, fit_posterior
from pyroflows.inference.centring import transform_of
from pyroflows.inference.coordinates import best_centring, moved, non_centred, recentred
from pyroflows.inference.log_joint import LogJoint

Y = torch.linspace(-1, 2, 6, dtype=torch.float64)


def families(y):
    """Every family with location or scale, in plates, in events, and with a matrix."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    scale = pyro.sample("scale", dist.HalfCauchy(y.new_ones(())))
    pyro.sample("rate", dist.Exponential(1 / scale))
    pyro.sample("gamma", dist.Gamma(2.0, 1 / scale))
    pyro.sample("inverse", dist.InverseGamma(3.0, scale))
    pyro.sample("cauchy", dist.Cauchy(mean, scale))
    pyro.sample("laplace", dist.Laplace(mean, scale))
    pyro.sample("gumbel", dist.Gumbel(mean, scale))
    pyro.sample("half_cauchy", dist.HalfCauchy(scale))
    pyro.sample("weibull", dist.Weibull(scale, 1.5))
    with pyro.plate("groups", 6):
        a = pyro.sample("a", dist.Normal(mean, scale))
        pyro.sample("b", dist.LogNormal(mean, scale))
        pyro.sample("c", dist.HalfNormal(scale))
        pyro.sample("y", dist.StudentT(4.0, a, 1.0), obs=y)
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2 * y.new_ones(())))
    matrix = scale[..., None, None] * factor
    pyro.sample("v", dist.MultivariateNormal(y.new_zeros(3) + mean[..., None], scale_tril=matrix))
    pyro.sample("w", dist.StudentT(5.0, mean[..., None], scale[..., None]).expand([*mean.shape, 4]).to_event(1))


def funnel(size=9):
    neck = pyro.sample("neck", dist.Normal(tensor(0.0), 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(size).double(), (neck / 2).exp()[..., None]).to_event(1))


HIERARCHICAL = {"rate", "gamma", "inverse", "cauchy", "laplace", "gumbel", "half_cauchy", "weibull"}
HIERARCHICAL |= {"a", "b", "c", "v", "w"}


def test_the_density_in_other_coordinates_is_the_same_by_change_of_variables():
    centred = LogJoint(families, (Y,))
    assert set(centred.hierarchical) == HIERARCHICAL
    generator = torch.Generator().manual_seed(0)
    centring = {
        site.name: torch.rand(site.unconstrained_shape, generator=generator) * (site.name != "v")
        for site in centred.latents
        if site.name in HIERARCHICAL
    }
    other = recentred(centred, centring)
    assert other.vectorize == centred.vectorize == "plate"
    u = torch.randn(4, other.dim, generator=generator, dtype=torch.float64)
    x = moved(u, other, centred)
    torch.testing.assert_close(moved(x, centred, other), u)

    def one(point):
        run = other._evaluate(other._parts(point), None, densities=False)
        return torch.cat([site.unconstrain(run.sites[site.name]) for site in centred.latents])

    jacobian = torch.stack([torch.autograd.functional.jacobian(one, point) for point in u])
    torch.testing.assert_close(other(u), centred(x) + torch.linalg.slogdet(jacobian)[1])
    with pytest.raises(ValueError, match="expected centring of sites among .*; got 'mean'"):
        recentred(centred, {"mean": torch.zeros(())})


def test_points_of_values_are_found_for_many_at_once():
    def model(x):
        scale = pyro.sample("scale", dist.HalfNormal(tensor(1.0)))
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(3).double(), scale[..., None]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slopes @ x.mT, 1.0), obs=torch.zeros(len(x)).double())

    straight = non_centred(LogJoint(model, (torch.randn(8, 3).double(),)))
    assert straight.vectorize == "vmap"
    u = torch.randn(5, 4).double()
    values = straight.constrain(u)
    found = straight.unconstrain(values)
    torch.testing.assert_close(found[0], u)
    runs = 0
    evaluate = straight._evaluate

    def counted(*arguments, **options):
        nonlocal runs
        runs += 1
        return evaluate(*arguments, **options)

    straight._evaluate = counted
    many = straight.unconstrain(values)
    assert runs == 1
    straight.vectorize = "loop"
    for one, other in zip(many, straight.unconstrain(values), strict=True):
        torch.testing.assert_close(one, other)


def test_non_centred_coordinates_have_one_prior_whatever_the_others_are():
    def prior():
        families(Y.new_zeros(6))

    straight = non_centred(LogJoint(pyro.poutine.block(prior, hide=["y"])))
    draws = straight.prior_draws(4000)
    for site in straight.latents:
        if site.name in ("a", "b", "v"):
            part = site.slice_of(draws)
            assert float((part.std(0) - 1).abs().max()) < 0.06
            assert float(part.mean(0).abs().max()) < 0.06


def test_entries_that_the_data_tell_are_centred_and_others_are_not():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        x = pyro.sample("x", dist.Normal(mean[..., None], 1.0).expand([*mean.shape, 2]).to_event(1))
        pyro.sample("y", dist.Normal(x, tensor([0.1, 10.0])).to_event(1), obs=y)

    straight = non_centred(LogJoint(model, (tensor([1.0, 1.0]),)))
    precision = -torch.autograd.functional.hessian(lambda u: straight(u[None]).sum(), straight.initial).diagonal()
    centring = best_centring(straight, precision)["x"]
    torch.testing.assert_close(centring, tensor([100 / 101, 0.01 / 1.01]))


def test_a_prior_without_a_scale_is_refused():
    with pytest.raises(ValueError, match="expected a prior with location and scale for centring; got Beta"):
        transform_of(td.Beta(tensor(1.0), 1.0), torch.zeros(()))


@pytest.mark.parametrize("size", [9, 99])
def test_a_funnel_is_a_gaussian_in_the_coordinates_of_its_program(size, tmp_path):
    def model():
        funnel(size)

    posterior = fit_posterior(model, seed=0)
    assert posterior.verdict == "trust"
    assert posterior.ess > 9900
    assert posterior.log_evidence == pytest.approx(0.0, abs=1e-3)
    draws = posterior.draws(4000)
    assert float(draws["neck"].std()) == pytest.approx(3.0, rel=0.05)
    few = {name: value[:5] for name, value in draws.items()}
    scale = (few["neck"] / 2).exp()[:, None]
    exact = dist.Normal(0.0, 3.0).log_prob(few["neck"]) + dist.Normal(0.0, scale).log_prob(few["x"]).sum(-1)
    torch.testing.assert_close(posterior.log_prob(few).detach(), exact, atol=1e-4, rtol=1e-4)
    posterior.save(tmp_path / "funnel.safetensors")
    read = Posterior.load(tmp_path / "funnel.safetensors", model)
    torch.testing.assert_close(read.log_prob(few), posterior.log_prob(few))
    assert read.to_arviz(100).posterior["x"].shape == (1, 100, size)


def test_chains_in_the_same_coordinates_reach_the_neck_and_hold_a_density():
    posterior = fit_posterior(funnel, seed=0).refine(num_chains=128, num_draws=50, seed=0)
    assert posterior.verdict == "trust"
    assert float(posterior.draws(6000)["neck"].std()) == pytest.approx(3.0, rel=0.06)
    assert posterior.log_evidence == pytest.approx(0.0, abs=0.1)
    draws = posterior.draws(200)
    scale = (draws["neck"] / 2).exp()[:, None]
    exact = dist.Normal(0.0, 3.0).log_prob(draws["neck"]) + dist.Normal(0.0, scale).log_prob(draws["x"]).sum(-1)
    assert float((posterior.log_prob(draws).detach() - exact).abs().median()) < 0.3


def test_groups_with_much_and_little_data_meet_the_marginal_posterior():
    torch.manual_seed(0)
    noise = tensor([0.05] * 4 + [5.0] * 4)
    y = 1 + 0.7 * torch.randn(8).double() + noise * torch.randn(8).double()

    def model(y):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 5.0))
        scale = pyro.sample("scale", dist.HalfNormal(tensor(2.0)))
        with pyro.plate("groups", 8):
            x = pyro.sample("x", dist.Normal(mean, scale))
            pyro.sample("y", dist.Normal(x, noise), obs=y)

    posterior = fit_posterior(model, y, seed=0)
    m, s = torch.linspace(-9, 11, 801).double(), torch.linspace(0.01, 10, 1000).double()
    total = (s[:, None] ** 2 + noise**2).sqrt()
    likelihood = dist.Normal(m[:, None, None], total).log_prob(y).sum(-1)
    log_p = likelihood + dist.Normal(0.0, 5.0).log_prob(m)[:, None] + dist.HalfNormal(tensor(2.0)).log_prob(s)
    evidence = float(log_p.logsumexp((0, 1))) + math.log(float(m[1] - m[0]) * float(s[1] - s[0]))
    weights = (log_p - log_p.logsumexp((0, 1))).exp()
    mean_s = float((weights.sum(0) * s).sum())
    sd_s = math.sqrt(float((weights.sum(0) * (s - mean_s) ** 2).sum()))
    assert posterior.verdict == "trust"
    assert posterior.log_evidence == pytest.approx(evidence, abs=0.02)
    draws = posterior.draws(8000)["scale"]
    assert abs(float(draws.mean()) - mean_s) < 0.05 * sd_s
    assert float(draws.std()) == pytest.approx(sd_s, rel=0.05)
