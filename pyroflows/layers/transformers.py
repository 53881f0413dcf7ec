"""Transformers: increasing maps of single numbers, whose parameters a conditioner computes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from pyroflows.arguments import check_event_shape, check_number, check_option
from pyroflows.gradients import vjp
from pyroflows.layers.spline import Spline
from pyroflows.recipe import recorded

__all__ = [
    "Additive",
    "Affine",
    "Transform",
    "Transformer",
    "as_affine",
    "make_transformer",
    "num_parameters",
    "pull_back",
    "split_by_feature",
    "split_by_parameter",
]


_LOG2_E = math.log2(math.e)

Transform = Callable[..., tuple[Tensor, Tensor]]
"""One direction of a transformer."""


@runtime_checkable
class Transformer(Protocol):
    """A family of increasing maps of the real line; layers start with parameters near zero.

    ``parameter_shapes`` holds the shape of each parameter of one feature: ``()`` for a number.

    Shapes:
        x, y, log_det: ``(*batch, features)``; parameters: ``(*batch, features, *shape)`` for each shape.
    """

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]: ...

    def forward(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]: ...


@recorded
@dataclass(frozen=True)
class Affine:
    r"""A scale and a shift; the scale is an exponential with a bounded exponent, or Glow's sigmoid.

    .. math::
        y = e^s x + t, \quad \log|dy/dx| = s, \quad
        s = b \tanh(h / b) \;\text{("exp")} \quad\text{or}\quad s = -\log\sigma(h + 2) \;\text{("sigmoid")}

    As in Glow, the sigmoid multiplies from data to latent, by a number below one, and so divides from latent to data;
    with parameters of zero it is a constant scale and not the identity.

    Args:
        scale: "exp" or "sigmoid".
        bound: the largest absolute log-scale of "exp".
        shift_bound: the largest absolute shift, bounded likewise; None for none.

    Shapes:
        x, y: ``(*batch, features)``; parameters, the raw shift :math:`t` and the raw log-scale :math:`h`: the same.

    Raises:
        ValueError: an unknown scale, or a bound that is not positive.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> Affine().forward(torch.ones(2), torch.tensor([1.0, 0.0]), torch.zeros(2))[0]
        tensor([2., 1.])
    """

    scale: str = "exp"
    bound: float = 5.0
    shift_bound: float | None = None
    parameter_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((), ())

    def __post_init__(self) -> None:
        check_option("scale", self.scale, ("exp", "sigmoid"))
        check_number("bound", self.bound, "(0, inf)")
        check_number("shift_bound", self.shift_bound, "(0, inf)", optional=True)

    def forward(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters
        log_scale = self._log_scale(raw)
        return torch.addcmul(self._shift(shift), x, _exp(log_scale)), log_scale

    def inverse(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters
        log_scale = self._log_scale(raw, sign=-1)
        return (y - self._shift(shift)) * _exp(log_scale), log_scale

    def _shift(self, raw: Tensor) -> Tensor:
        return raw if self.shift_bound is None else _soft_clip(raw, self.shift_bound)

    def _log_scale(self, raw: Tensor, sign: int = 1) -> Tensor:
        """Return the log-scale, times a sign."""
        if self.scale == "sigmoid":
            return -sign * F.logsigmoid(raw + 2)
        return _soft_clip(raw, self.bound, sign)


def _soft_clip(raw: Tensor, bound: float, sign: int = 1) -> Tensor:
    """Return :math:`b \\tanh(h / b)`, times a sign."""
    # b tanh(h / b) = b - 2 b sigmoid(-2 h / b); on a CPU torch's tanh takes ten times as long as its sigmoid.
    return torch.rsub((raw * (-2 / bound)).sigmoid_(), sign * bound, alpha=2 * sign * bound)


def _exp(x: Tensor) -> Tensor:
    # On a CPU torch's exp2 takes a third of the time of its exp, but its gradient takes longer.
    return x.exp() if torch.is_grad_enabled() else (x * _LOG2_E).exp2_()


@recorded
@dataclass(frozen=True)
class Additive:
    r"""A shift alone, as in NICE.

    .. math:: y = x + t, \quad \log|dy/dx| = 0

    Shapes:
        x, y: ``(*batch, features)``; the parameter, the shift: the same.

    References:
        NICE: Non-linear Independent Components Estimation, Dinh et al., 2015 (arXiv:1410.8516).

    Example:
        >>> Additive().forward(torch.ones(1), torch.tensor([2.0]))
        (tensor([3.]), tensor([0.]))
    """

    parameter_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((),)

    def forward(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        (shift,) = parameters
        return x + shift, torch.zeros_like(x)

    def inverse(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        (shift,) = parameters
        return y - shift, torch.zeros_like(y)


def as_affine(scale: str | Affine) -> Affine:
    """Return the affine transformer of a kind of scale, or the transformer itself."""
    return scale if isinstance(scale, Affine) else Affine(scale=scale)


def make_transformer(transformer: str | Transformer) -> Transformer:
    """Return the transformer of a name, or the transformer itself."""
    if isinstance(transformer, Transformer):
        return transformer
    check_option("transformer", transformer, ("affine", "additive", "spline"))
    return {"affine": Affine, "additive": Additive, "spline": Spline}[transformer]()


def num_parameters(transformer: Transformer) -> int:
    """Return the number of outputs of a conditioner for one feature."""
    return sum(map(math.prod, transformer.parameter_shapes))


def split_by_feature(transformer: Transformer, output: Tensor, x: Tensor) -> Sequence[Tensor]:
    """Split outputs ``(*batch, features, num_parameters)`` into the parameters for ``x``, and of its dtype."""
    shapes = transformer.parameter_shapes
    output = output if output.dtype == x.dtype else output.to(x.dtype)
    if not any(shapes):
        return output.unbind(-1)
    parts = output.split_with_sizes([math.prod(shape) for shape in shapes], -1)
    return [part.unflatten(-1, shape) if shape else part.squeeze(-1) for part, shape in zip(parts, shapes, strict=True)]


def split_by_parameter(transformer: Transformer, output: Tensor, x: Tensor, shape: Size) -> Sequence[Tensor]:
    """Split outputs ``(*batch, *shape)`` into the parameters for ``x``, and of its dtype.

    The first dimension of ``shape`` is that of the features or channels. The outputs along it are the first parameter
    of all features, then the second, and so on, so that each parameter and its gradient is one piece of memory.
    """
    check_event_shape("a conditioner that returns", output, shape)  # others might broadcast to a wrong density
    shapes, dim = transformer.parameter_shapes, -len(shape)
    output = output if output.dtype == x.dtype else output.to(x.dtype)
    if not any(shapes):
        return output.chunk(len(shapes), dim)
    features = x.shape[dim]
    parts = output.split_with_sizes([features * math.prod(shape) for shape in shapes], dim)
    return [
        part.unflatten(dim, (features, *shape)).movedim(dim, -1) if shape else part
        for part, shape in zip(parts, shapes, strict=True)
    ]


def pull_back(x: Tensor, output: Tensor, y: Tensor, log_det: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Pull a score at ``x`` back to ``y``, where a transformer maps ``x`` to ``y`` by a conditioner's ``output``.

    Returns:
        The score at ``y``, and the gradient of ``log_det`` plus the score's product with ``y`` by the output.
    """
    score = (score - vjp(log_det, None, x, torch.ones_like(score))) * (-log_det.detach()).exp()
    return score, vjp(y, log_det, output, score)
