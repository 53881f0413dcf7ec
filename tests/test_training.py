"""The training loop: its bookkeeping, what it keeps, when it stops, the data it takes and what it says of bad data."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import numpy as np
import pandas
import pyro.distributions as dist
import pytest
import torch
import tqdm.auto
from fits import Stream, affine, failing, fit, gaussian, same, small
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from pyroflows import (
    ActNorm,
    Compose,
    Coupling,
    DiagonalNormal,
    ElementwiseAffine,
    FitResult,
    Flow,
    LULinear,
    Permutation,
    StandardNormal,
    glow,
    maf,
    realnvp,
)
from pyroflows.training import trainer
from pyroflows.training.batches import Rows
from pyroflows.training.modes import activation_checkpointing, bf16_networks, channels_last

# Bookkeeping


@pytest.mark.parametrize("validation", [0.1, 0, None])
def test_history(validation):
    result = fit(small(), gaussian(), validation=validation, epochs=4, batch_size=10, seed=0)
    rows = 180 if validation else 200
    for name in ("train", "gradient_norm", "learning_rate", "seconds"):
        assert len(result.history[name]) == 4
    assert len(result.history["validation"]) == (4 if validation else 0)
    assert result.steps == 4 * (rows // 10)
    assert result.skipped_steps == 0
    assert result.stopped == "all 4 epochs done"
    losses = result.history["validation" if validation else "train"]
    assert result.best_loss == min(losses)
    assert result.best_epoch == losses.index(min(losses))
    assert result.history["seconds"] == sorted(result.history["seconds"])
    assert isinstance(result, FitResult)
    assert "best_loss=" in repr(result)
    assert "4 epochs" in repr(result)
    assert "FitResult" in repr(FitResult())


def test_learns_mean_and_scale():
    flow = affine()
    x = gaussian(2000)
    fit(flow, x, epochs=30, learning_rate=5e-2, validation=None, seed=0)
    wanted = dist.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean()
    assert flow.log_prob(x).mean().item() == pytest.approx(wanted.item(), abs=0.01)


def test_keeps_the_best_weights_and_leaves_evaluation_mode():
    flow, held = small(dropout=0.2), gaussian(100, seed=1)
    result = fit(flow, gaussian(60), validation=held, epochs=200, learning_rate=5e-2, schedule="constant", seed=0)
    assert not flow.training
    assert result.best_epoch < 199
    assert -flow.log_prob(held).mean().item() == pytest.approx(result.best_loss, abs=1e-5)


def test_stops_early():
    options = {"epochs": 200, "learning_rate": 0.1, "patience": 5, "seed": 0, "batch_size": 6}
    result = fit(small(), gaussian(60), validation=gaussian(60, seed=1), **options)
    assert result.stopped == "no better validation loss in 5 epochs"
    assert len(result.history["train"]) == result.best_epoch + 6 < 200


def test_few_rows_train_for_more_than_patience_steps():
    torch.manual_seed(0)
    x = 3 * torch.randn(200, 2) + 5
    assert fit(small(), x, epochs=400, seed=0).steps > 300
    assert fit(small(), x, epochs=2000, learning_rate=0.1, patience=1, seed=0).steps > 10


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_a_limit_of_time_that_is_not_reached_changes_nothing(kind):
    models = []
    for max_seconds in (None, 60, 100):
        torch.manual_seed(0)
        models.append(small())
        x = gaussian() if kind == "rows" else (batch for _ in range(1) for batch in gaussian().split(50))
        options = {"epochs": 3 if kind == "rows" else 1, "max_seconds": max_seconds, "seed": 0}
        fit(models[-1], x, validation=None, **options)
    for model in models[1:]:
        assert all(map(torch.equal, model.parameters(), models[0].parameters()))


def test_a_limit_of_time_changes_nothing_where_patience_ends_the_fit_before_it(monkeypatch):
    torch.manual_seed(0)
    x, results, models = torch.randn(200, 2), [], []
    for share in (None, 1.2, 2.0, 5.0, 0.5):  # of the time that the first takes
        clock = SimpleNamespace(perf_counter=count().__next__)  # a second a call
        monkeypatch.setattr("pyroflows.training.trainer.time", clock)
        limit = None if share is None else share * results[0].seconds
        torch.manual_seed(1)
        models.append(small())
        options = {"epochs": 2000, "batch_size": 18, "patience": 5, "learning_rate": 0.02, "warmup": 0.0, "seed": 0}
        results.append(fit(models[-1], x, max_seconds=limit, **options))
    assert {result.stopped for result in results[:-1]} == {"no better validation loss in 5 epochs"}
    for model in models[1:-1]:
        assert all(map(torch.equal, model.parameters(), models[0].parameters()))
    assert results[-1].stopped.startswith("max_seconds")
    assert results[-1].history["learning_rate"][-1] < 0.002  # it falls in the last tenth of the time
    assert results[-1].history["learning_rate"][-3] > 0.0199


def test_a_limit_of_time_that_is_reached_ends_the_schedule():
    result = fit(small(), gaussian(), epochs=100_000, learning_rate=0.01, max_seconds=0.5, patience=None, seed=0)
    assert result.stopped == "max_seconds=0.5 reached"
    assert result.history["learning_rate"][-1] < 1e-4


@pytest.mark.parametrize("seed", range(8))
def test_a_column_that_varies_in_one_row_keeps_it_among_the_training_rows(seed):
    x, seen = torch.randn(40, 3), []
    x[:, 1], x[7, 1] = 2.0, 3.0
    x[:, 2], x[9, 2] = 0.0, 1.0

    def objective(flow, x, context):
        seen.extend([x] if flow.training else [])
        return -flow.log_prob(x).mean()

    flow = realnvp(3, num_layers=1, hidden_features=(4,))
    fit(flow, x, validation=0.5, epochs=1, batch_size=1, seed=seed, objective=objective)
    assert (torch.cat(seen) != x[0]).any(0).all()


def test_warmup_is_a_share_or_a_number_of_steps():
    options = {"epochs": 4, "batch_size": 20, "schedule": "constant", "learning_rate": 1.0, "validation": None}
    rates = fit(small(), gaussian(40), warmup=5, seed=0, **options).history["learning_rate"]
    assert rates == pytest.approx([2 / 5, 4 / 5, 1.0, 1.0])


def test_patience_none_goes_on():
    result = fit(small(), gaussian(60), epochs=12, learning_rate=0.1, patience=None, seed=0)
    assert len(result.history["train"]) == 12


def test_max_seconds():
    result = fit(small(), gaussian(), epochs=100_000, max_seconds=0.3, patience=None, seed=0)
    assert result.stopped == "max_seconds=0.3 reached"
    assert 0.2 < result.seconds < 5
    assert result.history["learning_rate"][-1] < 5e-4  # the schedule ends with the time


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedules(schedule):
    rates = fit(
        small(), gaussian(), epochs=10, learning_rate=0.01, schedule=schedule, warmup=0.2, patience=None, seed=0
    ).history["learning_rate"]
    assert max(rates) <= 0.01
    if schedule == "constant":
        assert rates[2:] == [0.01] * 8
    else:
        assert rates[-1] < 1e-8 + 0.01 * 0.05
        assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[0] == pytest.approx(0.005, rel=0.2)


def test_no_warmup():
    rates = fit(small(), gaussian(), epochs=2, schedule="constant", warmup=0.0, seed=0).history["learning_rate"]
    assert rates == [1e-3] * 2


def test_weight_decay_shrinks_the_weights():
    norms = []
    for weight_decay in (0.0, 1.0):
        torch.manual_seed(0)
        flow = small()
        fit(flow, gaussian(), epochs=10, learning_rate=1e-2, weight_decay=weight_decay, validation=None, seed=0)
        norms.append(sum(p.square().sum() for n, p in flow.named_parameters() if "conditioner" in n))
    assert norms[1] < norms[0]


def test_max_grad_norm_bounds_the_gradient():
    def objective(flow, x, context):
        return -1e3 * flow.log_prob(x).mean()

    seen = []
    flow = affine()
    step = trainer.Adam.step

    def watched(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Adam, "step", watched)
        result = fit(flow, gaussian(), epochs=5, max_grad_norm=0.5, objective=objective, validation=None, seed=0)
        fit(affine(), gaussian(), epochs=5, max_grad_norm=None, objective=objective, validation=None, seed=0)
    assert max(seen[:5]) <= 0.5 + 1e-5
    assert min(seen[5:]) > 10
    assert min(result.history["gradient_norm"]) > 10


# Seeds


def test_a_seed_repeats_bit_for_bit_and_leaves_torchs_random_state():
    results, flows = [], []
    for _ in range(2):
        torch.manual_seed(5)
        flow = small(dropout=0.1)
        state = torch.get_rng_state()
        results.append(fit(flow, gaussian(), epochs=3, batch_size=32, seed=7))
        assert torch.equal(torch.get_rng_state(), state)
        flows.append(flow)
        torch.rand(11)
    assert same(*flows)
    assert results[0].history["train"] == results[1].history["train"]
    assert results[0].history["validation"] == results[1].history["validation"]


def test_another_seed_or_none_differs():
    histories = []
    for seed in (1, 2, None):
        torch.manual_seed(5)
        histories.append(tuple(fit(small(), gaussian(), epochs=1, batch_size=32, seed=seed).history["train"]))
    assert len(set(histories)) == 3


# What data may be


def test_numpy_of_either_precision():
    x = gaussian().numpy()
    flow = small()
    fit(flow, x.astype(np.float64), epochs=1, seed=0)
    assert flow.dtype == torch.float32
    twin = small().double()
    result = fit(twin, x, epochs=1, validation=(x[:20].astype(np.float64), None), seed=0)
    assert twin.dtype == torch.float64
    assert math.isfinite(result.best_loss)


def test_data_loader_and_list_of_batches_with_context():
    x, context = gaussian(120), torch.randn(120, 3)
    loader = DataLoader(TensorDataset(x, context), batch_size=40, shuffle=True)
    flow = small(context_features=3)
    result = fit(flow, loader, validation=(x, context), epochs=2, seed=0)
    assert result.steps == 6
    batches = [(x[:60], context[:60]), (x[60:], context[60:])]
    assert fit(flow, batches, epochs=2, seed=0).steps == 4
    assert fit(flow, ((a, b) for a, b in batches), epochs=1, seed=0).steps == 2


def test_batches_without_context():
    x = gaussian(120)
    assert fit(small(), DataLoader(TensorDataset(x), batch_size=40), epochs=2, seed=0).steps == 6
    assert fit(small(), DataLoader(x, batch_size=40), validation=x, epochs=2, seed=0).steps == 6
    assert fit(small(), [x[:60], x[60:]], epochs=2, seed=0).steps == 4
    assert fit(small(), list(x.numpy().reshape(2, 60, 2)), epochs=2, seed=0).steps == 4


@pytest.mark.parametrize(
    "held", [lambda x, c: (x, c), lambda x, c: (x.numpy(), c.numpy()), lambda x, c: 0.2, lambda x, c: None]
)
def test_context(held):
    context = torch.rand(300, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = 4 * context + 0.5 * torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
    flow = affine(1, context_features=1)
    fit(flow, x, context=context, validation=held(x, context), epochs=80, learning_rate=2e-2, batch_size=50, seed=0)
    assert flow.log_prob(x, context).mean() > -1.1  # the entropy is 0.73, without the context 2.3


def test_batch_sizes():
    assert fit(small(), gaussian(600), epochs=1, validation=None, seed=0).steps == 2
    assert fit(small(), gaussian(100), epochs=1, validation=None, seed=0).steps == 1
    assert fit(small(), gaussian(100), epochs=1, validation=None, batch_size=30, seed=0).steps == 3


def test_frozen_parameters_stay():
    flow = small()
    flow.layers[0].requires_grad_(False)
    before = [p.clone() for p in flow.layers[0].parameters()]
    fit(flow, gaussian(), epochs=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, flow.layers[0].parameters(), strict=True))


def test_a_second_fit_goes_on():
    flow = affine()
    first, second = (fit(flow, gaussian(), epochs=10, learning_rate=1e-2, validation=None, seed=0) for _ in range(2))
    assert second.best_loss < first.best_loss


def test_a_single_step_moves_the_weights():
    flow = affine()
    result = fit(flow, gaussian(), epochs=1, validation=None, seed=0)
    assert result.steps == 1
    assert flow.layers[1].shift.any()


# Objectives


def test_reverse_kl_without_data():
    target = dist.MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 2.0]]))

    def reverse_kl(flow, x, context):
        assert x is None
        assert context is None
        sample, log_prob = flow.rsample_and_log_prob((64,))
        return (log_prob - target.log_prob(sample)).mean()

    torch.manual_seed(0)
    flow = Flow(DiagonalNormal(2), [LULinear(2, init="identity")])
    settings = {"epochs": 5, "steps_per_epoch": 80, "learning_rate": 5e-2, "device": "cpu"}
    result = fit(flow, objective=reverse_kl, seed=0, **settings)
    assert result.steps == 400
    assert result.history["validation"] == []
    assert reverse_kl(flow, None, None).abs() < 0.02
    sample = flow.sample((20_000,))
    torch.testing.assert_close(sample.mean(0), target.loc, rtol=0, atol=0.06)
    torch.testing.assert_close(sample.T.cov(), target.covariance_matrix, rtol=0, atol=0.12)


def test_own_objective_sees_batches():
    seen = []

    def objective(flow, x, context):
        seen.append((tuple(x.shape), None if context is None else tuple(context.shape)))
        return -flow.log_prob(x, context).mean()

    fit(
        small(context_features=1),
        gaussian(100),
        context=torch.zeros(100, 1),
        validation=0.2,
        epochs=1,
        batch_size=40,
        objective=objective,
    )
    assert seen == [((40, 2), (40, 1)), ((40, 2), (40, 1)), ((20, 2), (20, 1))]


# Weights of rows


def weighted(rows=200, seed=0):
    """Rows, weights that are whole numbers, and the rows repeated as often."""
    x = gaussian(rows, seed=seed).double()
    weights = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(seed))
    return x, weights, x.repeat_interleave(weights, 0)


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"ema_decay": 0.9}, {"steps_per_epoch": 2}])
@pytest.mark.parametrize("form", [lambda w: w, lambda w: 7.5 * w.double().numpy()])
def test_a_weight_is_a_row_so_many_times(options, form):
    x, weights, repeated = weighted()
    held_x, held_weights, held_repeated = weighted(50, seed=1)
    flows, results = [], []
    for rows, w, validation in (
        (x, form(weights), (held_x, None, form(held_weights))),
        (repeated, None, held_repeated),
    ):
        torch.manual_seed(0)
        flows.append(small(norm="none").double())
        fixed = {"epochs": 4, "batch_size": len(rows), "learning_rate": 1e-2, "seed": 0}
        results.append(fit(flows[-1], rows, weights=w, validation=validation, **fixed, **options))
    for name in ("train", "validation", "gradient_norm"):
        assert results[0].history[name] == pytest.approx(results[1].history[name], rel=1e-9), name
    for a, b in zip(*(flow.parameters() for flow in flows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_weights_go_with_the_rows_and_contexts_held_out_and_reach_an_objective():
    x = torch.arange(1.0, 101)[:, None].repeat(1, 2)
    seen = {True: [], False: []}

    def objective(flow, x, context, weights):
        assert torch.equal(context, x[:, :1])
        seen[flow.training] += [x[:, 0] / weights]
        return -(weights * flow.log_prob(x, context)).mean()

    flow = small(context_features=1)
    fit(flow, x, context=x[:, :1], weights=x[:, 0], objective=objective, batch_size=20, epochs=1, seed=0)
    for batches in seen.values():
        ratios = torch.cat(batches)
        torch.testing.assert_close(ratios, ratios[:1].expand(len(ratios)))
    assert float(torch.cat(seen[False]).numel()) == pytest.approx(10, abs=6)  # a tenth of the weight


def test_held_out_rows_have_their_own_weights_or_none():
    x, weights, _ = weighted()
    flow, seen = small().double(), []

    def objective(flow, *batch):
        seen.append((flow.training, len(batch)))
        return -flow.log_prob(*batch[:2]).mean()

    fit(flow, x, weights=weights, validation=(x, None), objective=objective, epochs=1, batch_size=200)
    fit(flow, x, validation=(x, None, weights), objective=objective, epochs=1, batch_size=200)
    assert seen == [(True, 3), (False, 2), (True, 2), (False, 3)]


@pytest.mark.parametrize(
    "weights, error, message",
    [
        (torch.ones(199), ValueError, r"expected weights of shape \(200,\), one for each row of data; got \(199,\)"),
        (torch.ones(200, 1), ValueError, r"expected weights of shape \(200,\).*got \(200, 1\)"),
        (-torch.arange(200.0), ValueError, "expected weights of data that are at least 0; got -1.0 in row 1"),
        (torch.arange(200) / 0.0, ValueError, "expected finite numbers in weights of data; got NaN in row 0"),
        (torch.zeros(200), ValueError, "expected a weight above 0 among those of the held-out rows; got zeros only"),
        (["a"] * 200, TypeError, "expected weights of data as a tensor or an array of numbers; got list"),
    ],
)
def test_messages_of_weights(weights, error, message):
    with pytest.raises(error, match=message):
        fit(small(), gaussian(), weights=weights)


def test_more_messages_of_weights():
    x, ones = gaussian(), torch.ones(200)
    with pytest.raises(ValueError, match="among those of the training rows; got zeros only"):
        fit(small(), x, weights=0 * ones, validation=None)
    with pytest.raises(ValueError, match="among those of validation data; got zeros only"):
        fit(small(), x, validation=(x, None, 0 * ones))
    with pytest.raises(ValueError, match="one for each row of validation data; got"):
        fit(small(), x, validation=(x, None, ones[:3]))
    with pytest.raises(ValueError, match="expected weights only with a tensor or an array; got it with list"):
        fit(small(), [x], weights=ones)


# Steps that are not finite


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    flow = small()
    result = fit(
        flow, gaussian(), batch_size=20, epochs=3, objective=failing(lambda n: n % 4 == 0), max_skipped=3, seed=0
    )
    assert result.skipped_steps == 27 // 4
    assert result.steps == 27
    assert result.stopped == "all 3 epochs done"
    assert all(math.isfinite(v) for values in result.history.values() for v in values)
    assert all(p.isfinite().all() for p in flow.parameters())


def test_a_gradient_that_is_not_finite_is_skipped():
    def objective(flow, x, context):
        loss = -flow.log_prob(x).mean()
        return loss + (flow.prior.loc - flow.prior.loc.detach()).abs().sqrt().sum() if loss.requires_grad else loss

    flow = Flow(DiagonalNormal(2), [LULinear(2)])
    before = flow.prior.loc.detach().clone()
    result = fit(flow, gaussian(), epochs=2, objective=objective, seed=0)
    assert result.skipped_steps == result.steps
    assert torch.equal(flow.prior.loc, before)


def test_stops_with_the_best_weights_after_too_many():
    flow, held = small(), gaussian(50, seed=1)
    objective = failing(lambda n: n > 30)
    result = fit(
        flow, gaussian(), validation=held, batch_size=20, epochs=50, objective=objective, max_skipped=5, seed=0
    )
    assert result.stopped == "loss or gradient not finite in 5 steps in a row"
    assert result.steps < 200
    assert -flow.log_prob(held).mean().item() == pytest.approx(result.best_loss, abs=1e-5)


def test_stops_where_nothing_was_ever_finite():
    flow = small()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    result = fit(
        flow,
        gaussian(),
        batch_size=10,
        epochs=50,
        objective=failing(lambda n: True),
        max_skipped=3,
        validation=None,
        seed=0,
    )
    assert result.best_epoch is None
    assert result.stopped == "loss or gradient not finite in 3 steps in a row"
    assert result.skipped_steps == result.steps
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    repr(result)


# Messages


def spoiled(value, row, column):
    x = gaussian()
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fit(small(), spoiled(math.nan, 7, 1)), ValueError, r"got NaN in row 7, column 1 \(1 such"),
        (lambda: fit(small(), spoiled(-math.inf, 3, 0)), ValueError, "got -inf in row 3, column 0"),
        (
            lambda: fit(small(), gaussian(), validation=spoiled(math.nan, 2, 1)),
            ValueError,
            "validation data; got NaN in row 2",
        ),
        (
            lambda: fit(small(context_features=2), gaussian(), context=spoiled(math.inf, 9, 1)),
            ValueError,
            "finite numbers in context of data; got inf in row 9, column 1",
        ),
        (
            lambda: fit(small(), [gaussian(20), spoiled(math.nan, 4, 0)]),
            ValueError,
            "batch 1; got NaN in row 4, column 0",
        ),
        (
            lambda: fit(realnvp(3), torch.cat([gaussian(), torch.ones(200, 1)], 1)),
            ValueError,
            "expected columns that vary.*got .*column.* 2",
        ),
        (lambda: fit(small(), gaussian(20), batch_size=64), ValueError, "expected at least batch_size=64.*got 18"),
        (lambda: fit(small(), gaussian(1)), ValueError, "expected at least 2 rows of data; got 1"),
        (lambda: fit(small(), gaussian(0)), ValueError, "expected at least 2 rows of data; got 0"),
        (
            lambda: fit(small(), torch.ones(10, 2, dtype=torch.long)),
            TypeError,
            "floating-point numbers; got torch.int64",
        ),
        (lambda: fit(small(), np.ones((10, 2), dtype=np.uint8)), TypeError, "floating-point numbers; got torch.uint8"),
        (lambda: fit(small(), gaussian(features=3)), ValueError, r"expected data of shape \(rows, 2\); got \(200, 3\)"),
        (lambda: fit(small(), gaussian()[0]), ValueError, r"expected data of shape \(rows, 2\); got \(2,\)"),
        (lambda: fit(small(), torch.rand(8, 1, 28, 28)), ValueError, r"shape \(rows, 2\); got \(8, 1, 28, 28\)"),
        (lambda: fit(small(), "data.csv"), TypeError, "expected .* as a tensor.*got str"),
        (lambda: fit(small(), 3.0), TypeError, "expected data as a tensor, an array or batches; got float"),
        (lambda: fit(small(), [1.0, 2.0]), (TypeError, ValueError), "expected .*got"),
        (lambda: fit(small(), np.array([["a", "b"]])), TypeError, "expected data as a tensor or an array of numbers"),
        (
            lambda: fit(small(context_features=3), gaussian()),
            ValueError,
            r"a context of shape \(\*batch, 3\); got none",
        ),
        (lambda: fit(small(), gaussian(), context=torch.zeros(200, 3)), ValueError, "expected no context.*got one"),
        (
            lambda: fit(small(context_features=3), gaussian(), context=torch.zeros(100, 3)),
            ValueError,
            r"expected a context.*got \(100, 3\)",
        ),
        (
            lambda: fit(small(context_features=3), gaussian(), context=torch.zeros(3)),
            ValueError,
            r"expected a context for each of 200 rows; got \(3,\)",
        ),
        (
            lambda: fit(small(context_features=3), gaussian(), context=torch.zeros(200, 2)),
            ValueError,
            r"expected a context of shape \(\*batch, 3\); got \(200, 2\)",
        ),
        (
            lambda: fit(small(context_features=1), gaussian(), context=torch.zeros(200, 1), validation=gaussian()),
            ValueError,
            "got none",
        ),
        (lambda: fit(small(), gaussian(), epochs=0), ValueError, "expected epochs to be a positive integer; got 0"),
        (lambda: fit(small(), gaussian(), epochs=-3), ValueError, "expected epochs to be a positive integer; got -3"),
        (lambda: fit(small(), gaussian(), epochs=1.5), ValueError, "expected epochs to be a positive integer; got 1.5"),
        (
            lambda: fit(small(), gaussian(), batch_size=0),
            ValueError,
            "expected batch_size to be a positive integer; got 0",
        ),
        (lambda: fit(small(), gaussian(), patience=0), ValueError, "expected patience to be a positive integer; got 0"),
        (
            lambda: fit(small(), gaussian(), learning_rate=0.0),
            ValueError,
            r"expected learning_rate in \(0, inf\); got 0.0",
        ),
        (
            lambda: fit(small(), gaussian(), learning_rate=-1),
            ValueError,
            r"expected learning_rate in \(0, inf\); got -1",
        ),
        (lambda: fit(small(), gaussian(), learning_rate=math.nan), ValueError, r"learning_rate in \(0, inf\); got nan"),
        (
            lambda: fit(small(), gaussian(), max_grad_norm=0.0),
            ValueError,
            r"expected max_grad_norm in \(0, inf\); got 0.0",
        ),
        (lambda: fit(small(), gaussian(), max_seconds=-1), ValueError, r"expected max_seconds in \(0, inf\); got -1"),
        (lambda: fit(small(), gaussian(), max_skipped=0), ValueError, "max_skipped to be a positive integer; got 0"),
        (
            lambda: fit(small(), gaussian(), weight_decay=-0.1),
            ValueError,
            r"expected weight_decay in \[0, inf\); got -0.1",
        ),
        (lambda: fit(small(), gaussian(), warmup=-1.0), ValueError, r"warmup in \[0, inf\); got .*-1.0"),
        (
            lambda: fit(small(), gaussian(), schedule="linear"),
            ValueError,
            "expected schedule to be one of.*got 'linear'",
        ),
        (lambda: fit(small(), gaussian(), validation=1.0), ValueError, r"validation rows in \[0, 1\); got 1.0"),
        (lambda: fit(small(), gaussian(), validation=-0.1), ValueError, r"validation rows in \[0, 1\); got -0.1"),
        (
            lambda: fit(small(), gaussian(), validation=gaussian(features=3)),
            ValueError,
            "expected validation data of shape",
        ),
        (lambda: fit(small(), gaussian(), validation="all"), (TypeError, ValueError), "validation"),
        (lambda: fit(small(), gaussian(), lr=1e-3), TypeError, "lr"),
        (lambda: fit(torch.nn.Linear(2, 2), gaussian()), TypeError, "expected a Flow; got Linear"),
        (
            lambda: fit(Flow(StandardNormal(2), small().layers[:1]).requires_grad_(False), gaussian()),
            ValueError,
            "got none",
        ),
        (
            lambda: fit(maf(2), [gaussian(features=3)]),
            ValueError,
            r"expected batch 0 of shape \(rows, 2\); got \(200, 3\)",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_data_leave_the_flow_untouched():
    flow = small()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    with pytest.raises(ValueError, match="finite"):
        fit(flow, spoiled(math.nan, 0, 0))
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_progress_bar_does_not_break():
    assert fit(small(), gaussian(), epochs=2, progress=True, seed=0).steps == 2
    assert fit(small(), gaussian(), epochs=2, progress=False, seed=0).steps == 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fit(small()), ValueError, "expected data, or an objective that needs none; got neither"),
        (lambda: fit(small(), gaussian().tolist()), TypeError, "expected batches that are tensors.*; got float"),
        (lambda: fit(small(), {"x": gaussian()}), TypeError, "expected batches that are tensors.*; got str"),
        (lambda: fit(small(), []), ValueError, "expected batches in every epoch; got none in epoch 0"),
        (lambda: fit(small(), (gaussian() for _ in range(2)), epochs=3), ValueError, "got none in epoch 1"),
        (
            lambda: fit(small(), gaussian().double() * 1e300),
            ValueError,
            r"got .*e\+.*, beyond the range of torch.float32",
        ),
        (
            lambda: fit(small(), gaussian(), validation=gaussian()[:0]),
            ValueError,
            "one row of validation data; got none",
        ),
        (
            lambda: fit(small(), gaussian(), validation=(1, 2, 3, 4)),
            ValueError,
            r"\(data, context, weights\); got 4 items",
        ),
        (lambda: fit(small(), gaussian(), seed="a"), TypeError, "expected seed to be an integer; got 'a'"),
        (lambda: fit(small(), gaussian(), learning_rate="a"), TypeError, r"learning_rate in \(0, inf\); got 'a'"),
        (lambda: fit(small(), gaussian(), objective=lambda *_: 1.0), TypeError, "returns a scalar tensor.*; got float"),
        (lambda: fit(small(), gaussian(), objective=lambda f, x, c: f.log_prob(x)), TypeError, "got a tensor of shape"),
    ],
)
def test_more_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_data_in_odd_forms_give_the_same_fit():
    x = gaussian()
    forms = [x, x.numpy()[::-1][::-1], pandas.DataFrame(x.numpy()), x.clone().requires_grad_() * 1]
    losses = []
    for form in forms:
        torch.manual_seed(0)
        losses.append(fit(small(), form, epochs=2, seed=0).best_loss)
    assert len(set(losses)) == 1


def test_a_fit_that_blows_up_at_once_keeps_the_first_weights():
    flow = small()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    result = fit(flow, gaussian(), objective=lambda f, x, c: f.log_prob(x).sum() * math.inf, epochs=3, max_skipped=2)
    assert result.best_epoch is None
    assert "not finite in 2 steps in a row" in result.stopped
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


@pytest.mark.parametrize("batches", [DataLoader(Stream(), batch_size=None), (b for b in gaussian().split(20))])
def test_a_stream_without_a_length_trains_at_its_rate(batches):
    result = fit(affine(), batches, epochs=1, learning_rate=1e-2, warmup=0.0)
    assert result.steps == 10
    assert result.history["learning_rate"] == [1e-2]


def test_the_rate_of_a_stream_falls_once_its_length_is_known():
    rates = fit(affine(), DataLoader(Stream(), batch_size=None), epochs=4, learning_rate=1e-2).history["learning_rate"]
    assert rates[1] > rates[2] > rates[3]


@pytest.mark.parametrize("precision", ["64-true", "16-mixed", "bf16-true", "half"])
def test_a_precision_that_is_not_offered_is_refused(precision):
    with pytest.raises(ValueError, match=f"expected precision to be None or 'bf16-mixed'; got '{precision}'"):
        fit(affine(), gaussian(), precision=precision)
    with pytest.raises(ValueError, match="expected a flow of float32 or float64; got torch.bfloat16"):
        fit(affine().bfloat16(), gaussian())


def test_mixed_precision_trains_and_validates_in_full():
    flow = small()
    result = fit(flow, gaussian(), validation=gaussian(), epochs=2, precision="bf16-mixed", seed=0)
    with torch.no_grad():
        assert -flow.log_prob(gaussian()).mean() == pytest.approx(result.best_loss, abs=1e-5)
    assert flow.dtype == torch.float32


def test_an_interrupt_in_the_first_epoch_keeps_what_was_learned():
    flow, steps = affine(), []

    def objective(flow, x, context):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return -flow.log_prob(x).mean()

    with pytest.raises(KeyboardInterrupt):
        fit(flow, gaussian(), objective=objective, batch_size=20, learning_rate=1e-2)
    assert any(p.abs().max() > 1e-3 for p in flow.parameters())


def test_validation_as_a_number_of_any_kind():
    losses = []
    for share in (0.1, np.float64(0.1), np.float32(0.1)):
        torch.manual_seed(0)
        losses.append(fit(affine(), gaussian(), validation=share, epochs=1, seed=0).best_loss)
    assert len(set(losses)) == 1
    with pytest.raises(TypeError, match=r"validation rows in \[0, 1\); got True"):
        fit(affine(), gaussian(), validation=True)


def test_a_flow_of_two_dtypes_is_refused():
    flow = Flow(StandardNormal(2), [LULinear(2), ElementwiseAffine(2).double()])
    with pytest.raises(TypeError, match="of one dtype; got torch.float32 and torch.float64"):
        fit(flow, gaussian())


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
def test_compiled_fit_gives_the_same_result_and_leaves_the_flow_as_it_was(monkeypatch, precision):
    if precision is not None and torch.__version__ < "2.14":
        with pytest.raises(ValueError, match="cannot be combined with precision='bf16-mixed' before torch 2.14"):
            fit(small(), gaussian(), compile=True, precision=precision)
        return
    compiled, compile = [], torch.compile

    def with_eager_backend(method, **options):
        compiled.append(method.__name__)
        return compile(method, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", with_eager_backend)
    losses = []
    for option in (False, True):
        torch.manual_seed(0)
        flow = small()
        losses.append(
            fit(flow, gaussian(), epochs=2, batch_size=50, compile=option, precision=precision, seed=0).best_loss
        )
        assert "log_prob" not in vars(flow)
    assert compiled == ["log_prob", "dequantized_log_prob", "rsample_and_log_prob", "rsample_and_score"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_first_fit_imports_no_compiler():
    script = """
