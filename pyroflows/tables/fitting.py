"""The flow of a table, a named flow in the units of its columns: built from the rows, and trained on a part of them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyroflows import models
from pyroflows.arguments import as_tensor, check_finite, check_option, check_varying
from pyroflows.bijection import Bijection
from pyroflows.contexts import seeded
from pyroflows.flow import Flow
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.linear import TriangularAffine
from pyroflows.layers.pointwise import Standardize
from pyroflows.networks.one_hot import OneHot
from pyroflows.tables.rows import dequantizer_of, merge_rows, with_context
from pyroflows.training import FitOptions, FitResult, fit, negative_log_likelihood
from pyroflows.training.prepare import rows_of_share

__all__ = ["fit_table", "table_flow"]

_Rows = np.ndarray | None


def fit_table(
    x: np.ndarray,
    flow: str | Callable[..., Flow] = "nsf",
    *,
    context: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    validation: float | tuple[np.ndarray, _Rows, _Rows] = 0.1,
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

    Equal rows are not both trained on and held out, and no rows are held out without which a column would be constant.
    Without weights equal rows are held out together, unless they are more than the share to hold out, such as the zeros
    of a column that is mostly zero: then one by one. With weights they become one row with the sum of their weights; a
    row that weighs more than the share to hold out is on both sides, with its weight divided.

    Columns and numbers of a context are standardized in double precision before training, also if that is in single
    precision.

    Args:
        x: the rows, in double precision.
        flow, context, weights, columns, integer_columns, standardize: as for :func:`table_flow`.
        validation: share of the rows, or of their weight, to hold out, to choose the best epoch and when to stop, 0 for
            none; or rows, their context and their weights, both of which may be None.
        flow_options: options of :func:`table_flow`, such as ``{"num_layers": 4}`` or an ``embedding``.
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
        x, context, weights = merge_rows(x, context, weights)
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
            **copy.deepcopy(dict(flow_options or {})),  # a fit trains its own networks
        )
    if on_start is not None:
        on_start(built)
    if isinstance(validation, tuple):
        x, context, weights = _append(x, context, weights, validation)
        divided, training = np.zeros(len(x), bool), np.arange(len(rows))
        held_out, validation = np.arange(len(rows), len(x)), 0.0
        rows, conditions = as_tensor(x), None if context is None else as_tensor(context)
    else:
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
        parts: list[Any] = list(embedding) if isinstance(embedding, nn.Sequential) else [embedding, None]
        context, embedding = parts[0](context).to(dtype), parts[1]
    trained = Flow(flow.prior, layers, embedding=embedding, dequantizer=flow.dequantizer).to(dtype)
    return trained, x.to(dtype), context, log_scale


def _split(
    x: np.ndarray, context: _Rows, weights: _Rows, share: float, seed: int | None, is_continuous: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions of the rows to train on and to hold out, and which rows are in both."""
    rng, number = np.random.default_rng(seed), len(x)
    group, divided = np.arange(number), np.zeros(number, bool)
    if weights is not None:  # equal rows are one row
        divided = weights > (1 + 1e-9) * share * weights.sum()
        order = rng.permutation(np.flatnonzero(~divided))
        chosen = order[: rows_of_share(as_tensor(weights[order]), share) if share and len(order) else 0]
    else:
        if is_continuous:  # whole numbers alone are often equal by chance
            group = np.unique(with_context(x, context), axis=0, return_inverse=True)[1].ravel()
            is_frequent = np.bincount(group)[group] > share * number
            group = np.unique(np.where(is_frequent, number + np.arange(number), group), return_inverse=True)[1]
        order = rng.permutation(group.max() + 1)
        chosen = order[np.bincount(group)[order].cumsum() <= share * number]
    held_out = np.isin(group, chosen)
    for column in np.flatnonzero((x[~held_out] == x[~held_out][:1]).all(0)):
        others = np.flatnonzero(x[:, column] != x[~held_out][0, column])
        held_out[np.isin(group, group[others[:1]])] = False
    if not held_out.any():
        divided[:] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out | divided), divided


def _append(
    x: np.ndarray, context: _Rows, weights: _Rows, others: tuple[np.ndarray, _Rows, _Rows]
) -> tuple[np.ndarray, _Rows, _Rows]:
    """Append rows to rows, their context to the context, and their weights to the weights; None are ones."""
    other_x, other_context, other_weights = others
    if context is not None and other_context is not None:
        context = np.concatenate([context, other_context])
    if weights is not None or other_weights is not None:
        weights = np.ones(len(x)) if weights is None else weights
        weights = np.concatenate([weights, np.ones(len(other_x)) if other_weights is None else other_weights])
    return np.concatenate([x, other_x]), context, weights


