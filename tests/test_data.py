"""Data: toy densities against numerical integration, tables and their splits, and the recipes of POWER and BSDS300."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import FOLDER, real_files
from hypothesis import given, settings
from hypothesis import strategies as st

from pyroflows.data import (
    TABLES,
    TOY_DENSITIES,
    Checkerboard,
    Circles,
    EightGaussians,
    Pinwheel,
    RandomGaussianMixture,
    Spirals,
    ToyDensity,
    TwoMoons,
    load_bsds300,
    load_power,
    load_table,
    make_table,
)
from pyroflows.data.benchmarks import _patches, _read_image

NAMES = sorted(TOY_DENSITIES)
# For each density: how far from the origin the grid that integrates it goes, and how fine it is.
GRIDS = {
    "moons": (2.56, 128),
    "circles": (1.6, 128),
    "spirals": (4.2, 112),
    "checkerboard": (5, 100),
    "eight_gaussians": (8, 100),
    "pinwheel": (3, 300),
    "gaussian_mixture": (14, 200),
}


@functools.cache
def integrated(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Midpoints of square cells, the log density there, and the mass of each cell."""
    reach, cells = GRIDS[name]
    step = 2 * reach / cells
    middles = -reach + step * (torch.arange(cells, dtype=torch.float64) + 0.5)
    x = torch.cartesian_prod(middles, middles)
    log_p = TOY_DENSITIES[name]().log_prob(x)
    return x, log_p, log_p.exp() * step**2


# Toy densities


@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one_and_its_moments_and_entropy_are_those_of_its_samples(name: str) -> None:
    density = TOY_DENSITIES[name]()
    x, log_p, mass = integrated(name)
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)

    samples = density.sample(4000, seed=1)
    bound = 5 / math.sqrt(len(samples))
    mean = mass @ x
    covariance = (mass[:, None] * (x - mean)).T @ (x - mean)
    spread = covariance.diagonal().sqrt()
    assert ((samples.mean(0) - mean) / spread).abs().max() < bound
    assert ((torch.cov(samples.T) - covariance) / spread.outer(spread)).abs().max() < 2 * bound

    scores = density.log_prob(samples)
    entropy = -torch.where(mass > 0, mass * log_p, 0.0).sum()
    assert abs(-scores.mean() - entropy) < 5 * scores.std() / math.sqrt(len(samples)) + 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_samples_fill_the_plane_as_the_density_does(name: str) -> None:
    """Shares of samples in coarse cells, against the density integrated there: what moments alone do not see."""
    density = TOY_DENSITIES[name]()
    x, _, mass = integrated(name)
    reach, _ = GRIDS[name]
    samples = density.sample(4000, seed=2).double()

    def cell(points: torch.Tensor) -> torch.Tensor:
        index = ((points + reach) / (2 * reach) * 4).floor().clamp(0, 3).long()
        return index[:, 0] * 4 + index[:, 1]

    expected = torch.zeros(16, dtype=torch.float64).index_add(0, cell(x), mass)
    observed = cell(samples).bincount(minlength=16) / len(samples)
    assert ((observed - expected).abs() <= 5 * (expected / len(samples)).sqrt() + 1e-3).all()


def test_entropies_that_are_known() -> None:
    _, log_p, mass = integrated("moons")
    assert -(mass @ log_p).item() == pytest.approx(0.2892, abs=1e-3)
    board = Checkerboard()
    assert torch.equal(board.log_prob(board.sample(5000, seed=0)), torch.full((5000,), -math.log(32)))
    one = RandomGaussianMixture(features=3, num_components=1)
    entropy = (3 * math.log(2 * math.pi * math.e) + one.covariances.logdet().item()) / 2
    assert -one.log_prob(one.sample(20000, seed=0)).mean().item() == pytest.approx(entropy, abs=0.05)


