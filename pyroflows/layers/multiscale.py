"""The multi-scale architecture: half of the channels leave for the latent at each level."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyroflows.bijection import Bijection

__all__ = ["Multiscale"]


class Multiscale(Bijection):
    r"""A stack of levels between a flat vector and an image, each of which hands only its first channels on.

    .. math:: h_1 = f_1(z_1), \quad h_k = f_k([h_{k-1}, z_k]), \quad y = h_n, \quad z = (z_1, \dots, z_n)

    Glow's learned prior of the channels that leave, an affine map of :math:`z_k` given :math:`h_{k-1}`, is an affine
    coupling at the latent end of a level: it keeps the channels that stay, and moves those that leave.

    Args:
        levels: bijections between images, the first nearest the latent. The channels that a level's latent has beyond
            the data of the level below it are those that leave.

    Shapes:
        x: ``(*batch, C * H * W)``; y: ``(*batch, C, H, W)``, the data of the last level.

    Raises:
        ValueError: no level, or one whose latent does not hold the data of the level below and at least a channel more.

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
        levels = list(levels)
        if not levels:
            raise ValueError("expected at least one level; got none")
        for number, level in enumerate(levels):
            if not isinstance(level, Bijection):
                raise TypeError(f"expected levels that are Bijections; got {type(level).__name__}")
            if len(level.latent_shape) != 3 or len(level.data_shape) != 3:
                raise ValueError(
                    f"expected level {number} to map images (C, H, W); "
                    f"got {tuple(level.latent_shape)} -> {tuple(level.data_shape)}"
                )
        for number, (below, above) in enumerate(pairwise(levels)):
            channels, *size = above.latent_shape
            if list(below.data_shape[1:]) != size or below.data_shape[0] >= channels:
                raise ValueError(
                    f"expected level {number} to give fewer channels than the {channels} of level {number + 1}, "
                    f"of size {size[0]} x {size[1]}; got {tuple(below.data_shape)}"
                )
        contexts = sorted({level.context_features for level in levels} - {0})
        if len(contexts) > 1:
            raise ValueError(f"expected levels of one context length; got context_features of {contexts}")
        features = levels[-1].data_shape.numel()
        super().__init__(features, data_shape=levels[-1].data_shape, context_features=contexts[0] if contexts else 0)
        self.levels = nn.ModuleList(levels)
        self.codomain = levels[-1].codomain
        stays = [0, *(level.data_shape[0] for level in levels[:-1])]
        self.stays = stays
        self.leaves = [
            (level.latent_shape[0] - stay, *level.latent_shape[1:]) for level, stay in zip(levels, stays, strict=True)
        ]
        self.sizes = [channels * height * width for channels, height, width in self.leaves]

    @property
    def forward_passes(self) -> int:  # type: ignore[override]
        return sum(level.forward_passes for level in self.levels)  # type: ignore[misc]

    @property
    def inverse_passes(self) -> int:  # type: ignore[override]
        return sum(level.inverse_passes for level in self.levels)  # type: ignore[misc]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = [part.unflatten(-1, shape) for part, shape in zip(x.split(self.sizes, -1), self.leaves, strict=True)]
        total, h = 0, None
        for level, part in zip(self.levels, parts, strict=True):
            h = part if h is None else torch.cat([h, part], -3)
            h, log_det = level.forward_and_log_det(h, level.context_for(context))  # type: ignore[operator]
            total = total + log_det
        return h, total  # type: ignore[return-value]

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts, total, h = [], 0, y
        for level, stay in zip(reversed(self.levels), reversed(self.stays), strict=True):
            h, log_det = level.inverse_and_log_det(h, level.context_for(context))  # type: ignore[operator]
            total = total + log_det
            h, leaves = h.split((stay, h.shape[-3] - stay), -3)
            parts.append(leaves.flatten(-3))
        return torch.cat(parts[::-1], -1), total  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{tuple(self.data_shape)}, leaves={self.sizes}"
