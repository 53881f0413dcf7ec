"""Weights of rows: whatever a fit reads from its rows counts each by its weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyroflows import ActNorm, BatchNorm, FitOptions, Flow, FlowDensity, StandardNormal, fit, glow, maf, realnvp
from pyroflows.distributed import var_mean, weighted_rows
from pyroflows.layers import LULinear
from pyroflows.tables import table_flow


def near_and_far(features=2, seed=0):
    """1,000 rows of weight one, and 100 far rows that weigh nothing."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=(1000, features)), 1000 * rng.normal(size=(100, features))])
    return x, np.where(np.arange(1100) < 1000, 1.0, 1e-12), rng.normal(size=(2000, features))


def test_statistics_of_weighted_rows_are_those_of_repeated_ones():
    x, times = torch.randn(7, 3, 2, 2, dtype=torch.float64), torch.tensor([1, 2, 3, 1, 1, 4, 2])
    for dims in ([0], [0, 2, 3]):
        wanted = torch.var_mean(x.repeat_interleave(times, 0), dims, correction=0)
        with weighted_rows(times.double() / 5):
            found = var_mean(x, dims)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(var_mean(x, dims), torch.var_mean(x, dims, correction=0))


@pytest.mark.parametrize("name", ["maf", "nsf", "realnvp", "glow"])
def test_rows_that_weigh_nothing_do_not_move_the_density(name):
    x, weights, fresh = near_and_far()
    density = FlowDensity(name, num_layers=1, hidden_features=(8,), epochs=10, random_state=0)
    score = density.fit(x, sample_weight=weights).score(fresh)
    alone = density.fit(x[:1000]).score(fresh)
    assert score == pytest.approx(alone, abs=0.02)
    assert alone == pytest.approx(-np.log(2 * np.pi) - 1, abs=0.06)


