"""Flow: densities that integrate to one, sampling, dtypes, shapes, and an import that loads little."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from contract import FLOWS, make_flow
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from pyroflows import (
    ElementwiseAffine,
    Flow,
    Logit,
    LULinear,
    Sigmoid,
    StandardNormal,
    Uniform,
    iaf,
    maf,
    realnvp,
)


def integral(flow, low, high, steps, context=None):
    """The midpoint rule over a square."""
    width = (high - low) / steps
    axis = low + width * (torch.arange(steps, dtype=torch.float64) + 0.5)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        return flow.log_prob(grid, context).exp().sum().item() * width**2


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("name", FLOWS)
def test_density_integrates_to_one(name, context_features):
    flow = make_flow(name, 2, context_features, scale=0.05)
    context = torch.ones(context_features).double() if context_features else None
    # Heavy tails and wide mixtures reach further than a normal.
    reach, share = (60, 5e-3) if "student" in name else (16, 1e-3)
    assert integral(flow, -reach, reach, 320, context) == pytest.approx(1, abs=share)


def test_density_on_a_square_integrates_to_one():
    flow = Flow(StandardNormal(2), [*realnvp(2, num_layers=2, hidden_features=(8,)).layers, Sigmoid(2)]).double().eval()
    assert integral(flow, 0, 1, 300) == pytest.approx(1, abs=1e-3)


def test_logit_of_a_uniform_is_logistic():
    flow = Flow(Uniform(1), Logit(1))
    sample = flow.sample((4000,))[:, 0].double()
    assert kstest(sample.numpy(), "logistic").pvalue > 1e-3
    x = torch.tensor([[0.0], [2.0]])
    torch.testing.assert_close(flow.log_prob(x)[0].exp(), torch.tensor(0.25))


@pytest.mark.parametrize("name", ["realnvp", "iaf", "nsf", "planar"])
def test_samples_have_the_density(name):
    """The density's mean and covariance on a grid are those of the samples."""
    flow = make_flow(name, 2, scale=0.05)
    axis = torch.linspace(-10, 10, 200).double()
    grid = torch.cartesian_prod(axis, axis)
    weight = flow.log_prob(grid).exp().detach()
    weight /= weight.sum()
    mean = weight @ grid
    covariance = (grid - mean).T @ ((grid - mean) * weight[:, None])
    sample = flow.sample((20_000,))
    torch.testing.assert_close(sample.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(sample.T.cov(), covariance, rtol=0.05, atol=0.05)


def test_rsample_passes_gradients_to_every_parameter():
    flow = make_flow("iaf, diagonal normal", 3, 2).train()
    x, log_prob = flow.rsample_and_log_prob((7,), torch.randn(4, 2).double())
    assert (x.shape, log_prob.shape) == ((7, 4, 3), (7, 4))
    (x.square().sum(-1) + log_prob).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_properties():
    flow = maf(3, num_layers=2, context_features=4).double()
    assert flow.dtype == torch.float64
    assert flow.device == torch.device("cpu")
    assert flow.event_shape == (3,)
    assert flow.context_features == 4
    assert len(flow.layers) == 6
    assert Flow(StandardNormal(2), [LULinear(2)]).half().dtype == torch.float16


def test_one_layer_or_several():
    layer = ElementwiseAffine(2)
    x = torch.randn(3, 2)
    assert torch.equal(Flow(StandardNormal(2), layer).log_prob(x), Flow(StandardNormal(2), [layer]).log_prob(x))
    assert Flow(StandardNormal(2), (layer for _ in range(2))).log_prob(x).shape == (3,)


def test_dtype_of_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        flow = realnvp(2, num_layers=1)
        assert flow.dtype == torch.float64
        assert flow.log_prob(torch.zeros(2)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_scores():
    flow = realnvp(3, num_layers=2)
    x = torch.randn(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = flow.log_prob(x)
    torch.testing.assert_close(found.float(), flow.log_prob(x), rtol=0.1, atol=0.1)


@given(
    features=st.integers(1, 5),
    context_features=st.integers(0, 2),
    sample_shape=st.lists(st.integers(0, 3), max_size=2),
    batch=st.lists(st.integers(1, 3), max_size=2),
)
@settings(max_examples=30)
def test_shapes(features, context_features, sample_shape, batch):
    flow = iaf(features, context_features=context_features, num_layers=1, hidden_features=(4,)).eval()
    context = torch.zeros(*batch, context_features) if context_features else None
    wanted = (*sample_shape, *(batch if context_features else ()))
    x = flow.sample(sample_shape, context)
    assert x.shape == (*wanted, features)
    assert flow.log_prob(x, context).shape == wanted
    y, log_prob = flow.rsample_and_log_prob(tuple(sample_shape), context)
    assert y.shape == x.shape
    assert log_prob.shape == wanted
    if context_features:
        assert flow(context).batch_shape == tuple(batch)


def test_copies_are_apart():
    flow = make_flow("realnvp", 2)
    flow().rsample()
    other = copy.deepcopy(flow)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    x = torch.randn(3, 2).double()
    assert not torch.equal(other.log_prob(x), flow.log_prob(x))


def test_save_and_load_of_the_state():
    flow = make_flow("nsf", 2, 1)
    saved = io.BytesIO()
    torch.save(flow.state_dict(), saved)
    saved.seek(0)
    other = FLOWS["nsf"](2, 1).double().eval()
    other.load_state_dict(torch.load(saved))
    x, context = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    assert torch.equal(other.log_prob(x, context), flow.log_prob(x, context))


def test_import_loads_little():
    heavy = ("matplotlib", "sklearn", "arviz", "torchvision", "lightning_fabric", "scipy.stats")
    code = f"import sys, pyroflows; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
