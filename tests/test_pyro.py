"""Inside Pyro and torch: their transformed distributions, guides, plates, handlers, and posteriors that are known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from contract import count_conditioners, make, make_flow, perturb
from pyro import poutine
from pyro.contrib.gp.kernels import RBF
from pyro.distributions import ConditionalTransformedDistribution
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.infer import MCMC, NUTS, SVI, JitTrace_ELBO, Predictive, Trace_ELBO, Trace_MMD, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.nn import PyroModule

import pyroflows
from pyroflows import (
    ActNorm,
    AutoFlow,
    Compose,
    Coupling,
    DiagonalNormal,
    ElementwiseAffine,
    Flow,
    LULinear,
    MaskedAutoregressive,
    Permutation,
    StandardNormal,
    iaf,
    maf,
    realnvp,
)


def normal(features):
    zeros = torch.zeros(features).double()
    return dist.Normal(zeros, zeros + 1).to_event(1)


# Distributions of Pyro and of torch


@pytest.mark.parametrize("kind", [dist.TransformedDistribution, torch.distributions.TransformedDistribution])
def test_layers_in_a_transformed_distribution(kind):
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3).double(), 1.0), 1)
    layers = [make("coupling, affine", 3), make("lu", 3), make("autoregressive, spline", 3)]
    distribution = kind(normal(3) if kind is dist.TransformedDistribution else base, layers)
    flow = Flow(StandardNormal(3).double(), layers)
    x = torch.randn(4, 3).double()
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))
    sample = distribution.rsample((5,))
    torch.testing.assert_close(distribution.log_prob(sample), flow.log_prob(sample))
    assert distribution.batch_shape == ()
    assert distribution.event_shape == (3,)
    assert distribution.expand((2,)).log_prob(x[:, None]).shape == (4, 2)


def test_layers_beside_torch_transforms():
    layer = make("coupling, affine", 2)
    exp = torch.distributions.transforms.IndependentTransform(torch.distributions.transforms.ExpTransform(), 1)
    distribution = dist.TransformedDistribution(normal(2), [layer, exp])
    sample = distribution.sample((3,))
    assert (sample > 0).all()
    wanted = Flow(StandardNormal(2).double(), layer).log_prob(sample.log()) - sample.log().sum(-1)
    torch.testing.assert_close(distribution.log_prob(sample), wanted)


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("compose", [ComposeTransformModule, torch.distributions.ComposeTransform])
def test_layers_in_a_compose_transform(compose, cache_size):
    layers = [make("coupling, affine", 3), make("autoregressive, affine", 3)]
    calls = [count_conditioners(layer) for layer in layers]
    stack = compose(layers, cache_size=cache_size)
    distribution = dist.TransformedDistribution(normal(3), [stack])
    x = torch.randn(4, 3).double()
    found = distribution.log_prob(x)
    assert calls == [{"conditioner": 1}] * 2
    flow = Flow(StandardNormal(3).double(), layers)
    torch.testing.assert_close(found, flow.log_prob(x))
    sample = distribution.rsample((2,))
    torch.testing.assert_close(distribution.log_prob(sample), flow.log_prob(sample))
    x.add_(1)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))
    if compose is ComposeTransformModule:
        assert len(list(stack.parameters())) == len(list(flow.parameters()))


def test_inverse_layers_in_a_compose_transform_show_their_parameters():
    stack = ComposeTransformModule([MaskedAutoregressive(3).inv, ActNorm(3)])
    assert len(list(stack.parameters())) == len(list(MaskedAutoregressive(3).parameters())) + 2


def test_conditional_transformed_distribution():
    flow = make_flow("realnvp", 2, 3)
    conditional = ConditionalTransformedDistribution(normal(2), list(flow.bijection))
    context, x = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    distribution = conditional.condition(context)
    assert distribution.batch_shape == (8,)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x, context))
    sample = distribution.rsample()
    assert sample.shape == (8, 2)
    torch.testing.assert_close(distribution.log_prob(sample), flow.log_prob(sample, context))
    whole = ConditionalTransformedDistribution(normal(2), [flow.bijection]).condition(context)
    torch.testing.assert_close(whole.log_prob(x), flow.log_prob(x, context))


def test_a_flow_as_the_base_of_a_mixture():
    flow = make_flow("realnvp", 2, 3)
    components = flow(torch.randn(4, 3).double())
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(4).double()), components)
    assert mixture.log_prob(torch.zeros(7, 2).double()).shape == (7,)


# Handlers, plates, Predictive


def model_of(flow, context=None, x=None, rows=6):
    pyro.module("flow", flow)
    with pyro.plate("rows", rows):
        return pyro.sample("x", flow(context), obs=x)


def test_pyro_module_plate_and_observation():
    flow = make_flow("realnvp", 2, 3)
    context, x = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    trace = poutine.trace(model_of).get_trace(flow, context, x)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], flow.log_prob(x, context))
    names = {name for name, node in trace.nodes.items() if node["type"] == "param"}
    assert names == {f"flow$$${name}" for name, _ in flow.named_parameters()}


def test_expand_under_a_plate_draws_apart():
    flow = make_flow("realnvp", 2)
    x = model_of(flow)
    assert x.shape == (6, 2)
    assert len(x.unique(dim=0)) == 6
    trace = poutine.trace(model_of).get_trace(flow)
    torch.testing.assert_close(trace.log_prob_sum(), flow.log_prob(trace.nodes["x"]["value"]).sum())


def test_replay_and_block():
    flow = make_flow("iaf", 2)
    trace = poutine.trace(model_of).get_trace(flow)
    assert torch.equal(poutine.replay(model_of, trace=trace)(flow), trace.nodes["x"]["value"])
    assert "x" not in poutine.trace(poutine.block(model_of, hide=["x"])).get_trace(flow).nodes
    conditioned = poutine.condition(model_of, data={"x": torch.zeros(6, 2).double()})
    assert torch.equal(conditioned(flow), torch.zeros(6, 2).double())
    scaled = poutine.trace(poutine.scale(model_of, scale=2.0)).get_trace(flow)
    value = scaled.nodes["x"]["value"]
    torch.testing.assert_close(scaled.log_prob_sum(), 2 * flow.log_prob(value).sum())


def test_predictive():
    flow = make_flow("maf", 2, 3)
    samples = Predictive(model_of, num_samples=5)(flow, torch.randn(6, 3).double())
    assert samples["x"].shape == (5, 6, 2)
    samples = Predictive(model_of, num_samples=5, parallel=True)(make_flow("realnvp", 2))
    assert samples["x"].shape == (5, 6, 2)


def test_flow_inside_a_pyro_module():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = make_flow("realnvp", 2)

        def forward(self, x=None):
            with pyro.plate("rows", 5):
                return pyro.sample("x", self.flow(), obs=x)

    model = Model()
    trace = poutine.trace(model).get_trace(torch.zeros(5, 2).double())
    params = [node["value"] for node in trace.nodes.values() if node["type"] == "param"]
    assert len(params) == len(list(model.flow.parameters()))


def test_maximum_likelihood_through_svi():
    torch.manual_seed(0)
    flow = realnvp(1, num_layers=2, context_features=1, hidden_features=(16,))
    context = torch.rand(400, 1) * 4 - 2
    x = 3 * context + 0.5 * torch.randn(400, 1)

    def model():
        model_of(flow, context, x, rows=400)

    svi = SVI(model, lambda: None, pyro.optim.ClippedAdam({"lr": 2e-2}), Trace_ELBO())
    losses = [svi.step() / 400 for _ in range(150)]
    assert losses[-1] < 1.0  # the entropy is 0.73
    sample = flow.eval().sample((4000,), torch.tensor([1.0]))
    assert sample.mean().item() == pytest.approx(3, abs=0.25)
    assert sample.std().item() == pytest.approx(0.5, abs=0.2)


# Guides


def conjugate(y):
    """A normal mean under a normal prior: the posterior is known."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


