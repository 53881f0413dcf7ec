"""Convolutional networks for the parameters of image layers: Glow's, and RealNVP's residual one."""

import math
from typing import cast

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from pyroflows.arguments import Shape, as_image_shape, check_number, check_option, check_sizes
from pyroflows.caching import cached
from pyroflows.distributed import var_mean
from pyroflows.networks.data_dependent import DataDependent
from pyroflows.networks.mlp import ACTIVATIONS
from pyroflows.recipe import Recorded

__all__ = ["NORMS", "ConvNet", "ResNet", "ZeroConv"]

NORMS = ("actnorm", "weight", "group", "none")


class _Conv(DataDependent, nn.Conv2d):
    """A convolution with "same" padding and a gain for each output channel, folded into the weights.

    With "actnorm" and "weight" the first training batch initialises gain and bias so that each output channel has mean
    0 and variance 1; "actnorm" scales the weights as they are, "weight" their direction (weight normalisation).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = norm
        gain = {"weight": self._length().log().detach(), "actnorm": torch.zeros(out_channels)}.get(norm)
        self.log_gain = None if gain is None else nn.Parameter(gain)
        self.group = nn.GroupNorm(math.gcd(8, out_channels), out_channels) if norm == "group" else None
        if self.log_gain is not None:
            self.wait_for_data("log_gain", "bias")

    def forward(self, x: Tensor) -> Tensor:
        if self.log_gain is None:
            h = super().forward(x)
            return h if self.group is None else self.group(h)
        if self.takes_data and x.shape[0]:
            self.initialize(self._statistics(x))
        return F.conv2d(x, self._scaled_weight(), self.bias, padding=self.padding)

    @cached
    def _scaled_weight(self) -> Tensor:
        gain = self.log_gain.exp()  # type: ignore[union-attr]
        gain = gain if self.norm == "actnorm" else gain / self._length()
        return self.weight * gain.view(-1, 1, 1, 1)

    def _length(self) -> Tensor:
        return self.weight.flatten(1).norm(dim=1)

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> dict[str, Tensor]:
        h = F.conv2d(x, self.weight, padding=self.padding).to(self.weight.dtype)
        variance, mean = var_mean(h, (0, 2, 3))
        scale = variance.sqrt()
        scale = torch.where(scale > 1e-6 * (1 + mean.abs()), scale, 1)  # a channel of zeros keeps its gain
        length = self._length().log() if self.norm == "weight" else 0
        return {"log_gain": length - scale.log(), "bias": -mean / scale}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm!r}"


class ZeroConv(Recorded, nn.Module):
    r"""A convolution initialised to zero, with a learned gain :math:`e^{3s}` of each output channel.

    It is the network of Glow's learned priors, and the last layer of the networks below.

    Args:
        in_channels: channels of the input; 0 for a function of the context alone, or a learned constant.
        out_channels: channels of the output.
        context_features: length of the context; a linear map of it, initialised to zero, is added.
        kernel_size: the side of the kernel, odd.

    Shapes:
        x: ``(*batch, in_channels, H, W)``; context: ``(*batch, context_features)``; output:
        ``(*batch, out_channels, H, W)``.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> ZeroConv(2, 4)(torch.randn(5, 2, 8, 8)).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(self, in_channels: int, out_channels: int, *, context_features: int = 0, kernel_size: int = 3):
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_gain = nn.Parameter(torch.zeros(out_channels))
        self.context = nn.Linear(context_features, out_channels, bias=False) if context_features else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, images = _flatten_batch(x)
        h = F.conv2d(images, *self._scaled_weights(), padding=self.kernel_size // 2)
        if self.context is not None:
            h = h + _expand_over_pixels(self.context(context), batch)
        return h.contiguous().reshape(*batch, *h.shape[1:])  # a coupling reads channels, each one piece of memory

    @cached
    def _scaled_weights(self) -> tuple[Tensor, Tensor]:
        gain = torch.exp(3 * self.log_gain)
        return self.weight * gain.view(-1, 1, 1, 1), self.bias * gain

    def extra_repr(self) -> str:
        out_channels, in_channels, size, _ = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={size}"


class _Context(nn.Module):
    """The context of a network: a vector is a bias of the first convolution, an image is more input channels."""

    def __init__(self, width: int, context_features: int, context_shape: Shape | None):
        super().__init__()
        self.shape = None if context_shape is None else as_image_shape(context_shape)
        if self.shape is not None and self.shape.numel() != context_features:
            expected = f"context_features={self.shape.numel()} for context_shape={tuple(self.shape)}"
            raise ValueError(f"expected {expected}; got {context_features}")
        is_vector = context_features and self.shape is None
        self.linear = nn.Linear(context_features, width, bias=False) if is_vector else None

    @property
    def channels(self) -> int:
        return 0 if self.shape is None else self.shape[0]

    def append_channels(self, images: Tensor, batch: Size, context: Tensor | None) -> Tensor:
        if self.shape is None or context is None:
            return images
        channels = context.expand(*batch, context.shape[-1]).reshape(math.prod(batch), *self.shape)
        return torch.cat([images, channels], 1)

    def add_bias(self, h: Tensor, batch: Size, context: Tensor | None) -> Tensor:
        return h if self.linear is None else h + _expand_over_pixels(self.linear(context), batch)


class ConvNet(Recorded, nn.Module):
    r"""Glow's network: convolutions of 3x3, 1x1 and 3x3 pixels, the last initialised to zero.

    Args:
        in_channels, out_channels, hidden_channels: channels of the input, the output and the hidden layers.
        context_features: length of the context, which becomes a bias of the first convolution.
        context_shape: ``(c, H, W)`` if the context is a flattened image, which then becomes ``c`` more input channels.
        norm: of the hidden convolutions: "actnorm" or "weight" (weight normalisation), both initialised by the first
            training batch, "group" (group normalisation) or "none".
        activation: as in :class:`MLP`.

    Shapes:
        x: ``(*batch, in_channels, H, W)``; context: ``(*batch, context_features)``; output:
        ``(*batch, out_channels, H, W)``.

    Raises:
        ValueError: a size is not positive, or an option unknown.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> ConvNet(2, 4, hidden_channels=16, context_features=3)(torch.randn(5, 2, 8, 8), torch.zeros(3)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 512,
        context_features: int = 0,
        context_shape: Shape | None = None,
        norm: str = "actnorm",
        activation: str = "relu",
    ):
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, hidden_channels=hidden_channels)
        check_option("norm", norm, NORMS)
        check_option("activation", activation, ACTIVATIONS)
        self.context = _Context(hidden_channels, context_features, context_shape)
        self.first = _Conv(in_channels + self.context.channels, hidden_channels, 3, norm)
        self.second = _Conv(hidden_channels, hidden_channels, 1, norm)
        self.last = ZeroConv(hidden_channels, out_channels)
        # In place: allocating another image of as many channels costs more than the ReLU.
        self.activation = nn.ReLU(inplace=True) if activation == "relu" else ACTIVATIONS[activation]()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, images = _flatten_batch(x)
        h = self.first(self.context.append_channels(images, batch, context))
        h = self.activation(self.context.add_bias(h, batch, context))
        h = self.last(self.activation(self.second(h)))
        return h.reshape(*batch, *h.shape[1:])


class ResNet(Recorded, nn.Module):
    r"""RealNVP's network: residual blocks of two 3x3 convolutions at one resolution.

    .. math:: h \leftarrow h + B\, a(A\, a(h))

    Args:
        in_channels, out_channels, hidden_channels: channels of the input, the output and the hidden layers.
        num_blocks: number of residual blocks.
        context_features, context_shape: as in :class:`ConvNet`.
        norm: of the convolutions: "weight" (as in the paper, which adds batch norm), "actnorm", "group" or "none".
        activation: as in :class:`MLP`.
        dropout: probability of dropping a channel inside the blocks, in training only.

    Shapes:
        x: ``(*batch, in_channels, H, W)``; context: ``(*batch, context_features)``; output:
        ``(*batch, out_channels, H, W)``.

    Raises:
        ValueError: a size is not positive, or an option unknown.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Weight Normalization, Salimans and Kingma, 2016 (arXiv:1602.07868).

    Example:
        >>> ResNet(3, 6, hidden_channels=8, num_blocks=2)(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 6, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 64,
        num_blocks: int = 8,
        context_features: int = 0,
        context_shape: Shape | None = None,
        norm: str = "weight",
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        check_sizes(
            in_channels=in_channels, out_channels=out_channels, hidden_channels=hidden_channels, num_blocks=num_blocks
        )
        check_option("norm", norm, NORMS)
        check_option("activation", activation, ACTIVATIONS)
        check_number("dropout", dropout, "[0, 1)")
        self.context = _Context(hidden_channels, context_features, context_shape)
        self.first = _Conv(in_channels + self.context.channels, hidden_channels, 3, norm)
        self.blocks = nn.ModuleList(
            nn.ModuleList(_Conv(hidden_channels, hidden_channels, 3, norm) for _ in range(2)) for _ in range(num_blocks)
        )
        self.last = ZeroConv(hidden_channels, out_channels, kernel_size=1)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, images = _flatten_batch(x)
        h = self.first(self.context.append_channels(images, batch, context))
        h = self.context.add_bias(h, batch, context)
        for block in self.blocks:
            first, second = cast(nn.ModuleList, block)
            h = h + second(self.dropout(self.activation(first(self.activation(h)))))
        h = self.last(self.activation(h))
        return h.reshape(*batch, *h.shape[1:])


def _flatten_batch(x: Tensor) -> tuple[Size, Tensor]:
    """Return the batch shape, and the images with one batch dimension."""
    images = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    if x.device.type == "cpu":  # convolutions are up to twice as fast in the channels-last format
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.shape[:-3], images


def _expand_over_pixels(bias: Tensor, batch: Size) -> Tensor:
    """Expand a bias of shape ``(*batch, channels)`` to all pixels of the flattened images."""
    return bias.expand(*batch, bias.shape[-1]).reshape(math.prod(batch), bias.shape[-1], 1, 1)
