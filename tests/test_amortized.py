"""Amortised posteriors: guides of local latents that reach the evidence, and posteriors learned from simulations."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

from pyroflows import Flow, MaskedAutoregressive, StandardNormal, iaf, load, maf, planar, realnvp
from pyroflows.files import read, write
from pyroflows.inference import AmortizedFlow, AmortizedPosterior, fit_amortized

WEIGHT = torch.tensor([[1.0, 0.5], [-0.3, 1.2], [0.7, 0.7]])


def data(rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 3, generator=generator)
    return torch.randn(rows, 2, generator=generator) @ WEIGHT.T + 0.5 * noise


def linear(x, weight=WEIGHT):
    """A linear-Gaussian model of rows: evidence and posterior are known."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(weight.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T, 0.5).to_event(1), obs=x)


def evidence(x):
    return dist.MultivariateNormal(torch.zeros(3), WEIGHT @ WEIGHT.T + 0.25 * torch.eye(3)).log_prob(x)


def small(features, *, context_features):
    return iaf(features, context_features=context_features, num_layers=2, hidden_features=(16,))


def guide_of(model=linear, flow=small, encoder=None, **options):
    return AmortizedFlow(model, flow, nn.Linear(3, 8) if encoder is None else encoder, **options)


# The guide


def test_it_reaches_the_evidence():
    x = data(500)
    encoder = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 16))
    guide = guide_of(encoder=encoder).setup(x)
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.995})
    svi = SVI(linear, guide, optimizer, Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(150):
        for rows in torch.randperm(500).split(130):  # the last is smaller
            svi.step(x[rows])
    guide.eval()
    elbo = -Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1).loss(linear, guide, x) / 500
    assert elbo == pytest.approx(evidence(x).mean().item(), abs=0.02)
    covariance = (torch.eye(2) + WEIGHT.T @ WEIGHT / 0.25).inverse()
    draws = guide.draws(2000, x)["z"]
    assert draws.shape == (2000, 500, 2)
    error = (draws.mean(0) - x @ WEIGHT / 0.25 @ covariance) / covariance.diagonal().sqrt()
    assert error.square().mean().sqrt() < 0.15
    exact = dist.MultivariateNormal(x @ WEIGHT / 0.25 @ covariance, covariance)
    values = exact.sample((20,))
    gap = (exact.log_prob(values) - guide.log_prob({"z": values}, x)).mean().item()
    assert -0.01 < gap < 0.05
    torch.testing.assert_close(guide.median(x)["z"], draws.median(0).values, rtol=0, atol=0.15)
    assert guide.quantiles([0.1, 0.9], x)["z"].shape == (2, 500, 2)


def test_it_is_built_by_setup_and_its_parameters_train():
    x = data()
    guide = guide_of()
    with pytest.raises(ValueError, match="a guide that is set up"):
        guide.draws(3, x)
    guide.setup(x)
    before = [p.detach().clone() for p in guide.parameters()]
    assert len(before) == 2 + len(list(small(2, context_features=8).parameters()))
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(2):
        svi.step(x)
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    other = guide_of().setup(x)
    other.load_state_dict(guide.state_dict())
    values = guide.draws(2, x)
    assert torch.equal(other.log_prob(values, x), guide.log_prob(values, x))


