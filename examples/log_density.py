"""Posteriors of log-densities without a Pyro model: a likelihood written by hand, and one of another library."""

import argparse
import math

import numpy as np
import torch
from scipy import integrate, special
from torch import Tensor
from torch.distributions import constraints

from pyroflows import fit_posterior

# Counts of decays in intervals of equal length, by a detector that misses those within a dead time after another.
COUNTS = torch.tensor([4.0, 6.0, 3.0, 7.0, 5.0, 6.0, 2.0, 5.0, 6.0, 4.0], dtype=torch.float64)
DEAD_TIME = 0.05


def log_density(rate: Tensor) -> Tensor:
    """Poisson counts at the rate that the detector sees, with an exponential prior of mean 10; ``rate``: (points,)."""
    seen = (rate / (1 + rate * DEAD_TIME))[:, None]
    return (COUNTS * seen.log() - seen - torch.lgamma(COUNTS + 1)).sum(-1) - rate / 10 - math.log(10)


def log_density_numpy(rate: np.ndarray) -> np.ndarray:
    """The same in NumPy and SciPy, of which torch knows no gradient."""
    seen, counts = (rate / (1 + rate * DEAD_TIME))[:, None], COUNTS.numpy()
    return (counts * np.log(seen) - seen - special.gammaln(counts + 1)).sum(-1) - rate / 10 - math.log(10)


class FiniteDifferences(torch.autograd.Function):
    """A NumPy function of one number for each point, with central differences for its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(log_density_numpy(x.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].numpy()
        step = 1e-5 * x
        slope = (log_density_numpy(x + step) - log_density_numpy(x - step)) / (2 * step)
        return gradient * torch.from_numpy(slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rates = np.linspace(1e-3, 60, 60_001)
    log_values = log_density_numpy(rates)
    mean = np.average(rates, weights=np.exp(log_values - log_values.max()))
    log_evidence = log_values.max() + math.log(integrate.simpson(np.exp(log_values - log_values.max()), x=rates))
    print(f"by quadrature: log evidence {log_evidence:.4f}, mean rate {mean:.3f}")
    errors = []
    for function in (log_density, lambda rate: FiniteDifferences.apply(rate)):
        posterior = fit_posterior(
            log_density=function,
            start={"rate": torch.tensor(5.0, dtype=torch.float64)},
            supports={"rate": constraints.positive},
            max_steps=50 if options.quick else 3500,
            seed=options.seed,
        )
        rate = posterior.resampled(10_000)["rate"]
        print(posterior)
        print(f"mean rate {rate.mean():.3f}")
        errors.append(abs(posterior.log_evidence - log_evidence))
    print(f"largest error of the log evidence: {max(errors):.4f}")


if __name__ == "__main__":
    main()
