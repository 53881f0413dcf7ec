"""Bijections that are evaluated once: two methods for a layer, Pyro's whole transform protocol for its users."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn
from torch.distributions import biject_to, constraints, transform_to

from pyroflows.arguments import Shape, as_shape
from pyroflows.caching import fingerprint, version
from pyroflows.recipe import Recorded

__all__ = ["Bijection", "Conditioned", "Inverse"]


class _Event(constraints._IndependentConstraint):
    """A constraint on every number of an event; torch's own cannot check an empty batch."""

    def check(self, value: Tensor) -> Tensor:
        dims = self.reinterpreted_batch_ndims
        return self.base_constraint.check(value).flatten(-dims).all(-1)


def event_constraint(constraint: constraints.Constraint, dims: int) -> constraints.Constraint:
    """Give the constraint that holds where ``constraint`` holds for each number of an event of ``dims`` dimensions."""
    return _Event(constraint, dims)


for _registry in (biject_to, transform_to):
    _registry.register(_Event, _registry._registry[constraints._IndependentConstraint])


def _batched(shape: Sequence[int]) -> str:
    return "(*batch, " + ", ".join(map(str, shape)) + ")"


class _Record:
    """One evaluation: where it started, what it gave (held weakly), and under which conditions it stands."""

    __slots__ = ("context", "forward", "grad", "log_det", "marks", "result", "returned", "source", "versions")

    def __init__(
        self, owner: Bijection, source: Tensor, result: Tensor, log_det: Tensor, context: Tensor | None, forward: bool
    ):
        owner_reference = weakref.ref(owner)

        def forget(reference: weakref.ref[Tensor]) -> None:
            owner = owner_reference()
            if owner is not None and owner._record is not None and owner._record.result is reference:
                object.__setattr__(owner, "_record", None)

        self.source, self.log_det, self.context, self.forward = source, log_det, context, forward
        self.result = weakref.ref(result, forget)
        self.grad = torch.is_grad_enabled()
        self.returned = False
        self.marks = fingerprint(owner)
        self.versions = self._versions(result)

    def _versions(self, result: Tensor) -> tuple[Any, ...]:
        tensors = (self.source, result) if self.context is None else (self.source, result, self.context)
        return tuple((version(tensor), tensor.requires_grad) for tensor in tensors)

    def leads_back(self, owner: Bijection, x: Tensor, context: Tensor | None, forward: bool) -> bool:
        # An inference tensor has no version to tell that it was written to, so it is always evaluated.
        fresh = self.forward is not forward and not self.returned and not x.is_inference()
        return fresh and self.result() is x and self.holds(owner, context)

    def holds(self, owner: Bijection, context: Tensor | None) -> bool:
        result = self.result()
        return (
            result is not None
            and context is self.context
            and (self.grad or not torch.is_grad_enabled())
            and self._versions(result) == self.versions
            and fingerprint(owner) == self.marks
        )


