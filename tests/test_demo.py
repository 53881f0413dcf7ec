"""The command line and the demo: exit statuses, one-line errors, and a report that makes sense."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from pyroflows import _version, cli, models, plots, realnvp
from pyroflows.cli import demo, parsers
from pyroflows.cli.demo import digits
from pyroflows.data import load_images, load_table
from pyroflows.diagnostics.bits import bits_per_dim
from pyroflows.training import FitResult


def _numbers(tree: object) -> Iterator[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _numbers(branch)
    elif isinstance(tree, int | float):
        yield tree


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick demo by the command line, with what it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    assert cli.main(["demo", "--quick", "--seed", "3", "--output", str(folder)]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)
    return folder, json.loads((folder / "report.json").read_text())


def test_the_report_holds_finite_numbers_of_every_part(quick):
    _, report = quick
    assert report["seed"] == 3
    assert report["quick"] is True
    assert set(report["parts"]) == set(demo.PARTS)
    assert all(math.isfinite(number) for number in _numbers(report))
    for name in ("breast_cancer", "moons"):
        part = report["parts"][name]
        assert {"Gaussian", "Gaussian mixture", "kernel density", "neural spline flow"} < set(part["models"])


def test_the_posterior_is_judged_beside_exact_numbers(quick):
    folder, report = quick
    part = report["parts"]["posterior"]
    exact, flow, mean_field = (part["models"][name] for name in ("exact", "flow", "mean field"))
    # Means and deviations of posteriordb's reference draws, which are right to a hundredth of a deviation or so.
    for name, wanted in {"mu_mean": 4.41, "mu_sd": 3.31, "tau_mean": 3.60, "tau_sd": 3.20}.items():
        assert exact[name] == pytest.approx(wanted, abs=0.05)
        assert math.isfinite(mean_field[name])
    assert part["verdict"] in ("trust", "resample", "do not trust")
    assert part["reason"]
    assert part["log_evidence"] == pytest.approx(exact["elbo"], abs=0.3)
    # A guide's ELBO is below the log evidence, but for chance; a few steps from a good start are above mean field's.
    assert mean_field["elbo"] < flow["elbo"] < exact["elbo"] + 0.02
    text = (folder / "report.md").read_text()
    assert "| flow |" in text
    assert "ess_weights" in text


def test_the_divergences_on_moons_are_sane(quick):
    _, report = quick
    moons = report["parts"]["moons"]
    assert moons["entropy"] == pytest.approx(0.289, abs=0.03)
    for model in moons["models"].values():
        # A KL is not negative, but for chance; and it is what the entropy leaves of the likelihood.
        assert model["kl"] > -4 * model["kl_standard_error"]
        assert model["kl"] == pytest.approx(-moons["entropy"] - model["log_likelihood"], abs=1e-5)
    assert moons["models"]["Glow, mixture prior"]["kl"] < moons["models"]["Gaussian"]["kl"]


def test_the_bits_of_digits_are_sane(quick):
    _, report = quick
    models = report["parts"]["digits"]["models"]
    assert set(models) == {"Gaussian mixture", "Glow"}
    for model in models.values():
        # To know nothing costs log2 17 = 4.09; the best known to this project are near 2.
        assert 1.9 < model["bits_per_dim"] < 2.8
        assert 0 < model["standard_error"] < 0.1
    below = models["Gaussian mixture"]["bits_per_dim"] - models["Glow"]["bits_per_dim"]
    assert models["Glow"]["below_mixture"] == pytest.approx(below, abs=1e-9)


def test_the_bits_of_the_mixture_are_those_of_scikit_learn():
    images = load_images("digits", seed=3).test[:100]
    torch.manual_seed(0)
    flow, _ = digits._mixture(images, components=2, copies=3)
    torch.manual_seed(0)
    logits, _ = _logits(images.repeat(3, 1, 1, 1))
    mixture = GaussianMixture(2, reg_covar=1e-2, random_state=0).fit(logits)
    torch.manual_seed(5)
    draws = [_logits(images) for _ in range(digits._DRAWS)]
    expected = -sum(mixture.score_samples(logits) + constants for logits, constants in draws) / len(draws) / 64
    found = digits._bits(flow, images, seed=5)
    assert found.numpy() == pytest.approx(expected / math.log(2), abs=1e-3)
    assert float(found.mean()) == pytest.approx(bits_per_dim(flow, images.flatten(1), seed=5).value, abs=1e-6)


def _logits(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logits of images with noise, written out, and the log-det and the levels' constant for each."""
    x = images.flatten(1).float()
    y = 0.01 + 0.98 * ((x + torch.rand_like(x)) / 17).double().numpy()
    return np.log(y / (1 - y)), (np.log(0.98 / (y * (1 - y))) - np.log(17)).sum(1)


