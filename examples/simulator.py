"""A simulator of an epidemic, without a tractable density: its posterior for any data, and its calibration."""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from scipy.stats import binom
from torch import Tensor

from pyroflows import fit_amortized
from pyroflows.plots import COLORS

PEOPLE, DAYS = 1000.0, 30
NAMES = {"r0": "infections by one case", "days": "days infectious", "reported": "share reported"}


def epidemic() -> Tensor:
    """Simulate an epidemic: the infections and recoveries of each day are sites too, and are marginalised."""
    r0 = pyro.sample("r0", dist.LogNormal(0.7, 0.4))
    days = pyro.sample("days", dist.LogNormal(1.4, 0.3))
    reported = pyro.sample("reported", dist.Beta(4.0, 4.0))
    healthy, ill = torch.full_like(r0, PEOPLE - 5), torch.full_like(r0, 5.0)
    cases = []
    for day in range(DAYS):
        risk = 1 - (-r0 / days * ill / PEOPLE).exp()
        new = pyro.sample(f"new_{day}", dist.Binomial(healthy, risk))
        well = pyro.sample(f"well_{day}", dist.Binomial(ill, 1 - (-1 / days).exp()))
        healthy, ill = healthy - new, ill + new - well
        cases.append(pyro.sample(f"cases_{day}", dist.Binomial(new, reported)))
    return pyro.deterministic("cases", torch.stack(cases, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for simulator.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # with more, networks this small are slower

    # Simulations are cheap here; with fewer, seen more often, the flow overfits and its intervals are too short.
    settings = {"num_simulations": 1000 if options.quick else 200_000, "epochs": 2 if options.quick else 5}
    posterior = fit_amortized(epidemic, "cases", latents=list(NAMES), seed=options.seed, progress=False, **settings)
    print(posterior)
    result = posterior.calibrate(200 if options.quick else 1000, seed=options.seed + 1, progress=False)
    print(result)

    truth = {"r0": 2.5, "days": 4.0, "reported": 0.4}
    torch.manual_seed(options.seed)
    cases = pyro.condition(epidemic, {name: torch.tensor(value) for name, value in truth.items()})()
    draws = posterior.draws(4000, cases, seed=options.seed)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    above, below = figure.subplots(2, 4)
    bins, simulations = 20, len(result.ranks)
    low, high = binom.interval(0.99, simulations, 1 / bins)
    for ax, ranks, label, p_value in zip(above, result.ranks.T, NAMES.values(), result.p_values, strict=False):
        ax.axhspan(low, high, color="0.85", label="99 % of bins, if uniform")
        ax.hist(ranks, bins=bins, range=(0, result.num_draws + 1), color=COLORS[0], alpha=0.8)
        ax.set(title=f"{label}, p = {p_value:.2f}", xlabel="rank of the truth")
    for ax, (name, label) in zip(below, NAMES.items(), strict=False):
        ax.hist(draws[name].numpy(), bins=50, density=True, color=COLORS[0], alpha=0.8)
        ax.axvline(truth[name], color=COLORS[1], label="truth")
        ax.set(xlabel=label, yticks=[])
    above[0].set_ylabel("simulations")
    above[0].legend(loc="lower center"), below[0].legend(), above[3].axis("off")
    below[3].bar(range(DAYS), cases.numpy(), color=COLORS[1])
    below[3].set(title="the data", xlabel="day", ylabel="reported cases")
    figure.suptitle("Posterior of an epidemic: calibration over simulations, and the posterior of one data set")
    figure.savefig(options.output / "simulator.png", dpi=110)
    print(f"smallest chi-square p-value of the ranks: {result.p_values.min():.3f}")


if __name__ == "__main__":
    main()
