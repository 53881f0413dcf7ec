"""Bits per dimension, against flows whose discrete probabilities are known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pyroflows.data import pad_images
from pyroflows.dequantizers import ColumnDequantizer, UniformDequantizer, VariationalDequantizer
from pyroflows.diagnostics.bits import BitsPerDim, bits_per_dim
from pyroflows.flow import Flow
from pyroflows.layers import ElementwiseAffine, Logit, Permutation, Standardize
from pyroflows.models import glow
from pyroflows.priors import DiagonalNormal, Prior, Uniform
from pyroflows.training import fit


class Histogram(Prior):
    """A density that is constant on each of the cells of [0, 1): its integral over a cell is the cell's share."""

    def __init__(self, probabilities: Tensor):
        super().__init__(1)
        self.register_buffer("probabilities", probabilities)

    def log_prob(self, z: Tensor) -> Tensor:
        number = len(self.probabilities)
        cell = (z[..., 0] * number).floor().long().clamp(0, number - 1)
        return (self.probabilities[cell] * number).log()


def plain(prior: Prior, num_levels: int, **options) -> Flow:
    shape = prior.event_shape
    return Flow(prior, Permutation(shape[0], "reverse"), dequantizer=UniformDequantizer(shape, num_levels), **options)


def gaussian(loc: float, scale: float, num_levels: int) -> Flow:
    prior = DiagonalNormal(1).double()
    prior.loc.data.fill_(loc)
    prior.log_scale.data.fill_(math.log(scale))
    return plain(prior, num_levels).double()


@settings(max_examples=30)
@given(st.integers(2, 256), st.integers(1, 6), st.sampled_from(["mean", "log-mean-exp"]), st.integers(1, 5))
def test_a_uniform_density_takes_the_bits_of_its_levels(num_levels, features, estimator, num_draws) -> None:
    x = torch.randint(num_levels, (7, features))
    bits = bits_per_dim(plain(Uniform(features), num_levels), x, num_draws=num_draws, estimator=estimator)
    assert float(bits) == pytest.approx(math.log2(num_levels), abs=1e-5)
    assert bits.standard_error == pytest.approx(0, abs=1e-6)
    assert (bits.estimator, bits.num_draws, bits.rows, bits.dims) == (estimator, num_draws, 7, features)


@settings(max_examples=30)
@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=20), st.sampled_from(["mean", "log-mean-exp"]), st.integers(0, 99)
)
def test_a_histogram_takes_exactly_the_bits_of_its_probabilities(weights, estimator: str, seed: int) -> None:
    p = torch.tensor(weights, dtype=torch.float64)
    p = p / p.sum()
    x = torch.randint(len(p), (30, 1), generator=torch.Generator().manual_seed(seed))
    bits = bits_per_dim(plain(Histogram(p), len(p)).double(), x, estimator=estimator, num_draws=2)
    each = -p[x[:, 0]].log2()
    assert float(bits) == pytest.approx(float(each.mean()), abs=1e-9)
    assert bits.standard_error == pytest.approx(float(each.std()) / math.sqrt(30), abs=1e-9)


@pytest.mark.parametrize("loc, scale, num_levels", [(0.5, 0.1, 8), (0.3, 0.4, 17), (0.8, 0.1, 4)])
def test_a_discretised_gaussian(loc: float, scale: float, num_levels: int) -> None:
    flow = gaussian(loc, scale, num_levels)
    x = torch.arange(num_levels)[:, None]
    edges = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
    standard = (edges - loc) / scale
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    # log P in a tail: the difference of the smaller of the two tails, which does not cancel.
    low, high = standard[:-1], standard[1:]
    swap = low > 0
    p = torch.where(swap, normal.cdf(-low) - normal.cdf(-high), normal.cdf(high) - normal.cdf(low))
    exact = -p.log2()
    # The mean's expectation: the density's logarithm, a parabola, averaged over the cell by its moments.
    middle = (edges[:-1] + edges[1:]) / 2
    square = ((middle - loc) ** 2 + 1 / (12 * num_levels**2)) / scale**2
    bound = (square / 2 + math.log(scale * math.sqrt(2 * math.pi)) + math.log(num_levels)) / math.log(2)

    keep = exact < 9  # a cell far out has nearly all its mass in a corner that draws seldom find
    mean = bits_per_dim(flow, x[keep], num_draws=2000, seed=0)
    tight = bits_per_dim(flow, x[keep], num_draws=2000, estimator="log-mean-exp", seed=0)
    assert float(mean) == pytest.approx(float(bound[keep].mean()), abs=0.05)
    assert float(tight) == pytest.approx(float(exact[keep].mean()), abs=0.03)
    assert float(tight) < float(mean)


