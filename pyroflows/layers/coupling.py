"""Coupling layers: some features transform the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyroflows.arguments import as_mask, check_sizes
from pyroflows.bijection import Bijection, Pair, Triple
from pyroflows.gradients import vjp
from pyroflows.layers.transformers import (
    Transform,
    Transformer,
    make_transformer,
    num_parameters,
    pull_back,
    split_by_parameter,
)
from pyroflows.networks.mlp import MLP, make_conditioner

__all__ = ["Coupling"]


class Coupling(Bijection):
    r"""A coupling layer: identity features give, through a network, the parameters that transform the others.

    .. math:: y_k = x_k, \quad y_m = f(x_m; \theta(x_k, c)), \quad \log|\det dy/dx| = \sum_m \log|f'(x_m)|

    Args:
        features: number of features.
        transformer: "affine", "additive", "spline", or a :class:`Transformer` with other options.
        mask: "halves" (the second half is transformed), "checkerboard" (even positions are), or a boolean for each
            feature, true where it is transformed.
        flip: exchange transformed and identity features.
        context_features: length of the context.
        conditioner: a network from ``(identity features, context)`` to ``(*batch, outputs)``: the first parameter of
            all transformed features, then the second, and so on; by default an :class:`MLP`.
        network: options of that MLP, such as ``hidden_features=(128, 128)`` or ``residual=True``.

    Shapes:
        x, y: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, a mask or option is unknown, or the conditioner returns another shape.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Neural Spline Flows, Durkan et al., 2019 (arXiv:1906.04032).

    Example:
        >>> layer = Coupling(4, mask="checkerboard", hidden_features=(16,))
        >>> layer(torch.zeros(3, 4)).shape
        torch.Size([3, 4])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(
        self,
        features: int,
        *,
        transformer: str | Transformer = "affine",
        mask: str | Sequence[bool] | Tensor = "halves",
        flip: bool = False,
        context_features: int = 0,
        conditioner: nn.Module | None = None,
        **network: Any,
    ):
        check_sizes(features=features)
        super().__init__(features, context_features=context_features)
        mask = as_mask(mask, features, flip=flip)
        order = torch.cat([(~mask).nonzero()[:, 0], mask.nonzero()[:, 0]])  # identity features first
        # Two runs of features are views of the input; others are read and written by index.
        self.in_runs = torch.equal((order - order[0]) % features, torch.arange(features))
        self.transformed_first = self.in_runs and bool(mask[0])
        self.num_transformed = int(mask.sum())
        sizes = (features - self.num_transformed, self.num_transformed)
        self.sizes = sizes[::-1] if self.transformed_first else sizes
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())
        self.transformer = make_transformer(transformer)
        self.output_shape = Size((self.num_transformed * num_parameters(self.transformer),))
        self.conditioner = make_conditioner(conditioner, MLP, sizes[0], self.output_shape[0], context_features, network)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return self._map(self.transformer.forward, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        return self._map(self.transformer.inverse, y, context)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        return self._map_with_score(self.transformer.forward, x, score, context)

    def inverse_and_score(self, y: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        return self._map_with_score(self.transformer.inverse, y, score, context)

    def _map(self, transform: Transform, x: Tensor, context: Tensor | None) -> Pair:
        identity, x = self._split(x)
        y, log_det = transform(x, *self._parameters_from(self.conditioner(identity, context), x))
        return self._merge(identity, y), log_det.sum(-1)

    def _map_with_score(self, transform: Transform, x: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        """Map, and pull the score back through the same graph, conditioner included."""
        identity_score, score = self._split(score)
        with torch.enable_grad():
            identity, x = self._split(x if x.requires_grad else x.detach().requires_grad_())
            x = x.view_as(x)  # a node of its own, or the way to it would lead through the conditioner
            output = self.conditioner(identity, context)
            y, log_det = transform(x, *self._parameters_from(output, x))
        score, output_gradient = pull_back(x, output, y, log_det, score)
        identity_score = identity_score - vjp(output, None, identity, output_gradient)
        return self._merge(identity, y), log_det.sum(-1), self._merge(identity_score, score)

    def _parameters_from(self, output: Tensor, x: Tensor) -> Sequence[Tensor]:
        return split_by_parameter(self.transformer, output, x, self.output_shape)

    def _split(self, x: Tensor) -> Pair:
        """Split features into identity and transformed ones."""
        first, second = (x if self.in_runs else x.index_select(-1, self.order)).split_with_sizes(self.sizes, -1)
        return (second, first) if self.transformed_first else (first, second)

    def _merge(self, identity: Tensor, transformed: Tensor) -> Tensor:
        x = torch.cat([transformed, identity] if self.transformed_first else [identity, transformed], -1)
        return x if self.in_runs else x.index_select(-1, self.inverse_order)

    def extra_repr(self) -> str:
        return f"{self.latent_shape[0]}, transformed={self.num_transformed}, transformer={self.transformer}"
