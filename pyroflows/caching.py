"""Reuse of results while nothing that they depend on has changed: of weights alone, and of one evaluation."""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar, cast

import torch
from torch import Size, Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyroflows.private import contents, inside_functorch, version

__all__ = ["EvaluatedOnce", "Record", "cached", "caching", "fingerprint"]

Result = TypeVar("Result")

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def fingerprint(module: nn.Module) -> list[Any]:
    """Return what changes whenever a module's parameters, buffers or modes do.

    In-place writes move a tensor's version. Line 3 of :class:`EvaluatedOnce`, "no optimizer step since", needs the hook
    above: torch's fused optimizers and Pyro's own write past the version. "Same parameters" needs the addresses: an
    assignment to ``p.data``, as by ``module.double()`` or ``torch.nn.utils.vector_to_parameters``, moves nothing else.
    In-place writes to ``p.data`` by the user, or through NumPy, leave no trace.
    """
    modes, tensors = contents(module)
    return [_optimizer_steps, *modes, *((id(tensor), version(tensor), _address(tensor)) for tensor in tensors)]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse and fake tensors, and those within torch.func, have no memory of their own
        return 0


class _Cache(dict[str, tuple[Any, Any]]):
    """Cached results of a module by the name of the method; copies and pickles of the module go without."""

    def __init__(self, watch: bool):
        super().__init__()
        self.watch = watch

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def cached(method: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Cache a method that depends only on the module's weights, within :func:`caching` and without gradients."""
    name = method.__name__

    @functools.wraps(method)
    def result(self: Any) -> Result:
        cache = self.__dict__.get("_cache")
        if cache is None or torch.is_grad_enabled():
            return method(self)
        current = None
        if cache.watch:
            if torch.compiler.is_compiling() or inside_functorch() or _autocast():
                return method(self)
            current = fingerprint(self)
        if name not in cache or cache[name][0] != current:
            cache[name] = current, method(self)
        value = cache[name][1]
        # A scalar may be returned to the user, who may write to it.
        return cast(Result, value.clone() if isinstance(value, Tensor) and value.dim() == 0 else value)

    return result


def _autocast() -> bool:
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


@contextmanager
def caching(module: nn.Module, *, watch: bool = True) -> Iterator[None]:
    """Cache what depends only on the weights of a module and its parts, for calls without gradients in a block.

    Args:
        module: the module.
        watch: whether each call checks that the weights have not changed; not needed where nothing can change them.
    """
    parts = [part for part in module.modules() if part.__dict__.get("_cache") is None]
    for part in parts:
        part.__dict__["_cache"] = _Cache(watch)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__.pop("_cache", None)


class Record:
    """One evaluation of a map, which answers for its log-determinant as long as nothing has changed.

    The result is held weakly: when it is gone, the record removes itself from the module.

    Args:
        module, slot: the module that was evaluated, and its attribute that holds the record.
        source, result, log_det, context, forward: input, output, log-determinant, context and direction.
    """

    def __init__(
        self,
        module: nn.Module,
        slot: str,
        source: Tensor,
        result: Tensor,
        log_det: Tensor,
        context: Tensor | None,
        *,
        forward: bool = True,
    ):
        module_reference = weakref.ref(module)

        def remove(reference: weakref.ref[Tensor]) -> None:
            record = getattr(module_reference(), slot, None)
            if record is not None and record.result is reference:
                setattr(module_reference(), slot, None)

        self.source, self.log_det, self.context, self.forward = source, log_det, context, forward
        self.result = weakref.ref(result, remove)
        self.returned = False
        self.grad_enabled = torch.is_grad_enabled()
        self.fingerprint = fingerprint(module)
        self.versions = self._versions(result)

    def _versions(self, result: Tensor) -> list[Any]:
        tensors = (self.source, result) if self.context is None else (self.source, result, self.context)
        return [(version(tensor), tensor.requires_grad) for tensor in tensors]

    def is_valid(self, module: nn.Module, result: Tensor, context: Tensor | None) -> bool:
        """Whether an evaluation would give the same again: same tensors, weights and modes, gradients no wider."""
        return (
            self.result() is result
            and self.context is context
            and (self.grad_enabled or not torch.is_grad_enabled())
            and self._versions(result) == self.versions
            and fingerprint(module) == self.fingerprint
        )

    def current_log_det(self) -> Tensor:
        """Return the log-determinant, detached if gradients are off."""
        return self.log_det if torch.is_grad_enabled() else self.log_det.detach()


class EvaluatedOnce:
    """A map of two directions, evaluated once where Pyro asks for the map and for its log-determinant apart.

    The first call leaves a record of its input, result and log-determinant, and the call that comes back takes it.

    1. A record answers once: scoring uses it up, and scoring again evaluates again.
    2. Only the way back is free: ``t(x)`` twice evaluates twice; ``t.inv(t(x))`` is ``x``.
    3. The way back is checked: same tensors at the same versions, same parameters and modes, no optimizer step since,
       gradients no wider. See :func:`fingerprint` for what leaves no trace to check.
    4. The result is held weakly, in one slot, which is never copied, pickled or saved.
    5. The log-determinant of a pair without a record is computed in the cheaper direction.
    """

    latent_shape: Size
    data_shape: Size
    forward_passes: int
    inverse_passes: int
    forward_and_log_det: Callable[..., tuple[Tensor, Tensor]]
    inverse_and_log_det: Callable[..., tuple[Tensor, Tensor]]
    _record: Record | None = None

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.evaluate(x, context, forward=True)

    def _inv_call(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        return self.evaluate(y, context, forward=False)

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]  # torch's documented hooks for transforms, which leave no record

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_log_det(y)[0]

    def evaluate(self, x: Tensor, context: Tensor | None, *, forward: bool) -> Tensor:
        """Map in one direction, and leave a record; or take the one that leads back."""
        record = self._record
        # An inference tensor has no version to tell that it was written to, so it is always evaluated.
        returns = record is not None and record.forward is not forward and not record.returned and not x.is_inference()
        if record is not None and returns and record.is_valid(cast(nn.Module, self), x, context):
            record.returned = True
            return record.source
        result, log_det = (self.forward_and_log_det if forward else self.inverse_and_log_det)(x, context)
        event_shape = self.latent_shape if forward else self.data_shape
        # An input that was broadcast with the context is not what the way back would return.
        if result is not x and log_det.shape == x.shape[: x.dim() - len(event_shape)]:
            self._record = Record(cast(nn.Module, self), "_record", x, result, log_det, context, forward=forward)
        return result

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``log|det dy/dx|`` of a known pair, shape ``(*batch,)``, from the record of its evaluation if any."""
        record = self._record
        if record is not None:
            source, result = (x, y) if record.forward else (y, x)
            if record.source is source and record.is_valid(cast(nn.Module, self), result, context):
                self.clear_cache()
                return record.current_log_det() if record.forward else -record.current_log_det()
        if self.inverse_passes < self.forward_passes:
            return -self.inverse_and_log_det(y, context)[1]
        return self.forward_and_log_det(x, context)[1]

    @property
    def sign(self) -> int:
        """Not defined for maps of several features; an AttributeError, since torch asks for it by ``hasattr``."""
        raise AttributeError(f"{type(self).__name__} has no sign, since it may map several features at once")

    @property
    def event_dim(self) -> int:
        """The number of dimensions of an event, if both sides have the same; otherwise an AttributeError, as above."""
        if len(self.latent_shape) != len(self.data_shape):
            raise AttributeError(f"{type(self).__name__} maps between events of different dimensions")
        return len(self.data_shape)

    def with_cache(self, cache_size: int = 1) -> Self:
        """Return the map itself: its record serves every cache size."""
        return self

    def clear_cache(self) -> None:
        """Drop the record; nothing needs this, but Pyro's distributions offer it."""
        self._record = None
