"""Each plot draws the numbers it was given on the axes it was given, and refuses what it cannot draw."""

from __future__ import annotations

import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.integrate import trapezoid
from scipy.stats import beta, binom, chisquare, kstest, norm
from scripts import EXAMPLES, run_example

from pyroflows import (
    ElementwiseAffine,
    Flow,
    LULinear,
    StandardNormal,
    UniformDequantizer,
    glow,
    interpolate,
    maf,
    moment_table,
    nsf,
    plots,
    realnvp,
)
from pyroflows.diagnostics import (
    calibration,
    expected_band,
    kde,
    khat_by_size,
    khat_threshold,
    normal_quantiles,
    pit,
    psis,
    rank_counts,
    sbc_p_values,
)

FINITE = np.random.default_rng(7).normal(size=(60, 2))
GIVEN = {"draws": np.random.default_rng(8).normal(size=(40, 19, 2)), "truth": np.zeros((40, 2))}
RESULT = calibration(**GIVEN, names=["mu", "log_sigma"], levels=[0.8, 0.5])
IMAGES = torch.randint(17, (3, 4, 1, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _agg():
    mpl.use("agg")
    plt.close("all")  # figures that other tests left
    yield
    plt.close("all")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def axes_of(count):
    return np.atleast_1d(Figure().subplots(1, count))


def line(ax, label):
    return next(each for each in ax.lines if each.get_label() == label)


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


# What all have in common

ONE = {
    "density_2d": lambda ax: plots.density_2d(StandardNormal(2).log_prob, (-1, 1), ax, points=5),
    "samples_2d": lambda ax: plots.samples_2d(FINITE, ax),
    "log_likelihoods": lambda ax: plots.log_likelihoods({"a": (1.0, 0.1)}, ax),
    "image_grid": lambda ax: plots.image_grid(IMAGES[0], ax, num_levels=17),
    "interpolations": lambda ax: plots.interpolations(IMAGES, ax, num_levels=17),
    "latent_normality": lambda ax: plots.latent_normality(FINITE, ax),
    "pit_ecdf": lambda ax: plots.pit_ecdf(pit(**GIVEN), ax),
    "coverage_curves": lambda ax: plots.coverage_curves(RESULT, ax),
    "khat": lambda ax: plots.khat({"flow": [0.1, 0.2]}, ax),
    "khat by size": lambda ax: plots.khat({"flow": {100: [0.1, 0.2], 200: [0.15]}}, ax),
}
SEVERAL = {
    "marginals": (2, lambda ax: plots.marginals(FINITE, FINITE, ax)),
    "pair_plot": (4, lambda ax: plots.pair_plot(FINITE, FINITE, ax=ax)),
    "deformed_grid": (3, lambda ax: plots.deformed_grid(realnvp(2, num_layers=2), ax, max_panels=3)),
    "posterior_draws": (2, lambda ax: plots.posterior_draws(FINITE, FINITE[::-1], ax)),
    "rank_histograms": (2, lambda ax: plots.rank_histograms(RESULT, ax)),
}


@pytest.mark.parametrize("draw", ONE.values(), ids=ONE)
def test_one_axes_is_drawn_on_and_given_back(draw):
    ax = Figure().subplots()
    assert draw(ax) is ax
    assert plt.get_fignums() == []
    new = draw(None)
    assert new is not ax
    assert new.figure.get_figwidth() == pytest.approx(3.3)
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(("count", "draw"), SEVERAL.values(), ids=SEVERAL)
def test_several_axes_are_drawn_on_and_given_back(count, draw):
    given = axes_of(count)
    assert list(draw(given).flat) == list(given)
    assert list(draw(list(given)).flat) == list(given)
    assert plt.get_fignums() == []
    new = draw(None)
    assert new.size == count
    assert new.flat[0].figure.get_figwidth() <= 6.8
    for wrong in (axes_of(count + 1), axes_of(1)[0]):
        with pytest.raises(
            ValueError, match=rf"expected ax of {count} Axes; got {count + 1 if len(np.shape(wrong)) else 1}"
        ):
            draw(wrong)
    with pytest.raises(ValueError, match=f"expected ax of {count} Axes; got str"):
        draw("axes")


@pytest.mark.parametrize("draw", [*ONE.values(), *(draw for _, draw in SEVERAL.values())], ids=[*ONE, *SEVERAL])
def test_new_figures_are_legible_at_the_width_of_a_paper_and_leave_settings_alone(draw):
    before = dict(mpl.rcParams)
    figure = np.atleast_1d(draw(None)).flat[0].figure
    assert dict(mpl.rcParams) == before
    figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    for ax in [*figure.axes, *(child for each in figure.axes for child in each.child_axes)]:
        labels = [ax.title, ax._right_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        labels += ax.get_legend().get_texts() if ax.get_legend() else []
        labels = [label for label in labels if ax.axison or label.axes is None]
        ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
        assert all(6 <= label.get_size() <= 9 for label in (*labels, *ticks) if label.get_text())
        for box in (label.get_window_extent() for label in labels if label.get_text()):
            assert -1 < box.x0 < box.x1 < width + 1
            assert -1 < box.y0 < box.y1 < height + 1


def test_axes_of_other_figures_keep_their_sizes():
    ax = Figure().subplots()
    plots.khat({"flow": 0.2}, ax)
    assert ax.title.get_size() == pytest.approx(12)
    mine = plots.density_2d(StandardNormal(2).log_prob, (-1, 1), points=5)
    plots.samples_2d(FINITE, mine)
    assert mine.title.get_size() == pytest.approx(8)


def test_the_colours_are_okabe_and_itos():
    assert set(plots.COLORS) == {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"}


# The plane


def test_the_grid_goes_through_the_layers():
    shift, turn = ElementwiseAffine(2), LULinear(2)
    flow = Flow(StandardNormal(2), [shift, turn]).double()
    for parameter in flow.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    axes = plots.deformed_grid(flow, extent=2.0, lines=5)
    assert [ax.get_title() for ax in axes] == ["latent", "1: ElementwiseAffine", "data, after 2: LULinear"]
    latent, middle, data = ([np.array(c.get_segments()) for c in ax.collections] for ax in axes)
    upright, across, circles = latent
    np.testing.assert_allclose(upright[:, :, 0], np.linspace(-2, 2, 5)[:, None] * np.ones(200), atol=1e-12)
    np.testing.assert_allclose(across, upright[..., ::-1])
    np.testing.assert_allclose(np.hypot(*circles[0].T), 1)
    np.testing.assert_allclose(np.hypot(*circles[1].T), 2)
    for before, after, bijection in ((latent, middle, shift), (middle, data, turn), (latent, data, flow.bijection)):
        for there, here in zip(before, after, strict=True):
            moved = bijection.forward_and_log_det(torch.from_numpy(there))[0].detach().numpy()
            np.testing.assert_allclose(here, moved, atol=1e-12)


def test_the_grid_takes_a_context_and_leaves_training_mode():
    flow = maf(2, num_layers=2, context_features=3, hidden_features=(8,)).train()
    context = torch.randn(3)
    axes = plots.deformed_grid(flow, context=context, max_panels=2)
    assert flow.training
    flow.eval()
    ends = np.array(axes[1].collections[2].get_segments())
    circles = np.array(axes[0].collections[2].get_segments())
    wanted = flow.decode(torch.from_numpy(circles).float(), context).detach().numpy()
    np.testing.assert_allclose(ends, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="expected"):
        plots.deformed_grid(flow)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"flow": StandardNormal(2)}, TypeError, "expected a Flow; got StandardNormal"),
        ({"flow": nsf(3, num_layers=1)}, ValueError, r"expected a flow of two features; got one of shape \(3,\)"),
        ({"extent": 0.0}, ValueError, r"expected extent in \(0, inf\); got 0.0"),
        ({"lines": 1}, ValueError, "expected at least 2 lines and 2 panels; got 1 and 8"),
        ({"max_panels": 0}, ValueError, "expected max_panels to be a positive integer; got 0"),
    ],
)
def test_the_grid_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        plots.deformed_grid(**{"flow": realnvp(2, num_layers=1), **arguments})


