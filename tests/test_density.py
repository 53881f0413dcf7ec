"""The log joint density: against Pyro's traces, in every way of evaluating many points, and what it refuses."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import (
    MODELS,
    bounded,
    close,
    correlation,
    garch,
    improper_ordered,
    interval_of_another,
    mixture,
    ordered,
    scalar,
    simplex,
    tensor,
    vector,
)
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.enum import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import nn

from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.sites import initial_value

MODES = ("plate", "vmap", "loop")


def points(log_joint, n=4, width=0.7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, log_joint.dim, generator=generator, dtype=torch.float64)
    return (log_joint.initial + width * noise).to(log_joint.dtype)


def free(support, value):
    """The numbers of a value that determine the others."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.simplex:
        return value[..., :-1].flatten()
    if support is constraints.corr_cholesky:
        row, column = torch.tril_indices(value.shape[-1], value.shape[-1], -1)
        return value[..., row, column].flatten()
    return value.flatten()


def reference(log_joint, u):
    """Pyro's trace at the point, and the determinant that autograd finds."""
    trace = trace_at(log_joint, u)
    return trace.log_prob_sum() + log_determinant(log_joint, u)


def trace_at(log_joint, u):
    values = {name: value[0] for name, value in log_joint.constrain(u[None]).items()}
    return poutine.trace(poutine.condition(log_joint.model, values)).get_trace(*log_joint.args, **log_joint.kwargs)


def log_determinant(log_joint, u):
    trace = trace_at(log_joint, u)

    def numbers(u):
        values = log_joint.constrain(u[None])
        return torch.cat([free(trace.nodes[name]["fn"].support, value[0]) for name, value in values.items()])

    return torch.autograd.functional.jacobian(numbers, u).slogdet().logabsdet


