"""Fast inversion of autoregressive layers, with implicit gradients."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyroflows.caching import caching
from pyroflows.layers.transformers import Transformer, split_by_feature
from pyroflows.networks.made import MADE
from pyroflows.private import is_mapped

__all__ = ["invert", "invert_in_passes", "invert_with_gradient", "iterate_to_fixed_point"]

_BLOCK = 64  # most hidden units of a block: a step reads only the block's columns, a product adds all those before
# Multiply-adds that take as long as a step by degree, and as the overhead of a pass; measured by
# ``tests/benchmarks/vector_step.py --rule``.
_STEP, _PASS = 3_000_000, 2_400_000
_ENOUGH = 12  # passes that are usually enough


@torch.no_grad()
def invert(made: MADE, transformer: Transformer, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`y_i = f(x_i; \theta_i(y_{<i}, c))` for y, exactly, with the log-determinant of each feature.

    For many rows the features are computed in the order of their dependence, and each unit of the network once, at the
    step at which all its inputs are known. For few rows the equation is iterated until a pass changes nothing, which
    takes at most as many passes as there are features; if those have cost as much as the first method, it takes over.

    Shapes:
        x, y, log_det: ``(*batch, features)``; context: ``(*batch, context_features)``.

    References:
        Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, Song et al., 2021
        (arXiv:2002.03629), for the iteration.
    """
    features, rows = x.shape[-1], x.shape[:-1].numel()
    work = rows * sum(linear.weight.numel() for linear in cast(list[nn.Linear], list(made.network.linears)))
    passes = features * _STEP // (work + _PASS)
    if rows and passes >= min(features, _ENOUGH) and not x.is_meta:
        y = x
        with caching(made, watch=False):
            for _ in range(min(features, passes) + 1):
                previous = y
                y, log_det = transformer.forward(x, *split_by_feature(transformer, made(y, context), x))
                if torch.equal(y, previous):
                    return y, log_det
                y = y.nan_to_num(0.0, 0.0, 0.0)  # features not yet known may be of any size
    return _by_degree(made, transformer, x, context)


