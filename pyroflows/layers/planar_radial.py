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


class _WithOffsets(Bijection):
    """A map with a few learned vectors, to which an MLP of the context, if any, adds offsets."""

    def __init__(self, features: int, context_features: int, hidden_features: Sequence[int], **parameters: Tensor):
        super().__init__(features, context_features=context_features)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.sizes = {name: value.numel() for name, value in parameters.items()}
        outputs = sum(self.sizes.values())
        self.conditioner = MLP(context_features, outputs, hidden_features=hidden_features) if context_features else None

    def _with_offsets(self, context: Tensor | None) -> list[Tensor]:
        parameters = [getattr(self, name) for name in self.sizes]
        if self.conditioner is None:
            return parameters
        offsets = self.conditioner(context).split(list(self.sizes.values()), dim=-1)
        return [parameter + offset for parameter, offset in zip(parameters, offsets, strict=True)]


class Planar(_WithOffsets):
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
        >>> planar, x = Planar(3).double(), torch.randn(5, 3, dtype=torch.float64)
        >>> torch.allclose(planar.inverse_and_log_det(planar(x))[0], x)
        True
    """

    inverse_passes = _NEWTON_STEPS

    def __init__(self, features: int, *, context_features: int = 0, hidden_features: Sequence[int] = (64,)):
        check_sizes(features=features)
        u, w = 0.1 * torch.randn(features) / features**0.5, torch.randn(features) / features**0.5
        super().__init__(features, context_features, hidden_features, u=u, w=w, b=torch.zeros(1))

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
        u, w, b = self._with_offsets(context)
        product = (w * u).sum(-1)
        slope = F.elu(product, alpha=_BOUND)
        squared_norm = w.square().sum(-1).clamp_min(torch.finfo(w.dtype).tiny)
        u = u + ((slope - product) / squared_norm).unsqueeze(-1) * w
        return u, w, b.squeeze(-1), slope


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


class Radial(_WithOffsets):
    r"""A contraction or expansion around a centre, which decays with the distance from it.

    .. math::
        y = x + k q \, (x - c), \quad q = \frac{\alpha}{\alpha + \|x - c\|}, \qquad
        \log|\det dy/dx| = (d - 1) \log(1 + k q) + \log(1 + k q^2)

    With :math:`\beta = \alpha k` this is the map of the paper, invertible for :math:`k > -1`. Here ``k`` is an ELU
    of the parameter ``strength`` with values above -0.999, so that zero is the identity. The inverse is in closed form.

    Args:
        features, context_features, hidden_features: as in :class:`Planar`.

    Shapes:
        x, y: ``(*batch, features)``; context: ``(*batch, context_features)``.

    References:
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> radial, x = Radial(3).double(), torch.randn(5, 3, dtype=torch.float64)
        >>> torch.allclose(radial.inverse_and_log_det(radial(x))[0], x)
        True
    """

    def __init__(self, features: int, *, context_features: int = 0, hidden_features: Sequence[int] = (64,)):
        check_sizes(features=features)
        center, log_alpha, strength = 0.1 * torch.randn(features), torch.zeros(1), 0.1 * torch.randn(1)
        parameters = {"center": center, "log_alpha": log_alpha, "strength": strength}
        super().__init__(features, context_features, hidden_features, **parameters)

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
        center, log_alpha, strength = self._with_offsets(context)
        return center, log_alpha.exp(), F.elu(strength, alpha=_BOUND)
