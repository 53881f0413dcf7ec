"""AutoFlow: every ELBO, its densities and draws, its life as a module, its start, and the traps of Pyro's guides."""

from __future__ import annotations

import copy
import io
import math
import pickle
from functools import partial, wraps

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from contract import count_conditioners
from posteriors import close, correlation, extras, garch, improper_ordered, mixture, nested, scalar, simplex, tensor
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.infer.enum import config_enumerate
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from scipy import stats

from pyroflows import (
    AutoFlow,
    Flow,
    ImportanceWeightedELBO,
    PathELBO,
    StandardNormal,
    TemperedELBO,
    TriangularAffine,
    glow,
    iaf,
    maf,
    neutra,
    nice,
    nsf,
    planar,
    radial,
    realnvp,
)
from pyroflows.inference.init import INIT_METHODS, climb, find_init
from pyroflows.inference.log_joint import LogJoint

BUILDERS = (realnvp, iaf, nsf, maf, planar, radial, glow, nice)
SMALL = {"num_layers": 2, "hidden_features": (8,)}
Y = tensor([1.0, -0.5, 2.0])
LOG_EVIDENCE = dist.Normal(0.0, 1.25**0.5).log_prob(Y).sum().item()
MEAN, SD = 0.8 * Y, 0.2**0.5  # of log x

adam = partial(pyro.optim.Adam, {"lr": 1e-2})
jitted = pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:Converting a tensor")


def exact(y=Y):
    """A model whose posterior is normal in unconstrained space."""
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", dist.LogNormal(torch.zeros((), dtype=y.dtype), 1.0))
        pyro.sample("y", dist.Normal(x.log(), 0.5), obs=y)


def exact_and_more():
    """The same beside a latent of no plate."""
    with pyro.plate("rows", len(Y)):
        x = pyro.sample("x", dist.LogNormal(tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(x.log(), 0.5), obs=Y)
    pyro.sample("z", dist.Normal(tensor(1.0), 2.0))


def one():
    pyro.sample("x", dist.LogNormal(tensor(0.3), 0.7))


def of_data(y):
    exact(y)


def mixed():
    """Sites of every shape."""
    scale = pyro.sample("scale", dist.HalfNormal(tensor(2.0)))
    with pyro.plate("outer", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("inner", 3, dim=-1):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(4).double()))
            pyro.sample("y", dist.Normal(a + p[..., 0], scale), obs=torch.ones(2, 3).double())


SHAPES = {"scale": (), "a": (2, 1), "p": (2, 3, 4)}


def small(model, flow=realnvp, init="none", **options):
    return AutoFlow(model, flow, init, **(options or (SMALL if flow is not glow else {"num_steps": 2})))


@torch.no_grad()
def stir(guide, size=0.1):
    """Move every parameter, so that nothing is an identity."""
    generator = torch.Generator().manual_seed(3)
    for parameter in guide.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return guide


# ELBOs

ELBOS = {
    "trace": Trace_ELBO,
    "trace, vectorized": lambda: Trace_ELBO(3, vectorize_particles=True),
    "graph": TraceGraph_ELBO,
    "graph, vectorized": lambda: TraceGraph_ELBO(3, vectorize_particles=True),
    "mean field": TraceMeanField_ELBO,
    "mean field, vectorized": lambda: TraceMeanField_ELBO(3, vectorize_particles=True),
    "renyi": lambda: RenyiELBO(num_particles=3),
    "renyi, vectorized": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "jit": lambda: JitTrace_ELBO(ignore_jit_warnings=True),
    "jit, vectorized": lambda: JitTrace_ELBO(3, vectorize_particles=True, ignore_jit_warnings=True),
    "jit, mean field": lambda: JitTraceMeanField_ELBO(ignore_jit_warnings=True),
    "path": PathELBO,
    "path, vectorized": lambda: PathELBO(3, vectorize_particles=True),
    "tempered": TemperedELBO,
    "weighted": lambda: ImportanceWeightedELBO(3, vectorize_particles=True),
}


@jitted
@pytest.mark.parametrize("name", ELBOS)
def test_every_elbo_is_the_evidence_where_the_guide_is_the_posterior(name):
    # Pyro's RenyiELBO takes rows for independent where every site of the model stands in one plate.
    model = exact_and_more if name.startswith("renyi") else exact
    guide = AutoFlow(model, init="laplace", **SMALL)
    elbo = ELBOS[name]()
    for _ in range(2):
        assert elbo.loss(model, guide) == pytest.approx(-LOG_EVIDENCE, abs=1e-5)
    before = [p.clone() for p in guide.parameters()]
    svi = SVI(model, guide, adam(), elbo)
    assert svi.step() == pytest.approx(-LOG_EVIDENCE, abs=1e-5)
    assert math.isfinite(svi.step())
    assert any(not torch.equal(p, q) for p, q in zip(guide.parameters(), before, strict=True))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, PathELBO])
@pytest.mark.parametrize("model", [scalar, mixed, nested, simplex, correlation, improper_ordered, garch])
def test_loss_is_guide_less_log_joint_at_the_draws(model, elbo):
    guide = stir(small(model))
    nesting = guide.log_joint.structure.max_plate_nesting
    torch.manual_seed(1)
    loss = elbo(4, vectorize_particles=True, max_plate_nesting=nesting).loss(model, guide)
    torch.manual_seed(1)
    u, log_q = guide.flow.rsample_and_log_prob(4)
    assert loss == pytest.approx((log_q - guide.log_joint(u)).mean().item(), abs=1e-8)


@pytest.fixture
def _in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_in_float64")  # Pyro's TraceEnum_ELBO mixes the default dtype into its products
@pytest.mark.parametrize("vectorized", [False, True])
def test_enumerated_latents_beside_the_guide(vectorized):
    model = config_enumerate(mixture)
    guide = stir(AutoFlow(model, init="none", args=(Y,), **SMALL))
    elbo = TraceEnum_ELBO(2, vectorize_particles=vectorized, max_plate_nesting=1)
    torch.manual_seed(1)
    loss = elbo.loss(model, guide, Y)
    torch.manual_seed(1)
    if vectorized:
        u, log_q = guide.flow.rsample_and_log_prob(2)
    else:
        u, log_q = map(torch.stack, zip(*(guide.flow.rsample_and_log_prob() for _ in range(2)), strict=True))
    assert loss == pytest.approx((log_q - guide.log_joint(u)).mean().item(), abs=1e-8)
    svi = SVI(model, guide, adam(), elbo)
    assert math.isfinite(svi.step(Y))


