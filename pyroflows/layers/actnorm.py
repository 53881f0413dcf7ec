"""Activation normalisation: a scale and shift that start from the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.arguments import Shape
from pyroflows.bijection import Bijection
from pyroflows.distributed import var_mean
from pyroflows.gradients import times
from pyroflows.private import inside_functorch

__all__ = ["ActNorm"]


class ActNorm(Bijection):
    r"""A learned scale and shift of each feature, set by the first training batch to standardise it.

    .. math:: y = e^s x + t, \quad \log|\det dy/dx| = \sum_i s_i

    The first data seen in training mode sets the mean and standard deviation of each feature; one row sets the
    mean alone, and a constant feature keeps its scale. A training pass from latent to data with gradients
    (an ELBO) brings no data: the layer then starts, and stays, as the identity. A fit starts a layer anew that was
    only looked at, and never trained. The pixels of an image share the numbers of their channel, and a fit on several
    processes starts the layer from the rows of all of them.

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

    started: Tensor

    def __init__(self, features: Shape):
        super().__init__(features)
        shape = self.latent_shape if len(self.latent_shape) != 3 else (self.latent_shape[0], 1, 1)
        self.shift = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.pixels = self.latent_shape.numel() // self.shift.numel()
        self.register_buffer("started", torch.tensor(False))
        # The same flag for Python, so that no pass waits for a device to read it.
        self._started = False
        self._first: tuple[Tensor, Tensor] | None = None  # the numbers it started with

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._started and self.training and torch.is_grad_enabled():
            self._start()
        return torch.addcmul(self.shift, x, self.log_scale.exp()), self._log_det(x, self.pixels)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._started and self.training and y.numel():
            self._start(y.detach())
        # Of a difference the gradient would be negated in full before it is summed for the shift.
        return times(y + (-self.shift), (-self.log_scale).exp()), self._log_det(y, -self.pixels)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score * (-self.log_scale.detach()).exp()

    def inverse_and_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_det = self.inverse_and_log_det(y)
        return x, log_det, score * self.log_scale.detach().exp()

    def _log_det(self, x: Tensor, times: int) -> Tensor:
        return (times * self.log_scale.sum()).expand(x.shape[: x.dim() - len(self.latent_shape)])

    @torch.no_grad()
    def _start(self, y: Tensor | None = None) -> None:
        if inside_functorch():
            return  # under vmap or grad a row is not a batch, and nothing may be written
        if y is not None:
            rows = y.reshape(-1, *self.latent_shape)
            shared = [0] if self.pixels == 1 else [0, 2, 3]
            variance, mean = (t.view_as(self.shift) for t in var_mean(rows, shared))
            scale = variance.sqrt()
            # Rounding alone gives a constant feature a tiny spread.
            varies = scale > 8 * torch.finfo(y.dtype).eps * mean.abs()
            self.shift.copy_(mean)
            self.log_scale.copy_(torch.where(varies, scale, 1).log())
        self.started.fill_(True)
        self._started = True
        self._first = (self.shift.detach().clone(), self.log_scale.detach().clone())

    @torch.no_grad()
    def restart_if_untrained(self) -> None:
        """Wait for data again, if nothing has moved the numbers since the start; a fit begins with this."""
        if self._first is None:
            return
        now = (self.shift, self.log_scale)
        if all(torch.equal(a, b.to(a)) for a, b in zip(now, self._first, strict=True)):
            self.shift.zero_()
            self.log_scale.zero_()
            self.started.fill_(False)
            self._started, self._first = False, None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._started, self._first = bool(self.started), None

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.latent_shape))}"
