"""How often a verdict is wrong: fits of posteriors with known moments, some of them sabotaged.

python tests/benchmarks/calibration.py --fits 500 --workers 2 --output results/calibration.json
python tests/benchmarks/calibration.py --first 14 --every 24 --fits 200  # modes: one of them hidden, or steps cut

Every third fit is sabotaged: its steps are cut, a mode is hidden from it, or a scale of it is changed afterwards. A
posterior is wrong if a mean is off by 0.2 sd or a deviation by 20 %, on the sites as users read them, and right if none
is off by half of that.
"""

import argparse
import json
import math
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyroflows import AutoFlow, Posterior, fit_posterior

WRONG_MEAN, WRONG_SD = 0.2, 0.2


def real(x):
    return torch.as_tensor(x, dtype=torch.float64)


# Each returns a model, its arguments, exact means and deviations of its sites by name, and its modes.


def gaussian(rng):
    """A Gaussian with correlations and scales over three decades."""
    size = int(rng.integers(1, 25))
    scale = real(10 ** rng.uniform(-1.5, 1.5, size))
    factor = torch.linalg.cholesky(
        real(np.cov(rng.normal(size=(size, size + 3))).reshape(size, size) + 0.05 * np.eye(size))
    )
    factor, mean = scale[:, None] * factor, real(rng.normal(size=size)) * scale

    def model():
        pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=factor))

    return model, (), {"x": (mean, factor.norm(dim=1))}, []


def positive(rng):
    """Independent gamma and log-normal sites."""
    size = int(rng.integers(1, 8))
    shape, width = real(rng.uniform(1, 8, size)), real(rng.uniform(0.1, 0.8, size))

    def model():
        pyro.sample("g", dist.Gamma(shape, 1.0).to_event(1))
        pyro.sample("l", dist.LogNormal(torch.zeros_like(width), width).to_event(1))

    of_l = (width**2 / 2).exp(), ((width**2).exp() - 1).sqrt() * (width**2 / 2).exp()
    return model, (), {"g": (shape, shape.sqrt()), "l": of_l}, []


def bounded(rng):
    """Beta sites, some with their mass at an end."""
    size = int(rng.integers(1, 8))
    a, b = real(rng.uniform(0.7, 6, size)), real(rng.uniform(0.7, 6, size))

    def model():
        pyro.sample("p", dist.Beta(a, b).to_event(1))

    return model, (), {"p": (a / (a + b), (a * b / (a + b + 1)).sqrt() / (a + b))}, []


def regression(rng):
    """A conjugate regression of correlated columns."""
    rows, columns = int(rng.integers(10, 100)), int(rng.integers(1, 15))
    x = real(rng.normal(size=(rows, columns)) + rng.normal(size=(rows, 1)))
    noise = float(rng.uniform(0.2, 2))
    y = x @ real(rng.normal(size=columns)) + noise * real(rng.normal(size=rows))

    def model(y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(columns).double(), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(beta @ x.mT, noise).to_event(1), obs=y)

    covariance = torch.linalg.inv(x.mT @ x / noise**2 + torch.eye(columns) / 4)
    return model, (y,), {"beta": (covariance @ x.mT @ y / noise**2, covariance.diagonal().sqrt())}, []


def heavy(rng):
    """Student-t sites of four to ten degrees of freedom."""
    size, df = int(rng.integers(1, 10)), float(rng.uniform(4, 10))
    loc = real(rng.normal(size=size))

    def model():
        pyro.sample("t", dist.StudentT(real(df), loc, 1.0).to_event(1))

    return model, (), {"t": (loc, torch.full_like(loc, math.sqrt(df / (df - 2))))}, []


def banana(rng):
    """A curved ridge, by a factor, so that its program tells nothing of it."""
    bend, width = float(rng.uniform(0.3, 1.5)), float(rng.uniform(0.3, 1.0))

    def model():
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
        y = pyro.sample("y", dist.Normal(real(0.0), 30.0))
        pyro.factor("ridge", dist.Normal(bend * x**2, width).log_prob(y) - dist.Normal(real(0.0), 30.0).log_prob(y))

    exact = {"x": (real(0.0), real(1.0)), "y": (real(bend), real(math.sqrt(2 * bend**2 + width**2)))}
    return model, (), exact, []


def modes(rng):
    """Two Gaussians of unequal weights, one to ten deviations apart."""
    size, weight = int(rng.integers(1, 5)), float(rng.uniform(0.15, 0.5))
    direction = rng.normal(size=size)
    apart = real(direction / np.linalg.norm(direction) * rng.uniform(1, 10))
    centres, weights = torch.stack([torch.zeros(size).double(), apart]), real([1 - weight, weight])

    def model():
        x = pyro.sample("x", dist.Uniform(real(np.full(size, -40.0)), 40.0).to_event(1))
        pyro.factor(
            "f", (dist.Normal(centres, 1.0).to_event(1).log_prob(x[..., None, :]) + weights.log()).logsumexp(-1)
        )

    sd = (1 + weight * (1 - weight) * apart**2).sqrt()
    return model, (), {"x": (weight * apart, sd)}, list(centres)