def test_discrete_latents_that_are_not_enumerated_are_refused():
    with pytest.raises(ValueError, match="expected discrete latents marked for enumeration, .*; got 'z'"):
        AutoFlow(mixture, init="none", args=(Y,))


@pytest.mark.parametrize("name", ["path, vectorized", "jit, vectorized"])
@jitted
def test_svi_meets_a_conjugate_posterior(name):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), tensor([1.0, 2.0])).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0] + 2 * z[..., 1], 0.5), obs=tensor(3.0))

    guide = AutoFlow(model, init="none", **SMALL)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.98})
    svi = SVI(model, guide, optimizer, ELBOS[name]())
    for _ in range(200):
        svi.step()
    a = tensor([[1.0], [2.0]])
    covariance = torch.linalg.inv(tensor([[1.0, 0.0], [0.0, 0.25]]) + a @ a.T / 0.25)
    z = guide.draws(10_000)["z"]
    close(z.mean(0), covariance @ a[:, 0] * 3 / 0.25, 0.1)
    close(z.T.cov(), covariance, 0.12)


def test_a_step_evaluates_each_conditioner_once():
    for builder in (realnvp, iaf, nsf):
        for elbo in (Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1), TraceMeanField_ELBO(), PathELBO()):
            guide = small(exact, builder)
            svi = SVI(exact, guide, adam(), elbo)
            svi.step()
            calls = count_conditioners(guide)
            for step in range(1, 3):
                svi.step()
                assert set(calls.values()) == {step}


class Statements(Messenger):
    """Counts Pyro's statements of parameters."""

    def __init__(self):
        super().__init__()
        self.names = []

    def _pyro_param(self, msg):
        self.names.append(msg["name"])


@pytest.mark.parametrize("local", [False, True])
def test_a_call_states_each_parameter_once(local):
    with pyro.settings.context(module_local_params=local), Statements() as statements:
        guide = small(exact)
        guide()
    assert statements.names == [f"AutoFlow.flow$$${name}" for name, _ in guide.flow.named_parameters()]
    assert bool(pyro.get_param_store()) is not local


def test_local_parameters_have_gradients_outside_pyros_store():
    with pyro.settings.context(module_local_params=True):
        guide = small(exact)
        Trace_ELBO()(exact, guide)().backward()
    assert sum(p.grad.count_nonzero() > 0 for p in guide.parameters()) > len(list(guide.parameters())) / 2
    assert not pyro.get_param_store()


def test_frozen_parameters_stay_as_they_are():
    guide = small(exact)
    frozen = list(guide.flow.layers[0].parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [p.clone() for p in frozen]
    svi = SVI(exact, guide, adam(), Trace_ELBO())
    for _ in range(2):
        svi.step()
    assert len(pyro.get_param_store()) == len(list(guide.parameters())) - len(frozen)
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))


def test_a_guide_among_others_in_a_list():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mean, scale), obs=torch.ones(3))

    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["mean"])))
    guide.append(AutoFlow(poutine.block(model, hide=["mean"]), init="none", **SMALL))
    before = [p.clone() for p in guide[1].parameters()]
    svi = SVI(model, guide, adam(), Trace_ELBO())
    for _ in range(3):
        assert math.isfinite(svi.step())
    assert any(not torch.equal(p, q) for p, q in zip(guide[1].parameters(), before, strict=True))
    assert {name: value.shape for name, value in guide().items()} == {"mean": (), "scale": (3,)}


def test_parameters_of_the_model_train_beside_the_guide():
    def model(y):
        scale = pyro.param("scale", tensor(3.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", dist.Normal(tensor(0.0), scale))
            pyro.sample("y", dist.Normal(x, 1e-2), obs=y)

    y = torch.linspace(-2, 2, 21).double()
    guide = AutoFlow(model, init="laplace", args=(y,), **SMALL)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(4, vectorize_particles=True))
    for _ in range(100):
        svi.step(y)
    assert pyro.param("scale").item() == pytest.approx(y.square().mean().sqrt().item(), rel=0.1)


def test_masked_observations_do_not_count():
    seen = torch.tensor([True, False, True])

    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", 3), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x, 1.0), obs=tensor([1.0, 100.0, 2.0]))

    guide = AutoFlow(model, init="laplace")
    x = guide.draws(20_000)["x"]
    assert x.mean().item() == pytest.approx(1.0, abs=0.02)
    assert x.std().item() == pytest.approx(3**-0.5, abs=0.02)


def test_under_a_mask_the_guide_computes_no_density():
    with poutine.mask(mask=False):
        trace = poutine.trace(small(exact)).get_trace()
    assert trace.nodes["x"]["fn"].log_density.eq(0).all()


def test_a_subsampled_plate_of_rows_under_global_latents():
    y = torch.linspace(0, 4, 20).double()

    def model(size=None):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 10.0))
        with pyro.plate("rows", 20, subsample_size=size) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])

    guide = AutoFlow(model, init="fullrank", args=(5,), **SMALL)
    assert guide.log_joint.structure.subsampled == ["rows"]
    guide.flow.load_state_dict(AutoFlow(model, init="fullrank", args=(20,), **SMALL).flow.state_dict())
    elbo = Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=1)
    whole = elbo.loss(model, guide)
    parts = torch.tensor([elbo.loss(model, guide, 5) for _ in range(60)])
    assert abs(parts.mean() - whole) < 3 * parts.std() / 60**0.5
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.97}), Trace_ELBO(4, vectorize_particles=True))
    for _ in range(100):
        svi.step(5)
    assert guide.median()["mean"].item() == pytest.approx(2.0, abs=0.2)


