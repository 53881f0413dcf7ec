"""torch.jit.trace of every named flow: values and gradients of eager, before and after the weights move."""

from __future__ import annotations

import contract
import pytest
import torch
from torch import nn

FLOWS = [
    *(pytest.param(lambda name=name: contract.make_flow(name, 3), id=name) for name in contract.FLOWS),
    *(
        pytest.param(lambda name=name: contract.make_image_flow(name, (2, 4, 4)), id=f"image {name}")
        for name in contract.IMAGE_FLOWS
    ),
]


class Method(nn.Module):
    def __init__(self, flow, name):
        super().__init__()
        self.flow, self.name = flow, name

    def forward(self, x):
        return getattr(self.flow, self.name)(x)


def values_and_gradients(module, flow, x):
    flow.zero_grad()
    x = x.detach().requires_grad_()
    result = module(x)
    (result * torch.linspace(0.5, 1.5, result.numel(), dtype=x.dtype).view_as(result)).sum().backward()
    return result.detach(), x.grad, [None if p.grad is None else p.grad.clone() for p in flow.parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["log_prob", "decode", "encode"])
@pytest.mark.parametrize("build", FLOWS)
def test_a_traced_flow_has_the_values_and_gradients_of_eager_also_once_its_weights_move(build, name):
    torch.manual_seed(0)
    flow = build().eval()
    points = [flow.encode(flow.sample((2,))) if name == "decode" else flow.sample((2,)) for _ in range(2)]
    eager = Method(flow, name)
    traced = torch.jit.trace(eager, (points[0],), check_trace=False)
    for moved in (False, True):
        if moved:
            with torch.no_grad():
                for parameter in flow.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
        for x in points:
            wanted, found = values_and_gradients(eager, flow, x), values_and_gradients(traced, flow, x)
            for a, b in zip((*found[:2], *found[2]), (*wanted[:2], *wanted[2]), strict=True):
                assert (a is None or not a.any()) if b is None else True
                if a is not None and b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