def test_the_scale_of_a_density_is_as_tall_as_its_picture():
    ax = plots.density_2d(StandardNormal(2).log_prob, (-2, 2, -1, 1), points=5)
    ax.figure.canvas.draw()
    (bar,) = ax.child_axes
    assert bar.get_window_extent().height == pytest.approx(ax.get_window_extent().height, rel=0.02)


# Tables


def heights(ax):
    return [patch.get_data().values for patch in ax.patches], ax.patches[0].get_data().edges


def test_a_density_is_drawn_as_after_training():
    flow = realnvp(2, num_layers=1)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    plots.density_2d(flow, (1, 3), points=5)
    assert flow.training
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_marginals_are_shares_of_all_rows(rng):
    data, samples = rng.normal(size=(400, 2)), 1.5 * rng.normal(size=(900, 2))
    axes = plots.marginals(torch.from_numpy(data), samples, names=["height (m)", "mass (kg)"], labels=("rows", "draws"))
    for column, ax in enumerate(axes):
        found, edges = heights(ax)
        for rows, drawn in zip((data, samples), found, strict=True):
            counts = np.histogram(rows[:, column], edges)[0]
            np.testing.assert_allclose(drawn, counts / len(rows) / np.diff(edges))
        beyond = np.mean((samples[:, column] < edges[0]) | (samples[:, column] > edges[-1]))
        assert beyond > 0.005
        assert ax.get_title(loc="right") == f"{beyond:.0%} of draws out"
        assert ax.get_xlim() == (edges[0], edges[-1])
        assert ax.get_ylim()[0] == 0
    assert texts(axes[0].get_legend()) == ["rows", "draws"]
    assert [ax.get_xlabel() for ax in axes] == ["height (m)", "mass (kg)"]