# Densities and draws


@pytest.mark.parametrize("model", [scalar, mixed, nested, simplex, correlation, improper_ordered, garch, extras])
def test_log_prob_is_that_of_the_guides_trace(model):
    guide = stir(small(model))
    for _ in range(2):
        trace = poutine.trace(guide).get_trace()
        values = {name: trace.nodes[name]["value"][None] for name in guide.log_joint.names}
        close(guide.log_prob(values), trace.log_prob_sum()[None])


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("model", [one, exact])
def test_every_builder(builder, model):
    guide = stir(small(model, builder))
    assert guide.flow.dtype == torch.float64
    assert isinstance(guide.flow.layers[-1], TriangularAffine)
    trace = poutine.trace(guide).get_trace()
    close(guide.log_prob({"x": trace.nodes["x"]["value"][None]}), trace.log_prob_sum()[None], 1e-5)
    svi = SVI(model, guide, adam(), Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1))
    assert math.isfinite(svi.step())
    assert guide.draws(4)["x"].shape == (4, *(() if model is one else (3,)))


@pytest.mark.parametrize("builder", [realnvp, iaf, nsf, maf])
def test_the_guide_starts_at_the_gaussian_found(builder):
    guide = AutoFlow(exact, builder, "laplace", **SMALL)
    x = guide.draws(10)["x"]
    wanted = dist.LogNormal(MEAN, SD).log_prob(x).sum(-1)
    close(guide.log_prob({"x": x}), wanted, 1e-2 if builder is nsf else 1e-5)


def test_a_ready_flow():
    flow = Flow(StandardNormal(3), TriangularAffine(3)).double()
    guide = AutoFlow(exact, flow, "laplace")
    x = guide.draws(10)["x"]
    close(guide.log_prob({"x": x}), dist.LogNormal(MEAN, SD).log_prob(x).sum(-1), 1e-5)
    assert guide.flow.layers[0] is not flow.layers[0]
    assert not any(p is q for p in guide.parameters() for q in flow.parameters())


def test_log_prob_integrates_to_one():
    guide = stir(small(one), 0.15)
    log_x = torch.linspace(-12, 12, 20_001).double()
    density = guide.log_prob({"x": log_x.exp()}).exp().detach() * log_x.exp()
    assert torch.trapezoid(density, log_x).item() == pytest.approx(1, abs=1e-4)


def test_log_prob_on_a_dependent_support_integrates_to_one():
    def model():
        a = pyro.sample("a", dist.Uniform(tensor(0.0), 1.0))
        pyro.sample("b", dist.Uniform(tensor(0.0), 1 - a))

    guide = stir(small(model), 0.2)
    at = (torch.arange(40).double() + 0.5) / 40
    a, share = torch.meshgrid(at, at, indexing="ij")
    a, b = a.flatten(), ((1 - a) * share).flatten()
    density = guide.log_prob({"a": a, "b": b}).exp()
    assert ((1 - a) * density).mean().item() == pytest.approx(1, abs=0.02)


def test_draws_follow_the_density():
    guide = stir(small(one), 0.15)
    log_x = torch.linspace(-12, 12, 20_001).double()
    density = guide.log_prob({"x": log_x.exp()}).exp().detach() * log_x.exp()
    below = torch.cumulative_trapezoid(density, log_x)
    draws = guide.draws(2000)["x"].log()
    uniform = below[torch.searchsorted(log_x, draws) - 1]
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01


def test_shapes_of_draws_and_quantiles():
    guide = small(mixed)
    for draws in (guide.draws(5), guide.sample_posterior(5)):
        assert {name: tuple(value.shape) for name, value in draws.items()} == {n: (5, *s) for n, s in SHAPES.items()}
        assert {value.dtype for value in draws.values()} == {torch.float64}
        assert not any(value.requires_grad for value in draws.values())
    assert guide.log_prob(guide.draws(5)).shape == (5,)
    assert {name: tuple(value.shape) for name, value in guide().items()} == SHAPES
    assert {name: tuple(value.shape) for name, value in guide.median().items()} == SHAPES
    quantiles = guide.quantiles([0.1, 0.5, 0.9], num_draws=100)
    assert {name: tuple(value.shape) for name, value in quantiles.items()} == {n: (3, *s) for n, s in SHAPES.items()}
    assert (quantiles["p"][0] <= quantiles["p"][2]).all()


def test_medians_and_quantiles_of_a_known_posterior():
    guide = AutoFlow(exact, init="laplace", **SMALL)
    posterior = dist.LogNormal(MEAN, SD)
    close(guide.median()["x"], MEAN.exp(), 0.05)
    close(guide.median(num_draws=100_000)["x"], MEAN.exp(), 0.02)
    levels = tensor([0.05, 0.25, 0.95])
    close(guide.quantiles(levels, num_draws=100_000)["x"], posterior.icdf(levels[:, None]), 0.03)
    close(guide.quantiles(0.5)["x"], guide.quantiles([0.5])["x"][0], 0.1)


def test_posterior_is_a_distribution_of_the_unconstrained_vector():
    guide = stir(small(exact))
    posterior = guide.get_posterior()
    assert isinstance(posterior, dist.TransformedDistribution)
    assert posterior.event_shape == (3,)
    u = posterior.sample((4,))
    close(posterior.log_prob(u), guide.log_prob({"x": u.exp()}) + u.sum(-1))
    again = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform())
    close(again.log_prob(u), posterior.log_prob(u))


def test_posterior_scores_its_draw_once_by_the_pass_that_made_it():
    guide = stir(small(exact))
    calls = count_conditioners(guide)
    posterior = guide.get_posterior().expand([4])
    u = posterior.rsample()
    known = posterior.log_prob(u)
    assert known.requires_grad
    assert set(calls.values()) == {1}
    close(known, posterior.log_prob(u))
    assert set(calls.values()) == {2}  # evaluated now

    u = posterior.rsample()
    with torch.no_grad():
        assert not posterior.log_prob(u).requires_grad
    u = posterior.rsample()
    stir(guide)  # what the draw left behind is of other parameters
    close(posterior.log_prob(u), guide.get_posterior().log_prob(u.clone()))


