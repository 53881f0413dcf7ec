"""Modules that remember the arguments of their constructors or builders."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from numbers import Integral, Real
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from pyroflows.memory import leaves

__all__ = ["Recorded", "copy_plain", "is_plain", "makers", "recorded"]

P = ParamSpec("P")
Result = TypeVar("Result")

_recorded: dict[str, Callable[..., Any]] = {}
"""The classes, dataclasses and builders of this package that a recipe may name, registered as they are defined."""


class Recorded:
    """A module that remembers the arguments of its constructor.

    An argument that is no plain value, such as a module, must be an attribute of the same name, from which it is read.
    A user's own subclass is saved by its attributes instead, where a file can hold them all.

    Example:
        >>> from torch import nn
        >>> class Scale(Recorded, nn.Module):
        ...     def __init__(self, factor):
        ...         super().__init__()
        >>> Scale(2.0)._arguments
        (None, (2.0,), {})
    """

    _arguments: tuple[str | None, tuple[Any, ...], dict[str, Any]]
    _remembers: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("pyroflows."):
            _recorded[cls.__name__] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        if cls._remembers:
            _remember(self, None, args, kwargs)
        return self


def recorded(builder: Callable[P, Result]) -> Callable[P, Result]:
    """Register a dataclass, or a builder, whose name and arguments its results remember in place of a constructor's."""
    _recorded[builder.__name__] = builder
    if isinstance(builder, type):
        return builder

    @functools.wraps(builder)
    def build(*args: P.args, **kwargs: P.kwargs) -> Result:
        module = builder(*args, **kwargs)
        _remember(module, builder.__name__, args, kwargs)
        return module

    return build


def makers() -> dict[str, Callable[..., Any]]:
    """Return the classes and builders that a recipe may name."""
    import_module("pyroflows.api")  # which defines them all
    return _recorded


def _remember(module: Any, builder: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    arguments = (builder, tuple(map(copy_plain, args)), {name: copy_plain(value) for name, value in kwargs.items()})
    object.__setattr__(module, "_arguments", arguments)  # modules take attributes only after their initialisation


def copy_plain(value: Any) -> Any:
    """Return a copy of a plain value, and ``...`` for others, such as modules and functions."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (tuple, list)):
        values = tuple(map(copy_plain, value))
        return ... if any(item is ... for item in values) else values
    if is_dataclass(value) and not isinstance(value, type):
        return value
    return torch.as_tensor(value).clone() if hasattr(value, "__array__") else ...


def is_plain(value: Any) -> bool:
    """Return whether a value can be written as JSON."""
    return all(leaf is None or isinstance(leaf, (bool, int, float, str)) for leaf in leaves(copy_plain(value)))
