"""A ten-dimensional funnel and a banana, Gaussian in the coordinates of their programs: guide, chains, verdicts."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyroflows import fit_posterior
from pyroflows.plots import COLORS, samples_2d


def funnel() -> None:
    """Neal's funnel: the scale of nine coordinates is exp(v / 2), mostly from 0.01 to 100."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("coordinates", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.sample("v", dist.Normal(0.03 * x**2 - 3.0, 1.0))


SD = {"funnel": 3.0, "banana": 19.0**0.5}  # of v: that of 0.03 x^2 is sqrt(18)
WINDOWS = {"funnel": (-25.0, 25.0, -10.0, 10.0), "banana": (-40.0, 40.0, -7.0, 40.0)}


def exact_draws(model: Callable[[], None], n: int) -> dict[str, Tensor]:
    with pyro.plate("draws", n, dim=-2):
        trace = pyro.poutine.trace(model).get_trace()
    return {name: trace.nodes[name]["value"].reshape(n, -1) for name in ("x", "v")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for funnel.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # with more, networks this small are slower
    pyro.set_rng_seed(options.seed)

    chains = {"num_chains": 64, "num_draws": 20} if options.quick else {}
    figure = Figure(figsize=(11, 7), layout="constrained")
    sds = {}
    for model, row in zip((funnel, banana), figure.subplots(2, 3, sharex="row", sharey="row"), strict=True):
        name = model.__name__
        posterior = fit_posterior(model, seed=options.seed, max_steps=20 if options.quick else 3500, refine="never")
        print(f"{name}: {posterior}", flush=True)
        refined = posterior.refine(seed=options.seed, **chains)
        print(f"{refined}, {refined.seconds:.0f} s", flush=True)
        draws = {
            "exact": exact_draws(model, 10_000),
            f"flow ({posterior.verdict})": posterior.draws(10_000),
            f"chains ({refined.verdict})": refined.draws(1000 if options.quick else 10_000),
        }
        for ax, (title, values), color in zip(row, draws.items(), COLORS, strict=False):
            x, v = values["x"].reshape(len(values["x"]), -1)[:, 0], values["v"].flatten()
            sds[name, title.split()[0]] = sd = float(v.std())
            samples_2d(torch.stack([x, v], -1)[:1000], ax, color=color, names=("$x_1$", "$v$"))
            left, right, low, high = WINDOWS[name]
            ax.set(title=f"{name}, {title}\nsd of v: {sd:.2f}", xlim=(left, right), ylim=(low, high))
    figure.suptitle("1,000 draws each, and standard deviations of all")
    figure.savefig(options.output / "funnel.png", dpi=110)
    for name, sd in SD.items():
        print(f"sd of v in the {name}: exact {sd:.3f}, chains {sds[name, 'chains']:.3f}, flow {sds[name, 'flow']:.3f}")


if __name__ == "__main__":
    main()
