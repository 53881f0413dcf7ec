"""What a posterior says of itself: verdicts, evidence, and ArviZ's groups, which do not look better than they are."""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import close, mixture, tensor
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.enum import config_enumerate

from pyroflows import AutoFlow, Flow, Posterior, StandardNormal, TriangularAffine
from pyroflows.inference.diagnosis import Weights, importance_sample, missed_modes, summarize_weights
from pyroflows.inference.init import GaussianInit


def plain(features):
    """Nothing but a Gaussian."""
    return Flow(StandardNormal(features), TriangularAffine(features))


def placed(model, loc, scale, *args):
    """The posterior by an untrained guide at a Gaussian given by hand."""
    guide = AutoFlow(model, plain, "none", args=args)
    guide.flow.layers[-1].start_at(tensor(loc), tensor(scale))
    return Posterior(guide)


def laplace(model, *args):
    return Posterior(AutoFlow(config_enumerate(model), plain, "laplace", args=args))


def values_of(groups, group, name):
    """Return draws as a tensor, those of all chains in one dimension."""
    return torch.from_numpy(np.array(groups[group][name].values)).flatten(0, 1)


def elpd(groups, **options):
    loo = az.loo(groups, **options)
    return float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)


def names_in(groups, group):
    return set(groups[group].data_vars) if hasattr(groups, group) else set()


def normal(loc, scale):
    def model():
        pyro.sample("x", dist.Normal(tensor(loc), tensor(scale)).to_event(1))

    return model


def modes(*places, width=1.0):
    """Modes of equal weight in one dimension, with an evidence of one."""

    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        parts = dist.Normal(tensor(places), width).log_prob(x[..., None])
        pyro.factor("f", parts.logsumexp(-1) - math.log(len(places)))

    return model


@pytest.fixture(scope="module")
def hopeless():
    return placed(normal([0.0] * 10, [1.0] * 10), [1.0] * 10, [0.3] * 10)


# An untrusted posterior looks untrusted


def test_arviz_of_a_posterior_that_is_not_to_be_trusted_says_so(hopeless):
    assert hopeless.verdict == "do not trust"
    with pytest.warns(UserWarning, match="do not trust this posterior: the weights are too uneven"):
        groups = hopeless.to_arviz(200)
    for attrs in (groups.attrs, groups.posterior.attrs, groups.sample_stats.attrs):
        assert attrs["verdict"] == "do not trust"
        assert attrs["reason"] == hopeless.reason
        assert attrs["ess"] == hopeless.ess < 100
        assert attrs["log_evidence_error"] == math.inf
        assert "too uneven" in attrs["log_evidence_note"]
    assert groups.posterior.sizes["chain"] == 1  # chains that nobody ran cannot agree
    if "InferenceData" in vars(az):
        assert np.isnan(az.summary(groups)["r_hat"]).all()


def test_a_summary_holds_the_verdict_and_the_effective_size_of_the_weights(hopeless):
    with pytest.warns(UserWarning, match="do not trust this posterior"):
        table = hopeless.summary(400)
    assert (table["verdict"] == "do not trust").all()
    assert table.attrs["reason"] == hopeless.reason
    assert {name for name in table if "ess" in name} == {"ess_weights"}
    assert table["ess_weights"].astype(float).to_numpy() == pytest.approx(hopeless.ess, abs=0.06)
    assert not {"r_hat", "rhat"} & set(table)
    assert "do not trust" in table.to_string()


