"""Dequantisation: cells that hold, densities that integrate to one, noise that starts uniform and learns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyroflows.data import load_table
from pyroflows.dequantizers import ColumnDequantizer, Dequantizer, UniformDequantizer, VariationalDequantizer
from pyroflows.diagnostics.bits import bits_per_dim
from pyroflows.flow import Flow
from pyroflows.layers import ElementwiseAffine, Sigmoid
from pyroflows.models import nsf
from pyroflows.priors import StandardNormal
from pyroflows.training import fit

shapes = st.sampled_from([(1,), (5,), (1, 2, 4), (3, 4, 2)])
batches = st.sampled_from([(), (4,), (2, 3), (0,)])
dtypes = st.sampled_from([torch.float32, torch.float64])


def make_random(module: torch.nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


# Levels


@settings(max_examples=60)
@given(shapes, batches, st.integers(2, 300), dtypes, st.integers(0, 1000))
def test_noise_stays_in_the_cell_of_its_level(shape, batch, num_levels, dtype, seed) -> None:
    torch.manual_seed(seed)
    dequantizer = UniformDequantizer(shape, num_levels).to(dtype)
    x = torch.randint(num_levels, (*batch, *shape))
    y, log_q = dequantizer(x)
    assert y.dtype == log_q.dtype == dtype
    assert y.shape == x.shape
    assert ((y >= 0) & (y < 1)).all()
    assert torch.equal(dequantizer.quantize(y).long(), x)
    assert log_q.shape == batch
    torch.testing.assert_close(log_q, torch.full(batch, math.prod(shape) * math.log(num_levels), dtype=dtype))


@pytest.mark.parametrize("num_levels", [2, 3, 10, 17, 64, 100, 255, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_hold_also_where_the_sum_rounds(num_levels: int, dtype: torch.dtype) -> None:
    dequantizer = UniformDequantizer(num_levels, num_levels).to(dtype)
    x = torch.arange(num_levels)
    below_one = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    for u in (torch.zeros((), dtype=dtype), below_one, 1 - 1e-6 + 0 * below_one):
        y = dequantizer._number_in_cell(x.to(dtype), u)
        assert (y < 1).all()
        assert torch.equal(dequantizer.quantize(y).long(), x)


def test_uniform_noise_is_uniform() -> None:
    y, _ = UniformDequantizer(1, 4)(torch.full((4000, 1), 2))
    u = (4 * y - 2).flatten().sort().values
    assert (u - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.6 / math.sqrt(4000)


def test_quantize_puts_what_a_flow_may_sample_outside_into_the_end_levels() -> None:
    dequantizer = UniformDequantizer(3, 5)
    levels = dequantizer.quantize(torch.tensor([-0.2, 0.5, 1.7]))
    assert levels.tolist() == [0, 2, 4]
    assert levels.dtype == torch.uint8
    assert UniformDequantizer(1, 300).quantize(torch.tensor([0.999])).item() == 299


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
def test_every_integer_dtype_goes_in(dtype: torch.dtype) -> None:
    y, _ = UniformDequantizer(2, 2)(torch.tensor([[0, 1]]).to(dtype))
    assert y.dtype == torch.float32


@pytest.mark.parametrize("kind", [UniformDequantizer, VariationalDequantizer])
def test_what_are_no_levels_is_refused_in_one_sentence(kind) -> None:
    dequantizer = kind((1, 2, 2), 17)
    x = torch.zeros(3, 1, 2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^expected levels as integers from 0 to 16; got torch.float32$"):
        dequantizer(x.float())
    with pytest.raises(TypeError, match=r"^expected data as a tensor; got ndarray$"):
        dequantizer(x.numpy())
    with pytest.raises(ValueError, match=r"^expected data of shape \(\*batch, 1, 2, 2\); got \(3, 2, 2\)$"):
        dequantizer(x[:, 0])
    for level in (17, -1):
        x[1, 0, 1, 1] = level
        with pytest.raises(ValueError, match=rf"^expected levels from 0 to 16; got {level}: num_levels, or the number"):
            dequantizer(x)
        with pytest.raises(ValueError, match=rf"got {level}:"):
            dequantizer.check(x)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^expected num_levels to be an integer of at least 2; got 1$"):
        UniformDequantizer(2, 1)
    with pytest.raises(ValueError, match=r"^expected num_levels to be an integer of at least 2; got 2.5$"):
        UniformDequantizer(2, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^expected the shape \(C, H, W\) of an image; got \(4,\)$"):
        VariationalDequantizer((4,), 4)
    with pytest.raises(ValueError, match=r"^expected num_layers to be a positive integer; got 0$"):
        VariationalDequantizer((1, 4, 4), 4, num_layers=0)
    with pytest.raises(NotImplementedError, match="must define forward"):
        Dequantizer(2)(torch.zeros(2))
    with pytest.raises(NotImplementedError, match="must define quantize"):
        Dequantizer(2).quantize(torch.zeros(2))
    Dequantizer(2).check(torch.zeros(2))


@pytest.mark.parametrize(
    "dequantizer",
    [UniformDequantizer((1, 4, 4), 8), VariationalDequantizer((1, 4, 4), 8, 4, 2), ColumnDequantizer([1.0, 0.0])],
    ids=["uniform", "variational", "column"],
)
def test_away_from_the_cpu_no_value_is_read(dequantizer) -> None:
    x = torch.zeros(3, *dequantizer.event_shape, dtype=torch.int64, device="meta")  # an .item() of it raises
    if isinstance(dequantizer, VariationalDequantizer):  # the norms start by looking at numbers, once
        dequantizer.eval()
    y, log_q = copy.deepcopy(dequantizer).to("meta")(x)
    assert y.shape == x.shape
    assert log_q.shape == (3,)


def test_they_compile() -> None:
    dequantizer = UniformDequantizer((1, 4, 4), 8)
    x = torch.randint(8, (5, 1, 4, 4))
    y, log_q = torch.compile(dequantizer, backend="eager", fullgraph=True)(x)
    assert torch.equal(dequantizer.quantize(y).long(), x)
    assert log_q.shape == (5,)


def test_a_flow_carries_its_dequantizer() -> None:
    flow = Flow(StandardNormal((1, 2, 2)), Sigmoid((1, 2, 2), 0.01), dequantizer=VariationalDequantizer((1, 2, 2), 4))
    names = {name for name, _ in flow.named_parameters()}
    assert names
    assert all(name.startswith("dequantizer.noise") for name in names)
    make_random(flow)
    other = Flow(StandardNormal((1, 2, 2)), Sigmoid((1, 2, 2), 0.01), dequantizer=VariationalDequantizer((1, 2, 2), 4))
    other.load_state_dict(flow.state_dict())
    flow.eval(), other.eval()
    x = torch.randint(4, (6, 1, 2, 2))
    values = []
    for each in (flow, other, copy.deepcopy(flow)):
        torch.manual_seed(1)
        values.append(each.dequantized_log_prob(x))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert flow.double().dequantized_log_prob(x).dtype == torch.float64


# Variational


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6)])
def test_variational_noise_starts_uniform(shape, batch) -> None:
    dequantizer = VariationalDequantizer(shape, 17, hidden_channels=8)
    x = torch.randint(17, (*batch, *shape))
    y, log_q = dequantizer(x)
    assert torch.equal(dequantizer.quantize(y).long(), x)
    assert log_q.shape == batch
    torch.testing.assert_close(log_q, torch.full(batch, math.prod(shape) * math.log(17)), atol=2e-3, rtol=0)


def test_variational_noise_at_the_start_is_distributed_as_uniform_noise() -> None:
    y, _ = VariationalDequantizer((1, 8, 8), 4, hidden_channels=8)(torch.full((100, 1, 8, 8), 1))
    u = (4 * y - 1).detach().flatten().sort().values
    assert (u - (torch.arange(6400) + 0.5) / 6400).abs().max() < 1.6 / math.sqrt(6400)


def test_variational_density_integrates_to_one_over_the_cell_and_depends_on_the_image() -> None:
    dequantizer = VariationalDequantizer((1, 1, 2), 4, hidden_channels=8).double()
    dequantizer(torch.randint(4, (64, 1, 1, 2)))  # starts the norms
    dequantizer.eval()
    make_random(dequantizer, 0.1)
    means = []
    for level in (0, 3):
        x = torch.full((40000, 1, 1, 2), level)
        y, log_q = dequantizer(x)
        assert torch.equal(dequantizer.quantize(y).long(), x)
        assert log_q.std() > 0.05
        # The mean of 1 / q is the volume of what q covers.
        assert (-log_q).exp().mean().item() == pytest.approx(1 / 16, rel=0.02)
        means.append((4 * y - level).mean(0))
    assert (means[0] - means[1]).abs().max() > 0.005


def test_variational_noise_learns_to_raise_the_bound_and_does_not_pass_the_probability() -> None:
    shape = (1, 1, 2)
    flow = Flow(StandardNormal(shape), [ElementwiseAffine(shape), Sigmoid(shape)])
    flow.layers[0].log_scale.data.fill_(1.0)  # type: ignore[union-attr, operator]
    flow.requires_grad_(False)
    x = torch.randint(2, (256, *shape))
    exact = -2 * math.log(2)  # half of each symmetric density lies in either level
    flow.dequantizer = UniformDequantizer(shape, 2)
    uniform = torch.stack([flow.dequantized_log_prob(x).mean() for _ in range(50)]).mean().item()
    flow.dequantizer = VariationalDequantizer(shape, 2, hidden_channels=16)
    optimizer = torch.optim.Adam(flow.dequantizer.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow.dequantized_log_prob(x).mean()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.dequantizer.parameters())
    flow.eval()
    with torch.no_grad():
        learnt = torch.stack([flow.dequantized_log_prob(x).mean() for _ in range(50)]).mean().item()
    assert uniform < exact - 0.1
    assert learnt > exact - 0.5 * (exact - uniform)
    assert learnt < exact + 0.01


# Columns


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 0.5, 0.1, 3.0]), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.25, -3.7]),
    dtypes,
    st.integers(0, 1000),
)
def test_columns_on_a_grid_get_noise_and_the_others_pass(steps, offset, dtype, seed) -> None:
    torch.manual_seed(seed)
    step = torch.tensor(steps, dtype=dtype)
    dequantizer = ColumnDequantizer(step, offset)
    discrete = step > 0
    grid = offset + step * torch.randint(-50, 50, (20, len(steps)))
    x = torch.where(discrete, grid, torch.randn(20, len(steps), dtype=dtype))
    y, log_q = dequantizer(x)
    assert y.dtype == dtype
    assert torch.equal(y[:, ~discrete], x[:, ~discrete])
    noise = (y - x)[:, discrete] / step[discrete]
    assert ((noise > -1e-3) & (noise < 1 + 1e-3)).all()
    if discrete.any():
        assert noise.std() > 0.2
    torch.testing.assert_close(dequantizer.quantize(y), x, atol=2e-5, rtol=0)
    torch.testing.assert_close(log_q, -step[discrete].log().sum().expand(20))


@settings(max_examples=30)
@given(st.integers(-100_000, 100_000), st.integers(0, 1000))
def test_integers_come_back_exactly(middle: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = (middle + torch.randint(-100, 100, (200, 1))).float()
    dequantizer = ColumnDequantizer.from_data(x)
    y, _ = dequantizer(x)
    assert torch.equal(dequantizer.quantize(y), x)
    assert (y >= x).all()
    assert (y < x + 1).all()
    assert torch.equal(dequantizer.quantize(dequantizer(x.long())[0]), x)


def test_the_noise_of_columns_keeps_to_its_cell_where_the_sum_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(1000.0)[:, None]
    dequantizer = ColumnDequantizer([1.0])
    below_one = 1 - 2**-24
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, below_one))
    assert torch.equal(dequantizer.quantize(dequantizer(x)[0]), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_columns_of_a_standardised_table_are_found_in_its_units(dtype: torch.dtype) -> None:
    wine = load_table("wine", dtype=dtype)
    dequantizer = ColumnDequantizer.from_data(wine.train, mean=wine.mean, scale=wine.scale)
    found = [name for name, step in zip(wine.columns, dequantizer.steps, strict=True) if step > 0]
    assert found == ["magnesium", "proline"]
    for part in (wine.train, wine.validation, wine.test):
        dequantizer.check(part)
        y, log_q = dequantizer(part)
        torch.testing.assert_close(dequantizer.quantize(y), part, atol=1e-6, rtol=0)
        units = wine.unstandardize(dequantizer.quantize(y))[:, dequantizer.steps > 0]
        torch.testing.assert_close(units, units.round(), atol=1e-3, rtol=0)
        expected = sum(math.log(wine.scale[wine.columns.index(name)]) for name in found)
        assert log_q[0].item() == pytest.approx(expected, rel=1e-5)
    assert str(dequantizer) == "ColumnDequantizer(13, discrete=2)"


def test_from_data_knows_integers_by_their_values() -> None:
    x = torch.tensor([[1.0, 0.5, -2.0], [2.0, 1.0, 7.0]])
    assert ColumnDequantizer.from_data(x).steps.tolist() == [1, 0, 1]
    assert ColumnDequantizer.from_data(x.int()).steps.tolist() == [1, 1, 1]
    assert ColumnDequantizer.from_data(x.double()).steps.dtype == torch.float64
    # In float32 every number of this size is whole: that tells nothing.
    assert ColumnDequantizer.from_data(torch.tensor([[3e7], [5e7]])).steps.tolist() == [0]


def test_a_value_off_its_grid_is_refused_with_its_place() -> None:
    dequantizer = ColumnDequantizer([0.0, 1.0])
    x = torch.tensor([[0.5, 1.0], [0.5, 2.0], [0.5, 2.25]])
    with pytest.raises(
        ValueError, match=r"^expected multiples of the step 1 from 0 in column 1; got 2.25 in row 2, column 1$"
    ):
        dequantizer(x)
    with pytest.raises(ValueError, match=r"got nan in row 0, column 1$"):
        dequantizer(torch.tensor([0.5, math.nan]))
    with pytest.raises(ValueError, match=r"got inf in row 0, column 1$"):
        dequantizer.check(torch.tensor([0.5, math.inf]))
    with pytest.raises(ValueError, match=r"^expected data of shape \(\*batch, 2\); got \(3, 1\)$"):
        dequantizer(x[:, :1])
    with pytest.raises(
        ValueError, match=r"^expected steps of 1 to be far above the precision of torch.float32; got 20000000 in row 0"
    ):
        dequantizer(torch.tensor([[0.5, 2e7]]))


@pytest.mark.parametrize(
    "steps, offset, message",
    [
        ([1.0, -1.0], 0.0, r"^expected steps as one non-negative number for each column; got \[1.0, -1.0\]$"),
        ([[1.0]], 0.0, r"^expected steps as one non-negative number"),
        ([math.nan], 0.0, r"^expected steps as one non-negative number"),
        ([], 0.0, r"^expected steps as one non-negative number"),
        ([1.0], [0.0, 1.0], r"^expected an offset that is one finite number or 1; got \[0.0, 1.0\]$"),
        ([1.0], math.inf, r"^expected an offset that is one finite number or 1; got inf$"),
    ],
)
def test_bad_grids_are_refused(steps, offset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColumnDequantizer(steps, offset)


def test_bad_rows_for_from_data_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^expected rows as a tensor of shape \(rows, features\), at least one of"):
        ColumnDequantizer.from_data(torch.zeros(3))
    with pytest.raises(ValueError, match=r"^expected mean as 2 finite numbers, one a column; got shape \(3,\)$"):
        ColumnDequantizer.from_data(torch.zeros(4, 2), mean=torch.zeros(3))
    with pytest.raises(ValueError, match=r"^expected a positive scale for each column; got \[1.0, 0.0\]$"):
        ColumnDequantizer.from_data(torch.zeros(4, 2), scale=[1.0, 0.0])


def test_a_table_with_counts_is_fitted_by_the_bits_of_its_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    count = torch.multinomial(torch.tensor([0.1, 0.4, 0.3, 0.2]), 2000, replacement=True, generator=generator)
    x = torch.stack([count.float(), count + torch.randn(2000, generator=generator)], -1)
    flow = nsf(2, num_layers=2, hidden_features=(32,))
    flow.dequantizer = ColumnDequantizer.from_data(x)
    result = fit(flow, x, epochs=15, seed=0, progress=False)
    assert result.skipped_steps == 0
    entropy = 1.280 + 0.5 * math.log(2 * math.pi * math.e)  # of the counts, and of the noise around them
    nats = 2 * math.log(2) * float(bits_per_dim(flow, x, seed=0))
    assert entropy - 0.1 < nats < entropy + 0.35
    torch.manual_seed(0)
    counts = flow.dequantizer.quantize(flow.sample((2000,)))[:, 0]
    assert torch.equal(counts, counts.round())
    assert (counts == 1).float().mean().item() == pytest.approx(0.4, abs=0.08)


def test_a_constant_column_is_refused_unless_it_gets_noise() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 2
    flow = nsf(3, num_layers=1, hidden_features=(8,))
    flow.dequantizer = ColumnDequantizer.from_data(x)
    fit(flow, x, epochs=1)
    x[:, 1] = 0.5
    with pytest.raises(ValueError, match=r"^expected columns that vary, .*; got column 1$"):
        fit(flow, x, epochs=1)
