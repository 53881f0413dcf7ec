"""fit_posterior and Posterior: exact numbers, honest verdicts, mending, ArviZ, predictions, files, seeds, refusals."""

from __future__ import annotations

import json
import math
from functools import partial

import arviz as az
import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import close, garch, mixture, tensor
from pyro.distributions import constraints
from safetensors.torch import save_file
from torch import nn

from pyroflows import AutoFlow, Flow, Posterior, StandardNormal, TriangularAffine, fit_posterior, realnvp
from pyroflows.inference import Weights

mpl.use("Agg")


def tiny(features):
    return realnvp(features, num_layers=2, hidden_features=(8,), permutation="none", norm="none")


def plain(features):
    """Nothing but a Gaussian."""
    return Flow(StandardNormal(features), TriangularAffine(features))


def placed(model, loc=None, scale=None, flow=plain, **options):
    """An untrained guide at a Gaussian given by hand."""
    guide = AutoFlow(model, flow, "none", **options)
    if loc is not None:
        guide.flow.layers[-1].start_at(tensor(loc).to(guide.flow.dtype), tensor(scale).to(guide.flow.dtype))
    return guide


X = torch.linspace(-1, 2, 24).double()
OBSERVED = 0.5 + X + 0.5 * torch.sin(9 * X)


def line(x, y=None, prior=2.0):
    """A regression, whose posterior and evidence are known."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=x.dtype), prior).to_event(1))
    with pyro.plate("rows", len(x)):
        mean = pyro.deterministic("mean", b[..., 0] + b[..., 1] * x)
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


DESIGN = torch.stack([torch.ones(24).double(), X], -1)
COVARIANCE = torch.linalg.inv(DESIGN.T @ DESIGN / 0.25 + torch.eye(2) / 4)
MEAN = COVARIANCE @ DESIGN.T @ OBSERVED / 0.25
LOG_EVIDENCE = (
    dist.MultivariateNormal(torch.zeros(24).double(), DESIGN @ DESIGN.T * 4 + torch.eye(24) / 4)
    .log_prob(OBSERVED)
    .item()
)


def curved():
    """A banana, which needs the flow."""
    x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
    pyro.sample("y", dist.Normal(0.3 * x**2, 0.5))


def positive(y):
    """A scale per row, and one of all."""
    top = pyro.sample("top", dist.HalfNormal(tensor(1.0)))
    with pyro.plate("rows", len(y)):
        scale = pyro.sample("scale", dist.LogNormal(top.log(), 0.5))
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def bimodal():
    """Two modes of one weight."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("f", dist.Normal(tensor([-5.0, 5.0]), 1.0).log_prob(x[..., None]).logsumexp(-1) - math.log(2))


@pytest.fixture(scope="module")
def fitted():
    return fit_posterior(line, X, OBSERVED, flow=plain, seed=0)


@pytest.fixture
def _one_rate(monkeypatch):
    """Where it is not the fit that is tested."""
    monkeypatch.setattr("pyroflows.inference.guide_fit._RATES", (3e-3,))


# Numbers


def test_moments_and_evidence_of_a_conjugate_posterior(fitted):
    b = fitted.draws(40_000)["b"]
    close(b.mean(0), MEAN, 0.01)
    close(b.T.cov(), COVARIANCE, 0.02)
    assert abs(fitted.log_evidence - LOG_EVIDENCE) < 4 * fitted.log_evidence_error + 1e-6
    assert abs(fitted.elbo - LOG_EVIDENCE) < 4 * fitted.elbo_error + 0.01
    assert fitted.elbo <= fitted.log_evidence + 1e-9
    assert 0 <= fitted.log_evidence_error < 0.01
    assert fitted.verdict == "trust"
    assert fitted.ess == pytest.approx(10_000, rel=0.05)
    assert len(fitted.khat) == 5
    assert fitted.missed == []
    assert fitted.seconds > 0
    assert fitted.evaluations > 0
    assert isinstance(fitted.weights, Weights)
    assert "trust" in repr(fitted)
    assert "log evidence" in repr(fitted)


@pytest.mark.parametrize("max_steps", [300, pytest.param(3500, marks=pytest.mark.slow)])
def test_a_posterior_that_needs_the_flow(max_steps):
    posterior = fit_posterior(curved, flow=tiny, max_steps=max_steps, seed=0)
    assert posterior.verdict == ("trust" if max_steps > 300 else posterior.verdict)
    assert posterior.log_evidence == pytest.approx(0, abs=0.05)
    gaussian = Posterior(AutoFlow(curved, plain)).elbo
    assert posterior.elbo > gaussian / 2  # half way to zero at least
    draws = posterior.resampled(20_000)
    assert draws["y"].mean().item() == pytest.approx(0.3, abs=0.06)
    assert (draws["x"] ** 2 * draws["y"]).mean().item() == pytest.approx(0.9, abs=0.2)