import sys, torch, pyroflows
for optimizer in ("adam", "adamax"):
    options = pyroflows.FitOptions(ema_decay=0.9, accumulate=2, precision="bf16-mixed", optimizer=optimizer)
    pyroflows.fit(pyroflows.realnvp(2, num_layers=2), torch.randn(100, 2), epochs=2, options=options)
print([name for name in ("torch._dynamo", "sympy", "lightning_fabric") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "[]\n", ended.stderr


@pytest.mark.parametrize("kind", ["Adam", "Adamax"])
def test_the_optimizers_are_those_of_torch(kind):
    counted, results = [], []
    with contextlib.closing(contextlib.ExitStack()) as stack:
        handle = register_optimizer_step_post_hook(lambda *_: counted.append(1))
        stack.callback(handle.remove)
        for module in (torch.optim, trainer):
            weights = torch.nn.Parameter(torch.arange(1.0, 5.0))
            optimizer = getattr(module, kind)([weights], 0.1, weight_decay=0.1)
            for _ in range(5):
                optimizer.zero_grad()
                weights.pow(3).sum().backward()
                optimizer.step()
            again = getattr(module, kind)([weights], 1.0)
            again.load_state_dict(optimizer.state_dict())
            again.step()
            results.append(weights.detach())
    assert torch.equal(*results)
    assert len(counted) == 12
    assert isinstance(optimizer, getattr(torch.optim, kind))


@pytest.mark.parametrize(
    "device, message",
    [
        ("gpu", "expected device to be 'auto' or one that torch knows, such as 'cpu'; got 'gpu'"),
        (3.0, "expected device to be 'auto' or one that torch knows, such as 'cpu'; got 3.0"),
        ("meta", "expected a device that torch sees; got 'meta', of which there is none"),
        ("cuda:99", "expected a device that torch sees; got 'cuda:99', of which there is none"),
    ],
)
def test_messages_of_devices(device, message):
    with pytest.raises(ValueError, match=message):
        fit(small(), gaussian(), device=device)


def test_a_device_may_be_an_object():
    assert fit(small(), gaussian(), device=torch.device("cpu"), epochs=1).steps == 1


# An embedding of the context


def embedded(norm="actnorm"):
    """A flow given sets of 7 numbers, of which it has to find the mean."""
    plain = realnvp(2, num_layers=2, hidden_features=(16,), context_features=2, norm=norm)
    network = torch.nn.Sequential(torch.nn.Conv1d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(40, 2))
    return Flow(plain.prior, plain.layers, embedding=network)


def sets(rows=400):
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(rows, 1, 7, generator=generator)
    return context.mean((1, 2))[:, None] + 0.1 * torch.randn(rows, 2, generator=generator), context


@pytest.mark.parametrize("norm", ["actnorm", "batchnorm"])
def test_an_embedding_trains_with_the_flow(norm):
    flow = embedded(norm)
    x, context = sets()
    before = [p.detach().clone() for p in flow.embedding.parameters()]
    options = {"epochs": 30, "batch_size": 50, "learning_rate": 1e-2, "seed": 0}
    result = fit(flow, x, context=context.double().numpy(), **options)
    assert all(not torch.equal(a, b) for a, b in zip(before, flow.embedding.parameters(), strict=True))
    assert result.best_loss < 0.0  # without the context: 1.1, with the exact mean: -1.8
    held = fit(flow, x, context=context, validation=(x[:9], context[:9]), **{**options, "epochs": 1})
    assert math.isfinite(held.best_loss)
    batches = [(x[i : i + 50], context[i : i + 50]) for i in range(0, 400, 50)]
    assert fit(flow, batches, epochs=1).steps == 8


def test_an_embedding_of_integers_trains():
    plain = realnvp(2, num_layers=2, context_features=3)
    flow = Flow(plain.prior, plain.layers, embedding=torch.nn.Embedding(4, 3))
    words = np.arange(200) % 4
    assert fit(flow, gaussian(), context=words, epochs=1, batch_size=20).steps == 9


@pytest.mark.parametrize(
    "context, message",
    [
        (None, "expected a context for the embedding; got none"),
        (torch.zeros(399, 1, 7), r"a context for each of 400 rows; got \(399, 1, 7\)"),
        (torch.full((400, 1, 7), math.nan), "finite numbers in context of data; got NaN in row 0, column 0, 0"),
    ],
)
def test_a_context_for_an_embedding_is_checked(context, message):
    with pytest.raises(ValueError, match=message):
        fit(embedded(), sets()[0], context=context, epochs=1)


# Averaged weights


class Seen:
    """The likelihood, which keeps the weights it saw."""

    def __init__(self, bad=()):
        self.weights, self.bad = [], bad

    def __call__(self, flow, x, context):
        self.weights.append([p.detach().clone() for p in flow.parameters()])
        loss = -flow.log_prob(x).mean()
        return loss * math.nan if len(self.weights) - 1 in self.bad else loss


def fitted(ema_decay, bad=(), **options):
    torch.manual_seed(0)
    flow, seen = affine(), Seen(bad)
    x = gaussian(40)
    options = {"learning_rate": 0.05, "ema_decay": ema_decay, "seed": 0, "device": "cpu", **options}
    fit(flow, x, objective=seen, epochs=6, batch_size=10, **options)
    return flow, seen


@pytest.mark.parametrize("ema_decay", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("bad", [(), (3, 7)])
def test_averaged_weights_are_a_moving_average_by_hand(ema_decay, bad):
    plain, seen = fitted(0.0, bad, validation=None)
    flow, also_seen = fitted(ema_decay, bad, validation=None)
    # The average is taken beside the training, which it does not change.
    for a, b in zip(seen.weights, also_seen.weights, strict=True):
        assert all(map(torch.equal, a, b))
    after = [*seen.weights[1:], list(plain.parameters())]
    assert len(after) == 24
    wanted = after[0]
    for step, weights in enumerate(after[1:], 1):
        share = max(1 - ema_decay, 5 / (step + 5))
        wanted = [(1 - share) * mean + share * weight for mean, weight in zip(wanted, weights, strict=True)]
    for found, by_hand in zip(flow.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.detach(), by_hand, rtol=1e-5, atol=1e-6)
    assert not same(flow, plain)


def test_averaged_weights_are_what_is_evaluated_and_kept():
    held = gaussian(100, seed=1)
    flow = affine()
    result = fit(flow, gaussian(60), validation=held, epochs=20, learning_rate=5e-2, ema_decay=0.9, seed=0)
    assert -flow.log_prob(held).mean().item() == pytest.approx(result.best_loss, abs=1e-5)
    assert result.best_loss == min(result.history["validation"])


def test_averaged_weights_of_a_noisy_fit_are_nearer():
    x = gaussian(4000)
    wanted = dist.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean().item()
    gaps = []
    for ema_decay in (0.0, 0.99):
        torch.manual_seed(0)
        flow = affine()
        options = {"batch_size": 10, "schedule": "constant", "validation": None, "seed": 0}
        fit(flow, x, epochs=2, learning_rate=5e-2, ema_decay=ema_decay, **options)
        gaps.append(wanted - flow.log_prob(x).mean().item())
    assert gaps[1] < gaps[0] / 3


def test_averaged_weights_leave_frozen_ones():
    flow = small()
    frozen = [p.requires_grad_(False) for p in flow.layers[0].parameters()]
    before = [p.clone() for p in frozen]
    moving = [p.clone() for p in flow.parameters() if p.requires_grad]
    fit(flow, gaussian(), epochs=3, ema_decay=0.9, seed=0)
    assert all(map(torch.equal, frozen, before))
    assert not all(map(torch.equal, (p for p in flow.parameters() if p.requires_grad), moving))


@pytest.mark.parametrize("ema_decay, error", [(1.0, ValueError), (-0.1, ValueError), ("most", TypeError)])
def test_an_average_out_of_range_is_refused(ema_decay, error):
    with pytest.raises(error, match=r"expected ema_decay in \[0, 1\); got"):
        fit(small(), gaussian(), ema_decay=ema_decay)


@pytest.mark.parametrize(
    "progress, label, disable",
    [("stage 2", "stage 2", None), (True, None, False), (False, None, True), (None, None, None)],
)
def test_the_bar_has_its_label(monkeypatch, progress, label, disable):
    given = {}

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *args, **options):
            given.update(options)
            super().__init__(*args, **{**options, "disable": True})

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    fit(small(), gaussian(), epochs=1, progress=progress, seed=0)
    assert given["desc"] == label
    assert given["disable"] is disable  # None: shown on a terminal alone


# Discrete data


class Noise(torch.nn.Module):
    """Adds uniform noise to levels, and counts the looks at the data."""

    def __init__(self):
        super().__init__()
        self.checked = []

    def check(self, x):
        self.checked.append(len(x))
        if x.max() > 7:
            raise ValueError(f"expected levels below 8; got {x.max()}")

    def forward(self, x):
        assert x.dtype == torch.uint8
        y = (x + torch.rand(x.shape)) / 8
        return y, torch.full(x.shape[:-1], math.log(8.0) * x.shape[-1])


def levels(rows=200):
    return torch.randint(0, 8, (rows, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def discrete(flow=None, **options):
    flow = flow or small(**options)
    flow.dequantizer = Noise()
    return flow


def test_discrete_data_train_by_the_bound_and_stay_as_they_are():
    flow = discrete(norm="batchnorm")
    x = levels()
    x[:, 1] = 3  # also where a column is constant
    result = fit(flow, x, epochs=20, batch_size=45, learning_rate=1e-2, seed=0)
    assert result.best_loss == min(result.history["validation"])
    assert 1.8 < result.best_loss < 3  # the entropy is log 8 = 2.1; the start was at 4
    assert flow.dequantizer.checked == [200]


def test_discrete_data_in_batches():
    flow = discrete()
    assert fit(flow, [levels()[:100].numpy(), levels()[100:]], validation=levels(), epochs=2).steps == 4
    assert flow.dequantizer.checked == [200, 100, 100, 100, 100]
    with pytest.raises(ValueError, match="expected levels below 8; got 9"):
        fit(flow, [levels() + 2], epochs=1)


# Optimizers


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_step_left_out_leaves_weights_and_optimizer_as_they_were(monkeypatch, optimizer, ema_decay):
    made = []
    for name in ("Adam", "Adamax"):
        kind = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *a, kind=kind, **k: made.append(kind(*a, **k)) or made[-1])

    torch.manual_seed(0)
    flow, seen, states = affine(), [], []

    def objective(flow, x, context):
        seen.append([p.detach().clone() for p in flow.parameters()])
        states.append([t.clone() for s in made[0].state.values() for t in s.values()])
        return -flow.log_prob(x).mean() * (math.nan if len(seen) == 5 else 1)

    fit(
        flow,
        gaussian(40),
        objective=objective,
        optimizer=optimizer,
        ema_decay=ema_decay,
        batch_size=10,
        epochs=2,
        validation=None,
    )
    assert type(made[0]).__name__.lower() == optimizer
    assert states[4]
    for before, after in ((seen[4], seen[5]), (states[4], states[5])):
        assert all(map(torch.equal, before, after))
    assert not all(map(torch.equal, seen[3], seen[4]))
    assert not all(map(torch.equal, seen[5], seen[6]))


def test_adamax_learns():
    flow, x = affine(), gaussian(2000)
    fit(flow, x, epochs=60, learning_rate=0.1, optimizer="adamax", validation=None, seed=0)
    wanted = dist.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean()
    assert flow.log_prob(x).mean().item() == pytest.approx(wanted.item(), abs=0.01)


# Parts of a batch


@pytest.mark.parametrize("accumulate", [2, 3, 50])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_parts_of_a_batch_give_its_step(accumulate, ema_decay):
    flows, results = [], []
    for number in (1, accumulate):
        torch.manual_seed(0)
        flows.append(small(norm="none").double())
        options = {"batch_size": 50, "epochs": 4, "ema_decay": ema_decay, "accumulate": number, "seed": 0}
        results.append(fit(flows[-1], gaussian().double(), **options))
    assert results[0].history["train"] == pytest.approx(results[1].history["train"], rel=1e-10)
    assert results[0].history["gradient_norm"] == pytest.approx(results[1].history["gradient_norm"], rel=1e-10)
    for a, b in zip(*(flow.parameters() for flow in flows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_parts_have_their_context_and_draws_their_number():
    seen = []

    def objective(flow, x, context):
        seen.append(None if x is None else (len(x), len(context)))
        return flow.rsample_and_log_prob((8,))[1].mean() if x is None else -flow.log_prob(x, context).mean()

    options = {"objective": objective, "accumulate": 3, "validation": None}
    fit(small(context_features=1), gaussian(8), context=torch.zeros(8, 1), epochs=1, **options)
    assert seen == [(3, 3), (3, 3), (2, 2)]
    seen.clear()
    assert fit(small(), epochs=1, steps_per_epoch=2, **options).steps == 2
    assert seen == [None] * 6


def test_a_part_that_is_not_finite_leaves_the_whole_step_out():
    count = []

    def objective(flow, x, context):
        count.append(1)
        return -flow.log_prob(x).mean() * (math.nan if len(count) == 4 else 1)

    flow = small()
    result = fit(flow, gaussian(), objective=objective, accumulate=3, batch_size=50, epochs=2, validation=None)
    assert result.skipped_steps == 1
    assert all(p.isfinite().all() for p in flow.parameters())


# Epochs of so many steps


def test_steps_of_a_running_shuffle_see_all_rows_before_one_again():
    rows = Rows(torch.arange(10.0)[:, None], batch_size=4, steps=3)
    seen = [x.flatten().tolist() for _ in range(5) for x, *_ in rows.epoch()]
    assert len(seen) == 15
    assert all(len(batch) == 4 for batch in seen)
    flat = [value for batch in seen for value in batch]
    for start in range(0, 60, 10):
        assert sorted(flat[start : start + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]


def test_steps_per_epoch():
    assert fit(small(), gaussian(), steps_per_epoch=7, batch_size=100, epochs=2, seed=0).steps == 14
    assert fit(small(), gaussian(), steps_per_epoch=1, batch_size=10, epochs=2, seed=0).steps == 2
    assert fit(small(), objective=lambda f, x, c: f.rsample_and_log_prob((8,))[1].mean(), epochs=1).steps == 100


def test_evaluation_takes_fewer_rows_of_larger_events():
    sizes = {shape: Rows(torch.zeros(20_000, *shape)).slices()[0].stop for shape in ((2,), (64,), (3, 16, 16))}
    assert sizes == {(2,): 8192, (64,): 8192, (3, 16, 16): 682}
    assert Rows(torch.zeros(2, 2**20)).slices() == [slice(0, 1), slice(1, 2)]
    rows = Rows(torch.arange(20_000.0)[:, None])
    covered = torch.cat([rows[part].x for part in rows.slices()])
    assert torch.equal(covered.flatten(), torch.arange(20_000.0))


# Augmentation


def test_augmentation_sees_training_batches_alone():
    given = []

    def augment(x):
        given.append(len(x))
        return -x

    seen = []

    def objective(flow, x, context):
        seen.append(bool((x > 0).float().mean() > 0.5))
        return -flow.log_prob(x).mean()

    fit(small(), gaussian(), augment=augment, objective=objective, accumulate=2, batch_size=90, epochs=1, seed=0)
    assert given == [90, 90]
    assert seen == [False] * 4 + [True]


# Recomputation


class Level(torch.nn.Module):
    """A conditioner with dropout, or none."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(64, 8)
        )

    def forward(self, x, context=None):
        return self.network(x)


def nested(steps=3, *, dropout=0.0, levels=2):
    """Levels of steps, a coupling with an unnested one beside them in each level."""

    def step():
        return Compose([Coupling(8, conditioner=Level(dropout)), LULinear(8), ActNorm(8)])

    stack = [Compose([*(step() for _ in range(steps)), Permutation(8, "reverse")]) for _ in range(levels)]
    return Flow(StandardNormal(8), [Compose(stack), ElementwiseAffine(8)]).double()


def gradients(flow, x, *, recompute, kept=None):
    def pack(tensor):
        if kept is not None:
            kept.append(tensor)
        return tensor

    flow.zero_grad()
    torch.manual_seed(3)
    with activation_checkpointing(flow) if recompute else torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = -flow.log_prob(x).mean() + flow.rsample_and_log_prob((5,))[1].mean()
        loss.backward()
    return [p.grad.clone() for p in flow.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("started", [False, True])
def test_recomputation_gives_the_same_gradients(dropout, started):
    torch.manual_seed(0)
    first = nested(dropout=dropout)
    x = torch.randn(50, 8, dtype=torch.float64) * 3
    if started:
        first.log_prob(x)
    second = nested(dropout=dropout)
    second.load_state_dict(first.state_dict())
    for a, b in zip(gradients(first, x, recompute=False), gradients(second, x, recompute=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(getattr(part, "activation_checkpointing", False) for part in second.modules())


def test_recomputation_keeps_the_inputs_of_steps_alone():
    def numbers(steps, recompute):
        kept, flow = [], nested(steps)
        x = torch.randn(500, 8, dtype=torch.float64)
        flow.log_prob(x)
        gradients(flow, x, recompute=recompute, kept=kept)
        own = {p.data_ptr() for p in flow.parameters()}
        return sum({t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in own}.values())

    inner = 2 * 6 * 500 * 8  # two levels of six steps more, each with an input
    assert numbers(8, True) - numbers(2, True) < 1.5 * inner
    assert numbers(8, False) - numbers(2, False) > 10 * inner


def test_recomputation_leaves_running_averages_as_they_are():
    buffers = []
    for recompute in (False, True):
        torch.manual_seed(0)
        flow = small(norm="batchnorm")
        fit(flow, [gaussian()], epochs=3, activation_checkpointing=recompute, seed=0)
        buffers.append([b.clone() for b in flow.buffers()])
    assert all(map(torch.equal, *buffers))


def test_the_stacks_that_recompute():
    flow = nested()
    with activation_checkpointing(flow):
        outer = flow.bijection
        assert outer.activation_checkpointing
        assert outer[0].activation_checkpointing
        assert outer[0][0].activation_checkpointing
        assert not outer[0][0][0].activation_checkpointing
    flat = small()
    with activation_checkpointing(flat):
        assert flat.bijection.activation_checkpointing
    flat.bijection.activation_checkpointing = True
    with activation_checkpointing(flat):
        pass
    assert flat.bijection.activation_checkpointing  # as its owner had it


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"ema_decay": 0.9, "optimizer": "adamax"}, {"precision": "bf16-mixed"}],
)
def test_recomputation_in_a_fit_is_the_same_fit(options):
    flows, results = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        flow = nested(dropout=0.2).float()
        x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
        results.append(fit(flow, x, epochs=3, batch_size=45, activation_checkpointing=recompute, seed=0, **options))
        flows.append(flow)
    assert results[0].history["train"] == pytest.approx(results[1].history["train"], abs=1e-6)
    for a, b in zip(*(flow.state_dict().values() for flow in flows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# The layout and the precision of networks


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 3, 3, padding=1)
        self.seen = []

    def forward(self, x, context=None):
        h = self.first(x.reshape(-1, 3, 4, 4))
        self.seen.append((self.training, h.dtype, h.is_contiguous(memory_format=torch.channels_last)))
        return self.last(h.relu()).reshape(x.shape)


class Picture(ElementwiseAffine):
    """An affine map of images, and a convolution that shifts the second half of their rows by the first."""

    def __init__(self):
        super().__init__((3, 4, 4))
        self.conditioner = Convolution()

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y)
        upper = torch.cat([x[..., :2, :], torch.zeros_like(x[..., 2:, :])], -2)
        shift = self.conditioner(upper)
        return torch.cat([x[..., :2, :], x[..., 2:, :] + shift[..., 2:, :]], -2), log_det


def pictures(rows=60):
    return torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def picture_flow():
    torch.manual_seed(0)
    layers = [Compose([Compose([Picture(), Picture()]), Compose([Picture()])])]
    return Flow(StandardNormal((3, 4, 4)), layers)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_channels_last_is_the_same_fit_in_another_layout(recompute, accumulate):
    results, flows = [], []
    for last in (False, True):
        seen = []

        def objective(flow, x, context):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return -flow.log_prob(x).mean()

        flow = picture_flow()
        options = {"activation_checkpointing": recompute, "accumulate": accumulate, "channels_last": last}
        results.append(fit(flow, pictures(), objective=objective, epochs=2, batch_size=9, seed=0, **options))
        assert set(seen) == {last}
        conv = flow.layers[0][0][0].conditioner
        assert conv.first.weight.is_contiguous()
        assert {layout for _, _, layout in conv.seen} == {last}
        flows.append(flow)
    assert results[0].history["train"] == pytest.approx(results[1].history["train"], rel=1e-4)
    for a, b in zip(*(flow.parameters() for flow in flows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_interrupt_within_a_network_leaves_full_precision():
    flow = picture_flow()
    network = flow.layers[0][0][0].conditioner
    network.last.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), bf16_networks(flow.train()):
        flow.log_prob(pictures())
    assert not torch.is_autocast_enabled("cpu")
    assert not network._forward_hooks


def test_channels_last_is_of_images_alone():
    with pytest.raises(ValueError, match=r"a flow of images \(C, H, W\) for channels_last; got \(2,\)"):
        fit(small(), gaussian(), channels_last=True)
    flow = picture_flow()
    weight = flow.layers[0][0][0].conditioner.first.weight
    with channels_last(flow):
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous()


@pytest.mark.parametrize("recompute", [False, True])
def test_mixed_precision_is_of_networks_in_training(recompute):
    flow = picture_flow()
    conv = flow.layers[0][0][0].conditioner
    result = fit(
        flow, pictures(), precision="bf16-mixed", epochs=1, batch_size=9, activation_checkpointing=recompute, seed=0
    )
    assert {(training, dtype) for training, dtype, _ in conv.seen} == {(True, torch.bfloat16), (False, torch.float32)}
    assert not conv._forward_pre_hooks
    assert not conv._forward_hooks
    assert flow.dtype == torch.float32
    assert math.isfinite(result.best_loss)
    assert not torch.is_autocast_enabled("cpu")


def test_mixed_precision_takes_the_embedding_and_leaves_the_maps():
    flow = embedded()
    x, context = sets(20)
    fit(flow, x, context=context, epochs=20, learning_rate=1e-2, seed=0)
    flow.train()
    with bf16_networks(flow):
        assert flow.embedding(context).dtype == torch.float32
        rough = flow.log_prob(x, context)
    exact = flow.log_prob(x, context)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05


# Options


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"optimizer": "sgd"}, ValueError, "expected optimizer to be one of 'adam', 'adamax'; got 'sgd'"),
        ({"accumulate": 0}, ValueError, "expected accumulate to be a positive integer; got 0"),
        ({"accumulate": 9, "batch_size": 8}, ValueError, "expected at least accumulate=9 rows a batch; got 8"),
        ({"steps_per_epoch": 0}, ValueError, "expected steps_per_epoch to be a positive integer; got 0"),
        ({"augment": 3}, TypeError, "expected augment to be a function; got int"),
        (
            {"augment": lambda x: x[:5]},
            TypeError,
            r"augment to return torch.float32 of \(180, 2\), .*got .*\(5, 2\)",
        ),
        ({"augment": lambda x: x.tolist()}, TypeError, "augment to return torch.float32 of .*got list"),
        ({"augment": lambda x: x.double()}, TypeError, "augment to return torch.float32 of .*got torch.float64"),
        ({"checkpoint": 3}, TypeError, "expected checkpoint as the path of a file; got int"),
        ({"checkpoint": "/no/such/folder/fit.pt"}, ValueError, "in a folder that exists; got /no/such/folder/fit.pt"),
        ({"checkpoint": "/"}, ValueError, "expected checkpoint as the path of a file in a folder that exists; got /"),
        ({"checkpoint_seconds": 3}, ValueError, "expected checkpoint_seconds only with a checkpoint; got 3 without"),
        (
            {"compile": True, "activation_checkpointing": True},
            ValueError,
            "compile=True cannot be combined with activation_",
        ),
    ],
)
def test_messages_of_the_options_for_large_flows(options, error, message):
    with pytest.raises(error, match=message):
        fit(small(), gaussian(), **options)


def test_messages_of_options_that_need_an_array():
    with pytest.raises(ValueError, match="expected steps_per_epoch only with a tensor or an array; got it with list"):
        fit(small(), [gaussian()], steps_per_epoch=3)
    with pytest.raises(ValueError, match="expected data for augment; got none"):
        fit(small(), objective=lambda f, x, c: f.rsample_and_log_prob((8,))[1].mean(), augment=abs)


def test_labels_in_a_column_are_refused():
    flow = glow((1, 4, 4), num_levels=1, num_steps=1, hidden_channels=4, num_classes=3)
    x, labels = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    fit(flow, x, context=labels, epochs=1)
    with pytest.raises(ValueError, match=r"one log-density to each row of \(18, .*; got \(18, 18\) from .* \(18, 1\)"):
        fit(flow, x, context=labels[:, None], epochs=1)
    with pytest.raises(ValueError, match=r"from .* shape \(5, 1\)"):
        fit(flow, DataLoader(TensorDataset(x, labels[:, None]), batch_size=5), epochs=1)
    with pytest.raises(ValueError, match=r"expected class labels from 0 to 2; got 3"):
        fit(flow, x, context=labels + 1, epochs=1)


def test_a_copy_made_in_mixed_precision_has_networks_of_its_own():
    flow, x = small(), gaussian(20)
    with bf16_networks(flow):
        copied, stored = copy.deepcopy(flow).eval(), pickle.loads(pickle.dumps(flow)).eval()
        wanted = copied.log_prob(x)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(1.0)
        assert torch.equal(copied.log_prob(x), wanted)
        assert torch.equal(stored.log_prob(x), wanted)


def test_messages_of_labels_where_none_are_taken():
    x, labels = gaussian(20), torch.arange(20)
    with pytest.raises(ValueError, match="expected no context or labels with batch 0, since .*; got one"):
        fit(small(), DataLoader(TensorDataset(x, labels), batch_size=10), epochs=1)
    with pytest.raises(TypeError, match=r"context of data .*got torch.int64: convert them, or give .* an embedding"):
        fit(small(context_features=1), x, context=labels[:, None], epochs=1)


def test_the_start_is_a_candidate_for_the_best_weights():
    flow, x = affine(), torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    start = {name: value.clone() for name, value in flow.state_dict().items()}  # a rotation, which is the truth
    result = fit(flow, x, validation=x, epochs=8, patience=3, learning_rate=1.0, judge_start=True, seed=0)
    assert result.best_epoch == -1
    assert result.best_loss == pytest.approx(-flow.log_prob(x).mean().item(), abs=1e-5)
    assert all(torch.equal(value, start[name]) for name, value in flow.state_dict().items())
    assert result.best_loss < min(result.history["validation"])
    assert fit(affine(), 3 * x + 5, validation=3 * x + 5, epochs=8, judge_start=True, seed=0).best_epoch >= 0
