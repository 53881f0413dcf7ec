"""Posteriors by draws of any sampler: the evidence, a density, fresh draws, files, and what is refused."""

from __future__ import annotations

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows import Posterior

ROWS, NOISE = 30, 0.7


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -0.5, 0.0]).double() + NOISE * noise


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(b @ x.mT, NOISE).to_event(1), obs=y)


def exact(x, y):
    """Return the evidence and the exact posterior."""
    covariance = torch.linalg.inv(x.mT @ x / NOISE**2 + torch.eye(3))
    posterior = dist.MultivariateNormal(covariance @ x.mT @ y / NOISE**2, covariance)
    prior = dist.MultivariateNormal(torch.zeros(ROWS).double(), x @ x.mT + NOISE**2 * torch.eye(ROWS))
    return float(prior.log_prob(y)), posterior


@pytest.mark.parametrize("seed", range(5))
def test_the_evidence_of_a_conjugate_regression(seed):
    x, y = data(seed)
    evidence, posterior = exact(x, y)
    torch.manual_seed(seed)
    fitted = Posterior.from_draws({"b": posterior.sample((4, 500))}, regression, x, y, seed=seed)
    assert fitted.verdict == "trust"
    assert fitted.log_evidence_error < 0.1
    assert abs(fitted.log_evidence - evidence) < 3 * fitted.log_evidence_error
    b = posterior.sample((500,))
    assert float((fitted.log_prob({"b": b}).detach() - posterior.log_prob(b)).abs().mean()) < 0.1
    fresh = fitted.guide.draws(20_000)["b"]
    assert float(((fresh.mean(0) - posterior.mean) / posterior.variance.sqrt()).abs().max()) < 0.1


def test_correlated_chains_have_a_larger_error_of_the_evidence():
    x, y = data(0)
    evidence, posterior = exact(x, y)
    torch.manual_seed(0)
    z, states = torch.randn(4, 3).double(), []
    for _ in range(1000):
        z = 0.95 * z + (1 - 0.95**2) ** 0.5 * torch.randn(4, 3).double()
        states.append(posterior.mean + z @ torch.linalg.cholesky(posterior.covariance_matrix).mT)
    chains = torch.stack(states, 1)
    fitted = Posterior.from_draws({"b": chains}, regression, x, y, seed=0)
    assert fitted.ess < 300
    assert abs(fitted.log_evidence - evidence) < 0.2


def test_draws_of_arviz_and_of_one_chain_and_files(tmp_path):
    x, y = data(0)
    _, posterior = exact(x, y)
    torch.manual_seed(0)
    draws = posterior.sample((4, 200))
    of_dict = Posterior.from_draws({"b": draws}, regression, x, y, seed=0)
    values = {"b": draws.numpy()}
    groups = az.from_dict(values if "InferenceData" in vars(az) else {"posterior": values})
    of_arviz = Posterior.from_draws(groups, regression, x, y, seed=0)
    assert of_dict.log_evidence == of_arviz.log_evidence
    assert of_dict.chains.shape == (4, 200, 3)
    assert Posterior.from_draws({"b": draws[0]}, regression, x, y, seed=0).chains.shape == (1, 200, 3)
    of_dict.save(tmp_path / "posterior.safetensors")
    read = Posterior.load(tmp_path / "posterior.safetensors", regression, x, y)
    assert (read.verdict, read.log_evidence, read.rhat) == (of_dict.verdict, of_dict.log_evidence, of_dict.rhat)
    values = {"b": draws[0, :5]}
    torch.testing.assert_close(read.log_prob(values), of_dict.log_prob(values))
    assert read.to_arviz().posterior["b"].shape == (4, 200, 3)
    assert "log evidence" in repr(read)


def test_many_short_chains_and_time_that_is_over():
    x, y = data(0)
    evidence, posterior = exact(x, y)
    torch.manual_seed(0)
    draws = posterior.sample((1000, 50))
    fitted = Posterior.from_draws({"b": draws}, regression, x, y, seed=0)
    assert abs(fitted.log_evidence - evidence) < max(3 * fitted.log_evidence_error, 0.01)
    late = Posterior.from_draws({"b": draws[:4]}, regression, x, y, max_seconds=1e-6, seed=0)
    assert late.log_evidence_note.startswith("unknown, since there was no time")
    assert "log_prob is of the Gaussian of the draws" in late.reason
    assert float((late.log_prob({"b": draws[0]}).detach() - posterior.log_prob(draws[0])).abs().mean()) < 0.5


def test_hierarchies_are_put_into_coordinates_that_fit_the_draws():
    def model():
        neck = pyro.sample("neck", dist.Normal(torch.zeros(()).double(), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(3).double(), (neck / 2).exp()[..., None]).to_event(1))

    torch.manual_seed(0)
    neck = 3 * torch.randn(4, 500).double()
    draws = {"neck": neck, "x": (neck / 2).exp()[..., None] * torch.randn(4, 500, 3).double()}
    fitted = Posterior.from_draws(draws, model, seed=0)
    assert fitted.verdict == "trust"
    assert abs(fitted.log_evidence) < max(3 * fitted.log_evidence_error, 0.01)
    torch.testing.assert_close(fitted.log_joint.constrain(fitted.chains.flatten(0, 1))["x"], draws["x"].flatten(0, 1))


def test_draws_that_do_not_fit_the_model_are_refused():
    x, y = data(0)
    draws = torch.randn(4, 100, 3)
    with pytest.raises(TypeError, match="expected draws as .*; got Tensor"):
        Posterior.from_draws(draws, regression, x, y)
    with pytest.raises(ValueError, match="expected draws of every latent site; got none of 'b'"):
        Posterior.from_draws({"c": draws}, regression, x, y)
    with pytest.raises(ValueError, match=r"expected draws of 'b' of shape \(draws, 3\) or .*; got \(4, 100, 2\)"):
        Posterior.from_draws({"b": draws[..., :2]}, regression, x, y)
    with pytest.raises(ValueError, match="expected 50 draws or more of each chain; got 4"):
        Posterior.from_draws({"b": draws.transpose(0, 1)}, regression, x, y)
    draws[2, 5] = torch.nan
    with pytest.raises(ValueError, match=r"expected draws with a finite .*; got 1 of 400, such as draw 5 of chain 2"):
        Posterior.from_draws({"b": draws}, regression, x, y)


def test_models_that_are_not_of_draws_are_refused():
    x, y = data(0)
    draws = torch.randn(4, 100, 3)

    def random(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(b @ x.mT + torch.randn(1), NOISE).to_event(1), obs=y)

    with pytest.raises(ValueError, match="expected a model with one log joint density at a point"):
        Posterior.from_draws({"b": draws}, random, x, y)
    with pytest.raises(TypeError, match="expected a Pyro model"):
        Posterior.from_draws({"b": draws}, 3)