def test_the_gaussian_of_the_table_is_the_closed_form(quick):
    _, report = quick
    table = load_table("breast_cancer", seed=3, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(
        table.train.mean(0), table.train.T.cov(correction=0) + 1e-6 * torch.eye(30, dtype=torch.float64)
    )
    expected = float(normal.log_prob(table.test).mean())
    assert report["parts"]["breast_cancer"]["models"]["Gaussian"]["log_likelihood"] == pytest.approx(expected, abs=1e-3)


def test_the_figures_and_the_report_are_there(quick):
    folder, report = quick
    text = (folder / "report.md").read_text()
    for name in ("moons.png", "breast_cancer.png", "digits.png", "posterior.png"):
        picture = (folder / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 20_000
        assert f"({name})" in text
    assert "quick run" in text
    for part in report["parts"].values():
        for name in part["models"]:
            assert f"| {name} |" in text


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["--version"], 0, _version.__version__),
        (["demo", "--help"], 0, "--output"),
        ([], 2, "demo"),
        (["no-such-command"], 2, "no-such-command"),
        (["demo", "--seed", "-1"], 2, "expected an integer from 0"),
        (["demo", "--no-such-option"], 2, "--no-such-option"),
    ],
)
def test_exit_status_of_arguments(capsys, arguments, status, said):
    assert cli.main(arguments) == status
    assert said in "".join(capsys.readouterr())


def test_a_failure_is_one_line_and_status_1(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    assert cli.main(["demo", "--quick", "--output", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pyroflows: ")
    assert said.count("\n") == 1
    assert str(file) in said


def test_an_interrupt_is_one_line_and_status_1(capsys, monkeypatch, tmp_path):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "PARTS", {"moons": interrupted})
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "pyroflows: interrupted\n"


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "pyroflows", "demo", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--seed" in done.stdout


@pytest.mark.parametrize(
    "code, unused",
    [
        ("from pyroflows import *; Flow, fit", "matplotlib sklearn pandas pyarrow PIL arviz"),
        ("import pyroflows.cli as cli; assert cli.main(['--help']) == 0", "torch pyro pandas numpy"),
        ("import pyroflows.cli as cli; assert cli.main('score - - -o -'.split()) == 2", "torch pyro pandas numpy"),
        ("import pyroflows; pyroflows.__version__", "torch pyro"),
    ],
)
def test_heavy_libraries_are_imported_only_where_they_are_used(code, unused):
    code += f"; import sys; used = sorted(set({unused.split()}) & sys.modules.keys()); sys.exit(', '.join(used) or 0)"
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_found_on_first_use(tmp_path):
    realnvp(2, num_layers=2).save(tmp_path / "flow")
    path = str(tmp_path / "flow")
    for code in (
        f"import pyroflows; assert pyroflows.load({path!r}).event_shape == (2,)",
        f"from pyroflows.flow import load; assert load({path!r}).event_shape == (2,)",
        "import pyroflows; assert pyroflows.layers.Spline is pyroflows.Spline; pyroflows.plots.pair_plot",
        "import pyroflows; assert {*pyroflows.__all__, 'FlowDensity', 'layers'} <= {*dir(pyroflows)}",
        "from pyroflows import FlowDensity, distributed, nsf; from pyroflows import *; assert nsf and Flow and fit",
        "import pyroflows; assert not hasattr(pyroflows, 'Flwo') and not hasattr(pyroflows, '__wrapped__')",
    ):
        done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_command_line_offers_every_named_flow():
    assert sorted(parsers.FLOWS) == sorted(models.__all__)


def test_plots_give_back_the_axes_they_draw_on():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    flow = realnvp(2, num_layers=2).double()
    result = FitResult({"train": [3.0, 2.0, 1.0]}, best_epoch=2)
    assert plots.density_2d(flow, (-1, 1, -2, 2), ax, points=5) is ax
    assert ax.get_xlim() == (-1, 1)
    assert ax.get_ylim() == (-2, 2)
    assert plots.samples_2d(flow.sample((10,)), ax, limits=(-3, 3)) is ax
    assert plots.training_curves({"flow": result}, ax, skip=7) is ax
    assert plots.log_likelihoods({"flow": (-1.0, 0.1)}, ax) is ax
    assert ax.get_title() == "Test log-likelihood"


def test_a_density_is_drawn_the_right_way_up():
    from matplotlib.figure import Figure

    ax = plots.density_2d(
        lambda x: -((x - torch.tensor([1.0, -2.0])) ** 2).sum(-1), (-3, 3), Figure().subplots(), points=7
    )
    image = ax.images[0].get_array()
    row, column = divmod(int(image.argmax()), 7)
    assert (column - 3, row - 3) == (1, -2)


@pytest.mark.parametrize("limits", [(1, 0), (0, 1, 2), (0, 1, 1, 1)])
def test_limits_must_increase(limits):
    with pytest.raises(ValueError, match="expected limits"):
        plots.density_2d(lambda x: x.sum(-1), limits)