def test_marginals_of_whole_numbers_have_a_bin_for_each():
    counts = np.repeat([1.0, 2.0, 5.0], [3, 4, 3])[:, None]
    (ax,) = plots.marginals(counts, counts)
    found, edges = heights(ax)
    np.testing.assert_allclose(edges, np.arange(0.5, 6))
    np.testing.assert_allclose(found[0], [0.3, 0.4, 0, 0, 0.3])
    assert ax.get_title(loc="right") == ""


def test_a_constant_column_is_drawn():
    for ax in plots.pair_plot(np.ones((5, 2)), np.ones((4, 2))).flat:
        assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()


def test_pairs_are_points_of_both_tables(rng):
    data, samples = rng.normal(size=(30, 3)), rng.normal(size=(20, 3))
    axes = plots.pair_plot(data, samples, names=["a", "b", "c"])
    assert axes.shape == (3, 3)
    assert [[ax.axison for ax in row] for row in axes] == np.tri(3, dtype=bool).tolist()
    (points,) = axes[2, 1].collections
    offsets, colors = np.asarray(points.get_offsets()), points.get_facecolors()[:, :3]
    for rows, color in ((data, plots.COLORS[0]), (samples, plots.COLORS[1])):
        mine = np.abs(colors - mpl.colors.to_rgb(color)).max(1) < 1e-6
        np.testing.assert_allclose(sorted(offsets[mine].tolist()), sorted(rows[:, [1, 2]].tolist()))
    assert axes[2, 1].get_xlim() == axes[1, 1].get_xlim()
    assert [ax.get_xlabel() for ax in axes[2]] == ["a", "b", "c"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["", "b", "c"]
    assert texts(axes[0, 2].get_legend()) == ["data", "samples"]


def test_pairs_of_large_tables_draw_some_rows():
    x = np.random.default_rng(0).normal(size=(10_000, 2))
    axes = plots.pair_plot(x, x[:100])
    assert 2500 <= len(axes[1, 0].collections[0].get_offsets()) <= 3100


@pytest.mark.parametrize("draw", [plots.marginals, plots.pair_plot])
@pytest.mark.parametrize(
    ("data", "samples", "names", "error", "message"),
    [
        (FINITE, FINITE[:, :1], None, ValueError, "expected samples of the data's 2 columns; got 1"),
        (FINITE, FINITE, ["a"], ValueError, "expected a name for each of 2 columns; got 1"),
        (FINITE[:0], FINITE, None, ValueError, r"expected data of at least one row and one column; got shape \(0, 2\)"),
        (FINITE, np.full((3, 2), np.nan), None, ValueError, r"expected finite numbers in samples; got nan at \(0, 0\)"),
        (FINITE[0], FINITE, None, ValueError, r"expected data with 2 dimensions; got shape \(2,\)"),
        ([["a", "b"]], FINITE, None, TypeError, "expected data as an array or a tensor of numbers; got list"),
    ],
)
def test_tables_that_do_not_match(draw, data, samples, names, error, message):
    with pytest.raises(error, match=message):
        draw(data, samples, names=names)
    assert plt.get_fignums() == []


# Images


def test_a_way_is_a_row():
    ax = plots.interpolations(IMAGES, num_levels=17)
    drawn = np.asarray(ax.images[0].get_array())[..., 0]
    assert drawn.shape == (3 * 9 + 1, 4 * 9 + 1)
    for pair, place in np.ndindex(3, 4):
        shown = drawn[pair * 9 + 1 :, place * 9 + 1 :][:8, :8]
        np.testing.assert_allclose(shown, IMAGES[pair, place, 0] / 16, atol=1e-6)
    ticks = ax.get_xticks()
    assert ticks[0] == pytest.approx(4.5)  # the middles of the first image and of the last
    assert ticks[-1] == pytest.approx(3 * 9 + 4.5)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.25", "0.5", "0.75", "1"]


def test_it_draws_what_interpolate_gives():
    flow = glow((1, 4, 4), num_levels=1, num_steps=1, dequantizer=UniformDequantizer((1, 4, 4), 17))
    images = torch.randint(17, (6, 1, 4, 4), dtype=torch.uint8)
    ax = plots.interpolations(interpolate(flow, images[:3], images[3:], 5), num_levels=17)
    drawn = np.asarray(ax.images[0].get_array())[..., 0]
    assert drawn.shape == (3 * 5 + 1, 5 * 5 + 1)
    np.testing.assert_allclose(drawn[1:5, 1:5], images[0, 0] / 16, atol=1e-6)
    np.testing.assert_allclose(drawn[-5:-1, -5:-1], images[5, 0] / 16, atol=1e-6)


@pytest.mark.parametrize("images", [IMAGES[0], IMAGES[:, :1], IMAGES.numpy()])
def test_images_that_are_no_ways(images):
    with pytest.raises(ValueError, match=r"expected images of shape \(pairs, num, C, H, W\), num of at least 2; got"):
        plots.interpolations(images)


# Calibration


def test_images_are_a_tensor():
    with pytest.raises(TypeError, match="expected images as a tensor; got ndarray"):
        plots.image_grid(np.zeros((1, 1, 4, 4)))


def test_quantiles_of_a_normal_in_closed_form(rng):
    one = normal_quantiles([[0.3]], level=0.9)
    np.testing.assert_allclose(one.expected, 0, atol=1e-12)
    np.testing.assert_allclose([one.low[0], one.high[0]], norm.ppf([0.05, 0.95]))
    z = rng.normal(size=(50, 2))
    found = normal_quantiles(torch.from_numpy(z), level=0.95)
    np.testing.assert_allclose(found.observed, np.sort(z, 0))
    np.testing.assert_allclose(found.low[0], norm.ppf(1 - 0.975 ** (1 / 50)))  # of a minimum
    np.testing.assert_allclose(found.high[-1], norm.ppf(0.975 ** (1 / 50)))
    np.testing.assert_allclose(norm.cdf(found.expected), beta.median(np.arange(1, 51), 50 - np.arange(50)))
    np.testing.assert_allclose(found.distance, [kstest(column, "norm").statistic for column in z.T])


def test_quantiles_of_many_rows_are_some_of_them(rng):
    z = rng.normal(size=(20_000, 1))
    found = normal_quantiles(z)
    assert 100 < len(found.expected) <= 200
    assert found.observed[0] == z.min()
    assert found.observed[-1] == z.max()
    assert np.isin(found.observed, z).all()
    assert ((found.low < found.observed[:, 0]) & (found.observed[:, 0] < found.high)).mean() > 0.9
    assert np.median(found.expected) == pytest.approx(0, abs=0.02)


def test_the_band_of_quantiles_holds_what_it_says():
    rng = np.random.default_rng(1)
    found = normal_quantiles(rng.normal(size=(40, 4000)), level=0.9)
    inside = (found.low[:, None] <= found.observed) & (found.observed <= found.high[:, None])
    np.testing.assert_allclose(inside.mean(1), 0.9, atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": np.zeros((0, 2))}, r"expected z of at least one row and one column; got shape \(0, 2\)"),
        ({"z": FINITE, "level": 1.0}, r"expected level in \(0, 1\); got 1.0"),
        ({"z": np.full((2, 1), np.inf)}, r"expected finite numbers in z; got inf at \(0, 0\)"),
    ],
)
def test_quantiles_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        normal_quantiles(**arguments)
    with pytest.raises(ValueError, match=message):
        plots.latent_normality(**arguments)


