"""Masked autoregressive layers: each feature is transformed by the features before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.arguments import check_names
from pyroflows.bijection import Bijection
from pyroflows.gradients import vjp
from pyroflows.layers.inversion import closed, invert
from pyroflows.layers.transformers import Transformer, make_transformer, transform
from pyroflows.networks.made import MADE
from pyroflows.private import inside_functorch

__all__ = ["MaskedAutoregressive"]


class MaskedAutoregressive(Bijection):
    r"""A masked autoregressive layer: one pass from data to latent; the other way each unit once, in order.

    .. math:: y_i = f(x_i; \theta_i(y_{<i}, c)), \quad \log|\det dy/dx| = \sum_i \log|f'(x_i)|

    A stack of these is a MAF, quickest to score; a stack of their inverses (``layer.inv``, or
    :class:`~pyroflows.Inverse`) is an IAF, quickest to sample and to score what it sampled. The other direction is
    exact too, and has gradients (of first order): see :func:`pyroflows.layers.inversion.invert`. Under
    ``torch.compile`` and ``torch.func``, and with dropout in training, it takes a pass for each feature.

    Args:
        features: number of features.
        transformer: "affine", "additive", "spline", or a :class:`Transformer` with options of its own.
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
        check_names(network, MADE, but=("features", "num_parameters", "context_features", "order"))
        self.transformer = make_transformer(transformer)
        self.conditioner = MADE(
            features, self.transformer.num_parameters, context_features=context_features, order=order, **network
        )
        self.forward_passes = 2  # about as much, for all features

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dropout = self.conditioner.network.dropout
        if inside_functorch() or torch.compiler.is_compiling() or (dropout.p and dropout.training):
            return self._in_passes(x, context)
        y, log_det = invert(self.conditioner, self.transformer, x, context)
        sources = [x, *self.conditioner.parameters()] + ([] if context is None else [context])
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            given = y.requires_grad_()
            y, log_det = closed(*self.transformer.forward(x, self.conditioner(given, context)), given)
        return y, log_det.sum(-1)

    def _in_passes(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Find a feature a pass: what maps and compiles, and sees one network where dropout makes a new one a pass."""
        y, *features = torch.zeros_like(x), *self.conditioner.order.unbind()
        positions = torch.arange(x.shape[-1], device=x.device)
        for feature in features[:-1]:
            found, _ = self.transformer.forward(x, self.conditioner(y, context))
            # Features not yet found stay zero: no wild value of theirs can reach a masked product.
            y = torch.where(positions == feature, found, y)
        y, log_det = self.transformer.forward(x, self.conditioner(y, context))
        return y, log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return transform(self.transformer, y, self.conditioner(y, context), forward=False)

    def inverse_and_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map, and carry a score along: one pass, and backward passes until the score settles, at most one a feature.

        The Jacobian is triangular, so that the fixed point below is reached in as many steps as there are features,
        and to rounding mostly in a few.
        """
        with torch.enable_grad():
            given = y if y.requires_grad else y.detach().requires_grad_()
            moved, seen = given.view_as(given), given.view_as(given)
            x, log_det = self.transformer.inverse(moved, self.conditioner(seen, context))
        ones = torch.ones_like(score)
        score = score - vjp(log_det, None, moved, ones) - vjp(log_det, None, seen, ones)
        steepness, number = (-log_det.detach()).exp(), torch.finfo(y.dtype)
        found = score * steepness
        for _ in range(x.shape[-1]):
            previous = found
            found = (score - vjp(x, None, seen, previous)) * steepness
            # Features not yet found may be wild, and must not overflow into those that are.
            found = torch.where(found.abs() < number.max**0.5, found, 0)
            if ((found - previous).abs().amax(-1) <= 8 * number.eps * found.abs().amax(-1)).all():
                break
        return x if torch.is_grad_enabled() else x.detach(), log_det.sum(-1), found

    def extra_repr(self) -> str:
        return f"{self.latent_shape[0]}, transformer={self.transformer}"
