"""Networks: MADE's connectivity over widths, orders and residual blocks; contexts; dropout; activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyroflows
from pyroflows import MADE, MLP
from pyroflows.caching import caching
from pyroflows.networks import MaskedLinear
from pyroflows.networks.mlp import ACTIVATIONS


def random_weights(network):
    """Positive weights, under which no path cancels another and an ELU of a positive number has the slope one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 + torch.rand_like(parameter))
    return network.double().eval()


def support(made, features, context_features):
    """Which outputs (of feature i) see which input features, and which context."""
    x = 0.01 * torch.rand(features, dtype=torch.float64)
    if not context_features:
        return torch.autograd.functional.jacobian(lambda v: made(v).sum(-1), x) != 0, None
    context = 0.01 * torch.rand(context_features, dtype=torch.float64)
    of_x, of_context = torch.autograd.functional.jacobian(lambda v, c: made(v, c).sum(-1), (x, context))
    return of_x != 0, of_context != 0


def earlier(order):
    """Which features come before which in an order."""
    rank = torch.empty(len(order), dtype=torch.long)
    rank[order] = torch.arange(len(order))
    return rank[None, :] < rank[:, None]


@st.composite
def mades(draw):
    features = draw(st.integers(1, 20))
    residual = draw(st.booleans())
    if residual:
        widths = [draw(st.integers(1, 25))] * draw(st.integers(1, 3))
    else:
        widths = draw(st.lists(st.integers(1, 25), max_size=3))
    kinds = st.sampled_from(["sequential", "reversed", "random"])
    order = draw(st.one_of(kinds, st.permutations(range(features))))
    return {
        "features": features,
        "num_parameters": draw(st.integers(1, 4)),
        "hidden_features": widths,
        "residual": residual,
        "order": order,
        "context_features": draw(st.sampled_from([0, 0, 2])),
    }


@given(mades())
@settings(max_examples=120)
@example({"features": 20, "num_parameters": 2, "hidden_features": [1], "order": "random"})
@example({"features": 20, "num_parameters": 2, "hidden_features": [20, 1, 20], "order": "reversed"})
@example({"features": 7, "num_parameters": 1, "hidden_features": [], "order": "sequential", "context_features": 2})
@example({"features": 1, "num_parameters": 3, "hidden_features": [1], "order": "sequential"})
@example({"features": 1, "num_parameters": 3, "hidden_features": [1], "order": "sequential", "context_features": 1})
def test_made_sees_every_earlier_feature_and_nothing_else(options):
    features, context_features = options["features"], options.get("context_features", 0)
    made = random_weights(MADE(**options, activation="elu"))
    of_x, of_context = support(made, features, context_features)
    assert torch.equal(of_x, earlier(made.order))
    if context_features:
        assert of_context.all()


@given(mades())
@settings(max_examples=40)
def test_made_as_initialised_sees_nothing_later(options):
    made = MADE(**options, zero_last=False).double()
    of_x, _ = support(made, options["features"], options["context_features"])
    assert not (of_x & ~earlier(made.order)).any()


