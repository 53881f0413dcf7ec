"""Thirteen posteriors of posteriordb as Pyro models, with their data and their reference draws."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor

# Every model runs for one draw of its sites and, inside a plate to the left of its own, for many at a time. A prior
# takes its dtype and device from the data by `real`; a bare `dist.Normal(0.0, 10.0)` would be drawn in float32.


def filtered(x: Tensor, weight: Tensor) -> Tensor:
    """Solve ``h[t] = x[t] + weight * h[t - 1]`` along the last dimension, from ``h[-1] = 0``."""
    # 1 / (1 - w B) = (1 + w B) (1 + w^2 B^2) (1 + w^4 B^4) ..., B the step back: log2 of the length instead of a loop.
    length, lag = x.shape[-1], 1
    while lag < length:
        x = x + weight * torch.nn.functional.pad(x[..., :-lag], (lag, 0))
        weight, lag = weight * weight, 2 * lag
    return x


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    real = y.new_tensor
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(real(5.0)))
    with pyro.plate("schools", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(real(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    real = y.new_tensor
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(real(5.0)))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_interaction(x: Tensor, y: Tensor) -> None:
    with pyro.plate("coefficients", x.shape[-1]):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma), obs=y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    with pyro.plate("coefficients", x.shape[-1]):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma), obs=y)


def blr(x: Tensor, y: Tensor) -> None:
    real = y.new_tensor
    with pyro.plate("coefficients", x.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(real(0.0), 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(real(10.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma), obs=y)


def ark(lagged: Tensor, y: Tensor) -> None:
    real = y.new_tensor
    alpha = pyro.sample("alpha", dist.Normal(real(0.0), 10.0))
    with pyro.plate("lags", lagged.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(real(0.0), 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(real(2.5)))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta @ lagged.mT, sigma), obs=y)


def arma11(y: Tensor) -> None:
    real = y.new_tensor
    mu = pyro.sample("mu", dist.Normal(real(0.0), 10.0))
    phi = pyro.sample("phi", dist.Normal(real(0.0), 2.0))
    theta = pyro.sample("theta", dist.Normal(real(0.0), 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(real(2.5)))
    with pyro.plate("time", len(y)) as time:
        before = torch.where(time == 0, mu, y.roll(1))  # the value before the first is taken to be mu
        error = filtered(y - mu - phi * before, -theta)
        pyro.sample("y", dist.Normal(y - error, sigma), obs=y)


def garch11(y: Tensor, sigma1: Tensor) -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    alpha1 = pyro.sample("alpha1", dist.Uniform(y.new_tensor(0.0), 1.0))
    # Flat on a range that depends on alpha1; Uniform(0, 1 - alpha1) would weigh alpha1 by the length of that range.
    beta1 = pyro.sample("beta1", dist.ImproperUniform(constraints.interval(0.0, 1 - alpha1), alpha1.shape, ()))
    with pyro.plate("time", len(y)) as time:
        added = alpha0 + alpha1 * (y.roll(1) - mu).square()
        variance = filtered(torch.where(time == 0, sigma1.square(), added), beta1)
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


def gp_regr(x: Tensor, y: Tensor) -> None:
    real = y.new_tensor
    rho = pyro.sample("rho", dist.Gamma(real(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(real(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(real(1.0)))
    rho, alpha, sigma = (value[..., None, None] for value in (rho, alpha, sigma))
    distance = (x[:, None] - x) / rho
    covariance = alpha.square() * (-distance.square() / 2).exp() + sigma * torch.eye(len(x)).to(x)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)


def low_dim_gauss_mix(y: Tensor) -> None:
    real = y.new_tensor
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(real(0.0), 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(real([2.0, 2.0])).to_event(1))
    theta = pyro.sample("theta", dist.Beta(real(5.0), 5.0))
    with pyro.plate("rows", len(y)):
        # A third of the time of MixtureSameFamily, which sums over a last dimension of two.
        low, high = (dist.Normal(mu[..., k], sigma[..., k]).log_prob(y) for k in (0, 1))
        pyro.factor("y", torch.logaddexp(theta.log() + low, (-theta).log1p() + high))


def diamonds(x: Tensor, y: Tensor) -> None:
    real = y.new_tensor
    with pyro.plate("coefficients", x.shape[-1]):
        b = pyro.sample("b", dist.Normal(real(0.0), 1.0))
    intercept = pyro.sample("Intercept", dist.StudentT(real(3.0), 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(real(3.0), 0.0, 10.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(intercept + b @ x.mT, sigma), obs=y)


def lotka_volterra(y_init: Tensor, y: Tensor, steps: int = 12) -> None:
    """Measurements one year apart, `steps` of the classical Runge-Kutta method a year."""
    # With 12 the populations are within 3e-6 of the exact ones, relatively, and the log density within 5e-5 of its own,
    # over the reference draws.
    real = y.new_tensor
    theta = pyro.sample("theta", dist.ImproperUniform(constraints.independent(constraints.positive, 1), (), (4,)))
    prior = dist.Normal(real([1.0, 0.05, 1.0, 0.05]), real([0.5, 0.05, 0.5, 0.05]))
    pyro.factor("theta_prior", prior.log_prob(theta).sum(-1))
    z_init = pyro.sample("z_init", dist.LogNormal(real([math.log(10.0)] * 2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(real([-1.0, -1.0]), 1.0).to_event(1))
    pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma).to_event(1), obs=y_init)

    # Of the logarithms, which need no positivity: (log u)' = alpha - beta v and (log v)' = -gamma + delta u.
    alpha, beta, gamma, delta = theta.unbind(-1)
    rate, weight = torch.stack([alpha, -gamma], -1), torch.stack([-beta, delta], -1)

    def slope(log_z: Tensor) -> Tensor:
        return torch.addcmul(rate, weight, log_z.flip(-1).exp())

    step, log_z, years = 1 / steps, z_init.log(), []
    for _ in range(len(y)):
        for _ in range(steps):
            k1 = slope(log_z)
            k2 = slope(log_z.add(k1, alpha=step / 2))
            k3 = slope(log_z.add(k2, alpha=step / 2))
            k4 = slope(log_z.add(k3, alpha=step))
            log_z = log_z.add(k1 + k4, alpha=step / 6).add(k2 + k3, alpha=step / 3)
        years.append(log_z)
    pyro.sample("y", dist.LogNormal(torch.stack(years, -2), sigma[..., None, :]).to_event(2), obs=y)


@dataclass(frozen=True)
class Program:
    """A model, the conversion of the Stan program's data to its arguments, and its sites in the order of the draws."""

    model: Callable[..., None]
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    sites: tuple[str, ...]
    folder: str | None = None  # of the data and the draws, by default the name of the posterior
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # from the sites to the columns