@pytest.mark.usefixtures("_one_rate")
def test_float32():
    posterior = fit_posterior(line, X.float(), OBSERVED.float(), flow=plain, max_steps=1, seed=0)
    assert posterior.draws(5)["b"].dtype == torch.float32
    assert posterior.resampled(5)["b"].dtype == torch.float32
    close(posterior.draws(20_000)["b"].mean(0), MEAN.float(), 0.03)
    assert posterior.log_evidence == pytest.approx(LOG_EVIDENCE, abs=0.02)


def test_the_evidence_counts_jacobians():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(tensor(2.0), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = tensor([3.0, 4.0, 2.0])
    posterior = Posterior(AutoFlow(model, plain, args=(y,)))
    right = dist.Gamma(11.0, 4.0)
    rate = posterior.resampled(20_000)["rate"]
    assert rate.shape == (20_000,)
    assert rate.mean().item() == pytest.approx(right.mean.item(), rel=0.02)
    assert rate.std().item() == pytest.approx(right.stddev.item(), rel=0.05)
    evidence = math.lgamma(11) - math.lgamma(2) - 11 * math.log(4) - sum(math.lgamma(k + 1) for k in y.tolist())
    assert posterior.log_evidence == pytest.approx(evidence, abs=0.01)


@pytest.mark.usefixtures("_one_rate")
def test_discrete_latents_are_summed_out():
    y = tensor([-2.1, -1.9, 2.2, 1.8, 2.0])
    posterior = fit_posterior(mixture, y, flow=plain, max_steps=1, seed=0)
    assert list(posterior.draws(3)) == ["weights", "means", "gap"]  # but not "mean", which has one for each of z
    groups = posterior.to_arviz(100)
    assert set(groups.posterior.data_vars) == {"weights", "means", "gap"}
    assert posterior.predictive(num_draws=7)["z"].shape == (7, 5)


# Verdicts


def normal(loc, scale):
    def model():
        pyro.sample("x", dist.Normal(tensor(loc), tensor(scale)).to_event(1))

    return model


def student(freedom, d):
    def model():
        pyro.sample("x", dist.StudentT(tensor(freedom)).expand([d]).to_event(1))

    return model


@pytest.mark.parametrize("d", [1, 3, 10])
def test_a_guide_that_is_the_posterior_is_trusted(d):
    posterior = Posterior(placed(normal([1.0] * d, [2.0] * d), [1.0] * d, [2.0] * d))
    assert posterior.verdict == "trust"
    assert posterior.log_evidence == pytest.approx(0, abs=1e-8)
    assert posterior.ess == pytest.approx(10_000)


@pytest.mark.parametrize(
    "model, d, scale",
    [
        (normal([0.0], [1.0]), 1, 0.4),  # too narrow
        (normal([0.0] * 5, [1.0] * 5), 5, 0.5),
        (normal([0.0] * 20, [1.0] * 20), 20, 0.8),
        (student(1.0, 1), 1, 1.0),  # too light in its tails
        (student(1.0, 3), 3, 2.0),
        (student(2.0, 1), 1, 1.0),
        (student(2.0, 4), 4, 1.5),
        (student(3.0, 10), 10, 1.0),
        (normal([0.5], [1.0]), 1, 1.0),  # beside the posterior
        (normal([0.0] * 2, [1.0] * 2), 2, 1.3),  # too wide
        (normal([0.0, 2.0], [1.0, 1.0]), 2, 1.0),
    ],
)
def test_a_wrong_guide_is_never_trusted(model, d, scale):
    guide = placed(model, [0.0] * d, [scale] * d)
    for seed in range(3):
        torch.manual_seed(seed)
        posterior = Posterior(guide)
        assert posterior.verdict in ("resample", "do not trust"), posterior


@pytest.mark.parametrize("model, d", [(normal([0.0] * 10, [1.0] * 10), 10), (student(1.0, 5), 5)])
def test_a_hopeless_guide_is_not_to_be_resampled(model, d):
    posterior = Posterior(placed(model, [1.0] * d, [0.3] * d))
    assert posterior.verdict == "do not trust"
    assert "too uneven" in posterior.reason
    assert "k-hat" in posterior.reason


def test_a_missed_mode_is_named():
    guide = AutoFlow(bimodal, plain, "auto")
    guide.flow.layers[-1].start_at(tensor([5.0]), tensor([1.0]))
    posterior = Posterior(guide)
    assert posterior.weights.ess_ratio > 0.9  # by the guide's own draws all is well
    assert posterior.verdict == "do not trust"
    assert "mode" in posterior.reason
    assert len(posterior.missed) == 1
    close(posterior.missed[0], tensor([-5.0]), 0.2)
    assert posterior.log_evidence == pytest.approx(-math.log(2), abs=0.01)


@pytest.mark.usefixtures("_one_rate")
def test_a_fit_of_two_modes_is_honest():
    posterior = fit_posterior(bimodal, flow=plain, seed=0, max_steps=1, refine="never")
    assert posterior.verdict != "trust"


def test_chains_mend_a_fit_of_two_modes():
    posterior = fit_posterior(bimodal, flow=plain, seed=0, max_steps=1)
    assert posterior.verdict == "trust"
    assert "chains" in posterior.reason
    x = posterior.draws(20_000)["x"]
    assert float((x > 0).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert posterior.log_evidence == pytest.approx(0.0, abs=0.03)


@pytest.mark.usefixtures("_one_rate")
@pytest.mark.parametrize("seed", range(4))
def test_a_mode_far_off_under_a_wide_prior_is_not_forgotten(seed):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2).double(), 10.0).to_event(1))
        modes = torch.stack([x - 5, x + 5], -2)
        pyro.factor("f", dist.Normal(0.0, 0.5).log_prob(modes).sum(-1).logsumexp(-1))

    posterior = fit_posterior(model, flow=plain, seed=seed, max_steps=1, refine="never")
    assert posterior.verdict == "do not trust"
    assert "1 other mode with" in posterior.reason
    x = posterior.refine(seed=seed).draws(10_000)["x"]
    assert float((x[:, 0] > 0).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_a_verdict_where_the_density_ends():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.factor("f", torch.where(x < 1.0, 0.0, -math.inf))

    posterior = Posterior(placed(model, [0.0], [1.0]))
    assert posterior.weights.infinite == pytest.approx(0.16, abs=0.02)
    assert posterior.verdict == "do not trust"
    assert "of the draws have no finite density" in posterior.reason
    assert posterior.log_evidence == pytest.approx(math.log(0.8413), abs=0.02)
    assert (posterior.resampled(500)["x"] < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_verdict_where_values_overflow(dtype):
    def model():
        pyro.sample("x", dist.LogNormal(torch.zeros((), dtype=dtype), 30.0))

    posterior = Posterior(placed(model, [0.0], [30.0]))
    if dtype is torch.float32:
        assert posterior.verdict == "do not trust"
        assert posterior.reason.startswith("some values of the draws are beyond the range of float32, and have no mean")
    else:
        assert "nan" not in posterior.reason


def test_a_verdict_of_a_latent_with_constant_entries():
    def model():
        pyro.sample("tril", dist.LKJCholesky(2, tensor(2.0)))

    posterior = fit_posterior(model, seed=0, max_steps=50)
    assert posterior.verdict == "trust", posterior


def test_a_verdict_where_nothing_is_finite():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.factor("f", torch.where(x < 20.0, 0.0, -math.inf))

    posterior = Posterior(placed(model, [30.0], [1.0]))
    assert posterior.verdict == "do not trust"
    assert "100.0%" in posterior.reason
    assert "do not trust" in repr(posterior)


@pytest.mark.usefixtures("_one_rate")
def test_notes_of_the_fit_are_in_the_reason():
    for guide in (placed(curved), placed(normal([0.0], [1.0]))):
        assert Posterior(guide, notes=["the fit ended early"]).reason.endswith("; the fit ended early")
    posterior = fit_posterior(curved, flow=tiny, max_seconds=0.2, max_steps=100_000, seed=0)
    assert "the fit ended at max_seconds=0.2" in posterior.reason
    assert posterior.seconds < 20


# Mending


def test_resampling_mends_a_slightly_wrong_guide():
    posterior = Posterior(placed(normal([0.3, 0.0], [1.2, 0.8]), [0.0, 0.0], [1.4, 1.0]))
    assert posterior.verdict == "resample"
    assert posterior.weights.mean_error == pytest.approx(0.25, abs=0.05)
    x = posterior.resampled(4000)["x"]
    assert x.shape == (4000, 2)
    close(x.mean(0), tensor([0.3, 0.0]), 0.06)
    close(x.std(0), tensor([1.2, 0.8]), 0.05)
    assert posterior.resampled(1)["x"].shape == (1, 2)
    x = posterior.resampled(20_000)["x"]  # more than were weighed
    assert x.shape == (20_000, 2)
    close(x.mean(0), tensor([0.3, 0.0]), 0.03)


@pytest.fixture(scope="module")
def refined():
    """An ensemble of chains that mends a guide that is off."""
    guide = placed(line, MEAN.tolist() + np.array([0.1, -0.1]), [0.3, 0.3], args=(X, OBSERVED))
    return Posterior(guide).refine(num_chains=64, num_draws=50, seed=0, progress=False)


def test_an_ensemble_meets_the_posterior(refined):
    assert refined.verdict == "trust"
    assert "64 chains from 4 groups of particles agree" in refined.reason
    assert refined.chains.shape == (64, 50, 2)
    assert refined.weights is None
    b, sd = refined.draws(3200)["b"], COVARIANCE.diagonal().sqrt()
    close((b.mean(0) - MEAN) / sd, torch.zeros(2), 0.1)
    close(b.std(0) / sd, torch.ones(2), 0.1)
    assert refined.rhat < 1.02
    assert 400 < refined.ess <= 3200
    assert abs(refined.log_evidence - LOG_EVIDENCE) < 4 * refined.log_evidence_error < 0.3
    assert refined.log_evidence_note == ""
    assert "by chains over 2 latents: trust" in repr(refined)
    for name in ("elbo", "khat"):
        with pytest.raises(ValueError, match="expected a posterior by a guide, .*; got one by Markov chains"):
            getattr(refined, name)


def test_an_ensemble_is_reported_with_its_own_figures(refined):
    groups = refined.to_arviz(num_draws=1000)
    assert groups.posterior["b"].shape == (22, 50, 2)
    assert groups.log_likelihood["y"].shape == (22, 50, 24)
    assert groups.attrs["log_evidence"] == refined.log_evidence
    assert groups.attrs["draws"] == "chains"
    table = refined.summary()
    assert (table["nested_rhat"] == round(refined.rhat, 3)).all()
    assert (table["ess"] == round(refined.ess, 1)).all()
    assert not {"r_hat", "ess_bulk"} & set(table)


def test_an_ensemble_comes_back_from_a_file(refined, tmp_path):
    refined.save(tmp_path / "ensemble")
    loaded = Posterior.load(tmp_path / "ensemble", line, X, OBSERVED)
    assert torch.equal(loaded.chains, refined.chains)
    for name in ("verdict", "reason", "log_evidence", "log_evidence_error", "rhat", "ess"):
        assert getattr(loaded, name) == getattr(refined, name)


def test_an_ensemble_repeats_by_a_seed_and_leaves_the_random_state(fitted):
    state = torch.get_rng_state()
    options = {"num_chains": 16, "num_draws": 8, "num_warmup": 4, "seed": 3}
    first, second = (fitted.refine(**options) for _ in range(2))
    assert torch.equal(first.chains, second.chains)
    assert torch.equal(torch.get_rng_state(), state)
    assert fitted.chains is None


def test_chains_that_did_not_converge_say_so_and_give_no_error_of_the_evidence(fitted):
    refined = fitted.refine(num_chains=16, num_draws=2, num_warmup=1, seed=0)
    assert refined.verdict == "do not trust"
    assert "draws are effective" in refined.reason
    assert refined.log_evidence_error == math.inf
    assert "have not converged" in refined.log_evidence_note


def test_time_that_is_over_leaves_chains_that_are_not_to_be_trusted(fitted):
    refined = fitted.refine(max_seconds=1e-6, seed=0)
    assert refined.verdict == "do not trust"
    assert "there was no time" in refined.reason


def test_a_funnel_is_refined_in_the_latent_space_of_its_guide():
    def funnel():
        v = pyro.sample("v", dist.Normal(tensor(0.0), 2.5))
        pyro.sample("x", dist.Normal(torch.zeros(4).double(), (v / 2).exp()[..., None]).to_event(1))

    posterior = fit_posterior(funnel, seed=0, max_steps=500, refine="never")
    refined = posterior.refine(num_chains=512, num_draws=20, seed=0)
    assert refined.verdict == "trust"
    assert float(refined.draws(10_000)["v"].std()) == pytest.approx(2.5, rel=0.05)
    assert refined.log_evidence == pytest.approx(0.0, abs=0.03)


def test_nuts_meets_the_posterior():
    guide = placed(line, MEAN.tolist() + np.array([0.1, -0.1]), [0.3, 0.3], args=(X, OBSERVED))
    posterior = Posterior(guide)
    assert posterior.verdict != "trust"
    refined = posterior.refine("nuts", num_chains=2, num_draws=120, num_warmup=40, seed=0)
    assert refined.chains.shape == (2, 120, 2)
    assert refined.rhat < 1.05
    assert refined.ess > 50
    b = refined.draws(240)["b"]
    sd = COVARIANCE.diagonal().sqrt()
    close((b.mean(0) - MEAN) / sd, torch.zeros(2), 0.25)
    close(b.std(0) / sd, torch.ones(2), 0.2)
    assert refined.verdict == ("trust" if refined.rhat < 1.02 and refined.ess >= 100 else "do not trust")
    assert "R-hat" in refined.reason
    assert "chains" in repr(refined)
    assert refined.seconds > 0
    assert refined.resampled(10)["b"].shape == (10, 2)
    assert refined.predictive(num_draws=10)["y"].shape == (10, 24)
    groups = refined.to_arviz()
    assert groups.posterior["b"].shape == (2, 120, 2)
    assert groups.log_likelihood["y"].shape == (2, 120, 24)
    assert abs(refined.log_evidence - LOG_EVIDENCE) < 0.1
    for name in ("elbo", "elbo_error", "khat"):
        with pytest.raises(ValueError, match="expected a posterior by a guide, .*; got one by Markov chains"):
            getattr(refined, name)
    with pytest.raises(ValueError, match="expected at most 240 draws, .*; got n=241"):
        refined.draws(241)
    with pytest.raises(ValueError, match="expected a posterior by Markov chains; got one by a guide"):
        _ = posterior.rhat


def test_nuts_follows_supports_that_depend_on_other_sites():
    def model():
        a = pyro.sample("a", dist.Uniform(tensor(0.0), 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("b", dist.Uniform(tensor(0.0), 1 - a))

    refined = Posterior(AutoFlow(model, plain, "fullrank")).refine(
        "nuts", num_chains=1, num_draws=60, num_warmup=30, seed=0
    )
    draws = refined.draws(60)
    assert (draws["b"] <= 1 - draws["a"][:, None]).all()
    assert draws["a"].mean().item() == pytest.approx(0.5, abs=0.2)
    assert draws["b"].mean().item() == pytest.approx(0.25, abs=0.1)


def test_nuts_starts_a_chain_at_a_missed_mode():
    guide = AutoFlow(bimodal, plain, "auto")
    guide.flow.layers[-1].start_at(tensor([5.0]), tensor([1.0]))
    refined = Posterior(guide).refine("nuts", num_chains=2, num_draws=50, num_warmup=20, seed=0)
    signs = {float(chain.mean().sign()) for chain in refined.chains}
    assert signs == {-1.0, 1.0}
    assert refined.rhat > 1.5
    assert refined.verdict == "do not trust"
    assert "run longer chains" in refined.reason


def test_nuts_repeats_by_a_seed_and_leaves_the_random_state(fitted):
    state = torch.get_rng_state()
    first, second = (fitted.refine("nuts", num_chains=1, num_draws=8, num_warmup=4, seed=3) for _ in range(2))
    assert torch.equal(first.chains, second.chains)
    assert torch.equal(torch.get_rng_state(), state)
    assert fitted.chains is None


# ArviZ


def summary_of(groups):
    table = az.summary(groups)
    return {str(name): float(table.loc[name, "mean"]) for name in table.index}


@pytest.mark.parametrize("resample", [None, True])
def test_arviz_reads_the_posterior(fitted, resample):
    groups = fitted.to_arviz(1000, resample=resample)
    assert groups.posterior["b"].shape == (1, 1000, 2)
    assert groups.posterior["mean"].shape == (1, 1000, 24)
    assert groups.log_likelihood["y"].shape == (1, 1000, 24)
    assert groups.observed_data["y"].shape == (24,)
    names = {"lp"} if resample else {"lp", "log_q", "log_weight"}
    assert set(groups.sample_stats.data_vars) == names
    found = summary_of(groups)
    for index in range(2):
        assert found[f"b[{index}]"] == pytest.approx(MEAN[index].item(), abs=0.05)
    loo = az.loo(groups)
    elpd = float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)
    assert LOG_EVIDENCE < elpd < 0
    if not resample:
        weights = np.exp(groups.sample_stats["log_weight"].values)
        assert weights.sum() == pytest.approx(1)
        b = torch.from_numpy(groups.posterior["b"].values.copy()).flatten(0, 1)
        close(torch.from_numpy(groups.sample_stats["log_q"].values.copy()).flatten(), fitted.log_prob({"b": b}), 1e-8)
        likelihood = dist.Normal(b[:, :1] + b[:, 1:] * X, 0.5).log_prob(OBSERVED)
        close(torch.from_numpy(groups.log_likelihood["y"].values.copy()).flatten(0, 1), likelihood, 1e-8)
        lp = likelihood.sum(-1) + dist.Normal(0.0, 2.0).log_prob(b).sum(-1)
        close(torch.from_numpy(groups.sample_stats["lp"].values.copy()).flatten(), lp, 1e-6)


def test_arviz_draws_pairs(fitted):
    groups = fitted.to_arviz(400)
    backend = "matplotlib" if "InferenceData" in vars(az) else "none"
    assert az.plot_pair(groups, var_names=["b"], backend=backend) is not None


def test_a_summary(fitted):
    table = fitted.summary(400)
    assert {"b[0]", "b[1]"} <= {str(name) for name in table.index}


def test_shapes_in_arviz_of_plates_and_events():
    y = tensor([0.5, -1.0, 2.0])
    posterior = Posterior(placed(positive, args=(y,)))
    with pytest.warns(UserWarning, match="do not trust this posterior: the weights are too uneven"):
        groups = posterior.to_arviz(17)
    assert groups.posterior["scale"].shape == (1, 17, 3)
    assert groups.posterior["top"].shape == (1, 17)
    assert "log_weight" not in groups.sample_stats.data_vars  # too few to smooth


def test_a_model_without_observations_has_no_likelihood():
    groups = Posterior(placed(normal([0.0], [1.0]))).to_arviz(40)
    assert not hasattr(groups, "log_likelihood")
    assert not hasattr(groups, "observed_data")
    assert az.summary(groups) is not None


@pytest.mark.parametrize("num_draws", [1, 2, 15, 16])
def test_few_draws(num_draws):
    groups = Posterior(placed(normal([0.0], [1.0]))).to_arviz(num_draws)
    assert groups.posterior["x"].shape == (1, num_draws, 1)


# Predictions


def test_predictions(fitted):
    same = fitted.predictive(num_draws=4000)
    assert {name: tuple(value.shape) for name, value in same.items()} == {"mean": (4000, 24), "y": (4000, 24)}
    close(same["y"].mean(0), DESIGN @ MEAN, 0.08)
    new = tensor([10.0, 20.0])
    design = torch.stack([torch.ones(2).double(), new], -1)
    for args in ((new,), (new, 1000 * torch.ones(2).double())):  # whatever the observations given
        found = fitted.predictive(*args, num_draws=4000)
        assert found["y"].shape == (4000, 2)
        close(found["y"].mean(0), design @ MEAN, 0.3)
        sd = ((design @ COVARIANCE * design).sum(-1) + 0.25).sqrt()
        close(found["y"].std(0), sd, 0.1)
    assert fitted.predictive(x=new, num_draws=3)["y"].shape == (3, 2)


def test_predictions_of_a_wrong_guide_are_by_resampled_draws():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.3), 1.2))
        pyro.deterministic("twice", 2 * x)

    posterior = Posterior(placed(model, [0.0], [1.6]))
    assert posterior.verdict == "resample"
    twice = posterior.predictive(num_draws=4000)["twice"]
    assert twice.mean().item() == pytest.approx(0.6, abs=0.12)
    assert twice.std().item() == pytest.approx(2.4, abs=0.12)