def test_a_draw_of_nan_is_refused():
    posterior = stir(small(exact), math.nan).get_posterior()
    with pytest.raises(ValueError, match="to be within the support"):
        posterior.log_prob(posterior.rsample())


def test_values_are_points():
    trace = poutine.trace(small(exact)).get_trace()
    fn, value = trace.nodes["x"]["fn"], trace.nodes["x"]["value"]
    assert fn.log_prob(value.clone()).eq(fn.log_prob(value)).all()
    assert fn.log_prob(value + 1).eq(-math.inf).all()
    assert fn.sample((2,)).shape == (2, *value.shape)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)

    x = tensor([1.0, 2.0])
    guide = AutoFlow(model, init="laplace", args=(x, 2 * x))
    for source in ({"guide": guide}, {"posterior_samples": guide.draws(100)}):
        samples = Predictive(model, **source, num_samples=100, parallel=parallel)(tensor([3.0, 4.0, 5.0]))
        close(samples["y"].mean(0).flatten(), tensor([6.0, 8.0, 10.0]), 0.05)
        assert samples["y"].shape == (100, 3)


def test_dependent_supports_train_like_a_model_that_has_none():
    def model():
        a = pyro.sample("a", dist.Uniform(tensor(0.0), 1.0))
        with pyro.plate("rows", 2):
            b = pyro.sample("b", dist.Uniform(tensor(0.0), 1 - a))
            pyro.sample("y", dist.Normal(a + b, 0.3), obs=tensor([0.5, 0.9]))

    def shares():
        a = pyro.sample("a", dist.Uniform(tensor(0.0), 1.0))
        with pyro.plate("rows", 2):
            share = pyro.sample("b", dist.Uniform(tensor(0.0), 1.0))
            pyro.sample("y", dist.Normal(a + (1 - a) * share, 0.3), obs=tensor([0.5, 0.9]))

    losses = []
    for each in (model, shares):
        torch.manual_seed(0)  # of the rotation too
        guide = AutoFlow(each, init="fullrank", **SMALL)
        elbo = Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=1)
        losses.append(elbo.loss(each, guide))
        svi = SVI(each, guide, adam(), Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1))
        for _ in range(3):
            assert math.isfinite(svi.step())
    # In unconstrained space the two are the same posterior, and the start is found by the same random numbers.
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_learning_rate_ends_in_a_fit_and_not_in_an_error(seed):
    def model(y):
        mu, scale = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    torch.manual_seed(seed)
    y = tensor([1.0, 2.0, 1.5])
    svi = SVI(model, AutoFlow(model).setup(y), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(600)]
    assert sorted(losses[-200:])[100] < 7  # the log evidence is -4.7


@pytest.mark.parametrize("flow", [realnvp, nsf, iaf, maf])
def test_a_guide_bends_latents_that_are_independent_and_skewed(flow):
    def model():
        pyro.sample("x", dist.Gamma(5.0, 1.0).expand([6]).to_event(1))

    torch.manual_seed(0)
    guide = AutoFlow(model, flow)
    kinds = [type(layer).__name__ for layer in guide.flow.layers]
    assert 0 < kinds.index("LULinear") < len(kinds) - 2  # in the middle
    close(guide.flow.sample((20_000,)).std(0), guide.inits[0].scale_tril.norm(dim=-1), 0.05)  # and still a Gaussian
    elbo = Trace_ELBO(64, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), elbo)
    for _ in range(600):
        svi.step()
    x = guide.flow.sample((20_000,))
    skew = (((x - x.mean(0)) / x.std(0)) ** 3).mean(0)
    assert skew.mean() < -0.25  # of log x -0.47


# Life as a module


def test_state_dict_round_trip():
    guide, other = stir(small(exact)), small(exact)
    x = guide.draws(3)["x"]
    other.load_state_dict(guide.state_dict())
    assert torch.equal(other.log_prob({"x": x}), guide.log_prob({"x": x}))
    assert all(name.startswith("flow.") for name in guide.state_dict())


def test_the_gaussian_of_the_start_is_in_the_state_dict():
    guide, other = AutoFlow(exact, init="laplace", **SMALL), AutoFlow(exact, init="none", **SMALL)
    x = guide.draws(3)["x"]
    other.load_state_dict(guide.state_dict())
    assert torch.equal(other.log_prob({"x": x}), guide.log_prob({"x": x}))


def test_dtype_follows_the_model_and_then_the_user():
    for dtype in (torch.float32, torch.float64):
        guide = AutoFlow(of_data, init="none", args=(Y.to(dtype),), **SMALL)
        assert {p.dtype for p in guide.parameters()} == {dtype}
        assert guide.draws(2)["x"].dtype == dtype
        assert guide()["x"].dtype == dtype
        assert guide.quantiles([0.5])["x"].dtype == dtype
    guide = AutoFlow(of_data, init="none", args=(Y.float(),), **SMALL)
    for to_double in (lambda: guide.double(), lambda: guide.float().to(torch.float64)):
        to_double()
        assert {p.dtype for p in guide.parameters()} == {torch.float64}
        assert guide.draws(2)["x"].dtype == torch.float64
        assert guide.log_prob({"x": torch.ones(2, 3)}).dtype == torch.float64
        assert math.isfinite(SVI(of_data, guide, adam(), Trace_ELBO()).step(Y))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("model", [exact, garch])
def test_deepcopy(model, steps):
    guide = stir(small(model))
    svi = SVI(model, guide, adam(), Trace_ELBO())
    for _ in range(steps):
        svi.step()
    new = copy.deepcopy(guide)
    assert new.model is guide.model is model
    values = guide.draws(3)
    before = guide.log_prob(values)
    assert torch.equal(new.log_prob(values), before)
    SVI(model, new, adam(), Trace_ELBO()).step()
    assert torch.equal(guide.log_prob(values), before)  # the copy's parameters are its own
    assert not torch.equal(new.log_prob(values), before)