def table_flow(
    x: Tensor,
    flow: str | Callable[..., Flow] = "nsf",
    *,
    context: Tensor | None = None,
    embedding: nn.Module | None = None,
    weights: Tensor | None = None,
    integer_columns: Sequence[int] = (),
    standardize: bool = True,
    columns: Sequence[str] | None = None,
    **options: Any,
) -> Flow:
    r"""Build a named flow for the rows of a table, with densities in nats in the units of the columns.

    The layer nearest the data is a :class:`Standardize`; below it is a triangular layer and, given a context, an affine
    one that is linear in the context. These start as the normal distribution of the rows, around their regression on
    the context, and are trained with the rest. The flow takes the numbers of a context in their own units, which its
    embedding standardizes; class labels become one-hot vectors.

    With a single column the layers of "maf", "realnvp", "glow", "nice" and "iaf" have nothing to condition on, so that
    without a context they remain a normal distribution; "nsf" bends, and "planar" and "radial" do a little.

    Args:
        x: the rows; the flow is initialized from them, not trained.
        flow: the name of a flow, or a function such as :func:`nsf`, called as
            ``flow(features, context_features=..., **options)``.
        context: of each row, for a conditional flow: numbers, or labels from 0, which are integers.
        embedding: a network from the standardized numbers, or from the one-hot vectors, to the context of the layers,
            trained with them; by default they are the context.
        weights: a weight above 0 for each row, for all that is read from the rows; by default all are equal.
        integer_columns: positions of the columns of whole numbers, for which the flow gets a
            :class:`ColumnDequantizer`.
        standardize: whether to standardize the columns.
        columns: names of the columns, for error messages.
        options: of the flow, such as ``num_layers`` (also for "glow") and ``hidden_features``.

    Shapes:
        x: ``(rows, features)``; context: ``(rows, context_features)``, or labels ``(rows,)``; weights: ``(rows,)``.

    Returns:
        The flow, not trained, with the dtype and device of ``x``.

    Raises:
        TypeError: an option that the flow does not take, or rows or a context of another type.
        ValueError: an unknown flow, a wrong shape, numbers that are not finite or not whole where they should be, or a
            constant column.

    Example:
        >>> from pyroflows import fit
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 300 + 1000
        >>> flow = table_flow(x, "nsf", num_layers=2, hidden_features=(16,))
        >>> result = fit(flow, x, epochs=2, seed=0)
        >>> flow.sample((3,)).shape
        torch.Size([3, 2])
    """
    _check_numbers("rows", x, columns)
    check_varying(x, columns)
    if isinstance(flow, str):
        check_option("flow", flow, models.__all__)
        if flow == "glow" and "num_layers" in options:
            options["num_steps"] = options.pop("num_layers")
        flow = getattr(models, flow)
    if not callable(flow):
        raise TypeError(f"expected the name of a flow or a function that builds one; got {type(flow).__name__}")
    features = x.shape[1]
    dequantizer = dequantizer_of(x, integer_columns) if len(integer_columns) else None
    rows = x if dequantizer is None else dequantizer(x)[0]
    outer: list[Bijection] = []
    shares = torch.full_like(x[:, 0], 1 / len(x)) if weights is None else weights / weights.sum()
    if standardize:
        outer = [Standardize(*_mean_and_std(rows, shares))]
        rows = outer[0].inverse_and_log_det(rows)[0]
    if context is None and embedding is not None:
        raise ValueError(f"expected a context for the embedding; got none for {type(embedding).__name__}")
    embedded = None
    if context is not None:
        scale = _embedding(context, shares).to(x)
        embedding = scale if embedding is None else nn.Sequential(scale, embedding.to(x))
        with torch.no_grad():
            embedded = embedding(context)
        if not isinstance(embedded, Tensor) or embedded.dim() != 2:
            got = f"shape {tuple(embedded.shape)}" if isinstance(embedded, Tensor) else type(embedded).__name__
            raise ValueError(f"expected an embedding that returns (rows, context_features); got {got}")
    outer = [*_normal_layers(rows, embedded, shares), *outer]
    inner = flow(features, context_features=0 if embedded is None else embedded.shape[1], **options)
    if not isinstance(inner, Flow) or tuple(inner.event_shape) != (features,):
        got = f"one of {tuple(inner.event_shape)}" if isinstance(inner, Flow) else type(inner).__name__
        raise ValueError(f"expected the builder to return a flow of {features} features; got {got}")
    if inner.embedding is not None:
        got = f"one with a {type(inner.embedding).__name__}: pass it as embedding= of table_flow"
        raise ValueError(f"expected the builder to return a flow without an embedding; got {got}")
    return Flow(inner.prior, [*inner.layers, *outer], embedding=embedding, dequantizer=dequantizer).to(x)


