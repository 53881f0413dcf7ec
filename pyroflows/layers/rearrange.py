"""Fixed rearrangements: permutations of features or channels, and space to channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.arguments import Shape, as_image_shape, as_permutation, as_shape, is_integer
from pyroflows.bijection import Bijection, Pair, Triple

__all__ = ["Permutation", "Squeeze"]


class Permutation(Bijection):
    r"""A fixed permutation of the features, so that the next coupling transforms other ones.

    .. math:: y_i = x_{\pi(i)}, \qquad \log|\det dy/dx| = 0

    Args:
        features: number of features, or the shape ``(C, H, W)`` of an image, whose channels are then permuted.
        order: "reverse", "random", or a permutation: feature ``i`` of the data is feature ``order[i]`` of the latent.
        seed: seed of a random order, which is then the same whenever the layer is built; pass another for each layer of
            a flow. None for torch's global generator: Pyro's parameter store does not hold the order.

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

    def __init__(self, features: Shape, order: str | Sequence[int] | Tensor = "random", *, seed: int | None = 0):
        shape = as_shape(features)
        if len(shape) not in (1, 3):
            raise ValueError(f"expected a number of features or the shape (C, H, W) of an image; got {tuple(shape)}")
        super().__init__(shape)
        if isinstance(order, str) and order not in ("reverse", "random"):
            raise ValueError(f"expected order to be 'reverse', 'random' or a permutation; got {order!r}")
        self.register_buffer("order", as_permutation(order, shape[0], seed))
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


class Squeeze(Bijection):
    r"""Space to channels: from data to latent, each block of pixels becomes the channels of one pixel.

    .. math:: x_{4c + 2i + j,\, h,\, w} = y_{c,\, 2h + i,\, 2w + j}, \qquad \log|\det dy/dx| = 0

    ``Squeeze(shape).inv`` maps a larger latent to data of more channels.

    Args:
        shape: ``(C, H, W)`` of the data.
        factor: side of a block.

    Shapes:
        x: ``(*batch, factor**2 * C, H / factor, W / factor)``; y: ``(*batch, C, H, W)``.

    Raises:
        ValueError: the height or the width is not a multiple of the factor.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803).

    Example:
        >>> Squeeze((3, 8, 8)).inv(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 12, 4, 4])
    """

    def __init__(self, shape: Shape, *, factor: int = 2):
        channels, height, width = as_image_shape(shape)
        if not is_integer(factor, 1) or height % factor or width % factor:
            sides = f"the height {height} and the width {width}"
            raise ValueError(f"expected a factor that divides {sides}; got {factor!r}")
        latent_shape = (channels * factor**2, height // factor, width // factor)
        super().__init__(latent_shape, data_shape=(channels, height, width))
        self.factor = factor

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        _, height, width = self.latent_shape
        batch = x.shape[:-3]
        blocks = x.reshape(*batch, self.data_shape[0], self.factor, self.factor, height, width)
        y = torch.movedim(blocks, (-4, -3), (-3, -1))  # (*batch, C, H / f, f, W / f, f)
        return y.reshape(*batch, *self.data_shape), x.new_zeros(batch)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        _, height, width = self.latent_shape
        batch = y.shape[:-3]
        blocks = y.reshape(*batch, self.data_shape[0], height, self.factor, width, self.factor)
        x = torch.movedim(blocks, (-3, -1), (-4, -3))  # (*batch, C, f, f, H / f, W / f)
        return x.reshape(*batch, *self.latent_shape), y.new_zeros(batch)

    def extra_repr(self) -> str:
        return f"{tuple(self.data_shape)}, factor={self.factor}"
