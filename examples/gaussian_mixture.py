"""Fit a neural spline flow to a random mixture of Gaussians in the plane and compare it with the exact log-density."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyroflows import FitOptions, fit, nsf
from pyroflows.data import RandomGaussianMixture
from pyroflows.plots import density_2d

LIMITS = (-8.0, 8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for gaussian_mixture.png")
    parser.add_argument("--seed", type=int, default=0, help="of the mixture too")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # with more, networks this small are slower

    truth = RandomGaussianMixture(features=2, num_components=5, seed=options.seed)
    x = truth.sample(3_000 if options.quick else 100_000, seed=options.seed)
    fresh = truth.sample(10_000, seed=options.seed + 1)
    flow = nsf(2, num_layers=4, hidden_features=(64, 64), residual=False)
    result = fit(
        flow,
        x,
        epochs=1 if options.quick else 16,
        batch_size=1024,
        learning_rate=5e-3,
        options=FitOptions(warmup=0.1),
        max_seconds=90,
        seed=options.seed,
        progress=False,
    )
    print(f"{result.steps} steps in {result.seconds:.1f} s")

    with torch.no_grad():
        true, modelled = truth.log_prob(fresh), flow.log_prob(fresh)
    divergence = float((true - modelled).mean())
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    highest = float(true.max().exp())
    density_2d(truth.log_prob, LIMITS, left, max_density=highest, title="Truth")
    density_2d(flow, LIMITS, right, max_density=highest, title=f"Flow, KL {divergence:.3f} nats")
    figure.savefig(options.output / "gaussian_mixture.png", dpi=110)
    print(f"mean log-density of 10,000 fresh points: true {true.mean():.3f}, flow {modelled.mean():.3f} nats")
    print(f"correlation of the two log-densities: {torch.corrcoef(torch.stack([true, modelled]))[0, 1]:.4f}")
    print(f"KL from the true density: {divergence:.4f} nats")


if __name__ == "__main__":
    main()
