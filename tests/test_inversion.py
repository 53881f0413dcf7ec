"""Inverting autoregressive layers: exact, with the gradients of a pass a feature, for every network and transformer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyroflows import Affine, MaskedAutoregressive, Spline, fit, iaf, maf
from pyroflows.layers import inversion

NETWORKS = {
    "plain": {"hidden_features": (12, 12)},
    "residual": {"hidden_features": (12, 12), "residual": True, "activation": "silu"},
    "deep": {"hidden_features": (9, 20, 14), "activation": "tanh"},
    "no hidden layer": {"hidden_features": ()},
    "narrow": {"hidden_features": (2, 3)},
    "narrow and residual": {"hidden_features": (3, 3), "residual": True},
    "wide": {"hidden_features": (150, 150)},
}
TRANSFORMERS = {
    "affine": Affine(),
    "sigmoid": Affine(scale="sigmoid"),
    "additive": "additive",
    "spline": Spline(num_bins=5, bound=3.0),
}


def make(features, context_features=0, *, scale=0.3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = MaskedAutoregressive(features, context_features=context_features, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(scale * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return layer


def assert_close(found, wanted, atol):
    torch.testing.assert_close(found, wanted, rtol=atol, atol=atol)


def in_passes(layer, x, context):
    y, log_det = inversion.invert_in_passes(layer.conditioner, layer.transformer, x, context)
    return y, log_det.sum(-1)


def both_ways(layer, x, context):
    """The two ways of inversion, each as it stands alone."""
    made, transformer = layer.conditioner, layer.transformer
    with torch.no_grad():
        yield inversion.invert(made, transformer, x, context)
        yield inversion._by_degree(made, transformer, x, context)


@pytest.mark.parametrize("order", ["sequential", "reversed", "random"])
@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_inverts_to_what_a_pass_a_feature_gives(network, context_features, order):
    for features in (1, 2, 5, 17, 70):
        layer = make(features, context_features, order=order, **NETWORKS[network])
        x = torch.randn(5, features).double()
        context = torch.randn(5, 3).double() if context_features else None
        wanted, log_det = in_passes(layer, x, context)
        for y, terms in both_ways(layer, x, context):
            assert_close(y, wanted, 1e-10)
            assert_close(terms.sum(-1), log_det, 1e-10)


@pytest.mark.parametrize("transformer", TRANSFORMERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_those_of_a_pass_a_feature(network, transformer):
    layer = make(7, 2, transformer=TRANSFORMERS[transformer], order="random", **NETWORKS[network])
    x, context = torch.randn(6, 7).double().requires_grad_(), torch.randn(6, 2).double().requires_grad_()
    weights = torch.randn(6, 7).double()
    inputs = [x, context, *layer.parameters()]
    found = []
    for y, log_det in (in_passes(layer, x, context), layer.forward_and_log_det(x, context)):
        loss = (y * weights).sum() + (log_det * weights[:, 0]).sum()
        found.append(torch.autograd.grad(loss, inputs))
    for (name, _), naive, quick in zip([("x", 0), ("context", 0), *layer.named_parameters()], *found, strict=True):
        assert_close(quick, naive, 1e-8), name


@settings(max_examples=25, deadline=None)
@given(
    features=st.integers(1, 12),
    widths=st.lists(st.integers(1, 30), max_size=3),
    rows=st.integers(0, 40),
    context_features=st.integers(0, 2),
    seed=st.integers(0, 100),
)
def test_round_trip_of_any_shape(features, widths, rows, context_features, seed):
    layer = make(features, context_features, order="random", seed=seed, hidden_features=widths)
    x = torch.randn(rows, features).double()
    context = torch.randn(rows, context_features).double() if context_features else None
    for y, terms in both_ways(layer, x, context):
        back, log_det = layer.inverse_and_log_det(y, context)
        assert_close(back, x, 1e-10)
        assert_close(terms.sum(-1), -log_det, 1e-10)


@pytest.mark.parametrize("rows", [1, 256])
def test_deep_flow_round_trips_in_single_precision(rows):
    torch.manual_seed(0)
    flow = maf(64, num_layers=5, hidden_features=(128, 128), norm="none")
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        z = torch.randn(rows, 64)
        assert_close(flow.encode(flow.decode(z)), z, 1e-5)


@pytest.mark.parametrize("rows", [3, 40])
def test_wild_values_do_not_spoil_the_features_before_them(rows):
    layer = make(30, scale=4.0, hidden_features=(40, 40), transformer=Affine(bound=60.0), dtype=torch.float32)
    x = 5 * torch.randn(rows, 30)
    y = layer.forward_and_log_det(x)[0]
    wanted = in_passes(layer, x, None)[0]
    sure = wanted.double().abs().cummax(-1).values < 1e6
    assert sure[:, 3].all()
    torch.testing.assert_close(y[sure], wanted[sure], rtol=1e-3, atol=1e-3)


def test_few_rows_take_few_passes_and_many_rows_none():
    layer = make(64, hidden_features=(64, 64), scale=0.1)
    calls = []
    layer.conditioner.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        layer(torch.randn(1, 64).double())
        assert 0 < len(calls) < 30
        calls.clear()
        layer(torch.randn(1000, 64).double())
        assert not calls
    layer(torch.randn(1000, 64).double())
    assert len(calls) == 1  # for the gradient


def test_long_dependence_of_few_rows_is_solved_all_the_same():
    layer = MaskedAutoregressive(60, hidden_features=(), transformer="additive").double()
    with torch.no_grad():  # each feature is its noise and twice the feature before: a dependence as long as the row
        weight = layer.conditioner.network.linears[0].weight
        weight.copy_(2 * torch.eye(60).roll(1, 0).tril())
    x = torch.randn(2, 60).double()
    y = layer(x)
    wanted = [x[:, 0]]
    for column in x.T[1:]:
        wanted.append(column + 2 * wanted[-1])
    torch.testing.assert_close(y, torch.stack(wanted, 1), rtol=1e-12, atol=1e-12)


def test_nothing_requires_a_gradient_where_nothing_learns():
    layer = make(5, hidden_features=(8,)).requires_grad_(False)
    assert not layer(torch.randn(3, 5).double()).requires_grad
    assert layer(torch.randn(3, 5).double().requires_grad_()).requires_grad


def test_dropout_in_training_still_draws_and_maps():
    layer = make(5, hidden_features=(64,), dropout=0.5).train()
    assert layer(torch.randn(3, 5).double()).shape == (3, 5)


def test_a_maf_is_a_guide():
    torch.manual_seed(0)
    target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
    flow = maf(2, num_layers=2, hidden_features=(16,))

    def negative_elbo(flow, *_):
        x, log_prob = flow.rsample_and_log_prob((128,))
        return (log_prob - target.log_prob(x)).mean()

    result = fit(flow, objective=negative_elbo, epochs=5, learning_rate=1e-2, seed=0, device="cpu")
    with torch.no_grad():
        x = flow.sample((20_000,))
    assert result.best_loss < 0.02
    torch.testing.assert_close(x.mean(0), target.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(x.T.cov(), target.covariance_matrix, atol=0.07, rtol=0)


@pytest.mark.parametrize("transformer", TRANSFORMERS)
@pytest.mark.parametrize("context_features", [0, 2])
def test_second_derivatives_are_those_of_the_passes(transformer, context_features):
    layer = make(3, context_features, transformer=TRANSFORMERS[transformer], hidden_features=(8,), activation="tanh")
    x, context = torch.randn(3).double(), torch.randn(2).double() if context_features else None

    def total(solve, x):
        y, log_det = solve(x, context)
        return y.square().sum() + log_det

    hessian = torch.autograd.functional.hessian(lambda x: total(layer.forward_and_log_det, x), x)
    expected = torch.autograd.functional.hessian(lambda x: total(lambda *a: in_passes(layer, *a), x), x)
    assert_close(hessian, expected, 1e-8)
    if transformer != "additive":
        assert hessian.abs().max() > 0.1


def test_hessians_of_an_iaf_and_of_a_decoder_agree_with_finite_differences():
    torch.manual_seed(0)
    flows = [build(3, num_layers=2, hidden_features=(8,), activation="tanh").double() for build in (iaf, maf)]
    for flow in flows:
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(3).double()
    for function in (flows[0].log_prob, lambda z: flows[1].decode(z).square().sum()):
        hessian = torch.autograd.functional.hessian(function, x)
        steps = 1e-5 * torch.eye(3).double()
        slopes = [torch.autograd.functional.jacobian(function, x + sign * step) for step in steps for sign in (1, -1)]
        differences = torch.stack([(up - down) / 2e-5 for up, down in zip(slopes[::2], slopes[1::2], strict=True)])
        torch.testing.assert_close(hessian, differences, rtol=1e-5, atol=1e-6)
        assert hessian.abs().max() > 0.01


def test_a_gradient_penalty_has_the_gradients_of_the_passes():
    layer = make(4, 2, hidden_features=(8,), activation="tanh")
    x, context = torch.randn(5, 4).double(), torch.randn(5, 2).double()

    def penalty(solve):
        inputs = [x.clone().requires_grad_(), context.clone().requires_grad_()]
        y, log_det = solve(*inputs)
        first = torch.autograd.grad(y.square().sum() + log_det.sum(), inputs, create_graph=True)
        loss = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(loss, [*inputs, *layer.parameters()], allow_unused=True)

    for ours, expected in zip(
        penalty(layer.forward_and_log_det), penalty(lambda *a: in_passes(layer, *a)), strict=True
    ):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert_close(ours, expected, 1e-8)


class Decoder(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, z):
        return self.flow.decode(z)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_decoder_has_the_values_and_gradients_of_the_flow_also_once_its_weights_move():
    torch.manual_seed(0)
    flow = maf(3, num_layers=2, hidden_features=(8,)).eval()
    z = torch.randn(5, 3)
    traced = torch.jit.trace(Decoder(flow), (torch.randn(5, 3),), check_trace=False)
    for _ in range(2):
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        inputs = [z.clone().requires_grad_() for _ in range(2)]
        ours, expected = traced(inputs[0]), flow.decode(inputs[1])
        torch.testing.assert_close(ours, expected)
        (slope,) = torch.autograd.grad(ours.square().sum(), inputs[0])
        (expected_slope,) = torch.autograd.grad(expected.square().sum(), inputs[1])
        torch.testing.assert_close(slope, expected_slope)