def test_a_trusted_posterior_reports_without_a_warning():
    posterior = placed(normal([0.0, 1.0], [1.0, 2.0]), [0.0, 1.0], [1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups, table = posterior.to_arviz(100), posterior.summary(100)
    assert groups.attrs["verdict"] == "trust"
    assert groups.attrs["draws"] == "guide"
    assert groups.attrs["log_evidence_note"] == posterior.log_evidence_note == ""
    assert (table["verdict"] == "trust").all()
    assert table["ess_weights"].astype(float).to_numpy() == pytest.approx(10_000)


def test_own_draws_that_are_to_be_resampled_are_warned_of():
    posterior = placed(normal([0.3], [1.2]), [0.0], [1.4])
    assert posterior.verdict == "resample"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert posterior.to_arviz(100).attrs["draws"] == "resampled"
        assert (posterior.summary(100)["verdict"] == "resample").all()
    with pytest.warns(UserWarning, match="the guide's own draws, which should be resampled"):
        groups = posterior.to_arviz(100, resample=False)
    assert groups.attrs["draws"] == "guide"


def test_chains_keep_their_own_diagnostics(hopeless):
    u = torch.randn(3, 50, 10).double() + 5 * torch.arange(3.0)[:, None, None]
    posterior = Posterior(hopeless.guide, chains=u)
    with pytest.warns(UserWarning, match="do not trust this posterior: the largest R-hat of 3 chains"):
        groups = posterior.to_arviz()
    assert groups.attrs["rhat"] == posterior.rhat > 2
    assert groups.posterior["x"].shape == (3, 50, 10)
    assert "log_q" not in groups.sample_stats.data_vars
    with pytest.warns(UserWarning, match="do not trust this posterior"):
        table = posterior.summary()
    assert (table["r_hat"].astype(float) > 2).all()
    assert "ess_bulk" in table
    assert (table["verdict"] == "do not trust").all()


@pytest.mark.skipif(not (find_spec("h5netcdf") or find_spec("netCDF4")), reason="xarray writes by one of them")
def test_the_attributes_are_kept_in_a_file(hopeless, tmp_path):
    with pytest.warns(UserWarning, match="do not trust"):
        groups = hopeless.to_arviz(40)
    groups.to_netcdf(str(tmp_path / "posterior.nc"))
    attrs = az.from_netcdf(str(tmp_path / "posterior.nc")).posterior.attrs
    assert attrs["verdict"] == "do not trust"
    assert list(attrs["khat"]) == pytest.approx(list(hopeless.khat))


# Evidence


def test_the_evidence_without_a_mode_is_a_lower_bound():
    guide = AutoFlow(modes(-6.0, 6.0), plain, "auto")
    guide.flow.layers[-1].start_at(tensor([6.0]), tensor([1.0]))
    posterior = Posterior(guide)
    assert posterior.log_evidence == pytest.approx(-math.log(2), abs=0.01)  # the truth is 0
    assert posterior.weights.log_evidence_error < 0.01
    assert posterior.log_evidence_error == math.inf
    assert posterior.log_evidence_note.startswith("a lower bound")
    assert f"log evidence {posterior.log_evidence:.3f} (a lower bound" in repr(posterior)
    assert "+- 0.000 (a lower" not in repr(posterior)


def test_the_evidence_by_uneven_weights_has_no_standard_error(hopeless):
    assert hopeless.log_evidence < -1  # the truth is 0
    assert hopeless.log_evidence_error == math.inf
    assert "not to be trusted" in hopeless.log_evidence_note
    assert "not to be trusted" in repr(hopeless)


@pytest.mark.parametrize("scale", [1.0, 1.3, 2.0])
def test_the_standard_error_of_the_evidence_is_honest(scale):
    errors = []
    for seed in range(20):
        torch.manual_seed(seed)
        posterior = placed(normal([0.1, 0.0], [1.0, 1.0]), [0.0, 0.0], [scale, scale])
        errors.append(posterior.log_evidence / posterior.log_evidence_error)
    assert np.mean(np.square(errors)) == pytest.approx(1, abs=0.7)


# Verdicts in words


def figures(ess, khat, **options):
    numbers = {"mean_error": 0.01, "sd_error": 0.01, "infinite": 0.0, **options}
    u = torch.zeros(1000, 2)
    return Weights(u, u[:, 0], 0.0, 0.1, 0.0, 0.1, (khat,) * 5, ess, **numbers)


@pytest.mark.parametrize(
    "ess, khat, verdict, is_named",
    [
        (990.0, 1.14, "trust", False),  # the weights are even, whatever k-hat says
        (990.0, 0.2, "trust", False),
        (700.0, 0.4, "trust", True),
        (700.0, 0.9, "do not trust", True),
        (20.0, 0.4, "do not trust", False),
        (20.0, 0.9, "do not trust", True),
        (300.0, 0.4, "resample", True),
    ],
)
def test_khat_is_named_only_if_it_decides(ess, khat, verdict, is_named):
    found, reason = figures(ess, khat).verdict([])
    assert found == verdict
    assert ("k-hat" in reason) == is_named
    assert f"ESS {ess:.0f} of 1000" in reason
    if verdict == "do not trust":
        assert "too uneven" in reason


def test_a_verdict_says_what_to_do_next(hopeless):
    for weights, missed in ((figures(20.0, 0.9), []), (figures(990.0, 0.1), [torch.zeros(2)])):
        assert "refine()" in weights.verdict(missed)[1]
    assert "refine()" in figures(990.0, 0.1, infinite=0.2).verdict([])[1]
    assert "train for longer" in hopeless.reason
    assert "k-hat" in repr(hopeless)
    assert "k-hat" not in repr(placed(normal([0.0], [1.0]), [0.0], [1.0]))


def test_one_mode_that_is_found_twice_is_counted_once():
    """Gaussians around one skew mode differ by more than their deviations."""

    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), (2,)))
        near = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
        far = dist.Gumbel(20.0, 1.0).log_prob(x[..., 0]) + dist.Normal(x[..., 0], 0.3).log_prob(x[..., 1])
        third = dist.Normal(-30.0, 1.0).log_prob(x).sum(-1)
        pyro.factor("f", torch.stack([near, far, third], -1).logsumexp(-1))

    guide = AutoFlow(model, plain, "none")
    guide.flow.layers[-1].start_at(tensor([0.0, 0.0]), tensor([1.0, 1.0]))
    posterior = Posterior(guide)
    assert posterior.missed == []  # by its own draws it cannot know
    eye = torch.eye(2).double()
    tilted = tensor([[1.0, 0.0], [1.0, 0.3]])
    places = [([20.0, 20.0], tilted), ([21.5, 21.5], 1.3 * tilted), ([18.9, 18.9], 0.7 * tilted), ([-30.0, -30.0], eye)]
    guide.inits = [GaussianInit("by hand", tensor(loc), scale, 0.0) for loc, scale in places]
    missed = missed_modes(guide, posterior.log_joint, posterior.weights)
    assert len(missed) == 2
    close(missed[0], tensor([20.0, 20.0]))
    close(missed[1], tensor([-30.0, -30.0]))
    reason = posterior.weights.verdict(missed)[1]
    assert reason.startswith("2 other modes with a share of the posterior")