def _checked(method: Callable[..., tuple[Tensor, ...]], side: str) -> Callable[..., tuple[Tensor, ...]]:
    @functools.wraps(method)
    def checked(self: Bijection, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        return method(self, self._check(x, getattr(self, side), context), context)

    @functools.wraps(method)
    def checked_with_score(
        self: Bijection, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        x = self._check(x, getattr(self, side), context)
        return method(self, x, self._check_score(score, x), context)

    return checked_with_score if method.__name__.endswith("score") else checked


def _pull(back: Callable[..., tuple[Tensor, Tensor]], y: Tensor, score: Tensor, context: Tensor | None) -> Tensor:
    """Carry a score to ``y``, where ``back`` leads from there to the point at which the score is known."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        result, log_det = back(y, context)
        return vjp(result, log_det, y, score)


def vjp(result: Tensor, log_det: Tensor | None, at: Tensor, direction: Tensor) -> Tensor:
    """Give the gradient at one tensor of a result times a direction, and of a log-determinant; the graph stays."""
    results, directions = [result], [direction]
    if log_det is not None and log_det.requires_grad:
        results.append(log_det)
        directions.append(torch.ones_like(log_det))
    if not result.requires_grad or not at.numel():
        return torch.zeros_like(at)
    found = torch.autograd.grad(results, at, directions, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(at) if found is None else found


def times(own: Tensor, factor: Tensor) -> Tensor:
    """Give a product, in the place of its first factor, which nothing else may hold, where no gradient reads that."""
    return own * factor if torch.is_grad_enabled() else own.mul_(factor)


class Bijection(Recorded, TransformModule):
    r"""An invertible map from latent to data, written as two methods that give the image and the log-determinant.

    A layer defines ``forward_and_log_det(x, context=None)`` (latent to data) and
    ``inverse_and_log_det(y, context=None)`` (data to latent). Pyro's protocol (call, ``inv``,
    ``log_abs_det_jacobian``, ``condition``, shapes) is derived from them here, once, and evaluates
    a layer once where Pyro asks twice: the first call leaves a record of its input, result and
    log-determinant, and the call that comes back takes it.

    1. A record answers once: scoring takes it, and scoring again evaluates again.
    2. Only the way back is free: ``t(x)`` twice evaluates twice; ``t.inv(t(x))`` is ``x``.
    3. The way back is checked: the same tensors at the same versions, the same parameters and
       modes, no optimizer step since, and gradients no wider than they were recorded. (In-place writes
       to ``p.data`` outside an optimizer, or through NumPy, leave no trace that could be checked.)
    4. The result is held weakly, in one slot, which is never copied, pickled or saved.
    5. The log-determinant of a pair without a record is read off the cheaper direction.

    Args:
        latent_shape: the event shape of the latent side, or its number of features.
        data_shape: the event shape of the data side, where it differs.
        context_features: the length of the context vector; 0 for a map without context.

    Shapes:
        x: ``(*batch, *latent_shape)``; y: ``(*batch, *data_shape)``; context: ``(*batch, context_features)``;
        log_det: ``(*batch,)``. The batch shapes of input and context are broadcast.

    Raises:
        TypeError: the input is not a floating-point tensor.
        ValueError: a shape does not match, or a context is missing or not expected.

    Example:
        >>> import math
        >>> class Double(Bijection):
        ...     def forward_and_log_det(self, x, context=None):
        ...         return 2 * x, x.new_full(x.shape[:-1], x.shape[-1] * math.log(2))
        ...
        ...     def inverse_and_log_det(self, y, context=None):
        ...         return y / 2, y.new_full(y.shape[:-1], -y.shape[-1] * math.log(2))
        >>> double = Double(3)
        >>> double.inv(double(torch.ones(3)))
        tensor([1., 1., 1.])
    """

    bijective = True
    forward_passes: int = 1
    """Evaluations of the conditioner from latent to data: the price of sampling."""
    inverse_passes: int = 1
    """Evaluations of the conditioner from data to latent: the price of scoring data."""
    _record: _Record | None

    def __init__(self, latent_shape: Shape, *, data_shape: Shape | None = None, context_features: int = 0):
        super().__init__()
        if isinstance(context_features, bool) or not isinstance(context_features, Integral) or context_features < 0:
            raise ValueError(f"expected context_features to be a non-negative integer; got {context_features!r}")
        object.__setattr__(self, "_record", None)
        self.latent_shape: Size = as_shape(latent_shape)
        self.data_shape: Size = self.latent_shape if data_shape is None else as_shape(data_shape)
        self.context_features: int = int(context_features)
        self.domain: constraints.Constraint = event_constraint(constraints.real, len(self.latent_shape))
        self.codomain: constraints.Constraint = event_constraint(constraints.real, len(self.data_shape))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for result in ("log_det", "score"):
            for direction, side in (("forward", "latent_shape"), ("inverse", "data_shape")):
                name = f"{direction}_and_{result}"
                if name in cls.__dict__:
                    setattr(cls, name, _checked(cls.__dict__[name], side))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latent to data; give ``y`` and ``log|det dy/dx|``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_and_log_det(x, context=None)")

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latent; give ``x`` and ``log|det dx/dy|``."""
        raise NotImplementedError(f"{type(self).__name__} must define inverse_and_log_det(y, context=None)")

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Map latent to data, and carry along the score of a density: what a path gradient needs, in one pass.

        .. math:: \nabla_y \log q_Y(y) = J^{-\top} \left(\nabla_x \log q_X(x) - \nabla_x \log|\det J|\right)

        By default the score is read off the inverse, which is evaluated once. A coupling does not evaluate its
        conditioner again, and the inverse of an autoregressive layer solves with its Jacobian.

        Args:
            x: the latent.
            score: the gradient of the latent's log-density at ``x``.
            context: the context, of a map that takes one.

        Shapes:
            x, score: ``(*batch, *latent_shape)``; y and its score: ``(*batch, *data_shape)``; log_det: ``(*batch,)``.

        Returns:
            ``y`` and ``log|det dy/dx|``, as :meth:`forward_and_log_det` gives them, and the score at ``y``, detached.

        References:
            Fast and Unified Path Gradient Estimators for Normalizing Flows, Vaitl et al., 2024 (arXiv:2403.15881).

        Example:
            >>> from pyroflows.layers import Coupling
            >>> x = torch.ones(3, 2)
            >>> y, log_det, score = Coupling(2).forward_and_score(x, -x)  # of a standard normal
            >>> score.shape
            torch.Size([3, 2])
        """
        x = self._check(x, self.latent_shape, context)
        score = self._check_score(score, x)
        y, log_det = self.forward_and_log_det(x, context)
        return y, log_det, _pull(self.inverse_and_log_det, y, score, context)

    def inverse_and_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map data to latent, and carry along the score of a density of data; :meth:`forward_and_score` mirrored."""
        y = self._check(y, self.data_shape, context)
        score = self._check_score(score, y)
        x, log_det = self.inverse_and_log_det(y, context)
        return x, log_det, _pull(self.forward_and_log_det, x, score, context)

    def _check(self, x: Tensor, shape: Size, context: Tensor | None) -> Tensor:
        """Give ``x``, expanded to the batch shape it has together with the context, or say what is wrong."""
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor of shape {_batched(shape)}; got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point tensor; got {x.dtype}")
        if x.shape[-len(shape) :] != shape:
            raise ValueError(f"expected a tensor of shape {_batched(shape)}; got {tuple(x.shape)}")
        if context is None and not self.context_features:
            return x
        batch = self.broadcast_batch(x.shape[: x.dim() - len(shape)], context)
        return x.expand(batch + shape)

    @staticmethod
    def _check_score(score: Tensor, x: Tensor) -> Tensor:
        """Give the score, detached and of the shape of ``x``, or say what is wrong."""
        if not isinstance(score, Tensor):
            raise TypeError(
                f"expected a score of shape {tuple(x.shape)}, that of the point; got {type(score).__name__}"
            )
        if score.shape == x.shape:
            return score.detach()
        try:
            return score.detach().expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"expected a score of shape {tuple(x.shape)}, that of the point; got {tuple(score.shape)}"
            ) from None

    def _sides(self, forward: bool) -> tuple[Size, Size]:
        return (self.latent_shape, self.data_shape) if forward else (self.data_shape, self.latent_shape)

    def broadcast_batch(self, batch: Size, context: Tensor | None) -> Size:
        if context is None and self.context_features == 0:
            return batch
        expected = f"expected a context of shape (*batch, {self.context_features})"
        if context is None:
            raise ValueError(f"{expected}; got none")
        if not isinstance(context, Tensor):
            raise TypeError(f"expected a context that is a tensor; got {type(context).__name__}")
        if self.context_features == 0:
            raise ValueError(f"expected no context, since context_features=0; got one of shape {tuple(context.shape)}")
        if not context.is_floating_point():
            raise TypeError(f"expected a floating-point context; got {context.dtype}")
        if context.dim() == 0 or context.shape[-1] != self.context_features:
            raise ValueError(f"{expected}; got {tuple(context.shape)}")
        try:
            return torch.broadcast_shapes(batch, context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"expected a context whose batch shape broadcasts with {tuple(batch)}; got {tuple(context.shape)}"
            ) from None

    def context_for(self, context: Tensor | None) -> Tensor | None:
        """A stack hands its context to the layers that take one."""
        return context if self.context_features else None

    # Pyro's protocol

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._evaluate(x, context, forward=True)

    def _inv_call(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        return self._evaluate(y, context, forward=False)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Give ``log|det dy/dx|`` of a known pair, shape ``(*batch,)``."""
        return self._log_det_of(x, y, context)

    @property
    def inv(self) -> Bijection:
        """The inverse, a module that shares this one's parameters."""
        inverse = None if self._inv is None else self._inv()
        if inverse is None:
            inverse = Inverse(self)
            object.__setattr__(self, "_inv", weakref.ref(inverse))
        return inverse

    def condition(self, context: Tensor) -> Bijection:
        """Fix the context; a map that takes none is returned as it is, so that both kinds go into one stack."""
        return Conditioned(self, context) if self.context_features else self

    def with_cache(self, cache_size: int = 1) -> Bijection:
        """Give the bijection itself: its record serves every cache size."""
        return self

    def clear_cache(self) -> None:
        """Drop the record; nothing ever needs this, Pyro's distributions offer it."""
        object.__setattr__(self, "_record", None)

    def forward_shape(self, shape: Size) -> Size:
        return self._map_shape(shape, *self._sides(forward=True))

    def inverse_shape(self, shape: Size) -> Size:
        return self._map_shape(shape, *self._sides(forward=False))

    def _map_shape(self, shape: Size, source: Size, target: Size) -> Size:
        if Size(shape[-len(source) :]) != source:
            raise ValueError(f"expected a shape {_batched(source)}; got {tuple(shape)}")
        return Size(shape[: len(shape) - len(source)]) + target

    def _evaluate(self, x: Tensor, context: Tensor | None, *, forward: bool) -> Tensor:
        record = self._record
        if record is not None and record.leads_back(self, x, context, forward):
            record.returned = True
            return record.source
        method = self.forward_and_log_det if forward else self.inverse_and_log_det
        result, log_det = method(x, context)
        # An input that was broadcast against the context is not what the way back would give.
        if result is not x and log_det.shape == x.shape[: x.dim() - len(self._sides(forward)[0])]:
            object.__setattr__(self, "_record", _Record(self, x, result, log_det, context, forward))
        return result

    def _recall(self, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Give the latent of what the last call gave, and ``log|det dy/dx|``, by the record, which this uses up."""
        record = self._record
        if record is None or not record.leads_back(self, y, None, forward=False):
            return None
        self.clear_cache()
        return record.source, record.log_det if torch.is_grad_enabled() else record.log_det.detach()

    def _log_det_of(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        record = self._record
        if record is not None:
            pair = (record.source, record.result()) if record.forward else (record.result(), record.source)
            if pair[0] is x and pair[1] is y and record.holds(self, context):
                object.__setattr__(self, "_record", None)
                log_det = record.log_det if torch.is_grad_enabled() else record.log_det.detach()
                return log_det if record.forward else -log_det
        if self.inverse_passes < self.forward_passes:
            return -self.inverse_and_log_det(y, context)[1]
        return self.forward_and_log_det(x, context)[1]

    __repr__ = nn.Module.__repr__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inv": None, "_record": None}


ConditionalTransform.register(Bijection)


class Inverse(Bijection):
    """A bijection read backwards: its latent side is the other's data side.

    Args:
        bijection: the bijection to invert; its parameters are registered here.

    Shapes:
        x: ``(*batch, *bijection.data_shape)``; y: ``(*batch, *bijection.latent_shape)``.

    Example:
        >>> from pyroflows.layers import ElementwiseAffine
        >>> layer = ElementwiseAffine(2)
        >>> [name for name, _ in Inverse(layer).named_parameters()]
        ['bijection.shift', 'bijection.log_scale']
    """

    def __init__(self, bijection: Bijection):
        if not isinstance(bijection, Bijection):
            raise TypeError(f"expected a Bijection; got {type(bijection).__name__}")
        super().__init__(
            bijection.data_shape, data_shape=bijection.latent_shape, context_features=bijection.context_features
        )
        self.bijection = bijection
        self.domain, self.codomain = bijection.codomain, bijection.domain

    @property
    def forward_passes(self) -> int:  # type: ignore[override]
        return self.bijection.inverse_passes

    @property
    def inverse_passes(self) -> int:  # type: ignore[override]
        return self.bijection.forward_passes

    @property
    def inv(self) -> Bijection:
        return self.bijection

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.forward_and_log_det(y, context)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.bijection.inverse_and_score(x, score, context)

    def inverse_and_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.bijection.forward_and_score(y, score, context)

    def _evaluate(self, x: Tensor, context: Tensor | None, *, forward: bool) -> Tensor:
        return self.bijection._evaluate(x, context, forward=not forward)

    def _log_det_of(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return -self.bijection._log_det_of(y, x, context)


class Conditioned(Bijection):
    """A conditional bijection with its context fixed; the context's batch shape becomes part of its shapes.

    Args:
        bijection: a bijection with ``context_features > 0``.
        context: its context, shape ``(*batch, context_features)``.

    Raises:
        ValueError: the context has another shape, or the bijection takes none.

    Example:
        >>> from pyroflows.layers import Coupling
        >>> conditioned = Conditioned(Coupling(2, context_features=3), torch.zeros(8, 3))
        >>> conditioned.forward_shape(torch.Size([2]))
        torch.Size([8, 2])
    """

    _remembers = False  # made anew for every context

    def __init__(self, bijection: Bijection, context: Tensor):
        if not isinstance(bijection, Bijection):
            raise TypeError(f"expected a Bijection; got {type(bijection).__name__}")
        super().__init__(bijection.latent_shape, data_shape=bijection.data_shape)
        bijection.broadcast_batch(Size(), context)
        self.bijection = bijection
        self.context = context
        self.domain, self.codomain = bijection.domain, bijection.codomain

    @property
    def forward_passes(self) -> int:  # type: ignore[override]
        return self.bijection.forward_passes

    @property
    def inverse_passes(self) -> int:  # type: ignore[override]
        return self.bijection.inverse_passes

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse_and_log_det(y, self.context)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.bijection.forward_and_score(x, score, self.context)

    def inverse_and_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.bijection.inverse_and_score(y, score, self.context)

    def _map_shape(self, shape: Size, source: Size, target: Size) -> Size:
        mapped = super()._map_shape(shape, source, target)
        batch = mapped[: len(mapped) - len(target)]
        return self.bijection.broadcast_batch(batch, self.context) + target

    def _evaluate(self, x: Tensor, context: Tensor | None, *, forward: bool) -> Tensor:
        self.broadcast_batch(Size(), context)
        return self.bijection._evaluate(x, self.context, forward=forward)

    def _log_det_of(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        self.broadcast_batch(Size(), context)
        return self.bijection._log_det_of(x, y, self.context)

    def extra_repr(self) -> str:
        return f"context={tuple(self.context.shape)}"
