"""Models for examples/gallery.py: small flows of two moons, a table and digits, and two posteriors; seconds each."""

from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from torch import Tensor

import pyroflows as pf
from pyroflows.data import TwoMoons, load_images, load_table
from pyroflows.diagnostics import Calibration

COMMON: dict[str, Any] = {"seed": 0, "progress": False}


def moons() -> tuple[dict[str, pf.Flow], dict[str, pf.FitResult], dict[str, tuple[float, float]]]:
    """Return flows of two moons, their fits, and mean log-densities of fresh points, also the truth's, with errors."""
    truth = TwoMoons(noise=0.1)
    x, fresh = truth.sample(4000, seed=0), truth.sample(4000, seed=1)
    flows = {"RealNVP": pf.realnvp(2, num_layers=4, hidden_features=(48,)), "spline flow": pf.nsf(2, num_layers=3)}
    fits = {
        name: pf.fit(flow, x, epochs=30, batch_size=256, learning_rate=5e-3, **COMMON) for name, flow in flows.items()
    }
    scores = {}
    for name, model in {"truth": truth, **flows}.items():
        log_prob = model.log_prob(fresh).detach()
        scores[name] = float(log_prob.mean()), float(log_prob.std()) / len(log_prob) ** 0.5
    return flows, fits, scores


def table(columns: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of a table, as many samples of a flow, both in the table's units, and the latent of held-out rows."""
    table = load_table("breast_cancer", validation=0.15, test=0.35)
    places = [table.columns.index(name) for name in columns]
    train, validation, test = (rows[:, places] for rows in (table.train, table.validation, table.test))
    flow = pf.nsf(len(columns), num_layers=2, hidden_features=(32,), num_bins=6, dropout=0.1)
    settings = {"epochs": 150, "batch_size": 64, "learning_rate": 2e-3, **COMMON}
    pf.fit(flow, train, validation=validation, **settings)
    every = torch.cat([train, validation, test])
    samples = flow.sample(len(every))
    data, samples = (rows * table.scale[places] + table.mean[places] for rows in (every, samples))
    return data, samples, flow.encode(test).detach()


def digits() -> tuple[Tensor, Tensor]:
    """Return samples of a Glow of digits, and interpolations between held-out digits, as levels from 0 to 16."""
    images, dequantizer = load_images("digits"), pf.UniformDequantizer((1, 8, 8), 17)
    flow = pf.glow((1, 8, 8), num_levels=2, num_steps=4, hidden_channels=48, alpha=0.01, dequantizer=dequantizer)
    settings = {"epochs": 25, "batch_size": 128, "learning_rate": 4e-3, **COMMON}
    pf.fit(flow, images.train, validation=images.validation, options=pf.FitOptions(ema_decay=0.99), **settings)
    samples = pf.sample_images(flow, 40, temperature=0.7, seed=0)
    return samples, pf.interpolate(flow, images.test[:5], images.test[5:10], 8)


def funnel() -> tuple[dict[str, pf.Posterior], dict[str, Tensor]]:
    """Return two posteriors of a funnel, by a flow and by a Gaussian, and exact draws."""

    def model() -> None:
        log_scale = pyro.sample("log_scale", Normal(0.0, 1.0))
        pyro.sample("x", Normal(0.0, log_scale.exp()).expand([2]).to_event(1))

    def gaussian(features: int, **_: int) -> pf.Flow:
        return pf.Flow(pf.StandardNormal(features), pf.TriangularAffine(features))

    fits = {
        "flow": pf.fit_posterior(model, max_steps=1500, **COMMON),
        "Gaussian": pf.fit_posterior(model, flow=gaussian, max_steps=500, **COMMON),
    }
    log_scale = torch.randn(10_000)
    return fits, {"log_scale": log_scale, "x": log_scale.exp()[:, None] * torch.randn(10_000, 2)}


def simulator() -> Calibration:
    """Return the calibration of an amortised posterior of a normal's mean and log-deviation, given eight numbers."""

    def model() -> None:
        mu, log_sigma = pyro.sample("mu", Normal(0.0, 1.0)), pyro.sample("log_sigma", Normal(0.0, 0.5))
        pyro.sample("y", Normal(mu[..., None], log_sigma.exp()[..., None]).expand([*mu.shape, 8]).to_event(1))

    posterior = pf.fit_amortized(model, "y", num_simulations=20_000, epochs=10, **COMMON)
    return posterior.calibrate(500, levels=[i / 20 for i in range(1, 20)], seed=1, progress=False)