@pytest.mark.parametrize("apart", [4.0, 8.0])
def test_modes_next_to_each_other_are_two(apart):
    places = (0.0, 30.0, 30.0 + apart)
    guide = AutoFlow(modes(*places), plain, "none")
    guide.flow.layers[-1].start_at(tensor([0.0]), tensor([1.0]))
    posterior = Posterior(guide)
    one = torch.ones(1, 1).double()
    guide.inits = [GaussianInit("by hand", tensor([place]), one, -math.log(3)) for place in places]
    missed = missed_modes(guide, posterior.log_joint, posterior.weights)
    assert [round(float(mode)) for mode in missed] == [30, round(30 + apart)]


def test_a_verdict_counts_deviations_of_the_sites_that_are_read():
    """Unconstrained, the guide's deviation is right to 7 %; that of the site is off by more than 10 %."""

    def positive():
        pyro.sample("s", dist.LogNormal(tensor(0.0), 1.0))

    posterior = placed(positive, [0.0], [0.93])
    assert posterior.weights.mean_error < 0.1
    assert posterior.weights.sd_error > 0.11
    assert posterior.verdict == "resample"

    def deterministic():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.deterministic("odds", x.exp())

    posterior = placed(deterministic, [0.0], [0.93])
    assert posterior.weights.sd_error > 0.11
    assert posterior.verdict == "resample"


def test_a_verdict_counts_means_of_deterministic_sites():
    """A guide of the right marginals, but without the correlation, is wrong about a difference."""

    def model():
        x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(2).double(), tensor([[1.0, 0.5], [0.5, 1.0]])))
        pyro.deterministic("difference", x[..., 0] - x[..., 1])
        pyro.deterministic("is positive", x[..., 0] > 0)
        pyro.deterministic("infinite", (x[..., 0] > 0).log())

    posterior = placed(model, [0.0, 0.0], [1.0, 1.0])
    assert posterior.weights.sd_error == pytest.approx(math.sqrt(2) - 1, abs=0.1)  # of the difference
    assert math.isfinite(posterior.weights.mean_error)  # "infinite" has no mean, which is not the guide's fault


