"""Hierarchies of 1,000 groups and 2,000 latents by fit_posterior, against their marginal posteriors by quadrature.

python tests/benchmarks/many_groups.py --seeds 0 --output results/many_groups.json

The intercepts and slopes are integrated out, in closed form if the rows are normal and by Gauss-Hermite quadrature of
each group if they are counts. What is left, of four or five parameters, is a posterior that a flow meets to an ESS of
97 % and more.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from posterior_times import counts, group_data, groups
from torch import Tensor

from pyroflows import Posterior, fit_posterior

NUMBER, EACH, NODES = 1000, 5, 9
TWO_PI = 2 * math.pi


def marginal_of_normal(x: Tensor, y: Tensor) -> Callable[..., Tensor]:
    """Return the log-density of means, scales and noise, with normal effects of each row of ``y`` integrated out."""
    ones = torch.ones_like(x)
    xx = torch.stack([ones.sum(1), x.sum(1), x.square().sum(1)])  # entries of X'X, (3, groups)

    def log_density(mean_0, mean_1, scale_0, scale_1, sigma):
        m0, m1, t0, t1, s = (value[..., None] for value in (mean_0, mean_1, scale_0, scale_1, sigma))
        rest = y - m0[..., None] - m1[..., None] * x
        r0, r1, rr = rest.sum(-1) / s**2, (rest * x).sum(-1) / s**2, rest.square().sum(-1) / s**2
        a, b, c = xx[0] / s**2 + 1 / t0**2, xx[1] / s**2, xx[2] / s**2 + 1 / t1**2
        det = a * c - b**2
        explained = (c * r0**2 - 2 * b * r0 * r1 + a * r1**2) / det
        log_det = 2 * EACH * s.log() + 2 * t0.log() + 2 * t1.log() + det.log()
        value = -0.5 * (rr - explained + log_det + EACH * math.log(TWO_PI)).sum(-1)
        return value + log_prior(mean_0, mean_1, 5.0) + log_half_normals(2.0, scale_0, scale_1, sigma)

    return log_density


def marginal_of_counts(x: Tensor, y: Tensor) -> Callable[..., Tensor]:
    """Return the log-density of means and scales, with the effects of each row of counts integrated out."""
    z = torch.zeros(NUMBER, 2, dtype=x.dtype)
    centre, width = torch.tensor([1.0, -0.5]).to(x), torch.tensor([0.7, 0.4]).to(x)
    for _ in range(50):  # Newton's steps to the mode of each group, under a prior near the posterior's
        rate = (z[:, :1] + z[:, 1:] * x).exp()
        gradient = torch.stack([(y - rate).sum(1), ((y - rate) * x).sum(1)], 1) - (z - centre) / width**2
        entries = torch.stack([rate.sum(1), (rate * x).sum(1), (rate * x).sum(1), (rate * x**2).sum(1)], 1)
        precision = entries.view(-1, 2, 2) + torch.diag(1 / width**2)
        z = z + torch.linalg.solve(precision, gradient[..., None])[..., 0].clamp(-1, 1)
    factor = torch.linalg.cholesky(torch.linalg.inv(precision))
    nodes, weights = (torch.from_numpy(value) for value in np.polynomial.hermite.hermgauss(NODES))
    grid = torch.cartesian_prod(nodes, nodes)
    log_weight = (torch.cartesian_prod(weights, weights).log() + grid**2).sum(1) + math.log(2)
    points = z[:, None] + math.sqrt(2) * grid @ factor.mT  # (groups, nodes, 2)
    log_weight = log_weight + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)[:, None]
    log_rate = points[..., :1] + points[..., 1:] * x[:, None]
    log_weight = log_weight + dist.Poisson(log_rate.exp()).log_prob(y[:, None]).sum(-1)
    features = torch.stack([points[..., 0] ** 2, points[..., 0], points[..., 1] ** 2, points[..., 1]], -1).flatten(0, 1)

    def log_density(mean_0, mean_1, scale_0, scale_1):
        p0, p1 = scale_0**-2, scale_1**-2
        factors = torch.stack([-p0 / 2, mean_0 * p0, -p1 / 2, mean_1 * p1], -1)
        constant = -(mean_0**2 * p0 + mean_1**2 * p1) / 2 - scale_0.log() - scale_1.log() - math.log(TWO_PI)
        parts = []
        for part in factors.reshape(-1, 4).split(64):
            parts.append(((part @ features.mT).view(-1, *log_weight.shape) + log_weight).logsumexp(-1).sum(-1))
        value = torch.cat(parts).view(factors.shape[:-1]) + NUMBER * constant
        return value + log_prior(mean_0, mean_1, 2.0) + log_half_normals(1.0, scale_0, scale_1)

    return log_density


def log_prior(mean_0: Tensor, mean_1: Tensor, scale: float) -> Tensor:
    return dist.Normal(0.0, scale).log_prob(mean_0) + dist.Normal(0.0, scale).log_prob(mean_1)


def log_half_normals(scale: float, *values: Tensor) -> Tensor:
    return dist.HalfNormal(torch.tensor(scale).to(values[0])).log_prob(torch.stack(values)).sum(0)


def reference_of(name: str, x: Tensor, y: Tensor) -> Posterior:
    """Return the posterior of the parameters that are left."""
    start = {"mean_0": 1.0, "mean_1": -0.5, "scale_0": 0.7, "scale_1": 0.4}
    if name == "normal":
        start["sigma"] = 1.0
    reference = fit_posterior(
        log_density={"normal": marginal_of_normal, "counts": marginal_of_counts}[name](x, y),
        start={key: torch.tensor(value).double() for key, value in start.items()},
        supports={key: dist.constraints.positive for key in start if not key.startswith("mean")},
        seed=0,
        progress=False,
    )
    assert reference.weights.ess_ratio > 0.97, reference
    return reference


def run(name: str, seed: int) -> dict:
    """Fit one posterior, read the memory that this took, and compare with the reference."""
    torch.set_num_threads(1)
    data = group_data(NUMBER, EACH, name == "counts")
    began = time.process_time()
    posterior = fit_posterior({"normal": groups, "counts": counts}[name], **data, seed=seed, progress=False)
    seconds = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    reference = reference_of(name, data["x"].view(NUMBER, EACH), data["y"].view(NUMBER, EACH))
    draws, true = posterior.draws(6400), reference.resampled(9000)
    return {
        "rows": name,
        "seed": seed,
        "latents": posterior.log_joint.dim,
        "seconds": seconds,
        "gib": memory,
        "mean_error": max(float(abs(draws[key].mean() - true[key].mean()) / true[key].std()) for key in true),
        "sd_error": max(float(abs(draws[key].std() / true[key].std() - 1)) for key in true),
        "evidence": f"{posterior.log_evidence:.2f} ± {posterior.log_evidence_error:.2f}",
        "evidence_by_quadrature": reference.log_evidence,
        "verdict": posterior.verdict,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["normal", "counts"], choices=["normal", "counts"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    print("| rows | seed | latents | s | memory | mean error | sd error | evidence | by quadrature | verdict |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    with ProcessPoolExecutor(1, max_tasks_per_child=1, mp_context=get_context("spawn")) as pool:  # for the memory
        tasks = [(name, seed) for name in options.models for seed in options.seeds]
        for row in pool.map(run, *zip(*tasks, strict=True)):
            rows.append(row)
            print(
                f"| {row['rows']} | {row['seed']} | {row['latents']} | {row['seconds']:.0f} | {row['gib']:.2f} GiB | "
                f"{row['mean_error']:.3f} | {row['sd_error']:.1%} | {row['evidence']} | "
                f"{row['evidence_by_quadrature']:.2f} | {row['verdict']} |",
                flush=True,
            )
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