@pytest.mark.parametrize("steps", [0, 2])
def test_pickle_leaves_the_model_behind_and_the_guide_whole(steps):
    guide = stir(small(exact))
    svi = SVI(exact, guide, adam(), Trace_ELBO())
    for _ in range(steps):
        svi.step()
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    for new in (pickle.loads(pickle.dumps(guide)), torch.load(file, weights_only=False)):
        assert guide.model is exact
        assert guide.log_joint is not None
        assert new.model is None
        values = guide.draws(3)
        assert torch.equal(new.log_prob(values), guide.log_prob(values))
        assert new.draws(3)["x"].shape == (3, 3)
        assert new.median(num_draws=50)["x"].shape == (3,)
        assert math.isfinite(SVI(exact, new, adam(), Trace_ELBO(2, vectorize_particles=True)).step())
    assert math.isfinite(svi.step())


def test_pickle_of_a_model_with_parameters_and_data_in_its_priors():
    data = torch.randn(20_000, 2).double()

    def model():
        loc = pyro.param("loc", torch.zeros(2).double())
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.MultivariateNormal(data.mean(0), data.T.cov()))

    guide = small(model)
    SVI(model, guide, adam(), Trace_ELBO()).step()
    kept = pickle.dumps(guide)
    assert len(kept) < data.nbytes / 2
    new = pickle.loads(kept)
    values = guide.draws(3)
    assert torch.equal(new.log_prob(values), guide.log_prob(values))


def test_pickle_before_setup():
    new = pickle.loads(pickle.dumps(AutoFlow(of_data, **SMALL)))
    with pytest.raises(ValueError, match="expected a guide that is built"):
        new.draws(1)
    assert AutoFlow(of_data, **SMALL) is not None


def test_an_unpickled_guide_whose_supports_depend_on_other_sites_needs_its_model():
    guide = small(garch)
    new = pickle.loads(pickle.dumps(guide))
    for use in (lambda: new.draws(2), new, new.median, lambda: new.log_prob(guide.draws(2))):
        with pytest.raises(ValueError, match="expected a guide with its model, since a support depends on other sites"):
            use()
    again = small(garch)
    again.load_state_dict(new.state_dict())
    values = guide.draws(3)
    assert torch.equal(again.log_prob(values), guide.log_prob(values))


@pytest.mark.parametrize(
    "use",
    [
        lambda guide: guide.draws(3),
        lambda guide: guide.sample_posterior(3),
        lambda guide: guide.log_prob({"x": torch.ones(2, 3)}),
        lambda guide: guide.median(),
        lambda guide: guide.quantiles([0.5]),
        lambda guide: guide.get_posterior(),
        lambda guide: guide.get_base_dist(),
        lambda guide: guide.get_transform(),
        lambda guide: guide.to(torch.float64),
        lambda guide: guide.double(),
        lambda guide: guide.cpu(),
        lambda guide: guide.state_dict(),
        lambda guide: guide.load_state_dict({}),
        lambda guide: list(guide.parameters()),
        lambda guide: torch.optim.Adam(guide.parameters()),
        lambda guide: neutra(of_data, guide),
        lambda guide: NeuTraReparam(guide).reparam(of_data)(Y),
        lambda guide: poutine.reparam(of_data, config=lambda site: NeuTraReparam(guide))(Y),
    ],
)
def test_before_setup_nothing_is_silently_empty(use):
    guide = AutoFlow(of_data, **SMALL)
    with pytest.raises(
        ValueError, match=r"expected a guide that is built: call guide.setup\(...\) with the model's arg"
    ):
        use(guide)
    assert "AutoFlow" in repr(guide)
    guide.setup(Y)
    assert guide.draws(2)["x"].shape == (2, 3)


def test_a_model_that_needs_no_arguments_is_built_at_once():
    assert len(list(small(exact).parameters())) > 0
    assert len(list(AutoFlow(of_data, args=(Y,), **SMALL).parameters())) > 0
    assert len(list(AutoFlow(of_data, kwargs={"y": Y}, **SMALL).parameters())) > 0
    guide = AutoFlow(of_data, **SMALL)
    guide(Y)  # else in its first call
    assert len(list(guide.parameters())) > 0


