"""What follows from a module's weights alone: formed anew by each call, or once for the length of a block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pyroflows.marks import inside_functorch, marks_of

__all__ = ["formed", "frozen"]

Result = TypeVar("Result")


class _Kept(dict[str, tuple[list[int] | None, Any]]):
    """What a module has formed in a block; a copy of the module, or a file, goes without."""

    def __init__(self, watch: bool):
        super().__init__()
        self.watch = watch

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def formed(method: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Have a method without arguments, which reads the weights alone, give its last result within :func:`frozen`."""
    name = method.__name__

    @functools.wraps(method)
    def give(self: Any) -> Result:
        kept = self.__dict__.get("_formed")
        if kept is None or torch.is_grad_enabled():
            return method(self)
        marks = None
        if kept.watch:
            if torch.compiler.is_compiling() or inside_functorch() or torch._C._is_any_autocast_enabled():
                return method(self)
            marks = marks_of(self)
        if name not in kept or kept[name][0] != marks:
            kept[name] = marks, method(self)
        found = kept[name][1]
        # A number may reach the caller, who may write to it.
        return cast(Result, found.clone() if isinstance(found, Tensor) and found.dim() == 0 else found)

    return give


@contextmanager
def frozen(module: nn.Module, *, watch: bool = True) -> Iterator[None]:
    """Form what follows from the weights alone once, for calls without gradients in this block.

    Each call sees whether they have moved, unless nobody can move them meanwhile and there is nothing to watch.
    """
    parts = [part for part in module.modules() if part.__dict__.get("_formed") is None]
    for part in parts:
        part.__dict__["_formed"] = _Kept(watch)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__.pop("_formed", None)
