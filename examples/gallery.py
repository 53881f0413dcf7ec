"""Draw a gallery of pyroflows.plots, each picture of a fit that takes seconds."""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import gallery_models as models
from PIL import Image

from pyroflows import plots
from pyroflows.diagnostics import khat_by_size

LIMITS = (-1.6, 2.6, -1.3, 1.8)
COLUMNS = ["mean radius", "mean texture", "mean smoothness", "mean concavity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "gallery", help="folder for the pictures"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # with more, networks this small are slower
    torch.manual_seed(0)
    plt.switch_backend("agg")
    plt.rcParams.update({"savefig.dpi": 130, **plots.PAPER})

    def save(name: str) -> None:
        plt.savefig(path := options.output / f"{name}.png")
        plt.close("all")
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{name}.png", flush=True)

    flows, fits, scores = models.moons()
    left, right = plt.figure(figsize=(6.8, 2.6), layout="constrained").subplots(1, 2)
    plots.density_2d(flows["spline flow"], LIMITS, left, title="Density of a spline flow")
    plots.samples_2d(flows["spline flow"].sample(2000), right, limits=LIMITS, title="2,000 of its samples")
    save("density")
    plots.deformed_grid(flows["RealNVP"])
    save("layers")
    plots.training_curves(fits)
    save("training")
    plots.log_likelihoods(scores, title="Log-likelihood of 4,000 fresh points")
    save("scores")

    data, samples, latent = models.table(COLUMNS)
    plots.pair_plot(data, samples, names=COLUMNS)
    save("pairs")
    plots.marginals(data, samples, names=COLUMNS)
    save("marginals")
    plots.latent_normality(latent, names=COLUMNS, title=f"Latent of {len(latent)} held-out rows")
    save("latent")

    samples, ways = models.digits()
    left, right = plt.figure(figsize=(6.8, 2.7), layout="constrained").subplots(1, 2)
    plots.image_grid(samples, left, num_levels=17, title="Samples of a Glow at temperature 0.7")
    plots.interpolations(ways, right, num_levels=17, title="Between held-out digits")
    save("images")

    posteriors, exact = models.funnel()
    plots.posterior_draws(posteriors["flow"].draws(10_000), exact, labels=("flow", "exact"))
    save("posterior")
    plots.khat({name: khat_by_size(posterior.weights.log_weights) for name, posterior in posteriors.items()})
    save("khat")

    result = models.simulator()
    plots.rank_histograms(result)
    save("ranks")
    left, right = plt.figure(figsize=(6.8, 3.1), layout="constrained").subplots(1, 2)
    plots.pit_ecdf((result.ranks + 0.5) / (result.num_draws + 1), left, names=result.names)
    plots.coverage_curves(result, right)
    save("calibration")
    print(f"KL from two moons to the spline flow: {scores['truth'][0] - scores['spline flow'][0]:.4f} nats")


if __name__ == "__main__":
    main()
