"""The Pyro models of posteriordb have the log densities of their Stan programs, written here once more in NumPy."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from scipy import stats
from scipy.integrate import solve_ivp
from test_data import FOLDER, real_files

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from common.posteriordb_models import MODELS, SCHOOLS, Posterior, filtered, load_posterior

CENTERED = "eight_schools-eight_schools_centered"
LYNX = "hudson_lynx_hare-lotka_volterra"


def normal(x, loc, scale):
    return stats.norm.logpdf(x, loc, scale).sum()


# The data of the Stan program, and its quantities in the order of the draws, to the log density up to a constant.


def schools_noncentered(data, theta, mu, tau):
    prior = normal(mu, 0, 5) + stats.cauchy.logpdf(tau, 0, 5)
    return prior + normal((theta - mu) / tau, 0, 1) + normal(data["y"], theta, data["sigma"])


def schools_centered(data, theta, mu, tau):
    prior = normal(mu, 0, 5) + stats.cauchy.logpdf(tau, 0, 5)
    return prior + normal(theta, mu, tau) + normal(data["y"], theta, data["sigma"])


def kidiq(data, beta, sigma):
    school, iq = data["mom_hs"], data["mom_iq"]
    mean = beta[0] + beta[1] * school + beta[2] * iq + beta[3] * school * iq
    return stats.cauchy.logpdf(sigma, 0, 2.5) + normal(data["kid_score"], mean, sigma)


def mesquite(data, beta, sigma):
    volume = np.log(data["diam1"] * data["diam2"] * data["canopy_height"])
    area, shape = np.log(data["diam1"] * data["diam2"]), np.log(data["diam1"] / data["diam2"])
    mean = beta[0] + beta[1] * volume + beta[2] * area + beta[3] * shape
    mean = mean + beta[4] * np.log(data["total_height"]) + beta[5] * data["group"]
    return normal(np.log(data["weight"]), mean, sigma)


def nes(data, beta, sigma):
    mean = beta[0] + beta[1] * data["real_ideo"] + beta[2] * data["race_adj"]
    for level in (2, 3, 4):
        mean = mean + beta[level + 1] * (data["age_discrete"] == level)
    mean = mean + beta[6] * data["educ1"] + beta[7] * data["gender"] + beta[8] * data["income"]
    return normal(data["partyid7"], mean, sigma)


def blr(data, beta, sigma):
    return normal(beta, 0, 10) + normal(sigma, 0, 10) + normal(data["y"], data["X"] @ beta, sigma)


def ark(data, alpha, beta, sigma):
    log_p = normal(alpha, 0, 10) + normal(beta, 0, 10) + stats.cauchy.logpdf(sigma, 0, 2.5)
    y = data["y"]
    for t in range(5, len(y)):
        log_p += normal(y[t], alpha + sum(beta[k] * y[t - 1 - k] for k in range(5)), sigma)
    return log_p


def arma(data, mu, phi, theta, sigma):
    log_p = normal(mu, 0, 10) + normal(phi, 0, 2) + normal(theta, 0, 2) + stats.cauchy.logpdf(sigma, 0, 2.5)
    y = data["y"]
    error = [y[0] - (mu + phi * mu)]
    for t in range(1, len(y)):
        error.append(y[t] - (mu + phi * y[t - 1] + theta * error[-1]))
    return log_p + normal(np.array(error), 0, sigma)


def garch(data, mu, alpha0, alpha1, beta1):
    y, sigma = data["y"], [data["sigma1"]]
    for t in range(1, len(y)):
        sigma.append(np.sqrt(alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * sigma[-1] ** 2))
    return normal(y, mu, np.array(sigma))


def gp(data, rho, alpha, sigma):
    x, y = data["x"], data["y"]
    covariance = alpha**2 * np.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * np.eye(len(x))
    prior = stats.gamma.logpdf(rho, 25, scale=1 / 4) + normal(alpha, 0, 2) + normal(sigma, 0, 1)
    return prior + stats.multivariate_normal.logpdf(y, np.zeros(len(y)), covariance)


def mixture(data, mu, sigma, theta):
    density = theta * stats.norm.pdf(data["y"], mu[0], sigma[0])
    density = density + (1 - theta) * stats.norm.pdf(data["y"], mu[1], sigma[1])
    prior = normal(mu, 0, 2) + normal(sigma, 0, 2) + stats.beta.logpdf(theta, 5, 5)
    return prior + np.log(density).sum()


def diamonds(data, b, intercept, sigma):
    x = data["X"][:, 1:]
    prior = normal(b, 0, 1) + stats.t.logpdf(intercept, 3, 8, 10) + stats.t.logpdf(sigma, 3, 0, 10)
    return prior + normal(data["Y"], intercept + (x - x.mean(0)) @ b, sigma)


def lotka_volterra(data, theta, z_init, sigma):
    alpha, beta, gamma, delta = theta

    def slope(_, z):
        return (alpha - beta * z[1]) * z[0], (-gamma + delta * z[0]) * z[1]

    z = solve_ivp(slope, (0, 20), z_init, method="DOP853", t_eval=data["ts"], rtol=1e-11, atol=1e-11).y.T
    log_p = normal(theta, [1, 0.05, 1, 0.05], [0.5, 0.05, 0.5, 0.05])
    log_p += stats.lognorm.logpdf(sigma, 1, scale=np.exp(-1)).sum() + stats.lognorm.logpdf(z_init, 1, scale=10).sum()
    log_p += stats.lognorm.logpdf(data["y_init"], sigma, scale=z_init).sum()
    return log_p + stats.lognorm.logpdf(data["y"], sigma, scale=z).sum()


DENSITIES = {
    SCHOOLS: schools_noncentered,
    CENTERED: schools_centered,
    "kidiq-kidscore_interaction": kidiq,
    "mesquite-logmesquite_logvash": mesquite,
    "nes2000-nes": nes,
    "sblri-blr": blr,
    "arK-arK": ark,
    "arma-arma11": arma,
    "garch-garch11": garch,
    "gp_pois_regr-gp_regr": gp,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "diamonds-diamonds": diamonds,
    LYNX: lotka_volterra,
}


@functools.cache
def posterior(name: str) -> Posterior:
    return load_posterior(name, FOLDER)


def quantities(name: str, draws: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of draws (n, columns) by name: (n,) for a scalar and (n, k) for a vector, in their order."""
    columns: dict[str, list[torch.Tensor]] = {}
    scalars = set()
    for column, values in zip(posterior(name).names, draws.unbind(-1), strict=True):
        columns.setdefault(column.split("[")[0], []).append(values)
        if "[" not in column:
            scalars.add(column)
    return {key: value[0] if key in scalars else torch.stack(value, -1) for key, value in columns.items()}