@pytest.mark.parametrize("model", MODELS)
def test_equals_pyros_trace_and_autograds_determinant(model):
    log_joint = LogJoint(model)
    u = points(log_joint)
    close(log_joint(u), torch.stack([reference(log_joint, point) for point in u]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_every_mode_gives_the_same(model, mode):
    if (model, mode) == (ordered, "vmap"):
        return  # torch's OrderedLogistic reads its values
    single, log_joint = LogJoint(model, vectorize="loop"), LogJoint(model, vectorize=mode)
    u = points(single)
    wanted = single(u)
    close(log_joint(u), wanted)
    close(log_joint.value(u), wanted)
    close(log_joint.value_and_score(u), single.value_and_score(u))
    close(log_joint.constrain(u, deterministic=True), single.constrain(u, deterministic=True))
    likelihood = single.log_likelihood(u)
    close(log_joint.log_likelihood(u), likelihood)
    for n in (1, 2):
        close(log_joint(u[:n]), wanted[:n])
        close(log_joint.log_likelihood(u[:n]), {name: value[:n] for name, value in likelihood.items()})


@pytest.mark.parametrize("model", MODELS)
def test_the_fastest_mode_is_taken(model):
    assert LogJoint(model).vectorize == "plate"


@pytest.mark.parametrize("model", MODELS)
def test_score_is_the_gradient(model):
    log_joint = LogJoint(model)
    u = points(log_joint, 2)
    score = log_joint.value_and_score(u)[1]
    for column in range(log_joint.dim):
        step = torch.zeros_like(u)
        step[:, column] = 1e-5
        close(score[:, column], (log_joint(u + step) - log_joint(u - step)) / 2e-5, 1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_values_lead_there_and_back(model):
    log_joint = LogJoint(model)
    u = points(log_joint)
    values = log_joint.constrain(u)
    assert list(values) == log_joint.names
    for site in log_joint.latents:
        assert values[site.name].shape == (4, *site.shape)
    back, log_det = log_joint.unconstrain(values)
    close(back, u)
    close(log_det, torch.stack([log_determinant(log_joint, point) for point in u]))


def test_a_scale_by_hand():
    def model():
        pyro.sample("scale", dist.HalfNormal(1.0))

    u = torch.tensor([[-1.0], [0.0], [2.0]])
    wanted = dist.HalfNormal(1.0).log_prob(u.exp()) + u
    close(LogJoint(model)(u), wanted[:, 0], 1e-6)


def test_shapes_of_everything_in_nested_plates():
    def model():
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * top)
        pyro.deterministic("constant", torch.ones(2))
        with pyro.plate("outer", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(top, 1.0))
            pyro.deterministic("of a", a + 1)
            with pyro.plate("inner", 4, dim=-1):
                b = pyro.deterministic("b", a + torch.arange(4.0))
                pyro.sample("y", dist.Normal(b, 1.0), obs=torch.zeros(3, 4))
        pyro.deterministic("mean", a.mean((-1, -2)))

    shapes = {"twice": (), "constant": (2,), "of a": (3, 1), "b": (3, 4), "mean": ()}
    log_joint = LogJoint(model)
    assert log_joint.vectorize == "plate"
    u = points(log_joint)
    values = log_joint.constrain(u, deterministic=True)
    wanted = {"top": (), "a": (3, 1), **shapes}
    assert {name: tuple(value.shape[1:]) for name, value in values.items()} == wanted
    close(values["b"], u[:, 1:, None] + torch.arange(4.0))
    close(values["mean"], u[:, 1:].mean(-1))
    for mode in MODES:
        predicted = LogJoint(model, vectorize=mode).predict(u, (), {})
        wanted = {**shapes, "y": (3, 4)}
        assert {name: tuple(value.shape[1:]) for name, value in predicted.items()} == wanted
        close(predicted["of a"], u[:, 1:, None] + 1)
        assert all(len(value) == 4 for value in predicted.values())


# Which way is right


def test_a_model_that_indexes_from_the_left_is_not_put_into_a_plate():
    x, y = torch.arange(3.0), torch.ones(3)

    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(b[0] + b[1] * x, 1.0), obs=y)

    log_joint = LogJoint(model)
    assert log_joint.vectorize == "vmap"
    u = points(log_joint)
    wanted = dist.Normal(0, 1).log_prob(u).sum(-1) + dist.Normal(u[:, :1] + u[:, 1:] * x, 1.0).log_prob(y).sum(-1)
    close(log_joint(u), wanted, 1e-5)


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("latents", [1, 3])  # three points are tried, and here they would fit as rows or as latents
@pytest.mark.parametrize("plates", [False, True])
def test_a_product_from_the_left_is_not_put_into_a_plate(rows, latents, plates):
    x, y = torch.randn(rows, latents), torch.ones(rows)

    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
        if plates:
            with pyro.plate("rows", rows):
                pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)
        else:
            pyro.sample("y", dist.Normal(x @ b, 1.0).to_event(1), obs=y)

    log_joint = LogJoint(model)
    assert log_joint.vectorize == "vmap"
    u = points(log_joint, rows)
    wanted = dist.Normal(0, 1).log_prob(u).sum(-1) + dist.Normal(u @ x.T, 1.0).log_prob(y).sum(-1)
    close(log_joint(u), wanted, 1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_rows_without_a_plate_are_not_taken_for_points(rows):
    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(rows), 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.ones(rows))

    log_joint = LogJoint(model)
    u = points(log_joint, 5)
    wanted = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(u, 1.0).log_prob(torch.ones(rows))
    close(log_joint(u), wanted.sum(-1), 1e-5)


@pytest.mark.parametrize("n", [3, 5])
def test_a_deterministic_site_that_indexes_from_the_left_is_not_put_into_a_plate(n):
    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("first", b[0])
        pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=torch.tensor(1.0))

    log_joint = LogJoint(model)
    assert log_joint.vectorize == "vmap"
    u = points(log_joint, n)
    close(log_joint.constrain(u, deterministic=True)["first"], u[:, 0])
    close(log_joint.predict(u, (), {})["first"], u[:, 0])