def test_a_discretised_logistic() -> None:
    loc, scale, num_levels = 0.4, 0.08, 16
    number = {"dtype": torch.float64}
    layers = [Logit(1), Standardize(torch.tensor([loc], **number), torch.tensor([scale], **number))]
    flow = Flow(Uniform(1), layers, dequantizer=UniformDequantizer(1, num_levels)).double()
    edges = (torch.arange(num_levels + 1, **number) / num_levels - loc) / scale
    exact = -(edges[1:].sigmoid() - edges[:-1].sigmoid()).log2()
    x = torch.arange(num_levels)[:, None]
    tight = bits_per_dim(flow, x, num_draws=2000, estimator="log-mean-exp", seed=0)
    assert float(tight) == pytest.approx(float(exact.mean()), abs=0.01)
    mean = bits_per_dim(flow, x, num_draws=2000, seed=0)
    assert float(exact.mean()) < float(mean) < float(exact.mean()) + 0.1


@settings(max_examples=20)
@given(st.floats(0, 1), st.floats(0.02, 1), st.integers(2, 32), st.integers(1, 10), st.integers(0, 99))
def test_the_log_mean_exp_is_never_above_the_mean(loc, scale, num_levels, num_draws, seed) -> None:
    flow = gaussian(loc, scale, num_levels)
    x = torch.randint(num_levels, (20, 1), generator=torch.Generator().manual_seed(seed))
    of = {
        name: float(bits_per_dim(flow, x, num_draws=num_draws, estimator=name, seed=seed))
        for name in ("mean", "log-mean-exp")
    }
    if num_draws == 1:
        assert of["log-mean-exp"] == of["mean"]
    assert of["log-mean-exp"] <= of["mean"] + 1e-9


def test_batches_make_no_difference_where_no_noise_does() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    flow, x = plain(Histogram(p), 4), torch.randint(4, (23, 1))
    whole = bits_per_dim(flow, x)
    for batch_size in (1, 5, 23, 100):
        assert float(bits_per_dim(flow, x, batch_size=batch_size)) == pytest.approx(float(whole), abs=1e-12)
    assert float(bits_per_dim(flow, x.numpy().astype(np.uint8))) == pytest.approx(float(whole), abs=1e-12)


def test_padding_is_divided_by_what_it_surrounds() -> None:
    x = pad_images(torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8), 8)
    flow = Flow(Uniform((1, 32, 32)), ElementwiseAffine((1, 32, 32)), dequantizer=UniformDequantizer((1, 32, 32)))
    bits = bits_per_dim(flow, x, dims=784, num_draws=1)
    assert float(bits) == pytest.approx(8 * 1024 / 784, rel=1e-5)
    assert bits.dims == 784


def test_mixed_columns_count_the_step_of_the_integers_alone() -> None:
    flow = Flow(
        Uniform(2, high=torch.tensor([10.0, 4.0])),
        Permutation(2, [0, 1]),
        dequantizer=ColumnDequantizer([1.0, 0.0]),
    )
    x = torch.stack([torch.randint(10, (9,)).float(), 4 * torch.rand(9)], -1)
    assert float(bits_per_dim(flow, x)) == pytest.approx((math.log2(10) + math.log2(4)) / 2, abs=1e-6)
    with pytest.raises(ValueError, match=r"got 0.5 in row 0, column 0$"):
        bits_per_dim(flow, torch.full((3, 2), 0.5))


class OneHot(nn.Module):
    def forward(self, labels: Tensor) -> Tensor:
        return nn.functional.one_hot(labels, 3).float()


def test_contexts_go_with_their_rows() -> None:
    layer = ElementwiseAffine(1, context_features=3, hidden_features=())
    flow = Flow(DiagonalNormal(1), layer, embedding=OneHot(), dequantizer=UniformDequantizer(1, 4))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x, labels = torch.randint(4, (40, 1)), torch.arange(40) % 3
    whole = bits_per_dim(flow, x, labels, num_draws=400, batch_size=7, seed=0)
    parts = [bits_per_dim(flow, x[labels == k], labels[labels == k].numpy(), num_draws=400, seed=k) for k in range(3)]
    assert float(whole) == pytest.approx(sum(p.rows * float(p) for p in parts) / 40, abs=0.05)
    with pytest.raises(ValueError, match=r"^expected a context for each of 40 rows; got \(39,\)$"):
        bits_per_dim(flow, x, labels[1:])
    with pytest.raises(ValueError, match=r"^expected a context"):
        bits_per_dim(flow, x)


