"""The best density of a table: the best simple one, and spline couplings on it where these gain on held-out rows."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_varying
from pyroflows.contexts import seeded
from pyroflows.dequantizers import ColumnDequantizer
from pyroflows.flow import Flow
from pyroflows.layers import Standardize
from pyroflows.tables.couplings import coupling_flow, prior_of
from pyroflows.tables.marginals import to_latent
from pyroflows.tables.rows import dequantizer_of, merge_rows
from pyroflows.tables.start import Candidate, Start, StartSearch, fit_start, folds_of
from pyroflows.training import FitOptions, FitResult, fit, negative_log_likelihood

_logger = logging.getLogger("pyroflows")

__all__ = ["EFFORTS", "Selection", "fit_best"]

_THREE_FITS, _FEW_ROWS = 500, 1500  # up to which the flow is judged by three folds or by one, and trained on all rows
_FEWEST_ROWS = 10  # from which on there is a flow
_MANY_ROWS = 2500  # from which on it is larger
_MOST_ROWS = 50_000  # of the last fit of a start
_SHARE, _MOST_HELD_OUT = 0.1, 10_000  # of many rows
_CHUNK = 4096  # rows scored at once


@dataclass(frozen=True)
class Effort:
    """What may be spent: multiplications in the search of a start, and steps of the flow of few and of many rows."""

    work: float
    steps: tuple[int, int]
    patience: int  # epochs

    def epochs(self, rows: int) -> int:
        """Return the largest number of epochs of the flow; a handful of rows have none."""
        return self.steps[rows >= _MANY_ROWS] // _steps_per_epoch(rows) if rows >= _FEWEST_ROWS else 0


EFFORTS = {
    "quick": Effort(1.5e9, (0, 0), 0),
    "default": Effort(6e9, (600, 4000), 6),
    "best": Effort(1e11, (10_000, 20_000), 20),
}


@dataclass(frozen=True)
class Selection:
    """What was tried for a table, and what was taken.

    Args:
        tried: a dictionary for each simple density: "coordinates", "components", "covariance", and "score", its mean
            held-out log-density in nats a row.
        start: those that were averaged, in words.
        start_score: the held-out score of their average.
        gain: of the spline couplings on it, in nats a held-out row.
        gain_error: its standard error.
        is_trained: whether the couplings were taken, since the gain is above its error.
    """

    tried: list[dict[str, Any]]
    start: str
    start_score: float
    gain: float = 0.0
    gain_error: float = 0.0
    is_trained: bool = False

    def __repr__(self) -> str:
        found = f"{len(self.tried)} simple densities tried; {self.start}: {self.start_score:.3f} nats a held-out row"
        flow = (
            f"couplings gain {self.gain:.3f} ± {self.gain_error:.3f} and were {'' if self.is_trained else 'not '}taken"
        )
        return f"Selection({found}; {flow if self.gain else 'no couplings tried'})"


def fit_best(
    x: np.ndarray,
    weights: np.ndarray,
    validation: float | tuple[np.ndarray, Any, np.ndarray | None] = 0.1,
    *,
    columns: Sequence[str] | None = None,
    integer_columns: Sequence[int] = (),
    effort: str = "default",
    flow_options: Mapping[str, Any] | None = None,
    max_seconds: float | None = None,
    seed: int | None = None,
    on_start: Callable[[Flow], Any] | None = None,
    on_step: Callable[[Tensor], Any] | None = None,
    options: FitOptions | None = None,
    **fit_arguments: Any,
) -> tuple[Flow, FitResult, Selection]:
    """Fit the best simple density of rows, and a flow that begins as it where that gains on held-out rows.

    Up to 500 rows the gain is found by three folds, up to 1,500 by one of them, and the flow is then trained on all
    rows; of more rows a share is held out.

    Args:
        x: rows, in double precision; equal ones become one with the sum of their weights.
        weights: of the rows.
        validation: share of the rows to hold out, if they are many; or rows and their weights to judge the flow by.
        columns: names of the columns, for error messages.
        integer_columns: positions of the columns of whole numbers, for which the flow gets a
            :class:`ColumnDequantizer`.
        effort: "quick" for the simple density alone, "default", or "best".
        flow_options: ``num_layers`` and ``hidden_features`` of the couplings.
        max_seconds: limit of the time of all training, without that of the simple densities.
        seed: of weights, shuffles and dequantization.
        on_start: called with the flow of the simple density, before couplings are trained.
        on_step: called with the loss of each training step.
        options, fit_arguments: as for :func:`fit`.

    Returns:
        The flow, in double precision on the CPU, the result, with losses in nats in the units of the columns, and what
        was tried.

    Shapes:
        x: ``(rows, columns)``; weights: ``(rows,)``.

    Raises:
        TypeError: another option of the flow.
        ValueError: a constant column, or fewer than two different rows.

    References:
        Regularized Discriminant Analysis, Friedman, 1989 (covariances that shrink towards a shared one);
        Stacked Density Estimation, Smyth and Wolpert, 1997 (averages by held-out likelihood);
        Neural Spline Flows, Durkan et al., 2019 (arXiv:1906.04032).

    Example:
        >>> x = np.random.default_rng(0).exponential(size=(200, 2))
        >>> flow, _, selection = fit_best(x, np.ones(200), effort="quick")
        >>> flow.event_shape, selection.is_trained
        (torch.Size([2]), False)
    """
    rows = _prepare(x, weights, validation, columns, integer_columns, seed)
    x, weights, budget = rows.x, rows.weights, EFFORTS[effort]
    sizes, epochs = _sizes(len(x), flow_options or {}), budget.epochs(len(x))
    plan = f"then spline couplings, {epochs} epochs at most" if epochs else "no couplings"
    _logger.info("%d rows of %d columns: simple densities, %s", *x.shape, plan)
    search = StartSearch(x, weights, budget.work, rows.held_out).run()
    chosen, shares, score = search.best_average()
    tried = sorted(search.tried.values(), key=lambda candidate: -candidate.score)
    found: dict[str, Any] = {
        "tried": [_as_row(candidate, rows.unit) for candidate in tried],
        "start": _in_words(chosen, shares),
        "start_score": score - rows.unit,
    }

    def start_of(places: np.ndarray) -> Start:
        places = places[:_MOST_ROWS]
        return fit_start(x[places], weights[places] / weights[places].mean(), chosen, shares)

    everything = np.random.default_rng(0).permutation(len(x))
    flow, result = _flow_on(start_of(everything)), FitResult({"train": [], "validation": []}, best_loss=-score)
    if on_start is not None:
        on_start(rows.in_units(flow))
    if epochs:
        note = None if on_step is None else lambda loss: on_step(loss + rows.unit)
        is_few = rows.held_out is None and len(x) <= _FEW_ROWS
        folds = folds_of(weights, few=_FEW_ROWS, share=rows.share or _SHARE)
        folds = folds[:1] if len(x) > _THREE_FITS else folds
        splits = [(fitted, (x[others], divided)) for fitted, others, divided in folds]
        if rows.held_out is not None:
            splits = [(everything, rows.held_out)]
        limit = None if max_seconds is None else max_seconds / (len(splits) + is_few)
        training = _Training(budget, sizes, seed, note, options, {"max_seconds": limit, **fit_arguments})
        fits = [training.judged(start_of(fitted), x[fitted], weights[fitted], *others) for fitted, others in splits]
        epoch, gain, error = _gain(fits)
        found |= {"gain": gain, "gain_error": error, "is_trained": gain > error}
        if gain > error:
            flow, result = training.on_all(start_of(everything), x, weights, epoch) if is_few else fits[0][:2]
        if any(judged.result.stopped.startswith("max_seconds") for judged in fits):
            result.stopped = f"max_seconds={max_seconds:.4g} reached"
    selection = Selection(**found)
    _logger.info("%r", selection)
    result.history |= {name: [loss + rows.unit for loss in result.history[name]] for name in ("train", "validation")}
    result.best_loss += rows.unit
    return rows.in_units(flow), result, selection


@dataclass(frozen=True)
class _Rows:
    """Rows of columns of variance 1, no two of them equal, with weights of mean 1, and those to judge a flow by."""

    x: np.ndarray
    weights: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray] | None
    share: float
    outer: Standardize
    dequantizer: ColumnDequantizer | None

    @property
    def unit(self) -> float:
        """The nats by which densities are larger than in the units of the columns."""
        return float(self.outer.std.log().sum())

    def in_units(self, flow: Flow) -> Flow:
        """Return the flow in the units of the columns, in double precision."""
        return Flow(flow.prior, [*flow.layers, self.outer], dequantizer=self.dequantizer).double().eval()


def _prepare(
    x: np.ndarray,
    weights: np.ndarray,
    validation: float | tuple[np.ndarray, Any, np.ndarray | None],
    columns: Sequence[str] | None,
    integer_columns: Sequence[int],
    seed: int | None,
) -> _Rows:
    if len(x) < 2:
        raise ValueError(f"expected at least 2 rows of a weight above zero; got {len(x)}")
    check_varying(x, columns)
    dequantizer = dequantizer_of(torch.from_numpy(x), integer_columns) if len(integer_columns) else None
    if dequantizer is not None:
        with seeded(seed):
            x = dequantizer(torch.from_numpy(x))[0].numpy()
    x, _, weights = merge_rows(x, None, weights)
    outer = Standardize.from_data(torch.from_numpy(x))
    x, weights = to_latent([outer], x)[0], weights / weights.mean()
    if not isinstance(validation, tuple):
        return _Rows(x, weights, None, float(validation), outer, dequantizer)
    others, _, their_weights = validation
    held_out = to_latent([outer], others)[0], np.ones(len(others)) if their_weights is None else their_weights
    return _Rows(x, weights, held_out, 0.0, outer, dequantizer)


class _Judged(NamedTuple):
    """A trained flow, and its gains over its start on held-out rows, with the weights of these."""

    flow: Flow
    result: FitResult
    start_loss: float
    gains: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class _Training:
    """Trains spline couplings on a start."""

    effort: Effort
    sizes: dict[str, Any]
    seed: int | None
    on_step: Callable[[Tensor], Any] | None
    options: FitOptions | None
    arguments: Mapping[str, Any]

    def judged(
        self, start: Start, x: np.ndarray, weights: np.ndarray, others: np.ndarray, their_weights: np.ndarray
    ) -> _Judged:
        """Train on rows, and keep the best weights by others."""
        others, their_weights = others[:_MOST_HELD_OUT], their_weights[:_MOST_HELD_OUT]
        z, log_det = to_latent(start.layers, others)
        before, shift = start.mixture.log_prob(z), float(np.average(log_det, weights=their_weights))
        held_out = (_single(z), None, _single(their_weights))
        flow, result = self._run(start, x, weights, validation=held_out)
        result.history["validation"] = [loss - shift for loss in result.history["validation"]]
        result.best_loss -= shift
        with torch.no_grad():
            parts = torch.from_numpy(others).split(_CHUNK)
            gains = np.concatenate([flow.log_prob(part).numpy() for part in parts]) - log_det - before
        return _Judged(flow, result, -float(np.average(before, weights=their_weights)) - shift, gains, their_weights)

    def on_all(self, start: Start, x: np.ndarray, weights: np.ndarray, epoch: int) -> tuple[Flow, FitResult]:
        """Train on all rows for as many epochs as were best on held-out ones."""
        return self._run(start, x, weights, validation=None, epochs=epoch + 1)

    def _run(self, start: Start, x: np.ndarray, weights: np.ndarray, **more: Any) -> tuple[Flow, FitResult]:
        z, log_det = to_latent(start.layers, x)
        with seeded(self.seed):
            inner = coupling_flow(start.mixture, z, **self.sizes)
        usual: dict[str, Any] = {
            "schedule": "constant",
            "warmup": 20,
            "ema_decay": 0.95,
            "steps_per_epoch": _steps_per_epoch(len(x)),
            "judge_start": True,
        }
        options = FitOptions(**usual) if self.options is None else self.options
        arguments: dict[str, Any] = {
            "epochs": self.effort.epochs(len(x)),
            "learning_rate": 3e-3,
            "batch_size": 256,
            "patience": self.effort.patience,
            "progress": False,
        }
        arguments |= {**self.arguments, **more}
        arguments["batch_size"] = min(arguments["batch_size"], len(x))
        shift = float(np.average(log_det, weights=weights))

        def objective(flow: Any, *batch: Tensor) -> Tensor:
            loss = negative_log_likelihood(flow, *batch)
            if self.on_step is not None and flow.training:
                self.on_step(loss.detach() - shift)
            return loss

        arguments |= {"weights": _single(weights), "options": options, "seed": self.seed, "objective": objective}
        result = fit(inner, _single(z), **arguments)
        result.history["train"] = [loss - shift for loss in result.history["train"]]
        if more["validation"] is None:
            result.best_loss -= shift
        return _flow_on(start, inner), result


def _gain(fits: Sequence[_Judged]) -> tuple[int, float, float]:
    """Return the epoch with the best mean loss over all splits, its gain there over the starts, and the error of it.

    A fit that ended earlier counts with its last loss.
    """
    curves = [fit.result.history["validation"] for fit in fits]
    longest = max(map(len, curves))
    table = np.array([curve + curve[-1:] * (longest - len(curve)) for curve in curves])
    mean = np.nan_to_num(table, nan=np.inf).mean(0)
    epoch = int(mean.argmin())
    weights = np.concatenate([fit.weights for fit in fits])
    gains = np.concatenate([fit.gains for fit in fits])
    deviation = math.sqrt(np.average(np.square(gains - np.average(gains, weights=weights)), weights=weights))
    return epoch, float(np.mean([fit.start_loss for fit in fits]) - mean[epoch]), deviation / len(gains) ** 0.5


def _flow_on(start: Start, inner: Flow | None = None) -> Flow:
    """Return the flow of a start, in double precision, with layers below it that were trained."""
    prior, layers = (prior_of(start.mixture), []) if inner is None else (inner.prior, inner.layers)
    return Flow(prior, [*layers, *start.layers]).to("cpu", torch.float64).eval()


def _sizes(rows: int, options: Mapping[str, Any]) -> dict[str, Any]:
    usual = (2, (32,)) if rows < _MANY_ROWS else (4, (64, 64))
    unknown = sorted(options.keys() - {"num_layers", "hidden_features"})
    if unknown:
        raise TypeError(f"expected num_layers and hidden_features as options of 'auto'; got {unknown[0]!r}")
    return dict(zip(("num_layers", "hidden_features"), usual, strict=True)) | dict(options)


def _steps_per_epoch(rows: int) -> int:
    return 10 if rows < _MANY_ROWS else 20


def _single(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()


def _as_row(candidate: Candidate, unit: float) -> dict[str, Any]:
    options = candidate.options
    if options.factors:
        covariance = f"{options.factors} factors"
    else:
        covariance = f"shrunk by {options.shrinkage:g}"
    if options.components > 1:
        covariance += f", shared by {options.rows:.3g} rows"
    row = {"coordinates": candidate.coordinates, "components": options.components, "covariance": covariance}
    return {**row, "floor": options.floor, "score": candidate.score - unit}


def _in_words(chosen: Sequence[Candidate], shares: np.ndarray) -> str:
    parts = [f"{share:.0%} of {item.options.components}" for item, share in zip(chosen, shares, strict=True)]
    return f"Gaussian mixtures in {chosen[0].coordinates} coordinates ({', '.join(parts)} components)"
