"""What Pyro's own checks ask of a transform, of every layer and named flow, by torch's documented hooks."""

from __future__ import annotations

import contract
import pyro.distributions as dist
import pytest
import torch
from contract import assert_close
from torch.distributions.transforms import Transform

SHAPE = (2, 4, 4)
SHAPES = [(), (1,), (3,), (2, 3)]
CASES = [
    *(
        (f"{name}, {c} numbers of context", lambda name=name, c=c: contract.make(name, 3, c))
        for name in contract.LAYERS
        for c in (0, 2)
    ),
    *((f"image {name}", lambda name=name: contract.make_image_layer(name, SHAPE)) for name in contract.IMAGE_LAYERS),
    *((f"flow {name}", lambda name=name: contract.make_flow(name, 3).bijection) for name in contract.FLOWS),
    *(
        (f"image flow {name}", lambda name=name: contract.make_image_flow(name, SHAPE).bijection)
        for name in contract.IMAGE_FLOWS
    ),
]


def transform_of(build):
    """Return a layer as Pyro uses it: conditioned, if it takes a context."""
    torch.manual_seed(0)
    layer = build()
    context = contract.contexts(layer)
    return layer, layer if context is None else layer.condition(context)


@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in CASES])
def test_the_hooks_of_a_transform(build):
    layer, transform = transform_of(build)
    assert isinstance(transform, Transform)
    x = contract.latents(layer)
    y = transform._call(x)
    assert_close(transform._inverse(y), x, 1e-6)  # inverse
    flat = torch.autograd.functional.jacobian(lambda z: transform._call(z).flatten(), x).reshape(y.numel(), x.numel())
    assert_close(transform.log_abs_det_jacobian(x, y), torch.linalg.slogdet(flat).logabsdet, 1e-7)  # jacobian
    back = torch.autograd.functional.jacobian(lambda v: transform._inverse(v).flatten(), y).reshape(flat.shape)
    assert_close(back @ flat, torch.eye(len(flat)).to(flat), 1e-5)  # autodiff


@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in CASES])
def test_the_shapes_of_a_transform(build):
    layer, transform = transform_of(build)
    for shape in SHAPES:
        x = contract.latents(layer, *shape)
        y = transform(x)
        assert y.shape == shape + layer.data_shape == transform.forward_shape(x.shape)
        assert transform.inverse_shape(y.shape) == x.shape
        assert transform.log_abs_det_jacobian(x, y).shape == shape
        base = dist.Normal(torch.zeros(layer.latent_shape).double(), 1.0).to_event(len(layer.latent_shape))
        drawn = dist.TransformedDistribution(base, [transform]).sample(shape)
        assert drawn.shape == y.shape
        drawn.view(-1) if not layer.data_shape[1:] else None
