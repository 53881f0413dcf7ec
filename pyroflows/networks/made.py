"""Masked autoencoders: networks each of whose outputs sees only the features before its own."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.arguments import as_permutation, as_widths, check_option, check_sizes
from pyroflows.caching import cached
from pyroflows.networks.mlp import MLP

__all__ = ["MADE", "MaskedLinear"]

_BLOCK, _ROWS = 128, 64  # outputs of a block and rows of the input, below which blocks are slower than one product


class MaskedLinear(nn.Linear):
    """A linear map whose weight is multiplied by a fixed mask.

    Args:
        mask: which inputs reach which outputs, shape ``(out_features, in_features)``.
        block: outputs of a block. On a CPU each block is a product of its own, without the inputs after the last that
            the block sees; by default all outputs are one block.

    Shapes:
        x: ``(*batch, in_features)``; output: ``(*batch, out_features)``.

    Example:
        >>> MaskedLinear(torch.eye(2, dtype=torch.bool)).weight.shape
        torch.Size([2, 2])
    """

    mask: Tensor

    def __init__(self, mask: Tensor, block: int | None = None):
        super().__init__(mask.shape[1], mask.shape[0])
        # Of the weight's dtype: a product of two dtypes is several times slower.
        self.register_buffer("mask", mask.to(self.weight.dtype))
        self.block = block or mask.shape[0]
        self.num_seen = [int(rows.any(0).nonzero().max()) + 1 if rows.any() else 0 for rows in mask.split(self.block)]

    def forward(self, input: Tensor) -> Tensor:
        few_rows = input.numel() < _ROWS * input.shape[-1]
        if len(self.num_seen) == 1 or few_rows or not input.is_cpu or torch.compiler.is_compiling():
            return F.linear(input, self._masked_weight(), self.bias)
        blocks = zip(self.num_seen, self._masked_blocks(), self.bias.split(self.block), strict=True)
        return torch.cat([F.linear(input[..., :seen], weight, bias) for seen, weight, bias in blocks], -1)

    @cached
    def _masked_weight(self) -> Tensor:
        return self.weight * self.mask

    @cached
    def _masked_blocks(self) -> list[Tensor]:
        rows = zip(self.num_seen, self.weight.split(self.block), self.mask.split(self.block), strict=True)
        return [weight[:, :seen] * mask[:, :seen] for seen, weight, mask in rows]


class MADE(nn.Module):
    r"""A masked autoencoder: the parameters of each feature from the features before it and the context.

    Feature ``order[k]`` has degree ``k + 1``. A hidden unit of degree ``m`` sees the features of degrees up to ``m``,
    and the outputs of degree ``d`` see the hidden units of degrees below ``d``. If a hidden layer has fewer units than
    there are features to tell apart, a direct masked map from input to output is added, so that every output sees
    every earlier feature. With a context there are hidden units of degree 0, so that the parameters of the first
    feature are a nonlinear function of it too.

    Args:
        features: number of features.
        num_parameters: outputs for each feature.
        hidden_features, residual, activation, dropout, zero_last: as in :class:`MLP`.
        context_features: length of the context, which every unit sees.
        order: "sequential", "reversed", "random", or the features in the order of their dependence.
        seed: seed of a random order, which is then the same whenever the network is built; None for torch's global
            generator: Pyro's parameter store does not hold the order.

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
        >>> made(x)[1].sum().backward()  # the second feature sees only the first
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
        seed: int | None = 0,
        residual: bool = False,
        activation: str = "relu",
        dropout: float = 0.0,
        zero_last: bool = True,
    ):
        super().__init__()
        hidden_features = as_widths("hidden_features", hidden_features)
        check_sizes(features=features, num_parameters=num_parameters)
        self.features, self.num_parameters = features, num_parameters
        if isinstance(order, str):
            check_option("order", order, ("sequential", "reversed", "random"))
        self.register_buffer("order", as_permutation(order, features, seed))
        degrees = torch.empty(features, dtype=torch.long)
        degrees[self.order] = torch.arange(1, features + 1)
        lowest = 0 if context_features or features == 1 else 1
        span = features - lowest
        # Degrees are spread evenly over the units and sorted, so that units of one degree are adjacent.
        hidden = [lowest + torch.arange(width) * span // width for width in hidden_features]
        output = degrees.repeat_interleave(num_parameters) - 1
        widths = [hidden[0]] * (1 + 2 * len(hidden)) if residual and hidden else hidden
        stack = [degrees, *widths, output]
        # Between hidden layers, whose units are sorted by degree, a block of outputs sees only the first units.
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
        # For each map: how many of its inputs, by degree, are known before step d, which computes feature order[d].
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
