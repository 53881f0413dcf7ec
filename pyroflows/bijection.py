"""Bijections: a layer writes two methods, its users get Pyro's whole transform protocol."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyroflows.arguments import (
    Shape,
    as_shape,
    batched_shape,
    brief_shape,
    check_context,
    check_counts,
    check_event,
    check_log_det,
    check_score,
    check_type,
)
from pyroflows.caching import EvaluatedOnce
from pyroflows.gradients import pull_back_score
from pyroflows.recipe import Recorded
from pyroflows.supports import event_constraint

__all__ = ["Bijection", "Conditioned", "Inverse"]

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def _checked(method: Callable[..., Any], side: str) -> Callable[..., Any]:
    """Check the input of a method, broadcast it with the context, and check the log-determinant."""

    def evaluated(self: "Bijection", x: Tensor, context: Tensor | None, *scores: Tensor) -> Any:
        x = self._check(x, getattr(self, side), context)
        results = method(self, x, *[check_score(score, x) for score in scores], context)
        check_log_det(self, results[1], x.shape[: x.dim() - len(getattr(self, side))])
        return results

    @functools.wraps(method)
    def checked(self: "Bijection", x: Tensor, context: Tensor | None = None) -> Any:
        return evaluated(self, x, context)

    @functools.wraps(method)
    def score_checked(self: "Bijection", x: Tensor, score: Tensor, context: Tensor | None = None) -> Any:
        return evaluated(self, x, context, score)

    return score_checked if method.__name__.endswith("score") else checked


class Bijection(Recorded, EvaluatedOnce, TransformModule):
    r"""An invertible map from latent to data: two methods that return the image and the log-determinant.

    A layer defines ``forward_and_log_det(x, context=None)``, latent to data, and ``inverse_and_log_det``. Pyro's
    protocol is derived from them; by :class:`~pyroflows.caching.EvaluatedOnce` a layer is evaluated once where Pyro
    asks twice. A call is checked once: a stack calls its layers by the methods whose names begin with ``unchecked_``.

    Args:
        latent_shape: event shape of the latent side, or its number of features.
        data_shape: event shape of the data side; by default that of the latent side.
        context_features: length of the context vector; 0 for a map without context.

    Shapes:
        x: ``(*batch, *latent_shape)``; y: ``(*batch, *data_shape)``; context: ``(*batch, context_features)``;
        log_det: ``(*batch,)``. The batch shapes of input and context are broadcast.

    Raises:
        TypeError: the input is not a floating-point tensor.
        ValueError: a shape does not match, or a context is missing or not expected.

    Example:
        >>> import math, torch
        >>> class Double(Bijection):
        ...     def forward_and_log_det(self, x, context=None):
        ...         return 2 * x, x.new_full(x.shape[:-1], x.shape[-1] * math.log(2))
        ...     def inverse_and_log_det(self, y, context=None):
        ...         return y / 2, y.new_full(y.shape[:-1], -y.shape[-1] * math.log(2))
        >>> Double(3).inv(torch.ones(3))
        tensor([0.5000, 0.5000, 0.5000])
    """

    bijective = True
    forward_passes: int = 1
    """Evaluations of the conditioner from latent to data: the cost of sampling."""
    inverse_passes: int = 1
    """Evaluations of the conditioner from data to latent: the cost of scoring."""
    _inverse_reference: "weakref.ref[Bijection] | None" = None
    unchecked_forward_and_log_det: Callable[..., Pair]
    unchecked_inverse_and_log_det: Callable[..., Pair]
    unchecked_forward_and_score: Callable[..., Triple]
    unchecked_inverse_and_score: Callable[..., Triple]

    def __init__(self, latent_shape: Shape, *, data_shape: Shape | None = None, context_features: int = 0):
        super().__init__()
        check_counts(context_features=context_features)
        self.latent_shape: Size = as_shape(latent_shape)
        self.data_shape: Size = self.latent_shape if data_shape is None else as_shape(data_shape)
        self.context_features: int = int(context_features)
        self.domain: constraints.Constraint = event_constraint(constraints.real, len(self.latent_shape))
        self.codomain: constraints.Constraint = event_constraint(constraints.real, len(self.data_shape))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for direction, side in (("forward", "latent_shape"), ("inverse", "data_shape")):
            for name in (f"{direction}_and_log_det", f"{direction}_and_score"):
                if name in cls.__dict__:
                    setattr(cls, f"unchecked_{name}", cls.__dict__[name])
                    setattr(cls, name, _checked(cls.__dict__[name], side))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        """Map latent to data; return ``y`` and ``log|det dy/dx|``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_and_log_det(x, context=None)")

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        """Map data to latent; return ``x`` and ``log|det dx/dy|``."""
        raise NotImplementedError(f"{type(self).__name__} must define inverse_and_log_det(y, context=None)")

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        r"""Map latent to data; return ``y``, ``log|det dy/dx|``, and, detached, the score at ``y`` of a pushed density.

        .. math:: \nabla_y \log q_Y(y) = J^{-\top} \left(\nabla_x \log q_X(x) - \nabla_x \log|\det J|\right)

        By default the score comes from one evaluation of the inverse; couplings and autoregressive layers need none.

        Args:
            x, context: the latent, and the context if the map takes one.
            score: the gradient of the latent's log-density at ``x``.

        Shapes:
            x, score: ``(*batch, *latent_shape)``; y and its score: ``(*batch, *data_shape)``; log_det: ``(*batch,)``.

        References:
            Fast and Unified Path Gradient Estimators for Normalizing Flows, Vaitl et al., 2024 (arXiv:2403.15881).

        Example:
            >>> import torch
            >>> from pyroflows.layers import Coupling
            >>> x = torch.ones(3, 2)
            >>> Coupling(2).forward_and_score(x, -x)[2].shape  # of a standard normal
            torch.Size([3, 2])
        """
        y, log_det = self.unchecked_forward_and_log_det(x, context)
        return y, log_det, pull_back_score(self.unchecked_inverse_and_log_det, y, score, context)

    def inverse_and_score(self, y: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        """Map data to latent, and push the score of a density of the data along, as :meth:`forward_and_score` does."""
        x, log_det = self.unchecked_inverse_and_log_det(y, context)
        return x, log_det, pull_back_score(self.unchecked_forward_and_log_det, x, score, context)

    def _check(self, x: Tensor, shape: Size, context: Tensor | None) -> Tensor:
        """Return ``x``, expanded to the batch shape that it has together with the context."""
        check_event(x, shape)
        batch, given = x.shape[: x.dim() - len(shape)], context is not None or self.context_features
        return x.expand(self.broadcast_batch(batch, context) + shape) if given else x

    def broadcast_batch(self, batch: Size, context: Tensor | None) -> Size:
        """Return the batch shape of an input together with its context, which is checked."""
        return check_context(context, self.context_features, batch)

    def context_for(self, context: Tensor | None) -> Tensor | None:
        """Return the context if this map takes one: a stack hands its own to all layers."""
        return context if self.context_features else None

    @property
    def inv(self) -> "Bijection":
        """The inverse, a module that shares this one's parameters."""
        inverse = None if self._inverse_reference is None else self._inverse_reference()
        if inverse is None:
            inverse = Inverse(self)
            self._inverse_reference = weakref.ref(inverse)
        return inverse

    def condition(self, context: Tensor) -> "Bijection":
        """Fix the context; a map that takes none is returned as it is, so that both kinds go into one stack."""
        return Conditioned(self, context) if self.context_features else self

    def forward_shape(self, shape: Size) -> Size:
        return self._map_shape(shape, self.latent_shape, self.data_shape)

    def inverse_shape(self, shape: Size) -> Size:
        return self._map_shape(shape, self.data_shape, self.latent_shape)

    def _map_shape(self, shape: Size, source: Size, target: Size) -> Size:
        if Size(shape[-len(source) :]) != source:
            raise ValueError(f"expected a shape {batched_shape(source)}; got {tuple(shape)}")
        return Size(shape[: len(shape) - len(source)]) + target

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        context = f", context_features={self.context_features}" if self.context_features else ""
        return f"{brief_shape(self.latent_shape)}{context}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inverse_reference": None, "_record": None}