def test_modes_gradients_and_random_state_are_left_as_they_were() -> None:
    shape = (1, 2, 2)
    flow = Flow(Uniform(shape), ElementwiseAffine(shape), dequantizer=VariationalDequantizer(shape, 4, 4, 2))
    flow.train()
    flow.bijection.eval()
    before = [module.training for module in flow.modules()]
    state = torch.get_rng_state()
    x = torch.randint(4, (5, *shape), generator=torch.Generator().manual_seed(0))
    first = bits_per_dim(flow, x, seed=3)
    assert [module.training for module in flow.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in flow.parameters())
    assert bits_per_dim(flow, x, seed=3) == first
    assert float(first) == pytest.approx(2, abs=1e-3)
    with pytest.raises(ValueError, match="expected levels from 0 to 3"):
        bits_per_dim(flow, x + 4)
    assert [module.training for module in flow.modules()] == before


def test_a_dequantizer_of_ones_own_needs_no_check() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x + torch.rand(x.shape)) / 2, torch.full(x.shape[:1], math.log(2))

    flow = Flow(Uniform(1), Permutation(1, [0]), dequantizer=Halves())
    assert float(bits_per_dim(flow, torch.tensor([[0], [1]]))) == pytest.approx(1)


def test_the_result_says_which_of_the_two_it_is() -> None:
    flow, x = plain(Uniform(2), 4), torch.randint(4, (1, 2))
    bits = bits_per_dim(flow, x, num_draws=1, estimator="log-mean-exp")
    assert math.isnan(bits.standard_error)
    assert str(bits) == "2.000 +- nan bits per dimension (log-mean-exp over 1 draw of noise; 1 row of 2 dimensions)"
    assert "(mean over 8 draws of noise; 2 rows" in str(bits_per_dim(flow, x.repeat(2, 1)))
    assert isinstance(bits, BitsPerDim)


def test_bad_input_is_refused_in_one_sentence() -> None:
    flow, x = plain(Uniform(2), 4), torch.randint(4, (5, 2))
    with pytest.raises(ValueError, match=r"^expected a flow with a dequantizer, .*; got none$"):
        bits_per_dim(Flow(Uniform(2), Permutation(2, "reverse")), x)
    with pytest.raises(TypeError, match=r"^expected a Flow; got Linear$"):
        bits_per_dim(nn.Linear(2, 2), x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^expected levels as integers from 0 to 3; got torch.float32$"):
        bits_per_dim(flow, x.float())
    for wrong in (x[:, :1], x[0], x[:0]):
        with pytest.raises(ValueError, match=r"^expected data of shape \(rows, 2\), at least one row; got"):
            bits_per_dim(flow, wrong)
    with pytest.raises(ValueError, match=r"^expected estimator to be one of 'mean', 'log-mean-exp'; got 'median'$"):
        bits_per_dim(flow, x, estimator="median")
    for name in ("num_draws", "batch_size", "dims"):
        with pytest.raises(ValueError, match=rf"^expected {name} to be a positive integer; got 0$"):
            bits_per_dim(flow, x, **{name: 0})
    with pytest.raises(ValueError, match=r"^expected dims of at most 2, all of the data's; got 3$"):
        bits_per_dim(flow, x, dims=3)
    with pytest.raises(TypeError, match=r"^expected seed to be an integer; got 0.5$"):
        bits_per_dim(flow, x, seed=0.5)  # type: ignore[arg-type]


def test_labels_in_a_column_are_refused() -> None:
    flow = glow((1, 2, 2), num_levels=1, num_steps=1, hidden_channels=4, num_classes=3)
    flow.dequantizer = UniformDequantizer((1, 2, 2), 4)
    x, labels = torch.randint(4, (6, 1, 2, 2)), torch.arange(6) % 3
    assert bits_per_dim(flow, x, labels).rows == 6
    with pytest.raises(ValueError, match=r"each of 6 rows; got \(6, 6\) from a context of shape \(6, 1\)"):
        bits_per_dim(flow, x, labels[:, None])


def test_a_dequantizer_of_another_shape_is_refused() -> None:
    flow = glow((1, 4, 4), num_levels=1, num_steps=1, hidden_channels=4, dequantizer=UniformDequantizer((4, 4), 4))
    x = torch.randint(4, (6, 1, 4, 4))
    for use in (bits_per_dim, fit):
        with pytest.raises(ValueError, match=r"^expected a dequantizer of the flow's shape \(1, 4, 4\); got \(4, 4\)$"):
            use(flow, x)