def test_deviations_that_do_not_exist_do_not_count():
    def model():
        x = pyro.sample("x", dist.HalfCauchy(tensor(1.0)))
        pyro.deterministic("square", x**2)

    posterior = Posterior(AutoFlow(model, plain, "none"))
    u = posterior.log_joint.initial + 1.6 * torch.randn(10_000, 1).double()
    weights = 0.02 * torch.randn(10_000).double()
    summary = summarize_weights(posterior.log_joint, u, weights)
    assert summary.sd_error < 0.1
    assert summary.verdict([])[0] == "trust"


# Draws


def fleet(y):
    rate = pyro.sample("rate", dist.Gamma(tensor(2.0), 1.0))
    pyro.deterministic("log rate", rate.log())
    with pyro.plate("ships", len(y)):
        scale = pyro.sample("scale", dist.Gamma(tensor(20.0), 20.0))
        pyro.deterministic("mean", rate * scale)
        pyro.sample("y", dist.Poisson(rate * scale), obs=y)


COUNTS = tensor([3.0, 4.0, 2.0])


@pytest.mark.parametrize("draw", ["draws", "resampled"])
def test_draws_have_the_deterministic_sites(draw):
    values = getattr(laplace(fleet, COUNTS), draw)(50)
    assert list(values) == ["rate", "log rate", "scale", "mean"]
    close(values["log rate"], values["rate"].log())
    close(values["mean"], values["rate"][:, None] * values["scale"])
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "rate": (50,),
        "log rate": (50,),
        "scale": (50, 3),
        "mean": (50, 3),
    }


def test_a_summary_and_draws_of_chains_have_the_deterministic_sites():
    posterior = laplace(fleet, COUNTS)
    chains = Posterior(posterior.guide, chains=posterior.weights.u[:400].view(2, 200, 4))
    assert list(chains.draws(50)) == ["rate", "log rate", "scale", "mean"]
    assert "log rate" in map(str, posterior.summary(50).index)


# Log-likelihoods


TIMES = tensor([1.0, 2.0, 3.0, 5.0, 5.0, 0.4])
CENSORED = torch.tensor([False, False, False, True, True, False])


def survival(t, is_censored):
    """Exponential lifetimes, some of which ended after the study, by a factor."""
    rate = pyro.sample("rate", dist.Gamma(tensor(2.0), 1.0))
    with pyro.plate("patients", len(t)):
        with poutine.mask(mask=~is_censored):
            pyro.sample("t", dist.Exponential(rate), obs=t)
        with poutine.mask(mask=is_censored):
            pyro.factor("survived", -rate * t)


def test_loo_of_a_censored_model_is_right_or_not_there():
    posterior = laplace(survival, TIMES, CENSORED)
    with pytest.warns(UserWarning, match="log_likelihood is left out, since the factor 'survived' may be a part of it"):
        groups = posterior.to_arviz(400)
    assert not names_in(groups, "log_likelihood")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = posterior.to_arviz(4000, likelihood_factors={"survived": "t"})
        apart = posterior.to_arviz(400, likelihood_factors=["survived"])
        without = posterior.to_arviz(400, likelihood_factors=[])
    rate = values_of(groups, "posterior", "rate")[:, None]
    likelihood = torch.where(CENSORED, -rate * TIMES, rate.log() - rate * TIMES)
    close(values_of(groups, "log_likelihood", "t"), likelihood)
    assert names_in(groups, "log_likelihood") == {"t"}
    assert groups.log_likelihood["t"].dims == ("chain", "draw", "patients")
    # Exact: by the posterior of all rows but one, which is a Gamma distribution.
    died, total = (~CENSORED).sum(), TIMES.sum()
    shape, rate = 2 + died - (~CENSORED).double(), 1 + total - TIMES
    exact = shape * (rate / (rate + TIMES)).log() + torch.where(CENSORED, 0.0, (shape / (rate + TIMES)).log())
    assert elpd(groups) == pytest.approx(exact.sum().item(), abs=0.1)

    rate = values_of(apart, "posterior", "rate")[:, None]
    close(values_of(apart, "log_likelihood", "t"), (rate.log() - rate * TIMES)[:, ~CENSORED])
    close(values_of(apart, "log_likelihood", "survived"), (-rate * TIMES)[:, CENSORED])
    with pytest.raises(Exception, match="several log likelihood arrays"):
        az.loo(apart)  # which of them, the user has to say
    assert names_in(without, "log_likelihood") == {"t"}