def test_a_latent_is_drawn_feature_by_feature(rng):
    z = rng.normal(size=(300, 2)) * [1.0, 2.0]
    ax = plots.latent_normality(z, names=["a", "b"], level=0.95)
    found = normal_quantiles(z, level=0.95)
    for column, name in enumerate("ab"):
        np.testing.assert_allclose(line(ax, name).get_xydata(), np.c_[found.expected, found.observed[:, column]])
    assert texts(ax.get_legend()) == ["95% if normal", "a", "b"]
    corners = ax.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(found.low[0])
    assert corners[:, 1].max() == pytest.approx(found.high[-1])


def test_of_many_features_the_farthest_are_named(rng):
    z = rng.normal(size=(300, 30))
    z[:, 17] *= 3
    ax = plots.latent_normality(z)
    named = texts(ax.get_legend())
    assert len(named) == 7
    assert "$x_{18}$" in named
    assert len(ax.lines) == 31  # the diagonal too


def test_transforms_in_closed_form(rng):
    draws, truth = rng.normal(size=(20, 9, 2)), rng.normal(size=(20, 2))
    values = pit(torch.from_numpy(draws), truth)
    np.testing.assert_allclose(values * 10 - 0.5, (draws < truth[:, None]).sum(1))
    with pytest.raises(ValueError, match="expected draws"):
        pit(draws[0], truth)


