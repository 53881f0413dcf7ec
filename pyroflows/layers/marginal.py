"""Fixed maps of single features towards normal ones, fitted to the columns of a table."""

import math

import torch
from torch import Tensor

from pyroflows.arguments import as_float_tensor
from pyroflows.bijection import Bijection, Pair

__all__ = ["Gaussianize", "Sinh"]

_END = 30.0  # of a Sinh, from where on it goes on as its tangent
_STEPS = 64  # bisections of an interval, which then is as wide as rounding


class Sinh(Bijection):
    r"""The hyperbolic sine of each feature, which makes tails: of data over decades, on one side or on both.

    .. math:: y_i = \mu_i + s_i \sinh x_i, \qquad \log|\det dy/dx| = \sum_i \log s_i + \log\cosh x_i

    From data to latent it is about the logarithm of the distance from :math:`\mu_i` where this is more than
    :math:`s_i`, and linear below. It has no end, so that no number has density zero. Beyond latents of 30, thirteen
    decades off, it goes on as its tangent, so that none overflows.

    Args:
        loc: the numbers from which distances are taken, one for each feature.
        scale: the distances up to which it is about linear, of the same shape.

    Shapes:
        x, y: ``(*batch, features)``.

    Raises:
        ValueError: the shapes differ, a number is not finite, or a scale is not positive.

    References:
        Alternative Transformations to Handle Extreme Values of the Dependent Variable, Burbidge et al., 1988.

    Example:
        >>> Sinh(torch.zeros(2), torch.tensor([1.0, 2.0]))(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor):
        loc, scale = as_float_tensor(loc), as_float_tensor(scale)
        if loc.dim() != 1 or loc.shape != scale.shape:
            raise ValueError(f"expected loc and scale of one shape (features,); got {(*loc.shape,)}, {(*scale.shape,)}")
        if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise ValueError("expected finite numbers and scales above 0; got others")
        super().__init__(len(loc))
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        inner = x.clamp(-_END, _END)
        tangent = torch.sign(x) * (math.sinh(_END) + math.cosh(_END) * (x.abs() - _END))
        y = torch.where(x.abs() > _END, tangent, torch.sinh(inner))
        return self.loc + self.scale * y, (self.scale.log() + torch.cosh(inner).log()).sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        ratio = (y - self.loc) / self.scale
        end = math.sinh(_END)
        inner = ratio.clamp(-end, end)
        tangent = torch.sign(ratio) * (_END + (ratio.abs() - end) / math.cosh(_END))
        x = torch.where(ratio.abs() > end, tangent, torch.asinh(inner))
        return x, -(self.scale.log() + torch.hypot(inner, torch.ones_like(inner)).log()).sum(-1)


class Gaussianize(Bijection):
    r"""The quantile function of a Gaussian mixture for each feature, at normal probabilities.

    .. math::
        x_i = \Phi^{-1}\Bigl(\sum_k w_{ik} \Phi\Bigl(\frac{y_i - \mu_{ik}}{\sigma_{ik}}\Bigr)\Bigr)

    maps data that have these mixtures as their marginal distributions to standard normal latents. The other way is
    found by bisection, with exact derivatives.

    Args:
        loc: means of the components.
        scale: their standard deviations.
        weights: their weights, above 0, normalised here.

    Shapes:
        loc, scale, weights: ``(features, components)``; x, y: ``(*batch, features)``.

    Raises:
        ValueError: the shapes differ, or a scale or a weight is not positive.

    References:
        Gaussianization Flows, Meng et al., 2020 (arXiv:2003.01941).

    Example:
        >>> layer = Gaussianize(torch.tensor([[-1.0, 1.0]]), torch.full((1, 2), 0.5), torch.ones(1, 2))
        >>> layer.inv(torch.zeros(1, 1))  # the median
        tensor([[0.]])
    """

    loc: Tensor
    scale: Tensor
    weights: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, weights: Tensor):
        loc, scale, weights = as_float_tensor(loc), as_float_tensor(scale), as_float_tensor(weights)
        if loc.dim() != 2 or not loc.shape == scale.shape == weights.shape:
            got = f"{(*loc.shape,)}, {(*scale.shape,)} and {(*weights.shape,)}"
            raise ValueError(f"expected loc, scale and weights of one shape (features, components); got {got}")
        if not (loc.isfinite().all() and (scale > 0).all() and (weights > 0).all()):
            raise ValueError("expected finite means, and scales and weights above 0; got others")
        super().__init__(len(loc))
        for name, value in (("loc", loc), ("scale", scale), ("weights", weights / weights.sum(-1, keepdim=True))):
            self.register_buffer(name, value.clone())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        y = self._solve(x)
        for _ in range(2):  # steps of Newton, which change only the derivatives of first and of second order
            value, log_slope = self._to_normal(y)
            y = y - (value - x) / log_slope.exp()
        return y, -self._to_normal(y)[1].sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        x, log_slope = self._to_normal(y)
        return x, log_slope.sum(-1)

    def _to_normal(self, y: Tensor) -> Pair:
        """Return the normal number of the same probability, and the logarithm of its derivative."""
        standard, log_weights = (y[..., None] - self.loc) / self.scale, self.weights.log()
        below = torch.special.log_ndtr(standard) + log_weights
        above = torch.special.log_ndtr(-standard) + log_weights
        is_upper = below.logsumexp(-1) > above.logsumexp(-1)
        tail = torch.where(is_upper[..., None], above, below)  # the side on which no digits are lost
        log_p = tail.logsumexp(-1)
        x = _ndtri_exp(log_p)
        # The ratio of densities by that of hazards, since the densities underflow.
        hazards = _hazard(torch.where(is_upper[..., None], -standard, standard)) / self.scale
        log_slope = (tail.softmax(-1) * hazards).sum(-1).log() - _hazard(x).log()
        return torch.where(is_upper, -x, x), log_slope

    @torch.no_grad()
    def _solve(self, x: Tensor) -> Tensor:
        """Return the data of latents by bisection between the quantiles of the outermost components."""
        ends = self.loc + self.scale * x[..., None]
        low, high = ends.amin(-1), ends.amax(-1)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            is_low = self._to_normal(middle)[0] < x
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        return (low + high) / 2


def _ndtri_exp(log_p: Tensor) -> Tensor:
    """Return the normal quantile of the exponential of a number below log 1/2, also where that underflows."""
    floor = _floor(log_p)
    near = torch.special.ndtri(log_p.clamp(min=floor).exp())
    target = -2 * log_p.clamp(max=floor) - math.log(2 * math.pi)
    size = target.sqrt()
    for _ in range(4):  # Mills' ratio, whose next term is below rounding here
        size = (target - 2 * size.log() + 2 * torch.log1p(_mills(size))).sqrt()
    return torch.where(log_p < floor, -size, near)


def _hazard(x: Tensor) -> Tensor:
    """Return the normal density over the normal probability of smaller numbers."""
    end = math.sqrt(-2 * _floor(x))
    inner = x.clamp(min=-end)
    near = torch.exp(-0.5 * inner.square() - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(inner))
    size = x.clamp(max=-end).abs()
    return torch.where(x < -end, size / (1 + _mills(size)), near)


def _mills(size: Tensor) -> Tensor:
    """Return what Mills' ratio of a large number, times it, adds to one."""
    inverse = size.square().reciprocal()
    return inverse * (-1 + inverse * (3 - 15 * inverse))


def _floor(x: Tensor) -> float:
    return math.log(torch.finfo(x.dtype).tiny) + 2
