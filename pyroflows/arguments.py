"""Checks of arguments: each raises one sentence, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

from torch import Size

__all__ = ["Shape", "as_shape", "check_names", "check_option", "check_sizes"]

Shape = int | Sequence[int]


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def as_shape(shape: Shape) -> Size:
    """Give an event shape from itself or from a number of features."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape) if isinstance(shape, Iterable) else ()
    if not sizes or not all(map(_is_size, sizes)):
        raise ValueError(f"expected a positive number of features or a shape of positive sizes; got {shape!r}")
    return Size(sizes)


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Refuse a size, or one of several, that is not a positive integer."""
    for name, size in sizes.items():
        if isinstance(size, Iterable):
            if not all(map(_is_size, size)):
                raise ValueError(f"expected {name} to be positive integers; got {size!r}")
        elif not _is_size(size):
            raise ValueError(f"expected {name} to be a positive integer; got {size!r}")


def check_option(name: str, option: object, options: Iterable[str]) -> None:
    """Refuse an option that is not among those offered."""
    options = list(options)
    if option not in options:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, options))}; got {option!r}")


def check_names(given: dict[str, Any], takes: Callable[..., Any], *, but: Iterable[str] = ()) -> None:
    """Refuse a keyword that the callable does not take, or that is not the caller's to give."""
    offered = [name for name in signature(takes).parameters if name not in (*but, "self")]
    for name in given:
        if name not in offered:
            raise TypeError(f"expected options among {', '.join(offered)}; got {name!r}")