def _by_degree(made: MADE, transformer: Transformer, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Solve a degree at a time; units of one degree are adjacent rows, and the rows of the batch are columns."""
    features, width, before = made.features, made.num_parameters, made.units_before
    z = x.reshape(-1, features).T[made.order]
    weights, sums, direct = _in_order(made, x, context)
    units = [z.new_zeros(weight.shape[1], z.shape[1]) for weight in weights]  # what each map is applied to
    log_det = torch.empty_like(z)
    activation, last = made.network.activation, len(weights) - 1
    block = max(1, _BLOCK * features // max(_BLOCK, *(weight.shape[1] for weight in weights)))

    def add(number: int, outputs: tuple[int, int], inputs: tuple[int, int]) -> None:
        (a, b), (c, d) = outputs, inputs
        if a < b and c < d:
            sums[number][a:b].addmm_(weights[number][a:b, c:d], units[number][c:d])

    for first in range(0, features, block):
        stop = min(first + block, features)
        # What the block's units see of all units before the block, in one product per map.
        for number in range(last):
            add(number, (before[number + 1][first], before[number + 1][stop]), (0, before[number][first]))
        outputs = (first * width, stop * width)
        add(last, outputs, (0, before[last][first]))
        if direct is not None:
            sums[last][slice(*outputs)].addmm_(direct[slice(*outputs), :first], units[0][:first])
        for degree in range(first, stop):
            stream = z
            for number in range(last):
                a, b = before[number + 1][degree], before[number + 1][degree + 1]
                if a == b:
                    continue
                add(number, (a, b), (before[number][first], degree if number == 0 else before[number][degree + 1]))
                value = sums[number][a:b]
                if made.network.residual and number % 2 == 0:
                    value = stream = value if number == 0 else stream + value
                units[number + 1][a:b] = activation(value)
            outputs = (degree * width, (degree + 1) * width)
            add(last, outputs, (before[last][first], degree if last == 0 else before[last][degree + 1]))
            output = sums[last][slice(*outputs)]
            if direct is not None and degree > first:
                output.addmm_(direct[slice(*outputs), first:degree], units[0][first:degree])
            parameters = split_by_feature(transformer, output.T, z)
            units[0][degree], log_det[degree] = transformer.forward(z[degree], *parameters)
    back = made.order.argsort()
    return units[0][back].T.reshape(x.shape), log_det[back].T.reshape(x.shape)


def _in_order(made: MADE, x: Tensor, context: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return the weights with inputs and outputs in the order of dependence, and the biases of every row.

    No mask is needed, since each unit is given only the units that it may see.
    """
    features, rows = made.features, x.shape[:-1].numel()
    linears = cast(list[nn.Linear], list(made.network.linears))
    weights = [linear.weight for linear in linears]
    biases = [linear.bias[:, None].expand(-1, rows) for linear in linears]
    if made.network.context is not None and context is not None:
        bias = made.network.context(context)
        biases[0] = biases[0] + bias.expand(*x.shape[:-1], bias.shape[-1]).reshape(rows, bias.shape[-1]).T

    def reorder(outputs: Tensor) -> Tensor:
        return outputs.unflatten(0, (features, -1))[made.order].flatten(0, 1)

    weights[0] = weights[0][:, made.order]
    weights[-1], biases[-1] = reorder(weights[-1]), reorder(biases[-1])
    direct = None if made.direct is None else reorder(made.direct.weight[:, made.order])
    return weights, [bias.clone(memory_format=torch.contiguous_format) for bias in biases], direct


def iterate_to_fixed_point(step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Iterate an affine map of rows whose matrix is strictly triangular, and so nilpotent.

    The fixed point is exact after as many steps as there are features, and to rounding mostly after a few.
    """
    limits = torch.finfo(start.dtype)
    value = start
    for _ in range(start.shape[-1]):
        previous = value
        value = step(previous)
        # Features not yet exact may be of any size, and must not overflow into those that are.
        value = torch.where(value.abs() < limits.max**0.5, value, 0)
        if value.is_meta or is_mapped(value):
            continue  # its numbers cannot be read
        if ((value - previous).abs().amax(-1) <= 8 * limits.eps * value.abs().amax(-1)).all():
            break
    return value


def invert_in_passes(made: MADE, transformer: Transformer, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Solve as :func:`invert` does, a feature per pass: this maps, compiles, traces, and has all derivatives."""
    y, *order = torch.zeros_like(x), *made.order.unbind()
    positions = torch.arange(x.shape[-1], device=x.device)
    for feature in order[:-1]:
        candidate, _ = transformer.forward(x, *split_by_feature(transformer, made(y, context), x))
        # Features not yet known stay zero, so that no large value of theirs can reach a masked product.
        y = torch.where(positions == feature, candidate, y)
    return transformer.forward(x, *split_by_feature(transformer, made(y, context), x))


def invert_with_gradient(
    made: MADE, transformer: Transformer, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Solve as :func:`invert` does, with the gradients of the solution by the implicit function theorem.

    The gradient solves an equation with the transposed Jacobian, which is triangular. Where its own gradient is asked
    for, it is that of :func:`invert_in_passes`.
    """
    return _Inversion.apply(made, transformer, x, context, *made.parameters())


class _Inversion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, made: MADE, transformer: Transformer, x: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        solution = invert(made, transformer, x, context)[0].requires_grad_()
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(x.requires_grad)
            context_leaf = None if context is None else context.detach().requires_grad_(context.requires_grad)
            outputs = transformer.forward(leaf, *split_by_feature(transformer, made(solution, context_leaf), x))
        ctx.made, ctx.transformer, ctx.graph = made, transformer, (outputs, solution, leaf, context_leaf)
        ctx.save_for_backward(x, context, *parameters)
        return outputs[0].detach(), outputs[1].detach()

    @staticmethod
    def backward(ctx: Any, y_gradient: Tensor, log_det_gradient: Tensor) -> tuple[Any, ...]:
        x, context, *parameters = ctx.saved_tensors
        gradients = y_gradient, log_det_gradient
        second = torch.is_grad_enabled()
        if second:
            outputs = invert_in_passes(ctx.made, ctx.transformer, x, context)
        else:
            outputs, solution, x, context = ctx.graph
            gradients = _solve(outputs, solution, y_gradient, log_det_gradient), log_det_gradient
        wanted = [t for t, needed in zip((x, context, *parameters), ctx.needs_input_grad[2:], strict=True) if needed]
        found = iter(_pull_back(outputs, wanted, gradients, create_graph=second))
        return None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])


def _solve(outputs: Sequence[Tensor], solution: Tensor, y_gradient: Tensor, log_det_gradient: Tensor) -> Tensor:
    """Return the gradient at the solution of ``y = f(x; y)``, given those at its outputs."""

    def step(gradient: Tensor) -> Tensor:
        (pulled_back,) = _pull_back(outputs, [solution], (gradient, log_det_gradient))
        return y_gradient if pulled_back is None else y_gradient + pulled_back

    return iterate_to_fixed_point(step, y_gradient)


def _pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor], *, create_graph: bool = False
) -> Sequence[Tensor | None]:
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    outputs, gradients = [o for o, _ in pairs], [g for _, g in pairs]
    return torch.autograd.grad(
        outputs, inputs, gradients, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
