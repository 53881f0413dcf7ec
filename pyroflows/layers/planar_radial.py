"""Planar and radial flows: a shift along one direction, and a contraction or expansion around a centre."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.arguments import check_sizes
from pyroflows.bijection import Bijection, Pair
from pyroflows.networks.mlp import MLP

__all__ = ["Planar", "Radial"]

_NEWTON_STEPS = 24  # 9 suffice for slopes up to 100, 23 up to 1e10; a fixed number works under compile and vmap
_BOUND = 0.999


class Planar(Bijection):
    r"""A shift along ``u`` by the squashed distance of a point from the plane ``w . x + b = 0``.

    .. math::
        y = x + \hat u \tanh(s), \quad s = w^\top x + b, \qquad
        \log|\det dy/dx| = \log(1 + w^\top \hat u \, (1 - \tanh^2 s))

    The map is invertible where :math:`w^\top \hat u > -1`, which is ensured by
    :math:`\hat u = u + (m(w^\top u) - w^\top u) \, w / \|w\|^2`.
    Here :math:`m` is an ELU with values above -0.999: unlike the softplus of the paper it hardly changes a valid ``u``,
    and stays bounded as ``w`` goes to zero.

    The inverse solves one scalar equation per row, :math:`s + w^\top \hat u \tanh s = w^\top y + b`, by Newton's
    method, which is slower than the forward direction but as accurate, with exact first and second derivatives.

    Args:
        features: number of features.
        context_features: length of the context, from which an MLP computes an offset of ``u``, ``w`` and ``b``.
        hidden_features: widths of the MLP's hidden layers.

    Shapes:
        x, y: ``(*batch, features)``; context: ``(*batch, context_features)``.

    References:
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> planar = Planar(3).double()
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> y, log_det = planar.forward_and_log_det(x)
        >>> torch.allclose(planar.inverse_and_log_det(y)[0], x)
        True
    """

    inverse_passes = _NEWTON_STEPS

    def __init__(self, features: int, *, context_features: int = 0, hidden_features: Sequence[int] = (64,)):
        super().__init__(features, context_features=context_features)
        check_sizes(features=features)
        self.u = nn.Parameter(0.1 * torch.randn(features) / features**0.5)
        self.w = nn.Parameter(torch.randn(features) / features**0.5)
        self.b = nn.Parameter(torch.zeros(1))
        self.conditioner = (
            MLP(context_features, 2 * features + 1, hidden_features=hidden_features) if context_features else None
        )

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        u, w, b, slope = self._parameters_for(context)
        height = torch.tanh((w * x).sum(-1) + b)
        log_det = torch.log1p(slope * (1 - height.square()))
        return x + u * height.unsqueeze(-1), log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        u, w, b, slope = self._parameters_for(context)
        height = torch.tanh(_solve(slope, (w * y).sum(-1) + b))
        log_det = -torch.log1p(slope * (1 - height.square()))
        return y - u * height.unsqueeze(-1), log_det

    def _parameters_for(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u: Tensor = self.u
        w: Tensor = self.w
        b: Tensor = self.b
        if self.conditioner is not None:
            features = u.shape[0]
            to_u, to_w, to_b = self.conditioner(context).split((features, features, 1), dim=-1)
            u, w, b = u + to_u, w + to_w, b + to_b
        product = (w * u).sum(-1)
        slope = F.elu(product, alpha=_BOUND)
        squared_norm = w.square().sum(-1).clamp_min(torch.finfo(w.dtype).tiny)
        u = u + ((slope - product) / squared_norm).unsqueeze(-1) * w
        return u, w, b.squeeze(-1), slope

    def extra_repr(self) -> str:
        context = f", context_features={self.context_features}" if self.context_features else ""
        return f"{self.u.shape[0]}{context}"


def _solve(slope: Tensor, target: Tensor) -> Tensor:
    """Solve ``s + slope * tanh(s) = target`` for ``s``, where ``slope > -1``."""
    with torch.no_grad():
        # The left side is odd, and for positive s concave (slope > 0) or convex (slope < 0). The initial value is on
        # the side of the root from which Newton's steps never overshoot.
        size = target.abs()
        low, high = size - slope, size / (1 + slope)
        s = torch.where(slope > 0, torch.maximum(low, high), torch.minimum(low, high))
        floor, ceiling = torch.minimum(s, size), torch.maximum(s, size)
        for _ in range(_NEWTON_STEPS):
            s = _newton_step(s, slope, size).clamp(floor, ceiling)
        s = torch.where(target < 0, -s, s)
    # These two steps change only the derivatives: the first makes those of first order exact, the second of second.
    return _newton_step(_newton_step(s, slope, target), slope, target)


def _newton_step(s: Tensor, slope: Tensor, target: Tensor) -> Tensor:
    height = torch.tanh(s)
    return s - (s + slope * height - target) / (1 + slope * (1 - height.square()))


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
