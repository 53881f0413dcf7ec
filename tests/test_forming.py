"""What follows from weights alone is formed once in a frozen block, and is right there and afterwards."""

import copy
import pickle
from functools import partial

import pytest
import torch
from contract import FLOWS, IMAGE_FLOWS, perturb

from pyroflows import DenseLinear, InvertibleConv, LULinear, maf
from pyroflows.conditioners import MADE
from pyroflows.forming import formed, frozen

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
        with flow.frozen():
            for _ in range(2):
                torch.testing.assert_close(flow.decode(z), x)
                torch.testing.assert_close(flow.log_prob(x), expected)
    assert not any("_formed" in part.__dict__ for part in flow.modules())


class Double(torch.nn.Linear):
    calls = 0

    @formed
    def doubled(self):
        self.calls += 1
        return 2 * self.weight


def test_it_is_formed_once_without_gradients_and_anew_with_them():
    module = Double(2, 2)
    with frozen(module):
        with torch.no_grad():
            first = module.doubled()
            assert module.doubled() is first
            with frozen(module):  # a block within goes on with what there is
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
    with pytest.raises(KeyError), frozen(module):
        raise KeyError
    with torch.no_grad():
        assert module.doubled() is not module.doubled()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_made_within_a_block_has_weights_of_its_own(copied):
    module = Double(2, 2)
    with frozen(module), torch.no_grad():
        module.doubled()
        other = copied(module)
        other.weight.add_(1)
        assert torch.equal(other.doubled(), 2 * other.weight)
        with frozen(other):
            assert torch.equal(other.doubled(), 2 * other.weight)


def test_what_training_changes_is_seen_by_calls_with_gradients():
    flow = maf(3, num_layers=2, hidden_features=(300, 300))
    x = torch.randn(5, 3)
    optimizer = torch.optim.Adam(flow.parameters(), 0.1)
    with flow.frozen():
        before = flow.log_prob(x)
        before.sum().backward()
        optimizer.step()
        after = flow.log_prob(x).detach()
    assert not torch.equal(before, after)
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x), after)


@pytest.mark.parametrize("make", [LULinear, DenseLinear, lambda d: InvertibleConv((d, 1, 1)), lambda d: MADE(d, 2)])
def test_each_kind_keeps_what_it_forms(make):
    module = make(3)
    with frozen(module), torch.no_grad():
        x = torch.randn(2, 3, *[1] * (len(getattr(module, "latent_shape", ())) - 1))
        call = getattr(module, "inverse_and_log_det", module)
        call(x)
        kept = {id(value) for part in module.modules() for value in part.__dict__["_formed"][1].values()}
        call(x)
        assert kept
        assert kept == {id(value) for part in module.modules() for value in part.__dict__["_formed"][1].values()}