def test_predictions_have_the_shapes_of_plates_and_events():
    def model(y=None):
        with pyro.plate("outer", 2, dim=-2):
            a = pyro.sample("a", dist.Normal(tensor(0.0), 1.0))
            pyro.deterministic("of a", a)
            with pyro.plate("inner", 3, dim=-1):
                p = pyro.sample("p", dist.Dirichlet(torch.ones(4).double()))
                pyro.sample("y", dist.MultivariateNormal(p + a[..., None], torch.eye(4).double()), obs=y)

    posterior = Posterior(placed(model, args=(torch.zeros(2, 3, 4).double(),)))
    found = posterior.predictive(num_draws=5)
    assert {name: tuple(value.shape) for name, value in found.items()} == {"of a": (5, 2, 1), "y": (5, 2, 3, 4)}
    assert {name: tuple(value.shape) for name, value in posterior.draws(5).items()} == {
        "a": (5, 2, 1),
        "of a": (5, 2, 1),
        "p": (5, 2, 3, 4),
    }


# Files


def same(first, second):
    torch.manual_seed(1)
    a = first.draws(20)
    torch.manual_seed(1)
    b = second.draws(20)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_save_and_load(fitted, tmp_path):
    path = tmp_path / "posterior.safetensors"
    fitted.save(path)
    loaded = Posterior.load(path, line, X, OBSERVED, flow=plain)
    assert same(fitted, loaded)
    for name in ("verdict", "reason", "elbo", "elbo_error", "log_evidence", "log_evidence_error", "khat", "ess"):
        assert getattr(loaded, name) == getattr(fitted, name), name
    assert loaded.seconds == fitted.seconds
    assert loaded.notes == fitted.notes
    assert torch.equal(loaded.weights.u, fitted.weights.u)
    assert loaded.predictive(num_draws=3)["y"].shape == (3, 24)
    assert repr(loaded) == repr(fitted)
    loaded.save(tmp_path / "again")


