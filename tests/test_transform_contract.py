"""What Pyro's own tests ask of a transform, of every layer and named flow: Jacobian, inverse, shapes and learning."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from contract import FLOWS, IMAGE_LAYERS, LAYERS, contexts, data, latents, make, make_flow, make_image_layer
from torch.distributions import biject_to

STEP = 1e-6


def fixed(layer):
    """A layer as Pyro takes it, with one context where it takes any."""
    context = contexts(layer)
    return layer if context is None else layer.condition(context)


def assert_pyros_contract(transform, parameters):
    torch.manual_seed(0)
    shapes = tuple(transform.latent_shape), tuple(transform.data_shape)
    x, y = latents(transform, 10), data(transform, 10)

    # the inverse, by the hooks that bypass what Pyro caches
    image = transform._call(x)
    back = transform._inverse(image)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(transform._call(transform._inverse(y)), y, atol=1e-6, rtol=1e-6)
    log_det = transform.log_abs_det_jacobian(x, image)
    torch.testing.assert_close(transform.log_abs_det_jacobian(back, image), log_det, atol=1e-6, rtol=1e-6)

    # the Jacobian, by differences
    steps = STEP * torch.eye(x[0].numel()).double().view(-1, *shapes[0])
    rows = (transform(x[0] + steps) - transform(x[0] - steps)) / (2 * STEP)
    torch.testing.assert_close(rows.flatten(1).det().abs().log(), log_det[0], atol=1e-5, rtol=1e-5)

    # shapes, of the maps and of what Pyro builds by them
    for batch in ((), (3,), (3, 4), (3, 4, 5)):
        assert transform.forward_shape(torch.Size(batch + shapes[0])) == batch + shapes[1]
        assert transform.inverse_shape(torch.Size(batch + shapes[1])) == batch + shapes[0]
        base = dist.Normal(torch.zeros(batch + shapes[0]).double(), 1.0).to_event(len(shapes[0]))
        pushed = dist.TransformedDistribution(base, [biject_to(transform.domain), transform])
        assert (pushed.batch_shape, pushed.event_shape) == (batch, shapes[1])
        assert pushed.sample().shape == batch + shapes[1]
        assert pushed.sample((2,)).shape == (2, *batch, *shapes[1])

    # learning, in both directions
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return
    for map_, points in ((transform, y), (transform.inv, x)):
        base = dist.Normal(torch.zeros(map_.latent_shape).double(), 1.0).to_event(len(map_.latent_shape))
        density = dist.TransformedDistribution(base, [biject_to(map_.domain), map_])
        optimizer = torch.optim.Adam(parameters, 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = -density.log_prob(points).mean()
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
        assert all(parameter.isfinite().all() for parameter in parameters)


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("features", [2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_pyros_contract(name, features, context_features):
    layer = make(name, features, context_features)
    if not context_features or layer.context_features:
        assert_pyros_contract(fixed(layer), layer.parameters())


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("name", FLOWS)
def test_flows_keep_pyros_contract(name, context_features):
    flow = make_flow(name, 3, context_features)
    assert_pyros_contract(fixed(flow.bijection), flow.bijection.parameters())


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_layers_of_images_keep_pyros_contract(name):
    layer = make_image_layer(name, (2, 2, 2), 2)
    assert_pyros_contract(fixed(layer), layer.parameters())


@pytest.mark.parametrize("batch", [(), (7,), (6, 7)])
@pytest.mark.parametrize("name", ["coupling, affine", "autoregressive, spline", "compose", "planar"])
def test_conditioning_and_inverting_commute(name, batch):
    layer = make(name, 3, 2)
    noise, context = data(layer, *batch), contexts(layer, *batch)
    torch.testing.assert_close(layer.inv.condition(context)(noise), layer.condition(context).inv(noise))
    assert layer.inv.inv is layer
    back = latents(layer, *batch)
    torch.testing.assert_close(layer.inv.condition(context).inv(back), layer.condition(context).inv.inv(back))
