"""A neural spline flow on the checkerboard, whose entropy, ln 32 = 3.466 nats, bounds the loss of every model."""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyroflows import FitOptions, fit, nsf
from pyroflows.data import Checkerboard
from pyroflows.plots import density_2d, samples_2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for checkerboard.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # with more, networks this small are slower

    board = Checkerboard()
    x = board.sample(3_000 if options.quick else 200_000, seed=options.seed)
    # A spline can follow edges along the axes only if no layer mixes the axes between the couplings.
    flow = nsf(2, num_layers=4, hidden_features=(64, 64), residual=False, num_bins=16, permutation="none")
    result = fit(
        flow,
        x,
        epochs=1 if options.quick else 16,
        batch_size=1024,
        learning_rate=5e-3,
        options=FitOptions(warmup=0.1),
        validation=None,
        max_seconds=150,
        seed=options.seed,
        progress=False,
    )
    print(f"{result.steps} steps in {result.seconds:.0f} s, {result.stopped}")
    with torch.no_grad():
        losses = -flow.log_prob(board.sample(50_000, seed=options.seed + 1))
    loss, error = float(losses.mean()), float(losses.std() / len(losses) ** 0.5)

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    density_2d(
        flow, (-4.6, 4.6), left, points=300, max_density=1 / 16, title="Density of the flow (truth: 1/32 = 0.031 or 0)"
    )
    samples_2d(flow.sample((5000,)), right, limits=(-4.6, 4.6), title="5,000 samples")
    figure.suptitle(f"Checkerboard: {loss:.3f} nats on fresh points; the floor is {math.log(32):.3f}")
    figure.savefig(options.output / "checkerboard.png", dpi=110)
    print(f"entropy of the truth: {math.log(32):.4f} nats")
    print(f"negative log-likelihood of 50,000 fresh points, standard error {error:.4f} nats: {loss:.4f} nats")


if __name__ == "__main__":
    main()
