"""Multilayer perceptrons that compute the parameters of layers."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from pyroflows.arguments import as_widths, check_names, check_number, check_option, check_sizes
from pyroflows.recipe import Recorded

__all__ = ["ACTIVATIONS", "MLP", "NetworkOptions", "make_conditioner"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
}

LinearFactory = Callable[[int, int], nn.Linear]


class NetworkOptions(TypedDict, total=False):
    """Options of each network of a named flow; see :class:`MLP`."""

    hidden_features: Sequence[int]
    residual: bool
    activation: str
    dropout: float


class MLP(Recorded, nn.Module):
    r"""A multilayer perceptron, plain or residual, of an input and an optional context.

    The plain network is :math:`W_n a(\dots a(W_0 x + C c))`; a residual block is
    :math:`h \leftarrow h + B\, a(A\, a(h))`.

    Args:
        in_features: length of the input; 0 for a function of the context alone, or a learned constant.
        out_features: length of the output.
        hidden_features: widths of the hidden layers, or of the residual blocks, which are all equal.
        context_features: length of the context, which enters the first layer.
        residual: whether the hidden layers are residual blocks of two linear maps.
        activation: one of "relu", "silu", "gelu", "elu", "tanh", "leaky_relu".
        dropout: probability of dropping a hidden unit, in training only.
        zero_last: initialise the output to zero, and so the layer that uses the network to the identity.
        linear: builds each linear map, in order, from its numbers of inputs and outputs.

    Shapes:
        x: ``(*batch, in_features)``; context: ``(*batch, context_features)``; output: ``(*batch, out_features)``.

    Raises:
        ValueError: a size is not positive, an option unknown, or residual widths differ.

    References:
        Identity Mappings in Deep Residual Networks, He et al., 2016 (arXiv:1603.05027).

    Example:
        >>> MLP(3, 2, hidden_features=(16, 16), residual=True)(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: Sequence[int] = (128, 128),
        context_features: int = 0,
        residual: bool = False,
        activation: str = "relu",
        dropout: float = 0.0,
        zero_last: bool = True,
        linear: LinearFactory = nn.Linear,
    ):
        super().__init__()
        hidden_features = as_widths("hidden_features", hidden_features)
        check_sizes(out_features=out_features)
        check_number("in_features", in_features, "[0, inf)")
        check_option("activation", activation, ACTIVATIONS)
        check_number("dropout", dropout, "[0, 1)")
        if residual and len(set(hidden_features)) != 1:
            raise ValueError(f"expected residual blocks of one width; got hidden_features={hidden_features}")
        self.in_features, self.out_features, self.residual = in_features, out_features, residual
        # Without residuals nothing reads a hidden unit before its activation.
        in_place = activation == "relu" and not residual and bool(hidden_features)
        self.activation = torch.relu_ if in_place else ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        # Without inputs the network learns a constant: its first layer sees a single 1.
        sizes = [max(in_features, 1), *(hidden_features[:1] if residual else hidden_features), out_features]
        pairs = list(pairwise(sizes))
        blocks = [(width, width) for width in hidden_features for _ in range(2)] if residual else []
        self.linears = nn.ModuleList(linear(*pair) for pair in [pairs[0], *blocks, *pairs[1:]])
        self.context = nn.Linear(context_features, sizes[1], bias=False) if context_features else None
        for second_of_block in self.linears[2::2] if residual else []:
            nn.init.uniform_(second_of_block.weight, -1e-3, 1e-3)  # type: ignore[arg-type]
        if zero_last:
            # The map of the context is one of the last if there is no hidden layer.
            last = self if len(self.linears) == 1 else self.linears[-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.in_features == 0:
            x = x.new_ones((*x.shape[:-1], 1))
        first, *inner = self.linears
        h = first(x)
        if self.context is not None:
            h = h + self.context(context)
        if self.residual:
            *blocks, last = inner
            for a, b in zip(blocks[::2], blocks[1::2], strict=True):
                h = h + b(self.dropout(self.activation(a(self.activation(h)))))
            return last(self.activation(h))
        activation, dropout = self.activation, self.dropout
        for linear in inner:
            h = activation(h)
            h = linear(dropout(h) if dropout.p else h)
        return h


def make_conditioner(
    conditioner: nn.Module | None,
    default: type[nn.Module],
    inputs: int,
    outputs: int,
    context_features: int,
    options: dict[str, Any],
) -> nn.Module:
    """Return the conditioner, or else a network of the default class with these options."""
    if conditioner is None:
        fixed = ("in_features", "out_features", "in_channels", "out_channels", "context_features", "linear")
        check_names(options, default, exclude=fixed)
        return default(inputs, outputs, context_features=context_features, **options)
    if options:
        raise TypeError(f"`conditioner` cannot be combined with options of a network; got {', '.join(options)}")
    return conditioner
