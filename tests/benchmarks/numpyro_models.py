"""Thirteen posteriors of posteriordb and four of 62 to 193 latents in NumPyro, and NUTS of one in its own process.

python tests/benchmarks/numpyro_models.py NAME DATA.npz DRAWS.npz SEED sequential 1000
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, init_to_median

numpyro.enable_x64()


def flat(support, shape=()):
    """Return an improper prior over a support, for values of a shape."""
    return dist.ImproperUniform(support, (), shape)


def eight_schools_noncentered(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    theta = numpyro.sample("theta_trans", dist.Normal(0, 1).expand([len(y)]))
    numpyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


def eight_schools_centered(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    theta = numpyro.sample("theta", dist.Normal(mu, tau).expand([len(y)]))
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_interaction(x, y):
    beta = numpyro.sample("beta", flat(constraints.real_vector, (x.shape[1],)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def flat_regression(x, y):
    beta = numpyro.sample("beta", flat(constraints.real_vector, (x.shape[1],)))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def blr(x, y):
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([x.shape[1]]))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def ark(lagged, y):
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([lagged.shape[1]]))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y)


def arma11(y):
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    phi = numpyro.sample("phi", dist.Normal(0, 2))
    theta = numpyro.sample("theta", dist.Normal(0, 2))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    before = jnp.concatenate([mu[None], y[:-1]])

    def step(error, values):
        new = values[0] - mu - phi * values[1] - theta * error
        return new, new

    _, errors = lax.scan(step, jnp.zeros(()), (y, before))
    numpyro.sample("y", dist.Normal(y - errors, sigma), obs=y)


def garch11(y, sigma1):
    mu = numpyro.sample("mu", flat(constraints.real))
    alpha0 = numpyro.sample("alpha0", flat(constraints.positive))
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0, 1))
    # NumPyro fixes a support once; a share of the range has one of its own, and the factor is the flat density's.
    share = numpyro.sample("share", dist.Uniform(0, 1))
    numpyro.factor("flat", jnp.log1p(-alpha1))
    beta1 = numpyro.deterministic("beta1", (1 - alpha1) * share)

    def step(variance, before):
        new = alpha0 + alpha1 * (before - mu) ** 2 + beta1 * variance
        return new, new

    _, variances = lax.scan(step, sigma1**2, y[:-1])
    variances = jnp.concatenate([sigma1[None] ** 2, variances])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variances)), obs=y)


def gp_regr(x, y):
    rho = numpyro.sample("rho", dist.Gamma(25, 4))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * jnp.exp(-(distance**2) / 2) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def low_dim_gauss_mix(y):
    mu = numpyro.sample("mu", flat(constraints.ordered_vector, (2,)))
    numpyro.factor("mu_prior", dist.Normal(0, 2).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2).expand([2]))
    theta = numpyro.sample("theta", dist.Beta(5, 5))
    low, high = (dist.Normal(mu[k], sigma[k]).log_prob(y) for k in (0, 1))
    numpyro.factor("y", jnp.logaddexp(jnp.log(theta) + low, jnp.log1p(-theta) + high).sum())


def diamonds(x, y):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([x.shape[1]]))
    intercept = numpyro.sample("Intercept", dist.StudentT(3, 8, 10))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3, 0, 10)))
    numpyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def lotka_volterra(y_init, y, steps=12):
    theta = numpyro.sample("theta", flat(constraints.independent(constraints.positive, 1), (4,)))
    prior = dist.Normal(jnp.array([1, 0.05, 1, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]))
    numpyro.factor("theta_prior", prior.log_prob(theta).sum())
    z_init = numpyro.sample("z_init", dist.LogNormal(np.log(10.0), 1).expand([2]))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1, 1).expand([2]))
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=y_init)
    alpha, beta, gamma, delta = theta
    rate, weight, h = jnp.stack([alpha, -gamma]), jnp.stack([-beta, delta]), 1 / steps

    def slope(z):
        return rate + weight * jnp.exp(z[::-1])

    def runge_kutta(z, _):
        k1 = slope(z)
        k2 = slope(z + h / 2 * k1)
        k3 = slope(z + h / 2 * k2)
        k4 = slope(z + h * k3)
        return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    def year(z, _):
        z = lax.scan(runge_kutta, z, None, length=steps)[0]
        return z, z

    _, years = lax.scan(year, jnp.log(z_init), None, length=len(y))
    numpyro.sample("y", dist.LogNormal(years, sigma), obs=y)


def network(x, y):
    first = numpyro.sample("first", dist.Normal(0, 1).expand([2, 20]))
    second = numpyro.sample("second", dist.Normal(0, 1).expand([20]))
    offset = numpyro.sample("offset", dist.Normal(0, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    hidden = jnp.tanh(2 * (x[:, None] * first[0] + first[1]))
    numpyro.sample("y", dist.Normal(hidden @ second / 20**0.5 + offset, sigma), obs=y)


def horseshoe(x, y):
    columns = x.shape[1]
    sigma = numpyro.sample("sigma", dist.HalfNormal(2))
    tau = numpyro.sample("tau", dist.HalfCauchy(0.1))
    slab = numpyro.sample("slab", dist.InverseGamma(2, 8))
    local = numpyro.sample("local", dist.HalfCauchy(1).expand([columns]))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([columns]))
    beta = numpyro.deterministic("beta", z * tau * local * jnp.sqrt(slab / (slab + (tau * local) ** 2)))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def slopes(x, group, y):
    mean = numpyro.sample("mean", dist.Normal(0, 2).expand([3]))
    scale = numpyro.sample("scale", dist.HalfNormal(1).expand([3]))
    factor = numpyro.sample("factor", dist.LKJCholesky(3, 2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([40, 3]))
    beta = mean + z @ (scale[:, None] * factor).T
    numpyro.sample("y", dist.Normal((beta[group] * x).sum(-1), sigma), obs=y)


def responses(y):
    centre = numpyro.sample("centre", dist.Normal(0, 1))
    spread = numpyro.sample("spread", dist.HalfNormal(1))
    spread_slope = numpyro.sample("spread_slope", dist.HalfNormal(1))
    ability = numpyro.sample("ability", dist.Normal(0, 1).expand([y.shape[0], 1]))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([y.shape[1]]))
    slope = numpyro.sample("slope", dist.LogNormal(0, spread_slope).expand([y.shape[1]]))
    numpyro.sample("y", dist.Bernoulli(logits=slope * (ability - centre - spread * z)), obs=y)


MODELS = {
    "network": network,
    "horseshoe": horseshoe,
    "slopes": slopes,
    "responses": responses,
    "eight_schools-eight_schools_noncentered": eight_schools_noncentered,
    "eight_schools-eight_schools_centered": eight_schools_centered,
    "kidiq-kidscore_interaction": kidscore_interaction,
    "mesquite-logmesquite_logvash": flat_regression,
    "nes2000-nes": flat_regression,
    "sblri-blr": blr,
    "arK-arK": ark,
    "arma-arma11": arma11,
    "garch-garch11": garch11,
    "gp_pois_regr-gp_regr": gp_regr,
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
    "diamonds-diamonds": diamonds,
    "hudson_lynx_hare-lotka_volterra": lotka_volterra,
}


def main() -> None:
    name, data, output, seed, method, number = sys.argv[1:7]
    with np.load(data) as arrays:
        values = {key: jnp.asarray(arrays[key]) for key in arrays}
    began = time.process_time()
    options = {"num_warmup": 1000, "num_samples": int(number), "num_chains": 4, "progress_bar": False}
    mcmc = MCMC(NUTS(MODELS[name], init_strategy=init_to_median), chain_method=method, **options)
    mcmc.run(jax.random.PRNGKey(int(seed)), **values)
    draws = {key: np.asarray(value) for key, value in mcmc.get_samples().items()}
    seconds = time.process_time() - began
    np.savez(output, **draws, seconds=seconds)


if __name__ == "__main__":
    main()
