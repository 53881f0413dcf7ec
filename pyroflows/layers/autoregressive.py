"""Masked autoregressive layers: each feature is transformed by the features before it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.arguments import check_names
from pyroflows.bijection import Bijection, Pair, Triple
from pyroflows.gradients import vjp
from pyroflows.layers.inversion import invert, invert_in_passes, invert_with_gradient, iterate_to_fixed_point
from pyroflows.layers.transformers import Transformer, make_transformer, num_parameters, split_by_feature
from pyroflows.networks.made import MADE
from pyroflows.private import inside_forward_mode, inside_functorch

__all__ = ["MaskedAutoregressive"]


class MaskedAutoregressive(Bijection):
    r"""A masked autoregressive layer: one pass from data to latent, feature after feature from latent to data.

    .. math:: y_i = f(x_i; \theta_i(y_{<i}, c)), \quad \log|\det dy/dx| = \sum_i \log|f'(x_i)|

    A stack of these is a MAF, fastest at scoring; a stack of their inverses (``layer.inv``, or
    :class:`~pyroflows.Inverse`) is an IAF, fastest at sampling and at scoring its samples. The other direction is
    exact too: see :func:`pyroflows.layers.inversion.invert`. Under ``torch.compile``, ``torch.jit.trace`` and
    ``torch.func``, with dropout in training, and for second derivatives, it takes one pass per feature.

    Args:
        features: number of features.
        transformer: "affine", "additive", "spline", or a :class:`Transformer` with other options.
        order: "sequential", "reversed", "random", or the features in the order of their dependence.
        context_features: length of the context.
        network: further options of the :class:`MADE`, such as ``hidden_features`` or ``residual``.

    Shapes:
        x, y: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, or an option is not one of those above.

    References:
        Masked Autoregressive Flow for Density Estimation, Papamakarios et al., 2017 (arXiv:1705.07057);
        Improved Variational Inference with Inverse Autoregressive Flow, Kingma et al., 2016 (arXiv:1606.04934).

    Example:
        >>> layer = MaskedAutoregressive(3, hidden_features=(16,))
        >>> layer.inv(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]], grad_fn=<MulBackward0>)
    """

    forward_passes = 2  # the approximate cost of the fast inversion

    def __init__(
        self,
        features: int,
        *,
        transformer: str | Transformer = "affine",
        order: str | Sequence[int] | Tensor = "sequential",
        context_features: int = 0,
        **network: Any,
    ):
        super().__init__(features, context_features=context_features)
        check_names(network, MADE, exclude=("features", "num_parameters", "context_features", "order"))
        self.transformer = make_transformer(transformer)
        self.conditioner = MADE(
            features, num_parameters(self.transformer), context_features=context_features, order=order, **network
        )

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        dropout = self.conditioner.network.dropout
        sources = [x, *self.conditioner.parameters()] + ([] if context is None else [context])
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or inside_functorch() or inside_forward_mode()
        if traced or (dropout.p and dropout.training):
            solve = invert_in_passes
        elif torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            solve = invert_with_gradient
        else:
            solve = invert
        y, log_det = solve(self.conditioner, self.transformer, x, context)
        return y, log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        x, log_det = self.transformer.inverse(y, *self._parameters_for(y, context))
        return x, log_det.sum(-1)

    def inverse_and_score(self, y: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        """Map, and pull the score back: one forward pass, and backward passes until the score has converged."""
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            transformed, seen = y.view_as(y), y.view_as(y)
            x, log_det = self.transformer.inverse(transformed, *self._parameters_for(seen, context))
        ones, slope = torch.ones_like(score), (-log_det.detach()).exp()
        score = score - vjp(log_det, None, transformed, ones) - vjp(log_det, None, seen, ones)
        score = iterate_to_fixed_point(lambda at_x: (score - vjp(x, None, seen, at_x)) * slope, score * slope)
        return x if torch.is_grad_enabled() else x.detach(), log_det.sum(-1), score

    def _parameters_for(self, y: Tensor, context: Tensor | None) -> Sequence[Tensor]:
        return split_by_feature(self.transformer, self.conditioner(y, context), y)

    def extra_repr(self) -> str:
        return f"{self.latent_shape[0]}, transformer={self.transformer}"
