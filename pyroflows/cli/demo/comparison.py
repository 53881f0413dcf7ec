"""What the parts of the demo share: fitted densities, and the table that compares them."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn import mixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from pyroflows.cli.model import number_of_parameters
from pyroflows.flow import Flow
from pyroflows.training import FitResult, fit

__all__ = ["Density", "Part", "compare", "echo", "fit_flows", "log_likelihoods", "simple_models", "sizes"]


@dataclass(frozen=True)
class Part:
    """The results of one part of the demo, for ``report.md`` and, as numbers, for ``report.json``."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Mapping[str, Any]
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Density:
    """A fitted density: its log-density of rows, in nats, its samples, and how it was fitted."""

    name: str
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    note: str  # options chosen by validation, or a description of the flow
    seconds: float  # including the choice of options
    result: FitResult | None = None


def simple_models(train: Tensor, validation: Tensor, mixtures: Iterable[tuple[int, str, float]]) -> list[Density]:
    """Fit a Gaussian, a Gaussian mixture and a kernel density, each with the options best on validation rows.

    The mixtures to choose from have numbers of components, kinds of covariance, and ridges.
    """
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

    gaussians = {
        f"{number} components, {covariance} covariance, ridge {ridge:g}": mixture.GaussianMixture(
            number, covariance_type=covariance, reg_covar=ridge, random_state=0
        )
        for number, covariance, ridge in mixtures
    }
    # A relative error of 1e-3 in a density is 0.001 nats.
    bandwidths = np.geomspace(0.01, 0.08, 7) if x.shape[1] < 5 else np.geomspace(0.1, 2.0, 13)
    kernels = {f"bandwidth {width:.3g}": KernelDensity(bandwidth=width, rtol=1e-3) for width in bandwidths}
    return [
        choose("Gaussian", {"full covariance": mixture.GaussianMixture(1, random_state=0)}),
        choose("Gaussian mixture", gaussians),
        choose("kernel density", kernels),
    ]


def fit_flows(
    flows: Mapping[str, Flow], notes: str, train: Tensor, validation: Tensor, until: float, **options: Any
) -> list[Density]:
    """Fit flows one after another, each within its share of the time left."""
    models: list[Density] = []
    for name, flow in flows.items():
        seconds = max(2.0, (until - time.perf_counter()) / (len(flows) - len(models)))
        echo(f"  {name}: fitting, at most {seconds:.0f} s ...")
        result = fit(flow, train, validation=validation, max_seconds=seconds, progress=False, device="cpu", **options)
        echo(f"  {name}: {result.steps} steps, {result.seconds:.1f} s, {result.stopped}")
        note = f"{number_of_parameters(flow):,} parameters{notes}, {result.steps} steps"
        models.append(
            Density(name, flow.log_prob, lambda n, flow=flow: flow.sample((n,)), note, result.seconds, result)  # type: ignore[misc]
        )
    return models


@torch.no_grad()
def log_likelihoods(models: Sequence[Density], rows: Tensor) -> dict[str, Tensor]:
    """Return the log-density of each row under each model, without gradients."""
    return {model.name: model.log_prob(rows).double() for model in models}


def compare(
    models: Sequence[Density],
    scores: Mapping[str, Tensor],
    gap: Callable[[Tensor], Tensor],
    names: tuple[str, str],
    digits: int,
    sign: str = "",
) -> tuple[list[Sequence[str]], dict[str, Any]]:
    """Return the rows of a table, and numbers, of models' scores of test rows and of their gaps from a reference.

    ``names`` are those of scores and gaps in ``report.json``; ``sign`` is "+" to write the sign of every gap.
    """
    rows: list[Sequence[str]] = []
    numbers = {}
    for model in models:
        values = scores[model.name]
        (mean, error), (difference, difference_error) = map(_mean_and_error, (values, gap(values)))
        score = f"{mean:.{digits}f} ± {error:.{digits}f}"
        further = f"{difference:{sign}.{digits}f} ± {difference_error:.{digits}f}" if difference_error else "-"
        rows.append((model.name, score, further, f"{model.seconds:.0f}", model.note))
        compared = {names[1]: difference, f"{names[1]}_standard_error": difference_error}
        cost: dict[str, Any] = {"seconds": round(model.seconds, 2), "note": model.note}
        if model.result is not None:
            cost |= {"steps": model.result.steps, "stopped": model.result.stopped}
        numbers[model.name] = {names[0]: mean, "standard_error": error, **compared, **cost}
    return rows, numbers


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.double().mean()), float(values.double().std() / len(values) ** 0.5)


def sizes(data: Any) -> dict[str, int]:
    """Return the numbers of rows of a data set's splits."""
    return {split: len(getattr(data, split)) for split in ("train", "validation", "test")}


def echo(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
