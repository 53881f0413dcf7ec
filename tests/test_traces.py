"""``torch.jit.trace`` of every layer and named flow, against eager values and gradients as rows and weights change."""

from __future__ import annotations

import pytest
import torch
from contract import (
    FLOWS,
    IMAGE_FLOWS,
    IMAGE_LAYERS,
    LAYERS,
    Method,
    contexts,
    data,
    latents,
    make,
    make_flow,
    make_image_flow,
    make_image_layer,
)

import pyroflows

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated"),
]
SHAPE = (2, 2, 2)


def assert_traced(module, name, points, labels=None):
    """Trace with four rows, and compare with other rows, and other numbers of them, as the weights move."""
    method = Method(module, name)

    def arguments(rows):
        inputs = [points(rows), contexts(module, rows) if labels is None else labels[:rows]]
        return [t.detach().requires_grad_(t.is_floating_point()) for t in inputs if t is not None]

    traced = torch.jit.trace(method, tuple(arguments(4)), check_trace=False)
    for rows in (4, 1):
        inputs = arguments(rows)
        found = []
        for function in (traced, method):
            with torch.jit.optimized_execution(False):  # optimizing a graph takes far longer than running it twice
                results = function(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            loss = sum(result.square().sum() for result in results)
            leaves = [leaf for leaf in [*inputs, *method.parameters()] if leaf.requires_grad]
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else []
            found.append((results, [torch.zeros(()) if slope is None else slope for slope in slopes]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_is_the_layer(name, context_features):
    layer = make(name, 3, context_features)
    if context_features and not layer.context_features:
        return
    assert_traced(layer, "forward_and_log_det", lambda rows: latents(layer, rows))
    assert_traced(layer, "inverse_and_log_det", lambda rows: data(layer, rows))


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_a_traced_layer_of_images_is_the_layer(name):
    layer = make_image_layer(name, SHAPE, 2)
    assert_traced(layer, "forward_and_log_det", lambda rows: latents(layer, rows))
    assert_traced(layer, "inverse_and_log_det", lambda rows: data(layer, rows))


@pytest.mark.parametrize("method", ["log_prob", "encode", "decode"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_traced_flow_is_the_flow(name, method):
    flow = make_flow(name, 3, 2)
    assert_traced(flow, method, lambda rows: torch.randn(rows, 3).double())


@pytest.mark.parametrize("name", IMAGE_FLOWS)
def test_a_traced_flow_of_images_is_the_flow(name):
    flow = make_image_flow(name, (1, 4, 4), 2)
    labels = torch.tensor([0, 1, 1, 0]) if flow.embedding is not None else None
    assert_traced(flow, "log_prob", lambda rows: data(flow.bijection, rows), labels)
    assert_traced(flow, "decode", lambda rows: latents(flow.bijection, rows), labels)


@pytest.mark.parametrize("method", ["log_prob", "decode"])
@pytest.mark.parametrize("name", ["maf", "realnvp", "nsf", "glow"])
def test_a_trace_does_not_take_its_example_for_the_first_batch_of_training(name, method):
    options = {"num_steps": 2} if name == "glow" else {"num_layers": 2, "norm": "actnorm"}
    flow = getattr(pyroflows, name)(4, **options).double().train()
    function, example = Method(flow, method), torch.randn(5, 4).double()
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    traced = torch.jit.trace(function, (example,), check_trace=False)
    torch.testing.assert_close(dict(flow.state_dict()), before)
    flow.log_prob(3 + 2 * torch.randn(100, 4).double())  # which is the first batch
    with torch.jit.optimized_execution(False):
        torch.testing.assert_close(traced(example), function(example))
