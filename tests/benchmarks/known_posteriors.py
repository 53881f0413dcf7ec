"""Posteriors whose evidence and moments are known, by fit_posterior with no option set but the seed.

python tests/benchmarks/known_posteriors.py --output results/known_posteriors.json
python tests/benchmarks/known_posteriors.py --names two_modes conjugate --seeds 20

Columns: the error of the log evidence, in nats and in its standard errors, and what the case is about: the error of a
mode's weight, the number of modes with draws, or the largest relative error of a standard deviation.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.integrate import quad
from torch import Tensor

from pyroflows import Posterior, fit_posterior

LOG_2PI = math.log(2 * math.pi)
Found = tuple[Posterior, float, str]  # a posterior, the true log evidence, and what the case is about


def two_modes(seed: int) -> Found:
    """Modes of weights 1/4 and 3/4, eight standard deviations apart."""
    centres, log_weights = torch.tensor([[0.0, 0.0], [8.0, 0.0]]).double(), torch.tensor([0.25, 0.75]).double().log()

    def log_density(x: Tensor) -> Tensor:
        return (dist.Normal(centres, 1.0).log_prob(x[..., None, :]).sum(-1) + log_weights).logsumexp(-1)

    posterior = fit_posterior(log_density=log_density, start={"x": torch.zeros(2).double()}, seed=seed, progress=False)
    weight = float((draws_of(posterior)["x"][:, 0] > 4).double().mean())
    return posterior, 0.0, f"weight {weight - 0.75:+.3f}"


def forty_modes(seed: int) -> Found:
    """Forty equal Gaussians at random in a square of side 80 (Midgley et al., 2022, arXiv:2208.01893)."""
    centres = 80 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).double() - 40
    scale = math.log1p(math.e)

    def log_density(x: Tensor) -> Tensor:
        return dist.Normal(centres, scale).log_prob(x[..., None, :]).sum(-1).logsumexp(-1) - math.log(40)

    posterior = fit_posterior(log_density=log_density, start={"x": torch.zeros(2).double()}, seed=seed, progress=False)
    nearest = torch.cdist(draws_of(posterior)["x"], centres).argmin(1)
    return posterior, 0.0, f"{len(nearest.unique())} modes"


def many_well(seed: int) -> Found:
    """Sixteen double wells beside sixteen normal numbers: 65,536 modes."""
    log_z = 16 * (math.log(quad(lambda x: math.exp(-(x**4) + 6 * x**2 + x / 2), -5, 5)[0]) + LOG_2PI / 2)

    def log_density(x: Tensor, y: Tensor) -> Tensor:
        return (-(x**4) + 6 * x**2 + x / 2 - y**2 / 2).sum(-1)

    start = {"x": torch.zeros(16).double(), "y": torch.zeros(16).double()}
    return fit_posterior(log_density=log_density, start=start, seed=seed, progress=False), log_z, ""


def funnel(seed: int, dim: int = 10, refine: str = "never") -> Found:
    """Neal's funnel, whose neck has a standard deviation of 3."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(torch.zeros(()).double(), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(dim - 1).double(), (v / 2).exp()[..., None]).to_event(1))

    posterior = fit_posterior(model, seed=seed, refine=refine, progress=False)
    return posterior, 0.0, f"sd {float(draws_of(posterior)['v'].std()) / 3 - 1:+.1%}"


def wide_funnel(seed: int) -> Found:
    """The same funnel with 99 numbers below its neck, by a density whose coordinates no program straightens."""

    def log_density(v: Tensor, x: Tensor) -> Tensor:
        below = dist.Normal(0.0, (v / 2).exp()[..., None]).log_prob(x).sum(-1)
        return dist.Normal(0.0, 3.0).log_prob(v) + below

    start = {"v": torch.zeros(()).double(), "x": torch.zeros(99).double()}
    posterior = fit_posterior(log_density=log_density, start=start, seed=seed, progress=False)
    return posterior, 0.0, f"sd {float(draws_of(posterior)['v'].std()) / 3 - 1:+.1%}"


