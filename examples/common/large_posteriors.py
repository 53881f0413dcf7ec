"""Four posteriors of 60 to 200 latents, with simulated data: a network, a horseshoe, random slopes, item responses."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["MODELS", "simulate"]


def network(x: Tensor, y: Tensor) -> None:
    """A Bayesian network of one hidden layer of 20 tanh units, 62 latents; symmetric in its units."""
    zero, one = y.new_zeros(()), y.new_ones(())
    first = pyro.sample("first", dist.Normal(zero, one).expand([2, 20]).to_event(2))  # weights and offsets
    second = pyro.sample("second", dist.Normal(zero, one).expand([20]).to_event(1))
    offset = pyro.sample("offset", dist.Normal(zero, one))
    sigma = pyro.sample("sigma", dist.HalfNormal(one))
    hidden = torch.tanh(2 * (x[:, None] * first[..., None, 0, :] + first[..., None, 1, :]))
    mean = (hidden * second[..., None, :]).sum(-1) / 20**0.5 + offset[..., None]
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def horseshoe(x: Tensor, y: Tensor) -> None:
    """A regression of 50 coefficients under the regularised horseshoe, non-centred; 103 latents."""
    columns = x.shape[1]
    zero, one = y.new_zeros(()), y.new_ones(())
    sigma = pyro.sample("sigma", dist.HalfNormal(2 * one))
    tau = pyro.sample("tau", dist.HalfCauchy(0.1 * one))
    slab = pyro.sample("slab", dist.InverseGamma(2 * one, 8 * one))  # the square of the slab's scale
    local = pyro.sample("local", dist.HalfCauchy(one).expand([columns]).to_event(1))
    z = pyro.sample("z", dist.Normal(zero, one).expand([columns]).to_event(1))
    tau, slab = tau[..., None], slab[..., None]
    beta = pyro.deterministic("beta", z * tau * local * (slab / (slab + (tau * local).square())).sqrt(), event_dim=1)
    pyro.sample("y", dist.Normal(beta @ x.mT, sigma[..., None]).to_event(1), obs=y)


def slopes(x: Tensor, group: Tensor, y: Tensor) -> None:
    """A regression with an intercept and two slopes for each of 40 groups, correlated by an LKJ prior; 130 latents."""
    zero, one = y.new_zeros(()), y.new_ones(())
    mean = pyro.sample("mean", dist.Normal(zero, 2 * one).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(one).expand([3]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2 * one))
    sigma = pyro.sample("sigma", dist.HalfNormal(one))
    z = pyro.sample("z", dist.Normal(zero, one).expand([40, 3]).to_event(2))
    beta = mean[..., None, :] + z @ (scale[..., None] * factor).mT
    predictor = (beta.index_select(-2, group) * x).sum(-1)
    pyro.sample("y", dist.Normal(predictor, sigma[..., None]).to_event(1), obs=y)


def responses(y: Tensor) -> None:
    """A two-parameter model of the answers of 150 persons to 20 items; 193 latents."""
    zero, one = y.new_zeros(()), y.new_ones(())
    centre = pyro.sample("centre", dist.Normal(zero, one))
    spread = pyro.sample("spread", dist.HalfNormal(one))
    spread_slope = pyro.sample("spread_slope", dist.HalfNormal(one))
    persons, items = pyro.plate("persons", y.shape[0], dim=-2), pyro.plate("items", y.shape[1], dim=-1)
    with persons:
        ability = pyro.sample("ability", dist.Normal(zero, one))
    with items:
        z = pyro.sample("z", dist.Normal(zero, one))
        slope = pyro.sample("slope", dist.LogNormal(zero, spread_slope))
    with persons, items:
        logits = slope * (ability - centre - spread * z)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def simulate(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Simulate the data of a model, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if name == "network":
        x = torch.linspace(-2, 2, 60, dtype=torch.float64)
        return {"x": x, "y": torch.sin(2 * x) + 0.2 * normal(60)}
    if name == "horseshoe":
        x, beta = normal(100, 50), torch.zeros(50, dtype=torch.float64)
        beta[:5] = torch.tensor([2.0, -1.5, 1.0, 0.7, -0.5])
        return {"x": x, "y": x @ beta + normal(100)}
    if name == "slopes":
        factor = torch.tensor([[1.0, 0, 0], [0.35, 0.61, 0], [-0.15, 0.1, 0.36]], dtype=torch.float64)
        beta = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64) + normal(40, 3) @ factor.mT
        group = torch.arange(40).repeat_interleave(12)
        x = torch.cat([torch.ones(480, 1, dtype=torch.float64), normal(480, 2)], 1)
        return {"x": x, "group": group, "y": (beta[group] * x).sum(-1) + 0.5 * normal(480)}
    ability, difficulty, slope = normal(150), 0.3 + normal(20), (0.4 * normal(20)).exp()
    logits = slope * (ability[:, None] - difficulty)
    return {"y": (torch.rand(150, 20, generator=generator, dtype=torch.float64) < logits.sigmoid()).double()}


MODELS: dict[str, Callable[..., None]] = {
    "network": network,
    "horseshoe": horseshoe,
    "slopes": slopes,
    "responses": responses,
}