Bijection.__init_subclass__()  # whose own maps are checked as well
ConditionalTransform.register(Bijection)


class Inverse(Bijection):
    """A bijection read backwards: its latent side is the data side of the other.

    Args:
        bijection: the bijection to invert; its parameters are registered here.

    Example:
        >>> from pyroflows.layers import ElementwiseAffine
        >>> [name for name, _ in Inverse(ElementwiseAffine(2)).named_parameters()]
        ['bijection.shift', 'bijection.log_scale']
    """

    def __init__(self, bijection: Bijection):
        check_type("a Bijection", bijection, Bijection)
        data_shape, context_features = bijection.latent_shape, bijection.context_features
        super().__init__(bijection.data_shape, data_shape=data_shape, context_features=context_features)
        self.bijection = bijection
        self.domain, self.codomain = bijection.codomain, bijection.domain
        self.forward_passes, self.inverse_passes = bijection.inverse_passes, bijection.forward_passes

    @property
    def inv(self) -> Bijection:
        return self.bijection

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return self.bijection.unchecked_inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        return self.bijection.unchecked_forward_and_log_det(y, context)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        return self.bijection.unchecked_inverse_and_score(x, score, context)

    def inverse_and_score(self, y: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        return self.bijection.unchecked_forward_and_score(y, score, context)

    def evaluate(self, x: Tensor, context: Tensor | None, *, forward: bool) -> Tensor:
        return self.bijection.evaluate(x, context, forward=not forward)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.bijection.log_abs_det_jacobian(y, x, context)


class Conditioned(Bijection):
    """A conditional bijection with its context fixed; the context's batch shape becomes part of its shapes.

    Args:
        bijection: a bijection with ``context_features > 0``.
        context: its context, shape ``(*batch, context_features)``.

    Example:
        >>> import torch
        >>> from pyroflows.layers import Coupling
        >>> Conditioned(Coupling(2, context_features=3), torch.zeros(8, 3)).forward_shape(torch.Size([2]))
        torch.Size([8, 2])
    """

    _remembers = False  # built again for every context

    def __init__(self, bijection: Bijection, context: Tensor):
        check_type("a Bijection", bijection, Bijection)
        super().__init__(bijection.latent_shape, data_shape=bijection.data_shape)
        bijection.broadcast_batch(Size(), context)
        self.bijection = bijection
        self.context = context
        self.domain, self.codomain = bijection.domain, bijection.codomain
        self.forward_passes, self.inverse_passes = bijection.forward_passes, bijection.inverse_passes

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return self.bijection.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        return self.bijection.inverse_and_log_det(y, self.context)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        return self.bijection.forward_and_score(x, score, self.context)

    def inverse_and_score(self, y: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        return self.bijection.inverse_and_score(y, score, self.context)

    def _map_shape(self, shape: Size, source: Size, target: Size) -> Size:
        mapped = super()._map_shape(shape, source, target)
        return self.bijection.broadcast_batch(mapped[: len(mapped) - len(target)], self.context) + target

    def evaluate(self, x: Tensor, context: Tensor | None, *, forward: bool) -> Tensor:
        self.broadcast_batch(Size(), context)
        return self.bijection.evaluate(x, self.context, forward=forward)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        self.broadcast_batch(Size(), context)
        return self.bijection.log_abs_det_jacobian(x, y, self.context)

    def extra_repr(self) -> str:
        return f"context={tuple(self.context.shape)}"
