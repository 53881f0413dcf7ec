"""Two moons: flows and simpler models next to the exact density."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyroflows import plots
from pyroflows.cli.demo.comparison import Density, Part, compare, fit_flows, log_likelihoods, simple_models
from pyroflows.data import TwoMoons
from pyroflows.models import glow, nsf
from pyroflows.priors import GaussianMixture
from pyroflows.training import FitOptions

__all__ = ["run"]


def run(seed: int, quick: bool, until: float) -> Part:
    """Two moons, whose density is known: the divergence of each model from it."""
    truth = TwoMoons(noise=0.05)
    train, validation = truth.sample(2000 if quick else 20_000, seed=seed), truth.sample(1000, seed=seed + 1)
    test = truth.sample(10_000, seed=seed + 2)
    # A single Gaussian has to be split, which leaves a thread between the moons; of two each takes a moon.
    two = GaussianMixture(2, 2, loc=torch.tensor([[0.0, 1.5], [0.0, -1.5]]))
    flows = {
        "Glow, mixture prior": glow(2, num_steps=8, hidden_features=(64, 64), prior=two),
        "neural spline flow": nsf(2, num_layers=4, hidden_features=(64, 64), residual=False),
    }
    models = simple_models(train, validation, product((4,) if quick else (8, 16, 24), ("full",), (1e-6,)))
    options: dict[str, Any] = {"learning_rate": 5e-3, "options": FitOptions(warmup=0.1), "seed": seed}
    options |= {"epochs": 10, "batch_size": 256} if quick else {"epochs": 75, "batch_size": 1024}
    models += fit_flows(flows, "", train, validation, until, **options)
    scores, true_log_prob = log_likelihoods(models, test), truth.log_prob(test)
    rows, numbers = compare(models, scores, lambda score: true_log_prob - score, ("log_likelihood", "kl"), digits=3)
    entropy = -float(true_log_prob.double().mean())
    splits = {"train": len(train), "validation": len(validation), "test": len(test)}
    return Part(
        "Two moons",
        f"{len(train):,} points train every model, and {len(validation):,} others choose the number of components, the "
        f"bandwidth and when to stop. The table is over {len(test):,} fresh points. KL is the mean of log p(x) - "
        f"log q(x) with the exact density p; the entropy of p is {entropy:.3f} nats, so a model's mean "
        f"log-likelihood is above {-entropy:.3f} only by chance.",
        ("model", "log-likelihood (nats per row)", "KL from the truth (nats)", "seconds", "what it is"),
        rows,
        {"entropy": entropy, "rows": splits, "models": numbers},
        _figure(truth, test[:2000], [model for model in models if model.name != "Gaussian"], numbers),
        "densities and samples of the truth and of the models",
    )


def _figure(truth: TwoMoons, points: Tensor, models: Sequence[Density], numbers: Mapping[str, Any]) -> Figure:
    """Draw densities, on one colour scale, and samples below them."""
    limits, highest = (-1.6, 2.6, -1.15, 1.65), float(truth.log_prob(truth.sample(2000, seed=0)).max().exp())
    figure = Figure(figsize=(3.1 * (len(models) + 1), 5.2), layout="constrained")
    axes = figure.subplots(2, len(models) + 1, sharex=True, sharey=True)
    titles = [f"{model.name}\nKL {numbers[model.name]['kl']:.3f} nats" for model in models]
    densities: list[tuple[str, Any, Tensor]] = [("the truth", truth.log_prob, points)]
    densities += [(title, model.log_prob, model.sample(2000)) for title, model in zip(titles, models, strict=True)]
    for (above, below), (title, log_prob, x) in zip(axes.T, densities, strict=True):
        plots.density_2d(log_prob, limits, above, points=120, max_density=highest, colorbar=False, title=title)
        plots.samples_2d(x, below, limits=limits, title="2,000 samples")
    for ax in axes.flat:
        ax.label_outer()
    figure.suptitle("Two moons: densities, all on one colour scale, and samples")
    return figure
