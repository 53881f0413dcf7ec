"""Masked autoencoders: networks whose outputs see only the features before them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from pyroflows.arguments import as_widths, check_option, check_sizes
from pyroflows.caching import cached
from pyroflows.networks.mlp import MLP
from pyroflows.private import inside_functorch

__all__ = ["MADE", "MaskedLinear"]

_BLOCK, _ROWS = 128, 64  # hidden units and rows of a product; narrower or shorter ones run slower than they save


class MaskedLinear(nn.Linear):
    """A linear map whose weight is multiplied by a fixed mask.

    Args:
        mask: which inputs reach which outputs, shape ``(out_features, in_features)``.
        block: outputs at most of a product, on a CPU: each product leaves out the inputs after the last that its
            outputs see. All outputs, if not given.

    Shapes:
        x: ``(*batch, in_features)``; output: ``(*batch, out_features)``.

    Example:
        >>> MaskedLinear(torch.eye(2, dtype=torch.bool)).weight.shape
        torch.Size([2, 2])
    """

    mask: Tensor

    def __init__(self, mask: Tensor, block: int | None = None):
        super().__init__(mask.shape[1], mask.shape[0])
        starts = range(0, mask.shape[0], block or mask.shape[0])
        ends = [*starts[1:], mask.shape[0]]
        seen = (
            int(mask[a:b].any(0).nonzero().amax()) + 1 if mask[a:b].any() else 0
            for a, b in zip(starts, ends, strict=True)
        )
        self.blocks = list(zip(starts, ends, seen, strict=True))
        # Of the weight's dtype: a product of two is several times slower.
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        if len(self.blocks) == 1 or not self._pays_in_blocks(input):
            return F.linear(input, self._masked(), self.bias)
        x = input.reshape(-1, input.shape[-1])
        if torch.is_grad_enabled():
            rows = _InBlocks.apply(x, self.weight, self.bias, self.mask, self.blocks)
        else:
            rows = _products(x, self._in_blocks(), self.bias, self.blocks)
        return rows.view(*input.shape[:-1], rows.shape[-1])

    @staticmethod
    def _pays_in_blocks(input: Tensor) -> bool:
        if torch.compiler.is_compiling() or not input.is_cpu or input.numel() < _ROWS * input.shape[-1]:
            return False
        forward_mode = forward_ad._current_level >= 0  # for which the blocks have no derivative
        return not (forward_mode or inside_functorch() or torch.is_autocast_enabled("cpu"))

    @cached
    def _masked(self) -> Tensor:
        return self.weight * self.mask

    @cached
    def _in_blocks(self) -> list[Tensor]:
        return _masked_blocks(self.weight, self.mask, self.blocks)


Blocks = list[tuple[int, int, int]]


def _masked_blocks(weight: Tensor, mask: Tensor, blocks: Blocks) -> list[Tensor]:
    return [weight[a:b, :seen] * mask[a:b, :seen] for a, b, seen in blocks]


def _products(x: Tensor, weights: list[Tensor], bias: Tensor, blocks: Blocks) -> Tensor:
    y = x.new_empty(len(x), len(bias))
    for (a, b, seen), weight in zip(blocks, weights, strict=True):
        torch.addmm(bias[a:b], x[:, :seen], weight.T, out=y[:, a:b])
    return y


class _InBlocks(torch.autograd.Function):
    """The masked linear map of rows, and its gradient, by products that leave out what the mask makes zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, blocks: Blocks) -> Tensor:
        weights = _masked_blocks(weight, mask, blocks)
        ctx.save_for_backward(x, weight, mask, *weights)
        ctx.blocks = blocks
        return _products(x, weights, bias, blocks)

    @staticmethod
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None, None]:
        x, weight, mask, *weights = ctx.saved_tensors
        to_bias = to_y.sum(0)
        several = inside_functorch() or torch._C._functorch.is_legacy_batchedtensor(to_y)
        if several or torch.is_grad_enabled():  # many gradients at once, or a gradient of the gradient
            return to_y @ (weight * mask), (to_y.T @ x) * mask, to_bias, None, None
        to_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for (a, b, seen), part in zip(ctx.blocks, weights, strict=True):
            if to_x is not None:
                to_x[:, :seen].addmm_(to_y[:, a:b], part)
            if to_weight is not None:
                torch.mul(to_y[:, a:b].T @ x[:, :seen], mask[a:b, :seen], out=to_weight[a:b, :seen])
        return to_x, to_weight, to_bias, None, None