def curve_integral(centres, weight, x: torch.Tensor, noise: float, end: float) -> torch.Tensor:
    """A blurred curve's density by a midpoint rule of 200,000 steps: slow, plain, and written another way."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (end / 200_000)
    squares = (x[:, None] - centres(t)).square().sum(-1)
    normal = (-squares / (2 * noise**2)).exp() / (2 * math.pi * noise**2)
    return (normal * weight(t)).sum(-1) * (end / 200_000)


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_moons_agree_with_a_plain_integral(noise: float) -> None:
    moons = TwoMoons(noise=noise)
    x = torch.cat((moons.sample(8, seed=0).double(), torch.tensor([[0.0, 0.0], [-1.1, -0.2], [1.0, 0.3]])))
    expected = sum(
        curve_integral(arc, lambda t: torch.full_like(t, 0.5 / math.pi), x, noise, math.pi)
        for arc in (
            lambda t: torch.stack((t.cos(), t.sin()), -1),
            lambda t: torch.stack((1 - t.cos(), 1 - t.sin() - 0.5), -1),
        )
    )
    torch.testing.assert_close(moons.log_prob(x), expected.log(), atol=1e-6, rtol=0)


def test_spirals_and_circles_agree_with_a_plain_integral() -> None:
    spirals, end = Spirals(), 3 * math.pi
    x = spirals.sample(10, seed=0).double()
    expected = sum(
        curve_integral(
            lambda t, s=sign: s * (t / 3)[:, None] * torch.stack((-t.cos(), t.sin()), -1),
            lambda t: t / end**2,
            x,
            0.1,
            end,
        )
        for sign in (1, -1)
    )
    torch.testing.assert_close(spirals.log_prob(x), expected.log(), atol=1e-6, rtol=0)

    circles = Circles(noise=0.1, factor=0.3)
    x = torch.cat((circles.sample(10, seed=0).double(), torch.zeros(1, 2)))
    expected = sum(
        curve_integral(
            lambda t, r=radius: r * torch.stack((t.cos(), t.sin()), -1),
            lambda t: torch.full_like(t, 0.25 / math.pi),
            x,
            0.1,
            2 * math.pi,
        )
        for radius in (1.0, 0.3)
    )
    torch.testing.assert_close(circles.log_prob(x), expected.log(), atol=1e-6, rtol=0)


def test_mixture_agrees_with_the_normals_it_names() -> None:
    mixture = RandomGaussianMixture(features=3, num_components=4, seed=7)
    normals = torch.distributions.MultivariateNormal(mixture.means, mixture.covariances)
    x = mixture.sample(50, seed=0).double()
    expected = normals.log_prob(x[:, None]).logsumexp(-1) - math.log(4)
    torch.testing.assert_close(mixture.log_prob(x), expected)
    assert not torch.equal(mixture.means, RandomGaussianMixture(features=3, num_components=4, seed=8).means)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**63))
def test_seed_gives_the_samples_again_and_leaves_the_global_generator_alone(name: str, n: int, seed: int) -> None:
    density = TOY_DENSITIES[name]()
    state = torch.get_rng_state()
    x = density.sample(n, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert x.shape == (n, 2)
    assert x.dtype == torch.float32
    assert torch.equal(x, density.sample(n, seed=seed))
    assert density.log_prob(x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_without_a_seed_the_global_generator_draws(name: str) -> None:
    density = TOY_DENSITIES[name]()
    state = torch.get_rng_state()
    first, second = density.sample(5), density.sample(5)
    torch.set_rng_state(state)
    assert torch.equal(density.sample(5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_keeps_batch_shape_and_dtype_and_survives_far_points(name: str) -> None:
    density = TOY_DENSITIES[name]()
    x = density.sample(6, seed=0)
    scores = density.log_prob(x)
    assert scores.dtype == torch.float32
    assert density.log_prob(x.double()).dtype == torch.float64
    torch.testing.assert_close(density.log_prob(x.reshape(2, 3, 2)), scores.reshape(2, 3))
    torch.testing.assert_close(density.log_prob(x[0]), scores[0])
    assert density.log_prob(x[:0]).shape == (0,)
    far = density.log_prob(torch.tensor([[1e3, -1e3], [0.0, 0.0], [1e6, 0.0]]))
    assert not far.isnan().any()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "checkerboard"])
def test_score_function_is_that_of_finite_differences(name: str) -> None:
    density = TOY_DENSITIES[name]()
    x = density.sample(4, seed=0).double().requires_grad_()
    assert torch.autograd.gradcheck(density.log_prob, x, eps=1e-6, atol=1e-4, rtol=1e-4)
    at_zero = torch.zeros(1, 2, requires_grad=True)
    density.log_prob(at_zero).sum().backward()
    assert at_zero.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoMoons(noise=0), "expected noise in (0, inf); got 0"),
        (lambda: Circles(noise=math.inf), "expected noise in (0, inf); got inf"),
        (lambda: Circles(factor=1.0), "expected factor to be between 0 and 1; got 1.0"),
        (lambda: Spirals(turns=-1), "expected turns in (0, inf); got -1"),
        (lambda: EightGaussians(radius="4"), "expected radius in (0, inf); got '4'"),
        (lambda: Pinwheel(num_arms=0), "expected num_arms to be a positive integer; got 0"),
        (lambda: Pinwheel(rate=math.nan), "expected rate in (0, inf); got nan"),
        (lambda: RandomGaussianMixture(features=2.0), "expected features to be a positive integer; got 2.0"),
        (lambda: RandomGaussianMixture(seed=None), "expected seed to be a non-negative integer; got None"),
        (lambda: TwoMoons().sample(0), "expected n to be a positive integer; got 0"),
        (lambda: TwoMoons().sample(True), "expected n to be a positive integer; got True"),
        (lambda: TwoMoons().sample(3, seed=-1), "expected seed to be a non-negative integer; got -1"),
        (lambda: TwoMoons().log_prob(torch.zeros(3)), "expected a tensor of shape (*batch, 2); got (3,)"),
        (lambda: TwoMoons().log_prob(torch.tensor(0.0)), "expected a tensor of shape (*batch, 2); got ()"),
        (lambda: TwoMoons().log_prob([[0.0, 0.0]]), "expected a tensor of shape (*batch, 2); got list"),
        (lambda: TwoMoons().log_prob(torch.ones(1, 2).int()), "expected a floating-point tensor; got torch.int32"),
    ],
)
def test_toy_densities_say_what_they_expect(make, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        make()


def test_a_density_that_is_not_finished_says_so() -> None:
    class Empty(ToyDensity):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define _draw"):
        Empty().sample(1)
    with pytest.raises(NotImplementedError, match="Empty must define _log_density"):
        Empty().log_prob(torch.zeros(1, 2))


# Tables


@pytest.mark.parametrize(
    ("name", "rows", "features", "classes"),
    [
        ("breast_cancer", 569, 30, 2),
        ("diabetes", 442, 11, None),
        ("digits", 1797, 64, 10),
        ("iris", 150, 4, 3),
        ("linnerud", 20, 6, None),
        ("wine", 178, 13, 3),
    ],
)
def test_bundled_tables(name: str, rows: int, features: int, classes: int | None) -> None:
    table = load_table(name, seed=3)
    parts = {"train": table.train, "validation": table.validation, "test": table.test}
    assert len(table.test) == round(0.2 * rows)
    assert len(table.validation) == round(0.1 * rows)
    assert sum(map(len, parts.values())) == rows
    assert table.features == features == len(set(table.columns))
    assert all(part.shape[1] == features and part.dtype == torch.float32 for part in parts.values())
    assert table.mean.dtype == table.scale.dtype == torch.float64
    assert table.mean.shape == table.scale.shape == (features,)

    constant = table.train.max(0).values == table.train.min(0).values
    assert (table.scale[constant] == 1).all()
    assert bool(constant.any()) == (name == "digits")
    assert table.train.mean(0).abs().max() < 1e-5
    assert (table.train.std(0, correction=0)[~constant] - 1).abs().max() < 1e-5

    raw = load_table(name, seed=3, standardize=False, dtype=torch.float64)
    assert (raw.mean == 0).all()
    assert (raw.scale == 1).all()
    for part, x in parts.items():
        torch.testing.assert_close(table.unstandardize(x.double()), getattr(raw, part), atol=1e-3, rtol=1e-6)
    if classes is None:
        assert table.labels is None
    else:
        assert {part: labels.shape for part, labels in table.labels.items()} == {
            p: x.shape[:1] for p, x in parts.items()
        }
        assert torch.cat(list(table.labels.values())).unique().tolist() == list(range(classes))
        assert f"labels={classes}" in repr(table)


def test_labels_stay_with_their_rows() -> None:
    x = np.arange(30.0)[:, None]
    table = make_table(x, labels=torch.arange(30), standardize=False)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(table, part)[:, 0].long(), table.labels[part])


def test_the_tables_that_are_named_are_the_tables_that_load() -> None:
    assert [load_table(name).name for name in TABLES] == list(TABLES)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(6, 60),
    test=st.floats(0, 0.4),
    validation=st.floats(0, 0.4),
    seed=st.integers(0, 2**32),
)
def test_splits_are_a_partition_of_the_rows_and_a_seed_gives_them_again(
    rows: int, test: float, validation: float, seed: int
) -> None:
    def split() -> list[torch.Tensor]:
        x = torch.arange(rows)[:, None]
        table = make_table(x, test=test, validation=validation, seed=seed, standardize=False)
        return [table.train, table.validation, table.test]

    parts = split()
    assert torch.cat(parts).flatten().sort().values.tolist() == list(range(rows))
    assert len(parts[0]) > 0
    assert abs(len(parts[1]) - validation * rows) <= 0.5 + 1e-9
    assert abs(len(parts[2]) - test * rows) <= 0.5 + 1e-9
    assert all(torch.equal(ours, again) for ours, again in zip(parts, split(), strict=True))


def test_a_constant_column_is_kept_with_scale_one() -> None:
    # 0.1 has a rounded mean: its computed deviation is not 0.
    table = make_table(np.column_stack((np.full(40, 0.1), np.arange(40))))
    assert table.scale[0] == 1
    assert table.scale[1] > 1
    assert table.train[:, 0].abs().max() < 1e-7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: load_table("boston"),
            f"expected name to be one of {', '.join(map(repr, TABLES))}; got 'boston'",
        ),
        (
            lambda: load_table("iris", test=0.8, validation=0.2),
            "expected fractions test and validation of at least 0, together below 1; got 0.8 and 0.2",
        ),
        (
            lambda: make_table(torch.zeros(2, 2), test=0.4, validation=0.4),
            "expected fractions that leave a train row; got 0.4 and 0.4 of 2",
        ),
        (
            lambda: make_table(torch.zeros(3)),
            "expected rows of shape (rows, features), at least one of each; got (3,)",
        ),
        (lambda: make_table(torch.zeros(3, 2), columns=["a"]), "expected 2 column names; got 1"),
        (lambda: make_table(torch.zeros(3, 2), labels=torch.zeros(2)), "expected labels of shape (3,); got (2,)"),
        (
            lambda: make_table(torch.tensor([[0.0, 1.0], [2.0, math.nan]]), columns=["a", "b"], name="t"),
            "expected finite numbers in 't'; got NaN in row 1, column 'b' (1 such numbers in all)",
        ),
    ],
)
def test_tables_say_what_they_expect(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_import_takes_neither_scikit_learn_nor_pillow() -> None:
    code = "import sys, pyroflows.data; print(sorted({'sklearn', 'PIL', 'matplotlib'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# POWER

POWER_COLUMNS = [
    "global_active_power_w",
    "voltage_cv",
    "sub_metering_1",
    "sub_metering_2",
    "sub_metering_3",
    "minute_of_day",
]


def write_power(path: Path, rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {name: random.integers(0, 200, rows).astype(np.uint16) for name in POWER_COLUMNS}
    np.savez(path, **arrays)
    return arrays


def test_power_recipe(tmp_path: Path) -> None:
    """The published code, step by step, on a small file: rows shuffled in place, then the noise in its order."""
    arrays = write_power(tmp_path / "power.npz", 237)
    data = np.column_stack([arrays[name] for name in POWER_COLUMNS]).astype(np.float64)
    data[:, 0] /= 1000
    data[:, 1] /= 100
    random = np.random.RandomState(42)
    random.shuffle(data)
    voltage_noise = 0.01 * random.rand(237, 1)
    power_noise = 0.001 * random.rand(237, 1)
    meter_noise = random.rand(237, 3)
    data += np.hstack((power_noise, voltage_noise, meter_noise, np.zeros((237, 1))))
    train, test = data[:-23], data[-23:]
    mean, scale = train.mean(0), train.std(0)
    train, validation = train[:-21], train[-21:]

    table = load_power(tmp_path / "power.npz")
    assert repr(table) == "Table('power', features=6, train=193, validation=21, test=23)"
    np.testing.assert_allclose(table.mean, mean)
    np.testing.assert_allclose(table.scale, scale)
    for ours, theirs in ((table.train, train), (table.validation, validation), (table.test, test)):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours, (theirs - mean) / scale, atol=1e-6)
    assert not torch.equal(load_power(tmp_path / "power.npz", seed=1).train, table.train)


def test_power_says_what_it_expects(tmp_path: Path) -> None:
    path = tmp_path / "power.npz"
    with pytest.raises(FileNotFoundError, match=re.escape(f"in the file {path}; got no such file")):
        load_power(path)
    arrays = write_power(path, 20)
    np.savez(path, **{**arrays, "voltage_cv": np.zeros(19)})
    with pytest.raises(ValueError, match=r"one length in .*; got shapes \(20,\), \(19,\)"):
        load_power(path)
    np.savez(path, **{name: column for name, column in arrays.items() if name != "voltage_cv"})
    with pytest.raises(ValueError, match=r"expected an array named voltage_cv in .*; got global_active"):
        load_power(path)
    np.savez(path, **{name: column[:1] for name, column in arrays.items()})
    with pytest.raises(ValueError, match=r"expected at least two rows in .*; got 1"):
        load_power(path)


# BSDS300


@pytest.fixture
def bsds300(tmp_path: Path) -> Path:
    """Three train images and one test image, wide and high, and a few patches of each split."""
    from PIL import Image as image_module

    random = np.random.default_rng(0)
    for part, shapes in (("train", [(12, 9), (9, 12), (20, 30)]), ("test", [(8, 15)])):
        (tmp_path / part).mkdir()
        for number, shape in enumerate(shapes):
            pixels = random.integers(0, 256, shape).astype(np.uint8)
            image_module.fromarray(pixels).save(tmp_path / part / f"{number}.png")
    write_patches(tmp_path)
    return tmp_path


def write_patches(folder: Path, **changed: np.ndarray) -> None:
    places = {
        "train": ([0, 1, 1, 0, 0], [4, 0, 1, 0, 2], [1, 4, 0, 0, 1]),
        "val": ([2, 2], [12, 0], [22, 7]),
        "test": ([0, 0, 0], [0, 0, 0], [0, 7, 3]),
    }
    arrays = {"train_folder_names": np.array([b"0", b"1", b"2"]), "test_folder_names": np.array([b"0"])}
    for split, (image, row, column) in places.items():
        arrays[f"{split}_image"] = np.array(image, np.uint8)
        arrays[f"{split}_row"] = np.array(row, np.uint16)
        arrays[f"{split}_col"] = np.array(column, np.uint16)
    np.savez(folder / "patches.npz", **{name: array for name, array in {**arrays, **changed}.items() if array.size})


def test_bsds300_recipe(bsds300: Path) -> None:
    from PIL import Image

    table = load_bsds300(bsds300)
    assert repr(table) == "Table('bsds300', features=63, train=5, validation=2, test=3)"
    assert (table.mean == 0).all()
    assert (table.scale == 1).all()
    with np.load(bsds300 / "patches.npz") as arrays:
        for split, part, rows in (
            ("train", "train", table.train),
            ("val", "train", table.validation),
            ("test", "test", table.test),
        ):
            places = zip(*(arrays[f"{split}_{place}"] for place in ("image", "row", "col")), strict=True)
            for ours, (number, row, column) in zip(rows.double().numpy(), places, strict=True):
                with Image.open(bsds300 / part / f"{number}.png") as file:
                    patch = np.asarray(file)[row : row + 8, column : column + 8].ravel()
                # The 64 numbers come back from the 63, because they had mean 0, but for the mean and the noise.
                whole = 256 * np.append(ours, -ours.sum())
                noise = whole - (patch - patch.mean())
                assert np.abs(noise).max() < 1
                assert np.ptp(noise) < 1
                assert noise.std() > 0.15
                assert abs(noise.sum()) < 1e-3


def test_bsds300_fewer_rows_are_the_first_and_a_seed_gives_the_noise(bsds300: Path) -> None:
    table = load_bsds300(bsds300)
    fewer = load_bsds300(bsds300, train_rows=2)
    assert torch.equal(fewer.train, table.train[:2])
    assert torch.equal(fewer.test, table.test)
    other = load_bsds300(bsds300, seed=1)
    assert not torch.equal(other.train, table.train)
    assert (other.train - table.train).abs().max() < 2 / 256


def test_bsds300_says_what_it_expects(bsds300: Path) -> None:
    from PIL import Image as image_module

    for train_rows, expected in (
        (0, "to be a positive integer"),
        (6, "of at most 5"),
        (2.0, "to be a positive integer"),
    ):
        message = f"expected train_rows {expected}; got {train_rows}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            load_bsds300(bsds300, train_rows=train_rows)
    write_patches(bsds300, val_row=np.array([12, 13], np.uint16))
    with pytest.raises(ValueError, match="expected patches inside images of 20x30; got row 13, column 7"):
        load_bsds300(bsds300)
    write_patches(bsds300, test_col=np.empty(0))
    with pytest.raises(ValueError, match=r"expected an array named test_col in .*; got train_folder_names"):
        load_bsds300(bsds300)
    write_patches(bsds300)
    path = bsds300 / "test" / "0.png"
    image_module.fromarray(np.zeros((8, 15, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"expected an 8-bit grey image in .*; got uint8 of shape \(8, 15, 3\)"):
        load_bsds300(bsds300)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"in the file {path}; got no such file")):
        load_bsds300(bsds300)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{bsds300 / 'train' / 'patches.npz'}; got no such file")):
        load_bsds300(bsds300 / "train")


# The real files, where they are


def gaussian_score(train: torch.Tensor, test: torch.Tensor) -> float:
    """The mean test log-likelihood of one full-covariance Gaussian: the benchmark's check of a preparation."""
    x = train.double()
    normal = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0))
    return normal.log_prob(test.double()).mean().item()