@pytest.mark.parametrize("kind", ["poutine", "distribution", "event"])
def test_what_is_masked_out_is_no_observation(kind):
    y, mask = tensor([1.0, 99.0, 3.0, 99.0]), torch.tensor([True, False, True, False])

    def model():
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", 4):
            if kind == "poutine":
                with poutine.mask(mask=mask):
                    pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
            elif kind == "distribution":
                pyro.sample("y", dist.Normal(mean[..., None], 1.0).expand([4]).mask(mask), obs=y)
            else:
                fn = dist.Normal(mean[..., None, None], 1.0).expand([4, 2]).mask(mask[:, None]).to_event(1)
                pyro.sample("y", fn, obs=y[:, None].expand(4, 2))

    posterior = laplace(model)
    groups = posterior.to_arviz(100, coords={"rows": ["a", "b", "c", "d"]})
    event = (2,) if kind == "event" else ()
    for group in ("log_likelihood", "posterior_predictive", "observed_data"):
        assert names_in(groups, group) == {"y"}
        assert list(groups[group]["y_observed"].values) == ["a", "c"]
    assert groups.observed_data["y"].shape == (2, *event)
    assert groups.posterior_predictive["y"].shape == (1, 100, 2, *event)
    mean = values_of(groups, "posterior", "mean")[:, None]
    right = dist.Normal(mean, 1.0).log_prob(tensor([1.0, 3.0])) * (2 if event else 1)
    close(values_of(groups, "log_likelihood", "y"), right)
    assert math.isfinite(elpd(groups))


def test_masks_of_a_matrix_of_a_whole_site_and_of_latents():
    mask = torch.tensor([[True, True, False], [False, True, True]])

    def model():
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("years", 2, dim=-2), pyro.plate("places", 3, dim=-1):
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.ones(2, 3).double())
            with poutine.mask(mask=False):
                pyro.sample("never", dist.Normal(mean, 1.0), obs=torch.ones(2, 3).double())
        with pyro.plate("rows", 3), poutine.mask(mask=mean > tensor([-math.inf, 0.0, math.inf])):
            pyro.sample("sometimes", dist.Normal(mean, 1.0), obs=torch.zeros(3).double())

    posterior = laplace(model)
    groups = posterior.to_arviz(100)
    for group in ("log_likelihood", "posterior_predictive", "observed_data"):
        assert names_in(groups, group) == {"y", "sometimes"}
    assert list(groups.observed_data["y_observed"].values) == [0, 1, 4, 5]
    assert list(groups.log_likelihood["sometimes_observed"].values) == [0, 1]
    mean = values_of(groups, "posterior", "mean")[:, None]
    terms = dist.Normal(mean, 1.0).log_prob(tensor(0.0))
    right = torch.cat([terms, torch.where(mean > 0, terms, 0.0)], -1)
    close(values_of(groups, "log_likelihood", "sometimes"), right)


def test_scales_are_no_part_of_the_log_likelihood():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", len(y)), poutine.scale(scale=10.0):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    groups = laplace(model, COUNTS).to_arviz(100)
    mean = values_of(groups, "posterior", "mean")[:, None]
    close(values_of(groups, "log_likelihood", "y"), dist.Normal(mean, 1.0).log_prob(COUNTS))


