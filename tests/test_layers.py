"""Layers against closed forms, and what only they do: splines, linear maps, norms that start from data."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from contract import make, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_expit, softmax
from scipy.stats import multivariate_normal, norm

from pyroflows import (
    ActNorm,
    Affine,
    BatchNorm,
    Compose,
    Coupling,
    DenseLinear,
    ElementwiseAffine,
    Flow,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    Permutation,
    Spline,
    StandardNormal,
    fit,
    realnvp,
)
from pyroflows.layers import Additive
from pyroflows.layers.transformers import num_parameters, split_by_feature

# The spline, against a scalar implementation of the formulas of arXiv:1906.04032, section 3.1 and appendix A.


def reference_spline(x, raw, *, num_bins, bound, min_size, min_derivative):
    """One number through one spline, in numpy, bin by bin: ``(y, log dy/dx)``."""
    if not -bound < x < bound:
        return x, 0.0
    widths = 2 * bound * (min_size + (1 - min_size * num_bins) * softmax(raw[:num_bins]))
    heights = 2 * bound * (min_size + (1 - min_size * num_bins) * softmax(raw[num_bins : 2 * num_bins]))
    unit = math.log(math.expm1(1 - min_derivative))
    inner = min_derivative + np.logaddexp(0, np.asarray(raw[2 * num_bins :]) + unit)
    derivatives = [1.0, *inner, 1.0]
    left, bottom = -bound, -bound
    for k in range(num_bins):
        if x < left + widths[k] or k == num_bins - 1:
            break
        left, bottom = left + widths[k], bottom + heights[k]
    s, d0, d1 = heights[k] / widths[k], derivatives[k], derivatives[k + 1]
    xi = (x - left) / widths[k]
    denominator = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
    y = bottom + heights[k] * (s * xi**2 + d0 * xi * (1 - xi)) / denominator
    slope = s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / denominator**2
    return y, math.log(slope)


@pytest.mark.parametrize(
    "num_bins, bound, min_size, min_derivative", [(2, 1.0, 1e-3, 1e-3), (8, 3.0, 1e-3, 1e-3), (5, 4.0, 0.05, 0.1)]
)
def test_spline_agrees_with_the_formulas(num_bins, bound, min_size, min_derivative):
    spline = Spline(num_bins=num_bins, bound=bound, min_size=min_size, min_derivative=min_derivative)
    x = 1.5 * bound * (2 * torch.rand(300).double() - 1)
    raw = 2 * torch.randn(300, num_parameters(spline)).double()
    parameters = split_by_feature(spline, raw, x)
    y, log_det = spline.forward(x, *parameters)
    options = {"num_bins": num_bins, "bound": bound, "min_size": min_size, "min_derivative": min_derivative}
    wanted = np.array([reference_spline(a, b, **options) for a, b in zip(x.tolist(), raw.numpy(), strict=True)])
    np.testing.assert_allclose(y.numpy(), wanted[:, 0], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(log_det.numpy(), wanted[:, 1], rtol=1e-9, atol=1e-9)
    back, log_det_back = spline.inverse(y, *parameters)
    np.testing.assert_allclose(back.numpy(), x.numpy(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(log_det_back.numpy(), -wanted[:, 1], rtol=1e-7, atol=1e-7)


@given(
    x=st.floats(-10, 10),
    raw=st.lists(st.floats(-30, 30), min_size=14, max_size=14),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=200)
def test_spline_is_increasing_finite_and_stays_in_its_interval(x, raw, dtype):
    spline = Spline(num_bins=5)
    points = torch.tensor([x, x + 0.125, -3.0, 3.0, -3 + 1e-6, 3 - 1e-6, 0.0], dtype=dtype)
    parameters = split_by_feature(spline, torch.tensor(raw, dtype=dtype).expand(7, 14), points)
    y, log_det = spline.forward(points, *parameters)
    back, log_det_back = spline.inverse(points, *parameters)
    for tensor in (y, log_det, back, log_det_back):
        assert tensor.isfinite().all()
        assert tensor.dtype == dtype
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    assert y[1] >= y[0] - slack
    assert back[1] >= back[0] - slack
    inside = points.abs() <= 3
    assert (y[inside].abs() <= 3 + slack).all()
    assert torch.equal(y[~inside], points[~inside])


def test_spline_has_finite_gradients_everywhere():
    spline = Spline(num_bins=4)
    x = torch.tensor([-1e8, -3.0, 0.0, 3.0, 5.0, 1e30]).requires_grad_()
    raw = torch.randn(6, 11, requires_grad=True)
    for method in (spline.forward, spline.inverse):
        y, log_det = method(x, *split_by_feature(spline, raw, x))
        gradients = torch.autograd.grad((y + log_det).sum(), (x, raw))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("transformer", [Affine(), Additive(), Spline(num_bins=4)])
def test_transformers_are_the_identity_at_zero(transformer):
    x = torch.randn(5, 3)
    parameters = split_by_feature(transformer, torch.zeros(5, 3, num_parameters(transformer)), x)
    for method in (transformer.forward, transformer.inverse):
        y, log_det = method(x, *parameters)
        torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
        torch.testing.assert_close(log_det, torch.zeros(5, 3), rtol=0, atol=1e-6)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_affine_keeps_its_scale_in_bounds(shift, raw):
    parameters = torch.tensor([shift, raw], dtype=torch.float64).unbind()
    _, log_scale = Affine(bound=2.0).forward(torch.zeros(()).double(), *parameters)
    assert -2 <= log_scale <= 2
    _, log_scale = Affine(scale="sigmoid").forward(torch.zeros(()).double(), *parameters)
    np.testing.assert_allclose(log_scale.item(), -log_expit(raw + 2), rtol=1e-7, atol=1e-12)


def test_flows_start_as_the_identity():
    x = torch.randn(5, 4)
    for layer in (
        Coupling(4),
        Coupling(4, transformer="spline"),
        MaskedAutoregressive(4),
        Coupling(4, context_features=2),
    ):
        context = torch.randn(5, 2) if layer.context_features else None
        torch.testing.assert_close(layer.forward_and_log_det(x, context)[0], x, rtol=0, atol=1e-6)


# Couplings and autoregressive layers


def test_coupling_keeps_what_its_mask_says():
    x = torch.randn(5, 5).double()
    for options, moved in (
        ({}, [2, 3, 4]),
        ({"flip": True}, [0, 1]),
        ({"mask": "checkerboard"}, [0, 2, 4]),
        ({"mask": "checkerboard", "flip": True}, [1, 3]),
        ({"mask": [False, True, False, False, False]}, [1]),
    ):
        layer = perturb(Coupling(5, hidden_features=(8,), **options).double(), 0.5)
        changed = (layer(x) != x).any(0)
        assert changed.nonzero().flatten().tolist() == moved


@given(
    features=st.integers(1, 8),
    mask=st.sampled_from(["halves", "checkerboard"]),
    flip=st.booleans(),
    batch=st.lists(st.integers(0, 3), max_size=2),
)
@settings(max_examples=40)
def test_coupling_shapes(features, mask, flip, batch):
    layer = Coupling(features, mask=mask, flip=flip, hidden_features=(4,))
    y, log_det = layer.forward_and_log_det(torch.zeros(*batch, features))
    assert y.shape == (*batch, features)
    assert log_det.shape == tuple(batch)
    assert 1 <= layer.num_transformed <= features


@given(features=st.integers(1, 6), seed=st.integers(0, 20))
@settings(max_examples=20)
def test_autoregressive_jacobian_is_triangular_in_its_order(features, seed):
    torch.manual_seed(seed)
    layer = perturb(MaskedAutoregressive(features, order="random", hidden_features=(8,)).double(), 0.3)
    x = torch.randn(features).double()
    order = layer.conditioner.order
    for method in (layer.forward_and_log_det, layer.inverse_and_log_det):
        jacobian = torch.autograd.functional.jacobian(lambda v, m=method: m(v)[0], x)[order][:, order]
        assert torch.equal(jacobian.triu(1), torch.zeros(features, features).double())
        torch.testing.assert_close(jacobian.diagonal().log().sum(), method(x)[1])


def test_autoregressive_inverse_survives_wild_values():
    layer = perturb(MaskedAutoregressive(4, hidden_features=(8,)), 0.1)
    y = torch.tensor([[0.5, 1e30, -1e30, 3.0]])
    assert layer(y).isfinite().all()


# Linear maps


@pytest.mark.parametrize("features", [1, 2, 6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("init", ["orthogonal", "identity"])
@pytest.mark.parametrize("family", [LULinear, DenseLinear])
def test_linear_is_its_matrix(family, init, bias, features):
    layer = perturb(family(features, init=init, bias=bias).double(), 0.1)
    weight = (layer.weight() if family is LULinear else layer.weight).detach().numpy()
    shift = layer.bias.detach().numpy() if bias else 0
    y = torch.randn(7, features).double()
    x, log_det = layer.inverse_and_log_det(y)
    np.testing.assert_allclose(x.detach().numpy(), y.numpy() @ weight.T + shift, atol=1e-12)
    np.testing.assert_allclose(log_det.detach().numpy(), np.linalg.slogdet(weight).logabsdet, atol=1e-12)
    back, log_det = layer.forward_and_log_det(x)
    np.testing.assert_allclose(back.detach().numpy(), y.numpy(), atol=1e-12)
    np.testing.assert_allclose(log_det.detach().numpy(), -np.linalg.slogdet(weight).logabsdet, atol=1e-12)


@pytest.mark.parametrize("family", [LULinear, DenseLinear])
def test_linear_starts(family):
    layer = family(5, init="identity")
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), x)
    layer = family(5)
    torch.testing.assert_close(layer(x).norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(layer(x), x)


def test_permutation_is_its_order():
    layer = Permutation(4, [2, 0, 3, 1])
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), x[:, [2, 0, 3, 1]])
    assert torch.equal(layer.inv(layer(x).clone()), x)
    assert torch.equal(Permutation(9, "random", seed=5).order, Permutation(9, "random", seed=5).order)


# Anchors: an affine flow of a normal is a normal


def test_affine_flow_of_a_normal_is_a_normal():
    layer = perturb(ElementwiseAffine(3).double(), 0.5)
    flow = Flow(StandardNormal(3).double(), layer)
    x = torch.randn(20, 3).double()
    wanted = norm(layer.shift.detach(), layer.log_scale.detach().exp()).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(flow.log_prob(x).detach(), wanted, rtol=1e-12)


def test_linear_flow_of_a_normal_is_a_normal():
    layers = [perturb(layer.double(), 0.2) for layer in (LULinear(3), DenseLinear(3), ActNorm(3))]
    layers.append(Permutation(3, [1, 2, 0]))
    flow = Flow(StandardNormal(3), layers).double()
    origin = flow.bijection(torch.zeros(3).double()).detach()
    matrix = torch.autograd.functional.jacobian(flow.bijection, torch.zeros(3).double())
    x = torch.randn(20, 3).double()
    wanted = multivariate_normal(origin.numpy(), (matrix @ matrix.T).numpy()).logpdf(x.numpy())
    np.testing.assert_allclose(flow.log_prob(x).detach(), wanted, rtol=1e-10)
    torch.manual_seed(0)
    sample = flow.sample((20_000,))
    torch.testing.assert_close(sample.T.cov(), matrix @ matrix.T, rtol=0.1, atol=0.1)


def test_autoregressive_affine_of_a_normal_is_the_chain_of_conditionals():
    layer = make("autoregressive, affine", 3)
    flow = Flow(StandardNormal(3).double(), layer)
    y = torch.randn(6, 3).double()
    shift, raw = layer.conditioner(y).unbind(-1)
    scale = (5 * torch.tanh(raw / 5)).exp()
    wanted = norm(shift.detach(), scale.detach()).logpdf(y.numpy()).sum(-1)
    np.testing.assert_allclose(flow.log_prob(y).detach(), wanted, rtol=1e-10)


# ActNorm


def test_actnorm_starts_from_its_first_batch():
    layer = ActNorm(3)
    y = torch.tensor([1.0, -2.0, 100.0]) + torch.tensor([0.1, 5.0, 30.0]) * torch.randn(500, 3)
    x = layer.inv(y)
    torch.testing.assert_close(x.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(3))
    assert layer.initialized
    before = layer.state_dict()
    layer.inv(10 * y)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_actnorm_of_an_image_shape():
    layer = ActNorm((2, 3))
    x = layer.inv(4 + 3 * torch.randn(200, 2, 3))
    torch.testing.assert_close(x.mean(0), torch.zeros(2, 3), rtol=0, atol=1e-4)
    assert layer.forward_and_log_det(x)[1].shape == (200,)


def test_actnorm_in_evaluation_never_starts():
    layer = ActNorm(2).eval()
    y = 5 + torch.randn(10, 2)
    assert torch.equal(layer.inv(y), y)
    assert not layer.initialized
    layer.train()
    assert not torch.equal(layer.inv(y.clone()), y)


def test_actnorm_takes_the_mean_alone_from_one_row_and_from_a_constant_column():
    layer = ActNorm(2)
    assert torch.equal(layer.inv(torch.tensor([[3.0, -4.0]])), torch.zeros(1, 2))
    assert torch.equal(layer.log_scale.detach(), torch.zeros(2))
    layer = ActNorm(2)
    y = torch.stack([torch.randn(100) * 5, torch.full((100,), 0.1)], 1)
    x = layer.inv(y)
    assert layer.log_scale[1] == 0
    assert x.isfinite().all()
    torch.testing.assert_close(x[:, 1], torch.zeros(100))
    layer = ActNorm(2)
    layer.inv(torch.tensor([3.0, -4.0]))
    assert layer.shift.tolist() == [3.0, -4.0]


def test_actnorm_does_not_start_from_nothing():
    layer = ActNorm(2)
    layer.inv(torch.zeros(0, 2))
    assert not layer.initialized
    assert layer.shift.isfinite().all()


def test_actnorm_starts_as_the_identity_where_training_comes_from_the_latent():
    layer = ActNorm(2)
    with torch.no_grad():
        layer(torch.randn(5, 2))
    assert not layer.initialized  # only looked at
    x = 3 + torch.randn(5, 2)
    torch.testing.assert_close(layer(x), x)
    assert layer.initialized
    assert torch.equal(layer.inv(x.clone()), x)


def test_actnorm_flag_travels_with_the_state():
    layer = ActNorm(2)
    layer.inv(5 + torch.randn(50, 2))
    assert "initialized" in layer.state_dict()
    fresh = ActNorm(2)
    fresh.load_state_dict(layer.state_dict())
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        y = 100 + torch.randn(10, 2)
        torch.testing.assert_close(other.train().inv(y), layer.eval().inv(y.clone()))
        layer.train()
    unstarted = ActNorm(2)
    layer.load_state_dict(unstarted.state_dict())
    layer.inv(7 + torch.randn(50, 2))
    torch.testing.assert_close(layer.shift.detach(), torch.full((2,), 7.0), rtol=0, atol=1)


def test_actnorm_does_not_start_under_vmap():
    layer = ActNorm(2)
    y = 5 + torch.randn(10, 2)
    torch.func.vmap(layer.inverse_and_log_det)(y)
    assert not layer.initialized
    layer.inv(y)
    assert layer.initialized


def test_actnorms_of_a_stack_start_in_one_pass():
    flow = realnvp(3, num_layers=3)
    flow.log_prob(50 + 20 * torch.randn(200, 3))
    assert all(layer.initialized for layer in flow.layers if isinstance(layer, ActNorm))
    z = flow.bijection.inverse_and_log_det(flow.sample((100,)))[0]
    assert z.abs().max() < 10


def test_actnorm_starts_the_same_through_the_distribution():
    torch.manual_seed(0)
    flow = realnvp(2, num_layers=2)
    twin = copy.deepcopy(flow)
    x = 5 + 2 * torch.randn(100, 2)
    torch.testing.assert_close(flow().log_prob(x), twin.log_prob(x))
    torch.testing.assert_close(flow().log_prob(x), twin.log_prob(x))


def test_actnorm_starts_without_gradients_and_in_float64():
    layer = ActNorm(2).double()
    with torch.no_grad():
        layer.inv(5 + torch.randn(100, 2).double())
    assert layer.initialized
    y = (5 + torch.randn(100, 2).double()).requires_grad_()
    layer = ActNorm(2).double()
    layer.inv(y).sum().backward()
    torch.testing.assert_close(y.grad, (-layer.log_scale).exp().expand(100, 2))


def test_actnorm_inside_an_inverse_starts():
    layer = Inverse(ActNorm(2))
    x = layer(5 + 2 * torch.randn(100, 2))
    assert x.mean().abs() < 1e-4


# BatchNorm


def test_batchnorm_uses_the_batch_in_training_and_its_averages_in_evaluation():
    layer = BatchNorm(3, momentum=0.25).double()
    y = 4 + 3 * torch.randn(200, 3).double()
    x, log_det = layer.inverse_and_log_det(y)
    torch.testing.assert_close(x.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(3).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(layer.mean, 0.25 * y.mean(0))
    torch.testing.assert_close(layer.variance, 0.75 + 0.25 * y.var(0, correction=0))
    torch.testing.assert_close(log_det, -0.5 * (y.var(0, correction=0) + 1e-5).log().sum().expand(200))
    mean = layer.mean.clone()
    layer.eval()
    x, log_det = layer.inverse_and_log_det(y)
    torch.testing.assert_close(x, (y - layer.mean) / (layer.variance + 1e-5).sqrt())
    back, log_det_back = layer.forward_and_log_det(x)
    torch.testing.assert_close(back, y)
    torch.testing.assert_close(log_det_back, -log_det)
    assert torch.equal(layer.mean, mean)


def test_batchnorm_set_statistics():
    layer = BatchNorm(2)
    y = 5 + 2 * torch.randn(100, 2)
    layer.set_statistics(y)
    torch.testing.assert_close(layer.mean, y.mean(0))
    torch.testing.assert_close(layer.variance, y.var(0, correction=0))
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*batch, 2\); got \(4, 3\)"):
        layer.set_statistics(torch.zeros(4, 3))


def test_batchnorm_takes_a_single_row_by_its_stored_statistics():
    layer = BatchNorm(2)
    layer.set_statistics(5 + 2 * torch.randn(100, 2))
    y = torch.randn(1, 2)
    torch.testing.assert_close(layer.inv(y), layer.eval().inv(y.clone()))


def test_fit_gives_batchnorms_the_statistics_of_the_train_set():
    flow = realnvp(2, num_layers=2, norm="batchnorm", permutation="none", hidden_features=(8,))
    x = 5 + 2 * torch.randn(300, 2)
    fit(flow, x, validation=x[:50], epochs=2, seed=0, patience=None)
    last = flow.layers[-1]
    assert isinstance(last, BatchNorm)
    torch.testing.assert_close(last.mean, x.mean(0))
    torch.testing.assert_close(last.variance, x.var(0, correction=0))


def test_dropout_is_active_in_training_alone():
    flow = perturb(realnvp(3, num_layers=2, dropout=0.5), 0.1)
    x = torch.randn(5, 3)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x))
    flow.train()
    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))


def test_repr_is_short():
    for layer in (ActNorm(3), LULinear(3), BatchNorm(3), Permutation(3, "reverse"), Compose([ActNorm(2)])):
        assert len(repr(layer)) < 100


@pytest.mark.parametrize("num_bins, scale", [(8, 3.0), (8, 30.0), (32, 10.0)])
def test_spline_inverts_with_wild_parameters_in_float32(num_bins, scale):
    torch.manual_seed(0)
    spline = Spline(num_bins=num_bins)
    parameters = (scale * torch.randn(20_000, 1, num_parameters(spline))).requires_grad_()
    y = (6.2 * torch.rand(20_000, 1) - 3.1).requires_grad_()
    x, log_det = spline.inverse(y, *split_by_feature(spline, parameters, y))
    again, forward_log_det = spline.forward(x, *split_by_feature(spline, parameters, y))
    assert (again - y).abs().max() < 2e-3
    assert (log_det + forward_log_det).abs().max() < 0.05
    for gradient in torch.autograd.grad(x.sum() + log_det.sum(), (y, parameters)):
        assert gradient.isfinite().all()


def test_actnorm_that_was_only_looked_at_starts_anew_with_a_fit():
    torch.manual_seed(0)
    x = 1000 * torch.randn(500, 2) + 5e4
    losses = []
    for look in (False, True):
        torch.manual_seed(0)
        flow = realnvp(2, num_layers=2, hidden_features=(8,))
        if look:
            flow.log_prob(torch.zeros(4, 2))
            flow().rsample()
        losses.append(fit(flow, x, epochs=2, seed=0).best_loss)
    assert losses[0] == losses[1] < 30


def test_batchnorm_keeps_its_averages_where_a_batch_overflows():
    layer = BatchNorm(2)
    layer.inverse_and_log_det(torch.tensor([[1.0, torch.inf], [2.0, 3.0]]))
    assert layer.mean.isfinite().all()
    assert layer.mean[0] > 0


def test_batchnorm_maps_under_vmap_in_training():
    layer, y = BatchNorm(2), torch.randn(5, 3, 2)
    mapped = torch.func.vmap(lambda rows: layer.inverse_and_log_det(rows)[0])(y)
    torch.testing.assert_close(mapped.mean(1), torch.zeros(5, 2), atol=1e-6, rtol=0)
