"""Flow: densities that integrate to one, sampling, dtypes, shapes, and an import that loads little."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from contract import FLOWS, make_flow
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn

from pyroflows import (
    Bijection,
    Coupling,
    DiagonalNormal,
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


# An embedding of the context


class Mean(nn.Module):
    """The mean of features over a set, and a count of its calls."""

    def __init__(self, features=5, context_features=3):
        super().__init__()
        self.net = nn.Linear(features, context_features)
        self.calls = 0

    def forward(self, sets):
        self.calls += 1
        return self.net(sets).mean(-2)


def embedded(embedding=None, context_features=3):
    """A flow whose context is a set of 7 rows of 5 numbers, and the same flow without the embedding."""
    plain = make_flow("realnvp", 2, context_features)
    embedding = Mean(context_features=context_features) if embedding is None else embedding
    return Flow(plain.prior, plain.layers, embedding=embedding).double().eval(), plain


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_an_embedding_comes_before_the_layers(batch):
    flow, plain = embedded()
    context, x = torch.randn(*batch, 7, 5).double(), torch.randn(6, *batch, 2).double()
    given = flow.embedding(context)
    assert given.shape == (*batch, 3)
    assert flow.context_features == 3
    torch.testing.assert_close(flow.log_prob(x, context), plain.log_prob(x, given))
    torch.testing.assert_close(flow(context).log_prob(x), plain.log_prob(x, given))
    assert flow(context).batch_shape == batch
    assert flow.sample((6,), context).shape == x.shape
    draws, log_prob = flow.rsample_and_log_prob((6,), context)
    torch.testing.assert_close(plain.log_prob(draws, given), log_prob)
    torch.manual_seed(1)
    ours = flow.sample((6,), context)
    torch.manual_seed(1)
    assert torch.equal(ours, plain.sample((6,), given))


@pytest.mark.parametrize(
    "call",
    [
        lambda flow, x, context: flow.log_prob(x, context),
        lambda flow, x, context: flow.sample((2,), context),
        lambda flow, x, context: flow.rsample_and_log_prob((2,), context),
        lambda flow, x, context: flow(context).rsample(),
    ],
)
def test_an_embedding_is_evaluated_once(call):
    flow, _ = embedded()
    call(flow, torch.zeros(4, 2).double(), torch.zeros(4, 7, 5).double())
    assert flow.embedding.calls == 1


def test_a_distribution_draws_and_scores_with_one_embedding():
    flow, _ = embedded()
    distribution = flow(torch.zeros(4, 7, 5).double())
    distribution.log_prob(distribution.rsample((2,)))
    assert flow.embedding.calls == 1


def test_an_embedding_gets_gradients_and_is_saved():
    flow, _ = embedded()
    context, x = torch.randn(4, 7, 5).double(), torch.randn(4, 2).double()
    flow.train().rsample_and_log_prob((), context)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.embedding.parameters())
    flow.zero_grad()
    flow.log_prob(x, context).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in flow.embedding.parameters())
    flow.eval()
    flow(context).rsample()
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(other.log_prob(x, context), flow.log_prob(x, context))
        with torch.no_grad():
            other.embedding.net.bias.add_(1)
        assert not torch.equal(other.log_prob(x, context), flow.log_prob(x, context))
    other, _ = embedded()
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x, context), flow.log_prob(x, context))


def test_an_embedding_inside_pyro():
    flow, plain = embedded()
    context, x = torch.randn(4, 7, 5).double(), torch.randn(4, 2).double()

    def model():
        pyro.module("flow", flow)
        with pyro.plate("rows", 4):
            pyro.sample("x", flow(context), obs=x)

    trace = pyro.poutine.trace(model).get_trace()
    names = {name for name, node in trace.nodes.items() if node["type"] == "param"}
    assert {"flow$$$embedding.net.weight", "flow$$$embedding.net.bias"} <= names
    torch.testing.assert_close(trace.log_prob_sum(), plain.log_prob(x, flow.embedding(context)).sum())
    assert isinstance(flow(context), dist.TransformedDistribution)


def test_an_embedding_of_integers():
    flow, plain = embedded(nn.Embedding(10, 3))
    words, x = torch.arange(10), torch.randn(10, 2).double()
    torch.testing.assert_close(flow.log_prob(x, words), plain.log_prob(x, flow.embedding.weight))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: embedded(Mean(5, 4)),
            ValueError,
            r"returns \(\*batch, 3\); got shape \(6, 4\) from a context of shape",
        ),
        (lambda: embedded(nn.LSTM(5, 3)), ValueError, r"returns \(\*batch, 3\); got tuple from a context of shape"),
        (lambda: embedded(torch.tanh), TypeError, "an embedding that is a torch module; got builtin"),
        (
            lambda: Flow(StandardNormal(2), Coupling(2), embedding=nn.Identity()),
            ValueError,
            "an embedding needs layers that take a context; got context_features=0",
        ),
    ],
)
def test_an_embedding_of_another_shape_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()[0].log_prob(torch.zeros(6, 2).double(), torch.zeros(6, 7, 5).double())


@pytest.mark.parametrize(
    "context, error, message",
    [
        (None, ValueError, "expected a context for the embedding; got none"),
        ([1.0], TypeError, "expected a context for the embedding; got list"),
        (torch.zeros(6, 7, 5), TypeError, "expected context of the flow's torch.float64; got torch.float32"),
        (torch.zeros(5, 7, 5).double(), ValueError, r"broadcast"),
    ],
)
def test_a_context_that_an_embedding_cannot_take_is_refused(context, error, message):
    flow, _ = embedded()
    with pytest.raises(error, match=message):
        flow.log_prob(torch.zeros(6, 2).double(), context)
    with pytest.raises(error, match=message):
        flow(context).log_prob(torch.zeros(6, 2).double())


def test_import_loads_little():
    heavy = ("matplotlib", "sklearn", "arviz", "torchvision", "scipy.stats", "torch._dynamo")
    code = f"import sys, pyroflows; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_distribution_that_outlives_a_step_samples_and_scores_at_the_new_parameters():
    flow = Flow(DiagonalNormal(2), [ElementwiseAffine(2)])
    distribution = flow()
    optimizer = torch.optim.Adam(flow.parameters(), 0.1, fused=True)
    x = torch.randn(20, 2)
    for _ in range(3):
        draw = distribution.rsample((5,))
        (-distribution.log_prob(x).mean()).backward()
        optimizer.step()
        torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))
        torch.testing.assert_close(distribution.log_prob(draw), flow.log_prob(draw))
    torch.manual_seed(1)
    draw = distribution.rsample((5,))
    torch.manual_seed(1)
    torch.testing.assert_close(draw, flow.rsample_and_log_prob((5,))[0])


def test_a_draw_is_scored_from_its_own_pass_once_and_held_weakly():
    flow = realnvp(2, num_layers=2)
    calls = []
    hook = flow.layers[0].conditioner.register_forward_hook(lambda *_: calls.append(1))
    draw = flow().rsample((5,))
    flow().log_prob(torch.zeros(2))  # of another value, after which the draw still costs no pass
    first = flow().log_prob(draw)
    assert len(calls) == 2
    torch.testing.assert_close(flow().log_prob(draw), first)
    assert len(calls) == 3
    hook.remove()
    draw = flow().rsample((5,))
    assert flow.last_draw is not None
    copies = [copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]
    assert [other.last_draw for other in copies] == [None, None]
    del draw
    gc.collect()
    assert flow.last_draw is None


def test_layers_of_a_flow_keep_no_record_of_the_flows_own_draws_and_scores():
    flow = maf(3, num_layers=2)
    distribution = flow()
    distribution.log_prob(distribution.rsample((5,)))
    distribution.log_prob(torch.randn(5, 3))
    assert all(part._record is None for part in flow.modules() if isinstance(part, Bijection))
