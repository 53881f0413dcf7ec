"""Eight schools, centred and not, by `fit_posterior`: verdicts, and moments against published reference draws."""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows import fit_posterior

# Effects of coaching on eight schools' test scores, and their standard errors: Rubin, 1981.
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
# Means and standard deviations of the 10,000 reference draws that posteriordb publishes for
# "eight_schools-eight_schools_noncentered": https://github.com/stan-dev/posteriordb
REFERENCE = {"mu": (4.411, 3.309), "tau": (3.602, 3.198)}


def non_centred(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def centred(y: Tensor, sigma: Tensor) -> None:
    """The same posterior in its hard form: for small tau all effects must be near mu, which makes a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def exact_log_evidence(y: Tensor, sigma: Tensor) -> float:
    """Average the density of y, which is normal given tau, over quantiles of the prior of tau."""
    tau = 5.0 * (torch.pi / 2 * (torch.arange(10_000) + 0.5) / 10_000).tan()
    covariance = (sigma**2 + tau[:, None] ** 2).diag_embed() + 5.0**2
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).exp().mean().log())


def errors(draws: dict[str, Tensor]) -> tuple[float, float]:
    """Print moments and those of the reference; return the largest errors of a mean (in sd) and of a sd (relative)."""
    mean_errors, sd_errors = [], []
    for name, (mean, sd) in REFERENCE.items():
        x = draws[name].double()
        print(f"  {name:<4} mean {x.mean():6.3f} (reference {mean:.3f}), sd {x.std():6.3f} (reference {sd:.3f})")
        mean_errors.append(abs(float(x.mean()) - mean) / sd)
        sd_errors.append(abs(float(x.std()) / sd - 1))
    return max(mean_errors), max(sd_errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more, networks this small are slower
    torch.manual_seed(options.seed)
    print(f"exact log evidence: {exact_log_evidence(EFFECTS, ERRORS):.3f}")
    steps = 50 if options.quick else 3500
    worst = []
    for model in (non_centred, centred):
        posterior = fit_posterior(model, EFFECTS, ERRORS, max_steps=steps, seed=options.seed)
        print(f"{model.__name__}: {posterior}", flush=True)
        worst.append(
            errors(posterior.resampled(10_000) if posterior.verdict == "resample" else posterior.draws(10_000))
        )
    mean_error, sd_error = map(max, zip(*worst, strict=True))
    print(f"largest error against the reference: of a sd {sd_error:.1%}, of a mean {mean_error:.3f} sd")


if __name__ == "__main__":
    main()
