"""Second derivatives of every layer and named flow: those of finite differences, however they are asked for."""

from __future__ import annotations

import contract
import pytest
import torch

STEP = 1e-5
LAYERS = [pytest.param(lambda name=name: contract.make(name, 3), id=name) for name in contract.LAYERS]
FLOWS = [pytest.param(lambda name=name: contract.make_flow(name, 3), id=name) for name in contract.FLOWS]


def differences(function, x):
    """Return the Hessian of a function of a vector, by central differences of its gradient."""

    def gradient(point):
        point = point.detach().requires_grad_()
        return torch.autograd.grad(function(point), point)[0]

    steps = STEP * torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(gradient(x + step) - gradient(x - step)) / (2 * STEP) for step in steps])


def assert_second_derivatives(function, x):
    wanted = differences(function, x)
    found = torch.autograd.functional.hessian(function, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    if gradient.requires_grad:  # a gradient penalty
        (penalty,) = torch.autograd.grad(gradient.square().sum() / 2, inputs=[leaf], allow_unused=True)
        penalty = torch.zeros_like(x) if penalty is None else penalty
        torch.testing.assert_close(penalty, wanted @ gradient.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
@pytest.mark.parametrize("build", LAYERS)
def test_second_derivatives_of_a_layer_are_those_of_finite_differences(build, direction):
    torch.manual_seed(0)
    layer = build()
    x = (contract.latents if direction.startswith("forward") else contract.data)(layer)
    weights = torch.randn(3, dtype=torch.float64)

    def function(point):
        y, log_det = getattr(layer, direction)(point)
        return (weights * y).sum() + log_det

    assert_second_derivatives(function, x)


@pytest.mark.parametrize("build", FLOWS)
def test_second_derivatives_of_a_flow_are_those_of_finite_differences(build):
    torch.manual_seed(0)
    flow = build()
    x = flow.sample(())
    weights = torch.randn(3, dtype=torch.float64)
    assert_second_derivatives(flow.log_prob, x)
    assert_second_derivatives(lambda z: (weights * flow.decode(z)).sum(), flow.encode(x))
    assert_second_derivatives(lambda v: (weights * flow.encode(v)).sum(), x)


@pytest.mark.parametrize("build", FLOWS)
def test_a_gradient_penalty_reaches_the_parameters(build):
    torch.manual_seed(0)
    flow = build()
    x = flow.sample((2,)).requires_grad_()
    parameters = [p for p in flow.parameters() if p.requires_grad]

    def penalty():
        return torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)[0].square().sum()

    found = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * STEP * d
        values.append(float(penalty().detach()))
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p -= sign * STEP * d
    assert slope == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=1e-3, abs=1e-4)