def test_each_guide_trains_its_own_parameters():
    """Pyro's store keeps the parameters of the first guide of a name; a second would learn nothing, silently."""
    x = data()
    for _ in range(2):
        guide = guide_of().setup(x)
        before = [p.detach().clone() for p in guide.parameters()]
        svi = SVI(linear, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        for _ in range(2):
            svi.step(x)
        assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_copies_and_pickles_before_and_after_training():
    x = data()
    guide = guide_of().setup(x)
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for trained in (False, True):
        if trained:
            svi.step(x)
        values = guide.draws(2, x)
        for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
            assert torch.equal(other.log_prob(values, x), guide.log_prob(values, x))
        assert guide.model is linear
    assert copy.deepcopy(guide).model is linear
    svi.step(x)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("particles", [1, 3])
def test_elbos_and_vectorised_particles(loss, particles):
    x = data(6)
    guide = guide_of().setup(x)
    elbo = loss(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    assert math.isfinite(SVI(linear, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(x))
    # Built inside the first call, under the particles' plate, it is the same guide.
    lazy = guide_of()
    assert math.isfinite(SVI(linear, lazy, pyro.optim.Adam({"lr": 1e-3}), elbo).step(x))
    assert lazy.draws(2, x)["z"].shape == (2, 6, 2)


def test_the_density_of_the_guide_is_the_flows_with_the_jacobian():
    def model(x):
        with pyro.plate("rows", len(x)):
            s = pyro.sample("s", dist.Gamma(2.0, 1.0))
            w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(w, s[..., None]).to_event(1), obs=x)

    x = data(5)
    guide = guide_of(model).setup(x)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    values = {name: trace.nodes[name]["value"] for name in ("s", "w")}
    total = sum(node["log_prob"] for node in trace.nodes.values() if node["type"] == "sample" and "log_prob" in node)
    assert trace.nodes["_AmortizedFlow_latent"]["infer"]["is_auxiliary"]
    assert trace.nodes["_AmortizedFlow_latent"]["value"].shape == (5, 3)
    torch.testing.assert_close(guide.log_prob(values, x), total)
    assert (values["s"] > 0).all()
    torch.testing.assert_close(values["w"].sum(-1), torch.ones(5))
    # In one dimension the density of a positive latent integrates to 1.
    only = guide_of(poutine.block(model, hide=["w"])).setup(x)
    grid = torch.linspace(1e-4, 60, 60_001)[:, None].expand(-1, 5)
    mass = only.log_prob({"s": grid}, x).exp().sum(0) * (60 / 60_000)
    torch.testing.assert_close(mass, torch.ones(5), rtol=0, atol=0.02)


def subsampled(x, batch):
    with pyro.plate("rows", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.T, 0.5).to_event(1), obs=x[index])


def test_a_subsampled_plate_gives_the_full_one_in_expectation():
    x = data(30) + torch.arange(30.0)[:, None] / 10  # rows that differ, so that mixed-up ones would show
    guide = guide_of(lambda x: subsampled(x, 7)).setup(x).eval()
    trace = poutine.trace(guide).get_trace(x)
    index = trace.nodes["rows"]["value"]
    assert len(index) == 7
    assert trace.nodes["z"]["value"].shape == (7, 2)
    replayed = poutine.trace(poutine.replay(lambda: subsampled(x, 7), trace)).get_trace()
    assert torch.equal(replayed.nodes["x"]["value"], x[index])
    assert trace.nodes["z"]["scale"] == pytest.approx(30 / 7)
    full = guide_of().setup(x).eval()
    full.load_state_dict(guide.state_dict())
    torch.manual_seed(0)
    some = torch.tensor([Trace_ELBO().loss(lambda x: subsampled(x, 7), guide, x) for _ in range(1500)])
    every = torch.tensor([Trace_ELBO().loss(linear, full, x) for _ in range(300)])
    error = (some.var() / 1500 + every.var() / 300).sqrt()
    assert abs(some.mean() - every.mean()) < 3.5 * error


def test_a_minibatch_scaled_by_its_plate():
    """A plate of all rows around a minibatch that came as an argument: the model keeps the indices, if it draws any."""
    x = data(40)

    def model(x):
        with pyro.plate("rows", 40, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, 0.5).to_event(1), obs=x)

    guide = guide_of(model).setup(x[:10])
    for rows in (10, 8):
        trace = poutine.trace(guide).get_trace(x[:rows])
        assert trace.nodes["z"]["value"].shape == (rows, 2)
        assert trace.nodes["z"]["scale"] == pytest.approx(40 / rows)
        assert "rows" not in trace.nodes
        assert math.isfinite(Trace_ELBO().loss(model, guide, x[:rows]))


def test_rows_that_the_model_chooses():
    x = data(40)

    def model(x, rows):
        with pyro.plate("rows", 40, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, 0.5).to_event(1), obs=x[rows])

    rows = torch.arange(5, 12)
    with pytest.raises(ValueError, match="inputs of the 7 rows that the model chose"):
        guide_of(model).setup(x, rows)
    guide = guide_of(model, inputs=lambda x, rows: x[rows]).setup(x, rows)
    trace = poutine.trace(guide).get_trace(x, rows)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x, rows)
    assert torch.equal(replayed.nodes["rows"]["value"], rows)
    assert replayed.nodes["z"]["scale"] == pytest.approx(40 / 7)


def test_create_plates_and_plates_of_another_dimension():
    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.shape[-3:] == (len(x), 1, 2)
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, 0.5).to_event(1), obs=x[:, None])

    x = data(6)
    guide = guide_of(model).setup(x)
    assert guide.draws(4, x)["z"].shape == (4, 6, 1, 2)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
    assert math.isfinite(elbo.loss(model, guide, x))
    assert guide.log_prob(guide.draws(4, x), x).shape == (4, 6, 1)
    made = guide_of(create_plates=lambda x: pyro.plate("rows", len(x), dim=-1)).setup(x)
    assert math.isfinite(Trace_ELBO().loss(linear, made, x[:4]))


