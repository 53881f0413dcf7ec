"""Transformers: monotone maps of single numbers, whose parameters a conditioner gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.arguments import check_number, check_option
from pyroflows.gradients import times, vjp
from pyroflows.layers.spline import Spline

__all__ = ["Additive", "Affine", "Spline", "Transformer", "make_transformer"]

Pair = tuple[Tensor, Tensor]

_LN_2 = math.log(2)


@runtime_checkable
class Transformer(Protocol):
    """A family of increasing maps of the real line; parameters of zero, where layers start, give a tame one.

    Shapes:
        x, y, log_det: ``(*batch, features)``; parameters: ``(*batch, features, num_parameters)``.
    """

    @property
    def num_parameters(self) -> int: ...

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Affine:
    r"""Scale and shift, with the scale an exponential kept in bounds or Glow's sigmoid.

    .. math::
        y = e^s x + t, \quad \log|dy/dx| = s, \quad
        s = b \tanh(h / b) \;\text{("exp")} \quad\text{or}\quad s = -\log\sigma(h + 2) \;\text{("sigmoid")}

    The sigmoid divides on the way to the data, so that it multiplies by a number below one on the way to
    the latent, as in Glow; with parameters of zero it is not the identity but a constant scale.

    Args:
        scale: "exp" or "sigmoid".
        bound: the largest absolute log-scale of "exp".

    Shapes:
        x, y: ``(*batch, features)``; parameters: ``(*batch, features, 2)``, shift and raw log-scale, or a pair of
        the two.

    Raises:
        ValueError: an unknown scale, or a bound that is not positive.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> Affine().forward(torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))[0]
        tensor([2., 1.])
    """

    scale: str = "exp"
    bound: float = 5.0

    def __post_init__(self) -> None:
        check_option("scale", self.scale, ("exp", "sigmoid"))
        check_number("bound", self.bound, "(0, inf)")
        exact = -2 / self.bound, self.bound / _LN_2, -self.bound / _LN_2, _LN_2
        # Torch reads a tensor without dimensions in half the time in which it wraps a number of Python's.
        read = {t: tuple(torch.tensor(n, dtype=t, device="cpu") for n in exact) for t in (torch.float32, torch.float64)}
        object.__setattr__(self, "_numbers", {None: exact} | read)

    @property
    def num_parameters(self) -> int:
        return 2

    def forward(self, x: Tensor, parameters: Tensor | Pair) -> tuple[Tensor, Tensor]:
        return self.summed(x, parameters, (), forward=True)

    def inverse(self, y: Tensor, parameters: Tensor | Pair) -> tuple[Tensor, Tensor]:
        return self.summed(y, parameters, (), forward=False)

    def summed(
        self, x: Tensor, parameters: Tensor | Pair, dims: tuple[int, ...], *, forward: bool
    ) -> tuple[Tensor, Tensor]:
        """Map in one direction, with the log-determinant summed over ``dims``."""
        shift, raw = parameters.unbind(-1) if isinstance(parameters, Tensor) else parameters
        if raw.dtype != x.dtype:  # of a network in another precision; the log-determinant is of the very scale in use
            shift, raw = shift.to(x.dtype), raw.to(x.dtype)
        if self.scale == "sigmoid":
            log_scale = F.logsigmoid(raw + 2)
            log_scale = -log_scale if forward else log_scale
            log_det, scale = log_scale.sum(dims) if dims else log_scale, log_scale.exp()
        else:
            numbers = self.__dict__["_numbers"]
            kind = raw.dtype if raw.dtype in numbers and not torch.compiler.is_compiling() else None
            rate, bound, negative, unit = numbers[kind]
            # This is b tanh(h / b), written by the sigmoid and as a power of two, which take a fraction of the time.
            span = 2 * self.bound / _LN_2
            half = (raw * rate).sigmoid_()
            power = torch.rsub(half, bound, alpha=span) if forward else torch.rsub(half, negative, alpha=-span)
            log_det, scale = (power.sum(dims) if dims else power) * unit, power.exp2_()
        if forward:
            return torch.addcmul(shift, x, scale), log_det
        return times(x - shift, scale), log_det

    def carry(self, x: Tensor, log_scale: Tensor, score: Tensor) -> tuple[Tensor, Pair]:
        """The closed form of :func:`carry`, from latent to data."""
        inverse_scale = (-log_scale).exp()
        slope = inverse_scale - 1 if self.scale == "sigmoid" else 1 - (log_scale / self.bound).square()
        score_y = score * inverse_scale
        return score_y, (score_y, torch.addcmul(slope, score * x, slope))


@dataclass(frozen=True)
class Additive:
    r"""A shift alone, as in NICE.

    .. math:: y = x + t, \quad \log|dy/dx| = 0

    Shapes:
        x, y: ``(*batch, features)``; parameters: ``(*batch, features, 1)``.

    References:
        NICE: Non-linear Independent Components Estimation, Dinh et al., 2015 (arXiv:1410.8516).

    Example:
        >>> Additive().forward(torch.ones(1), torch.tensor([[2.0]]))
        (tensor([3.]), tensor([0.]))
    """

    @property
    def num_parameters(self) -> int:
        return 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters[..., 0], torch.zeros_like(x)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return y - parameters[..., 0], torch.zeros_like(y)


def make_transformer(transformer: str | Transformer) -> Transformer:
    """Give the transformer of a name, or the one given."""
    if isinstance(transformer, Transformer):
        return transformer
    check_option("transformer", transformer, ("affine", "additive", "spline"))
    return {"affine": Affine, "additive": Additive, "spline": Spline}[transformer]()


def transform(
    transformer: Transformer, x: Tensor, parameters: Any, *, forward: bool, dims: tuple[int, ...] = (-1,)
) -> tuple[Tensor, Tensor]:
    """Map in one direction, and sum the log-determinant over dimensions, if any."""
    if type(transformer) is Affine:
        return transformer.summed(x, parameters, dims, forward=forward)
    y, log_det = (transformer.forward if forward else transformer.inverse)(x, parameters)
    return y, log_det.sum(dims) if dims else log_det


def carry(
    transformer: Transformer,
    x: Tensor,
    output: Tensor,
    y: Tensor,
    log_det: Tensor,
    score: Tensor,
    forward: bool,
) -> tuple[Tensor, Tensor]:
    """Carry a score from ``x`` to ``y``; beside it give the gradient of ``-log q(y)`` by the network's output."""
    if forward and type(transformer) is Affine:
        score, parts = transformer.carry(x.detach(), log_det.detach(), score)
        return score, torch.cat(parts, -1)
    bend = vjp(log_det, None, x, torch.ones_like(score))
    score = (score - bend) * (-log_det.detach()).exp()
    return score, vjp(y, log_det, output, score)
