"""Checks of arguments: each raises one sentence, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from numbers import Integral, Real
from typing import Any

from torch import Size, Tensor

__all__ = [
    "Shape",
    "as_image_shape",
    "as_shape",
    "as_widths",
    "check_finite",
    "check_names",
    "check_number",
    "check_option",
    "check_sizes",
    "check_varying",
]

Shape = int | Sequence[int]


def _is_size(size: object) -> bool:
    if type(size) is int:  # asking an abstract class takes a hundred times as long, and shapes are read in every step
        return size > 0
    return isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0


def as_shape(shape: Shape) -> Size:
    """Give an event shape from itself or from a number of features."""
    if type(shape) is Size and min(shape, default=0) > 0:
        return shape
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not sizes or not all(map(_is_size, sizes)):
        raise ValueError(f"expected a positive number of features or a shape of positive sizes; got {shape!r}")
    return Size(map(int, sizes))


def as_image_shape(shape: Shape) -> Size:
    """Give the shape ``(C, H, W)`` of an image."""
    given = as_shape(shape)
    if len(given) != 3:
        raise ValueError(f"expected the shape (C, H, W) of an image; got {tuple(given)}")
    return given


def as_widths(name: str, widths: Iterable[int]) -> tuple[int, ...]:
    """Give the widths of a network's hidden layers; there may be none."""
    if not isinstance(widths, Iterable):
        raise TypeError(f"expected {name} as a sequence of positive integers; got {widths!r}")
    widths = tuple(widths)
    if not all(map(_is_size, widths)):
        raise ValueError(f"expected {name} as a sequence of positive integers; got {widths!r}")
    return widths


def check_sizes(**sizes: int) -> None:
    """Refuse a size that is not a positive integer."""
    for name, size in sizes.items():
        if not _is_size(size):
            raise ValueError(f"expected {name} to be a positive integer; got {size!r}")


def check_number(name: str, value: object, interval: str) -> None:
    """Refuse what is not a number in an interval such as ``"[0, 1)"`` or ``"(0, inf)"``."""
    low, high = map(float, interval[1:-1].split(","))
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected {name} in {interval}; got {value!r}")
    number = float(value)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if math.isnan(number) or not (above and below):
        raise ValueError(f"expected {name} in {interval}; got {value!r}")


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


def check_varying(constant: Sequence[int], names: Sequence[Any] | None = None) -> None:
    """Refuse constant columns, given by their numbers, or by names where there are any."""
    if len(constant):
        shown = [str(column) if names is None else repr(names[column]) for column in constant[:10]]
        more = ", ..." if len(constant) > 10 else ""
        raise ValueError(
            f"expected columns that vary, since a constant one has no density; got column {', '.join(shown)}{more}"
        )


def check_finite(name: str, x: Tensor, columns: Sequence[str] | None = None) -> None:
    """Refuse rows with a number that is not finite, named by row and column."""
    bad = ~x.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        number = "NaN" if x[row, column].isnan() else float(x[row, column])
        where = column if columns is None else repr(columns[column])
        raise ValueError(f"expected finite numbers in {name}; got {number} in row {row}, column {where}")
