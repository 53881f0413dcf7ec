"""Normalisation layers: ActNorm, initialised from data, and batch normalisation as a bijection."""

import torch
from torch import Tensor, nn

from pyroflows.arguments import Shape, check_number
from pyroflows.bijection import Bijection, Pair, Triple
from pyroflows.distributed import var_mean, world_size
from pyroflows.networks.data_dependent import DataDependent
from pyroflows.private import inside_functorch

__all__ = ["ActNorm", "BatchNorm"]


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


class BatchNorm(Bijection):
    r"""Batch normalisation from data to latent.

    .. math:: x = e^s \frac{y - \mu}{\sqrt{v + \epsilon}} + t, \quad
              \log|\det dy/dx| = \sum_i \tfrac12\log(v_i + \epsilon) - s_i

    In training :math:`\mu, v` are those of the batch, over all processes of a fit, and update running averages. In
    evaluation, and from latent to data, the stored statistics are used: the running averages, or those of the complete
    training set after :meth:`set_statistics`, which :func:`~pyroflows.fit` calls before validation.

    Args:
        features: number of features.
        momentum: weight of a batch in the running averages.
        eps: number added to the variance.

    Shapes:
        x, y: ``(*batch, features)``.

    Raises:
        ValueError: features is not a positive integer, momentum not in (0, 1], or eps not positive.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Masked Autoregressive Flow for Density Estimation, Papamakarios et al., 2017 (arXiv:1705.07057).

    Example:
        >>> layer = BatchNorm(2)
        >>> x = layer.inv(3 * torch.randn(100, 2))
        >>> bool(x.mean().abs() < 1e-5)
        True
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, features: int, *, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__(features)
        check_number("momentum", momentum, "(0, 1]")
        check_number("eps", eps, "(0, inf)")
        self.momentum, self.eps = momentum, eps
        self.shift = nn.Parameter(torch.zeros(self.latent_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.latent_shape))
        self.register_buffer("mean", torch.zeros(self.latent_shape))
        self.register_buffer("variance", torch.ones(self.latent_shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        spread = self.variance + self.eps
        y = (x - self.shift) * (-self.log_scale).exp() * spread.sqrt() + self.mean
        return y, -self._log_det(spread, x)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        mean, variance = self.mean, self.variance
        # A single row has no variance and uses the stored statistics.
        if self.training and (y.shape[:-1].numel() > 1 or world_size() > 1):
            variance, mean = var_mean(y.flatten(0, -2), [0])
            if not inside_functorch():
                self._update_averages(mean.detach(), variance.detach())
        spread = variance + self.eps
        x = (y - mean) * spread.rsqrt() * self.log_scale.exp() + self.shift
        return x, self._log_det(spread, y)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        # Not by the inverse, which in training uses other statistics.
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score * (self.log_scale.exp() * (self.variance + self.eps).rsqrt()).detach()

    @torch.no_grad()
    def _update_averages(self, mean: Tensor, variance: Tensor) -> None:
        # A batch that overflows must not spoil the averages permanently.
        finite = mean.isfinite() & variance.isfinite()
        self.mean.copy_(torch.where(finite, self.mean.lerp(mean, self.momentum), self.mean))
        self.variance.copy_(torch.where(finite, self.variance.lerp(variance, self.momentum), self.variance))

    def _log_det(self, spread: Tensor, x: Tensor) -> Tensor:
        return (self.log_scale - spread.log() / 2).sum().expand(x.shape[:-1])

    @torch.no_grad()
    def set_statistics(self, y: Tensor) -> None:
        """Set the stored statistics to those of the data that reach this layer, shape ``(rows, features)``."""
        self._check(y, self.data_shape, None)
        variance, mean = var_mean(y.flatten(0, -2), [0])
        self.mean.copy_(mean)
        self.variance.copy_(variance)

    def extra_repr(self) -> str:
        return f"{self.latent_shape[0]}, momentum={self.momentum}, eps={self.eps}"
