"""Coupling layers of images: some channels, or every second pixel, transform the others through a convolutional net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.arguments import Shape, as_image_shape, check_names, check_option
from pyroflows.bijection import Bijection
from pyroflows.layers.transformers import Affine, Transformer, make_transformer, transform
from pyroflows.networks.convnet import ConvNet

__all__ = ["ConvCoupling"]


class ConvCoupling(Bijection):
    r"""A coupling layer of images: what it keeps gives, through convolutions, the parameters that move the rest.

    .. math:: y_k = x_k, \quad y_m = f(x_m; \theta(x_k, c)), \quad \log|\det dy/dx| = \sum_m \log|f'(x_m)|

    Args:
        shape: ``(C, H, W)``.
        transformer: "affine", "additive", "spline", or a :class:`Transformer` with options of its own.
        mask: "channels" (the second half of the channels moves) or "checkerboard" (pixels of even row plus column
            move; the network sees the others, and zeros in their place).
        flip: exchange what moves and what is kept.
        context_features: length of the context.
        conditioner: a network from the kept channels (or the masked image) and the context to
            ``(*batch, num_parameters * moved channels, H, W)``; by default a :class:`ConvNet`.
        network: options of that ConvNet, such as ``hidden_channels=512``.

    Shapes:
        x, y: ``(*batch, C, H, W)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: there is nothing to keep or to move, a mask or an option is not one of those above, or the
            conditioner gives another shape.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> layer = ConvCoupling((4, 8, 8), hidden_channels=16)
        >>> layer(torch.zeros(3, 4, 8, 8)).shape
        torch.Size([3, 4, 8, 8])
    """

    moves: Tensor | None

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
        self.transformer = make_transformer(transformer)
        first = channels // 2
        self.parts = (first, channels - first)
        moved = channels if mask == "checkerboard" else self.parts[0 if flip else 1]
        pixels = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == int(flip)
        self.register_buffer("moves", pixels if mask == "checkerboard" else None, persistent=False)
        if conditioner is None:
            check_names(network, ConvNet, but=("in_channels", "out_channels", "context_features"))
            conditioner = ConvNet(
                channels if mask == "checkerboard" else channels - moved,
                moved * self.transformer.num_parameters,
                context_features=context_features,
                **network,
            )
        elif network:
            raise TypeError(f"expected no network options beside a conditioner; got {', '.join(network)}")
        self.conditioner = conditioner
        self.parameters_shape = (moved * self.transformer.num_parameters, height, width)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, forward=True)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, context, forward=False)

    def _map(self, x: Tensor, context: Tensor | None, *, forward: bool) -> tuple[Tensor, Tensor]:
        if self.moves is not None:
            parameters = self._parameters_from(x.masked_fill(self.moves, 0), context)
            moved, log_det = transform(self.transformer, x, parameters, forward=forward, dims=())
            return torch.where(self.moves, moved, x), log_det.masked_fill(~self.moves, 0).sum((-3, -2, -1))
        first, second = x.split_with_sizes(self.parts, -3)
        kept, moved = (second, first) if self.flip else (first, second)
        parameters = self._parameters_from(kept, context)
        moved, log_det = transform(self.transformer, moved, parameters, forward=forward, dims=(-3, -2, -1))
        return torch.cat([moved, kept] if self.flip else [kept, moved], -3), log_det

    def _parameters_from(self, kept: Tensor, context: Tensor | None) -> Any:
        # In the input's precision, whatever that of the network: the log-det is of the very scale in use.
        parameters = self.conditioner(kept, context).to(kept.dtype)
        if parameters.shape[-3:] != self.parameters_shape:  # fewer would broadcast, and the log-det lack a factor
            expected = "(*batch, " + ", ".join(map(str, self.parameters_shape)) + ")"
            raise ValueError(f"expected a conditioner that gives {expected}; got {tuple(parameters.shape)}")
        if type(self.transformer) is Affine:  # each kind is read in one piece
            return parameters.chunk(2, -3)
        return parameters.unflatten(-3, (self.transformer.num_parameters, -1)).movedim(-4, -1)

    def extra_repr(self) -> str:
        return f"{tuple(self.latent_shape)}, mask={self.mask!r}, flip={self.flip}, transformer={self.transformer}"
