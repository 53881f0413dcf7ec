"""Planar and radial flows: the root search, the closed forms, derivatives of the inverse, extreme parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyroflows.layers.planar_radial import Planar, Radial, _solve

torch.set_num_threads(1)
BOTH = pytest.mark.parametrize("family", [Planar, Radial])
numbers = st.floats(-1e3, 1e3, allow_nan=False)


def make(family, features, *, wild=1.0, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = family(features, **kwargs).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(wild * torch.randn_like(parameter))
    return layer


def jacobian_log_det(layer, x, *context):
    jacobian = torch.autograd.functional.jacobian(lambda row: layer.forward_and_log_det(row, *context)[0], x)
    return torch.linalg.slogdet(jacobian)


@BOTH
@pytest.mark.parametrize("features", [1, 2, 5, 17])
def test_log_det_is_that_of_the_jacobian(family, features):
    layer = make(family, features)
    for x in 2 * torch.randn(5, features, dtype=torch.float64):
        sign, expected = jacobian_log_det(layer, x)
        assert sign == 1
        torch.testing.assert_close(layer.forward_and_log_det(x)[1], expected, rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("features", [1, 2, 5, 17])
@pytest.mark.parametrize("wild", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_round_trip(family, features, wild, batch):
    layer = make(family, features, wild=wild)
    x = 2 * torch.randn(*batch, features, dtype=torch.float64)
    y, forward = layer.forward_and_log_det(x)
    back, backward = layer.inverse_and_log_det(y)
    assert forward.shape == backward.shape == torch.Size(batch)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(backward, -forward, rtol=1e-8, atol=1e-8)


@BOTH
def test_starts_near_the_identity_but_can_learn(family):
    torch.manual_seed(0)
    layer = family(4)
    x = torch.randn(200, 4)
    y, log_det = layer.forward_and_log_det(x)
    assert (y - x).abs().max() < 0.5
    log_det.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@BOTH
def test_gradients_of_both_directions(family):
    layer = make(family, 3, context_features=2, hidden_features=(4,))
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(method, y, context, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(_Method(layer, method), _prefixed(parameters), (y, context))

    for method in ("forward_and_log_det", "inverse_and_log_det"):
        inputs = (y, context, *(value.detach().clone().requires_grad_() for value in values))
        assert torch.autograd.gradcheck(lambda *args: call(method, *args), inputs)


class _Method(torch.nn.Module):
    def __init__(self, layer, method):
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, *args):
        return getattr(self.layer, self.method)(*args)


def _prefixed(parameters):
    return {f"layer.{name}": value for name, value in parameters.items()}


@BOTH
def test_second_derivatives_of_the_inverse(family):
    layer = make(family, 2)
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer.inverse_and_log_det, (y,))


@BOTH
def test_derivatives_of_the_two_directions_are_inverse_matrices(family):
    layer = make(family, 5)
    x = torch.randn(5, dtype=torch.float64)
    y = layer.forward_and_log_det(x)[0].detach()
    there = torch.autograd.functional.jacobian(lambda x: layer.forward_and_log_det(x)[0], x)
    back = torch.autograd.functional.jacobian(lambda y: layer.inverse_and_log_det(y)[0], y)
    torch.testing.assert_close(there @ back, torch.eye(5, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@BOTH
def test_log_prob_of_data_trains(family):
    torch.manual_seed(0)
    layer = family(2)
    y = torch.randn(256, 2) * torch.tensor([2.0, 0.5]) + 0.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        x, log_det = layer.inverse_and_log_det(y)
        loss = (0.5 * x.square().sum(-1) - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@BOTH
def test_context_gives_each_row_its_parameters(family):
    layer = make(family, 3, context_features=2)
    context = torch.randn(4, 2, dtype=torch.float64)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x, context)
    for row in range(4):
        one, one_log_det = layer.forward_and_log_det(x[:, row], context[row])
        torch.testing.assert_close(one, y[:, row])
        torch.testing.assert_close(one_log_det, log_det[:, row])
    torch.testing.assert_close(layer.inverse_and_log_det(y, context)[0], x, rtol=1e-9, atol=1e-9)
    single = layer.forward_and_log_det(x[0, 0], context)[0]
    assert single.shape == (4, 3)


@BOTH
def test_vmap_and_jacrev(family):
    layer = make(family, 3)
    x = torch.randn(6, 3, dtype=torch.float64)
    for method in (layer.forward_and_log_det, layer.inverse_and_log_det):
        rows = torch.func.vmap(method)(x)
        for one, other in zip(rows, method(x), strict=True):
            torch.testing.assert_close(one, other)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda y: layer.inverse_and_log_det(y)[0]))(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobians).logabsdet, layer.inverse_and_log_det(x)[1])


@BOTH
def test_inverse_is_one_graph(family):
    layer = make(family, 2)
    y = torch.randn(4, 2, dtype=torch.float64)
    compiled = torch.compile(layer.inverse_and_log_det, fullgraph=True, backend="eager")
    for one, other in zip(compiled(y), layer.inverse_and_log_det(y), strict=True):
        torch.testing.assert_close(one, other)


@BOTH
def test_float32(family):
    layer = make(family, 5).float()
    x = torch.randn(100, 5)
    y, log_det = layer.forward_and_log_det(x)
    back, _ = layer.inverse_and_log_det(y)
    assert y.dtype == log_det.dtype == back.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


@BOTH
def test_copies_and_protocol(family):
    layer = make(family, 3)
    x = torch.randn(2, 3, dtype=torch.float64)
    y = layer(x)
    assert layer.inv(y) is x
    torch.testing.assert_close(copy.deepcopy(layer).inv(y), x)
    assert layer.log_abs_det_jacobian(x, y).shape == (2,)


@BOTH
def test_bad_input(family):
    with pytest.raises(ValueError, match=r"expected features to be a positive integer; got \(2, 3\)"):
        family((2, 3))
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*batch, 3\); got \(2,\)"):
        family(3).forward_and_log_det(torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected a context of shape \(\*batch, 2\); got none"):
        family(3, context_features=2).inverse_and_log_det(torch.zeros(3))


# Planar: the root search


@settings(max_examples=200, deadline=None)
@given(slope=st.floats(-0.999, 1e6), target=st.floats(-1e6, 1e6))
def test_the_root_is_found(slope, target):
    slope, target = torch.tensor([slope], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    s = _solve(slope, target)
    residual = s + slope * torch.tanh(s) - target
    scale = 1 + target.abs() + slope.abs()
    assert (residual.abs() <= 1e-14 * scale).all()


def test_the_root_is_found_on_a_grid_of_hard_cases():
    near = torch.logspace(-12, 8, 161, dtype=torch.float64)
    slope = torch.cat([near, -0.999 + 0.999 * torch.logspace(-8, 0, 81, dtype=torch.float64), torch.tensor([-0.999])])
    # The hardest targets are those where the hyperbolic tangent begins to saturate: target close to slope.
    root = torch.cat([near, -near, torch.linspace(-25, 25, 201, dtype=torch.float64), torch.zeros(1)])
    slope, root = torch.meshgrid(slope.double(), root, indexing="ij")
    target = root + slope * torch.tanh(root)
    found = _solve(slope, target)
    residual = found + slope * torch.tanh(found) - target
    assert (residual.abs() <= 1e-14 * (root.abs() + slope.abs())).all()
    condition = (root.abs() + slope.abs()) / (1 + slope * (1 - torch.tanh(root).square()))
    assert ((found - root).abs() <= 1e-14 * condition).all()


@settings(max_examples=60, deadline=None)
@given(
    w=st.lists(numbers, min_size=3, max_size=3),
    u=st.lists(numbers, min_size=3, max_size=3),
    b=st.floats(-10, 10),
    y=st.lists(numbers, min_size=3, max_size=3),
)
def test_planar_takes_any_parameters(w, u, b, y):
    layer = Planar(3).double()
    w, u, y = (torch.tensor(values, dtype=torch.float64) for values in (w, u, y))
    with torch.no_grad():
        layer.w.copy_(w)
        layer.u.copy_(u)
        layer.b.fill_(b)
    x, log_det = layer.inverse_and_log_det(y)
    assert x.isfinite().all()
    assert log_det.isfinite()
    again = layer.forward_and_log_det(x)[0]
    # The height over the plane is known to about eps |w| |y|, and tanh takes it to a push of u.
    noise = 1e-12 * (1 + w.norm() * (1 + y.norm() + u.norm()) + abs(b)) * (1 + u.norm())
    assert (again - y).norm() <= 1e-6 + noise


def test_planar_at_the_limit_of_invertibility():
    layer = Planar(2).double()
    with torch.no_grad():
        layer.w.copy_(torch.tensor([2.0, -1.0]))
        layer.u.copy_(-50.0 * layer.w)
    _, _, _, slope = layer._parameters_for(None)
    assert -1 < slope <= -0.998
    y = torch.cat([torch.randn(200, 2), 1e3 * torch.randn(200, 2), torch.zeros(1, 2)]).double()
    x, log_det = layer.inverse_and_log_det(y)
    again, forward = layer.forward_and_log_det(x)
    torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forward, -log_det, rtol=1e-8, atol=1e-8)


def test_planar_constraint_leaves_an_allowed_u_and_survives_zero_w():
    layer = Planar(2).double()
    with torch.no_grad():
        layer.w.copy_(torch.tensor([1.0, 0.0]))
        layer.u.copy_(torch.tensor([0.5, 2.0]))
    u, w, _, slope = layer._parameters_for(None)
    torch.testing.assert_close(u, layer.u)
    with torch.no_grad():
        layer.u.copy_(torch.tensor([-5.0, 2.0]))
    u, w, _, slope = layer._parameters_for(None)
    torch.testing.assert_close((w * u).sum(), slope)
    assert slope > -1
    with torch.no_grad():
        layer.w.zero_()
    x = torch.randn(3, 2, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(y, x)
    (y.sum() + log_det.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_planar_says_that_its_inverse_is_dear():
    assert Planar(2).inverse_passes > Planar(2).forward_passes
    assert Planar(2).inv.forward_passes == Planar(2).inverse_passes


# Radial: the quadratic


@settings(max_examples=100, deadline=None)
@given(
    log_alpha=st.floats(-12, 12),
    strength=st.floats(-50, 1e4),
    y=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2),
    features=st.sampled_from([1, 2]),
)
def test_radial_takes_any_parameters(log_alpha, strength, y, features):
    layer = Radial(features).double()
    with torch.no_grad():
        layer.center.zero_()
        layer.log_alpha.fill_(log_alpha)
        layer.strength.fill_(strength)
    y = torch.tensor(y[:features], dtype=torch.float64)
    x, log_det = layer.inverse_and_log_det(y)
    again, forward = layer.forward_and_log_det(x)
    torch.testing.assert_close(again, y, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(forward, -log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strength", [-5.0, -0.5, 3.0])
def test_radial_at_its_centre(strength):
    layer = Radial(3).double()
    with torch.no_grad():
        layer.strength.fill_(strength)
    y = layer.center.detach().clone().requires_grad_()
    x, log_det = layer.inverse_and_log_det(y)
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(log_det, layer.forward_and_log_det(x)[1].neg())
    (x.sum() + log_det).backward()
    assert y.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_radial_in_the_paper_s_form():
    layer = make(Radial, 3)
    x = torch.randn(4, 3, dtype=torch.float64)
    center, alpha, strength = layer._parameters_for(None)
    radius = (x - center).norm(dim=-1, keepdim=True)
    beta, h = alpha * strength, 1 / (alpha + radius)
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(y, x + beta * h * (x - center))
    slope = -1 / (alpha + radius).square()
    expected = 2 * torch.log(1 + beta * h) + torch.log(1 + beta * h + beta * slope * radius)
    torch.testing.assert_close(log_det, expected.squeeze(-1))
