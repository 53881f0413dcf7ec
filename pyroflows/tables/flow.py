"""The flow of a table: a named flow in the units of the table's columns."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows import models
from pyroflows.arguments import check_finite, check_option, check_varying
from pyroflows.bijection import Bijection
from pyroflows.dequantizers import ColumnDequantizer
from pyroflows.flow import Flow
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.linear import TriangularAffine
from pyroflows.layers.pointwise import Standardize
from pyroflows.networks.one_hot import OneHot

__all__ = ["table_flow"]


def table_flow(
    x: Tensor,
    flow: str | Callable[..., Flow] = "nsf",
    *,
    context: Tensor | None = None,
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
        weights: a weight above 0 for each row, for the means and standard deviations; by default all are equal.
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
    dequantizer = _dequantizer(x, integer_columns) if len(integer_columns) else None
    rows = x if dequantizer is None else dequantizer(x)[0]
    outer: list[Bijection] = []
    if standardize:
        shares = torch.full_like(x[:, 0], 1 / len(x)) if weights is None else weights / weights.sum()
        mean = shares @ rows
        outer = [Standardize(mean, (shares @ (rows - mean).square()).sqrt())]
        rows = outer[0].inverse_and_log_det(rows)[0]
    embedding = embedded = None
    if context is not None:
        embedding = _embedding(context, len(x)).to(x)
        embedded = embedding(context)
    outer = [*_normal_layers(rows, embedded), *outer]
    inner = flow(features, context_features=0 if embedded is None else embedded.shape[1], **options)
    if not isinstance(inner, Flow) or tuple(inner.event_shape) != (features,):
        got = f"one of {tuple(inner.event_shape)}" if isinstance(inner, Flow) else type(inner).__name__
        raise ValueError(f"expected the builder to return a flow of {features} features; got {got}")
    return Flow(inner.prior, [*inner.layers, *outer], embedding=embedding, dequantizer=dequantizer).to(x)


def _check_numbers(name: str, x: Tensor, columns: Sequence[str] | None = None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected {name} as a tensor of floating-point numbers; got {got}")
    if x.dim() != 2 or len(x) < 2 or not x.shape[1]:
        raise ValueError(
            f"expected {name} of shape (rows, columns), at least 2 rows and 1 column; got {tuple(x.shape)}"
        )
    check_finite(name, x, columns)


def _dequantizer(x: Tensor, columns: Sequence[int]) -> ColumnDequantizer:
    for column in columns:
        if not isinstance(column, Integral) or not 0 <= column < x.shape[1]:
            raise ValueError(f"expected integer_columns from 0 to {x.shape[1] - 1}; got {column!r}")
    steps = x.new_zeros(x.shape[1])
    steps[[int(column) for column in columns]] = 1
    dequantizer = ColumnDequantizer(steps)
    dequantizer.check(x)
    return dequantizer


def _embedding(context: Tensor, rows: int) -> nn.Module:
    """Return the module that standardizes a context of numbers, or makes one-hot vectors of class labels."""
    embedding: nn.Module
    if isinstance(context, Tensor) and context.is_floating_point():
        _check_numbers("a context", context)
        std = context.std(0, correction=0)
        embedding = Standardize(context.mean(0), torch.where((context == context[0]).all(0), 1, std)).inv
    else:
        if not isinstance(context, Tensor) or context.dim() != 1 or not len(context):
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"expected a context of numbers, (rows, columns), or of class labels, (rows,); got {got}")
        embedding = OneHot(max(0, int(context.max())) + 1)
        embedding.check(context)
    if len(context) != rows:
        raise ValueError(f"expected a context for each of {rows} rows; got {len(context)}")
    return embedding


@torch.no_grad()
def _normal_layers(x: Tensor, context: Tensor | None) -> list[Bijection]:
    """Return layers that start as a normal distribution, around the ridge regression of the rows on a context."""
    features, least_std = x.shape[1], 1e-3 * x.std(0)
    regression: list[Bijection] = []
    if context is not None:
        numbers = context.shape[1]
        layer = Coupling(features, mask=[True] * features, context_features=numbers, hidden_features=()).to(x)
        context_mean, mean = context.mean(0), x.mean(0)
        centred = context - context_mean
        # The penalty weighs as much as one row.
        gram = centred.T @ centred + torch.eye(numbers).to(x)
        slope = torch.linalg.solve(gram, centred.T @ (x - mean)).T
        # The network is a linear map without hidden layers to shifts, then log-scales: of the context, and of a one.
        layer.conditioner.context.weight[:features] = slope
        layer.conditioner.linears[0].bias[:features] = mean - slope @ context_mean
        x = x - mean - centred @ slope.T
        regression = [layer]
    std = torch.maximum(x.std(0), least_std)
    triangular = TriangularAffine(features).to(x)
    triangular.start_at(x.mean(0), std[:, None] * torch.linalg.cholesky(_correlation((x - x.mean(0)) / std)))
    return [triangular, *regression]


def _correlation(x: Tensor) -> Tensor:
    """Return the covariance of standardized rows, shrunk towards the identity if there are few rows.

    References:
        Shrinkage Algorithms for MMSE Covariance Estimation, Chen et al., 2010 (arXiv:0907.4698).
    """
    rows, features = x.shape
    covariance = x.T @ x / rows
    trace, square = covariance.trace(), covariance.square().sum()
    excess = (square - trace**2 / features).clamp(min=1e-12)
    shrinkage = ((1 - 2 / features) * square + trace**2) / ((rows + 1 - 2 / features) * excess)
    shrinkage = shrinkage.clamp(1e-6, 1)  # columns that depend on others leave something to factorize
    return (1 - shrinkage) * covariance + shrinkage * trace / features * torch.eye(features).to(x)