def test_writes_in_place_fall_back_to_the_loop():
    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        mean = torch.zeros(3)
        mean[0] = b
        for i in (1, 2):
            mean[i] = 0.5 * mean[i - 1]
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(3))

    log_joint = LogJoint(model)
    assert log_joint.vectorize == "loop"
    u = points(log_joint)
    mean = u * torch.tensor([1.0, 0.5, 0.25])
    wanted = dist.Normal(0, 1).log_prob(u[:, 0]) + dist.Normal(mean, 1.0).log_prob(torch.ones(3)).sum(-1)
    close(log_joint(u), wanted, 1e-5)
    value, score = log_joint.value_and_score(u)
    close(value, wanted, 1e-5)
    close(score[:, 0], -u[:, 0] + ((1 - mean) * torch.tensor([1.0, 0.5, 0.25])).sum(-1), 1e-5)


def test_a_branch_on_a_value_falls_back_to_the_loop():
    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(b if b > 0 else 2 * b, 1.0), obs=torch.tensor(1.0))

    log_joint = LogJoint(model)
    assert log_joint.vectorize == "loop"
    u = torch.tensor([[-1.0], [1.0]])
    y = dist.Normal(torch.tensor([-2.0, 1.0]), 1.0).log_prob(torch.tensor(1.0))
    close(log_joint(u), dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + y, 1e-5)


def test_a_model_that_draws_numbers_of_its_own_falls_back_to_the_loop():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + torch.randn(()), 1.0), obs=torch.tensor(1.0))

    assert LogJoint(model).vectorize == "loop"


def test_a_bayesian_network():
    class Network(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 2)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))

        def forward(self, x, y=None):
            mean = self.linear(x).tanh().sum(-1)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x, y = torch.randn(7, 3), torch.randn(7)
    log_joint = LogJoint(Network(), (x, y))
    assert log_joint.vectorize == "vmap"
    u = points(log_joint)
    mean = (x @ u[:, :6].view(4, 2, 3).mT + u[:, None, 6:]).tanh().sum(-1)
    wanted = dist.Normal(0, 1).log_prob(u).sum(-1) + dist.Normal(mean, 1.0).log_prob(y).sum(-1)
    close(log_joint(u), wanted, 1e-4)
    assert log_joint.predict(u, (x[:2],), {})["y"].shape == (4, 2)


# Discrete latents


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("mode", ["auto", "plate", "loop"])
def test_discrete_latents_are_summed_out(mode, marked):
    y = tensor([-1.0, 0.5, 2.0])
    log_joint = LogJoint(config_enumerate(mixture) if marked else mixture, (y,), vectorize=mode)
    assert log_joint.vectorize != "auto"
    u = points(log_joint)
    values = log_joint.constrain(u)
    parts = dist.Normal(values["means"][:, None], 1.0).log_prob(y[:, None]) + values["weights"].log()[:, None]
    log_jacobian = log_joint.unconstrain(values)[1]
    prior = dist.Dirichlet(torch.ones(2).double()).log_prob(values["weights"])
    prior = prior + dist.Normal(tensor([-2.0, 2.0]), 1.0).log_prob(values["means"]).sum(-1)
    close(log_joint(u), parts.logsumexp(-1).sum(-1) + prior + log_jacobian)
    # What depends on a discrete latent has no value of its own, but is predicted.
    assert list(log_joint.constrain(u, deterministic=True)) == ["weights", "means", "gap"]
    shapes = {name: tuple(value.shape) for name, value in log_joint.predict(u, (y,), {}).items()}
    assert shapes == {"gap": (4,), "z": (4, 3), "mean": (4, 3), "y": (4, 3)}
    close(log_joint.log_likelihood(u), {"y": parts.logsumexp(-1)})


def test_a_markov_chain_is_summed_out():
    y = tensor([0.3, -1.0, 2.0, 1.5])

    def model():
        stay = pyro.sample("stay", dist.Beta(tensor([2.0, 3.0]), 1.0).to_event(1))
        z = torch.tensor(0)
        for t in pyro.markov(range(4)):
            row = Vindex(stay)[..., z]
            z = pyro.sample(f"z{t}", dist.Categorical(torch.stack([row, 1 - row], -1)))
            pyro.sample(f"y{t}", dist.Normal(z.double() * 2 - 1, 1.0), obs=y[t])

    log_joint = LogJoint(model)
    u = points(log_joint)
    stay = log_joint.constrain(u)["stay"]
    transition = torch.stack([stay, 1 - stay], -1)  # both states' first column is the first state
    emission = dist.Normal(tensor([-1.0, 1.0]), 1.0).log_prob(y[:, None]).exp()
    forward = tensor([1.0, 0.0]).expand(4, 2)
    for t in range(4):
        forward = (forward[:, None] @ transition)[:, 0] * emission[t]
    prior = dist.Beta(tensor([2.0, 3.0]), 1.0).log_prob(stay).sum(-1)
    close(log_joint(u), forward.sum(-1).log() + prior + log_joint.unconstrain({"stay": stay})[1])