def _check_numbers(name: str, x: Tensor, columns: Sequence[str] | None = None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected {name} as a tensor of floating-point numbers; got {got}")
    if x.dim() != 2 or len(x) < 2 or not x.shape[1]:
        expected = f"expected {name} of shape (rows, columns), at least 2 rows and 1 column"
        raise ValueError(f"{expected}; got {tuple(x.shape)}")
    check_finite(name, x, columns)


def _embedding(context: Tensor, shares: Tensor) -> nn.Module:
    """Return the module that standardizes a context of numbers, or makes one-hot vectors of class labels."""
    embedding: nn.Module
    if isinstance(context, Tensor) and context.is_floating_point():
        _check_numbers("a context", context)
        _check_length(context, shares)
        mean, std = _mean_and_std(context, shares.to(context))
        embedding = Standardize(mean, torch.where((context == context[0]).all(0), 1, std)).inv
    elif isinstance(context, Tensor) and context.dim() == 1 and len(context):
        _check_length(context, shares)
        embedding = OneHot(max(0, int(context.max())) + 1)
        embedding.check(context)
    else:
        got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"expected a context of numbers, (rows, columns), or of class labels, (rows,); got {got}")
    return embedding


def _check_length(context: Tensor, shares: Tensor) -> None:
    if len(context) != len(shares):
        raise ValueError(f"expected a context for each of {len(shares)} rows; got {len(context)}")


def _mean_and_std(x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of columns, of rows with shares of the weight."""
    mean = shares @ x
    return mean, (shares @ (x - mean).square()).sqrt()


@torch.no_grad()
def _normal_layers(x: Tensor, context: Tensor | None, shares: Tensor) -> list[Bijection]:
    """Return layers that start as a normal distribution, around the ridge regression of the rows on a context."""
    features, least_std = x.shape[1], 1e-3 * _mean_and_std(x, shares)[1]
    # The exponential of the entropy of the weights: the number of rows, if all weigh the same.
    number = float((-torch.xlogy(shares, shares).sum()).exp())
    regression: list[Bijection] = []
    if context is not None:
        numbers = context.shape[1]
        layer = Coupling(features, mask=[True] * features, context_features=numbers, hidden_features=()).to(x)
        context_mean, mean = shares @ context, shares @ x
        centred = context - context_mean
        weighted = (number * shares)[:, None] * centred
        # The penalty weighs as much as one row.
        gram = weighted.T @ centred + torch.eye(numbers).to(x)
        slope = torch.linalg.solve(gram, weighted.T @ (x - mean)).T
        # The network is a linear map without hidden layers to shifts, then log-scales: of the context, and of a one.
        layer.conditioner.context.weight[:features] = slope
        layer.conditioner.linears[0].bias[:features] = mean - slope @ context_mean
        x = x - mean - centred @ slope.T
        regression = [layer]
    mean, std = _mean_and_std(x, shares)
    std = torch.maximum(std, least_std)
    triangular = TriangularAffine(features).to(x)
    triangular.start_at(mean, std[:, None] * torch.linalg.cholesky(_correlation((x - mean) / std, shares, number)))
    return [triangular, *regression]


def _correlation(x: Tensor, shares: Tensor, rows: float) -> Tensor:
    """Return the covariance of standardized rows, shrunk to the identity as in Chen et al., 2010, arXiv:0907.4698."""
    features = x.shape[1]
    covariance = (shares[:, None] * x).T @ x
    trace, square = covariance.trace(), covariance.square().sum()
    excess = (square - trace**2 / features).clamp(min=1e-12)
    shrinkage = ((1 - 2 / features) * square + trace**2) / ((rows + 1 - 2 / features) * excess)
    shrinkage = shrinkage.clamp(1e-6, 1)  # columns that depend on others leave something to factorize
    return (1 - shrinkage) * covariance + shrinkage * trace / features * torch.eye(features).to(x)
