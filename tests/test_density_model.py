"""Posteriors that are known by a log-density alone."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import close, tensor
from pyro.distributions import constraints
from scipy import stats

from pyroflows import Posterior, density_model, fit_posterior
from pyroflows.inference.init import find_init
from pyroflows.inference.log_joint import LogJoint

Y = tensor([1.0, 2.0, 1.5])
START = {"mean": tensor(0.0), "scale": tensor(1.0), "w": torch.zeros(2, 3).double()}
SUPPORTS = {"scale": constraints.positive}


def log_density(mean, scale, w):
    likelihood = dist.Normal(mean[:, None], scale[:, None]).log_prob(Y).sum(-1)
    return likelihood - mean**2 / 2 - scale - w.square().sum((-1, -2)) / 2


def same():
    mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
    scale = pyro.sample("scale", dist.Exponential(tensor(1.0)))
    pyro.sample("w", dist.Normal(tensor(0.0), 1.0).expand([2, 3]).to_event(2))
    pyro.sample("y", dist.Normal(mean[..., None].expand(*mean.shape, 3), scale[..., None]).to_event(1), obs=Y)


def test_a_density_is_evaluated_for_many_points_at_once_and_equals_that_of_the_model():
    ours, model = LogJoint(density_model(log_density, START, SUPPORTS), start=START), LogJoint(same)
    u = torch.randn(7, 8).double()
    constant = 3.5 * math.log(2 * math.pi)  # of the priors, which the density leaves out
    assert ours.vectorize == "plate"
    close(ours.value(u) - constant, model.value(u), 1e-9)
    close(ours.value_and_score(u)[1], model.value_and_score(u)[1], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_start_gives_place_and_dtype(dtype):
    start = {"x": torch.tensor([3.0, 0.2], dtype=dtype)}
    log_joint = LogJoint(density_model(lambda x: -x.sum(-1), start, {"x": constraints.positive}), start=start)
    assert log_joint.dtype == dtype
    close(log_joint.constrain(log_joint.initial[None])["x"][0], start["x"], 1e-6)


def test_a_fit_of_a_density_meets_the_fit_of_the_model_and_its_file(tmp_path):
    posterior = fit_posterior(log_density=log_density, start=START, supports=SUPPORTS, seed=0, progress=False)
    model = fit_posterior(same, seed=0, progress=False)
    assert posterior.verdict == model.verdict == "trust"
    error = 4 * math.hypot(posterior.log_evidence_error, model.log_evidence_error) + 1e-3
    assert abs(posterior.log_evidence - 3.5 * math.log(2 * math.pi) - model.log_evidence) < error
    draws, others = posterior.resampled(8000), model.resampled(8000)
    for name, value in draws.items():
        assert value.shape == others[name].shape
        sd = others[name].std(0)
        close((value.mean(0) - others[name].mean(0)) / sd, torch.zeros_like(sd), 0.08)
    posterior.save(tmp_path / "posterior")
    loaded = Posterior.load(tmp_path / "posterior", density_model(log_density, START, SUPPORTS))
    assert loaded.verdict == "trust"


def test_a_density_of_two_modes_is_refined():
    def two(x):
        return torch.logaddexp(-((x + 4) ** 2) / 2, -((x - 4) ** 2) / 2).sum(-1)

    posterior = fit_posterior(log_density=two, start={"x": torch.zeros(2).double()}, seed=0, progress=False)
    assert posterior.verdict == "trust"
    assert posterior.log_evidence == pytest.approx(2 * math.log(2 * math.sqrt(2 * math.pi)), abs=0.1)
    quadrants = (posterior.draws(8000)["x"] > 0).double() @ tensor([1.0, 2.0])
    close(torch.bincount(quadrants.long(), minlength=4) / 8000, torch.full((4,), 0.25), 0.05)


class _Gamma(torch.autograd.Function):
    """SciPy's log-density of a gamma distribution, with central differences for a gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(stats.gamma(3.0).logpdf(x.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        ahead, behind = (stats.gamma(3.0).logpdf(x.numpy() + step) for step in (1e-5, -1e-5))
        return gradient * torch.from_numpy((ahead - behind) / 2e-5)


def test_a_function_of_another_library_with_finite_differences():
    posterior = fit_posterior(
        log_density=lambda x: _Gamma.apply(x),
        start={"x": tensor(1.0)},
        supports={"x": constraints.positive},
        seed=0,
        progress=False,
    )
    assert posterior.verdict == "trust"
    assert posterior.log_evidence == pytest.approx(0.0, abs=0.01)
    assert float(posterior.resampled(8000)["x"].mean()) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_posterior(), TypeError, "expected a model, or log_density= and start=; got neither"),
        (
            lambda: fit_posterior(same, log_density=log_density, start=START),
            TypeError,
            "expected a model or log_density=; got both",
        ),
        (
            lambda: fit_posterior(log_density=log_density),
            TypeError,
            "expected start={parameter: value} beside log_density=; got none",
        ),
        (
            lambda: density_model("density", START),
            TypeError,
            "expected log_density to be a function of the parameters; got str",
        ),
        (lambda: density_model(log_density, {}), ValueError, "expected a start for each parameter; got none"),
        (
            lambda: density_model(log_density, START, {"sd": constraints.positive}),
            ValueError,
            "expected supports of parameters among 'mean', 'scale', 'w'; got 'sd'",
        ),
        (
            lambda: density_model(log_density, {"mean": math.nan}),
            ValueError,
            "expected a finite start of parameter 'mean'; got nan",
        ),
        (
            lambda: density_model(log_density, {"scale": -1.0}, SUPPORTS),
            ValueError,
            "expected a start of parameter 'scale' within its support .*; got -1.0",
        ),
        (
            lambda: fit_posterior(log_density=lambda x: -(x**2), start={"x": torch.zeros(2)}),
            ValueError,
            r"expected a log-density for each of the points, of shape \(1,\); got \(1, 2\)",
        ),
        (
            lambda: fit_posterior(log_density=lambda x: x[0].item(), start={"x": 0.0}),
            ValueError,
            r"expected a log-density for each of the points, of shape \(1,\); got float",
        ),
        (
            lambda: fit_posterior(
                log_density=lambda x: torch.from_numpy(np.asarray(-(x.detach().numpy() ** 2))), start={"x": 0.0}
            ),
            ValueError,
            "expected a log-density with a gradient by torch; got one without: write it in torch, or as",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_modes_far_from_the_start_are_found_without_a_prior():
    centres = tensor([[0.0, 0.0], [30.0, 5.0], [-25.0, 20.0]])

    def far(x):
        return dist.Normal(centres, 1.0).log_prob(x[:, None]).sum(-1).logsumexp(-1)

    log_joint = LogJoint(density_model(far, {"x": torch.zeros(2).double()}))
    found = torch.stack([init.loc for init in find_init(log_joint)])
    assert (torch.cdist(centres, found).min(1).values < 0.1).all()
