"""Second derivatives of every layer and named flow against finite differences, in each way that torch has to ask."""

from __future__ import annotations

import pytest
import torch
from contract import FLOWS, IMAGE_LAYERS, LAYERS, Method, contexts, data, latents, make, make_flow, make_image_layer
from torch.func import functional_call

SHAPE = (2, 2, 2)
STEP = 1e-5


def scalar(module, name):
    """A number of a method's results, as a function of the input, the context and all parameters."""
    method = Method(module, name)
    names = [name for name, _ in method.named_parameters()]

    def function(x, context, *parameters):
        results = functional_call(method, dict(zip(names, parameters, strict=True)), (x, context))
        results = results if isinstance(results, tuple) else (results,)
        return sum((result * torch.linspace(1, 2, result.numel()).double().view_as(result)).sum() for result in results)

    return function, [parameter.detach() for parameter in method.parameters()]


def assert_second_derivatives(module, name, x, context):
    """Compare the gradient of a gradient penalty with its difference along one direction of everything."""
    function, parameters = scalar(module, name)
    inputs = [x, *([] if context is None else [context]), *parameters]

    def slopes(inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        arguments = inputs if context is not None else [inputs[0], None, *inputs[1:]]
        gradients = torch.autograd.grad(function(*arguments), inputs, create_graph=True, allow_unused=True)
        return inputs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True)]

    leaves, first = slopes(inputs)
    torch.manual_seed(1)
    weights, directions = ([torch.randn_like(tensor) for tensor in inputs] for _ in range(2))
    product = sum((gradient * weight).sum() for gradient, weight in zip(first, weights, strict=True))
    found = 0
    if product.requires_grad:
        second = torch.autograd.grad(product, leaves, allow_unused=True)
        found = sum((g * d).sum() for g, d in zip(second, directions, strict=True) if g is not None)
    ends = []
    for sign in (1, -1):
        _, moved = slopes([i + sign * STEP * d for i, d in zip(inputs, directions, strict=True)])
        ends.append(sum((gradient * weight).sum() for gradient, weight in zip(moved, weights, strict=True)).detach())
    expected = (ends[0] - ends[1]) / (2 * STEP)
    torch.testing.assert_close(torch.as_tensor(found).double(), expected, rtol=1e-4, atol=1e-6)


def assert_hessians(function, x):
    """Compare the Hessian by x, asked in every way, with the difference of gradients."""
    steps = STEP * torch.eye(x.numel()).double().view(-1, *x.shape)

    def slope(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]

    expected = torch.stack([(slope(x + step) - slope(x - step)) / (2 * STEP) for step in steps]).view(*x.shape * 2)
    ways = {
        "functional": torch.autograd.functional.hessian,
        "vectorized": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
        "forward mode": lambda f, x: torch.autograd.functional.hessian(
            f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
        "func": lambda f, x: torch.func.hessian(f)(x),
        "func, reverse": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    }
    for way, hessian in ways.items():
        torch.testing.assert_close(
            hessian(function, x), expected, rtol=1e-5, atol=1e-6, msg=lambda m, w=way: f"{w}: {m}"
        )


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_right_second_derivatives_through_input_context_and_weights(name, context_features):
    layer = make(name, 3, context_features)
    if context_features and not layer.context_features:
        return
    context = contexts(layer, 2)
    assert_second_derivatives(layer, "forward_and_log_det", latents(layer, 2), context)
    assert_second_derivatives(layer, "inverse_and_log_det", data(layer, 2), context)


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_layers_of_images_have_right_second_derivatives(name):
    layer = make_image_layer(name, SHAPE, 2)
    context = contexts(layer, 2)
    assert_second_derivatives(layer, "forward_and_log_det", latents(layer, 2), context)
    assert_second_derivatives(layer, "inverse_and_log_det", data(layer, 2), context)


@pytest.mark.parametrize("method", ["log_prob", "encode", "decode"])
@pytest.mark.parametrize("name", FLOWS)
def test_flows_have_right_second_derivatives_in_every_way_of_asking(name, method):
    flow = make_flow(name, 3, 2, scale=0.2)
    context, x = contexts(flow, 2), torch.randn(2, 3).double()
    assert_second_derivatives(flow, method, x, context)
    assert_hessians(lambda x: (getattr(flow, method)(x, context[0]) ** 2).sum(), x[0])
