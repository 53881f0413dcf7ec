"""Learned linear maps: of features, of the channels of an image (Glow's 1x1 convolution), and triangular ones."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.arguments import Shape, as_image_shape, check_option, check_sizes
from pyroflows.bijection import Bijection, Pair, Triple
from pyroflows.caching import cached

__all__ = ["DenseLinear", "InvertibleConv", "LULinear", "TriangularAffine"]


def _initial_matrix(features: int, init: str) -> Tensor:
    check_sizes(features=features)
    check_option("init", init, ("orthogonal", "identity"))
    if init == "identity":
        return torch.eye(features)
    matrix = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
    return matrix.to(torch.get_default_dtype()).contiguous()


def _full_precision(x: Tensor) -> AbstractContextManager:
    """Return a context without autocast, so that products have the precision of the weights and the log-determinant."""
    kind = x.device.type
    # Entering a context takes as long as the product of a few channels.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # torch refuses the question for meta tensors
    return torch.autocast(kind, enabled=False) if autocast else nullcontext()


class LULinear(Bijection):
    r"""A learned linear map, factored so that its log-determinant is a sum of logarithms.

    .. math:: x = W y + b, \quad W = P L (U + \mathrm{diag}(s)), \quad \log|\det dy/dx| = -\sum_i \log|s_i|

    The permutation :math:`P` and the signs of :math:`s` are fixed; a new layer has none. Data to latent is a product,
    and latent to data two triangular solves.

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
        _, lower, upper = torch.linalg.lu(_initial_matrix(features, init))
        # Rows reordered and negated such that the factors need no permutation and no signs: an orthogonal matrix stays
        # one, and nothing is drawn but parameters, which alone Pyro's store holds.
        signs = upper.diagonal().sign()
        lower, upper = signs[:, None] * lower * signs, signs[:, None] * upper
        self.register_buffer("permutation", torch.arange(features))  # row i of W is row permutation[i] of L U
        self.register_buffer("signs", torch.ones(features))
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
        y = y.index_select(-1, self.permutation.argsort()).reshape(-1, x.shape[-1])
        y = torch.linalg.solve_triangular(self.lower.T, y, upper=True, left=False, unitriangular=True)
        y = torch.linalg.solve_triangular(self._upper().T, y, upper=False, left=False)
        # Contiguous, since Pyro views draws in other shapes; a solver returns a transposed matrix.
        return y.contiguous().view(x.shape), -self.log_det().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        with _full_precision(y):
            x = F.linear(y, self.weight(), self.bias)
        return x, self.log_det().expand(y.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        with torch.no_grad(), _full_precision(score):
            score = score @ self.weight()
        return *self.forward_and_log_det(x), score

    @cached
    def _upper(self) -> Tensor:
        return torch.addcmul(self.upper.triu(1), self.eye, self.signs * self.log_scale.exp())

    @cached
    def log_det(self) -> Tensor:
        """The log-determinant of W."""
        return self.log_scale.sum()


class DenseLinear(Bijection):
    r"""A learned linear map without a factorisation, whose determinant is computed at each step.

    .. math:: x = W y + b, \quad \log|\det dy/dx| = -\log|\det W|

    Args:
        features, init, bias: as in :class:`LULinear`.

    Shapes:
        x, y: ``(*batch, features)``.

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
        y, info = torch.linalg.solve_ex(self.weight.T, y.reshape(-1, x.shape[-1]), left=False)
        return _nan_if_singular(y, info).reshape(x.shape), -self.log_det().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        with _full_precision(y):
            x = F.linear(y, self.weight, self.bias)
        return x, self.log_det().expand(y.shape[:-1])

    @cached
    def inverse_weight(self) -> Tensor:
        """The inverse of W."""
        return _nan_if_singular(*torch.linalg.inv_ex(self.weight))

    @cached
    def log_det(self) -> Tensor:
        """The log-determinant of W."""
        return torch.linalg.slogdet(self.weight).logabsdet


def _nan_if_singular(result: Tensor, info: Tensor) -> Tensor:
    """Return what a solver gave, or NaN if its matrix is singular; an error would make a GPU's caller wait."""
    return torch.where(info == 0, result, torch.nan)


class InvertibleConv(Bijection):
    r"""Glow's invertible 1x1 convolution: the same learned linear map of the channels at every pixel.

    .. math:: x_{\cdot hw} = W y_{\cdot hw}, \quad \log|\det dy/dx| = -H W \log|\det W|

    The matrix is that of a :class:`LULinear` or a :class:`DenseLinear` without bias.

    Args:
        shape: ``(C, H, W)``.
        factored: whether the matrix is factored as P L U.
        init: as in :class:`LULinear`.

    Shapes:
        x, y: ``(*batch, C, H, W)``.

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
        with _full_precision(x):
            y = self._convolve(x, self.mixing.inverse_weight())
        return y, self._log_det(x, -self.pixels)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        with _full_precision(y):
            x = self._convolve(y, self.mixing.weight() if isinstance(self.mixing, LULinear) else self.mixing.weight)
        return x, self._log_det(y, self.pixels)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        # For few channels a product per image takes at most half the time of conv2d.
        images = x.reshape(math.prod(x.shape[:-3]), self.latent_shape[0], self.pixels)
        return torch.bmm(weight.expand(images.shape[0], -1, -1), images).reshape(x.shape)

    def _log_det(self, x: Tensor, times: int) -> Tensor:
        return (times * self.mixing.log_det()).expand(x.shape[:-3])


class TriangularAffine(Bijection):
    r"""A learned lower-triangular affine map, initialised to that of a Gaussian and learned in its units.

    .. math:: y = m + S (A x + b), \qquad \log|\det dy/dx| = \sum_i (\log S_{ii} + \log A_{ii})

    The mean :math:`m` and the lower-triangular scale :math:`S` are fixed. The lower-triangular :math:`A` and the shift
    :math:`b`, initialised to the identity and zeros, are learned: one learning rate suits features of any scale.

    Args:
        features: number of features.
        diagonal: whether both matrices are diagonal, as for many features.

    Shapes:
        x, y: ``(*batch, features)``.

    Raises:
        ValueError: features is not a positive integer, or :meth:`start_at` gets values of another shape, that are not
            finite, or with a diagonal that is not positive.

    References:
        Automatic Differentiation Variational Inference, Kucukelbir et al., 2017 (arXiv:1603.00788).

    Example:
        >>> layer = TriangularAffine(2)
        >>> layer.start_at(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
        >>> layer(torch.ones(2)).tolist()
        [3.0, 6.0]
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, features: int, *, diagonal: bool = False):
        check_sizes(features=features)
        super().__init__(features)
        self.diagonal = diagonal
        self.register_buffer("loc", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features) if diagonal else torch.eye(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.lower = None if diagonal else nn.Parameter(torch.zeros(features * (features - 1) // 2))
        size = 0 if diagonal else features
        self.register_buffer("below", torch.tril_indices(size, size, -1), persistent=False)

    @torch.no_grad()
    def start_at(self, loc: Tensor, scale: Tensor) -> None:
        """Set the map to that of a Gaussian of mean ``loc``, shape ``(features,)``.

        A ``scale`` of shape ``(features, features)`` is a Cholesky factor, of which a diagonal layer takes the standard
        deviations; one of shape ``(features,)`` holds standard deviations.
        """
        features = self.latent_shape[0]
        if loc.shape != (features,) or scale.shape not in ((features,), (features, features)):
            expected = f"loc of shape ({features},) and a scale of ({features},) or ({features}, {features})"
            raise ValueError(f"expected {expected}; got {tuple(loc.shape)} and {tuple(scale.shape)}")
        deviations = scale if scale.dim() == 1 else scale.diagonal()
        if not (loc.isfinite().all() and scale.isfinite().all() and (deviations > 0).all()):
            raise ValueError("expected a finite loc and scale, with a positive diagonal; got other values")
        if self.diagonal:
            scale = scale if scale.dim() == 1 else scale.tril().norm(dim=-1)
        else:
            scale = scale.diag() if scale.dim() == 1 else scale.tril()
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        for parameter in self.parameters():
            parameter.zero_()

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        with _full_precision(x):
            shift, matrix = self._map()
            y = x * matrix + shift if self.diagonal else F.linear(x, matrix, shift)
        return y, self._log_det().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        with _full_precision(y):
            shift, matrix = self._map()
        centred, log_det = y - shift, -self._log_det().expand(y.shape[:-1])
        if self.diagonal:
            return centred / matrix, log_det
        flat = centred.reshape(-1, y.shape[-1])
        x = torch.linalg.solve_triangular(matrix.T, flat, upper=True, left=False)
        return x.reshape(y.shape), log_det

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        with torch.no_grad(), _full_precision(score):
            _, matrix = self._map()
            flat = score.reshape(-1, score.shape[-1])
            solve = torch.linalg.solve_triangular
            pulled = flat / matrix if self.diagonal else solve(matrix, flat, upper=False, left=False)
        return *self.forward_and_log_det(x), pulled.reshape(score.shape)

    @cached
    def _map(self) -> Pair:
        """Return the shift, and the matrix or its diagonal, of the complete map."""
        if self.lower is None:
            return self.loc + self.scale * self.shift, self.scale * self.log_scale.exp()
        # A row sums one number per feature: each is scaled down, so that a step changes the sum by about the step.
        below = self.lower / self.latent_shape[0] ** 0.5
        learned = self.log_scale.exp().diag().index_put((self.below[0], self.below[1]), below)
        return self.loc + self.scale @ self.shift, self.scale @ learned

    @cached
    def _log_det(self) -> Tensor:
        return (self.scale if self.diagonal else self.scale.diagonal()).log().sum() + self.log_scale.sum()

    def extra_repr(self) -> str:
        return f"{self.latent_shape[0]}{', diagonal=True' if self.diagonal else ''}"