def mixed(x):
    """A global beside local latents."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(shift + z @ WEIGHT.T, 0.5).to_event(1), obs=x)


def test_beside_a_guide_of_the_globals():
    x = data(20)
    guide = AutoGuideList(mixed)
    guide.append(AutoNormal(poutine.block(mixed, expose=["shift"])))
    guide.append(guide_of(poutine.block(mixed, expose=["z"])))
    svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    first = svi.step(x)
    assert math.isfinite(first)
    before = [p.detach().clone() for p in guide[1].parameters()]
    svi.step(x)
    assert all(not torch.equal(a, b) for a, b in zip(before, guide[1].parameters(), strict=True))
    assert guide[1].draws(3, x)["z"].shape == (3, 20, 2)


def test_enumerated_latents_are_left_to_the_elbo():
    def model(x):
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(k[..., None] + z @ WEIGHT.T, 0.5).to_event(1), obs=x)

    x = data(6)
    guide = guide_of(model).setup(x)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceEnum_ELBO(max_plate_nesting=1)).step(x))


def test_dtype_follows_the_latents():
    x = data(6).double()
    model = lambda x: linear(x, WEIGHT.double())  # noqa: E731
    guide = guide_of(model).setup(x)
    assert guide.flow.dtype == torch.float64
    assert guide.draws(2, x)["z"].dtype == torch.float64
    assert math.isfinite(Trace_ELBO().loss(model, guide, x))


def test_flows_and_encoders():
    x = data(6)
    ready = realnvp(2, num_layers=2, context_features=8)
    assert guide_of(flow=ready).setup(x).flow is ready
    for builder in (planar, realnvp):
        assert math.isfinite(Trace_ELBO().loss(linear, guide_of(flow=builder).setup(x), x))
    images = guide_of(encoder=nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten())).setup(x)
    assert images.flow.context_features == 4
    posterior = images.posterior(x)
    assert (posterior.batch_shape, posterior.event_shape) == ((6,), (2,))
    lazy = guide_of(encoder=nn.LazyLinear(5)).setup(x)
    assert lazy.flow.context_features == 5


def test_the_encoder_is_evaluated_once_a_step():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    x = data(9)
    guide = guide_of(encoder=Counted(3, 4)).setup(x)
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(max_plate_nesting=1))
    svi.step(x)
    calls.clear()
    svi.step(x)
    assert calls == [9]


def nested(x):
    with pyro.plate("rows", len(x), dim=-1), pyro.plate("again", 2, dim=-2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def several(x):
    for name in ("a", "b"):
        with pyro.plate(f"rows_{name}", len(x)):
            pyro.sample(name, dist.Normal(0.0, 1.0))


def in_rows(sample):
    def model(x):
        with pyro.plate("rows", len(x)):
            sample(x)

    return model


def sequential(x):
    for i in pyro.plate("rows", len(x)):
        pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))


def moving_support(x):
    high = pyro.param("high", torch.tensor(2.0))
    pyro.sample("z", dist.Uniform(0.0, high))


def dependent(x):
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, 1 - a))


@pytest.mark.parametrize(
    "model, message",
    [
        (mixed, "latents in a plate; got site 'shift' outside any plate: give it another guide in an AutoGuideList"),
        (lambda x: pyro.sample("m", dist.Normal(0.0, 1.0)), "got site 'm' outside any plate: use AutoFlow"),
        (nested, "each latent in one vectorised plate; got site 'z' in plate 'rows' in 'again'"),
        (several, "all latents in one plate; got site 'a' in plate 'rows_a' and site 'b' in plate 'rows_b'"),
        (sequential, "one vectorised plate; got site 'z0' in plate 'rows'"),
        (in_rows(lambda x: pyro.sample("k", dist.Poisson(3.0))), "continuous latents; got the discrete site 'k'"),
        (in_rows(dependent), "depends neither on other sites nor on the row; got site 'b'"),
        (
            in_rows(lambda x: pyro.sample("b", dist.Uniform(0.0, 1 + x[:, 0].exp()))),
            "depends neither on other sites nor on the row; got site 'b'",
        ),
        (in_rows(moving_support), "whose support does not move in training; got site 'z'"),
        (lambda x: pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x[0]), "latent sites; got none"),
        (in_rows(lambda x: pyro.sample("k", dist.VonMises3D(torch.eye(3)[0]))), "spherical sample site 'k'"),
    ],
)
def test_models_that_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        guide_of(model).setup(data(4))


def test_a_support_that_is_the_same_for_every_row():
    model = in_rows(lambda x: pyro.sample("b", dist.Uniform(torch.zeros(len(x)), 2 * torch.ones(len(x)))))
    guide = guide_of(model).setup(data(4))
    assert guide.draws(50, data(9))["b"].shape == (50, 9)
    assert guide.draws(50, data(9))["b"].max() > 1


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: guide_of(3), TypeError, "a Pyro model; got int"),
        (lambda: guide_of(flow=3), TypeError, "a Flow or a builder; got int"),
        (
            lambda: guide_of(flow=lambda f, context_features: 3).setup(data()),
            TypeError,
            "returns a Flow; got one that returns int",
        ),
        (lambda: guide_of(encoder=3), TypeError, "an encoder; got int"),
        (lambda: guide_of(flow=realnvp(2)).setup(data()), ValueError, r"context_features=8, .*; got \(2,\) and 0"),
        (
            lambda: guide_of(flow=realnvp(3, context_features=8)).setup(data()),
            ValueError,
            r"a flow over 2 features with context_features=8",
        ),
        (
            lambda: guide_of(encoder=lambda x: (x, x)).setup(data()),
            ValueError,
            "returns .*context_features.; got tuple",
        ),
        (lambda: guide_of(encoder=lambda x: x[0]).setup(data()), ValueError, r"returns \(2, context_features\); got"),
        (lambda: guide_of(inputs=lambda x: x[:5]).setup(data()), ValueError, "the 200 rows of plate 'rows'; got"),
        (lambda: guide_of(inputs=lambda x: None).setup(data()), ValueError, "a tensor of rows .* got none"),
        (lambda: guide_of().setup(data()).log_prob({}, data()), ValueError, r"'z' of shape \(\*batch, 2\); got none"),
    ],
)
def test_arguments_that_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# A posterior from simulations

NOISE = 0.7
DESIGN = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [0.5, 2.0]])
QUICK = {"num_simulations": 2000, "epochs": 5, "seed": 0, "progress": False}


def regression(y=None):
    """A linear regression whose posterior is Gaussian."""
    theta = pyro.sample("theta", dist.Normal(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])).to_event(1))
    pyro.sample("y", dist.Normal(theta @ DESIGN.T, NOISE).to_event(1), obs=y)


def exact_posterior(y):
    precision = torch.tensor([1.0, 0.25]).diag() + DESIGN.T @ DESIGN / NOISE**2
    covariance = precision.inverse()
    return dist.MultivariateNormal((torch.tensor([1.0, 0.0]) + y @ DESIGN / NOISE**2) @ covariance, covariance)


def simulate(number, seed=1):
    torch.manual_seed(seed)
    theta = torch.tensor([1.0, 0.0]) + torch.randn(number, 2) * torch.tensor([1.0, 2.0])
    return theta, theta @ DESIGN.T + NOISE * torch.randn(number, 4)


@pytest.fixture(scope="module")
def conjugate():
    return fit_amortized(regression, ["y"], num_simulations=8000, epochs=20, seed=0, progress=False)


def test_it_meets_a_conjugate_posterior(conjugate):
    theta, y = simulate(2000)
    exact = exact_posterior(y)
    draws = conjugate.draws(3000, y[:60], seed=0)["theta"]
    assert draws.shape == (3000, 60, 2)
    scale = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()[:60]
    error = (draws.mean(0) - exact.mean[:60]) / scale
    assert error.square().mean().sqrt() < 0.06
    assert (draws.std(0) / scale - 1).abs().mean() < 0.05
    gap = exact.log_prob(theta) - conjugate.log_prob({"theta": theta}, y).detach()
    assert -0.02 < gap.mean() < 0.03
    assert conjugate.simulator.is_batched


def test_it_is_calibrated(conjugate):
    result = conjugate.calibrate(300, seed=0, progress=False)
    assert result.names == ("theta[0]", "theta[1]")
    assert (result.p_values > 0.01).all(), str(result)
    assert result.ranks.shape == (300, 2)


@pytest.mark.slow
def test_a_conjugate_posterior_to_five_percent_with_calibration_at_a_thousand():
    posterior = fit_amortized(regression, ["y"], num_simulations=40_000, seed=0, progress=False)
    _, y = simulate(100)
    exact = exact_posterior(y)
    draws = posterior.draws(10_000, y, seed=0)["theta"]
    scale = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((draws.mean(0) - exact.mean) / scale).square().mean().sqrt() < 0.05
    assert (draws.std(0) / scale - 1).abs().mean() < 0.05
    assert (posterior.calibrate(1000, seed=1, progress=False).p_values > 0.01).all()


def counts(rate=1.0):
    rate = pyro.sample("rate", dist.Gamma(2.0, rate))
    with pyro.plate("days", 5):
        pyro.sample("y", dist.Poisson(rate))


def test_a_positive_latent():
    posterior = fit_amortized(counts, "y", num_simulations=6000, epochs=15, seed=0, progress=False)
    y = torch.tensor([[3.0, 1.0, 2.0, 4.0, 2.0], [0.0, 1.0, 0.0, 1.0, 1.0]])
    exact = dist.Gamma(2 + y.sum(-1), 6.0)
    draws = posterior.draws(4000, {"y": y}, seed=0)["rate"]
    assert draws.shape == (4000, 2)
    assert (draws > 0).all()
    torch.testing.assert_close(draws.mean(0), exact.mean, rtol=0.15, atol=0)
    torch.testing.assert_close(draws.std(0), exact.stddev, rtol=0.25, atol=0)
    # The density is that of the rate itself: it integrates to 1, and is close to the exact one.
    grid = torch.linspace(1e-3, 30, 30_000)
    log_prob = posterior.log_prob({"rate": grid}, {"y": y[0]}).detach()
    assert log_prob.exp().sum() * 1e-3 == pytest.approx(1, abs=0.02)
    assert posterior.latents == {"rate": torch.Size([])}
    assert posterior.observed == {"y": torch.Size([5])}


def test_shapes_of_batches():
    posterior = fit_amortized(regression, ["y"], **{**QUICK, "epochs": 1})
    for batch in ((), (3,), (2, 3)):
        y = torch.zeros(*batch, 4)
        draws = posterior.draws(7, y)["theta"]
        assert draws.shape == (7, *batch, 2)
        assert posterior.log_prob({"theta": draws}, y).shape == (7, *batch)
        assert posterior.covers(y).shape == batch
    assert posterior.covers(torch.tensor([[0.0] * 4, [0.0, 0.0, 500.0, 0.0]])).tolist() == [True, False]
    assert torch.equal(*(posterior.draws(3, y, seed=2)["theta"] for _ in range(2)))


def test_several_sites_and_latents_that_are_averaged_over():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        nuisance = pyro.sample("nuisance", dist.Bernoulli(0.5))
        pyro.sample("a", dist.Normal(mean + nuisance, 1.0))
        scale = pyro.deterministic("twice", 2 * mean)
        pyro.sample("b", dist.Normal(scale * torch.ones(2, 3), 1.0).to_event(2))
        pyro.deterministic("summary", scale + nuisance)

    options = {**QUICK, "latents": "mean"}
    posterior = fit_amortized(model, ["b", "a", "summary"], **options)
    given = {"a": torch.zeros(5), "b": torch.zeros(5, 2, 3), "summary": torch.zeros(5)}
    assert posterior.draws(4, given)["mean"].shape == (4, 5)
    assert posterior.flow.context_features == 8
    with pytest.raises(ValueError, match="continuous latents; got the discrete site 'nuisance'"):
        fit_amortized(model, ["a", "b"], **QUICK)
    with pytest.raises(ValueError, match="data by name of the sites 'b', 'a', 'summary'; got Tensor"):
        posterior.draws(1, torch.zeros(3))
    with pytest.raises(ValueError, match="data of the sites 'b', 'a', 'summary'; got 'a'"):
        posterior.draws(1, {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="one batch shape; got"):
        posterior.draws(1, {**given, "a": torch.zeros(3)})


def test_an_embedding_of_a_set():
    class Set(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, y):
            return self.net(y[..., None]).mean(-2)

    embedding = Set()
    before = [p.clone() for p in embedding.parameters()]
    posterior = fit_amortized(regression, ["y"], embedding=embedding, flow=maf, **{**QUICK, "epochs": 2})
    assert all(not torch.equal(a, b) for a, b in zip(before, embedding.parameters(), strict=True))
    assert posterior.flow.context_features == 4
    assert posterior.draws(6, torch.zeros(2, 3, 4))["theta"].shape == (6, 2, 3, 2)
    ready = Flow(StandardNormal(2), MaskedAutoregressive(2, context_features=4), embedding=Set())
    assert fit_amortized(regression, ["y"], flow=ready, **{**QUICK, "epochs": 1}).flow.context_features == 4


def in_a_shape(*shape):
    """The linear regression, with its four data in a matrix or a higher array."""

    def model():
        theta = pyro.sample("theta", dist.Normal(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])).to_event(1))
        loc = (theta @ DESIGN.T).reshape(*theta.shape[:-1], *shape)
        pyro.sample("y", dist.Normal(loc, NOISE).to_event(len(shape)))

    return model


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 2, 2)])
def test_data_of_a_matrix_are_its_numbers(shape):
    posterior = fit_amortized(in_a_shape(*shape), "y", **QUICK)
    flat = fit_amortized(in_a_shape(4), "y", **QUICK)
    y = torch.tensor([[1.0, 2.0, -0.5, 3.0], [0.0, 1.0, 1.0, 0.5]])
    draws, expected = posterior.draws(9, y.reshape(2, *shape), seed=0), flat.draws(9, y, seed=0)
    assert torch.equal(draws["theta"], expected["theta"])
    assert torch.equal(posterior.log_prob(draws, y.reshape(2, *shape)), flat.log_prob(draws, y))
    assert posterior.covers(y.reshape(2, *shape)).tolist() == [True, True]
    assert posterior.observed["y"] == shape
    assert posterior.calibrate(20, num_draws=19, seed=0, progress=False).num_draws == 19
    with pytest.raises(ValueError, match="data of 'y' of shape"):
        posterior.draws(1, y[0, :3])


def test_an_embedding_of_a_matrix_sees_the_matrix():
    embedding = nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv2d(1, 3, 2), nn.Flatten())
    posterior = fit_amortized(in_a_shape(2, 2), "y", embedding=embedding, **{**QUICK, "epochs": 1})
    assert posterior.draws(5, torch.zeros(3, 2, 2))["theta"].shape == (5, 3, 2)
    assert posterior.flow.context_features == 3


def test_data_of_integers_booleans_and_mixed_shapes():
    def model():
        rate = pyro.sample("rate", dist.Gamma(4.0, 2.0))
        table = pyro.sample("table", dist.Poisson(rate[..., None, None] * torch.ones(4, 2)).to_event(2))
        pyro.deterministic("total", table.sum((-2, -1)).long())
        pyro.deterministic("is_zero", table == 0)
        pyro.sample("one", dist.Poisson(rate))

    names = ["table", "total", "is_zero", "one"]
    options = {**QUICK, "latents": "rate", "epochs": 8, "num_simulations": 3000}
    posterior = fit_amortized(model, names, **options)
    assert posterior.flow.context_features == 8 + 1 + 8 + 1
    table = torch.tensor([[2, 1], [0, 3], [1, 1], [4, 2]])
    values = {"table": table, "total": table.sum(), "is_zero": table == 0, "one": torch.tensor(3)}
    draws = posterior.draws(2000, values, seed=0)["rate"]
    exact = dist.Gamma(4.0 + 14 + 3, 2.0 + 8 + 1)
    assert draws.mean() == pytest.approx(exact.mean.item(), rel=0.1)
    assert draws.std() == pytest.approx(exact.stddev.item(), rel=0.25)
    many = {name: value.expand(5, 3, *value.shape) for name, value in values.items()}
    assert posterior.draws(7, many)["rate"].shape == (7, 5, 3)
    flags = fit_amortized(model, "is_zero", **{**options, "epochs": 1})
    assert flags.draws(7, torch.ones(4, 2, dtype=torch.bool))["rate"].shape == (7,)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, y):
        return self.table(y).mean(-2)


def test_integers_reach_an_embedding_that_takes_them(tmp_path):
    def model():
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        words = dist.Categorical(probs[..., None, :].expand(*probs.shape[:-1], 20, 3))
        pyro.sample("y", words.to_event(1))

    options = {**QUICK, "num_simulations": 4000, "epochs": 12}
    posterior = fit_amortized(model, "y", embedding=Words(), **options)
    y = torch.tensor([0] * 12 + [1] * 6 + [2] * 2)
    draws = posterior.draws(2000, y, seed=0)["probs"]
    exact = dist.Dirichlet(torch.tensor([13.0, 7.0, 3.0]))
    torch.testing.assert_close(draws.mean(0), exact.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(draws.var(0).sqrt(), exact.variance.sqrt(), rtol=0.2, atol=0)
    assert posterior.covers(y.double().expand(2, -1)).tolist() == [True, True]
    posterior.save(tmp_path / "posterior")
    other = AmortizedPosterior.load(tmp_path / "posterior", classes=[Words])
    assert torch.equal(other.draws(2000, y, seed=0)["probs"], draws)
    for each in (posterior, other):
        with pytest.raises(ValueError, match="expected data of 'y' of dtype int64; got numbers that are not"):
            each.draws(1, y + 0.5)
    # A network that takes no integers gets them in units of their spread.
    scaled = fit_amortized(model, "y", embedding=nn.Linear(20, 3), **{**options, "epochs": 1})
    assert scaled.draws(3, y)["probs"].shape == (3, 3)


def test_data_of_many_numbers():
    """Torch takes no quantile of more than 2**24 numbers."""

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", mean[..., None, None].expand(*mean.shape, 30, 300))

    embedding = nn.Sequential(nn.AvgPool2d((30, 300)), nn.Flatten())
    posterior = fit_amortized(model, "y", embedding=embedding, **{**QUICK, "epochs": 1})
    assert posterior.draws(3, torch.zeros(30, 300))["mean"].shape == (3,)


def one_by_one():
    """A simulator that only runs for one point: it branches."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    if scale > 1:
        scale = scale**2
    pyro.sample("y", dist.Normal(torch.zeros(3), scale).to_event(1))