def test_the_start_of_a_table_is_that_of_the_weighted_rows():
    x, weights, others = near_and_far(3)
    context = torch.from_numpy(np.where(weights[:, None] == 1, x[:, :1] + others[:1100, :1], 1e3))
    options = {"num_layers": 1, "hidden_features": (4,)}
    rows, ones = torch.from_numpy(x), torch.from_numpy(weights)
    flows = []
    for number, its_weights in ((1100, ones), (1000, None)):
        torch.manual_seed(0)
        flows.append(table_flow(rows[:number], "maf", context=context[:number], weights=its_weights, **options))
    for (name, found), wanted in zip(flows[0].state_dict().items(), flows[1].state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


def stacks():
    yield "actnorm", lambda: Flow(StandardNormal(2), [ActNorm(2)])
    yield "batch norm", lambda: Flow(StandardNormal(2), [BatchNorm(2)])
    yield "actnorm after a layer", lambda: Flow(StandardNormal(2), [ActNorm(2), LULinear(2), ActNorm(2)])


@pytest.mark.parametrize(("name", "build"), list(stacks()))
def test_norms_read_their_statistics_from_the_weighted_rows(name, build):
    x, weights, fresh = near_and_far()
    flow = build()
    x, weights, fresh = (torch.from_numpy(values).float() for values in (x, weights, fresh))
    fit(flow, x, weights=weights, epochs=1, batch_size=550, learning_rate=1e-6, validation=None, seed=0)
    assert flow.log_prob(fresh).mean().item() == pytest.approx(-2.84, abs=0.1)


def test_norms_of_images_read_their_statistics_from_the_weighted_rows():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(60, 2, 4, 4), 1000 * torch.randn(20, 2, 4, 4)])
    weights = torch.cat([torch.ones(60), torch.full((20,), 1e-12)])
    options = {"num_levels": 1, "num_steps": 1, "hidden_channels": 4}
    losses = []
    for rows, its_weights in ((x, weights), (x[:60], None)):
        torch.manual_seed(0)
        flow = glow((2, 4, 4), **options)
        fit(flow, rows, weights=its_weights, epochs=1, learning_rate=1e-9, validation=None, seed=0)
        losses.append(-flow.log_prob(x[:60]).mean().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_row_of_weight_zero_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(300, 2)
    far = torch.cat([x, torch.full((5, 2), 1e30)])
    weights = torch.cat([torch.ones(300), torch.zeros(5)])
    flows = []
    for rows, its_weights in ((x, weights[:300]), (far, weights)):
        torch.manual_seed(0)
        flows.append(maf(2, num_layers=2, hidden_features=(8,)))
        fit(flows[-1], rows, weights=its_weights, epochs=3, seed=0)
    for found, wanted in zip(flows[0].parameters(), flows[1].parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_share_of_the_weight_is_held_out():
    torch.manual_seed(0)
    x, seen = torch.randn(1000, 1), []
    weights = torch.where(torch.arange(1000) < 20, 50.0, 0.01)

    def objective(flow, x, context, weights):
        if not flow.training:
            seen.append(len(x))
            sums.append(float(x.shape[0]))
        return -(weights * flow.log_prob(x)).mean()

    sums = []
    for seed in range(5):
        seen.clear()
        flow = maf(1, num_layers=1, hidden_features=(4,))
        result = fit(flow, x, weights=weights, validation=0.2, epochs=1, seed=seed, objective=objective)
        assert result.steps > 0
        assert 20 < sum(seen) < 600  # about a fifth of the rows, with about a fifth of the twenty heavy ones


@pytest.mark.parametrize("seed", range(4))
def test_the_start_does_not_depend_on_a_first_batch_without_weight(seed):
    torch.manual_seed(seed)
    near = torch.randn(100, 2) + 3
    x = torch.cat([near, 1000 * torch.randn(1000, 2)])
    weights = torch.cat([torch.ones(100), torch.full((1000,), 1e-12)])
    layer = ActNorm(2)
    options = {"batch_size": 8, "epochs": 1, "learning_rate": 1e-9, "validation": None, "seed": seed}
    fit(Flow(StandardNormal(2), [layer]), x, weights=weights, **options)
    torch.testing.assert_close(layer.shift.data, near.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.log_scale.data.exp(), near.std(0, correction=0), rtol=1e-4, atol=1e-4)


def test_the_start_of_many_weighted_rows_is_read_from_rows_drawn_by_weight():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(400, 1) + 3, 1000 * torch.randn(40_000, 1)])
    weights = torch.cat([torch.ones(400), torch.full((40_000,), 1e-12)])
    layer = ActNorm(1)
    options = {"batch_size": 8, "epochs": 1, "learning_rate": 1e-9, "validation": None, "seed": 0}
    fit(Flow(StandardNormal(1), [layer]), x, weights=weights, options=FitOptions(steps_per_epoch=2), **options)
    assert layer.shift.item() == pytest.approx(3, abs=0.2)
    assert layer.log_scale.exp().item() == pytest.approx(1, abs=0.2)


def test_a_row_of_weight_two_is_a_row_that_comes_twice():
    x, times = torch.randn(60, 2, dtype=torch.float64), 1 + torch.arange(60) % 3
    flows = []
    for rows, weights in ((x, times.double()), (x.repeat_interleave(times, 0), None)):
        torch.manual_seed(0)
        flows.append(realnvp(2, num_layers=2, hidden_features=(8,), norm="batchnorm").double())
        fit(flows[-1], rows, weights=weights, epochs=5, batch_size=len(rows), validation=None, seed=0)
    for (name, found), wanted in zip(flows[0].state_dict().items(), flows[1].state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: name + text)


def test_layers_that_run_again_for_the_gradient_count_the_weights_again():
    x, weights = torch.randn(64, 2, dtype=torch.float64), torch.arange(64) % 7 + 0.1
    flows = []
    for again in (False, True):
        torch.manual_seed(0)
        flows.append(realnvp(2, num_layers=3, hidden_features=(8,), norm="batchnorm").double())
        options = FitOptions(activation_checkpointing=again)
        fit(flows[-1], x, weights=weights, epochs=4, batch_size=64, validation=None, seed=0, options=options)
    for found, wanted in zip(flows[1].parameters(), flows[0].parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