def test_save_and_load_chains(fitted, tmp_path):
    refined = fitted.refine("nuts", num_chains=2, num_draws=10, num_warmup=4, seed=0)
    refined.save(tmp_path / "chains")
    loaded = Posterior.load(tmp_path / "chains", line, x=X, y=OBSERVED, flow=plain)
    assert torch.equal(loaded.chains, refined.chains)
    assert (loaded.verdict, loaded.reason) == (refined.verdict, refined.reason)
    assert same(refined, loaded)


def test_a_builder_of_the_package_is_found_by_name(tmp_path):
    guide = AutoFlow(line, init="none", args=(X, OBSERVED), num_layers=2, hidden_features=(8,))
    posterior = Posterior(guide)
    posterior.save(tmp_path / "file")
    assert same(posterior, Posterior.load(tmp_path / "file", line, X, OBSERVED))


def test_a_missed_mode_is_still_missed_after_loading(tmp_path):
    guide = AutoFlow(bimodal, plain, "auto")
    guide.flow.layers[-1].start_at(tensor([5.0]), tensor([1.0]))
    posterior = Posterior(guide)
    posterior.save(tmp_path / "file")
    loaded = Posterior.load(tmp_path / "file", bimodal, flow=plain)
    assert (loaded.verdict, loaded.reason) == (posterior.verdict, posterior.reason)
    assert torch.equal(loaded.missed[0], posterior.missed[0])


