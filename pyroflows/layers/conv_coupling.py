"""Coupling layers of images: channels or pixels transform the others through a convolutional network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyroflows.arguments import Shape, as_image_shape, check_option
from pyroflows.bijection import Bijection, Pair
from pyroflows.layers.transformers import Transform, Transformer, make_transformer, num_parameters, split_by_parameter
from pyroflows.networks.convnet import ConvNet
from pyroflows.networks.mlp import make_conditioner

__all__ = ["ConvCoupling"]


class ConvCoupling(Bijection):
    r"""A coupling layer of images: identity channels or pixels give the parameters that transform the others.

    .. math:: y_k = x_k, \quad y_m = f(x_m; \theta(x_k, c)), \quad \log|\det dy/dx| = \sum_m \log|f'(x_m)|

    Args:
        shape: ``(C, H, W)``.
        transformer, flip, context_features: as in :class:`Coupling`.
        mask: "channels" (the second half of the channels is transformed) or "checkerboard" (pixels of even row plus
            column are; the network sees the image with zeros in their place).
        conditioner: a network from the identity channels (or the masked image) and the context to
            ``(*batch, outputs, H, W)``: the first parameter of all transformed channels, then the second, and so on; by
            default a :class:`ConvNet`.
        network: options of that ConvNet, such as ``hidden_channels=512``.

    Shapes:
        x, y: ``(*batch, C, H, W)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: the mask leaves nothing to see or to transform, a mask or option is not one of those above, or the
            conditioner returns another shape.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> layer = ConvCoupling((4, 8, 8), hidden_channels=16)
        >>> layer(torch.zeros(3, 4, 8, 8)).shape
        torch.Size([3, 4, 8, 8])
    """

    pixels: Tensor | None

    def __init__(
        self,
        shape: Shape,
        *,
        transformer: str | Transformer = "affine",
        mask: str = "channels",
        flip: bool = False,
        context_features: int = 0,
        conditioner: nn.Module | None = None,
        **network: Any,
    ):
        channels, height, width = as_image_shape(shape)
        super().__init__((channels, height, width), context_features=context_features)
        check_option("mask", mask, ("channels", "checkerboard"))
        if mask == "channels" and channels < 2:
            raise ValueError("expected at least 2 channels for mask='channels'; got 1: squeeze the image first")
        if mask == "checkerboard" and height * width < 2:
            raise ValueError("expected at least 2 pixels for mask='checkerboard'; got 1")
        self.mask, self.flip = mask, flip
        self.sizes = (channels // 2, channels - channels // 2)
        seen, transformed = self.sizes[::-1] if flip else self.sizes
        if mask == "checkerboard":
            seen = transformed = channels
        pixels = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == int(flip)
        self.register_buffer("pixels", pixels if mask == "checkerboard" else None, persistent=False)
        self.transformer = make_transformer(transformer)
        outputs = transformed * num_parameters(self.transformer)
        self.output_shape = Size((outputs, height, width))
        self.conditioner = make_conditioner(conditioner, ConvNet, seen, outputs, context_features, network)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return self._map(self.transformer.forward, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        return self._map(self.transformer.inverse, y, context)

    def _map(self, transform: Transform, x: Tensor, context: Tensor | None) -> Pair:
        if self.pixels is not None:
            y, log_det = transform(x, *self._parameters_for(x, x.masked_fill(self.pixels, 0), context))
            return torch.where(self.pixels, y, x), log_det.masked_fill(~self.pixels, 0).sum((-3, -2, -1))
        first, second = x.split_with_sizes(self.sizes, -3)
        identity, x = (second, first) if self.flip else (first, second)
        y, log_det = transform(x, *self._parameters_for(x, identity, context))
        return torch.cat([y, identity] if self.flip else [identity, y], -3), log_det.sum((-3, -2, -1))

    def _parameters_for(self, x: Tensor, seen: Tensor, context: Tensor | None) -> Sequence[Tensor]:
        return split_by_parameter(self.transformer, self.conditioner(seen, context), x, self.output_shape)

    def extra_repr(self) -> str:
        return f"{tuple(self.latent_shape)}, mask={self.mask!r}, flip={self.flip}, transformer={self.transformer}"
