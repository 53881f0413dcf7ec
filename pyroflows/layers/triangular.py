"""A lower-triangular affine map in the units of a Gaussian, which whitens a posterior."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.arguments import check_sizes
from pyroflows.bijection import Bijection, Pair, Triple
from pyroflows.caching import cached
from pyroflows.layers.linear import full_precision

__all__ = ["TriangularAffine"]


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
            raise ValueError(
                f"expected loc of shape ({features},) and a scale of ({features},) or ({features}, {features}); got "
                f"{tuple(loc.shape)} and {tuple(scale.shape)}"
            )
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
        with full_precision(x):
            shift, matrix = self._map()
            y = x * matrix + shift if self.diagonal else F.linear(x, matrix, shift)
        return y, self._log_det().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        with full_precision(y):
            shift, matrix = self._map()
        centred, log_det = y - shift, -self._log_det().expand(y.shape[:-1])
        if self.diagonal:
            return centred / matrix, log_det
        flat = centred.reshape(-1, y.shape[-1])
        x = torch.linalg.solve_triangular(matrix.T, flat, upper=True, left=False)
        return x.reshape(y.shape), log_det

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        with torch.no_grad(), full_precision(score):
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
