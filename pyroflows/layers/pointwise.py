"""Maps of each feature on its own: affine, sigmoid and logit, standardisation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyroflows.arguments import Shape, as_float_tensor, check_number
from pyroflows.bijection import Bijection, Inverse, Pair
from pyroflows.networks.mlp import MLP
from pyroflows.supports import event_constraint

__all__ = ["ElementwiseAffine", "Logit", "Sigmoid", "Standardize"]


class ElementwiseAffine(Bijection):
    r"""A learnable scale and shift of each feature, initialised to the identity.

    .. math:: y_i = x_i e^{s_i} + t_i, \qquad \log|\det dy/dx| = \sum_i s_i

    Args:
        features: number of features, or the event shape.
        context_features: length of the context, from which an MLP computes ``shift`` and ``log_scale``.
        hidden_features: widths of the MLP's hidden layers.

    Shapes:
        x, y: ``(*batch, *features)``; context: ``(*batch, context_features)``.

    Example:
        >>> ElementwiseAffine(2).forward_and_log_det(torch.ones(3, 2))[1].shape
        torch.Size([3])
    """

    def __init__(self, features: Shape, *, context_features: int = 0, hidden_features: Sequence[int] = (64,)):
        super().__init__(features, context_features=context_features)
        if context_features:
            outputs = 2 * self.latent_shape.numel()
            self.conditioner = MLP(context_features, outputs, hidden_features=hidden_features)
        else:
            self.shift = nn.Parameter(torch.zeros(self.latent_shape))
            self.log_scale = nn.Parameter(torch.zeros(self.latent_shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        shift, log_scale = self._parameters_for(context)
        return x * torch.exp(log_scale) + shift, _sum_event(log_scale.expand(x.shape), self)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        shift, log_scale = self._parameters_for(context)
        return (y - shift) * torch.exp(-log_scale), -_sum_event(log_scale.expand(y.shape), self)

    def _parameters_for(self, context: Tensor | None) -> Pair:
        if context is None:
            return self.shift, self.log_scale
        shift, log_scale = self.conditioner(context).chunk(2, -1)
        return shift.unflatten(-1, self.latent_shape), log_scale.unflatten(-1, self.latent_shape)


class Sigmoid(Bijection):
    r"""The sigmoid of each feature; as the last layer of a flow it models data in (0, 1), such as pixels.

    .. math::
        y_i = \frac{\sigma(x_i) - \alpha}{1 - 2\alpha}, \qquad
        \log|\det dy/dx| = \sum_i \bigl(\log\sigma(x_i) + \log\sigma(-x_i) - \log(1 - 2\alpha)\bigr)

    From data to latent this is the ``logit(alpha + (1 - 2 alpha) y)`` of RealNVP; a small ``alpha`` maps data at the
    ends 0 and 1 to finite latents, and a sample may be outside [0, 1] by at most about ``alpha``.

    Args:
        features: number of features, or the event shape.
        alpha: margin at both ends, in [0, 0.5).

    Shapes:
        x, y: ``(*batch, *features)``.

    Raises:
        ValueError: ``alpha`` is outside [0, 0.5).

    References:
        Density Estimation Using Real NVP, Dinh et al., 2017 (arXiv:1605.08803).

    Example:
        >>> Sigmoid(2).inv(torch.tensor([0.5, 0.5]))
        tensor([0., 0.])
    """

    def __init__(self, features: Shape, alpha: float = 0.0):
        super().__init__(features)
        check_number("alpha", alpha, "[0, 0.5)")
        self.alpha = float(alpha)
        margin = alpha / (1 - 2 * alpha)
        self.codomain = event_constraint(constraints.interval(-margin, 1 + margin), len(self.data_shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        # Not softplus, which torch replaces by the identity beyond 20, with an error of 2e-9.
        log_slope = F.logsigmoid(x) + F.logsigmoid(-x) - math.log1p(-2 * self.alpha)
        return (torch.sigmoid(x) - self.alpha) / (1 - 2 * self.alpha), _sum_event(log_slope, self)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        inner = self.alpha + (1 - 2 * self.alpha) * y
        log_inner, log_rest = torch.log(inner), torch.log1p(-inner)
        return log_inner - log_rest, _sum_event(math.log1p(-2 * self.alpha) - log_inner - log_rest, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:g}"


class Logit(Inverse):
    r"""The logit of each feature, which maps latents in (0, 1), such as those of a uniform prior, to the reals.

    .. math::
        y_i = \operatorname{logit}(\alpha + (1 - 2\alpha) x_i), \qquad
        \log|\det dy/dx| = -\sum_i \bigl(\log\sigma(y_i) + \log\sigma(-y_i) - \log(1 - 2\alpha)\bigr)

    It is the inverse of a :class:`Sigmoid`, which as the last layer of a flow models data in (0, 1).

    Args:
        features, alpha: as in :class:`Sigmoid`.

    Shapes:
        x, y: ``(*batch, *features)``.

    Example:
        >>> Logit(2)(torch.tensor([0.5, 0.5]))
        tensor([0., 0.])
    """

    def __init__(self, features: Shape, alpha: float = 0.0):
        super().__init__(Sigmoid(features, alpha))
        self.alpha = float(alpha)


class Standardize(Bijection):
    r"""A fixed scale and shift, from latents of mean 0 and variance 1 to the units of the data.

    .. math:: y_i = x_i \sigma_i + \mu_i, \qquad \log|\det dy/dx| = \sum_i \log \sigma_i

    Args:
        mean: mean of the data, one for each feature.
        std: standard deviation, of the same shape.

    Shapes:
        x, y: ``(*batch, *mean.shape)``.

    Raises:
        ValueError: the shapes differ, a number is not finite, or a standard deviation is not positive.

    Example:
        >>> layer = Standardize.from_data(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> layer.inv(torch.tensor([2.0, 30.0]))
        tensor([0., 1.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        mean, std = as_float_tensor(mean), as_float_tensor(std)
        if mean.dim() == 0 or mean.shape != std.shape:
            shapes = f"{tuple(mean.shape)} and {tuple(std.shape)}"
            raise ValueError(f"expected mean and std of one shape (features,); got {shapes}")
        _refuse_columns(~(mean.isfinite() & std.isfinite()), "expected a finite mean and std; got other values")
        _refuse_columns(std <= 0, "expected a positive std; got zero or less")
        super().__init__(mean.shape)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    @classmethod
    def from_data(cls, y: Tensor) -> "Standardize":
        """Build the layer from the mean and standard deviation of data of shape ``(rows, *features)``."""
        y = as_float_tensor(y)
        if y.dim() < 2 or y.shape[0] < 2:
            raise ValueError(f"expected data of shape (rows, features) with at least 2 rows; got {tuple(y.shape)}")
        _refuse_columns(~y.isfinite().all(dim=0), "expected finite data; got other values")
        _refuse_columns(y.amin(dim=0) == y.amax(dim=0), "expected columns that vary; got a constant")
        return cls(y.mean(dim=0), y.std(dim=0, correction=0))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.std + self.mean, _sum_event(self.std.log().expand(x.shape), self)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        return (y - self.mean) / self.std, -_sum_event(self.std.log().expand(y.shape), self)


def _sum_event(terms: Tensor, layer: Bijection) -> Tensor:
    return terms.sum(dim=tuple(range(-len(layer.latent_shape), 0)))


def _refuse_columns(bad: Tensor, message: str) -> None:
    if bad.any():
        columns = [index[0] if len(index) == 1 else tuple(index) for index in bad.nonzero().tolist()]
        more = ", ..." if len(columns) > 8 else ""
        raise ValueError(f"{message} in column {', '.join(map(str, columns[:8]))}{more}")
