"""A flow as a learned prior: it learns a population, then infers true values from noisy ones, checked on a grid."""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyroflows import Flow, fit, fit_posterior, realnvp
from pyroflows.data import load_table
from pyroflows.plots import COLORS, density_2d

PAIR = ("area error", "worst area")  # of the nuclei of a tumour's cells: skewed, and not independent
NOISE = 0.5  # of a poor instrument, in standard deviations of the population


def model(population: Flow, measured: Tensor) -> None:
    pyro.module("population", population)
    with pyro.plate("patients", len(measured)):
        true = pyro.sample("true", population())
        pyro.sample("measured", dist.Normal(true, NOISE).to_event(1), obs=measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for flow_prior.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # with more, networks this small are slower
    pyro.set_rng_seed(options.seed)

    table = load_table("breast_cancer", seed=options.seed)
    pair = [table.columns.index(name) for name in PAIR]
    train, held_out, test = table.train[:, pair], table.validation[:, pair], table.test[:, pair]
    flow, epochs = realnvp(2, num_layers=8, hidden_features=(32,)), 5 if options.quick else 300
    fit(flow, train, validation=held_out, epochs=epochs, batch_size=128, learning_rate=3e-3, patience=60)
    flow.requires_grad_(False)  # the population is known now: its weights are not latents of the model

    # With two latents for each patient, a grid gives the exact posteriors. The score is of the true values, in nats.
    axis = torch.linspace(-5.0, 10.0, 301)
    grid, cell = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
    likelihood = dist.Normal(test + NOISE * torch.randn_like(test), NOISE).to_event(1)
    for name, prior in {"Gaussian": dist.MultivariateNormal(train.mean(0), train.T.cov()), "flow": flow()}.items():
        log_joint = likelihood.expand((1, len(test))).log_prob(grid[:, None]) + prior.log_prob(grid)[:, None]
        log_evidence = log_joint.logsumexp(0) + cell.log()
        shares = (log_joint - log_joint.logsumexp(0)).exp().T  # (patients, cells)
        means = shares @ grid
        sds = (shares @ grid**2 - means**2).sqrt()
        score = (likelihood.log_prob(test) + prior.log_prob(test) - log_evidence).mean()
        print(f"{name} prior: score {score:.3f}, means off by {(means - test).square().mean().sqrt():.3f}")

    two = test[:, 1].argsort()[[len(test) // 2, -len(test) // 20]]  # a median patient, and a severe case
    measured, steps = likelihood.mean[two], 20 if options.quick else 3500
    posterior = fit_posterior(model, flow, measured, seed=options.seed, max_steps=steps)
    print(f"two patients: {posterior}\nlog evidence on the grid: {log_evidence[two].sum():.3f}")
    draws = posterior.draws(10_000)["true"]  # (draws, patients, 2)

    figure = Figure(figsize=(10, 5), layout="constrained")
    for ax, at, points, true in zip(figure.subplots(1, 2), measured, draws[:500].unbind(1), test[two], strict=True):
        box = torch.stack([at - 1.5, at + 1.5], -1).flatten().tolist()
        density_2d(lambda x, at=at: flow.log_prob(x) - ((x - at) / NOISE).square().sum(-1) / 2, box, ax, colorbar=False)
        ax.plot(*points.T, ".", color=COLORS[1], markersize=2, label="draws of the fitted posterior")
        ax.plot(*at, "s", color="white", label="measured")
        ax.plot(*true, "*", color=COLORS[5], markersize=12, label="true")
        ax.set(title="A patient's exact posterior", xlabel=f"{PAIR[0]} (sd)", ylabel=f"{PAIR[1]} (sd)")
        ax.legend(framealpha=0.3, labelcolor="white")
    figure.savefig(options.output / "flow_prior.png", dpi=110)
    mean_errors, sd_errors = (draws.mean(0) - means[two]).abs() / sds[two], (draws.std(0) / sds[two] - 1).abs()
    print(f"largest errors against the grid: of a sd {sd_errors.max():.1%}, of a mean {mean_errors.max():.3f} sd")


if __name__ == "__main__":
    main()