def falling(rate, decay):
    return pyro.optim.ClippedAdam({"lr": rate, "lrd": decay})


OBSERVED = torch.tensor([[1.0, -1.0], [2.0, -2.0], [1.5, 0.0]])
PRECISION = 1 / torch.tensor([1.0, 4.0]) + 3 / 0.25
MEAN = OBSERVED.sum(0) / 0.25 / PRECISION


@pytest.mark.parametrize(
    "build",
    [
        lambda: Flow(DiagonalNormal(2), [LULinear(2, init="identity"), ElementwiseAffine(2)]),
        lambda: iaf(2, num_layers=2, hidden_features=(16,)),
        lambda: realnvp(2, num_layers=3, hidden_features=(16,)),
    ],
)
def test_svi_meets_a_conjugate_posterior(build):
    torch.manual_seed(0)
    flow = build()

    def guide(y):
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    svi = SVI(conjugate, guide, falling(3e-2, 0.985), Trace_ELBO(num_particles=16, vectorize_particles=True))
    calls = count_conditioners(flow)
    steps = 300
    for step in range(steps):
        svi.step(OBSERVED)
        if step == 0:
            svi.step(OBSERVED)  # the first trace also sets up the parameters
    assert all(steps <= count <= steps + 4 for count in calls.values())
    sample = flow.eval().sample((10_000,))
    torch.testing.assert_close(sample.mean(0), MEAN, rtol=0, atol=0.06)
    torch.testing.assert_close(sample.std(0), PRECISION.rsqrt(), rtol=0.15, atol=0)


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()])
@pytest.mark.parametrize("name", ["iaf", "realnvp", "nsf", "planar"])
def test_a_step_evaluates_each_conditioner_once(name, loss):
    flow = make_flow(name, 2, 3).train()
    context = torch.zeros(3).double()

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow(context))

    def model():
        pyro.sample("z", normal(2))

    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), loss)
    svi.step()
    calls = count_conditioners(flow)
    for step in range(1, 4):
        svi.step()
        assert set(calls.values()) == {step}