def test_transforms_are_drawn_against_their_probability(rng):
    values = rng.uniform(size=(200, 2)) ** [1.0, 2.0]
    ax = plots.pit_ecdf(values, names=["a", "b"], level=0.9)
    grid = np.linspace(0, 1, 101)
    for column, name in enumerate("ab"):
        below = (values[:, column] <= grid[:, None]).mean(1)
        np.testing.assert_allclose(line(ax, name).get_xydata(), np.c_[grid, below - grid], atol=1e-12)
    low, high = expected_band(grid, 200, level=0.9)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert [band.min(), band.max()] == pytest.approx([(low - grid).min(), (high - grid).max()])
    with pytest.raises(ValueError, match="expected transforms from 0 to 1; got 0.5 to 1.5"):
        plots.pit_ecdf([[0.5], [1.5]])


def test_the_band_of_shares_is_a_binomials():
    low, high = expected_band([0.0, 0.1, 1.0], 200, level=0.99)
    assert [low[0], high[0], low[2], high[2]] == [0, 0, 1, 1]
    assert binom.cdf(200 * low[1] - 1, 200, 0.1) < 0.005 <= binom.cdf(200 * low[1], 200, 0.1)
    assert binom.cdf(200 * high[1] - 1, 200, 0.1) < 0.995 <= binom.cdf(200 * high[1], 200, 0.1)
    for shares, message in (
        ([1.2], "expected shares from 0 to 1; got 1.2 to 1.2"),
        ([[0.1]], "expected shares with 1"),
    ):
        with pytest.raises(ValueError, match=message):
            expected_band(shares, 10)
    with pytest.raises(ValueError, match="expected num to be a positive integer; got 0"):
        expected_band([0.5], 0)


def test_ranks_are_counted_as_the_test_counts_them(rng):
    ranks = rng.integers(0, 100, size=(300, 2))
    counts, expected = rank_counts(ranks, 99, num_bins=7)
    assert counts.shape == (7, 2)
    assert (counts.sum(0) == 300).all()
    assert expected.sum() == pytest.approx(300)
    p_values = [chisquare(column, expected).pvalue for column in counts.T]
    np.testing.assert_allclose(sbc_p_values(ranks, 99, num_bins=7), p_values)


