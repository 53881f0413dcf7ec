"""Glow of ten steps on two moons, with a Gaussian and with a mixture prior, against the exact density."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyroflows import FitOptions, GaussianMixture, StandardNormal, fit, glow
from pyroflows.data import TwoMoons
from pyroflows.plots import density_2d, samples_2d

LIMITS = (-1.6, 2.6, -1.15, 1.65)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for two_moons.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # with more, networks this small are slower

    moons = TwoMoons(noise=0.05)
    x = moons.sample(3_000 if options.quick else 200_000, seed=options.seed)
    fresh = moons.sample(10_000, seed=options.seed + 1)
    two = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    priors = {"Gaussian prior": StandardNormal(2), "mixture prior": GaussianMixture(2, 2, loc=two)}
    divergences = {}
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    highest = float(moons.log_prob(fresh).max().exp())
    columns = [("truth", moons.log_prob, fresh[:3000])]
    for name, prior in priors.items():
        flow = glow(2, num_steps=10, hidden_features=(64, 64), prior=prior)
        # A learning rate of 1e-3 needs three times the steps. This high one needs the longer warm-up not to diverge.
        result = fit(
            flow,
            x,
            epochs=1 if options.quick else 13,
            batch_size=1024,
            learning_rate=5e-3,
            options=FitOptions(warmup=0.1),
            validation=None,
            max_seconds=80,
            seed=options.seed,
            progress=False,
        )
        with torch.no_grad():
            divergences[name] = float((moons.log_prob(fresh) - flow.log_prob(fresh)).mean())
        print(
            f"{name}: KL {divergences[name]:.4f} nats after {result.steps} steps in {result.seconds:.0f} s", flush=True
        )
        columns.append((f"{name}, KL {divergences[name]:.3f} nats", flow.log_prob, flow.sample((3000,))))
    for (above, below), (title, log_prob, points) in zip(axes.T, columns, strict=True):
        density_2d(log_prob, LIMITS, above, max_density=highest, colorbar=False, title=title)
        samples_2d(points, below, limits=LIMITS, title="3,000 samples")
    for ax in axes.flat:
        ax.label_outer()
    figure.suptitle("Two moons: densities on one colour scale, and samples")
    figure.savefig(options.output / "two_moons.png", dpi=110)
    print(f"largest KL from the true density: {max(divergences.values()):.4f} nats")


if __name__ == "__main__":
    main()