def test_scaled_sites_beside_discrete_latents_are_refused():
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with poutine.scale(scale=2.0):
            pyro.sample("z", dist.Bernoulli(p))

    with pytest.raises(
        ValueError, match="expected sites without a scale in a model with discrete latents; got 2.0 at 'z'"
    ):
        LogJoint(model)


# Supports that depend on other sites


@pytest.mark.parametrize("model", [garch, interval_of_another])
def test_dependent_supports_are_seen_and_followed(model):
    log_joint = LogJoint(model)
    assert [site.support is None for site in log_joint.latents] == [site.name == "b" for site in log_joint.latents]
    assert not log_joint.is_static
    u = points(log_joint, 50, 3.0)
    values = log_joint.constrain(u)
    bound = 1 - values["a"][:, None] if model is garch else values["a"]
    assert (values["b"] >= 0).all()
    assert (values["b"] <= bound).all()


def test_a_support_of_the_arguments_alone_is_static():
    def model(high):
        pyro.sample("x", dist.Uniform(0.0, high))

    assert LogJoint(model, (torch.tensor(3.0),)).is_static
    assert LogJoint(model, kwargs={"high": torch.tensor(3.0)}).is_static


# Numbers


def test_float64_data_with_priors_of_plain_numbers_stay_float64():
    y = tensor([1.0, 2.0])

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    log_joint = LogJoint(model)
    assert log_joint.dtype == torch.float64
    assert log_joint.initial.dtype == torch.float64
    u = points(log_joint)
    scale = u[:, 1:].exp()
    wanted = dist.Normal(u[:, :1], scale).log_prob(y).sum(-1) + dist.Normal(tensor(0.0), 1.0).log_prob(u[:, 0])
    wanted = wanted + dist.HalfNormal(tensor(1.0)).log_prob(scale[:, 0]) + u[:, 1]
    assert log_joint(u).dtype == torch.float64
    close(log_joint(u), wanted, 1e-12)
    assert {value.dtype for value in log_joint.constrain(u).values()} == {torch.float64}


def test_float32_stays_float32():
    log_joint = LogJoint(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    assert log_joint.dtype == torch.float32
    assert log_joint(torch.zeros(2, 1)).dtype == torch.float32


@pytest.mark.parametrize("y", [torch.ones(2), torch.ones(2).double()])
def test_an_improper_prior_takes_the_dtype_of_the_data(y):
    def model(y):
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(x, 1.0).expand([2]).to_event(1), obs=y)

    assert LogJoint(model, (y,)).dtype == y.dtype


def test_an_improper_prior_of_matrices_takes_the_dtype_of_data_in_a_closure():
    matrix = torch.eye(2).double()

    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.sample("y", dist.Normal((matrix @ x[..., None])[..., 0], 1.0).to_event(1), obs=torch.ones(2).double())

    log_joint = LogJoint(model)
    assert log_joint.dtype == torch.float64
    close(log_joint(torch.ones(1, 2).double()), tensor([-math.log(2 * math.pi)]))


@pytest.mark.parametrize(
    "support, shape, wanted",
    [
        (constraints.positive, (2,), torch.ones(2)),
        (constraints.interval(-1.0, 3.0), (), torch.tensor(1.0)),
        (constraints.simplex, (4,), torch.full((4,), 0.25)),
        (constraints.real_vector, (3,), torch.zeros(3)),
    ],
)
def test_the_start_of_an_improper_prior_is_feasible(support, shape, wanted):
    batch, event = (shape, ()) if support.event_dim == 0 else ((), shape)
    found = initial_value({"name": "x", "fn": dist.ImproperUniform(support, batch, event), "value": None})
    close(found, wanted, 1e-6)


