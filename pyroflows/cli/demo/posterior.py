"""A posterior: one call of ``fit_posterior`` next to a mean-field guide and the exact numbers."""

import math
import textwrap
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.optim import ClippedAdam
from torch import Tensor

from pyroflows import plots
from pyroflows.cli.demo.comparison import Part, echo
from pyroflows.inference import fit_posterior

__all__ = ["run"]

# Effects of coaching on the test scores of eight schools, and their standard errors: Rubin, 1981.
_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def run(seed: int, quick: bool, until: float) -> Part:
    """The posterior of the eight schools by one call, its verdict, and a mean-field guide."""
    data, n = (torch.tensor(_EFFECTS), torch.tensor(_ERRORS)), 4000
    # Ten seconds are reserved for the draws, the other guide and the figure.
    seconds = min(5.0 if quick else 60.0, max(2.0, round(until - 10.0 - time.perf_counter())))
    echo(f"  flow: fit_posterior, training for at most {seconds:.0f} s ...")
    steps = 20 if quick else 1500
    fitted = fit_posterior(_eight_schools, *data, max_steps=steps, max_seconds=seconds, seed=seed, progress=False)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # the report itself names the verdict
        summary = fitted.summary().to_string()
    echo(textwrap.indent(f"{fitted!r}\n\n{summary}", "  "))
    draws = {"flow": fitted.resampled(n) if fitted.verdict == "resample" else fitted.draws(n)}
    draws["mean field"], svi_numbers = _mean_field(data, n, steps=100 if quick else 800)
    exact, density = _exact_schools(*data)

    judged = {"elbo": fitted.elbo, "seconds": round(fitted.seconds, 2), "note": f"{fitted.verdict}: {fitted.reason}"}
    results = {"exact": exact, "flow": judged, "mean field": svi_numbers}
    rows = []
    for name, numbers in results.items():
        for site, values in draws.get(name, {}).items():
            if site in ("mu", "tau"):
                numbers |= {f"{site}_mean": float(values.double().mean()), f"{site}_sd": float(values.double().std())}
        moments = [f"{numbers[moment]:.2f}" for moment in ("mu_mean", "mu_sd", "tau_mean", "tau_sd")]
        rows.append((name, f"{numbers['elbo']:.3f}", *moments, f"{numbers['seconds']:.0f}", numbers["note"]))
    names = ("verdict", "reason", "log_evidence", "log_evidence_note", "ess")
    report = {name: getattr(fitted, name) for name in names} | {"khat": list(fitted.khat)}
    error = fitted.log_evidence_error
    report["log_evidence_standard_error"] = error if math.isfinite(error) else None
    evidence = f"{fitted.log_evidence:.3f} ± {error:.3f} nats" + f" ({fitted.log_evidence_note})" * (error == math.inf)
    return Part(
        "A posterior: eight schools",
        "Rubin's eight schools (1981): mu is the mean effect of coaching on a test and tau the spread of the effects "
        "between schools, both in points; the effects are in units of tau, around mu (the non-centred form). The flow "
        "comes from one call, `fit_posterior(model, effects, errors)`, which also gives the verdict; the mean-field "
        "guide is trained by Pyro's SVI. Sums over a grid give the exact numbers, since the effects can be integrated "
        "out. The exact ELBO is the log evidence, which guides exceed only by chance; the flow's importance weights "
        f"estimate it as {evidence}. ArviZ's summary of the "
        f"flow's draws:\n\n```text\n{summary}\n```",
        ("posterior", "ELBO (nats)", "mean of mu", "sd of mu", "mean of tau", "sd of tau", "seconds", "what it is"),
        rows,
        {"models": results, **report},
        _figure(draws, density, results),
        "draws of mu and tau by the flow and by the mean-field guide, over the exact posterior",
    )


