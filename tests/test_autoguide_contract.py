"""What Pyro's own tests ask of an automatic guide, asked of AutoFlow."""

from __future__ import annotations

import copy
import functools
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam

from pyroflows import AutoFlow, maf, nsf, realnvp

FLOWS = {"realnvp": realnvp, "maf": maf, "nsf": nsf}
Y = torch.tensor([1.0, 2.0, 1.5])


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)


def model():
    pyro.sample("z", dist.Normal(0.0, 10.0))
    pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 4):
        pyro.sample("s", dist.LogNormal(0.0, 1.0))


def conjugate(y=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


class Regression(PyroModule):
    """A linear regression whose data are optional."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 5.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 3.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


@pytest.mark.parametrize("name", FLOWS)
def test_scores(name):
    guide = AutoFlow(model, FLOWS[name])
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    assert not any("latent" in site for site in model_trace.nodes)
    assert guide_trace.log_prob_sum().isfinite()
    assert model_trace.log_prob_sum().isfinite()
    values = {site: guide_trace.nodes[site]["value"][None] for site in ("z", "w", "s")}
    torch.testing.assert_close(guide.log_prob(values)[0], guide_trace.log_prob_sum())


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("num_particles", [1, 10])
def test_shapes_of_draws_and_particles(name, num_particles):
    guide = AutoFlow(model, FLOWS[name])
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    assert isinstance(elbo.loss(model, guide), float)
    guide.draws(7)
    shapes = {site: value.shape for site, value in guide().items()}
    assert shapes == {"z": (), "w": (3,), "s": (4,)}


@pytest.mark.parametrize("name", FLOWS)
def test_median_and_quantiles(name):
    guide = AutoFlow(conjugate, FLOWS[name]).setup(Y)
    svi = SVI(conjugate, guide, Adam({"lr": 0.003}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(100):
        svi.step(Y)
    median, quantiles = guide.median(Y), guide.quantiles([0.1, 0.5, 0.9], Y)
    assert float(median["mean"]) == pytest.approx(18 / 13, abs=0.1)
    wanted = dist.Normal(18 / 13, 13**-0.5).icdf(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles["mean"], wanted, rtol=0, atol=0.12)


def test_linear_regression_with_a_pyro_module_and_optional_data_and_its_predictions():
    x = torch.randn(100, 2)
    y = x @ torch.tensor([2.0, -1.0]) + 0.5 + 0.1 * torch.randn(100)
    regression = Regression()
    guide = AutoFlow(regression)
    svi = SVI(regression, guide, Adam({"lr": 0.003}), Trace_ELBO(num_particles=4, vectorize_particles=False))
    for _ in range(40):
        svi.step(x, y)
    drawn = Predictive(regression, guide=guide, num_samples=50, return_sites=("linear.weight", "obs", "_RETURN"))(x)
    assert drawn["obs"].shape == (50, 100) == drawn["_RETURN"].shape
    torch.testing.assert_close(drawn["linear.weight"].mean(0).flatten(), torch.tensor([2.0, -1.0]), rtol=0, atol=0.1)
    assert float((drawn["_RETURN"].mean(0) - y).std()) < 0.2


@pytest.mark.parametrize("name", FLOWS)
def test_serialisation(name):
    guide = AutoFlow(conjugate, FLOWS[name]).setup(Y)
    SVI(conjugate, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(Y)
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copied = copy.deepcopy(guide)
    u = torch.randn(5, 1)
    for other in (loaded, copied):
        torch.testing.assert_close(other.require_flow().log_prob(u), guide.require_flow().log_prob(u))
        assert set(other.draws(3)) == {"mean"}
    names = {n for n, _ in guide.named_parameters()}
    assert {n for n, _ in loaded.named_parameters()} == names


def test_latents_in_a_subsampled_plate_are_refused():
    def subsampled(data):
        with pyro.plate("rows", 10, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[rows])

    with pytest.raises(ValueError, match="latents outside subsampled plates"):
        AutoFlow(subsampled).setup(torch.randn(10))


def test_subsampled_data_of_global_latents_train():
    def subsampled(data):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20, subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=data[rows])

    data = torch.ones(20)
    guide = AutoFlow(subsampled).setup(data)
    assert isinstance(SVI(subsampled, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(data), float)


def test_it_is_a_part_of_a_list_of_guides():
    def both(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    guide = AutoGuideList(both)
    guide.append(AutoFlow(poutine.block(both, expose=["mean"])))
    guide.append(AutoDelta(poutine.block(both, hide=["mean"])))
    svi = SVI(both, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        assert isinstance(svi.step(Y), float)
    assert set(guide(Y)) == {"mean", "scale"}


@pytest.mark.parametrize(
    "wrapped",
    [
        functools.partial(conjugate, y=Y),
        functools.partial(conjugate, Y),
        poutine.condition(conjugate, data={"y": Y}),
        lambda *args: conjugate(Y),
        lambda **kwargs: conjugate(kwargs.get("y", Y)),
    ],
    ids=["partial by name", "partial", "conditioned", "args", "kwargs"],
)
def test_models_that_carry_their_data(wrapped):
    guide = AutoFlow(wrapped)
    svi = SVI(wrapped, guide, Adam({"lr": 0.003}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    for _ in range(50):
        svi.step()
    assert {site.name for site in guide.latents} == {"mean"}
    assert float(guide.draws(4000)["mean"].std()) == pytest.approx(13**-0.5, rel=0.15)


class Method:
    def model(self, *, y=None):
        return conjugate(y)


def test_keyword_data_of_a_bound_method():
    bound = Method().model
    guide = AutoFlow(bound)
    svi = SVI(bound, guide, Adam({"lr": 0.003}), TraceMeanField_ELBO())
    for _ in range(20):
        svi.step(y=Y)
    assert {site.name for site in guide.latents} == {"mean"}


def test_the_names_of_parameters_are_stable_and_in_the_store():
    guide = AutoFlow(conjugate).setup(Y)
    guide(Y)
    first = set(pyro.get_param_store().keys())
    guide(Y)
    assert first == set(pyro.get_param_store().keys())
    assert len(first) == sum(1 for _ in guide.parameters())
