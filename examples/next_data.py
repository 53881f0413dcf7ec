"""A posterior as the prior of the next data: a logistic regression of patients in two batches, against all at once."""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows import Posterior, fit_posterior
from pyroflows.data import load_table

COLUMNS = ("mean radius", "mean texture", "mean smoothness")  # of the nuclei of a tumour's cells


def model(x: Tensor, y: Tensor) -> None:
    slope_scale = pyro.sample("slope_scale", dist.HalfNormal(x.new_tensor(2.0)))
    intercept = pyro.sample("intercept", dist.Normal(x.new_tensor(0.0), 3.0))
    slopes = pyro.sample("slopes", dist.Normal(x.new_zeros(x.shape[1]), slope_scale[..., None]).to_event(1))
    with pyro.plate("patients", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + (slopes * x).sum(-1)), obs=y)


def update(posterior: Posterior, x: Tensor, y: Tensor, **options: int) -> Posterior:
    """Return the posterior after more data, whose prior is the flow of the one before."""

    def log_density(slope_scale: Tensor, intercept: Tensor, slopes: Tensor) -> Tensor:
        prior = posterior.log_prob({"slope_scale": slope_scale, "intercept": intercept, "slopes": slopes})
        return prior + dist.Bernoulli(logits=intercept[..., None] + slopes @ x.mT).log_prob(y).sum(-1)

    start = {name: draws.mean(0) for name, draws in posterior.draws(1000).items()}
    return fit_posterior(
        log_density=log_density, start=start, supports={"slope_scale": dist.constraints.positive}, **options
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = load_table("breast_cancer", seed=0)
    rows = table.train.double()
    x = rows[:, [table.columns.index(name) for name in COLUMNS]]
    y = (rows[:, table.columns.index("worst area")] > 0).double()
    limits = {"seed": options.seed, "max_steps": 50 if options.quick else 3500}
    half = len(x) // 3
    first = fit_posterior(model, x[:half], y[:half], **limits)
    both = update(first, x[half:], y[half:], **limits)
    direct = fit_posterior(model, x, y, **limits)
    print(f"first batch: {first}\nthen the second: {both}\nall at once: {direct}")
    print(both.summary(), direct.summary(), sep="\n")
    # The evidence of the second batch given the first is what the chain rule leaves of that of both.
    print(f"log evidence: {first.log_evidence + both.log_evidence:.3f}, at once {direct.log_evidence:.3f}")
    found, wanted = both.draws(10_000), direct.draws(10_000)
    errors = [
        float(((found[name].mean(0) - wanted[name].mean(0)).abs() / wanted[name].std(0)).max()) for name in wanted
    ]
    print(f"largest difference of a mean: {max(errors):.3f} sd")


if __name__ == "__main__":
    main()
