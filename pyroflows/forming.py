"""What follows from a module's weights alone: formed anew by each call, or once for the length of a block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["formed", "frozen"]

Result = TypeVar("Result")


def formed(method: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Have a method without arguments, which reads the weights alone, give its last result within :func:`frozen`."""
    name = method.__name__

    @functools.wraps(method)
    def give(self: Any) -> Result:
        owner, results = self.__dict__.get("_formed", (None, {}))
        # A copy made within a block has weights of its own.
        if owner != id(self) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return method(self)
        if name not in results:
            results[name] = method(self)
        found: Result = results[name]
        return found

    return give


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Form what follows from the weights alone once, for calls without gradients in this block."""
    parts = [part for part in module.modules() if "_formed" not in part.__dict__]
    for part in parts:
        part.__dict__["_formed"] = (id(part), {})
    try:
        yield
    finally:
        for part in parts:
            part.__dict__.pop("_formed", None)
