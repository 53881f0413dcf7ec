"""Learned linear mixing: of features, and of the channels of an image, Glow's 1x1 convolution."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pyroflows.arguments import Shape, as_image_shape, check_option, check_sizes
from pyroflows.bijection import Bijection, Pair, Triple
from pyroflows.caching import cached

__all__ = ["DenseLinear", "InvertibleConv", "LULinear"]


def _initial_matrix(features: int, init: str) -> Tensor:
    check_sizes(features=features)
    check_option("init", init, ("orthogonal", "identity"))
    if init == "identity":
        return torch.eye(features)
    matrix = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
    return matrix.to(torch.get_default_dtype()).contiguous()


def full_precision(x: Tensor) -> AbstractContextManager:
    """Return a context without autocast, so that products have the precision of the weights and the log-determinant."""
    kind = x.device.type
    # Entering a context takes as long as the product of a few channels.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class LULinear(Bijection):
    r"""A learned linear map, factored so that its log-determinant is a sum of logarithms.

    .. math:: x = W y + b, \quad W = P L (U + \mathrm{diag}(s)), \quad \log|\det dy/dx| = -\sum_i \log|s_i|

    The permutation :math:`P` and the signs of :math:`s` are fixed. Data to latent is a product, and latent to data two
    triangular solves.

    Args:
        features: number of features.
        init: "orthogonal", a random orthogonal matrix, or "identity".
        bias: whether the shift :math:`b` is learned.

    Shapes:
        x, y: ``(*batch, features)``.

    Raises:
        ValueError: features is not a positive integer, or init is unknown.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> layer = LULinear(3)
        >>> W = layer.weight()
        >>> torch.allclose(W @ W.T, torch.eye(3), atol=1e-6)  # orthogonal at initialisation
        True
    """

    permutation: Tensor
    signs: Tensor
    eye: Tensor

    def __init__(self, features: int, *, init: str = "orthogonal", bias: bool = True):
        super().__init__(features)
        p, lower, upper = torch.linalg.lu(_initial_matrix(features, init))
        self.register_buffer("permutation", p.argmax(-1))  # row i of W is row permutation[i] of L U
        self.register_buffer("signs", upper.diagonal().sign())
        self.register_buffer("eye", torch.eye(features), persistent=False)
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(upper.diagonal().abs().log())
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    @cached
    def weight(self) -> Tensor:
        """The matrix W, shape ``(features, features)``."""
        upper = self._upper()
        return torch.addmm(upper, self.lower.tril(-1), upper).index_select(0, self.permutation)

    @cached
    def inverse_weight(self) -> Tensor:
        """The inverse of W."""
        columns = self.eye[self.permutation].T
        columns = torch.linalg.solve_triangular(self.lower, columns, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(self._upper(), columns, upper=True)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        y = x if self.bias is None else x - self.bias
        y = y[..., self.permutation.argsort()].reshape(-1, x.shape[-1])
        y = torch.linalg.solve_triangular(self.lower.T, y, upper=True, left=False, unitriangular=True)
        y = torch.linalg.solve_triangular(self._upper().T, y, upper=False, left=False)
        return y.reshape(x.shape), -self.log_det().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        with full_precision(y):
            x = nn.functional.linear(y, self.weight(), self.bias)
        return x, self.log_det().expand(y.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        with torch.no_grad(), full_precision(score):
            score = score @ self.weight()
        return *self.forward_and_log_det(x), score

    @cached
    def _upper(self) -> Tensor:
        return torch.addcmul(self.upper.triu(1), self.eye, self.signs * self.log_scale.exp())

    @cached
    def log_det(self) -> Tensor:
        """The log-determinant of W."""
        return self.log_scale.sum()

    def extra_repr(self) -> str:
        return f"{self.latent_shape[0]}"


class DenseLinear(Bijection):
    r"""A learned linear map without a factorisation, whose determinant is computed at each step.

    .. math:: x = W y + b, \quad \log|\det dy/dx| = -\log|\det W|

    Args:
        features: number of features.
        init: "orthogonal", a random orthogonal matrix, or "identity".
        bias: whether the shift :math:`b` is learned.

    Shapes:
        x, y: ``(*batch, features)``.

    Raises:
        ValueError: features is not a positive integer, or init is unknown.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> layer = DenseLinear(3)
        >>> bool(layer.forward_and_log_det(torch.ones(3))[1].abs() < 1e-6)
        True
    """

    def __init__(self, features: int, *, init: str = "orthogonal", bias: bool = True):
        super().__init__(features)
        self.weight = nn.Parameter(_initial_matrix(features, init))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        y = x if self.bias is None else x - self.bias
        y = torch.linalg.solve(self.weight.T, y.reshape(-1, x.shape[-1]), left=False)
        return y.reshape(x.shape), -self.log_det().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        with full_precision(y):
            x = nn.functional.linear(y, self.weight, self.bias)
        return x, self.log_det().expand(y.shape[:-1])

    @cached
    def inverse_weight(self) -> Tensor:
        """The inverse of W."""
        return torch.linalg.inv(self.weight)

    @cached
    def log_det(self) -> Tensor:
        """The log-determinant of W."""
        return torch.linalg.slogdet(self.weight).logabsdet

    def extra_repr(self) -> str:
        return f"{self.latent_shape[0]}"


class InvertibleConv(Bijection):
    r"""Glow's invertible 1x1 convolution: the same learned linear map of the channels at every pixel.

    .. math:: x_{\cdot hw} = W y_{\cdot hw}, \quad \log|\det dy/dx| = -H W \log|\det W|

    The matrix is that of a :class:`LULinear` or a :class:`DenseLinear` without bias.

    Args:
        shape: ``(C, H, W)``.
        factored: whether the matrix is factored as P L U.
        init: "orthogonal", a random orthogonal matrix, or "identity".

    Shapes:
        x, y: ``(*batch, C, H, W)``.

    Raises:
        ValueError: the shape is not that of an image, or init is unknown.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> layer = InvertibleConv((4, 8, 8))
        >>> layer.inv(torch.zeros(3, 4, 8, 8)).shape
        torch.Size([3, 4, 8, 8])
    """

    def __init__(self, shape: Shape, *, factored: bool = True, init: str = "orthogonal"):
        channels, height, width = as_image_shape(shape)
        super().__init__((channels, height, width))
        self.pixels = height * width
        self.mixing = (LULinear if factored else DenseLinear)(channels, init=init, bias=False)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        with full_precision(x):
            y = self._convolve(x, self.mixing.inverse_weight())
        return y, self._log_det(x, -self.pixels)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        with full_precision(y):
            x = self._convolve(y, self.mixing.weight() if isinstance(self.mixing, LULinear) else self.mixing.weight)
        return x, self._log_det(y, self.pixels)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        # For few channels a product per image takes at most half the time of conv2d.
        images = x.reshape(math.prod(x.shape[:-3]), self.latent_shape[0], self.pixels)
        return torch.bmm(weight.expand(images.shape[0], -1, -1), images).reshape(x.shape)

    def _log_det(self, x: Tensor, times: int) -> Tensor:
        return (times * self.mixing.log_det()).expand(x.shape[:-3])

    def extra_repr(self) -> str:
        return f"{tuple(self.latent_shape)}"