def test_a_matrix_without_a_cholesky_factor_counts_at_its_point_alone():
    def model():
        r = pyro.sample("r", dist.Normal(tensor(0.0), 1.0))
        one = torch.ones_like(r)
        covariance = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -1)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2).double(), covariance), obs=tensor([1.0, 1.0]))

    log_joint = LogJoint(model)
    u = tensor([0.5, 1.5, -0.3, -2.0, 0.1])[:, None]
    fine = torch.tensor([True, False, True, False, True])
    with pytest.raises(torch.linalg.LinAlgError):
        log_joint(u)
    value, score = log_joint.value_and_score(u)
    assert value.isfinite().tolist() == fine.tolist()
    assert (value[~fine] == -math.inf).all()
    assert (score[~fine] == 0).all()
    close(value[fine], log_joint(u[fine]))
    close(log_joint.value(u)[fine], log_joint(u[fine]))


def test_values_that_are_not_finite_count_as_minus_infinity():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", (1 - x).log())

    log_joint = LogJoint(model)
    u = torch.tensor([[0.0], [2.0], [1.0]])
    value, score = log_joint.value_and_score(u)
    assert value.tolist()[1:] == [-math.inf] * 2
    assert score[1:].tolist() == [[0.0], [0.0]]
    assert log_joint.value(u).tolist()[1:] == [-math.inf] * 2


def test_many_points_are_evaluated_in_parts():
    log_joint = LogJoint(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    u = torch.randn(5000, 1)
    close(log_joint.value(u), dist.Normal(0, 1).log_prob(u)[:, 0], 1e-6)
    assert log_joint.value_and_score(u)[1].shape == (5000, 1)


def test_the_callers_tensors_get_no_gradient():
    log_joint = LogJoint(scalar)
    u = points(log_joint)
    log_joint.value_and_score(u)
    assert not u.requires_grad
    u.requires_grad_()
    log_joint(u).sum().backward()
    assert u.grad.shape == u.shape


def test_nothing_is_left_in_pyros_store_or_seen_by_a_handler_outside():
    with poutine.trace() as trace:
        LogJoint(scalar)(torch.zeros(2, 1).double())
    assert not trace.trace.nodes
    assert not list(pyro.get_param_store().keys())


# Likelihoods and predictions


def test_log_likelihood_by_observation():
    y = tensor([1.0, 2.0, 3.0])

    def model():
        mean = pyro.sample("mean", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", 3), poutine.scale(scale=10.0):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        pyro.sample("event", dist.Normal(mean, 1.0).expand([2]).to_event(1), obs=y[:2])
        pyro.factor("f", mean)

    log_joint = LogJoint(model)
    u = points(log_joint)
    found = log_joint.log_likelihood(u)
    assert list(found) == ["y", "event"]
    close(found["y"], dist.Normal(u, 1.0).log_prob(y))  # what an observation weighs in the fit is not its density
    close(found["event"], dist.Normal(u, 1.0).log_prob(y[:2]).sum(-1))


@pytest.mark.parametrize("mode", MODES)
def test_predictions_draw_the_observations_anew(mode):
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            mean = pyro.deterministic("mean", slope * x)
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    log_joint = LogJoint(model, (torch.ones(3), torch.ones(3)), vectorize=mode)
    u = torch.linspace(-1, 1, 40)[:, None]
    for args in ((torch.arange(5.0),), (torch.arange(5.0), 100 * torch.ones(5))):
        found = log_joint.predict(u, args, {})
        assert {name: tuple(value.shape) for name, value in found.items()} == {"mean": (40, 5), "y": (40, 5)}
        close(found["mean"], u * torch.arange(5.0), 1e-6)
        assert 0.08 < (found["y"] - found["mean"]).std() < 0.12


def test_a_conditioned_model_is_predicted_anew():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 0.1))

    log_joint = LogJoint(pyro.condition(model, {"y": torch.tensor(100.0)}))
    assert log_joint.names == ["mean"]
    assert log_joint.predict(torch.zeros(5, 1), (), {})["y"].abs().max() < 1