def groups(rng):
    """A hierarchy of groups with much and little data, its hyperparameters by quadrature."""
    size = int(rng.integers(3, 20))
    noise = real(10 ** rng.uniform(-1.0, 0.7, size))
    y = real(rng.normal(size=size) * rng.uniform(0.1, 2)) + noise * real(rng.normal(size=size))

    def model(y):
        mean = pyro.sample("mean", dist.Normal(real(0.0), 3.0))
        scale = pyro.sample("scale", dist.HalfNormal(real(1.0)))
        with pyro.plate("groups", size):
            x = pyro.sample("x", dist.Normal(mean, scale))
            pyro.sample("y", dist.Normal(x, noise), obs=y)

    s = (torch.arange(4000) + 0.5).double() / 4000 * 6
    precision = 1 / (s[:, None] ** 2 + noise**2)
    total = precision.sum(1) + 1 / 9
    mean = (precision * y).sum(1) / total
    log_p = 0.5 * (precision.log().sum(1) - (precision * y**2).sum(1) - total.log() + total * mean**2) - s**2 / 2
    p = log_p.softmax(0)
    exact_mean, exact_s = p @ mean, p @ s
    sd_mean = (p @ (1 / total + mean**2) - exact_mean**2).sqrt()
    exact = {"mean": (exact_mean, sd_mean), "scale": (exact_s, (p @ s**2 - exact_s**2).sqrt())}
    return model, (y,), exact, []


KINDS = (gaussian, positive, bounded, regression, heavy, banana, modes, groups)


def sabotaged(rng, model, args, centres, seed) -> tuple[Posterior, str]:
    """Return a posterior that something was done to, and what."""
    way = int(rng.integers(2))
    if centres and way:
        guide = AutoFlow(model, init="none", args=args)  # which knows of no other mode
        scales = guide.log_joint.unconstrain({"x": torch.stack([centres[0] - 1, centres[0], centres[0] + 1])})[0]
        guide.require_flow().layers[-1].start_at(scales[1], (scales[2] - scales[0]) / 2)
        return Posterior(guide), "a mode hidden"
    if way:
        posterior = fit_posterior(model, *args, seed=seed, refine="never", max_steps=500)
        whitening = posterior.guide.require_flow().layers[-1]
        row = int(rng.integers(len(whitening.log_scale)))
        with torch.no_grad():
            whitening.log_scale[row] += float(rng.choice([-1, 1]) * rng.uniform(0.2, 1.0))
        return Posterior(posterior.guide), "a scale changed"
    guide = fit_posterior(model, *args, seed=seed, init="none", max_steps=int(rng.integers(1, 200)), refine="never")
    return guide, "steps cut"


def run(seed: int) -> dict:
    """Fit a posterior of a seed; return its verdict and its errors."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    model, args, exact, centres = kind(rng)
    torch.manual_seed(seed)
    if seed % 3 == 2:
        posterior, way = sabotaged(rng, model, args, centres, seed)
    else:
        posterior, way = fit_posterior(model, *args, seed=seed), ""
    number = 40_000 if posterior.chains is None else posterior.chains.shape[:2].numel()
    draws = posterior.draws(number)
    mean_error = sd_error = 0.0
    for name, (mean, sd) in exact.items():
        values = draws[name].double()
        mean_error = max(mean_error, float(((values.mean(0) - mean) / sd).abs().max()))
        sd_error = max(sd_error, float((values.std(0) / sd - 1).abs().max()))
    return {
        "seed": seed,
        "kind": kind.__name__,
        "sabotage": way,
        "latents": posterior.log_joint.dim,
        "seconds": posterior.seconds,
        "verdict": posterior.verdict,
        "reason": posterior.reason,
        "by": "guide" if posterior.chains is None else "chains",
        "mean_error": mean_error,
        "sd_error": sd_error,
    }


def table(rows: list[dict]) -> str:
    """Return the counts of verdicts on right, wrong and other posteriors as Markdown."""
    lines = [
        "| fits | number | trusted | of those wrong | right | of those trusted |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups = {"as they are": [row for row in rows if not row["sabotage"]]}
    for way in sorted({row["sabotage"] for row in rows} - {""}):
        groups[way] = [row for row in rows if row["sabotage"] == way]
    groups["all"] = rows
    for name, part in groups.items():
        trusted = [row for row in part if row["verdict"] == "trust"]
        wrong = [row for row in trusted if is_wrong(row)]
        right = [row for row in part if is_right(row)]
        both = sum(row["verdict"] == "trust" for row in right)
        share = f"{both} ({both / len(right):.0%})" if right else "0"
        lines.append(f"| {name} | {len(part)} | {len(trusted)} | {len(wrong)} | {len(right)} | {share} |")
    return "\n".join(lines)


def is_wrong(row: dict) -> bool:
    return not (row["mean_error"] <= WRONG_MEAN and row["sd_error"] <= WRONG_SD)


def is_right(row: dict) -> bool:
    return row["mean_error"] <= WRONG_MEAN / 2 and row["sd_error"] <= WRONG_SD / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fits", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first fit")
    parser.add_argument("--every", type=int, default=1, help="from one seed to the next, such as 24 for one kind only")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.workers) as pool:
        for row in pool.map(run, range(options.first, options.first + options.every * options.fits, options.every)):
            rows.append(row)
            errors = f"{row['mean_error']:.3f} sd, {row['sd_error']:.1%}"
            print(
                f"{row['seed']} {row['kind']} {row['sabotage']!r} {row['latents']} {row['seconds']:.1f} s "
                f"{row['verdict']} by {row['by']}: {errors}",
                flush=True,
            )
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    for row in rows:
        if row["verdict"] == "trust" and is_wrong(row):
            print("wrong:", row)
    print(Counter((row["kind"], row["verdict"]) for row in rows))


if __name__ == "__main__":
    main()
