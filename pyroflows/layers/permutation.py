"""Fixed permutations of the features, or of the channels of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.arguments import Shape, as_permutation, as_shape
from pyroflows.bijection import Bijection, Pair, Triple

__all__ = ["Permutation"]


class Permutation(Bijection):
    r"""A fixed permutation of the features, so that the next coupling transforms other ones.

    .. math:: y_i = x_{\pi(i)}, \qquad \log|\det dy/dx| = 0

    Args:
        features: number of features, or the shape ``(C, H, W)`` of an image, whose channels are then permuted.
        order: "reverse", "random", or a permutation: feature ``i`` of the data is feature ``order[i]`` of the latent.
        seed: seed of a random order; None for torch's global generator.

    Shapes:
        x, y: ``(*batch, features)``, or ``(*batch, C, H, W)``.

    Raises:
        ValueError: the order is not a permutation of ``0, ..., features - 1``.

    Example:
        >>> Permutation(3, [2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, features: Shape, order: str | Sequence[int] | Tensor = "random", *, seed: int | None = None):
        shape = as_shape(features)
        if len(shape) not in (1, 3):
            raise ValueError(f"expected a number of features or the shape (C, H, W) of an image; got {tuple(shape)}")
        super().__init__(shape)
        features = shape[0]
        if isinstance(order, str):
            if order == "reverse":
                order = torch.arange(features).flip(0)
            elif order == "random":
                generator = None if seed is None else torch.Generator().manual_seed(seed)
                order = torch.randperm(features, generator=generator)
            else:
                raise ValueError(f"expected order to be 'reverse', 'random' or a permutation; got {order!r}")
        self.register_buffer("order", as_permutation(order, features))
        self.register_buffer("inverse_order", self.order.argsort())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return self._select(x, self.order), self._zero(x)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        return self._select(y, self.inverse_order), self._zero(y)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        return *self.forward_and_log_det(x), self._select(score, self.order)

    def inverse_and_score(self, y: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        return *self.inverse_and_log_det(y), self._select(score, self.inverse_order)

    def _select(self, x: Tensor, order: Tensor) -> Tensor:
        return x.index_select(-len(self.latent_shape), order)

    def _zero(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: x.dim() - len(self.latent_shape)])

    def extra_repr(self) -> str:
        order = self.order.tolist()
        return f"{len(order)}, order={order}" if len(order) <= 16 else str(len(order))