def _order(features: int, order: str | Sequence[int] | Tensor, seed: int | None) -> Tensor:
    if isinstance(order, str):
        check_option("order", order, ("sequential", "reversed", "random"))
        if order == "random":
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            return torch.randperm(features, generator=generator)
        positions = torch.arange(features)
        return positions.flip(0) if order == "reversed" else positions
    given = torch.as_tensor(order).cpu()
    if (
        given.is_floating_point()
        or given.shape != (features,)
        or not torch.equal(given.sort().values, torch.arange(features))
    ):
        raise ValueError(f"expected an order that is a permutation of 0 to {features - 1}; got {given.tolist()}")
    return given.clone()


class MADE(nn.Module):
    r"""A masked autoencoder: the parameters of each feature from the features before it and the context.

    Feature ``order[k]`` has degree ``k + 1``. A hidden unit of degree ``m`` sees the features of degrees up to
    ``m``, and the outputs of degree ``d`` see hidden units of degrees below ``d``. Where the network is too
    narrow to carry each feature in a unit of its own, a direct masked map from input to output is added, so
    that every output reaches every earlier feature. With a context there are hidden units of degree 0, so
    that also the first feature's parameters are a nonlinear function of it.

    Args:
        features: number of features.
        num_parameters: outputs for each feature.
        hidden_features: widths of the hidden layers, or of the residual blocks.
        context_features: length of the context, which reaches every unit.
        order: "sequential", "reversed", "random", or the features in the order of their dependence.
        seed: seeds the random order; by default torch's global generator.
        residual: whether the hidden layers are residual blocks.
        activation: as in :class:`MLP`.
        dropout: share of hidden units dropped, in training only.
        zero_last: start with an output of zero.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``;
        output: ``(*batch, features, num_parameters)``.

    Raises:
        ValueError: a size is not positive, or the order not a permutation.

    References:
        MADE: Masked Autoencoder for Distribution Estimation, Germain et al., 2015 (arXiv:1502.03509).

    Example:
        >>> made = MADE(3, 2, hidden_features=(16,), zero_last=False)
        >>> x = torch.zeros(3, requires_grad=True)
        >>> made(x)[1].sum().backward()  # the second feature sees the first alone
        >>> x.grad != 0
        tensor([ True, False, False])
    """

    order: Tensor

    def __init__(
        self,
        features: int,
        num_parameters: int,
        *,
        hidden_features: Sequence[int] = (128, 128),
        context_features: int = 0,
        order: str | Sequence[int] | Tensor = "sequential",
        seed: int | None = None,
        residual: bool = False,
        activation: str = "relu",
        dropout: float = 0.0,
        zero_last: bool = True,
    ):
        super().__init__()
        hidden_features = as_widths("hidden_features", hidden_features)
        check_sizes(features=features, num_parameters=num_parameters)
        self.features, self.num_parameters = features, num_parameters
        self.register_buffer("order", _order(features, order, seed))
        degrees = torch.empty(features, dtype=torch.long)
        degrees[self.order] = torch.arange(1, features + 1)
        lowest = 0 if context_features or features == 1 else 1
        span = features - lowest
        # Degrees are spread evenly over the units and sorted, so that units of one degree lie together.
        hidden = [lowest + torch.arange(width) * span // width for width in hidden_features]
        output = degrees.repeat_interleave(num_parameters) - 1
        widths = [hidden[0]] * (1 + 2 * len(hidden)) if residual and hidden else hidden
        stack = [degrees, *widths, output]
        # Between hidden layers, whose units are sorted by degree whatever the order, a block sees the first units only.
        maps = (
            MaskedLinear(above[:, None] >= below, _BLOCK if 0 < number < len(stack) - 2 else None)
            for number, (below, above) in enumerate(pairwise(stack))
        )
        self.network = MLP(
            features,
            features * num_parameters,
            hidden_features=hidden_features,
            context_features=context_features,
            residual=residual,
            activation=activation,
            dropout=dropout,
            zero_last=zero_last,
            linear=lambda *_: next(maps),
        )
        # Of the inputs of each map, in order: how many are known before step d, at which feature order[d] is found.
        self.units_before = [list(range(features + 1))]
        self.units_before += [[int((units < degree).sum()) for degree in range(features + 1)] for units in widths]
        narrow = bool(hidden_features) and min(hidden_features) < span
        self.direct = MaskedLinear(output[:, None] >= degrees) if narrow else None
        if self.direct is not None:
            self.direct.register_parameter("bias", None)
            if zero_last:
                nn.init.zeros_(self.direct.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        parameters = self.network(x, context)
        if self.direct is not None:
            parameters = parameters + self.direct(x)
        return parameters.unflatten(-1, (self.features, self.num_parameters))
