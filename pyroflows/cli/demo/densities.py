"""Densities that the demo compares: flows and simpler models."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import mixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from pyroflows.cli.demo.part import echo
from pyroflows.flow import Flow
from pyroflows.training import FitResult, fit

__all__ = ["Density", "as_numbers", "fit_flows", "log_likelihoods", "mean_and_error", "simple_models"]


@dataclass(frozen=True)
class Density:
    """A fitted density.

    Args:
        name: its name in tables and figures.
        log_prob: returns the log-density of rows, in nats.
        sample: draws a number of rows.
        note: options chosen by validation, or a description of the flow.
        seconds: of the fit, including the choice of options.
        result: of a flow's fit.
    """

    name: str
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    note: str
    seconds: float
    result: FitResult | None = None


def simple_models(
    train: Tensor,
    validation: Tensor,
    components: Sequence[int],
    ridges: Sequence[float],
    covariances: Sequence[str] = ("full",),
) -> list[Density]:
    """Fit a Gaussian, a Gaussian mixture and a kernel density, each with the options best on validation rows."""
    x, held_out = train.double().numpy(), validation.double().numpy()

    def choose(name: str, candidates: Mapping[str, Any]) -> Density:
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a mixture that has not converged is a candidate too
            fitted = {note: estimator.fit(x) for note, estimator in candidates.items()}
            note = max(fitted, key=lambda note: float(fitted[note].score_samples(held_out).mean()))
        best = fitted[note]
        echo(f"  {name}: {note}, {time.perf_counter() - began:.1f} s")

        def sample(n: int) -> Tensor:
            rows = best.sample(n, random_state=0) if isinstance(best, KernelDensity) else best.sample(n)[0]
            return torch.from_numpy(rows).float()

        def log_prob(rows: Tensor) -> Tensor:
            return torch.from_numpy(best.score_samples(rows.double().numpy()))

        return Density(name, log_prob, sample, note, time.perf_counter() - began)

    mixtures = {
        f"{number} components, {covariance} covariance, ridge {ridge:g}": mixture.GaussianMixture(
            number, covariance_type=covariance, reg_covar=ridge, random_state=0
        )
        for number in components
        for covariance in covariances
        for ridge in ridges
    }
    # A relative error of 1e-3 in a density is 0.001 nats.
    bandwidths = np.geomspace(0.01, 0.08, 7) if x.shape[1] < 5 else np.geomspace(0.1, 2.0, 13)
    kernels = {f"bandwidth {width:.3g}": KernelDensity(bandwidth=width, rtol=1e-3) for width in bandwidths}
    return [
        choose("Gaussian", {"full covariance": mixture.GaussianMixture(1, random_state=0)}),
        choose("Gaussian mixture", mixtures),
        choose("kernel density", kernels),
    ]


def fit_flows(
    flows: Mapping[str, Flow],
    notes: str,
    train: Tensor,
    validation: Tensor,
    seed: int,
    until: float,
    options: Mapping[str, Any],
) -> list[Density]:
    """Fit flows one after another, each within its share of the time left."""
    models: list[Density] = []
    for name, flow in flows.items():
        seconds = max(2.0, (until - time.perf_counter()) / (len(flows) - len(models)))
        echo(f"  {name}: fitting, at most {seconds:.0f} s ...")
        result = fit(
            flow,
            train,
            validation=validation,
            seed=seed,
            max_seconds=seconds,
            progress=False,
            device="cpu",
            **options,
        )
        echo(f"  {name}: {result.steps} steps, {result.seconds:.1f} s, {result.stopped}")
        size = sum(parameter.numel() for parameter in flow.parameters())
        note = f"{size:,} parameters{notes}, {result.steps} steps"
        models.append(
            Density(name, flow.log_prob, lambda n, flow=flow: flow.sample((n,)), note, result.seconds, result)  # type: ignore[misc]
        )
    return models


@torch.no_grad()
def log_likelihoods(model: Density, rows: Tensor) -> Tensor:
    """Return the log-density of each row under a model, without gradients."""
    return model.log_prob(rows).double()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values, and its standard error."""
    return float(values.double().mean()), float(values.double().std() / len(values) ** 0.5)


def as_numbers(model: Density, mean: float, error: float) -> dict[str, Any]:
    """Return what ``report.json`` holds of a model and its test log-likelihood."""
    numbers: dict[str, Any] = {
        "log_likelihood": mean,
        "standard_error": error,
        "seconds": round(model.seconds, 2),
        "note": model.note,
    }
    if model.result is not None:
        numbers |= {"steps": model.result.steps, "stopped": model.result.stopped}
    return numbers
