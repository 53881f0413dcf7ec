"""The flow of a table: a named flow in the units of the table's columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows import models
from pyroflows.arguments import check_option, check_varying
from pyroflows.bijection import Bijection
from pyroflows.dequantizers import ColumnDequantizer
from pyroflows.flow import Flow
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.pointwise import Standardize
from pyroflows.layers.triangular import TriangularAffine
from pyroflows.networks.one_hot import OneHot

__all__ = ["table_flow"]


def table_flow(
    x: Tensor,
    flow: str | Callable[..., Flow] = "nsf",
    *,
    context: Tensor | None = None,
    integer_columns: Sequence[int] = (),
    standardize: bool | Standardize = True,
    **sizes: Any,
) -> Flow:
    r"""Build a named flow for the rows of a table, whose densities are in nats in the units of the columns.

    At the data end stands a :class:`Standardize` layer; under it a triangular one, and, given a context, an affine one
    that is linear in that. These start as the normal distribution of the rows, about their regression on the context,
    and train with the rest. Numbers of a context are standardised by the embedding, so that the flow takes them in
    their own units; class labels become one-hot vectors.

    A single column leaves the layers of "maf", "realnvp", "glow", "nice" and "iaf" nothing to see, and without a
    context they are a normal distribution: "nsf" bends, as do "planar" and "radial" a little.

    Args:
        x: the rows, by which the flow is built but not trained.
        flow: the name of a flow, or a function such as :func:`nsf`, called as
            ``flow(features, context_features=..., **sizes)``.
        context: of the rows, if the flow is to take one: numbers, or labels from 0, which are integers.
        integer_columns: positions of the columns that hold whole numbers: the flow gets a :class:`ColumnDequantizer`.
        standardize: whether to standardise, or the layer to do so.
        sizes: options of the flow, such as ``num_layers`` (here of "glow" as well) and ``hidden_features``.

    Shapes:
        x: ``(rows, features)``; context: ``(rows, context_features)``, or labels ``(rows,)``.

    Returns:
        The flow, not trained, of the dtype and on the device of ``x``.

    Raises:
        TypeError: an option that the flow does not take, or something that is no rows or context.
        ValueError: an unknown flow, another shape, numbers that are not finite or not whole where they should be, or a
            constant column.

    Example:
        >>> from pyroflows import fit
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 300 + 1000
        >>> flow = table_flow(x, "nsf", num_layers=2, hidden_features=(16,))
        >>> result = fit(flow, x, epochs=2, seed=0)
        >>> flow.sample((3,)).shape
        torch.Size([3, 2])
    """
    _check_numbers("rows", x)
    if isinstance(flow, str):
        check_option("flow", flow, models.__all__)
        if flow == "glow" and "num_layers" in sizes:
            sizes["num_steps"] = sizes.pop("num_layers")
        flow = getattr(models, flow)
    if not callable(flow):
        raise TypeError(f"expected the name of a flow or a function that builds one; got {type(flow).__name__}")
    if not isinstance(standardize, (bool, Standardize)):
        raise TypeError(f"expected standardize as True, False or a layer; got {type(standardize).__name__}")
    features = x.shape[1]
    dequantizer = _dequantizer(x, integer_columns) if len(integer_columns) else None
    rows = x if dequantizer is None else dequantizer(x)[0]
    check_varying(rows)
    outer: list[Bijection] = []
    if standardize:
        outer = [Standardize.from_data(rows) if standardize is True else standardize]
        rows = outer[0].inverse_and_log_det(rows)[0]
    embedding = embedded = None
    if context is not None:
        embedding = _embedding(context, len(x)).to(x)
        embedded = embedding(context)
    outer = [*_start(rows, embedded), *outer]
    built = flow(features, context_features=0 if embedded is None else embedded.shape[1], **sizes)
    if not isinstance(built, Flow) or tuple(built.event_shape) != (features,):
        got = f"one of {tuple(built.event_shape)}" if isinstance(built, Flow) else type(built).__name__
        raise ValueError(f"expected the builder to give a flow of {features} features; got {got}")
    return Flow(built.prior, [*built.layers, *outer], embedding=embedding, dequantizer=dequantizer).to(x)


def _check_numbers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected {name} as a tensor of floating-point numbers; got {got}")
    if x.dim() != 2 or len(x) < 2 or not x.shape[1]:
        raise ValueError(
            f"expected {name} of shape (rows, columns), at least 2 rows and 1 column; got {tuple(x.shape)}"
        )
    bad = ~x.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"expected finite {name}; got {float(x[row, column])} in row {row}, column {column}")


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
    """Give what makes the context that the layers take of numbers, or of class labels."""
    if isinstance(context, Tensor) and context.is_floating_point():
        _check_numbers("a context", context)
        std = context.std(0, correction=0)
        made: nn.Module = Standardize(context.mean(0), torch.where((context == context[0]).all(0), 1, std)).inv
    else:
        if not isinstance(context, Tensor) or context.dim() != 1 or not len(context):
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"expected a context of numbers, (rows, columns), or of class labels, (rows,); got {got}")
        OneHot._check_dtype(context)
        made = OneHot(max(0, int(context.max())) + 1)
        made.check(context)
    if len(context) != rows:
        raise ValueError(f"expected a context for each of {rows} rows; got {len(context)}")
    return made


@torch.no_grad()
def _start(x: Tensor, context: Tensor | None) -> list[Bijection]:
    """Give layers that start as a normal distribution, about the ridge regression of the rows on a context."""
    features, least = x.shape[1], 1e-3 * x.std(0)
    regression: list[Bijection] = []
    if context is not None:
        numbers = context.shape[1]
        layer = Coupling(features, mask=[True] * features, context_features=numbers, hidden_features=()).to(x)
        centre, mean = context.mean(0), x.mean(0)
        centred = context - centre
        # The penalty weighs as one row would.
        gram = centred.T @ centred + torch.eye(numbers).to(x)
        weight = torch.linalg.solve(gram, centred.T @ (x - mean)).T
        # The network is a linear map without hidden layers to shifts, then log-scales: of the context, and of a one.
        layer.conditioner.context.weight[:features] = weight
        layer.conditioner.linears[0].bias[:features] = mean - weight @ centre
        x = x - mean - centred @ weight.T
        regression = [layer]
    std = torch.maximum(x.std(0), least)
    triangular = TriangularAffine(features).to(x)
    triangular.start_at(x.mean(0), std[:, None] * torch.linalg.cholesky(_correlation((x - x.mean(0)) / std)))
    return [triangular, *regression]


def _correlation(x: Tensor) -> Tensor:
    """Give the covariance of standardised rows, drawn towards the identity as far as they are few for it.

    Shrinkage Algorithms for MMSE Covariance Estimation, Chen et al., 2010 (arXiv:0907.4698).
    """
    rows, features = x.shape
    found = x.T @ x / rows
    trace, square = found.trace(), found.square().sum()
    excess = (square - trace**2 / features).clamp(min=1e-12)
    share = ((1 - 2 / features) * square + trace**2) / ((rows + 1 - 2 / features) * excess)
    share = share.clamp(1e-6, 1)  # columns that depend on others leave something to factorise
    return (1 - share) * found + share * trace / features * torch.eye(features).to(x)