def hidden_noise():
    """A simulator with random numbers that Pyro does not see: in a plate all simulations would share them."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.deterministic("y", scale[..., None] * torch.randn(3))


def from_the_left():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(theta[0] - theta[1], 1.0).expand([2]).to_event(1))


@pytest.mark.parametrize("model", [one_by_one, hidden_noise, from_the_left])
def test_simulators_that_run_one_by_one(model):
    posterior = fit_amortized(model, ["y"], **{**QUICK, "num_simulations": 200, "epochs": 1})
    assert not posterior.simulator.is_batched
    y = posterior.simulator(50)["y"]
    assert len(y.unique(dim=0)) == 50


def test_simulations_in_a_plate_are_those_of_single_runs():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            local = pyro.sample("local", dist.Normal(mean, 0.5))
            pyro.sample("y", dist.Normal(local, 0.1))

    posterior = fit_amortized(model, ["y"], **{**QUICK, "epochs": 1})
    assert posterior.simulator.is_batched
    torch.manual_seed(0)
    values = posterior.simulator(20_000)
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        "y": (20_000, 3),
        "mean": (20_000,),
        "local": (20_000, 3),
    }
    assert values["mean"].std() == pytest.approx(1, abs=0.03)
    assert (values["local"] - values["mean"][:, None]).T.corrcoef()[0, 1] == pytest.approx(0, abs=0.03)
    assert (values["y"] - values["local"]).std() == pytest.approx(0.1, rel=0.03)


def test_simulations_that_are_not_finite():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(theta, 1.0))
        pyro.deterministic("root", y.sqrt())

    options = {**QUICK, "latents": ["theta"]}
    with pytest.raises(ValueError, match=r"got \d+ of 2000 that are not \(\d+ at site 'root'\): bound the prior, or"):
        fit_amortized(model, ["root"], **options)
    posterior = fit_amortized(model, ["root"], drop_nonfinite=True, **options)
    assert 900 < posterior.num_dropped < 1100
    assert posterior.num_simulations == 2000 - posterior.num_dropped
    assert "dropped" in repr(posterior)
    assert len(posterior.calibrate(100, seed=0).ranks) < 100


def test_it_pickles_without_its_model():
    posterior = fit_amortized(lambda: regression(), ["y"], **{**QUICK, "epochs": 1})
    posterior.draws(2, torch.zeros(4))
    other = pickle.loads(pickle.dumps(posterior))
    assert isinstance(other, AmortizedPosterior)
    assert torch.equal(*(p.log_prob({"theta": torch.zeros(2)}, torch.zeros(4)).detach() for p in (other, posterior)))
    assert posterior.calibrate(20, num_draws=19, seed=0).num_draws == 19
    with pytest.raises(ValueError, match="a posterior with its model; got one without, as neither a pickle nor a file"):
        other.calibrate(20)


def many_supports(low=0.5):
    pyro.sample("real", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    scale = pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("interval", dist.Uniform(low, torch.tensor([2.0, 3.0])).to_event(1))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("correlations", dist.LKJCholesky(3, torch.tensor(1.0)))
    pyro.sample("above", dist.Pareto(1.0, 2.0))
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    pyro.sample("ordered", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
    pyro.sample("y", dist.Normal(torch.zeros(4, 2), scale[..., None, None]).to_event(2))
    pyro.deterministic("is_wide", scale > 1)


class Flat(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 5)

    def forward(self, y):
        return self.last(torch.relu(self.first(y.flatten(1))))


class FlatWithFunction(Flat):
    def __init__(self, width):
        super().__init__(width)
        self.function = lambda y: y


@pytest.mark.parametrize(
    "embedding, observed, options",
    [
        (None, ["y", "is_wide"], {}),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.Tanh()), ["y"], {}),
        (Flat(6), ["y"], {"classes": [Flat]}),
        (Flat(6), ["y"], {"embedding": Flat(6)}),
        (FlatWithFunction(6), ["y"], {"embedding": FlatWithFunction(6)}),
    ],
    ids=["data", "layers of torch", "class", "built", "built, with a function"],
)
def test_it_comes_back_from_a_file_with_its_draws_and_densities(embedding, observed, options, tmp_path):
    path = tmp_path / "posterior"
    posterior = fit_amortized(many_supports, observed, embedding=embedding, **{**QUICK, "epochs": 1})
    posterior.save(path)
    data = {"y": torch.randn(3, 4, 2), "is_wide": torch.tensor([True, False, True])}
    data = {name: data[name] for name in observed}
    values = posterior.draws(6, data, seed=1)
    for _ in range(2):
        other = AmortizedPosterior.load(path, **copy.deepcopy(options))
        draws = other.draws(6, data, seed=1)
        assert draws.keys() == values.keys()
        assert all(torch.equal(draws[name], value) for name, value in values.items())
        assert torch.equal(other.log_prob(values, data), posterior.log_prob(values, data))
        assert torch.equal(other.covers(data), posterior.covers(data))
        assert torch.equal(copy.deepcopy(other).log_prob(values, data), posterior.log_prob(values, data))
        assert (repr(other), other.fit) == (repr(posterior), posterior.fit)
        assert (other.observed, other.latents) == (posterior.observed, posterior.latents)
        other.save(path)


def test_a_file_of_a_posterior_of_doubles_comes_back(tmp_path):
    def model():
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(1))

    posterior = fit_amortized(model, "y", **{**QUICK, "epochs": 1})
    posterior.save(tmp_path / "posterior")
    other = AmortizedPosterior.load(tmp_path / "posterior")
    y = torch.randn(3, 2, dtype=torch.float64)
    assert other.draws(3, y, seed=0)["theta"].dtype == torch.float64
    assert torch.equal(*(p.draws(3, y, seed=0)["theta"] for p in (other, posterior)))


def test_a_loaded_posterior_is_calibrated_with_its_model(tmp_path):
    path = tmp_path / "posterior"
    fit_amortized(counts, "y", args=(2.0,), **{**QUICK, "epochs": 1}).save(path)
    with pytest.raises(ValueError, match=r"a posterior with its model; got one without, .*AmortizedPosterior.load"):
        AmortizedPosterior.load(path).calibrate(20)
    posterior = AmortizedPosterior.load(path, model=counts, args=(2.0,))
    assert posterior.calibrate(20, num_draws=19, seed=0, progress=False).num_draws == 19
    with pytest.raises(ValueError, match="expected names among the sites 'theta', 'y'; got 'rate'"):
        AmortizedPosterior.load(path, model=regression)
    fit_amortized(many_supports, "y", **{**QUICK, "epochs": 1}).save(path)
    with pytest.raises(ValueError, match=r"'interval' with support .*0.5, .*; got .*0.7"):
        AmortizedPosterior.load(path, model=many_supports, args=(0.7,))


def test_whole_files_of_posteriors_that_make_no_sense_are_refused(tmp_path):
    path = tmp_path / "posterior"
    fit_amortized(regression, "y", **{**QUICK, "epochs": 1}).save(path)
    header, tensors = read(path, "amortized posterior")
    keys = ("dtype", "recipe", "sites", "supports", "observed", "fit", "integers", "num_simulations", "low")
    for change in (
        *({key: ...} for key in keys),
        {"sites": [1]},
        {"supports": [{"name": "os.system"}]},
        {"fit": {"a": 1}},
    ):
        changed = {key: value for key, value in {**header, **change}.items() if value is not ...}
        kept = {name: tensor for name, tensor in tensors.items() if name not in change}
        write(path, "amortized posterior", changed, kept)
        with pytest.raises(ValueError, match="expected .*; got") as error:
            AmortizedPosterior.load(path)
        assert type(error.value) is ValueError


def test_files_of_other_posteriors_are_refused(tmp_path):
    path = tmp_path / "posterior"
    fit_amortized(regression, "y", **{**QUICK, "epochs": 1}).save(path)
    message = "expected a flow written by save; got .*, which holds an amortized posterior .*AmortizedPosterior.load"
    with pytest.raises(ValueError, match=message):
        load(path)
    maf(2, num_layers=1).save(path)
    message = r"expected an amortized posterior written by save; got .*, which holds a flow \(maf\): read it by pyrof"
    with pytest.raises(ValueError, match=message):
        AmortizedPosterior.load(path)
    with pytest.raises(FileNotFoundError, match="expected an amortized posterior written by save; got .*none, which"):
        AmortizedPosterior.load(tmp_path / "none")


def test_a_seed_repeats_and_leaves_torchs_random_state():
    before = torch.random.get_rng_state()
    first, second = (fit_amortized(regression, ["y"], **{**QUICK, "epochs": 1}) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.fit.best_loss == second.fit.best_loss


def test_data_among_the_arguments_are_drawn_anew():
    posterior = fit_amortized(regression, ["y"], args=(torch.zeros(4),), **{**QUICK, "epochs": 1})
    assert posterior.simulator(10)["y"].unique().numel() == 40


def varying_shape():
    n = int(pyro.sample("n", dist.Categorical(torch.ones(4)))) + 1
    pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.zeros(n), 1.0).to_event(1))


def with_a_factor():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -theta.abs())
    pyro.sample("y", dist.Normal(theta, 1.0))


def drawing_rows():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 10, subsample_size=3):
        pyro.sample("y", dist.Normal(theta, 1.0))


def deterministic(value):
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", mean[..., None] * value)

    return model


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fit_amortized(3, ["y"]), TypeError, "a Pyro model, a callable; got int"),
        (lambda: fit_amortized(regression, []), ValueError, "at least one observed site; got none"),
        (lambda: fit_amortized(regression, ["x"]), ValueError, "among the sites 'theta', 'y'; got 'x'"),
        (lambda: fit_amortized(regression, ["y"], latents="z"), ValueError, "among the sites 'theta', 'y'; got 'z'"),
        (lambda: fit_amortized(regression, ["y"], latents="y"), ValueError, "either latent or observed; got 'y'"),
        (lambda: fit_amortized(with_a_factor, ["y"]), ValueError, "can be simulated; got site 'penalty'"),
        (lambda: fit_amortized(drawing_rows, ["y"]), ValueError, "all rows; got plate 'rows', which draws 3 of 10"),
        (
            lambda: fit_amortized(varying_shape, ["y"], latents=["t"], num_simulations=50, seed=0),
            ValueError,
            "site 'y' to have one shape in every run",
        ),
        (
            lambda: fit_amortized(lambda: (dependent(None), counts())[1], ["y"]),
            ValueError,
            "does not depend on other sites; got site 'b'",
        ),
        (lambda: fit_amortized(regression, ["y"], embedding=3), TypeError, "a torch module; got int"),
        (
            lambda: fit_amortized(regression, ["y"], flow=partial(maf, embedding=nn.Linear(4, 4)), num_simulations=50),
            ValueError,
            "flows without an embedding; got one whose flow has a Linear: pass it as embedding= of fit_amortized",
        ),
        (lambda: fit_amortized(deterministic(torch.zeros(0)), "y"), ValueError, "at least one number; got none"),
        (lambda: fit_amortized(deterministic(torch.zeros(2) * 1j), "y"), ValueError, "got complex .* site 'y'"),
        (
            lambda: fit_amortized(regression, ["y"], embedding=nn.Unflatten(1, (2, 2)), num_simulations=50),
            ValueError,
            r"returns \(rows, context_features\); got shape \(2, 2, 2\)",
        ),
        (
            lambda: fit_amortized(regression, ["y"], flow=realnvp(3, context_features=4), num_simulations=50),
            ValueError,
            "over 2 features with context_features=4, .* got \\(3,\\) and 4",
        ),
        (lambda: fit_amortized(regression, ["y"], num_simulations=0), ValueError, "positive integer; got 0"),
        (lambda: fit_amortized(regression, ["y"], num_simulations=50, wrong=1), TypeError, "wrong"),
    ],
)
def test_models_and_options_that_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.zeros(3), r"data of 'y' of shape \(\*batch, 4\); got \(3,\)"),
        (torch.full((4,), math.nan), "finite data; got 4 numbers not, at 'y'"),
        ({}, "data of the sites 'y'; got none"),
        ({"y": torch.zeros(4), "x": 1}, "data of the sites 'y'; got 'y', 'x'"),
    ],
)
def test_data_that_are_refused(conjugate, given, message):
    with pytest.raises(ValueError, match=message):
        conjugate.draws(1, given)