def test_made_each_output_of_a_feature_is_connected_alike():
    made = random_weights(MADE(6, 3, hidden_features=(9, 9), activation="elu"))
    x = 0.01 * torch.rand(6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(made, x)
    for parameter in range(3):
        assert torch.equal(jacobian[:, parameter] != 0, earlier(made.order))


def test_made_orders():
    assert MADE(4, 1).order.tolist() == [0, 1, 2, 3]
    assert MADE(4, 1, order="reversed").order.tolist() == [3, 2, 1, 0]
    assert MADE(4, 1, order=[2, 0, 1, 3]).order.tolist() == [2, 0, 1, 3]
    random = MADE(50, 1, order="random", seed=3).order
    assert torch.equal(random, MADE(50, 1, order="random", seed=3).order)
    assert not torch.equal(random, MADE(50, 1, order="random", seed=4).order)
    assert sorted(random.tolist()) == list(range(50))


def test_made_of_a_thousand_features_is_built():
    made = MADE(1000, 2, hidden_features=(256,))
    assert made(torch.zeros(2, 1000)).shape == (2, 1000, 2)


@given(
    batch=st.lists(st.integers(0, 3), max_size=3),
    features=st.integers(1, 6),
    num_parameters=st.integers(1, 4),
    context_features=st.integers(0, 3),
)
@settings(max_examples=30)
def test_made_shapes(batch, features, num_parameters, context_features):
    made = MADE(features, num_parameters, hidden_features=(5,), context_features=context_features)
    context = torch.zeros(*batch, context_features) if context_features else None
    assert made(torch.zeros(*batch, features), context).shape == (*batch, features, num_parameters)


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    in_features=st.integers(0, 4),
    out_features=st.integers(1, 4),
    widths=st.lists(st.integers(1, 6), max_size=3),
    context_features=st.integers(0, 3),
    residual=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
@settings(max_examples=50)
def test_mlp_shapes(batch, in_features, out_features, widths, context_features, residual, activation):
    if residual:
        widths = [5] * max(1, len(widths))
    network = MLP(
        in_features,
        out_features,
        hidden_features=widths,
        context_features=context_features,
        residual=residual,
        activation=activation,
    )
    context = torch.randn(*batch, context_features) if context_features else None
    out = network(torch.randn(*batch, in_features), context)
    assert out.shape == (*batch, out_features)
    assert not out.any()  # networks start at zero


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("in_features", [0, 3])
def test_mlp_depends_on_input_and_context(in_features, residual):
    network = random_weights(
        MLP(in_features, 2, hidden_features=(8, 8), context_features=2, residual=residual, activation="elu")
    )
    x, context = torch.zeros(in_features).double(), torch.zeros(2).double()
    of_x, of_context = torch.autograd.functional.jacobian(network, (x, context))
    assert (of_x != 0).all()
    assert (of_context != 0).all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("make", [lambda **o: MLP(3, 2, **o), lambda **o: MADE(3, 2, **o)])
def test_dropout_is_active_in_training_alone(make, residual):
    network = make(hidden_features=(32, 32), residual=residual, dropout=0.5, zero_last=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(4, 3)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_networks_without_zero_last_start_elsewhere():
    assert MLP(3, 2, zero_last=False)(torch.randn(5, 3)).any()
    assert MADE(3, 2, zero_last=False)(torch.randn(5, 3)).any()


def test_masked_linear():
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    layer = MaskedLinear(mask)
    x = torch.randn(4, 2)
    torch.testing.assert_close(layer(x), x @ (layer.weight * mask).T + layer.bias)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad != 0, mask)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, on its way to forward mode
def test_made_in_blocks_has_every_kind_of_derivative(monkeypatch):
    monkeypatch.setattr(pyroflows.networks.made, "_ROWS", 1)  # or a single row would be multiplied as a whole
    made = MADE(3, 1, hidden_features=(130, 130), zero_last=False).double()
    assert any(isinstance(part, MaskedLinear) and len(part.num_seen) > 1 for part in made.modules())
    x = torch.randn(3, dtype=torch.float64)

    def outputs(x):
        return made(x).flatten()

    wanted = torch.func.jacrev(outputs)(x)
    for options in ({}, {"vectorize": True}):
        torch.testing.assert_close(torch.autograd.functional.jacobian(outputs, x, **options), wanted)
    with torch.autograd.forward_ad.dual_level():
        pushed = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        found = torch.autograd.forward_ad.unpack_dual(outputs(pushed)).tangent
    torch.testing.assert_close(found, wanted.sum(1))
    assert torch.autograd.gradgradcheck(made, (x.requires_grad_(),))


def test_made_in_blocks_is_made_as_a_whole():
    torch.manual_seed(0)
    made = MADE(5, 2, hidden_features=(300, 300), zero_last=False).double()
    x = torch.randn(100, 5, dtype=torch.float64)
    wanted = torch.cat([made(row[None]) for row in x])  # a row is multiplied as a whole
    torch.testing.assert_close(made(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(made(x), wanted)
        with caching(made):
            for _ in range(2):
                torch.testing.assert_close(made(x), wanted)
                torch.testing.assert_close(made(x[:1]), wanted[:1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MADE(0, 1), "expected features to be a positive integer; got 0"),
        (lambda: MADE(2, 0), "expected num_parameters to be a positive integer; got 0"),
        (lambda: MADE(2, 1, hidden_features=(-1,)), "hidden_features.*-1"),
        (lambda: MADE(2, 1, order=[0]), r"expected order to be a permutation of 0, ..., 1; got \[0\]"),
        (lambda: MADE(2, 1, order="inside out"), "expected order to be one of.*got 'inside out'"),
        (lambda: MADE(2, 1, residual=True, hidden_features=()), r"one width; got hidden_features=\(\)"),
        (lambda: MLP(2, 0), "expected out_features to be a positive integer; got 0"),
        (lambda: MLP(2, 2, dropout=-0.1), r"expected dropout in \[0, 1\); got -0.1"),
        (lambda: MLP(2, 2, activation="step"), "expected activation to be one of.*got 'step'"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def hooked(linear):
    linear.register_forward_hook(lambda module, inputs, output: output + 1)


def wrapped(linear):
    forward = linear.forward
    linear.forward = lambda x: forward(x) + 1


def parametrized(linear):
    class Plus(nn.Module):
        def forward(self, bias):
            return bias + 1

    parametrize.register_parametrization(linear, "bias", Plus())


def pruned(linear):
    prune.custom_from_mask(linear, "weight", torch.zeros_like(linear.weight))


def normed(linear):
    parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(2)


def counted_everywhere(linear):
    return nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output + 1 if module is linear else None
    )


@pytest.mark.parametrize("change", [hooked, wrapped, parametrized, pruned, normed, counted_everywhere])
@pytest.mark.parametrize("number", [0, 1])
def test_what_is_done_to_a_linear_map_of_an_mlp_is_honoured(change, number):
    torch.manual_seed(0)
    mlp = MLP(3, 2, hidden_features=(8,), zero_last=False)
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    for ours, theirs in zip(mlp.linears, plain[::2], strict=True):
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3)
    before = mlp(x)
    torch.testing.assert_close(before, plain(x))
    handles = [change(mlp.linears[number]), change(plain[2 * number])]
    try:
        assert not torch.allclose(mlp(x), before)
        torch.testing.assert_close(mlp(x), plain(x))
    finally:
        for handle in filter(None, handles):
            handle.remove()