def _eight_schools(effects: Tensor, errors: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("effects", dist.Normal(mu + tau * z, errors), obs=effects)


def _mean_field(data: tuple[Tensor, Tensor], n: int, *, steps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train Pyro's mean-field guide for at most 15 seconds, and return draws of it, and its ELBO."""
    began, step = time.perf_counter(), 0
    vectorized = {"vectorize_particles": True, "max_plate_nesting": 1}
    with pyro.get_param_store().scope():
        guide = AutoDiagonalNormal(_eight_schools)
        svi = SVI(_eight_schools, guide, ClippedAdam({"lr": 0.1, "lrd": 0.994}), Trace_ELBO(16, **vectorized))
        while step < steps and time.perf_counter() - began < 15.0:
            svi.step(*data)
            step += 1
        numbers = {
            "elbo": -float(Trace_ELBO(20_000, **vectorized).loss(_eight_schools, guide, *data)),
            "seconds": round(time.perf_counter() - began, 2),
            "note": f"Pyro's AutoDiagonalNormal, {step} steps of SVI",
        }
        draws = Predictive(_eight_schools, guide=guide, num_samples=n, parallel=True)(*data)
    return {name: draws[name].reshape(n) for name in ("mu", "tau")}, numbers


def _exact_schools(effects: Tensor, errors: Tensor) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]:
    """Return the moments, and the density of mu and log tau with its axes: the effects are integrated out."""
    mu, log_tau = torch.linspace(-25, 35, 601, dtype=torch.float64), torch.linspace(-12, 6, 901, dtype=torch.float64)
    tau = log_tau[:, None].exp()
    scale = (errors.double() ** 2 + tau[..., None] ** 2).sqrt()  # (901, 1, schools)
    log_joint = dist.Normal(mu[:, None], scale).log_prob(effects.double()).sum(-1)
    log_joint = log_joint + dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau[:, None]
    log_evidence = float(log_joint.flatten().logsumexp(0) + ((mu[1] - mu[0]) * (log_tau[1] - log_tau[0])).log())
    density = (log_joint - log_evidence).exp()
    share = density / density.sum()
    numbers: dict[str, Any] = {"elbo": log_evidence, "seconds": 0.0, "note": "sums over a grid of mu and log tau"}
    for name, values in {"mu": mu.expand_as(share), "tau": tau.expand_as(share)}.items():
        mean = float((share * values).sum())
        numbers |= {f"{name}_mean": mean, f"{name}_sd": float((share * (values - mean) ** 2).sum()) ** 0.5}
    return numbers, (mu, log_tau, density)


def _figure(
    draws: Mapping[str, Mapping[str, Tensor]], exact: tuple[Tensor, Tensor, Tensor], results: Mapping[str, Any]
) -> Figure:
    """Plot draws of each guide over contours of the exact posterior, and the marginals of log tau."""
    mu, log_tau, density = (part.numpy() for part in exact)
    heights = np.sort(density.flatten())
    levels = [float(heights[np.searchsorted(heights.cumsum() / heights.sum(), 1 - part)]) for part in (0.95, 0.8, 0.5)]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    *pairs, right = figure.subplots(1, 3)
    bins = np.linspace(-5.0, 4.0, 46)
    for ax, (name, sites), color, style in zip(pairs, draws.items(), plots.COLORS, ("-", "--"), strict=False):
        points = torch.stack([sites["mu"], sites["tau"]], -1)[:2000]
        title = f"{name}: {len(points):,} draws, ELBO {results[name]['elbo']:.3f} nats"
        names = ("mean effect mu (points)", "spread between schools tau (points, log scale)")
        plots.samples_2d(points, ax, color=color, names=names, title=title)
        ax.contour(mu, np.exp(log_tau), density, levels=levels, colors="black", linewidths=1)
        ax.plot([], [], color="black", label="exact: 50, 80 and 95 %")
        ax.set_yscale("log")
        ax.set(xlim=(-9, 18), ylim=(0.01, 60))
        ax.legend(loc="lower right")
        kind = {"histtype": "step", "density": True, "color": color, "linestyle": style, "linewidth": 1.6}
        right.hist(sites["tau"].log().numpy(), bins, label=name, **kind)
    right.plot(log_tau, density.sum(1) * (mu[1] - mu[0]), color="black", label="exact")
    right.set(title="Spread between schools", xlabel="log tau (tau in points)", ylabel="density", xlim=(-5, 4))
    right.legend(loc="upper left")
    figure.suptitle("Eight schools: the posterior by fit_posterior, by a mean-field guide, and exactly")
    return figure
