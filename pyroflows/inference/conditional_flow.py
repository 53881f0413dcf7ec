"""The flow of an amortised posterior: data on one scale, a linear regression, and splines for the shape."""

from typing import cast

import torch
from torch import Tensor, nn

from pyroflows.bijection import Bijection
from pyroflows.flow import Flow
from pyroflows.layers.autoregressive import MaskedAutoregressive
from pyroflows.layers.linear import TriangularAffine
from pyroflows.layers.rearrange import Permutation
from pyroflows.layers.spline import Spline
from pyroflows.layers.transformers import Affine
from pyroflows.priors import StandardNormal

__all__ = ["ScaledEmbedding", "default_flow", "regression_layers"]

_LINEAR = 5.0  # scales; data further out enter a network by their logarithm


class ScaledEmbedding(nn.Module):
    """An embedding of data that are brought to one scale first, those far out by their logarithm."""

    centre: Tensor
    scale: Tensor

    def __init__(self, data: Tensor, embedding: nn.Module | None):
        super().__init__()
        low, centre, high = (data.quantile(q, 0) for q in (0.1587, 0.5, 0.8413))
        scale = (high - low) / 2
        scale = torch.where(scale > 0, scale, data.std(0))
        self.register_buffer("centre", centre)
        self.register_buffer("scale", torch.where(scale > 0, scale, 1))
        self.network = embedding

    def forward(self, data: Tensor) -> Tensor:
        z = (data - self.centre) / self.scale
        z = z.clamp(-_LINEAR, _LINEAR) * (1 + (z.abs() / _LINEAR).clamp(min=1).log())
        return z if self.network is None else self.network(z)


class _LinearShift(Bijection):
    r"""A shift that is linear in the context.

    .. math:: y = x + W c + b, \qquad \log|\det dy/dx| = 0
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__(weight.shape[0], context_features=weight.shape[1])
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + nn.functional.linear(cast(Tensor, context), self.weight, self.bias), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y - nn.functional.linear(cast(Tensor, context), self.weight, self.bias), y.new_zeros(y.shape[:-1])


@torch.no_grad()
def regression_layers(latents: Tensor, context: Tensor) -> list[Bijection]:
    """Return layers initialised to the ridge regression of latents on context: the residuals' scale, and the mean."""
    x, y = context.double(), latents.double()
    num_validation = max(1, len(x) // 10)
    centre, mean = x.mean(0), y.mean(0)
    centred_x, centred_y = (x - centre)[num_validation:], (y - mean)[num_validation:]
    values, directions = torch.linalg.eigh(centred_x.T @ centred_x)
    projected = directions.T @ (centred_x.T @ centred_y)
    values = values.clamp(min=0)
    # The penalty with the smallest validation error, from almost none to one that shrinks almost everything to zero.
    penalties = values.max().clamp(min=1e-12) * torch.logspace(-10, 1, 12).to(values)
    weights = [(directions @ (projected / (values + penalty)[:, None])).T for penalty in penalties]
    errors = [(((y - mean) - (x - centre) @ weight.T)[:num_validation] ** 2).mean() for weight in weights]
    weight = weights[int(torch.stack(errors).argmin())]
    residuals = y - mean - (x - centre) @ weight.T
    scale = torch.linalg.cholesky(residuals.T.cov().reshape(y.shape[1], -1) + 1e-6 * torch.eye(y.shape[1]).to(y))
    triangular = TriangularAffine(y.shape[1])
    triangular.start_at(torch.zeros_like(mean), scale)
    return [triangular, _LinearShift(weight, mean - weight @ centre)]


def default_flow(features: int, context_features: int) -> Flow:
    """Build a flow of affine layers, which set location and scale, and of splines, which set the shape.

    Splines alone would reach only to their bound: for a posterior far narrower than the prior, the outermost draws of
    the prior would stay outliers.
    """
    layers: list[Bijection] = []
    for transformer in (Spline(bound=5.0), Spline(bound=5.0), Affine(), Affine()):
        if layers:
            layers.append(Permutation(features, "reverse"))
        layer = MaskedAutoregressive(
            features,
            transformer=transformer,
            context_features=context_features,
            hidden_features=(64, 64),
            residual=True,
            activation="gelu",
        )
        layers.append(layer)
    return Flow(StandardNormal(features), layers)
