"""Activation normalisation: a scale and shift initialised from data."""

import torch
from torch import Tensor, nn

from pyroflows.arguments import Shape
from pyroflows.bijection import Bijection, Pair, Triple
from pyroflows.distributed import var_mean
from pyroflows.networks.data_dependent import DataDependent

__all__ = ["ActNorm"]


class ActNorm(DataDependent, Bijection):
    r"""A learned scale and shift of each feature, initialised so that the first training batch is standardised.

    .. math:: y = e^s x + t, \quad \log|\det dy/dx| = \sum_i s_i

    The first batch in training mode gives the mean and standard deviation of each feature; a single row gives the mean
    alone, and a constant feature keeps its scale. A training pass from latent to data with gradients (an ELBO) brings
    no data: the layer then stays the identity until it is trained. :func:`~pyroflows.fit` initialises again a layer
    that has seen data but was never trained. The pixels of an image share the numbers of their channel, and a fit on
    several processes initialises the layer from the rows of all of them.

    Args:
        features: number of features, or an event shape; ``(C, H, W)`` is an image's.

    Shapes:
        x, y: ``(*batch, features)``, or ``(*batch, C, H, W)``.

    Raises:
        ValueError: features is not a positive integer.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = ActNorm(2).inv(5 + 3 * torch.randn(1000, 2))
        >>> bool(x.mean().abs() < 1e-5), bool((x.std(0) - 1).abs().max() < 1e-3)
        (True, True)
    """

    def __init__(self, features: Shape):
        super().__init__(features)
        shape = self.latent_shape if len(self.latent_shape) != 3 else (self.latent_shape[0], 1, 1)
        self.shift = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.pixels = self.latent_shape.numel() // self.shift.numel()
        self.wait_for_data("shift", "log_scale")

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        if self.takes_data and torch.is_grad_enabled():
            self.initialize({})
        return torch.addcmul(self.shift, x, self.log_scale.exp()), self._log_det(x, self.pixels)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        if self.takes_data and y.numel():
            self.initialize(self._statistics(y))
        # Of a difference the gradient would be negated in full before it is summed for the shift.
        return (y + (-self.shift)) * (-self.log_scale).exp(), self._log_det(y, -self.pixels)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score * (-self.log_scale.detach()).exp()

    def inverse_and_score(self, y: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        x, log_det = self.inverse_and_log_det(y)
        return x, log_det, score * self.log_scale.detach().exp()

    def _log_det(self, x: Tensor, times: int) -> Tensor:
        return (times * self.log_scale.sum()).expand(x.shape[: x.dim() - len(self.latent_shape)])

    @torch.no_grad()
    def _statistics(self, y: Tensor) -> dict[str, Tensor]:
        rows = y.reshape(-1, *self.latent_shape)
        variance, mean = (t.view_as(self.shift) for t in var_mean(rows, [0] if self.pixels == 1 else [0, 2, 3]))
        scale = variance.sqrt()
        varies = scale > 8 * torch.finfo(y.dtype).eps * mean.abs()  # rounding gives a constant a tiny deviation
        return {"shift": mean, "log_scale": torch.where(varies, scale, 1).log()}

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.latent_shape))}"