def test_discrete_latents_are_summed_out_of_the_log_likelihood():
    y = tensor([-2.1, -1.9, 2.2, 1.8, 2.0])
    groups = laplace(mixture, y).to_arviz(100)
    means, weights = (values_of(groups, "posterior", name)[:, None] for name in ("means", "weights"))
    right = (weights.log() + dist.Normal(means, 1.0).log_prob(y[:, None])).logsumexp(-1)
    close(values_of(groups, "log_likelihood", "y"), right)
    assert math.isfinite(elpd(groups))


def test_half_observed_sites_have_the_log_likelihood_of_what_is_observed():
    y, mask = tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([True, True, False, True])

    def model():
        p = pyro.sample("p", dist.Beta(tensor(2.0), 2.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=mask)

    groups = laplace(model).to_arviz(100)
    assert names_in(groups, "log_likelihood") == {"y_observed"}
    p = values_of(groups, "posterior", "p")[:, None]
    close(values_of(groups, "log_likelihood", "y_observed"), dist.Bernoulli(p).log_prob(y[mask]))


@pytest.mark.parametrize("kind", ["of two sites", "of all rows", "of a chain"])
def test_observations_that_share_a_discrete_latent_are_left_out_with_a_warning(kind):
    y = tensor([1.0, 2.0, 3.0])

    def model():
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        if kind == "of a chain":
            z = torch.tensor(0)
            for i in pyro.markov(range(3)):
                z = pyro.sample(f"z{i}", dist.Bernoulli(0.2 + 0.6 * z))
                pyro.sample(f"y{i}", dist.Normal(mean + z, 1.0), obs=y[i])
        elif kind == "of all rows":
            z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
            with pyro.plate("rows", 3):
                pyro.sample("y", dist.Normal(mean + z, 1.0), obs=y)
        else:
            with pyro.plate("rows", 3):
                z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
                pyro.sample("y", dist.Normal(mean + z, 1.0), obs=y)
                pyro.sample("x", dist.Normal(mean - z, 1.0), obs=y)

    guide = AutoFlow(config_enumerate(model), plain, "none")
    weights = importance_sample(guide, guide.log_joint, 200)  # few, since some of the models run point by point
    posterior = Posterior(guide, weights=weights, missed=[])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = posterior.to_arviz(50)
    assert any("log_likelihood is left out, since the observations of 'y" in str(note.message) for note in caught)
    assert not names_in(groups, "log_likelihood")


def test_one_discrete_latent_of_one_observation_is_summed_out():
    def model():
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
        pyro.sample("y", dist.Normal(torch.stack([mean + z, mean - z], -1), 1.0).to_event(1), obs=tensor([1.0, 2.0]))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=COUNTS)

    groups = laplace(model).to_arviz(50)
    mean = values_of(groups, "posterior", "mean")
    near, far = (
        dist.Normal(mean + z, 1.0).log_prob(tensor(1.0)) + dist.Normal(mean - z, 1.0).log_prob(tensor(2.0))
        for z in (0, 1)
    )
    close(values_of(groups, "log_likelihood", "y"), torch.logaddexp(near + math.log(0.7), far + math.log(0.3)))
    close(values_of(groups, "log_likelihood", "x"), dist.Normal(mean[:, None], 1.0).log_prob(COUNTS))


# Groups and dimensions


def crossed(y, v):
    top = pyro.sample("top", dist.Normal(tensor(0.0), 1.0))
    with pyro.plate("years", 2, dim=-2):
        year = pyro.sample("year", dist.Normal(top, 1.0))
        with pyro.plate("places", 3, dim=-1):
            place = pyro.sample("place", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))
            total = pyro.deterministic("total", year + place.sum(-1))
            pyro.deterministic("parts", place, event_dim=1)
            pyro.sample("y", dist.Normal(total, 1.0), obs=y)
    pyro.sample(
        "v",
        dist.MultivariateNormal(top.expand(5), torch.eye(5).double())
        if top.dim() == 0
        else dist.MultivariateNormal(top[..., None].expand(*top.shape, 5), torch.eye(5).double()),
        obs=v,
    )


