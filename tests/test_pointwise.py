"""Elementwise layers and permutations: closed forms, log-determinants, edges and error messages."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import constraints

from pyroflows.layers.pointwise import ElementwiseAffine, Logit, Sigmoid, Standardize
from pyroflows.layers.rearrange import Permutation
from pyroflows.priors import LogitNormal

torch.set_num_threads(1)


def affine(shape):
    layer = ElementwiseAffine(shape)
    with torch.no_grad():
        layer.shift.normal_()
        layer.log_scale.normal_()
    return layer


LAYERS = {
    "affine": affine,
    "sigmoid": Sigmoid,
    "sigmoid_alpha": lambda shape: Sigmoid(shape, alpha=0.05),
    "logit": Logit,
    "logit_alpha": lambda shape: Logit(shape, alpha=0.05),
    "standardize": lambda shape: Standardize(torch.randn(shape), torch.rand(shape) + 0.5),
}
VECTOR_LAYERS = {"reverse": lambda n: Permutation(n, "reverse"), "random": lambda n: Permutation(n, seed=0)}


def latent(name, shape):
    return 0.02 + 0.96 * torch.rand(shape, dtype=torch.float64) if "logit" in name else torch.randn(shape).double()


@pytest.mark.parametrize("name", LAYERS | VECTOR_LAYERS)
@pytest.mark.parametrize("features", [1, 2, 5, 17])
def test_round_trip_and_log_det(name, features):
    torch.manual_seed(0)
    layer = (LAYERS | VECTOR_LAYERS)[name](features).double()
    for batch in [(), (3,), (2, 3), (0,)]:
        x = latent(name, (*batch, features))
        y, forward = layer.forward_and_log_det(x)
        back, backward = layer.inverse_and_log_det(y)
        assert forward.shape == backward.shape == torch.Size(batch)
        assert y.dtype == forward.dtype == torch.float64
        torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(backward, -forward, rtol=1e-10, atol=1e-10)
    x = latent(name, (features,))
    jacobian = torch.autograd.functional.jacobian(lambda x: layer.forward_and_log_det(x)[0], x)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(layer.forward_and_log_det(x)[1], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_event_shapes(name):
    torch.manual_seed(0)
    layer = LAYERS[name]((3, 2, 2)).double()
    x = latent(name, (4, 3, 2, 2))
    y, log_det = layer.forward_and_log_det(x)
    assert y.shape == x.shape
    assert log_det.shape == (4,)
    rows = torch.func.vmap(layer.forward_and_log_det)(x)
    torch.testing.assert_close(rows[0], y)
    torch.testing.assert_close(rows[1], log_det)
    torch.testing.assert_close(layer.inverse_and_log_det(y)[0], x)
    assert "(3, 2, 2)" in repr(layer)


# ElementwiseAffine


def test_an_affine_normal_is_a_normal():
    torch.manual_seed(0)
    layer = affine(3)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [layer])
    y = torch.randn(10, 3)
    expected = dist.Normal(layer.shift, layer.log_scale.exp()).to_event(1).log_prob(y)
    torch.testing.assert_close(flow.log_prob(y), expected)
    assert [name for name, _ in layer.named_parameters()] == ["shift", "log_scale"]


@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_affine_of_a_context(shape):
    torch.manual_seed(0)
    layer = ElementwiseAffine(shape, context_features=2).double()
    context = torch.randn(5, 2, dtype=torch.float64)
    x = torch.randn(7, 1, *shape, dtype=torch.float64)
    torch.testing.assert_close(layer.forward_and_log_det(x, context)[0], x.expand(7, 5, *shape))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    y, forward = layer.forward_and_log_det(x, context)
    assert forward.shape == (7, 5)
    back, backward = layer.inverse_and_log_det(y, context)
    torch.testing.assert_close(back, x.expand(7, 5, *shape))
    torch.testing.assert_close(backward, -forward)
    row = torch.autograd.functional.jacobian(lambda x: layer.forward_and_log_det(x, context[2])[0], x[3, 0])
    size = math.prod(shape)
    torch.testing.assert_close(torch.linalg.slogdet(row.reshape(size, size)).logabsdet, forward[3, 2])
    backward.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


# Sigmoid and Logit


def test_sigmoid_makes_a_normal_a_logit_normal():
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(1), 1.0).to_event(1), [Sigmoid(1)])
    y = torch.linspace(0.01, 0.99, 50).unsqueeze(-1)
    expected = LogitNormal(torch.zeros(1), torch.ones(1)).to_event(1).log_prob(y)
    torch.testing.assert_close(flow.log_prob(y), expected)


@settings(max_examples=100, deadline=None)
@given(x=st.floats(-700, 700), alpha=st.sampled_from([0.0, 1e-6, 0.05]))
def test_sigmoid_log_det_far_out(x, alpha):
    log_det = Sigmoid(1, alpha).forward_and_log_det(torch.tensor([x], dtype=torch.float64))[1].item()
    expected = -abs(x) - 2 * math.log1p(math.exp(-abs(x))) - math.log1p(-2 * alpha)
    assert log_det == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_sigmoid_near_zero_is_exact():
    y = torch.tensor([1e-300, 1e-30, 1e-3], dtype=torch.float64).unsqueeze(-1)
    x, log_det = Sigmoid(1).inverse_and_log_det(y)
    again, forward = Sigmoid(1).forward_and_log_det(x)
    torch.testing.assert_close(again, y, rtol=1e-12, atol=0)
    torch.testing.assert_close(forward, -log_det, rtol=1e-13, atol=0)


def test_alpha_is_that_of_realnvp():
    y = torch.linspace(0, 1, 11, dtype=torch.float64).unsqueeze(-1)
    x, _ = Sigmoid(1, alpha=0.05).inverse_and_log_det(y)
    torch.testing.assert_close(x, torch.logit(0.05 + 0.9 * y))
    torch.testing.assert_close(Logit(1, alpha=0.05).forward_and_log_det(y)[0], x)


def test_data_outside_is_refused_not_clamped():
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    flow = dist.TransformedDistribution(normal, [Sigmoid(2)], validate_args=True)
    with pytest.raises(ValueError, match="support"):
        flow.log_prob(torch.tensor([0.5, 1.5]))
    assert Sigmoid(2).inverse_and_log_det(torch.tensor([0.5, 1.5]))[0][1].isnan()
    assert isinstance(Sigmoid(2).codomain, constraints.independent)
    assert not Sigmoid(1, 0.05).codomain.check(torch.tensor([1.06]))
    assert Sigmoid(1, 0.05).codomain.check(torch.tensor([1.05]))
    assert Sigmoid(1).inv.domain.check(torch.tensor([0.5]))


@pytest.mark.parametrize("alpha", [-0.1, 0.5, float("nan")])
@pytest.mark.parametrize("family", [Sigmoid, Logit])
def test_bad_alpha(family, alpha):
    with pytest.raises(ValueError, match=r"expected alpha in \[0, 0.5\); got"):
        family(2, alpha)


# Standardize


def test_standardize_from_data():
    torch.manual_seed(0)
    y = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3]) + torch.tensor([5.0, 0.0, -1e3])
    layer = Standardize.from_data(y)
    x, log_det = layer.inverse_and_log_det(y)
    torch.testing.assert_close(x.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(3).double())
    torch.testing.assert_close(log_det, -layer.std.log().sum().expand(500))
    assert set(layer.state_dict()) == {"mean", "std"}
    assert not list(layer.parameters())
    assert Standardize.from_data(torch.rand(10, 3, 2, 2)).latent_shape == (3, 2, 2)


def test_standardize_names_the_columns_it_refuses():
    y = torch.rand(100, 4)
    y[:, 1], y[:, 3] = 0.1, 7.0
    with pytest.raises(ValueError, match="expected columns that vary; got a constant in column 1, 3"):
        Standardize.from_data(y)
    y[5, 2] = math.nan
    with pytest.raises(ValueError, match="expected finite data; got other values in column 2"):
        Standardize.from_data(y)
    with pytest.raises(ValueError, match="expected a positive std; got zero or less in column 0"):
        Standardize(torch.zeros(2), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"expected mean and std of one shape \(features,\); got \(2,\) and \(3,\)"):
        Standardize(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"with at least 2 rows; got \(1, 4\)"):
        Standardize.from_data(torch.rand(1, 4))


# Permutation


@settings(max_examples=50, deadline=None)
@given(order=st.integers(1, 12).flatmap(lambda n: st.permutations(range(n))))
def test_permutation_in_any_order(order):
    features = len(order)
    x = torch.randn(2, features)
    layer = Permutation(features, order)
    y = layer(x)
    assert all((y[:, i] == x[:, j]).all() for i, j in enumerate(order))
    assert torch.equal(Permutation(features, torch.tensor(order)).inv(y), x)


def test_permutation_orders():
    assert Permutation(3, "reverse").order.tolist() == [2, 1, 0]
    assert torch.equal(Permutation(50, seed=3).order, Permutation(50, seed=3).order)
    assert not torch.equal(Permutation(50, seed=3).order, Permutation(50, seed=4).order)
    fresh = Permutation(50, seed=5)
    fresh.load_state_dict(Permutation(50, seed=3).state_dict())
    x = torch.randn(50)
    assert torch.equal(fresh.inverse_and_log_det(fresh.forward_and_log_det(x)[0])[0], x)
    rows = torch.randn(4, 50)
    assert torch.equal(torch.func.vmap(fresh.forward_and_log_det)(rows)[0], fresh(rows))
    assert repr(Permutation(3, "reverse")) == "Permutation(3, order=[2, 1, 0])"


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1], [1, 2, 3], [0.0, 1.0, 2.0], "backwards", [[0, 1, 2]]])
def test_no_permutation(order):
    with pytest.raises(ValueError, match="expected order to be .*; got"):
        Permutation(3, order)


def test_one_graph():
    torch.manual_seed(0)
    layers = [affine(3), Standardize(torch.zeros(3), torch.ones(3)), Permutation(3, "reverse"), Sigmoid(3)]

    def score(y):
        total = 0
        for layer in reversed(layers):
            y, log_det = layer.inverse_and_log_det(y)
            total = total + log_det
        return y, total

    y = torch.rand(4, 3)
    for one, other in zip(torch.compile(score, fullgraph=True, backend="eager")(y), score(y), strict=True):
        torch.testing.assert_close(one, other)