def sites(name: str, draws: torch.Tensor) -> dict[str, torch.Tensor]:
    values = quantities(name, draws)
    if name == SCHOOLS:
        values["theta_trans"] = (values.pop("theta") - values["mu"][:, None]) / values["tau"][:, None]
    return values


def points(name: str) -> torch.Tensor:
    """20 of the 10,000 reference draws, two of each chain."""
    return posterior(name).reference[250::500]


def log_joint(name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    model, data = posterior(name).model, posterior(name).data
    return poutine.trace(poutine.condition(model, values)).get_trace(**data).log_prob_sum()


def one_by_one(name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = range(len(next(iter(values.values()))))
    return torch.stack([log_joint(name, {key: value[row] for key, value in values.items()}) for row in rows])


def test_filtered_solves_its_recursion_along_the_last_dimension():
    x, weight = torch.randn(3, 4, 37, dtype=torch.float64), torch.randn(3, 4, 1, dtype=torch.float64)
    h, terms = torch.zeros(3, 4, dtype=torch.float64), []
    for t in range(37):
        h = x[..., t] + weight[..., 0] * h
        terms.append(h)
    torch.testing.assert_close(filtered(x, weight), torch.stack(terms, -1))


def test_an_unknown_name_and_a_missing_folder_are_refused(monkeypatch):
    monkeypatch.delenv("PYROFLOWS_DATA", raising=False)
    with pytest.raises(ValueError, match=r"^expected one of eight_schools-.*; got nine_schools$"):
        load_posterior("nine_schools", "data")
    with pytest.raises(ValueError, match=r"in PYROFLOWS_DATA; got neither$"):
        load_posterior(SCHOOLS)


def test_every_model_has_a_density():
    assert DENSITIES.keys() == MODELS.keys()


@real_files[0]
@real_files[1]
@pytest.mark.parametrize("name", MODELS)
class TestRealFiles:
    def test_the_log_joint_is_that_of_the_stan_program_up_to_a_constant(self, name):
        folder = Path(FOLDER) / "posteriordb" / (SCHOOLS if name == CENTERED else name)
        values = json.loads((folder / "data.json").read_text())
        data = {key: np.array(value, dtype=float) for key, value in values.items()}
        draws = points(name)
        columns = [value.numpy() for value in quantities(name, draws).values()]
        expected = np.array([DENSITIES[name](data, *(value[row] for value in columns)) for row in range(len(draws))])
        found = one_by_one(name, sites(name, draws))
        assert found.dtype == torch.float64
        difference = found.numpy() - expected
        bound = 1e-4 if name == LYNX else 1e-8 * max(1, np.abs(expected).max())
        assert np.ptp(expected) > 1
        assert np.ptp(difference) < bound

    def test_many_draws_in_a_plate_give_what_each_gives_alone(self, name):
        values = sites(name, points(name))
        model, data = posterior(name).model, posterior(name).data
        single = {key: value[0] for key, value in values.items()}
        one = poutine.trace(poutine.condition(model, single)).get_trace(**data)
        one.compute_log_prob()
        depth = max(node["log_prob"].dim() for node in prune_subsample_sites(one).nodes.values() if "log_prob" in node)
        batched = {}
        for key, value in values.items():
            missing = depth - len(one.nodes[key]["fn"].batch_shape)
            batched[key] = value.reshape(len(value), *[1] * missing, *value.shape[1:]).requires_grad_()
        with pyro.plate("particles", 20, dim=-1 - depth):
            trace = prune_subsample_sites(poutine.trace(poutine.condition(model, batched)).get_trace(**data))
        trace.compute_log_prob()
        terms = [node["log_prob"].reshape(20, -1).sum(-1) for node in trace.nodes.values() if "log_prob" in node]
        total = torch.stack(terms).sum(0)
        torch.testing.assert_close(total, one_by_one(name, values))
        gradients = torch.autograd.grad(total.sum(), list(batched.values()))
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_its_sites_give_back_the_columns_of_the_reference_draws(self, name):
        reference = posterior(name).reference
        assert reference.shape == (10_000, len(posterior(name).names))
        torch.testing.assert_close(posterior(name).to_reference(sites(name, reference)), reference)