@pytest.mark.parametrize(
    "transform, slack",
    [
        # Alone it scales after it shifts, and its shift has far to go.
        (lambda d: MaskedAutoregressive(d, hidden_features=(16,)).inv, 2.0),
        (lambda d: Compose([Coupling(d, hidden_features=(16,)), Coupling(d, flip=True), ActNorm(d)]), 0.5),
        (
            lambda d: ComposeTransformModule(
                [MaskedAutoregressive(d, hidden_features=(16,)).inv, ElementwiseAffine(d)]
            ),
            0.5,
        ),
    ],
)
def test_auto_normalizing_flow_learns(transform, slack):
    torch.manual_seed(0)
    guide = AutoNormalizingFlow(conjugate, transform)
    svi = SVI(conjugate, guide, falling(5e-2, 0.98), Trace_ELBO(num_particles=2))
    svi.step(OBSERVED)
    parameters = list(guide.parameters())
    assert len(parameters) == len(list(transform(2).parameters()))
    before = [p.detach().clone() for p in parameters]
    first = sum(svi.evaluate_loss(OBSERVED) for _ in range(20)) / 20
    for _ in range(150):
        svi.step(OBSERVED)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    guide.eval()
    last = sum(svi.evaluate_loss(OBSERVED) for _ in range(10)) / 10
    assert last < first - 5
    assert last == pytest.approx(evidence(), abs=slack)
    draws = torch.stack([guide(OBSERVED)["z"] for _ in range(200)])
    torch.testing.assert_close(draws.mean(0), MEAN, rtol=0, atol=0.4 * slack)


def evidence():
    """The negative log evidence of the conjugate model."""
    total = 0.0
    for column, scale in ((0, 1.0), (1, 2.0)):
        covariance = 0.25 * torch.eye(3) + scale**2
        total -= dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(OBSERVED[:, column]).item()
    return total


def test_amortised_guide():
    torch.manual_seed(0)
    flow = iaf(1, num_layers=1, context_features=1, hidden_features=(16,))
    y = torch.linspace(-2, 2, 50)[:, None]

    def model():
        with pyro.plate("rows", 50):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("rows", 50):
            pyro.sample("z", flow(y))

    svi = SVI(model, guide, falling(3e-2, 0.99), Trace_ELBO())
    for _ in range(300):
        svi.step()
    sample = flow.eval().sample((4000,), y)
    torch.testing.assert_close(sample.mean(0), 0.8 * y, rtol=0, atol=0.15)
    torch.testing.assert_close(sample.std(0).mean(), torch.tensor(0.2).sqrt(), rtol=0.15, atol=0)


