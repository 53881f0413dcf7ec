"""The multi-scale architecture: channels are factored out into the latent at each level."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Size, Tensor, nn

from pyroflows.arguments import check_log_det
from pyroflows.bijection import Bijection, Pair
from pyroflows.compose import as_bijections

__all__ = ["Multiscale"]


class Multiscale(Bijection):
    r"""A stack of levels between a flat vector and an image, each of which passes on only its first channels.

    .. math:: h_1 = f_1(z_1), \quad h_k = f_k([h_{k-1}, z_k]), \quad y = h_n, \quad z = (z_1, \dots, z_n)

    Glow's learned prior of the channels that are factored out, an affine map of :math:`z_k` given :math:`h_{k-1}`, is
    an affine coupling at the latent end of a level.

    Args:
        levels: bijections between images, the first nearest the latent. The channels of a level's latent beyond those
            of the data of the level below are factored out.

    Shapes:
        x: ``(*batch, C * H * W)``; y: ``(*batch, C, H, W)``, the data of the last level.

    Raises:
        ValueError: no level, or a level whose latent does not have more channels than the data of the level below.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> from pyroflows.layers import Squeeze
        >>> flat = Multiscale([Squeeze((2, 4, 4)), Squeeze((1, 8, 8))])
        >>> flat(torch.zeros(5, 64)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, levels: Iterable[Bijection]):
        levels = as_bijections("level", levels)
        for number, level in enumerate(levels):
            if len(level.latent_shape) != 3 or len(level.data_shape) != 3:
                shapes = f"{tuple(level.latent_shape)} -> {tuple(level.data_shape)}"
                raise ValueError(f"expected level {number} to map images (C, H, W); got {shapes}")
        for number, (below, above) in enumerate(pairwise(levels)):
            channels, *size = above.latent_shape
            if list(below.data_shape[1:]) != size or below.data_shape[0] >= channels:
                expected = f"fewer channels than the {channels} of level {number + 1}, of size {size[0]} x {size[1]}"
                raise ValueError(f"expected level {number} to give {expected}; got {tuple(below.data_shape)}")
        shape, context_features = levels[-1].data_shape, max(level.context_features for level in levels)
        super().__init__(shape.numel(), data_shape=shape, context_features=context_features)
        self.levels = nn.ModuleList(levels)
        self.codomain = levels[-1].codomain
        self.forward_passes = sum(level.forward_passes for level in levels)
        self.inverse_passes = sum(level.inverse_passes for level in levels)
        self.passed_on = [0, *(level.data_shape[0] for level in levels[:-1])]  # channels from the level below
        self.factored_shapes = [
            Size((level.latent_shape[0] - channels, *level.latent_shape[1:]))
            for level, channels in zip(levels, self.passed_on, strict=True)
        ]
        self.sizes = [shape.numel() for shape in self.factored_shapes]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        parts = zip(self.levels, x.split(self.sizes, -1), self.factored_shapes, strict=True)
        total, h = 0, None
        for level, part, shape in parts:
            part = part.unflatten(-1, shape)
            h = part if h is None else torch.cat([h, part], -3)
            h, log_det = level.unchecked_forward_and_log_det(h, level.context_for(context))  # type: ignore[operator]
            check_log_det(level, log_det, h.shape[:-3])
            total = total + log_det
        return h, total  # type: ignore[return-value]

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        parts, total, h = [], 0, y
        for level, channels in zip(reversed(self.levels), reversed(self.passed_on), strict=True):
            h, log_det = level.unchecked_inverse_and_log_det(h, level.context_for(context))  # type: ignore[operator]
            check_log_det(level, log_det, h.shape[:-3])
            total = total + log_det
            h, factored_out = h.split((channels, h.shape[-3] - channels), -3)
            parts.append(factored_out.flatten(-3))
        return torch.cat(parts[::-1], -1), total  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{tuple(self.data_shape)}, factored_out={self.sizes}"
