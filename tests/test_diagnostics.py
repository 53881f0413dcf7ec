"""The check of a flow: it passes what is right and names what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from contract import make, make_flow

from pyroflows import ActNorm, Bijection, Compose, Flow, StandardNormal, check, realnvp


class Wrong(Bijection):
    """A doubling with one of four mistakes."""

    def __init__(self, mistake):
        super().__init__(2)
        self.mistake = mistake

    def forward_and_log_det(self, x, context=None):
        log_det = x.new_full(x.shape[:-1], 2 * math.log(2))
        return 2 * x, log_det + (self.mistake == "forward log-det")

    def inverse_and_log_det(self, y, context=None):
        log_det = y.new_full(y.shape[:-1], -2 * math.log(2))
        if self.mistake == "nan":
            log_det = log_det * math.nan
        return y / (3 if self.mistake == "inverse" else 2), log_det + (self.mistake == "inverse log-det")


def test_a_right_flow_passes():
    report = check(make_flow("nsf", 3), torch.randn(6, 3).double())
    assert report.ok
    assert report.rows == 6
    assert "FAILS" not in str(report)
    assert check(Wrong(None), torch.randn(3, 2)).ok


@pytest.mark.parametrize(
    "mistake, line",
    [
        ("inverse", "data -> latent -> data"),
        ("inverse", "latent -> data -> latent"),
        ("forward log-det", "log-det, latent to data"),
        ("inverse log-det", "log-det, data to latent"),
        ("nan", "log-det, data to latent"),
    ],
)
def test_a_mistake_is_named(mistake, line):
    report = check(Wrong(mistake), torch.randn(3, 2))
    assert not report.ok
    (found,) = [each for each in str(report).splitlines() if each.startswith(line)]
    assert found.endswith("FAILS")


def test_a_mistake_deep_in_a_stack_is_found():
    stack = Compose([make("lu", 2), Wrong("forward log-det").double(), make("coupling, affine", 2)])
    assert not check(stack, torch.randn(3, 2).double()).ok


def test_the_flow_is_left_as_it_was():
    flow = realnvp(2, num_layers=2)
    state = {name: value.clone() for name, value in flow.state_dict().items()}
    check(flow, 100 + torch.randn(5, 2))
    assert flow.training
    assert not any(layer.initialized for layer in flow.layers if isinstance(layer, ActNorm))
    assert all(torch.equal(state[name], value) for name, value in flow.state_dict().items())
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_one_context_or_many():
    flow = make_flow("maf", 2, 3)
    x = torch.randn(4, 2).double()
    assert check(flow, x, context=torch.zeros(3).double()).ok
    assert check(flow, x, context=torch.randn(4, 3).double()).ok


def test_a_context_passes_through_the_embedding_first():
    embedding = torch.nn.Sequential(torch.nn.Flatten(-2), torch.nn.Linear(8, 3), torch.nn.Dropout(0.5))
    flow = Flow(StandardNormal(2), make_flow("maf", 2, 3).layers, embedding=embedding.double())
    x, images = torch.randn(4, 2).double(), torch.randn(4, 2, 4).double()
    assert check(flow, x, context=images).ok
    assert check(flow, x, context=images[0]).ok
    assert flow.training
    with pytest.raises(ValueError, match="expected a context for the embedding; got none"):
        check(flow, x)
    with pytest.raises(ValueError, match=r"\(\*batch, 3\)"):
        check(Flow(flow.prior, flow.layers, embedding=torch.nn.Flatten().double()), x, context=images)


def test_tolerance():
    flow = Flow(StandardNormal(2), make("coupling, affine", 2)).double()
    x = torch.randn(4, 2).double()
    assert check(flow, x).tolerance == 1e-6
    assert check(flow.float(), x.float()).tolerance == 1e-3
    assert not check(flow, x.float(), tolerance=1e-12).ok


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: check(torch.nn.Linear(2, 2), torch.zeros(3, 2)),
            TypeError,
            "expected a Flow or a Bijection; got Linear",
        ),
        (lambda: check(realnvp(2), torch.zeros(2)), ValueError, r"expected rows of shape \(rows, 2\); got \(2,\)"),
        (lambda: check(realnvp(2), [[0.0, 0.0]]), ValueError, r"expected rows of shape \(rows, 2\); got list"),
        (lambda: check(realnvp(2), torch.zeros(0, 2)), ValueError, "expected at least one row; got none"),
        (lambda: check(realnvp(2), torch.zeros(3, 5)), ValueError, r"\(\*batch, 2\); got \(3, 5\)"),
        (lambda: check(realnvp(2), torch.zeros(3, 2).double()), TypeError, "expected data of the flow's"),
        (lambda: check(realnvp(2, context_features=1), torch.zeros(3, 2)), ValueError, "got none"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