@dataclass(frozen=True)
class Posterior:
    """A model with its data, `model(**data)`, and reference draws, `(10000, columns)`, whose columns have `names`."""

    name: str
    model: Callable[..., None]
    data: dict[str, Tensor]
    names: tuple[str, ...]
    reference: Tensor
    to_reference: Callable[[dict[str, Tensor]], Tensor]


def _columns(*columns: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def _schools(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": data["y"], "sigma": data["sigma"]}


def _kidiq(data: dict[str, Tensor]) -> dict[str, Tensor]:
    school, iq = data["mom_hs"], data["mom_iq"]
    return {"x": _columns(school, iq, school * iq), "y": data["kid_score"]}


def _mesquite(data: dict[str, Tensor]) -> dict[str, Tensor]:
    log = {key: data[key].log() for key in ("diam1", "diam2", "canopy_height", "total_height", "weight")}
    area, shape = log["diam1"] + log["diam2"], log["diam1"] - log["diam2"]
    volume = area + log["canopy_height"]
    return {"x": _columns(volume, area, shape, log["total_height"], data["group"]), "y": log["weight"]}


def _nes(data: dict[str, Tensor]) -> dict[str, Tensor]:
    ages = [(data["age_discrete"] == level).to(data["income"]) for level in (2, 3, 4)]
    x = _columns(data["real_ideo"], data["race_adj"], *ages, data["educ1"], data["gender"], data["income"])
    return {"x": x, "y": data["partyid7"]}


def _ark(data: dict[str, Tensor]) -> dict[str, Tensor]:
    y, order = data["y"], int(data["K"])
    return {"lagged": y.unfold(0, order, 1)[:-1].flip(-1), "y": y[order:]}


def _diamonds(data: dict[str, Tensor]) -> dict[str, Tensor]:
    x = data["X"][:, 1:]
    return {"x": x - x.mean(0), "y": data["Y"]}


def _theta(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    mu, tau = (samples[key].reshape(-1, 1) for key in ("mu", "tau"))
    return {**samples, "theta": mu + tau * samples["theta_trans"].flatten(1)}


SCHOOLS = "eight_schools-eight_schools_noncentered"
MODELS = {
    SCHOOLS: Program(eight_schools_noncentered, _schools, ("theta", "mu", "tau"), convert=_theta),
    "eight_schools-eight_schools_centered": Program(
        eight_schools_centered, _schools, ("theta", "mu", "tau"), folder=SCHOOLS
    ),
    "kidiq-kidscore_interaction": Program(kidscore_interaction, _kidiq, ("beta", "sigma")),
    "mesquite-logmesquite_logvash": Program(flat_regression, _mesquite, ("beta", "sigma")),
    "nes2000-nes": Program(flat_regression, _nes, ("beta", "sigma")),
    "sblri-blr": Program(blr, lambda data: {"x": data["X"], "y": data["y"]}, ("beta", "sigma")),
    "arK-arK": Program(ark, _ark, ("alpha", "beta", "sigma")),
    "arma-arma11": Program(arma11, lambda data: {"y": data["y"]}, ("mu", "phi", "theta", "sigma")),
    "garch-garch11": Program(
        garch11, lambda data: {"y": data["y"], "sigma1": data["sigma1"]}, ("mu", "alpha0", "alpha1", "beta1")
    ),
    "gp_pois_regr-gp_regr": Program(gp_regr, lambda data: {"x": data["x"], "y": data["y"]}, ("rho", "alpha", "sigma")),
    "low_dim_gauss_mix-low_dim_gauss_mix": Program(
        low_dim_gauss_mix, lambda data: {"y": data["y"]}, ("mu", "sigma", "theta")
    ),
    "diamonds-diamonds": Program(diamonds, _diamonds, ("b", "Intercept", "sigma")),
    "hudson_lynx_hare-lotka_volterra": Program(
        lotka_volterra, lambda data: {"y_init": data["y_init"], "y": data["y"]}, ("theta", "z_init", "sigma")
    ),
}


def load_posterior(name: str, data: str | Path | None = None) -> Posterior:
    """Read one of `MODELS` from `data`, by default PYROFLOWS_DATA, the folder that holds the folder posteriordb."""
    if name not in MODELS:
        raise ValueError(f"expected one of {', '.join(MODELS)}; got {name}")
    if data is None and "PYROFLOWS_DATA" not in os.environ:
        raise ValueError("expected the folder of the data, as an argument or in PYROFLOWS_DATA; got neither")
    program = MODELS[name]
    folder = Path(os.environ["PYROFLOWS_DATA"] if data is None else data) / "posteriordb" / (program.folder or name)
    values = json.loads((folder / "data.json").read_text())
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
    with np.load(folder / "draws.npz") as draws:
        names = tuple(column.decode() for column in draws["names"])
        reference = torch.from_numpy(draws["draws"].reshape(-1, len(names))).double()

    def to_reference(samples: dict[str, Tensor]) -> Tensor:
        converted = program.convert(samples)
        return torch.cat([converted[site].reshape(len(converted[site]), -1) for site in program.sites], -1)

    return Posterior(name, program.model, program.prepare(tensors), names, reference, to_reference)


def elbo_of(model: Callable, guide: Callable, data: Mapping, draws: int = 4000) -> float:
    """Return a guide's ELBO; minus infinity if a draw leaves the support, as in guides that fix the support once."""
    for _ in range(draws // 10):
        drawn = poutine.trace(guide).get_trace(**data)
        sites = poutine.trace(poutine.replay(model, drawn)).get_trace(**data).nodes.values()
        latent = [site for site in sites if site["type"] == "sample" and not site_is_subsample(site)]
        if not all(bool(site["fn"].support.check(site["value"]).all()) for site in latent):
            return -math.inf
    elbo = -Trace_ELBO(draws, vectorize_particles=True).loss(model, guide, **data)
    return elbo if math.isfinite(elbo) else -math.inf
