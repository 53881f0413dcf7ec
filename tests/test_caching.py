"""What follows from weights alone is formed once in a frozen block, and is right there and afterwards."""

import copy
import pickle
from functools import partial

import pytest
import torch
from contract import FLOWS, IMAGE_FLOWS, perturb

from pyroflows import DenseLinear, Flow, InvertibleConv, LULinear, StandardNormal, TriangularAffine
from pyroflows.caching import cached, caching
from pyroflows.networks import MADE

ALL = {name: partial(build, 3, 0) for name, build in FLOWS.items()}
ALL |= {f"image, {name}": partial(build, (2, 4, 4), 0) for name, build in IMAGE_FLOWS.items()}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", list(ALL))
def test_a_frozen_flow_gives_the_same(name):
    flow = perturb(ALL[name]().double(), 0.1).eval()
    with torch.no_grad():
        z = torch.randn(4, *flow.bijection.latent_shape, dtype=torch.float64)
        x = flow.decode(z)
        expected = flow.log_prob(x)
        with flow.cached():
            for _ in range(2):
                torch.testing.assert_close(flow.decode(z), x)
                torch.testing.assert_close(flow.log_prob(x), expected)
    assert not any("_cache" in part.__dict__ for part in flow.modules())


class Double(torch.nn.Linear):
    calls = 0

    @cached
    def doubled(self):
        self.calls += 1
        return 2 * self.weight


def test_it_is_formed_once_without_gradients_and_anew_with_them():
    module = Double(2, 2)
    with caching(module):
        with torch.no_grad():
            first = module.doubled()
            assert module.doubled() is first
            with caching(module):  # a block within goes on with what there is
                assert module.doubled() is first
            assert module.doubled() is first
            assert module.calls == 1
        assert module.doubled().requires_grad
        assert module.calls == 2
    with torch.no_grad():
        module.weight.add_(1)
        assert torch.equal(module.doubled(), 2 * module.weight)


def test_a_block_ends_with_an_error_too():
    module = Double(2, 2)
    with pytest.raises(KeyError), caching(module):
        raise KeyError
    with torch.no_grad():
        assert module.doubled() is not module.doubled()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_made_within_a_block_has_weights_of_its_own(copied):
    module = Double(2, 2)
    with caching(module), torch.no_grad():
        module.doubled()
        other = copied(module)
        assert not other.__dict__["_cache"]
        other.weight.add_(1)
        assert torch.equal(other.doubled(), 2 * other.weight)
        with caching(other):
            assert torch.equal(other.doubled(), 2 * other.weight)
            assert other.doubled() is other.doubled()


def write(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)


def train(flow):
    optimizer = torch.optim.Adam(flow.parameters(), 0.1, fused=True)
    flow.log_prob(torch.randn(5, *flow.event_shape).to(flow.dtype)).sum().backward()
    optimizer.step()


def load(flow):
    flow.load_state_dict({name: value + 0.1 * value.is_floating_point() for name, value in flow.state_dict().items()})


@pytest.mark.parametrize("change", [write, train, load, lambda flow: flow.double()])
@pytest.mark.parametrize("name", ["maf", "realnvp", "iaf", "image, glow"])
def test_weights_that_change_within_a_block_are_seen(name, change):
    flow = perturb(ALL[name](), 0.1).eval()
    with flow.cached():
        draws = flow.sample(3)
        flow.rsample_and_score(2)
        change(flow)
        draws = draws.to(flow.dtype)
        with torch.no_grad():
            expected = copy.deepcopy(flow).log_prob(draws)
            torch.testing.assert_close(flow.log_prob(draws), expected)
        torch.manual_seed(0)
        x, log_prob, score = flow.rsample_and_score(2)
    torch.manual_seed(0)
    for found, wanted in zip((x, log_prob, score), flow.rsample_and_score(2), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_number_that_is_kept_is_the_callers_own():
    layer = DenseLinear(3)
    with caching(layer), torch.no_grad():
        _, first = layer.inverse_and_log_det(torch.ones(3))
        before = first.clone()
        first.add_(100)
        assert torch.equal(layer.inverse_and_log_det(torch.ones(3))[1], before)


def test_what_is_formed_under_autocast_does_not_stay():
    flow = Flow(StandardNormal(4), [LULinear(4), DenseLinear(4), TriangularAffine(4)])
    with flow.cached():
        with torch.autocast("cpu", torch.bfloat16):
            x, _, _ = flow.rsample_and_score((3,))
        with torch.no_grad():
            assert flow.log_prob(x).dtype == torch.float32


@pytest.mark.parametrize("make", [LULinear, DenseLinear, lambda d: InvertibleConv((d, 1, 1)), lambda d: MADE(d, 2)])
def test_each_kind_keeps_what_it_forms(make):
    module = make(3)

    def kept():
        return [id(value) for part in module.modules() for _, value in part.__dict__["_cache"].values()]

    with caching(module), torch.no_grad():
        x = torch.randn(2, 3, *[1] * (len(getattr(module, "latent_shape", ())) - 1))
        call = getattr(module, "inverse_and_log_det", module)
        call(x)
        before = kept()
        call(x)
        assert before
        assert kept() == before