def test_a_reparametrised_site_is_a_function_of_the_latents():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            theta = pyro.sample("theta", dist.Normal(mean, 2.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.ones(3))

    log_joint = LogJoint(poutine.reparam(model, {"theta": LocScaleReparam(0.0)}))
    assert log_joint.names == ["mean", "theta_decentered"]
    assert list(log_joint.structure.observations) == ["y"]
    u = points(log_joint)
    theta = u[:, :1] + 2 * u[:, 1:]
    values = log_joint.constrain(u, deterministic=True)
    close(values["theta"], theta)
    assert list(log_joint.log_likelihood(u)) == ["y"]
    close(log_joint.predict(u, (), {})["theta"], theta)
    wanted = dist.Normal(0, 1).log_prob(u).sum(-1) + dist.Normal(theta, 1.0).log_prob(torch.ones(3)).sum(-1)
    close(log_joint(u), wanted, 1e-5)


@pytest.mark.parametrize("observed", [True, False])
def test_a_masked_latent_is_refused_unless_something_holds_it(observed):
    def model():
        with pyro.plate("rows", 3):
            with poutine.mask(mask=torch.tensor([True, False, False])):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z if observed else 0.0, 1.0), obs=torch.ones(3))

    if observed:
        assert LogJoint(model).dim == 3
    else:
        with pytest.raises(ValueError, match="depends on every latent; got one that is flat in 2 of 3 of site 'z'"):
            LogJoint(model)


def test_an_improper_prior_without_data_is_refused():
    def model():
        pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="flat in 1 of 1 of site 'x'.*neither a prior nor data"):
        LogJoint(model)


def test_the_observed_rows_of_obs_mask_are_flat_latents():
    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones(3), obs_mask=torch.tensor([True, False, True]))

    with pytest.raises(ValueError, match="flat in 2 of 3 of site 'y_unobserved', for example .*by obs_mask"):
        LogJoint(model)


def test_plates_in_sequence():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", 3):
            z = pyro.sample(f"z{i}", dist.Normal(x, 1.0))
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    log_joint = LogJoint(model)
    u = points(log_joint)
    wanted = dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + dist.Normal(u[:, :1], 1.0).log_prob(u[:, 1:]).sum(-1)
    close(log_joint(u), wanted + dist.Normal(u[:, 1:], 1.0).log_prob(torch.tensor(1.0)).sum(-1), 1e-5)


# The rows of a subsampled plate


def test_the_rows_of_the_first_run_are_kept():
    y = torch.arange(10.0)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 10, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])

    log_joint = LogJoint(model)
    assert log_joint.structure.subsampled == ["rows"]
    rows = log_joint.structure.fixed["rows"]
    u = points(log_joint)
    wanted = dist.Normal(0, 10.0).log_prob(u[:, 0]) + 5 * dist.Normal(u, 1.0).log_prob(y[rows]).sum(-1)
    for _ in range(3):
        close(log_joint(u), wanted, 1e-4)


# What is refused


def no_latents():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def local_latents():
    with pyro.plate("rows", 10, subsample_size=2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def counts():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("n", dist.Poisson(3.0))


def angle():
    pyro.sample("angle", dist.VonMises(0.0, 1.0))


def direction():
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def varying_names():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample(f"y{float(x)}", dist.Normal(0.0, 1.0))


def varying_shapes():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.zeros(1 + int(1000 * abs(float(x)))), 1.0).to_event(1))