class TestRealPower:
    pytestmark = real_files

    def test_published_figures(self) -> None:
        table = load_power(Path(FOLDER) / "uci" / "power_raw.npz")
        assert [len(part) for part in (table.train, table.validation, table.test)] == [1_659_917, 184_435, 204_928]
        mean = [1.09168205, 240.84478585, 1.62038642, 1.79879116, 6.95573764, 719.62572383]
        scale = [1.05699674, 3.23958668, 6.15359155, 5.82991955, 8.4410717, 415.89381048]
        np.testing.assert_allclose(table.mean, mean, rtol=1e-8)
        np.testing.assert_allclose(table.scale, scale, rtol=1e-8)
        first = [-0.71813667, -0.18485266, -0.11447968, -0.10243952, -0.7158488, -1.5692124]
        np.testing.assert_allclose(table.test[0], first, rtol=1e-6)
        assert gaussian_score(table.train, table.test) == pytest.approx(-7.742, abs=5e-4)


class TestRealBSDS300:
    pytestmark = real_files

    def test_published_figures(self) -> None:
        folder = Path(FOLDER) / "uci" / "bsds300"
        table = load_bsds300(folder, train_rows=300_000)
        assert [len(part) for part in (table.train, table.validation, table.test)] == [300_000, 50_000, 250_000]
        assert gaussian_score(table.train, table.test) == pytest.approx(96.40, abs=0.02)

    def test_pixel_sums(self) -> None:
        folder = Path(FOLDER) / "uci" / "bsds300"
        sums = {}
        with np.load(folder / "patches.npz") as arrays:
            for split, part in (("train", "train"), ("val", "train"), ("test", "test")):
                images = [
                    _read_image(folder / part / f"{name.decode()}.png") for name in arrays[f"{part}_folder_names"]
                ]
                places = tuple(arrays[f"{split}_{place}"] for place in ("image", "row", "col"))
                sums[split] = sum(int(chunk.sum()) for chunk in _patches(images, places))
        assert sums == {"train": 7_056_908_810, "val": 358_038_151, "test": 1_732_648_677}