# What is refused


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: AutoFlow(3), TypeError, "expected a Pyro model, a callable; got int"),
        (lambda: AutoFlow(exact, "realnvp"), TypeError, "expected flow to be a builder or a Flow; got 'realnvp'"),
        (lambda: AutoFlow(exact, realnvp(3), foo=1), TypeError, "a ready flow cannot be combined with .*; got foo"),
        (
            lambda: AutoFlow(exact, init="mode"),
            ValueError,
            "expected init to be one of 'auto', 'laplace', .*got 'mode'",
        ),
        (
            lambda: AutoFlow(exact, max_triangular=0),
            ValueError,
            "expected max_triangular to be a positive integer; got 0",
        ),
        (
            lambda: AutoFlow(exact, realnvp(2), "none"),
            ValueError,
            r"expected a flow over 3 features with context_features=0, for the latents .*; got \(2,\) and 0",
        ),
        (
            lambda: AutoFlow(exact, realnvp(3, context_features=2), "none"),
            ValueError,
            r"expected a flow over 3 features with context_features=0, .*; got \(3,\) and 2",
        ),
        (
            lambda: AutoFlow(exact, lambda features: realnvp(features + 1), "none"),
            ValueError,
            r"expected a flow over 3 features .*; got \(4,\) and 0",
        ),
        (
            lambda: AutoFlow(exact, lambda features: StandardNormal(features), "none"),
            TypeError,
            "expected a builder that returns a Flow; got one that returns StandardNormal",
        ),
        (lambda: AutoFlow(exact, init="none", foo=1), TypeError, "foo"),
        (
            lambda: small(exact).quantiles([0.5, 1.5]),
            ValueError,
            r"expected quantiles in \[0, 1\]; got 1.5",
        ),
        (lambda: small(exact).quantiles([0.5], num_draws=0), ValueError, "expected num_draws to be a positive integer"),
        (lambda: small(exact).draws(-1), ValueError, "expected a sample shape of non-negative integers; got -1"),
        (lambda: small(exact).log_prob({}), ValueError, r"expected values of 'x' of shape \(points, 3\); got none"),
        (
            lambda: small(exact).log_prob({"x": torch.ones(3)}),
            ValueError,
            r"expected values of 'x' of shape \(points, 3\); got \(3,\)",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Traps of Pyro's guides: section by section of what ours must not do


def test_trap_guides_that_are_built_lazily():
    guide = AutoFlow(of_data, init="none", args=(Y,), **SMALL)
    assert len(list(guide.parameters())) > 0
    optimizer = torch.optim.Adam(guide.parameters(), 1e-2)
    loss = Trace_ELBO().differentiable_loss(of_data, guide, Y)
    loss.backward()
    assert all(p.grad is not None for p in guide.parameters())
    optimizer.step()


def test_trap_float64_models_that_run_in_float32():
    guide = AutoFlow(of_data, init="none", args=(Y,), **SMALL)
    trace = poutine.trace(guide).get_trace(Y)
    assert trace.nodes["_AutoFlow_latent"]["value"].dtype == torch.float64
    assert trace.log_prob_sum().dtype == torch.float64


def test_trap_local_latents_of_a_subsampled_plate_shared_between_minibatches():
    def model():
        with pyro.plate("rows", 10, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected latents outside subsampled plates, .*'z' in plate 'rows'"):
        AutoFlow(model)


def test_trap_supports_frozen_at_their_first_value():
    guide = small(garch)
    draws = guide.draws(500)
    assert (draws["b"] <= 1 - draws["a"][:, None]).all()
    runs = [guide() for _ in range(50)]
    assert all((run["b"] <= 1 - run["a"]).all() for run in runs)
    for elbo in (Trace_ELBO(64, vectorize_particles=True, max_plate_nesting=1), Trace_ELBO()):
        for _ in range(5):
            assert math.isfinite(SVI(garch, guide, adam(), elbo).step())
    # Pyro's own freezes 1 - a at its value in the first run, and so draws outside.
    frozen = AutoNormal(garch, init_scale=1.0)
    runs = [frozen() for _ in range(50)]
    assert any((run["b"] > 1 - run["a"]).any() for run in runs)


def test_trap_draws_densities_medians_and_quantiles_that_are_missing():
    guide = small(exact)
    values = guide.sample_posterior(3)
    assert guide.log_prob(values).shape == (3,)
    assert guide.median()["x"].shape == guide.quantiles([0.5])["x"].shape[1:]


def test_trap_the_total_gradient_where_the_path_gradient_is_meant():
    guide = AutoFlow(exact, init="laplace", **SMALL)
    for elbo, silent in ((PathELBO(), True), (Trace_ELBO(), False)):
        guide.zero_grad()
        elbo.loss_and_grads(exact, guide)
        largest = max(float(p.grad.abs().max()) for p in guide.parameters() if p.grad is not None)
        assert (largest < 1e-5) is silent


def test_trap_improper_priors_that_cannot_be_initialised():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()))
        cuts = pyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
        pyro.sample("y", dist.Gamma(tensor(3.0), x), obs=tensor(2.0))
        pyro.sample("c", dist.Normal(cuts, 1.0).to_event(1), obs=tensor([0.0, 1.0]))

    guide = AutoFlow(model, **SMALL)
    draws = guide.draws(2000)
    assert (draws["cuts"][:, 1] > draws["cuts"][:, 0]).all()
    assert draws["x"].mean().item() == pytest.approx(2.0, rel=0.1)  # the posterior is Gamma(4, 2)
    assert math.isfinite(SVI(model, guide, adam(), Trace_ELBO()).step())


@jitted
@pytest.mark.parametrize("vectorized", [False, True])
def test_trap_jit_that_asserts_with_couplings(vectorized):
    guide = small(exact)
    elbo = JitTrace_ELBO(2, vectorize_particles=vectorized, ignore_jit_warnings=True)
    svi = SVI(exact, guide, adam(), elbo)
    losses = [svi.step() for _ in range(20)]
    assert len(set(losses)) == 20  # fresh draws in every step
    assert all(map(math.isfinite, losses))


def test_trap_a_second_guide_that_finds_the_firsts_parameters_in_the_store():
    first, second = small(exact), small(exact)
    third = copy.deepcopy(first)
    for guide in (first, second, third, first):
        before = [p.clone() for p in guide.parameters()]
        others = [[p.clone() for p in g.parameters()] for g in (first, second, third) if g is not guide]
        svi = SVI(exact, guide, adam(), Trace_ELBO())
        for _ in range(2):
            svi.step()
        assert sum(not torch.equal(p, q) for p, q in zip(guide.parameters(), before, strict=True)) > len(before) / 2
        now = [list(g.parameters()) for g in (first, second, third) if g is not guide]
        assert all(torch.equal(p, q) for a, b in zip(now, others, strict=True) for p, q in zip(a, b, strict=True))
        assert set(pyro.get_param_store().values()) == set(guide.parameters())


def test_trap_pickling_that_takes_the_model_from_the_original():
    guide = small(exact)
    pickle.dumps(guide)
    copy.copy(guide.__getstate__())
    assert guide.model is exact
    assert math.isfinite(SVI(exact, guide, adam(), Trace_ELBO()).step())


def test_trap_the_mean_field_elbo_that_forgets_jacobians():
    guide = AutoFlow(exact, init="laplace", **SMALL)
    losses = [TraceMeanField_ELBO().loss(exact, guide) for _ in range(3)]
    assert losses == pytest.approx([-LOG_EVIDENCE] * 3, abs=1e-5)


def test_trap_splines_that_cannot_leave_their_box():
    def model():
        pyro.sample("x", dist.Normal(tensor([1e4, -300.0]), tensor([50.0, 1e-3])).to_event(1))

    x = AutoFlow(model, nsf, **SMALL).draws(4000)["x"]
    close(x.mean(0), tensor([1e4, -300.0]), 1e-3)
    close(x.std(0) / tensor([50.0, 1e-3]), torch.ones(2), 0.1)


