"""The slow way through an autoregressive layer, made quick: each unit once, or few passes; and its gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyroflows.caching import caching
from pyroflows.layers.transformers import Transformer
from pyroflows.networks.made import MADE

__all__ = ["closed", "invert"]

_BLOCK = 64  # hidden units at most of a block; a step reads their columns alone, a product adds all those before
# What is tried first is read off the multiply-adds that take as long as a step of the first way, and as what a pass
# takes beside its own: measured by ``tests/benchmarks/vector_step.py --rule``.
_STEP, _PASS = 3_000_000, 2_400_000
_ENOUGH = 12  # passes that mostly suffice


@torch.no_grad()
def invert(made: MADE, transformer: Transformer, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`y_i = f(x_i; \theta_i(y_{<i}, c))` for y, exactly; give y and the terms of the log-determinant.

    Many rows: the features are found in the order of their dependence, and each unit of the network is computed once,
    at the step at which all that it sees is known. Few rows: the equation is iterated until a pass changes nothing,
    which takes as many passes as the dependence is long; once they have cost what the first way costs, it is taken.

    Shapes:
        x, y, terms: ``(*batch, features)``; context: ``(*batch, context_features)``.

    References:
        Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, Song et al., 2021
        (arXiv:2002.03629), for the iteration.
    """
    features, rows = x.shape[-1], x.shape[:-1].numel()
    work = rows * sum(linear.weight.numel() for linear in cast(list[nn.Linear], list(made.network.linears)))
    passes = features * _STEP // (work + _PASS)
    if rows and passes >= min(features, _ENOUGH):
        y = x
        with caching(made, watch=False):
            for _ in range(min(features, passes) + 1):
                found, log_det = transformer.forward(x, made(y, context))
                if torch.equal(found, y):
                    return found, log_det
                y = found.nan_to_num(0.0, 0.0, 0.0)  # features not yet found may be wild
    return _by_degree(made, transformer, x, context)


def _by_degree(made: MADE, transformer: Transformer, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Units of one degree are rows that lie together, beside the rows of the batch as columns."""
    features, width, before = made.features, made.num_parameters, made.units_before
    z = x.reshape(-1, features).T[made.order]
    weights, sums, direct = _in_order(made, x, context)
    units = [z.new_zeros(weight.shape[1], z.shape[1]) for weight in weights]  # what each map is applied to
    log_det = torch.empty_like(z)
    activation, last = made.network.activation, len(weights) - 1
    block = max(1, _BLOCK * features // max(_BLOCK, *(weight.shape[1] for weight in weights)))

    def add(number: int, weight: Tensor, outputs: tuple[int, int], inputs: tuple[int, int]) -> None:
        (a, b), (c, d) = outputs, inputs
        if a < b and c < d:
            sums[number][a:b].addmm_(weight[a:b, c:d], units[number][c:d])

    for first in range(0, features, block):
        stop = min(first + block, features)
        # What the block's units see of all that came before it, in one product a map.
        for number, weight in enumerate(weights[:-1]):
            add(number, weight, (before[number + 1][first], before[number + 1][stop]), (0, before[number][first]))
        add(last, weights[-1], (first * width, stop * width), (0, before[last][first]))
        if direct is not None:
            sums[last][first * width : stop * width].addmm_(
                direct[first * width : stop * width, :first], units[0][:first]
            )
        for degree in range(first, stop):
            stream = z
            for number, weight in enumerate(weights[:-1]):
                a, b = before[number + 1][degree], before[number + 1][degree + 1]
                if a == b:
                    continue
                add(
                    number,
                    weight,
                    (a, b),
                    (before[number][first], degree if number == 0 else before[number][degree + 1]),
                )
                value = sums[number][a:b]
                if made.network.residual and number % 2 == 0:
                    value = stream = value if number == 0 else stream + value
                units[number + 1][a:b] = activation(value)
            outputs = (degree * width, (degree + 1) * width)
            add(last, weights[-1], outputs, (before[last][first], degree if last == 0 else before[last][degree + 1]))
            parameters = sums[last][slice(*outputs)]
            if direct is not None and degree > first:
                parameters.addmm_(direct[slice(*outputs), first:degree], units[0][first:degree])
            found, terms = transformer.forward(z[degree, :, None], parameters.T[:, None])
            units[0][degree], log_det[degree] = found[:, 0], terms[:, 0]
    back = made.order.argsort()
    return units[0][back].T.reshape(x.shape), log_det[back].T.reshape(x.shape)


def _in_order(made: MADE, x: Tensor, context: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Give the weights with inputs and outputs in the order of dependence, and sums that begin with the biases.

    No mask is needed: a unit is only ever given the units that it may see.
    """
    features, rows = made.features, x.shape[:-1].numel()
    linears = cast(list[nn.Linear], list(made.network.linears))
    weights = [linear.weight for linear in linears]
    biases = [linear.bias[:, None].expand(-1, rows) for linear in linears]
    if made.network.context is not None and context is not None:
        given = made.network.context(context)
        biases[0] = biases[0] + given.expand(*x.shape[:-1], given.shape[-1]).reshape(rows, given.shape[-1]).T

    def outputs(rows_of_features: Tensor) -> Tensor:
        return rows_of_features.unflatten(0, (features, -1))[made.order].flatten(0, 1)

    weights[0] = weights[0][:, made.order]
    weights[-1], biases[-1] = outputs(weights[-1]), outputs(biases[-1])
    direct = None if made.direct is None else outputs(made.direct.weight[:, made.order])
    return weights, [bias.clone(memory_format=torch.contiguous_format) for bias in biases], direct


def closed(y: Tensor, log_det: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Close the graph of ``y = f(x; given)`` where ``y`` is ``given``: gradients are then those of the solution.

    The gradient of the solution solves an equation with the transposed Jacobian, which is triangular: it is iterated
    until it has settled, at most once for each feature.
    """
    return _Closed.apply(y, log_det, given)


class _Closed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, log_det: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y, log_det, given)
        return y.view_as(y), log_det.view_as(log_det)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor, to_log_det: Tensor) -> tuple[Tensor, Tensor, None]:
        y, log_det, given = ctx.saved_tensors
        number = torch.finfo(to_y.dtype)
        outputs = [y, log_det] if log_det.requires_grad else [y]
        found = to_y
        for _ in range(given.shape[-1]):
            previous = found
            with torch.enable_grad():
                (back,) = torch.autograd.grad(outputs, given, [previous, to_log_det][: len(outputs)], retain_graph=True)
            # Features not yet found may be wild, and must not overflow into those that are.
            found = to_y + torch.where(back.abs() < number.max**0.5, back, 0)
            if ((found - previous).abs().amax(-1) <= 8 * number.eps * found.abs().amax(-1)).all():
                break
        return found, to_log_det, None
