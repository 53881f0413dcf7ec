"""Two moons: flows and simpler models next to the exact density."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyroflows import plots
from pyroflows.cli.demo.densities import as_numbers, fit_flows, log_likelihoods, mean_and_error, simple_models
from pyroflows.cli.demo.part import Part, one_thread, save
from pyroflows.data import TwoMoons
from pyroflows.models import glow, nsf
from pyroflows.priors import GaussianMixture
from pyroflows.training import FitOptions

__all__ = ["moons"]


def moons(output: Path, seed: int, quick: bool, until: float) -> Part:
    """Two moons, whose density is known: the divergence of each model from it."""
    truth = TwoMoons(noise=0.05)
    train, validation = truth.sample(2000 if quick else 20_000, seed=seed), truth.sample(1000, seed=seed + 1)
    test = truth.sample(10_000, seed=seed + 2)
    with one_thread(seed):
        # A single Gaussian has to be split, which leaves a thread between the moons; of two each takes a moon.
        two = GaussianMixture(2, 2, loc=torch.tensor([[0.0, 1.5], [0.0, -1.5]]))
        flows = {
            "Glow, mixture prior": glow(2, num_steps=8, hidden_features=(64, 64), prior=two),
            "neural spline flow": nsf(2, num_layers=4, hidden_features=(64, 64), residual=False),
        }
        models = simple_models(train, validation, components=(4,) if quick else (8, 16, 24), ridges=(1e-6,))
        options = {"learning_rate": 5e-3, "options": FitOptions(warmup=0.1)}
        options |= {"epochs": 10, "batch_size": 256} if quick else {"epochs": 75, "batch_size": 1024}
        models += fit_flows(flows, "", train, validation, seed, until, options)
        true_log_prob = truth.log_prob(test)
        scores = {model.name: log_likelihoods(model, test) for model in models}
        shown = [model for model in models if model.name != "Gaussian"]
        samples = {model.name: model.sample(2000) for model in shown}

    numbers: dict[str, Any] = {
        "entropy": -mean_and_error(true_log_prob)[0],
        "rows": {"train": len(train), "validation": len(validation), "test": len(test)},
        "models": {},
    }
    rows = []
    for model in models:
        (mean, error), (kl, kl_error) = map(mean_and_error, (scores[model.name], true_log_prob - scores[model.name]))
        rows.append((model.name, f"{mean:.3f}", f"{kl:.3f} ± {kl_error:.3f}", f"{model.seconds:.0f}", model.note))
        numbers["models"][model.name] = as_numbers(model, mean, error) | {"kl": kl, "kl_standard_error": kl_error}

    limits, highest = (-1.6, 2.6, -1.15, 1.65), float(truth.log_prob(truth.sample(2000, seed=0)).max().exp())
    figure = Figure(figsize=(3.1 * (len(shown) + 1), 5.2), layout="constrained")
    axes = figure.subplots(2, len(shown) + 1, sharex=True, sharey=True)
    pictures: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = [("the truth", truth.log_prob, test[:2000])]
    for model in shown:
        title = f"{model.name}\nKL {numbers['models'][model.name]['kl']:.3f} nats"
        pictures.append((title, model.log_prob, samples[model.name]))
    for (above, below), (title, log_prob, x) in zip(axes.T, pictures, strict=True):
        plots.density_2d(log_prob, limits, above, points=120, max_density=highest, colorbar=False, title=title)
        plots.samples_2d(x, below, limits=limits, title="2,000 samples")
    for ax in axes.flat:
        ax.label_outer()
    figure.suptitle("Two moons: densities, all on one colour scale, and samples")
    save(figure, output / "moons.png")
    return Part(
        "Two moons",
        f"{len(train):,} points train every model, and {len(validation):,} others choose the number of components, the "
        f"bandwidth and when to stop. The table is over {len(test):,} fresh points. KL is the mean of log p(x) - "
        f"log q(x) with the exact density p; the entropy of p is {numbers['entropy']:.3f} nats, so a model's mean "
        f"log-likelihood is above {-numbers['entropy']:.3f} only by chance.",
        ("model", "log-likelihood (nats per row)", "KL from the truth (nats)", "seconds", "what it is"),
        rows,
        numbers,
        {"moons.png": "densities and samples of the truth and of the models"},
    )
