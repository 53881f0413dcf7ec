"""Radial flows: contraction or expansion around a centre."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.arguments import check_sizes
from pyroflows.bijection import Bijection, Pair
from pyroflows.networks.mlp import MLP

__all__ = ["Radial"]

_BOUND = 0.999


class Radial(Bijection):
    r"""A contraction or expansion around a centre, which decays with the distance from it.

    .. math::
        y = x + k q \, (x - c), \quad q = \frac{\alpha}{\alpha + \|x - c\|}, \qquad
        \log|\det dy/dx| = (d - 1) \log(1 + k q) + \log(1 + k q^2)

    With :math:`\beta = \alpha k` this is the map of the paper, invertible for :math:`k > -1`. Here ``k`` is an ELU
    of the parameter ``strength`` with values above -0.999, so that zero is the identity. The inverse is in closed form.

    Args:
        features: number of features.
        context_features: length of the context, from which an MLP computes an offset of the parameters.
        hidden_features: widths of the MLP's hidden layers.

    Shapes:
        x, y: ``(*batch, features)``; context: ``(*batch, context_features)``.

    References:
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> radial = Radial(3).double()
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> y, log_det = radial.forward_and_log_det(x)
        >>> torch.allclose(radial.inverse_and_log_det(y)[0], x)
        True
    """

    def __init__(self, features: int, *, context_features: int = 0, hidden_features: Sequence[int] = (64,)):
        super().__init__(features, context_features=context_features)
        check_sizes(features=features)
        self.center = nn.Parameter(0.1 * torch.randn(features))
        self.log_alpha = nn.Parameter(torch.zeros(1))
        self.strength = nn.Parameter(0.1 * torch.randn(1))
        self.conditioner = (
            MLP(context_features, features + 2, hidden_features=hidden_features) if context_features else None
        )

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        center, alpha, strength = self._parameters_for(context)
        offset = x - center
        radius = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        closeness = alpha / (alpha + radius)
        return center + offset * (1 + strength * closeness), self._log_det(strength, closeness)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        center, alpha, strength = self._parameters_for(context)
        offset = y - center
        radius = self._radius(torch.linalg.vector_norm(offset, dim=-1, keepdim=True), alpha, strength)
        closeness = alpha / (alpha + radius)
        return center + offset / (1 + strength * closeness), -self._log_det(strength, closeness)

    def _radius(self, stretched: Tensor, alpha: Tensor, strength: Tensor) -> Tensor:
        """Solve ``stretched = r + alpha * strength * r / (alpha + r)``, a quadratic, for its positive root."""
        half = 0.5 * (alpha + alpha * strength - stretched)
        # Of the two forms of the root the one that adds numbers of equal sign; `total` is never zero.
        total = half.abs() + torch.sqrt(half.square() + alpha * stretched)
        return torch.where(half > 0, alpha * stretched / total, total)

    def _log_det(self, strength: Tensor, closeness: Tensor) -> Tensor:
        across = torch.log1p(strength * closeness)
        along = torch.log1p(strength * closeness.square())
        return ((self.latent_shape[0] - 1) * across + along).squeeze(-1)

    def _parameters_for(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        center, log_alpha, strength = self.center, self.log_alpha, self.strength
        if self.conditioner is not None:
            to_center, to_alpha, to_strength = self.conditioner(context).split((center.shape[0], 1, 1), dim=-1)
            center, log_alpha, strength = center + to_center, log_alpha + to_alpha, strength + to_strength
        return center, log_alpha.exp(), F.elu(strength, alpha=_BOUND)

    def extra_repr(self) -> str:
        context = f", context_features={self.context_features}" if self.context_features else ""
        return f"{self.center.shape[0]}{context}"