def test_plates_name_the_dimensions():
    posterior = laplace(crossed, torch.ones(2, 3).double(), torch.zeros(5).double())
    groups = posterior.to_arviz(20, coords={"years": [1999, 2000], "places": ["a", "b", "c"]})
    dims = {
        "top": (),
        "year": ("years", "year_dim_1"),
        "place": ("years", "places", "place_dim_2"),
        "total": ("years", "places"),
        "parts": ("years", "places", "parts_dim_2"),
    }
    assert {name: groups.posterior[name].dims[2:] for name in dims} == dims
    assert groups.log_likelihood["y"].dims == ("chain", "draw", "years", "places")
    assert groups.log_likelihood["v"].dims == ("chain", "draw")
    assert groups.posterior_predictive["v"].dims == ("chain", "draw", "v_dim_0")
    assert groups.observed_data["y"].dims == ("years", "places")
    assert list(groups.posterior["years"].values) == [1999, 2000]
    assert list(groups.observed_data["places"].values) == ["a", "b", "c"]
    top = values_of(groups, "posterior", "top")
    close(values_of(groups, "log_likelihood", "v"), dist.Normal(top[:, None], 1.0).log_prob(tensor(0.0))[:, 0] * 5)


def test_names_and_labels_of_the_users_own():
    posterior = laplace(fleet, COUNTS)
    labels = {"vessel": ["Ann", "Bo", "Cy"]}
    groups = posterior.to_arviz(20, dims={"scale": ["vessel"], "y": ["vessel"]}, coords=labels)
    assert groups.posterior["scale"].dims == ("chain", "draw", "vessel")
    assert groups.posterior["mean"].dims == ("chain", "draw", "ships")
    assert groups.observed_data["y"].dims == ("vessel",)
    assert groups.log_likelihood["y"].dims == ("chain", "draw", "vessel")
    assert list(groups.posterior["vessel"].values) == labels["vessel"]
    assert "scale[Bo]" in map(str, posterior.summary(20, dims={"scale": ["vessel"]}, coords=labels).index)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dims": {"scales": ["ship"]}}, "expected dims of the model's sites, .*; got those of 'scales'"),
        ({"dims": {"scale": ["a", "b"]}}, "a name for each of 1 dimensions of 'scale'; got \\['a', 'b'\\]"),
        ({"dims": {"scale": "ship"}}, "a name for each of 1 dimensions of 'scale'; got 'ship'"),
        ({"coords": {"ship": [1, 2, 3]}}, "expected coords of the dimensions \\['ships'\\]; got those of 'ship'"),
        ({"coords": {"ships": [1, 2]}}, "expected 3 coords of the dimension 'ships'; got 2"),
        ({"likelihood_factors": ["f"]}, "expected factors of the model, \\[\\]; got 'f'"),
    ],
)
def test_dimensions_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        laplace(fleet, COUNTS).to_arviz(20, **options)


def test_factors_that_are_refused():
    def model(t):
        rate = pyro.sample("rate", dist.Gamma(tensor(2.0), 1.0))
        pyro.factor("all", -rate)
        with pyro.plate("patients", len(t)):
            pyro.sample("t", dist.Exponential(rate), obs=t)

    posterior = laplace(model, TIMES)
    with pytest.raises(ValueError, match=r"a factor of the shape \(6,\) of 't'; got 'all' of shape \(\)"):
        posterior.to_arviz(20, likelihood_factors={"all": "t"})
    with pytest.raises(ValueError, match=r"expected an observed site, \['t'\]; got 'rate'"):
        posterior.to_arviz(20, likelihood_factors={"all": "rate"})


def test_predictions_are_at_the_draws():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 100.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1e-3), obs=y)
            pyro.sample("z", dist.Poisson(tensor(3.0)).mask(mean > -1e9), obs=y)

    posterior = laplace(model, COUNTS)
    groups = posterior.to_arviz(200)
    mean = values_of(groups, "posterior", "mean")[:, None].expand(200, 3)
    close(values_of(groups, "posterior_predictive", "y"), mean, 0.01)
    assert names_in(groups, "posterior_predictive") == {"y", "z"}
    close(torch.from_numpy(np.array(groups.observed_data["y"].values)), COUNTS)
    assert not names_in(posterior.to_arviz(20, predictive=False), "posterior_predictive")


