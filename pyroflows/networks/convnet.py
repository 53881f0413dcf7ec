"""Convolutional networks that compute the parameters of image layers: Glow's, and RealNVP's residual one."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from pyroflows.arguments import Shape, as_image_shape, check_number, check_option, check_sizes
from pyroflows.caching import cached
from pyroflows.distributed import var_mean
from pyroflows.networks.mlp import ACTIVATIONS
from pyroflows.private import inside_functorch
from pyroflows.recipe import Recorded

__all__ = ["NORMS", "ConvNet", "ResNet", "ZeroConv"]

NORMS = ("actnorm", "weight", "group", "none")


class _Conv(nn.Conv2d):
    """A convolution with "same" padding and a gain for each output channel, folded into the weights.

    With "actnorm" and "weight" the first training batch sets gain and bias so that each output channel is standard;
    "actnorm" scales the weights as they are, "weight" their direction (Salimans and Kingma, 2016, arXiv:1602.07868).
    """

    started: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = norm
        gain = {"weight": self._length().log().detach(), "actnorm": torch.zeros(out_channels)}.get(norm)
        self.log_gain = None if gain is None else nn.Parameter(gain)
        self.group = nn.GroupNorm(math.gcd(8, out_channels), out_channels) if norm == "group" else None
        if self.log_gain is not None:
            self.register_buffer("started", torch.tensor(False))
        self._started = self.log_gain is None
        self._first: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.log_gain is None:
            h = super().forward(x)
            return h if self.group is None else self.group(h)
        if not self._started and self.training and x.shape[0]:
            self._start(x)
        return self._conv_forward(x, self._scaled(), self.bias)

    @cached
    def _scaled(self) -> Tensor:
        gain = self.log_gain.exp()  # type: ignore[union-attr]
        gain = gain if self.norm == "actnorm" else gain / self._length()
        return self.weight * gain.view(-1, 1, 1, 1)

    def _length(self) -> Tensor:
        return self.weight.flatten(1).norm(dim=1)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        if inside_functorch():
            return  # under vmap a row is not a batch, and nothing may be written
        h = self._conv_forward(x, self.weight, None).to(self.weight.dtype)
        variance, mean = var_mean(h, (0, 2, 3))
        scale = variance.sqrt()
        scale = torch.where(scale > 1e-6 * (1 + mean.abs()), scale, 1)  # a dead input's channel keeps its gain
        self.log_gain.copy_(-scale.log() + (self._length().log() if self.norm == "weight" else 0))  # type: ignore[union-attr]
        self.bias.copy_(-mean / scale)  # type: ignore[union-attr]
        self.started.fill_(True)
        self._started = True
        self._first = (self.log_gain.detach().clone(), self.bias.detach().clone())  # type: ignore[union-attr]

    @torch.no_grad()
    def restart_if_untrained(self) -> None:
        """Wait for data again, if nothing has moved the numbers since the start; a fit begins with this."""
        if self._first is None:
            return
        now = (self.log_gain, self.bias)
        if all(torch.equal(a, b.to(a)) for a, b in zip(now, self._first, strict=True)):  # type: ignore[arg-type]
            self.started.fill_(False)
            self._started, self._first = False, None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.log_gain is not None:
            self._started, self._first = bool(self.started), None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm!r}"


class ZeroConv(Recorded, nn.Module):
    r"""A convolution that starts at zero, with a learned gain :math:`e^{3s}` of each output channel.

    Alone it is the network of Glow's learned priors; the networks below end in one.

    Args:
        in_channels: channels of the input; 0 for a map of the context alone, or a learned constant.
        out_channels: channels of the output.
        context_features: length of the context, of which a linear map that starts at zero is added.
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
        batch, images = _flat(x)
        h = F.conv2d(images, *self._scaled(), padding=self.kernel_size // 2)
        if self.context is not None:
            h = h + _spread(self.context(context), batch)
        return h.contiguous().reshape(*batch, *h.shape[1:])  # a coupling reads channels, each in one piece

    @cached
    def _scaled(self) -> tuple[Tensor, Tensor]:
        gain = torch.exp(3 * self.log_gain)
        return self.weight * gain.view(-1, 1, 1, 1), self.bias * gain

    def extra_repr(self) -> str:
        out_channels, in_channels, size, _ = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={size}"


class _Context(nn.Module):
    """Brings a context into a network: a vector as a bias of the first convolution, an image as channels beside."""

    def __init__(self, width: int, context_features: int, context_shape: Shape | None):
        super().__init__()
        self.shape = None if context_shape is None else as_image_shape(context_shape)
        if self.shape is not None and self.shape.numel() != context_features:
            raise ValueError(
                f"expected context_features={self.shape.numel()} for context_shape={tuple(self.shape)}; "
                f"got {context_features}"
            )
        vector = context_features and self.shape is None
        self.linear = nn.Linear(context_features, width, bias=False) if vector else None

    @property
    def channels(self) -> int:
        return 0 if self.shape is None else self.shape[0]

    def beside(self, images: Tensor, batch: Size, context: Tensor | None) -> Tensor:
        if self.shape is None or context is None:
            return images
        pictures = context.expand(*batch, context.shape[-1]).reshape(math.prod(batch), *self.shape)
        return torch.cat([images, pictures], 1)

    def bias(self, h: Tensor, batch: Size, context: Tensor | None) -> Tensor:
        return h if self.linear is None else h + _spread(self.linear(context), batch)


class ConvNet(Recorded, nn.Module):
    r"""Glow's network: convolutions of 3x3, 1x1 and 3x3 pixels, the last of which starts at zero.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        hidden_channels: channels between.
        context_features: length of the context, which is a bias of the first convolution.
        context_shape: ``(c, H, W)``, if the context is an image flattened, which then enters as channels beside the
            input.
        norm: of the hidden convolutions: "actnorm", "weight" (normalised weights), both started by the first
            training batch, "group" (normalised activations of a row) or "none".
        activation: one of "relu", "silu", "gelu", "elu", "tanh", "leaky_relu".

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
        # In place: memory for a second image of so many channels costs more than the ReLU.
        self.activation = nn.ReLU(inplace=True) if activation == "relu" else ACTIVATIONS[activation]()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, images = _flat(x)
        h = self.first(self.context.beside(images, batch, context))
        h = self.activation(self.context.bias(h, batch, context))
        h = self.last(self.activation(self.second(h)))
        return h.reshape(*batch, *h.shape[1:])


class ResNet(Recorded, nn.Module):
    r"""RealNVP's network: residual blocks of two 3x3 convolutions at one resolution.

    .. math:: h \leftarrow h + B\, a(A\, a(h))

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        hidden_channels: channels of the stream to which each block adds.
        num_blocks: number of residual blocks.
        context_features: length of the context, which is a bias of the first convolution.
        context_shape: ``(c, H, W)``, if the context is an image flattened, which then enters as channels.
        norm: of the convolutions: "weight" (the paper's, beside batch norm), "actnorm", "group" or "none".
        activation: one of "relu", "silu", "gelu", "elu", "tanh", "leaky_relu".
        dropout: share of channels dropped inside the blocks, in training only.

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
        batch, images = _flat(x)
        h = self.first(self.context.beside(images, batch, context))
        h = self.context.bias(h, batch, context)
        for block in self.blocks:
            first, second = cast(nn.ModuleList, block)
            h = h + second(self.dropout(self.activation(first(self.activation(h)))))
        h = self.last(self.activation(h))
        return h.reshape(*batch, *h.shape[1:])


def _flat(x: Tensor) -> tuple[Size, Tensor]:
    """Give the batch shape, and the images in one batch dimension, as convolutions take them."""
    images = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    if x.device.type == "cpu":  # where convolutions are up to twice as fast if the channels of a pixel lie together
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.shape[:-3], images


def _spread(bias: Tensor, batch: Size) -> Tensor:
    """Give a bias of ``(*batch, channels)`` for each of the flattened images, over all their pixels."""
    return bias.expand(*batch, bias.shape[-1]).reshape(math.prod(batch), bias.shape[-1], 1, 1)
