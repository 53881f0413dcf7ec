"""Space to channels: blocks of pixels become the channels of one pixel."""

import torch
from torch import Tensor

from pyroflows.arguments import Shape, as_image_shape, is_integer
from pyroflows.bijection import Bijection, Pair

__all__ = ["Squeeze"]


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
            raise ValueError(
                f"expected a factor that divides the height {height} and the width {width}; got {factor!r}"
            )
        super().__init__(
            (channels * factor**2, height // factor, width // factor), data_shape=(channels, height, width)
        )
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
