"""Monotone rational-quadratic splines with linear tails."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.arguments import check_number, check_sizes
from pyroflows.recipe import recorded

__all__ = ["Spline"]


@recorded
@dataclass(frozen=True)
class Spline:
    r"""A monotone rational-quadratic spline on ``[-bound, bound]``, the identity outside.

    In the bin with corners :math:`(x_k, y_k)`, width :math:`w`, slope :math:`s` and corner derivatives
    :math:`d_k, d_{k+1}`, with :math:`\xi = (x - x_k) / w`,

    .. math::
        y = y_k + \frac{s w\,(s \xi^2 + d_k \xi(1-\xi))}{q}, \quad
        \frac{dy}{dx} = \frac{s^2 (d_{k+1} \xi^2 + 2 s \xi(1-\xi) + d_k (1-\xi)^2)}{q^2}, \quad
        q = s + (d_{k+1} + d_k - 2s)\,\xi(1-\xi)

    Args:
        num_bins: number of bins.
        bound: half the width of the interval outside of which the spline is the identity.
        min_size: smallest width and height of a bin, relative to the interval.
        min_derivative: smallest derivative at a knot.

    Shapes:
        x, y: ``(*batch, features)``; parameters, raw widths, heights and derivatives of the inner knots:
        ``(*batch, features, num_bins)``, the same, and ``(*batch, features, num_bins - 1)``.

    Raises:
        ValueError: fewer than two bins, a bound or minimum that is not positive, or minima that fill the interval.

    References:
        Neural Spline Flows, Durkan et al., 2019 (arXiv:1906.04032).

    Example:
        >>> x = torch.tensor([-4.0, 0.5])
        >>> y, log_det = Spline(num_bins=4).forward(x, torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3))
        >>> torch.allclose(y, x)  # the identity where the parameters are zero
        True
    """

    num_bins: int = 8
    bound: float = 3.0
    min_size: float = 1e-3
    min_derivative: float = 1e-3

    def __post_init__(self) -> None:
        check_sizes(num_bins=self.num_bins)
        check_number("num_bins", self.num_bins, "[2, inf)")
        check_number("bound", self.bound, "(0, inf)")
        check_number("min_size", self.min_size, f"(0, {1 / self.num_bins:g})")
        check_number("min_derivative", self.min_derivative, "(0, 1)")

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.num_bins,), (self.num_bins,), (self.num_bins - 1,)

    def forward(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside, clamped = self._inside(x)
        x_low, width, y_low, height, d_low, d_high = self._bin(clamped, *parameters, by_data=False)
        slope = height / width
        xi = ((clamped - x_low) / width).clamp(0, 1)
        middle = xi * (1 - xi)
        q = slope + (d_high + d_low - 2 * slope) * middle
        y = y_low + height * (slope * xi.square() + d_low * middle) / q
        log_det = self._log_derivative(xi, slope, d_low, d_high, q)
        return torch.where(inside, self._rounded_inside(y), x), torch.where(inside, log_det, 0)

    def inverse(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside, clamped = self._inside(y)
        x_low, width, y_low, height, d_low, d_high = self._bin(clamped, *parameters, by_data=True)
        slope = height / width
        bend = d_high + d_low - 2 * slope
        rise = ((clamped - y_low) / height).clamp(0, 1)
        # xi solves a xi^2 + b xi + c = 0. Of the two ways to write the root each cancels for one sign of b.
        a = slope - d_low + rise * bend
        b = d_low - rise * bend
        c = -slope * rise
        root = (b.square() - 4 * a * c).clamp(min=torch.finfo(y.dtype).tiny).sqrt()
        upright = b >= 0
        numerator = torch.where(upright, 2 * c, root - b)
        xi = (numerator / torch.where(upright, -b - root, 2 * a)).clamp(0, 1)
        x = x_low + width * xi
        log_det = -self._log_derivative(xi, slope, d_low, d_high, slope + bend * xi * (1 - xi))
        return torch.where(inside, self._rounded_inside(x), y), torch.where(inside, log_det, 0)

    def _rounded_inside(self, y: Tensor) -> Tensor:
        """Return a result within the interval, beyond which rounding must not take it: a prior may end there."""
        return y.clamp(-self.bound, self.bound)

    def _inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.abs() < self.bound, x.clamp(-self.bound, self.bound)

    def _bin(
        self, x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, *, by_data: bool
    ) -> tuple[Tensor, ...]:
        """Return lower corner and size along x and along y, and the derivatives at both ends, of the bin of each x."""
        x_knots, widths = self._knots(widths)
        y_knots, heights = self._knots(heights)
        # A raw derivative of zero is a derivative of one, the slope of the tails.
        unit = math.log(math.expm1(1 - self.min_derivative))
        derivatives = F.pad(self.min_derivative + F.softplus(derivatives + unit), (1, 1), value=1.0)
        index = ((y_knots if by_data else x_knots)[..., 1:] <= x[..., None]).sum(-1, keepdim=True)
        lower = [t.gather(-1, index) for t in (x_knots, widths, y_knots, heights, derivatives)]
        return tuple(t[..., 0] for t in (*lower, derivatives.gather(-1, index + 1)))

    def _knots(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower corners of the bins and their sizes."""
        share = self.min_size + (1 - self.min_size * self.num_bins) * raw.softmax(-1)
        sizes = 2 * self.bound * share
        return F.pad(sizes[..., :-1].cumsum(-1), (1, 0)) - self.bound, sizes

    @staticmethod
    def _log_derivative(xi: Tensor, slope: Tensor, d_low: Tensor, d_high: Tensor, q: Tensor) -> Tensor:
        middle = xi * (1 - xi)
        numerator = d_high * xi.square() + 2 * slope * middle + d_low * (1 - xi).square()
        return 2 * (slope / q).log() + numerator.log()