# Many latents


@pytest.mark.parametrize("max_triangular", [512, 100])
def test_hundreds_of_latents(max_triangular):
    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 299):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(299))

    guide = AutoFlow(model, init="none", max_triangular=max_triangular, **SMALL)
    assert guide.flow.layers[-1].diagonal is (max_triangular == 100)
    svi = SVI(model, guide, adam(), PathELBO(2, vectorize_particles=True))
    assert math.isfinite(svi.step())
    assert {name: tuple(value.shape) for name, value in guide.draws(2).items()} == {"scale": (2,), "z": (2, 299)}
    assert guide.log_prob(guide.draws(2)).shape == (2,)


@pytest.mark.slow
def test_a_start_in_hundreds_of_latents():
    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 299):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, scale), obs=2 * torch.ones(299))

    for max_triangular in (512, 100):
        guide = AutoFlow(model, max_triangular=max_triangular, **SMALL)
        # With z summed out, 1 + scale**2 is near 4, the mean square of the data.
        assert guide.median(num_draws=2000)["z"].mean().item() == pytest.approx(0.5, abs=0.1)


def test_one_latent_gets_splines_unless_the_options_are_of_couplings():
    guide = AutoFlow(one, init="none", num_layers=2)
    assert any(type(layer).__name__ == "SplineCoupling" or "pline" in repr(layer) for layer in guide.flow.layers)
    AutoFlow(one, init="none", num_layers=2, scale="sigmoid")


# NeuTra


def test_neutra_reparam_of_pyros():
    guide = stir(small(correlation))
    guide._create_plates()
    model = NeuTraReparam(guide).reparam(correlation)
    z = torch.randn(3, guide.latent_dim).double()
    at = [poutine.condition(model, {"scale_shared_latent": point}) for point in z]
    found = [poutine.trace(each).get_trace().log_prob_sum() for each in at]
    u, log_det = guide.flow.bijection.forward_and_log_det(z)
    close(torch.stack(found), guide.log_joint(u) + log_det)


@pytest.mark.parametrize("model", [exact, garch, mixed])
def test_neutra_is_the_posterior_in_the_latent_space(model):
    guide = stir(small(model))
    over_z, sites = neutra(model, guide)
    name = f"{guide.log_joint.names[0]}_shared_latent"
    z = torch.randn(3, guide.latent_dim).double()
    found = [poutine.trace(poutine.condition(over_z, {name: point})).get_trace().log_prob_sum() for point in z]
    u, log_det = guide.flow.bijection.forward_and_log_det(z)
    close(torch.stack(found), guide.log_joint(u) + log_det)
    close(sites(z), guide.log_joint.constrain(u))


def test_neutra_draws():
    guide = AutoFlow(exact, Flow(StandardNormal(3), TriangularAffine(3)), "laplace")
    over_z, sites = neutra(exact, guide)
    mcmc = MCMC(NUTS(over_z), num_samples=200, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    (z,) = mcmc.get_samples().values()
    close(z.mean(0), torch.zeros(3), 0.3)
    close(z.std(0), torch.ones(3), 0.2)
    close(sites(z)["x"].log().mean(0), MEAN, 0.2)


def test_neutra_starts_from_improper_priors():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()))
        cuts = pyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)
        pyro.sample("v", dist.Gamma(tensor(3.0), x), obs=tensor(2.0))
        pyro.sample("c", dist.Normal(cuts, 1.0).to_event(1), obs=tensor([0.0, 1.0]))

    over_z, sites = neutra(model, small(model))
    mcmc = MCMC(NUTS(over_z), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    (z,) = mcmc.get_samples().values()
    assert z.dtype == torch.float64
    assert (sites(z)["x"] > 0).all()


@pytest.mark.parametrize("handler", [poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor(False))])
def test_neutra_refuses_latents_under_a_scale_or_a_mask(handler):
    def model():
        with handler:
            x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="expected latents under neither a scale nor a mask, .*; got 'x'"):
        neutra(model, small(model))


# The start