def named_like_a_builder(features):
    return plain(features)


named_like_a_builder.__name__ = "realnvp"


@pytest.mark.parametrize("builder", [tiny, partial(realnvp, num_layers=2), plain(2).double(), named_like_a_builder])
def test_a_flow_of_the_users_own_comes_back(builder, tmp_path):
    posterior = Posterior(placed(line, flow=builder, args=(X, OBSERVED)))
    posterior.save(tmp_path / "file")
    assert same(posterior, Posterior.load(tmp_path / "file", line, X, OBSERVED))
    assert same(posterior, Posterior.load(tmp_path / "file", line, X, OBSERVED, flow=builder))


class Plain(TriangularAffine):
    pass


def of_an_own_class(features):
    return Flow(StandardNormal(features), Plain(features))


def test_a_flow_of_an_own_class_is_given_again(tmp_path):
    builder = of_an_own_class
    posterior = Posterior(placed(line, flow=builder, args=(X, OBSERVED)))
    posterior.save(tmp_path / "file")
    with pytest.raises(
        ValueError, match="expected flow=, since the posterior was fitted with a flow .* the user's own"
    ):
        Posterior.load(tmp_path / "file", line, X, OBSERVED)
    assert same(posterior, Posterior.load(tmp_path / "file", line, X, OBSERVED, flow=builder))


