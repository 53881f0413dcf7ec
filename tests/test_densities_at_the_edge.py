"""Densities where they are zero, log-determinants of a wrong shape, and dtypes that a density cannot have."""

import math

import pytest
import torch
from contract import LAYERS, data, latents, make
from torch import nn

from pyroflows import (
    Bijection,
    Compose,
    Coupling,
    ElementwiseAffine,
    Flow,
    Inverse,
    Logit,
    Sigmoid,
    StandardNormal,
    Uniform,
    check,
    realnvp,
)


@pytest.mark.parametrize(
    "layers",
    [
        [Sigmoid(1)],
        [Inverse(Logit(1))],
        [ElementwiseAffine(1), Sigmoid(1)],
        [Compose([Sigmoid(1)]), ElementwiseAffine(1)],
    ],
)
def test_outside_the_support_and_on_its_ends_the_density_is_zero(layers):
    x = torch.tensor([[-0.5], [0.0], [1.0], [1.5], [0.3], [math.nan]], requires_grad=True)
    log_prob = Flow(StandardNormal(1), layers).log_prob(x)
    assert log_prob[:4].tolist() == [-math.inf] * 4
    assert log_prob[4].isfinite()
    assert log_prob[5].isnan()
    (gradient,) = torch.autograd.grad(log_prob[:5].sum(), x)
    assert gradient[:4].flatten().tolist() == [0.0] * 4
    assert gradient[4] != 0
    assert gradient[4].isfinite()


def test_parameters_have_finite_gradients_beside_rows_outside_the_support():
    flow = Flow(StandardNormal(2), [Coupling(2), Sigmoid(2)])
    log_prob = flow.log_prob(torch.tensor([[0.3, 0.4], [2.0, 0.5], [0.2, -1.0]]))
    assert log_prob.isfinite().tolist() == [True, False, False]
    log_prob[log_prob.isfinite()].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


@pytest.mark.parametrize("alpha", [0.0, 1e-5, 0.05, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_sample_can_be_scored(alpha, dtype):
    flow = Flow(StandardNormal(3), [ElementwiseAffine(3), Sigmoid(3, alpha)]).to(dtype)
    z = torch.linspace(-1000, 1000, 801, dtype=dtype)[:, None].expand(-1, 3)
    assert flow.log_prob(flow.decode(z)).isfinite().all()


def test_images_that_saturate_can_be_scored():
    torch.manual_seed(0)
    flow = realnvp((3, 16, 16), num_levels=2, num_blocks=1, hidden_channels=8)
    optimizer = torch.optim.Adam(flow.parameters(), 0.1)
    x = torch.rand(8, 3, 16, 16)
    for _ in range(3):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    flow.eval()
    samples = flow.sample((16,))
    assert samples.isfinite().all()
    assert not flow.log_prob(samples).isnan().any()


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_own_hooks_give_the_map_alone(name):
    layer = make(name, 3)
    x, y = latents(layer, 4), data(layer, 4)
    torch.testing.assert_close(layer._call(x), layer.forward_and_log_det(x)[0])
    torch.testing.assert_close(layer._inverse(y), layer.inverse_and_log_det(y)[0])


class NotSummed(Bijection):
    def forward_and_log_det(self, x, context=None):
        return 2 * x, torch.full_like(x, math.log(2))

    def inverse_and_log_det(self, y, context=None):
        return y / 2, torch.full_like(y, -math.log(2))


@pytest.mark.parametrize("features", [1, 4])
def test_a_log_det_of_the_wrong_shape_is_refused(features):
    flow = Flow(StandardNormal(features), NotSummed(features))
    x = torch.zeros(4, features)
    message = rf"expected NotSummed to return a log-determinant of shape \(4,\).*got \(4, {features}\)"
    for call in (flow.log_prob, flow().log_prob, lambda x: check(flow, x), lambda x: check(flow.layers[0], x)):
        with pytest.raises(ValueError, match=message):
            call(x)
    with pytest.raises(ValueError, match=message):
        flow.sample((4,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flow_of_half_precision_is_refused_in_a_sentence(dtype):
    flow = realnvp(2, num_layers=2).to(dtype)
    for call in (lambda: flow.log_prob(torch.zeros(3, 2, dtype=dtype)), lambda: flow.sample((3,))):
        with pytest.raises(TypeError, match=f"expected a flow of float32 or float64.*got {dtype}: call flow.float()"):
            call()


def test_a_uniform_prior_behind_a_logit_scores_the_whole_line():
    flow = Flow(Uniform(1), [Logit(1)])
    assert flow.log_prob(torch.tensor([[-90.0], [0.0], [5.0]])).isfinite().all()
    assert isinstance(flow, nn.Module)