def gaussian(d, decades=1.0):
    """A badly scaled, correlated Gaussian far from its start."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(d, d, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-decades, decades, d).double()
    covariance = scale[:, None] * (a @ a.T / d + 0.3 * torch.eye(d)) * scale
    loc = 5 * scale * torch.randn(d, generator=generator, dtype=torch.float64)

    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (d,)))
        pyro.factor("f", dist.MultivariateNormal(loc, covariance).log_prob(x))

    return model, loc, covariance


@pytest.mark.parametrize(
    "d, decades, method, error",
    [
        (2, 1, "auto", 1e-3),
        (2, 1, "laplace", 1e-3),
        (2, 1, "pathfinder", 0.05),
        (2, 1, "fullrank", 0.05),
        (20, 2, "auto", 0.1),
        (20, 0.5, "laplace", 1e-3),
        (20, 0.5, "pathfinder", 0.5),
        (20, 2, "fullrank", 0.05),
    ],
)
def test_a_start_finds_a_gaussian(d, decades, method, error):
    model, loc, covariance = gaussian(d, decades)
    best = find_init(LogJoint(model), method)[0]
    sd = covariance.diagonal().sqrt()
    close((best.loc - loc) / sd, torch.zeros(d), error)
    close((best.scale_tril @ best.scale_tril.T - covariance) / sd[:, None] / sd, torch.zeros(d, d), error)
    assert best.elbo == pytest.approx(0, abs=error)


def test_a_diagonal_start():
    model, _, covariance = gaussian(5)
    for best in (find_init(LogJoint(model), "meanfield")[0], find_init(LogJoint(model), "auto", diagonal=True)[0]):
        assert torch.equal(best.scale_tril, best.scale_tril.diagonal().diag())
        # The best diagonal Gaussian has the conditional deviations.
        wanted = torch.linalg.inv(covariance).diagonal().rsqrt()
        ratio = best.scale_tril.diagonal() / wanted
        assert ((ratio > 0.5) & (ratio < 2)).all()


def test_no_start_is_the_initial_values():
    log_joint = LogJoint(exact)
    (start,) = find_init(log_joint, "none")
    close(start.loc, log_joint.initial)
    close(start.scale_tril, torch.eye(3))


def bimodal(gap=8.0):
    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        modes = torch.stack([x, x + gap], -2)
        density = dist.Normal(gap / 2, tensor([1.0, 0.5])).log_prob(modes).sum(-1).logsumexp(-1) - math.log(2)
        pyro.factor("f", density)

    return model


def test_a_start_finds_both_modes():
    starts = find_init(LogJoint(bimodal()))
    firsts = torch.stack([start.loc for start in starts])[:, 0]
    assert (firsts > 3).any()
    assert (firsts < -3).any()
    assert starts[0].elbo == pytest.approx(-math.log(2), abs=0.05)
    assert [start.elbo for start in starts] == sorted((start.elbo for start in starts), reverse=True)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("gap", [5.0, 15.0])
def test_a_start_finds_far_modes_under_a_wide_prior(d, gap):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(d), 10.0).to_event(1))
        modes = torch.stack([x - gap, x + gap], -2)
        pyro.factor("f", dist.Normal(0.0, 0.5).log_prob(modes).sum(-1).logsumexp(-1))

    for seed in range(4):
        starts = find_init(LogJoint(model), seed=seed)
        best = max(start.elbo for start in starts)
        found = {int(start.loc[0].sign()) for start in starts if start.elbo > best - 1}
        assert found == {-1, 1}


def test_a_climb_ends_at_the_summit():
    log_joint = LogJoint(gaussian(3)[0])
    paths = climb(log_joint, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double() * 10)
    assert len(paths) == 5
    for path in paths:
        close(path[-1][0], gaussian(3)[1], 1e-3)


def test_a_start_in_a_neck_is_finite():
    y = tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def centred():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    log_joint = LogJoint(centred)
    starts = find_init(log_joint)
    assert all(start.loc.isfinite().all() and start.scale_tril.isfinite().all() for start in starts)
    assert starts[0].elbo > -35  # the log evidence is about -31; the Gaussian at a mode in the neck has none
    assert 0 < starts[0].loc[1] < 3


def test_a_start_does_not_touch_the_random_state():
    log_joint = LogJoint(exact)
    state = torch.get_rng_state()
    find_init(log_joint)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_start_is_the_same_twice():
    first, second = (find_init(LogJoint(gaussian(3)[0]))[0] for _ in range(2))
    assert torch.equal(first.loc, second.loc)
    assert torch.equal(first.scale_tril, second.scale_tril)


@pytest.mark.parametrize("method", INIT_METHODS)
def test_every_start_builds_a_guide(method):
    guide = AutoFlow(exact_and_more, init=method, **SMALL)
    assert math.isfinite(Trace_ELBO().loss(exact_and_more, guide))


def test_a_float32_start():
    def model():
        pyro.sample("x", dist.Normal(torch.tensor([100.0, -1.0]), torch.tensor([10.0, 0.1])).to_event(1))

    guide = AutoFlow(model, **SMALL)
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    x = guide.draws(4000)["x"]
    close(x.mean(0), torch.tensor([100.0, -1.0]), 0.02)
    close(x.std(0), torch.tensor([10.0, 0.1]), 0.05)


def test_a_density_without_a_gaussian_is_refused_with_a_sentence():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        pyro.factor("f", torch.where(x.abs() < 0.4, 0.0, -math.inf))

    with pytest.raises(ValueError, match="expected a Gaussian with a finite ELBO by init='laplace'; got none"):
        find_init(LogJoint(model), "laplace")


def optional_data(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def test_data_that_default_to_none_are_those_of_the_first_call():
    y = torch.tensor([1.0, 2.0, 1.5])
    guide = AutoFlow(optional_data)
    svi = SVI(optional_data, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(400)]
    assert [site.name for site in guide.latents] == ["mu"]
    joint = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) / 4 + 1).log_prob(y)
    assert sum(losses[-200:]) / 200 == pytest.approx(-float(joint), abs=0.15)  # 4.00; 7.3 lower if y were a latent
    assert guide.draws(4000)["mu"].std() == pytest.approx((1 / 13) ** 0.5, rel=0.1)  # 0.277


def test_a_guide_refuses_arguments_with_which_a_latent_of_its_own_is_observed():
    y = torch.tensor([1.0, 2.0, 1.5])
    guide = AutoFlow(optional_data).setup()
    guide()
    with pytest.raises(ValueError, match="got some with which 'y' is observed or missing: build a guide from these"):
        guide(y)
    guide.setup(y)
    guide(y)
    guide(y=y + 1)
    assert guide().keys() == {"mu"}  # as in predictions, where the model draws what is not given


class Mean(PyroModule):
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, y=None):
        mu = pyro.sample("mu", dist.Normal(self.shift, 1.0))
        return pyro.sample("y", dist.Normal(mu, 0.5).expand([3]).to_event(1), obs=y)


@pytest.mark.parametrize(
    "model",
    [
        Mean(),
        lambda *data: optional_data(*data),
        poutine.block(optional_data, hide=["nothing"]),
        wraps(optional_data)(lambda *args, **kwargs: optional_data(*args, **kwargs)),
    ],
)
def test_models_of_every_form_are_built_at_the_first_call(model):
    guide = AutoFlow(model)
    assert not guide.prototype_trace
    loss = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(torch.tensor([1.0, 2.0, 1.5]))
    assert math.isfinite(loss)
    assert [site.name for site in guide.latents] == ["mu"]


@pytest.mark.parametrize("data", [torch.tensor([1.0, 2.0, 1.5]), np.array([1.0, 2.0, 1.5], np.float32)])
def test_data_that_are_a_default_build_the_guide_at_once(data):
    guide = AutoFlow(lambda y=data: optional_data(torch.as_tensor(y)))
    assert [site.name for site in guide.latents] == ["mu"]