def write(path, kind, whole):
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no posterior" * 20)
    elif kind == "tensors":
        save_file({"a": torch.ones(2)}, path)
    elif kind == "garbled":
        save_file({"a": torch.ones(2)}, path, {"posterior": "{"})
    else:
        save_file({"a": torch.ones(2)}, path, {"posterior": json.dumps({"format": 99})})


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "tensors", "garbled", "format"])
def test_a_file_that_is_no_posterior_is_refused_by_one_sentence(fitted, tmp_path, kind):
    fitted.save(tmp_path / "whole")
    write(tmp_path / "file", kind, (tmp_path / "whole").read_bytes())
    with pytest.raises(ValueError, match="expected a posterior written by save; got") as error:
        Posterior.load(tmp_path / "file", line, X, OBSERVED, flow=plain)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "load, message",
    [
        (
            lambda path: Posterior.load(path, curved, flow=tiny),
            r"expected the model of the posterior in .*, with the latents b \(2,\); got x \(\), y \(\)",
        ),
        (lambda path: Posterior.load(path, line, X, 2 * OBSERVED, flow=plain), "expected the model and the data that"),
        (
            lambda path: Posterior.load(path, line, X, OBSERVED, prior=1.0, flow=plain),
            "expected the model and the",
        ),
        (lambda path: Posterior.load(path, line, X, OBSERVED, flow=tiny), "expected the flow that the posterior in"),
    ],
)
def test_another_model_or_flow_is_refused(fitted, tmp_path, load, message):
    fitted.save(tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file")


# Seeds


@pytest.mark.usefixtures("_one_rate")
def test_a_seed_gives_the_same_numbers_and_leaves_the_random_state():
    state = torch.get_rng_state()
    first, second, other = (fit_posterior(curved, flow=tiny, max_steps=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.elbo == second.elbo
    assert first.khat == second.khat
    assert torch.equal(first.weights.u, second.weights.u)
    assert not torch.equal(first.weights.u, other.weights.u)


def test_judging_a_guide_leaves_it_as_it_was():
    guide = placed(line, args=(X, OBSERVED))
    Posterior(guide).draws(3)
    assert all(p.requires_grad for p in guide.parameters())


@pytest.mark.usefixtures("_one_rate")
def test_a_module_as_the_model(capsys):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("y", OBSERVED)

        def forward(self):
            line(X, self.y)

    posterior = fit_posterior(Model(), flow=plain, max_steps=1, seed=0, progress=False)
    close(posterior.draws(10_000)["b"].mean(0), MEAN, 0.03)
    assert capsys.readouterr().err == ""
    assert not list(pyro.get_param_store())


# What is refused


def subsampled(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])


def learned():
    scale = pyro.param("scale", torch.tensor(1.0))
    pyro.sample("x", dist.Normal(0.0, scale))


def seeded(seed, progress=True):
    pyro.sample("x", dist.Normal(0.0, 1.0))


def counting():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("n", dist.Poisson(3.0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: fit_posterior(subsampled, OBSERVED),
            ValueError,
            "expected a model of all its data; got the subsampled plate 'rows': leave subsample_size out, or train",
        ),
        (
            lambda: fit_posterior(learned),
            ValueError,
            "expected a model without parameters of its own, .*; got 'scale': train them by SVI with an AutoFlow",
        ),
        (
            lambda: fit_posterior(seeded, 3),
            ValueError,
            "expected a model whose arguments have other names than fit_posterior's options; got 'progress', 'seed'",
        ),
        (
            lambda: fit_posterior(counting),
            ValueError,
            "expected continuous latents, or discrete ones of finite",
        ),
        (lambda: fit_posterior(3), TypeError, "expected a Pyro model, a callable; got int"),
        (lambda: fit_posterior(curved, num_draws=0), ValueError, "expected num_draws to be a positive integer; got 0"),
        (
            lambda: fit_posterior(curved, max_steps=1.5),
            ValueError,
            "max_steps to be a positive integer; got 1.5",
        ),
        (lambda: fit_posterior(curved, max_seconds=0), ValueError, r"expected max_seconds in \(0, inf\); got 0"),
        (lambda: fit_posterior(curved, init="best"), ValueError, "expected init to be one of .*; got 'best'"),
        (lambda: fit_posterior(curved, flow="nsf"), TypeError, "expected flow to be a builder or a Flow; got 'nsf'"),
        (lambda: fit_posterior(curved, flow=realnvp(3)), ValueError, "expected a flow over 2 features"),
        (lambda: fit_posterior(curved, seed="a"), (TypeError, ValueError), "expected seed to be an integer; got 'a'"),
        (lambda: Posterior(AutoFlow(line)), ValueError, "expected a guide that is built"),
        (lambda: Posterior(line), TypeError, "expected an AutoFlow; got function"),
        (lambda: Posterior(placed(curved)).draws(0), ValueError, "expected n to be a positive integer; got 0"),
        (lambda: Posterior(placed(curved)).resampled(-1), ValueError, "expected n to be a positive integer; got -1"),
        (
            lambda: Posterior(placed(curved)).to_arviz(0),
            ValueError,
            "expected num_draws to be a positive integer; got 0",
        ),
        (
            lambda: Posterior(placed(curved)).predictive(num_draws=0),
            ValueError,
            "expected num_draws to be a positive integer; got 0",
        ),
        (
            lambda: Posterior(placed(curved)).refine("mh"),
            ValueError,
            "expected method to be one of 'ensemble', 'nuts'; got 'mh'",
        ),
        (
            lambda: Posterior(placed(curved)).refine(num_chains=30),
            ValueError,
            "expected a multiple of 4 chains, 16 or more; got num_chains=30",
        ),
        (
            lambda: Posterior(placed(curved)).refine(num_chains=0),
            ValueError,
            "expected num_chains to be a positive integer; got 0",
        ),
        (
            lambda: Posterior(placed(curved)).log_prob({"x": torch.zeros(2)}),
            ValueError,
            r"expected values of 'y' of shape \(points,\); got none",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("_one_rate")
def test_an_argument_named_like_an_option_may_be_bound():
    posterior = fit_posterior(partial(seeded, seed=3, progress=True), flow=plain, max_steps=1, seed=0)
    assert posterior.verdict == "trust"


def test_supports_that_depend_on_other_sites():
    posterior = Posterior(AutoFlow(garch, plain))
    draws = posterior.draws(500)
    assert (draws["b"] <= 1 - draws["a"][:, None]).all()
    assert posterior.log_prob(draws).shape == (500,)
    assert posterior.to_arviz(40).posterior["b"].shape == (1, 40, 2)
