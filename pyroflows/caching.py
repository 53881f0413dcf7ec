"""What follows from a module's weights alone: formed anew by each call, or once for the length of a block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyroflows.private import inside_functorch

__all__ = ["cached", "caching", "fingerprint", "version"]

Result = TypeVar("Result")

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    """Fused optimizers and Pyro's own write to ``p.data`` and leave ``p._version`` alone; their step is seen here."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def version(tensor: Tensor) -> int:
    """Give the number of writes to a tensor, as far as torch counts them."""
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor that is sparse, or under torch.func, has no memory of its own
        return 0


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Assigning to ``p.data`` moves no version, but the numbers."""
    try:
        return [tensor.data_ptr() for tensor in tensors]
    except RuntimeError:
        return [_address(tensor) for tensor in tensors]


def fingerprint(module: nn.Module) -> list[int]:
    """Give what an evaluation of ``module`` depends on beside its input: modes, and tensors with their versions."""
    modes, tensors, parts = [], [], [module]
    for part in parts:
        modes.append(part.training)
        for held in (part._parameters, part._buffers):
            tensors += [tensor for tensor in held.values() if tensor is not None]
        parts += [child for child in part._modules.values() if child is not None]
    return [_optimizer_steps, *modes, *map(id, tensors), *map(version, tensors), *_addresses(tensors)]


class _Kept(dict[str, tuple[list[int] | None, Any]]):
    """What a module has formed in a block; a copy of the module, or a file, goes without."""

    def __init__(self, watch: bool):
        super().__init__()
        self.watch = watch

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def cached(method: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Have a method without arguments, which reads the weights alone, give its last result within :func:`frozen`."""
    name = method.__name__

    @functools.wraps(method)
    def give(self: Any) -> Result:
        kept = self.__dict__.get("_cache")
        if kept is None or torch.is_grad_enabled():
            return method(self)
        marks = None
        if kept.watch:
            if torch.compiler.is_compiling() or inside_functorch() or torch._C._is_any_autocast_enabled():
                return method(self)
            marks = fingerprint(self)
        if name not in kept or kept[name][0] != marks:
            kept[name] = marks, method(self)
        found = kept[name][1]
        # A number may reach the caller, who may write to it.
        return cast(Result, found.clone() if isinstance(found, Tensor) and found.dim() == 0 else found)

    return give


@contextmanager
def caching(module: nn.Module, *, watch: bool = True) -> Iterator[None]:
    """Form what follows from the weights alone once, for calls without gradients in this block.

    Each call sees whether they have moved, unless nobody can move them meanwhile and there is nothing to watch.
    """
    parts = [part for part in module.modules() if part.__dict__.get("_cache") is None]
    for part in parts:
        part.__dict__["_cache"] = _Kept(watch)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__.pop("_cache", None)