def test_what_cannot_be_predicted_is_left_out_with_a_warning():
    class Score(dist.TorchDistribution):
        support, arg_constraints = constraints.real, {}

        def __init__(self, mean):
            self.mean_ = mean
            super().__init__(mean.shape)

        def log_prob(self, value):
            return -((value - self.mean_) ** 2)

        def expand(self, batch_shape, _instance=None):
            return Score(self.mean_.expand(batch_shape))

    def scored(y):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", Score(mean), obs=y)

    with pytest.warns(UserWarning, match="posterior_predictive is left out, since the model cannot be drawn from"):
        groups = laplace(scored, COUNTS).to_arviz(20)
    assert groups.log_likelihood["y"].shape == (1, 20, 3)
    assert not names_in(groups, "posterior_predictive")

    def broadcast(y):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mean[..., None].squeeze(-1), 1.0).to_event(0), obs=y)

    pyro.enable_validation(False)
    with pytest.warns(UserWarning, match="draws of 'y' have another shape than the observations"):
        groups = laplace(broadcast, COUNTS).to_arviz(20)
    assert groups.observed_data["y"].shape == (3,)


def test_an_observed_point_with_a_density_is_a_factor():
    def model():
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        pyro.sample("hidden", dist.Delta(mean, log_density=-(mean**2)), obs=mean)
        pyro.sample("plain", dist.Delta(mean), obs=mean)
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=COUNTS)

    posterior = laplace(model)
    assert posterior.log_joint.structure.factors == ["hidden"]
    with pytest.warns(UserWarning, match="the factor 'hidden' may be a part of it"):
        assert not names_in(posterior.to_arviz(20), "log_likelihood")
    assert names_in(posterior.to_arviz(20, likelihood_factors=[]), "log_likelihood") == {"y"}


def test_draws_where_a_matrix_has_no_factor():
    """A run of the model fails there, of which a verdict, draws and groups are to survive the others."""

    def model(y):
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        eye = torch.eye(2).double() * (2.5 - x)[..., None, None]
        root = pyro.deterministic("root", torch.linalg.cholesky(eye))
        pyro.deterministic("is large", x > 1)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=root), obs=y)

    posterior = placed(model, [0.0], [1.0], tensor([0.5, 0.5]))
    assert 0 < posterior.weights.infinite < 0.01
    x = torch.linspace(-3, 3, 61).double()[:, None]
    values = posterior.log_joint.constrain(x, deterministic=True)
    close(values["x"], x[:, 0])
    fine = x[:, 0] < 2.5
    assert values["root"][~fine].isnan().all()
    close(values["root"][fine][:, 0, 0], (2.5 - x[fine, 0]).sqrt())
    assert posterior.log_joint.log_likelihood(x)["y"].isnan().tolist() == (~fine).tolist()
    assert posterior.draws(4000)["root"].isnan().any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert posterior.to_arviz(4000, resample=False).posterior["x"].shape == (1, 4000)


@pytest.mark.parametrize(
    "weights, note",
    [
        (figures(990.0, 0.1), ""),
        (figures(300.0, 0.1), "by uneven weights (median k-hat 0.10, ESS 300 of 1000)"),
        (figures(990.0, 0.1, infinite=0.2), "with a weight of zero for 20.0% of the draws"),
        (figures(990.0, 0.1, sd_error=0.3), "by uneven weights (ESS 990 of 1000)"),
    ],
)
def test_the_evidence_has_a_note_unless_the_verdict_is_trust(weights, note):
    assert weights.evidence_error([]) == (0.1, note)
    error, missed = weights.evidence_error([torch.zeros(2)])
    assert error == math.inf
    assert missed.startswith("a lower bound")


def test_sites_of_the_names_that_arviz_takes_are_refused():
    def model():
        pyro.sample("draw", dist.Normal(tensor(0.0), 1.0))

    with pytest.raises(ValueError, match="of other names than 'chain' and 'draw', .*; got 'draw'"):
        laplace(model).summary(10)


def test_a_summary_of_sites_that_are_true_or_false():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.deterministic("is positive", x > 0)

    posterior = laplace(model)
    table = posterior.summary(2000)
    assert float(table.loc["is positive", "mean"]) == pytest.approx(0.5, abs=0.05)
    assert posterior.draws(5)["is positive"].dtype == torch.bool