def impossible():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", (0 * x).log())


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: LogJoint(no_latents), ValueError, "expected a model with continuous latent sites; got none"),
        (
            lambda: LogJoint(local_latents),
            ValueError,
            "expected latents outside subsampled plates, .*; got site 'z' in plate 'rows', which draws 2 of its rows: "
            "use AmortizedFlow",
        ),
        (lambda: LogJoint(counts), ValueError, "discrete ones of finite support, .*; got site 'n' of Poisson"),
        (
            lambda: LogJoint(angle),
            ValueError,
            "expected latents with a density over the reals .*; got site 'angle' of VonMises, whose density is ",
        ),
        (
            lambda: LogJoint(direction),
            ValueError,
            "expected latents whose support has a bijection from the reals; got site 'direction' with support Sphere",
        ),
        (
            lambda: LogJoint(varying_names),
            ValueError,
            "expected the same latent sites in every run of the model; got changes in 'y",
        ),
        (
            lambda: LogJoint(varying_shapes),
            ValueError,
            "expected latents of one shape in every run; got .* at site 'y'",
        ),
        (
            lambda: LogJoint(impossible),
            ValueError,
            "expected a finite log joint density near the prior median; got -inf there",
        ),
        (lambda: LogJoint(3), TypeError, "expected a Pyro model, a callable; got int"),
        (lambda: LogJoint(scalar, vectorize="fast"), ValueError, "expected vectorize to be one of 'auto', 'plate', "),
        (
            lambda: LogJoint(scalar)(torch.zeros(3)),
            ValueError,
            r"expected points of shape \(points, 1\); got \(3,\)",
        ),
        (
            lambda: LogJoint(vector).unconstrain({}),
            ValueError,
            r"expected values of 'x' of shape \(points, 3\); got none",
        ),
        (
            lambda: LogJoint(vector).unconstrain({"x": torch.zeros(3)}),
            ValueError,
            r"expected values of 'x' of shape \(points, 3\); got \(3,\)",
        ),
        (
            lambda: LogJoint(scalar).unconstrain({"scale": 1.0}),
            ValueError,
            r"expected values of 'scale' of shape \(points,\); got float",
        ),
        (
            lambda: LogJoint(bounded).unconstrain(dict.fromkeys("abc", torch.ones(3)) | {"d": torch.ones(2)}),
            ValueError,
            r"expected the same number of values of each site; got \[2, 3\]",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_fault_of_the_model_is_raised_as_it_is():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0).expand([2]).to_event(1), obs=torch.ones(2) @ torch.ones(3))

    with pytest.raises(RuntimeError, match="size"):
        LogJoint(model)


@pytest.mark.parametrize("mode", ["plate", "loop"])
def test_prior_draws_have_the_priors_moments(mode):
    def model():
        scale = pyro.sample("scale", dist.LogNormal(tensor(1.0), 0.5))
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.Normal(10.0, scale))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=tensor(5.0))

    n = 4000 if mode == "plate" else 500
    draws = LogJoint(model, vectorize=mode).prior_draws(n)
    assert draws.shape == (n, 4)
    assert draws.dtype == torch.float64
    error = 5 / n**0.5
    close(draws.mean(0), tensor([1.0, 10.0, 10.0, 10.0]), 3 * error)
    assert float(draws[:, 0].std()) == pytest.approx(0.5, abs=error)
    assert float((draws[:, 1:] - 10).div(draws[:, :1].exp()).std()) == pytest.approx(1, abs=error)


@pytest.mark.parametrize("model", [garch, improper_ordered, simplex, correlation, interval_of_another, mixture])
def test_prior_draws_of_any_support(model):
    log_joint = LogJoint(model, (tensor([0.0, 3.0, 4.0]),) if model is mixture else ())
    state = torch.get_rng_state()
    draws = log_joint.prior_draws(20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert draws.shape == (20, log_joint.dim)
    assert log_joint.value(draws).isfinite().any()
    assert (draws.std(0) > 0.01).all()
    assert torch.equal(draws, log_joint.prior_draws(20, seed=1))


@pytest.mark.parametrize("limit, few, many", [(10.0, 15, 35), (0.0, 0, 0)])
def test_prior_draws_that_fail_are_left_out(limit, few, many):
    limits = [math.inf]

    def model():
        x = pyro.sample("x", dist.Normal(tensor(0.0), 10.0))
        if x.abs().max() > limits[0]:
            raise RuntimeError("too far")
        pyro.factor("f", -x)

    log_joint = LogJoint(model)
    limits[0] = limit
    draws = log_joint.prior_draws(40)
    assert few <= len(draws) <= many
    assert draws.shape[1:] == (1,)
    assert (draws.abs() <= limit).all()