def hierarchical_funnel(seed: int) -> Found:
    """The funnel of 100 latents as a Pyro model."""
    return funnel(seed, 100, "auto")


def regression(seed: int) -> tuple[Callable[..., None], dict[str, Tensor], float, Tensor, Tensor]:
    """Return a conjugate regression, its rows, the log evidence, and mean and factor of its posterior."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator).double()
    y = x @ torch.randn(5, generator=generator).double() + torch.randn(60, generator=generator).double()

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(5).double(), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(beta @ x.mT, 1.0).to_event(1), obs=y)

    covariance = torch.linalg.inv(x.mT @ x + torch.eye(5) / 4)
    rows = dist.MultivariateNormal(torch.zeros(60).double(), 4 * x @ x.mT + torch.eye(60))
    return model, {"x": x, "y": y}, float(rows.log_prob(y)), covariance @ x.mT @ y, torch.linalg.cholesky(covariance)


def conjugate(seed: int) -> Found:
    """A regression whose posterior is normal."""
    model, data, log_z, _, factor = regression(seed)
    posterior = fit_posterior(model, **data, seed=seed, progress=False)
    return posterior, log_z, largest_error(draws_of(posterior)["beta"], (factor @ factor.mT).diagonal().sqrt())


def conjugate_from_draws(seed: int) -> Found:
    """The same posterior from exact draws of it."""
    model, data, log_z, mean, factor = regression(seed)
    noise = torch.randn(4, 1000, 5, generator=torch.Generator().manual_seed(seed)).double()
    posterior = Posterior.from_draws({"beta": mean + noise @ factor.mT}, model, **data, seed=seed)
    return posterior, log_z, largest_error(draws_of(posterior)["beta"], (factor @ factor.mT).diagonal().sqrt())


def draws_of(posterior: Posterior) -> dict[str, Tensor]:
    """Return draws as the verdict wants them."""
    return posterior.resampled(10_000) if posterior.verdict == "resample" else posterior.draws(4000)


def largest_error(draws: Tensor, scale: Tensor) -> str:
    return f"sd {float((draws.std(0) / scale - 1).abs().max()):.1%}"


CASES: dict[str, tuple[Callable[[int], Found], int]] = {
    "two_modes": (two_modes, 10),
    "forty_modes": (forty_modes, 3),
    "many_well": (many_well, 1),
    "funnel": (funnel, 3),
    "wide_funnel": (wide_funnel, 1),
    "hierarchical_funnel": (hierarchical_funnel, 1),
    "conjugate": (conjugate, 20),
    "conjugate_from_draws": (conjugate_from_draws, 20),
}


def run(name: str, seed: int) -> dict[str, Any]:
    pyro.clear_param_store()
    began = time.process_time()
    posterior, log_z, about = CASES[name][0](seed)
    error = posterior.log_evidence - log_z
    return {
        "posterior": name,
        "seed": seed,
        "latents": posterior.log_joint.dim,
        "seconds": time.process_time() - began,
        "evidence_error": error,
        "standard_errors": abs(error) / posterior.log_evidence_error if posterior.log_evidence_error else math.inf,
        "ess": float(posterior.ess if posterior.weights is None else posterior.weights.ess_ratio),
        "about": about,
        "verdict": posterior.verdict,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, help="of each; by default 1 to 20")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| posterior | seed | latents | s | log evidence off by | in standard errors | ESS | about | verdict |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    for name in options.names:
        for seed in range(options.seeds or CASES[name][1]):
            row = run(name, seed)
            rows.append(row)
            ess = f"{row['ess']:.0f}" if row["ess"] > 1 else f"{row['ess']:.1%}"
            print(
                f"| {name} | {seed} | {row['latents']} | {row['seconds']:.1f} | {row['evidence_error']:+.3f} | "
                f"{row['standard_errors']:.1f} | {ess} | {row['about']} | {row['verdict']} |",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1, default=np.ndarray.tolist) + "\n")


if __name__ == "__main__":
    main()
