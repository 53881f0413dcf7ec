"""Multilayer perceptrons that compute a layer's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "MLP"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
}

LinearFactory = Callable[[int, int], nn.Linear]


def check_sizes(**sizes: int) -> None:
    """Raise a ValueError for a size that is not a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"expected {name} to be a positive integer; got {size!r}")


def check_option(name: str, option: object, options: Sequence[str]) -> None:
    """Raise a ValueError for a name that is not among those offered."""
    if option not in options:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, options))}; got {option!r}")


class MLP(nn.Module):
    r"""A multilayer perceptron, plain or residual, of an input and an optional context.

    The plain network is :math:`W_n a(\dots a(W_0 x + C c))`. The residual one keeps a stream of one
    width, to which each block adds :math:`B\, a(A\, a(h))`.

    Args:
        in_features: length of the input; 0 for a network of the context alone, or a learned constant.
        out_features: length of the output.
        hidden_features: widths of the hidden layers; of the residual blocks, all equal, where ``residual``.
        context_features: length of the context, which enters the first layer and so reaches every unit.
        residual: whether the hidden layers are residual blocks of two linear maps.
        activation: one of "relu", "silu", "gelu", "elu", "tanh", "leaky_relu".
        dropout: share of hidden units dropped, in training only.
        zero_last: start with an output of zero, so that the layer it serves starts as the identity.
        linear: makes the linear maps, in order, from their numbers of inputs and outputs.

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
        hidden_features = tuple(hidden_features)
        check_sizes(out_features=out_features, **{f"hidden_features[{i}]": h for i, h in enumerate(hidden_features)})
        check_option("activation", activation, tuple(ACTIVATIONS))
        if not 0 <= dropout < 1:
            raise ValueError(f"expected dropout in [0, 1); got {dropout!r}")
        if residual and len(set(hidden_features)) != 1:
            raise ValueError(f"expected residual blocks of one width; got hidden_features={hidden_features}")
        self.in_features, self.out_features, self.residual = in_features, out_features, residual
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        inner = [(width, width) for width in hidden_features for _ in range(2)] if residual else []
        widths = [hidden_features[0]] if residual else list(hidden_features)
        # A network of no input learns a constant: its first layer sees a single one.
        sizes = [max(in_features, 1), *widths, out_features]
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.linears = nn.ModuleList(linear(*pair) for pair in (*pairs[:1], *inner, *pairs[1:]))
        self.context = nn.Linear(context_features, sizes[1], bias=False) if context_features else None
        if residual:
            for second in self.linears[2:-1:2]:
                nn.init.uniform_(second.weight, -1e-3, 1e-3)  # type: ignore[arg-type]
        if zero_last:
            nn.init.zeros_(self.linears[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.linears[-1].bias)  # type: ignore[arg-type]
            if len(self.linears) == 1 and self.context is not None:
                nn.init.zeros_(self.context.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.in_features == 0:
            x = torch.ones_like(x[..., :1]) if x.shape[-1] else x.new_ones((*x.shape[:-1], 1))
        first, *inner = self.linears
        h = first(x)
        if self.context is not None:
            h = h + self.context(context)
        if self.residual:
            for a, b in zip(inner[:-1:2], inner[1:-1:2], strict=True):
                h = h + b(self.dropout(self.activation(a(self.activation(h)))))
            inner = inner[-1:]
        for linear in inner:
            h = self.activation(h)
            h = linear(h if self.residual else self.dropout(h))
        return h
