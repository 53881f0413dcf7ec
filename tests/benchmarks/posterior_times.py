"""How long fit_posterior takes with no option set, by latents and rows: processor seconds on one thread.

python tests/benchmarks/posterior_times.py --output results/posterior_times.json
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyroflows import fit_posterior


def linear(x, y):
    """A regression with an unknown noise."""
    zero, one = y.new_zeros(()), y.new_ones(())
    beta = pyro.sample("beta", dist.Normal(zero, 2 * one).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(one))
    pyro.sample("y", dist.Normal(beta @ x.mT, sigma[..., None]).to_event(1), obs=y)


def logistic(x, y):
    """A logistic regression."""
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(()), 2 * y.new_ones(())).expand([x.shape[1]]).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=beta @ x.mT).to_event(1), obs=y)


def groups(x, group, y, number):
    """An intercept and a slope for each group, with their means and scales."""
    zero, one = y.new_zeros(()), y.new_ones(())
    means = [pyro.sample(f"mean_{k}", dist.Normal(zero, 5 * one)) for k in (0, 1)]
    scales = [pyro.sample(f"scale_{k}", dist.HalfNormal(2 * one)) for k in (0, 1)]
    sigma = pyro.sample("sigma", dist.HalfNormal(2 * one))
    with pyro.plate("groups", number):
        a, b = (pyro.sample(name, dist.Normal(m, s)) for name, m, s in zip("ab", means, scales, strict=True))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a.index_select(-1, group) + b.index_select(-1, group) * x, sigma), obs=y)


def counts(x, group, y, number):
    """The same of counts."""
    zero, one = y.new_zeros(()), y.new_ones(())
    means = [pyro.sample(f"mean_{k}", dist.Normal(zero, 2 * one)) for k in (0, 1)]
    scales = [pyro.sample(f"scale_{k}", dist.HalfNormal(one)) for k in (0, 1)]
    with pyro.plate("groups", number):
        a, b = (pyro.sample(name, dist.Normal(m, s)) for name, m, s in zip("ab", means, scales, strict=True))
    with pyro.plate("rows", len(y)):
        rate = (a.index_select(-1, group) + b.index_select(-1, group) * x).exp()
        pyro.sample("y", dist.Poisson(rate), obs=y)


def regression_data(columns, rows, binary):
    torch.manual_seed(0)
    x = torch.randn(rows, columns).double()
    signal = x @ (torch.randn(columns).double() / math.sqrt(columns))
    y = torch.bernoulli(signal.sigmoid()) if binary else signal + 0.5 * torch.randn(rows).double()
    return {"x": x, "y": y}


def group_data(number, each, count):
    torch.manual_seed(0)
    group = torch.arange(number).repeat_interleave(each)
    x = torch.randn(len(group)).double()
    a, b = 1 + 0.7 * torch.randn(number).double(), -0.5 + 0.4 * torch.randn(number).double()
    signal = a[group] + b[group] * x
    y = torch.poisson(signal.exp()) if count else signal + torch.randn(len(group)).double()
    return {"x": x, "group": group, "y": y, "number": number}


CASES = {
    **{
        f"regression, {d} columns, {n:,} rows": (linear, partial(regression_data, d, n, False))
        for d, n in ((3, 100), (3, 10_000), (20, 1000), (100, 1000), (100, 10_000))
    },
    **{
        f"logistic regression, {d} columns, {n:,} rows": (logistic, partial(regression_data, d, n, True))
        for d, n in ((5, 200), (20, 2000), (100, 2000))
    },
    **{f"{n} groups, {n * 5:,} rows": (groups, partial(group_data, n, 5, False)) for n in (10, 50, 200, 1000)},
    **{f"{n} groups, {n * 5:,} counts": (counts, partial(group_data, n, 5, True)) for n in (10, 1000)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="*", help="cases whose names have one of these in them")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fit_posterior(linear, **regression_data(1, 20, False), seed=0)  # what a first fit imports
    print("| posterior | latents | s | by | verdict | log evidence |")
    print("| --- | ---: | ---: | --- | --- | ---: |")
    rows = []
    for name, (model, simulate) in CASES.items():
        if options.names and not any(part in name for part in options.names):
            continue
        data = simulate()
        began = time.process_time()
        posterior = fit_posterior(model, **data, seed=0, progress=False)
        seconds = time.process_time() - began
        by = "guide" if posterior.chains is None else "chains"
        evidence = f"{posterior.log_evidence:.2f} ± {posterior.log_evidence_error:.2f}"
        latents = posterior.log_joint.dim
        print(f"| {name} | {latents} | {seconds:.1f} | {by} | {posterior.verdict} | {evidence} |", flush=True)
        draws = posterior.draws(4000)
        moments = {key: [float(v.mean()), float(v.std())] for key, v in draws.items() if v.dim() == 1}
        row = {"name": name, "latents": latents, "seconds": seconds, "by": by, "verdict": posterior.verdict}
        rows.append(row | {"evidence": evidence, "moments": moments})
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