def test_rank_histograms_draw_the_counts_and_their_band(rng):
    result = calibration(rng.normal(size=(300, 98, 2)), rng.normal(size=(300, 2)), ["mu", "tau"])
    axes = plots.rank_histograms(result, num_bins=10, level=0.95)
    counts, expected = rank_counts(result.ranks, 98, num_bins=10)
    assert len(set(expected)) == 2  # 99 ranks in ten bins
    low, high = expected_band(expected / 300, 300, level=0.95)
    for i, ax in enumerate(axes):
        drawn = ax.patches[0].get_data()
        np.testing.assert_allclose(drawn.values, counts[:, i])
        np.testing.assert_allclose(drawn.edges, np.r_[0, expected.cumsum() / 300])
        band = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert [band.min(), band.max()] == pytest.approx([300 * low.min(), 300 * high.max()])
        assert ax.get_title() == f"{result.names[i]}, p = {result.p_values[i]:.2f}"
    assert ax.get_xlim() == (0, 1)


def test_coverage_is_drawn_by_level():
    ax = plots.coverage_curves(RESULT)
    for column, name in enumerate(RESULT.names):
        drawn = line(ax, name).get_xydata()
        np.testing.assert_allclose(drawn, np.c_[[0.5, 0.8], RESULT.coverage[::-1, column]])
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)


@pytest.mark.parametrize("draw", [plots.rank_histograms, plots.coverage_curves])
def test_calibration_alone_is_drawn(draw):
    with pytest.raises(TypeError, match=r"expected a Calibration, as calibration\(\) returns it; got ndarray"):
        draw(FINITE)
    with pytest.raises(ValueError, match=r"expected level in \(0, 1\); got 2"):
        draw(RESULT, level=2)


# Posteriors


def test_a_density_of_draws_is_that_of_all_draws(rng):
    x = rng.normal(size=5000)
    grid, density = kde(x, points=400)
    assert [grid[0], grid[-1]] == [x.min(), x.max()]
    np.testing.assert_allclose(density, norm.pdf(grid), atol=0.04)
    grid, density = kde(torch.from_numpy(x), limits=(-1.0, 2.0))
    assert grid[0] >= -1
    assert grid[-1] <= 2
    share = ((x >= -1) & (x <= 2)).mean()
    assert trapezoid(density, grid) == pytest.approx(share, abs=0.02)
    with pytest.raises(ValueError, match="expected at least two different draws; got 1"):
        kde(np.ones(10))
    with pytest.raises(ValueError, match="expected at least two different draws from 8 to 9; got 0"):
        kde(x, limits=(8.0, 9.0))


def test_draws_are_drawn_over_the_reference_of_the_same_name(rng):
    draws = {"mu": rng.normal(size=(500,)), "theta": 2 + rng.normal(size=(500, 2))}
    reference = {"theta": 2 + rng.normal(size=(800, 2)), "mu": rng.normal(size=(800,))}
    axes = plots.posterior_draws(draws, reference, labels=("guide", "NUTS"))
    table = moment_table(draws, reference)
    assert [ax.get_xlabel() for ax in axes] == ["mu", "theta[0]", "theta[1]"]
    columns = [(draws["mu"], reference["mu"]), *zip(draws["theta"].T, reference["theta"].T, strict=True)]
    for i, (ax, (mine, theirs)) in enumerate(zip(axes, columns, strict=True)):
        ends = np.r_[np.quantile(mine, (0.005, 0.995)), np.quantile(theirs, (0.005, 0.995))]
        limits = (ends.min(), ends.max())
        np.testing.assert_allclose(ax.lines[0].get_xydata(), np.c_[kde(mine, limits=limits)])
        filled = ax.collections[0].get_paths()[0].vertices
        assert filled[:, 1].max() == pytest.approx(kde(theirs, limits=limits)[1].max())
        assert ax.get_title() == f"mean {table.mean_error[i]:+z.2f} sd\nsd ratio {table.sd_ratio[i]:.2f}"
    assert texts(axes[0].get_legend()) == ["NUTS", "guide"]


@pytest.mark.parametrize(
    ("draws", "reference", "message"),
    [
        ({"mu": FINITE}, {"tau": FINITE}, "expected draws of every name in the reference; got none of 'tau'"),
        (FINITE, FINITE[:, :1], "expected as many columns as the reference's 1; got 2"),
        (FINITE, np.ones((5, 2)), "expected columns of the reference that vary; got a constant column 0"),
        (np.ones((5, 2)), FINITE, "expected at least two different draws"),
    ],
)
def test_draws_that_do_not_match(draws, reference, message):
    with pytest.raises(ValueError, match=message):
        plots.posterior_draws(draws, reference)