def test_maf_is_not_run_backwards_by_scoring_what_it_sampled():
    flow = perturb(maf(5, num_layers=2, hidden_features=(8,)), 0.05)
    calls = count_conditioners(flow)
    distribution = flow()
    x = distribution.rsample((3,))
    drawn = dict(calls)
    distribution.log_prob(x)
    assert calls == drawn
    distribution.log_prob(x.detach().clone())
    assert calls == {name: count + 1 for name, count in drawn.items()}


@pytest.mark.parametrize("name", ["realnvp", "maf", "nsf", "iaf", "planar", "glow", "nice"])
def test_draws_can_be_viewed_in_another_shape_as_trace_mmd_does(name):
    flow = getattr(pyroflows, name)(3)
    for draw in (
        flow().rsample((4,)),
        flow.sample((4,)),
        flow.decode(torch.randn(4, 3)),
        flow.encode(torch.randn(4, 3)),
    ):
        assert draw.view(-1).shape == (12,)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    elbo = Trace_MMD(kernel=RBF(3), num_particles=20, vectorize_particles=True, max_plate_nesting=0)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["maf", "realnvp"])
def test_chains_of_a_model_that_decodes_are_the_same_by_the_tracing_compiler(name):
    torch.manual_seed(0)
    flow = getattr(pyroflows, name)(2).double().requires_grad_(False).eval()

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(flow.decode(z), 0.5).to_event(1), obs=x)

    means = []
    for compiled in (False, True):
        pyro.set_rng_seed(0)
        kernel = NUTS(model, jit_compile=compiled, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, num_samples=15, warmup_steps=10, disable_progbar=True)
        mcmc.run(torch.ones(2).double())
        means.append(mcmc.get_samples()["z"].mean(0))
    torch.testing.assert_close(means[0], means[1])


@pytest.mark.filterwarnings("ignore")
def test_an_elbo_by_the_tracing_compiler_meets_a_conjugate_posterior():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    pyro.clear_param_store()
    torch.manual_seed(0)
    y = torch.tensor([1.0, 2.0, 1.5])
    guide = AutoFlow(model, init="none").setup(y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO())
    for _ in range(250):
        svi.step(y)
    draws = guide.draws(4000)["mean"]
    assert float(draws.mean()) == pytest.approx(18 / 13, abs=0.2)
    assert float(draws.std()) == pytest.approx(13**-0.5, rel=0.35)


def of_random_orders(features):
    shuffled = [Permutation(features), MaskedAutoregressive(features, order="random"), Permutation(features, seed=1)]
    return Flow(StandardNormal(features), shuffled)


SHUFFLED = {"permutation": "shuffle"}


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        *((name, 4, {}) for name in ["realnvp", "maf", "nsf", "iaf", "planar", "radial", "glow", "nice"]),
        *((name, 7, SHUFFLED) for name in ["realnvp", "nsf", "glow"]),
        *((name, 7, {**SHUFFLED, "order": "random"}) for name in ["maf", "iaf"]),
        (of_random_orders, 7, {}),
        ("glow", (3, 8, 8), {**SHUFFLED, "num_levels": 2, "num_steps": 2, "hidden_channels": 8}),
    ],
)
def test_parameters_from_pyros_store_give_a_newly_built_flow_the_same_density(name, shape, options, tmp_path):
    densities = []
    x = torch.rand(5, *(shape if isinstance(shape, tuple) else (shape,)))
    for seed in (0, 1):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        builder = getattr(pyroflows, name) if isinstance(name, str) else name
        flow = builder(shape, **options).eval()
        if seed == 0:
            perturb(flow, 0.1)
            pyro.module("flow", flow)
            pyro.get_param_store().save(tmp_path / "store")
        else:
            pyro.get_param_store().load(tmp_path / "store")
            pyro.module("flow", flow, update_module_params=True)
        densities.append(flow.log_prob(x).detach())
    torch.testing.assert_close(*densities)
