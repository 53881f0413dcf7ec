"""Fit a flow to a table: build it from the rows, hold rows out, and train."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import as_tensor
from pyroflows.contexts import seeded
from pyroflows.flow import Flow
from pyroflows.layers.pointwise import Standardize
from pyroflows.tables.flow import table_flow
from pyroflows.training import FitOptions, FitResult, fit, negative_log_likelihood

__all__ = ["fit_table"]


def fit_table(
    x: np.ndarray,
    flow: str | Callable[..., Flow] = "nsf",
    *,
    context: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    validation: float = 0.1,
    columns: Sequence[str] | None = None,
    integer_columns: Sequence[int] = (),
    standardize: bool = True,
    flow_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 256,
    min_steps: int = 1,
    seed: int | None = None,
    on_start: Callable[[Flow], Any] | None = None,
    on_step: Callable[[Tensor], Any] | None = None,
    options: FitOptions | None = None,
    **fit_arguments: Any,
) -> tuple[Flow, FitResult]:
    """Build the flow of a table, see :func:`table_flow`, and train it by maximum likelihood on a share of the rows.

    Equal rows are not both trained on and held out. Without weights they are held out together, unless they are more
    than the share to hold out, such as the zeros of a column that is mostly zero: then one by one. With weights they
    become one row with the sum of their weights; a row that weighs more than the share to hold out is on both sides,
    with its weight divided.

    Columns and numbers of a context are standardized in double precision before training, also if that is in single
    precision.

    Args:
        x: the rows, in double precision.
        flow, columns, integer_columns, standardize: as for :func:`table_flow`.
        context: of each row, for a conditional flow: numbers, or labels from 0, which are integers.
        weights: a weight above 0 for each row.
        validation: share of the rows to hold out, to choose the best epoch and when to stop; 0 for none.
        flow_options: options of the flow, such as ``{"num_layers": 4}``.
        dtype: precision of training.
        batch_size: rows a step, or all rows if there are fewer.
        min_steps: least number of steps in an epoch, unless ``options`` has a number.
        seed: of split, weights and shuffles.
        on_start: called with the flow before training. If training is interrupted, this flow has the best weights.
        on_step: called with the loss of each training step.
        options, fit_arguments: of :func:`fit`, such as ``epochs=10``.

    Shapes:
        x: ``(rows, columns)``; context: ``(rows, numbers)``, or labels ``(rows,)``; weights: ``(rows,)``.

    Returns:
        The flow, in double precision on the CPU, and the result, with losses in nats in the units of the columns.

    Raises:
        TypeError: an option that the flow does not take.
        ValueError: numbers that are not finite, a constant column, fewer than two different rows, or a loss that is
            never finite.

    Example:
        >>> x = np.random.default_rng(0).normal(1000, 300, (500, 2))
        >>> flow, result = fit_table(x, "maf", flow_options={"num_layers": 2}, epochs=2, seed=0)
        >>> flow.dtype, result.stopped
        (torch.float64, 'all 2 epochs done')
    """
    if weights is not None:
        x, context, weights = _merge(x, context, weights)
    rows, conditions = as_tensor(x), None if context is None else as_tensor(context)
    with seeded(seed):
        built = table_flow(
            rows,
            flow,
            context=conditions,
            weights=None if weights is None else as_tensor(weights),
            integer_columns=integer_columns,
            standardize=standardize,
            columns=columns,
            **flow_options or {},
        )
    if on_start is not None:
        on_start(built)
    is_continuous = len(integer_columns) < x.shape[1]
    training, held_out, divided = _split(x, context, weights, validation, seed, is_continuous)
    if weights is not None and (weights == weights[0]).all():
        weights = None
    trained, rows, conditions, log_scale = _training_form(built, rows, conditions, dtype)

    def part(places: np.ndarray, share: float) -> tuple[Tensor, Tensor | None, np.ndarray | None]:
        its_weights = None if weights is None else np.where(divided, share * weights, weights)[places]
        return rows[places], None if conditions is None else conditions[places], its_weights

    def objective(flow: Any, *batch: Tensor) -> Tensor:
        loss = negative_log_likelihood(flow, *batch) + log_scale
        if on_step is not None and flow.training:
            on_step(loss.detach())
        return loss

    batch_size = min(batch_size, len(training))
    options = FitOptions() if options is None else options
    if options.steps_per_epoch is None and len(training) // batch_size < min_steps:
        options = replace(options, steps_per_epoch=min_steps)
    train_x, train_context, train_weights = part(training, 1 - validation)
    result = fit(
        trained,
        train_x,
        context=train_context,
        weights=train_weights,
        validation=part(held_out, validation) if len(held_out) else None,
        objective=objective,
        batch_size=batch_size,
        seed=seed,
        options=options,
        **fit_arguments,
    )
    if result.best_epoch is None:
        raise ValueError(f"expected a finite loss after at least one epoch; got none: {result.stopped}")
    return built.to("cpu", torch.float64), result


def _training_form(
    flow: Flow, x: Tensor, context: Tensor | None, dtype: torch.dtype
) -> tuple[Flow, Tensor, Tensor | None, float]:
    """Return a flow without the layers that standardize, to be trained in single precision, its data and context.

    It shares its other layers with ``flow``. The last number is to be added to its losses, in the units of the columns.
    """
    layers, embedding, log_scale = flow.layers, flow.embedding, 0.0
    if flow.dequantizer is None and isinstance(layers[-1], Standardize):
        *layers, scale = layers
        x, log_scale = scale.inverse_and_log_det(x)[0], float(scale.std.log().sum())
    if context is not None and context.is_floating_point():
        context, embedding = flow.embed(context), None
        context = None if context is None else context.to(dtype)
    trained = Flow(flow.prior, layers, embedding=embedding, dequantizer=flow.dequantizer).to(dtype)
    return trained, x.to(dtype), context, log_scale


def _split(
    x: np.ndarray,
    context: np.ndarray | None,
    weights: np.ndarray | None,
    share: float,
    seed: int | None,
    is_continuous: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions of the rows to train on and to hold out, and which rows are in both."""
    rng, number = np.random.default_rng(seed), len(x)
    group, divided = np.arange(number), np.zeros(number, bool)
    if weights is not None:  # equal rows are one row
        divided = weights > (1 + 1e-9) * share * weights.sum()
        chosen = rng.permutation(np.flatnonzero(~divided))[: int(share * number)]
    else:
        if is_continuous:  # whole numbers alone are often equal by chance
            group = np.unique(_table(x, context), axis=0, return_inverse=True)[1].ravel()
            is_frequent = np.bincount(group)[group] > share * number
            group = np.unique(np.where(is_frequent, number + np.arange(number), group), return_inverse=True)[1]
        order = rng.permutation(group.max() + 1)
        chosen = order[np.bincount(group)[order].cumsum() <= share * number]
    held_out = np.isin(group, chosen)
    if not held_out.any():
        divided[:] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out | divided), divided


def _merge(
    x: np.ndarray, context: np.ndarray | None, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Make one row of equal rows, with the sum of their weights, in sorted order."""
    first, group = np.unique(_table(x, context), axis=0, return_index=True, return_inverse=True)[1:]
    if len(first) < 2:
        raise ValueError(f"expected at least 2 different rows of a weight above zero; got {len(first)}")
    return x[first], None if context is None else context[first], np.bincount(group.ravel(), weights)


def _table(x: np.ndarray, context: np.ndarray | None) -> np.ndarray:
    return x if context is None else np.column_stack((x, context))
