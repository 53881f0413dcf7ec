"""Logistic regression on a real table: the posterior by a flow, by Pyro's NUTS and by its mean-field guide."""

import argparse
import math
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.optim import ClippedAdam
from torch import Tensor

from pyroflows import fit_posterior, moment_table
from pyroflows.data import load_table


def model(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    with pyro.plate("columns", x.shape[-1]):
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + weights @ x.mT), obs=y)


def in_columns(values: dict[str, Tensor]) -> Tensor:
    """Return draws as one tensor, (draws, 1 + columns)."""
    return torch.cat([values["intercept"].reshape(-1, 1), values["weights"].flatten(1)], -1)


def score(draws: Tensor, x: Tensor, y: Tensor) -> float:
    """Return the mean of log p(y | x, training rows) over held-out rows."""
    log_prob = dist.Bernoulli(logits=draws[:, :1] + draws[:, 1:] @ x.mT).log_prob(y)  # (draws, rows)
    return float((log_prob.logsumexp(0) - math.log(len(draws))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more, networks this small are slower
    pyro.set_rng_seed(options.seed)

    table = load_table("breast_cancer", validation=0.0, seed=options.seed)
    x, y = table.train, table.labels["train"].float()
    test = table.test, table.labels["test"].float()

    posterior = fit_posterior(model, x, y, seed=options.seed, max_steps=20 if options.quick else 3500, refine="never")
    print(posterior, flush=True)
    began, guide, optimizer = time.perf_counter(), AutoDiagonalNormal(model), ClippedAdam({"lr": 0.02, "lrd": 0.999})
    svi = SVI(model, guide, optimizer, Trace_ELBO(16, max_plate_nesting=1, vectorize_particles=True))
    for _ in range(100 if options.quick else 4000):
        svi.step(x, y)
    seconds = time.perf_counter() - began
    elbo = -Trace_ELBO(10_000, max_plate_nesting=1, vectorize_particles=True).loss(model, guide, x, y)
    mean_field = Predictive(model, guide=guide, num_samples=10_000, parallel=True)(x, y)
    began, number = time.perf_counter(), 100 if options.quick else 2000
    mcmc = MCMC(NUTS(model), num_samples=number, warmup_steps=number // 5, disable_progbar=True)
    mcmc.run(x, y)
    nuts = in_columns(mcmc.get_samples())
    print(f"NUTS: {number} draws in {time.perf_counter() - began:.0f} s, held out {score(nuts, *test):.4f} nats a row")
    difference = moment_table(*nuts.chunk(2)).worst_mean_error
    print(f"means of two halves differ by at most {difference:.3f} sd: all are right to {difference / 2:.3f}")
    for name, values, bound, time_taken in (
        ("mean field", in_columns(mean_field), elbo, seconds),
        ("flow", in_columns(posterior.draws(10_000)), posterior.elbo, posterior.seconds),
    ):
        errors = moment_table(values, nuts)
        print(
            f"{name}: ELBO {bound:.3f} in {time_taken:.0f} s, held out {score(values, *test):.4f}; against NUTS the "
            f"largest error of a mean is {errors.worst_mean_error:.3f} sd, of a sd {errors.worst_sd_error:.1%}"
        )
    print(f"ELBO of the flow above that of the mean field: {posterior.elbo - elbo:.3f} nats")


if __name__ == "__main__":
    main()