def test_khats_by_size_are_those_of_sets_apart(rng):
    weights = rng.normal(size=250)
    found = khat_by_size(torch.from_numpy(weights), [50, 120])
    assert list(found) == [50, 120]
    np.testing.assert_allclose(found[50], [psis(weights[i : i + 50])[1] for i in range(0, 250, 50)])
    np.testing.assert_allclose(found[120], [psis(weights[:120])[1], psis(weights[120:240])[1]])
    assert list(khat_by_size(weights)) == [100, 200]
    for sizes, got in (([20], 20), ([300], 300)):
        with pytest.raises(ValueError, match=f"expected sizes from 30 to the 250 draws; got {got}"):
            khat_by_size(weights, sizes)


def test_the_threshold_of_khat():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(1000) == pytest.approx(2 / 3)
    assert khat_threshold(2200) == khat_threshold(10**6) == 0.7
    with pytest.raises(ValueError, match="expected at least 30 draws; got 29"):
        khat_threshold(29)


def dots(ax, marker="o"):
    return np.concatenate([each.get_ydata() for each in ax.lines if each.get_marker() == marker])


def test_khats_are_dots_and_those_out_of_the_picture_triangles():
    ax = plots.khat({"flow": [0.1, 0.2, -0.1], "mean field": [1.4, math.inf, 7.0], "one": 0.5})
    np.testing.assert_allclose(dots(ax), [0.1, 0.2, -0.1, 1.4, 0.5])
    low, top = ax.get_ylim()
    assert top == pytest.approx(1.5)
    assert low < -0.1
    np.testing.assert_allclose(dots(ax, "^"), [top, top])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["flow", "mean field", "one"]
    assert any((np.asarray(each.get_ydata()) == 0.7).all() for each in ax.lines)
    assert np.isfinite(plots.khat({"none": [math.inf]}).get_ylim()).all()


def test_khats_by_size_have_a_line_through_medians_and_the_threshold():
    sets = {100: [0.1, 0.3, 0.35], 400: [0.2]}
    ax = plots.khat({"flow": sets, "other": {200: [0.9]}})
    np.testing.assert_allclose(line(ax, "flow").get_xydata(), [[100, 0.3], [400, 0.2]])
    threshold = line(ax, "threshold").get_xydata()
    np.testing.assert_allclose(threshold, [[n, khat_threshold(n)] for n in (100, 200, 400)])
    np.testing.assert_allclose(dots(ax), [0.1, 0.3, 0.35, 0.2, 0.9])
    assert ax.get_xscale() == "log"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ValueError, "expected at least one k-hat; got none"),
        ({"a": []}, ValueError, r"expected k-hats of 'a', none of them NaN; got \[\]"),
        ({"a": math.nan}, ValueError, r"expected k-hats of 'a', none of them NaN; got \[nan\]"),
        ({"a": "high"}, TypeError, "expected k-hats of 'a' as an array or a tensor of numbers"),
        ({"a": 0.1, "b": {100: [0.1]}}, TypeError, "expected k-hats by the draws in a set for every name or for none"),
        ({"a": {}}, ValueError, "expected at least one k-hat of each name; got none"),
        ({"a": {10: [0.1]}}, ValueError, "expected at least 30 draws; got 10"),
    ],
)
def test_khats_refused(values, error, message):
    with pytest.raises(error, match=message):
        plots.khat(values)
    assert plt.get_fignums() == []


# The gallery


@pytest.mark.slow
def test_the_gallery_has_a_dozen_small_pictures(tmp_path):
    """About three minutes."""
    done = run_example("gallery", "--output", tmp_path, folder=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert 0 < float(done.stdout.split()[-2]) < 0.1
    pictures = sorted(tmp_path.iterdir())
    assert [path.name for path in pictures] == sorted(path.name for path in (EXAMPLES / "gallery").iterdir())
    assert len(pictures) <= 12
    for path in pictures:
        assert path.stat().st_size < 80_000
        with Image.open(path) as image:
            assert image.width <= 960
